/* gemm_sm90.cu - the Hopper kernel of the integer matrices (spec B.2 - B.4): TMA, mbarriers, wgmma with the weights as the
 * A operand in registers, Y^T = W X^T.
 *
 * A block has one producer warp and two or four consumer warpgroups of 64 weight rows each. A stage of the pipeline holds
 * N rows of activations (TMA, 128-byte swizzle) and repacked weights (bulk copies). A consumer loads its codes from shared
 * memory, makes int8 fragments of the next 128 columns while the tensor cores work on these (two sets of fragments in
 * rotation), and nothing dequantised returns to memory. With a cluster of two, both blocks work on the same tokens: each
 * loads half of the activations and multicasts it.
 *
 * One token: a block makes its activations itself (QUANT): it asks for as many weights as fit, waits for the kernel
 * before, reads the fp16 rows, normalises and quantises them (row_quant.cuh: the bits of rows.cu) into a region that holds
 * all columns. That costs each block about a microsecond, where a kernel of its own, one block of it, costs four or five.
 *
 * Few tokens: tiles of 64 rows; the four warpgroups take every fourth block of 128 columns and add in shared memory. Some
 * more: a cluster of two blocks divides the columns of one tile; the int32 partial sums, exact in any order, meet in the
 * shared memory of the block that owns the tokens. Otherwise a persistent grid walks whole tiles.
 *
 * The epilogue turns the transposed tile round by stmatrix through shared memory; the copy engine writes it out, clips what
 * lies outside, and adds the residual in L2. */
#include <cuda.h>
#include <string.h>

#include "backend/cuda/gemm_internal.h"
#include "backend/cuda/gemm_wgmma.h"
#include "backend/cuda/launch.cuh"
#include "backend/cuda/ptx.cuh"
#include "backend/cuda/row_quant.cuh"

#pragma nv_diag_suppress 177 /* other architectures use none of the device functions */
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
#define HAVE_SM90A 1
#endif

#define SHARED_MAX 232448

/* ---- PTX ----------------------------------------------------------------------------------------- */

/* On the barrier at the same address of block `rank` of the cluster. */
static __device__ __forceinline__ void barrier_arrive_at(uint32_t bar, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 a;\nmapa.shared::cluster.u32 a, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [a];\n}\n" ::"r"(bar),
      "r"(rank)
      : "memory");
}
static __device__ __forceinline__ void cluster_sync(void) {
  asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}
/* The same place in block `rank` of the cluster. */
static __device__ __forceinline__ uint32_t remote_address(uint32_t at, uint32_t rank) {
  uint32_t r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(at), "r"(rank));
  return r;
}
static __device__ __forceinline__ uint32_t cluster_rank(void) {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
static __device__ __forceinline__ void group_sync(int id) { asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory"); }

/* Blocks of 128 columns from block k, rows from `token`: the box of the map. PAIR 2: to the same place of both blocks. */
template <int PAIR>
static __device__ __forceinline__ void load_tile(uint32_t to, const CUtensorMap *map, int32_t k, int32_t token,
                                                 uint32_t bar) {
  if (PAIR == 1) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
            "r"(to),
        "l"(map), "r"(0), "r"(token), "r"(k), "r"(bar)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
        "{%2, "
        "%3, %4}], [%5], %6;" ::"r"(to),
        "l"(map), "r"(0), "r"(token), "r"(k), "r"(bar), "h"((uint16_t)((1 << PAIR) - 1))
        : "memory");
  }
}

static __device__ __forceinline__ uint4 shared_load16(uint32_t at) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
  return v;
}
static __device__ __forceinline__ float2 shared_load_float2(uint32_t at) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at));
  return v;
}
static __device__ __forceinline__ void shared_store_float(uint32_t at, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(v) : "memory");
}
/* Two 8 x 8 matrices of 16 bits, transposed; lanes 0...15 give the addresses of rows. */
static __device__ __forceinline__ void matrix_store2(uint32_t at, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at), "r"(a), "r"(b) : "memory");
}
static __device__ __forceinline__ void matrix_store1(uint32_t at, uint32_t a) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(at), "r"(a) : "memory");
}
/* Beyond fp16: the largest number, no infinity. */
static __device__ __forceinline__ uint32_t pack_half(float low, float high) {
  uint32_t h;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(h) : "f"(high), "f"(low));
  return h;
}

/* ---- shapes -------------------------------------------------------------------------------------- */

/* A tile is ROWS x N. ROWS 128: two consumers have 64 rows each; a stage is 128 columns. ROWS 64: four consumers divide the
 * columns; a stage is four blocks of 128, one each. */
