/* gemm.h - integer matrices on the GPU: layouts, repacking, launch (spec A.2, A.3, A.4, B.2 - B.4, B.9). Plain C; kernels in
 * gemm_*.cu.
 *
 * y = W x for n_tokens rows of int8 activations, int32 accumulators exact, the epilogue in fp32 and rounded to fp16 once:
 *   W4A8            y = acc * s_w * s_x - szero * sum_x + bias      (codes 0...15)
 *   W4A8_G128, W8A8 y = acc * (s_w * s_x) + bias
 * QTR_EPILOGUE_ADD rounds y to fp16, then the sum of it and the residual.
 * A row's result has the same bits whatever it is batched with (the accumulators are exact, the epilogue is per element). */
#ifndef QTR_BACKEND_CUDA_GEMM_H
#define QTR_BACKEND_CUDA_GEMM_H

#include "backend/backend.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Which kernels: wgmma of sm_90a, or mma.m16n8k32 of sm_80 and later. A matrix is repacked for one of them. */
enum qtr_cuda_path { QTR_CUDA_SM80, QTR_CUDA_SM90 };

/* The better path of the current device; cudaErrorNotSupported below sm_80. */
cudaError_t qtr_cuda_gemm_path(enum qtr_cuda_path *path);

/* A repacked matrix in device memory; all pointers are device, owned by whoever allocated them. */
struct qtr_cuda_matrix {
  enum qtr_cuda_path path;
  enum qtr_linear_format format; /* W8A8, W4A8, W4A8_G128; a G128 matrix whose q*s2+z leaves int8 is kept as W8A8 */
  bool gate_up;                  /* rows of gate and up interleaved for QTR_EPILOGUE_SILU_MUL, as the kernels want them */
  size_t n_out, n_in;            /* true sizes; gemm.cu pads to its tiles */
  void *code;                    /* repacked codes (and second-level scales, if the layout keeps them there) */
  void *group;                   /* second-level scales, if apart; else NULL */
  float *scale, *szero, *bias;   /* (n_out padded) in the kernel's row order; szero, bias may be NULL */
};

/* Bytes that code and group need. 0: this shape is not possible. */
size_t qtr_cuda_matrix_code_bytes(enum qtr_cuda_path path, enum qtr_linear_format format, size_t n_out, size_t n_in);
size_t qtr_cuda_matrix_group_bytes(enum qtr_cuda_path path, enum qtr_linear_format format, size_t n_out, size_t n_in);
/* Rows that scale, szero, bias have: n_out rounded up to the tile. */
size_t qtr_cuda_matrix_padded_rows(enum qtr_cuda_path path, size_t n_out);

/* One part of the disk's layout (struct qtr_linear_part), already in device memory. */
struct qtr_cuda_part {
  size_t n_out, first_row; /* rows, and where they begin in the whole matrix: part 1 of gate_up begins at n_out of part 0 */
  const void *weight;      /* W8A8 (n_out, n_in) int8 row major; W4A8*: packed nibbles, spec A.3 */
  const uint8_t *s2_scale, *s2_zero; /* (n_in/128, n_out) permuted as on disk (A.4.2); else NULL */
  const float *scale, *szero, *bias; /* (n_out), NULL where there is none (m->bias set, part->bias NULL: zeros) */
};
/* Writes one part into m (padding rows and columns become zero; call qtr_cuda_matrix_clear first). */
cudaError_t qtr_cuda_matrix_clear(const struct qtr_cuda_matrix *m, cudaStream_t stream);
cudaError_t qtr_cuda_matrix_repack(const struct qtr_cuda_matrix *m, const struct qtr_cuda_part *part, cudaStream_t stream);
/* G128: adds to *n_bad (device) the groups with a code that occurs for which (q*s2 + z) mod 256, read as B.3 does, differs
 * from q*s2 - zs in -128...127, zs = (256 - z) mod 256. Such a part is expanded into a W8A8 weight (n_out, n_in) instead. */
cudaError_t qtr_cuda_g128_count_bad(const struct qtr_cuda_part *part, size_t n_in, int32_t *n_bad, cudaStream_t stream);
cudaError_t qtr_cuda_g128_expand(const struct qtr_cuda_part *part, size_t n_in, int8_t *out, cudaStream_t stream);

/* Rows that a product normalises (weight not NULL: RMSNorm of B.8) and quantises itself: the bits of rows.h's kernels. All
 * 16-byte aligned. */
struct qtr_cuda_gemm_rows {
  const void *x;      /* (n_tokens, n_in) fp16 */
  const void *weight; /* (n_in) fp16, or NULL */
  float eps;
};

struct qtr_cuda_gemm_args {
  const struct qtr_cuda_matrix *w;
  const struct qtr_cuda_gemm_rows *rows; /* not NULL: instead of x, x_scale, x_sum, where qtr_cuda_gemm_takes_rows */
  const int8_t *x;      /* (n_tokens, x_stride) codes; x_stride: n_in rounded up to 128, the tail zero; 128-byte aligned */
  const float *x_scale; /* (n_tokens) */
  const float *x_sum;   /* (n_tokens) */
  size_t x_stride;
  size_t
      x_rows; /* rows of x that may be read, whatever is in those past n_tokens; less than n_tokens (0): n_tokens. The copy
                 engine reads a row faster than it makes zeros: give it n_tokens rounded up to 256 where there is room */
  enum qtr_epilogue epilogue; /* out row length: n_out; n_out/2 with SILU_MUL */
  void *out;                  /* fp16, or F32 with LOGITS; no padding between rows, 2-byte aligned rows are possible */
  size_t n_tokens;
  bool dependent; /* launched as a programmatic dependent: asks for weights while the kernel before it ends, waits for its
                     results before it reads or writes anything else (Hopper; ignored on the older path) */
};
/* Whether a product of n_tokens with w should be given rows: one token (each block makes all of them, so more would not
 * pay), Hopper's kernels, columns that fit shared memory. */
bool qtr_cuda_gemm_takes_rows(const struct qtr_cuda_matrix *w, size_t n_tokens);
/* Capturable in a graph: no synchronisation, no allocation. */
cudaError_t qtr_cuda_gemm(const struct qtr_cuda_gemm_args *args, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
