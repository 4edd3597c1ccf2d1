/* rope.c - cosines and sines of a step (rope.h). */
#include "backend/common/rope.h"

#include <math.h>

void qtr_rope_table(const struct qtr_batch *batch, const float *inv_freq, size_t half_dim, float *cos, float *sin) {
  for (size_t t = 0; t < (size_t)batch->n_tokens; t++) {
    float position = (float)batch->position[t];
    for (size_t i = 0; i < half_dim; i++) {
      float angle = position * inv_freq[i];
      cos[t * half_dim + i] = cosf(angle);
      sin[t * half_dim + i] = sinf(angle);
    }
  }
}
