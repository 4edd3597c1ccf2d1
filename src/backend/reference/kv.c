/* kv.c - the KV cache of the reference backend: RoPE (spec C.4), quantisation (C.3, backend/common/kv_quant.h) and pages in
 * the byte layout of C.2:
 *   INT8, INT4      codes (H, 64, D), fp16 scale (H, 64), fp16 zero (H, 64); INT4: element 2j in the low nibble of byte j
 *   INT8_STATIC     int8 (H, 64, D)
 *   F16             fp16 (H, 64, D)
 * then, in K pages of retrieval heads and with a budget only, the statistics of keys (D.4): fp16 max (S, H, D), min (S, H,
 * D) over the S logical pages. H counts the heads of the page's class; each class has its own pool. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "backend/common/kv_fp8.h"
#include "backend/common/kv_quant.h"
#include "backend/common/kv_static.h"
#include "backend/reference/reference.h"
#include "base/checked.h"
#include "base/status.h"

/* One token of one head, without scale and zero. */
static size_t code_bytes(const struct qtr_kv *kv) {
  size_t dim = (size_t)kv->config.head_dim;
  return kv->config.format == QTR_KV_F16 ? 2 * dim : kv->config.format == QTR_KV_INT4 ? dim / 2 : dim;
}

static size_t pool_index(int32_t layer, enum qtr_head_class class, bool is_v) {
  return ((size_t)layer * QTR_N_HEAD_CLASSES + class) * 2 + is_v;
}

size_t qtr_reference_kv_page_bytes(const struct qtr_kv *kv, int32_t layer, enum qtr_head_class class, bool is_v) {
  bool scaled = kv->config.format == QTR_KV_INT8 || kv->config.format == QTR_KV_INT4;
  size_t head = QTR_PAGE_TOKENS * (code_bytes(kv) + (scaled ? 4 : 0));
  if (class == QTR_HEAD_RETRIEVAL && !is_v) {
    head += qtr_kv_stats_values(&kv->heads.sparse, kv->config.head_dim) * sizeof(uint16_t);
  }
  return head * (size_t)qtr_kv_head_count(&kv->heads, layer, class);
}

static enum qtr_status make_selections(struct qtr_kv *k, struct qtr_error *err) {
  const struct qtr_kv_sparse *s = &k->heads.sparse;
  if (s->budget == 0) return QTR_OK;
  size_t n_bytes = qtr_sparse_selections_bytes(&k->heads);
  k->selection = qtr_reference_alloc(n_bytes, 1, "chosen pages", err);
  k->page_score = qtr_reference_alloc((size_t)s->max_pages, sizeof *k->page_score, "scores of pages", err);
  k->page_order = qtr_reference_alloc((size_t)s->max_pages, sizeof *k->page_order, "scores of pages", err);
  return k->selection && k->page_score && k->page_order ? QTR_OK : QTR_ERR_MEMORY;
}

enum qtr_status qtr_reference_kv_create(struct qtr_backend *b, const struct qtr_kv_config *config, struct qtr_kv **kv,
                                        struct qtr_error *err) {
  const struct qtr_kv_config *c = config;
  *kv = NULL;
  if (c->format >= QTR_N_KV_FORMATS || c->n_layers < 1 || c->n_kv_heads < 1 || c->n_pages < 1 || c->head_dim < 2 ||
      c->head_dim % 2 || (c->format == QTR_KV_INT8_STATIC && !c->static_scale)) {
    return qtr_fail(
        err, QTR_ERR_ARGUMENT,
        "KV cache: format %d, %d layers, %d heads of %d, %d pages: all must be positive, the head size even, and "
        "static scales given for kv8-static",
        (int)c->format, c->n_layers, c->n_kv_heads, c->head_dim, c->n_pages);
  }
  size_t retrieval, streaming, n_bytes;
  if (qtr_mul_overflow(qtr_kv_page_bytes(c), (size_t)c->n_pages, &retrieval) ||
      qtr_mul_overflow(qtr_kv_stream_page_bytes(c), (size_t)QTR_MAX(c->n_stream_pages, 0), &streaming) ||
      qtr_add_overflow(retrieval, streaming, &n_bytes))
    return qtr_fail_memory(err, "the KV cache", SIZE_MAX);
  struct qtr_kv *k = qtr_reference_alloc(1, sizeof *k, "the KV cache", err);
  if (!k) return QTR_ERR_MEMORY;
  k->config = *c;
  k->config.static_scale = NULL;
  k->config.sparse = NULL;
  enum qtr_status status = qtr_kv_heads_create(c, &k->heads, err);
  if (status) goto done;
  status = QTR_ERR_MEMORY;
  k->pool = qtr_reference_alloc((size_t)c->n_layers * QTR_N_HEAD_CLASSES * 2, sizeof *k->pool, "the KV cache", err);
  k->data = qtr_reference_alloc(n_bytes, 1, "the KV cache", err);
  if (!k->pool || !k->data) goto done;
  size_t at = 0;
  for (int32_t layer = 0; layer < c->n_layers; layer++) {
    for (int class = 0; class < QTR_N_HEAD_CLASSES; class ++) {
      for (int is_v = 0; is_v < 2; is_v++) {
        k->pool[pool_index(layer, (enum qtr_head_class) class, is_v)] = at;
        at += qtr_reference_kv_page_bytes(k, layer, (enum qtr_head_class) class, is_v) *
              (size_t)(class == QTR_HEAD_STREAMING ? c->n_stream_pages : c->n_pages);
      }
    }
  }
  if (c->format == QTR_KV_INT8_STATIC && (status = qtr_kv_static_scales(c, &k->static_scale, err))) goto done;
  if ((status = qtr_kv_fp8_scales(c, &k->fp8_scale, err))) goto done;
  status = make_selections(k, err);
  if (status) goto done;
  *kv = k;
  k = NULL;
done:
  qtr_reference_kv_free(b, k);
  return status;
}

