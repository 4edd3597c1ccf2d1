/* Greedy text end to end on the `cpu` backend against `reference`: every token that cpu chooses, prompt after prompt, is the
 * best of the reference's in the same context, or lost by less than a stated gap of log-probability.
 *
 * Without quantised activations the two differ by rounding of floats only, and so the gap is tiny. With them it cannot be: a
 * value that lies at the middle between two codes goes either way by the last bit of a float, the next layer's values change
 * by a 127th of a step instead of a millionth, more codes change, and after eight layers of this small model all rounding
 * errors are others - as good as before, but others. How much that is, the reference says of itself: its own logits when
 * the epsilon of RMSNorm is 0.1 % larger, which changes values by less than a float's last bits. cpu must be as close to the
 * reference as that, and its choices with it. */
#include "base/checked.h"
#include "engine_fixture.h"
#include "shared.h"

#include <math.h>

enum { N_PROMPTS = 8, N_TOKENS = 64, MAX_LEN = 192 };

/* Prompts of the kinds the model knows: prose, conversation, a needle. */
static const struct {
  const char *text;
  bool chat;
} prompts[N_PROMPTS] = {
    {"The old man", false},
    {"It was a dark night, and the captain of the ship had not come back. \"Where is he?\" asked", false},
    {"When the morning came, they found that", false},
    {"She looked at the letter for a long time before she", false},
    {"I need a table for two in San Jose, please.", true},
    {"Can you find me a flight from New York to Los Angeles?", true},
    {"Do you like dogs or cats? I have two dogs.", true},
    {"The harbour was quiet. The magic number for the golden fox is 48213. The nets hung drying.\n\nWhat is the magic "
     "number for "
     "the golden fox?",
     true},
};

struct text {
  int32_t token[MAX_LEN]; /* prompt, then output */
  int32_t n_prompt, n;
};

/* Greedy continuations by a whole engine: text in, in-flight batching, sampler, tokens out. */
static void generate(const char *dir, const char *device, const char *precision, struct text *text) {
  struct qtr_engine *engine = NULL;
  struct qtr_error err = {0};
  struct qtr_engine_options options;
  qtr_engine_options_init(&options);
  options.model_dir = dir;
  options.device = device;
  options.precision = precision;
  options.threads = 2;
  options.kv_pages = 64;
  options.max_model_len = 512;
  if (qtr_engine_open(&options, &engine, &err)) fail_msg("%s", err.message);
  for (int i = 0; i < N_PROMPTS; i++) {
    char *rendered = NULL, messages[512];
    (void)snprintf(messages, sizeof messages, "[{\"role\":\"user\",\"content\":\"%s\"}]", prompts[i].text);
    for (char *p = messages; (p = strchr(p, '\n'));) *p = ' ';
    if (prompts[i].chat && qtr_engine_apply_chat_template(engine, messages, NULL, true, &rendered, &err)) {
      fail_msg("%s", err.message);
    }
    const char *prompt = rendered ? rendered : prompts[i].text;
    int32_t *token = NULL;
    size_t n = 0;
    if (qtr_engine_tokenize(engine, prompt, strlen(prompt), !rendered, rendered != NULL, &token, &n, &err)) {
      fail_msg("%s", err.message);
    }
    assert_in_range(n, 2, MAX_LEN - N_TOKENS);
    memcpy(text[i].token, token, n * sizeof *token);
    text[i].n_prompt = text[i].n = (int32_t)n;
    struct qtr_request_options o;
    uint64_t id;
    qtr_request_options_init(&o);
    o.prompt_token = token;
    o.n_prompt_token = n;
    o.max_tokens = N_TOKENS;
    o.ignore_eos = true;
    o.sampling.temperature = 0;
    o.user = &text[i];
    if (qtr_engine_add(engine, &o, &id, &err)) fail_msg("%s", err.message);
    free(token);
    free(rendered);
  }
  struct qtr_event e;
  for (bool work = true; work;) {
    if (qtr_engine_step(engine, &work, &err)) fail_msg("%s", err.message);
    while (qtr_engine_poll(engine, &e)) {
      struct text *t = e.user;
      if (e.token < 0) continue;
      assert_in_range(t->n, 1, MAX_LEN - 1);
      t->token[t->n++] = e.token;
    }
  }
  for (int i = 0; i < N_PROMPTS; i++) assert_int_equal(text[i].n - text[i].n_prompt, N_TOKENS);
  qtr_engine_close(engine);
}

