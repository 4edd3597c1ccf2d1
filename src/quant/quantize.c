/* quantize.c - from a float checkpoint to a QServe checkpoint by round to nearest (quantize.h; spec A.2 – A.4, F.6).
 *
 * First a plan is made: every tensor of the output with its source, shapes checked, before a byte is written. Then the plan
 * is carried out job by job in chunks of rows: the source is mapped, a chunk of it becomes floats, codes and packed bytes,
 * and goes to the file; so memory stays at some chunks plus the scales of one matrix, whatever the model's size. */
#include "quant/quantize.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/file.h"
#include "base/progress.h"
#include "base/status.h"
#include "base/threads.h"
#include "checkpoint/packing.h"
#include "checkpoint/safetensors_write.h"
#include "quant/directory.h"
#include "quant/rtn.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BLOCK_ROWS 32                  /* what one thread rounds at a time: the height of a packed tile */
#define CHUNK_BYTES ((size_t)32 << 20) /* of floats */
#define MAX_NAME 160                   /* of struct qtr_st_entry */

enum job_kind { JOB_F16, JOB_RAW, JOB_W4, JOB_W4_G128, JOB_W8 };

/* One tensor of the source and what it becomes. */
struct job {
  enum job_kind kind;
  const struct qtr_tensor *source;
  char name[MAX_NAME]; /* without ".weight" */
  const char *projection;
  int32_t layer;
  bool report;
  size_t n_out, n_in; /* vectors: (1, n) */
};

struct plan {
  const struct qtr_quantize_options *options;
  const struct qtr_checkpoint *checkpoint;
  struct qtr_config config;
  enum job_kind projection_kind;
  int32_t group_size;
  struct qtr_threads *team;
  struct job *job; /* (n_jobs) */
  size_t n_jobs, job_capacity;
  struct qtr_st_entry *entry; /* (n_entries) in file order */
  size_t n_entries, entry_capacity;
  size_t input_bytes, output_bytes;
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
  p->projection_kind = !w4 ? (w8 ? JOB_W8 : JOB_F16) : p->group_size == -1 ? JOB_W4 : JOB_W4_G128;
  return qtr_threads_create(o->threads > 0 ? QTR_MIN(o->threads, 1024) : qtr_threads_available(), &p->team, p->err);
}

static enum qtr_status add_entry(struct plan *p, const char *name, const char *suffix, enum qtr_dtype dtype, size_t n_dims,
                                 size_t d0, size_t d1) {
  if (p->n_entries == p->entry_capacity) {
    size_t capacity = p->entry_capacity ? 2 * p->entry_capacity : 256;
    struct qtr_st_entry *more = realloc(p->entry, capacity * sizeof *more);
    if (!more) return qtr_fail_memory(p->err, "the plan", capacity * sizeof *more);
    p->entry = more;
    p->entry_capacity = capacity;
  }
  struct qtr_st_entry *e = &p->entry[p->n_entries++];
  *e = (struct qtr_st_entry){.dtype = dtype, .n_dims = n_dims, .shape = {d0, d1}};
  (void)snprintf(e->name, sizeof e->name, "%s%s", name, suffix);
  p->output_bytes += d0 * (n_dims > 1 ? d1 : 1) * qtr_dtype_bytes(dtype); /* of tensors that exist, or smaller */
  return QTR_OK;
}

/* Rows and columns a format can hold (spec A.3, A.4). */
static enum qtr_status check_multiples(const struct plan *p, const struct job *j) {
  size_t columns = j->kind == JOB_W4 ? 32 : QTR_GROUP;
  if (j->kind != JOB_W4 && j->kind != JOB_W4_G128) return QTR_OK;
  if (j->n_out % 32 == 0 && j->n_in % columns == 0) return QTR_OK;
  bool smaller = j->kind == JOB_W4_G128 && j->n_out % 32 == 0 && j->n_in % 32 == 0;
  return qtr_fail(p->err, QTR_ERR_UNSUPPORTED,
                  "%s has %zu rows and %zu columns; %s needs multiples of 32 rows and %zu columns. Choose %s", j->name,
                  j->n_out, j->n_in, j->kind == JOB_W4 ? "w4a8 per channel" : "w4a8 in groups of 128", columns,
                  smaller ? "group size -1, or w8a8" : "w8a8");
}

