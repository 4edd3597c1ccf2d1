/* kv_quant.h - the shared definition of KV cache quantisation (spec C.3), scalar and exact: every backend stores the codes,
 * scales and zeros these functions give, bit for bit, and reads them back by qtr_kv_dequant.
 *
 * Values first. Backends with fp32 activations quantise the fp32 values themselves. A value is first brought into the range
 * of fp16 (qtr_kv_sane): the reference system has fp16 activations, so sane models never notice, and no infinity or NaN can
 * reach the cache.
 *
 * INT8 / INT4 (C.3.1), L = 255 or 15, over one head of one token, all arithmetic fp32, one rounding an operation (no FMA):
 *   scale = f16((mx - mn) / L)    zero = f16((-L * mn) / (mx - mn))    code = clamp(rni(x * (1/scale) + zero), 0, L)
 *   x'    = code * scale - zero * scale                                 (fp32; the result is not rounded to fp16)
 *
 * Flat rows. The formula breaks down where mx - mn is small: zero overflows fp16 (mx == mn divides by zero), or scale is an
 * fp16 subnormal with few bits. Rule: the formula stands when scale > 0, both are finite, and the interval
 * that codes 0 … L stand for reaches mn and mx to within max(scale, max|x| / 256). Else the row is stored as fixed-point
 * numbers: scale = the smallest power of two that is >= max(max|x| / 2048, (mx - mn) / L, 2^-24),    zero = -rni(mn / scale)
 * zero is then an integer of at most 2048, exact in fp16, and every x' is within scale/2 of x; a row of one fp16 constant
 * (zero included) comes back exactly. A row with a normal fp16 scale and finite zero always takes the formula, as in
 * the reference system.
 *
 * INT8_STATIC (C.3.2): ks = f16(static scale) > 0;  code = sat8(rni(x * (1/ks))), -128 … 127;  x' = code * ks.
 * F16: x' = f16(x). */
#ifndef QTR_BACKEND_COMMON_KV_QUANT_H
#define QTR_BACKEND_COMMON_KV_QUANT_H

#include <math.h>
#include <stddef.h>

#include "base/half.h"

#define QTR_KV_MAX 65504.0f /* largest fp16 */

/* Written so that maxps / minps with these operand orders (x first) do the same; NaN becomes -QTR_KV_MAX. */
static inline float qtr_kv_sane(float x) {
  x = x > -QTR_KV_MAX ? x : -QTR_KV_MAX;
  return x < QTR_KV_MAX ? x : QTR_KV_MAX;
}

/* Scale and zero of a row with extremes mn <= mx (sane values); levels = 15 or 255. */
static inline void qtr_kv_quant_params(float mn, float mx, int levels, uint16_t *scale, uint16_t *zero) {
  float l = (float)levels, range = mx - mn, magnitude = fmaxf(fabsf(mn), fabsf(mx));
  if (range > 0) {
    *scale = qtr_f16_from_f32(range / l);
    *zero = qtr_f16_from_f32((-l * mn) / range);
    float s = qtr_f16_to_f32(*scale), z = qtr_f16_to_f32(*zero);
    if (s > 0 && isfinite(z)) {
      float slack = fmaxf(s, magnitude / 256), low = -z * s, high = l * s - z * s;
      if (low <= mn + slack && high >= mx - slack) return;
    }
  }
  int exponent;
  float fraction = frexpf(fmaxf(fmaxf(magnitude / 2048, range / l), 0x1p-24f), &exponent);
  float s = ldexpf(1.0f, fraction == 0.5f ? exponent - 1 : exponent);
  *scale = qtr_f16_from_f32(s);
  *zero = qtr_f16_from_f32(0.0f - rintf(mn / s)); /* 0 - x: never a negative zero */
}

/* r = 1 / scale, zero: as floats. */
static inline uint8_t qtr_kv_quant_code(float x, float r, float zero, int levels) {
  float c = rintf(x * r + zero);
  return c <= 0 ? 0 : c >= (float)levels ? (uint8_t)levels : (uint8_t)c;
}

/* Extremes of a row of any floats, brought into range. */
static inline void qtr_kv_row_range(const float *x, size_t dim, float *mn, float *mx) {
  *mn = *mx = qtr_kv_sane(x[0]);
  for (size_t i = 1; i < dim; i++) {
    float v = qtr_kv_sane(x[i]);
    *mn = v < *mn ? v : *mn;
    *mx = v > *mx ? v : *mx;
  }
}

/* One head of one token: x (dim), any floats -> code (dim) 0 … levels, one a byte, fp16 bits of scale and zero. */
static inline void qtr_kv_quant_row(const float *x, size_t dim, int levels, uint8_t *code, uint16_t *scale, uint16_t *zero) {
  float mn, mx;
  qtr_kv_row_range(x, dim, &mn, &mx);
  qtr_kv_quant_params(mn, mx, levels, scale, zero);
  float r = 1.0f / qtr_f16_to_f32(*scale), z = qtr_f16_to_f32(*zero);
  for (size_t i = 0; i < dim; i++) code[i] = qtr_kv_quant_code(qtr_kv_sane(x[i]), r, z, levels);
}

static inline float qtr_kv_dequant(unsigned code, float scale, float zero) { return (float)code * scale - zero * scale; }

/* INT8_STATIC; r = 1 / ks. */
static inline int8_t qtr_kv_quant_static(float x, float r) {
  float c = rintf(qtr_kv_sane(x) * r);
  return c <= -128 ? (int8_t)-128 : c >= 127 ? (int8_t)127 : (int8_t)c;
}

#endif
