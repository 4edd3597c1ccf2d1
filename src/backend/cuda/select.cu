/* select.cu - statistics of keys and the choice of pages on the GPU (select.h; spec D.4, D.5).
 *
 * Scores. sum_i max(q_i kmax_i, q_i kmin_i) = sum_i q+_i kmax_i + q-_i kmin_i, with q+ = max(q, 0) and q- = min(q, 0): a
 * plain product of a row of statistics (maxima, then minima) with a vector of twice head_dim, so the FP64 tensor cores do
 * it: eight rows, eight query heads and four elements an instruction, a sum in one order whatever the row. A fragment is the
 * row itself: a lane's 16 bytes are eight steps of its row. A fp16 number becomes a double by moving bits: sign, exponent
 * and fraction at the places of a double's are the number times 2^-1008, subnormals included; q carries 2^1000 in return.
 *
 * Work. A block takes an equal part of the line of tiles (select_plan.h), so it meets a few pairs of event and retrieval
 * head. Whoever adds the last tiles of a pair chooses: a radix select over keys that order as scores do, from the span
 * between the least and the largest, so that one or two levels of 2,048 bins suffice; then compaction by ballots.
 *
 * Bytes: the statistics of the pages before the query's own, once (group <= 8; once more from the L2 for each further eight
 * heads of a group). Operations: of a tile 64 (head_dim 128) instructions of m8n8k4, some 160 to make doubles. */
#include <cuda_fp16.h>

#include "backend/cuda/launch.cuh"
#include "backend/cuda/select.h"
#include "backend/cuda/select_plan.h"

typedef unsigned long long key_t64; /* of a score: larger for larger scores, equal for equal ones */

enum {
  WARPS = 8,
  THREADS = WARPS * 32,
  BLOCKS_PER_SM = 2,
  COLUMNS = 8, /* query heads at once */
  MAX_DIM = 256,
  MAX_CHUNKS = MAX_DIM / 16, /* of 16 bytes, a lane and row */
  BIN_BITS = 11,
  BINS = 1 << BIN_BITS,
  COPIED_KEYS = 8192 /* of a choice from shared memory; longer ones read the L2 each time */
};

/* ---- statistics ---------------------------------------------------------------------------------------------------- */

struct stats_params {
  const __half *qkv; /* (n_tokens, width) */
  __half *stats;
  const int32_t *head, *token_seq, *q_start, *kv_len, *block_table;
  int32_t n_retrieval, n_heads, width, dim, logical_tokens, n_tokens, max_blocks;
};

/* A warp is a token and a retrieval head. The first token of a logical page in this step takes all that the step has of it.
 * NJ: pairs of a lane, head_dim / 64 rounded up. */
template <int NJ>
__global__ static void __launch_bounds__(THREADS) k_stats(struct stats_params p) {
  enum { AHEAD = 8 };
  qtr_begin();
  int token = (int)blockIdx.x * WARPS + (int)threadIdx.x / 32, lane = threadIdx.x % 32, rank = blockIdx.y, pairs = p.dim / 2;
  if (token >= p.n_tokens) return;
  int seq = p.token_seq[token], first = p.q_start[seq], position = p.kv_len[seq] + token - first;
  int within = position % p.logical_tokens;
  if (token != first && within != 0) return;
  int n = min(p.logical_tokens - within, p.q_start[seq + 1] - token);
  int page = p.block_table[(size_t)seq * p.max_blocks + position / QTR_PAGE_TOKENS];
  int logical = position % QTR_PAGE_TOKENS / p.logical_tokens;
  __half2 *at =
      (__half2 *)(p.stats + qtr_cuda_stats_at(p.logical_tokens, p.dim, p.n_retrieval, page, rank, logical, false, 0));
  const __half2 *k = (const __half2 *)(p.qkv + (size_t)token * p.width + (size_t)(p.n_heads + p.head[rank]) * p.dim);
  const __half2 least = __float2half2_rn(-65504.0f), most = __float2half2_rn(65504.0f);
  __half2 mx[NJ], mn[NJ];
#pragma unroll
  for (int j = 0; j < NJ; j++) {
    bool old = within != 0 && lane + 32 * j < pairs;
    mx[j] = old ? at[lane + 32 * j] : least;
    mn[j] = old ? at[pairs + lane + 32 * j] : most;
  }
  int t = 0;
  for (; t + AHEAD <= n; t += AHEAD) {
    __half2 x[AHEAD][NJ];
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
#pragma unroll
      for (int j = 0; j < NJ; j++) {
        x[u][j] = lane + 32 * j < pairs ? k[(size_t)(t + u) * (p.width / 2) + lane + 32 * j] : least;
      }
    }
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
#pragma unroll
      for (int j = 0; j < NJ; j++) {
        __half2 y = __hmin2(__hmax2(x[u][j], least), most); /* NaN: the least */
        mx[j] = __hmax2(mx[j], y);
        mn[j] = __hmin2(mn[j], y);
      }
    }
  }
  for (; t < n; t++) {
#pragma unroll
    for (int j = 0; j < NJ; j++) {
      __half2 x = lane + 32 * j < pairs ? k[(size_t)t * (p.width / 2) + lane + 32 * j] : least;
      x = __hmin2(__hmax2(x, least), most);
      mx[j] = __hmax2(mx[j], x);
      mn[j] = __hmin2(mn[j], x);
    }
  }
