/* kv.c - the KV cache of the CPU backend: its memory, reading it back for tests, and the operation that rotates q and k and
 * writes K and V into pages (spec C.1, C.3, C.4). The layout is drawn in kv.h, the arithmetic is common/kv_quant.h's. */
#include "backend/cpu/kv.h"
#include "backend/common/kv_fp8.h"
#include "backend/common/kv_static.h"

#include <stdlib.h>
#include <string.h>

#include "backend/common/kv_quant.h"
#include "backend/cpu/attention.h"
#include "base/checked.h"
#include "base/status.h"

/* Codes of one token travel between the quantisers and the pages in this form. */
union row {
  uint8_t code[QTR_CPU_HEAD_DIM_MAX];
  uint16_t half[QTR_CPU_HEAD_DIM_MAX];
};

/* ---- memory -------------------------------------------------------------------------------------- */

/* Lays the pools of all layers and classes out and allocates them. */
static enum qtr_status make_pages(struct qtr_kv *kv, const struct qtr_kv_config *config, struct qtr_error *err) {
  size_t retrieval, streaming, all;
  if (qtr_mul_overflow(qtr_kv_page_bytes(config), (size_t)config->n_pages, &retrieval) ||
      qtr_mul_overflow(qtr_kv_stream_page_bytes(config), (size_t)config->n_stream_pages, &streaming) ||
      qtr_add_overflow(retrieval, streaming, &all) || all > SIZE_MAX / 2) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "KV cache of %d pages and %d layers: its size overflows", (int)config->n_pages,
                    (int)config->n_layers);
  }
  const struct qtr_kv_heads *h = &kv->heads;
  size_t n_heads = (size_t)config->n_kv_heads, values = qtr_kv_stats_values(&h->sparse, config->head_dim), n_values = 0;
  kv->place = calloc((size_t)config->n_layers * n_heads, sizeof *kv->place);
  if (!kv->place) return qtr_fail_memory(err, "KV cache", n_heads);
  for (int32_t layer = 0; layer < config->n_layers; layer++) {
    size_t at[QTR_N_HEAD_CLASSES], stride[QTR_N_HEAD_CLASSES];
    for (int class = 0; class < QTR_N_HEAD_CLASSES; class ++) {
      at[class] = kv->n_bytes;
      stride[class] = (size_t)qtr_kv_head_count(h, layer, (enum qtr_head_class) class) * 2 * kv->half_bytes;
      kv->n_bytes += stride[class] * (size_t)(class == QTR_HEAD_STREAMING ? config->n_stream_pages : config->n_pages);
    }
    size_t stats_stride = (size_t)qtr_kv_head_count(h, layer, QTR_HEAD_RETRIEVAL) * values;
    for (int32_t head = 0; head < config->n_kv_heads; head++) {
      enum qtr_head_class class = qtr_kv_head_class(h, layer, head);
      size_t rank = (size_t)qtr_kv_head_rank(h, layer, head);
      kv->place[(size_t)layer * n_heads + (size_t)head] = (struct qtr_cpu_kv_place){
          at[class] + rank * 2 * kv->half_bytes, stride[class], n_values + rank * values, stats_stride};
    }
    n_values += stats_stride * (size_t)config->n_pages;
  }
  kv->data = qtr_cpu_alloc(kv->n_bytes);
  if (!kv->data) return qtr_fail_memory(err, "KV cache", kv->n_bytes);
  kv->stats_bytes = n_values * sizeof *kv->stats;
  kv->stats = values ? qtr_cpu_alloc(kv->stats_bytes) : NULL;
  return values && !kv->stats ? qtr_fail_memory(err, "statistics of keys", kv->stats_bytes) : QTR_OK;
}

static enum qtr_status make_selections(struct qtr_cpu *c, struct qtr_kv *kv, struct qtr_error *err) {
  if (kv->heads.sparse.budget == 0) return QTR_OK;
  kv->selection_bytes = qtr_sparse_selections_bytes(&kv->heads);
  kv->selection = qtr_cpu_alloc(kv->selection_bytes);
  if (!kv->selection) return qtr_fail_memory(err, "chosen pages", kv->selection_bytes);
  return qtr_cpu_scratch(c, qtr_cpu_attention_choice_bytes(c, kv), err);
}