template <int FORMAT, int N, int ROWS, int SPLIT>
struct shape {
  static constexpr bool NARROW = ROWS == 64;
  static constexpr int CONSUMERS = NARROW ? 4 : 2, THREADS = 128 * (1 + CONSUMERS);
  static constexpr int CTAS = !NARROW && N <= 64 ? 2 : 1;                           /* blocks of an SM */
  static constexpr int REGISTERS = NARROW ? 104 : CTAS == 2 ? 96 : 232;             /* of a consumer's thread */
  static constexpr int BLOCKS = NARROW ? CONSUMERS : 1;                             /* of columns, in a stage */
  static constexpr int OWNERS = SPLIT < N / 8 ? SPLIT : N / 8, TOKENS = N / OWNERS; /* of a split tile; TOKENS each */
  static constexpr int CODES = FORMAT == QTR_LINEAR_W8A8 ? 8192 : 4096;             /* of a block: 64 rows, 128 columns */
  static constexpr int GROUP = FORMAT == QTR_LINEAR_W4A8_G128 ? 128 : 0;            /* and its constants */
  static constexpr int BLOCK = CODES + GROUP, W_BYTES = CONSUMERS * BLOCK;
  static constexpr int X_BLOCK = N * QTR_TILE_K, X_BYTES = X_BLOCK * BLOCKS;
  static constexpr int CHUNK = TOKENS % 32 == 0   ? 32
                               : TOKENS % 16 == 0 ? 16
                                                  : 8,
                       CHUNKS = TOKENS / CHUNK;                            /* tokens of an epilogue buffer */
  static constexpr int BUFFERS = N < 256 ? CHUNKS : CODES == 8192 ? 3 : 7; /* of a consumer; a store takes a while */
  static constexpr int WRITERS = NARROW ? 1 : 2;                           /* consumers that do an epilogue */
  static constexpr int BUFFER = CHUNK * 128, EPILOGUE = WRITERS * BUFFERS * BUFFER;
  static constexpr int ROOM = CTAS == 1 ? SHARED_MAX : (SHARED_MAX + 1024) / 2 - 1024;
  static constexpr int FIXED = EPILOGUE + WRITERS * 2 * TOKENS * 4 + 256;
  static constexpr int FIT = (ROOM - FIXED) / (X_BYTES + W_BYTES);
  static constexpr int STAGES = FIT < 16 ? FIT : 16;
  static constexpr int SUMS = NARROW ? (CONSUMERS - 1) * N * 256 : (SPLIT - 1) * TOKENS * 512; /* what an owner receives */
};

/* Where things lie in a block's shared memory, and the stages of its ring. With QUANT both depend on the columns:
 * activations of all of them at the beginning, partial sums of reductions at the end. */
struct layout {
  uint32_t buffers, w; /* behind the activations; weights, a stage each */
  uint32_t tokens;     /* [writer][scale, sum][TOKENS] */
  uint32_t full, empty, part;
  uint32_t sums; /* over what is free by then */
  uint32_t end;
  int32_t stages;
};
static constexpr int PARTS = 2 * QTR_ROW_SHARED * 4; /* bytes: rows alternate */

template <class S, bool QUANT>
static __host__ __device__ __forceinline__ constexpr struct layout layout_make(uint32_t shared, int32_t tile_stages) {
  struct layout l = {};
  const int x_bytes = (QUANT ? tile_stages : S::STAGES) * S::X_BYTES;
  const int fit = (S::ROOM - S::FIXED - PARTS - x_bytes) / S::W_BYTES;
  l.stages = !QUANT ? S::STAGES : fit < 16 ? fit : 16;
  l.buffers = shared + x_bytes;
  l.w = l.buffers + S::EPILOGUE;
  l.tokens = l.w + l.stages * S::W_BYTES;
  l.full = l.tokens + S::WRITERS * 2 * S::TOKENS * 4;
  l.empty = l.full + 8 * l.stages;
  l.part = l.empty + 8 * l.stages;
  l.end = l.part + (QUANT ? PARTS : 0);
  l.sums = !QUANT && S::SUMS <= x_bytes ? shared : l.w;
  return l;
}

/* Groups of eight of a row that a consumer's thread keeps. */
enum { ROW_GROUPS = 4 };

/* Columns that a block can make itself, and room for three stages of weights beside them. */
template <class S>
static bool quant_fits(int32_t tile_stages) {
  return tile_stages * S::BLOCKS * QTR_TILE_K <= ROW_GROUPS * 8 * 128 * S::CONSUMERS &&
         layout_make<S, true>(0, tile_stages).stages >= 3;
}

/* ---- consumer ------------------------------------------------------------------------------------ */

/* QUANT: waits for the kernel before and makes the activations of all n_tokens <= 8 rows, past n_in zeros; rows past
 * n_tokens stay what they are, nobody looks at their products. This thread's scale and sum: those of token threadIdx.x %
 * 128. */
template <class S>
static __device__ __forceinline__ void make_activations(const struct qtr_gemm_work &p, uint8_t *memory, uint32_t shared,
                                                        const struct layout &l, int32_t tile_stages, float *x_scale,
                                                        float *x_sum) {
  constexpr int THREADS = S::CONSUMERS * 128, NV = ROW_GROUPS;
  const int t = (int)threadIdx.x - 128, limit = tile_stages * S::BLOCKS * QTR_TILE_K;
  float *part = (float *)(memory + (l.part - shared));
  uint4 x[NV], w[NV];
#pragma unroll
  for (int k = 0; k < NV; k++) {
    int at = (k * THREADS + t) * 8;
    w[k] = p.norm && at < p.n_in ? *(const uint4 *)(p.norm + at) : make_uint4(0, 0, 0, 0);
  }
  qtr_wait();
  for (int32_t token = 0; token < p.n_tokens; token++) {
#pragma unroll
    for (int k = 0; k < NV; k++) { /* from the L2: this block may be older than the values */
      int at = (k * THREADS + t) * 8;
      x[k] = at < p.n_in ? __ldcg((const uint4 *)(p.row + (size_t)token * p.n_in + at)) : make_uint4(0, 0, 0, 0);
    }
    struct qtr_row_result r =
        qtr_row_measure<NV, THREADS>(x, w, p.norm != NULL, p.eps, p.n_in, t, part + token % 2 * QTR_ROW_SHARED, [] {
          asm volatile("bar.sync 3, %0;" ::"n"(THREADS) : "memory");
        });
#pragma unroll
    for (int k = 0; k < NV; k++) { /* rows of 128 bytes; row `token` of eight, swizzled */
      int at = (k * THREADS + t) * 8;
      uint2 c = qtr_row_codes(x[k], w[k], p.norm != NULL, r);
      uint32_t to = shared + at / 128 * S::X_BLOCK + token * 128 + ((at / 16 ^ token) % 8) * 16 + at % 16;
      if (at < limit) asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(c.x), "r"(c.y) : "memory");
    }
    if (t % 128 == token) *x_scale = r.scale, *x_sum = r.sum;
  }
  proxy_fence();
  asm volatile("bar.sync 3, %0;" ::"n"(THREADS) : "memory");
}

