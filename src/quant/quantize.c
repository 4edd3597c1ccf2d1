/* quantize.c - from a float checkpoint to a QServe checkpoint, by round to nearest or QoQ (quantize.h; spec A.2 – A.4, F.6).
 *
 * First a plan is made: every tensor of the output (quant/layout.h) with its source, shapes checked, before a byte is
 * written. Then the plan is carried out job by job in chunks of rows: the source is mapped, a chunk of it becomes floats and
 * goes to the sink, which rounds and packs it; so memory stays at some chunks plus the scales of one matrix, whatever the
 * model's size. With QoQ (qoq.h) the calibration runs between the two and leaves finished layers in a work directory, and
 * the jobs take them from there (qoq_write.h). */
#include "quant/quantize.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/file.h"
#include "base/progress.h"
#include "base/status.h"
#include "base/threads.h"
#include "quant/qoq_write.h"
#include "quant/source.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* One tensor of the source and what it becomes. */
struct job {
  enum qtr_store store;
  const struct qtr_tensor *tensor;
  struct qtr_slot slot;
  bool bias;
};

struct plan {
  const struct qtr_quantize_options *options;
  const struct qtr_qoq_options *qoq; /* NULL: round to nearest */
  struct qtr_config config;
  struct qtr_source source;
  enum qtr_store projection_store, float_store;
  int32_t group_size;
  struct qtr_threads *team;
  struct qtr_sink *sink;
  struct job *job; /* (n_jobs) */
  size_t n_jobs, job_capacity;
  size_t input_bytes;
  float *kv_pair;               /* (n_layers, 2) of options->kv_scales */
  struct qtr_tensor *kv_tensor; /* (n_layers) the same as tensors */
  struct qtr_error *err;
};

void qtr_quantize_options_init(struct qtr_quantize_options *options) {
  *options = (struct qtr_quantize_options){.precision = {.weight_bits = 4, .act_bits = 8, .kv_bits = 4}};
}

/* ---- the plan ------------------------------------------------------------------------------------ */

static enum qtr_status check_options(struct plan *p) {
  const struct qtr_quantize_options *o = p->options;
  if (!o->model_dir || !o->output_dir)
    return qtr_fail(p->err, QTR_ERR_ARGUMENT, "a source and an output directory are required");
  if (o->method && strcmp(o->method, "rtn") != 0 && strcmp(o->method, "qoq") != 0) {
    return qtr_fail(p->err, QTR_ERR_ARGUMENT, "unknown method \"%.40s\"; rtn and qoq are the ones there are", o->method);
  }
  p->qoq = o->method && strcmp(o->method, "qoq") == 0 ? o->qoq : NULL;
  if (o->method && strcmp(o->method, "qoq") == 0 && (!o->qoq || !o->qoq->calibration)) {
    return qtr_fail(p->err, QTR_ERR_ARGUMENT, "method qoq needs a calibration text");
  }
  const struct qtr_precision *q = &o->precision;
  bool w4 = q->weight_bits == 4 && q->act_bits == 8, w8 = q->weight_bits == 8 && q->act_bits == 8;
  if (!w4 && !w8 && !(q->weight_bits == 16 && q->act_bits == 16)) {
    return qtr_fail(p->err, QTR_ERR_ARGUMENT, "precision w%da%d is not supported; w4a8, w8a8 and w16a16 are",
                    (int)q->weight_bits, (int)q->act_bits);
  }
  p->group_size = o->group_size ? o->group_size : w4 ? QTR_GROUP : -1;
  if (p->group_size != -1 && !(w4 && p->group_size == QTR_GROUP)) {
    return qtr_fail(p->err, QTR_ERR_ARGUMENT, "group size %d is not supported with %d-bit weights; %s", (int)p->group_size,
                    (int)q->weight_bits, w4 ? "128 and -1 (per channel) are" : "only -1 (per channel) is");
  }
  p->float_store = p->qoq && p->qoq->keep_float32 ? QTR_STORE_RAW : o->bf16 ? QTR_STORE_BF16 : QTR_STORE_F16;
  p->projection_store = !w4 ? (w8 ? QTR_STORE_W8 : p->float_store) : p->group_size == -1 ? QTR_STORE_W4 : QTR_STORE_W4_G128;
  return qtr_threads_create(o->threads > 0 ? QTR_MIN(o->threads, 1024) : qtr_threads_available(), &p->team, p->err);
}

