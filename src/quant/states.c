/* states.c - files of hidden states (states.h). */
#include "quant/states.h"

#include "base/file.h"
#include "base/status.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum qtr_status qtr_states_open(const char *dir, const char *name, size_t sample_floats, bool create,
                                struct qtr_states *states, struct qtr_error *err) {
  *states = (struct qtr_states){.fd = -1, .sample_bytes = sample_floats * sizeof(float), .path = qtr_path_join(dir, name)};
  if (!states->path) return qtr_fail_memory(err, "a path", strlen(dir));
  states->fd = open(states->path, O_RDWR | O_CLOEXEC | (create ? O_CREAT | O_TRUNC : 0), 0600);
  if (states->fd >= 0) return QTR_OK;
  return qtr_fail(err, QTR_ERR_IO, "cannot open %s: %s", states->path, strerror(errno));
}

static void name_layer(char name[64], enum qtr_states_of of, int32_t layer) {
  (void)snprintf(name, 64, "%s-%04d.f32", of == QTR_STATES_QUANTISED ? "quantised" : "states", (int)layer);
}

enum qtr_status qtr_states_open_layer(const char *dir, enum qtr_states_of of, int32_t layer, size_t sample_floats,
                                      bool create, struct qtr_states *states, struct qtr_error *err) {
  char name[64];
  name_layer(name, of, layer);
  return qtr_states_open(dir, name, sample_floats, create, states, err);
}

bool qtr_states_whole(const char *dir, enum qtr_states_of of, int32_t layer, size_t n_samples, size_t sample_floats) {
  char name[64];
  struct stat found;
  name_layer(name, of, layer);
  char *path = qtr_path_join(dir, name);
  bool whole = path && stat(path, &found) == 0 && (size_t)found.st_size == n_samples * sample_floats * sizeof(float);
  free(path);
  return whole;
}

enum qtr_status qtr_states_read(const struct qtr_states *s, size_t sample, float *x, struct qtr_error *err) {
  for (size_t done = 0; done < s->sample_bytes;) {
    ssize_t n = pread(s->fd, (char *)x + done, s->sample_bytes - done, (off_t)(sample * s->sample_bytes + done));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return qtr_fail(err, QTR_ERR_IO, "cannot read %s: %s", s->path, n < 0 ? strerror(errno) : "it is too short");
    done += (size_t)n;
  }
  return QTR_OK;
}

enum qtr_status qtr_states_write(const struct qtr_states *s, size_t sample, const float *x, struct qtr_error *err) {
  for (size_t done = 0; done < s->sample_bytes;) {
    ssize_t n = pwrite(s->fd, (const char *)x + done, s->sample_bytes - done, (off_t)(sample * s->sample_bytes + done));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return qtr_fail(err, QTR_ERR_IO, "cannot write %s: %s", s->path, strerror(errno));
    done += (size_t)n;
  }
  return QTR_OK;
}

void qtr_states_close(struct qtr_states *states, bool remove) {
  if (states->path && states->fd >= 0) (void)close(states->fd);
  if (states->path && remove) (void)unlink(states->path);
  free(states->path);
  *states = (struct qtr_states){.fd = -1};
}
