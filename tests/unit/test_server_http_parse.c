/* test_server_http_parse.c - request heads and chunked bodies: what is let in, and what is refused with which status. */
#include "server/http_parse.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static long parse(const char *text, struct qtr_http_head *head) { return qtr_http_parse_head(text, strlen(text), head); }

static void test_heads(void **state) {
  (void)state;
  static const char get[] = "GET /v1/models?a=b HTTP/1.1\r\nHost: x\r\nX-Empty:\r\nAccept: \t*/* \r\n\r\nrest";
  struct qtr_http_head h;
  assert_int_equal(parse(get, &h), (long)strlen(get) - 4);
  assert_true(qtr_http_is(h.method, "GET"));
  assert_true(qtr_http_is(h.path, "/v1/models"));
  assert_true(qtr_http_is(h.query, "a=b"));
  assert_int_equal(h.minor, 1);
  assert_true(h.keep_alive);
  struct qtr_http_slice value;
  assert_true(qtr_http_header(&h, "accept", &value));
  assert_true(qtr_http_is(value, "*/*"));
  assert_true(qtr_http_header(&h, "X-EMPTY", &value));
  assert_int_equal(value.len, 0);
  assert_false(qtr_http_header(&h, "x-none", &value));
  for (size_t n = 0; n < strlen(get) - 4; n++) assert_int_equal(qtr_http_parse_head(get, n, &h), 0);

  assert_true(parse("POST /x HTTP/1.0\r\nContent-Length: 12\r\n\r\n", &h) > 0);
  assert_int_equal(h.content_length, 12);
  assert_false(h.keep_alive);
  assert_true(parse("POST /x HTTP/1.0\r\nConnection: foo, Keep-Alive\r\n\r\n", &h) > 0);
  assert_true(h.keep_alive);
  assert_true(parse("POST /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: Chunked\r\n\r\n", &h) > 0);
  assert_true(h.chunked && !h.keep_alive);
  assert_true(parse("POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\ncontent-length: 5\r\nExpect: 100-Continue\r\n\r\n",
                    &h) > 0);
  assert_true(h.expect_continue);
  assert_true(parse("\r\nGET http://proxy:80/v1?q HTTP/1.1\r\nHost: a\r\n\r\n", &h) > 0);
  assert_true(qtr_http_is(h.path, "/v1"));
}

static void test_refusals(void **state) {
  (void)state;
  static const struct {
    const char *text;
    long status;
  } bad[] = {{"\x16\x03\x01\x02\n", 400}, /* TLS */
             {"GET\r\n", 400},
             {"GET /\r\n", 400},
             {"GET / HTTP/1.1\nHost: a\n\n", 400},
             {"GET  / HTTP/1.1\r\n", 400},
             {"G(T / HTTP/1.1\r\n", 400},
             {"GET x HTTP/1.1\r\n", 400},
             {"GET /\x01 HTTP/1.1\r\n", 400},
             {"GET /\xc3\xa4 HTTP/1.1\r\n", 400},
             {"GET / HTTP/11\r\n", 400},
             {"GET / http/1.1\r\n", 400},
             {"GET / HTTP/2.0\r\n", 505},
             {"PRI * HTTP/2.0\r\n", 505},
             {"GET / HTTP/1.1\r\n\r\n", 400}, /* no host */
             {"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400},
             {"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400},
             {"GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n", 400},
             {"GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n", 400},
             {"GET / HTTP/1.1\r\nHost: a\x01\r\n\r\n", 400},
             {"GET / HTTP/1.1\r\nHost: a\rb\r\n\r\n", 400},
             {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400},
             {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\n", 400},
             {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: \r\n\r\n", 400},
             {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 1\r\n\r\n", 400},
             {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n", 413},
             {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400},
             {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
             {"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 501},
             {"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
             {"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
             {"POST / HTTP/1.1\r\nHost: a\r\nExpect: tea\r\n\r\n", 417}};
  struct qtr_http_head h;
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    if (parse(bad[i].text, &h) != -bad[i].status) fail_msg("%s: %ld", bad[i].text, parse(bad[i].text, &h));
  }
  /* sizes */
  char *big = malloc(QTR_HTTP_MAX_HEAD + 100);
  assert_non_null(big);
  memset(big, 'a', QTR_HTTP_MAX_HEAD + 100);
  assert_int_equal(qtr_http_parse_head(big, QTR_HTTP_MAX_HEAD - 1, &h), 0);
  assert_int_equal(qtr_http_parse_head(big, QTR_HTTP_MAX_HEAD, &h), -414);
  memcpy(big, "GET /", 5);
  memcpy(big + 5 + QTR_HTTP_MAX_TARGET, " HTTP/1.1\r\n", 11);
  assert_int_equal(qtr_http_parse_head(big, QTR_HTTP_MAX_TARGET + 16, &h), -414);
  memcpy(big, "GET / HTTP/1.1\r\nA: ", 19);
  big[QTR_HTTP_MAX_TARGET + 14] = 'a';
  big[QTR_HTTP_MAX_TARGET + 15] = 'a';
  assert_int_equal(qtr_http_parse_head(big, QTR_HTTP_MAX_HEAD, &h), -431);
  size_t n = 16;
  for (int i = 0; i <= QTR_HTTP_MAX_HEADERS; i++, n += 6) memcpy(big + n, "A: b\r\n", 6);
  memcpy(big + n, "\r\n", 2);
  assert_int_equal(qtr_http_parse_head(big, n + 2, &h), -431);
  free(big);
}

/* Feeds `text` in pieces of every size; returns the result and leaves the body in out (256). */
static int dechunk(const char *text, size_t piece, char *out, size_t *used_of_all) {
  struct qtr_http_chunked d = {0};
  size_t at = 0, n = strlen(text), len = 0;
  int done = 0;
  while (at < n && !done) {
    size_t used, made, m = n - at < piece ? n - at : piece;
    done = qtr_http_dechunk(&d, text + at, m, &used, out + len, &made);
    at += used;
    len += made;
  }
  out[len] = 0;
  *used_of_all = at;
  return done;
}

static void test_chunked(void **state) {
  (void)state;
  char out[256];
  size_t used;
  static const char good[] = "3;ext=\"a\"\r\nabc\r\n0A\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\nGET";
  for (size_t piece = 1; piece < sizeof good; piece++) {
    assert_int_equal(dechunk(good, piece, out, &used), 1);
    assert_string_equal(out, "abc0123456789");
    assert_int_equal(used, strlen(good) - 3);
  }
  static const char *const bad[] = {"x\r\n",      "\r\n",          "-1\r\n",       "3\nabc",           "3\r\nabcd\r\n",
                                    "3\r\nabc\n", "123456789\r\n", "3\r\rabc\r\n", "0\r\nA: b\nC\r\n", "0\r\n\rx",
                                    "3 \r\nabc",  "0x3\r\nabc"};
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    for (size_t piece = 1; piece < 12; piece++) {
      if (dechunk(bad[i], piece, out, &used) != -400) fail_msg("%s in pieces of %zu", bad[i], piece);
    }
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_heads), cmocka_unit_test(test_refusals),
                                     cmocka_unit_test(test_chunked)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
