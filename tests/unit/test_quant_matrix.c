/* The linear algebra of the calibration, in tiles and slabs, against its definitions in double, at sizes that do not fill
 * the last tile; and the same bits with one thread as with five. */
#include "base/random.h"
#include "quant/matrix.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { N = 587, ROWS = 150, DEAD = 301 }; /* three tiles of 256, ten slabs of 64 */

static double uniform(uint64_t *random) { return (double)(qtr_random_next(random) >> 11) * 0x1p-52 - 1; }

static struct qtr_threads *team_of(int n) {
  struct qtr_threads *team;
  assert_int_equal(qtr_threads_create(n, &team, NULL), QTR_OK);
  return team;
}

struct problem {
  float *h;      /* (N, N) positive definite but for a dead row and column */
  size_t *order; /* (N) a permutation */
};

static void open_problem(struct problem *p) {
  uint64_t random = 3;
  float *x = malloc(2 * N * N * sizeof *x);
  p->h = calloc(N * N, sizeof *p->h);
  p->order = malloc(N * sizeof *p->order);
  assert_true(x && p->h && p->order);
  for (size_t i = 0; i < 2 * N * N; i++) x[i] = i % N == DEAD ? 0 : (float)(uniform(&random) * (i % N % 11 == 4 ? 7 : 1));
  struct qtr_threads *team = team_of(3);
  qtr_matrix_add_gram(team, x, x, 2 * N, N, N, p->h);
  qtr_matrix_mirror(team, p->h, N);
  qtr_threads_free(team);
  for (size_t i = 0; i < N; i++) p->order[i] = i * 100 % N; /* N is prime */
  free(x);
}

static void close_problem(struct problem *p) {
  free(p->h);
  free(p->order);
}

/* H as it is meant: in order, the dead column with 1, damped. */
static double entry(const struct problem *p, const size_t *order, size_t i, size_t j, double damp) {
  size_t a = order ? order[i] : i, b = order ? order[j] : j;
  return i != j ? (double)p->h[a * N + b] : (p->h[a * N + a] == 0 ? 1 : (double)p->h[a * N + a]) + damp;
}

static void test_gram(void **state) {
  (void)state;
  struct problem p;
  open_problem(&p);
  for (size_t i = 0; i < N; i++) {
    for (size_t j = 0; j < i; j++) assert_true(p.h[i * N + j] == p.h[j * N + i]);
    assert_true(i == DEAD ? p.h[i * N + i] == 0 : p.h[i * N + i] > 100);
  }
  close_problem(&p);
}

/* UᵀU H = 1 */
static void test_inverse_factor(void **state) {
  (void)state;
  struct problem p;
  open_problem(&p);
  float *u = malloc(N * N * sizeof *u), *again = malloc(N * N * sizeof *again);
  double *inverse = calloc(N * N, sizeof *inverse), worst = 0;
  assert_true(u && again && inverse);
  for (int ordered = 0; ordered < 2; ordered++) {
    const size_t *order = ordered ? p.order : NULL;
    const double damp = 2.5;
    bool memory;
    for (int i = 0; i < 2; i++) {
      struct qtr_threads *team = team_of(i ? 5 : 1);
      memset(i ? again : u, 0xff, N * N * sizeof *u);
      assert_true(qtr_matrix_inverse_factor(team, p.h, order, damp, N, i ? again : u, &memory));
      assert_false(memory);
      qtr_threads_free(team);
    }
    assert_memory_equal(u, again, N * N * sizeof *u);
    memset(inverse, 0, N * N * sizeof *inverse);
    for (size_t k = 0; k < N; k++) {
      for (size_t i = 0; i < k; i++) assert_true(u[k * N + i] == 0);
      for (size_t i = k; i < N; i++) {
        for (size_t j = k; j < N; j++) inverse[i * N + j] += (double)u[k * N + i] * (double)u[k * N + j];
      }
    }
    for (size_t i = 0; i < N; i += 7) {
      for (size_t j = 0; j < N; j++) {
        double sum = i == j ? -1 : 0;
        for (size_t k = 0; k < N; k++) sum += inverse[i * N + k] * entry(&p, order, k, j, damp);
        worst = fmax(worst, fabs(sum));
      }
    }
  }
  print_message("inverse times matrix: off by %.1e at most\n", worst);
  assert_true(worst < 1e-4);
  free(u);
  free(again);
  free(inverse);
  close_problem(&p);
}

