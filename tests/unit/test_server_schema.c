/* test_server_schema.c - JSON Schema as an automaton: texts that fit are let through, byte by byte, others are not; what
 * cannot be kept is refused by name; what explodes is refused in time. */
#include "server/schema.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static struct qtr_grammar *compile(const char *schema_text, struct qtr_api_error *err) {
  json_t *schema = schema_text ? json_loads(schema_text, JSON_DECODE_ANY, NULL) : NULL;
  struct qtr_grammar *g = NULL;
  if (schema_text && !schema) fail_msg("not JSON: %s", schema_text);
  bool ok = qtr_grammar_from_schema(schema, "p", &g, err);
  assert_true(ok == (g != NULL));
  json_decref(schema);
  return g;
}

static bool fits(struct qtr_grammar *g, const char *text) {
  int32_t state = qtr_grammar_start(g);
  for (const char *c = text; *c && state != QTR_GRAMMAR_DEAD; c++) state = qtr_grammar_next(g, state, (unsigned char)*c);
  return qtr_grammar_accepts(g, state);
}

static void test_texts(void **state) {
  (void)state;
  static const struct {
    const char *schema;
    const char *good[8], *bad[10];
  } cases[] = {
      {NULL,
       {"{}", "{\"a\":1}", "{ \"a\" : [1, 2.5e-3, \"x\\n\\u00e9\\ud83d\\ude00\xc3\xa9\xf0\x9f\x98\x80\", null, true, {}] }",
        "{\n  \"a\": []\n}"},
       {"[]", "1", "{\"a\"}", "{\"a\":01}", "{\"a\":\"\x01\"}", "{\"a\":\"\\ud83d\"}", "{\"a\":\"\xc3\"}", "{\"a\":1,}",
        "{}x"}},
      {"true", {"1", "\"x\"", "[[]]", "-0.5", "{}"}, {"", "nul", "1 1", "+1", "-"}},
      {"{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"integer\"},\"b\":{\"type\":\"string\"},\"c\":{\"type\":"
       "\"boolean\"}},"
       "\"required\":[\"b\"]}",
       {"{\"b\":\"\"}", "{\"a\":-5,\"b\":\"x\"}", "{\"b\":\"x\",\"c\":true}", "{\"a\":0,\"b\":\"x\",\"c\":false}"},
       {"{}", "{\"a\":1}", "{\"b\":1}", "{\"a\":1.5,\"b\":\"\"}", "{\"b\":\"\",\"d\":1}", "{,\"b\":\"\"}",
        "{\"b\":\"\"\"c\":true}", "{\"a\":-0,\"b\":\"\"}", "{\"b\":\"\",}"}},
      {"{\"type\":\"object\",\"additionalProperties\":{\"type\":\"integer\"}}",
       {"{}", "{\"x\":1,\"y\":2}"},
       {"{\"x\":\"a\"}"}},
      {"{\"type\":\"object\",\"properties\":{}}", {"{}"}, {"{\"x\":1}"}},
      {"{\"type\":\"array\",\"items\":{\"enum\":[1,\"b\",null,[2]]},\"minItems\":1,\"maxItems\":3}",
       {"[1]", "[\"b\",null,[2]]", "[ 1, 1 ]"},
       {"[]", "[1,1,1,1]", "[2]", "[1,]"}},
      {"{\"prefixItems\":[{\"type\":\"integer\"},{\"type\":\"null\"}]}",
       {"[5,null]"},
       {"[5]", "[null,5]", "[5,null,1]", "[]"}},
      {"{\"type\":\"string\",\"minLength\":2,\"maxLength\":3}",
       {"\"ab\"", "\"\xc3\xa9\xe2\x82\xac\\n\"", "\"\\u0041bc\""},
       {"\"a\"", "\"abcd\"", "\"\""}},
      {"{\"type\":\"integer\",\"minimum\":-1,\"exclusiveMaximum\":12}",
       {"-1", "0", "9", "11"},
       {"-2", "12", "1.0", "-0", "01"}},
      {"{\"type\":\"integer\",\"minimum\":-1050,\"maximum\":98765}",
       {"-1050", "-999", "-1", "0", "7", "98765", "90000", "10000"},
       {"-1051", "98766", "99000", "100000", "-2000", "-0", "007", "1.0"}},
      {"{\"type\":\"integer\",\"minimum\":3,\"multipleOf\":7,\"maximum\":1000}",
       {"7", "14", "70", "994"},
       {"0", "3", "8", "71", "1001", "-7"}},
      {"{\"type\":\"integer\",\"maximum\":9223372036854775807}", {"0", "-5", "999999999999999"}, {"1e3", "1.5"}},
      {"{\"type\":\"number\",\"minimum\":0.5,\"exclusiveMaximum\":12.25}",
       {"0.5", "0.50", "0.51", "1", "12", "12.2", "12.2499", "3.75"},
       {"0.4", "0", "0.49999", "12.25", "12.250", "12.3", "13", "-1", "1e0"}},
      {"{\"type\":\"number\",\"exclusiveMinimum\":-1.5,\"maximum\":0}",
       {"0", "0.0", "-1", "-1.4", "-1.49999", "-0.001"},
       {"-1.5", "-1.50", "-2", "0.1", "1", "-0", "-0.0"}},
      {"{\"type\":\"string\",\"pattern\":\"^[A-Z]{2}\\\\d+(-x)?$\"}",
       {"\"AB1\"", "\"ZZ123-x\""},
       {"\"A1\"", "\"AB\"", "\"AB1-\"", "\"AB1-xx\"", "\"ab1\"", "\" AB1\""}},
      {"{\"type\":\"string\",\"pattern\":\"ab|^c|d$\"}",
       {"\"ab\"", "\"xxabyy\"", "\"c\"", "\"cx\"", "\"xd\"",
        "\"\xc3\xa9"
        "ab\\n\""},
       {"\"\"", "\"a\"", "\"xc\"", "\"dx\"", "\"ba\""}},
      {"{\"type\":\"string\",\"pattern\":\"^[^a-y\\\\s]*$\",\"minLength\":2,\"maxLength\":3}",
       {"\"zz\"", "\"z\xe2\x82\xac\xf0\x9f\x98\x80\"", "\"\\\"\\\\\""},
       {"\"z\"", "\"zzzz\"", "\"za\"", "\"z z\"", "\"z\\n\"", "\"\\u007a\\u007a\""}},
      {"{\"type\":\"string\",\"pattern\":\"^(?:a{2,3}|b)+?c{0}\\\\u00e9.$\"}",
       {"\"aa\xc3\xa9x\"", "\"baaab\xc3\xa9\\t\""},
       {"\"a\xc3\xa9x\"", "\"aac\xc3\xa9x\"", "\"aa\xc3\xa9\\n\"", "\"aaex\""}},
      {"{\"type\":\"string\",\"format\":\"date\"}",
       {"\"2026-11-21\"", "\"2024-02-28\"", "\"2023-12-31\"", "\"2023-04-30\""},
       {"\"2023-02-30\"", "\"2023-04-31\"", "\"2023-13-01\"", "\"2023-00-01\"", "\"23-01-01\"", "\"2023-1-1\""}},
      {"{\"type\":\"string\",\"format\":\"uuid\"}",
       {"\"123e4567-e89b-12d3-a456-426614174000\""},
       {"\"123e4567e89b12d3a456426614174000\"", "\"g23e4567-e89b-12d3-a456-426614174000\""}},
      {"{\"type\":\"string\",\"format\":\"no such one\"}", {"\"x\""}, {"1"}},
      {"{\"oneOf\":[{\"type\":\"integer\"},{\"type\":\"string\"},{\"properties\":{\"k\":{\"const\":\"a\"}},\"required\":["
       "\"k\"],"
       "\"type\":\"object\"},{\"properties\":{\"k\":{\"enum\":[\"b\",\"c\"]}},\"required\":[\"k\"],\"type\":\"object\"}]}",
       {"1", "\"x\"", "{\"k\":\"a\"}", "{\"k\":\"c\"}"},
       {"null", "{\"k\":\"d\"}", "{}"}},
      {"{\"type\":\"integer\",\"anyOf\":[{\"type\":\"number\",\"minimum\":10},{\"type\":\"string\"},{\"maximum\":-10}],"
       "\"maximum\":20}",
       {"10", "20", "-10", "-99"},
       {"9", "21", "-9", "\"a\"", "10.5"}},
      {"{\"type\":[\"string\",\"null\"],\"enum\":[\"a\",1,null]}", {"\"a\"", "null"}, {"1"}},
      {"{\"properties\":{\"a\":false,\"b\":{\"type\":\"null\"}}}", {"{}", "{\"b\":null}"}, {"{\"a\":1}"}},
      {"{\"$defs\":{\"n\":{\"type\":\"integer\",\"minimum\":0}},\"properties\":{\"a\":{\"$ref\":\"#/$defs/"
       "n\",\"maximum\":9}},"
       "\"required\":[\"a\"]}",
       {"{\"a\":0}", "{\"a\":9}"},
       {"{\"a\":10}", "{\"a\":-1}"}},
      {"{\"type\":\"integer\",\"minimum\":0}", {"0", "123456789012345"}, {"-1", "1234567890123456", "00"}},
      {"{\"type\":[\"number\",\"null\"]}", {"1", "-1.5E+10", "null", "0.25"}, {"\"1\"", "1.", ".5", "1e"}},
      {"{\"const\":{\"a\":[1]}}", {"{\"a\": [1]}"}, {"{\"a\":[2]}", "{}"}},
      {"{\"anyOf\":[{\"type\":\"null\"},{\"type\":\"boolean\"},{\"const\":\"t\"}]}",
       {"null", "true", "\"t\""},
       {"1", "\"u\""}},
      {"{\"$defs\":{\"n\":{\"type\":\"object\",\"properties\":{\"v\":{\"type\":\"integer\"},\"k\":{\"type\":\"array\","
       "\"items\":{"
       "\"$ref\":\"#/$defs/n\"}}},\"required\":[\"v\",\"k\"]}},\"$ref\":\"#/$defs/n\"}",
       {"{\"v\":1,\"k\":[]}", "{\"v\":1,\"k\":[{\"v\":2,\"k\":[{\"v\":3,\"k\":[]}]},{\"v\":4,\"k\":[]}]}"},
       {"{\"v\":1}", "{\"v\":1,\"k\":[1]}", "{\"v\":1,\"k\":[{}]}"}},
      {"{\"allOf\":[{\"properties\":{\"a\":{\"type\":\"integer\"}},\"required\":[\"a\"]},{\"properties\":{\"b\":{\"type\":"
       "\"null\"}},"
       "\"required\":[\"b\"]}],\"type\":\"object\"}",
       {"{\"a\":1,\"b\":null}"},
       {"{\"a\":1}", "{\"b\":null}"}},
      {"{\"type\":\"object\",\"properties\":{\"\\\"q\\\\\":{\"type\":\"null\"}},\"required\":[\"\\\"q\\\\\"]}",
       {"{\"\\\"q\\\\\":null}"},
       {"{\"q\":null}"}}};
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    struct qtr_api_error err;
    struct qtr_grammar *g = compile(cases[i].schema, &err);
    if (!g) fail_msg("%s: %s", cases[i].schema, err.message);
    for (size_t k = 0; k < 8 && cases[i].good[k]; k++) {
      if (!fits(g, cases[i].good[k])) fail_msg("%s does not take %s", cases[i].schema, cases[i].good[k]);
    }
    for (size_t k = 0; k < 10 && cases[i].bad[k]; k++) {
      if (fits(g, cases[i].bad[k])) fail_msg("%s takes %s", cases[i].schema, cases[i].bad[k]);
    }
    qtr_grammar_free(g);
  }
}

