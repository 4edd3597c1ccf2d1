/* The next step launched before this one's tokens are known, on a device that works on its own (ahead_backend.h): the same
 * tokens as one step at a time, how far ahead the engine goes and when it does not, and ends of every kind with a step under
 * way. The other tests of the engine run on that device as well (tests/CMakeLists.txt). */
#include "engine_fixture.h"

#include "base/status.h"

enum { N = 60, MOST = 200 };

struct answer {
  int32_t token[MOST];
  int n;
  enum qtr_finish finish;
};
static struct answer answers[2][N];
static int32_t prompt[700];

static int setup(void **unused) {
  (void)unused;
  for (int i = 0; i < 700; i++) prompt[i] = 10 + (i * 53 + i / 11) % (TINY_VOCAB - 10);
  return 0;
}

/* Greedy, drawn, with penalties, biased, with log-probabilities; ended by length, by tokens and by stop tokens. */
static struct qtr_request_options request(int i, struct answer *answer) {
  static const struct qtr_logit_bias bias = {40, 3};
  static const int32_t stop = 77;
  struct qtr_request_options o;
  qtr_request_options_init(&o);
  o.prompt_token = prompt + i;
  o.n_prompt_token = (size_t)(1 + i * 11 % 300);
  o.max_tokens = 1 + i * 37 % MOST;
  o.user = answer;
  o.ignore_eos = i % 3 == 0;
  o.priority = i % 7 == 0;
  o.sampling.seed = 100 + (uint64_t)i;
  o.sampling.has_seed = true;
  o.sampling.temperature = i % 4 == 0 ? 0 : 0.9f;
  if (i % 4 == 2) o.sampling.top_p = 0.8f; /* may be left undecided */
  if (i % 4 == 3) o.sampling.top_k = 20;
  if (i % 10 == 5) o.sampling.frequency_penalty = 0.5f;
  if (i % 10 == 4) {
    o.sampling.repetition_penalty = 1.3f;
    o.sampling.presence_penalty = 0.7f;
  }
  if (i % 20 == 14) {
    o.logit_bias = &bias;
    o.n_logit_bias = 1;
    o.logprobs = 3;
  }
  if (i % 20 == 9) o.sampling.top_k = 2 * QTR_CHOOSE_SURE_TOP_K;
  if (i % 10 == 7) {
    o.logit_bias = &bias;
    o.n_logit_bias = 1;
  }
  if (i % 10 == 8) o.logprobs = 2;
  if (i % 5 == 1) {
    o.stop_token = &stop;
    o.n_stop_token = 1;
  }
  return o;
}

static void take(struct qtr_engine *engine) {
  struct qtr_event e;
  while (qtr_engine_poll(engine, &e)) {
    struct answer *a = e.user;
    assert_int_equal(a->finish, QTR_FINISH_NONE);
    if (e.token >= 0) a->token[a->n++] = e.token;
    assert_int_equal(e.n_output_tokens, a->n);
    a->finish = e.finish;
  }
}

static bool step(struct qtr_engine *engine) {
  bool work = tiny_step(engine);
  take(engine);
  return work;
}

static uint64_t add(struct qtr_engine *engine, const struct qtr_request_options *o) {
  struct qtr_error err = {0};
  uint64_t id;
  if (qtr_engine_add(engine, o, &id, &err)) fail_msg("%s", err.message);
  return id;
}

static int under_way(const struct qtr_engine *engine) { return engine->pass[0].launched + engine->pass[1].launched; }

static struct qtr_engine *open_engine(bool ahead, const struct qtr_engine_options *o) {
  if (ahead)
    (void)setenv("QTR_TEST_AHEAD", "1", 1);
  else
    (void)unsetenv("QTR_TEST_AHEAD");
  return tiny_engine(tiny_model(QTR_LINEAR_F32), o);
}

