/* One behaviour of the engine at a time: what is refused and how, seeds, log-probabilities, completions that share a prompt,
 * priorities, cancelling, decode first, the full context, and failing devices. The thousand-request test mixes them. */
#include "engine_fixture.h"

#include <math.h>

#define MOST 64

struct run {
  int32_t token[MOST][1100];
  int32_t n[MOST], n_cached[MOST];
  float logprob[MOST][64];
  struct qtr_token_logprob top[MOST][64][3];
  enum qtr_finish finish[MOST];
  int order[MOST]; /* slots in the order they ended */
  int n_ended;
};
static struct run run;

static int32_t prompt_a[1100];

static int setup(void **unused) {
  (void)unused;
  for (int i = 0; i < 1100; i++) prompt_a[i] = 10 + (i * 37 + i / 7) % (TINY_VOCAB - 10);
  return 0;
}

/* Slot of an event: the `user` number plus the completion. */
static void take_events(struct qtr_engine *engine) {
  struct qtr_event e;
  while (qtr_engine_poll(engine, &e)) {
    size_t slot = (size_t)(uintptr_t)e.user + (size_t)e.index;
    assert_int_equal(run.finish[slot], QTR_FINISH_NONE);
    if (e.token >= 0) {
      int32_t at = run.n[slot]++;
      run.token[slot][at] = e.token;
      if (at < 64) {
        run.logprob[slot][at] = e.logprob;
        for (int i = 0; i < QTR_MIN(e.n_top_logprob, 3); i++) run.top[slot][at][i] = e.top_logprob[i];
      }
    }
    assert_int_equal(e.n_output_tokens, run.n[slot]);
    run.n_cached[slot] = e.n_cached_tokens;
    run.finish[slot] = e.finish;
    if (e.finish) run.order[run.n_ended++] = (int)slot;
  }
}

static struct qtr_request_options request(int slot, int32_t n_prompt, int32_t max_tokens) {
  struct qtr_request_options o;
  qtr_request_options_init(&o);
  o.prompt_token = prompt_a;
  o.n_prompt_token = (size_t)n_prompt;
  o.max_tokens = max_tokens;
  o.user = (void *)(uintptr_t)slot;
  o.sampling.temperature = 0;
  o.ignore_eos = true;
  return o;
}

static uint64_t add(struct qtr_engine *engine, const struct qtr_request_options *o) {
  uint64_t id = 0;
  struct qtr_error err = {0};
  if (qtr_engine_add(engine, o, &id, &err)) fail_msg("%s", err.message);
  assert_true(id > 0);
  return id;
}

static bool step(struct qtr_engine *engine) {
  bool work = tiny_step(engine);
  take_events(engine);
  return work;
}

static struct qtr_engine *start(const struct qtr_engine_options *o) {
  memset(&run, 0, sizeof run);
  return tiny_engine(tiny_model(QTR_LINEAR_F32), o);
}

static void finish(struct qtr_engine *engine) {
  while (step(engine)) continue;
  assert_idle(engine);
  qtr_engine_close(engine);
}

/* ---- refusals ---- */

static void refused(struct qtr_engine *engine, const struct qtr_request_options *o, enum qtr_status status,
                    const char *words) {
  struct qtr_error err = {0};
  uint64_t id = 77;
  assert_int_equal(qtr_engine_add(engine, o, &id, &err), status);
  assert_int_equal(err.status, status);
  if (!strstr(err.message, words)) fail_msg("\"%s\" does not say \"%s\"", err.message, words);
  assert_int_equal(id, 0);
}