enum qtr_status qtr_cpu_kv_create(struct qtr_backend *b, const struct qtr_kv_config *config, struct qtr_kv **out,
                                  struct qtr_error *err) {
  struct qtr_cpu *c = (struct qtr_cpu *)b;
  enum qtr_status status = QTR_OK;
  struct qtr_kv *kv = NULL;
  *out = NULL;
  if (config->format < 0 || config->format >= QTR_N_KV_FORMATS || config->n_layers < 1 || config->n_kv_heads < 1 ||
      config->n_pages < 1 || config->head_dim < 2 || config->head_dim > QTR_CPU_HEAD_DIM_MAX || config->head_dim % 2 != 0) {
    return qtr_fail(err, QTR_ERR_ARGUMENT,
                    "KV cache of format %d with %d layers, %d heads of %d and %d pages: head_dim must be even and at most "
                    "%d, counts positive",
                    (int)config->format, (int)config->n_layers, (int)config->n_kv_heads, (int)config->head_dim,
                    (int)config->n_pages, QTR_CPU_HEAD_DIM_MAX);
  }
  if (config->format == QTR_KV_INT8_STATIC && !config->static_scale) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "KV cache kv8-static: the model has no static KV scales; use kv8");
  }
  kv = calloc(1, sizeof *kv);
  if (!kv) return qtr_fail_memory(err, "KV cache", sizeof *kv);
  kv->config = *config;
  kv->config.static_scale = NULL;
  kv->config.sparse = NULL;
  size_t elements = QTR_PAGE_TOKENS * (size_t)config->head_dim;
  bool scaled = config->format == QTR_KV_INT4 || config->format == QTR_KV_INT8;
  kv->code_bytes = config->format == QTR_KV_F16 ? elements * 2 : config->format == QTR_KV_INT4 ? elements / 2 : elements;
  kv->half_bytes = kv->code_bytes + (scaled ? 2 * QTR_PAGE_TOKENS * sizeof(uint16_t) : 0);
  status = qtr_kv_heads_create(config, &kv->heads, err);
  if (!status) status = make_pages(kv, config, err);
  if (!status) status = make_selections(c, kv, err);
  if (status) goto done;
  if (config->format == QTR_KV_INT8_STATIC && (status = qtr_kv_static_scales(config, &kv->static_scale, err))) goto done;
  if ((status = qtr_kv_fp8_scales(config, &kv->fp8_scale, err))) goto done;
  kv->partial_bytes = qtr_cpu_attention_partial_bytes((size_t)config->head_dim);
  kv->partial = qtr_cpu_alloc(kv->partial_bytes);
  if (!kv->partial) {
    status = qtr_fail_memory(err, "attention workspace", kv->partial_bytes);
    goto done;
  }
  status = qtr_cpu_scratch(c, qtr_cpu_attention_scratch_bytes(c, (size_t)config->head_dim), err);
done:
  if (status == QTR_OK) {
    *out = kv;
  } else {
    qtr_cpu_kv_free(b, kv);
  }
  return status;
}

void qtr_cpu_kv_free(struct qtr_backend *b, struct qtr_kv *kv) {
  (void)b;
  if (!kv) return;
  qtr_kv_heads_free(&kv->heads);
  free(kv->place);
  if (kv->data) qtr_cpu_free(kv->data, kv->n_bytes);
  if (kv->stats) qtr_cpu_free(kv->stats, kv->stats_bytes);
  if (kv->selection) qtr_cpu_free(kv->selection, kv->selection_bytes);
  if (kv->partial) qtr_cpu_free(kv->partial, kv->partial_bytes);
  free(kv->static_scale);
  free(kv->fp8_scale);
  free(kv);
}

