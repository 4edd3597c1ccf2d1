/* rope_kv.cu - RoPE on q and k in place (spec C.4), then K and V into their pages (C.3): codes, scales and zeros have the
 * bits of backend/common/kv_quant.h for the fp16 values that are left in qkv. Layout: kv_layout.h.
 *
 * A block is eight rows (heads of q, k or v) of a token, one warp a row: every value is read once, the row's range is
 * reduced in the warp, codes change places through shared memory. Bound by the bytes of qkv. */
#include <cuda_fp16.h>

#include "backend/cuda/attention.h"
#include "backend/cuda/kv_layout.h"
#include "backend/cuda/launch.cuh"

enum { ROPE_WARPS = 8, MAX_DIM = 256 };

struct rope_params {
  __half *qkv;    /* (n_tokens, (n_heads + 2 n_kv_heads) * dim) */
  uint8_t *k, *v; /* pools of this layer */
  size_t page_bytes, block_bytes, code_bytes;
  const int32_t *token_seq, *q_start, *kv_len, *block_table;
  const float *cos, *sin; /* (n_tokens, dim / 2) */
  float k_scale, v_scale; /* INT8_STATIC */
  int32_t max_blocks, n_heads, n_kv_heads, dim;
};

__device__ static float kv_sane(float x) {
  x = x > -65504.0f ? x : -65504.0f;
  return x < 65504.0f ? x : 65504.0f;
}

/* The twin of qtr_kv_quant_params: the same operations, none contracted. */
__device__ static void quant_params(float mn, float mx, float levels, __half *scale, __half *zero) {
  float range = __fsub_rn(mx, mn), magnitude = fmaxf(fabsf(mn), fabsf(mx));
  if (range > 0) {
    *scale = __float2half_rn(__fdiv_rn(range, levels));
    *zero = __float2half_rn(__fdiv_rn(__fmul_rn(-levels, mn), range));
    float s = __half2float(*scale), z = __half2float(*zero);
    if (s > 0 && isfinite(z)) {
      float slack = fmaxf(s, __fdiv_rn(magnitude, 256.0f));
      float low = __fmul_rn(-z, s), high = __fsub_rn(__fmul_rn(levels, s), __fmul_rn(z, s));
      if (low <= __fadd_rn(mn, slack) && high >= __fsub_rn(mx, slack)) return;
    }
  }
  int exponent;
  float fraction = frexpf(fmaxf(fmaxf(magnitude / 2048, __fdiv_rn(range, levels)), 0x1p-24f), &exponent);
  float s = ldexpf(1.0f, fraction == 0.5f ? exponent - 1 : exponent);
  *scale = __float2half_rn(s);
  *zero = __float2half_rn(0.0f - rintf(__fdiv_rn(mn, s)));
}

