/* choose.cu - sampling on the GPU (choose.h; spec E.4): the same operations, in the same order and precision, as
 * engine/sampler.c, so that a row gives the same token on both.
 *
 *   k_best      a block a row: largest logit (lowest id among equals), per-block-of-512 sums of exp((x - best) /
 * temperature) in the sampler's order: eight lanes a block of 512, each adding its 64 weights in double k_draw      a block
 * a row: without top-k and top-p the draw walks block sums, then one block's weights k_candidates (inside k_draw) otherwise
 * the CANDIDATES largest logits, found by a radix descent over the keys of the row, sorted, and the run of top-p ended as in
 * the sampler. A run that needs more is QTR_CHOOSE_UNDECIDED: the host then looks at the row. Log-probabilities come from
 * the same sums at temperature 1. */
#include "backend/cuda/choose.h"

#include "backend/cuda/launch.cuh"
#include "base/philox.h"

#include <cooperative_groups.h>
#include <float.h>

enum {
  THREADS = 512,
  WARPS = THREADS / 32,
  BLOCK = 512,
  LANES = 8,
  CANDIDATES = QTR_CHOOSE_SURE_TOP_K,
  MAX_TOP = 20,
  SHARE = 8 /* blocks of a greedy row */
};
#define GREEDY_TEMPERATURE 1e-5f

/* ---- the sampler's arithmetic, without contraction ----------------------------------------------- */

__device__ static float exp_negative(float x) {
  const float log2e = 0x1.715476p+0f, ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f, shift = 0x1.8p23f;
  if (!(x > -87.0f)) return 0.0f;
  float k = __fadd_rn(__fmul_rn(x, log2e), shift);
  unsigned n = __float_as_uint(k);
  k = __fsub_rn(k, shift);
  float r = __fsub_rn(__fsub_rn(x, __fmul_rn(k, ln2_high)), __fmul_rn(k, ln2_low));
  float p = 1.0f / 5040.0f;
  p = __fadd_rn(__fmul_rn(p, r), 1.0f / 720.0f);
  p = __fadd_rn(__fmul_rn(p, r), 1.0f / 120.0f);
  p = __fadd_rn(__fmul_rn(p, r), 1.0f / 24.0f);
  p = __fadd_rn(__fmul_rn(p, r), 1.0f / 6.0f);
  p = __fadd_rn(__fmul_rn(p, r), 0.5f);
  p = __fadd_rn(__fmul_rn(p, r), 1.0f);
  p = __fadd_rn(__fmul_rn(p, r), 1.0f);
  return __fmul_rn(p, __uint_as_float((n + 127u) << 23));
}

__device__ static float weight_of(float x, float best, float inverse) {
  return exp_negative(__fmul_rn(__fsub_rn(x, best), inverse));
}

__device__ static float clean(float x) { return x > -INFINITY ? (x < FLT_MAX ? x : FLT_MAX) : -INFINITY; }

/* ---- a block's common work ----------------------------------------------------------------------- */

struct best {
  float logit;
  int32_t token;
};
__device__ static best better(best a, best b) {
  if (b.token < 0) return a;
  if (a.token < 0) return b;
  return b.logit > a.logit || (b.logit == a.logit && b.token < a.token) ? b : a;
}

/* Largest cleaned logit of tokens from ... n - 1 of a row, lowest id among equals; token -1: nothing above -inf. The same
 * for all threads. from: a multiple of four. */
