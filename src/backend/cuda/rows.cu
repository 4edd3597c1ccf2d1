/* rows.cu - kernels on rows of activations (rows.h; spec B.6 - B.9). All are bound by memory: 16-byte accesses where rows
 * allow, a row's values stay in registers between the pass that finds the maximum and the pass that writes codes.
 *
 * Sums over a row are added in one order that depends on the row's length only, so a row has the same bits in any batch. */
#include "backend/cuda/rows.h"

#include "backend/cuda/launch.cuh"
#include "backend/cuda/row_quant.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

enum { THREADS = 256, WARPS = THREADS / 32, QSERVE_THREADS = 1024 };

/* ---- reductions ---------------------------------------------------------------------------------- */

struct add_op {
  __device__ static float apply(float a, float b) { return a + b; }
};
struct max_op {
  __device__ static float apply(float a, float b) { return fmaxf(a, b); }
};

/* The same value for all threads of a block of 32 * n_warps. */
template <class Op>
__device__ static float block_reduce(float x, int n_warps) {
  __shared__ float part[32];
  for (int i = 16; i > 0; i /= 2) x = Op::apply(x, __shfl_xor_sync(0xffffffffu, x, i));
  __syncthreads(); /* whoever used `part` before is done */
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  x = part[0];
  for (int i = 1; i < n_warps; i++) x = Op::apply(x, part[i]);
  return x;
}

/* ---- quantise, normalise ------------------------------------------------------------------------- */

/* One row a block. NV: groups of eight that a thread keeps in registers; dim <= 8 * THREADS * NV, a multiple of 8.
 * weight: NULL, or RMSNorm with it first; it depends on no kernel, so it is asked for while the one before still runs. */
template <int NV>
__global__ void __launch_bounds__(THREADS)
    k_quant_rows(const __half *x, const __half *weight, float eps, size_t dim, qtr_cuda_rows_out out) {
  __shared__ float part[QTR_ROW_SHARED];
  const int n = (int)dim, t = (int)threadIdx.x;
  const size_t row = blockIdx.x;
  uint4 e[NV], w[NV];
#pragma unroll
  for (int k = 0; k < NV; k++) {
    int at = (k * THREADS + t) * 8;
    e[k] = w[k] = make_uint4(0, 0, 0, 0);
    if (weight && at < n) w[k] = *reinterpret_cast<const uint4 *>(weight + at);
  }
  qtr_begin();
#pragma unroll
  for (int k = 0; k < NV; k++) {
    int at = (k * THREADS + t) * 8;
    if (at < n) e[k] = *reinterpret_cast<const uint4 *>(x + row * dim + at);
  }
  struct qtr_row_result r = qtr_row_measure<NV, THREADS>(e, w, weight != NULL, eps, n, t, part, [] { __syncthreads(); });
  int8_t *to = out.code + row * out.stride;
#pragma unroll
  for (int k = 0; k < NV; k++) {
    size_t at = (k * (size_t)THREADS + threadIdx.x) * 8; /* past dim: zeros */
    if (at < out.stride) *reinterpret_cast<uint2 *>(to + at) = qtr_row_codes(e[k], w[k], weight != NULL, r);
  }
  if (t == 0) {
    out.scale[row] = r.scale;
    out.sum[row] = r.sum;
  }
}

