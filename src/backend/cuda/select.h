/* select.h - page selection of sparse attention on the GPU (backend.h, struct qtr_kv_sparse; spec D.4, D.5): statistics of
 * keys, and the choice of pages by them. Plain C; kernels in select.cu, the plan of a step in select_plan.c.
 *
 * Which queries choose anew is decided on the host, from positions: they are the events of a step. One launch scores the
 * pages of all events of a wave and makes their choices, so that a layer of a decode step costs one launch whatever its
 * contexts are, and a captured graph serves any of them.
 *
 * Scores are sums of double products of the fp16 values, in one order for all pages: equal statistics give equal scores. Of
 * equal scores the earlier page is taken, as qtr_sparse_choose does (common/sparse.h). */
#ifndef QTR_BACKEND_CUDA_SELECT_H
#define QTR_BACKEND_CUDA_SELECT_H

#include "backend/backend.h"
#include "backend/cuda/kv_layout.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What is the same for all steps of a cache. */
struct qtr_cuda_select_config {
  int32_t n_kv_heads, group, head_dim; /* group 1 ... 64; head_dim even, at most 256 (fast: 64 and 128) */
  int32_t logical_tokens;              /* 16, 32 or 64 */
  int32_t limit;                       /* qtr_sparse_limit: most pages of a choice, the query's own among them */
  bool each_head;
  int32_t n_seqs;    /* a step of at most so many events is one wave, and can be captured */
  int32_t max_pages; /* of the longest sequence */
  int32_t n_sms;
};

/* ---- statistics ---------------------------------------------------------------------------------------------------- */

/* Where the value of dim i lies in the statistics of a layer, in halves: (n_pages + 1 physical pages, n_retrieval ranks, 64
 * / logical_tokens logical pages, 2: maxima, then minima, head_dim) fp16. The layer begins at a multiple of 16 bytes. */
QTR_KV_FN size_t qtr_cuda_stats_at(int32_t logical_tokens, int32_t head_dim, int32_t n_retrieval, int32_t page, int32_t rank,
                                   int32_t logical, bool is_min, int32_t i) {
  size_t row = ((size_t)page * (size_t)n_retrieval + (size_t)rank) * (size_t)(QTR_PAGE_TOKENS / logical_tokens);
  return ((row + (size_t)logical) * 2 + (is_min ? 1 : 0)) * (size_t)head_dim + (size_t)i;
}

struct qtr_cuda_stats_args {
  const void *qkv;     /* device fp16 (n_tokens, (n_heads + 2 n_kv_heads) * head_dim), k rotated */
  void *stats;         /* device fp16, this layer's, as above */
  const int32_t *head; /* device (n_retrieval) KV heads that are retrieval heads, ascending */
  int32_t n_retrieval, n_heads, n_kv_heads, head_dim, logical_tokens;
  int32_t n_tokens, n_seqs, max_blocks;
  const int32_t *token_seq;   /* device (n_tokens) */
  const int32_t *q_start;     /* device (n_seqs + 1) */
  const int32_t *kv_len;      /* device (n_seqs) */
  const int32_t *block_table; /* device (n_seqs, max_blocks) */
};
/* The first key of a logical page begins its statistics, whatever was there; later ones widen them. Keys are brought into
 * the range of fp16 first. Launches depend on n_tokens and n_retrieval only. */
cudaError_t qtr_cuda_stats_update(const struct qtr_cuda_stats_args *args, cudaStream_t stream);

/* ---- the choice ---------------------------------------------------------------------------------------------------- */

/* The query of batch token `token`, of sequence `seq`, chooses among the pages 0 ... tail - 1 before its own; what it
 * chooses goes to list `list`. 1 <= tail <= max_pages. */
struct qtr_cuda_select_event {
  int32_t seq, token, tail, list;
};

/* Most bytes of a plan, a multiple of 16; the plan itself wants an address that is one, too. */
size_t qtr_cuda_select_plan_bytes(size_t max_events);
/* Writes the plan of n >= 0 events to `plan` (host), to be uploaded with the batch. No two events of a step name one list.
 * Events are cut into waves, one launch each, that fit the scratch; up to config->n_seqs events are one wave. */
void qtr_cuda_select_plan(const struct qtr_cuda_select_config *config, const struct qtr_cuda_select_event *event, size_t n,
                          void *plan);
/* Device scratch: 64 MiB of scores, or what n_seqs events of max_pages need if that is more, and counters that must be zero
 * before the first use; they are zero again after each. SIZE_MAX on overflow. */
size_t qtr_cuda_select_scratch_bytes(const struct qtr_cuda_select_config *config);
/* Its first bytes, those that must be zeroed once. */
size_t qtr_cuda_select_counter_bytes(const struct qtr_cuda_select_config *config);

struct qtr_cuda_select_args {
  const void *qkv;   /* device fp16 (n_tokens, (n_heads + 2 n_kv_heads) * head_dim), q rotated; n_heads = n_kv_heads * group.
                        At a multiple of 16 bytes */
  const void *stats; /* device fp16, this layer's */
  const int32_t *head; /* device (n_retrieval) */
  int32_t n_retrieval, max_blocks;
  const int32_t *block_table; /* device (n_seqs, max_blocks) */
  int32_t *lists;   /* device (lists, n_kv_heads, choosers: each_head ? group : 1) struct qtr_selection of this layer, each
                       of qtr_sparse_selection_ints() ints */
  const void *plan; /* device */
  void *scratch;    /* device */
};
/* Launches one kernel a wave, at least one: its size depends on config and n_retrieval only. host_plan: the host's copy.
 * plan, head and block_table are read while the kernel before still runs: only copies may have written them. */
cudaError_t qtr_cuda_select(const struct qtr_cuda_select_config *config, const struct qtr_cuda_select_args *args,
                            const void *host_plan, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
