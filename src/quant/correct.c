/* correct.c - targets for the inputs that the quantised model has (correct.h). */
#include "quant/correct.h"

#include "base/checked.h"
#include "base/status.h"
#include "quant/matrix.h"

#include <stdlib.h>
#include <string.h>

enum qtr_status qtr_corrector_open(struct qtr_observed *observed, struct qtr_runner *quantised, const char *dir,
                                   size_t n_samples, struct qtr_corrector *c, struct qtr_error *err) {
  size_t length = quantised->length, hidden = observed->dim[QTR_SITE_QKV], heads = observed->dim[QTR_SITE_O];
  size_t inner = observed->dim[QTR_SITE_DOWN], widest = QTR_MAX(QTR_MAX(hidden, heads), inner), all = hidden + heads + inner;
  *c = (struct qtr_corrector){.observed = observed,
                              .quantised = quantised,
                              .dir = dir,
                              .n_samples = n_samples,
                              .length = length,
                              .hidden = hidden,
                              .heads = heads,
                              .inner = inner,
                              .in = {.fd = -1},
                              .out = {.fd = -1},
                              .seen = {.fd = -1}};
  const struct {
    float **p;
    size_t n;
  } arrays[] = {{&c->x, length * hidden},          {&c->f, length * all},
                {&c->f_hat, length * all},         {&c->normed, length * hidden},
                {&c->normed_hat, length * hidden}, {&c->difference, length * widest},
                {&c->cross, widest * widest},      {&c->residual, hidden * widest},
                {&c->out_factor, heads},           {&c->down_factor, inner}};
  bool ok = (c->down_order = malloc(inner * sizeof *c->down_order)) != NULL;
  for (size_t i = 0; i < sizeof arrays / sizeof arrays[0] && ok; i++)
    ok = (*arrays[i].p = malloc(arrays[i].n * sizeof(float))) != NULL;
  return ok ? QTR_OK
            : qtr_fail_memory(err, "the correction between layers", (3 * all * length + widest * widest) * sizeof(float));
}

void qtr_corrector_close(struct qtr_corrector *c) {
  if (!c->dir) return;
  float *const arrays[] = {c->x,          c->f,     c->f_hat,    c->normed,     c->normed_hat,
                           c->difference, c->cross, c->residual, c->out_factor, c->down_factor};
  for (size_t i = 0; i < sizeof arrays / sizeof arrays[0]; i++) free(arrays[i]);
  free(c->down_order);
  qtr_states_close(&c->in, false);
  qtr_states_close(&c->out, false);
  qtr_states_close(&c->seen, true);
  *c = (struct qtr_corrector){.in = {.fd = -1}, .out = {.fd = -1}, .seen = {.fd = -1}};
}

enum qtr_status qtr_corrector_begin(struct qtr_corrector *c, int32_t index, const struct qtr_states *floats,
                                    struct qtr_error *err) {
  size_t n = c->length * c->hidden;
  enum qtr_status status = QTR_OK;
  if (!c->in.path) status = qtr_states_open_layer(c->dir, QTR_STATES_QUANTISED, index, n, index == 0, &c->in, err);
  for (size_t s = 0; s < c->n_samples && index == 0 && !status; s++) {
    status = qtr_states_read(floats, s, c->x, err);
    if (!status) status = qtr_states_write(&c->in, s, c->x, err);
  }
  if (!status) status = qtr_states_open_layer(c->dir, QTR_STATES_QUANTISED, index + 1, n, true, &c->out, err);
  if (!status && !c->seen.path) {
    status = qtr_states_open(c->dir, "seen.f32", c->length * (c->hidden + c->heads + c->inner), true, &c->seen, err);
  }
  for (size_t i = 0; i < c->heads; i++) c->out_factor[i] = 1;
  for (size_t i = 0; i < c->inner; i++) c->down_factor[i] = 1;
  for (size_t i = 0; i < c->inner; i++) c->down_order[i] = i;
  return status;
}

/* ---- what goes by -------------------------------------------------------------------------------- */

