/* linear_dot.h - dot products of a panel (linear.h) with 1, 2, 4 or 8 tokens, straight from the stored bytes: the body
 * shared by the vector instruction sets. The including file defines, for its registers,
 *
 *     vint, vfloat      a register of 32-bit lanes; VECTORS registers hold the 32 rows of a panel
 *     v_load, v_store (of vint at any int32 address), v_zero, v_nibble_low, v_nibble_high, v_set32, v_add, v_sub, v_mul
 *     v_broadcast4(p)   the 4 bytes at p in every lane
 *     v_bytes32(p)      unsigned bytes at p, one for each lane, widened
 *     v_dot_codes(acc, w, x)   acc + Σ of 4 products of codes 0…15 with signed bytes, in each lane
 *     v_dot_bytes(acc, w, x)   the same for any unsigned bytes w
 *     f_zero, f_set1, f_fma(a, b, c), f_load_f32/f16/bf16(p), f_store
 *     DOT_TOKENS        most tokens whose accumulators fit the register file: 2, 4 or 8
 *
 * The functions are inlined with a constant number of tokens, so that accumulators stay in registers. Memory is read as one
 * stream, fetched ahead because the panels of a thread follow each other: one token is bounded by DRAM. */
#include <string.h>

#include "backend/cpu/linear_epilogue.h"

#define ALWAYS static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

enum { LANES = ROWS / VECTORS, AHEAD = 2048 };

/* acc (n, VECTORS) += codes of 8 W4 blocks for each of n_segments segments times x; x points at the first token's first
 * segment. With few tokens low and high nibbles get accumulators of their own: one chain would wait for its own latency. */
ALWAYS void dot_codes(const uint8_t *block, size_t n_segments, const int8_t *x, const int n, vint (*restrict acc)[VECTORS]) {
  vint more[DOT_TOKENS][VECTORS];
  const int split = n <= 2;
  UNROLL for (int m = 0; m < n; m++) { UNROLL for (int v = 0; v < VECTORS; v++) more[m][v] = v_zero(); }
  for (const int8_t *end = x + n_segments * QTR_TILE_BYTES; x < end; x += QTR_TILE_BYTES) {
    for (int i = 0; i < QTR_SEGMENT; i += 8, block += QTR_BLOCK_BYTES) {
      vint low[VECTORS], high[VECTORS];
      __builtin_prefetch(block + AHEAD);
      __builtin_prefetch(block + AHEAD + 64);
      UNROLL for (int v = 0; v < VECTORS; v++) {
        vint w = v_load(block + (size_t)v * sizeof(vint));
        low[v] = v_nibble_low(w);
        high[v] = v_nibble_high(w);
      }
      UNROLL for (int m = 0; m < n; m++) {
        vint x0 = v_broadcast4(x + m * QTR_SEGMENT + i), x1 = v_broadcast4(x + m * QTR_SEGMENT + i + 4);
        UNROLL for (int v = 0; v < VECTORS; v++) {
          acc[m][v] = v_dot_codes(acc[m][v], low[v], x0);
          if (split) {
            more[m][v] = v_dot_codes(more[m][v], high[v], x1);
          } else {
            acc[m][v] = v_dot_codes(acc[m][v], high[v], x1);
          }
        }
      }
    }
  }
  if (!split) return;
  UNROLL for (int m = 0; m < n; m++) { UNROLL for (int v = 0; v < VECTORS; v++) acc[m][v] = v_add(acc[m][v], more[m][v]); }
}

ALWAYS void clear(const int n, vint (*restrict acc)[VECTORS]) {
  UNROLL for (int m = 0; m < n; m++) { UNROLL for (int v = 0; v < VECTORS; v++) acc[m][v] = v_zero(); }
}

ALWAYS void put(const int n, vint (*restrict acc)[VECTORS], int32_t *out) {
  UNROLL for (int m = 0; m < n; m++) {
    UNROLL for (int v = 0; v < VECTORS; v++) v_store(out + m * ROWS + v * LANES, acc[m][v]);
  }
}

ALWAYS void dot_w4(const uint8_t *panel, const struct qtr_input *in, size_t token, const int n, int32_t *out) {
  vint acc[DOT_TOKENS][VECTORS];
  clear(n, acc);
  dot_codes(panel, in->n_segments, qtr_input_codes(in, token, 0), n, acc);
  put(n, acc, out);
}

/* B.3 with the group's scale and zero point taken out of the inner sum: Σ w8 x = Σ_g (s2 Σ code x - zs Σ x). */
ALWAYS void dot_w4_groups(const struct qtr_linear *l, const uint8_t *group, const struct qtr_input *in, size_t token,
                          const int n, int32_t *out) {
  size_t n_groups = l->n_in / QTR_GROUP;
  memset(out, 0, (size_t)n * ROWS * sizeof *out);
  for (size_t g = 0; g < n_groups; g++, group += QTR_GROUP_BYTES) {
    vint acc[DOT_TOKENS][VECTORS];
    clear(n, acc);
    dot_codes(group + 64, 2, qtr_input_codes(in, token, 2 * g), n, acc);
    UNROLL for (int v = 0; v < VECTORS; v++) {
      vint s2 = v_bytes32(group + v * LANES), zs = v_bytes32(group + ROWS + v * LANES);
      UNROLL for (int m = 0; m < n; m++) {
        vint sum = v_set32(in->group_sum[(token + (size_t)m) * in->n_groups + g]);
        int32_t *to = out + m * ROWS + v * LANES;
        v_store(to, v_add(v_load(to), v_sub(v_mul(acc[m][v], s2), v_mul(sum, zs))));
      }
    }
  }
}

