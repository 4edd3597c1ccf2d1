/* gptq.c - GPTQ, clipping and output errors (gptq.h). Rows do not depend on each other, so every loop gives a thread some
 * rows and the result does not depend on the number of threads. */
#include "quant/gptq.h"

#include "base/checked.h"
#include "base/status.h"
#include "quant/matrix.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define ROWS ((size_t)32) /* of one piece of work */

/* ---- GPTQ ---------------------------------------------------------------------------------------- */

struct rounding {
  const float *w;      /* (n_out, n_in) */
  const float *u;      /* (n_in, n_in) upper, in the order of `order` */
  const size_t *order; /* (n_in) the column that comes i-th */
  size_t block;
  struct qtr_grid *grid;
  float *scratch; /* (threads, ROWS, n_in + block) */
};

/* Rounds column `at` of the order for n rows and pushes the errors to the rest of the block. t: (n, n_in); e: (n, block) */
static void round_column(const struct rounding *g, size_t row, size_t n, size_t at, size_t begin, size_t end, float *t,
                         float *e) {
  size_t n_in = g->grid->n_in, column = g->order[at];
  const float *u = g->u + at * n_in;
  for (size_t r = 0; r < n; r++) {
    const struct qtr_cell *cell = qtr_grid_cell(g->grid, row + r, column);
    float *x = t + r * n_in;
    float code = qtr_cell_code(cell, x[at]);
    float error = (x[at] - qtr_cell_value(cell, code)) / u[at];
    g->grid->code[(row + r) * n_in + column] = (int8_t)code;
    e[r * g->block + at - begin] = error;
    for (size_t k = at + 1; k < end; k++) x[k] -= error * u[k];
  }
}

static void round_rows(void *arg, size_t first, size_t last, int thread) {
  const struct rounding *g = arg;
  size_t n_in = g->grid->n_in;
  float *t = g->scratch + (size_t)thread * ROWS * (n_in + g->block), *e = t + ROWS * n_in;
  for (size_t piece = first; piece < last; piece++) {
    size_t row = piece * ROWS, n = QTR_MIN(ROWS, g->grid->n_out - row);
    for (size_t r = 0; r < n; r++) {
      for (size_t i = 0; i < n_in; i++) t[r * n_in + i] = g->w[(row + r) * n_in + g->order[i]];
    }
    for (size_t begin = 0; begin < n_in; begin += g->block) {
      size_t end = QTR_MIN(begin + g->block, n_in);
      for (size_t at = begin; at < end; at++) round_column(g, row, n, at, begin, end, t, e);
      if (end < n_in)
        qtr_matrix_subtract(e, g->block, g->u + begin * n_in + end, n_in, t + end, n_in, n, n_in - end, end - begin);
    }
  }
}

static void round_to_nearest(void *arg, size_t first, size_t last, int thread) {
  (void)thread;
  const struct rounding *g = arg;
  size_t n_in = g->grid->n_in;
  for (size_t i = first * n_in; i < last * n_in; i++) {
    g->grid->code[i] = (int8_t)qtr_cell_code(qtr_grid_cell(g->grid, i / n_in, i % n_in), g->w[i]);
  }
}

struct channel {
  float weight;
  size_t column;
};

static int heavier(const void *a, const void *b) { /* equal weights keep the order of the columns */
  const struct channel *x = a, *y = b;
  if (x->weight != y->weight) return x->weight < y->weight ? 1 : -1;
  return x->column < y->column ? -1 : 1;
}

