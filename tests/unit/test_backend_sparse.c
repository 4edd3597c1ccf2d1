/* Sparse attention of every CPU backend and instruction set against an oracle of its own in float64 (backend.h, struct
 * qtr_kv_sparse; spec D): streaming heads at token granularity, statistics of keys, the choice of pages - page for page -
 * and what the heads then see. Ragged batches in random chunks over pages that hold garbage, streaming heads over a pool
 * just large enough for their windows; then the same tokens in other chunks must give the same bits, as after a preemption.
 */
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
  MAX_Q_HEADS = 12
};

static const int32_t totals[N_SEQS] = {800, 65, 420, 257}, decode_starts[N_SEQS] = {300, 64, 31, 192};

enum keys { KEYS_RANDOM, KEYS_EQUAL, KEYS_ADVERSARIAL, N_KEYS };

struct world {
  struct qtr_backend *b;
  enum qtr_kv_format format;
  int32_t group, dim;
  enum keys keys;
  struct qtr_kv_sparse sparse;
  bool has_sparse;
  uint8_t streaming[N_LAYERS * KV_HEADS];
  struct qtr_kv *kv;
  int32_t done[N_SEQS], page[N_SEQS][MAX_PAGES], stream[N_SEQS][MAX_PAGES];
  int32_t free_stream[N_SEQS * MAX_PAGES], n_free_stream;
  float *raw;   /* (N_LAYERS, N_SEQS, MAX_TOTAL, KV_HEADS, dim) keys before they are stored, rounded to fp16 */
  float *k, *v; /* the same, as stored */
  float *out;   /* (N_LAYERS, N_SEQS, MAX_TOTAL, q heads, dim) */
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
static size_t kv_at(const struct world *w, int32_t layer, int32_t seq, int32_t t, int32_t head) {
  return ((((size_t)layer * N_SEQS + (size_t)seq) * MAX_TOTAL + (size_t)t) * KV_HEADS + (size_t)head) * (size_t)w->dim;
}
static size_t out_at(const struct world *w, int32_t layer, int32_t seq, int32_t t, int32_t q_head) {
  size_t heads = KV_HEADS * (size_t)w->group;
  return ((((size_t)layer * N_SEQS + (size_t)seq) * MAX_TOTAL + (size_t)t) * heads + (size_t)q_head) * (size_t)w->dim;
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

static void garbage(struct world *w, int32_t n_pages);

static int32_t stream_pages(const struct world *w) { /* chunks of at most 100 tokens */
  int32_t window = QTR_MAX(w->sparse.context.local, w->sparse.decode.local);
  int32_t sink = QTR_MAX(w->sparse.context.sink, w->sparse.decode.sink), one = MAX_PAGES;
  if (window < MAX_TOTAL) one = (sink + 63) / 64 + (window + 100) / 64 + 2;
  return N_SEQS * QTR_MIN(one, MAX_PAGES);
}

static void open_world(struct world *w) {
  size_t n = (size_t)N_LAYERS * N_SEQS * MAX_TOTAL * KV_HEADS * (size_t)w->dim;
  w->k = calloc(n, sizeof(float));
  w->raw = calloc(n, sizeof(float));
  for (int32_t layer = 0; layer < N_LAYERS; layer++) {
    for (int32_t s = 0; s < N_SEQS; s++) {
      for (int32_t i = 0; i < MAX_TOTAL * KV_HEADS * w->dim; i++) {
        int32_t row = KV_HEADS * w->dim;
        w->raw[kv_at(w, layer, s, 0, 0) + (size_t)i] =
            qtr_f16_round(value(w, layer, s, i / row, KV_HEADS * w->group * w->dim + i % row));
      }
    }
  }
  w->v = calloc(n, sizeof(float));
  w->out = calloc(n * (size_t)w->group, sizeof(float));
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
  struct qtr_error err = {0};
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
  garbage(w, config.n_stream_pages ? QTR_MIN(n_pages, config.n_stream_pages) : n_pages);
}

static void close_world(struct world *w) {
  w->b->ops->kv_free(w->b, w->kv);
  free(w->raw);
  free(w->k);
  free(w->v);
  free(w->out);
}

static void run(struct world *w, const struct qtr_batch *batch, int32_t layer, const float *host, float *out) {
  const struct qtr_backend_ops *ops = w->b->ops;
  struct qtr_error err = {0};
  float inv_freq[128] = {0}; /* no rotation: keys are what the oracle has */
  size_t n = (size_t)batch->n_tokens, q = (size_t)(KV_HEADS * w->group * w->dim);
  void *qkv, *result;
  must(ops->upload_floats(w->b, host, n * (size_t)width(w), &qkv, &err), &err);
  must(ops->alloc(w->b, n * q * sizeof(float), &result, &err), &err);
  must(ops->begin_step(w->b, batch, inv_freq, (size_t)w->dim / 2, &err), &err);
  ops->rope_kv_write(w->b, &(struct qtr_rope_kv_args){.qkv = qkv,
                                                      .kv = w->kv,
                                                      .layer = layer,
                                                      .n_heads = KV_HEADS * w->group,
                                                      .n_kv_heads = KV_HEADS,
                                                      .head_dim = w->dim});
  if (out) {
    ops->attention(w->b, &(struct qtr_attention_args){.qkv = qkv,
                                                      .kv = w->kv,
                                                      .out = result,
                                                      .scale = 1 / sqrtf((float)w->dim),
                                                      .layer = layer,
                                                      .n_heads = KV_HEADS * w->group,
                                                      .n_kv_heads = KV_HEADS,
                                                      .head_dim = w->dim});
    must(ops->download(w->b, result, QTR_DTYPE_F32, n * q, out, &err), &err);
  }
  must(ops->end_step(w->b, &err), &err);
  ops->free(w->b, qkv);
  ops->free(w->b, result);
}

/* Large values in every page of both pools, statistics included. */
static void garbage(struct world *w, int32_t n_pages) {
  float *host = malloc(QTR_PAGE_TOKENS * (size_t)width(w) * sizeof *host);
  int32_t position[QTR_PAGE_TOKENS] = {0}, q_start[2] = {0, QTR_PAGE_TOKENS}, kv_len[1] = {0};
  for (size_t i = 0; i < QTR_PAGE_TOKENS * (size_t)width(w); i++) host[i] = i % 2 ? 500.0f : -700.0f;
  for (int32_t page = 0; page < n_pages; page++) {
    const struct qtr_batch batch = {.n_tokens = QTR_PAGE_TOKENS,
                                    .n_seqs = 1,
                                    .max_blocks = 1,
                                    .position = position,
                                    .q_start = q_start,
                                    .kv_len = kv_len,
                                    .block_table = &page};
    for (int32_t layer = 0; layer < N_LAYERS; layer++) run(w, &batch, layer, host, NULL);
  }
  free(host);
}

/* The next n[s] tokens of each sequence. */
static void step(struct world *w, const int32_t *n) {
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
  int32_t *position = malloc((size_t)n_tokens * sizeof *position);
  uint16_t code[256];
  for (int32_t i = 0; i < n_seqs; i++) {
    for (int32_t t = q_start[i]; t < q_start[i + 1]; t++) position[t] = kv_len[i] + t - q_start[i];
  }
  const struct qtr_batch batch = {.n_tokens = n_tokens,
                                  .n_seqs = n_seqs,
                                  .max_blocks = MAX_PAGES,
                                  .position = position,
                                  .q_start = q_start,
                                  .kv_len = kv_len,
                                  .block_table = table,
                                  .stream_table = w->sparse.streaming ? stream : NULL,
                                  .decode_start = decode_start,
                                  .slot = slot};
  for (int32_t layer = 0; layer < N_LAYERS; layer++) {
    for (int32_t i = 0; i < n_seqs; i++) {
      for (int32_t t = q_start[i]; t < q_start[i + 1]; t++) {
        for (int32_t c = 0; c < width(w); c++) host[(size_t)t * row + (size_t)c] = value(w, layer, seqs[i], position[t], c);
      }
    }
    run(w, &batch, layer, host, out);
    for (int32_t i = 0; i < n_seqs; i++) {
      for (int32_t t = q_start[i]; t < q_start[i + 1]; t++) {
        memcpy(w->out + out_at(w, layer, seqs[i], position[t], 0), out + (size_t)t * out_row, out_row * sizeof *out);
        for (int32_t h = 0; h < 2 * KV_HEADS; h++) { /* K, then V */
          bool is_v = h >= KV_HEADS, streams = w->streaming[layer * KV_HEADS + h % KV_HEADS];
          const int32_t *pages = (streams ? stream : table) + i * MAX_PAGES;
          float scale, zero, *to = (is_v ? w->v : w->k) + kv_at(w, layer, seqs[i], position[t], h % KV_HEADS);
          w->b->ops->kv_read(w->b, w->kv, layer, is_v, pages[position[t] / QTR_PAGE_TOKENS], position[t] % QTR_PAGE_TOKENS,
                             h % KV_HEADS, code, &scale, &zero);
          for (int32_t d = 0; d < w->dim; d++) {
            to[d] = w->format == QTR_KV_F16           ? qtr_f16_to_f32(code[d])
                    : w->format == QTR_KV_INT8_STATIC ? (float)(int16_t)code[d] * scale
                                                      : (float)code[d] * scale - zero * scale;
          }
        }
      }
    }
  }
  for (int32_t i = 0; i < n_seqs; i++) w->done[seqs[i]] += n[seqs[i]];
  free(host);
  free(out);
  free(position);
}

/* ---- the oracle ----------------------------------------------------------------------------------------- */

static const float *query_of(const struct world *w, int32_t layer, int32_t s, int32_t t, int32_t q_head, float *q) {
  for (int32_t d = 0; d < w->dim; d++) q[d] = value(w, layer, s, t, q_head * w->dim + d);
  return q;
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
  float q[256];
  memset(chosen, 0, MAX_PAGES * sizeof *chosen);
  for (int32_t page = 0; page < tail; page++) {
    score[page] = -INFINITY;
    for (int32_t h = head * w->group; h < (head + 1) * w->group; h++) {
      if (w->sparse.each_head && h != q_head) continue;
      score[page] = fmax(score[page], oracle_score(w, layer, s, page, head, query_of(w, layer, s, position, h, q)));
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

/* Some positions of every sequence: all around the borders, some in between. */
static void check_outputs(const struct world *w, double tolerance) {
  float q[256];
  for (int32_t layer = 0; layer < N_LAYERS; layer++) {
    for (int32_t s = 0; s < N_SEQS; s++) {
      for (int32_t p = 0; p < w->done[s]; p++) {
        bool near = abs(p - decode_starts[s]) < 5 || abs(p - w->sparse.budget) < 5 || p % 64 < 2;
        if (!near && below(8) != 0) continue;
        int32_t h = (int32_t)below((size_t)(KV_HEADS * w->group));
        bool chosen[MAX_PAGES] = {0};
        if (w->sparse.budget > 0 && p >= decode_starts[s] && p >= w->sparse.budget)
          oracle_choose(w, layer, s, oracle_renewal(w, s, p), h, chosen);
        (void)query_of(w, layer, s, p, h, q);
        double weight[MAX_TOTAL], max = -INFINITY, total = 0, v_max = 0;
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
        const float *got = w->out + out_at(w, layer, s, p, h);
        for (int32_t d = 0; d < w->dim; d++) {
          double want = 0;
          for (int32_t t = 0; t <= p; t++) {
            if (weight[t] == 0) continue;
            double v = (double)w->v[kv_at(w, layer, s, t, h / w->group) + (size_t)d];
            want += weight[t] / total * v;
            v_max = fmax(v_max, fabs(v));
          }
          if (!(fabs(want - (double)got[d]) <= tolerance * v_max)) {
            fail_msg("layer %d, sequence %d, position %d, head %d, dim %d: %.7g, expected %.7g (largest value %g)", layer, s,
                     p, h, d, (double)got[d], want, v_max);
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
          assert_true(max[d] == most && min[d] == least);
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

/* Everything in random chunks; single tokens come often once text is generated. */
static void run_all(struct world *w, bool check) {
  for (int32_t left = 1, n_steps = 0; left > 0; n_steps++) {
    int32_t n[N_SEQS];
    left = 0;
    for (int32_t s = 0; s < N_SEQS; s++) {
      int32_t most = QTR_MIN(totals[s] - w->done[s], 100);
      n[s] = most == 0 || below(4) == 0 ? 0 : 1 + (int32_t)below((size_t)most);
      if (n[s] > 0 && w->done[s] > decode_starts[s] && below(4) != 0) n[s] = 1;
      left += totals[s] - w->done[s] - n[s];
    }
    if (n[0] + n[1] + n[2] + n[3] > 0) step(w, n);
    left = left < 0 ? 0 : left;
    if (check && n_steps % 7 == 0) check_selections(w);
  }
  for (int32_t s = 0; s < N_SEQS; s++) assert_int_equal(w->done[s], totals[s]);
}

/* ---- the tests --------------------------------------------------------------------------------------------- */

static const struct device {
  const char *name, *isa;
  double tolerance; /* as a share of the largest value */
} devices[] = {{"reference", NULL, 1e-6},
               {"cpu", "portable", 1e-4},
               {"cpu", "avx2", 1e-4},
               {"cpu", "avx512", 1e-4},
               {"cpu", "amx", 3e-4}};

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

static void make_world(struct world *w, struct qtr_backend *b, enum qtr_kv_format format, int setting) {
  static const int32_t groups[] = {2, 3, 1}, dims[] = {32, 16, 64};
  *w = (struct world){.b = b, .format = format, .has_sparse = true, .sparse = settings[setting]};
  w->group = groups[setting % 3];
  w->dim = dims[(setting + 1) % 3];
  w->keys = (enum keys)((setting + (int)format) % N_KEYS);
  for (int i = 0; i < N_LAYERS * KV_HEADS; i++) /* layer 1 has no streaming heads, layer 2 of some settings nothing else */
    w->streaming[i] = i / KV_HEADS != 1 && ((i + setting) % 2 || (i / KV_HEADS == 2 && setting % 2));
}

static void check_device(const struct device *d) {
  struct qtr_backend *b = open_device(d);
  if (!b) return;
  for (int format = 0; format < QTR_N_KV_FORMATS; format++) {
    for (int setting = 0; setting < N_SETTINGS; setting++) {
      struct world first, second;
      if ((setting + format + (d->isa ? (int)strlen(d->isa) : 1)) % 2) continue; /* each a half of them */
      state = (uint64_t)(1 + setting * 10 + format);
      make_world(&first, b, (enum qtr_kv_format)format, setting);
      make_world(&second, b, (enum qtr_kv_format)format, setting);
      open_world(&first);
      run_all(&first, true);
      check_outputs(&first, d->tolerance);
      check_selections(&first);
      if (d->isa || format == setting % 4) { /* other chunks */
        open_world(&second);
        run_all(&second, false);
        check_selections(&second);
        size_t n = (size_t)N_LAYERS * N_SEQS * MAX_TOTAL * KV_HEADS * (size_t)(first.dim * first.group);
        for (size_t i = 0; i < n; i++) {
          if (qtr_f32_bits(first.out[i]) != qtr_f32_bits(second.out[i]))
            fail_msg("%s %s: setting %d, value %zu differs in other chunks", d->name, d->isa, setting, i);
        }
        close_world(&second);
      }
      close_world(&first);
    }
  }
  qtr_backend_close(b);
}

static void test_reference(void **s) {
  (void)s;
  check_device(&devices[0]);
}
static void test_cpu(void **s) {
  (void)s;
  for (size_t i = 1; i < sizeof devices / sizeof devices[0]; i++) check_device(&devices[i]);
}

/* No streaming heads and a budget that is never reached: not a bit differs from a dense cache. */
static void test_dense(void **unused) {
  (void)unused;
  for (size_t i = 0; i < sizeof devices / sizeof devices[0]; i++) {
    struct qtr_backend *b = open_device(&devices[i]);
    if (!b) continue;
    for (int format = (int)i % 2; format < QTR_N_KV_FORMATS; format += 2) {
      struct world w[2];
      for (int k = 0; k < 2; k++) {
        state = 77;
        make_world(&w[k], b, (enum qtr_kv_format)format, 0);
        w[k].keys = KEYS_RANDOM;
        w[k].has_sparse = k == 1;
        memset(w[k].streaming, 0, sizeof w[k].streaming);
        w[k].sparse.budget = k == 1 ? MAX_PAGES * QTR_PAGE_TOKENS : 0;
        open_world(&w[k]);
        run_all(&w[k], false);
      }
      check_outputs(&w[0], devices[i].tolerance);
      size_t n = (size_t)N_LAYERS * N_SEQS * MAX_TOTAL * KV_HEADS * (size_t)(w[0].dim * w[0].group);
      assert_memory_equal(w[0].out, w[1].out, n * sizeof(float));
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
  for (size_t d = 0; d < 2; d++) {
    struct qtr_backend *b = open_device(&devices[d]);
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

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_choose), cmocka_unit_test(test_bad_settings),
                                     cmocka_unit_test(test_reference), cmocka_unit_test(test_cpu),
                                     cmocka_unit_test(test_dense)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
