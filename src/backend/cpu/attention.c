/* attention.c - attention of a step (spec C.5): cuts the batch into tiles (attention.h), hands them to the threads, merges
 * the segments of long rows and divides by the sums. The arithmetic inside a segment is the kernel's: attention_float.h,
 * here in portable C, and the files with a suffix. */
#include "backend/cpu/attention.h"

#include <math.h>
#include <string.h>

#include "base/checked.h"
#include "base/half.h"

/* ---- the kernel in portable C: four lanes in the compiler's vector type -------------------------------- */

enum { VW = 4, GEMM_VECTORS = 2 };
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));

static inline vf vf_load(const float *p) {
  vf x;
  memcpy(&x, p, sizeof x);
  return x;
}
static inline void vf_store(float *p, vf x) { memcpy(p, &x, sizeof x); }
static inline vf vf_set(float x) { return (vf){x, x, x, x}; }
static inline vf vf_add(vf a, vf b) { return a + b; }
static inline vf vf_sub(vf a, vf b) { return a - b; }
static inline vf vf_mul(vf a, vf b) { return a * b; }
static inline vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
static inline vf vf_fnma(vf a, vf b, vf c) { return c - a * b; }
static inline vf vf_select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
static inline vf vf_max(vf a, vf b) { return vf_select(a > b, a, b); }
static inline vf vf_scale2(vf p, vf t) { return (vf)((vi)p + ((vi)t << 23)); }
static inline vf vf_first(vf x, int32_t n, vf fill) { return vf_select((vi){0, 1, 2, 3} < (vi){n, n, n, n}, x, fill); }
static inline float vf_hmax(vf x) {
  float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
  return a > b ? a : b;
}
static inline float vf_hsum(vf x) { return (x[0] + x[1]) + (x[2] + x[3]); }
static inline vf vf_load_f16(const uint16_t *p) {
  return (vf){qtr_f16_to_f32(p[0]), qtr_f16_to_f32(p[1]), qtr_f16_to_f32(p[2]), qtr_f16_to_f32(p[3])};
}
static inline vi vi_load_u16(const uint8_t *p) {
  uint16_t x[VW];
  memcpy(x, p, sizeof x);
  return (vi){x[0], x[1], x[2], x[3]};
}
static inline vf vf_bits4(vi x, int shift) { return __builtin_convertvector(x >> shift & 15, vf); }
static inline vf vf_bits8(vi x, int shift) { return __builtin_convertvector(x >> shift & 255, vf); }
static inline vf vf_signed8(vi x, int shift) { return __builtin_convertvector(x << (24 - shift) >> 24, vf); }

#include "backend/cpu/attention_float.h"

static const struct qtr_att_kernel portable = {float_scratch_bytes, float_prepare, float_segment};

static const struct qtr_att_kernel *choose_kernel(const struct qtr_cpu *c, enum qtr_kv_format format) {
  const struct qtr_att_kernel *kernel = NULL;
  if (c->isa >= QTR_CPU_AMX && format != QTR_KV_F16) kernel = qtr_cpu_attention_amx(); /* halves are not exact in bf16 */
  if (kernel) return kernel;
  if (c->isa >= QTR_CPU_AVX512) {
    kernel = qtr_cpu_attention_avx512();
  } else if (c->isa >= QTR_CPU_AVX2) {
    kernel = qtr_cpu_attention_avx2();
  }
  return kernel ? kernel : &portable;
}

/* ---- scratch of a thread ------------------------------------------------------------------------------ */

/* Where a thread stands in the list of items: item numbers from `first` on belong to sequence `seq`. */
struct cursor {
  int32_t seq;
  size_t first;
};

struct thread_scratch {
  struct cursor cursor;
  struct qtr_att_state part, total;
  void *kernel;
};

#define ALIGN 64    /* everything in scratch starts on a cache line */
#define SPLITS 1024 /* most segments computed apart in one step, of at most SPLIT_ROWS rows */
#define SPLIT_ROWS 16

static size_t state_bytes(size_t head_dim, size_t rows) {
  return 2 * qtr_round_up(rows * sizeof(float), ALIGN) + rows * qtr_att_stride(head_dim) * sizeof(float);
}

static void *state_place(struct qtr_att_state *state, void *memory, size_t head_dim, size_t rows) {
  char *p = memory;
  state->max = (float *)(void *)p;
  p += qtr_round_up(rows * sizeof(float), ALIGN);
  state->sum = (float *)(void *)p;
  p += qtr_round_up(rows * sizeof(float), ALIGN);
  state->acc = (float *)(void *)p;
  return p + rows * qtr_att_stride(head_dim) * sizeof(float);
}

