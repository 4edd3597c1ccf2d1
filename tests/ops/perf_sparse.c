/* perf_sparse.c - times sparse attention (backend.h, struct qtr_kv_sparse) beside dense attention over the same contexts: of
 * a generated token in a step that chooses pages anew and in one that keeps them, of the last tokens of a prompt, and the
 * writing of K and V with and without statistics.
 *
 * A step has one operation a layer, as many layers as a model has (less where memory does not hold them): what is read is
 * not in a cache from the layer's last time. The device's own clock times them where it has one, so that steps of decode run
 * as the engine runs them, captured. Keys are those of a few thousand rows, rotated by their positions: no two pages are
 * equal. Bytes are those that must be read: of a choice the statistics of all pages, then the chosen ones. */
#include <stdio.h>

#include "backend/common/sparse.h"
#include "base/clock.h"
#include "ops.h"

enum { GPU_LAYERS = 32, CPU_LAYERS = 4, PROMPT_LAYERS = 2, FILL_TOKENS = 2048, MAX_REPEATS = 200 };

struct sparse_run {
  const struct op_device *d;
  const struct op_entry *e;
  struct op_batch b;
  struct qtr_kv *kv;
  struct qtr_kv_sparse sparse;
  void *fill, *qkv, *out; /* device (FILL_TOKENS, width), (n_tokens, width), (n_tokens, n_heads * head_dim) */
  float *inv_freq;
  int32_t n_layers, *logit_row;
  uint8_t *streaming;
};

static size_t width_of(const struct op_entry *e) { return (size_t)(e->n_heads + 2 * e->n_kv_heads) * (size_t)e->head_dim; }

static void write_layer(const struct sparse_run *r, void *qkv, int32_t layer) {
  r->d->ops->rope_kv_write(r->d->b, &(struct qtr_rope_kv_args){.qkv = qkv,
                                                               .kv = r->kv,
                                                               .layer = layer,
                                                               .n_heads = r->e->n_heads,
                                                               .n_kv_heads = r->e->n_kv_heads,
                                                               .head_dim = r->e->head_dim});
}

static void attend_layer(const struct sparse_run *r, void *qkv, int32_t layer) {
  r->d->ops->attention(r->d->b, &(struct qtr_attention_args){.qkv = qkv,
                                                             .kv = r->kv,
                                                             .out = r->out,
                                                             .layer = layer,
                                                             .scale = 1 / sqrtf((float)r->e->head_dim),
                                                             .n_heads = r->e->n_heads,
                                                             .n_kv_heads = r->e->n_kv_heads,
                                                             .head_dim = r->e->head_dim});
}

typedef void (*layer_fn)(const struct sparse_run *r, void *qkv, int32_t layer);

/* One step; returns the seconds of a layer. */
static double run_step(const struct sparse_run *r, const struct qtr_batch *batch, layer_fn fn, void *qkv) {
  const struct qtr_backend_ops *ops = r->d->ops;
  op_step_begin(r->d, batch, r->inv_freq, r->e->head_dim / 2);
  double start = qtr_now(), seconds = 0;
  if (ops->stamp) ops->stamp(r->d->b);
  for (int32_t layer = 0; layer < r->n_layers; layer++) fn(r, qkv, layer);
  if (ops->stamp) ops->stamp(r->d->b);
  op_step_end(r->d);
  if (!ops->stamp || ops->stamps_read(r->d->b, &seconds, 1) != 1) seconds = qtr_now() - start;
  return seconds / r->n_layers;
}

