/* smooth.c - smoothing factors and their grids (smooth.h). */
#include "quant/smooth.h"

#include "base/checked.h"
#include "base/half.h"
#include "base/status.h"
#include "quant/gptq.h"
#include "quant/matrix.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void qtr_smooth_factors(const float *a, const float *b, float alpha, float beta, size_t n, float *s) {
  bool good = true;
  for (size_t i = 0; i < n; i++) {
    s[i] = 1;
    if (alpha != 0) s[i] *= powf(a[i], alpha);
    if (beta != 0) s[i] /= powf(b[i], beta);
    if (s[i] == 0) s[i] = 1;
    good &= isfinite(s[i]) != 0;
  }
  for (size_t i = 0; i < n && !good; i++) s[i] = 1;
}

void qtr_smooth_tie_pairs(float *x, size_t n_heads, size_t head_dim) {
  for (size_t h = 0; h < n_heads; h++, x += head_dim) {
    for (size_t i = 0; i < head_dim / 2; i++) x[i] = x[i + head_dim / 2] = QTR_MAX(x[i], x[i + head_dim / 2]);
  }
}

/* Point i of a grid of n: (0, 0), then (k/n, 0) and (k/n, 1 - k/n) for k = 1 … n-1. False when there are no more. */
static bool grid_point(int32_t n, int32_t i, float *alpha, float *beta) {
  int32_t k = (i + 1) / 2;
  if (k >= QTR_MAX(n, 1)) return false;
  *alpha = (float)k / (float)n;
  *beta = k > 0 && i % 2 == 0 ? 1 - *alpha : 0;
  return true;
}

/* Manual options are a grid of one point. */
static bool option_point(const struct qtr_smooth_options *o, int32_t n, int32_t i, float *alpha, float *beta) {
  if (o->mode == QTR_SMOOTH_GRID) return grid_point(n, i, alpha, beta);
  *alpha = o->alpha;
  *beta = o->beta;
  return i == 0;
}

/* ---- keys ---------------------------------------------------------------------------------------- */

/* The outputs of attention, remembered or compared with what is remembered. */
struct attention {
  float *out; /* (n_samples, length, heads) */
  size_t at;
  bool compare;
  double error;
};

static void see_attention(void *user, enum qtr_site site, const float *x, size_t n_tokens, size_t n_in) {
  struct attention *a = user;
  if (site != QTR_SITE_O) return;
  float *out = a->out + a->at;
  size_t n = n_tokens * n_in;
  for (size_t i = 0; i < n && a->compare; i++) a->error += ((double)x[i] - (double)out[i]) * ((double)x[i] - (double)out[i]);
  if (!a->compare) memcpy(out, x, n * sizeof *x);
  a->at += n;
}

static enum qtr_status run_samples(struct qtr_runner *runner, const struct qtr_float_layer *layer, const float *x,
                                   size_t n_samples, float *scratch, struct attention *a, struct qtr_error *err) {
  size_t n = runner->length * (size_t)layer->config->hidden_size;
  a->at = 0;
  a->error = 0;
  enum qtr_status status = qtr_runner_set(runner, layer, err);
  for (size_t i = 0; i < n_samples && !status; i++) {
    memcpy(scratch, x + i * n, n * sizeof *x);
    status = qtr_runner_run(runner, layer, scratch, see_attention, a, err);
  }
  return status;
}

