/* run.c - the loop of a measurement (run.h): a timer for the next arrival in an open loop, the end of an answer in a closed
 * one. Bodies are made just before they are sent. */
#include "load/run.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/progress.h"
#include "base/status.h"

#include <event2/event.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#define MOST_TOKENS_KEPT ((size_t)1 << 27) /* 1 GiB */

#define PROGRESS_STEPS 1000

struct driver;

struct job {                 /* a request that runs */
  struct qtr_load_call call; /* first */
  struct driver *driver;
  size_t index;
  double t_last;
  int32_t n_seen, n_input, n_output; /* the last two as the server counts, -1 while it has not said */
  bool whole;                        /* the end came */
  enum qtr_load_outcome failed;      /* found in the stream */
};

struct driver {
  const struct qtr_load_options *o;
  const struct qtr_workload *w;
  struct qtr_load_run *run;
  struct event_base *base;
  struct qtr_load_client *client;
  struct event *arrival, *tick;
  struct qtr_progress progress;
  double t_start;
  size_t n_running, n_ended;
  bool ending; /* nothing more is sent */
  bool out_of_memory;
};

/* ---- what servers say ---------------------------------------------------------------------------- */

static int32_t count_of(const json_t *o, const char *name) {
  const json_t *v = json_object_get(o, name);
  json_int_t n = json_is_integer(v) ? json_integer_value(v) : -1;
  return n >= 0 && n <= INT32_MAX ? (int32_t)n : -1;
}

static void copy_message(const json_t *error, char *out, size_t size) {
  const char *said = json_string_value(json_is_string(error) ? error : json_object_get(error, "message"));
  if (!said) said = "an error without a message";
  (void)qtr_printable(said, strlen(said), out, size);
}

bool qtr_load_chunk_read_tree(const char *data, size_t len, struct qtr_load_chunk *chunk) {
  *chunk = (struct qtr_load_chunk){.n_input = -1, .n_output = -1};
  json_t *o = json_loadb(data, len, JSON_ALLOW_NUL, NULL);
  if (!json_is_object(o)) {
    json_decref(o);
    return false;
  }
  const json_t *error = json_object_get(o, "error"), *usage = json_object_get(o, "usage");
  const json_t *choice = json_array_get(json_object_get(o, "choices"), 0), *delta = json_object_get(choice, "delta");
  if (error && !json_is_null(error)) copy_message(error, chunk->error, sizeof chunk->error);
  if (json_is_object(usage)) {
    chunk->n_input = count_of(usage, "prompt_tokens");
    chunk->n_output = count_of(usage, "completion_tokens");
  }
  /* A chat begins with a role and no text. A completion's piece may be empty: half a character, held back. */
  const json_t *text = json_object_get(choice, "text");
  chunk->end = json_is_string(json_object_get(choice, "finish_reason"));
  if (text)
    chunk->token = json_string_length(text) > 0 || !chunk->end;
  else
    chunk->token = json_string_length(json_object_get(delta, "content")) > 0 ||
                   json_string_length(json_object_get(delta, "reasoning_content")) > 0;
  json_decref(o);
  return true;
}

bool qtr_load_chunk_read(const char *data, size_t len, struct qtr_load_chunk *chunk) {
  if (len == 6 && memcmp(data, "[DONE]", 6) == 0) {
    *chunk = (struct qtr_load_chunk){.n_input = -1, .n_output = -1, .end = true};
    return true;
  }
  return qtr_load_chunk_read_plain(data, len, chunk) || qtr_load_chunk_read_tree(data, len, chunk);
}

struct question { /* for /v1/models */
  struct qtr_load_call call;
  enum qtr_load_outcome outcome;
  int status;
  struct qtr_buffer text;
};

static void models_done(struct qtr_load_call *call, enum qtr_load_outcome outcome, const struct qtr_response *response) {
  struct question *q = (struct question *)call;
  q->outcome = outcome;
  if (!response) return;
  q->status = response->status;
  qtr_buffer_put(&q->text, response->data.data, response->data.len);
}

