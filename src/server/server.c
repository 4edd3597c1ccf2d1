/* server.c - the event loop: opens everything, turns mail into events of jobs, watches signals and the clock, and ends in
 * order: first no new connections, then the running requests within their grace, then the rest is cut. */
#include "server/server_internal.h"
#include "server/tls.h"

#include "base/clock.h"
#include "base/file.h"
#include "base/status.h"
#include "engine/engine_internal.h"

#include <event2/event.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <time.h>

#define TICK_MS 100
#define N_WORKERS 2
#define RESERVED_FILES 64 /* descriptors that are not connections */

void qtr_server_options_init(struct qtr_server_options *o) {
  struct qtr_request_options defaults;
  qtr_request_options_init(&defaults);
  *o = (struct qtr_server_options){.host = "127.0.0.1",
                                   .port = 8080,
                                   .model_name = "model",
                                   .max_running = 256,
                                   .max_queue = 1024,
                                   .max_connections = 1024,
                                   .max_body = (size_t)4 << 20,
                                   .timeout = 600,
                                   .grace = 30,
                                   .ping = 15,
                                   .defaults.sampling = defaults.sampling};
}

void qtr_server_defaults_read(const char *model_dir, struct qtr_api_defaults *defaults) {
  struct qtr_request_options plain;
  qtr_request_options_init(&plain);
  *defaults = (struct qtr_api_defaults){.sampling = plain.sampling};
  char *path = qtr_path_join(model_dir, "generation_config.json"), *data = NULL;
  size_t len;
  json_t *o = NULL;
  if (path && qtr_file_exists(path) && !qtr_file_read(path, (size_t)1 << 20, &data, &len, NULL))
    o = json_loadb(data, len, 0, NULL);
  struct qtr_sampling *s = &defaults->sampling;
  const struct {
    const char *name;
    float *value;
  } number[] = {{"temperature", &s->temperature},
                {"top_p", &s->top_p},
                {"min_p", &s->min_p},
                {"repetition_penalty", &s->repetition_penalty}};
  for (size_t i = 0; i < sizeof number / sizeof number[0]; i++) {
    const json_t *v = json_object_get(o, number[i].name);
    float before = *number[i].value;
    if (!json_is_number(v)) continue;
    *number[i].value = (float)json_number_value(v);
    if (qtr_sampling_check(s, NULL)) *number[i].value = before;
  }
  json_int_t top_k = json_integer_value(json_object_get(o, "top_k"));
  if (top_k > 0 && top_k <= INT32_MAX) s->top_k = (int32_t)top_k;
  json_int_t most = json_integer_value(json_object_get(o, "max_new_tokens"));
  if (most > 0 && most <= INT32_MAX) defaults->max_tokens = (int32_t)most;
  json_decref(o);
  free(data);
  free(path);
}

/* ---- callbacks of the loop ----------------------------------------------------------------------- */

static void take_mail(const struct qtr_mail *mail, void *arg) { qtr_job_event(arg, mail); }

static void on_mail(evutil_socket_t fd, short what, void *arg) {
  struct qtr_server *s = arg;
  (void)fd;
  (void)what;
  qtr_runner_collect(s->runner, take_mail, s);
}

static void on_gone(struct qtr_http_conn *conn, void *user, void *arg) {
  (void)conn;
  (void)arg;
  if (user) qtr_job_gone(user);
}

static void for_each_job(struct qtr_server *s, void (*act)(struct qtr_job *job, double now), double now) {
  for (struct qtr_job *job = s->jobs, *next; job; job = next) {
    next = job->next; /* acting may free the job, never another */
    act(job, now);
  }
}

static void cut(struct qtr_job *job, double now) {
  (void)now;
  qtr_job_cut(job, 503, "the server is shutting down");
}

