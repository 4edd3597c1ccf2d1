/* states.h - hidden states between layers, in files: a model's activations for a calibration set do not fit memory. */
#ifndef QTR_QUANT_STATES_H
#define QTR_QUANT_STATES_H

#include "quattuor/quattuor.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Rows of floats in a file, sample by sample. */
struct qtr_states {
  int fd;
  size_t sample_bytes;
  char *path;
};
/* Opens dir/name; create: empties it. */
enum qtr_status qtr_states_open(const char *dir, const char *name, size_t sample_floats, bool create,
                                struct qtr_states *states, struct qtr_error *err);
enum qtr_status qtr_states_read(const struct qtr_states *states, size_t sample, float *x, struct qtr_error *err);
enum qtr_status qtr_states_write(const struct qtr_states *states, size_t sample, const float *x, struct qtr_error *err);

/* The residual streams before layer `layer`. */
enum qtr_states_of { QTR_STATES_FLOAT, QTR_STATES_QUANTISED }; /* of which model */
enum qtr_status qtr_states_open_layer(const char *dir, enum qtr_states_of of, int32_t layer, size_t sample_floats,
                                      bool create, struct qtr_states *states, struct qtr_error *err);
/* Whether their file is there and has all samples. */
bool qtr_states_whole(const char *dir, enum qtr_states_of of, int32_t layer, size_t n_samples, size_t sample_floats);

/* Closes; remove: deletes the file as well. Takes {.fd = -1} or {0} with no path, too. */
void qtr_states_close(struct qtr_states *states, bool remove);

#endif
