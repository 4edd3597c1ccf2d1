/* check_attention.c - RoPE, KV writes and attention, dense and sparse, of a device against the reference, on ragged batches
 * over a cache whose other slots hold large garbage.
 *
 * KV: V is stored with the reference's bits. RoPE may contract a multiplication and an addition, so rotated values may
 * differ by 2^-23 of the terms; K must then be stored with the bits that the reference gives for the device's own rotated
 * values. Attention is compared over caches with the same bits (frequencies 0: RoPE is the identity). An error d(t) of a
 * score moves its weight p(t) by as much relatively, and so the result by p(t) d(t) |v(t) - result|, as does rounding of
 * p(t): summed over t, that is the tolerance, plus rounding of v, plus that of the sum over tokens. The latter is the worst
 * case, not a square root: beside one dominant token the others' terms are near half a unit of the sum, and all of them
 * round the same way. Each sequence must have the same bits alone, and when its tokens come in two steps.
 *
 * Sparse: statistics and the pages chosen must be the reference's, and those that the definition gives (backend.h). Earlier
 * choices are made as in an engine, by the query at which they were due. */
#include <stdio.h>

#include "backend/common/sparse.h"
#include "ops.h"

#define EPS 0x1p-23

struct cache {
  const struct op_entry *entry;
  enum qtr_kv_format format;
  struct op_batch b;
  int32_t n_pages;
  struct qtr_kv *ref, *dev;
  float *qkv;         /* (n_tokens, width) of the final step, before RoPE */
  float *inv_freq;    /* (head_dim / 2) */
  float **history;    /* (n_seqs) each (kv_len, width): what the earlier steps wrote */
  uint8_t *streaming; /* (N_LAYERS, n_kv_heads) */
  struct qtr_kv_sparse sparse;
};

enum { N_LAYERS = 2, LAYER = 1, CHECKS = OP_CHECK | OP_CHECK_LONG };

static size_t width_of(const struct op_entry *e) { return (size_t)(e->n_heads + 2 * e->n_kv_heads) * (size_t)e->head_dim; }

/* One step that only writes K and V; qkv host (n_tokens, width), on return as the device left it. */
static void step_write(const struct op_device *d, struct qtr_kv *kv, const struct op_entry *e, int32_t layer,
                       const struct qtr_batch *batch, const float *inv_freq, float *qkv) {
  size_t n = (size_t)batch->n_tokens * width_of(e);
  void *device = op_upload(d, qkv, n);
  op_step_begin(d, batch, inv_freq, e->head_dim / 2);
  d->ops->rope_kv_write(d->b, &(struct qtr_rope_kv_args){.qkv = device,
                                                         .kv = kv,
                                                         .layer = layer,
                                                         .n_heads = e->n_heads,
                                                         .n_kv_heads = e->n_kv_heads,
                                                         .head_dim = e->head_dim});
  op_download(d, device, d->caps.act_dtype, n, qkv);
  op_step_end(d);
  d->ops->free(d->b, device);
}

/* The same on both devices: the reference stores what the device made of q and k. */
static void step_write_both(const struct op_check *c, struct cache *k, int32_t layer, const struct qtr_batch *batch,
                            float *qkv) {
  float *zeros = op_malloc((size_t)k->entry->head_dim, sizeof *zeros);
  step_write(&c->dev, k->dev, k->entry, layer, batch, k->inv_freq, qkv);
  step_write(&c->ref, k->ref, k->entry, layer, batch, zeros, qkv);
  free(zeros);
}

/* Values of K and V: channels of different sizes, some rows constant or nearly so, some of one sign. */
static void fill_qkv(struct op_rng *rng, const struct op_entry *e, size_t n_tokens, float size, float *qkv) {
  size_t dim = (size_t)e->head_dim, heads = width_of(e) / dim;
  for (size_t i = 0; i < n_tokens * heads; i++) {
    float *x = qkv + i * dim, offset = 0, scale = size;
    size_t kind = op_rng_below(rng, 16);
    if (kind == 0) offset = 5 * size;
    if (kind == 1) offset = -200 * size;
    if (kind == 2) scale = 0, offset = size;
    if (kind == 3) scale = 0;
    if (kind == 4) scale = 1e-6f;
    if (i % heads < (size_t)e->n_heads) scale = 1, offset = 0; /* queries */
    for (size_t j = 0; j < dim; j++) x[j] = offset + scale * op_rng_normal(rng);
    if (kind == 5) x[op_rng_below(rng, dim)] *= 20;
  }
}

