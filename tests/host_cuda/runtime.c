/* runtime.c - the CUDA runtime's functions that step.c calls, over a queue that a thread works off, now and then late. */
#include "host_cuda.h"

#include "base/clock.h"
#include "base/status.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { ARG_BYTES = 192, QUEUE = 1 << 16, MOST_CAPTURED = 64 };

struct job {
  void (*work)(void *);
  char arg[ARG_BYTES];
};
struct graph {
  int n;
  struct job job[MOST_CAPTURED];
};
struct event {
  size_t at; /* jobs before it, and itself */
  double seconds;
};

static struct job queue[QUEUE];
static size_t n_pushed, n_done;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t pushed = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
static struct graph captured;
static bool capturing;
int host_graph_launches, host_captures, host_wrong;

static void *stream(void *unused) {
  uint32_t random = 7;
  for (;;) {
    pthread_mutex_lock(&mutex);
    while (n_done == n_pushed) pthread_cond_wait(&pushed, &mutex);
    struct job job = queue[n_done % QUEUE];
    pthread_mutex_unlock(&mutex);
    random = random * 1664525u + 1013904223u;
    if (random >> 30 == 0) (void)nanosleep(&(struct timespec){.tv_nsec = (long)(random % 150000)}, NULL);
    job.work(job.arg);
    pthread_mutex_lock(&mutex);
    n_done++;
    pthread_cond_broadcast(&done);
    pthread_mutex_unlock(&mutex);
  }
  return unused;
}

void host_start(void) {
  pthread_t thread;
  if (pthread_create(&thread, NULL, stream, NULL)) abort();
  (void)pthread_detach(thread);
}

void host_push(void (*work)(void *), const void *arg, size_t n_bytes) {
  struct job job = {.work = work};
  if (n_bytes > ARG_BYTES || captured.n == MOST_CAPTURED) abort();
  memcpy(job.arg, arg, n_bytes);
  if (capturing) {
    captured.job[captured.n++] = job;
    return;
  }
  pthread_mutex_lock(&mutex);
  queue[n_pushed++ % QUEUE] = job;
  pthread_cond_signal(&pushed);
  pthread_mutex_unlock(&mutex);
}

static cudaError_t wait_for(size_t n) {
  if (capturing) host_wrong++; /* no graph may wait */
  pthread_mutex_lock(&mutex);
  while (n_done < n) pthread_cond_wait(&done, &mutex);
  pthread_mutex_unlock(&mutex);
  return cudaSuccess;
}

static size_t all_pushed(void) {
  pthread_mutex_lock(&mutex);
  size_t n = n_pushed;
  pthread_mutex_unlock(&mutex);
  return n;
}

/* ---- the runtime --------------------------------------------------------------------------------------- */

cudaError_t cudaSetDevice(int device) {
  (void)device;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  (void)s;
  return wait_for(all_pushed());
}

cudaError_t cudaEventCreate(cudaEvent_t *event) {
  *event = (cudaEvent_t)calloc(1, sizeof(struct event));
  return *event ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  free(event);
  return cudaSuccess;
}

static void record(void *arg) {
  struct event *event;
  memcpy(&event, arg, sizeof event);
  event->seconds = qtr_now();
}

cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  struct event *event = (struct event *)(void *)e;
  (void)s;
  host_push(record, &event, sizeof event);
  event->at = all_pushed();
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) {
  (void)flags;
  return cudaEventRecord(e, s);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) { return wait_for(((struct event *)(void *)event)->at); }

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
  *ms = (float)((((struct event *)(void *)to)->seconds - ((struct event *)(void *)from)->seconds) * 1e3);
  if (*ms < 0) host_wrong++;
  return cudaSuccess;
}

cudaError_t cudaMallocHost(void **memory, size_t n_bytes) {
  *memory = malloc(n_bytes);
  return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void *memory) {
  free(memory);
  return cudaSuccess;
}

struct copy {
  void *to;
  const void *from;
  size_t n_bytes;
};

static void copy(void *arg) {
  const struct copy *c = arg;
  memcpy(c->to, c->from, c->n_bytes);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n_bytes, enum cudaMemcpyKind kind, cudaStream_t s) {
  (void)kind;
  (void)s;
  host_push(copy, &(struct copy){to, from, n_bytes}, sizeof(struct copy));
  return cudaSuccess;
}

/* Of the default stream, for which ours does not wait: at once, whatever ours still has to do. */
cudaError_t cudaMemcpy(void *to, const void *from, size_t n_bytes, enum cudaMemcpyKind kind) {
  (void)kind;
  memcpy(to, from, n_bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *memory, int value, size_t n_bytes, cudaStream_t s) {
  (void)memory;
  (void)value;
  (void)n_bytes;
  (void)s;
  return cudaErrorNotSupported; /* of sparse caches only */
}

cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode) {
  (void)s;
  (void)mode;
  capturing = true;
  captured.n = 0;
  host_captures++;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) {
  (void)s;
  capturing = false;
  struct graph *copied = malloc(sizeof *copied);
  if (!copied) return cudaErrorMemoryAllocation;
  *copied = captured;
  captured.n = 0;
  *graph = (cudaGraph_t)(void *)copied;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags) {
  (void)flags;
  struct graph *copied = malloc(sizeof *copied);
  if (!copied) return cudaErrorMemoryAllocation;
  memcpy(copied, graph, sizeof *copied);
  *exec = (cudaGraphExec_t)(void *)copied;
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  free(graph);
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  free(exec);
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s) {
  const struct graph *graph = (const struct graph *)(const void *)exec;
  (void)s;
  host_graph_launches++;
  for (int i = 0; i < graph->n; i++) host_push(graph->job[i].work, graph->job[i].arg, ARG_BYTES);
  return cudaSuccess;
}

/* ---- cuda.c's part --------------------------------------------------------------------------------------- */

bool qtr_cuda_ok(struct qtr_cuda *c, cudaError_t error, const char *where) {
  if (error && !c->error) {
    c->error = error;
    c->where = where;
  }
  return c->error == cudaSuccess;
}

enum qtr_status qtr_cuda_status(const struct qtr_cuda *c, struct qtr_error *err) {
  return c->error ? qtr_fail(err, QTR_ERR_BACKEND, "error %d in %s", (int)c->error, c->where) : QTR_OK;
}

struct zeros {
  void *at;
  size_t n_bytes;
};

static void clear(void *arg) {
  const struct zeros *z = arg;
  memset(z->at, 0, z->n_bytes);
}

/* Zeroed by the stream, as there. */
enum qtr_status qtr_cuda_malloc(struct qtr_cuda *c, size_t n_bytes, const char *what, void **device, struct qtr_error *err) {
  (void)c;
  *device = malloc(n_bytes > 0 ? n_bytes : 1);
  if (!*device) return qtr_fail_memory(err, what, n_bytes);
  memset(*device, 0xaa, n_bytes);
  host_push(clear, &(struct zeros){*device, n_bytes}, sizeof(struct zeros));
  return QTR_OK;
}

/* Memory is given back when nothing uses it any more. */
void qtr_cuda_release(void *device) {
  (void)wait_for(all_pushed());
  free(device);
}
