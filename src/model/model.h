/* model.h - a loaded model: description, weights on a backend, and the one forward pass. */
#ifndef QTR_MODEL_MODEL_H
#define QTR_MODEL_MODEL_H

#include "backend/backend.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/config.h"
#include "model/profile.h"

/* "w4a8kv4" and friends. */
struct qtr_precision {
  int32_t weight_bits, act_bits, kv_bits; /* 4/8/16, 8/16, 4/8/16; kv_bits 0 = not said */
};
/* Accepts w{4,8,16}a{8,16}[kv{4,8,16}]; "w16a16" means KV16, "w4a8" and "w8a8" KV8 (spec D.7). */
enum qtr_status qtr_precision_parse(const char *text, struct qtr_precision *precision, struct qtr_error *err);

struct qtr_layer {
  struct qtr_linear *qkv, *o, *gate_up, *down;
  void *input_norm, *post_norm; /* device (hidden_size) floats */
};

struct qtr_model {
  struct qtr_config config;
  struct qtr_backend *backend;       /* borrowed */
  struct qtr_checkpoint *checkpoint; /* owned; the maps that backends borrow from; NULL for random weights */
  enum qtr_linear_format format;     /* of the projections */
  enum qtr_linear_format head_format;
  struct qtr_layer *layer; /* (config.n_layers) */
  struct qtr_table *embed;
  struct qtr_linear *head;
  void *final_norm;
  float *static_kv_scale; /* (n_layers, 2) when the file has them, else NULL (A.2.5) */
  float *embed_scale;     /* (vocab) of an int8 embedding */
  void *random_embed;     /* the embedding of random weights, which the table borrows */
  float *inv_freq;        /* (head_dim/2), for max_len */
  int32_t max_len;        /* longest sequence the frequencies are made for */
  enum qtr_norm norm;
  size_t weight_bytes;         /* embedding, head and projections */
  struct qtr_profile *profile; /* borrowed; NULL = no profile */
  const struct qtr_tap *tap;   /* borrowed; NULL = nobody looks */
};

/* What a tap sees of each layer, in this order. */
enum qtr_tap_point {
  QTR_TAP_LAYER_IN, /* (n_tokens, hidden) the residual stream */
  QTR_TAP_QKV,      /* (n_tokens, (n_heads + 2 n_kv_heads) * head_dim) q and k after RoPE, before the cache rounds k and v */
  QTR_TAP_ATTENTION, /* (n_tokens, n_heads * head_dim) the input of o_proj */
  QTR_TAP_MLP_IN,    /* (n_tokens, hidden) the residual stream after attention */
  QTR_TAP_MLP,       /* (n_tokens, intermediate) the input of down_proj */
  QTR_TAP_LAYER_OUT  /* (n_tokens, hidden) */
};
/* Looks at intermediate values, for calibration and comparison. Only on backends whose activations are floats in host memory
 * (reference, cpu). x: (n_tokens, dim), valid during the call. */
struct qtr_tap {
  void (*see)(void *user, enum qtr_tap_point point, int32_t layer, const float *x, size_t n_tokens, size_t dim);
  void *user;
};

struct qtr_model_options {
  int32_t max_len; /* 0 = config.max_position_embeddings */
  enum qtr_norm norm;
  bool quiet; /* no progress line */
};

enum qtr_status qtr_model_load(const char *dir, struct qtr_backend *backend, const struct qtr_model_options *options,
                               struct qtr_model **model, struct qtr_error *err);
/* Random weights of the given shape, scaled so that activations stay healthy, for benchmarks. head_int8: int8 embedding and
 * LM head instead of fp16. */
enum qtr_status qtr_model_random(const struct qtr_config *config, enum qtr_linear_format format, bool head_int8,
                                 uint64_t seed, struct qtr_backend *backend, const struct qtr_model_options *options,
                                 struct qtr_model **model, struct qtr_error *err);
void qtr_model_free(struct qtr_model *model);

/* Buffers of one step of at most max_tokens tokens and max_rows logit rows. */
struct qtr_workspace;
enum qtr_status qtr_workspace_create(const struct qtr_model *model, size_t max_tokens, size_t max_rows,
                                     struct qtr_workspace **workspace, struct qtr_error *err);
void qtr_workspace_free(struct qtr_workspace *workspace);
size_t qtr_workspace_bytes(const struct qtr_workspace *workspace);

/* From now on every forward pass with this workspace keeps the residual stream of the rows whose logits are wanted, for
 * comparing models; unlike a tap on every backend, and without stopping the step. State 0 is the embedding, state i what
 * layer i - 1 leaves, n_layers + 1 in all: device (n_logit_rows, hidden_size) in the activation type, valid until the next
 * call. */
enum qtr_status qtr_workspace_keep_states(const struct qtr_model *model, struct qtr_workspace *workspace,
                                          struct qtr_error *err);
const void *qtr_workspace_state(const struct qtr_workspace *workspace, size_t i);

/* Runs one batch: writes its K and V to `kv`; *logits (n_logit_rows, vocab_size) F32 in device memory of the workspace,
 * valid until the next call. Refuses a batch larger than the workspace with QTR_ERR_ARGUMENT. */
enum qtr_status qtr_model_forward(struct qtr_model *model, struct qtr_kv *kv, struct qtr_workspace *workspace,
                                  const struct qtr_batch *batch, const float **logits, struct qtr_error *err);
/* The same in two, for devices that work on their own (ops.launch; elsewhere all is done when the launch returns): collect
 * waits for the oldest step launched. The logits of a step are there from its end until the next launch. */
enum qtr_status qtr_model_launch(struct qtr_model *model, struct qtr_kv *kv, struct qtr_workspace *workspace,
                                 const struct qtr_batch *batch, struct qtr_error *err);
enum qtr_status qtr_model_collect(struct qtr_model *model, struct qtr_workspace *workspace, struct qtr_error *err);
const float *qtr_workspace_logits(const struct qtr_workspace *workspace);

/* Runs layers [first, first + n) alone. x: host (batch.n_tokens, hidden), the residual stream before and after; batch.token
 * and logit_row are not looked at. For calibration, on the backends that taps work on: QTR_ERR_UNSUPPORTED on others. */
enum qtr_status qtr_model_run_layers(struct qtr_model *model, struct qtr_kv *kv, struct qtr_workspace *workspace,
                                     const struct qtr_batch *batch, int32_t first, int32_t n, float *x,
                                     struct qtr_error *err);

/* RoPE by batch.position, the cache and attention of one layer alone. qkv: host (batch.n_tokens, (n_heads + 2 n_kv_heads) *
 * head_dim); out: host (batch.n_tokens, n_heads * head_dim), the input of o_proj. On the same backends. */
enum qtr_status qtr_model_attend(struct qtr_model *model, struct qtr_kv *kv, struct qtr_workspace *workspace,
                                 const struct qtr_batch *batch, int32_t layer, const float *qkv, float *out,
                                 struct qtr_error *err);

#endif
