/* select.cu - statistics of keys and the choice of pages on the GPU (select.h; spec D.4, D.5).
 *
 * Scores. sum_i max(q_i kmax_i, q_i kmin_i) = sum_i q+_i kmax_i + q-_i kmin_i, with q+ = max(q, 0) and q- = min(q, 0): a
 * plain product of a row of statistics (maxima, then minima) with a vector of twice head_dim, so the FP64 tensor cores do
 * it: sixteen rows, eight query heads and sixteen elements an instruction, a sum in one order whatever the row. A fragment
 * is the row itself: a lane's 16 bytes are eight steps of its row. A fp16 number becomes a double by moving bits: sign,
 * exponent and fraction at the places of a double's are the number times 2^-1008, subnormals included; q carries 2^1000 in
 * return.
 *
 * Work. A block takes an equal part of the line of tiles (select_plan.h), so it meets a few pairs of event and retrieval
 * head. Statistics come through a ring in shared memory, 8 KiB a warp; every lane reads only what it has copied itself, so
 * that nobody waits for anybody. Whoever adds the last tiles of a pair chooses: a radix select over keys that order as
 * scores do, from the span between the least and the largest: one level of 2,048 bins, then the few of the last bin
 * compared with each other; a bit a page says what is chosen, and a sum over words of 32 pages where it goes.
 *
 * What was uploaded with the batch is read before the kernel before has ended, and statistics are called into the L2, where
 * it does no harm if that kernel still writes some of them. Such loads bypass the L1.
 *
 * Bytes: the statistics of the pages before the query's own, once (group <= 8; once more from the L2 for each further eight
 * heads of a group). Operations: of a tile 16 (head_dim 128) instructions of m16n8k16, some 320 to make doubles. */
#include <cuda_fp16.h>

#include "backend/cuda/launch.cuh"
#include "backend/cuda/ptx.cuh"
#include "backend/cuda/select.h"
#include "backend/cuda/select_plan.h"

typedef unsigned long long key_t64; /* of a score: larger for larger scores, equal for equal ones */

enum {
  WARPS = 8,
  THREADS = WARPS * 32,
  BLOCKS_PER_SM = 2,
  COLUMNS = 8, /* query heads at once */
  MAX_DIM = 256,
  MAX_CHUNKS = MAX_DIM / 16,             /* of 16 bytes, a lane and row */
  PART = 2,                              /* chunks of a row that are copied at once, 128 bytes */
  STAGES = 4,                            /* of a warp's ring, a part of a tile each */
  RING = WARPS * STAGES * PART * 2 * 32, /* of 16 bytes */
  BIN_BITS = 11,
  BINS = 1 << BIN_BITS,
  CANDIDATES = 64,    /* so many are compared with each other */
  COPIED_KEYS = 8192, /* of a choice from shared memory; longer ones read the L2 each time */
  SPAN = THREADS * 32 /* pages whose bits are summed at once */
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
  int32_t n_retrieval, n_kv_heads, group, dim, limit, max_blocks, choosers, wave;
  int32_t logical, logical_bits; /* pages in a page, 1, 2, 4, and its logarithm */
};

/* Dynamic shared memory, of scores and then of a choice. */
struct score_memory {             /* of any head_dim but 64 and 128: b alone */
  uint4 ring[RING];               /* (warp, stage, chunk, row / 8, lane) */
  double2 b[MAX_CHUNKS * 4 * 32]; /* (chunk, steps / 2, lane) q+ and q- of eight heads, two steps of four columns a lane; as
                                     many chunks as there are */
};
struct choice_memory {
  key_t64 key[COPIED_KEYS];
  int bin[BINS];
  uint32_t mask[SPAN / 32];
  key_t64 value[CANDIDATES];
  int page[CANDIDATES];
};

static size_t shared_bytes(int dim) {
  size_t scores = (size_t)((2 * dim + 31) / 32) * 4 * 32 * sizeof(double2);
  if (dim == 64 || dim == 128) scores += sizeof(uint4) * RING;
  return scores > sizeof(struct choice_memory) ? scores : sizeof(struct choice_memory);
}

struct block_shared {
  key_t64 low[WARPS], high[WARPS], found_value;
  int sum[WARPS];
  int found_page, found_bin, found_above, found_count, n_candidates;
  int last;
};

