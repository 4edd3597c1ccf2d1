/* layer.c - a decoder layer in floats and its exact transformations (layer.h). */
#include "quant/layer.h"

#include "base/status.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *const qtr_projection_names[QTR_N_PROJECTIONS] = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                                                             "self_attn.o_proj", "mlp.gate_proj",    "mlp.up_proj",
                                                             "mlp.down_proj"};

/* ---- reading ------------------------------------------------------------------------------------- */

/* Any float tensor of the checkpoint as (n) floats. */
static enum qtr_status read_floats(const struct qtr_tensor *t, size_t n, float **out, struct qtr_error *err) {
  float *x = malloc(n * sizeof *x);
  *out = x;
  if (!x) return qtr_fail_memory(err, t->name, n * sizeof *x);
  enum qtr_status status = qtr_tensor_to_floats(t, x, n, err);
  if (status) return status;
  for (size_t i = 0; i < n; i++) {
    if (!isfinite(x[i]))
      return qtr_fail(err, QTR_ERR_FORMAT, "tensor %s has a value that is not finite at element %zu", t->name, i);
  }
  qtr_tensor_forget(t);
  return QTR_OK;
}

enum qtr_status qtr_read_vector(const struct qtr_checkpoint *checkpoint, const char *name, size_t n, float **out,
                                struct qtr_error *err) {
  const struct qtr_tensor *t;
  *out = NULL;
  enum qtr_status status = qtr_checkpoint_get(checkpoint, name, 1, &n, &t, err);
  return status ? status : read_floats(t, n, out, err);
}

void qtr_float_layer_shape(struct qtr_float_layer *layer) {
  const struct qtr_config *c = layer->config;
  size_t hidden = (size_t)c->hidden_size, inner = (size_t)c->intermediate_size, d = (size_t)c->head_dim;
  size_t q = (size_t)c->n_heads * d, kv = (size_t)c->n_kv_heads * d;
  const size_t shape[QTR_N_PROJECTIONS][2] = {{q, hidden},     {kv, hidden},    {kv, hidden},   {hidden, q},
                                              {inner, hidden}, {inner, hidden}, {hidden, inner}};
  for (enum qtr_projection p = QTR_Q; p < QTR_N_PROJECTIONS; p++) {
    layer->m[p].n_out = shape[p][0];
    layer->m[p].n_in = shape[p][1];
  }
}

static enum qtr_status read_matrix(const struct qtr_checkpoint *checkpoint, int32_t layer, enum qtr_projection p,
                                   struct qtr_float_matrix *m, struct qtr_error *err) {
  char name[128];
  const struct qtr_tensor *t;
  const size_t shape[2] = {m->n_out, m->n_in};
  (void)snprintf(name, sizeof name, "model.layers.%d.%s.weight", (int)layer, qtr_projection_names[p]);
  enum qtr_status status = qtr_checkpoint_get(checkpoint, name, 2, shape, &t, err);
  if (!status) status = read_floats(t, m->n_out * m->n_in, &m->w, err);
  (void)snprintf(name, sizeof name, "model.layers.%d.%s.bias", (int)layer, qtr_projection_names[p]);
  if (!status && qtr_checkpoint_find(checkpoint, name)) status = qtr_read_vector(checkpoint, name, m->n_out, &m->bias, err);
  return status;
}

enum qtr_status qtr_float_layer_read(const struct qtr_checkpoint *checkpoint, const struct qtr_config *config, int32_t index,
                                     struct qtr_float_layer *layer, struct qtr_error *err) {
  char name[128];
  size_t hidden = (size_t)config->hidden_size;
  enum qtr_status status = QTR_OK;
  *layer = (struct qtr_float_layer){.config = config, .index = index};
  qtr_float_layer_shape(layer);
  for (enum qtr_projection p = QTR_Q; p < QTR_N_PROJECTIONS && !status; p++) {
    status = read_matrix(checkpoint, index, p, &layer->m[p], err);
  }
  (void)snprintf(name, sizeof name, "model.layers.%d.input_layernorm.weight", (int)index);
  if (!status) status = qtr_read_vector(checkpoint, name, hidden, &layer->input_norm, err);
  (void)snprintf(name, sizeof name, "model.layers.%d.post_attention_layernorm.weight", (int)index);
  if (!status) status = qtr_read_vector(checkpoint, name, hidden, &layer->post_norm, err);
  if (status) qtr_float_layer_free(layer);
  return status;
}

