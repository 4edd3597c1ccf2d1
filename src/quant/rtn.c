/* rtn.c - round to nearest (rtn.h, spec F.6).
 *
 * Zeros. F.6's PostScale zero is -min of the row or group, rounded to what the file can hold (fp16, or an integer below the
 * second level), not a multiple of the scale: nothing of the 16 codes is lost to rounding the zero. The range is widened to
 * contain 0 (min <= 0 <= max), which real weights do by themselves: then szero >= 0 as A.2.1 asks, z2 is in 0…120, and P was
 * searched for exactly those ranges. */
#include "quant/rtn.h"

#include "base/checked.h"
#include "base/half.h"

#include <math.h>
#include <stdbool.h>

#define GROUP 128

/* rni for |x| < 2^22: adding 1.5 * 2^23 leaves no bits below one, ties to even. Unlike nearbyintf it vectorises on any
 * x86-64. */
static inline float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

static inline float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

/* Smallest and largest of n values and 0. False when one is not finite: x - x is 0 but for NaN and infinities. */
static bool range(const float *w, size_t n, float *low, float *high) {
  float a = 0, b = 0, poison = 0;
  for (size_t i = 0; i < n; i++) {
    a = w[i] < a ? w[i] : a;
    b = w[i] > b ? w[i] : b;
    poison += w[i] - w[i];
  }
  *low = a;
  *high = b;
  return poison == 0;
}

/* Adds the difference of n values to the error; sums in double. */
static void measure(const float *w, const float *approx, size_t n, struct qtr_rtn_error *error) {
  double squared = 0, norm = 0;
  float max = 0;
  for (size_t i = 0; i < n; i++) {
    double d = (double)w[i] - (double)approx[i], x = w[i];
    squared += d * d;
    norm += x * x;
    float a = fabsf(w[i] - approx[i]);
    max = a > max ? a : max;
  }
  error->squared += squared;
  error->norm += norm;
  if ((double)max > error->max) error->max = max;
}

/* A scale as fp16; 0 becomes 1 (F.6). */
static enum qtr_rtn_status half_scale(float x, uint16_t *half, float *value) {
  *half = qtr_f16_from_f32(x);
  *value = qtr_f16_to_f32(*half);
  if (*value == 0) {
    *half = 0x3c00;
    *value = 1;
  }
  return isfinite(*value) ? QTR_RTN_OK : QTR_RTN_RANGE;
}

enum qtr_rtn_status qtr_rtn_w4(const float *w, size_t n_rows, size_t n_in, uint8_t *codes, uint16_t *scale, uint16_t *szero,
                               struct qtr_rtn_error *error) {
  for (size_t r = 0; r < n_rows; r++, w += n_in, codes += n_in) {
    float low, high, s, approx[GROUP];
    if (!range(w, n_in, &low, &high)) return QTR_RTN_NOT_FINITE;
    /* halves first: the difference of two floats may overflow */
    if (half_scale(high / 15 - low / 15, &scale[r], &s) != QTR_RTN_OK) return QTR_RTN_RANGE;
    szero[r] = qtr_f16_from_f32(-low);
    float z = qtr_f16_to_f32(szero[r]);
    if (!isfinite(z)) return QTR_RTN_RANGE;
    for (size_t begin = 0; begin < n_in; begin += GROUP) {
      size_t n = QTR_MIN(n_in - begin, (size_t)GROUP);
      for (size_t i = 0; i < n; i++) {
        float q = round_even(clamp((w[begin + i] + z) / s, 0, 15));
        codes[begin + i] = (uint8_t)q;
        approx[i] = q * s - z;
      }
      measure(w + begin, approx, n, error);
    }
  }
  return QTR_RTN_OK;
}