static enum qtr_status add_job(struct plan *p, enum job_kind kind, const struct qtr_tensor *source, const char *name,
                               const char *suffix, const char *projection, int32_t layer, bool report) {
  if (p->n_jobs == p->job_capacity) {
    size_t capacity = p->job_capacity ? 2 * p->job_capacity : 256;
    struct job *more = realloc(p->job, capacity * sizeof *more);
    if (!more) return qtr_fail_memory(p->err, "the plan", capacity * sizeof *more);
    p->job = more;
    p->job_capacity = capacity;
  }
  struct job *j = &p->job[p->n_jobs++];
  bool matrix = source->n_dims == 2;
  *j = (struct job){.kind = kind, .source = source, .projection = projection, .layer = layer, .report = report};
  (void)snprintf(j->name, sizeof j->name, "%s", name);
  j->n_in = source->n_dims == 0 ? 1 : source->shape[source->n_dims - 1];
  j->n_out = matrix ? source->shape[0] : 1;
  p->input_bytes += source->n_bytes;
  bool real = source->dtype <= QTR_DTYPE_F64;
  if (kind != JOB_RAW && !real) {
    return qtr_fail(p->err, QTR_ERR_UNSUPPORTED, "tensor %s has dtype %s; the source must hold float weights", source->name,
                    qtr_dtype_name(source->dtype));
  }
  enum qtr_status status = check_multiples(p, j);
  if (status) return status;
  size_t out = j->n_out, in = j->n_in;
  switch (kind) {
    case JOB_F16: return add_entry(p, name, suffix, QTR_DTYPE_F16, matrix ? 2 : 1, matrix ? out : in, in);
    case JOB_RAW: return add_entry(p, name, suffix, source->dtype, 1, in, 0);
    case JOB_W8:
      if ((status = add_entry(p, name, ".weight", QTR_DTYPE_I8, 2, out, in))) return status;
      return add_entry(p, name, ".dequant_scale", QTR_DTYPE_F32, 1, out, 0);
    case JOB_W4:
      if ((status = add_entry(p, name, ".qweight", QTR_DTYPE_I8, 2, out, in / 2)) ||
          (status = add_entry(p, name, ".s1_scales", QTR_DTYPE_F16, 1, out, 0))) {
        return status;
      }
      return add_entry(p, name, ".s1_szeros", QTR_DTYPE_F16, 1, out, 0);
    default:
      if ((status = add_entry(p, name, ".qweight", QTR_DTYPE_I8, 2, out, in / 2)) ||
          (status = add_entry(p, name, ".s1_scales", QTR_DTYPE_F16, 1, out, 0)) ||
          (status = add_entry(p, name, ".s2_scales", QTR_DTYPE_I8, 2, in / QTR_GROUP, out))) {
        return status;
      }
      return add_entry(p, name, ".s2_zeros", QTR_DTYPE_I8, 2, in / QTR_GROUP, out);
  }
}

/* <name>.weight (n) -> fp16. */
static enum qtr_status plan_vector(struct plan *p, const char *name, const char *suffix, size_t n) {
  char full[MAX_NAME + 16];
  const struct qtr_tensor *t;
  (void)snprintf(full, sizeof full, "%s%s", name, suffix);
  enum qtr_status status = qtr_checkpoint_get(p->checkpoint, full, 1, &n, &t, p->err);
  return status ? status : add_job(p, JOB_F16, t, name, suffix, NULL, -1, false);
}

static enum qtr_status plan_projection(struct plan *p, int32_t layer, const char *block, const char *projection,
                                       size_t n_out, size_t n_in) {
  char name[MAX_NAME], full[MAX_NAME + 16];
  const struct qtr_tensor *t;
  const size_t shape[2] = {n_out, n_in};
  (void)snprintf(name, sizeof name, "model.layers.%d.%s.%s", (int)layer, block, projection);
  (void)snprintf(full, sizeof full, "%s.weight", name);
  enum qtr_status status = qtr_checkpoint_get(p->checkpoint, full, 2, shape, &t, p->err);
  if (!status) status = add_job(p, p->projection_kind, t, name, ".weight", projection, layer, true);
  (void)snprintf(full, sizeof full, "%s.bias", name);
  if (!status && qtr_checkpoint_find(p->checkpoint, full)) status = plan_vector(p, name, ".bias", n_out);
  return status;
}

