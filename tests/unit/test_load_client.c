/* test_load_client.c - a run against servers that misbehave, each in its own way: every request ends, with the right name
 * for what went wrong. The server is a thread that gives every connection one canned answer. */
#include "load/run.h"

#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

struct server {
  int fd, port;
  pthread_t thread;
  const char *answer; /* to every request; NULL: none, and the connection stays open */
  unsigned pause_us;  /* before the answer */
  bool keep, half;    /* keep: several requests a connection; half: close in the midst of the answer */
  atomic_bool stop;
  atomic_int n_connections, n_requests;
};

/* True when a whole request came: head, and a body by Content-Length. */
static bool read_request(struct server *s, int fd) {
  char data[65536];
  size_t n = 0;
  for (;;) {
    struct pollfd p = {.fd = fd, .events = POLLIN};
    if (atomic_load(&s->stop)) return false;
    if (poll(&p, 1, 20) == 0) continue;
    ssize_t got = read(fd, data + n, sizeof data - 1 - n);
    if (got <= 0) return false;
    data[n += (size_t)got] = 0;
    const char *end = strstr(data, "\r\n\r\n"), *length = strstr(data, "Content-Length: ");
    if (end && n >= (size_t)(end + 4 - data) + (length && length < end ? (size_t)atoi(length + 16) : 0)) return true;
  }
}

static void *serve_one(void *arg) {
  struct server *s = ((void **)arg)[0];
  int fd = *(int *)((void **)arg)[1];
  free(((void **)arg)[1]);
  free(arg);
  while (read_request(s, fd)) {
    atomic_fetch_add(&s->n_requests, 1);
    size_t n = s->answer ? strlen(s->answer) : 0;
    if (s->pause_us > 0) (void)usleep(s->pause_us);
    if (s->half) n /= 2;
    if (n > 0 && write(fd, s->answer, n) < 0) break;
    if (!s->answer) continue;
    if (!s->keep) break;
  }
  close(fd);
  return NULL;
}

static void *serve(void *arg) {
  struct server *s = arg;
  pthread_t thread[256];
  int n = 0;
  while (!atomic_load(&s->stop)) {
    struct pollfd p = {.fd = s->fd, .events = POLLIN};
    if (poll(&p, 1, 20) <= 0) continue;
    int fd = accept(s->fd, NULL, NULL), *copy = malloc(sizeof *copy);
    void **pair = malloc(2 * sizeof *pair);
    if (fd < 0 || !copy || !pair || n == 256) abort();
    *copy = fd;
    pair[0] = s;
    pair[1] = copy;
    atomic_fetch_add(&s->n_connections, 1);
    if (pthread_create(&thread[n++], NULL, serve_one, pair)) abort();
  }
  while (n > 0) pthread_join(thread[--n], NULL);
  return NULL;
}

static void start(struct server *s) {
  struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  socklen_t len = sizeof a;
  s->fd = socket(AF_INET, SOCK_STREAM, 0);
  assert_true(s->fd >= 0);
  assert_int_equal(bind(s->fd, (struct sockaddr *)&a, sizeof a), 0);
  assert_int_equal(listen(s->fd, 64), 0);
  assert_int_equal(getsockname(s->fd, (struct sockaddr *)&a, &len), 0);
  s->port = ntohs(a.sin_port);
  assert_int_equal(pthread_create(&s->thread, NULL, serve, s), 0);
}
static void end(struct server *s) {
  atomic_store(&s->stop, true);
  pthread_join(s->thread, NULL);
  close(s->fd);
}

#define HEAD "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
#define TOKEN "data: {\"choices\":[{\"text\":\"a\"}]}\n\n" /* 35 bytes */
#define USAGE "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":2}}\n\n"
#define DONE "data: [DONE]\n\n"

static void run_against(struct server *s, size_t n, int32_t concurrency, double timeout, struct qtr_load_run *run) {
  struct qtr_workload w = {.seed = 1, .vocab = 1024};
  struct qtr_error err;
  char url[64];
  (void)snprintf(url, sizeof url, "http://127.0.0.1:%d", s->port);
  const struct qtr_load_options o = {.url = url, .concurrency = concurrency, .speed = 1, .timeout = timeout, .quiet = true};
  assert_int_equal(qtr_workload_make(&w, n, concurrency ? 0 : 1000, 20, 2, &err), QTR_OK);
  if (qtr_load_run(&o, &w, run, &err)) fail_msg("%s", err.message);
  assert_int_equal(run->n, n);
  qtr_workload_free(&w);
}