enum qtr_kv_format qtr_reference_kv_format(const struct qtr_kv *kv) { return kv->config.format; }
const struct qtr_kv_heads *qtr_reference_kv_heads(const struct qtr_kv *kv) { return &kv->heads; }

void qtr_reference_kv_free(struct qtr_backend *b, struct qtr_kv *kv) {
  (void)b;
  if (!kv) return;
  qtr_kv_heads_free(&kv->heads);
  free(kv->static_scale);
  free(kv->fp8_scale);
  free(kv->selection);
  free(kv->page_score);
  free(kv->page_order);
  free(kv->pool);
  free(kv->data);
  free(kv);
}

uint8_t *qtr_reference_kv_page(const struct qtr_kv *kv, int32_t layer, enum qtr_head_class class, bool is_v, int32_t page) {
  return kv->data + kv->pool[pool_index(layer, class, is_v)] +
         (size_t)page * qtr_reference_kv_page_bytes(kv, layer, class, is_v);
}

/* The pieces of one row: its codes, and the places of its scale and zero (INT8 and INT4). */
struct row {
  uint8_t *code, *scale, *zero;
};

static struct row row_find(const struct qtr_kv *kv, int32_t layer, bool is_v, int32_t page, int32_t slot, int32_t head) {
  enum qtr_head_class class = qtr_kv_head_class(&kv->heads, layer, head);
  size_t heads = (size_t)qtr_kv_head_count(&kv->heads, layer, class), bytes = code_bytes(kv);
  size_t index = (size_t)qtr_kv_head_rank(&kv->heads, layer, head) * QTR_PAGE_TOKENS + (size_t)slot;
  uint8_t *base = qtr_reference_kv_page(kv, layer, class, is_v, page);
  uint8_t *scale = base + heads * QTR_PAGE_TOKENS * bytes, *zero = scale + heads * QTR_PAGE_TOKENS * 2;
  return (struct row){base + index * bytes, scale + index * 2, zero + index * 2};
}

/* ---- statistics of keys ------------------------------------------------------------------------------ */

/* Maxima (head_dim) fp16 of a logical page; the minima are *min_at bytes further. */
static uint8_t *stats_find(const struct qtr_kv *kv, int32_t layer, int32_t page, int32_t logical, int32_t head,
                           size_t *min_at) {
  size_t heads = (size_t)qtr_kv_head_count(&kv->heads, layer, QTR_HEAD_RETRIEVAL), row = (size_t)kv->config.head_dim * 2;
  size_t half = qtr_kv_stats_values(&kv->heads.sparse, kv->config.head_dim) * heads; /* bytes of all maxima */
  uint8_t *end = qtr_reference_kv_page(kv, layer, QTR_HEAD_RETRIEVAL, false, page) +
                 qtr_reference_kv_page_bytes(kv, layer, QTR_HEAD_RETRIEVAL, false);
  *min_at = half;
  return end - 2 * half + ((size_t)logical * heads + (size_t)qtr_kv_head_rank(&kv->heads, layer, head)) * row;
}

