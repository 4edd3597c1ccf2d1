/* calibrate.c - QoQ layer by layer (calibrate.h, qoq.h; order of spec F.1). */
#include "quant/calibrate.h"

#include "base/checked.h"
#include "base/status.h"
#include "quant/calibration.h"
#include "quant/clip.h"
#include "quant/correct.h"
#include "quant/gptq.h"
#include "quant/smooth.h"
#include "quant/states.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { KEPT_INPUTS = 512, KEY_SAMPLES = 2 }; /* F.7's sampled tokens; samples that the grid of the keys runs */

struct run {
  const struct qtr_calibrate_job *job;
  const struct qtr_qoq_options *options;
  const struct qtr_config *config;
  struct qtr_calibration calibration;
  struct qtr_rotation hidden, head;
  struct qtr_runner runner;    /* floats, cache in fp16 */
  struct qtr_runner quantised; /* the cache's format; open where something needs it */
  struct qtr_observed observed;
  struct qtr_states in, out;      /* hidden states before and after the layer */
  struct qtr_corrector corrector; /* with options.correct */
  float *x;                       /* (length, hidden) */
  struct qtr_work *work;
  struct qtr_progress progress;
  size_t n_steps_done, steps_per_layer;
  struct qtr_error *err;
};

enum qtr_status qtr_calibrate_rotation(const struct qtr_qoq_options *options, const struct qtr_config *config,
                                       struct qtr_rotation *rotation, struct qtr_error *err) {
  *rotation = (struct qtr_rotation){0};
  return options->rotate ? qtr_rotation_create((size_t)config->hidden_size, rotation, err) : QTR_OK;
}

static void advance(struct run *r) { qtr_progress_update(&r->progress, ++r->n_steps_done); }

static size_t state_floats(const struct run *r) { return r->calibration.length * (size_t)r->config->hidden_size; }

static enum qtr_status open_states(struct run *r, int32_t layer, bool create, struct qtr_states *states) {
  return qtr_states_open_layer(r->work->dir, QTR_STATES_FLOAT, layer, state_floats(r), create, states, r->err);
}

/* The hidden states before the first layer: rows of the embedding, rotated. */
static enum qtr_status embed(struct run *r) {
  size_t hidden = (size_t)r->config->hidden_size, length = r->calibration.length;
  const struct qtr_slot slot = {.part = QTR_SLOT_EMBED,
                                .layer = -1,
                                .name = "model.embed_tokens",
                                .projection = "embed_tokens",
                                .n_out = (size_t)r->config->vocab_size,
                                .n_in = hidden};
  const struct qtr_tensor *t;
  enum qtr_status status = qtr_source_vocab(r->job->source, &slot, &t, r->err);
  if (!status) status = open_states(r, 0, true, &r->in);
  if (status) return status;
  size_t row_bytes = qtr_dtype_bytes(t->dtype) * hidden;
  for (size_t s = 0; s < r->calibration.n_samples && !status; s++) {
    for (size_t i = 0; i < length && !status; i++) {
      int32_t token = r->calibration.token[s * length + i];
      if (token < 0 || token >= r->config->vocab_size) {
        return qtr_fail(r->err, QTR_ERR_FORMAT, "the tokenizer gives token %d, the model's vocabulary has %d", token,
                        r->config->vocab_size);
      }
      struct qtr_tensor row = *t;
      row.data = (const uint8_t *)t->data + (size_t)token * row_bytes;
      row.n_bytes = row_bytes;
      status = qtr_tensor_to_floats(&row, r->x + i * hidden, hidden, r->err);
    }
    if (!status && r->options->rotate) status = qtr_rotate_rows(r->job->team, &r->hidden, r->x, length, hidden, r->err);
    if (!status) status = qtr_states_write(&r->in, s, r->x, r->err);
  }
  qtr_tensor_forget(t);
  return status;
}

/* ---- one layer ----------------------------------------------------------------------------------- */

