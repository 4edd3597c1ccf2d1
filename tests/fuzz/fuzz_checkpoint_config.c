/* config.json, and after a zero byte generation_config.json. What is accepted keeps the promises of config.h. */
#include "checkpoint/config.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  const uint8_t *zero = size ? memchr(data, 0, size) : NULL;
  size_t len = zero ? (size_t)(zero - data) : size;
  struct qtr_config c;
  struct qtr_error err;
  if (qtr_config_parse((const char *)data, len, zero ? (const char *)zero + 1 : NULL, zero ? size - len - 1 : 0, &c, &err)) {
    if (memchr(err.message, 0, sizeof err.message) == NULL || err.message[0] == 0) abort();
    return 0;
  }
  if (c.hidden_size < 1 || c.n_layers < 1 || c.n_kv_heads < 1 || c.n_heads % c.n_kv_heads || c.head_dim % 2 ||
      c.vocab_size < 1 || c.n_eos < 0 || c.n_eos > QTR_MAX_EOS) {
    abort();
  }
  if ((double)c.hidden_size * c.intermediate_size * c.n_layers > 0x1p48 || (double)c.vocab_size * c.hidden_size > 0x1p48 ||
      (double)c.n_heads * c.head_dim * c.hidden_size * c.n_layers > 0x1p48) {
    abort();
  }
  float *f = malloc((size_t)c.head_dim / 2 * sizeof *f);
  if (!f) return 0;
  qtr_config_inv_freq(&c, INT32_MAX, f);
  for (int32_t i = 0; i < c.head_dim / 2; i++) {
    if (!isfinite(f[i]) || f[i] < 0) abort();
  }
  free(f);
  return 0;
}
