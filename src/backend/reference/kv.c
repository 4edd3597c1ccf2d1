/* kv.c - the KV cache of the reference backend: RoPE (spec C.4), quantisation (C.3, backend/common/kv_quant.h) and pages in
 * the byte layout of C.2:
 *   INT8, INT4      codes (H, 64, D), fp16 scale (H, 64), fp16 zero (H, 64); INT4: element 2j in the low nibble of byte j
 *   INT8_STATIC     int8 (H, 64, D)
 *   F16             fp16 (H, 64, D)
 * Page statistics (max, min) of sparse attention have no place yet. */
#include <stdlib.h>
#include <string.h>

#include "backend/common/kv_quant.h"
#include "backend/common/kv_static.h"
#include "backend/reference/reference.h"
#include "base/checked.h"
#include "base/status.h"

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
  size_t all = qtr_kv_page_bytes(c), n_bytes;
  if (all == 0 || qtr_mul_overflow(all, (size_t)c->n_pages, &n_bytes)) return qtr_fail_memory(err, "the KV cache", SIZE_MAX);
  struct qtr_kv *k = qtr_reference_alloc(1, sizeof *k, "the KV cache", err);
  if (!k) return QTR_ERR_MEMORY;
  enum qtr_status status = QTR_ERR_MEMORY;
  k->config = *c;
  k->config.static_scale = NULL;
  k->page_bytes = all / (size_t)c->n_layers / 2;
  k->data = qtr_reference_alloc(n_bytes, 1, "the KV cache", err);
  if (!k->data) goto done;
  if (c->format == QTR_KV_INT8_STATIC && (status = qtr_kv_static_scales(c, &k->static_scale, err))) goto done;
  *kv = k;
  k = NULL;
  status = QTR_OK;
done:
  qtr_reference_kv_free(b, k);
  return status;
}

enum qtr_kv_format qtr_reference_kv_format(const struct qtr_kv *kv) { return kv->config.format; }

void qtr_reference_kv_free(struct qtr_backend *b, struct qtr_kv *kv) {
  (void)b;
  if (!kv) return;
  free(kv->static_scale);
  free(kv->data);
  free(kv);
}

uint8_t *qtr_reference_kv_page(const struct qtr_kv *kv, int32_t layer, bool is_v, int32_t page) {
  size_t pool = (size_t)layer * 2 + is_v;
  return kv->data + (pool * (size_t)kv->config.n_pages + (size_t)page) * kv->page_bytes;
}

/* The pieces of one row: its codes, and the places of its scale and zero (INT8 and INT4). */
struct row {
  uint8_t *code, *scale, *zero;
};

static struct row row_find(const struct qtr_kv *kv, int32_t layer, bool is_v, int32_t page, int32_t slot, int32_t head) {
  size_t dim = (size_t)kv->config.head_dim, heads = (size_t)kv->config.n_kv_heads;
  size_t index = (size_t)head * QTR_PAGE_TOKENS + (size_t)slot;
  size_t bytes = kv->config.format == QTR_KV_F16 ? 2 * dim : kv->config.format == QTR_KV_INT4 ? dim / 2 : dim;
  uint8_t *base = qtr_reference_kv_page(kv, layer, is_v, page);
  uint8_t *scale = base + heads * QTR_PAGE_TOKENS * bytes, *zero = scale + heads * QTR_PAGE_TOKENS * 2;
  return (struct row){base + index * bytes, scale + index * 2, zero + index * 2};
}

static void row_write(const struct qtr_kv *kv, int32_t layer, bool is_v, int32_t page, int32_t slot, int32_t head,
                      const float *x) {
  struct row row = row_find(kv, layer, is_v, page, slot, head);
  size_t dim = (size_t)kv->config.head_dim;
  uint16_t scale, zero;
  switch (kv->config.format) {
    case QTR_KV_F16:
      for (size_t i = 0; i < dim; i++) {
        uint16_t h = qtr_f16_from_f32(qtr_kv_sane(x[i]));
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
    const int32_t *pages = batch->block_table + (size_t)s * (size_t)batch->max_blocks;
    for (int32_t t = batch->q_start[s]; t < batch->q_start[s + 1]; t++) {
      float *q = (float *)args->qkv + (size_t)t * width, *k = q + (size_t)args->n_heads * dim;
      float *v = k + (size_t)args->n_kv_heads * dim;
      int32_t place = batch->kv_len[s] + t - batch->q_start[s];
      int32_t page = pages[place / QTR_PAGE_TOKENS], slot = place % QTR_PAGE_TOKENS;
      size_t angle = (size_t)t * r->half_dim;
      for (int32_t h = 0; h < args->n_heads + args->n_kv_heads; h++) { /* k's heads follow q's */
        rotate(q + (size_t)h * dim, dim / 2, r->cos + angle, r->sin + angle);
      }
      for (int32_t h = 0; h < args->n_kv_heads; h++) {
        row_write(args->kv, args->layer, false, page, slot, h, k + (size_t)h * dim);
        row_write(args->kv, args->layer, true, page, slot, h, v + (size_t)h * dim);
      }
    }
  }
}