static int compare_double(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

/* The median of many; a step of decode runs as a graph from its third time on. */
static double median_layer(const struct sparse_run *r, layer_fn fn) {
  static double times[MAX_REPEATS];
  bool decode = r->b.batch.n_tokens == r->b.batch.n_seqs;
  size_t n = 0, least = decode ? 7 : 3;
  for (int i = 0; i < (decode ? 3 : 1); i++) (void)run_step(r, &r->b.batch, fn, r->qkv);
  for (double total = 0; n < MAX_REPEATS && (n < least || total < 0.06); n++) {
    times[n] = run_step(r, &r->b.batch, fn, r->qkv);
    total += times[n] * r->n_layers;
  }
  qsort(times, n, sizeof times[0], compare_double);
  return times[n / 2];
}

/* Every token of every layer. */
static void fill_cache(const struct sparse_run *r) {
  for (int32_t s = 0; s < r->b.batch.n_seqs; s++) {
    int32_t n = r->b.kv_len[s] + r->b.q_start[s + 1] - r->b.q_start[s];
    for (int32_t from = 0; from < n; from += FILL_TOKENS) {
      struct op_batch part;
      op_batch_part(&r->b, s, from, QTR_MIN((int32_t)FILL_TOKENS, n - from), 0, &r->sparse, &part);
      (void)run_step(r, &part.batch, write_layer, r->fill);
      op_batch_free(&part);
    }
  }
}

/* What a step must read: bytes of K and V, of statistics, and multiply-adds of scores and results. */
struct cost {
  double kv, stats, pairs; /* bytes, bytes, (query, key) of all query heads */
};

static double window_of(const struct qtr_kv_window *w, double n) { return fmin(n, (double)w->sink + (double)w->local); }

/* head_bytes: of a token of one KV head. dense: every head sees everything. */
static struct cost cost_of(const struct sparse_run *r, bool dense, double head_bytes) {
  struct cost c = {0};
  const struct qtr_kv_sparse *sparse = &r->sparse;
  double group = r->e->n_heads / r->e->n_kv_heads, streaming = dense ? 0 : r->e->n_streaming,
         retrieval = r->e->n_kv_heads - streaming;
  for (int32_t s = 0; s < r->b.batch.n_seqs; s++) {
    int32_t from = r->b.kv_len[s], to = from + r->b.q_start[s + 1] - r->b.q_start[s],
            start = dense ? to : r->b.decode_start[s];
    double seen = to, near = 0;
    for (int32_t p = from; p < to; p++) {
      const struct qtr_kv_window *w = p < start ? &sparse->context : &sparse->decode;
      bool selects = !dense && qtr_sparse_selects(sparse, p, start);
      double keys = p + 1, in_window = window_of(w, keys);
      if (selects) { /* patterns have one such token a sequence */
        seen = keys = (double)(qtr_sparse_limit(sparse) - 1) * QTR_PAGE_TOKENS + p % QTR_PAGE_TOKENS + 1;
        c.stats += retrieval * (double)(p / QTR_PAGE_TOKENS) *
                   (double)(qtr_kv_stats_values(sparse, r->e->head_dim) * sizeof(uint16_t));
      }
      c.pairs += group * (retrieval * keys + streaming * in_window);
      near = fmin(to, in_window + p - from);
    }
    c.kv += head_bytes * (retrieval * seen + streaming * near);
  }
  return c;
}

struct lines { /* what is printed */
  const struct op_ceiling *ceiling;
  const char *name, *pattern;
  bool json;
};

static void line(const struct lines *l, const char *what, double seconds, double bytes, double operations) {
  char batch[64];
  (void)snprintf(batch, sizeof batch, "%s, %s", l->pattern, what);
  op_report(l->ceiling, l->name, batch, seconds, bytes, operations, false, l->json);
}

/* Positions of a batch whose last token is at the multiple of the interval less one: that one chooses; five tokens back the
 * choice before it is made; two back it is kept. */
static void time_decode(struct sparse_run *r, const struct lines *l, double head_bytes, double rows) {
  int32_t interval = r->sparse.interval, back = interval > 1 ? 1 : 0;
  struct cost cost = cost_of(r, false, head_bytes);
  double operations = 4 * cost.pairs * r->e->head_dim;
  op_batch_move(&r->b, -interval, &r->sparse);
  (void)run_step(r, &r->b.batch, attend_layer, r->qkv);
  op_batch_move(&r->b, interval - back, &r->sparse);
  double kept = median_layer(r, attend_layer);
  op_batch_move(&r->b, back, &r->sparse);
  double chosen = median_layer(r, attend_layer), mean = (chosen + (interval - 1) * kept) / interval;
  if (back > 0) line(l, "kept", kept, cost.kv + rows, operations);
  line(l, "chosen", chosen, cost.kv + cost.stats + rows, operations);
  line(l, "mean", mean, cost.kv + cost.stats / interval + rows, operations);
}

static void cache_make(struct sparse_run *r, struct qtr_kv_config *config, const struct qtr_kv_sparse *sparse) {
  struct qtr_error err = {0};
  config->sparse = sparse;
  config->n_stream_pages = sparse && sparse->streaming ? config->n_pages : 0;
  op_must(r->d->ops->kv_create(r->d->b, config, &r->kv, &err), &err);
  fill_cache(r);
}

void op_perf_sparse(const struct op_device *d, const struct op_ceiling *ceiling, const struct op_entry *e,
                    enum qtr_kv_format format, const struct op_pattern *p, const char *name, bool json, struct op_rng *rng) {
  struct sparse_run r = {.d = d, .e = e};
  const struct lines l = {ceiling, name, p->name, json};
  int32_t n_pages;
  size_t dim = (size_t)e->head_dim, width = width_of(e);
  op_batch_make(rng, p, &n_pages, &r.b);
  size_t n = (size_t)r.b.batch.n_tokens, n_seqs = (size_t)r.b.batch.n_seqs;
  bool decode = n == n_seqs;
  struct qtr_kv_config config = {
      .format = format, .n_layers = 1, .n_kv_heads = e->n_kv_heads, .head_dim = e->head_dim, .n_pages = n_pages};
  double head_bytes = (double)qtr_kv_page_bytes(&config) / QTR_PAGE_TOKENS / e->n_kv_heads;
  double rows = 2 * (double)n * (double)d->act_bytes * (double)dim * e->n_heads,
         written = (double)n *
                   (head_bytes * e->n_kv_heads + (double)d->act_bytes * (double)dim * (2 * e->n_heads + 3 * e->n_kv_heads));
  struct qtr_caps caps;
  d->ops->caps(d->b, &caps);
  double layer_bytes = 1.5 * (double)n_pages * QTR_PAGE_TOKENS * head_bytes * e->n_kv_heads,
         room = 0.8 * (double)caps.memory_free;
  int32_t most = !decode ? PROMPT_LAYERS : d->ops->stamp ? GPU_LAYERS : CPU_LAYERS;
  r.n_layers = QTR_MAX(1, (int32_t)fmin(most, room / layer_bytes));
  config.n_layers = r.n_layers;
  float *scale = op_malloc(2 * (size_t)r.n_layers, sizeof *scale);
  for (int32_t i = 0; i < 2 * r.n_layers; i++) scale[i] = 0.03f;
  config.static_scale = scale;
  r.streaming = op_malloc((size_t)(r.n_layers * e->n_kv_heads), 1);
  op_sparse_fill(e, r.n_layers, (int32_t)n_seqs, r.b.batch.max_blocks, r.streaming, &r.sparse);
  r.inv_freq = op_malloc(dim / 2, sizeof *r.inv_freq);
  for (size_t i = 0; i < dim / 2; i++) r.inv_freq[i] = powf(500000, -2 * (float)i / (float)dim);
  r.logit_row = op_malloc(n_seqs, sizeof *r.logit_row); /* as a step of an engine: the last token of each sequence */
  for (size_t s = 0; s < n_seqs; s++) r.logit_row[s] = r.b.q_start[s + 1] - 1;
  r.b.batch.logit_row = r.logit_row;
  r.b.batch.n_logit_rows = (int32_t)n_seqs;
  size_t n_values = QTR_MAX(n, (size_t)FILL_TOKENS) * width;
  float *x = op_malloc(n_values, sizeof *x);
  for (size_t i = 0; i < n_values; i++) x[i] = op_rng_normal(rng);
  r.fill = op_upload(d, x, (size_t)FILL_TOKENS * width);
  r.qkv = op_upload(d, x, n * width);
  r.out = op_upload(d, x, n * (size_t)e->n_heads * dim);

  cache_make(&r, &config, NULL);
  struct cost cost = cost_of(&r, true, head_bytes);
  line(&l, "dense", median_layer(&r, attend_layer), cost.kv + rows, 4 * cost.pairs * (double)dim);
  line(&l, "dense KV write", median_layer(&r, write_layer), written, 0);
  d->ops->kv_free(d->b, r.kv);

  op_batch_sparse(rng, p, n_pages, &r.sparse, &r.b);
  cache_make(&r, &config, &r.sparse);
  if (decode) {
    time_decode(&r, &l, head_bytes, rows);
  } else {
    cost = cost_of(&r, false, head_bytes);
    line(&l, "sparse", median_layer(&r, attend_layer), cost.kv + rows, 4 * cost.pairs * (double)dim);
  }
  double changed = (double)n / r.sparse.logical_tokens + (double)n_seqs; /* logical pages, at most */
  line(&l, "sparse KV write", median_layer(&r, write_layer),
       written + changed / (QTR_PAGE_TOKENS / r.sparse.logical_tokens) * 2 * (e->n_kv_heads - e->n_streaming) *
                     (double)qtr_kv_stats_values(&r.sparse, e->head_dim),
       0);
  d->ops->kv_free(d->b, r.kv);
  d->ops->free(d->b, r.fill);
  d->ops->free(d->b, r.qkv);
  d->ops->free(d->b, r.out);
  free(x);
  free(scale);
  free(r.streaming);
  free(r.inv_freq);
  free(r.logit_row);
  op_batch_free(&r.b);
}
