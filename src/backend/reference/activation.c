/* activation.c - embedding, RMSNorm, per-token quantisation and row gathering of the reference backend (spec B.6 – B.8).
 *
 * Rows of an input are packed: row t begins at t * dim, dim being what the last norm or quantisation wrote. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "backend/reference/reference.h"
#include "base/checked.h"
#include "base/half.h"
#include "base/status.h"

struct qtr_table {
  struct qtr_table_source source;
};

enum qtr_status qtr_reference_table_create(struct qtr_backend *b, const struct qtr_table_source *source,
                                           struct qtr_table **table, struct qtr_error *err) {
  (void)b;
  *table = NULL;
  bool known = source->dtype == QTR_DTYPE_F32 || source->dtype == QTR_DTYPE_F16 || source->dtype == QTR_DTYPE_BF16 ||
               (source->dtype == QTR_DTYPE_I8 && source->scale);
  if (!known) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "embedding: %s is not F32, F16, BF16 or I8 with scales",
                    source->dtype < QTR_N_DTYPES ? qtr_dtype_name(source->dtype) : "?");
  }
  struct qtr_table *t = qtr_reference_alloc(1, sizeof *t, "an embedding", err);
  if (!t) return QTR_ERR_MEMORY;
  t->source = *source;
  *table = t;
  return QTR_OK;
}

void qtr_reference_table_free(struct qtr_backend *b, struct qtr_table *table) {
  (void)b;
  free(table);
}

enum qtr_status qtr_reference_input_create(struct qtr_backend *b, size_t max_tokens, size_t max_dim,
                                           struct qtr_input **input, struct qtr_error *err) {
  *input = NULL;
  size_t n;
  if (qtr_mul_overflow(max_tokens, max_dim, &n)) return qtr_fail_memory(err, "inputs of a linear", SIZE_MAX);
  struct qtr_input *in = qtr_reference_alloc(1, sizeof *in, "inputs of a linear", err);
  if (!in) return QTR_ERR_MEMORY;
  in->max_tokens = max_tokens;
  in->max_dim = max_dim;
  in->code = qtr_reference_alloc(n, 1, "inputs of a linear", err);
  in->value = qtr_reference_alloc(n, sizeof *in->value, "inputs of a linear", err);
  in->scale = qtr_reference_alloc(max_tokens, sizeof *in->scale, "inputs of a linear", err);
  in->sum = qtr_reference_alloc(max_tokens, sizeof *in->sum, "inputs of a linear", err);
  if (!in->code || !in->value || !in->scale || !in->sum) {
    qtr_reference_input_free(b, in);
    return QTR_ERR_MEMORY;
  }
  *input = in;
  return QTR_OK;
}

void qtr_reference_input_free(struct qtr_backend *b, struct qtr_input *input) {
  (void)b;
  if (!input) return;
  free(input->code);
  free(input->value);
  free(input->scale);
  free(input->sum);
  free(input);
}

void qtr_reference_input_read(struct qtr_backend *b, const struct qtr_input *input, size_t token, size_t dim, int8_t *code,
                              float *scale, float *sum, float *value) {
  (void)b;
  if (code) memcpy(code, input->code + token * dim, dim);
  if (scale) *scale = input->scale[token];
  if (sum) *sum = input->sum[token];
  if (value) memcpy(value, input->value + token * dim, dim * sizeof *value);
}

void qtr_reference_embed(struct qtr_backend *b, const struct qtr_embed_args *args) {
  const struct qtr_batch *batch = ((struct qtr_reference *)b)->batch;
  const struct qtr_table_source *s = &args->table->source;
  for (size_t t = 0; t < (size_t)batch->n_tokens; t++) {
    size_t row = (size_t)batch->token[t], from = row * s->dim;
    float *out = (float *)args->out + t * s->dim;
    for (size_t i = 0; i < s->dim; i++) {
      out[i] = s->dtype == QTR_DTYPE_I8 ? (float)((const int8_t *)s->data)[from + i] * s->scale[row]
                                        : qtr_reference_load(s->data, s->dtype, from + i);
    }
  }
}

/* sat8(rni(x)); NaN, which only a row with a NaN can give, becomes 0. */
static int8_t code_round(float x) {
  float c = rintf(x);
  return c >= 127 ? (int8_t)127 : c <= -128 ? (int8_t)-128 : c == c ? (int8_t)c : (int8_t)0;
}