enum qtr_kv_format qtr_cpu_kv_format(const struct qtr_kv *kv) { return kv->config.format; }
const struct qtr_kv_heads *qtr_cpu_kv_heads(const struct qtr_kv *kv) { return &kv->heads; }

void qtr_cpu_kv_read(struct qtr_backend *b, const struct qtr_kv *kv, int32_t layer, bool is_v, int32_t page, int32_t slot,
                     int32_t head, uint16_t *code, float *scale, float *zero) {
  (void)b;
  size_t dim = (size_t)kv->config.head_dim, s = (size_t)slot;
  const uint8_t *half = qtr_cpu_kv_half(kv, layer, page, head, is_v);
  float s_value = 0, z_value = 0;
  for (size_t d = 0; code && d < dim; d++) {
    int shift;
    switch (kv->config.format) {
      case QTR_KV_F16: code[d] = ((const uint16_t *)(const void *)half)[qtr_cpu_kv_at_f16(is_v, dim, s, d)]; break;
      case QTR_KV_INT4: {
        size_t at = qtr_cpu_kv_at_int4(is_v, dim, s, d, &shift);
        code[d] = half[at] >> shift & 15;
        break;
      }
      case QTR_KV_INT8: code[d] = half[qtr_cpu_kv_at_int8(is_v, dim, s, d)]; break;
      default: code[d] = (uint16_t)(int16_t)(int8_t)half[qtr_cpu_kv_at_int8(is_v, dim, s, d)]; break;
    }
  }
  if (kv->config.format == QTR_KV_INT8_STATIC) s_value = kv->static_scale[2 * layer + is_v];
  if (kv->half_bytes > kv->code_bytes) {
    const uint16_t *parameter = qtr_cpu_kv_scales(kv, half);
    s_value = qtr_f16_to_f32(parameter[slot]);
    z_value = qtr_f16_to_f32(parameter[QTR_PAGE_TOKENS + slot]);
  }
  if (scale) *scale = s_value;
  if (zero) *zero = z_value;
}

void qtr_cpu_stats_read(struct qtr_backend *b, const struct qtr_kv *kv, int32_t layer, int32_t page, int32_t logical,
                        int32_t head, float *max, float *min) {
  (void)b;
  size_t dim = (size_t)kv->config.head_dim;
  const uint16_t *stats = qtr_cpu_kv_stats(kv, layer, page, logical, head);
  for (size_t i = 0; i < dim; i++) {
    max[i] = qtr_f16_to_f32(stats[i]);
    min[i] = qtr_f16_to_f32(stats[dim + i]);
  }
}

void qtr_cpu_selection_read(struct qtr_backend *b, const struct qtr_kv *kv, int32_t layer, int32_t q_head, int32_t slot,
                            int32_t *page, int32_t *n, int32_t *tail) {
  (void)b;
  int32_t group = kv->heads.sparse.group;
  const struct qtr_selection *s = qtr_cpu_kv_selection(kv, layer, q_head / group, q_head % group, slot);
  *n = s->n;
  *tail = s->tail;
  memcpy(page, s->page, (size_t)s->n * sizeof *page);
}

/* ---- one token into its slot ------------------------------------------------------------------------ */

static void quant_static_row(const float *x, size_t dim, float r, uint8_t *code) {
  for (size_t i = 0; i < dim; i++) code[i] = (uint8_t)qtr_kv_quant_static(x[i], r);
}

static void to_f16_row(const float *x, size_t dim, uint16_t *half) {
  for (size_t i = 0; i < dim; i++) half[i] = qtr_f16_from_f32(qtr_kv_sane(x[i]));
}

/* (a, b) -> (a cos - b sin, b cos + a sin), each product and sum rounded: the reference's order, so the same codes. */
static void rope_row(float *restrict x, size_t half_dim, const float *restrict cos, const float *restrict sin) {
  for (size_t i = 0; i < half_dim; i++) {
    float a = x[i], b = x[half_dim + i];
    x[i] = a * cos[i] - b * sin[i];
    x[half_dim + i] = b * cos[i] + a * sin[i];
  }
}

