/* ahead_backend.h - a device that works on its own, for tests: the operations of a backend on the host, seen through
 * ops.launch, ops.collect and ops.choose. A step runs when it is launched, but nobody sees its tokens before collect; a
 * token of a batch below 0 becomes the one that the step before chose for that row; the buffers of a step are spoiled when
 * the next one is launched. Some rows are left undecided, as a GPU may do, more than any GPU does. */
#ifndef QTR_TESTS_AHEAD_BACKEND_H
#define QTR_TESTS_AHEAD_BACKEND_H

#include "backend/backend.h"
#include "base/checked.h"
#include "engine/sampler.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define AHEAD_MOST 4096 /* rows, tokens */

static struct ahead {
  const struct qtr_backend *b; /* NULL: free */
  struct qtr_backend_ops ops;
  const struct qtr_backend_ops *inner;
  struct qtr_sampler *sampler;
  struct qtr_batch batch;
  int32_t token[AHEAD_MOST], logit_row[AHEAD_MOST];
  struct qtr_choose_args choose; /* of the step being recorded; result NULL: none */
  struct {
    struct qtr_choose_result *to, *made;
    int32_t n;
  } way[QTR_STEPS_UNDER_WAY]; /* steps launched: the older one first */
  int n_way;
  struct qtr_choose_result made[QTR_STEPS_UNDER_WAY][AHEAD_MOST];
  int which;
} ahead_all[4];

static inline struct ahead *ahead_of(const struct qtr_backend *b) {
  struct ahead *a = ahead_all;
  while (a->b != b) a++;
  return a;
}

static inline enum qtr_status ahead_begin(struct qtr_backend *b, const struct qtr_batch *batch, const float *inv_freq,
                                          size_t half_dim, struct qtr_error *err) {
  struct ahead *ahead = ahead_of(b);
  assert_in_range(batch->n_tokens, 1, AHEAD_MOST);
  for (int32_t i = 0; i < batch->n_tokens; i++) {
    int32_t token = batch->token[i];
    if (token < 0) {
      assert_int_equal(ahead->n_way, 1); /* only the step before is still unknown */
      assert_in_range(-1 - token, 0, ahead->way[0].n - 1);
      token = QTR_MAX(ahead->way[0].made[-1 - token].token, 0);
    }
    ahead->token[i] = token;
  }
  assert_in_range(batch->n_logit_rows, 0, AHEAD_MOST);
  if (batch->n_logit_rows > 0)
    memcpy(ahead->logit_row, batch->logit_row, (size_t)batch->n_logit_rows * sizeof *ahead->logit_row);
  ahead->batch = *batch;
  ahead->batch.token = ahead->token;
  ahead->choose.result = NULL;
  return ahead->inner->begin_step(b, &ahead->batch, inv_freq, half_dim, err);
}

static inline void ahead_choose(struct qtr_backend *b, const struct qtr_choose_args *args) {
  struct ahead *ahead = ahead_of(b);
  ahead->choose = *args;
}

/* A row of logits with its adjustments; pending: the token that these do not count yet, -1: none. The caller frees it. */
static inline float *ahead_adjusted(const struct qtr_choose_args *args, int32_t i, int32_t pending) {
  const struct qtr_choose_row *row = &args->row[i];
  size_t vocab = (size_t)args->vocab_size;
  float *x = malloc(vocab * sizeof *x);
  assert_non_null(x);
  memcpy(x, (const float *)args->logits + (size_t)i * vocab, vocab * sizeof *x);
  struct qtr_choose_adjust last = {.token = pending, .count = -1};
  for (int32_t k = 0; k <= row->n_adjust; k++) {
    struct qtr_choose_adjust a = k < row->n_adjust ? args->adjust[row->first_adjust + k] : last;
    if (a.token < 0) continue;
    if (a.token == pending) {
      a.count = QTR_MAX(a.count, 0) + 1;
      last.token = -1;
    }
    float *v = &x[a.token];
    *v += a.bias;
    if (a.count >= 0) *v = *v > 0 ? *v / row->repetition_penalty : *v * row->repetition_penalty;
    if (a.count > 0) *v -= row->presence_penalty + row->frequency_penalty * (float)a.count;
  }
  return x;
}

