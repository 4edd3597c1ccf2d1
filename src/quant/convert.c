/* convert.c - imports checkpoints of other quantisers (convert.h; spec A).
 *
 * The kind is found from files and dtypes. Then, as in quantize.c, a plan: every tensor of the output with its source, all
 * names, shapes and dtypes checked before a byte is written; convert_run.c carries it out. */
#include "quant/convert.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/file.h"
#include "base/status.h"
#include "quant/convert_internal.h"
#include "quant/fake.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void qtr_convert_options_init(struct qtr_convert_options *options) { *options = (struct qtr_convert_options){0}; }

const char *qtr_convert_kind_name(enum qtr_convert_kind kind) {
  switch (kind) {
    case QTR_CONVERT_FAKE_QUANT: return "DeepCompressor or LMQuant output (model.pt, scale.pt)";
    case QTR_CONVERT_QSERVE: return "QServe checkpoint";
    case QTR_CONVERT_GPTQ: return "GPTQ checkpoint";
    case QTR_CONVERT_AWQ: return "AWQ checkpoint";
    case QTR_CONVERT_FLOAT: break;
  }
  return "float checkpoint";
}

/* ---- what it is ------------------------------------------------------------------------------------ */

static bool file_in(const char *dir, const char *name) {
  char *path = qtr_path_join(dir, name);
  bool exists = path && qtr_file_exists(path);
  free(path);
  return exists;
}

static enum qtr_status open_in(const char *dir, const char *name, const struct qtr_config *config, struct qtr_source *source,
                               struct qtr_error *err) {
  char *path = qtr_path_join(dir, name);
  if (!path) return qtr_fail_memory(err, "a path", strlen(dir));
  enum qtr_status status = qtr_source_open(path, QTR_S2_QSERVE, config, source, err);
  free(path);
  return status;
}

/* 4 or 8 bits, groups or not: from the first projection. */
static enum qtr_status recognise_fake(struct qtr_convert_work *c) {
  static const struct qtr_slot first = {.name = "model.layers.0.self_attn.q_proj"};
  struct qtr_slot slot = first;
  struct qtr_fake_load load;
  slot.n_out = (size_t)c->config.n_heads * (size_t)c->config.head_dim;
  slot.n_in = (size_t)c->config.hidden_size;
  enum qtr_status status = qtr_fake_read(&c->source, &c->scales, &slot, c->team, &load, c->err);
  if (status) return status;
  const struct qtr_fake_matrix fake = {.n_out = slot.n_out, .n_in = slot.n_in, .w = load.w, .s0 = load.s0, .s1 = load.s1};
  c->store = load.s1 ? QTR_STORE_W4_G128 : qtr_fake_is_w8(&fake) ? QTR_STORE_W8 : QTR_STORE_W4;
  qtr_fake_free(&load);
  return QTR_OK;
}

/* A projection named *_proj.qweight of 32-bit words: GPTQ or AWQ. */
static bool has_packed_words(const struct qtr_checkpoint *cp) {
  const struct qtr_tensor *t = qtr_checkpoint_find(cp, "model.layers.0.self_attn.q_proj.qweight");
  return t && t->dtype == QTR_DTYPE_I32;
}