/* The same for any row: values are read again instead of kept. */
__global__ void __launch_bounds__(THREADS)
    k_quant_rows_any(const __half *x, const __half *weight, float eps, size_t dim, qtr_cuda_rows_out out) {
  qtr_begin();
  size_t row = blockIdx.x;
  const __half *from = x + row * dim;
  float rstd = 1, squares = 0, amax = 0, sum = 0;
  if (weight) {
    for (size_t i = threadIdx.x; i < dim; i += THREADS) squares += __half2float(from[i]) * __half2float(from[i]);
    rstd = 1.0f / sqrtf(block_reduce<add_op>(squares, WARPS) / (float)dim + eps);
  }
  for (size_t i = threadIdx.x; i < dim; i += THREADS) {
    float v = __half2float(from[i]);
    if (weight) v = v * rstd * __half2float(weight[i]);
    amax = fmaxf(amax, fabsf(v));
    sum += v;
  }
  amax = block_reduce<max_op>(amax, WARPS);
  sum = block_reduce<add_op>(sum, WARPS);
  float scale, inverse;
  qtr_row_scale(amax, &scale, &inverse);
  for (size_t i = threadIdx.x; i < out.stride; i += THREADS) {
    float v = i < dim ? __half2float(from[i]) : 0.0f;
    if (weight && i < dim) v = v * rstd * __half2float(weight[i]);
    out.code[row * out.stride + i] = (int8_t)qtr_code_round(v * inverse);
  }
  if (threadIdx.x == 0) {
    out.scale[row] = scale;
    out.sum[row] = sum;
  }
}

/* B.7: the mean subtracted, the maximum and the sums of fp16-rounded values, a thread's sum accumulated in fp16. */
__global__ void __launch_bounds__(QSERVE_THREADS)
    k_norm_qserve(const __half *x, const __half *weight, float eps, size_t dim, qtr_cuda_rows_out out) {
  qtr_begin();
  size_t row = blockIdx.x;
  int n_warps = blockDim.x / 32;
  const __half *from = x + row * dim;
  float sum = 0, squares = 0;
  for (size_t i = threadIdx.x; i < dim; i += blockDim.x) {
    float v = __half2float(from[i]);
    sum += v;
    squares += v * v;
  }
  float mean = block_reduce<add_op>(sum, n_warps) / (float)dim;
  float rstd = 1.0f / sqrtf(block_reduce<add_op>(squares, n_warps) / (float)dim + eps);
  float amax = __half2float(__ushort_as_half(0x0011)), part = 0; /* f16(1e-6) */
  for (size_t i = threadIdx.x; i < dim; i += blockDim.x) {
    float v = (__half2float(from[i]) - mean) * rstd * __half2float(weight[i]);
    float h = __half2float(__float2half_rn(v));
    amax = fmaxf(amax, fabsf(h));
    part = __half2float(__float2half_rn(part + h));
  }
  amax = block_reduce<max_op>(amax, n_warps);
  part = block_reduce<add_op>(part, n_warps);
  float scale, inverse;
  qtr_row_scale(amax, &scale, &inverse);
  for (size_t i = threadIdx.x; i < out.stride; i += blockDim.x) {
    float v = 0;
    if (i < dim) v = (__half2float(from[i]) - mean) * rstd * __half2float(weight[i]);
    out.code[row * out.stride + i] = (int8_t)qtr_code_round(v * inverse);
  }
  if (threadIdx.x == 0) {
    out.scale[row] = scale;
    out.sum[row] = __half2float(__float2half_rn(part));
  }
}

/* RMSNorm alone; rows as in k_quant_rows. */
template <int NV>
__global__ void __launch_bounds__(THREADS)
    k_norm_rows(const __half *x, const __half *weight, float eps, size_t dim, __half *out) {
  __shared__ float part[QTR_ROW_PARTS];
  const int n = (int)dim, t = (int)threadIdx.x;
  const size_t row = blockIdx.x;
  uint4 e[NV], w[NV];
  qtr_begin();
#pragma unroll
  for (int k = 0; k < NV; k++) {
    int at = (k * THREADS + t) * 8;
    if (at < n) e[k] = *reinterpret_cast<const uint4 *>(x + row * dim + at);
    if (at < n) w[k] = *reinterpret_cast<const uint4 *>(weight + at);
  }
  float rstd = qtr_row_rstd<NV, THREADS>(e, eps, n, t, part, [] { __syncthreads(); });
#pragma unroll
  for (int k = 0; k < NV; k++) {
    int at = (k * THREADS + t) * 8;
    if (at >= n) continue;
    float v[8];
    union {
      __half2 h[4];
      uint4 u;
    } c;
    qtr_row_values(e[k], w[k], true, rstd, v);
#pragma unroll
    for (int i = 0; i < 4; i++) c.h[i] = __floats2half2_rn(v[2 * i], v[2 * i + 1]);
    *reinterpret_cast<uint4 *>(out + row * dim + at) = c.u;
  }
}