/* Codes of one stage -> fragments of its four k32 steps. w: this half's codes in shared memory; group: its constants. */
template <int FORMAT>
static __device__ __forceinline__ void load_fragments(uint32_t w, uint32_t group, uint32_t (&a)[16]) {
  uint32_t at = w + threadIdx.x % 128 * 16;
  if (FORMAT == QTR_LINEAR_W8A8) {
#pragma unroll
    for (int s = 0; s < 4; s++) {
      uint4 v = shared_load16(at + s * 2048);
      a[4 * s] = v.x, a[4 * s + 1] = v.y, a[4 * s + 2] = v.z, a[4 * s + 3] = v.w;
    }
    return;
  }
  uint4 v[2] = {shared_load16(at), shared_load16(at + 2048)};
  uint32_t s2[2] = {0, 0}, offset[2] = {0, 0};
  if (FORMAT == QTR_LINEAR_W4A8_G128) {
    uint32_t c = shared_load4(group + threadIdx.x % 128 / 4 * 4);
    s2[0] = c & 255u, s2[1] = c >> 16 & 255u;
    offset[0] = qtr_dequant_offset(c >> 8 & 255u), offset[1] = qtr_dequant_offset(c >> 24);
  }
#pragma unroll
  for (int s = 0; s < 4; s++) {
    uint32_t word[2] = {s % 2 ? v[s / 2].z : v[s / 2].x, s % 2 ? v[s / 2].w : v[s / 2].y};
#pragma unroll
    for (int r = 0; r < 2; r++) {
      uint32_t low = qtr_dequant_low(word[r]), high = qtr_dequant_high(word[r]);
      if (FORMAT == QTR_LINEAR_W4A8_G128) {
        low = qtr_dequant_group(low, s2[r], offset[r]);
        high = qtr_dequant_group(high, s2[r], offset[r]);
      }
      a[4 * s + r] = low;
      a[4 * s + 2 + r] = high;
    }
  }
}

/* K-major, 128-byte swizzle: rows of 128 bytes, 1,024 bytes between groups of eight rows. */
static __device__ __forceinline__ uint64_t tile_descriptor(uint32_t at) {
  return (uint64_t)(at >> 4 & 0x3fff) | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

template <int N>
static __device__ __forceinline__ void multiply(int32_t (&acc)[N / 2], uint32_t (&a)[16], uint32_t x, int accumulate) {
  uint64_t b = tile_descriptor(x);
#pragma unroll
  for (int i = 0; i < 16; i++) asm volatile("" : "+r"(a[i])::"memory"); /* made before the fence, not after it */
  wgmma_fence();
#pragma unroll
  for (int s = 0; s < 4; s++) wgmma<N>::mma(acc, a + 4 * s, b + (uint64_t)(2 * s), s ? 1 : accumulate);
  wgmma_commit();
}

/* The ring of stages as one side sees it. */
struct ring {
  int32_t stage;
  uint32_t phase;
};
static __device__ __forceinline__ void ring_advance(struct ring *r, int32_t n_stages) {
  if (++r->stage == n_stages) r->stage = 0, r->phase ^= 1u;
}

template <int PAIR>
static __device__ __forceinline__ void stage_release(uint32_t empty) {
  __syncwarp();
  uint32_t lane = threadIdx.x % 32;
  if (PAIR == 1) {
    if (lane < QTR_ARRIVING_LANES) barrier_arrive(empty);
  } else if (QTR_ARRIVING_LANES > 1) {
    for (uint32_t i = 0; i < PAIR; i++) barrier_arrive_at(empty, i);
  } else if (lane < PAIR) {
    barrier_arrive_at(empty, lane);
  }
}

/* acc = the product over n stages of the ring. QUANT: activations are those of the tile's first column on. */
template <int FORMAT, int N, int ROWS, int PAIR, int SPLIT, bool QUANT>
static __device__ __forceinline__ void consume(int32_t (&acc)[N / 2], uint32_t shared, const struct layout &l, uint32_t half,
                                               int32_t n, struct ring *r) {
  using S = shape<FORMAT, N, ROWS, SPLIT>;
  uint32_t a0[16], a1[16];
  int32_t before = -1, now, k = 0; /* before: stage in flight; k: stages done */

#define STAGE_LOAD(a)                                                                 \
  barrier_wait(l.full + 8 * r->stage, r->phase);                                      \
  {                                                                                   \
    uint32_t w_ = l.w + r->stage * S::W_BYTES;                                        \
    load_fragments<FORMAT>(w_ + half * S::BLOCK, w_ + half * S::BLOCK + S::CODES, a); \
  }
#define STAGE_STEP(a, next, first)                                                                                \
  now = r->stage;                                                                                                 \
  multiply<N>(acc, a, shared + (QUANT ? k++ : now) * S::X_BYTES + (S::NARROW ? half * S::X_BLOCK : 0), !(first)); \
  ring_advance(r, l.stages);                                                                                      \
  wgmma_wait<1>();                                                                                                \
  if (before >= 0) stage_release<PAIR>(l.empty + 8 * before);                                                     \
  before = now;                                                                                                   \
  if (--n == 0) break;                                                                                            \
  STAGE_LOAD(next)

  STAGE_LOAD(a0)
  for (bool first = true;; first = false) {
    STAGE_STEP(a0, a1, first)
    STAGE_STEP(a1, a0, false)
  }
#undef STAGE_STEP
#undef STAGE_LOAD
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < N / 2; i++) asm volatile("" : "+r"(acc[i])::"memory");
  stage_release<PAIR>(l.empty + 8 * before);
}

