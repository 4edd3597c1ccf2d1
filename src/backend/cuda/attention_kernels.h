/* attention_kernels.h - the launches behind qtr_cuda_attention; for attention_*.cu and their laboratory. */
#ifndef QTR_BACKEND_CUDA_ATTENTION_KERNELS_H
#define QTR_BACKEND_CUDA_ATTENTION_KERNELS_H

#include "backend/cuda/attention_common.cuh"

void qtr_cuda_attention_params(const struct qtr_attention_args *args, const struct qtr_cuda_batch *batch, void *scratch,
                               struct attention_params *p);
/* Every token, any even head_dim up to 256. */
cudaError_t qtr_cuda_attention_generic(const struct attention_params *p, int format, cudaStream_t stream);
/* The decode entries of p->plan only, the same head sizes. */
cudaError_t qtr_cuda_attention_generic_entries(const struct attention_params *p, int format, cudaStream_t stream);
/* The decode entries of p->plan. The launch depends on p->n_seqs, not on the plan: it can be captured. */
cudaError_t qtr_cuda_attention_decode(const struct attention_params *p, int format, cudaStream_t stream);
/* The prefill entries. plan: the host's copy. */
cudaError_t qtr_cuda_attention_prefill(const struct attention_params *p, int format, const struct qtr_attention_plan *plan,
                                       cudaStream_t stream);

#endif
