/* rope_kv.cu - RoPE on q and k in place (spec C.4), then K and V into their pages (C.3): codes, scales and zeros have the
 * bits of backend/common/kv_quant.h for the fp16 values that are left in qkv. Layout: kv_layout.h.
 *
 * A block is eight rows (heads of q, k or v) of a token, one warp a row: every value is read once, the row's range is
 * reduced in the warp, codes change places through shared memory. Bound by the bytes of qkv. Where pages are chosen, the
 * keys' statistics follow, here those of sequences with one new key, in select.cu those of others. */
#include <cuda_fp16.h>

#include "backend/cuda/attention.h"
#include "backend/cuda/kv_layout.h"
#include "backend/cuda/launch.cuh"

enum { ROPE_WARPS = 8, MAX_DIM = 256 };

struct rope_params {
  __half *qkv;                      /* (n_tokens, (n_heads + 2 n_kv_heads) * dim) */
  uint8_t *data;                    /* the cache */
  const struct qtr_cuda_head *head; /* (n_kv_heads) of this layer: retrieval heads first */
  size_t code_bytes;
  const int32_t *token_seq, *q_start, *kv_len, *block_table, *stream_table;
  const float *cos, *sin; /* (n_tokens, dim / 2) */
  float k_scale, v_scale; /* INT8_STATIC */
  __half *stats;          /* of this layer; NULL: none are kept */
  int32_t logical_tokens;
  int32_t max_blocks, n_heads, n_kv_heads, n_retrieval, dim;
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

/* The statistics of the logical page that a key comes into, of a sequence with no other new key (select.h). A layer's
 * statistics were last written a step ago: they are read before the kernel before this one has ended. */
template <int NJ>
struct page_stats {
  __half *max, *min;   /* (dim) each; NULL: not this row's work */
  float old[2][2][NJ]; /* of max and min: both halves, as a row's a and b */

  __device__ void read(const struct rope_params &p, int page, int rank, int slot) {
    int lane = threadIdx.x % 32, half = p.dim / 2, logical = slot / p.logical_tokens;
    max = p.stats + qtr_cuda_stats_at(p.logical_tokens, p.dim, p.n_retrieval, page, rank, logical, false, 0);
    min = p.stats + qtr_cuda_stats_at(p.logical_tokens, p.dim, p.n_retrieval, page, rank, logical, true, 0);
    bool first = slot % p.logical_tokens == 0;
#pragma unroll
    for (int j = 0; j < NJ; j++) {
      int i = lane + 32 * j;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        bool there = i < half && !first;
        old[0][h][j] = there ? __half2float(__ldcg(max + h * half + i)) : -INFINITY;
        old[1][h][j] = there ? __half2float(__ldcg(min + h * half + i)) : INFINITY;
      }
    }
  }
  __device__ void widen(int half, const float *a, const float *b) const {
#pragma unroll
    for (int j = 0; j < NJ; j++) {
      int i = threadIdx.x % 32 + 32 * j;
      if (i >= half) continue;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float x = kv_sane(h ? b[j] : a[j]);
        max[h * half + i] = __float2half_rn(fmaxf(x, old[0][h][j]));
        min[h * half + i] = __float2half_rn(fminf(x, old[1][h][j]));
      }
    }
  }
};