void qtr_float_layer_free(struct qtr_float_layer *layer) {
  for (enum qtr_projection p = QTR_Q; p < QTR_N_PROJECTIONS; p++) {
    free(layer->m[p].w);
    free(layer->m[p].bias);
  }
  free(layer->input_norm);
  free(layer->post_norm);
  *layer = (struct qtr_float_layer){0};
}

enum qtr_status qtr_float_layer_copy(const struct qtr_float_layer *layer, struct qtr_float_layer *copy,
                                     struct qtr_error *err) {
  size_t hidden = (size_t)layer->config->hidden_size;
  *copy = (struct qtr_float_layer){.config = layer->config, .index = layer->index};
  qtr_float_layer_shape(copy);
  bool ok = (copy->input_norm = malloc(hidden * sizeof(float))) && (copy->post_norm = malloc(hidden * sizeof(float)));
  for (enum qtr_projection p = QTR_Q; p < QTR_N_PROJECTIONS && ok; p++) {
    const struct qtr_float_matrix *m = &layer->m[p];
    ok = (copy->m[p].w = malloc(m->n_out * m->n_in * sizeof(float))) &&
         (!m->bias || (copy->m[p].bias = malloc(m->n_out * sizeof(float))));
    if (ok) memcpy(copy->m[p].w, m->w, m->n_out * m->n_in * sizeof(float));
    if (ok && m->bias) memcpy(copy->m[p].bias, m->bias, m->n_out * sizeof(float));
  }
  if (ok) memcpy(copy->input_norm, layer->input_norm, hidden * sizeof(float));
  if (ok) memcpy(copy->post_norm, layer->post_norm, hidden * sizeof(float));
  if (ok) return QTR_OK;
  qtr_float_layer_free(copy);
  return qtr_fail_memory(err, "a copy of a layer", hidden * hidden * sizeof(float));
}

/* ---- rows and columns ---------------------------------------------------------------------------- */

static void scale_columns(struct qtr_float_matrix *m, const float *s) {
  for (size_t r = 0; r < m->n_out; r++) {
    for (size_t i = 0; i < m->n_in; i++) m->w[r * m->n_in + i] *= s[i];
  }
}

static void scale_row(struct qtr_float_matrix *m, size_t r, float s) {
  for (size_t i = 0; i < m->n_in; i++) m->w[r * m->n_in + i] *= s;
  if (m->bias) m->bias[r] *= s;
}

void qtr_layer_fold_norms(struct qtr_float_layer *layer) {
  for (enum qtr_projection p = QTR_Q; p <= QTR_V; p++) scale_columns(&layer->m[p], layer->input_norm);
  for (enum qtr_projection p = QTR_GATE; p <= QTR_UP; p++) scale_columns(&layer->m[p], layer->post_norm);
  for (int32_t i = 0; i < layer->config->hidden_size; i++) layer->input_norm[i] = layer->post_norm[i] = 1;
}

/* ---- rotation ------------------------------------------------------------------------------------ */

enum qtr_status qtr_layer_rotate(struct qtr_threads *team, struct qtr_float_layer *layer,
                                 const struct qtr_rotation *rotation, struct qtr_error *err) {
  enum qtr_status status = QTR_OK;
  for (enum qtr_projection p = QTR_Q; p < QTR_N_PROJECTIONS && !status; p++) {
    struct qtr_float_matrix *m = &layer->m[p];
    if (p == QTR_O || p == QTR_DOWN) {
      status = qtr_rotate_columns(team, rotation, m->w, m->n_out, m->n_in, err);
      if (!status && m->bias) status = qtr_rotate_columns(team, rotation, m->bias, m->n_out, 1, err);
    } else {
      status = qtr_rotate_rows(team, rotation, m->w, m->n_out, m->n_in, err);
    }
  }
  return status;
}

