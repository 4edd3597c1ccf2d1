/* checkpoint.c - which files of a directory make the checkpoint (spec A.1.3), the table of all their tensors, look-ups with
 * checks, and the weight format they add up to (checkpoint.h).
 *
 * A directory is read as Hugging Face reads it: model.safetensors, else the shards that model.safetensors.index.json lists,
 * else every *.safetensors; only without any of these the same with pytorch_model.bin, and last every *.bin and *.pt. */
#include "checkpoint/checkpoint.h"

#include "base/checked.h"
#include "base/file.h"
#include "base/half.h"
#include "base/status.h"
#include "checkpoint/packing.h"
#include "checkpoint/tensors.h"

#include <dirent.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_FILES 4096
#define MAX_INDEX_BYTES (64u << 20)

struct qtr_checkpoint {
  struct qtr_map *map; /* (n_files) */
  char **file;         /* (n_files) names without the directory, printable */
  size_t n_files;
  struct qtr_tensor *tensor; /* (n_tensors) */
  uint32_t *file_of;         /* (n_tensors) index into file */
  uint32_t *by_name;         /* (n_tensors) tensor indices in strcmp order of the names */
  size_t n_tensors, capacity;
  void **owned; /* (n_owned) names and copies */
  size_t n_owned, owned_capacity;
  enum qtr_s2_order s2_order;
  bool nested;
};

/* ---- the table ----------------------------------------------------------------------------------- */

void *qtr_checkpoint_own(struct qtr_checkpoint *c, size_t n_bytes) {
  if (c->n_owned == c->owned_capacity) {
    size_t capacity = c->owned_capacity ? 2 * c->owned_capacity : 256;
    void **owned = realloc(c->owned, capacity * sizeof *owned);
    if (!owned) return NULL;
    c->owned = owned;
    c->owned_capacity = capacity;
  }
  void *p = malloc(n_bytes ? n_bytes : 1);
  if (p) c->owned[c->n_owned++] = p;
  return p;
}

enum qtr_status qtr_tensor_measure(size_t n_dims, const size_t *shape, enum qtr_dtype dtype, size_t *n_elements,
                                   size_t *n_bytes, struct qtr_error *err) {
  size_t n = 1;
  bool overflow = n_dims > QTR_MAX_DIMS;
  for (size_t i = 0; i < n_dims && !overflow; i++) overflow = qtr_mul_overflow(n, shape[i], &n);
  *n_elements = n;
  if (overflow || qtr_mul_overflow(n, qtr_dtype_bytes(dtype), n_bytes) || *n_bytes > QTR_MAX_TENSOR_BYTES) {
    return qtr_fail(err, QTR_ERR_FORMAT, "its shape has too many elements");
  }
  return QTR_OK;
}

enum qtr_status qtr_checkpoint_add(struct qtr_checkpoint *c, const char *name, size_t name_len,
                                   const struct qtr_tensor *tensor, struct qtr_error *err) {
  if (name_len == 0 || name_len > QTR_MAX_TENSOR_NAME || memchr(name, 0, name_len)) {
    return qtr_fail(err, QTR_ERR_FORMAT, "a tensor's name has %zu bytes or a zero byte; 1 to %d without zeros are accepted",
                    name_len, QTR_MAX_TENSOR_NAME);
  }
  if (c->n_tensors == QTR_MAX_TENSORS) {
    return qtr_fail(err, QTR_ERR_LIMIT, "more than %zu tensors", QTR_MAX_TENSORS);
  }
  if (c->n_tensors == c->capacity) {
    size_t capacity = c->capacity ? 2 * c->capacity : 256;
    struct qtr_tensor *tensors = realloc(c->tensor, capacity * sizeof *tensors);
    if (tensors) c->tensor = tensors;
    uint32_t *files = realloc(c->file_of, capacity * sizeof *files);
    if (files) c->file_of = files;
    if (!tensors || !files) return qtr_fail_memory(err, "the table of tensors", capacity * sizeof *tensors);
    c->capacity = capacity;
  }
  char *copy = qtr_checkpoint_own(c, name_len + 1);
  if (!copy) return qtr_fail_memory(err, "a tensor's name", name_len + 1);
  memcpy(copy, name, name_len);
  copy[name_len] = 0;
  c->file_of[c->n_tensors] = (uint32_t)(c->n_files ? c->n_files - 1 : 0);
  c->tensor[c->n_tensors] = *tensor;
  c->tensor[c->n_tensors++].name = copy;
  return QTR_OK;
}

