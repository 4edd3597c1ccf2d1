/* work.h - the work directory of a calibration: one file for each finished layer, and the settings that it was made with. A
 * run that finds its own settings there goes on behind the last layer. */
#ifndef QTR_QUANT_WORK_H
#define QTR_QUANT_WORK_H

#include "checkpoint/checkpoint.h"
#include "quant/grid.h"
#include "quant/layer.h"

#include <jansson.h>

struct qtr_work {
  char *dir;
  int32_t n_done; /* layers that are finished, from the first */
};

/* Opens dir (made when absent). settings: everything the result depends on; a directory with others, or `fresh`, is emptied.
 */
enum qtr_status qtr_work_open(const char *dir, const json_t *settings, bool fresh, struct qtr_work *work,
                              struct qtr_error *err);
void qtr_work_close(struct qtr_work *work, bool remove); /* remove: with all its files */

/* A finished layer: what the checkpoint will hold. */
struct qtr_work_layer {
  struct qtr_grid grid[QTR_N_PROJECTIONS]; /* codes; cell NULL where the matrix stays in floats */
  struct qtr_float_layer floats;           /* biases, norms, and the matrices that are not quantised */
  float kv_scale[2];                       /* static; 0 = none */
  json_t *report;                          /* what happened to it, for the report; owned */
};

enum qtr_status qtr_work_save(struct qtr_work *work, const struct qtr_work_layer *layer, struct qtr_error *err);
enum qtr_status qtr_work_load(const struct qtr_work *work, const struct qtr_config *config, int32_t index,
                              struct qtr_work_layer *layer, struct qtr_error *err);
void qtr_work_layer_free(struct qtr_work_layer *layer);

#endif
