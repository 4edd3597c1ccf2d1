/* Sparse attention of every CPU backend and instruction set, or of a GPU (argument "cuda"), against an oracle of its own in
 * float64 (backend.h, struct qtr_kv_sparse; spec D): streaming heads at token granularity, statistics of keys, the choice of
 * pages - page for page - and what the heads then see. Ragged batches in random chunks over pages that hold garbage,
 * streaming heads over a pool just large enough for their windows; then the same tokens in other chunks must give the same
 * bits, as after a preemption. On GPUs that holds for given tokens in chunks of two or more (backend/cuda/attention.h).
 *
 * A step is embedding (of a table with every q, k, v), RoPE and attention of all layers between begin_step and end_step, in
 * the same buffers each time: so a GPU captures steps of single tokens and runs them as graphs. The oracle takes q and k as
 * RoPE left them, whose last bits are the backend's. */
#include "backend/common/sparse.h"
#include "base/checked.h"
#include "base/half.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum {
  N_LAYERS = 3,
  N_SEQS = 4,
  KV_HEADS = 4,
  MAX_TOTAL = 800,
  MAX_PAGES = MAX_TOTAL / QTR_PAGE_TOKENS + 1,
  MAX_CHUNK = 100,
  N_ROWS = 800 + 65 + 420 + 257
};

static const int32_t totals[N_SEQS] = {800, 65, 420, 257}, decode_starts[N_SEQS] = {300, 64, 31, 192},
                     first_rows[N_SEQS] = {0, 800, 865, 1285};

enum keys { KEYS_RANDOM, KEYS_EQUAL, KEYS_ADVERSARIAL, N_KEYS };

struct world {
  struct qtr_backend *b;
  bool gpu;
  enum qtr_dtype act_dtype;
  float inv_freq[64]; /* (dim / 2) 0: no rotation */
  enum qtr_kv_format format;
  int32_t group, dim;
  enum keys keys;
  struct qtr_kv_sparse sparse;
  bool has_sparse;
  uint8_t streaming[N_LAYERS * KV_HEADS];
  struct qtr_kv *kv;
  int32_t done[N_SEQS], page[N_SEQS][MAX_PAGES], stream[N_SEQS][MAX_PAGES];
  int32_t free_stream[N_SEQS * MAX_PAGES], n_free_stream;
  float *table[N_LAYERS]; /* (N_ROWS, width) q, k, v before RoPE; row: first_rows[sequence] + position */
  struct qtr_table *embedding[N_LAYERS];
  void *qkv[N_LAYERS], *result[N_LAYERS]; /* device (N_SEQS * MAX_CHUNK, width), (…, q heads * dim) */
  float *raw;     /* (N_LAYERS, N_ROWS, KV_HEADS, dim) keys before they are stored, rounded to fp16 */
  float *k, *v;   /* the same, as stored */
  float *coded;   /* (N_LAYERS, N_ROWS, KV_HEADS) largest code * scale of V, zero point apart */
  float *q, *out; /* (N_LAYERS, N_ROWS, q heads, dim) */
};

static uint64_t state;
static size_t below(size_t n) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return (size_t)(state >> 17) % n;
}

static uint64_t mix(uint64_t x) {
  x = (x ^ x >> 31) * UINT64_C(0x7fb5d329728ea185);
  x = (x ^ x >> 27) * UINT64_C(0x81dadef4bc2dd44d);
  return x ^ x >> 33;
}

static int32_t width(const struct world *w) { return (KV_HEADS * w->group + 2 * KV_HEADS) * w->dim; }
static size_t row_at(int32_t layer, int32_t seq, int32_t t) {
  return (size_t)layer * N_ROWS + (size_t)first_rows[seq] + (size_t)t;
}
static size_t kv_at(const struct world *w, int32_t layer, int32_t seq, int32_t t, int32_t head) {
  return (row_at(layer, seq, t) * KV_HEADS + (size_t)head) * (size_t)w->dim;
}
static size_t out_at(const struct world *w, int32_t layer, int32_t seq, int32_t t, int32_t q_head) {
  return (row_at(layer, seq, t) * KV_HEADS * (size_t)w->group + (size_t)q_head) * (size_t)w->dim;
}

/* Column of q, k, v of a token. Keys of one needle page stand out; adversarial ones have logical pages whose extremes
 * promise what no key holds, and pages that differ by nothing. */
static float value(const struct world *w, int32_t layer, int32_t seq, int32_t t, int32_t column) {
  int32_t k0 = KV_HEADS * w->group * w->dim, v0 = k0 + KV_HEADS * w->dim;
  bool is_k = column >= k0 && column < v0;
  if (is_k && w->keys == KEYS_EQUAL) t = 0;
  if (is_k && w->keys == KEYS_ADVERSARIAL && t / QTR_PAGE_TOKENS % 3 == 1) t %= QTR_PAGE_TOKENS; /* equal pages: ties */
  uint64_t h = mix((uint64_t)seq << 52 ^ (uint64_t)layer << 48 ^ (uint64_t)t << 20 ^ (uint64_t)column);
  float x = (float)(h & 0xffffff) / 8388608.0f - 1.0f;
  if (is_k && t % 97 == 5) x *= 4;
  if (is_k && w->keys == KEYS_ADVERSARIAL && t % 37 == 0) x = (h >> 40 & 1 ? 1.0f : -1.0f) * (h >> 41 & 1 ? 30.0f : 1e-3f);
  return column < k0 ? 2 * x : x;
}