static enum qtr_status recognise(struct qtr_convert_work *c) {
  const char *input = c->options->input;
  struct qtr_error *err = c->err;
  enum qtr_status status;
  bool dir = qtr_dir_exists(input), model = dir && file_in(input, "model.pt"), scale = dir && file_in(input, "scale.pt");
  if (scale && !model) {
    return qtr_fail(err, QTR_ERR_NOT_FOUND, "%s has a scale.pt but no model.pt: DeepCompressor writes both", input);
  }
  if (scale) {
    c->kind = QTR_CONVERT_FAKE_QUANT;
    if ((status = open_in(input, "model.pt", &c->config, &c->source, err)) ||
        (status = open_in(input, "scale.pt", &c->config, &c->scales, err))) {
      return status;
    }
    return recognise_fake(c);
  }
  if ((status = qtr_source_open(input, c->options->s2_order, &c->config, &c->source, err))) return status;
  if (has_packed_words(c->source.checkpoint)) {
    struct qtr_int4_config settings;
    if ((status = qtr_int4_config_read(c->config_dir, &settings, err))) return status;
    status = qtr_int4_recognise(&c->source, &settings, &c->kind, &c->group_size, &c->plus, err);
    c->store = c->group_size == -1 ? QTR_STORE_W4 : QTR_STORE_W4_G128;
    return status;
  }
  if ((status = qtr_checkpoint_format(c->source.checkpoint, &c->format, err))) return status;
  c->kind = c->format <= QTR_LINEAR_BF16 ? QTR_CONVERT_FLOAT : QTR_CONVERT_QSERVE;
  c->store = c->format == QTR_LINEAR_W8A8        ? QTR_STORE_W8
             : c->format == QTR_LINEAR_W4A8_G128 ? QTR_STORE_W4_G128
                                                 : QTR_STORE_W4;
  return QTR_OK;
}

/* The precision that is written down, and whether it is what the caller asked for. */
static enum qtr_status choose_precision(struct qtr_convert_work *c) {
  const struct qtr_convert_options *o = c->options;
  struct qtr_precision p = {.weight_bits = c->store == QTR_STORE_W8 ? 8 : 4, .act_bits = 8};
  p.kv_bits = p.weight_bits;
  enum qtr_status status;
  int32_t group = c->store == QTR_STORE_W4_G128 ? QTR_GROUP : -1;
  if (c->config.precision[0]) { /* of a checkpoint of ours */
    struct qtr_precision said;
    if (!qtr_precision_parse(c->config.precision, &said, NULL) && said.kv_bits) p.kv_bits = said.kv_bits;
  }
  if (o->precision) {
    struct qtr_precision asked;
    if ((status = qtr_precision_parse(o->precision, &asked, c->err))) return status;
    if (asked.weight_bits != p.weight_bits) {
      return qtr_fail(c->err, QTR_ERR_ARGUMENT,
                      "precision \"%.20s\" asks for %d-bit weights, but those of the input have %d; integers are taken over "
                      "as they are",
                      o->precision, (int)asked.weight_bits, (int)p.weight_bits);
    }
    p.kv_bits = asked.kv_bits;
  }
  if (o->group_size != 0 && o->group_size != group) {
    return qtr_fail(c->err, QTR_ERR_ARGUMENT, "group size %d: the input has %s", (int)o->group_size,
                    group == -1 ? "one scale a row (-1)" : "groups of 128");
  }
  c->group_size = group;
  c->weight_bits = p.weight_bits;
  c->act_bits = p.act_bits;
  c->kv_bits = p.kv_bits;
  return QTR_OK;
}

/* ---- the plan -------------------------------------------------------------------------------------- */

static struct qtr_convert_job *add_job(struct qtr_convert_work *c, enum qtr_convert_job_kind kind,
                                       const struct qtr_slot *slot) {
  if (c->n_jobs == c->job_capacity) {
    size_t capacity = c->job_capacity ? 2 * c->job_capacity : 256;
    struct qtr_convert_job *more = realloc(c->job, capacity * sizeof *more);
    if (!more) {
      (void)qtr_fail_memory(c->err, "the plan", capacity * sizeof *more);
      return NULL;
    }
    c->job = more;
    c->job_capacity = capacity;
  }
  struct qtr_convert_job *j = &c->job[c->n_jobs++];
  *j = (struct qtr_convert_job){.kind = kind, .slot = *slot};
  return j;
}

static enum qtr_status add_tensor(struct qtr_convert_work *c, const struct qtr_slot *slot, const struct qtr_tensor *t,
                                  enum qtr_store store, const char *suffix, bool report) {
  struct qtr_convert_job *j = add_job(c, JOB_TENSOR, slot);
  if (!j) return QTR_ERR_MEMORY;
  j->tensor = t;
  j->store = store;
  if (!report) j->slot.projection = NULL;
  c->input_bytes += t->n_bytes;
  return qtr_source_announce(t, store, slot->name, suffix, c->sink, c->err);
}