static void extremes_row(const float *restrict x, size_t dim, float *restrict max, float *restrict min) {
  for (size_t i = 0; i < dim; i++) {
    float v = qtr_kv_sane(x[i]);
    max[i] = v > max[i] ? v : max[i];
    min[i] = v < min[i] ? v : min[i];
  }
}

static double bound_row(const float *q, const uint16_t *stats, size_t dim) {
  double sum = 0;
  for (size_t i = 0; i < dim; i++) {
    double a = (double)q[i] * (double)qtr_f16_to_f32(stats[i]), b = (double)q[i] * (double)qtr_f16_to_f32(stats[dim + i]);
    sum += a > b ? a : b;
  }
  return sum;
}

static const struct qtr_cpu_kv_rows rows_portable = {qtr_kv_quant_row, quant_static_row, to_f16_row,
                                                     rope_row,         extremes_row,     bound_row};

const struct qtr_cpu_kv_rows *qtr_cpu_kv_choose_rows(const struct qtr_cpu *c) {
  const struct qtr_cpu_kv_rows *rows = NULL;
  if (c->isa >= QTR_CPU_AVX512) {
    rows = qtr_cpu_kv_rows_avx512();
  } else if (c->isa >= QTR_CPU_AVX2) {
    rows = qtr_cpu_kv_rows_avx2();
  }
  return rows ? rows : &rows_portable;
}

static void store_int8(uint8_t *restrict half, bool is_v, size_t dim, size_t slot, const uint8_t *restrict code) {
  if (is_v) {
    uint8_t *to = half + qtr_cpu_kv_pair(slot) * 2 * dim + slot / 16 % 2;
    for (size_t d = 0; d < dim; d++) to[2 * d] = code[d];
  } else {
    uint8_t *to = half + slot / 16 * 16 * dim + slot % 16 * 2;
    for (size_t j = 0; j < dim / 2; j++) memcpy(to + j * 32, code + 2 * j, 2);
  }
}

static void store_int4(uint8_t *restrict half, bool is_v, size_t dim, size_t slot, const uint8_t *restrict code) {
  if (is_v) {
    uint8_t *to = half + qtr_cpu_kv_pair(slot) * dim + slot / 16 % 2;
    for (size_t first = 0; first < dim; first += 32) {
      size_t width = QTR_MIN(dim - first, 32) / 2;
      for (size_t i = 0; i < width; i++) to[first + 2 * i] = (uint8_t)(code[first + i] | code[first + width + i] << 4);
    }
  } else {
    uint8_t *to = half + slot / 16 * 8 * dim;
    size_t j = 0;
    for (; j + 4 <= dim; j += 4) {
      to[j * 8 + slot % 16 * 2] = (uint8_t)(code[j] | code[j + 2] << 4);
      to[j * 8 + slot % 16 * 2 + 1] = (uint8_t)(code[j + 1] | code[j + 3] << 4);
    }
    if (j < dim) to[j * 8 + slot % 16] = (uint8_t)(code[j] | code[j + 1] << 4);
  }
}

static void store_f16(uint8_t *restrict half, bool is_v, size_t dim, size_t slot, const uint16_t *restrict code) {
  uint16_t *to = (uint16_t *)(void *)half;
  if (is_v) {
    memcpy(to + slot * dim, code, dim * 2);
  } else {
    to += slot / 16 * 16 * dim + slot % 16;
    for (size_t d = 0; d < dim; d++) to[d * 16] = code[d];
  }
}

