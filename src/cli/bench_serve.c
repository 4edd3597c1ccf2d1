/* bench_serve.c - `quattuor bench serve`: options of the load generator (src/load). */
#include "cli/bench_serve.h"
#include "base/checked.h"
#include "base/file.h"
#include "base/status.h"
#include "cli/cli.h"
#include "load/report.h"
#include "load/run.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_FILE ((size_t)1 << 30)
#define DEFAULT_REQUESTS 100

struct flags {
  const char *url, *ca, *api_key, *model, *trace, *dataset, *prompts, *too_long, *slo, *json, *plot;
  float rate, speed, duration, temperature;
  int32_t concurrency, requests, input_len, output_len, max_model_len, vocab, timeout;
  uint64_t seed;
  bool has_seed, no_ignore_eos, quiet;
};

#define AT(field) offsetof(struct flags, field)
static const struct qtr_option options_table[] = {
    {.name = "url",
     .argument = "URL",
     .kind = QTR_OPTION_STRING,
     .offset = AT(url),
     .help = "The server: http://HOST:PORT or https://…, with or without /v1. Default http://127.0.0.1:8080."},
    {.name = "tls-ca",
     .argument = "FILE",
     .kind = QTR_OPTION_STRING,
     .offset = AT(ca),
     .help = "For https://: the certificates to trust (PEM), such as the server's own. Default: the system's."},
    {.name = "api-key",
     .argument = "FILE",
     .kind = QTR_OPTION_STRING,
     .offset = AT(api_key),
     .help = "File with the server's key on its first line. Default: $OPENAI_API_KEY, else none."},
    {.name = "model",
     .argument = "NAME",
     .kind = QTR_OPTION_STRING,
     .offset = AT(model),
     .help = "The model's name in the API. Default: the first that /v1/models lists."},
    {.name = "trace",
     .argument = "FILE",
     .kind = QTR_OPTION_STRING,
     .offset = AT(trace),
     .help =
         "Arrival times and lengths: Azure's CSV, or Mooncake's JSON lines, whose block hashes become shared beginnings of "
         "prompts."},
    {.name = "speed",
     .argument = "X",
     .kind = QTR_OPTION_FLOAT,
     .offset = AT(speed),
     .min = 1e-6,
     .max = 1e6,
     .help = "The trace's time runs X times as fast. Default 1."},
    {.name = "rate",
     .argument = "R",
     .kind = QTR_OPTION_FLOAT,
     .offset = AT(rate),
     .min = 1e-6,
     .max = 1e6,
     .help = "Without a trace: R requests a second on average, as a Poisson process."},
    {.name = "concurrency",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(concurrency),
     .min = 1,
     .max = 65536,
     .help = "Closed loop: N requests at once, the next when one ends; a trace gives lengths only then."},
    {.name = "requests",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(requests),
     .min = 1,
     .max = 100000000,
     .help = "How many. Default: the whole trace; without one 100, or what --duration takes."},
    {.name = "duration",
     .argument = "SECONDS",
     .kind = QTR_OPTION_FLOAT,
     .offset = AT(duration),
     .min = 1e-3,
     .max = 1e7,
     .help = "Send for so long, then wait for what runs."},
    {.name = "dataset",
     .argument = "FILE",
     .kind = QTR_OPTION_STRING,
     .offset = AT(dataset),
     .help = "Prompts, in turn: JSON lines with \"prompt\" or \"messages\", else text, cut into pieces of about --input-len "
             "tokens. Default: random ones."},
    {.name = "prompts",
     .kind = QTR_OPTION_CHOICE,
     .offset = AT(prompts),
     .choices = "tokens|words",
     .help = "Random prompts as token ids (default; exact), or as common words (about a token each)."},
    {.name = "vocab",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(vocab),
     .min = 8,
     .max = 1 << 24,
     .help = "Random token ids are drawn from N/4 to N-1. Default 1024, which every model has."},
    {.name = "input-len",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(input_len),
     .min = 1,
     .max = QTR_TRACE_MOST_TOKENS,
     .help = "Tokens of a prompt, without a trace. Default 512."},
    {.name = "output-len",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(output_len),
     .min = 1,
     .max = QTR_TRACE_MOST_TOKENS,
     .help = "Tokens of an answer, without a trace. Default 128."},
    {.name = "max-model-len",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(max_model_len),
     .min = 2,
     .max = 1 << 30,
     .help = "Tokens a request may have in all. Default: what the server says, if it does."},
    {.name = "too-long",
     .kind = QTR_OPTION_CHOICE,
     .offset = AT(too_long),
     .choices = "refuse|clip|scale",
     .help = "Requests above that: refuse to begin (default), clip those, or scale all by the same factor."},
    {.name = "no-ignore-eos",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(no_ignore_eos),
     .help = "Do not send ignore_eos, which OpenAI does not know; answers end where the model likes then."},
    {.name = "temperature",
     .argument = "T",
     .kind = QTR_OPTION_FLOAT,
     .offset = AT(temperature),
     .min = 0,
     .max = 100,
     .help = "Default 0."},
    {.name = "seed",
     .argument = "S",
     .kind = QTR_OPTION_UINT64,
     .offset = AT(seed),
     .given = AT(has_seed),
     .help = "Of arrival times and random prompts: the same seed gives the same load. Default 0."},
    {.name = "timeout",
     .argument = "SECONDS",
     .kind = QTR_OPTION_INT,
     .offset = AT(timeout),
     .min = 1,
     .max = 86400,
     .help = "A request that takes longer has failed. Default 600."},
    {.name = "slo",
     .argument = "LIMITS",
     .kind = QTR_OPTION_STRING,
     .offset = AT(slo),
     .help =
         "Latency objective in milliseconds, such as ttft=500,tpot=50 (and e2e): goodput counts the requests that meet all "
         "of it."},
    {.name = "json",
     .argument = "FILE",
     .kind = QTR_OPTION_STRING,
     .offset = AT(json),
     .help = "The result as JSON; - is standard output, instead of the table."},
    {.name = "plot",
     .argument = "FILE",
     .kind = QTR_OPTION_STRING,
     .offset = AT(plot),
     .help = "The result as an SVG drawing: latency distributions, throughput and running requests over time."},
    {.name = "quiet", .kind = QTR_OPTION_FLAG, .offset = AT(quiet), .help = "No progress line."},
    {0}};
