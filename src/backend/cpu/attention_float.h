/* attention_float.h - the attention kernel in fp32 vectors, once for all of portable C, AVX2 and AVX-512. The file that
 * includes it gives the vector type and a few operations:
 *   VW, vf                                  lanes (4, 8 or 16) and a vector of floats
 *   vf_load, vf_store, vf_set, vf_add, vf_sub, vf_mul, vf_max
 *   vf_fma(a, b, c) = a * b + c, vf_fnma(a, b, c) = c - a * b      fused where the instructions are
 *   vf_scale2(p, t)                         p * 2^n where t = n + 1.5 * 2^23; or, with HAVE_VF_EXP2 defined,
 *   vf_exp2(x)                              2^x for x <= 16, 0 for -infinity
 *   vf_first(x, n, fill)                    lanes below n of x, the others `fill`
 *   vf_hmax(x), vf_hsum(x)                  over the lanes, in one fixed order
 *   vf_load_f16(p)
 *   vi, vi_load_u16(p)                      VW 16-bit words as 32-bit lanes
 *   vf_bits4(x, shift), vf_bits8(x, shift), vf_signed8(x, shift)   bit fields of the lanes as floats
 *   GEMM_VECTORS                            columns of the product kernel in vectors: 4 rows of them stay in registers
 * With ATTENTION_NO_KERNEL it gives only scales, exponential and row state, for the AMX kernel.
 *
 * For each page of 64 keys: K and V codes become floats once, in scratch; then, four rows at a time, scores = q · codes,
 * softmax, weights · codes. Scales and zeros stay outside of the products:
 *
 *   score_t = ka_t (q · code_t) - kb_t Σq      ka = scale_k log2(e) / sqrt(d),  kb = ka zero_k
 *   out     = Σ_t w_t code_t - Σ_t w_t vz_t    w_t = 2^(score_t - max) scale_v
 */

enum { ROW_BLOCK = 4, PAGE = QTR_PAGE_TOKENS };

/* Scales and zeros of a page, as the formulas above need them. */
struct page_scales {
  float ka[PAGE], kb[PAGE], va[PAGE], vz[PAGE];
};

/* ---- a page from codes to floats ------------------------------------------------------------------- */

static inline void load_scales(const struct qtr_att_tile *t, const uint8_t *k, const uint8_t *v, struct page_scales *p) {
  const struct qtr_kv *kv = t->kv;
  if (kv->half_bytes == kv->code_bytes) {
    float sk = 1, sv = 1;
    if (kv->static_scale) {
      sk = kv->static_scale[2 * t->layer];
      sv = kv->static_scale[2 * t->layer + 1];
    }
    vf ka = vf_set(sk * t->log2_scale), va = vf_set(sv), none = vf_set(0);
    for (size_t i = 0; i < PAGE; i += VW) {
      vf_store(p->ka + i, ka);
      vf_store(p->kb + i, none);
      vf_store(p->va + i, va);
      vf_store(p->vz + i, none);
    }
    return;
  }
  const uint16_t *ks = qtr_cpu_kv_scales(kv, k), *vs = qtr_cpu_kv_scales(kv, v);
  vf factor = vf_set(t->log2_scale);
  for (size_t i = 0; i < PAGE; i += VW) {
    vf ka = vf_mul(vf_load_f16(ks + i), factor);
    vf_store(p->ka + i, ka);
    vf_store(p->kb + i, vf_mul(ka, vf_load_f16(ks + PAGE + i)));
    vf_store(p->va + i, vf_load_f16(vs + i));
    vf_store(p->vz + i, vf_load_f16(vs + PAGE + i));
  }
}

#ifndef ATTENTION_NO_KERNEL

