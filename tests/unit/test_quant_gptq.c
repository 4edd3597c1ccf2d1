/* GPTQ and clipping (spec F.7, F.8) against independent implementations in double: textbook GPTQ with a full inverse by
 * Gauss-Jordan, and the search of ratios by brute force. */
#include "base/checked.h"
#include "base/random.h"
#include "quant/clip.h"
#include "quant/gptq.h"
#include "quant/matrix.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const struct qtr_gptq_options usual = {.damp = 0.01f, .block = 64, .n_tries = 250};
static const struct qtr_gptq_options no_damping = {.damp = 0, .block = 64, .n_tries = 1};
static const char what[] = "model.layers.3.mlp.up_proj";

static double uniform(uint64_t *random) { return (double)(qtr_random_next(random) >> 11) * 0x1p-52 - 1; }

/* A matrix, correlated inputs (columns of very different size), and their second moments. */
struct problem {
  size_t n_out, n_in, n_samples;
  float *w, *x, *h; /* (n_out, n_in), (n_samples, n_in), (n_in, n_in) = 2/n Σ xᵀx */
};

static void make_problem(struct problem *p, size_t n_out, size_t n_in, uint64_t seed) {
  uint64_t random = seed;
  size_t n = 3 * n_in, rank = 24;
  *p = (struct problem){.n_out = n_out, .n_in = n_in, .n_samples = n};
  p->w = malloc(n_out * n_in * sizeof *p->w);
  p->x = malloc(n * n_in * sizeof *p->x);
  p->h = malloc(n_in * n_in * sizeof *p->h);
  double *mix = malloc(rank * n_in * sizeof *mix), part[24];
  assert_true(p->w && p->x && p->h && mix);
  for (size_t i = 0; i < n_out * n_in; i++) p->w[i] = (float)(uniform(&random) * uniform(&random));
  for (size_t i = 0; i < rank * n_in; i++) mix[i] = uniform(&random);
  for (size_t t = 0; t < n; t++) {
    for (size_t k = 0; k < rank; k++) part[k] = uniform(&random);
    for (size_t i = 0; i < n_in; i++) {
      double sum = 0.2 * uniform(&random);
      for (size_t k = 0; k < rank; k++) sum += part[k] * mix[k * n_in + i];
      p->x[t * n_in + i] = (float)(sum * (i % 17 == 3 ? 6 : 1));
    }
  }
  for (size_t i = 0; i < n_in; i++) {
    for (size_t j = 0; j < n_in; j++) {
      double sum = 0;
      for (size_t t = 0; t < n; t++) sum += (double)p->x[t * n_in + i] * (double)p->x[t * n_in + j];
      p->h[i * n_in + j] = (float)(2 * sum / (double)n);
    }
  }
  for (size_t i = 0; i < n_in; i++) {
    for (size_t j = 0; j < i; j++) p->h[i * n_in + j] = p->h[j * n_in + i];
  }
  free(mix);
}

static void free_problem(struct problem *p) {
  free(p->w);
  free(p->x);
  free(p->h);
}

static struct qtr_threads *team_of(int n) {
  struct qtr_threads *team;
  assert_int_equal(qtr_threads_create(n, &team, NULL), QTR_OK);
  return team;
}

/* Cells over the whole range. */
static void fit(struct qtr_threads *team, const struct problem *p, enum qtr_linear_format format, struct qtr_grid *grid) {
  assert_int_equal(qtr_grid_create(format, p->n_out, p->n_in, grid, NULL), QTR_OK);
  assert_int_equal(qtr_clip(team, p->w, NULL, 0, NULL, grid, what, NULL), QTR_OK);
}

static double code_of(const struct qtr_cell *c, double x) {
  double v = x / (double)c->factor;
  v = fmin(fmax(v, -(double)c->limit), (double)c->limit);
  return nearbyint(fmin(fmax((v + (double)c->zero) / (double)c->scale, (double)c->low), (double)c->high));
}
static double value_of(const struct qtr_cell *c, double code) {
  return (code * (double)c->scale - (double)c->zero) * (double)c->factor;
}

