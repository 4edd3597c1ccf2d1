/* kv.c - the KV cache of the cuda backend on the host: making, freeing, and reading it back for tests. Layout: kv_layout.h;
 * what is stored: spec C.3 by backend/common/kv_quant.h. The pages begin as zeros, so that every slot is a finite number
 * for kernels that multiply unused slots by zero. Each pool has one page more than asked, for padding (attention.h). */
#include <stdlib.h>
#include <string.h>

#include "backend/common/kv_static.h"
#include "backend/cuda/cuda.h"
#include "backend/cuda/kv_layout.h"
#include "base/checked.h"
#include "base/half.h"
#include "base/status.h"

/* ---- making -------------------------------------------------------------------------------------- */

/* Pools of a layer follow each other: K then V of the retrieval heads, K then V of the streaming heads. Fills k->head,
 * k->stats_at and *retrieval (n_layers, n_kv_heads); returns the bytes of all pools, and *n_stats halves of statistics. */
static size_t place_heads(struct qtr_kv *k, int32_t *retrieval, size_t *n_stats) {
  const struct qtr_kv_config *c = &k->config;
  size_t block = qtr_kv_block_bytes((int)c->format, c->head_dim), at = 0, n_heads = (size_t)c->n_kv_heads;
  *n_stats = 0;
  for (int32_t layer = 0; layer < c->n_layers; layer++) {
    size_t counts[QTR_N_HEAD_CLASSES], first[QTR_N_HEAD_CLASSES], pool[QTR_N_HEAD_CLASSES];
    for (int kind = 0; kind < QTR_N_HEAD_CLASSES; kind++) {
      size_t n_pages = (size_t)(kind == QTR_HEAD_STREAMING ? c->n_stream_pages : c->n_pages) + 1;
      counts[kind] = (size_t)qtr_kv_head_count(&k->heads, layer, (enum qtr_head_class)kind);
      pool[kind] = counts[kind] * block * n_pages;
      first[kind] = at;
      at += 2 * pool[kind];
    }
    for (int32_t h = 0; h < c->n_kv_heads; h++) {
      enum qtr_head_class kind = qtr_kv_head_class(&k->heads, layer, h);
      size_t rank = (size_t)qtr_kv_head_rank(&k->heads, layer, h), row = (size_t)layer * n_heads;
      size_t place = row + (kind == QTR_HEAD_STREAMING ? counts[QTR_HEAD_RETRIEVAL] : 0) + rank;
      k->head[place] = (struct qtr_cuda_head){.k = first[kind] + rank * block,
                                              .v = first[kind] + pool[kind] + rank * block,
                                              .page_bytes = (uint32_t)(counts[kind] * block),
                                              .kv_head = h};
      if (kind == QTR_HEAD_RETRIEVAL) retrieval[row + rank] = h;
    }
    k->stats_at[layer] = *n_stats;
    *n_stats += counts[QTR_HEAD_RETRIEVAL] * ((size_t)c->n_pages + 1) * qtr_kv_stats_values(&k->heads.sparse, c->head_dim);
  }
  return at;
}

/* Zeroed device memory; a failure says what there is. */
static enum qtr_status device_zeros(size_t n_bytes, const char *what, const struct qtr_kv_config *c, void **device,
                                    struct qtr_error *err) {
  cudaError_t error = cudaMalloc(device, n_bytes);
  if (error == cudaSuccess) error = cudaMemset(*device, 0, n_bytes);
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  if (error == cudaSuccess) return QTR_OK;
  size_t n_free = 0, n_total = 0;
  (void)cudaGetLastError();
  (void)cudaMemGetInfo(&n_free, &n_total);
  return qtr_fail(err, QTR_ERR_MEMORY,
                  "%s of %d pages needs %zu MiB of GPU memory, %zu of %zu MiB are free (%s): use fewer pages", what,
                  c->n_pages, n_bytes >> 20, n_free >> 20, n_total >> 20, cudaGetErrorString(error));
}

