/* linear.c - matrices of the cuda backend. Integer formats are uploaded part by part as they lie on disk and repacked on the
 * GPU (gemm.h), so the host never holds a second copy; floating-point formats are kept as fp16 (F32 as F32) and multiplied
 * by cuBLASLt with fp32 sums.
 *
 * cuBLASLt chooses its kernel by the number of tokens: the last bits of a floating-point product may depend on the batch. */
#include "backend/cuda/cuda.h"

#include "backend/common/linear_source.h"
#include "backend/cuda/rows.h"
#include "base/checked.h"
#include "base/status.h"

#include <stdlib.h>
#include <string.h>

/* ---- creation ------------------------------------------------------------------------------------ */

/* Room for n_bytes of a part in the disk's layout, kept from matrix to matrix until the first step. */
static enum qtr_status staging_need(struct qtr_cuda *c, size_t n_bytes, struct qtr_error *err) {
  if (n_bytes <= c->staging_bytes) return QTR_OK;
  (void)cudaStreamSynchronize(c->stream);
  qtr_cuda_release(c->staging);
  c->staging = NULL;
  c->staging_bytes = 0;
  enum qtr_status status = qtr_cuda_malloc(c, n_bytes, "loading a matrix", &c->staging, err);
  if (!status) c->staging_bytes = n_bytes;
  return status;
}

/* Arrays of a part in the staging memory, each at a multiple of 256 bytes. */
struct layout {
  size_t weight, s2_scale, s2_zero, scale, szero, bias, expanded, n_bad, total;
};

static size_t place(size_t *at, size_t n_bytes) {
  size_t here = *at;
  *at += qtr_round_up(n_bytes, 256);
  return here;
}

static size_t weight_bytes(enum qtr_linear_format format, size_t n_out, size_t n_in) {
  size_t n = n_out * n_in;
  return format == QTR_LINEAR_W8A8 ? n : format == QTR_LINEAR_F32 ? 4 * n : format <= QTR_LINEAR_BF16 ? 2 * n : n / 2;
}

static struct layout layout_make(const struct qtr_linear_source *s, const struct qtr_linear_part *p) {
  struct layout l = {0};
  size_t n_groups = s->n_in / QTR_GROUP * p->n_out, floats = p->n_out * sizeof(float);
  bool grouped = s->format == QTR_LINEAR_W4A8_G128;
  l.weight = place(&l.total, weight_bytes(s->format, p->n_out, s->n_in));
  l.s2_scale = place(&l.total, grouped ? n_groups : 0);
  l.s2_zero = place(&l.total, grouped ? n_groups : 0);
  l.scale = place(&l.total, floats);
  l.szero = place(&l.total, floats);
  l.bias = place(&l.total, floats);
  l.n_bad = place(&l.total, sizeof(int32_t));
  l.expanded = place(&l.total, grouped ? n_groups * QTR_GROUP : 0);
  return l;
}

/* Copies one array to the staging memory; NULL stays NULL. */
static void *stage(struct qtr_cuda *c, size_t at, const void *host, size_t n_bytes) {
  if (!host) return NULL;
  char *to = (char *)c->staging + at;
  (void)qtr_cuda_ok(c, cudaMemcpyAsync(to, host, n_bytes, cudaMemcpyHostToDevice, c->stream), "uploading a matrix");
  return to;
}

static enum qtr_status part_upload(struct qtr_cuda *c, const struct qtr_linear_source *s, size_t index, size_t first_row,
                                   struct qtr_cuda_part *part, struct layout *l, struct qtr_error *err) {
  const struct qtr_linear_part *p = &s->part[index];
  *l = layout_make(s, p);
  enum qtr_status status = staging_need(c, l->total, err);
  if (status) return status;
  size_t floats = p->n_out * sizeof(float), groups = s->n_in / QTR_GROUP * p->n_out;
  *part = (struct qtr_cuda_part){.n_out = p->n_out, .first_row = first_row};
  part->weight = stage(c, l->weight, p->weight, weight_bytes(s->format, p->n_out, s->n_in));
  part->s2_scale = stage(c, l->s2_scale, s->format == QTR_LINEAR_W4A8_G128 ? p->s2_scale : NULL, groups);
  part->s2_zero = stage(c, l->s2_zero, s->format == QTR_LINEAR_W4A8_G128 ? p->s2_zero : NULL, groups);
  part->scale = stage(c, l->scale, p->scale, floats);
  part->szero = stage(c, l->szero, s->format == QTR_LINEAR_W4A8 ? p->szero : NULL, floats);
  part->bias = stage(c, l->bias, p->bias, floats);
  return qtr_cuda_status(c, err);
}

