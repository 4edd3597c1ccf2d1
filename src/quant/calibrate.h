/* calibrate.h - inside of src/quant: QoQ's pass over the layers, from float checkpoint to a work directory of finished
 * layers. */
#ifndef QTR_QUANT_CALIBRATE_H
#define QTR_QUANT_CALIBRATE_H

#include "quant/qoq.h"
#include "quant/source.h"
#include "quant/work.h"

struct qtr_calibrate_job {
  const struct qtr_qoq_options *options;
  const char *tokenizer_dir;
  const char *work_dir; /* made when absent */
  const struct qtr_config *config;
  struct qtr_source *source;
  enum qtr_linear_format format; /* of the projections; F16 = not quantised */
  enum qtr_kv_format kv;         /* what keys and values will be stored as */
  struct qtr_threads *team;
  int32_t threads;
  bool quiet;
};

/* Finishes all layers. work is open afterwards, also on failure when work->dir is not NULL: what is done stays for the next
 * run. */
enum qtr_status qtr_calibrate(const struct qtr_calibrate_job *job, struct qtr_work *work, struct qtr_error *err);

/* The rotation of the residual stream that the options ask for; {.n = 0} for none. */
enum qtr_status qtr_calibrate_rotation(const struct qtr_qoq_options *options, const struct qtr_config *config,
                                       struct qtr_rotation *rotation, struct qtr_error *err);

#endif
