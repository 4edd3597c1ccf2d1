/* job.c - the life of one request for text: prepared by a worker, queued in the engine, answered whole or as a stream, or
 * ended by its client's leaving, a timeout or a shutdown. A job lives until its client has its answer (or is gone) and the
 * engine has sent the last event of every completion. Everything but the preparation runs in the event loop. */
#include "base/checked.h"
#include "base/clock.h"
#include "server/server_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define WAITING_BODIES 64 /* as much memory as so many of the largest bodies need is what may wait for a worker */

static void on_prepared(struct qtr_task *task);

/* ---- beginning and end --------------------------------------------------------------------------- */

static void job_free(struct qtr_job *job) {
  if (job->prev)
    job->prev->next = job->next;
  else
    job->server->jobs = job->next;
  if (job->next) job->next->prev = job->prev;
  for (size_t i = 0; job->run && i < job->request.n_prompts; i++) {
    free(job->run[i].token);
    free(job->run[i].echo);
    free(job->run[i].offset);
    for (int k = 0; k < 4; k++) qtr_buffer_free(&job->run[i].lp[k]);
  }
  for (int32_t i = 0; i < job->n_choices; i++) {
    qtr_buffer_free(&job->choice[i].text);
    for (int k = 0; k < 4; k++) qtr_buffer_free(&job->choice[i].lp[k]);
    qtr_tool_parser_free(&job->choice[i].tool);
  }
  qtr_masks_unref(job->masks);
  free(job->run);
  free(job->choice);
  free(job->body);
  qtr_buffer_free(&job->result);
  qtr_buffer_free(&job->chunk_head);
  qtr_api_request_free(&job->request);
  free(job);
}

/* The answer is complete, or nobody waits for one: the log's line, and the end when the engine is through with it, too. */
static void job_answered(struct qtr_job *job, int status) {
  struct qtr_server *s = job->server;
  if (!job->answered) {
    job->answered = true;
    if (job->conn) qtr_http_set_user(job->conn, NULL);
    job->conn = NULL;
    double seconds = qtr_now() - job->t_arrival;
    if (job->generates && job->n_prompt_tokens > 0) {
      qtr_histogram_add(&s->metrics.whole, seconds);
      qtr_histogram_add(&s->metrics.prompt_tokens, (double)job->n_prompt_tokens);
      qtr_histogram_add(&s->metrics.output_tokens, (double)job->n_output_tokens);
    }
    qtr_log(s, &(struct qtr_log_line){.peer = job->peer,
                                      .method = job->method,
                                      .path = job->path,
                                      .request_id = job->request_id,
                                      .status = status,
                                      .seconds = seconds,
                                      .job = job->generates ? job : NULL});
  }
  if (job->prepared && job->n_live == 0) job_free(job);
}

static void answer_error(struct qtr_job *job, const struct qtr_api_error *err, const char *headers) {
  if (job->conn) qtr_send_error(job->server, job->conn, err, job->request_id, headers);
  job_answered(job, job->conn ? err->http : 499);
}

/* Takes the rest of a job out of the engine; the last events still come. A job that a worker prepares has nothing there. */
static void cancel_runs(struct qtr_job *job) {
  bool any = false;
  if (!job->prepared) return;
  for (size_t i = 0; job->run && i < job->request.n_prompts; i++) {
    if (job->run[i].id == 0) continue;
    (void)qtr_engine_cancel(job->server->engine, job->run[i].id, NULL); /* NOT_FOUND: its end is on the way */
    any = true;
  }
  if (any) qtr_runner_kick(job->server->runner);
}

