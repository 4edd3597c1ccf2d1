/* hadamard.c - rotations (hadamard.h, spec F.3). */
#include "quant/hadamard.h"

#include "base/status.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- Paley's constructions ----------------------------------------------------------------------- */

/* GF(q), q = p or p²; elements are a + b·x as a + b·p, x² = `square` (no square in GF(p)). */
struct field {
  uint32_t p, q, square;
};

static uint32_t multiply(const struct field *f, uint32_t x, uint32_t y) {
  uint32_t p = f->p, a = x % p, b = x / p, c = y % p, d = y / p;
  return (a * c + b * d % p * f->square) % p + (a * d + b * c) % p * p;
}

static uint32_t subtract(const struct field *f, uint32_t x, uint32_t y) {
  uint32_t p = f->p;
  return (x % p + p - y % p) % p + (x / p + p - y / p) % p * p;
}

/* 1 for squares, -1 for others, 0 for 0. */
static int character(const struct field *f, uint32_t x) {
  uint32_t power = 1, base = x;
  if (x == 0) return 0;
  for (uint32_t e = (f->q - 1) / 2; e; e >>= 1) {
    if (e & 1) power = multiply(f, power, base);
    base = multiply(f, base, base);
  }
  return power == 1 ? 1 : -1;
}

static bool is_prime(uint32_t n) {
  for (uint32_t d = 2; d * d <= n; d++) {
    if (n % d == 0) return false;
  }
  return n >= 2;
}

static bool field_make(uint32_t q, struct field *f) {
  if (is_prime(q)) {
    *f = (struct field){.p = q, .q = q};
    return true;
  }
  for (uint32_t p = 3; p * p <= q; p += 2) {
    if (p * p != q || !is_prime(p)) continue;
    *f = (struct field){.p = p, .q = p};
    uint32_t square = 2;
    while (character(f, square) != -1) square++;
    *f = (struct field){.p = p, .q = q, .square = square};
    return true;
  }
  return false;
}

/* Entry (i, j) of the matrix of order q + 1 with the character of j - i inside and a border of ones. */
static int bordered(const struct field *f, uint32_t i, uint32_t j, bool skew) {
  if (i == 0) return j == 0 ? 0 : 1;
  if (j == 0) return skew ? -1 : 1;
  return character(f, subtract(f, j - 1, i - 1));
}

/* A Hadamard matrix of order k, divided by sqrt(k). False when neither construction gives one. */
static bool paley(uint32_t k, double *h) {
  struct field f;
  double one = 1.0 / sqrt((double)k);
  if (k % 4) return false;
  if ((k - 1) % 4 == 3 && field_make(k - 1, &f)) { /* I: S + I, S skew */
    for (uint32_t i = 0; i < k; i++) {
      for (uint32_t j = 0; j < k; j++) h[i * k + j] = one * (i == j ? 1 : bordered(&f, i, j, true));
    }
    return true;
  }
  uint32_t half = k / 2;
  if ((half - 1) % 4 != 1 || !field_make(half - 1, &f)) return false;
  static const int of_zero[2][2] = {{1, -1}, {-1, -1}}, of_one[2][2] = {{1, 1}, {1, -1}};
  for (uint32_t i = 0; i < k; i++) { /* II: each entry of the symmetric S becomes a block of 2 x 2 */
    for (uint32_t j = 0; j < k; j++) {
      int s = bordered(&f, i / 2, j / 2, false);
      h[i * k + j] = one * (s ? s * of_one[i % 2][j % 2] : of_zero[i % 2][j % 2]);
    }
  }
  return true;
}

/* Real, symmetric and orthonormal for any k. */
static void hartley(size_t k, double *h) {
  double one = 1.0 / sqrt((double)k), turn = 2.0 * 3.14159265358979323846 / (double)k;
  for (size_t i = 0; i < k; i++) {
    for (size_t j = 0; j < k; j++) {
      double angle = turn * (double)(i * j % k);
      h[i * k + j] = one * (cos(angle) + sin(angle));
    }
  }
}

static bool power_of_two(size_t n) { return n && (n & (n - 1)) == 0; }

