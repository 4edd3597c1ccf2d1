/* KV cache and attention of the CPU backend, every instruction set this machine has:
 * - codes, scales and zeros are the reference's bit for bit, also for rows that are flat, huge, tiny or not numbers;
 * - attention is the reference's to a few times the rounding of fp32;
 * - the bits of a row do not depend on how its prompt was cut into steps, nor on what else is in the batch, nor on the
 * threads. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "backend/backend.h"
#include "base/half.h"

enum { MAX_SEQS = 6, N_LAYERS = 2, LAYER = 1 };

static const char *const isas[] = {"portable", "avx2", "avx512", "vnni", "amx"};
enum { N_ISAS = 5 };

/* NULL when this machine lacks it. */
static struct qtr_backend *open_cpu(const char *isa, int32_t threads) {
  struct qtr_backend_options options = {.threads = threads, .isa = isa};
  struct qtr_backend *b = NULL;
  struct qtr_error err;
  enum qtr_status status = qtr_backend_cpu.open(&options, &b, &err);
  if (status != QTR_OK) assert_int_equal(status, QTR_ERR_UNSUPPORTED);
  return b;
}

static struct qtr_backend *open_reference(void) {
  struct qtr_backend_options options = {0};
  struct qtr_backend *b = NULL;
  assert_int_equal(qtr_backend_reference.open(&options, &b, NULL), QTR_OK);
  return b;
}

static uint64_t mix(uint64_t x) {
  x ^= x >> 33;
  x *= UINT64_C(0xff51afd7ed558ccd);
  x ^= x >> 33;
  x *= UINT64_C(0xc4ceb9fe1a85ec53);
  return x ^ x >> 33;
}
static uint64_t random_state;
static uint32_t random_below(uint32_t n) { return (uint32_t)(mix(++random_state * UINT64_C(0x9e3779b97f4a7c15)) % n); }

struct shape {
  enum qtr_kv_format format;
  int32_t n_heads, n_kv_heads, dim;
};

/* Activations are a function of (sequence, position, column): normal-like, some channels of K with an offset, as in real
 * models. */
static float value(const struct shape *s, int32_t seq, int32_t position, int32_t column) {
  uint64_t h = mix(((uint64_t)seq << 48 ^ (uint64_t)position << 20 ^ (uint64_t)column) + UINT64_C(0x9e3779b97f4a7c15));
  float sum = 0;
  for (int i = 0; i < 4; i++) sum += (float)(h >> (16 * i) & 0xffff) / 65536.0f - 0.5f;
  sum *= 1.7f;
  bool is_k = column >= s->n_heads * s->dim && column < (s->n_heads + s->n_kv_heads) * s->dim;
  if (is_k && column % s->dim % 16 == 3) sum += 3.0f;
  return sum;
}

/* ---- a backend with a cache and sequences ------------------------------------------------------------- */

struct world {
  struct shape shape;
  struct qtr_backend *b;
  struct qtr_kv *kv;
  int32_t n_seqs, total[MAX_SEQS], done[MAX_SEQS], max_blocks, *block_table; /* (n_seqs, max_blocks) */
  float *out[MAX_SEQS];                                                      /* (total, n_heads * dim) */
  float *inv_freq;
};

static void world_open_fp8(struct world *w, struct qtr_backend *b, const struct shape *shape, int32_t n_seqs,
                           const int32_t *total, enum qtr_kv_fp8 fp8) {
  *w = (struct world){.shape = *shape, .b = b, .n_seqs = n_seqs};
  int32_t longest = 0;
  for (int32_t s = 0; s < n_seqs; s++) {
    w->total[s] = total[s];
    if (total[s] > longest) longest = total[s];
    size_t n = (size_t)(total[s] * shape->n_heads * shape->dim);
    w->out[s] = malloc(n * sizeof(float));
    for (size_t i = 0; i < n; i++) w->out[s][i] = NAN;
  }
  w->max_blocks = (longest + QTR_PAGE_TOKENS - 1) / QTR_PAGE_TOKENS + 1;
  int32_t n_pages = n_seqs * w->max_blocks;
  w->block_table = malloc((size_t)n_pages * sizeof(int32_t));
  for (int32_t i = 0; i < n_pages; i++) w->block_table[i] = i * 7 % n_pages; /* a permutation unless 7 divides */
  if (n_pages % 7 == 0) {
    for (int32_t i = 0; i < n_pages; i++) w->block_table[i] = n_pages - 1 - i;
  }
  static const float scales[2 * N_LAYERS] = {1, 1, 0.04f, 0.017f};
  struct qtr_kv_config config = {.format = shape->format,
                                 .n_layers = N_LAYERS,
                                 .n_kv_heads = shape->n_kv_heads,
                                 .head_dim = shape->dim,
                                 .n_pages = n_pages,
                                 .static_scale = scales,
                                 .fp8 = fp8};
  struct qtr_error err;
  if (b->ops->kv_create(b, &config, &w->kv, &err) != QTR_OK) fail_msg("%s", err.message);
  w->inv_freq = malloc((size_t)shape->dim / 2 * sizeof(float));
  for (int32_t i = 0; i < shape->dim / 2; i++) w->inv_freq[i] = powf(10000.0f, -2.0f * (float)i / (float)shape->dim);
}

