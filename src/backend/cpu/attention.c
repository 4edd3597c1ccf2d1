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
  int32_t group, tile_rows;
};

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

/* The tile of an item; *segment is its segment when `split`. */
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

  size_t dim = (size_t)a->head_dim, q_head = head * (size_t)w->group, token0 = (size_t)batch->q_start[s];
  t->kv = a->kv;
  t->pages = batch->block_table + (size_t)s * (size_t)batch->max_blocks;
  t->q_stride = (size_t)(a->n_heads + 2 * a->n_kv_heads) * dim;
  t->out_stride = (size_t)a->n_heads * dim;
  t->q = (const float *)a->qkv + token0 * t->q_stride + q_head * dim;
  t->out = (float *)a->out + token0 * t->out_stride + q_head * dim;
  t->layer = a->layer;
  t->kv_head = (int32_t)head;
  t->group = w->group;
  t->row0 = (int32_t)tile * w->tile_rows;
  t->n_rows = QTR_MIN(n_rows - t->row0, w->tile_rows);
  t->kv_len = batch->kv_len[s];
  t->log2_scale = a->scale * 1.44269504088896341f;
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

/* Whole tiles: all segments in order. */
static void run_tiles(void *arg, size_t begin, size_t end, int thread) {
  const struct work *w = arg;
  struct thread_scratch *s = qtr_cpu_thread_scratch(w->c, thread);
  size_t stride = qtr_att_stride((size_t)w->args->head_dim), segment;
  for (size_t item = begin; item < end; item++) {
    struct qtr_att_tile t;
    find_item(w, item, false, &s->cursor, &t, &segment);
    int32_t n_keys = tile_keys(&t);
    w->kernel->prepare(&t, s->kernel);
    if (n_keys <= QTR_ATT_SEGMENT) {
      w->kernel->segment(&t, 0, n_keys, &s->part, s->kernel);
      write_out(&t, &s->part);
      continue;
    }
    state_clear(&s->total, (size_t)t.n_rows, stride);
    for (int32_t key = 0; key < n_keys; key += QTR_ATT_SEGMENT) {
      w->kernel->segment(&t, key, QTR_MIN(key + QTR_ATT_SEGMENT, n_keys), &s->part, s->kernel);
      state_merge(&s->total, &s->part, (size_t)t.n_rows, stride);
    }
    write_out(&t, &s->total);
  }
}

static void place_partial(const struct work *w, size_t item, struct qtr_att_state *state) {
  size_t dim = (size_t)w->args->head_dim;
  (void)state_place(state, (char *)w->args->kv->partial + item * state_bytes(dim, SPLIT_ROWS), dim, SPLIT_ROWS);
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
    int32_t key = (int32_t)segment * QTR_ATT_SEGMENT, n_keys = tile_keys(&t);
    if (key >= n_keys) continue;
    place_partial(w, item, &state);
    w->kernel->prepare(&t, s->kernel);
    w->kernel->segment(&t, key, QTR_MIN(key + QTR_ATT_SEGMENT, n_keys), &state, s->kernel);
  }
}

static void merge_segments(void *arg, size_t begin, size_t end, int thread) {
  const struct work *w = arg;
  struct thread_scratch *s = qtr_cpu_thread_scratch(w->c, thread);
  size_t stride = qtr_att_stride((size_t)w->args->head_dim);
  for (size_t item = begin; item < end; item++) {
    struct qtr_att_tile t;
    struct qtr_att_state part;
    size_t segment;
    find_item(w, item, true, &s->cursor, &t, &segment);
    if (segment != 0) continue; /* the first segment's item merges its row tile */
    state_clear(&s->total, (size_t)t.n_rows, stride);
    for (int32_t key = 0, n_keys = tile_keys(&t); key < n_keys; key += QTR_ATT_SEGMENT) {
      place_partial(w, item + (size_t)(key / QTR_ATT_SEGMENT), &part);
      state_merge(&s->total, &part, (size_t)t.n_rows, stride);
    }
    write_out(&t, &s->total);
  }
}

void qtr_cpu_attention(struct qtr_backend *b, const struct qtr_attention_args *args) {
  struct qtr_cpu *c = (struct qtr_cpu *)b;
  struct work w = {c, args, choose_kernel(c, args->kv->config.format), args->n_heads / args->n_kv_heads, QTR_ATT_ROWS};
  size_t wanted = 4 * (size_t)c->threads, n;
  scratch_place(c, (size_t)args->head_dim);
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
