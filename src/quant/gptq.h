/* gptq.h - codes that keep a layer's outputs instead of its weights (spec F.8; Frantar et al., "GPTQ", 2023). */
#ifndef QTR_QUANT_GPTQ_H
#define QTR_QUANT_GPTQ_H

#include "base/threads.h"
#include "quant/grid.h"

struct qtr_gptq_options {
  float damp;      /* 0.01: of the mean of H's diagonal, added to the diagonal */
  int32_t block;   /* 128 columns between two updates of the rest */
  int32_t n_tries; /* 250: on failure 0.1 damp more is added each time */
};

/* Codes of every row on the grid's cells, columns in the order of falling H_ii, each column's rounding error spread over the
 * columns still to come. w: (n_out, n_in), read only; hessian: (n_in, n_in) symmetric. Columns that no input ever reached
 * (H_ii = 0) are rounded to nearest. Without a hessian (NULL) everything is. QTR_ERR_FORMAT when H has values that are not
 * finite or no damping makes it positive definite; `what` names the matrix. */
enum qtr_status qtr_gptq(struct qtr_threads *team, const float *w, const float *hessian,
                         const struct qtr_gptq_options *options, struct qtr_grid *grid, const char *what,
                         struct qtr_error *err);

#endif