/* The same for any row. */
__global__ void __launch_bounds__(THREADS)
    k_norm_rows_any(const __half *x, const __half *weight, float eps, size_t dim, __half *out) {
  qtr_begin();
  size_t row = blockIdx.x;
  const __half *from = x + row * dim;
  float squares = 0;
  for (size_t i = threadIdx.x; i < dim; i += THREADS) squares += __half2float(from[i]) * __half2float(from[i]);
  float rstd = 1.0f / sqrtf(block_reduce<add_op>(squares, WARPS) / (float)dim + eps);
  for (size_t i = threadIdx.x; i < dim; i += THREADS) {
    out[row * dim + i] = __float2half_rn(__half2float(from[i]) * rstd * __half2float(weight[i]));
  }
}

static cudaError_t quant_rows(const void *x, const void *weight, float eps, size_t n_tokens, size_t dim,
                              const qtr_cuda_rows_out *out, cudaStream_t stream) {
  const __half *from = (const __half *)x, *w = (const __half *)weight;
  size_t each = 8 * (size_t)THREADS;
  bool aligned = dim % 8 == 0 && (size_t)x % 16 == 0 && (size_t)weight % 16 == 0 && out->stride <= 16 * each;
  if (n_tokens == 0) return cudaSuccess;
  unsigned grid = (unsigned)n_tokens;
  if (!aligned)
    return qtr_launch(k_quant_rows_any, grid, THREADS, 0, stream, from, w, eps, dim, *out);
  else if (out->stride <= each)
    return qtr_launch(k_quant_rows<1>, grid, THREADS, 0, stream, from, w, eps, dim, *out);
  else if (out->stride <= 2 * each)
    return qtr_launch(k_quant_rows<2>, grid, THREADS, 0, stream, from, w, eps, dim, *out);
  else if (out->stride <= 4 * each)
    return qtr_launch(k_quant_rows<4>, grid, THREADS, 0, stream, from, w, eps, dim, *out);
  else if (out->stride <= 7 * each)
    return qtr_launch(k_quant_rows<7>, grid, THREADS, 0, stream, from, w, eps, dim, *out);
  else
    return qtr_launch(k_quant_rows<16>, grid, THREADS, 0, stream, from, w, eps, dim, *out);
}

cudaError_t qtr_cuda_rows_quant(const void *x, size_t n_tokens, size_t dim, const qtr_cuda_rows_out *out,
                                cudaStream_t stream) {
  return quant_rows(x, NULL, 0, n_tokens, dim, out, stream);
}

cudaError_t qtr_cuda_rows_norm_quant(const void *x, const void *weight, float eps, bool qserve, size_t n_tokens, size_t dim,
                                     const qtr_cuda_rows_out *out, cudaStream_t stream) {
  if (!qserve) return quant_rows(x, weight, eps, n_tokens, dim, out, stream);
  if (n_tokens == 0) return cudaSuccess;
  unsigned threads = dim >= QSERVE_THREADS ? (unsigned)QSERVE_THREADS : (unsigned)((dim + 31) / 32 * 32);
  return qtr_launch(k_norm_qserve, (unsigned)n_tokens, threads, 0, stream, (const __half *)x, (const __half *)weight, eps,
                    dim, *out);
}