static int compare_names(const void *a, const void *b, void *tensors) {
  const struct qtr_tensor *t = tensors;
  return strcmp(t[*(const uint32_t *)a].name, t[*(const uint32_t *)b].name);
}

/* Sorts the names and refuses doubles: two files that say different things about one tensor. */
static enum qtr_status index_names(struct qtr_checkpoint *c, struct qtr_error *err) {
  if (c->n_tensors == 0) return qtr_fail(err, QTR_ERR_FORMAT, "there are no tensors in it");
  c->by_name = malloc(c->n_tensors * sizeof *c->by_name);
  if (!c->by_name) return qtr_fail_memory(err, "the table of tensors", c->n_tensors * sizeof *c->by_name);
  for (size_t i = 0; i < c->n_tensors; i++) c->by_name[i] = (uint32_t)i;
  qsort_r(c->by_name, c->n_tensors, sizeof *c->by_name, compare_names, c->tensor);
  for (size_t i = 1; i < c->n_tensors; i++) {
    uint32_t a = c->by_name[i - 1], b = c->by_name[i];
    const char *name = c->tensor[a].name;
    if (strcmp(name, c->tensor[b].name) != 0) continue;
    char shown[128];
    qtr_printable(name, strlen(name), shown, sizeof shown);
    return qtr_fail(err, QTR_ERR_FORMAT, "tensor %s is there twice, in %s and %s", shown,
                    c->n_files ? c->file[c->file_of[a]] : "one file", c->n_files ? c->file[c->file_of[b]] : "again");
  }
  return QTR_OK;
}

size_t qtr_checkpoint_count(const struct qtr_checkpoint *c) { return c->n_tensors; }

const struct qtr_tensor *qtr_checkpoint_at(const struct qtr_checkpoint *c, size_t i) {
  return i < c->n_tensors ? &c->tensor[i] : NULL;
}