void qtr_job_start(struct qtr_server *s, struct qtr_http_conn *conn, enum qtr_api_kind kind) {
  const struct qtr_http_head *head = qtr_http_head(conn);
  struct qtr_api_error err;
  char request_id[72];
  qtr_request_id(s, conn, request_id);
  const char *death = qtr_runner_death(s->runner), *headers = NULL;
  bool ok = true, generates = kind == QTR_API_CHAT || kind == QTR_API_COMPLETION;
  if (s->draining) {
    ok = qtr_api_fail(&err, 503, NULL, "the server is shutting down");
  } else if (death) {
    ok = qtr_api_fail(&err, 503, NULL, "%.500s", death);
  } else if (s->n_waiting_bytes > WAITING_BODIES * QTR_MAX(s->o->max_body, (size_t)1 << 20)) {
    ok = qtr_api_fail(&err, 429, NULL, "too much waits to be read; try again in a moment");
    headers = "Retry-After: 1\r\n";
    s->metrics.rejected++;
  } else if (generates && s->n_live >= s->o->max_running + s->o->max_queue) {
    ok = qtr_api_fail(&err, 429, NULL, "the queue is full: %d completions run or wait; try again in a moment", s->n_live);
    headers = "Retry-After: 1\r\n";
    s->metrics.rejected++;
  }
  struct qtr_job *job = ok ? calloc(1, sizeof *job) : NULL;
  if (ok && !job) ok = qtr_api_fail(&err, 503, NULL, "out of memory");
  if (!ok) {
    qtr_send_error(s, conn, &err, request_id, headers);
    qtr_log_conn(s, conn, request_id, err.http);
    return;
  }
  job->task = (struct qtr_task){.work = qtr_job_prepare, .done = on_prepared};
  job->kind = kind;
  job->generates = generates;
  job->chat = kind == QTR_API_CHAT;
  job->server = s;
  job->conn = conn;
  job->t_arrival = job->t_written = qtr_now();
  job->created = (int64_t)time(NULL);
  (void)snprintf(job->method, sizeof job->method, "%.*s", (int)head->method.len, head->method.data);
  (void)snprintf(job->path, sizeof job->path, "%.*s", (int)head->path.len, head->path.data);
  (void)snprintf(job->peer, sizeof job->peer, "%s", qtr_http_peer(conn));
  memcpy(job->request_id, request_id, sizeof request_id);
  (void)snprintf(job->id, sizeof job->id, "%s-%016llx", job->chat ? "chatcmpl" : "cmpl", (unsigned long long)s->next_id++);
  job->body = qtr_http_take_body(conn, &job->body_len);
  s->n_waiting_bytes += job->body_len;
  job->next = s->jobs;
  if (job->next) job->next->prev = job;
  s->jobs = job;
  qtr_http_set_user(conn, job);
  qtr_runner_submit(s->runner, &job->task);
}

/* ---- queueing ------------------------------------------------------------------------------------ */

static bool make_choices(struct qtr_job *job) {
  int32_t n = job->request.options.n, n_choices = n * (int32_t)job->request.n_prompts;
  job->choice = calloc((size_t)n_choices, sizeof *job->choice);
  if (!job->choice) return false;
  job->n_choices = n_choices;
  for (int32_t i = 0; i < job->n_choices; i++) {
    struct qtr_choice *c = &job->choice[i];
    c->index = i;
    c->prompt = i / n;
    c->tool.format = job->server->tool_format;
    c->tool.id_seed = (job->server->next_id++ << 8) ^ (uint64_t)job->created << 40;
  }
  return true;
}

/* Queues every prompt, or none. */
static bool add_runs(struct qtr_job *job, struct qtr_api_error *err) {
  struct qtr_server *s = job->server;
  for (size_t i = 0; i < job->request.n_prompts; i++) {
    struct qtr_run *run = &job->run[i];
    struct qtr_request_options options = job->request.options;
    struct qtr_error why;
    options.prompt_token = run->token;
    options.n_prompt_token = run->n_token;
    options.user = run;
    struct qtr_constraint constraint;
    if (job->masks) {
      constraint = qtr_masks_constraint(job->masks);
      options.constraint = &constraint;
    }
    if (qtr_engine_add(s->engine, &options, &run->id, &why)) {
      qtr_api_error_from(err, &why, job->chat ? "messages" : "prompt");
      return false;
    }
    run->n_live = options.n;
    job->n_live += options.n;
    s->n_live += options.n;
    job->n_prompt_tokens += (int64_t)run->n_token;
    if (run->offset) qtr_reply_first_token(job, run->token[0], run->lp);
    free(run->token);
    run->token = NULL;
  }
  return true;
}

static void write_stream(struct qtr_job *job, const struct qtr_buffer *out) {
  if (!job->conn || out->len == 0) return;
  qtr_http_write(job->conn, out->data, out->len);
  job->t_written = qtr_now();
}

static void begin_stream(struct qtr_job *job) {
  char headers[512], line[640];
  (void)snprintf(line, sizeof line, "%sCache-Control: no-cache\r\nX-Accel-Buffering: no\r\n",
                 qtr_common_headers(job->server, job->request_id, headers, sizeof headers));
  job->streaming = true;
  qtr_reply_begin_stream(job);
  qtr_http_begin(job->conn, 200, "text/event-stream; charset=utf-8", line);
  struct qtr_buffer out = {0};
  for (int32_t i = 0; i < job->n_choices; i++) {
    struct qtr_choice *c = &job->choice[i];
    if (job->chat) qtr_reply_chunk(job, c, &(struct qtr_chunk){.role = true}, &out);
    const struct qtr_run *run = &job->run[c->prompt];
    if (run->n_echo > 0 && !run->offset) { /* else it goes out with the log-probabilities, when they are there */
      qtr_reply_chunk(job, c, &(struct qtr_chunk){.text = run->echo, .len = run->n_echo}, &out);
    }
  }
  write_stream(job, &out);
  qtr_buffer_free(&out);
}

