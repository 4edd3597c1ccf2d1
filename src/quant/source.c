/* source.c - reads the checkpoint that is quantised or converted (source.h). */
#include "quant/source.h"

#include "base/checked.h"
#include "base/file.h"
#include "base/progress.h"
#include "base/status.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK_BYTES ((size_t)32 << 20) /* of floats */

enum qtr_status qtr_source_open(const char *path, enum qtr_s2_order order, const struct qtr_config *config,
                                struct qtr_source *source, struct qtr_error *err) {
  *source = (struct qtr_source){.config = config};
  enum qtr_status status = qtr_checkpoint_open_ordered(path, order, &source->checkpoint, err);
  if (status) return status;
  size_t n = qtr_checkpoint_count(source->checkpoint);
  if (!(source->seen = calloc(n + 1, 1))) return qtr_fail_memory(err, "the plan", n);
  return QTR_OK;
}

void qtr_source_close(struct qtr_source *source) {
  qtr_checkpoint_close(source->checkpoint);
  free(source->seen);
  *source = (struct qtr_source){0};
}

const struct qtr_tensor *qtr_source_find(struct qtr_source *s, const char *name, const char *suffix) {
  char full[QTR_SLOT_NAME + 64];
  (void)snprintf(full, sizeof full, "%s%s", name, suffix);
  const struct qtr_tensor *t = qtr_checkpoint_find(s->checkpoint, full);
  if (t) s->seen[t - qtr_checkpoint_at(s->checkpoint, 0)] = 1;
  return t;
}

enum qtr_status qtr_source_get(struct qtr_source *s, const char *name, const char *suffix, size_t n_dims,
                               const size_t *shape, const struct qtr_tensor **tensor, struct qtr_error *err) {
  char full[QTR_SLOT_NAME + 64];
  (void)snprintf(full, sizeof full, "%s%s", name, suffix);
  (void)qtr_source_find(s, name, suffix);
  return qtr_checkpoint_get(s->checkpoint, full, n_dims, shape, tensor, err);
}

enum qtr_status qtr_source_vocab(struct qtr_source *s, const struct qtr_slot *slot, const struct qtr_tensor **tensor,
                                 struct qtr_error *err) {
  /* A tied head gets its own tensor: QServe's loaders look for lm_head.weight (A.2.4). */
  bool tied = slot->part == QTR_SLOT_HEAD && s->config->tie_word_embeddings && !qtr_source_find(s, slot->name, ".weight");
  const char *name = tied ? "model.embed_tokens" : slot->name;
  const struct qtr_tensor *t = *tensor = qtr_source_find(s, name, ".weight");
  if (t && t->n_dims == 2 && t->shape[0] >= slot->n_out && t->shape[1] == slot->n_in) return QTR_OK;
  return qtr_source_get(s, name, ".weight", 2, (const size_t[2]){slot->n_out, slot->n_in}, tensor, err); /* says what */
}

enum qtr_status qtr_source_leftovers(const struct qtr_source *s, struct qtr_error *err) {
  static const char *const harmless[] = {".inv_freq", ".masked_bias", "rotary_emb.cos_cached", "rotary_emb.sin_cached"};
  for (size_t i = 0; i < qtr_checkpoint_count(s->checkpoint); i++) {
    const char *name = qtr_checkpoint_at(s->checkpoint, i)->name;
    /* parts of larger models (a vision tower) are none of ours; lm_head.qweight without lm_head.weight is */
    if (s->seen[i] || (strncmp(name, "model.", 6) != 0 && strncmp(name, "lm_head.", 8) != 0)) continue;
    size_t len = strlen(name);
    bool skip = false;
    for (size_t k = 0; k < sizeof harmless / sizeof *harmless; k++) {
      size_t m = strlen(harmless[k]);
      skip |= len > m && strcmp(name + len - m, harmless[k]) == 0;
    }
    if (skip) continue;
    char shown[128];
    return qtr_fail(err, QTR_ERR_UNSUPPORTED,
                    "tensor %s has no place in a %s of %d layers; is config.json the right one for these weights?",
                    qtr_printable(name, len, shown, sizeof shown), s->config->architecture, (int)s->config->n_layers);
  }
  return QTR_OK;
}