/* ROWS 64: the other consumers' acc are added to the first one's; theirs go to the stages' memory. */
template <int N, int CONSUMERS>
static __device__ __forceinline__ void combine_columns(int32_t (&acc)[N / 2], uint32_t sums, uint32_t consumer) {
  const uint32_t at = sums + threadIdx.x % 128 * 16;
  asm volatile("bar.sync 3, %0;" ::"n"(CONSUMERS * 128) : "memory"); /* nobody reads stages any more */
  if (consumer) {
#pragma unroll
    for (int i = 0; i < N / 2; i += 4) {
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at + (consumer - 1) * (N * 256) + i / 4 * 2048),
                   "r"(acc[i]), "r"(acc[i + 1]), "r"(acc[i + 2]), "r"(acc[i + 3])
                   : "memory");
    }
  }
  asm volatile("bar.sync 3, %0;" ::"n"(CONSUMERS * 128) : "memory");
  if (consumer) return;
#pragma unroll
  for (int b = 0; b < CONSUMERS - 1; b++) {
#pragma unroll
    for (int i = 0; i < N / 2; i += 4) {
      uint4 v = shared_load16(at + b * (N * 256) + i / 4 * 2048);
      acc[i] += (int32_t)v.x, acc[i + 1] += (int32_t)v.y, acc[i + 2] += (int32_t)v.z, acc[i + 3] += (int32_t)v.w;
    }
  }
}

/* A split tile: every block gives each owner the partial sums of the owner's tokens; mine = the whole sums of this block's
 * tokens, if it is an owner. The stages' memory is free by now, and receives: [block][half][four values][128 threads][16].
 */
template <int FORMAT, int N, int ROWS, int SPLIT>
static __device__ __forceinline__ void combine(int32_t (&acc)[N / 2],
                                               int32_t (&mine)[shape<FORMAT, N, ROWS, SPLIT>::TOKENS / 2], uint32_t sums,
                                               uint32_t half, uint32_t rank) {
  using S = shape<FORMAT, N, ROWS, SPLIT>;
  constexpr int R = S::TOKENS / 2, BLOCK = 2 * R / 4 * 2048; /* what one block sends to an owner */
  const uint32_t at = sums + (half * (R / 4) * 128 + threadIdx.x % 128) * 16;
  cluster_sync(); /* nobody reads stages any more */
#pragma unroll
  for (int o = 0; o < S::OWNERS; o++) {
    if ((uint32_t)o == rank) {
#pragma unroll
      for (int i = 0; i < R; i++) mine[i] = acc[o * R + i];
    } else {
      uint32_t to = remote_address(at + (rank - (rank > (uint32_t)o)) * BLOCK, (uint32_t)o);
#pragma unroll
      for (int i = 0; i < R; i += 4) {
        const int32_t *v = acc + o * R + i;
        asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to + i / 4 * 2048), "r"(v[0]), "r"(v[1]),
                     "r"(v[2]), "r"(v[3])
                     : "memory");
      }
    }
  }
  cluster_sync();
  if (rank >= (uint32_t)S::OWNERS) return;
#pragma unroll
  for (int b = 0; b < SPLIT - 1; b++) {
#pragma unroll
    for (int i = 0; i < R; i += 4) {
      uint4 v = shared_load16(at + b * BLOCK + i / 4 * 2048);
      mine[i] += (int32_t)v.x, mine[i + 1] += (int32_t)v.y, mine[i + 2] += (int32_t)v.z, mine[i + 3] += (int32_t)v.w;
    }
  }
}

/* What the epilogue needs from memory, asked for before the product so that it is there after it. */
template <int T>
struct scales {
  struct row_params row[2];                               /* rows g and g + 8 of the warp's sixteen */
  float x_scale[(T + 127) / 128], x_sum[(T + 127) / 128]; /* tokens t, t + 128 */
};
template <bool ZERO, int T, bool QUANT>
static __device__ __forceinline__ struct scales<T> load_scales(const struct qtr_gemm_work &p, int32_t row0, int32_t token0) {
  const int32_t t = (int32_t)threadIdx.x % 128, r0 = row0 + t / 32 * 16 + t % 32 / 4;
  struct scales<T> s;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    s.row[i].scale = p.scale[r0 + 8 * i];
    s.row[i].szero = ZERO ? p.szero[r0 + 8 * i] : 0;
    s.row[i].bias = p.bias ? p.bias[r0 + 8 * i] : 0;
  }