/* Floats that stay floats: fp16 as it is, others rounded to it. */
static enum qtr_store float_store(const struct qtr_tensor *t) {
  return t->dtype == QTR_DTYPE_F16 ? QTR_STORE_RAW : QTR_STORE_F16;
}

static enum qtr_status plan_vector(struct qtr_convert_work *c, const struct qtr_slot *slot, const char *suffix, size_t n,
                                   bool inner) {
  const struct qtr_tensor *t;
  enum qtr_status status = qtr_source_get(&c->source, slot->name, suffix, 1, &n, &t, c->err);
  if (!status) status = add_tensor(c, slot, t, inner ? QTR_STORE_F16 : float_store(t), suffix, false);
  if (!status) c->job[c->n_jobs - 1].inner = inner;
  return status;
}

static enum qtr_status plan_vocab(struct qtr_convert_work *c, const struct qtr_slot *slot) {
  const struct qtr_tensor *t, *scale;
  enum qtr_status status = qtr_source_vocab(&c->source, slot, &t, c->err);
  if (status) return status;
  if (t->dtype != QTR_DTYPE_I8) return add_tensor(c, slot, t, float_store(t), ".weight", true);
  /* Quattuor's own int8 tables */
  *(slot->part == QTR_SLOT_HEAD ? &c->head_bits : &c->embed_bits) = 8;
  bool tied = slot->part == QTR_SLOT_HEAD && !qtr_source_find(&c->source, slot->name, ".weight");
  const char *name = tied ? "model.embed_tokens" : slot->name;
  if ((status = add_tensor(c, slot, t, QTR_STORE_RAW, ".weight", true)) ||
      (status = qtr_source_get(&c->source, name, ".dequant_scale", 1, &t->shape[0], &scale, c->err))) {
    return status;
  }
  return add_tensor(c, slot, scale, QTR_STORE_RAW, ".dequant_scale", false);
}

/* The tensors of a QServe projection, byte for byte. */
static enum qtr_status plan_qserve(struct qtr_convert_work *c, const struct qtr_slot *slot) {
  const size_t out = slot->n_out, in = slot->n_in;
  const struct part {
    const char *suffix;
    size_t n_dims, shape[2];
    bool bytes;
  } w8[] = {{".weight", 2, {out, in}, true}, {".dequant_scale", 1, {out}, false}, {0}},
    w4[] = {{".qweight", 2, {out, in / 2}, true}, {".s1_scales", 1, {out}, false}, {".s1_szeros", 1, {out}, false}, {0}},
    g128[] = {{".qweight", 2, {out, in / 2}, true},
              {".s1_scales", 1, {out}, false},
              {".s2_scales", 2, {in / QTR_GROUP, out}, true},
              {".s2_zeros", 2, {in / QTR_GROUP, out}, true},
              {0}};
  const struct part *part = c->store == QTR_STORE_W8 ? w8 : c->store == QTR_STORE_W4 ? w4 : g128;
  if (c->store != QTR_STORE_W8 && (out % 32 != 0 || in % (c->store == QTR_STORE_W4 ? 32 : QTR_GROUP) != 0)) {
    return qtr_fail(c->err, QTR_ERR_UNSUPPORTED, "%s has %zu rows and %zu columns, which its format cannot hold", slot->name,
                    out, in);
  }
  for (; part->suffix; part++) {
    const struct qtr_tensor *t;
    enum qtr_status status = qtr_source_get(&c->source, slot->name, part->suffix, part->n_dims, part->shape, &t, c->err);
    if (status) return status;
    bool fits = part->bytes ? qtr_dtype_bytes(t->dtype) == 1 && t->dtype != QTR_DTYPE_BOOL : t->dtype <= QTR_DTYPE_F64;
    if (!fits) {
      return qtr_fail(c->err, QTR_ERR_FORMAT, "tensor %s has dtype %s, %s is expected", t->name, qtr_dtype_name(t->dtype),
                      part->bytes ? "I8" : "F16");
    }
    /* kernels read fp16 scales; OmniServe's dequant_scale is fp32 (A.2.3) */
    enum qtr_store store =
        part->bytes || t->dtype == QTR_DTYPE_F16 || t->dtype == QTR_DTYPE_F32 ? QTR_STORE_RAW : QTR_STORE_F16;
    if ((status = add_tensor(c, slot, t, store, part->suffix, part->bytes && part->suffix[1] != 's'))) return status;
  }
  return QTR_OK;
}

