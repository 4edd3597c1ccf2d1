/* model.c - the life of a model (model.h); load.c and random.c fill it, forward.c runs it. */
#include "base/status.h"
#include "model/model_internal.h"

#include <stdlib.h>

enum qtr_status qtr_model_create(const struct qtr_config *config, struct qtr_backend *backend,
                                 const struct qtr_model_options *options, struct qtr_model **model, struct qtr_error *err) {
  *model = NULL;
  struct qtr_model *m = calloc(1, sizeof *m);
  if (!m) return qtr_fail_memory(err, "a model", sizeof *m);
  m->config = *config;
  m->backend = backend;
  m->norm = options->norm;
  m->max_len = options->max_len > 0 ? options->max_len : config->max_position_embeddings;
  m->layer = calloc((size_t)config->n_layers, sizeof *m->layer);
  m->inv_freq = malloc((size_t)config->head_dim / 2 * sizeof *m->inv_freq);
  if (!m->layer || !m->inv_freq) {
    qtr_model_free(m);
    return qtr_fail_memory(err, "the layers", (size_t)config->n_layers * sizeof *m->layer);
  }
  qtr_config_inv_freq(config, m->max_len, m->inv_freq);
  *model = m;
  return QTR_OK;
}

void qtr_model_free(struct qtr_model *m) {
  if (!m) return;
  const struct qtr_backend_ops *ops = m->backend->ops;
  for (int32_t i = 0; m->layer && i < m->config.n_layers; i++) {
    struct qtr_layer *layer = &m->layer[i];
    struct qtr_linear *const linears[] = {layer->qkv, layer->o, layer->gate_up, layer->down};
    for (size_t k = 0; k < sizeof linears / sizeof linears[0]; k++) {
      if (linears[k]) ops->linear_free(m->backend, linears[k]);
    }
    if (layer->input_norm) ops->free(m->backend, layer->input_norm);
    if (layer->post_norm) ops->free(m->backend, layer->post_norm);
  }
  if (m->embed) ops->table_free(m->backend, m->embed);
  if (m->head) ops->linear_free(m->backend, m->head);
  if (m->final_norm) ops->free(m->backend, m->final_norm);
  qtr_checkpoint_close(m->checkpoint);
  free(m->random_embed);
  free(m->layer);
  free(m->static_kv_scale);
  free(m->embed_scale);
  free(m->inv_freq);
  free(m);
}
