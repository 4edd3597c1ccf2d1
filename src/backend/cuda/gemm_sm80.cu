/* gemm_sm80.cu - the integer matrices on sm_80, sm_86 and sm_89 (and any later GPU): cp.async, ldmatrix, mma.m16n8k32 (spec
 * B.2 - B.4). The same repacked layout, arithmetic and bits as gemm_sm90.cu.
 *
 * A block of eight warps computes a tile of Y^T = W X^T. Many tokens: 128 rows x 128 tokens, a warp has 32 rows x 64 tokens.
 * Few: 32 rows x N tokens, four warps divide the four k32 steps of a stage and meet in shared memory at the end, so that
 * even 4,096 rows make 128 blocks. A stage is 128 columns: activations with 16-byte units exchanged by row against bank
 * conflicts, and repacked codes, dequantised in registers. */
#include <string.h>

#include "backend/cuda/gemm_internal.h"
#include "backend/cuda/ptx.cuh"

#define THREADS 256
#define SHARED_MAX 101376 /* of a block on sm_86 and sm_89 */

template <int FORMAT, int N, int ROWS>
struct shape {
  static constexpr bool GROUPED = FORMAT == QTR_LINEAR_W4A8_G128;
  static constexpr int WARPS_M = ROWS == 128 ? 4 : 2, WARPS_N = ROWS == 128 ? 2 : 1, WARPS_K = ROWS == 128 ? 1 : 4;
  static constexpr int MT = ROWS / WARPS_M / 16, NT = N / WARPS_N / 8; /* m16 and n8 tiles of a warp */
  static constexpr int PIECES = FORMAT == QTR_LINEAR_W8A8 ? 4 : 2; /* of 16 bytes a thread, 64 rows: see gemm_internal.h */
  static constexpr int X_BYTES = N * QTR_TILE_K, CODE_BYTES = ROWS * 16 * PIECES * 2, GROUP_BYTES = GROUPED ? ROWS * 2 : 0;
  static constexpr int STAGE = X_BYTES + CODE_BYTES + GROUP_BYTES;
  static constexpr int STAGES = N == 128 ? 3 : 4;
  static constexpr int PITCH = ROWS + 8; /* values of a token in the epilogue's buffer */
  static constexpr int SUMS = WARPS_K == 1 ? 0 : (WARPS_K - 1) * WARPS_M * MT * NT * 4 * 32 * 4;
  static constexpr int OUT = N * PITCH * 4;
  static constexpr int A = STAGE * STAGES, B = OUT > SUMS ? OUT : SUMS, SHARED = A > B ? A : B;
  static_assert(SHARED <= SHARED_MAX, "a stage is too large");
};

