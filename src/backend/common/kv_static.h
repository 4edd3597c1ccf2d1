/* kv_static.h - the scales of a static KV8 cache as every backend keeps them (spec A.2.5, C.3.2). */
#ifndef QTR_BACKEND_COMMON_KV_STATIC_H
#define QTR_BACKEND_COMMON_KV_STATIC_H

#include "backend/backend.h"

/* config->static_scale rounded to fp16: *scale (n_layers, 2), malloc'ed. QTR_ERR_FORMAT names a scale that is not a positive
 * fp16 number; *scale is then NULL. */
enum qtr_status qtr_kv_static_scales(const struct qtr_kv_config *config, float **scale, struct qtr_error *err);

#endif
