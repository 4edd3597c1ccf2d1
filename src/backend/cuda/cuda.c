/* cuda.c - the vtable of the cuda backend, its device and its memory (cuda.h). */
#include "backend/cuda/cuda.h"

#include "backend/cuda/rows.h"
#include "base/checked.h"
#include "base/half.h"
#include "base/status.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- errors and memory --------------------------------------------------------------------------- */

bool qtr_cuda_ok(struct qtr_cuda *c, cudaError_t error, const char *where) {
  if (error == cudaSuccess) return true;
  if (c->error == cudaSuccess) {
    c->error = error;
    c->where = where;
  }
  return false;
}

enum qtr_status qtr_cuda_status(const struct qtr_cuda *c, struct qtr_error *err) {
  if (c->error == cudaSuccess) return QTR_OK;
  return qtr_fail(err, QTR_ERR_BACKEND, "CUDA: %s: %s (%s)", c->where, cudaGetErrorString(c->error),
                  cudaGetErrorName(c->error));
}

enum qtr_status qtr_cuda_malloc(struct qtr_cuda *c, size_t n_bytes, const char *what, void **device, struct qtr_error *err) {
  *device = NULL;
  enum qtr_status status = qtr_cuda_status(c, err);
  if (status) return status;
  cudaError_t error = cudaMalloc(device, n_bytes ? n_bytes : 1);
  if (error == cudaSuccess) error = cudaMemsetAsync(*device, 0, n_bytes ? n_bytes : 1, c->stream);
  if (error == cudaSuccess) return QTR_OK;
  size_t available = 0, total = 0;
  (void)cudaGetLastError();
  (void)cudaMemGetInfo(&available, &total);
  if (*device) (void)cudaFree(*device);
  *device = NULL;
  if (error != cudaErrorMemoryAllocation) {
    (void)qtr_cuda_ok(c, error, what);
    return qtr_cuda_status(c, err);
  }
  return qtr_fail(err, QTR_ERR_MEMORY,
                  "out of GPU memory: %s needs %.2f GiB, %.2f of %.2f GiB are free; use a smaller model or group, fewer "
                  "sequences (max_num_seqs) or tokens (max_num_batched_tokens, kv_pages), or another --gpu",
                  what, (double)n_bytes * 0x1p-30, (double)available * 0x1p-30, (double)total * 0x1p-30);
}

enum qtr_status qtr_cuda_upload(struct qtr_cuda *c, const void *host, size_t n_bytes, const char *what, void **device,
                                struct qtr_error *err) {
  enum qtr_status status = qtr_cuda_malloc(c, n_bytes, what, device, err);
  if (status) return status;
  if (n_bytes && qtr_cuda_ok(c, cudaMemcpyAsync(*device, host, n_bytes, cudaMemcpyHostToDevice, c->stream), what)) {
    (void)qtr_cuda_ok(c, cudaStreamSynchronize(c->stream), what); /* the host may reuse its memory at once */
  }
  return qtr_cuda_status(c, err);
}

void qtr_cuda_release(void *device) {
  if (device) (void)cudaFree(device);
}

/* ---- opening ------------------------------------------------------------------------------------- */

static void cuda_close(struct qtr_backend *b) {
  struct qtr_cuda *c = (struct qtr_cuda *)b;
  if (c->stream) (void)cudaStreamSynchronize(c->stream);
  qtr_cuda_step_free(c);
  qtr_cuda_release(c->lt_workspace);
  qtr_cuda_release(c->product);
  qtr_cuda_release(c->staging);
  if (c->lt) (void)cublasLtDestroy(c->lt);
  if (c->stream) (void)cudaStreamDestroy(c->stream);
  free(c);
}

