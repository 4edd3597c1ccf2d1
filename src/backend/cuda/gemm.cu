/* gemm.cu - launching an integer matrix product: what is refused, which tile, how the work is cut (gemm.h). */
#include "backend/cuda/gemm_internal.h"

/* Microseconds of a product by tiles of n tokens and 128 rows, as measured on an H100 (bench/NOTES.md). The tensor cores
 * take 4 n cycles at 1.75 GHz for a step of 128 columns; making group weights takes 330 + 2.5 n, which small tiles do not
 * hide. A tile's epilogue takes 1.65 us at n = 128 and 2.4 us at 256; to meet, the two blocks of a split tile take 2.2 us.
 */
static double tile_time(enum qtr_linear_format format, size_t m_tiles, size_t k_steps, size_t n_tokens, int n, int split,
                        int n_sms) {
  size_t tiles = m_tiles * ((n_tokens + (size_t)n - 1) / (size_t)n) * (size_t)split;
  double waves = (double)((tiles + (size_t)n_sms - 1) / (size_t)n_sms), step = 4 * n;
  if (format == QTR_LINEAR_W4A8_G128 && step < 330 + 2.5 * n) step = 330 + 2.5 * n;
  double tile = (double)((k_steps + (size_t)split - 1) / (size_t)split) * step / 1750 + 0.9 + 0.006 * n;
  return waves * (tile + (split > 1 ? 2.2 : 0));
}

struct qtr_gemm_plan qtr_gemm_choose(enum qtr_linear_format format, size_t n_rows, size_t n_in, size_t n_tokens, int n_sms) {
  struct qtr_gemm_plan plan = {8, 128, 1, 1, 8, n_sms};
  size_t m_tiles = (n_rows + QTR_TILE_M - 1) / QTR_TILE_M, k_steps = (n_in + QTR_TILE_K - 1) / QTR_TILE_K;
  while (plan.n < 64 && n_tokens > (size_t)plan.n) plan.n *= 2;
  /* Weights' bytes rule. One SM streams about 50 GB/s with 128 rows, twice that with 64 rows and four warpgroups, so narrow
   * tiles win while they fit the GPU at once: o at 1 token 5.8 us against 8.3, qkv 7.3 against 8.6, gate_up 25.5
   * against 23.5. Two such tiles of 64 tokens do 128 (o: 7.8 us against 10.6); not 72 (down: 32 us: rows past the last token
   * cost the copy engine more than tokens); and int8 codes leave them too few stages when columns are many (down: 31 us
   * against 27.5). */
  size_t narrow = 2 * m_tiles * ((n_tokens + 63) / 64);
  bool two = n_tokens > 112 && n_tokens <= 128 && (format != QTR_LINEAR_W8A8 || k_steps <= 64);
  if (narrow <= (size_t)n_sms && (n_tokens <= 64 || two)) {
    plan.rows = 64;
    return plan;
  }
  if (n_tokens <= 64) return plan;

  if (n_tokens >= 2048) { /* fewest bytes from L2: the chip runs at its power limit here */
    plan.n = 256;
    plan.pair = m_tiles > 1 ? 2 : 1;
    return plan;
  }
  static const struct { int n, split; } tile[] = {{256, 1}, {192, 1}, {128, 1}, {128, 2}, {96, 1}, {96, 2}};
  double best = 0;
  for (size_t i = 0; i < sizeof tile / sizeof tile[0]; i++) {
    if ((size_t)tile[i].split > k_steps) continue;
    double t = tile_time(format, m_tiles, k_steps, n_tokens, tile[i].n, tile[i].split, n_sms);
    if (i && t >= best) continue;
    best = t;
    plan.n = tile[i].n;
    plan.split = tile[i].split;
  }
  return plan;
}

