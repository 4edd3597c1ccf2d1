/* report.c - the table and the JSON of a run (report.h). */
#include "load/report.h"

#include <math.h>
#include <string.h>

static const char *const titles[QTR_TIMES] = {"time to first token", "time per output token", "between pieces of text",
                                              "whole answer"};
static const char *const kinds[QTR_LOAD_OUTCOMES] = {"ok",   "connect",      "closed", "timeout", "malformed",
                                                     "http", "stream_error", "empty",  "cut"};
static const char *const kind_titles[QTR_LOAD_OUTCOMES] = {
    "ok",          "no connection",     "closed too early", "too late", "malformed answer",
    "HTTP status", "error in a stream", "no token",         "cut by us"};

static size_t count_outcome(const struct qtr_load_run *run, enum qtr_load_outcome outcome, int status) {
  size_t n = 0;
  for (size_t i = 0; i < run->n; i++) {
    const struct qtr_load_sample *s = &run->sample[i];
    n += s->outcome == outcome && (status == 0 || s->status == status);
  }
  return n;
}

void qtr_load_print(const struct qtr_load_report *r, FILE *out) {
  const struct qtr_load_summary *s = r->summary;
  const struct qtr_load_run *run = r->run;
  (void)fprintf(out, "%s at %s\n%s\n\n", r->model, r->url, r->load);
  (void)fprintf(out, "requests %zu: %zu complete, %zu failed%s; %.1f s\n", run->n, s->n_ok, s->n_failed,
                run->interrupted ? ", then interrupted" : "", run->duration);
  if (r->factor < 1)
    (void)fprintf(out, "lengths scaled by %.3g: %zu requests would not have fit\n", r->factor, r->n_too_long);
  else if (r->n_too_long > 0)
    (void)fprintf(out, "%zu requests were clipped to the context\n", r->n_too_long);
  for (int k = 1; k < QTR_LOAD_OUTCOMES; k++) {
    enum qtr_load_outcome outcome = (enum qtr_load_outcome)k;
    size_t n = count_outcome(run, outcome, 0);
    if (n == 0) continue;
    (void)fprintf(out, "  %-18s %8zu", kind_titles[k], n);
    for (int status = 100; status < 600 && outcome == QTR_LOAD_HTTP; status++) {
      size_t with = count_outcome(run, outcome, status);
      if (with > 0) (void)fprintf(out, "  %d: %zu", status, with);
    }
    (void)fprintf(out, "%s%s\n", run->message[k][0] ? "  such as: " : "", run->message[k]);
  }
  (void)fprintf(out, "\nthroughput   %10.2f requests/s\n             %10.1f output tokens/s\n", s->requests_s, s->output_s);
  (void)fprintf(out, "             %10.1f input tokens/s\n", s->input_s);
  if (r->has_slo) {
    (void)fprintf(out, "goodput      %10.2f requests/s: %zu of %zu (%.1f %%) within", s->good_s, s->n_good, run->n,
                  run->n ? 100 * (double)s->n_good / (double)run->n : 0);
    for (int k = 0; k < QTR_TIMES; k++) {
      if (isfinite(r->slo->limit[k])) (void)fprintf(out, " %s %g ms", qtr_load_time_name[k], r->slo->limit[k] * 1000);
    }
    (void)fputc('\n', out);
  }
  (void)fprintf(out, "\n%-24s %9s %9s %9s %9s %9s %9s\n", "milliseconds", "mean", "p50", "p90", "p95", "p99", "max");
  for (int k = 0; k < QTR_TIMES; k++) {
    const struct qtr_distribution *d = &s->time[k];
    if (d->n == 0) continue;
    (void)fprintf(out, "%-24s %9.2f %9.2f %9.2f %9.2f %9.2f %9.2f\n", titles[k], d->mean * 1e3, d->p50 * 1e3, d->p90 * 1e3,
                  d->p95 * 1e3, d->p99 * 1e3, d->max * 1e3);
  }
  if (s->late > 0.05) (void)fprintf(out, "\nthis client was up to %.0f ms late: it is the bottleneck, too\n", s->late * 1e3);
  if (run->n_tokens_lost > 0)
    (void)fprintf(out, "%zu pieces of text were not kept for lack of memory\n", run->n_tokens_lost);
}

static json_t *number(double x) { /* six digits are more than a measurement has */
  char text[40];
  (void)snprintf(text, sizeof text, "%.6g", x);
  return json_real(strtod(text, NULL));
}

static json_t *distribution(const struct qtr_distribution *d) {
  return json_pack("{s:I, s:o, s:o, s:o, s:o, s:o, s:o}", "n", (json_int_t)d->n, "mean", number(d->mean * 1e3), "p50",
                   number(d->p50 * 1e3), "p90", number(d->p90 * 1e3), "p95", number(d->p95 * 1e3), "p99",
                   number(d->p99 * 1e3), "max", number(d->max * 1e3));
}

json_t *qtr_load_json(const struct qtr_load_report *r) {
  const struct qtr_load_summary *s = r->summary;
  const struct qtr_load_run *run = r->run;
  json_t *errors = json_object(), *slo = json_object();
  for (int k = 1; k < QTR_LOAD_OUTCOMES; k++) {
    size_t n = count_outcome(run, (enum qtr_load_outcome)k, 0);
    if (n > 0 && k != QTR_LOAD_HTTP) (void)json_object_set_new(errors, kinds[k], json_integer((json_int_t)n));
  }
  for (int status = 100; status < 600; status++) {
    size_t n = count_outcome(run, QTR_LOAD_HTTP, status);
    char name[16];
    (void)snprintf(name, sizeof name, "http_%d", status);
    if (n > 0) (void)json_object_set_new(errors, name, json_integer((json_int_t)n));
  }
  for (int k = 0; k < QTR_TIMES && r->has_slo; k++) {
    if (isfinite(r->slo->limit[k])) {
      (void)json_object_set_new(slo, qtr_load_time_name[k], number(r->slo->limit[k] * 1e3));
    }
  }
  json_t *o = json_pack("{s:s, s:s, s:s, s:I, s:I, s:I, s:b, s:I, s:o, s:o, s:I, s:I, s:o, s:o, s:o, s:o, s:o}", "url",
                        r->url, "model", r->model, "load", r->load, "requests", (json_int_t)run->n, "completed",
                        (json_int_t)s->n_ok, "failed", (json_int_t)s->n_failed, "interrupted", run->interrupted, "shortened",
                        (json_int_t)r->n_too_long, "length_factor", number(r->factor), "duration_s", number(run->duration),
                        "input_tokens", (json_int_t)s->n_input, "output_tokens", (json_int_t)s->n_output, "requests_s",
                        number(s->requests_s), "input_tokens_s", number(s->input_s), "output_tokens_s", number(s->output_s),
                        "client_late_ms", number(s->late * 1e3), "errors", errors);
  if (!o) {
    json_decref(slo);
    return NULL;
  }
  if (r->has_slo) {
    (void)json_object_set_new(o, "slo_ms", slo);
    (void)json_object_set_new(o, "goodput_requests_s", number(s->good_s));
    (void)json_object_set_new(o, "good_share", number(run->n ? (double)s->n_good / (double)run->n : 0));
  } else {
    json_decref(slo);
  }
  for (int k = 0; k < QTR_TIMES; k++) {
    char name[16];
    (void)snprintf(name, sizeof name, "%s_ms", qtr_load_time_name[k]);
    (void)json_object_set_new(o, name, distribution(&s->time[k]));
  }
  return o;
}
