/* rope_kv.cu - RoPE on q and k in place (spec C.4), then K and V into their pages (C.3): codes, scales and zeros have the
 * bits of backend/common/kv_quant.h for the fp16 values that are left in qkv. Layout: kv_layout.h.
 *
 * A block is rows (heads of q, k or v) of a token: every value is read once, a row's range is reduced among its lanes, codes
 * change places between them. Rows of 64 and 128 values are read 8 bytes a lane, several a warp. Bound by the bytes of qkv.
 * Where pages are chosen, the keys' statistics follow, here those of sequences with one new key, in select.cu those of
 * others. */
#include <cuda_fp16.h>

#include "backend/cuda/attention.h"
#include "backend/cuda/kv_layout.h"
#include "backend/cuda/launch.cuh"

enum { ROPE_WARPS = 8, MAX_DIM = 256, FULL_GPU = 1024 /* blocks that a large GPU runs at once */ };

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

/* How lanes share rows. LANES of a warp hold a row, each NE pairs (i, half + i) of it, whose angle is the same. LANES < 32,
 * for 8 * LANES values a row: i = 4 lane + j, read and written 8 bytes a time; 32, for any size: i = lane + 32 j. */
template <int LANES, int NE>
struct split {
  static constexpr bool whole = LANES < 32; /* every lane has NE pairs */
  static constexpr int rows = 32 / LANES;   /* of a warp */
  __device__ static int lane() { return (int)threadIdx.x % LANES; }
  __device__ static int index(int j) { return whole ? 4 * lane() + j : lane() + 32 * j; }
  __device__ static float most(float x) { /* of a row's lanes */
#pragma unroll
    for (int i = LANES / 2; i; i /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
    return x;
  }
};

template <int NE>
struct row_values {
  float v[2][NE]; /* of the first half, of the second */
};

__device__ static uint2 pack(const float (&v)[4]) {
  __half2 low = __floats2half2_rn(v[0], v[1]), high = __floats2half2_rn(v[2], v[3]);
  return make_uint2(*(uint32_t *)&low, *(uint32_t *)&high);
}
__device__ static void unpack(uint2 u, float (&v)[4]) {
  float2 low = __half22float2(*(__half2 *)&u.x), high = __half22float2(*(__half2 *)&u.y);
  v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
}

template <int LANES, int NE>
__device__ static void row_read(const __half *x, int half, struct row_values<NE> *row) {
  using S = split<LANES, NE>;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if constexpr (S::whole) {
      unpack(*(const uint2 *)(x + h * half + S::index(0)), row->v[h]);
    } else {
#pragma unroll
      for (int j = 0; j < NE; j++) row->v[h][j] = S::index(j) < half ? __half2float(x[h * half + S::index(j)]) : 0;
    }
  }
}

/* Turns the row in x by its angles and leaves in `row` what is in x: rounded, finite whatever comes. */
template <int LANES, int NE>
__device__ static void row_turn(__half *x, int half, const float (&cos)[NE], const float (&sin)[NE],
                                struct row_values<NE> *row) {
  using S = split<LANES, NE>;
#pragma unroll
  for (int j = 0; j < NE; j++) {
    float a = row->v[0][j], b = row->v[1][j];
    row->v[0][j] = __half2float(__float2half_rn(kv_sane(a * cos[j] - b * sin[j])));
    row->v[1][j] = __half2float(__float2half_rn(kv_sane(b * cos[j] + a * sin[j])));
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if constexpr (S::whole) {
      *(uint2 *)(x + h * half + S::index(0)) = pack(row->v[h]);
    } else {
#pragma unroll
      for (int j = 0; j < NE; j++) {
        if (S::index(j) < half) x[h * half + S::index(j)] = __float2half_rn(row->v[h][j]);
      }
    }
  }
}

/* Calls f(h, j, place) for every value of a row that this lane holds and that has a whole number of bytes, where it is
 * stored. */
template <int FORMAT, int LANES, int NE, typename F>
__device__ static void places_visit(int row_dim, uint8_t *block, bool there, bool is_v, int slot, const F &f) {
  using S = split<LANES, NE>;
  int dim = S::whole ? 8 * LANES : row_dim, half = row_dim / 2, shift;
#pragma unroll
  for (int j = 0; j < NE; j++) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (there && S::index(j) < half)
        f(h, j, block + qtr_kv_element(FORMAT, dim, is_v, slot, h * half + S::index(j), &shift));
    }
  }
}