static void world_open(struct world *w, struct qtr_backend *b, const struct shape *shape, int32_t n_seqs,
                       const int32_t *total) {
  world_open_fp8(w, b, shape, n_seqs, total, QTR_KV_FP8_OFF);
}

static void world_close(struct world *w) {
  w->b->ops->kv_free(w->b, w->kv);
  for (int32_t s = 0; s < w->n_seqs; s++) free(w->out[s]);
  free(w->block_table);
  free(w->inv_freq);
}

typedef float (*value_function)(const struct shape *s, int32_t seq, int32_t position, int32_t column);

/* One step: the next n[s] tokens of each sequence. Sequences with none are left out of the batch. */
static void world_step(struct world *w, const int32_t *n, value_function f) {
  const struct shape *sh = &w->shape;
  int32_t q_start[MAX_SEQS + 1] = {0}, kv_len[MAX_SEQS], seqs[MAX_SEQS], n_seqs = 0;
  for (int32_t s = 0; s < w->n_seqs; s++) {
    if (n[s] == 0) continue;
    seqs[n_seqs] = s;
    kv_len[n_seqs] = w->done[s];
    q_start[n_seqs + 1] = q_start[n_seqs] + n[s];
    n_seqs++;
  }
  int32_t n_tokens = q_start[n_seqs], width = (sh->n_heads + 2 * sh->n_kv_heads) * sh->dim,
          out_width = sh->n_heads * sh->dim;
  int32_t *token = calloc((size_t)n_tokens, sizeof *token), *position = malloc((size_t)n_tokens * sizeof *position);
  int32_t *blocks = malloc((size_t)(n_seqs * w->max_blocks) * sizeof *blocks);
  void *qkv, *out;
  assert_int_equal(w->b->ops->alloc(w->b, (size_t)(n_tokens * width) * sizeof(float), &qkv, NULL), QTR_OK);
  assert_int_equal(w->b->ops->alloc(w->b, (size_t)(n_tokens * out_width) * sizeof(float), &out, NULL), QTR_OK);
  for (int32_t i = 0; i < n_seqs; i++) {
    for (int32_t t = q_start[i]; t < q_start[i + 1]; t++) {
      position[t] = kv_len[i] + t - q_start[i];
      for (int32_t c = 0; c < width; c++) ((float *)qkv)[t * width + c] = f(sh, seqs[i], position[t], c);
      for (int32_t c = 0; c < out_width; c++) ((float *)out)[t * out_width + c] = NAN;
    }
    memcpy(blocks + i * w->max_blocks, w->block_table + seqs[i] * w->max_blocks, (size_t)w->max_blocks * sizeof *blocks);
  }
  struct qtr_batch batch = {.n_tokens = n_tokens,
                            .n_seqs = n_seqs,
                            .max_blocks = w->max_blocks,
                            .token = token,
                            .position = position,
                            .q_start = q_start,
                            .kv_len = kv_len,
                            .block_table = blocks};
  assert_int_equal(w->b->ops->begin_step(w->b, &batch, w->inv_freq, (size_t)sh->dim / 2, NULL), QTR_OK);
  struct qtr_rope_kv_args rope = {qkv, w->kv, LAYER, sh->n_heads, sh->n_kv_heads, sh->dim};
  w->b->ops->rope_kv_write(w->b, &rope);
  struct qtr_attention_args args = {qkv,         w->kv,          out,    1.0f / sqrtf((float)sh->dim), LAYER,
                                    sh->n_heads, sh->n_kv_heads, sh->dim};
  w->b->ops->attention(w->b, &args);
  assert_int_equal(w->b->ops->end_step(w->b, NULL), QTR_OK);
  for (int32_t i = 0; i < n_seqs; i++) {
    size_t bytes = (size_t)((q_start[i + 1] - q_start[i]) * out_width) * sizeof(float);
    memcpy(w->out[seqs[i]] + kv_len[i] * out_width, (float *)out + q_start[i] * out_width, bytes);
    w->done[seqs[i]] += n[seqs[i]];
  }
  w->b->ops->free(w->b, qkv);
  w->b->ops->free(w->b, out);
  free(token);
  free(position);
  free(blocks);
}