static enum qtr_status choose_path(struct qtr_cuda *c, const struct cudaDeviceProp *p, const char *isa,
                                   struct qtr_error *err) {
  if (p->major < 8) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "GPU %d is a %s of compute capability %d.%d; 8.0 or later is needed",
                    c->device, p->name, p->major, p->minor);
  }
  const char *wish = getenv("QUATTUOR_ISA"); /* may name a CPU's */
  if (!isa && wish && strncmp(wish, "sm", 2) == 0) isa = wish;
  if (!qtr_cuda_ok(c, qtr_cuda_gemm_path(&c->path), "choosing kernels")) return qtr_cuda_status(c, err);
  (void)cudaGetLastError(); /* asking for kernels that this build does not have may leave one */
  if (!isa) return QTR_OK;
  if (strcmp(isa, "sm80") == 0) {
    c->path = QTR_CUDA_SM80;
  } else if (strcmp(isa, "sm90") != 0) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "isa \"%.20s\" is none of the GPU's: sm80 or sm90", isa);
  } else if (c->path != QTR_CUDA_SM90) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "GPU %d is a %s: it cannot run sm90 kernels, or this build has none",
                    c->device, p->name);
  }
  return QTR_OK;
}

/* "580.159.04" of the kernel's driver; "?" where it does not tell. */
static void driver_read(char *out, size_t n) {
  char line[256] = "";
  FILE *f = fopen("/proc/driver/nvidia/version", "r");
  (void)snprintf(out, n, "?");
  if (!f) return;
  if (fgets(line, sizeof line, f)) {
    for (char *word = strtok(line, " \t\n"); word; word = strtok(NULL, " \t\n")) {
      if (word[0] >= '0' && word[0] <= '9' && strchr(word, '.')) {
        (void)snprintf(out, n, "%.20s", word);
        break;
      }
    }
  }
  (void)fclose(f);
}

static enum qtr_status cuda_open(const struct qtr_backend_options *o, struct qtr_backend **backend, struct qtr_error *err) {
  *backend = NULL;
  int n_devices = 0, driver = 0;
  cudaError_t error = cudaGetDeviceCount(&n_devices);
  if (error != cudaSuccess || n_devices < 1) {
    (void)cudaGetLastError();
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "no usable GPU: %s; use --device cpu",
                    error == cudaSuccess ? "none is there"
                    : error == cudaErrorInsufficientDriver
                        ? "no NVIDIA driver is loaded, or it is older than this build's CUDA"
                        : cudaGetErrorString(error));
  }
  if (o->gpu < 0 || o->gpu >= n_devices) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "there is no GPU %d: this machine has %d, counted from 0", o->gpu, n_devices);
  }
  struct qtr_cuda *c = calloc(1, sizeof *c);
  if (!c) return qtr_fail_memory(err, "the cuda backend", sizeof *c);
  c->base.ops = &qtr_backend_cuda;
  c->device = o->gpu;
  long n_cores = sysconf(_SC_NPROCESSORS_ONLN); /* what the host does meanwhile: scoring, quantising */
  c->threads = o->threads > 0 ? o->threads : n_cores < 1 ? 1 : n_cores > 16 ? 16 : (int32_t)n_cores;
  struct cudaDeviceProp p;
  enum qtr_status status = QTR_OK;
  if (qtr_cuda_ok(c, cudaSetDevice(c->device), "choosing the GPU") &&
      qtr_cuda_ok(c, cudaGetDeviceProperties(&p, c->device), "reading the GPU's properties")) {
    status = choose_path(c, &p, o->isa, err);
    c->n_sms = p.multiProcessorCount;
    c->has_prefill = qtr_cuda_attention_has_prefill();
    c->memory_total = p.totalGlobalMem;
    (void)cudaDriverGetVersion(&driver);
    char version[24];
    driver_read(version, sizeof version);
    (void)snprintf(c->description, sizeof c->description, "%.48s, sm_%d%d%s, driver %s, CUDA %d.%d", p.name, p.major,
                   p.minor, c->path == QTR_CUDA_SM80 && p.major == 9 ? " with sm_80 kernels" : "", version, driver / 1000,
                   driver % 1000 / 10);
  }
  if (!status && c->error == cudaSuccess) {
    (void)qtr_cuda_ok(c, cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking), "making a stream");
  }
  if (!status) status = qtr_cuda_status(c, err);
  if (!status && cublasLtCreate(&c->lt) != CUBLAS_STATUS_SUCCESS) {
    status = qtr_fail(err, QTR_ERR_BACKEND, "cuBLASLt does not start on GPU %d", c->device);
  }
  if (!status) status = qtr_cuda_malloc(c, QTR_CUDA_LT_BYTES, "the workspace of cuBLASLt", &c->lt_workspace, err);
  if (!status) status = qtr_cuda_step_create(c, err);
  if (status) {
    cuda_close(&c->base);
    return status;
  }
  *backend = &c->base;
  return QTR_OK;
}

