/* client.h - an HTTP/1.1 client of one server on libevent: many calls at once, connections kept and used again, answers that
 * stream. Everything runs in the thread of the event base. */
#ifndef QTR_LOAD_CLIENT_H
#define QTR_LOAD_CLIENT_H

#include "load/response.h"
#include "quattuor/quattuor.h"

struct event_base;
struct qtr_load_client;
struct qtr_load_connection;

enum qtr_load_outcome {
  QTR_LOAD_OK,
  QTR_LOAD_CONNECT,   /* no connection */
  QTR_LOAD_CLOSED,    /* it closed before the answer was complete */
  QTR_LOAD_TIMEOUT,   /* the call took too long */
  QTR_LOAD_MALFORMED, /* the answer is not HTTP, or not what was asked for */
  QTR_LOAD_HTTP,      /* another status than 200 */
  QTR_LOAD_SAID,      /* an error in the midst of a stream */
  QTR_LOAD_EMPTY,     /* a complete answer without a token */
  QTR_LOAD_CUT,       /* we stopped first */
  QTR_LOAD_OUTCOMES
};

/* One request and its answer. The caller's; it must live until `done`, which is called once, from the loop. */
struct qtr_load_call {
  const char *method, *path; /* path: behind the prefix of the URL, "/v1/models" */
  const char *body;          /* (body_len) JSON, or NULL; copied */
  size_t body_len;
  void (*event)(struct qtr_load_call *call, const char *data, size_t len); /* of an event stream */
  /* response: status, and in `data` the body when it is no event stream; NULL without an answer */
  void (*done)(struct qtr_load_call *call, enum qtr_load_outcome outcome, const struct qtr_response *response);
  struct qtr_load_connection *connection; /* private */
  struct qtr_buffer request;
};

/* url: http[s]://HOST[:PORT][/PREFIX], with or without /v1 at its end. ca: a file of certificates to trust, NULL = those of
 * the system. Looks the name up and tries which of its addresses answers (this blocks). key: NULL = none. timeout: seconds a
 * call may take. */
enum qtr_status qtr_load_client_open(struct event_base *base, const char *url, const char *ca, const char *key,
                                     double timeout, struct qtr_load_client **client, struct qtr_error *err);
/* Ends what runs with QTR_LOAD_CUT. NULL is allowed. */
void qtr_load_client_close(struct qtr_load_client *client);
/* False: out of memory, and `done` will not be called. */
bool qtr_load_client_ask(struct qtr_load_client *client, struct qtr_load_call *call);
/* Why the last connection failed; "" = not known. */
const char *qtr_load_client_why(const struct qtr_load_client *client);
/* Every call that runs ends with QTR_LOAD_CUT. */
void qtr_load_client_cut(struct qtr_load_client *client);

/* The parts of a URL, for the client and its tests; host without brackets. */
struct qtr_load_url {
  char host[256], port[8], prefix[512];
  bool tls;
};
enum qtr_status qtr_load_url_parse(const char *url, struct qtr_load_url *parts, struct qtr_error *err);

#endif