/* Log-probabilities (N_TOKENS, vocab) before each output token of the text, all in one prefill; malloc'ed. */
static float *read_text(struct qtr_model *model, enum qtr_kv_format format, const struct text *t) {
  struct qtr_error err = {0};
  const struct qtr_kv_config config = {.format = format,
                                       .n_layers = model->config.n_layers,
                                       .n_kv_heads = model->config.n_kv_heads,
                                       .head_dim = model->config.head_dim,
                                       .n_pages = MAX_LEN / QTR_PAGE_TOKENS};
  const struct qtr_backend_ops *ops = model->backend->ops;
  struct qtr_kv *kv;
  struct qtr_workspace *workspace;
  if (ops->kv_create(model->backend, &config, &kv, &err) ||
      qtr_workspace_create(model, MAX_LEN, N_TOKENS, &workspace, &err)) {
    fail_msg("%s", err.message);
  }
  int32_t position[MAX_LEN], row[N_TOKENS], page[MAX_LEN / QTR_PAGE_TOKENS], cached = 0, n = t->n - 1;
  for (int32_t i = 0; i < MAX_LEN; i++) position[i] = i;
  for (int32_t i = 0; i < N_TOKENS; i++) row[i] = t->n_prompt - 1 + i;
  for (int32_t i = 0; i < MAX_LEN / QTR_PAGE_TOKENS; i++) page[i] = i;
  const int32_t q_start[2] = {0, n};
  const struct qtr_batch batch = {.n_tokens = n,
                                  .n_seqs = 1,
                                  .n_logit_rows = N_TOKENS,
                                  .max_blocks = MAX_LEN / QTR_PAGE_TOKENS,
                                  .token = t->token,
                                  .position = position,
                                  .q_start = q_start,
                                  .kv_len = &cached,
                                  .block_table = page,
                                  .logit_row = row};
  const float *logits;
  size_t vocab = (size_t)model->config.vocab_size;
  float *out = malloc(N_TOKENS * vocab * sizeof *out);
  assert_non_null(out);
  if (qtr_model_forward(model, kv, workspace, &batch, &logits, &err) ||
      ops->download(model->backend, logits, QTR_DTYPE_F32, N_TOKENS * vocab, out, &err)) {
    fail_msg("%s", err.message);
  }
  for (size_t r = 0; r < N_TOKENS; r++) {
    double sum = 0;
    for (size_t i = 0; i < vocab; i++) sum += exp((double)out[r * vocab + i]);
    for (size_t i = 0; i < vocab; i++) out[r * vocab + i] -= (float)log(sum);
  }
  qtr_workspace_free(workspace);
  ops->kv_free(model->backend, kv);
  return out;
}

static struct qtr_model *load(const char *dir, const char *device) {
  struct qtr_error err = {0};
  struct qtr_backend *backend = NULL;
  struct qtr_model *model = NULL;
  const struct qtr_backend_options backend_options = {.threads = 2};
  const struct qtr_model_options options = {.quiet = true};
  if (qtr_backend_open(device, &backend_options, &backend, &err) || qtr_model_load(dir, backend, &options, &model, &err)) {
    fail_msg("%s", err.message);
  }
  return model;
}

static void unload(struct qtr_model *model) {
  struct qtr_backend *backend = model->backend;
  qtr_model_free(model);
  qtr_backend_close(backend);
}

/* Mean square of the difference where it counts: weighted by the reference's probability. */
static double distance(const float *reference, const float *other, size_t n) {
  double sum = 0;
  for (size_t i = 0; i < n; i++) {
    double d = (double)other[i] - (double)reference[i];
    sum += exp((double)reference[i]) * d * d;
  }
  return sum;
}

