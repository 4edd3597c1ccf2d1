/* http.c - connections (http.h). A connection is always in one state, and one timer per connection ends each state that
 * depends on the client:
 *
 *   HEAD -> BODY -> ANSWER -> FLUSH -> HEAD …          (FLUSH: the answer is complete, its bytes are not all gone)
 *                                   -> LINGER -> freed  (our side is shut; what still comes is thrown away for a moment, so
 *                                                        that a client in the midst of sending gets to read the answer)
 *
 * Callbacks of bufferevents are deferred: nothing here is entered again from within itself.
 *
 * What is written in one turn of the loop is gathered and leaves at the turn's end: one system call for each connection and
 * step of the engine, however many pieces of an answer the step made. Only what the socket does not take goes through the
 * bufferevent, whose queue would cost two more calls each time (the descriptor watched for writing, and no more). */
#include "server/http.h"

#include "base/checked.h"
#include "base/status.h"
#include "server/buffer.h"
#include "server/tls.h"

#include <arpa/inet.h>
#include <errno.h>
#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/event.h>
#include <event2/listener.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/queue.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define LINGER_SECONDS 2.0
#define BODIES_AT_ONCE 64 /* as much memory as so many of the largest bodies need is what all bodies together may take */
#define READ_AHEAD ((size_t)64 << 10) /* of what a client sends while it is answered */

enum state { STATE_HEAD, STATE_BODY, STATE_ANSWER, STATE_FLUSH, STATE_LINGER };

struct qtr_http_conn {
  struct qtr_http *http;
  struct qtr_http_conn *prev, *next;
  LIST_ENTRY(qtr_http_conn) in_unsent;
  struct bufferevent *bev;
  struct event *timer;
  enum state state;
  struct qtr_http_head head; /* slices into head_data */
  char *head_data;
  char *body; /* (n_body) of body_capacity, with room for a NUL */
  size_t n_body, body_capacity;
  struct qtr_http_chunked chunked;
  struct qtr_buffer out; /* of this turn; what of it waits for the socket is in the bufferevent */
  bool unsent;           /* in the list of those that `send` has to look at */
  bool began, close_after, eof, streaming_chunked, is_head;
  void *user;
  char peer[64];
};

struct qtr_http {
  struct event_base *base;
  struct evconnlistener *listener;
  struct event *resume; /* accepts again after descriptors ran out */
  struct event *send;   /* behind the callbacks of this turn */
  LIST_HEAD(, qtr_http_conn) unsent;
  struct qtr_http_limits limits;
  struct qtr_http_handlers on;
  struct qtr_http_conn *first;
  int n_connections, port;
  size_t n_body_bytes; /* of all bodies that are being read */
  bool draining;
};

static void read_more(struct qtr_http_conn *c);

/* ---- life of a connection ------------------------------------------------------------------------ */

static void set_timer(struct qtr_http_conn *c, double seconds) {
  struct timeval tv = {.tv_sec = (time_t)seconds, .tv_usec = (suseconds_t)((seconds - (double)(time_t)seconds) * 1e6)};
  if (seconds > 0)
    (void)event_add(c->timer, &tv);
  else
    (void)event_del(c->timer);
}

static void forget_request(struct qtr_http_conn *c) {
  c->http->n_body_bytes -= c->body_capacity;
  free(c->head_data);
  free(c->body);
  qtr_buffer_free(&c->out); /* all of it is with the socket by now, or nobody wants it any more */
  c->head_data = c->body = NULL;
  c->n_body = c->body_capacity = 0;
  c->head = (struct qtr_http_head){0};
  c->chunked = (struct qtr_http_chunked){0};
  c->began = c->streaming_chunked = c->is_head = false;
  c->user = NULL;
}

static void conn_free(struct qtr_http_conn *c) {
  struct qtr_http *http = c->http;
  if (c->unsent) LIST_REMOVE(c, in_unsent);
  if (c->prev)
    c->prev->next = c->next;
  else
    http->first = c->next;
  if (c->next) c->next->prev = c->prev;
  http->n_connections--;
  forget_request(c);
  if (c->timer) event_free(c->timer);
  if (c->bev) bufferevent_free(c->bev);
  free(c);
}

/* The client is lost, or as good as. */
static void conn_gone(struct qtr_http_conn *c) {
  if (c->state == STATE_ANSWER) {
    void *user = c->user;
    c->state = STATE_LINGER; /* what the handler still writes goes nowhere */
    c->http->on.gone(c, user, c->http->on.arg);
  }
  conn_free(c);
}

