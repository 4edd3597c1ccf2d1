/* torch.c - tensors of a torch.save archive (spec A.8): a zip of stored entries <root>/data.pkl and <root>/data/<key>.
 * Contiguous tensors point into the map; tensors with other strides are copied once. */
#include "base/checked.h"
#include "base/status.h"
#include "checkpoint/tensors.h"
#include "checkpoint/unpickle.h"
#include "checkpoint/zip.h"

#include <stdio.h>
#include <string.h>

#define MAX_KEY 64

struct reader {
  struct qtr_checkpoint *checkpoint;
  struct qtr_zip zip;
  const char *root; /* (root_len) "archive/" of every entry's name */
  size_t root_len;
  size_t copied, copy_limit; /* bytes of copies so far, and how many there may be: no more than the file has */
};

static const struct qtr_zip_entry *find_entry(const struct reader *r, const char *prefix, const char *key, size_t key_len) {
  char name[QTR_MAX_TENSOR_NAME + MAX_KEY + 16];
  if (key_len > MAX_KEY || r->root_len > QTR_MAX_TENSOR_NAME) return NULL;
  int n = snprintf(name, sizeof name, "%.*s%s%.*s", (int)r->root_len, r->root, prefix, (int)key_len, key);
  return n > 0 && (size_t)n < sizeof name ? qtr_zip_find(&r->zip, name, (size_t)n) : NULL;
}

/* The one entry "<root>/data.pkl". */
static enum qtr_status find_pickle(struct reader *r, const struct qtr_zip_entry **pickle, struct qtr_error *err) {
  *pickle = NULL;
  for (size_t i = 0; i < r->zip.n_entries; i++) {
    const struct qtr_zip_entry *e = &r->zip.entry[i];
    if (e->name_len < 10 || memcmp(e->name + e->name_len - 9, "/data.pkl", 9) != 0) continue;
    if (memchr(e->name, '/', e->name_len - 9)) continue;
    if (*pickle) return qtr_fail(err, QTR_ERR_FORMAT, "the archive has two data.pkl");
    *pickle = e;
    r->root = e->name;
    r->root_len = e->name_len - 8;
  }
  if (!*pickle) return qtr_fail(err, QTR_ERR_FORMAT, "the archive has no data.pkl, so torch.save did not write it");
  const struct qtr_zip_entry *order = find_entry(r, "byteorder", "", 0);
  if (order && (order->n_bytes != 6 || memcmp(order->data, "little", 6) != 0)) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "the archive was written on a big-endian machine");
  }
  return QTR_OK;
}

/* Copies a strided tensor row by row of its last dimension. index: (n_dims) counters, an odometer. */
static void copy_strided(const struct qtr_pickle_value *v, const uint8_t *storage, size_t size, size_t n_elements,
                         uint8_t *out) {
  size_t index[QTR_MAX_DIMS] = {0}, n_dims = v->u.tensor->n_dims, at = v->u.tensor->offset;
  for (size_t i = 0; i < n_elements; i++) {
    memcpy(out + i * size, storage + at * size, size);
    for (size_t d = n_dims; d-- > 0;) {
      at += v->u.tensor->stride[d];
      if (++index[d] < v->u.tensor->shape[d]) break;
      at -= v->u.tensor->stride[d] * index[d];
      index[d] = 0;
    }
  }
}