static void test_refused_requests(void **unused) {
  (void)unused;
  struct qtr_engine *engine = start(&(struct qtr_engine_options){.kv_pages = 3});
  struct qtr_request_options o = request(0, 192, 1);
  refused(engine, &o, QTR_ERR_LIMIT, "192 tokens and max_model_len is 192");
  o = request(0, 1000, 1);
  refused(engine, &o, QTR_ERR_LIMIT, "1000 tokens");
  o = request(0, 0, 1);
  refused(engine, &o, QTR_ERR_ARGUMENT, "empty");
  o.prompt_token = NULL;
  o.n_prompt_token = 5;
  refused(engine, &o, QTR_ERR_ARGUMENT, "NULL");
  const int32_t bad[] = {1, TINY_VOCAB}, negative[] = {-1};
  o = request(0, 2, 1);
  o.prompt_token = bad;
  refused(engine, &o, QTR_ERR_ARGUMENT, "token 1 is 256");
  o = request(0, 2, 1);
  o.prompt_token = negative;
  o.n_prompt_token = 1;
  refused(engine, &o, QTR_ERR_ARGUMENT, "token 0 is -1");
  o = request(0, 2, 1);
  o.prompt = "text";
  o.prompt_len = 4;
  refused(engine, &o, QTR_ERR_NOT_FOUND, "tokenizer");
  o = request(0, 2, -1);
  refused(engine, &o, QTR_ERR_ARGUMENT, "max_tokens is -1");
  o = request(0, 2, 1);
  o.n = 65;
  refused(engine, &o, QTR_ERR_ARGUMENT, "n is 65");
  o.n = -1;
  refused(engine, &o, QTR_ERR_ARGUMENT, "n is -1");
  o = request(0, 2, 1);
  o.logprobs = 21;
  refused(engine, &o, QTR_ERR_ARGUMENT, "logprobs is 21");
  o.logprobs = -2;
  refused(engine, &o, QTR_ERR_ARGUMENT, "logprobs is -2");
  o = request(0, 2, 1);
  const char *stop[17] = {"x"};
  o.stop = stop;
  o.n_stop = 17;
  refused(engine, &o, QTR_ERR_ARGUMENT, "stop has 17 entries");
  o.n_stop = 1;
  refused(engine, &o, QTR_ERR_ARGUMENT, "tokenizer");
  o = request(0, 2, 1);
  o.stop_token = negative;
  o.n_stop_token = 1;
  refused(engine, &o, QTR_ERR_ARGUMENT, "stop_token[0] is -1");
  o.stop_token = prompt_a;
  o.n_stop_token = 65;
  refused(engine, &o, QTR_ERR_ARGUMENT, "stop_token has 65");
  o.stop_token = NULL;
  o.n_stop_token = 1;
  refused(engine, &o, QTR_ERR_ARGUMENT, "stop_token is NULL");
  o = request(0, 2, 1);
  struct qtr_logit_bias bias = {.token = TINY_VOCAB, .bias = 1};
  o.logit_bias = &bias;
  o.n_logit_bias = 1;
  refused(engine, &o, QTR_ERR_ARGUMENT, "token 256");
  bias = (struct qtr_logit_bias){.token = 1, .bias = NAN};
  refused(engine, &o, QTR_ERR_ARGUMENT, "logit_bias");
  bias.bias = -101;
  refused(engine, &o, QTR_ERR_ARGUMENT, "logit_bias");
  o.n_logit_bias = SIZE_MAX;
  refused(engine, &o, QTR_ERR_ARGUMENT, "logit_bias has");
  o = request(0, 2, 1);
  o.sampling.top_k = 0;
  refused(engine, &o, QTR_ERR_ARGUMENT, "top_k");
  finish(engine);
}

static void open_refused(enum qtr_linear_format format, const struct qtr_engine_options *o, enum qtr_status status,
                         const char *words) {
  struct qtr_model *model = tiny_model(format);
  struct qtr_backend *backend = model->backend;
  struct qtr_engine *engine = NULL;
  struct qtr_error err = {0};
  enum qtr_status got = qtr_engine_open_model(model, NULL, NULL, o, &engine, &err);
  if (got != status || !strstr(err.message, words))
    fail_msg("%s: \"%s\" does not say \"%s\"", qtr_status_name(got), err.message, words);
  assert_null(engine);
  qtr_model_free(model);
  qtr_backend_close(backend);
}

