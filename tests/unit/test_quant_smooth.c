/* Smoothing (spec F.5): factors by the formula, pairs of RoPE tied, and the grids choose what a search by hand chooses. */
#include "base/checked.h"
#include "base/half.h"
#include "quant/clip.h"
#include "quant/gptq.h"
#include "quant/smooth.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

#include "quant_fixture.h"

static void test_factors(void **state) {
  (void)state;
  const float a[4] = {4, 9, 0.25f, 1}, b[4] = {2, 0.5f, 8, 1};
  float s[4];
  qtr_smooth_factors(a, b, 0.5f, 0, 4, s);
  for (size_t i = 0; i < 4; i++) assert_true(fabsf(s[i] - sqrtf(a[i])) < 1e-6f);
  qtr_smooth_factors(a, b, 0.3f, 0.7f, 4, s);
  for (size_t i = 0; i < 4; i++)
    assert_true(fabs((double)s[i] - pow((double)a[i], 0.3) / pow((double)b[i], 0.7)) < 1e-5 * (double)s[i]);
  qtr_smooth_factors(a, b, 0, 0, 4, s);
  for (size_t i = 0; i < 4; i++) assert_true(s[i] == 1);
}

static void test_odd_factors(void **state) {
  (void)state;
  float a[3] = {4, 0, 9}, b[3] = {1, 1, 0}, s[3];
  qtr_smooth_factors(a, b, 0.5f, 0, 3, s); /* a channel that is never used: 1; b is not looked at */
  assert_true(s[0] == 2 && s[1] == 1 && s[2] == 3);
  qtr_smooth_factors(a, b, 0, 0.5f, 3, s); /* a zero below the line: no factor is finite, none is used */
  assert_true(s[0] == 1 && s[1] == 1 && s[2] == 1);
  b[2] = 1;
  static const float bad[] = {NAN, INFINITY};
  for (size_t i = 0; i < 2; i++) {
    a[1] = bad[i];
    qtr_smooth_factors(a, b, 0.5f, 0.5f, 3, s);
    assert_true(s[0] == 1 && s[1] == 1 && s[2] == 1);
  }
}

static void test_pairs(void **state) {
  (void)state;
  float x[12] = {1, 5, 2, /* */ 3, 4, 6, /* second head */ 9, 0, 0, /* */ 1, 0, 7};
  const float want[12] = {3, 5, 6, 3, 5, 6, 9, 0, 7, 9, 0, 7};
  qtr_smooth_tie_pairs(x, 2, 6);
  assert_memory_equal(x, want, sizeof want);
}

/* ---- the grid of o_proj's and down_proj's input ---------------------------------------------------- */

enum { DIM = 64, INNER = 128, HIDDEN = 64, HEADS = 4, KV_HEADS = 2, KEPT = 40, POINTS = 6 };

struct scene {
  struct qtr_config config;
  struct qtr_observed observed;
  struct qtr_float_layer layer;
  struct qtr_threads *team;
};

static void open_scene(struct scene *s) {
  *s = (struct scene){.config = {.hidden_size = HIDDEN,
                                 .intermediate_size = INNER,
                                 .n_heads = HEADS,
                                 .n_kv_heads = KV_HEADS,
                                 .head_dim = DIM,
                                 .n_layers = 1}};
  assert_int_equal(qtr_threads_create(2, &s->team, NULL), QTR_OK);
  assert_int_equal(qtr_observed_create(s->team, &s->config, false, KEPT, KEPT, &s->observed, NULL), QTR_OK);
  s->layer.config = &s->config;
  qtr_float_layer_shape(&s->layer);
  uint64_t random = 4;
  for (enum qtr_projection p = QTR_O; p <= QTR_DOWN; p += QTR_DOWN - QTR_O) {
    struct qtr_float_matrix *m = &s->layer.m[p];
    m->w = malloc(m->n_out * m->n_in * sizeof *m->w);
    assert_non_null(m->w);
    for (size_t i = 0; i < m->n_out * m->n_in; i++) m->w[i] = fixture_uniform(&random) / (i % m->n_in % 13 == 2 ? 30 : 1);
    for (size_t t = 0; t < KEPT; t++) { /* outliers where the matrix is small */
      float *x = malloc(m->n_in * sizeof *x);
      for (size_t i = 0; i < m->n_in; i++) x[i] = fixture_uniform(&random) * (i % 13 == 2 ? 30 : 1);
      qtr_observed_see(&s->observed, qtr_projection_site(p), x, 1, m->n_in);
      free(x);
    }
  }
  for (enum qtr_site site = QTR_SITE_O; site <= QTR_SITE_DOWN; site += QTR_SITE_DOWN - QTR_SITE_O)
    (void)qtr_observed_finish_site(&s->observed, site);
  assert_int_equal(s->observed.n_kept, KEPT);
}