/* ---- a world ------------------------------------------------------------------------------------------ */

static void must(enum qtr_status status, const struct qtr_error *err) {
  if (status) fail_msg("%s", err->message);
}

/* What a sequence at `position` and later still needs of its streaming pages: page i? */
static bool needs(const struct world *w, int32_t seq, int32_t position, int32_t i) {
  const struct qtr_kv_window *c = &w->sparse.context, *d = &w->sparse.decode;
  bool given = position < decode_starts[seq];
  int32_t sink = QTR_MAX(c->sink, d->sink), local = given ? QTR_MAX(c->local, d->local) : d->local;
  return i * QTR_PAGE_TOKENS < sink || local > position || (i + 1) * QTR_PAGE_TOKENS - 1 > position - local;
}

static void garbage(struct world *w, int32_t n_pages, int32_t n_stream_pages);

static int32_t stream_pages(const struct world *w) {
  int32_t window = QTR_MAX(w->sparse.context.local, w->sparse.decode.local);
  int32_t sink = QTR_MAX(w->sparse.context.sink, w->sparse.decode.sink), one = MAX_PAGES;
  if (window < MAX_TOTAL) one = (sink + 63) / 64 + (window + MAX_CHUNK) / 64 + 2;
  return N_SEQS * QTR_MIN(one, MAX_PAGES);
}

static void open_world(struct world *w) {
  size_t row = (size_t)KV_HEADS * (size_t)w->dim, n = (size_t)N_LAYERS * N_ROWS * row;
  struct qtr_error err = {0};
  struct qtr_caps caps;
  w->b->ops->caps(w->b, &caps);
  w->act_dtype = caps.act_dtype;
  w->k = calloc(n, sizeof(float));
  w->raw = calloc(n, sizeof(float));
  w->v = calloc(n, sizeof(float));
  w->coded = calloc((size_t)N_LAYERS * N_ROWS * KV_HEADS, sizeof(float));
  w->q = calloc(n * (size_t)w->group, sizeof(float));
  w->out = calloc(n * (size_t)w->group, sizeof(float));
  for (int32_t layer = 0; layer < N_LAYERS; layer++) {
    float *x = w->table[layer] = malloc(N_ROWS * (size_t)width(w) * sizeof *x);
    for (int32_t s = 0; s < N_SEQS; s++) {
      for (int32_t t = 0; t < totals[s]; t++) {
        for (int32_t c = 0; c < width(w); c++) *x++ = value(w, layer, s, t, c);
      }
    }
    const struct qtr_table_source source = {
        .dtype = QTR_DTYPE_F32, .n_rows = N_ROWS, .dim = (size_t)width(w), .data = w->table[layer]};
    must(w->b->ops->table_create(w->b, &source, &w->embedding[layer], &err), &err);
    must(w->b->ops->alloc(w->b, N_SEQS * MAX_CHUNK * (size_t)width(w) * sizeof(float), &w->qkv[layer], &err), &err);
    must(w->b->ops->alloc(w->b, N_SEQS * MAX_CHUNK * row * (size_t)w->group * sizeof(float), &w->result[layer], &err), &err);
  }
  bool any = false;
  for (int i = 0; i < N_LAYERS * KV_HEADS; i++) any |= w->streaming[i];
  w->sparse.streaming = any ? w->streaming : NULL;
  w->sparse.group = w->group;
  w->sparse.n_slots = N_SEQS + 1;
  w->sparse.max_pages = MAX_PAGES;
  static const float scales[2 * N_LAYERS] = {0.04f, 0.02f, 0.07f, 0.017f, 0.2f, 0.01f};
  int32_t n_pages = N_SEQS * MAX_PAGES;
  const struct qtr_kv_config config = {.format = w->format,
                                       .n_layers = N_LAYERS,
                                       .n_kv_heads = KV_HEADS,
                                       .head_dim = w->dim,
                                       .n_pages = n_pages,
                                       .static_scale = scales,
                                       .sparse = w->has_sparse ? &w->sparse : NULL,
                                       .n_stream_pages = any ? stream_pages(w) : 0};
  must(w->b->ops->kv_create(w->b, &config, &w->kv, &err), &err);
  w->n_free_stream = config.n_stream_pages;
  for (int32_t i = 0; i < w->n_free_stream; i++) w->free_stream[i] = i;
  int32_t order[N_SEQS * MAX_PAGES];
  for (int32_t i = 0; i < n_pages; i++) order[i] = i * 23 % n_pages; /* 52 pages: a permutation */
  for (int32_t s = 0; s < N_SEQS; s++) {
    w->done[s] = 0;
    memcpy(w->page[s], order + s * MAX_PAGES, sizeof w->page[s]);
    for (int32_t i = 0; i < MAX_PAGES; i++) w->stream[s][i] = -1;
  }
  garbage(w, n_pages, config.n_stream_pages);
}

static void close_world(struct world *w) {
  for (int32_t layer = 0; layer < N_LAYERS; layer++) {
    w->b->ops->table_free(w->b, w->embedding[layer]);
    w->b->ops->free(w->b, w->qkv[layer]);
    w->b->ops->free(w->b, w->result[layer]);
    free(w->table[layer]);
  }
  w->b->ops->kv_free(w->b, w->kv);
  free(w->raw);
  free(w->k);
  free(w->v);
  free(w->coded);
  free(w->q);
  free(w->out);
}

