/* Files of static KV8 scales: every layout that is read, what is written, and what is refused. */
#include "base/file.h"
#include "checkpoint/kv_scales.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static const struct qtr_config config = {.n_layers = 2, .n_kv_heads = 4};

static struct qtr_kv_scales parse(const char *json) {
  struct qtr_kv_scales s;
  struct qtr_error err = {0};
  if (qtr_kv_scales_parse(json, strlen(json), &config, &s, &err)) fail_msg("%s: %s", json, err.message);
  assert_int_equal(s.n_layers, 2);
  return s;
}

static void near(double got, double want) {
  if (fabs(got - want) > 1e-6 * fabs(want)) fail_msg("%.9g, not %.9g", got, want);
}

#define INT8(k, v) "{\"kv_cache\": {\"dtype\": \"int8\", \"scaling_factor\": {\"k_scale\": " k ", \"v_scale\": " v "}}}"
#define EIGHT "{\"0\": 1, \"1\": 2, \"2\": 3, \"3\": 4, \"4\": 0.5, \"5\": 0.25, \"6\": 8, \"7\": 7}"

static void test_layouts(void **state) {
  (void)state;
  struct qtr_kv_scales s = parse(INT8("{\"0\": 0.5, \"1\": [0.25]}", "{\"0\": {\"0\": 2}, \"1\": 3}"));
  assert_int_equal(s.n_heads, 1);
  near((double)qtr_kv_scales_tensor(&s, 0, 0), 0.5);
  near((double)qtr_kv_scales_tensor(&s, 1, 0), 0.25);
  near((double)qtr_kv_scales_tensor(&s, 0, 1), 2);
  near((double)qtr_kv_scales_tensor(&s, 1, 1), 3);
  qtr_kv_scales_free(&s);
  /* heads, and two values a head: the larger one */
  s = parse(INT8("{\"0\": [1, 2, 3, 4], \"1\": " EIGHT "}", "{\"0\": [4, 3, 2, 1], \"1\": [1, 1, 1, 1]}"));
  assert_int_equal(s.n_heads, 4);
  const float want[] = {1, 2, 3, 4, 4, 3, 2, 1, 2, 4, 0.5f, 8, 1, 1, 1, 1};
  assert_memory_equal(s.scale, want, sizeof want);
  near((double)qtr_kv_scales_tensor(&s, 1, 0), 8);
  qtr_kv_scales_free(&s);
  /* one layer by heads and another as a whole: wholes */
  s = parse(INT8("{\"0\": [1, 2, 3, 4], \"1\": 5}", "{\"0\": 1, \"1\": 1}"));
  assert_int_equal(s.n_heads, 1);
  near((double)qtr_kv_scales_tensor(&s, 0, 0), 4);
  qtr_kv_scales_free(&s);
  /* vLLM's fp8: two ranks, K and V alike */
  s = parse(
      "{\"model_type\": \"llama\", \"kv_cache\": {\"dtype\": \"float8_e4m3fn\", \"scaling_factor\": "
      "{\"0\": {\"0\": 0.0127, \"1\": 0.02}, \"1\": {\"0\": 0.01, \"1\": 0.03}}}}");
  near((double)qtr_kv_scales_tensor(&s, 0, 0), 0.0127 * 448 / 127);
  near((double)qtr_kv_scales_tensor(&s, 0, 1), 0.0127 * 448 / 127);
  near((double)qtr_kv_scales_tensor(&s, 1, 1), 0.03 * 448 / 127);
  qtr_kv_scales_free(&s);
}