/* ---- the textbook -------------------------------------------------------------------------------- */

/* a := a⁻¹ by Gauss-Jordan with pivots. a: (n, n) */
static void invert(double *a, size_t n) {
  double *b = calloc(n * n, sizeof *b);
  assert_non_null(b);
  for (size_t i = 0; i < n; i++) b[i * n + i] = 1;
  for (size_t i = 0; i < n; i++) {
    size_t pivot = i;
    for (size_t r = i; r < n; r++) pivot = fabs(a[r * n + i]) > fabs(a[pivot * n + i]) ? r : pivot;
    for (size_t k = 0; k < n; k++) {
      double t = a[i * n + k];
      a[i * n + k] = a[pivot * n + k];
      a[pivot * n + k] = t;
      t = b[i * n + k];
      b[i * n + k] = b[pivot * n + k];
      b[pivot * n + k] = t;
    }
    double one = 1 / a[i * n + i];
    for (size_t k = 0; k < n; k++) a[i * n + k] *= one, b[i * n + k] *= one;
    for (size_t r = 0; r < n; r++) {
      double f = a[r * n + i];
      for (size_t k = 0; k < n && r != i; k++) {
        a[r * n + k] -= f * a[i * n + k];
        b[r * n + k] -= f * b[i * n + k];
      }
    }
  }
  memcpy(a, b, n * n * sizeof *a);
  free(b);
}

/* Codes by GPTQ as published: after each column the best change of all others is made, and the inverse loses that column
 * (optimal brain surgeon), so no factorisation is needed. code: (n_out, n_in) */
static void textbook(const struct problem *p, const struct qtr_grid *grid, double damp, int8_t *code) {
  size_t n = p->n_in;
  double *inverse = malloc(n * n * sizeof *inverse), *w = malloc(p->n_out * n * sizeof *w), mean = 0;
  bool *done = calloc(n, sizeof *done);
  assert_true(inverse && w && done);
  for (size_t i = 0; i < p->n_out * n; i++) w[i] = (double)p->w[i];
  for (size_t i = 0; i < n; i++) mean += (double)p->h[i * n + i] / (double)n;
  for (size_t i = 0; i < n * n; i++) {
    inverse[i] = (double)p->h[i];
    if (i % (n + 1) == 0) inverse[i] = (inverse[i] == 0 ? 1 : inverse[i]) + damp * mean;
  }
  invert(inverse, n);
  for (size_t step = 0; step < n; step++) {
    size_t at = n;
    for (size_t i = 0; i < n; i++) {
      if (!done[i] && (at == n || p->h[i * n + i] > p->h[at * n + at])) at = i;
    }
    for (size_t r = 0; r < p->n_out; r++) {
      const struct qtr_cell *cell = qtr_grid_cell(grid, r, at);
      double c = code_of(cell, w[r * n + at]);
      double error = (w[r * n + at] - value_of(cell, c)) / inverse[at * n + at];
      code[r * n + at] = (int8_t)c;
      for (size_t k = 0; k < n; k++) w[r * n + k] -= done[k] ? 0 : error * inverse[at * n + k];
    }
    done[at] = true;
    double one = 1 / inverse[at * n + at];
    for (size_t i = 0; i < n; i++) {
      for (size_t k = 0; k < n && i != at; k++) {
        if (k != at) inverse[i * n + k] -= inverse[i * n + at] * inverse[at * n + k] * one;
      }
    }
    for (size_t i = 0; i < n; i++) {
      if (i != at) inverse[i * n + at] = inverse[at * n + i] = 0;
    }
  }
  free(inverse);
  free(w);
  free(done);
}

/* ‖X (W - Ŵ)ᵀ‖² in double */
static double output_error(const struct problem *p, const struct qtr_grid *grid, const int8_t *code) {
  double sum = 0;
  for (size_t r = 0; r < p->n_out; r++) {
    for (size_t t = 0; t < p->n_samples; t++) {
      double y = 0;
      for (size_t i = 0; i < p->n_in; i++) {
        size_t at = r * p->n_in + i;
        double delta = (double)p->w[at] - value_of(qtr_grid_cell(grid, r, i), (double)code[at]);
        y += delta * (double)p->x[t * p->n_in + i];
      }
      sum += y * y;
    }
  }
  return sum;
}

