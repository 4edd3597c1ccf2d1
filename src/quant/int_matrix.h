/* int_matrix.h - inside of src/quant: one projection as integer codes with their scales, whole in memory, as importers make
 * it.
 */
#ifndef QTR_QUANT_INT_MATRIX_H
#define QTR_QUANT_INT_MATRIX_H

#include "quant/sink.h"

struct qtr_int_matrix {
  enum qtr_store store; /* W8, W4 or W4_G128 */
  size_t n_out, n_in;
  uint8_t *code;    /* (n_out, n_in) 0…15; W8: int8 */
  uint16_t *scale;  /* (n_out) fp16, W4 */
  float *dequant;   /* (n_out) W8 */
  uint16_t *szero;  /* (n_out) fp16, W4 per channel */
  uint8_t *s2, *z2; /* (n_out, n_in / 128) W4_G128 */
};

/* Allocates the arrays of `store`. n_out * n_in fits: the layout was checked. */
enum qtr_status qtr_int_matrix_create(enum qtr_store store, size_t n_out, size_t n_in, struct qtr_int_matrix *m,
                                      struct qtr_error *err);
void qtr_int_matrix_free(struct qtr_int_matrix *m);
struct qtr_sink_codes qtr_int_matrix_codes(const struct qtr_int_matrix *m);

/* One row as the file's reader sees it. out: (n_in) */
void qtr_int_matrix_row(const struct qtr_int_matrix *m, size_t row, float *out);

#endif