/* d += a b, four steps of four columns: a (16, 16): row = lane / 4 + 8 (i % 2), column = 4 (i / 2) + lane % 4; b (16, 8):
 * row = 4 i + lane % 4, column = lane / 4; d (16, 8): row = lane / 4 + 8 (i / 2), column = 2 (lane % 4) + i % 2. */
__device__ static inline void mma_f64(double d[4], const double a[8], double2 b0, double2 b1) {
#if defined __CUDA_ARCH__ && __CUDA_ARCH__ >= 900
  asm("mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7, %8, %9, %10, %11}, {%12, %13, "
      "%14, %15}, {%0, %1, %2, %3};"
      : "+d"(d[0]), "+d"(d[1]), "+d"(d[2]), "+d"(d[3])
      : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(a[4]), "d"(a[5]), "d"(a[6]), "d"(a[7]), "d"(b0.x), "d"(b0.y),
        "d"(b1.x), "d"(b1.y));
#else
  double b[4] = {b0.x, b0.y, b1.x, b1.y};
#pragma unroll
  for (int i = 0; i < 8; i++) {
    asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+d"(d[i % 2 * 2]), "+d"(d[i % 2 * 2 + 1])
        : "d"(a[i]), "d"(b[i / 2]));
  }
#endif
}

/* What comes before is seen by whoever sees what comes after; of the whole block, next to a barrier. */
__device__ static inline void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

/* The high half of a word as a double, times 2^-1008. */
__device__ static inline double high_half(uint32_t x) {
  return __hiloint2double(((int32_t)x >> 6) & (int32_t)0x81fffc00u, 0);
}

/* Never 0. */
__device__ static inline key_t64 key_of(double score) {
  key_t64 bits = (key_t64)__double_as_longlong(score + 0.0); /* -0 is 0 */
  return bits >> 63 ? ~bits : bits | (key_t64)1 << 63;
}

/* Eight elements of row `row` (2 dim halves), from 8 (4 chunk + lane % 4) on; any even dim. */
__device__ static inline uint4 chunk_any(const __half *row, int chunk, int dim) {
  int at = (chunk * 4 + (int)threadIdx.x % 4) * 8;
  const uint32_t *word = (const uint32_t *)(const void *)(row + at);
  return make_uint4(at < 2 * dim ? __ldcg(word) : 0, at + 2 < 2 * dim ? __ldcg(word + 1) : 0,
                    at + 4 < 2 * dim ? __ldcg(word + 2) : 0, at + 6 < 2 * dim ? __ldcg(word + 3) : 0);
}

/* The query heads [first, first + 8) of the group as the right-hand operand: q (group, dim). Zeros past the group. */
template <int NC>
__device__ static void queries_load(const struct select_params &p, const __half *q, int first, double2 *b) {
  int n_chunks = NC ? NC : (2 * p.dim + 31) / 32;
  for (int i = threadIdx.x; i < n_chunks * 32; i += THREADS) {
    int chunk = i / 32, lane = i % 32, head = first + lane / 4, at = (chunk * 4 + lane % 4) * 8;
    union {
      uint4 all;
      __half one[8];
    } x = {make_uint4(0, 0, 0, 0)};
    if constexpr (NC > 0) {
      if (head < p.group) x.all = __ldcg((const uint4 *)(const void *)(q + (size_t)head * (NC * 16) + at % (NC * 16)));
    } else {
#pragma unroll
      for (int e = 0; e < 8; e++) {
        int d = at + e - (at + e >= p.dim ? p.dim : 0);
        if (head < p.group && d < p.dim) x.one[e] = __ldcg(q + (size_t)head * p.dim + d);
      }
    }
    double v[8];
#pragma unroll
    for (int e = 0; e < 8; e++) {
      float y = __half2float(x.one[e]);
      if (at + e >= p.dim ? y > 0 : y < 0) y = 0;
      v[e] = (double)y * 0x1p1000;
    }
#pragma unroll
    for (int e = 0; e < 4; e++) b[(chunk * 4 + e) * 32 + lane] = make_double2(v[2 * e], v[2 * e + 1]);
  }
}

