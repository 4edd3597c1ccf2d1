/* load.c - from a checkpoint to weights on a backend (model.h): names of spec A.2, fused as A.6 says, every shape checked.
 * Weights go from the memory map straight into the backend's layout, one matrix at a time. */
#include "base/checked.h"
#include "base/file.h"
#include "base/half.h"
#include "base/progress.h"
#include "base/status.h"
#include "checkpoint/kv_scales.h"
#include "model/model_internal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Small arrays that live only while one matrix is built. */
#define MAX_SCRATCH 16
struct loader {
  struct qtr_model *model;
  struct qtr_backend *b;
  const struct qtr_checkpoint *cp;
  float *scratch[MAX_SCRATCH];
  size_t n_scratch;
  struct qtr_error *err;
};

static void scratch_free(struct loader *l) {
  for (size_t i = 0; i < l->n_scratch; i++) free(l->scratch[i]);
  l->n_scratch = 0;
}

/* A tensor's elements as n finite floats in scratch memory; with half, rounded to fp16 first (A.2.3). */
static enum qtr_status read_floats(struct loader *l, const struct qtr_tensor *t, size_t n, bool half, float **out) {
  if (l->n_scratch == MAX_SCRATCH) return qtr_fail(l->err, QTR_ERR_STATE, "too many parts");
  float *x = malloc(QTR_MAX(n, 1) * sizeof *x);
  if (!x) return qtr_fail_memory(l->err, t->name, n * sizeof *x);
  l->scratch[l->n_scratch++] = x;
  enum qtr_status status = qtr_tensor_to_floats(t, x, n, l->err);
  if (status) return status;
  for (size_t i = 0; i < n; i++) {
    if (half) x[i] = qtr_f16_round(x[i]);
    if (!isfinite(x[i])) {
      return qtr_fail(l->err, QTR_ERR_FORMAT, "tensor %s has a value that is not finite at element %zu", t->name, i);
    }
  }
  *out = x;
  return QTR_OK;
}

static enum qtr_status get(struct loader *l, const char *prefix, const char *suffix, size_t n_dims, size_t d0, size_t d1,
                           const struct qtr_tensor **tensor) {
  char name[192];
  (void)snprintf(name, sizeof name, "%s.%s", prefix, suffix);
  const size_t shape[2] = {d0, d1};
  return qtr_checkpoint_get(l->cp, name, n_dims, shape, tensor, l->err);
}

static enum qtr_status check_dtype(struct loader *l, const struct qtr_tensor *t, enum qtr_dtype a, enum qtr_dtype b) {
  if (t->dtype == a || t->dtype == b) return QTR_OK;
  return qtr_fail(l->err, QTR_ERR_FORMAT, "tensor %s is %s; expected %s", t->name, qtr_dtype_name(t->dtype),
                  qtr_dtype_name(a));
}

static enum qtr_dtype float_dtype(enum qtr_linear_format format) {
  return format == QTR_LINEAR_F16 ? QTR_DTYPE_F16 : format == QTR_LINEAR_BF16 ? QTR_DTYPE_BF16 : QTR_DTYPE_F32;
}

/* Scales of W8A8 may come as (n) or (n, 1) or one for all rows. */
static enum qtr_status read_scale(struct loader *l, const char *prefix, const char *suffix, size_t n_out, float **scale) {
  char name[192];
  (void)snprintf(name, sizeof name, "%s.%s", prefix, suffix);
  const struct qtr_tensor *t = qtr_checkpoint_find(l->cp, name);
  if (!t) return get(l, prefix, suffix, 1, n_out, 0, &t); /* says what is missing */
  size_t n = 1;
  for (size_t i = 0; i < t->n_dims; i++) n *= t->shape[i];
  if (n != 1 && n != n_out) return get(l, prefix, suffix, 1, n_out, 0, &t);
  enum qtr_status status = read_floats(l, t, n, true, scale);
  if (status || n == n_out) return status;
  float one = (*scale)[0];
  float *all = realloc(*scale, n_out * sizeof *all);
  if (!all) return qtr_fail_memory(l->err, name, n_out * sizeof *all);
  l->scratch[l->n_scratch - 1] = all;
  for (size_t i = 0; i < n_out; i++) all[i] = one;
  *scale = all;
  return QTR_OK;
}

