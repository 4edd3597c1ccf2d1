/* step.c - the operations of a step on the GPU: recording, the one upload, graphs, time stamps.
 *
 * Between begin_step and launch operations are recorded. launch (or whoever must see a result before it: flush) builds the
 * batch's arrays and the attention's plan in pinned memory, uploads them in one copy, and hands all to the stream; collect
 * waits. Two steps may be under way: what the host fills or reads (pinned blocks, results) is there twice, what the device
 * uses once, since the stream runs one step after the other.
 *
 * Graphs. A step of decode tokens only is padded to a bucket of sequences, where the step's buffers have room: sequences
 * past the real ones have one token, no history and the spare page of the pool. Its record then depends on the bucket only,
 * so it is compared with the records seen before: the second time it is captured into a CUDA graph, and from then on one
 * launch runs it. Nothing else identifies a graph, so no caller can get a stale one; freeing any device memory forgets all.
 *
 * Operations outside of a step run at once. Errors are remembered (cuda.h) and reported by end_step. */
#include "backend/cuda/cuda.h"

#include "backend/cuda/choose.h"
#include "backend/cuda/rows.h"
#include "base/checked.h"
#include "base/status.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_OPS = 4096, MAX_GRAPHS = 64, MAX_STAMPS = 4096, WAYS = QTR_STEPS_UNDER_WAY, CLOCKS = WAYS + 1 };

enum op_kind {
  OP_NONE,
  OP_EMBED,
  OP_RMSNORM,
  OP_QUANT,
  OP_LINEAR,
  OP_ROPE_KV,
  OP_ATTENTION,
  OP_GATHER,
  OP_CHOOSE,
  OP_STAMP
};

/* One recorded operation. Records are compared as bytes: every one is cleared before its fields are set. */
struct op {
  enum op_kind kind;
  union {
    struct qtr_embed_args embed;
    struct qtr_rmsnorm_args norm;
    struct qtr_quant_args quant;
    struct qtr_linear_args linear;
    struct qtr_rope_kv_args rope;
    struct qtr_attention_args attention;
    struct qtr_gather_args gather;
    struct qtr_choose_args choose;
  } as;
};

/* What a batch needs on the device, as offsets into one block. */
struct shape {
  int32_t n_tokens, n_seqs, n_rows, max_blocks; /* padded */
  int32_t choosing;                             /* 0, 1 greedy rows only, 2 others too */
  int32_t selecting;                            /* pages are chosen. Shapes are compared as bytes: no padding */
  size_t token, position, token_seq, q_start, kv_len, block_table, stream_table, decode_start, slot, logit_row, inv_freq,
      choose, plan, adjust; /* of the last, whose length varies and no launch depends on */
};

struct graph {
  struct shape shape;
  struct op *op; /* (n_op) */
  size_t n_op;
  cudaGraphExec_t exec; /* NULL: seen once, not captured yet */
  uint64_t used;        /* step number */
};

struct qtr_cuda_step {
  /* the running step */
  bool open, single, capturing; /* single: nothing was flushed before the end */
  struct qtr_batch batch;
  const float *inv_freq;
  size_t half_dim;
  struct shape shape;
  struct op *op; /* (MAX_OPS) */
  size_t n_op;
  bool has_plan;
  struct qtr_cuda_plan_config plan_config;
  struct qtr_choose_args choose; /* as the caller gave them */
  bool begins, chooses;          /* the step: its first work is still to be uploaded; it samples */
  uint64_t number;

  /* steps under way */
  uint64_t n_launched, n_collected;
  struct {
    struct qtr_choose_result *to; /* the caller's */
    int32_t n_rows;
  } way[WAYS]; /* step number modulo WAYS, as block and result_host */

  /* memory, grown as needed */
  char *block[WAYS], *device; /* (block_bytes) pinned, device */
  char *host;                 /* the pinned block of the step that is recorded */
  size_t block_bytes;
  float *cos, *sin; /* device (angle_floats) */
  size_t angle_floats;
  void *scratch, *select_scratch;                       /* device, attention and choices of pages */
  size_t scratch_bytes, select_bytes, select_counters;  /* of the latter, zeroed at first */
  struct qtr_choose_result *result_host[WAYS], *result; /* (result_rows) pinned, device */
  void *choose_scratch;
  size_t result_rows, choose_bytes;
  float *original; /* device (original_bytes / 4) logits that adjustments replaced */
  size_t original_bytes;
  int32_t *known; /* device (known_bytes / 4) the step's tokens, those too that the host does not know yet */
  size_t known_bytes;

  struct graph graph[MAX_GRAPHS];
  size_t n_graphs;
  cudaEvent_t begun[CLOCKS], ended[CLOCKS]; /* of the device's work on a step; step number modulo CLOCKS */
  double busy, idle;                        /* seconds */
  cudaEvent_t stamp[MAX_STAMPS];
  size_t n_stamps, n_events;
};

/* ---- life ---------------------------------------------------------------------------------------- */

enum qtr_status qtr_cuda_step_create(struct qtr_cuda *c, struct qtr_error *err) {
  struct qtr_cuda_step *s = calloc(1, sizeof *s);
  c->step = s;
  if (s) s->op = calloc(MAX_OPS, sizeof *s->op);
  if (!s || !s->op) return qtr_fail_memory(err, "the record of a step", MAX_OPS * sizeof *s->op);
  for (int i = 0; i < CLOCKS; i++) {
    (void)qtr_cuda_ok(c, cudaEventCreate(&s->begun[i]), "making an event");
    (void)qtr_cuda_ok(c, cudaEventCreate(&s->ended[i]), "making an event");
  }
  return qtr_cuda_status(c, err);
}

static void graph_drop(struct graph *g) {
  if (g->exec) (void)cudaGraphExecDestroy(g->exec);
  free(g->op);
  *g = (struct graph){0};
}