cudaError_t qtr_cuda_rows_norm(const void *x, const void *weight, float eps, size_t n_tokens, size_t dim, void *out,
                               cudaStream_t stream) {
  const __half *from = (const __half *)x, *w = (const __half *)weight;
  __half *to = (__half *)out;
  bool aligned = dim % 8 == 0 && (size_t)x % 16 == 0 && (size_t)weight % 16 == 0 && (size_t)out % 16 == 0;
  if (n_tokens == 0) return cudaSuccess;
  if (aligned && dim <= 8 * (size_t)THREADS)
    return qtr_launch(k_norm_rows<1>, (unsigned)n_tokens, THREADS, 0, stream, from, w, eps, dim, to);
  if (aligned && dim <= 4 * 8 * (size_t)THREADS)
    return qtr_launch(k_norm_rows<4>, (unsigned)n_tokens, THREADS, 0, stream, from, w, eps, dim, to);
  return qtr_launch(k_norm_rows_any, (unsigned)n_tokens, THREADS, 0, stream, from, w, eps, dim, to);
}

/* ---- rows from tables ---------------------------------------------------------------------------- */

__device__ static float value_at(qtr_dtype dtype, const void *x, size_t i) {
  switch (dtype) {
    case QTR_DTYPE_F32: return ((const float *)x)[i];
    case QTR_DTYPE_F16: return __half2float(((const __half *)x)[i]);
    case QTR_DTYPE_BF16: return __bfloat162float(((const __nv_bfloat16 *)x)[i]);
    default: return (float)((const int8_t *)x)[i];
  }
}

__device__ static __half to_half(float x) { return __float2half_rn(fminf(fmaxf(x, -65504.0f), 65504.0f)); }

__global__ void __launch_bounds__(THREADS)
    k_embed(qtr_dtype dtype, const void *data, const float *scale, size_t n_rows, size_t dim, const int32_t *token,
            const qtr_choose_result *chosen, int32_t *known, __half *out) {
  qtr_begin();
  int32_t t = token[blockIdx.x];
  if (t < 0 && chosen) t = chosen[-1 - t].token;
  size_t row = t >= 0 && (size_t)t < n_rows ? (size_t)t : 0;
  if (blockIdx.y == 0 && threadIdx.x == 0) known[blockIdx.x] = (int32_t)row;
  float s = scale ? scale[row] : 1.0f;
  for (size_t i = blockIdx.y * (size_t)THREADS + threadIdx.x; i < dim; i += THREADS * (size_t)gridDim.y) {
    out[blockIdx.x * dim + i] = to_half(value_at(dtype, data, row * dim + i) * s);
  }
}

cudaError_t qtr_cuda_rows_embed(qtr_dtype dtype, const void *data, const float *scale, size_t n_rows, size_t dim,
                                const int32_t *token, const qtr_choose_result *chosen, size_t n_tokens, int32_t *known,
                                void *out, cudaStream_t stream) {
  if (n_tokens == 0) return cudaSuccess;
  dim3 grid((unsigned)n_tokens, n_tokens < 64 ? (unsigned)((dim + THREADS - 1) / THREADS) : 1u);
  return qtr_launch(k_embed, grid, THREADS, 0, stream, dtype, data, scale, n_rows, dim, token, chosen, known, (__half *)out);
}

__global__ void __launch_bounds__(THREADS) k_gather(const __half *x, const int32_t *row, size_t dim, __half *out) {
  qtr_begin();
  size_t from = (size_t)row[blockIdx.x];
  for (size_t i = threadIdx.x; i < dim; i += THREADS) out[blockIdx.x * dim + i] = x[from * dim + i];
}

cudaError_t qtr_cuda_rows_gather(const void *x, const int32_t *row, size_t n_rows, size_t dim, void *out,
                                 cudaStream_t stream) {
  if (n_rows == 0) return cudaSuccess;
  return qtr_launch(k_gather, (unsigned)n_rows, THREADS, 0, stream, (const __half *)x, row, dim, (__half *)out);
}

/* ---- floating-point matrices --------------------------------------------------------------------- */

