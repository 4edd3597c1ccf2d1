/* reference.c - the reference backend's vtable, its memory and its step (reference.h). Kernels are in the files beside it.
 *
 * Everything a step needs is allocated by begin_step, so that no operation can fail. */
#include "backend/reference/reference.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/common/rope.h"
#include "base/checked.h"
#include "base/half.h"
#include "base/status.h"

void *qtr_reference_alloc(size_t count, size_t size, const char *what, struct qtr_error *err) {
  size_t n_bytes;
  if (qtr_mul_overflow(count, size, &n_bytes) || n_bytes > SIZE_MAX / 2) n_bytes = SIZE_MAX;
  void *p = n_bytes == SIZE_MAX ? NULL : calloc(n_bytes ? n_bytes : 1, 1);
  if (!p) qtr_fail_memory(err, what, n_bytes);
  return p;
}

static enum qtr_status reference_open(const struct qtr_backend_options *options, struct qtr_backend **backend,
                                      struct qtr_error *err) {
  (void)options; /* one thread, one way to compute */
  *backend = NULL;
  struct qtr_reference *r = qtr_reference_alloc(1, sizeof *r, "the reference backend", err);
  if (!r) return QTR_ERR_MEMORY;
  r->base.ops = &qtr_backend_reference;
  *backend = &r->base;
  return QTR_OK;
}

static void step_free(struct qtr_reference *r) {
  free(r->cos);
  free(r->sin);
  free(r->k);
  free(r->v);
  free(r->score);
  free(r->sum);
  r->cos = r->sin = r->k = r->v = NULL;
  r->score = r->sum = NULL;
  r->batch = NULL;
}

static void reference_close(struct qtr_backend *b) {
  struct qtr_reference *r = (struct qtr_reference *)b;
  step_free(r);
  free(r->weight);
  free(r);
}

/* MemTotal and MemAvailable of the system, in bytes; 0 where it does not tell. */
static void memory_read(size_t *total, size_t *available) {
  *total = *available = 0;
  FILE *f = fopen("/proc/meminfo", "r");
  if (!f) return;
  char line[128];
  while (fgets(line, sizeof line, f)) {
    unsigned long long kib;
    if (sscanf(line, "MemTotal: %llu kB", &kib) == 1) *total = (size_t)kib * 1024;
    if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1) *available = (size_t)kib * 1024;
  }
  (void)fclose(f);
}

static void reference_caps(struct qtr_backend *b, struct qtr_caps *caps) {
  (void)b;
  memset(caps, 0, sizeof *caps);
  caps->act_dtype = QTR_DTYPE_F32;
  caps->device = "reference";
  (void)snprintf(caps->description, sizeof caps->description, "reference, plain C, 1 thread");
  memory_read(&caps->memory_total, &caps->memory_free);
  caps->threads = 1;
  caps->step_tokens = 64;
}

static enum qtr_status reference_device_alloc(struct qtr_backend *b, size_t n_bytes, void **device, struct qtr_error *err) {
  (void)b;
  size_t rounded;
  *device = NULL;
  if (qtr_add_overflow(n_bytes, 64, &rounded)) return qtr_fail_memory(err, "activations", n_bytes);
  rounded = qtr_round_up(n_bytes ? n_bytes : 1, 64);
  *device = aligned_alloc(64, rounded);
  if (!*device) return qtr_fail_memory(err, "activations", n_bytes);
  memset(*device, 0, rounded);
  return QTR_OK;
}

static void reference_device_free(struct qtr_backend *b, void *device) {
  (void)b;
  free(device);
}

static enum qtr_status reference_upload_floats(struct qtr_backend *b, const float *x, size_t n, void **device,
                                               struct qtr_error *err) {
  size_t n_bytes;
  *device = NULL;
  if (qtr_mul_overflow(n, sizeof *x, &n_bytes)) return qtr_fail_memory(err, "a vector of floats", SIZE_MAX);
  enum qtr_status status = reference_device_alloc(b, n_bytes, device, err);
  if (status == QTR_OK && n_bytes) memcpy(*device, x, n_bytes);
  return status;
}