/* One projection as it lies on disk. *weight: its largest tensor, to be forgotten after use. */
static enum qtr_status read_part(struct loader *l, const char *prefix, enum qtr_linear_format format, size_t n_out,
                                 size_t n_in, struct qtr_linear_part *part, const struct qtr_tensor **weight) {
  const struct qtr_tensor *t;
  enum qtr_status status;
  *part = (struct qtr_linear_part){.n_out = n_out};
  bool int4 = format == QTR_LINEAR_W4A8 || format == QTR_LINEAR_W4A8_G128;
  if (int4 && (n_out % 32 || n_in % (format == QTR_LINEAR_W4A8 ? 32 : QTR_GROUP))) {
    return qtr_fail(l->err, QTR_ERR_FORMAT,
                    "%s: %zu x %zu cannot be 4-bit packed: rows must be a multiple of 32, columns of %d", prefix, n_out,
                    n_in, format == QTR_LINEAR_W4A8 ? 32 : QTR_GROUP);
  }
  if (int4) {
    float *scale, *szero;
    if ((status = get(l, prefix, "qweight", 2, n_out, n_in / 2, &t))) return status;
    if ((status = check_dtype(l, t, QTR_DTYPE_I8, QTR_DTYPE_U8))) return status;
    *weight = t;
    part->weight = t->data;
    if ((status = get(l, prefix, "s1_scales", 1, n_out, 0, &t))) return status;
    if ((status = read_floats(l, t, n_out, true, &scale))) return status;
    part->scale = scale;
    if (format == QTR_LINEAR_W4A8) {
      if ((status = get(l, prefix, "s1_szeros", 1, n_out, 0, &t))) return status;
      if ((status = read_floats(l, t, n_out, true, &szero))) return status;
      part->szero = szero;
    } else {
      if ((status = get(l, prefix, "s2_scales", 2, n_in / QTR_GROUP, n_out, &t))) return status;
      if ((status = check_dtype(l, t, QTR_DTYPE_I8, QTR_DTYPE_U8))) return status;
      part->s2_scale = t->data;
      if ((status = get(l, prefix, "s2_zeros", 2, n_in / QTR_GROUP, n_out, &t))) return status;
      if ((status = check_dtype(l, t, QTR_DTYPE_I8, QTR_DTYPE_U8))) return status;
      part->s2_zero = t->data;
    }
  } else {
    if ((status = get(l, prefix, "weight", 2, n_out, n_in, &t))) return status;
    enum qtr_dtype want = format == QTR_LINEAR_W8A8 ? QTR_DTYPE_I8 : float_dtype(format);
    if ((status = check_dtype(l, t, want, want))) return status;
    *weight = t;
    part->weight = t->data;
    if (format == QTR_LINEAR_W8A8) {
      float *scale;
      if ((status = read_scale(l, prefix, "dequant_scale", n_out, &scale))) return status;
      part->scale = scale;
    }
  }
  char name[192];
  (void)snprintf(name, sizeof name, "%s.bias", prefix);
  if (qtr_checkpoint_find(l->cp, name)) {
    float *bias;
    if ((status = get(l, prefix, "bias", 1, n_out, 0, &t))) return status;
    if ((status = read_floats(l, t, n_out, false, &bias))) return status;
    part->bias = bias;
  }
  return QTR_OK;
}

struct projection {
  const char *name;
  size_t n_out;
};

/* Reads up to three projections of one layer and makes one matrix of them. */
static enum qtr_status load_linear(struct loader *l, int32_t layer, const struct projection *p, size_t n_parts, size_t n_in,
                                   bool gate_up, struct qtr_linear **linear) {
  struct qtr_linear_source source = {
      .format = l->model->format, .n_in = n_in, .n_parts = n_parts, .gate_up = gate_up, .borrow = true};
  const struct qtr_tensor *weight[QTR_MAX_PARTS];
  enum qtr_status status = QTR_OK;
  for (size_t i = 0; i < n_parts && !status; i++) {
    char prefix[128];
    (void)snprintf(prefix, sizeof prefix, "model.layers.%d.%s", layer, p[i].name);
    status = read_part(l, prefix, source.format, p[i].n_out, n_in, &source.part[i], &weight[i]);
  }
  if (!status) status = l->b->ops->linear_create(l->b, &source, linear, l->err);
  if (!status) {
    l->model->weight_bytes += l->b->ops->linear_bytes(*linear);
    for (size_t i = 0; i < n_parts; i++) qtr_tensor_forget(weight[i]);
  }
  scratch_free(l);
  return status;
}

