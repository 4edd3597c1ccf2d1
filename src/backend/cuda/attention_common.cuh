/* attention_common.cuh - what the attention kernels share: their parameters, the plan's layout, reading codes as fp16, and
 * the algebra that keeps scales and zeros outside the matrix products.
 *
 * Codes enter the tensor cores as fp16 subnormals: a code c of 4 or 8 bits in the low bits of a half is c * 2^-24 exactly,
 * so unpacking is an AND; a nibble at bit 4 is 16 times as much. K: q is divided by 16 for dims whose nibble is there
 * (exact, but for the last bits of |q| < 2^-10: 2^-21 at most). V: odd row halves of the result are divided by 16 at the
 * end.
 *
 * Score, in log2: t = (q . code) * a - sum(q) * b, with a = s_k * scale * log2 e * 2^24 and b = s_k * z_k * scale * log2 e.
 *
 * Weight: w = 2^(t + log2 s_v - m). Decode: m is the running maximum of t + log2 s_v less 15. Prefill: the same less 11,
 * raised only when a weight would pass 2^15, so that results are seldom rescaled.
 *
 * Result: (sum of w code 2^24 - sum of w z_v) / sum of w / s_v.
 *
 * Only w is rounded to fp16 (2^-11 of w * code; weights below 2^-25 of the largest, 2^-36 of it); sums are fp32. */
#ifndef QTR_BACKEND_CUDA_ATTENTION_COMMON_CUH
#define QTR_BACKEND_CUDA_ATTENTION_COMMON_CUH

#include <cuda_fp16.h>

#include "backend/cuda/attention_plan.h"
#include "backend/cuda/kv_layout.h"

#define LOG2_E 1.44269504088896341f
#define WEIGHT_BITS 15.0f /* log2 of the largest weight, */
#define WEIGHT_TOP 11.0f  /* and in prefill of the largest when the maximum is raised */

struct attention_params {
  const __half *qkv;                /* (n_tokens, width) */
  __half *out;                      /* (n_tokens, n_heads * dim) */
  const uint8_t *data;              /* the cache */
  const struct qtr_cuda_head *head; /* (n_kv_heads) of this layer: retrieval heads first, then streaming heads */
  const int32_t *q_start, *kv_len, *block_table, *stream_table;
  const uint8_t *plan; /* of the pass */
  uint8_t *scratch;
  const int32_t *lists;          /* of this layer: (n_slots, n_kv_heads, choosers) of list_ints */
  float scale, k_scale, v_scale; /* k_scale, v_scale: INT8_STATIC */
  int32_t n_tokens, n_seqs, max_blocks, n_heads, n_kv_heads, group, width, dim;
  int32_t n_retrieval, list_ints;
  bool each_head;      /* the query heads of a group have lists of their own */
  int32_t sink, local; /* of streaming heads, for given tokens: of those prefill takes no others */
};

/* A load of what earlier work in the stream wrote. EARLY: before qtr_begin(), when an SM's L1 cache may still remember the
 * step before; later loads may share the L1 cache's lines: the warps of a block read the same plan. */
template <bool EARLY, class T>
__device__ __forceinline__ static T load(const T *from) {
  return EARLY ? __ldcg(from) : *from;
}

/* A head's table of pages. */
__device__ __forceinline__ static const int32_t *head_table(const struct attention_params &p, int place) {
  return place < p.n_retrieval ? p.block_table : p.stream_table;
}
/* The pages that head `place` has chosen for an entry of list >= 0; member: of the group. */
__device__ __forceinline__ static const int32_t *chosen_pages(const struct attention_params &p, int list, int kv_head,
                                                              int member) {
  size_t at = (size_t)list * p.n_kv_heads + kv_head;
  if (p.each_head) at = at * p.group + member;
  return p.lists + at * p.list_ints + sizeof(struct qtr_selection) / sizeof(int32_t);
}

