/* linear_epilogue.h - from accumulators to outputs: scales, zero points and bias (spec B.2 - B.4), then store, add or
 * SiLU·mul (B.9). Written in the vectors of 16 lanes that gcc and clang know on every processor, and compiled once for each
 * instruction set with the flags of the including file; every operation is a single rounded fp32 operation in a fixed order,
 * so all sets and all batch sizes give the same bits. */
#ifndef QTR_BACKEND_CPU_LINEAR_EPILOGUE_H
#define QTR_BACKEND_CPU_LINEAR_EPILOGUE_H

#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "backend/cpu/linear.h"
#include "base/checked.h"
#include "base/half.h"

enum { ROWS = QTR_PANEL_ROWS, HALF = ROWS / 2 };

/* 16 lanes; passed by address only, because not every target has a register for them. */
typedef float lanes __attribute__((vector_size(HALF * 4)));
typedef int32_t int_lanes __attribute__((vector_size(HALF * 4)));
typedef uint32_t bit_lanes __attribute__((vector_size(HALF * 4)));

/* g = silu(g) * u with silu(g) = g / (1 + e^-g). e^x for x clamped to [-87, 88], NaN for NaN, relative error below 2e-7:
 * 2^n * p(r) with x = n ln 2 + r and p a polynomial of degree 6 on |r| <= ln2/2. */
static inline void epilogue_silu_mul(lanes *g, const lanes *u) {
  const lanes zero = {0}, low = zero - 87.0f, high = zero + 88.0f;
  lanes x = -*g;
  bit_lanes below = (bit_lanes)(x < low), above = (bit_lanes)(x > high);
  x = (lanes)((below & (bit_lanes)low) | (above & (bit_lanes)high) | (~(below | above) & (bit_lanes)x));
  lanes shifted = x * 1.44269504f + 12582912.0f; /* rounds to an integer, kept in the low bits */
  lanes n = shifted - 12582912.0f;
  lanes r = x - n * 0.693359375f; /* exact: the constant has 9 bits */
  r = r - n * -2.12194440e-4f;
  lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  lanes e = p * (lanes)(((bit_lanes)shifted - 0x4b400000u + 127u) << 23);
  *g = *g / (e + 1.0f) * *u;
}

/* Where a panel's outputs of one token go: width values a token, this panel's `count` at `first`. */
struct epilogue_place {
  size_t width, first, count;
};

static inline struct epilogue_place epilogue_place(const struct qtr_linear_args *args, size_t panel) {
  bool silu = args->epilogue == QTR_EPILOGUE_SILU_MUL;
  size_t rows = silu ? HALF : ROWS, width = silu ? args->linear->n_out / 2 : args->linear->n_out;
  return (struct epilogue_place){width, panel * rows, QTR_MIN(rows, width - panel * rows)};
}

/* The last panel when it is not full: a value at a time. */
static inline void epilogue_put_some(const lanes *y, float *out, size_t count, bool add) {
  float value[ROWS];
  memcpy(value, y, sizeof value);
  for (size_t r = 0; r < count; r++) out[r] = add ? out[r] + value[r] : value[r];
}

/* What the sums are of: floats; codes times int4 codes (B.2); codes times w8 (B.3, B.4) or w8 + 128. */
enum epilogue_sums { SUMS_FLOAT, SUMS_CODES, SUMS_W8, SUMS_W8_BIASED };

/* out (16) = y, past the caches if `stream` and the place allows it. */
static inline __attribute__((always_inline)) void epilogue_put(float *out, const lanes *y, const bool stream) {
#ifdef __AVX512F__
  if (stream && (uintptr_t)out % sizeof *y == 0) {
    _mm512_stream_ps(out, (__m512)*y);
    return;
  }
#endif
  (void)stream;
  memcpy(out, y, sizeof *y);
}

/* Inlined for each constant kind of sums and epilogue, so that scales stay in registers from token to token. stream: the
 * outputs are many, nobody reads them soon, and waiting for their old contents would hold up the loads of other things. */