enum qtr_status qtr_layer_rotate_heads(struct qtr_threads *team, struct qtr_float_layer *layer,
                                       const struct qtr_rotation *rotation, struct qtr_error *err) {
  struct qtr_float_matrix *v = &layer->m[QTR_V], *o = &layer->m[QTR_O];
  enum qtr_status status = qtr_rotate_columns(team, rotation, v->w, v->n_out, v->n_in, err);
  if (!status && v->bias) status = qtr_rotate_columns(team, rotation, v->bias, v->n_out, 1, err);
  if (!status) status = qtr_rotate_rows(team, rotation, o->w, o->n_out, o->n_in, err);
  return status;
}

/* ---- smoothing ----------------------------------------------------------------------------------- */

void qtr_layer_smooth_keys(struct qtr_float_layer *layer, const float *s) {
  size_t d = (size_t)layer->config->head_dim, group = (size_t)(layer->config->n_heads / layer->config->n_kv_heads);
  for (size_t r = 0; r < layer->m[QTR_K].n_out; r++) scale_row(&layer->m[QTR_K], r, 1 / s[r]);
  for (size_t r = 0; r < layer->m[QTR_Q].n_out; r++) scale_row(&layer->m[QTR_Q], r, s[qtr_kv_channel(r, d, group)]);
}

void qtr_layer_smooth_down(struct qtr_float_layer *layer, const float *s) {
  scale_columns(&layer->m[QTR_DOWN], s);
  for (size_t r = 0; r < layer->m[QTR_UP].n_out; r++) scale_row(&layer->m[QTR_UP], r, 1 / s[r]);
}

void qtr_layer_smooth_out(struct qtr_float_layer *layer, const float *s) {
  struct qtr_float_matrix *o = &layer->m[QTR_O];
  size_t d = (size_t)layer->config->head_dim, group = (size_t)(layer->config->n_heads / layer->config->n_kv_heads);
  for (size_t r = 0; r < layer->m[QTR_V].n_out; r++) scale_row(&layer->m[QTR_V], r, 1 / s[r]);
  for (size_t r = 0; r < o->n_out; r++) {
    for (size_t i = 0; i < o->n_in; i++) o->w[r * o->n_in + i] *= s[qtr_kv_channel(i, d, group)];
  }
}

void qtr_layer_smooth_input(struct qtr_float_layer *layer, bool mlp, const float *s) {
  float *gain = mlp ? layer->post_norm : layer->input_norm;
  for (enum qtr_projection p = mlp ? QTR_GATE : QTR_Q; p <= (mlp ? QTR_UP : QTR_V); p++) scale_columns(&layer->m[p], s);
  for (int32_t i = 0; i < layer->config->hidden_size; i++) gain[i] /= s[i];
}

/* ---- reordering ---------------------------------------------------------------------------------- */

enum qtr_status qtr_layer_reorder(struct qtr_float_layer *layer, const size_t *index, struct qtr_error *err) {
  size_t inner = (size_t)layer->config->intermediate_size, hidden = (size_t)layer->config->hidden_size;
  float *copy = malloc(inner * hidden * sizeof *copy);
  if (!copy) return qtr_fail_memory(err, "a reordered matrix", inner * hidden * sizeof *copy);
  for (enum qtr_projection p = QTR_GATE; p <= QTR_DOWN; p++) {
    struct qtr_float_matrix *m = &layer->m[p];
    memcpy(copy, m->w, inner * hidden * sizeof *copy);
    for (size_t i = 0; i < inner; i++) {
      if (p == QTR_DOWN) {
        for (size_t r = 0; r < hidden; r++) m->w[r * inner + i] = copy[r * inner + index[i]];
      } else {
        memcpy(m->w + i * hidden, copy + index[i] * hidden, hidden * sizeof *copy);
      }
    }
    if (!m->bias || p == QTR_DOWN) continue;
    memcpy(copy, m->bias, inner * sizeof *copy);
    for (size_t i = 0; i < inner; i++) m->bias[i] = copy[index[i]];
  }
  free(copy);
  return QTR_OK;
}
