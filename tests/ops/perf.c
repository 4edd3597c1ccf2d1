/* perf.c - times the entries of the table: median time, bytes that must move, operations, and both against the machine's
 * ceilings. Weights and caches rotate through copies that together exceed the last-level cache, as the layers of a model do;
 * activations stay warm, as in a model.
 *
 * Bytes: weights as stored, K and V rows of the context once a sequence and head, inputs and outputs. Operations: 2 a
 * multiply-add. */
#include <stdio.h>

#include "base/clock.h"
#include "ops.h"

enum { MIN_REPEATS = 7, MAX_REPEATS = 2000, MAX_COPIES = 24 };
static const double min_seconds = 0.06;
static const size_t rotate_bytes = (size_t)256 << 20;

typedef void (*timed_fn)(void *arg, size_t i);

static int compare_double(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

/* A device that works while the host goes on is timed by groups of calls. */
static double median_seconds(const struct op_device *d, timed_fn fn, void *arg) {
  static double times[MAX_REPEATS];
  size_t n = 0, group = d->ops->wait ? 24 : 1, call = 0;
  for (size_t i = 0; i < group; i++) fn(arg, call++);
  if (d->ops->wait) d->ops->wait(d->b);
  for (double total = 0; n < MAX_REPEATS && (n < MIN_REPEATS || total < min_seconds); n++) {
    double start = qtr_now();
    for (size_t i = 0; i < group; i++) fn(arg, call++);
    if (d->ops->wait) d->ops->wait(d->b);
    times[n] = (qtr_now() - start) / (double)group;
    total += times[n] * (double)group;
  }
  qsort(times, n, sizeof times[0], compare_double);
  return times[n / 2];
}

void op_report(const struct op_ceiling *c, const char *name, const char *batch, double seconds, double bytes,
               double operations, bool int8, bool json) {
  double gbs = bytes / seconds * 1e-9, gops = operations / seconds * 1e-9;
  double bytes_share = 100 * gbs / c->read_gbs, ops_share = int8 && c->int8_gops > 0 ? 100 * gops / c->int8_gops : 0;
  if (json) {
    (void)printf(
        "{\"name\":\"%s\",\"batch\":\"%s\",\"us\":%.2f,\"bytes\":%.0f,\"operations\":%.0f,\"gb_s\":%.2f,\"gop_s\":%.2f,"
        "\"read_percent\":%.1f,\"int8_percent\":%.1f}\n",
        name, batch, seconds * 1e6, bytes, operations, gbs, gops, bytes_share, ops_share);
  } else {
    (void)printf("%-38s %-34s %11.1f us %8.2f GB/s %4.0f %% %9.1f GOP/s", name, batch, seconds * 1e6, gbs, bytes_share,
                 gops);
    if (int8 && c->int8_gops > 0) (void)printf(" %4.0f %%", ops_share);
    (void)printf("\n");
  }
  (void)fflush(stdout);
}

/* ---- rows ---------------------------------------------------------------------------------------- */

struct rows_run {
  const struct op_device *d;
  const struct op_entry *e;
  unsigned format;
  size_t n_tokens;
  void *x, *weight;
  struct qtr_input *in;
};

static void time_rows(void *arg, size_t i) {
  const struct rows_run *r = arg;
  (void)i;
  if (r->e->kind == OP_QUANT) {
    r->d->ops->quant(
        r->d->b,
        &(struct qtr_quant_args){
            .x = r->x, .out = r->in, .quant = (enum qtr_quant)r->format, .n_tokens = r->n_tokens, .dim = r->e->n_in});
  } else {
    r->d->ops->rmsnorm(
        r->d->b, &(struct qtr_rmsnorm_args){.x = r->x,
                                            .weight = r->weight,
                                            .out = r->in,
                                            .quant = r->format == OP_NORM_EXACT_FLOAT ? QTR_QUANT_NONE : QTR_QUANT_INT8,
                                            .norm = r->format == OP_NORM_QSERVE_INT8 ? QTR_NORM_QSERVE : QTR_NORM_EXACT,
                                            .eps = 1e-5f,
                                            .n_tokens = r->n_tokens,
                                            .dim = r->e->n_in});
  }
}

static void perf_rows(const struct op_device *d, const struct op_ceiling *c, const struct op_entry *e, unsigned format,
                      const char *name, bool json, struct op_rng *rng) {
  size_t n_counts = d->ops->wait ? n_op_perf_tokens : n_op_perf_tokens_host, n_all = op_perf_tokens[n_counts - 1],
         dim = e->n_in;
  float *x = op_activations(rng, n_all, dim);
  struct rows_run r = {.d = d,
                       .e = e,
                       .format = format,
                       .x = op_upload(d, x, n_all * dim),
                       .weight = op_upload(d, x, dim),
                       .in = op_input(d, n_all, dim)};
  bool int8 = e->kind == OP_QUANT ? format == QTR_QUANT_INT8 : format != OP_NORM_EXACT_FLOAT;
  for (size_t i = 0; i < n_counts; i++) {
    char batch[32];
    r.n_tokens = op_perf_tokens[i];
    (void)snprintf(batch, sizeof batch, "%zu tokens", r.n_tokens);
    double n = (double)(r.n_tokens * dim), bytes = n * ((double)d->act_bytes + (int8 ? 1 : (double)d->act_bytes));
    op_report(c, name, batch, median_seconds(d, time_rows, &r), bytes, n * (e->kind == OP_QUANT ? 3 : 6), false, json);
  }
  free(x);
  d->ops->free(d->b, r.x);
  d->ops->free(d->b, r.weight);
  d->ops->input_free(d->b, r.in);
}

/* ---- linear -------------------------------------------------------------------------------------- */

struct linear_run {
  const struct op_device *d;
  struct qtr_linear *copy[MAX_COPIES];
  size_t n_copies, n_tokens;
  enum qtr_epilogue epilogue;
  struct qtr_input *in;
  void *out;
};

static void time_linear(void *arg, size_t i) {
  const struct linear_run *r = arg;
  r->d->ops->linear(r->d->b, &(struct qtr_linear_args){.linear = r->copy[i % r->n_copies],
                                                       .input = r->in,
                                                       .epilogue = r->epilogue,
                                                       .out = r->out,
                                                       .n_tokens = r->n_tokens});
}

static void perf_linear(const struct op_device *d, const struct op_ceiling *c, const struct op_entry *e,
                        enum qtr_linear_format format, const char *name, bool json, struct op_rng *rng) {
  size_t n_counts = d->ops->wait ? n_op_perf_tokens : n_op_perf_tokens_host;
  size_t n_all = op_perf_tokens[n_counts - 1], dim = e->n_in, width = op_out_width(e);
  struct op_matrix m;
  op_matrix_make(rng, e, format, &m);
  m.source.borrow = false; /* copies that really are copies */
  struct linear_run r = {.d = d, .epilogue = e->epilogue, .in = op_input(d, n_all, dim)};
  size_t bytes = 0;
  do {
    r.copy[r.n_copies] = op_linear(d, &m.source);
    bytes = d->ops->linear_bytes(r.copy[r.n_copies++]);
  } while (r.n_copies < MAX_COPIES && bytes * r.n_copies < rotate_bytes);
  float *x = op_activations(rng, n_all, dim), *zeros = op_malloc(n_all * width, sizeof *zeros);
  void *device = op_upload(d, x, n_all * dim);
  r.out = op_upload(d, zeros, n_all * width);
  bool int8 = qtr_linear_quant(format) == QTR_QUANT_INT8;
  for (size_t i = 0; i < n_counts; i++) {
    char batch[32];
    r.n_tokens = op_perf_tokens[i];
    if (e->epilogue == QTR_EPILOGUE_LOGITS && r.n_tokens > 64) break; /* logits are wanted of a few rows only */
    (void)snprintf(batch, sizeof batch, "%zu tokens", r.n_tokens);
    d->ops->quant(d->b,
                  &(struct qtr_quant_args){
                      .x = device, .out = r.in, .quant = qtr_linear_quant(format), .n_tokens = r.n_tokens, .dim = dim});
    double n = (double)r.n_tokens,
           moved = (double)bytes + n * ((double)dim * (int8 ? 1 : 4) + (double)(width * d->act_bytes));
    op_report(c, name, batch, median_seconds(d, time_linear, &r), moved, 2 * n * (double)dim * (double)op_n_out(e), int8,
              json);
  }
  for (size_t i = 0; i < r.n_copies; i++) d->ops->linear_free(d->b, r.copy[i]);
  op_matrix_free(&m);
  free(x);
  free(zeros);
  d->ops->free(d->b, device);
  d->ops->free(d->b, r.out);
  d->ops->input_free(d->b, r.in);
}

/* ---- KV write, attention ------------------------------------------------------------------------- */

struct kv_run {
  const struct op_device *d;
  const struct op_entry *e;
  struct qtr_kv *kv;
  void *qkv, *out;
  int32_t n_layers;
};

static void time_kv_write(void *arg, size_t i) {
  const struct kv_run *r = arg;
  r->d->ops->rope_kv_write(r->d->b, &(struct qtr_rope_kv_args){.qkv = r->qkv,
                                                               .kv = r->kv,
                                                               .layer = (int32_t)(i % (size_t)r->n_layers),
                                                               .n_heads = r->e->n_heads,
                                                               .n_kv_heads = r->e->n_kv_heads,
                                                               .head_dim = r->e->head_dim});
}

static void time_attention(void *arg, size_t i) {
  const struct kv_run *r = arg;
  r->d->ops->attention(r->d->b, &(struct qtr_attention_args){.qkv = r->qkv,
                                                             .kv = r->kv,
                                                             .out = r->out,
                                                             .layer = (int32_t)(i % (size_t)r->n_layers),
                                                             .scale = 1 / sqrtf((float)r->e->head_dim),
                                                             .n_heads = r->e->n_heads,
                                                             .n_kv_heads = r->e->n_kv_heads,
                                                             .head_dim = r->e->head_dim});
}

/* Random K and V in the cached tokens of every layer. */
static void fill_cache(struct kv_run *r, const struct qtr_batch *batch, const float *inv_freq, struct op_rng *rng) {
  size_t width = (size_t)(r->e->n_heads + 2 * r->e->n_kv_heads) * (size_t)r->e->head_dim, chunk = 512;
  float *x = op_malloc(chunk * width, sizeof *x);
  for (size_t i = 0; i < chunk * width; i++) x[i] = op_rng_normal(rng);
  void *qkv = op_upload(r->d, x, chunk * width), *mine = r->qkv;
  r->qkv = qkv;
  for (int32_t s = 0; s < batch->n_seqs; s++) {
    for (int32_t from = 0; from < batch->kv_len[s]; from += (int32_t)chunk) {
      struct op_batch b;
      op_batch_single(batch->block_table + (size_t)s * (size_t)batch->max_blocks, batch->max_blocks, from,
                      QTR_MIN((int32_t)chunk, batch->kv_len[s] - from), &b);
      op_step_begin(r->d, &b.batch, inv_freq, r->e->head_dim / 2);
      for (int32_t layer = 0; layer < r->n_layers; layer++) time_kv_write(r, (size_t)layer);
      op_step_end(r->d);
      op_batch_free(&b);
    }
  }
  r->qkv = mine;
  r->d->ops->free(r->d->b, qkv);
  free(x);
}

static void perf_kv(const struct op_device *d, const struct op_ceiling *c, const struct op_entry *e,
                    enum qtr_kv_format format, const struct op_pattern *p, const char *name, bool json, struct op_rng *rng) {
  struct op_batch b;
  int32_t n_pages;
  op_batch_make(rng, p, &n_pages, &b);
  const struct qtr_batch *batch = &b.batch;
  struct kv_run r = {.d = d, .e = e};
  float static_scale[2 * MAX_COPIES], *inv_freq = op_malloc((size_t)e->head_dim / 2, sizeof *inv_freq);
  for (size_t i = 0; i < 2 * MAX_COPIES; i++) static_scale[i] = 0.03f;
  struct qtr_kv_config config = {.format = format,
                                 .n_layers = 1,
                                 .n_kv_heads = e->n_kv_heads,
                                 .head_dim = e->head_dim,
                                 .n_pages = n_pages,
                                 .static_scale = static_scale};
  size_t layer_bytes = qtr_kv_page_bytes(&config) * (size_t)n_pages;
  r.n_layers = (int32_t)QTR_MIN(rotate_bytes / QTR_MAX(layer_bytes, (size_t)1) + 1, (size_t)MAX_COPIES);
  config.n_layers = r.n_layers;
  struct qtr_error err = {0};
  op_must(d->ops->kv_create(d->b, &config, &r.kv, &err), &err);
  size_t n = (size_t)batch->n_tokens, dim = (size_t)e->head_dim, width = (size_t)(e->n_heads + 2 * e->n_kv_heads) * dim;
  float *x = op_activations(rng, n, width);
  r.qkv = op_upload(d, x, n * width);
  r.out = op_upload(d, x, n * (size_t)e->n_heads * dim);
  if (e->kind == OP_ATTENTION) fill_cache(&r, batch, inv_freq, rng);
  op_step_begin(d, batch, inv_freq, e->head_dim / 2);
  for (int32_t layer = 0; layer < r.n_layers; layer++) time_kv_write(&r, (size_t)layer);

  double token_bytes = (double)layer_bytes / n_pages / QTR_PAGE_TOKENS, context = 0, pairs = 0; /* of one layer, K and V */
  for (int32_t s = 0; s < batch->n_seqs; s++) {
    double kv = batch->kv_len[s], q = batch->q_start[s + 1] - batch->q_start[s];
    context += kv + q;
    pairs += q * kv + q * (q + 1) / 2;
  }
  double rows = (double)n * (double)d->act_bytes * (double)dim;
  if (e->kind == OP_ATTENTION) {
    op_report(c, name, p->name, median_seconds(d, time_attention, &r), context * token_bytes + 2 * rows * e->n_heads,
              4 * pairs * (double)dim * e->n_heads, false, json);
  } else {
    op_report(c, name, p->name, median_seconds(d, time_kv_write, &r),
              (double)n * token_bytes + rows * (2 * (e->n_heads + e->n_kv_heads) + e->n_kv_heads), 0, false, json);
  }
  op_step_end(d);
  d->ops->kv_free(d->b, r.kv);
  d->ops->free(d->b, r.qkv);
  d->ops->free(d->b, r.out);
  free(x);
  free(inv_freq);
  op_batch_free(&b);
}

void op_perf(const struct op_device *d, const struct op_ceiling *ceiling, const struct op_entry *e, unsigned format,
             bool json, struct op_rng *rng) {
  char name[128];
  op_name(e, format, name, sizeof name);
  switch (e->kind) {
    case OP_LINEAR: perf_linear(d, ceiling, e, (enum qtr_linear_format)format, name, json, rng); break;
    case OP_QUANT:
    case OP_NORM: perf_rows(d, ceiling, e, format, name, json, rng); break;
    case OP_KV_WRITE:
    case OP_ATTENTION:
      for (size_t i = 0; i < n_op_patterns; i++) {
        if (!(op_patterns[i].use & (d->ops->wait ? OP_PERF | OP_PERF_GPU : OP_PERF))) continue;
        perf_kv(d, ceiling, e, (enum qtr_kv_format)format, &op_patterns[i], name, json, rng);
      }
      break;
    case OP_SPARSE:
      for (size_t i = 0; i < n_op_sparse_patterns; i++) {
        if (!(op_sparse_patterns[i].use & (d->ops->wait ? OP_PERF | OP_PERF_GPU : OP_PERF))) continue;
        op_perf_sparse(d, ceiling, e, (enum qtr_kv_format)format, &op_sparse_patterns[i], name, json, rng);
      }
      break;
    default: break;
  }
}
