/* sparse.c - the choice of pages from their scores, and the classes of a cache's heads (sparse.h). */
#include "backend/common/sparse.h"

#include "base/checked.h"
#include "base/status.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- the best pages ---------------------------------------------------------------------------------- */

/* Page a comes before page b: a larger score, or the same and earlier. A total order: scores are no NaN here. */
static bool before(const double *score, int32_t a, int32_t b) { return score[a] != score[b] ? score[a] > score[b] : a < b; }

/* Moves the first k pages of the order to the front of order[0 … n), each part in any order (Hoare's selection). */
static void select_first(const double *score, int32_t *order, int32_t n, int32_t k) {
  int32_t low = 0, high = n - 1;
  while (low < high) {
    int32_t pivot = order[low + (high - low) / 2], i = low, j = high;
    while (i <= j) {
      while (before(score, order[i], pivot)) i++;
      while (before(score, pivot, order[j])) j--;
      if (i > j) break;
      int32_t t = order[i];
      order[i++] = order[j];
      order[j--] = t;
    }
    if (k <= j) {
      high = j;
    } else if (k >= i) {
      low = i;
    } else {
      return;
    }
  }
}

static int ascending(const void *a, const void *b) {
  int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
  return x < y ? -1 : x > y;
}

void qtr_sparse_choose(double *score, int32_t tail, int32_t limit, int32_t *order, struct qtr_selection *out) {
  out->tail = tail;
  out->n = QTR_MIN(tail, limit - 1);
  if (out->n <= 0) return;
  int32_t n = tail - 1, k = out->n - 1; /* the first page is not up for choice */
  out->page[0] = 0;
  for (int32_t i = 0; i < n; i++) {
    order[i] = i + 1;
    if (isnan(score[i + 1])) score[i + 1] = -INFINITY;
  }
  if (k < n) select_first(score, order, n, k);
  if (k == 0) return;
  memcpy(out->page + 1, order, (size_t)k * sizeof *order);
  qsort(out->page + 1, (size_t)k, sizeof *out->page, ascending);
}

/* ---- classes ------------------------------------------------------------------------------------------ */

static enum qtr_status check(const struct qtr_kv_config *config, struct qtr_error *err) {
  const struct qtr_kv_sparse *s = config->sparse;
  const struct qtr_kv_window *windows[] = {&s->context, &s->decode};
  for (size_t i = 0; i < 2 && s->streaming; i++) {
    if (windows[i]->sink < 0 || windows[i]->local < 1) {
      return qtr_fail(err, QTR_ERR_ARGUMENT, "streaming heads with %d sink and %d local tokens: at least 0 and 1",
                      windows[i]->sink, windows[i]->local);
    }
  }
  if (s->budget == 0) return QTR_OK;
  if (s->budget < 0 || s->budget % QTR_PAGE_TOKENS || s->interval < 1 || s->group < 1 || s->n_slots < 1 ||
      s->max_pages < 1 || (s->logical_tokens != 16 && s->logical_tokens != 32 && s->logical_tokens != 64)) {
    return qtr_fail(err, QTR_ERR_ARGUMENT,
                    "page selection with a budget of %d tokens, interval %d, logical pages of %d tokens, %d heads a group, "
                    "%d slots, %d pages: the budget "
                    "must be a multiple of %d, logical pages 16, 32 or 64 tokens, the others positive",
                    s->budget, s->interval, s->logical_tokens, s->group, s->n_slots, s->max_pages, QTR_PAGE_TOKENS);
  }
  return QTR_OK;
}

enum qtr_status qtr_kv_heads_create(const struct qtr_kv_config *config, struct qtr_kv_heads *heads, struct qtr_error *err) {
  size_t layers = (size_t)config->n_layers, n_heads = (size_t)config->n_kv_heads, n = layers * n_heads;
  *heads = (struct qtr_kv_heads){.n_layers = config->n_layers, .n_kv_heads = config->n_kv_heads};
  if (config->sparse) {
    enum qtr_status status = check(config, err);
    if (status) return status;
    heads->sparse = *config->sparse;
    heads->sparse.streaming = NULL;
  }
  heads->kind = calloc(n, 1);
  heads->rank = calloc(n, sizeof *heads->rank);
  heads->count = calloc(2 * layers, sizeof *heads->count);
  if (!heads->kind || !heads->rank || !heads->count) {
    qtr_kv_heads_free(heads);
    return qtr_fail_memory(err, "the classes of attention heads", n);
  }
  for (size_t i = 0; i < n; i++) {
    heads->kind[i] = config->sparse && config->sparse->streaming && config->sparse->streaming[i];
    heads->rank[i] = heads->count[2 * (i / n_heads) + heads->kind[i]]++;
    heads->any_streaming |= heads->kind[i] == QTR_HEAD_STREAMING;
  }
  if (heads->any_streaming != (config->n_stream_pages > 0)) {
    enum qtr_status status = qtr_fail(err, QTR_ERR_ARGUMENT, "a cache %s streaming heads and %d pages for them",
                                      heads->any_streaming ? "with" : "without", config->n_stream_pages);
    qtr_kv_heads_free(heads);
    return status;
  }
  return QTR_OK;
}

void qtr_kv_heads_free(struct qtr_kv_heads *heads) {
  free(heads->kind);
  free(heads->rank);
  free(heads->count);
  *heads = (struct qtr_kv_heads){0};
}

size_t qtr_kv_selection_bytes(const struct qtr_kv_config *config) {
  if (!config->sparse || config->sparse->budget == 0) return 0;
  const struct qtr_kv_heads heads = {
      .sparse = *config->sparse, .n_layers = config->n_layers, .n_kv_heads = config->n_kv_heads};
  return qtr_sparse_selections_bytes(&heads);
}

size_t qtr_sparse_selections_bytes(const struct qtr_kv_heads *h) {
  const struct qtr_kv_sparse *s = &h->sparse;
  size_t n = qtr_sparse_selection_ints(s) * sizeof(int32_t);
  const int32_t by[] = {s->n_slots, h->n_layers, h->n_kv_heads, qtr_sparse_choosers(s)};
  for (size_t i = 0; i < sizeof by / sizeof by[0]; i++) {
    if (qtr_mul_overflow(n, (size_t)by[i], &n)) return SIZE_MAX;
  }
  return n;
}