static void read_models(const char *text, size_t len, struct qtr_load_server *server) {
  json_t *o = json_loadb(text, len, JSON_ALLOW_NUL, NULL);
  const json_t *model = json_array_get(json_object_get(o, "data"), 0);
  const char *id = json_string_value(json_object_get(model, "id"));
  int32_t longest = count_of(model, "max_model_len");                                 /* vLLM's, and ours */
  if (longest < 0) longest = count_of(json_object_get(model, "meta"), "n_ctx_train"); /* llama.cpp's */
  if (id && strlen(id) < sizeof server->model) memcpy(server->model, id, strlen(id) + 1);
  server->max_model_len = QTR_MAX(longest, 0);
  json_decref(o);
}

enum qtr_status qtr_load_ask_server(const struct qtr_load_options *o, struct qtr_load_server *server,
                                    struct qtr_error *err) {
  struct question q = {.call = {.method = "GET", .path = "/v1/models", .done = models_done}};
  struct qtr_load_client *client = NULL;
  *server = (struct qtr_load_server){0};
  struct event_base *base = event_base_new();
  enum qtr_status status = base ? qtr_load_client_open(base, o->url, o->ca, o->key, QTR_MIN(o->timeout, 30), &client, err)
                                : qtr_fail_memory(err, "the event loop", 0);
  if (status) goto done;
  q.outcome = QTR_LOAD_CUT;
  if (!qtr_load_client_ask(client, &q.call)) {
    status = qtr_fail_memory(err, "a request", 0);
    goto done;
  }
  while (q.outcome == QTR_LOAD_CUT && event_base_loop(base, EVLOOP_ONCE) == 0) continue;
  if (q.outcome == QTR_LOAD_OK) {
    read_models(q.text.data ? q.text.data : "", q.text.len, server);
    if (!server->model[0] && !o->model)
      status = qtr_fail(err, QTR_ERR_FORMAT, "%.100s: /v1/models names no model; say --model NAME", o->url);
  } else if (q.outcome == QTR_LOAD_CONNECT) {
    status = qtr_fail(err, QTR_ERR_IO, "%.100s: no connection: %s", o->url, qtr_load_client_why(client));
  } else if (q.outcome != QTR_LOAD_HTTP) {
    status = qtr_fail(err, QTR_ERR_IO, "%.100s: /v1/models gives no answer: is it an OpenAI-compatible server?", o->url);
  } else if (q.status == 401 || q.status == 403) {
    status = qtr_fail(err, QTR_ERR_ARGUMENT, "%.100s wants an API key (status %d): --api-key FILE or $OPENAI_API_KEY",
                      o->url, q.status);
  } else if (!o->model) {
    status = qtr_fail(err, QTR_ERR_IO, "%.100s: /v1/models answers %d; say --model NAME if it has none", o->url, q.status);
  }
done:
  if (client) qtr_load_client_close(client);
  if (base) event_base_free(base);
  qtr_buffer_free(&q.text);
  return status;
}

/* ---- a request ----------------------------------------------------------------------------------- */

static double now_of(const struct driver *d) { return qtr_now() - d->t_start; }

static void remember(struct driver *d, enum qtr_load_outcome outcome, const char *message, size_t len) {
  char *out = d->run->message[outcome];
  if (!out[0]) (void)qtr_printable(message, len, out, sizeof d->run->message[outcome]);
}

static void keep_token(struct driver *d, double time, double gap) {
  struct qtr_load_run *run = d->run;
  if (run->n_tokens == run->token_capacity) {
    size_t capacity = run->token_capacity ? run->token_capacity * 2 : 4096;
    struct qtr_load_token *more = capacity <= MOST_TOKENS_KEPT ? realloc(run->token, capacity * sizeof *more) : NULL;
    if (!more) {
      run->n_tokens_lost++;
      return;
    }
    run->token = more;
    run->token_capacity = capacity;
  }
  run->token[run->n_tokens++] = (struct qtr_load_token){(float)time, (float)gap};
}

