/* linear_source.h - what every backend demands of a matrix before it repacks it (backend.h, struct qtr_linear_source). */
#ifndef QTR_BACKEND_COMMON_LINEAR_SOURCE_H
#define QTR_BACKEND_COMMON_LINEAR_SOURCE_H

#include "backend/backend.h"

/* |Σ x w| <= 128 * 128 * n_in must stay below 2^31: accumulators are exact. */
#define QTR_MAX_INT_INPUTS ((size_t)131071)

/* Checks format, parts, sizes and that every tensor the format needs is there; *n_out = rows of all parts together.
 * QTR_ERR_ARGUMENT: the caller's mistake. QTR_ERR_UNSUPPORTED: a shape no backend takes. QTR_ERR_MEMORY: n_out * n_in values
 * are more than a size can say. */
enum qtr_status qtr_linear_source_check(const struct qtr_linear_source *source, size_t *n_out, struct qtr_error *err);

#endif