static void cache_make(struct op_check *c, const struct op_entry *e, enum qtr_kv_format format, const struct op_pattern *p,
                       bool rope, struct cache *k) {
  memset(k, 0, sizeof *k);
  k->entry = e;
  k->format = format;
  op_batch_make(&c->rng, p, &k->n_pages, &k->b);
  k->inv_freq = op_malloc((size_t)e->head_dim / 2, sizeof *k->inv_freq);
  for (int32_t i = 0; i < e->head_dim / 2 && rope; i++) k->inv_freq[i] = powf(10000, -2 * (float)i / (float)e->head_dim);
  float static_scale[2 * N_LAYERS];
  for (size_t i = 0; i < 2 * N_LAYERS; i++) static_scale[i] = 0.02f + 0.05f * op_rng_uniform(&c->rng);
  struct qtr_kv_config config = {.format = format,
                                 .n_layers = N_LAYERS,
                                 .n_kv_heads = e->n_kv_heads,
                                 .head_dim = e->head_dim,
                                 .n_pages = k->n_pages,
                                 .static_scale = static_scale};
  k->streaming = op_malloc((size_t)(N_LAYERS * e->n_kv_heads), 1);
  if (e->kind == OP_SPARSE) {
    op_sparse_fill(e, N_LAYERS, k->b.batch.n_seqs, k->b.batch.max_blocks, k->streaming, &k->sparse);
    op_batch_sparse(&c->rng, p, k->n_pages, &k->sparse, &k->b);
    config.sparse = &k->sparse;
    config.n_stream_pages = e->n_streaming > 0 ? k->n_pages : 0;
  }
  struct qtr_error err = {0};
  op_must(c->ref.ops->kv_create(c->ref.b, &config, &k->ref, &err), &err);
  op_must(c->dev.ops->kv_create(c->dev.b, &config, &k->dev, &err), &err);

  /* Garbage in every slot of both layers, a page a step. */
  size_t width = width_of(e);
  float *qkv = op_malloc(QTR_PAGE_TOKENS * width, sizeof *qkv);
  for (int32_t page = 0; page < k->n_pages; page++) {
    struct op_batch b;
    op_batch_single(&page, 1, 0, QTR_PAGE_TOKENS, &b);
    for (int32_t layer = 0; layer < N_LAYERS; layer++) {
      fill_qkv(&c->rng, e, QTR_PAGE_TOKENS, 300, qkv);
      step_write_both(c, k, layer, &b.batch, qkv);
    }
    op_batch_free(&b);
  }
  free(qkv);
  const struct qtr_batch *batch = &k->b.batch;
  k->history = op_malloc((size_t)batch->n_seqs, sizeof *k->history);
  for (int32_t s = 0; s < batch->n_seqs; s++) {
    int32_t n = batch->kv_len[s];
    if (n == 0) continue;
    struct op_batch b;
    op_batch_part(&k->b, s, 0, n, 0, &k->sparse, &b);
    k->history[s] = op_malloc((size_t)n * width, sizeof **k->history);
    fill_qkv(&c->rng, e, (size_t)n, 1, k->history[s]);
    step_write_both(c, k, LAYER, &b.batch, k->history[s]);
    op_batch_free(&b);
  }
  k->qkv = op_malloc((size_t)batch->n_tokens * width, sizeof *k->qkv);
  fill_qkv(&c->rng, e, (size_t)batch->n_tokens, 1, k->qkv);
}

static void cache_free(const struct op_check *c, struct cache *k) {
  c->ref.ops->kv_free(c->ref.b, k->ref);
  c->dev.ops->kv_free(c->dev.b, k->dev);
  for (int32_t s = 0; s < k->b.batch.n_seqs; s++) free(k->history[s]);
  free(k->history);
  free(k->qkv);
  free(k->inv_freq);
  free(k->streaming);
  op_batch_free(&k->b);
}

static bool streams(const struct cache *k, int32_t layer, int32_t head) {
  return k->streaming[layer * k->entry->n_kv_heads + head];
}