static void write_row(const struct qtr_kv *kv, const struct qtr_cpu_kv_rows *rows, int32_t layer, bool is_v, uint8_t *half,
                      size_t slot, const float *x) {
  size_t dim = (size_t)kv->config.head_dim;
  union row row;
  float rounded[QTR_CPU_HEAD_DIM_MAX];
  switch (kv->config.format) {
    case QTR_KV_F16:
      if (kv->fp8_scale) {
        qtr_kv_fp8_row(x, dim, kv->config.fp8, kv->fp8_scale[2 * layer + is_v], rounded);
        x = rounded;
      }
      rows->to_f16(x, dim, row.half);
      store_f16(half, is_v, dim, slot, row.half);
      return;
    case QTR_KV_INT8_STATIC:
      rows->quant_static(x, dim, 1.0f / kv->static_scale[2 * layer + is_v], row.code);
      store_int8(half, is_v, dim, slot, row.code);
      return;
    default: {
      uint16_t *parameter = qtr_cpu_kv_scales(kv, half);
      bool int4 = kv->config.format == QTR_KV_INT4;
      rows->quant(x, dim, int4 ? 15 : 255, row.code, &parameter[slot], &parameter[QTR_PAGE_TOKENS + slot]);
      if (int4) {
        store_int4(half, is_v, dim, slot, row.code);
      } else {
        store_int8(half, is_v, dim, slot, row.code);
      }
    }
  }
}

/* ---- the operation -------------------------------------------------------------------------------- */

struct rope_write {
  const struct qtr_cpu *c;
  const struct qtr_rope_kv_args *args;
  const struct qtr_cpu_kv_rows *rows;
};

