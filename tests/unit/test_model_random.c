/* Random weights of benchmarks: activations must look like a trained model's in what costs time and power. The values of a
 * row spread around zero and share no common part: with one, rows of codes become nearly constant, and a GPU at its power
 * limit multiplies such rows faster than any real ones. */
#include "base/checked.h"
#include "model/model.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

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

static void check(enum qtr_linear_format format) {
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
  const struct qtr_kv_config kv_config = {
      .format = QTR_KV_INT4, .n_layers = N_LAYERS, .n_kv_heads = 2, .head_dim = 128, .n_pages = 1};
  struct qtr_error err = {0};
  struct qtr_backend *b = NULL;
  struct qtr_model *model = NULL;
  struct qtr_workspace *workspace = NULL;
  struct qtr_kv *kv = NULL;
  const float *logits;
  int32_t token[N_TOKENS], position[N_TOKENS];
  const int32_t q_start[2] = {0, N_TOKENS}, zero[1] = {0};
  struct seen seen = {.least = INFINITY};
  const struct qtr_tap tap = {.see = see, .user = &seen};
  for (int32_t i = 0; i < N_TOKENS; i++) token[i] = i * 37 % 512, position[i] = i;
  if (qtr_backend_open("cpu", &backend_options, &b, &err) ||
      qtr_model_random(&config, format, false, 3, b, &options, &model, &err) ||
      qtr_workspace_create(model, N_TOKENS, 1, &workspace, &err) || b->ops->kv_create(b, &kv_config, &kv, &err))
    fail_msg("%s", err.message);
  model->tap = &tap;
  const struct qtr_batch batch = {.n_tokens = N_TOKENS,
                                  .n_seqs = 1,
                                  .n_logit_rows = 1,
                                  .max_blocks = 1,
                                  .token = token,
                                  .position = position,
                                  .q_start = q_start,
                                  .kv_len = zero,
                                  .block_table = zero,
                                  .logit_row = zero};
  if (qtr_model_forward(model, kv, workspace, &batch, &logits, &err)) fail_msg("%s", err.message);
  print_message("%s: rows of the residual stream %.2f to %.2f; common part", qtr_linear_format_name(format), seen.least,
                seen.most);
  for (int i = 0; i < N_POINTS; i++) print_message(" %.4f", seen.common[i] / seen.squares[i]);
  print_message("\n");
  assert_true(seen.least > 0.3 && seen.most < 3);
  for (int i = 0; i < N_POINTS; i++) assert_true(seen.common[i] < 0.02 * seen.squares[i]); /* 1/1024: nothing in common */
  b->ops->kv_free(b, kv);
  qtr_workspace_free(workspace);
  qtr_model_free(model);
  qtr_backend_close(b);
}

static void test_float(void **state) {
  (void)state;
  check(QTR_LINEAR_F32);
}
static void test_w8a8(void **state) {
  (void)state;
  check(QTR_LINEAR_W8A8);
}
static void test_per_channel(void **state) {
  (void)state;
  check(QTR_LINEAR_W4A8);
}
static void test_g128(void **state) {
  (void)state;
  check(QTR_LINEAR_W4A8_G128);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_float), cmocka_unit_test(test_w8a8),
                                     cmocka_unit_test(test_per_channel), cmocka_unit_test(test_g128)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
