/* test_load_response.c - answers of servers, well formed and not, whole and byte by byte. */
#include "load/response.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static char seen[4096]; /* events, each in brackets */

static void on_event(void *arg, const char *data, size_t len) {
  (void)arg;
  size_t at = strlen(seen);
  (void)snprintf(seen + at, sizeof seen - at, "[%.*s]", (int)len, data);
}

/* Feeds the text in pieces of `step`. */
static int feed(struct qtr_response *r, const char *text, size_t len, size_t step) {
  int state = 0;
  seen[0] = 0;
  qtr_response_begin(r);
  for (size_t at = 0; at < len && state == 0; at += step)
    state = qtr_response_feed(r, text + at, len - at < step ? len - at : step, on_event, NULL);
  return state;
}

#define EVENTS "Content-Type: text/event-stream\r\n"

static void test_answers(void **state) {
  (void)state;
  static const struct {
    const char *text;
    int result, status;
    bool keep_alive;
    const char *events, *body;
  } c[] = {
      {"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", 1, 200, true, "", "hello"},
      {"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 1, 200, true, "", ""},
      {"HTTP/1.1 204 No Content\r\n\r\n", 1, 204, false, "", ""},
      {"HTTP/1.0 200 OK\r\ncontent-length:5\r\n\r\nhello", 1, 200, false, "", "hello"},
      {"HTTP/1.1 429 Too Many\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}", 1, 429, false, "", "{}"},
      {"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx", 1, 200, true, "", "x"},
      {"HTTP/1.1 200 OK\r\n" EVENTS
       "Transfer-Encoding: chunked\r\n\r\n9\r\ndata: a\n\n\r\nc\r\n: x\ndata:b\n\n\r\n0\r\n\r\n",
       1, 200, true, "[a][b]", ""},
      {"HTTP/1.1 200 OK\r\n" EVENTS "Content-Length: 34\r\n\r\ndata: one\r\ndata: two\r\n\r\nevent: x\n\n", 1, 200, true,
       "[one\ntwo]", NULL},
      {"HTTP/1.1 200 OK\r\n" EVENTS "\r\ndata: to the end\n\n", 0, 200, false, "[to the end]", NULL},
      {"HTTP/1.1 500 No\r\n" EVENTS "Content-Length: 9\r\n\r\ndata: a\n\n", 1, 500, true, "", "data: a\n\n"}, /* no stream */
      {"HTTP/1.1 200", 0, 0, false, "", NULL},
      {"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel", 0, 200, true, "", NULL},
  };
  for (size_t i = 0; i < sizeof c / sizeof c[0]; i++) {
    struct qtr_response r = {0};
    size_t len = strlen(c[i].text);
    for (size_t step = 1; step <= len; step = step < 16 ? step + 1 : step * 2) {
      assert_int_equal(feed(&r, c[i].text, len, step), c[i].result);
      assert_int_equal(r.status, c[i].status);
      if (c[i].result == 1) assert_int_equal(r.keep_alive, c[i].keep_alive);
      assert_string_equal(seen, c[i].events);
      if (c[i].body) {
        assert_int_equal(r.data.len, strlen(c[i].body));
        assert_memory_equal(r.data.len ? r.data.data : "", c[i].body, r.data.len);
      }
    }
    qtr_response_free(&r);
  }
}

static void test_closed(void **state) {
  (void)state;
  struct qtr_response r = {0};
  const char *open = "HTTP/1.1 200 OK\r\n\r\nto the end", *cut = "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhel";
  assert_int_equal(feed(&r, open, strlen(open), 7), 0);
  assert_int_equal(qtr_response_close(&r), 1);
  assert_int_equal(feed(&r, cut, strlen(cut), 7), 0);
  assert_int_equal(qtr_response_close(&r), -1);
  assert_int_equal(feed(&r, "HTTP/1.1 2", 10, 3), 0);
  assert_int_equal(qtr_response_close(&r), -1);
  /* more than was asked for: complete, but the connection is not to be trusted */
  const char *more = "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nxHTTP/1.1 200 OK\r\n";
  assert_int_equal(feed(&r, more, strlen(more), 100), 1);
  assert_false(r.keep_alive);
  qtr_response_free(&r);
}

static void test_malformed(void **state) {
  (void)state;
  static const char *const bad[] = {"hello\r\n",
                                    "HTTP/2 200\r\n",
                                    "HTTP/1.1 99 x\r\n",
                                    "HTTP/1.1 2000\r\n",
                                    "HTTP/1.1 200 OK\r\nno colon\r\n",
                                    "HTTP/1.1 200 OK\r\n: x\r\n",
                                    "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n",
                                    "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n",
                                    "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n",
                                    "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n",
                                    "HTTP/1.1 101 Switching\r\n\r\n",
                                    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
                                    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffff\r\n"};
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    struct qtr_response r = {0};
    for (size_t step = 1; step < 40; step += 13) assert_int_equal(feed(&r, bad[i], strlen(bad[i]), step), -1);
    qtr_response_free(&r);
  }
  /* without end: headers, lines of a stream, interim answers, an event of many lines */
  static const struct {
    const char *head, *again;
  } endless[] = {{"HTTP/1.1 200 OK\r\n", "X-Y: zzzzzzzzzzzzzzzzzzzzzzzzz\r\n"},
                 {"HTTP/1.1 200 OK\r\n", "Xzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz"},
                 {"", "HTTP/1.1 100 Continue\r\n\r\n"},
                 {"HTTP/1.1 200 OK\r\n" EVENTS "\r\n", "data: zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz"},
                 {"HTTP/1.1 200 OK\r\n" EVENTS "\r\n", "data: zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz\n"}};
  for (size_t i = 0; i < sizeof endless / sizeof endless[0]; i++) {
    struct qtr_response r = {0};
    int result = feed(&r, endless[i].head, strlen(endless[i].head), 100);
    size_t n = 0;
    for (; result == 0 && n < 1000000; n++)
      result = qtr_response_feed(&r, endless[i].again, strlen(endless[i].again), on_event, NULL);
    assert_int_equal(result, -1);
    assert_true(r.line.capacity + r.data.capacity < (size_t)8 << 20);
    qtr_response_free(&r);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_answers), cmocka_unit_test(test_closed),
                                     cmocka_unit_test(test_malformed)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
