/* attention_prefill.cu - attention of sequences with several new tokens, causal, over their pages (spec C.5), head_dim 64
 * and 128, wgmma of sm_90a. Other GPUs take the generic kernel.
 *
 * A block takes entries of the plan in turn: 128 rows (token, query head of one KV head's group), so that a group shares K
 * and V and any group size fits. Bulk copies bring pages as they are and the queries; one warpgroup unpacks a page of K and
 * V a time into fp16 tiles in shared memory (codes as subnormals: an AND and a store, attention_common.cuh) and runs ahead;
 * two warpgroups of 64 rows each multiply: S = Q K^T with Q in registers, O += P V with P in registers, the next page's S
 * issued before this page's O.
 *
 * Order inside a tile: the wgmma operands sum over dims (K) and tokens (V) in any order that both sides share, so rows and
 * columns are permuted such that a lane's 16-byte stores are what its chunk of a page holds (kv_layout.h):
 *   dim   16 (2 i + h) + 2 c + {0, 1} + 8 u   at   64 (i / 2) + 16 c + 8 (i % 2) + 4 h + 2 u + {0, 1}
 *   token 16 t + 2 c + {0, 1} + 8 u           at   16 c + 4 t + 2 u + {0, 1}
 * Tiles have rows of 128 bytes with the 128-byte swizzle; 8 lanes of a store touch all banks.
 *
 * Streaming heads visit only the pages that a row of the entry sees: those of the sink, and from the first row's window on.
 *
 * Bits: a row walks its pages from the first; pages and columns behind it, or outside its window, change nothing. So results
 * do not depend on the batch or on how a prompt is cut into chunks (of two tokens or more: one token is
 * attention_decode.cu's). */
#include "backend/cuda/attention_kernels.h"
#include "backend/cuda/launch.cuh"
#include "backend/cuda/ptx.cuh"

namespace {

constexpr int THREADS = 384, PAGE = QTR_PAGE_TOKENS, ROWS = QTR_PREFILL_ROWS;

/* ---- PTX ----------------------------------------------------------------------------------------- */

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// clang-format off
__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int add) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %37, 0;\n"
      " wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
__device__ __forceinline__ void wgmma(float (&d)[64], const uint32_t (&a)[4], uint64_t b, int add) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %69, 0;\n"
      " wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
      "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
      "%62, %63}, "
      "{%64, %65, %66, %67}, %68, p, 1, 1, 0;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
        "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
        "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
        "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
// clang-format on

/* Both halves of B the same. */
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%8}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b));
}