void qtr_cuda_forget_graphs(struct qtr_cuda *c) {
  struct qtr_cuda_step *s = c->step;
  if (!s) return;
  for (size_t i = 0; i < s->n_graphs; i++) graph_drop(&s->graph[i]);
  s->n_graphs = 0;
}

void qtr_cuda_step_free(struct qtr_cuda *c) {
  struct qtr_cuda_step *s = c->step;
  if (!s) return;
  qtr_cuda_forget_graphs(c);
  for (size_t i = 0; i < s->n_events; i++) (void)cudaEventDestroy(s->stamp[i]);
  for (int i = 0; i < CLOCKS; i++) {
    if (s->begun[i]) (void)cudaEventDestroy(s->begun[i]);
    if (s->ended[i]) (void)cudaEventDestroy(s->ended[i]);
  }
  for (int i = 0; i < WAYS; i++) {
    if (s->block[i]) (void)cudaFreeHost(s->block[i]);
    if (s->result_host[i]) (void)cudaFreeHost(s->result_host[i]);
  }
  void *const memory[] = {s->device,         s->cos,      s->sin,  s->scratch, s->select_scratch, s->result,
                          s->choose_scratch, s->original, s->known};
  for (size_t i = 0; i < sizeof memory / sizeof memory[0]; i++) qtr_cuda_release(memory[i]);
  free(s->op);
  free(s);
  c->step = NULL;
}

/* Grows a device array to n_bytes, when no step is under way any more; what was in it is lost, and graphs with it. */
static bool grow(struct qtr_cuda *c, void **device, size_t *have, size_t n_bytes, const char *what) {
  if (n_bytes <= *have) return true;
  struct qtr_error err = {0};
  (void)cudaStreamSynchronize(c->stream);
  qtr_cuda_forget_graphs(c);
  qtr_cuda_release(*device);
  *device = NULL;
  *have = 0;
  if (qtr_cuda_malloc(c, n_bytes, what, device, &err)) return qtr_cuda_ok(c, cudaErrorMemoryAllocation, what);
  *have = n_bytes;
  return true;
}

/* The same for what needs a little more from step to step: with as much again in reserve, so that few steps pay for it. */
static bool grow_ahead(struct qtr_cuda *c, void **device, size_t *have, size_t n_bytes, const char *what) {
  return n_bytes <= *have || grow(c, device, have, 2 * n_bytes, what);
}

/* As grow, of pinned memory: the first `keep` bytes stay, the rest is zero. */
static bool grow_pinned(struct qtr_cuda *c, void **pinned, size_t keep, size_t n_bytes) {
  void *more = NULL;
  if (!qtr_cuda_ok(c, cudaMallocHost(&more, n_bytes), "pinned memory")) return false;
  memset(more, 0, n_bytes);
  if (keep > 0) memcpy(more, *pinned, keep);
  if (*pinned) (void)cudaFreeHost(*pinned);
  *pinned = more;
  return true;
}

/* ---- the batch's arrays -------------------------------------------------------------------------- */

static size_t place(size_t *at, size_t n_bytes) {
  size_t here = *at;
  *at += qtr_round_up(n_bytes, 16);
  return here;
}

/* Buckets: a few sizes, so that few graphs serve all batches and at most an eighth of the rows is padding. */
static int32_t bucket(int32_t n) {
  int32_t step = n <= 8 ? 1 : n <= 32 ? 4 : n <= 64 ? 8 : n <= 256 ? 16 : 64;
  return (n + step - 1) / step * step;
}

static int32_t power_of_two(int32_t n) {
  int32_t p = 16;
  while (p < n) p *= 2;
  return p;
}

static struct shape shape_make(const struct qtr_batch *b, size_t half_dim) {
  struct shape s = {.n_tokens = b->n_tokens, .n_seqs = b->n_seqs, .n_rows = b->n_logit_rows, .max_blocks = b->max_blocks};
  bool decode = b->n_tokens == b->n_seqs && b->n_logit_rows == b->n_seqs;
  int32_t n = bucket(b->n_seqs);
  if (decode && n <= b->room_tokens && n <= b->room_rows) {
    s.n_tokens = s.n_seqs = s.n_rows = n;
    s.max_blocks = power_of_two(b->max_blocks);
  }
  size_t tokens = (size_t)s.n_tokens * 4, seqs = (size_t)s.n_seqs * 4;
  size_t total = 0;
  s.token = place(&total, tokens);
  s.position = place(&total, tokens);
  s.token_seq = place(&total, tokens);
  s.q_start = place(&total, seqs + 4);
  s.kv_len = place(&total, seqs);
  s.block_table = place(&total, seqs * (size_t)s.max_blocks);
  s.stream_table = b->stream_table ? place(&total, seqs * (size_t)s.max_blocks) : s.block_table;
  s.decode_start = place(&total, b->decode_start ? seqs : 0); /* for the plan only */
  s.slot = place(&total, b->slot ? seqs : 0);
  s.logit_row = place(&total, (size_t)s.n_rows * 4);
  s.inv_freq = place(&total, half_dim * 4);
  s.choose = s.plan = s.adjust = total;
  return s;
}

static void copy_ints(char *to, const int32_t *from, int32_t n) {
  if (from && n > 0) memcpy(to, from, (size_t)n * sizeof *from);
}

/* Rows of a table of pages, padded; `spare` stands where there is none, and in the rows of padding. */
static void table_fill(const struct qtr_cuda_step *s, size_t at, const int32_t *from, int32_t spare) {
  const struct qtr_batch *b = &s->batch;
  const struct shape *z = &s->shape;
  int32_t *table = (int32_t *)(void *)(s->host + at);
  for (int32_t i = 0; i < z->n_seqs; i++) {
    for (int32_t k = 0; k < z->max_blocks; k++) {
      int32_t page =
          from && i < b->n_seqs && k < b->max_blocks ? from[(size_t)i * (size_t)b->max_blocks + (size_t)k] : spare;
      table[(size_t)i * (size_t)z->max_blocks + (size_t)k] = page < 0 ? spare : page;
    }
  }
}