/* Codes to their places. code: those of a row's pairs; bytes: (MAX_DIM) of shared memory of this warp, for LANES 32. All
 * lanes of a warp come here, `there` those whose row is stored. */
template <int FORMAT, int LANES, int NE>
__device__ static void codes_write(const struct rope_params &p, uint8_t *block, bool there, bool is_v, int slot,
                                   const int (&code)[2][NE], uint8_t *bytes) {
  using S = split<LANES, NE>;
  int half = p.dim / 2, shift;
  if constexpr (S::whole && FORMAT == QTR_KV_INT4) {
    /* A byte is dims d and d + 8 of sixteen: those of lanes l and l + 2. Of two such lanes the first writes what both have
     * of the first half, the other what both have of the second. */
    int l = S::lane();
    bool second = l & 2;
    uint32_t mine[2], other;
#pragma unroll
    for (int h = 0; h < 2; h++) mine[h] = code[h][0] | code[h][1] << 8 | code[h][2] << 16 | code[h][3] << 24;
    other = __shfl_xor_sync(~0u, second ? mine[0] : mine[1], 2);
    uint32_t pairs = second ? other | mine[1] << 4 : mine[0] | other << 4;
    int first = second ? half + 4 * (l - 2) : 4 * l;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (there) block[qtr_kv_element(FORMAT, 8 * LANES, is_v, slot, first + j, &shift)] = (uint8_t)(pairs >> 8 * j);
    }
  } else if constexpr (FORMAT == QTR_KV_INT4) { /* neighbours share a byte */
#pragma unroll
    for (int j = 0; j < NE; j++) {
      if (S::index(j) < half) bytes[S::index(j)] = (uint8_t)code[0][j], bytes[half + S::index(j)] = (uint8_t)code[1][j];
    }
    __syncwarp();
    for (int i = S::lane(); i < half && there; i += 32) {
      block[qtr_kv_element(FORMAT, p.dim, is_v, slot, 2 * i, &shift)] = (uint8_t)(bytes[2 * i] | bytes[2 * i + 1] << 4);
    }
    __syncwarp();
  } else {
    places_visit<FORMAT, LANES, NE>(p.dim, block, there, is_v, slot,
                                    [&](int h, int j, uint8_t *at) { *at = (uint8_t)code[h][j]; });
  }
}

/* Stores rows of K or V that are rounded to fp16 already; as codes_write. */
template <int FORMAT, int LANES, int NE>
__device__ static void row_store(const struct rope_params &p, uint8_t *block, bool there, bool is_v, int slot,
                                 const struct row_values<NE> &row, uint8_t *bytes) {
  using S = split<LANES, NE>;
  int half = p.dim / 2, shift;
  if constexpr (FORMAT == QTR_KV_F16) {
    places_visit<FORMAT, LANES, NE>(p.dim, block, there, is_v, slot, [&](int h, int j, uint8_t *at) {
      *(__half *)at = __float2half_rn(kv_sane(row.v[h][j]));
    });
    return;
  }
  float r, zero = 0, levels = FORMAT == QTR_KV_INT4 ? 15 : 255;
  if (FORMAT == QTR_KV_INT8_STATIC) {
    r = __fdiv_rn(1.0f, is_v ? p.v_scale : p.k_scale);
  } else {
    float mn = -INFINITY, mx = -INFINITY; /* mn: of the negated values */
#pragma unroll
    for (int j = 0; j < NE; j++) {
      if (!S::whole && S::index(j) >= half) continue;
      float x = kv_sane(row.v[0][j]), y = kv_sane(row.v[1][j]);
      mx = fmaxf(mx, fmaxf(x, y));
      mn = fmaxf(mn, fmaxf(-x, -y));
    }
    mx = S::most(mx);
    mn = -S::most(mn);
    __half scale_h, zero_h;
    quant_params(mn, mx, levels, &scale_h, &zero_h);
    r = __fdiv_rn(1.0f, __half2float(scale_h));
    zero = __half2float(zero_h);
    if (there && S::lane() == 0) *(__half2 *)(block + p.code_bytes + slot * 4) = __halves2half2(scale_h, zero_h);
  }
  int code[2][NE];
#pragma unroll
  for (int j = 0; j < NE; j++) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float x = kv_sane(row.v[h][j]), c;
      if (FORMAT == QTR_KV_INT8_STATIC) {
        c = fminf(fmaxf(rintf(__fmul_rn(x, r)), -128.0f), 127.0f) + 128.0f;
      } else {
        c = fminf(fmaxf(rintf(__fadd_rn(__fmul_rn(x, r), zero)), 0.0f), levels);
      }
      code[h][j] = (int)c;
    }
  }
  codes_write<FORMAT, LANES, NE>(p, block, there, is_v, slot, code, bytes);
}