static enum qtr_status plan_layer(struct plan *p, int32_t i) {
  const struct qtr_config *c = &p->config;
  size_t hidden = (size_t)c->hidden_size, inner = (size_t)c->intermediate_size, d = (size_t)c->head_dim;
  size_t q = (size_t)c->n_heads * d, kv = (size_t)c->n_kv_heads * d;
  char norm[MAX_NAME], scale[MAX_NAME];
  enum qtr_status status;
  (void)snprintf(norm, sizeof norm, "model.layers.%d.input_layernorm", (int)i);
  if ((status = plan_vector(p, norm, ".weight", hidden)) ||
      (status = plan_projection(p, i, "self_attn", "q_proj", q, hidden)) ||
      (status = plan_projection(p, i, "self_attn", "k_proj", kv, hidden)) ||
      (status = plan_projection(p, i, "self_attn", "v_proj", kv, hidden)) ||
      (status = plan_projection(p, i, "self_attn", "o_proj", hidden, q))) {
    return status;
  }
  (void)snprintf(scale, sizeof scale, "model.layers.%d.self_attn.kv_scale_quant_orig", (int)i);
  const struct qtr_tensor *t = qtr_checkpoint_find(p->checkpoint, scale);
  if (t && t->n_dims == 1 && (status = add_job(p, JOB_RAW, t, scale, "", NULL, -1, false))) return status;
  (void)snprintf(norm, sizeof norm, "model.layers.%d.post_attention_layernorm", (int)i);
  if ((status = plan_vector(p, norm, ".weight", hidden)) ||
      (status = plan_projection(p, i, "mlp", "gate_proj", inner, hidden)) ||
      (status = plan_projection(p, i, "mlp", "up_proj", inner, hidden))) {
    return status;
  }
  return plan_projection(p, i, "mlp", "down_proj", hidden, inner);
}

/* Embedding or head: (rows >= vocab_size, hidden); padded vocabularies keep their padding. */
static enum qtr_status plan_vocab(struct plan *p, const char *source, const char *name, const char *projection, bool int8) {
  char full[MAX_NAME];
  const size_t shape[2] = {(size_t)p->config.vocab_size, (size_t)p->config.hidden_size};
  (void)snprintf(full, sizeof full, "%s.weight", source);
  const struct qtr_tensor *t = qtr_checkpoint_find(p->checkpoint, full);
  if (!t || t->n_dims != 2 || t->shape[0] < shape[0] || t->shape[1] != shape[1]) {
    return qtr_checkpoint_get(p->checkpoint, full, 2, shape, &t, p->err); /* says what is wrong */
  }
  return add_job(p, int8 ? JOB_W8 : JOB_F16, t, name, ".weight", projection, -1, true);
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
  const struct qtr_quantize_options *o = p->options;
  if ((status = plan_vocab(p, "model.embed_tokens", "model.embed_tokens", "embed_tokens", o->embed_int8))) return status;
  for (int32_t i = 0; i < p->config.n_layers; i++) {
    if ((status = plan_layer(p, i))) return status;
  }
  if ((status = plan_vector(p, "model.norm", ".weight", (size_t)p->config.hidden_size))) return status;
  /* A tied head gets its own tensor: QServe's loaders look for lm_head.weight (A.2.4). */
  bool own = qtr_checkpoint_find(p->checkpoint, "lm_head.weight") != NULL;
  const char *head = own || !p->config.tie_word_embeddings ? "lm_head" : "model.embed_tokens";
  if ((status = plan_vocab(p, head, "lm_head", "lm_head", o->head_int8))) return status;
  return check_leftovers(p);
}

/* ---- the work ------------------------------------------------------------------------------------ */

/* Buffers for the largest chunk, and the arrays that follow a matrix in the file. */
struct work {
  float *w;                    /* (chunk rows, n_in) */
  uint8_t *code;               /* (chunk rows, n_in) codes, or fp16 values */
  uint8_t *pack;               /* (chunk rows, n_in / 2) */
  void *scale;                 /* (n_out) fp16, W8: fp32 */
  uint16_t *szero;             /* (n_out) */
  uint8_t *s2, *z2;            /* (chunk rows, n_in / 128) natural order */
  uint8_t *s2_disk, *z2_disk;  /* (n_in / 128, n_out) permuted */
  struct qtr_rtn_error *error; /* (blocks of a chunk) */
  enum qtr_rtn_status *status; /* same */
};