static void rope_kv_write(const struct world *w, int32_t layer, void *qkv) {
  w->b->ops->rope_kv_write(w->b, &(struct qtr_rope_kv_args){.qkv = qkv,
                                                            .kv = w->kv,
                                                            .layer = layer,
                                                            .n_heads = KV_HEADS * w->group,
                                                            .n_kv_heads = KV_HEADS,
                                                            .head_dim = w->dim});
}

/* All layers in one step. */
static void run(const struct world *w, const struct qtr_batch *batch) {
  const struct qtr_backend_ops *ops = w->b->ops;
  struct qtr_error err = {0};
  must(ops->begin_step(w->b, batch, w->inv_freq, (size_t)w->dim / 2, &err), &err);
  for (int32_t layer = 0; layer < N_LAYERS; layer++) {
    ops->embed(w->b, &(struct qtr_embed_args){.table = w->embedding[layer], .out = w->qkv[layer]});
    rope_kv_write(w, layer, w->qkv[layer]);
    ops->attention(w->b, &(struct qtr_attention_args){.qkv = w->qkv[layer],
                                                      .kv = w->kv,
                                                      .out = w->result[layer],
                                                      .scale = 1 / sqrtf((float)w->dim),
                                                      .layer = layer,
                                                      .n_heads = KV_HEADS * w->group,
                                                      .n_kv_heads = KV_HEADS,
                                                      .head_dim = w->dim});
  }
  must(ops->end_step(w->b, &err), &err);
}

/* Large values in every page of both pools, statistics included. */
static void garbage(struct world *w, int32_t n_pages, int32_t n_stream_pages) {
  size_t n = QTR_PAGE_TOKENS * (size_t)width(w);
  float *host = malloc(n * sizeof *host);
  struct qtr_error err = {0};
  void *qkv;
  int32_t position[QTR_PAGE_TOKENS] = {0}, q_start[2] = {0, QTR_PAGE_TOKENS}, kv_len[1] = {0};
  for (size_t i = 0; i < n; i++) host[i] = i % 2 ? 500.0f : -700.0f;
  must(w->b->ops->upload_floats(w->b, host, n, &qkv, &err), &err);
  for (int32_t page = 0; page < n_pages; page++) {
    int32_t stream = n_stream_pages > 0 ? page % n_stream_pages : -1;
    const struct qtr_batch batch = {.n_tokens = QTR_PAGE_TOKENS,
                                    .n_seqs = 1,
                                    .max_blocks = 1,
                                    .position = position,
                                    .q_start = q_start,
                                    .kv_len = kv_len,
                                    .block_table = &page,
                                    .stream_table = n_stream_pages > 0 ? &stream : NULL};
    must(w->b->ops->begin_step(w->b, &batch, w->inv_freq, (size_t)w->dim / 2, &err), &err);
    for (int32_t layer = 0; layer < N_LAYERS; layer++) rope_kv_write(w, layer, qkv);
    must(w->b->ops->end_step(w->b, &err), &err);
  }
  w->b->ops->free(w->b, qkv);
  free(host);
}

/* K and V of a token as stored. */
static void read_back(struct world *w, int32_t layer, int32_t s, int32_t t) {
  for (int32_t h = 0; h < 2 * KV_HEADS; h++) { /* K, then V */
    bool is_v = h >= KV_HEADS, streams = w->has_sparse && w->streaming[layer * KV_HEADS + h % KV_HEADS];
    int32_t page = (streams ? w->stream : w->page)[s][t / QTR_PAGE_TOKENS];
    float scale, zero, *to = (is_v ? w->v : w->k) + kv_at(w, layer, s, t, h % KV_HEADS), most = 0;
    uint16_t code[256];
    w->b->ops->kv_read(w->b, w->kv, layer, is_v, page, t % QTR_PAGE_TOKENS, h % KV_HEADS, code, &scale, &zero);
    for (int32_t d = 0; d < w->dim; d++) {
      float apart = (float)code[d] * scale;
      if (w->format == QTR_KV_F16) {
        to[d] = qtr_f16_to_f32(code[d]);
        apart = fabsf(to[d]);
      } else if (w->format == QTR_KV_INT8_STATIC) {
        to[d] = (float)(int16_t)code[d] * scale;
        apart = to[d] + 128 * scale;
      } else {
        to[d] = apart - zero * scale;
      }
      most = fmaxf(most, apart);
    }
    if (is_v) w->coded[row_at(layer, s, t) * KV_HEADS + (size_t)(h % KV_HEADS)] = most;
  }
}

/* What RoPE made of q and k of a token: qkv (width). Without a rotation nothing but the rounding of activations. */
static void keep_rotated(struct world *w, int32_t layer, int32_t s, int32_t t, const float *qkv) {
  int32_t n_q = KV_HEADS * w->group * w->dim, n_k = KV_HEADS * w->dim;
  float *raw = w->raw + kv_at(w, layer, s, t, 0);
  memcpy(w->q + out_at(w, layer, s, t, 0), qkv, (size_t)n_q * sizeof *qkv);
  for (int32_t i = 0; i < n_k; i++) raw[i] = qtr_f16_round(qkv[n_q + i]);
  if (w->inv_freq[0] > 0) return;
  const float *given = w->table[layer] + (size_t)(first_rows[s] + t) * (size_t)width(w);
  for (int32_t i = 0; i < n_q + n_k; i++) {
    float x = w->act_dtype == QTR_DTYPE_F16 ? qtr_f16_round(given[i]) : given[i];
    if (qkv[i] != x)
      fail_msg("q or k %d of position %d is %.9g after no rotation, was %.9g", i, t, (double)qkv[i], (double)x);
  }
}