void qtr_reference_stats_read(struct qtr_backend *b, const struct qtr_kv *kv, int32_t layer, int32_t page, int32_t logical,
                              int32_t head, float *max, float *min) {
  (void)b;
  size_t min_at;
  const uint8_t *at = stats_find(kv, layer, page, logical, head, &min_at);
  for (size_t i = 0; i < (size_t)kv->config.head_dim; i++) {
    uint16_t h[2];
    memcpy(&h[0], at + 2 * i, 2);
    memcpy(&h[1], at + min_at + 2 * i, 2);
    max[i] = qtr_f16_to_f32(h[0]);
    min[i] = qtr_f16_to_f32(h[1]);
  }
}

/* A key arrives: the first of a logical page begins its statistics anew, whatever was there. */
static void stats_add(const struct qtr_kv *kv, int32_t layer, int32_t page, int32_t slot, int32_t head, const float *k) {
  int32_t tokens = kv->heads.sparse.logical_tokens;
  size_t min_at;
  uint8_t *at = stats_find(kv, layer, page, slot / tokens, head, &min_at);
  for (size_t i = 0; i < (size_t)kv->config.head_dim; i++) {
    uint16_t max = qtr_f16_from_f32(qtr_kv_sane(k[i])), min = max, old[2];
    if (slot % tokens != 0) {
      memcpy(&old[0], at + 2 * i, 2);
      memcpy(&old[1], at + min_at + 2 * i, 2);
      if (qtr_f16_to_f32(old[0]) > qtr_f16_to_f32(max)) max = old[0];
      if (qtr_f16_to_f32(old[1]) < qtr_f16_to_f32(min)) min = old[1];
    }
    memcpy(at + 2 * i, &max, 2);
    memcpy(at + min_at + 2 * i, &min, 2);
  }
}

/* ---- rows -------------------------------------------------------------------------------------------- */

static void row_write(const struct qtr_kv *kv, int32_t layer, bool is_v, int32_t page, int32_t slot, int32_t head,
                      const float *x) {
  struct row row = row_find(kv, layer, is_v, page, slot, head);
  size_t dim = (size_t)kv->config.head_dim;
  uint16_t scale, zero;
  switch (kv->config.format) {
    case QTR_KV_F16:
      for (size_t i = 0; i < dim; i++) {
        float v = qtr_kv_sane(x[i]);
        if (kv->fp8_scale) qtr_kv_fp8_row(&x[i], 1, kv->config.fp8, kv->fp8_scale[layer * 2 + is_v], &v);
        uint16_t h = qtr_f16_from_f32(v);
        memcpy(row.code + 2 * i, &h, 2);
      }
      return;
    case QTR_KV_INT8_STATIC: {
      float r = 1.0f / kv->static_scale[layer * 2 + is_v];
      for (size_t i = 0; i < dim; i++) row.code[i] = (uint8_t)qtr_kv_quant_static(x[i], r);
      return;
    }
    case QTR_KV_INT8: qtr_kv_quant_row(x, dim, 255, row.code, &scale, &zero); break;
    default: {
      float mn, mx;
      qtr_kv_row_range(x, dim, &mn, &mx);
      qtr_kv_quant_params(mn, mx, 15, &scale, &zero);
      float r = 1.0f / qtr_f16_to_f32(scale), z = qtr_f16_to_f32(zero);
      for (size_t i = 0; i < dim; i += 2) {
        unsigned low = qtr_kv_quant_code(qtr_kv_sane(x[i]), r, z, 15),
                 high = qtr_kv_quant_code(qtr_kv_sane(x[i + 1]), r, z, 15);
        row.code[i / 2] = (uint8_t)(low | high << 4);
      }
      break;
    }
  }
  memcpy(row.scale, &scale, 2);
  memcpy(row.zero, &zero, 2);
}