/* Registers that an instruction in flight reads or writes: the compiler must not move them across. */
template <int N>
__device__ __forceinline__ void hold(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N>
__device__ __forceinline__ void hold(uint32_t (&x)[N][4]) {
#pragma unroll
  for (int i = 0; i < N * 4; i++) asm volatile("" : "+r"(x[i / 4][i % 4])::"memory");
}

/* Low and high word: K-major, 128-byte swizzle, 8 rows = 1,024 bytes. */
__device__ __forceinline__ uint32_t descriptor_low(uint32_t address) { return address >> 4 | 1u << 16; }
__device__ __forceinline__ uint64_t descriptor(uint32_t low) { return (uint64_t)0x40000040u << 32 | low; }
#endif

/* ---- shared memory ------------------------------------------------------------------------------- */

struct columns { /* of a page's tokens, in the tile's order: struct token_params */
  float2 ab[PAGE], inv_zero[PAGE];
  float log_s[PAGE];
};

template <int FORMAT, int DIM>
struct shape {
  static constexpr int code_bytes = DIM * PAGE * (FORMAT == QTR_KV_F16 ? 4 : FORMAT == QTR_KV_INT4 ? 1 : 2) / 2;
  static constexpr int block_bytes = code_bytes + (kv_traits<FORMAT>::has_params ? PAGE * 4 : 0);
  static constexpr int stages = FORMAT == QTR_KV_F16 ? 3 : 4, raw_stages = FORMAT == QTR_KV_F16    ? 2
                                                                           : FORMAT == QTR_KV_INT4 ? 4
                                                                                                   : 3;
  static constexpr int q_pitch = DIM * 2 + 64; /* 8 lanes of a 16-byte load touch all banks */
  /* Registers of a thread that produces (one warpgroup) and of one that multiplies (two): 168 at launch on average. Whole
   * fp16 pages need more of the former, and no scales or zeros of the latter. */
  static constexpr int producer_registers = FORMAT == QTR_KV_F16 ? 104 : 88, registers = 252 - producer_registers / 2;
  static_assert(producer_registers % 8 == 0 && registers % 8 == 0 && producer_registers + 2 * registers == 3 * 168,
                "setmaxnreg");
};

template <int FORMAT, int DIM>
struct memory { /* 1,024-byte aligned */
  using S = shape<FORMAT, DIM>;
  struct {
    uint8_t k[PAGE * DIM * 2]; /* (dims / 64) of (64 tokens, 64 dims) */
    uint8_t v[DIM * PAGE * 2]; /* (dims, 64 tokens) */
  } tile[S::stages];
  uint8_t raw[S::raw_stages][2][S::block_bytes]; /* pages as they are: K, V */
  uint8_t q[ROWS][S::q_pitch];
  columns column[S::stages];
  uint64_t full[S::stages], empty[S::stages], raw_full[S::raw_stages], q_full, q_empty;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
/* ---- the producing warpgroup --------------------------------------------------------------------- */

template <int N>
__device__ __forceinline__ void load_words(const uint8_t *from, uint32_t *to) {
  if (N == 1) {
    to[0] = *(const uint32_t *)from;
  } else if (N == 2) {
    uint2 x = *(const uint2 *)from;
    to[0] = x.x, to[1] = x.y;
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      uint4 x = *(const uint4 *)(from + i / 4 * 512); /* chunks of a lane are 32 x 16 bytes apart */
      to[i] = x.x, to[i + 1] = x.y, to[i + 2] = x.z, to[i + 3] = x.w;
    }
  }
}

/* Fragment i of consecutive ones in words as load_words left them. */
template <int FORMAT, bool IS_V>
__device__ __forceinline__ void words_expand(const uint32_t *words, int i, uint32_t (&a)[4]) {
  constexpr int N = 4 / kv_traits<FORMAT>::fragments;
  uint32_t chunk[4];
#pragma unroll
  for (int j = 0; j < 4; j++) chunk[j] = j < N ? words[i * N + j] : 0;
  fragment_expand<FORMAT, IS_V>(chunk, 0, a);
}

template <int FORMAT, int DIM>
__device__ __forceinline__ void unpack_k(const uint32_t *words, uint8_t *tile, int warp, int lane) {
  int g = lane / 4, c = lane % 4;
#pragma unroll
  for (int i = 0; i < DIM / 32; i++) {
    uint32_t a[2][4];
    words_expand<FORMAT, false>(words, 2 * i, a[0]);
    words_expand<FORMAT, false>(words, 2 * i + 1, a[1]);
#pragma unroll
    for (int h = 0; h < 2; h++) { /* token 16 warp + g + 8 h */
      int row = g / 2 * 16 + warp * 4 + h * 2 + g % 2, unit = c * 2 + i % 2;
      *(uint4 *)(tile + i / 2 * (PAGE * 128) + row * 128 + (unit ^ row % 8) * 16) =
          make_uint4(a[0][h], a[0][h + 2], a[1][h], a[1][h + 2]);
    }
  }
}

template <int FORMAT, int DIM>
__device__ __forceinline__ void unpack_v(const uint32_t (*words)[DIM / 16 / kv_traits<FORMAT>::fragments], uint8_t *tile,
                                         int warp, int lane) {
  int g = lane / 4, c = lane % 4;
#pragma unroll
  for (int m = 0; m < DIM / 64; m++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      uint32_t a[2][4];
      words_expand<FORMAT, true>(words[2 * i], m, a[0]);
      words_expand<FORMAT, true>(words[2 * i + 1], m, a[1]);
#pragma unroll
      for (int h = 0; h < 2; h++) { /* dim 16 (warp * DIM / 64 + m) + g + 8 h */
        int row = (warp * (DIM / 64) + m) * 16 + h * 8 + g, unit = c * 2 + i;
        *(uint4 *)(tile + row * 128 + (unit ^ g) * 16) = make_uint4(a[0][h], a[0][h + 2], a[1][h], a[1][h + 2]);
      }
    }
  }
}