cudaError_t qtr_cuda_gemm_planned(const struct qtr_cuda_gemm_args *a, const struct qtr_gemm_plan *plan,
                                  cudaStream_t stream) {
  const struct qtr_cuda_matrix *w = a->w;
  bool silu = a->epilogue == QTR_EPILOGUE_SILU_MUL;
  size_t n_out = silu ? w->n_out / 2 : w->n_out, k_steps = (w->n_in + QTR_TILE_K - 1) / QTR_TILE_K;
  size_t n_rows = silu ? (n_out + 7) / 8 * 16 : n_out; /* of the kernel: gate and up in eights */
  size_t tile_rows = w->path == QTR_CUDA_SM80 ? QTR_TILE_M : (size_t)plan->rows;
  size_t m_tiles = (n_rows + tile_rows - 1) / tile_rows, n_tiles = (a->n_tokens + (size_t)plan->n - 1) / (size_t)plan->n;
  size_t pairs = (m_tiles + (size_t)plan->pair - 1) / (size_t)plan->pair * n_tiles;
  const struct qtr_cuda_gemm_rows *rows = a->rows;
  bool input = rows ? w->path == QTR_CUDA_SM90 && a->n_tokens <= 8 && w->n_in % 8 == 0 && (uintptr_t)rows->x % 16 == 0 &&
                          (uintptr_t)rows->weight % 16 == 0 && qtr_gemm_quantises_sm90(w->format, plan, k_steps)
                    : a->x_stride >= k_steps * QTR_TILE_K && a->x_stride % QTR_TILE_K == 0 && (uintptr_t)a->x % 128 == 0;
  if (!input || w->gate_up != silu || a->n_tokens > (1u << 30) || pairs > (1u << 28) || (size_t)plan->split > k_steps) {
    return cudaErrorInvalidValue;
  }
  if (a->n_tokens == 0) return cudaSuccess;

  struct qtr_gemm_work p = {};
  p.code = (const uint8_t *)w->code;
  p.scale = w->scale, p.szero = w->szero, p.bias = w->bias;
  p.x_scale = a->x_scale, p.x_sum = a->x_sum;
  p.x = a->x, p.x_stride = a->x_stride;
  p.x_rows = a->x_rows > a->n_tokens ? a->x_rows : a->n_tokens;
  p.out = a->out;
  if (rows) p.row = (const __half *)rows->x, p.norm = (const __half *)rows->weight, p.eps = rows->eps;
  p.n_tokens = (int32_t)a->n_tokens, p.n_in = (int32_t)w->n_in, p.n_out = (int32_t)n_out;
  p.m_tiles = (int32_t)m_tiles, p.n_tiles = (int32_t)n_tiles, p.k_steps = (int32_t)k_steps;
  p.n_pairs = (int32_t)pairs, p.raster = plan->raster;
  p.epilogue = (int32_t)a->epilogue;
  p.dependent = a->dependent;
  p.vector = n_out % 8 == 0 && (uintptr_t)a->out % 16 == 0;
  if (w->path == QTR_CUDA_SM80) return qtr_gemm_launch_sm80(w->format, &p, stream);
  return qtr_gemm_built_sm90() ? qtr_gemm_launch_sm90(w->format, plan, &p, stream) : cudaErrorNotSupported;
}

cudaError_t qtr_cuda_gemm_path(enum qtr_cuda_path *path) {
  int device = 0, major = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (e != cudaSuccess) return e;
  *path = major == 9 && qtr_gemm_built_sm90() ? QTR_CUDA_SM90 : QTR_CUDA_SM80;
  return major >= 8 ? cudaSuccess : cudaErrorNotSupported;
}

static cudaError_t sm_count(int *n_sms) {
  int device = 0;
  cudaError_t e = cudaGetDevice(&device);
  return e == cudaSuccess ? cudaDeviceGetAttribute(n_sms, cudaDevAttrMultiProcessorCount, device) : e;
}

bool qtr_cuda_gemm_takes_rows(const struct qtr_cuda_matrix *w, size_t n_tokens) {
  enum { MOST_TOKENS = 1 }; /* two: 57.5 us for the four products of a layer, 54.6 behind kernels of rows */
  int n_sms = 0;
  if (n_tokens > MOST_TOKENS || w->path != QTR_CUDA_SM90 || w->n_in % 8 != 0 || sm_count(&n_sms) != cudaSuccess)
    return false;
  struct qtr_gemm_plan plan = qtr_gemm_choose(w->format, w->n_out, w->n_in, n_tokens, n_sms);
  return qtr_gemm_quantises_sm90(w->format, &plan, (w->n_in + QTR_TILE_K - 1) / QTR_TILE_K);
}

cudaError_t qtr_cuda_gemm(const struct qtr_cuda_gemm_args *args, cudaStream_t stream) {
  int n_sms = 0;
  cudaError_t e = sm_count(&n_sms);
  if (e != cudaSuccess) return e;
  struct qtr_gemm_plan plan = qtr_gemm_choose(args->w->format, args->w->n_out, args->w->n_in, args->n_tokens, n_sms);
  return qtr_cuda_gemm_planned(args, &plan, stream);
}
