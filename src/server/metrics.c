/* metrics.c - Prometheus text (metrics.h), under vLLM's names where it has one, so that its dashboards work; what it has no
 * name for is "quattuor:…". */
#include "server/metrics.h"

#include <string.h>

static const double first_bounds[] = {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
                                      1,     2.5,   5,    7.5,  10,   20,   40,   80,  160,  640, 2560};
static const double token_bounds[] = {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3,
                                      0.4,   0.5,    0.75,  1,    2.5,   5,    7.5,   10,  20,   40,  80};
static const double whole_bounds[] = {0.05, 0.1, 0.3, 0.5, 0.8, 1,   1.5, 2,   2.5, 5,    10,  15,
                                      20,   30,  40,  50,  60,  120, 240, 480, 960, 1920, 7680};
static const double count_bounds[] = {1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000};
static const double batch_bounds[] = {0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024};
static const double step_bounds[] = {0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10};

#define HISTOGRAM(bounds) \
  (struct qtr_histogram) { .bound = bounds, .n = (int)(sizeof bounds / sizeof bounds[0]) }

void qtr_request_metrics_init(struct qtr_request_metrics *m) {
  *m = (struct qtr_request_metrics){.first_token = HISTOGRAM(first_bounds),
                                    .per_token = HISTOGRAM(token_bounds),
                                    .whole = HISTOGRAM(whole_bounds),
                                    .prompt_tokens = HISTOGRAM(count_bounds),
                                    .output_tokens = HISTOGRAM(count_bounds)};
}

void qtr_step_metrics_init(struct qtr_step_metrics *m) {
  *m = (struct qtr_step_metrics){.seconds = HISTOGRAM(step_bounds), .batch = HISTOGRAM(batch_bounds)};
}

void qtr_histogram_add(struct qtr_histogram *h, double value) {
  int i = 0;
  while (i < h->n && value > h->bound[i]) i++;
  h->count[i]++;
  h->sum += value;
}

/* ---- text ---------------------------------------------------------------------------------------- */

struct page {
  struct qtr_buffer *out;
  const char *model; /* escaped as a label's value */
};

