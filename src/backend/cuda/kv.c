/* kv.c - the KV cache of the cuda backend on the host: making, freeing, and reading it back for tests. Layout: kv_layout.h;
 * what is stored: spec C.3 by backend/common/kv_quant.h. The pages begin as zeros, so that every slot is a finite number
 * for kernels that multiply unused slots by zero. One page more than asked is there for padding (attention.h). */
#include <stdlib.h>
#include <string.h>

#include "backend/common/kv_static.h"
#include "backend/cuda/cuda.h"
#include "backend/cuda/kv_layout.h"
#include "base/checked.h"
#include "base/half.h"
#include "base/status.h"

enum qtr_status qtr_cuda_kv_create(struct qtr_backend *b, const struct qtr_kv_config *config, struct qtr_kv **kv,
                                   struct qtr_error *err) {
  const struct qtr_kv_config *c = config;
  *kv = NULL;
  if (c->fp8 != QTR_KV_FP8_OFF) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED,
                    "rounding K and V to fp8, for comparison, is not there on GPUs; leave it out, or take --device cpu");
  }
  if (c->sparse) {
    return qtr_fail(
        err, QTR_ERR_UNSUPPORTED,
        "sparse attention (streaming heads, page selection) has no kernels on GPUs yet; leave its options out, or take "
        "--device cpu");
  }
  if (c->format >= QTR_N_KV_FORMATS || c->n_layers < 1 || c->n_kv_heads < 1 || c->n_pages < 1 || c->n_pages == INT32_MAX ||
      c->head_dim < 2 || c->head_dim > 256 || c->head_dim % 2 || (c->format == QTR_KV_INT8_STATIC && !c->static_scale)) {
    return qtr_fail(err, QTR_ERR_ARGUMENT,
                    "KV cache: format %d, %d layers, %d heads of %d, %d pages: all must be positive, the head size even and "
                    "at most 256, and static scales given for kv8-static",
                    (int)c->format, c->n_layers, c->n_kv_heads, c->head_dim, c->n_pages);
  }
  size_t all = qtr_kv_page_bytes(c), n_bytes;
  if (qtr_mul_overflow(all, (size_t)c->n_pages + 1, &n_bytes)) return qtr_fail_memory(err, "the KV cache", SIZE_MAX);
  struct qtr_kv *k = calloc(1, sizeof *k);
  if (!k) return qtr_fail_memory(err, "the KV cache", sizeof *k);
  enum qtr_status status = QTR_ERR_MEMORY;
  k->config = *c;
  k->config.static_scale = NULL;
  k->page_bytes = all / (size_t)c->n_layers / 2;
  if (c->format == QTR_KV_INT8_STATIC && (status = qtr_kv_static_scales(c, &k->static_scale, err))) goto done;
  void *data = NULL;
  cudaError_t error = cudaMalloc(&data, n_bytes);
  k->data = data;
  if (error == cudaSuccess) error = cudaMemset(data, 0, n_bytes);
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  if (error != cudaSuccess) {
    size_t n_free = 0, n_total = 0;
    (void)cudaGetLastError();
    (void)cudaMemGetInfo(&n_free, &n_total);
    status = qtr_fail(err, QTR_ERR_MEMORY,
                      "the KV cache of %d pages needs %zu MiB of GPU memory, %zu of %zu MiB are free (%s): use fewer pages",
                      c->n_pages, n_bytes >> 20, n_free >> 20, n_total >> 20, cudaGetErrorString(error));
    goto done;
  }
  *kv = k;
  k = NULL;
  status = QTR_OK;
done:
  qtr_cuda_kv_free(b, k);
  return status;
}

enum qtr_kv_format qtr_cuda_kv_format(const struct qtr_kv *kv) { return kv->config.format; }

void qtr_cuda_kv_free(struct qtr_backend *b, struct qtr_kv *kv) {
  if (!kv) return;
  qtr_cuda_wait(b);
  qtr_cuda_forget_graphs((struct qtr_cuda *)b);
  if (kv->data) (void)cudaFree(kv->data);
  free(kv->static_scale);
  free(kv);
}

void qtr_cuda_kv_read(struct qtr_backend *b, const struct qtr_kv *kv, int32_t layer, bool is_v, int32_t page, int32_t slot,
                      int32_t head, uint16_t *code, float *scale, float *zero) {
  (void)b;
  enum qtr_kv_format format = kv->config.format;
  int dim = kv->config.head_dim;
  size_t n_bytes = qtr_kv_block_bytes((int)format, dim), pool = (size_t)layer * 2 + is_v;
  size_t at = (pool * ((size_t)kv->config.n_pages + 1) + (size_t)page) * kv->page_bytes + (size_t)head * n_bytes;
  uint8_t block[QTR_PAGE_TOKENS * 256 * 2];
  memset(block, 0, n_bytes);
  (void)cudaDeviceSynchronize(); /* an error shows in end_step */
  (void)cudaMemcpy(block, kv->data + at, n_bytes, cudaMemcpyDeviceToHost);
  uint16_t pair[2] = {0, 0};
  if (qtr_kv_has_params((int)format)) {
    memcpy(pair, block + qtr_kv_code_bytes((int)format, dim) + (size_t)slot * sizeof pair, sizeof pair);
  }
  if (scale) *scale = format == QTR_KV_INT8_STATIC ? kv->static_scale[layer * 2 + is_v] : qtr_f16_to_f32(pair[0]);
  if (zero) *zero = qtr_f16_to_f32(pair[1]);
  for (int i = 0; code && i < dim; i++) {
    int shift;
    const uint8_t *from = block + qtr_kv_element((int)format, dim, is_v, slot, i, &shift);
    switch (format) {
      case QTR_KV_F16: memcpy(&code[i], from, 2); break;
      case QTR_KV_INT4: code[i] = (uint16_t)((unsigned)*from >> shift & 15u); break;
      case QTR_KV_INT8_STATIC: code[i] = (uint16_t)((int)*from - 128); break; /* two's complement, sign extended */
      default: code[i] = *from; break;
    }
  }
}
