/* attention_vf_avx512.h - the vector operations of attention_float.h in AVX-512, for the AVX-512 and the AMX kernels. */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "base/checked.h"
#include "base/half.h"

enum { VW = 16, GEMM_VECTORS = 4 };
typedef __m512 vf;
typedef __m512i vi;

static inline vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void vf_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
static inline vf vf_set(float x) { return _mm512_set1_ps(x); }
static inline vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf vf_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
static inline vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
#define HAVE_VF_EXP2
/* 2^x: floor(x) leaves through the scaling, the rest 0 <= r <= 1 through a polynomial of degree 5 with constant term 1
 * (relative error 1.4e-7, exact at integers). -infinity gives 0. */
static inline vf vf_exp2(vf x) {
  vf r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC), p = vf_set(0.0018671315629035234f);
  p = vf_fma(p, r, vf_set(0.009017026983201504f));
  p = vf_fma(p, r, vf_set(0.05579991638660431f));
  p = vf_fma(p, r, vf_set(0.24016444385051727f));
  p = vf_fma(p, r, vf_set(0.6931512951850891f));
  return _mm512_scalef_ps(vf_fma(p, r, vf_set(1.0f)), x);
}
/* Weights of 2^-126 and less become 0, not denormals, which the processor computes 100 times slower. Returns the mode to
 * restore. */
static inline unsigned denormals_off(void) {
  unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040); /* flush results to zero, take operands as zero */
  return before;
}
static inline vf vf_first(vf x, int32_t n, vf fill) {
  n = n < 0 ? 0 : n > VW ? VW : n;
  return _mm512_mask_mov_ps(fill, (__mmask16)((1u << n) - 1), x);
}
static inline float vf_hmax(vf x) { return _mm512_reduce_max_ps(x); }
static inline float vf_hsum(vf x) { return _mm512_reduce_add_ps(x); }
static inline vf vf_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
static inline vi vi_load_u16(const uint8_t *p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)); }
static inline vi vi_right(vi x, int shift) { return shift ? _mm512_srli_epi32(x, (unsigned)shift) : x; }
static inline vf vf_bits4(vi x, int shift) { /* the permutation looks at four bits only: a table of 16 floats */
  return _mm512_permutexvar_ps(vi_right(x, shift), _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
}
static inline vf vf_bits8(vi x, int shift) {
  return _mm512_cvtepi32_ps(_mm512_and_si512(vi_right(x, shift), _mm512_set1_epi32(255)));
}
static inline vf vf_signed8(vi x, int shift) {
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(x, (unsigned)(24 - shift)), 24));
}
