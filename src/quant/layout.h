/* layout.h - what a checkpoint of the Llama family holds, in the order in which ours hold it: the tensors of spec A.2 with
 * names and shapes from config.json. Everything that writes a checkpoint walks it, so that all of them agree. */
#ifndef QTR_QUANT_LAYOUT_H
#define QTR_QUANT_LAYOUT_H

#include "checkpoint/config.h"

#include <stddef.h>

#define QTR_SLOT_NAME 128

enum qtr_slot_part {
  QTR_SLOT_EMBED,      /* (vocab_size or more, hidden) */
  QTR_SLOT_NORM,       /* (n_in) */
  QTR_SLOT_PROJECTION, /* (n_out, n_in); its bias (n_out), when there is one, follows it */
  QTR_SLOT_KV_SCALE,   /* vector, optional (A.2.5) */
  QTR_SLOT_HEAD        /* as QTR_SLOT_EMBED; a tied model has none of its own, and the file gets a copy (A.2.4) */
};

struct qtr_slot {
  enum qtr_slot_part part;
  int32_t layer;            /* -1: outside the layers */
  char name[QTR_SLOT_NAME]; /* without ".weight": "model.layers.0.self_attn.q_proj" */
  const char *projection;   /* "q_proj" … "down_proj", "embed_tokens", "lm_head"; NULL for vectors; static */
  size_t n_out, n_in;
};

/* Calls visit for each; the first status that is not QTR_OK ends the walk and is returned. */
enum qtr_status qtr_layout_walk(const struct qtr_config *config,
                                enum qtr_status (*visit)(const struct qtr_slot *slot, void *user), void *user);

#endif
