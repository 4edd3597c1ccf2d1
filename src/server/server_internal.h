/* server_internal.h - the inside of the server, shared by its files. Everything here belongs to the event loop's thread; a
 * job's `task.work` alone runs in a worker, and until its `task.done` (`prepared`) the loop touches nothing of what struct
 * qtr_job marks as the worker's, and the worker writes nothing else. */
#ifndef QTR_SERVER_SERVER_INTERNAL_H
#define QTR_SERVER_SERVER_INTERNAL_H

#include "server/constraint.h"
#include "server/http.h"
#include "server/metrics.h"
#include "server/request_parse.h"
#include "server/runner.h"
#include "server/server.h"
#include "server/tool_calls.h"

struct event;

struct qtr_server {
  const struct qtr_server_options *o;
  struct qtr_engine *engine;
  struct qtr_engine_info info;
  struct event_base *base;
  struct qtr_http *http;
  struct qtr_tls *tls; /* NULL: plain */
  struct qtr_runner *runner;
  struct event *mail, *tick, *signal[2];
  struct qtr_request_metrics metrics;
  struct qtr_job *jobs;    /* all, newest first */
  int n_live;              /* completions in the engine */
  size_t n_waiting_bytes;  /* of bodies that wait for a worker */
  struct qtr_buffer chunk; /* the one that is being written; kept, so that a token allocates nothing */
  int64_t created;         /* of the model, for its list: when the server started */
  double t_start;
  double t_cut;   /* when a shutdown cuts what still runs */
  double t_close; /* when it closes the connections whose answers have not left by then; 0 = nothing is cut yet */
  bool draining;
  bool tools_rendered; /* the chat template shows tools to the model */
  enum qtr_tool_format tool_format;
  struct qtr_mask_cache *mask_cache;
  struct qtr_vocabulary *vocabulary; /* NULL: a model without a tokenizer */
  uint64_t next_id;
};

/* ---- a request for text (job.c) and its forms (reply.c) ------------------------------------------- */

struct qtr_choice { /* one completion */
  int32_t index, prompt;
  enum qtr_finish finish;
  bool ended, begun; /* begun: its first chunk is out */
  int32_t n_tokens;
  double t_last;
  size_t n_text; /* characters so far, echo included: offsets of log-probabilities */
  size_t n_calls_sent;
  struct qtr_buffer text;  /* not streamed: all of it */
  struct qtr_buffer lp[4]; /* not streamed: items of the log-probabilities' arrays */
  bool any_lp;
  struct qtr_tool_parser tool;
};

struct qtr_run { /* one prompt: a request of the engine */
  struct qtr_job *job;
  uint64_t id; /* 0 = not added, or ended */
  int32_t prompt, n_live;
  int32_t *token; /* (n_token) */
  size_t n_token;
  char *echo; /* (n_echo) the prompt's text when it is wanted back */
  size_t n_echo;
  int32_t *offset; /* (n_token) where each token's text begins, in characters; NULL: its log-probabilities are not wanted */
  struct qtr_buffer lp[4]; /* items of the log-probabilities of the prompt, for all its completions */
};

struct qtr_job {
  struct qtr_task task; /* first */
  enum qtr_api_kind kind;
  struct qtr_server *server;
  struct qtr_http_conn *conn; /* NULL: the client is gone */
  struct qtr_job *prev, *next;
  char method[12], path[64], peer[64], request_id[72];
  char id[48];
  int64_t created;
  double t_arrival, t_first, t_written;
  bool generates; /* a chat or a completion: the engine has work with it */
  bool chat, streaming, prepared, answered;
  struct qtr_buffer chunk_head; /* of a stream: what every chunk begins with */
  struct qtr_choice *choice;    /* (n_choices) */
  int32_t n_choices, n_live;
  int64_t n_prompt_tokens, n_cached_tokens, n_output_tokens;

  /* The worker's until `prepared`. */
  char *body;
  size_t body_len;
  bool use_tools;
  struct qtr_api_request request;
  struct qtr_buffer result; /* of tokenize and detokenize */
  struct qtr_api_error error;
  struct qtr_masks *masks; /* of a constrained answer; NULL = none */
  struct qtr_run *run;     /* (request.n_prompts) */
};

