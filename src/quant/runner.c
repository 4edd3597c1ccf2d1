/* runner.c - one layer over calibration samples (runner.h). */
#include "quant/runner.h"

#include "base/checked.h"
#include "base/status.h"
#include "model/model_internal.h"

#include <math.h>
#include <stdlib.h>

enum qtr_site qtr_projection_site(enum qtr_projection p) {
  return p <= QTR_V ? QTR_SITE_QKV : p == QTR_O ? QTR_SITE_O : p == QTR_DOWN ? QTR_SITE_DOWN : QTR_SITE_GATE_UP;
}

enum qtr_status qtr_runner_open(const struct qtr_config *config, enum qtr_kv_format kv, size_t length, int32_t threads,
                                struct qtr_runner *r, struct qtr_error *err) {
  *r = (struct qtr_runner){.length = length};
  const struct qtr_backend_options options = {.threads = threads};
  const struct qtr_model_options model_options = {.max_len = config->max_position_embeddings, .quiet = true};
  size_t n_pages = qtr_ceil_div(length, QTR_PAGE_TOKENS);
  struct qtr_config one = *config;
  one.n_layers = 1;
  one.vocab_size = 1; /* of buffers that no layer uses */
  enum qtr_status status = qtr_backend_open("cpu", &options, &r->backend, err);
  if (!status) status = qtr_model_create(&one, r->backend, &model_options, &r->model, err);
  if (status) return status;
  r->model->format = QTR_LINEAR_F32;
  const struct qtr_kv_config kv_config = {.format = kv,
                                          .n_layers = 1,
                                          .n_kv_heads = config->n_kv_heads,
                                          .head_dim = config->head_dim,
                                          .n_pages = (int32_t)n_pages};
  status = r->backend->ops->kv_create(r->backend, &kv_config, &r->kv, err);
  if (!status) status = qtr_workspace_create(r->model, length, 1, &r->workspace, err);
  if (status) return status;
  r->position = malloc(length * sizeof *r->position);
  r->zero = calloc(length, sizeof *r->zero);
  r->page = malloc(n_pages * sizeof *r->page);
  if (!r->position || !r->zero || !r->page) return qtr_fail_memory(err, "a calibration batch", length * sizeof(int32_t));
  for (size_t i = 0; i < length; i++) r->position[i] = (int32_t)i;
  for (size_t i = 0; i < n_pages; i++) r->page[i] = (int32_t)i;
  return QTR_OK;
}

static void drop_layer(struct qtr_runner *r) {
  const struct qtr_backend_ops *ops = r->backend->ops;
  struct qtr_layer *l = &r->model->layer[0];
  struct qtr_linear **const linears[] = {&l->qkv, &l->o, &l->gate_up, &l->down};
  void **const norms[] = {&l->input_norm, &l->post_norm};
  for (size_t i = 0; i < 4; i++) {
    if (*linears[i]) ops->linear_free(r->backend, *linears[i]);
    *linears[i] = NULL;
  }
  for (size_t i = 0; i < 2; i++) {
    if (*norms[i]) ops->free(r->backend, *norms[i]);
    *norms[i] = NULL;
  }
}

void qtr_runner_close(struct qtr_runner *r) {
  qtr_workspace_free(r->workspace);
  if (r->kv) r->backend->ops->kv_free(r->backend, r->kv);
  qtr_model_free(r->model);
  if (r->backend) r->backend->ops->close(r->backend);
  free(r->position);
  free(r->zero);
  free(r->page);
  *r = (struct qtr_runner){0};
}

enum qtr_status qtr_runner_set(struct qtr_runner *r, const struct qtr_float_layer *layer, struct qtr_error *err) {
  struct qtr_backend *b = r->backend;
  struct qtr_layer *l = &r->model->layer[0];
  const struct {
    enum qtr_projection first;
    size_t n;
    struct qtr_linear **linear;
  } groups[] = {{QTR_Q, 3, &l->qkv}, {QTR_O, 1, &l->o}, {QTR_GATE, 2, &l->gate_up}, {QTR_DOWN, 1, &l->down}};
  drop_layer(r);
  enum qtr_status status = QTR_OK;
  for (size_t g = 0; g < sizeof groups / sizeof groups[0] && !status; g++) {
    struct qtr_linear_source source = {.format = QTR_LINEAR_F32,
                                       .n_in = layer->m[groups[g].first].n_in,
                                       .n_parts = groups[g].n,
                                       .gate_up = groups[g].first == QTR_GATE};
    for (size_t i = 0; i < groups[g].n; i++) {
      const struct qtr_float_matrix *m = &layer->m[groups[g].first + i];
      source.part[i] = (struct qtr_linear_part){.n_out = m->n_out, .weight = m->w, .bias = m->bias};
    }
    status = b->ops->linear_create(b, &source, groups[g].linear, err);
  }
  size_t hidden = (size_t)layer->config->hidden_size;
  if (!status) status = b->ops->upload_floats(b, layer->input_norm, hidden, &l->input_norm, err);
  if (!status) status = b->ops->upload_floats(b, layer->post_norm, hidden, &l->post_norm, err);
  return status;
}

