/* source.h - the checkpoint that is read: finds the tensors of a layout slot, remembers which were asked for, refuses what
 * is left over, and hands floats to a sink chunk by chunk. */
#ifndef QTR_QUANT_SOURCE_H
#define QTR_QUANT_SOURCE_H

#include "base/progress.h"
#include "checkpoint/checkpoint.h"
#include "quant/layout.h"
#include "quant/sink.h"

struct qtr_source {
  struct qtr_checkpoint *checkpoint; /* owned */
  const struct qtr_config *config;   /* borrowed */
  uint8_t *seen;                     /* (tensors of the checkpoint) 1 = asked for */
};

/* path: directory or file. */
enum qtr_status qtr_source_open(const char *path, enum qtr_s2_order order, const struct qtr_config *config,
                                struct qtr_source *source, struct qtr_error *err);
void qtr_source_close(struct qtr_source *source);

/* <name><suffix>; NULL when it is absent. */
const struct qtr_tensor *qtr_source_find(struct qtr_source *source, const char *name, const char *suffix);
/* The same, which must be there with this shape: the error names it. */
enum qtr_status qtr_source_get(struct qtr_source *source, const char *name, const char *suffix, size_t n_dims,
                               const size_t *shape, const struct qtr_tensor **tensor, struct qtr_error *err);
/* The weight of a QTR_SLOT_EMBED or QTR_SLOT_HEAD: (vocab_size or more, hidden). A tied head is the embedding. */
enum qtr_status qtr_source_vocab(struct qtr_source *source, const struct qtr_slot *slot, const struct qtr_tensor **tensor,
                                 struct qtr_error *err);
/* A tensor of the model that nobody asked for changes what it computes: better refused than dropped. */
enum qtr_status qtr_source_leftovers(const struct qtr_source *source, struct qtr_error *err);

/* Rows and columns of a tensor as the sink counts them: a vector is one row. */
size_t qtr_source_rows(const struct qtr_tensor *t);
size_t qtr_source_columns(const struct qtr_tensor *t);

/* Announces a float tensor as <name><suffix>. QTR_ERR_UNSUPPORTED when it is no float tensor. */
enum qtr_status qtr_source_announce(const struct qtr_tensor *t, enum qtr_store store, const char *name, const char *suffix,
                                    struct qtr_sink *sink, struct qtr_error *err);
/* Its data: as floats in chunks, or as bytes where the sink was told QTR_STORE_RAW. done (may be NULL) counts source bytes
 * for the progress line. error += what rounding cost. */
enum qtr_status qtr_source_write(const struct qtr_tensor *t, enum qtr_store store, const char *name, struct qtr_sink *sink,
                                 struct qtr_threads *team, struct qtr_progress *progress, size_t *done,
                                 struct qtr_rtn_error *error, struct qtr_error *err);
/* All of it at once. out: (rows, columns). */
void qtr_source_floats(const struct qtr_tensor *t, float *out, struct qtr_threads *team);

#endif
