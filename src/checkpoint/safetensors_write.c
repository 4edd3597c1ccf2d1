/* safetensors_write.c - streaming .safetensors writer (safetensors_write.h). Writes to "<path>.tmp" and renames at the end.
 * The header is padded with spaces so that the data begins at a multiple of 64, and the data lies in the order of the
 * entries. */
#include "checkpoint/safetensors_write.h"

#include "base/checked.h"
#include "base/status.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct qtr_st_writer {
  char *path, *temporary;
  FILE *file;
  struct qtr_st_entry *entry; /* (n_entries) */
  size_t n_entries, at;       /* the entry that is being written */
  size_t left;                /* bytes of it that are still to come */
};

/* A string as JSON, quotes included. Control characters become \u00xx; the rest is UTF-8 as it is. */
static void print_string(FILE *f, const char *text) {
  (void)fputc('"', f);
  for (const unsigned char *p = (const unsigned char *)text; *p; p++) {
    if (*p == '"' || *p == '\\') {
      (void)fprintf(f, "\\%c", *p);
    } else if (*p < 0x20) {
      (void)fprintf(f, "\\u%04x", *p);
    } else {
      (void)fputc(*p, f);
    }
  }
  (void)fputc('"', f);
}

static enum qtr_status entry_bytes(const struct qtr_st_entry *e, size_t *n_bytes, struct qtr_error *err) {
  size_t n = qtr_dtype_bytes(e->dtype);
  bool overflow = e->n_dims > sizeof e->shape / sizeof *e->shape;
  for (size_t i = 0; i < e->n_dims && !overflow; i++) overflow = qtr_mul_overflow(n, e->shape[i], &n);
  if (overflow) return qtr_fail(err, QTR_ERR_ARGUMENT, "tensor %s is too large", e->name);
  *n_bytes = n;
  return QTR_OK;
}

static enum qtr_status make_header(const struct qtr_st_entry *entries, size_t n_entries, const char *const *metadata,
                                   char **text, size_t *len, struct qtr_error *err) {
  *text = NULL;
  FILE *f = open_memstream(text, len);
  if (!f) return qtr_fail_memory(err, "the header", n_entries * sizeof *entries);
  enum qtr_status status = QTR_OK;
  const char *separator = "";
  (void)fputc('{', f);
  if (metadata && metadata[0]) {
    (void)fputs("\"__metadata__\":{", f);
    for (size_t i = 0; metadata[i]; i += 2) {
      if (i) (void)fputc(',', f);
      print_string(f, metadata[i]);
      (void)fputc(':', f);
      print_string(f, metadata[i + 1]);
    }
    (void)fputc('}', f);
    separator = ",";
  }
  size_t begin = 0, end, n_bytes = 0;
  for (size_t i = 0; i < n_entries && !status; i++) {
    const struct qtr_st_entry *e = &entries[i];
    if ((status = entry_bytes(e, &n_bytes, err))) break;
    if (qtr_add_overflow(begin, n_bytes, &end)) {
      status = qtr_fail(err, QTR_ERR_ARGUMENT, "the tensors together are too large");
      break;
    }
    (void)fputs(separator, f);
    separator = ",";
    print_string(f, e->name);
    (void)fprintf(f, ":{\"dtype\":\"%s\",\"shape\":[", qtr_dtype_name(e->dtype));
    for (size_t d = 0; d < e->n_dims; d++) (void)fprintf(f, "%s%zu", d ? "," : "", e->shape[d]);
    (void)fprintf(f, "],\"data_offsets\":[%zu,%zu]}", begin, end);
    begin = end;
  }
  (void)fputc('}', f);
  if (fflush(f) == 0) {
    for (size_t n = 8 + *len; n % 64 != 0; n++) (void)fputc(' ', f);
  }
  bool failed = ferror(f) != 0;
  if (fclose(f) != 0 || failed) status = status ? status : qtr_fail_memory(err, "the header", 0);
  return status;
}

static void free_writer(struct qtr_st_writer *w) {
  free(w->path);
  free(w->temporary);
  free(w->entry);
  free(w);
}

/* Goes to the next entry that has bytes. Entries were measured in qtr_st_create. */
static void next_entry(struct qtr_st_writer *w) {
  while (w->left == 0 && w->at < w->n_entries) {
    w->at++;
    if (w->at < w->n_entries) (void)entry_bytes(&w->entry[w->at], &w->left, NULL);
  }
}