size_t qtr_source_rows(const struct qtr_tensor *t) { return t->n_dims == 2 ? t->shape[0] : 1; }
size_t qtr_source_columns(const struct qtr_tensor *t) { return t->n_dims == 0 ? 1 : t->shape[t->n_dims - 1]; }

enum qtr_status qtr_source_announce(const struct qtr_tensor *t, enum qtr_store store, const char *name, const char *suffix,
                                    struct qtr_sink *sink, struct qtr_error *err) {
  if (store != QTR_STORE_RAW && t->dtype > QTR_DTYPE_F64) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "tensor %s has dtype %s; the source must hold float weights", t->name,
                    qtr_dtype_name(t->dtype));
  }
  const struct qtr_sink_item item = {.store = store,
                                     .name = name,
                                     .suffix = suffix,
                                     .dtype = t->dtype == QTR_DTYPE_U8 ? QTR_DTYPE_I8 : t->dtype, /* as QServe says it */
                                     .n_dims = t->n_dims == 2 ? 2 : 1,
                                     .n_out = qtr_source_rows(t),
                                     .n_in = qtr_source_columns(t)};
  return qtr_sink_add(sink, &item, err);
}

/* Rows as floats, as a parallel loop over rows. Always fits: dtypes were checked. */
struct reading {
  const struct qtr_tensor *tensor;
  size_t row, n_in; /* row: first */
  float *w;         /* (n_rows, n_in) */
};

static void read_rows(void *arg, size_t begin, size_t end, int thread) {
  (void)thread;
  const struct reading *r = arg;
  size_t size = qtr_dtype_bytes(r->tensor->dtype) * r->n_in;
  struct qtr_tensor part = *r->tensor;
  part.data = (const uint8_t *)part.data + (r->row + begin) * size;
  part.n_bytes = (end - begin) * size;
  (void)qtr_tensor_to_floats(&part, r->w + begin * r->n_in, (end - begin) * r->n_in, NULL);
}

void qtr_source_floats(const struct qtr_tensor *t, float *out, struct qtr_threads *team) {
  struct reading r = {.tensor = t, .n_in = qtr_source_columns(t), .w = out};
  qtr_threads_for(team, qtr_source_rows(t), 32, read_rows, &r);
}

enum qtr_status qtr_source_write(const struct qtr_tensor *t, enum qtr_store store, const char *name, struct qtr_sink *sink,
                                 struct qtr_threads *team, struct qtr_progress *progress, size_t *done,
                                 struct qtr_rtn_error *error, struct qtr_error *err) {
  if (store == QTR_STORE_RAW) {
    if (done) *done += t->n_bytes;
    return qtr_sink_write_raw(sink, name, t->data, t->n_bytes, err);
  }
  size_t n_out = qtr_source_rows(t), n_in = qtr_source_columns(t), rows = CHUNK_BYTES / sizeof(float) / QTR_MAX(n_in, 1);
  size_t step = QTR_MIN(QTR_MAX(rows / 32 * 32, 32), n_out), row_bytes = qtr_dtype_bytes(t->dtype) * n_in;
  struct reading r = {.tensor = t, .n_in = n_in, .w = malloc(step * n_in * sizeof(float) + 1)};
  if (!r.w) return qtr_fail_memory(err, name, step * n_in * sizeof(float));
  enum qtr_status status = QTR_OK;
  for (; r.row < n_out && !status; r.row += step) {
    size_t n_rows = QTR_MIN(step, n_out - r.row);
    qtr_threads_for(team, n_rows, 32, read_rows, &r);
    status = qtr_sink_write_floats(sink, name, r.w, n_rows, error, err);
    qtr_tensor_forget_part(t, r.row * row_bytes, n_rows * row_bytes);
    if (!done) continue;
    *done += n_rows * row_bytes;
    qtr_progress_update(progress, *done);
  }
  free(r.w);
  return status;
}
