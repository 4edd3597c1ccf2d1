/* cpu.c - the CPU backend: its vtable, opening and closing, memory, the parallel loop and the step (backend.h, cpu.h).
 * The operations are in linear*.c, activation*.c, kv*.c and attention*.c; what the machine can do is in machine.c. */
#include "backend/cpu/cpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "backend/common/rope.h"
#include "backend/cpu/machine.h"
#include "base/checked.h"
#include "base/half.h"
#include "base/status.h"

/* PAGE: a multiple of every page size there is. */
enum { LINE = 64, PAGE = 65536, MAX_THREADS = 1024, STEP_TOKENS = 512 };
static const size_t huge = (size_t)2 << 20;

/* ---- memory -------------------------------------------------------------------------------------- */

void *qtr_cpu_alloc(size_t n_bytes) {
  if (n_bytes > SIZE_MAX / 2) return NULL;
  if (n_bytes < huge) {
    size_t n = qtr_round_up(QTR_MAX(n_bytes, 1), LINE);
    void *p = aligned_alloc(LINE, n);
    if (p) memset(p, 0, n);
    return p;
  }
  /* Map one huge page more than needed and give the ends back, so that the rest starts on a huge page. It ends with n_bytes:
   * a huge page that is needed by half would be resident as a whole, and there may be one for each matrix. */
  size_t n = qtr_round_up(n_bytes, PAGE);
  char *map = mmap(NULL, n + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) return NULL;
  size_t before = (huge - (uintptr_t)map % huge) % huge;
  if (before) (void)munmap(map, before);
  if (huge - before) (void)munmap(map + before + n, huge - before);
  (void)madvise(map + before, n, MADV_HUGEPAGE);
  return map + before;
}

void qtr_cpu_free(void *p, size_t n_bytes) {
  if (!p) return;
  if (n_bytes < huge) {
    free(p);
  } else {
    (void)munmap(p, qtr_round_up(n_bytes, PAGE));
  }
}

enum qtr_status qtr_cpu_scratch(struct qtr_cpu *c, size_t bytes, struct qtr_error *err) {
  size_t total;
  bytes = qtr_round_up(bytes, 4096) + LINE; /* the odd line keeps the threads' pieces off the same cache sets */
  if (bytes <= c->scratch_bytes) return QTR_OK;
  void *scratch = NULL;
  if (!qtr_mul_overflow(bytes, (size_t)c->threads, &total)) scratch = qtr_cpu_alloc(total);
  if (!scratch) return qtr_fail_memory(err, "working memory of the CPU threads", bytes);
  qtr_cpu_free(c->scratch, c->scratch_bytes * (size_t)c->threads);
  c->scratch = scratch;
  c->scratch_bytes = bytes;
  return QTR_OK;
}

/* Device memory remembers its size in the line before it. */
static enum qtr_status device_alloc(struct qtr_backend *b, size_t n_bytes, void **device, struct qtr_error *err) {
  (void)b;
  char *p = n_bytes <= SIZE_MAX / 4 ? qtr_cpu_alloc(n_bytes + LINE) : NULL;
  if (!p) return qtr_fail_memory(err, "activations", n_bytes);
  memcpy(p, &n_bytes, sizeof n_bytes);
  *device = p + LINE;
  return QTR_OK;
}

static void device_free(struct qtr_backend *b, void *device) {
  (void)b;
  if (!device) return;
  size_t n_bytes;
  char *p = (char *)device - LINE;
  memcpy(&n_bytes, p, sizeof n_bytes);
  qtr_cpu_free(p, n_bytes + LINE);
}

static enum qtr_status upload_floats(struct qtr_backend *b, const float *x, size_t n, void **device, struct qtr_error *err) {
  size_t n_bytes;
  if (qtr_mul_overflow(n, sizeof(float), &n_bytes)) return qtr_fail_memory(err, "floats", n);
  enum qtr_status status = device_alloc(b, n_bytes, device, err);
  if (status == QTR_OK && n) memcpy(*device, x, n_bytes);
  return status;
}

static enum qtr_status download(struct qtr_backend *b, const void *device, enum qtr_dtype dtype, size_t n, float *host,
                                struct qtr_error *err) {
  (void)b;
  const uint16_t *half = device;
  switch (dtype) {
    case QTR_DTYPE_F32: memcpy(host, device, n * sizeof *host); return QTR_OK;
    case QTR_DTYPE_F16:
      for (size_t i = 0; i < n; i++) host[i] = qtr_f16_to_f32(half[i]);
      return QTR_OK;
    case QTR_DTYPE_BF16:
      for (size_t i = 0; i < n; i++) host[i] = qtr_bf16_to_f32(half[i]);
      return QTR_OK;
    default: return qtr_fail(err, QTR_ERR_ARGUMENT, "cpu: cannot download %s as floats", qtr_dtype_name(dtype));
  }
}

/* ---- the parallel loop --------------------------------------------------------------------------- */

void qtr_cpu_for(const struct qtr_cpu *c, size_t n, size_t chunk, qtr_task task, void *arg) {
  qtr_threads_for(c->team, n, chunk, task, arg);
}

