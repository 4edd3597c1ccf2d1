/* attention.c - attention of the reference backend over the paged cache (spec C.5 without its fp16 roundings): causal, GQA,
 * ragged. K and V are read back from the pages, also those of the running step (backend.h), one KV head of one sequence at a
 * time; scores, softmax and the weighted sum are double. */
#include <math.h>
#include <string.h>

#include "backend/reference/reference.h"

/* One query over its n tokens of keys and values: k, v (n, dim); score: room for n; sum: room for dim; out (dim). */
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

void qtr_reference_attention(struct qtr_backend *b, const struct qtr_attention_args *args) {
  const struct qtr_reference *r = (const struct qtr_reference *)b;
  const struct qtr_batch *batch = r->batch;
  size_t dim = (size_t)args->head_dim, width = (size_t)(args->n_heads + 2 * args->n_kv_heads) * dim;
  int32_t group = args->n_heads / args->n_kv_heads;
  for (int32_t s = 0; s < batch->n_seqs; s++) {
    const int32_t *pages = batch->block_table + (size_t)s * (size_t)batch->max_blocks;
    int32_t n_q = batch->q_start[s + 1] - batch->q_start[s], n_kv = batch->kv_len[s] + n_q;
    for (int32_t kv_head = 0; kv_head < args->n_kv_heads; kv_head++) {
      for (int32_t t = 0; t < n_kv; t++) {
        int32_t page = pages[t / QTR_PAGE_TOKENS], slot = t % QTR_PAGE_TOKENS;
        qtr_reference_kv_row(args->kv, args->layer, false, page, slot, kv_head, r->k + (size_t)t * dim);
        qtr_reference_kv_row(args->kv, args->layer, true, page, slot, kv_head, r->v + (size_t)t * dim);
      }
      for (int32_t i = 0; i < n_q; i++) {
        size_t token = (size_t)(batch->q_start[s] + i), n = (size_t)(batch->kv_len[s] + i) + 1;
        for (int32_t h = kv_head * group; h < (kv_head + 1) * group; h++) {
          const float *q = (const float *)args->qkv + token * width + (size_t)h * dim;
          float *out = (float *)args->out + (token * (size_t)args->n_heads + (size_t)h) * dim;
          attend(q, r->k, r->v, n, dim, (double)args->scale, r->score, r->sum, out);
        }
      }
    }
  }
}
