/* windows.h - drives a model over windows of a token stream, chunk by chunk, all logits to the host: what perplexity and
 * comparison of models share. K and V go through the engine's pages in its KV format, so figures include what the cache
 * costs. */
#ifndef QTR_EVAL_WINDOWS_H
#define QTR_EVAL_WINDOWS_H

#include "quattuor/quattuor.h"

struct qtr_workspace;

struct qtr_windows {
  struct qtr_engine *engine; /* borrowed; idle, and stays so */
  struct qtr_workspace *workspace;
  size_t window;        /* tokens of a window */
  size_t chunk;         /* tokens of one step */
  size_t vocab, hidden; /* of the model */
  size_t n_layers;
  int32_t *position, *page; /* (window), (pages of window) */
  int32_t *stream;          /* (pages of window) of streaming heads, where there are any */
  int32_t *row;             /* (chunk) */
  float *logits;            /* (chunk, vocab) host: of the last chunk */
};

/* states: keep the residual stream too (qtr_windows_state). chunk: the same for models that are compared; see
 * qtr_windows_chunk. QTR_ERR_ARGUMENT or QTR_ERR_LIMIT when the engine has no room for such a window. */
enum qtr_status qtr_windows_create(struct qtr_engine *engine, size_t window, size_t chunk, bool states,
                                   struct qtr_windows *w, struct qtr_error *err);
void qtr_windows_free(struct qtr_windows *w);

/* Tokens of a step so that the logits of a chunk (and with `states` its residual streams) stay within some 128 MiB. */
size_t qtr_windows_chunk(const struct qtr_engine *engine, size_t window, bool states);

/* Tokens of the stream are ids of this model; the message says where not. */
enum qtr_status qtr_windows_check(const struct qtr_engine *engine, const int32_t *token, size_t n_tokens,
                                  struct qtr_error *err);

/* Runs the chunk of the window token[0 … window) that begins at `first`; chunks come in order. *n_rows tokens of it have a
 * successor in the window: w->logits holds a row for each. */
enum qtr_status qtr_windows_forward(struct qtr_windows *w, const int32_t *token, size_t first, size_t *n_rows,
                                    struct qtr_error *err);

/* The residual stream of those rows: state 0 is the embedding, state i what layer i - 1 leaves. state: (n_rows, hidden). */
enum qtr_status qtr_windows_state(struct qtr_windows *w, size_t i, size_t n_rows, float *state, struct qtr_error *err);

/* log softmax(logits) = logit - the result. logits: (n) */
double qtr_windows_log_sum(const float *logits, size_t n);

#endif
