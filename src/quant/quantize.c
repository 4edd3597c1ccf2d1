/* quantize.c - from a float checkpoint to a QServe checkpoint by round to nearest (quantize.h; spec A.2 – A.4, F.6).
 *
 * First a plan is made: every tensor of the output (quant/layout.h) with its source, shapes checked, before a byte is
 * written. Then the plan is carried out job by job in chunks of rows: the source is mapped, a chunk of it becomes floats and
 * goes to the sink, which rounds and packs it; so memory stays at some chunks plus the scales of one matrix, whatever the
 * model's size. */
#include "quant/quantize.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/file.h"
#include "base/progress.h"
#include "base/status.h"
#include "base/threads.h"
#include "quant/layout.h"
#include "quant/sink.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK_BYTES ((size_t)32 << 20) /* of floats */

/* One tensor of the source and what it becomes. */
struct job {
  enum qtr_store store;
  const struct qtr_tensor *source;
  struct qtr_slot slot;
  size_t n_out, n_in; /* of the source: a vocabulary may be padded; vectors: (1, n) */
};

struct plan {
  const struct qtr_quantize_options *options;
  const struct qtr_checkpoint *checkpoint;
  struct qtr_config config;
  enum qtr_store projection_store;
  int32_t group_size;
  struct qtr_threads *team;
  struct qtr_sink *sink;
  struct job *job; /* (n_jobs) */
  size_t n_jobs, job_capacity;
  size_t input_bytes;
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
  if (o->method && strcmp(o->method, "rtn") != 0) {
    return qtr_fail(p->err, QTR_ERR_ARGUMENT, "unknown method \"%.40s\"; rtn is the one there is", o->method);
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
  p->projection_store = !w4 ? (w8 ? QTR_STORE_W8 : QTR_STORE_F16) : p->group_size == -1 ? QTR_STORE_W4 : QTR_STORE_W4_G128;
  return qtr_threads_create(o->threads > 0 ? QTR_MIN(o->threads, 1024) : qtr_threads_available(), &p->team, p->err);
}

static enum qtr_status add_job(struct plan *p, enum qtr_store store, const struct qtr_tensor *source,
                               const struct qtr_slot *slot, const char *suffix) {
  if (p->n_jobs == p->job_capacity) {
    size_t capacity = p->job_capacity ? 2 * p->job_capacity : 256;
    struct job *more = realloc(p->job, capacity * sizeof *more);
    if (!more) return qtr_fail_memory(p->err, "the plan", capacity * sizeof *more);
    p->job = more;
    p->job_capacity = capacity;
  }
  struct job *j = &p->job[p->n_jobs++];
  bool matrix = source->n_dims == 2;
  *j = (struct job){.store = store, .source = source, .slot = *slot};
  if (!matrix) j->slot.projection = NULL; /* a bias */
  j->n_in = source->n_dims == 0 ? 1 : source->shape[source->n_dims - 1];
  j->n_out = matrix ? source->shape[0] : 1;
  p->input_bytes += source->n_bytes;
  if (store != QTR_STORE_RAW && source->dtype > QTR_DTYPE_F64) {
    return qtr_fail(p->err, QTR_ERR_UNSUPPORTED, "tensor %s has dtype %s; the source must hold float weights", source->name,
                    qtr_dtype_name(source->dtype));
  }
  const struct qtr_sink_item item = {store, slot->name, suffix, source->dtype, matrix ? 2 : 1, j->n_out, j->n_in};
  return qtr_sink_add(p->sink, &item, p->err);
}

/* <name><suffix> (n) -> fp16. */
static enum qtr_status plan_vector(struct plan *p, const struct qtr_slot *slot, const char *suffix, size_t n) {
  char full[QTR_SLOT_NAME + 16];
  const struct qtr_tensor *t;
  (void)snprintf(full, sizeof full, "%s%s", slot->name, suffix);
  enum qtr_status status = qtr_checkpoint_get(p->checkpoint, full, 1, &n, &t, p->err);
  return status ? status : add_job(p, QTR_STORE_F16, t, slot, suffix);
}

static enum qtr_status plan_projection(struct plan *p, const struct qtr_slot *slot) {
  char full[QTR_SLOT_NAME + 16];
  const struct qtr_tensor *t;
  const size_t shape[2] = {slot->n_out, slot->n_in};
  (void)snprintf(full, sizeof full, "%s.weight", slot->name);
  enum qtr_status status = qtr_checkpoint_get(p->checkpoint, full, 2, shape, &t, p->err);
  if (!status) status = add_job(p, p->projection_store, t, slot, ".weight");
  (void)snprintf(full, sizeof full, "%s.bias", slot->name);
  if (!status && qtr_checkpoint_find(p->checkpoint, full)) status = plan_vector(p, slot, ".bias", slot->n_out);
  return status;
}

/* Embedding or head: (rows >= vocab_size, hidden); padded vocabularies keep their padding. */
static enum qtr_status plan_vocab(struct plan *p, const char *source, const struct qtr_slot *slot, bool int8) {
  char full[QTR_SLOT_NAME + 16];
  const size_t shape[2] = {slot->n_out, slot->n_in};
  (void)snprintf(full, sizeof full, "%s.weight", source);
  const struct qtr_tensor *t = qtr_checkpoint_find(p->checkpoint, full);
  if (!t || t->n_dims != 2 || t->shape[0] < shape[0] || t->shape[1] != shape[1]) {
    return qtr_checkpoint_get(p->checkpoint, full, 2, shape, &t, p->err); /* says what is wrong */
  }
  return add_job(p, int8 ? QTR_STORE_W8 : QTR_STORE_F16, t, slot, ".weight");
}

static enum qtr_status plan_slot(const struct qtr_slot *slot, void *user) {
  struct plan *p = user;
  const struct qtr_tensor *t;
  switch (slot->part) {
    case QTR_SLOT_EMBED: return plan_vocab(p, slot->name, slot, p->options->embed_int8);
    case QTR_SLOT_NORM: return plan_vector(p, slot, ".weight", slot->n_in);
    case QTR_SLOT_PROJECTION: return plan_projection(p, slot);
    case QTR_SLOT_KV_SCALE:
      t = qtr_checkpoint_find(p->checkpoint, slot->name);
      return t && t->n_dims == 1 ? add_job(p, QTR_STORE_RAW, t, slot, "") : QTR_OK;
    case QTR_SLOT_HEAD: break;
  }
  /* A tied head gets its own tensor: QServe's loaders look for lm_head.weight (A.2.4). */
  bool own = qtr_checkpoint_find(p->checkpoint, "lm_head.weight") != NULL;
  const char *head = own || !p->config.tie_word_embeddings ? slot->name : "model.embed_tokens";
  return plan_vocab(p, head, slot, p->options->head_int8);
}

/* A tensor inside a layer that no job reads changes what the layer computes: better refused than dropped. */
static enum qtr_status check_leftovers(const struct plan *p) {
  static const char *const harmless[] = {".inv_freq", ".masked_bias"};
  enum qtr_status status = QTR_OK;
  size_t n = qtr_checkpoint_count(p->checkpoint);
  const struct qtr_tensor *first = qtr_checkpoint_at(p->checkpoint, 0);
  uint8_t *seen = calloc(n + 1, 1);
  if (!seen) return qtr_fail_memory(p->err, "the plan", n);
  for (size_t i = 0; i < p->n_jobs; i++) seen[p->job[i].source - first] = 1;
  for (size_t i = 0; i < n && !status; i++) {
    const struct qtr_tensor *t = &first[i];
    if (seen[i] || strncmp(t->name, "model.layers.", 13) != 0) continue;
    size_t len = strlen(t->name);
    bool skip = false;
    for (size_t k = 0; k < sizeof harmless / sizeof *harmless; k++) {
      size_t m = strlen(harmless[k]);
      skip |= len > m && strcmp(t->name + len - m, harmless[k]) == 0;
    }
    if (skip) continue;
    char shown[128];
    status = qtr_fail(p->err, QTR_ERR_UNSUPPORTED,
                      "tensor %s has no place in a %s of %d layers; is config.json the right one for these weights?",
                      qtr_printable(t->name, len, shown, sizeof shown), p->config.architecture, (int)p->config.n_layers);
  }
  free(seen);
  return status;
}

static enum qtr_status make_plan(struct plan *p) {
  enum qtr_linear_format format;
  enum qtr_status status = qtr_checkpoint_format(p->checkpoint, &format, p->err);
  if (status) return status;
  if (format > QTR_LINEAR_BF16) {
    return qtr_fail(p->err, QTR_ERR_UNSUPPORTED, "the source is %s already; start from the float checkpoint",
                    qtr_linear_format_name(format));
  }
  if ((status = qtr_layout_walk(&p->config, plan_slot, p))) return status;
  return check_leftovers(p);
}

/* ---- the work ------------------------------------------------------------------------------------ */

/* Rows of the source as floats, as a parallel loop over rows. Always fits: dtypes were checked. */
struct reading {
  const struct job *job;
  size_t row; /* first */
  float *w;   /* (n_rows, n_in) */
};

static void read_rows(void *arg, size_t begin, size_t end, int thread) {
  (void)thread;
  const struct reading *r = arg;
  size_t size = qtr_dtype_bytes(r->job->source->dtype) * r->job->n_in;
  struct qtr_tensor part = *r->job->source;
  part.data = (const uint8_t *)part.data + (r->row + begin) * size;
  part.n_bytes = (end - begin) * size;
  (void)qtr_tensor_to_floats(&part, r->w + begin * r->job->n_in, (end - begin) * r->job->n_in, NULL);
}

/* One job from source to file; *done counts source bytes for the progress line. */
static enum qtr_status run_job(const struct plan *p, const struct job *j, struct qtr_progress *progress, size_t *done,
                               struct qtr_rtn_error *total) {
  *total = (struct qtr_rtn_error){0};
  if (j->store == QTR_STORE_RAW) {
    *done += j->source->n_bytes;
    return qtr_sink_write_raw(p->sink, j->slot.name, j->source->data, j->source->n_bytes, p->err);
  }
  size_t rows = CHUNK_BYTES / sizeof(float) / QTR_MAX(j->n_in, 1) / 32 * 32;
  size_t step = QTR_MIN(QTR_MAX(rows, 32), j->n_out), row_bytes = qtr_dtype_bytes(j->source->dtype) * j->n_in;
  struct reading r = {.job = j, .w = malloc(step * j->n_in * sizeof(float) + 1)};
  if (!r.w) return qtr_fail_memory(p->err, j->slot.name, step * j->n_in * sizeof(float));
  enum qtr_status status = QTR_OK;
  for (; r.row < j->n_out && !status; r.row += step) {
    size_t n_rows = QTR_MIN(step, j->n_out - r.row);
    qtr_threads_for(p->team, n_rows, 32, read_rows, &r);
    status = qtr_sink_write_floats(p->sink, j->slot.name, r.w, n_rows, total, p->err);
    qtr_map_forget((const uint8_t *)j->source->data + r.row * row_bytes, n_rows * row_bytes);
    *done += n_rows * row_bytes;
    qtr_progress_update(progress, *done);
  }
  free(r.w);
  return status;
}

static double relative(double squared, double norm) { return norm > 0 ? sqrt(squared / norm) : 0; }

static enum qtr_status run_plan(const struct plan *p, qtr_quantize_callback callback, void *user, double *relative_error) {
  struct qtr_progress progress;
  size_t done = 0;
  double squared = 0, norm = 0;
  enum qtr_status status = QTR_OK;
  qtr_progress_start(&progress, "quantising", p->input_bytes, p->options->quiet);
  for (size_t i = 0; i < p->n_jobs && !status; i++) {
    const struct job *j = &p->job[i];
    struct qtr_rtn_error error;
    status = run_job(p, j, &progress, &done, &error);
    if (status || !j->slot.projection) continue;
    if (j->slot.layer >= 0) {
      squared += error.squared;
      norm += error.norm;
    }
    struct qtr_quantize_report report = {.layer = j->slot.layer,
                                         .n_layers = p->config.n_layers,
                                         .projection = j->slot.projection,
                                         .tensor = j->slot.name,
                                         .n_out = j->n_out,
                                         .n_in = j->n_in,
                                         .relative_error = relative(error.squared, error.norm),
                                         .squared_error = error.squared,
                                         .squared_norm = error.norm,
                                         .max_error = error.max};
    if (callback) callback(&report, user);
  }
  qtr_progress_end(&progress);
  *relative_error = relative(squared, norm);
  return status;
}

enum qtr_status qtr_quantize(const struct qtr_quantize_options *options, qtr_quantize_callback callback, void *user,
                             struct qtr_quantize_summary *summary, struct qtr_error *err) {
  double t0 = qtr_now(), error = 0;
  struct plan p = {.options = options, .err = err};
  struct qtr_checkpoint *checkpoint = NULL;
  char name[16];
  enum qtr_status status = check_options(&p);
  if (status || (status = qtr_config_read(options->model_dir, &p.config, err)) ||
      (status = qtr_checkpoint_open(options->model_dir, &checkpoint, err)) ||
      (status = qtr_sink_create(p.team, &p.sink, err))) {
    goto done;
  }
  p.checkpoint = checkpoint;
  if ((status = make_plan(&p))) {
    (void)qtr_error_prefix(err, "%s", options->model_dir);
    goto done;
  }
  const struct qtr_precision *q = &options->precision;
  int32_t kv_bits = q->kv_bits ? q->kv_bits : q->weight_bits == 16 ? 16 : 8;
  int n = snprintf(name, sizeof name, "w%da%d", (int)q->weight_bits & 31, (int)q->act_bits & 31);
  if (q->weight_bits != 16 || kv_bits != 16) (void)snprintf(name + n, sizeof name - (size_t)n, "kv%d", (int)kv_bits & 31);
  const struct qtr_sink_target target = {.source_dir = options->model_dir,
                                         .output_dir = options->output_dir,
                                         .overwrite = options->overwrite,
                                         .description = {.precision = name,
                                                         .method = "rtn",
                                                         .weight_bits = q->weight_bits,
                                                         .act_bits = q->act_bits,
                                                         .kv_bits = kv_bits,
                                                         .group_size = p.group_size,
                                                         .head_bits = options->head_int8 ? 8 : 16,
                                                         .embed_bits = options->embed_int8 ? 8 : 16}};
  if ((status = qtr_sink_open(p.sink, &target, err)) || (status = run_plan(&p, callback, user, &error)) ||
      (status = qtr_sink_finish(p.sink, err))) {
    goto done;
  }
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
  qtr_checkpoint_close(checkpoint);
  free(p.job);
  return status;
}