/* K of the first n keys -> k (dim, 64), a row of keys for each dim; whole blocks of 16 keys are written. */
static inline void unpack_k(const struct qtr_kv *kv, const uint8_t *half, int32_t n, float *restrict k) {
  size_t dim = (size_t)kv->config.head_dim;
  for (size_t key = 0; key < (size_t)n; key += 16) {
    const uint8_t *from = half + key / 16 * (kv->code_bytes / 4);
    float *to = k + key;
    switch (kv->config.format) {
      case QTR_KV_F16:
        for (size_t d = 0; d < dim; d++) {
          for (size_t i = 0; i < 16; i += VW)
            vf_store(to + d * PAGE + i, vf_load_f16((const uint16_t *)(const void *)from + d * 16 + i));
        }
        break;
      case QTR_KV_INT4: {
        size_t d = 0;
        for (; d + 4 <= dim; d += 4) {
          for (size_t i = 0; i < 16; i += VW) {
            vi x = vi_load_u16(from + d * 8 + 2 * i);
            vf_store(to + d * PAGE + i, vf_bits4(x, 0));
            vf_store(to + (d + 1) * PAGE + i, vf_bits4(x, 8));
            vf_store(to + (d + 2) * PAGE + i, vf_bits4(x, 4));
            vf_store(to + (d + 3) * PAGE + i, vf_bits4(x, 12));
          }
        }
        for (size_t i = 0; d < dim && i < 16; i++) {
          to[d * PAGE + i] = (float)(from[d * 8 + i] & 15);
          to[(d + 1) * PAGE + i] = (float)(from[d * 8 + i] >> 4);
        }
        break;
      }
      case QTR_KV_INT8:
        for (size_t d = 0; d < dim; d += 2) {
          for (size_t i = 0; i < 16; i += VW) {
            vi x = vi_load_u16(from + d * 16 + 2 * i);
            vf_store(to + d * PAGE + i, vf_bits8(x, 0));
            vf_store(to + (d + 1) * PAGE + i, vf_bits8(x, 8));
          }
        }
        break;
      default:
        for (size_t d = 0; d < dim; d += 2) {
          for (size_t i = 0; i < 16; i += VW) {
            vi x = vi_load_u16(from + d * 16 + 2 * i);
            vf_store(to + d * PAGE + i, vf_signed8(x, 0));
            vf_store(to + (d + 1) * PAGE + i, vf_signed8(x, 8));
          }
        }
        break;
    }
  }
}

/* V of the first n tokens -> v (64, stride); more than n may be written. */
static inline void unpack_v(const struct qtr_kv *kv, const uint8_t *half, int32_t n, float *restrict v) {
  size_t dim = (size_t)kv->config.head_dim, stride = qtr_att_stride(dim), token_bytes = kv->code_bytes / PAGE;
  if (kv->config.format == QTR_KV_F16) {
    for (size_t token = 0; token < (size_t)n; token++) {
      const uint16_t *from = (const uint16_t *)(const void *)(half + token * token_bytes);
      size_t d = 0;
      for (; d + VW <= dim; d += VW) vf_store(v + token * stride + d, vf_load_f16(from + d));
      for (; d < dim; d++) v[token * stride + d] = qtr_f16_to_f32(from[d]);
    }
    return;
  }
  for (size_t token = 0; token < (size_t)n;
       token += token % 16 == 15 ? 17 : 1) { /* 0 - 15, 32 - 47: each with the token 16 later */
    const uint8_t *from = half + qtr_cpu_kv_pair(token) * 2 * token_bytes;
    float *to = v + token * stride, *next = to + 16 * stride;
    size_t d = 0;
    switch (kv->config.format) {
      case QTR_KV_INT4:
        for (; d + 32 <= dim; d += 32) {
          for (size_t i = 0; i < 16; i += VW) {
            vi x = vi_load_u16(from + d + 2 * i);
            vf_store(to + d + i, vf_bits4(x, 0));
            vf_store(to + d + 16 + i, vf_bits4(x, 4));
            vf_store(next + d + i, vf_bits4(x, 8));
            vf_store(next + d + 16 + i, vf_bits4(x, 12));
          }
        }
        for (size_t i = 0, width = (dim - d) / 2; i < width; i++) {
          to[d + i] = (float)(from[d + 2 * i] & 15);
          to[d + width + i] = (float)(from[d + 2 * i] >> 4);
          next[d + i] = (float)(from[d + 2 * i + 1] & 15);
          next[d + width + i] = (float)(from[d + 2 * i + 1] >> 4);
        }
        break;
      case QTR_KV_INT8:
        for (; d + VW <= dim; d += VW) {
          vi x = vi_load_u16(from + 2 * d);
          vf_store(to + d, vf_bits8(x, 0));
          vf_store(next + d, vf_bits8(x, 8));
        }
        for (; d < dim; d++) {
          to[d] = (float)from[2 * d];
          next[d] = (float)from[2 * d + 1];
        }
        break;
      default:
        for (; d + VW <= dim; d += VW) {
          vi x = vi_load_u16(from + 2 * d);
          vf_store(to + d, vf_signed8(x, 0));
          vf_store(next + d, vf_signed8(x, 8));
        }
        for (; d < dim; d++) {
          to[d] = (float)(int8_t)from[2 * d];
          next[d] = (float)(int8_t)from[2 * d + 1];
        }
        break;
    }
  }
}

#endif

/* ---- softmax ---------------------------------------------------------------------------------------- */

