/* attention_amx.c - attention for quantised caches with AMX bf16 tiles (attention.h, spec C.5). Codes are exact in bf16; q
 * and the weights are split in two bf16 parts, x = high + low to 16 bits, so a product of tiles is as good as fp32 needs
 * (relative error 2^-17).
 *
 *   scores  C(16 rows, 16 keys)  = sum over 32 dims of  q high · K, q low · K
 *   out     C(16 rows, 16 dims) += sum over 32 keys of  w high · V, w low · V
 *
 * Every element of C is one chain over k in this order, whatever the shape of the tile, so decode (few rows) and prefill
 * (many) give the same bits. The tile unit takes max(16, rows) cycles for a new B and rows for the same B again: hence high
 * and low follow each other. */
#include "backend/cpu/attention.h"

#if defined(__AMX_BF16__) || defined(__AMXBF16__) /* gcc, clang */
#define ATTENTION_NO_KERNEL
#include "backend/cpu/attention_vf_avx512.h"

#include "backend/cpu/attention_float.h"

enum { SUB = 16, TILE = 1024 }; /* rows of a tile; bytes of a full tile: 16 rows of 64 */

union score_row {
  float s[PAGE];        /* scores, */
  uint16_t w[2][2][32]; /* then weights: keys 0 - 31 and 32 - 63, high and low parts */
};

struct amx_scratch {
  struct page_scales scales;
  struct rows_state rows;
  union score_row row[SUB]; /* of the 16 rows at work */
  uint8_t data[]; /* q tiles (QTR_ATT_ROWS/16, dim/32, 2) | K tiles (4, dim/32) | V tiles (dim/16, 2); dims rounded up */
};

static size_t steps_of(size_t dim) { return (dim + 31) / 32; }
static size_t blocks_of(size_t dim) { return (dim + 15) / 16; }

static size_t amx_scratch_bytes(size_t dim) {
  return sizeof(struct amx_scratch) +
         (QTR_ATT_ROWS / SUB * steps_of(dim) * 2 + 4 * steps_of(dim) + 2 * blocks_of(dim)) * TILE;
}

/* ---- codes to tiles ------------------------------------------------------------------------------------
 * A row of a B tile is 32 words: 16 columns, two consecutive k each. */

static inline __m512i load_bytes(const uint8_t *p) { return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const void *)p)); }

/* bf16 of the low four bits of each word: the permutation looks at five bits, so the table holds everything twice. */
static inline __m512i bf16_of_nibble(__m512i x) {
  const __m256i table = _mm256_setr_epi16(0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120,
                                          0x4130, 0x4140, 0x4150, 0x4160, 0x4170);
  return _mm512_permutexvar_epi16(x, _mm512_broadcast_i64x4(table));
}

/* Two int32 vectors of small integers to bf16 pairs (even in the low word): their fp32 forms end in 16 zero bits. */
static inline __m512i bf16_pair(__m512i even, __m512i odd) {
  __m512i e = _mm512_castps_si512(_mm512_cvtepi32_ps(even)), o = _mm512_castps_si512(_mm512_cvtepi32_ps(odd));
  return _mm512_or_si512(_mm512_srli_epi32(e, 16), o);
}
static inline __m512i bf16_of_bytes(const uint8_t *p) {
  __m512i x = vi_load_u16(p);
  return bf16_pair(_mm512_and_si512(x, _mm512_set1_epi32(255)), _mm512_srli_epi32(x, 8));
}
static inline __m512i bf16_of_signed_bytes(const uint8_t *p) {
  __m512i x = vi_load_u16(p);
  return bf16_pair(_mm512_srai_epi32(_mm512_slli_epi32(x, 24), 24), _mm512_srai_epi32(_mm512_slli_epi32(x, 16), 24));
}