/* B.6 with amax given: codes of x (dim) and the scale. amax 0 gives zeros. A scale beyond fp16 (amax above 8.3 million,
 * which fp16 activations cannot have) stays the largest fp16 number. */
static void row_quant(const float *x, size_t dim, float amax, int8_t *code, float *scale) {
  float sa = qtr_f16_round(amax / 127.0f), inv = 127.0f / amax;
  *scale = sa < 65504.0f ? sa : 65504.0f;
  for (size_t i = 0; i < dim; i++) code[i] = amax > 0 ? code_round(x[i] * inv) : (int8_t)0;
}

/* One row x (dim) into row `token` of the input, quantised or not, with the exact sum rounded once. */
static void row_put(const float *x, size_t dim, enum qtr_quant quant, size_t token, struct qtr_input *out) {
  float amax = 0;
  double sum = 0;
  for (size_t i = 0; i < dim; i++) {
    amax = fmaxf(amax, fabsf(x[i]));
    sum += (double)x[i];
  }
  out->sum[token] = (float)sum;
  if (quant == QTR_QUANT_INT8) {
    row_quant(x, dim, amax, out->code + token * dim, &out->scale[token]);
  } else {
    out->scale[token] = 1;
    if (out->value + token * dim != x) memcpy(out->value + token * dim, x, dim * sizeof *x);
  }
}

void qtr_reference_quant(struct qtr_backend *b, const struct qtr_quant_args *args) {
  (void)b;
  for (size_t t = 0; t < args->n_tokens; t++) {
    row_put((const float *)args->x + t * args->dim, args->dim, args->quant, t, args->out);
  }
}

/* B.7 as written, thread by thread: v in fp32 with the mean subtracted, maxima and sums of the fp16-rounded v, each
 * thread's sum accumulated in fp16. v: room for (dim). */
static void row_norm_qserve(const float *x, const float *gamma, float eps, size_t dim, size_t token, float *v,
                            struct qtr_input *out) {
  double sum = 0, squares = 0, total = 0;
  for (size_t i = 0; i < dim; i++) {
    sum += (double)x[i];
    squares += (double)x[i] * (double)x[i];
  }
  float mean = (float)(sum / (double)dim), rstd = (float)(1 / sqrt(squares / (double)dim + (double)eps));
  float amax = qtr_f16_to_f32(0x0011); /* f16(1e-6) */
  size_t n_threads = QTR_MIN(qtr_round_up(dim, 32), (size_t)1024);
  for (size_t i = 0; i < dim; i++) {
    v[i] = (x[i] - mean) * rstd * gamma[i];
    amax = fmaxf(amax, fabsf(qtr_f16_round(v[i])));
  }
  for (size_t thread = 0; thread < n_threads; thread++) {
    float part = 0;
    for (size_t i = thread; i < dim; i += n_threads) part = qtr_f16_round(part + qtr_f16_round(v[i]));
    total += (double)part;
  }
  out->sum[token] = qtr_f16_round((float)total);
  row_quant(v, dim, amax, out->code + token * dim, &out->scale[token]);
}

void qtr_reference_rmsnorm(struct qtr_backend *b, const struct qtr_rmsnorm_args *args) {
  (void)b;
  size_t dim = args->dim;
  const float *gamma = args->weight;
  for (size_t t = 0; t < args->n_tokens; t++) {
    const float *x = (const float *)args->x + t * dim;
    float *v = args->out->value + t * dim; /* normalised values; the result itself when nothing is quantised */
    if (args->norm == QTR_NORM_QSERVE && args->quant == QTR_QUANT_INT8) {
      row_norm_qserve(x, gamma, args->eps, dim, t, v, args->out);
      continue;
    }
    double squares = 0;
    for (size_t i = 0; i < dim; i++) squares += (double)x[i] * (double)x[i];
    double rstd = 1 / sqrt(squares / (double)dim + (double)args->eps);
    for (size_t i = 0; i < dim; i++) v[i] = (float)((double)x[i] * rstd * (double)gamma[i]);
    row_put(v, dim, args->quant, t, args->out);
  }
}

void qtr_reference_gather(struct qtr_backend *b, const struct qtr_gather_args *args) {
  const struct qtr_batch *batch = ((struct qtr_reference *)b)->batch;
  for (size_t i = 0; i < (size_t)batch->n_logit_rows; i++) {
    memcpy((float *)args->out + i * args->dim, (const float *)args->x + (size_t)batch->logit_row[i] * args->dim,
           args->dim * sizeof(float));
  }
}
