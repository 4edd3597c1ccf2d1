/* layer.h - one decoder layer in floats, and the transformations of QoQ that leave what the model computes as it is (spec
 * F.3 - F.5): folding norms, rotating, smoothing, reordering. Each is exact but for fp32 rounding. */
#ifndef QTR_QUANT_LAYER_H
#define QTR_QUANT_LAYER_H

#include "base/threads.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/config.h"
#include "quant/hadamard.h"

enum qtr_projection { QTR_Q, QTR_K, QTR_V, QTR_O, QTR_GATE, QTR_UP, QTR_DOWN, QTR_N_PROJECTIONS };
extern const char *const qtr_projection_names[QTR_N_PROJECTIONS]; /* "self_attn.q_proj" … "mlp.down_proj" */

/* Channel of the KV heads that channel i of the query heads goes with, when `group` query heads share a KV head. group 1: i.
 */
static inline size_t qtr_kv_channel(size_t i, size_t head_dim, size_t group) {
  return i / head_dim / group * head_dim + i % head_dim;
}

struct qtr_float_matrix {
  float *w;    /* (n_out, n_in) */
  float *bias; /* (n_out), NULL when there is none */
  size_t n_out, n_in;
};

struct qtr_float_layer {
  const struct qtr_config *config;
  int32_t index;
  struct qtr_float_matrix m[QTR_N_PROJECTIONS];
  float *input_norm, *post_norm; /* (hidden) */
};

/* Reads layer `index` of a float checkpoint, shapes checked; values must be finite. Free with qtr_float_layer_free, which
 * takes a layer that was never read, too. */
enum qtr_status qtr_float_layer_read(const struct qtr_checkpoint *checkpoint, const struct qtr_config *config, int32_t index,
                                     struct qtr_float_layer *layer, struct qtr_error *err);
void qtr_float_layer_free(struct qtr_float_layer *layer);
/* With memory of its own. */
enum qtr_status qtr_float_layer_copy(const struct qtr_float_layer *layer, struct qtr_float_layer *copy,
                                     struct qtr_error *err);
/* Rows and columns of the matrices by layer->config; nothing is allocated. */
void qtr_float_layer_shape(struct qtr_float_layer *layer);

/* A vector of the checkpoint, e.g. a norm's gain: *out (n), malloc'ed. */
enum qtr_status qtr_read_vector(const struct qtr_checkpoint *checkpoint, const char *name, size_t n, float **out,
                                struct qtr_error *err);

/* W[n][k] *= g[k], g = 1, for both norms and what follows them (F.3, 1). */
void qtr_layer_fold_norms(struct qtr_float_layer *layer);

/* The residual stream in another basis: q, k, v, gate, up := W Q; o, down := Qᵀ W and Qᵀ b. Norms must be folded (F.3, 2).
 */
enum qtr_status qtr_layer_rotate(struct qtr_threads *team, struct qtr_float_layer *layer,
                                 const struct qtr_rotation *rotation, struct qtr_error *err);
/* Values of each head in another basis: v := Rᵀ v and its bias, o := o R per head (F.3, 3). R has head_dim channels. */
enum qtr_status qtr_layer_rotate_heads(struct qtr_threads *team, struct qtr_float_layer *layer,
                                       const struct qtr_rotation *rotation, struct qtr_error *err);

/* SmoothAttention: k rows / s, q rows * s for the group's query heads, biases too (F.5.2). s: (n_kv_heads, head_dim), equal
 * within each RoPE pair (d, d + head_dim/2). */
void qtr_layer_smooth_keys(struct qtr_float_layer *layer, const float *s);
/* down columns * s, up rows / s (F.5.1). s: (intermediate) */
void qtr_layer_smooth_down(struct qtr_float_layer *layer, const float *s);
/* o columns * s, v rows / s; s: (n_kv_heads, head_dim), shared by the query heads of a group. */
void qtr_layer_smooth_out(struct qtr_float_layer *layer, const float *s);
/* What follows a norm: columns * s, gain / s (SmoothQuant). s: (hidden). `mlp`: gate and up, else q, k, v. */
void qtr_layer_smooth_input(struct qtr_float_layer *layer, bool mlp, const float *s);

/* down columns and gate and up rows in the order index[0 …] (F.4). index: a permutation of (intermediate) */
enum qtr_status qtr_layer_reorder(struct qtr_float_layer *layer, const size_t *index, struct qtr_error *err);

#endif
