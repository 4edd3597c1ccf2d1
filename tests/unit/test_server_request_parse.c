/* test_server_request_parse.c - bodies of requests: what they mean, and which member an error names. */
#include "server/buffer.h"
#include "server/request_parse.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const struct qtr_api_defaults defaults = {
    .sampling = {.temperature = 0.7f, .top_k = -1, .top_p = 0.9f, .repetition_penalty = 1}, .max_tokens = 99};

static bool parse(enum qtr_api_kind kind, const char *text, struct qtr_api_request *r, struct qtr_api_error *err) {
  return qtr_api_parse(kind, text, strlen(text), &defaults, r, err);
}

#define USER "\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]"

static void test_completion(void **state) {
  (void)state;
  struct qtr_api_request r;
  struct qtr_api_error err;
  assert_true(parse(QTR_API_COMPLETION, "{\"prompt\":\"p\"}", &r, &err));
  assert_int_equal(r.n_prompts, 1);
  assert_string_equal(r.prompt[0].text, "p");
  assert_int_equal(r.options.max_tokens, 16);
  assert_int_equal(r.options.n, 1);
  assert_int_equal(r.options.logprobs, -1);
  assert_float_equal(r.options.sampling.temperature, 0.7, 1e-6);
  assert_false(r.stream || r.echo || r.logprobs || r.options.sampling.has_seed);
  qtr_api_request_free(&r);

  assert_true(
      parse(QTR_API_COMPLETION,
            "{\"model\":\"m\",\"prompt\":[[1,2],[3]],\"temperature\":0,\"top_p\":0.5,\"top_k\":0,\"min_p\":0.25,\"n\":3.0,"
            "\"presence_penalty\":-1,\"frequency_penalty\":2,\"repetition_penalty\":1.5,\"seed\":-5,\"max_tokens\":7,"
            "\"stop\":\"x\",\"stop_token_ids\":[4,5],\"logit_bias\":{\"12\":-100,\"0\":3.5},\"logprobs\":4,\"stream\":true,"
            "\"stream_options\":{\"include_usage\":true,\"other\":1},\"echo\":false,\"user\":\"u\",\"ignore_eos\":true,"
            "\"best_of\":3,\"suffix\":null,\"unknown\":{}}",
            &r, &err));
  assert_string_equal(r.model, "m");
  assert_int_equal(r.n_prompts, 2);
  assert_null(r.prompt[0].text);
  assert_int_equal(r.prompt[0].n_token, 2);
  assert_int_equal(r.prompt[1].token[0], 3);
  const struct qtr_request_options *o = &r.options;
  assert_float_equal(o->sampling.temperature, 0, 0);
  assert_int_equal(o->sampling.top_k, -1);
  assert_float_equal(o->sampling.min_p, 0.25, 0);
  assert_float_equal(o->sampling.presence_penalty, -1, 0);
  assert_float_equal(o->sampling.frequency_penalty, 2, 0);
  assert_float_equal(o->sampling.repetition_penalty, 1.5, 0);
  assert_true(o->sampling.has_seed && o->sampling.seed == (uint64_t)-5);
  assert_int_equal(o->n, 3);
  assert_int_equal(o->max_tokens, 7);
  assert_int_equal(o->n_stop, 1);
  assert_string_equal(o->stop[0], "x");
  assert_int_equal(o->n_stop_token, 2);
  assert_int_equal(o->stop_token[1], 5);
  assert_int_equal(o->n_logit_bias, 2);
  assert_int_equal(o->logit_bias[0].token, 12);
  assert_float_equal(o->logit_bias[1].bias, 3.5, 0);
  assert_int_equal(o->logprobs, 4);
  assert_true(r.logprobs && r.stream && r.include_usage && o->ignore_eos);
  qtr_api_request_free(&r);
}

