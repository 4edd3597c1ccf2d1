/* test_server_http.c - connections under clients that do not behave: slow, silent, greedy, gone. The limits are short where
 * a test is about them. */
#include "http_client.h"
#include "server/http.h"

#include <event2/event.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

struct fixture {
  struct event_base *base;
  struct qtr_http *http;
  struct event *command;
  int pipe[2]; /* 'q' ends, 'd' drains */
  pthread_t thread;
  int port;
  atomic_int n_requests, n_gone, n_refused;
  struct event *turn; /* of /pieces */
  struct qtr_http_conn *pieces;
  atomic_int n_pieces;
  atomic_bool reading; /* the client has begun to: the second half may come */
};

/* ---- the server's side: /echo gives the body back, /flood writes for ever, /hang never answers, /pieces writes numbered
 * lines, five in each turn of the loop ---- */

#define N_PIECES 1000 /* 34 MB in all; half of it is more than sockets hold */
#define N_LINES 512   /* of a piece */
#define PIECE "%06d a line of sixty-four bytes, of which there are a thousand.\n"

static void on_turn(evutil_socket_t fd, short what, void *arg) {
  struct fixture *f = arg;
  (void)fd;
  (void)what;
  if (atomic_load(&f->n_pieces) == N_PIECES / 2 && !atomic_load(&f->reading)) {
    (void)event_add(f->turn, &(struct timeval){.tv_usec = 1000});
    return;
  }
  for (int i = 0; i < 5; i++) {
    char block[N_LINES * 96];
    size_t n = 0;
    int first = atomic_fetch_add(&f->n_pieces, 1) * N_LINES;
    for (int k = 0; k < N_LINES; k++) n += (size_t)snprintf(block + n, sizeof block - n, PIECE, first + k);
    qtr_http_write(f->pieces, block, n);
  }
  if (atomic_load(&f->n_pieces) < N_PIECES)
    (void)event_add(f->turn, &(struct timeval){0});
  else
    qtr_http_end(f->pieces);
}

static void on_request(struct qtr_http_conn *conn, void *arg) {
  struct fixture *f = arg;
  const struct qtr_http_head *head = qtr_http_head(conn);
  atomic_fetch_add(&f->n_requests, 1);
  if (qtr_http_is(head->path, "/echo")) {
    size_t len;
    char *body = qtr_http_take_body(conn, &len);
    qtr_http_reply(conn, 200, "text/plain", NULL, body, len);
    free(body);
  } else if (qtr_http_is(head->path, "/flood")) {
    static char block[65536];
    qtr_http_begin(conn, 200, "text/plain", NULL);
    for (int i = 0; i < 400; i++) qtr_http_write(conn, block, sizeof block); /* 25 MB: more than anybody buffers */
  } else if (qtr_http_is(head->path, "/pieces")) {
    f->pieces = conn;
    qtr_http_begin(conn, 200, "text/plain", NULL);
    (void)event_add(f->turn, &(struct timeval){0});
  }
}

static void on_refuse(struct qtr_http_conn *conn, int status, const char *why, void *arg) {
  struct fixture *f = arg;
  atomic_fetch_add(&f->n_refused, 1);
  qtr_http_reply(conn, status, "text/plain", NULL, why, strlen(why));
}

static void on_gone(struct qtr_http_conn *conn, void *user, void *arg) {
  struct fixture *f = arg;
  (void)conn;
  (void)user;
  atomic_fetch_add(&f->n_gone, 1);
}

static void on_command(evutil_socket_t fd, short what, void *arg) {
  struct fixture *f = arg;
  char c = 'q';
  (void)what;
  (void)!read(fd, &c, 1);
  if (c == 'd')
    qtr_http_drain(f->http);
  else
    (void)event_base_loopbreak(f->base);
}

static void *loop(void *arg) {
  struct fixture *f = arg;
  (void)event_base_dispatch(f->base);
  return NULL;
}

