/* config.json of every family as real releases write it, what must be refused and by what name, and the rotary frequencies.
 */
#include "base/half.h"
#include "checkpoint/config.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define SIZES                                                                                                     \
  "\"hidden_size\": 4096, \"intermediate_size\": 11008, \"num_attention_heads\": 32, \"num_hidden_layers\": 32, " \
  "\"vocab_size\": 32000"

static enum qtr_status parse2(const char *json, const char *generation, struct qtr_config *c, struct qtr_error *err) {
  return qtr_config_parse(json, strlen(json), generation, generation ? strlen(generation) : 0, c, err);
}

static struct qtr_config parse(const char *json) {
  struct qtr_config c;
  struct qtr_error err = {0};
  if (parse2(json, NULL, &c, &err)) fail_msg("%s\n%s", err.message, json);
  return c;
}

static struct qtr_config parse_llama(const char *fields) {
  char json[4096];
  (void)snprintf(json, sizeof json, "{\"architectures\": [\"LlamaForCausalLM\"], " SIZES "%s%s}", fields[0] ? ", " : "",
                 fields);
  return parse(json);
}

/* The whole text must be refused with that status and a message that holds `word`. */
static void refuse(const char *json, enum qtr_status status, const char *word) {
  struct qtr_config c;
  struct qtr_error err = {0};
  enum qtr_status got = parse2(json, NULL, &c, &err);
  if (got != status)
    fail_msg("%s instead of %s (%s) for %s", qtr_status_name(got), qtr_status_name(status), err.message, json);
  if (!strstr(err.message, word)) fail_msg("\"%s\" does not name %s", err.message, word);
}

static void refuse_llama(const char *fields, enum qtr_status status, const char *word) {
  char json[4096];
  (void)snprintf(json, sizeof json, "{\"architectures\": [\"LlamaForCausalLM\"], " SIZES ", %s}", fields);
  refuse(json, status, word);
}

static void near(double got, double want, double tolerance) {
  if (!(fabs(got - want) <= tolerance)) fail_msg("%.9g instead of %.9g", got, want);
}

static void test_llama1_defaults(void **state) {
  (void)state;
  struct qtr_config c =
      parse_llama("\"pad_token_id\": -1, \"bos_token_id\": 1, \"eos_token_id\": 2, \"torch_dtype\": \"float16\"");
  assert_string_equal(c.architecture, "LlamaForCausalLM");
  assert_string_equal(c.model_type, "llama");
  assert_int_equal(c.n_kv_heads, 32);
  assert_int_equal(c.head_dim, 128);
  assert_int_equal(c.max_position_embeddings, 2048);
  near((double)c.rms_norm_eps, 1e-6, 1e-12);
  assert_false(c.tie_word_embeddings);
  assert_false(c.qkv_bias || c.o_bias || c.mlp_bias);
  assert_int_equal(c.sliding_window, 0);
  assert_true(c.rope_theta == 10000.0);
  assert_int_equal(c.rope_scaling, QTR_ROPE_NONE);
  assert_int_equal(c.pad_token, -1);
  assert_int_equal(c.bos_token, 1);
  assert_int_equal(c.n_eos, 1);
  assert_int_equal(c.eos_token[0], 2);
  assert_string_equal(c.torch_dtype, "float16");
  assert_string_equal(c.precision, "");
}

static void test_llama31(void **state) {
  (void)state;
  const char *json =
      "{\"architectures\": [\"LlamaForCausalLM\"], \"attention_bias\": false, \"bos_token_id\": 128000, \"eos_token_id\": "
      "[128001, "
      "128008, 128009], \"hidden_act\": \"silu\", \"hidden_size\": 4096, \"intermediate_size\": 14336, "
      "\"max_position_embeddings\": 131072, \"mlp_bias\": false, \"model_type\": \"llama\", \"num_attention_heads\": 32, "
      "\"num_hidden_layers\": 32, \"num_key_value_heads\": 8, \"pretraining_tp\": 1, \"rms_norm_eps\": 1e-05, "
      "\"rope_scaling\": {\"factor\": 8.0, \"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0, "
      "\"original_max_position_embeddings\": 8192, \"rope_type\": \"llama3\"}, \"rope_theta\": 500000.0, "
      "\"tie_word_embeddings\": false, \"torch_dtype\": \"bfloat16\", \"vocab_size\": 128256}";
  struct qtr_config c;
  struct qtr_error err;
  assert_int_equal(parse2(json, "{\"eos_token_id\": [128009, 7], \"pad_token_id\": 5, \"bos_token_id\": 9}", &c, &err),
                   QTR_OK);
  assert_int_equal(c.rope_scaling, QTR_ROPE_LLAMA3);
  assert_true(c.rope_factor == 8 && c.rope_low_freq_factor == 1 && c.rope_high_freq_factor == 4);
  assert_int_equal(c.rope_original_max_position, 8192);
  assert_int_equal(c.n_kv_heads, 8);
  /* both files' ids, each once */
  assert_int_equal(c.n_eos, 4);
  assert_int_equal(c.eos_token[2], 128009);
  assert_int_equal(c.eos_token[3], 7);
  assert_int_equal(c.bos_token, 128000);
  assert_int_equal(c.pad_token, 5);
}

