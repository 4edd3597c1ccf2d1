/* kv_static.c - the scales of a static KV8 cache (kv_static.h). */
#include "backend/common/kv_static.h"

#include "base/half.h"
#include "base/status.h"

#include <math.h>
#include <stdlib.h>

enum qtr_status qtr_kv_static_scales(const struct qtr_kv_config *config, float **scale, struct qtr_error *err) {
  size_t n = (size_t)config->n_layers * 2;
  float *all = malloc(n * sizeof *all);
  *scale = NULL;
  if (!all) return qtr_fail_memory(err, "static KV scales", n * sizeof *all);
  for (size_t i = 0; i < n; i++) {
    all[i] = qtr_f16_round(config->static_scale[i]); /* A.2.5 */
    if (all[i] > 0 && isfinite(all[i])) continue;
    free(all);
    return qtr_fail(err, QTR_ERR_FORMAT, "layer %zu: the static %s scale %g is not a positive fp16 number", i / 2,
                    i % 2 ? "V" : "K", (double)config->static_scale[i]);
  }
  *scale = all;
  return QTR_OK;
}
