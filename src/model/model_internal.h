/* model_internal.h - what load.c and random.c share. */
#ifndef QTR_MODEL_MODEL_INTERNAL_H
#define QTR_MODEL_MODEL_INTERNAL_H

#include "model/model.h"

/* An empty model: configuration, frequencies and room for the layers. */
enum qtr_status qtr_model_create(const struct qtr_config *config, struct qtr_backend *backend,
                                 const struct qtr_model_options *options, struct qtr_model **model, struct qtr_error *err);

#endif