static void on_chunk(struct qtr_load_call *call, const char *data, size_t len) {
  struct job *job = (struct job *)call;
  struct driver *d = job->driver;
  struct qtr_load_sample *s = &d->run->sample[job->index];
  struct qtr_load_chunk chunk;
  if (job->failed) return;
  if (!qtr_load_chunk_read(data, len, &chunk)) {
    job->failed = QTR_LOAD_MALFORMED;
    remember(d, QTR_LOAD_MALFORMED, data, QTR_MIN(len, 100));
    return;
  }
  if (chunk.error[0]) {
    job->failed = QTR_LOAD_SAID;
    remember(d, QTR_LOAD_SAID, chunk.error, strlen(chunk.error));
  }
  if (chunk.n_input >= 0) job->n_input = chunk.n_input;
  if (chunk.n_output >= 0) job->n_output = chunk.n_output;
  job->whole |= chunk.end;
  if (!chunk.token) return;
  double now = now_of(d);
  if (job->n_seen == 0) s->first = now;
  keep_token(d, now, job->n_seen == 0 ? -1 : now - job->t_last);
  job->t_last = s->last = now;
  if (job->n_seen < INT32_MAX) job->n_seen++;
}

static void send_next(struct driver *d);

static void on_done(struct qtr_load_call *call, enum qtr_load_outcome outcome, const struct qtr_response *response) {
  struct job *job = (struct job *)call;
  struct driver *d = job->driver;
  struct qtr_load_sample *s = &d->run->sample[job->index];
  if (outcome == QTR_LOAD_OK && job->failed) outcome = job->failed;
  if (outcome == QTR_LOAD_OK && !job->whole) {
    static const char why[] = "an answer that is no stream, or one without an end";
    outcome = QTR_LOAD_MALFORMED;
    remember(d, outcome, why, strlen(why));
  }
  s->n_output = job->n_output >= 0 ? job->n_output : job->n_seen;
  if (job->n_input >= 0) s->n_input = job->n_input;
  if (outcome == QTR_LOAD_OK && job->n_seen == 0) outcome = QTR_LOAD_EMPTY;
  if (outcome == QTR_LOAD_HTTP) {
    struct qtr_load_chunk said;
    const struct qtr_buffer *body = &response->data;
    bool ours = body->data && qtr_load_chunk_read(body->data, body->len, &said) && said.error[0];
    remember(d, outcome,
             ours         ? said.error
             : body->data ? body->data
                          : "",
             ours ? strlen(said.error) : QTR_MIN(body->len, 100));
  }
  if (outcome == QTR_LOAD_CONNECT) {
    const char *why = qtr_load_client_why(d->client);
    remember(d, outcome, why, strlen(why));
  }
  s->outcome = outcome;
  s->status = response ? response->status : 0;
  s->end = now_of(d);
  d->run->duration = QTR_MAX(d->run->duration, s->end);
  d->n_running--;
  d->n_ended++;
  free(job);
  if (d->o->concurrency > 0 && outcome != QTR_LOAD_CUT) send_next(d);
  if (d->ending && d->n_running == 0) (void)event_base_loopbreak(d->base);
}

/* Sends the next request of the trace. */
static void send_next(struct driver *d) {
  size_t i = d->run->n;
  double now = now_of(d);
  if (i == d->w->trace.n || (d->o->duration > 0 && now >= d->o->duration)) d->ending = true;
  if (d->ending) return;
  struct qtr_buffer body = {0};
  struct job *job = calloc(1, sizeof *job);
  bool chat = false;
  if (job) qtr_workload_body(d->w, i, &d->o->body, &body, &chat);
  if (!job || body.failed) {
    d->ending = d->out_of_memory = true;
    free(job);
    qtr_buffer_free(&body);
    return;
  }
  *job = (struct job){.call = {.method = "POST",
                               .path = chat ? "/v1/chat/completions" : "/v1/completions",
                               .body = body.data,
                               .body_len = body.len,
                               .event = on_chunk,
                               .done = on_done},
                      .driver = d,
                      .index = i,
                      .n_input = -1,
                      .n_output = -1};
  double due = d->o->concurrency > 0 ? now : d->w->trace.request[i].time / d->o->speed;
  d->run->sample[i] = (struct qtr_load_sample){.due = due, .sent = now, .n_input = d->w->trace.request[i].n_input};
  d->run->n++;
  d->n_running++;
  if (d->run->n == d->w->trace.n) d->ending = true;
  bool sent = qtr_load_client_ask(d->client, &job->call);
  qtr_buffer_free(&body);
  if (sent) return;
  d->run->n--;
  d->n_running--;
  d->ending = d->out_of_memory = true;
  free(job);
}