static int begin_with(void **state, double seconds, size_t max_pending) {
  struct fixture *f = calloc(1, sizeof *f);
  struct qtr_error err;
  const struct qtr_http_limits limits = {.max_connections = 8,
                                         .max_body = 100000,
                                         .head_seconds = seconds,
                                         .body_seconds = seconds,
                                         .idle_seconds = seconds,
                                         .write_seconds = 60,
                                         .max_pending = max_pending};
  const struct qtr_http_handlers handlers = {on_request, on_refuse, on_gone, f};
  if (!f || pipe(f->pipe)) return -1;
  f->base = event_base_new();
  if (qtr_http_open(f->base, "127.0.0.1", 0, &limits, &handlers, &f->http, &err)) {
    (void)fprintf(stderr, "%s\n", err.message);
    return -1;
  }
  f->port = qtr_http_port(f->http);
  f->command = event_new(f->base, f->pipe[0], EV_READ | EV_PERSIST, on_command, f);
  (void)event_add(f->command, NULL);
  f->turn = event_new(f->base, -1, 0, on_turn, f);
  *state = f;
  return pthread_create(&f->thread, NULL, loop, f);
}

static int begin(void **state) { return begin_with(state, 60, (size_t)1 << 20); }
static int begin_hasty(void **state) { return begin_with(state, 0.4, (size_t)1 << 20); }
static int begin_roomy(void **state) { return begin_with(state, 60, (size_t)64 << 20); }

static int end(void **state) {
  struct fixture *f = *state;
  (void)!write(f->pipe[1], "q", 1);
  (void)pthread_join(f->thread, NULL);
  qtr_http_close(f->http);
  event_free(f->command);
  event_free(f->turn);
  (void)event_base_loop(f->base, EVLOOP_NONBLOCK); /* what bufferevents had deferred */
  event_base_free(f->base);
  (void)close(f->pipe[0]);
  (void)close(f->pipe[1]);
  free(f);
  return 0;
}

/* ---- the client's side ---- */

static int dial(const struct fixture *f) {
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  struct sockaddr_in to = loopback(f->port);
  const struct timeval tv = {.tv_sec = 60};
  assert_true(fd >= 0);
  (void)setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv);
  (void)setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof tv);
  assert_int_equal(connect(fd, (struct sockaddr *)&to, sizeof to), 0);
  return fd;
}

static void say(int fd, const char *text) { (void)!send(fd, text, strlen(text), MSG_NOSIGNAL); }

/* Everything until the server closes. Returns the length; -1 when it does not close within a minute. */
static long hear(int fd, char *out, size_t size) {
  size_t n = 0;
  for (;;) {
    ssize_t got = take(fd, out + n, size - 1 - n);
    if (got < 0 && errno == ECONNRESET) got = 0;
    if (got < 0) return -1;
    if (got == 0) break;
    n += (size_t)got;
  }
  out[n] = 0;
  return (long)n;
}

static void await(atomic_int *counter, int value) {
  for (int i = 0; i < 6000 && atomic_load(counter) < value; i++) pause_ms(10);
  assert_int_equal(atomic_load(counter), value);
}

#define HEAD(path) "POST " path " HTTP/1.1\r\nHost: x\r\n"

static void test_slow(void **state) {
  struct fixture *f = *state;
  char out[4096];
  int fd = dial(f); /* says nothing at all */
  assert_int_equal(hear(fd, out, sizeof out), 0);
  (void)close(fd);
  static const char head[] = HEAD("/echo"); /* a byte now and then: every one is progress, and yet it ends */
  fd = dial(f);
  for (size_t i = 0; i < strlen(head); i++) {
    (void)!send(fd, head + i, 1, MSG_NOSIGNAL);
    pause_ms(30);
  }
  assert_true(hear(fd, out, sizeof out) > 0);
  assert_non_null(strstr(out, "HTTP/1.1 408"));
  (void)close(fd);
  fd = dial(f);
  say(fd, HEAD("/echo") "Content-Length: 100\r\n\r\n");
  for (int i = 0; i < 30; i++) {
    say(fd, "x");
    pause_ms(30);
  }
  assert_true(hear(fd, out, sizeof out) > 0);
  assert_non_null(strstr(out, "HTTP/1.1 408"));
  (void)close(fd);
  for (int i = 0; i < 20; i++) { /* an answer, then silence; a machine that stalls is slow, too, and asks again */
    fd = dial(f);
    say(fd, HEAD("/echo") "Content-Length: 2\r\n\r\nok");
    assert_true(hear(fd, out, sizeof out) >= 0);
    (void)close(fd);
    if (strstr(out, "\r\n\r\nok")) break;
  }
  assert_non_null(strstr(out, "\r\n\r\nok"));
  assert_int_equal(atomic_load(&f->n_gone), 0);
}