/* Fills the pinned block. kv: the cache of the step, NULL if it touches none. */
static void block_fill(struct qtr_cuda_step *s, const struct qtr_kv *kv) {
  const struct qtr_batch *b = &s->batch;
  const struct shape *z = &s->shape;
  char *h = s->host;
  int32_t *token = (int32_t *)(void *)(h + z->token), *position = (int32_t *)(void *)(h + z->position);
  int32_t *token_seq = (int32_t *)(void *)(h + z->token_seq), *q_start = (int32_t *)(void *)(h + z->q_start);
  int32_t *kv_len = (int32_t *)(void *)(h + z->kv_len), *logit_row = (int32_t *)(void *)(h + z->logit_row);
  memset(token, 0, (size_t)z->n_tokens * sizeof *token);
  copy_ints((char *)token, b->token, b->n_tokens);
  copy_ints((char *)position, b->position, b->n_tokens);
  copy_ints((char *)q_start, b->q_start, b->n_seqs + 1);
  copy_ints((char *)kv_len, b->kv_len, b->n_seqs);
  int32_t *decode_start = (int32_t *)(void *)(h + z->decode_start), *slot = (int32_t *)(void *)(h + z->slot);
  copy_ints((char *)logit_row, b->logit_row, b->n_logit_rows);
  copy_ints((char *)decode_start, b->decode_start, b->n_seqs);
  copy_ints((char *)slot, b->slot, b->n_seqs);
  for (int32_t i = 0; i < b->n_seqs; i++) {
    for (int32_t t = q_start[i]; t < q_start[i + 1]; t++) token_seq[t] = i;
  }
  for (int32_t i = b->n_seqs; i < z->n_seqs; i++) { /* padding: decode buckets only */
    position[i] = 0;
    token_seq[i] = i;
    q_start[i + 1] = i + 1;
    kv_len[i] = 0;
    logit_row[i] = i;
    if (b->decode_start) decode_start[i] = QTR_ALL_TOKENS;
    if (b->slot) slot[i] = 0;
  }
  table_fill(s, z->block_table, b->block_table, kv ? kv->config.n_pages : 0);
  if (b->stream_table) table_fill(s, z->stream_table, b->stream_table, kv ? kv->config.n_stream_pages : 0);
  if (s->half_dim) memcpy(h + z->inv_freq, s->inv_freq, s->half_dim * sizeof(float));
}

/* The host's view of the padded batch, for the plan. */
static struct qtr_batch padded_batch(const struct qtr_cuda_step *s) {
  const struct shape *z = &s->shape;
  return (struct qtr_batch){
      .n_tokens = z->n_tokens,
      .n_seqs = z->n_seqs,
      .n_logit_rows = z->n_rows,
      .max_blocks = z->max_blocks,
      .token = (const int32_t *)(const void *)(s->host + z->token),
      .position = (const int32_t *)(const void *)(s->host + z->position),
      .q_start = (const int32_t *)(const void *)(s->host + z->q_start),
      .kv_len = (const int32_t *)(const void *)(s->host + z->kv_len),
      .block_table = (const int32_t *)(const void *)(s->host + z->block_table),
      .decode_start = s->batch.decode_start ? (const int32_t *)(const void *)(s->host + z->decode_start) : NULL,
      .slot = s->batch.slot ? (const int32_t *)(const void *)(s->host + z->slot) : NULL,
      .logit_row = (const int32_t *)(const void *)(s->host + z->logit_row)};
}

static void choose_fill(const struct qtr_cuda_step *s) {
  const struct qtr_choose_row nothing = {.top_k = -1, .top_p = 1, .n_top = -1, .skip = 1};
  struct qtr_choose_row *row = (struct qtr_choose_row *)(void *)(s->host + s->shape.choose);
  for (int32_t i = 0; i < s->shape.n_rows; i++) row[i] = i < s->choose.n_rows ? s->choose.row[i] : nothing;
}

static bool same_plan(const struct qtr_cuda_plan_config *a, const struct qtr_cuda_plan_config *b) {
  return a->format == b->format && a->n_heads == b->n_heads && a->n_kv_heads == b->n_kv_heads &&
         a->head_dim == b->head_dim && a->heads == b->heads;
}

static struct qtr_cuda_plan_config plan_of(const struct qtr_cuda *c, const struct qtr_attention_args *a) {
  return (struct qtr_cuda_plan_config){.format = a->kv->config.format,
                                       .n_heads = a->n_heads,
                                       .n_kv_heads = a->n_kv_heads,
                                       .head_dim = a->head_dim,
                                       .n_sms = c->n_sms,
                                       .heads = qtr_kv_heads_sparse(&a->kv->heads) ? &a->kv->heads : NULL,
                                       .has_prefill = c->has_prefill && qtr_kv_has_fragments(a->head_dim)};
}

/* Room for choosing pages, its counters zeroed. */
static bool select_room(struct qtr_cuda *c) {
  struct qtr_cuda_step *s = c->step;
  const struct qtr_cuda_plan_config *p = &s->plan_config;
  if (!p->heads || p->heads->sparse.budget == 0) return true;
  struct qtr_cuda_select_config config = qtr_cuda_select_config_of(p->heads, p->head_dim, p->n_sms);
  size_t n_counters = qtr_cuda_select_counter_bytes(&config), had = s->select_bytes;
  if (!grow(c, &s->select_scratch, &s->select_bytes, qtr_cuda_select_scratch_bytes(&config), "scores of pages"))
    return false;
  if (s->select_bytes == had && s->select_counters == n_counters) return true;
  s->select_counters = n_counters; /* another cache's scores may lie there */
  return qtr_cuda_ok(c, cudaMemsetAsync(s->select_scratch, 0, n_counters, c->stream), "counters of page selection");
}