static inline void ahead_row(struct qtr_sampler *sampler, const struct qtr_choose_args *args, int32_t i, int32_t token,
                             struct qtr_choose_result *result) {
  const struct qtr_choose_row *row = &args->row[i];
  *result = (struct qtr_choose_result){.token = QTR_CHOOSE_UNDECIDED};
  if (row->skip) return;
  if (!qtr_choose_sure(row) && (row->seed + row->position) % 3 == 0) return;
  const struct qtr_sampling sampling = {.temperature = row->temperature,
                                        .top_p = row->top_p,
                                        .min_p = row->min_p,
                                        .top_k = row->top_k,
                                        .repetition_penalty = 1};
  float *x = ahead_adjusted(args, i, row->pending ? token : -1);
  const float *logits = (const float *)args->logits + (size_t)i * (size_t)args->vocab_size;
  const struct qtr_sample_args sample = {
      .logits = x, .sampling = &sampling, .seed = row->seed, .position = row->position, .n_top = -1};
  struct qtr_sample_result chosen;
  qtr_sample(sampler, &sample, &chosen);
  free(x);
  result->token = chosen.token;
  if (chosen.token < 0 || row->n_top < 0) return;
  qtr_sampler_score(sampler, logits, result->token, row->n_top, &chosen); /* of the row as it came */
  result->logit = logits[chosen.token];
  result->best = result->logit - chosen.logprob; /* logarithm of the row's sum of exponentials */
  result->exp_sum = 1;
  result->n_top = chosen.n_top;
  for (int32_t k = 0; k < chosen.n_top; k++) {
    result->top_token[k] = chosen.top[k].token;
    result->top_logit[k] = logits[chosen.top[k].token];
  }
}

static inline enum qtr_status ahead_launch(struct qtr_backend *b, struct qtr_error *err) {
  struct ahead *ahead = ahead_of(b);
  enum qtr_status status = ahead->inner->end_step(b, err);
  if (status) return status;
  assert_in_range(ahead->n_way, 0, 1);
  struct qtr_choose_result *made = ahead->made[ahead->which ^= 1];
  const struct qtr_choose_args *c = &ahead->choose;
  int32_t n = c->result ? c->n_rows : 0;
  assert_in_range(n, 0, AHEAD_MOST);
  for (int32_t i = 0; i < n; i++) {
    ahead_row(ahead->sampler, c, i, ahead->token[ahead->logit_row[i]], &made[i]);
    c->result[i] = (struct qtr_choose_result){.token = 1 << 30}; /* not before collect */
  }
  ahead->way[ahead->n_way].to = c->result;
  ahead->way[ahead->n_way].made = made;
  ahead->way[ahead->n_way++].n = n;
  return QTR_OK;
}

static inline enum qtr_status ahead_collect(struct qtr_backend *b, struct qtr_error *err) {
  struct ahead *ahead = ahead_of(b);
  (void)err;
  assert_in_range(ahead->n_way, 1, 2);
  if (ahead->way[0].n > 0) memcpy(ahead->way[0].to, ahead->way[0].made, (size_t)ahead->way[0].n * sizeof *ahead->way[0].to);
  ahead->way[0] = ahead->way[1];
  ahead->n_way--;
  return QTR_OK;
}

static inline enum qtr_status ahead_end(struct qtr_backend *b, struct qtr_error *err) {
  enum qtr_status status = ahead_launch(b, err);
  return status ? status : ahead_collect(b, err);
}

static inline void ahead_caps(struct qtr_backend *b, struct qtr_caps *caps) {
  ahead_of(b)->inner->caps(b, caps);
  caps->ahead = true;
}

static inline void ahead_close(struct qtr_backend *b) {
  struct ahead *ahead = ahead_of(b);
  qtr_sampler_free(ahead->sampler);
  b->ops = ahead->inner;
  memset(ahead, 0, sizeof *ahead);
  b->ops->close(b);
}

/* Puts the device in front of a backend. */
static inline void ahead_wrap(struct qtr_backend *b, int32_t vocab_size) {
  struct ahead *ahead = ahead_of(NULL);
  struct qtr_error err = {0};
  if (qtr_sampler_create(vocab_size, &ahead->sampler, &err)) fail_msg("%s", err.message);
  ahead->b = b;
  ahead->inner = b->ops;
  ahead->ops = *b->ops;
  ahead->ops.close = ahead_close;
  ahead->ops.caps = ahead_caps;
  ahead->ops.begin_step = ahead_begin;
  ahead->ops.end_step = ahead_end;
  ahead->ops.launch = ahead_launch;
  ahead->ops.collect = ahead_collect;
  ahead->ops.choose = ahead_choose;
  b->ops = &ahead->ops;
}

#endif
