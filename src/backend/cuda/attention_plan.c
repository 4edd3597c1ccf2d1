/* attention_plan.c - cuts the attention of a step into entries (attention_plan.h), longest first, so that blocks that take
 * them in turn end together. Sequences with one new token and generated tokens that are computed again go to decode, the
 * others to prefill. */
#include "backend/cuda/attention_plan.h"

#include <stdlib.h>
#include <string.h>

#include "base/checked.h"

enum { BLOCKS_PER_SM = 3, STREAMING_ENTRIES = 2 /* of a decode token, when there are such heads */ };

static size_t slots_most(const struct qtr_cuda_plan_config *config, size_t n_seqs) {
  if (config->n_heads > QTR_MAX_SPLIT_HEADS) return 0;
  return n_seqs > QTR_MAX_SLOTS / QTR_MAX_SEGMENTS ? QTR_MAX_SLOTS : n_seqs * QTR_MAX_SEGMENTS;
}

static size_t group_of(const struct qtr_cuda_plan_config *config) { return (size_t)(config->n_heads / config->n_kv_heads); }

static bool streams(const struct qtr_cuda_plan_config *config) { return config->heads && config->heads->any_streaming; }
static bool has_budget(const struct qtr_cuda_plan_config *config) {
  return config->heads && config->heads->sparse.budget > 0;
}

size_t qtr_cuda_attention_plan_bytes(const struct qtr_cuda_plan_config *config, size_t max_tokens, size_t max_seqs) {
  size_t per_token = streams(config) ? STREAMING_ENTRIES : 1, slots = slots_most(config, max_seqs);
  size_t decode = (max_tokens + slots) * per_token, choices = 0;
  size_t prefill = max_tokens * group_of(config) / QTR_PREFILL_ROWS + max_seqs + 1, passes = 1;
  if (has_budget(config)) {
    passes += max_tokens - QTR_MIN(max_tokens, max_seqs); /* all but the first take a second token of a sequence */
    choices = qtr_cuda_select_plan_bytes(max_seqs) + (passes - 1) * qtr_cuda_select_plan_bytes(1) +
              max_tokens * (qtr_cuda_select_plan_bytes(2) - qtr_cuda_select_plan_bytes(1));
  }
  return passes * sizeof(struct qtr_attention_plan) + decode * sizeof(struct qtr_decode_entry) +
         prefill * sizeof(struct qtr_prefill_entry) + choices + max_seqs * sizeof(struct qtr_cuda_select_event);
}

size_t qtr_cuda_attention_scratch_bytes(const struct qtr_cuda_plan_config *config, size_t max_tokens, size_t max_seqs) {
  (void)max_tokens;
  size_t row = ((size_t)config->head_dim + 4) * sizeof(float);
  return QTR_COUNTER_BYTES + slots_most(config, max_seqs) * (size_t)config->n_heads * row;
}

struct qtr_cuda_select_config qtr_cuda_select_config_of(const struct qtr_kv_heads *heads, int32_t head_dim, int32_t n_sms) {
  const struct qtr_kv_sparse *s = &heads->sparse;
  return (struct qtr_cuda_select_config){.n_kv_heads = heads->n_kv_heads,
                                         .group = s->group,
                                         .head_dim = head_dim,
                                         .logical_tokens = s->logical_tokens,
                                         .limit = qtr_sparse_limit(s),
                                         .each_head = s->each_head,
                                         .n_seqs = s->n_slots,
                                         .max_pages = s->max_pages,
                                         .n_sms = n_sms};
}

/* ---- what a token sees ---------------------------------------------------------------------------------- */

static int32_t tiles(int32_t n_tokens) { return (n_tokens + QTR_PAGE_TOKENS - 1) / QTR_PAGE_TOKENS; }

