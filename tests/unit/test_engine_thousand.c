/* A thousand requests of random length, priority, sampling, number of completions and stops, many sharing prefixes and many
 * cancelled, arriving while others run. Whatever the pool, the token budget and the prefix cache, every completion must give
 * the tokens it gives alone, end as it ends alone (or as cancelled, with a prefix of them), and leave no page behind. */
#include "engine_fixture.h"

#define N_REQUESTS 1000
#define MAX_N 3
#define MAX_OUT 48
#define MAX_PROMPT 260

struct want {
  int32_t prompt[MAX_PROMPT];
  int32_t n_prompt, n, max_tokens, priority, stop_token[2], n_stop_token;
  int32_t cancel_after; /* tokens over all completions; -1 = never */
  bool ignore_eos, has_logprobs;
  struct qtr_sampling sampling;
};

struct got {
  int32_t token[MAX_OUT], n_tokens;
  enum qtr_finish finish;
};

static struct want want[N_REQUESTS];
/* What the runs are about: a device, formats and how many of the requests. */
static struct {
  const char *device, *precision;
  enum qtr_linear_format format;
  int n;
} subject = {"reference", NULL, QTR_LINEAR_F32, N_REQUESTS};

static struct got alone[N_REQUESTS][MAX_N], got[N_REQUESTS][MAX_N];

static uint64_t state = 88172645463325252u;
static int pick(int n) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return (int)((state >> 20) % (uint64_t)n);
}

static void make_requests(void) {
  static int32_t base[4][MAX_PROMPT];
  for (int i = 0; i < 4; i++) {
    for (int k = 0; k < MAX_PROMPT; k++) base[i][k] = i > 0 && k < 64 ? base[0][k] : pick(TINY_VOCAB); /* one first page */
  }
  for (int i = 0; i < N_REQUESTS; i++) {
    struct want *w = &want[i];
    int shared = pick(2) ? pick(200) : 0;
    w->n_prompt = shared + 1 + pick(pick(4) ? 40 : 150);
    w->n_prompt = QTR_MIN(w->n_prompt, MAX_PROMPT);
    if (pick(8) == 0) w->n_prompt = 64 * (1 + pick(3)); /* the edges of pages */
    const int32_t *from = base[pick(4)];
    for (int k = 0; k < w->n_prompt; k++) w->prompt[k] = k < shared ? from[k] : pick(TINY_VOCAB);
    w->n = pick(5) ? 1 : 1 + pick(MAX_N);
    w->max_tokens = 1 + pick(pick(3) ? 24 : MAX_OUT);
    w->priority = pick(4) ? 0 : pick(5) - 2;
    w->cancel_after = pick(6) ? -1 : pick(30);
    w->ignore_eos = pick(3) == 0;
    w->n_stop_token = pick(4) ? 0 : 1 + pick(2);
    for (int k = 0; k < 2; k++) w->stop_token[k] = pick(TINY_VOCAB);
    w->has_logprobs = pick(4) == 0;
    w->sampling = (struct qtr_sampling){.temperature = pick(3) ? 1.0f : 0.0f,
                                        .top_k = pick(3) ? -1 : 1 + pick(50),
                                        .top_p = pick(3) ? 1.0f : 0.9f,
                                        .min_p = pick(4) ? 0.0f : 0.02f,
                                        .repetition_penalty = pick(4) ? 1.0f : 1.2f,
                                        .frequency_penalty = pick(4) ? 0.0f : 0.3f,
                                        .seed = (uint64_t)pick(100),
                                        .has_seed = true};
  }
}

static uint64_t add(struct qtr_engine *engine, int i, bool may_cancel) {
  const struct want *w = &want[i];
  struct qtr_request_options o;
  struct qtr_error err = {0};
  uint64_t id = 0;
  qtr_request_options_init(&o);
  o.prompt_token = w->prompt;
  o.n_prompt_token = (size_t)w->n_prompt;
  o.max_tokens = w->max_tokens;
  o.n = w->n;
  o.priority = w->priority;
  o.sampling = w->sampling;
  o.stop_token = w->stop_token;
  o.n_stop_token = (size_t)w->n_stop_token;
  o.ignore_eos = w->ignore_eos;
  o.logprobs = w->has_logprobs ? 3 : -1;
  o.user = &want[i];
  if (qtr_engine_add(engine, &o, &id, &err)) fail_msg("%s", err.message);
  if (may_cancel && w->cancel_after == 0) assert_int_equal(qtr_engine_cancel(engine, id, &err), QTR_OK);
  return id;
}