enum qtr_status qtr_smooth_keys(const struct qtr_smooth_options *options, int32_t n_grid,
                                const struct qtr_observed *observed, const struct qtr_float_layer *layer,
                                struct qtr_runner *runner, struct qtr_runner *quantised, const float *x, size_t n_samples,
                                float *s, float *alpha, float *beta, struct qtr_error *err) {
  const struct qtr_config *c = layer->config;
  size_t d = (size_t)c->head_dim, kv = (size_t)c->n_kv_heads * d, q = (size_t)c->n_heads * d;
  size_t group = (size_t)(c->n_heads / c->n_kv_heads), n_x = runner->length * (size_t)c->hidden_size;
  float *a = malloc(kv * sizeof *a), *b = calloc(kv, sizeof *b), *scratch = NULL;
  struct attention attention = {.out = NULL};
  struct qtr_float_layer trial = *layer; /* with its own q and k */
  enum qtr_status status = QTR_OK;
  bool grid = options->mode == QTR_SMOOTH_GRID && quantised;
  trial.m[QTR_Q].w = trial.m[QTR_K].w = trial.m[QTR_Q].bias = trial.m[QTR_K].bias = NULL;
  if (grid) {
    scratch = malloc(n_x * sizeof *scratch);
    attention.out = malloc(n_samples * runner->length * q * sizeof(float));
    bool ok = scratch && attention.out;
    for (enum qtr_projection p = QTR_Q; p <= QTR_K && ok; p++) {
      const struct qtr_float_matrix *m = &layer->m[p];
      ok = (trial.m[p].w = malloc(m->n_out * m->n_in * sizeof(float))) &&
           (!m->bias || (trial.m[p].bias = malloc(m->n_out * sizeof(float))));
    }
    if (!ok)
      status =
          qtr_fail_memory(err, "the attention outputs of a grid search", n_samples * runner->length * q * sizeof(float));
  }
  if (!a || !b) status = qtr_fail_memory(err, "smoothing factors", kv * sizeof *a);
  if (status) goto done;
  memcpy(a, observed->max_k, kv * sizeof *a);
  for (size_t i = 0; i < q; i++) {
    float *at = &b[qtr_kv_channel(i, d, group)];
    *at = QTR_MAX(*at, observed->max_q[i]);
  }
  qtr_smooth_tie_pairs(a, (size_t)c->n_kv_heads, d);
  qtr_smooth_tie_pairs(b, (size_t)c->n_kv_heads, d);
  if (!grid) {
    *alpha = options->alpha;
    *beta = QTR_MAX(options->beta, 0);
    qtr_smooth_factors(a, b, *alpha, *beta, kv, s);
    goto done;
  }
  if ((status = run_samples(runner, layer, x, n_samples, scratch, &attention, err))) goto done;
  attention.compare = true;
  double best = INFINITY;
  float point[2];
  for (int32_t i = 0; option_point(options, n_grid, i, &point[0], &point[1]) && !status; i++) {
    for (enum qtr_projection p = QTR_Q; p <= QTR_K; p++) {
      const struct qtr_float_matrix *m = &layer->m[p];
      memcpy(trial.m[p].w, m->w, m->n_out * m->n_in * sizeof(float));
      if (m->bias) memcpy(trial.m[p].bias, m->bias, m->n_out * sizeof(float));
    }
    qtr_smooth_factors(a, b, point[0], point[1], kv, s);
    qtr_layer_smooth_keys(&trial, s);
    status = run_samples(quantised, &trial, x, n_samples, scratch, &attention, err);
    if (status || attention.error > best) continue;
    best = attention.error;
    *alpha = point[0];
    *beta = point[1];
  }
  qtr_smooth_factors(a, b, *alpha, *beta, kv, s);
done:
  for (enum qtr_projection p = QTR_Q; p <= QTR_K; p++) {
    free(trial.m[p].w);
    free(trial.m[p].bias);
  }
  free(attention.out);
  free(scratch);
  free(a);
  free(b);
  return status;
}

/* ---- inputs of o_proj and down_proj -------------------------------------------------------------- */

/* x (n_tokens, dim) to what 8 bits a token leave of it (B.6). */
static void fake_int8(float *x, size_t n_tokens, size_t dim) {
  for (size_t t = 0; t < n_tokens; t++, x += dim) {
    float max = 0;
    for (size_t i = 0; i < dim; i++) max = fabsf(x[i]) > max ? fabsf(x[i]) : max;
    float scale = qtr_f16_round(max / 127);
    for (size_t i = 0; i < dim && scale > 0; i++) x[i] = qtr_round_even(qtr_clamp(x[i] / scale, -127, 127)) * scale;
  }
}

/* One point of the grid: ‖X Wᵀ - X̂ Ŵᵀ‖² with W * s and X / s rounded. */
struct trial {
  const struct qtr_float_matrix *m;
  const struct qtr_observed *observed;
  enum qtr_site site;
  float *w, *x;     /* (n_out, n_in), (n_kept, n_in) scaled */
  float *y, *y_hat; /* (n_kept, n_out) */
  struct qtr_grid grid;
};