#pragma unroll
  for (int i = 0; i < (T + 127) / 128; i++) {
    bool in = !QUANT && t + 128 * i < T && token0 + t + 128 * i < p.n_tokens;
    s.x_scale[i] = in ? p.x_scale[token0 + t + 128 * i] : 0;
    s.x_sum[i] = ZERO && in ? p.x_sum[token0 + t + 128 * i] : 0;
  }
  return s;
}

/* acc: 64 rows (from row0) x T tokens. buffers: BUFFERS of CHUNK tokens x 64 fp16 (SILU_MUL: 32), swizzled as the map says.
 */
template <bool ZERO, int T, int CHUNK, int BUFFERS>
static __device__ __forceinline__ void epilogue(const int32_t (&acc)[T / 2], const struct scales<T> &s,
                                                const struct qtr_gemm_work &p, const CUtensorMap *map, uint32_t buffers,
                                                uint32_t tokens, int bar, int32_t row0, int32_t token0) {
  const uint32_t t = threadIdx.x % 128, warp = t / 32, lane = t % 32, c = lane % 4;
  const bool silu = p.epilogue == QTR_EPILOGUE_SILU_MUL, add = p.epilogue == QTR_EPILOGUE_ADD;
  const uint32_t sums = tokens + T * 4;
#pragma unroll
  for (int i = 0; i < (T + 127) / 128; i++) {
    if (t + 128 * i < T) {
      shared_store_float(tokens + 4 * (t + 128 * i), s.x_scale[i]);
      if (ZERO) shared_store_float(sums + 4 * (t + 128 * i), s.x_sum[i]);
    }
  }
  if (t == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); /* the last tile's buffers */
  group_sync(bar);

  if (p.epilogue == QTR_EPILOGUE_LOGITS || !p.vector) { /* straight from the registers: F32, or rows that are not aligned */
    const int32_t r0 = (silu ? row0 / 2 + (int32_t)warp * 8 : row0 + (int32_t)warp * 16) + (int32_t)lane / 4;
#pragma unroll
    for (int i = 0; i < T / 2; i++) {
      int32_t token = 8 * (i / 4) + 2 * (int32_t)c + i % 2, r = r0 + 8 * (i / 2 % 2);
      float xs = __uint_as_float(shared_load4(tokens + 4 * token)),
            sum = ZERO ? __uint_as_float(shared_load4(sums + 4 * token)) : 0;
      float y = gemm_value<ZERO>(acc[i], s.row[i / 2 % 2], xs, sum);
      if (silu && i / 2 % 2) continue;
      if (silu) y = gemm_silu_mul(y, gemm_value<ZERO>(acc[i | 2], s.row[1], xs, sum));
      if (token0 + token >= p.n_tokens || r >= p.n_out) continue;
      size_t at = (size_t)(token0 + token) * (size_t)p.n_out + (size_t)r;
      if (p.epilogue == QTR_EPILOGUE_LOGITS) {
        ((float *)p.out)[at] = y;
      } else {
        __half *out = (__half *)p.out + at;
        y = fminf(fmaxf(y, -65504.0f), 65504.0f);
        *out = add ? __hadd(*out, __float2half_rn(y)) : __float2half_rn(y);
      }
    }
    group_sync(bar); /* before anyone writes the next tile's scales */
    return;
  }

  const int32_t out_row = silu ? row0 / 2 : row0;
  const bool inside = out_row < p.n_out;
#pragma unroll
  for (int c0 = 0; c0 < T; c0 += CHUNK) {
    if (token0 + c0 >= p.n_tokens) break;
    const uint32_t buffer = buffers + c0 / CHUNK % BUFFERS * (CHUNK * 128);
#pragma unroll
    for (int j = 0; j < CHUNK / 8; j++) {
      const int32_t *a = acc + 4 * (c0 / 8 + j);
      const uint32_t token = c0 + 8 * j + 2 * c, row = 8 * j + lane % 8; /* row: of the buffer, this lane's address */
      float2 xs = shared_load_float2(tokens + 4 * token),
             sum = ZERO ? shared_load_float2(sums + 4 * token) : make_float2(0, 0);
      float y0 = gemm_value<ZERO>(a[0], s.row[0], xs.x, sum.x), y1 = gemm_value<ZERO>(a[1], s.row[0], xs.y, sum.y);
      float z0 = gemm_value<ZERO>(a[2], s.row[1], xs.x, sum.x), z1 = gemm_value<ZERO>(a[3], s.row[1], xs.y, sum.y);
      if (silu) {
        matrix_store1(buffer + row * 64 + (warp ^ row / 2 % 4) * 16,
                      pack_half(gemm_silu_mul(y0, z0), gemm_silu_mul(y1, z1)));
      } else { /* lanes 0...7: rows g, 8...15: rows g + 8 */
        uint32_t at = buffer + row * 128 + ((warp * 2 + lane / 8 % 2) ^ row % 8) * 16;
        matrix_store2(at, pack_half(y0, y1), pack_half(z0, z1));
      }
    }
    proxy_fence();
    if (t == 0 && c0 / CHUNK + 1 >= BUFFERS && c0 + CHUNK < T) { /* the next buffer is free again */
      asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(BUFFERS > 2 ? BUFFERS - 2 : 0) : "memory");
    }
    group_sync(bar);
    if (t == 0) {
      if (inside && add) {
        asm volatile(
            "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%1, %2, %4}], [%3];" ::"l"(map),
            "r"(out_row), "r"(token0 + c0), "r"(buffer), "r"(0)
            : "memory");
      } else if (inside) {
        asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %4}], [%3];" ::"l"(map),
                     "r"(out_row), "r"(token0 + c0), "r"(buffer), "r"(0)
                     : "memory");
      }
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
  }
}

