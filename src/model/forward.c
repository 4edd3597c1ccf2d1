/* forward.c - the forward pass of the Llama family (spec B.10), written once for every backend, and the buffers of a step.
 *
 * One layer: RMSNorm + quantise, QKV, RoPE + KV write, attention, quantise, O added to the residual stream, RMSNorm +
 * quantise, gate|up with SiLU·mul, quantise, down added to the residual stream. Llama 1–3, Vicuna, Yi, Mistral and
 * Qwen 1.5/2 differ in data only: biases, head sizes, frequencies, tied embeddings. The last layer computes of a token whose
 * logits nobody wants no more than K and V, but for attention, which is one operation for all tokens. */
#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"
#include "model/attention_count.h"
#include "model/model.h"

#include <stdlib.h>
#include <string.h>

/* An operation of a profiled step, booked when the device's clock is read. */
struct marked {
  enum qtr_profile_op op;
  double bytes, ops;
};
enum { MARKS_PER_LAYER = 10, MARKS_BESIDES = 8 };

struct qtr_workspace {
  struct qtr_backend *backend;
  size_t max_tokens, max_rows, n_bytes;
  size_t act_unit;         /* bytes of an activation */
  void *x;                 /* (max_tokens, hidden) the residual stream */
  void *qkv;               /* (max_tokens, (n_heads + 2 n_kv_heads) * head_dim) */
  void *attn;              /* (max_tokens, n_heads * head_dim) */
  void *mlp;               /* (max_tokens, intermediate) */
  void *rows;              /* (max_rows, hidden) */
  void *logits;            /* (max_rows, vocab) F32 */
  struct qtr_input *input; /* (max_tokens, widest linear) */
  void *states;            /* (n_layers + 1, max_rows, hidden) the residual stream of the logit rows; NULL unless wanted */
  size_t state_stride;     /* bytes of one state there */
  struct marked *marked;   /* (max_marks) when profiling on a device with its own clock */
  double *seconds;         /* (max_marks) */
  size_t n_marked, max_marks;
};

const char *const qtr_profile_names[QTR_N_PROFILE_OPS] = {"embed", "norm+quant", "qkv",  "rope+kv", "attention", "quant",
                                                          "o",     "gate_up",    "down", "head",    "sampling"};

static size_t qkv_width(const struct qtr_config *c) {
  return ((size_t)c->n_heads + 2 * (size_t)c->n_kv_heads) * (size_t)c->head_dim;
}
static size_t attn_width(const struct qtr_config *c) { return (size_t)c->n_heads * (size_t)c->head_dim; }

enum qtr_status qtr_workspace_create(const struct qtr_model *model, size_t max_tokens, size_t max_rows,
                                     struct qtr_workspace **workspace, struct qtr_error *err) {
  const struct qtr_config *c = &model->config;
  struct qtr_backend *b = model->backend;
  *workspace = NULL;
  struct qtr_workspace *w = calloc(1, sizeof *w);
  if (!w) return qtr_fail_memory(err, "a workspace", sizeof *w);
  *w = (struct qtr_workspace){.backend = b, .max_tokens = max_tokens, .max_rows = max_rows};
  struct qtr_caps caps;
  b->ops->caps(b, &caps);
  size_t unit = w->act_unit = qtr_dtype_bytes(caps.act_dtype);
  size_t hidden = (size_t)c->hidden_size, heads = attn_width(c);
  size_t widest = QTR_MAX(QTR_MAX(hidden, heads), (size_t)c->intermediate_size);
  const struct {
    void **p;
    size_t rows, width, unit;
  } buffers[] = {
      {&w->x, max_tokens, hidden, unit},   {&w->qkv, max_tokens, qkv_width(c), unit},
      {&w->attn, max_tokens, heads, unit}, {&w->mlp, max_tokens, (size_t)c->intermediate_size, unit},
      {&w->rows, max_rows, hidden, unit},  {&w->logits, max_rows, (size_t)c->vocab_size, sizeof(float)},
  };
  enum qtr_status status = QTR_OK;
  for (size_t i = 0; i < sizeof buffers / sizeof buffers[0] && !status; i++) {
    size_t n;
    if (qtr_mul_overflow(buffers[i].rows, buffers[i].width, &n) || qtr_mul_overflow(n, buffers[i].unit, &n)) {
      status = qtr_fail(err, QTR_ERR_MEMORY, "a step of %zu tokens is too large; lower max_num_batched_tokens", max_tokens);
      break;
    }
    status = b->ops->alloc(b, n, buffers[i].p, err);
    w->n_bytes += n;
  }
  if (!status) status = b->ops->input_create(b, max_tokens, widest, &w->input, err);
  w->max_marks = (size_t)c->n_layers * MARKS_PER_LAYER + MARKS_BESIDES;
  w->marked = malloc(w->max_marks * sizeof *w->marked);
  w->seconds = malloc(w->max_marks * sizeof *w->seconds);
  if (!status && (!w->marked || !w->seconds)) status = qtr_fail_memory(err, "a profile", w->max_marks * sizeof *w->marked);
  if (status) {
    qtr_workspace_free(w);
    return status;
  }
  w->n_bytes += max_tokens * widest;
  *workspace = w;
  return QTR_OK;
}