/* Beyond fp16: the largest number, no infinity. */
static __device__ __forceinline__ float finite(float x) { return fminf(fmaxf(x, -65504.0f), 65504.0f); }
static __device__ __forceinline__ void mma(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* One stage of the tile from memory: columns 128 k ..., rows row0 ..., tokens token0 ... */
template <int FORMAT, int N, int ROWS>
static __device__ __forceinline__ void load_stage(const struct qtr_gemm_work &p, uint32_t to, int32_t k, int32_t row0,
                                                  int32_t token0) {
  using S = shape<FORMAT, N, ROWS>;
  constexpr int CODES = FORMAT == QTR_LINEAR_W8A8 ? 8192 : 4096, BLOCK = CODES + (S::GROUPED ? 128 : 0);
  for (int i = (int)threadIdx.x; i < N * 8; i += THREADS) {
    int token = i / 8, unit = i % 8;
    bool valid = token0 + token < p.n_tokens;
    const int8_t *from = p.x + (size_t)(valid ? token0 + token : 0) * p.x_stride + (size_t)k * QTR_TILE_K + unit * 16;
    copy16(to + (uint32_t)(token * QTR_TILE_K + (unit ^ token % 8) * 16), from, valid);
  }
  /* [block of 64 rows][piece][thread]; 32 rows are 64 threads of each piece. */
  constexpr int BLOCKS = ROWS == 128 ? 2 : 1, WIDTH = ROWS == 128 ? 128 : ROWS * 2;
  const uint8_t *code = p.code + ((size_t)(row0 / 64) * (size_t)p.k_steps + (size_t)k) * BLOCK;
  const int first = row0 % 64; /* of the block's rows */
  for (int i = (int)threadIdx.x; i < BLOCKS * S::PIECES * WIDTH; i += THREADS) {
    int block = i / (S::PIECES * WIDTH), piece = i / WIDTH % S::PIECES, thread = i % WIDTH + first * 2;
    copy16(to + (uint32_t)(S::X_BYTES + i * 16),
           code + (size_t)block * (size_t)p.k_steps * BLOCK + (piece * 128 + thread) * 16, true);
  }
  if (S::GROUPED && threadIdx.x < ROWS / 8) {
    int block = (int)threadIdx.x / 8, at = (int)threadIdx.x % 8 * 16 + first * 2;
    copy16(to + S::X_BYTES + S::CODE_BYTES + threadIdx.x * 16, code + (size_t)block * (size_t)p.k_steps * BLOCK + CODES + at,
           true);
  }
}

/* Fragment of m16 tile `tile` (of this block's) for k32 step s. */
template <int FORMAT, int N, int ROWS>
static __device__ __forceinline__ void load_fragment(uint32_t stage, int tile, int s, uint32_t (&a)[4]) {
  using S = shape<FORMAT, N, ROWS>;
  constexpr int WIDTH = ROWS == 128 ? 128 : ROWS * 2;
  const uint32_t lane = threadIdx.x % 32, half = (uint32_t)tile / 4 * S::PIECES, thread = (uint32_t)tile % 4 * 32 + lane;
  const uint32_t code = stage + S::X_BYTES;
  if (FORMAT == QTR_LINEAR_W8A8) {
    uint32_t at = code + ((half + (uint32_t)s) * WIDTH + thread) * 16;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(at));
    return;
  }
  uint32_t at = code + ((half + (uint32_t)s / 2) * WIDTH + thread) * 16 + (uint32_t)s % 2 * 8, word[2];
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : "r"(at));
  uint32_t c = S::GROUPED ? shared_load4(code + S::CODE_BYTES + (uint32_t)tile * 32 + lane / 4 * 4) : 0;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    a[r] = qtr_dequant_low(word[r]), a[2 + r] = qtr_dequant_high(word[r]);
    if (S::GROUPED) {
      uint32_t s2 = c >> (16 * r) & 255u, offset = qtr_dequant_offset(c >> (16 * r + 8) & 255u);
      a[r] = qtr_dequant_group(a[r], s2, offset), a[2 + r] = qtr_dequant_group(a[2 + r], s2, offset);
    }
  }
}