size_t qtr_cpu_attention_partial_bytes(size_t head_dim) { return SPLITS * state_bytes(head_dim, SPLIT_ROWS); }

size_t qtr_cpu_attention_scratch_bytes(const struct qtr_cpu *c, size_t head_dim) {
  size_t kernel = 0;
  for (int f = 0; f < QTR_N_KV_FORMATS; f++)
    kernel = QTR_MAX(kernel, choose_kernel(c, (enum qtr_kv_format)f)->scratch_bytes(head_dim));
  return qtr_round_up(sizeof(struct thread_scratch), ALIGN) + 2 * state_bytes(head_dim, QTR_ATT_ROWS) +
         qtr_round_up(kernel, ALIGN);
}

/* Each step anew: other operations use the same scratch between two calls. */
static void scratch_place(const struct qtr_cpu *c, size_t head_dim) {
  for (int i = 0; i < c->threads; i++) {
    struct thread_scratch *s = qtr_cpu_thread_scratch(c, i);
    void *p = (char *)s + qtr_round_up(sizeof *s, ALIGN);
    s->cursor = (struct cursor){0, 0};
    p = state_place(&s->part, p, head_dim, QTR_ATT_ROWS);
    s->kernel = state_place(&s->total, p, head_dim, QTR_ATT_ROWS);
  }
}

/* ---- the list of items ---------------------------------------------------------------------------------
 * Never written down: item number -> (sequence, tile, head, segment), tiles from the last (most keys) to the first. */

struct work {
  const struct qtr_cpu *c;
  const struct qtr_attention_args *args;
  const struct qtr_att_kernel *kernel;
  const struct qtr_cpu_kv_rows *rows; /* when pages are chosen */
  int32_t group, tile_rows;
};

/* Tokens of a sequence whose queries see chosen pages in retrieval heads: its last ones. */
static int32_t selecting_tokens(const struct work *w, int32_t s) {
  const struct qtr_kv_sparse *sparse = &w->args->kv->heads.sparse;
  const struct qtr_batch *batch = w->c->batch;
  if (sparse->budget == 0) return 0;
  int32_t first = QTR_MAX(qtr_batch_decode_start(batch, s), sparse->budget);
  int32_t n = batch->q_start[s + 1] - batch->q_start[s];
  return QTR_MIN(QTR_MAX(batch->kv_len[s] - first, -n) + n, n); /* the sum of lengths may be beyond int32 */
}
/* A sequence with one new token, as in decode, has its tile among the others, with a selection where there is one. Several
 * such tokens in one step, as when a sequence is computed again, each have their own, one after the other: run_replay. */
static bool is_replay(const struct work *w, int32_t s) {
  return w->c->batch->q_start[s + 1] - w->c->batch->q_start[s] > 1 && selecting_tokens(w, s) > 0;
}

static size_t seq_tiles(const struct qtr_batch *batch, int32_t s, int32_t group, int32_t tile_rows) {
  return qtr_ceil_div((size_t)(batch->q_start[s + 1] - batch->q_start[s]) * (size_t)group, (size_t)tile_rows);
}
static size_t seq_segments(const struct qtr_batch *batch, int32_t s) {
  return qtr_ceil_div((size_t)(batch->kv_len[s] + batch->q_start[s + 1] - batch->q_start[s]), QTR_ATT_SEGMENT);
}
static size_t seq_items(const struct work *w, int32_t s, bool split) {
  return seq_tiles(w->c->batch, s, w->group, w->tile_rows) * (size_t)w->args->n_kv_heads *
         (split ? seq_segments(w->c->batch, s) : 1);
}
static size_t count_items(const struct work *w, bool split) {
  size_t n = 0;
  for (int32_t s = 0; s < w->c->batch->n_seqs; s++) n += seq_items(w, s, split);
  return n;
}