/* Keys of n tokens, rounded up to 16. Tiles (key block, step of 32 dims); row: pair of dims. */
static void unpack_k(const struct qtr_kv *kv, const uint8_t *half, int32_t n, uint8_t *restrict k) {
  size_t dim = (size_t)kv->config.head_dim;
  for (size_t block = 0; block < (size_t)(n + 15) / 16; block++) {
    const uint8_t *from = half + block * (kv->code_bytes / 4);
    uint8_t *to = k + block * steps_of(dim) * TILE;
    size_t d = 0;
    if (kv->config.format == QTR_KV_INT4) {
      for (; d + 4 <= dim; d += 4) {
        __m512i x = load_bytes(from + d * 8);
        _mm512_store_si512(to + d * 32, bf16_of_nibble(x));
        _mm512_store_si512(to + d * 32 + 64, bf16_of_nibble(_mm512_srli_epi16(x, 4)));
      }
      for (size_t i = 0; d < dim && i < 16; i++) { /* a last pair of dims */
        ((uint16_t *)(void *)(to + d * 32))[2 * i] = qtr_bf16_from_f32((float)(from[d * 8 + i] & 15));
        ((uint16_t *)(void *)(to + d * 32))[2 * i + 1] = qtr_bf16_from_f32((float)(from[d * 8 + i] >> 4));
      }
    } else if (kv->config.format == QTR_KV_INT8) {
      for (; d < dim; d += 2) _mm512_store_si512(to + d * 32, bf16_of_bytes(from + d * 16));
    } else {
      for (; d < dim; d += 2) _mm512_store_si512(to + d * 32, bf16_of_signed_bytes(from + d * 16));
    }
  }
}

/* Values of n tokens, rounded up to 32. Tiles (block of 16 dims, step of 32 tokens); row: tokens i and i + 16. */
static void unpack_v(const struct qtr_kv *kv, const uint8_t *half, int32_t n, uint8_t *restrict v) {
  size_t dim = (size_t)kv->config.head_dim, pairs = (size_t)(n + 31) / 32 * 16, d = 0;
  size_t pair_bytes = 2 * (kv->code_bytes / PAGE);
  if (kv->config.format == QTR_KV_INT4) {
    for (; d + 32 <= dim; d += 32) {
      uint8_t *to = v + d / 16 * 2 * TILE;
      for (size_t i = 0; i < pairs; i++) {
        __m512i x = load_bytes(half + i * pair_bytes + d);
        _mm512_store_si512(to + i * 64, bf16_of_nibble(x));
        _mm512_store_si512(to + 2 * TILE + i * 64, bf16_of_nibble(_mm512_srli_epi16(x, 4)));
      }
    }
    for (size_t i = 0, width = (dim - d) / 2; width > 0 && i < pairs; i++) { /* a last block of fewer than 32 dims */
      for (size_t j = 0; j < 2 * width; j++) {
        size_t low = d + j / 2, high = low + width;
        uint8_t byte = half[i * pair_bytes + d + j];
        ((uint16_t *)(void *)(v + low / 16 * 2 * TILE + i * 64))[low % 16 * 2 + j % 2] =
            qtr_bf16_from_f32((float)(byte & 15));
        ((uint16_t *)(void *)(v + high / 16 * 2 * TILE + i * 64))[high % 16 * 2 + j % 2] =
            qtr_bf16_from_f32((float)(byte >> 4));
      }
    }
    return;
  }
  bool is_signed = kv->config.format == QTR_KV_INT8_STATIC;
  for (; d + 16 <= dim; d += 16) {
    uint8_t *to = v + d / 16 * 2 * TILE;
    for (size_t i = 0; i < pairs; i++) {
      const uint8_t *from = half + i * pair_bytes + 2 * d;
      _mm512_store_si512(to + i * 64, is_signed ? bf16_of_signed_bytes(from) : bf16_of_bytes(from));
    }
  }
  for (size_t i = 0; d < dim && i < pairs; i++) {
    for (size_t j = 0; j < 2 * (dim - d); j++) {
      uint8_t byte = half[i * pair_bytes + 2 * d + j];
      float x = is_signed ? (float)(int8_t)byte : (float)byte;
      ((uint16_t *)(void *)(v + d / 16 * 2 * TILE + i * 64))[j] = qtr_bf16_from_f32(x);
    }
  }
}

/* ---- q, weights: two bf16 parts ---------------------------------------------------------------------- */

static inline vf bf16_low_word(__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }

/* 32 floats of q -> 32 bf16 high parts and 32 low parts, in order. Returns the sums of both parts, lane by lane. */
static inline vf split_query(vf a, vf b, uint16_t *high, uint16_t *low) {
  __m512i h = (__m512i)_mm512_cvtne2ps_pbh(b, a);
  vf ha = bf16_low_word(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(h)));
  vf hb = bf16_low_word(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(h, 1)));
  __m512i l = (__m512i)_mm512_cvtne2ps_pbh(vf_sub(b, hb), vf_sub(a, ha));
  vf la = bf16_low_word(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(l)));
  vf lb = bf16_low_word(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(l, 1)));
  _mm512_store_si512(high, h);
  _mm512_store_si512(low, l);
  return vf_add(vf_add(ha, la), vf_add(hb, lb));
}

