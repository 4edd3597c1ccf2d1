/* data.c - random matrices, activations and batches for quattuor-ops, and thin wrappers of a device's vtable. */
#include <stdarg.h>
#include <stdio.h>

#include "ops.h"

uint64_t op_rng_next(struct op_rng *rng) { /* splitmix64 */
  uint64_t z = rng->state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

size_t op_rng_below(struct op_rng *rng, size_t n) { return (size_t)(op_rng_next(rng) % n); }

float op_rng_uniform(struct op_rng *rng) { return (float)(op_rng_next(rng) >> 40) * 0x1p-24f; }

float op_rng_normal(struct op_rng *rng) { /* four uniform numbers added: variance 4/12 */
  uint64_t u = op_rng_next(rng);
  float sum = (float)(u & 65535) + (float)(u >> 16 & 65535) + (float)(u >> 32 & 65535) + (float)(u >> 48);
  return (sum / 65536.0f - 2) * 1.7320508f;
}

void *op_malloc(size_t count, size_t size) {
  void *p = calloc(count ? count : 1, size);
  if (!p) {
    (void)fprintf(stderr, "quattuor-ops: out of memory (%zu x %zu bytes)\n", count, size);
    exit(2);
  }
  return p;
}

float *op_activations(struct op_rng *rng, size_t n, size_t dim) {
  float *x = op_malloc(n * dim, sizeof *x);
  for (size_t t = 0; t < n; t++) {
    float *row = x + t * dim, scale = 1, mean = 0;
    switch (op_rng_below(rng, 8)) {
      case 0: scale = 1e-3f; break;
      case 1: mean = 3; break;
      case 2: scale = 30; break;
      case 3:
        if (op_rng_below(rng, 4) == 0) scale = 0;
        break;
      default: break;
    }
    for (size_t i = 0; i < dim; i++) row[i] = op_rng_normal(rng) * scale + mean;
    if (op_rng_below(rng, 4) == 0) row[op_rng_below(rng, dim)] *= 100; /* an outlier channel */
  }
  return x;
}

static float random_scale(struct op_rng *rng) { return qtr_f16_round(0.002f + 0.01f * op_rng_uniform(rng)); }

static void random_bytes(struct op_rng *rng, uint8_t *p, size_t n) {
  for (size_t i = 0; i < n; i += 8) {
    uint64_t u = op_rng_next(rng);
    memcpy(p + i, &u, QTR_MIN(n - i, (size_t)8));
  }
}

void op_matrix_make(struct op_rng *rng, const struct op_entry *e, enum qtr_linear_format format, struct op_matrix *m) {
  memset(m, 0, sizeof *m);
  struct qtr_linear_source *s = &m->source;
  bool is_float = format == QTR_LINEAR_F32 || format == QTR_LINEAR_F16 || format == QTR_LINEAR_BF16;
  s->format = format;
  s->n_in = e->n_in;
  s->n_parts = op_n_parts(e);
  s->gate_up = e->epilogue == QTR_EPILOGUE_SILU_MUL;
  s->borrow = op_rng_below(rng, 2);
  if (is_float) m->row_norm = op_malloc(op_n_out(e), sizeof *m->row_norm);
  for (size_t p = 0, first = 0; p < s->n_parts; first += e->rows[p++]) {
    struct qtr_linear_part *part = &s->part[p];
    size_t n_out = e->rows[p], n = n_out * e->n_in;
    part->n_out = n_out;
    if (is_float) {
      float deviation = 1 / sqrtf((float)e->n_in);
      void *w = op_malloc(n, format == QTR_LINEAR_F32 ? 4 : 2);
      float *f32 = w;
      uint16_t *f16 = w;
      for (size_t row = 0; row < n_out; row++) {
        double squares = 0;
        for (size_t k = 0; k < e->n_in; k++) {
          size_t i = row * e->n_in + k;
          float x = op_rng_normal(rng) * deviation;
          squares += (double)x * (double)x;
          if (format == QTR_LINEAR_F32) f32[i] = x;
          if (format == QTR_LINEAR_F16) f16[i] = qtr_f16_from_f32(x);
          if (format == QTR_LINEAR_BF16) f16[i] = qtr_bf16_from_f32(x);
        }
        m->row_norm[first + row] = (float)sqrt(squares);
      }
      part->weight = w;
    } else {
      uint8_t *w = op_malloc(format == QTR_LINEAR_W8A8 ? n : n / 2, 1);
      random_bytes(rng, w, format == QTR_LINEAR_W8A8 ? n : n / 2);
      part->weight = w;
      float *scale = op_malloc(n_out, sizeof *scale);
      for (size_t i = 0; i < n_out; i++) scale[i] = random_scale(rng);
      part->scale = scale;
      if (format == QTR_LINEAR_W4A8) {
        float *szero = op_malloc(n_out, sizeof *szero);
        for (size_t i = 0; i < n_out; i++) szero[i] = qtr_f16_round(scale[i] * (float)op_rng_below(rng, 16));
        part->szero = szero;
      }
      if (format == QTR_LINEAR_W4A8_G128) {
        size_t n_groups = n / QTR_GROUP;
        uint8_t *s2 = op_malloc(n_groups, 1), *z2 = op_malloc(n_groups, 1);
        random_bytes(rng, s2, n_groups);
        random_bytes(rng, z2, n_groups);
        for (size_t i = 0; i < n_groups && !e->wild;
             i++) { /* what a quantiser makes: (q - zero) * s2 within int8 for all q */
          unsigned step = 1 + s2[i] % 16u, most = 128 / step, least = 127 / step >= 15 ? 0 : 15 - 127 / step;
          most = QTR_MIN(most, 15u);
          s2[i] = (uint8_t)step;
          z2[i] = (uint8_t)(0u - (least + z2[i] % (most - least + 1)) * step);
        }
        part->s2_scale = s2;
        part->s2_zero = z2;
      }
    }
    if (e->bias && !(p == 1 && s->n_parts == 3)) { /* a middle part without one, as no model has it */
      float *bias = op_malloc(n_out, sizeof *bias);
      for (size_t i = 0; i < n_out; i++) bias[i] = op_rng_normal(rng);
      part->bias = bias;
    }
  }
}

static void release(const void *p) { free((void *)(uintptr_t)p); }

void op_matrix_free(struct op_matrix *m) {
  for (size_t p = 0; p < m->source.n_parts; p++) {
    const struct qtr_linear_part *part = &m->source.part[p];
    release(part->weight);
    release(part->scale);
    release(part->szero);
    release(part->s2_scale);
    release(part->s2_zero);
    release(part->bias);
  }
  free(m->row_norm);
}

/* ---- batches ------------------------------------------------------------------------------------- */

static void batch_alloc(struct op_batch *b, int32_t n_seqs, int32_t n_tokens, int32_t max_blocks) {
  memset(b, 0, sizeof *b);
  b->position = op_malloc((size_t)n_tokens, sizeof(int32_t));
  b->q_start = op_malloc((size_t)n_seqs + 1, sizeof(int32_t));
  b->kv_len = op_malloc((size_t)n_seqs, sizeof(int32_t));
  b->block_table = op_malloc((size_t)n_seqs * (size_t)max_blocks, sizeof(int32_t));
  b->batch = (struct qtr_batch){.n_tokens = n_tokens,
                                .n_seqs = n_seqs,
                                .max_blocks = max_blocks,
                                .position = b->position,
                                .q_start = b->q_start,
                                .kv_len = b->kv_len,
                                .block_table = b->block_table};
}

/* The numbers 0 … n - 1 in random order. */
static int32_t *permutation(struct op_rng *rng, int32_t n) {
  int32_t *page = op_malloc((size_t)n, sizeof *page);
  for (int32_t i = 0; i < n; i++) page[i] = i;
  for (int32_t i = n - 1; i > 0; i--) {
    int32_t j = (int32_t)op_rng_below(rng, (size_t)i + 1), t = page[i];
    page[i] = page[j];
    page[j] = t;
  }
  return page;
}

void op_batch_make(struct op_rng *rng, const struct op_pattern *p, int32_t *n_pages, struct op_batch *b) {
  int32_t n_seqs = p->n_copies * p->n_seqs, n_tokens = 0, max_blocks = 0, total = 0;
  for (int32_t s = 0; s < n_seqs; s++) {
    int32_t q = p->seq[s % p->n_seqs].q_len, blocks = (p->seq[s % p->n_seqs].kv_len + q + 63) / 64;
    n_tokens += q;
    total += blocks;
    max_blocks = QTR_MAX(max_blocks, blocks + 1);
  }
  *n_pages = total + 2;
  batch_alloc(b, n_seqs, n_tokens, max_blocks);
  int32_t *page = permutation(rng, *n_pages), next = 0, token = 0;
  for (int32_t s = 0; s < n_seqs; s++) {
    int32_t kv = p->seq[s % p->n_seqs].kv_len, q = p->seq[s % p->n_seqs].q_len;
    b->kv_len[s] = kv;
    for (int32_t i = 0; i < q; i++) b->position[token++] = kv + i;
    b->q_start[s + 1] = token;
    int32_t *table = b->block_table + (size_t)s * (size_t)max_blocks;
    for (int32_t i = 0; i < max_blocks; i++) table[i] = i < (kv + q + 63) / 64 ? page[next++] : -1;
  }
  free(page);
}

static void sparse_alloc(struct op_batch *b) {
  size_t n_seqs = (size_t)b->batch.n_seqs, n = n_seqs * (size_t)b->batch.max_blocks;
  b->stream_all = op_malloc(n, sizeof(int32_t));
  b->stream_table = op_malloc(n, sizeof(int32_t));
  b->decode_start = op_malloc(n_seqs, sizeof(int32_t));
  b->slot = op_malloc(n_seqs, sizeof(int32_t));
  b->batch.stream_table = b->stream_table;
  b->batch.decode_start = b->decode_start;
  b->batch.slot = b->slot;
}

/* Does a query at one of the positions a … b - 1 see a key of the page that begins at `first`? */
static bool sees_page(const struct qtr_kv_window *w, int32_t first, int32_t a, int32_t b) {
  return a < b && first < b && (first < w->sink || QTR_MAX(a, first) - (first + QTR_PAGE_TOKENS - 1) < w->local);
}

/* stream_table: those of stream_all that a query of the step sees. */
static void show_stream_pages(const struct qtr_kv_sparse *sparse, struct op_batch *b) {
  for (int32_t s = 0; s < b->batch.n_seqs; s++) {
    size_t row = (size_t)s * (size_t)b->batch.max_blocks;
    int32_t from = b->kv_len[s], to = from + b->q_start[s + 1] - b->q_start[s];
    int32_t start = QTR_MIN(QTR_MAX(b->decode_start[s], from), to);
    for (int32_t i = 0; i < b->batch.max_blocks; i++) {
      bool seen = sees_page(&sparse->context, i * QTR_PAGE_TOKENS, from, start) ||
                  sees_page(&sparse->decode, i * QTR_PAGE_TOKENS, start, to);
      b->stream_table[row + (size_t)i] = seen ? b->stream_all[row + (size_t)i] : -1;
    }
  }
}

void op_batch_sparse(struct op_rng *rng, const struct op_pattern *p, int32_t n_pages, const struct qtr_kv_sparse *sparse,
                     struct op_batch *b) {
  int32_t n_seqs = b->batch.n_seqs, *page = permutation(rng, n_pages), next = 0;
  sparse_alloc(b);
  for (int32_t i = 0; i < n_seqs * b->batch.max_blocks; i++) b->stream_all[i] = b->block_table[i] < 0 ? -1 : page[next++];
  free(page);
  int32_t *order = permutation(rng, n_seqs);
  memcpy(b->slot, order, (size_t)n_seqs * sizeof *order);
  free(order);
  for (int32_t s = 0; s < n_seqs; s++) b->decode_start[s] = p->seq[s % p->n_seqs].decode_start;
  show_stream_pages(sparse, b);
}

void op_batch_part(const struct op_batch *all, int32_t s, int32_t position, int32_t n, int32_t slot,
                   const struct qtr_kv_sparse *sparse, struct op_batch *part) {
  size_t max_blocks = (size_t)all->batch.max_blocks, row = (size_t)s * max_blocks;
  op_batch_single(all->block_table + row, all->batch.max_blocks, position, n, part);
  if (!all->stream_all) return;
  sparse_alloc(part);
  memcpy(part->stream_all, all->stream_all + row, max_blocks * sizeof(int32_t));
  part->decode_start[0] = all->decode_start[s];
  part->slot[0] = slot;
  show_stream_pages(sparse, part);
}

void op_sparse_fill(const struct op_entry *e, int32_t n_layers, int32_t n_seqs, int32_t max_pages, uint8_t *streaming,
                    struct qtr_kv_sparse *sparse) {
  int32_t n = e->n_kv_heads;
  *sparse = e->sparse;
  for (int32_t i = 0; i < n_layers * n; i++) {
    int32_t h = i / n % 2 ? i % n : n - 1 - i % n;
    streaming[i] = h * e->n_streaming / n != (h + 1) * e->n_streaming / n;
  }
  sparse->streaming = e->n_streaming > 0 ? streaming : NULL;
  sparse->group = e->n_heads / n;
  sparse->n_slots = n_seqs + 1;
  sparse->max_pages = max_pages;
}

void op_batch_single(const int32_t *table, int32_t max_blocks, int32_t kv_len, int32_t q_len, struct op_batch *b) {
  batch_alloc(b, 1, q_len, max_blocks);
  memcpy(b->block_table, table, (size_t)max_blocks * sizeof *table);
  for (int32_t i = 0; i < q_len; i++) b->position[i] = kv_len + i;
  b->q_start[1] = q_len;
  b->kv_len[0] = kv_len;
}

void op_batch_move(struct op_batch *b, int32_t tokens, const struct qtr_kv_sparse *sparse) {
  for (int32_t s = 0; s < b->batch.n_seqs; s++) b->kv_len[s] += tokens;
  for (int32_t i = 0; i < b->batch.n_tokens; i++) b->position[i] += tokens;
  if (b->stream_all) show_stream_pages(sparse, b);
}

void op_batch_free(struct op_batch *b) {
  free(b->position);
  free(b->q_start);
  free(b->kv_len);
  free(b->block_table);
  free(b->stream_all);
  free(b->stream_table);
  free(b->decode_start);
  free(b->slot);
}

/* ---- devices ------------------------------------------------------------------------------------- */

void op_must(enum qtr_status status, const struct qtr_error *err) {
  if (status == QTR_OK) return;
  (void)fprintf(stderr, "quattuor-ops: %s: %s\n", qtr_status_name(status), err->message);
  exit(2);
}

void *op_upload(const struct op_device *d, const float *x, size_t n) {
  void *p = NULL;
  struct qtr_error err = {0};
  op_must(d->ops->upload_floats(d->b, x, n, &p, &err), &err);
  return p;
}

void op_download(const struct op_device *d, const void *x, enum qtr_dtype dtype, size_t n, float *host) {
  struct qtr_error err = {0};
  op_must(d->ops->download(d->b, x, dtype, n, host, &err), &err);
}

void *op_at(const struct op_device *d, const void *x, size_t index) { return (char *)(uintptr_t)x + index * d->act_bytes; }

struct qtr_input *op_input(const struct op_device *d, size_t n_tokens, size_t dim) {
  struct qtr_input *in = NULL;
  struct qtr_error err = {0};
  op_must(d->ops->input_create(d->b, n_tokens, dim, &in, &err), &err);
  return in;
}

struct qtr_linear *op_linear(const struct op_device *d, const struct qtr_linear_source *source) {
  struct qtr_linear *l = NULL;
  struct qtr_error err = {0};
  op_must(d->ops->linear_create(d->b, source, &l, &err), &err);
  return l;
}

void op_step_begin(const struct op_device *d, const struct qtr_batch *batch, const float *inv_freq, int32_t half_dim) {
  static const float none[1] = {1};
  struct qtr_error err = {0};
  op_must(d->ops->begin_step(d->b, batch, inv_freq ? inv_freq : none, inv_freq ? (size_t)half_dim : 1, &err), &err);
}

void op_step_end(const struct op_device *d) {
  struct qtr_error err = {0};
  op_must(d->ops->end_step(d->b, &err), &err);
}