/* Everything is written: shut our side, read the rest away for a moment. */
static void linger(struct qtr_http_conn *c) {
  forget_request(c);
  c->state = STATE_LINGER;
  if (c->http->limits.tls) qtr_tls_finish(c->bev);
  (void)shutdown(bufferevent_getfd(c->bev), SHUT_WR);
  (void)evbuffer_drain(bufferevent_get_input(c->bev), SIZE_MAX);
  bufferevent_setwatermark(c->bev, EV_READ, 0, 0);
  (void)bufferevent_enable(c->bev, EV_READ);
  set_timer(c, LINGER_SECONDS);
}

static size_t pending(const struct qtr_http_conn *c) {
  return c->out.len + evbuffer_get_length(bufferevent_get_output(c->bev));
}

/* Sees to it that `send_turn` looks at this connection when the callbacks of this turn are through. */
static void want_send(struct qtr_http_conn *c) {
  struct qtr_http *http = c->http;
  if (c->unsent) return;
  if (LIST_EMPTY(&http->unsent)) event_active(http->send, EV_TIMEOUT, 0);
  LIST_INSERT_HEAD(&http->unsent, c, in_unsent);
  c->unsent = true;
}

/* The answer is complete; go on when its bytes are gone. */
static void finish_answer(struct qtr_http_conn *c) {
  c->state = STATE_FLUSH;
  set_timer(c, 0);
  want_send(c);
}

static void on_write(struct bufferevent *bev, void *arg) {
  struct qtr_http_conn *c = arg;
  (void)bev;
  if (c->state != STATE_FLUSH || pending(c) > 0) return;
  if (c->eof) {
    conn_free(c);
  } else if (c->close_after || c->http->draining) {
    linger(c);
  } else {
    forget_request(c);
    c->state = STATE_HEAD;
    bufferevent_setwatermark(c->bev, EV_READ, 0, QTR_HTTP_MAX_HEAD + READ_AHEAD);
    set_timer(c, c->http->limits.idle_seconds);
    read_more(c);
  }
}

/* Gives the socket what this turn wrote. An error is left to the bufferevent, which meets it again with the rest. */
static void send_one(struct qtr_http_conn *c) {
  struct evbuffer *queue = bufferevent_get_output(c->bev);
  size_t sent = 0;
  if (!c->http->limits.tls && c->out.len > 0 && evbuffer_get_length(queue) == 0) {
    ssize_t n = send(bufferevent_getfd(c->bev), c->out.data, c->out.len, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n > 0) sent = (size_t)n;
  }
  bool lost = c->out.failed; /* out of memory: a piece is missing */
  if (sent < c->out.len && evbuffer_add(queue, c->out.data + sent, c->out.len - sent)) lost = true;
  c->out.len = 0;
  if (c->out.capacity > READ_AHEAD) qtr_buffer_free(&c->out); /* a large answer's; a stream's is used again */
  if (lost)
    conn_gone(c);
  else
    on_write(c->bev, c);
}

static void send_turn(evutil_socket_t fd, short what, void *arg) {
  struct qtr_http *http = arg;
  (void)fd;
  (void)what;
  for (struct qtr_http_conn *c; (c = LIST_FIRST(&http->unsent)) != NULL;) {
    LIST_REMOVE(c, in_unsent);
    c->unsent = false;
    send_one(c);
  }
}

static void on_event(struct bufferevent *bev, short what, void *arg) {
  struct qtr_http_conn *c = arg;
  if (what & BEV_EVENT_CONNECTED) return; /* a TLS handshake is done: what follows is HTTP */
  if ((what & BEV_EVENT_EOF) && c->state == STATE_FLUSH && pending(c) > 0) {
    c->eof = true; /* it asked, closed its half and waits for the answer */
    (void)bufferevent_disable(bev, EV_READ);
    return;
  }
  conn_gone(c); /* EOF, error, or no progress in writing */
}

static void refuse(struct qtr_http_conn *c, int status, const char *why) {
  c->close_after = true;
  c->state = STATE_ANSWER;
  set_timer(c, 0);
  c->http->on.refuse(c, status, why, c->http->on.arg);
}

