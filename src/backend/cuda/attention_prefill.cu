#include "backend/cuda/attention_kernels.h"
cudaError_t qtr_cuda_attention_prefill(const struct attention_params *p, int format, const struct qtr_attention_plan *plan,
                                       cudaStream_t stream) {
  (void)plan;
  return qtr_cuda_attention_generic(p, format, stream);
}