/* Runs all samples through the layer in floats: what is observed, and the states after it. */
static enum qtr_status run_floats(struct run *r, const struct qtr_float_layer *layer) {
  qtr_observed_clear(&r->observed);
  r->observed.moments = !r->options->correct; /* with correction those of the quantised model count, later */
  enum qtr_status status = qtr_runner_set(&r->runner, layer, r->err);
  for (size_t s = 0; s < r->calibration.n_samples && !status; s++) {
    status = qtr_states_read(&r->in, s, r->x, r->err);
    if (!status) {
      status = r->options->correct ? qtr_runner_run(&r->runner, layer, r->x, qtr_corrector_see, &r->corrector, r->err)
                                   : qtr_runner_run(&r->runner, layer, r->x, qtr_observed_see, &r->observed, r->err);
    }
    if (!status && r->options->correct) status = qtr_corrector_seen(&r->corrector, s, r->err);
    if (!status) status = qtr_states_write(&r->out, s, r->x, r->err);
    advance(r);
  }
  qtr_observed_finish(&r->observed);
  return status;
}

static json_t *numbers(const float *x, size_t n) {
  json_t *array = json_array();
  for (size_t i = 0; i < n && array; i++) json_array_append_new(array, json_real((double)x[i]));
  return array;
}

static enum qtr_status smooth_keys(struct run *r, struct qtr_float_layer *layer, json_t *report) {
  size_t kv = (size_t)r->config->n_kv_heads * (size_t)r->config->head_dim, n = state_floats(r);
  size_t n_samples = QTR_MIN((size_t)KEY_SAMPLES, r->calibration.n_samples);
  json_object_set_new(report, "k_max_before", numbers(r->observed.max_k, kv));
  if (r->options->keys.mode == QTR_SMOOTH_OFF) return QTR_OK;
  float *s = malloc(kv * sizeof *s), *x = malloc(n_samples * n * sizeof *x), alpha = 0, beta = 0;
  enum qtr_status status = s && x ? QTR_OK : qtr_fail_memory(r->err, "smoothing of keys", n_samples * n * sizeof *x);
  bool grid = r->options->keys.mode == QTR_SMOOTH_GRID && r->job->kv != QTR_KV_F16;
  for (size_t i = 0; i < n_samples && grid && !status; i++) status = qtr_states_read(&r->in, i, x + i * n, r->err);
  if (!status) {
    status = qtr_smooth_keys(&r->options->keys, r->options->n_grid, &r->observed, layer, &r->runner,
                             grid ? &r->quantised : NULL, x, n_samples, s, &alpha, &beta, r->err);
  }
  if (!status) {
    qtr_layer_smooth_keys(layer, s);
    qtr_observed_smooth_keys(&r->observed, s);
    json_object_set_new(report, "k_max_after", numbers(r->observed.max_k, kv));
    json_object_set_new(report, "k_smooth", json_pack("[f,f]", (double)alpha, (double)beta));
  }
  free(s);
  free(x);
  return status;
}

/* o_proj's or down_proj's input. */
static enum qtr_status smooth_input(struct run *r, struct qtr_float_layer *layer, enum qtr_projection p, json_t *report) {
  const struct qtr_smooth_options *o = p == QTR_O ? &r->options->out : &r->options->down;
  size_t d = (size_t)r->config->head_dim, group = p == QTR_O ? (size_t)(r->config->n_heads / r->config->n_kv_heads) : 1;
  size_t n_in = layer->m[p].n_in;
  if (o->mode == QTR_SMOOTH_OFF) return QTR_OK;
  float *s = malloc(n_in * sizeof *s), *wide = malloc(n_in * sizeof *wide), alpha = 0, beta = 0;
  enum qtr_status status = s && wide ? QTR_OK : qtr_fail_memory(r->err, "smoothing", n_in * sizeof *s);
  if (!status) {
    status = qtr_smooth_input(o, r->options->n_grid, &r->observed, layer, p, r->job->format, s, &alpha, &beta, r->err);
  }
  if (!status) {
    for (size_t i = 0; i < n_in; i++) wide[i] = s[qtr_kv_channel(i, d, group)];
    if (p == QTR_O) {
      qtr_layer_smooth_out(layer, s);
      for (size_t i = 0; i < layer->m[QTR_V].n_out; i++) r->observed.max_v[i] /= s[i];
    } else {
      qtr_layer_smooth_down(layer, s);
    }
    qtr_observed_scale(&r->observed, qtr_projection_site(p), wide);
    if (r->options->correct)
      memcpy(p == QTR_O ? r->corrector.out_factor : r->corrector.down_factor, wide, n_in * sizeof *wide);
    json_object_set_new(report, p == QTR_O ? "out_smooth" : "down_smooth", json_pack("[f,f]", (double)alpha, (double)beta));
  }
  free(s);
  free(wide);
  return status;
}

