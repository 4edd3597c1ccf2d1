/* Rotations of spec F.3: orthonormal for every size, flat where a Hadamard matrix of the size is known, and the functions on
 * rows and columns agree with the matrix that qtr_rotation_apply makes of unit vectors. */
#include "base/checked.h"
#include "base/random.h"
#include "quant/hadamard.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static double uniform(uint64_t *random) { return (double)(qtr_random_next(random) >> 11) * 0x1p-52 - 1; }

static void open_rotation(size_t n, struct qtr_rotation *rotation) {
  struct qtr_error err;
  if (qtr_rotation_create(n, rotation, &err)) fail_msg("%zu: %s", n, err.message);
  assert_int_equal(rotation->n, n);
}

/* Row `row` of Q. out: (n) */
static void row_of(const struct qtr_rotation *rotation, size_t row, double *out, double *scratch) {
  memset(out, 0, rotation->n * sizeof *out);
  out[row] = 1;
  qtr_rotation_apply(rotation, out, scratch);
}

/* Up to 48 rows of Q, spread over it: unit length, at right angles, and flat when the rotation says so. */
static void check_size(size_t n, bool flat) {
  struct qtr_rotation rotation;
  open_rotation(n, &rotation);
  if (rotation.flat != flat) fail_msg("%zu channels: flat is %d", n, rotation.flat);
  size_t n_rows = QTR_MIN(n, (size_t)48);
  double *rows = malloc((n_rows + 1) * n * sizeof *rows), *scratch = rows + n_rows * n, worst = 0, uneven = 0, largest = 0;
  assert_non_null(rows);
  for (size_t i = 0; i < n_rows; i++) {
    double *row = rows + i * n;
    row_of(&rotation, i * n / n_rows, row, scratch);
    for (size_t c = 0; c < n; c++) uneven = fmax(uneven, fabs(fabs(row[c]) * sqrt((double)n) - 1));
    for (size_t c = 0; c < n; c++) largest = fmax(largest, fabs(row[c]) * sqrt((double)n));
    for (size_t k = 0; k <= i; k++) {
      double dot = 0;
      for (size_t c = 0; c < n; c++) dot += row[c] * rows[k * n + c];
      worst = fmax(worst, fabs(dot - (i == k)));
    }
  }
  if (!(worst < 1e-12)) fail_msg("%zu channels: off orthonormal by %g", n, worst);
  if (flat && !(uneven < 1e-11)) fail_msg("%zu channels: entries off 1/sqrt(n) by %g", n, uneven);
  if (!flat && largest > sqrt(2.0) + 1e-9) fail_msg("%zu channels: an entry beyond sqrt(2/n)", n);
  free(rows);
  qtr_rotation_free(&rotation);
}

static void test_sizes(void **state) {
  (void)state;
  static const size_t flat[] = {12, 20, 24, 28, 36, 40, 52, 56, 60, 72, 80, 96, 108, 140, 216, 768, 3584, 5120, 6656, 7168},
                      other[] = {3, 5, 6, 7, 9, 10, 14, 15, 49, 100, 156, 172, 344, 1100, 5504};
  for (size_t n = 1; n <= 8192; n *= 2) check_size(n, true);
  for (size_t i = 0; i < sizeof flat / sizeof flat[0]; i++) check_size(flat[i], true);
  for (size_t i = 0; i < sizeof other / sizeof other[0]; i++) {
    struct qtr_rotation rotation; /* some odd multiples are orders of Hadamard matrices, too: flat must then be true */
    open_rotation(other[i], &rotation);
    bool is_flat = rotation.flat;
    qtr_rotation_free(&rotation);
    if (other[i] % 4) assert_false(is_flat); /* no such matrix exists */
    check_size(other[i], is_flat);
  }
}

static void test_refused(void **state) {
  (void)state;
  struct qtr_rotation rotation;
  struct qtr_error err;
  assert_int_equal(qtr_rotation_create(0, &rotation, &err), QTR_ERR_ARGUMENT);
  qtr_rotation_free(&rotation);
  assert_int_equal(qtr_rotation_create(4099 * 2, &rotation, &err), QTR_ERR_UNSUPPORTED); /* a prime */
  assert_non_null(strstr(err.message, "8198"));
  qtr_rotation_free(&rotation);
}

/* qtr_rotate_rows is W Q for each run of n, qtr_rotate_columns Qᵀ W for each block of n rows, on any number of threads. */
static void check_matrices(size_t n, int n_threads) {
  const size_t runs = 3, cols = 5;
  struct qtr_rotation rotation;
  struct qtr_threads *team;
  uint64_t random = n;
  open_rotation(n, &rotation);
  assert_int_equal(qtr_threads_create(n_threads, &team, NULL), QTR_OK);
  double *q = malloc((n + 1) * n * sizeof *q);
  float *wide = malloc(2 * runs * n * cols * sizeof *wide), *before = wide + runs * n * cols;
  assert_true(q && wide);
  for (size_t i = 0; i < n; i++) row_of(&rotation, i, q + i * n, q + n * n);
  for (size_t i = 0; i < runs * n * cols; i++) before[i] = wide[i] = (float)uniform(&random);
  assert_int_equal(qtr_rotate_rows(team, &rotation, wide, cols, runs * n, NULL), QTR_OK);
  double worst = 0;
  for (size_t run = 0; run < cols * runs; run++) {
    for (size_t c = 0; c < n; c++) {
      double sum = 0;
      for (size_t k = 0; k < n; k++) sum += (double)before[run * n + k] * q[k * n + c];
      worst = fmax(worst, fabs(sum - (double)wide[run * n + c]));
    }
  }
  memcpy(wide, before, runs * n * cols * sizeof *wide);
  assert_int_equal(qtr_rotate_columns(team, &rotation, wide, runs * n, cols, NULL), QTR_OK);
  for (size_t i = 0; i < runs * n * cols; i++) {
    size_t block = i / cols / n, r = i / cols % n, c = i % cols;
    double sum = 0;
    for (size_t k = 0; k < n; k++) sum += q[k * n + r] * (double)before[(block * n + k) * cols + c];
    worst = fmax(worst, fabs(sum - (double)wide[i]));
  }
  if (!(worst < 1e-6)) fail_msg("%zu channels, %d threads: off by %g", n, n_threads, worst);
  free(q);
  free(wide);
  qtr_threads_free(team);
  qtr_rotation_free(&rotation);
}

static void test_matrices(void **state) {
  (void)state;
  static const size_t sizes[] = {1, 2, 12, 28, 52, 64, 80, 96, 156, 15};
  for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) check_matrices(sizes[i], 1 + (int)i % 3);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_sizes), cmocka_unit_test(test_refused),
                                     cmocka_unit_test(test_matrices)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
