/* packing.c - QServe's int4 weight order, whole matrices and blocks of 32 rows (packing.h, spec A.3). The loops walk a 32 x
 * 32 tile in the order of its 512 bytes; rows r and r + 16 share a byte. */
#include "checkpoint/packing.h"

/* First row within the tile, and first of four columns, of the 4-byte word `w` (0 … 127) of a tile: the decomposition of A.3
 * read backwards. Word w holds unit c*4+e (16 bytes), d and b. */
static inline size_t word_row(size_t w) { return w / 16 + (w & 1) * 8; }
static inline size_t word_col(size_t w) { return w / 4 % 4 * 4 + (w >> 1 & 1) * 16; }

void qtr_w4_pack(const uint8_t *codes, size_t n_out, size_t n_in, uint8_t *packed) {
  for (size_t row = 0; row < n_out; row += 32) {
    for (size_t col = 0; col < n_in; col += 32) {
      for (size_t w = 0; w < 128; w++) {
        const uint8_t *low = codes + (row + word_row(w)) * n_in + col + word_col(w);
        const uint8_t *high = low + 16 * n_in;
        for (size_t f = 0; f < 4; f++) *packed++ = (uint8_t)((low[f] & 15u) | (unsigned)(high[f] << 4));
      }
    }
  }
}

void qtr_w4_unpack_rows32(const uint8_t *packed, size_t n_in, size_t row, uint8_t *codes) {
  packed += row / 32 * (n_in / 32) * 512;
  for (size_t col = 0; col < n_in; col += 32) {
    for (size_t w = 0; w < 128; w++) {
      uint8_t *low = codes + word_row(w) * n_in + col + word_col(w);
      uint8_t *high = low + 16 * n_in;
      for (size_t f = 0; f < 4; f++, packed++) {
        low[f] = *packed & 15u;
        high[f] = (uint8_t)(*packed >> 4);
      }
    }
  }
}

void qtr_w4_unpack(const uint8_t *packed, size_t n_out, size_t n_in, uint8_t *codes) {
  for (size_t row = 0; row < n_out; row += 32) qtr_w4_unpack_rows32(packed, n_in, row, codes + row * n_in);
}