static void answer_tokens(struct qtr_job *job) {
  if (job->result.failed) {
    struct qtr_api_error err;
    (void)qtr_api_fail(&err, 503, NULL, "out of memory");
    answer_error(job, &err, NULL);
    return;
  }
  if (job->conn) qtr_send_json(job->server, job->conn, 200, job->request_id, &job->result);
  job_answered(job, job->conn ? 200 : 499);
}

static void on_prepared(struct qtr_task *task) {
  struct qtr_job *job = (struct qtr_job *)(void *)task;
  struct qtr_server *s = job->server;
  struct qtr_api_error err = job->error;
  const char *headers = NULL;
  job->prepared = true;
  s->n_waiting_bytes -= job->body_len;
  if (job->answered) { /* the client left meanwhile, or the server stopped */
    job_free(job);
    return;
  }
  bool ok = err.http == 0;
  if (ok && !job->generates) {
    answer_tokens(job);
    return;
  }
  if (ok && (s->draining || !job->conn)) ok = qtr_api_fail(&err, 503, NULL, "the server is shutting down");
  if (ok) {
    int wanted = job->request.options.n * (int)job->request.n_prompts, most = s->o->max_running + s->o->max_queue;
    if (wanted > most) {
      ok = qtr_api_fail(&err, 400, "n", "the request asks for %d completions; this server takes at most %d", wanted, most);
    } else if (s->n_live + wanted > most) {
      ok = qtr_api_fail(&err, 429, NULL, "the queue is full: %d completions run or wait; try again in a moment", s->n_live);
      headers = "Retry-After: 1\r\n";
      s->metrics.rejected++;
    }
  }
  if (ok && !make_choices(job)) ok = qtr_api_fail(&err, 503, NULL, "out of memory");
  if (ok) {
    for (int32_t i = 0; i < job->n_choices; i++) {
      struct qtr_choice *c = &job->choice[i];
      const struct qtr_run *run = &job->run[c->prompt];
      c->n_text = run->n_echo > 0 ? qtr_count_characters(run->echo, run->n_echo) : 0;
      if (run->n_echo > 0 && !job->request.stream) qtr_buffer_put(&c->text, run->echo, run->n_echo);
    }
    ok = add_runs(job, &err);
  }
  if (!ok) {
    cancel_runs(job);
    answer_error(job, &err, headers);
    return;
  }
  qtr_api_request_forget(&job->request);
  if (job->request.stream) begin_stream(job);
  qtr_runner_kick(s->runner);
}

/* ---- events -------------------------------------------------------------------------------------- */

/* Ends a job that could not be completed. In a stream the client gets an error event, then a broken end. */
static void fail_job(struct qtr_job *job, int http, const char *why) {
  struct qtr_api_error err;
  (void)qtr_api_fail(&err, http, NULL, "%s", why);
  cancel_runs(job);
  if (!job->streaming) {
    answer_error(job, &err, NULL);
    return;
  }
  struct qtr_buffer out = {0};
  qtr_buffer_puts(&out, "data: ");
  qtr_api_error_write(&err, &out);
  qtr_buffer_puts(&out, "\n\n");
  write_stream(job, &out);
  qtr_buffer_free(&out);
  if (job->conn) qtr_http_cut(job->conn);
  job_answered(job, http);
}

static void finish_job(struct qtr_job *job) {
  struct qtr_buffer out = {0};
  if (job->streaming) {
    if (job->request.include_usage) qtr_reply_usage_chunk(job, &out);
    qtr_buffer_puts(&out, "data: [DONE]\n\n");
    write_stream(job, &out);
    qtr_http_end(job->conn);
  } else {
    qtr_reply_final(job, &out);
    if (out.failed) {
      qtr_buffer_free(&out);
      fail_job(job, 503, "out of memory");
      return;
    }
    qtr_send_json(job->server, job->conn, 200, job->request_id, &out);
  }
  qtr_buffer_free(&out);
  job_answered(job, 200);
}

/* Text and log-probabilities of one event into the answer. */
static void take_text(struct qtr_job *job, struct qtr_choice *c, const struct qtr_event *e) {
  bool last = e->finish != QTR_FINISH_NONE;
  const struct qtr_event *lp = e->has_logprob && job->request.logprobs ? e : NULL;
  struct qtr_buffer content = {0};
  const char *text = e->text;
  size_t len = e->text_len, n_before = c->tool.n_calls;
  if (job->use_tools) {
    qtr_tool_feed(&c->tool, e->text, e->text_len, last, &content);
    text = content.data ? content.data : "";
    len = content.len;
  }
  if (job->streaming) {
    struct qtr_buffer *out = &job->server->chunk;
    struct qtr_chunk chunk = {.text = text,
                              .len = len,
                              .logprob = lp,
                              .first_call = n_before,
                              .n_calls = c->tool.n_calls - n_before,
                              .finish = last ? qtr_reply_finish(c) : NULL};
    out->len = 0;
    out->failed = false;
    if (len > 0 || lp || chunk.n_calls > 0 || last) qtr_reply_chunk(job, c, &chunk, out);
    write_stream(job, out);
  } else {
    qtr_buffer_put(&c->text, text, len);
    if (lp) qtr_reply_logprobs(job, lp, c->n_text, c->lp);
  }
  c->n_text += qtr_count_characters(text, len);
  qtr_buffer_free(&content);
}

