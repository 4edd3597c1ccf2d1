/* kv.h - the KV cache of the CPU backend: where each code lies, and the row quantisers the writers use (spec C.3).
 *
 *   struct qtr_kv.data   [layer][class][page][head] { K half | V half }    one allocation; untouched pages cost nothing
 *   a half (64 tokens)   codes (64 * head_dim * 2, 1 or 1/2 bytes) | scale (64) fp16 | zero (64) fp16   the last two for
 * INT4, INT8
 *
 * A head's page is contiguous (head_dim 64, KV4: 4,608 bytes). Codes are arranged for kernels that want, for K, 16 keys side
 * by side and, for V, 16 dims side by side, each with a partner in the adjacent byte (K: the next dim, V: the token 16
 * later): that is the pair order of bf16 tile multiplication, and a 16-bit load gives fp32 kernels both.
 *
 *   K, INT8: 16 keys > pair of dims > key > dim            V, INT8: 32 tokens > 16 pairs of tokens > dim > token
 *      key:   0       1            15                        dim:   0       1            D-1
 *      32 B  |k k'|  |k k'|  ...  |k k'|                     2D B  |v v'|  |v v'|  ...  |v v'|
 *            k = dim 2j, k' = dim 2j+1                             v = token t, v' = token t+16
 *
 *   K, INT4: 16 keys > four dims > key > 2 bytes           V, INT4: 32 tokens > 16 pairs > 32 dims > 16 dims > token
 *      key:   0        1           15                        dim:   0       1            15
 *      32 B  |b b'|   |b b'| ...  |b b'|                     32 B  |b b'|  |b b'|  ...  |b b'|
 *            low nibbles:  dims 4j,   4j+1                         low nibbles:  dims 0 - 15 of t, t+16
 *            high nibbles: dims 4j+2, 4j+3                         high nibbles: dims 16 - 31
 *      a last pair of dims (head_dim % 4 == 2):              a last block of w < 32 dims: w/2 in place of 16
 *      one byte a key
 *
 *   K, F16:  16 keys > dim > key                           V, F16:  token > dim
 *
 * Every byte belongs to one token, so tokens can be written from several threads. */
#ifndef QTR_BACKEND_CPU_KV_H
#define QTR_BACKEND_CPU_KV_H

#include "backend/common/sparse.h"
#include "backend/cpu/cpu.h"

#define QTR_CPU_HEAD_DIM_MAX 256

struct qtr_kv {
  struct qtr_kv_config config; /* static_scale: not kept, see below */
  size_t code_bytes;           /* codes of K or V of one head and page */
  size_t half_bytes;           /* the same with scales and zeros */
  size_t n_bytes;
  struct qtr_kv_heads heads;
  struct qtr_cpu_kv_place *place; /* (n_layers, n_kv_heads) */
  uint8_t *data;                  /* for each layer and class (n_pages, heads of the class, 2, half_bytes) */
  float *fp8_scale;               /* (n_layers, 2) when values are rounded to fp8 first, else NULL */
  float *static_scale;            /* (n_layers, 2) rounded to fp16, for INT8_STATIC; else NULL */
  float *partial;                 /* (see attention.c) results of key segments computed apart */
  size_t partial_bytes;
  /* With a budget, see struct qtr_kv_sparse: */
  uint16_t *stats; /* for each layer (n_pages, retrieval heads, logical pages, 2, head_dim) fp16: maxima, minima of keys */
  size_t stats_bytes;
  int32_t *selection; /* (n_slots, n_layers, n_kv_heads, choosers, ints of one) struct qtr_selection */
  size_t selection_bytes;
};

/* Where a head's pages are: page p begins p * stride bytes after `at`. The same of its statistics, in fp16 values. */
struct qtr_cpu_kv_place {
  size_t at, stride, stats_at, stats_stride;
};
static inline const struct qtr_cpu_kv_place *qtr_cpu_kv_place(const struct qtr_kv *kv, int32_t layer, int32_t head) {
  return kv->place + (size_t)layer * (size_t)kv->config.n_kv_heads + (size_t)head;
}