static void work_free(struct work *k) {
  free(k->w);
  free(k->code);
  free(k->pack);
  free(k->scale);
  free(k->szero);
  free(k->s2);
  free(k->z2);
  free(k->s2_disk);
  free(k->z2_disk);
  free(k->error);
  free(k->status);
  *k = (struct work){0};
}

/* Rows a chunk has: whole blocks; vectors are one row. */
static size_t chunk_rows(const struct job *j) {
  size_t rows = CHUNK_BYTES / sizeof(float) / QTR_MAX(j->n_in, 1) / BLOCK_ROWS * BLOCK_ROWS;
  return QTR_MIN(QTR_MAX(rows, BLOCK_ROWS), QTR_MAX(j->n_out, 1));
}

static enum qtr_status work_alloc(struct work *k, const struct job *j, struct qtr_error *err) {
  size_t rows = chunk_rows(j), n = rows * j->n_in, blocks = qtr_ceil_div(rows, BLOCK_ROWS), groups = j->n_in / QTR_GROUP;
  bool w4 = j->kind == JOB_W4 || j->kind == JOB_W4_G128;
  *k = (struct work){0};
  bool ok = (k->w = malloc(n * sizeof *k->w + 1)) && (k->code = malloc(n * (j->kind == JOB_F16 ? 2 : 1) + 1)) &&
            (k->error = calloc(blocks, sizeof *k->error)) && (k->status = calloc(blocks, sizeof *k->status)) &&
            (k->scale = malloc(j->n_out * sizeof(float)));
  if (w4) ok = ok && (k->pack = malloc(n / 2 + 1)) && (k->szero = malloc(j->n_out * sizeof *k->szero));
  if (j->kind == JOB_W4_G128) {
    ok = ok && (k->s2 = malloc(rows * groups)) && (k->z2 = malloc(rows * groups)) &&
         (k->s2_disk = malloc(groups * j->n_out)) && (k->z2_disk = malloc(groups * j->n_out));
  }
  if (ok) return QTR_OK;
  work_free(k);
  return qtr_fail_memory(err, j->name, n * sizeof *k->w);
}

/* Rows [row, row + n_rows) of the source as floats; always fits: dtypes were checked. */
static void read_rows(const struct job *j, size_t row, size_t n_rows, float *w) {
  size_t size = qtr_dtype_bytes(j->source->dtype) * j->n_in;
  struct qtr_tensor part = *j->source;
  part.data = (const uint8_t *)j->source->data + row * size;
  part.n_bytes = n_rows * size;
  (void)qtr_tensor_to_floats(&part, w, n_rows * j->n_in, NULL);
}

/* Second-level scales of one block of 32 rows to their places in the file (A.4.2). row: first row of the block in the
 * matrix. */
static void place_s2(const struct job *j, const struct work *k, size_t row, size_t n_rows, const uint8_t *s2,
                     const uint8_t *z2) {
  size_t groups = j->n_in / QTR_GROUP;
  for (size_t r = 0; r < n_rows; r++) {
    for (size_t g = 0; g < groups; g++) {
      size_t at = g * j->n_out + qtr_s2_position(row + r);
      k->s2_disk[at] = s2[r * groups + g];
      k->z2_disk[at] = (uint8_t)(0u - z2[r * groups + g]);
    }
  }
}

/* Rounds block `b` of the chunk that begins at `row`; blocks touch different memory, so threads share nothing. */
static void round_block(const struct job *j, const struct work *k, size_t row, size_t n_rows, size_t b) {
  size_t begin = b * BLOCK_ROWS, n = QTR_MIN(n_rows - begin, (size_t)BLOCK_ROWS), in = j->n_in, groups = in / QTR_GROUP;
  float *w = k->w + begin * in;
  uint8_t *code = k->code + begin * in;
  uint16_t *half = (uint16_t *)k->scale + row + begin;
  k->error[b] = (struct qtr_rtn_error){0};
  read_rows(j, row + begin, n, w);
  switch (j->kind) {
    case JOB_W4: k->status[b] = qtr_rtn_w4(w, n, in, code, half, k->szero + row + begin, &k->error[b]); break;
    case JOB_W4_G128:
      k->status[b] = qtr_rtn_w4_g128(w, n, in, code, half, k->s2 + begin * groups, k->z2 + begin * groups, &k->error[b]);
      break;
    case JOB_W8: k->status[b] = qtr_rtn_w8(w, n, in, (int8_t *)code, (float *)k->scale + row + begin, &k->error[b]); break;
    default: k->status[b] = qtr_rtn_f16(w, n * in, (uint16_t *)(void *)k->code + begin * in, &k->error[b]); break;
  }
  if (k->status[b] || !k->pack) return;
  qtr_w4_pack(code, n, in, k->pack + begin * in / 2);
  if (k->s2) place_s2(j, k, row + begin, n, k->s2 + begin * groups, k->z2 + begin * groups);
}

