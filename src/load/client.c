/* client.c - connections of the client (client.h). One call at a time on each. A connection that was used before may have
 * been closed by the server meanwhile: a call that gets no byte of an answer on such a one is sent again on a new one, once.
 *
 * A bufferevent connects, writes and speaks TLS. Plain answers are read past it, in one system call where it makes two: a
 * client that measures a server on the same machine should take little from it. */
#include "load/client.h"

#include "base/status.h"
#include "server/tls.h"

#include <errno.h>
#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/event.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

#define CONNECT_SECONDS 10 /* of the first, blocking try */

struct qtr_load_connection {
  struct qtr_load_client *client;
  struct qtr_load_connection *prev, *next;
  struct qtr_load_call *call; /* NULL: idle */
  struct bufferevent *bev;
  struct event *readable; /* NULL: the bufferevent reads */
  struct event *timer;
  struct qtr_response response;
  bool connected, used_before, answered, refused;
};

struct qtr_load_client {
  struct event_base *base;
  struct qtr_load_url url;
  struct sockaddr_storage address;
  socklen_t address_len;
  struct qtr_tls *tls; /* NULL: plain */
  char why[160];
  char *authorization; /* "Authorization: Bearer KEY\r\n", or "" */
  double timeout;
  struct qtr_load_connection *first;
};

/* ---- URL ----------------------------------------------------------------------------------------- */

static bool copy_part(char *out, size_t size, const char *from, size_t n) {
  if (n >= size) return false;
  for (size_t i = 0; i < n; i++) { /* it ends in request lines and messages */
    if ((unsigned char)from[i] <= ' ' || (unsigned char)from[i] >= 0x7f) return false;
  }
  memcpy(out, from, n);
  out[n] = 0;
  return true;
}

enum qtr_status qtr_load_url_parse(const char *url, struct qtr_load_url *parts, struct qtr_error *err) {
  char shown[120];
  (void)qtr_printable(url, strlen(url), shown, sizeof shown);
  *parts = (struct qtr_load_url){.port = "80"};
  parts->tls = strncasecmp(url, "https://", 8) == 0;
  if (parts->tls) memcpy(parts->port, "443", 4);
  if (!parts->tls && strncasecmp(url, "http://", 7) != 0)
    return qtr_fail(err, QTR_ERR_ARGUMENT, "%s: a URL begins with http:// or https://", shown);
  const char *at = url + (parts->tls ? 8 : 7), *slash = strchr(at, '/'), *end = slash ? slash : at + strlen(at);
  const char *host = at, *host_end;
  if (*at == '[') { /* IPv6 */
    host = at + 1;
    host_end = memchr(host, ']', (size_t)(end - host));
    if (!host_end) return qtr_fail(err, QTR_ERR_ARGUMENT, "%s: there is no ] behind the address", shown);
    at = host_end + 1;
  } else {
    host_end = memchr(at, ':', (size_t)(end - at));
    if (!host_end) host_end = end;
    at = host_end;
  }
  bool ok = host_end > host && copy_part(parts->host, sizeof parts->host, host, (size_t)(host_end - host)) &&
            !strchr(parts->host, '@');
  if (ok && at < end) {
    ok = *at == ':' && end - at > 1 && copy_part(parts->port, sizeof parts->port, at + 1, (size_t)(end - at - 1)) &&
         strspn(parts->port, "0123456789") == strlen(parts->port) && atoi(parts->port) > 0 && atoi(parts->port) < 65536;
  }
  if (ok && slash) {
    size_t n = strlen(slash);
    while (n > 0 && slash[n - 1] == '/') n--;
    if (n >= 3 && memcmp(slash + n - 3, "/v1", 3) == 0) n -= 3;
    while (n > 0 && slash[n - 1] == '/') n--;
    ok = copy_part(parts->prefix, sizeof parts->prefix, slash, n) && !strpbrk(parts->prefix, "?#");
  }
  return ok ? QTR_OK : qtr_fail(err, QTR_ERR_ARGUMENT, "%s is not a URL such as http://127.0.0.1:8080", shown);
}

/* ---- connections --------------------------------------------------------------------------------- */

static void close_socket(struct qtr_load_connection *c) {
  if (c->readable) event_free(c->readable);
  if (c->bev) bufferevent_free(c->bev);
  c->readable = NULL;
  c->bev = NULL;
}

static void connection_free(struct qtr_load_connection *c) {
  if (c->prev)
    c->prev->next = c->next;
  else
    c->client->first = c->next;
  if (c->next) c->next->prev = c->prev;
  qtr_response_free(&c->response);
  if (c->timer) event_free(c->timer);
  close_socket(c);
  free(c);
}

static void send_call(struct qtr_load_connection *c) {
  qtr_response_begin(&c->response);
  c->answered = false;
  (void)bufferevent_write(c->bev, c->call->request.data, c->call->request.len);
}