void qtr_workspace_free(struct qtr_workspace *w) {
  if (!w) return;
  struct qtr_backend *b = w->backend;
  void *const buffers[] = {w->x, w->qkv, w->attn, w->mlp, w->rows, w->logits, w->states};
  for (size_t i = 0; i < sizeof buffers / sizeof buffers[0]; i++) {
    if (buffers[i]) b->ops->free(b, buffers[i]);
  }
  if (w->input) b->ops->input_free(b, w->input);
  free(w->marked);
  free(w->seconds);
  free(w);
}

size_t qtr_workspace_bytes(const struct qtr_workspace *w) { return w->n_bytes; }
const float *qtr_workspace_logits(const struct qtr_workspace *w) { return w->logits; }

enum qtr_status qtr_workspace_keep_states(const struct qtr_model *model, struct qtr_workspace *w, struct qtr_error *err) {
  size_t stride, n_bytes;
  if (qtr_mul_overflow(w->max_rows * w->act_unit, (size_t)model->config.hidden_size, &stride) ||
      qtr_mul_overflow(stride, (size_t)model->config.n_layers + 1, &n_bytes)) {
    return qtr_fail(err, QTR_ERR_MEMORY, "the residual streams of %zu rows are too large", w->max_rows);
  }
  w->state_stride = stride;
  w->n_bytes += n_bytes;
  return w->backend->ops->alloc(w->backend, n_bytes, &w->states, err);
}

const void *qtr_workspace_state(const struct qtr_workspace *w, size_t i) {
  return (const char *)w->states + i * w->state_stride;
}

/* ---- one step ---- */

struct step {
  const struct qtr_model *model;
  struct qtr_backend *b;
  struct qtr_kv *kv;
  struct qtr_workspace *w;
  const struct qtr_batch *batch;
  struct qtr_batch roomy;           /* what the backend sees until end_step: the batch and the room of the buffers */
  double t_mark;                    /* end of the operation before, when profiling */
  size_t act_unit;                  /* bytes of an activation */
  struct qtr_attention_count count; /* when profiling */
};

static void book(struct qtr_profile *profile, enum qtr_profile_op op, double seconds, double bytes, double ops) {
  struct qtr_profile_entry *e = &profile->op[op];
  e->n_calls++;
  e->seconds += seconds;
  e->bytes += bytes;
  e->ops += ops;
}