static void test_refusals(void **state) {
  (void)state;
  static const struct {
    const char *schema, *says;
  } bad[] = {{"{\"type\":\"string\",\"pattern\":\"(?=a)\"}", "looks ahead"},
             {"{\"type\":\"string\",\"pattern\":\"(a)\\\\1\"}", "back reference"},
             {"{\"type\":\"string\",\"pattern\":\"a\\\\b\"}", "\\b"},
             {"{\"type\":\"string\",\"pattern\":\"a^b\"}", "within"},
             {"{\"type\":\"string\",\"pattern\":\"(^a|b)c\"}", "within"},
             {"{\"type\":\"string\",\"pattern\":\"[a\"}", "without its ]"},
             {"{\"type\":\"string\",\"pattern\":\"(a\"}", "without its )"},
             {"{\"type\":\"string\",\"pattern\":\"a)\"}", "without its ("},
             {"{\"type\":\"string\",\"pattern\":\"*\"}", "repeats nothing"},
             {"{\"type\":\"string\",\"pattern\":\"^*\"}", "repeats ^"},
             {"{\"type\":\"string\",\"pattern\":\"a{2,1}\"}", "end is less"},
             {"{\"type\":\"string\",\"pattern\":\"a{99999}\"}", "1000"},
             {"{\"type\":\"string\",\"pattern\":\"(a{1000}){1000}\"}", "too large"},
             {"{\"type\":\"string\",\"pattern\":\"((((){1000}){1000}){1000}){1000}\"}", "too large"},
             {"{\"type\":\"string\",\"pattern\":\"[z-a]\"}", "range"},
             {"{\"type\":\"string\",\"pattern\":\"\\\\p{L}\"}", "escape"},
             {"{\"type\":\"string\",\"pattern\":\"\\\\\"}", "backslash"},
             {"{\"type\":\"string\",\"pattern\":5}", "string"},
             {"{\"type\":\"string\",\"pattern\":\"^a$\",\"minLength\":2}", "fits no string"},
             {"{\"type\":\"string\",\"pattern\":\"^[]$\"}", "no JSON fits"},
             {"{\"type\":\"integer\",\"multipleOf\":0.5}", "multipleOf"},
             {"{\"type\":\"number\",\"multipleOf\":1000}", "multipleOf"},
             {"{\"type\":\"integer\",\"minimum\":1e300}", "15"},
             {"{\"type\":\"integer\",\"exclusiveMinimum\":1,\"exclusiveMaximum\":2}", "no JSON fits"},
             {"{\"oneOf\":[{\"type\":\"integer\"},{\"type\":\"number\"}]}", "oneOf"},
             {"{\"oneOf\":[{\"const\":1},{\"const\":1.0}]}", "oneOf"},
             {"{\"enum\":[\"ab\"],\"minLength\":3}", "minLength"},
             {"{\"allOf\":[{\"properties\":{\"a\":{}},\"additionalProperties\":false},{\"properties\":{\"b\":{}}}]}",
              "additionalProperties"},
             {"{\"type\":\"integer\",\"minimum\":5,\"maximum\":4}", "minimum"},
             {"{\"type\":\"string\",\"maxLength\":100000}", "maxLength"},
             {"{\"type\":\"string\",\"minLength\":-1}", "minLength"},
             {"{\"type\":\"array\",\"uniqueItems\":true}", "uniqueItems"},
             {"{\"not\":{}}", "not"},
             {"{\"type\":\"object\",\"patternProperties\":{}}", "patternProperties"},
             {"{\"type\":\"object\",\"properties\":{},\"required\":[\"a\"]}", "required"},
             {"{\"type\":\"thing\"}", "type"},
             {"{\"type\":5}", "type"},
             {"{\"enum\":[]}", "enum"},
             {"{\"anyOf\":[]}", "anyOf"},
             {"{\"$ref\":\"http://x/y\"}", "$ref"},
             {"{\"$ref\":\"#/$defs/none\"}", "$ref"},
             {"{\"$ref\":\"#\"}", "no JSON fits"},
             {"{\"anyOf\":[{\"$ref\":\"#\"}]}", "no JSON fits"},
             {"{\"type\":\"object\",\"properties\":{\"a\":{\"$ref\":\"#\"}},\"required\":[\"a\"]}", "no JSON fits"},
             {"{\"allOf\":[{\"type\":\"null\"},{\"type\":\"string\"}]}", "no JSON fits"},
             {"{\"$defs\":{\"a\":{\"allOf\":[{\"$ref\":\"#/$defs/b\"}]},\"b\":{\"allOf\":[{\"$ref\":\"#/$defs/a\"}]}},"
              "\"$ref\":\"#/$defs/a\"}",
              "allOf"},
             {"{\"properties\":{\"a\":3}}", "neither"},
             {"{\"properties\":{\"a\":false},\"required\":[\"a\"]}", "no JSON fits"},
             {"false", "no JSON fits"},
             {"5", "neither"}};
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    struct qtr_api_error err;
    struct qtr_grammar *g = compile(bad[i].schema, &err);
    if (g) fail_msg("%s was accepted", bad[i].schema);
    assert_int_equal(err.http, 400);
    assert_string_equal(err.param, "p");
    if (!strstr(err.message, bad[i].says)) fail_msg("%s: %s", bad[i].schema, err.message);
  }
}

