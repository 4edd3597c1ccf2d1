/* grid.c - ranges to grids (grid.h, spec F.6).
 *
 * Zeros. F.6's PostScale zero is -min of the row or group, rounded to what the file can hold (fp16, or an integer below the
 * second level), not a multiple of the scale: nothing of the 16 codes is lost to rounding the zero. The range is widened to
 * contain 0 (min <= 0 <= max), which real weights do by themselves: then szero >= 0 as A.2.1 asks, z2 is in 0…120, and P was
 * searched for exactly those ranges. */
#include "quant/grid.h"

#include "base/checked.h"
#include "base/half.h"
#include "base/status.h"

#include <math.h>
#include <stdlib.h>

/* A scale as fp16; 0 becomes 1 (F.6). */
static enum qtr_rtn_status half_scale(float x, float *value) {
  *value = qtr_f16_round(x);
  if (*value == 0) *value = 1;
  return isfinite(*value) ? QTR_RTN_OK : QTR_RTN_RANGE;
}

enum qtr_rtn_status qtr_cell_w4(float low, float high, struct qtr_cell *cell) {
  *cell = (struct qtr_cell){.zero = qtr_f16_round(-low), .factor = 1, .low = 0, .high = 15, .limit = INFINITY};
  if (!isfinite(cell->zero)) return QTR_RTN_RANGE;
  return half_scale(high / 15 - low / 15, &cell->scale); /* halves first: the difference of two floats may overflow */
}

void qtr_cell_group(float low, float high, float factor, struct qtr_cell *cell) {
  float s = qtr_round_even((high - low) / 15), z = qtr_round_even(-low);
  s = s < 1 ? 1 : s; /* at most 2 P / 15 = 16 */
  /* Within P no code leaves int8; the smaller of the two limits is written down so that this needs no proof. */
  float last = QTR_MIN(15.0f, floorf((127 + z) / s));
  *cell = (struct qtr_cell){.scale = s, .zero = z, .factor = factor, .low = 0, .high = last, .limit = QTR_RTN_PROTECT};
}

enum qtr_rtn_status qtr_cell_w8(float max, struct qtr_cell *cell) {
  *cell = (struct qtr_cell){.zero = 0, .factor = 1, .low = -127, .high = 127, .limit = INFINITY};
  return half_scale(max / 127, &cell->scale);
}

enum qtr_rtn_status qtr_group_factor(float max, float *factor) { return half_scale(max / QTR_RTN_PROTECT, factor); }

enum qtr_status qtr_grid_create(enum qtr_linear_format format, size_t n_out, size_t n_in, struct qtr_grid *grid,
                                struct qtr_error *err) {
  *grid = (struct qtr_grid){
      .format = format, .n_out = n_out, .n_in = n_in, .n_groups = format == QTR_LINEAR_W4A8_G128 ? n_in / QTR_GROUP : 1};
  grid->cell = malloc(n_out * grid->n_groups * sizeof *grid->cell);
  grid->code = malloc(n_out * n_in);
  if (grid->cell && grid->code) return QTR_OK;
  qtr_grid_free(grid);
  return qtr_fail_memory(err, "a quantised matrix", n_out * n_in);
}

void qtr_grid_free(struct qtr_grid *grid) {
  free(grid->cell);
  free(grid->code);
  *grid = (struct qtr_grid){0};
}

struct qtr_range qtr_cell_range(const float *w, size_t n) {
  float low = 0, high = 0;
  for (size_t i = 0; i < n; i++) {
    low = w[i] < low ? w[i] : low;
    high = w[i] > high ? w[i] : high;
  }
  return (struct qtr_range){low, high};
}

/* x - x is 0 but for NaN and infinities. */
static bool all_finite(const float *w, size_t n) {
  float poison = 0;
  for (size_t i = 0; i < n; i++) poison += w[i] - w[i];
  return poison == 0;
}

enum qtr_rtn_status qtr_row_factor(enum qtr_linear_format format, const float *w, size_t n_in, float *factor) {
  *factor = 1;
  if (!all_finite(w, n_in)) return QTR_RTN_NOT_FINITE;
  if (format != QTR_LINEAR_W4A8_G128) return QTR_RTN_OK;
  struct qtr_range row = qtr_cell_range(w, n_in);
  return qtr_group_factor(QTR_MAX(row.high, -row.low), factor);
}

enum qtr_rtn_status qtr_cell_fit(enum qtr_linear_format format, struct qtr_range range, float factor, float ratio,
                                 struct qtr_cell *cell) {
  float low = ratio * range.low, high = ratio * range.high;
  if (format == QTR_LINEAR_W4A8) return qtr_cell_w4(low, high, cell);
  if (format == QTR_LINEAR_W8A8) return qtr_cell_w8(QTR_MAX(high, -low), cell);
  /* Rounding the factor down may leave P by a hair. */
  qtr_cell_group(qtr_clamp(low / factor, -QTR_RTN_PROTECT, 0), qtr_clamp(high / factor, 0, QTR_RTN_PROTECT), factor, cell);
  return QTR_RTN_OK;
}

enum qtr_rtn_status qtr_grid_fit_row(struct qtr_grid *grid, size_t r, const float *w, const float *ratio) {
  size_t width = qtr_grid_cell_width(grid);
  float factor;
  enum qtr_rtn_status status = qtr_row_factor(grid->format, w, grid->n_in, &factor);
  for (size_t g = 0; g < grid->n_groups && !status; g++) {
    status = qtr_cell_fit(grid->format, qtr_cell_range(w + g * width, width), factor, ratio ? ratio[g] : 1,
                          &grid->cell[r * grid->n_groups + g]);
  }
  return status;
}
