/* philox.h - the random stream of sampling: Philox4x32-10 (Salmon et al., SC'11), the same on the host and on the GPU. */
#ifndef QTR_BASE_PHILOX_H
#define QTR_BASE_PHILOX_H

#include <stdint.h>

#ifdef __CUDACC__
#define QTR_PHILOX_INLINE __host__ __device__ inline
#else
#define QTR_PHILOX_INLINE inline
#endif

/* The seed is the key, the draw's number the counter; 53 bits of the output as a number in [0, 1). */
static QTR_PHILOX_INLINE double qtr_philox_unit(uint64_t seed, uint64_t position) {
  uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
  uint32_t c0 = (uint32_t)position, c1 = (uint32_t)(position >> 32), c2 = 0, c3 = 0;
  for (int round = 0; round < 10; round++) {
    uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ key0;
    c1 = (uint32_t)p1;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ key1;
    c3 = (uint32_t)p0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  uint64_t bits = ((uint64_t)c1 << 32 | c0) >> 11;
  return (double)bits * 0x1p-53;
}

#endif
