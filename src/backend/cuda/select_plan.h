/* select_plan.h - the plan of a step's page selection as host and kernel see it: a header, the waves, the entries (one an
 * event). Private to select*.
 *
 * Work is counted in tiles: sixteen rows of statistics, that is 16 / (64 / logical_tokens) pages, of one event and retrieval
 * head. The tiles of a wave lie in one line (event, rank, tile), and each block takes an equal part of it. */
#ifndef QTR_BACKEND_CUDA_SELECT_PLAN_H
#define QTR_BACKEND_CUDA_SELECT_PLAN_H

#include "backend/cuda/select.h"

enum {
  QTR_SELECT_ROWS = 16,          /* of a tile */
  QTR_SELECT_WAVE_EVENTS = 1024, /* of a wave; n_seqs if that is more */
  QTR_SELECT_WAVE_KEYS = 8 << 20 /* scores of a wave, 64 MiB; what n_seqs events need if that is more */
};

struct qtr_select_entry {
  int32_t seq, token, tail, list;
  int32_t first_tile, n_tiles; /* in the wave, of one rank. tail < limit: one tile, nothing is scored */
  int32_t first_page, n_pages; /* room for scores, in pages of one rank and chooser, before this event's and its own */
};

struct qtr_select_wave {
  int32_t first_event, n_events, n_tiles, reserved;
};

struct qtr_select_plan {
  int32_t n_waves, n_events, entry_offset, n_bytes; /* bytes from the beginning; waves follow the header */
};

static inline int32_t qtr_select_tile_pages(int32_t logical_tokens) {
  return QTR_SELECT_ROWS / (QTR_PAGE_TOKENS / logical_tokens);
}

#endif