/* Stage k of the tile of blocks in row m. ROWS 64: past the last column whatever was there stays, the activations are zero.
 */
template <class S, bool QUANT>
static __device__ __forceinline__ void load_weights(uint32_t to, const struct qtr_gemm_work &p, int32_t m, int32_t k,
                                                    uint32_t bar) {
  const uint32_t n = S::NARROW ? (uint32_t)min(S::BLOCKS, p.k_steps - k * S::BLOCKS) : 1;
  const uint8_t *from = p.code + ((size_t)(S::NARROW ? m : 2 * m) * p.k_steps + (size_t)k * S::BLOCKS) * S::BLOCK;
  barrier_expect(bar, (QUANT ? 0 : S::X_BYTES) + (S::NARROW ? n * S::BLOCK : S::W_BYTES));
  copy_bulk(to, from, n * S::BLOCK, bar);
  if (!S::NARROW) copy_bulk(to + S::BLOCK, from + (size_t)p.k_steps * S::BLOCK, S::BLOCK, bar);
}

/* PAIR blocks of a cluster share activations, or SPLIT blocks share a tile; not both. QUANT: one tile of tokens, made here.
 */
template <int FORMAT, int N, int ROWS, int PAIR, int SPLIT, bool QUANT>
__global__ void __launch_bounds__((shape<FORMAT, N, ROWS, SPLIT>::THREADS), (shape<FORMAT, N, ROWS, SPLIT>::CTAS))
    k_gemm_sm90(const __grid_constant__ struct qtr_gemm_work p, const __grid_constant__ CUtensorMap x_map,
                const __grid_constant__ CUtensorMap out_map) {
#ifdef HAVE_SM90A
  static_assert(PAIR == 1 || SPLIT == 1, "one kind of cluster");
  static_assert(ROWS == 128 || (PAIR == 1 && SPLIT == 1), "narrow tiles are whole");
  static_assert(!QUANT || (N == 8 && PAIR == 1 && SPLIT == 1), "activations are made for one group of eight tokens");
  using S = shape<FORMAT, N, ROWS, SPLIT>;
  constexpr int CLUSTER = PAIR * SPLIT;
  constexpr bool ZERO = FORMAT == QTR_LINEAR_W4A8;
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = shared_address(memory);
  const uint32_t rank = CLUSTER == 1 ? 0 : cluster_rank();
  const int32_t m_groups = (p.m_tiles + PAIR - 1) / PAIR, first = (int32_t)blockIdx.x / CLUSTER,
                step = (int32_t)gridDim.x / CLUSTER;
  const int32_t stages = (p.k_steps + S::BLOCKS - 1) / S::BLOCKS; /* of a tile; this block's are s0 ... s1 - 1 */
  const int32_t s0 = SPLIT == 1 ? 0 : (int32_t)rank * stages / SPLIT,
                s1 = SPLIT == 1 ? stages : ((int32_t)rank + 1) * stages / SPLIT;
  const struct layout l = layout_make<S, QUANT>(shared, stages);

  if (threadIdx.x == 0) {
    if (!QUANT) asm volatile("prefetch.tensormap [%0];" ::"l"(&x_map) : "memory");
    for (int i = 0; i < l.stages; i++) {
      barrier_init(l.full + 8 * i, 1);
      barrier_init(l.empty + 8 * i, 4 * S::CONSUMERS * PAIR * QTR_ARRIVING_LANES);
    }
    barriers_show();
  }
  if (PAIR == 1) {
    __syncthreads();
  } else {
    cluster_sync();
  }

  qtr_let_next();
  struct ring r = {0, 0};
  const uint32_t group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0); /* known to be one for a warp */
  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      /* Weights do not depend on the kernel before this one: as many as fit are asked for while it may still run. */
      const int32_t early = p.dependent ? min(l.stages, s1 - s0) : 0;
      for (int32_t tile = first; tile < p.n_pairs; tile += step) {
        int32_t m, n;
        qtr_tile_place(p.raster, p.n_tiles, m_groups, tile, &m, &n);
        m = min(m * PAIR + (PAIR > 1 ? (int32_t)rank : 0), p.m_tiles - 1);
        if (tile == first) {
          for (int32_t i = 0; i < early; i++) load_weights<S, QUANT>(l.w + i * S::W_BYTES, p, m, s0 + i, l.full + 8 * i);
          if (!QUANT) qtr_wait(); /* else consumers wait, this warp reads weights only */
        }
        for (int32_t k = s0; k < s1; k++) {
          const uint32_t bar = l.full + 8 * r.stage, x = shared + r.stage * S::X_BYTES, part = PAIR > 1 ? rank : 0;
          if (tile != first || k - s0 >= early) {
            barrier_wait(l.empty + 8 * r.stage, r.phase ^ 1u);
            load_weights<S, QUANT>(l.w + r.stage * S::W_BYTES, p, m, k, bar);
          }
          if (!QUANT) {
            load_tile<PAIR>(x + part * (S::X_BYTES / PAIR), &x_map, k * S::BLOCKS, n * N + (int32_t)part * (N / PAIR), bar);
          }
          ring_advance(&r, l.stages);
        }
      }
    }
    __syncwarp();
    if (SPLIT > 1) cluster_sync(), cluster_sync(); /* those of combine */
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(S::REGISTERS));
    const uint32_t half = group - 1, place = S::NARROW ? 0 : half;
    const uint32_t buffers = l.buffers + place * S::BUFFERS * S::BUFFER, tokens = l.tokens + place * 2 * S::TOKENS * 4;
    int32_t acc[N / 2];
    float x_scale = 0, x_sum = 0; /* QUANT: of token threadIdx.x % 128 */
    if constexpr (QUANT) {
      make_activations<S>(p, memory, shared, l, stages, &x_scale, &x_sum);
    } else {
      qtr_wait();
    }
    for (int32_t tile = first; tile < p.n_pairs; tile += step) {
      int32_t m, n;
      qtr_tile_place(p.raster, p.n_tiles, m_groups, tile, &m, &n);
      if (PAIR > 1) m = m * PAIR + (int32_t)rank;
      const int32_t row0 = m * ROWS + 64 * (int32_t)place, token0 = n * N + (SPLIT > 1 ? (int32_t)rank * S::TOKENS : 0);
      struct scales<S::TOKENS> s = {};
      if (m < p.m_tiles) s = load_scales<ZERO, S::TOKENS, QUANT>(p, row0, token0);
      if (QUANT) s.x_scale[0] = x_scale, s.x_sum[0] = x_sum;
      consume<FORMAT, N, ROWS, PAIR, SPLIT, QUANT>(acc, shared, l, half, s1 - s0, &r);
      if (S::NARROW) {
        combine_columns<N, S::CONSUMERS>(acc, l.sums, half);
        if (half) break; /* one tile a block */
      }
      if constexpr (SPLIT > 1) {
        int32_t mine[S::TOKENS / 2];
        combine<FORMAT, N, ROWS, SPLIT>(acc, mine, l.sums, place, rank);
        if (rank < (uint32_t)S::OWNERS) {
          epilogue<ZERO, S::TOKENS, S::CHUNK, S::BUFFERS>(mine, s, p, &out_map, buffers, tokens, 1 + (int)half, row0,
                                                          token0);
        }
      } else if (m < p.m_tiles) {
        epilogue<ZERO, N, S::CHUNK, S::BUFFERS>(acc, s, p, &out_map, buffers, tokens, 1 + (int)half, row0, token0);
      }
    }
    if (threadIdx.x % 128 == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
  if (PAIR > 1) cluster_sync(); /* nobody leaves while the other may still write here */
#else
  __shared__ volatile int absent; /* qtr_gemm_built_sm90 sees it */
  absent = 1;
  __trap();
#endif
}

