/* attention_generic.cu - attention of any even head_dim up to 256 and any token of a batch (spec C.5), in fp32, and the
 * entry point that chooses between the kernels. Simple, not fast: head sizes 64 and 128 have attention_decode.cu and
 * attention_prefill.cu; the laboratory compares those with this.
 *
 * One block a token and query head; warp w takes the keys w, w + 8, ... and keeps its own maximum, sum and result; the
 * warps' results are merged in order. A result depends on nothing but its sequence. */
#include "backend/cuda/attention_kernels.h"
#include "backend/cuda/launch.cuh"

enum { GENERIC_WARPS = 8, MAX_DIM = 256, PER_LANE = MAX_DIM / 32 };

template <int FORMAT>
__global__ static void __launch_bounds__(GENERIC_WARPS * 32) k_attention_generic(const struct attention_params p) {
  qtr_begin();
  __shared__ float results[GENERIC_WARPS][MAX_DIM];
  __shared__ float maxima[GENERIC_WARPS], totals[GENERIC_WARPS];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, token = blockIdx.x, head = blockIdx.y, dim = p.dim;
  int low = 0, high = p.n_seqs - 1; /* the sequence: the last whose q_start is not behind the token */
  while (low < high) {
    int middle = (low + high + 1) / 2;
    if (p.q_start[middle] <= token) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  int n = p.kv_len[low] + token - p.q_start[low] + 1;
  const int32_t *table = p.block_table + (size_t)low * p.max_blocks;
  size_t block_bytes = qtr_kv_block_bytes(FORMAT, dim), code_bytes = qtr_kv_code_bytes(FORMAT, dim);
  size_t head_at = (size_t)(head / p.group) * block_bytes;
  float q[PER_LANE], sum[PER_LANE], max = -INFINITY, total = 0;
  const __half *query = p.qkv + (size_t)token * p.width + (size_t)head * dim;
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) {
    q[j] = lane + 32 * j < dim ? __half2float(query[lane + 32 * j]) : 0;
    sum[j] = 0;
  }
  for (int t = warp; t < n; t += GENERIC_WARPS) {
    size_t at = (size_t)table[t / QTR_PAGE_TOKENS] * p.page_bytes + head_at;
    int slot = t % QTR_PAGE_TOKENS;
    float value[2][PER_LANE], dot = 0;
#pragma unroll
    for (int is_v = 0; is_v < 2; is_v++) {
      const uint8_t *block = (is_v ? p.v : p.k) + at;
      float scale = is_v ? p.v_scale : p.k_scale, zero = 128;
      if (kv_traits<FORMAT>::has_params) {
        float2 pair = __half22float2(*(const __half2 *)(block + code_bytes + slot * 4));
        scale = pair.x, zero = pair.y;
      }
#pragma unroll
      for (int j = 0; j < PER_LANE; j++) {
        int shift, i = lane + 32 * j;
        if (i >= dim) {
          value[is_v][j] = 0;
          continue;
        }
        const uint8_t *from = block + qtr_kv_element(FORMAT, dim, is_v, slot, i, &shift);
        if (FORMAT == QTR_KV_F16) {
          value[is_v][j] = __half2float(*(const __half *)from);
        } else {
          int code = FORMAT == QTR_KV_INT4 ? *from >> shift & 15 : *from;
          value[is_v][j] = (float)code * scale - zero * scale;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) dot += q[j] * value[0][j];
#pragma unroll
    for (int i = 16; i; i /= 2) dot += __shfl_xor_sync(~0u, dot, i);
    float score = dot * p.scale, next = fmaxf(max, score), factor = expf(max - next), weight = expf(score - next);
    total = total * factor + weight;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) sum[j] = sum[j] * factor + weight * value[1][j];
    max = next;
  }
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) {
    if (lane + 32 * j < dim) results[warp][lane + 32 * j] = sum[j];
  }
  if (lane == 0) maxima[warp] = max, totals[warp] = total;
  __syncthreads();
  int i = threadIdx.x;
  if (i >= dim) return;
  float m = -INFINITY, all = 0, result = 0;
  for (int w = 0; w < GENERIC_WARPS; w++) m = fmaxf(m, maxima[w]);
  for (int w = 0; w < GENERIC_WARPS; w++) {
    float factor = expf(maxima[w] - m);
    all += totals[w] * factor;
    result += results[w][i] * factor;
  }
  p.out[((size_t)token * p.n_heads + head) * dim + i] = __float2half_rn(result / all);
}