__device__ static float warp_max(float x) {
#pragma unroll
  for (int i = 16; i; i /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
  return x;
}

/* Stores a row: a[j], b[j] are elements lane + 32 j and half + lane + 32 j, already rounded to fp16. code: (MAX_DIM) bytes
 * of shared memory of this warp. */
template <int FORMAT, int NJ>
__device__ static void row_store(const struct rope_params &p, uint8_t *block, bool is_v, int slot, const float *a,
                                 const float *b, uint8_t *code) {
  int lane = threadIdx.x % 32, half = p.dim / 2, shift;
  if (FORMAT == QTR_KV_F16) {
#pragma unroll
    for (int j = 0; j < NJ; j++) {
      int i = lane + 32 * j;
      if (i >= half) continue;
      *(__half *)(block + qtr_kv_element(FORMAT, p.dim, is_v, slot, i, &shift)) = __float2half_rn(kv_sane(a[j]));
      *(__half *)(block + qtr_kv_element(FORMAT, p.dim, is_v, slot, half + i, &shift)) = __float2half_rn(kv_sane(b[j]));
    }
    return;
  }
  float r, zero = 0, levels = FORMAT == QTR_KV_INT4 ? 15 : 255;
  if (FORMAT == QTR_KV_INT8_STATIC) {
    r = __fdiv_rn(1.0f, is_v ? p.v_scale : p.k_scale);
  } else {
    float mn = -INFINITY, mx = -INFINITY; /* mn: of the negated values */
#pragma unroll
    for (int j = 0; j < NJ; j++) {
      if (lane + 32 * j >= half) continue;
      float x = kv_sane(a[j]), y = kv_sane(b[j]);
      mx = fmaxf(mx, fmaxf(x, y));
      mn = fmaxf(mn, fmaxf(-x, -y));
    }
    mx = warp_max(mx);
    mn = -warp_max(mn);
    __half scale_h, zero_h;
    quant_params(mn, mx, levels, &scale_h, &zero_h);
    r = __fdiv_rn(1.0f, __half2float(scale_h));
    zero = __half2float(zero_h);
    if (lane == 0) *(__half2 *)(block + p.code_bytes + slot * 4) = __halves2half2(scale_h, zero_h);
  }
#pragma unroll
  for (int j = 0; j < NJ; j++) {
    int i = lane + 32 * j;
    if (i >= half) continue;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float x = kv_sane(h ? b[j] : a[j]), c;
      if (FORMAT == QTR_KV_INT8_STATIC) {
        c = fminf(fmaxf(rintf(__fmul_rn(x, r)), -128.0f), 127.0f) + 128.0f;
      } else {
        c = fminf(fmaxf(rintf(__fadd_rn(__fmul_rn(x, r), zero)), 0.0f), levels);
      }
      code[h * half + i] = (uint8_t)(int)c;
    }
  }
  __syncwarp();
  int dim = p.dim;
  if (FORMAT == QTR_KV_INT4) {
    bool fragments = qtr_kv_has_fragments(dim);
    for (int i = lane; i < half; i += 32) {
      int low = fragments ? i / 8 * 16 + i % 8 : 2 * i, high = low + (fragments ? 8 : 1);
      block[qtr_kv_element(FORMAT, dim, is_v, slot, low, &shift)] = (uint8_t)(code[low] | code[high] << 4);
    }
  } else {
    for (int i = lane; i < dim; i += 32) block[qtr_kv_element(FORMAT, dim, is_v, slot, i, &shift)] = code[i];
  }
  __syncwarp();
}

/* NJ: dim / 64 rounded up. */
template <int FORMAT, int NJ>
__global__ static void __launch_bounds__(ROPE_WARPS * 32) k_rope_kv(const struct rope_params p) {
  __shared__ uint8_t codes[ROPE_WARPS][MAX_DIM];
  qtr_begin();
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, half = p.dim / 2;
  int token = blockIdx.x, seq = p.token_seq[token], n_rows = p.n_heads + 2 * p.n_kv_heads;
  int place = p.kv_len[seq] + token - p.q_start[seq], slot = place % QTR_PAGE_TOKENS;
  size_t page = (size_t)p.block_table[(size_t)seq * p.max_blocks + place / QTR_PAGE_TOKENS];
  float cos[NJ], sin[NJ];
#pragma unroll
  for (int j = 0; j < NJ; j++) {
    int i = lane + 32 * j;
    cos[j] = i < half ? p.cos[(size_t)token * half + i] : 1;
    sin[j] = i < half ? p.sin[(size_t)token * half + i] : 0;
  }
  int row = blockIdx.y * ROPE_WARPS + warp;
  if (row < n_rows) {
    __half *x = p.qkv + ((size_t)token * n_rows + row) * p.dim;
    bool is_v = row >= p.n_heads + p.n_kv_heads;
    float a[NJ], b[NJ];
#pragma unroll
    for (int j = 0; j < NJ; j++) {
      int i = lane + 32 * j;
      a[j] = i < half ? __half2float(x[i]) : 0;
      b[j] = i < half ? __half2float(x[half + i]) : 0;
    }
    if (!is_v) {
#pragma unroll
      for (int j = 0; j < NJ; j++) {
        int i = lane + 32 * j;
        if (i >= half) continue;
        __half u = __float2half_rn(kv_sane(a[j] * cos[j] - b[j] * sin[j])); /* finite, whatever comes */
        __half w = __float2half_rn(kv_sane(b[j] * cos[j] + a[j] * sin[j]));
        x[i] = u;
        x[half + i] = w;
        a[j] = __half2float(u);
        b[j] = __half2float(w);
      }
    }
    if (row < p.n_heads) return;
    int head = is_v ? row - p.n_heads - p.n_kv_heads : row - p.n_heads;
    uint8_t *block = (is_v ? p.v : p.k) + page * p.page_bytes + head * p.block_bytes;
    row_store<FORMAT, NJ>(p, block, is_v, slot, a, b, codes[warp]);
  }
}