/* A norm's gain. QoQ checkpoints may leave it out: their rotation has folded it into the matrices (A.2.4). */
static enum qtr_status load_norm(struct loader *l, const char *name, void **device) {
  size_t n = (size_t)l->model->config.hidden_size;
  const struct qtr_tensor *t = qtr_checkpoint_find(l->cp, name);
  bool optional = l->model->format == QTR_LINEAR_W4A8 || l->model->format == QTR_LINEAR_W4A8_G128;
  float *gain = NULL;
  enum qtr_status status = QTR_OK;
  if (!t && optional) {
    gain = malloc(n * sizeof *gain);
    if (!gain) return qtr_fail_memory(l->err, name, n * sizeof *gain);
    l->scratch[l->n_scratch++] = gain;
    for (size_t i = 0; i < n; i++) gain[i] = 1.0f;
  } else {
    status = qtr_checkpoint_get(l->cp, name, 1, &n, &t, l->err);
    if (!status) status = read_floats(l, t, n, false, &gain);
  }
  if (!status) status = l->b->ops->upload_floats(l->b, gain, n, device, l->err);
  scratch_free(l);
  return status;
}

static enum qtr_status load_layer(struct loader *l, int32_t i) {
  const struct qtr_config *c = &l->model->config;
  struct qtr_layer *layer = &l->model->layer[i];
  size_t hidden = (size_t)c->hidden_size, inner = (size_t)c->intermediate_size, d = (size_t)c->head_dim;
  size_t q = (size_t)c->n_heads * d, kv = (size_t)c->n_kv_heads * d;
  char name[96];
  enum qtr_status status;
  (void)snprintf(name, sizeof name, "model.layers.%d.input_layernorm.weight", i);
  if ((status = load_norm(l, name, &layer->input_norm))) return status;
  (void)snprintf(name, sizeof name, "model.layers.%d.post_attention_layernorm.weight", i);
  if ((status = load_norm(l, name, &layer->post_norm))) return status;
  const struct projection qkv[] = {{"self_attn.q_proj", q}, {"self_attn.k_proj", kv}, {"self_attn.v_proj", kv}};
  const struct projection o[] = {{"self_attn.o_proj", hidden}};
  const struct projection gate_up[] = {{"mlp.gate_proj", inner}, {"mlp.up_proj", inner}};
  const struct projection down[] = {{"mlp.down_proj", hidden}};
  if ((status = load_linear(l, i, qkv, 3, hidden, false, &layer->qkv))) return status;
  if ((status = load_linear(l, i, o, 1, q, false, &layer->o))) return status;
  if ((status = load_linear(l, i, gate_up, 2, hidden, true, &layer->gate_up))) return status;
  return load_linear(l, i, down, 1, inner, false, &layer->down);
}

/* The matrix `name`.weight (rows >= vocab_size, hidden) of embedding or head: float, or int8 with name.dequant_scale. */
static enum qtr_status find_vocab_matrix(struct loader *l, const char *name, const struct qtr_tensor **tensor) {
  const struct qtr_config *c = &l->model->config;
  char full[128];
  (void)snprintf(full, sizeof full, "%s.weight", name);
  const struct qtr_tensor *t = qtr_checkpoint_find(l->cp, full);
  const size_t shape[2] = {(size_t)c->vocab_size, (size_t)c->hidden_size};
  if (!t || t->n_dims != 2 || t->shape[0] < shape[0] || t->shape[1] != shape[1]) {
    return qtr_checkpoint_get(l->cp, full, 2, shape, tensor, l->err); /* padded rows are fine, all else is named */
  }
  if (t->dtype != QTR_DTYPE_F32 && t->dtype != QTR_DTYPE_F16 && t->dtype != QTR_DTYPE_BF16 && t->dtype != QTR_DTYPE_I8) {
    return qtr_fail(l->err, QTR_ERR_FORMAT, "tensor %s is %s; expected F32, F16, BF16 or I8", full,
                    qtr_dtype_name(t->dtype));
  }
  *tensor = t;
  return QTR_OK;
}