__device__ static best row_best(const float *x, int32_t from, int32_t n) {
  __shared__ best part[WARPS];
  best b = {-INFINITY, -1};
  int32_t whole = (size_t)x % 16 == 0 ? n / 4 : 0; /* fours: one block has to read it all, so few long loads, many at once */
#pragma unroll 8
  for (int32_t i = from / 4 + (int32_t)threadIdx.x; i < whole; i += THREADS) {
    const float4 four = reinterpret_cast<const float4 *>(x)[i];
    const float value[4] = {clean(four.x), clean(four.y), clean(four.z), clean(four.w)};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (value[j] > b.logit) b = {value[j], 4 * i + j}; /* ascending ids: the first of equals stays */
    }
  }
  for (int32_t i = max(from, 4 * whole) + (int32_t)threadIdx.x; i < n; i += THREADS) {
    float v = clean(x[i]);
    if (v > b.logit) b = {v, i};
  }
  for (int i = 16; i > 0; i /= 2) {
    best other = {__shfl_xor_sync(0xffffffffu, b.logit, i), __shfl_xor_sync(0xffffffffu, b.token, i)};
    b = better(b, other);
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = b;
  __syncthreads();
  b = part[0];
  for (int i = 1; i < WARPS; i++) b = better(b, part[i]);
  return b;
}

/* sums[k] of each block of 512 tokens: weights below `least` count as 0. Ends with all threads past it. */
__device__ static void row_sums(const float *x, int32_t n, float top, float inverse, float least, double *sums) {
  int32_t n_blocks = (n + BLOCK - 1) / BLOCK;
  int lane = threadIdx.x % LANES;
  for (int32_t k = threadIdx.x / LANES; k < (n_blocks + THREADS / LANES - 1) / (THREADS / LANES) * (THREADS / LANES);
       k += THREADS / LANES) {
    double sum = 0;
    int32_t at = k * BLOCK, count = min(BLOCK, n - at), whole = count / LANES * LANES;
    for (int32_t i = lane; i < whole; i += LANES) {
      float w = weight_of(clean(x[at + i]), top, inverse);
      sum += (double)(w >= least ? w : 0.0f);
    }
    if (lane == 0) {
      for (int32_t i = max(whole, 0); i < count; i++) {
        float w = weight_of(clean(x[at + i]), top, inverse);
        sum += (double)(w >= least ? w : 0.0f);
      }
    }
    for (int j = 1; j < LANES; j++) { /* lane 0 adds the others in order */
      double other = __shfl_sync(0xffffffffu, sum, (threadIdx.x % 32) / LANES * LANES + j);
      if (lane == 0) sum += other;
    }
    if (lane == 0 && k < n_blocks) sums[k] = sum;
  }
  __syncthreads();
}

__device__ static double total_of(const double *sums, int32_t n_blocks) {
  double total = 0;
  for (int32_t k = 0; k < n_blocks; k++) total += sums[k];
  return total;
}

/* ---- candidates ---------------------------------------------------------------------------------- */

