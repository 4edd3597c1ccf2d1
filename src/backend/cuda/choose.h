/* choose.h - sampling on the GPU: a row of logits to a token (spec E.4), the same token as engine/sampler.c. Plain C. */
#ifndef QTR_BACKEND_CUDA_CHOOSE_H
#define QTR_BACKEND_CUDA_CHOOSE_H

#include "backend/backend.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Scratch for n_rows rows of a vocabulary. */
size_t qtr_cuda_choose_scratch_bytes(size_t n_rows, size_t vocab_size);
/* logits (n_rows, vocab_size); row, result (n_rows), device. `drawing`: some row is not greedy or wants log-probabilities
 * (a launch for greedy rows alone is shorter). */
cudaError_t qtr_cuda_rows_choose(const float *logits, const struct qtr_choose_row *row, struct qtr_choose_result *result,
                                 size_t n_rows, size_t vocab_size, bool drawing, void *scratch, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