/* ---- launch -------------------------------------------------------------------------------------- */

typedef CUresult (*encode_function)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                    const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                                    CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* Three dimensions of dims values, strides in bytes of the second and third. */
static cudaError_t make_map(CUtensorMap *map, CUtensorMapDataType type, const void *data, const cuuint64_t *dims,
                            const cuuint64_t *strides, const cuuint32_t *box, CUtensorMapSwizzle swizzle) {
  void *f = NULL;
  enum cudaDriverEntryPointQueryResult found;
  cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found);
  if (e != cudaSuccess) return e;
  if (!f || found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  const cuuint32_t step[3] = {1, 1, 1};
  CUresult r =
      ((encode_function)f)(map, type, 3, (void *)(uintptr_t)data, dims, strides, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                           swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return r == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <int FORMAT, int N, int ROWS, int PAIR, int SPLIT, bool QUANT = false>
static cudaError_t launch(const struct qtr_gemm_plan *plan, const struct qtr_gemm_work *p, cudaStream_t stream) {
  using S = shape<FORMAT, N, ROWS, SPLIT>;
  constexpr struct layout l = layout_make<S, false>(0, 0);
  static_assert(S::STAGES >= 3 && l.end <= S::ROOM, "a stage is too large");
  static_assert(l.buffers % 1024 == 0 && l.sums + S::SUMS <= (l.sums ? l.tokens : l.buffers),
                "the sums must not meet the epilogue's buffers");
  auto *const kernel = k_gemm_sm90<FORMAT, N, ROWS, PAIR, SPLIT, QUANT>;
  const int32_t tile_stages = (p->k_steps + S::BLOCKS - 1) / S::BLOCKS;
  const int n_shared = (int)layout_make<S, QUANT>(0, tile_stages).end;
  CUtensorMap x_map, out_map;
  memset(&x_map, 0, sizeof x_map);
  memset(&out_map, 0, sizeof out_map);
  const cuuint64_t tokens = (cuuint64_t)p->n_tokens;
  const cuuint64_t x_dims[3] = {QTR_TILE_K, p->x_rows, (cuuint64_t)p->k_steps}, x_strides[2] = {p->x_stride, QTR_TILE_K};
  const cuuint32_t x_box[3] = {QTR_TILE_K, N / PAIR, S::BLOCKS};
  cudaError_t e = cudaSuccess;
  if (!QUANT)
    e = make_map(&x_map, CU_TENSOR_MAP_DATA_TYPE_UINT8, p->x, x_dims, x_strides, x_box, CU_TENSOR_MAP_SWIZZLE_128B);
  if (e == cudaSuccess && p->vector && p->epilogue != QTR_EPILOGUE_LOGITS) {
    bool silu = p->epilogue == QTR_EPILOGUE_SILU_MUL;
    const cuuint64_t dims[3] = {(cuuint64_t)p->n_out, tokens, 1}, strides[2] = {dims[0] * 2, dims[0] * tokens * 2};
    const cuuint32_t box[3] = {silu ? 32u : 64u, S::CHUNK, 1};
    e = make_map(&out_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, p->out, dims, strides, box,
                 silu ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B);
  }
  if (e == cudaSuccess) {
    e = cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, QUANT ? S::ROOM : n_shared);
  }
  if (e != cudaSuccess) return e;
  /* Split and narrow launches have one cluster a tile; otherwise the grid is what fits on the GPU, or less. */
  int n_clusters = plan->n_sms * S::CTAS / PAIR;
  if (SPLIT > 1 || S::NARROW || n_clusters > p->n_pairs) n_clusters = p->n_pairs;
  return qtr_launch_with(p->dependent, PAIR * SPLIT, kernel, dim3((unsigned)(n_clusters * PAIR * SPLIT)), dim3(S::THREADS),
                         (size_t)n_shared, stream, *p, x_map, out_map);
}

#define KEY(n, rows, pair, split) ((n)*100000 + (rows)*100 + (pair)*10 + (split))
#define CASE(n, rows, pair, split) \
  case KEY(n, rows, pair, split): return launch<FORMAT, n, rows, pair, split>(plan, p, s)

template <int FORMAT>
static cudaError_t launch_format(const struct qtr_gemm_plan *plan, const struct qtr_gemm_work *p, cudaStream_t s) {
  if (p->row) {
    return plan->rows == 64 ? launch<FORMAT, 8, 64, 1, 1, true>(plan, p, s) : launch<FORMAT, 8, 128, 1, 1, true>(plan, p, s);
  }
  switch (KEY(plan->n, plan->rows, plan->pair, plan->split)) {
    CASE(8, 128, 1, 1);
    CASE(8, 64, 1, 1);
    CASE(16, 128, 1, 1);
    CASE(16, 64, 1, 1);
    CASE(32, 128, 1, 1);
    CASE(32, 64, 1, 1);
    CASE(64, 128, 1, 1);
    CASE(64, 128, 1, 2);
    CASE(64, 64, 1, 1);
    CASE(96, 128, 1, 1);
    CASE(96, 128, 1, 2);
    CASE(128, 128, 1, 1);
    CASE(128, 128, 1, 2);
    CASE(192, 128, 1, 1);
    CASE(256, 128, 1, 1);
    CASE(256, 128, 2, 1);
    default: return cudaErrorInvalidValue;
  }
}

/* Static shared memory marks a kernel without its body: code for sm_90 that is not sm_90a, or for something older. */
bool qtr_gemm_built_sm90(void) {
  struct cudaFuncAttributes a;
  return cudaFuncGetAttributes(&a, (const void *)k_gemm_sm90<QTR_LINEAR_W4A8, 8, 64, 1, 1, false>) == cudaSuccess &&
         a.sharedSizeBytes == 0;
}

template <int FORMAT>
static bool format_quantises(const struct qtr_gemm_plan *plan, int32_t k_steps) {
  using narrow = shape<FORMAT, 8, 64, 1>;
  using wide = shape<FORMAT, 8, 128, 1>;
  if (plan->n != 8 || plan->pair != 1 || plan->split != 1) return false;
  return plan->rows == 64 ? quant_fits<narrow>((k_steps + narrow::BLOCKS - 1) / narrow::BLOCKS) : quant_fits<wide>(k_steps);
}

bool qtr_gemm_quantises_sm90(enum qtr_linear_format format, const struct qtr_gemm_plan *plan, size_t k_steps) {
  if (k_steps > 1024) return false;
  switch (format) {
    case QTR_LINEAR_W8A8: return format_quantises<QTR_LINEAR_W8A8>(plan, (int32_t)k_steps);
    case QTR_LINEAR_W4A8: return format_quantises<QTR_LINEAR_W4A8>(plan, (int32_t)k_steps);
    case QTR_LINEAR_W4A8_G128: return format_quantises<QTR_LINEAR_W4A8_G128>(plan, (int32_t)k_steps);
    default: return false;
  }
}

cudaError_t qtr_gemm_launch_sm90(enum qtr_linear_format format, const struct qtr_gemm_plan *plan,
                                 const struct qtr_gemm_work *work, cudaStream_t stream) {
  switch (format) {
    case QTR_LINEAR_W8A8: return launch_format<QTR_LINEAR_W8A8>(plan, work, stream);
    case QTR_LINEAR_W4A8: return launch_format<QTR_LINEAR_W4A8>(plan, work, stream);
    case QTR_LINEAR_W4A8_G128: return launch_format<QTR_LINEAR_W4A8_G128>(plan, work, stream);
    default: return cudaErrorInvalidValue;
  }
}
