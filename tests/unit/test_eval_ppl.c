/* test_eval_ppl.c - perplexity against a naive evaluation, token by token, of the same random model; the counts of the speed
 * protocol. */
#include "base/checked.h"
#include "engine/engine_internal.h"
#include "eval/bench.h"
#include "eval/ppl.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { VOCAB = 96, CTX = 80 };

static const char config_text[] =
    "{\"architectures\":[\"LlamaForCausalLM\"],\"model_type\":\"llama\",\"hidden_size\":64,\"intermediate_size\":128,"
    "\"num_hidden_layers\":2,\"num_attention_heads\":4,\"num_key_value_heads\":2,\"head_dim\":32,\"vocab_size\":96,"
    "\"max_position_embeddings\":256,\"rms_norm_eps\":1e-5}";

static struct qtr_engine *open_engine(int32_t max_num_seqs) {
  struct qtr_error err = {0};
  struct qtr_config config;
  struct qtr_backend *backend;
  struct qtr_model *model;
  struct qtr_engine *engine;
  struct qtr_engine_options options;
  const struct qtr_backend_options backend_options = {.threads = 2};
  const struct qtr_model_options model_options = {.quiet = true};
  assert_int_equal(qtr_config_parse(config_text, sizeof config_text - 1, NULL, 0, &config, &err), QTR_OK);
  assert_int_equal(qtr_backend_open("reference", &backend_options, &backend, &err), QTR_OK);
  assert_int_equal(qtr_model_random(&config, QTR_LINEAR_F32, false, 5, backend, &model_options, &model, &err), QTR_OK);
  qtr_engine_options_init(&options);
  options.precision = "w16a16kv16";
  options.kv_pages = 64;
  options.max_num_seqs = max_num_seqs;
  options.max_num_batched_tokens = 512;
  options.no_prefix_cache = true;
  if (qtr_engine_open_model(model, NULL, NULL, &options, &engine, &err)) fail_msg("%s", err.message);
  return engine;
}

/* Each token in a step of its own, the softmax in long double. */
static double naive_nll(struct qtr_engine *e, const int32_t *token, size_t n) {
  struct qtr_error err;
  int32_t page[] = {7, 3}; /* any pages */
  const int32_t q_start[] = {0, 1}, row[] = {0};
  long double sum = 0;
  for (size_t i = 0; i + 1 < n; i++) {
    int32_t position = (int32_t)i;
    const struct qtr_batch batch = {.n_tokens = 1,
                                    .n_seqs = 1,
                                    .n_logit_rows = 1,
                                    .max_blocks = 2,
                                    .token = token + i,
                                    .position = &position,
                                    .q_start = q_start,
                                    .kv_len = &position,
                                    .block_table = page,
                                    .logit_row = row};
    const float *logits;
    assert_int_equal(qtr_model_forward(e->model, e->kv, e->workspace, &batch, &logits, &err), QTR_OK);
    long double total = 0;
    for (int k = 0; k < VOCAB; k++) total += expl((long double)logits[k]);
    sum += logl(total) - (long double)logits[token[i + 1]];
  }
  return (double)sum;
}

static void ppl_equals_naive(void **state) {
  (void)state;
  struct qtr_engine *e = open_engine(4);
  struct qtr_error err;
  struct qtr_ppl_result result;
  int32_t token[3 * CTX - 1];
  size_t n = sizeof token / sizeof *token; /* the third window is one short: dropped */
  for (size_t i = 0; i < n; i++) token[i] = (int32_t)((i * i * 31 + 7 * i) % VOCAB);
  const struct qtr_ppl_options options = {.ctx = CTX, .quiet = true};
  assert_int_equal(qtr_ppl_run(e, token, n, &options, &result, &err), QTR_OK);
  assert_int_equal(result.n_windows, 2);
  assert_int_equal(result.n_tokens, n);
  assert_int_equal(result.n_scored, 2 * (CTX - 1));
  double expected = (naive_nll(e, token, CTX) + naive_nll(e, token + CTX, CTX)) / (2 * (CTX - 1));
  assert_true(fabs(result.mean_nll - expected) < 1e-6 * expected);
  assert_true(fabs(result.perplexity - exp(expected)) < 1e-5 * exp(expected));
  assert_true(result.perplexity > VOCAB / 3.0); /* a random model knows nothing */
  const struct qtr_ppl_options one = {.ctx = CTX, .max_windows = 1, .quiet = true};
  assert_int_equal(qtr_ppl_run(e, token, n, &one, &result, &err), QTR_OK);
  assert_int_equal(result.n_windows, 1);
  assert_true(fabs(result.mean_nll - naive_nll(e, token, CTX) / (CTX - 1)) < 1e-6);
  qtr_engine_close(e);
}

