/* test_engine_prompt_logprobs.c - log-probabilities of prompts: equal to what the model's logits say, and the same to the
 * bit however the prompt is cut into steps, whatever the prefix cache holds, beside others, and across preemptions. */
#include "engine_fixture.h"

#include <math.h>

#define N_PROMPT 150

struct told { /* of one request */
  float logprob[N_PROMPT];
  int32_t top[N_PROMPT][3];
  int n, n_output, n_completions;
  bool out_of_order;
};

static void make_prompt(int32_t token[N_PROMPT]) {
  uint32_t seed = 7;
  for (int i = 0; i < N_PROMPT; i++) token[i] = (int32_t)((seed = seed * 1664525u + 1013904223u) >> 24);
}

static void take(const struct qtr_event *e) {
  struct told *t = e->user;
  if (!t) return;
  if (e->prompt_index > 0) {
    assert_true(e->prompt_index < N_PROMPT && e->has_logprob && e->index == 0 && e->finish == QTR_FINISH_NONE);
    if (e->prompt_index != t->n + 1 || t->n_output > 0) t->out_of_order = true;
    t->logprob[e->prompt_index] = e->logprob;
    assert_int_equal(e->n_top_logprob, 3);
    for (int k = 0; k < 3; k++) t->top[e->prompt_index][k] = e->top_logprob[k].token;
    t->n++;
  } else {
    t->n_output += e->token >= 0;
    t->n_completions += e->finish != QTR_FINISH_NONE;
    assert_true(e->finish == QTR_FINISH_NONE || e->finish == QTR_FINISH_LENGTH);
  }
}

static void run(struct qtr_engine *engine) {
  struct qtr_error err = {0};
  struct qtr_event event;
  for (bool work = true; work;) {
    if (qtr_engine_step(engine, &work, &err)) fail_msg("%s", err.message);
    while (qtr_engine_poll(engine, &event)) take(&event);
  }
}

static void add(struct qtr_engine *engine, const int32_t *token, size_t n_token, int32_t n, struct told *told) {
  struct qtr_request_options o;
  struct qtr_error err = {0};
  uint64_t id;
  qtr_request_options_init(&o);
  o.prompt_token = token;
  o.n_prompt_token = n_token;
  o.max_tokens = told ? 2 : 100;
  o.n = n;
  o.ignore_eos = true;
  o.logprobs = told ? 3 : -1;
  o.prompt_logprobs = told != NULL;
  o.user = told;
  if (qtr_engine_add(engine, &o, &id, &err)) fail_msg("%s", err.message);
}

static void check(const struct told *t, const struct told *wanted, int32_t n, const char *what) {
  if (t->n != N_PROMPT - 1 || t->out_of_order || t->n_completions != n || t->n_output != 2 * n) {
    fail_msg("%s: %d of the prompt's tokens, %d completions, %d tokens", what, t->n, t->n_completions, t->n_output);
  }
  if (memcmp(t->logprob + 1, wanted->logprob + 1, sizeof t->logprob - sizeof *t->logprob) != 0 ||
      memcmp(t->top[1], wanted->top[1], sizeof t->top - sizeof t->top[0]) != 0) {
    fail_msg("%s: other values", what);
  }
}

/* The whole prompt at once, every row's logits, softmax in double. */
static void reference(struct qtr_engine *engine, const int32_t *token, struct told *out) {
  int32_t position[N_PROMPT], row[N_PROMPT], page[3] = {0, 1, 2};
  const int32_t q_start[2] = {0, N_PROMPT}, kv_len[1] = {0};
  for (int32_t i = 0; i < N_PROMPT; i++) position[i] = row[i] = i;
  const struct qtr_batch batch = {.n_tokens = N_PROMPT,
                                  .n_seqs = 1,
                                  .n_logit_rows = N_PROMPT,
                                  .max_blocks = 3,
                                  .token = token,
                                  .position = position,
                                  .q_start = q_start,
                                  .kv_len = kv_len,
                                  .block_table = page,
                                  .logit_row = row};
  struct qtr_workspace *workspace = NULL;
  struct qtr_backend *b = engine->model->backend;
  struct qtr_error err = {0};
  const float *logits = NULL;
  float *host = malloc((size_t)N_PROMPT * TINY_VOCAB * sizeof *host);
  assert_non_null(host);
  if (qtr_workspace_create(engine->model, N_PROMPT, N_PROMPT, &workspace, &err) ||
      qtr_model_forward(engine->model, engine->kv, workspace, &batch, &logits, &err) ||
      b->ops->download(b, logits, QTR_DTYPE_F32, (size_t)N_PROMPT * TINY_VOCAB, host, &err)) {
    fail_msg("%s", err.message);
  }
  for (int i = 1; i < N_PROMPT; i++) {
    const float *x = host + (size_t)(i - 1) * TINY_VOCAB;
    double sum = 0;
    int best = 0;
    for (int k = 0; k < TINY_VOCAB; k++) {
      sum += exp((double)x[k]);
      if (x[k] > x[best]) best = k;
    }
    out->logprob[i] = (float)((double)x[token[i]] - log(sum));
    out->top[i][0] = best;
  }
  qtr_workspace_free(workspace);
  free(host);
}