/* The call is over; the connection stays when it can be used again. */
static void finish(struct qtr_load_connection *c, enum qtr_load_outcome outcome) {
  struct qtr_load_call *call = c->call;
  bool answer = outcome == QTR_LOAD_OK || outcome == QTR_LOAD_HTTP;
  struct qtr_response kept = c->response; /* `done` may begin another call, on this connection too */
  c->response = (struct qtr_response){0};
  c->call = NULL;
  c->used_before = true;
  (void)event_del(c->timer);
  qtr_buffer_free(&call->request);
  call->connection = NULL;
  if (!answer || !kept.keep_alive) connection_free(c);
  call->done(call, outcome, answer ? &kept : NULL);
  qtr_response_free(&kept);
}

static bool open_socket(struct qtr_load_connection *c);

static void broken(struct qtr_load_connection *c, enum qtr_load_outcome outcome) {
  if (!c->call) {
    connection_free(c); /* idle: the server has had enough of it */
    return;
  }
  if (c->used_before && !c->answered) {
    c->used_before = c->connected = false;
    close_socket(c);
    if (open_socket(c)) {
      send_call(c);
      return;
    }
    outcome = QTR_LOAD_CONNECT;
  }
  finish(c, outcome);
}

static void on_data(void *arg, const char *data, size_t len) {
  struct qtr_load_call *call = arg;
  if (call->event) call->event(call, data, len);
}

/* Bytes of an answer. False: it ended with them, and the connection may be gone. */
static bool take(struct qtr_load_connection *c, const char *data, size_t n, bool more) {
  c->answered = true;
  int state = qtr_response_feed(&c->response, data, n, on_data, c->call);
  if (state == 0) return true;
  if (more) c->response.keep_alive = false;
  finish(c, state < 0 ? QTR_LOAD_MALFORMED : c->response.status == 200 ? QTR_LOAD_OK : QTR_LOAD_HTTP);
  return false;
}

/* The server has closed, and all it sent has been read. */
static void on_end(struct qtr_load_connection *c) {
  if (c->call && c->answered && qtr_response_close(&c->response) == 1) {
    c->response.keep_alive = false;
    finish(c, c->response.status == 200 ? QTR_LOAD_OK : QTR_LOAD_HTTP);
  } else {
    broken(c, QTR_LOAD_CLOSED);
  }
}

static void on_readable(evutil_socket_t fd, short what, void *arg) {
  struct qtr_load_connection *c = arg;
  char part[16384];
  (void)what;
  ssize_t n = recv(fd, part, sizeof part, 0);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (n < 0) {
    broken(c, QTR_LOAD_CLOSED);
  } else if (n == 0) {
    on_end(c);
  } else if (c->call) {
    (void)take(c, part, (size_t)n, false);
  } else { /* nobody asked */
    connection_free(c);
  }
}

static void on_read(struct bufferevent *bev, void *arg) {
  struct qtr_load_connection *c = arg;
  struct evbuffer *in = bufferevent_get_input(bev);
  if (!c->call) {
    connection_free(c);
    return;
  }
  for (bool going = true; going && evbuffer_get_length(in) > 0;) {
    char part[16384];
    int n = evbuffer_remove(in, part, sizeof part);
    if (n <= 0) break;
    going = take(c, part, (size_t)n, evbuffer_get_length(in) > 0);
  }
}