/* SmoothQuant of what follows a norm: s = max|x|^alpha / max|W|^beta over all matrices behind it. */
static enum qtr_status smooth_norms(struct run *r, struct qtr_float_layer *layer) {
  size_t hidden = (size_t)r->config->hidden_size;
  if (r->options->input.mode == QTR_SMOOTH_OFF || r->options->rotate) return QTR_OK;
  float *b = malloc(hidden * sizeof *b), *s = malloc(hidden * sizeof *s);
  enum qtr_status status = b && s ? QTR_OK : qtr_fail_memory(r->err, "smoothing", hidden * sizeof *s);
  for (int mlp = 0; mlp < 2 && !status; mlp++) {
    enum qtr_site site = mlp ? QTR_SITE_GATE_UP : QTR_SITE_QKV;
    memset(b, 0, hidden * sizeof *b);
    for (enum qtr_projection p = QTR_Q; p < QTR_N_PROJECTIONS; p++) {
      if (qtr_projection_site(p) != site) continue;
      const struct qtr_float_matrix *m = &layer->m[p];
      for (size_t i = 0; i < m->n_out * hidden; i++) b[i % hidden] = QTR_MAX(b[i % hidden], fabsf(m->w[i]));
    }
    qtr_smooth_factors(r->observed.max_in[site], b, r->options->input.alpha, r->options->input.beta, hidden, s);
    qtr_layer_smooth_input(layer, mlp != 0, s);
    qtr_observed_scale(&r->observed, site, s);
  }
  free(b);
  free(s);
  return status;
}

struct by_size {
  float max;
  size_t index;
};

static int smaller(const void *a, const void *b) {
  const struct by_size *x = a, *y = b;
  if (x->max != y->max) return x->max < y->max ? -1 : 1;
  return x->index < y->index ? -1 : 1;
}

/* down_proj's inputs by rising magnitude, so that a group holds channels of like size (F.4). */
static enum qtr_status reorder(struct run *r, struct qtr_float_layer *layer) {
  size_t n = (size_t)r->config->intermediate_size;
  if (!r->options->reorder) return QTR_OK;
  struct by_size *sorted = malloc(n * sizeof *sorted);
  size_t *index = malloc(n * sizeof *index);
  enum qtr_status status = sorted && index ? QTR_OK : qtr_fail_memory(r->err, "an order", n * sizeof *sorted);
  if (!status) {
    for (size_t i = 0; i < n; i++) sorted[i] = (struct by_size){r->observed.max_in[QTR_SITE_DOWN][i], i};
    qsort(sorted, n, sizeof *sorted, smaller);
    for (size_t i = 0; i < n; i++) index[i] = sorted[i].index;
    status = qtr_layer_reorder(layer, index, r->err);
    if (r->options->correct) memcpy(r->corrector.down_order, index, n * sizeof *index);
  }
  if (!status) status = qtr_observed_reorder(&r->observed, QTR_SITE_DOWN, index, r->err);
  free(sorted);
  free(index);
  return status;
}

