/* linear_epilogue.h - from accumulators to outputs: scales, zero points and bias (spec B.2 - B.4), then store, add or
 * SiLU·mul (B.9). Plain loops over the 32 rows of a panel, compiled once for each instruction set with the flags of the
 * including file; every operation is a single rounded fp32 operation in a fixed order, so all sets and all batch sizes give
 * the same bits. */
#ifndef QTR_BACKEND_CPU_LINEAR_EPILOGUE_H
#define QTR_BACKEND_CPU_LINEAR_EPILOGUE_H

#include <string.h>

#include "backend/cpu/linear.h"
#include "base/checked.h"
#include "base/half.h"

enum { ROWS = QTR_PANEL_ROWS, HALF = ROWS / 2 };

/* e^x for x clamped to [-87, 88], NaN for NaN, relative error below 2e-7: 2^n * p(r) with x = n ln 2 + r, p the degree-6
 * Taylor-like polynomial of minimal error on |r| <= ln2/2. */
static inline float epilogue_exp(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  float shifted = x * 1.44269504f + 12582912.0f; /* rounds to an integer, kept in the low bits */
  float n = shifted - 12582912.0f;
  float r = x - n * 0.693359375f; /* exact: the constant has 9 bits */
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * qtr_f32_from_bits((qtr_f32_bits(shifted) - 0x4b400000u + 127u) << 23);
}

/* y (32): the linear's result for one token, bias included. */
static inline void epilogue_scale(const struct qtr_linear *l, const struct qtr_input *in, size_t panel, size_t token,
                                  const void *acc_row, bool biased, float *restrict y) {
  size_t at = panel * ROWS;
  if (l->form <= QTR_PANEL_BF16) {
    memcpy(y, acc_row, ROWS * sizeof *y);
  } else {
    const int32_t *restrict acc = acc_row;
    const float *restrict scale = l->scale + at;
    float sa = in->scale[token];
    if (l->form == QTR_PANEL_W4) {
      const float *restrict szero = l->szero + at;
      float sum = in->sum[token];
      for (int r = 0; r < ROWS; r++) y[r] = (float)acc[r] * scale[r] * sa - szero[r] * sum;
    } else {
      /* Σ x (w + 128) - 128 Σ x, modulo 2^32: the difference fits (linear.c bounds n_in) */
      uint32_t bias = biased ? 128u * (uint32_t)in->code_sum[token] : 0;
      for (int r = 0; r < ROWS; r++) y[r] = (float)(int32_t)((uint32_t)acc[r] - bias) * (scale[r] * sa);
    }
  }
  if (l->bias) {
    const float *restrict b = l->bias + at;
    for (int r = 0; r < ROWS; r++) y[r] += b[r];
  }
}

static void finish(const struct qtr_linear_args *args, size_t panel, size_t token, size_t n, const void *acc, bool biased) {
  const struct qtr_linear *l = args->linear;
  bool silu = args->epilogue == QTR_EPILOGUE_SILU_MUL;
  size_t per_panel = silu ? HALF : ROWS, width = silu ? l->n_out / 2 : l->n_out, first = panel * per_panel;
  size_t count = QTR_MIN(per_panel, width - first);
  for (size_t i = 0; i < n; i++) {
    float y[ROWS], *restrict out = (float *)args->out + (token + i) * width + first;
    epilogue_scale(l, args->input, panel, token + i, (const char *)acc + i * ROWS * sizeof(float), biased, y);
    if (silu) {
      for (int r = 0; r < HALF; r++) y[r] = y[r] / (1.0f + epilogue_exp(-y[r])) * y[HALF + r];
    }
    if (args->epilogue == QTR_EPILOGUE_ADD) {
      if (count == ROWS) {
        for (int r = 0; r < ROWS; r++) out[r] += y[r];
      } else {
        for (size_t r = 0; r < count; r++) out[r] += y[r];
      }
    } else if (count == ROWS) {
      memcpy(out, y, ROWS * sizeof *y);
    } else if (count == HALF) {
      memcpy(out, y, HALF * sizeof *y);
    } else {
      memcpy(out, y, count * sizeof *y);
    }
  }
}

#endif