#pragma unroll
  for (int j = 0; j < NJ; j++) {
    if (lane + 32 * j >= pairs) continue;
    at[lane + 32 * j] = mx[j];
    at[pairs + lane + 32 * j] = mn[j];
  }
}

cudaError_t qtr_cuda_stats_update(const struct qtr_cuda_stats_args *a, cudaStream_t stream) {
  if (a->n_tokens < 1 || a->n_retrieval < 1) return cudaSuccess;
  if (a->head_dim < 2 || a->head_dim % 2 || a->head_dim > MAX_DIM) return cudaErrorInvalidValue;
  struct stats_params p = {};
  p.qkv = (const __half *)a->qkv;
  p.stats = (__half *)a->stats;
  p.head = a->head;
  p.token_seq = a->token_seq;
  p.q_start = a->q_start;
  p.kv_len = a->kv_len;
  p.block_table = a->block_table;
  p.n_retrieval = a->n_retrieval;
  p.n_heads = a->n_heads;
  p.width = (a->n_heads + 2 * a->n_kv_heads) * a->head_dim;
  p.dim = a->head_dim;
  p.logical_tokens = a->logical_tokens;
  p.n_tokens = a->n_tokens;
  p.max_blocks = a->max_blocks;
  dim3 grid((unsigned)((a->n_tokens + WARPS - 1) / WARPS), (unsigned)a->n_retrieval);
  if (p.dim <= 64) return qtr_launch(k_stats<1>, grid, THREADS, 0, stream, p);
  if (p.dim <= 128) return qtr_launch(k_stats<2>, grid, THREADS, 0, stream, p);
  return qtr_launch(k_stats<4>, grid, THREADS, 0, stream, p);
}

/* ---- scores -------------------------------------------------------------------------------------------------------- */

struct select_params {
  const __half *qkv, *stats;
  const int32_t *head, *block_table;
  int32_t *lists;
  const struct qtr_select_plan *plan;
  uint32_t *counter; /* (events of the wave, n_retrieval) tiles done; zero before and after */
  key_t64 *keys;     /* of event and rank (choosers, n_pages) */
  int32_t n_retrieval, n_kv_heads, group, dim, logical, limit, max_blocks, choosers,
      wave; /* logical: pages in a page, 1, 2, 4 */
};

union block_memory {
  double2 b[MAX_CHUNKS * 4 * 32]; /* (steps / 2, lane) q+ and q- of eight heads, two steps of m8n8k4 a lane */
  struct {
    key_t64 key[COPIED_KEYS];
    int bin[BINS];
  } choice;
};

struct block_shared {
  key_t64 low[WARPS], high[WARPS];
  int sum[WARPS], above[WARPS], tie[WARPS];
  int found_bin, found_above, found_count;
  int last;
};

/* d += a b, with a (8, 4) row = lane / 4, column = lane % 4; b (4, 8) row = lane % 4, column = lane / 4; d (8, 8) row = lane
 * / 4, columns 2 (lane % 4) + {0, 1}. */
__device__ static inline void mma_f64(double d[2], double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(d[0]), "+d"(d[1])
      : "d"(a), "d"(b));
}

/* The high half of a word as a double, times 2^-1008. */
__device__ static inline double high_half(uint32_t x) {
  return __hiloint2double(((int32_t)x >> 6) & (int32_t)0x81fffc00u, 0);
}