static enum qtr_status add_job(struct plan *p, enum qtr_store store, const struct qtr_tensor *tensor,
                               const struct qtr_slot *slot, const char *suffix) {
  if (p->n_jobs == p->job_capacity) {
    size_t capacity = p->job_capacity ? 2 * p->job_capacity : 256;
    struct job *more = realloc(p->job, capacity * sizeof *more);
    if (!more) return qtr_fail_memory(p->err, "the plan", capacity * sizeof *more);
    p->job = more;
    p->job_capacity = capacity;
  }
  struct job *j = &p->job[p->n_jobs++];
  *j = (struct job){.store = store, .tensor = tensor, .slot = *slot, .bias = strcmp(suffix, ".bias") == 0};
  if (j->bias) j->slot.projection = NULL;
  p->input_bytes += tensor ? tensor->n_bytes : 0;
  if (store == QTR_STORE_RAW && p->qoq) { /* transformed: not what the source holds */
    const struct qtr_sink_item item = {.store = store,
                                       .name = slot->name,
                                       .suffix = suffix,
                                       .dtype = QTR_DTYPE_F32,
                                       .n_dims = tensor && tensor->n_dims == 2 ? 2 : 1,
                                       .n_out = tensor ? qtr_source_rows(tensor) : 1,
                                       .n_in = tensor ? qtr_source_columns(tensor) : slot->n_in};
    return qtr_sink_add(p->sink, &item, p->err);
  }
  return qtr_source_announce(tensor, store, slot->name, suffix, p->sink, p->err);
}

/* <name><suffix> (n) -> fp16 or bf16. */
static enum qtr_status plan_vector(struct plan *p, const struct qtr_slot *slot, const char *suffix, size_t n) {
  const struct qtr_tensor *t;
  enum qtr_status status = qtr_source_get(&p->source, slot->name, suffix, 1, &n, &t, p->err);
  return status ? status : add_job(p, p->float_store, t, slot, suffix);
}

static enum qtr_status plan_projection(struct plan *p, const struct qtr_slot *slot) {
  const struct qtr_tensor *t;
  const size_t shape[2] = {slot->n_out, slot->n_in};
  enum qtr_status status = qtr_source_get(&p->source, slot->name, ".weight", 2, shape, &t, p->err);
  if (!status) status = add_job(p, p->projection_store, t, slot, ".weight");
  if (!status && qtr_source_find(&p->source, slot->name, ".bias")) status = plan_vector(p, slot, ".bias", slot->n_out);
  return status;
}

static enum qtr_status plan_slot(const struct qtr_slot *slot, void *user) {
  struct plan *p = user;
  const struct qtr_tensor *t;
  enum qtr_status status;
  bool int8 = slot->part == QTR_SLOT_EMBED ? p->options->embed_int8 : p->options->head_int8;
  switch (slot->part) {
    case QTR_SLOT_NORM: return plan_vector(p, slot, ".weight", slot->n_in);
    case QTR_SLOT_PROJECTION: return plan_projection(p, slot);
    case QTR_SLOT_KV_SCALE:
      if (p->qoq && p->qoq->static_kv) return add_job(p, QTR_STORE_RAW, NULL, slot, "");
      if (p->kv_tensor) {
        (void)qtr_source_find(&p->source, slot->name, ""); /* replaced */
        return add_job(p, QTR_STORE_RAW, &p->kv_tensor[slot->layer], slot, "");
      }
      if (!qtr_source_find(&p->source, slot->name, "") || p->qoq) return QTR_OK; /* smoothing makes them other keys */
      status = qtr_source_get(&p->source, slot->name, "", 1, &slot->n_in, &t, p->err);
      return status ? status : add_job(p, QTR_STORE_RAW, t, slot, "");
    default: /* padded vocabularies keep their padding */
      status = qtr_source_vocab(&p->source, slot, &t, p->err);
      return status ? status : add_job(p, int8 ? QTR_STORE_W8 : p->float_store, t, slot, ".weight");
  }
}

static enum qtr_status make_kv_tensors(struct plan *p) {
  const struct qtr_kv_scales *scales = p->options->kv_scales;
  size_t n = (size_t)p->config.n_layers;
  if (!scales) return QTR_OK;
  p->kv_pair = malloc(n * 2 * sizeof *p->kv_pair);
  p->kv_tensor = calloc(n, sizeof *p->kv_tensor);
  if (!p->kv_pair || !p->kv_tensor) return qtr_fail_memory(p->err, "KV scales", n * sizeof *p->kv_tensor);
  for (int32_t i = 0; i < p->config.n_layers; i++) {
    float *pair = &p->kv_pair[2 * i];
    for (int v = 0; v < 2; v++) pair[v] = qtr_kv_scales_tensor(scales, i, v);
    p->kv_tensor[i] = (struct qtr_tensor){.name = "kv_scale_quant_orig",
                                          .dtype = QTR_DTYPE_F32,
                                          .n_dims = 1,
                                          .shape = {2},
                                          .data = pair,
                                          .n_bytes = 2 * sizeof *pair};
  }
  return QTR_OK;
}