ALWAYS void dot_w8(const uint8_t *block, const struct qtr_input *in, size_t token, const int n, int32_t *out) {
  vint acc[DOT_TOKENS][VECTORS];
  clear(n, acc);
  for (size_t segment = 0; segment < in->n_segments; segment++) {
    const int8_t *x = qtr_input_codes(in, token, segment);
    for (int i = 0; i < QTR_SEGMENT; i += 4, block += QTR_BLOCK_BYTES) {
      vint w[VECTORS];
      __builtin_prefetch(block + AHEAD);
      __builtin_prefetch(block + AHEAD + 64);
      UNROLL for (int v = 0; v < VECTORS; v++) w[v] = v_load(block + (size_t)v * sizeof(vint));
      UNROLL for (int m = 0; m < n; m++) {
        vint x0 = v_broadcast4(x + m * QTR_SEGMENT + i);
        UNROLL for (int v = 0; v < VECTORS; v++) acc[m][v] = v_dot_bytes(acc[m][v], w[v], x0);
      }
    }
  }
  put(n, acc, out);
}

/* Each output is one chain of FMAs in the order of the inputs. */
ALWAYS void dot_float(const struct qtr_linear *l, const uint8_t *w, const struct qtr_input *in, size_t token,
                      const enum qtr_panel form, const int n, float *out) {
  const size_t size = form == QTR_PANEL_F32 ? 4 : 2;
  const float *x = qtr_input_values(in, token);
  vfloat acc[DOT_TOKENS][VECTORS];
  UNROLL for (int m = 0; m < n; m++) { UNROLL for (int v = 0; v < VECTORS; v++) acc[m][v] = f_zero(); }
  for (size_t k = 0; k < l->n_in; k++, w += ROWS * size) {
    vfloat row[VECTORS];
    __builtin_prefetch(w + AHEAD);
    UNROLL for (int v = 0; v < VECTORS; v++) {
      const uint8_t *p = w + (size_t)v * LANES * size;
      row[v] = form == QTR_PANEL_F32 ? f_load_f32(p) : form == QTR_PANEL_F16 ? f_load_f16(p) : f_load_bf16(p);
    }
    UNROLL for (int m = 0; m < n; m++) {
      vfloat xk = f_set1(x[(size_t)m * in->dim + k]);
      UNROLL for (int v = 0; v < VECTORS; v++) acc[m][v] = f_fma(xk, row[v], acc[m][v]);
    }
  }
  UNROLL for (int m = 0; m < n; m++) {
    UNROLL for (int v = 0; v < VECTORS; v++) f_store(out + m * ROWS + v * LANES, acc[m][v]);
  }
}

ALWAYS void dot_n(const struct qtr_linear *l, const struct qtr_input *in, const uint8_t *panel, size_t token, const int n,
                  void *acc) {
  switch (l->form) {
    case QTR_PANEL_F32: dot_float(l, panel, in, token, QTR_PANEL_F32, n, acc); break;
    case QTR_PANEL_F16: dot_float(l, panel, in, token, QTR_PANEL_F16, n, acc); break;
    case QTR_PANEL_BF16: dot_float(l, panel, in, token, QTR_PANEL_BF16, n, acc); break;
    case QTR_PANEL_W8: dot_w8(panel, in, token, n, acc); break;
    case QTR_PANEL_W4: dot_w4(panel, in, token, n, acc); break;
    case QTR_PANEL_W4G: dot_w4_groups(l, panel, in, token, n, acc); break;
  }
}

static void dot(const struct qtr_linear *l, const struct qtr_input *in, size_t panel, size_t token, size_t n, void *acc) {
  const uint8_t *p = qtr_linear_panel(l, panel);
  while (n) {
    size_t now = 1;
    if (n >= 8 && DOT_TOKENS >= 8) {
      dot_n(l, in, p, token, QTR_MIN(8, DOT_TOKENS), acc);
      now = 8;
    } else if (n >= 4 && DOT_TOKENS >= 4) {
      dot_n(l, in, p, token, QTR_MIN(4, DOT_TOKENS), acc);
      now = 4;
    } else if (n >= 2) {
      dot_n(l, in, p, token, 2, acc);
      now = 2;
    } else {
      dot_n(l, in, p, token, 1, acc);
    }
    token += now; /* a call's tokens lie in one tile: token starts at a multiple of 8, and the pieces get smaller */
    n -= now;
    acc = (int32_t *)acc + now * ROWS;
  }
}

static const struct qtr_linear_kernels kernels = {DOT_TOKENS, dot, finish};
