/* The forward pass against transformers: fp32 logits of the demo model (bf16 weights, from outside the repository) and of
 * tiny random models of each family (tests/golden/families, made by make_families.py), on every CPU backend. */
#include "base/file.h"
#include "model_run.h"
#include "shared.h"

#include <dirent.h>
#include <jansson.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const char *const devices[] = {"reference", "cpu"};

static struct qtr_model *load(const char *dir, const char *device, int32_t max_len, struct qtr_backend **backend) {
  struct qtr_error err;
  struct qtr_model *model;
  const struct qtr_backend_options options = {.threads = 2};
  const struct qtr_model_options model_options = {.max_len = max_len, .quiet = true};
  must(qtr_backend_open(device, &options, backend, &err), &err);
  must(qtr_model_load(dir, *backend, &model_options, &model, &err), &err);
  return model;
}

/* Largest difference relative to the largest logit, and the rows' relative error in the Euclidean norm. */
static void compare(const char *what, const float *got, const float *want, size_t n, double tolerance) {
  double worst = 0, largest = 0, error = 0, norm = 0;
  for (size_t i = 0; i < n; i++) {
    double d = fabs((double)got[i] - (double)want[i]);
    if (!(d <= worst)) worst = d; /* NaN counts */
    if (fabs((double)want[i]) > largest) largest = fabs((double)want[i]);
    error += d * d;
    norm += (double)want[i] * (double)want[i];
  }
  print_message("%s: largest difference %.2e, relative %.2e\n", what, worst / largest, sqrt(error / norm));
  if (!(worst <= tolerance * largest) || !(error <= tolerance * tolerance * norm)) fail_msg("%s differs", what);
}

/* Where the logits of some tokens are wanted, the last layer ends with these (forward.c): their bits are those that they
 * have where all are wanted. */
static void compare_few(const char *what, struct qtr_model *model, const int32_t *token, int32_t n, int32_t n_rows,
                        int32_t chunk) {
  size_t vocab = (size_t)model->config.vocab_size, row_bytes = vocab * sizeof(float);
  float *all = run(model, token, n, n, chunk), *few = run(model, token, n, n_rows, chunk);
  if (memcmp(all + (size_t)(n - n_rows) * vocab, few, (size_t)n_rows * row_bytes))
    fail_msg("%s: the logits of %d of %d tokens differ from those among all", what, n_rows, n);
  free(all);
  free(few);
}

static void test_demo_model(void **state) {
  (void)state;
  const char *found = qtr_test_shared("models/demo-bf16");
  if (!found) skip();
  char dir[4096];
  (void)snprintf(dir, sizeof dir, "%s", found);
  struct qtr_error err;
  json_t *golden = json_load_file(QTR_SOURCE_DIR "/tests/golden/demo/tokens.json", 0, NULL);
  json_t *tokens = json_object_get(golden, "tokens");
  int32_t n = (int32_t)json_array_size(tokens), token[256];
  assert_in_range(n, 1, 256);
  for (int32_t i = 0; i < n; i++) token[i] = (int32_t)json_integer_value(json_array_get(tokens, (size_t)i));
  json_decref(golden);
  struct qtr_map want;
  must(qtr_map_open(QTR_SOURCE_DIR "/tests/golden/demo/logits.f32", &want, &err), &err);
  size_t n_logits = want.n_bytes / sizeof(float);
  for (size_t d = 0; d < sizeof devices / sizeof devices[0]; d++) {
    struct qtr_backend *backend;
    struct qtr_model *model = load(dir, devices[d], 0, &backend);
    assert_int_equal(n_logits, 4 * model->config.vocab_size);
    float *whole = run(model, token, n, 4, n), *chunked = run(model, token, n, 4, 7);
    compare(devices[d], whole, (const float *)(const void *)want.data, n_logits, 1e-3);
    assert_memory_equal(whole, chunked, n_logits * sizeof *whole); /* chunks change nothing, not even a bit */
    free(whole);
    free(chunked);
    qtr_model_free(model);
    qtr_backend_close(backend);
  }
  qtr_map_close(&want);
}

