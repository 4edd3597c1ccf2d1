/* attention.h - how attention is cut into work, and what a kernel for one set of instructions must do (spec C.5).
 *
 * A row is one query head of one token. The rows of one sequence and one KV head share that head's keys: row = token * group
 * + g, where query head = kv_head * group + g. A tile is up to QTR_ATT_ROWS consecutive rows. Keys are taken in segments of
 * QTR_ATT_SEGMENT positions, counted from 0, a segment in pages of 64; a segment starts from nothing and segments are merged
 * in order.
 *
 * The promise of backend.h (the same bits whatever else is in the batch, and however the prompt is cut) rests on this: for
 * one row, what is computed depends only on its position and the cache. So in a kernel one row's sequence of operations must
 * not depend on its neighbours in the tile; work that adds exact zeros (keys that the row does not see) may be done or left
 * out.
 *
 * Which keys a row sees (struct qtr_kv_sparse): those up to its own position but for a hole, where the head is a streaming
 * head; or those of chosen pages, the same for all rows of the tile. */
#ifndef QTR_BACKEND_CPU_ATTENTION_H
#define QTR_BACKEND_CPU_ATTENTION_H

#include "backend/cpu/kv.h"

#define QTR_ATT_ROWS 128
#define QTR_ATT_SEGMENT 1024
#define QTR_ATT_LOWEST -1e30f /* running exponent before the first key; finite, so that differences are never NaN */
#define QTR_ATT_FLOOR                                                                                      \
  -100.0f /* exponents are cut here: 2^-100 is nothing beside the maximum's weight, and no denormals arise \
           */

/* What one tile needs; head_dim and formats are in kv->config. */
struct qtr_att_tile {
  const struct qtr_kv *kv;
  const int32_t *pages; /* block table of the sequence */
  const float *q;       /* row 0 of the sequence and head: q + token * q_stride + g * head_dim */
  size_t q_stride;
  float *out; /* the same for the result */
  size_t out_stride;
  int32_t layer, kv_head, group;
  int32_t row0, n_rows;
  int32_t kv_len;                        /* row r sees kv_len + r / group + 1 keys */
  float log2_scale;                      /* scale * log2(e): scores are exponents of 2 */
  const struct qtr_kv_sparse *sparse;    /* of a streaming head; else NULL */
  int32_t decode_start;                  /* with it */
  int32_t skip_from, skip_to;            /* whole pages of keys that no row sees */
  const struct qtr_selection *selection; /* NULL: all pages */
};

static inline int32_t qtr_att_visible(const struct qtr_att_tile *t, int32_t r) { /* r counts from row0 */
  return t->kv_len + (t->row0 + r) / t->group + 1;
}

/* The keys [*from, *to) before its own that row r does not see. */
static inline void qtr_att_hole(const struct qtr_att_tile *t, int32_t r, int32_t *from, int32_t *to) {
  *from = *to = 0;
  if (!t->sparse) return;
  int32_t position = qtr_att_visible(t, r) - 1;
  qtr_window_hole(position >= t->decode_start ? &t->sparse->decode : &t->sparse->context, position, from, to);
}

/* The first key at or after `key`, which begins a page, whose page some row may see; key1 or more: none before key1. */
static inline int32_t qtr_att_next(const struct qtr_att_tile *t, int32_t key, int32_t key1) {
  if (t->selection) {
    const struct qtr_selection *s = t->selection;
    int32_t page = key / QTR_PAGE_TOKENS, low = 0, high = s->n; /* the first chosen page that is not before `page` */
    if (page >= s->tail) return key;
    while (low < high) {
      int32_t middle = (low + high) / 2;
      if (s->page[middle] < page) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    page = low < s->n ? s->page[low] : s->tail;
    return page < key1 / QTR_PAGE_TOKENS + 1 ? page * QTR_PAGE_TOKENS : key1;
  }
  return key >= t->skip_from && key < t->skip_to ? t->skip_to : key;
}

/* Query of row r, (head_dim). */
static inline const float *qtr_att_query(const struct qtr_att_tile *t, size_t r) {
  uint32_t row = (uint32_t)t->row0 + (uint32_t)r, group = (uint32_t)t->group;
  return t->q + row / group * t->q_stride + row % group * (size_t)t->kv->config.head_dim;
}

/* Unfinished result of a tile: weights are 2^(score - max), where max is near the row's maximum. Row stride of acc: head_dim
 * rounded up to 16. */
struct qtr_att_state {
  float *max, *sum; /* (n_rows) */
  float *acc;       /* (n_rows, acc_stride) */
};
static inline size_t qtr_att_stride(size_t head_dim) { return (head_dim + 15) / 16 * 16; }

struct qtr_att_kernel {
  size_t (*scratch_bytes)(size_t head_dim);
  /* Once a tile, before its segments; what it prepares (packed q) stays in scratch. */
  void (*prepare)(const struct qtr_att_tile *tile, void *scratch);
  /* Keys [key0, key1), both inside one segment, key0 a multiple of the segment: fills `state`. Pages are taken by
   * qtr_att_next. */
  void (*segment)(const struct qtr_att_tile *tile, int32_t key0, int32_t key1, const struct qtr_att_state *state,
                  void *scratch);
};
/* NULL in a build without these instructions. */
const struct qtr_att_kernel *qtr_cpu_attention_avx2(void), *qtr_cpu_attention_avx512(void), *qtr_cpu_attention_amx(void);

size_t qtr_cpu_attention_scratch_bytes(const struct qtr_cpu *c, size_t head_dim);
size_t qtr_cpu_attention_partial_bytes(size_t head_dim);
/* Scratch of a thread that also chooses pages. */
size_t qtr_cpu_attention_choice_bytes(const struct qtr_cpu *c, const struct qtr_kv *kv);

#endif
