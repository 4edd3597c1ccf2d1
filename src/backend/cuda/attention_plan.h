/* attention_plan.h - the plan of a step's attention as host and kernels see it: one header, then the entries of decode, then
 * those of prefill. Private to attention_*.
 *
 * What decides the bits of a result is the sequence alone: decode cuts it into segments of equal numbers of pages
 * (one up to QTR_WHOLE_TILES pages, else of QTR_SEGMENT_TILES pages or more), computes each from nothing and merges them in
 * order; whether one block does this (an entry over all segments) or several (one entry a segment, results through scratch)
 * does not matter. Prefill walks the pages from the first to the last that a row may see. */
#ifndef QTR_BACKEND_CUDA_ATTENTION_PLAN_H
#define QTR_BACKEND_CUDA_ATTENTION_PLAN_H

#include "backend/cuda/attention.h"

enum {
  QTR_WHOLE_TILES = 24,   /* longer sequences have several segments */
  QTR_SEGMENT_TILES = 16, /* pages of a segment; doubled until a sequence has at most QTR_MAX_SEGMENTS */
  QTR_MAX_SEGMENTS = 64,
  QTR_MAX_SLOTS = 1024,      /* partial results (segments of split sequences) in a step */
  QTR_MAX_SPLIT_HEADS = 128, /* sequences are split if there are at most so many query heads */
  QTR_PREFILL_ROWS = 128     /* rows (token, head of a group) of a prefill entry */
};
#define QTR_COUNTER_BYTES ((size_t)QTR_MAX_SLOTS * QTR_MAX_SPLIT_HEADS * sizeof(int32_t))

struct qtr_decode_entry {
  int32_t seq, token, n_tokens; /* its query; tokens it sees, itself included */
  int32_t segment_tiles;        /* pages of a segment */
  int32_t segment, n_segments;  /* those of this entry */
  int32_t slot;                 /* -1: alone; else where the sequence's partial results begin */
  int32_t all_segments;
};

struct qtr_prefill_entry {
  int32_t seq, first_token, kv_len; /* first token of the sequence in the batch; tokens before it in the cache */
  int32_t row, n_rows;              /* row = token * group + head of the group */
  int32_t n_tiles;                  /* pages that its last row sees */
  int32_t reserved[2];
};

struct qtr_attention_plan {
  int32_t n_decode, n_prefill, n_slots, prefill_offset; /* bytes from the beginning; decode follows the header */
  int32_t n_bytes, reserved[3];
};

/* Query heads that a decode block takes at once: one or two columns of eight; blocks of a KV head's group. */
static inline int32_t qtr_decode_columns(int32_t group) { return group <= 8 ? 1 : 2; }
static inline int32_t qtr_decode_head_blocks(int32_t group) { return (group + 15) / 16; }

#endif