/* A warp an output; lanes stride over the inputs, so a row's sum has one order. */
__global__ void __launch_bounds__(THREADS)
    k_product(const __half *x, const void *weight, bool f32, size_t n_tokens, size_t n_in, size_t n_out, float *out) {
  qtr_begin();
  size_t n = blockIdx.x * (size_t)WARPS + threadIdx.x / 32;
  if (n >= n_out) return;
  for (size_t t = blockIdx.y; t < n_tokens; t += gridDim.y) {
    float sum = 0;
    for (size_t k = threadIdx.x % 32; k < n_in; k += 32) {
      float w = f32 ? ((const float *)weight)[n * n_in + k] : __half2float(((const __half *)weight)[n * n_in + k]);
      sum += w * __half2float(x[t * n_in + k]);
    }
    for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);
    if (threadIdx.x % 32 == 0) out[t * n_out + n] = sum;
  }
}

cudaError_t qtr_cuda_rows_product(const void *x, const void *weight, bool weight_f32, size_t n_tokens, size_t n_in,
                                  size_t n_out, float *out, cudaStream_t stream) {
  if (n_tokens == 0) return cudaSuccess;
  dim3 grid((unsigned)((n_out + WARPS - 1) / WARPS), (unsigned)(n_tokens < 65535 ? n_tokens : 65535));
  return qtr_launch(k_product, grid, THREADS, 0, stream, (const __half *)x, weight, weight_f32, n_tokens, n_in, n_out, out);
}

__global__ void __launch_bounds__(THREADS)
    k_finish(const float *y, const float *bias, qtr_epilogue epilogue, size_t n_out, size_t width, size_t n, void *out) {
  qtr_begin();
  for (size_t i = blockIdx.x * (size_t)THREADS + threadIdx.x; i < n; i += (size_t)gridDim.x * THREADS) {
    size_t t = i / width, c = i % width;
    const float *row = y + t * n_out;
    float v = row[c] + (bias ? bias[c] : 0.0f);
    if (epilogue == QTR_EPILOGUE_SILU_MUL) {
      float up = row[width + c] + (bias ? bias[width + c] : 0.0f);
      v = v / (1.0f + expf(-v)) * up;
    }
    if (epilogue == QTR_EPILOGUE_LOGITS) {
      ((float *)out)[i] = v;
    } else {
      __half *to = (__half *)out + i;
      if (epilogue == QTR_EPILOGUE_ADD) v += __half2float(*to);
      *to = to_half(v);
    }
  }
}

cudaError_t qtr_cuda_rows_finish(const float *y, const float *bias, qtr_epilogue epilogue, size_t n_tokens, size_t n_out,
                                 void *out, cudaStream_t stream) {
  size_t width = epilogue == QTR_EPILOGUE_SILU_MUL ? n_out / 2 : n_out, n = n_tokens * width;
  if (n == 0) return cudaSuccess;
  size_t blocks = (n + THREADS - 1) / THREADS;
  return qtr_launch(k_finish, (unsigned)(blocks < 8192 ? blocks : 8192), THREADS, 0, stream, y, bias, epilogue, n_out, width,
                    n, out);
}

__global__ void __launch_bounds__(THREADS) k_convert(qtr_dtype dtype, const void *x, size_t n, __half *out, int32_t *n_bad) {
  qtr_begin();
  for (size_t i = blockIdx.x * (size_t)THREADS + threadIdx.x; i < n; i += (size_t)gridDim.x * THREADS) {
    float v = value_at(dtype, x, i);
    if (fabsf(v) > 65504.0f && isfinite(v)) atomicAdd(n_bad, 1);
    out[i] = __float2half_rn(v);
  }
}

cudaError_t qtr_cuda_rows_convert(qtr_dtype dtype, const void *x, size_t n, void *out, int32_t *n_bad, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  size_t blocks = (n + THREADS - 1) / THREADS;
  return qtr_launch(k_convert, (unsigned)(blocks < 8192 ? blocks : 8192), THREADS, 0, stream, dtype, x, n, (__half *)out,
                    n_bad);
}
