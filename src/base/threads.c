/* threads.c - the team (threads.h).
 *
 * One word holds the state of the running loop: the number of the loop in the upper bits, whether it still takes members,
 * and how many workers are inside. A worker enters by adding one while the loop is open; the caller closes the loop when no
 * piece is left and waits only for those inside. Waiting is a bounded spin, then a futex on that word. */
#include "base/threads.h"

#include "base/checked.h"
#include "base/status.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { INSIDE = 0x7ff, OPEN = 0x800, QUIT = 0x1000, LOOP = 0x2000 }; /* fields of `state` */
enum { SPINS = 2000 };                                               /* pauses before sleeping: some tens of microseconds */

struct worker {
  struct qtr_threads *team;
  int index;
  pthread_t thread;
};

struct qtr_threads {
  int n, n_started;
  _Alignas(64) _Atomic uint32_t state;
  _Atomic uint32_t n_sleeping; /* workers in futex_wait on state, or about to be */
  _Atomic bool caller_sleeps;
  /* The loop; written before it opens, constant until it is closed and empty. */
  size_t n_items, chunk;
  qtr_task task;
  void *arg;
  _Alignas(64) _Atomic size_t next; /* first item nobody has taken */
  struct worker worker[];           /* (n - 1) */
};

static inline void pause_cpu(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static void futex_wait(_Atomic uint32_t *word, uint32_t value) {
  (void)syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word) {
  (void)syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static void run_pieces(struct qtr_threads *t, int thread) {
  for (;;) {
    size_t begin = atomic_fetch_add(&t->next, t->chunk);
    if (begin >= t->n_items) return;
    t->task(t->arg, begin, QTR_MIN(t->n_items, begin + t->chunk), thread);
  }
}

/* Waits until `state` says something else than `seen`. */
static uint32_t wait_for_news(struct qtr_threads *t, uint32_t seen) {
  uint32_t s;
  for (int i = 0; i < SPINS; i++) {
    s = atomic_load(&t->state);
    if (s != seen) return s;
    pause_cpu();
  }
  atomic_fetch_add(&t->n_sleeping, 1);
  while ((s = atomic_load(&t->state)) == seen) futex_wait(&t->state, seen);
  atomic_fetch_sub(&t->n_sleeping, 1);
  return s;
}

static void *worker_main(void *arg) {
  struct worker *w = arg;
  struct qtr_threads *t = w->team;
  uint32_t s = atomic_load(&t->state), last_loop = UINT32_MAX;
  for (;;) {
    if (s & QUIT) return NULL;
    if (!(s & OPEN) || s / LOOP == last_loop) {
      s = wait_for_news(t, s);
      continue;
    }
    if (!atomic_compare_exchange_weak(&t->state, &s, s + 1)) continue;
    last_loop = s / LOOP;
    run_pieces(t, w->index);
    s = atomic_fetch_sub(&t->state, 1) - 1;
    if (!(s & OPEN) && (s & INSIDE) == 0 && atomic_load(&t->caller_sleeps)) futex_wake(&t->state);
  }
}

enum qtr_status qtr_threads_create(int n, struct qtr_threads **threads, struct qtr_error *err) {
  *threads = NULL;
  if (n < 1 || n > 1024) return qtr_fail(err, QTR_ERR_ARGUMENT, "a team of %d threads; choose 1 to 1024", n);
  size_t n_bytes = qtr_round_up(sizeof(struct qtr_threads) + (size_t)(n - 1) * sizeof(struct worker), 64);
  struct qtr_threads *t = aligned_alloc(64, n_bytes);
  if (!t) return qtr_fail_memory(err, "threads", n_bytes);
  memset(t, 0, n_bytes);
  t->n = n;
  for (int i = 0; i < n - 1; i++) {
    t->worker[i] = (struct worker){.team = t, .index = i + 1};
    if (pthread_create(&t->worker[i].thread, NULL, worker_main, &t->worker[i]) != 0) {
      qtr_threads_free(t);
      return qtr_fail(err, QTR_ERR_MEMORY, "cannot start thread %d of %d; ask for fewer with --threads", i + 2, n);
    }
    t->n_started++;
  }
  *threads = t;
  return QTR_OK;
}

void qtr_threads_free(struct qtr_threads *t) {
  if (!t) return;
  atomic_fetch_or(&t->state, QUIT);
  futex_wake(&t->state);
  for (int i = 0; i < t->n_started; i++) (void)pthread_join(t->worker[i].thread, NULL);
  free(t);
}

int qtr_threads_count(const struct qtr_threads *t) { return t->n; }

void qtr_threads_for(struct qtr_threads *t, size_t n, size_t chunk, qtr_task task, void *arg) {
  if (n == 0) return;
  if (t->n == 1 || n <= chunk) {
    task(arg, 0, n, 0);
    return;
  }
  t->n_items = n;
  t->chunk = chunk;
  t->task = task;
  t->arg = arg;
  atomic_store(&t->next, 0);
  uint32_t s = (atomic_load(&t->state) / LOOP + 1) * LOOP; /* nobody is inside: only we write */
  atomic_store(&t->state, s | OPEN);
  if (atomic_load(&t->n_sleeping) > 0) futex_wake(&t->state);
  run_pieces(t, 0);
  s = atomic_fetch_and(&t->state, ~(uint32_t)OPEN) & ~(uint32_t)OPEN;
  for (int i = 0; (s & INSIDE) != 0 && i < SPINS; i++) {
    pause_cpu();
    s = atomic_load(&t->state);
  }
  if ((s & INSIDE) == 0) return;
  atomic_store(&t->caller_sleeps, true);
  while (((s = atomic_load(&t->state)) & INSIDE) != 0) futex_wait(&t->state, s);
  atomic_store(&t->caller_sleeps, false);
}

int qtr_threads_available(void) {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return QTR_MAX(1, CPU_COUNT(&set));
  long n = sysconf(_SC_NPROCESSORS_ONLN);
  return n > 0 ? (int)n : 1;
}