/* Sixty definitions, each naming the next one twice: written out it would be 2^60 schemas. */
static void test_explosions(void **state) {
  (void)state;
  static const char *const forms[] = {
      "{\"anyOf\":[{\"$ref\":\"#/$defs/d%d\"},{\"$ref\":\"#/$defs/d%d\"}]}",
      "{\"allOf\":[{\"$ref\":\"#/$defs/d%d\"},{\"$ref\":\"#/$defs/d%d\"}]}",
      "{\"type\":\"array\",\"prefixItems\":[{\"$ref\":\"#/$defs/d%d\"},{\"$ref\":\"#/$defs/d%d\"}]}"};
  for (size_t f = 0; f < 3; f++) {
    char *text = malloc(16384);
    assert_non_null(text);
    size_t n = (size_t)sprintf(text, "{\"$defs\":{\"d60\":{\"type\":\"string\"}");
    for (int i = 0; i < 60; i++) {
      n += (size_t)sprintf(text + n, ",\"d%d\":", i);
      n += (size_t)snprintf(text + n, 200, forms[f], i + 1, i + 1);
    }
    (void)sprintf(text + n, "},\"$ref\":\"#/$defs/d0\"}");
    struct qtr_api_error err;
    struct qtr_grammar *g = compile(text, &err);
    if (g) assert_true(f != 1 && qtr_grammar_states(g) < 100);
    qtr_grammar_free(g);
    free(text);
  }
  /* deep values meet the limits of the automaton, not those of the machine */
  struct qtr_api_error err;
  struct qtr_grammar *g = compile("true", &err);
  assert_non_null(g);
  int32_t at = qtr_grammar_start(g);
  for (int i = 0; i < 200000; i++) at = qtr_grammar_next(g, at, '[');
  assert_true(at == QTR_GRAMMAR_DEAD && qtr_grammar_failed(g));
  assert_true(qtr_grammar_bytes(g) < (size_t)256 << 20);
  qtr_grammar_free(g);
}

