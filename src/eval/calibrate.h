/* calibrate.h - finds the KV heads that a model needs to look far back (spec D.1; DuoAttention's question, asked without
 * training): those which, made streaming heads, make it say something else. It is asked in two ways, in one pass over
 * prompts that hide a needle in ordinary text: for the needle, and for the text itself where it lies beyond a streaming
 * head's window. With p the dense model's distribution of the next token, q that with a set of streaming heads, and t the
 * token that comes, the set costs
 *
 *     mean over prompts of  sum over the answer's tokens of  KL(p || q)
 *   + mean over the text's tokens of  (KL(p || q) + log p(t) - log q(t)) / 2
 *
 * in nats an answer and nats a token. A nat takes the answer what it takes every token of the text, so they are added as
 * they are, and what a head matters to decides. Of the text, the divergence sees every change with little noise, but the
 * better ones too; the loss tells better from worse, but for a few thousand tokens its noise is as large as a head's share.
 * An answer of which the model is sure has no better. */
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

/* What a set of streaming heads costs. */
struct qtr_calibrate_cost {
  double answer; /* nats an answer, of each at most 20: lost is lost, one prompt shall not outweigh the others */
  double text;   /* nats a token; below 0: the model reads better so */
};

/* After each round: how many heads stream, and their cost. */
struct qtr_calibrate_round {
  size_t n_streaming;
  struct qtr_calibrate_cost cost;
};

struct qtr_calibrate_result {
  double *value;                     /* (n_layers, n_kv_heads) 0: given up first … 1: needed most */
  size_t n_heads, n_prompts;         /* prompts that the model answers and that were used */
  size_t n_text;                     /* tokens of the text at which distributions were compared */
  struct qtr_calibrate_round *round; /* (n_rounds) */
  size_t n_rounds, n_runs;           /* n_runs: prompts read */
  double seconds;
};

/* haystack: ordinary text, of which prompt i of P takes a piece of half its length from i/P on, twice: what stands once
 * seldom says what its far past is good for, a repetition asks for it, as books do by their names. NULL: the model writes
 * the text itself, at temperature 1. The engine is idle and dense, and stays so: its model and KV format are used, its pages
 * to write and to answer only. Deterministic by the seed. QTR_ERR_UNSUPPORTED when the model answers none of the prompts.
 * Free with qtr_calibrate_free. */
enum qtr_status qtr_calibrate_heads(struct qtr_engine *engine, const struct qtr_haystack *haystack,
                                    const struct qtr_calibrate_options *options, struct qtr_calibrate_result *result,
                                    struct qtr_error *err);
void qtr_calibrate_free(struct qtr_calibrate_result *result);

/* The table of heads as DuoAttention writes it; *text is malloc'ed. */
enum qtr_status qtr_calibrate_table(const struct qtr_calibrate_result *result, size_t n_layers, char **text,
                                    struct qtr_error *err);

#endif
