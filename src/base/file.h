/* file.h - read-only memory maps and small whole-file reads, with errors that name the path. */
#ifndef QTR_BASE_FILE_H
#define QTR_BASE_FILE_H

#include "quattuor/quattuor.h"

struct qtr_map {
  const uint8_t *data; /* NULL when the file is empty */
  size_t n_bytes;
};

/* Maps a regular file. Directories, devices and pipes are refused. Unmap with qtr_map_close. */
enum qtr_status qtr_map_open(const char *path, struct qtr_map *map, struct qtr_error *err);
void qtr_map_close(struct qtr_map *map);

/* Tells the kernel that [data, data+n_bytes) of a map is not needed any more, so it leaves the resident set. Of a map only:
 * memory that is not a file's becomes zeros. */
void qtr_map_forget(const void *data, size_t n_bytes);

/* Reads a whole file of at most max_bytes into malloc'ed memory with a NUL after it. */
enum qtr_status qtr_file_read(const char *path, size_t max_bytes, char **data, size_t *n_bytes, struct qtr_error *err);

/* Writes a whole file by way of a temporary one and a rename: it appears complete or not at all. */
enum qtr_status qtr_file_write(const char *path, const void *data, size_t n_bytes, struct qtr_error *err);

bool qtr_file_exists(const char *path); /* a regular file */
bool qtr_dir_exists(const char *path);

/* "<dir>/<name>", malloc'ed; NULL when out of memory. */
char *qtr_path_join(const char *dir, const char *name);

#endif
