/* windows.c - a model driven directly, without the scheduler (windows.h): one sequence, its pages 0, 1, 2 … of the pool, a
 * chunk of its tokens a step, the logits of every row that has a successor. */
#include "eval/windows.h"

#include "base/checked.h"
#include "base/status.h"
#include "engine/engine_internal.h"

#include <math.h>
#include <stdlib.h>

#define CHUNK_TOKENS 512
#define MAX_CHUNK_BYTES ((size_t)128 << 20) /* of a chunk's logits and residual streams */

size_t qtr_windows_chunk(const struct qtr_engine *engine, size_t window, bool states) {
  const struct qtr_config *c = &engine->model->config;
  size_t row = (size_t)c->vocab_size; /* floats of a row */
  if (states) row += ((size_t)c->n_layers + 1) * (size_t)c->hidden_size;
  size_t chunk = QTR_MAX(MAX_CHUNK_BYTES / (row * sizeof(float)), (size_t)16);
  return QTR_MIN(QTR_MIN(chunk, (size_t)CHUNK_TOKENS), window);
}

enum qtr_status qtr_windows_check(const struct qtr_engine *engine, const int32_t *token, size_t n_tokens,
                                  struct qtr_error *err) {
  int32_t vocab = engine->model->config.vocab_size;
  for (size_t i = 0; i < n_tokens; i++) {
    if (token[i] < 0 || token[i] >= vocab) {
      return qtr_fail(err, QTR_ERR_FORMAT, "the tokenizer gives token %d, the model's vocabulary has %d", token[i], vocab);
    }
  }
  return QTR_OK;
}

enum qtr_status qtr_windows_create(struct qtr_engine *engine, size_t window, size_t chunk, bool states,
                                   struct qtr_windows *w, struct qtr_error *err) {
  const struct qtr_config *c = &engine->model->config;
  size_t n_pages = qtr_ceil_div(window, QTR_PAGE_TOKENS);
  *w = (struct qtr_windows){0};
  if (window < 2 || window > (size_t)engine->max_model_len) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "windows of %zu tokens: this model takes 2 to %d", window, engine->max_model_len);
  }
  if ((size_t)engine->n_pages < n_pages) {
    return qtr_fail(err, QTR_ERR_LIMIT, "the KV pool has %d pages; windows of %zu tokens need %zu", engine->n_pages, window,
                    n_pages);
  }
  if (engine->streams && engine->n_stream_pages < qtr_streams_most(&engine->sparse, (int32_t)chunk, (int32_t)window)) {
    return qtr_fail(
        err, QTR_ERR_LIMIT,
        "the pool of the streaming heads has %d pages; steps of %zu tokens need %d: ask for as many (--kv-stream-pages)",
        engine->n_stream_pages, chunk, qtr_streams_most(&engine->sparse, (int32_t)chunk, (int32_t)window));
  }
  *w = (struct qtr_windows){.engine = engine,
                            .window = window,
                            .chunk = chunk,
                            .vocab = (size_t)c->vocab_size,
                            .hidden = (size_t)c->hidden_size,
                            .n_layers = (size_t)c->n_layers,
                            .position = malloc(window * sizeof *w->position),
                            .page = malloc(n_pages * sizeof *w->page),
                            .stream = malloc(n_pages * sizeof *w->stream),
                            .row = malloc(chunk * sizeof *w->row),
                            .logits = malloc(chunk * (size_t)c->vocab_size * sizeof *w->logits)};
  if (!w->position || !w->page || !w->stream || !w->row || !w->logits) {
    qtr_windows_free(w);
    return qtr_fail_memory(err, "the logits of a chunk", chunk * (size_t)c->vocab_size * sizeof *w->logits);
  }
  for (size_t i = 0; i < window; i++) w->position[i] = (int32_t)i;
  for (size_t i = 0; i < n_pages; i++) w->page[i] = (int32_t)i;
  /* Streaming heads: the sink's pages, then a ring over the others. */
  int32_t sink = QTR_MAX(engine->sparse.context.sink, engine->sparse.decode.sink);
  int32_t first = (sink + QTR_PAGE_TOKENS - 1) / QTR_PAGE_TOKENS, ring = engine->n_stream_pages - first;
  for (int32_t i = 0; i < (int32_t)n_pages; i++) w->stream[i] = i < first || ring < 1 ? i : first + (i - first) % ring;
  for (size_t i = 0; i < chunk; i++) w->row[i] = (int32_t)i;
  enum qtr_status status = qtr_workspace_create(engine->model, chunk, chunk, &w->workspace, err);
  if (!status && states) status = qtr_workspace_keep_states(engine->model, w->workspace, err);
  if (status) qtr_windows_free(w);
  return status;
}

void qtr_windows_free(struct qtr_windows *w) {
  qtr_workspace_free(w->workspace);
  free(w->position);
  free(w->page);
  free(w->stream);
  free(w->row);
  free(w->logits);
  *w = (struct qtr_windows){0};
}

enum qtr_status qtr_windows_forward(struct qtr_windows *w, const int32_t *token, size_t first, size_t *n_rows,
                                    struct qtr_error *err) {
  struct qtr_model *model = w->engine->model;
  struct qtr_backend *b = model->backend;
  size_t n = QTR_MIN(w->chunk, w->window - first);
  *n_rows = QTR_MIN(n, w->window - 1 - first); /* the last token of a window predicts nothing in it */
  const int32_t q_start[2] = {0, (int32_t)n}, kv_len[1] = {(int32_t)first};
  const struct qtr_batch batch = {.n_tokens = (int32_t)n,
                                  .n_seqs = 1,
                                  .n_logit_rows = (int32_t)*n_rows,
                                  .max_blocks = (int32_t)qtr_ceil_div(w->window, QTR_PAGE_TOKENS),
                                  .token = token + first,
                                  .position = w->position + first,
                                  .q_start = q_start,
                                  .kv_len = kv_len,
                                  .block_table = w->page,
                                  .stream_table = w->engine->streams ? w->stream : NULL,
                                  .logit_row = w->row};
  const float *logits;
  enum qtr_status status = qtr_model_forward(model, w->engine->kv, w->workspace, &batch, &logits, err);
  if (!status) status = b->ops->download(b, logits, QTR_DTYPE_F32, *n_rows * w->vocab, w->logits, err);
  return status;
}

enum qtr_status qtr_windows_state(struct qtr_windows *w, size_t i, size_t n_rows, float *state, struct qtr_error *err) {
  struct qtr_backend *b = w->engine->model->backend;
  struct qtr_caps caps;
  b->ops->caps(b, &caps);
  return b->ops->download(b, qtr_workspace_state(w->workspace, i), caps.act_dtype, n_rows * w->hidden, state, err);
}

double qtr_windows_log_sum(const float *logits, size_t n) {
  float max = logits[0];
  for (size_t i = 1; i < n; i++) max = logits[i] > max ? logits[i] : max;
  double sum = 0;
  for (size_t i = 0; i < n; i++) sum += (double)expf(logits[i] - max);
  return log(sum) + (double)max;
}