/* Walks at random through what the automaton allows: every text that may end is JSON, and fits what jansson reads of it. */
static void test_walks(void **state) {
  (void)state;
  static const char schema[] =
      "{\"type\":\"object\",\"properties\":{\"s\":{\"type\":\"string\",\"maxLength\":3},\"n\":{\"type\":\"number\"},\"l\":{"
      "\"type\":"
      "\"array\",\"items\":{\"type\":\"integer\",\"minimum\":0,\"maximum\":20},\"maxItems\":3},\"e\":{\"enum\":[\"x\",\"y\"]"
      "}},"
      "\"required\":[\"n\",\"e\"]}";
  struct qtr_api_error err;
  struct qtr_grammar *g = compile(schema, &err);
  assert_non_null(g);
  uint32_t seed = 1;
  for (int round = 0; round < 2000; round++) {
    char text[4096];
    size_t n = 0;
    int32_t at = qtr_grammar_start(g);
    while (n < sizeof text - 1) {
      unsigned char can[256];
      int32_t to[256];
      int n_can = 0;
      for (int c = 0; c < 256; c++) {
        to[c] = qtr_grammar_next(g, at, (unsigned char)c);
        if (to[c] != QTR_GRAMMAR_DEAD) can[n_can++] = (unsigned char)c;
      }
      if (n_can == 0) break;
      seed = seed * 1664525u + 1013904223u;
      unsigned char c = can[(seed >> 8) % (uint32_t)n_can];
      text[n++] = (char)c;
      at = to[c];
    }
    assert_true(qtr_grammar_accepts(g, at));
    json_error_t where;
    json_t *value = json_loadb(text, n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &where);
    if (!value && !strstr(where.text, "real number overflow")) fail_msg("%.*s: %s", (int)n, text, where.text);
    if (!value) continue;
    assert_true(json_is_number(json_object_get(value, "n")));
    assert_true(json_is_string(json_object_get(value, "e")));
    const json_t *list = json_object_get(value, "l");
    assert_true(json_array_size(list) <= 3);
    for (size_t i = 0; i < json_array_size(list); i++) assert_true(json_integer_value(json_array_get(list, i)) <= 20);
    json_decref(value);
  }
  qtr_grammar_free(g);
}

