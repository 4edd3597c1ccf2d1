/* Files of static KV scales. */
#include "checkpoint/kv_scales.h"

#include <stdint.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  const struct qtr_config config = {.n_layers = 2, .n_kv_heads = 2};
  struct qtr_kv_scales scales;
  struct qtr_error err;
  if (qtr_kv_scales_parse((const char *)data, size, &config, &scales, &err)) return 0;
  for (int32_t layer = 0; layer < 2; layer++) {
    for (int v = 0; v < 2; v++) {
      if (!(qtr_kv_scales_tensor(&scales, layer, v) > 0)) abort();
    }
  }
  qtr_kv_scales_free(&scales);
  return 0;
}