static void test_values(void **state) {
  (void)state;
  int32_t token[N_PROMPT];
  struct told wanted = {0}, exact = {0}, again = {0};
  make_prompt(token);
  struct qtr_engine *engine = tiny_engine(tiny_model(QTR_LINEAR_W8A8), &(struct qtr_engine_options){.kv_pages = 40});
  reference(engine, token, &exact);
  add(engine, token, N_PROMPT, 1, &wanted);
  run(engine);
  check(&wanted, &wanted, 1, "alone");
  for (int i = 1; i < N_PROMPT; i++) {
    assert_true(fabsf(wanted.logprob[i] - exact.logprob[i]) < 1e-4f);
    assert_int_equal(wanted.top[i][0], exact.top[i][0]);
  }
  add(engine, token, N_PROMPT, 1, &again); /* its pages are in the prefix cache now */
  run(engine);
  check(&again, &wanted, 1, "after a hit");
  struct told several = {0};
  add(engine, token, N_PROMPT, 3, &several);
  run(engine);
  check(&several, &wanted, 3, "three completions");
  struct told one = {0}; /* a prompt of one token has nothing to tell */
  add(engine, token, 1, 1, &one);
  run(engine);
  assert_true(one.n == 0 && one.n_completions == 1);
  assert_idle(engine);
  qtr_engine_close(engine);

  static const struct qtr_engine_options options[] = {{.max_num_batched_tokens = 7, .max_num_seqs = 7},
                                                      {.max_num_batched_tokens = 50, .max_num_seqs = 50},
                                                      {.max_num_seqs = 1},
                                                      {.max_num_seqs = 1, .max_num_batched_tokens = 1},
                                                      {.max_num_seqs = 3, .no_prefix_cache = true}};
  for (size_t i = 0; i < sizeof options / sizeof options[0]; i++) {
    struct told a = {0}, b = {0};
    engine = tiny_engine(tiny_model(QTR_LINEAR_W8A8), &options[i]);
    add(engine, token, N_PROMPT, 2, &a);
    add(engine, token, N_PROMPT, 1, &b);
    run(engine);
    check(&a, &wanted, 2, "cut otherwise");
    check(&b, &wanted, 1, "beside another");
    assert_idle(engine);
    qtr_engine_close(engine);
  }
}

/* A pool that cannot hold all: requests are preempted in the midst of telling, and tell every token once. */
static void test_preemption(void **state) {
  (void)state;
  int32_t token[N_PROMPT], other[60];
  struct told wanted = {0};
  make_prompt(token);
  struct qtr_engine *engine = tiny_engine(tiny_model(QTR_LINEAR_W8A8), &(struct qtr_engine_options){.kv_pages = 40});
  add(engine, token, N_PROMPT, 1, &wanted);
  run(engine);
  qtr_engine_close(engine);
  for (int i = 0; i < 60; i++) other[i] = i + 20;
  for (int round = 0; round < 4; round++) {
    struct qtr_stats stats;
    struct told told[3] = {{.n = 0}};
    engine =
        tiny_engine(tiny_model(QTR_LINEAR_W8A8),
                    &(struct qtr_engine_options){.kv_pages = 16, .max_num_seqs = 8 + round, .max_num_batched_tokens = 16});
    for (int i = 0; i < 4; i++) {
      other[0] = 100 + i;
      add(engine, other, 60, 1, NULL); /* grow by 100 tokens each, and come first */
    }
    for (int i = 0; i < 3; i++) add(engine, token, N_PROMPT, 1, &told[i]);
    run(engine);
    for (int i = 0; i < 3; i++) check(&told[i], &wanted, 1, "preempted");
    qtr_engine_stats(engine, &stats);
    if (round == 0) assert_true(stats.n_preemptions > 0);
    assert_idle(engine);
    qtr_engine_close(engine);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_values), cmocka_unit_test(test_preemption)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