static void test_refusals(void **state) {
  (void)state;
  const struct {
    const char *json, *word;
  } cases[] = {
      {"", "no JSON"},
      {"{}", "kv_cache.dtype"},
      {"[1]", "kv_cache.dtype"},
      {"{\"kv_cache\": {\"dtype\": \"int4\", \"scaling_factor\": {}}}", "\"int4\""},
      {INT8("{\"0\": 1, \"1\": 1}", "{\"0\": 1}"), "\"v_scale\" has no layer 1 of 2"},
      {INT8("{\"0\": 1, \"1\": 1, \"2\": 1}", "{\"0\": 1, \"1\": 1}"), "\"k_scale\" has 3 layers"},
      {INT8("[1, 1]", "{\"0\": 1, \"1\": 1}"), "no object \"k_scale\""},
      {INT8("{\"0\": 0, \"1\": 1}", "{\"0\": 1, \"1\": 1}"), "layer 0, value 0"},
      {INT8("{\"0\": 1, \"1\": -1}", "{\"0\": 1, \"1\": 1}"), "layer 1, value 0"},
      {INT8("{\"0\": 1e-9, \"1\": 1}", "{\"0\": 1, \"1\": 1}"), "that fp16 holds"},
      {INT8("{\"0\": 1e6, \"1\": 1}", "{\"0\": 1, \"1\": 1}"), "that fp16 holds"},
      {INT8("{\"0\": [], \"1\": 1}", "{\"0\": 1, \"1\": 1}"), "0 values in layer 0"},
      {INT8("{\"0\": \"x\", \"1\": 1}", "{\"0\": 1, \"1\": 1}"), "no positive number"},
      {INT8("{\"0\": {\"0\": 1, \"7\": 1}, \"1\": 1}", "{\"0\": 1, \"1\": 1}"), "layer 0, value 1"},
      {INT8("{\"0\": 1, \"1\": 1}", "{\"0\": 1, \"1\": 1}, \"k_zero_point\": {\"0\": 0, \"1\": [0, 1]}"), "symmetric"},
      {"{\"kv_cache\": {\"dtype\": \"float8_e4m3fn\", \"scaling_factor\": {}}}", "no ranks"},
      {"{\"kv_cache\": {\"dtype\": \"float8_e4m3fn\", \"scaling_factor\": {\"0\": {\"0\": 1}}}}", "rank 0\" has no layer 1"},
      {"{\"kv_cache\": {\"dtype\": \"float8_e4m3fn\", \"scaling_factor\": {\"0\": {\"0\": 1, \"1\": -1}}}}",
       "rank 0, layer 1"}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct qtr_kv_scales s;
    struct qtr_error err = {0};
    enum qtr_status status = qtr_kv_scales_parse(cases[i].json, strlen(cases[i].json), &config, &s, &err);
    if (!status || !strstr(err.message, cases[i].word)) {
      fail_msg("%s: %s \"%s\", not %s", cases[i].json, qtr_status_name(status), err.message, cases[i].word);
    }
    assert_null(s.scale);
  }
}

static void put(const char *dir, const char *name, const void *data, size_t n) {
  char *path = qtr_path_join(dir, name);
  assert_int_equal(qtr_file_write(path, data, n, NULL), QTR_OK);
  free(path);
}

static void test_files(void **state) {
  (void)state;
  char dir[] = "qtr-kv-XXXXXX", command[64];
  assert_non_null(mkdtemp(dir));
  char *path = qtr_path_join(dir, "out.json");
  struct qtr_kv_scales s, again;
  struct qtr_error err = {0};
  /* written and read: the same, per tensor and per head */
  float values[16];
  for (int i = 0; i < 16; i++) values[i] = 0.001234567f * (float)(i + 1);
  for (int32_t heads = 1; heads <= 4; heads += 3) {
    s = (struct qtr_kv_scales){.n_layers = 2, .n_heads = heads, .scale = values};
    assert_int_equal(qtr_kv_scales_write(path, "llama", &s, &err), QTR_OK);
    if (qtr_kv_scales_read(path, &config, &again, &err)) fail_msg("%s", err.message);
    assert_int_equal(again.n_heads, heads);
    assert_memory_equal(again.scale, values, (size_t)heads * 4 * sizeof *values);
    qtr_kv_scales_free(&again);
  }
  assert_int_not_equal(qtr_kv_scales_read(dir, &config, &again, &err), QTR_OK);
  assert_non_null(strstr(err.message, "layers.0.past_kv_scale.0.weight"));
  /* LMDeploy: without and with zero points, a second rank */
  const float pair[2] = {0.5f, 0.25f}, four[4] = {0.125f, 0, 2, 0}, rank[2] = {0.75f, 0.125f}, zero[4] = {1, 3, 1, 0};
  put(dir, "layers.0.past_kv_scale.0.weight", pair, sizeof pair);
  put(dir, "layers.0.past_kv_scale.1.weight", rank, sizeof rank);
  put(dir, "layers.1.past_kv_scale.0.weight", four, sizeof four);
  if (qtr_kv_scales_read(dir, &config, &s, &err)) fail_msg("%s", err.message);
  const float want[] = {0.75f, 0.25f, 0.125f, 2};
  assert_memory_equal(s.scale, want, sizeof want);
  qtr_kv_scales_free(&s);
  put(dir, "layers.1.past_kv_scale.0.weight", zero, sizeof zero);
  assert_int_equal(qtr_kv_scales_read(dir, &config, &s, &err), QTR_ERR_FORMAT);
  put(dir, "layers.1.past_kv_scale.0.weight", zero, 7);
  assert_int_equal(qtr_kv_scales_read(dir, &config, &s, &err), QTR_ERR_FORMAT);
  assert_null(s.scale);
  /* vLLM's name inside a directory comes first */
  const char *json = INT8("{\"0\": 1, \"1\": 1}", "{\"0\": 1, \"1\": 1}");
  put(dir, "kv_cache_scales.json", json, strlen(json));
  assert_int_equal(qtr_kv_scales_read(dir, &config, &s, &err), QTR_OK);
  near((double)qtr_kv_scales_tensor(&s, 0, 0), 1);
  qtr_kv_scales_free(&s);
  free(path);
  (void)snprintf(command, sizeof command, "rm -r %s", dir);
  assert_int_equal(system(command), 0);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_layouts), cmocka_unit_test(test_refusals),
                                     cmocka_unit_test(test_files)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
