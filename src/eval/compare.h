/* compare.h - two models over the same text: how far B's next-token distributions are from A's, and where in the network the
 * difference comes from. A is the reference (usually the float model), B what was made of it. */
#ifndef QTR_EVAL_COMPARE_H
#define QTR_EVAL_COMPARE_H

#include "quattuor/quattuor.h"

#define QTR_COMPARE_WORST 5

struct qtr_compare_options {
  size_t window;   /* tokens of a window, 2 … both engines' max_model_len */
  size_t n_tokens; /* only the first so many of the stream; 0 = all */
  bool layers;     /* compare the residual streams too */
  bool quiet;      /* no progress line */
};

/* A place of the text where the models differ most. */
struct qtr_compare_place {
  size_t index; /* in the stream, of the token that is predicted */
  double kl;
  int32_t target, best_a, best_b;
  float p_target_a, p_target_b, p_best_a, p_best_b; /* probabilities; p_best_x: x's own of its best token */
};

/* The residual stream after a layer. */
struct qtr_compare_layer {
  double error;        /* mean over tokens of |a - b| / |a|; NAN where the bases differ */
  double cosine_error; /* root mean square, over pairs of near tokens, of cos(a_i, a_j) - cos(b_i, b_j): needs no common
                          basis */
  double norm_ratio;   /* mean over tokens of |b| / |a| */
};

struct qtr_compare_result {
  size_t n_scored, n_windows;
  double perplexity_a, perplexity_b;
  double kl_mean, kl_median, kl_p90, kl_p99, kl_max; /* KL(A || B) in nats a token */
  double top1_agreement;                             /* share of tokens where both give the same token first */
  double top1_accuracy_a, top1_accuracy_b;           /* share where that is the text's */
  struct qtr_compare_place worst[QTR_COMPARE_WORST];
  size_t n_worst;
  struct qtr_compare_layer *layer; /* (n_layers + 1): [0] is the embedding, [i] after layer i - 1. NULL: not compared */
  size_t n_layers;
  bool same_basis;       /* the embeddings agree, so that differences of hidden states mean something */
  const char *no_layers; /* why layer is NULL; static */
  double seconds;
};

/* token: (n_tokens) the stream. Both engines are idle and stay so; they have the same vocabulary size. Windows do not
 * overlap, tokens 2 … window of each are scored, what is left over is dropped. Free with qtr_compare_free. */
enum qtr_status qtr_compare_run(struct qtr_engine *a, struct qtr_engine *b, const int32_t *token, size_t n_tokens,
                                const struct qtr_compare_options *options, struct qtr_compare_result *result,
                                struct qtr_error *err);
void qtr_compare_free(struct qtr_compare_result *result);

#endif