static bool world_finished(const struct world *w) {
  for (int32_t s = 0; s < w->n_seqs; s++) {
    if (w->done[s] < w->total[s]) return false;
  }
  return true;
}

/* Runs all sequences in steps of `largest` tokens for each at most (random below that when `random`). */
static void world_run(struct world *w, int32_t largest, bool random) {
  while (!world_finished(w)) {
    int32_t n[MAX_SEQS], any = 0;
    for (int32_t s = 0; s < w->n_seqs; s++) {
      int32_t left = w->total[s] - w->done[s];
      n[s] = random ? (int32_t)random_below((uint32_t)largest + 1) : largest;
      if (n[s] > left) n[s] = left;
      any += n[s];
    }
    if (any > 0) world_step(w, n, value);
  }
}

static void assert_same_bits(const struct world *a, int32_t seq_a, const struct world *b, int32_t seq_b, const char *what) {
  int32_t width = a->shape.n_heads * a->shape.dim;
  for (int32_t i = 0; i < a->total[seq_a] * width; i++) {
    float x = a->out[seq_a][i], y = b->out[seq_b][i];
    if (qtr_f32_bits(x) == qtr_f32_bits(y)) continue;
    fail_msg("%s: position %d, head %d, dim %d: %a and %a differ", what, i / width, i % width / a->shape.dim,
             i % a->shape.dim, (double)x, (double)y);
  }
}

/* ---- codes ---------------------------------------------------------------------------------------------- */

static void assert_same_codes(struct world *a, struct world *b, const char *what) {
  uint16_t code_a[512], code_b[512];
  for (int32_t s = 0; s < a->n_seqs; s++) {
    for (int32_t t = 0; t < a->total[s]; t++) {
      for (int32_t i = 0; i < 2 * a->shape.n_kv_heads; i++) {
        float scale_a, zero_a, scale_b, zero_b;
        int32_t page = a->block_table[s * a->max_blocks + t / QTR_PAGE_TOKENS], slot = t % QTR_PAGE_TOKENS;
        a->b->ops->kv_read(a->b, a->kv, LAYER, i % 2, page, slot, i / 2, code_a, &scale_a, &zero_a);
        b->b->ops->kv_read(b->b, b->kv, LAYER, i % 2, page, slot, i / 2, code_b, &scale_b, &zero_b);
        if (qtr_f32_bits(scale_a) != qtr_f32_bits(scale_b) || qtr_f32_bits(zero_a) != qtr_f32_bits(zero_b)) {
          fail_msg("%s: %c of token %d, head %d: scale %a zero %a, expected %a %a", what, "KV"[i % 2], t, i / 2,
                   (double)scale_b, (double)zero_b, (double)scale_a, (double)zero_a);
        }
        for (int32_t d = 0; d < a->shape.dim; d++) {
          if (code_a[d] != code_b[d]) {
            fail_msg("%s: %c of token %d, head %d, dim %d: code %d, expected %d", what, "KV"[i % 2], t, i / 2, d, code_b[d],
                     code_a[d]);
          }
        }
      }
    }
  }
}

/* Rows a quantiser can stumble over: kind = position % 16. Position 0 turns nothing, so K keeps its exact values there only;
 * V always. */
