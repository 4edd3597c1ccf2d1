/* linear_portable.c - matrix kernels in plain C: correct on any processor, and the readable form of what the others do. */
#include "backend/cpu/linear_epilogue.h"

static float float_at(enum qtr_panel form, const uint8_t *panel, size_t i) {
  if (form == QTR_PANEL_F32) {
    float x;
    memcpy(&x, panel + 4 * i, 4);
    return x;
  }
  uint16_t h;
  memcpy(&h, panel + 2 * i, 2);
  return form == QTR_PANEL_F16 ? qtr_f16_to_f32(h) : qtr_bf16_to_f32(h);
}

static void dot_float(const struct qtr_linear *l, const float *x, size_t stride, const uint8_t *panel, size_t n,
                      float *acc) {
  memset(acc, 0, n * ROWS * sizeof *acc);
  for (size_t k = 0; k < l->n_in; k++) {
    float w[ROWS];
    for (size_t r = 0; r < ROWS; r++) w[r] = float_at(l->form, panel, k * ROWS + r);
    for (size_t i = 0; i < n; i++) {
      float xk = x[i * stride + k];
      for (size_t r = 0; r < ROWS; r++) acc[i * ROWS + r] += xk * w[r];
    }
  }
}

/* acc (32) += codes of the 8 W4 blocks of a segment times x (64) */
static void dot_codes(const uint8_t *block, const int8_t *x, uint32_t *restrict acc) {
  for (int i = 0; i < QTR_SEGMENT; i += 8, block += QTR_BLOCK_BYTES) {
    for (int r = 0; r < ROWS; r++) {
      int32_t sum = 0;
      for (int b = 0; b < 4; b++) sum += (block[4 * r + b] & 15) * x[i + b] + (block[4 * r + b] >> 4) * x[i + 4 + b];
      acc[r] += (uint32_t)sum;
    }
  }
}

/* One group of 128: two segments. */
static void dot_group(const uint8_t *group, const int8_t *x0, const int8_t *x1, int32_t group_sum, uint32_t *acc) {
  uint32_t part[ROWS] = {0};
  dot_codes(group + 64, x0, part);
  dot_codes(group + 64 + 8 * QTR_BLOCK_BYTES, x1, part);
  for (int r = 0; r < ROWS; r++) acc[r] += part[r] * group[r] - group[ROWS + r] * (uint32_t)group_sum;
}

static void dot_bytes(const uint8_t *block, const int8_t *x, uint32_t *restrict acc) {
  for (int i = 0; i < QTR_SEGMENT; i += 4, block += QTR_BLOCK_BYTES) {
    for (int r = 0; r < ROWS; r++) {
      int32_t sum = 0;
      for (int b = 0; b < 4; b++) sum += block[4 * r + b] * x[i + b];
      acc[r] += (uint32_t)sum;
    }
  }
}

static void dot(const struct qtr_linear *l, const struct qtr_input *in, size_t panel, size_t token, size_t n, void *acc) {
  const uint8_t *p = qtr_linear_panel(l, panel);
  if (l->form <= QTR_PANEL_BF16) {
    dot_float(l, qtr_input_values(in, token), in->dim, p, n, acc);
    return;
  }
  memset(acc, 0, n * ROWS * sizeof(uint32_t));
  for (size_t t = token; t < token + n; t++) {
    uint32_t *sums = (uint32_t *)acc + (t - token) * ROWS; /* modulo 2^32, as the vector instructions count */
    for (size_t s = 0; s < in->n_segments; s++) {
      const int8_t *x = qtr_input_codes(in, t, s);
      if (l->form == QTR_PANEL_W4) {
        dot_codes(p + s * 8 * QTR_BLOCK_BYTES, x, sums);
      } else if (l->form == QTR_PANEL_W8) {
        dot_bytes(p + s * 16 * QTR_BLOCK_BYTES, x, sums);
      } else if (s % 2 == 0) {
        dot_group(p + s / 2 * QTR_GROUP_BYTES, x, x + QTR_TILE_BYTES, in->group_sum[t * in->n_groups + s / 2], sums);
      }
    }
  }
}

const struct qtr_linear_kernels *qtr_cpu_linear_portable(void) {
  static const struct qtr_linear_kernels kernels = {4, dot, finish};
  return &kernels;
}