/* Weights of 16 keys and of the 16 after them -> pairs (i, i + 16), high and low. Integer instructions and shuffles, because
 * beside the tile unit only one port is left for floating point. */
static inline __m512i pack_pairs(__m512i a, __m512i b) { /* the upper words of a below those of b */
  const __m512i upper = _mm512_broadcast_i32x4(_mm_setr_epi8(2, 3, -1, -1, 6, 7, -1, -1, 10, 11, -1, -1, 14, 15, -1, -1));
  const __m512i mask = _mm512_set1_epi32((int)0xffff0000u);
  return _mm512_ternarylogic_epi32(_mm512_shuffle_epi8(a, upper), b, mask, 0xf8); /* x | (y & z) */
}
static inline void split_weights(vf a, vf b, uint16_t *high, uint16_t *low) {
  const __m512i half = _mm512_set1_epi32(0x8000), mask = _mm512_set1_epi32((int)0xffff0000u);
  __m512i ra = _mm512_add_epi32(_mm512_castps_si512(a), half), rb = _mm512_add_epi32(_mm512_castps_si512(b), half);
  _mm512_store_si512(high, pack_pairs(ra, rb));
  a = vf_sub(a, _mm512_castsi512_ps(_mm512_and_si512(ra, mask)));
  b = vf_sub(b, _mm512_castsi512_ps(_mm512_and_si512(rb, mask)));
  ra = _mm512_add_epi32(_mm512_castps_si512(a), half);
  rb = _mm512_add_epi32(_mm512_castps_si512(b), half);
  _mm512_store_si512(low, pack_pairs(ra, rb));
}

static void amx_prepare(const struct qtr_att_tile *t, void *scratch) {
  struct amx_scratch *w = scratch;
  size_t dim = (size_t)t->kv->config.head_dim, steps = steps_of(dim);
  uint8_t *k = w->data + QTR_ATT_ROWS / SUB * steps * 2 * TILE;
  if (dim % 32 != 0) { /* dims that do not exist: zeros in K, not what another operation left */
    for (size_t block = 0; block < 4; block++) memset(k + (block * steps + steps - 1) * TILE, 0, TILE);
  }
  for (size_t r = 0; r < (size_t)t->n_rows; r++) {
    const float *q = qtr_att_query(t, r);
    vf sum = vf_set(0);
    for (size_t step = 0; step < steps; step++) {
      uint16_t *high = (uint16_t *)(void *)(w->data + (r / SUB * steps + step) * 2 * TILE) + r % SUB * 32,
               *low = high + TILE / 2;
      float padded[32];
      const float *x = q + step * 32;
      if (step * 32 + 32 > dim) {
        memset(padded, 0, sizeof padded);
        memcpy(padded, x, (dim - step * 32) * sizeof(float));
        x = padded;
      }
      /* Σq of what the products see: the zeros then cancel exactly */
      sum = vf_add(sum, split_query(vf_load(x), vf_load(x + 16), high, low));
    }
    w->rows.q_sum[r] = vf_hsum(sum);
  }
}

/* ---- softmax of one row and page --------------------------------------------------------------------- */

/* A score above 8? Compared as integers, off the port of floating point: positive floats and their bits have the same order,
 * and what is negative is negative. */
static inline bool any_above_limit(const vf x[4]) {
  const __m512i limit = _mm512_castps_si512(vf_set(8));
  __mmask16 below = 0xffff;
  for (int j = 0; j < 4; j++) below = _mm512_mask_cmple_epi32_mask(below, _mm512_castps_si512(x[j]), limit);
  return below != 0xffff;
}

/* As softmax_page of attention_float.h, with the weights leaving as bf16 parts. */
static inline __attribute__((always_inline)) float softmax_row(union score_row *row, const struct page_scales *p, bool full,
                                                               struct page_view see, struct rows_state *rows, size_t r) {
  vf x[4], weight[4];
  float factor = 1.0f;
  bool raise = rows->limit[r] < 0 && !page_empty(see); /* the row's first key is in this page */
  if (!raise) {
    for (int j = 0; j < 4; j++) x[j] = row_score(row->s, p, rows, r, full, see, QTR_ATT_FLOOR, j);
    raise = any_above_limit(x);
  }
  if (raise) {
    for (int j = 0; j < 4; j++) x[j] = row_score(row->s, p, rows, r, full, see, -INFINITY, j);
    factor = row_raise(rows, r, vf_hmax(vf_max(vf_max(x[0], x[1]), vf_max(x[2], x[3]))));
    for (int j = 0; j < 4; j++) x[j] = row_score(row->s, p, rows, r, full, see, QTR_ATT_FLOOR, j);
  }
  vf sum = vf_load(rows->sum[r]), zeros = vf_load(rows->zeros[r]);
  for (int j = 0; j < 4; j++) {
    vf e = vf_exp2(x[j]);
    if (!full) e = page_lanes(e, see, vf_set(0), j);
    sum = vf_add(sum, e);
    weight[j] = vf_mul(e, vf_load(p->va + j * VW));
    zeros = vf_fma(weight[j], vf_load(p->vz + j * VW), zeros);
  }
  vf_store(rows->sum[r], sum);
  vf_store(rows->zeros[r], zeros);
  split_weights(weight[0], weight[1], row->w[0][0], row->w[0][1]);
  split_weights(weight[2], weight[3], row->w[1][0], row->w[1][1]);
  return factor;
}