/* Takes all events; cancels those whose time has come. Returns the number of completions that ended. */
static int take_events(struct qtr_engine *engine, struct got (*out)[MAX_N], bool may_cancel) {
  struct qtr_event e;
  int n_ended = 0;
  while (qtr_engine_poll(engine, &e)) {
    int i = (int)((struct want *)e.user - want);
    struct got *g = &out[i][e.index];
    assert_int_equal(g->finish, QTR_FINISH_NONE); /* nothing comes after the end */
    if (e.token >= 0) {
      assert_true(g->n_tokens < want[i].max_tokens);
      g->token[g->n_tokens++] = e.token;
      assert_int_equal(e.has_logprob, want[i].has_logprobs);
      assert_int_equal(e.n_top_logprob, want[i].has_logprobs ? 3 : 0);
    }
    assert_int_equal(e.n_output_tokens, g->n_tokens);
    assert_int_equal(e.n_prompt_tokens, want[i].n_prompt);
    assert_true(e.n_cached_tokens % 64 == 0 && e.n_cached_tokens < e.n_prompt_tokens);
    g->finish = e.finish;
    n_ended += e.finish != QTR_FINISH_NONE;
    int32_t n_all = 0;
    for (int k = 0; k < want[i].n; k++) n_all += out[i][k].n_tokens;
    if (may_cancel && want[i].cancel_after > 0 && n_all == want[i].cancel_after) (void)qtr_engine_cancel(engine, e.id, NULL);
  }
  return n_ended;
}

/* Each request on its own: the truth. */
static void run_alone(void) {
  const struct qtr_engine_options o = {.max_num_seqs = MAX_N,
                                       .kv_pages = 64,
                                       .no_prefix_cache = true,
                                       .max_num_batched_tokens = 300,
                                       .precision = subject.precision};
  struct qtr_engine *engine = tiny_engine(tiny_model_on(subject.device, subject.format), &o);
  int n_stopped = 0, n_length = 0;
  memset(alone, 0, sizeof alone);
  for (int i = 0; i < subject.n; i++) {
    (void)add(engine, i, false);
    drain(engine);
    assert_int_equal(take_events(engine, alone, false), want[i].n);
    for (int k = 0; k < want[i].n; k++) {
      n_stopped += alone[i][k].finish == QTR_FINISH_STOP;
      n_length += alone[i][k].finish == QTR_FINISH_LENGTH;
      if (alone[i][k].finish == QTR_FINISH_LENGTH) assert_int_equal(alone[i][k].n_tokens, want[i].max_tokens);
    }
  }
  assert_idle(engine);
  assert_true(n_stopped > subject.n / 10 && n_length > subject.n / 10);
  qtr_engine_close(engine);
}

struct setup {
  const char *name;
  int32_t pages, seqs, budget;
  bool no_cache;
  bool squeezed; /* so small that it must preempt */
};