/* Every slot of every page of both layers; of a sparse cache one of eight. */
static void compare_cache(const struct op_check *c, const struct cache *k, struct op_diff *diff) {
  size_t dim = (size_t)k->entry->head_dim;
  uint16_t *a = op_malloc(dim, sizeof *a), *b = op_malloc(dim, sizeof *b);
  float scale[2], zero[2];
  for (int32_t i = 0; i < N_LAYERS * 2 * k->n_pages * QTR_PAGE_TOKENS; i++) {
    int32_t slot = i % QTR_PAGE_TOKENS, page = i / QTR_PAGE_TOKENS % k->n_pages, pool = i / QTR_PAGE_TOKENS / k->n_pages;
    for (int32_t h = 0; h < k->entry->n_kv_heads; h++) {
      if (k->entry->kind == OP_SPARSE && (5 * slot + 3 * h + page) % 8) continue; /* kv_write checks the layout */
      c->ref.ops->kv_read(c->ref.b, k->ref, pool / 2, pool % 2, page, slot, h, a, &scale[0], &zero[0]);
      c->dev.ops->kv_read(c->dev.b, k->dev, pool / 2, pool % 2, page, slot, h, b, &scale[1], &zero[1]);
      diff->n += dim + 2;
      for (size_t j = 0; j < dim && k->format == QTR_KV_F16; j++) { /* a rotation by nothing may lose the sign of a zero */
        if (a[j] == 0x8000) a[j] = 0;
        if (b[j] == 0x8000) b[j] = 0;
      }
      if (memcmp(a, b, dim * sizeof *a) || scale[0] != scale[1] || zero[0] != zero[1]) {
        size_t at = 0;
        while (at + 1 < dim && a[at] == b[at]) at++;
        op_bad(
            diff,
            "layer %d %c page %d slot %d head %d: code %zu is %u, expected %u; scale %g, expected %g; zero %g, expected %g",
            pool / 2, pool % 2 ? 'V' : 'K', page, slot, h, at, b[at], a[at], (double)scale[1], (double)scale[0],
            (double)zero[1], (double)zero[0]);
      }
    }
  }
  free(a);
  free(b);
}

void op_check_kv_write(struct op_check *c, const struct op_entry *e, enum qtr_kv_format format, struct op_diff *diff) {
  size_t width = width_of(e), dim = (size_t)e->head_dim, rotated = (size_t)(e->n_heads + e->n_kv_heads) * dim;
  for (size_t i = 0; i < n_op_patterns; i++) {
    if (!(op_patterns[i].use & e->use & CHECKS)) continue;
    struct cache k;
    cache_make(c, e, format, &op_patterns[i], true, &k);
    size_t n = (size_t)k.b.batch.n_tokens * width;
    float *expected = op_malloc(n, sizeof *expected), *before = op_malloc(n, sizeof *before);
    void *rounded = op_upload(&c->dev, k.qkv, n);
    op_download(&c->dev, rounded, c->dev.caps.act_dtype, n, k.qkv);
    c->dev.ops->free(c->dev.b, rounded);
    memcpy(expected, k.qkv, n * sizeof *expected);
    memcpy(before, k.qkv, n * sizeof *before);
    step_write(&c->ref, k.ref, e, LAYER, &k.b.batch, k.inv_freq, expected);
    step_write_both(c, &k, LAYER, &k.b.batch, k.qkv);
    double act = c->dev.caps.act_dtype == QTR_DTYPE_F32 ? 0 : 0x1p-11;
    for (size_t j = 0; j < n; j++) { /* q and k turned, v as it was */
      size_t row = j / dim * dim, in = j % dim, pair = row + (in + dim / 2) % dim;
      bool is_v = j % width >= rotated;
      double terms = is_v ? 0 : fabs((double)before[j]) + fabs((double)before[pair]), tiny = is_v ? 0 : act * 0x1p-14;
      op_compare(diff, (double)k.qkv[j], (double)expected[j], (EPS + act) * terms + tiny, op_patterns[i].name, j / width,
                 j % width);
    }
    compare_cache(c, &k, diff);
    free(expected);
    free(before);
    cache_free(c, &k);
  }
}

/* The final step of a cache, or one like it: writes K and V of qkv (host, n_tokens rows) and attends. out: host (n_tokens +
 * 1, n_heads * head_dim), the last row a guard. */
