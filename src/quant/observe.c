/* observe.c - statistics of one layer (observe.h). */
#include "quant/observe.h"

#include "base/checked.h"
#include "base/status.h"
#include "quant/matrix.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static size_t kv_width(const struct qtr_config *c) { return (size_t)c->n_kv_heads * (size_t)c->head_dim; }
static size_t q_width(const struct qtr_config *c) { return (size_t)c->n_heads * (size_t)c->head_dim; }

enum qtr_status qtr_observed_create(struct qtr_threads *team, const struct qtr_config *c, bool hessians, size_t n_samples,
                                    size_t max_kept, struct qtr_observed *o, struct qtr_error *err) {
  size_t hidden = (size_t)c->hidden_size;
  *o = (struct qtr_observed){.team = team,
                             .config = c,
                             .dim = {hidden, q_width(c), hidden, (size_t)c->intermediate_size},
                             .per_sample = QTR_MAX(max_kept / QTR_MAX(n_samples, 1), 1),
                             .max_kept = max_kept,
                             .moments = true};
  bool ok = (o->max_q = malloc(q_width(c) * sizeof(float))) && (o->max_k = malloc(kv_width(c) * sizeof(float))) &&
            (o->max_v = malloc(kv_width(c) * sizeof(float)));
  size_t needed = 0;
  for (enum qtr_site s = QTR_SITE_QKV; s < QTR_N_SITES && ok; s++) {
    size_t n = o->dim[s];
    needed += n * (n + max_kept) * sizeof(float);
    ok = (o->max_in[s] = malloc(n * sizeof(float))) && (o->sample[s] = malloc(max_kept * n * sizeof(float))) &&
         (!hessians || (o->hessian[s] = malloc(n * n * sizeof(float))));
  }
  if (!ok) {
    qtr_observed_free(o);
    return qtr_fail_memory(err, "the inputs' covariances", needed);
  }
  qtr_observed_clear(o);
  return QTR_OK;
}

void qtr_observed_free(struct qtr_observed *o) {
  for (enum qtr_site s = QTR_SITE_QKV; s < QTR_N_SITES; s++) {
    free(o->max_in[s]);
    free(o->hessian[s]);
    free(o->sample[s]);
  }
  free(o->max_q);
  free(o->max_k);
  free(o->max_v);
  *o = (struct qtr_observed){0};
}

void qtr_observed_clear_site(struct qtr_observed *o, enum qtr_site s) {
  memset(o->max_in[s], 0, o->dim[s] * sizeof(float));
  if (o->hessian[s]) memset(o->hessian[s], 0, o->dim[s] * o->dim[s] * sizeof(float));
  o->n_seen[s] = o->n_tokens[s] = 0;
}

void qtr_observed_clear(struct qtr_observed *o) {
  for (enum qtr_site s = QTR_SITE_QKV; s < QTR_N_SITES; s++) qtr_observed_clear_site(o, s);
  memset(o->max_q, 0, q_width(o->config) * sizeof(float));
  memset(o->max_k, 0, kv_width(o->config) * sizeof(float));
  memset(o->max_v, 0, kv_width(o->config) * sizeof(float));
  o->n_kept = 0;
}

/* max[i] = max(max[i], |x[t][i]|). A NaN stays: smoothing then falls back to 1 and GPTQ says what is wrong. */
static void raise_max(float *max, const float *x, size_t n_tokens, size_t stride, size_t n) {
  for (size_t t = 0; t < n_tokens; t++, x += stride) {
    for (size_t i = 0; i < n; i++) {
      float a = fabsf(x[i]);
      max[i] = a <= max[i] ? max[i] : a;
    }
  }
}

void qtr_observed_see(void *user, enum qtr_site site, const float *x, size_t n_tokens, size_t n_in) {
  struct qtr_observed *o = user;
  if (site == QTR_SEE_MIDDLE) return;
  if (site == QTR_SEE_ROPE) {
    size_t q = q_width(o->config), kv = kv_width(o->config);
    raise_max(o->max_q, x, n_tokens, n_in, q);
    raise_max(o->max_k, x + q, n_tokens, n_in, kv);
    raise_max(o->max_v, x + q + kv, n_tokens, n_in, kv);
    return;
  }
  raise_max(o->max_in[site], x, n_tokens, n_in, n_in);
  if (o->hessian[site] && o->moments) qtr_matrix_add_gram(o->team, x, x, n_tokens, n_in, n_in, o->hessian[site]);
  for (size_t i = 0; i < o->per_sample && o->n_seen[site] < o->max_kept; i++) { /* another place in every sample */
    size_t t = (i * n_tokens / o->per_sample + o->n_seen[site] * 97) % n_tokens;
    memcpy(o->sample[site] + o->n_seen[site]++ * n_in, x + t * n_in, n_in * sizeof *x);
  }
  o->n_tokens[site] += n_tokens;
}