static void test_tools(void **state) {
  (void)state;
  json_t *tools = json_loads(
      "[{\"function\":{\"name\":\"f\",\"parameters\":{\"$defs\":{\"c\":{\"type\":\"null\"}},\"type\":\"object\","
      "\"properties\":{\"a\":{\"$ref\":\"#/$defs/c\"}},\"required\":[\"a\"]}}},{\"function\":{\"name\":\"g\"}}]",
      0, NULL);
  struct qtr_api_error err;
  struct qtr_grammar *g;
  assert_true(qtr_grammar_for_tools(tools, NULL, "arguments", "<t>", "</t>", &g, &err));
  assert_true(fits(g, "<t>{\"name\": \"f\", \"arguments\": {\"a\": null}}</t>"));
  assert_true(fits(g, "<t>{\"name\": \"g\", \"arguments\": {}}</t>"));
  assert_false(fits(g, "<t>{\"name\": \"g\", \"arguments\": {\"a\": null}}</t>"));
  assert_false(fits(g, "<t>{\"name\": \"h\", \"arguments\": {}}</t>"));
  qtr_grammar_free(g);
  assert_true(qtr_grammar_for_tools(tools, "g", "parameters", "", "", &g, &err));
  assert_true(fits(g, "{\"name\": \"g\", \"parameters\": {}}"));
  assert_false(fits(g, "{\"name\": \"f\", \"parameters\": {\"a\": null}}"));
  qtr_grammar_free(g);
  json_decref(tools);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_texts), cmocka_unit_test(test_refusals),
                                     cmocka_unit_test(test_explosions), cmocka_unit_test(test_walks),
                                     cmocka_unit_test(test_tools)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