/* What of a page a thread of the producer holds on the way. */
template <int FORMAT, int DIM>
struct raw {
  static constexpr int per_fragment = 4 / kv_traits<FORMAT>::fragments; /* words of a lane */
  static constexpr int k_words = DIM / 16 * per_fragment, v_words = DIM / 64 * per_fragment;
  uint32_t k[k_words], v[4][v_words], k_pair, v_pair;
};

template <int FORMAT, int DIM>
__device__ __forceinline__ void load_page(const uint8_t *k, const uint8_t *v, raw<FORMAT, DIM> &r, int warp, int lane) {
  using R = raw<FORMAT, DIM>;
  constexpr int N = R::per_fragment, CODES = shape<FORMAT, DIM>::code_bytes;
  int first = warp * (DIM / 16); /* K: fragments of 16 tokens */
  load_words<R::k_words>(k + (first * N / 4 * 32 + lane) * 16, r.k);
#pragma unroll
  for (int t = 0; t < 4; t++) { /* V: DIM / 64 fragments of each 16 tokens */
    int f = t * (DIM / 16) + warp * (DIM / 64);
    load_words<R::v_words>(v + (f * N / 4 * 32 + lane) * 16 + f * N % 4 * 4, r.v[t]);
  }
  int token = warp * 32 + lane;
  if (kv_traits<FORMAT>::has_params && token < PAGE) {
    r.k_pair = *(const uint32_t *)(k + CODES + token * 4);
    r.v_pair = *(const uint32_t *)(v + CODES + token * 4);
  }
}

struct entry { /* of the plan, for one KV head */
  struct qtr_prefill_entry e;
  int place, kv_head;          /* where the KV head is in p.head */
  int n_visits, n_first, skip; /* visit i is page i below n_first, page i + skip from there on */
};
__device__ __forceinline__ int entry_tile(const entry &x, int visit) { return visit < x.n_first ? visit : visit + x.skip; }
/* The same in all lanes: the compiler learns that loops over it do not diverge. */
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }
__device__ __forceinline__ entry uniform(const entry &x) {
  return {{uniform(x.e.seq),
           uniform(x.e.first_token),
           uniform(x.e.kv_len),
           uniform(x.e.row),
           uniform(x.e.n_rows),
           uniform(x.e.n_tiles),
           {0, 0}},
          uniform(x.place),
          uniform(x.kv_head),
          uniform(x.n_visits),
          uniform(x.n_first),
          uniform(x.skip)};
}
/* Items: all entries for the retrieval heads, longest first, then for the streaming heads. */
__device__ __forceinline__ bool entry_load(const struct attention_params &p, int round, entry &x) {
  const struct qtr_attention_plan *plan = (const struct qtr_attention_plan *)p.plan;
  int n_entries = plan->n_prefill, n_items = n_entries * p.n_kv_heads, g = (int)gridDim.x, b = (int)blockIdx.x;
  int item = round * g + (round & 1 ? g - 1 - b : b), n_retrieval = n_entries * p.n_retrieval;
  if (item >= n_items) return false; /* in the last round only */
  bool streams = item >= n_retrieval;
  int i = streams ? item - n_retrieval : item, heads = streams ? p.n_kv_heads - p.n_retrieval : p.n_retrieval;
  const int4 *from = (const int4 *)(p.plan + plan->prefill_offset) + (size_t)(i / heads) * 2;
  x.place = i % heads + (streams ? p.n_retrieval : 0);
  x.kv_head = p.head[x.place].kv_head;
  int4 y = from[0], z = from[1];
  x.e = {y.x, y.y, y.z, y.w, z.x, z.y, {0, 0}};
  x.n_first = x.skip = 0;
  if (streams) {
    int sink = (p.sink + PAGE - 1) / PAGE, from_key = x.e.kv_len + x.e.row / p.group - p.local + 1;
    int local = max(from_key, 0) / PAGE;
    if (from_key > p.sink && local > sink) x.n_first = sink, x.skip = local - sink;
  }
  x.n_visits = x.e.n_tiles - x.skip;
  return true;
}