/* The next n[s] tokens of each sequence. reads: what is stored, for check_outputs. */
static void step(struct world *w, const int32_t *n, bool reads) {
  int32_t q_start[N_SEQS + 1] = {0}, kv_len[N_SEQS], decode_start[N_SEQS], slot[N_SEQS], seqs[N_SEQS], n_seqs = 0;
  int32_t table[N_SEQS * MAX_PAGES], stream[N_SEQS * MAX_PAGES];
  for (int32_t s = 0; s < N_SEQS; s++) {
    if (n[s] == 0) continue;
    int32_t last = (w->done[s] + n[s] - 1) / QTR_PAGE_TOKENS;
    for (int32_t i = 0; i < MAX_PAGES; i++) {
      bool wanted = i <= last && (i >= w->done[s] / QTR_PAGE_TOKENS || needs(w, s, w->done[s], i));
      if (!w->sparse.streaming) continue;
      if (wanted && w->stream[s][i] < 0) {
        assert_true(i >= w->done[s] / QTR_PAGE_TOKENS && w->n_free_stream > 0);
        w->stream[s][i] = w->free_stream[--w->n_free_stream];
      } else if (!wanted && w->stream[s][i] >= 0) {
        w->free_stream[w->n_free_stream++] = w->stream[s][i];
        w->stream[s][i] = -1;
      }
    }
    memcpy(table + n_seqs * MAX_PAGES, w->page[s], sizeof w->page[s]);
    memcpy(stream + n_seqs * MAX_PAGES, w->stream[s], sizeof w->stream[s]);
    seqs[n_seqs] = s;
    slot[n_seqs] = (s + 2) % (N_SEQS + 1);
    decode_start[n_seqs] = decode_starts[s];
    kv_len[n_seqs] = w->done[s];
    q_start[n_seqs + 1] = q_start[n_seqs] + n[s];
    n_seqs++;
  }
  int32_t n_tokens = q_start[n_seqs];
  size_t row = (size_t)width(w), out_row = (size_t)(KV_HEADS * w->group * w->dim);
  float *host = malloc((size_t)n_tokens * row * sizeof *host), *out = malloc((size_t)n_tokens * out_row * sizeof *out);
  int32_t *position = malloc((size_t)n_tokens * sizeof *position), *token = malloc((size_t)n_tokens * sizeof *token);
  int32_t logit_row[N_SEQS];
  struct qtr_error err = {0};
  for (int32_t i = 0; i < n_seqs; i++) {
    for (int32_t t = q_start[i]; t < q_start[i + 1]; t++) {
      position[t] = kv_len[i] + t - q_start[i];
      token[t] = first_rows[seqs[i]] + position[t];
    }
    logit_row[i] = q_start[i + 1] - 1;
  }
  const struct qtr_batch batch = {.n_tokens = n_tokens,
                                  .n_seqs = n_seqs,
                                  .n_logit_rows = n_seqs,
                                  .max_blocks = MAX_PAGES,
                                  .room_tokens = N_SEQS * MAX_CHUNK,
                                  .room_rows = N_SEQS * MAX_CHUNK,
                                  .token = token,
                                  .position = position,
                                  .q_start = q_start,
                                  .kv_len = kv_len,
                                  .block_table = table,
                                  .logit_row = logit_row,
                                  .stream_table = w->sparse.streaming ? stream : NULL,
                                  .decode_start = decode_start,
                                  .slot = slot};
  run(w, &batch);
  for (int32_t layer = 0; layer < N_LAYERS; layer++) {
    must(w->b->ops->download(w->b, w->qkv[layer], w->act_dtype, (size_t)n_tokens * row, host, &err), &err);
    must(w->b->ops->download(w->b, w->result[layer], w->act_dtype, (size_t)n_tokens * out_row, out, &err), &err);
    for (int32_t i = 0; i < n_seqs; i++) {
      for (int32_t t = q_start[i]; t < q_start[i + 1]; t++) {
        memcpy(w->out + out_at(w, layer, seqs[i], position[t], 0), out + (size_t)t * out_row, out_row * sizeof *out);
        keep_rotated(w, layer, seqs[i], position[t], host + (size_t)t * row);
        if (reads) read_back(w, layer, seqs[i], position[t]);
      }
    }
  }
  for (int32_t i = 0; i < n_seqs; i++) w->done[seqs[i]] += n[seqs[i]];
  free(host);
  free(out);
  free(position);
  free(token);
}

/* ---- the oracle ----------------------------------------------------------------------------------------- */

static const float *query_of(const struct world *w, int32_t layer, int32_t s, int32_t t, int32_t q_head) {
  return w->q + out_at(w, layer, s, t, q_head);
}

/* The bound over a page, from the keys before they were quantised. */
static double oracle_score(const struct world *w, int32_t layer, int32_t s, int32_t page, int32_t head, const float *q) {
  double best = -INFINITY;
  for (int32_t first = page * 64; first < page * 64 + 64; first += w->sparse.logical_tokens) {
    double sum = 0;
    for (int32_t d = 0; d < w->dim; d++) {
      float max = -INFINITY, min = INFINITY;
      for (int32_t t = first; t < first + w->sparse.logical_tokens; t++) {
        float x = w->raw[kv_at(w, layer, s, t, head) + (size_t)d];
        max = fmaxf(max, x);
        min = fminf(min, x);
      }
      sum += fmax((double)q[d] * (double)max, (double)q[d] * (double)min);
    }
    best = fmax(best, sum);
  }
  return best;
}