static void step_attend(const struct op_device *d, struct qtr_kv *kv, const struct cache *k, const struct qtr_batch *batch,
                        const float *qkv, float *out) {
  const struct op_entry *e = k->entry;
  size_t n = (size_t)batch->n_tokens, n_out = (n + 1) * (size_t)(e->n_heads * e->head_dim);
  void *device = op_upload(d, qkv, n * width_of(e));
  for (size_t i = 0; i < n_out; i++) out[i] = NAN;
  void *result = op_upload(d, out, n_out);
  op_step_begin(d, batch, k->inv_freq, e->head_dim / 2);
  d->ops->rope_kv_write(d->b, &(struct qtr_rope_kv_args){.qkv = device,
                                                         .kv = kv,
                                                         .layer = LAYER,
                                                         .n_heads = e->n_heads,
                                                         .n_kv_heads = e->n_kv_heads,
                                                         .head_dim = e->head_dim});
  d->ops->attention(d->b, &(struct qtr_attention_args){.qkv = device,
                                                       .kv = kv,
                                                       .out = result,
                                                       .layer = LAYER,
                                                       .scale = 1 / sqrtf((float)e->head_dim),
                                                       .n_heads = e->n_heads,
                                                       .n_kv_heads = e->n_kv_heads,
                                                       .head_dim = e->head_dim});
  op_download(d, result, d->caps.act_dtype, n_out, out);
  op_step_end(d);
  d->ops->free(d->b, device);
  d->ops->free(d->b, result);
}

/* ---- sparse attention --------------------------------------------------------------------------------------------------
 */

static const float *row_of(const struct cache *k, int32_t s, int32_t position) {
  int32_t kv_len = k->b.kv_len[s];
  const float *from = position < kv_len ? k->history[s] + (size_t)position * width_of(k->entry)
                                        : k->qkv + (size_t)(k->b.q_start[s] + position - kv_len) * width_of(k->entry);
  return from;
}

/* The position whose query chose the pages that the query at `position` sees; -1: it sees all. */
static int32_t choice_position(const struct cache *k, int32_t s, int32_t position) {
  if (k->sparse.budget == 0 || position < k->b.decode_start[s] || position < k->sparse.budget) return -1;
  int32_t first = QTR_MAX(k->b.decode_start[s], k->sparse.budget), at = position;
  while (at > first && (at + 1) % k->sparse.interval) at--;
  return at;
}

/* The choice of query head h at `position`, from the reference's statistics: complete for the pages before its own. */
static struct qtr_selection *choose(const struct op_check *c, const struct cache *k, int32_t s, int32_t position,
                                    int32_t h) {
  const struct op_entry *e = k->entry;
  const int32_t *table = k->b.block_table + (size_t)s * (size_t)k->b.batch.max_blocks;
  int32_t tail = position / QTR_PAGE_TOKENS, group = e->n_heads / e->n_kv_heads, head = h / group, dim = e->head_dim,
          from = k->sparse.each_head ? h : head * group, n = k->sparse.each_head ? 1 : group;
  double *score = op_malloc((size_t)tail, sizeof *score);
  int32_t *order = op_malloc((size_t)tail, sizeof *order);
  float *max = op_malloc((size_t)dim, sizeof *max), *min = op_malloc((size_t)dim, sizeof *min);
  for (int32_t page = 0; page < tail; page++) {
    score[page] = -INFINITY;
    for (int32_t i = 0; i < QTR_PAGE_TOKENS / k->sparse.logical_tokens; i++) {
      c->ref.ops->stats_read(c->ref.b, k->ref, LAYER, table[page], i, head, max, min);
      for (int32_t j = from; j < from + n; j++) {
        const float *q = row_of(k, s, position) + (size_t)j * (size_t)dim;
        double sum = 0;
        for (int32_t x = 0; x < dim; x++) sum += fmax((double)q[x] * (double)max[x], (double)q[x] * (double)min[x]);
        score[page] = fmax(score[page], sum);
      }
    }
  }
  struct qtr_selection *choice = op_malloc(qtr_sparse_selection_ints(&k->sparse), sizeof(int32_t));
  qtr_sparse_choose(score, tail, qtr_sparse_limit(&k->sparse), order, choice);
  free(score);
  free(order);
  free(max);
  free(min);
  return choice;
}

/* hidden (n): the keys before or at the query's position that head h does not see. */
static void hide(const struct op_check *c, const struct cache *k, int32_t s, int32_t h, size_t n, bool *hidden) {
  int32_t p = (int32_t)n - 1, head = h / (k->entry->n_heads / k->entry->n_kv_heads);
  memset(hidden, 0, n * sizeof *hidden);
  if (k->entry->kind != OP_SPARSE) return;
  if (streams(k, LAYER, head)) {
    const struct qtr_kv_window *w = p < k->b.decode_start[s] ? &k->sparse.context : &k->sparse.decode;
    for (int32_t t = 0; t <= p; t++) hidden[t] = t >= w->sink && p - t >= w->local;
    return;
  }
  int32_t at = choice_position(k, s, p);
  if (at < 0) return;
  struct qtr_selection *choice = choose(c, k, s, at, h);
  for (int32_t t = 0; t < choice->tail * QTR_PAGE_TOKENS; t++) hidden[t] = true;
  for (int32_t i = 0; i < choice->n; i++)
    memset(hidden + (size_t)choice->page[i] * QTR_PAGE_TOKENS, 0, QTR_PAGE_TOKENS * sizeof *hidden);
  free(choice);
}