static float nasty(const struct shape *s, int32_t seq, int32_t position, int32_t column) {
  float x = value(s, seq, position, column);
  int32_t d = column % s->dim;
  switch (position % 16) {
    case 0: return 0;
    case 1: return d % 2 ? 0.0f : -0.0f;
    case 2: return d % 3 == 0 ? 0.0f : d % 3 == 1 ? -0.0f : fabsf(x);
    case 3: return 1.25f;
    case 4: return d == 1 ? NAN : x;
    case 5: return d == 0 ? INFINITY : x;
    case 6: return d == 0 ? -INFINITY : x;
    case 7: return x * 1e30f;
    case 8: return x * 1e-7f;
    case 9: return x * 1e-40f;
    case 10: return 1000.0f + x * 0.01f;
    case 11: return -3000.0f + x;
    case 12: return fabsf(x) + 1;
    case 13: return -fabsf(x) - 1;
    case 14: return floorf(x * 8) / 8; /* many ties */
    default: return x;
  }
}

static const struct shape code_shapes[] = {{0, 2, 2, 2},  {0, 4, 2, 8},  {0, 2, 1, 10},  {0, 4, 1, 64},
                                           {0, 2, 2, 80}, {0, 1, 1, 94}, {0, 2, 1, 128}, {0, 1, 1, 256}};

static void test_codes_are_the_references(void **state) {
  (void)state;
  for (size_t i = 0; i < sizeof code_shapes / sizeof *code_shapes; i++) {
    for (int f = 0; f < QTR_N_KV_FORMATS + 2; f++) { /* the last two: F16, rounded to fp8 first */
      struct shape shape = code_shapes[i];
      shape.format = f < QTR_N_KV_FORMATS ? (enum qtr_kv_format)f : QTR_KV_F16;
      enum qtr_kv_fp8 fp8 = QTR_KV_FP8_OFF;
      if (f >= QTR_N_KV_FORMATS) fp8 = f == QTR_N_KV_FORMATS ? QTR_KV_FP8_E4M3 : QTR_KV_FP8_E5M2;
      const int32_t total[] = {100, 70};
      struct qtr_backend *r = open_reference();
      struct world expected;
      world_open_fp8(&expected, r, &shape, 2, total, fp8);
      world_step(&expected, total, nasty);
      for (int isa = 0; isa < N_ISAS; isa++) {
        struct qtr_backend *b = open_cpu(isas[isa], 2);
        if (!b) continue;
        struct world w;
        char what[100];
        (void)snprintf(what, sizeof what, "%s %s fp8 %d head_dim %d", isas[isa], qtr_kv_format_name(shape.format), (int)fp8,
                       shape.dim);
        world_open_fp8(&w, b, &shape, 2, total, fp8);
        world_step(&w, total, nasty);
        assert_same_codes(&expected, &w, what);
        world_close(&w);
        b->ops->close(b);
      }
      world_close(&expected);
      r->ops->close(r);
    }
  }
}

/* ---- values --------------------------------------------------------------------------------------------- */

static const struct shape shapes[] = {{0, 4, 2, 2},  {0, 8, 4, 8},   {0, 2, 1, 10}, {0, 8, 2, 64},
                                      {0, 3, 3, 64}, {0, 7, 1, 64},  {0, 4, 2, 80}, {0, 3, 1, 94},
                                      {0, 2, 2, 96}, {0, 8, 2, 128}, {0, 1, 1, 256}};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

/* Largest difference. V is of the order of 1, and so is what rounding is relative to: an average of many values may be tiny.
 */
static double worst_error(const struct world *expected, const struct world *w) {
  double worst = 0;
  for (int32_t s = 0; s < w->n_seqs; s++) {
    for (int32_t i = 0; i < w->total[s] * w->shape.n_heads * w->shape.dim; i++) {
      double e = fabs((double)expected->out[s][i] - (double)w->out[s][i]);
      if (!(e <= worst)) worst = e; /* NaN wins, and stays */
      if (isnan(worst)) return worst;
    }
  }
  return worst;
}

/* fp32 sums; AMX multiplies numbers of 16 bits. */
static double tolerance(const char *isa) { return strcmp(isa, "amx") == 0 ? 3e-5 : 1e-5; }