__device__ static inline key_t64 key_of(double score) {
  key_t64 bits = (key_t64)__double_as_longlong(score + 0.0); /* -0 is 0 */
  return bits >> 63 ? ~bits : bits | (key_t64)1 << 63;
}

/* Eight elements of row `row` (2 dim halves), from 8 (4 chunk + lane % 4) on; any even dim. */
__device__ static inline uint4 chunk_any(const __half *row, int chunk, int dim) {
  int at = (chunk * 4 + (int)threadIdx.x % 4) * 8;
  const uint32_t *word = (const uint32_t *)(const void *)(row + at);
  return make_uint4(at < 2 * dim ? word[0] : 0, at + 2 < 2 * dim ? word[1] : 0, at + 4 < 2 * dim ? word[2] : 0,
                    at + 6 < 2 * dim ? word[3] : 0);
}

/* The query heads [first, first + 8) of the group as the right-hand operand: q (group, dim). Zeros past the group. */
__device__ static void queries_load(const struct select_params &p, const __half *q, int first, int n_chunks, double2 *b) {
  for (int i = threadIdx.x; i < n_chunks * 32; i += THREADS) {
    int chunk = i / 32, lane = i % 32, head = first + lane / 4, at = (chunk * 4 + lane % 4) * 8;
    double v[8];
#pragma unroll
    for (int e = 0; e < 8; e++) {
      bool is_min = at + e >= p.dim;
      int d = at + e - (is_min ? p.dim : 0);
      float x = head < p.group && d < p.dim ? __half2float(q[(size_t)head * p.dim + d]) : 0.0f;
      if (is_min ? x > 0 : x < 0) x = 0;
      v[e] = (double)x * 0x1p1000;
    }
#pragma unroll
    for (int e = 0; e < 4; e++) b[(chunk * 4 + e) * 32 + lane] = make_double2(v[2 * e], v[2 * e + 1]);
  }
}

__device__ static inline void chunk_multiply(double sum[4][2], uint4 x, const double2 *b) {
  uint32_t word[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int e = 0; e < 4; e++) {
    double2 y = b[e * 32 + threadIdx.x % 32];
    mma_f64(sum[e % 2 * 2], high_half(word[e] << 16), y.x);
    mma_f64(sum[e % 2 * 2 + 1], high_half(word[e]), y.y);
  }
}

/* Sums of a tile become scores of pages, and keys. NaN is the worst. keys (choosers, n_pages) */
__device__ static void tile_store(const struct select_params &p, const struct qtr_select_entry &e, int tile, int first_head,
                                  const double sum[4][2], key_t64 *keys) {
  int lane = threadIdx.x % 32, row = lane / 4, column = first_head + lane % 4 * 2;
  double c[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    c[i] = (sum[0][i] + sum[1][i]) + (sum[2][i] + sum[3][i]);
    if (!(c[i] == c[i]) || column + i >= p.group) c[i] = -INFINITY;
    for (int m = 4; m < 4 * p.logical; m *= 2) {
      double other = __shfl_xor_sync(~0u, c[i], m);
      c[i] = other > c[i] ? other : c[i];
    }
  }
  int page = tile * (QTR_SELECT_ROWS / p.logical) + row / p.logical;
  bool mine = row % p.logical == 0 && page < e.tail;
  if (p.choosers > 1) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (mine && column + i < p.group) keys[(size_t)(column + i) * e.n_pages + page] = key_of(c[i]);
    }
    return;
  }
  double best = c[1] > c[0] ? c[1] : c[0];
#pragma unroll
  for (int m = 1; m < 4; m *= 2) {
    double other = __shfl_xor_sync(~0u, best, m);
    best = other > best ? other : best;
  }
  if (!mine || lane % 4 != 0) return;
  key_t64 key = key_of(best);
  if (first_head > 0) { /* this very lane wrote what is there */
    key_t64 before = __ldcg(&keys[page]);
    key = before > key ? before : key;
  }
  keys[page] = key;
}

