/* kv_avx2.c - kv_rows.h in AVX2. */
#include "backend/cpu/kv.h"

#ifdef __AVX2__
#include <immintrin.h>

enum { RW = 8 };
typedef __m256 rf;
static inline rf rf_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void rf_store(float *p, rf x) { _mm256_storeu_ps(p, x); }
static inline rf rf_set(float x) { return _mm256_set1_ps(x); }
static inline rf rf_add(rf a, rf b) { return _mm256_add_ps(a, b); }
static inline rf rf_sub(rf a, rf b) { return _mm256_sub_ps(a, b); }
static inline rf rf_mul(rf a, rf b) { return _mm256_mul_ps(a, b); }
static inline rf rf_min(rf a, rf b) { return _mm256_min_ps(a, b); }
static inline rf rf_max(rf a, rf b) { return _mm256_max_ps(a, b); }
static inline float rf_hmin(rf x) {
  __m128 m = _mm_min_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  m = _mm_min_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_min_ss(m, _mm_movehdup_ps(m)));
}
static inline float rf_hmax(rf x) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
static inline __m128i words(rf x) {
  __m256i i = _mm256_cvtps_epi32(x);
  return _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
}
static inline void rf_store_codes(uint8_t *p, rf x) { _mm_storel_epi64((void *)p, _mm_packus_epi16(words(x), words(x))); }
static inline void rf_store_signed(uint8_t *p, rf x) { _mm_storel_epi64((void *)p, _mm_packs_epi16(words(x), words(x))); }
static inline void rf_store_f16(uint16_t *p, rf x) {
  _mm_storeu_si128((void *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

typedef __m256d rd;
static inline rd rd_zero(void) { return _mm256_setzero_pd(); }
static inline rd rd_load(const float *p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
static inline rd rd_load_f16(const uint16_t *p) { return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64((const void *)p))); }
static inline rd rd_add(rd a, rd b) { return _mm256_add_pd(a, b); }
static inline rd rd_mul(rd a, rd b) { return _mm256_mul_pd(a, b); }
static inline rd rd_max(rd a, rd b) { return _mm256_max_pd(a, b); }
static inline double rd_hsum(rd x) {
  __m128d s = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}

#include "backend/cpu/kv_rows.h"

const struct qtr_cpu_kv_rows *qtr_cpu_kv_rows_avx2(void) { return &rows; }
#else
const struct qtr_cpu_kv_rows *qtr_cpu_kv_rows_avx2(void) { return NULL; }
#endif