static void test_same_tokens(void **unused) {
  (void)unused;
  const struct qtr_engine_options options[] = {
      {.max_num_batched_tokens = 200, .max_num_seqs = 16},
      {.max_num_batched_tokens = 64, .max_num_seqs = 16, .kv_pages = 12}, /* many are preempted */
      {.max_num_batched_tokens = 97, .max_num_seqs = 7, .no_prefix_cache = true}};
  for (size_t k = 0; k < sizeof options / sizeof options[0]; k++) {
    int n_ahead = 0, n_steps = 0;
    memset(answers, 0, sizeof answers);
    for (int ahead = 0; ahead < 2; ahead++) {
      struct qtr_engine *engine = open_engine(ahead, &options[k]);
      for (int i = 0; i < N; i++) {
        struct qtr_request_options o = request(i, &answers[ahead][i]);
        if (k == 2 && o.sampling.top_k > QTR_CHOOSE_SURE_TOP_K) continue; /* these hold all up */
        add(engine, &o);
        if (i % 3 == 0) (void)step(engine);
      }
      for (bool work = true; work; n_steps += ahead) {
        work = step(engine);
        n_ahead += under_way(engine);
        assert_in_range(under_way(engine), 0, ahead);
      }
      (void)step(engine); /* what was launched for those that had ended */
      assert_int_equal(under_way(engine), 0);
      assert_idle(engine);
      struct qtr_stats stats;
      qtr_engine_stats(engine, &stats);
      assert_true(k != 1 || stats.n_preemptions > 0);
      qtr_engine_close(engine);
    }
    for (int i = 0; i < N; i++) {
      const struct answer *a = &answers[0][i], *b = &answers[1][i];
      if (a->n != b->n || a->finish != b->finish || memcmp(a->token, b->token, (size_t)a->n * sizeof a->token[0]))
        fail_msg("options %zu, request %d: %d tokens, finish %d; a step ahead %d, finish %d", k, i, a->n, a->finish, b->n,
                 b->finish);
    }
    print_message("options %zu: ahead in %d of %d steps\n", k, n_ahead, n_steps);
    assert_true(n_ahead > n_steps / 10);
  }
}

/* Ahead in every step but the last; not where the host must see tokens first; and it ends where the length ends it. */
static void test_when(void **unused) {
  (void)unused;
  struct qtr_engine *engine = open_engine(true, &(struct qtr_engine_options){.max_num_batched_tokens = 100});
  struct qtr_stats stats;
  memset(answers, 0, sizeof answers);
  struct qtr_request_options o = request(0, &answers[0][0]);
  o.n_prompt_token = 150;
  o.max_tokens = 10;
  add(engine, &o);
  for (int i = 0; i < 11; i++) {
    assert_int_equal(step(engine), i < 10);
    assert_int_equal(answers[0][0].n, i);
    assert_int_equal(under_way(engine), i < 10);
  }
  qtr_engine_stats(engine, &stats);
  assert_int_equal(stats.n_steps, 11);

  o = request(5, &answers[0][1]); /* with a penalty: the device counts the token that is not known yet */
  o.ignore_eos = true;
  o.n_prompt_token = 50;
  o.max_tokens = 5;
  add(engine, &o);
  for (int i = 1; i <= 5; i++) {
    (void)step(engine);
    assert_int_equal(answers[0][1].n, i);
    assert_int_equal(under_way(engine), i < 5);
  }

  memset(&answers[0][1], 0, sizeof answers[0][1]);
  o = request(9, &answers[0][1]); /* with a large top-k */
  assert_true(o.sampling.top_k > QTR_CHOOSE_SURE_TOP_K);
  o.ignore_eos = true;
  o.n_prompt_token = 50;
  o.max_tokens = 5;
  add(engine, &o);
  for (int i = 0; i < 5; i++) {
    (void)step(engine);
    assert_int_equal(under_way(engine), 0);
  }
  assert_int_equal(answers[0][1].n, 5);

  o = request(0, &answers[0][2]);
  o.n_prompt_token = 10;
  o.max_tokens = 100;
  add(engine, &o);
  for (int i = 0; i < 5; i++) (void)step(engine);
  assert_int_equal(under_way(engine), 1);
  o = request(9, &answers[0][3]); /* comes in between */
  o.ignore_eos = true;
  o.n_prompt_token = 10;
  o.max_tokens = 10;
  add(engine, &o);
  while (answers[0][3].finish == QTR_FINISH_NONE) {
    (void)step(engine);
    if (answers[0][3].n > 0 && answers[0][3].n < 10) assert_int_equal(under_way(engine), 0);
  }
  for (int i = 0; i < 3; i++) (void)step(engine);
  assert_int_equal(under_way(engine), 1);
  drain(engine);
  take(engine);
  assert_int_equal(answers[0][2].n, 100);
  assert_idle(engine);
  qtr_engine_close(engine);
}

