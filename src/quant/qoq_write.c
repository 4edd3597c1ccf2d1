/* qoq_write.c - from the work directory to the checkpoint (qoq_write.h). */
#include "quant/qoq_write.h"

#include "base/checked.h"
#include "base/half.h"
#include "base/status.h"

#include <stdlib.h>
#include <string.h>

enum qtr_status qtr_qoq_writer_open(const struct qtr_calibrate_job *job, const struct qtr_work *work, struct qtr_sink *sink,
                                    struct qtr_qoq_writer *writer, struct qtr_error *err) {
  *writer = (struct qtr_qoq_writer){.job = job, .work = work, .sink = sink, .index = -1};
  return qtr_calibrate_rotation(job->options, job->config, &writer->rotation, err);
}

void qtr_qoq_writer_close(struct qtr_qoq_writer *writer) {
  qtr_work_layer_free(&writer->layer);
  qtr_rotation_free(&writer->rotation);
}

static enum qtr_status write_floats(struct qtr_qoq_writer *w, const char *name, enum qtr_store store, const float *x,
                                    size_t n_rows, size_t n_in, struct qtr_error *err) {
  if (store == QTR_STORE_RAW) return qtr_sink_write_raw(w->sink, name, x, n_rows * n_in * sizeof *x, err);
  return qtr_sink_write_floats(w->sink, name, x, n_rows, NULL, err);
}

/* Embedding or head in chunks of rows; the head with the final norm's gain in it. */
static enum qtr_status write_vocab(struct qtr_qoq_writer *w, const struct qtr_slot *slot, const struct qtr_tensor *t,
                                   enum qtr_store store, struct qtr_error *err) {
  size_t hidden = slot->n_in, rows = t->shape[0], row_bytes = qtr_dtype_bytes(t->dtype) * hidden;
  size_t step = QTR_MAX(((size_t)16 << 20) / (hidden * sizeof(float)) / 32 * 32, (size_t)32);
  float *gain = NULL, *x = malloc(QTR_MIN(step, rows) * hidden * sizeof *x);
  enum qtr_status status = x ? QTR_OK : qtr_fail_memory(err, slot->name, step * hidden * sizeof *x);
  bool fold = slot->part == QTR_SLOT_HEAD && w->job->options->rotate;
  if (!status && fold) status = qtr_read_vector(w->job->source->checkpoint, "model.norm.weight", hidden, &gain, err);
  for (size_t row = 0; row < rows && !status; row += step) {
    size_t n = QTR_MIN(step, rows - row);
    struct qtr_tensor part = *t;
    part.data = (const uint8_t *)t->data + row * row_bytes;
    part.n_bytes = n * row_bytes;
    status = qtr_tensor_to_floats(&part, x, n * hidden, err);
    for (size_t i = 0; i < n * hidden && gain && !status; i++) x[i] *= gain[i % hidden];
    if (!status && w->job->options->rotate) status = qtr_rotate_rows(w->job->team, &w->rotation, x, n, hidden, err);
    if (!status) status = write_floats(w, slot->name, store, x, n, hidden, err);
    qtr_tensor_forget_part(t, row * row_bytes, n * row_bytes);
  }
  free(gain);
  free(x);
  return status;
}