static enum qtr_status plan_integers(struct qtr_convert_work *c, const struct qtr_slot *slot,
                                     enum qtr_convert_job_kind kind) {
  const struct qtr_sink_item item = {
      .store = c->store, .name = slot->name, .suffix = "", .n_dims = 2, .n_out = slot->n_out, .n_in = slot->n_in};
  struct qtr_convert_job *j = add_job(c, kind, slot);
  if (!j) return QTR_ERR_MEMORY;
  c->input_bytes += slot->n_out * slot->n_in / 2;
  return qtr_sink_add(c->sink, &item, c->err);
}

/* AutoGPTQ stores a bias of zeros where the model has none, and other readers have no place for it. */
static bool is_idle_bias(const struct qtr_convert_work *c, const struct qtr_slot *slot, const struct qtr_tensor *bias) {
  bool mlp = strstr(slot->name, ".mlp.") != NULL, o = strcmp(slot->projection, "o_proj") == 0;
  if (mlp ? c->config.mlp_bias : o ? c->config.o_bias : c->config.qkv_bias) return false;
  for (size_t i = 0; i < bias->n_bytes; i++) {
    if (((const uint8_t *)bias->data)[i]) return false;
  }
  return true;
}

static enum qtr_status plan_projection(struct qtr_convert_work *c, const struct qtr_slot *slot) {
  const size_t shape[2] = {slot->n_out, slot->n_in};
  const struct qtr_tensor *t;
  enum qtr_status status;
  bool inner = c->kind == QTR_CONVERT_GPTQ &&
               (strcmp(slot->projection, "gate_proj") == 0 || strcmp(slot->projection, "up_proj") == 0);
  switch (c->kind) {
    case QTR_CONVERT_QSERVE: status = plan_qserve(c, slot); break;
    case QTR_CONVERT_FAKE_QUANT:
      status = qtr_source_get(&c->source, slot->name, ".weight", 2, shape, &t, c->err);
      if (status) return qtr_error_prefix(c->err, "model.pt");
      status = plan_integers(c, slot, JOB_FAKE);
      break;
    default:
      if (!qtr_source_find(&c->source, slot->name, ".qweight") && qtr_source_find(&c->source, slot->name, ".weight")) {
        /* a projection that was left alone: modules_to_not_convert */
        status = qtr_source_get(&c->source, slot->name, ".weight", 2, shape, &t, c->err);
        if (!status) status = add_tensor(c, slot, t, c->store, "", true);
      } else {
        status = qtr_int4_check(&c->source, slot, c->kind, c->group_size, c->err);
        if (!status) status = plan_integers(c, slot, JOB_INT4);
      }
  }
  if (status) return status;
  c->job[c->n_jobs - 1].inner = inner;
  const struct qtr_tensor *bias = qtr_source_find(&c->source, slot->name, ".bias");
  if (!bias || is_idle_bias(c, slot, bias)) return QTR_OK;
  return plan_vector(c, slot, ".bias", slot->n_out, inner);
}