/* Counts the groups of a staged part with a code that leaves int8 (gemm.h). */
static enum qtr_status groups_count_bad(struct qtr_cuda *c, const struct qtr_cuda_part *part, size_t n_in, int32_t *n_bad,
                                        int32_t *found, struct qtr_error *err) {
  *found = 0;
  if (qtr_cuda_ok(c, cudaMemsetAsync(n_bad, 0, sizeof *found, c->stream), "checking groups") &&
      qtr_cuda_ok(c, qtr_cuda_g128_count_bad(part, n_in, n_bad, c->stream), "checking groups") &&
      qtr_cuda_ok(c, cudaMemcpyAsync(found, n_bad, sizeof *found, cudaMemcpyDeviceToHost, c->stream), "checking groups")) {
    (void)qtr_cuda_ok(c, cudaStreamSynchronize(c->stream), "checking groups");
  }
  return qtr_cuda_status(c, err);
}

static void matrix_free(struct qtr_cuda_matrix *m) {
  void *const memory[] = {m->code, m->group, m->scale, m->szero, m->bias};
  for (size_t i = 0; i < sizeof memory / sizeof memory[0]; i++) qtr_cuda_release(memory[i]);
  *m = (struct qtr_cuda_matrix){0};
}

/* Memory for the repacked matrix of n_out rows, cleared. */
static enum qtr_status matrix_make(struct qtr_cuda *c, const struct qtr_linear_source *s, enum qtr_linear_format format,
                                   struct qtr_linear *l, struct qtr_error *err) {
  struct qtr_cuda_matrix *m = &l->matrix;
  bool bias = false;
  enum qtr_status status;
  *m =
      (struct qtr_cuda_matrix){.path = c->path, .format = format, .gate_up = s->gate_up, .n_out = l->n_out, .n_in = l->n_in};
  for (size_t i = 0; i < s->n_parts; i++) bias = bias || s->part[i].bias;
  size_t code = qtr_cuda_matrix_code_bytes(m->path, m->format, m->n_out, m->n_in);
  size_t group = qtr_cuda_matrix_group_bytes(m->path, m->format, m->n_out, m->n_in);
  size_t floats = qtr_cuda_matrix_padded_rows(m->path, m->n_out) * sizeof(float);
  if (code == 0) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "a %s matrix of %zu x %zu is too large for a GPU",
                    qtr_linear_format_name(s->format), m->n_out, m->n_in);
  }
  const struct {
    void **at;
    size_t n_bytes;
  } need[] = {{&m->code, code},
              {&m->group, group},
              {(void **)&m->scale, floats},
              {(void **)&m->szero, format == QTR_LINEAR_W4A8 ? floats : 0},
              {(void **)&m->bias, bias ? floats : 0}};
  l->n_bytes = 0;
  for (size_t i = 0; i < sizeof need / sizeof need[0]; i++) {
    if (need[i].n_bytes == 0) continue;
    if ((status = qtr_cuda_malloc(c, need[i].n_bytes, "the weights of the model", need[i].at, err))) return status;
    l->n_bytes += need[i].n_bytes;
  }
  (void)qtr_cuda_ok(c, qtr_cuda_matrix_clear(m, c->stream), "clearing a matrix");
  return qtr_cuda_status(c, err);
}

/* Uploads and repacks part by part. A group of a part with a code that leaves int8 (spec B.3 reads it modulo 256) is nothing
 * the g128 kernels can do: then the whole matrix is made again as int8. */
