/* stats.h - what a run of requests measured, and its summary. Times are in seconds of one clock that begins with the run. */
#ifndef QTR_LOAD_STATS_H
#define QTR_LOAD_STATS_H

#include "load/client.h"

struct qtr_load_sample {  /* one request */
  double due, first, end; /* when it was due, had its first token (or never: 0), was over */
  double last;            /* its last token */
  double sent;
  int32_t n_input, n_output; /* tokens, as the server counted them, else as asked and as seen */
  enum qtr_load_outcome outcome;
  int status; /* of HTTP, 0 without an answer */
};

struct qtr_load_token { /* one piece of text */
  float time, gap;      /* when it came; since the one before it, < 0 for a first one */
};

struct qtr_load_run {
  struct qtr_load_sample *sample; /* (n) those that were sent */
  size_t n;
  struct qtr_load_token *token;                   /* (n_tokens) */
  size_t n_tokens, token_capacity, n_tokens_lost; /* lost: out of memory for them */
  double duration;                                /* from the first request to the end of the last */
  char message[QTR_LOAD_OUTCOMES][200];           /* the first of each kind of failure */
  bool interrupted;
};
void qtr_load_run_free(struct qtr_load_run *run);

struct qtr_distribution {
  size_t n;
  double mean, p50, p90, p95, p99, max; /* 0 when n is 0 */
};
/* Sorts the values. Percentiles are linear between neighbours, as numpy's. */
struct qtr_distribution qtr_distribution_of(double *value, size_t n);
double qtr_percentile(const double *sorted, size_t n, double p); /* p in [0, 100] */

enum qtr_load_time { QTR_TIME_TTFT, QTR_TIME_TPOT, QTR_TIME_ITL, QTR_TIME_E2E, QTR_TIMES };
extern const char *const qtr_load_time_name[QTR_TIMES]; /* "ttft" */

/* Limits of latency in seconds; INFINITY = none. ITL has none. */
struct qtr_slo {
  double limit[QTR_TIMES];
};
/* "ttft=500,tpot=50,e2e=10000", milliseconds. */
enum qtr_status qtr_slo_parse(const char *text, struct qtr_slo *slo, struct qtr_error *err);

struct qtr_load_summary {
  size_t n_ok, n_failed, n_good; /* good: within the limits */
  int64_t n_input, n_output;     /* tokens of those that are ok */
  double requests_s, input_s, output_s, good_s;
  double late; /* how much later than due a request was sent, at most: above a few ms this client is too slow */
  struct qtr_distribution time[QTR_TIMES];
  double *value[QTR_TIMES]; /* (time[k].n) sorted */
};
/* TTFT and E2E count from when a request was due, so that a server (or client) that falls behind does not look better for
 * it. TPOT is (last - first) / (n_output - 1) of requests with two tokens or more; ITL the gaps between pieces of text. */
enum qtr_status qtr_load_summarize(const struct qtr_load_run *run, const struct qtr_slo *slo,
                                   struct qtr_load_summary *summary, struct qtr_error *err);
void qtr_load_summary_free(struct qtr_load_summary *summary);

#endif