static void cuda_caps(struct qtr_backend *b, struct qtr_caps *caps) {
  struct qtr_cuda *c = (struct qtr_cuda *)b;
  size_t available = 0, total = 0;
  (void)cudaSetDevice(c->device);
  (void)cudaMemGetInfo(&available, &total);
  *caps = (struct qtr_caps){
      .act_dtype = QTR_DTYPE_F16, .device = "cuda", .threads = c->threads, .step_tokens = 8192, .memory_share = 0.94f};
  const char *ahead = getenv("QUATTUOR_AHEAD"); /* "0": steps one after the other, to compare; docs/benchmarks.md */
  caps->ahead = !ahead || strcmp(ahead, "0") != 0;
  (void)snprintf(caps->description, sizeof caps->description, "%s", c->description);
  caps->memory_total = c->memory_total;
  caps->memory_free = available;
}

static double cuda_copy_speed(struct qtr_backend *b) {
  struct qtr_cuda *c = (struct qtr_cuda *)b;
  enum { REPEAT = 10 };
  size_t n_bytes = (size_t)512 << 20;
  void *from = NULL, *to = NULL;
  cudaEvent_t start = NULL, end = NULL;
  double best = 0;
  if (qtr_cuda_malloc(c, n_bytes, "measuring", &from, NULL) || qtr_cuda_malloc(c, n_bytes, "measuring", &to, NULL))
    goto done;
  if (cudaEventCreate(&start) || cudaEventCreate(&end)) goto done;
  for (int i = 0; i < REPEAT; i++) {
    float ms = 0;
    if (cudaEventRecord(start, c->stream) || cudaMemcpyAsync(to, from, n_bytes, cudaMemcpyDeviceToDevice, c->stream) ||
        cudaEventRecord(end, c->stream) || cudaEventSynchronize(end) || cudaEventElapsedTime(&ms, start, end) || ms <= 0)
      break;
    double speed = 2.0 * (double)n_bytes / ((double)ms * 1e-3);
    best = speed > best ? speed : best;
  }
done:
  if (start) (void)cudaEventDestroy(start);
  if (end) (void)cudaEventDestroy(end);
  qtr_cuda_release(from);
  qtr_cuda_release(to);
  return best;
}

/* ---- activations --------------------------------------------------------------------------------- */

static enum qtr_status cuda_alloc(struct qtr_backend *b, size_t n_bytes, void **device, struct qtr_error *err) {
  return qtr_cuda_malloc((struct qtr_cuda *)b, n_bytes, "the activations of a step", device, err);
}

static void cuda_free(struct qtr_backend *b, void *device) {
  struct qtr_cuda *c = (struct qtr_cuda *)b;
  qtr_cuda_wait(b);
  qtr_cuda_forget_graphs(c);
  qtr_cuda_release(device);
}