/* x, y: eight elements of row lane / 4 and of the row eight further on. */
__device__ static inline void chunk_multiply(double sum[2][4], uint4 x, uint4 y, const double2 *b) {
  uint32_t upper[4] = {x.x, x.y, x.z, x.w}, lower[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
  for (int e = 0; e < 2; e++) {
    double a[8];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      a[4 * i] = high_half(upper[2 * e + i] << 16), a[4 * i + 1] = high_half(lower[2 * e + i] << 16);
      a[4 * i + 2] = high_half(upper[2 * e + i]), a[4 * i + 3] = high_half(lower[2 * e + i]);
    }
    mma_f64(sum[e], a, b[2 * e * 32 + threadIdx.x % 32], b[(2 * e + 1) * 32 + threadIdx.x % 32]);
  }
}

/* Sums of a tile become scores of pages, and keys. NaN is the worst. keys (choosers, n_pages) */
__device__ static void tile_store(const struct select_params &p, const struct qtr_select_entry &e, int tile, int first_head,
                                  const double sum[2][4], key_t64 *keys) {
  int lane = threadIdx.x % 32, row = lane / 4, column = first_head + lane % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    double c[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      c[i] = sum[0][2 * h + i] + sum[1][2 * h + i];
      if (!(c[i] == c[i]) || column + i >= p.group) c[i] = -INFINITY;
#pragma unroll
      for (int k = 0; k < 2; k++) {
        double other = __shfl_xor_sync(~0u, c[i], 4 << k);
        c[i] = k < p.logical_bits && other > c[i] ? other : c[i];
      }
    }
    int page = (tile * QTR_SELECT_ROWS + 8 * h + row) >> p.logical_bits;
    bool mine = (row & (p.logical - 1)) == 0; /* there is room for pages past the tail */
    if (p.choosers > 1) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (mine && column + i < p.group) keys[(size_t)(column + i) * e.n_pages + page] = key_of(c[i]);
      }
      continue;
    }
    double best = c[1] > c[0] ? c[1] : c[0];
#pragma unroll
    for (int m = 1; m < 4; m *= 2) {
      double other = __shfl_xor_sync(~0u, best, m);
      best = other > best ? other : best;
    }
    if (!mine || lane % 4 != 0) continue;
    key_t64 key = key_of(best);
    if (first_head > 0) { /* this very lane wrote what is there */
      key_t64 before = __ldcg(&keys[page]);
      key = before > key ? before : key;
    }
    keys[page] = key;
  }
}

/* Physical pages of a lane's two rows, of a warp's first two tiles. */
struct first_pages {
  int of[2][2];
};

__device__ static inline int page_of(const struct select_params &p, const struct qtr_select_entry &e, int tile, int h) {
  int page = (tile * QTR_SELECT_ROWS + 8 * h + (int)threadIdx.x % 32 / 4) >> p.logical_bits;
  return __ldcg(p.block_table + (size_t)e.seq * p.max_blocks + min(page, e.tail - 1));
}

__device__ static struct first_pages first_pages_load(const struct select_params &p, const struct qtr_select_entry &e,
                                                      int from, int to) {
  struct first_pages x = {};
  int tile = from + (int)threadIdx.x / 32;
#pragma unroll
  for (int u = 0; u < 2; u++) {
    if (tile + u * WARPS < to)
      x.of[u][0] = page_of(p, e, tile + u * WARPS, 0), x.of[u][1] = page_of(p, e, tile + u * WARPS, 1);
  }
  return x;
}

/* Calls the statistics of a warp's first two tiles into the L2, a line a lane at a time. */
template <int NC>
__device__ static void first_pages_prefetch(const struct select_params &p, int rank, int from, int to,
                                            const struct first_pages &first) {
  enum { ROW_BYTES = NC * 64, LINES = ROW_BYTES / 128, ROWS = 32 / LINES }; /* rows at a time */
  int lane = threadIdx.x % 32, tile = from + (int)threadIdx.x / 32;
#pragma unroll
  for (int u = 0; u < 2; u++) {
    if (tile + u * WARPS >= to) break;
#pragma unroll
    for (int r = 0; r < QTR_SELECT_ROWS; r += ROWS) {
      int row = r + lane / LINES, page = __shfl_sync(~0u, first.of[u][r / 8], row % 8 * 4);
      if (ROWS > 8) {
        int other = __shfl_sync(~0u, first.of[u][1], row % 8 * 4);
        page = row < 8 ? page : other;
      }
      const char *at =
          (const char *)(p.stats +
                         (((size_t)page * p.n_retrieval + rank) * p.logical + (row & (p.logical - 1))) * (ROW_BYTES / 2));
      asm volatile("prefetch.global.L2 [%0];" ::"l"(at + lane % LINES * 128));
    }
  }
}

