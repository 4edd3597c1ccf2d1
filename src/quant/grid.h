/* grid.h - the values that a quantised row can take (spec F.6), apart from how codes are chosen: round to nearest and GPTQ
 * round to the same grid.
 *
 * All formats are one formula: w^ = (code * scale - zero) * factor, code an integer in low … high.
 *   W4 per channel: scale fp16, zero fp16 (A.2.1's szero), factor 1, codes 0…15
 *   W4 in groups:   scale 1…127 and zero 0…120 integers (second level), factor fp16 (first level), codes 0…15 and so that
 *                   code * scale - zero fits int8
 *   W8:             scale fp16, zero 0, factor 1, codes -127…127 */
#ifndef QTR_QUANT_GRID_H
#define QTR_QUANT_GRID_H

#include "backend/backend.h" /* enum qtr_linear_format */
#include "quant/rtn.h"

/* The grid of one row, or of one group of one row. */
struct qtr_cell {
  float scale, zero, factor, low, high;
  float limit; /* of |w / factor|: groups 120, the protective range, which the first level's rounding may leave by a hair */
};

/* rni for |x| < 2^22: adding 1.5 * 2^23 leaves no bits below one, ties to even. Unlike nearbyintf it vectorises on any
 * x86-64. */
static inline float qtr_round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

static inline float qtr_clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

/* Nearest code. */
static inline float qtr_cell_code(const struct qtr_cell *c, float x) {
  float v = qtr_clamp(x / c->factor, -c->limit, c->limit);
  return qtr_round_even(qtr_clamp((v + c->zero) / c->scale, c->low, c->high));
}
static inline float qtr_cell_value(const struct qtr_cell *c, float code) { return (code * c->scale - c->zero) * c->factor; }

/* The grids whose ranges are given. low <= 0 <= high. Of a group: in units of the factor, within +-120. */
enum qtr_rtn_status qtr_cell_w4(float low, float high, struct qtr_cell *cell);
void qtr_cell_group(float low, float high, float factor, struct qtr_cell *cell);
enum qtr_rtn_status qtr_cell_w8(float max, struct qtr_cell *cell);
/* First level of the groups: the largest magnitude of the row as fp16 / 120. */
enum qtr_rtn_status qtr_group_factor(float max, float *factor);

/* A quantised matrix: a cell for each row or group, and codes. */
struct qtr_grid {
  enum qtr_linear_format format; /* W4A8, W4A8_G128 or W8A8 */
  size_t n_out, n_in, n_groups;  /* n_groups: cells of a row, 1 but for G128 */
  struct qtr_cell *cell;         /* (n_out, n_groups) */
  int8_t *code;                  /* (n_out, n_in) */
};
enum qtr_status qtr_grid_create(enum qtr_linear_format format, size_t n_out, size_t n_in, struct qtr_grid *grid,
                                struct qtr_error *err);
void qtr_grid_free(struct qtr_grid *grid);

/* Cells of row r from its values, each cell's range shrunk by ratio[cell] (NULL: 1, the whole range). w: (n_in) */
enum qtr_rtn_status qtr_grid_fit_row(struct qtr_grid *grid, size_t r, const float *w, const float *ratio);

/* The same in parts, for those who try many ratios: the first level of a row (1 where there is none), the range of the
 * values of a cell, and the cell that they give with a ratio. */
struct qtr_range {
  float low, high; /* low <= 0 <= high */
};
enum qtr_rtn_status qtr_row_factor(enum qtr_linear_format format, const float *w, size_t n_in, float *factor);
struct qtr_range qtr_cell_range(const float *w, size_t n);
enum qtr_rtn_status qtr_cell_fit(enum qtr_linear_format format, struct qtr_range range, float factor, float ratio,
                                 struct qtr_cell *cell);

static inline const struct qtr_cell *qtr_grid_cell(const struct qtr_grid *grid, size_t r, size_t column) {
  return &grid->cell[r * grid->n_groups + (grid->n_groups > 1 ? column / QTR_GROUP : 0)];
}

static inline size_t qtr_grid_cell_width(const struct qtr_grid *grid) { return grid->n_groups > 1 ? QTR_GROUP : grid->n_in; }

/* What the code at (r, column) stands for. */
static inline float qtr_grid_value(const struct qtr_grid *grid, size_t r, size_t column) {
  return qtr_cell_value(qtr_grid_cell(grid, r, column), (float)grid->code[r * grid->n_in + column]);
}

#endif
