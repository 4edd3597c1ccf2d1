/* activation.c - a linear's input, RMSNorm and quantisation over many rows, embedding and gathering of the CPU backend (spec
 * B.6 to B.8). The arithmetic of one row is in activation_rows.h. */
#include "backend/cpu/activation.h"

#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/half.h"
#include "base/status.h"

enum { ROOM = 32 };

struct qtr_table {
  struct qtr_table_source source; /* borrowed data, which may lie at any address */
};

static const struct qtr_activation_kernels *kernels_of(const struct qtr_cpu *c) {
  const struct qtr_activation_kernels *k = NULL;
  if (c->isa >= QTR_CPU_AVX512) k = qtr_cpu_activation_avx512();
  if (!k && c->isa >= QTR_CPU_AVX2) k = qtr_cpu_activation_avx2();
  return k ? k : qtr_cpu_activation_portable();
}

/* ---- inputs -------------------------------------------------------------------------------------- */

enum qtr_status qtr_cpu_input_create(struct qtr_backend *b, size_t max_tokens, size_t max_dim, struct qtr_input **input,
                                     struct qtr_error *err) {
  *input = NULL;
  size_t rows, row_bytes, bytes = 0, n_groups = qtr_ceil_div(max_dim, QTR_GROUP), sums;
  bool overflow = max_dim > SIZE_MAX / 16 || max_tokens > SIZE_MAX / 16;
  rows = overflow ? 0 : qtr_round_up(QTR_MAX(max_tokens, (size_t)1), ROOM);
  row_bytes = overflow ? 0 : QTR_MAX(qtr_round_up(max_dim, QTR_SEGMENT), max_dim * sizeof(float));
  if (overflow || qtr_mul_overflow(rows, row_bytes, &bytes) || qtr_mul_overflow(rows, n_groups + 1, &sums)) {
    return qtr_fail_memory(err, "inputs of a linear", SIZE_MAX);
  }
  struct qtr_input *in = calloc(1, sizeof *in);
  if (!in) return qtr_fail_memory(err, "inputs of a linear", sizeof *in);
  in->max_tokens = max_tokens;
  in->max_dim = max_dim;
  in->data_bytes = bytes;
  in->data = qtr_cpu_alloc(bytes);
  in->scale = calloc(rows, sizeof *in->scale);
  in->sum = calloc(rows, sizeof *in->sum);
  in->code_sum = calloc(rows, sizeof *in->code_sum);
  in->group_sum = calloc(sums, sizeof *in->group_sum);
  if (!in->data || !in->scale || !in->sum || !in->code_sum || !in->group_sum) {
    qtr_cpu_input_free(b, in);
    return qtr_fail_memory(err, "inputs of a linear", bytes);
  }
  *input = in;
  return QTR_OK;
}

void qtr_cpu_input_free(struct qtr_backend *b, struct qtr_input *input) {
  (void)b;
  if (!input) return;
  qtr_cpu_free(input->data, input->data_bytes);
  free(input->scale);
  free(input->sum);
  free(input->code_sum);
  free(input->group_sum);
  free(input);
}

void qtr_cpu_input_read(struct qtr_backend *b, const struct qtr_input *input, size_t token, size_t dim, int8_t *code,
                        float *scale, float *sum, float *value) {
  (void)b;
  if (input->quant == QTR_QUANT_INT8) {
    for (size_t k = 0; code && k < dim; k += QTR_SEGMENT) {
      memcpy(code + k, qtr_input_codes(input, token, k / QTR_SEGMENT), QTR_MIN(dim - k, (size_t)QTR_SEGMENT));
    }
    if (scale) *scale = input->scale[token];
    if (sum) *sum = input->sum[token];
  } else if (value) {
    memcpy(value, qtr_input_values(input, token), dim * sizeof *value);
  }
}

static void input_shape(struct qtr_input *in, enum qtr_quant quant, size_t dim) {
  in->quant = quant;
  in->dim = dim;
  in->n_segments = qtr_ceil_div(dim, QTR_SEGMENT);
  in->n_groups = qtr_ceil_div(dim, QTR_GROUP);
}

/* ---- norm and quantisation ----------------------------------------------------------------------- */

/* Rows that one thread takes at a time: about 16,000 values, so that a single token never wakes the other threads. */
static size_t rows_chunk(size_t dim) { return QTR_MAX((size_t)16384 / QTR_MAX(dim, (size_t)1), (size_t)1); }

struct row_task {
  const struct qtr_activation_kernels *kernels;
  const struct qtr_rmsnorm_args *norm;
  const struct qtr_quant_args *quant;
};