/* Tiles [from, to) of a pair, eight query heads. NC: chunks of a lane and row; 0: any head_dim. */
template <int NC>
__device__ static void tiles_score(const struct select_params &p, const struct qtr_select_entry &e, int rank, int from,
                                   int to, const struct first_pages &first, const __half *q, int first_head, key_t64 *keys,
                                   void *memory) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, tile = from + warp;
  auto row_of = [&](int page) {
    return p.stats +
           (((size_t)page * p.n_retrieval + rank) * p.logical + (row & (p.logical - 1))) * 2 * (NC ? NC * 16 : p.dim);
  };
  __syncthreads(); /* nobody reads the memory of what was before */
  if constexpr (NC > 0) {
    constexpr int PARTS = NC / PART, AHEAD = STAGES / PARTS; /* of a tile; tiles */
    static_assert(AHEAD == 1 || AHEAD == 2, "first_pages knows two tiles");
    struct score_memory *m = (struct score_memory *)memory;
    uint4 *ring = m->ring + warp * (STAGES * PART * 2 * 32) + lane;
    auto issue = [&](const __half *upper, const __half *lower, int part,
                     int stage) { /* a row's 64 bytes are four lanes' */
                                  uint4 *to_here = ring + stage * (PART * 2 * 32);
#pragma unroll
                                  for (int j = 0; j < PART; j++) {
                                    int at = ((part * PART + j) * 4 + lane % 4) * 8;
                                    copy16(shared_address(to_here + (2 * j) * 32), upper + at);
                                    copy16(shared_address(to_here + (2 * j + 1) * 32), lower + at);
                                  }
    };
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      const __half *upper = row_of(first.of[u][0]), *lower = row_of(first.of[u][1]);
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        if (tile + u * WARPS < to) issue(upper, lower, part, u * PARTS + part);
        copy_commit();
      }
    }
    int page[2] = {first.of[1][0], first.of[1][1]}; /* of tile + AHEAD * WARPS */
    if (AHEAD > 1 && tile + AHEAD * WARPS < to) {
      page[0] = page_of(p, e, tile + AHEAD * WARPS, 0), page[1] = page_of(p, e, tile + AHEAD * WARPS, 1);
    }
    queries_load<NC>(p, q, first_head, m->b);
    __syncthreads();
    for (int u = 0; tile < to; tile += WARPS, u = (u + 1) % AHEAD) {
      double sum[2][4] = {};
      const __half *upper = row_of(page[0]), *lower = row_of(page[1]);
      bool more = tile + AHEAD * WARPS < to;
      if (tile + (AHEAD + 1) * WARPS < to) {
        page[0] = page_of(p, e, tile + (AHEAD + 1) * WARPS, 0), page[1] = page_of(p, e, tile + (AHEAD + 1) * WARPS, 1);
      }
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        int stage = u * PARTS + part;
        copy_wait<STAGES - 1>();
        const uint4 *x = ring + stage * (PART * 2 * 32);
#pragma unroll
        for (int j = 0; j < PART; j++) {
          chunk_multiply(sum, x[2 * j * 32], x[(2 * j + 1) * 32], m->b + (part * PART + j) * 128);
        }
        if (more) issue(upper, lower, part, stage);
        copy_commit();
      }
      tile_store(p, e, tile, first_head, sum, keys);
    }
  } else {
    double2 *b = (double2 *)memory;
    queries_load<0>(p, q, first_head, b);
    __syncthreads();
    for (; tile < to; tile += WARPS) {
      double sum[2][4] = {};
      const __half *upper = row_of(page_of(p, e, tile, 0)), *lower = row_of(page_of(p, e, tile, 1));
      for (int j = 0; j < (2 * p.dim + 31) / 32; j++) {
        chunk_multiply(sum, chunk_any(upper, j, p.dim), chunk_any(lower, j, p.dim), b + j * 128);
      }
      tile_store(p, e, tile, first_head, sum, keys);
    }
  }
}