static void close_scene(struct scene *s) {
  free(s->layer.m[QTR_O].w);
  free(s->layer.m[QTR_DOWN].w);
  qtr_observed_free(&s->observed);
  qtr_threads_free(s->team);
}

/* ‖X Wᵀ - X̂ Ŵᵀ‖² with columns times s: weights of 4 bits a row, inputs of 8 bits a token. */
static double error_of(const struct scene *s, enum qtr_projection p, const float *factor) {
  const struct qtr_float_matrix *m = &s->layer.m[p];
  const float *sample = s->observed.sample[qtr_projection_site(p)];
  double *w = malloc(m->n_out * m->n_in * sizeof *w), *x = malloc(KEPT * m->n_in * sizeof *x), sum = 0;
  assert_true(w && x);
  for (size_t r = 0; r < m->n_out; r++) {
    float low = 0, high = 0;
    struct qtr_cell cell;
    for (size_t i = 0; i < m->n_in; i++) {
      float v = m->w[r * m->n_in + i] * factor[i];
      low = fminf(low, v);
      high = fmaxf(high, v);
    }
    assert_int_equal(qtr_cell_w4(low, high, &cell), QTR_RTN_OK);
    for (size_t i = 0; i < m->n_in; i++) {
      float code = qtr_cell_code(&cell, m->w[r * m->n_in + i] * factor[i]);
      w[r * m->n_in + i] = (double)qtr_cell_value(&cell, code);
    }
  }
  for (size_t t = 0; t < KEPT; t++) {
    double max = 0;
    for (size_t i = 0; i < m->n_in; i++) max = fmax(max, fabs((double)(sample[t * m->n_in + i] / factor[i])));
    double scale = (double)qtr_f16_round((float)(max / 127));
    for (size_t i = 0; i < m->n_in; i++) {
      double v = nearbyint((double)(sample[t * m->n_in + i] / factor[i]) / scale);
      x[t * m->n_in + i] = fmin(fmax(v, -127), 127) * scale;
    }
  }
  for (size_t t = 0; t < KEPT; t++) {
    for (size_t r = 0; r < m->n_out; r++) {
      double y = 0;
      for (size_t i = 0; i < m->n_in; i++) {
        y += (double)sample[t * m->n_in + i] * (double)m->w[r * m->n_in + i] - x[t * m->n_in + i] * w[r * m->n_in + i];
      }
      sum += y * y;
    }
  }
  free(w);
  free(x);
  return sum;
}

