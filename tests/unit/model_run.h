/* model_run.h - what the tests of a model share: one sequence through its forward pass. */
#ifndef QTR_TESTS_MODEL_RUN_H
#define QTR_TESTS_MODEL_RUN_H

#include "model/model.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static inline void must(enum qtr_status status, const struct qtr_error *err) {
  if (status) fail_msg("%s: %s", qtr_status_name(status), err->message);
}

/* Logits of the last n_rows of token[n], computed in prefill chunks of `chunk` tokens: (n_rows, vocab), malloc'ed. */
static inline float *run(struct qtr_model *model, const int32_t *token, int32_t n, int32_t n_rows, int32_t chunk) {
  struct qtr_error err;
  int32_t n_pages = (n + QTR_PAGE_TOKENS - 1) / QTR_PAGE_TOKENS;
  const struct qtr_kv_config config = {.format = QTR_KV_F16,
                                       .n_layers = model->config.n_layers,
                                       .n_kv_heads = model->config.n_kv_heads,
                                       .head_dim = model->config.head_dim,
                                       .n_pages = n_pages};
  struct qtr_backend *b = model->backend;
  struct qtr_kv *kv;
  struct qtr_workspace *workspace;
  must(b->ops->kv_create(b, &config, &kv, &err), &err);
  must(qtr_workspace_create(model, (size_t)chunk, (size_t)chunk, &workspace, &err), &err);
  size_t vocab = (size_t)model->config.vocab_size;
  float *out = calloc((size_t)n_rows, vocab * sizeof *out);
  int32_t *table = malloc((size_t)n_pages * sizeof *table), *position = malloc((size_t)n * sizeof *position);
  int32_t *row = malloc((size_t)n * sizeof *row);
  assert_true(out && table && position && row);
  for (int32_t i = 0; i < n_pages; i++) table[i] = n_pages - 1 - i; /* any order will do */
  for (int32_t i = 0; i < n; i++) position[i] = i;
  for (int32_t at = 0; at < n; at += chunk) {
    int32_t m = n - at < chunk ? n - at : chunk, q_start[2] = {0, m}, n_out = 0, first = -1;
    for (int32_t i = 0; i < m; i++) {
      if (at + i < n - n_rows) continue;
      if (first < 0) first = at + i;
      row[n_out++] = i;
    }
    const struct qtr_batch batch = {.n_tokens = m,
                                    .n_seqs = 1,
                                    .n_logit_rows = n_out,
                                    .max_blocks = n_pages,
                                    .token = token + at,
                                    .position = position + at,
                                    .q_start = q_start,
                                    .kv_len = &at,
                                    .block_table = table,
                                    .logit_row = row};
    const float *logits;
    must(qtr_model_forward(model, kv, workspace, &batch, &logits, &err), &err);
    if (n_out > 0) {
      must(b->ops->download(b, logits, QTR_DTYPE_F32, (size_t)n_out * vocab, out + (size_t)(first - (n - n_rows)) * vocab,
                            &err),
           &err);
    }
  }
  free(table);
  free(position);
  free(row);
  qtr_workspace_free(workspace);
  b->ops->kv_free(b, kv);
  return out;
}

#endif
