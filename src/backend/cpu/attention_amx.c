/* attention_amx.c - attention for quantised caches with AMX bf16 tiles (attention.h, spec C.5). Codes are exact in bf16; q
 * and the weights are split in two bf16 parts, x = high + low to 16 bits, so a product of tiles is as good as fp32 needs
 * (relative error 2^-17).
 *
 *   scores  C(16 rows, 16 keys) = Σ over 32 dims: q high · K, q low · K          out  C(16 rows, 16 dims) += Σ over 32 keys:
 * w high · V, w low · V
 *
 * Every element of C is one chain over k in this order, whatever the shape of the tile, so decode (few rows) and prefill
 * (many) give the same bits. The tile unit takes max(16, rows) cycles for a new B and rows for the same B again: hence high
 * and low follow each other. */
#include "backend/cpu/attention.h"

#ifdef __AMX_BF16__
#define ATTENTION_NO_KERNEL
#include "backend/cpu/attention_vf_avx512.h"

#include "backend/cpu/attention_float.h"

enum { SUB = 16, TILE = 1024 }; /* rows of a tile; bytes of a full tile: 16 rows of 64 */

struct amx_scratch {
  struct page_scales scales;
  struct row_state row[QTR_ATT_ROWS];
  float s[SUB][PAGE];
  uint16_t w[2][2][SUB][32]; /* weights: keys 0 - 31 and 32 - 63, high and low */
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

/* Values of n tokens, rounded up to 32. Tiles (block of 16 dims, step of 32 tokens); row: pair of tokens. */
static void unpack_v(const struct qtr_kv *kv, const uint8_t *half, int32_t n, uint8_t *restrict v) {
  size_t dim = (size_t)kv->config.head_dim;
  for (size_t pair = 0; pair < (size_t)(n + 31) / 32 * 16; pair++) {
    const uint8_t *from = half + pair * 2 * (kv->code_bytes / PAGE);
    uint8_t *to = v + pair * 64; /* steps of 16 pairs follow each other: a block of dims is 2 tiles */
    size_t d = 0;
    if (kv->config.format == QTR_KV_INT4) {
      for (; d + 32 <= dim; d += 32) {
        __m512i x = load_bytes(from + d);
        _mm512_store_si512(to + d / 16 * 2 * TILE, bf16_of_nibble(x));
        _mm512_store_si512(to + (d / 16 + 1) * 2 * TILE, bf16_of_nibble(_mm512_srli_epi16(x, 4)));
      }
      for (size_t i = 0, width = (dim - d) / 2; i < 2 * width; i++) { /* a last block of fewer than 32 dims */
        size_t low = d + i / 2, high = low + width;
        ((uint16_t *)(void *)(to + low / 16 * 2 * TILE))[low % 16 * 2 + i % 2] =
            qtr_bf16_from_f32((float)(from[d + i] & 15));
        ((uint16_t *)(void *)(to + high / 16 * 2 * TILE))[high % 16 * 2 + i % 2] =
            qtr_bf16_from_f32((float)(from[d + i] >> 4));
      }
      continue;
    }
    bool is_signed = kv->config.format == QTR_KV_INT8_STATIC;
    for (; d + 16 <= dim; d += 16) {
      _mm512_store_si512(to + d / 16 * 2 * TILE,
                         is_signed ? bf16_of_signed_bytes(from + 2 * d) : bf16_of_bytes(from + 2 * d));
    }
    for (size_t i = 0; i < 2 * (dim - d); i++) {
      float x = is_signed ? (float)(int8_t)from[2 * d + i] : (float)from[2 * d + i];
      ((uint16_t *)(void *)(to + d / 16 * 2 * TILE))[i] = qtr_bf16_from_f32(x);
    }
  }
}

/* ---- q, weights: two bf16 parts ---------------------------------------------------------------------- */

static inline vf bf16_low_word(__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }

/* 32 floats -> 32 bf16 high parts and 32 low parts. */
static inline void split(vf a, vf b, uint16_t *high, uint16_t *low) {
  __m512i h = (__m512i)_mm512_cvtne2ps_pbh(b, a);
  vf ha = bf16_low_word(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(h)));
  vf hb = bf16_low_word(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(h, 1)));
  _mm512_store_si512(high, h);
  _mm512_store_si512(low, (__m512i)_mm512_cvtne2ps_pbh(vf_sub(b, hb), vf_sub(a, ha)));
}