static void on_timer(evutil_socket_t fd, short what, void *arg) {
  struct qtr_http_conn *c = arg;
  (void)fd;
  (void)what;
  bool begun = c->state == STATE_BODY || (c->state == STATE_HEAD && evbuffer_get_length(bufferevent_get_input(c->bev)) > 0);
  if (begun)
    refuse(c, 408, "the request was not complete in time");
  else
    conn_gone(c);
}

/* ---- reading ------------------------------------------------------------------------------------- */

static const char *explain(int status) {
  switch (status) {
    case 413: return "the body is too large";
    case 414: return "the request target is too long";
    case 503: return "too much is being sent to this server at once; try again in a moment";
    case 417: return "only Expect: 100-continue is known";
    case 431: return "the headers are too many or too long";
    case 501: return "this transfer encoding is not known";
    case 505: return "only HTTP/1.0 and HTTP/1.1 are spoken here";
    default: return "malformed HTTP request";
  }
}

/* True when the head was read; false: more is needed, or it was refused. */
static bool read_head(struct qtr_http_conn *c) {
  struct evbuffer *in = bufferevent_get_input(c->bev);
  size_t n = evbuffer_get_length(in);
  if (n == 0) return false;
  if (n > QTR_HTTP_MAX_HEAD) n = QTR_HTTP_MAX_HEAD;
  if (n < QTR_HTTP_MAX_HEAD) { /* do not parse again and again what drips in */
    struct evbuffer_ptr end = evbuffer_search(in, "\r\n\r\n", 4, NULL);
    struct evbuffer_ptr bad = evbuffer_search(in, "\n\n", 2, NULL);
    if (end.pos < 0 && bad.pos < 0) {
      if (!c->began) { /* the first bytes of a request: from now on its own time runs */
        c->began = true;
        set_timer(c, c->http->limits.head_seconds);
      }
      /* a first line that is no HTTP is answered at once, so that a lost client learns it */
      if (evbuffer_search(in, "\n", 1, NULL).pos < 0) return false;
    }
  }
  const char *data = (const char *)evbuffer_pullup(in, (ev_ssize_t)n);
  long used = data ? qtr_http_parse_head(data, n, &c->head) : -400;
  if (used == 0 && n < QTR_HTTP_MAX_HEAD) return false;
  if (used > 0 && !(c->head_data = malloc((size_t)used))) used = -503;
  if (used > 0) { /* the slices must outlive the event buffer: the same head again, in our copy */
    memcpy(c->head_data, data, (size_t)used);
    (void)qtr_http_parse_head(c->head_data, (size_t)used, &c->head);
    (void)evbuffer_drain(in, (size_t)used);
  } else {
    c->head = (struct qtr_http_head){0};
    refuse(c, used == 0 ? 431 : (int)-used, explain(used == 0 ? 431 : (int)-used));
    return false;
  }
  c->began = false;
  c->is_head = qtr_http_is(c->head.method, "HEAD");
  if (!c->head.keep_alive) c->close_after = true;
  return true;
}

static bool body_reserve(struct qtr_http_conn *c, size_t n) {
  if (c->body_capacity > n) return true;
  size_t wanted = c->body_capacity > 0 ? c->body_capacity * 2 : 4096;
  while (wanted <= n) wanted *= 2; /* n <= max_body */
  size_t others = c->http->n_body_bytes - c->body_capacity;
  if (others + wanted > BODIES_AT_ONCE * QTR_MAX(c->http->limits.max_body, (size_t)1 << 20)) return false;
  char *more = realloc(c->body, wanted);
  if (!more) return false;
  c->body = more;
  c->body_capacity = wanted;
  c->http->n_body_bytes = others + wanted;
  return true;
}

/* Moves what has come into the body. 1: complete, 0: more is needed, else minus a status. */
static int read_body(struct qtr_http_conn *c) {
  struct evbuffer *in = bufferevent_get_input(c->bev);
  size_t most = c->http->limits.max_body;
  if (!c->head.chunked) {
    size_t left = (size_t)c->head.content_length - c->n_body, n = evbuffer_get_length(in);
    if (n > left) n = left;
    if (!body_reserve(c, c->n_body + n)) return -503;
    (void)evbuffer_remove(in, c->body + c->n_body, n);
    c->n_body += n;
    return c->n_body == c->head.content_length;
  }
  for (;;) {
    size_t n = evbuffer_get_contiguous_space(in), used, out;
    if (n == 0) return 0;
    if (n > 65536) n = 65536;
    if (!body_reserve(c, c->n_body + n)) return -503;
    const char *data = (const char *)evbuffer_pullup(in, (ev_ssize_t)n);
    int done = data ? qtr_http_dechunk(&c->chunked, data, n, &used, c->body + c->n_body, &out) : -503;
    if (done < 0) return done;
    c->n_body += out;
    (void)evbuffer_drain(in, used);
    if (c->n_body > most) return -413;
    if (done) return 1;
  }
}