void qtr_reference_kv_read(struct qtr_backend *b, const struct qtr_kv *kv, int32_t layer, bool is_v, int32_t page,
                           int32_t slot, int32_t head, uint16_t *code, float *scale, float *zero) {
  (void)b;
  struct row row = row_find(kv, layer, is_v, page, slot, head);
  enum qtr_kv_format format = kv->config.format;
  uint16_t s = 0, z = 0;
  if (format == QTR_KV_INT8 || format == QTR_KV_INT4) {
    memcpy(&s, row.scale, 2);
    memcpy(&z, row.zero, 2);
  }
  if (scale) *scale = format == QTR_KV_INT8_STATIC ? kv->static_scale[layer * 2 + is_v] : qtr_f16_to_f32(s);
  if (zero) *zero = qtr_f16_to_f32(z);
  for (size_t i = 0; code && i < (size_t)kv->config.head_dim; i++) {
    switch (format) {
      case QTR_KV_F16: memcpy(&code[i], row.code + 2 * i, 2); break;
      case QTR_KV_INT4: code[i] = (uint16_t)((unsigned)row.code[i / 2] >> (i % 2 * 4) & 15u); break;
      case QTR_KV_INT8_STATIC: code[i] = (uint16_t)(int8_t)row.code[i]; break; /* two's complement, sign extended */
      default: code[i] = row.code[i]; break;
    }
  }
}

void qtr_reference_kv_row(const struct qtr_kv *kv, int32_t layer, bool is_v, int32_t page, int32_t slot, int32_t head,
                          float *out) {
  struct row row = row_find(kv, layer, is_v, page, slot, head);
  enum qtr_kv_format format = kv->config.format;
  uint16_t s = 0, z = 0, h;
  if (format == QTR_KV_INT8 || format == QTR_KV_INT4) {
    memcpy(&s, row.scale, 2);
    memcpy(&z, row.zero, 2);
  }
  float scale = qtr_f16_to_f32(s), zero = qtr_f16_to_f32(z);
  for (size_t i = 0; i < (size_t)kv->config.head_dim; i++) {
    switch (format) {
      case QTR_KV_F16:
        memcpy(&h, row.code + 2 * i, 2);
        out[i] = qtr_f16_to_f32(h);
        break;
      case QTR_KV_INT8_STATIC: out[i] = (float)(int8_t)row.code[i] * kv->static_scale[layer * 2 + is_v]; break;
      case QTR_KV_INT4: out[i] = qtr_kv_dequant((unsigned)row.code[i / 2] >> (i % 2 * 4) & 15u, scale, zero); break;
      default: out[i] = qtr_kv_dequant(row.code[i], scale, zero); break;
    }
  }
}

/* Half-split rotation of one head in place: pairs (i, i + half). */
static void rotate(float *x, size_t half, const float *cos, const float *sin) {
  for (size_t i = 0; i < half; i++) {
    float a = x[i], c = x[i + half];
    x[i] = a * cos[i] - c * sin[i];
    x[i + half] = c * cos[i] + a * sin[i];
  }
}

void qtr_reference_rope_kv_write(struct qtr_backend *b, const struct qtr_rope_kv_args *args) {
  const struct qtr_reference *r = (const struct qtr_reference *)b;
  const struct qtr_batch *batch = r->batch;
  size_t dim = (size_t)args->head_dim, width = (size_t)(args->n_heads + 2 * args->n_kv_heads) * dim;
  for (int32_t s = 0; s < batch->n_seqs; s++) {
    const int32_t *table[] = {qtr_batch_table(batch, QTR_HEAD_RETRIEVAL, s), qtr_batch_table(batch, QTR_HEAD_STREAMING, s)};
    for (int32_t t = batch->q_start[s]; t < batch->q_start[s + 1]; t++) {
      float *q = (float *)args->qkv + (size_t)t * width, *k = q + (size_t)args->n_heads * dim;
      float *v = k + (size_t)args->n_kv_heads * dim;
      int32_t place = batch->kv_len[s] + t - batch->q_start[s];
      int32_t slot = place % QTR_PAGE_TOKENS;
      size_t angle = (size_t)t * r->half_dim;
      for (int32_t h = 0; h < args->n_heads + args->n_kv_heads; h++) { /* k's heads follow q's */
        rotate(q + (size_t)h * dim, dim / 2, r->cos + angle, r->sin + angle);
      }
      for (int32_t h = 0; h < args->n_kv_heads; h++) {
        enum qtr_head_class class = qtr_kv_head_class(&args->kv->heads, args->layer, h);
        int32_t page = table[class][place / QTR_PAGE_TOKENS];
        if (class == QTR_HEAD_RETRIEVAL && args->kv->heads.sparse.budget > 0) {
          stats_add(args->kv, args->layer, page, slot, h, k + (size_t)h * dim);
        }
        row_write(args->kv, args->layer, false, page, slot, h, k + (size_t)h * dim);
        row_write(args->kv, args->layer, true, page, slot, h, v + (size_t)h * dim);
      }
    }
  }
}
