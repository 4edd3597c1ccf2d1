/* smooth.h - how far to move the range of an activation into what multiplies it (spec F.5). */
#ifndef QTR_QUANT_SMOOTH_H
#define QTR_QUANT_SMOOTH_H

#include "quant/observe.h"
#include "quant/qoq.h"

/* s[c] = a[c]^alpha / b[c]^beta; a factor whose exponent is 0 is left out, zeros give 1, and when any s is not finite all
 * are 1. a, b, s: (n) */
void qtr_smooth_factors(const float *a, const float *b, float alpha, float beta, size_t n, float *s);

/* The largest of each RoPE pair (d, d + head_dim/2), for both. x: (n_heads, head_dim) */
void qtr_smooth_tie_pairs(float *x, size_t n_heads, size_t head_dim);

/* Keys against queries, in place of both (F.5.2). x: (n_samples, length, hidden) hidden states of some samples, on which the
 * grid compares the attention's output with keys in the cache's format and without; runner: the layer in floats, quantised:
 * another whose cache has that format. s: (n_kv_heads, head_dim); alpha, beta: what was chosen. Grid only where quantised is
 * not NULL. */
enum qtr_status qtr_smooth_keys(const struct qtr_smooth_options *options, int32_t n_grid,
                                const struct qtr_observed *observed, const struct qtr_float_layer *layer,
                                struct qtr_runner *runner, struct qtr_runner *quantised, const float *x, size_t n_samples,
                                float *s, float *alpha, float *beta, struct qtr_error *err);

/* The input of o_proj or down_proj against its columns, in place of v or up (F.5.1). The grid compares the matrix's outputs
 * with weights rounded to nearest in `format` and 8-bit inputs. s: (n_kv_heads * head_dim) for o, (intermediate) for down.
 */
enum qtr_status qtr_smooth_input(const struct qtr_smooth_options *options, int32_t n_grid,
                                 const struct qtr_observed *observed, const struct qtr_float_layer *layer,
                                 enum qtr_projection p, enum qtr_linear_format format, float *s, float *alpha, float *beta,
                                 struct qtr_error *err);

#endif