/* ---- the choice ---------------------------------------------------------------------------------------------------- */

/* Of the block: the sum of x of the threads up to and with this one. Between two calls lies a barrier. */
__device__ static inline int sum_upto(int x, struct block_shared *s) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 1; m < 32; m *= 2) {
    int y = __shfl_up_sync(~0u, x, m);
    if (lane >= m) x += y;
  }
  if (lane == 31) s->sum[warp] = x;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < WARPS - 1; i++) x += i < warp ? s->sum[i] : 0;
  return x;
}

/* Calls f(page, key) for the pages [from, to) and for some behind them; all threads of the block do so equally often. The
 * key of page 0 is 0, and so are those behind. COPIED: they lie in shared memory. */
template <bool COPIED, class F>
__device__ static inline void keys_visit(const key_t64 *keys, const key_t64 *copy, int from, int to, F f) {
  constexpr int AT_ONCE = COPIED ? 4 : 8;
#pragma unroll 1
  for (int first = from + (int)threadIdx.x; first - (int)threadIdx.x < to; first += AT_ONCE * THREADS) {
    key_t64 x[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      int page = first + u * THREADS;
      x[u] = page < to && page > 0 ? COPIED ? copy[page] : __ldcg(&keys[page]) : 0;
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) f(first + u * THREADS, x[u]);
  }
}

/* The first page and the limit - 2 best others of pages 1 ... tail - 1, tail >= limit. keys: device, tail of them and one
 * more if that is odd, written by other blocks as well. All threads of the block. */
template <bool COPIED>
__device__ static void choose(const key_t64 *keys, int tail, int limit, int32_t *list, struct choice_memory *m,
                              struct block_shared *s) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads(); /* nobody reads the memory of what was before */
  if (COPIED) {
#pragma unroll 4
    for (int i = 2 * threadIdx.x; i < tail; i += 2 * THREADS) copy16(shared_address(&m->key[i]), &keys[i]);
    copy_commit();
  }
  constexpr int EACH = BINS / THREADS; /* bins of a thread, from the top */
  int4 *bins = (int4 *)(void *)(m->bin + BINS - ((int)threadIdx.x + 1) * EACH);
  static_assert(EACH == 8, "two int4");
  bins[0] = bins[1] = make_int4(0, 0, 0, 0);
  if (threadIdx.x == 0) s->n_candidates = 0;
  if (COPIED) copy_wait<0>();
  __syncthreads();
  key_t64 low = ~(key_t64)0, high = 0;
  keys_visit<COPIED>(keys, m->key, 0, tail, [&](int, key_t64 x) {
    low = x - 1 < low ? x - 1 : low; /* not 0 */
    high = x > high ? x : high;
  });
