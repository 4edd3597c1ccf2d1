/* attention_count.c - counts what a step's attention reads and computes (attention_count.h). */
#include "model/attention_count.h"

#include "base/checked.h"

/* Retrieval heads. Dense queries read every key before them, together once; those that choose read what they have chosen. */
static void count_retrieval(struct qtr_attention_count *c, int32_t cached, int32_t n, int32_t decode_start) {
  const struct qtr_kv_sparse none = {0}, *s = c->heads ? &c->heads->sparse : &none;
  double dense = 0, chosen = 0, choosers = s->each_head ? c->group : 1;
  for (int32_t p = cached; p < cached + n; p++) {
    if (!qtr_sparse_selects(s, p, decode_start)) {
      dense = p + 1;
      c->pairs[QTR_HEAD_RETRIEVAL] += p + 1;
      continue;
    }
    int32_t tail = qtr_sparse_chosen_at(s, p, decode_start) / QTR_PAGE_TOKENS, most = qtr_sparse_limit(s) - 1;
    double seen = (double)QTR_MIN(tail, most) * QTR_PAGE_TOKENS + (p + 1 - tail * QTR_PAGE_TOKENS);
    c->pairs[QTR_HEAD_RETRIEVAL] += seen;
    chosen += QTR_MIN(choosers * seen, p + 1.0);
    if (qtr_sparse_renews(s, p, decode_start) && tail > most) /* else all of them, and no score decides */
      c->n_logical += (double)(tail - 1) * (QTR_PAGE_TOKENS / s->logical_tokens);
  }
  c->keys[QTR_HEAD_RETRIEVAL] += QTR_MIN(dense + chosen, (double)cached + n);
}

/* Streaming heads: what lies in the hole of every query is not read. */
static void count_streaming(struct qtr_attention_count *c, int32_t cached, int32_t n, int32_t decode_start) {
  const struct qtr_kv_sparse *s = &c->heads->sparse;
  int32_t from = 0, to = INT32_MAX;
  for (int32_t p = cached; p < cached + n; p++) {
    int32_t a, b;
    qtr_window_hole(p >= decode_start ? &s->decode : &s->context, p, &a, &b);
    from = QTR_MAX(from, a);
    to = QTR_MIN(to, b);
    c->pairs[QTR_HEAD_STREAMING] += p + 1 - (b - a);
  }
  c->keys[QTR_HEAD_STREAMING] += (double)cached + n - QTR_MAX(to - from, 0);
}

void qtr_attention_count(const struct qtr_batch *batch, const struct qtr_kv_config *config, int32_t n_heads,
                         const struct qtr_kv_heads *heads, struct qtr_attention_count *count) {
  const struct qtr_kv_config one = {.format = config->format, .n_layers = 1, .n_kv_heads = 1, .head_dim = config->head_dim};
  *count = (struct qtr_attention_count){.heads = heads,
                                        .row_bytes = (double)qtr_kv_page_bytes(&one) / QTR_PAGE_TOKENS,
                                        .head_dim = config->head_dim,
                                        .group = n_heads / config->n_kv_heads,
                                        .n_kv_heads = config->n_kv_heads};
  for (int32_t i = 0; i < batch->n_seqs; i++) {
    int32_t cached = batch->kv_len[i], n = batch->q_start[i + 1] - batch->q_start[i];
    int32_t decode_start = qtr_batch_decode_start(batch, i);
    count_retrieval(count, cached, n, decode_start);
    if (heads && heads->any_streaming) count_streaming(count, cached, n, decode_start);
  }
}

void qtr_attention_need(const struct qtr_attention_count *c, int32_t layer, double *bytes, double *ops) {
  double keys = 0, pairs = 0, statistics = 0;
  for (int class = 0; class < QTR_N_HEAD_CLASSES; class ++) {
    double n = c->heads                      ? qtr_kv_head_count(c->heads, layer, (enum qtr_head_class) class)
               : class == QTR_HEAD_RETRIEVAL ? c->n_kv_heads
                                             : 0;
    keys += n * c->keys[class];
    pairs += n * c->group * c->pairs[class];
    if (class == QTR_HEAD_RETRIEVAL) statistics = n * c->n_logical * c->head_dim; /* values of the maxima; as many minima */
  }
  *bytes = keys * c->row_bytes + statistics * 2 * sizeof(uint16_t);
  *ops = 4 * pairs * c->head_dim + 4 * c->group * statistics; /* two products, the larger, a sum */
}
