/* sparse.h - what all backends and the engine must agree on about sparse attention: which keys a streaming head sees, when
 * pages are chosen and which, and where each head's pages lie. The definition is in backend.h (struct qtr_kv_sparse). */
#ifndef QTR_BACKEND_COMMON_SPARSE_H
#define QTR_BACKEND_COMMON_SPARSE_H

#include "backend/backend.h"

/* ---- rules ------------------------------------------------------------------------------------------ */

/* Keys [*from, *to) that the query at `position` does not see, although they come before it; empty: both 0. */
static inline void qtr_window_hole(const struct qtr_kv_window *w, int32_t position, int32_t *from, int32_t *to) {
  *from = *to = 0;
  if (position - w->sink < w->local) return; /* no overflow: neither is negative */
  *from = w->sink;
  *to = position - w->local + 1;
}

/* Does the query see chosen pages only? Are they chosen anew for it? */
static inline bool qtr_sparse_selects(const struct qtr_kv_sparse *s, int32_t position, int32_t decode_start) {
  return s->budget > 0 && position >= decode_start && position >= s->budget;
}
static inline bool qtr_sparse_renews(const struct qtr_kv_sparse *s, int32_t position, int32_t decode_start) {
  int32_t first = decode_start > s->budget ? decode_start : s->budget;
  return position == first || (position + 1) % s->interval == 0;
}

/* The position at which the pages that this one sees were chosen. */
static inline int32_t qtr_sparse_chosen_at(const struct qtr_kv_sparse *s, int32_t position, int32_t decode_start) {
  int32_t first = decode_start > s->budget ? decode_start : s->budget;
  int32_t last = (int32_t)(((int64_t)position + 1) / s->interval * s->interval - 1);
  return last > first ? last : first;
}

/* Most pages of a choice, the query's own among them. */
static inline int32_t qtr_sparse_limit(const struct qtr_kv_sparse *s) {
  int32_t pages = s->budget / QTR_PAGE_TOKENS;
  return pages > 3 ? pages : 3;
}

/* What a head has chosen: pages below `tail`, ascending, and all from `tail` on. */
struct qtr_selection {
  int32_t n, tail;
  int32_t page[]; /* (limit - 1) */
};

static inline size_t qtr_sparse_selection_ints(const struct qtr_kv_sparse *s) { /* of one struct qtr_selection */
  return sizeof(struct qtr_selection) / sizeof(int32_t) + (size_t)qtr_sparse_limit(s) - 1;
}
/* Choices of one KV head. */
static inline int32_t qtr_sparse_choosers(const struct qtr_kv_sparse *s) { return s->each_head ? s->group : 1; }

/* score (tail): of the pages before the query's own; changed. Fills out->page with those chosen (tail > 0: the first page,
 * then the best). NaN counts as the worst. `order` is room for (tail). */
void qtr_sparse_choose(double *score, int32_t tail, int32_t limit, int32_t *order, struct qtr_selection *out);

/* ---- a cache's heads ---------------------------------------------------------------------------------- */

enum qtr_head_class { QTR_HEAD_RETRIEVAL, QTR_HEAD_STREAMING, QTR_N_HEAD_CLASSES };

/* Where each head's pages are. Made by qtr_kv_heads_create, also for a dense cache: all heads are retrieval heads then. */
struct qtr_kv_heads {
  struct qtr_kv_sparse sparse; /* streaming: NULL here, see `kind`. budget 0 when dense */
  bool any_streaming;
  int32_t n_layers, n_kv_heads;
  uint8_t *kind;  /* (n_layers, n_kv_heads) */
  int32_t *rank;  /* (n_layers, n_kv_heads) among the heads of its class in its layer (spec D.1.4) */
  int32_t *count; /* (n_layers, 2) heads of each class */
};

/* Checks config->sparse (QTR_ERR_ARGUMENT says what is wrong) and n_stream_pages. */
enum qtr_status qtr_kv_heads_create(const struct qtr_kv_config *config, struct qtr_kv_heads *heads, struct qtr_error *err);
void qtr_kv_heads_free(struct qtr_kv_heads *heads);

static inline enum qtr_head_class qtr_kv_head_class(const struct qtr_kv_heads *h, int32_t layer, int32_t head) {
  return (enum qtr_head_class)h->kind[(size_t)layer * (size_t)h->n_kv_heads + (size_t)head];
}
static inline int32_t qtr_kv_head_rank(const struct qtr_kv_heads *h, int32_t layer, int32_t head) {
  return h->rank[(size_t)layer * (size_t)h->n_kv_heads + (size_t)head];
}
static inline int32_t qtr_kv_head_count(const struct qtr_kv_heads *h, int32_t layer, enum qtr_head_class kind) {
  return h->count[2 * (size_t)layer + kind];
}

/* Is there a head that does not see everything? */
static inline bool qtr_kv_heads_sparse(const struct qtr_kv_heads *h) { return h->any_streaming || h->sparse.budget > 0; }

/* Room for the choices of all slots, layers, KV heads and choosers, in this order; SIZE_MAX on overflow. */
size_t qtr_sparse_selections_bytes(const struct qtr_kv_heads *heads);

/* fp16 values of the statistics of one retrieval head and page: max (logical pages, head_dim), then min. 0 without a budget.
 */
static inline size_t qtr_kv_stats_values(const struct qtr_kv_sparse *s, int32_t head_dim) {
  return s->budget > 0 ? (size_t)(QTR_PAGE_TOKENS / s->logical_tokens) * 2 * (size_t)head_dim : 0;
}

/* The table that holds the pages of a class. */
static inline const int32_t *qtr_batch_table(const struct qtr_batch *batch, enum qtr_head_class kind, int32_t seq) {
  const int32_t *table = kind == QTR_HEAD_STREAMING && batch->stream_table ? batch->stream_table : batch->block_table;
  return table + (size_t)seq * (size_t)batch->max_blocks;
}
static inline int32_t qtr_batch_decode_start(const struct qtr_batch *batch, int32_t seq) {
  return batch->decode_start ? batch->decode_start[seq] : QTR_ALL_TOKENS;
}

#endif
