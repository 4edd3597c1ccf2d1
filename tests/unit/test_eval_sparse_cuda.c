/* Sparse attention on a GPU with the demo model, whose heads of 128 have the tensor-core kernels: heads that calibration
 * gives up do not cost the needles, those that it keeps do; a request gives the same tokens alone, among 127 others - in
 * captured steps of many sizes - and through a pool far too small; cancelled requests leave no page; a budget that is never
 * reached gives the tokens of a dense engine. Skipped, saying so, where there is no GPU or no CUDA in the build. */
#include "engine_fixture.h"
#include "eval/calibrate.h"
#include "eval/niah.h"

enum { LAYERS = 8, HEADS = 4, N = 128, TOKENS = 96, LONGEST = 900 };

static const char demo[] = QTR_SOURCE_DIR "/models/demo";
static const char *device = "cuda";

static struct qtr_engine *open_engine(const struct qtr_sparse_options *sparse, int32_t pages, int32_t seqs) {
  struct qtr_engine_options o;
  struct qtr_error err = {0};
  struct qtr_engine *e;
  qtr_engine_options_init(&o);
  o.model_dir = demo;
  o.device = device;
  o.kv_pages = pages;
  o.max_num_seqs = seqs;
  o.max_model_len = 2048;
  o.no_prefix_cache = true;
  if (sparse) o.sparse = *sparse;
  if (qtr_engine_open(&o, &e, &err)) fail_msg("%s", err.message);
  assert_int_equal(e->model->config.n_layers, LAYERS);
  assert_int_equal(e->model->config.n_kv_heads, HEADS);
  return e;
}

static struct qtr_sparse_options half(const double *heads) {
  return (struct qtr_sparse_options){.heads = heads,
                                     .static_sparsity = heads ? 0.5f : 0,
                                     .context_mode = true,
                                     .ctx_sink = 64,
                                     .ctx_local = 128,
                                     .dec_sink = 64,
                                     .dec_local = 128,
                                     .decode_mode = 1,
                                     .token_budget = 256,
                                     .selector_interval = 4,
                                     .sub_chunks = 4};
}

/* ---- needles ------------------------------------------------------------------------------------- */

static double found(const struct qtr_sparse_options *sparse, size_t length, size_t n_needles) {
  static const double depth[] = {0.3, 0.5, 0.7};
  struct qtr_engine *e = open_engine(sparse, 1024, 16);
  struct qtr_haystack haystack = {0};
  struct qtr_niah_result result = {0};
  struct qtr_error err = {0};
  const struct qtr_niah_options o = {.length = &length,
                                     .depth = depth,
                                     .n_lengths = 1,
                                     .n_depths = 3,
                                     .n_needles = n_needles,
                                     .max_tokens = 32,
                                     .seed = 3,
                                     .quiet = true};
  if (qtr_haystack_generate(e, 9, 4 * length, &haystack, &err) || qtr_niah_run(e, &haystack, &o, &result, &err))
    fail_msg("%s", err.message);
  double accuracy = result.total.accuracy;
  assert_idle(e);
  qtr_niah_free(&result);
  qtr_haystack_free(&haystack);
  qtr_engine_close(e);
  return accuracy;
}

