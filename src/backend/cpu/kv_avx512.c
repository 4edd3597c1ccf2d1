/* kv_avx512.c - kv_rows.h in AVX-512. */
#include "backend/cpu/kv.h"

#ifdef __AVX512F__
#include <immintrin.h>

enum { RW = 16 };
typedef __m512 rf;
static inline rf rf_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void rf_store(float *p, rf x) { _mm512_storeu_ps(p, x); }
static inline rf rf_set(float x) { return _mm512_set1_ps(x); }
static inline rf rf_add(rf a, rf b) { return _mm512_add_ps(a, b); }
static inline rf rf_sub(rf a, rf b) { return _mm512_sub_ps(a, b); }
static inline rf rf_mul(rf a, rf b) { return _mm512_mul_ps(a, b); }
static inline rf rf_min(rf a, rf b) { return _mm512_min_ps(a, b); }
static inline rf rf_max(rf a, rf b) { return _mm512_max_ps(a, b); }
static inline float rf_hmin(rf x) { return _mm512_reduce_min_ps(x); }
static inline float rf_hmax(rf x) { return _mm512_reduce_max_ps(x); }
static inline void rf_store_codes(uint8_t *p, rf x) {
  _mm_storeu_si128((void *)p, _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(x)));
}
static inline void rf_store_signed(uint8_t *p, rf x) {
  _mm_storeu_si128((void *)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}
static inline void rf_store_f16(uint16_t *p, rf x) {
  _mm256_storeu_si256((void *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

typedef __m512d rd;
static inline rd rd_zero(void) { return _mm512_setzero_pd(); }
static inline rd rd_load(const float *p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
static inline rd rd_load_f16(const uint16_t *p) {
  return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128((const void *)p)));
}
static inline rd rd_add(rd a, rd b) { return _mm512_add_pd(a, b); }
static inline rd rd_mul(rd a, rd b) { return _mm512_mul_pd(a, b); }
static inline rd rd_max(rd a, rd b) { return _mm512_max_pd(a, b); }
static inline double rd_hsum(rd x) { return _mm512_reduce_add_pd(x); }

#include "backend/cpu/kv_rows.h"

const struct qtr_cpu_kv_rows *qtr_cpu_kv_rows_avx512(void) { return &rows; }
#else
const struct qtr_cpu_kv_rows *qtr_cpu_kv_rows_avx512(void) { return NULL; }
#endif
