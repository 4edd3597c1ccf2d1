/* gemm_dequant.h - from packed 4-bit codes to four int8 lanes in one register (spec B.2, B.3). Plain C, host and device, so
 * that tests/unit/test_backend_cuda_dequant.c proves on the host what the kernels compute.
 *
 * Groups of 128: the weight is q * s2 - zs with zs = (256 - z) mod 256. When it lies in -128...127 for the codes that occur,
 * q * s2 + (128 - zs) lies in 0...255, so the sum over four lanes of (q * s2 + 128 - zs) * 256^lane has no carry between
 * lanes whatever the sign of 128 - zs: one 32-bit multiply-add modulo 2^32 gives all four, and flipping the top bit of each
 * lane subtracts 128. qtr_cuda_g128_count_bad finds matrices for which this does not hold. */
#ifndef QTR_BACKEND_CUDA_GEMM_DEQUANT_H
#define QTR_BACKEND_CUDA_GEMM_DEQUANT_H

#include <stdint.h>

#ifdef __CUDACC__
#define QTR_HD __host__ __device__ __forceinline__
#else
#define QTR_HD inline
#endif

/* Eight codes of a word: the low and the high nibble of each byte, as four bytes each. */
static QTR_HD uint32_t qtr_dequant_low(uint32_t word) { return word & 0x0f0f0f0fu; }
static QTR_HD uint32_t qtr_dequant_high(uint32_t word) { return (word >> 4) & 0x0f0f0f0fu; }

/* (128 - zs) in every lane, modulo 2^32. */
static QTR_HD uint32_t qtr_dequant_offset(uint32_t zs) { return 0x80808080u - zs * 0x01010101u; }

/* codes: four bytes 0...15; offset: of the group -> four int8 weights. */
static QTR_HD uint32_t qtr_dequant_group(uint32_t codes, uint32_t s2, uint32_t offset) {
  return (codes * s2 + offset) ^ 0x80808080u;
}

/* zs of the byte stored in s2_zeros. */
static QTR_HD uint32_t qtr_dequant_zs(uint32_t z_byte) { return (256u - z_byte) & 255u; }

/* Does code q of a group with (s2, z_byte) mean the same as B.3's arithmetic modulo 256? */
static QTR_HD int qtr_dequant_in_range(uint32_t q, uint32_t s2, uint32_t z_byte) {
  int w = (int)(q * s2) - (int)qtr_dequant_zs(z_byte);
  return w >= -128 && w <= 127;
}

#endif