/* To fp16, the activation type; values beyond it become its largest. */
static enum qtr_status cuda_upload_floats(struct qtr_backend *b, const float *x, size_t n, void **device,
                                          struct qtr_error *err) {
  *device = NULL;
  uint16_t *half = malloc(n ? n * sizeof *half : 1);
  if (!half) return qtr_fail_memory(err, "a vector of halves", n * sizeof *half);
  for (size_t i = 0; i < n; i++) {
    float v = x[i] > 65504.0f ? 65504.0f : x[i] < -65504.0f ? -65504.0f : x[i];
    half[i] = qtr_f16_from_f32(v);
  }
  enum qtr_status status = qtr_cuda_upload((struct qtr_cuda *)b, half, n * sizeof *half, "a vector", device, err);
  free(half);
  return status;
}

static enum qtr_status cuda_download(struct qtr_backend *b, const void *device, enum qtr_dtype dtype, size_t n, float *host,
                                     struct qtr_error *err) {
  struct qtr_cuda *c = (struct qtr_cuda *)b;
  size_t unit = qtr_dtype_bytes(dtype);
  if (dtype != QTR_DTYPE_F32 && dtype != QTR_DTYPE_F16 && dtype != QTR_DTYPE_BF16) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "download: %s is no activation type; use F32, F16 or BF16",
                    qtr_dtype_name(dtype));
  }
  qtr_cuda_flush(c);
  /* Halves arrive in the upper half of the host's floats and widen from the front. */
  char *to = (char *)host + n * (sizeof *host - unit);
  if (qtr_cuda_ok(c, cudaMemcpyAsync(to, device, n * unit, cudaMemcpyDeviceToHost, c->stream), "a download")) {
    (void)qtr_cuda_ok(c, cudaStreamSynchronize(c->stream), "a download");
  }
  for (size_t i = 0; i < n && unit == 2; i++) {
    uint16_t h;
    memcpy(&h, to + 2 * i, 2);
    float x = dtype == QTR_DTYPE_F16 ? qtr_f16_to_f32(h) : qtr_bf16_to_f32(h);
    memcpy(host + i, &x, sizeof x);
  }
  return qtr_cuda_status(c, err);
}

const struct qtr_backend_ops qtr_backend_cuda = {
    .name = "cuda",
    .open = cuda_open,
    .close = cuda_close,
    .caps = cuda_caps,
    .alloc = cuda_alloc,
    .free = cuda_free,
    .upload_floats = cuda_upload_floats,
    .download = cuda_download,
    .linear_create = qtr_cuda_linear_create,
    .linear_free = qtr_cuda_linear_free,
    .linear_bytes = qtr_cuda_linear_bytes,
    .table_create = qtr_cuda_table_create,
    .table_free = qtr_cuda_table_free,
    .input_create = qtr_cuda_input_create,
    .input_free = qtr_cuda_input_free,
    .kv_create = qtr_cuda_kv_create,
    .kv_free = qtr_cuda_kv_free,
    .kv_format = qtr_cuda_kv_format,
    .kv_heads = qtr_cuda_kv_heads,
    .begin_step = qtr_cuda_begin_step,
    .end_step = qtr_cuda_end_step,
    .launch = qtr_cuda_launch,
    .collect = qtr_cuda_collect,
    .embed = qtr_cuda_embed,
    .rmsnorm = qtr_cuda_rmsnorm,
    .quant = qtr_cuda_quant,
    .linear = qtr_cuda_linear,
    .rope_kv_write = qtr_cuda_rope_kv,
    .attention = qtr_cuda_attend,
    .gather = qtr_cuda_gather,
    .choose = qtr_cuda_choose,
    .stamp = qtr_cuda_stamp,
    .stamps_read = qtr_cuda_stamps_read,
    .wait = qtr_cuda_wait,
    .busy_read = qtr_cuda_busy_read,
    .copy_speed = cuda_copy_speed,
    .input_read = qtr_cuda_input_read,
    .kv_read = qtr_cuda_kv_read,
    .selection_read = qtr_cuda_selection_read,
    .stats_read = qtr_cuda_stats_read,
};
