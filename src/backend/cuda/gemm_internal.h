/* gemm_internal.h - what the files gemm*.cu share: the repacked layout, the work of one launch, the epilogue's arithmetic.
 *
 * Layout of a repacked matrix (both paths; the A fragments of wgmma m64k32 and of mma.m16n8k32 put the same weights in the
 * same lane). Rows are padded to 128, columns to 128. A block is 64 rows x 128 columns; blocks (m, k) follow each other with
 * k fastest:
 *   W8A8       [4 steps of k32][128 threads][16 bytes]                              8,192 bytes
 *   W4A8       [2 pairs of k32 steps][128 threads][16 bytes]                        4,096 bytes
 *   W4A8_G128  the same, then [32 pairs of rows]{s2, zs of row r; s2, zs of r + 8}  4,224 bytes
 * Thread t, warp w = t / 32, g = t % 32 / 4, c = t % 4, holds rows r = 16w + g and r + 8. Four bytes of W8A8 are columns
 * 32 step + 4c ... + 3 of row r, of row r + 8, then columns 16 further of both. A word of W4 is row r (even words) or r + 8
 * (odd words), low nibbles columns 32 step + 4c ... + 3, high nibbles 16 further; words 0, 1: even step; 2, 3: odd step.
 *
 * gate_up: kernel rows 16b + j and 16b + 8 + j (j < 8) are rows 8b + j of gate and of up: they meet in one thread. */
#ifndef QTR_BACKEND_CUDA_GEMM_INTERNAL_H
#define QTR_BACKEND_CUDA_GEMM_INTERNAL_H

#include <cuda_fp16.h>

#include "backend/cuda/gemm.h"
#include "backend/cuda/gemm_dequant.h"

#define QTR_TILE_M 128 /* weight rows of a tile, most often */
#define QTR_TILE_K 128 /* columns of a block, bytes of an activation row in a stage */

static inline size_t qtr_gemm_block_bytes(enum qtr_linear_format format) {
  return format == QTR_LINEAR_W8A8 ? 8192 : format == QTR_LINEAR_W4A8 ? 4096 : 4224;
}

/* The work of one launch. */
struct qtr_gemm_work {
  const uint8_t *code;
  const float *scale, *szero, *bias; /* kernel's row order, padded; szero, bias may be NULL */
  const float *x_scale, *x_sum;      /* (n_tokens) */
  const int8_t *x;                   /* (n_tokens, x_stride) */
  const __half *row, *norm;          /* instead of x, x_scale, x_sum: (n_tokens, n_in), and RMSNorm's weight or NULL */
  float eps;
  void *out;                         /* (n_tokens, n_out) */
  size_t x_stride, x_rows;           /* x_rows >= n_tokens: what may be read */
  int32_t n_tokens, n_in, n_out;     /* n_out: values of an output row (half the matrix's rows with SILU_MUL) */
  int32_t m_tiles, n_tiles, k_steps; /* m_tiles: of the plan's rows */
  int32_t n_pairs;                   /* tiles in all, those of a pair as one */
  int32_t raster;                    /* token tiles that are walked together */
  int32_t epilogue;
  bool vector;    /* rows of out are 16-byte aligned */
  bool dependent; /* may start while the kernel before it ends */
};

/* How a product is cut; gemm.cu chooses, the laboratory tries others. gemm_sm90.cu has these (n, rows, pair, split):
 * 8, 16, 32: 128 1 1, 64 1 1; 64: 128 1 1, 128 1 2, 64 1 1; 96, 128: 128 1 1, 128 1 2; 192: 128 1 1; 256: 128 1 1, 128 2 1.
 */
struct qtr_gemm_plan {
  int32_t n, rows; /* of a tile: tokens, weight rows */
  int32_t pair;    /* blocks that share activations */
  int32_t split;   /* blocks that divide the columns of a tile */
  int32_t raster, n_sms;
};
bool qtr_gemm_built_sm90(void); /* the running GPU has code for the Hopper kernels in this binary */
struct qtr_gemm_plan qtr_gemm_choose(enum qtr_linear_format format, size_t n_rows, size_t n_in, size_t n_tokens, int n_sms);
cudaError_t qtr_cuda_gemm_planned(const struct qtr_cuda_gemm_args *args, const struct qtr_gemm_plan *plan,
                                  cudaStream_t stream);
/* Products by this plan can make their activations themselves (work->row). */
bool qtr_gemm_quantises_sm90(enum qtr_linear_format format, const struct qtr_gemm_plan *plan, size_t k_steps);
cudaError_t qtr_gemm_launch_sm90(enum qtr_linear_format format, const struct qtr_gemm_plan *plan,
                                 const struct qtr_gemm_work *work, cudaStream_t stream);
cudaError_t qtr_gemm_launch_sm80(enum qtr_linear_format format, const struct qtr_gemm_work *work, cudaStream_t stream);

#ifdef __CUDACC__

struct row_params { /* of one weight row */
  float scale, szero, bias;
};

/* B.2: acc * s_w * s_x - szero * sum_x + bias; B.3, B.4: acc * (s_w * s_x) + bias. One order of operations everywhere, so
 * that a token's result has the same bits in every kernel. */
template <bool ZERO>
static __device__ __forceinline__ float gemm_value(int32_t acc, const struct row_params &r, float x_scale, float x_sum) {
  float a = __int2float_rn(acc);
  if (ZERO) return __fmaf_rn(-r.szero, x_sum, __fmaf_rn(__fmul_rn(a, r.scale), x_scale, r.bias));
  return __fmaf_rn(a, __fmul_rn(r.scale, x_scale), r.bias);
}

/* Tile -> place: bands of `raster` token tiles; within a band rows outermost, so that neighbours share activations in L2. */
static __device__ __forceinline__ void qtr_tile_place(int32_t raster, int32_t n_tiles, int32_t m_tiles, int32_t tile,
                                                      int32_t *m, int32_t *n) {
  int32_t band = tile / (raster * m_tiles), first = band * raster, wide = min(raster, n_tiles - first);
  int32_t rest = tile - band * raster * m_tiles;
  *m = rest / wide;
  *n = first + rest % wide;
}

static __device__ __forceinline__ float gemm_silu_mul(float gate, float up) { /* B.9 */
  return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

#endif
#endif
