/* kv_rows.h - the row functions of struct qtr_cpu_kv_rows in vectors, for AVX2 and AVX-512: the same bits as
 * common/kv_quant.h gives. The file that includes it defines RW, rf                                   lanes and a vector of
 * floats rf_load, rf_store, rf_set, rf_add, rf_sub, rf_mul rf_min(a, b), rf_max(a, b)               the second operand where
 * they are equal or one is NaN, as minps does rf_hmin, rf_hmax                         over the lanes rf_store_codes(p, x)
 * rounds to nearest even, lanes to unsigned bytes 0 … 255 rf_store_signed(p, x)                    the same to -128 … 127
 *   rf_store_f16(p, x)
 * and may use F16C. rd, rd_zero, rd_load, rd_load_f16, rd_add, rd_mul, rd_max, rd_hsum: RW / 2 doubles, from floats or
 * halves. */
#include <string.h>

#include "backend/common/kv_quant.h"

static inline rf rf_sane(rf x) { return rf_min(rf_max(x, rf_set(-QTR_KV_MAX)), rf_set(QTR_KV_MAX)); }

/* As qtr_kv_quant_params, by the machine's conversions where it says that the formula stands: normal scale, finite zero. */
static inline void quant_params(float mn, float mx, int levels, uint16_t *scale, uint16_t *zero) {
  const uint32_t normal = 0x0400, infinite = 0x7c00;
  float l = (float)levels, range = mx - mn;
  uint16_t s = _cvtss_sh(range / l, _MM_FROUND_TO_NEAREST_INT), z = _cvtss_sh((-l * mn) / range, _MM_FROUND_TO_NEAREST_INT);
  if (s >= normal && s < infinite && (z & infinite) != infinite) {
    *scale = s;
    *zero = z;
  } else {
    qtr_kv_quant_params(mn, mx, levels, scale, zero);
  }
}

static void quant(const float *x, size_t dim, int levels, uint8_t *code, uint16_t *scale, uint16_t *zero) {
  if (dim < RW) {
    qtr_kv_quant_row(x, dim, levels, code, scale, zero);
    return;
  }
  rf low = rf_sane(rf_load(x)), high = low;
  for (size_t i = RW; i < dim; i += RW) {
    rf v = rf_sane(rf_load(x + (i + RW <= dim ? i : dim - RW))); /* the last vector may overlap */
    low = rf_min(low, v);
    high = rf_max(high, v);
  }
  float mn = rf_hmin(low), mx = rf_hmax(high);
  if (mn == 0) { /* the definition keeps the sign of the first zero, and the sign of `zero` depends on it */
    size_t i = 0;
    while (x[i] != 0) i++;
    mn = x[i];
  }
  quant_params(mn, mx, levels, scale, zero);
  float r = 1.0f / _cvtsh_ss(*scale), z = _cvtsh_ss(*zero);
  rf top = rf_set((float)levels);
  for (size_t i = 0; i < dim; i += RW) {
    size_t at = i + RW <= dim ? i : dim - RW;
    rf c = rf_add(rf_mul(rf_sane(rf_load(x + at)), rf_set(r)), rf_set(z));
    rf_store_codes(code + at, rf_min(rf_max(c, rf_set(0)), top));
  }
}

static void quant_static(const float *x, size_t dim, float r, uint8_t *code) {
  size_t i = 0;
  for (; i + RW <= dim; i += RW) {
    rf c = rf_mul(rf_sane(rf_load(x + i)), rf_set(r));
    rf_store_signed(code + i, rf_min(rf_max(c, rf_set(-128)), rf_set(127)));
  }
  for (; i < dim; i++) code[i] = (uint8_t)qtr_kv_quant_static(x[i], r);
}

static void to_f16(const float *x, size_t dim, uint16_t *half) {
  size_t i = 0;
  for (; i + RW <= dim; i += RW) rf_store_f16(half + i, rf_sane(rf_load(x + i)));
  for (; i < dim; i++) half[i] = qtr_f16_from_f32(qtr_kv_sane(x[i]));
}

static void rope(float *x, size_t half_dim, const float *cos, const float *sin) {
  size_t i = 0;
  for (; i + RW <= half_dim; i += RW) {
    rf a = rf_load(x + i), b = rf_load(x + half_dim + i), c = rf_load(cos + i), s = rf_load(sin + i);
    rf_store(x + i, rf_sub(rf_mul(a, c), rf_mul(b, s)));
    rf_store(x + half_dim + i, rf_add(rf_mul(b, c), rf_mul(a, s)));
  }
  for (; i < half_dim; i++) {
    float a = x[i], b = x[half_dim + i];
    x[i] = a * cos[i] - b * sin[i];
    x[half_dim + i] = b * cos[i] + a * sin[i];
  }
}

static void extremes(const float *x, size_t dim, float *max, float *min) {
  size_t i = 0;
  for (; i + RW <= dim; i += RW) {
    rf v = rf_sane(rf_load(x + i));
    rf_store(max + i, rf_max(v, rf_load(max + i)));
    rf_store(min + i, rf_min(v, rf_load(min + i)));
  }
  for (; i < dim; i++) {
    float v = qtr_kv_sane(x[i]);
    max[i] = v > max[i] ? v : max[i];
    min[i] = v < min[i] ? v : min[i];
  }
}

/* Products of a float and a half are exact in double. */
static double bound(const float *q, const uint16_t *stats, size_t dim) {
  rd sum = rd_zero();
  double rest = 0;
  size_t i = 0;
  for (; i + RW <= dim; i += RW) {
    for (size_t j = 0; j < RW; j += RW / 2) {
      rd x = rd_load(q + i + j), a = rd_mul(x, rd_load_f16(stats + i + j)), b = rd_mul(x, rd_load_f16(stats + dim + i + j));
      sum = rd_add(sum, rd_max(a, b));
    }
  }
  for (; i < dim; i++) {
    double a = (double)q[i] * (double)_cvtsh_ss(stats[i]), b = (double)q[i] * (double)_cvtsh_ss(stats[dim + i]);
    rest += a > b ? a : b;
  }
  return rd_hsum(sum) + rest;
}

static const struct qtr_cpu_kv_rows rows = {quant, quant_static, to_f16, rope, extremes, bound};