static void test_outcomes(void **state) {
  (void)state;
  static const struct {
    const char *answer;
    bool half;
    enum qtr_load_outcome outcome;
    const char *message;
  } c[] = {
      {HEAD "\r\n" TOKEN TOKEN USAGE DONE, false, QTR_LOAD_OK, ""},
      {HEAD "\r\n" TOKEN TOKEN "data: "
            "{\"choices\":[{\"text\":\"\",\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":7,"
            "\"completion_tokens\":2}}\n\n",
       false, QTR_LOAD_OK, ""}, /* no [DONE] */
      {HEAD "Content-Length: 14\r\n\r\n" DONE, false, QTR_LOAD_EMPTY, ""},
      {HEAD "\r\n" TOKEN TOKEN, false, QTR_LOAD_MALFORMED, "without an end"},
      {HEAD "Content-Length: 1000\r\n\r\n" TOKEN TOKEN, false, QTR_LOAD_CLOSED, ""},
      {HEAD "Content-Length: 70\r\n\r\n" TOKEN TOKEN, true, QTR_LOAD_CLOSED, ""},
      {"", false, QTR_LOAD_CLOSED, ""},
      {"SSH-2.0-OpenSSH_9.2\r\n", false, QTR_LOAD_MALFORMED, ""},
      {HEAD "\r\ndata: nonsense\n\n" DONE, false, QTR_LOAD_MALFORMED, "nonsense"},
      {HEAD "\r\n" TOKEN "data: {\"error\":{\"message\":\"the GPU\\u0007 is gone\"}}\n\n" DONE, false, QTR_LOAD_SAID,
       "the GPU? is gone"},
      {"HTTP/1.1 429 Busy\r\nContent-Length: 31\r\n\r\n{\"error\":{\"message\":\"so busy\"}}", false, QTR_LOAD_HTTP,
       "so busy"},
      {"HTTP/1.1 502 Bad\r\n\r\n<html>\nproxy", false, QTR_LOAD_HTTP, "<html>?proxy"},
      {"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}", false, QTR_LOAD_MALFORMED,
       "no stream"},
      {NULL, false, QTR_LOAD_TIMEOUT, ""},
  };
  for (size_t i = 0; i < sizeof c / sizeof c[0]; i++) {
    for (int32_t concurrency = 0; concurrency <= 3; concurrency += 3) {
      struct server s = {.answer = c[i].answer, .half = c[i].half};
      struct qtr_load_run run;
      start(&s);
      run_against(&s, 5, concurrency, c[i].outcome == QTR_LOAD_TIMEOUT ? 0.2 : 60, &run);
      for (size_t k = 0; k < run.n; k++) {
        if (run.sample[k].outcome != c[i].outcome)
          fail_msg("case %zu ends with %d, not %d", i, (int)run.sample[k].outcome, (int)c[i].outcome);
        assert_true(run.sample[k].end >= run.sample[k].due);
      }
      if (!strstr(run.message[c[i].outcome], c[i].message)) fail_msg("case %zu: %s", i, run.message[c[i].outcome]);
      if (c[i].outcome == QTR_LOAD_OK) {
        assert_int_equal(run.sample[0].n_input, 7); /* as the server counts */
        assert_int_equal(run.sample[0].n_output, 2);
        assert_int_equal(run.n_tokens, 10);
      }
      qtr_load_run_free(&run);
      end(&s);
    }
  }
}

/* Connections are used again; one that the server has closed meanwhile is no failure. */
static void test_reuse(void **state) {
  (void)state;
  for (int keep = 0; keep < 2; keep++) {
    struct server s = {.answer = HEAD
                       "Transfer-Encoding: chunked\r\n\r\n" /* 36 + 14 bytes */
                       "32\r\ndata: {\"choices\":[{\"text\":\"a\"}]}  \n\n" DONE "\r\n0\r\n\r\n",
                       .keep = keep};
    struct qtr_load_run run;
    start(&s);
    run_against(&s, 30, 2, 60, &run);
    for (size_t k = 0; k < run.n; k++) assert_int_equal(run.sample[k].outcome, QTR_LOAD_OK);
    assert_int_equal(atomic_load(&s.n_requests), 30);
    if (keep) assert_int_equal(atomic_load(&s.n_connections), 1 + 2); /* the first finds out which address answers */
    qtr_load_run_free(&run);
    end(&s);
  }
}