/* Ranges and codes of one matrix; errors of the outputs into the report, by plain rounding and as it was done. */
static enum qtr_status quantise(struct run *r, const struct qtr_float_layer *layer, enum qtr_projection p,
                                struct qtr_grid *grid, json_t *report) {
  const struct qtr_float_matrix *m = &layer->m[p];
  const struct qtr_observed *o = &r->observed;
  enum qtr_site site = qtr_projection_site(p);
  const struct qtr_clip_options clip = {.n_steps = 80, .max_shrink = 0.8f};
  const struct qtr_gptq_options gptq = {.damp = r->options->damp, .block = QTR_GROUP, .n_tries = 250};
  struct qtr_threads *team = r->job->team;
  char name[96];
  double plain = 0, done = 0, norm = 0;
  (void)snprintf(name, sizeof name, "model.layers.%d.%s", (int)layer->index, qtr_projection_names[p]);
  enum qtr_status status = qtr_grid_create(r->job->format, m->n_out, m->n_in, grid, r->err);
  if (!status) status = qtr_clip(team, m->w, NULL, 0, NULL, grid, name, r->err);
  if (!status) status = qtr_gptq(team, m->w, NULL, &gptq, grid, name, r->err);
  if (!status) status = qtr_output_error(team, m->w, grid, o->sample[site], o->n_kept, &plain, &norm, r->err);
  if (!status && r->options->clip) status = qtr_clip(team, m->w, o->sample[site], o->n_kept, &clip, grid, name, r->err);
  if (!status) status = qtr_gptq(team, m->w, r->options->gptq ? o->hessian[site] : NULL, &gptq, grid, name, r->err);
  if (!status) status = qtr_output_error(team, m->w, grid, o->sample[site], o->n_kept, &done, &norm, r->err);
  if (status) return status;
  json_object_set_new(report, qtr_projection_names[p], json_pack("[f,f,f]", plain, done, norm));
  return QTR_OK;
}

/* All matrices, site by site; with correction the quantised ones take their place in `partly` as they come. */
static enum qtr_status quantise_layer(struct run *r, struct qtr_work_layer *done, json_t *report) {
  struct qtr_float_layer *layer = &done->floats, partly = {0};
  bool correct = r->options->correct;
  enum qtr_status status = correct ? qtr_float_layer_copy(layer, &partly, r->err) : QTR_OK;
  r->observed.moments = true;
  for (enum qtr_site site = QTR_SITE_QKV; site < QTR_N_SITES && !status; site++) {
    if (correct) status = qtr_corrector_aim(&r->corrector, site, &r->in, layer, &partly, r->options->damp, r->err);
    for (enum qtr_projection p = QTR_Q; p < QTR_N_PROJECTIONS && !status; p++) {
      if (qtr_projection_site(p) != site) continue;
      status = quantise(r, layer, p, &done->grid[p], report);
      advance(r);
      const struct qtr_grid *g = &done->grid[p];
      for (size_t i = 0; i < g->n_out * g->n_in && correct && !status; i++) {
        partly.m[p].w[i] = qtr_grid_value(g, i / g->n_in, i % g->n_in);
      }
    }
  }
  if (!status && correct) status = qtr_corrector_propagate(&r->corrector, &partly, r->err);
  qtr_float_layer_free(&partly);
  return status;
}

static float largest(const float *x, size_t n) {
  float max = 0;
  for (size_t i = 0; i < n; i++) max = QTR_MAX(max, x[i]);
  return max;
}

static enum qtr_status finish_layer(struct run *r, int32_t index, struct qtr_work_layer *done) {
  struct qtr_float_layer *layer = &done->floats;
  size_t kv = (size_t)r->config->n_kv_heads * (size_t)r->config->head_dim;
  struct qtr_threads *team = r->job->team;
  enum qtr_status status = qtr_float_layer_read(r->job->source->checkpoint, r->config, index, layer, r->err);
  if (status) return status;
  if (r->options->rotate) qtr_layer_fold_norms(layer);
  if (r->options->rotate) status = qtr_layer_rotate(team, layer, &r->hidden, r->err);
  if (!status && r->options->rotate_heads) status = qtr_layer_rotate_heads(team, layer, &r->head, r->err);
  if (!status) status = open_states(r, index + 1, true, &r->out);
  if (!status && r->options->correct) status = qtr_corrector_begin(&r->corrector, index, &r->in, r->err);
  if (!status) status = run_floats(r, layer);
  json_t *report = done->report = json_object();
  if (!status && !report) status = qtr_fail_memory(r->err, "a report", 0);
  if (!status) status = smooth_keys(r, layer, report);
  if (!status) status = smooth_norms(r, layer);
  if (!status) status = smooth_input(r, layer, QTR_O, report);
  if (!status) status = smooth_input(r, layer, QTR_DOWN, report);
  if (!status) status = reorder(r, layer);
  if (!status && r->job->format > QTR_LINEAR_BF16) status = quantise_layer(r, done, report);
  if (status || !r->options->static_kv) return status;
  done->kv_scale[0] = largest(r->observed.max_k, kv) / 127;
  done->kv_scale[1] = largest(r->observed.max_v, kv) / 127;
  return QTR_OK;
}