/* ---- the library below --------------------------------------------------------------------------- */

/* Builds of OpenBLAS without threads give wrong products when several threads ask at once (quant/matrix.c). */
enum { M = 32, N = 512, K = 256 };

struct products {
  const float *a, *b, *want;
  float *out; /* (threads, M, N) */
  atomic_int n_wrong;
};

static void multiply_again(void *arg, size_t begin, size_t end, int thread) {
  struct products *p = arg;
  float *out = p->out + (size_t)thread * M * N;
  for (size_t i = begin; i < end; i++) {
    qtr_matrix_multiply_t(p->a, K, p->b, K, out, N, M, N, K);
    if (memcmp(out, p->want, M * N * sizeof *out)) atomic_fetch_add(&p->n_wrong, 1);
  }
}

static void test_products_from_many_threads(void **state) {
  (void)state;
  enum { THREADS = 4, TIMES = 16000 };
  struct qtr_threads *team = team_of(THREADS);
  uint64_t random = 1;
  float *x = malloc((M + N) * K * sizeof *x), *out = malloc((THREADS + 1) * M * N * sizeof *out);
  assert_true(x && out);
  for (size_t i = 0; i < (M + N) * K; i++) x[i] = (float)uniform(&random);
  struct products p = {.a = x, .b = x + M * K, .want = out + THREADS * M * N, .out = out};
  qtr_matrix_multiply_t(p.a, K, p.b, K, out + THREADS * M * N, N, M, N, K);
  qtr_threads_for(team, TIMES, 16, multiply_again, &p);
  assert_int_equal(atomic_load(&p.n_wrong), 0);
  free(x);
  free(out);
  qtr_threads_free(team);
}

/* ---- GPTQ ---------------------------------------------------------------------------------------- */

static const struct {
  enum qtr_linear_format format;
  size_t n_out, n_in;
} shapes[] = {
    {QTR_LINEAR_W4A8, 37, 96}, {QTR_LINEAR_W4A8_G128, 33, 256}, {QTR_LINEAR_W8A8, 32, 72}, {QTR_LINEAR_W4A8, 8, 200}};
enum { N_SHAPES = sizeof shapes / sizeof shapes[0] };

static void test_textbook(void **state) {
  (void)state;
  struct qtr_threads *team = team_of(2);
  for (size_t s = 0; s < N_SHAPES; s++) {
    struct problem p;
    struct qtr_grid grid;
    struct qtr_error err;
    make_problem(&p, shapes[s].n_out, shapes[s].n_in, 5 + s);
    fit(team, &p, shapes[s].format, &grid);
    int8_t *want = malloc(p.n_out * p.n_in), *nearest = malloc(p.n_out * p.n_in);
    assert_true(want && nearest);
    assert_int_equal(qtr_gptq(team, p.w, NULL, &usual, &grid, what, &err), QTR_OK);
    memcpy(nearest, grid.code, p.n_out * p.n_in);
    textbook(&p, &grid, (double)usual.damp, want);
    assert_int_equal(qtr_gptq(team, p.w, p.h, &usual, &grid, what, &err), QTR_OK);
    size_t other = 0, moved = 0; /* a value half way between two codes may fall either way in float, and its row follows */
    for (size_t r = 0; r < p.n_out; r++) {
      other += memcmp(grid.code + r * p.n_in, want + r * p.n_in, p.n_in) != 0;
      moved += memcmp(grid.code + r * p.n_in, nearest + r * p.n_in, p.n_in) != 0;
    }
    if (other > 1) fail_msg("shape %zu: %zu of %zu rows have other codes", s, other, p.n_out);
    assert_int_equal(moved, p.n_out);
    double plain = output_error(&p, &grid, nearest), done = output_error(&p, &grid, grid.code), squared, norm;
    print_message("shape %zu: output error %.3f of rounding to nearest\n", s, done / plain);
    assert_true(done < 0.7 * plain);
    assert_int_equal(qtr_output_error(team, p.w, &grid, p.x, p.n_samples, &squared, &norm, &err), QTR_OK);
    assert_true(fabs(squared - done) < 1e-3 * done);
    assert_true(norm > squared);
    for (size_t i = 0; i < p.n_out * p.n_in; i++) {
      const struct qtr_cell *cell = qtr_grid_cell(&grid, i / p.n_in, i % p.n_in);
      assert_true((float)grid.code[i] >= cell->low && (float)grid.code[i] <= cell->high);
    }
    free(want);
    free(nearest);
    qtr_grid_free(&grid);
    free_problem(&p);
  }
  qtr_threads_free(team);
}