/* Tiles [from, to) of a pair, eight query heads. NC: chunks of a lane and row; 0: any head_dim. */
template <int NC>
__device__ static void tiles_score(const struct select_params &p, const struct qtr_select_entry &e, int rank, int from,
                                   int to, const __half *q, int first_head, key_t64 *keys, double2 *b) {
  constexpr int NX = NC ? NC : 1;
  int lane = threadIdx.x % 32, row = lane / 4, pages = QTR_SELECT_ROWS / p.logical;
  int n_chunks = NC ? NC : (2 * p.dim + 31) / 32;
  const int32_t *table = p.block_table + (size_t)e.seq * p.max_blocks;
  auto page_of = [&](int tile) { return table[min(tile * pages + row / p.logical, e.tail - 1)]; };
  auto row_of = [&](int page) {
    return p.stats + (((size_t)page * p.n_retrieval + rank) * p.logical + row % p.logical) * 2 * p.dim;
  };
  auto load = [&](int page, uint4 *x) { /* a row's 64 bytes of a chunk are four lanes' */
                                        const uint4 *at = (const uint4 *)(const void *)row_of(page) + lane % 4;
#pragma unroll
                                        for (int j = 0; j < NC; j++) x[j] = at[j * 4];
  };
  int tile = from + (int)threadIdx.x / 32, page = 0, page_after = 0;
  uint4 next[NX];
  if (tile < to) {
    page = page_of(tile);
    if (NC) load(page, next);
    if (tile + WARPS < to) page_after = page_of(tile + WARPS);
  }
  __syncthreads(); /* nobody reads the memory of what was before */
  queries_load(p, q, first_head, n_chunks, b);
  __syncthreads();
  for (; tile < to; tile += WARPS) {
    double sum[4][2] = {};
    if (NC) {
      uint4 x[NX];
#pragma unroll
      for (int j = 0; j < NX; j++) x[j] = next[j];
      if (tile + WARPS < to) {
        load(page_after, next);
        if (tile + 2 * WARPS < to) page_after = page_of(tile + 2 * WARPS);
      }
#pragma unroll
      for (int j = 0; j < NX; j++) chunk_multiply(sum, x[j], b + j * 128);
    } else {
      const __half *at = row_of(page_of(tile));
      for (int j = 0; j < n_chunks; j++) chunk_multiply(sum, chunk_any(at, j, p.dim), b + j * 128);
    }
    tile_store(p, e, tile, first_head, sum, keys);
  }
}

/* ---- the choice ---------------------------------------------------------------------------------------------------- */

/* The first page and the limit - 2 best others of pages 1 ... tail - 1, tail >= limit. keys: device (tail), written by other
 * blocks as well. All threads of the block. */
__device__ __noinline__ static void choose(const key_t64 *keys, int tail, int limit, int32_t *list,
                                           union block_memory *memory, struct block_shared *s) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  bool copied = tail <= COPIED_KEYS;
  key_t64 *copy = memory->choice.key;
  int *bin = memory->choice.bin;
  auto key = [&](int page) { return copied ? copy[page] : __ldcg(&keys[page]); };
  __syncthreads(); /* nobody reads the memory of what was before */
  key_t64 low = ~(key_t64)0, high = 0;
#pragma unroll 8
  for (int i = threadIdx.x; i < tail; i += THREADS) {
    key_t64 x = __ldcg(&keys[i]);
    if (copied) copy[i] = x;
    if (i > 0) {
      low = x < low ? x : low;
      high = x > high ? x : high;
    }
  }
#pragma unroll
  for (int m = 16; m; m /= 2) {
    key_t64 x = __shfl_xor_sync(~0u, low, m), y = __shfl_xor_sync(~0u, high, m);
    low = x < low ? x : low;
    high = y > high ? y : high;
  }
  if (lane == 0) s->low[warp] = low, s->high[warp] = high;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < WARPS; i++) {
    low = s->low[i] < low ? s->low[i] : low;
    high = s->high[i] > high ? s->high[i] : high;
  }
  /* `need` pages are to come from the keys low ... low + span; all above are chosen. */
  key_t64 span = high - low;
  int need = limit - 2;
  for (;;) {
    int bits = 64 - __clzll((long long)span), shift = bits > BIN_BITS ? bits - BIN_BITS : 0;
    for (int i = threadIdx.x; i < BINS; i += THREADS) bin[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < tail; i += THREADS) {
      key_t64 x = key(i);
      if (i > 0 && x >= low && x - low <= span) atomicAdd(&bin[(x - low) >> shift], 1);
    }
    __syncthreads();
    constexpr int EACH = BINS / THREADS; /* bins of a thread, from the top */
    int top = BINS - 1 - (int)threadIdx.x * EACH, mine = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) mine += bin[top - i];
    int upto = mine;