static void on_tick(evutil_socket_t fd, short what, void *arg) {
  struct qtr_server *s = arg;
  double now = qtr_now();
  (void)fd;
  (void)what;
  for_each_job(s, qtr_job_tick, now);
  if (!s->draining) return;
  if (now >= s->t_cut) {
    for_each_job(s, cut, now);
    /* Answers still leave through their connections; two seconds from the cut for the slowest, then they are closed. */
    if (s->t_close <= 0) s->t_close = now + 2;
  }
  if ((!s->jobs && qtr_http_connections(s->http) == 0) || (s->t_close > 0 && now >= s->t_close)) {
    (void)event_base_loopbreak(s->base);
  }
}

static void on_signal(evutil_socket_t number, short what, void *arg) {
  struct qtr_server *s = arg;
  (void)what;
  double now = qtr_now();
  int n = 0;
  for (const struct qtr_job *job = s->jobs; job; job = job->next) n += !job->answered;
  if (!s->draining) {
    s->draining = true;
    s->t_cut = now + s->o->grace;
    (void)fprintf(stderr, "quattuor serve: %s: no new requests; %d running %s up to %g s to finish, then they are cut\n",
                  number == SIGTERM ? "SIGTERM" : "SIGINT", n, n == 1 ? "one has" : "ones have", s->o->grace);
    qtr_http_drain(s->http);
  } else {
    (void)fprintf(stderr, "quattuor serve: a second signal: %d running requests are cut\n", n);
    s->t_cut = now;
  }
}

/* ---- life ---------------------------------------------------------------------------------------- */

/* Room for the connections, as far as the system allows. */
static int usable_connections(int wanted) {
  struct rlimit limit;
  if (getrlimit(RLIMIT_NOFILE, &limit)) return wanted;
  rlim_t needed = (rlim_t)wanted + RESERVED_FILES;
  if (limit.rlim_cur < needed) {
    limit.rlim_cur = limit.rlim_max < needed ? limit.rlim_max : needed;
    (void)setrlimit(RLIMIT_NOFILE, &limit);
    (void)getrlimit(RLIMIT_NOFILE, &limit);
  }
  if (limit.rlim_cur >= needed) return wanted;
  int most = limit.rlim_cur > 2 * RESERVED_FILES ? (int)limit.rlim_cur - RESERVED_FILES : RESERVED_FILES;
  (void)fprintf(stderr, "quattuor serve: the limit of open files allows %d connections\n", most);
  return most;
}

static enum qtr_status open_all(struct qtr_server *s, struct qtr_error *err) {
  const struct qtr_server_options *o = s->o;
  s->base = event_base_new(); /* timers to the millisecond will do: finer ones take a system call a turn */
  if (!s->base) return qtr_fail_memory(err, "the event loop", 0);
  const struct qtr_http_limits limits = {.max_connections = usable_connections(o->max_connections),
                                         .max_body = o->max_body,
                                         .head_seconds = 15,
                                         .body_seconds = 60,
                                         .idle_seconds = 75,
                                         .write_seconds = 30,
                                         .max_pending = (size_t)8 << 20,
                                         .tls = s->tls};
  const struct qtr_http_handlers handlers = {.request = qtr_route, .refuse = qtr_route_refuse, .gone = on_gone, .arg = s};
  enum qtr_status status = qtr_http_open(s->base, o->host, o->port, &limits, &handlers, &s->http, err);
  if (!status) status = qtr_runner_create(s->engine, N_WORKERS, &s->runner, err);
  if (status) return status;
  s->mail = event_new(s->base, qtr_runner_fd(s->runner), EV_READ | EV_PERSIST, on_mail, s);
  s->tick = event_new(s->base, -1, EV_PERSIST, on_tick, s);
  s->signal[0] = evsignal_new(s->base, SIGTERM, on_signal, s);
  s->signal[1] = evsignal_new(s->base, SIGINT, on_signal, s);
  if (!s->mail || !s->tick || !s->signal[0] || !s->signal[1] || event_add(s->mail, NULL) ||
      event_add(s->tick, &(struct timeval){.tv_usec = TICK_MS * 1000}) || event_add(s->signal[0], NULL) ||
      event_add(s->signal[1], NULL)) {
    return qtr_fail_memory(err, "events", 0);
  }
  return QTR_OK;
}

