/* safetensors.c - reads the header of a .safetensors file and checks all of it: 8 bytes of length, a JSON object name ->
 * {dtype, shape, data_offsets}, then the data, which the tensors must cover without overlap and without holes. Offsets need
 * not be aligned. The data itself is not touched: tensors point into the map. */
#include "base/checked.h"
#include "base/status.h"
#include "checkpoint/tensors.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#define MAX_HEADER_BYTES ((uint64_t)100 << 20) /* what the format's own library accepts */

struct entry {
  const char *name; /* in the JSON tree */
  enum qtr_dtype dtype;
  size_t n_dims, shape[QTR_MAX_DIMS];
  size_t begin, end; /* in the data */
};

static int compare_entries(const void *a, const void *b) {
  const struct entry *x = a, *y = b;
  if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
  if (x->end != y->end) return x->end < y->end ? -1 : 1;
  return strcmp(x->name, y->name);
}

/* A JSON tree takes up to a hundred times the memory of its text, so what a header may hold is counted before it is parsed.
 */
static enum qtr_status check_header_size(const char *text, size_t n, struct qtr_error *err) {
  size_t objects = 0, values = 0;
  for (size_t i = 0; i < n; i++) {
    objects += text[i] == '{';
    values += text[i] == ',' || text[i] == '[';
  }
  if (objects > QTR_MAX_TENSORS || values > 8 * QTR_MAX_TENSORS) {
    return qtr_fail(err, QTR_ERR_LIMIT, "the header names too many tensors; %zu are accepted", QTR_MAX_TENSORS);
  }
  return QTR_OK;
}

static enum qtr_status get_count(const json_t *value, size_t *out, const char *what, const char *shown,
                                 struct qtr_error *err) {
  if (!json_is_integer(value) || json_integer_value(value) < 0) {
    return qtr_fail(err, QTR_ERR_FORMAT, "tensor %s: %s must be numbers that are not negative", shown, what);
  }
  *out = (size_t)json_integer_value(value);
  return QTR_OK;
}

static enum qtr_status parse_entry(const char *name, const json_t *value, size_t data_bytes, struct entry *e,
                                   struct qtr_error *err) {
  char shown[128];
  qtr_printable(name, strlen(name), shown, sizeof shown);
  const char *dtype = json_string_value(json_object_get(value, "dtype"));
  const json_t *shape = json_object_get(value, "shape"), *offsets = json_object_get(value, "data_offsets");
  if (!dtype || !json_is_array(shape) || !json_is_array(offsets) || json_array_size(offsets) != 2) {
    return qtr_fail(err, QTR_ERR_FORMAT, "tensor %s: \"dtype\", \"shape\" and two \"data_offsets\" are required", shown);
  }
  *e = (struct entry){.name = name, .dtype = QTR_N_DTYPES};
  for (int d = 0; d < QTR_N_DTYPES; d++) {
    if (strcmp(dtype, qtr_dtype_name((enum qtr_dtype)d)) == 0) e->dtype = (enum qtr_dtype)d;
  }
  if (e->dtype == QTR_N_DTYPES) {
    char type[32];
    qtr_printable(dtype, strlen(dtype), type, sizeof type);
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "tensor %s has dtype %s, which is not supported", shown, type);
  }
  e->n_dims = json_array_size(shape);
  if (e->n_dims > QTR_MAX_DIMS) {
    return qtr_fail(err, QTR_ERR_FORMAT, "tensor %s has %zu dimensions; at most %d are accepted", shown, e->n_dims,
                    QTR_MAX_DIMS);
  }
  enum qtr_status status;
  for (size_t i = 0; i < e->n_dims; i++) {
    if ((status = get_count(json_array_get(shape, i), &e->shape[i], "shape", shown, err))) return status;
  }
  if ((status = get_count(json_array_get(offsets, 0), &e->begin, "data_offsets", shown, err)) ||
      (status = get_count(json_array_get(offsets, 1), &e->end, "data_offsets", shown, err))) {
    return status;
  }
  size_t n_elements, n_bytes;
  if ((status = qtr_tensor_measure(e->n_dims, e->shape, e->dtype, &n_elements, &n_bytes, err))) {
    (void)qtr_error_prefix(err, "tensor %s", shown);
    return status;
  }
  if (e->end < e->begin || e->end - e->begin != n_bytes) {
    return qtr_fail(err, QTR_ERR_FORMAT, "tensor %s: its shape and dtype %s need %zu bytes but data_offsets are %zu to %zu",
                    shown, dtype, n_bytes, e->begin, e->end);
  }
  if (e->end > data_bytes) {
    return qtr_fail(err, QTR_ERR_FORMAT,
                    "tensor %s ends at byte %zu of the data but the file has only %zu: it is truncated, fetch it again",
                    shown, e->end, data_bytes);
  }
  return QTR_OK;
}

