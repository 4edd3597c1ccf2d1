/* streams.c - which pages of the streaming heads a sequence holds (spec D.3, docs/long-context.md): those of its first
 * tokens (the sink), of the last ones (the window of the next query), and of the tokens of the running step. The table has
 * an entry for every 64 tokens of the sequence, -1 where the page was let go; the pages themselves go round through the
 * pool. So the ring of the reference needs no arithmetic in kernels, chunks may be longer than the window, and pages can be
 * shared. */
#include "base/checked.h"
#include "engine/engine_internal.h"

static int32_t sink_pages(const struct qtr_kv_sparse *s) {
  return (QTR_MAX(s->context.sink, s->decode.sink) + QTR_PAGE_TOKENS - 1) / QTR_PAGE_TOKENS;
}

/* The first page after the sink's that the query at `position`, or a later one, may see. */
static int32_t window_begin(const struct qtr_engine *e, const struct qtr_sequence *s, int32_t position) {
  const struct qtr_kv_sparse *sparse = &e->sparse;
  int32_t local = sparse->decode.local;
  if (position < s->request->n_prompt) local = QTR_MAX(local, sparse->context.local);
  return local > position ? 0 : (position - local + 1) / QTR_PAGE_TOKENS;
}

int32_t qtr_streams_most(const struct qtr_kv_sparse *s, int32_t n_tokens, int32_t max_model_len) {
  int64_t window = QTR_MAX(s->context.local, s->decode.local), whole = ((int64_t)max_model_len - 1) / QTR_PAGE_TOKENS + 1;
  int64_t most = sink_pages(s) + (window + n_tokens - 2) / QTR_PAGE_TOKENS + 2;
  return (int32_t)QTR_MIN(most, whole);
}

void qtr_streams_match(struct qtr_engine *e, struct qtr_sequence *s) {
  if (!e->streams) return;
  int32_t sink = sink_pages(&e->sparse), best = 0, run = 0; /* run: pages with companions that end before page k */
  for (int32_t k = 1; k <= s->n_pages; k++) {
    bool has = qtr_kv_pool_companion(e->pool, s->page[k - 1]) >= 0;
    if (!has && k <= sink) break;
    run = has ? run + 1 : 0;
    int32_t begin = window_begin(e, s, k * QTR_PAGE_TOKENS);
    if (k - run <= begin) best = k;
  }
  while (s->n_pages > best) qtr_kv_pool_unref(e->pool, s->page[--s->n_pages]);
  int32_t begin = window_begin(e, s, best * QTR_PAGE_TOKENS);
  for (int32_t i = 0; i < best; i++) {
    if (i >= sink && i < begin) continue;
    s->stream[i] = qtr_kv_pool_companion(e->pool, s->page[i]);
    qtr_kv_pool_stream_ref(e->pool, s->stream[i]);
  }
}

int32_t qtr_streams_missing(const struct qtr_engine *e, const struct qtr_sequence *s, int32_t n) {
  int32_t missing = 0, last = (s->n_computed + n - 1) / QTR_PAGE_TOKENS;
  for (int32_t i = s->n_computed / QTR_PAGE_TOKENS; e->streams && i <= last; i++) missing += s->stream[i] < 0;
  return missing;
}

int32_t qtr_streams_take(struct qtr_engine *e, struct qtr_sequence *s, int32_t n) {
  if (!e->streams) return n;
  int32_t last = (s->n_computed + n - 1) / QTR_PAGE_TOKENS;
  for (int32_t i = s->n_computed / QTR_PAGE_TOKENS; i <= last; i++) {
    if (s->stream[i] < 0) s->stream[i] = qtr_kv_pool_stream_take(e->pool);
    if (s->stream[i] < 0) return QTR_MAX(i * QTR_PAGE_TOKENS - s->n_computed, 0);
  }
  return n;
}

void qtr_streams_publish(struct qtr_engine *e, struct qtr_sequence *s, int32_t i) {
  if (!e->streams || s->stream[i] < 0) return;
  int32_t known = qtr_kv_pool_attach(e->pool, s->page[i], s->stream[i]);
  if (known == s->stream[i]) return;
  qtr_kv_pool_stream_ref(e->pool, known);
  qtr_kv_pool_stream_unref(e->pool, s->stream[i]);
  s->stream[i] = known;
}

static void drop(struct qtr_engine *e, struct qtr_sequence *s, int32_t i) {
  if (s->stream[i] < 0) return;
  qtr_kv_pool_stream_unref(e->pool, s->stream[i]);
  s->stream[i] = -1;
}

void qtr_streams_let_go(struct qtr_engine *e, struct qtr_sequence *s) {
  if (!e->streams) return;
  int32_t sink = sink_pages(&e->sparse), i = window_begin(e, s, s->n_computed) - 1;
  for (; i >= sink && s->stream[i] >= 0; i--) drop(e, s, i); /* those before went in earlier steps */
}

void qtr_streams_release(struct qtr_engine *e, struct qtr_sequence *s) {
  for (int32_t i = s->n_pages - 1; e->streams && i >= 0; i--) drop(e, s, i);
}