/* The thread that starts the copies of pages walks ahead; entries and page numbers are read one step before their use. */
struct cursor {
  entry now, next;
  struct qtr_cuda_head head;
  bool has_now, has_next;
  int round, visit, page;
};
__device__ __forceinline__ int cursor_page(const struct attention_params &p, const cursor &c) {
  if (!c.has_now) return 0;
  return head_table(p, c.now.place)[(size_t)c.now.e.seq * p.max_blocks + entry_tile(c.now, c.visit)];
}

template <int FORMAT, int DIM>
__device__ __forceinline__ void produce(const struct attention_params &p, memory<FORMAT, DIM> &m) {
  using S = shape<FORMAT, DIM>;
  int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, s = 0, raw_at = 0;
  uint32_t parity = 1, raw_parity = 0, q_parity = 1;
  uint32_t full = shared_address(m.full), empty = shared_address(m.empty), raw_full = shared_address(m.raw_full);
  cursor c = {};
  auto copy_next = [&](int to) {
    if (!c.has_now) return;
    size_t at = (size_t)c.page * c.head.page_bytes;
    barrier_expect(raw_full + 8 * to, 2 * S::block_bytes);
    copy_bulk(shared_address(m.raw[to][0]), p.data + c.head.k + at, S::block_bytes, raw_full + 8 * to);
    copy_bulk(shared_address(m.raw[to][1]), p.data + c.head.v + at, S::block_bytes, raw_full + 8 * to);
    if (++c.visit == c.now.n_visits) {
      c.now = c.next, c.has_now = c.has_next, c.visit = 0;
      if (c.has_now) c.head = p.head[c.now.place];
      c.has_next = c.has_now && entry_load(p, ++c.round + 1, c.next);
    }
    c.page = cursor_page(p, c);
  };
  if (thread == 0) {
    c.has_now = entry_load(p, 0, c.now);
    if (c.has_now) c.head = p.head[c.now.place];
    c.has_next = c.has_now && entry_load(p, 1, c.next);
    c.page = cursor_page(p, c);
    for (int i = 0; i < S::raw_stages; i++) copy_next(i);
  }
  entry x, next = {};
  bool more = entry_load(p, 0, next);
  for (int round = 1; more; round++) { /* the next entry is on its way while this one is worked on */
    x = uniform(next);
    more = entry_load(p, round, next);
    int last_row = x.e.row + x.e.n_rows - 1, n_tokens = x.e.kv_len + last_row / p.group + 1; /* up to the last row's own */
    { /* the queries: a row a thread */
      int row = min(x.e.row + thread, last_row), head = x.kv_head * p.group + row % p.group;
      barrier_wait(shared_address(&m.q_empty), q_parity);
      q_parity ^= 1;
      barrier_expect(shared_address(&m.q_full), DIM * 2);
      copy_bulk(shared_address(m.q[thread]),
                p.qkv + (size_t)(x.e.first_token + row / p.group) * p.width + (size_t)head * DIM, DIM * 2,
                shared_address(&m.q_full));
    }
    for (int visit = 0; visit < x.n_visits; visit++) {
      raw<FORMAT, DIM> r;
      barrier_wait(raw_full + 8 * raw_at, raw_parity);
      load_page<FORMAT, DIM>(m.raw[raw_at][0], m.raw[raw_at][1], r, warp, lane);
      barrier_wait(empty + 8 * s, parity);
      unpack_k<FORMAT, DIM>(r.k, m.tile[s].k, warp, lane);
      unpack_v<FORMAT, DIM>(r.v, m.tile[s].v, warp, lane);
      if (kv_traits<FORMAT>::has_params && thread < PAGE) {
        int t = thread, n = t % 8 / 2 * 16 + t / 16 * 4 + t / 8 % 2 * 2 + t % 2;
        struct token_params y = token_make<FORMAT>(r.k_pair, r.v_pair, p.scale * LOG2_E, p.k_scale, p.v_scale,
                                                   (visit + x.skip) * PAGE + t < n_tokens); /* the first visits are whole */
        m.column[s].ab[n] = make_float2(y.a, y.b);
        m.column[s].inv_zero[n] = make_float2(y.inv_s, y.zero);
        m.column[s].log_s[n] = y.log_s;
      }
      proxy_fence();
      barrier_arrive(full + 8 * s);
      asm volatile("bar.sync 1, 128;" ::: "memory"); /* all have read the raw page */
      if (thread == 0) copy_next(raw_at);
      if (++raw_at == S::raw_stages) raw_at = 0, raw_parity ^= 1;
      if (++s == S::stages) s = 0, parity ^= 1;
    }
  }
}