/* Closes the interval since the last mark and books it, at once or by the device's clock. */
static void mark(struct step *s, enum qtr_profile_op op, double bytes, double ops) {
  struct qtr_profile *profile = s->model->profile;
  struct qtr_workspace *w = s->w;
  if (!profile) return;
  if (s->b->ops->stamp) {
    if (w->n_marked < w->max_marks) w->marked[w->n_marked++] = (struct marked){op, bytes, ops};
    s->b->ops->stamp(s->b);
    return;
  }
  double now = qtr_now();
  book(profile, op, now - s->t_mark, bytes, ops);
  s->t_mark = now;
}

static void book_marked(struct qtr_model *model, struct qtr_workspace *w) {
  struct qtr_backend *b = model->backend;
  if (!model->profile || !b->ops->stamp) return;
  size_t n = b->ops->stamps_read(b, w->seconds, w->n_marked);
  for (size_t i = 0; i < n; i++) {
    book(model->profile, w->marked[i].op, w->seconds[i], w->marked[i].bytes, w->marked[i].ops);
  }
}

static void run_norm(struct step *s, const void *x, const void *weight, size_t n_tokens, enum qtr_linear_format next,
                     enum qtr_norm norm) {
  size_t dim = (size_t)s->model->config.hidden_size;
  enum qtr_quant quant = qtr_linear_quant(next);
  const struct qtr_rmsnorm_args args = {
      .x = x,
      .weight = weight,
      .out = s->w->input,
      .quant = quant,
      .norm = quant == QTR_QUANT_INT8 ? norm : QTR_NORM_EXACT,
      .eps = s->model->config.rms_norm_eps,
      .n_tokens = n_tokens,
      .dim = dim,
  };
  s->b->ops->rmsnorm(s->b, &args);
  mark(s, QTR_PROFILE_NORM, (double)(n_tokens * dim * (s->act_unit + 1)), 0);
}

static void run_quant(struct step *s, const void *x, size_t n_tokens, size_t dim) {
  const struct qtr_quant_args args = {
      .x = x,
      .out = s->w->input,
      .quant = qtr_linear_quant(s->model->format),
      .n_tokens = n_tokens,
      .dim = dim,
  };
  s->b->ops->quant(s->b, &args);
  mark(s, QTR_PROFILE_QUANT, (double)n_tokens * (double)dim * (double)(s->act_unit + 1), 0);
}

/* n_in and n_out are for the profile only. */
static void run_linear(struct step *s, enum qtr_profile_op op, const struct qtr_linear *linear, enum qtr_epilogue epilogue,
                       void *out, size_t n_tokens, size_t n_in, size_t n_out) {
  const struct qtr_linear_args args = {
      .linear = linear, .input = s->w->input, .epilogue = epilogue, .out = out, .n_tokens = n_tokens};
  s->b->ops->linear(s->b, &args);
  mark(s, op, (double)s->b->ops->linear_bytes(linear) + (double)n_tokens * (double)(n_in + n_out * s->act_unit),
       2.0 * (double)n_tokens * (double)n_in * (double)n_out);
}

static void look(const struct step *s, enum qtr_tap_point point, int32_t layer, const void *x, size_t dim) {
  const struct qtr_tap *tap = s->model->tap;
  if (tap) tap->see(tap->user, point, layer, x, (size_t)s->batch->n_tokens, dim);
}

/* w->qkv turned, K and V of it to the cache. */
static void run_rope_kv(struct step *s, int32_t i) {
  const struct qtr_config *c = &s->model->config;
  struct qtr_workspace *w = s->w;
  const struct qtr_rope_kv_args rope = {
      .qkv = w->qkv, .kv = s->kv, .layer = i, .n_heads = c->n_heads, .n_kv_heads = c->n_kv_heads, .head_dim = c->head_dim};
  s->b->ops->rope_kv_write(s->b, &rope);
  look(s, QTR_TAP_QKV, i, w->qkv, qkv_width(c));
  mark(s, QTR_PROFILE_ROPE_KV, (double)(2 * (size_t)s->batch->n_tokens * qkv_width(c) * s->act_unit), 0);
}