float qtr_observed_finish_site(struct qtr_observed *o, enum qtr_site s) {
  float scale = 2.0f / (float)QTR_MAX(o->n_tokens[s], 1);
  o->n_kept = o->n_seen[s];
  if (!o->hessian[s] || !o->moments) return scale;
  for (size_t i = 0; i < o->dim[s] * o->dim[s]; i++) o->hessian[s][i] *= scale;
  qtr_matrix_mirror(o->team, o->hessian[s], o->dim[s]);
  return scale;
}

void qtr_observed_finish(struct qtr_observed *o) {
  for (enum qtr_site s = QTR_SITE_QKV; s < QTR_N_SITES; s++) (void)qtr_observed_finish_site(o, s);
}

void qtr_observed_smooth_keys(struct qtr_observed *o, const float *s) {
  size_t d = (size_t)o->config->head_dim, group = (size_t)(o->config->n_heads / o->config->n_kv_heads);
  for (size_t i = 0; i < kv_width(o->config); i++) o->max_k[i] /= s[i];
  for (size_t i = 0; i < q_width(o->config); i++) o->max_q[i] *= s[qtr_kv_channel(i, d, group)];
}

/* Rows of a covariance, divided or put in another order. */
struct rearranging {
  float *h;          /* (n, n) */
  const float *from; /* (n, n) reordering: what it was */
  size_t n;
  const float *s;      /* (n) divisors */
  const size_t *index; /* (n) new row i is old row index[i] */
};

static void scale_rows(void *arg, size_t begin, size_t end, int thread) {
  (void)thread;
  const struct rearranging *r = arg;
  for (size_t i = begin; i < end; i++) {
    for (size_t k = 0; k < r->n; k++) r->h[i * r->n + k] /= r->s[i] * r->s[k];
  }
}

static void reorder_rows(void *arg, size_t begin, size_t end, int thread) {
  (void)thread;
  const struct rearranging *r = arg;
  for (size_t i = begin; i < end; i++) {
    for (size_t k = 0; k < r->n; k++) r->h[i * r->n + k] = r->from[r->index[i] * r->n + r->index[k]];
  }
}

void qtr_observed_scale(struct qtr_observed *o, enum qtr_site site, const float *s) {
  size_t n = o->dim[site];
  struct rearranging r = {.h = o->hessian[site], .n = n, .s = s};
  if (r.h) qtr_threads_for(o->team, n, 16, scale_rows, &r);
  for (size_t i = 0; i < n; i++) o->max_in[site][i] /= s[i];
  for (size_t t = 0; t < o->n_kept; t++) {
    for (size_t i = 0; i < n; i++) o->sample[site][t * n + i] /= s[i];
  }
}

enum qtr_status qtr_observed_reorder(struct qtr_observed *o, enum qtr_site site, const size_t *index,
                                     struct qtr_error *err) {
  size_t n = o->dim[site], rows = QTR_MAX(n, o->max_kept);
  float *copy = malloc(rows * n * sizeof *copy);
  if (!copy) return qtr_fail_memory(err, "a reordered covariance", rows * n * sizeof *copy);
  memcpy(copy, o->max_in[site], n * sizeof *copy);
  for (size_t i = 0; i < n; i++) o->max_in[site][i] = copy[index[i]];
  if (o->hessian[site]) {
    memcpy(copy, o->hessian[site], n * n * sizeof *copy);
    struct rearranging r = {.h = o->hessian[site], .from = copy, .n = n, .index = index};
    qtr_threads_for(o->team, n, 16, reorder_rows, &r);
  }
  memcpy(copy, o->sample[site], o->n_kept * n * sizeof *copy);
  for (size_t t = 0; t < o->n_kept; t++) {
    for (size_t i = 0; i < n; i++) o->sample[site][t * n + i] = copy[t * n + index[i]];
  }
  free(copy);
  return QTR_OK;
}
