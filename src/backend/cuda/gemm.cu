/* gemm.cu - launching an integer matrix product: what is refused, which tile, how the work is cut (gemm.h). */
#include "backend/cuda/gemm_internal.h"

#define COUNTER_BYTES ((size_t)QTR_MAX_SPLIT_CTAS * 2 * sizeof(uint32_t))

size_t qtr_cuda_gemm_workspace(void) {
  return COUNTER_BYTES + (size_t)QTR_MAX_SPLIT_CTAS * QTR_TILE_M * QTR_MAX_SPLIT_N * sizeof(int32_t);
}

struct qtr_gemm_plan qtr_gemm_choose(enum qtr_linear_format format, size_t n_rows, size_t n_in, size_t n_tokens, int n_sms) {
  struct qtr_gemm_plan plan = {256, 1, n_sms, 0, 8};
  (void)format, (void)n_in;
  size_t m_tiles = (n_rows + QTR_TILE_M - 1) / QTR_TILE_M;
  for (int n = 8; n < 256; n *= 2) {
    if (n_tokens <= (size_t)n) {
      plan.n = n;
      break;
    }
  }
  if (n_tokens > 256 && m_tiles > 1) plan.cluster = 2;
  size_t n_tiles = (n_tokens + (size_t)plan.n - 1) / (size_t)plan.n;
  size_t pairs = (m_tiles + (size_t)plan.cluster - 1) / (size_t)plan.cluster * n_tiles;
  bool cut = plan.n <= 64 || (n_tokens <= 256 && pairs < (size_t)n_sms);
  plan.n_whole = cut ? 0 : (int32_t)pairs;
  return plan;
}

cudaError_t qtr_cuda_gemm_planned(const struct qtr_cuda_gemm_args *a, const struct qtr_gemm_plan *plan,
                                  cudaStream_t stream) {
  const struct qtr_cuda_matrix *w = a->w;
  bool silu = a->epilogue == QTR_EPILOGUE_SILU_MUL;
  size_t n_out = silu ? w->n_out / 2 : w->n_out, k_steps = (w->n_in + QTR_TILE_K - 1) / QTR_TILE_K;
  size_t m_tiles = (w->n_out + QTR_TILE_M - 1) / QTR_TILE_M, n_tiles = (a->n_tokens + (size_t)plan->n - 1) / (size_t)plan->n;
  size_t pairs = (m_tiles + (size_t)plan->cluster - 1) / (size_t)plan->cluster * n_tiles;
  int n_clusters = plan->n_ctas / plan->cluster;
  if (a->x_stride < k_steps * QTR_TILE_K || a->x_stride % QTR_TILE_K || (uintptr_t)a->x % 128 || (w->gate_up && !silu) ||
      (silu && !w->gate_up) || a->n_tokens > (1u << 30) || pairs > (1u << 30)) {
    return cudaErrorInvalidValue;
  }
  if (a->n_tokens == 0) return cudaSuccess;
  size_t whole = (size_t)plan->n_whole < pairs ? (size_t)plan->n_whole : pairs, units = (pairs - whole) * k_steps;
  if (units && (n_clusters * plan->cluster > QTR_MAX_SPLIT_CTAS || units * (size_t)(n_clusters + 1) > UINT32_MAX)) {
    return cudaErrorInvalidValue;
  }
  size_t busy = whole > units ? whole : units;
  if ((size_t)n_clusters > busy) n_clusters = (int)busy;

  struct qtr_gemm_work p = {};
  p.code = (const uint8_t *)w->code;
  p.scale = w->scale, p.szero = w->szero, p.bias = w->bias;
  p.x_scale = a->x_scale, p.x_sum = a->x_sum;
  p.x = a->x, p.x_stride = a->x_stride;
  p.out = a->out;
  p.counter = (uint32_t *)a->workspace;
  p.partial = (int32_t *)((uint8_t *)a->workspace + COUNTER_BYTES);
  p.n_tokens = (int32_t)a->n_tokens, p.n_out = (int32_t)n_out;
  p.m_tiles = (int32_t)m_tiles, p.n_tiles = (int32_t)n_tiles, p.k_steps = (int32_t)k_steps;
  p.raster = plan->raster;
  p.n_whole = (int32_t)whole, p.n_pairs = (int32_t)pairs;
  p.epilogue = (int32_t)a->epilogue;
  p.vector = n_out % 8 == 0 && (uintptr_t)a->out % 16 == 0;
  if (w->path == QTR_CUDA_SM90) return qtr_gemm_launch_sm90(w->format, plan->n, plan->cluster, n_clusters, &p, stream);
  return cudaErrorNotSupported;
}

cudaError_t qtr_cuda_gemm(const struct qtr_cuda_gemm_args *args, cudaStream_t stream) {
  int device = 0, n_sms = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, device);
  if (e != cudaSuccess) return e;
  if (n_sms > QTR_MAX_SPLIT_CTAS) n_sms = QTR_MAX_SPLIT_CTAS;
  struct qtr_gemm_plan plan = qtr_gemm_choose(args->w->format, args->w->n_out, args->w->n_in, args->n_tokens, n_sms);
  return qtr_cuda_gemm_planned(args, &plan, stream);
}