/* Which pages (below tail) the head, or its group, chooses at `position`: page by page the best of those left. */
static void oracle_choose(const struct world *w, int32_t layer, int32_t s, int32_t position, int32_t q_head, bool *chosen) {
  int32_t tail = position / QTR_PAGE_TOKENS, head = q_head / w->group;
  int32_t limit = QTR_MAX(w->sparse.budget / QTR_PAGE_TOKENS, 3), n = QTR_MIN(limit, tail + 1) - 1;
  double score[MAX_PAGES];
  memset(chosen, 0, MAX_PAGES * sizeof *chosen);
  for (int32_t page = 0; page < tail; page++) {
    score[page] = -INFINITY;
    for (int32_t h = head * w->group; h < (head + 1) * w->group; h++) {
      if (w->sparse.each_head && h != q_head) continue;
      score[page] = fmax(score[page], oracle_score(w, layer, s, page, head, query_of(w, layer, s, position, h)));
    }
  }
  for (int32_t i = 0; i < n; i++) {
    int32_t best = -1;
    for (int32_t page = 0; page < tail; page++) {
      if (chosen[page] || (i == 0 && page > 0)) continue; /* the first page comes first */
      if (best < 0 || score[page] > score[best]) best = page;
    }
    chosen[best] = true;
  }
}

/* The position at which the query at `position` has its pages chosen. */
static int32_t oracle_renewal(const struct world *w, int32_t s, int32_t position) {
  int32_t first = QTR_MAX(decode_starts[s], w->sparse.budget), at = position;
  while (at > first && (at + 1) % w->sparse.interval != 0) at--;
  return at;
}

static bool oracle_sees(const struct world *w, int32_t layer, int32_t s, int32_t position, int32_t q_head, int32_t t,
                        const bool *chosen) {
  bool given = position < decode_starts[s];
  if (w->has_sparse && w->streaming[layer * KV_HEADS + q_head / w->group]) {
    const struct qtr_kv_window *window = given ? &w->sparse.context : &w->sparse.decode;
    return t < window->sink || position - t < window->local;
  }
  if (!w->has_sparse || w->sparse.budget == 0 || given || position < w->sparse.budget) return true;
  int32_t tail = oracle_renewal(w, s, position) / QTR_PAGE_TOKENS;
  return t / QTR_PAGE_TOKENS >= tail || chosen[t / QTR_PAGE_TOKENS];
}

/* Some positions of every sequence: all around the borders, some in between. tolerance: of sums in fp32 and of scores, as a
 * share of the largest value. GPUs besides take weights as fp16, against codes without their zero points, and round the
 * result to fp16 (tests/ops/check_attention.c). */
static void check_outputs(const struct world *w, double tolerance) {
  double weight16 = w->gpu ? 0x1p-11 : 0, act = w->act_dtype == QTR_DTYPE_F16 ? 0x1p-10 : 0;
  for (int32_t layer = 0; layer < N_LAYERS; layer++) {
    for (int32_t s = 0; s < N_SEQS; s++) {
      for (int32_t p = 0; p < w->done[s]; p++) {
        bool near = abs(p - decode_starts[s]) < 5 || abs(p - w->sparse.budget) < 5 || p % 64 < 2;
        if (!near && below(8) != 0) continue;
        int32_t h = (int32_t)below((size_t)(KV_HEADS * w->group));
        bool chosen[MAX_PAGES] = {0};
        if (w->sparse.budget > 0 && p >= decode_starts[s] && p >= w->sparse.budget)
          oracle_choose(w, layer, s, oracle_renewal(w, s, p), h, chosen);
        const float *q = query_of(w, layer, s, p, h);
        double weight[MAX_TOTAL], max = -INFINITY, total = 0, v_max = 0, coded = 0;
        for (int32_t t = 0; t <= p; t++) {
          weight[t] = -INFINITY;
          if (!oracle_sees(w, layer, s, p, h, t, chosen)) continue;
          const float *k = w->k + kv_at(w, layer, s, t, h / w->group);
          weight[t] = 0;
          for (int32_t d = 0; d < w->dim; d++) weight[t] += (double)q[d] * (double)k[d];
          weight[t] /= sqrt(w->dim);
          max = fmax(max, weight[t]);
        }
        for (int32_t t = 0; t <= p; t++) total += weight[t] = exp(weight[t] - max);
        for (int32_t t = 0; t <= p; t++) {
          if (weight[t] == 0) continue;
          coded += (weight[t] / total + 0x1p-21) * (double)w->coded[row_at(layer, s, t) * KV_HEADS + (size_t)(h / w->group)];
        }
        const float *got = w->out + out_at(w, layer, s, p, h);
        for (int32_t d = 0; d < w->dim; d++) {
          double want = 0;
          for (int32_t t = 0; t <= p; t++) {
            if (weight[t] == 0) continue;
            double v = (double)w->v[kv_at(w, layer, s, t, h / w->group) + (size_t)d];
            want += weight[t] / total * v;
            v_max = fmax(v_max, fabs(v));
          }
          double allowed = tolerance * v_max + weight16 * coded + act * (fabs(want) + 0x1p-14);
          if (!(fabs(want - (double)got[d]) <= allowed)) {
            fail_msg("layer %d, sequence %d, position %d, head %d, dim %d: %.7g, expected %.7g within %g", layer, s, p, h, d,
                     (double)got[d], want, allowed);
          }
        }
      }
    }
  }
}