/* An entry for the whole of one token, before it is cut. */
static struct qtr_decode_entry entry_make(const struct qtr_cuda_plan_config *config, const struct qtr_batch *batch,
                                          int32_t s, int32_t token, enum qtr_head_class kind) {
  int32_t position = batch->kv_len[s] + token - batch->q_start[s], own = position / QTR_PAGE_TOKENS;
  struct qtr_decode_entry e = {.seq = s, .token = token, .n_keys = position + 1, .n_visits = own + 1, .list = -1};
  if (!config->heads) return e;
  const struct qtr_kv_sparse *sparse = &config->heads->sparse;
  int32_t start = qtr_batch_decode_start(batch, s);
  if (kind == QTR_HEAD_STREAMING) {
    qtr_window_hole(position < start ? &sparse->context : &sparse->decode, position, &e.hole_from, &e.hole_to);
    int32_t sink = tiles(e.hole_from), local = e.hole_to / QTR_PAGE_TOKENS;
    if (local > sink) e.n_first = sink, e.skip = local - sink;
  } else if (qtr_sparse_selects(sparse, position, start)) {
    int32_t tail = qtr_sparse_chosen_at(sparse, position, start) / QTR_PAGE_TOKENS;
    e.n_first = QTR_MIN(tail, qtr_sparse_limit(sparse) - 1);
    e.skip = tail - e.n_first;
    e.list = batch->slot ? batch->slot[s] : 0;
  }
  e.n_visits -= e.skip;
  e.n_keys -= e.skip * QTR_PAGE_TOKENS;
  if (e.hole_to > 0) e.hole_to -= e.skip * QTR_PAGE_TOKENS; /* pages left out are in the hole: what is left ends later */
  return e;
}

static int32_t segment_of(const struct qtr_decode_entry *e) {
  int32_t n = e->n_visits <= QTR_WHOLE_TILES ? QTR_WHOLE_TILES : e->list >= 0 ? QTR_CHOSEN_TILES : QTR_SEGMENT_TILES;
  while ((e->n_visits + n - 1) / n > QTR_MAX_SEGMENTS) n *= 2;
  return n;
}

/* ---- decode ------------------------------------------------------------------------------------------- */

static int decode_longer(const void *a, const void *b) {
  const struct qtr_decode_entry *x = a, *y = b;
  int32_t n = QTR_MIN(x->n_segments * x->segment_tiles, x->n_visits - x->segment * x->segment_tiles);
  int32_t m = QTR_MIN(y->n_segments * y->segment_tiles, y->n_visits - y->segment * y->segment_tiles);
  if (n != m) return (n < m) - (n > m);
  return x->token != y->token ? (x->token > y->token) - (x->token < y->token)
                              : (x->segment > y->segment) - (x->segment < y->segment);
}

static int prefill_longer(const void *a, const void *b) {
  const struct qtr_prefill_entry *x = a, *y = b;
  if (x->n_tiles != y->n_tiles) return (x->n_tiles < y->n_tiles) - (x->n_tiles > y->n_tiles);
  return x->seq != y->seq ? (x->seq > y->seq) - (x->seq < y->seq) : (x->row > y->row) - (x->row < y->row);
}

/* Does a token of the batch go to decode? */
static bool decodes(const struct qtr_cuda_plan_config *config, const struct qtr_batch *batch, int32_t s, int32_t token) {
  int32_t first = batch->q_start[s], n = batch->q_start[s + 1] - first;
  if (config->one_kernel && !config->heads) return false;
  if (n == 1 || (config->heads && !config->has_prefill)) return true;
  return batch->kv_len[s] + token - first >= qtr_batch_decode_start(batch, s);
}