/* What all tiles of one sequence and KV head share. */
static void describe_tile(const struct work *w, int32_t s, size_t head, struct qtr_att_tile *t) {
  const struct qtr_batch *batch = w->c->batch;
  const struct qtr_attention_args *a = w->args;
  enum qtr_head_class class = qtr_kv_head_class(&a->kv->heads, a->layer, (int32_t)head);
  size_t dim = (size_t)a->head_dim, q_head = head * (size_t)w->group, token0 = (size_t)batch->q_start[s];
  *t = (struct qtr_att_tile){.kv = a->kv,
                             .pages = qtr_batch_table(batch, class, s),
                             .q_stride = (size_t)(a->n_heads + 2 * a->n_kv_heads) * dim,
                             .out_stride = (size_t)a->n_heads * dim,
                             .layer = a->layer,
                             .kv_head = (int32_t)head,
                             .group = w->group,
                             .kv_len = batch->kv_len[s],
                             .log2_scale = a->scale * 1.44269504088896341f,
                             .decode_start = qtr_batch_decode_start(batch, s),
                             .sparse = class == QTR_HEAD_STREAMING ? &a->kv->heads.sparse : NULL};
  t->q = (const float *)a->qkv + token0 * t->q_stride + q_head * dim;
  t->out = (float *)a->out + token0 * t->out_stride + q_head * dim;
}

/* Pages that lie in the holes of all rows. */
static void find_skip(struct qtr_att_tile *t) {
  if (!t->sparse) return;
  int32_t from = 0, to = INT32_MAX;
  for (int32_t r = 0; r < t->n_rows; r += t->group - (t->row0 + r) % t->group) { /* a row of each token */
    int32_t hole_from, hole_to;
    qtr_att_hole(t, r, &hole_from, &hole_to);
    from = QTR_MAX(from, hole_from);
    to = QTR_MIN(to, hole_to);
  }
  if (to <= from) return;
  t->skip_from = (from + QTR_PAGE_TOKENS - 1) / QTR_PAGE_TOKENS * QTR_PAGE_TOKENS;
  t->skip_to = to / QTR_PAGE_TOKENS * QTR_PAGE_TOKENS;
}

/* The tile of an item; *segment is its segment when `split`. n_rows <= 0: there is nothing to do. */
static void find_item(const struct work *w, size_t item, bool split, struct cursor *cursor, struct qtr_att_tile *t,
                      size_t *segment) {
  const struct qtr_batch *batch = w->c->batch;
  const struct qtr_attention_args *a = w->args;
  if (item < cursor->first) *cursor = (struct cursor){0, 0};
  for (size_t n; item - cursor->first >= (n = seq_items(w, cursor->seq, split)); cursor->seq++) cursor->first += n;
  int32_t s = cursor->seq, n_rows = (batch->q_start[s + 1] - batch->q_start[s]) * w->group;
  size_t n_segments = split ? seq_segments(batch, s) : 1, index = item - cursor->first;
  *segment = index % n_segments;
  index /= n_segments;
  size_t head = index % (size_t)a->n_kv_heads,
         tile = seq_tiles(batch, s, w->group, w->tile_rows) - 1 - index / (size_t)a->n_kv_heads;

  bool selects = selecting_tokens(w, s) > 0;
  describe_tile(w, s, head, t);
  if (!t->sparse && is_replay(w, s)) n_rows -= selecting_tokens(w, s) * w->group;
  t->row0 = (int32_t)tile * w->tile_rows;
  t->n_rows = QTR_MIN(n_rows - t->row0, w->tile_rows);
  if (!t->sparse && selects && !is_replay(w, s))
    t->selection = qtr_cpu_kv_selection(a->kv, a->layer, t->kv_head, 0, batch->slot[s]);
  find_skip(t);
}

/* ---- results ------------------------------------------------------------------------------------------- */

/* 2^x, x <= 0, for the merging of segments: rare, so the library's. */
static float exp2_merge(float x) { return exp2f(x > QTR_ATT_FLOOR ? x : QTR_ATT_FLOOR); }

static void state_clear(const struct qtr_att_state *s, size_t rows, size_t stride) {
  for (size_t r = 0; r < rows; r++) {
    s->max[r] = QTR_ATT_LOWEST;
    s->sum[r] = 0;
  }
  memset(s->acc, 0, rows * stride * sizeof(float));
}

/* total = total and part together. Merging one part into nothing, or nothing into a total, changes no bits. */
static void state_merge(const struct qtr_att_state *total, const struct qtr_att_state *part, size_t rows, size_t stride) {
  for (size_t r = 0; r < rows; r++) {
    float max = total->max[r] > part->max[r] ? total->max[r] : part->max[r];
    float a = exp2_merge(total->max[r] - max), b = exp2_merge(part->max[r] - max);
    float *to = total->acc + r * stride;
    const float *from = part->acc + r * stride;
    total->max[r] = max;
    total->sum[r] = total->sum[r] * a + part->sum[r] * b;
    for (size_t d = 0; d < stride; d++) to[d] = to[d] * a + from[d] * b;
  }
}

