/* clip.c - clipping and output errors (clip.h). Rows do not depend on each other, so every loop gives a thread some rows and
 * the result does not depend on the number of threads.
 *
 * The error of one cell of a row, ‖X δ‖² over the samples with δ = w - ŵ, is δᵀ G δ with G = Xᵀ X of the cell's columns. Of
 * a group's 128 columns G is a quarter as large as the columns of 512 samples, so the search costs a quarter; whole rows are
 * wider than there are samples, and are multiplied with these. */
#include "quant/clip.h"

#include "base/checked.h"
#include "base/status.h"
#include "quant/matrix.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define ROWS ((size_t)32) /* of one piece of work */
#define STEPS ((size_t)4) /* ratios tried in one product: what it multiplies with is packed once for all */

/* ---- the search ---------------------------------------------------------------------------------- */

struct clipping {
  const float *w, *samples; /* samples NULL: no search */
  size_t n_samples;
  const struct qtr_clip_options *options;
  struct qtr_grid *grid;
  float *gram;      /* (n_groups, width, width) Xᵀ X of each cell's columns; NULL: X itself is the smaller */
  size_t n_product; /* width, or n_samples */
  float *scratch;   /* (threads, n_scratch): ratios (ROWS, n_groups), δ (STEPS * ROWS, width), products (STEPS * ROWS,
                       n_product) */
  size_t n_scratch;
  atomic_int fail; /* enum qtr_rtn_status */
};

static size_t search_scratch(const struct clipping *c) {
  return STEPS * ROWS * (qtr_grid_cell_width(c->grid) + c->n_product) + ROWS * c->grid->n_groups;
}

static float ratio_of(const struct qtr_clip_options *o, size_t step) {
  return 1 - (float)step / (float)o->n_steps * o->max_shrink;
}

/* delta (n) = w - ŵ */
static void differences(const float *w, const struct qtr_cell *cell, size_t n, float *delta) {
  const struct qtr_cell c = *cell; /* the compiler then knows that delta does not change it */
  for (size_t i = 0; i < n; i++) delta[i] = w[i] - qtr_cell_value(&c, qtr_cell_code(&c, w[i]));
}

static float sum_products(const float *x, const float *y, size_t n) {
  double sum = 0;
  for (size_t i = 0; i < n; i++) sum += (double)(x[i] * y[i]);
  return (float)sum;
}

/* The ratios of cell g of n rows, into ratio[r * n_groups + g]. */
static void search_cells(const struct clipping *c, size_t row, size_t n, size_t g, float *delta, float *out, float *ratio) {
  const struct qtr_grid *grid = c->grid;
  size_t n_in = grid->n_in, cells = grid->n_groups, width = qtr_grid_cell_width(grid), n_steps = (size_t)c->options->n_steps;
  const float *w = c->w + row * n_in + g * width;
  float best[ROWS];
  struct qtr_range range[ROWS];
  for (size_t r = 0; r < n; r++) range[r] = qtr_cell_range(w + r * n_in, width);
  for (size_t first = 0; first < n_steps; first += STEPS) {
    size_t n_tried = QTR_MIN(STEPS, n_steps - first);
    for (size_t i = 0; i < n_tried * n; i++) {
      size_t r = i % n;
      struct qtr_cell cell;
      (void)qtr_cell_fit(grid->format, range[r], grid->cell[(row + r) * cells].factor, ratio_of(c->options, first + i / n),
                         &cell);
      differences(w + r * n_in, &cell, width, delta + i * width);
    }
    if (c->gram)
      qtr_matrix_multiply_t(delta, width, c->gram + g * width * width, width, out, width, n_tried * n, width, width);
    else
      qtr_matrix_multiply_t(delta, width, c->samples + g * width, n_in, out, c->n_samples, n_tried * n, c->n_samples, width);
    for (size_t i = 0; i < n_tried * n; i++) {
      size_t r = i % n;
      const float *y = out + i * c->n_product;
      float error = sum_products(c->gram ? delta + i * width : y, y, c->n_product);
      if (first + i / n > 0 && error >= best[r]) continue;
      best[r] = error;
      ratio[r * cells + g] = ratio_of(c->options, first + i / n);
    }
  }
}

static void clip_rows(void *arg, size_t first, size_t last, int thread) {
  struct clipping *c = arg;
  struct qtr_grid *grid = c->grid;
  size_t cells = grid->n_groups;
  for (size_t piece = first; piece < last; piece++) {
    size_t row = piece * ROWS, n = QTR_MIN(ROWS, grid->n_out - row);
    bool good = true;
    for (size_t r = row; r < row + n; r++) {
      enum qtr_rtn_status status = qtr_grid_fit_row(grid, r, c->w + r * grid->n_in, NULL);
      if (status) atomic_store(&c->fail, (int)status);
      good &= status == QTR_RTN_OK;
    }
    if (!good || !c->samples) continue;
    float *ratio = c->scratch + (size_t)thread * c->n_scratch, *delta = ratio + ROWS * cells;
    float *out = delta + STEPS * ROWS * qtr_grid_cell_width(grid);
    for (size_t g = 0; g < cells; g++) search_cells(c, row, n, g, delta, out, ratio);
    for (size_t r = 0; r < n; r++) (void)qtr_grid_fit_row(grid, row + r, c->w + (row + r) * grid->n_in, ratio + r * cells);
  }
}