static enum qtr_status create_integer(struct qtr_cuda *c, const struct qtr_linear_source *s, struct qtr_linear *l,
                                      struct qtr_error *err) {
  bool grouped = s->format == QTR_LINEAR_W4A8_G128, wild = false;
  enum qtr_status status = matrix_make(c, s, s->format, l, err);
  size_t row = 0;
  for (size_t i = 0; i < s->n_parts && !status;) {
    struct qtr_cuda_part part;
    struct layout at;
    if ((status = part_upload(c, s, i, row, &part, &at, err))) break;
    if (grouped && !wild) {
      int32_t n_bad;
      status = groups_count_bad(c, &part, s->n_in, (int32_t *)(void *)((char *)c->staging + at.n_bad), &n_bad, err);
      if (!status && n_bad > 0) {
        wild = true;
        matrix_free(&l->matrix);
        status = matrix_make(c, s, QTR_LINEAR_W8A8, l, err);
        i = row = 0;
        continue;
      }
    }
    if (wild) {
      int8_t *expanded = (int8_t *)c->staging + at.expanded;
      (void)qtr_cuda_ok(c, qtr_cuda_g128_expand(&part, s->n_in, expanded, c->stream), "expanding groups");
      part.weight = expanded;
      part.s2_scale = part.s2_zero = NULL;
    }
    (void)qtr_cuda_ok(c, qtr_cuda_matrix_repack(&l->matrix, &part, c->stream), "repacking a matrix");
    (void)qtr_cuda_ok(c, cudaStreamSynchronize(c->stream), "repacking a matrix");
    if (!status) status = qtr_cuda_status(c, err);
    row += s->part[i++].n_out;
  }
  return status;
}

/* fp16, or F32 kept. bf16 values below 2^-14 lose bits that no fp16 product sees; values beyond fp16 are refused. */
static enum qtr_status create_float(struct qtr_cuda *c, const struct qtr_linear_source *s, struct qtr_linear *l,
                                    struct qtr_error *err) {
  size_t unit = s->format == QTR_LINEAR_F32 ? 4 : 2, row = 0;
  bool bias = false;
  for (size_t i = 0; i < s->n_parts; i++) bias = bias || s->part[i].bias;
  l->n_bytes = l->n_out * l->n_in * unit;
  enum qtr_status status = qtr_cuda_malloc(c, l->n_bytes, "the weights of the model", &l->weight, err);
  if (!status && bias) {
    status = qtr_cuda_malloc(c, l->n_out * sizeof(float), "a bias", (void **)&l->bias, err);
    l->n_bytes += l->n_out * sizeof(float);
  }
  if (!status && !c->product) {
    status = qtr_cuda_malloc(c, QTR_CUDA_PRODUCT_BYTES, "products of matrices", (void **)&c->product, err);
  }
  enum qtr_dtype dtype = s->format == QTR_LINEAR_F32   ? QTR_DTYPE_F32
                         : s->format == QTR_LINEAR_F16 ? QTR_DTYPE_F16
                                                       : QTR_DTYPE_BF16;
  for (size_t i = 0; i < s->n_parts && !status; row += s->part[i++].n_out) {
    struct qtr_cuda_part part;
    struct layout at;
    if ((status = part_upload(c, s, i, row, &part, &at, err))) break;
    int32_t *n_bad = (int32_t *)(void *)((char *)c->staging + at.n_bad), found = 0;
    char *to = (char *)l->weight + row * l->n_in * unit;
    size_t n = part.n_out * l->n_in;
    if (dtype == QTR_DTYPE_F32 || dtype == QTR_DTYPE_F16) {
      (void)qtr_cuda_ok(c, cudaMemcpyAsync(to, part.weight, n * unit, cudaMemcpyDeviceToDevice, c->stream), "a matrix");
    } else {
      (void)qtr_cuda_ok(c, cudaMemsetAsync(n_bad, 0, sizeof found, c->stream), "converting a matrix");
      (void)qtr_cuda_ok(c, qtr_cuda_rows_convert(dtype, part.weight, n, to, n_bad, c->stream), "converting a matrix");
      (void)qtr_cuda_ok(c, cudaMemcpyAsync(&found, n_bad, sizeof found, cudaMemcpyDeviceToHost, c->stream), "a matrix");
    }
    if (part.bias) {
      (void)qtr_cuda_ok(c, cudaMemcpyAsync(l->bias + row, part.bias, part.n_out * 4, cudaMemcpyDeviceToDevice, c->stream),
                        "a bias");
    }
    (void)qtr_cuda_ok(c, cudaStreamSynchronize(c->stream), "uploading a matrix");
    status = qtr_cuda_status(c, err);
    if (!status && found > 0) {
      status =
          qtr_fail(err, QTR_ERR_UNSUPPORTED,
                   "%d weights of a %zu x %zu bf16 matrix are beyond fp16, which the GPU computes with; use --device cpu",
                   found, l->n_out, l->n_in);
    }
  }
  return status;
}

