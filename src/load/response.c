/* response.c - the states of an answer: status line, header lines, body (response.h; RFC 9112, and the event streams of
 * WHATWG HTML 9.2). */
#include "load/response.h"

#include <string.h>
#include <strings.h>

#define MAX_HEAD ((size_t)64 << 10)
#define MAX_LINE ((size_t)1 << 20) /* of a stream; also of an event's data */
#define MAX_BODY ((size_t)64 << 10)
#define MAX_INTERIM 8 /* 1xx answers before the real one */

enum { STATUS_LINE, HEADER_LINES, BODY, COMPLETE };

void qtr_response_begin(struct qtr_response *r) {
  struct qtr_buffer line = r->line, data = r->data;
  *r = (struct qtr_response){.line = line, .data = data};
  r->line.len = r->data.len = 0;
}

void qtr_response_free(struct qtr_response *r) {
  qtr_buffer_free(&r->line);
  qtr_buffer_free(&r->data);
}

/* ---- head ---------------------------------------------------------------------------------------- */

static int read_status(struct qtr_response *r, const char *line, size_t n) {
  /* "HTTP/1.1 200 OK" */
  if (n < 12 || memcmp(line, "HTTP/1.", 7) != 0 || (line[7] != '0' && line[7] != '1') || line[8] != ' ') return -1;
  int status = 0;
  for (int i = 9; i < 12; i++) {
    if (line[i] < '0' || line[i] > '9') return -1;
    status = status * 10 + (line[i] - '0');
  }
  if (status < 100 || status > 599 || (n > 12 && line[12] != ' ')) return -1;
  r->status = status;
  r->keep_alive = line[7] == '1';
  r->state = HEADER_LINES;
  return 0;
}

static bool begins(const char *text, size_t n, const char *with) {
  size_t k = strlen(with);
  return n >= k && strncasecmp(text, with, k) == 0;
}

static int read_header(struct qtr_response *r, const char *line, size_t n) {
  const char *colon = memchr(line, ':', n);
  if (!colon || colon == line) return -1;
  size_t name = (size_t)(colon - line);
  const char *value = colon + 1, *end = line + n;
  while (value < end && (*value == ' ' || *value == '\t')) value++;
  while (end > value && (end[-1] == ' ' || end[-1] == '\t')) end--;
  size_t len = (size_t)(end - value);
  if (name == 14 && begins(line, n, "content-length")) {
    uint64_t length = 0;
    if (len == 0 || len > 18) return -1;
    for (size_t i = 0; i < len; i++) {
      if (value[i] < '0' || value[i] > '9') return -1;
      length = length * 10 + (uint64_t)(value[i] - '0');
    }
    if (r->has_length && r->left != length) return -1;
    r->has_length = true;
    r->left = length;
  } else if (name == 17 && begins(line, n, "transfer-encoding")) {
    if (len != 7 || !begins(value, len, "chunked")) return -1;
    r->chunked = true;
  } else if (name == 10 && begins(line, n, "connection")) {
    if (begins(value, len, "close")) r->keep_alive = false;
    if (begins(value, len, "keep-alive")) r->keep_alive = true;
  } else if (name == 12 && begins(line, n, "content-type")) {
    r->events = begins(value, len, "text/event-stream");
  }
  return 0;
}

static int end_head(struct qtr_response *r) {
  if (r->status < 200) { /* 100 Continue and its like: the answer is yet to come */
    if (r->status == 101 || ++r->n_interim > MAX_INTERIM) return -1;
    r->state = STATUS_LINE;
    r->status = 0;
    r->has_length = r->chunked = r->events = false;
    r->left = 0;
    return 0;
  }
  if (r->chunked) r->has_length = false;
  r->state = BODY;
  if (r->status == 204 || r->status == 304 || (r->has_length && r->left == 0)) r->state = COMPLETE;
  if (!r->chunked && !r->has_length) r->keep_alive = false;
  return 0;
}

/* ---- body ---------------------------------------------------------------------------------------- */

