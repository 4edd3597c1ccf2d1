/* test_load_trace.c - arrival traces: both published formats, what is not one of them, and requests that are too long. */
#include "load/trace.h"
#include "shared.h"

#include "base/file.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static enum qtr_status parse(const char *text, struct qtr_trace *t, struct qtr_error *err) {
  return qtr_trace_parse(text, strlen(text), 0, t, err);
}

static void test_csv(void **state) {
  (void)state;
  struct qtr_trace t;
  struct qtr_error err;
  assert_int_equal(parse("TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-12-31 23:59:59.5000000,374,44\r\n"
                         "2024-01-01 00:00:00.7500000,0,0\r\n\r\n2024-03-01T00:00:00Z,5,6\n",
                         &t, &err),
                   QTR_OK);
  assert_int_equal(t.n, 3);
  assert_float_equal(t.request[0].time, 0, 0);
  assert_int_equal(t.request[0].n_input, 374);
  assert_int_equal(t.request[0].n_output, 44);
  assert_float_equal(t.request[1].time, 1.25, 1e-6); /* over the end of a year */
  assert_int_equal(t.request[1].n_input, 1);         /* zeros become 1 */
  assert_int_equal(t.request[1].n_output, 1);
  assert_float_equal(t.request[2].time, 60 * 86400 + 0.5, 1e-6); /* a leap year's February */
  qtr_trace_free(&t);
  /* seconds, out of order, an offset from UTC */
  assert_int_equal(parse("12.5,1,2\n10.25,3,4", &t, &err), QTR_OK);
  assert_int_equal(t.request[0].n_input, 3);
  assert_float_equal(t.request[1].time, 2.25, 1e-9);
  qtr_trace_free(&t);
  assert_int_equal(parse("2024-05-10 02:00:00+02:00,1,1\n2024-05-10 00:00:01.25+00:00,1,1\n", &t, &err), QTR_OK);
  assert_float_equal(t.request[1].time, 1.25, 1e-6);
  qtr_trace_free(&t);
}

static void test_jsonl(void **state) {
  (void)state;
  struct qtr_trace t;
  struct qtr_error err;
  assert_int_equal(
      parse("{\"timestamp\": 1000, \"input_length\": 513, \"output_length\": 7, \"hash_ids\": [5, 9]}\n"
            "{\"timestamp\": 3500, \"input_length\": 512, \"output_length\": 8, \"hash_ids\": [5], \"more\": 1}\n"
            "{\"timestamp\": 3500.5, \"input_length\": 3, \"output_length\": 9}\n",
            &t, &err),
      QTR_OK);
  assert_int_equal(t.n, 3);
  assert_float_equal(t.request[1].time, 2.5, 1e-9);
  assert_int_equal(t.request[0].n_blocks, 2);
  assert_int_equal(t.request[1].n_blocks, 1);
  assert_int_equal(t.request[2].n_blocks, 0);
  assert_int_equal(t.block[t.request[1].first_block], t.block[t.request[0].first_block]);
  assert_int_equal(t.block[t.request[0].first_block + 1], 9);
  qtr_trace_free(&t);
}

static void test_refused(void **state) {
  (void)state;
  static const struct {
    const char *text, *says;
  } bad[] = {
      {"", "no requests"},
      {"TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"},
      {"hello\n", "no trace"},
      {"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-13-16 18:15:46,1,2\n", "line 2"},
      {"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1\n", "line 2"},
      {"1,2,3,4\n", "line 1"},
      {"1,-2,3\n", "line 1"},
      {"1,2,3x\n", "line 1"},
      {"1,99999999,3\n", "99999999"},
      {"99999999999999,1,1\n", "time is out of range"},
      {"1,2,99999999999999999999\n", "line 1"},
      {"{\"timestamp\": 0, \"input_length\": 1}\n", "output_length"},
      {"{\"timestamp\": 0, \"input_length\": 600, \"output_length\": 1, \"hash_ids\": [1]}\n", "1 hash_ids for 600"},
      {"{\"timestamp\": 0, \"input_length\": 6, \"output_length\": 1, \"hash_ids\": [\"a\"]}\n", "whole numbers"},
      {"{\"timestamp\": 0, \"input_length\": -6, \"output_length\": 1}\n", "-6"},
      {"{\"timestamp\": 1e300, \"input_length\": 6, \"output_length\": 1}\n", "time is out of range"},
      {"{\"timestamp\": 0, \"input_length\": 6.5, \"output_length\": 1}\n", "whole numbers"},
      {"{\"timestamp\": 0\n", "not JSON"},
  };
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    struct qtr_trace t;
    struct qtr_error err;
    assert_int_equal(parse(bad[i].text, &t, &err), QTR_ERR_FORMAT);
    if (!strstr(err.message, bad[i].says)) fail_msg("\"%s\" is not in: %s", bad[i].says, err.message);
    qtr_trace_free(&t);
  }
}

