/* cuda.h - what the files of the cuda backend share. cuda.c owns the vtable, memory and the device; step.c the operations of
 * a step and their graphs; linear.c the matrices; activation.c embedding, inputs and rows; kv.c and attention.h the cache.
 * This folder is the only place that sees a CUDA header. Kernels (.cu) are reached through gemm.h, attention.h, rows.h and
 * choose.h, plain C.
 *
 * Activations are fp16. Operations inside a step are recorded; launch uploads the batch in one copy and runs the record, as
 * a CUDA graph when the same record was run before (step.c). */
#ifndef QTR_BACKEND_CUDA_CUDA_H
#define QTR_BACKEND_CUDA_CUDA_H

#include "backend/backend.h"
#include "backend/cuda/attention.h"
#include "backend/cuda/gemm.h"

#include <cublasLt.h>
#include <cuda_runtime_api.h>

struct qtr_cuda_step;

struct qtr_cuda {
  struct qtr_backend base; /* first: a struct qtr_backend * is a struct qtr_cuda * */
  int device, n_sms;
  int32_t threads; /* of the host */
  enum qtr_cuda_path path;
  char description[128];
  bool has_prefill; /* attention's prefill kernel, of sm_90a */
  size_t memory_total;
  cudaStream_t stream;
  cudaError_t error; /* the first that went wrong; stays until the backend is closed */
  const char *where; /* in what */
  cublasLtHandle_t lt;
  void *lt_workspace; /* (QTR_CUDA_LT_BYTES) device */
  float *product;     /* (QTR_CUDA_PRODUCT_BYTES) device: products of floating-point matrices before their epilogue */
  void *staging;      /* device, for parts of matrices while they are repacked */
  size_t staging_bytes;
  struct qtr_cuda_step *step;
};

#define QTR_CUDA_LT_BYTES ((size_t)32 << 20)
#define QTR_CUDA_PRODUCT_BYTES ((size_t)64 << 20)

struct qtr_linear {
  enum qtr_linear_format format; /* of the source: decides the quantisation of the input */
  size_t n_in, n_out, n_bytes;
  struct qtr_cuda_matrix matrix; /* integer formats */
  void *weight;                  /* floating-point formats: (n_out, n_in) fp16, or F32 for F32 */
  float *bias;                   /* (n_out) of floating-point formats; NULL = none */
};

struct qtr_table {
  enum qtr_dtype dtype;
  size_t n_rows, dim;
  void *data;   /* (n_rows, dim) */
  float *scale; /* (n_rows) for I8 */
};

/* Rows of codes are `stride` apart, of values `dim`. Only one of the two forms is there at a time, in the same memory. */
struct qtr_input {
  size_t max_tokens, max_dim;
  void *data;         /* codes: (max_tokens, qtr_cuda_stride(dim)) int8; values: (max_tokens, dim) fp16 */
  float *scale, *sum; /* (max_tokens) */
};
static inline size_t qtr_cuda_stride(size_t dim) { return (dim + 127) / 128 * 128; }

/* Remembers the first error. Returns whether there is none. */
bool qtr_cuda_ok(struct qtr_cuda *c, cudaError_t error, const char *where);
/* The remembered error, or QTR_OK. */
enum qtr_status qtr_cuda_status(const struct qtr_cuda *c, struct qtr_error *err);
/* Device memory, all zero; a failure names `what`, how much was wanted and how much is free, and is not remembered. */
enum qtr_status qtr_cuda_malloc(struct qtr_cuda *c, size_t n_bytes, const char *what, void **device, struct qtr_error *err);
/* Same, and fills it from the host. */
enum qtr_status qtr_cuda_upload(struct qtr_cuda *c, const void *host, size_t n_bytes, const char *what, void **device,
                                struct qtr_error *err);
void qtr_cuda_release(void *device); /* NULL is allowed */

/* step.c */
enum qtr_status qtr_cuda_step_create(struct qtr_cuda *c, struct qtr_error *err);
void qtr_cuda_step_free(struct qtr_cuda *c);
void qtr_cuda_flush(struct qtr_cuda *c); /* runs what is recorded; does not wait */
enum qtr_status qtr_cuda_begin_step(struct qtr_backend *b, const struct qtr_batch *batch, const float *inv_freq,
                                    size_t half_dim, struct qtr_error *err);
enum qtr_status qtr_cuda_end_step(struct qtr_backend *b, struct qtr_error *err);
enum qtr_status qtr_cuda_launch(struct qtr_backend *b, struct qtr_error *err);
enum qtr_status qtr_cuda_collect(struct qtr_backend *b, struct qtr_error *err);
void qtr_cuda_embed(struct qtr_backend *b, const struct qtr_embed_args *args);
void qtr_cuda_rmsnorm(struct qtr_backend *b, const struct qtr_rmsnorm_args *args);
void qtr_cuda_quant(struct qtr_backend *b, const struct qtr_quant_args *args);
void qtr_cuda_linear(struct qtr_backend *b, const struct qtr_linear_args *args);
void qtr_cuda_rope_kv(struct qtr_backend *b, const struct qtr_rope_kv_args *args);
void qtr_cuda_attend(struct qtr_backend *b, const struct qtr_attention_args *args);
void qtr_cuda_gather(struct qtr_backend *b, const struct qtr_gather_args *args);
void qtr_cuda_choose(struct qtr_backend *b, const struct qtr_choose_args *args);
void qtr_cuda_stamp(struct qtr_backend *b);
size_t qtr_cuda_stamps_read(struct qtr_backend *b, double *seconds, size_t n);
void qtr_cuda_wait(struct qtr_backend *b);
void qtr_cuda_busy_read(struct qtr_backend *b, double *busy, double *idle);
/* Graphs hold addresses of what is freed. */
void qtr_cuda_forget_graphs(struct qtr_cuda *c);

/* linear.c */
enum qtr_status qtr_cuda_linear_create(struct qtr_backend *b, const struct qtr_linear_source *source,
                                       struct qtr_linear **linear, struct qtr_error *err);
void qtr_cuda_linear_free(struct qtr_backend *b, struct qtr_linear *linear);
size_t qtr_cuda_linear_bytes(const struct qtr_linear *linear);
bool qtr_cuda_linear_takes_rows(const struct qtr_linear *linear, size_t n_tokens);
/* rows: NULL, or what the product makes its input of, in place of args->input, where qtr_cuda_linear_takes_rows. */
cudaError_t qtr_cuda_linear_run(struct qtr_cuda *c, const struct qtr_linear_args *args,
                                const struct qtr_cuda_gemm_rows *rows);

/* activation.c */
enum qtr_status qtr_cuda_table_create(struct qtr_backend *b, const struct qtr_table_source *source, struct qtr_table **table,
                                      struct qtr_error *err);
void qtr_cuda_table_free(struct qtr_backend *b, struct qtr_table *table);
enum qtr_status qtr_cuda_input_create(struct qtr_backend *b, size_t max_tokens, size_t max_dim, struct qtr_input **input,
                                      struct qtr_error *err);
void qtr_cuda_input_free(struct qtr_backend *b, struct qtr_input *input);
void qtr_cuda_input_read(struct qtr_backend *b, const struct qtr_input *input, size_t token, size_t dim, int8_t *code,
                         float *scale, float *sum, float *value);

#endif