/* Statistics of all complete and the last logical pages, and the pages chosen last, of every retrieval head. */
static void check_selections(const struct world *w) {
  if (w->sparse.budget == 0) return;
  float max[256], min[256];
  for (int32_t layer = 0; layer < N_LAYERS; layer++) {
    for (int32_t q_head = 0; q_head < KV_HEADS * w->group; q_head++) {
      int32_t head = q_head / w->group;
      if (w->streaming[layer * KV_HEADS + head]) continue;
      for (int32_t s = 0; s < N_SEQS; s++) {
        if (w->done[s] == 0) continue;
        int32_t logical = (int32_t)below((size_t)((w->done[s] - 1) / w->sparse.logical_tokens + 1)),
                per = 64 / w->sparse.logical_tokens;
        if (below(2)) logical = (w->done[s] - 1) / w->sparse.logical_tokens;
        w->b->ops->stats_read(w->b, w->kv, layer, w->page[s][logical / per], logical % per, head, max, min);
        for (int32_t d = 0; d < w->dim; d++) {
          float most = -INFINITY, least = INFINITY;
          for (int32_t t = logical * w->sparse.logical_tokens;
               t < QTR_MIN((logical + 1) * w->sparse.logical_tokens, w->done[s]); t++) {
            float x = w->raw[kv_at(w, layer, s, t, head) + (size_t)d];
            most = fmaxf(most, x);
            least = fminf(least, x);
          }
          if (max[d] == most && min[d] == least) continue;
          fail_msg(
              "layer %d, KV head %d, sequence %d of %d tokens, logical page %d, dim %d: extremes %g and %g, expected %g and "
              "%g",
              layer, head, s, w->done[s], logical, d, (double)max[d], (double)min[d], (double)most, (double)least);
        }
        int32_t p = w->done[s] - 1, page[MAX_PAGES], n = -1, tail = -1;
        if (p < decode_starts[s] || p < w->sparse.budget) continue;
        bool chosen[MAX_PAGES];
        int32_t at = oracle_renewal(w, s, p), k = 0;
        oracle_choose(w, layer, s, at, q_head, chosen);
        w->b->ops->selection_read(w->b, w->kv, layer, q_head, (s + 2) % (N_SEQS + 1), page, &n, &tail);
        assert_int_equal(tail, at / QTR_PAGE_TOKENS);
        for (int32_t i = 0; i < tail; i++) {
          if (!chosen[i]) continue;
          if (k >= n || page[k] != i)
            fail_msg("layer %d, head %d, sequence %d, position %d: page %d is not chosen", layer, q_head, s, p, i);
          k++;
        }
        assert_int_equal(k, n);
      }
    }
  }
}

/* How a run is cut into chunks. */
enum cut {
  CUT_ANY,
  CUT_PAIRS, /* given tokens not by one: GPUs have another kernel for these */
  CUT_APART  /* and generated ones by one, as an engine computes them first: in a dense cache their kernel is by the chunk */
};

static int32_t cut_chunk(enum cut cut, int32_t n, int32_t given_left) {
  if (cut == CUT_ANY || n == 0) return n;
  if (given_left <= 0) return cut == CUT_APART ? 1 : n;
  if (cut == CUT_APART && n > given_left) n = given_left;
  if (n < 2) n = 2;
  if (given_left - n == 1) n = n > 2 ? n - 1 : 3;
  return n;
}

/* Everything in random chunks; single tokens come often once text is generated. */
static void run_all(struct world *w, enum cut cut, bool check) {
  for (int32_t left = 1, n_steps = 0; left > 0; n_steps++) {
    int32_t n[N_SEQS];
    left = 0;
    for (int32_t s = 0; s < N_SEQS; s++) {
      int32_t most = QTR_MIN(totals[s] - w->done[s], (int32_t)MAX_CHUNK);
      n[s] = most == 0 || below(4) == 0 ? 0 : 1 + (int32_t)below((size_t)most);
      if (n[s] > 0 && w->done[s] > decode_starts[s] && below(4) != 0) n[s] = 1;
      n[s] = cut_chunk(cut, n[s], decode_starts[s] - w->done[s]);
      left += totals[s] - w->done[s] - n[s];
    }
    if (n[0] + n[1] + n[2] + n[3] > 0) step(w, n, check);
    left = left < 0 ? 0 : left;
    if (check && n_steps % 7 == 0) check_selections(w);
  }
  for (int32_t s = 0; s < N_SEQS; s++) assert_int_equal(w->done[s], totals[s]);
}

/* ---- the tests --------------------------------------------------------------------------------------------- */

static const struct device {
  const char *name, *isa;
  double tolerance; /* as a share of the largest value */
  bool gpu;
} all_devices[] = {{"reference", NULL, 1e-6, false}, {"cpu", "portable", 1e-4, false}, {"cpu", "avx2", 1e-4, false},
                   {"cpu", "avx512", 1e-4, false},   {"cpu", "amx", 3e-4, false},      {"cuda", NULL, 5e-4, true}};
enum { CUDA = sizeof all_devices / sizeof all_devices[0] - 1 };

static const struct device *devices = all_devices; /* to be tested */
static size_t n_devices = CUDA;

