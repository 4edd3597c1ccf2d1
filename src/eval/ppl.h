/* ppl.h - perplexity as the papers measure it: one token stream cut into windows that do not overlap, each window seen
 * alone, its tokens 2 … N scored. Spec F.11. */
#ifndef QTR_EVAL_PPL_H
#define QTR_EVAL_PPL_H

#include "quattuor/quattuor.h"

struct qtr_ppl_options {
  int32_t ctx;         /* tokens of a window, 2 … the engine's max_model_len */
  int32_t max_windows; /* stop after that many; 0 = all */
  bool quiet;          /* no progress line */
};

struct qtr_ppl_result {
  double perplexity; /* exp(mean NLL) */
  double mean_nll;   /* nats a scored token */
  size_t n_tokens;   /* of the whole stream, BOS included */
  size_t n_scored;   /* n_windows * (ctx - 1) */
  size_t n_windows;  /* floor(n_tokens / ctx): what is left over is dropped */
  double seconds;
};

/* Replaces CR LF and CR by LF in place, as the papers' tools do when they read a text file. Returns the new length. */
size_t qtr_ppl_normalize_newlines(char *text, size_t len);

/* token: (n_tokens) the stream. The engine is idle and stays so: its model, KV pool (at least ctx tokens) and precision are
 * used. QTR_ERR_LIMIT when the stream is shorter than one window. */
enum qtr_status qtr_ppl_run(struct qtr_engine *engine, const int32_t *token, size_t n_tokens,
                            const struct qtr_ppl_options *options, struct qtr_ppl_result *result, struct qtr_error *err);

#endif