static void norm_rows(void *arg, size_t begin, size_t end, int thread) {
  (void)thread;
  const struct row_task *t = arg;
  const struct qtr_rmsnorm_args *a = t->norm;
  for (size_t i = begin; i < end; i++) {
    const float *x = (const float *)a->x + i * a->dim;
    if (a->quant == QTR_QUANT_INT8) {
      t->kernels->rmsnorm_quant_row(a->out, i, x, a->weight, a->eps, a->norm);
    } else {
      t->kernels->rmsnorm_row((float *)a->out->data + i * a->dim, x, a->weight, a->eps, a->dim);
    }
  }
}

void qtr_cpu_rmsnorm(struct qtr_backend *b, const struct qtr_rmsnorm_args *args) {
  const struct qtr_cpu *c = (const struct qtr_cpu *)b;
  struct row_task task = {.kernels = kernels_of(c), .norm = args};
  input_shape(args->out, args->quant, args->dim);
  qtr_cpu_for(c, args->n_tokens, rows_chunk(args->dim), norm_rows, &task);
}

static void quant_rows(void *arg, size_t begin, size_t end, int thread) {
  (void)thread;
  const struct row_task *t = arg;
  const struct qtr_quant_args *a = t->quant;
  for (size_t i = begin; i < end; i++) {
    const float *x = (const float *)a->x + i * a->dim;
    if (a->quant == QTR_QUANT_INT8) {
      t->kernels->quant_row(a->out, i, x);
    } else {
      memcpy((float *)a->out->data + i * a->dim, x, a->dim * sizeof *x);
    }
  }
}

void qtr_cpu_quant(struct qtr_backend *b, const struct qtr_quant_args *args) {
  const struct qtr_cpu *c = (const struct qtr_cpu *)b;
  struct row_task task = {.kernels = kernels_of(c), .quant = args};
  input_shape(args->out, args->quant, args->dim);
  qtr_cpu_for(c, args->n_tokens, rows_chunk(args->dim), quant_rows, &task);
}

/* ---- embedding and gathering --------------------------------------------------------------------- */

enum qtr_status qtr_cpu_table_create(struct qtr_backend *b, const struct qtr_table_source *source, struct qtr_table **table,
                                     struct qtr_error *err) {
  (void)b;
  *table = NULL;
  bool known = source->dtype == QTR_DTYPE_F32 || source->dtype == QTR_DTYPE_F16 || source->dtype == QTR_DTYPE_BF16 ||
               (source->dtype == QTR_DTYPE_I8 && source->scale);
  if (!known) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "embedding: %s is not F32, F16, BF16 or I8 with scales",
                    source->dtype < QTR_N_DTYPES ? qtr_dtype_name(source->dtype) : "?");
  }
  struct qtr_table *t = malloc(sizeof *t);
  if (!t) return qtr_fail_memory(err, "an embedding", sizeof *t);
  t->source = *source;
  *table = t;
  return QTR_OK;
}

void qtr_cpu_table_free(struct qtr_backend *b, struct qtr_table *table) {
  (void)b;
  free(table);
}

struct embed_task {
  const struct qtr_table_source *source;
  const int32_t *token;
  float *out;
};

static void embed_rows(void *arg, size_t begin, size_t end, int thread) {
  (void)thread;
  const struct embed_task *t = arg;
  const struct qtr_table_source *s = t->source;
  size_t row_bytes = s->dim * qtr_dtype_bytes(s->dtype);
  for (size_t i = begin; i < end; i++) {
    size_t row = (size_t)t->token[i];
    const char *from = (const char *)s->data + row * row_bytes;
    float *out = t->out + i * s->dim;
    uint16_t half;
    switch (s->dtype) {
      case QTR_DTYPE_I8:
        for (size_t k = 0; k < s->dim; k++) out[k] = (float)((const int8_t *)from)[k] * s->scale[row];
        break;
      case QTR_DTYPE_F16:
        for (size_t k = 0; k < s->dim; k++) {
          memcpy(&half, from + 2 * k, 2);
          out[k] = qtr_f16_to_f32(half);
        }
        break;
      case QTR_DTYPE_BF16:
        for (size_t k = 0; k < s->dim; k++) {
          memcpy(&half, from + 2 * k, 2);
          out[k] = qtr_bf16_to_f32(half);
        }
        break;
      default: memcpy(out, from, row_bytes); break;
    }
  }
}

void qtr_cpu_embed(struct qtr_backend *b, const struct qtr_embed_args *args) {
  const struct qtr_cpu *c = (const struct qtr_cpu *)b;
  struct embed_task task = {&args->table->source, c->batch->token, args->out};
  qtr_cpu_for(c, (size_t)c->batch->n_tokens, rows_chunk(task.source->dim), embed_rows, &task);
}

void qtr_cpu_gather(struct qtr_backend *b, const struct qtr_gather_args *args) {
  const struct qtr_batch *batch = ((const struct qtr_cpu *)b)->batch;
  for (size_t i = 0; i < (size_t)batch->n_logit_rows; i++) {
    memcpy((float *)args->out + i * args->dim, (const float *)args->x + (size_t)batch->logit_row[i] * args->dim,
           args->dim * sizeof(float));
  }
}
