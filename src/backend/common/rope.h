/* rope.h - cosines and sines of one step's positions, the same for every backend that computes them on the host (C.4). */
#ifndef QTR_BACKEND_COMMON_ROPE_H
#define QTR_BACKEND_COMMON_ROPE_H

#include "backend/backend.h"

/* cos, sin: (batch->n_tokens, half_dim). The angle is the fp32 product position * inv_freq, as Hugging Face computes it. */
void qtr_rope_table(const struct qtr_batch *batch, const float *inv_freq, size_t half_dim, float *cos, float *sin);

#endif