/* Ends what is left: every job gets its last event, so that every job is freed. */
static void close_all(struct qtr_server *s) {
  qtr_http_close(s->http); /* tells nobody: the jobs hear it next */
  s->http = NULL;
  for (struct qtr_job *job = s->jobs, *next; job; job = next) {
    next = job->next;
    qtr_job_gone(job);
  }
  if (s->runner) {
    qtr_runner_stop(s->runner);
    qtr_runner_collect(s->runner, take_mail, s);
    qtr_runner_free(s->runner);
  }
  struct event *const events[] = {s->mail, s->tick, s->signal[0], s->signal[1]};
  for (size_t i = 0; i < sizeof events / sizeof events[0]; i++) {
    if (events[i]) event_free(events[i]);
  }
  if (s->base) {
    (void)event_base_loop(s->base, EVLOOP_NONBLOCK); /* callbacks that bufferevents had deferred still hold them */
    event_base_free(s->base);
  }
  qtr_buffer_free(&s->chunk);
  qtr_tls_close(s->tls);
  qtr_mask_cache_free(s->mask_cache);
  qtr_vocabulary_free(s->vocabulary);
}

enum qtr_status qtr_server_run(struct qtr_engine *engine, const struct qtr_server_options *o, struct qtr_error *err) {
  struct qtr_server s = {.o = o, .engine = engine, .created = (int64_t)time(NULL), .t_start = qtr_now()};
  qtr_engine_get_info(engine, &s.info);
  qtr_request_metrics_init(&s.metrics);
  s.metrics.max_running = o->max_running;
  s.metrics.max_queue = o->max_queue;
  if (getrandom(&s.next_id, sizeof s.next_id, 0) != (ssize_t)sizeof s.next_id) s.next_id = (uint64_t)s.created << 20;
  qtr_tools_probe(&s);
  enum qtr_status status = QTR_OK;
  if (engine->tokenizer) {
    status =
        qtr_vocabulary_create(engine->tokenizer, engine->eos_token, engine->n_eos, engine->vocab_size, &s.vocabulary, err);
  }
  s.mask_cache = qtr_mask_cache_create();
  if (!status && !s.mask_cache) status = qtr_fail_memory(err, "a cache", 0);
  if (!status && o->tls_cert) status = qtr_tls_open(o->tls_cert, o->tls_key, &s.tls, err);
  if (!status) status = open_all(&s, err);
  if (!status) {
    bool six = strchr(o->host, ':') != NULL;
    char url[320];
    (void)snprintf(url, sizeof url, "http%s://%s%.255s%s:%d", s.tls ? "s" : "", six ? "[" : "", o->host, six ? "]" : "",
                   qtr_http_port(s.http));
    (void)fprintf(stderr, "quattuor serve: model \"%s\" at %s/v1%s; Ctrl-C ends it\n", o->model_name, url,
                  o->n_api_keys > 0 ? " (API key needed)" : "");
    (void)fprintf(stderr, "quattuor serve: its page at %s/\n", url);
    (void)fprintf(stderr,
                  "quattuor serve: try: curl %s/v1/chat/completions%s -H 'Content-Type: application/json' "
                  "-d '{\"messages\": [{\"role\": \"user\", \"content\": \"A table for two, please.\"}]}'\n",
                  url, o->n_api_keys > 0 ? " -H 'Authorization: Bearer KEY'" : "");
    if (event_base_dispatch(s.base) < 0) status = qtr_fail(err, QTR_ERR_IO, "the event loop failed");
    if (!status) (void)fprintf(stderr, "quattuor serve: stopped\n");
  }
  close_all(&s);
  return status;
}