static enum qtr_status add_tensor(struct reader *r, const struct qtr_pickle_value *name, const struct qtr_pickle_value *v,
                                  struct qtr_error *err) {
  enum qtr_dtype dtype = v->u.tensor->storage->u.storage.dtype;
  struct qtr_tensor t = {.dtype = dtype, .n_dims = v->u.tensor->n_dims};
  memcpy(t.shape, v->u.tensor->shape, sizeof t.shape);
  size_t n_elements, size = qtr_dtype_bytes(dtype);
  enum qtr_status status = qtr_tensor_measure(t.n_dims, t.shape, dtype, &n_elements, &t.n_bytes, err);
  if (status) return status;

  const struct qtr_pickle_value *s = v->u.tensor->storage;
  const struct qtr_zip_entry *e = find_entry(r, "data/", s->u.storage.key, s->u.storage.key_len);
  if (!e) {
    char key[MAX_KEY];
    return qtr_fail(err, QTR_ERR_FORMAT, "its storage data/%s is not in the archive",
                    qtr_printable(s->u.storage.key, s->u.storage.key_len, key, sizeof key));
  }
  size_t have = QTR_MIN(e->n_bytes / size, s->u.storage.n_elements);

  /* the highest element that shape, stride and offset reach */
  size_t last = v->u.tensor->offset, step;
  bool overflow = false, contiguous = true;
  size_t expected = 1;
  for (size_t d = t.n_dims; d-- > 0 && n_elements > 0;) {
    overflow |= qtr_mul_overflow(t.shape[d] - 1, v->u.tensor->stride[d], &step) || qtr_add_overflow(last, step, &last);
    contiguous &= t.shape[d] == 1 || v->u.tensor->stride[d] == expected;
    expected *= t.shape[d]; /* at most n_elements */
  }
  if (overflow || (n_elements > 0 && last >= have)) {
    return qtr_fail(err, QTR_ERR_FORMAT, "it reaches beyond its storage of %zu elements", have);
  }
  if (n_elements == 0) {
    t.data = e->data;
  } else if (contiguous) {
    t.data = e->data + v->u.tensor->offset * size;
  } else {
    if (t.n_bytes > r->copy_limit - r->copied) {
      return qtr_fail(err, QTR_ERR_LIMIT, "the strided tensors together are larger than the file; save contiguous ones");
    }
    r->copied += t.n_bytes;
    uint8_t *copy = qtr_checkpoint_own(r->checkpoint, t.n_bytes);
    if (!copy) return qtr_fail_memory(err, "a strided tensor", t.n_bytes);
    copy_strided(v, e->data, size, n_elements, copy);
    t.data = copy;
  }
  return qtr_checkpoint_add(r->checkpoint, name->u.string.text, name->u.string.len, &t, err);
}

static bool is_key(const struct qtr_pickle_value *v, const char *text) {
  return v->kind == QTR_PICKLE_STRING && v->u.string.len == strlen(text) &&
         memcmp(v->u.string.text, text, v->u.string.len) == 0;
}

/* A training checkpoint keeps the state dict under one of these names; a plain one is the dict itself. */
static const struct qtr_pickle_value *find_state(const struct qtr_pickle_value *dict) {
  for (size_t i = 0; i + 1 < dict->u.list.n; i += 2) {
    const struct qtr_pickle_value *key = dict->u.list.item[i], *v = dict->u.list.item[i + 1];
    if (v->kind == QTR_PICKLE_DICT && (is_key(key, "state_dict") || is_key(key, "model"))) return v;
  }
  return dict;
}

/* ---- dictionaries in each other ------------------------------------------------------------------ */

enum { MAX_DEPTH = 6, MAX_VISITED = 1 << 20 };

/* A value that may hold others. It may also hold itself, or share what it holds a million times over, so the walk is bounded
 * in depth and in length. */
struct nested {
  struct reader *reader;
  size_t n_left;                  /* values that may still be visited */
  char name[QTR_MAX_TENSOR_NAME]; /* (len) "a.b.0.": the way there */
};

static enum qtr_status add_number(struct reader *r, const char *name, size_t name_len, double x, struct qtr_error *err) {
  double *copy = qtr_checkpoint_own(r->checkpoint, sizeof *copy);
  if (!copy) return qtr_fail_memory(err, "a number", sizeof *copy);
  *copy = x;
  const struct qtr_tensor t = {.dtype = QTR_DTYPE_F64, .data = copy, .n_bytes = sizeof *copy};
  return qtr_checkpoint_add(r->checkpoint, name, name_len, &t, err);
}

static enum qtr_status add_nested(struct nested *w, const struct qtr_pickle_value *v, size_t len, int depth,
                                  struct qtr_error *err);