enum qtr_status qtr_cuda_kv_create(struct qtr_backend *b, const struct qtr_kv_config *config, struct qtr_kv **kv,
                                   struct qtr_error *err) {
  const struct qtr_kv_config *c = config;
  *kv = NULL;
  if (c->fp8 != QTR_KV_FP8_OFF) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED,
                    "rounding K and V to fp8, for comparison, is not there on GPUs; leave it out, or take --device cpu");
  }
  if (c->format >= QTR_N_KV_FORMATS || c->n_layers < 1 || c->n_kv_heads < 1 || c->n_pages < 1 || c->n_pages == INT32_MAX ||
      c->n_stream_pages < 0 || c->n_stream_pages == INT32_MAX || c->head_dim < 2 || c->head_dim > 256 || c->head_dim % 2 ||
      (c->format == QTR_KV_INT8_STATIC && !c->static_scale)) {
    return qtr_fail(err, QTR_ERR_ARGUMENT,
                    "KV cache: format %d, %d layers, %d heads of %d, %d pages: all must be positive, the head size even and "
                    "at most 256, and static scales given for kv8-static",
                    (int)c->format, c->n_layers, c->n_kv_heads, c->head_dim, c->n_pages);
  }
  size_t retrieval_bytes, stream_bytes, n_bytes;
  if (qtr_mul_overflow(qtr_kv_page_bytes(c), (size_t)c->n_pages + 1, &retrieval_bytes) ||
      qtr_mul_overflow(qtr_kv_stream_page_bytes(c), (size_t)c->n_stream_pages + 1, &stream_bytes) ||
      qtr_add_overflow(retrieval_bytes, stream_bytes, &n_bytes))
    return qtr_fail_memory(err, "the KV cache", SIZE_MAX);
  struct qtr_kv *k = calloc(1, sizeof *k);
  if (!k) return qtr_fail_memory(err, "the KV cache", sizeof *k);
  size_t n_heads = (size_t)c->n_layers * (size_t)c->n_kv_heads, n_stats = 0, n_lists;
  int32_t *retrieval = calloc(n_heads, sizeof *retrieval);
  k->config = *c;
  k->config.static_scale = NULL;
  k->config.sparse = NULL;
  k->head = calloc(n_heads, sizeof *k->head);
  k->stats_at = calloc((size_t)c->n_layers, sizeof *k->stats_at);
  enum qtr_status status = qtr_kv_heads_create(c, &k->heads, err);
  if (status) goto done;
  if (!retrieval || !k->head || !k->stats_at) {
    status = qtr_fail_memory(err, "the KV cache", n_heads * sizeof *k->head);
    goto done;
  }
  if (c->format == QTR_KV_INT8_STATIC && (status = qtr_kv_static_scales(c, &k->static_scale, err))) goto done;
  void *device = NULL;
  status = device_zeros(place_heads(k, retrieval, &n_stats), "the KV cache", c, &device, err);
  k->data = device;
  if (status) goto done;
  device = NULL;
  status =
      qtr_cuda_upload((struct qtr_cuda *)b, k->head, n_heads * sizeof *k->head, "the heads of a KV cache", &device, err);
  k->order = device;
  if (status) goto done;
  const struct qtr_kv_sparse *s = &k->heads.sparse;
  if (s->budget > 0) {
    n_lists = qtr_sparse_selections_bytes(&k->heads);
    k->list_ints = qtr_sparse_selection_ints(s);
    k->layer_list_ints = n_lists / sizeof(int32_t) / (size_t)c->n_layers;
    status = device_zeros(n_stats ? n_stats * 2 : 2, "the statistics of a KV cache", c, &k->stats, err);
    device = NULL;
    if (!status) status = device_zeros(n_lists, "the lists of chosen pages", c, &device, err);
    k->lists = device;
    device = NULL;
    if (!status)
      status = qtr_cuda_upload((struct qtr_cuda *)b, retrieval, n_heads * sizeof *retrieval, "the heads of a KV cache",
                               &device, err);
    k->retrieval = device;
    if (status) goto done;
  }
  *kv = k;
  k = NULL;
done:
  free(retrieval);
  qtr_cuda_kv_free(b, k);
  return status;
}

enum qtr_kv_format qtr_cuda_kv_format(const struct qtr_kv *kv) { return kv->config.format; }
const struct qtr_kv_heads *qtr_cuda_kv_heads(const struct qtr_kv *kv) { return &kv->heads; }

