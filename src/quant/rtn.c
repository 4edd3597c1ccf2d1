/* rtn.c - round to nearest (rtn.h, spec F.6) on the grids of grid.c. */
#include "quant/rtn.h"

#include "base/checked.h"
#include "base/half.h"
#include "quant/grid.h"

#include <math.h>
#include <stdlib.h>

/* Adds the difference of n values to the error; sums in double. */
static void measure(const float *w, const float *approx, size_t n, struct qtr_rtn_error *error) {
  double squared = 0, norm = 0;
  float max = 0;
  for (size_t i = 0; i < n; i++) {
    double d = (double)w[i] - (double)approx[i], x = w[i];
    squared += d * d;
    norm += x * x;
    float a = fabsf(w[i] - approx[i]);
    max = a > max ? a : max;
  }
  error->squared += squared;
  error->norm += norm;
  if ((double)max > error->max) error->max = max;
}

/* At most QTR_GROUP values of one cell. codes: (n); W8's are int8. */
static void round_cell(const struct qtr_cell *cell, const float *w, size_t n, uint8_t *codes, struct qtr_rtn_error *error) {
  float approx[QTR_GROUP];
  for (size_t i = 0; i < n; i++) {
    float q = qtr_cell_code(cell, w[i]);
    codes[i] = (uint8_t)(int8_t)q;
    approx[i] = qtr_cell_value(cell, q);
  }
  measure(w, approx, n, error);
}

/* One row on the cells that its whole range gives. cell: (cells of a row) */
static enum qtr_rtn_status round_row(enum qtr_linear_format format, const float *w, size_t n_in, struct qtr_cell *cell,
                                     uint8_t *codes, struct qtr_rtn_error *error) {
  bool grouped = format == QTR_LINEAR_W4A8_G128;
  struct qtr_grid grid = {
      .format = format, .n_out = 1, .n_in = n_in, .n_groups = grouped ? n_in / QTR_GROUP : 1, .cell = cell};
  enum qtr_rtn_status status = qtr_grid_fit_row(&grid, 0, w, NULL);
  for (size_t begin = 0; begin < n_in && !status; begin += QTR_GROUP) {
    round_cell(qtr_grid_cell(&grid, 0, begin), w + begin, QTR_MIN(n_in - begin, (size_t)QTR_GROUP), codes + begin, error);
  }
  return status;
}

enum qtr_rtn_status qtr_rtn_w4(const float *w, size_t n_rows, size_t n_in, uint8_t *codes, uint16_t *scale, uint16_t *szero,
                               struct qtr_rtn_error *error) {
  for (size_t r = 0; r < n_rows; r++) {
    struct qtr_cell cell;
    enum qtr_rtn_status status = round_row(QTR_LINEAR_W4A8, w + r * n_in, n_in, &cell, codes + r * n_in, error);
    if (status) return status;
    scale[r] = qtr_f16_from_f32(cell.scale);
    szero[r] = qtr_f16_from_f32(cell.zero);
  }
  return QTR_RTN_OK;
}

enum qtr_rtn_status qtr_rtn_w4_g128(const float *w, size_t n_rows, size_t n_in, uint8_t *codes, uint16_t *s1, uint8_t *s2,
                                    uint8_t *z2, struct qtr_rtn_error *error) {
  size_t n_groups = n_in / QTR_GROUP;
  struct qtr_cell *cell = malloc(QTR_MAX(n_groups, 1) * sizeof *cell);
  if (!cell) return QTR_RTN_MEMORY;
  enum qtr_rtn_status status = QTR_RTN_OK;
  for (size_t r = 0; r < n_rows && !status; r++) {
    status = round_row(QTR_LINEAR_W4A8_G128, w + r * n_in, n_in, cell, codes + r * n_in, error);
    if (status) break;
    s1[r] = qtr_f16_from_f32(cell[0].factor);
    for (size_t g = 0; g < n_groups; g++) {
      s2[r * n_groups + g] = (uint8_t)cell[g].scale;
      z2[r * n_groups + g] = (uint8_t)cell[g].zero;
    }
  }
  free(cell);
  return status;
}

enum qtr_rtn_status qtr_rtn_w8(const float *w, size_t n_rows, size_t n_in, int8_t *codes, float *scale,
                               struct qtr_rtn_error *error) {
  for (size_t r = 0; r < n_rows; r++) {
    struct qtr_cell cell;
    enum qtr_rtn_status status = round_row(QTR_LINEAR_W8A8, w + r * n_in, n_in, &cell, (uint8_t *)codes + r * n_in, error);
    if (status) return status;
    scale[r] = cell.scale;
  }
  return QTR_RTN_OK;
}

static enum qtr_rtn_status round_halves(const float *w, size_t n, uint16_t *out, bool bf16, struct qtr_rtn_error *error) {
  float approx[QTR_GROUP];
  for (size_t begin = 0; begin < n; begin += QTR_GROUP) {
    size_t k = QTR_MIN(n - begin, (size_t)QTR_GROUP);
    for (size_t i = 0; i < k; i++) {
      if (!isfinite(w[begin + i])) return QTR_RTN_NOT_FINITE;
      out[begin + i] = bf16 ? qtr_bf16_from_f32(w[begin + i]) : qtr_f16_from_f32(w[begin + i]);
      approx[i] = bf16 ? qtr_bf16_to_f32(out[begin + i]) : qtr_f16_to_f32(out[begin + i]);
      if (!isfinite(approx[i])) return QTR_RTN_RANGE;
    }
    measure(w + begin, approx, k, error);
  }
  return QTR_RTN_OK;
}

enum qtr_rtn_status qtr_rtn_f16(const float *w, size_t n, uint16_t *out, struct qtr_rtn_error *error) {
  return round_halves(w, n, out, false, error);
}

enum qtr_rtn_status qtr_rtn_bf16(const float *w, size_t n, uint16_t *out, struct qtr_rtn_error *error) {
  return round_halves(w, n, out, true, error);
}