/* ---- the multiplying warpgroups ------------------------------------------------------------------ */

template <int FORMAT, int DIM>
struct rows { /* of a thread: two rows, l / 4 and + 8 of its warp's 16 */
  using traits = kv_traits<FORMAT>;
  uint32_t q[DIM / 16][4], p[4][4];
  float o[DIM / 2], s[PAGE / 2], max[2], sum[2], zeros[2], q_sum[2];
  int last[2];                             /* the last token that each sees */
  static constexpr float NOTHING = -1e38f; /* max before a row has seen a key: below all scores, but a number */

  /* The scores of keys that a row does not see. */
  template <class F>
  __device__ __forceinline__ void hide(int tile, F hidden) {
    int pair = threadIdx.x % 4, key = tile * PAGE + pair / 2 * 16 + pair % 2 * 8;
#pragma unroll
    for (int i = 0; i < 8; i++) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (hidden(key + i % 2 * 32 + i / 2 * 2 + j % 2, last[j / 2])) s[4 * i + j] = -INFINITY;
      }
    }
  }

  /* Scores in s to weights. ends: a row ends in this page or before it; holed: a row's hole reaches into it. Returns whether
   * what was summed up before must be multiplied by factor. */
  __device__ __forceinline__ bool weigh(const columns &c, int tile, bool ends, bool holed, int sink, int local, float slope,
                                        const float (&offset)[2], float (&factor)[2]) {
    int pair = threadIdx.x % 4;
    float top[2] = {-INFINITY, -INFINITY};
    if (traits::has_params) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        float4 ab = *(const float4 *)&c.ab[8 * i + 2 * pair];
        float2 l = *(const float2 *)&c.log_s[8 * i + 2 * pair];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          float a = j % 2 ? ab.z : ab.x, b = j % 2 ? ab.w : ab.y, log_s = j % 2 ? l.y : l.x;
          s[4 * i + j] = __fmaf_rn(s[4 * i + j], a, __fmaf_rn(-q_sum[j / 2], b, log_s));
        }
      }
    }
    if (ends) hide(tile, [&](int key, int last) { return key > last; });
    if (holed) hide(tile, [&](int key, int last) { return key >= sink && key <= last - local; });
#pragma unroll
    for (int i = 0; i < 8; i++) {
#pragma unroll
      for (int j = 0; j < 4; j++) top[j / 2] = fmaxf(top[j / 2], s[4 * i + j]);
    }
    float shift[2];
    bool grown = false;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (!traits::has_params) top[r] = __fmaf_rn(top[r], slope, offset[r]);
      grown |= top[r] - max[r] > WEIGHT_BITS;
    }
    grown = __any_sync(~0u, grown);
    if (grown) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float x = top[r];
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
        x = x - max[r] > WEIGHT_BITS ? x - WEIGHT_TOP : max[r];
        factor[r] = fast_exp2(max[r] - x);
        max[r] = x;
        sum[r] *= factor[r];
        zeros[r] *= factor[r];
      }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) shift[r] = traits::has_params ? max[r] : offset[r] - max[r];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float4 iz = make_float4(1, 0, 1, 0);
      if (traits::has_params) iz = *(const float4 *)&c.inv_zero[8 * i + 2 * pair];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int r = j / 2;
        float w = fast_exp2(traits::has_params ? s[4 * i + j] - shift[r] : __fmaf_rn(s[4 * i + j], slope, shift[r]));
        s[4 * i + j] = w;
        if (traits::has_params) {
          sum[r] = __fmaf_rn(w, j % 2 ? iz.z : iz.x, sum[r]);
          zeros[r] = __fmaf_rn(w, j % 2 ? iz.w : iz.y, zeros[r]);
        } else {
          sum[r] += w;
        }
      }
    }
    return grown;
  }

  __device__ __forceinline__ void pack() {
#pragma unroll
    for (int k = 0; k < 4; k++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        __half2 x = __floats2half2_rn(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
        p[k][i] = *(uint32_t *)&x;
      }
    }
  }
};

