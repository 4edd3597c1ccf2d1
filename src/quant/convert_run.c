/* convert_run.c - carries out the plan of convert.c job by job through the sink; one projection is in memory at a time.
 *
 * GPTQ with desc_act: the groups of a matrix are then not consecutive inputs but those that g_idx says, and W4A8 has
 * consecutive ones. The inputs of down_proj are free to be reordered, since the rows of gate_proj and up_proj, which make
 * them, can be written in the same order: exact. The inputs of the other projections are shared with the residual stream or
 * with the heads, so these are dequantised and rounded anew. */
#include "quant/convert_internal.h"

#include "base/checked.h"
#include "base/status.h"
#include "quant/fake.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static double relative(const struct qtr_rtn_error *e) { return e->norm > 0 ? sqrt(e->squared / e->norm) : 0; }

/* c->order for the layer of a job: what desc_act did to its down_proj. */
static enum qtr_status find_order(struct qtr_convert_work *c, int32_t layer) {
  if (c->kind != QTR_CONVERT_GPTQ || c->ordered_layer == layer) return QTR_OK;
  struct qtr_slot down = {.part = QTR_SLOT_PROJECTION, .layer = layer, .projection = "down_proj"};
  down.n_out = (size_t)c->config.hidden_size;
  down.n_in = (size_t)c->config.intermediate_size;
  (void)snprintf(down.name, sizeof down.name, "model.layers.%d.mlp.down_proj", (int)layer);
  const size_t group = c->group_size == -1 ? down.n_in : (size_t)c->group_size;
  uint32_t *g_idx = NULL;
  enum qtr_status status = qtr_int4_load_order(&c->source, &down, group, &g_idx, c->err);
  free(c->order);
  c->order = NULL;
  c->ordered_layer = layer;
  if (status || !g_idx) return status;
  c->order = malloc(down.n_in * sizeof *c->order);
  if (!c->order) {
    status = qtr_fail_memory(c->err, "an order", down.n_in * sizeof *c->order);
  } else if (!qtr_int4_order(g_idx, down.n_in, group, c->order)) {
    free(c->order); /* groups of different sizes: down_proj will be rounded anew */
    c->order = NULL;
  }
  c->summary->n_reordered += c->order != NULL;
  free(g_idx);
  return status;
}

/* A float matrix or vector whose rows (elements) c->order says. */
static enum qtr_status write_reordered(struct qtr_convert_work *c, const struct qtr_convert_job *j,
                                       struct qtr_rtn_error *error) {
  const size_t n = (size_t)c->config.intermediate_size, in = j->tensor->n_dims == 2 ? j->slot.n_in : 1;
  float *w = malloc(n * in * sizeof *w), *rows = malloc(n * in * sizeof *rows);
  enum qtr_status status = QTR_OK;
  if (!w || !rows) {
    status = qtr_fail_memory(c->err, j->slot.name, n * in * sizeof *w);
  } else {
    qtr_source_floats(j->tensor, w, c->team);
    for (size_t k = 0; k < n; k++) memcpy(rows + k * in, w + c->order[k] * in, in * sizeof *w);
    status = qtr_sink_write_floats(c->sink, j->slot.name, rows, j->tensor->n_dims == 2 ? n : 1, error, c->err);
  }
  free(w);
  free(rows);
  return status;
}

static enum qtr_status write_tensor(struct qtr_convert_work *c, const struct qtr_convert_job *j,
                                    struct qtr_rtn_error *error) {
  enum qtr_status status = j->inner ? find_order(c, j->slot.layer) : QTR_OK;
  if (status) return status;
  if (j->inner && c->order) return write_reordered(c, j, error);
  return qtr_source_write(j->tensor, j->store, j->slot.name, c->sink, c->team, NULL, NULL, error, c->err);
}

static enum qtr_status write_kv(struct qtr_convert_work *c, const struct qtr_convert_job *j) {
  const float pair[2] = {qtr_kv_scales_tensor(&c->kv, j->slot.layer, 0), qtr_kv_scales_tensor(&c->kv, j->slot.layer, 1)};
  return qtr_sink_write_raw(c->sink, j->slot.name, pair, sizeof pair, c->err);
}

static enum qtr_status write_fake(struct qtr_convert_work *c, const struct qtr_convert_job *j, struct qtr_rtn_error *error) {
  struct qtr_fake_load load;
  struct qtr_int_matrix m = {0};
  float *row = NULL;
  enum qtr_status status = qtr_fake_read(&c->source, &c->scales, &j->slot, c->team, &load, c->err);
  if (status) return status;
  const struct qtr_fake_matrix fake = {.n_out = j->slot.n_out,
                                       .n_in = j->slot.n_in,
                                       .w = load.w,
                                       .type = load.type,
                                       .s0 = load.s0,
                                       .s1 = load.s1,
                                       .zero = load.zero,
                                       .scaled = load.scaled};
  status = qtr_int_matrix_create(c->store, fake.n_out, fake.n_in, &m, c->err);
  if (!status && (status = qtr_fake_codes(&fake, c->team, &m, c->err))) (void)qtr_error_prefix(c->err, "%s", j->slot.name);
  if (!status && !(row = malloc(fake.n_in * sizeof *row))) status = qtr_fail_memory(c->err, "a row", fake.n_in);
  for (size_t r = 0; r < fake.n_out && !status; r++) {
    qtr_int_matrix_row(&m, r, row);
    for (size_t i = 0; i < fake.n_in; i++) {
      double w = fake.w[r * fake.n_in + i], d = w - (double)row[i];
      error->squared += d * d;
      error->norm += w * w;
      error->max = fmax(error->max, fabs(d));
    }
  }
  const struct qtr_sink_codes codes = qtr_int_matrix_codes(&m);
  if (!status) status = qtr_sink_write_codes(c->sink, j->slot.name, &codes, fake.n_out, c->err);
  free(row);
  qtr_int_matrix_free(&m);
  qtr_fake_free(&load);
  return status;
}