static void test_mistral(void **state) {
  (void)state;
#define MISTRAL "{\"architectures\": [\"MistralForCausalLM\"], \"model_type\": \"mistral\", " SIZES
  struct qtr_config c = parse(MISTRAL ", \"num_key_value_heads\": 8, \"sliding_window\": 4096, \"attention_bias\": true}");
  assert_string_equal(c.model_type, "mistral");
  assert_int_equal(c.sliding_window, 4096);
  assert_false(c.qkv_bias); /* Mistral has no such key */
  c = parse(MISTRAL ", \"sliding_window\": null, \"rope_theta\": 1000000}");
  assert_int_equal(c.sliding_window, 0);
  assert_int_equal(c.n_kv_heads, 8);
  assert_int_equal(c.max_position_embeddings, 131072);
  assert_true(c.rope_theta == 1e6);
  c = parse(MISTRAL "}");
  assert_int_equal(c.sliding_window, 4096);
}

static void test_qwen2(void **state) {
  (void)state;
#define QWEN2 "{\"architectures\": [\"Qwen2ForCausalLM\"], " SIZES
  struct qtr_config c =
      parse(QWEN2 ", \"use_sliding_window\": false, \"sliding_window\": 32768, \"max_window_layers\": 28}");
  assert_string_equal(c.model_type, "qwen2");
  assert_true(c.qkv_bias);
  assert_false(c.o_bias || c.mlp_bias || c.tie_word_embeddings);
  assert_int_equal(c.sliding_window, 0);
  assert_int_equal(c.max_position_embeddings, 32768);
  c = parse(QWEN2 ", \"use_sliding_window\": true, \"sliding_window\": 512, \"max_window_layers\": 28}");
  assert_int_equal(c.sliding_window, 512);
  c = parse(QWEN2 ", \"use_sliding_window\": true, \"sliding_window\": 512, \"max_window_layers\": 32}");
  assert_int_equal(c.sliding_window, 0);
  c = parse(QWEN2 ", \"use_sliding_window\": true, \"sliding_window\": 512, \"layer_types\": [\"full_attention\"]}");
  assert_int_equal(c.sliding_window, 0);
  c = parse("{\"model_type\": \"qwen2\", " SIZES ", \"tie_word_embeddings\": true}");
  assert_string_equal(c.architecture, "Qwen2ForCausalLM");
  assert_true(c.tie_word_embeddings);
}

static void test_explicit_head_dim(void **state) {
  (void)state;
  assert_int_equal(parse_llama("\"head_dim\": 64").head_dim, 64);
  assert_int_equal(parse_llama("\"head_dim\": null").head_dim, 128);
  refuse_llama("\"head_dim\": 65", QTR_ERR_UNSUPPORTED, "head_dim 65");
  refuse_llama("\"head_dim\": -2", QTR_ERR_FORMAT, "head_dim");
  refuse_llama("\"hidden_size\": 4100", QTR_ERR_FORMAT, "4100");
}

static void test_biases(void **state) {
  (void)state;
  struct qtr_config c = parse_llama("\"attention_bias\": true, \"mlp_bias\": true");
  assert_true(c.qkv_bias && c.o_bias && c.mlp_bias);
  refuse_llama("\"attention_bias\": 1", QTR_ERR_FORMAT, "attention_bias");
}