#undef AT

/* The key: *key is malloc'ed, NULL without one. */
static enum qtr_status read_key(const char *path, char **key, struct qtr_error *err) {
  const char *variable = getenv("OPENAI_API_KEY");
  size_t len;
  *key = NULL;
  if (!path) {
    if (!variable || !*variable) return QTR_OK;
    *key = strdup(variable);
    return *key ? QTR_OK : qtr_fail_memory(err, "a key", 0);
  }
  enum qtr_status status = qtr_file_read(path, 1 << 20, key, &len, err);
  if (status) return status;
  (*key)[strcspn(*key, "\r\n")] = 0;
  return **key ? QTR_OK : qtr_fail(err, QTR_ERR_FORMAT, "%s: there is no key on the first line", path);
}

/* How many requests a run without a trace has. */
static size_t n_requests(const struct flags *f) {
  if (f->requests > 0) return (size_t)f->requests;
  if (!(f->duration > 0)) return DEFAULT_REQUESTS;
  if (f->concurrency > 0) return 1000000; /* the clock ends it */
  double expected = (double)f->rate * (double)f->duration;
  return (size_t)QTR_MIN(expected + 10 * sqrt(expected) + 10, 1e8); /* ten deviations above what is expected */
}

static enum qtr_status make_workload(const struct flags *f, int32_t max_len, struct qtr_workload *w, size_t *n_too_long,
                                     double *factor, struct qtr_error *err) {
  enum qtr_status status = QTR_OK;
  char *text = NULL;
  size_t len;
  *n_too_long = 0;
  *factor = 1;
  w->seed = f->seed;
  w->vocab = f->vocab;
  w->kind = strcmp(f->prompts, "words") == 0 ? QTR_PROMPT_WORDS : QTR_PROMPT_TOKENS;
  w->block_tokens = QTR_TRACE_BLOCK_TOKENS;
  if (f->trace) {
    status = qtr_file_read(f->trace, MAX_FILE, &text, &len, err);
    if (!status && (status = qtr_trace_parse(text, len, (size_t)f->requests, &w->trace, err)))
      (void)qtr_error_prefix(err, "%s", f->trace);
  } else {
    status = qtr_workload_make(w, n_requests(f), f->concurrency > 0 ? 0 : (double)f->rate, f->input_len, f->output_len, err);
  }
  if (!status && f->dataset) {
    free(text);
    text = NULL;
    status = qtr_file_read(f->dataset, MAX_FILE, &text, &len, err);
    if (!status && (status = qtr_workload_read(w, text, len, f->input_len, err)))
      (void)qtr_error_prefix(err, "%s", f->dataset);
  }
  if (!status && max_len > 0) {
    enum qtr_trace_fit fit = strcmp(f->too_long, "clip") == 0    ? QTR_FIT_CLIP
                             : strcmp(f->too_long, "scale") == 0 ? QTR_FIT_SCALE
                                                                 : QTR_FIT_REFUSE;
    status = qtr_trace_fit(&w->trace, max_len, fit, n_too_long, factor, err);
    w->block_tokens = QTR_MAX((int32_t)(QTR_TRACE_BLOCK_TOKENS * *factor), 1);
  }
  free(text);
  return status;
}