/* The columns in the order of falling H_ii, H in that order (dead columns with 1 on the diagonal), and its mean diagonal. */
static enum qtr_status sort_hessian(const float *hessian, size_t n, size_t *order, float *sorted, double *mean,
                                    const char *what, struct qtr_error *err) {
  struct channel *channel = malloc(n * sizeof *channel);
  if (!channel) return qtr_fail_memory(err, what, n * sizeof *channel);
  *mean = 0;
  float poison = 0; /* x - x is 0 but for NaN and infinities, which LAPACK does not always notice off the diagonal */
  for (size_t i = 0; i < n * n; i++) poison += hessian[i] - hessian[i];
  for (size_t i = 0; i < n; i++) {
    channel[i] = (struct channel){hessian[i * n + i], i};
    *mean += (double)hessian[i * n + i] / (double)n;
  }
  qsort(channel, n, sizeof *channel, heavier);
  for (size_t i = 0; i < n; i++) order[i] = channel[i].column;
  free(channel);
  if (poison != 0) /* NaN, too */
    return qtr_fail(err, QTR_ERR_FORMAT, "%s: its inputs are not finite; the source model is damaged", what);
  for (size_t i = 0; i < n; i++) {
    for (size_t k = 0; k < n; k++) sorted[i * n + k] = hessian[order[i] * n + order[k]];
    if (sorted[i * n + i] == 0) sorted[i * n + i] = 1;
  }
  return QTR_OK;
}

enum qtr_status qtr_gptq(struct qtr_threads *team, const float *w, const float *hessian,
                         const struct qtr_gptq_options *options, struct qtr_grid *grid, const char *what,
                         struct qtr_error *err) {
  struct rounding g = {.w = w, .grid = grid, .block = QTR_MIN((size_t)options->block, grid->n_in)};
  if (!hessian) {
    qtr_threads_for(team, grid->n_out, ROWS, round_to_nearest, &g);
    return QTR_OK;
  }
  size_t n = grid->n_in, n_scratch = (size_t)qtr_threads_count(team) * ROWS * (n + g.block);
  size_t *order = malloc(n * sizeof *order);
  float *sorted = malloc(n * n * sizeof *sorted), *u = malloc(n * n * sizeof *u);
  enum qtr_status status = QTR_OK;
  g.scratch = malloc(n_scratch * sizeof *g.scratch);
  if (!order || !sorted || !u || !g.scratch) {
    status = qtr_fail_memory(err, what, 2 * n * n * sizeof *u);
    goto done;
  }
  double mean = 0;
  if ((status = sort_hessian(hessian, n, order, sorted, &mean, what, err))) goto done;
  double damp = (double)options->damp * mean, more = 0.1 * QTR_MAX(damp, 1e-12);
  bool memory = false, ok = false;
  for (int32_t i = 0; i < options->n_tries && !ok && !memory; i++) {
    ok = qtr_matrix_inverse_factor(sorted, damp + i * more, n, u, &memory);
  }
  if (memory) {
    status = qtr_fail_memory(err, what, n * n * sizeof(double));
  } else if (!ok) {
    status = qtr_fail(err, QTR_ERR_FORMAT, "%s: its inputs' covariance is not positive definite, however damped", what);
  } else {
    g.u = u;
    g.order = order;
    qtr_threads_for(team, qtr_ceil_div(grid->n_out, ROWS), 1, round_rows, &g);
  }
done:
  free(order);
  free(sorted);
  free(u);
  free(g.scratch);
  return status;
}

/* ---- clipping ------------------------------------------------------------------------------------ */

struct clipping {
  const float *w, *samples; /* samples NULL: no search */
  size_t n_samples;
  const struct qtr_clip_options *options;
  struct qtr_grid *grid;
  float *scratch;  /* (threads, ROWS * (n_in + n_samples) + 4 * ROWS * n_groups) */
  atomic_int fail; /* enum qtr_rtn_status */
};

/* delta (n, n_in) = w - ŵ on the cells as they are. */
static void differences(const float *w, const struct qtr_grid *grid, size_t row, size_t n, float *delta) {
  size_t n_in = grid->n_in;
  for (size_t r = 0; r < n; r++) {
    const float *x = w + (row + r) * n_in;
    for (size_t begin = 0; begin < n_in; begin += QTR_GROUP) {
      const struct qtr_cell cell = *qtr_grid_cell(grid, row + r, begin);
      size_t end = QTR_MIN(begin + QTR_GROUP, n_in);
      for (size_t i = begin; i < end; i++) delta[r * n_in + i] = x[i] - qtr_cell_value(&cell, qtr_cell_code(&cell, x[i]));
    }
  }
}