static void test_threads(void **state) {
  (void)state;
  struct problem p;
  make_problem(&p, 130, 256, 77);
  struct qtr_grid grid[2];
  double error[2][2];
  const struct qtr_clip_options clip = {.n_steps = 20, .max_shrink = 0.8f};
  for (int i = 0; i < 2; i++) {
    struct qtr_threads *team = team_of(i ? 5 : 1);
    assert_int_equal(qtr_grid_create(QTR_LINEAR_W4A8_G128, p.n_out, p.n_in, &grid[i], NULL), QTR_OK);
    assert_int_equal(qtr_clip(team, p.w, p.x, 200, &clip, &grid[i], what, NULL), QTR_OK);
    assert_int_equal(qtr_gptq(team, p.w, p.h, &usual, &grid[i], what, NULL), QTR_OK);
    assert_int_equal(qtr_output_error(team, p.w, &grid[i], p.x, 100, &error[i][0], &error[i][1], NULL), QTR_OK);
    qtr_threads_free(team);
  }
  assert_memory_equal(grid[0].code, grid[1].code, p.n_out * p.n_in);
  assert_memory_equal(grid[0].cell, grid[1].cell, p.n_out * grid[0].n_groups * sizeof *grid[0].cell);
  assert_memory_equal(error[0], error[1], sizeof error[0]);
  for (int i = 0; i < 2; i++) qtr_grid_free(&grid[i]);
  free_problem(&p);
}

/* Without correlation there is nothing to make up for; a column that no input reaches is rounded by itself. */
static void test_identity_and_dead(void **state) {
  (void)state;
  struct qtr_threads *team = team_of(1);
  struct problem p;
  struct qtr_grid grid;
  make_problem(&p, 20, 64, 9);
  fit(team, &p, QTR_LINEAR_W4A8, &grid);
  int8_t *nearest = malloc(p.n_out * p.n_in), *whole = malloc(p.n_out * p.n_in);
  assert_true(nearest && whole);
  assert_int_equal(qtr_gptq(team, p.w, NULL, &usual, &grid, what, NULL), QTR_OK);
  memcpy(nearest, grid.code, p.n_out * p.n_in);
  float *identity = calloc(p.n_in * p.n_in, sizeof *identity);
  assert_non_null(identity);
  for (size_t i = 0; i < p.n_in; i++) identity[i * p.n_in + i] = 3.5f;
  memset(grid.code, 99, p.n_out * p.n_in);
  assert_int_equal(qtr_gptq(team, p.w, identity, &no_damping, &grid, what, NULL), QTR_OK);
  assert_memory_equal(grid.code, nearest, p.n_out * p.n_in);

  static const size_t dead[] = {0, 31, 63};
  for (size_t d = 0; d < 3; d++) {
    for (size_t i = 0; i < p.n_in; i++) p.h[dead[d] * p.n_in + i] = p.h[i * p.n_in + dead[d]] = 0;
  }
  textbook(&p, &grid, (double)usual.damp, whole);
  assert_int_equal(qtr_gptq(team, p.w, p.h, &usual, &grid, what, NULL), QTR_OK);
  for (size_t r = 0; r < p.n_out; r++) {
    for (size_t d = 0; d < 3; d++) assert_int_equal(grid.code[r * p.n_in + dead[d]], nearest[r * p.n_in + dead[d]]);
  }
  assert_memory_equal(grid.code, whole, p.n_out * p.n_in);
  memset(p.h, 0, p.n_in * p.n_in * sizeof *p.h); /* no input at all */
  assert_int_equal(qtr_gptq(team, p.w, p.h, &usual, &grid, what, NULL), QTR_OK);
  assert_memory_equal(grid.code, nearest, p.n_out * p.n_in);
  free(identity);
  free(nearest);
  free(whole);
  qtr_grid_free(&grid);
  free_problem(&p);
  qtr_threads_free(team);
}