static enum qtr_status reference_download(struct qtr_backend *b, const void *device, enum qtr_dtype dtype, size_t n,
                                          float *host, struct qtr_error *err) {
  (void)b;
  switch (dtype) {
    case QTR_DTYPE_F32: memcpy(host, device, n * sizeof *host); return QTR_OK;
    case QTR_DTYPE_F16:
      for (size_t i = 0; i < n; i++) host[i] = qtr_f16_to_f32(((const uint16_t *)device)[i]);
      return QTR_OK;
    case QTR_DTYPE_BF16:
      for (size_t i = 0; i < n; i++) host[i] = qtr_bf16_to_f32(((const uint16_t *)device)[i]);
      return QTR_OK;
    default:
      return qtr_fail(err, QTR_ERR_UNSUPPORTED, "download: %s is no activation type; use F32, F16 or BF16",
                      qtr_dtype_name(dtype));
  }
}

static enum qtr_status reference_begin_step(struct qtr_backend *b, const struct qtr_batch *batch, const float *inv_freq,
                                            size_t half_dim, struct qtr_error *err) {
  struct qtr_reference *r = (struct qtr_reference *)b;
  step_free(r);
  size_t longest = 0, n_tokens = (size_t)batch->n_tokens;
  for (int32_t s = 0; s < batch->n_seqs; s++) {
    size_t n = (size_t)batch->kv_len[s] + (size_t)(batch->q_start[s + 1] - batch->q_start[s]);
    longest = QTR_MAX(longest, n);
  }
  r->half_dim = half_dim;
  r->cos = qtr_reference_alloc(n_tokens * half_dim, sizeof *r->cos, "cosines of a step", err);
  r->sin = qtr_reference_alloc(n_tokens * half_dim, sizeof *r->sin, "sines of a step", err);
  r->k = qtr_reference_alloc(longest * half_dim, 2 * sizeof *r->k, "one head's keys", err);
  r->v = qtr_reference_alloc(longest * half_dim, 2 * sizeof *r->v, "one head's values", err);
  r->score = qtr_reference_alloc(longest, sizeof *r->score, "attention scores", err);
  r->sum = qtr_reference_alloc(half_dim, 2 * sizeof *r->sum, "one head's result", err);
  if (!r->cos || !r->sin || !r->k || !r->v || !r->score || !r->sum) {
    step_free(r);
    return QTR_ERR_MEMORY;
  }
  r->batch = batch;
  qtr_rope_table(batch, inv_freq, half_dim, r->cos, r->sin);
  return QTR_OK;
}

static enum qtr_status reference_end_step(struct qtr_backend *b, struct qtr_error *err) {
  (void)err;
  step_free((struct qtr_reference *)b);
  return QTR_OK;
}

const struct qtr_backend_ops qtr_backend_reference = {
    .name = "reference",
    .open = reference_open,
    .close = reference_close,
    .caps = reference_caps,
    .alloc = reference_device_alloc,
    .free = reference_device_free,
    .upload_floats = reference_upload_floats,
    .download = reference_download,
    .linear_create = qtr_reference_linear_create,
    .linear_free = qtr_reference_linear_free,
    .linear_bytes = qtr_reference_linear_bytes,
    .table_create = qtr_reference_table_create,
    .table_free = qtr_reference_table_free,
    .input_create = qtr_reference_input_create,
    .input_free = qtr_reference_input_free,
    .kv_create = qtr_reference_kv_create,
    .kv_free = qtr_reference_kv_free,
    .kv_format = qtr_reference_kv_format,
    .kv_heads = qtr_reference_kv_heads,
    .begin_step = reference_begin_step,
    .end_step = reference_end_step,
    .embed = qtr_reference_embed,
    .rmsnorm = qtr_reference_rmsnorm,
    .quant = qtr_reference_quant,
    .linear = qtr_reference_linear,
    .rope_kv_write = qtr_reference_rope_kv_write,
    .attention = qtr_reference_attention,
    .gather = qtr_reference_gather,
    .input_read = qtr_reference_input_read,
    .kv_read = qtr_reference_kv_read,
    .selection_read = qtr_reference_selection_read,
    .stats_read = qtr_reference_stats_read,
};