static void test_values_are_the_references(void **state) {
  (void)state;
  double worst[N_ISAS] = {0};
  for (int i = 0; i < N_SHAPES; i++) {
    for (int f = 0; f < QTR_N_KV_FORMATS; f++) {
      struct shape shape = shapes[i];
      shape.format = (enum qtr_kv_format)f;
      const int32_t total[] = {1, 63, 64, 65, 150};
      struct qtr_backend *r = open_reference();
      struct world expected;
      world_open(&expected, r, &shape, 5, total);
      world_run(&expected, 100, false);
      for (int isa = 0; isa < N_ISAS; isa++) {
        struct qtr_backend *b = open_cpu(isas[isa], 2);
        if (!b) continue;
        struct world w;
        world_open(&w, b, &shape, 5, total);
        world_run(&w, 100, false);
        double e = worst_error(&expected, &w);
        if (!(e < tolerance(isas[isa]))) {
          fail_msg("%s %s, %d heads, %d of KV, head_dim %d: error %g", isas[isa], qtr_kv_format_name(shape.format),
                   shape.n_heads, shape.n_kv_heads, shape.dim, e);
        }
        worst[isa] = fmax(worst[isa], e);
        world_close(&w);
        b->ops->close(b);
      }
      world_close(&expected);
      r->ops->close(r);
    }
  }
  for (int isa = 0; isa < N_ISAS; isa++) print_message("%s: worst error %.2g\n", isas[isa], worst[isa]);
}

/* Scores far apart, so that running maxima jump and old sums are scaled away: one-sided keys, grown with the position. */
static float steep(const struct shape *s, int32_t seq, int32_t position, int32_t column) {
  float x = value(s, seq, position, column);
  bool is_q = column < s->n_heads * s->dim, is_k = !is_q && column < (s->n_heads + s->n_kv_heads) * s->dim;
  return is_q ? x * 20 : is_k ? x * (1 + 0.1f * (float)(position % 100)) : x;
}

static void test_steep_scores(void **state) {
  (void)state;
  const int32_t total[] = {300};
  for (int f = 0; f < QTR_N_KV_FORMATS; f++) {
    struct shape shape = {(enum qtr_kv_format)f, 4, 2, 64};
    struct qtr_backend *r = open_reference();
    struct world expected;
    world_open(&expected, r, &shape, 1, total);
    world_step(&expected, total, steep);
    for (int isa = 0; isa < N_ISAS; isa++) {
      struct qtr_backend *b = open_cpu(isas[isa], 2);
      if (!b) continue;
      struct world w;
      world_open(&w, b, &shape, 1, total);
      world_step(&w, total, steep);
      double e = worst_error(&expected, &w);
      if (!(e < 2e-3))
        fail_msg("%s %s: error %g", isas[isa], qtr_kv_format_name(shape.format), e); /* scores of about 1000 */
      world_close(&w);
      b->ops->close(b);
    }
    world_close(&expected);
    r->ops->close(r);
  }
}

/* ---- the same bits --------------------------------------------------------------------------------------- */

static void check_bits(const struct shape *shape, const char *isa, int32_t n_seqs, const int32_t *total, int32_t chunk) {
  struct qtr_backend *b = open_cpu(isa, 2), *one = open_cpu(isa, 1), *many = open_cpu(isa, 7);
  if (!b) return;
  char what[160];
  struct world whole, single, random, threads;
  world_open(&whole, b, shape, n_seqs, total);
  world_run(&whole, 1 << 20, false);
  world_open(&single, one, shape, n_seqs, total);
  world_run(&single, chunk, false);
  world_open(&random, b, shape, n_seqs, total);
  world_run(&random, 7 * chunk, true);
  world_open(&threads, many, shape, n_seqs, total);
  world_run(&threads, 33 * chunk, true);
  for (int32_t s = 0; s < n_seqs; s++) {
    (void)snprintf(what, sizeof what, "%s %s, %d heads, %d of KV, head_dim %d, sequence %d", isa,
                   qtr_kv_format_name(shape->format), shape->n_heads, shape->n_kv_heads, shape->dim, s);
    assert_same_bits(&whole, s, &single, s, what);
    assert_same_bits(&whole, s, &random, s, what);
    assert_same_bits(&whole, s, &threads, s, what);
  }
  /* The second sequence alone: other pages, another batch. Values depend on the sequence's number, so it keeps it. */
  const int32_t alone_total[] = {0, n_seqs > 1 ? total[1] : 0};
  if (n_seqs > 1) {
    struct world alone;
    world_open(&alone, b, shape, 2, alone_total);
    world_run(&alone, 5 * chunk, true);
    assert_same_bits(&whole, 1, &alone, 1, what);
    world_close(&alone);
  }
  world_close(&whole);
  world_close(&single);
  world_close(&random);
  world_close(&threads);
  b->ops->close(b);
  one->ops->close(one);
  many->ops->close(many);
}

