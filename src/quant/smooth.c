/* smooth.c - smoothing factors and their grids (smooth.h). */
#include "quant/smooth.h"

#include "base/checked.h"
#include "base/half.h"
#include "base/status.h"
#include "quant/clip.h"
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

/* What goes into attention on some samples, and what comes out of it in floats. */
struct attention {
  size_t length, width, heads, n_seen;
  float *qkv;   /* (n_samples, length, width) q and k after RoPE, v */
  float *out;   /* (n_samples, length, heads) */
  float *trial; /* (length, width) */
  float *got;   /* (length, heads) */
};

static void see_attention(void *user, enum qtr_site site, const float *x, size_t n_tokens, size_t n_in) {
  struct attention *a = user;
  size_t n = n_tokens * n_in;
  if (site == QTR_SEE_ROPE) memcpy(a->qkv + a->n_seen * n, x, n * sizeof *x);
  if (site == QTR_SITE_O) memcpy(a->out + a->n_seen++ * n, x, n * sizeof *x);
}

/* Runs the samples x (n_samples, length, hidden) through the layer in floats. Free with free_attention, also on failure. */
static enum qtr_status watch_attention(struct qtr_runner *runner, const struct qtr_float_layer *layer, const float *x,
                                       size_t n_samples, struct attention *a, struct qtr_error *err) {
  const struct qtr_config *c = layer->config;
  size_t n_x = runner->length * (size_t)c->hidden_size;
  float *scratch = malloc(n_x * sizeof *scratch);
  *a = (struct attention){.length = runner->length,
                          .width = (size_t)(c->n_heads + 2 * c->n_kv_heads) * (size_t)c->head_dim,
                          .heads = (size_t)c->n_heads * (size_t)c->head_dim};
  bool ok = scratch && (a->qkv = malloc(n_samples * a->length * a->width * sizeof(float))) &&
            (a->out = malloc(n_samples * a->length * a->heads * sizeof(float))) &&
            (a->trial = malloc(a->length * a->width * sizeof(float))) &&
            (a->got = malloc(a->length * a->heads * sizeof(float)));
  enum qtr_status status = ok ? qtr_runner_set(runner, layer, err)
                              : qtr_fail_memory(err, "the attention of a grid search",
                                                n_samples * a->length * (a->width + a->heads) * sizeof(float));
  for (size_t i = 0; i < n_samples && !status; i++) {
    memcpy(scratch, x + i * n_x, n_x * sizeof *x);
    status = qtr_runner_run(runner, layer, scratch, see_attention, a, err);
  }
  free(scratch);
  return status;
}

static void free_attention(struct attention *a) {
  free(a->qkv);
  free(a->out);
  free(a->trial);
  free(a->got);
}

/* How far the cache's format takes the outputs away, with queries times and keys divided by s: ‖out - got‖² over the
 * samples. RoPE commutes with s, which is the same for both channels of its pairs. wide: (width) 1 where nothing is to be
 * done */
static enum qtr_status try_keys(struct attention *a, struct qtr_runner *quantised, const float *wide, double *error,
                                struct qtr_error *err) {
  enum qtr_status status = QTR_OK;
  *error = 0;
  for (size_t i = 0; i < a->n_seen && !status; i++) {
    const float *qkv = a->qkv + i * a->length * a->width, *out = a->out + i * a->length * a->heads;
    for (size_t k = 0; k < a->length * a->width; k++) a->trial[k] = qkv[k] * wide[k % a->width];
    status = qtr_runner_attend(quantised, a->trial, a->got, err);
    for (size_t k = 0; k < a->length * a->heads && !status; k++)
      *error += ((double)a->got[k] - (double)out[k]) * ((double)a->got[k] - (double)out[k]);
  }
  return status;
}

enum qtr_status qtr_smooth_keys(const struct qtr_smooth_options *options, int32_t n_grid,
                                const struct qtr_observed *observed, const struct qtr_float_layer *layer,
                                struct qtr_runner *runner, struct qtr_runner *quantised, const float *x, size_t n_samples,
                                float *s, float *alpha, float *beta, struct qtr_error *err) {
  const struct qtr_config *c = layer->config;
  size_t d = (size_t)c->head_dim, kv = (size_t)c->n_kv_heads * d, q = (size_t)c->n_heads * d;
  size_t group = (size_t)(c->n_heads / c->n_kv_heads);
  float *a = malloc(kv * sizeof *a), *b = calloc(kv, sizeof *b), *wide = malloc((q + 2 * kv) * sizeof *wide);
  struct attention attention = {.length = 0};
  bool grid = options->mode == QTR_SMOOTH_GRID && quantised;
  enum qtr_status status = a && b && wide ? QTR_OK : qtr_fail_memory(err, "smoothing factors", kv * sizeof *a);
  if (status) goto done;
  memcpy(a, observed->max_k, kv * sizeof *a);
  for (size_t i = 0; i < q; i++) {
    float *at = &b[qtr_kv_channel(i, d, group)];
    *at = QTR_MAX(*at, observed->max_q[i]);
  }
  qtr_smooth_tie_pairs(a, (size_t)c->n_kv_heads, d);
  qtr_smooth_tie_pairs(b, (size_t)c->n_kv_heads, d);
  *alpha = options->alpha;
  *beta = QTR_MAX(options->beta, 0);
  if (grid) status = watch_attention(runner, layer, x, n_samples, &attention, err);
  double best = INFINITY, error;
  float point[2];
  for (int32_t i = 0; grid && !status && option_point(options, n_grid, i, &point[0], &point[1]); i++) {
    qtr_smooth_factors(a, b, point[0], point[1], kv, s);
    for (size_t k = 0; k < q + 2 * kv; k++) wide[k] = k < q ? s[qtr_kv_channel(k, d, group)] : k < q + kv ? 1 / s[k - q] : 1;
    status = try_keys(&attention, quantised, wide, &error, err);
    if (status || error > best) continue;
    best = error;
    *alpha = point[0];
    *beta = point[1];
  }
  qtr_smooth_factors(a, b, *alpha, *beta, kv, s);
done:
  free_attention(&attention);
  free(wide);
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