enum qtr_status qtr_st_create(const char *path, const struct qtr_st_entry *entries, size_t n_entries,
                              const char *const *metadata, struct qtr_st_writer **writer, struct qtr_error *err) {
  *writer = NULL;
  struct qtr_st_writer *w = calloc(1, sizeof *w);
  char *header = NULL;
  size_t header_len = 0, path_len = strlen(path);
  if (!w || !(w->path = strdup(path)) || !(w->temporary = malloc(path_len + 5)) ||
      !(w->entry = calloc(n_entries + 1, sizeof *entries))) {
    if (w) free_writer(w);
    return qtr_fail_memory(err, path, n_entries * sizeof *entries);
  }
  memcpy(w->temporary, path, path_len);
  memcpy(w->temporary + path_len, ".tmp", 5);
  if (n_entries) memcpy(w->entry, entries, n_entries * sizeof *entries);
  w->n_entries = n_entries;
  enum qtr_status status = make_header(entries, n_entries, metadata, &header, &header_len, err);
  if (status) goto done;
  w->file = fopen(w->temporary, "wb");
  if (!w->file) {
    status = qtr_fail(err, QTR_ERR_IO, "cannot create %s: %s", w->temporary, strerror(errno));
    goto done;
  }
  uint8_t length[8];
  for (int i = 0; i < 8; i++) length[i] = (uint8_t)((uint64_t)header_len >> (8 * i));
  if (fwrite(length, 1, 8, w->file) != 8 || fwrite(header, 1, header_len, w->file) != header_len) {
    status = qtr_fail(err, QTR_ERR_IO, "cannot write %s: %s", w->temporary, strerror(errno));
    goto done;
  }
  if (n_entries) {
    (void)entry_bytes(&w->entry[0], &w->left, NULL);
    next_entry(w);
  }
  *writer = w;
  w = NULL;
done:
  free(header);
  qtr_st_abort(w);
  return status;
}

enum qtr_status qtr_st_write(struct qtr_st_writer *w, const void *data, size_t n_bytes, struct qtr_error *err) {
  if (n_bytes == 0) return QTR_OK;
  if (w->at == w->n_entries) return qtr_fail(err, QTR_ERR_STATE, "%s: data after the last tensor", w->path);
  if (n_bytes > w->left) {
    return qtr_fail(err, QTR_ERR_STATE, "%s: %zu bytes for tensor %s, which takes %zu more", w->path, n_bytes,
                    w->entry[w->at].name, w->left);
  }
  if (fwrite(data, 1, n_bytes, w->file) != n_bytes) {
    return qtr_fail(err, QTR_ERR_IO, "cannot write %s: %s", w->temporary, strerror(errno));
  }
  w->left -= n_bytes;
  next_entry(w);
  return QTR_OK;
}

/* Makes the rename itself durable, as far as the file system lets us. */
static void sync_directory(const char *path) {
  char *copy = strdup(path);
  if (!copy) return;
  char *slash = strrchr(copy, '/');
  if (slash) slash[slash == copy] = 0;
  int fd = open(slash ? copy : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd >= 0) {
    (void)fsync(fd);
    close(fd);
  }
  free(copy);
}

enum qtr_status qtr_st_finish(struct qtr_st_writer *w, struct qtr_error *err) {
  enum qtr_status status = QTR_OK;
  if (w->at < w->n_entries) {
    status = qtr_fail(err, QTR_ERR_STATE, "%s: %zu bytes of tensor %s never came", w->path, w->left, w->entry[w->at].name);
    qtr_st_abort(w);
    return status;
  }
  bool ok = fflush(w->file) == 0 && fsync(fileno(w->file)) == 0;
  int reason = errno;
  if (fclose(w->file) != 0 && ok) {
    ok = false;
    reason = errno;
  }
  w->file = NULL;
  if (ok && rename(w->temporary, w->path) != 0) {
    ok = false;
    reason = errno;
  }
  if (ok) {
    sync_directory(w->path);
  } else {
    status = qtr_fail(err, QTR_ERR_IO, "cannot write %s: %s", w->path, strerror(reason));
    (void)unlink(w->temporary);
  }
  free_writer(w);
  return status;
}

void qtr_st_abort(struct qtr_st_writer *w) {
  if (!w) return;
  if (w->file) {
    (void)fclose(w->file);
    (void)unlink(w->temporary);
  }
  free_writer(w);
}
