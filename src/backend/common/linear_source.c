/* linear_source.c - checks that the backends share for the matrices they are given (linear_source.h): shapes of spec A.3 and
 * A.4, parts of A.6. The bytes behind the pointers are the checkpoint's business: their number was checked where they were
 * found. */
#include "backend/common/linear_source.h"

#include "base/checked.h"
#include "base/status.h"

static bool tensor_missing(enum qtr_linear_format format, const struct qtr_linear_part *part) {
  if (!part->weight || (format >= QTR_LINEAR_W8A8 && !part->scale)) return true;
  if (format == QTR_LINEAR_W4A8) return !part->szero;
  return format == QTR_LINEAR_W4A8_G128 && (!part->s2_scale || !part->s2_zero);
}

enum qtr_status qtr_linear_source_check(const struct qtr_linear_source *s, size_t *n_out, struct qtr_error *err) {
  *n_out = 0;
  if ((unsigned)s->format >= QTR_N_LINEAR_FORMATS || s->n_parts < 1 || s->n_parts > QTR_MAX_PARTS || s->n_in == 0) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "linear: format %d, %zu parts of %zu inputs", (int)s->format, s->n_parts,
                    s->n_in);
  }
  const char *name = qtr_linear_format_name(s->format);
  bool w4 = s->format == QTR_LINEAR_W4A8 || s->format == QTR_LINEAR_W4A8_G128;
  size_t step_in = s->format == QTR_LINEAR_W4A8_G128 ? QTR_GROUP : w4 ? 32 : 1, step_out = w4 ? 32 : 1;
  if (s->n_in % step_in) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "linear: %s needs a multiple of %zu inputs, found %zu", name, step_in,
                    s->n_in);
  }
  if (s->format >= QTR_LINEAR_W8A8 && s->n_in > QTR_MAX_INT_INPUTS) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "linear: %s takes at most %zu inputs, found %zu", name, QTR_MAX_INT_INPUTS,
                    s->n_in);
  }
  for (size_t p = 0; p < s->n_parts; p++) {
    const struct qtr_linear_part *part = &s->part[p];
    bool missing = tensor_missing(s->format, part);
    if (missing || part->n_out == 0 || part->n_out % step_out || qtr_add_overflow(*n_out, part->n_out, n_out)) {
      return qtr_fail(err, QTR_ERR_ARGUMENT, "linear: part %zu of a %s matrix: %s, %zu rows (a multiple of %zu is needed)",
                      p, name, missing ? "a tensor is missing" : "bad size", part->n_out, step_out);
    }
  }
  if (s->gate_up && (s->n_parts != 2 || s->part[0].n_out != s->part[1].n_out)) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "linear: gate and up must be two parts of equal rows");
  }
  size_t n_values;
  if (qtr_mul_overflow(*n_out, s->n_in, &n_values) || n_values > SIZE_MAX / 16) { /* room to round up and for four bytes */
    return qtr_fail(err, QTR_ERR_MEMORY, "linear: %zu rows of %zu inputs are more than memory can hold", *n_out, s->n_in);
  }
  return QTR_OK;
}