/* The two warpgroups issue their products in turns, so that one multiplies while the other makes weights of scores. */
__device__ __forceinline__ void turn_wait(int part) { asm volatile("bar.sync %0, 256;" ::"r"(2 + part) : "memory"); }
__device__ __forceinline__ void turn_give(int part) { asm volatile("bar.arrive %0, 256;" ::"r"(2 + part) : "memory"); }

template <int FORMAT, int DIM, bool TURNS>
__device__ __forceinline__ void consume(const struct attention_params &p, memory<FORMAT, DIM> &m) {
  using traits = kv_traits<FORMAT>;
  using S = shape<FORMAT, DIM>;
  constexpr int K_STEPS = DIM / 16;
  int part = threadIdx.x / 128 - 1, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, pair = lane % 4, s = 0;
  uint32_t parity = 0, q_parity = 0, full = shared_address(m.full), empty = shared_address(m.empty);
  float log2_scale = p.scale * LOG2_E;
  struct token_params same =
      token_make<FORMAT>(0, 0, log2_scale, p.k_scale, p.v_scale, true); /* if all tokens have the same */
  rows<FORMAT, DIM> x;
  entry y, next = {};
  auto release = [&](int i) {
    __syncwarp();
    if (lane < QTR_ARRIVING_LANES) barrier_arrive(empty + 8 * i);
  };
  constexpr uint32_t TILE = sizeof m.tile[0] / 16;
  uint32_t k_low = descriptor_low(shared_address(m.tile[0].k)), v_low = descriptor_low(shared_address(m.tile[0].v));
  auto scores = [&](int i) {
    uint32_t low = k_low + (uint32_t)i * TILE;
#pragma unroll
    for (int j = 0; j < K_STEPS; j++) wgmma(x.s, x.q[j], descriptor(low + (j / 4 * (PAGE * 128) + j % 4 * 32) / 16), j > 0);
    wgmma_commit();
  };
  auto results = [&](int i) {
    uint32_t low = v_low + (uint32_t)i * TILE;
#pragma unroll
    for (int j = 0; j < 4; j++) wgmma(x.o, x.p[j], descriptor(low + j * 2), 1);
    wgmma_commit();
  };
  if (TURNS && part == 1) turn_give(0);
  bool more = entry_load(p, 0, next);
  for (int round = 1; more; round++) {
    y = uniform(next);
    more = entry_load(p, round, next);
    size_t to[2];
    bool exists[2];
    float offset[2];
    int end = y.e.row + y.e.n_rows;
    barrier_wait(shared_address(&m.q_full), q_parity);
    q_parity ^= 1;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int in = part * 64 + warp * 16 + lane / 4 + 8 * r, row = min(y.e.row + in, end - 1), token = row / p.group;
      exists[r] = y.e.row + in < end;
      x.last[r] = y.e.kv_len + token;
      to[r] = ((size_t)(y.e.first_token + token) * p.n_heads + y.kv_head * p.group + row % p.group) * DIM;
      const uint8_t *q = m.q[in] + 16 * (pair % 2) + 32 * (pair / 2);
#pragma unroll
      for (int j = 0; j < K_STEPS / 4; j++) {
#pragma unroll
        for (int h = 0; h < 2; h++) { /* 8 dims: a pair of each of 4 steps */
          uint4 z = *(const uint4 *)(q + 64 * (2 * j + h));
          x.q[4 * j][r + 2 * h] = q_scale<FORMAT>(z.x, pair % 2), x.q[4 * j + 1][r + 2 * h] = q_scale<FORMAT>(z.y, pair % 2);
          x.q[4 * j + 2][r + 2 * h] = q_scale<FORMAT>(z.z, pair % 2);
          x.q[4 * j + 3][r + 2 * h] = q_scale<FORMAT>(z.w, pair % 2);
        }
      }
      x.max[r] = x.NOTHING;
      x.sum[r] = x.zeros[r] = 0;
    }
    __syncwarp();
    if (lane < QTR_ARRIVING_LANES) barrier_arrive(shared_address(&m.q_empty));
    if (traits::is_int) { /* the rows' sums */
      float sums[4] = {0, 0, 0, 0};
      __half2 ones = __float2half2_rn(pair % 2 ? 1 / traits::q_high : 1.0f);
#pragma unroll
      for (int j = 0; j < K_STEPS; j++) mma(sums, x.q[j], *(uint32_t *)&ones);
      x.q_sum[0] = sums[0], x.q_sum[1] = sums[2];
      offset[0] = -sums[0] * same.b, offset[1] = -sums[2] * same.b;
    } else {
      offset[0] = offset[1] = 0;
    }
    /* Visits up to the one that this warpgroup's last row ends in; the first that a row ends in; those that a hole reaches
     * into: the pages from the one that the sink ends in to the one that the last row's window begins in. */
    int first_row = min(y.e.row + part * 64, end - 1), last_row = min(y.e.row + part * 64 + 63, end - 1);
    int first_token = y.e.kv_len + first_row / p.group, last_token = y.e.kv_len + last_row / p.group;
    int n = TURNS ? y.n_visits : last_token / PAGE + 1 - y.skip, ends = (first_token + 1) / PAGE - y.skip;
    int hole = 0, hole_end = 0;
    if (y.place >= p.n_retrieval && last_token - p.local >= p.sink) {
      hole = p.sink / PAGE, hole_end = (last_token - p.local) / PAGE + 1 - y.skip;
    }
    auto weigh = [&](int visit, float(&factor)[2]) {
      return x.weigh(m.column[s], entry_tile(y, visit), visit >= ends, visit >= hole && visit < hole_end, p.sink, p.local,
                     same.a, offset, factor);
    };
#pragma unroll
    for (int i = 0; i < DIM / 2; i++) x.o[i] = 0;
    auto advance = [&]() {
      if (++s == S::stages) s = 0, parity ^= 1;
    };
    float factor[2];
    barrier_wait(full + 8 * s, parity);
    hold(x.q);
    wgmma_fence();
    scores(s);
    wgmma_wait<0>();
    hold(x.s);
    (void)weigh(0, factor);
    x.pack();
    for (int visit = 1; visit < n; visit++) {
      int before = s;
      advance();
      barrier_wait(full + 8 * s, parity);
      hold(x.s);
      hold(x.o);
      hold(x.p);
      if (TURNS) turn_wait(part);
      wgmma_fence();
      scores(s);
      results(before);
      if (TURNS) turn_give(1 - part);
      wgmma_wait<1>();
      hold(x.s);
      bool grown = weigh(visit, factor);
      wgmma_wait<0>();
      hold(x.o);
      hold(x.p);
      release(before);
      if (grown) {
#pragma unroll
        for (int i = 0; i < DIM / 2; i++) x.o[i] *= factor[i / 2 % 2];
      }
      x.pack();
    }
    hold(x.o);
    hold(x.p);
    wgmma_fence();
    results(s);
    wgmma_wait<0>();
    hold(x.o);
    release(s);
    advance();
    for (int visit = n; visit < y.n_visits; visit++) { /* the other warpgroup's */
      barrier_wait(full + 8 * s, parity);
      release(s);
      advance();
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
      for (int j = 1; j < 4; j *= 2) {
        x.sum[r] += __shfl_xor_sync(~0u, x.sum[r], j);
        x.zeros[r] += __shfl_xor_sync(~0u, x.zeros[r], j);
      }
      if (FORMAT == QTR_KV_INT8_STATIC) x.zeros[r] = 128 * x.sum[r];
      if (!exists[r]) continue;
      float f = (FORMAT == QTR_KV_INT8_STATIC ? p.v_scale : 1.0f) / x.sum[r];
#pragma unroll
      for (int i = 0; i < DIM / 8; i++) {
        float unit = i % 2 ? traits::out_high : traits::out_low;
        float a = __fmaf_rn(x.o[4 * i + 2 * r], unit, -x.zeros[r]) * f;
        float b = __fmaf_rn(x.o[4 * i + 2 * r + 1], unit, -x.zeros[r]) * f;
        *(__half2 *)(p.out + to[r] + 8 * i + 2 * pair) = __floats2half2_rn(a, b);
      }
    }
  }
}
#endif