static void read_more(struct qtr_http_conn *c) {
  if (c->state == STATE_LINGER) {
    (void)evbuffer_drain(bufferevent_get_input(c->bev), SIZE_MAX);
    return;
  }
  if (c->state == STATE_HEAD) {
    if (!read_head(c)) return;
    c->state = STATE_BODY;
    set_timer(c, c->http->limits.body_seconds);
    bufferevent_setwatermark(c->bev, EV_READ, 0, 4 * READ_AHEAD);
    if (c->head.content_length > c->http->limits.max_body) {
      refuse(c, 413, explain(413));
      return;
    }
    if (c->head.expect_continue && (c->head.chunked || c->head.content_length > 0) &&
        evbuffer_get_length(bufferevent_get_input(c->bev)) == 0) {
      qtr_buffer_puts(&c->out, "HTTP/1.1 100 Continue\r\n\r\n");
      want_send(c);
    }
  }
  if (c->state != STATE_BODY) return;
  int done = read_body(c);
  if (done < 0) {
    refuse(c, -done, explain(-done));
  } else if (done) {
    if (!body_reserve(c, c->n_body + 1)) {
      refuse(c, 503, explain(503));
      return;
    }
    c->body[c->n_body] = 0;
    c->state = STATE_ANSWER;
    set_timer(c, 0);
    bufferevent_setwatermark(c->bev, EV_READ, 0, READ_AHEAD);
    c->http->on.request(c, c->http->on.arg);
  }
}

static void on_read(struct bufferevent *bev, void *arg) {
  (void)bev;
  read_more(arg);
}

/* ---- accepting ----------------------------------------------------------------------------------- */