/* The device's work on the step begins: with its first kernel, so that the upload counts as time between steps. */
static bool step_begins(struct qtr_cuda *c) {
  struct qtr_cuda_step *s = c->step;
  if (!s->begins) return true;
  s->begins = false;
  return qtr_cuda_ok(c, cudaEventRecord(s->begun[s->n_launched % CLOCKS], c->stream), "a time stamp");
}

/* Room for the tokens of n rows, for as many as a step may have if that is known. Those of the step under way stay: the next
 * one takes its tokens from there. */
static bool result_room(struct qtr_cuda *c, size_t n) {
  struct qtr_cuda_step *s = c->step;
  if (n <= s->result_rows) return true;
  n = QTR_MAX(n, (size_t)s->batch.room_rows);
  size_t n_bytes = n * sizeof *s->result, had = s->result_rows * sizeof *s->result;
  struct qtr_choose_result *result = NULL;
  struct qtr_error err = {0};
  if (!qtr_cuda_ok(c, cudaStreamSynchronize(c->stream), "a step")) return false;
  qtr_cuda_forget_graphs(c);
  if (qtr_cuda_malloc(c, n_bytes, "sampled tokens", (void **)&result, &err))
    return qtr_cuda_ok(c, cudaErrorMemoryAllocation, "sampled tokens");
  if (had > 0) /* behind the zeros, which this stream writes; releasing the old ones waits for it */
    (void)qtr_cuda_ok(c, cudaMemcpyAsync(result, s->result, had, cudaMemcpyDeviceToDevice, c->stream), "sampled tokens");
  qtr_cuda_release(s->result);
  s->result = result;
  for (int i = 0; i < WAYS; i++) {
    if (!grow_pinned(c, (void **)&s->result_host[i], had, n_bytes)) return false;
  }
  s->result_rows = n;
  return true;
}

/* Decides where choose rows and plan go, makes room, fills the block and uploads it. */
static bool batch_upload(struct qtr_cuda *c) {
  struct qtr_cuda_step *s = c->step;
  struct shape *z = &s->shape;
  const struct qtr_kv *kv = NULL;
  const struct op *attention = NULL;
  bool has_choose = false;
  for (size_t i = 0; i < s->n_op; i++) {
    const struct op *op = &s->op[i];
    if (op->kind == OP_ROPE_KV) kv = op->as.rope.kv;
    if (op->kind == OP_ATTENTION && !attention) attention = op;
    if (op->kind == OP_CHOOSE) has_choose = true;
  }
  size_t tokens = (size_t)z->n_tokens, seqs = (size_t)z->n_seqs, at = z->choose;
  if (has_choose) (void)place(&at, (size_t)z->n_rows * sizeof(struct qtr_choose_row));
  z->plan = at;
  s->has_plan = attention != NULL;
  if (attention) {
    s->plan_config = plan_of(c, &attention->as.attention);
    (void)place(&at, qtr_cuda_attention_plan_bytes(&s->plan_config, tokens, seqs));
    if (!grow(c, &s->scratch, &s->scratch_bytes, qtr_cuda_attention_scratch_bytes(&s->plan_config, tokens, seqs),
              "partial results of attention"))
      return false;
    if (!select_room(c)) return false;
  }
  z->adjust = at;
  size_t n_adjust = has_choose ? (size_t)s->choose.n_adjust : 0, total = at;
  (void)place(&total, n_adjust * sizeof(struct qtr_choose_adjust));
  if (!grow_ahead(c, (void **)&s->original, &s->original_bytes, n_adjust * sizeof(float), "adjusted logits")) return false;
  if (total > s->block_bytes) {
    size_t n = qtr_round_up(total * 2, 4096), have = 0;
    if (!grow(c, (void **)&s->device, &have, n, "the arrays of a batch")) return false;
    s->block_bytes = 0;
    for (int i = 0; i < WAYS; i++) {
      if (!grow_pinned(c, (void **)&s->block[i], 0, n)) return false;
    }
    s->block_bytes = n;
  }
  s->host = s->block[s->n_launched % WAYS];
  if (s->angle_floats < tokens * s->half_dim) {
    size_t have = 0, more = 0, n = tokens * s->half_dim * 2;
    s->angle_floats = 0;
    if (!grow(c, (void **)&s->cos, &have, n * sizeof(float), "cosines")) return false;
    if (!grow(c, (void **)&s->sin, &more, n * sizeof(float), "sines")) return false;
    s->angle_floats = n;
  }
  if (!grow_ahead(c, (void **)&s->known, &s->known_bytes, tokens * sizeof *s->known, "the tokens of a step")) return false;
  size_t rows = (size_t)z->n_rows;
  if (has_choose && !result_room(c, rows)) return false;
  if (has_choose && !grow(c, &s->choose_scratch, &s->choose_bytes,
                          qtr_cuda_choose_scratch_bytes(rows, (size_t)s->choose.vocab_size), "sampling"))
    return false;
  block_fill(s, kv);
  if (has_choose) {
    choose_fill(s);
    if (n_adjust) memcpy(s->host + z->adjust, s->choose.adjust, n_adjust * sizeof *s->choose.adjust);
  }
  if (s->has_plan) {
    struct qtr_batch padded = padded_batch(s);
    z->selecting = qtr_cuda_attention_plan(&s->plan_config, &padded, s->host + z->plan);
  }
  if (!qtr_cuda_ok(c, cudaMemcpyAsync(s->device, s->host, total, cudaMemcpyHostToDevice, c->stream), "uploading a batch"))
    return false;
  return step_begins(c);
}

/* ---- running ------------------------------------------------------------------------------------- */

