/* A safetensors file: whatever it says, its tensors can be read byte by byte, converted and looked up. */
#include "checkpoint/tensors.h"

#include <stdint.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  struct qtr_checkpoint *c;
  struct qtr_error err;
  if (qtr_checkpoint_open_memory(data, size, &c, &err)) return 0;
  enum qtr_linear_format format;
  (void)qtr_checkpoint_format(c, &format, &err);
  volatile uint8_t sink = 0;
  for (size_t i = 0; i < qtr_checkpoint_count(c); i++) {
    const struct qtr_tensor *t = qtr_checkpoint_at(c, i), *other;
    for (size_t b = 0; b < t->n_bytes; b++) sink ^= ((const uint8_t *)t->data)[b];
    if (qtr_checkpoint_get(c, t->name, t->n_dims, t->shape, &other, &err) || other != t) abort();
    size_t n = t->n_bytes / qtr_dtype_bytes(t->dtype);
    float *x = malloc((n + 1) * sizeof *x);
    if (x) (void)qtr_tensor_to_floats(t, x, n, &err);
    free(x);
  }
  (void)sink;
  qtr_checkpoint_close(c);
  return 0;
}