enum qtr_status qtr_cuda_linear_create(struct qtr_backend *b, const struct qtr_linear_source *source,
                                       struct qtr_linear **linear, struct qtr_error *err) {
  struct qtr_cuda *c = (struct qtr_cuda *)b;
  *linear = NULL;
  size_t n_out = 0;
  enum qtr_status status = qtr_linear_source_check(source, &n_out, err);
  if (status) return status;
  if (!qtr_cuda_ok(c, cudaSetDevice(c->device), "choosing the GPU")) return qtr_cuda_status(c, err);
  struct qtr_linear *l = calloc(1, sizeof *l);
  if (!l) return qtr_fail_memory(err, "a matrix", sizeof *l);
  l->format = source->format;
  l->n_in = source->n_in;
  l->n_out = n_out;
  status = source->format <= QTR_LINEAR_BF16 ? create_float(c, source, l, err) : create_integer(c, source, l, err);
  if (status) {
    qtr_cuda_linear_free(b, l);
    return status;
  }
  *linear = l;
  return QTR_OK;
}

void qtr_cuda_linear_free(struct qtr_backend *b, struct qtr_linear *l) {
  if (!l) return;
  qtr_cuda_wait(b);
  qtr_cuda_forget_graphs((struct qtr_cuda *)b);
  matrix_free(&l->matrix);
  qtr_cuda_release(l->weight);
  qtr_cuda_release(l->bias);
  free(l);
}

size_t qtr_cuda_linear_bytes(const struct qtr_linear *l) { return l->n_bytes; }

/* ---- multiplication ------------------------------------------------------------------------------ */

/* y (n, n_out) F32 = x (n, n_in) fp16 times weight^T; column-major for cuBLASLt: y^T = weight x^T. */
static cublasStatus_t product_lt(struct qtr_cuda *c, const struct qtr_linear *l, const void *x, size_t n, float *y) {
  cublasLtMatmulDesc_t desc = NULL;
  cublasLtMatrixLayout_t a = NULL, b = NULL, d = NULL;
  cublasLtMatmulPreference_t wish = NULL;
  cublasLtMatmulHeuristicResult_t how;
  const cublasOperation_t transposed = CUBLAS_OP_T;
  const float one = 1, zero = 0;
  const uint32_t align_x = (uintptr_t)x % 256 == 0 ? 256 : 16, align_y = (uintptr_t)y % 256 == 0 ? 256 : 16;
  const size_t workspace = QTR_CUDA_LT_BYTES;
  int n_found = 0;
  cublasStatus_t s = cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
  if (!s) s = cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed);
  if (!s) s = cublasLtMatrixLayoutCreate(&a, CUDA_R_16F, l->n_in, l->n_out, (int64_t)l->n_in);
  if (!s) s = cublasLtMatrixLayoutCreate(&b, CUDA_R_16F, l->n_in, n, (int64_t)l->n_in);
  if (!s) s = cublasLtMatrixLayoutCreate(&d, CUDA_R_32F, l->n_out, n, (int64_t)l->n_out);
  if (!s) s = cublasLtMatmulPreferenceCreate(&wish);
  if (!s)
    s = cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace);
  if (!s)
    s = cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &align_x, sizeof align_x);
  if (!s)
    s = cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &align_y, sizeof align_y);
  if (!s)
    s = cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &align_y, sizeof align_y);
  if (!s) s = cublasLtMatmulAlgoGetHeuristic(c->lt, desc, a, b, d, d, wish, 1, &how, &n_found);
  if (!s && n_found < 1) s = CUBLAS_STATUS_NOT_SUPPORTED;
  if (!s) {
    s = cublasLtMatmul(c->lt, desc, &one, l->weight, a, x, b, &zero, y, d, y, d, &how.algo, c->lt_workspace, workspace,
                       c->stream);
  }
  (void)cublasLtMatmulPreferenceDestroy(wish);
  (void)cublasLtMatrixLayoutDestroy(a);
  (void)cublasLtMatrixLayoutDestroy(b);
  (void)cublasLtMatrixLayoutDestroy(d);
  (void)cublasLtMatmulDescDestroy(desc);
  return s;
}