/* Statistics of every page, and what each head of each sequence has chosen last; slots are the batch's. */
static void compare_choices(const struct op_check *c, const struct cache *k, const char *what, struct op_diff *diff) {
  const struct op_entry *e = k->entry;
  if (k->sparse.budget == 0) return;
  size_t dim = (size_t)e->head_dim, room = qtr_sparse_selection_ints(&k->sparse);
  float *extremes = op_malloc(4 * dim, sizeof *extremes);
  for (int32_t i = 0; i < N_LAYERS * e->n_kv_heads; i++) {
    int32_t layer = i / e->n_kv_heads, head = i % e->n_kv_heads, per = QTR_PAGE_TOKENS / k->sparse.logical_tokens;
    for (int32_t j = 0; j < k->n_pages * per && !streams(k, layer, head); j++) {
      c->ref.ops->stats_read(c->ref.b, k->ref, layer, j / per, j % per, head, extremes, extremes + dim);
      c->dev.ops->stats_read(c->dev.b, k->dev, layer, j / per, j % per, head, extremes + 2 * dim, extremes + 3 * dim);
      for (size_t x = 0; x < 2 * dim; x++) {
        if (extremes[x] == extremes[x + 2 * dim]) continue;
        op_bad(diff, "%s: layer %d, KV head %d, page %d, logical page %d: %s of dim %zu is %.9g, expected %.9g", what, layer,
               head, j / per, j % per, x < dim ? "maximum" : "minimum", x % dim, (double)extremes[x + 2 * dim],
               (double)extremes[x]);
      }
      diff->n += 2 * dim;
    }
  }
  int32_t *page = op_malloc(2 * room, sizeof *page), n[2], tail[2];
  for (int32_t s = 0; s < k->b.batch.n_seqs; s++) {
    int32_t at = choice_position(k, s, k->b.kv_len[s] + k->b.q_start[s + 1] - k->b.q_start[s] - 1);
    for (int32_t h = 0; h < e->n_heads && at >= 0; h++) {
      if (streams(k, LAYER, h / (e->n_heads / e->n_kv_heads))) continue;
      c->ref.ops->selection_read(c->ref.b, k->ref, LAYER, h, k->b.slot[s], page, &n[0], &tail[0]);
      c->dev.ops->selection_read(c->dev.b, k->dev, LAYER, h, k->b.slot[s], page + room, &n[1], &tail[1]);
      struct qtr_selection *own = choose(c, k, s, at, h);
      for (int i = 0; i < 2; i++) {
        diff->n += (size_t)own->n;
        if (n[i] == own->n && tail[i] == own->tail &&
            memcmp(page + (size_t)i * room, own->page, (size_t)own->n * sizeof *page) == 0)
          continue;
        int32_t first = 0;
        while (first < QTR_MIN(n[i], own->n) && page[(size_t)i * room + (size_t)first] == own->page[first]) first++;
        op_bad(
            diff,
            "%s: %s: sequence %d, head %d, choice at %d: %d pages before page %d, expected %d before %d; number %d is %d, "
            "expected %d",
            what, i ? "device" : "reference", s, h, at, n[i], tail[i], own->n, own->tail, first,
            first < n[i] ? page[(size_t)i * room + (size_t)first] : -1, first < own->n ? own->page[first] : -1);
      }
      free(own);
    }
  }
  free(page);
  free(extremes);
}

/* ---- attention -----------------------------------------------------------------------------------------------------------
 */

/* K and V of one head of a sequence as stored, over its first n tokens: k, v (n, dim), largest magnitudes of each row (n);
 * v_code: of what a GPU multiplies with weights in fp16, codes * scale (zero points outside); v_scale: what it multiplies a
 * weight by before it rounds it. */
struct head {
  size_t n, dim;
  double *k, *v, *k_max, *v_max, *v_code, *v_scale, *weight, *error, v_all; /* v_all: the largest of v_max */
};