static enum qtr_status try_factors(struct trial *t, const float *s, double *error, struct qtr_error *err) {
  const struct qtr_float_matrix *m = t->m;
  size_t n_in = m->n_in, n_kept = t->observed->n_kept;
  struct qtr_threads *team = t->observed->team;
  const struct qtr_gptq_options plain = {.block = QTR_GROUP};
  for (size_t i = 0; i < m->n_out * n_in; i++) t->w[i] = m->w[i] * s[i % n_in];
  for (size_t i = 0; i < n_kept * n_in; i++) t->x[i] = t->observed->sample[t->site][i] / s[i % n_in];
  enum qtr_status status = qtr_clip(team, t->w, NULL, 0, NULL, &t->grid, "a smoothed matrix", err);
  if (!status) status = qtr_gptq(team, t->w, NULL, &plain, &t->grid, "a smoothed matrix", err);
  if (status) return status;
  for (size_t i = 0; i < m->n_out * n_in; i++) {
    t->w[i] = qtr_grid_value(&t->grid, i / n_in, i % n_in);
  }
  fake_int8(t->x, n_kept, n_in);
  qtr_matrix_product(team, t->x, t->w, false, t->y_hat, n_kept, m->n_out, n_in);
  *error = 0;
  for (size_t i = 0; i < n_kept * m->n_out; i++)
    *error += ((double)t->y[i] - (double)t->y_hat[i]) * ((double)t->y[i] - (double)t->y_hat[i]);
  return QTR_OK;
}

enum qtr_status qtr_smooth_input(const struct qtr_smooth_options *options, int32_t n_grid,
                                 const struct qtr_observed *observed, const struct qtr_float_layer *layer,
                                 enum qtr_projection p, enum qtr_linear_format format, float *s, float *alpha, float *beta,
                                 struct qtr_error *err) {
  const struct qtr_config *c = layer->config;
  const struct qtr_float_matrix *m = &layer->m[p];
  enum qtr_site site = qtr_projection_site(p);
  size_t n_in = m->n_in, d = (size_t)c->head_dim, group = p == QTR_O ? (size_t)(c->n_heads / c->n_kv_heads) : 1;
  size_t n = n_in / group; /* factors: heads of a group share theirs */
  struct trial t = {.m = m, .observed = observed, .site = site};
  float *a = calloc(n, sizeof *a), *b = calloc(n, sizeof *b), *wide = malloc(n_in * sizeof *wide);
  bool grid = options->mode == QTR_SMOOTH_GRID, ok = a && b && wide;
  enum qtr_status status = QTR_OK;
  if (grid && ok) {
    ok = (t.w = malloc(m->n_out * n_in * sizeof(float))) && (t.x = malloc(observed->max_kept * n_in * sizeof(float))) &&
         (t.y = malloc(observed->max_kept * m->n_out * sizeof(float))) &&
         (t.y_hat = malloc(observed->max_kept * m->n_out * sizeof(float)));
    if (ok) status = qtr_grid_create(format, m->n_out, n_in, &t.grid, err);
  }
  if (!ok) status = qtr_fail_memory(err, "a smoothing grid", m->n_out * n_in * sizeof(float));
  if (status) goto done;
  for (size_t i = 0; i < n_in; i++) {
    size_t k = qtr_kv_channel(i, d, group);
    a[k] = QTR_MAX(a[k], observed->max_in[site][i]);
    for (size_t r = 0; r < m->n_out; r++) b[k] = QTR_MAX(b[k], fabsf(m->w[r * n_in + i]));
  }
  double best = INFINITY, error = 0;
  float point[2];
  if (grid) qtr_matrix_product(observed->team, observed->sample[site], m->w, false, t.y, observed->n_kept, m->n_out, n_in);
  for (int32_t i = 0; option_point(options, n_grid, i, &point[0], &point[1]) && !status; i++) {
    qtr_smooth_factors(a, b, point[0], point[1], n, s);
    for (size_t k = 0; k < n_in; k++) wide[k] = s[qtr_kv_channel(k, d, group)];
    if (grid) status = try_factors(&t, wide, &error, err);
    if (status || error > best) continue;
    best = error;
    *alpha = point[0];
    *beta = point[1];
  }
  qtr_smooth_factors(a, b, *alpha, *beta, n, s);
done:
  qtr_grid_free(&t.grid);
  free(t.w);
  free(t.x);
  free(t.y);
  free(t.y_hat);
  free(a);
  free(b);
  free(wide);
  return status;
}
