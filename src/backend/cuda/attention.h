/* attention.h - the KV cache on the GPU: RoPE and KV write (spec C.3, C.4), attention over pages (C.5). Plain C; kernels in
 * rope_kv.cu, attention_*.cu, host side in kv.c and attention_plan.c.
 *
 * Attention reads K and V of every token from the pages, those of this step included (backend.h). The layout inside a page
 * is this backend's own (kv_layout.h); a page of one layer, K or V, holds all KV heads of 64 tokens.
 *
 * Bits. A sequence's result depends on nothing else in the batch. Head sizes other than 64 and 128: on nothing but its
 * tokens. 64 and 128: given tokens in chunks of two or more give the same bits however a prompt is cut; a given token alone
 * in a step, and every generated token, however many are computed again in a step (preemption), takes the decode kernel,
 * which rounds otherwise (both round weights to fp16, sums are fp32), unless one_kernel is set.
 *
 * Sparse caches (backend.h, struct qtr_kv_sparse). The same kernels walk over those pages only that a head sees: the first
 * ones and the last ones of a streaming head, the chosen ones and those begun since of a retrieval head. A step in which one
 * sequence chooses several times is done in passes, one choice each. */
#ifndef QTR_BACKEND_CUDA_ATTENTION_H
#define QTR_BACKEND_CUDA_ATTENTION_H

#include "backend/backend.h"
#include "backend/common/sparse.h"
#include "backend/cuda/select.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Where the blocks of a KV head are: that of page i of its class begins i * page_bytes further. */
struct qtr_cuda_head {
  size_t k, v;         /* bytes from the beginning of the cache to the block of page 0 */
  uint32_t page_bytes; /* of a page of this class and layer, K or V */
  int32_t kv_head;
  int32_t reserved[2];
};

struct qtr_kv {
  struct qtr_kv_config config;
  struct qtr_kv_heads heads;
  float *static_scale;         /* host (n_layers, 2); INT8_STATIC */
  uint8_t *data;               /* device: a pool for each layer, class and K or V; one page more than asked in each */
  struct qtr_cuda_head *head;  /* host (n_layers, n_kv_heads): the retrieval heads of a layer, then its streaming heads */
  struct qtr_cuda_head *order; /* device copy of it */
  /* With a budget. */
  void *stats;                       /* device fp16: statistics of keys, a layer at stats_at */
  size_t *stats_at;                  /* host (n_layers) halves */
  int32_t *retrieval;                /* device (n_layers, n_kv_heads): the layer's retrieval heads, ascending */
  int32_t *lists;                    /* device (n_layers, n_slots, n_kv_heads, choosers) struct qtr_selection */
  size_t list_ints, layer_list_ints; /* of one choice; of a layer's */
};

/* A step on the device. Counts are the host's; arrays are device copies of struct qtr_batch, valid until the step's end.
 * In a CUDA graph the counts are those of the bucket: sequences past the real ones have one token, kv_len 0 and the spare
 * page (config.n_pages of kv_create + 1 pages are allocated; the last one is for them). */
struct qtr_cuda_batch {
  int32_t n_tokens, n_seqs, max_blocks;
  const int32_t *position;     /* (n_tokens) */
  const int32_t *token_seq;    /* (n_tokens) sequence of each token */
  const int32_t *q_start;      /* (n_seqs + 1) */
  const int32_t *kv_len;       /* (n_seqs) */
  const int32_t *block_table;  /* (n_seqs, max_blocks) */
  const int32_t *stream_table; /* (n_seqs, max_blocks) of the streaming heads; -1 became the spare page of their pool */
  const float *cos, *sin;      /* (n_tokens, head_dim/2) */
  const void *plan;            /* what qtr_cuda_attention_plan wrote */
};