static void test_solve(void **state) {
  (void)state;
  struct problem p;
  open_problem(&p);
  uint64_t random = 8;
  const double damp = 0.5;
  float *b = malloc(ROWS * N * sizeof *b), *x[2];
  for (size_t i = 0; i < ROWS * N; i++) b[i] = (float)uniform(&random);
  for (int i = 0; i < 2; i++) {
    struct qtr_threads *team = team_of(i ? 5 : 1);
    bool memory;
    x[i] = malloc(ROWS * N * sizeof *b);
    assert_true(b && x[i]);
    memcpy(x[i], b, ROWS * N * sizeof *b);
    assert_true(qtr_matrix_solve(team, p.h, damp, N, x[i], ROWS, &memory));
    qtr_threads_free(team);
  }
  assert_memory_equal(x[0], x[1], ROWS * N * sizeof *b);
  double worst = 0;
  for (size_t r = 0; r < ROWS; r++) {
    for (size_t j = 0; j < N; j++) {
      double sum = -(double)b[r * N + j];
      for (size_t k = 0; k < N; k++) sum += (double)x[0][r * N + k] * entry(&p, NULL, k, j, damp);
      worst = fmax(worst, fabs(sum));
    }
  }
  print_message("solution times matrix: off by %.1e at most\n", worst);
  assert_true(worst < 1e-4);
  free(b);
  free(x[0]);
  free(x[1]);
  close_problem(&p);
}

/* A negative direction, in the first tile or the last, is noticed. */
static void test_not_definite(void **state) {
  (void)state;
  static const size_t places[] = {0, 255, 256, N - 1};
  struct problem p;
  struct qtr_threads *team = team_of(2);
  float *u = malloc(N * N * sizeof *u);
  assert_non_null(u);
  open_problem(&p);
  for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
    float *at = &p.h[places[i] * (N + 1)], kept = *at;
    bool memory = true;
    *at = -1;
    assert_false(qtr_matrix_inverse_factor(team, p.h, NULL, 0.01, N, u, &memory));
    assert_false(memory);
    *at = kept;
  }
  free(u);
  qtr_threads_free(team);
  close_problem(&p);
}

static void test_block_grams(void **state) {
  (void)state;
  enum { SAMPLES = 70, WIDTH = 24, BLOCKS = 5, ALL = WIDTH * BLOCKS };
  uint64_t random = 5;
  float x[SAMPLES * ALL], out[BLOCKS * WIDTH * WIDTH];
  for (size_t i = 0; i < SAMPLES * ALL; i++) x[i] = (float)uniform(&random);
  struct qtr_threads *team = team_of(3);
  qtr_matrix_block_grams(team, x, SAMPLES, ALL, WIDTH, out);
  qtr_threads_free(team);
  for (size_t k = 0; k < BLOCKS * WIDTH * WIDTH; k++) {
    size_t block = k / (WIDTH * WIDTH), i = k / WIDTH % WIDTH, j = k % WIDTH;
    double sum = 0;
    for (size_t t = 0; t < SAMPLES; t++) {
      const float *row = x + t * ALL + block * WIDTH;
      sum += (double)row[i] * (double)row[j];
    }
    assert_true(fabs(sum - (double)out[k]) < 1e-4);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_gram), cmocka_unit_test(test_inverse_factor),
                                     cmocka_unit_test(test_solve), cmocka_unit_test(test_not_definite),
                                     cmocka_unit_test(test_block_grams)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