/* Cells and codes as the sink takes them. */
static enum qtr_status write_grid(struct qtr_qoq_writer *w, const char *name, const struct qtr_grid *g,
                                  struct qtr_error *err) {
  size_t n = g->n_out, cells = n * g->n_groups;
  enum qtr_linear_format format = w->job->format;
  uint16_t *scale = malloc(n * sizeof *scale), *szero = malloc(n * sizeof *szero);
  float *dequant = malloc(n * sizeof *dequant);
  uint8_t *s2 = malloc(cells), *z2 = malloc(cells);
  enum qtr_status status = QTR_OK;
  struct qtr_sink_codes codes = {.code = (const uint8_t *)g->code};
  if (!scale || !szero || !dequant || !s2 || !z2) {
    status = qtr_fail_memory(err, name, cells);
    goto done;
  }
  for (size_t r = 0; r < n; r++) {
    const struct qtr_cell *first = &g->cell[r * g->n_groups];
    scale[r] = qtr_f16_from_f32(format == QTR_LINEAR_W4A8_G128 ? first->factor : first->scale);
    szero[r] = qtr_f16_from_f32(first->zero);
    dequant[r] = first->scale;
  }
  for (size_t i = 0; i < cells && format == QTR_LINEAR_W4A8_G128; i++) {
    s2[i] = (uint8_t)g->cell[i].scale;
    z2[i] = (uint8_t)g->cell[i].zero;
  }
  if (format == QTR_LINEAR_W8A8) {
    codes.dequant = dequant;
  } else {
    codes.scale = scale;
    if (format == QTR_LINEAR_W4A8) codes.szero = szero;
    if (format == QTR_LINEAR_W4A8_G128) codes.s2 = s2;
    if (format == QTR_LINEAR_W4A8_G128) codes.z2 = z2;
  }
  status = qtr_sink_write_codes(w->sink, name, &codes, n, err);
done:
  free(scale);
  free(szero);
  free(dequant);
  free(s2);
  free(z2);
  return status;
}

static enum qtr_status write_in_layer(struct qtr_qoq_writer *w, const struct qtr_slot *slot, bool bias,
                                      const struct qtr_tensor *tensor, enum qtr_store store, double errors[3],
                                      struct qtr_error *err) {
  if (w->index != slot->layer) {
    qtr_work_layer_free(&w->layer);
    w->index = -1;
    enum qtr_status status = qtr_work_load(w->work, w->job->config, slot->layer, &w->layer, err);
    if (status) return status;
    w->index = slot->layer;
  }
  const struct qtr_work_layer *l = &w->layer;
  if (slot->part == QTR_SLOT_KV_SCALE) /* measured, or given */
    return qtr_sink_write_raw(w->sink, slot->name, tensor ? tensor->data : l->kv_scale, sizeof l->kv_scale, err);
  if (slot->part == QTR_SLOT_NORM) {
    bool post = strstr(slot->name, "post_attention") != NULL;
    return write_floats(w, slot->name, store, post ? l->floats.post_norm : l->floats.input_norm, 1, slot->n_in, err);
  }
  enum qtr_projection p = QTR_Q;
  for (; p < QTR_DOWN; p++) {
    size_t n = strlen(qtr_projection_names[p]), len = strlen(slot->name);
    if (len > n && strcmp(slot->name + len - n, qtr_projection_names[p]) == 0) break;
  }
  const struct qtr_float_matrix *m = &l->floats.m[p];
  if (bias) return write_floats(w, slot->name, store, m->bias, 1, m->n_out, err);
  const json_t *pair = json_object_get(l->report, qtr_projection_names[p]);
  for (size_t i = 0; i < 3 && json_is_array(pair); i++) errors[i] = json_number_value(json_array_get(pair, i));
  if (!l->grid[p].cell) return write_floats(w, slot->name, store, m->w, m->n_out, m->n_in, err);
  return write_grid(w, slot->name, &l->grid[p], err);
}

enum qtr_status qtr_qoq_write(struct qtr_qoq_writer *w, const struct qtr_slot *slot, bool bias,
                              const struct qtr_tensor *tensor, enum qtr_store store, double errors[3],
                              struct qtr_error *err) {
  errors[0] = errors[1] = errors[2] = 0;
  if (slot->layer >= 0) return write_in_layer(w, slot, bias, tensor, store, errors, err);
  if (slot->part != QTR_SLOT_NORM) return write_vocab(w, slot, tensor, store, err);
  float *gain = NULL;
  enum qtr_status status = qtr_read_vector(w->job->source->checkpoint, "model.norm.weight", slot->n_in, &gain, err);
  for (size_t i = 0; i < slot->n_in && w->job->options->rotate && !status; i++) gain[i] = 1; /* it is in the head */
  if (!status) status = write_floats(w, slot->name, store, gain, 1, slot->n_in, err);
  free(gain);
  return status;
}
