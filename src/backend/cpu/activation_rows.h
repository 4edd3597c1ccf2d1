/* activation_rows.h - RMSNorm and int8 quantisation of one row (spec B.6 - B.8). Written in the vectors of 16 lanes that gcc
 * and clang know on every processor, and included once by each of activation_portable.c, activation_avx2.c and
 * activation_avx512.c, which differ in their compiler flags only: sums run in 64 fixed lanes that are joined pairwise, and
 * nothing is contracted to FMA, so every set gives the same bits.
 *
 * As in the reference backend: a row of zeros gives codes and scale 0, a NaN gives code 0, and the scale stops at 65504. */
#ifndef QTR_BACKEND_CPU_ACTIVATION_ROWS_H
#define QTR_BACKEND_CPU_ACTIVATION_ROWS_H

#include <math.h>
#include <string.h>

#include "backend/cpu/activation.h"
#include "base/checked.h"
#include "base/half.h"

enum { LANES = 16, BLOCK = QTR_SEGMENT, VECTORS = BLOCK / LANES };

/* Passed by address only, because not every target has a register for them. */
typedef float lanes __attribute__((vector_size(LANES * 4)));
typedef int32_t int_lanes __attribute__((vector_size(LANES * 4)));
typedef int8_t code_lanes __attribute__((vector_size(LANES)));

/* What happens to x before it is quantised: v = (x - mean) * rstd * weight, or x itself when weight is NULL. */
struct row {
  const float *x, *weight; /* (dim) */
  float mean, rstd;
  size_t dim;
};

/* v (64) of elements [k, k + 64), zeros past the end. */
static inline __attribute__((always_inline)) void block_load(const struct row *r, size_t k, lanes *v) {
  size_t n = QTR_MIN(r->dim - k, (size_t)BLOCK);
  lanes w[VECTORS];
  if (n == BLOCK) {
    memcpy(v, r->x + k, BLOCK * sizeof(float));
    if (r->weight) memcpy(w, r->weight + k, BLOCK * sizeof(float));
  } else {
    memset(v, 0, BLOCK * sizeof(float));
    memset(w, 0, BLOCK * sizeof(float)); /* makes the rest zeros again after the mean is taken away */
    memcpy(v, r->x + k, n * sizeof(float));
    if (r->weight) memcpy(w, r->weight + k, n * sizeof(float));
  }
  if (!r->weight) return;
  for (int i = 0; i < VECTORS; i++) v[i] = (v[i] - r->mean) * r->rstd * w[i];
}

static inline float block_sum(const lanes *v) {
  float lane[BLOCK];
  memcpy(lane, v, sizeof lane);
  for (int step = BLOCK / 2; step; step /= 2) {
    for (int j = 0; j < step; j++) lane[j] += lane[j + step];
  }
  return lane[0];
}

/* max |v| (NaN does not count) and Σ v */
static inline void row_measure(const struct row *r, float *amax, float *sum) {
  lanes total[VECTORS] = {{0}}, v[VECTORS];
  int_lanes top[VECTORS] = {{0}}; /* bits of |v|: they are in the order of the numbers, NaN above infinity */
  for (size_t k = 0; k < r->dim; k += BLOCK) {
    block_load(r, k, v);
    for (int i = 0; i < VECTORS; i++) {
      int_lanes a = (int_lanes)v[i] & 0x7fffffff;
      int_lanes better = (a > top[i]) & (a <= 0x7f800000);
      top[i] = (a & better) | (top[i] & ~better);
      total[i] += v[i];
    }
  }
  int32_t lane[BLOCK], most = 0;
  memcpy(lane, top, sizeof lane);
  for (int j = 0; j < BLOCK; j++) most = QTR_MAX(most, lane[j]);
  *amax = qtr_f32_from_bits((uint32_t)most);
  *sum = block_sum(total);
}