/* A complete request of this kind has come: takes its body and answers it, now or later. */
void qtr_job_start(struct qtr_server *server, struct qtr_http_conn *conn, enum qtr_api_kind kind);
void qtr_job_event(struct qtr_server *server, const struct qtr_mail *mail);
void qtr_job_gone(struct qtr_job *job);             /* the client went away */
void qtr_job_tick(struct qtr_job *job, double now); /* timeouts and pings; may free the job */
/* Ends a job that still runs with an error for its client. */
void qtr_job_cut(struct qtr_job *job, int http, const char *why);

/* In a worker: parses the body, renders, tokenizes. Sets job->error on failure. */
void qtr_job_prepare(struct qtr_task *task);

/* Finds out, by rendering a probe, whether the chat template shows tools and how the model writes calls. */
void qtr_tools_probe(struct qtr_server *server);

void qtr_reply_final(const struct qtr_job *job, struct qtr_buffer *out);
/* A chunk of a stream with its "data: " and empty line: text, log-probabilities of one event, calls, the end. */
struct qtr_chunk {
  const char *text;
  size_t len;
  const struct qtr_event *logprob; /* NULL = none */
  const struct qtr_buffer *lp;     /* or items that are made already; NULL = none */
  size_t first_call, n_calls;      /* of choice->tool */
  bool role;
  const char *finish;
};
/* Before the first chunk. */
void qtr_reply_begin_stream(struct qtr_job *job);
void qtr_reply_chunk(const struct qtr_job *job, const struct qtr_choice *choice, const struct qtr_chunk *chunk,
                     struct qtr_buffer *out);
void qtr_reply_usage_chunk(const struct qtr_job *job, struct qtr_buffer *out);
/* Appends an event's log-probabilities to lp[0 … 3] (chat: lp[0] only). text_at: offset of the token's text. */
void qtr_reply_logprobs(const struct qtr_job *job, const struct qtr_event *event, size_t text_at, struct qtr_buffer lp[4]);
/* The first token of a prompt, which has none. */
void qtr_reply_first_token(const struct qtr_job *job, int32_t token, struct qtr_buffer lp[4]);
size_t qtr_count_characters(const char *text, size_t len);     /* of UTF-8 */
const char *qtr_reply_finish(const struct qtr_choice *choice); /* "stop", "length", "tool_calls" */

/* ---- the rest of the routes and the log (routes.c, log.c) ------------------------------------------ */

struct qtr_route {
  const char *path; /* ending in '/': a prefix with something behind it */
  bool post, open;  /* open: without a key */
  bool page;        /* for people: not part of the API that /openapi.json describes */
  int (*answer)(struct qtr_server *s, struct qtr_http_conn *conn, const char *request_id); /* the status, 0 = a job has it */
};
const struct qtr_route *qtr_routes(size_t *n);

void qtr_openapi_write(const struct qtr_server *server, struct qtr_buffer *out); /* openapi.c */
void qtr_route(struct qtr_http_conn *conn, void *server);
void qtr_route_refuse(struct qtr_http_conn *conn, int status, const char *why, void *server);
/* Answers with an error; extra: header lines or NULL. */
void qtr_send_error(struct qtr_server *server, struct qtr_http_conn *conn, const struct qtr_api_error *err,
                    const char *request_id, const char *extra);
void qtr_send_json(struct qtr_server *server, struct qtr_http_conn *conn, int status, const char *request_id,
                   const struct qtr_buffer *body);
/* The client's own X-Request-Id when it is a decent one, else a new one. */
void qtr_request_id(struct qtr_server *server, const struct qtr_http_conn *conn, char id[72]);
/* Header lines every answer of ours has, into out; returns out. */
const char *qtr_common_headers(const struct qtr_server *server, const char *request_id, char *out, size_t n);

struct qtr_log_line {
  const char *peer, *method, *path, *request_id;
  int status; /* 499: the client went away */
  double seconds;
  const struct qtr_job *job; /* NULL = not a completion */
};
void qtr_log(struct qtr_server *server, const struct qtr_log_line *line);
void qtr_log_conn(struct qtr_server *server, const struct qtr_http_conn *conn, const char *request_id, int status);

#endif