/* ---- all layers ---------------------------------------------------------------------------------- */

static json_t *smooth_settings(const struct qtr_smooth_options *o) {
  return json_pack("[i,f,f]", (int)o->mode, (double)o->alpha, (double)o->beta);
}

static uint64_t mix(uint64_t hash, const void *data, size_t n_bytes) { /* FNV-1a */
  for (size_t i = 0; i < n_bytes; i++) hash = (hash ^ ((const uint8_t *)data)[i]) * 0x100000001b3u;
  return hash;
}

/* Tells models apart that have the same shapes: names, and some bytes of every tensor. */
static uint64_t fingerprint(const struct qtr_checkpoint *checkpoint) {
  enum { PLACES = 16, EACH = 16 };
  uint64_t hash = 0xcbf29ce484222325u;
  for (size_t i = 0; i < qtr_checkpoint_count(checkpoint); i++) {
    const struct qtr_tensor *t = qtr_checkpoint_at(checkpoint, i);
    hash = mix(mix(hash, t->name, strlen(t->name)), &t->n_bytes, sizeof t->n_bytes);
    if (t->n_bytes < PLACES * EACH) {
      hash = mix(hash, t->data, t->n_bytes);
      continue;
    }
    for (size_t k = 0; k < PLACES; k++) hash = mix(hash, (const uint8_t *)t->data + (t->n_bytes - EACH) / PLACES * k, EACH);
    qtr_tensor_forget(t); /* the system maps much around each place */
  }
  return hash;
}

/* Everything that the layers depend on. The version rises when the same settings begin to give other bytes. */
static json_t *settings_of(const struct run *r) {
  const struct qtr_qoq_options *o = r->options;
  const struct qtr_config *c = r->config;
  char hash[32], model[32];
  (void)snprintf(model, sizeof model, "%016llx", (unsigned long long)fingerprint(r->job->source->checkpoint));
  (void)snprintf(hash, sizeof hash, "%016llx", (unsigned long long)r->calibration.hash);
  return json_pack("{ss si si si si ss sf sf si sf si si sb sb sb sb sb sb so so so so si sf sb ss}", "version", "2",
                   "format", (int)r->job->format, "kv", (int)r->job->kv, "samples", (int)o->n_samples, "length",
                   (int)o->length, "model", model, "eps", (double)c->rms_norm_eps, "rope_theta", c->rope_theta,
                   "rope_scaling", (int)c->rope_scaling, "rope_factor", c->rope_factor, "heads", (int)c->n_heads, "kv_heads",
                   (int)c->n_kv_heads, "rotate", o->rotate, "rotate_heads", o->rotate_heads, "reorder", o->reorder, "clip",
                   o->clip, "gptq", o->gptq, "correct", o->correct, "keys", smooth_settings(&o->keys), "out",
                   smooth_settings(&o->out), "down", smooth_settings(&o->down), "input", smooth_settings(&o->input), "grid",
                   (int)o->n_grid, "damp", (double)o->damp, "static_kv", o->static_kv, "tokens", hash);
}

static enum qtr_status prepare(struct run *r) {
  const struct qtr_qoq_options *o = r->options;
  struct qtr_tokenizer *tokenizer = NULL;
  enum qtr_status status = qtr_tokenizer_open(r->job->tokenizer_dir, &tokenizer, r->err);
  if (!status) {
    status = qtr_calibration_read(o->calibration, tokenizer, (size_t)o->n_samples, (size_t)o->length, o->seed,
                                  &r->calibration, r->err);
  }
  qtr_tokenizer_close(tokenizer);
  if (!status) status = qtr_calibrate_rotation(o, r->config, &r->hidden, r->err);
  if (!status && o->rotate_heads) status = qtr_rotation_create((size_t)r->config->head_dim, &r->head, r->err);
  if (!status) status = qtr_runner_open(r->config, QTR_KV_F16, (size_t)o->length, r->job->threads, &r->runner, r->err);
  if (!status && (o->correct || (o->keys.mode == QTR_SMOOTH_GRID && r->job->kv != QTR_KV_F16))) {
    status = qtr_runner_open(r->config, r->job->kv, (size_t)o->length, r->job->threads, &r->quantised, r->err);
  }
  if (!status) {
    status = qtr_observed_create(r->job->team, r->config, (o->gptq || o->correct) && r->job->format > QTR_LINEAR_BF16,
                                 (size_t)o->n_samples, KEPT_INPUTS, &r->observed, r->err);
  }
  if (status) return status;
  r->x = malloc(state_floats(r) * sizeof *r->x);
  return r->x ? QTR_OK : qtr_fail_memory(r->err, "hidden states", state_floats(r) * sizeof *r->x);
}

