/* response.h - HTTP/1.1 answers from bytes as they come, with server-sent events taken apart. Pure: no sockets. What it
 * reads comes from somebody else's server: every length is bounded, and nothing is believed. */
#ifndef QTR_LOAD_RESPONSE_H
#define QTR_LOAD_RESPONSE_H

#include "server/buffer.h"
#include "server/http_parse.h"

struct qtr_response {
  int status;              /* of the final answer; 0 until its first line is read */
  bool keep_alive, events; /* events: text/event-stream */
  bool whole;              /* complete */
  /* private */
  int state, n_interim;
  size_t n_head;
  bool has_length, chunked;
  uint64_t left;
  struct qtr_http_chunked decoder;
  struct qtr_buffer line; /* the head's or the stream's line that is being read */
  struct qtr_buffer data; /* the event's data lines; without events the body, its first 64 KiB */
};

/* Called for each event of a stream with its data, NUL-terminated. */
typedef void qtr_response_event(void *arg, const char *data, size_t len);

void qtr_response_begin(struct qtr_response *r); /* for the next answer, buffers kept; also on {0} */
void qtr_response_free(struct qtr_response *r);
/* Takes data[0 … n). Returns 1 when the answer is complete (what follows it in data is an error of the server: there was one
 * request), 0 when it goes on, -1 when it is malformed. */
int qtr_response_feed(struct qtr_response *r, const char *data, size_t n, qtr_response_event *event, void *arg);
/* The connection has closed: 1 when that ends the answer properly, else -1. */
int qtr_response_close(struct qtr_response *r);

#endif