static void amx_prepare(const struct qtr_att_tile *t, void *scratch) {
  struct amx_scratch *w = scratch;
  size_t dim = (size_t)t->kv->config.head_dim, group = (size_t)t->group, steps = steps_of(dim);
  uint8_t *k = w->data + QTR_ATT_ROWS / SUB * steps * 2 * TILE;
  if (dim % 32 != 0) { /* dims that do not exist: zeros in K, not what another operation left */
    for (size_t block = 0; block < 4; block++) memset(k + (block * steps + steps - 1) * TILE, 0, TILE);
  }
  for (size_t r = 0; r < (size_t)t->n_rows; r++) {
    size_t row = (size_t)t->row0 + r;
    const float *q = t->q + row / group * t->q_stride + row % group * dim;
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
      split(vf_load(x), vf_load(x + 16), high, low);
      for (size_t i = 0; i < 32; i += 16) { /* the sum of what the products see: the zeros then cancel exactly */
        vf h = bf16_low_word(_mm512_cvtepu16_epi32(_mm256_load_si256((const void *)(high + i))));
        vf l = bf16_low_word(_mm512_cvtepu16_epi32(_mm256_load_si256((const void *)(low + i))));
        sum = vf_add(sum, vf_add(h, l));
      }
    }
    w->row[r].q_sum = vf_hsum(sum);
  }
}

/* ---- softmax of one row and page --------------------------------------------------------------------- */

