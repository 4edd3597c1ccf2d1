/* linear.c - matrices of the reference backend: W4A8 per channel and in groups, W8A8, and floating point (spec A.3, A.4,
 * A.6, B.2 – B.4, B.9).
 *
 * int4 weights are unpacked to one byte a weight at creation: B.2's codes 0 … 15, or B.3's w8 with its arithmetic modulo
 * 256, so that any file, also one whose q*s2 + z leaves the int8 range, computes what the reference system's kernel would.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "backend/common/linear_source.h"
#include "backend/reference/reference.h"
#include "base/checked.h"
#include "base/status.h"
#include "checkpoint/packing.h"

#define ROWS 8 /* rows of a floating-point matrix that are widened together */

static size_t float_bytes(enum qtr_linear_format format) {
  return format == QTR_LINEAR_F32 ? 4 : format == QTR_LINEAR_F16 || format == QTR_LINEAR_BF16 ? 2 : 0;
}

/* The int8 weights of one part: out (n_out, n_in). */
static void part_expand(enum qtr_linear_format format, const struct qtr_linear_part *part, size_t n_in, int8_t *out) {
  if (format == QTR_LINEAR_W8A8) {
    memcpy(out, part->weight, part->n_out * n_in);
    return;
  }
  const uint8_t *packed = part->weight;
  for (size_t row = 0; row < part->n_out; row++) {
    for (size_t k = 0; k < n_in; k++) {
      unsigned q = qtr_w4_get(packed, n_in, row, k);
      if (format == QTR_LINEAR_W4A8_G128) {
        size_t g = k / QTR_GROUP * part->n_out + qtr_s2_position(row);
        q = (q * part->s2_scale[g] + part->s2_zero[g]) & 255u;
      }
      out[row * n_in + k] = (int8_t)(q < 128 ? (int)q : (int)q - 256);
    }
  }
}

enum qtr_status qtr_reference_linear_create(struct qtr_backend *b, const struct qtr_linear_source *source,
                                            struct qtr_linear **linear, struct qtr_error *err) {
  struct qtr_reference *r = (struct qtr_reference *)b;
  size_t n_out = 0, n_weights, n_bytes, size = float_bytes(source->format);
  *linear = NULL;
  enum qtr_status status = qtr_linear_source_check(source, &n_out, err);
  if (status != QTR_OK) return status;
  if (qtr_mul_overflow(n_out, source->n_in, &n_weights) || qtr_mul_overflow(n_weights, size ? size : 1, &n_bytes)) {
    return qtr_fail_memory(err, "a matrix", SIZE_MAX);
  }
  struct qtr_linear *l = qtr_reference_alloc(1, sizeof *l, "a matrix", err);
  if (!l) return QTR_ERR_MEMORY;
  l->format = source->format;
  l->n_in = source->n_in;
  l->n_out = n_out;
  l->n_bytes = n_bytes;
  status = QTR_ERR_MEMORY;

  if (size) {
    if (source->n_in > r->weight_dim) {
      free(r->weight);
      r->weight_dim = 0;
      r->weight = qtr_reference_alloc(source->n_in, ROWS * sizeof *r->weight, "rows of a matrix", err);
      if (!r->weight) goto done;
      r->weight_dim = source->n_in;
    }
    l->owned = !source->borrow;
    for (size_t p = 0; p < source->n_parts; p++) {
      const struct qtr_linear_part *part = &source->part[p];
      l->part_rows[p] = part->n_out;
      if (source->borrow) {
        l->weight[p] = part->weight;
        continue;
      }
      void *copy = qtr_reference_alloc(part->n_out * source->n_in, size, "a matrix", err);
      if (!copy) goto done;
      l->weight[p] = memcpy(copy, part->weight, part->n_out * source->n_in * size);
    }
  } else {
    l->code = qtr_reference_alloc(n_weights, 1, "a matrix", err);
    l->scale = qtr_reference_alloc(n_out, sizeof *l->scale, "the scales of a matrix", err);
    if (!l->code || !l->scale) goto done;
    if (source->format == QTR_LINEAR_W4A8) {
      l->szero = qtr_reference_alloc(n_out, sizeof *l->szero, "the zeros of a matrix", err);
      if (!l->szero) goto done;
    }
    l->n_bytes += n_out * sizeof(float) * (l->szero ? 2 : 1);
  }
  size_t row = 0;
  for (size_t p = 0; p < source->n_parts; row += source->part[p++].n_out) {
    const struct qtr_linear_part *part = &source->part[p];
    if (l->code) part_expand(l->format, part, l->n_in, l->code + row * l->n_in);
    if (l->scale) memcpy(l->scale + row, part->scale, part->n_out * sizeof *l->scale);
    if (l->szero) memcpy(l->szero + row, part->szero, part->n_out * sizeof *l->szero);
    if (!part->bias) continue;
    if (!l->bias) { /* one part with a bias: the others get zeros, which change nothing */
      l->bias = qtr_reference_alloc(n_out, sizeof *l->bias, "a bias", err);
      if (!l->bias) goto done;
      l->n_bytes += n_out * sizeof(float);
    }
    memcpy(l->bias + row, part->bias, part->n_out * sizeof *l->bias);
  }
  *linear = l;
  l = NULL;
  status = QTR_OK;
done:
  qtr_reference_linear_free(b, l);
  return status;
}

