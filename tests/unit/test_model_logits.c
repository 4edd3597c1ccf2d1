/* The forward pass against transformers: fp32 logits of the demo model (bf16 weights, from outside the repository) and of
 * tiny random models of each family (tests/golden/families, made by make_families.py), on every CPU backend. */
#include "base/file.h"
#include "model/model.h"
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

static void must(enum qtr_status status, const struct qtr_error *err) {
  if (status) fail_msg("%s: %s", qtr_status_name(status), err->message);
}

static struct qtr_model *load(const char *dir, const char *device, int32_t max_len, struct qtr_backend **backend) {
  struct qtr_error err;
  struct qtr_model *model;
  const struct qtr_backend_options options = {.threads = 2};
  const struct qtr_model_options model_options = {.max_len = max_len, .quiet = true};
  must(qtr_backend_open(device, &options, backend, &err), &err);
  must(qtr_model_load(dir, *backend, &model_options, &model, &err), &err);
  return model;
}

/* Logits of the last n_rows of token[n], computed in prefill chunks of `chunk` tokens: (n_rows, vocab), malloc'ed. */
static float *run(struct qtr_model *model, const int32_t *token, int32_t n, int32_t n_rows, int32_t chunk) {
  struct qtr_error err;
  int32_t n_pages = (n + QTR_PAGE_TOKENS - 1) / QTR_PAGE_TOKENS;
  const struct qtr_kv_config config = {.format = QTR_KV_F16,
                                       .n_layers = model->config.n_layers,
                                       .n_kv_heads = model->config.n_kv_heads,
                                       .head_dim = model->config.head_dim,
                                       .n_pages = n_pages};
  struct qtr_backend *b = model->backend;
  struct qtr_kv *kv;
  struct qtr_workspace *workspace;
  must(b->ops->kv_create(b, &config, &kv, &err), &err);
  must(qtr_workspace_create(model, (size_t)chunk, (size_t)chunk, &workspace, &err), &err);
  size_t vocab = (size_t)model->config.vocab_size;
  float *out = calloc((size_t)n_rows, vocab * sizeof *out);
  int32_t *table = malloc((size_t)n_pages * sizeof *table), *position = malloc((size_t)n * sizeof *position);
  int32_t *row = malloc((size_t)n * sizeof *row);
  assert_true(out && table && position && row);
  for (int32_t i = 0; i < n_pages; i++) table[i] = n_pages - 1 - i; /* any order will do */
  for (int32_t i = 0; i < n; i++) position[i] = i;
  for (int32_t at = 0; at < n; at += chunk) {
    int32_t m = n - at < chunk ? n - at : chunk, q_start[2] = {0, m}, n_out = 0, first = -1;
    for (int32_t i = 0; i < m; i++) {
      if (at + i < n - n_rows) continue;
      if (first < 0) first = at + i;
      row[n_out++] = i;
    }
    const struct qtr_batch batch = {.n_tokens = m,
                                    .n_seqs = 1,
                                    .n_logit_rows = n_out,
                                    .max_blocks = n_pages,
                                    .token = token + at,
                                    .position = position + at,
                                    .q_start = q_start,
                                    .kv_len = &at,
                                    .block_table = table,
                                    .logit_row = row};
    const float *logits;
    must(qtr_model_forward(model, kv, workspace, &batch, &logits, &err), &err);
    if (n_out > 0) {
      must(b->ops->download(b, logits, QTR_DTYPE_F32, (size_t)n_out * vocab, out + (size_t)(first - (n - n_rows)) * vocab,
                            &err),
           &err);
    }
  }
  free(table);
  free(position);
  free(row);
  qtr_workspace_free(workspace);
  b->ops->kv_free(b, kv);
  return out;
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
      cmocka_unit_test(test_demo_model),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