template <int FORMAT, int DIM>
__global__ void __launch_bounds__(THREADS, 1) k_attention_prefill(const __grid_constant__ struct attention_params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = shape<FORMAT, DIM>;
  extern __shared__ __align__(1024) uint8_t shared[]; /* the only shared memory: begins at a multiple of 1,024 */
  memory<FORMAT, DIM> &m = *(memory<FORMAT, DIM> *)shared;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::stages; i++) {
      barrier_init(shared_address(&m.full[i]), 128);
      barrier_init(shared_address(&m.empty[i]), 8 * QTR_ARRIVING_LANES);
    }
    for (int i = 0; i < S::raw_stages; i++) barrier_init(shared_address(&m.raw_full[i]), 1);
    barrier_init(shared_address(&m.q_full), 128);
    barrier_init(shared_address(&m.q_empty), 8 * QTR_ARRIVING_LANES);
    barriers_show();
  }
  __syncthreads();
  qtr_begin();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(S::producer_registers));
    produce<FORMAT, DIM>(p, m);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(S::registers));
    if (p.group > 1) { /* else the second warpgroup often sees a page more than the first */
      consume<FORMAT, DIM, true>(p, m);
    } else {
      consume<FORMAT, DIM, false>(p, m);
    }
  }
#else
  __trap(); /* built for another GPU than the launch takes it for */