static void test_fit(void **state) {
  (void)state;
  static const char text[] = "0,100,50\n1,1000,1000\n2,3000,100\n";
  struct qtr_trace t;
  struct qtr_error err;
  size_t n;
  double factor;
  assert_int_equal(parse(text, &t, &err), QTR_OK);
  assert_int_equal(qtr_trace_fit(&t, 3100, QTR_FIT_REFUSE, &n, &factor, &err), QTR_OK);
  assert_int_equal(n, 0);
  assert_int_equal(qtr_trace_fit(&t, 1000, QTR_FIT_REFUSE, &n, &factor, &err), QTR_ERR_LIMIT);
  assert_non_null(strstr(err.message, "2 of 3"));
  assert_int_equal(t.request[2].n_input, 3000);
  assert_int_equal(qtr_trace_fit(&t, 1000, QTR_FIT_CLIP, &n, &factor, &err), QTR_OK);
  assert_int_equal(n, 2);
  assert_int_equal(t.request[0].n_input, 100); /* those that fit stay */
  assert_int_equal(t.request[0].n_output, 50);
  assert_int_equal(t.request[1].n_output, 500);
  assert_int_equal(t.request[1].n_input, 500);
  assert_int_equal(t.request[2].n_output, 100);
  assert_int_equal(t.request[2].n_input, 900);
  qtr_trace_free(&t);
  assert_int_equal(parse(text, &t, &err), QTR_OK);
  assert_int_equal(qtr_trace_fit(&t, 1550, QTR_FIT_SCALE, &n, &factor, &err), QTR_OK);
  assert_float_equal(factor, 0.5, 1e-12);
  assert_int_equal(t.request[0].n_input, 50);
  assert_int_equal(t.request[0].n_output, 25);
  assert_int_equal(t.request[2].n_input, 1500);
  qtr_trace_free(&t);
}

/* The published traces, when they are here: their number of requests and known sums. */
static void test_published(void **state) {
  (void)state;
  static const struct {
    const char *path;
    size_t n;
    double seconds;
  } trace[] = {{"data/traces/AzureLLMInferenceTrace_conv.csv", 19366, 3500},
               {"data/traces/mooncake_conversation_trace.jsonl", 12031, 3500}};
  for (size_t i = 0; i < 2; i++) {
    char *text;
    size_t len;
    struct qtr_trace t;
    struct qtr_error err;
    const char *path = qtr_test_shared(trace[i].path);
    if (!path) skip();
    assert_int_equal(qtr_file_read(path, (size_t)1 << 24, &text, &len, &err), QTR_OK);
    assert_int_equal(qtr_trace_parse(text, len, 0, &t, &err), QTR_OK);
    assert_int_equal(t.n, trace[i].n);
    assert_true(t.request[t.n - 1].time > trace[i].seconds && t.request[t.n - 1].time < 3700);
    qtr_trace_free(&t);
    assert_int_equal(qtr_trace_parse(text, len, 17, &t, &err), QTR_OK); /* the beginning alone */
    assert_int_equal(t.n, 17);
    qtr_trace_free(&t);
    free(text);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_csv), cmocka_unit_test(test_jsonl),
                                     cmocka_unit_test(test_refused), cmocka_unit_test(test_fit),
                                     cmocka_unit_test(test_published)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