/* Places of one sample in `seen`. */
static float *middle_of(const struct qtr_corrector *c, float *f) {
  (void)c;
  return f;
}
static float *out_of(const struct qtr_corrector *c, float *f) { return f + c->length * c->hidden; }
static float *down_of(const struct qtr_corrector *c, float *f) { return f + c->length * (c->hidden + c->heads); }

static void keep(const struct qtr_corrector *c, float *f, enum qtr_site site, const float *x, size_t n) {
  float *to = site == QTR_SEE_MIDDLE  ? middle_of(c, f)
              : site == QTR_SITE_O    ? out_of(c, f)
              : site == QTR_SITE_DOWN ? down_of(c, f)
                                      : NULL;
  if (to) memcpy(to, x, n * sizeof *x);
}

void qtr_corrector_see(void *user, enum qtr_site site, const float *x, size_t n_tokens, size_t n_in) {
  struct qtr_corrector *c = user;
  qtr_observed_see(c->observed, site, x, n_tokens, n_in);
  keep(c, c->f, site, x, n_tokens * n_in);
}

static void see_quantised(void *user, enum qtr_site site, const float *x, size_t n_tokens, size_t n_in) {
  struct qtr_corrector *c = user;
  keep(c, c->f_hat, site, x, n_tokens * n_in);
}

enum qtr_status qtr_corrector_seen(struct qtr_corrector *c, size_t sample, struct qtr_error *err) {
  return qtr_states_write(&c->seen, sample, c->f, err);
}

/* What was seen of the float layer, as if the transformations since had been there. f: (length, n) in place */
static void transform(const struct qtr_corrector *c, float *f, const float *factor, const size_t *order, size_t n) {
  float *copy = c->difference; /* not in use */
  for (size_t t = 0; t < c->length; t++, f += n) {
    for (size_t i = 0; i < n; i++) copy[i] = f[i] / factor[i];
    for (size_t i = 0; i < n; i++) f[i] = copy[order ? order[i] : i];
  }
}

/* ---- targets ------------------------------------------------------------------------------------- */

/* One sample. f, f_hat: (length, n); h, h_hat: (length, hidden), NULL where the matrix adds to nothing. */
static void add_sample(struct qtr_corrector *c, enum qtr_site site, const float *f, const float *f_hat, const float *h,
                       const float *h_hat) {
  size_t n = c->observed->dim[site];
  struct qtr_threads *team = c->observed->team;
  qtr_observed_see(c->observed, site, f_hat, c->length, n);
  for (size_t i = 0; i < c->length * n; i++) c->difference[i] = f[i] - f_hat[i];
  qtr_matrix_add_gram(team, c->difference, f_hat, c->length, n, n, c->cross);
  if (!h) return;
  for (size_t i = 0; i < c->length * c->hidden; i++) c->difference[i] = h[i] - h_hat[i];
  qtr_matrix_add_gram(team, c->difference, f_hat, c->length, c->hidden, n, c->residual);
}

/* W += (W Σ(f - f̂)f̂ᵀ + Σ(h - ĥ)f̂ᵀ)(Σ f̂f̂ᵀ + damp)⁻¹ */
static enum qtr_status move(const struct qtr_corrector *c, enum qtr_site site, float damp, struct qtr_float_matrix *m,
                            struct qtr_error *err) {
  size_t n = m->n_in;
  const float *hessian = c->observed->hessian[site];
  float *b = malloc(m->n_out * n * sizeof *b);
  if (!b) return qtr_fail_memory(err, "a correction", m->n_out * n * sizeof *b);
  qtr_matrix_product(c->observed->team, m->w, c->cross, true, b, m->n_out, n, n);
  if (site == QTR_SITE_O || site == QTR_SITE_DOWN) {
    for (size_t i = 0; i < m->n_out * n; i++) b[i] += c->residual[i];
  }
  double mean = 0;
  for (size_t i = 0; i < n; i++) mean += (double)hessian[i * n + i] / (double)n;
  bool memory,
      ok = qtr_matrix_solve(c->observed->team, hessian, QTR_MAX((double)damp * mean, 1e-12), n, b, m->n_out, &memory);
  for (size_t i = 0; i < m->n_out * n && ok; i++) m->w[i] += b[i];
  free(b);
  if (ok) return QTR_OK;
  return memory ? qtr_fail_memory(err, "a correction", n * n * sizeof(double))
                : qtr_fail(err, QTR_ERR_FORMAT, "the inputs' covariance is not positive definite");
}