#endif
}

template <int FORMAT, int DIM>
cudaError_t launch(const struct attention_params &p, const struct qtr_attention_plan *plan, int n_sms, cudaStream_t stream) {
  auto kernel = k_attention_prefill<FORMAT, DIM>;
  constexpr size_t n_shared = sizeof(memory<FORMAT, DIM>);
  static_assert(n_shared <= 232448, "shared memory of a block");
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)n_shared);
  if (error != cudaSuccess) return error;
  long items = (long)plan->n_prefill * p.n_kv_heads;
  return qtr_launch(kernel, (unsigned)(items < n_sms ? items : n_sms), THREADS, n_shared, stream, p);
}

}  // namespace

bool qtr_cuda_attention_has_prefill(void) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, k_attention_prefill<QTR_KV_INT4, 128>) == cudaSuccess &&
         attributes.ptxVersion >= 90;
}

cudaError_t qtr_cuda_attention_prefill(const struct attention_params *p, int format, const struct qtr_attention_plan *plan,
                                       cudaStream_t stream) {
  int device, n_sms;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  if (!qtr_cuda_attention_has_prefill())
    return qtr_cuda_attention_generic(p, format, stream); /* decode writes its rows again */
  bool large = p->dim == 128;
  switch (format) {
    case QTR_KV_F16:
      return large ? launch<QTR_KV_F16, 128>(*p, plan, n_sms, stream) : launch<QTR_KV_F16, 64>(*p, plan, n_sms, stream);
    case QTR_KV_INT8:
      return large ? launch<QTR_KV_INT8, 128>(*p, plan, n_sms, stream) : launch<QTR_KV_INT8, 64>(*p, plan, n_sms, stream);
    case QTR_KV_INT4:
      return large ? launch<QTR_KV_INT4, 128>(*p, plan, n_sms, stream) : launch<QTR_KV_INT4, 64>(*p, plan, n_sms, stream);
    default:
      return large ? launch<QTR_KV_INT8_STATIC, 128>(*p, plan, n_sms, stream)
                   : launch<QTR_KV_INT8_STATIC, 64>(*p, plan, n_sms, stream);
  }
}
