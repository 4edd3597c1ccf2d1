/* row_quant.cuh - one row of fp16 values made int8 (spec B.6), RMSNorm before it if wanted (B.8): what rows.cu does in a
 * kernel of its own and gemm_sm90.cu at the beginning of a product with few tokens. Both give the same bits.
 *
 * The order of sums is that of 512 lanes, however many threads there are: lane v has the groups of eight values v, v + 512,
 * ... and adds them in order; 32 lanes meet by shuffles, the sixteen sums of those in order. THREADS is 256 or 512; thread t
 * has groups t, t + THREADS, ..., kept as they came (packed) between the passes. */
#ifndef QTR_BACKEND_CUDA_ROW_QUANT_CUH
#define QTR_BACKEND_CUDA_ROW_QUANT_CUH

#include <cuda_fp16.h>
#include <stddef.h>
#include <stdint.h>

enum { QTR_ROW_LANES = 512, QTR_ROW_PARTS = QTR_ROW_LANES / 32, QTR_ROW_SHARED = 3 * QTR_ROW_PARTS /* floats */ };

/* What a row became. */
struct qtr_row_result {
  float scale, inverse, sum, rstd;
  bool plain; /* all values are numbers, and so are their products with `inverse` */
};

/* sat8(rni(x)); NaN becomes 0, as in the reference. */
__device__ static __forceinline__ int qtr_code_round(float x) { return max(-128, min(127, __float2int_rn(x))); }

/* B.6: scale and factor of a row with this largest magnitude. */
__device__ static __forceinline__ void qtr_row_scale(float amax, float *scale, float *inverse) {
  float s = __half2float(__float2half_rn(amax / 127.0f));
  *scale = s < 65504.0f ? s : 65504.0f;
  *inverse = amax > 0 ? 127.0f / amax : 0.0f;
}

__device__ static __forceinline__ float2 qtr_row_pair(uint32_t bits) {
  return __half22float2(*reinterpret_cast<const __half2 *>(&bits));
}

/* Eight values: those of x, or normalised. */
__device__ static __forceinline__ void qtr_row_values(const uint4 &x, const uint4 &weight, bool norm, float rstd,
                                                      float (&v)[8]) {
  const uint32_t a[4] = {x.x, x.y, x.z, x.w}, b[4] = {weight.x, weight.y, weight.z, weight.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float2 f = qtr_row_pair(a[i]);
    if (norm) {
      float2 w = qtr_row_pair(b[i]);
      f.x = __fmul_rn(__fmul_rn(f.x, rstd), w.x);
      f.y = __fmul_rn(__fmul_rn(f.y, rstd), w.y);
    }
    v[2 * i] = f.x;
    v[2 * i + 1] = f.y;
  }
}

/* part[...] = the sums (MAX: the largest) of this thread's warps of lanes. */
template <bool MAX, int LANES>
__device__ static __forceinline__ void qtr_row_part(float (&x)[LANES], int thread, float *part) {
#pragma unroll
  for (int l = 0; l < LANES; l++) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) {
      float y = __shfl_xor_sync(0xffffffffu, x[l], i);
      x[l] = MAX ? fmaxf(x[l], y) : __fadd_rn(x[l], y);
    }
    if (thread % 32 == 0) part[thread / 32 + l * (QTR_ROW_PARTS / LANES)] = x[l];
  }
}

/* 1 / sqrt(mean of squares + eps), the same in all threads. x: this thread's groups, NV of them, where (k * THREADS +
 * thread) * 8 < dim; part: QTR_ROW_PARTS floats of shared memory that nobody reads any more; sync: a barrier of the THREADS.
 */
template <int NV, int THREADS, class Sync>
__device__ static __forceinline__ float qtr_row_rstd(const uint4 (&x)[NV], float eps, int dim, int thread, float *part,
                                                     Sync sync) {
  enum { LANES = QTR_ROW_LANES / THREADS };
  float squares[LANES] = {};
#pragma unroll
  for (int k = 0; k < NV; k++) {
    if ((k * THREADS + thread) * 8 < dim) {
      float v[8];
      qtr_row_values(x[k], x[k], false, 1, v);
#pragma unroll
      for (int i = 0; i < 8; i++) squares[k % LANES] = __fmaf_rn(v[i], v[i], squares[k % LANES]);
    }
  }
  qtr_row_part<false>(squares, thread, part);
  sync();
  float sum = part[0];
#pragma unroll
  for (int i = 1; i < QTR_ROW_PARTS; i++) sum = __fadd_rn(sum, part[i]);
  return 1.0f / sqrtf(sum / (float)dim + eps);
}

/* As above; weight: its groups as x, looked at with `norm`. part: QTR_ROW_SHARED floats. */
template <int NV, int THREADS, class Sync>
__device__ static __forceinline__ struct qtr_row_result qtr_row_measure(const uint4 (&x)[NV], const uint4 (&weight)[NV],
                                                                        bool norm, float eps, int dim, int thread,
                                                                        float *part, Sync sync) {
  enum { LANES = QTR_ROW_LANES / THREADS };
  struct qtr_row_result r = {0, 0, 0, 1, true};
  if (norm) r.rstd = qtr_row_rstd<NV, THREADS>(x, eps, dim, thread, part, sync);
  float amax[1] = {0}, sum[LANES] = {};
#pragma unroll
  for (int k = 0; k < NV; k++) {
    if ((k * THREADS + thread) * 8 < dim) {
      float v[8];
      qtr_row_values(x[k], weight[k], norm, r.rstd, v);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        amax[0] = fmaxf(amax[0], fabsf(v[i]));
        sum[k % LANES] = __fadd_rn(sum[k % LANES], v[i]);
      }
    }
  }
  qtr_row_part<true>(amax, thread, part + QTR_ROW_PARTS);
  qtr_row_part<false>(sum, thread, part + 2 * QTR_ROW_PARTS);
  sync();
  float most = part[QTR_ROW_PARTS];
#pragma unroll
  for (int i = 1; i < THREADS / 32; i++) most = fmaxf(most, part[QTR_ROW_PARTS + i]);
  r.sum = part[2 * QTR_ROW_PARTS];
#pragma unroll
  for (int i = 1; i < QTR_ROW_PARTS; i++) r.sum = __fadd_rn(r.sum, part[2 * QTR_ROW_PARTS + i]);
  qtr_row_scale(most, &r.scale, &r.inverse);
  r.plain = most < INFINITY && r.inverse < INFINITY && fabsf(r.sum) < INFINITY;
  return r;
}

/* The codes of a group of eight. A plain value is rounded by adding 1.5 * 2^23, which leaves the integer in the low bits:
 * conversions run at a quarter of the rate. */
__device__ static __forceinline__ uint2 qtr_row_codes(const uint4 &x, const uint4 &weight, bool norm,
                                                      const struct qtr_row_result &r) {
  float v[8];
  uint32_t c[8];
  qtr_row_values(x, weight, norm, r.rstd, v);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    float y = __fmul_rn(v[i], r.inverse);
    c[i] = r.plain ? __float_as_uint(__fadd_rn(y, 0x1.8p23f)) : (uint32_t)qtr_code_round(y);
  }
  return make_uint2(__byte_perm(__byte_perm(c[0], c[1], 0x40), __byte_perm(c[2], c[3], 0x40), 0x5410),
                    __byte_perm(__byte_perm(c[4], c[5], 0x40), __byte_perm(c[6], c[7], 0x40), 0x5410));
}

#endif
