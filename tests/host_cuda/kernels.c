/* kernels.c - toy kernels in place of the backend's: they read the batch's arrays on the "device" as the real ones do, so a
 * wrong or overwritten array changes the tokens that come out. What step.c may call besides must not be called. */
#include "host_cuda.h"

#include "backend/cuda/choose.h"
#include "backend/cuda/rows.h"
#include "backend/cuda/select.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int32_t host_digest(const int32_t *token, int32_t n) {
  uint32_t h = 17;
  for (int32_t i = 0; i < n; i++) h = h * 31 + (uint32_t)token[i];
  return (int32_t)(h % 100003);
}

struct embed {
  const int32_t *token;
  const struct qtr_choose_result *chosen;
  size_t n;
  int32_t *known, *out;
};

static void embed(void *arg) {
  const struct embed *a = arg;
  for (size_t i = 0; i < a->n; i++)
    a->known[i] = a->out[i] = a->token[i] < 0 && a->chosen ? a->chosen[-1 - a->token[i]].token : a->token[i];
}

cudaError_t qtr_cuda_rows_embed(enum qtr_dtype dtype, const void *data, const float *scale, size_t n_rows, size_t dim,
                                const int32_t *token, const struct qtr_choose_result *chosen, size_t n_tokens,
                                int32_t *known, void *out, cudaStream_t s) {
  (void)dtype, (void)data, (void)scale, (void)n_rows, (void)dim, (void)s;
  host_push(embed, &(struct embed){token, chosen, n_tokens, known, out}, sizeof(struct embed));
  return cudaSuccess;
}

struct attend {
  int32_t *kv, *x;
  struct qtr_cuda_batch batch;
};

static int32_t *slot_of(const struct attend *a, int32_t token, int32_t position) {
  const struct qtr_cuda_batch *b = &a->batch;
  int32_t page = b->block_table[(size_t)b->token_seq[token] * (size_t)b->max_blocks + (size_t)(position / PAGE)];
  return a->kv + (size_t)page * PAGE + (size_t)(position % PAGE);
}

static void write_kv(void *arg) {
  const struct attend *a = arg;
  for (int32_t i = 0; i < a->batch.n_tokens; i++) *slot_of(a, i, a->batch.position[i]) = a->x[i];
}

cudaError_t qtr_cuda_rope_kv_write(const struct qtr_rope_kv_args *args, const struct qtr_cuda_batch *batch, cudaStream_t s) {
  (void)s;
  host_push(write_kv, &(struct attend){(int32_t *)(void *)args->kv->data, args->qkv, *batch}, sizeof(struct attend));
  return cudaSuccess;
}

cudaError_t qtr_cuda_rope_table(const int32_t *position, const float *inv_freq, size_t n_tokens, size_t half_dim, float *cos,
                                float *sin, cudaStream_t s) {
  (void)position, (void)inv_freq, (void)n_tokens, (void)half_dim, (void)cos, (void)sin, (void)s;
  return cudaSuccess;
}

/* The plan is a digest of the positions. */
bool qtr_cuda_attention_plan(const struct qtr_cuda_plan_config *config, const struct qtr_batch *batch, void *plan) {
  (void)config;
  int32_t digest = host_digest(batch->position, batch->n_tokens);
  memcpy(plan, &digest, sizeof digest);
  return false;
}

static void attend(void *arg) {
  const struct attend *a = arg;
  int32_t plan, *token = NULL;
  memcpy(&plan, a->batch.plan, sizeof plan);
  if (plan != host_digest(a->batch.position, a->batch.n_tokens)) host_wrong++;
  for (int32_t i = 0; i < a->batch.n_tokens; i++) {
    int32_t n = a->batch.position[i] + 1;
    int32_t *more = realloc(token, (size_t)n * sizeof *token);
    if (!more) abort();
    token = more;
    for (int32_t k = 0; k < n; k++) token[k] = *slot_of(a, i, k);
    a->x[i] = host_digest(token, n);
  }
  free(token);
}

cudaError_t qtr_cuda_attention(const struct qtr_attention_args *args, const struct qtr_cuda_batch *batch,
                               const void *host_plan, void *scratch, void *select_scratch, int32_t n_sms, cudaStream_t s) {
  (void)host_plan, (void)scratch, (void)select_scratch, (void)n_sms, (void)s;
  host_push(attend, &(struct attend){(int32_t *)(void *)args->kv->data, args->out, *batch}, sizeof(struct attend));
  return cudaSuccess;
}