static void test_chat(void **state) {
  (void)state;
  struct qtr_api_request r;
  struct qtr_api_error err;
  assert_true(parse(QTR_API_CHAT, "{" USER ",\"max_tokens\":5,\"max_completion_tokens\":6,\"logprobs\":true}", &r, &err));
  assert_int_equal(r.options.max_tokens, 6);
  assert_int_equal(r.options.logprobs, 0);
  assert_int_equal(r.tool_choice, QTR_TOOLS_NONE);
  qtr_api_request_free(&r);
  /* content in parts, developer, past calls, tools */
  assert_true(
      parse(QTR_API_CHAT,
            "{\"messages\":[{\"role\":\"developer\",\"content\":[{\"type\":\"text\",\"text\":\"a\"},{\"type\":\"text\","
            "\"text\":\"b\"}]},{\"role\":\"assistant\",\"content\":null,\"tool_calls\":[{\"id\":\"c\",\"type\":\"function\","
            "\"function\":{\"name\":\"f\",\"arguments\":\"{\\\"x\\\":1}\"}}]},{\"role\":\"tool\",\"tool_call_id\":\"c\","
            "\"content\":\"42\"}],\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"parameters\":{}}}],"
            "\"tool_choice\":{\"type\":\"function\",\"function\":{\"name\":\"f\"}}}",
            &r, &err));
  char *text = json_dumps(r.messages, JSON_COMPACT | JSON_SORT_KEYS);
  assert_string_equal(
      text,
      "[{\"content\":\"a\\nb\",\"role\":\"system\"},{\"content\":\"\",\"role\":\"assistant\",\"tool_calls\":[{"
      "\"function\":{\"arguments\":{\"x\":1},\"name\":\"f\"},\"id\":\"c\",\"type\":\"function\"}]},"
      "{\"content\":\"42\",\"role\":\"tool\",\"tool_call_id\":\"c\"}]");
  free(text);
  assert_int_equal(r.tool_choice, QTR_TOOLS_NAMED);
  assert_string_equal(r.tool_name, "f");
  assert_int_equal(r.options.max_tokens, 99);
  qtr_api_request_free(&r);
  assert_true(parse(QTR_API_CHAT,
                    "{" USER
                    ",\"response_format\":{\"type\":\"json_schema\",\"json_schema\":{\"name\":\"n\",\"schema\":{\"type\":"
                    "\"object\"}}}}",
                    &r, &err));
  assert_int_equal(r.format, QTR_FORMAT_SCHEMA);
  assert_true(json_is_object(r.schema));
  qtr_api_request_free(&r);
}