template <int FORMAT, int N, int ROWS>
__global__ void __launch_bounds__(THREADS, N == 128 ? 1 : 2) k_gemm_sm80(const __grid_constant__ struct qtr_gemm_work p) {
  using S = shape<FORMAT, N, ROWS>;
  constexpr bool ZERO = FORMAT == QTR_LINEAR_W4A8;
  extern __shared__ __align__(128) uint8_t memory[];
  const uint32_t shared = shared_address(memory);
  const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int wm = warp % S::WARPS_M, wn = warp / S::WARPS_M % S::WARPS_N, wk = warp / (S::WARPS_M * S::WARPS_N);
  int32_t m, n;
  qtr_tile_place(p.raster, p.n_tiles, p.m_tiles * (QTR_TILE_M / ROWS), (int32_t)blockIdx.x, &m, &n);
  const int32_t row0 = m * ROWS, token0 = n * N;

  int32_t acc[S::MT][S::NT][4] = {};
  for (int k = 0; k < S::STAGES - 1; k++) {
    if (k < p.k_steps) load_stage<FORMAT, N, ROWS>(p, shared + k * S::STAGE, k, row0, token0);
    copy_commit();
  }
  for (int32_t k = 0; k < p.k_steps; k++) {
    copy_wait<S::STAGES - 2>();
    __syncthreads();
    int32_t ahead = k + S::STAGES - 1;
    if (ahead < p.k_steps) load_stage<FORMAT, N, ROWS>(p, shared + ahead % S::STAGES * S::STAGE, ahead, row0, token0);
    copy_commit();
    const uint32_t stage = shared + k % S::STAGES * S::STAGE;
#pragma unroll
    for (int i = 0; i < 4 / S::WARPS_K; i++) {
      const int s = S::WARPS_K == 1 ? i : wk;
      uint32_t a[S::MT][4];
#pragma unroll
      for (int t = 0; t < S::MT; t++) load_fragment<FORMAT, N, ROWS>(stage, wm * S::MT + t, s, a[t]);
      if (S::NT == 1) {
        uint32_t b0, b1, at = stage + (uint32_t)(lane % 8 * QTR_TILE_K + ((2 * s + lane / 8 % 2) ^ lane % 8) * 16);
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(b0), "=r"(b1) : "r"(at) : "memory");
#pragma unroll
        for (int t = 0; t < S::MT; t++) mma(acc[t][0], a[t], b0, b1);
      }
#pragma unroll
      for (int j = 0; j + 1 < S::NT; j += 2) {
        uint32_t b[4];
        uint32_t token = (uint32_t)(wn * S::NT * 8 + j * 8 + lane / 16 * 8 + lane % 8);
        uint32_t at = stage + token * QTR_TILE_K + (((uint32_t)(2 * s + lane / 8 % 2)) ^ token % 8) * 16;
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                     : "r"(at)
                     : "memory");
#pragma unroll
        for (int t = 0; t < S::MT; t++) mma(acc[t][j], a[t], b[0], b[1]), mma(acc[t][j + 1], a[t], b[2], b[3]);
      }
    }
  }
  copy_wait<0>();
  __syncthreads(); /* the stages' memory is free */

  if (S::WARPS_K > 1) { /* sums of the other k32 steps: [warp_k - 1][warp_m][value][lane] */
    int32_t *sum = (int32_t *)memory;
    if (wk) {
#pragma unroll
      for (int i = 0; i < S::MT * S::NT * 4; i++) {
        sum[(((wk - 1) * S::WARPS_M + wm) * S::MT * S::NT * 4 + i) * 32 + lane] = acc[i / 4 / S::NT][i / 4 % S::NT][i % 4];
      }
    }
    __syncthreads();
    if (!wk) {
#pragma unroll
      for (int i = 0; i < (S::WARPS_K - 1) * S::MT * S::NT * 4; i++) {
        int value = i % (S::MT * S::NT * 4), from = i / (S::MT * S::NT * 4);
        acc[value / 4 / S::NT][value / 4 % S::NT][value % 4] +=
            sum[((from * S::WARPS_M + wm) * S::MT * S::NT * 4 + value) * 32 + lane];
      }
    }
    __syncthreads();
  }

  /* Values to shared memory, (N, PITCH), then rows of tokens to memory. */
  const bool silu = p.epilogue == QTR_EPILOGUE_SILU_MUL, logits = p.epilogue == QTR_EPILOGUE_LOGITS;
  float *values = (float *)memory;
  if (!wk) {
#pragma unroll
    for (int t = 0; t < S::MT; t++) {
      const int32_t tile = wm * S::MT + t;
      struct row_params row[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int32_t r = row0 + tile * 16 + g + 8 * i;
        row[i].scale = p.scale[r], row[i].szero = ZERO ? p.szero[r] : 0, row[i].bias = p.bias ? p.bias[r] : 0;
      }
#pragma unroll
      for (int j = 0; j < S::NT; j++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          int32_t token = (wn * S::NT + j) * 8 + 2 * c + i;
          bool in = token0 + token < p.n_tokens;
          float xs = in ? p.x_scale[token0 + token] : 0, sum = ZERO && in ? p.x_sum[token0 + token] : 0;
          float y = gemm_value<ZERO>(acc[t][j][i], row[0], xs, sum), z = gemm_value<ZERO>(acc[t][j][2 + i], row[1], xs, sum);
          float *to = values + token * S::PITCH;
          if (silu) {
            to[tile * 8 + g] = gemm_silu_mul(y, z);
          } else {
            to[tile * 16 + g] = y;
            to[tile * 16 + 8 + g] = z;
          }
        }
      }
    }
  }
  __syncthreads();
  const int32_t n_rows = silu ? ROWS / 2 : ROWS, out_row = silu ? row0 / 2 : row0;
  for (int32_t i = (int32_t)threadIdx.x; i < N * (n_rows / 8); i += THREADS) {
    int32_t token = i / (n_rows / 8), r = i % (n_rows / 8) * 8;
    if (token0 + token >= p.n_tokens || out_row + r >= p.n_out) continue;
    const float *from = values + token * S::PITCH + r;
    size_t at = (size_t)(token0 + token) * (size_t)p.n_out + (size_t)(out_row + r);
    if (logits || !p.vector) {
      for (int j = 0; j < 8 && out_row + r + j < p.n_out; j++) {
        if (logits) {
          ((float *)p.out)[at + j] = from[j];
        } else {
          __half *o = (__half *)p.out + at + j, y = __float2half_rn(finite(from[j]));
          *o = p.epilogue == QTR_EPILOGUE_ADD ? __hadd(*o, y) : y;
        }
      }
      continue;
    }
    uint4 *o = (uint4 *)((__half *)p.out + at), v, old = {0, 0, 0, 0};
    __half2 y[4], x[4];
    for (int j = 0; j < 4; j++) y[j] = __floats2half2_rn(finite(from[2 * j]), finite(from[2 * j + 1]));
    if (p.epilogue == QTR_EPILOGUE_ADD) {
      old = *o;
      memcpy(x, &old, 16);
      for (int j = 0; j < 4; j++) y[j] = __hadd2(x[j], y[j]);
    }
    memcpy(&v, y, 16);
    *o = v;
  }
}