#ifndef HAVE_VF_EXP2
/* 2^x for x <= 16, x below QTR_ATT_FLOOR as there: n + r with |r| <= 1/2, polynomial of degree 5 with constant term 1
 * (relative error 1e-7, exact at integers). */
static inline vf vf_exp2(vf x) {
  const vf magic = vf_set(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer in the low bits */
  x = vf_max(x, vf_set(QTR_ATT_FLOOR));
  vf t = vf_add(x, magic), r = vf_sub(x, vf_sub(t, magic));
  vf p = vf_set(0.001326472731307149f);
  p = vf_fma(p, r, vf_set(0.009671512991189957f));
  p = vf_fma(p, r, vf_set(0.05550733581185341f));
  p = vf_fma(p, r, vf_set(0.24022242426872253f));
  p = vf_fma(p, r, vf_set(0.6931470036506653f));
  return vf_scale2(vf_fma(p, r, vf_set(1.0f)), t);
}
#endif

static inline float exp2_one(float x) {
  float lanes[VW];
  vf_store(lanes, vf_exp2(vf_set(x)));
  return lanes[0];
}

/* Running state of a tile's rows: the exponent that weights are relative to, Σq, which keys they see, and by lane the sum
 * of weights and the part of the zeros.
 *
 * The exponent follows the maximum only when it lags by more than 8 (weights then reach 2^8, which fp32 does not mind).
 * After a row's first page that is rare, so sums are seldom scaled, and a page's weights need not wait for its maximum: the
 * processor guesses that nothing changes. */
struct rows_state {
  float max[QTR_ATT_ROWS], limit[QTR_ATT_ROWS]; /* 0 and -infinity before the first key, then the exponent and 8 */
  float q_sum[QTR_ATT_ROWS];
  int32_t visible[QTR_ATT_ROWS], hole_from[QTR_ATT_ROWS], hole_to[QTR_ATT_ROWS];
  float sum[QTR_ATT_ROWS][16], zeros[QTR_ATT_ROWS][16];
};

static inline void rows_start(const struct qtr_att_tile *t, struct rows_state *rows) {
  for (int32_t r = 0; r < t->n_rows; r++) {
    rows->max[r] = 0;
    rows->limit[r] = -INFINITY;
    rows->visible[r] = qtr_att_visible(t, r);
    qtr_att_hole(t, r, &rows->hole_from[r], &rows->hole_to[r]);
  }
  memset(rows->sum, 0, (size_t)t->n_rows * sizeof rows->sum[0]);
  memset(rows->zeros, 0, (size_t)t->n_rows * sizeof rows->zeros[0]);
}

/* Which keys of a page a row sees: the first n, but for those from `from` to before `to`. */
struct page_view {
  int32_t n, from, to;
};
static inline struct page_view page_see(const struct rows_state *rows, size_t r, int32_t key, int32_t n_page) {
  struct page_view see = {QTR_MIN(rows->visible[r] - key, n_page), 0, 0};
  if (rows->hole_to[r] > key && rows->hole_from[r] < key + PAGE) {
    see.from = QTR_MAX(rows->hole_from[r] - key, 0);
    see.to = QTR_MIN(rows->hole_to[r] - key, PAGE);
  }
  return see;
}
static inline bool page_whole(struct page_view see) { return see.n == PAGE && see.to == see.from; }
static inline bool page_empty(struct page_view see) { return see.n <= 0 || (see.from == 0 && see.to >= see.n); }

/* Vector j of a page: lanes of keys that are seen, the others `fill`. */
static inline __attribute__((always_inline)) vf page_lanes(vf x, struct page_view see, vf fill, int j) {
  vf y = vf_first(x, see.n - j * VW, fill);
  return see.to == see.from ? y : vf_first(vf_first(y, see.from - j * VW, fill), see.to - j * VW, y);
}

/* Row r meets a score `above` its exponent: the new exponent. Returns the factor for the row's `acc`. */
static inline float row_raise(struct rows_state *rows, size_t r, float above) {
  bool fresh = rows->limit[r] < 0;
  float before = rows->max[r];
  rows->max[r] = before + above;
  rows->limit[r] = 8;
  if (fresh) return 1.0f; /* nothing summed yet */
  float factor = exp2_one(before - rows->max[r]);
  vf_store(rows->sum[r], vf_mul(vf_load(rows->sum[r]), vf_set(factor)));
  vf_store(rows->zeros[r], vf_mul(vf_load(rows->zeros[r]), vf_set(factor)));
  return factor;
}

static inline void row_scale(float *acc, size_t stride, float factor) {
  for (size_t d = 0; d < stride; d += VW) vf_store(acc + d, vf_mul(vf_load(acc + d), vf_set(factor)));
}

/* acc (n_rows, stride) - Σ w vz, and the sums over lanes. */
static inline void rows_finish(const struct qtr_att_tile *t, const struct rows_state *rows,
                               const struct qtr_att_state *state) {
  size_t stride = qtr_att_stride((size_t)t->kv->config.head_dim);
  for (size_t r = 0; r < (size_t)t->n_rows; r++) {
    float *acc = state->acc + r * stride;
    vf zeros = vf_set(vf_hsum(vf_load(rows->zeros[r])));
    for (size_t d = 0; d < stride; d += VW) vf_store(acc + d, vf_sub(vf_load(acc + d), zeros));
    state->max[r] = rows->limit[r] < 0 ? QTR_ATT_LOWEST : rows->max[r];
    state->sum[r] = vf_hsum(vf_load(rows->sum[r]));
  }
}

/* Scores relative to the row's exponent, x_j = ka s - kb Σq - max, vector j of a page; `fill` where a key is not seen. */
static inline __attribute__((always_inline)) vf row_score(const float *s, const struct page_scales *p,
                                                          const struct rows_state *rows, size_t r, bool full,
                                                          struct page_view see, float fill, int j) {
  vf x = vf_fma(vf_load(s + j * VW), vf_load(p->ka + j * VW),
                vf_fnma(vf_load(p->kb + j * VW), vf_set(rows->q_sum[r]), vf_set(-rows->max[r])));
  return full ? x : page_lanes(x, see, vf_set(fill), j);
}

#ifndef ATTENTION_NO_KERNEL

/* s (64): q · code, becomes the weights w; keys that are not seen get 0. Returns the factor of what was summed before. */
static inline float softmax_page(float *restrict s, const struct page_scales *p, struct page_view see,
                                 struct rows_state *rows, size_t r) {
  enum { N = PAGE / VW };
  bool full = page_whole(see);
  vf x[N], m[N];
  for (int j = 0; j < N; j++) m[j] = x[j] = row_score(s, p, rows, r, full, see, -INFINITY, j);
  for (int width = N / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; j++) m[j] = vf_max(m[j], m[j + width]);
  }
  float above = vf_hmax(m[0]), factor = 1.0f;
  if (above > rows->limit[r]) {
    factor = row_raise(rows, r, above);
    for (int j = 0; j < N; j++) x[j] = row_score(s, p, rows, r, full, see, -INFINITY, j);
  }
  vf sum = vf_load(rows->sum[r]), zeros = vf_load(rows->zeros[r]);
  for (int j = 0; j < N; j++) {
    vf e = vf_exp2(x[j]);
    if (!full) e = page_lanes(e, see, vf_set(0), j);
    vf w = vf_mul(e, vf_load(p->va + j * VW));
    sum = vf_add(sum, e);
    zeros = vf_fma(w, vf_load(p->vz + j * VW), zeros);
    vf_store(s + j * VW, w);
  }
  vf_store(rows->sum[r], sum);
  vf_store(rows->zeros[r], zeros);
  return factor;
}