/* w->qkv and the cache to w->attn. */
static void run_attention(struct step *s, int32_t i) {
  const struct qtr_config *c = &s->model->config;
  struct qtr_workspace *w = s->w;
  size_t n_tokens = (size_t)s->batch->n_tokens, heads = attn_width(c);
  const struct qtr_attention_args attention = {
      .qkv = w->qkv,
      .kv = s->kv,
      .out = w->attn,
      .scale = 1.0f / __builtin_sqrtf((float)c->head_dim),
      .layer = i,
      .n_heads = c->n_heads,
      .n_kv_heads = c->n_kv_heads,
      .head_dim = c->head_dim,
  };
  s->b->ops->attention(s->b, &attention);
  if (!s->model->profile) return;
  double bytes, ops;
  qtr_attention_need(&s->count, i, &bytes, &ops);
  mark(s, QTR_PROFILE_ATTENTION, bytes + (double)(2 * n_tokens * heads * s->act_unit), ops);
}

/* The first part of a layer: w->x to w->qkv, and to the cache. */
static void run_qkv(struct step *s, int32_t i) {
  const struct qtr_config *c = &s->model->config;
  const struct qtr_layer *layer = &s->model->layer[i];
  struct qtr_workspace *w = s->w;
  size_t n_tokens = (size_t)s->batch->n_tokens, hidden = (size_t)c->hidden_size;
  look(s, QTR_TAP_LAYER_IN, i, w->x, hidden);
  run_norm(s, w->x, layer->input_norm, n_tokens, s->model->format, s->model->norm);
  run_linear(s, QTR_PROFILE_QKV, layer->qkv, QTR_EPILOGUE_STORE, w->qkv, n_tokens, hidden, qkv_width(c));
  run_rope_kv(s, i);
}

/* The last part, on n_tokens rows: adds what comes of attention's output to the residual stream x, and what the MLP makes of
 * that. */
static void run_rest(struct step *s, int32_t i, void *x, const void *attn, size_t n_tokens) {
  const struct qtr_config *c = &s->model->config;
  const struct qtr_layer *layer = &s->model->layer[i];
  struct qtr_workspace *w = s->w;
  size_t hidden = (size_t)c->hidden_size, heads = attn_width(c);
  size_t inner = (size_t)c->intermediate_size;
  run_quant(s, attn, n_tokens, heads);
  run_linear(s, QTR_PROFILE_O, layer->o, QTR_EPILOGUE_ADD, x, n_tokens, heads, hidden);

  look(s, QTR_TAP_MLP_IN, i, x, hidden);
  run_norm(s, x, layer->post_norm, n_tokens, s->model->format, s->model->norm);
  run_linear(s, QTR_PROFILE_GATE_UP, layer->gate_up, QTR_EPILOGUE_SILU_MUL, w->mlp, n_tokens, hidden, 2 * inner);
  look(s, QTR_TAP_MLP, i, w->mlp, inner);
  run_quant(s, w->mlp, n_tokens, inner);
  run_linear(s, QTR_PROFILE_DOWN, layer->down, QTR_EPILOGUE_ADD, x, n_tokens, inner, hidden);
  look(s, QTR_TAP_LAYER_OUT, i, x, hidden);
}

static void run_layer(struct step *s, int32_t i) {
  const struct qtr_config *c = &s->model->config;
  struct qtr_workspace *w = s->w;
  run_qkv(s, i);
  run_attention(s, i);
  look(s, QTR_TAP_ATTENTION, i, w->attn, attn_width(c));
  run_rest(s, i, w->x, w->attn, (size_t)s->batch->n_tokens);
}

static void gather(struct step *s, const void *x, void *out, size_t dim) {
  s->b->ops->gather(s->b, &(struct qtr_gather_args){.x = x, .out = out, .dim = dim});
}

/* Does a token of the batch choose pages that later steps read? Generated ones do, in a sparse cache. */
static bool any_generated(const struct qtr_batch *batch) {
  for (int32_t i = 0; i < batch->n_seqs; i++) {
    if (batch->kv_len[i] + batch->q_start[i + 1] - batch->q_start[i] > qtr_batch_decode_start(batch, i)) return true;
  }
  return false;
}