enum qtr_status qtr_rotation_create(size_t n, struct qtr_rotation *rotation, struct qtr_error *err) {
  static const size_t known[] = {172, 156, 140, 108, 60, 52, 36, 28, 40, 20, 12}; /* in the order of F.3 */
  *rotation = (struct qtr_rotation){.n = n, .k = 1, .flat = true};
  if (n == 0 || n > ((size_t)1 << 24)) return qtr_fail(err, QTR_ERR_ARGUMENT, "a rotation of %zu channels", n);
  if (power_of_two(n)) return QTR_OK;
  size_t k = 0;
  for (size_t i = 0; i < sizeof known / sizeof known[0] && !k; i++) {
    if (n % known[i] == 0 && power_of_two(n / known[i])) k = known[i];
  }
  if (!k) { /* all of the odd part, with two factors of two where there are: orders of Hadamard matrices are multiples of 4
             */
    for (k = n; k % 8 == 0 || (k % 4 && k % 2 == 0);) k /= 2;
  }
  if (k > 4096) return qtr_fail(err, QTR_ERR_UNSUPPORTED, "%zu channels cannot be rotated: their odd part is too large", n);
  rotation->k = k;
  rotation->factor = malloc(k * k * sizeof *rotation->factor);
  if (!rotation->factor) return qtr_fail_memory(err, "a rotation", k * k * sizeof *rotation->factor);
  rotation->flat = paley((uint32_t)k, rotation->factor);
  if (!rotation->flat && k % 2 == 0 && paley((uint32_t)k / 2, rotation->factor)) { /* 40: two of 20 */
    rotation->k = k / 2;
    rotation->flat = true;
  }
  if (!rotation->flat) hartley(k, rotation->factor);
  return QTR_OK;
}

void qtr_rotation_free(struct qtr_rotation *rotation) {
  free(rotation->factor);
  *rotation = (struct qtr_rotation){0};
}

void qtr_rotation_apply(const struct qtr_rotation *rotation, double *v, double *scratch) {
  size_t n = rotation->n, k = rotation->k, m = n / k;
  for (size_t half = 1; half < m; half *= 2) { /* Sylvester's butterflies, in each of the k runs of m */
    for (size_t i = 0; i < n; i += 2 * half) {
      for (size_t j = i; j < i + half; j++) {
        double a = v[j], b = v[j + half];
        v[j] = a + b;
        v[j + half] = a - b;
      }
    }
  }
  double scale = 1.0 / sqrt((double)m);
  if (k == 1) {
    for (size_t i = 0; i < n; i++) v[i] *= scale;
    return;
  }
  memset(scratch, 0, n * sizeof *scratch);
  for (size_t i = 0; i < k; i++) {
    for (size_t j = 0; j < k; j++) {
      double f = rotation->factor[i * k + j] * scale;
      for (size_t t = 0; t < m; t++) scratch[j * m + t] += v[i * m + t] * f;
    }
  }
  memcpy(v, scratch, n * sizeof *v);
}

/* ---- matrices ------------------------------------------------------------------------------------ */

struct rotating {
  const struct qtr_rotation *rotation;
  float *x;
  size_t n_cols;
  double *scratch; /* (threads, 2, n) */
};

static void rotate_row_runs(void *arg, size_t begin, size_t end, int thread) {
  const struct rotating *r = arg;
  size_t n = r->rotation->n;
  double *v = r->scratch + (size_t)thread * 2 * n;
  for (size_t run = begin; run < end; run++) {
    float *x = r->x + run * n;
    for (size_t i = 0; i < n; i++) v[i] = (double)x[i];
    qtr_rotation_apply(r->rotation, v, v + n);
    for (size_t i = 0; i < n; i++) x[i] = (float)v[i];
  }
}

static void rotate_column_runs(void *arg, size_t begin, size_t end, int thread) {
  const struct rotating *r = arg;
  size_t n = r->rotation->n, cols = r->n_cols;
  double *v = r->scratch + (size_t)thread * 2 * n;
  for (size_t run = begin; run < end; run++) {
    float *x = r->x + run / cols * n * cols + run % cols;
    for (size_t i = 0; i < n; i++) v[i] = (double)x[i * cols];
    qtr_rotation_apply(r->rotation, v, v + n);
    for (size_t i = 0; i < n; i++) x[i * cols] = (float)v[i];
  }
}

static enum qtr_status rotate(struct qtr_threads *team, const struct qtr_rotation *rotation, float *x, size_t n_runs,
                              size_t n_cols, qtr_task task, struct qtr_error *err) {
  size_t n_scratch = (size_t)qtr_threads_count(team) * 2 * rotation->n;
  struct rotating r = {.rotation = rotation, .x = x, .n_cols = n_cols, .scratch = malloc(n_scratch * sizeof *r.scratch)};
  if (!r.scratch) return qtr_fail_memory(err, "a rotation", n_scratch * sizeof *r.scratch);
  qtr_threads_for(team, n_runs, 16, task, &r);
  free(r.scratch);
  return QTR_OK;
}

enum qtr_status qtr_rotate_rows(struct qtr_threads *team, const struct qtr_rotation *rotation, float *x, size_t n_rows,
                                size_t n_cols, struct qtr_error *err) {
  return rotate(team, rotation, x, n_rows * (n_cols / rotation->n), n_cols, rotate_row_runs, err);
}

enum qtr_status qtr_rotate_columns(struct qtr_threads *team, const struct qtr_rotation *rotation, float *x, size_t n_rows,
                                   size_t n_cols, struct qtr_error *err) {
  return rotate(team, rotation, x, n_rows / rotation->n * n_cols, n_cols, rotate_column_runs, err);
}
