/* half.h - IEEE half and bfloat16 as uint16_t, converted bit by bit: portable and exact (round to nearest even), so that
 * every backend agrees on what "f16(x)" means. Kernels that need speed use the machine's own conversions, which give the
 * same bits. */
#ifndef QTR_BASE_HALF_H
#define QTR_BASE_HALF_H

#include <stdint.h>
#include <string.h>

static inline uint32_t qtr_f32_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

static inline float qtr_f32_from_bits(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

static inline float qtr_f16_to_f32(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
  uint32_t exponent = (h >> 10) & 0x1fu;
  uint32_t mantissa = h & 0x3ffu;
  if (exponent == 0x1f) return qtr_f32_from_bits(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {
    /* subnormal or zero: mantissa * 2^-24, exact in fp32 */
    float magnitude = (float)mantissa * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return qtr_f32_from_bits(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

static inline uint16_t qtr_f16_from_f32(float x) {
  uint32_t u = qtr_f32_bits(x);
  uint32_t sign = (u >> 16) & 0x8000u;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | ((u >> 13) & 0x3ffu)); /* NaN stays NaN */
  if (u >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);                       /* rounds to infinity */
  if (u < 0x38800000u) {
    /* below 2^-14: adding 0.5 aligns the fp16 subnormal with the fp32 mantissa and rounds to nearest even */
    float magnitude = qtr_f32_from_bits(u) + 0.5f;
    return (uint16_t)(sign | (qtr_f32_bits(magnitude) - 0x3f000000u));
  }
  u += 0xfffu + ((u >> 13) & 1u);
  return (uint16_t)(sign | ((u - 0x38000000u) >> 13));
}

/* f16(x) of the specification: the value of x rounded to half. */
static inline float qtr_f16_round(float x) { return qtr_f16_to_f32(qtr_f16_from_f32(x)); }

static inline float qtr_bf16_to_f32(uint16_t h) { return qtr_f32_from_bits((uint32_t)h << 16); }

static inline uint16_t qtr_bf16_from_f32(float x) {
  uint32_t u = qtr_f32_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40u);
  return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

#endif