/* The last layer of a step that wants the logits of some tokens only: nobody reads more of the others than K and V. Leaves
 * the residual stream of the logit rows in w->rows. */
static void run_last_layer(struct step *s, int32_t i) {
  const struct qtr_config *c = &s->model->config;
  struct qtr_workspace *w = s->w;
  size_t rows = (size_t)s->batch->n_logit_rows;
  run_qkv(s, i);
  if (rows > 0 || any_generated(s->batch)) run_attention(s, i);
  if (rows == 0) return;
  gather(s, w->attn, w->qkv, attn_width(c)); /* which has been read */
  gather(s, w->x, w->rows, (size_t)c->hidden_size);
  run_rest(s, i, w->rows, w->qkv, rows);
}

/* Keeps state i of the residual stream where somebody asked for it. Gathering is the copy that every backend has, as part of
 * the step. */
static void keep_state(struct step *s, int32_t i) {
  struct qtr_workspace *w = s->w;
  if (!w->states || s->batch->n_logit_rows == 0) return;
  gather(s, w->x, (char *)w->states + (size_t)i * w->state_stride, (size_t)s->model->config.hidden_size);
}

/* Checks the batch and the tap, and opens the step on the backend. */
static enum qtr_status open_step(struct step *s, struct qtr_model *model, struct qtr_kv *kv, struct qtr_workspace *w,
                                 const struct qtr_batch *batch, struct qtr_error *err) {
  struct qtr_backend *b = model->backend;
  if (batch->n_tokens < 1 || (size_t)batch->n_tokens > w->max_tokens || (size_t)batch->n_logit_rows > w->max_rows) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "a batch of %d tokens and %d logit rows does not fit a workspace of %zu and %zu",
                    batch->n_tokens, batch->n_logit_rows, w->max_tokens, w->max_rows);
  }
  if (model->tap && w->act_unit != sizeof(float)) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "backend %s does not show its layers; choose --device cpu", b->ops->name);
  }
  *s = (struct step){.model = model, .b = b, .kv = kv, .w = w, .batch = batch, .act_unit = w->act_unit};
  s->roomy = *batch;
  s->roomy.room_tokens = (int32_t)w->max_tokens;
  s->roomy.room_rows = (int32_t)w->max_rows;
  enum qtr_status status = b->ops->begin_step(b, &s->roomy, model->inv_freq, (size_t)model->config.head_dim / 2, err);
  if (status || !model->profile) return status;
  const struct qtr_kv_config one = {.format = b->ops->kv_format(kv),
                                    .n_layers = 1,
                                    .n_kv_heads = model->config.n_kv_heads,
                                    .head_dim = model->config.head_dim};
  qtr_attention_count(batch, &one, model->config.n_heads, b->ops->kv_heads ? b->ops->kv_heads(kv) : NULL, &s->count);
  w->n_marked = 0;
  if (b->ops->stamp) b->ops->stamp(b);
  s->t_mark = qtr_now();
  return QTR_OK;
}

enum qtr_status qtr_model_run_layers(struct qtr_model *model, struct qtr_kv *kv, struct qtr_workspace *w,
                                     const struct qtr_batch *batch, int32_t first, int32_t n, float *x,
                                     struct qtr_error *err) {
  struct qtr_backend *b = model->backend;
  size_t n_bytes = (size_t)batch->n_tokens * (size_t)model->config.hidden_size * sizeof *x;
  if (w->act_unit != sizeof *x) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "backend %s does not run single layers; choose --device cpu", b->ops->name);
  }
  struct step s;
  enum qtr_status status = open_step(&s, model, kv, w, batch, err);
  if (status) return status;
  memcpy(w->x, x, n_bytes);
  for (int32_t i = first; i < first + n; i++) run_layer(&s, i);
  status = b->ops->end_step(b, err);
  if (!status) memcpy(x, w->x, n_bytes);
  return status;
}