static void describe(const struct flags *f, const struct qtr_workload *w, char *out, size_t size) {
  char when[160], what[160];
  if (f->concurrency > 0)
    (void)snprintf(when, sizeof when, "closed loop, %d at once", f->concurrency);
  else if (f->trace)
    (void)snprintf(when, sizeof when, "arrivals of the trace, %g times as fast", (double)f->speed);
  else
    (void)snprintf(when, sizeof when, "Poisson arrivals, %g requests/s", (double)f->rate);
  const char *trace = f->trace ? strrchr(f->trace, '/') : NULL, *set = f->dataset ? strrchr(f->dataset, '/') : NULL;
  trace = trace ? trace + 1 : f->trace;
  set = set ? set + 1 : f->dataset;
  if (f->trace)
    (void)snprintf(what, sizeof what, "lengths of %.100s", trace);
  else if (f->dataset)
    (void)snprintf(what, sizeof what, "up to %d tokens out", f->output_len);
  else
    (void)snprintf(what, sizeof what, "%d tokens in, %d out", f->input_len, f->output_len);
  (void)snprintf(out, size, "%s; %s; prompts: %.100s; seed %llu", when, what,
                 w->kind == QTR_PROMPT_DATASET ? set
                 : w->kind == QTR_PROMPT_WORDS ? "random words"
                                               : "random token ids",
                 (unsigned long long)f->seed);
}

/* False after a message. */
static bool write_results(const struct flags *f, const struct qtr_load_report *report) {
  struct qtr_error err;
  char *text = NULL;
  size_t len = 0;
  bool to_stdout = f->json && strcmp(f->json, "-") == 0, ok = true;
  if (f->plot) {
    enum qtr_status status = qtr_load_plot(report, &text, &len, &err);
    if (!status) status = qtr_file_write(f->plot, text, len, &err);
    if (status) ok = qtr_report("bench serve", &err) == QTR_EXIT_OK;
    free(text);
  }
  if (f->json) {
    json_t *o = qtr_load_json(report);
    if (to_stdout) return qtr_print_json("bench serve", o) && ok;
    text = o ? json_dumps(o, JSON_INDENT(2) | JSON_REAL_PRECISION(8)) : NULL;
    json_decref(o);
    enum qtr_status status = text ? qtr_file_write(f->json, text, strlen(text), &err) : qtr_fail_memory(&err, "the JSON", 0);
    if (status) ok = qtr_report("bench serve", &err) == QTR_EXIT_OK;
    free(text);
  }
  qtr_load_print(report, stdout);
  return qtr_finish_output("bench serve") && ok;
}