static void write_out(const struct qtr_att_tile *t, const struct qtr_att_state *state) {
  size_t dim = (size_t)t->kv->config.head_dim, stride = qtr_att_stride(dim), group = (size_t)t->group;
  for (size_t r = 0; r < (size_t)t->n_rows; r++) {
    size_t row = (size_t)t->row0 + r;
    float *out = t->out + row / group * t->out_stride + row % group * dim, inverse = 1.0f / state->sum[r];
    for (size_t d = 0; d < dim; d++) out[d] = state->acc[r * stride + d] * inverse;
  }
}

/* ---- the operation -------------------------------------------------------------------------------------- */

static int32_t tile_keys(const struct qtr_att_tile *t) { return qtr_att_visible(t, t->n_rows - 1); }

/* Where heads choose each for itself, a tile with a selection falls into tiles of one row, else it is one. Member i. */
static int32_t n_members(const struct qtr_att_tile *t) {
  return t->selection && t->kv->heads.sparse.each_head ? t->n_rows : 1;
}
static struct qtr_att_tile member_tile(const struct qtr_att_tile *t, int32_t i, int32_t slot) {
  struct qtr_att_tile m = *t;
  if (!t->selection || !t->kv->heads.sparse.each_head) return m;
  int32_t g = (t->row0 + i) % t->group;
  m.q += (size_t)g * (size_t)t->kv->config.head_dim;
  m.out += (size_t)g * (size_t)t->kv->config.head_dim;
  m.row0 = (t->row0 + i) / t->group;
  m.n_rows = m.group = 1;
  m.selection = qtr_cpu_kv_selection(t->kv, t->layer, t->kv_head, g, slot);
  return m;
}

/* All segments in order. */
static void run_tile(const struct work *w, const struct qtr_att_tile *t, struct thread_scratch *s) {
  size_t stride = qtr_att_stride((size_t)w->args->head_dim);
  int32_t n_keys = tile_keys(t);
  w->kernel->prepare(t, s->kernel);
  if (n_keys <= QTR_ATT_SEGMENT) {
    w->kernel->segment(t, 0, n_keys, &s->part, s->kernel);
    write_out(t, &s->part);
    return;
  }
  state_clear(&s->total, (size_t)t->n_rows, stride);
  for (int32_t key = 0; key < n_keys; key += QTR_ATT_SEGMENT) {
    int32_t end = QTR_MIN(key + QTR_ATT_SEGMENT, n_keys);
    if (qtr_att_next(t, key, end) >= end) continue;
    w->kernel->segment(t, key, end, &s->part, s->kernel);
    state_merge(&s->total, &s->part, (size_t)t->n_rows, stride);
  }
  write_out(t, &s->total);
}

static void run_members(const struct work *w, const struct qtr_att_tile *t, int32_t seq, struct thread_scratch *s) {
  for (int32_t g = 0; g < n_members(t); g++) {
    struct qtr_att_tile m = member_tile(t, g, t->selection ? w->c->batch->slot[seq] : 0);
    run_tile(w, &m, s);
  }
}

static void run_tiles(void *arg, size_t begin, size_t end, int thread) {
  const struct work *w = arg;
  struct thread_scratch *s = qtr_cpu_thread_scratch(w->c, thread);
  size_t segment;
  for (size_t item = begin; item < end; item++) {
    struct qtr_att_tile t;
    find_item(w, item, false, &s->cursor, &t, &segment);
    if (t.n_rows > 0) run_members(w, &t, s->cursor.seq, s);
  }
}

static void place_partial(const struct work *w, size_t item, struct qtr_att_state *state) {
  size_t dim = (size_t)w->args->head_dim;
  (void)state_place(state, (char *)w->args->kv->partial + item * state_bytes(dim, SPLIT_ROWS), dim, SPLIT_ROWS);
}

/* Rows of a state from row g on. */
static struct qtr_att_state state_from(const struct qtr_att_state *state, int32_t g, size_t head_dim) {
  size_t r = (size_t)g;
  return (struct qtr_att_state){state->max + r, state->sum + r, state->acc + r * qtr_att_stride(head_dim)};
}