static struct head head_read(const struct op_check *c, const struct cache *k, enum qtr_kv_format format, int32_t s,
                             int32_t n, int32_t index) {
  const struct qtr_batch *batch = &k->b.batch;
  const int32_t *tables = streams(k, LAYER, index) ? k->b.stream_all : batch->block_table;
  const int32_t *table = tables + (size_t)s * (size_t)batch->max_blocks;
  size_t dim = (size_t)k->entry->head_dim, rows = (size_t)n;
  struct head h = {.n = rows,
                   .dim = dim,
                   .k = op_malloc(rows * dim, sizeof(double)),
                   .v = op_malloc(rows * dim, sizeof(double)),
                   .k_max = op_malloc(rows, sizeof(double)),
                   .v_max = op_malloc(rows, sizeof(double)),
                   .v_code = op_malloc(rows, sizeof(double)),
                   .v_scale = op_malloc(rows, sizeof(double)),
                   .weight = op_malloc(rows, sizeof(double)),
                   .error = op_malloc(rows, sizeof(double))};
  uint16_t *code = op_malloc(dim, sizeof *code);
  float scale, zero;
  for (size_t t = 0; t < rows; t++) {
    for (int is_v = 0; is_v < 2; is_v++) {
      double *to = (is_v ? h.v : h.k) + t * dim, max = 0;
      c->ref.ops->kv_read(c->ref.b, k->ref, LAYER, is_v, table[t / QTR_PAGE_TOKENS], (int32_t)(t % QTR_PAGE_TOKENS), index,
                          code, &scale, &zero);
      for (size_t i = 0; i < dim; i++) {
        to[i] = format == QTR_KV_F16           ? (double)qtr_f16_to_f32(code[i])
                : format == QTR_KV_INT8_STATIC ? (double)(int16_t)code[i] * (double)scale
                                               : ((double)code[i] - (double)zero) * (double)scale;
        max = fmax(max, fabs(to[i]));
      }
      *(is_v ? &h.v_max[t] : &h.k_max[t]) = max;
      if (is_v) {
        h.v_scale[t] = format == QTR_KV_F16 || format == QTR_KV_INT8_STATIC ? 1 : (double)scale;
        for (size_t i = 0; i < dim; i++) {
          double coded = format == QTR_KV_F16           ? fabs(to[i])
                         : format == QTR_KV_INT8_STATIC ? ((double)(int16_t)code[i] + 128) * (double)scale
                                                        : (double)code[i] * (double)scale;
          h.v_code[t] = fmax(h.v_code[t], coded);
        }
      }
    }
    h.v_all = fmax(h.v_all, h.v_max[t]);
  }
  free(code);
  return h;
}

static void head_free(struct head *h) {
  free(h->k);
  free(h->v);
  free(h->k_max);
  free(h->v_max);
  free(h->v_code);
  free(h->v_scale);
  free(h->weight);
  free(h->error);
}

/* Softmax weights of a query over those of the first n tokens that are not hidden, and of each score the error fp32 (and a q
 * with relative error `split`) may make, of Σ|q| max|k| scale: a few 2^-23, and of a sum in any order sqrt(dim) / 2 of them,
 * whether codes are dequantised first or scale and zero are applied to the sum. */
static double weigh(struct head *h, const float *q, size_t n, const bool *hidden, double scale, double split) {
  double max = -INFINITY, total = 0, mean_error = 0, q_sum = 0;
  for (size_t i = 0; i < h->dim; i++) q_sum += fabs((double)q[i]);
  for (size_t t = 0; t < n; t++) {
    double dot = 0;
    h->weight[t] = -INFINITY;
    h->error[t] = 0;
    if (hidden[t]) continue;
    for (size_t i = 0; i < h->dim; i++) dot += (double)q[i] * h->k[t * h->dim + i];
    h->weight[t] = dot * scale;
    h->error[t] = (EPS * (4 + sqrt((double)h->dim) / 2) + 2 * split) * q_sum * h->k_max[t] * scale;
    max = fmax(max, h->weight[t]);
  }
  for (size_t t = 0; t < n; t++) total += h->weight[t] = exp(h->weight[t] - max);
  for (size_t t = 0; t < n; t++) {
    h->weight[t] /= total;
    mean_error += h->weight[t] * h->error[t];
  }
  return mean_error;
}