template <int FORMAT>
static cudaError_t launch(const struct rope_params &p, int32_t n_tokens, cudaStream_t stream) {
  dim3 grid((unsigned)n_tokens, (unsigned)((p.n_heads + 2 * p.n_kv_heads + ROPE_WARPS - 1) / ROPE_WARPS));
  if (p.dim <= 64) return qtr_launch(k_rope_kv<FORMAT, 1>, grid, ROPE_WARPS * 32, 0, stream, p);
  if (p.dim <= 128) return qtr_launch(k_rope_kv<FORMAT, 2>, grid, ROPE_WARPS * 32, 0, stream, p);
  return qtr_launch(k_rope_kv<FORMAT, 4>, grid, ROPE_WARPS * 32, 0, stream, p);
}

cudaError_t qtr_cuda_rope_kv_write(const struct qtr_rope_kv_args *args, const struct qtr_cuda_batch *batch,
                                   cudaStream_t stream) {
  const struct qtr_kv *kv = args->kv;
  int format = (int)kv->config.format;
  if (batch->n_tokens < 1) return cudaSuccess;
  size_t pool = (size_t)args->layer * 2 * ((size_t)kv->config.n_pages + 1) * kv->page_bytes;
  const float *scale = kv->static_scale ? kv->static_scale + (size_t)args->layer * 2 : NULL;
  struct rope_params p = {};
  p.qkv = (__half *)args->qkv;
  p.k = kv->data + pool;
  p.v = p.k + ((size_t)kv->config.n_pages + 1) * kv->page_bytes;
  p.page_bytes = kv->page_bytes;
  p.block_bytes = qtr_kv_block_bytes(format, args->head_dim);
  p.code_bytes = qtr_kv_code_bytes(format, args->head_dim);
  p.token_seq = batch->token_seq;
  p.q_start = batch->q_start;
  p.kv_len = batch->kv_len;
  p.block_table = batch->block_table;
  p.cos = batch->cos;
  p.sin = batch->sin;
  p.k_scale = scale ? scale[0] : 1;
  p.v_scale = scale ? scale[1] : 1;
  p.max_blocks = batch->max_blocks;
  p.n_heads = args->n_heads;
  p.n_kv_heads = args->n_kv_heads;
  p.dim = args->head_dim;
  switch (kv->config.format) {
    case QTR_KV_F16: return launch<QTR_KV_F16>(p, batch->n_tokens, stream);
    case QTR_KV_INT8: return launch<QTR_KV_INT8>(p, batch->n_tokens, stream);
    case QTR_KV_INT4: return launch<QTR_KV_INT4>(p, batch->n_tokens, stream);
    default: return launch<QTR_KV_INT8_STATIC>(p, batch->n_tokens, stream);
  }
}

__global__ static void k_rope_table(const int32_t *position, const float *inv_freq, int n_tokens, int half, float *cos,
                                    float *sin) {
  qtr_begin();
  size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (size_t)n_tokens * half) return;
  sincosf((float)position[i / half] * inv_freq[i % half], &sin[i], &cos[i]);
}

cudaError_t qtr_cuda_rope_table(const int32_t *position, const float *inv_freq, size_t n_tokens, size_t half_dim, float *cos,
                                float *sin, cudaStream_t stream) {
  size_t n = n_tokens * half_dim;
  if (n == 0) return cudaSuccess;
  return qtr_launch(k_rope_table, (unsigned)((n + 255) / 256), 256, 0, stream, position, inv_freq, (int)n_tokens,
                    (int)half_dim, cos, sin);
}