/* Every member of a wrong type or value is a 400 that names it. */
static void test_errors(void **state) {
  (void)state;
  static const struct {
    enum qtr_api_kind kind;
    const char *members, *param;
  } bad[] = {
      {QTR_API_CHAT, "\"temperature\":\"1\"", "temperature"},
      {QTR_API_CHAT, "\"temperature\":-0.1", "temperature"},
      {QTR_API_CHAT, "\"temperature\":1e300", "temperature"},
      {QTR_API_CHAT, "\"top_p\":0", "top_p"},
      {QTR_API_CHAT, "\"top_p\":1.01", "top_p"},
      {QTR_API_CHAT, "\"top_k\":-2", "top_k"},
      {QTR_API_CHAT, "\"top_k\":1.5", "top_k"},
      {QTR_API_CHAT, "\"top_k\":4294967296", "top_k"},
      {QTR_API_CHAT, "\"top_k\":9223372036854775807", "top_k"},
      {QTR_API_CHAT, "\"min_p\":2", "min_p"},
      {QTR_API_CHAT, "\"repetition_penalty\":0", "repetition_penalty"},
      {QTR_API_CHAT, "\"presence_penalty\":-2.1", "presence_penalty"},
      {QTR_API_CHAT, "\"frequency_penalty\":true", "frequency_penalty"},
      {QTR_API_CHAT, "\"n\":0", "n"},
      {QTR_API_CHAT, "\"n\":65", "n"},
      {QTR_API_CHAT, "\"n\":-9223372036854775808", "n"},
      {QTR_API_CHAT, "\"best_of\":2", "best_of"},
      {QTR_API_CHAT, "\"best_of\":\"x\"", "best_of"},
      {QTR_API_CHAT, "\"seed\":1.5", "seed"},
      {QTR_API_CHAT, "\"seed\":\"1\"", "seed"},
      {QTR_API_CHAT, "\"max_tokens\":0", "max_tokens"},
      {QTR_API_CHAT, "\"max_tokens\":-1", "max_tokens"},
      {QTR_API_CHAT, "\"max_tokens\":2147483648", "max_tokens"},
      {QTR_API_CHAT, "\"max_completion_tokens\":[]", "max_completion_tokens"},
      {QTR_API_CHAT, "\"stop\":1", "stop"},
      {QTR_API_CHAT, "\"stop\":\"\"", "stop"},
      {QTR_API_CHAT, "\"stop\":[\"a\",null]", "stop"},
      {QTR_API_CHAT, "\"stop\":[1,2,3,4,5,6,7,8,9,0,1,2,3,4,5,6,7]", "stop"},
      {QTR_API_CHAT, "\"stop_token_ids\":[-1]", "stop_token_ids"},
      {QTR_API_CHAT, "\"stop_token_ids\":{}", "stop_token_ids"},
      {QTR_API_CHAT, "\"logit_bias\":[]", "logit_bias"},
      {QTR_API_CHAT, "\"logit_bias\":{\"x\":1}", "logit_bias"},
      {QTR_API_CHAT, "\"logit_bias\":{\"-1\":1}", "logit_bias"},
      {QTR_API_CHAT, "\"logit_bias\":{\"01\":1}", "logit_bias"},
      {QTR_API_CHAT, "\"logit_bias\":{\"\":1}", "logit_bias"},
      {QTR_API_CHAT, "\"logit_bias\":{\"99999999999999999999\":1}", "logit_bias"},
      {QTR_API_CHAT, "\"logit_bias\":{\"1\":101}", "logit_bias"},
      {QTR_API_CHAT, "\"logit_bias\":{\"1\":\"a\"}", "logit_bias"},
      {QTR_API_CHAT, "\"logprobs\":1", "logprobs"},
      {QTR_API_CHAT, "\"top_logprobs\":1", "top_logprobs"},
      {QTR_API_CHAT, "\"logprobs\":true,\"top_logprobs\":21", "top_logprobs"},
      {QTR_API_CHAT, "\"stream\":1", "stream"},
      {QTR_API_CHAT, "\"stream_options\":{}", "stream_options"},
      {QTR_API_CHAT, "\"stream\":true,\"stream_options\":[]", "stream_options"},
      {QTR_API_CHAT, "\"stream\":true,\"stream_options\":{\"include_usage\":1}", "stream_options.include_usage"},
      {QTR_API_CHAT, "\"model\":5", "model"},
      {QTR_API_CHAT, "\"user\":5", "user"},
      {QTR_API_CHAT, "\"ignore_eos\":\"yes\"", "ignore_eos"},
      {QTR_API_CHAT, "\"response_format\":\"json\"", "response_format"},
      {QTR_API_CHAT, "\"response_format\":{}", "response_format.type"},
      {QTR_API_CHAT, "\"response_format\":{\"type\":\"xml\"}", "response_format.type"},
      {QTR_API_CHAT, "\"response_format\":{\"type\":\"json_schema\"}", "response_format.json_schema"},
      {QTR_API_CHAT, "\"response_format\":{\"type\":\"json_schema\",\"json_schema\":{}}",
       "response_format.json_schema.schema"},
      {QTR_API_CHAT, "\"tools\":{}", "tools"},
      {QTR_API_CHAT, "\"tools\":[5]", "tools[0]"},
      {QTR_API_CHAT, "\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"a b\"}}]", "tools[0]"},
      {QTR_API_CHAT, "\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"a\",\"parameters\":1}}]", "tools[0]"},
      {QTR_API_CHAT, "\"tool_choice\":\"auto\"", "tool_choice"},
      {QTR_API_CHAT, "\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"a\"}}],\"tool_choice\":\"b\"",
       "tool_choice"},
      {QTR_API_CHAT, "\"parallel_tool_calls\":3", "parallel_tool_calls"},
      {QTR_API_CHAT, "\"chat_template_kwargs\":3", "chat_template_kwargs"},
      {QTR_API_CHAT, "\"messages\":[]", "messages"},
      {QTR_API_CHAT, "\"messages\":{}", "messages"},
      {QTR_API_CHAT, "\"messages\":null", "messages"},
      {QTR_API_CHAT, "\"messages\":[1]", "messages[0]"},
      {QTR_API_CHAT, "\"messages\":[{\"content\":\"x\"}]", "messages[0].role"},
      {QTR_API_CHAT, "\"messages\":[{\"role\":\"user\"}]", "messages[0].content"},
      {QTR_API_CHAT, "\"messages\":[{\"role\":\"user\",\"content\":5}]", "messages[0].content"},
      {QTR_API_CHAT, "\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\"}]}]", "messages[0].content"},
      {QTR_API_CHAT, "\"messages\":[{\"role\":\"assistant\",\"tool_calls\":{}}]", "messages[0].tool_calls"},
      {QTR_API_CHAT, "\"messages\":[{\"role\":\"assistant\",\"tool_calls\":[1]}]", "messages[0].tool_calls"},
      {QTR_API_COMPLETION, "\"prompt\":null", "prompt"},
      {QTR_API_COMPLETION, "\"prompt\":5", "prompt"},
      {QTR_API_COMPLETION, "\"prompt\":[]", "prompt"},
      {QTR_API_COMPLETION, "\"prompt\":[[]]", "prompt"},
      {QTR_API_COMPLETION, "\"prompt\":[1,\"a\"]", "prompt"},
      {QTR_API_COMPLETION, "\"prompt\":[\"a\",1]", "prompt"},
      {QTR_API_COMPLETION, "\"prompt\":[[1],\"a\"]", "prompt"},
      {QTR_API_COMPLETION, "\"prompt\":[1.5]", "prompt"},
      {QTR_API_COMPLETION, "\"prompt\":[-1]", "prompt"},
      {QTR_API_COMPLETION, "\"prompt\":[2147483648]", "prompt"},
      {QTR_API_COMPLETION, "\"prompt\":\"a\",\"logprobs\":true", "logprobs"},
      {QTR_API_COMPLETION, "\"prompt\":\"a\",\"logprobs\":21", "logprobs"},
      {QTR_API_COMPLETION, "\"prompt\":\"a\",\"suffix\":\"b\"", "suffix"},
      {QTR_API_COMPLETION, "\"prompt\":[\"a\",\"a\",\"a\",\"a\",\"a\"],\"n\":64", "n"}};
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    struct qtr_api_request r;
    struct qtr_api_error err;
    char text[1024];
    bool own = strstr(bad[i].members, "\"messages\"") || bad[i].kind == QTR_API_COMPLETION;
    (void)snprintf(text, sizeof text, "{%s%s%s}", own ? "" : USER, own ? "" : ",", bad[i].members);
    if (parse(bad[i].kind, text, &r, &err)) fail_msg("%s was accepted", text);
    if (err.http != 400 || strcmp(err.param, bad[i].param) != 0) {
      fail_msg("%s: %d \"%s\" (%s)", text, err.http, err.param, err.message);
    }
    assert_true(strlen(err.message) > 0 && strcmp(err.type, "invalid_request_error") == 0);
    assert_null(r.root);
  }
}