static void compare_attention(const struct op_check *c, const struct cache *k, enum qtr_kv_format format, const float *got,
                              const float *expected, const char *what, struct op_diff *diff) {
  const struct qtr_batch *batch = &k->b.batch;
  const struct op_entry *e = k->entry;
  size_t dim = (size_t)e->head_dim, width = width_of(e), row = (size_t)e->n_heads * dim;
  double act = c->dev.caps.act_dtype == QTR_DTYPE_F32 ? 0 : 0x1p-10;
  /* Tensor cores take weights times V's scale as fp16 (half a unit in 11 bits; below 2^-25 of the largest, 2^-36 of it) and
   * codes exactly. Where the sums beside them, of weights and of weights times zero, are of the rounded ones (decode), a
   * token moves the result by its value's distance from it, which is more than its code where values differ in sign or size;
   * where they are of the weights as they were (prefill), by its code. */
  double weight16 = act > 0 ? 0x1p-11 : 0;
  double *tolerance = op_malloc(dim, sizeof *tolerance), *moved = op_malloc(dim, sizeof *moved);
  bool *hidden = op_malloc((size_t)batch->max_blocks * QTR_PAGE_TOKENS, sizeof *hidden);
  /* With AMX the cpu backend multiplies codes by q and weights that are split into two bf16 parts: 16 bits of each.
   * Codes times scale reach twice the largest value. */
  double split = format != QTR_KV_F16 && strstr(c->dev.caps.description, "AMX") ? 0x1p-17 : 0;
  int32_t group = e->n_heads / e->n_kv_heads;
  for (int32_t s = 0; s < batch->n_seqs; s++) {
    int32_t n_all = batch->kv_len[s] + batch->q_start[s + 1] - batch->q_start[s];
    for (int32_t index = 0; index < e->n_kv_heads; index++) {
      struct head head = head_read(c, k, format, s, n_all, index);
      for (int32_t i = 0; i < (n_all - batch->kv_len[s]) * group; i++) {
        size_t token = (size_t)(batch->q_start[s] + i / group), h = (size_t)(index * group + i % group);
        size_t n = (size_t)(batch->kv_len[s] + i / group) + 1;
        hide(c, k, s, (int32_t)h, n, hidden);
        double mean_error = weigh(&head, k->qkv + token * width + h * dim, n, hidden, 1 / sqrt((double)dim), split),
               rounding = 0, coded = 0, scaled_most = 0;
        const float *want = expected + token * row + h * dim;
        for (size_t t = 0; t < n; t++) {
          rounding += head.weight[t] * head.v_max[t];
          coded += hidden[t] ? 0 : (head.weight[t] + 0x1p-21) * head.v_code[t];
          scaled_most = fmax(scaled_most, head.weight[t] * head.v_scale[t]);
        }
        for (size_t j = 0; j < dim; j++) {
          /* Of n terms w code scale (at most 2 |v|), n of w zero scale (|v|) and n of w: half a unit for each addition. */
          tolerance[j] = (EPS * (4 + 2 * (double)n) + 2 * split) * rounding + 1e-20 * head.v_all +
                         act * (fabs((double)want[j]) + 0x1p-14) + 1e-37;
          moved[j] = 0;
        }
        for (size_t t = 0; t < n; t++) {
          if (hidden[t]) continue;
          double share = head.weight[t] * (head.error[t] + mean_error + 8 * EPS + split);
          double rounded = weight16 * (head.weight[t] + 0x1p-25 * scaled_most / head.v_scale[t]);
          for (size_t j = 0; j < dim; j++) {
            double distance = fabs(head.v[t * dim + j] - (double)want[j]);
            tolerance[j] += share * distance;
            moved[j] += rounded * distance;
          }
        }
        for (size_t j = 0; j < dim; j++) {
          tolerance[j] += fmax(moved[j], weight16 * coded);
          op_compare(diff, (double)got[token * row + h * dim + j], (double)want[j], tolerance[j], what, token, h * dim + j);
        }
      }
      head_free(&head);
    }
  }
  free(tolerance);
  free(moved);
  free(hidden);
}

/* Lets sequence s choose in `slot` what it had chosen before the final step: the tokens since then once more. */
static void choose_before(const struct op_device *d, struct qtr_kv *kv, const struct cache *k, int32_t s, int32_t slot) {
  const struct op_entry *e = k->entry;
  int32_t n = k->b.kv_len[s], at = e->kind == OP_SPARSE && n > 0 ? choice_position(k, s, n - 1) : -1;
  if (at < 0) return;
  struct op_batch b;
  op_batch_part(&k->b, s, at, n - at, slot, &k->sparse, &b);
  float *out = op_malloc((size_t)(n - at + 1) * (size_t)(e->n_heads * e->head_dim), sizeof *out);
  step_attend(d, kv, k, &b.batch, row_of(k, s, at), out);
  free(out);
  op_batch_free(&b);
}