/* ---- running ------------------------------------------------------------------------------------- */

struct looking {
  const struct qtr_float_layer *layer;
  qtr_runner_see see;
  void *user;
  float *normed; /* (length, hidden) */
};

/* The backend keeps this in a form of its own. */
void qtr_normalise(const float *x, const float *gain, float eps, size_t n_tokens, size_t dim, float *out) {
  for (size_t t = 0; t < n_tokens; t++, x += dim, out += dim) {
    double sum = 0;
    for (size_t i = 0; i < dim; i++) sum += (double)x[i] * (double)x[i];
    float r = (float)(1.0 / sqrt(sum / (double)dim + (double)eps));
    for (size_t i = 0; i < dim; i++) out[i] = x[i] * r * gain[i];
  }
}

static void look(void *user, enum qtr_tap_point point, int32_t index, const float *x, size_t n_tokens, size_t dim) {
  (void)index;
  const struct looking *k = user;
  float eps = k->layer->config->rms_norm_eps;
  switch (point) {
    case QTR_TAP_LAYER_IN:
      qtr_normalise(x, k->layer->input_norm, eps, n_tokens, dim, k->normed);
      k->see(k->user, QTR_SITE_QKV, k->normed, n_tokens, dim);
      break;
    case QTR_TAP_QKV: k->see(k->user, QTR_SEE_ROPE, x, n_tokens, dim); break;
    case QTR_TAP_ATTENTION: k->see(k->user, QTR_SITE_O, x, n_tokens, dim); break;
    case QTR_TAP_MLP_IN:
      k->see(k->user, QTR_SEE_MIDDLE, x, n_tokens, dim);
      qtr_normalise(x, k->layer->post_norm, eps, n_tokens, dim, k->normed);
      k->see(k->user, QTR_SITE_GATE_UP, k->normed, n_tokens, dim);
      break;
    case QTR_TAP_MLP: k->see(k->user, QTR_SITE_DOWN, x, n_tokens, dim); break;
    case QTR_TAP_LAYER_OUT: break;
  }
}

/* A batch of one whole sample, and what it points to. */
struct one_sample {
  struct qtr_batch batch;
  int32_t q_start[2], kv_len[1];
};

static void batch_of(const struct qtr_runner *r, const int32_t *position, struct one_sample *one) {
  one->q_start[0] = one->kv_len[0] = 0;
  one->q_start[1] = (int32_t)r->length;
  one->batch = (struct qtr_batch){.n_tokens = (int32_t)r->length,
                                  .n_seqs = 1,
                                  .max_blocks = (int32_t)qtr_ceil_div(r->length, QTR_PAGE_TOKENS),
                                  .token = r->zero,
                                  .position = position,
                                  .q_start = one->q_start,
                                  .kv_len = one->kv_len,
                                  .block_table = r->page};
}

enum qtr_status qtr_runner_run(struct qtr_runner *r, const struct qtr_float_layer *layer, float *x, qtr_runner_see see,
                               void *user, struct qtr_error *err) {
  size_t n = r->length;
  struct one_sample one;
  batch_of(r, r->position, &one);
  struct looking looking = {.layer = layer, .see = see, .user = user};
  const struct qtr_tap tap = {.see = look, .user = &looking};
  if (see) {
    looking.normed = malloc(n * (size_t)layer->config->hidden_size * sizeof(float));
    if (!looking.normed) return qtr_fail_memory(err, "a layer's input", n * sizeof(float));
    r->model->tap = &tap;
  }
  enum qtr_status status = qtr_model_run_layers(r->model, r->kv, r->workspace, &one.batch, 0, 1, x, err);
  r->model->tap = NULL;
  free(looking.normed);
  return status;
}

enum qtr_status qtr_runner_attend(struct qtr_runner *r, const float *qkv, float *out, struct qtr_error *err) {
  struct one_sample one;
  batch_of(r, r->zero, &one); /* they are rotated already: at position 0 RoPE does nothing */
  return qtr_model_attend(r->model, r->kv, r->workspace, &one.batch, 0, qkv, out, err);
}