static struct qtr_cuda_batch device_batch(const struct qtr_cuda_step *s) {
  const struct shape *z = &s->shape;
  const char *d = s->device;
  return (struct qtr_cuda_batch){.n_tokens = z->n_tokens,
                                 .n_seqs = z->n_seqs,
                                 .max_blocks = z->max_blocks,
                                 .position = (const int32_t *)(const void *)(d + z->position),
                                 .token_seq = (const int32_t *)(const void *)(d + z->token_seq),
                                 .q_start = (const int32_t *)(const void *)(d + z->q_start),
                                 .kv_len = (const int32_t *)(const void *)(d + z->kv_len),
                                 .block_table = (const int32_t *)(const void *)(d + z->block_table),
                                 .stream_table = (const int32_t *)(const void *)(d + z->stream_table),
                                 .cos = s->cos,
                                 .sin = s->sin,
                                 .plan = d + z->plan};
}

static struct qtr_cuda_rows_out rows_out(const struct qtr_input *in, size_t dim) {
  return (struct qtr_cuda_rows_out){.code = in->data, .stride = qtr_cuda_stride(dim), .scale = in->scale, .sum = in->sum};
}

static cudaError_t run_stamp(struct qtr_cuda *c) {
  struct qtr_cuda_step *s = c->step;
  if (s->n_stamps == MAX_STAMPS) return cudaSuccess;
  if (s->n_stamps == s->n_events) {
    cudaError_t error = cudaEventCreate(&s->stamp[s->n_events]);
    if (error) return error;
    s->n_events++;
  }
  /* Inside a graph the record is a node of its own, so that each launch records anew. */
  return cudaEventRecordWithFlags(s->stamp[s->n_stamps++], c->stream, s->capturing ? cudaEventRecordExternal : 0);
}

static cudaError_t run_choose(struct qtr_cuda *c, const struct qtr_choose_args *a) {
  struct qtr_cuda_step *s = c->step;
  const struct shape *z = &s->shape;
  const struct qtr_choose_row *row = (const struct qtr_choose_row *)(const void *)(s->device + z->choose);
  const struct qtr_cuda_adjust adjust = {.adjust = (const struct qtr_choose_adjust *)(const void *)(s->device + z->adjust),
                                         .original = s->original,
                                         .known = s->known,
                                         .logit_row = (const int32_t *)(const void *)(s->device + z->logit_row)};
  return qtr_cuda_rows_choose(a->logits, row, s->result, (size_t)z->n_rows, (size_t)a->vocab_size, z->choosing == 2, &adjust,
                              s->choose_scratch, c->stream);
}

static cudaError_t run_norm(struct qtr_cuda *c, const struct qtr_rmsnorm_args *a) {
  if (a->quant == QTR_QUANT_NONE) {
    return qtr_cuda_rows_norm(a->x, a->weight, a->eps, a->n_tokens, a->dim, a->out->data, c->stream);
  }
  struct qtr_cuda_rows_out out = rows_out(a->out, a->dim);
  return qtr_cuda_rows_norm_quant(a->x, a->weight, a->eps, a->norm == QTR_NORM_QSERVE, a->n_tokens, a->dim, &out, c->stream);
}

static cudaError_t run_quant(struct qtr_cuda *c, const struct qtr_quant_args *a) {
  if (a->quant == QTR_QUANT_NONE) {
    return cudaMemcpyAsync(a->out->data, a->x, a->n_tokens * a->dim * 2, cudaMemcpyDeviceToDevice, c->stream);
  }
  struct qtr_cuda_rows_out out = rows_out(a->out, a->dim);
  return qtr_cuda_rows_quant(a->x, a->n_tokens, a->dim, &out, c->stream);
}

/* What operation i, if it is one, writes for a matrix. */
static const struct qtr_input *input_of(const struct op *op) {
  return op->kind == OP_RMSNORM ? op->as.norm.out : op->kind == OP_QUANT ? op->as.quant.out : NULL;
}

/* Whether operation i of a whole step, where all readers can be seen (what an input held is not kept after it), normalises
 * or quantises a few rows for the matrix that comes next, and for nobody else: then that product does it itself (gemm.h). */
static bool made_by_product(const struct qtr_cuda_step *s, size_t i, struct qtr_cuda_gemm_rows *rows) {
  const struct op *op = &s->op[i];
  const struct qtr_input *in = input_of(op);
  const struct qtr_rmsnorm_args *norm = &op->as.norm;
  const struct qtr_quant_args *quant = &op->as.quant;
  bool is_norm = op->kind == OP_RMSNORM;
  if (!in || (is_norm ? norm->quant : quant->quant) == QTR_QUANT_NONE) return false;
  if (is_norm && norm->norm == QTR_NORM_QSERVE) return false;
  do i++;
  while (i < s->n_op && s->op[i].kind == OP_STAMP);
  if (i == s->n_op || s->op[i].kind != OP_LINEAR || s->op[i].as.linear.input != in) return false;
  const struct qtr_linear_args *linear = &s->op[i].as.linear;
  *rows = is_norm ? (struct qtr_cuda_gemm_rows){.x = norm->x, .weight = norm->weight, .eps = norm->eps}
                  : (struct qtr_cuda_gemm_rows){.x = quant->x};
  size_t n = is_norm ? norm->n_tokens : quant->n_tokens, dim = is_norm ? norm->dim : quant->dim;
  if (n != linear->n_tokens || dim != linear->linear->n_in || rows->x == linear->out || (uintptr_t)rows->x % 16 ||
      (uintptr_t)rows->weight % 16 || !qtr_cuda_linear_takes_rows(linear->linear, n))
    return false;
  for (i++; i < s->n_op && input_of(&s->op[i]) != in; i++) {
    if (s->op[i].kind == OP_LINEAR && s->op[i].as.linear.input == in) return false;
  }
  return true;
}