static cudaError_t product(struct qtr_cuda *c, const struct qtr_linear *l, const void *x, size_t n, float *y) {
  bool aligned = l->n_in % 8 == 0 && l->n_out % 8 == 0 && (uintptr_t)x % 16 == 0 && (uintptr_t)y % 16 == 0;
  if (aligned && l->format != QTR_LINEAR_F32 && product_lt(c, l, x, n, y) == CUBLAS_STATUS_SUCCESS) return cudaSuccess;
  return qtr_cuda_rows_product(x, l->weight, l->format == QTR_LINEAR_F32, n, l->n_in, l->n_out, y, c->stream);
}

static cudaError_t run_float(struct qtr_cuda *c, const struct qtr_linear_args *args) {
  const struct qtr_linear *l = args->linear;
  const char *x = args->input->data;
  bool direct = args->epilogue == QTR_EPILOGUE_LOGITS && !l->bias;
  size_t row_bytes = l->n_out * sizeof(float);
  size_t chunk = direct ? args->n_tokens : QTR_MAX(QTR_CUDA_PRODUCT_BYTES / row_bytes, (size_t)1);
  if (!direct && row_bytes > QTR_CUDA_PRODUCT_BYTES) return cudaErrorInvalidValue;
  size_t width = args->epilogue == QTR_EPILOGUE_SILU_MUL ? l->n_out / 2 : l->n_out;
  size_t unit = args->epilogue == QTR_EPILOGUE_LOGITS ? sizeof(float) : 2;
  cudaError_t error = cudaSuccess;
  for (size_t at = 0; at < args->n_tokens && !error; at += chunk) {
    size_t n = QTR_MIN(chunk, args->n_tokens - at);
    char *out = (char *)args->out + at * width * unit;
    float *y = direct ? (float *)(void *)out : c->product;
    error = product(c, l, x + at * l->n_in * 2, n, y);
    if (!error && !direct) error = qtr_cuda_rows_finish(y, l->bias, args->epilogue, n, l->n_out, out, c->stream);
  }
  return error;
}

bool qtr_cuda_linear_takes_rows(const struct qtr_linear *l, size_t n_tokens) {
  return l->format > QTR_LINEAR_BF16 && qtr_cuda_gemm_takes_rows(&l->matrix, n_tokens);
}

cudaError_t qtr_cuda_linear_run(struct qtr_cuda *c, const struct qtr_linear_args *args,
                                const struct qtr_cuda_gemm_rows *rows) {
  const struct qtr_linear *l = args->linear;
  if (l->format <= QTR_LINEAR_BF16) return run_float(c, args);
  const struct qtr_cuda_gemm_args gemm = {.w = &l->matrix,
                                          .rows = rows,
                                          .x = args->input->data,
                                          .x_scale = args->input->scale,
                                          .x_sum = args->input->sum,
                                          .x_stride = qtr_cuda_stride(l->n_in),
                                          .x_rows = QTR_MIN(qtr_round_up(args->n_tokens, 256), args->input->max_tokens),
                                          .epilogue = args->epilogue,
                                          .out = args->out,
                                          .n_tokens = args->n_tokens,
                                          .dependent = true};
  return qtr_cuda_gemm(&gemm, c->stream);
}