#pragma unroll
    for (int m = 1; m < 32; m *= 2) {
      int x = __shfl_up_sync(~0u, upto, m);
      if (lane >= m) upto += x;
    }
    if (lane == 31) s->sum[warp] = upto;
    __syncthreads();
    for (int i = 0; i < warp; i++) upto += s->sum[i];
    int above = upto - mine;
    if (above < need && need <= upto) { /* one thread */
      int b = top;
      while (above + bin[b] < need) above += bin[b--];
      s->found_bin = b;
      s->found_above = above;
      s->found_count = bin[b];
    }
    __syncthreads();
    need -= s->found_above;
    low += (key_t64)s->found_bin << shift;
    span = ((key_t64)1 << shift) - 1;
    if (s->found_count == need || shift == 0) break; /* all of the bin, or the earliest of equal keys */
  }
  /* Each warp takes a run of pages: how many it chooses, then where they go. */
  int run = ((tail + WARPS - 1) / WARPS + 31) / 32 * 32, first = warp * run, last = min(tail, first + run);
  int n_above = 0, n_tie = 0;
  for (int i = first; i < last; i += 32) {
    bool there = i + lane < last && i + lane > 0;
    key_t64 x = there ? key(i + lane) : 0;
    bool in = there && x >= low, tie = in && x - low <= span;
    n_above += __popc(__ballot_sync(~0u, in && !tie));
    n_tie += __popc(__ballot_sync(~0u, tie));
  }
  if (lane == 0) s->above[warp] = n_above, s->tie[warp] = n_tie;
  __syncthreads();
  n_above = n_tie = 0;
  for (int i = 0; i < warp; i++) n_above += s->above[i], n_tie += s->tie[i];
  int32_t *page = list + 2; /* struct qtr_selection: n, tail, page[] */
  for (int i = first; i < last; i += 32) {
    bool there = i + lane < last && i + lane > 0;
    key_t64 x = there ? key(i + lane) : 0;
    bool in = there && x >= low, tie = in && x - low <= span;
    unsigned ties = __ballot_sync(~0u, tie), aboves = __ballot_sync(~0u, in && !tie), before = (1u << lane) - 1;
    int tie_at = n_tie + __popc(ties & before), above_at = n_above + __popc(aboves & before);
    if (in && (!tie || tie_at < need)) page[1 + above_at + min(tie_at, need)] = i + lane;
    n_above += __popc(aboves);
    n_tie += __popc(ties);
  }
  if (threadIdx.x == 0) {
    list[0] = limit - 1;
    list[1] = tail;
    page[0] = 0;
  }
}

/* ---- the kernel ---------------------------------------------------------------------------------------------------- */

/* Tiles [from, to) of the pair (event e of the wave, rank); whoever brings the last tiles makes its choices. */
template <int NC>
__device__ static void pair_take(const struct select_params &p, const struct qtr_select_entry &e, int event, int rank,
                                 int from, int to, union block_memory *memory, struct block_shared *s) {
  int head = p.head[rank];
  size_t stride = (size_t)p.limit + 1; /* ints of a struct qtr_selection */
  int32_t *list = p.lists + ((size_t)e.list * p.n_kv_heads + head) * p.choosers * stride;
  if (e.tail < p.limit) { /* all pages */
    for (int i = threadIdx.x; i < p.choosers * (e.tail + 2); i += THREADS) {
      int chooser = i / (e.tail + 2), at = i % (e.tail + 2);
      list[chooser * stride + at] = at < 2 ? e.tail : at - 2;
    }
    return;
  }
  key_t64 *keys = p.keys + ((size_t)e.first_page * p.n_retrieval + (size_t)rank * e.n_pages) * p.choosers;
  const __half *q = p.qkv + (size_t)e.token * (p.group + 2) * p.n_kv_heads * p.dim + (size_t)head * p.group * p.dim;
  for (int i = 0; i < p.group; i += COLUMNS) tiles_score<NC>(p, e, rank, from, to, q, i, keys, memory->b);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t *counter = &p.counter[(size_t)event * p.n_retrieval + rank], n = (uint32_t)(to - from);
    s->last = atomicAdd(counter, n) + n == (uint32_t)e.n_tiles;
    if (s->last) *counter = 0;
    __threadfence();
  }
  __syncthreads();
  if (!s->last) return;
  for (int i = 0; i < p.choosers; i++) {
    choose(keys + (size_t)i * e.n_pages, e.tail, p.limit, list + (size_t)i * stride, memory, s);
  }
}