void qtr_cuda_kv_free(struct qtr_backend *b, struct qtr_kv *kv) {
  if (!kv) return;
  qtr_cuda_wait(b);
  qtr_cuda_forget_graphs((struct qtr_cuda *)b);
  void *const device[] = {kv->data, kv->order, kv->stats, kv->retrieval, kv->lists};
  for (size_t i = 0; i < sizeof device / sizeof device[0]; i++) {
    if (device[i]) (void)cudaFree(device[i]);
  }
  qtr_kv_heads_free(&kv->heads);
  free(kv->head);
  free(kv->stats_at);
  free(kv->static_scale);
  free(kv);
}

/* ---- reading back, for tests --------------------------------------------------------------------- */

static const struct qtr_cuda_head *head_find(const struct qtr_kv *kv, int32_t layer, int32_t head) {
  int32_t place = qtr_kv_head_rank(&kv->heads, layer, head);
  if (qtr_kv_head_class(&kv->heads, layer, head) == QTR_HEAD_STREAMING) {
    place += qtr_kv_head_count(&kv->heads, layer, QTR_HEAD_RETRIEVAL);
  }
  return &kv->head[(size_t)layer * (size_t)kv->config.n_kv_heads + (size_t)place];
}

void qtr_cuda_kv_read(struct qtr_backend *b, const struct qtr_kv *kv, int32_t layer, bool is_v, int32_t page, int32_t slot,
                      int32_t head, uint16_t *code, float *scale, float *zero) {
  (void)b;
  enum qtr_kv_format format = kv->config.format;
  int dim = kv->config.head_dim;
  size_t n_bytes = qtr_kv_block_bytes((int)format, dim);
  const struct qtr_cuda_head *place = head_find(kv, layer, head);
  size_t at = (is_v ? place->v : place->k) + (size_t)page * place->page_bytes;
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

void qtr_cuda_selection_read(struct qtr_backend *b, const struct qtr_kv *kv, int32_t layer, int32_t q_head, int32_t slot,
                             int32_t *page, int32_t *n, int32_t *tail) {
  (void)b;
  const struct qtr_kv_sparse *s = &kv->heads.sparse;
  size_t choosers = (size_t)qtr_sparse_choosers(s), head = (size_t)(q_head / s->group);
  size_t at = ((size_t)slot * (size_t)kv->config.n_kv_heads + head) * choosers;
  if (s->each_head) at += (size_t)(q_head % s->group);
  const int32_t *list = kv->lists + (size_t)layer * kv->layer_list_ints + at * kv->list_ints;
  int32_t header[2] = {0, 0};
  (void)cudaDeviceSynchronize(); /* an error shows in end_step */
  (void)cudaMemcpy(header, list, sizeof header, cudaMemcpyDeviceToHost);
  *n = header[0];
  *tail = header[1];
  size_t room = kv->list_ints - 2, n_listed = *n < 0 ? 0 : QTR_MIN((size_t)*n, room); /* whatever the GPU has written */
  if (n_listed > 0) (void)cudaMemcpy(page, list + 2, n_listed * sizeof *page, cudaMemcpyDeviceToHost);
}

void qtr_cuda_stats_read(struct qtr_backend *b, const struct qtr_kv *kv, int32_t layer, int32_t page, int32_t logical,
                         int32_t head, float *max, float *min) {
  (void)b;
  int32_t dim = kv->config.head_dim, n = qtr_kv_head_count(&kv->heads, layer, QTR_HEAD_RETRIEVAL);
  (void)cudaDeviceSynchronize();
  for (int is_min = 0; is_min < 2; is_min++) {
    uint16_t half[256];
    size_t at = qtr_cuda_stats_at(kv->heads.sparse.logical_tokens, dim, n, page, qtr_kv_head_rank(&kv->heads, layer, head),
                                  logical, is_min != 0, 0);
    (void)cudaMemcpy(half, (const uint16_t *)kv->stats + kv->stats_at[layer] + at, (size_t)dim * 2, cudaMemcpyDeviceToHost);
    for (int32_t i = 0; i < dim; i++) (is_min ? min : max)[i] = qtr_f16_to_f32(half[i]);
  }
}
