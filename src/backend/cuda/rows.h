/* rows.h - kernels on rows of activations: embedding, RMSNorm, quantisation, gathering, and the epilogues of
 * floating-point matrices (spec B.6 - B.9). Plain C; all pointers are device memory, all rows dense unless said. */
#ifndef QTR_BACKEND_CUDA_ROWS_H
#define QTR_BACKEND_CUDA_ROWS_H

#include "backend/backend.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* out (n_tokens, dim) fp16 := rows token[i] of the table; a token -1 - k is what `chosen` has for row k, chosen NULL: there
 * are none such. Tokens out of range give row 0: they were checked on the host. known (n_tokens) := the rows' numbers. */
cudaError_t qtr_cuda_rows_embed(enum qtr_dtype dtype, const void *data, const float *scale, size_t n_rows, size_t dim,
                                const int32_t *token, const struct qtr_choose_result *chosen, size_t n_tokens,
                                int32_t *known, void *out, cudaStream_t stream);

/* What a quantised row becomes: codes (n_tokens, stride), the tail zero; scale, sum (n_tokens). */
struct qtr_cuda_rows_out {
  int8_t *code;
  size_t stride;
  float *scale, *sum;
};
/* B.6 of x (n_tokens, dim) fp16. */
cudaError_t qtr_cuda_rows_quant(const void *x, size_t n_tokens, size_t dim, const struct qtr_cuda_rows_out *out,
                                cudaStream_t stream);
/* RMSNorm (B.8), weight (dim) fp16, then B.6; qserve: B.7 instead. */
cudaError_t qtr_cuda_rows_norm_quant(const void *x, const void *weight, float eps, bool qserve, size_t n_tokens, size_t dim,
                                     const struct qtr_cuda_rows_out *out, cudaStream_t stream);
/* RMSNorm to fp16 values (n_tokens, dim). */
cudaError_t qtr_cuda_rows_norm(const void *x, const void *weight, float eps, size_t n_tokens, size_t dim, void *out,
                               cudaStream_t stream);
/* out (n_rows, dim) := rows row[i] of x. fp16. */
cudaError_t qtr_cuda_rows_gather(const void *x, const int32_t *row, size_t n_rows, size_t dim, void *out,
                                 cudaStream_t stream);

/* y (n_tokens, n_in) x weight (n_out, n_in)^T in fp32 sums, x fp16, weight fp16 or F32: for shapes and types that
 * cuBLASLt does not take. out (n_tokens, n_out) F32. */
cudaError_t qtr_cuda_rows_product(const void *x, const void *weight, bool weight_f32, size_t n_tokens, size_t n_in,
                                  size_t n_out, float *out, cudaStream_t stream);
/* Epilogue of a product y (n_tokens, n_out) F32, bias (n_out) or NULL; out as in backend.h. */
cudaError_t qtr_cuda_rows_finish(const float *y, const float *bias, enum qtr_epilogue epilogue, size_t n_tokens,
                                 size_t n_out, void *out, cudaStream_t stream);
/* fp16 of F32, F16 or BF16 values; *n_bad (device) counts finite values beyond fp16. */
cudaError_t qtr_cuda_rows_convert(enum qtr_dtype dtype, const void *x, size_t n, void *out, int32_t *n_bad,
                                  cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
