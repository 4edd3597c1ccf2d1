/* file.c - memory maps and whole-file reads (file.h). */
#include "base/file.h"

#include "base/status.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static enum qtr_status open_regular(const char *path, int *fd, size_t *n_bytes, struct qtr_error *err) {
  *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (*fd < 0) {
    return qtr_fail(err, errno == ENOENT ? QTR_ERR_NOT_FOUND : QTR_ERR_IO, "cannot open %s: %s", path, strerror(errno));
  }
  struct stat st;
  if (fstat(*fd, &st) != 0 || !S_ISREG(st.st_mode) || st.st_size < 0) {
    close(*fd);
    return qtr_fail(err, QTR_ERR_IO, "%s is not a regular file", path);
  }
  *n_bytes = (size_t)st.st_size;
  return QTR_OK;
}

enum qtr_status qtr_map_open(const char *path, struct qtr_map *map, struct qtr_error *err) {
  int fd;
  *map = (struct qtr_map){0};
  size_t n_bytes;
  enum qtr_status status = open_regular(path, &fd, &n_bytes, err);
  if (status) return status;
  if (n_bytes > 0) {
    void *p = mmap(NULL, n_bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    if (p == MAP_FAILED) {
      status = qtr_fail(err, QTR_ERR_IO, "cannot map %s (%zu bytes): %s", path, n_bytes, strerror(errno));
    } else {
      map->data = p;
      map->n_bytes = n_bytes;
    }
  }
  close(fd);
  return status;
}

void qtr_map_close(struct qtr_map *map) {
  if (map->data) munmap((void *)(uintptr_t)map->data, map->n_bytes);
  *map = (struct qtr_map){0};
}

void qtr_map_forget(const void *data, size_t n_bytes) {
  uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
  uintptr_t first = ((uintptr_t)data + page - 1) / page * page;
  uintptr_t last = ((uintptr_t)data + n_bytes) / page * page;
  if (last > first) (void)madvise((void *)first, last - first, MADV_DONTNEED);
}

enum qtr_status qtr_file_read(const char *path, size_t max_bytes, char **data, size_t *n_bytes, struct qtr_error *err) {
  int fd;
  size_t size;
  *data = NULL;
  enum qtr_status status = open_regular(path, &fd, &size, err);
  if (status) return status;
  if (size > max_bytes) {
    close(fd);
    return qtr_fail(err, QTR_ERR_FORMAT, "%s has %zu bytes; at most %zu are accepted", path, size, max_bytes);
  }
  char *buffer = malloc(size + 1);
  if (!buffer) {
    close(fd);
    return qtr_fail_memory(err, path, size + 1);
  }
  size_t n = 0;
  while (n < size) {
    ssize_t r = read(fd, buffer + n, size - n);
    if (r < 0 && errno == EINTR) continue;
    if (r <= 0) break;
    n += (size_t)r;
  }
  close(fd);
  if (n != size) {
    free(buffer);
    return qtr_fail(err, QTR_ERR_IO, "%s ended after %zu of %zu bytes", path, n, size);
  }
  buffer[n] = 0;
  *data = buffer;
  *n_bytes = n;
  return QTR_OK;
}

enum qtr_status qtr_file_write(const char *path, const void *data, size_t n_bytes, struct qtr_error *err) {
  size_t len = strlen(path) + 5;
  char *temporary = malloc(len);
  if (!temporary) return qtr_fail_memory(err, "a path", len);
  (void)snprintf(temporary, len, "%s.tmp", path);
  enum qtr_status status = QTR_OK;
  FILE *f = fopen(temporary, "wb");
  if (!f) {
    status = qtr_fail(err, QTR_ERR_IO, "cannot create %s: %s", temporary, strerror(errno));
    goto done;
  }
  bool ok = n_bytes == 0 || fwrite(data, 1, n_bytes, f) == n_bytes;
  ok = fclose(f) == 0 && ok;
  if (!ok || rename(temporary, path) != 0) {
    status = qtr_fail(err, QTR_ERR_IO, "cannot write %s: %s", path, strerror(errno));
    (void)unlink(temporary);
  }
done:
  free(temporary);
  return status;
}

bool qtr_file_exists(const char *path) {
  struct stat st;
  return stat(path, &st) == 0 && S_ISREG(st.st_mode);
}

bool qtr_dir_exists(const char *path) {
  struct stat st;
  return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

char *qtr_path_join(const char *dir, const char *name) {
  size_t n = strlen(dir) + strlen(name) + 2;
  char *path = malloc(n);
  if (path) (void)snprintf(path, n, "%s/%s", dir, name);
  return path;
}