static enum qtr_status make_plan(struct plan *p) {
  enum qtr_linear_format format;
  enum qtr_status status = qtr_checkpoint_format(p->source.checkpoint, &format, p->err);
  if (status) return status;
  if (format > QTR_LINEAR_BF16) {
    return qtr_fail(p->err, QTR_ERR_UNSUPPORTED, "the source is %s already; start from the float checkpoint",
                    qtr_linear_format_name(format));
  }
  if ((status = make_kv_tensors(p)) || (status = qtr_layout_walk(&p->config, plan_slot, p))) return status;
  return qtr_source_leftovers(&p->source, p->err);
}

/* ---- the work ------------------------------------------------------------------------------------ */

static double relative(double squared, double norm) { return norm > 0 ? sqrt(squared / norm) : 0; }

/* One matrix or vector to the sink, and what it cost into the report. */
static enum qtr_status run_job(const struct plan *p, struct qtr_qoq_writer *writer, const struct job *j,
                               struct qtr_progress *progress, size_t *done, struct qtr_quantize_report *report) {
  struct qtr_rtn_error error = {0};
  double outputs[3] = {0, 0, 0};
  enum qtr_status status =
      writer ? qtr_qoq_write(writer, &j->slot, j->bias, j->tensor, j->store, outputs, p->err)
             : qtr_source_write(j->tensor, j->store, j->slot.name, p->sink, p->team, progress, done, &error, p->err);
  if (status || !j->slot.projection) return status;
  if (writer) error = (struct qtr_rtn_error){.squared = outputs[1], .norm = outputs[2], .max = NAN};
  *report = (struct qtr_quantize_report){.layer = j->slot.layer,
                                         .n_layers = p->config.n_layers,
                                         .projection = j->slot.projection,
                                         .tensor = j->slot.name,
                                         .how = writer ? "calibrated" : "rounded",
                                         .n_out = qtr_source_rows(j->tensor),
                                         .n_in = qtr_source_columns(j->tensor),
                                         .relative_error = relative(error.squared, error.norm),
                                         .squared_error = error.squared,
                                         .squared_norm = error.norm,
                                         .max_error = error.max,
                                         .plain_squared_error = outputs[0],
                                         .calibration = writer && j->slot.layer >= 0 ? writer->layer.report : NULL};
  return QTR_OK;
}

static enum qtr_status run_plan(const struct plan *p, struct qtr_qoq_writer *writer, qtr_quantize_callback callback,
                                void *user, double *relative_error) {
  struct qtr_progress progress;
  size_t done = 0;
  double squared = 0, norm = 0;
  enum qtr_status status = QTR_OK;
  qtr_progress_start(&progress, writer ? "writing" : "quantising", p->input_bytes, p->options->quiet);
  for (size_t i = 0; i < p->n_jobs && !status; i++) {
    const struct job *j = &p->job[i];
    struct qtr_quantize_report report;
    status = run_job(p, writer, j, &progress, &done, &report);
    if (status || !j->slot.projection) continue;
    if (report.layer >= 0) {
      squared += report.squared_error;
      norm += report.squared_norm;
    }
    if (callback) callback(&report, user);
  }
  qtr_progress_end(&progress);
  *relative_error = relative(squared, norm);
  return status;
}

static enum qtr_linear_format projection_format(const struct plan *p) {
  switch (p->projection_store) {
    case QTR_STORE_W4: return QTR_LINEAR_W4A8;
    case QTR_STORE_W4_G128: return QTR_LINEAR_W4A8_G128;
    case QTR_STORE_W8: return QTR_LINEAR_W8A8;
    default: return QTR_LINEAR_F16;
  }
}