/* As softmax_page of attention_float.h, with the weights leaving as bf16 parts. */
static inline float softmax_row(struct amx_scratch *w, size_t sub, int32_t n, struct row_state *row) {
  const struct page_scales *p = &w->scales;
  const float *s = w->s[sub];
  vf t[4], q_sum = vf_set(row->q_sum);
  for (int j = 0; j < 4; j++) {
    t[j] = vf_fnma(vf_load(p->kb + j * VW), q_sum, vf_mul(vf_load(p->ka + j * VW), vf_load(s + j * VW)));
    if (n < PAGE) t[j] = vf_first(t[j], n - j * VW, vf_set(-INFINITY));
  }
  float max = vf_hmax(vf_max(vf_max(t[0], t[1]), vf_max(t[2], t[3]))), correction = 1.0f;
  vf sum = vf_load(row->sum), zeros = vf_load(row->zeros);
  if (max > row->max) {
    correction = exp2_one(row->max - max);
    sum = vf_mul(sum, vf_set(correction));
    zeros = vf_mul(zeros, vf_set(correction));
    row->max = max;
  }
  vf top = vf_set(row->max), weight[4];
  for (int j = 0; j < 4; j++) {
    vf e = vf_exp2(vf_max(vf_sub(t[j], top), vf_set(QTR_ATT_FLOOR)));
    if (n < PAGE) e = vf_first(e, n - j * VW, vf_set(0));
    sum = vf_add(sum, e);
    weight[j] = vf_mul(e, vf_load(p->va + j * VW));
    zeros = vf_fma(weight[j], vf_load(p->vz + j * VW), zeros);
  }
  vf_store(row->sum, sum);
  vf_store(row->zeros, zeros);
  split(weight[0], weight[1], w->w[0][0][sub], w->w[0][1][sub]);
  split(weight[2], weight[3], w->w[1][0][sub], w->w[1][1][sub]);
  return correction;
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

/* n (1 … 4) tiles of C, 16 columns each, at c (row stride in bytes) [+]= A · B over `steps` steps. a: (steps, 2) tiles; b:
 * tile of step i and column block j at b + i * b_step + j * b_column. */
static inline __attribute__((always_inline)) void tile_product(int n, bool add, const uint8_t *a, const uint8_t *b,
                                                               size_t b_step, size_t b_column, size_t steps, float *c,
                                                               size_t c_stride) {
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
  for (size_t i = 0; i < steps; i++, a += 2 * TILE, b += b_step) {
    _tile_loadd(4, a, 64);
    _tile_loadd(5, a + TILE, 64);
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

static void tiles(size_t n, bool add, const uint8_t *a, const uint8_t *b, size_t b_step, size_t b_column, size_t steps,
                  float *c, size_t c_stride) {
  STORES_DONE();
  for (; n >= 4; n -= 4, b += 4 * b_column, c += 64) tile_product(4, add, a, b, b_step, b_column, steps, c, c_stride);
  if (n == 3) tile_product(3, add, a, b, b_step, b_column, steps, c, c_stride);
  if (n == 2) tile_product(2, add, a, b, b_step, b_column, steps, c, c_stride);
  if (n == 1) tile_product(1, add, a, b, b_step, b_column, steps, c, c_stride);
  STORES_DONE();
}

static void amx_segment(const struct qtr_att_tile *t, int32_t key0, int32_t key1, const struct qtr_att_state *state,
                        void *scratch) {
  struct amx_scratch *w = scratch;
  size_t dim = (size_t)t->kv->config.head_dim, stride = qtr_att_stride(dim), steps = steps_of(dim), blocks = blocks_of(dim);
  uint8_t *q = w->data, *k = q + QTR_ATT_ROWS / SUB * steps * 2 * TILE, *v = k + 4 * steps * TILE;
  size_t n_sub = qtr_ceil_div((size_t)t->n_rows, SUB);
  for (int32_t r = 0; r < t->n_rows; r++) {
    w->row[r].max = QTR_ATT_LOWEST;
    memset(w->row[r].sum, 0, sizeof w->row[r].sum);
    memset(w->row[r].zeros, 0, sizeof w->row[r].zeros);
  }
  memset(state->acc, 0, (size_t)t->n_rows * stride * sizeof(float));
  configure(
      QTR_MIN(t->n_rows, SUB)); /* with more rows the last tile may be part empty: its room is there, its content nobody's */

  for (int32_t key = key0; key < key1; key += PAGE) {
    int32_t n_page = QTR_MIN(key1 - key, PAGE);
    const uint8_t *half = qtr_cpu_kv_half(t->kv, t->layer, t->pages[key / PAGE], t->kv_head, false);
    load_scales(t, half, half + t->kv->half_bytes, &w->scales);
    unpack_k(t->kv, half, n_page, k);
    unpack_v(t->kv, half + t->kv->half_bytes, n_page, v);
    for (size_t sub = 0; sub < n_sub; sub++) {
      int32_t r0 = (int32_t)sub * SUB, rows = QTR_MIN(t->n_rows - r0, SUB);
      int32_t n_keys = QTR_MIN(qtr_att_visible(t, r0 + rows - 1) - key, n_page); /* the last row sees most */
      if (n_keys <= 0) continue;
      float *acc = state->acc + (size_t)r0 * stride;
      tiles((size_t)(n_keys + 15) / 16, false, q + sub * steps * 2 * TILE, k, TILE, steps * TILE, steps, w->s[0],
            PAGE * sizeof(float));
      for (int32_t i = 0; i < rows; i++) {
        float correction = softmax_row(w, (size_t)i, QTR_MIN(qtr_att_visible(t, r0 + i) - key, n_page), &w->row[r0 + i]);
        if (correction == 1.0f) continue;
        float *a = acc + (size_t)i * stride;
        for (size_t d = 0; d < stride; d += VW) vf_store(a + d, vf_mul(vf_load(a + d), vf_set(correction)));
      }
      tiles(blocks, true, (const uint8_t *)w->w, v, TILE, 2 * TILE, (size_t)(n_keys + 31) / 32, acc, stride * sizeof(float));
    }
  }
  _tile_release();
  for (int32_t r = 0; r < t->n_rows; r++) {
    float *acc = state->acc + (size_t)r * stride;
    vf zeros = vf_set(vf_hsum(vf_load(w->row[r].zeros)));
    for (size_t d = 0; d < stride; d += VW) vf_store(acc + d, vf_sub(vf_load(acc + d), zeros));
    state->max[r] = w->row[r].max;
    state->sum[r] = vf_hsum(vf_load(w->row[r].sum));
  }
}

static const struct qtr_att_kernel kernel = {amx_scratch_bytes, amx_prepare, amx_segment};
const struct qtr_att_kernel *qtr_cpu_attention_amx(void) { return &kernel; }
#else
const struct qtr_att_kernel *qtr_cpu_attention_amx(void) { return NULL; }
#endif