static void refuse(struct qtr_threads *team, const struct problem *p, struct qtr_grid *grid, const char *says) {
  struct qtr_error err = {0};
  enum qtr_status status = qtr_gptq(team, p->w, p->h, &usual, grid, what, &err);
  if (status != QTR_ERR_FORMAT) fail_msg("status %s, wanted \"%s\"", qtr_status_name(status), says);
  if (!strstr(err.message, what) || !strstr(err.message, says)) fail_msg("message: %s", err.message);
}

static void test_bad_hessians(void **state) {
  (void)state;
  struct qtr_threads *team = team_of(1);
  struct problem p;
  struct qtr_grid grid;
  make_problem(&p, 20, 64, 9);
  fit(team, &p, QTR_LINEAR_W4A8, &grid);
  size_t n = p.n_in;
  float kept = p.h[5 * n + 5];
  static const float bad[] = {NAN, INFINITY};
  for (size_t i = 0; i < 2; i++) {
    p.h[5 * n + 5] = bad[i];
    refuse(team, &p, &grid, "not finite");
    p.h[5 * n + 5] = kept;
    p.h[7 * n + 2] = p.h[2 * n + 7] = bad[i]; /* where the diagonal does not show it */
    refuse(team, &p, &grid, "not finite");
    p.h[7 * n + 2] = p.h[2 * n + 7] = 0;
  }
  p.h[7 * n + 2] = p.h[2 * n + 7] = 100 * kept;
  refuse(team, &p, &grid, "positive definite");
  /* A little short of definite: damping makes up for it. */
  for (size_t i = 0; i < n * n; i++) p.h[i] = i % (n + 1) == 0 ? 1 : 0;
  p.h[1] = p.h[n] = 1.1f;
  assert_int_equal(qtr_gptq(team, p.w, p.h, &usual, &grid, what, NULL), QTR_OK);
  qtr_grid_free(&grid);
  free_problem(&p);
  qtr_threads_free(team);
}

/* ---- clipping ------------------------------------------------------------------------------------ */

/* Errors of the outputs by one row's group, with that ratio everywhere, rounding to nearest. */
static double clip_error(const struct problem *p, struct qtr_grid *trial, size_t r, size_t g, size_t n_samples) {
  size_t width = trial->n_groups > 1 ? QTR_GROUP : p->n_in;
  double sum = 0;
  for (size_t t = 0; t < n_samples; t++) {
    double y = 0;
    for (size_t i = g * width; i < (g + 1) * width; i++) {
      const struct qtr_cell *cell = qtr_grid_cell(trial, r, i);
      double w = (double)p->w[r * p->n_in + i];
      y += (w - value_of(cell, code_of(cell, w))) * (double)p->x[t * p->n_in + i];
    }
    sum += y * y;
  }
  return sum;
}

