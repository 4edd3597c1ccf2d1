/* activation.c - embedding tables and the inputs of matrices on the GPU (cuda.h); their kernels are in rows.cu. */
#include "backend/cuda/cuda.h"

#include "base/checked.h"
#include "base/half.h"
#include "base/status.h"

#include <stdlib.h>

enum qtr_status qtr_cuda_table_create(struct qtr_backend *b, const struct qtr_table_source *source, struct qtr_table **table,
                                      struct qtr_error *err) {
  struct qtr_cuda *c = (struct qtr_cuda *)b;
  *table = NULL;
  bool known = source->dtype == QTR_DTYPE_F32 || source->dtype == QTR_DTYPE_F16 || source->dtype == QTR_DTYPE_BF16 ||
               (source->dtype == QTR_DTYPE_I8 && source->scale);
  if (!known) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "embedding: %s is not F32, F16, BF16 or I8 with scales",
                    source->dtype < QTR_N_DTYPES ? qtr_dtype_name(source->dtype) : "?");
  }
  size_t n_bytes;
  if (qtr_mul_overflow(source->n_rows, source->dim, &n_bytes) ||
      qtr_mul_overflow(n_bytes, qtr_dtype_bytes(source->dtype), &n_bytes)) {
    return qtr_fail_memory(err, "an embedding", SIZE_MAX);
  }
  struct qtr_table *t = calloc(1, sizeof *t);
  if (!t) return qtr_fail_memory(err, "an embedding", sizeof *t);
  *t = (struct qtr_table){.dtype = source->dtype, .n_rows = source->n_rows, .dim = source->dim};
  enum qtr_status status = qtr_cuda_upload(c, source->data, n_bytes, "the embedding", &t->data, err);
  if (!status && source->dtype == QTR_DTYPE_I8) {
    status =
        qtr_cuda_upload(c, source->scale, source->n_rows * sizeof(float), "the embedding's scales", (void **)&t->scale, err);
  }
  if (status) {
    qtr_cuda_table_free(b, t);
    return status;
  }
  *table = t;
  return QTR_OK;
}

void qtr_cuda_table_free(struct qtr_backend *b, struct qtr_table *t) {
  if (!t) return;
  qtr_cuda_wait(b);
  qtr_cuda_forget_graphs((struct qtr_cuda *)b);
  qtr_cuda_release(t->data);
  qtr_cuda_release(t->scale);
  free(t);
}

enum qtr_status qtr_cuda_input_create(struct qtr_backend *b, size_t max_tokens, size_t max_dim, struct qtr_input **input,
                                      struct qtr_error *err) {
  struct qtr_cuda *c = (struct qtr_cuda *)b;
  *input = NULL;
  size_t n_bytes;
  if (qtr_mul_overflow(max_tokens, QTR_MAX(qtr_cuda_stride(max_dim), 2 * max_dim), &n_bytes)) {
    return qtr_fail_memory(err, "inputs of a linear", SIZE_MAX);
  }
  struct qtr_input *in = calloc(1, sizeof *in);
  if (!in) return qtr_fail_memory(err, "inputs of a linear", sizeof *in);
  in->max_tokens = max_tokens;
  in->max_dim = max_dim;
  enum qtr_status status = qtr_cuda_malloc(c, n_bytes, "the inputs of matrices", &in->data, err);
  if (!status) status = qtr_cuda_malloc(c, max_tokens * sizeof(float), "scales", (void **)&in->scale, err);
  if (!status) status = qtr_cuda_malloc(c, max_tokens * sizeof(float), "sums", (void **)&in->sum, err);
  if (status) {
    qtr_cuda_input_free(b, in);
    return status;
  }
  *input = in;
  return QTR_OK;
}

void qtr_cuda_input_free(struct qtr_backend *b, struct qtr_input *in) {
  if (!in) return;
  qtr_cuda_wait(b);
  qtr_cuda_forget_graphs((struct qtr_cuda *)b);
  qtr_cuda_release(in->data);
  qtr_cuda_release(in->scale);
  qtr_cuda_release(in->sum);
  free(in);
}

void qtr_cuda_input_read(struct qtr_backend *b, const struct qtr_input *in, size_t token, size_t dim, int8_t *code,
                         float *scale, float *sum, float *value) {
  struct qtr_cuda *c = (struct qtr_cuda *)b;
  qtr_cuda_flush(c);
  qtr_cuda_wait(b);
  const char *data = in->data;
  uint16_t *half = value ? malloc(dim * sizeof *half) : NULL;
  if (code) (void)qtr_cuda_ok(c, cudaMemcpy(code, data + token * qtr_cuda_stride(dim), dim, cudaMemcpyDefault), "reading");
  if (scale) (void)qtr_cuda_ok(c, cudaMemcpy(scale, in->scale + token, sizeof *scale, cudaMemcpyDefault), "reading");
  if (sum) (void)qtr_cuda_ok(c, cudaMemcpy(sum, in->sum + token, sizeof *sum, cudaMemcpyDefault), "reading");
  if (half) {
    (void)qtr_cuda_ok(c, cudaMemcpy(half, data + token * dim * 2, dim * 2, cudaMemcpyDefault), "reading");
    for (size_t i = 0; i < dim; i++) value[i] = qtr_f16_to_f32(half[i]);
  }
  free(half);
}
