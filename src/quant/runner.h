/* runner.h - runs one decoder layer in floats over calibration samples, by the engine's own forward pass on the cpu backend,
 * and looks at what goes into its matrices. */
#ifndef QTR_QUANT_RUNNER_H
#define QTR_QUANT_RUNNER_H

#include "model/model.h"
#include "quant/layer.h"

/* Where matrices take their inputs: q, k and v share one, gate and up another. */
enum qtr_site {
  QTR_SITE_QKV,
  QTR_SITE_O,
  QTR_SITE_GATE_UP,
  QTR_SITE_DOWN,
  QTR_N_SITES,
  QTR_SEE_ROPE,  /* no input of a matrix: q|k|v after RoPE */
  QTR_SEE_MIDDLE /* nor this: the residual stream after attention */
};
enum qtr_site qtr_projection_site(enum qtr_projection p);

struct qtr_runner {
  struct qtr_backend *backend;
  struct qtr_model *model; /* one layer */
  struct qtr_kv *kv;
  struct qtr_workspace *workspace;
  size_t length;                   /* tokens of a sample */
  int32_t *position, *page, *zero; /* (length), (pages), (length) zeros */
};

/* kv: what the layer's keys and values are stored as. Close also what failed to open. */
enum qtr_status qtr_runner_open(const struct qtr_config *config, enum qtr_kv_format kv, size_t length, int32_t threads,
                                struct qtr_runner *runner, struct qtr_error *err);
void qtr_runner_close(struct qtr_runner *runner);

/* The layer's matrices and norms, copied. */
enum qtr_status qtr_runner_set(struct qtr_runner *runner, const struct qtr_float_layer *layer, struct qtr_error *err);

/* x: (length, hidden), the residual stream before and after the layer. see: NULL, or called with what goes by, in the order
 * QKV, ROPE, O, MIDDLE, GATE_UP, DOWN: (length, n_in) floats. */
typedef void (*qtr_runner_see)(void *user, enum qtr_site site, const float *x, size_t n_tokens, size_t n_in);
enum qtr_status qtr_runner_run(struct qtr_runner *runner, const struct qtr_float_layer *layer, float *x, qtr_runner_see see,
                               void *user, struct qtr_error *err);

/* Attention alone, by way of the cache. qkv: (length, (n_heads + 2 n_kv_heads) * head_dim), q and k after RoPE; out:
 * (length, n_heads * head_dim). No layer need be set. */
enum qtr_status qtr_runner_attend(struct qtr_runner *runner, const float *qkv, float *out, struct qtr_error *err);

/* What a matrix sees behind a norm: out = x / rms(x) * gain. x, out: (n_tokens, dim) */
void qtr_normalise(const float *x, const float *gain, float eps, size_t n_tokens, size_t dim, float *out);

#endif
