/* linear_avx2.c - linear_dot.h in AVX2 and FMA. */
#ifdef __AVX2__
#include <immintrin.h>
#include <stdint.h>

typedef __m256i vint;
typedef __m256 vfloat;
enum { VECTORS = 4, DOT_TOKENS = 2 };

static inline vint v_load(const void *p) { return _mm256_loadu_si256(p); }
static inline void v_store(int32_t *p, vint v) { _mm256_storeu_si256((__m256i *)p, v); }
static inline vint v_zero(void) { return _mm256_setzero_si256(); }
static inline vint v_nibble_low(vint w) { return _mm256_and_si256(w, _mm256_set1_epi8(15)); }
static inline vint v_nibble_high(vint w) { return v_nibble_low(_mm256_srli_epi16(w, 4)); }
static inline vint v_set32(int32_t x) { return _mm256_set1_epi32(x); }
static inline vint v_add(vint a, vint b) { return _mm256_add_epi32(a, b); }
static inline vint v_sub(vint a, vint b) { return _mm256_sub_epi32(a, b); }
static inline vint v_mul(vint a, vint b) { return _mm256_mullo_epi32(a, b); }
static inline vint v_broadcast4(const int8_t *p) {
  int32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return _mm256_set1_epi32(word);
}
static inline vint v_bytes32(const uint8_t *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
/* Pairs of products of codes <= 15 fit 16 bits; those of larger bytes do not, and are formed from 16-bit halves. */
static inline vint v_dot_codes(vint acc, vint w, vint x) {
  return v_add(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
static inline vint v_dot_bytes(vint acc, vint w, vint x) {
  vint even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  vint odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
  return v_add(acc, v_add(even, odd));
}
static inline vfloat f_zero(void) { return _mm256_setzero_ps(); }
static inline vfloat f_set1(float x) { return _mm256_set1_ps(x); }
static inline vfloat f_fma(vfloat a, vfloat b, vfloat c) { return _mm256_fmadd_ps(a, b, c); }
static inline vfloat f_load_f32(const void *p) { return _mm256_loadu_ps(p); }
static inline vfloat f_load_f16(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
static inline vfloat f_load_bf16(const void *p) {
  vint wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline void f_store(float *p, vfloat v) { _mm256_storeu_ps(p, v); }

#include "backend/cpu/linear_dot.h"

const struct qtr_linear_kernels *qtr_cpu_linear_avx2(void) { return &kernels; }
#else
#include "backend/cpu/linear.h"

const struct qtr_linear_kernels *qtr_cpu_linear_avx2(void) { return NULL; }
#endif