#pragma unroll
  for (int k = 16; k; k /= 2) {
    key_t64 x = __shfl_xor_sync(~0u, low, k), y = __shfl_xor_sync(~0u, high, k);
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
  low++;
  /* `need` pages are to come from the values low ... low + span, all above are chosen. The values are keys; if too many keys
   * are `worst`, the earliest of them are wanted: their values are ~page. */
  key_t64 span = high - low, worst = 0;
  int need = limit - 2, latest = tail;
  bool tied = false;
  auto value = [&](int page, key_t64 x) { return !tied ? x : x == worst ? ~(key_t64)page : 0; };
  for (;;) {
    int bits = 64 - __clzll((long long)span), shift = bits > BIN_BITS ? bits - BIN_BITS : 0;
    keys_visit<COPIED>(keys, m->key, 0, tail, [&](int page, key_t64 key) {
      key_t64 x = value(page, key) - low; /* below low: beyond the span */
      if (x <= span) atomicAdd(&m->bin[x >> shift], 1);
    });
    __syncthreads();
    int4 lower = bins[0], upper = bins[1];
    bins[0] = bins[1] = make_int4(0, 0, 0, 0); /* for the next level */
    int count[EACH] = {upper.w, upper.z, upper.y, upper.x, lower.w, lower.z, lower.y, lower.x}, mine = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) mine += count[i];
    int upto = sum_upto(mine, s), above = upto - mine;
    if (above < need && need <= upto) { /* one thread */
#pragma unroll
      for (int i = 0; i < EACH; i++) {
        if (above < need && need <= above + count[i]) {
          s->found_bin = BINS - 1 - (int)threadIdx.x * EACH - i;
          s->found_above = above;
          s->found_count = count[i];
        }
        above += count[i];
      }
    }
    __syncthreads();
    int n = s->found_count;
    need -= s->found_above;
    low += (key_t64)s->found_bin << shift;
    span = ((key_t64)1 << shift) - 1;
    if (n == need) { /* all of the bin */
      if (tied)
        latest = (int)~low;
      else
        worst = low;
      break;
    }
    if (shift == 0) { /* equal keys */
      tied = true;
      worst = low;
      low = ~(key_t64)(tail - 1);
      span = (key_t64)(tail - 1);
    } else if (n <= CANDIDATES) {
      keys_visit<COPIED>(keys, m->key, 0, tail, [&](int page, key_t64 key) {
        key_t64 x = value(page, key);
        if (x - low > span) return;
        int at = atomicAdd(&s->n_candidates, 1);
        m->value[at] = x;
        m->page[at] = page;
      });
      __syncthreads();
      if ((int)threadIdx.x < n) {
        key_t64 x = m->value[threadIdx.x];
        int page = m->page[threadIdx.x], better = 0;
#pragma unroll 2
        for (int i = 0; i < n; i++) better += m->value[i] > x || (m->value[i] == x && m->page[i] < page) ? 1 : 0;
        if (better == need - 1) s->found_value = x, s->found_page = page;
      }
      __syncthreads();
      if (!tied) worst = s->found_value;
      latest = s->found_page;
      break;
    }
  }
  /* Chosen are keys above the worst, and the worst up to the latest page. */
  int32_t *page = list + 2; /* struct qtr_selection: n, tail, page[] */
  int done = 1;
  for (int base = 0; base < tail; base += SPAN) {
    int n = min(tail - base, (int)SPAN);
    keys_visit<COPIED>(keys, m->key, base, base + n, [&](int i, key_t64 x) {
      uint32_t word = __ballot_sync(~0u, x > worst || (x == worst && i <= latest));
      if (lane == 0) m->mask[(i - base) / 32] = word;
    });
    __syncthreads();
    uint32_t chosen = (int)threadIdx.x * 32 < n ? m->mask[threadIdx.x] : 0;
    int mine = __popc(chosen), at = done + sum_upto(mine, s) - mine;
    for (; chosen; chosen &= chosen - 1) page[at++] = base + (int)threadIdx.x * 32 + __ffs((int)chosen) - 1;
#pragma unroll
    for (int i = 0; i < WARPS; i++) done += s->sum[i];
    if (base + SPAN < tail) __syncthreads(); /* before sums and masks are written again */
  }
  if (threadIdx.x == 0) {
    list[0] = limit - 1;
    list[1] = tail;
    page[0] = 0;
  }
}

/* ---- the kernel ---------------------------------------------------------------------------------------------------- */

/* Tiles [from, to) of the pair (event e of the wave, rank, KV head `head`); whoever brings the last tiles makes its choices.
 */
template <int NC>
__device__ static void pair_take(const struct select_params &p, const struct qtr_select_entry &e, int event, int rank,
                                 int head, int from, int to, const struct first_pages &first, void *memory,
                                 struct block_shared *s) {
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
  for (int i = 0; i < p.group; i += COLUMNS) tiles_score<NC>(p, e, rank, from, to, first, q, i, keys, memory);
  __syncthreads();
  if (to - from < e.n_tiles) {
    if (threadIdx.x == 0) {
      fence();
      uint32_t *counter = &p.counter[(size_t)event * p.n_retrieval + rank], n = (uint32_t)(to - from);
      s->last = atomicAdd(counter, n) + n == (uint32_t)e.n_tiles;
      fence();
      if (s->last) *counter = 0;
    }
    __syncthreads();
    if (!s->last) return;
  }
  for (int i = 0; i < p.choosers; i++, keys += e.n_pages, list += stride) {
    if (e.tail <= COPIED_KEYS)
      choose<true>(keys, e.tail, p.limit, list, (struct choice_memory *)memory, s);
    else
      choose<false>(keys, e.tail, p.limit, list, (struct choice_memory *)memory, s);
  }
}