size_t qtr_cuda_attention_plan_bytes(const struct qtr_cuda_plan_config *config, size_t max_tokens, size_t max_seqs) {
  (void)config;
  return 64 + 8 * (max_tokens + max_seqs);
}

size_t qtr_cuda_attention_scratch_bytes(const struct qtr_cuda_plan_config *config, size_t max_tokens, size_t max_seqs) {
  (void)config;
  return 64 + 8 * (max_tokens + max_seqs);
}

struct gather {
  const int32_t *x, *row;
  size_t n;
  int32_t *out;
};

static void gather(void *arg) {
  const struct gather *a = arg;
  for (size_t i = 0; i < a->n; i++) a->out[i] = a->x[a->row[i]];
}

cudaError_t qtr_cuda_rows_gather(const void *x, const int32_t *row, size_t n_rows, size_t dim, void *out, cudaStream_t s) {
  (void)dim, (void)s;
  host_push(gather, &(struct gather){x, row, n_rows, out}, sizeof(struct gather));
  return cudaSuccess;
}

struct choose {
  const int32_t *digest;
  const struct qtr_choose_row *row;
  struct qtr_choose_result *result;
  struct qtr_cuda_adjust adjust;
  size_t n;
};

static void choose(void *arg) {
  const struct choose *a = arg;
  for (size_t i = 0; i < a->n; i++) {
    int32_t last = a->adjust.known[a->adjust.logit_row[i]];
    for (int32_t k = 0; k < a->row[i].n_adjust; k++) {
      int32_t at = a->row[i].first_adjust + k;
      a->adjust.original[at] = 1;
      host_wrong += a->adjust.adjust[at].token != k;
    }
    a->result[i].token = a->row[i].skip ? QTR_CHOOSE_UNDECIDED : host_next(a->digest[i], last, a->row[i].position);
  }
}

cudaError_t qtr_cuda_rows_choose(float *logits, const struct qtr_choose_row *row, struct qtr_choose_result *result,
                                 size_t n_rows, size_t vocab_size, bool drawing, const struct qtr_cuda_adjust *adjust,
                                 void *scratch, cudaStream_t s) {
  (void)vocab_size, (void)drawing, (void)scratch, (void)s;
  const struct choose arg = {(const int32_t *)(const void *)logits, row, result, *adjust, n_rows};
  host_push(choose, &arg, sizeof arg);
  return cudaSuccess;
}

size_t qtr_cuda_choose_scratch_bytes(size_t n_rows, size_t vocab_size) {
  (void)vocab_size;
  return n_rows * 8;
}

/* ---- not in these steps --------------------------------------------------------------------------------- */

bool qtr_cuda_linear_takes_rows(const struct qtr_linear *linear, size_t n_tokens) {
  (void)linear, (void)n_tokens;
  abort();
}

cudaError_t qtr_cuda_linear_run(struct qtr_cuda *c, const struct qtr_linear_args *args,
                                const struct qtr_cuda_gemm_rows *rows) {
  (void)c, (void)args, (void)rows;
  abort();
}

cudaError_t qtr_cuda_rows_norm(const void *x, const void *weight, float eps, size_t n_tokens, size_t dim, void *out,
                               cudaStream_t s) {
  (void)x, (void)weight, (void)eps, (void)n_tokens, (void)dim, (void)out, (void)s;
  abort();
}

cudaError_t qtr_cuda_rows_norm_quant(const void *x, const void *weight, float eps, bool qserve, size_t n_tokens, size_t dim,
                                     const struct qtr_cuda_rows_out *out, cudaStream_t s) {
  (void)x, (void)weight, (void)eps, (void)qserve, (void)n_tokens, (void)dim, (void)out, (void)s;
  abort();
}

cudaError_t qtr_cuda_rows_quant(const void *x, size_t n_tokens, size_t dim, const struct qtr_cuda_rows_out *out,
                                cudaStream_t s) {
  (void)x, (void)n_tokens, (void)dim, (void)out, (void)s;
  abort();
}

struct qtr_cuda_select_config qtr_cuda_select_config_of(const struct qtr_kv_heads *heads, int32_t head_dim, int32_t n_sms) {
  (void)heads, (void)head_dim, (void)n_sms;
  abort();
}

size_t qtr_cuda_select_scratch_bytes(const struct qtr_cuda_select_config *config) {
  (void)config;
  abort();
}

size_t qtr_cuda_select_counter_bytes(const struct qtr_cuda_select_config *config) {
  (void)config;
  abort();
}
