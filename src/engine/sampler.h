/* sampler.h - from logits to a token: the filters of struct qtr_sampling in their documented order, and the random stream.
 * Deterministic: the same logits, history, seed and position give the same token on every machine. */
#ifndef QTR_ENGINE_SAMPLER_H
#define QTR_ENGINE_SAMPLER_H

#include "quattuor/quattuor.h"

/* Checks every field's range; the message names the field, the value and the range. */
enum qtr_status qtr_sampling_check(const struct qtr_sampling *sampling, struct qtr_error *err);

/* Does any penalty act? */
bool qtr_sampling_has_penalties(const struct qtr_sampling *sampling);

struct qtr_sampler; /* scratch for one row, (vocab_size) */
enum qtr_status qtr_sampler_create(int32_t vocab_size, struct qtr_sampler **sampler, struct qtr_error *err);
void qtr_sampler_free(struct qtr_sampler *sampler);

struct qtr_sample_args {
  const float *logits; /* (vocab_size); not changed. NaN counts as -inf; if nothing finite is left token 0 is not invented:
                          see result */
  const struct qtr_sampling *sampling;
  const int32_t *prompt; /* (n_prompt) */
  size_t n_prompt;
  const int32_t *output; /* (n_output) */
  size_t n_output;
  const struct qtr_logit_bias *bias; /* (n_bias) */
  size_t n_bias;
  const uint32_t *allowed; /* NULL, or a bit set of (vocab_size) tokens that may be chosen (constrained decoding) */
  uint64_t seed;           /* of this completion */
  uint64_t position;       /* n-th draw of this completion: the stream is counter-based, nothing is carried between calls */
  int32_t n_top;           /* -1 = no log-probabilities; 0 … 20 */
};

struct qtr_sample_result {
  int32_t token; /* -1 when no finite logit is left */
  float logprob; /* log-softmax of the untouched logits at token */
  int32_t n_top;
  struct qtr_token_logprob top[20];
};

/* What bias and penalties change, for a device that samples: each token once, into adjust (at most `most`). Returns how
 * many, or `most` + 1 when there are more. */
struct qtr_choose_adjust;
size_t qtr_sampler_adjustments(struct qtr_sampler *sampler, const struct qtr_sample_args *args,
                               struct qtr_choose_adjust *adjust, size_t most);

/* The log-probability of a given token, and of the n_top best ones. NaN where no logit is finite. */
void qtr_sampler_score(struct qtr_sampler *sampler, const float *logits, int32_t token, int32_t n_top,
                       struct qtr_sample_result *result);

void qtr_sample(struct qtr_sampler *sampler, const struct qtr_sample_args *args, struct qtr_sample_result *result);

#endif