static inline uint8_t *qtr_cpu_kv_half(const struct qtr_kv *kv, int32_t layer, int32_t page, int32_t head, bool is_v) {
  const struct qtr_cpu_kv_place *place = qtr_cpu_kv_place(kv, layer, head);
  return kv->data + place->at + (size_t)page * place->stride + (is_v ? kv->half_bytes : 0);
}
/* (2, head_dim): maxima, minima of a logical page. */
static inline uint16_t *qtr_cpu_kv_stats(const struct qtr_kv *kv, int32_t layer, int32_t page, int32_t logical,
                                         int32_t head) {
  const struct qtr_cpu_kv_place *place = qtr_cpu_kv_place(kv, layer, head);
  return kv->stats + place->stats_at + (size_t)page * place->stats_stride +
         (size_t)logical * 2 * (size_t)kv->config.head_dim;
}
static inline struct qtr_selection *qtr_cpu_kv_selection(const struct qtr_kv *kv, int32_t layer, int32_t head,
                                                         int32_t member, int32_t slot) {
  const struct qtr_kv_sparse *s = &kv->heads.sparse;
  size_t at = ((size_t)slot * (size_t)kv->config.n_layers + (size_t)layer) * (size_t)kv->config.n_kv_heads + (size_t)head;
  at = at * (size_t)qtr_sparse_choosers(s) + (size_t)(s->each_head ? member : 0);
  return (struct qtr_selection *)(void *)(kv->selection + at * qtr_sparse_selection_ints(s));
}
static inline uint16_t *qtr_cpu_kv_scales(const struct qtr_kv *kv, const uint8_t *half) {
  return (uint16_t *)(uintptr_t)(half + kv->code_bytes); /* (2, 64): scales, then zeros */
}

/* Number of the pair of V's tokens that a slot belongs to. */
static inline size_t qtr_cpu_kv_pair(size_t slot) { return slot / 32 * 16 + slot % 16; }

/* Place of dim d of a slot (0 … 63) inside a half: index of the half, byte of the byte, byte and shift of the nibble. */
static inline size_t qtr_cpu_kv_at_f16(bool is_v, size_t dim, size_t slot, size_t d) {
  return is_v ? slot * dim + d : slot / 16 * 16 * dim + d * 16 + slot % 16;
}
static inline size_t qtr_cpu_kv_at_int8(bool is_v, size_t dim, size_t slot, size_t d) {
  return is_v ? qtr_cpu_kv_pair(slot) * 2 * dim + d * 2 + slot / 16 % 2
              : slot / 16 * 16 * dim + d / 2 * 32 + slot % 16 * 2 + d % 2;
}
static inline size_t qtr_cpu_kv_at_int4(bool is_v, size_t dim, size_t slot, size_t d, int *shift) {
  size_t block = is_v ? 32 : 4, first = d / block * block, width = (dim - first < block ? dim - first : block) / 2;
  *shift = d - first < width ? 0 : 4;
  size_t column = (d - first) % width;
  if (is_v) return qtr_cpu_kv_pair(slot) * dim + first + column * 2 + slot / 16 % 2;
  return slot / 16 * 8 * dim + first * 8 + slot % 16 * width + column;
}

/* One head of one token, x (dim) fp32 -> codes, as qtr_kv_quant_row, qtr_kv_quant_static and qtr_f16_from_f32 give them, bit
 * for bit. `r` = 1 / static scale. */
struct qtr_cpu_kv_rows {
  void (*quant)(const float *x, size_t dim, int levels, uint8_t *code, uint16_t *scale, uint16_t *zero);
  void (*quant_static)(const float *x, size_t dim, float r, uint8_t *code);
  void (*to_f16)(const float *x, size_t dim, uint16_t *half);
  void (*rope)(float *x, size_t half_dim, const float *cos, const float *sin); /* (2 half_dim) in place, C.4 */
  void (*extremes)(const float *x, size_t dim, float *max, float *min); /* max and min (dim) take x, brought in range */
  /* sum over dim of max(q max, q min), in double; stats (2, dim) fp16 */
  double (*bound)(const float *q, const uint16_t *stats, size_t dim);
};
const struct qtr_cpu_kv_rows *qtr_cpu_kv_choose_rows(const struct qtr_cpu *c);
/* NULL in a build without these instructions. */
const struct qtr_cpu_kv_rows *qtr_cpu_kv_rows_avx2(void), *qtr_cpu_kv_rows_avx512(void);

#endif