/* Times: in order, from when a request was due; an open loop keeps to the trace, at the asked speed. */
static void test_times(void **state) {
  (void)state;
  struct server s = {.answer = HEAD "\r\n" TOKEN TOKEN USAGE DONE, .pause_us = 20000};
  struct qtr_workload w = {.seed = 1, .vocab = 1024};
  struct qtr_load_run run;
  struct qtr_error err;
  char url[64];
  start(&s);
  (void)snprintf(url, sizeof url, "http://127.0.0.1:%d", s.port);
  const struct qtr_load_options o = {.url = url, .speed = 4, .timeout = 60, .quiet = true};
  assert_int_equal(qtr_workload_make(&w, 8, 20, 5, 2, &err), QTR_OK);
  assert_int_equal(qtr_load_run(&o, &w, &run, &err), QTR_OK);
  for (size_t i = 0; i < 8; i++) {
    const struct qtr_load_sample *r = &run.sample[i];
    assert_int_equal(r->outcome, QTR_LOAD_OK);
    assert_float_equal(r->due, w.trace.request[i].time / 4, 1e-12);
    assert_true(r->due <= r->sent && r->sent < r->first && r->first <= r->last && r->last <= r->end);
    assert_true(r->first - r->sent >= 0.02); /* the server's pause before it answers */
    assert_true(r->end <= run.duration);
  }
  qtr_load_run_free(&run);
  qtr_workload_free(&w);
  end(&s);
}

static void test_nobody(void **state) {
  (void)state;
  struct server s = {0};
  struct qtr_load_server said;
  struct qtr_error err;
  char url[64];
  start(&s);
  end(&s);
  (void)snprintf(url, sizeof url, "http://127.0.0.1:%d", s.port);
  const struct qtr_load_options o = {.url = url, .timeout = 5};
  assert_int_equal(qtr_load_ask_server(&o, &said, &err), QTR_ERR_IO);
  assert_non_null(strstr(err.message, "no server at 127.0.0.1"));
}

static void test_models(void **state) {
  (void)state;
  static const struct {
    const char *answer;
    enum qtr_status status;
    const char *says; /* the model, or the error */
    int32_t max_len;
  } c[] = {
      {"HTTP/1.1 200 OK\r\n\r\n{\"data\":[{\"id\":\"m\",\"max_model_len\":99}]}", QTR_OK, "m", 99},
      {"HTTP/1.1 200 OK\r\n\r\n{\"data\":[{\"id\":\"m\",\"meta\":{\"n_ctx_train\":77}}]}", QTR_OK, "m", 77},
      {"HTTP/1.1 200 OK\r\n\r\n{\"data\":[]}", QTR_ERR_FORMAT, "names no model", 0},
      {"HTTP/1.1 200 OK\r\n\r\nnot json", QTR_ERR_FORMAT, "names no model", 0},
      {"HTTP/1.1 401 No\r\n\r\n{}", QTR_ERR_ARGUMENT, "API key", 0},
      {"HTTP/1.1 404 No\r\n\r\n{}", QTR_ERR_IO, "404", 0},
      {"garbage\r\n", QTR_ERR_IO, "no answer", 0},
  };
  for (size_t i = 0; i < sizeof c / sizeof c[0]; i++) {
    struct server s = {.answer = c[i].answer};
    struct qtr_load_server said;
    struct qtr_error err;
    char url[64];
    start(&s);
    (void)snprintf(url, sizeof url, "http://127.0.0.1:%d", s.port);
    const struct qtr_load_options o = {.url = url, .key = "k", .timeout = 20};
    assert_int_equal(qtr_load_ask_server(&o, &said, &err), c[i].status);
    if (c[i].status) {
      if (!strstr(err.message, c[i].says)) fail_msg("case %zu: %s", i, err.message);
    } else {
      assert_string_equal(said.model, c[i].says);
      assert_int_equal(said.max_model_len, c[i].max_len);
    }
    end(&s);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_outcomes), cmocka_unit_test(test_reuse),
                                     cmocka_unit_test(test_times), cmocka_unit_test(test_nobody),
                                     cmocka_unit_test(test_models)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
