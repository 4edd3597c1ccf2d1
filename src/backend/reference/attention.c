/* attention.c - attention of the reference backend over the paged cache (spec C.5 without its fp16 roundings): causal, GQA,
 * ragged; streaming heads and chosen pages as backend.h defines them (struct qtr_kv_sparse, spec D). K and V are read back
 * from the pages, also those of the running step; scores, softmax and the weighted sum are double. */
#include <math.h>
#include <string.h>

#include "backend/reference/reference.h"

/* One query over n tokens of keys and values: k, v (n, dim); score: room for n; sum: room for dim; out (dim). */
static void attend(const float *q, const float *k, const float *v, size_t n, size_t dim, double scale, double *score,
                   double *sum, float *out) {
  double max = -INFINITY, total = 0;
  for (size_t t = 0; t < n; t++) {
    double dot = 0;
    for (size_t i = 0; i < dim; i++) dot += (double)q[i] * (double)k[t * dim + i];
    score[t] = dot * scale;
    max = fmax(max, score[t]);
  }
  for (size_t t = 0; t < n; t++) total += score[t] = exp(score[t] - max);
  memset(sum, 0, dim * sizeof *sum);
  for (size_t t = 0; t < n; t++) {
    for (size_t i = 0; i < dim; i++) sum[i] += score[t] * (double)v[t * dim + i];
  }
  for (size_t i = 0; i < dim; i++) out[i] = (float)(sum[i] / total);
}

/* One KV head of one sequence. */
struct task {
  struct qtr_reference *r;
  const struct qtr_attention_args *args;
  const int32_t *pages;
  int32_t seq, kv_head, decode_start;
  size_t n_gathered; /* tokens in r->k and r->v */
};

static const float *query(const struct task *t, int32_t token, int32_t head) {
  size_t dim = (size_t)t->args->head_dim, width = (size_t)(t->args->n_heads + 2 * t->args->n_kv_heads) * dim;
  return (const float *)t->args->qkv + (size_t)token * width + (size_t)head * dim;
}

static void gather_start(struct task *t) { t->n_gathered = 0; }
static void gather(struct task *t, int32_t from, int32_t to) { /* keys and values of positions [from, to) */
  size_t dim = (size_t)t->args->head_dim;
  for (int32_t i = from; i < to; i++, t->n_gathered++) {
    int32_t page = t->pages[i / QTR_PAGE_TOKENS], slot = i % QTR_PAGE_TOKENS;
    float *k = t->r->k + t->n_gathered * dim, *v = t->r->v + t->n_gathered * dim;
    qtr_reference_kv_row(t->args->kv, t->args->layer, false, page, slot, t->kv_head, k);
    qtr_reference_kv_row(t->args->kv, t->args->layer, true, page, slot, t->kv_head, v);
  }
}

static void attend_gathered(const struct task *t, int32_t token, int32_t head) {
  size_t dim = (size_t)t->args->head_dim;
  float *out = (float *)t->args->out + ((size_t)token * (size_t)t->args->n_heads + (size_t)head) * dim;
  attend(query(t, token, head), t->r->k, t->r->v, t->n_gathered, dim, (double)t->args->scale, t->r->score, t->r->sum, out);
}

/* ---- chosen pages ------------------------------------------------------------------------------------- */

static struct qtr_selection *selection_find(const struct qtr_kv *kv, int32_t layer, int32_t kv_head, int32_t member,
                                            int32_t slot) {
  size_t at = ((size_t)slot * (size_t)kv->config.n_layers + (size_t)layer) * (size_t)kv->config.n_kv_heads + (size_t)kv_head;
  const struct qtr_kv_sparse *s = &kv->heads.sparse;
  at = at * (size_t)qtr_sparse_choosers(s) + (size_t)(s->each_head ? member : 0);
  return (struct qtr_selection *)(void *)(kv->selection + at * qtr_sparse_selection_ints(s));
}

void qtr_reference_selection_read(struct qtr_backend *b, const struct qtr_kv *kv, int32_t layer, int32_t q_head,
                                  int32_t slot, int32_t *page, int32_t *n, int32_t *tail) {
  (void)b;
  int32_t group = kv->heads.sparse.group;
  const struct qtr_selection *s = selection_find(kv, layer, q_head / group, q_head % group, slot);
  *n = s->n;
  *tail = s->tail;
  memcpy(page, s->page, (size_t)s->n * sizeof *page);
}

