/* choose.h - sampling on the GPU: a row of logits to a token (spec E.4), the same token as engine/sampler.c. Plain C. */
#ifndef QTR_BACKEND_CUDA_CHOOSE_H
#define QTR_BACKEND_CUDA_CHOOSE_H

#include "backend/backend.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Applies the rows' adjustments to the logits before a choice, and takes them back after it: original (n_adjust) keeps what
 * was there. adjust (all rows'), known (tokens of the batch), logit_row (n_rows) of them: device. */
struct qtr_cuda_adjust {
  const struct qtr_choose_adjust *adjust;
  float *original;
  const int32_t *known, *logit_row; /* for rows with a pending token: known[logit_row[row]] */
};
/* Scratch for n_rows rows of a vocabulary. */
size_t qtr_cuda_choose_scratch_bytes(size_t n_rows, size_t vocab_size);
/* logits (n_rows, vocab_size); row, result (n_rows), device. `drawing`: some row is not greedy, adjusted, or wants
 * log-probabilities (a launch for greedy rows alone is shorter). */
cudaError_t qtr_cuda_rows_choose(float *logits, const struct qtr_choose_row *row, struct qtr_choose_result *result,
                                 size_t n_rows, size_t vocab_size, bool drawing, const struct qtr_cuda_adjust *adjust,
                                 void *scratch, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