/* ---- products --------------------------------------------------------------------------------------- */

/* c (rows, vectors * VW) = [c +] a (rows, n_k) · b (n_k, ...), each element summed over k in order. */
static inline __attribute__((always_inline)) void product(int rows, int vectors, const float *restrict a, size_t lda,
                                                          size_t n_k, const float *restrict b, size_t ldb, float *restrict c,
                                                          size_t ldc, bool add) {
  vf acc[ROW_BLOCK][GEMM_VECTORS];
  for (int r = 0; r < rows; r++) {
    for (int j = 0; j < vectors; j++) acc[r][j] = add ? vf_load(c + (size_t)r * ldc + (size_t)(j * VW)) : vf_set(0);
  }
  for (size_t k = 0; k < n_k; k++) {
    vf column[GEMM_VECTORS];
    for (int j = 0; j < vectors; j++) column[j] = vf_load(b + k * ldb + (size_t)(j * VW));
    for (int r = 0; r < rows; r++) {
      vf x = vf_set(a[(size_t)r * lda + k]);
      for (int j = 0; j < vectors; j++) acc[r][j] = vf_fma(x, column[j], acc[r][j]);
    }
  }
  for (int r = 0; r < rows; r++) {
    for (int j = 0; j < vectors; j++) vf_store(c + (size_t)r * ldc + (size_t)(j * VW), acc[r][j]);
  }
}

