/* layout.c - the walk over the tensors of a model (layout.h; spec A.2, A.6). */
#include "quant/layout.h"

#include <stdio.h>

typedef enum qtr_status (*visitor)(const struct qtr_slot *slot, void *user);

static enum qtr_status visit_layer(const struct qtr_config *c, int32_t i, visitor visit, void *user) {
  const size_t hidden = (size_t)c->hidden_size, inner = (size_t)c->intermediate_size, d = (size_t)c->head_dim;
  const size_t q = (size_t)c->n_heads * d, kv = (size_t)c->n_kv_heads * d;
  const struct {
    enum qtr_slot_part part;
    const char *block, *name;
    size_t n_out, n_in;
  } slots[] = {{QTR_SLOT_NORM, "", "input_layernorm", 1, hidden},
               {QTR_SLOT_PROJECTION, "self_attn.", "q_proj", q, hidden},
               {QTR_SLOT_PROJECTION, "self_attn.", "k_proj", kv, hidden},
               {QTR_SLOT_PROJECTION, "self_attn.", "v_proj", kv, hidden},
               {QTR_SLOT_PROJECTION, "self_attn.", "o_proj", hidden, q},
               {QTR_SLOT_KV_SCALE, "self_attn.", "kv_scale_quant_orig", 1, 2},
               {QTR_SLOT_NORM, "", "post_attention_layernorm", 1, hidden},
               {QTR_SLOT_PROJECTION, "mlp.", "gate_proj", inner, hidden},
               {QTR_SLOT_PROJECTION, "mlp.", "up_proj", inner, hidden},
               {QTR_SLOT_PROJECTION, "mlp.", "down_proj", hidden, inner}};
  enum qtr_status status = QTR_OK;
  for (size_t k = 0; k < sizeof slots / sizeof *slots && !status; k++) {
    struct qtr_slot s = {.part = slots[k].part, .layer = i, .n_out = slots[k].n_out, .n_in = slots[k].n_in};
    s.projection = s.part == QTR_SLOT_PROJECTION ? slots[k].name : NULL;
    (void)snprintf(s.name, sizeof s.name, "model.layers.%d.%s%s", (int)i, slots[k].block, slots[k].name);
    status = visit(&s, user);
  }
  return status;
}

enum qtr_status qtr_layout_walk(const struct qtr_config *c, visitor visit, void *user) {
  const size_t hidden = (size_t)c->hidden_size, vocab = (size_t)c->vocab_size;
  const struct qtr_slot embed = {QTR_SLOT_EMBED, -1, "model.embed_tokens", "embed_tokens", vocab, hidden};
  const struct qtr_slot norm = {QTR_SLOT_NORM, -1, "model.norm", NULL, 1, hidden};
  const struct qtr_slot head = {QTR_SLOT_HEAD, -1, "lm_head", "lm_head", vocab, hidden};
  enum qtr_status status = visit(&embed, user);
  for (int32_t i = 0; i < c->n_layers && !status; i++) status = visit_layer(c, i, visit, user);
  if (!status) status = visit(&norm, user);
  return status ? status : visit(&head, user);
}
