/* http.h - HTTP/1.1 over libevent's bufferevents: connections, limits, keep-alive, pipelining, chunked replies. Knows
 * nothing of routes. Everything runs in the thread of the event base; no function blocks.
 *
 * A client that closes its side while an answer is outstanding counts as gone (also when it only closed its sending half:
 * the two look the same), and the handler is told at once. */
#ifndef QTR_SERVER_HTTP_H
#define QTR_SERVER_HTTP_H

#include "quattuor/quattuor.h"
#include "server/http_parse.h"

struct event_base;
struct qtr_http;
struct qtr_tls;
struct qtr_http_conn;

struct qtr_http_limits {
  int max_connections;  /* more are told 503 and closed */
  size_t max_body;      /* bytes */
  double head_seconds;  /* from the first byte of a request to its last header */
  double body_seconds;  /* from there to the end of the body */
  double idle_seconds;  /* between requests */
  double write_seconds; /* without progress while output waits */
  size_t max_pending;   /* bytes of output a client may leave unread */
  struct qtr_tls *tls;  /* NULL: plain; outlives the server */
};

struct qtr_http_handlers {
  /* A request is complete. It must be answered now or later: qtr_http_reply, or qtr_http_begin … end. */
  void (*request)(struct qtr_http_conn *conn, void *arg);
  /* The request cannot be read: answer it; the connection closes after that. */
  void (*refuse)(struct qtr_http_conn *conn, int status, const char *why, void *arg);
  /* The client went away before its answer was complete; `user` as set. The connection is freed after this. */
  void (*gone)(struct qtr_http_conn *conn, void *user, void *arg);
  void *arg;
};

enum qtr_status qtr_http_open(struct event_base *base, const char *host, int port, const struct qtr_http_limits *limits,
                              const struct qtr_http_handlers *handlers, struct qtr_http **http, struct qtr_error *err);
int qtr_http_port(const struct qtr_http *http); /* the real one when 0 was asked for */
int qtr_http_connections(const struct qtr_http *http);
/* No new connections; idle ones close now, others after their answer. */
void qtr_http_drain(struct qtr_http *http);
/* Closes everything at once, without telling the handlers. NULL is allowed. */
void qtr_http_close(struct qtr_http *http);

/* ---- the request; valid until the answer is complete ---- */
const struct qtr_http_head *qtr_http_head(const struct qtr_http_conn *conn);
/* The body, malloc'ed, NUL-terminated; from now on the caller's. */
char *qtr_http_take_body(struct qtr_http_conn *conn, size_t *len);
const char *qtr_http_peer(const struct qtr_http_conn *conn); /* "127.0.0.1" */
void qtr_http_set_user(struct qtr_http_conn *conn, void *user);

/* ---- the answer. `headers`: complete lines with CRLF, or NULL ---- */
void qtr_http_reply(struct qtr_http_conn *conn, int status, const char *type, const char *headers, const char *body,
                    size_t len);
void qtr_http_begin(struct qtr_http_conn *conn, int status, const char *type, const char *headers);
void qtr_http_write(struct qtr_http_conn *conn, const char *data, size_t len);
void qtr_http_end(struct qtr_http_conn *conn);
/* Ends a begun answer as broken off: the client sees that the last chunk is missing. */
void qtr_http_cut(struct qtr_http_conn *conn);

#endif
