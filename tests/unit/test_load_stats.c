/* test_load_stats.c - percentiles, goodput, objectives, prompts of a workload, what events say, URLs. */
#include "load/report.h"
#include "load/run.h"
#include "load/stats.h"
#include "load/workload.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void test_percentiles(void **state) {
  (void)state;
  double v[] = {5, 1, 4, 2, 3, 10};
  struct qtr_distribution d = qtr_distribution_of(v, 6); /* numpy.percentile([1, 2, 3, 4, 5, 10], …) */
  assert_float_equal(d.p50, 3.5, 1e-12);
  assert_float_equal(d.p90, 7.5, 1e-12);
  assert_float_equal(d.p95, 8.75, 1e-12);
  assert_float_equal(d.p99, 9.75, 1e-12);
  assert_float_equal(d.max, 10, 0);
  assert_float_equal(d.mean, 25.0 / 6, 1e-12);
  double one = 7;
  d = qtr_distribution_of(&one, 1);
  assert_float_equal(d.p50, 7, 0);
  assert_float_equal(d.p99, 7, 0);
  d = qtr_distribution_of(NULL, 0);
  assert_int_equal(d.n, 0);
}

static void test_slo(void **state) {
  (void)state;
  struct qtr_slo slo;
  struct qtr_error err;
  assert_int_equal(qtr_slo_parse("ttft=500,tpot=50.5", &slo, &err), QTR_OK);
  assert_float_equal(slo.limit[QTR_TIME_TTFT], 0.5, 1e-12);
  assert_float_equal(slo.limit[QTR_TIME_TPOT], 0.0505, 1e-12);
  assert_true(isinf(slo.limit[QTR_TIME_E2E]));
  assert_int_equal(qtr_slo_parse(NULL, &slo, &err), QTR_OK);
  assert_true(isinf(slo.limit[QTR_TIME_TTFT]));
  static const char *const bad[] = {"ttft",  "ttft=",         "ttft=x",  "ttft=-1", "ttft=0", "ttft=nan",
                                    "itl=5", "ttft=5;tpot=3", "ttft=5,", "x=5",     "=5"};
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
    assert_int_equal(qtr_slo_parse(bad[i], &slo, &err), QTR_ERR_ARGUMENT);
}