static void head(struct page *p, const char *name, const char *type, const char *help) {
  qtr_buffer_printf(p->out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

static void value(struct page *p, const char *name, const char *type, const char *help, double x) {
  head(p, name, type, help);
  qtr_buffer_printf(p->out, "%s{model_name=\"%s\"} %.15g\n", name, p->model, x);
}

static void histogram(struct page *p, const char *name, const char *help, const struct qtr_histogram *h) {
  head(p, name, "histogram", help);
  uint64_t sum = 0;
  for (int i = 0; i <= h->n; i++) {
    sum += h->count[i];
    qtr_buffer_printf(p->out, "%s_bucket{model_name=\"%s\",le=\"", name, p->model);
    if (i < h->n)
      qtr_buffer_printf(p->out, "%.15g\"} %llu\n", h->bound[i], (unsigned long long)sum);
    else
      qtr_buffer_printf(p->out, "+Inf\"} %llu\n", (unsigned long long)sum);
  }
  qtr_buffer_printf(p->out, "%s_sum{model_name=\"%s\"} %.9g\n%s_count{model_name=\"%s\"} %llu\n", name, p->model, h->sum,
                    name, p->model, (unsigned long long)sum);
}

void qtr_metrics_write(struct qtr_buffer *out, const char *model, const struct qtr_request_metrics *r,
                       const struct qtr_step_metrics *steps, const struct qtr_stats *s, int n_connections, double uptime) {
  char label[256];
  size_t n = 0;
  for (const char *c = model; *c && n + 3 < sizeof label; c++) {
    if (*c == '"' || *c == '\\') label[n++] = '\\';
    label[n++] = (unsigned char)*c < 0x20 ? '?' : *c;
  }
  label[n] = 0;
  struct page page = {out, label}, *p = &page;

  value(p, "vllm:num_requests_running", "gauge", "Completions that run.", s->n_running);
  value(p, "vllm:num_requests_waiting", "gauge", "Completions that wait.", s->n_waiting);
  value(p, "quattuor:max_num_seqs", "gauge", "Completions that may run at once.", r->max_running);
  value(p, "quattuor:max_queue", "gauge", "Completions that may wait.", r->max_queue);
  double used = s->n_pages_total > 0 ? (double)s->n_pages_used / s->n_pages_total : 0;
  value(p, "vllm:kv_cache_usage_perc", "gauge", "Share of the KV pages that are in use, 0 to 1.", used);
  value(p, "vllm:gpu_cache_usage_perc", "gauge", "The same under its older name.", used);
  value(p, "vllm:prefix_cache_queries_total", "counter", "Prompt tokens looked for in the prefix cache.",
        (double)s->n_prompt_tokens);
  value(p, "vllm:prefix_cache_hits_total", "counter", "Prompt tokens found there.", (double)s->n_cached_tokens);
  value(p, "vllm:num_preemptions_total", "counter", "Sequences sent back to the queue for want of pages.",
        (double)s->n_preemptions);
  value(p, "vllm:prompt_tokens_total", "counter", "Prompt tokens of admitted requests.", (double)s->n_prompt_tokens);
  value(p, "vllm:generation_tokens_total", "counter", "Tokens generated.", (double)s->n_output_tokens);
  head(p, "vllm:request_success_total", "counter", "Completions by how they ended.");
  static const char *const reasons[QTR_OUTCOMES] = {"stop", "length", "tool_calls", "abort", "error"};
  for (int i = 0; i < QTR_OUTCOMES; i++) {
    qtr_buffer_printf(out, "vllm:request_success_total{model_name=\"%s\",finished_reason=\"%s\"} %llu\n", label, reasons[i],
                      (unsigned long long)r->outcome[i]);
  }
  histogram(p, "vllm:time_to_first_token_seconds", "From the request's arrival to its first token.", &r->first_token);
  histogram(p, "vllm:time_per_output_token_seconds", "Between two tokens of a completion.", &r->per_token);
  histogram(p, "vllm:e2e_request_latency_seconds", "From the request's arrival to its end.", &r->whole);
  histogram(p, "vllm:request_prompt_tokens", "Prompt tokens of a request.", &r->prompt_tokens);
  histogram(p, "vllm:request_generation_tokens", "Tokens generated for a request.", &r->output_tokens);
  histogram(p, "quattuor:step_seconds", "Time of one step of the engine.", &steps->seconds);
  histogram(p, "quattuor:step_sequences", "Completions that got a token in a step.", &steps->batch);
  value(p, "quattuor:model_seconds_total", "counter", "Time inside the model.", s->model_seconds);
  value(p, "quattuor:kv_pages_free", "gauge", "Pages that hold nothing.",
        s->n_pages_total - s->n_pages_used - s->n_pages_cached);
  value(p, "quattuor:kv_pages", "gauge", "Pages of the KV pool.", s->n_pages_total);
  value(p, "quattuor:kv_pages_used", "gauge", "Pages that running completions hold.", s->n_pages_used);
  value(p, "quattuor:kv_pages_cached", "gauge", "Pages that nobody holds and that a prompt may reuse.", s->n_pages_cached);
  value(p, "quattuor:kv_stream_pages", "gauge", "Pages of the streaming heads' pool.", s->n_stream_pages_total);
  value(p, "quattuor:kv_stream_pages_used", "gauge", "Those that running completions hold.", s->n_stream_pages_used);
  value(p, "quattuor:kv_stream_pages_cached", "gauge", "Those that nobody holds and that a prompt may reuse.",
        s->n_stream_pages_cached);
  value(p, "quattuor:requests_rejected_total", "counter", "Requests told 429.", (double)r->rejected);
  head(p, "quattuor:http_responses_total", "counter", "Answers by class of status.");
  for (int i = 2; i < 6; i++) {
    qtr_buffer_printf(out, "quattuor:http_responses_total{model_name=\"%s\",class=\"%dxx\"} %llu\n", label, i,
                      (unsigned long long)r->http[i]);
  }
  value(p, "quattuor:connections", "gauge", "Open connections.", n_connections);
  value(p, "quattuor:uptime_seconds", "gauge", "Since the server started.", uptime);
}