static void test_rope_spellings(void **state) {
  (void)state;
  struct qtr_config c = parse_llama("\"rope_scaling\": {\"type\": \"linear\", \"factor\": 8}");
  assert_int_equal(c.rope_scaling, QTR_ROPE_LINEAR);
  assert_true(c.rope_factor == 8);
  c = parse_llama("\"rope_scaling\": {\"rope_type\": \"dynamic\", \"type\": \"linear\", \"factor\": 2.5}");
  assert_int_equal(c.rope_scaling, QTR_ROPE_DYNAMIC);
  assert_int_equal(c.rope_original_max_position, 2048);
  c = parse_llama(
      "\"rope_theta\": 7, \"rope_parameters\": {\"rope_type\": \"linear\", \"factor\": 4, \"rope_theta\": 500000.0}");
  assert_int_equal(c.rope_scaling, QTR_ROPE_LINEAR);
  assert_true(c.rope_theta == 500000.0);
  c = parse_llama("\"rope_parameters\": {\"rope_type\": \"default\", \"rope_theta\": 1e6}");
  assert_int_equal(c.rope_scaling, QTR_ROPE_NONE);
  assert_true(c.rope_theta == 1e6);
  assert_int_equal(parse_llama("\"rope_scaling\": {\"type\": \"default\"}").rope_scaling, QTR_ROPE_NONE);
  assert_int_equal(parse_llama("\"rope_scaling\": {}").rope_scaling, QTR_ROPE_NONE);
  refuse_llama("\"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4}", QTR_ERR_UNSUPPORTED, "\"yarn\"");
  refuse_llama("\"rope_scaling\": {\"type\": \"longrope\"}", QTR_ERR_UNSUPPORTED, "\"longrope\"");
  refuse_llama("\"rope_scaling\": {\"type\": \"mrope\", \"mrope_section\": [1]}", QTR_ERR_UNSUPPORTED, "\"mrope\"");
  refuse_llama("\"rope_scaling\": {\"type\": \"linear\"}", QTR_ERR_FORMAT, "factor");
  refuse_llama("\"rope_scaling\": {\"factor\": 2}", QTR_ERR_FORMAT, "rope_type");
  refuse_llama("\"rope_scaling\": {\"type\": \"linear\", \"factor\": 0}", QTR_ERR_FORMAT, "factor");
  refuse_llama("\"rope_scaling\": 4", QTR_ERR_FORMAT, "rope_scaling");
  refuse_llama("\"rope_scaling\": {\"type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 4, \"high_freq_factor\": 4}",
               QTR_ERR_FORMAT, "high_freq_factor");
  refuse_llama("\"partial_rotary_factor\": 0.5", QTR_ERR_UNSUPPORTED, "partial_rotary_factor");
  refuse_llama("\"rope_theta\": 0", QTR_ERR_FORMAT, "rope_theta");
}

static void test_refusals_by_name(void **state) {
  (void)state;
  refuse("{\"architectures\": [\"MixtralForCausalLM\"], \"model_type\": \"mixtral\", " SIZES "}", QTR_ERR_UNSUPPORTED,
         "MixtralForCausalLM");
  refuse("{\"architectures\": [\"Gemma2ForCausalLM\"]}", QTR_ERR_UNSUPPORTED, "Gemma2ForCausalLM");
  refuse("{\"model_type\": \"gpt2\"}", QTR_ERR_UNSUPPORTED, "gpt2");
  refuse("{\"architectures\": []}", QTR_ERR_FORMAT, "architectures");
  refuse_llama("\"hidden_act\": \"gelu\"", QTR_ERR_UNSUPPORTED, "gelu");
  refuse_llama("\"quantization_config\": {\"quant_method\": \"gptq\", \"bits\": 4}", QTR_ERR_UNSUPPORTED, "\"gptq\"");
  refuse_llama("\"quantization_config\": {\"quant_method\": \"awq\"}", QTR_ERR_UNSUPPORTED, "needs conversion");
  refuse_llama("\"quantization_config\": {}", QTR_ERR_UNSUPPORTED, "unnamed");
  assert_string_equal(
      parse_llama("\"quantization_config\": {\"quant_method\": \"qoq\", \"precision\": \"w4a8kv4\"}").precision, "w4a8kv4");
  assert_string_equal(parse_llama("\"quantization_config\": null").precision, "");
}