void qtr_reference_linear_free(struct qtr_backend *b, struct qtr_linear *linear) {
  (void)b;
  if (!linear) return;
  for (size_t p = 0; linear->owned && p < QTR_MAX_PARTS; p++) free((void *)(uintptr_t)linear->weight[p]);
  free(linear->code);
  free(linear->scale);
  free(linear->szero);
  free(linear->bias);
  free(linear);
}

size_t qtr_reference_linear_bytes(const struct qtr_linear *linear) { return linear->n_bytes; }

int32_t qtr_reference_dot(const int8_t *x, const int8_t *row, size_t n_in) {
  int32_t acc = 0;
  for (size_t k = 0; k < n_in; k++) acc += (int32_t)x[k] * row[k];
  return acc;
}

/* What happens to y = (row n of W) · x + bias of a token. SILU_MUL is done in two passes over the token's row: see below. */
static void store(const struct qtr_linear_args *a, size_t token, size_t n, float y) {
  const struct qtr_linear *l = a->linear;
  float *out = a->out;
  if (l->bias) y += l->bias[n];
  if (a->epilogue == QTR_EPILOGUE_ADD) {
    out[token * l->n_out + n] += y;
  } else if (a->epilogue == QTR_EPILOGUE_SILU_MUL) {
    /* Rows 0 … I-1 are the gate and come first: its value waits in `out` for the row I + n of up. */
    size_t half = l->n_out / 2;
    float *o = out + token * half + n % half;
    *o = n < half ? y : (float)((double)*o / (1 + exp(-(double)*o)) * (double)y);
  } else {
    out[token * l->n_out + n] = y;
  }
}

static void linear_int8(const struct qtr_linear_args *a) {
  const struct qtr_linear *l = a->linear;
  const struct qtr_input *in = a->input;
  for (size_t n = 0; n < l->n_out; n++) {
    for (size_t t = 0; t < a->n_tokens; t++) {
      float acc = (float)qtr_reference_dot(in->code + t * l->n_in, l->code + n * l->n_in, l->n_in);
      float y = l->format == QTR_LINEAR_W4A8 ? acc * l->scale[n] * in->scale[t] - l->szero[n] * in->sum[t] /* B.2 */
                                             : acc * (l->scale[n] * in->scale[t]);                         /* B.3, B.4 */
      store(a, t, n, y);
    }
  }
}

/* Eight rows at a time, widened and transposed to (n_in, 8), so that eight independent double sums run in the order of k. */
static void linear_float(const struct qtr_reference *r, const struct qtr_linear_args *a) {
  const struct qtr_linear *l = a->linear;
  enum qtr_dtype dtype = l->format == QTR_LINEAR_F32   ? QTR_DTYPE_F32
                         : l->format == QTR_LINEAR_F16 ? QTR_DTYPE_F16
                                                       : QTR_DTYPE_BF16;
  size_t n_in = l->n_in, first = 0;
  for (size_t p = 0; p < QTR_MAX_PARTS; first += l->part_rows[p++]) {
    for (size_t row = 0; row < l->part_rows[p]; row += ROWS) {
      size_t n_rows = QTR_MIN((size_t)ROWS, l->part_rows[p] - row);
      for (size_t j = 0; j < ROWS; j++) {
        size_t from = (row + QTR_MIN(j, n_rows - 1)) * n_in; /* a short block repeats its last row and drops the result */
        for (size_t k = 0; k < n_in; k++) {
          r->weight[k * ROWS + j] = (double)qtr_reference_load(l->weight[p], dtype, from + k);
        }
      }
      for (size_t t = 0; t < a->n_tokens; t++) {
        const float *x = a->input->value + t * n_in;
        double acc[ROWS] = {0};
        for (size_t k = 0; k < n_in; k++) {
          double xk = (double)x[k];
          for (size_t j = 0; j < ROWS; j++) acc[j] += r->weight[k * ROWS + j] * xk;
        }
        for (size_t j = 0; j < n_rows; j++) store(a, t, first + row + j, (float)acc[j]);
      }
    }
  }
}

void qtr_reference_linear(struct qtr_backend *b, const struct qtr_linear_args *args) {
  if (args->linear->code) {
    linear_int8(args);
  } else {
    linear_float((const struct qtr_reference *)b, args);
  }
}