enum qtr_status qtr_clip(struct qtr_threads *team, const float *w, const float *samples, size_t n_samples,
                         const struct qtr_clip_options *options, struct qtr_grid *grid, const char *what,
                         struct qtr_error *err) {
  struct clipping c = {.w = w, .samples = samples, .n_samples = n_samples, .options = options, .grid = grid};
  size_t width = qtr_grid_cell_width(grid), n_gram = width < n_samples ? grid->n_groups * width * width : 0;
  enum qtr_status status = QTR_OK;
  if (samples) {
    c.n_product = n_gram ? width : n_samples;
    c.n_scratch = search_scratch(&c);
    size_t n = (size_t)qtr_threads_count(team) * c.n_scratch;
    c.scratch = malloc(n * sizeof *c.scratch);
    c.gram = n_gram ? malloc(n_gram * sizeof *c.gram) : NULL;
    if (!c.scratch || (n_gram && !c.gram)) {
      status = qtr_fail_memory(err, what, (n + n_gram) * sizeof *c.scratch);
      goto done;
    }
    if (c.gram) qtr_matrix_block_grams(team, samples, n_samples, grid->n_in, width, c.gram);
  }
  qtr_threads_for(team, qtr_ceil_div(grid->n_out, ROWS), 1, clip_rows, &c);
  switch (atomic_load(&c.fail)) {
    case QTR_RTN_OK: break;
    case QTR_RTN_NOT_FINITE: status = qtr_fail(err, QTR_ERR_FORMAT, "%s holds a value that is not finite", what); break;
    default: status = qtr_fail(err, QTR_ERR_UNSUPPORTED, "%s needs scales beyond the range of fp16 (65504)", what);
  }
done:
  free(c.scratch);
  free(c.gram);
  return status;
}

/* ---- errors -------------------------------------------------------------------------------------- */

struct measuring {
  const float *w, *samples;
  const struct qtr_grid *grid;
  size_t n_samples;
  float *scratch;   /* (threads, ROWS, n_in + n_samples) */
  double (*sum)[2]; /* (pieces) ‖X Δᵀ‖², ‖X Wᵀ‖² */
};

static double sum_squares(const float *x, size_t n) {
  double sum = 0;
  for (size_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
  return sum;
}

static void measure_rows(void *arg, size_t first, size_t last, int thread) {
  const struct measuring *m = arg;
  size_t n_in = m->grid->n_in;
  float *delta = m->scratch + (size_t)thread * ROWS * (n_in + m->n_samples), *out = delta + ROWS * n_in;
  for (size_t piece = first; piece < last; piece++) {
    size_t row = piece * ROWS, n = QTR_MIN(ROWS, m->grid->n_out - row);
    for (size_t r = 0; r < n; r++) {
      for (size_t i = 0; i < n_in; i++) {
        size_t at = (row + r) * n_in + i;
        delta[r * n_in + i] = m->w[at] - qtr_grid_value(m->grid, row + r, i);
      }
    }
    qtr_matrix_multiply_t(delta, n_in, m->samples, n_in, out, m->n_samples, n, m->n_samples, n_in);
    m->sum[piece][0] = sum_squares(out, n * m->n_samples);
    qtr_matrix_multiply_t(m->w + row * n_in, n_in, m->samples, n_in, out, m->n_samples, n, m->n_samples, n_in);
    m->sum[piece][1] = sum_squares(out, n * m->n_samples);
  }
}

enum qtr_status qtr_output_error(struct qtr_threads *team, const float *w, const struct qtr_grid *grid, const float *samples,
                                 size_t n_samples, double *squared, double *norm, struct qtr_error *err) {
  size_t pieces = qtr_ceil_div(grid->n_out, ROWS);
  size_t n = (size_t)qtr_threads_count(team) * ROWS * (grid->n_in + n_samples);
  struct measuring m = {.w = w,
                        .samples = samples,
                        .grid = grid,
                        .n_samples = n_samples,
                        .scratch = malloc(n * sizeof(float)),
                        .sum = malloc(pieces * sizeof *m.sum)};
  enum qtr_status status = QTR_OK;
  *squared = *norm = 0;
  if (m.scratch && m.sum) {
    qtr_threads_for(team, pieces, 1, measure_rows, &m);
    for (size_t i = 0; i < pieces; i++) {
      *squared += m.sum[i][0];
      *norm += m.sum[i][1];
    }
  } else {
    status = qtr_fail_memory(err, "output errors", n * sizeof(float));
  }
  free(m.scratch);
  free(m.sum);
  return status;
}