static inline __attribute__((always_inline)) void epilogue_rows(const struct qtr_linear_args *args, size_t panel,
                                                                size_t token, size_t n, const void *acc,
                                                                const enum epilogue_sums sums,
                                                                const enum qtr_epilogue epilogue, const bool stream) {
  const struct qtr_linear *l = args->linear;
  const struct qtr_input *in = args->input;
  const struct epilogue_place at = epilogue_place(args, panel);
  const bool silu = epilogue == QTR_EPILOGUE_SILU_MUL, add = epilogue == QTR_EPILOGUE_ADD, has_bias = l->bias != NULL;
  const bool full = at.count == (silu ? HALF : ROWS);
  lanes scale[2] = {{0}}, szero[2] = {{0}}, bias[2] = {{0}};
  if (sums != SUMS_FLOAT) memcpy(scale, l->scale + panel * ROWS, sizeof scale);
  if (sums == SUMS_CODES) memcpy(szero, l->szero + panel * ROWS, sizeof szero);
  if (has_bias) memcpy(bias, l->bias + panel * ROWS, sizeof bias);
  for (size_t t = token; t < token + n; t++, acc = (const char *)acc + ROWS * sizeof(float)) {
    float *out = (float *)args->out + t * at.width + at.first;
    lanes y[2], old[2];
    bit_lanes a[2];
    memcpy(a, acc, sizeof a);
    for (int v = 0; v < 2; v++) {
      /* Σ x (w + 128) - 128 Σ x, modulo 2^32: the difference fits (linear.c bounds n_in) */
      if (sums == SUMS_W8_BIASED) a[v] -= 128u * (uint32_t)in->code_sum[t];
      if (sums == SUMS_FLOAT) {
        y[v] = (lanes)a[v];
      } else if (sums == SUMS_CODES) {
        y[v] = __builtin_convertvector((int_lanes)a[v], lanes) * scale[v] * in->scale[t] - szero[v] * in->sum[t];
      } else {
        y[v] = __builtin_convertvector((int_lanes)a[v], lanes) * (scale[v] * in->scale[t]);
      }
      if (has_bias) y[v] += bias[v];
    }
    if (silu) epilogue_silu_mul(&y[0], &y[1]);
    if (!full) {
      epilogue_put_some(y, out, at.count, add);
    } else if (silu) {
      epilogue_put(out, &y[0], stream);
    } else {
      if (add) {
        memcpy(old, out, sizeof old);
        y[0] += old[0];
        y[1] += old[1];
      }
      epilogue_put(out, &y[0], stream && !add);
      epilogue_put(out + HALF, &y[1], stream && !add);
    }
  }
}

static inline __attribute__((always_inline)) void epilogue_sums(const struct qtr_linear_args *args, size_t panel,
                                                                size_t token, size_t n, const void *acc,
                                                                const enum epilogue_sums sums, const bool stream) {
  switch (args->epilogue) {
    case QTR_EPILOGUE_SILU_MUL: epilogue_rows(args, panel, token, n, acc, sums, QTR_EPILOGUE_SILU_MUL, stream); break;
    case QTR_EPILOGUE_ADD: epilogue_rows(args, panel, token, n, acc, sums, QTR_EPILOGUE_ADD, stream); break;
    default: epilogue_rows(args, panel, token, n, acc, sums, QTR_EPILOGUE_STORE, stream); break;
  }
}

#ifndef EPILOGUE_OWN_FINISH
static void finish(const struct qtr_linear_args *args, size_t panel, size_t token, size_t n, const void *acc, bool biased) {
  if (args->linear->form <= QTR_PANEL_BF16) {
    epilogue_sums(args, panel, token, n, acc, SUMS_FLOAT, false);
  } else if (args->linear->form == QTR_PANEL_W4) {
    epilogue_sums(args, panel, token, n, acc, SUMS_CODES, false);
  } else if (biased) {
    epilogue_sums(args, panel, token, n, acc, SUMS_W8_BIASED, false);
  } else {
    epilogue_sums(args, panel, token, n, acc, SUMS_W8, false);
  }
}

#endif

#endif
