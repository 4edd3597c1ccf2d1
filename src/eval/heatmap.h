/* heatmap.h - a table of shares from 0 to 1 as a picture, SVG or PNG: rows are depths, columns lengths. Colours and range
 * are the reference's (spec G.1). */
#ifndef QTR_EVAL_HEATMAP_H
#define QTR_EVAL_HEATMAP_H

#include "quattuor/quattuor.h"

struct qtr_heatmap {
  const char *title, *subtitle; /* ASCII is best: PNG has no other letters */
  const char *row_title, *column_title;
  const char *const *row;    /* (n_rows) labels, from the top */
  const char *const *column; /* (n_columns) labels */
  const double *value;       /* (n_rows, n_columns) 0 … 1; NAN: nothing measured, grey */
  size_t n_rows, n_columns;  /* 1 … 200 each */
};

/* *data is malloc'ed. */
enum qtr_status qtr_heatmap_svg(const struct qtr_heatmap *map, void **data, size_t *n_bytes, struct qtr_error *err);
enum qtr_status qtr_heatmap_png(const struct qtr_heatmap *map, void **data, size_t *n_bytes, struct qtr_error *err);

#endif