static void on_accept(struct evconnlistener *listener, evutil_socket_t fd, struct sockaddr *address, int len, void *arg) {
  static const char busy[] =
      "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Type: application/json\r\n"
      "Content-Length: 91\r\n\r\n"
      "{\"error\":{\"message\":\"too many connections\",\"type\":\"server_error\",\"param\":null,\"code\":null}}";
  struct qtr_http *http = arg;
  (void)listener;
  if (http->n_connections >= http->limits.max_connections) {
    if (!http->limits.tls) (void)send(fd, busy, sizeof busy - 1, MSG_NOSIGNAL | MSG_DONTWAIT);
    (void)evutil_closesocket(fd);
    return;
  }
  struct qtr_http_conn *c = calloc(1, sizeof *c);
  if (!c) {
    (void)evutil_closesocket(fd);
    return;
  }
  int yes = 1;
  (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
  c->http = http;
  c->next = http->first;
  if (c->next) c->next->prev = c;
  http->first = c;
  http->n_connections++;
  if (getnameinfo(address, (socklen_t)len, c->peer, sizeof c->peer, NULL, 0, NI_NUMERICHOST)) {
    (void)snprintf(c->peer, sizeof c->peer, "?");
  }
  c->bev = http->limits.tls ? qtr_tls_accept(http->limits.tls, http->base, fd)
                            : bufferevent_socket_new(http->base, fd, BEV_OPT_CLOSE_ON_FREE | BEV_OPT_DEFER_CALLBACKS);
  c->timer = evtimer_new(http->base, on_timer, c);
  if (!c->bev || !c->timer) {
    if (!c->bev) (void)evutil_closesocket(fd);
    conn_free(c);
    return;
  }
  bufferevent_setcb(c->bev, on_read, on_write, on_event, c);
  bufferevent_setwatermark(c->bev, EV_READ, 0, QTR_HTTP_MAX_HEAD + READ_AHEAD);
  double w = http->limits.write_seconds;
  struct timeval tv = {.tv_sec = (time_t)w, .tv_usec = (suseconds_t)((w - (double)(time_t)w) * 1e6)};
  (void)bufferevent_set_timeouts(c->bev, NULL, w > 0 ? &tv : NULL);
  (void)bufferevent_enable(c->bev, EV_READ | EV_WRITE);
  set_timer(c, http->limits.head_seconds);
}

/* Out of descriptors, most likely: without a pause the listener would call here again at once, for ever. */
static void on_accept_error(struct evconnlistener *listener, void *arg) {
  struct qtr_http *http = arg;
  (void)evconnlistener_disable(listener);
  (void)event_add(http->resume, &(struct timeval){.tv_usec = 100000});
}

static void on_resume(evutil_socket_t fd, short what, void *arg) {
  struct qtr_http *http = arg;
  (void)fd;
  (void)what;
  if (http->listener) (void)evconnlistener_enable(http->listener);
}

enum qtr_status qtr_http_open(struct event_base *base, const char *host, int port, const struct qtr_http_limits *limits,
                              const struct qtr_http_handlers *handlers, struct qtr_http **out, struct qtr_error *err) {
  char service[16];
  (void)snprintf(service, sizeof service, "%d", port);
  const struct addrinfo hints = {
      .ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
  struct addrinfo *address = NULL;
  enum qtr_status status = QTR_OK;
  *out = NULL;
  struct qtr_http *http = calloc(1, sizeof *http);
  if (!http) return qtr_fail_memory(err, "the HTTP server", sizeof *http);
  http->base = base;
  http->limits = *limits;
  http->on = *handlers;
  int wrong = getaddrinfo(host, service, &hints, &address);
  if (wrong) {
    status = qtr_fail(err, QTR_ERR_ARGUMENT, "--host \"%.100s\": %s; write an address of this machine, such as 127.0.0.1",
                      host, gai_strerror(wrong));
    goto done;
  }
  LIST_INIT(&http->unsent);
  http->resume = evtimer_new(base, on_resume, http);
  http->send = evtimer_new(base, send_turn, http);
  http->listener =
      evconnlistener_new_bind(base, on_accept, http, LEV_OPT_CLOSE_ON_FREE | LEV_OPT_REUSEABLE | LEV_OPT_CLOSE_ON_EXEC, 1024,
                              address->ai_addr, (int)address->ai_addrlen);
  if (!http->resume || !http->send || !http->listener) {
    status = errno == EADDRINUSE
                 ? qtr_fail(err, QTR_ERR_IO,
                            "port %d of %.100s is taken: stop what uses it, or choose another with --port N", port, host)
                 : qtr_fail(err, QTR_ERR_IO, "cannot listen on %.100s port %d: %s", host, port, strerror(errno));
    goto done;
  }
  evconnlistener_set_error_cb(http->listener, on_accept_error);
  struct sockaddr_storage bound = {0};
  socklen_t len = sizeof bound;
  http->port = port;
  if (getsockname(evconnlistener_get_fd(http->listener), (struct sockaddr *)&bound, &len) == 0) {
    if (bound.ss_family == AF_INET) http->port = ntohs(((struct sockaddr_in *)(void *)&bound)->sin_port);
    if (bound.ss_family == AF_INET6) http->port = ntohs(((struct sockaddr_in6 *)(void *)&bound)->sin6_port);
  }
done:
  if (address) freeaddrinfo(address);
  if (status)
    qtr_http_close(http);
  else
    *out = http;
  return status;
}

int qtr_http_port(const struct qtr_http *http) { return http->port; }
int qtr_http_connections(const struct qtr_http *http) { return http->n_connections; }

void qtr_http_drain(struct qtr_http *http) {
  http->draining = true;
  if (http->listener) evconnlistener_free(http->listener);
  http->listener = NULL;
  for (struct qtr_http_conn *c = http->first, *next; c; c = next) {
    next = c->next;
    if (c->state == STATE_HEAD && evbuffer_get_length(bufferevent_get_input(c->bev)) == 0) conn_free(c);
  }
}

void qtr_http_close(struct qtr_http *http) {
  if (!http) return;
  for (struct qtr_http_conn *c = http->first, *next; c; c = next) {
    next = c->next;
    conn_free(c);
  }
  if (http->listener) evconnlistener_free(http->listener);
  if (http->resume) event_free(http->resume);
  if (http->send) event_free(http->send);
  free(http);
}

/* ---- request and answer -------------------------------------------------------------------------- */

const struct qtr_http_head *qtr_http_head(const struct qtr_http_conn *c) { return &c->head; }
const char *qtr_http_peer(const struct qtr_http_conn *c) { return c->peer; }
void qtr_http_set_user(struct qtr_http_conn *c, void *user) { c->user = user; }

char *qtr_http_take_body(struct qtr_http_conn *c, size_t *len) {
  char *body = c->body;
  *len = c->n_body;
  c->http->n_body_bytes -= c->body_capacity;
  c->body = NULL;
  c->n_body = c->body_capacity = 0;
  return body;
}

static const char *reason(int status) {
  switch (status) {
    case 200: return "OK";
    case 204: return "No Content";
    case 304: return "Not Modified";
    case 400: return "Bad Request";
    case 401: return "Unauthorized";
    case 404: return "Not Found";
    case 405: return "Method Not Allowed";
    case 408: return "Request Timeout";
    case 413: return "Content Too Large";
    case 414: return "URI Too Long";
    case 415: return "Unsupported Media Type";
    case 417: return "Expectation Failed";
    case 429: return "Too Many Requests";
    case 431: return "Request Header Fields Too Large";
    case 500: return "Internal Server Error";
    case 501: return "Not Implemented";
    case 503: return "Service Unavailable";
    case 504: return "Gateway Timeout";
    case 505: return "HTTP Version Not Supported";
    default: return "Unknown";
  }
}

/* RFC 9110, 6.6.1: who has a clock says what it shows. */
static const char *date(char *out, size_t size) {
  time_t now = time(NULL);
  struct tm tm;
  if (!gmtime_r(&now, &tm) || strftime(out, size, "%a, %d %b %Y %H:%M:%S GMT", &tm) == 0) *out = 0;
  return out;
}

static void write_head(struct qtr_http_conn *c, int status, const char *type, const char *headers) {
  char now[64];
  if (c->http->draining) c->close_after = true;
  qtr_buffer_printf(&c->out, "HTTP/1.1 %d %s\r\nServer: quattuor/%s\r\nDate: %s\r\n%s%s%s%s%s", status, reason(status),
                    qtr_version(), date(now, sizeof now), type ? "Content-Type: " : "", type ? type : "", type ? "\r\n" : "",
                    headers ? headers : "",
                    c->close_after       ? "Connection: close\r\n"
                    : c->head.minor == 0 ? "Connection: keep-alive\r\n"
                                         : "");
}

void qtr_http_reply(struct qtr_http_conn *c, int status, const char *type, const char *headers, const char *body,
                    size_t len) {
  if (c->state != STATE_ANSWER) return;
  write_head(c, status, type, headers);
  if (status != 204 && status != 304) qtr_buffer_printf(&c->out, "Content-Length: %zu\r\n", len);
  qtr_buffer_puts(&c->out, "\r\n");
  if (!c->is_head) qtr_buffer_put(&c->out, body, len);
  finish_answer(c);
}

void qtr_http_begin(struct qtr_http_conn *c, int status, const char *type, const char *headers) {
  if (c->state != STATE_ANSWER) return;
  c->streaming_chunked = c->head.minor >= 1;
  if (!c->streaming_chunked) c->close_after = true; /* the end of the connection is the end of the answer */
  write_head(c, status, type, headers);
  qtr_buffer_puts(&c->out, c->streaming_chunked ? "Transfer-Encoding: chunked\r\n\r\n" : "\r\n");
  want_send(c);
}

void qtr_http_write(struct qtr_http_conn *c, const char *data, size_t len) {
  if (c->state != STATE_ANSWER || len == 0 || c->is_head) return;
  if (pending(c) > c->http->limits.max_pending) { /* a reader that does not read */
    if (!c->eof) bufferevent_trigger_event(c->bev, BEV_EVENT_ERROR | BEV_EVENT_WRITING, BEV_TRIG_DEFER_CALLBACKS);
    c->eof = true;
    return;
  }
  if (c->streaming_chunked) qtr_buffer_hex(&c->out, len);
  if (c->streaming_chunked) qtr_buffer_put(&c->out, "\r\n", 2);
  qtr_buffer_put(&c->out, data, len);
  if (c->streaming_chunked) qtr_buffer_put(&c->out, "\r\n", 2);
  want_send(c);
}

void qtr_http_end(struct qtr_http_conn *c) {
  if (c->state != STATE_ANSWER) return;
  if (c->streaming_chunked && !c->is_head) qtr_buffer_puts(&c->out, "0\r\n\r\n");
  finish_answer(c);
}

void qtr_http_cut(struct qtr_http_conn *c) {
  if (c->state != STATE_ANSWER) return;
  c->close_after = true;
  finish_answer(c);
}
