/* metrics.h - counters and histograms of the server, and Prometheus text. Plain data: whoever owns it guards it. */
#ifndef QTR_SERVER_METRICS_H
#define QTR_SERVER_METRICS_H

#include "quattuor/quattuor.h"
#include "server/buffer.h"

#define QTR_HISTOGRAM_MOST 24

struct qtr_histogram {
  const double *bound; /* (n) ascending upper bounds; static */
  int n;
  uint64_t count[QTR_HISTOGRAM_MOST + 1]; /* the last: above all bounds */
  double sum;
};
void qtr_histogram_add(struct qtr_histogram *h, double value);

enum qtr_outcome { QTR_OUT_STOP, QTR_OUT_LENGTH, QTR_OUT_TOOLS, QTR_OUT_ABORT, QTR_OUT_ERROR, QTR_OUTCOMES };

/* Of requests; belongs to the event loop. */
struct qtr_request_metrics {
  struct qtr_histogram first_token, per_token, whole, prompt_tokens, output_tokens;
  uint64_t outcome[QTR_OUTCOMES]; /* completions by how they ended */
  uint64_t rejected;              /* 429 */
  uint64_t http[6];               /* answers by class of status: 1xx … 5xx at 1 … 5 */
  int max_running, max_queue;     /* the limits, for gauges */
};
/* Of steps; belongs to the engine's thread, copied under the mailbox's mutex. */
struct qtr_step_metrics {
  struct qtr_histogram seconds, batch;
};
void qtr_request_metrics_init(struct qtr_request_metrics *m);
void qtr_step_metrics_init(struct qtr_step_metrics *m);

void qtr_metrics_write(struct qtr_buffer *out, const char *model, const struct qtr_request_metrics *requests,
                       const struct qtr_step_metrics *steps, const struct qtr_stats *stats, int n_connections,
                       double uptime);

#endif