/* Few tiles with many keys: each segment apart. */
static void run_segments(void *arg, size_t begin, size_t end, int thread) {
  const struct work *w = arg;
  struct thread_scratch *s = qtr_cpu_thread_scratch(w->c, thread);
  for (size_t item = begin; item < end; item++) {
    struct qtr_att_tile t;
    struct qtr_att_state state;
    size_t segment;
    find_item(w, item, true, &s->cursor, &t, &segment);
    int32_t key = (int32_t)segment * QTR_ATT_SEGMENT, last = QTR_MIN(key + QTR_ATT_SEGMENT, tile_keys(&t));
    if (t.n_rows <= 0) continue;
    place_partial(w, item, &state);
    for (int32_t g = 0; g < n_members(&t); g++) {
      struct qtr_att_tile m = member_tile(&t, g, t.selection ? w->c->batch->slot[s->cursor.seq] : 0);
      if (qtr_att_next(&m, key, last) >= last) continue; /* not merged either */
      struct qtr_att_state rows = state_from(&state, g, (size_t)w->args->head_dim);
      w->kernel->prepare(&m, s->kernel);
      w->kernel->segment(&m, key, last, &rows, s->kernel);
    }
  }
}

static void merge_segments(void *arg, size_t begin, size_t end, int thread) {
  const struct work *w = arg;
  struct thread_scratch *s = qtr_cpu_thread_scratch(w->c, thread);
  size_t dim = (size_t)w->args->head_dim, stride = qtr_att_stride(dim);
  for (size_t item = begin; item < end; item++) {
    struct qtr_att_tile t;
    struct qtr_att_state part;
    size_t segment;
    find_item(w, item, true, &s->cursor, &t, &segment);
    if (segment != 0 || t.n_rows <= 0) continue; /* the first segment's item merges its row tile */
    for (int32_t g = 0; g < n_members(&t); g++) {
      struct qtr_att_tile m = member_tile(&t, g, t.selection ? w->c->batch->slot[s->cursor.seq] : 0);
      state_clear(&s->total, (size_t)m.n_rows, stride);
      for (int32_t key = 0, n_keys = tile_keys(&m); key < n_keys; key += QTR_ATT_SEGMENT) {
        int32_t last = QTR_MIN(key + QTR_ATT_SEGMENT, n_keys);
        if (qtr_att_next(&m, key, last) >= last) continue;
        place_partial(w, item + (size_t)(key / QTR_ATT_SEGMENT), &part);
        struct qtr_att_state rows = state_from(&part, g, dim);
        state_merge(&s->total, &rows, (size_t)m.n_rows, stride);
      }
      write_out(&m, &s->total);
    }
  }
}

/* ---- choosing pages ------------------------------------------------------------------------------------ */

size_t qtr_cpu_attention_choice_bytes(const struct qtr_cpu *c, const struct qtr_kv *kv) {
  size_t n_pages = (size_t)kv->heads.sparse.max_pages;
  return qtr_cpu_attention_scratch_bytes(c, (size_t)kv->config.head_dim) + n_pages * (sizeof(double) + sizeof(int32_t));
}

/* Heads [0, n_heads) of the tile's token, at `position`, choose together; q: the first one's query. The kernel's scratch
 * serves for the scores. */
static void choose_pages(const struct work *w, const struct qtr_att_tile *t, const float *q, int32_t n_heads,
                         int32_t position, void *scratch, struct qtr_selection *out) {
  const struct qtr_kv *kv = t->kv;
  size_t dim = (size_t)kv->config.head_dim;
  int32_t tail = position / QTR_PAGE_TOKENS, n_logical = QTR_PAGE_TOKENS / kv->heads.sparse.logical_tokens;
  double *score = scratch;
  int32_t *order = (int32_t *)(void *)(score + kv->heads.sparse.max_pages);
  for (int32_t page = 0; page < tail; page++) {
    double best = -INFINITY;
    for (int32_t i = 0; i < n_logical; i++) {
      const uint16_t *stats = qtr_cpu_kv_stats(kv, t->layer, t->pages[page], i, t->kv_head);
      for (int32_t h = 0; h < n_heads; h++) best = fmax(best, w->rows->bound(q + (size_t)h * dim, stats, dim));
    }
    score[page] = best;
  }
  qtr_sparse_choose(score, tail, qtr_sparse_limit(&kv->heads.sparse), order, out);
}