static void test_needles(void **unused) {
  (void)unused;
  static const size_t length[] = {500};
  struct qtr_engine *e = open_engine(NULL, 256, 4);
  struct qtr_calibrate_result heads = {0};
  struct qtr_error err = {0};
  const struct qtr_calibrate_options o = {
      .length = length, .n_lengths = 1, .n_prompts = 2, .sink = 64, .local = 128, .rounds = 2, .seed = 1, .quiet = true};
  if (qtr_calibrate_heads(e, NULL, &o, &heads, &err)) fail_msg("%s", err.message); /* text that the model writes */
  assert_true(heads.round[1].cost.answer > 5 && heads.round[1].cost.text > 0.05);  /* no head left */
  assert_true(heads.round[0].cost.answer < 0.1 && heads.round[0].cost.text < heads.round[1].cost.text / 2);
  qtr_engine_close(e);
  assert_int_equal(heads.n_heads, LAYERS * HEADS);
  struct qtr_sparse_options sparse = half(heads.value);
  double dense = found(NULL, 1024, 4), kept = found(&sparse, 1024, 4);
  sparse.token_budget = 512;
  double wide = found(&sparse, 2000, 3);
  double lost[LAYERS * HEADS];
  for (size_t i = 0; i < heads.n_heads; i++) lost[i] = 1 - heads.value[i];
  sparse = half(lost);
  double without = found(&sparse, 1024, 4);
  print_message(
      "needles found: dense %.2f; half streaming, 256 tokens %.2f, 512 tokens at twice the length %.2f; the other "
      "half %.2f\n",
      dense, kept, wide, without);
  assert_true(dense >= 0.9 && kept >= 0.8 && wide >= 0.8);
  assert_true(without <= 0.2);
  qtr_calibrate_free(&heads);
}

/* ---- the same tokens -------------------------------------------------------------------------------- */

struct answer {
  int32_t token[TOKENS], n;
  enum qtr_finish finish;
};
static struct answer alone[N], together[N];
static bool cut_off[N]; /* in one of the runs a given token of the prompt was alone in a chunk: other bits on GPUs */

static size_t prompt_length(int i) { return 2 + (size_t)(i * 311) % (LONGEST - 1); } /* 899 different ones */

/* Prompt i: 2 … 900 tokens of a kind. */
static size_t make_prompt(int i, int32_t *prompt) {
  size_t n = prompt_length(i);
  for (size_t k = 0; k < n; k++) prompt[k] = 100 + (int32_t)((k * 7919 + (size_t)i * 104729) % 7000);
  return n;
}

static uint64_t add(struct qtr_engine *e, int i, struct answer *a) {
  int32_t prompt[LONGEST + 2];
  struct qtr_request_options o;
  struct qtr_error err = {0};
  uint64_t id;
  qtr_request_options_init(&o);
  o.prompt_token = prompt;
  o.n_prompt_token = make_prompt(i, prompt);
  o.max_tokens = TOKENS;
  o.ignore_eos = true;
  o.sampling.temperature = i % 2 ? 0.8f : 0;
  o.sampling.has_seed = true;
  o.sampling.seed = 7;
  o.user = a;
  *a = (struct answer){0};
  if (qtr_engine_add(e, &o, &id, &err)) fail_msg("%s", err.message);
  return id;
}

static bool step(struct qtr_engine *e) {
  struct qtr_error err = {0};
  struct qtr_event event;
  bool work;
  if (qtr_engine_step(e, &work, &err)) fail_msg("%s", err.message);
  for (int pass = 0; pass < QTR_STEPS_UNDER_WAY; pass++) { /* this step's, and perhaps the next one's */
    const struct qtr_batch *b = &e->pass[pass].batch;
    for (int32_t s = 0; s < b->n_seqs; s++) {
      if (QTR_MIN(b->decode_start[s] - b->kv_len[s], b->q_start[s + 1] - b->q_start[s]) != 1) continue;
      for (int i = 0; i < N; i++) cut_off[i] = cut_off[i] || prompt_length(i) == (size_t)b->decode_start[s];
    }
  }
  while (qtr_engine_poll(e, &event)) {
    struct answer *a = event.user;
    if (event.token >= 0) a->token[a->n++] = event.token;
    a->finish = event.finish;
  }
  return work;
}

static void assert_all_free(struct qtr_engine *e) {
  struct qtr_stats stats;
  assert_idle(e);
  qtr_engine_stats(e, &stats);
  assert_int_equal(stats.n_stream_pages_used, 0);
}