enum qtr_status qtr_corrector_aim(struct qtr_corrector *c, enum qtr_site site, const struct qtr_states *floats,
                                  struct qtr_float_layer *layer, const struct qtr_float_layer *partly, float damp,
                                  struct qtr_error *err) {
  size_t n = c->observed->dim[site];
  float eps = layer->config->rms_norm_eps;
  enum qtr_status status = QTR_OK;
  qtr_observed_clear_site(c->observed, site);
  memset(c->cross, 0, n * n * sizeof *c->cross);
  memset(c->residual, 0, c->hidden * n * sizeof *c->residual);
  if (site != QTR_SITE_QKV) status = qtr_runner_set(c->quantised, partly, err);
  for (size_t s = 0; s < c->n_samples && !status; s++) {
    float *h = c->normed, *h_hat = c->normed_hat;
    status = qtr_states_read(&c->in, s, c->x, err);
    if (!status) status = qtr_states_read(&c->seen, s, c->f, err);
    if (!status && site <= QTR_SITE_O) { /* the residual streams before the layer */
      status = qtr_states_read(floats, s, h, err);
      memcpy(h_hat, c->x, c->length * c->hidden * sizeof *h_hat);
    }
    if (!status && site != QTR_SITE_QKV) status = qtr_runner_run(c->quantised, partly, c->x, see_quantised, c, err);
    if (status) break;
    switch (site) {
      case QTR_SITE_QKV:
        qtr_normalise(h, layer->input_norm, eps, c->length, n, h);
        qtr_normalise(h_hat, layer->input_norm, eps, c->length, n, h_hat);
        add_sample(c, site, h, h_hat, NULL, NULL);
        break;
      case QTR_SITE_O:
        transform(c, out_of(c, c->f), c->out_factor, NULL, n);
        add_sample(c, site, out_of(c, c->f), out_of(c, c->f_hat), h, h_hat);
        break;
      case QTR_SITE_GATE_UP:
        qtr_normalise(middle_of(c, c->f), layer->post_norm, eps, c->length, n, h);
        qtr_normalise(middle_of(c, c->f_hat), layer->post_norm, eps, c->length, n, h_hat);
        add_sample(c, site, h, h_hat, NULL, NULL);
        break;
      default:
        transform(c, down_of(c, c->f), c->down_factor, c->down_order, n);
        add_sample(c, site, down_of(c, c->f), down_of(c, c->f_hat), middle_of(c, c->f), middle_of(c, c->f_hat));
    }
  }
  if (status) return status;
  float scale = qtr_observed_finish_site(c->observed, site);
  for (size_t i = 0; i < n * n; i++) c->cross[i] *= scale;
  for (size_t i = 0; i < c->hidden * n; i++) c->residual[i] *= scale;
  for (enum qtr_projection p = QTR_Q; p < QTR_N_PROJECTIONS && !status; p++) {
    if (qtr_projection_site(p) == site) status = move(c, site, damp, &layer->m[p], err);
  }
  return status;
}

enum qtr_status qtr_corrector_propagate(struct qtr_corrector *c, const struct qtr_float_layer *quantised_layer,
                                        struct qtr_error *err) {
  enum qtr_status status = qtr_runner_set(c->quantised, quantised_layer, err);
  for (size_t s = 0; s < c->n_samples && !status; s++) {
    status = qtr_states_read(&c->in, s, c->x, err);
    if (!status) status = qtr_runner_run(c->quantised, quantised_layer, c->x, NULL, NULL, err);
    if (!status) status = qtr_states_write(&c->out, s, c->x, err);
  }
  return status;
}