/* A run by hand: two good requests (one of a single token), a slow one, a failure, one that we cut. */
static void test_summary(void **state) {
  (void)state;
  struct qtr_load_sample sample[] = {
      {.due = 0,
       .sent = 0.01,
       .first = 0.1,
       .last = 0.5,
       .end = 0.6,
       .n_input = 10,
       .n_output = 5,
       .outcome = QTR_LOAD_OK,
       .status = 200},
      {.due = 1,
       .sent = 1,
       .first = 1.2,
       .last = 1.2,
       .end = 1.3,
       .n_input = 20,
       .n_output = 1,
       .outcome = QTR_LOAD_OK,
       .status = 200},
      {.due = 2,
       .sent = 2,
       .first = 4,
       .last = 5,
       .end = 5,
       .n_input = 30,
       .n_output = 11,
       .outcome = QTR_LOAD_OK,
       .status = 200},
      {.due = 3, .sent = 3, .end = 3.1, .n_input = 5, .outcome = QTR_LOAD_HTTP, .status = 429},
      {.due = 4, .sent = 4, .end = 4.5, .n_input = 5, .outcome = QTR_LOAD_CUT}};
  struct qtr_load_token token[] = {{0.1f, -1}, {0.3f, 0.2f}, {0.5f, 0.2f}};
  struct qtr_load_run run = {.sample = sample, .n = 5, .token = token, .n_tokens = 3, .duration = 5};
  struct qtr_load_summary s;
  struct qtr_slo slo;
  struct qtr_error err;
  assert_int_equal(qtr_slo_parse("ttft=500,tpot=100", &slo, &err), QTR_OK);
  assert_int_equal(qtr_load_summarize(&run, &slo, &s, &err), QTR_OK);
  assert_int_equal(s.n_ok, 3);
  assert_int_equal(s.n_failed, 1);
  assert_int_equal(s.n_good, 2); /* the third's first token came after 2 s */
  assert_float_equal(s.good_s, 0.4, 1e-12);
  assert_float_equal(s.requests_s, 0.6, 1e-12);
  assert_float_equal(s.output_s, 17.0 / 5, 1e-12);
  assert_float_equal(s.input_s, 60.0 / 5, 1e-12);
  assert_int_equal(s.time[QTR_TIME_TTFT].n, 3);
  assert_float_equal(s.time[QTR_TIME_TTFT].max, 2, 1e-12);
  assert_int_equal(s.time[QTR_TIME_TPOT].n, 2); /* one token has no time between tokens */
  assert_float_equal(s.time[QTR_TIME_TPOT].p50, 0.1, 1e-12);
  assert_int_equal(s.time[QTR_TIME_ITL].n, 2);
  assert_float_equal(s.time[QTR_TIME_E2E].max, 3, 1e-12);
  assert_float_equal(s.late, 0.01, 1e-12);
  /* the report of it */
  const struct qtr_load_report report = {.run = &run,
                                         .summary = &s,
                                         .slo = &slo,
                                         .url = "http://x",
                                         .model = "<m&m>",
                                         .load = "by hand",
                                         .has_slo = true,
                                         .factor = 1};
  json_t *o = qtr_load_json(&report);
  assert_non_null(o);
  assert_int_equal(json_integer_value(json_object_get(json_object_get(o, "errors"), "http_429")), 1);
  assert_float_equal(json_number_value(json_object_get(json_object_get(o, "ttft_ms"), "max")), 2000, 1e-6);
  assert_float_equal(json_number_value(json_object_get(o, "goodput_requests_s")), 0.4, 1e-9);
  json_decref(o);
  char *svg;
  size_t len;
  assert_int_equal(qtr_load_plot(&report, &svg, &len, &err), QTR_OK);
  assert_non_null(strstr(svg, "&lt;m&amp;m&gt;"));
  assert_null(strstr(svg, "nan"));
  assert_null(strstr(svg, "inf"));
  free(svg);
  qtr_load_summary_free(&s);
  /* nothing at all */
  struct qtr_load_run empty = {0};
  assert_int_equal(qtr_load_summarize(&empty, &slo, &s, &err), QTR_OK);
  const struct qtr_load_report nothing = {
      .run = &empty, .summary = &s, .slo = &slo, .url = "", .model = "", .load = "", .factor = 1};
  assert_int_equal(qtr_load_plot(&nothing, &svg, &len, &err), QTR_OK);
  assert_null(strstr(svg, "nan"));
  free(svg);
  qtr_load_summary_free(&s);
}

static json_t *body_of(const struct qtr_workload *w, size_t i, bool *chat) {
  const struct qtr_body_options o = {.model = "m\"x", .temperature = 0, .ignore_eos = true};
  struct qtr_buffer b = {0};
  qtr_workload_body(w, i, &o, &b, chat);
  json_t *json = json_loadb(b.data, b.len, 0, NULL);
  qtr_buffer_free(&b);
  assert_non_null(json);
  assert_string_equal(json_string_value(json_object_get(json, "model")), "m\"x");
  assert_true(json_is_true(json_object_get(json, "stream")));
  return json;
}

