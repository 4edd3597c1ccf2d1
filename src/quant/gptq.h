/* gptq.h - codes that keep a layer's outputs instead of its weights (spec F.8; Frantar et al., "GPTQ", 2023), and the
 * clipping of ranges by output error (F.7). */
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

/* Fits every row's cells. With `samples` (n_samples, n_in), inputs of the matrix: each row (each group of a row) takes the
 * ratio of 1 and 1 - i/n_steps * max_shrink, i = 1 … n_steps - 1, whose rounding changes the outputs on the samples least,
 * the larger ratio on ties. Without (NULL): the whole range. */
struct qtr_clip_options {
  int32_t n_steps;  /* 80 */
  float max_shrink; /* 0.8: down to 0.2 of the range */
};
enum qtr_status qtr_clip(struct qtr_threads *team, const float *w, const float *samples, size_t n_samples,
                         const struct qtr_clip_options *options, struct qtr_grid *grid, const char *what,
                         struct qtr_error *err);

/* ‖X (W - Ŵ)ᵀ‖² and ‖X Wᵀ‖² over the samples: what a report shows. w: (n_out, n_in) */
enum qtr_status qtr_output_error(struct qtr_threads *team, const float *w, const struct qtr_grid *grid, const float *samples,
                                 size_t n_samples, double *squared, double *norm, struct qtr_error *err);

#endif
