/* Random weights of benchmarks: activations must look like a trained model's in what costs time and power. The values of a
 * row spread around zero and share no common part: with one, rows of codes become nearly constant, and a GPU at its power
 * limit multiplies such rows faster than any real ones. */
#include "base/checked.h"
#include "model_run.h"

#include <math.h>
#include <stdio.h>

enum { N_TOKENS = 64, N_LAYERS = 8, N_POINTS = QTR_TAP_LAYER_OUT + 1 };

struct seen {
  double common[N_POINTS], squares[N_POINTS]; /* sums over rows of mean^2, of mean square */
  double least, most;                         /* root of a row's mean square, residual stream */
};

static void see(void *user, enum qtr_tap_point point, int32_t layer, const float *x, size_t n_tokens, size_t dim) {
  struct seen *s = user;
  (void)layer;
  for (size_t t = 0; t < n_tokens; t++) {
    double sum = 0, squares = 0;
    for (size_t i = 0; i < dim; i++) {
      double v = (double)x[t * dim + i];
      sum += v;
      squares += v * v;
    }
    s->common[point] += sum / (double)dim * (sum / (double)dim);
    s->squares[point] += squares / (double)dim;
    if (point != QTR_TAP_LAYER_OUT) continue;
    s->least = QTR_MIN(s->least, sqrt(squares / (double)dim));
    s->most = QTR_MAX(s->most, sqrt(squares / (double)dim));
  }
}

static void test_activations(void **state) {
  enum qtr_linear_format format = *(const enum qtr_linear_format *)*state;
  struct qtr_config config = {.hidden_size = 1024,
                              .intermediate_size = 3584,
                              .n_layers = N_LAYERS,
                              .n_heads = 8,
                              .n_kv_heads = 2,
                              .head_dim = 128,
                              .max_position_embeddings = 1024,
                              .vocab_size = 512,
                              .rms_norm_eps = 1e-5f,
                              .rope_theta = 10000,
                              .bos_token = -1,
                              .pad_token = -1};
  (void)snprintf(config.architecture, sizeof config.architecture, "LlamaForCausalLM");
  const struct qtr_backend_options backend_options = {.threads = 2};
  const struct qtr_model_options options = {.quiet = true};
  struct qtr_error err = {0};
  struct qtr_backend *b = NULL;
  struct qtr_model *model = NULL;
  int32_t token[N_TOKENS];
  struct seen seen = {.least = INFINITY};
  const struct qtr_tap tap = {.see = see, .user = &seen};
  for (int32_t i = 0; i < N_TOKENS; i++) token[i] = i * 37 % 512;
  must(qtr_backend_open("cpu", &backend_options, &b, &err), &err);
  must(qtr_model_random(&config, format, false, 3, b, &options, &model, &err), &err);
  model->tap = &tap;
  free(run(model, token, N_TOKENS, 1, N_TOKENS));
  print_message("%s: rows of the residual stream %.2f to %.2f; common part", qtr_linear_format_name(format), seen.least,
                seen.most);
  for (int i = 0; i < N_POINTS; i++) print_message(" %.4f", seen.common[i] / seen.squares[i]);
  print_message("\n");
  assert_true(seen.least > 0.3 && seen.most < 3);
  for (int i = 0; i < N_POINTS; i++) assert_true(seen.common[i] < 0.02 * seen.squares[i]); /* 1/1024: nothing in common */
  qtr_model_free(model);
  qtr_backend_close(b);
}

int main(void) {
  static enum qtr_linear_format format[] = {QTR_LINEAR_F32, QTR_LINEAR_W8A8, QTR_LINEAR_W4A8, QTR_LINEAR_W4A8_G128};
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_prestate(test_activations, &format[0]), cmocka_unit_test_prestate(test_activations, &format[1]),
      cmocka_unit_test_prestate(test_activations, &format[2]), cmocka_unit_test_prestate(test_activations, &format[3])};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