/* Cuts the n entries at `entry` and puts them in order; returns how many they are then. */
static int32_t cut(const struct qtr_cuda_plan_config *config, struct qtr_attention_plan *p, struct qtr_decode_entry *entry,
                   int32_t n, size_t n_slots) {
  bool each_head = config->heads && config->heads->sparse.each_head;
  size_t pairs = (size_t)config->n_kv_heads * (size_t)qtr_decode_head_blocks((int32_t)group_of(config), each_head), all = 0,
         longest = 0;
  for (int32_t i = 0; i < n; i++) {
    all += (size_t)entry[i].n_visits * pairs;
    longest = QTR_MAX(longest, (size_t)entry[i].n_visits);
  }
  /* Splitting costs writing and reading parts. Sequences of about one length stay whole where that keeps the GPU busy; else
   * what is longer than a share (half of one if the last round of blocks would be rather empty) is split. */
  size_t blocks = (size_t)config->n_sms * BLOCKS_PER_SM, items = (size_t)n * pairs, rounds = (items + blocks - 1) / blocks;
  size_t share = all / blocks / (items * 10 >= rounds * blocks * 8 || rounds > 4 ? 1 : 2);
  if (items * 2 >= (size_t)config->n_sms * 3 && longest * items * 10 <= all * 11) share = longest;
  int32_t n_all = n;
  for (int32_t i = 0; i < n; i++) {
    struct qtr_decode_entry *e = &entry[i];
    e->segment_tiles = segment_of(e);
    e->n_segments = e->all_segments = (e->n_visits + e->segment_tiles - 1) / e->segment_tiles;
    e->slot = -1;
    int32_t parts = e->n_segments;
    if (parts == 1 || (size_t)e->n_visits <= share || (size_t)(p->n_slots + parts) > n_slots) continue;
    e->slot = p->n_slots;
    e->n_segments = 1;
    p->n_slots += parts;
    for (int32_t k = 1; k < parts; k++) {
      entry[n_all] = *e;
      entry[n_all++].segment = k;
    }
  }
  qsort(entry, (size_t)n_all, sizeof *entry, decode_longer);
  return n_all;
}

/* ---- passes ------------------------------------------------------------------------------------------ */

/* The tokens that decode takes, one by one, each with the pass it is in: that of the choice that it reads, or 0. A
 * sequence's choice begins a new pass if tokens of an earlier choice come before it in the step. */
struct walk {
  int32_t seq, token, pass;
  bool renews;     /* pages are chosen for this token */
  int32_t readers; /* tokens of the sequence so far that read the choice of its pass */
};

static bool walk_next(const struct qtr_cuda_plan_config *config, const struct qtr_batch *batch, struct walk *w) {
  for (w->token++; w->seq < batch->n_seqs; w->token++) {
    if (w->token == batch->q_start[w->seq + 1]) {
      w->token--; /* the next sequence begins with it */
      w->seq++;
      w->pass = w->readers = 0;
      continue;
    }
    if (!decodes(config, batch, w->seq, w->token)) continue;
    w->renews = false;
    if (!has_budget(config)) return true;
    const struct qtr_kv_sparse *sparse = &config->heads->sparse;
    int32_t position = batch->kv_len[w->seq] + w->token - batch->q_start[w->seq];
    int32_t start = qtr_batch_decode_start(batch, w->seq);
    if (!qtr_sparse_selects(sparse, position, start)) return true;
    w->renews = qtr_sparse_renews(sparse, position, start);
    if (w->renews && w->readers > 0) w->pass++, w->readers = 0;
    w->readers++;
    return true;
  }
  return false;
}
static struct walk walk_begin(const struct qtr_batch *batch) { return (struct walk){.token = batch->q_start[0] - 1}; }

/* The decode entries of a pass; those of streaming heads, of all tokens, in the first one. */
static void pass_decode(const struct qtr_cuda_plan_config *config, const struct qtr_batch *batch, int32_t pass,
                        struct qtr_attention_plan *p, bool only) {
  struct qtr_decode_entry *entry = qtr_plan_decode(p);
  size_t n_slots = only ? slots_most(config, (size_t)batch->n_seqs) : 0;
  for (int kind = QTR_HEAD_RETRIEVAL; kind <= QTR_HEAD_STREAMING; kind++) {
    int32_t n = 0;
    if (kind == QTR_HEAD_STREAMING && (pass > 0 || !streams(config))) break;
    for (struct walk w = walk_begin(batch); walk_next(config, batch, &w);) {
      if (kind == QTR_HEAD_RETRIEVAL && w.pass != pass) continue;
      entry[n++] = entry_make(config, batch, w.seq, w.token, (enum qtr_head_class)kind);
    }
    n = cut(config, p, entry, n, n_slots);
    *(kind == QTR_HEAD_RETRIEVAL ? &p->n_decode : &p->n_streaming) = n;
    entry += n;
  }
}

