/* test_eval_compare.c - comparing two models against a naive comparison, token by token and in long double; a model against
 * itself; models in different bases. */
#include "engine_fixture.h"
#include "eval/compare.h"

#include <math.h>

enum { WINDOW = 70, N = 2 * WINDOW + 30, SCORED = 2 * (WINDOW - 1), HIDDEN = 32, STATES = 3, BLOCK = 32 };

/* One window, a token in a step of its own. */
struct naive {
  float logits[WINDOW][TINY_VOCAB];
  float state[STATES][WINDOW][HIDDEN];
};

static struct qtr_engine *open_engine(uint64_t seed, const char *precision) {
  struct qtr_engine_options options;
  qtr_engine_options_init(&options);
  options.precision = precision;
  options.kv_pages = 20;
  return tiny_engine(tiny_model_seeded("reference", QTR_LINEAR_F32, seed), &options);
}

static void run_naive(struct qtr_engine *e, const int32_t *token, struct naive *out) {
  struct qtr_error err;
  struct qtr_workspace *workspace;
  const int32_t q_start[] = {0, 1}, row[] = {0}, page[] = {4, 9};
  assert_int_equal(qtr_workspace_create(e->model, 1, 1, &workspace, &err), QTR_OK);
  assert_int_equal(qtr_workspace_keep_states(e->model, workspace, &err), QTR_OK);
  for (int32_t i = 0; i < WINDOW; i++) {
    const struct qtr_batch batch = {.n_tokens = 1,
                                    .n_seqs = 1,
                                    .n_logit_rows = 1,
                                    .max_blocks = 2,
                                    .token = token + i,
                                    .position = &i,
                                    .q_start = q_start,
                                    .kv_len = &i,
                                    .block_table = page,
                                    .logit_row = row};
    const float *logits;
    assert_int_equal(qtr_model_forward(e->model, e->kv, workspace, &batch, &logits, &err), QTR_OK);
    memcpy(out->logits[i], logits, sizeof out->logits[i]);
    for (size_t s = 0; s < STATES; s++) memcpy(out->state[s][i], qtr_workspace_state(workspace, s), sizeof out->state[s][i]);
  }
  qtr_workspace_free(workspace);
}

static long double log_p(const float *logits, int32_t token) {
  long double sum = 0;
  for (int i = 0; i < TINY_VOCAB; i++) sum += expl((long double)logits[i]);
  return (long double)logits[token] - logl(sum);
}

static long double product(const float *x, const float *y) {
  long double sum = 0;
  for (int i = 0; i < HIDDEN; i++) sum += (long double)x[i] * (long double)y[i];
  return sum;
}

static int by_size(const void *x, const void *y) {
  double a = *(const double *)x, b = *(const double *)y;
  return (a > b) - (a < b);
}

static bool near(double x, double y, double tolerance) { return fabs(x - y) <= tolerance * fmax(fabs(x), fabs(y)) + 1e-12; }

static void make_tokens(int32_t *token) {
  for (int32_t i = 0; i < N; i++) token[i] = (i * i * 31 + 7 * i) % TINY_VOCAB;
}