static enum qtr_status explain(const struct job *j, enum qtr_rtn_status status, struct qtr_error *err) {
  if (status == QTR_RTN_NOT_FINITE) {
    return qtr_fail(err, QTR_ERR_FORMAT, "tensor %s holds a value that is not finite; the source is damaged",
                    j->source->name);
  }
  return qtr_fail(err, QTR_ERR_UNSUPPORTED, "tensor %s holds values beyond the range of fp16 (65504)%s", j->source->name,
                  j->kind == JOB_F16 ? "" : ", or scales that would be");
}

/* Writes the arrays that follow the codes of a matrix. */
static enum qtr_status write_scales(const struct job *j, const struct work *k, struct qtr_st_writer *writer,
                                    struct qtr_error *err) {
  size_t n = j->n_out, groups = j->n_in / QTR_GROUP;
  enum qtr_status status;
  switch (j->kind) {
    case JOB_W8: return qtr_st_write(writer, k->scale, n * sizeof(float), err);
    case JOB_W4:
      if ((status = qtr_st_write(writer, k->scale, n * sizeof(uint16_t), err))) return status;
      return qtr_st_write(writer, k->szero, n * sizeof(uint16_t), err);
    case JOB_W4_G128:
      if ((status = qtr_st_write(writer, k->scale, n * sizeof(uint16_t), err)) ||
          (status = qtr_st_write(writer, k->s2_disk, groups * n, err))) {
        return status;
      }
      return qtr_st_write(writer, k->z2_disk, groups * n, err);
    default: return QTR_OK;
  }
}

/* The blocks of one chunk, as a parallel loop. */
struct rounding {
  const struct job *job;
  const struct work *work;
  size_t row, n_rows;
};

static void round_blocks(void *arg, size_t begin, size_t end, int thread) {
  (void)thread;
  const struct rounding *r = arg;
  for (size_t b = begin; b < end; b++) round_block(r->job, r->work, r->row, r->n_rows, b);
}

/* One job from source to file; *done counts source bytes for the progress line. */
static enum qtr_status run_job(const struct plan *p, const struct job *j, struct qtr_st_writer *writer,
                               struct qtr_progress *progress, size_t *done, struct qtr_rtn_error *total) {
  *total = (struct qtr_rtn_error){0};
  if (j->kind == JOB_RAW) {
    *done += j->source->n_bytes;
    return qtr_st_write(writer, j->source->data, j->source->n_bytes, p->err);
  }
  struct work k;
  enum qtr_status status = work_alloc(&k, j, p->err);
  if (status) return status;
  size_t step = chunk_rows(j), row_bytes = qtr_dtype_bytes(j->source->dtype) * j->n_in;
  for (size_t row = 0; row < j->n_out && !status; row += step) {
    size_t n_rows = QTR_MIN(step, j->n_out - row), n_blocks = qtr_ceil_div(n_rows, BLOCK_ROWS);
    struct rounding rounding = {.job = j, .work = &k, .row = row, .n_rows = n_rows};
    qtr_threads_for(p->team, n_blocks, 1, round_blocks, &rounding);
    for (size_t b = 0; b < n_blocks && !status; b++) {
      if (k.status[b]) status = explain(j, k.status[b], p->err);
      total->squared += k.error[b].squared;
      total->norm += k.error[b].norm;
      total->max = fmax(total->max, k.error[b].max);
    }
    if (status) break;
    size_t n = n_rows * j->n_in;
    status = k.pack ? qtr_st_write(writer, k.pack, n / 2, p->err)
                    : qtr_st_write(writer, k.code, j->kind == JOB_F16 ? 2 * n : n, p->err);
    qtr_map_forget((const uint8_t *)j->source->data + row * row_bytes, n_rows * row_bytes);
    *done += n_rows * row_bytes;
    qtr_progress_update(progress, *done);
  }
  if (!status) status = write_scales(j, &k, writer, p->err);
  work_free(&k);
  return status;
}