/* A text that ends by a token costs one step's work on it, and nothing is seen of that. */
static void test_ends(void **unused) {
  (void)unused;
  struct qtr_engine *engine = open_engine(true, &(struct qtr_engine_options){.max_num_batched_tokens = 100});
  memset(answers, 0, sizeof answers);
  struct qtr_request_options o = request(4, &answers[0][0]);
  o.n_prompt_token = 30;
  o.max_tokens = 20;
  o.ignore_eos = true;
  add(engine, &o);
  while (step(engine)) continue;
  int at = 1; /* the first token that was not there before ends it now */
  for (int k = 0; k < at && at < 19; k++) {
    if (answers[0][0].token[k] == answers[0][0].token[at]) at++, k = -1;
  }
  o.user = &answers[0][1];
  o.stop_token = &answers[0][0].token[at];
  o.n_stop_token = 1;
  add(engine, &o);
  while (step(engine)) continue;
  assert_int_equal(answers[0][1].finish, QTR_FINISH_STOP);
  assert_int_equal(answers[0][1].n, at + 1);
  assert_int_equal(under_way(engine), 1);
  assert_idle(engine); /* its pages are free already */

  o.user = &answers[0][2]; /* the next request takes them while that step still counts as under way */
  o.n_stop_token = 0;
  add(engine, &o);
  while (step(engine)) continue;
  assert_memory_equal(answers[0][2].token, answers[0][0].token, 20 * sizeof(int32_t));
  assert_idle(engine);
  qtr_engine_close(engine);
}

static void test_cancel_and_close(void **unused) {
  (void)unused;
  struct qtr_engine *engine = open_engine(true, &(struct qtr_engine_options){.max_num_batched_tokens = 100});
  struct qtr_error err = {0};
  memset(answers, 0, sizeof answers);
  uint64_t id[3];
  for (int i = 0; i < 3; i++) {
    struct qtr_request_options o = request(4 * i, &answers[0][i]);
    o.max_tokens = 50;
    o.ignore_eos = true;
    o.n_prompt_token = 20;
    id[i] = add(engine, &o);
  }
  for (int i = 0; i < 5; i++) (void)step(engine);
  assert_int_equal(under_way(engine), 1);
  assert_int_equal(qtr_engine_cancel(engine, id[1], &err), QTR_OK);
  take(engine);
  assert_int_equal(answers[0][1].finish, QTR_FINISH_CANCELLED);
  int n = answers[0][0].n;
  (void)step(engine);
  assert_int_equal(answers[0][0].n, n + 1);
  assert_int_equal(answers[0][1].n, n);
  assert_int_equal(qtr_engine_cancel(engine, id[0], &err), QTR_OK);
  assert_int_equal(qtr_engine_cancel(engine, id[2], &err), QTR_OK);
  assert_idle(engine);
  assert_int_equal(under_way(engine), 1);
  struct qtr_request_options o = request(8, &answers[0][3]);
  add(engine, &o);
  (void)step(engine);
  (void)step(engine);
  assert_int_equal(answers[0][3].n, 1);
  assert_int_equal(under_way(engine), 1);
  qtr_engine_close(engine); /* with a request that runs and a step under way */
}

static enum qtr_status (*good)(struct qtr_backend *b, struct qtr_error *err);
static int n_good;
static enum qtr_status failing(struct qtr_backend *b, struct qtr_error *err) {
  if (n_good-- > 0) return good(b, err);
  return qtr_fail(err, QTR_ERR_BACKEND, "the cable is out");
}

/* A device that fails when a step is launched, or when one is waited for, ends every request once. */
static void test_device_fails(void **unused) {
  (void)unused;
  for (int launch = 0; launch < 2; launch++) {
    for (int n = 0; n < 5; n++) {
      n_good = n;
      struct qtr_engine *engine = open_engine(true, &(struct qtr_engine_options){.max_num_batched_tokens = 100});
      struct ahead *ahead = ahead_of(engine->model->backend);
      enum qtr_status (**op)(struct qtr_backend * b, struct qtr_error * err) =
          launch ? &ahead->ops.launch : &ahead->ops.collect;
      good = *op;
      *op = failing;
      memset(answers, 0, sizeof answers);
      for (int i = 0; i < 5; i++) {
        struct qtr_request_options o = request(4 * i, &answers[0][i]);
        add(engine, &o);
      }
      struct qtr_error err = {0};
      bool work = true;
      while (qtr_engine_step(engine, &work, &err) == QTR_OK) assert_true(work);
      assert_non_null(strstr(err.message, "the cable is out"));
      take(engine);
      for (int i = 0; i < 5; i++) assert_true(answers[0][i].finish != QTR_FINISH_NONE);
      assert_int_equal(qtr_engine_step(engine, &work, &err), QTR_ERR_BACKEND);
      assert_idle(engine);
      *op = good;
      qtr_engine_close(engine);
    }
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_same_tokens), cmocka_unit_test(test_when),
                                     cmocka_unit_test(test_ends), cmocka_unit_test(test_cancel_and_close),
                                     cmocka_unit_test(test_device_fails)};
  return cmocka_run_group_tests(tests, setup, NULL);
}