/* NJ: dim / 64 rounded up. */
template <int FORMAT, int NJ>
__global__ static void __launch_bounds__(ROPE_WARPS * 32) k_rope_kv(const struct rope_params p) {
  __shared__ uint8_t codes[ROPE_WARPS][MAX_DIM];
  /* Tables were uploaded before the step's first kernel: read before the kernel before this one has ended, and from the L2
   * cache, as an SM's L1 may remember the step before. */
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, half = p.dim / 2;
  int token = blockIdx.x, seq = __ldcg(p.token_seq + token), n_rows = p.n_heads + 2 * p.n_kv_heads;
  int first = __ldcg(p.q_start + seq), place = __ldcg(p.kv_len + seq) + token - first, slot = place % QTR_PAGE_TOKENS;
  bool alone = __ldcg(p.q_start + seq + 1) - first == 1;
  size_t entry = (size_t)seq * p.max_blocks + place / QTR_PAGE_TOKENS;
  int row = blockIdx.y * ROPE_WARPS + warp;
  bool is_v = row >= p.n_heads + p.n_kv_heads;
  struct qtr_cuda_head head = {};
  size_t page = 0;
  struct page_stats<NJ> stats;
  stats.max = NULL;
  if (row >= p.n_heads && row < n_rows) { /* in the order of the table, whatever the heads' numbers are */
    int i = is_v ? row - p.n_heads - p.n_kv_heads : row - p.n_heads;
    head = p.head[i];
    page = (size_t)__ldcg((i < p.n_retrieval ? p.block_table : p.stream_table) + entry);
    row = p.n_heads + (is_v ? p.n_kv_heads : 0) + head.kv_head;
    if (p.stats && !is_v && i < p.n_retrieval && alone) stats.read(p, (int)page, i, slot);
  }
  qtr_begin();
  float cos[NJ], sin[NJ];
#pragma unroll
  for (int j = 0; j < NJ; j++) {
    int i = lane + 32 * j;
    cos[j] = i < half ? p.cos[(size_t)token * half + i] : 1;
    sin[j] = i < half ? p.sin[(size_t)token * half + i] : 0;
  }
  if (row < n_rows) {
    __half *x = p.qkv + ((size_t)token * n_rows + row) * p.dim;
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
    uint8_t *block = p.data + (is_v ? head.v : head.k) + page * head.page_bytes;
    row_store<FORMAT, NJ>(p, block, is_v, slot, a, b, codes[warp]);
    if (stats.max) stats.widen(half, a, b);
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
  const float *scale = kv->static_scale ? kv->static_scale + (size_t)args->layer * 2 : NULL;
  struct rope_params p = {};
  p.qkv = (__half *)args->qkv;
  p.data = kv->data;
  p.head = kv->order + (size_t)args->layer * args->n_kv_heads;
  p.n_retrieval = qtr_kv_head_count(&kv->heads, args->layer, QTR_HEAD_RETRIEVAL);
  if (kv->heads.sparse.budget > 0 && p.n_retrieval > 0) p.stats = (__half *)kv->stats + kv->stats_at[args->layer];
  p.logical_tokens = kv->heads.sparse.logical_tokens;
  p.code_bytes = qtr_kv_code_bytes(format, args->head_dim);
  p.token_seq = batch->token_seq;
  p.q_start = batch->q_start;
  p.kv_len = batch->kv_len;
  p.block_table = batch->block_table;
  p.stream_table = batch->stream_table;
  p.cos = batch->cos;
  p.sin = batch->sin;
  p.k_scale = scale ? scale[0] : 1;
  p.v_scale = scale ? scale[1] : 1;
  p.max_blocks = batch->max_blocks;
  p.n_heads = args->n_heads;
  p.n_kv_heads = args->n_kv_heads;
  p.dim = args->head_dim;
  cudaError_t error;
  switch (kv->config.format) {
    case QTR_KV_F16: error = launch<QTR_KV_F16>(p, batch->n_tokens, stream); break;
    case QTR_KV_INT8: error = launch<QTR_KV_INT8>(p, batch->n_tokens, stream); break;
    case QTR_KV_INT4: error = launch<QTR_KV_INT4>(p, batch->n_tokens, stream); break;
    default: error = launch<QTR_KV_INT8_STATIC>(p, batch->n_tokens, stream); break;
  }
  if (error != cudaSuccess || !p.stats || batch->n_tokens == batch->n_seqs) return error;
  struct qtr_cuda_stats_args stats = {};
  stats.qkv = args->qkv;
  stats.stats = p.stats;
  stats.head = kv->retrieval + (size_t)args->layer * args->n_kv_heads;
  stats.n_retrieval = p.n_retrieval;
  stats.n_heads = args->n_heads;
  stats.n_kv_heads = args->n_kv_heads;
  stats.head_dim = args->head_dim;
  stats.logical_tokens = kv->heads.sparse.logical_tokens;
  stats.n_tokens = batch->n_tokens;
  stats.n_seqs = batch->n_seqs;
  stats.max_blocks = batch->max_blocks;
  stats.token_seq = batch->token_seq;
  stats.q_start = batch->q_start;
  stats.kv_len = batch->kv_len;
  stats.block_table = batch->block_table;
  return qtr_cuda_stats_update(&stats, stream);
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