static double relative(double squared, double norm) { return norm > 0 ? sqrt(squared / norm) : 0; }

static enum qtr_status run_plan(const struct plan *p, struct qtr_st_writer *writer, qtr_quantize_callback callback,
                                void *user, double *relative_error) {
  struct qtr_progress progress;
  size_t done = 0;
  double squared = 0, norm = 0;
  enum qtr_status status = QTR_OK;
  qtr_progress_start(&progress, "quantising", p->input_bytes, p->options->quiet);
  for (size_t i = 0; i < p->n_jobs && !status; i++) {
    const struct job *j = &p->job[i];
    struct qtr_rtn_error error;
    status = run_job(p, j, writer, &progress, &done, &error);
    if (status || !j->report) continue;
    if (j->layer >= 0) {
      squared += error.squared;
      norm += error.norm;
    }
    struct qtr_quantize_report report = {.layer = j->layer,
                                         .n_layers = p->config.n_layers,
                                         .projection = j->projection,
                                         .tensor = j->name,
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
  struct qtr_st_writer *writer = NULL;
  char *path = NULL, name[16];
  bool made = false;
  enum qtr_status status = check_options(&p);
  if (status || (status = qtr_config_read(options->model_dir, &p.config, err)) ||
      (status = qtr_checkpoint_open(options->model_dir, &checkpoint, err))) {
    goto done;
  }
  p.checkpoint = checkpoint;
  if ((status = make_plan(&p))) {
    (void)qtr_error_prefix(err, "%s", options->model_dir);
    goto done;
  }
  if ((status = qtr_quant_prepare_directory(options->model_dir, options->output_dir, options->overwrite, &made, err)))
    goto done;
  path = qtr_path_join(options->output_dir, "model.safetensors");
  if (!path) {
    status = qtr_fail_memory(err, "a path", strlen(options->output_dir));
    goto done;
  }
  const struct qtr_precision *q = &options->precision;
  int32_t kv_bits = q->kv_bits ? q->kv_bits : q->weight_bits == 16 ? 16 : 8;
  int n = snprintf(name, sizeof name, "w%da%d", (int)q->weight_bits & 31, (int)q->act_bits & 31);
  if (q->weight_bits != 16 || kv_bits != 16) (void)snprintf(name + n, sizeof name - (size_t)n, "kv%d", (int)kv_bits & 31);
  const char *const metadata[] = {"format", "pt", "precision", name, "producer", "quattuor", NULL};
  if ((status = qtr_st_create(path, p.entry, p.n_entries, metadata, &writer, err)) ||
      (status = run_plan(&p, writer, callback, user, &error))) {
    goto done;
  }
  struct qtr_quant_description description = {.precision = name,
                                              .method = "rtn",
                                              .weight_bits = q->weight_bits,
                                              .act_bits = q->act_bits,
                                              .kv_bits = kv_bits,
                                              .group_size = p.group_size,
                                              .head_bits = options->head_int8 ? 8 : 16,
                                              .embed_bits = options->embed_int8 ? 8 : 16};
  if ((status = qtr_quant_copy_files(options->model_dir, options->output_dir, err)) ||
      (status = qtr_quant_write_config(options->model_dir, options->output_dir, &description, err))) {
    goto done;
  }
  struct qtr_st_writer *last = writer;
  writer = NULL;
  if ((status = qtr_st_finish(last, err))) goto done;
  if (summary) {
    *summary = (struct qtr_quantize_summary){.group_size = p.group_size,
                                             .n_layers = p.config.n_layers,
                                             .n_tensors = p.n_entries,
                                             .input_bytes = p.input_bytes,
                                             .output_bytes = p.output_bytes,
                                             .relative_error = error,
                                             .seconds = qtr_now() - t0};
    memcpy(summary->precision, name, sizeof name);
  }
done:
  qtr_st_abort(writer);
  qtr_threads_free(p.team);
  if (status && made) (void)rmdir(options->output_dir); /* only when nothing is in it */
  qtr_checkpoint_close(checkpoint);
  free(path);
  free(p.job);
  free(p.entry);
  return status;
}
