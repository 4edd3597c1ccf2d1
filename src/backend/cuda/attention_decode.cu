/* attention_decode.cu - attention of sequences with one new token over their pages (spec C.5), head_dim 64 and 128. Must be
 * bound by the bytes of K and V.
 *
 * A block of four warps takes the entries of the plan (attention_plan.h) in turn, one KV head at a time. Within a segment
 * warp w takes visits w, w + 4, ...: every warp has a ring of slots in shared memory that bulk copies fill, one block of K
 * or V (64 tokens of one head) a slot, and runs ahead over the borders of segments and entries. The codes lie in the order
 * of mma fragments (kv_layout.h), so that a 16-byte read gives a lane whole A operands: S^T = K Q^T has tokens as rows and
 * up to 8 query heads of the group as columns, O^T = V^T P^T dims as rows. Scales and zeros stay outside
 * (attention_common.cuh).
 *
 * What the plan says of a block's first pages is read before the kernel before this one has ended (launch.cuh): it hides a
 * chain of loads.
 *
 * Bits: a warp's pages, the order of warps and of segments are fixed by the sequence, so no other sequence matters. */
#include "backend/cuda/attention_kernels.h"
#include "backend/cuda/launch.cuh"
#include "backend/cuda/ptx.cuh"

#include <type_traits>

