/* convert.c - imports checkpoints of other quantisers (convert.h; spec A).
 *
 * The kind is found from files and dtypes. Then, as in quantize.c, a plan: every tensor of the output with its source, all
 * names, shapes and dtypes checked before a byte is written; then job by job through the sink. One projection is in memory
 * at a time.
 *
 * GPTQ with desc_act: the groups of a matrix are then not consecutive inputs but those that g_idx says, and W4A8 has
 * consecutive ones. The inputs of down_proj are free to be reordered, since the rows of gate_proj and up_proj, which make
 * them, can be written in the same order: exact. The inputs of the other projections are shared with the residual stream or
 * with the heads, so these are dequantised and rounded anew. */
#include "quant/convert.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/file.h"
#include "base/status.h"
#include "checkpoint/kv_scales.h"
#include "quant/convert_internal.h"
#include "quant/fake.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum job_kind { JOB_TENSOR, JOB_KV, JOB_FAKE, JOB_INT4 };

struct job {
  enum job_kind kind;
  enum qtr_store store;            /* TENSOR */
  const struct qtr_tensor *tensor; /* TENSOR */
  struct qtr_slot slot;
  bool inner; /* its rows are the inner channels of the MLP, which desc_act may reorder */
};

struct convert {
  const struct qtr_convert_options *options;
  const char *config_dir;
  enum qtr_convert_kind kind;
  struct qtr_config config;
  struct qtr_source source, scales; /* scales: scale.pt */
  enum qtr_linear_format format;    /* QSERVE */
  enum qtr_store store;             /* of projections */
  int32_t group_size, weight_bits, act_bits, kv_bits;
  unsigned plus;           /* GPTQ */
  struct qtr_kv_scales kv; /* of options->kv_scales */
  struct qtr_threads *team;
  struct qtr_sink *sink;
  struct job *job; /* (n_jobs) */
  size_t n_jobs, job_capacity, input_bytes;
  int32_t ordered_layer; /* whose order is in `order`; -1: none yet */
  uint32_t *order;       /* (intermediate_size) new inner channel j is old order[j]; NULL: as they are */
  struct qtr_convert_summary *summary;
  struct qtr_error *err;
};

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
static enum qtr_status recognise_fake(struct convert *c) {
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

static enum qtr_status recognise(struct convert *c) {
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
static enum qtr_status choose_precision(struct convert *c) {
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

static struct job *add_job(struct convert *c, enum job_kind kind, const struct qtr_slot *slot) {
  if (c->n_jobs == c->job_capacity) {
    size_t capacity = c->job_capacity ? 2 * c->job_capacity : 256;
    struct job *more = realloc(c->job, capacity * sizeof *more);
    if (!more) {
      (void)qtr_fail_memory(c->err, "the plan", capacity * sizeof *more);
      return NULL;
    }
    c->job = more;
    c->job_capacity = capacity;
  }
  struct job *j = &c->job[c->n_jobs++];
  *j = (struct job){.kind = kind, .slot = *slot};
  return j;
}

static enum qtr_status add_tensor(struct convert *c, const struct qtr_slot *slot, const struct qtr_tensor *t,
                                  enum qtr_store store, const char *suffix, bool report) {
  struct job *j = add_job(c, JOB_TENSOR, slot);
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

static enum qtr_status plan_vector(struct convert *c, const struct qtr_slot *slot, const char *suffix, size_t n,
                                   bool inner) {
  const struct qtr_tensor *t;
  enum qtr_status status = qtr_source_get(&c->source, slot->name, suffix, 1, &n, &t, c->err);
  if (!status) status = add_tensor(c, slot, t, inner ? QTR_STORE_F16 : float_store(t), suffix, false);
  if (!status) c->job[c->n_jobs - 1].inner = inner;
  return status;
}

static enum qtr_status plan_vocab(struct convert *c, const struct qtr_slot *slot) {
  const struct qtr_tensor *t, *scale;
  enum qtr_status status = qtr_source_vocab(&c->source, slot, &t, c->err);
  if (status) return status;
  if (t->dtype != QTR_DTYPE_I8) return add_tensor(c, slot, t, float_store(t), ".weight", true);
  /* Quattuor's own int8 tables */
  bool tied = slot->part == QTR_SLOT_HEAD && !qtr_source_find(&c->source, slot->name, ".weight");
  const char *name = tied ? "model.embed_tokens" : slot->name;
  if ((status = add_tensor(c, slot, t, QTR_STORE_RAW, ".weight", true)) ||
      (status = qtr_source_get(&c->source, name, ".dequant_scale", 1, &t->shape[0], &scale, c->err))) {
    return status;
  }
  return add_tensor(c, slot, scale, QTR_STORE_RAW, ".dequant_scale", false);
}

/* The tensors of a QServe projection, byte for byte. */
static enum qtr_status plan_qserve(struct convert *c, const struct qtr_slot *slot) {
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

static enum qtr_status plan_integers(struct convert *c, const struct qtr_slot *slot, enum job_kind kind) {
  const struct qtr_sink_item item = {
      .store = c->store, .name = slot->name, .suffix = "", .n_dims = 2, .n_out = slot->n_out, .n_in = slot->n_in};
  struct job *j = add_job(c, kind, slot);
  if (!j) return QTR_ERR_MEMORY;
  c->input_bytes += slot->n_out * slot->n_in / 2;
  return qtr_sink_add(c->sink, &item, c->err);
}

static enum qtr_status plan_projection(struct convert *c, const struct qtr_slot *slot) {
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
  if (!qtr_source_find(&c->source, slot->name, ".bias")) return QTR_OK;
  return plan_vector(c, slot, ".bias", slot->n_out, inner);
}

static enum qtr_status plan_slot(const struct qtr_slot *slot, void *user) {
  struct convert *c = user;
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
static enum qtr_status check_scale_leftovers(const struct convert *c) {
  if (c->kind != QTR_CONVERT_FAKE_QUANT) return QTR_OK;
  enum qtr_status status = qtr_source_leftovers(&c->scales, c->err);
  return status ? qtr_error_prefix(c->err, "scale.pt") : QTR_OK;
}

/* What run_job will ask scale.pt for, so that leftovers and absent scales show before anything is written. */
static enum qtr_status check_scales(struct convert *c) {
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

/* ---- the work -------------------------------------------------------------------------------------- */

static double relative(const struct qtr_rtn_error *e) { return e->norm > 0 ? sqrt(e->squared / e->norm) : 0; }

/* c->order for the layer of a job: what desc_act did to its down_proj. */
static enum qtr_status find_order(struct convert *c, int32_t layer) {
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
static enum qtr_status write_reordered(struct convert *c, const struct job *j, struct qtr_rtn_error *error) {
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

static enum qtr_status write_tensor(struct convert *c, const struct job *j, struct qtr_rtn_error *error) {
  enum qtr_status status = j->inner ? find_order(c, j->slot.layer) : QTR_OK;
  if (status) return status;
  if (j->inner && c->order) return write_reordered(c, j, error);
  return qtr_source_write(j->tensor, j->store, j->slot.name, c->sink, c->team, NULL, NULL, error, c->err);
}

static enum qtr_status write_kv(struct convert *c, const struct job *j) {
  const float pair[2] = {qtr_kv_scales_tensor(&c->kv, j->slot.layer, 0), qtr_kv_scales_tensor(&c->kv, j->slot.layer, 1)};
  return qtr_sink_write_raw(c->sink, j->slot.name, pair, sizeof pair, c->err);
}

static enum qtr_status write_fake(struct convert *c, const struct job *j, struct qtr_rtn_error *error) {
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
static enum qtr_status round_again(struct convert *c, const struct job *j, const struct qtr_int4_matrix *m,
                                   struct qtr_rtn_error *error) {
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

static enum qtr_status write_int4(struct convert *c, const struct job *j, const char **how, struct qtr_rtn_error *error) {
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
static void count(struct convert *c, const char *how) {
  c->summary->n_exact += strcmp(how, "exact") == 0;
  c->summary->n_moved += strcmp(how, "scales moved") == 0;
  c->summary->n_rounded += strncmp(how, "rounded", 7) == 0;
}

static enum qtr_status run_job(struct convert *c, const struct job *j, const char **how, struct qtr_rtn_error *error) {
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

static enum qtr_status run_jobs(struct convert *c, qtr_quantize_callback callback, void *user) {
  struct qtr_progress progress;
  struct qtr_rtn_error total = {0};
  enum qtr_status status = QTR_OK;
  qtr_progress_start(&progress, "converting", c->n_jobs, c->options->quiet);
  for (size_t i = 0; i < c->n_jobs && !status; i++) {
    const struct job *j = &c->job[i];
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

/* ---- floats ---------------------------------------------------------------------------------------- */

static enum qtr_status convert_floats(const struct convert *c, qtr_quantize_callback callback, void *user) {
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

static enum qtr_status convert_integers(struct convert *c, qtr_quantize_callback callback, void *user) {
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
                                                         .head_bits = 16,
                                                         .embed_bits = 16}};
  if ((status = qtr_sink_open(c->sink, &target, c->err))) return status;
  if ((status = run_jobs(c, callback, user))) return qtr_error_prefix(c->err, "%s", o->input);
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
  struct convert c = {.options = o, .err = err, .summary = summary ? summary : &own, .ordered_layer = -1};
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