static void test_malformed(void **state) {
  (void)state;
  refuse("", QTR_ERR_FORMAT, "JSON");
  refuse("[1]", QTR_ERR_FORMAT, "object");
  refuse("{\"architectures\": [\"LlamaForCausalLM\"", QTR_ERR_FORMAT, "line 1");
  refuse("{\"architectures\": [\"LlamaForCausalLM\"], \"hidden_size\": 1}", QTR_ERR_FORMAT, "intermediate_size");
  refuse_llama("\"num_key_value_heads\": 5", QTR_ERR_FORMAT, "5 key-value heads");
  refuse_llama("\"num_key_value_heads\": 0", QTR_ERR_FORMAT, "num_key_value_heads");
  refuse_llama("\"num_hidden_layers\": 1e3", QTR_ERR_FORMAT, "num_hidden_layers");
  refuse_llama("\"num_hidden_layers\": 100000000000000", QTR_ERR_FORMAT, "100000000000000");
  refuse_llama("\"num_hidden_layers\": 1000000000000000000000", QTR_ERR_FORMAT, "JSON");
  refuse_llama("\"vocab_size\": -1", QTR_ERR_FORMAT, "vocab_size");
  refuse_llama("\"hidden_size\": \"4096\"", QTR_ERR_FORMAT, "hidden_size");
  refuse_llama("\"rms_norm_eps\": -1", QTR_ERR_FORMAT, "rms_norm_eps");
  refuse_llama("\"eos_token_id\": \"</s>\"", QTR_ERR_FORMAT, "eos_token_id");
  refuse_llama("\"eos_token_id\": [1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17]", QTR_ERR_FORMAT, "more than 16");
  refuse_llama("\"max_position_embeddings\": 0", QTR_ERR_FORMAT, "max_position_embeddings");
  /* nesting is bounded by the parser */
  size_t n = 100000;
  char *deep = malloc(n + 1);
  assert_non_null(deep);
  memset(deep, '[', n);
  deep[n] = 0;
  refuse(deep, QTR_ERR_FORMAT, "JSON");
  free(deep);
  /* a NULL error is allowed everywhere */
  struct qtr_config c;
  assert_int_equal(parse2("{\"model_type\": \"gpt2\"}", NULL, &c, NULL), QTR_ERR_UNSUPPORTED);
  assert_int_equal(parse2("{", NULL, &c, NULL), QTR_ERR_FORMAT);
}

/* Frequencies by the definitions, in another arithmetic; torch agrees through tests/golden/families. */
static void test_inv_freq(void **state) {
  (void)state;
  float f[512];
  struct qtr_config c = parse_llama("\"head_dim\": 8");
  qtr_config_inv_freq(&c, 4096, f);
  near((double)f[0], 1, 0);
  near((double)f[1], 0.1, 1e-8);
  near((double)f[3], 0.001, 1e-10);

  c = parse_llama("\"head_dim\": 8, \"rope_scaling\": {\"type\": \"linear\", \"factor\": 4}");
  qtr_config_inv_freq(&c, 4096, f);
  near((double)f[1], 0.025, 1e-9);

  /* dynamic: plain up to max_position_embeddings = 2048; at 4096 with factor 2 the base grows by 3^(8/6) */
  c = parse_llama("\"head_dim\": 8, \"rope_scaling\": {\"type\": \"dynamic\", \"factor\": 2}");
  qtr_config_inv_freq(&c, 2048, f);
  near((double)f[1], 0.1, 1e-8);
  qtr_config_inv_freq(&c, 4096, f);
  near((double)f[1], 0.1 * exp(-log(3.0) / 3), 1e-8);
  near((double)f[3], 0.001 / 3, 1e-9);

  /* llama3: wavelengths 2π·10^k against 8192: 6.28 and 62.8 stay (below 8192/4), 628 stays, 6283 is blended */
  c = parse_llama(
      "\"head_dim\": 16, \"rope_theta\": 100000000, \"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8, "
      "\"low_freq_factor\": 1, \"high_freq_factor\": 4, \"original_max_position_embeddings\": 8192}");
  qtr_config_inv_freq(&c, 131072, f);
  near((double)f[2], 0.01, 1e-9);
  double smooth = (8192 * 0.001 / (2 * acos(-1.0)) - 1) / 3;
  near((double)f[3], (1 - smooth) * 0.001 / 8 + smooth * 0.001, 1e-10);
  near((double)f[4], 0.0001 / 8, 1e-11);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_llama1_defaults), cmocka_unit_test(test_llama31),           cmocka_unit_test(test_mistral),
      cmocka_unit_test(test_qwen2),           cmocka_unit_test(test_explicit_head_dim), cmocka_unit_test(test_biases),
      cmocka_unit_test(test_rope_spellings),  cmocka_unit_test(test_refusals_by_name),  cmocka_unit_test(test_malformed),
      cmocka_unit_test(test_inv_freq),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
