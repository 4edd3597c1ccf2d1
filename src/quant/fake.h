/* fake.h - one projection of what DeepCompressor and LMQuant write (spec A.5): float weights that lie on the grid of the
 * scales and zeros beside them, turned back into the integers they were. Pure functions. */
#ifndef QTR_QUANT_FAKE_H
#define QTR_QUANT_FAKE_H

#include "base/threads.h"
#include "quant/int_matrix.h"

struct qtr_fake_matrix {
  size_t n_out, n_in;
  const float *w;      /* (n_out, n_in) model.pt: already dequantised */
  enum qtr_dtype type; /* what w was stored in: its rounding moves values off the grid */
  const float *s0;     /* (n_out) weight.scale.0 */
  const float *s1;     /* (n_out, n_in / 128) weight.scale.1; NULL: per channel */
  const float *zero;   /* (n_out), with s1 (n_out, n_in / 128); NULL: all zero */
  bool scaled;         /* zero is .scaled_zero (PostScale: w = q * s - zero), not .zero (PreScale: w = (q - zero) * s) */
};

/* The codes and what the file says of them, in m, which was created with the store wanted: W4_G128 with s1, else W4 or W8.
 * QTR_ERR_FORMAT says which row and column is not on the grid, or what scale or zero cannot be. */
enum qtr_status qtr_fake_codes(const struct qtr_fake_matrix *fake, struct qtr_threads *team, struct qtr_int_matrix *m,
                               struct qtr_error *err);

/* Per channel: do the weights of a row span more than the 16 steps that 4 bits have? Then it is W8. */
bool qtr_fake_is_w8(const struct qtr_fake_matrix *fake);

#endif