static void test_refused_options(void **unused) {
  (void)unused;
  open_refused(QTR_LINEAR_F32, &(struct qtr_engine_options){.kv_pages = 3, .max_model_len = 200}, QTR_ERR_LIMIT, "3 pages");
  open_refused(QTR_LINEAR_F32, &(struct qtr_engine_options){.kv_bytes = 100}, QTR_ERR_LIMIT, "0 pages");
  open_refused(QTR_LINEAR_F32, &(struct qtr_engine_options){.kv_pages = -1}, QTR_ERR_ARGUMENT, "kv_pages is -1");
  open_refused(QTR_LINEAR_F32, &(struct qtr_engine_options){.kv_pages = INT32_MAX}, QTR_ERR_LIMIT, "pages fit");
  open_refused(QTR_LINEAR_F32, &(struct qtr_engine_options){.kv_bytes = (size_t)1 << 50}, QTR_ERR_LIMIT, "(from kv_bytes)");
  open_refused(QTR_LINEAR_F32, &(struct qtr_engine_options){.max_num_seqs = 1 << 20}, QTR_ERR_ARGUMENT, "max_num_seqs");
  open_refused(QTR_LINEAR_F32, &(struct qtr_engine_options){.max_model_len = 4096}, QTR_ERR_ARGUMENT, "1024");
  open_refused(QTR_LINEAR_F32, &(struct qtr_engine_options){.precision = "w4a8kv4"}, QTR_ERR_ARGUMENT, "4-bit weights");
  open_refused(QTR_LINEAR_W8A8, &(struct qtr_engine_options){.precision = "w16a16"}, QTR_ERR_ARGUMENT, "w8a8");
  open_refused(QTR_LINEAR_W4A8, &(struct qtr_engine_options){.group_size = 128}, QTR_ERR_ARGUMENT, "group_size 128");
  open_refused(QTR_LINEAR_W4A8, &(struct qtr_engine_options){.group_size = 64}, QTR_ERR_ARGUMENT, "group_size is 64");
  open_refused(QTR_LINEAR_F32, &(struct qtr_engine_options){.precision = "w5"}, QTR_ERR_ARGUMENT, "precision");
  open_refused(QTR_LINEAR_F32, &(struct qtr_engine_options){.kv_scales = "dynamic"}, QTR_ERR_ARGUMENT, "kv_scales");
  open_refused(QTR_LINEAR_F32, &(struct qtr_engine_options){.kv_scales = "static"}, QTR_ERR_ARGUMENT, "no static KV scales");
  struct qtr_engine *engine;
  struct qtr_error err;
  assert_int_equal(qtr_engine_open(&(struct qtr_engine_options){0}, &engine, &err), QTR_ERR_ARGUMENT);
  assert_int_equal(qtr_engine_open(&(struct qtr_engine_options){.model_dir = "no such directory"}, &engine, &err),
                   QTR_ERR_NOT_FOUND);
}