namespace {

constexpr int WARPS = 4, THREADS = WARPS * 32, MAX_SLOTS = 8;

/* ---- PTX ----------------------------------------------------------------------------------------- */

__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* 8 x 8 halves: what lane l holds of row l / 4 becomes what it holds of column l / 4. */
__device__ __forceinline__ uint32_t transpose(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

/* The ring: blocks come in order, every slot_fill is one block or nothing. Before sm_90 each lane copies its share and a
 * block's arrival is a count of groups; then bulk copies and a barrier a slot. */
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void ring_init(uint32_t barrier, int slots) {
  if (threadIdx.x % 32 == 0) {
    for (int i = 0; i < slots; i++) barrier_init(barrier + 8 * i, 1);
    barriers_show();
  }
  __syncwarp();
}
template <int BYTES>
__device__ __forceinline__ void slot_fill(uint32_t to, const uint8_t *from, uint32_t barrier) {
  if (threadIdx.x % 32 == 0) {
    barrier_expect(barrier, BYTES);
    copy_bulk(to, from, BYTES, barrier);
  }
}
__device__ __forceinline__ void slot_skip() {}
__device__ __forceinline__ void slot_wait(uint32_t barrier, uint32_t parity, int slots) {
  (void)slots;
  barrier_wait(barrier, parity);
}
#else
__device__ __forceinline__ void ring_init(uint32_t, int) {}
__device__ __forceinline__ void slot_skip() { copy_commit(); }
template <int BYTES>
__device__ __forceinline__ void slot_fill(uint32_t to, const uint8_t *from, uint32_t) {
  for (int i = (int)threadIdx.x % 32 * 16; i < BYTES; i += 512) copy16(to + (uint32_t)i, from + i);
  slot_skip();
}
__device__ __forceinline__ void slot_wait(uint32_t, uint32_t, int slots) { /* slots - 1 younger blocks are on their way */
  if (slots == 1) {
    copy_wait<0>();
  } else if (slots == 2) {
    copy_wait<1>();
  } else {
    copy_wait<2>();
  }
  __syncwarp();
}
#endif

/* ---- walking over the plan ----------------------------------------------------------------------- */

/* Two sides of a warp walk over the plan: one copies pages, one multiplies. Registers are for the loop over pages: of a walk
 * they hold where it is, the rest lies in shared memory. */
struct unit { /* an entry for one KV head (and one part of its group) */
  struct qtr_decode_entry e;
  struct qtr_cuda_head head;
  int place, head_block, reserved[2]; /* place: of the KV head in p.head */
};
struct walk {
  int round, segment, visit, visit_end; /* the segment's next visit for this warp */
};

/* Items: entries times (head, head block) of retrieval heads (or all), then of streaming heads, each longest entry first.
 * Block b takes items b, 2 g - 1 - b, 2 g + b, ... */
template <bool EARLY>
__device__ __forceinline__ bool walk_on(const struct attention_params &p, const int4 &plan, int head_blocks, unit &u,
                                        walk &w) {
  int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
  if (w.round >= 0 && w.segment + 1 < u.e.segment + u.e.n_segments) {
    w.segment++;
  } else {
    w.round++;
    int g = (int)gridDim.x, b = (int)blockIdx.x, item = w.round * g + (w.round & 1 ? g - 1 - b : b);
    int n = plan.x * p.n_retrieval * head_blocks, n_streaming = plan.y * (p.n_kv_heads - p.n_retrieval) * head_blocks;
    if (item >= n + n_streaming) return false; /* in the last round only */
    bool streams = item >= n;
    int i = streams ? item - n : item, heads = streams ? p.n_kv_heads - p.n_retrieval : p.n_retrieval;
    int pair = i / head_blocks, place = pair % heads + (streams ? p.n_retrieval : 0);
    int entry = pair / heads + (streams ? plan.x : 0);
    const int4 *from = (const int4 *)(p.plan + plan.z + (size_t)entry * sizeof(struct qtr_decode_entry)) + lane;
    if (lane >= 4) from = (const int4 *)(p.head + place) + (lane - 4);
    int4 x = lane < 6 ? load<EARLY>(from) : make_int4(place, i % head_blocks, 0, 0);
    __syncwarp(); /* nobody reads the old one any more */
    if (lane < (int)sizeof u / 16) ((int4 *)&u)[lane] = x;
    __syncwarp();
    w.segment = u.e.segment;
  }
  int first = w.segment * u.e.segment_tiles;
  w.visit = first + warp;
  w.visit_end = min(first + u.e.segment_tiles, u.e.n_visits);
  return true;
}

/* ---- shared memory ------------------------------------------------------------------------------- */

template <int FORMAT, int DIM>
struct shape {
  static constexpr int code_bytes = DIM * QTR_PAGE_TOKENS * (FORMAT == QTR_KV_F16 ? 4 : FORMAT == QTR_KV_INT4 ? 1 : 2) / 2;
  static constexpr int block_bytes = code_bytes + (kv_traits<FORMAT>::has_params ? QTR_PAGE_TOKENS * 4 : 0);
  static constexpr int head_floats = DIM + 4; /* a row of results; + 4: no bank conflicts */
};

struct total { /* of one head */
  float max, sum;
};

struct state { /* of a block, beside ring and results */
  uint64_t barriers[WARPS][MAX_SLOTS];
  unit ahead[WARPS], now[WARPS]; /* what a warp copies, and what it multiplies */
  struct total totals[WARPS][16];
  int4 plan;
  int is_last;
};

/* Adds a later part to an earlier one: maxima are log2. */
template <int N>
__device__ __forceinline__ void merge(struct total &t, float (&sum)[N], struct total u, const float (&more)[N]) {
  float m = fmaxf(t.max, u.max), f = fast_exp2(t.max - m), g = fast_exp2(u.max - m);
  t.sum = __fmaf_rn(t.sum, f, __fmul_rn(u.sum, g));
#pragma unroll
  for (int i = 0; i < N; i++) sum[i] = __fmaf_rn(sum[i], f, __fmul_rn(more[i], g));
  t.max = m;
}

/* slots: of a warp's ring. */
template <int FORMAT, int DIM, int COLUMNS>
__global__ void __launch_bounds__(THREADS, COLUMNS == 2 ? 2
                                           : DIM == 64  ? 4
                                                        : 3)
    k_attention_decode(const __grid_constant__ struct attention_params p, const int slots) {
  using traits = kv_traits<FORMAT>;
  using S = shape<FORMAT, DIM>;
  constexpr int K_STEPS = DIM / 16, HEADS = 8 * COLUMNS, PER_CHUNK = traits::fragments;
  constexpr int OUTPUTS = (HEADS * DIM / 4 + THREADS - 1) / THREADS; /* float4 of results a thread merges */
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ __align__(16) struct state state;
  auto &totals = state.totals;
  float *results = (float *)(shared + WARPS * slots * S::block_bytes); /* (WARPS, heads, head_floats) */
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
  uint32_t ring = shared_address(shared) + (uint32_t)(warp * slots * S::block_bytes);
  const uint8_t *ring_at = shared + warp * slots * S::block_bytes;
  uint32_t barrier = shared_address(&state.barriers[warp][0]);
  ring_init(barrier, slots);
  if (threadIdx.x == 0) state.plan = __ldcg((const int4 *)p.plan);
  __syncthreads();

  int block_heads = p.each_head ? 1 : HEADS, head_stride = min(p.group, HEADS);
  int head_blocks = p.each_head ? p.group : COLUMNS == 1 ? 1 : (p.group + HEADS - 1) / HEADS;
  float log2_scale = p.scale * LOG2_E;

  /* The copying side of the warp, and what it multiplies: both begin at the block's first unit. */
  unit &u = state.now[warp], &ahead = state.ahead[warp];
  walk at_work = {-1, 0, 0, 0};
  bool working = walk_on<true>(p, state.plan, head_blocks, u, at_work), more = working, next_is_v = false;
  if (lane < (int)sizeof u / 16) ((int4 *)&ahead)[lane] = ((int4 *)&u)[lane];
  __syncwarp();
  walk at_copy = at_work;
  int pages = 0, next_page = 32, filled = 0; /* one page a lane, and whose is next (32: none known); slot to fill next */
  size_t ahead_page = 0;
  auto pages_find = [&](auto early) {
    int visit = at_copy.visit + lane * WARPS, tile = visit < ahead.e.n_first ? visit : visit + ahead.e.skip;
    next_page = 0; /* pages: those of the next 32 visits */
    if (visit >= at_copy.visit_end) return;
    if (ahead.e.list >= 0 && visit < ahead.e.n_first) {
      tile = load<early.value>(chosen_pages(p, ahead.e.list, ahead.head.kv_head, ahead.head_block) + visit);
    }
    pages = load<early.value>(head_table(p, ahead.place) + (size_t)ahead.e.seq * p.max_blocks + tile);
  };
  /* Plan and tables were uploaded before the step's first kernel; the kernel before this one, which may still run, has
   * waited for all others. Lists are its work, as q, K and V are. What comes after qtr_begin() may use the L1 cache. */
  if (more && ahead.e.list < 0 && at_copy.visit < at_copy.visit_end) pages_find(std::true_type());
  qtr_wait();
  auto copy_next = [&]() {
    if (!next_is_v) {
      while (more && at_copy.visit >= at_copy.visit_end) { /* to a segment with pages for this warp */
        more = walk_on<false>(p, state.plan, head_blocks, ahead, at_copy);
        next_page = 32;
      }
      if (!more) {
        slot_skip();
        return;
      }
      if (next_page == 32) pages_find(std::false_type());
      ahead_page = (size_t)__shfl_sync(~0u, pages, next_page++) * ahead.head.page_bytes;
    }
    slot_fill<S::block_bytes>(ring + (uint32_t)(filled * S::block_bytes),
                              p.data + (next_is_v ? ahead.head.v : ahead.head.k) + ahead_page, barrier + 8 * filled);
    if (next_is_v) at_copy.visit += WARPS;
    next_is_v = !next_is_v;
    filled = filled + 1 == slots ? 0 : filled + 1;
  };
#pragma unroll 1
  for (int i = 0; i < slots; i++) copy_next();
  qtr_let_next(); /* not before: a product that comes next asks for its weights, and these pages would wait behind them */

  int slot = 0;
  uint32_t parity = 0;
  auto slot_next = [&]() {
    if (++slot == slots) slot = 0, parity ^= 1;
  };
  uint32_t q[COLUMNS][K_STEPS][2];
  float q_sum[COLUMNS][2];
  struct total running[OUTPUTS];
  float running_sum[OUTPUTS][4];

#pragma unroll 1
  for (; working; working = walk_on<false>(p, state.plan, head_blocks, u, at_work)) {
    int first_head = u.head.kv_head * p.group + u.head_block * block_heads;
    int n_heads = min(block_heads, p.group - u.head_block * block_heads);
    if (at_work.segment == u.e.segment) { /* a new entry: its queries as B operands, their sums */
#pragma unroll
      for (int n = 0; n < COLUMNS; n++) {
        int head = n * 8 + row;
        const __half *from = p.qkv + (size_t)u.e.token * p.width + (size_t)(first_head + head) * DIM + column;
        float sum = 0;
#pragma unroll
        for (int k = 0; k < K_STEPS; k++) {
#pragma unroll
          for (int h = 0; h < 2; h++) {
            uint32_t x = head < n_heads ? *(const unsigned *)(from + k * 16 + h * 8) : 0;
            q[n][k][h] = x = q_scale<FORMAT>(x, h);
            float2 y = __half22float2(*(__half2 *)&x);
            sum += (y.x + y.y) * (h ? 1 / traits::q_high : 1.0f);
          }
        }
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        q_sum[n][0] = __shfl_sync(~0u, sum, column * 4);
        q_sum[n][1] = __shfl_sync(~0u, sum, column * 4 + 4);
      }
#pragma unroll
      for (int i = 0; i < OUTPUTS; i++) {
        running[i] = {-INFINITY, 0};
#pragma unroll
        for (int j = 0; j < 4; j++) running_sum[i][j] = 0;
      }
    }
    const int n_keys = u.e.n_keys, hole_from = u.e.hole_from, hole_to = u.e.hole_to;
    float o[COLUMNS][K_STEPS][4], max[COLUMNS][2], sum[COLUMNS][2], zeros[COLUMNS][2];
#pragma unroll
    for (int n = 0; n < COLUMNS; n++) {
#pragma unroll
      for (int k = 0; k < K_STEPS; k++) {
#pragma unroll
        for (int i = 0; i < 4; i++) o[n][k][i] = 0;
      }
#pragma unroll
      for (int i = 0; i < 2; i++) max[n][i] = -INFINITY, sum[n][i] = zeros[n][i] = 0;
    }
#pragma unroll 1
    for (; at_work.visit < at_work.visit_end; at_work.visit += WARPS) {
      float s[COLUMNS][4][4];
      uint32_t k_pair[4][2], v_pair[4][2];
      const uint8_t *at = ring_at + slot * S::block_bytes;
      slot_wait(barrier + 8 * slot, parity, slots);
#pragma unroll
      for (int m = 0; m < 4; m++) {
#pragma unroll
        for (int n = 0; n < COLUMNS; n++) s[n][m][0] = s[n][m][1] = s[n][m][2] = s[n][m][3] = 0;
      }
#pragma unroll
      for (int k = 0; k < K_STEPS; k += PER_CHUNK) { /* the four chains of sums side by side: each waits for itself */
        uint4 x[4];
#pragma unroll
        for (int m = 0; m < 4; m++) x[m] = *(const uint4 *)(at + ((m * K_STEPS + k) / PER_CHUNK * 32 + lane) * 16);
#pragma unroll
        for (int i = 0; i < PER_CHUNK; i++) {
#pragma unroll
          for (int m = 0; m < 4; m++) {
            uint32_t chunk[4] = {x[m].x, x[m].y, x[m].z, x[m].w}, a[4];
            fragment_expand<FORMAT, false>(chunk, i, a);
#pragma unroll
            for (int n = 0; n < COLUMNS; n++) mma(s[n][m], a, q[n][k + i]);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < 4 && traits::has_params; m++) {
        k_pair[m][0] = *(const uint32_t *)(at + S::code_bytes + (m * 16 + row) * 4);
        k_pair[m][1] = *(const uint32_t *)(at + S::code_bytes + (m * 16 + row + 8) * 4);
      }
      slot_next();
      __syncwarp();
      copy_next();
      at = ring_at + slot * S::block_bytes;
      slot_wait(barrier + 8 * slot, parity, slots);
#pragma unroll
      for (int m = 0; m < 4 && traits::has_params; m++) {
        v_pair[m][0] = *(const uint32_t *)(at + S::code_bytes + (m * 16 + row) * 4);
        v_pair[m][1] = *(const uint32_t *)(at + S::code_bytes + (m * 16 + row + 8) * 4);
      }
      /* Keys that are not seen: few pages have some. Their weights become zero whatever their slots hold. */
      int first = at_work.visit * QTR_PAGE_TOKENS, end = first + QTR_PAGE_TOKENS;
      if (end > n_keys || (end > hole_from && first < hole_to)) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
          int m = i / 2, h = i % 2, key = first + m * 16 + h * 8 + row;
          if (key < n_keys && (key < hole_from || key >= hole_to)) continue;
          k_pair[m][h] = v_pair[m][h] = 0x3c00; /* scale 1, zero 0 */
#pragma unroll
          for (int n = 0; n < COLUMNS; n++) s[n][m][h * 2] = s[n][m][h * 2 + 1] = -INFINITY;
        }
      }
      /* Scores of tokens 16 m + row + 8 h, then weights. */
      float inv_s[4][2], zero[4][2], top[COLUMNS][2];
#pragma unroll
      for (int n = 0; n < COLUMNS; n++) top[n][0] = top[n][1] = -INFINITY;
#pragma unroll
      for (int m = 0; m < 4; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          struct token_params t = token_make<FORMAT>(k_pair[m][h], v_pair[m][h], log2_scale, p.k_scale, p.v_scale, true);
          inv_s[m][h] = t.inv_s, zero[m][h] = t.zero;
#pragma unroll
          for (int n = 0; n < COLUMNS; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
              float x = __fmaf_rn(s[n][m][h * 2 + i], t.a, __fmaf_rn(-q_sum[n][i], t.b, t.log_s));
              s[n][m][h * 2 + i] = x;
              top[n][i] = fmaxf(top[n][i], x);
            }
          }
        }
      }
      bool grown = false;
      float factor[COLUMNS][2];
#pragma unroll
      for (int n = 0; n < COLUMNS; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float x = top[n][i];
          x = fmaxf(x, __shfl_xor_sync(~0u, x, 4));
          x = fmaxf(x, __shfl_xor_sync(~0u, x, 8));
          x = fmaxf(x, __shfl_xor_sync(~0u, x, 16));
          x = fmaxf(max[n][i], x - WEIGHT_BITS);
          factor[n][i] = fast_exp2(max[n][i] - x);
          grown |= x != max[n][i];
          max[n][i] = x;
        }
      }
      if (__any_sync(~0u, grown)) {
#pragma unroll
        for (int n = 0; n < COLUMNS; n++) {
#pragma unroll
          for (int i = 0; i < 2; i++) sum[n][i] *= factor[n][i], zeros[n][i] *= factor[n][i];
#pragma unroll
          for (int k = 0; k < K_STEPS; k++) {
#pragma unroll
            for (int i = 0; i < 4; i++) o[n][k][i] *= factor[n][i % 2];
          }
        }
      }
      uint32_t w[COLUMNS][4][2];
#pragma unroll
      for (int m = 0; m < 4; m++) {
#pragma unroll
        for (int n = 0; n < COLUMNS; n++) {
#pragma unroll
          for (int h = 0; h < 2; h++) {
            float x = fast_exp2(s[n][m][h * 2] - max[n][0]), y = fast_exp2(s[n][m][h * 2 + 1] - max[n][1]);
            __half2 xy = __floats2half2_rn(x, y);
            float2 r = __half22float2(xy); /* sums see the rounded weights: a mean with slightly other weights */
            if (traits::has_params) {
              sum[n][0] = __fmaf_rn(r.x, inv_s[m][h], sum[n][0]), sum[n][1] = __fmaf_rn(r.y, inv_s[m][h], sum[n][1]);
            } else {
              sum[n][0] += r.x, sum[n][1] += r.y;
            }
            if (traits::is_int) {
              zeros[n][0] = __fmaf_rn(r.x, zero[m][h], zeros[n][0]), zeros[n][1] = __fmaf_rn(r.y, zero[m][h], zeros[n][1]);
            }
            w[n][m][h] = transpose(*(uint32_t *)&xy);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < 4; m++) {
#pragma unroll
        for (int k = 0; k < K_STEPS; k += PER_CHUNK) {
          uint4 x = *(const uint4 *)(at + ((m * K_STEPS + k) / PER_CHUNK * 32 + lane) * 16);
          uint32_t chunk[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
          for (int i = 0; i < PER_CHUNK; i++) {
            uint32_t a[4];
            fragment_expand<FORMAT, true>(chunk, i, a);
#pragma unroll
            for (int n = 0; n < COLUMNS; n++) mma(o[n][k + i], a, w[n][m]);
          }
        }
      }
      slot_next();
      __syncwarp();
      copy_next();
    }
    /* The segment's result: warps in order. */
#pragma unroll
    for (int n = 0; n < COLUMNS; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int j = 4; j < 32; j *= 2) {
          sum[n][i] += __shfl_xor_sync(~0u, sum[n][i], j);
          zeros[n][i] += __shfl_xor_sync(~0u, zeros[n][i], j);
        }
        int head = n * 8 + column + i;
        if (head >= n_heads) continue;
        if (row == 0) totals[warp][head] = {max[n][i], sum[n][i]};
        float *to = results + (size_t)(warp * head_stride + head) * S::head_floats + row;
#pragma unroll
        for (int k = 0; k < K_STEPS; k++) {
          to[k * 16] = __fmaf_rn(o[n][k][i], traits::out_low, -zeros[n][i]);
          to[k * 16 + 8] = __fmaf_rn(o[n][k][i + 2], traits::out_high, -zeros[n][i]);
        }
      }
    }
    __syncthreads();
    bool ends = at_work.segment + 1 == u.e.segment + u.e.n_segments;
    float result_scale = FORMAT == QTR_KV_INT8_STATIC ? p.v_scale : 1.0f;
#pragma unroll
    for (int k = 0; k < OUTPUTS; k++) {
      int i = (int)threadIdx.x + k * THREADS, head = i / (DIM / 4), d = i % (DIM / 4) * 4;
      if (head >= n_heads) continue;
      struct total t = {-INFINITY, 0};
      float all[4] = {0, 0, 0, 0};
#pragma unroll
      for (int w = 0; w < WARPS; w++) t.max = fmaxf(t.max, totals[w][head].max);
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        float f = fast_exp2(totals[w][head].max - t.max);
        float4 x = *(const float4 *)(results + (size_t)(w * head_stride + head) * S::head_floats + d);
        t.sum = __fmaf_rn(totals[w][head].sum, f, t.sum);
        all[0] = __fmaf_rn(x.x, f, all[0]), all[1] = __fmaf_rn(x.y, f, all[1]);
        all[2] = __fmaf_rn(x.z, f, all[2]), all[3] = __fmaf_rn(x.w, f, all[3]);
      }
      if (u.e.slot >= 0) {
        float *to = (float *)(p.scratch + QTR_COUNTER_BYTES) +
                    ((size_t)(u.e.slot + at_work.segment) * p.n_heads + first_head + head) * (DIM + 4);
        *(float4 *)(to + d) = make_float4(all[0], all[1], all[2], all[3]);
        if (d == 0) to[DIM] = t.max, to[DIM + 1] = t.sum;
        continue;
      }
      merge(running[k], running_sum[k], t, all);
      if (!ends) continue;
      float f = result_scale / running[k].sum;
      __half2 x = __floats2half2_rn(running_sum[k][0] * f, running_sum[k][1] * f);
      __half2 y = __floats2half2_rn(running_sum[k][2] * f, running_sum[k][3] * f);
      *(uint2 *)(p.out + ((size_t)u.e.token * p.n_heads + first_head + head) * DIM + d) =
          make_uint2(*(uint32_t *)&x, *(uint32_t *)&y);
    }
    if (u.e.slot >= 0) { /* the last of the segments merges all */
      int *counter = (int *)p.scratch + (size_t)u.e.slot * QTR_MAX_SPLIT_HEADS + u.head.kv_head * head_blocks + u.head_block;
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) {
        state.is_last = atomicAdd(counter, 1) == u.e.all_segments - 1;
        if (state.is_last) *counter = 0;
      }
      __syncthreads();
      if (state.is_last) {
        __threadfence();
        constexpr int AT_ONCE = 8;
        const int n_parts = u.e.all_segments;
        const float *parts =
            (const float *)(p.scratch + QTR_COUNTER_BYTES) + ((size_t)u.e.slot * p.n_heads + first_head) * (DIM + 4);
#pragma unroll 1
        for (int k = 0; k < OUTPUTS; k++) {
          int i = (int)threadIdx.x + k * THREADS, head = i / (DIM / 4), d = i % (DIM / 4) * 4;
          if (head >= n_heads) continue;
          struct total t = {-INFINITY, 0};
          float all[4] = {0, 0, 0, 0};
#pragma unroll 1
          for (int j = 0; j < n_parts;
               j += AT_ONCE) { /* loads first: a part comes from the L2, and none waits for another */
            float4 x[AT_ONCE];
            float2 y[AT_ONCE];
#pragma unroll
            for (int l = 0; l < AT_ONCE; l++) {
              const float *from = parts + (size_t)min(j + l, n_parts - 1) * p.n_heads * (DIM + 4) + (size_t)head * (DIM + 4);
              x[l] = __ldcg((const float4 *)(from + d));
              y[l] = __ldcg((const float2 *)(from + DIM));
            }
#pragma unroll
            for (int l = 0; l < AT_ONCE; l++) {
              float part[4] = {x[l].x, x[l].y, x[l].z, x[l].w};
              if (j + l < n_parts) merge(t, all, total{y[l].x, y[l].y}, part);
            }
          }
          float f = result_scale / t.sum;
          __half2 x = __floats2half2_rn(all[0] * f, all[1] * f), y = __floats2half2_rn(all[2] * f, all[3] * f);
          *(uint2 *)(p.out + ((size_t)u.e.token * p.n_heads + first_head + head) * DIM + d) =
              make_uint2(*(uint32_t *)&x, *(uint32_t *)&y);
        }
      }
    }
    __syncthreads(); /* results and state are used again */
  }
}

