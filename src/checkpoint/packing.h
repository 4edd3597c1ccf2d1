/* packing.h - QServe's int4 weight order and second-level scale order (spec A.3, A.4). Pure functions on checked shapes. */
#ifndef QTR_CHECKPOINT_PACKING_H
#define QTR_CHECKPOINT_PACKING_H

#include <stddef.h>
#include <stdint.h>

/* Byte of the packed tensor and shift (0 or 4) that hold code (row, col); n_in % 32 == 0. */
static inline size_t qtr_w4_offset(size_t n_in, size_t row, size_t col) {
  return (row / 32 * (n_in / 32) + col / 32) * 512 + (row % 8 * 4 + col / 4 % 4) * 16 + col / 16 % 2 * 8 + row / 8 % 2 * 4 +
         col % 4;
}
static inline unsigned qtr_w4_shift(size_t row) { return (unsigned)(row / 16 % 2) * 4; }
static inline unsigned qtr_w4_get(const uint8_t *packed, size_t n_in, size_t row, size_t col) {
  return (unsigned)(packed[qtr_w4_offset(n_in, row, col)] >> qtr_w4_shift(row)) & 15u;
}

/* codes (n_out, n_in), each 0…15 -> packed (n_out * n_in / 2). n_out % 32 == 0, n_in % 32 == 0. */
void qtr_w4_pack(const uint8_t *codes, size_t n_out, size_t n_in, uint8_t *packed);
void qtr_w4_unpack(const uint8_t *packed, size_t n_out, size_t n_in, uint8_t *codes);
/* One block of 32 rows [row, row+32) to codes (32, n_in). */
void qtr_w4_unpack_rows32(const uint8_t *packed, size_t n_in, size_t row, uint8_t *codes);

/* Position of output channel `row` within one row of s2_scales / s2_zeros (A.4.2). */
static inline size_t qtr_s2_position(size_t row) { return row / 32 * 32 + row % 8 * 4 + row / 8 % 4; }

#endif
