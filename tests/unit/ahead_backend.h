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
  int32_t token[AHEAD_MOST];
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
  ahead->batch = *batch;
  ahead->batch.token = ahead->token;
  ahead->choose.result = NULL;
  return ahead->inner->begin_step(b, &ahead->batch, inv_freq, half_dim, err);
}

static inline void ahead_choose(struct qtr_backend *b, const struct qtr_choose_args *args) {
  struct ahead *ahead = ahead_of(b);
  ahead->choose = *args;
}

static inline void ahead_row(struct qtr_sampler *sampler, const struct qtr_choose_args *args, int32_t i,
                             struct qtr_choose_result *result) {
  const struct qtr_choose_row *row = &args->row[i];
  *result = (struct qtr_choose_result){.token = QTR_CHOOSE_UNDECIDED};
  if (row->skip) return;
  if (row->n_adjust > 0 || (!qtr_choose_sure(row) && (row->seed + row->position) % 3 == 0)) return;
  const struct qtr_sampling sampling = {.temperature = row->temperature,
                                        .top_p = row->top_p,
                                        .min_p = row->min_p,
                                        .top_k = row->top_k,
                                        .repetition_penalty = 1};
  const struct qtr_sample_args sample = {.logits = (const float *)args->logits + (size_t)i * (size_t)args->vocab_size,
                                         .sampling = &sampling,
                                         .seed = row->seed,
                                         .position = row->position,
                                         .n_top = row->n_top};
  struct qtr_sample_result chosen;
  qtr_sample(sampler, &sample, &chosen);
  result->token = chosen.token;
  if (chosen.token < 0 || row->n_top < 0) return;
  result->logit = sample.logits[chosen.token];
  result->best = result->logit - chosen.logprob; /* logarithm of the row's sum of exponentials */
  result->exp_sum = 1;
  result->n_top = chosen.n_top;
  for (int32_t k = 0; k < chosen.n_top; k++) {
    result->top_token[k] = chosen.top[k].token;
    result->top_logit[k] = sample.logits[chosen.top[k].token];
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
    ahead_row(ahead->sampler, c, i, &made[i]);
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