static void test_prompts(void **state) {
  (void)state;
  struct qtr_workload w = {.seed = 3, .vocab = 1024, .block_tokens = 512};
  struct qtr_error err;
  bool chat;
  static const char trace[] =
      "{\"timestamp\": 0, \"input_length\": 700, \"output_length\": 7, \"hash_ids\": [5, 9]}\n"
      "{\"timestamp\": 1, \"input_length\": 800, \"output_length\": 8, \"hash_ids\": [5, 10]}\n"
      "{\"timestamp\": 1, \"input_length\": 600, \"output_length\": 8}\n";
  assert_int_equal(qtr_trace_parse(trace, strlen(trace), 0, &w.trace, &err), QTR_OK);
  json_t *a = body_of(&w, 0, &chat), *b = body_of(&w, 1, &chat), *c = body_of(&w, 2, &chat), *again = body_of(&w, 0, &chat);
  assert_false(chat);
  assert_true(json_equal(a, again));
  const json_t *x = json_object_get(a, "prompt"), *y = json_object_get(b, "prompt"), *z = json_object_get(c, "prompt");
  assert_int_equal(json_array_size(x), 700);
  assert_int_equal(json_array_size(y), 800);
  assert_int_equal(json_integer_value(json_object_get(b, "max_tokens")), 8);
  size_t same = 0, by_chance = 0;
  while (same < 700 && json_equal(json_array_get(x, same), json_array_get(y, same))) same++;
  assert_in_range(same, 512, 515); /* the shared block, and what follows differs */
  for (size_t i = 0; i < 600; i++) by_chance += (size_t)json_equal(json_array_get(x, i), json_array_get(z, i));
  assert_in_range(by_chance, 0, 20); /* no block: nothing shared */
  for (size_t i = 0; i < 700; i++) assert_in_range(json_integer_value(json_array_get(x, i)), 256, 1023);
  json_decref(a), json_decref(b), json_decref(c), json_decref(again);
  qtr_workload_free(&w);
  /* words: as many as tokens were asked for */
  w = (struct qtr_workload){.kind = QTR_PROMPT_WORDS, .seed = 3};
  assert_int_equal(qtr_workload_make(&w, 2, 0, 40, 5, &err), QTR_OK);
  a = body_of(&w, 1, &chat);
  size_t n_words = 1;
  for (const char *t = json_string_value(json_object_get(a, "prompt")); *t; t++) n_words += *t == ' ';
  assert_int_equal(n_words, 40);
  json_decref(a);
  qtr_workload_free(&w);
}

static void test_poisson(void **state) {
  (void)state;
  struct qtr_workload w = {.seed = 5}, v = {.seed = 5};
  struct qtr_error err;
  enum { N = 20000 };
  assert_int_equal(qtr_workload_make(&w, N, 10, 1, 1, &err), QTR_OK);
  assert_int_equal(qtr_workload_make(&v, N, 10, 1, 1, &err), QTR_OK);
  double sum = 0, squares = 0;
  for (size_t i = 1; i < N; i++) {
    double gap = w.trace.request[i].time - w.trace.request[i - 1].time;
    assert_true(gap >= 0);
    sum += gap;
    squares += gap * gap;
    assert_float_equal(w.trace.request[i].time, v.trace.request[i].time, 0);
  }
  double mean = sum / (N - 1), deviation = sqrt(squares / (N - 1) - mean * mean);
  assert_float_equal(mean, 0.1, 0.003); /* four standard errors; of an exponential the deviation is the mean */
  assert_float_equal(deviation, 0.1, 0.004);
  qtr_workload_free(&w);
  qtr_workload_free(&v);
}

static void test_dataset(void **state) {
  (void)state;
  struct qtr_workload w = {0};
  struct qtr_error err;
  bool chat;
  static const char lines[] =
      "{\"prompt\": \"Once\"}\n\n"
      "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}, {\"role\": \"assistant\", \"content\": \"Ho\"}]}\n";
  assert_int_equal(qtr_workload_make(&w, 3, 0, 1, 5, &err), QTR_OK);
  assert_int_equal(qtr_workload_read(&w, lines, strlen(lines), 1, &err), QTR_OK);
  assert_int_equal(w.n_items, 2);
  json_t *o = body_of(&w, 2, &chat); /* in turn: the first again */
  assert_false(chat);
  assert_string_equal(json_string_value(json_object_get(o, "prompt")), "Once");
  json_decref(o);
  o = body_of(&w, 1, &chat);
  assert_true(chat);
  assert_int_equal(json_array_size(json_object_get(o, "messages")), 1); /* ends where the model is to speak */
  json_decref(o);
  qtr_workload_free(&w);
  static const char text[] = "It was a dark and stormy night; the rain fell in torrents.";
  assert_int_equal(qtr_workload_read(&w, text, strlen(text), 4, &err), QTR_OK); /* pieces of 16 bytes at most */
  assert_int_equal(w.n_items, 5);
  assert_string_equal(w.item[0], "\"It was a dark\"");
  qtr_workload_free(&w);
  static const char *const bad[] = {"",        "{\"x\": 1}",           "{\"prompt\": 5}",
                                    "{broken", "{\"messages\": [{}]}", "{\"messages\": [{\"role\": \"assistant\"}]}",
                                    "a \xff b"};
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    assert_int_equal(qtr_workload_read(&w, bad[i], strlen(bad[i]), 4, &err), QTR_ERR_FORMAT);
    qtr_workload_free(&w);
  }
}