cudaError_t qtr_cuda_attention_generic(const struct attention_params *p, int format, cudaStream_t stream) {
  dim3 grid((unsigned)p->n_tokens, (unsigned)p->n_heads);
  switch (format) {
    case QTR_KV_F16: return qtr_launch(k_attention_generic<QTR_KV_F16>, grid, GENERIC_WARPS * 32, 0, stream, *p);
    case QTR_KV_INT8: return qtr_launch(k_attention_generic<QTR_KV_INT8>, grid, GENERIC_WARPS * 32, 0, stream, *p);
    case QTR_KV_INT4: return qtr_launch(k_attention_generic<QTR_KV_INT4>, grid, GENERIC_WARPS * 32, 0, stream, *p);
    default: return qtr_launch(k_attention_generic<QTR_KV_INT8_STATIC>, grid, GENERIC_WARPS * 32, 0, stream, *p);
  }
}

void qtr_cuda_attention_params(const struct qtr_attention_args *args, const struct qtr_cuda_batch *batch, void *scratch,
                               struct attention_params *p) {
  const struct qtr_kv *kv = args->kv;
  size_t pool = ((size_t)kv->config.n_pages + 1) * kv->page_bytes;
  const float *scale = kv->static_scale ? kv->static_scale + (size_t)args->layer * 2 : NULL;
  p->qkv = (const __half *)args->qkv;
  p->out = (__half *)args->out;
  p->k = kv->data + (size_t)args->layer * 2 * pool;
  p->v = p->k + pool;
  p->page_bytes = kv->page_bytes;
  p->q_start = batch->q_start;
  p->kv_len = batch->kv_len;
  p->block_table = batch->block_table;
  p->plan = (const uint8_t *)batch->plan;
  p->scratch = (uint8_t *)scratch;
  p->scale = args->scale;
  p->k_scale = scale ? scale[0] : 1;
  p->v_scale = scale ? scale[1] : 1;
  p->n_tokens = batch->n_tokens;
  p->n_seqs = batch->n_seqs;
  p->max_blocks = batch->max_blocks;
  p->n_heads = args->n_heads;
  p->n_kv_heads = args->n_kv_heads;
  p->group = args->n_heads / args->n_kv_heads;
  p->width = (args->n_heads + 2 * args->n_kv_heads) * args->head_dim;
  p->dim = args->head_dim;
}

cudaError_t qtr_cuda_attention(const struct qtr_attention_args *args, const struct qtr_cuda_batch *batch,
                               const void *host_plan, void *scratch, cudaStream_t stream) {
  struct attention_params p;
  int format = (int)args->kv->config.format;
  const struct qtr_attention_plan *plan = (const struct qtr_attention_plan *)host_plan;
  if (batch->n_tokens < 1) return cudaSuccess;
  qtr_cuda_attention_params(args, batch, scratch, &p);
  if (!qtr_kv_has_fragments(args->head_dim)) return qtr_cuda_attention_generic(&p, format, stream);
  cudaError_t error = cudaSuccess;
  if (plan->n_prefill > 0) error = qtr_cuda_attention_prefill(&p, format, plan, stream);
  if (error == cudaSuccess && plan->n_decode > 0) error = qtr_cuda_attention_decode(&p, format, stream);
  return error;
}