static enum qtr_status load_embedding(struct loader *l) {
  struct qtr_model *m = l->model;
  const struct qtr_tensor *t;
  enum qtr_status status = find_vocab_matrix(l, "model.embed_tokens", &t);
  if (status) return status;
  struct qtr_table_source source = {
      .dtype = t->dtype, .n_rows = (size_t)m->config.vocab_size, .dim = (size_t)m->config.hidden_size, .data = t->data};
  if (t->dtype == QTR_DTYPE_I8) {
    float *scale;
    status = read_scale(l, "model.embed_tokens", "dequant_scale", t->shape[0], &scale);
    if (status) return status;
    m->embed_scale = scale; /* kept: the table borrows it */
    l->n_scratch--;
    source.scale = scale;
  }
  m->weight_bytes += source.n_rows * source.dim * qtr_dtype_bytes(t->dtype);
  return l->b->ops->table_create(l->b, &source, &m->embed, l->err);
}

static enum qtr_status load_head(struct loader *l) {
  struct qtr_model *m = l->model;
  bool own = qtr_checkpoint_find(l->cp, "lm_head.weight") != NULL;
  if (!own && !m->config.tie_word_embeddings) {
    return qtr_fail(l->err, QTR_ERR_FORMAT,
                    "tensor lm_head.weight is missing and config.json does not tie it to the embedding");
  }
  const char *name = own ? "lm_head" : "model.embed_tokens";
  const struct qtr_tensor *t;
  enum qtr_status status = find_vocab_matrix(l, name, &t);
  if (status) return status;
  struct qtr_linear_source source = {.n_in = (size_t)m->config.hidden_size, .n_parts = 1, .borrow = true};
  source.part[0] = (struct qtr_linear_part){.n_out = (size_t)m->config.vocab_size, .weight = t->data};
  switch (t->dtype) {
    case QTR_DTYPE_F32: source.format = QTR_LINEAR_F32; break;
    case QTR_DTYPE_F16: source.format = QTR_LINEAR_F16; break;
    case QTR_DTYPE_BF16: source.format = QTR_LINEAR_BF16; break;
    default: {
      float *scale;
      source.format = QTR_LINEAR_W8A8;
      status = read_scale(l, name, "dequant_scale", t->shape[0], &scale);
      if (status) return status;
      source.part[0].scale = scale;
    }
  }
  m->head_format = source.format;
  status = l->b->ops->linear_create(l->b, &source, &m->head, l->err);
  if (!status) {
    m->weight_bytes += l->b->ops->linear_bytes(m->head);
    qtr_tensor_forget(t);
  }
  scratch_free(l);
  return status;
}

/* Static KV scales, when every layer has them (A.2.5). */
static enum qtr_status load_kv_scales(const struct loader *l) {
  struct qtr_kv_scales scales;
  enum qtr_status status = qtr_kv_scales_find(l->cp, &l->model->config, &scales, l->err);
  if (!status) l->model->static_kv_scale = scales.scale; /* (n_layers, 2, 1), now the model's */
  return status;
}

enum qtr_status qtr_model_load(const char *dir, struct qtr_backend *backend, const struct qtr_model_options *options,
                               struct qtr_model **model, struct qtr_error *err) {
  *model = NULL;
  struct qtr_config config;
  enum qtr_status status = qtr_config_read(dir, &config, err);
  if (status) return status;
  struct qtr_model *m;
  status = qtr_model_create(&config, backend, options, &m, err);
  if (status) return status;
  struct loader l = {.model = m, .b = backend, .err = err};
  status = qtr_checkpoint_open(dir, &m->checkpoint, err);
  if (status) goto done;
  l.cp = m->checkpoint;
  status = qtr_checkpoint_format(l.cp, &m->format, err);
  if (!status) status = load_embedding(&l);
  struct qtr_progress progress;
  qtr_progress_start(&progress, "loading the model", (size_t)config.n_layers + 1, options->quiet);
  for (int32_t i = 0; i < config.n_layers && !status; i++) {
    status = load_layer(&l, i);
    qtr_progress_update(&progress, (size_t)i + 1);
  }
  if (!status) status = load_norm(&l, "model.norm.weight", &m->final_norm);
  if (!status) status = load_head(&l);
  if (!status) status = load_kv_scales(&l);
  qtr_progress_end(&progress);
  /* The kernel maps pages around each one that is read. What a backend borrowed comes back when it is used. */
  if (!status) qtr_checkpoint_forget(l.cp);
done:
  scratch_free(&l);
  if (status) {
    (void)qtr_error_prefix(err, "%s", dir);
    qtr_model_free(m);
    return status;
  }
  *model = m;
  return QTR_OK;
}