const struct qtr_tensor *qtr_checkpoint_find(const struct qtr_checkpoint *c, const char *name) {
  size_t low = 0, high = c->n_tensors;
  while (low < high) {
    size_t middle = low + (high - low) / 2;
    const struct qtr_tensor *t = &c->tensor[c->by_name[middle]];
    int order = strcmp(name, t->name);
    if (order == 0) return t;
    if (order < 0) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return NULL;
}

static void print_shape(size_t n_dims, const size_t *shape, char *out, size_t n) {
  size_t k = 0;
  out[0] = 0;
  for (size_t i = 0; i < n_dims && k < n; i++) {
    int r = snprintf(out + k, n - k, "%s%zu", i ? ", " : "", shape[i]);
    if (r < 0) return;
    k += (size_t)r;
  }
}

enum qtr_status qtr_checkpoint_get(const struct qtr_checkpoint *c, const char *name, size_t n_dims, const size_t *shape,
                                   const struct qtr_tensor **tensor, struct qtr_error *err) {
  char shown[128];
  qtr_printable(name, strlen(name), shown, sizeof shown);
  const struct qtr_tensor *t = *tensor = qtr_checkpoint_find(c, name);
  if (!t) return qtr_fail(err, QTR_ERR_NOT_FOUND, "the checkpoint has no tensor %s", shown);
  if (t->n_dims == n_dims && (n_dims == 0 || memcmp(t->shape, shape, n_dims * sizeof *shape) == 0)) return QTR_OK;
  char found[96], expected[96];
  print_shape(t->n_dims, t->shape, found, sizeof found);
  print_shape(n_dims, shape, expected, sizeof expected);
  *tensor = NULL;
  return qtr_fail(err, QTR_ERR_FORMAT, "tensor %s has shape [%s]; the configuration asks for [%s]", shown, found, expected);
}

/* ---- values -------------------------------------------------------------------------------------- */

enum qtr_status qtr_tensor_to_floats(const struct qtr_tensor *t, float *out, size_t n, struct qtr_error *err) {
  size_t size = qtr_dtype_bytes(t->dtype);
  const uint8_t *p = t->data;
  if (t->n_bytes / size != n) {
    return qtr_fail(err, QTR_ERR_FORMAT, "tensor %s has %zu elements, %zu are expected", t->name, t->n_bytes / size, n);
  }
#define CONVERT(type, expression)           \
  for (size_t i = 0; i < n; i++) {          \
    type x;                                 \
    memcpy(&x, p + i * sizeof x, sizeof x); \
    out[i] = (expression);                  \
  }                                         \
  return QTR_OK
  switch (t->dtype) {
    case QTR_DTYPE_F32: memcpy(out, p, 4 * n); return QTR_OK;
    case QTR_DTYPE_F16: CONVERT(uint16_t, qtr_f16_to_f32(x));
    case QTR_DTYPE_BF16: CONVERT(uint16_t, qtr_bf16_to_f32(x));
    case QTR_DTYPE_F64: CONVERT(double, (float)x);
    case QTR_DTYPE_I8: CONVERT(int8_t, (float)x);
    case QTR_DTYPE_U8: CONVERT(uint8_t, (float)x);
    case QTR_DTYPE_I16: CONVERT(int16_t, (float)x);
    case QTR_DTYPE_I32: CONVERT(int32_t, (float)x);
    case QTR_DTYPE_I64: CONVERT(int64_t, (float)x);
    default:
      return qtr_fail(err, QTR_ERR_UNSUPPORTED, "tensor %s has dtype %s; numbers are expected", t->name,
                      qtr_dtype_name(t->dtype));
  }
#undef CONVERT
}

/* ---- what the projections are -------------------------------------------------------------------- */

static const struct qtr_tensor *find_sibling(const struct qtr_checkpoint *c, const char *name, size_t stem,
                                             const char *suffix) {
  char other[QTR_MAX_TENSOR_NAME + 32];
  (void)snprintf(other, sizeof other, "%.*s%s", (int)stem, name, suffix);
  return qtr_checkpoint_find(c, other);
}

static enum qtr_status projection_format(const struct qtr_checkpoint *c, const struct qtr_tensor *t, size_t stem,
                                         bool packed, enum qtr_linear_format *format, struct qtr_error *err) {
  char shown[128];
  qtr_printable(t->name, strlen(t->name), shown, sizeof shown);
  if (packed) {
    if (t->dtype != QTR_DTYPE_I8 && t->dtype != QTR_DTYPE_U8) {
      return qtr_fail(
          err, QTR_ERR_UNSUPPORTED,
          "tensor %s has dtype %s: that is GPTQ or AWQ, which `quattuor convert` imports; QServe's qweight is I8", shown,
          qtr_dtype_name(t->dtype));
    }
    bool s2 = find_sibling(c, t->name, stem, ".s2_scales") && find_sibling(c, t->name, stem, ".s2_zeros");
    bool s1 = find_sibling(c, t->name, stem, ".s1_scales"), szero = find_sibling(c, t->name, stem, ".s1_szeros");
    if (!s1 || s2 == szero) {
      return qtr_fail(err, QTR_ERR_FORMAT,
                      "tensor %s needs s1_scales beside it, and either s1_szeros or s2_scales and s2_zeros", shown);
    }
    *format = s2 ? QTR_LINEAR_W4A8_G128 : QTR_LINEAR_W4A8;
    return QTR_OK;
  }
  switch (t->dtype) {
    case QTR_DTYPE_F32: *format = QTR_LINEAR_F32; return QTR_OK;
    case QTR_DTYPE_F16: *format = QTR_LINEAR_F16; return QTR_OK;
    case QTR_DTYPE_BF16: *format = QTR_LINEAR_BF16; return QTR_OK;
    case QTR_DTYPE_I8:
      if (!find_sibling(c, t->name, stem, ".dequant_scale")) {
        return qtr_fail(err, QTR_ERR_FORMAT, "tensor %s is int8 and has no dequant_scale beside it", shown);
      }
      *format = QTR_LINEAR_W8A8;
      return QTR_OK;
    default: break;
  }
  return qtr_fail(err, QTR_ERR_UNSUPPORTED,
                  "tensor %s has dtype %s; projections in F32, F16, BF16 or QServe's formats are supported", shown,
                  qtr_dtype_name(t->dtype));
}

enum qtr_status qtr_checkpoint_format(const struct qtr_checkpoint *c, enum qtr_linear_format *format,
                                      struct qtr_error *err) {
  const struct qtr_tensor *first = NULL;
  for (size_t i = 0; i < c->n_tensors; i++) {
    const struct qtr_tensor *t = &c->tensor[i];
    if (strncmp(t->name, "model.layers.", 13) != 0) continue;
    size_t len = strlen(t->name);
    bool packed = len > 13 && strcmp(t->name + len - 13, "_proj.qweight") == 0;
    bool plain = len > 12 && strcmp(t->name + len - 12, "_proj.weight") == 0;
    if (!packed && !plain) continue;
    enum qtr_linear_format found = QTR_LINEAR_F32;
    enum qtr_status status = projection_format(c, t, len - (packed ? 8 : 7), packed, &found, err);
    if (status) return status;
    if (first && found != *format) {
      char a[128], b[128];
      return qtr_fail(err, QTR_ERR_FORMAT, "the layers disagree: %s is %s but %s is %s",
                      qtr_printable(first->name, strlen(first->name), a, sizeof a), qtr_linear_format_name(*format),
                      qtr_printable(t->name, len, b, sizeof b), qtr_linear_format_name(found));
    }
    first = t;
    *format = found;
  }
  if (first) return QTR_OK;
  return qtr_fail(err, QTR_ERR_FORMAT,
                  "no projections named model.layers.0.self_attn.q_proj.weight (or .qweight) and so on");
}

/* ---- files --------------------------------------------------------------------------------------- */

static bool has_suffix(const char *name, const char *suffix) {
  size_t n = strlen(name), k = strlen(suffix);
  return n > k && strcmp(name + n - k, suffix) == 0;
}

/* DeepCompressor's own exporter, whose file is called quant_model.pt, stores the second-level scales of 32 output channels
 * as 0, 8, 1, 9 … 7, 15, 16, 24, 17 … (spec A.4.3). They become copies in QServe's order, so that nobody else needs to know.
 * Only the name tells: a scale and its zero move together, so codes stay in range in either order and the numbers give
 * nothing away. */
static enum qtr_status fix_s2_order(struct qtr_checkpoint *c, size_t first, struct qtr_error *err) {
  for (size_t i = first; i < c->n_tensors; i++) {
    struct qtr_tensor *t = &c->tensor[i];
    if (!has_suffix(t->name, ".s2_scales") && !has_suffix(t->name, ".s2_zeros")) continue;
    if (qtr_dtype_bytes(t->dtype) != 1 || t->n_dims != 2 || t->shape[1] % 32) continue; /* its user refuses it */
    size_t n_out = t->shape[1];
    const uint8_t *stored = t->data;
    uint8_t *copy = qtr_checkpoint_own(c, t->n_bytes);
    if (!copy) return qtr_fail_memory(err, t->name, t->n_bytes);
    for (size_t g = 0; g < t->shape[0]; g++) {
      for (size_t r = 0; r < n_out; r++) {
        size_t from = r / 32 * 32 + r / 16 % 2 * 16 + r % 8 * 2 + r / 8 % 2;
        copy[g * n_out + qtr_s2_position(r)] = stored[g * n_out + from];
      }
    }
    t->data = copy;
  }
  return QTR_OK;
}

static enum qtr_status read_content(struct qtr_checkpoint *c, const uint8_t *data, size_t n, struct qtr_error *err) {
  if (n >= 4 && memcmp(data, "PK\3\4", 4) == 0) return qtr_torch_read(c, data, n, c->nested, err);
  if (n >= 19 && memcmp(data, "version https://git", 19) == 0) {
    return qtr_fail(err, QTR_ERR_FORMAT, "this is a Git LFS pointer, not the file itself: run `git lfs pull`");
  }
  if (n >= 2 && data[0] == 0x80 && data[1] >= 2 && data[1] <= 5) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED,
                    "this is a bare pickle (torch before 1.6, or no checkpoint); save it again with a newer torch.save");
  }
  return qtr_safetensors_read(c, data, n, err);
}