enum qtr_status qtr_safetensors_read(struct qtr_checkpoint *checkpoint, const uint8_t *data, size_t n_bytes,
                                     struct qtr_error *err) {
  if (n_bytes < 8) return qtr_fail(err, QTR_ERR_FORMAT, "%zu bytes are too few for a safetensors file", n_bytes);
  uint64_t header_bytes = 0;
  for (int i = 7; i >= 0; i--) header_bytes = header_bytes << 8 | data[i];
  if (header_bytes > MAX_HEADER_BYTES) {
    return qtr_fail(err, QTR_ERR_FORMAT,
                    "no safetensors file: it announces a header of %llu bytes, at most %llu are accepted",
                    (unsigned long long)header_bytes, (unsigned long long)MAX_HEADER_BYTES);
  }
  if (header_bytes > n_bytes - 8) {
    return qtr_fail(err, QTR_ERR_FORMAT, "the header has %llu bytes but the file only %zu: it is truncated, fetch it again",
                    (unsigned long long)header_bytes, n_bytes);
  }
  const char *text = (const char *)data + 8;
  size_t text_len = (size_t)header_bytes, data_bytes = n_bytes - 8 - text_len;
  const uint8_t *base = data + 8 + text_len;
  enum qtr_status status = check_header_size(text, text_len, err);
  if (status) return status;

  struct entry *entries = NULL;
  json_error_t error;
  json_t *root = json_loadb(text, text_len, JSON_REJECT_DUPLICATES, &error);
  if (!json_is_object(root)) {
    char shown[96];
    qtr_printable(error.text, root ? 0 : strlen(error.text), shown, sizeof shown);
    status = qtr_fail(err, QTR_ERR_FORMAT, "the header is no JSON object: %s", root ? "another type" : shown);
    goto done;
  }
  entries = malloc((json_object_size(root) + 1) * sizeof *entries);
  if (!entries) {
    status = qtr_fail_memory(err, "the header", json_object_size(root) * sizeof *entries);
    goto done;
  }
  size_t n = 0;
  const char *name;
  json_t *value;
  json_object_foreach(root, name, value) {
    if (strcmp(name, "__metadata__") == 0) continue;
    if ((status = parse_entry(name, value, data_bytes, &entries[n], err))) goto done;
    n++;
  }
  qsort(entries, n, sizeof *entries, compare_entries);
  size_t at = 0;
  for (size_t i = 0; i < n; i++) {
    struct entry *e = &entries[i];
    if (e->begin != at) {
      char shown[128];
      qtr_printable(e->name, strlen(e->name), shown, sizeof shown);
      status = qtr_fail(err, QTR_ERR_FORMAT,
                        "tensor %s begins at byte %zu of the data, %s the tensor before it, which ends at %zu", shown,
                        e->begin, e->begin < at ? "inside" : "after a hole behind", at);
      goto done;
    }
    at = e->end;
    struct qtr_tensor tensor = {
        .dtype = e->dtype, .n_dims = e->n_dims, .data = base + e->begin, .n_bytes = e->end - e->begin};
    memcpy(tensor.shape, e->shape, sizeof tensor.shape);
    if ((status = qtr_checkpoint_add(checkpoint, e->name, strlen(e->name), &tensor, err))) goto done;
  }
  if (at != data_bytes) {
    status = qtr_fail(err, QTR_ERR_FORMAT, "the file holds %zu bytes of data but its tensors only %zu", data_bytes, at);
  }
done:
  free(entries);
  json_decref(root);
  return status;
}