/* The caller's number, then QServe's variables, then what fits; widths by the caller's word or by the weights. */
static void test_pool_and_formats(void **unused) {
  (void)unused;
  static const struct {
    enum qtr_linear_format format;
    const char *precision, *note, *found; /* asked for, said by the checkpoint, used */
    size_t token_bytes;                   /* 2 layers, K and V, 32 channels */
    int32_t group_size;
  } cases[] = {
      {QTR_LINEAR_F32, NULL, "", "w16a16kv16", 4 * 64, 0},         {QTR_LINEAR_F32, "w16a16kv4", "", "w16a16kv4", 4 * 20, 0},
      {QTR_LINEAR_W8A8, NULL, "", "w8a8kv8", 4 * 36, -1},          {QTR_LINEAR_W4A8, NULL, "", "w4a8kv8", 4 * 36, -1},
      {QTR_LINEAR_W4A8, "w4a8kv4", "", "w4a8kv4", 4 * 20, -1},     {QTR_LINEAR_W4A8, NULL, "w4a8kv4", "w4a8kv4", 4 * 20, -1},
      {QTR_LINEAR_W4A8, "w4a8", "w4a8kv4", "w4a8kv8", 4 * 36, -1},
  };
  struct qtr_engine_info info;
  struct qtr_stats stats;
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    struct qtr_model *model = tiny_model(cases[i].format);
    (void)snprintf(model->config.precision, sizeof model->config.precision, "%s", cases[i].note);
    struct qtr_engine *engine =
        tiny_engine(model, &(struct qtr_engine_options){.precision = cases[i].precision, .max_num_seqs = 3});
    qtr_engine_get_info(engine, &info);
    qtr_engine_stats(engine, &stats);
    assert_string_equal(info.precision, cases[i].found);
    assert_int_equal(info.group_size, cases[i].group_size);
    assert_int_equal(info.max_model_len, 1024);
    assert_int_equal(info.vocab_size, TINY_VOCAB);
    assert_int_equal(stats.kv_bytes_per_token, cases[i].token_bytes);
    assert_int_equal(stats.n_pages_total, 3 * 16); /* all that three sequences can use */
    assert_int_equal(stats.kv_pool_bytes, 48 * 64 * cases[i].token_bytes);
    qtr_engine_close(engine);
  }
  /* static scales, when the file has them and they are asked for */
  struct qtr_model *model = tiny_model(QTR_LINEAR_W8A8);
  model->static_kv_scale = malloc(4 * sizeof(float));
  assert_non_null(model->static_kv_scale);
  for (int i = 0; i < 4; i++) model->static_kv_scale[i] = 0.05f;
  struct qtr_engine *engine = tiny_engine(model, &(struct qtr_engine_options){.kv_scales = "static", .kv_pages = 16});
  qtr_engine_stats(engine, &stats);
  assert_int_equal(stats.kv_bytes_per_token, 4 * 32);
  qtr_engine_close(engine);

  assert_int_equal(setenv("NUM_GPU_PAGE_BLOCKS", "21", 1), 0);
  engine = tiny_engine(tiny_model(QTR_LINEAR_F32), &(struct qtr_engine_options){0});
  qtr_engine_stats(engine, &stats);
  assert_int_equal(stats.n_pages_total, 21);
  qtr_engine_close(engine);
  engine = tiny_engine(tiny_model(QTR_LINEAR_F32), &(struct qtr_engine_options){.kv_bytes = 20 * 64 * 256 + 5});
  qtr_engine_stats(engine, &stats);
  assert_int_equal(stats.n_pages_total, 20);
  qtr_engine_close(engine);
  assert_int_equal(setenv("NUM_GPU_PAGE_BLOCKS", "-4", 1), 0);
  open_refused(QTR_LINEAR_F32, &(struct qtr_engine_options){0}, QTR_ERR_ARGUMENT, "NUM_GPU_PAGE_BLOCKS is \"-4\"");
  assert_int_equal(unsetenv("NUM_GPU_PAGE_BLOCKS"), 0);
}

/* ---- tokens ---- */

static void test_seeds(void **unused) {
  (void)unused;
  struct qtr_engine *engine = start(&(struct qtr_engine_options){0});
  struct qtr_request_options o = request(0, 30, 40);
  o.sampling.temperature = 1;
  o.sampling.has_seed = true;
  o.sampling.seed = 5;
  o.n = 3;
  add(engine, &o);
  o.user = (void *)(uintptr_t)3;
  add(engine, &o); /* the same again */
  o.user = (void *)(uintptr_t)6;
  o.sampling.seed = 6;
  add(engine, &o);
  o.sampling.has_seed = false;
  o.n = 1;
  for (uintptr_t i = 9; i < 11; i++) {
    o.user = (void *)i;
    add(engine, &o);
  }
  while (step(engine)) continue;
  size_t n_bytes = 40 * sizeof(int32_t);
  for (int i = 0; i < 11; i++) assert_int_equal(run.n[i], 40);
  for (int i = 0; i < 3; i++) assert_memory_equal(run.token[i], run.token[3 + i], n_bytes);
  for (int i = 0; i < 11; i++) {
    for (int k = 0; k < i; k++) {
      if (i < 3 || i > 5 || k != i - 3) assert_true(memcmp(run.token[i], run.token[k], n_bytes) != 0);
    }
  }
  finish(engine);
}