/* stride: of those compared. */
static void assert_same(int stride, const char *what) {
  int n_compared = 0;
  for (int i = 0; i < N; i += stride) {
    const struct answer *a = &alone[i], *b = &together[i];
    if (b->finish == QTR_FINISH_CANCELLED) continue;
    assert_int_equal(b->n, TOKENS);
    if (cut_off[i]) continue;
    n_compared++;
    for (int k = 0; k < TOKENS; k++) {
      if (a->token[k] != b->token[k])
        fail_msg("request %d %s: token %d is %d, alone %d", i, what, k, b->token[k], a->token[k]);
    }
  }
  print_message("%s: %d requests compared\n", what, n_compared);
  assert_true(n_compared >= N / stride / 3);
}

static void check_same(const struct qtr_sparse_options *sparse) {
  enum { STRIDE = 9 };
  struct qtr_error err = {0};
  struct qtr_stats stats;
  uint64_t id[N];
  struct qtr_engine *e = open_engine(sparse, N * 16, N);
  for (int i = 0; i < N; i += STRIDE) {
    (void)add(e, i, &alone[i]);
    while (step(e)) {
    }
  }
  assert_all_free(e);
  for (int i = 0; i < N; i++) (void)add(e, i, &together[i]);
  while (step(e)) {
  }
  assert_same(STRIDE, "among others");
  assert_all_free(e);
  for (int i = 0; i < N; i++) id[i] = add(e, i, &together[i]);
  for (int k = 0; k < 60; k++) { /* a third is cancelled, none of those compared, while it waits, reads or generates */
    (void)step(e);
    if (k % 3 == 0)
      for (int i = k + 1; i < N; i += 60) (void)qtr_engine_cancel(e, id[i], &err);
  }
  while (step(e)) {
  }
  assert_same(STRIDE, "among others that are cancelled");
  assert_all_free(e);
  qtr_engine_close(e);

  e = open_engine(sparse, 60, 32);
  for (int i = 0; i < N; i++) (void)add(e, i, &together[i]);
  while (step(e)) {
  }
  qtr_engine_stats(e, &stats);
  print_message("%llu preemptions\n", (unsigned long long)stats.n_preemptions);
  assert_true(stats.n_preemptions > 0);
  assert_same(STRIDE, "through a small pool");
  assert_all_free(e);
  qtr_engine_close(e);
}

static void test_the_same_tokens(void **unused) {
  (void)unused;
  double heads[LAYERS * HEADS];
  for (int i = 0; i < LAYERS * HEADS; i++) heads[i] = (i * 7 % 32) / 32.0;
  struct qtr_sparse_options sparse = half(heads);
  check_same(&sparse);
  sparse = half(NULL);
  sparse.each_head = true;
  sparse.selector_interval = 3;
  check_same(&sparse);
}

/* Without preemption: a dense engine that computes generated tokens again takes another kernel for them. */
static void test_a_large_budget_is_dense(void **unused) {
  (void)unused;
  struct qtr_sparse_options sparse = half(NULL);
  sparse.token_budget = 2048;
  for (int k = 0; k < 2; k++) {
    struct qtr_engine *e = open_engine(k ? &sparse : NULL, N * 16, N);
    for (int i = 0; i < N; i++) (void)add(e, i, k ? &together[i] : &alone[i]);
    while (step(e)) {
    }
    assert_all_free(e);
    qtr_engine_close(e);
  }
  assert_same(1, "with a large budget, not as of a dense engine");
}

int main(int argc, char **argv) {
  struct qtr_backend *b;
  struct qtr_error err = {0};
  if (argc > 1) device = argv[1]; /* the test itself can be tried where there is no GPU; slow */
  enum qtr_status status = qtr_backend_open(device, NULL, &b, &err);
  if (status == QTR_ERR_UNSUPPORTED || status == QTR_ERR_NOT_FOUND) {
    (void)fprintf(stderr, "skipped: %s\n", err.message);
    return 77;
  }
  if (status) {
    (void)fprintf(stderr, "%s\n", err.message);
    return 1;
  }
  qtr_backend_close(b);
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_the_same_tokens), cmocka_unit_test(test_a_large_budget_is_dense),
                                     cmocka_unit_test(test_needles)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