static enum qtr_status plan_slot(const struct qtr_slot *slot, void *user) {
  struct qtr_convert_work *c = user;
  switch (slot->part) {
    case QTR_SLOT_NORM: return plan_vector(c, slot, ".weight", slot->n_in, false);
    case QTR_SLOT_PROJECTION: return plan_projection(c, slot);
    case QTR_SLOT_KV_SCALE: {
      const struct qtr_sink_item item = {.store = QTR_STORE_RAW,
                                         .name = slot->name,
                                         .suffix = "",
                                         .dtype = QTR_DTYPE_F32,
                                         .n_dims = 1,
                                         .n_out = 1,
                                         .n_in = 2};
      const struct qtr_tensor *t = qtr_source_find(&c->source, slot->name, "");
      if (c->kv.scale) return add_job(c, JOB_KV, slot) ? qtr_sink_add(c->sink, &item, c->err) : QTR_ERR_MEMORY;
      if (!t) return QTR_OK;
      enum qtr_status status = qtr_source_get(&c->source, slot->name, "", 1, &slot->n_in, &t, c->err);
      return status ? status : add_tensor(c, slot, t, QTR_STORE_RAW, "", false);
    }
    default: return plan_vocab(c, slot);
  }
}

/* Scales of projections that the model does not have. */
static enum qtr_status check_scale_leftovers(const struct qtr_convert_work *c) {
  if (c->kind != QTR_CONVERT_FAKE_QUANT) return QTR_OK;
  enum qtr_status status = qtr_source_leftovers(&c->scales, c->err);
  return status ? qtr_error_prefix(c->err, "scale.pt") : QTR_OK;
}

/* What run_job will ask scale.pt for, so that leftovers and absent scales show before anything is written. */
static enum qtr_status check_scales(struct qtr_convert_work *c) {
  for (size_t i = 0; i < c->n_jobs; i++) {
    if (c->job[i].kind != JOB_FAKE) continue;
    const char *name = c->job[i].slot.name;
    if (!qtr_source_find(&c->scales, name, ".weight.scale.0")) {
      return qtr_fail(c->err, QTR_ERR_NOT_FOUND, "scale.pt has no tensor %s.weight.scale.0", name);
    }
    bool second = qtr_source_find(&c->scales, name, ".weight.scale.1") != NULL;
    if (second != (c->store == QTR_STORE_W4_G128)) {
      return qtr_fail(c->err, QTR_ERR_FORMAT, "scale.pt: %s has %s weight.scale.1, unlike the first projection", name,
                      second ? "a" : "no");
    }
    (void)qtr_source_find(&c->scales, name, ".weight.zero");
    (void)qtr_source_find(&c->scales, name, ".weight.scaled_zero");
  }
  return check_scale_leftovers(c);
}

/* ---- floats ---------------------------------------------------------------------------------------- */

static enum qtr_status convert_floats(const struct qtr_convert_work *c, qtr_quantize_callback callback, void *user) {
  const struct qtr_convert_options *o = c->options;
  struct qtr_quantize_options q;
  qtr_quantize_options_init(&q);
  enum qtr_status status = qtr_precision_parse(o->precision ? o->precision : "w16a16", &q.precision, c->err);
  if (status) return status;
  if (o->strict && q.precision.weight_bits != 16) {
    return qtr_fail(c->err, QTR_ERR_ARGUMENT, "strict: rounding float weights to %d bits is never exact",
                    (int)q.precision.weight_bits);
  }
  q.model_dir = o->input;
  q.config_dir = c->config_dir;
  q.output_dir = o->output_dir;
  q.group_size = o->group_size;
  q.kv_scales = c->kv.scale ? &c->kv : NULL;
  q.bf16 = o->bf16;
  q.overwrite = o->overwrite;
  q.threads = o->threads;
  q.quiet = o->quiet;
  return qtr_quantize(&q, callback, user, &c->summary->quantize, c->err);
}

/* ---- all of it ------------------------------------------------------------------------------------- */

static const char *method_of(enum qtr_convert_kind kind) {
  switch (kind) {
    case QTR_CONVERT_FAKE_QUANT: return "deepcompressor";
    case QTR_CONVERT_GPTQ: return "gptq";
    case QTR_CONVERT_AWQ: return "awq";
    default: return "qserve";
  }
}

