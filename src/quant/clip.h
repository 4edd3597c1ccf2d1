/* clip.h - ranges by output error (spec F.7), and that error. */
#ifndef QTR_QUANT_CLIP_H
#define QTR_QUANT_CLIP_H

#include "base/threads.h"
#include "quant/grid.h"

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