/* A logit as an unsigned key of the same order; the smallest for -inf and NaN. */
__device__ static uint32_t key_of(float x) {
  uint32_t u = __float_as_uint(clean(x) + 0.0f); /* -0 becomes 0: they are equal */
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

/* The `want` (<= CANDIDATES) first tokens of a row by logit, then id, sorted into list[0 ... returned). All threads get the
 * count. Keys are narrowed from the top, 8 bits at a time, to the threshold that holds `want`; of tokens equal to it the
 * lowest ids are taken. */
__device__ static int32_t row_candidates(const float *x, int32_t n, int32_t want, uint64_t *list) {
  __shared__ int32_t count[256];
  __shared__ uint32_t prefix;
  __shared__ int32_t left, n_above, n_equal;
  if (threadIdx.x == 0) {
    prefix = 0;
    left = want;
  }
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += THREADS) count[i] = 0;
    __syncthreads();
    uint32_t mask = shift == 24 ? 0 : 0xffffffffu << (shift + 8), fixed = prefix;
    for (int32_t i = threadIdx.x; i < n; i += THREADS) {
      uint32_t key = key_of(x[i]);
      if ((key & mask) == fixed && x[i] > -INFINITY) atomicAdd(&count[key >> shift & 255u], 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int digit = 255;
      while (digit > 0 && count[digit] < left) left -= count[digit--];
      prefix |= (uint32_t)digit << shift;
    }
    __syncthreads();
  }
  /* Above the threshold all; equal to it `left`, or as many as there are, lowest ids first. */
  uint32_t threshold = prefix;
  int32_t n_want_equal = left;
  if (threadIdx.x == 0) n_above = n_equal = 0;
  __syncthreads();
  for (int32_t i = threadIdx.x; i < n; i += THREADS) {
    uint32_t key = key_of(x[i]);
    if (key > threshold && x[i] > -INFINITY) {
      int32_t at = atomicAdd(&n_above, 1);
      if (at < CANDIDATES) list[at] = (uint64_t)key << 32 | (0xffffffffu - (uint32_t)i);
    }
  }
  __syncthreads();
  int32_t above = min(n_above, (int32_t)CANDIDATES);
  for (int32_t base = 0; base < n && n_equal < n_want_equal; base += THREADS) { /* in order of ids */
    int32_t i = base + threadIdx.x;
    bool equal = i < n && key_of(x[i]) == threshold && x[i] > -INFINITY;
    __shared__ uint32_t bits[WARPS];
    uint32_t mine = __ballot_sync(0xffffffffu, equal);
    if (threadIdx.x % 32 == 0) bits[threadIdx.x / 32] = mine;
    __syncthreads();
    int32_t before = n_equal;
    for (unsigned w = 0; w < threadIdx.x / 32; w++) before += __popc(bits[w]);
    before += __popc(mine & ((1u << (threadIdx.x % 32)) - 1u));
    if (equal && before < n_want_equal && above + before < CANDIDATES) {
      list[above + before] = (uint64_t)threshold << 32 | (0xffffffffu - (uint32_t)i);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 0; w < WARPS; w++) n_equal += __popc(bits[w]);
    }
    __syncthreads();
  }
  int32_t held = min(above + min(n_equal, n_want_equal), (int32_t)CANDIDATES);
  __syncthreads();
  for (int32_t i = held + threadIdx.x; i < CANDIDATES; i += THREADS) list[i] = 0;
  __syncthreads();
  for (int size = 2; size <= CANDIDATES; size *= 2) { /* bitonic, descending */
    for (int stride = size / 2; stride > 0; stride /= 2) {
      for (int i = threadIdx.x; i < CANDIDATES; i += THREADS) {
        int j = i ^ stride;
        if (j > i) {
          uint64_t a = list[i], b = list[j];
          bool descending = (i & size) == 0;
          if (descending ? a < b : a > b) {
            list[i] = b;
            list[j] = a;
          }
        }
      }
      __syncthreads();
    }
  }
  return held;
}

__device__ static int32_t token_of(uint64_t c) { return (int32_t)(0xffffffffu - (uint32_t)c); }

/* ---- the kernel ---------------------------------------------------------------------------------- */

/* Walks block sums, then one block's weights, to unit * total. */
__device__ static int32_t draw(const float *x, int32_t n, float top, float inverse, float least, const double *sums,
                               double total, double unit) {
  double target = unit * total, at = 0;
  int32_t block = 0, last = 0, n_blocks = (n + BLOCK - 1) / BLOCK;
  while (block < n_blocks - 1 && at + sums[block] <= target) at += sums[block++];
  while (block > 0 && !(sums[block] > 0)) block--;
  for (int32_t i = block * BLOCK, end = min(i + (int32_t)BLOCK, n); i < end; i++) {
    float w = weight_of(clean(x[i]), top, inverse);
    if (!(w >= least) || !(w > 0)) continue;
    last = i;
    at += (double)w;
    if (at > target) return i;
  }
  return last;
}

/* top-k, top-p and min-p over sorted candidates; -2 when the run may go on behind them. Thread 0 only. */
__device__ static int32_t draw_sorted(const float *x, const qtr_choose_row *p, float top, float inverse, bool some,
                                      double sum, const uint64_t *list, int32_t held, int32_t n, double unit) {
  if (some) {
    for (int32_t i = 0; i < held; i++) sum += (double)weight_of(clean(x[token_of(list[i])]), top, inverse);
  }
  double wanted = p->top_p < 1 ? (double)p->top_p * sum : INFINITY, kept = 0;
  int32_t run = 0;
  for (; run < held && (run == 0 || kept < wanted); run++) {
    float w = weight_of(clean(x[token_of(list[run])]), top, inverse);
    if (run > 0 && w < p->min_p) break;
    kept += (double)w;
  }
  if (!some && run == held && held < n && kept < wanted) return QTR_CHOOSE_UNDECIDED;
  double target = unit * kept, at = 0;
  for (int32_t i = 0; i < run; i++) {
    at += (double)weight_of(clean(x[token_of(list[i])]), top, inverse);
    if (at > target) return token_of(list[i]);
  }
  return token_of(list[run - 1]);
}