/* The statistics of the logical page that a key comes into, of a sequence with no other new key (select.h). A layer's
 * statistics were last written a step ago: the first are read before the kernel before this one has ended. */
template <int LANES, int NE>
struct page_stats {
  __half *max, *min;            /* (dim) each; NULL: not this row's work */
  struct row_values<NE> old[2]; /* of max and min */

  __device__ void read(const struct rope_params &p, int page, int rank, int slot) {
    using S = split<LANES, NE>;
    int half = p.dim / 2, logical = slot / p.logical_tokens;
    max = p.stats + qtr_cuda_stats_at(p.logical_tokens, p.dim, p.n_retrieval, page, rank, logical, false, 0);
    min = p.stats + qtr_cuda_stats_at(p.logical_tokens, p.dim, p.n_retrieval, page, rank, logical, true, 0);
    bool first = slot % p.logical_tokens == 0;
#pragma unroll
    for (int j = 0; j < NE; j++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        bool there = S::index(j) < half && !first;
        old[0].v[h][j] = there ? __half2float(__ldcg(max + h * half + S::index(j))) : -INFINITY;
        old[1].v[h][j] = there ? __half2float(__ldcg(min + h * half + S::index(j))) : INFINITY;
      }
    }
  }
  __device__ void widen(int half, const struct row_values<NE> &row) const {
    using S = split<LANES, NE>;
#pragma unroll
    for (int j = 0; j < NE; j++) {
      if (S::index(j) >= half) continue;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float x = kv_sane(row.v[h][j]);
        max[h * half + S::index(j)] = __float2half_rn(fmaxf(x, old[0].v[h][j]));
        min[h * half + S::index(j)] = __float2half_rn(fminf(x, old[1].v[h][j]));
      }
    }
  }
};

/* Where the block's token is kept. Tables were uploaded before the step's first kernel: they are read before the kernel
 * before this one has ended, and from the L2 cache, as an SM's L1 may remember the step before. */
struct token_place {
  size_t entry; /* of the page tables */
  int slot;
  bool alone; /* the only new token of its sequence */
};
__device__ static struct token_place token_find(const struct rope_params &p, int token) {
  int seq = __ldcg(p.token_seq + token), first = __ldcg(p.q_start + seq), place = __ldcg(p.kv_len + seq) + token - first;
  return {(size_t)seq * p.max_blocks + place / QTR_PAGE_TOKENS, place % QTR_PAGE_TOKENS,
          __ldcg(p.q_start + seq + 1) - first == 1};
}

/* A lane's row of one pass; x NULL: none. */
struct row_place {
  __half *x;
  uint8_t *block; /* where it is stored, NULL: a row of q */
  bool is_v;
  int page, rank; /* whose statistics it widens; page -1: none */

  __device__ void find(const struct rope_params &p, const struct token_place &at, int token, int row) {
    int n_rows = p.n_heads + 2 * p.n_kv_heads;
    is_v = row >= p.n_heads + p.n_kv_heads;
    block = NULL;
    page = -1;
    rank = is_v ? row - p.n_heads - p.n_kv_heads : row - p.n_heads;
    if (row >= p.n_heads && row < n_rows) { /* in the order of the table, whatever the heads' numbers are */
      struct qtr_cuda_head head = p.head[rank];
      int mine = __ldcg((rank < p.n_retrieval ? p.block_table : p.stream_table) + at.entry);
      block = p.data + (is_v ? head.v : head.k) + (size_t)mine * head.page_bytes;
      row = p.n_heads + (is_v ? p.n_kv_heads : 0) + head.kv_head;
      if (p.stats && !is_v && rank < p.n_retrieval && at.alone) page = mine;
    }
    x = row < n_rows ? p.qkv + ((size_t)token * n_rows + row) * p.dim : NULL;
  }
};

