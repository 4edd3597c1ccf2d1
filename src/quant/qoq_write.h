/* qoq_write.h - inside of src/quant: the finished layers of a work directory, and the embedding, final norm and head as the
 * rotation leaves them, into a sink. */
#ifndef QTR_QUANT_QOQ_WRITE_H
#define QTR_QUANT_QOQ_WRITE_H

#include "quant/calibrate.h"

struct qtr_qoq_writer {
  const struct qtr_calibrate_job *job;
  const struct qtr_work *work;
  struct qtr_sink *sink;
  struct qtr_rotation rotation;
  struct qtr_work_layer layer; /* the one whose tensors are being written */
  int32_t index;               /* -1: none */
};

enum qtr_status qtr_qoq_writer_open(const struct qtr_calibrate_job *job, const struct qtr_work *work, struct qtr_sink *sink,
                                    struct qtr_qoq_writer *writer, struct qtr_error *err);
void qtr_qoq_writer_close(struct qtr_qoq_writer *writer);

/* The data of one announced tensor: the slot's weight, or with `bias` its bias. tensor: the source's, for what lies outside
 * the layers. errors (may be NULL, 2): relative errors of the matrix's outputs, rounded to nearest and as it is; NAN where
 * it was not calibrated. */
enum qtr_status qtr_qoq_write(struct qtr_qoq_writer *writer, const struct qtr_slot *slot, bool bias,
                              const struct qtr_tensor *tensor, enum qtr_store store, double errors[3],
                              struct qtr_error *err);

#endif