static void on_connected(struct qtr_load_connection *c) {
  int one = 1, fd = bufferevent_getfd(c->bev);
  c->connected = true;
  (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  if (c->client->tls) return;
  c->readable = event_new(c->client->base, fd, EV_READ | EV_PERSIST, on_readable, c);
  if (c->readable && event_add(c->readable, NULL)) {
    event_free(c->readable);
    c->readable = NULL;
  }
  if (c->readable) (void)bufferevent_disable(c->bev, EV_READ);
}

/* Comes behind the read callback: what the server sent before it closed has been read. */
static void on_event(struct bufferevent *bev, short what, void *arg) {
  struct qtr_load_connection *c = arg;
  if (what & BEV_EVENT_CONNECTED) {
    on_connected(c);
    return;
  }
  if ((what & BEV_EVENT_EOF) && c->connected) {
    on_end(c);
    return;
  }
  if (!c->connected && c->client->tls)
    qtr_tls_explain(bev, c->client->why, sizeof c->client->why);
  else if (!c->connected)
    (void)snprintf(c->client->why, sizeof c->client->why, "%s", evutil_socket_error_to_string(EVUTIL_SOCKET_ERROR()));
  broken(c, c->connected ? QTR_LOAD_CLOSED : QTR_LOAD_CONNECT);
}

static void on_timer(evutil_socket_t fd, short what, void *arg) {
  struct qtr_load_connection *c = arg;
  (void)fd;
  (void)what;
  c->used_before = false; /* no second try */
  finish(c, c->refused ? QTR_LOAD_CONNECT : QTR_LOAD_TIMEOUT);
}

/* False: no socket, or no way there. */
static bool open_socket(struct qtr_load_connection *c) {
  struct qtr_load_client *client = c->client;
  c->bev = client->tls ? qtr_tls_connect(client->tls, client->base, client->url.host)
                       : bufferevent_socket_new(client->base, -1, BEV_OPT_CLOSE_ON_FREE | BEV_OPT_DEFER_CALLBACKS);
  if (!c->bev) return false;
  bufferevent_setcb(c->bev, on_read, NULL, on_event, c);
  (void)bufferevent_enable(c->bev, EV_READ | EV_WRITE);
  return bufferevent_socket_connect(c->bev, (struct sockaddr *)&client->address, (int)client->address_len) == 0;
}

static struct timeval interval(double seconds) {
  time_t whole = (time_t)seconds;
  return (struct timeval){.tv_sec = whole, .tv_usec = (suseconds_t)((seconds - (double)whole) * 1e6)};
}

bool qtr_load_client_ask(struct qtr_load_client *client, struct qtr_load_call *call) {
  struct qtr_load_connection *c = client->first;
  bool six = strchr(client->url.host, ':') != NULL;
  call->request = (struct qtr_buffer){0};
  qtr_buffer_printf(&call->request, "%s %s%s HTTP/1.1\r\nHost: %s%s%s:%s\r\nUser-Agent: quattuor/%s\r\n%s", call->method,
                    client->url.prefix, call->path, six ? "[" : "", client->url.host, six ? "]" : "", client->url.port,
                    qtr_version(), client->authorization);
  if (call->body) {
    qtr_buffer_printf(&call->request, "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n", call->body_len);
    qtr_buffer_put(&call->request, call->body, call->body_len);
  } else {
    qtr_buffer_puts(&call->request, "\r\n");
  }
  while (c && c->call) c = c->next;
  bool ready = c != NULL;
  if (!c && (c = calloc(1, sizeof *c))) {
    c->client = client;
    c->next = client->first;
    if (c->next) c->next->prev = c;
    client->first = c;
    c->timer = event_new(client->base, -1, 0, on_timer, c);
    ready = c->timer && open_socket(c);
  }
  if (!c || !c->timer || call->request.failed) {
    if (c) connection_free(c);
    qtr_buffer_free(&call->request);
    return false;
  }
  c->call = call;
  call->connection = c;
  c->refused = !ready;
  struct timeval wait = interval(ready ? client->timeout : 0);
  (void)event_add(c->timer, &wait);
  if (ready) send_call(c);
  return true;
}

const char *qtr_load_client_why(const struct qtr_load_client *client) { return client->why; }

void qtr_load_client_cut(struct qtr_load_client *client) {
  for (struct qtr_load_connection *c = client->first, *next; c; c = next) {
    next = c->next;
    if (c->call) finish(c, QTR_LOAD_CUT);
  }
}

/* ---- the client ---------------------------------------------------------------------------------- */

/* The first of the name's addresses that takes a connection. */
static enum qtr_status find_server(struct qtr_load_client *client, struct qtr_error *err) {
  const struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM};
  struct addrinfo *found = NULL;
  int failed = getaddrinfo(client->url.host, client->url.port, &hints, &found);
  if (failed) return qtr_fail(err, QTR_ERR_IO, "%s: %s", client->url.host, gai_strerror(failed));
  int why = 0;
  bool there = false;
  for (const struct addrinfo *a = found; a && !there; a = a->ai_next) {
    const struct timeval patience = {.tv_sec = CONNECT_SECONDS};
    int fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) {
      why = errno;
      continue;
    }
    (void)setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience); /* bounds connect, too */
    there = connect(fd, a->ai_addr, a->ai_addrlen) == 0;
    why = errno;
    (void)close(fd);
    if (there) {
      memcpy(&client->address, a->ai_addr, a->ai_addrlen);
      client->address_len = a->ai_addrlen;
    }
  }
  freeaddrinfo(found);
  if (there) return QTR_OK;
  return qtr_fail(err, QTR_ERR_IO, "no server at %s port %s: %s", client->url.host, client->url.port, strerror(why));
}

enum qtr_status qtr_load_client_open(struct event_base *base, const char *url, const char *ca, const char *key,
                                     double timeout, struct qtr_load_client **out, struct qtr_error *err) {
  struct qtr_buffer authorization = {0};
  struct qtr_load_client *client = calloc(1, sizeof *client);
  *out = NULL;
  if (!client) return qtr_fail_memory(err, "a client", sizeof *client);
  client->base = base;
  client->timeout = timeout;
  enum qtr_status status = qtr_load_url_parse(url, &client->url, err);
  if (!status && client->url.tls) status = qtr_tls_open_client(ca, &client->tls, err);
  if (key) qtr_buffer_printf(&authorization, "Authorization: Bearer %s\r\n", key);
  if (!key) qtr_buffer_puts(&authorization, "");
  client->authorization = authorization.data;
  if (!status && (authorization.failed || !authorization.data)) status = qtr_fail_memory(err, "a key", 0);
  if (!status && key && strpbrk(key, "\r\n")) status = qtr_fail(err, QTR_ERR_ARGUMENT, "the API key has more than one line");
  if (!status) status = find_server(client, err);
  if (status) {
    qtr_load_client_close(client);
    return status;
  }
  *out = client;
  return QTR_OK;
}

void qtr_load_client_close(struct qtr_load_client *client) {
  if (!client) return;
  qtr_load_client_cut(client);
  while (client->first) connection_free(client->first);
  qtr_tls_close(client->tls);
  free(client->authorization);
  free(client);
}