static int bench_serve(const struct flags *f) {
  struct qtr_error err;
  struct qtr_workload workload = {0};
  struct qtr_load_run run = {0};
  struct qtr_load_summary summary = {0};
  struct qtr_load_server server;
  struct qtr_slo slo;
  struct qtr_load_report report = {.run = &run, .summary = &summary, .slo = &slo, .url = f->url, .has_slo = f->slo != NULL};
  char *key = NULL, load[600];
  int code = QTR_EXIT_FAILURE;
  enum qtr_status status = qtr_slo_parse(f->slo, &slo, &err);
  if (!status) status = read_key(f->api_key, &key, &err);
  if (status) goto done;
  struct qtr_load_options o = {.url = f->url,
                               .ca = f->ca,
                               .key = key,
                               .model = f->model,
                               .concurrency = f->concurrency,
                               .speed = f->trace ? (double)f->speed : 1,
                               .duration = (double)f->duration,
                               .timeout = f->timeout,
                               .body.temperature = (double)f->temperature,
                               .body.ignore_eos = !f->no_ignore_eos,
                               .stop = qtr_interrupted,
                               .quiet = f->quiet};
  if ((status = qtr_load_ask_server(&o, &server, &err))) goto done;
  report.model = o.body.model = f->model ? f->model : server.model;
  int32_t max_len = f->max_model_len > 0 ? f->max_model_len : server.max_model_len;
  if ((status = make_workload(f, max_len, &workload, &report.n_too_long, &report.factor, &err))) goto done;
  describe(f, &workload, load, sizeof load);
  report.load = load;
  qtr_interrupt_watch();
  status = qtr_load_run(&o, &workload, &run, &err);
  if (!status) status = qtr_load_summarize(&run, &slo, &summary, &err);
  if (!status && write_results(f, &report)) {
    code = run.interrupted ? QTR_EXIT_INTERRUPTED : summary.n_ok > 0 ? QTR_EXIT_OK : QTR_EXIT_FAILURE;
    if (summary.n_ok == 0 && run.message[QTR_LOAD_HTTP][0] && workload.kind == QTR_PROMPT_TOKENS)
      (void)fprintf(stderr,
                    "quattuor bench serve: the prompts were token ids, which not every server takes: "
                    "try --prompts words\n");
  }
done:
  if (status) (void)qtr_report("bench serve", &err);
  qtr_load_summary_free(&summary);
  qtr_load_run_free(&run);
  qtr_workload_free(&workload);
  free(key);
  return code;
}

int qtr_bench_serve(int argc, char **argv) {
  struct flags flags = {.url = "http://127.0.0.1:8080",
                        .prompts = "tokens",
                        .too_long = "refuse",
                        .speed = 1,
                        .vocab = 1024,
                        .input_len = 512,
                        .output_len = 128,
                        .timeout = 600};
  const struct qtr_option_group groups[] = {{"Load and report", options_table, &flags}};
  struct qtr_command_line line = {
      .command = "bench serve",
      .usage = "bench serve [--url URL] (--trace FILE | --rate R | --concurrency N) [options]",
      .about =
          "Sends requests to a server that speaks OpenAI's API (this one, vLLM's, llama.cpp's) and measures: throughput, "
          "goodput under a latency objective, time to first token, time per output token, and whole answers. Open loop: "
          "requests come when they come, by a trace or a Poisson process, however slow the server is, and times count from "
          "when a request was due. Closed loop (--concurrency): a new one when one ends.",
      .group = groups,
      .n_groups = 1};
  int code = QTR_EXIT_USAGE;
  switch (qtr_options_parse(&line, argc, argv)) {
    case QTR_PARSE_OK:
      if (!flags.trace && !(flags.rate > 0) && flags.concurrency == 0)
        (void)fprintf(stderr, "quattuor bench serve: when shall requests come? --trace FILE, --rate R or --concurrency N\n");
      else if ((flags.trace || flags.concurrency > 0) && flags.rate > 0)
        (void)fprintf(stderr, "quattuor bench serve: --rate goes without --trace (see --speed) and --concurrency\n");
      else
        code = bench_serve(&flags);
      break;
    case QTR_PARSE_HELP: code = qtr_finish_output("bench serve") ? QTR_EXIT_OK : QTR_EXIT_FAILURE; break;
    case QTR_PARSE_ERROR: break;
  }
  qtr_options_free(&line);
  return code;
}
