/* select_plan.c - cuts the page selections of a step into waves, and says where each event's work and scores are
 * (select_plan.h). */
#include "backend/cuda/select_plan.h"

#include <string.h>

#include "base/checked.h"

static size_t wave_events(const struct qtr_cuda_select_config *c) {
  return (size_t)QTR_MAX(c->n_seqs, (int32_t)QTR_SELECT_WAVE_EVENTS);
}

/* Pages of room for scores in a wave, of one KV head and chooser; SIZE_MAX on overflow. */
static size_t wave_pages(const struct qtr_cuda_select_config *c) {
  size_t choosers = (size_t)c->n_kv_heads * (size_t)(c->each_head ? c->group : 1), need;
  if (qtr_mul_overflow(qtr_round_up((size_t)c->max_pages, QTR_SELECT_ROWS), (size_t)c->n_seqs, &need)) return SIZE_MAX;
  return QTR_MAX(need, (size_t)QTR_SELECT_WAVE_KEYS / choosers);
}

size_t qtr_cuda_select_counter_bytes(const struct qtr_cuda_select_config *c) {
  return qtr_round_up(wave_events(c) * (size_t)c->n_kv_heads * sizeof(int32_t), 16);
}

size_t qtr_cuda_select_scratch_bytes(const struct qtr_cuda_select_config *c) {
  size_t n = wave_pages(c), choosers = (size_t)c->n_kv_heads * (size_t)(c->each_head ? c->group : 1);
  if (n == SIZE_MAX || n > INT32_MAX || qtr_mul_overflow(n, choosers * sizeof(uint64_t), &n) ||
      qtr_add_overflow(n, qtr_cuda_select_counter_bytes(c), &n))
    return SIZE_MAX;
  return n;
}

size_t qtr_cuda_select_plan_bytes(size_t max_events) {
  size_t n = QTR_MAX(max_events, (size_t)1);
  return sizeof(struct qtr_select_plan) + n * (sizeof(struct qtr_select_wave) + sizeof(struct qtr_select_entry));
}

void qtr_cuda_select_plan(const struct qtr_cuda_select_config *c, const struct qtr_cuda_select_event *event, size_t n,
                          void *plan) {
  struct qtr_select_plan *p = plan;
  struct qtr_select_wave *wave = (struct qtr_select_wave *)(p + 1);
  struct qtr_select_entry *entry = (struct qtr_select_entry *)(wave + QTR_MAX(n, (size_t)1)); /* as many waves at most */
  int32_t tile_pages = qtr_select_tile_pages(c->logical_tokens);
  size_t most_events = wave_events(c), most_pages = wave_pages(c), pages = 0;
  *p = (struct qtr_select_plan){.n_waves = 1, .n_events = (int32_t)n, .entry_offset = (int32_t)((char *)entry - (char *)p)};
  wave[0] = (struct qtr_select_wave){0};
  for (size_t i = 0; i < n; i++) {
    bool all = event[i].tail < c->limit;
    int32_t n_tiles = all ? 1 : (event[i].tail + tile_pages - 1) / tile_pages, n_pages = all ? 0 : n_tiles * tile_pages;
    if ((size_t)wave->n_events == most_events || pages + (size_t)n_pages > most_pages) {
      wave++;
      *wave = (struct qtr_select_wave){.first_event = (int32_t)i};
      p->n_waves++;
      pages = 0;
    }
    entry[i] = (struct qtr_select_entry){.seq = event[i].seq,
                                         .token = event[i].token,
                                         .tail = event[i].tail,
                                         .list = event[i].list,
                                         .first_tile = wave->n_tiles,
                                         .n_tiles = n_tiles,
                                         .first_page = (int32_t)pages,
                                         .n_pages = n_pages};
    wave->n_events++;
    wave->n_tiles += n_tiles;
    pages += (size_t)n_pages;
  }
  p->n_bytes = (int32_t)((char *)(entry + n) - (char *)p);
}