static void ppl_refuses(void **state) {
  (void)state;
  struct qtr_engine *e = open_engine(4);
  struct qtr_error err;
  struct qtr_ppl_result result;
  int32_t token[CTX] = {0};
  struct qtr_ppl_options options = {.ctx = CTX, .quiet = true};
  assert_int_equal(qtr_ppl_run(e, token, CTX - 1, &options, &result, &err), QTR_ERR_LIMIT);
  token[5] = VOCAB;
  assert_int_equal(qtr_ppl_run(e, token, CTX, &options, &result, &err), QTR_ERR_FORMAT);
  token[5] = -1;
  assert_int_equal(qtr_ppl_run(e, token, CTX, &options, &result, &err), QTR_ERR_FORMAT);
  token[5] = 1;
  static const int32_t lengths[] = {257, 1, 0, -5};
  for (size_t i = 0; i < 4; i++) {
    options.ctx = lengths[i];
    assert_int_equal(qtr_ppl_run(e, token, CTX, &options, &result, &err), QTR_ERR_ARGUMENT);
  }
  qtr_engine_close(e);
}

static void newlines(void **state) {
  (void)state;
  static const struct {
    const char *in, *out;
  } cases[] = {{"a\r\nb", "a\nb"}, {"a\rb\r", "a\nb\n"}, {"\r\r\n\n", "\n\n\n"}, {"plain\n", "plain\n"}, {"", ""}};
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    char text[16];
    strcpy(text, cases[i].in);
    size_t n = qtr_ppl_normalize_newlines(text, strlen(text));
    assert_int_equal(n, strlen(cases[i].out));
    assert_memory_equal(text, cases[i].out, n);
  }
}

static void bench_counts(void **state) {
  (void)state;
  struct qtr_engine *e = open_engine(3);
  struct qtr_error err;
  struct qtr_bench_round round;
  const struct qtr_bench_options options = {.batch = 3, .prompt_len = 50, .gen_len = 7, .seed = 1, .quiet = true};
  for (int i = 0; i < 2; i++) {
    struct qtr_stats before, after;
    qtr_engine_stats(e, &before);
    assert_int_equal(qtr_bench_round_run(e, &options, &round, &err), QTR_OK);
    qtr_engine_stats(e, &after);
    assert_int_equal(after.n_output_tokens - before.n_output_tokens, 3 * 7);
    assert_int_equal(after.n_prompt_tokens - before.n_prompt_tokens, 3 * 50);
    assert_int_equal(round.n_decode_steps, 6); /* all prompts fit one step, which yields the first tokens */
    assert_true(round.prefill_s > 0 && round.prefill_s < round.seconds);
    assert_true(fabs(round.throughput_tok_s * round.seconds - 21) < 1e-6);
    assert_true(fabs(round.decode_tok_s * round.decode_ms_per_step - 3000) < 1e-6);
  }
  struct qtr_bench_options settled = options;
  settled.settle = 4;
  assert_int_equal(qtr_bench_round_run(e, &settled, &round, &err), QTR_OK);
  assert_int_equal(round.n_decode_steps, 2);
  settled.settle = 6;
  assert_int_equal(qtr_bench_round_run(e, &settled, &round, &err), QTR_OK);
  assert_true(isnan(round.decode_ms_per_step) && round.n_decode_steps == 0);
  /* Prompts of 200 tokens in steps of 512: the first generates while the last are read, and holds on until all have. */
  struct qtr_engine *wide = open_engine(3);
  struct qtr_bench_options held = {.batch = 3, .prompt_len = 200, .gen_len = 3, .slack = 9, .settle = 1, .quiet = true};
  assert_int_equal(qtr_bench_round_run(wide, &held, &round, &err), QTR_OK);
  assert_int_equal(round.n_decode_steps, 1);
  held.gen_len = 1;
  assert_int_equal(qtr_bench_round_run(wide, &held, &round, &err), QTR_OK);
  assert_int_equal(round.n_decode_steps, 0);
  held.gen_len = 2; /* without it the first has ended when the last one begins */
  held.settle = 0;
  assert_int_equal(qtr_bench_round_run(wide, &held, &round, &err), QTR_OK);
  assert_int_equal(round.n_decode_steps, 1);
  held.slack = 0;
  assert_int_equal(qtr_bench_round_run(wide, &held, &round, &err), QTR_OK);
  assert_int_equal(round.n_decode_steps, 0);
  struct qtr_stats stats;
  qtr_engine_stats(wide, &stats);
  assert_int_equal(stats.n_running + stats.n_waiting + stats.n_pages_used, 0);
  qtr_engine_close(wide);
  const struct qtr_bench_options single = {.batch = 1, .prompt_len = 5, .gen_len = 1, .quiet = true};
  assert_int_equal(qtr_bench_round_run(e, &single, &round, &err), QTR_OK);
  assert_true(isnan(round.decode_ms_per_step) && round.n_decode_steps == 0);
  const struct qtr_bench_options too_long = {.batch = 1, .prompt_len = 500, .gen_len = 1, .quiet = true};
  assert_int_equal(qtr_bench_round_run(e, &too_long, &round, &err), QTR_ERR_LIMIT);
  qtr_engine_close(e);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(ppl_equals_naive), cmocka_unit_test(ppl_refuses),
                                     cmocka_unit_test(newlines), cmocka_unit_test(bench_counts)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