static void test_clip(void **state) {
  (void)state;
  enum { STEPS = 18 };
  const struct qtr_clip_options options = {.n_steps = STEPS, .max_shrink = 0.8f};
  struct qtr_threads *team = team_of(2);
  for (size_t i = 0; i < (size_t)2 * N_SHAPES; i++) { /* fewer samples than a cell has columns, and more */
    size_t s = i / 2, n_samples = i % 2 ? shapes[s].n_in + 50 : 60;
    struct problem p;
    struct qtr_grid grid, trial;
    make_problem(&p, shapes[s].n_out, shapes[s].n_in, 50 + s);
    for (size_t r = 0; r < p.n_out; r++) p.w[r * p.n_in + r % p.n_in] *= 4; /* something to clip */
    assert_int_equal(qtr_grid_create(shapes[s].format, p.n_out, p.n_in, &grid, NULL), QTR_OK);
    assert_int_equal(qtr_grid_create(shapes[s].format, p.n_out, p.n_in, &trial, NULL), QTR_OK);
    assert_int_equal(qtr_clip(team, p.w, p.x, n_samples, &options, &grid, what, NULL), QTR_OK);
    size_t cells = grid.n_groups, n_clipped = 0;
    for (size_t r = 0; r < p.n_out; r++) {
      for (size_t g = 0; g < cells; g++) {
        double best = INFINITY, chosen = INFINITY;
        bool whole = false;
        for (int step = 0; step < STEPS; step++) {
          float ratio[2];
          ratio[0] = ratio[1] = 1 - (float)step / STEPS * options.max_shrink;
          assert_int_equal(qtr_grid_fit_row(&trial, r, p.w + r * p.n_in, ratio), QTR_RTN_OK);
          double error = clip_error(&p, &trial, r, g, n_samples);
          best = fmin(best, error);
          if (memcmp(&trial.cell[r * cells + g], &grid.cell[r * cells + g], sizeof *grid.cell)) continue;
          chosen = fmin(chosen, error);
          whole |= step == 0;
        }
        if (!(chosen <= best * (1 + 1e-4)))
          fail_msg("shape %zu row %zu group %zu: %g, the best is %g", s, r, g, chosen, best);
        n_clipped += !whole;
      }
    }
    assert_in_range(n_clipped, 1, p.n_out * cells);
    qtr_grid_free(&grid);
    qtr_grid_free(&trial);
    free_problem(&p);
  }
  qtr_threads_free(team);
}

/* Ties go to the whole range; what is not finite or too large is named. */
static void test_clip_edges(void **state) {
  (void)state;
  const struct qtr_clip_options options = {.n_steps = 10, .max_shrink = 0.8f};
  struct qtr_threads *team = team_of(1);
  struct qtr_error err;
  for (size_t s = 0; s < N_SHAPES; s++) {
    struct problem p;
    struct qtr_grid grid, whole;
    make_problem(&p, shapes[s].n_out, shapes[s].n_in, 60 + s);
    fit(team, &p, shapes[s].format, &whole);
    memset(p.x, 0, p.n_samples * p.n_in * sizeof *p.x);
    assert_int_equal(qtr_grid_create(shapes[s].format, p.n_out, p.n_in, &grid, NULL), QTR_OK);
    assert_int_equal(qtr_clip(team, p.w, p.x, 10, &options, &grid, what, &err), QTR_OK);
    assert_memory_equal(grid.cell, whole.cell, p.n_out * grid.n_groups * sizeof *grid.cell);
    float kept = p.w[3 * p.n_in + 1];
    p.w[3 * p.n_in + 1] = NAN;
    assert_int_equal(qtr_clip(team, p.w, p.x, 10, &options, &grid, what, &err), QTR_ERR_FORMAT);
    assert_non_null(strstr(err.message, what));
    p.w[3 * p.n_in + 1] = 3e38f;
    assert_int_equal(qtr_clip(team, p.w, p.x, 10, &options, &grid, what, &err), QTR_ERR_UNSUPPORTED);
    assert_non_null(strstr(err.message, "fp16"));
    p.w[3 * p.n_in + 1] = kept;
    qtr_grid_free(&grid);
    qtr_grid_free(&whole);
    free_problem(&p);
  }
  qtr_threads_free(team);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_products_from_many_threads),
                                     cmocka_unit_test(test_textbook),
                                     cmocka_unit_test(test_threads),
                                     cmocka_unit_test(test_identity_and_dead),
                                     cmocka_unit_test(test_bad_hessians),
                                     cmocka_unit_test(test_clip),
                                     cmocka_unit_test(test_clip_edges)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