/* May a sequence's tokens be cut before token number `cut`? On GPUs single tokens take another kernel, so no piece has one
 * given token; generated ones of a sparse cache are all the same to it. */
static bool may_cut(const struct op_check *c, const struct cache *k, int32_t s, int32_t cut) {
  int32_t n = k->b.q_start[s + 1] - k->b.q_start[s], given = n;
  if (c->dev.caps.act_dtype == QTR_DTYPE_F32) return true;
  if (k->entry->kind == OP_SPARSE) given = QTR_MAX(0, QTR_MIN(n, k->b.decode_start[s] - k->b.kv_len[s]));
  return given != 1 && QTR_MIN(cut, given) != 1 && given - cut != 1;
}

/* Sequence s alone, its tokens in one step or two, must give the bits it had in the batch. */
static void check_alone(struct op_check *c, struct cache *k, int32_t s, const float *together, float *out,
                        struct op_diff *diff) {
  const struct qtr_batch *batch = &k->b.batch;
  const struct op_entry *e = k->entry;
  int32_t n = batch->q_start[s + 1] - batch->q_start[s], cut = 0, slot = batch->n_seqs; /* one that nobody had */
  size_t row = (size_t)(e->n_heads * e->head_dim), first = (size_t)batch->q_start[s];
  for (int i = 0; i < 20 && cut == 0 && n > 1; i++) {
    int32_t at = 1 + (int32_t)op_rng_below(&c->rng, (size_t)n - 1);
    if (may_cut(c, k, s, at)) cut = at;
  }
  for (int i = 0; i < (cut > 0 ? 2 : 1); i++) {
    choose_before(&c->dev, k->dev, k, s, slot);
    for (int32_t from = 0; from < n;) {
      int32_t to = i == 1 && from == 0 ? cut : n;
      struct op_batch b;
      op_batch_part(&k->b, s, batch->kv_len[s] + from, to - from, slot, &k->sparse, &b);
      size_t token = first + (size_t)from;
      step_attend(&c->dev, k->dev, k, &b.batch, k->qkv + token * width_of(e), out);
      diff->n++;
      if (memcmp(out, together + token * row, (size_t)(to - from) * row * sizeof *out)) {
        op_bad(diff, "sequence %d (%d cached): tokens %d to %d alone differ from those in the batch", s, batch->kv_len[s],
               from, to - 1);
      }
      op_batch_free(&b);
      from = to;
    }
  }
}

void op_check_attention(struct op_check *c, const struct op_entry *e, enum qtr_kv_format format, struct op_diff *diff) {
  size_t row = (size_t)(e->n_heads * e->head_dim);
  const struct op_pattern *pattern = e->kind == OP_SPARSE ? op_sparse_patterns : op_patterns;
  size_t n_patterns = e->kind == OP_SPARSE ? n_op_sparse_patterns : n_op_patterns;
  for (size_t i = 0; i < n_patterns; i++, pattern++) {
    if (!(pattern->use & e->use & CHECKS)) continue;
    struct cache k;
    cache_make(c, e, format, pattern, false, &k);
    size_t n = (size_t)k.b.batch.n_tokens;
    float *got = op_malloc((n + 1) * row, sizeof *got), *expected = op_malloc((n + 1) * row, sizeof *expected);
    float *alone = op_malloc((n + 1) * row, sizeof *alone);
    void *rounded = op_upload(&c->dev, k.qkv, n * width_of(e));
    op_download(&c->dev, rounded, c->dev.caps.act_dtype, n * width_of(e), k.qkv);
    c->dev.ops->free(c->dev.b, rounded);
    for (int32_t s = 0; s < k.b.batch.n_seqs; s++) {
      choose_before(&c->dev, k.dev, &k, s, k.b.batch.slot ? k.b.slot[s] : 0);
      choose_before(&c->ref, k.ref, &k, s, k.b.batch.slot ? k.b.slot[s] : 0);
    }
    step_attend(&c->dev, k.dev, &k, &k.b.batch, k.qkv, got);
    step_attend(&c->ref, k.ref, &k, &k.b.batch, k.qkv, expected);
    compare_cache(c, &k, diff);
    compare_attention(c, &k, format, got, expected, pattern->name, diff);
    compare_choices(c, &k, pattern->name, diff);
    if (!isnan(got[n * row])) op_bad(diff, "%s: wrote past the last row", pattern->name);
    for (int32_t s = 0; s < k.b.batch.n_seqs; s++) check_alone(c, &k, s, got, alone, diff);
    free(got);
    free(expected);
    free(alone);
    cache_free(c, &k);
  }
}