/* The ratios of n rows, by search. */
static void search_rows(const struct clipping *c, size_t row, size_t n, float *scratch) {
  struct qtr_grid *grid = c->grid;
  size_t n_in = grid->n_in, cells = grid->n_groups, width = cells > 1 ? QTR_GROUP : n_in;
  float *delta = scratch, *out = delta + ROWS * n_in, *best = out + ROWS * c->n_samples;
  float *ratio = best + ROWS * cells, *trial = ratio + ROWS * cells;
  for (int32_t step = 0; step < c->options->n_steps; step++) {
    float p = 1 - (float)step / (float)c->options->n_steps * c->options->max_shrink;
    for (size_t i = 0; i < cells; i++) trial[i] = p;
    for (size_t r = 0; r < n; r++) (void)qtr_grid_fit_row(grid, row + r, c->w + (row + r) * n_in, trial);
    differences(c->w, grid, row, n, delta);
    for (size_t g = 0; g < cells; g++) {
      qtr_matrix_multiply_t(delta + g * width, n_in, c->samples + g * width, n_in, out, c->n_samples, n, c->n_samples,
                            width);
      for (size_t r = 0; r < n; r++) {
        double sum = 0;
        for (size_t k = 0; k < c->n_samples; k++) sum += (double)(out[r * c->n_samples + k] * out[r * c->n_samples + k]);
        if (step > 0 && (float)sum >= best[r * cells + g]) continue;
        best[r * cells + g] = (float)sum;
        ratio[r * cells + g] = p;
      }
    }
  }
  for (size_t r = 0; r < n; r++) (void)qtr_grid_fit_row(grid, row + r, c->w + (row + r) * n_in, ratio + r * cells);
}

static void clip_rows(void *arg, size_t first, size_t last, int thread) {
  struct clipping *c = arg;
  struct qtr_grid *grid = c->grid;
  size_t each = ROWS * (grid->n_in + c->n_samples) + 3 * ROWS * grid->n_groups;
  for (size_t piece = first; piece < last; piece++) {
    size_t row = piece * ROWS, n = QTR_MIN(ROWS, grid->n_out - row);
    bool good = true;
    for (size_t r = row; r < row + n; r++) {
      enum qtr_rtn_status status = qtr_grid_fit_row(grid, r, c->w + r * grid->n_in, NULL);
      if (status) atomic_store(&c->fail, (int)status);
      good &= status == QTR_RTN_OK;
    }
    if (good && c->samples) search_rows(c, row, n, c->scratch + (size_t)thread * each);
  }
}

enum qtr_status qtr_clip(struct qtr_threads *team, const float *w, const float *samples, size_t n_samples,
                         const struct qtr_clip_options *options, struct qtr_grid *grid, const char *what,
                         struct qtr_error *err) {
  struct clipping c = {.w = w, .samples = samples, .n_samples = n_samples, .options = options, .grid = grid};
  if (samples) {
    size_t n = (size_t)qtr_threads_count(team) * (ROWS * (grid->n_in + n_samples) + 3 * ROWS * grid->n_groups);
    c.scratch = malloc(n * sizeof *c.scratch);
    if (!c.scratch) return qtr_fail_memory(err, what, n * sizeof *c.scratch);
  }
  qtr_threads_for(team, qtr_ceil_div(grid->n_out, ROWS), 1, clip_rows, &c);
  free(c.scratch);
  switch (atomic_load(&c.fail)) {
    case QTR_RTN_OK: return QTR_OK;
    case QTR_RTN_NOT_FINITE: return qtr_fail(err, QTR_ERR_FORMAT, "%s holds a value that is not finite", what);
    default: return qtr_fail(err, QTR_ERR_UNSUPPORTED, "%s needs scales beyond the range of fp16 (65504)", what);
  }
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