/* Log-probabilities are those of one plain forward pass over prompt and output. */
static void test_logprobs(void **unused) {
  (void)unused;
  struct qtr_error err = {0};
  struct qtr_engine *engine =
      start(&(struct qtr_engine_options){.max_num_batched_tokens = 32, .max_num_seqs = 4, .kv_pages = 40});
  struct qtr_request_options o = request(0, 100, 30);
  o.logprobs = 3;
  o.sampling = (struct qtr_sampling){
      .temperature = 1.5f, .top_k = 20, .top_p = 0.9f, .repetition_penalty = 1.3f, .seed = 1, .has_seed = true};
  add(engine, &o);
  while (step(engine)) continue;
  assert_int_equal(run.n[0], 30);

  enum { N = 129, BLOCKS = 3 };
  static int32_t token[N], position[N], row[N];
  const int32_t q_start[2] = {0, N}, kv_len[1] = {0}, table[BLOCKS] = {2, 0, 1};
  for (int i = 0; i < N; i++) {
    token[i] = i < 100 ? prompt_a[i] : run.token[0][i - 100];
    position[i] = row[i] = i;
  }
  const struct qtr_batch batch = {.n_tokens = N,
                                  .n_seqs = 1,
                                  .n_logit_rows = N,
                                  .max_blocks = BLOCKS,
                                  .token = token,
                                  .position = position,
                                  .q_start = q_start,
                                  .kv_len = kv_len,
                                  .block_table = table,
                                  .logit_row = row};
  struct qtr_workspace *workspace = NULL;
  struct qtr_kv *kv = NULL;
  const struct qtr_kv_config config = {
      .format = QTR_KV_F16, .n_layers = 2, .n_kv_heads = 1, .head_dim = 32, .n_pages = BLOCKS};
  struct qtr_model *model = engine->model;
  const float *logits = NULL;
  if (qtr_workspace_create(model, N, N, &workspace, &err) ||
      model->backend->ops->kv_create(model->backend, &config, &kv, &err) ||
      qtr_model_forward(model, kv, workspace, &batch, &logits, &err)) {
    fail_msg("%s", err.message);
  }
  for (int i = 0; i < 30; i++) {
    const float *x = logits + (size_t)(99 + i) * TINY_VOCAB;
    long double sum = 0;
    int best = 0;
    for (int k = 0; k < TINY_VOCAB; k++) {
      sum += expl((long double)x[k]);
      if (x[k] > x[best]) best = k;
    }
    assert_true(fabsl((long double)x[run.token[0][i]] - logl(sum) - (long double)run.logprob[0][i]) < 1e-6L);
    assert_int_equal(run.top[0][i][0].token, best);
    assert_true(fabsl((long double)x[best] - logl(sum) - (long double)run.top[0][i][0].logprob) < 1e-6L);
    assert_true(run.top[0][i][0].logprob >= run.top[0][i][1].logprob &&
                run.top[0][i][1].logprob >= run.top[0][i][2].logprob);
  }
  model->backend->ops->kv_free(model->backend, kv);
  qtr_workspace_free(workspace);
  finish(engine);
}

/* max_tokens 0 fills the context: prompt and output together, and no more pages than that. */
static void test_full_context(void **unused) {
  (void)unused;
  struct qtr_engine *engine = start(&(struct qtr_engine_options){.kv_pages = 2});
  struct qtr_request_options o = request(0, 50, 0);
  add(engine, &o);
  o = request(1, 100, 1000); /* clamped */
  add(engine, &o);
  while (step(engine)) continue;
  assert_int_equal(run.n[0], 128 - 50);
  assert_int_equal(run.n[1], 128 - 100);
  assert_true(run.finish[0] == QTR_FINISH_LENGTH && run.finish[1] == QTR_FINISH_LENGTH);
  finish(engine);
}