/* Codes of v with their sums, and the scale; amax as B.6 or B.7 want it: |v| * 127 / amax rounds to at most 127. */
static inline void row_encode(struct qtr_input *in, size_t token, const struct row *r, float amax, float sum) {
  int8_t *code = qtr_input_codes(in, token, 0);
  int32_t *group_sum = in->group_sum + token * in->n_groups, code_sum = 0;
  float scale = qtr_f16_round(amax / 127.0f), inv = amax > 0 ? 127.0f / amax : 0.0f;
  memset(group_sum, 0, in->n_groups * sizeof *group_sum);
  for (size_t k = 0; k < r->dim; k += BLOCK, code += QTR_TILE_BYTES) {
    lanes v[VECTORS];
    int_lanes sums = {0};
    int32_t lane[LANES], total = 0;
    block_load(r, k, v);
    for (int i = 0; i < VECTORS; i++) {
      /* Adding 1.5 * 2^23 rounds to the nearest even integer and leaves it in the low bits; NaN is taken out before. */
      lanes y = v[i] * inv;
      y = (lanes)((int_lanes)y & (int_lanes)(y == y));
      int_lanes c = (int_lanes)(y + 12582912.0f) - 0x4b400000;
      code_lanes small = __builtin_convertvector(c, code_lanes);
      memcpy(code + i * LANES, &small, sizeof small);
      sums += c;
    }
    memcpy(lane, &sums, sizeof lane);
    for (int j = 0; j < LANES; j++) total += lane[j];
    group_sum[k / QTR_GROUP] += total;
    code_sum += total;
  }
  in->scale[token] = scale < 65504.0f ? scale : 65504.0f;
  in->sum[token] = sum;
  in->code_sum[token] = code_sum;
}

static void quant_row(struct qtr_input *in, size_t token, const float *x) {
  struct row r = {.x = x, .dim = in->dim};
  float amax, sum;
  row_measure(&r, &amax, &sum);
  row_encode(in, token, &r, amax, sum);
}

/* rstd = 1 / sqrt(Σx² / dim + eps); *mean = Σx / dim */
static float row_rstd(const float *x, size_t dim, float eps, float *mean) {
  struct row r = {.x = x, .dim = dim};
  lanes squares[VECTORS] = {{0}}, total[VECTORS] = {{0}}, v[VECTORS];
  for (size_t k = 0; k < dim; k += BLOCK) {
    block_load(&r, k, v);
    for (int i = 0; i < VECTORS; i++) {
      squares[i] += v[i] * v[i];
      total[i] += v[i];
    }
  }
  *mean = block_sum(total) / (float)dim;
  return 1.0f / sqrtf(block_sum(squares) / (float)dim + eps);
}

/* B.7: the maximum and the sum are those of fp16-rounded v, the sum that of up to 1,024 GPU threads with fp16 partial sums.
 */
static void row_measure_qserve(const struct row *r, float *amax, float *sum) {
  size_t n_threads = QTR_MIN(qtr_round_up(r->dim, 32), (size_t)1024);
  *amax = qtr_f16_to_f32(0x0011); /* f16(1e-6) */
  double total = 0;
  for (size_t thread = 0; thread < n_threads; thread++) {
    float part = 0;
    for (size_t k = thread; k < r->dim; k += n_threads) {
      float v = qtr_f16_round((r->x[k] - r->mean) * r->rstd * r->weight[k]);
      *amax = fabsf(v) > *amax ? fabsf(v) : *amax;
      part = qtr_f16_round(part + v);
    }
    total += (double)part;
  }
  *sum = qtr_f16_round((float)total);
}

static void rmsnorm_quant_row(struct qtr_input *in, size_t token, const float *x, const float *weight, float eps,
                              enum qtr_norm norm) {
  struct row r = {.x = x, .weight = weight, .dim = in->dim};
  float amax, sum, mean;
  r.rstd = row_rstd(x, in->dim, eps, &mean);
  if (norm == QTR_NORM_QSERVE) {
    r.mean = mean;
    row_measure_qserve(&r, &amax, &sum);
  } else {
    row_measure(&r, &amax, &sum);
  }
  row_encode(in, token, &r, amax, sum);
}

static void rmsnorm_row(float *restrict out, const float *restrict x, const float *restrict weight, float eps, size_t dim) {
  float mean, rstd = row_rstd(x, dim, eps, &mean);
  for (size_t k = 0; k < dim; k++) out[k] = x[k] * rstd * weight[k];
}

static const struct qtr_activation_kernels kernels = {quant_row, rmsnorm_quant_row, rmsnorm_row};

#endif