/* Dequantised and rounded anew. */
static enum qtr_status round_again(struct qtr_convert_work *c, const struct qtr_convert_job *j,
                                   const struct qtr_int4_matrix *m, struct qtr_rtn_error *error) {
  enum { ROWS = 1024 };
  float *w = malloc(QTR_MIN(m->n_out, (size_t)ROWS) * m->n_in * sizeof *w);
  if (!w) return qtr_fail_memory(c->err, j->slot.name, ROWS * m->n_in * sizeof *w);
  enum qtr_status status = QTR_OK;
  for (size_t row = 0; row < m->n_out && !status; row += ROWS) {
    size_t n = QTR_MIN(m->n_out - row, (size_t)ROWS);
    for (size_t r = 0; r < n; r++) qtr_int4_row(m, row + r, w + r * m->n_in);
    status = qtr_sink_write_floats(c->sink, j->slot.name, w, n, error, c->err);
  }
  free(w);
  return status;
}

static enum qtr_status write_int4(struct qtr_convert_work *c, const struct qtr_convert_job *j, const char **how,
                                  struct qtr_rtn_error *error) {
  struct qtr_int4_matrix m;
  struct qtr_int_matrix out = {0};
  struct qtr_int4_moved moved = {0};
  bool mlp = j->inner || strcmp(j->slot.projection, "down_proj") == 0;
  enum qtr_status status = mlp ? find_order(c, j->slot.layer) : QTR_OK;
  if (status || (status = qtr_int4_load(&c->source, &j->slot, c->kind, c->group_size, c->plus, &m, c->err))) return status;
  if (c->order && j->inner) status = qtr_int4_permute_rows(&m, c->order, c->err);
  if (c->order && mlp && !j->inner) status = qtr_int4_permute_columns(&m, c->order, c->err);
  if (status) goto done;
  if (m.g_idx) {
    *how = "rounded anew: desc_act";
    status = round_again(c, j, &m, error);
    goto done;
  }
  if ((status = qtr_int_matrix_create(c->store, m.n_out, m.n_in, &out, c->err))) goto done;
  status = qtr_int4_to_w4a8(&m, c->team, &out, error, &moved, c->err);
  if (status) {
    (void)qtr_error_prefix(c->err, "%s", j->slot.name);
    goto done;
  }
  if (moved.n_groups > 0) *how = "scales moved";
  c->summary->n_groups_moved += moved.n_groups;
  c->summary->n_groups_rounded += moved.n_rounded;
  const struct qtr_sink_codes codes = qtr_int_matrix_codes(&out);
  status = qtr_sink_write_codes(c->sink, j->slot.name, &codes, m.n_out, c->err);
done:
  qtr_int_matrix_free(&out);
  qtr_int4_free(&m);
  return status;
}

/* Integers and fp16 as they are count as exact, floats that were rounded do not. */
static void count(struct qtr_convert_work *c, const char *how) {
  c->summary->n_exact += strcmp(how, "exact") == 0;
  c->summary->n_moved += strcmp(how, "scales moved") == 0;
  c->summary->n_rounded += strncmp(how, "rounded", 7) == 0;
}

static enum qtr_status run_job(struct qtr_convert_work *c, const struct qtr_convert_job *j, const char **how,
                               struct qtr_rtn_error *error) {
  *how = "exact";
  enum qtr_status status;
  switch (j->kind) {
    case JOB_KV: return write_kv(c, j);
    case JOB_FAKE: return write_fake(c, j, error);
    case JOB_INT4: status = write_int4(c, j, how, error); break;
    default:
      status = write_tensor(c, j, error);
      if (error->squared > 0) *how = "rounded";
  }
  if (status || !c->options->strict || strcmp(*how, "exact") == 0) return status;
  return qtr_fail(c->err, QTR_ERR_UNSUPPORTED,
                  "%s: not exact (%s; the weights would move by %.3g %%), and strict was asked for", j->slot.name, *how,
                  relative(error) * 100);
}

enum qtr_status qtr_convert_run(struct qtr_convert_work *c, qtr_quantize_callback callback, void *user) {
  struct qtr_progress progress;
  struct qtr_rtn_error total = {0};
  enum qtr_status status = QTR_OK;
  qtr_progress_start(&progress, "converting", c->n_jobs, c->options->quiet);
  for (size_t i = 0; i < c->n_jobs && !status; i++) {
    const struct qtr_convert_job *j = &c->job[i];
    struct qtr_rtn_error error = {0};
    const char *how;
    status = run_job(c, j, &how, &error);
    if (j->kind != JOB_TENSOR) qtr_checkpoint_forget(c->source.checkpoint); /* what was read stays in the file */
    qtr_progress_update(&progress, i + 1);
    if (status || !j->slot.projection) continue;
    count(c, how);
    if (j->slot.layer >= 0) {
      total.squared += error.squared;
      total.norm += error.norm;
    }
    struct qtr_quantize_report report = {.layer = j->slot.layer,
                                         .n_layers = c->config.n_layers,
                                         .projection = j->slot.projection,
                                         .tensor = j->slot.name,
                                         .how = how,
                                         .n_out = j->slot.n_out,
                                         .n_in = j->slot.n_in,
                                         .relative_error = relative(&error),
                                         .squared_error = error.squared,
                                         .squared_norm = error.norm,
                                         .max_error = error.max};
    if (callback) callback(&report, user);
  }
  qtr_progress_end(&progress);
  c->summary->quantize.relative_error = relative(&total);
  return status;
}