/* golden.json: {"tokens": […], "logits": [[…] for the last rows], "max_len": N or absent} */
static void check_family(const char *name) {
  char path[4096], dir[2048];
  (void)snprintf(dir, sizeof dir, "%s/tests/golden/families/%s", QTR_SOURCE_DIR, name);
  (void)snprintf(path, sizeof path, "%s/golden.json", dir);
  json_t *golden = json_load_file(path, 0, NULL);
  if (!golden) fail_msg("cannot read %s", path);
  json_t *tokens = json_object_get(golden, "tokens"), *rows = json_object_get(golden, "logits");
  int32_t n = (int32_t)json_array_size(tokens), n_rows = (int32_t)json_array_size(rows);
  size_t vocab = json_array_size(json_array_get(rows, 0)), n_logits = (size_t)n_rows * vocab;
  assert_true(n > 0 && n_rows > 0 && vocab > 0);
  int32_t *token = malloc((size_t)n * sizeof *token);
  float *want = malloc(n_logits * sizeof *want);
  assert_true(token && want);
  for (int32_t i = 0; i < n; i++) token[i] = (int32_t)json_integer_value(json_array_get(tokens, (size_t)i));
  for (size_t i = 0; i < n_logits; i++) {
    want[i] = (float)json_number_value(json_array_get(json_array_get(rows, i / vocab), i % vocab));
  }
  int32_t max_len = (int32_t)json_integer_value(json_object_get(golden, "max_len"));
  json_decref(golden);
  for (size_t d = 0; d < sizeof devices / sizeof devices[0]; d++) {
    struct qtr_backend *backend;
    struct qtr_model *model = load(dir, devices[d], max_len, &backend);
    assert_int_equal(vocab, model->config.vocab_size);
    float *whole = run(model, token, n, n_rows, n), *chunked = run(model, token, n, n_rows, 5);
    (void)snprintf(path, sizeof path, "%s on %s", name, devices[d]);
    compare(path, whole, want, n_logits, 1e-3);
    assert_memory_equal(whole, chunked, n_logits * sizeof *whole);
    compare_few(path, model, token, n, n_rows, n);
    free(whole);
    free(chunked);
    qtr_model_free(model);
    qtr_backend_close(backend);
  }
  free(token);
  free(want);
}

static void test_families(void **state) {
  (void)state;
  DIR *folder = opendir(QTR_SOURCE_DIR "/tests/golden/families");
  assert_non_null(folder);
  int n_found = 0;
  struct dirent *entry;
  while ((entry = readdir(folder)) != NULL) {
    if (entry->d_name[0] == '.' || entry->d_type == DT_REG) continue;
    check_family(entry->d_name);
    n_found++;
  }
  (void)closedir(folder);
  assert_true(n_found >= 6);
}

static void test_few_rows_of_quantised_weights(void **state) {
  (void)state;
  enum { N = 150 };
  int32_t token[N];
  for (int32_t i = 0; i < N; i++) token[i] = 10 + (i * 131 + i / 7) % 8000;
  for (size_t d = 0; d < sizeof devices / sizeof devices[0]; d++) {
    struct qtr_backend *backend;
    struct qtr_model *model = load(QTR_SOURCE_DIR "/models/demo", devices[d], 0, &backend);
    compare_few(devices[d], model, token, N, 1, N);
    compare_few(devices[d], model, token, N, 5, 64); /* a chunk of which nobody wants any */
    qtr_model_free(model);
    qtr_backend_close(backend);
  }
}

static void test_precision_names(void **state) {
  (void)state;
  struct qtr_error err;
  struct qtr_precision p;
  assert_int_equal(qtr_precision_parse("W4A8KV4", &p, &err), QTR_OK);
  assert_true(p.weight_bits == 4 && p.act_bits == 8 && p.kv_bits == 4);
  assert_int_equal(qtr_precision_parse("w8a8", &p, &err), QTR_OK);
  assert_int_equal(p.kv_bits, 8);
  assert_int_equal(qtr_precision_parse("w16a16", &p, &err), QTR_OK);
  assert_int_equal(p.kv_bits, 16);
  static const char *const bad[] = {"",     "w4",      "w4a4", "w4a8kv", "w4a8kv5", "w4a8kv4x", "w4a8kv44444444444",
                                    "a8w4", "w4a8 kv4"};
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    assert_int_equal(qtr_precision_parse(bad[i], &p, &err), QTR_ERR_ARGUMENT);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_precision_names),
      cmocka_unit_test(test_families),
      cmocka_unit_test(test_few_rows_of_quantised_weights),
      cmocka_unit_test(test_demo_model),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
