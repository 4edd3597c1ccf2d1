/* work.c - files of finished layers (work.h): safetensors of our own, written by the same writer as checkpoints, so that one
 * appears complete or not at all. */
#include "quant/work.h"

#include "base/checked.h"
#include "base/file.h"
#include "base/status.h"
#include "checkpoint/safetensors_write.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_SETTINGS ((size_t)1 << 20)
#define CELL_FLOATS (sizeof(struct qtr_cell) / sizeof(float))
#define MAX_ENTRIES (3 * QTR_N_PROJECTIONS + 3)

static char *layer_path(const struct qtr_work *work, int32_t index, const char *suffix) {
  char name[64];
  (void)snprintf(name, sizeof name, "layer-%04d.%s", (int)index, suffix);
  return qtr_path_join(work->dir, name);
}

/* Removes every file in the directory; folders stay. */
static void empty_directory(const char *dir) {
  DIR *d = opendir(dir);
  const struct dirent *entry;
  while (d && (entry = readdir(d)) != NULL) {
    char *path = qtr_path_join(dir, entry->d_name);
    if (path && qtr_file_exists(path)) (void)unlink(path);
    free(path);
  }
  if (d) closedir(d);
}

enum qtr_status qtr_work_open(const char *dir, const json_t *settings, bool fresh, struct qtr_work *work,
                              struct qtr_error *err) {
  *work = (struct qtr_work){.dir = strdup(dir)};
  char *path = qtr_path_join(dir, "settings.json"), *wanted = json_dumps(settings, JSON_SORT_KEYS | JSON_INDENT(1));
  char *found = NULL;
  size_t len = 0;
  enum qtr_status status = QTR_OK;
  struct qtr_error ignored;
  if (!work->dir || !path || !wanted) {
    status = qtr_fail_memory(err, "a work directory", strlen(dir));
  } else if (mkdir(dir, 0777) != 0 && errno != EEXIST) {
    status = qtr_fail(err, QTR_ERR_IO, "cannot make %s: %s", dir, strerror(errno));
  } else if (!fresh && qtr_file_exists(path) && qtr_file_read(path, MAX_SETTINGS, &found, &len, &ignored) == QTR_OK &&
             len == strlen(wanted) && memcmp(found, wanted, len) == 0) {
    for (bool there = true; there;) {
      char *layer = layer_path(work, work->n_done, "safetensors");
      there = layer && qtr_file_exists(layer);
      work->n_done += there;
      free(layer);
    }
  } else {
    empty_directory(dir);
    status = qtr_file_write(path, wanted, strlen(wanted), err);
  }
  free(found);
  free(wanted);
  free(path);
  return status;
}

void qtr_work_close(struct qtr_work *work, bool remove) {
  if (work->dir && remove) {
    empty_directory(work->dir);
    (void)rmdir(work->dir);
  }
  free(work->dir);
  *work = (struct qtr_work){0};
}

/* ---- one layer ----------------------------------------------------------------------------------- */

/* The tensors of a layer's file, in order: a name, a shape, where the data is. */
struct listing {
  struct qtr_st_entry entry[MAX_ENTRIES];
  const void *data[MAX_ENTRIES];
  size_t n_bytes[MAX_ENTRIES], n;
};

static void list(struct listing *l, enum qtr_dtype dtype, const char *name, const char *suffix, const void *data, size_t d0,
                 size_t d1) {
  struct qtr_st_entry *e = &l->entry[l->n];
  *e = (struct qtr_st_entry){.dtype = dtype, .n_dims = 2, .shape = {d0, d1}};
  (void)snprintf(e->name, sizeof e->name, "%s%s", name, suffix);
  l->data[l->n] = data;
  l->n_bytes[l->n++] = d0 * d1 * qtr_dtype_bytes(dtype);
}

enum qtr_status qtr_work_save(struct qtr_work *work, const struct qtr_work_layer *layer, struct qtr_error *err) {
  struct listing l = {.n = 0};
  size_t hidden = (size_t)layer->floats.config->hidden_size;
  for (enum qtr_projection p = QTR_Q; p < QTR_N_PROJECTIONS; p++) {
    const struct qtr_grid *g = &layer->grid[p];
    const struct qtr_float_matrix *m = &layer->floats.m[p];
    if (g->cell) {
      list(&l, QTR_DTYPE_F32, qtr_projection_names[p], ".cell", g->cell, g->n_out, g->n_groups * CELL_FLOATS);
      list(&l, QTR_DTYPE_I8, qtr_projection_names[p], ".code", g->code, g->n_out, g->n_in);
    } else {
      list(&l, QTR_DTYPE_F32, qtr_projection_names[p], ".weight", m->w, m->n_out, m->n_in);
    }
    if (m->bias) list(&l, QTR_DTYPE_F32, qtr_projection_names[p], ".bias", m->bias, 1, m->n_out);
  }
  list(&l, QTR_DTYPE_F32, "input_layernorm", "", layer->floats.input_norm, 1, hidden);
  list(&l, QTR_DTYPE_F32, "post_attention_layernorm", "", layer->floats.post_norm, 1, hidden);
  list(&l, QTR_DTYPE_F32, "kv_scale", "", layer->kv_scale, 1, 2);
  char *path = layer_path(work, layer->floats.index, "safetensors"), *report = json_dumps(layer->report, 0);
  struct qtr_st_writer *writer = NULL;
  enum qtr_status status = path && report ? QTR_OK : qtr_fail_memory(err, "a layer's report", 0);
  if (!status) status = qtr_st_create(path, l.entry, l.n, NULL, &writer, err);
  for (size_t i = 0; i < l.n && !status; i++) status = qtr_st_write(writer, l.data[i], l.n_bytes[i], err);
  /* The report first: the layer's file says that all is there. */
  char *report_path = layer_path(work, layer->floats.index, "json");
  if (!status && !report_path) status = qtr_fail_memory(err, "a path", 0);
  if (!status) status = qtr_file_write(report_path, report, strlen(report), err);
  if (!status) {
    status = qtr_st_finish(writer, err);
    writer = NULL;
  }
  if (!status) work->n_done = layer->floats.index + 1;
  qtr_st_abort(writer);
  free(report_path);
  free(report);
  free(path);
  return status;
}

