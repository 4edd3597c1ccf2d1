/* attention_plan.c - cuts the attention of a step into entries (attention_plan.h), longest first, so that blocks that take
 * them in turn end together. Sequences with one new token go to decode, the others (with one_kernel:
 * all) to prefill. */
#include "backend/cuda/attention_plan.h"

#include <stdlib.h>
#include <string.h>

#include "base/checked.h"

enum { BLOCKS_PER_SM = 3 };

static size_t slots_most(const struct qtr_cuda_plan_config *config, size_t n_seqs) {
  if (config->n_heads > QTR_MAX_SPLIT_HEADS) return 0;
  return n_seqs > QTR_MAX_SLOTS / QTR_MAX_SEGMENTS ? QTR_MAX_SLOTS : n_seqs * QTR_MAX_SEGMENTS;
}

static size_t group_of(const struct qtr_cuda_plan_config *config) { return (size_t)(config->n_heads / config->n_kv_heads); }

size_t qtr_cuda_attention_plan_bytes(const struct qtr_cuda_plan_config *config, size_t max_tokens, size_t max_seqs) {
  size_t decode = max_seqs + slots_most(config, max_seqs);
  size_t prefill = max_tokens * group_of(config) / QTR_PREFILL_ROWS + max_seqs + 1;
  return sizeof(struct qtr_attention_plan) + decode * sizeof(struct qtr_decode_entry) +
         prefill * sizeof(struct qtr_prefill_entry);
}

size_t qtr_cuda_attention_scratch_bytes(const struct qtr_cuda_plan_config *config, size_t max_tokens, size_t max_seqs) {
  (void)max_tokens;
  size_t row = ((size_t)config->head_dim + 4) * sizeof(float);
  return QTR_COUNTER_BYTES + slots_most(config, max_seqs) * (size_t)config->n_heads * row;
}

static int decode_longer(const void *a, const void *b) {
  const struct qtr_decode_entry *x = a, *y = b;
  int32_t n = QTR_MIN(x->n_segments * x->segment_tiles, x->n_tokens / QTR_PAGE_TOKENS - x->segment * x->segment_tiles);
  int32_t m = QTR_MIN(y->n_segments * y->segment_tiles, y->n_tokens / QTR_PAGE_TOKENS - y->segment * y->segment_tiles);
  return n != m ? (n < m) - (n > m) : (x->token > y->token) - (x->token < y->token);
}

static int prefill_longer(const void *a, const void *b) {
  const struct qtr_prefill_entry *x = a, *y = b;
  if (x->n_tiles != y->n_tiles) return (x->n_tiles < y->n_tiles) - (x->n_tiles > y->n_tiles);
  return x->seq != y->seq ? (x->seq > y->seq) - (x->seq < y->seq) : (x->row > y->row) - (x->row < y->row);
}

static bool decodes(const struct qtr_cuda_plan_config *config, const struct qtr_batch *batch, int32_t s) {
  return batch->q_start[s + 1] - batch->q_start[s] == 1 && !config->one_kernel;
}

static int32_t tiles(int32_t n_tokens) { return (n_tokens + QTR_PAGE_TOKENS - 1) / QTR_PAGE_TOKENS; }

void qtr_cuda_attention_plan(const struct qtr_cuda_plan_config *config, const struct qtr_batch *batch, void *plan) {
  struct qtr_attention_plan *p = plan;
  memset(p, 0, sizeof *p);
  struct qtr_decode_entry *decode = (struct qtr_decode_entry *)(p + 1);
  int32_t group = (int32_t)group_of(config);
  size_t pairs = (size_t)config->n_kv_heads * (size_t)qtr_decode_head_blocks(group), all = 0, n_whole = 0, longest = 0;
  size_t n_slots = slots_most(config, (size_t)batch->n_seqs);
  for (int32_t s = 0; s < batch->n_seqs; s++) {
    if (!decodes(config, batch, s)) continue;
    all += (size_t)tiles(batch->kv_len[s] + 1) * pairs;
    n_whole++;
    longest = QTR_MAX(longest, (size_t)tiles(batch->kv_len[s] + 1));
  }
  /* Splitting costs writing and reading parts. Sequences of about one length stay whole where that keeps the GPU busy; else
   * what is longer than a share (half of one if the last round of blocks would be rather empty) is split. */
  size_t blocks = (size_t)config->n_sms * BLOCKS_PER_SM, items = n_whole * pairs, rounds = (items + blocks - 1) / blocks;
  size_t share = all / blocks / (items * 10 >= rounds * blocks * 8 || rounds > 4 ? 1 : 2);
  if (items * 2 >= (size_t)config->n_sms * 3 && longest * items * 10 <= all * 11) share = longest;
  for (int32_t s = 0; s < batch->n_seqs; s++) {
    if (!decodes(config, batch, s)) continue;
    int32_t n_tokens = batch->kv_len[s] + 1, n_tiles = tiles(n_tokens),
            segment_tiles = n_tiles <= QTR_WHOLE_TILES ? QTR_WHOLE_TILES : QTR_SEGMENT_TILES;
    while ((n_tiles + segment_tiles - 1) / segment_tiles > QTR_MAX_SEGMENTS) segment_tiles *= 2;
    int32_t n_segments = (n_tiles + segment_tiles - 1) / segment_tiles;
    bool split = n_segments > 1 && (size_t)n_tiles > share && (size_t)(p->n_slots + n_segments) <= n_slots;
    for (int32_t i = 0; i < (split ? n_segments : 1); i++) {
      decode[p->n_decode++] = (struct qtr_decode_entry){.seq = s,
                                                        .token = batch->q_start[s],
                                                        .n_tokens = n_tokens,
                                                        .segment_tiles = segment_tiles,
                                                        .segment = i,
                                                        .n_segments = split ? 1 : n_segments,
                                                        .slot = split ? p->n_slots : -1,
                                                        .all_segments = n_segments};
    }
    if (split) p->n_slots += n_segments;
  }
  qsort(decode, (size_t)p->n_decode, sizeof *decode, decode_longer);
  struct qtr_prefill_entry *prefill = (struct qtr_prefill_entry *)(decode + p->n_decode);
  p->prefill_offset = (int32_t)((char *)prefill - (char *)p);
  for (int32_t s = 0; s < batch->n_seqs; s++) {
    int32_t n_q = batch->q_start[s + 1] - batch->q_start[s], n_rows = n_q * group;
    if (n_q <= (config->one_kernel ? 0 : 1)) continue;
    for (int32_t row = 0; row < n_rows; row += QTR_PREFILL_ROWS) {
      int32_t n = QTR_MIN(n_rows - row, (int32_t)QTR_PREFILL_ROWS), last = (row + n - 1) / group;
      prefill[p->n_prefill++] = (struct qtr_prefill_entry){.seq = s,
                                                           .first_token = batch->q_start[s],
                                                           .kv_len = batch->kv_len[s],
                                                           .row = row,
                                                           .n_rows = n,
                                                           .n_tiles = tiles(batch->kv_len[s] + last + 1)};
    }
  }
  qsort(prefill, (size_t)p->n_prefill, sizeof *prefill, prefill_longer);
  p->n_bytes = (int32_t)((char *)(prefill + p->n_prefill) - (char *)p);
}