/* The prompt's text with its log-probabilities, which are complete when the first token comes. */
static void stream_echo(struct qtr_job *job, struct qtr_choice *c, const struct qtr_run *run) {
  struct qtr_buffer out = {0};
  qtr_reply_chunk(job, c, &(struct qtr_chunk){.text = run->echo, .len = run->n_echo, .lp = run->lp}, &out);
  write_stream(job, &out);
  qtr_buffer_free(&out);
}

void qtr_job_event(struct qtr_server *s, const struct qtr_mail *mail) {
  struct qtr_event event = mail->event;
  const struct qtr_event *e = &event;
  struct qtr_run *run = e->user;
  struct qtr_job *job = run->job;
  if (job->request.no_output && event.token >= 0 &&
      event.prompt_index == 0) { /* max_tokens 0: the one token it took to read the prompt is nobody's */
    event.token = -1;
    event.text = "";
    event.text_len = 0;
    event.has_logprob = false;
    event.finish = QTR_FINISH_LENGTH;
  }
  if (e->prompt_index > 0) {
    if (!job->answered) qtr_reply_logprobs(job, e, (size_t)run->offset[e->prompt_index], run->lp);
    return;
  }
  struct qtr_choice *c = &job->choice[run->prompt * job->request.options.n + e->index];
  bool last = e->finish != QTR_FINISH_NONE;
  if (e->token >= 0) {
    if (job->t_first <= 0) {
      job->t_first = mail->time;
      qtr_histogram_add(&s->metrics.first_token, mail->time - job->t_arrival);
    }
    if (c->n_tokens++ > 0) qtr_histogram_add(&s->metrics.per_token, mail->time - c->t_last);
    c->t_last = mail->time;
    job->n_output_tokens++;
  }
  if (!c->begun) {
    c->begun = true;
    if (e->index == 0) job->n_cached_tokens += e->n_cached_tokens;
    if (job->streaming && run->offset) stream_echo(job, c, run);
  }
  if (!job->answered && (e->finish == QTR_FINISH_NONE || e->finish == QTR_FINISH_STOP || e->finish == QTR_FINISH_LENGTH)) {
    c->finish = e->finish;
    take_text(job, c, e);
  }
  if (!last) return;
  c->ended = true;
  c->finish = e->finish;
  enum qtr_outcome outcome = e->finish == QTR_FINISH_LENGTH      ? QTR_OUT_LENGTH
                             : e->finish == QTR_FINISH_CANCELLED ? QTR_OUT_ABORT
                             : e->finish == QTR_FINISH_ERROR     ? QTR_OUT_ERROR
                             : c->tool.n_calls > 0               ? QTR_OUT_TOOLS
                                                                 : QTR_OUT_STOP;
  s->metrics.outcome[outcome]++;
  s->n_live--;
  job->n_live--;
  if (--run->n_live == 0) run->id = 0;
  if (job->answered) {
    if (job->n_live == 0) job_free(job);
  } else if (e->finish == QTR_FINISH_ERROR) {
    const char *death = qtr_runner_death(s->runner);
    fail_job(job, death ? 503 : 500,
             death ? death
                   : "the completion failed: the server ran out of memory, the model gave no finite number, or "
                     "nothing could follow within the response format");
  } else if (job->n_live == 0) {
    finish_job(job);
  }
}

/* ---- ends from outside --------------------------------------------------------------------------- */

void qtr_job_gone(struct qtr_job *job) {
  job->conn = NULL;
  cancel_runs(job);
  job_answered(job, 499);
}

void qtr_job_cut(struct qtr_job *job, int http, const char *why) {
  if (!job->answered) fail_job(job, http, why);
}

void qtr_job_tick(struct qtr_job *job, double now) {
  const struct qtr_server_options *o = job->server->o;
  if (job->answered) return;
  if (o->timeout > 0 && now - job->t_arrival > o->timeout) {
    char why[96];
    (void)snprintf(why, sizeof why, "the request took longer than %g seconds", o->timeout);
    fail_job(job, 504, why);
  } else if (job->streaming && o->ping > 0 && now - job->t_written > o->ping) {
    struct qtr_buffer out = {0};
    qtr_buffer_puts(&out, ": keep-alive\n\n");
    write_stream(job, &out);
    qtr_buffer_free(&out);
  }
}