/* ---- opening, closing, properties ---------------------------------------------------------------- */

static void backend_close(struct qtr_backend *b) {
  if (!b) return;
  struct qtr_cpu *c = (struct qtr_cpu *)b;
  qtr_threads_free(c->team);
  qtr_cpu_free(c->scratch, c->scratch_bytes * (size_t)c->threads);
  free(c->cos);
  free(c->sin);
  free(c);
}

static enum qtr_status backend_open(const struct qtr_backend_options *options, struct qtr_backend **backend,
                                    struct qtr_error *err) {
  const char *isa = options && options->isa ? options->isa : getenv("QUATTUOR_ISA");
  int32_t threads = options ? options->threads : 0;
  if (threads < 0 || threads > MAX_THREADS) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "threads %d: choose 1 to %d, or 0 for all cores", (int)threads, MAX_THREADS);
  }
  struct qtr_cpu *c = calloc(1, sizeof *c);
  if (!c) return qtr_fail_memory(err, "cpu backend", sizeof *c);
  enum qtr_status status = qtr_cpu_choose_isa(isa, &c->isa, err);
  c->threads = threads ? threads : QTR_MIN(qtr_cpu_machine_threads(), MAX_THREADS);
  if (status == QTR_OK) status = qtr_threads_create(c->threads, &c->team, err);
  if (status != QTR_OK) {
    free(c);
    return status;
  }
  c->base.ops = &qtr_backend_cpu;
  *backend = &c->base;
  return QTR_OK;
}

static void caps(struct qtr_backend *b, struct qtr_caps *out) {
  const struct qtr_cpu *c = (const struct qtr_cpu *)b;
  static const char *const isa_text[] = {"portable C", "AVX2", "AVX-512", "AVX-512 VNNI", "AMX int8"};
  char name[64];
  qtr_cpu_machine_name(name, sizeof name);
  *out = (struct qtr_caps){.act_dtype = QTR_DTYPE_F32, .device = "cpu", .threads = c->threads, .step_tokens = STEP_TOKENS};
  (void)snprintf(out->description, sizeof out->description, "%s, %s, %d thread%s", name, isa_text[c->isa], c->threads,
                 c->threads == 1 ? "" : "s");
  qtr_cpu_machine_memory(&out->memory_total, &out->memory_free);
}

/* ---- the step ------------------------------------------------------------------------------------ */

static enum qtr_status begin_step(struct qtr_backend *b, const struct qtr_batch *batch, const float *inv_freq,
                                  size_t half_dim, struct qtr_error *err) {
  struct qtr_cpu *c = (struct qtr_cpu *)b;
  size_t n, n_bytes;
  if (qtr_mul_overflow((size_t)batch->n_tokens, half_dim, &n) || qtr_mul_overflow(n, sizeof(float), &n_bytes)) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "cpu: %d tokens of %zu frequencies are too many", (int)batch->n_tokens, half_dim);
  }
  if (n > c->rope_capacity) {
    free(c->cos);
    free(c->sin);
    c->rope_capacity = 0;
    c->cos = malloc(n_bytes);
    c->sin = malloc(n_bytes);
    if (!c->cos || !c->sin) return qtr_fail_memory(err, "cosines and sines of a step", n_bytes);
    c->rope_capacity = n;
  }
  c->batch = batch;
  c->half_dim = half_dim;
  if (n) qtr_rope_table(batch, inv_freq, half_dim, c->cos, c->sin);
  return QTR_OK;
}

static enum qtr_status end_step(struct qtr_backend *b, struct qtr_error *err) {
  (void)err;
  ((struct qtr_cpu *)b)->batch = NULL;
  return QTR_OK;
}

const struct qtr_backend_ops qtr_backend_cpu = {
    .name = "cpu",
    .open = backend_open,
    .close = backend_close,
    .caps = caps,
    .alloc = device_alloc,
    .free = device_free,
    .upload_floats = upload_floats,
    .download = download,
    .linear_create = qtr_cpu_linear_create,
    .linear_free = qtr_cpu_linear_free,
    .linear_bytes = qtr_cpu_linear_bytes,
    .table_create = qtr_cpu_table_create,
    .table_free = qtr_cpu_table_free,
    .input_create = qtr_cpu_input_create,
    .input_free = qtr_cpu_input_free,
    .kv_create = qtr_cpu_kv_create,
    .kv_free = qtr_cpu_kv_free,
    .kv_format = qtr_cpu_kv_format,
    .kv_heads = qtr_cpu_kv_heads,
    .begin_step = begin_step,
    .end_step = end_step,
    .embed = qtr_cpu_embed,
    .rmsnorm = qtr_cpu_rmsnorm,
    .quant = qtr_cpu_quant,
    .linear = qtr_cpu_linear,
    .rope_kv_write = qtr_cpu_rope_kv_write,
    .attention = qtr_cpu_attention,
    .gather = qtr_cpu_gather,
    .input_read = qtr_cpu_input_read,
    .kv_read = qtr_cpu_kv_read,
    .selection_read = qtr_cpu_selection_read,
    .stats_read = qtr_cpu_stats_read,
};
