/* calibrate.h - finds the KV heads that a model needs to look far back (spec D.1; DuoAttention's question, asked without
 * training): those which, made streaming heads, take the answer of a retrieval prompt away. */
#ifndef QTR_EVAL_CALIBRATE_H
#define QTR_EVAL_CALIBRATE_H

#include "eval/haystack.h"

struct qtr_calibrate_options {
  const size_t *length; /* (n_lengths) tokens of the prompts, taken in turn; larger than sink + local */
  size_t n_lengths, n_prompts;
  int32_t sink, local; /* what a streaming head sees */
  int32_t rounds;      /* heads are given up in that many steps: 1 … the number of heads */
  uint64_t seed;
  bool quiet;
};

/* After each round: how many heads stream, and what it costs. */
struct qtr_calibrate_round {
  size_t n_streaming;
  double loss; /* nats an answer, above those of the model with no streaming head */
};

struct qtr_calibrate_result {
  double *value;                     /* (n_layers, n_kv_heads) 0: given up first … 1: needed most */
  size_t n_heads, n_prompts;         /* prompts that the model answers and that were used */
  double dense_loss;                 /* nats an answer: -log p of the model's own answer */
  struct qtr_calibrate_round *round; /* (n_rounds) */
  size_t n_rounds, n_runs;           /* n_runs: prompts read */
  double seconds;
};

/* The engine is idle and dense, and stays so: its model and KV format are used, its pages are not. Deterministic by the
 * seed. QTR_ERR_UNSUPPORTED when the model answers none of the prompts. Free with qtr_calibrate_free. */
enum qtr_status qtr_calibrate_heads(struct qtr_engine *engine, const struct qtr_haystack *haystack,
                                    const struct qtr_calibrate_options *options, struct qtr_calibrate_result *result,
                                    struct qtr_error *err);
void qtr_calibrate_free(struct qtr_calibrate_result *result);

/* The table of heads as DuoAttention writes it; *text is malloc'ed. */
enum qtr_status qtr_calibrate_table(const struct qtr_calibrate_result *result, size_t n_layers, char **text,
                                    struct qtr_error *err);

#endif