static void test_hostile(void **state) {
  (void)state;
  struct qtr_api_request r;
  struct qtr_api_error err;
  static const char *const bad[] = {"",
                                    "x",
                                    "[]",
                                    "5",
                                    "{",
                                    "{\"prompt\":\"\xff\"}",
                                    "{\"prompt\":\"a\",\"model\":\"\\u0000\"}",
                                    "{\"prompt\":\"a\",\"stop\":\"b\\u0000\"}",
                                    "{\"prompt\":[1e400]}",
                                    "{\"prompt\":\"\\ud800\"}",
                                    "{\"prompt\":\"a\"} x"};
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    assert_false(parse(QTR_API_COMPLETION, bad[i], &r, &err));
    assert_int_equal(err.http, 400);
  }
  /* what nobody knows may hold what nobody could use */
  assert_true(parse(QTR_API_COMPLETION,
                    "{\"prompt\":\"a\\u0000b\",\"x\\u0000\":1,\"\\\\u0000\":2,\"y\":[123456789012345678901234567890]}", &r,
                    &err));
  assert_int_equal(r.prompt[0].len, 3);
  qtr_api_request_free(&r);
  size_t n = 300000;
  char *big = malloc(n + 64);
  assert_non_null(big);
  memset(big, '[', n);
  big[n] = 0;
  assert_false(parse(QTR_API_COMPLETION, big, &r, &err));
  assert_non_null(strstr(err.message, "deeper"));
  memcpy(big, "{\"a\":[", 6);
  for (size_t i = 6; i + 3 < n; i += 3) memcpy(big + i, "[],", 3);
  assert_false(parse(QTR_API_COMPLETION, big, &r, &err));
  assert_non_null(strstr(err.message, "arrays and objects"));
  /* arguments of past calls are JSON within JSON: the same bounds, for all of them together */
  static const char call[] = "{\"type\":\"function\",\"function\":{\"name\":\"f\",\"arguments\":\"";
  for (int deep = 0; deep < 2; deep++) {
    size_t at = (size_t)sprintf(big, "{\"messages\":[{\"role\":\"assistant\",\"tool_calls\":[");
    for (int k = 0; k < 3; k++) {
      at += (size_t)sprintf(big + at, "%s%s{", k ? "," : "", call);
      for (int b = 0; b < (deep ? 100 : 30000); b++) big[at++] = deep ? '[' : b % 2 ? ']' : '[';
      at += (size_t)sprintf(big + at, "\"}}");
    }
    (void)sprintf(big + at, "]}]}");
    bool taken = parse(QTR_API_CHAT, big, &r, &err);
    assert_true(taken == !deep);
    if (deep) assert_string_equal(err.param, "messages[0].tool_calls");
    qtr_api_request_free(&r);
  }
  /* brackets in strings are text */
  memset(big, '[', n);
  memcpy(big, "{\"prompt\":\"\\\"", 13);
  memcpy(big + n - 2, "\"}", 3);
  assert_true(parse(QTR_API_COMPLETION, big, &r, &err));
  qtr_api_request_free(&r);
  free(big);
}