/* Token number `token` of the sequence chooses for all its heads over the tile's KV head, where that is due. */
static void renew_selection(const struct work *w, const struct qtr_att_tile *t, int32_t token, int32_t slot, void *scratch) {
  const struct qtr_kv_sparse *sparse = &t->kv->heads.sparse;
  int32_t position = t->kv_len + token;
  if (!qtr_sparse_renews(sparse, position, t->decode_start)) return;
  const float *q = t->q + (size_t)token * t->q_stride;
  for (int32_t g = 0; g < qtr_sparse_choosers(sparse); g++) {
    choose_pages(w, t, q + (size_t)g * (size_t)t->kv->config.head_dim, sparse->each_head ? 1 : w->group, position, scratch,
                 qtr_cpu_kv_selection(t->kv, t->layer, t->kv_head, g, slot));
  }
}

/* Item: a sequence and a KV head. Sequences of one token choose here, before the tiles run; */
static void run_choices(void *arg, size_t begin, size_t end, int thread) {
  const struct work *w = arg;
  struct thread_scratch *s = qtr_cpu_thread_scratch(w->c, thread);
  for (size_t item = begin; item < end; item++) {
    int32_t seq = (int32_t)(item / (size_t)w->args->n_kv_heads);
    struct qtr_att_tile t;
    describe_tile(w, seq, item % (size_t)w->args->n_kv_heads, &t);
    if (t.sparse || selecting_tokens(w, seq) == 0 || is_replay(w, seq)) continue;
    renew_selection(w, &t, 0, w->c->batch->slot[seq], s->kernel);
  }
}

/* those of several choose and attend token by token. */
static void run_replay(void *arg, size_t begin, size_t end, int thread) {
  const struct work *w = arg;
  struct thread_scratch *s = qtr_cpu_thread_scratch(w->c, thread);
  for (size_t item = begin; item < end; item++) {
    int32_t seq = (int32_t)(item / (size_t)w->args->n_kv_heads);
    struct qtr_att_tile t;
    describe_tile(w, seq, item % (size_t)w->args->n_kv_heads, &t);
    if (t.sparse || !is_replay(w, seq)) continue;
    int32_t n = w->c->batch->q_start[seq + 1] - w->c->batch->q_start[seq], slot = w->c->batch->slot[seq];
    t.selection = qtr_cpu_kv_selection(t.kv, t.layer, t.kv_head, 0, slot);
    for (int32_t token = n - selecting_tokens(w, seq); token < n; token++) {
      renew_selection(w, &t, token, slot, s->kernel);
      for (int32_t g = 0; g < t.group; g += t.n_rows) {
        t.row0 = token * t.group + g;
        t.n_rows = QTR_MIN(t.group - g, QTR_ATT_ROWS);
        run_members(w, &t, seq, s);
      }
    }
  }
}

/* Which of the two is needed. */
static void look_for_selections(const struct work *w, bool *choices, bool *replay) {
  *choices = *replay = false;
  for (int32_t s = 0; s < w->c->batch->n_seqs && w->rows; s++) {
    if (selecting_tokens(w, s) > 0) *(is_replay(w, s) ? replay : choices) = true;
  }
}

void qtr_cpu_attention(struct qtr_backend *b, const struct qtr_attention_args *args) {
  struct qtr_cpu *c = (struct qtr_cpu *)b;
  struct work w = {.c = c,
                   .args = args,
                   .kernel = choose_kernel(c, args->kv->config.format),
                   .rows = args->kv->heads.sparse.budget > 0 ? qtr_cpu_kv_choose_rows(c) : NULL,
                   .group = args->n_heads / args->n_kv_heads,
                   .tile_rows = QTR_ATT_ROWS};
  size_t wanted = 4 * (size_t)c->threads, n, n_heads = (size_t)c->batch->n_seqs * (size_t)args->n_kv_heads;
  bool choices, replay;
  scratch_place(c, (size_t)args->head_dim);
  look_for_selections(&w, &choices, &replay);
  if (choices) qtr_cpu_for(c, n_heads, 1, run_choices, &w);
  if (replay) qtr_cpu_for(c, n_heads, 1, run_replay, &w);
  while ((n = count_items(&w, false)) < wanted && w.tile_rows > SPLIT_ROWS) w.tile_rows /= 2;
  if (n < wanted) {
    size_t n_split = count_items(&w, true);
    if (n_split > n && n_split <= SPLITS) {
      qtr_cpu_for(c, n_split, 1, run_segments, &w);
      qtr_cpu_for(c, n_split, 8, merge_segments, &w);
      return;
    }
  }
  qtr_cpu_for(c, n, 1, run_tiles, &w);
}