/* rows: of a matrix, NULL or what made_by_product gave for the operation before it. */
static cudaError_t run_op(struct qtr_cuda *c, const struct op *op, const struct qtr_cuda_gemm_rows *rows) {
  struct qtr_cuda_step *s = c->step;
  const struct qtr_cuda_batch batch = device_batch(s);
  const char *d = s->device;
  switch (op->kind) {
    case OP_EMBED: {
      const struct qtr_table *t = op->as.embed.table;
      return qtr_cuda_rows_embed(t->dtype, t->data, t->scale, t->n_rows, t->dim,
                                 (const int32_t *)(const void *)(d + s->shape.token), s->result, (size_t)s->shape.n_tokens,
                                 s->known, op->as.embed.out, c->stream);
    }
    case OP_RMSNORM: return run_norm(c, &op->as.norm);
    case OP_QUANT: return run_quant(c, &op->as.quant);
    case OP_LINEAR: return qtr_cuda_linear_run(c, &op->as.linear, rows);
    case OP_ROPE_KV: return qtr_cuda_rope_kv_write(&op->as.rope, &batch, c->stream);
    case OP_ATTENTION:
      return qtr_cuda_attention(&op->as.attention, &batch, s->host + s->shape.plan, s->scratch, s->select_scratch, c->n_sms,
                                c->stream);
    case OP_GATHER:
      return qtr_cuda_rows_gather(op->as.gather.x, (const int32_t *)(const void *)(d + s->shape.logit_row),
                                  (size_t)s->shape.n_rows, op->as.gather.dim, op->as.gather.out, c->stream);
    case OP_CHOOSE: return run_choose(c, &op->as.choose);
    case OP_STAMP: return run_stamp(c);
    default: return cudaErrorInvalidValue;
  }
}

static const char *op_name(enum op_kind kind) {
  static const char *const name[] = {"nothing",           "embedding", "RMSNorm", "quantisation", "a matrix",
                                     "RoPE and KV write", "attention", "gather",  "sampling",     "a time stamp"};
  return name[kind];
}

/* Launches the record, the rotation's angles before it. whole: it is a whole step's. */
static void run_record(struct qtr_cuda *c, bool whole) {
  struct qtr_cuda_step *s = c->step;
  bool rotates = false;
  for (size_t i = 0; i < s->n_op; i++) rotates = rotates || s->op[i].kind == OP_ROPE_KV;
  if (rotates) {
    cudaError_t error = qtr_cuda_rope_table((const int32_t *)(const void *)(s->device + s->shape.position),
                                            (const float *)(const void *)(s->device + s->shape.inv_freq),
                                            (size_t)s->shape.n_tokens, s->half_dim, s->cos, s->sin, c->stream);
    if (!qtr_cuda_ok(c, error, "angles of RoPE")) return;
  }
  struct qtr_cuda_gemm_rows rows;
  bool pending = false; /* rows are for the next matrix */
  for (size_t i = 0; i < s->n_op && c->error == cudaSuccess; i++) {
    if (whole && made_by_product(s, i, &rows)) {
      pending = true;
      continue;
    }
    (void)qtr_cuda_ok(c, run_op(c, &s->op[i], pending ? &rows : NULL), op_name(s->op[i].kind));
    if (s->op[i].kind == OP_LINEAR) pending = false;
  }
}

void qtr_cuda_flush(struct qtr_cuda *c) {
  struct qtr_cuda_step *s = c->step;
  if (s->n_op == 0 || c->error != cudaSuccess) return;
  if (!s->open) { /* operations outside of a step touch no batch */
    run_record(c, false);
  } else if (batch_upload(c)) {
    run_record(c, false);
    (void)qtr_cuda_ok(c, cudaStreamSynchronize(c->stream),
                      "a part of a step"); /* the pinned block is filled anew next time */
  }
  s->n_op = 0;
  s->single = false;
}

/* ---- graphs -------------------------------------------------------------------------------------- */

static bool same_record(const struct graph *g, const struct qtr_cuda_step *s) {
  return g->n_op == s->n_op && memcmp(&g->shape, &s->shape, sizeof g->shape) == 0 &&
         memcmp(g->op, s->op, s->n_op * sizeof *s->op) == 0;
}

/* The place of this record, a new one if need be; NULL: no memory. */
static struct graph *graph_find(struct qtr_cuda *c) {
  struct qtr_cuda_step *s = c->step;
  struct graph *oldest = &s->graph[0];
  for (size_t i = 0; i < s->n_graphs; i++) {
    struct graph *g = &s->graph[i];
    if (same_record(g, s)) return g;
    if (g->used < oldest->used) oldest = g;
  }
  struct graph *g = s->n_graphs < MAX_GRAPHS ? &s->graph[s->n_graphs] : oldest;
  struct op *op = malloc(s->n_op * sizeof *op);
  if (!op) return NULL;
  if (g == oldest && s->n_graphs == MAX_GRAPHS) graph_drop(g);
  memcpy(op, s->op, s->n_op * sizeof *op);
  *g = (struct graph){.op = op, .n_op = s->n_op, .used = 0};
  memcpy(&g->shape, &s->shape, sizeof g->shape);
  if (s->n_graphs < MAX_GRAPHS) s->n_graphs++;
  return g;
}

static void graph_capture(struct qtr_cuda *c, struct graph *g) {
  cudaGraph_t graph = NULL;
  if (!qtr_cuda_ok(c, cudaStreamBeginCapture(c->stream, cudaStreamCaptureModeThreadLocal), "beginning a graph")) return;
  c->step->capturing = true;
  run_record(c, true);
  c->step->capturing = false;
  bool ended = qtr_cuda_ok(c, cudaStreamEndCapture(c->stream, &graph), "ending a graph");
  if (ended && c->error == cudaSuccess) (void)qtr_cuda_ok(c, cudaGraphInstantiate(&g->exec, graph, 0), "making a graph");
  if (graph) (void)cudaGraphDestroy(graph);
}