static struct qtr_backend *open_device(const struct device *d) {
  struct qtr_backend *b = NULL;
  struct qtr_error err = {0};
  const struct qtr_backend_options options = {.threads = 3, .isa = d->isa};
  if (qtr_backend_open(d->name, &options, &b, &err) == QTR_OK) return b;
  print_message("skipped: %s %s: %s\n", d->name, d->isa, err.message);
  return NULL;
}

static const struct qtr_kv_sparse settings[] = {
    {.context = {70, 90}, .decode = {3, 33}, .budget = 192, .interval = 4, .logical_tokens = 16},
    {.context = {0, QTR_ALL_TOKENS},
     .decode = {64, 128},
     .budget = 64,
     .interval = 1,
     .logical_tokens = 32,
     .each_head = true},
    {.context = {5, 1}, .decode = {0, 64}, .budget = 0},
    {.context = {130, 64}, .decode = {128, 256}, .budget = 320, .interval = 70, .logical_tokens = 64, .each_head = true},
    {.context = {200, 40}, .decode = {1, 300}, .budget = 256, .interval = 5, .logical_tokens = 16},
};
enum { N_SETTINGS = sizeof settings / sizeof settings[0] };

/* Shapes: GPUs have kernels for head sizes of 64 and 128, and one for all others. Random keys are rotated, so that
 * statistics must be of what RoPE leaves; the others stay as they are. */
static void make_world(struct world *w, const struct device *d, struct qtr_backend *b, enum qtr_kv_format format,
                       int setting) {
  static const int32_t groups[] = {2, 3, 1}, dims[] = {32, 16, 64}, gpu_groups[] = {4, 1, 8, 2, 3},
                       gpu_dims[] = {128, 64, 64, 128, 80};
  *w = (struct world){.b = b, .gpu = d->gpu, .format = format, .has_sparse = true, .sparse = settings[setting]};
  w->group = d->gpu ? gpu_groups[(setting + (int)format) % 5] : groups[setting % 3];
  w->dim = d->gpu ? gpu_dims[(setting + (int)format) % 5] : dims[(setting + 1) % 3];
  w->keys = (enum keys)((setting + (int)format) % N_KEYS);
  for (int32_t i = 0; i < w->dim / 2 && w->keys == KEYS_RANDOM; i++)
    w->inv_freq[i] = powf(10000, -2 * (float)i / (float)w->dim);
  for (int i = 0; i < N_LAYERS * KV_HEADS; i++) /* layer 1 has no streaming heads, layer 2 of some settings nothing else */
    w->streaming[i] = i / KV_HEADS != 1 && ((i + setting) % 2 || (i / KV_HEADS == 2 && setting % 2));
}

static void check_same_bits(const struct world *a, const struct world *b, const char *what) {
  for (int32_t layer = 0; layer < N_LAYERS; layer++) {
    for (int32_t s = 0; s < N_SEQS; s++) {
      size_t from = out_at(a, layer, s, 0, 0), to = from + (size_t)(totals[s] * KV_HEADS * a->group * a->dim);
      for (size_t i = from; i < to; i++) {
        if (qtr_f32_bits(a->out[i]) == qtr_f32_bits(b->out[i])) continue;
        size_t value = (i - from) % (size_t)(KV_HEADS * a->group * a->dim), row = (size_t)(KV_HEADS * a->group * a->dim);
        fail_msg("%s: layer %d, sequence %d, position %zu, value %zu is %.9g and %.9g", what, layer, s, (i - from) / row,
                 value, (double)a->out[i], (double)b->out[i]);
      }
    }
  }
}

static void check_device(const struct device *d) {
  struct qtr_backend *b = open_device(d);
  if (!b) return;
  enum cut cut = d->gpu ? CUT_PAIRS : CUT_ANY;
  for (int format = 0; format < QTR_N_KV_FORMATS; format++) {
    for (int setting = 0; setting < N_SETTINGS; setting++) {
      struct world first, second;
      char what[96];
      if (!d->gpu && (setting + format + (d->isa ? (int)strlen(d->isa) : 1)) % 2) continue; /* each a half of them */
      state = (uint64_t)(1 + setting * 10 + format);
      make_world(&first, d, b, (enum qtr_kv_format)format, setting);
      make_world(&second, d, b, (enum qtr_kv_format)format, setting);
      (void)snprintf(what, sizeof what, "%s %s, %s, setting %d, group %d, head size %d: other chunks", d->name,
                     d->isa ? d->isa : "", qtr_kv_format_name((enum qtr_kv_format)format), setting, first.group, first.dim);
      open_world(&first);
      run_all(&first, cut, true);
      check_outputs(&first, d->tolerance);
      check_selections(&first);
      if (d->gpu || d->isa || format == setting % 4) { /* other chunks */
        open_world(&second);
        run_all(&second, cut, false);
        check_selections(&second);
        check_same_bits(&first, &second, what);
        close_world(&second);
      }
      close_world(&first);
    }
  }
  qtr_backend_close(b);
}

static void test_devices(void **s) {
  (void)s;
  for (size_t i = 0; i < n_devices; i++) check_device(&devices[i]);
}