/* The floats of <name><suffix> into *out (malloc'ed), when it is there. */
static enum qtr_status load_floats(const struct qtr_checkpoint *file, const char *name, const char *suffix, float **out,
                                   struct qtr_error *err) {
  char full[96];
  (void)snprintf(full, sizeof full, "%s%s", name, suffix);
  const struct qtr_tensor *t = qtr_checkpoint_find(file, full);
  if (!t) return QTR_OK;
  size_t n = t->n_bytes / sizeof(float);
  *out = malloc(QTR_MAX(t->n_bytes, 1));
  if (!*out) return qtr_fail_memory(err, full, t->n_bytes);
  return qtr_tensor_to_floats(t, *out, n, err);
}

static enum qtr_status load_matrix(const struct qtr_checkpoint *file, const char *name, struct qtr_grid *grid,
                                   struct qtr_float_matrix *m, struct qtr_error *err) {
  char full[96];
  (void)snprintf(full, sizeof full, "%s.code", name);
  const struct qtr_tensor *t = qtr_checkpoint_find(file, full);
  enum qtr_status status = load_floats(file, name, ".weight", &m->w, err);
  if (!status) status = load_floats(file, name, ".bias", &m->bias, err);
  if (status || !t) return status;
  float *cells = NULL;
  status = load_floats(file, name, ".cell", &cells, err);
  (void)snprintf(full, sizeof full, "%s.cell", name);
  const struct qtr_tensor *c = qtr_checkpoint_find(file, full);
  grid->n_groups = c && c->n_dims == 2 ? c->shape[1] / CELL_FLOATS : 0;
  grid->cell = (struct qtr_cell *)(void *)cells;
  grid->code = malloc(t->n_bytes);
  if (!status && !grid->code) status = qtr_fail_memory(err, full, t->n_bytes);
  if (status) return status;
  if (t->n_dims != 2 || t->shape[0] != m->n_out || t->shape[1] != m->n_in || !cells)
    return qtr_fail(err, QTR_ERR_FORMAT, "tensor %s is not of this model", full);
  memcpy(grid->code, t->data, t->n_bytes);
  return QTR_OK;
}

enum qtr_status qtr_work_load(const struct qtr_work *work, const struct qtr_config *config, int32_t index,
                              struct qtr_work_layer *layer, struct qtr_error *err) {
  *layer = (struct qtr_work_layer){.floats = {.config = config, .index = index}};
  qtr_float_layer_shape(&layer->floats);
  char *path = layer_path(work, index, "safetensors"), *report = layer_path(work, index, "json");
  struct qtr_checkpoint *file = NULL;
  float *scale = NULL;
  enum qtr_status status =
      path && report ? qtr_checkpoint_open(path, &file, err) : qtr_fail_memory(err, "a path", strlen(work->dir));
  for (enum qtr_projection p = QTR_Q; p < QTR_N_PROJECTIONS && !status; p++) {
    status = load_matrix(file, qtr_projection_names[p], &layer->grid[p], &layer->floats.m[p], err);
    layer->grid[p].n_out = layer->floats.m[p].n_out;
    layer->grid[p].n_in = layer->floats.m[p].n_in;
  }
  if (!status) status = load_floats(file, "input_layernorm", "", &layer->floats.input_norm, err);
  if (!status) status = load_floats(file, "post_attention_layernorm", "", &layer->floats.post_norm, err);
  if (!status) status = load_floats(file, "kv_scale", "", &scale, err);
  if (!status && scale) memcpy(layer->kv_scale, scale, sizeof layer->kv_scale);
  if (!status) layer->report = json_load_file(report, 0, NULL);
  if (status) {
    (void)qtr_error_prefix(err, "%s", path ? path : work->dir);
    qtr_work_layer_free(layer);
  }
  qtr_checkpoint_close(file);
  free(scale);
  free(report);
  free(path);
  return status;
}

void qtr_work_layer_free(struct qtr_work_layer *layer) {
  for (enum qtr_projection p = QTR_Q; p < QTR_N_PROJECTIONS; p++) qtr_grid_free(&layer->grid[p]);
  qtr_float_layer_free(&layer->floats);
  json_decref(layer->report);
  *layer = (struct qtr_work_layer){0};
}