/* Sequence of token t: the last whose q_start is <= t. */
static int32_t find_seq(const struct qtr_batch *batch, int32_t t) {
  int32_t low = 0, high = batch->n_seqs - 1;
  while (low < high) {
    int32_t middle = low + (high - low + 1) / 2;
    if (batch->q_start[middle] <= t) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

/* Tokens [first, last) of the step, all of sequence `seq`. */
static void rope_write(const struct rope_write *w, int32_t seq, size_t first, size_t last) {
  const struct qtr_rope_kv_args *args = w->args;
  const struct qtr_batch *batch = w->c->batch;
  const int32_t *table[] = {qtr_batch_table(batch, QTR_HEAD_RETRIEVAL, seq),
                            qtr_batch_table(batch, QTR_HEAD_STREAMING, seq)};
  size_t dim = (size_t)args->head_dim, n_q = (size_t)args->n_heads, n_kv = (size_t)args->n_kv_heads;
  for (size_t t = first; t < last; t++) {
    int32_t position = batch->kv_len[seq] + (int32_t)t - batch->q_start[seq];
    size_t slot = (size_t)(position % QTR_PAGE_TOKENS);
    float *row = (float *)args->qkv + t * (n_q + 2 * n_kv) * dim; /* (n_heads + 2 n_kv_heads, head_dim) */
    const float *cos = w->c->cos + t * w->c->half_dim, *sin = w->c->sin + t * w->c->half_dim;
    for (size_t h = 0; h < n_q + n_kv; h++) w->rows->rope(row + h * dim, w->c->half_dim, cos, sin);
    for (size_t h = 0; h < n_kv; h++) {
      enum qtr_head_class class = qtr_kv_head_class(&args->kv->heads, args->layer, (int32_t)h);
      uint8_t *k = qtr_cpu_kv_half(args->kv, args->layer, table[class][position / QTR_PAGE_TOKENS], (int32_t)h, false);
      write_row(args->kv, w->rows, args->layer, false, k, slot, row + (n_q + h) * dim);
      write_row(args->kv, w->rows, args->layer, true, k + args->kv->half_bytes, slot, row + (n_q + n_kv + h) * dim);
    }
  }
}

static void rope_write_tokens(void *arg, size_t begin, size_t end, int thread) {
  (void)thread;
  const struct rope_write *w = arg;
  const struct qtr_batch *batch = w->c->batch;
  int32_t seq = find_seq(batch, (int32_t)begin);
  for (size_t last; begin < end; begin = last, seq++) {
    last = QTR_MIN(end, (size_t)batch->q_start[seq + 1]);
    rope_write(w, seq, begin, last);
  }
}

/* ---- with statistics ---------------------------------------------------------------------------------
 * An item is what a sequence has in one logical page, so that one thread sees all keys that share statistics. */

static size_t logical_pages(const struct rope_write *w, int32_t seq) {
  const struct qtr_batch *batch = w->c->batch;
  int32_t tokens = w->args->kv->heads.sparse.logical_tokens, first = batch->kv_len[seq];
  int32_t last = first + batch->q_start[seq + 1] - batch->q_start[seq]; /* one past */
  return last > first ? (size_t)((last - 1) / tokens - first / tokens + 1) : 0;
}

/* Keys of the tokens at positions [first, last), of one logical page; those before them in it are in its statistics. */
static void add_stats(const struct rope_write *w, int32_t seq, int32_t first, int32_t last) {
  const struct qtr_rope_kv_args *args = w->args;
  const struct qtr_batch *batch = w->c->batch;
  const struct qtr_kv *kv = args->kv;
  int32_t tokens = kv->heads.sparse.logical_tokens, logical = first % QTR_PAGE_TOKENS / tokens;
  int32_t page = qtr_batch_table(batch, QTR_HEAD_RETRIEVAL, seq)[first / QTR_PAGE_TOKENS];
  size_t dim = (size_t)args->head_dim, width = (size_t)(args->n_heads + 2 * args->n_kv_heads) * dim;
  const float *k0 = (const float *)args->qkv + (size_t)args->n_heads * dim;
  float max[QTR_CPU_HEAD_DIM_MAX], min[QTR_CPU_HEAD_DIM_MAX];
  for (int32_t h = 0; h < args->n_kv_heads; h++) {
    if (qtr_kv_head_class(&kv->heads, args->layer, h) != QTR_HEAD_RETRIEVAL) continue;
    uint16_t *stats = qtr_cpu_kv_stats(kv, args->layer, page, logical, h);
    for (size_t i = 0; i < dim; i++) {
      bool begins = first % tokens == 0; /* whatever an owner before has left */
      max[i] = begins ? -QTR_KV_MAX : qtr_f16_to_f32(stats[i]);
      min[i] = begins ? QTR_KV_MAX : qtr_f16_to_f32(stats[dim + i]);
    }
    for (int32_t p = first; p < last; p++) {
      size_t t = (size_t)(batch->q_start[seq] + p - batch->kv_len[seq]);
      w->rows->extremes(k0 + t * width + (size_t)h * dim, dim, max, min);
    }
    w->rows->to_f16(max, dim, stats);
    w->rows->to_f16(min, dim, stats + dim);
  }
}

static void rope_write_logical_pages(void *arg, size_t begin, size_t end, int thread) {
  (void)thread;
  const struct rope_write *w = arg;
  const struct qtr_batch *batch = w->c->batch;
  int32_t seq = 0, tokens = w->args->kv->heads.sparse.logical_tokens;
  size_t before = 0; /* items of the sequences before seq */
  for (size_t item = begin; item < end; item++) {
    for (size_t n; item - before >= (n = logical_pages(w, seq)); seq++) before += n;
    int32_t kv_len = batch->kv_len[seq], q_start = batch->q_start[seq];
    int32_t page = kv_len / tokens + (int32_t)(item - before);
    int32_t first = QTR_MAX(page * tokens, kv_len),
            last = QTR_MIN((page + 1) * tokens, kv_len + batch->q_start[seq + 1] - q_start);
    rope_write(w, seq, (size_t)(q_start + first - kv_len), (size_t)(q_start + last - kv_len));
    add_stats(w, seq, first, last);
  }
}

void qtr_cpu_rope_kv_write(struct qtr_backend *b, const struct qtr_rope_kv_args *args) {
  struct qtr_cpu *c = (struct qtr_cpu *)b;
  struct rope_write w = {c, args, qtr_cpu_kv_choose_rows(c)};
  if (args->kv->heads.sparse.budget == 0) {
    qtr_cpu_for(c, (size_t)c->batch->n_tokens, 4, rope_write_tokens, &w);
    return;
  }
  size_t n = 0;
  for (int32_t s = 0; s < c->batch->n_seqs; s++) n += logical_pages(&w, s);
  qtr_cpu_for(c, n, 1, rope_write_logical_pages, &w);
}
