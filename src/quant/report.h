/* report.h - what a quantisation did to a model, as one HTML page that needs nothing else: settings, sizes, errors of each
 * layer and matrix by rounding to nearest and as it was done, smoothing exponents, key channels before and after
 * SmoothAttention. The drawings are SVG inside the page; it follows the reader's light or dark setting. */
#ifndef QTR_QUANT_REPORT_H
#define QTR_QUANT_REPORT_H

#include "quant/quantize.h"

struct qtr_report_layer;

struct qtr_quant_report {
  char *path;
  bool existed, written; /* an empty file that was made to see that it can be is removed again */
  struct qtr_report_layer *layer;
  size_t n_layers, capacity;
  double table_error[2]; /* embedding, head: relative; NAN = not rounded */
  bool failed;           /* out of memory: told by finish */
};

/* Says before the work whether the file can be written. */
enum qtr_status qtr_quant_report_open(const char *path, struct qtr_quant_report *report, struct qtr_error *err);
/* A qtr_quantize_callback; user: the report. */
void qtr_quant_report_add(const struct qtr_quantize_report *matrix, void *report);
/* Writes the page, whole or not at all. */
enum qtr_status qtr_quant_report_write(struct qtr_quant_report *report, const struct qtr_quantize_options *options,
                                       const struct qtr_quantize_summary *summary, struct qtr_error *err);
void qtr_quant_report_free(struct qtr_quant_report *report); /* takes {0}, too */

#endif