static void test_eos_and_stop_tokens(void **unused) {
  (void)unused;
  struct qtr_engine *engine = start(&(struct qtr_engine_options){0});
  struct qtr_request_options o = request(0, 20, 100);
  o.sampling.temperature = 1;
  o.sampling.has_seed = true;
  add(engine, &o);
  while (step(engine)) continue;
  int32_t n_plain = run.n[0], first_eos = 0, *plain = run.token[0];
  while (first_eos < n_plain && plain[first_eos] >= TINY_EOS) first_eos++;
  assert_true(n_plain == 100 && first_eos < 99); /* ignored */
  o.user = (void *)(uintptr_t)1;
  o.ignore_eos = false;
  add(engine, &o);
  o.user = (void *)(uintptr_t)2;
  o.ignore_eos = true;
  o.stop_token = &plain[first_eos + 1];
  o.n_stop_token = 1;
  add(engine, &o);
  while (step(engine)) continue;
  assert_int_equal(run.n[1], first_eos + 1); /* counted, and told */
  assert_int_equal(run.finish[1], QTR_FINISH_STOP);
  assert_int_equal(run.finish[2], QTR_FINISH_STOP);
  int32_t first_stop = 0;
  while (plain[first_stop] != plain[first_eos + 1]) first_stop++;
  assert_int_equal(run.n[2], first_stop + 1);
  assert_memory_equal(plain, run.token[2], (size_t)run.n[2] * sizeof *plain);
  finish(engine);
}

/* ---- scheduling ---- */

/* Completions of one prompt compute it once; alone only the last page is theirs. */
static void test_completions_share(void **unused) {
  (void)unused;
  struct qtr_engine *engine = start(&(struct qtr_engine_options){.max_num_batched_tokens = 100, .max_num_seqs = 8});
  struct qtr_request_options o = request(0, 250, 5);
  o.n = 6;
  add(engine, &o);
  int n_steps = 0;
  struct qtr_stats stats;
  do {
    n_steps++;
    assert_true(engine->n_running == 0 || n_steps > 3 || engine->n_running == 1);
  } while (step(engine) && n_steps < 4 - steps_ahead());
  qtr_engine_stats(engine, &stats);
  assert_int_equal(stats.n_running, 3); /* 250 tokens in three steps; then 1, and of the others 58 and 41, make a hundred */
  while (step(engine)) {
    qtr_engine_stats(engine, &stats);
    assert_true(stats.n_pages_used <= 3 + 6);
  }
  for (int i = 0; i < 6; i++) {
    assert_int_equal(run.n[i], 5);
    assert_int_equal(run.n_cached[i], i == 0 ? 0 : 192);
    assert_memory_equal(run.token[i], run.token[0], 5 * sizeof(int32_t)); /* greedy */
  }
  finish(engine);
}

/* Two identical requests at once: both compute, then the pages of one serve both. */
static void test_identical_pages_merge(void **unused) {
  (void)unused;
  struct qtr_engine *engine = start(&(struct qtr_engine_options){.max_num_batched_tokens = 600});
  struct qtr_request_options o = request(0, 200, 50);
  add(engine, &o);
  o.user = (void *)(uintptr_t)1;
  add(engine, &o);
  (void)step(engine);
  struct qtr_stats stats;
  qtr_engine_stats(engine, &stats);
  assert_int_equal(stats.n_pages_used, 3 + 2);
  finish(engine);
  assert_memory_equal(run.token[0], run.token[1], 50 * sizeof(int32_t));
}

/* A long prompt goes in chunks, and what decodes gets its token in every step meanwhile. */
static void test_decode_first(void **unused) {
  (void)unused;
  struct qtr_engine *engine = start(&(struct qtr_engine_options){.max_num_batched_tokens = 32, .max_num_seqs = 8});
  struct qtr_request_options o = request(0, 10, 60);
  add(engine, &o);
  (void)step(engine);
  o = request(1, 900, 3);
  add(engine, &o);
  for (int i = 0; i < 29; i++) {
    assert_int_equal(run.n[1], 0);
    (void)step(engine);
    assert_int_equal(run.n[0], 2 + i);
    assert_int_equal(last_batch(engine)->n_tokens, 32);
  }
  for (int i = 0; i <= steps_ahead(); i++) (void)step(engine); /* 900 = 29 · 31 + 1 */
  assert_int_equal(run.n[1], 1);
  finish(engine);
}