static int stream_line(struct qtr_response *r, qtr_response_event *event, void *arg) {
  const char *line = r->line.data ? r->line.data : "";
  size_t n = r->line.len;
  if (n > 0 && line[n - 1] == '\r') n--;
  if (n == 0) { /* an empty line ends an event */
    if (r->data.len > 0) event(arg, r->data.data, r->data.len);
    r->data.len = 0;
  } else if (n >= 5 && memcmp(line, "data:", 5) == 0) {
    size_t skip = n > 5 && line[5] == ' ' ? 6 : 5;
    if (r->data.len + n > MAX_LINE) return -1;
    if (r->data.len > 0) qtr_buffer_put(&r->data, "\n", 1);
    qtr_buffer_put(&r->data, line + skip, n - skip);
  } /* comments and other fields mean nothing here */
  r->line.len = 0;
  return r->data.failed ? -1 : 0;
}

static int body(struct qtr_response *r, const char *data, size_t n, qtr_response_event *event, void *arg) {
  if (!r->events || r->status != 200) {
    size_t room = MAX_BODY - r->data.len;
    qtr_buffer_put(&r->data, data, n < room ? n : room);
    return r->data.failed ? -1 : 0;
  }
  while (n > 0) {
    const char *newline = memchr(data, '\n', n);
    size_t part = newline ? (size_t)(newline - data) : n;
    if (r->line.len + part > MAX_LINE) return -1;
    qtr_buffer_put(&r->line, data, part);
    if (r->line.failed) return -1;
    if (!newline) return 0;
    if (stream_line(r, event, arg) < 0) return -1;
    data += part + 1;
    n -= part + 1;
  }
  return 0;
}

static int feed_body(struct qtr_response *r, const char **data, size_t *n, qtr_response_event *event, void *arg) {
  if (r->chunked) {
    char out[4096];
    size_t used = 0, n_out = 0;
    int done = qtr_http_dechunk(&r->decoder, *data, *n < sizeof out ? *n : sizeof out, &used, out, &n_out);
    if (done < 0 || body(r, out, n_out, event, arg) < 0) return -1;
    *data += used;
    *n -= used;
    if (done > 0) r->state = COMPLETE;
    return 0;
  }
  size_t part = r->has_length && r->left < *n ? (size_t)r->left : *n;
  if (body(r, *data, part, event, arg) < 0) return -1;
  *data += part;
  *n -= part;
  if (r->has_length && (r->left -= part) == 0) r->state = COMPLETE;
  return 0;
}

/* ---- both ---------------------------------------------------------------------------------------- */

static int feed_head(struct qtr_response *r, const char **data, size_t *n) {
  const char *newline = memchr(*data, '\n', *n);
  size_t part = newline ? (size_t)(newline - *data) : *n;
  if (r->n_head + part + 1 > MAX_HEAD) return -1;
  r->n_head += part + 1;
  qtr_buffer_put(&r->line, *data, part);
  if (r->line.failed) return -1;
  *data += part + (newline != NULL);
  *n -= part + (newline != NULL);
  if (!newline) return 0;
  const char *line = r->line.data ? r->line.data : "";
  size_t len = r->line.len;
  if (len > 0 && line[len - 1] == '\r') len--;
  r->line.len = 0;
  if (r->state == STATUS_LINE) return read_status(r, line, len);
  return len == 0 ? end_head(r) : read_header(r, line, len);
}

int qtr_response_feed(struct qtr_response *r, const char *data, size_t n, qtr_response_event *event, void *arg) {
  while (n > 0 && r->state != COMPLETE) {
    int bad = r->state == BODY ? feed_body(r, &data, &n, event, arg) : feed_head(r, &data, &n);
    if (bad < 0) return -1;
  }
  if (r->state != COMPLETE) return 0;
  if (n > 0) r->keep_alive = false; /* more than was asked for: nothing on this connection can be trusted */
  r->whole = true;
  return 1;
}

int qtr_response_close(struct qtr_response *r) {
  bool ends = r->state == BODY && !r->chunked && !r->has_length;
  r->whole = r->whole || ends;
  return r->whole ? 1 : -1;
}
