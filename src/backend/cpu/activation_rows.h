/* activation_rows.h - RMSNorm and int8 quantisation of one row (spec B.6 - B.8), as plain loops over blocks of 64 floats
 * that the compiler turns into vectors. Included once by each of activation_portable.c, activation_avx2.c and
 * activation_avx512.c, which differ in their compiler flags only; sums run in 64 fixed lanes that are joined pairwise, and
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

enum { BLOCK = 64 };

/* What happens to x before it is quantised: v = (x - mean) * rstd * weight, or x itself when weight is NULL. */
struct row {
  const float *x, *weight; /* (dim) */
  float mean, rstd;
  size_t dim;
};

/* v (64) of elements [k, k+64), zeros past the end. */
static inline void block_load(const struct row *r, size_t k, float *restrict v) {
  const float *restrict x = r->x + k, *restrict w = r->weight ? r->weight + k : NULL;
  size_t n = QTR_MIN(r->dim - k, (size_t)BLOCK);
  if (n == BLOCK && w) {
    for (int j = 0; j < BLOCK; j++) v[j] = (x[j] - r->mean) * r->rstd * w[j];
  } else if (n == BLOCK) {
    for (int j = 0; j < BLOCK; j++) v[j] = x[j];
  } else {
    memset(v, 0, BLOCK * sizeof *v);
    for (size_t j = 0; j < n; j++) v[j] = w ? (x[j] - r->mean) * r->rstd * w[j] : x[j];
  }
}

static inline float lanes_sum(float *lane) {
  for (int step = BLOCK / 2; step; step /= 2) {
    for (int j = 0; j < step; j++) lane[j] += lane[j + step];
  }
  return lane[0];
}

static inline float lanes_max(float *lane) {
  for (int step = BLOCK / 2; step; step /= 2) {
    for (int j = 0; j < step; j++) lane[j] = lane[j] > lane[j + step] ? lane[j] : lane[j + step];
  }
  return lane[0];
}

/* max |v| (NaN does not count) and Σ v */
static void row_measure(const struct row *r, float *amax, float *sum) {
  float top[BLOCK] = {0}, total[BLOCK] = {0}, v[BLOCK];
  for (size_t k = 0; k < r->dim; k += BLOCK) {
    block_load(r, k, v);
    for (int j = 0; j < BLOCK; j++) {
      float a = fabsf(v[j]);
      top[j] = a > top[j] ? a : top[j];
      total[j] += v[j];
    }
  }
  *amax = lanes_max(top);
  *sum = lanes_sum(total);
}

/* Codes of v with their sums, and the scale; amax as B.6 or B.7 want it. */
static void row_encode(struct qtr_input *in, size_t token, const struct row *r, float amax, float sum) {
  int8_t *restrict code = (int8_t *)in->data + token * in->stride;
  int32_t *group_sum = in->group_sum + token * in->n_groups, code_sum = 0;
  float scale = qtr_f16_round(amax / 127.0f), inv = amax > 0 ? 127.0f / amax : 0.0f;
  memset(group_sum, 0, in->n_groups * sizeof *group_sum);
  for (size_t k = 0; k < r->dim; k += BLOCK) {
    float v[BLOCK];
    int32_t c[BLOCK], total = 0;
    block_load(r, k, v);
    for (int j = 0; j < BLOCK; j++) {
      /* Adding 1.5 * 2^23 rounds to the nearest even integer and leaves it in the low bits. */
      float y = v[j] * inv;
      y = y == y ? y : 0.0f;
      y = y > -128.0f ? y : -128.0f;
      y = y < 127.0f ? y : 127.0f;
      c[j] = (int32_t)(qtr_f32_bits(y + 12582912.0f) - 0x4b400000u);
      total += c[j];
    }
    for (int j = 0; j < BLOCK; j++) code[k + (size_t)j] = (int8_t)c[j];
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
  float squares[BLOCK] = {0}, total[BLOCK] = {0}, v[BLOCK];
  for (size_t k = 0; k < dim; k += BLOCK) {
    block_load(&r, k, v);
    for (int j = 0; j < BLOCK; j++) {
      squares[j] += v[j] * v[j];
      total[j] += v[j];
    }
  }
  *mean = lanes_sum(total) / (float)dim;
  return 1.0f / sqrtf(lanes_sum(squares) / (float)dim + eps);
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