enum qtr_rtn_status qtr_rtn_w4_g128(const float *w, size_t n_rows, size_t n_in, uint8_t *codes, uint16_t *s1, uint8_t *s2,
                                    uint8_t *z2, struct qtr_rtn_error *error) {
  for (size_t r = 0; r < n_rows; r++) {
    float low, high, first;
    if (!range(w, n_in, &low, &high)) return QTR_RTN_NOT_FINITE;
    if (half_scale(QTR_MAX(high, -low) / QTR_RTN_PROTECT, &s1[r], &first) != QTR_RTN_OK) return QTR_RTN_RANGE;
    for (size_t g = 0; g < n_in / GROUP; g++, w += GROUP, codes += GROUP) {
      float x[GROUP], approx[GROUP];
      for (size_t i = 0; i < GROUP; i++) x[i] = clamp(w[i] / first, -QTR_RTN_PROTECT, QTR_RTN_PROTECT);
      (void)range(x, GROUP, &low, &high);
      float s = round_even((high - low) / 15), z = round_even(-low);
      s = s < 1 ? 1 : s; /* at most 2 P / 15 = 16 */
      /* Within P no code leaves int8; the smaller of the two limits is written down so that this needs no proof. */
      float last = QTR_MIN(15.0f, floorf((127 + z) / s));
      for (size_t i = 0; i < GROUP; i++) {
        float q = round_even(clamp((x[i] + z) / s, 0, last));
        codes[i] = (uint8_t)q;
        approx[i] = (q * s - z) * first;
      }
      *s2++ = (uint8_t)s;
      *z2++ = (uint8_t)z;
      measure(w, approx, GROUP, error);
    }
  }
  return QTR_RTN_OK;
}

enum qtr_rtn_status qtr_rtn_w8(const float *w, size_t n_rows, size_t n_in, int8_t *codes, float *scale,
                               struct qtr_rtn_error *error) {
  for (size_t r = 0; r < n_rows; r++, w += n_in, codes += n_in) {
    float low, high, s, approx[GROUP];
    uint16_t half;
    if (!range(w, n_in, &low, &high)) return QTR_RTN_NOT_FINITE;
    if (half_scale(QTR_MAX(high, -low) / 127, &half, &s) != QTR_RTN_OK) return QTR_RTN_RANGE;
    scale[r] = s;
    for (size_t begin = 0; begin < n_in; begin += GROUP) {
      size_t n = QTR_MIN(n_in - begin, (size_t)GROUP);
      for (size_t i = 0; i < n; i++) {
        float q = round_even(clamp(w[begin + i] / s, -127, 127));
        codes[begin + i] = (int8_t)q;
        approx[i] = q * s;
      }
      measure(w + begin, approx, n, error);
    }
  }
  return QTR_RTN_OK;
}

static enum qtr_rtn_status round_halves(const float *w, size_t n, uint16_t *out, bool bf16, struct qtr_rtn_error *error) {
  float approx[GROUP];
  for (size_t begin = 0; begin < n; begin += GROUP) {
    size_t k = QTR_MIN(n - begin, (size_t)GROUP);
    for (size_t i = 0; i < k; i++) {
      if (!isfinite(w[begin + i])) return QTR_RTN_NOT_FINITE;
      out[begin + i] = bf16 ? qtr_bf16_from_f32(w[begin + i]) : qtr_f16_from_f32(w[begin + i]);
      approx[i] = bf16 ? qtr_bf16_to_f32(out[begin + i]) : qtr_f16_to_f32(out[begin + i]);
      if (!isfinite(approx[i])) return QTR_RTN_RANGE;
    }
    measure(w + begin, approx, k, error);
  }
  return QTR_RTN_OK;
}

enum qtr_rtn_status qtr_rtn_f16(const float *w, size_t n, uint16_t *out, struct qtr_rtn_error *error) {
  return round_halves(w, n, out, false, error);
}

enum qtr_rtn_status qtr_rtn_bf16(const float *w, size_t n, uint16_t *out, struct qtr_rtn_error *error) {
  return round_halves(w, n, out, true, error);
}