/* ---- the loop ------------------------------------------------------------------------------------ */

static void set_timer(struct event *timer, double seconds) {
  double wait = QTR_MIN(QTR_MAX(seconds, 0), 3600); /* a longer one is set again */
  time_t whole = (time_t)wait;
  (void)event_add(timer, &(struct timeval){.tv_sec = whole, .tv_usec = (suseconds_t)((wait - (double)whole) * 1e6)});
}

/* Open loop: sends what is due. */
static void on_arrival(evutil_socket_t fd, short what, void *arg) {
  struct driver *d = arg;
  (void)fd;
  (void)what;
  while (!d->ending && d->w->trace.request[d->run->n].time / d->o->speed <= now_of(d)) send_next(d);
  if (!d->ending) set_timer(d->arrival, d->w->trace.request[d->run->n].time / d->o->speed - now_of(d));
  if (d->ending && d->n_running == 0) (void)event_base_loopbreak(d->base);
}

static void on_tick(evutil_socket_t fd, short what, void *arg) {
  struct driver *d = arg;
  (void)fd;
  (void)what;
  double share = (double)d->n_ended / (double)d->w->trace.n, now = now_of(d);
  if (d->o->duration > 0) share = QTR_MAX(share, now / d->o->duration);
  qtr_progress_update(&d->progress, (size_t)(share * PROGRESS_STEPS));
  bool stop = d->o->stop && d->o->stop();
  if (d->o->duration > 0 && now >= d->o->duration) d->ending = true;
  if (stop) {
    d->ending = d->run->interrupted = true;
    qtr_load_client_cut(d->client);
  }
  if (d->ending && d->n_running == 0) (void)event_base_loopbreak(d->base);
}

enum qtr_status qtr_load_run(const struct qtr_load_options *o, const struct qtr_workload *w, struct qtr_load_run *run,
                             struct qtr_error *err) {
  struct driver d = {.o = o, .w = w, .run = run};
  struct rlimit files;
  *run = (struct qtr_load_run){0};
  if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < files.rlim_max) { /* a connection each */
    files.rlim_cur = files.rlim_max;
    (void)setrlimit(RLIMIT_NOFILE, &files);
  }
  struct event_config *config = event_config_new();
  if (config && o->concurrency == 0) /* arrivals to the microsecond, for a system call a turn */
    (void)event_config_set_flag(config, EVENT_BASE_FLAG_PRECISE_TIMER);
  d.base = config ? event_base_new_with_config(config) : NULL;
  if (config) event_config_free(config);
  run->sample = calloc(w->trace.n > 0 ? w->trace.n : 1, sizeof *run->sample);
  enum qtr_status status = QTR_OK;
  if (!d.base || !run->sample) status = qtr_fail_memory(err, "a run", w->trace.n * sizeof *run->sample);
  if (!status) status = qtr_load_client_open(d.base, o->url, o->ca, o->key, o->timeout, &d.client, err);
  if (status) goto done;
  d.arrival = event_new(d.base, -1, 0, on_arrival, &d);
  d.tick = event_new(d.base, -1, EV_PERSIST, on_tick, &d);
  if (!d.arrival || !d.tick || event_add(d.tick, &(struct timeval){.tv_usec = 100000})) {
    status = qtr_fail_memory(err, "events", 0);
    goto done;
  }
  qtr_progress_start(&d.progress, "requests", PROGRESS_STEPS, o->quiet);
  d.t_start = qtr_now();
  if (o->concurrency > 0) {
    for (int32_t i = 0; i < o->concurrency; i++) send_next(&d);
  } else {
    set_timer(d.arrival, 0);
  }
  (void)event_base_dispatch(d.base);
  qtr_progress_end(&d.progress);
  if (d.out_of_memory) status = qtr_fail_memory(err, "a request", 0);
done:
  d.ending = true;
  qtr_load_client_close(d.client);
  if (d.arrival) event_free(d.arrival);
  if (d.tick) event_free(d.tick);
  if (d.base) {
    (void)event_base_loop(d.base, EVLOOP_NONBLOCK); /* callbacks that bufferevents had deferred still hold them */
    event_base_free(d.base);
  }
  return status;
}