/* An error's JSON is JSON, whatever was in the request and wherever the message was cut. */
static void test_error_text(void **state) {
  (void)state;
  for (size_t n = 590; n < 660; n++) {
    struct qtr_api_error err;
    struct qtr_buffer out = {0};
    char text[700];
    memset(text, 'a', n);
    (void)snprintf(text + n, sizeof text - n, "\xe2\x82\xac\xf0\x9f\x98\x80\"\\\n");
    (void)qtr_api_fail(&err, 400, "p\xc3\xa4", "%s", text);
    qtr_api_error_write(&err, &out);
    json_t *parsed = json_loadb(out.data, out.len, 0, NULL);
    assert_non_null(parsed);
    assert_string_equal(json_string_value(json_object_get(json_object_get(parsed, "error"), "param")), "p\xc3\xa4");
    json_decref(parsed);
    qtr_buffer_free(&out);
  }
}

static void test_tokenize(void **state) {
  (void)state;
  struct qtr_api_request r;
  struct qtr_api_error err;
  assert_true(parse(QTR_API_TOKENIZE, "{\"prompt\":\"abc\",\"add_special_tokens\":false}", &r, &err));
  assert_true(r.prompt[0].len == 3 && !r.add_special);
  qtr_api_request_free(&r);
  assert_true(parse(QTR_API_TOKENIZE, "{\"content\":\"ab\",\"temperature\":\"not ours\"}", &r, &err));
  assert_true(r.prompt[0].len == 2 && r.add_special);
  qtr_api_request_free(&r);
  assert_true(parse(QTR_API_TOKENIZE, "{" USER "}", &r, &err));
  assert_int_equal(json_array_size(r.messages), 1);
  assert_null(r.prompt);
  qtr_api_request_free(&r);
  assert_true(parse(QTR_API_DETOKENIZE, "{\"tokens\":[1,2,3]}", &r, &err));
  assert_int_equal(r.prompt[0].n_token, 3);
  qtr_api_request_free(&r);
  assert_false(parse(QTR_API_DETOKENIZE, "{}", &r, &err));
  assert_string_equal(err.param, "tokens");
  assert_false(parse(QTR_API_TOKENIZE, "{}", &r, &err));
  assert_string_equal(err.param, "prompt");
}