/* A logit with bias and penalties, as the sampler computes it. */
__device__ static float adjusted(float x, const qtr_choose_row &p, const qtr_choose_adjust &a) {
  x = __fadd_rn(clean(x), a.bias);
  if (a.count < 0) return x;
  x = x > 0 ? __fdiv_rn(x, p.repetition_penalty) : __fmul_rn(x, p.repetition_penalty);
  if (a.count > 0) x = __fsub_rn(x, __fadd_rn(p.presence_penalty, __fmul_rn(p.frequency_penalty, (float)a.count)));
  return clean(x);
}

__global__ void __launch_bounds__(THREADS) k_choose(float *logits, const qtr_choose_row *rows, qtr_choose_result *results,
                                                    int32_t n, qtr_cuda_adjust adjust, double *scratch) {
  qtr_begin();
  __shared__ uint64_t list[CANDIDATES];
  __shared__ int32_t token;
  const qtr_choose_row p = rows[blockIdx.x];
  qtr_choose_result *r = &results[blockIdx.x];
  float *x = logits + blockIdx.x * (size_t)n;
  double *sums = scratch + blockIdx.x * (size_t)((n + BLOCK - 1) / BLOCK);
  int32_t n_blocks = (n + BLOCK - 1) / BLOCK;
  if (p.skip) {
    if (threadIdx.x == 0) {
      r->token = QTR_CHOOSE_UNDECIDED;
      r->n_top = 0;
    }
    return;
  }
  int32_t pending = p.pending ? adjust.known[adjust.logit_row[blockIdx.x]] : -1;
  bool counted = pending < 0; /* the pending token has its place among the adjustments */
  for (int32_t i = threadIdx.x; i < p.n_adjust; i += THREADS) {
    qtr_choose_adjust a = adjust.adjust[p.first_adjust + i];
    if (a.token == pending) {
      a.count = max(a.count, 0) + 1;
      counted = true;
    }
    float was = x[a.token];
    adjust.original[p.first_adjust + i] = was;
    x[a.token] = adjusted(was, p, a);
  }
  counted = __syncthreads_or(counted);
  float was_pending = 0;
  if (!counted && threadIdx.x == 0) {
    was_pending = x[pending];
    x[pending] = adjusted(was_pending, p, {pending, 1, 0});
  }
  __syncthreads();
  best b = row_best(x, 0, n);
  bool greedy = p.temperature < GREEDY_TEMPERATURE || p.top_k == 1;
  if (threadIdx.x == 0) token = b.token;
  if (b.token >= 0 && !greedy) {
    bool some = p.top_k > 0 && p.top_k < n;
    float inverse = 1.0f / p.temperature;
    double unit = qtr_philox_unit(p.seed, p.position);
    if (some && p.top_k > CANDIDATES) {
      if (threadIdx.x == 0) token = QTR_CHOOSE_UNDECIDED;
    } else if (!some && p.top_p >= 1) {
      row_sums(x, n, b.logit, inverse, p.min_p, sums);
      if (threadIdx.x == 0) token = draw(x, n, b.logit, inverse, p.min_p, sums, total_of(sums, n_blocks), unit);
    } else {
      if (!some) row_sums(x, n, b.logit, inverse, 0, sums);
      int32_t held = row_candidates(x, n, some ? p.top_k : CANDIDATES, list);
      if (threadIdx.x == 0) {
        token = draw_sorted(x, &p, b.logit, inverse, some, some ? 0 : total_of(sums, n_blocks), list, held, n, unit);
      }
    }
  }
  __syncthreads();
  if (p.n_adjust > 0 || !counted) { /* log-probabilities are of the untouched row, and so may the host's look be */
    for (int32_t i = threadIdx.x; i < p.n_adjust; i += THREADS) {
      x[adjust.adjust[p.first_adjust + i].token] = adjust.original[p.first_adjust + i];
    }
    if (!counted && threadIdx.x == 0) x[pending] = was_pending;
    __syncthreads();
    best untouched = row_best(x, 0, n);
    if (b.token >= 0) b = untouched;
  }
  if (threadIdx.x == 0) {
    r->token = token;
    r->n_top = 0;
    r->best = b.logit;
  }
  if (b.token < 0 || token < 0 || p.n_top < 0) return;
  row_sums(x, n, b.logit, 1.0f, 0, sums);
  int32_t held = p.n_top > 0 ? row_candidates(x, n, min(p.n_top, (int32_t)MAX_TOP), list) : 0;
  if (threadIdx.x == 0) {
    r->exp_sum = total_of(sums, n_blocks);
    r->logit = clean(x[token]);
    r->n_top = held;
    for (int32_t i = 0; i < held; i++) {
      r->top_token[i] = token_of(list[i]);
      r->top_logit[i] = clean(x[token_of(list[i])]);
    }
  }
}