/* Compares, and checks every figure but the quantiles' interpolation against the definitions. */
static void check_against_naive(struct qtr_engine *a, struct qtr_engine *b, bool same_basis) {
  static struct naive na, nb;
  struct qtr_compare_result r;
  struct qtr_error err;
  int32_t token[N];
  make_tokens(token);
  const struct qtr_compare_options options = {.window = WINDOW, .layers = true, .quiet = true};
  if (qtr_compare_run(a, b, token, N, &options, &r, &err)) fail_msg("%s", err.message);
  assert_int_equal(r.n_windows, 2);
  assert_int_equal(r.n_scored, SCORED);
  assert_int_equal(r.n_layers, STATES - 1);
  assert_int_equal(r.same_basis, same_basis);

  double kl[SCORED], error[STATES] = {0}, ratio[STATES] = {0}, cosine[STATES] = {0}, worst = -1;
  long double nll_a = 0, nll_b = 0, kl_sum = 0;
  size_t n = 0, n_same = 0, n_pairs = 0, worst_index = 0;
  for (size_t w = 0; w < 2; w++) {
    run_naive(a, token + w * WINDOW, &na);
    run_naive(b, token + w * WINDOW, &nb);
    for (size_t i = 0; i + 1 < WINDOW; i++) {
      long double divergence = 0;
      int32_t best_a = 0, best_b = 0, next = token[w * WINDOW + i + 1];
      for (int32_t k = 0; k < TINY_VOCAB; k++) {
        long double la = log_p(na.logits[i], k), lb = log_p(nb.logits[i], k);
        divergence += expl(la) * (la - lb);
        best_a = na.logits[i][k] > na.logits[i][best_a] ? k : best_a;
        best_b = nb.logits[i][k] > nb.logits[i][best_b] ? k : best_b;
      }
      nll_a -= log_p(na.logits[i], next);
      nll_b -= log_p(nb.logits[i], next);
      kl_sum += divergence;
      n_same += best_a == best_b;
      kl[n] = (double)divergence;
      if (kl[n] > worst) worst = kl[n], worst_index = w * WINDOW + i + 1;
      n++;
      for (size_t j = i / BLOCK * BLOCK; j < i; j++) n_pairs++;
      for (size_t s = 0; s < STATES; s++) {
        const float *x = na.state[s][i], *y = nb.state[s][i];
        float apart[HIDDEN];
        for (int d = 0; d < HIDDEN; d++) apart[d] = x[d] - y[d];
        error[s] += (double)sqrtl(product(apart, apart) / product(x, x));
        ratio[s] += (double)sqrtl(product(y, y) / product(x, x));
        for (size_t j = i / BLOCK * BLOCK; j < i; j++) {
          const float *xj = na.state[s][j], *yj = nb.state[s][j];
          long double c = product(x, xj) / sqrtl(product(x, x) * product(xj, xj)) -
                          product(y, yj) / sqrtl(product(y, y) * product(yj, yj));
          cosine[s] += (double)(c * c);
        }
      }
    }
  }
  assert_true(near(r.perplexity_a, (double)expl(nll_a / SCORED), 1e-6));
  assert_true(near(r.perplexity_b, (double)expl(nll_b / SCORED), 1e-6));
  assert_true(near(r.kl_mean, (double)(kl_sum / SCORED), 1e-4));
  assert_true(near(r.top1_agreement, (double)n_same / SCORED, 1e-12));
  assert_int_equal(r.worst[0].index, worst_index);
  assert_int_equal(r.worst[0].target, token[worst_index]);
  assert_true(near(r.kl_max, worst, 1e-4));
  for (size_t i = 1; i < r.n_worst; i++) assert_true(r.worst[i].kl <= r.worst[i - 1].kl);
  qsort(kl, SCORED, sizeof *kl, by_size);
  assert_true(near(r.worst[4].kl, kl[SCORED - 5], 1e-4));
  assert_true(r.kl_median >= kl[SCORED / 2 - 1] * 0.9999 && r.kl_median <= kl[SCORED / 2] * 1.0001);
  assert_true(r.kl_p99 > kl[SCORED * 98 / 100] && r.kl_p99 <= kl[SCORED - 1]);
  for (size_t s = 0; s < STATES; s++) {
    assert_true(near(r.layer[s].norm_ratio, ratio[s] / SCORED, 1e-5));
    assert_true(near(r.layer[s].cosine_error, sqrt(cosine[s] / (double)n_pairs), 1e-4));
    if (same_basis) {
      assert_true(near(r.layer[s].error, error[s] / SCORED, 1e-4));
    } else {
      assert_true(isnan(r.layer[s].error));
    }
  }
  qtr_compare_free(&r);
}

static void rounding_equals_naive(void **state) {
  (void)state;
  struct qtr_engine *a = open_engine(11, "w16a16kv16"), *b = open_engine(11, "w16a16kv4");
  check_against_naive(a, b, true);
  qtr_engine_close(a);
  qtr_engine_close(b);
}

static void other_model_equals_naive(void **state) {
  (void)state;
  struct qtr_engine *a = open_engine(11, "w16a16kv16"), *b = open_engine(12, "w16a16kv16");
  check_against_naive(a, b, false);
  qtr_engine_close(a);
  qtr_engine_close(b);
}

static void itself(void **state) {
  (void)state;
  struct qtr_engine *a = open_engine(11, "w16a16kv4");
  struct qtr_compare_result r;
  struct qtr_error err;
  int32_t token[N];
  make_tokens(token);
  const struct qtr_compare_options options = {.window = WINDOW, .n_tokens = WINDOW + 1, .layers = true, .quiet = true};
  assert_int_equal(qtr_compare_run(a, a, token, N, &options, &r, &err), QTR_OK);
  assert_int_equal(r.n_windows, 1);
  assert_true(r.kl_max == 0 && r.kl_mean == 0 && r.top1_agreement == 1 && r.perplexity_a == r.perplexity_b);
  for (size_t s = 0; s < STATES; s++) assert_true(r.layer[s].error == 0 && r.layer[s].cosine_error == 0);
  qtr_compare_free(&r);
  const struct qtr_compare_options plain = {.window = WINDOW, .quiet = true};
  assert_int_equal(qtr_compare_run(a, a, token, N, &plain, &r, &err), QTR_OK);
  assert_null(r.layer);
  assert_non_null(r.no_layers);
  qtr_compare_free(&r);
  qtr_engine_close(a);
}

static void refuses(void **state) {
  (void)state;
  struct qtr_engine *a = open_engine(11, "w16a16kv16");
  struct qtr_compare_result r;
  struct qtr_error err;
  int32_t token[N];
  make_tokens(token);
  struct qtr_compare_options options = {.window = WINDOW, .quiet = true};
  assert_int_equal(qtr_compare_run(a, a, token, WINDOW - 1, &options, &r, &err), QTR_ERR_LIMIT);
  token[3] = TINY_VOCAB;
  assert_int_equal(qtr_compare_run(a, a, token, N, &options, &r, &err), QTR_ERR_FORMAT);
  static const size_t windows[] = {0, 1, 1025, SIZE_MAX};
  for (size_t i = 0; i < 4; i++) {
    options.window = windows[i];
    assert_int_equal(qtr_compare_run(a, a, token, N, &options, &r, &err), QTR_ERR_ARGUMENT);
  }
  qtr_engine_close(a);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(rounding_equals_naive), cmocka_unit_test(other_model_equals_naive),
                                     cmocka_unit_test(itself), cmocka_unit_test(refuses)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