/* Every numeric member of the table: what is out of its range, of another kind, or larger than any number is refused by
 * name; its bounds are taken. A new member is tested by being in the table. */
static void test_numbers(void **state) {
  (void)state;
  static const char *const wrong[] = {"1e308",
                                      "-1e308",
                                      "9223372036854775807",
                                      "-9223372036854775808",
                                      "1e300",
                                      "-1e300",
                                      "123456789012345678901234567890",
                                      "-123456789012345678901234567890",
                                      "4294967296",
                                      "-4294967297",
                                      "\"1\"",
                                      "[1]",
                                      "{}",
                                      "true"};
  static const char *const never[] = {"1e400", "-1e400", "0x1", "NaN", "Infinity", "-Infinity", "01", "1.", "+1", "--1"};
  static const char *const rest[] = {USER, "\"prompt\":\"p\""};
  size_t n_fields, n_numeric = 0;
  const struct qtr_api_field *field = qtr_api_fields(&n_fields);
  for (size_t i = 0; i < n_fields; i++) {
    const struct qtr_api_field *f = &field[i];
    if (f->type != QTR_API_WHOLE && f->type != QTR_API_NUMBER) continue;
    n_numeric++;
    for (int kind = 0; kind < 2; kind++) {
      if (!(f->kinds & 1u << kind)) continue;
      for (size_t k = 0; k < sizeof wrong / sizeof wrong[0] + sizeof never / sizeof never[0] + 4; k++) {
        struct qtr_api_request r;
        struct qtr_api_error err;
        char body[256], value[64];
        size_t n_wrong = sizeof wrong / sizeof wrong[0], at = k - 4;
        bool good = k < 2 && !(k == 0 && f->open_min);
        if (k < 2)
          (void)snprintf(value, sizeof value, "%.17g", k ? f->max : f->min);
        else if (k < 4)
          (void)snprintf(value, sizeof value, "%.17g", k == 2 ? f->min - 1 : f->max + 1);
        else
          (void)snprintf(value, sizeof value, "%s", at < n_wrong ? wrong[at] : never[at - n_wrong]);
        (void)snprintf(body, sizeof body, "{%s,\"%s\":%s}", rest[kind], f->name, value);
        bool taken = parse((enum qtr_api_kind)kind, body, &r, &err);
        if (taken != good && !(good && f->note)) fail_msg("%s: %s", body, taken ? "taken" : err.message);
        bool json = k < 4 || at < n_wrong; /* else the body is no JSON at all */
        if (!taken && (err.http != 400 || (json && strcmp(err.param, f->name) != 0))) {
          fail_msg("%s: %d \"%s\" (%s)", body, err.http, err.param, err.message);
        }
        qtr_api_request_free(&r);
      }
    }
  }
  assert_true(n_numeric >= 12);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_completion), cmocka_unit_test(test_chat),
                                     cmocka_unit_test(test_errors),     cmocka_unit_test(test_hostile),
                                     cmocka_unit_test(test_error_text), cmocka_unit_test(test_tokenize),
                                     cmocka_unit_test(test_numbers)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
