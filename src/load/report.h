/* report.h - a finished run as a table, as JSON and as a plot. */
#ifndef QTR_LOAD_REPORT_H
#define QTR_LOAD_REPORT_H

#include "load/stats.h"

#include <jansson.h>
#include <stdio.h>

struct qtr_load_report {
  const struct qtr_load_run *run;
  const struct qtr_load_summary *summary;
  const struct qtr_slo *slo;
  const char *url, *model, *load; /* load: a sentence on what was asked, "Poisson arrivals, 4 requests/s, …" */
  bool has_slo;
  size_t n_too_long; /* requests that were shortened */
  double factor;     /* by which all were, 1 = not */
};

void qtr_load_print(const struct qtr_load_report *report, FILE *out);
/* A new reference; NULL when out of memory. */
json_t *qtr_load_json(const struct qtr_load_report *report);
/* Distributions of the latencies, and tokens a second and running requests over time. *text is malloc'ed. */
enum qtr_status qtr_load_plot(const struct qtr_load_report *report, char **text, size_t *len, struct qtr_error *err);

#endif
