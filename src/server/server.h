/* server.h - an engine on a network: OpenAI's HTTP API, health and metrics (docs/server.md). */
#ifndef QTR_SERVER_SERVER_H
#define QTR_SERVER_SERVER_H

#include "server/request_parse.h"

struct qtr_server_options {
  const char *host; /* numeric address or name; "127.0.0.1" */
  int port;         /* 0 = any free one */
  const char *model_name;
  char *const *api_key; /* (n_api_keys) any of them opens; none = open to all */
  size_t n_api_keys;
  int max_running; /* completions that run at once, for the limit below: the engine's max_num_seqs */
  int max_queue;   /* completions that may wait besides; more are told 429 */
  int max_connections;
  size_t max_body; /* bytes */
  double timeout;  /* seconds a request may take; 0 = no limit */
  double grace;    /* seconds that running requests get after SIGTERM */
  double ping;     /* seconds of silence before a comment is sent into a stream; 0 = none */
  bool log_json, log_off;
  const char *cors_origin;        /* NULL = no CORS headers */
  const char *tls_cert, *tls_key; /* PEM files; both or none */
  struct qtr_api_defaults defaults;
};
void qtr_server_options_init(struct qtr_server_options *options);

/* Serves until SIGTERM or SIGINT; then refuses new requests, lets running ones finish for `grace` seconds, cuts the rest and
 * returns. A second signal cuts at once. Says on stderr where it listens. Strings are borrowed. */
enum qtr_status qtr_server_run(struct qtr_engine *engine, const struct qtr_server_options *options, struct qtr_error *err);

/* generation_config.json of a model directory, where there is one: temperature, top_p, top_k, min_p, repetition_penalty,
 * max_new_tokens. Values out of range are left out. */
void qtr_server_defaults_read(const char *model_dir, struct qtr_api_defaults *defaults);

#endif
