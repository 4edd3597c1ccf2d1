/* attention_avx512.c - attention_float.h in AVX-512. */
#include "backend/cpu/attention.h"

#ifdef __AVX512F__
#include "backend/cpu/attention_vf_avx512.h"

#include "backend/cpu/attention_float.h"

static void segment(const struct qtr_att_tile *t, int32_t key0, int32_t key1, const struct qtr_att_state *state,
                    void *scratch) {
  unsigned before = denormals_off();
  float_segment(t, key0, key1, state, scratch);
  _mm_setcsr(before);
}

static const struct qtr_att_kernel kernel = {float_scratch_bytes, float_prepare, segment};
const struct qtr_att_kernel *qtr_cpu_attention_avx512(void) { return &kernel; }
#else
const struct qtr_att_kernel *qtr_cpu_attention_avx512(void) { return NULL; }
#endif
