/* linear_avx512.h - the registers of linear_dot.h in AVX-512, with VNNI where the including file may use it. */
#include <immintrin.h>
#include <stdint.h>

typedef __m512i vint;
typedef __m512 vfloat;
enum { VECTORS = 2, DOT_TOKENS = 8 };

static inline vint v_load(const void *p) { return _mm512_loadu_si512(p); }
static inline void v_store(int32_t *p, vint v) { _mm512_storeu_si512(p, v); }
static inline vint v_zero(void) { return _mm512_setzero_si512(); }
static inline vint v_nibble_low(vint w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
static inline vint v_nibble_high(vint w) { return v_nibble_low(_mm512_srli_epi16(w, 4)); }
static inline vint v_set32(int32_t x) { return _mm512_set1_epi32(x); }
static inline vint v_add(vint a, vint b) { return _mm512_add_epi32(a, b); }
static inline vint v_sub(vint a, vint b) { return _mm512_sub_epi32(a, b); }
static inline vint v_mul(vint a, vint b) { return _mm512_mullo_epi32(a, b); }
static inline vint v_broadcast4(const int8_t *p) {
  int32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return _mm512_set1_epi32(word);
}
static inline vint v_bytes32(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
#ifdef __AVX512VNNI__
static inline vint v_dot_codes(vint acc, vint w, vint x) { return _mm512_dpbusd_epi32(acc, w, x); }
static inline vint v_dot_bytes(vint acc, vint w, vint x) { return _mm512_dpbusd_epi32(acc, w, x); }
#else
/* Pairs of products of codes <= 15 fit 16 bits; those of larger bytes do not, and are formed from 16-bit halves. */
static inline vint v_dot_codes(vint acc, vint w, vint x) {
  return v_add(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(w, x), _mm512_set1_epi16(1)));
}
static inline vint v_dot_bytes(vint acc, vint w, vint x) {
  vint even = _mm512_madd_epi16(_mm512_and_si512(w, _mm512_set1_epi16(255)), _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
  vint odd = _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(x, 8));
  return v_add(acc, v_add(even, odd));
}
#endif
static inline vfloat f_zero(void) { return _mm512_setzero_ps(); }
static inline vfloat f_set1(float x) { return _mm512_set1_ps(x); }
static inline vfloat f_fma(vfloat a, vfloat b, vfloat c) { return _mm512_fmadd_ps(a, b, c); }
static inline vfloat f_load_f32(const void *p) { return _mm512_loadu_ps(p); }
static inline vfloat f_load_f16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline vfloat f_load_bf16(const void *p) {
  vint wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
static inline void f_store(float *p, vfloat v) { _mm512_storeu_ps(p, v); }

#include "backend/cpu/linear_dot.h"