/* Maps <dir>/<name> (dir NULL: name is a path) and adds its tensors. */
static enum qtr_status add_file(struct qtr_checkpoint *c, const char *dir, const char *name, struct qtr_error *err) {
  if (c->n_files == MAX_FILES) return qtr_fail(err, QTR_ERR_LIMIT, "more than %d files", MAX_FILES);
  struct qtr_map *maps = realloc(c->map, (c->n_files + 1) * sizeof *maps);
  if (maps) c->map = maps;
  char **files = realloc(c->file, (c->n_files + 1) * sizeof *files);
  if (files) c->file = files;
  char *path = dir ? qtr_path_join(dir, name) : strdup(name);
  size_t len = strlen(name);
  char *shown = qtr_checkpoint_own(c, len + 1);
  enum qtr_status status;
  if (!maps || !files || !path || !shown) {
    status = qtr_fail_memory(err, "the list of files", c->n_files * sizeof *maps);
    goto done;
  }
  qtr_printable(name, len, shown, len + 1);
  if ((status = qtr_map_open(path, &c->map[c->n_files], err))) goto done;
  c->file[c->n_files] = shown;
  const struct qtr_map *map = &c->map[c->n_files++];
  size_t first = c->n_tensors;
  const char *slash = strrchr(name, '/'), *base = slash ? slash + 1 : name;
  status = read_content(c, map->data, map->n_bytes, err);
  bool other = c->s2_order == QTR_S2_BY_NAME ? strncmp(base, "quant_model.", 12) == 0 : c->s2_order == QTR_S2_DEEPCOMPRESSOR;
  if (!status && other) status = fix_s2_order(c, first, err);
  for (size_t i = first; i < c->n_tensors; i++) {
    const uint8_t *p = c->tensor[i].data;
    c->tensor[i].mapped = p >= map->data && p < map->data + map->n_bytes;
  }
  if (status) (void)qtr_error_prefix(err, "%s", shown);
done:
  free(path);
  return status;
}