/* ---- tiles ------------------------------------------------------------------------------------------- */

/* Tiles 0 - 3 C, 4 and 5 A (high, low), 6 and 7 B. */
static void configure(int rows) {
  struct {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } config = {.palette = 1};
  for (int i = 0; i < 8; i++) {
    config.row_bytes[i] = 64;
    config.rows[i] = (uint8_t)(i < 6 ? rows : 16);
  }
  __asm__ volatile("" ::"r"(&config) : "memory"); /* gcc believes that only the first eight bytes are read */
  _tile_loadconfig(&config);
}

/* gcc's tile loads do not say that they read memory. */
#define STORES_DONE() __asm__ volatile("" ::: "memory")

/* The left operand: `high` of step i at a + i * step, `low` at + low, rows of 64 bytes `stride` apart. */
struct left {
  const uint8_t *a;
  size_t step, low, stride;
};

/* n (1 … 4) tiles of C, 16 columns each, at c (row stride in bytes) [+]= A · B over `steps` steps. Tile of step i and column
 * block j of B at b + i * TILE + j * b_column. */
static inline __attribute__((always_inline)) void tile_product(int n, bool add, struct left l, const uint8_t *b,
                                                               size_t b_column, size_t steps, float *c, size_t c_stride) {
  if (add) {
    _tile_loadd(0, c, c_stride);
    if (n > 1) _tile_loadd(1, c + 16, c_stride);
    if (n > 2) _tile_loadd(2, c + 32, c_stride);
    if (n > 3) _tile_loadd(3, c + 48, c_stride);
  } else {
    _tile_zero(0);
    if (n > 1) _tile_zero(1);
    if (n > 2) _tile_zero(2);
    if (n > 3) _tile_zero(3);
  }
  for (size_t i = 0; i < steps; i++, l.a += l.step, b += TILE) {
    _tile_loadd(4, l.a, l.stride);
    _tile_loadd(5, l.a + l.low, l.stride);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(0, 5, 6);
    if (n > 1) {
      _tile_loadd(7, b + b_column, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(1, 5, 7);
    }
    if (n > 2) {
      _tile_loadd(6, b + 2 * b_column, 64);
      _tile_dpbf16ps(2, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
    }
    if (n > 3) {
      _tile_loadd(7, b + 3 * b_column, 64);
      _tile_dpbf16ps(3, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_stride);
  if (n > 1) _tile_stored(1, c + 16, c_stride);
  if (n > 2) _tile_stored(2, c + 32, c_stride);
  if (n > 3) _tile_stored(3, c + 48, c_stride);
}

/* All columns of 16 rows of C: n_columns tiles. */
static void product(struct left a, const uint8_t *b, size_t b_column, size_t n_columns, size_t steps, bool add, float *c,
                    size_t c_stride) {
  STORES_DONE();
  for (; n_columns >= 4; n_columns -= 4, b += 4 * b_column, c += 64)
    tile_product(4, add, a, b, b_column, steps, c, c_stride);
  if (n_columns == 3) tile_product(3, add, a, b, b_column, steps, c, c_stride);
  if (n_columns == 2) tile_product(2, add, a, b, b_column, steps, c, c_stride);
  if (n_columns == 1) tile_product(1, add, a, b, b_column, steps, c, c_stride);
  STORES_DONE();
}

/* One page and the tiles of rows that see some of it. */
struct page {
  const struct qtr_att_tile *t;
  struct amx_scratch *w;
  const uint8_t *q, *k, *v; /* tiles, see struct amx_scratch */
  float *acc;               /* (n_rows, stride) */
  size_t dim, stride;
  int32_t key, n_keys; /* first key; keys in the page that any row sees */
};

static inline int32_t keys_of_row(const struct page *p, size_t r) {
  return QTR_MIN(p->w->rows.visible[r] - p->key, p->n_keys);
}
static inline int32_t keys_of_sub(const struct page *p, size_t sub) { /* the last row sees most */
  return keys_of_row(p, QTR_MIN((sub + 1) * SUB, (size_t)p->t->n_rows) - 1);
}

/* Scores of 16 rows, for the key blocks that one of them sees. */
static void scores(const struct page *p, size_t sub) {
  size_t steps = steps_of(p->dim), blocks = (size_t)(keys_of_sub(p, sub) + 15) / 16;
  struct left q = {p->q + sub * steps * 2 * TILE, 2 * TILE, TILE, 64};
  product(q, p->k, steps * TILE, blocks, steps, false, p->w->row[0].s, sizeof p->w->row[0]);
}

/* acc += weights · V of 16 rows. */
static void values(const struct page *p, size_t sub) {
  struct left w = {(const uint8_t *)p->w->row[0].w, sizeof p->w->row[0].w[0], sizeof p->w->row[0].w[0][0],
                   sizeof p->w->row[0]};
  product(w, p->v, 2 * TILE, blocks_of(p->dim), (size_t)(keys_of_sub(p, sub) + 31) / 32, true,
          p->acc + sub * SUB * p->stride, p->stride * sizeof(float));
}

static void softmax(const struct page *p, size_t sub) {
  struct amx_scratch *w = p->w;
  size_t rows = QTR_MIN((size_t)p->t->n_rows - sub * SUB, SUB);
  for (size_t i = 0; i < rows; i++) {
    size_t r = sub * SUB + i;
    struct page_view see = page_see(&w->rows, r, p->key, p->n_keys);
    float factor = page_whole(see) ? softmax_row(&w->row[i], &w->scales, true, see, &w->rows, r)
                                   : softmax_row(&w->row[i], &w->scales, false, see, &w->rows, r);
    if (factor != 1.0f) row_scale(p->acc + r * p->stride, p->stride, factor);
  }
}

static void amx_segment_flushed(const struct qtr_att_tile *t, int32_t key0, int32_t key1, const struct qtr_att_state *state,
                                void *scratch) {
  struct amx_scratch *w = scratch;
  size_t dim = (size_t)t->kv->config.head_dim, stride = qtr_att_stride(dim), steps = steps_of(dim),
         n_rows = (size_t)t->n_rows;
  uint8_t *q = w->data, *k = q + QTR_ATT_ROWS / SUB * steps * 2 * TILE, *v = k + 4 * steps * TILE;
  size_t n_sub = qtr_ceil_div(n_rows, SUB);
  rows_start(t, &w->rows);
  memset(state->acc, 0, n_rows * stride * sizeof(float));
  configure(
      QTR_MIN(t->n_rows, SUB)); /* with more rows the last tile may be part empty: its room is there, its content nobody's */

  for (int32_t key = qtr_att_next(t, key0, key1); key < key1; key = qtr_att_next(t, key + PAGE, key1)) {
    const uint8_t *half = qtr_cpu_kv_half(t->kv, t->layer, t->pages[key / PAGE], t->kv_head, false);
    struct page p = {t, w, q, k, v, state->acc, dim, stride, key, QTR_MIN(key1 - key, PAGE)};
    load_scales(t, half, half + t->kv->half_bytes, &w->scales);
    unpack_k(t->kv, half, p.n_keys, k);
    bool have_v = false;
    for (size_t sub = 0; sub < n_sub; sub++) {
      if (keys_of_sub(&p, sub) <= 0) continue;
      scores(&p, sub);
      if (!have_v) unpack_v(t->kv, half + t->kv->half_bytes, p.n_keys, v); /* while the tile unit is busy */
      have_v = true;
      softmax(&p, sub);
      values(&p, sub);
    }
  }
  _tile_release();
  rows_finish(t, &w->rows, state);
}

static void amx_segment(const struct qtr_att_tile *t, int32_t key0, int32_t key1, const struct qtr_att_state *state,
                        void *scratch) {
  unsigned before = denormals_off();
  amx_segment_flushed(t, key0, key1, state, scratch);
  _mm_setcsr(before);
}

static const struct qtr_att_kernel kernel = {amx_scratch_bytes, amx_prepare, amx_segment};
const struct qtr_att_kernel *qtr_cpu_attention_amx(void) { return &kernel; }
#else
const struct qtr_att_kernel *qtr_cpu_attention_amx(void) { return NULL; }
#endif