/* Whether the hidden states are whole that a run with finished layers goes on from. */
static bool states_there(const struct run *r, int32_t layer) {
  const char *dir = r->work->dir;
  size_t n = r->calibration.n_samples, each = state_floats(r);
  return qtr_states_whole(dir, QTR_STATES_FLOAT, layer, n, each) &&
         (!r->options->correct || qtr_states_whole(dir, QTR_STATES_QUANTISED, layer, n, each));
}

enum qtr_status qtr_calibrate(const struct qtr_calibrate_job *job, struct qtr_work *work, struct qtr_error *err) {
  struct run r = {.job = job,
                  .options = job->options,
                  .config = job->config,
                  .work = work,
                  .err = err,
                  .in = {.fd = -1},
                  .out = {.fd = -1}};
  *work = (struct qtr_work){0};
  enum qtr_status status = prepare(&r);
  json_t *settings = status ? NULL : settings_of(&r);
  if (!status && !settings) status = qtr_fail_memory(err, "settings", 0);
  if (!status) status = qtr_work_open(job->work_dir, settings, job->options->fresh, work, err);
  if (!status && work->n_done > 0 && work->n_done < job->config->n_layers && !states_there(&r, work->n_done)) {
    qtr_work_close(work, false); /* the layers are there but not what comes out of them: from the beginning */
    status = qtr_work_open(job->work_dir, settings, true, work, err);
  }
  json_decref(settings);
  if (!status && job->options->correct) {
    status = qtr_corrector_open(&r.observed, &r.quantised, work->dir, r.calibration.n_samples, &r.corrector, err);
  }
  r.steps_per_layer = r.calibration.n_samples + (job->format > QTR_LINEAR_BF16 ? QTR_N_PROJECTIONS : 0);
  qtr_progress_start(&r.progress, "calibrating", r.steps_per_layer * (size_t)job->config->n_layers, job->quiet);
  if (!status && work->n_done == 0) status = embed(&r);
  if (!status && work->n_done > 0 && work->n_done < job->config->n_layers)
    status = open_states(&r, work->n_done, false, &r.in);
  r.n_steps_done = (size_t)work->n_done * r.steps_per_layer;
  for (int32_t i = work->n_done; i < job->config->n_layers && !status; i++) {
    struct qtr_work_layer done = {.floats = {.config = job->config, .index = i}};
    status = finish_layer(&r, i, &done);
    if (!status)
      status = qtr_work_save(work, &done, err); /* the states after it are there: from here on a run goes on behind it */
    qtr_work_layer_free(&done);
    if (status) break;
    qtr_states_close(&r.in, true);
    r.in = r.out;
    r.out = (struct qtr_states){.fd = -1};
    if (!job->options->correct) continue;
    qtr_states_close(&r.corrector.in, true);
    r.corrector.in = r.corrector.out;
    r.corrector.out = (struct qtr_states){.fd = -1};
  }
  qtr_progress_end(&r.progress);
  qtr_states_close(&r.in, false);
  qtr_states_close(&r.out, false);
  qtr_corrector_close(&r.corrector);
  qtr_observed_free(&r.observed);
  qtr_runner_close(&r.runner);
  qtr_runner_close(&r.quantised);
  qtr_rotation_free(&r.hidden);
  qtr_rotation_free(&r.head);
  qtr_calibration_free(&r.calibration);
  free(r.x);
  return status;
}