enum qtr_status qtr_model_attend(struct qtr_model *model, struct qtr_kv *kv, struct qtr_workspace *w,
                                 const struct qtr_batch *batch, int32_t layer, const float *qkv, float *out,
                                 struct qtr_error *err) {
  struct qtr_backend *b = model->backend;
  const struct qtr_config *c = &model->config;
  size_t n_tokens = (size_t)batch->n_tokens;
  if (w->act_unit != sizeof *qkv) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "backend %s does not run single layers; choose --device cpu", b->ops->name);
  }
  struct step s;
  enum qtr_status status = open_step(&s, model, kv, w, batch, err);
  if (status) return status;
  memcpy(w->qkv, qkv, n_tokens * qkv_width(c) * sizeof *qkv);
  run_rope_kv(&s, layer);
  run_attention(&s, layer);
  status = b->ops->end_step(b, err);
  if (!status) memcpy(out, w->attn, n_tokens * attn_width(c) * sizeof *out);
  return status;
}

enum qtr_status qtr_model_launch(struct qtr_model *model, struct qtr_kv *kv, struct qtr_workspace *w,
                                 const struct qtr_batch *batch, struct qtr_error *err) {
  const struct qtr_config *c = &model->config;
  struct qtr_backend *b = model->backend;
  struct step s;
  enum qtr_status status = open_step(&s, model, kv, w, batch, err);
  if (status) return status;

  const struct qtr_embed_args embed = {.table = model->embed, .out = w->x};
  b->ops->embed(b, &embed);
  mark(&s, QTR_PROFILE_EMBED, (double)batch->n_tokens * c->hidden_size * 2 * (double)s.act_unit, 0);
  keep_state(&s, 0);
  bool some = batch->n_logit_rows < batch->n_tokens && !model->tap && !w->states;
  for (int32_t i = 0; i < c->n_layers - some; i++) {
    run_layer(&s, i);
    keep_state(&s, i + 1);
  }
  if (some) run_last_layer(&s, c->n_layers - 1);

  if (batch->n_logit_rows > 0) {
    size_t rows = (size_t)batch->n_logit_rows, hidden = (size_t)c->hidden_size;
    if (!some) gather(&s, w->x, w->rows, hidden);
    run_norm(&s, w->rows, model->final_norm, rows, model->head_format, QTR_NORM_EXACT);
    run_linear(&s, QTR_PROFILE_HEAD, model->head, QTR_EPILOGUE_LOGITS, w->logits, rows, hidden, (size_t)c->vocab_size);
    if (batch->choose && b->ops->choose) {
      const struct qtr_choose_args choose = {.logits = w->logits,
                                             .row = batch->choose,
                                             .result = batch->chosen,
                                             .adjust = batch->adjust,
                                             .n_adjust = batch->n_adjust,
                                             .n_rows = batch->n_logit_rows,
                                             .vocab_size = c->vocab_size};
      b->ops->choose(b, &choose);
      mark(&s, QTR_PROFILE_CHOOSE, (double)rows * (double)c->vocab_size * sizeof(float), 0);
    }
  }
  return b->ops->launch ? b->ops->launch(b, err) : b->ops->end_step(b, err);
}

enum qtr_status qtr_model_collect(struct qtr_model *model, struct qtr_workspace *w, struct qtr_error *err) {
  struct qtr_backend *b = model->backend;
  enum qtr_status status = b->ops->collect ? b->ops->collect(b, err) : QTR_OK;
  if (!status) book_marked(model, w);
  return status;
}

enum qtr_status qtr_model_forward(struct qtr_model *model, struct qtr_kv *kv, struct qtr_workspace *w,
                                  const struct qtr_batch *batch, const float **logits, struct qtr_error *err) {
  enum qtr_status status = qtr_model_launch(model, kv, w, batch, err);
  *logits = w->logits;
  return status ? status : qtr_model_collect(model, w, err);
}