/* Every point of F.5.2's grid by hand. */
static void check_input(struct scene *s, enum qtr_projection p) {
  const struct qtr_float_matrix *m = &s->layer.m[p];
  size_t group = p == QTR_O ? HEADS / KV_HEADS : 1, n = m->n_in / group;
  float *a = calloc(3 * m->n_in, sizeof *a), *b = a + m->n_in, *wide = b + m->n_in, alpha, beta, chosen[512], f[512];
  assert_true(a && n <= 512);
  for (size_t i = 0; i < m->n_in; i++) {
    size_t k = p == QTR_O ? i / DIM / group * DIM + i % DIM : i;
    for (size_t t = 0; t < KEPT; t++) a[k] = fmaxf(a[k], fabsf(s->observed.sample[qtr_projection_site(p)][t * m->n_in + i]));
    for (size_t r = 0; r < m->n_out; r++) b[k] = fmaxf(b[k], fabsf(m->w[r * m->n_in + i]));
  }
  const struct qtr_smooth_options grid = {.mode = QTR_SMOOTH_GRID};
  assert_int_equal(qtr_smooth_input(&grid, POINTS, &s->observed, &s->layer, p, QTR_LINEAR_W4A8, chosen, &alpha, &beta, NULL),
                   QTR_OK);
  double best = INFINITY, got = INFINITY, plain = 0;
  for (int i = 0; i < POINTS; i++) {
    for (int with = 0; with < (i ? 2 : 1); with++) {
      float x = (float)i / POINTS, y = with ? 1 - x : 0;
      qtr_smooth_factors(a, b, x, y, n, f);
      for (size_t k = 0; k < m->n_in; k++) wide[k] = f[p == QTR_O ? k / DIM / group * DIM + k % DIM : k];
      double error = error_of(s, p, wide);
      best = fmin(best, error);
      if (i == 0) plain = error;
      if (fabsf(x - alpha) < 1e-6f && fabsf(y - beta) < 1e-6f) {
        got = error;
        assert_memory_equal(chosen, f, n * sizeof *f);
      }
    }
  }
  print_message("chosen %g, %g: %.3f of the error without\n", (double)alpha, (double)beta, got / plain);
  assert_true(got <= best * (1 + 1e-4) && got < 0.8 * plain);
  const struct qtr_smooth_options manual = {.mode = QTR_SMOOTH_MANUAL, .alpha = 0.25f, .beta = 0.5f};
  assert_int_equal(
      qtr_smooth_input(&manual, POINTS, &s->observed, &s->layer, p, QTR_LINEAR_W4A8, chosen, &alpha, &beta, NULL), QTR_OK);
  qtr_smooth_factors(a, b, 0.25f, 0.5f, n, f);
  assert_memory_equal(chosen, f, n * sizeof *f);
  assert_true(alpha == 0.25f && beta == 0.5f);
  free(a);
}

static void test_inputs(void **state) {
  (void)state;
  struct scene s;
  open_scene(&s);
  check_input(&s, QTR_DOWN);
  check_input(&s, QTR_O);
  close_scene(&s);
}

/* Keys without a grid: s = sqrt(max|K|) over the pair; queries of a group count together. */
static void test_manual_keys(void **state) {
  (void)state;
  struct scene s;
  open_scene(&s);
  uint64_t random = 6;
  float x[(HEADS + 2 * KV_HEADS) * DIM], k[KV_HEADS * DIM] = {0}, q[KV_HEADS * DIM] = {0}, got[KV_HEADS * DIM], alpha, beta;
  float want[KV_HEADS * DIM];
  for (int t = 0; t < 5; t++) {
    for (size_t i = 0; i < sizeof x / sizeof x[0]; i++) x[i] = fixture_uniform(&random) * (i % 7 == 0 ? 20 : 1);
    qtr_observed_see(&s.observed, QTR_SEE_ROPE, x, 1, sizeof x / sizeof x[0]);
    for (size_t i = 0; i < HEADS * DIM; i++) {
      float *at = &q[i / DIM / (HEADS / KV_HEADS) * DIM + i % DIM];
      *at = fmaxf(*at, fabsf(x[i]));
    }
    for (size_t i = 0; i < KV_HEADS * DIM; i++) k[i] = fmaxf(k[i], fabsf(x[HEADS * DIM + i]));
  }
  qtr_smooth_tie_pairs(k, KV_HEADS, DIM);
  qtr_smooth_tie_pairs(q, KV_HEADS, DIM);
  const struct qtr_smooth_options options = {.mode = QTR_SMOOTH_MANUAL, .alpha = 0.5f, .beta = 0.25f};
  struct qtr_runner runner = {.length = 1};
  assert_int_equal(
      qtr_smooth_keys(&options, POINTS, &s.observed, &s.layer, &runner, NULL, NULL, 0, got, &alpha, &beta, NULL), QTR_OK);
  for (size_t i = 0; i < KV_HEADS * DIM; i++) want[i] = sqrtf(k[i]) / powf(q[i], 0.25f);
  for (size_t i = 0; i < KV_HEADS * DIM; i++) {
    assert_true(fabsf(got[i] - want[i]) < 1e-5f * want[i]);
    assert_true(got[i] == got[i / DIM * DIM + (i + DIM / 2) % DIM]);
  }
  close_scene(&s);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_factors), cmocka_unit_test(test_odd_factors),
                                     cmocka_unit_test(test_pairs), cmocka_unit_test(test_inputs),
                                     cmocka_unit_test(test_manual_keys)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