/* Runs the whole record of a decode step: by itself the first time, captured the second, as a graph from then on. */
static void run_graph(struct qtr_cuda *c) {
  struct qtr_cuda_step *s = c->step;
  struct graph *g = graph_find(c);
  if (g && g->used > 0 && !g->exec) {
    s->n_stamps = 0;
    graph_capture(c, g);
  }
  if (g) g->used = ++s->number;
  if (g && g->exec) {
    s->n_stamps = 0;
    for (size_t i = 0; i < s->n_op; i++) s->n_stamps += s->op[i].kind == OP_STAMP;
    s->n_stamps = QTR_MIN(s->n_stamps, (size_t)MAX_STAMPS);
    (void)qtr_cuda_ok(c, cudaGraphLaunch(g->exec, c->stream), "launching a graph");
  } else if (c->error == cudaSuccess) {
    run_record(c, true);
  }
}

/* ---- the step ------------------------------------------------------------------------------------ */

enum qtr_status qtr_cuda_begin_step(struct qtr_backend *b, const struct qtr_batch *batch, const float *inv_freq,
                                    size_t half_dim, struct qtr_error *err) {
  struct qtr_cuda *c = (struct qtr_cuda *)b;
  struct qtr_cuda_step *s = c->step;
  if (!qtr_cuda_ok(c, cudaSetDevice(c->device), "choosing the GPU")) return qtr_cuda_status(c, err);
  if (c->staging) { /* loading is over */
    (void)cudaStreamSynchronize(c->stream);
    qtr_cuda_release(c->staging);
    c->staging = NULL;
    c->staging_bytes = 0;
  }
  qtr_cuda_flush(c);
  s->open = s->single = s->begins = true;
  s->chooses = false;
  s->batch = *batch;
  s->inv_freq = inv_freq;
  s->half_dim = half_dim;
  s->n_op = 0;
  s->n_stamps = 0;
  memset(&s->shape, 0, sizeof s->shape);
  struct shape shape = shape_make(batch, half_dim);
  memcpy(&s->shape, &shape, sizeof shape);
  return qtr_cuda_status(c, err);
}

/* After step number n: how long the device worked on it, and how long it had waited for it. */
static void clock_read(struct qtr_cuda_step *s, uint64_t n) {
  float busy = 0, idle = 0;
  if (cudaEventElapsedTime(&busy, s->begun[n % CLOCKS], s->ended[n % CLOCKS]) == cudaSuccess) s->busy += (double)busy * 1e-3;
  if (n == 0) return;
  if (cudaEventElapsedTime(&idle, s->ended[(n - 1) % CLOCKS], s->begun[n % CLOCKS]) == cudaSuccess)
    s->idle += (double)idle * 1e-3;
}

void qtr_cuda_busy_read(struct qtr_backend *b, double *busy, double *idle) {
  const struct qtr_cuda_step *s = ((struct qtr_cuda *)b)->step;
  *busy = s->busy;
  *idle = s->idle;
}

enum qtr_status qtr_cuda_launch(struct qtr_backend *b, struct qtr_error *err) {
  struct qtr_cuda *c = (struct qtr_cuda *)b;
  struct qtr_cuda_step *s = c->step;
  bool decode = s->shape.n_tokens == s->shape.n_seqs && s->shape.n_rows == s->shape.n_seqs;
  uint64_t n = s->n_launched;
  if (s->n_op > 0 && c->error == cudaSuccess && batch_upload(c)) {
    if (s->single && decode)
      run_graph(c);
    else
      run_record(c, false);
  }
  s->n_op = 0;
  (void)step_begins(c); /* a step of nothing */
  s->open = false;
  s->way[n % WAYS].to = s->choose.result;
  s->way[n % WAYS].n_rows = s->chooses && c->error == cudaSuccess ? s->choose.n_rows : 0;
  if (s->way[n % WAYS].n_rows > 0) {
    size_t n_bytes = (size_t)s->choose.n_rows * sizeof *s->result;
    (void)qtr_cuda_ok(c, cudaMemcpyAsync(s->result_host[n % WAYS], s->result, n_bytes, cudaMemcpyDeviceToHost, c->stream),
                      "sampled tokens");
  }
  (void)qtr_cuda_ok(c, cudaEventRecord(s->ended[n % CLOCKS], c->stream), "a time stamp");
  s->n_launched++;
  return qtr_cuda_status(c, err);
}

enum qtr_status qtr_cuda_collect(struct qtr_backend *b, struct qtr_error *err) {
  struct qtr_cuda *c = (struct qtr_cuda *)b;
  struct qtr_cuda_step *s = c->step;
  if (s->n_collected == s->n_launched) return qtr_fail(err, QTR_ERR_STATE, "no step was launched");
  uint64_t n = s->n_collected++;
  if (qtr_cuda_ok(c, cudaEventSynchronize(s->ended[n % CLOCKS]), "a step") && c->error == cudaSuccess) {
    clock_read(s, n);
    if (s->way[n % WAYS].n_rows > 0)
      memcpy(s->way[n % WAYS].to, s->result_host[n % WAYS], (size_t)s->way[n % WAYS].n_rows * sizeof *s->result);
  }
  return qtr_cuda_status(c, err);
}

enum qtr_status qtr_cuda_end_step(struct qtr_backend *b, struct qtr_error *err) {
  enum qtr_status status = qtr_cuda_launch(b, err), collected = qtr_cuda_collect(b, status ? NULL : err);
  return status ? status : collected;
}

/* A new record, cleared; outside of a step the caller flushes at once. */
static struct op *record(struct qtr_cuda *c, enum op_kind kind) {
  struct qtr_cuda_step *s = c->step;
  if (s->n_op == MAX_OPS) qtr_cuda_flush(c);
  if (s->n_op == MAX_OPS) s->n_op = 0; /* an error is remembered; the record no longer matters */
  struct op *op = &s->op[s->n_op++];
  memset(op, 0, sizeof *op);
  op->kind = kind;
  return op;
}

static void recorded(struct qtr_cuda *c) {
  if (!c->step->open) qtr_cuda_flush(c);
}

