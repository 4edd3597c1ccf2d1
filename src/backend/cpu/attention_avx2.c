/* attention_avx2.c - attention_float.h in AVX2 with FMA. */
#include "backend/cpu/attention.h"

#ifdef __AVX2__
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "base/checked.h"
#include "base/half.h"

enum { VW = 8, GEMM_VECTORS = 2 };
typedef __m256 vf;
typedef __m256i vi;

static inline vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void vf_store(float *p, vf x) { _mm256_storeu_ps(p, x); }
static inline vf vf_set(float x) { return _mm256_set1_ps(x); }
static inline vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf vf_fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
static inline vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vf vf_scale2(vf p, vf t) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(t), 23)));
}
static inline vf vf_first(vf x, int32_t n, vf fill) {
  __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return _mm256_blendv_ps(fill, x, _mm256_castsi256_ps(mask));
}
static inline float vf_hmax(vf x) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
static inline float vf_hsum(vf x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline vf vf_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }
static inline vi vi_load_u16(const uint8_t *p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)); }
static inline vf vf_bits(vi x, int shift, int mask) {
  return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(x, shift), _mm256_set1_epi32(mask)));
}
static inline vf vf_bits4(vi x, int shift) { return vf_bits(x, shift, 15); }
static inline vf vf_bits8(vi x, int shift) { return vf_bits(x, shift, 255); }
static inline vf vf_signed8(vi x, int shift) {
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(x, 24 - shift), 24));
}

#include "backend/cpu/attention_float.h"

static const struct qtr_att_kernel kernel = {float_scratch_bytes, float_prepare, float_segment};
const struct qtr_att_kernel *qtr_cpu_attention_avx2(void) { return &kernel; }
#else
const struct qtr_att_kernel *qtr_cpu_attention_avx2(void) { return NULL; }
#endif