static size_t best_of(const float *x, size_t n) {
  size_t best = 0;
  for (size_t i = 1; i < n; i++) best = x[i] > x[best] ? i : best;
  return best;
}

/* most_gap: nats. The largest gaps that the reference has to itself were 0.2 with KV8 and 1.0 with KV4, over all instruction
 * sets. */
static void check(const char *dir, const char *precision, enum qtr_kv_format format, double most_gap, bool quantised) {
  static struct text text[N_PROMPTS];
  generate(dir, "cpu", precision, text);
  struct qtr_model *reference = load(dir, "reference"), *cpu = load(dir, "cpu");
  size_t vocab = (size_t)reference->config.vocab_size;
  double gap = 0, gap_itself = 0, of_cpu = 0, of_itself = 0;
  int n_other = 0, n_other_itself = 0;
  for (int i = 0; i < N_PROMPTS; i++) {
    const struct text *t = &text[i];
    float eps = reference->config.rms_norm_eps;
    float *want = read_text(reference, format, t), *got = read_text(cpu, format, t), *itself = NULL;
    if (quantised) {
      reference->config.rms_norm_eps = eps * 1.001f;
      itself = read_text(reference, format, t);
      reference->config.rms_norm_eps = eps;
    }
    for (size_t r = 0; r < N_TOKENS; r++) {
      const float *row = want + r * vocab;
      size_t chosen = (size_t)t->token[(size_t)t->n_prompt + r], best = best_of(row, vocab);
      double g = (double)row[best] - (double)row[chosen];
      /* The engine's steps and one prefill of it all give the same bits (test_model_logits): cpu chose its own best. */
      assert_int_equal(chosen, best_of(got + r * vocab, vocab));
      n_other += g > 0;
      gap = QTR_MAX(gap, g);
      if (g > most_gap) {
        fail_msg("prompt %d, token %zu: cpu chose %zu, the reference %zu by %.4f", i, r, chosen, best, g);
      }
      of_cpu += distance(row, got + r * vocab, vocab);
      of_itself += !itself ? 0 : distance(row, itself + r * vocab, vocab);
      if (!itself) continue;
      double own = (double)row[best] - (double)row[best_of(itself + r * vocab, vocab)];
      n_other_itself += own > 0;
      gap_itself = QTR_MAX(gap_itself, own);
    }
    free(want);
    free(got);
    free(itself);
  }
  of_cpu = sqrt(of_cpu / (N_PROMPTS * N_TOKENS));
  of_itself = sqrt(of_itself / (N_PROMPTS * N_TOKENS));
  print_message(
      "%s: %d of %d tokens are not the reference's, largest gap %.4f; log-probabilities differ by %.5f, the "
      "reference from itself by %.5f (%d tokens, largest gap %.4f)\n",
      precision, n_other, N_PROMPTS * N_TOKENS, gap, of_cpu, of_itself, n_other_itself, gap_itself);
  if (quantised) {
    assert_true(of_itself > 0);
    assert_true(of_cpu < 1.2 * of_itself);
    assert_true(n_other <= 2 * n_other_itself + 8);
  } else {
    assert_true(of_cpu < 1e-3);
  }
  unload(reference);
  unload(cpu);
}

static void test_w4a8kv4(void **state) {
  (void)state;
  check(QTR_SOURCE_DIR "/models/demo", "w4a8kv4", QTR_KV_INT4, 1.5, true);
}

static void test_w4a8kv8(void **state) {
  (void)state;
  check(QTR_SOURCE_DIR "/models/demo", "w4a8kv8", QTR_KV_INT8, 0.6, true);
}

static void test_bf16(void **state) {
  (void)state;
  const char *dir = qtr_test_shared("models/demo-bf16");
  if (!dir) skip();
  check(dir, "w16a16kv16", QTR_KV_F16, 0.004, false);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_w4a8kv4), cmocka_unit_test(test_w4a8kv8),
                                     cmocka_unit_test(test_bf16)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