/* A row takes a block or, where rows are few, a cluster of BLOCKS. */
template <int BLOCKS>
__global__ void __launch_bounds__(THREADS)
    k_choose_greedy(const float *logits, const qtr_choose_row *rows, qtr_choose_result *results, int32_t n) {
  qtr_begin();
  const int32_t row = (int32_t)blockIdx.x / BLOCKS, part = (int32_t)blockIdx.x % BLOCKS;
  const int32_t each = (n + 4 * BLOCKS - 1) / (4 * BLOCKS) * 4, from = part * each;
  best b = {-INFINITY, QTR_CHOOSE_UNDECIDED};
  if (!rows[row].skip) b = row_best(logits + row * (size_t)n, from, min(n, from + each));
#if defined __CUDA_ARCH__ && __CUDA_ARCH__ >= 900
  if (BLOCKS > 1) {
    __shared__ best of[BLOCKS]; /* the first block's: what each found */
    cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
    cluster.sync(); /* all blocks have begun */
    if (threadIdx.x == 0) cluster.map_shared_rank(of, 0)[part] = b;
    cluster.sync();
    if (part > 0) return;
    for (int i = 1; i < BLOCKS; i++) b = better(b, of[i]);
  }
#endif
  if (threadIdx.x == 0) {
    results[row].token = b.token;
    results[row].n_top = 0;
    results[row].best = b.logit;
  }
}

size_t qtr_cuda_choose_scratch_bytes(size_t n_rows, size_t vocab_size) {
  return n_rows * ((vocab_size + BLOCK - 1) / BLOCK) * sizeof(double);
}

cudaError_t qtr_cuda_rows_choose(float *logits, const qtr_choose_row *row, qtr_choose_result *result, size_t n_rows,
                                 size_t vocab_size, bool drawing, const qtr_cuda_adjust *adjust, void *scratch,
                                 cudaStream_t stream) {
  if (n_rows == 0) return cudaSuccess;
  if (!drawing && n_rows <= 16 && qtr_overlap_possible())
    return qtr_launch_with(true, SHARE, k_choose_greedy<SHARE>, (unsigned)n_rows * SHARE, THREADS, 0, stream, logits, row,
                           result, (int32_t)vocab_size);
  if (!drawing)
    return qtr_launch(k_choose_greedy<1>, (unsigned)n_rows, THREADS, 0, stream, logits, row, result, (int32_t)vocab_size);
  return qtr_launch(k_choose, (unsigned)n_rows, THREADS, 0, stream, logits, row, result, (int32_t)vocab_size, *adjust,
                    (double *)scratch);
}