/* QoQ: calibrates into the work directory, then writes from there. */
static enum qtr_status run_qoq(struct plan *p, const struct qtr_sink_target *target, qtr_quantize_callback callback,
                               void *user, double *relative_error) {
  const struct qtr_quantize_options *o = p->options;
  struct qtr_work work = {0};
  struct qtr_qoq_writer writer = {.index = -1};
  bool made = false, done = false;
  char *dir = qtr_path_join(o->output_dir, ".calibration");
  enum qtr_status status = dir ? QTR_OK : qtr_fail_memory(p->err, "a path", strlen(o->output_dir));
  int32_t kv_bits = target->description.kv_bits;
  struct qtr_calibrate_job job = {.options = p->qoq,
                                  .tokenizer_dir = target->source_dir,
                                  .work_dir = dir,
                                  .config = &p->config,
                                  .source = &p->source,
                                  .format = projection_format(p),
                                  .kv = kv_bits == 4   ? QTR_KV_INT4
                                        : kv_bits == 8 ? QTR_KV_INT8
                                                       : QTR_KV_F16,
                                  .team = p->team,
                                  .threads = o->threads,
                                  .quiet = o->quiet};
  /* Hours later is too late to find that there is a model already. */
  if (!status) status = qtr_quant_prepare_directory(target->source_dir, o->output_dir, o->overwrite, &made, p->err);
  if (!status) status = qtr_calibrate(&job, &work, p->err);
  if (!status) status = qtr_sink_open(p->sink, target, p->err);
  if (!status) status = qtr_qoq_writer_open(&job, &work, p->sink, &writer, p->err);
  if (!status) status = run_plan(p, &writer, callback, user, relative_error);
  if (!status) status = qtr_sink_finish(p->sink, p->err);
  done = status == QTR_OK;
  qtr_qoq_writer_close(&writer);
  qtr_work_close(&work, done);
  free(dir);
  return status;
}

enum qtr_status qtr_quantize(const struct qtr_quantize_options *options, qtr_quantize_callback callback, void *user,
                             struct qtr_quantize_summary *summary, struct qtr_error *err) {
  double t0 = qtr_now(), error = 0;
  const char *config_dir = options->config_dir ? options->config_dir : options->model_dir;
  struct plan p = {.options = options, .err = err};
  char name[16];
  enum qtr_status status = check_options(&p);
  if (status || (status = qtr_config_read(config_dir, &p.config, err)) ||
      (status = qtr_source_open(options->model_dir, QTR_S2_BY_NAME, &p.config, &p.source, err)) ||
      (status = qtr_sink_create(p.team, &p.sink, err))) {
    goto done;
  }
  if ((status = make_plan(&p))) {
    (void)qtr_error_prefix(err, "%s", options->model_dir);
    goto done;
  }
  const struct qtr_precision *q = &options->precision;
  int32_t kv_bits = q->kv_bits ? q->kv_bits : q->weight_bits == 16 ? 16 : 8;
  int n = snprintf(name, sizeof name, "w%da%d", (int)q->weight_bits & 31, (int)q->act_bits & 31);
  if (q->weight_bits != 16 || kv_bits != 16) (void)snprintf(name + n, sizeof name - (size_t)n, "kv%d", (int)kv_bits & 31);
  const struct qtr_sink_target target = {.source_dir = config_dir,
                                         .output_dir = options->output_dir,
                                         .overwrite = options->overwrite,
                                         .description = {.precision = name,
                                                         .method = p.qoq ? "qoq" : "rtn",
                                                         .untied = p.qoq && p.qoq->rotate,
                                                         .weight_bits = q->weight_bits,
                                                         .act_bits = q->act_bits,
                                                         .kv_bits = kv_bits,
                                                         .group_size = p.group_size,
                                                         .head_bits = options->head_int8 ? 8 : 16,
                                                         .embed_bits = options->embed_int8 ? 8 : 16}};
  if (p.qoq) {
    status = run_qoq(&p, &target, callback, user, &error);
  } else if (!(status = qtr_sink_open(p.sink, &target, err)) && !(status = run_plan(&p, NULL, callback, user, &error))) {
    status = qtr_sink_finish(p.sink, err);
  }
  if (status) goto done;
  if (summary) {
    *summary = (struct qtr_quantize_summary){.group_size = p.group_size,
                                             .n_layers = p.config.n_layers,
                                             .n_tensors = qtr_sink_tensors(p.sink),
                                             .input_bytes = p.input_bytes,
                                             .output_bytes = qtr_sink_bytes(p.sink),
                                             .relative_error = error,
                                             .seconds = qtr_now() - t0};
    memcpy(summary->precision, name, sizeof name);
  }
done:
  qtr_sink_free(p.sink);
  qtr_threads_free(p.team);
  qtr_source_close(&p.source);
  free(p.kv_pair);
  free(p.kv_tensor);
  free(p.job);
  return status;
}
