/* kv_fp8.c - rounding to fp8 for comparison (kv_fp8.h). */
#include "backend/common/kv_fp8.h"

#include "backend/common/kv_quant.h"
#include "base/status.h"

#include <stdlib.h>

enum qtr_status qtr_kv_fp8_scales(const struct qtr_kv_config *config, float **scale, struct qtr_error *err) {
  *scale = NULL;
  if (config->fp8 == QTR_KV_FP8_OFF) return QTR_OK;
  if (config->format != QTR_KV_F16 || (config->fp8 != QTR_KV_FP8_E4M3 && config->fp8 != QTR_KV_FP8_E5M2)) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "fp8 rounding %d needs a KV cache in fp16, not %s", (int)config->fp8,
                    qtr_kv_format_name(config->format));
  }
  size_t n = (size_t)config->n_layers * 2;
  float *all = malloc(n * sizeof *all);
  if (!all) return qtr_fail_memory(err, "fp8 scales", n * sizeof *all);
  for (size_t i = 0; i < n; i++) {
    all[i] = config->static_scale ? config->static_scale[i] : 1;
    if (all[i] > 0 && isfinite(all[i])) continue;
    free(all);
    return qtr_fail(err, QTR_ERR_ARGUMENT, "layer %zu: the fp8 scale of %s is not positive", i / 2, i % 2 ? "V" : "K");
  }
  *scale = all;
  return QTR_OK;
}

void qtr_kv_fp8_row(const float *x, size_t n, enum qtr_kv_fp8 fp8, float scale, float *out) {
  for (size_t i = 0; i < n; i++) out[i] = qtr_fp8_round(qtr_kv_sane(x[i]) / scale, fp8) * scale;
}