/* The choices of a pass; choice NULL: only counts them. */
static int32_t pass_choices(const struct qtr_cuda_plan_config *config, const struct qtr_batch *batch, int32_t pass,
                            struct qtr_cuda_select_event *choice) {
  int32_t n = 0;
  for (struct walk w = walk_begin(batch); walk_next(config, batch, &w);) {
    int32_t own = (batch->kv_len[w.seq] + w.token - batch->q_start[w.seq]) / QTR_PAGE_TOKENS;
    if (w.pass != pass || !w.renews || own == 0) continue;
    if (choice) choice[n] = (struct qtr_cuda_select_event){w.seq, w.token, own, batch->slot ? batch->slot[w.seq] : 0};
    n++;
  }
  return n;
}

static int32_t pass_prefill(const struct qtr_cuda_plan_config *config, const struct qtr_batch *batch,
                            struct qtr_prefill_entry *prefill) {
  int32_t group = (int32_t)group_of(config), n_entries = 0;
  for (int32_t s = 0; s < batch->n_seqs; s++) {
    int32_t first = batch->q_start[s], n_q = batch->q_start[s + 1] - first;
    while (n_q > 0 && decodes(config, batch, s, first + n_q - 1)) n_q--; /* generated tokens come last */
    int32_t n_rows = n_q * group;
    for (int32_t row = 0; row < n_rows; row += QTR_PREFILL_ROWS) {
      int32_t n = QTR_MIN(n_rows - row, (int32_t)QTR_PREFILL_ROWS), last = (row + n - 1) / group;
      prefill[n_entries++] = (struct qtr_prefill_entry){.seq = s,
                                                        .first_token = first,
                                                        .kv_len = batch->kv_len[s],
                                                        .row = row,
                                                        .n_rows = n,
                                                        .n_tiles = tiles(batch->kv_len[s] + last + 1)};
    }
  }
  qsort(prefill, (size_t)n_entries, sizeof *prefill, prefill_longer);
  return n_entries;
}

/* Bytes of the room for the choices of a pass: of the first one, which graphs capture, the same for all batches of a shape.
 */
static size_t choices_bytes(const struct qtr_cuda_plan_config *config, const struct qtr_batch *batch, int32_t pass) {
  if (!has_budget(config)) return 0;
  int32_t n = pass == 0 ? batch->n_seqs : pass_choices(config, batch, pass, NULL);
  return qtr_cuda_select_plan_bytes((size_t)n);
}

bool qtr_cuda_attention_plan(const struct qtr_cuda_plan_config *config, const struct qtr_batch *batch, void *plan) {
  struct qtr_attention_plan *p = plan;
  int32_t last = 0;
  bool chooses = false;
  for (struct walk w = walk_begin(batch); walk_next(config, batch, &w);) last = QTR_MAX(last, w.pass);
  for (int32_t pass = 0; pass <= last; pass++) {
    memset(p, 0, sizeof *p);
    p->decode_offset = (int32_t)(sizeof *p + choices_bytes(config, batch, pass));
    pass_decode(config, batch, pass, p, last == 0);
    struct qtr_prefill_entry *prefill = (struct qtr_prefill_entry *)(qtr_plan_decode(p) + p->n_decode + p->n_streaming);
    p->prefill_offset = (int32_t)((char *)prefill - (char *)p);
    if (pass == 0) p->n_prefill = pass_prefill(config, batch, prefill);
    char *end = (char *)(prefill + p->n_prefill);
    if (has_budget(config)) {
      struct qtr_cuda_select_config select = qtr_cuda_select_config_of(config->heads, config->head_dim, config->n_sms);
      struct qtr_cuda_select_event *choice = (struct qtr_cuda_select_event *)(void *)end; /* behind all, for now */
      p->n_choices = pass_choices(config, batch, pass, choice);
      qtr_cuda_select_plan(&select, choice, (size_t)p->n_choices, p + 1);
    }
    chooses = chooses || p->n_choices > 0;
    p->n_bytes = (int32_t)(end - (char *)p);
    p->next = pass < last ? p->n_bytes : 0;
    p = (struct qtr_attention_plan *)(void *)end;
  }
  return chooses;
}
