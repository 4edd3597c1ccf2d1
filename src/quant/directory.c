/* directory.c - makes the output directory of the quantiser and fills it with all but the weights (directory.h). */
#include "quant/directory.h"

#include "base/file.h"
#include "base/status.h"

#include <dirent.h>
#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_FILE_BYTES ((size_t)256 << 20) /* a large tokenizer.json has 20 MB */

enum qtr_status qtr_quant_prepare_directory(const char *source, const char *dir, bool overwrite, bool *made,
                                            struct qtr_error *err) {
  *made = false;
  struct stat a, b;
  if (stat(source, &a) != 0 || !S_ISDIR(a.st_mode)) {
    return qtr_fail(err, QTR_ERR_NOT_FOUND, "%s is no directory; give a Hugging Face model directory", source);
  }
  if (mkdir(dir, 0777) == 0) {
    *made = true;
    return QTR_OK;
  }
  if (errno != EEXIST || stat(dir, &b) != 0) {
    return qtr_fail(err, QTR_ERR_IO, "cannot make the directory %s: %s", dir, strerror(errno));
  }
  if (!S_ISDIR(b.st_mode)) return qtr_fail(err, QTR_ERR_ARGUMENT, "%s exists and is no directory", dir);
  if (a.st_dev == b.st_dev && a.st_ino == b.st_ino) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "%s is the source itself; write to another directory", dir);
  }
  char *path = qtr_path_join(dir, "model.safetensors");
  if (!path) return qtr_fail_memory(err, "a path", strlen(dir));
  enum qtr_status status = QTR_OK;
  if (access(path, F_OK) == 0) {
    if (!overwrite) {
      status = qtr_fail(err, QTR_ERR_ARGUMENT, "%s exists already; remove it or ask to overwrite it", path);
    } else if (unlink(path) != 0) {
      status = qtr_fail(err, QTR_ERR_IO, "cannot remove %s: %s", path, strerror(errno));
    }
  }
  free(path);
  return status;
}

/* The shortest of two ways to print doubles that reads back as the same values: 1e-05 rather than 1.0000000000000001e-05. */
static char *print_json(const json_t *root) {
  char *text = json_dumps(root, JSON_INDENT(2) | JSON_REAL_PRECISION(15));
  json_error_t error;
  json_t *again = text ? json_loads(text, 0, &error) : NULL;
  bool same = again && json_equal(root, again);
  json_decref(again);
  if (same) return text;
  free(text);
  return json_dumps(root, JSON_INDENT(2));
}

enum qtr_status qtr_quant_write_config(const char *source, const char *dir, const struct qtr_quant_description *d,
                                       struct qtr_error *err) {
  char *in = qtr_path_join(source, "config.json"), *out = qtr_path_join(dir, "config.json");
  char *text = NULL, *printed = NULL;
  size_t len = 0;
  json_t *root = NULL;
  enum qtr_status status;
  if (!in || !out) {
    status = qtr_fail_memory(err, "a path", strlen(dir));
    goto done;
  }
  if ((status = qtr_file_read(in, MAX_FILE_BYTES, &text, &len, err))) goto done;
  json_error_t error;
  root = json_loadb(text, len, 0, &error);
  /* "wbits" and "group_size" are the keys by which other readers of QServe checkpoints know them */
  json_t *q = json_pack("{ss ss ss si si si si si si ss}", "quant_method", "qoq", "precision", d->precision, "method",
                        d->method, "wbits", (int)d->weight_bits, "abits", (int)d->act_bits, "kv_bits", (int)d->kv_bits,
                        "group_size", (int)d->group_size, "head_bits", (int)d->head_bits, "embed_bits", (int)d->embed_bits,
                        "producer", "quattuor");
  if (!json_is_object(root) || json_object_set_new(root, "quantization_config", q) != 0 ||
      (d->untied && json_object_set_new(root, "tie_word_embeddings", json_false()) != 0) || !(printed = print_json(root))) {
    status = qtr_fail(err, QTR_ERR_FORMAT, "cannot read %s as a JSON object", in);
    goto done;
  }
  status = qtr_file_write(out, printed, strlen(printed), err);
done:
  json_decref(root);
  free(printed);
  free(text);
  free(in);
  free(out);
  return status;
}

static bool has_suffix(const char *name, const char *suffix) {
  size_t n = strlen(name), k = strlen(suffix);
  return n >= k && strcmp(name + n - k, suffix) == 0;
}

static bool belongs(const char *name) {
  /* what GPTQ and AWQ say of weights that are not there any more */
  if (strcmp(name, "quantize_config.json") == 0 || strcmp(name, "quant_config.json") == 0) return false;
  if (name[0] == '.' || strcmp(name, "config.json") == 0 || has_suffix(name, ".index.json")) return false;
  return has_suffix(name, ".json") || has_suffix(name, ".jinja") || strcmp(name, "tokenizer.model") == 0 ||
         strcmp(name, "merges.txt") == 0;
}

enum qtr_status qtr_quant_copy_files(const char *source, const char *dir, struct qtr_error *err) {
  DIR *d = opendir(source);
  if (!d) return qtr_fail(err, QTR_ERR_IO, "cannot list %s: %s", source, strerror(errno));
  enum qtr_status status = QTR_OK;
  const struct dirent *entry;
  while (!status && (entry = readdir(d)) != NULL) {
    if (!belongs(entry->d_name)) continue;
    char *in = qtr_path_join(source, entry->d_name), *out = qtr_path_join(dir, entry->d_name), *data = NULL;
    size_t n = 0;
    if (!in || !out) status = qtr_fail_memory(err, "a path", strlen(dir));
    if (!status && qtr_file_exists(in)) { /* not a folder of that name */
      status = qtr_file_read(in, MAX_FILE_BYTES, &data, &n, err);
      if (!status) status = qtr_file_write(out, data, n, err);
    }
    free(data);
    free(in);
    free(out);
  }
  closedir(d);
  return status;
}