static void run_together(const struct setup *setup) {
  const struct qtr_engine_options o = {.max_num_seqs = setup->seqs,
                                       .kv_pages = setup->pages,
                                       .no_prefix_cache = setup->no_cache,
                                       .max_num_batched_tokens = setup->budget,
                                       .precision = subject.precision};
  struct qtr_engine *engine = tiny_engine(tiny_model_on(subject.device, subject.format), &o);
  struct qtr_error err = {0};
  int added = 0, n_ended = 0, n_expected = 0, n_cancelled = 0;
  memset(got, 0, sizeof got);
  for (int i = 0; i < subject.n; i++) n_expected += want[i].n;
  bool work = true;
  for (long step = 0; work || added < subject.n; step++) {
    for (int k = pick(4); k > 0 && added < subject.n; k--) (void)add(engine, added++, true);
    if (qtr_engine_step(engine, &work, &err)) fail_msg("%s: %s", setup->name, err.message);
    assert_true(last_batch(engine)->n_tokens <= setup->budget && last_batch(engine)->n_seqs <= setup->seqs);
    if (!qtr_kv_pool_check(engine->pool, &err)) fail_msg("%s, step %ld: %s", setup->name, step, err.message);
    n_ended += take_events(engine, got, true);
    assert_true(step < 1000000);
    work = engine->n_running + engine->n_waiting > 0;
  }
  assert_int_equal(n_ended, n_expected);
  assert_idle(engine);
  for (int i = 0; i < subject.n; i++) {
    for (int k = 0; k < want[i].n; k++) {
      const struct got *a = &alone[i][k], *b = &got[i][k];
      bool cancelled = b->finish == QTR_FINISH_CANCELLED;
      n_cancelled += cancelled;
      if (cancelled)
        assert_true(want[i].cancel_after >= 0 && b->n_tokens <= a->n_tokens);
      else
        assert_int_equal(b->n_tokens, a->n_tokens);
      if (!cancelled) assert_int_equal(b->finish, a->finish);
      if (memcmp(a->token, b->token, (size_t)b->n_tokens * sizeof *a->token) != 0) {
        fail_msg("%s: request %d, completion %d gives other tokens than alone", setup->name, i, k);
      }
    }
  }
  struct qtr_stats stats;
  qtr_engine_stats(engine, &stats);
  assert_int_equal(stats.n_requests_finished, subject.n);
  assert_true(n_cancelled > subject.n / 20);
  if (setup->squeezed)
    assert_true(stats.n_preemptions > (uint64_t)subject.n / 20);
  else
    assert_int_equal(stats.n_preemptions, 0);
  if (setup->no_cache)
    assert_int_equal(stats.n_cached_tokens, 0);
  else
    assert_true(stats.n_cached_tokens > 10 * (uint64_t)subject.n);
  print_message("%s: %llu steps, %llu preemptions, %llu cached tokens, %d cancelled\n", setup->name,
                (unsigned long long)stats.n_steps, (unsigned long long)stats.n_preemptions,
                (unsigned long long)stats.n_cached_tokens, n_cancelled);
  qtr_engine_close(engine);
}

static void test_large_pool(void **unused) {
  (void)unused;
  run_together(&(struct setup){.name = "large pool", .pages = 1000, .seqs = 40, .budget = 500});
}

static void test_small_pool(void **unused) {
  (void)unused;
  run_together(&(struct setup){.name = "small pool", .pages = 8, .seqs = 16, .budget = 70, .squeezed = true});
}

static void test_small_pool_small_chunks(void **unused) {
  (void)unused;
  run_together(&(struct setup){.name = "small pool, small chunks", .pages = 6, .seqs = 24, .budget = 24, .squeezed = true});
}

static void test_small_pool_without_cache(void **unused) {
  (void)unused;
  run_together(&(struct setup){
      .name = "small pool, no prefix cache", .pages = 8, .seqs = 16, .budget = 100, .no_cache = true, .squeezed = true});
}

/* The backend that serves, with its threads and 4-bit formats: it must be as indifferent to batches and chunks. */
static void test_cpu(void **unused) {
  (void)unused;
  subject.device = "cpu";
  subject.precision = "w4a8kv4";
  subject.format = QTR_LINEAR_W4A8;
  subject.n = 300;
  run_alone();
  run_together(&(struct setup){.name = "cpu, large pool", .pages = 1000, .seqs = 40, .budget = 500});
  run_together(&(struct setup){.name = "cpu, small pool", .pages = 7, .seqs = 20, .budget = 64, .squeezed = true});
}

static int prepare(void **unused) {
  (void)unused;
  make_requests();
  run_alone();
  return 0;
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_large_pool),
      cmocka_unit_test(test_small_pool),
      cmocka_unit_test(test_small_pool_small_chunks),
      cmocka_unit_test(test_small_pool_without_cache),
      cmocka_unit_test(test_cpu),
  };
  return cmocka_run_group_tests(tests, prepare, NULL);
}