static bool file_in(const char *dir, const char *name) {
  char *path = qtr_path_join(dir, name);
  bool exists = path && qtr_file_exists(path);
  free(path);
  return exists;
}

static int compare_strings(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

static void free_names(char **names, size_t n) {
  for (size_t i = 0; i < n; i++) free(names[i]);
  free(names);
}

enum glob_kind { GLOB_SAFETENSORS, GLOB_TORCH };

static bool matches(enum glob_kind kind, const char *name) {
  static const char *const not_weights[] = {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt",
                                            "scaler.pt",         "scale.pt",      "acts.pt",      "rotation.pt",
                                            "reorder.pt",        "smooth.pt",     "wgts.pt"};
  if (name[0] == '.') return false;
  if (kind == GLOB_SAFETENSORS) return has_suffix(name, ".safetensors");
  for (size_t i = 0; i < sizeof not_weights / sizeof *not_weights; i++) {
    if (strcmp(name, not_weights[i]) == 0) return false;
  }
  return has_suffix(name, ".bin") || has_suffix(name, ".pt");
}

/* All matching names of a directory, sorted. */
static enum qtr_status list_files(const char *dir, enum glob_kind kind, char ***names, size_t *n_names,
                                  struct qtr_error *err) {
  *names = NULL;
  *n_names = 0;
  DIR *d = opendir(dir);
  if (!d) return qtr_fail(err, QTR_ERR_IO, "cannot list %s", dir);
  enum qtr_status status = QTR_OK;
  size_t n = 0;
  const struct dirent *entry;
  while (!status && (entry = readdir(d)) != NULL) {
    if (!matches(kind, entry->d_name)) continue;
    if (n == MAX_FILES) {
      status = qtr_fail(err, QTR_ERR_LIMIT, "%s: more than %d weight files", dir, MAX_FILES);
      break;
    }
    char **more = realloc(*names, (n + 1) * sizeof *more);
    if (more) *names = more;
    if (!more || !(more[n] = strdup(entry->d_name))) {
      status = qtr_fail_memory(err, "the list of files", (n + 1) * sizeof *more);
    } else {
      n++;
    }
  }
  closedir(d);
  if (n) qsort(*names, n, sizeof **names, compare_strings);
  *n_names = n;
  return status;
}

/* The files a weight_map names, each once; then every tensor it promises must have been in them. */
static enum qtr_status add_indexed(struct qtr_checkpoint *c, const char *dir, const char *index, struct qtr_error *err) {
  char *path = qtr_path_join(dir, index), *text = NULL, **names = NULL;
  size_t len = 0, n_names = 0;
  json_t *root = NULL, *value;
  const char *tensor;
  enum qtr_status status;
  if (!path) return qtr_fail_memory(err, "a path", strlen(dir));
  if ((status = qtr_file_read(path, MAX_INDEX_BYTES, &text, &len, err))) goto done;
  json_error_t error;
  root = json_loadb(text, len, 0, &error);
  json_t *map = json_object_get(root, "weight_map");
  size_t n_entries = json_object_size(map);
  if (n_entries == 0 || n_entries > QTR_MAX_TENSORS) {
    status = qtr_fail(err, QTR_ERR_FORMAT, "%s has no \"weight_map\" that names files", path);
    goto done;
  }
  names = calloc(n_entries, sizeof *names);
  if (!names) {
    status = qtr_fail_memory(err, "the list of files", n_entries * sizeof *names);
    goto done;
  }
  json_object_foreach(map, tensor, value) {
    const char *name = json_string_value(value);
    if (!name || !name[0] || name[0] == '.' || strchr(name, '/')) {
      status = qtr_fail(err, QTR_ERR_FORMAT, "%s: \"weight_map\" must give plain file names of the same directory", path);
      goto done;
    }
    if (!(names[n_names] = strdup(name))) {
      status = qtr_fail_memory(err, "the list of files", len);
      goto done;
    }
    n_names++;
  }
  qsort(names, n_names, sizeof *names, compare_strings);
  for (size_t i = 0; i < n_names && !status; i++) {
    if (i == 0 || strcmp(names[i], names[i - 1]) != 0) status = add_file(c, dir, names[i], err);
  }
  if (status || (status = index_names(c, err))) goto done;
  json_object_foreach(map, tensor, value) {
    if (qtr_checkpoint_find(c, tensor)) continue;
    char a[128], b[128];
    status = qtr_fail(err, QTR_ERR_FORMAT, "%s says that tensor %s is in %s, but it is not", index,
                      qtr_printable(tensor, strlen(tensor), a, sizeof a),
                      qtr_printable(json_string_value(value), json_string_length(value), b, sizeof b));
    goto done;
  }
done:
  free_names(names, n_names);
  json_decref(root);
  free(text);
  free(path);
  return status;
}

static enum qtr_status add_directory(struct qtr_checkpoint *c, const char *dir, struct qtr_error *err) {
  static const char *const single[2] = {"model.safetensors", "pytorch_model.bin"};
  static const char *const index[2] = {"model.safetensors.index.json", "pytorch_model.bin.index.json"};
  for (int kind = GLOB_SAFETENSORS; kind <= GLOB_TORCH; kind++) {
    char **names;
    size_t n_names, n_consolidated = 0;
    enum qtr_status status = list_files(dir, (enum glob_kind)kind, &names, &n_names, err);
    if (status || n_names == 0) {
      free_names(names, n_names);
      if (status) return status;
      continue;
    }
    if (file_in(dir, single[kind])) {
      status = add_file(c, dir, single[kind], err);
    } else if (file_in(dir, index[kind])) {
      status = add_indexed(c, dir, index[kind], err);
    } else {
      /* Some releases carry the weights twice, once more under their makers' names: leave those if there are others. */
      for (size_t i = 0; i < n_names; i++) n_consolidated += strncmp(names[i], "consolidated", 12) == 0;
      for (size_t i = 0; i < n_names && !status; i++) {
        if (n_consolidated < n_names && strncmp(names[i], "consolidated", 12) == 0) continue;
        status = add_file(c, dir, names[i], err);
      }
    }
    free_names(names, n_names);
    return status;
  }
  return qtr_fail(err, QTR_ERR_NOT_FOUND, "no *.safetensors, *.bin or *.pt there");
}

/* ---- opening ------------------------------------------------------------------------------------- */

enum qtr_status qtr_checkpoint_open(const char *path, struct qtr_checkpoint **checkpoint, struct qtr_error *err) {
  return qtr_checkpoint_open_ordered(path, QTR_S2_BY_NAME, checkpoint, err);
}

/* An empty checkpoint, and its end: closed after a failure, else handed out. */
static enum qtr_status create(enum qtr_s2_order order, bool nested, struct qtr_checkpoint **c, struct qtr_error *err) {
  *c = calloc(1, sizeof **c);
  if (!*c) return qtr_fail_memory(err, "a checkpoint", sizeof **c);
  (*c)->s2_order = order;
  (*c)->nested = nested;
  return QTR_OK;
}
static enum qtr_status hand_out(enum qtr_status status, struct qtr_checkpoint **c) {
  if (!status) return QTR_OK;
  qtr_checkpoint_close(*c);
  *c = NULL;
  return status;
}

/* One file, whatever its kind. */
static enum qtr_status open_file(struct qtr_checkpoint *c, const char *path, struct qtr_error *err) {
  enum qtr_status status = add_file(c, NULL, path, err);
  if (!status && (status = index_names(c, err))) (void)qtr_error_prefix(err, "%s", path);
  return status;
}

enum qtr_status qtr_checkpoint_open_ordered(const char *path, enum qtr_s2_order order, struct qtr_checkpoint **checkpoint,
                                            struct qtr_error *err) {
  enum qtr_status status = create(order, false, checkpoint, err);
  struct qtr_checkpoint *c = *checkpoint;
  if (status) return status;
  if (!qtr_dir_exists(path)) return hand_out(open_file(c, path, err), checkpoint);
  status = add_directory(c, path, err);
  if (!status && !c->by_name) status = index_names(c, err);
  if (status) (void)qtr_error_prefix(err, "%s", path);
  return hand_out(status, checkpoint);
}

enum qtr_status qtr_checkpoint_open_nested(const char *file, struct qtr_checkpoint **checkpoint, struct qtr_error *err) {
  enum qtr_status status = create(QTR_S2_QSERVE, true, checkpoint, err);
  return status ? status : hand_out(open_file(*checkpoint, file, err), checkpoint);
}

static enum qtr_status open_memory(const void *data, size_t n_bytes, bool nested, struct qtr_checkpoint **checkpoint,
                                   struct qtr_error *err) {
  enum qtr_status status = create(QTR_S2_BY_NAME, nested, checkpoint, err);
  if (status) return status;
  status = read_content(*checkpoint, data, n_bytes, err);
  if (!status) status = index_names(*checkpoint, err);
  return hand_out(status, checkpoint);
}

enum qtr_status qtr_checkpoint_open_memory(const void *data, size_t n_bytes, struct qtr_checkpoint **checkpoint,
                                           struct qtr_error *err) {
  return open_memory(data, n_bytes, false, checkpoint, err);
}

enum qtr_status qtr_checkpoint_open_nested_memory(const void *data, size_t n_bytes, struct qtr_checkpoint **checkpoint,
                                                  struct qtr_error *err) {
  return open_memory(data, n_bytes, true, checkpoint, err);
}

void qtr_checkpoint_forget(const struct qtr_checkpoint *c) {
  for (size_t i = 0; i < c->n_files; i++) qtr_map_forget(c->map[i].data, c->map[i].n_bytes);
}

void qtr_tensor_forget_part(const struct qtr_tensor *t, size_t offset, size_t n_bytes) {
  if (t->mapped) qtr_map_forget((const uint8_t *)t->data + offset, n_bytes);
}

void qtr_tensor_forget(const struct qtr_tensor *t) { qtr_tensor_forget_part(t, 0, t->n_bytes); }

void qtr_checkpoint_close(struct qtr_checkpoint *c) {
  if (!c) return;
  for (size_t i = 0; i < c->n_files; i++) qtr_map_close(&c->map[i]);
  for (size_t i = 0; i < c->n_owned; i++) free(c->owned[i]);
  free(c->owned);
  free(c->map);
  free(c->file);
  free(c->tensor);
  free(c->file_of);
  free(c->by_name);
  free(c);
}