/* The last event of the wave whose first tile is not behind `at`; all lanes of a warp. */
__device__ static int event_find(const struct qtr_select_entry *entry, int n, int64_t at, int n_retrieval) {
  int low = 0, lane = threadIdx.x % 32; /* it is in [low, low + n) */
  while (n > 1) {
    int step = (n + 31) / 32, i = low + lane * step;
    bool before = lane * step < n && (int64_t)entry[i].first_tile * n_retrieval <= at;
    int lanes = __popc(__ballot_sync(~0u, before)); /* the first ones; lane 0 is always among them */
    low += (lanes - 1) * step;
    n = min(step, n - (lanes - 1) * step);
  }
  return low;
}

template <int NC>
__global__ static void __launch_bounds__(THREADS, BLOCKS_PER_SM) k_select(struct select_params p) {
  extern __shared__ uint4 raw[];
  __shared__ struct block_shared s;
  union block_memory *memory = (union block_memory *)(void *)raw;
  qtr_begin();
  struct qtr_select_wave wave = ((const struct qtr_select_wave *)(p.plan + 1))[p.wave];
  int32_t entry_offset = p.plan->entry_offset; /* of this step, not of the one that was captured */
  int64_t work = (int64_t)wave.n_tiles * p.n_retrieval, at = work * blockIdx.x / gridDim.x,
          end = work * (blockIdx.x + 1) / gridDim.x;
  if (at == end) return;
  const struct qtr_select_entry *entry =
      (const struct qtr_select_entry *)((const char *)p.plan + entry_offset) + wave.first_event;
  int event = event_find(entry, wave.n_events, at, p.n_retrieval);
  while (at < end) {
    struct qtr_select_entry e = entry[event];
    int64_t within = at - (int64_t)e.first_tile * p.n_retrieval;
    int rank = (int)(within / e.n_tiles), from = (int)(within % e.n_tiles), to = e.n_tiles;
    if (end - at < to - from) to = from + (int)(end - at);
    pair_take<NC>(p, e, event, rank, from, to, memory, &s);
    at += to - from;
    if (rank == p.n_retrieval - 1 && to == e.n_tiles) event++;
  }
}

cudaError_t qtr_cuda_select(const struct qtr_cuda_select_config *c, const struct qtr_cuda_select_args *a,
                            const void *host_plan, cudaStream_t stream) {
  const struct qtr_select_plan *plan = (const struct qtr_select_plan *)host_plan;
  if (a->n_retrieval < 1) return cudaSuccess;
  if (c->head_dim < 2 || c->head_dim % 2 || c->head_dim > MAX_DIM || c->group < 1 || c->limit < 3 ||
      (c->logical_tokens != 16 && c->logical_tokens != 32 && c->logical_tokens != 64))
    return cudaErrorInvalidValue;
  struct select_params p = {};
  p.qkv = (const __half *)a->qkv;
  p.stats = (const __half *)a->stats;
  p.head = a->head;
  p.block_table = a->block_table;
  p.lists = a->lists;
  p.plan = (const struct qtr_select_plan *)a->plan;
  p.counter = (uint32_t *)a->scratch;
  p.keys = (key_t64 *)((char *)a->scratch + qtr_cuda_select_counter_bytes(c));
  p.n_retrieval = a->n_retrieval;
  p.n_kv_heads = c->n_kv_heads;
  p.group = c->group;
  p.dim = c->head_dim;
  p.logical = QTR_PAGE_TOKENS / c->logical_tokens;
  p.limit = c->limit;
  p.max_blocks = a->max_blocks;
  p.choosers = c->each_head ? c->group : 1;
  void (*kernel)(struct select_params) = p.dim == 128 ? k_select<8> : p.dim == 64 ? k_select<4> : k_select<0>;
  cudaError_t error = cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           (int)sizeof(union block_memory));
  for (p.wave = 0; p.wave < plan->n_waves && error == cudaSuccess; p.wave++) {
    error = qtr_launch(kernel, (unsigned)(c->n_sms * BLOCKS_PER_SM), THREADS, sizeof(union block_memory), stream, p);
  }
  return error;
}
