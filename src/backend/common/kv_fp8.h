/* kv_fp8.h - K and V rounded to fp8 on their way into an fp16 cache: what an fp8 cache would do to the model, for comparison
 * with KV8 and KV4. It saves no memory and no time. */
#ifndef QTR_BACKEND_COMMON_KV_FP8_H
#define QTR_BACKEND_COMMON_KV_FP8_H

#include "backend/backend.h"

#include <math.h>

/* Nearest value of e4m3 (1.3.4 bits as OCP's E4M3FN: largest 448, smallest 2^-9) or e5m2 (largest 57344, smallest 2^-16),
 * ties to even; what is beyond the largest becomes it, as vLLM's conversion does. x: finite. */
static inline float qtr_fp8_round(float x, enum qtr_kv_fp8 fp8) {
  const int digits = fp8 == QTR_KV_FP8_E4M3 ? 3 : 2, least = fp8 == QTR_KV_FP8_E4M3 ? -6 : -14;
  const float most = fp8 == QTR_KV_FP8_E4M3 ? 448.0f : 57344.0f;
  int exponent;
  (void)frexpf(x, &exponent); /* |x| in [2^(exponent - 1), 2^exponent) */
  float step = ldexpf(1, (exponent - 1 > least ? exponent - 1 : least) - digits), y = rintf(x / step) * step;
  return y > most ? most : y < -most ? -most : y;
}

/* *scale: (n_layers, 2) of K and V, malloc'ed: config->static_scale, or 1 where there are none. NULL when config->fp8 is
 * off. QTR_ERR_ARGUMENT: fp8 with another format than F16, or a scale that is not positive. */
enum qtr_status qtr_kv_fp8_scales(const struct qtr_kv_config *config, float **scale, struct qtr_error *err);

/* One row: out[i] = fp8(x[i] / scale) * scale. */
void qtr_kv_fp8_row(const float *x, size_t n, enum qtr_kv_fp8 fp8, float scale, float *out);

#endif
