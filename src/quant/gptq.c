/* gptq.c - GPTQ (gptq.h). Rows do not depend on each other, so every loop gives a thread some
 * rows and the result does not depend on the number of threads. */
#include "quant/gptq.h"

#include "base/checked.h"
#include "base/status.h"
#include "quant/matrix.h"

#include <math.h>
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

/* The columns in the order of falling H_ii, and the mean of these. */
static enum qtr_status sort_columns(const float *hessian, size_t n, size_t *order, double *mean, const char *what,
                                    struct qtr_error *err) {
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
  float *u = malloc(n * n * sizeof *u);
  enum qtr_status status = QTR_OK;
  g.scratch = malloc(n_scratch * sizeof *g.scratch);
  if (!order || !u || !g.scratch) {
    status = qtr_fail_memory(err, what, n * n * sizeof *u);
    goto done;
  }
  double mean = 0;
  if ((status = sort_columns(hessian, n, order, &mean, what, err))) goto done;
  double damp = (double)options->damp * mean, more = 0.1 * QTR_MAX(damp, 1e-12);
  bool memory = false, ok = false;
  for (int32_t i = 0; i < options->n_tries && !ok && !memory; i++) {
    ok = qtr_matrix_inverse_factor(team, hessian, order, damp + i * more, n, u, &memory);
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
  free(u);
  free(g.scratch);
  return status;
}