template <int FORMAT, int N, int ROWS>
static cudaError_t launch(const struct qtr_gemm_work *p, cudaStream_t stream) {
  using S = shape<FORMAT, N, ROWS>;
  struct qtr_gemm_work w = *p;
  w.n_tiles = (p->n_tokens + N - 1) / N;
  cudaError_t e = cudaFuncSetAttribute((const void *)k_gemm_sm80<FORMAT, N, ROWS>,
                                       cudaFuncAttributeMaxDynamicSharedMemorySize, S::SHARED);
  if (e != cudaSuccess) return e;
  k_gemm_sm80<FORMAT, N, ROWS><<<(unsigned)(p->m_tiles * (QTR_TILE_M / ROWS) * w.n_tiles), THREADS, S::SHARED, stream>>>(w);
  return cudaGetLastError();
}

template <int FORMAT>
static cudaError_t launch_format(const struct qtr_gemm_work *p, cudaStream_t stream) {
  if (p->n_tokens <= 8) return launch<FORMAT, 8, 32>(p, stream);
  if (p->n_tokens <= 32) return launch<FORMAT, 32, 32>(p, stream);
  if (p->n_tokens <= 64) return launch<FORMAT, 64, 32>(p, stream);
  return launch<FORMAT, 128, 128>(p, stream);
}

cudaError_t qtr_gemm_launch_sm80(enum qtr_linear_format format, const struct qtr_gemm_work *work, cudaStream_t stream) {
  switch (format) {
    case QTR_LINEAR_W8A8: return launch_format<QTR_LINEAR_W8A8>(work, stream);
    case QTR_LINEAR_W4A8: return launch_format<QTR_LINEAR_W4A8>(work, stream);
    case QTR_LINEAR_W4A8_G128: return launch_format<QTR_LINEAR_W4A8_G128>(work, stream);
    default: return cudaErrorInvalidValue;
  }
}