static void test_chunks(void **state) {
  (void)state;
  static const struct {
    const char *data;
    bool ok, token, end;
    int32_t n_output;
    const char *error;
  } c[] = {
      {"[DONE]", true, false, true, -1, ""},
      {"{\"choices\":[{\"text\":\"a\"}]}", true, true, false, -1, ""},
      {"{\"choices\":[{\"text\":\"\",\"finish_reason\":null}]}", true, true, false, -1, ""}, /* half a character */
      {"{\"choices\":[{\"text\":\"\",\"finish_reason\":\"length\"}]}", true, false, true, -1, ""},
      {"{\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}", true, false, false, -1, ""},
      {"{\"choices\":[{\"delta\":{\"content\":\"x\"}}]}", true, true, false, -1, ""},
      {"{\"choices\":[{\"text\":\"\\u0000\"}]}", true, true, false, -1, ""}, /* a byte of zero is text */
      {"{\"choices\":[{\"delta\":{\"content\":\"\\u0000\"}}]}", true, true, false, -1, ""},
      {"{\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":9}}", true, false, false, 9, ""},
      {"{\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":-9}}", true, false, false, -1, ""},
      {"{\"error\":{\"message\":\"the GPU is gone\"}}", true, false, false, -1, "the GPU is gone"},
      {"{\"error\":\"plain\"}", true, false, false, -1, "plain"},
      {"{\"error\":null,\"choices\":[{\"text\":\"a\"}]}", true, true, false, -1, ""},
      {"[1]", false, false, false, -1, ""},
      {"nonsense", false, false, false, -1, ""},
      {"", false, false, false, -1, ""},
      {"{\"choices\":5,\"usage\":[1]}", true, false, false, -1, ""},
  };
  for (size_t i = 0; i < sizeof c / sizeof c[0]; i++) {
    struct qtr_load_chunk chunk;
    assert_int_equal(qtr_load_chunk_read(c[i].data, strlen(c[i].data), &chunk), c[i].ok);
    if (!c[i].ok) continue;
    assert_int_equal(chunk.token, c[i].token);
    assert_int_equal(chunk.end, c[i].end);
    assert_int_equal(chunk.n_output, c[i].n_output);
    assert_string_equal(chunk.error, c[i].error);
  }
}