static void test_priority_and_order(void **unused) {
  (void)unused;
  struct qtr_engine *engine = start(&(struct qtr_engine_options){.max_num_seqs = 1, .max_num_batched_tokens = 64});
  struct qtr_request_options o;
  for (int i = 0; i < 6; i++) {
    o = request(i, 20 + i, 10);
    o.priority = i == 4 ? 1 : i == 1 ? -1 : 0;
    add(engine, &o);
  }
  for (int i = 0; i < 5; i++) (void)step(engine);
  o = request(6, 30, 10); /* takes the place of the one that runs */
  o.priority = 7;
  add(engine, &o);
  while (step(engine)) continue;
  const int expected[] = {6, 4, 0, 2, 3, 5, 1};
  assert_int_equal(run.n_ended, 7);
  assert_memory_equal(run.order, expected, sizeof expected);
  struct qtr_stats stats;
  qtr_engine_stats(engine, &stats);
  assert_int_equal(stats.n_preemptions, 1);
  for (int i = 0; i < 7; i++) assert_int_equal(run.n[i], 10);
  finish(engine);
}

/* Equals that all need more than their share of the pool: they end in the order they came, so the oldest was never
 * preempted. */
static void test_nobody_starves(void **unused) {
  (void)unused;
  struct qtr_engine *engine = start(&(struct qtr_engine_options){.kv_pages = 5, .max_num_seqs = 16});
  for (int i = 0; i < 16; i++) {
    struct qtr_request_options o = request(i, 40, 200);
    add(engine, &o);
  }
  while (step(engine)) continue;
  struct qtr_stats stats;
  qtr_engine_stats(engine, &stats);
  assert_true(stats.n_preemptions > 10);
  for (int i = 0; i < 16; i++) {
    assert_int_equal(run.order[i], i);
    assert_memory_equal(run.token[i], run.token[0], 200 * sizeof(int32_t));
  }
  finish(engine);
}

static void test_cancel(void **unused) {
  (void)unused;
  struct qtr_engine *engine =
      start(&(struct qtr_engine_options){.max_num_seqs = 2, .max_num_batched_tokens = 500, .no_prefix_cache = true});
  struct qtr_request_options o = request(0, 100, 100);
  struct qtr_error err = {0};
  struct qtr_stats stats;
  o.n = 2;
  uint64_t running = add(engine, &o);
  o.user = (void *)(uintptr_t)2;
  uint64_t waiting = add(engine, &o);
  (void)step(engine);
  qtr_engine_stats(engine, &stats);
  assert_int_equal(stats.n_pages_used, 4);
  assert_int_equal(stats.n_waiting, 2);
  assert_int_equal(qtr_engine_cancel(engine, waiting, &err), QTR_OK);
  assert_int_equal(qtr_engine_cancel(engine, running, &err), QTR_OK);
  qtr_engine_stats(engine, &stats);
  assert_true(stats.n_pages_used == 0 && stats.n_running == 0 && stats.n_waiting == 0);
  take_events(engine);
  for (int i = 0; i < 4; i++) {
    assert_int_equal(run.finish[i], QTR_FINISH_CANCELLED);
    assert_int_equal(run.n[i], i < 2 ? 1 : 0);
  }
  assert_int_equal(qtr_engine_cancel(engine, running, &err), QTR_ERR_NOT_FOUND);
  assert_int_equal(qtr_engine_cancel(engine, 0, &err), QTR_ERR_NOT_FOUND);
  assert_int_equal(qtr_engine_cancel(engine, UINT64_MAX, &err), QTR_ERR_NOT_FOUND);
  bool work = true;
  assert_int_equal(qtr_engine_step(engine, &work, &err), QTR_OK); /* nothing to do is no error */
  assert_false(work);
  o = request(4, 100, 100);
  add(engine, &o);
  (void)step(engine);
  qtr_engine_close(engine); /* with a request under way */
}

/* ---- failing devices ---- */

static struct qtr_backend_ops broken_ops;
static int steps_left;
static size_t bad_rows;