/* No streaming heads and a budget that is never reached: not a bit differs from a dense cache. */
static void test_dense(void **unused) {
  (void)unused;
  for (size_t i = 0; i < n_devices; i++) {
    const struct device *d = &devices[i];
    struct qtr_backend *b = open_device(d);
    if (!b) continue;
    for (int format = (int)i % 2; format < QTR_N_KV_FORMATS; format += d->gpu ? 1 : 2) {
      struct world w[2];
      for (int k = 0; k < 2; k++) {
        state = 77;
        make_world(&w[k], d, b, (enum qtr_kv_format)format, 0);
        w[k].keys = KEYS_RANDOM;
        w[k].has_sparse = k == 1;
        memset(w[k].streaming, 0, sizeof w[k].streaming);
        w[k].sparse.budget = k == 1 ? MAX_PAGES * QTR_PAGE_TOKENS : 0;
        open_world(&w[k]);
        run_all(&w[k], d->gpu ? CUT_APART : CUT_ANY, k == 0);
      }
      check_outputs(&w[0], d->tolerance);
      check_same_bits(&w[0], &w[1], "a large budget");
      close_world(&w[0]);
      close_world(&w[1]);
    }
    qtr_backend_close(b);
  }
}

/* The choice among many pages against sorting, with ties, infinities and NaN. */
static void test_choose(void **unused) {
  (void)unused;
  enum { N = 3000 };
  static double score[N], copy[N];
  static int32_t order[N];
  struct qtr_selection *s = malloc(sizeof *s + N * sizeof(int32_t));
  state = 5;
  for (int round = 0; round < 300; round++) {
    int32_t tail = (int32_t)below(round < 100 ? 12 : N), limit = 3 + (int32_t)below(round % 2 ? 20 : 400),
            kinds = 1 + (int32_t)below(50);
    for (int32_t i = 0; i < tail; i++) {
      score[i] = (double)below((size_t)(round % 3 ? 1000000 : kinds)) - 5;
      if (below(200) == 0) score[i] = below(2) ? -INFINITY : INFINITY;
      if (below(200) == 0) score[i] = (double)NAN;
      copy[i] = isnan(score[i]) ? -INFINITY : score[i];
    }
    qtr_sparse_choose(score, tail, limit, order, s);
    assert_int_equal(s->tail, tail);
    assert_int_equal(s->n, QTR_MIN(tail, limit - 1));
    if (s->n == 0) continue;
    assert_int_equal(s->page[0], 0);
    for (int32_t i = 1, k = 1; i < tail; i++) { /* chosen: fewer than n - 1 pages are better */
      int32_t better = 0;
      for (int32_t j = 1; j < tail && better < s->n; j++) better += copy[j] > copy[i] || (copy[j] == copy[i] && j < i);
      bool chosen = k < s->n && s->page[k] == i;
      assert_int_equal(chosen, better < s->n - 1);
      k += chosen;
    }
  }
  free(s);
}

static void test_bad_settings(void **unused) {
  (void)unused;
  static const uint8_t streaming[2] = {1, 0};
  const struct qtr_kv_sparse good = {.streaming = streaming,
                                     .context = {0, 1},
                                     .decode = {0, 1},
                                     .budget = 64,
                                     .interval = 1,
                                     .logical_tokens = 16,
                                     .group = 1,
                                     .n_slots = 1,
                                     .max_pages = 4};
  struct qtr_kv_sparse bad[10];
  for (size_t i = 0; i < 10; i++) bad[i] = good;
  bad[0].context.local = 0;
  bad[1].decode.sink = -1;
  bad[2].budget = 100;
  bad[3].interval = 0;
  bad[4].logical_tokens = 8;
  bad[5].n_slots = 0;
  bad[6].max_pages = 0;
  bad[7].group = 0;
  bad[8].budget = -64;
  bad[9].streaming = NULL; /* and pages for streaming heads */
  for (size_t d = 0; d < n_devices && d < 2; d++) {
    struct qtr_backend *b = open_device(&devices[d]);
    if (!b) continue;
    struct qtr_error err = {0};
    struct qtr_kv *kv = NULL;
    struct qtr_kv_config config = {
        .format = QTR_KV_INT4, .n_layers = 1, .n_kv_heads = 2, .head_dim = 16, .n_pages = 4, .n_stream_pages = 3};
    config.sparse = &good;
    must(b->ops->kv_create(b, &config, &kv, &err), &err);
    b->ops->kv_free(b, kv);
    size_t head = 2 * 64 * (16 / 2 + 4); /* K and V of one head and page */
    assert_int_equal(qtr_kv_page_bytes(&config), head + 4 * 2 * 16 * 2);
    assert_int_equal(qtr_kv_stream_page_bytes(&config), head);
    for (size_t i = 0; i < 10; i++) {
      config.sparse = &bad[i];
      if (b->ops->kv_create(b, &config, &kv, &err) != QTR_ERR_ARGUMENT) fail_msg("setting %zu was accepted", i);
    }
    qtr_backend_close(b);
  }
}

int main(int argc, char **argv) {
  if (argc > 1) {
    devices = &all_devices[CUDA];
    n_devices = 1;
    if (argc > 2 || strcmp(argv[1], devices->name) != 0) {
      (void)fprintf(stderr, "usage: test_backend_sparse [cuda]\n");
      return 2;
    }
    struct qtr_backend *b = NULL;
    struct qtr_error err = {0};
    enum qtr_status status = qtr_backend_open(devices->name, NULL, &b, &err);
    qtr_backend_close(b);
    if (status) {
      (void)fprintf(stderr, "%s\n", err.message);
      return status == QTR_ERR_UNSUPPORTED || status == QTR_ERR_NOT_FOUND ? 77 : 1;
    }
  }
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_choose), cmocka_unit_test(test_bad_settings),
                                     cmocka_unit_test(test_devices), cmocka_unit_test(test_dense)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