/* What a full socket does not take waits, and what is written meanwhile comes behind it: every line arrives, in order. */
static void test_pieces(void **state) {
  struct fixture *f = *state;
  size_t n_lines = 0, n_at = 0;
  char at[256];
  static char part[1 << 16], text[sizeof part];
  struct qtr_http_chunked decoder = {0};
  int fd = dial(f), done = 0;
  say(fd, "GET /pieces HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
  await(&f->n_pieces, N_PIECES / 2);
  atomic_store(&f->reading, true);
  size_t n_head = 0;
  while (n_head < 4 || memcmp(at + n_head - 4, "\r\n\r\n", 4) != 0) {
    assert_true(n_head < sizeof at);
    assert_int_equal(take(fd, at + n_head++, 1), 1);
  }
  while (!done) {
    ssize_t got = take(fd, part, sizeof part);
    size_t used = 0, n = 0;
    assert_true(got > 0);
    done = qtr_http_dechunk(&decoder, part, (size_t)got, &used, text, &n);
    assert_true(done >= 0);
    for (size_t i = 0; i < n; i++) {
      assert_true(n_at < sizeof at - 1);
      at[n_at++] = text[i];
      if (text[i] != '\n') continue;
      char wanted[96];
      at[n_at] = 0;
      n_at = 0;
      (void)snprintf(wanted, sizeof wanted, PIECE, (int)n_lines++);
      assert_string_equal(at, wanted);
    }
  }
  assert_int_equal(n_lines, N_PIECES * N_LINES);
  assert_int_equal(atomic_load(&f->n_gone), 0);
  (void)close(fd);
}

static void test_gone(void **state) {
  struct fixture *f = *state;
  int fd = dial(f);
  say(fd, HEAD("/hang") "\r\n");
  await(&f->n_requests, 1);
  (void)close(fd);
  await(&f->n_gone, 1);
  fd = dial(f); /* only its sending half: the same */
  say(fd, HEAD("/hang") "\r\n");
  await(&f->n_requests, 2);
  (void)shutdown(fd, SHUT_WR);
  await(&f->n_gone, 2);
  (void)close(fd);
  fd = dial(f); /* by reset */
  say(fd, HEAD("/hang") "\r\n");
  await(&f->n_requests, 3);
  (void)setsockopt(fd, SOL_SOCKET, SO_LINGER, &(struct linger){.l_onoff = 1}, sizeof(struct linger));
  (void)close(fd);
  await(&f->n_gone, 3);
  fd = dial(f); /* asks, closes its half at once: a quick answer still arrives */
  say(fd, HEAD("/echo") "Content-Length: 2\r\n\r\nok");
  (void)shutdown(fd, SHUT_WR);
  char out[4096];
  assert_true(hear(fd, out, sizeof out) > 0);
  assert_non_null(strstr(out, "\r\n\r\nok"));
  (void)close(fd);
}

static void test_unread(void **state) {
  struct fixture *f = *state;
  int fd = dial(f);
  say(fd, HEAD("/flood") "\r\n");
  await(&f->n_gone, 1); /* it does not read: too much is pending */
  (void)close(fd);
}

static void test_many(void **state) {
  struct fixture *f = *state;
  char out[4096];
  int fd[9];
  for (int i = 0; i < 8; i++) {
    fd[i] = dial(f);
    say(fd[i], HEAD("/hang") "\r\n");
  }
  await(&f->n_requests, 8);
  fd[8] = dial(f);
  assert_true(hear(fd[8], out, sizeof out) > 0);
  assert_non_null(strstr(out, "HTTP/1.1 503"));
  assert_non_null(strstr(out, "too many connections"));
  for (int i = 0; i < 9; i++) (void)close(fd[i]);
  await(&f->n_gone, 8);
  int again = dial(f);
  say(again, HEAD("/echo") "Connection: close\r\nContent-Length: 2\r\n\r\nok");
  assert_true(hear(again, out, sizeof out) > 0);
  assert_non_null(strstr(out, "HTTP/1.1 200"));
  (void)close(again);
}

static void test_bodies(void **state) {
  struct fixture *f = *state;
  char *body = malloc(100001), *out = malloc(200000), head[200];
  assert_true(body && out);
  memset(body, 'b', 100000);
  body[100000] = 0;
  int fd = dial(f); /* three on one connection, the second in chunks; the largest that is allowed */
  say(fd, HEAD("/echo") "Content-Length: 100000\r\n\r\n");
  say(fd, body);
  say(fd, HEAD("/echo") "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n" HEAD("/echo") "Connection: close\r\n\r\n");
  assert_true(hear(fd, out, 200000) > 100000);
  assert_non_null(strstr(out, "\r\n\r\nabcHTTP/1.1 200 OK"));
  (void)close(fd);
  fd = dial(f); /* a byte more, announced or not */
  say(fd, HEAD("/echo") "Content-Length: 100001\r\n\r\n");
  assert_true(hear(fd, out, 200000) > 0);
  assert_non_null(strstr(out, "HTTP/1.1 413"));
  (void)close(fd);
  fd = dial(f);
  say(fd, HEAD("/echo") "Transfer-Encoding: chunked\r\n\r\n186a1\r\n");
  say(fd, body);
  say(fd, "b\r\n0\r\n\r\n");
  assert_true(hear(fd, out, 200000) > 0);
  assert_non_null(strstr(out, "HTTP/1.1 413"));
  (void)close(fd);
  fd = dial(f); /* an Expect is answered before the body comes */
  say(fd, HEAD("/echo") "Expect: 100-continue\r\nConnection: close\r\nContent-Length: 2\r\n\r\n");
  ssize_t n = take(fd, head, sizeof head - 1);
  assert_true(n > 0);
  head[n] = 0;
  assert_string_equal(head, "HTTP/1.1 100 Continue\r\n\r\n");
  say(fd, "ok");
  assert_true(hear(fd, out, 200000) > 0);
  assert_non_null(strstr(out, "\r\n\r\nok"));
  (void)close(fd);
  free(body);
  free(out);
}

static void test_drain(void **state) {
  struct fixture *f = *state;
  char out[4096];
  int idle = dial(f), late = dial(f);
  say(late, HEAD("/echo") "Content-Length: 2\r\n\r\no");
  pause_ms(100);
  (void)!write(f->pipe[1], "d", 1);
  assert_int_equal(hear(idle, out, sizeof out), 0); /* closed at once */
  say(late, "k");
  assert_true(hear(late, out, sizeof out) > 0); /* what had begun is answered, and told that it is the last */
  assert_non_null(strstr(out, "Connection: close"));
  assert_non_null(strstr(out, "\r\n\r\nok"));
  (void)close(idle);
  (void)close(late);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test_setup_teardown(test_pieces, begin_roomy, end),
                                     cmocka_unit_test_setup_teardown(test_slow, begin_hasty, end),
                                     cmocka_unit_test_setup_teardown(test_gone, begin, end),
                                     cmocka_unit_test_setup_teardown(test_unread, begin, end),
                                     cmocka_unit_test_setup_teardown(test_many, begin, end),
                                     cmocka_unit_test_setup_teardown(test_bodies, begin, end),
                                     cmocka_unit_test_setup_teardown(test_drain, begin, end)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
