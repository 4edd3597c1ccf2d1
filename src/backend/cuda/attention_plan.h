/* attention_plan.h - the plan of a step's attention as host and kernels see it: passes, each a header, the choices that are
 * made first (select.h), the entries of decode, and those of prefill. All but steps in which a sequence chooses more than
 * once have one pass. Private to attention_*.
 *
 * A decode entry visits pages: of a dense head all of them, in order; else some from the first and then, without a gap, up
 * to its own. Visit i is page i, or list[i] where pages were chosen, for i < n_first, and page i + skip from there on. Keys
 * are numbered as they are visited, 64 a visit, so that kernels need to know pages only where they copy them.
 * Entries of a sparse cache are of retrieval heads or of streaming heads; those of the latter come second.
 *
 * What decides the bits of a result is the sequence alone: decode cuts it into segments of equal numbers of pages
 * (one up to QTR_WHOLE_TILES pages, else of QTR_SEGMENT_TILES pages or more, chosen ones of QTR_CHOSEN_TILES), computes each
 * from nothing and merges them in order; whether one block does this (an entry over all segments) or several (one entry a
 * segment, results through scratch) does not matter. Prefill walks the pages from the first to the last that a row may see.
 */
#ifndef QTR_BACKEND_CUDA_ATTENTION_PLAN_H
#define QTR_BACKEND_CUDA_ATTENTION_PLAN_H

#include "backend/cuda/attention.h"

#include <assert.h>

enum {
  QTR_WHOLE_TILES = 24,   /* longer sequences have several segments */
  QTR_SEGMENT_TILES = 16, /* pages of a segment; doubled until a sequence has at most QTR_MAX_SEGMENTS */
  QTR_CHOSEN_TILES = 8,   /* the same where pages were chosen: few heads, a fixed number of pages */
  QTR_MAX_SEGMENTS = 64,
  QTR_MAX_SLOTS = 1024,      /* partial results (segments of split sequences) in a step */
  QTR_MAX_SPLIT_HEADS = 128, /* sequences are split if there are at most so many query heads */
  QTR_PREFILL_ROWS = 128     /* rows (token, head of a group) of a prefill entry */
};
#define QTR_COUNTER_BYTES ((size_t)QTR_MAX_SLOTS * QTR_MAX_SPLIT_HEADS * sizeof(int32_t))

struct qtr_decode_entry {
  int32_t seq, token, n_keys;  /* its query; keys of its visits, the query's own the last of them */
  int32_t segment_tiles;       /* visits of a segment */
  int32_t segment, n_segments; /* those of this entry */
  int32_t slot;                /* -1: alone; else where the sequence's partial results begin */
  int32_t all_segments;
  int32_t n_visits, n_first, skip; /* pages: see above */
  int32_t list;                    /* -1, or where the pages of the first visits are */
  int32_t hole_from, hole_to;      /* keys [from, to) of the visits are not seen; a streaming head's */
  int32_t reserved[2];
};

struct qtr_prefill_entry {
  int32_t seq, first_token, kv_len; /* first token of the sequence in the batch; tokens before it in the cache */
  int32_t row, n_rows;              /* row = token * group + head of the group */
  int32_t n_tiles;                  /* pages up to the one that its last row is in */
  int32_t reserved[2];
};

struct qtr_attention_plan { /* offsets: bytes from here */
  int32_t n_decode,
      n_streaming; /* decode entries of retrieval heads, which are all heads of a dense cache; of streaming heads */
  int32_t decode_offset;
  int32_t n_slots;
  int32_t n_prefill, prefill_offset;
  int32_t n_choices;     /* their plan follows this header, in a fixed room of the batch's shape (select.h) */
  int32_t next, n_bytes; /* the next pass, 0: this is the last one; of this pass */
  int32_t reserved[3];
};
static_assert(sizeof(struct qtr_attention_plan) % 16 == 0, "entries are read 16 bytes at a time");

static inline struct qtr_decode_entry *qtr_plan_decode(struct qtr_attention_plan *p) {
  return (struct qtr_decode_entry *)(void *)((char *)p + p->decode_offset);
}

/* Query heads that a decode block takes at once: one or two columns of eight, or one head with a list of its own; blocks of
 * a KV head's group. */
static inline int32_t qtr_decode_columns(int32_t group) { return group <= 8 ? 1 : 2; }
static inline int32_t qtr_decode_head_blocks(int32_t group, bool each_head) { return each_head ? group : (group + 15) / 16; }

#endif