__device__ __forceinline__ static float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ static float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ static float fast_inverse(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/* ---- codes to fp16 ------------------------------------------------------------------------------- */

template <int FORMAT>
struct kv_traits {
  static constexpr int fragments = FORMAT == QTR_KV_F16 ? 1 : FORMAT == QTR_KV_INT4 ? 4 : 2; /* in a chunk */
  static constexpr bool is_int = FORMAT != QTR_KV_F16;
  static constexpr bool has_params = FORMAT == QTR_KV_INT4 || FORMAT == QTR_KV_INT8;
  /* q's factor for dims of the second column half; what (q . code) is to be multiplied with */
  static constexpr float q_high = FORMAT == QTR_KV_INT4 ? 0.0625f : 1.0f;
  static constexpr float unit = FORMAT == QTR_KV_F16 ? 1.0f : 0x1p24f;
  /* what sums over V are to be multiplied with, rows of the first and the second half */
  static constexpr float out_low = is_int ? 0x1p24f : 1.0f, out_high = FORMAT == QTR_KV_INT4  ? 0x1p20f
                                                                       : FORMAT == QTR_KV_F16 ? 1.0f
                                                                                              : 0x1p24f;
};

__device__ __forceinline__ static uint32_t prmt(uint32_t x, uint32_t selector) {
  uint32_t y;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(y) : "r"(x), "r"(selector));
  return y;
}

/* Fragment i of a chunk as the four registers of an A operand. */
template <int FORMAT, bool IS_V>
__device__ __forceinline__ static void fragment_expand(const uint32_t (&chunk)[4], int i, uint32_t (&a)[4]) {
  if (FORMAT == QTR_KV_F16) {
    a[0] = chunk[0], a[1] = chunk[1], a[2] = chunk[2], a[3] = chunk[3];
  } else if (FORMAT == QTR_KV_INT4) {
    uint32_t x = chunk[i], y = x >> 8;
    a[0] = x & 0x000f000fu;
    a[IS_V ? 1 : 2] = x & 0x00f000f0u;
    a[IS_V ? 2 : 1] = y & 0x000f000fu;
    a[3] = y & 0x00f000f0u;
  } else {
    uint32_t x = chunk[2 * i], y = chunk[2 * i + 1];
    a[0] = prmt(x, 0x4140), a[1] = prmt(x, 0x4342);
    a[2] = prmt(y, 0x4140), a[3] = prmt(y, 0x4342);
  }
}

/* What a token's scales and zeros make of its column: see above. Tokens that do not count get weight zero. */
struct token_params {
  float a, b, log_s, inv_s, zero;
};
template <int FORMAT>
__device__ __forceinline__ static struct token_params token_make(uint32_t k_pair, uint32_t v_pair, float log2_scale,
                                                                 float k_static, float v_static, bool counts) {
  struct token_params t;
  if (kv_traits<FORMAT>::has_params) {
    float2 k = __half22float2(*(const __half2 *)&k_pair), v = __half22float2(*(const __half2 *)&v_pair);
    float s = k.x * log2_scale;
    t.a = s * kv_traits<FORMAT>::unit;
    t.b = s * k.y;
    t.log_s = fast_log2(v.x);
    t.inv_s = fast_inverse(v.x);
    t.zero = v.y;
  } else if (FORMAT == QTR_KV_INT8_STATIC) {
    float s = k_static * log2_scale;
    t.a = s * kv_traits<FORMAT>::unit;
    t.b = s * 128;
    t.log_s = 0; /* one scale for all: it multiplies the result */
    t.inv_s = 1;
    t.zero = 128;
  } else {
    t.a = log2_scale;
    t.b = t.log_s = t.zero = 0;
    t.inv_s = 1;
  }
  if (!counts) {
    t.a = t.b = t.inv_s = t.zero = 0;
    t.log_s = -INFINITY;
  }
  return t;
}

/* q as the tensor cores want it, two neighbouring dims; high: of the second column half. */
template <int FORMAT>
__device__ __forceinline__ static uint32_t q_scale(uint32_t q, bool high) {
  if (FORMAT != QTR_KV_INT4) return q;
  __half2 x = __hmul2(*(__half2 *)&q, __float2half2_rn(high ? kv_traits<FORMAT>::q_high : 1.0f));
  return *(uint32_t *)&x;
}

#endif