/* The rows of a step's operation, padded as the step is. */
static size_t padded(const struct qtr_cuda_step *s, size_t n) {
  if (!s->open) return n;
  return n == (size_t)s->batch.n_tokens ? (size_t)s->shape.n_tokens : n;
}

void qtr_cuda_embed(struct qtr_backend *b, const struct qtr_embed_args *args) {
  struct qtr_cuda *c = (struct qtr_cuda *)b;
  struct op *op = record(c, OP_EMBED);
  op->as.embed.table = args->table;
  op->as.embed.out = args->out;
  recorded(c);
}

void qtr_cuda_rmsnorm(struct qtr_backend *b, const struct qtr_rmsnorm_args *args) {
  struct qtr_cuda *c = (struct qtr_cuda *)b;
  struct qtr_rmsnorm_args *a = &record(c, OP_RMSNORM)->as.norm;
  a->x = args->x;
  a->weight = args->weight;
  a->out = args->out;
  a->quant = args->quant;
  a->norm = args->norm;
  a->eps = args->eps;
  a->n_tokens = padded(c->step, args->n_tokens);
  a->dim = args->dim;
  recorded(c);
}

void qtr_cuda_quant(struct qtr_backend *b, const struct qtr_quant_args *args) {
  struct qtr_cuda *c = (struct qtr_cuda *)b;
  struct qtr_quant_args *a = &record(c, OP_QUANT)->as.quant;
  a->x = args->x;
  a->out = args->out;
  a->quant = args->quant;
  a->n_tokens = padded(c->step, args->n_tokens);
  a->dim = args->dim;
  recorded(c);
}

void qtr_cuda_linear(struct qtr_backend *b, const struct qtr_linear_args *args) {
  struct qtr_cuda *c = (struct qtr_cuda *)b;
  struct qtr_linear_args *a = &record(c, OP_LINEAR)->as.linear;
  a->linear = args->linear;
  a->input = args->input;
  a->epilogue = args->epilogue;
  a->out = args->out;
  a->n_tokens = padded(c->step, args->n_tokens);
  recorded(c);
}

void qtr_cuda_rope_kv(struct qtr_backend *b, const struct qtr_rope_kv_args *args) {
  struct qtr_cuda *c = (struct qtr_cuda *)b;
  struct qtr_rope_kv_args *a = &record(c, OP_ROPE_KV)->as.rope;
  a->qkv = args->qkv;
  a->kv = args->kv;
  a->layer = args->layer;
  a->n_heads = args->n_heads;
  a->n_kv_heads = args->n_kv_heads;
  a->head_dim = args->head_dim;
  recorded(c);
}

void qtr_cuda_attend(struct qtr_backend *b, const struct qtr_attention_args *args) {
  struct qtr_cuda *c = (struct qtr_cuda *)b;
  struct qtr_cuda_step *s = c->step;
  for (size_t i = 0; i < s->n_op; i++) { /* one plan a record */
    struct qtr_cuda_plan_config mine = plan_of(c, args), theirs;
    if (s->op[i].kind != OP_ATTENTION) continue;
    theirs = plan_of(c, &s->op[i].as.attention);
    if (!same_plan(&mine, &theirs)) qtr_cuda_flush(c);
    break;
  }
  struct qtr_attention_args *a = &record(c, OP_ATTENTION)->as.attention;
  a->qkv = args->qkv;
  a->kv = args->kv;
  a->out = args->out;
  a->scale = args->scale;
  a->layer = args->layer;
  a->n_heads = args->n_heads;
  a->n_kv_heads = args->n_kv_heads;
  a->head_dim = args->head_dim;
  recorded(c);
}

void qtr_cuda_gather(struct qtr_backend *b, const struct qtr_gather_args *args) {
  struct qtr_cuda *c = (struct qtr_cuda *)b;
  struct qtr_gather_args *a = &record(c, OP_GATHER)->as.gather;
  a->x = args->x;
  a->out = args->out;
  a->dim = args->dim;
  recorded(c);
}

void qtr_cuda_choose(struct qtr_backend *b, const struct qtr_choose_args *args) {
  struct qtr_cuda *c = (struct qtr_cuda *)b;
  struct qtr_cuda_step *s = c->step;
  struct qtr_choose_args *a = &record(c, OP_CHOOSE)->as.choose; /* rows and results are the step's own, not the record's */
  a->logits = args->logits;
  a->vocab_size = args->vocab_size;
  s->choose = *args;
  s->chooses = true;
  s->shape.choosing = 1;
  for (int32_t i = 0; i < args->n_rows; i++) {
    const struct qtr_choose_row *row = &args->row[i];
    if (!row->skip && (row->temperature > 0 || row->n_top >= 0 || row->n_adjust > 0 || row->pending)) s->shape.choosing = 2;
  }
}

void qtr_cuda_stamp(struct qtr_backend *b) {
  struct qtr_cuda *c = (struct qtr_cuda *)b;
  (void)record(c, OP_STAMP);
  recorded(c);
}

size_t qtr_cuda_stamps_read(struct qtr_backend *b, double *seconds, size_t n) {
  struct qtr_cuda *c = (struct qtr_cuda *)b;
  struct qtr_cuda_step *s = c->step;
  size_t n_intervals = s->n_stamps > 0 ? QTR_MIN(s->n_stamps - 1, n) : 0;
  for (size_t i = 0; i < n_intervals; i++) {
    float ms = 0;
    if (!qtr_cuda_ok(c, cudaEventElapsedTime(&ms, s->stamp[i], s->stamp[i + 1]), "a time stamp")) return 0;
    seconds[i] = (double)ms * 1e-3;
  }
  return n_intervals;
}

void qtr_cuda_wait(struct qtr_backend *b) {
  struct qtr_cuda *c = (struct qtr_cuda *)b;
  if (!c->step) return;
  qtr_cuda_flush(c);
  (void)qtr_cuda_ok(c, cudaStreamSynchronize(c->stream), "waiting for the GPU");
}
