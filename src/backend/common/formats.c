/* formats.c - the small facts about data types and formats that all backends share (backend.h). */
#include "backend/common/sparse.h"
#include "base/checked.h"

static const struct {
  const char *name;
  size_t bytes;
} dtypes[QTR_N_DTYPES] = {
    [QTR_DTYPE_F32] = {"F32", 4},   [QTR_DTYPE_F16] = {"F16", 2},         [QTR_DTYPE_BF16] = {"BF16", 2},
    [QTR_DTYPE_F64] = {"F64", 8},   [QTR_DTYPE_I8] = {"I8", 1},           [QTR_DTYPE_U8] = {"U8", 1},
    [QTR_DTYPE_I16] = {"I16", 2},   [QTR_DTYPE_I32] = {"I32", 4},         [QTR_DTYPE_I64] = {"I64", 8},
    [QTR_DTYPE_BOOL] = {"BOOL", 1}, [QTR_DTYPE_F8_E4M3] = {"F8_E4M3", 1}, [QTR_DTYPE_F8_E5M2] = {"F8_E5M2", 1},
};

size_t qtr_dtype_bytes(enum qtr_dtype dtype) { return dtypes[dtype].bytes; }
const char *qtr_dtype_name(enum qtr_dtype dtype) { return dtypes[dtype].name; }

static const char *const linear_names[QTR_N_LINEAR_FORMATS] = {"f32", "f16", "bf16", "w8a8", "w4a8", "w4a8-g128"};
static const char *const kv_names[QTR_N_KV_FORMATS] = {"kv16", "kv8", "kv4", "kv8-static"};

const char *qtr_linear_format_name(enum qtr_linear_format format) { return linear_names[format]; }
const char *qtr_kv_format_name(enum qtr_kv_format format) { return kv_names[format]; }

enum qtr_quant qtr_linear_quant(enum qtr_linear_format format) {
  return format >= QTR_LINEAR_W8A8 ? QTR_QUANT_INT8 : QTR_QUANT_NONE;
}

/* Bytes of K and V of one head and page. */
static size_t head_page_bytes(const struct qtr_kv_config *c) {
  size_t dim = (size_t)c->head_dim, row = 0;
  switch (c->format) {
    case QTR_KV_F16: row = 2 * dim; break;
    case QTR_KV_INT8: row = dim + 4; break;
    case QTR_KV_INT4: row = dim / 2 + 4; break;
    default: row = dim; break;
  }
  return 2 * QTR_PAGE_TOKENS * row;
}

static size_t times_heads(size_t bytes, size_t n_heads) {
  size_t n;
  return qtr_mul_overflow(bytes, n_heads, &n) ? SIZE_MAX : n;
}

static size_t count_streaming(const struct qtr_kv_config *c) {
  size_t n = 0, all = (size_t)c->n_layers * (size_t)c->n_kv_heads;
  for (size_t i = 0; c->sparse && c->sparse->streaming && i < all; i++) n += c->sparse->streaming[i] != 0;
  return n;
}

size_t qtr_kv_page_bytes(const struct qtr_kv_config *c) {
  size_t n_heads = (size_t)c->n_layers * (size_t)c->n_kv_heads - count_streaming(c), bytes = head_page_bytes(c);
  if (c->sparse) bytes += qtr_kv_stats_values(c->sparse, c->head_dim) * sizeof(uint16_t);
  return times_heads(bytes, n_heads);
}

size_t qtr_kv_stream_page_bytes(const struct qtr_kv_config *c) {
  return times_heads(head_page_bytes(c), count_streaming(c));
}