/* The bound of spec D.5 on q·k over a page, without 1/sqrt(dim). */
static double page_score(const struct task *t, const float *q, int32_t page) {
  const struct qtr_kv *kv = t->args->kv;
  float *max = t->r->k, *min = t->r->v; /* nothing is gathered yet */
  double best = -INFINITY;
  for (int32_t s = 0; s < QTR_PAGE_TOKENS / kv->heads.sparse.logical_tokens; s++) {
    qtr_reference_stats_read(&t->r->base, kv, t->args->layer, t->pages[page], s, t->kv_head, max, min);
    double sum = 0;
    for (size_t i = 0; i < (size_t)t->args->head_dim; i++) {
      double a = (double)q[i] * (double)max[i], b = (double)q[i] * (double)min[i];
      sum += a > b ? a : b;
    }
    if (sum > best) best = sum;
  }
  return best;
}

/* Heads [first, last) of the token choose together from the pages before the query's own. */
static void choose(const struct task *t, int32_t token, int32_t position, int32_t first, int32_t last,
                   struct qtr_selection *out) {
  const struct qtr_kv *kv = t->args->kv;
  int32_t tail = position / QTR_PAGE_TOKENS;
  for (int32_t page = 0; page < tail; page++) {
    double best = -INFINITY;
    for (int32_t h = first; h < last; h++) best = fmax(best, page_score(t, query(t, token, h), page));
    kv->page_score[page] = best;
  }
  qtr_sparse_choose(kv->page_score, tail, qtr_sparse_limit(&kv->heads.sparse), kv->page_order, out);
}

static void attend_selected(struct task *t, int32_t token, int32_t position, int32_t group) {
  const struct qtr_kv *kv = t->args->kv;
  const struct qtr_kv_sparse *sparse = &kv->heads.sparse;
  int32_t step = sparse->each_head ? 1 : group;
  for (int32_t g = 0; g < group; g += step) {
    int32_t first = t->kv_head * group + g;
    struct qtr_selection *s = selection_find(kv, t->args->layer, t->kv_head, g, t->r->batch->slot[t->seq]);
    if (qtr_sparse_renews(sparse, position, t->decode_start)) choose(t, token, position, first, first + step, s);
    gather_start(t);
    for (int32_t i = 0; i < s->n; i++) gather(t, s->page[i] * QTR_PAGE_TOKENS, (s->page[i] + 1) * QTR_PAGE_TOKENS);
    gather(t, s->tail * QTR_PAGE_TOKENS, position + 1);
    for (int32_t h = first; h < first + step; h++) attend_gathered(t, token, h);
  }
}

/* ---- the operation ------------------------------------------------------------------------------------ */

static void attend_head(struct task *t) {
  const struct qtr_attention_args *args = t->args;
  const struct qtr_batch *batch = t->r->batch;
  const struct qtr_kv_sparse *sparse = &args->kv->heads.sparse;
  int32_t group = args->n_heads / args->n_kv_heads, first = batch->q_start[t->seq];
  bool streaming = qtr_kv_head_class(&args->kv->heads, args->layer, t->kv_head) == QTR_HEAD_STREAMING;
  gather_start(t);
  for (int32_t token = first; token < batch->q_start[t->seq + 1]; token++) {
    int32_t position = batch->kv_len[t->seq] + token - first;
    if (!streaming && qtr_sparse_selects(sparse, position, t->decode_start)) {
      attend_selected(t, token, position, group);
      continue;
    }
    if (streaming) {
      int32_t from, to;
      qtr_window_hole(position >= t->decode_start ? &sparse->decode : &sparse->context, position, &from, &to);
      gather_start(t);
      gather(t, 0, from);
      gather(t, to, position + 1);
    } else {
      gather(t, (int32_t)t->n_gathered, position + 1); /* one key more than the query before */
    }
    for (int32_t h = t->kv_head * group; h < (t->kv_head + 1) * group; h++) attend_gathered(t, token, h);
  }
}

void qtr_reference_attention(struct qtr_backend *b, const struct qtr_attention_args *args) {
  struct qtr_reference *r = (struct qtr_reference *)b;
  for (int32_t s = 0; s < r->batch->n_seqs; s++) {
    for (int32_t h = 0; h < args->n_kv_heads; h++) {
      struct task t = {.r = r,
                       .args = args,
                       .pages = qtr_batch_table(r->batch, qtr_kv_head_class(&args->kv->heads, args->layer, h), s),
                       .seq = s,
                       .kv_head = h,
                       .decode_start = qtr_batch_decode_start(r->batch, s)};
      attend_head(&t);
    }
  }
}