/* One value that v holds, by the name it has there. */
static enum qtr_status add_inner(struct nested *w, const char *key, size_t key_len, const struct qtr_pickle_value *v,
                                 size_t len, int depth, struct qtr_error *err) {
  if (key_len + 1 >= sizeof w->name - len) {
    return qtr_fail(err, QTR_ERR_LIMIT, "a name in it is longer than %zu bytes", sizeof w->name);
  }
  memcpy(w->name + len, key, key_len);
  w->name[len + key_len] = '.';
  return add_nested(w, v, len + key_len + 1, depth + 1, err);
}

static enum qtr_status add_nested(struct nested *w, const struct qtr_pickle_value *v, size_t len, int depth,
                                  struct qtr_error *err) {
  const struct qtr_pickle_value name = {.kind = QTR_PICKLE_STRING, .u.string = {w->name, len ? len - 1 : 0}};
  enum qtr_status status = QTR_OK;
  if (w->n_left == 0 || depth > MAX_DEPTH) {
    return qtr_fail(err, QTR_ERR_LIMIT,
                    "the dictionaries in it hold more than %d values, or lie more than %d deep in each other", MAX_VISITED,
                    MAX_DEPTH);
  }
  w->n_left--;
  switch (v->kind) {
    case QTR_PICKLE_TENSOR: return add_tensor(w->reader, &name, v, err);
    case QTR_PICKLE_INT: return add_number(w->reader, w->name, name.u.string.len, (double)v->u.integer, err);
    case QTR_PICKLE_FLOAT: return add_number(w->reader, w->name, name.u.string.len, v->u.real, err);
    case QTR_PICKLE_DICT:
      for (size_t i = 0; i + 1 < v->u.list.n && !status; i += 2) {
        const struct qtr_pickle_value *key = v->u.list.item[i];
        if (key->kind != QTR_PICKLE_STRING) continue;
        status = add_inner(w, key->u.string.text, key->u.string.len, v->u.list.item[i + 1], len, depth, err);
      }
      return status;
    case QTR_PICKLE_LIST:
    case QTR_PICKLE_TUPLE:
      for (size_t i = 0; i < v->u.list.n && !status; i++) {
        char key[24];
        int n = snprintf(key, sizeof key, "%zu", i);
        status = add_inner(w, key, (size_t)n, v->u.list.item[i], len, depth, err);
      }
      return status;
    default: return QTR_OK;
  }
}

/* ---- archives ------------------------------------------------------------------------------------ */

enum qtr_status qtr_torch_read(struct qtr_checkpoint *checkpoint, const uint8_t *data, size_t n_bytes, bool nested,
                               struct qtr_error *err) {
  struct reader r = {.checkpoint = checkpoint, .copy_limit = n_bytes};
  const struct qtr_zip_entry *entry = NULL;
  struct qtr_pickle *pickle = NULL;
  const struct qtr_pickle_value *dict;
  enum qtr_status status = qtr_zip_open(data, n_bytes, &r.zip, err);
  if (status || (status = find_pickle(&r, &entry, err)) ||
      (status = qtr_pickle_load(entry->data, entry->n_bytes, &pickle, &dict, err))) {
    goto done;
  }
  if (dict->kind != QTR_PICKLE_DICT) {
    status = qtr_fail(err, QTR_ERR_UNSUPPORTED, "the pickle holds no dictionary of tensors");
    goto done;
  }
  if (nested) {
    struct nested w = {.reader = &r, .n_left = MAX_VISITED};
    status = add_nested(&w, dict, 0, 0, err);
    goto done;
  }
  dict = find_state(dict);
  for (size_t i = 0; i + 1 < dict->u.list.n; i += 2) {
    const struct qtr_pickle_value *key = dict->u.list.item[i], *v = dict->u.list.item[i + 1];
    if (key->kind != QTR_PICKLE_STRING || v->kind != QTR_PICKLE_TENSOR) continue; /* step counts, version marks */
    if ((status = add_tensor(&r, key, v, err))) {
      char shown[128];
      (void)qtr_error_prefix(err, "tensor %s", qtr_printable(key->u.string.text, key->u.string.len, shown, sizeof shown));
      goto done;
    }
  }
done:
  qtr_pickle_free(pickle);
  qtr_zip_close(&r.zip);
  return status;
}
