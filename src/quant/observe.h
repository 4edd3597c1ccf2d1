/* observe.h - what calibration learns about one layer: how large each channel gets, the second moments of the matrices'
 * inputs, and a few inputs as they are. */
#ifndef QTR_QUANT_OBSERVE_H
#define QTR_QUANT_OBSERVE_H

#include "quant/runner.h"

struct qtr_observed {
  struct qtr_threads *team;
  const struct qtr_config *config;
  size_t dim[QTR_N_SITES];
  float *max_in[QTR_N_SITES];  /* (dim) largest magnitude of each input channel */
  float *hessian[QTR_N_SITES]; /* (dim, dim) 2/n_tokens Σ xᵀx, F.8's; lower tiles only until qtr_observed_finish. NULL: not
                                  wanted */
  float *sample[QTR_N_SITES];  /* (n_kept, dim) inputs of evenly spread tokens */
  size_t n_kept, max_kept;     /* the same tokens at every site */
  float *max_q;                /* (n_heads, head_dim) after RoPE */
  float *max_k, *max_v;        /* (n_kv_heads, head_dim) */
  size_t per_sample, n_tokens[QTR_N_SITES], n_seen[QTR_N_SITES];
  bool moments; /* hessians are wanted now */
};

/* max_kept inputs are kept of n_samples calibration samples. */
enum qtr_status qtr_observed_create(struct qtr_threads *team, const struct qtr_config *config, bool hessians,
                                    size_t n_samples, size_t max_kept, struct qtr_observed *observed, struct qtr_error *err);
void qtr_observed_free(struct qtr_observed *observed);
void qtr_observed_clear(struct qtr_observed *observed); /* for the next layer */
void qtr_observed_clear_site(struct qtr_observed *observed, enum qtr_site site);

/* A qtr_runner_see; user: struct qtr_observed. */
void qtr_observed_see(void *user, enum qtr_site site, const float *x, size_t n_tokens, size_t n_in);
void qtr_observed_finish(struct qtr_observed *observed);                           /* after the last sample */
float qtr_observed_finish_site(struct qtr_observed *observed, enum qtr_site site); /* returns 2/n_tokens */

/* What was seen, as if the layer had been transformed before (qtr_layer_smooth_*, _reorder). */
void qtr_observed_smooth_keys(struct qtr_observed *observed, const float *s);
void qtr_observed_scale(struct qtr_observed *observed, enum qtr_site site, const float *s); /* inputs / s */
enum qtr_status qtr_observed_reorder(struct qtr_observed *observed, enum qtr_site site, const size_t *index,
                                     struct qtr_error *err);

#endif