/* All columns: n_columns is a multiple of 16. */
static inline __attribute__((always_inline)) void product_rows(int rows, const float *restrict a, size_t lda, size_t n_k,
                                                               const float *restrict b, size_t ldb, size_t n_columns,
                                                               float *restrict c, size_t ldc, bool add) {
  size_t j = 0;
  for (; j + GEMM_VECTORS * VW <= n_columns; j += GEMM_VECTORS * VW)
    product(rows, GEMM_VECTORS, a, lda, n_k, b + j, ldb, c + j, ldc, add);
  for (; j < n_columns; j += VW) product(rows, 1, a, lda, n_k, b + j, ldb, c + j, ldc, add);
}

static void product_block(int rows, const float *restrict a, size_t lda, size_t n_k, const float *restrict b, size_t ldb,
                          size_t n_columns, float *restrict c, size_t ldc, bool add) {
  switch (rows) {
    case 1: product_rows(1, a, lda, n_k, b, ldb, n_columns, c, ldc, add); break;
    case 2: product_rows(2, a, lda, n_k, b, ldb, n_columns, c, ldc, add); break;
    case 3: product_rows(3, a, lda, n_k, b, ldb, n_columns, c, ldc, add); break;
    default: product_rows(4, a, lda, n_k, b, ldb, n_columns, c, ldc, add); break;
  }
}

/* ---- the kernel ------------------------------------------------------------------------------------- */

struct float_scratch {
  struct page_scales scales;
  struct rows_state rows;
  float s[ROW_BLOCK][PAGE];
  float data[]; /* q (QTR_ATT_ROWS, dim) | K (dim, 64) | V (64, stride) */
};

static size_t float_scratch_bytes(size_t head_dim) {
  size_t q = QTR_ATT_ROWS * qtr_att_stride(head_dim), k = head_dim * PAGE, v = PAGE * qtr_att_stride(head_dim);
  return sizeof(struct float_scratch) + (q + k + v) * sizeof(float);
}

static void float_prepare(const struct qtr_att_tile *t, void *scratch) {
  struct float_scratch *w = scratch;
  size_t dim = (size_t)t->kv->config.head_dim;
  for (size_t r = 0; r < (size_t)t->n_rows; r++) {
    const float *q = qtr_att_query(t, r);
    float *to = w->data + r * dim, rest = 0;
    vf sum = vf_set(0);
    size_t d = 0;
    for (; d + VW <= dim; d += VW) {
      vf x = vf_load(q + d);
      vf_store(to + d, x);
      sum = vf_add(sum, x);
    }
    for (; d < dim; d++) rest += to[d] = q[d];
    w->rows.q_sum[r] = vf_hsum(sum) + rest;
  }
}

static void float_segment(const struct qtr_att_tile *t, int32_t key0, int32_t key1, const struct qtr_att_state *state,
                          void *scratch) {
  struct float_scratch *w = scratch;
  size_t dim = (size_t)t->kv->config.head_dim, stride = qtr_att_stride(dim);
  float *q = w->data, *k = q + QTR_ATT_ROWS * stride, *v = k + dim * PAGE;
  rows_start(t, &w->rows);
  memset(state->acc, 0, (size_t)t->n_rows * stride * sizeof(float));

  for (int32_t key = qtr_att_next(t, key0, key1); key < key1; key = qtr_att_next(t, key + PAGE, key1)) {
    int32_t n_page = QTR_MIN(key1 - key, PAGE);
    const uint8_t *half = qtr_cpu_kv_half(t->kv, t->layer, t->pages[key / PAGE], t->kv_head, false);
    load_scales(t, half, half + t->kv->half_bytes, &w->scales);
    unpack_k(t->kv, half, n_page, k);
    unpack_v(t->kv, half + t->kv->half_bytes, n_page, v);
    for (int32_t r = 0; r < t->n_rows; r += ROW_BLOCK) {
      int rows = (int)QTR_MIN(t->n_rows - r, ROW_BLOCK);
      int32_t n_block = QTR_MIN(w->rows.visible[r + rows - 1] - key, n_page); /* the last row sees most */
      if (n_block <= 0) continue;
      product_block(rows, q + (size_t)r * dim, dim, dim, k, PAGE, (size_t)(n_block + 15) / 16 * 16, w->s[0], PAGE, false);
      for (int i = 0; i < rows; i++) {
        struct page_view see = page_see(&w->rows, (size_t)(r + i), key, n_page);
        float factor = softmax_page(w->s[i], &w->scales, see, &w->rows, (size_t)(r + i));
        if (factor != 1.0f) row_scale(state->acc + (size_t)(r + i) * stride, stride, factor);
      }
      product_block(rows, w->s[0], PAGE, (size_t)n_block, v, stride, stride, state->acc + (size_t)r * stride, stride, true);
    }
  }
  rows_finish(t, &w->rows, state);
}

#endif
