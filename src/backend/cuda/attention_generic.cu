/* attention_generic.cu - attention of any even head_dim up to 256 and any token of a batch (spec C.5), in fp32, and the
 * entry point that chooses between the kernels. Simple, not fast: head sizes 64 and 128 have attention_decode.cu and
 * attention_prefill.cu; the laboratory compares those with this.
 *
 * One block a token and query head; warp w takes the keys w, w + 8, ... and keeps its own maximum, sum and result; the
 * warps' results are merged in order. A result depends on nothing but its sequence. */
#include "backend/cuda/attention_kernels.h"
#include "backend/cuda/launch.cuh"

enum { GENERIC_WARPS = 8, MAX_DIM = 256, PER_LANE = MAX_DIM / 32 };

/* What a block works on: a query and its pages, as a decode entry has them. */
struct job {
  int seq, token, n_keys, place, n_visits, n_first, skip, hole_from, hole_to;
  const int32_t *chosen; /* (n_first) or NULL */
};

/* Every token of the batch over all pages; or the decode entries of the plan. Returns whether there is work. */
__device__ static bool job_find(const struct attention_params &p, bool entries, int head, struct job &j) {
  int index = blockIdx.x, place = 0;
  while (p.head[place].kv_head != head / p.group) place++;
  j = {};
  j.place = place;
  if (!entries) {
    int low = 0, high = p.n_seqs - 1; /* the sequence: the last whose q_start is not behind the token */
    while (low < high) {
      int middle = (low + high + 1) / 2;
      if (p.q_start[middle] <= index) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    j.seq = low;
    j.token = index;
    j.n_keys = p.kv_len[low] + index - p.q_start[low] + 1;
    j.n_visits = (j.n_keys + QTR_PAGE_TOKENS - 1) / QTR_PAGE_TOKENS;
    return true;
  }
  const struct qtr_attention_plan *plan = (const struct qtr_attention_plan *)p.plan;
  bool streams = place >= p.n_retrieval;
  if (index >= (streams ? plan->n_streaming : plan->n_decode)) return false;
  const struct qtr_decode_entry *e =
      (const struct qtr_decode_entry *)(p.plan + plan->decode_offset) + (streams ? plan->n_decode : 0) + index;
  if (e->segment > 0) return false; /* another entry's block has the whole token */
  j.seq = e->seq, j.token = e->token, j.n_keys = e->n_keys;
  j.n_visits = e->n_visits, j.n_first = e->n_first, j.skip = e->skip;
  j.hole_from = e->hole_from, j.hole_to = e->hole_to;
  if (e->list >= 0) j.chosen = chosen_pages(p, e->list, head / p.group, head % p.group);
  return true;
}

template <int FORMAT, bool ENTRIES>
__global__ static void __launch_bounds__(GENERIC_WARPS * 32) k_attention_generic(const struct attention_params p) {
  qtr_begin();
  __shared__ float results[GENERIC_WARPS][MAX_DIM];
  __shared__ float maxima[GENERIC_WARPS], totals[GENERIC_WARPS];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y, dim = p.dim;
  struct job job;
  if (!job_find(p, ENTRIES, head, job)) return;
  const int32_t *table = head_table(p, job.place) + (size_t)job.seq * p.max_blocks;
  const struct qtr_cuda_head place = p.head[job.place];
  size_t code_bytes = qtr_kv_code_bytes(FORMAT, dim);
  float q[PER_LANE], sum[PER_LANE], max = -INFINITY, total = 0;
  const __half *query = p.qkv + (size_t)job.token * p.width + (size_t)head * dim;
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) {
    q[j] = lane + 32 * j < dim ? __half2float(query[lane + 32 * j]) : 0;
    sum[j] = 0;
  }
  for (int i = warp; i < job.n_keys; i += GENERIC_WARPS) {
    if (i >= job.hole_from && i < job.hole_to) continue;
    int visit = i / QTR_PAGE_TOKENS, slot = i % QTR_PAGE_TOKENS, tile = visit < job.n_first ? visit : visit + job.skip;
    if (visit < job.n_first && job.chosen) tile = job.chosen[visit];
    size_t at = (size_t)table[tile] * place.page_bytes;
    float value[2][PER_LANE], dot = 0;
#pragma unroll
    for (int is_v = 0; is_v < 2; is_v++) {
      const uint8_t *block = p.data + (is_v ? place.v : place.k) + at;
      float scale = is_v ? p.v_scale : p.k_scale, zero = 128;
      if (kv_traits<FORMAT>::has_params) {
        float2 pair = __half22float2(*(const __half2 *)(block + code_bytes + slot * 4));
        scale = pair.x, zero = pair.y;
      }
#pragma unroll
      for (int j = 0; j < PER_LANE; j++) {
        int shift, d = lane + 32 * j;
        if (d >= dim) {
          value[is_v][j] = 0;
          continue;
        }
        const uint8_t *from = block + qtr_kv_element(FORMAT, dim, is_v, slot, d, &shift);
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
    for (int d = 16; d; d /= 2) dot += __shfl_xor_sync(~0u, dot, d);
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
    float factor = totals[w] > 0 ? expf(maxima[w] - m) : 0;
    all += totals[w] * factor;
    result += results[w][i] * factor;
  }
  p.out[((size_t)job.token * p.n_heads + head) * dim + i] = __float2half_rn(result / all);
}

template <bool ENTRIES>
static cudaError_t launch(const struct attention_params *p, int format, unsigned n, cudaStream_t stream) {
  dim3 grid(n, (unsigned)p->n_heads), block(GENERIC_WARPS * 32);
  switch (format) {
    case QTR_KV_F16: return qtr_launch(k_attention_generic<QTR_KV_F16, ENTRIES>, grid, block, 0, stream, *p);
    case QTR_KV_INT8: return qtr_launch(k_attention_generic<QTR_KV_INT8, ENTRIES>, grid, block, 0, stream, *p);
    case QTR_KV_INT4: return qtr_launch(k_attention_generic<QTR_KV_INT4, ENTRIES>, grid, block, 0, stream, *p);
    default: return qtr_launch(k_attention_generic<QTR_KV_INT8_STATIC, ENTRIES>, grid, block, 0, stream, *p);
  }
}

cudaError_t qtr_cuda_attention_generic(const struct attention_params *p, int format, cudaStream_t stream) {
  return launch<false>(p, format, (unsigned)p->n_tokens, stream);
}

cudaError_t qtr_cuda_attention_generic_entries(const struct attention_params *p, int format, cudaStream_t stream) {
  const size_t most = QTR_MAX_SLOTS, slots = (size_t)p->n_seqs * QTR_MAX_SEGMENTS; /* segments have entries of their own */
  return launch<true>(p, format, (unsigned)((size_t)p->n_tokens + (slots < most ? slots : most)), stream);
}

/* ---- the entry point ----------------------------------------------------------------------------- */

void qtr_cuda_attention_params(const struct qtr_attention_args *args, const struct qtr_cuda_batch *batch, void *scratch,
                               struct attention_params *p) {
  const struct qtr_kv *kv = args->kv;
  const struct qtr_kv_sparse *sparse = &kv->heads.sparse;
  const float *scale = kv->static_scale ? kv->static_scale + (size_t)args->layer * 2 : NULL;
  *p = {};
  p->qkv = (const __half *)args->qkv;
  p->out = (__half *)args->out;
  p->data = kv->data;
  p->head = kv->order + (size_t)args->layer * args->n_kv_heads;
  p->q_start = batch->q_start;
  p->kv_len = batch->kv_len;
  p->block_table = batch->block_table;
  p->stream_table = batch->stream_table;
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
  p->n_retrieval = qtr_kv_head_count(&kv->heads, args->layer, QTR_HEAD_RETRIEVAL);
  p->lists = kv->lists ? kv->lists + (size_t)args->layer * kv->layer_list_ints : NULL;
  p->list_ints = (int32_t)kv->list_ints;
  p->each_head = sparse->budget > 0 && sparse->each_head;
  p->sink = sparse->context.sink;
  p->local = sparse->context.local;
}

static cudaError_t choose_pages(const struct qtr_attention_args *args, const struct qtr_cuda_batch *batch,
                                const struct attention_params *p, const struct qtr_attention_plan *plan, void *scratch,
                                int32_t n_sms, cudaStream_t stream) {
  const struct qtr_kv *kv = args->kv;
  struct qtr_cuda_select_config config = qtr_cuda_select_config_of(&kv->heads, args->head_dim, n_sms);
  struct qtr_cuda_select_args a = {};
  a.qkv = args->qkv;
  a.stats = (const __half *)kv->stats + kv->stats_at[args->layer];
  a.head = kv->retrieval + (size_t)args->layer * args->n_kv_heads;
  a.n_retrieval = p->n_retrieval;
  a.max_blocks = batch->max_blocks;
  a.block_table = batch->block_table;
  a.lists = kv->lists + (size_t)args->layer * kv->layer_list_ints;
  a.plan = p->plan + sizeof *plan;
  a.scratch = scratch;
  return qtr_cuda_select(&config, &a, plan + 1, stream);
}

cudaError_t qtr_cuda_attention(const struct qtr_attention_args *args, const struct qtr_cuda_batch *batch,
                               const void *host_plan, void *scratch, void *select_scratch, int32_t n_sms,
                               cudaStream_t stream) {
  struct attention_params p;
  int format = (int)args->kv->config.format;
  const struct qtr_attention_plan *plan = (const struct qtr_attention_plan *)host_plan;
  if (batch->n_tokens < 1) return cudaSuccess;
  qtr_cuda_attention_params(args, batch, scratch, &p);
  bool fragments = qtr_kv_has_fragments(args->head_dim), sparse = qtr_kv_heads_sparse(&args->kv->heads);
  if (!fragments && !sparse) return qtr_cuda_attention_generic(&p, format, stream);
  for (;;) {
    cudaError_t error = cudaSuccess;
    if (plan->n_choices > 0 && p.n_retrieval > 0) error = choose_pages(args, batch, &p, plan, select_scratch, n_sms, stream);
    if (error == cudaSuccess && plan->n_prefill > 0) error = qtr_cuda_attention_prefill(&p, format, plan, stream);
    if (error == cudaSuccess && plan->n_decode > 0) {
      error =
          fragments ? qtr_cuda_attention_decode(&p, format, stream) : qtr_cuda_attention_generic_entries(&p, format, stream);
    }
    if (error != cudaSuccess || plan->next == 0) return error;
    p.plan += plan->next;
    plan = (const struct qtr_attention_plan *)((const char *)plan + plan->next);
  }
}
