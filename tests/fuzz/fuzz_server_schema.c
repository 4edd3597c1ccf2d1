/* fuzz_server_schema.c - input: a JSON Schema, a NUL, then choices. Compiling ends; what a walk through the automaton writes
 * under these choices is JSON where it may end. The same choices, as text, go to the parser of tool calls. */
#include "server/schema.h"
#include "server/tool_calls.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void walk(struct qtr_grammar *g, const uint8_t *choice, size_t n) {
  char text[512];
  size_t len = 0;
  int32_t at = qtr_grammar_start(g);
  for (size_t i = 0; i < n && len < sizeof text; i++) {
    int32_t to = qtr_grammar_next(g, at, choice[i]);
    unsigned char byte = choice[i];
    for (int tries = 0; to == QTR_GRAMMAR_DEAD && tries < 256; tries++) to = qtr_grammar_next(g, at, ++byte);
    if (to == QTR_GRAMMAR_DEAD) break;
    text[len++] = (char)byte;
    at = to;
  }
  if (!qtr_grammar_accepts(g, at)) return;
  json_error_t where;
  json_t *value = json_loadb(text, len, JSON_DECODE_ANY | JSON_ALLOW_NUL, &where);
  if (!value && !strstr(where.text, "overflow")) abort();
  json_decref(value);
}

static void parse_calls(const char *text, size_t len) {
  for (int format = 0; format < 3; format++) {
    struct qtr_tool_parser whole = {.format = (enum qtr_tool_format)format}, parts = whole;
    struct qtr_buffer a = {0}, b = {0};
    qtr_tool_feed(&whole, text, len, true, &a);
    for (size_t i = 0; i < len; i++) qtr_tool_feed(&parts, text + i, 1, false, &b);
    qtr_tool_feed(&parts, "", 0, true, &b);
    if (whole.n_calls != parts.n_calls || a.len != b.len || (a.len > 0 && memcmp(a.data, b.data, a.len) != 0)) abort();
    qtr_tool_parser_free(&whole);
    qtr_tool_parser_free(&parts);
    qtr_buffer_free(&a);
    qtr_buffer_free(&b);
  }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  const uint8_t *nul = size ? memchr(data, 0, size) : NULL;
  size_t n = nul ? (size_t)(nul - data) : size;
  json_t *schema = json_loadb((const char *)data, n, JSON_DECODE_ANY, NULL);
  struct qtr_api_error err;
  struct qtr_grammar *g = NULL;
  if (schema) {
    if (qtr_grammar_from_schema(schema, "p", &g, &err) != (g != NULL)) abort();
    if (!g && (!err.http || !err.message[0])) abort();
  }
  if (g && nul) walk(g, nul + 1, size - n - 1);
  qtr_grammar_free(g);
  json_decref(schema);
  if (nul) parse_calls((const char *)nul + 1, size - n - 1);
  return 0;
}