/* A block takes the rows of token blockIdx.x: those of pass blockIdx.y, or with ALL one pass after the other, the last
 * first: what its K and V need of the tables is a chain of loads, begun before the kernel before this one has ended. */
template <int FORMAT, int LANES, int NE, bool ALL>
__global__ static void __launch_bounds__(ROPE_WARPS * 32, 4) k_rope_kv(const struct rope_params p) {
  using S = split<LANES, NE>;
  __shared__ uint8_t bytes[S::whole ? 1 : ROPE_WARPS][MAX_DIM];
  const int warp = threadIdx.x / 32, half = p.dim / 2, token = blockIdx.x, of_pass = ROPE_WARPS * S::rows;
  const int n_rows = p.n_heads + 2 * p.n_kv_heads, mine = warp * S::rows + threadIdx.x % 32 / LANES;
  int first = ALL ? (n_rows - 1) / of_pass * of_pass : blockIdx.y * of_pass;
  struct token_place at = {};
  if (ALL || first + of_pass > p.n_heads) at = token_find(p, token);
  struct row_place place;
  struct page_stats<LANES, NE> stats;
  place.find(p, at, token, first + mine);
  if (!ALL && place.page >= 0) stats.read(p, place.page, place.rank, at.slot);
  qtr_begin();
  float cos[NE], sin[NE];
#pragma unroll
  for (int j = 0; j < NE; j++) {
    int i = S::index(j);
    cos[j] = i < half ? p.cos[(size_t)token * half + i] : 1;
    sin[j] = i < half ? p.sin[(size_t)token * half + i] : 0;
  }
  while (true) {
    struct row_values<NE> row = {};
    if (place.x) row_read<LANES, NE>(place.x, half, &row);
    if (place.x && !place.is_v) row_turn<LANES, NE>(place.x, half, cos, sin, &row);
    if (__any_sync(~0u, place.block != NULL)) {
      row_store<FORMAT, LANES, NE>(p, place.block, place.block != NULL, place.is_v, at.slot, row,
                                   bytes[S::whole ? 0 : warp]);
      if (ALL && place.page >= 0) stats.read(p, place.page, place.rank, at.slot);
      if (place.page >= 0) stats.widen(half, row);
    }
    first -= of_pass;
    if (!ALL || first < 0) break;
    place.find(p, at, token, first + mine);
  }
}

template <int FORMAT, int LANES, int NE>
static cudaError_t launch_split(const struct rope_params &p, int32_t n_tokens, cudaStream_t stream) {
  using S = split<LANES, NE>;
  int of_pass = ROPE_WARPS * S::rows, n_passes = (p.n_heads + 2 * p.n_kv_heads + of_pass - 1) / of_pass;
  if (S::whole && (int64_t)n_tokens * n_passes > FULL_GPU)
    return qtr_launch(k_rope_kv<FORMAT, LANES, NE, S::whole>, dim3((unsigned)n_tokens), ROPE_WARPS * 32, 0, stream, p);
  dim3 grid((unsigned)n_tokens, (unsigned)n_passes);
  return qtr_launch(k_rope_kv<FORMAT, LANES, NE, false>, grid, ROPE_WARPS * 32, 0, stream, p);
}

template <int FORMAT>
static cudaError_t launch(const struct rope_params &p, int32_t n_tokens, cudaStream_t stream) {
  if (p.dim == 64) return launch_split<FORMAT, 8, 4>(p, n_tokens, stream);
  if (p.dim == 128) return launch_split<FORMAT, 16, 4>(p, n_tokens, stream);
  if (p.dim < 64) return launch_split<FORMAT, 32, 1>(p, n_tokens, stream);
  if (p.dim < 128) return launch_split<FORMAT, 32, 2>(p, n_tokens, stream);
  return launch_split<FORMAT, 32, 4>(p, n_tokens, stream);
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