/* As many blocks an SM as registers allow, if each warp can have three slots; the more warps, the less the chain of
 * operations of a page matters. */
template <int FORMAT, int DIM, int COLUMNS>
cudaError_t launch(const struct attention_params &p, cudaStream_t stream) {
  using S = shape<FORMAT, DIM>;
  auto kernel = k_attention_decode<FORMAT, DIM, COLUMNS>;
  int device, n_sms, per_sm = 0, most, block_most, reserved, slots;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&block_most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device);
  if (error != cudaSuccess) return error;
  int heads = p.group < 8 * COLUMNS ? p.group : 8 * COLUMNS;
  int results = WARPS * heads * S::head_floats * (int)sizeof(float), fixed = reserved + (int)sizeof(struct state) + results;
  int blocks = COLUMNS == 2 ? 2 : DIM == 64 ? 4 : 3;
  for (;; blocks--) {
    int room = most / blocks < block_most ? most / blocks : block_most;
    slots = (room - fixed) / (WARPS * S::block_bytes);
    if (slots >= 3 || blocks == 1) break;
  }
  if (slots > MAX_SLOTS) slots = MAX_SLOTS;
  if (slots < 1)
    return qtr_cuda_attention_generic_entries(&p, FORMAT, stream); /* too little shared memory: small GPUs, F16 */
  int n_shared = WARPS * slots * S::block_bytes + results;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, n_shared);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, THREADS, (size_t)n_shared);
  if (error != cudaSuccess) return error;
  size_t grid = (size_t)n_sms * (size_t)per_sm;
  size_t items =
      (size_t)p.n_seqs * (size_t)p.n_kv_heads * (size_t)qtr_decode_head_blocks(p.group, p.each_head) * QTR_MAX_SEGMENTS;
  return qtr_launch(kernel, (unsigned)(items < grid ? items : grid), THREADS, (size_t)n_shared, stream, p, slots);
}

template <int FORMAT>
cudaError_t launch_shape(const struct attention_params &p, cudaStream_t stream) {
  bool one = qtr_decode_columns(p.group) == 1;
  if (p.dim == 128) return one ? launch<FORMAT, 128, 1>(p, stream) : launch<FORMAT, 128, 2>(p, stream);
  return one ? launch<FORMAT, 64, 1>(p, stream) : launch<FORMAT, 64, 2>(p, stream);
}

}  // namespace

cudaError_t qtr_cuda_attention_decode(const struct attention_params *p, int format, cudaStream_t stream) {
  switch (format) {
    case QTR_KV_F16: return launch_shape<QTR_KV_F16>(*p, stream);
    case QTR_KV_INT8: return launch_shape<QTR_KV_INT8>(*p, stream);
    case QTR_KV_INT4: return launch_shape<QTR_KV_INT4>(*p, stream);
    default: return launch_shape<QTR_KV_INT8_STATIC>(*p, stream);
  }
}
