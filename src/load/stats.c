/* stats.c - percentiles and goodput (stats.h). */
#include "load/stats.h"

#include "base/checked.h"
#include "base/status.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

const char *const qtr_load_time_name[QTR_TIMES] = {"ttft", "tpot", "itl", "e2e"};

void qtr_load_run_free(struct qtr_load_run *run) {
  free(run->sample);
  free(run->token);
  *run = (struct qtr_load_run){0};
}

static int compare(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

double qtr_percentile(const double *sorted, size_t n, double p) {
  if (n == 0) return 0;
  double at = p / 100 * (double)(n - 1);
  size_t i = (size_t)at;
  return i + 1 < n ? sorted[i] + (at - (double)i) * (sorted[i + 1] - sorted[i]) : sorted[n - 1];
}

struct qtr_distribution qtr_distribution_of(double *value, size_t n) {
  struct qtr_distribution d = {.n = n};
  if (n == 0) return d;
  qsort(value, n, sizeof *value, compare);
  double sum = 0;
  for (size_t i = 0; i < n; i++) sum += value[i];
  d.mean = sum / (double)n;
  d.p50 = qtr_percentile(value, n, 50);
  d.p90 = qtr_percentile(value, n, 90);
  d.p95 = qtr_percentile(value, n, 95);
  d.p99 = qtr_percentile(value, n, 99);
  d.max = value[n - 1];
  return d;
}

enum qtr_status qtr_slo_parse(const char *text, struct qtr_slo *slo, struct qtr_error *err) {
  for (int k = 0; k < QTR_TIMES; k++) slo->limit[k] = INFINITY;
  for (const char *at = text; at && *at;) {
    const char *equals = strchr(at, '=');
    char *end = NULL;
    double ms = equals ? strtod(equals + 1, &end) : 0;
    int found = -1;
    for (int k = 0; k < QTR_TIMES && equals; k++) {
      size_t n = strlen(qtr_load_time_name[k]);
      if (k != QTR_TIME_ITL && (size_t)(equals - at) == n && memcmp(at, qtr_load_time_name[k], n) == 0) found = k;
    }
    if (found < 0 || end == equals + 1 || !(ms > 0) || !isfinite(ms) || (*end && *end != ',') || (*end && !end[1])) {
      return qtr_fail(err, QTR_ERR_ARGUMENT,
                      "\"%.80s\" is no latency objective; write milliseconds of ttft, tpot and e2e: ttft=500,tpot=50", text);
    }
    slo->limit[found] = ms / 1000;
    at = *end ? end + 1 : end;
  }
  return QTR_OK;
}

/* The time of a request, or a negative number where it has none. */
static double time_of(const struct qtr_load_sample *s, enum qtr_load_time kind) {
  switch (kind) {
    case QTR_TIME_TTFT: return s->first - s->due;
    case QTR_TIME_TPOT: return s->n_output > 1 ? (s->last - s->first) / (s->n_output - 1) : -1;
    case QTR_TIME_E2E: return s->end - s->due;
    default: return -1;
  }
}

enum qtr_status qtr_load_summarize(const struct qtr_load_run *run, const struct qtr_slo *slo, struct qtr_load_summary *s,
                                   struct qtr_error *err) {
  *s = (struct qtr_load_summary){0};
  size_t n[QTR_TIMES] = {0};
  for (int k = 0; k < QTR_TIMES; k++) {
    size_t room = (k == QTR_TIME_ITL ? run->n_tokens : run->n) + 1;
    s->value[k] = malloc(room * sizeof *s->value[k]);
    if (!s->value[k]) return qtr_fail_memory(err, "statistics", room * sizeof *s->value[k]);
  }
  for (size_t i = 0; i < run->n; i++) {
    const struct qtr_load_sample *r = &run->sample[i];
    s->late = QTR_MAX(s->late, r->sent - r->due);
    if (r->outcome != QTR_LOAD_OK) {
      s->n_failed += r->outcome != QTR_LOAD_CUT;
      continue;
    }
    bool good = true;
    s->n_ok++;
    s->n_input += r->n_input;
    s->n_output += r->n_output;
    for (int k = 0; k < QTR_TIMES; k++) {
      double t = time_of(r, (enum qtr_load_time)k);
      if (t < 0) continue;
      s->value[k][n[k]++] = t;
      good = good && t <= slo->limit[k];
    }
    s->n_good += good;
  }
  for (size_t i = 0; i < run->n_tokens; i++) {
    if (run->token[i].gap >= 0) s->value[QTR_TIME_ITL][n[QTR_TIME_ITL]++] = (double)run->token[i].gap;
  }
  for (int k = 0; k < QTR_TIMES; k++) s->time[k] = qtr_distribution_of(s->value[k], n[k]);
  double d = run->duration > 0 ? run->duration : 1;
  s->requests_s = (double)s->n_ok / d;
  s->input_s = (double)s->n_input / d;
  s->output_s = (double)s->n_output / d;
  s->good_s = (double)s->n_good / d;
  return QTR_OK;
}

void qtr_load_summary_free(struct qtr_load_summary *s) {
  for (int k = 0; k < QTR_TIMES; k++) free(s->value[k]);
  *s = (struct qtr_load_summary){0};
}
