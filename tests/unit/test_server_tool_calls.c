/* test_server_tool_calls.c - calls of tools in text, in whatever pieces it comes. */
#include "server/tool_calls.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* The same text in pieces of every size gives this content and these calls ("name arguments|…"). */
static void expect(enum qtr_tool_format format, const char *text, const char *content, const char *calls) {
  size_t n = strlen(text);
  for (size_t piece = 1; piece <= n + 1; piece++) {
    struct qtr_tool_parser p = {.format = format, .id_seed = 5};
    struct qtr_buffer out = {0}, got = {0};
    for (size_t at = 0; at < n; at += piece) qtr_tool_feed(&p, text + at, n - at < piece ? n - at : piece, false, &out);
    qtr_tool_feed(&p, "", 0, true, &out);
    for (size_t i = 0; i < p.n_calls; i++) {
      qtr_buffer_printf(&got, "%s%s %s", i > 0 ? "|" : "", p.call[i].name, p.call[i].arguments);
      for (size_t k = 0; k < i; k++) assert_string_not_equal(p.call[i].id, p.call[k].id);
    }
    assert_string_equal(out.data ? out.data : "", content);
    assert_string_equal(got.data ? got.data : "", calls);
    qtr_buffer_free(&out);
    qtr_buffer_free(&got);
    qtr_tool_parser_free(&p);
  }
}

static void test_tags(void **state) {
  (void)state;
  enum qtr_tool_format f = QTR_TOOL_TAGS;
  expect(f, "plain text", "plain text", "");
  expect(f, "a < b and <tool_cal", "a < b and <tool_cal", "");
  expect(f, "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>", "", "f {\"x\": 1}");
  expect(f, "Sure.\n<tool_call>{\"name\":\"f\",\"arguments\":{}}</tool_call>\n<tool_call>{\"name\":\"g\"}</tool_call>\n",
         "Sure.\n", "f {}|g {}");
  expect(f, "<tool_call>{\"name\":\"f\",\"arguments\":\"{}\"}</tool_call> done", " done", "f {}");
  expect(f, "<tool_call>{\"name\":\"f\",\"arguments\":{}}", "", "f {}"); /* ended early */
  expect(f, "<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", "");
  expect(f, "<tool_call>{\"name\":5}", "<tool_call>{\"name\":5}", "");
  expect(f, "<tool_call>{\"name\":\"f\",\"arguments\":{\"a\":\"</tool\"}}</tool_call>", "", "f {\"a\": \"</tool\"}");
}

static void test_json(void **state) {
  (void)state;
  enum qtr_tool_format f = QTR_TOOL_OBJECT;
  expect(f, "plain {text}", "plain {text}", "");
  expect(f, "{\"name\": \"f\", \"parameters\": {\"x\": [1]}}", "", "f {\"x\": [1]}");
  expect(f, " <|python_tag|>{\"name\": \"f\", \"parameters\": {}}", "", "f {}");
  expect(f, "{\"name\":\"f\",\"parameters\":{}}; {\"name\":\"g\",\"arguments\":{}}\n", "", "f {}|g {}");
  expect(f, "{\"answer\": 42}", "{\"answer\": 42}", "");
  expect(f, "{\"name\":\"f\",\"parameters\":{}} and more", "{\"name\":\"f\",\"parameters\":{}} and more", "");
  expect(f, "{\"name\":\"f\"", "{\"name\":\"f\"", "");
  expect(f, "  ", "  ", "");
  expect(QTR_TOOL_LIST, "[{\"name\":\"f\",\"arguments\":{\"a\":1}},{\"name\":\"g\",\"arguments\":{}}]", "",
         "f {\"a\": 1}|g {}");
  expect(QTR_TOOL_LIST, "[1, 2]", "[1, 2]", "");
  expect(QTR_TOOL_LIST, "[]", "[]", "");
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_tags), cmocka_unit_test(test_json)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