/* The quick way must know what servers send, and say what the thorough way says; what is odd it must leave to that. */
static void test_chunks_plain(void **state) {
  (void)state;
  static const char *const plain[] = {
      "{\"id\":\"cmpl-1\",\"object\":\"text_completion\",\"created\":1,\"model\":\"demo\",\"choices\":[{\"index\":0,"
      "\"text\":\" a\","
      "\"logprobs\":null,\"finish_reason\":null}]}",
      "{\"id\":\"x\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"\\n\\\"\"},\"logprobs\":null,\"finish_reason\":null}"
      "],"
      "\"usage\":null}",
      "{\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}",
      "{\"choices\":[{\"delta\":{\"content\":null,\"reasoning_content\":\"hm\"}}]}",
      "{\"choices\":[{\"finish_reason\":\"length\",\"delta\":{}}],\"created\":1763700000,\"timings\":{\"ms\":1.5e-3}}",
      "{\"choices\":[{\"text\":\"\",\"finish_reason\":\"stop\"}]}",
      "{\"choices\":[{\"text\":\"\"}]}",
      " { \"choices\" : [ ] , \"error\" : null , \"x\" : [ true , false , [ ] , { } , -0.5 , 0 ] } ",
      "{\"choices\":[{\"text\":\"a\"},{\"text\":\"\"}]}",
      "{}"};
  static const char *const odd[] = {"",
                                    "{",
                                    "[]",
                                    "{} x",
                                    "{\"choices\":[{\"text\":null}]}",
                                    "{\"choices\":[{\"text\":\"\\u00e4\"}]}",
                                    "{\"choices\":[{\"text\":\"\xc3\xa4\"}]}",
                                    "{\"choices\":[{\"text\":\"a\",\"text\":\"\"}]}",
                                    "{\"choices\":[],\"usage\":{\"completion_tokens\":1}}",
                                    "{\"error\":{\"message\":\"no\"}}",
                                    "{\"choices\":[{\"\\u0074ext\":\"a\"}]}",
                                    "{\"choices\":5}",
                                    "{\"choices\":[5]}",
                                    "{\"a\":01}",
                                    "{\"a\":1.}",
                                    "{\"a\":-}",
                                    "{\"a\":1e999}",
                                    "{\"a\":99999999999999999999}",
                                    "{\"a\":tru}",
                                    "{\"a\":\"\t\"}",
                                    "{\"a\":\"\\x\"}",
                                    "{\"a\":[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]}",
                                    "{\"a\" 1}",
                                    "{\"a\":1,}"};
  struct qtr_load_chunk a, b;
  for (size_t i = 0; i < sizeof plain / sizeof plain[0]; i++) {
    size_t len = strlen(plain[i]);
    assert_true(qtr_load_chunk_read_plain(plain[i], len, &a));
    assert_true(qtr_load_chunk_read_tree(plain[i], len, &b));
    assert_int_equal(a.token, b.token);
    assert_int_equal(a.end, b.end);
    assert_int_equal(a.n_input, b.n_input);
    assert_int_equal(a.n_output, b.n_output);
    assert_string_equal(a.error, b.error);
    for (size_t cut = 0; cut + 1 < len; cut++) { /* the last of the eighth is a space */
      char *part = malloc(cut + 1);              /* a copy that ends there, for ASan */
      assert_non_null(part);
      memcpy(part, plain[i], cut);
      assert_false(qtr_load_chunk_read_plain(part, cut, &a));
      free(part);
    }
  }
  for (size_t i = 0; i < sizeof odd / sizeof odd[0]; i++)
    assert_false(qtr_load_chunk_read_plain(odd[i], strlen(odd[i]), &a));
}

static void test_urls(void **state) {
  (void)state;
  static const struct {
    const char *url, *host, *port, *prefix;
  } good[] = {{"http://127.0.0.1:8080", "127.0.0.1", "8080", ""},
              {"http://x/v1", "x", "80", ""},
              {"http://x:1/v1/", "x", "1", ""},
              {"HTTP://[::1]:99/a/b/v1", "::1", "99", "/a/b"},
              {"http://host.example/prefix/", "host.example", "80", "/prefix"},
              {"https://x/v1", "x", "443", ""}};
  for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
    struct qtr_load_url u;
    struct qtr_error err;
    assert_int_equal(qtr_load_url_parse(good[i].url, &u, &err), QTR_OK);
    assert_string_equal(u.host, good[i].host);
    assert_string_equal(u.port, good[i].port);
    assert_string_equal(u.prefix, good[i].prefix);
    assert_int_equal(u.tls, strncmp(good[i].url, "https", 5) == 0);
  }
  static const char *const bad[] = {"",
                                    "x",
                                    "ftp://x",
                                    "https://",
                                    "http://",
                                    "http://:80",
                                    "http://x:",
                                    "http://x:0",
                                    "http://x:65536",
                                    "http://x:8a",
                                    "http://u:p@x/",
                                    "http://[::1",
                                    "http://a b",
                                    "http://x\r\ny",
                                    "http://x/y z",
                                    "http://x/?q=1",
                                    "http://[::1]x:80"};
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    struct qtr_load_url u;
    struct qtr_error err;
    if (!qtr_load_url_parse(bad[i], &u, &err)) fail_msg("taken: %s", bad[i]);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_percentiles), cmocka_unit_test(test_slo),          cmocka_unit_test(test_summary),
      cmocka_unit_test(test_prompts),     cmocka_unit_test(test_poisson),      cmocka_unit_test(test_dataset),
      cmocka_unit_test(test_chunks),      cmocka_unit_test(test_chunks_plain), cmocka_unit_test(test_urls)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