static enum qtr_status failing_end(struct qtr_backend *b, struct qtr_error *err) {
  enum qtr_status status = qtr_backend_reference.end_step(b, err);
  if (steps_left-- > 0) return status;
  err->status = QTR_ERR_BACKEND;
  (void)snprintf(err->message, sizeof err->message, "the cable is loose");
  return QTR_ERR_BACKEND;
}

static void nan_linear(struct qtr_backend *b, const struct qtr_linear_args *args) {
  qtr_backend_reference.linear(b, args);
  if (args->epilogue != QTR_EPILOGUE_LOGITS) return;
  for (size_t i = 0; i < bad_rows * TINY_VOCAB; i++) ((float *)args->out)[i] = NAN;
}

static void test_device_fails(void **unused) {
  (void)unused;
  if (steps_ahead() > 0) skip(); /* test_engine_ahead does it */
  struct qtr_engine *engine = start(&(struct qtr_engine_options){.max_num_seqs = 2});
  struct qtr_error err = {0};
  bool work = true;
  uint64_t id;
  broken_ops = qtr_backend_reference;
  broken_ops.end_step = failing_end;
  engine->model->backend->ops = &broken_ops;
  steps_left = 3;
  for (int i = 0; i < 4; i++) {
    struct qtr_request_options o = request(i, 20, 50);
    add(engine, &o);
  }
  for (int i = 0; i < 3; i++) assert_true(step(engine));
  assert_int_equal(qtr_engine_step(engine, &work, &err), QTR_ERR_BACKEND);
  assert_false(work);
  assert_non_null(strstr(err.message, "the cable is loose"));
  take_events(engine);
  for (int i = 0; i < 4; i++) {
    assert_int_equal(run.finish[i], QTR_FINISH_ERROR);
    assert_int_equal(run.n[i], i < 2 ? 3 : 0);
  }
  assert_idle(engine);
  struct qtr_request_options o = request(0, 5, 5);
  assert_int_equal(qtr_engine_add(engine, &o, &id, &err), QTR_ERR_BACKEND);
  assert_int_equal(qtr_engine_step(engine, &work, &err), QTR_ERR_BACKEND);
  assert_non_null(strstr(err.message, "the cable is loose"));
  qtr_engine_close(engine);
}

/* A row without a finite logit ends its completion; the others do not notice. */
static void test_logits_without_numbers(void **unused) {
  (void)unused;
  struct qtr_engine *engine = start(&(struct qtr_engine_options){0});
  broken_ops = *engine->model->backend->ops;
  broken_ops.linear = nan_linear;
  bad_rows = 0;
  engine->model->backend->ops = &broken_ops;
  for (int i = 0; i < 3; i++) {
    struct qtr_request_options o = request(i, 20, 10);
    add(engine, &o);
  }
  for (int i = 0; i < 4; i++) (void)step(engine);
  bad_rows = 1;
  (void)step(engine);
  bad_rows = 0;
  while (step(engine)) continue;
  assert_int_equal(run.finish[0], QTR_FINISH_ERROR);
  assert_int_equal(run.n[0], 4 + steps_ahead());
  assert_true(run.finish[1] == QTR_FINISH_LENGTH && run.finish[2] == QTR_FINISH_LENGTH);
  assert_true(run.n[1] == 10 && run.n[2] == 10);
  finish(engine);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_refused_requests),
      cmocka_unit_test(test_refused_options),
      cmocka_unit_test(test_pool_and_formats),
      cmocka_unit_test(test_seeds),
      cmocka_unit_test(test_logprobs),
      cmocka_unit_test(test_full_context),
      cmocka_unit_test(test_eos_and_stop_tokens),
      cmocka_unit_test(test_completions_share),
      cmocka_unit_test(test_identical_pages_merge),
      cmocka_unit_test(test_decode_first),
      cmocka_unit_test(test_priority_and_order),
      cmocka_unit_test(test_nobody_starves),
      cmocka_unit_test(test_cancel),
      cmocka_unit_test(test_device_fails),
      cmocka_unit_test(test_logits_without_numbers),
  };
  return cmocka_run_group_tests(tests, setup, NULL);
}