/* The last event of the wave whose first tile is not behind `at`; all lanes of a warp. */
__device__ static int event_find(const struct qtr_select_entry *entry, int n, uint32_t at, int n_retrieval) {
  int low = 0, lane = threadIdx.x % 32; /* it is in [low, low + n) */
  while (n > 1) {
    int step = (n + 31) / 32, i = low + lane * step;
    bool before = lane * step < n && (uint32_t)__ldcg(&entry[i].first_tile) * (uint32_t)n_retrieval <= at;
    int lanes = __popc(__ballot_sync(~0u, before)); /* the first ones; lane 0 is always among them */
    low += (lanes - 1) * step;
    n = min(step, n - (lanes - 1) * step);
  }
  return low;
}

__device__ static inline struct qtr_select_entry entry_load(const struct qtr_select_entry *entry) {
  const int4 *at = (const int4 *)(const void *)entry;
  int4 x = __ldcg(at), y = __ldcg(at + 1);
  struct qtr_select_entry e = {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};
  return e;
}

template <int NC>
__global__ static void __launch_bounds__(THREADS, BLOCKS_PER_SM) k_select(struct select_params p) {
  extern __shared__ uint4 memory[];
  __shared__ struct block_shared s;
  /* The plan, heads and page numbers were there before the kernel before this one began. */
  const int4 *plan = (const int4 *)(const void *)p.plan;
  int4 header = __ldcg(plan), wave = __ldcg(plan + 1 + p.wave); /* of this step, not of the one that was captured */
  int first_event = wave.x, n_events = wave.y, n_tiles = wave.z, entry_offset = header.z;
  /* 32 bits: a tile has at least four pages with a score of 8 bytes each in the scratch. */
  uint32_t work = (uint32_t)n_tiles * (uint32_t)p.n_retrieval, share = work / gridDim.x, more = work % gridDim.x;
  uint32_t at = blockIdx.x * share + min(blockIdx.x, more), end = at + share + (blockIdx.x < more);
  const struct qtr_select_entry *entry =
      (const struct qtr_select_entry *)((const char *)p.plan + entry_offset) + first_event;
  int event = at < end ? event_find(entry, n_events, at, p.n_retrieval) : 0;
  for (bool begun = false; at < end || !begun; begun = true) {
    struct qtr_select_entry e = {};
    struct first_pages first = {};
    int rank = 0, from = 0, to = 0, head = 0;
    if (at < end) {
      e = entry_load(entry + event);
      uint32_t within = at - (uint32_t)e.first_tile * (uint32_t)p.n_retrieval;
      rank = (int)(within / (uint32_t)e.n_tiles), from = (int)(within % (uint32_t)e.n_tiles);
      to = (int)min((uint32_t)e.n_tiles, from + (end - at));
      head = __ldcg(p.head + rank);
      if (NC && e.tail >= p.limit) first = first_pages_load(p, e, from, to);
    }
    if (!begun) {
      if constexpr (NC > 0) {
        if (at < end && e.tail >= p.limit) first_pages_prefetch<NC>(p, rank, from, to, first);
      }
      qtr_begin();
      if (at == end) return;
    }
    pair_take<NC>(p, e, event, rank, head, from, to, first, memory, &s);
    at += (uint32_t)(to - from);
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
  p.logical_bits = p.logical == 4 ? 2 : p.logical - 1;
  p.limit = c->limit;
  p.max_blocks = a->max_blocks;
  p.choosers = c->each_head ? c->group : 1;
  void (*kernel)(struct select_params) = p.dim == 128 ? k_select<8> : p.dim == 64 ? k_select<4> : k_select<0>;
  size_t bytes = shared_bytes(p.dim);
  cudaError_t error = cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
  for (p.wave = 0; p.wave < plan->n_waves && error == cudaSuccess; p.wave++) {
    error = qtr_launch(kernel, (unsigned)(c->n_sms * BLOCKS_PER_SM), THREADS, bytes, stream, p);
  }
  return error;
}