static enum qtr_status convert_integers(struct qtr_convert_work *c, qtr_quantize_callback callback, void *user) {
  const struct qtr_convert_options *o = c->options;
  char name[16];
  enum qtr_status status = choose_precision(c);
  if (status || (status = qtr_sink_create(c->team, &c->sink, c->err))) return status;
  if ((status = qtr_layout_walk(&c->config, plan_slot, c)) || (status = check_scales(c)) ||
      (status = qtr_source_leftovers(&c->source, c->err))) {
    return qtr_error_prefix(c->err, "%s", o->input);
  }
  (void)snprintf(name, sizeof name, "w%da%dkv%d", (int)c->weight_bits & 31, (int)c->act_bits & 31, (int)c->kv_bits & 31);
  const struct qtr_sink_target target = {.source_dir = c->config_dir,
                                         .output_dir = o->output_dir,
                                         .overwrite = o->overwrite,
                                         .description = {.precision = name,
                                                         .method = method_of(c->kind),
                                                         .weight_bits = c->weight_bits,
                                                         .act_bits = c->act_bits,
                                                         .kv_bits = c->kv_bits,
                                                         .group_size = c->group_size,
                                                         .head_bits = c->head_bits,
                                                         .embed_bits = c->embed_bits}};
  if ((status = qtr_sink_open(c->sink, &target, c->err))) return status;
  if ((status = qtr_convert_run(c, callback, user))) return qtr_error_prefix(c->err, "%s", o->input);
  if ((status = qtr_sink_finish(c->sink, c->err))) return status;
  struct qtr_quantize_summary *s = &c->summary->quantize;
  s->group_size = c->group_size;
  s->n_layers = c->config.n_layers;
  s->n_tensors = qtr_sink_tensors(c->sink);
  s->input_bytes = c->input_bytes;
  s->output_bytes = qtr_sink_bytes(c->sink);
  memcpy(s->precision, name, sizeof name);
  return QTR_OK;
}

enum qtr_status qtr_convert(const struct qtr_convert_options *o, void (*found)(enum qtr_convert_kind kind, void *user),
                            qtr_quantize_callback callback, void *user, struct qtr_convert_summary *summary,
                            struct qtr_error *err) {
  double t0 = qtr_now();
  struct qtr_convert_summary own;
  struct qtr_convert_work c = {
      .options = o, .err = err, .summary = summary ? summary : &own, .ordered_layer = -1, .embed_bits = 16, .head_bits = 16};
  *c.summary = (struct qtr_convert_summary){0};
  if (!o->input || !o->output_dir) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "an input and an output directory are required");
  }
  c.config_dir = o->config_dir ? o->config_dir : o->input;
  if (!file_in(c.config_dir, "config.json")) {
    return qtr_fail(err, QTR_ERR_NOT_FOUND,
                    "%s has no config.json; name the Hugging Face directory of the model with --config", c.config_dir);
  }
  enum qtr_status status =
      qtr_threads_create(o->threads > 0 ? QTR_MIN(o->threads, 1024) : qtr_threads_available(), &c.team, err);
  if (status || (status = qtr_config_read_foreign(c.config_dir, &c.config, err))) goto done;
  if (o->kv_scales && (status = qtr_kv_scales_read(o->kv_scales, &c.config, &c.kv, err))) goto done;
  c.summary->kv_scales_per_layer = c.kv.scale ? c.kv.n_heads : 0;
  if ((status = recognise(&c))) goto done;
  c.summary->kind = c.kind;
  if (found) found(c.kind, user);
  status = c.kind == QTR_CONVERT_FLOAT ? convert_floats(&c, callback, user) : convert_integers(&c, callback, user);
  c.summary->quantize.seconds = qtr_now() - t0;
done:
  qtr_sink_free(c.sink);
  qtr_source_close(&c.source);
  qtr_source_close(&c.scales);
  qtr_kv_scales_free(&c.kv);
  qtr_threads_free(c.team);
  free(c.order);
  free(c.job);
  return status;
}
