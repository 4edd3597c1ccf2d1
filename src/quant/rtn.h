/* rtn.h - round to nearest: the formulas of spec F.6 on blocks of rows, without files. Pure functions; every number they
 * return is what the file will hold, so the error they report is the error a reader of the file sees. */
#ifndef QTR_QUANT_RTN_H
#define QTR_QUANT_RTN_H

#include <stddef.h>
#include <stdint.h>

#define QTR_RTN_PROTECT 120.0f /* P of F.6 for a PostScale zero */

struct qtr_rtn_error {
  double squared, norm; /* ‖W − Ŵ‖², ‖W‖² */
  double max;           /* largest |W − Ŵ| */
};

enum qtr_rtn_status {
  QTR_RTN_OK,
  QTR_RTN_NOT_FINITE, /* a weight is NaN or infinite */
  QTR_RTN_RANGE,      /* a scale or zero is beyond what fp16 holds */
  QTR_RTN_MEMORY      /* of a row's scales */
};

/* Per channel: Ŵ = code * scale - szero. w: (n_rows, n_in); codes: (n_rows, n_in) 0…15; scale, szero: (n_rows) fp16. */
enum qtr_rtn_status qtr_rtn_w4(const float *w, size_t n_rows, size_t n_in, uint8_t *codes, uint16_t *scale, uint16_t *szero,
                               struct qtr_rtn_error *error);

/* Progressive groups of 128: w8 = code * s2 - z2, Ŵ = w8 * s1. s1: (n_rows) fp16; s2, z2: (n_rows, n_in/128) natural order,
 * s2 1…127, z2 0…120 (the file holds -z2); code * s2 <= 255 and w8 in -127…127. */
enum qtr_rtn_status qtr_rtn_w4_g128(const float *w, size_t n_rows, size_t n_in, uint8_t *codes, uint16_t *s1, uint8_t *s2,
                                    uint8_t *z2, struct qtr_rtn_error *error);

/* Symmetric int8, one scale a row: Ŵ = code * scale. scale: (n_rows) fp32 whose values are fp16 values, as the runtime
 * rounds them (A.2.3). */
enum qtr_rtn_status qtr_rtn_w8(const float *w, size_t n_rows, size_t n_in, int8_t *codes, float *scale,
                               struct qtr_rtn_error *error);

/* fp16 as it is. out: (n). QTR_RTN_RANGE when a value would become infinite. */
enum qtr_rtn_status qtr_rtn_f16(const float *w, size_t n, uint16_t *out, struct qtr_rtn_error *error);

/* bfloat16 as it is; its range is that of float. */
enum qtr_rtn_status qtr_rtn_bf16(const float *w, size_t n, uint16_t *out, struct qtr_rtn_error *error);

#endif