/* How the attention of a step is cut into work items; made on the host once a step, uploaded with the batch. */
struct qtr_cuda_plan_config {
  enum qtr_kv_format format;
  int32_t n_heads, n_kv_heads, head_dim, n_sms;
  bool one_kernel; /* dense: all tokens take prefill's kernel: bits do not depend on how a prompt is cut; decode is slow */
  const struct qtr_kv_heads *heads; /* of a sparse cache; NULL: dense */
  bool has_prefill;                 /* prefill's kernel is there; else decode's takes all tokens of a sparse cache */
};
/* Most bytes a plan can have for a batch of at most these sizes; with a fixed batch shape (all sequences one token: decode)
 * launches depend on n_seqs and these bounds only, so that a captured graph serves any context lengths. */
size_t qtr_cuda_attention_plan_bytes(const struct qtr_cuda_plan_config *config, size_t max_tokens, size_t max_seqs);
/* Writes the plan of `batch` (host arrays) to `plan` (host); true: pages are chosen. Steps of single tokens in which they
 * are are other graphs than those in which they are not. */
bool qtr_cuda_attention_plan(const struct qtr_cuda_plan_config *config, const struct qtr_batch *batch, void *plan);
/* Device scratch for partial results, for a batch of at most these sizes. */
size_t qtr_cuda_attention_scratch_bytes(const struct qtr_cuda_plan_config *config, size_t max_tokens, size_t max_seqs);
/* What page selection wants to know of a cache with a budget (select.h). */
struct qtr_cuda_select_config qtr_cuda_select_config_of(const struct qtr_kv_heads *heads, int32_t head_dim, int32_t n_sms);

/* args->qkv, args->out: fp16. Rotates q and k in place (k is written back rotated, rounded to fp16, and quantised from
 * that), stores K and V with the bits that kv_quant.h gives for the fp16 values. */
cudaError_t qtr_cuda_rope_kv_write(const struct qtr_rope_kv_args *args, const struct qtr_cuda_batch *batch,
                                   cudaStream_t stream);
/* host_plan: the host's copy, for launch sizes. scratch: device (qtr_cuda_attention_scratch_bytes), left as it was found if
 * it must hold counters (zeroed once); select_scratch: the same for choices (select.h), NULL without a budget. */
cudaError_t qtr_cuda_attention(const struct qtr_attention_args *args, const struct qtr_cuda_batch *batch,
                               const void *host_plan, void *scratch, void *select_scratch, int32_t n_sms,
                               cudaStream_t stream);
/* Is prefill's kernel there on this GPU and in this build? */
bool qtr_cuda_attention_has_prefill(void);
/* cos, sin (n_tokens, half_dim) of fp32 products position * inv_freq (device (half_dim)), accurate as cosf and sinf. */
cudaError_t qtr_cuda_rope_table(const int32_t *position, const float *inv_freq, size_t n_tokens, size_t half_dim, float *cos,
                                float *sin, cudaStream_t stream);

/* kv.c: what the vtable has of the cache (what reads it back may copy a page at a time; it is for tests). */
enum qtr_status qtr_cuda_kv_create(struct qtr_backend *b, const struct qtr_kv_config *config, struct qtr_kv **kv,
                                   struct qtr_error *err);
void qtr_cuda_kv_free(struct qtr_backend *b, struct qtr_kv *kv);
enum qtr_kv_format qtr_cuda_kv_format(const struct qtr_kv *kv);
const struct qtr_kv_heads *qtr_cuda_kv_heads(const struct qtr_kv *kv);
void qtr_cuda_kv_read(struct qtr_backend *b, const struct qtr_kv *kv, int32_t layer, bool is_v, int32_t page, int32_t slot,
                      int32_t head, uint16_t *code, float *scale, float *zero);
void qtr_cuda_selection_read(struct qtr_backend *b, const struct qtr_kv *kv, int32_t layer, int32_t q_head, int32_t slot,
                             int32_t *page, int32_t *n, int32_t *tail);
void qtr_cuda_stats_read(struct qtr_backend *b, const struct qtr_kv *kv, int32_t layer, int32_t page, int32_t logical,
                         int32_t head, float *max, float *min);

#ifdef __cplusplus
}
#endif
#endif