static void test_bits_do_not_depend_on_the_batch(void **state) {
  (void)state;
  const int32_t total[] = {3, 200, 64, 129};
  for (int isa = 0; isa < N_ISAS; isa++) {
    for (int i = 0; i < N_SHAPES; i++) {
      for (int f = 0; f < QTR_N_KV_FORMATS; f++) {
        struct shape shape = shapes[i];
        shape.format = (enum qtr_kv_format)f;
        check_bits(&shape, isas[isa], 4, total, 1);
      }
    }
  }
}

/* Past one segment of keys: whole tiles, segments apart, and their merging must agree, and be right. */
static void test_long_sequences(void **state) {
  (void)state;
  const int32_t total[] = {40, 2600};
  struct shape shape = {QTR_KV_INT4, 4, 1, 32};
  for (int isa = 0; isa < N_ISAS; isa++) check_bits(&shape, isas[isa], 2, total, 37);

  struct qtr_backend *r = open_reference();
  struct world expected;
  const int32_t steps[][2] = {{40, 2590}, {0, 1}, {0, 9}};
  world_open(&expected, r, &shape, 2, total);
  for (int i = 0; i < 3; i++) world_step(&expected, steps[i], value);
  for (int isa = 0; isa < N_ISAS; isa++) {
    struct qtr_backend *b = open_cpu(isas[isa], 2);
    if (!b) continue;
    struct world w;
    world_open(&w, b, &shape, 2, total);
    for (int i = 0; i < 3; i++) world_step(&w, steps[i], value);
    double e = worst_error(&expected, &w);
    if (!(e < tolerance(isas[isa]))) fail_msg("%s: error %g", isas[isa], e);
    world_close(&w);
    b->ops->close(b);
  }
  world_close(&expected);
  r->ops->close(r);
}

/* ---- arguments ------------------------------------------------------------------------------------------- */

static void test_bad_caches_are_refused(void **state) {
  (void)state;
  struct qtr_backend *b = open_cpu(NULL, 1);
  static const float bad_scale[] = {1, 0};
#define BAD(kind, layers, heads, dim, pages, scales) \
  { .format = kind, .n_layers = layers, .n_kv_heads = heads, .head_dim = dim, .n_pages = pages, .static_scale = scales }
  const struct qtr_kv_config bad[] = {
      BAD(QTR_KV_INT4, 1, 1, 63, 4, NULL),
      BAD(QTR_KV_INT4, 1, 1, 258, 4, NULL),
      BAD(QTR_KV_INT4, 1, 1, 0, 4, NULL),
      BAD(QTR_KV_INT4, 0, 1, 64, 4, NULL),
      BAD(QTR_KV_INT4, 1, -1, 64, 4, NULL),
      BAD(QTR_KV_INT4, 1, 1, 64, 0, NULL),
      BAD(QTR_KV_INT8_STATIC, 1, 1, 64, 4, NULL),
      BAD(QTR_KV_INT8_STATIC, 1, 1, 64, 4, bad_scale),
      BAD((enum qtr_kv_format)9, 1, 1, 64, 4, NULL),
      BAD(QTR_KV_F16, INT32_MAX, INT32_MAX, 256, INT32_MAX, NULL),
      {.format = QTR_KV_INT8, .n_layers = 1, .n_kv_heads = 1, .head_dim = 64, .n_pages = 4, .fp8 = QTR_KV_FP8_E4M3},
  };
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    struct qtr_kv *kv = (struct qtr_kv *)1;
    struct qtr_error err;
    assert_int_not_equal(b->ops->kv_create(b, &bad[i], &kv, &err), QTR_OK);
    assert_null(kv);
    assert_true(strlen(err.message) > 0);
  }
  b->ops->close(b);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_codes_are_the_references),
      cmocka_unit_test(test_values_are_the_references),
      cmocka_unit_test(test_steep_scores),
      cmocka_unit_test(test_bits_do_not_depend_on_the_batch),
      cmocka_unit_test(test_long_sequences),
      cmocka_unit_test(test_bad_caches_are_refused),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
