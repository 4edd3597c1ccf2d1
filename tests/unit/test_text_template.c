/* Tests of chat templates: what jinja2 makes of every language feature and of templates in the style of each model family
 * (tests/golden/templates.json), errors that name their line, bounds, and the chat template of a model directory. */
#include "text/template.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

static json_t *golden; /* templates.json */

static enum qtr_status render(const char *source, size_t n, const json_t *variables, char **text, size_t *len,
                              struct qtr_error *err) {
  struct qtr_template *tpl = NULL;
  *text = NULL;
  *len = 0;
  enum qtr_status status = qtr_template_parse(source, n, &tpl, err);
  if (status == QTR_OK) status = qtr_template_render(tpl, variables, text, len, err);
  qtr_template_free(tpl);
  return status;
}

/* Renders one golden case and compares; true when it is as jinja2 has it. */
static bool check(const char *source, size_t n, const json_t *variables, const json_t *expected) {
  struct qtr_error err = {0};
  char *text;
  size_t len;
  enum qtr_status status = render(source, n, variables, &text, &len, &err);
  const json_t *want = json_object_get(expected, "text"), *raised = json_object_get(expected, "raised");
  bool good;
  if (want) {
    good = status == QTR_OK && len == json_string_length(want) && memcmp(text, json_string_value(want), len) == 0;
  } else if (raised) {
    good = status == QTR_ERR_ARGUMENT && strcmp(err.message, json_string_value(raised)) == 0;
  } else {
    good = status != QTR_OK && status != QTR_ERR_ARGUMENT && strncmp(err.message, "template line ", 14) == 0;
  }
  if (!good) {
    print_error("template: %.300s\n  expected: %.600s\n  found:    %.600s\n", source,
                want     ? json_string_value(want)
                : raised ? json_string_value(raised)
                         : "(refused)",
                status == QTR_OK ? text : err.message);
  }
  free(text);
  return good;
}

static void test_features(void **state) {
  (void)state;
  const json_t *cases = json_object_get(golden, "features");
  json_t *variables = json_object();
  size_t n_bad = 0, n = json_array_size(cases);
  assert_true(n > 200);
  for (size_t i = 0; i < n; i++) {
    const json_t *one = json_array_get(cases, i), *source = json_object_get(one, "template");
    n_bad += !check(json_string_value(source), json_string_length(source), variables, one);
  }
  json_decref(variables);
  assert_int_equal(n_bad, 0);
}

static char *read_file(const char *path, size_t *n) {
  FILE *f = fopen(path, "rb");
  assert_non_null(f);
  char *data = malloc(1 << 20);
  assert_non_null(data);
  *n = fread(data, 1, (1 << 20) - 1, f);
  data[*n] = 0;
  (void)fclose(f);
  return data;
}

static void test_families(void **state) {
  (void)state;
  const json_t *families = json_object_get(golden, "families"), *values = json_object_get(golden, "values");
  size_t n_bad = 0, n_run = 0;
  for (size_t i = 0; i < json_array_size(families); i++) {
    const json_t *family = json_array_get(families, i), *results = json_object_get(family, "results");
    char path[4096];
    size_t n;
    (void)snprintf(path, sizeof path, "%s/tests/golden/templates/%s", QTR_SOURCE_DIR,
                   json_string_value(json_object_get(family, "name")));
    char *source = read_file(path, &n);
    for (size_t k = 0; k < json_array_size(results); k++, n_run++) {
      const json_t *one = json_array_get(results, k);
      n_bad += !check(source, n, json_array_get(values, (size_t)json_integer_value(json_object_get(one, "values"))), one);
    }
    free(source);
  }
  assert_true(n_run > 500);
  assert_int_equal(n_bad, 0);
}

/* A template that must fail, with this status and these words in the message. */
static void refuses(const char *source, const char *variables, enum qtr_status status, const char *words) {
  struct qtr_error err = {0};
  json_t *values = json_loads(variables, 0, NULL);
  char *text;
  size_t len;
  assert_non_null(values);
  enum qtr_status found = render(source, strlen(source), values, &text, &len, &err);
  if (found != status || !strstr(err.message, words)) {
    fail_msg("%.200s: expected %s \"%s\", found %s \"%s\"", source, qtr_status_name(status), words, qtr_status_name(found),
             found == QTR_OK ? text : err.message);
  }
  assert_null(text);
  json_decref(values);
}

static void test_errors_name_the_line(void **state) {
  (void)state;
  refuses("a\n\n{{ 1 + }}", "{}", QTR_ERR_FORMAT, "template line 3: expected an expression, found '}}'");
  refuses("{% if x %}\n\nno end", "{}", QTR_ERR_FORMAT, "the block of line 1");
  refuses("\n{% frobnicate %}", "{}", QTR_ERR_FORMAT, "template line 2: unknown or misplaced tag 'frobnicate'");
  refuses("{#\n\n#}\n{{ 'abc }}", "{}", QTR_ERR_FORMAT, "template line 4: a string without its closing quote");
  refuses("\n\n{% include 'x' %}", "{}", QTR_ERR_UNSUPPORTED, "template line 3: the tag 'include'");
  refuses("x\n{{ messages[0].text.upper() }}", "{\"messages\": [{}]}", QTR_ERR_FORMAT,
          "template line 2: 'dict' has no attribute or element 'text'");
  refuses("x\n{%- for m in messages %}\n{{ m.role + m.content }}\n{% endfor %}", "{\"messages\": [{\"role\": \"user\"}]}",
          QTR_ERR_FORMAT, "template line 3: 'dict' has no attribute or element 'content'");
  refuses("{{ nothing.at_all }}", "{}", QTR_ERR_FORMAT, "'nothing' is undefined");
  refuses("{{ 1 }}\n{{ 'a' | frob }}", "{}", QTR_ERR_UNSUPPORTED, "template line 2: there is no filter named 'frob'");
  refuses("{{ 1 is frob }}", "{}", QTR_ERR_UNSUPPORTED, "no test named 'frob'");
  refuses("{{ [].append(1) }}", "{}", QTR_ERR_FORMAT, "unsafe");
  refuses("{{ raise_exception('my message') }}", "{}", QTR_ERR_ARGUMENT, "my message");
  refuses("{{ 9223372036854775807 + 1 }}", "{}", QTR_ERR_UNSUPPORTED, "64 bits");
  refuses("{{ 99999999999999999999 }}", "{}", QTR_ERR_UNSUPPORTED, "64 bits");
  refuses("{% for x in y recursive %}{% endfor %}", "{}", QTR_ERR_UNSUPPORTED, "recursive");
  refuses("ab\xff", "{}", QTR_ERR_FORMAT, "UTF-8 at byte 2");
  refuses("{{ '\\ud800' }}", "{}", QTR_ERR_FORMAT, "surrogate");
}

static char *repeat(const char *text, size_t n, const char *before, const char *after) {
  size_t len = strlen(text), n_before = strlen(before), n_after = strlen(after);
  char *out = malloc(n_before + n * len + n_after + 1);
  assert_non_null(out);
  memcpy(out, before, n_before);
  for (size_t i = 0; i < n; i++) memcpy(out + n_before + i * len, text, len);
  memcpy(out + n_before + n * len, after, n_after + 1);
  return out;
}

static void refuses_long(const char *text, size_t n, const char *before, const char *after, enum qtr_status status) {
  char *source = repeat(text, n, before, after);
  refuses(source, "{}", status, "");
  free(source);
}

static void test_bounds_of_the_parser(void **state) {
  (void)state;
  char *open = repeat("(", 200, "{{ ", "1"), *both = repeat(")", 200, open, " }}");
  refuses(both, "{}", QTR_ERR_LIMIT, "nested more than");
  free(open);
  free(both);
  refuses_long("[", 100000, "{{ ", "1 }}", QTR_ERR_LIMIT);
  refuses_long("{% if x %}", 1000, "", "", QTR_ERR_LIMIT);
  refuses_long("not ", 10000, "{{ ", "1 }}", QTR_ERR_LIMIT);
  refuses_long("- ", 10000, "{{ ", "1 }}", QTR_ERR_LIMIT);
  refuses_long(" + 1", 10000, "{{ 1", " }}", QTR_ERR_LIMIT);
  refuses_long(".a", 10000, "{{ a", " }}", QTR_ERR_LIMIT);
  refuses_long(" | e", 10000, "{{ a", " }}", QTR_ERR_LIMIT);
  refuses_long(" if 1 else 1", 10000, "{{ 1", " }}", QTR_ERR_LIMIT);
  refuses_long("a", (1 << 20) + 1, "", "", QTR_ERR_LIMIT);
  /* wide is fine where deep is not */
  char *source = repeat(" ~ 1", 10000, "{{ 1", " }}");
  json_t *variables = json_object();
  struct qtr_error err = {0};
  char *text;
  size_t len;
  assert_int_equal(render(source, strlen(source), variables, &text, &len, &err), QTR_OK);
  assert_int_equal(len, 10001);
  free(text);
  free(source);
  json_decref(variables);
}

static void test_bounds_of_the_evaluator(void **state) {
  (void)state;
  struct timespec start, end;
  (void)clock_gettime(CLOCK_MONOTONIC, &start);
  refuses("{{ range(100001) }}", "{}", QTR_ERR_LIMIT, "range");
  refuses("{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}", "{}", QTR_ERR_LIMIT, "steps");
  refuses("{{ 'x' * 100000000 }}", "{}", QTR_ERR_LIMIT, "16 MiB");
  refuses("{{ [1] * 100000000 }}", "{}", QTR_ERR_LIMIT, "list");
  refuses("{{ 'x' * 9223372036854775807 }}", "{}", QTR_ERR_LIMIT, "16 MiB");
  refuses("{% set s = 'xx' * 8000000 %}{{ s }}{{ s }}", "{}", QTR_ERR_LIMIT, "16 MiB");
  refuses("{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(50) %}{% set ns.s = ns.s + ns.s %}{% endfor %}", "{}",
          QTR_ERR_LIMIT, "16 MiB");
  refuses("{% set ns = namespace(l=[1]) %}{% for i in range(50) %}{% set ns.l = ns.l + ns.l %}{% endfor %}", "{}",
          QTR_ERR_LIMIT, "list");
  refuses("{% set s = 'ab' * 1000000 %}{% for i in range(1000) %}{{ s.replace('a', 'c') | length }}{% endfor %}", "{}",
          QTR_ERR_LIMIT, "");
  refuses("{% set s = 'ab' * 4000000 %}{% for i in range(10000) %}{% if 'zzz' in s %}{% endif %}{% endfor %}", "{}",
          QTR_ERR_LIMIT, "steps");
  refuses("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{}", QTR_ERR_LIMIT, "nested");
  refuses("{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}", "{}", QTR_ERR_LIMIT, "nested");
  refuses("{% set ns = namespace(l=[]) %}{% for i in range(1000) %}{% set ns.l = [ns.l] %}{% endfor %}{{ ns.l }}", "{}",
          QTR_ERR_LIMIT, "nested");
  refuses("{% set ns = namespace(l=[]) %}{% for i in range(1000) %}{% set ns.l = [ns.l] %}{% endfor %}{{ ns.l | tojson }}",
          "{}", QTR_ERR_LIMIT, "nested");
  refuses("{% set ns = namespace(l=[1]) %}{% for i in range(100) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
          "{}", QTR_ERR_LIMIT, "");
  refuses(
      "{% set a = namespace(l=[1]) %}{% for i in range(100) %}{% set a.l = [a.l, a.l] %}{% endfor %}"
      "{% set b = namespace(l=[1]) %}{% for i in range(100) %}{% set b.l = [b.l, b.l] %}{% endfor %}{{ a.l == b.l }}",
      "{}", QTR_ERR_LIMIT, "steps");
  refuses("{% set ns = namespace() %}{% set ns.me = ns %}{{ ns }}", "{}", QTR_ERR_LIMIT, "nested");
  refuses("{{ [[1]] | map('map', 'map', 'map', 'map', 'list') | map('list') | list }}{{ 1 / 0 }}", "{}", QTR_ERR_FORMAT, "");
  refuses("{{ 'x'.center(100000000) }}", "{}", QTR_ERR_LIMIT, "");
  refuses("{{ '%100000000d' % 1 }}", "{}", QTR_ERR_LIMIT, "width");
  refuses("{{ '{:100000000}'.format(1) }}", "{}", QTR_ERR_LIMIT, "width");
  refuses("{{ 10 ** 1000000000 }}", "{}", QTR_ERR_UNSUPPORTED, "64 bits");
  char *deep = repeat("[", 300, "{\"x\": ", ""), *open = deep;
  char *json = malloc(2000);
  assert_non_null(json);
  (void)snprintf(json, 2000, "%s%s}", open, strrchr(deep, '[') + 1);
  char *close = repeat("]", 300, json, "");
  close[strlen(close) - 301] = ' ';
  free(json);
  json = malloc(2000);
  assert_non_null(json);
  (void)snprintf(json, 2000, "%s}", close);
  refuses("{{ x }}", json, QTR_ERR_LIMIT, "nested more than");
  free(json);
  free(close);
  free(deep);
  (void)clock_gettime(CLOCK_MONOTONIC, &end);
  assert_true(end.tv_sec - start.tv_sec < 60); /* far below, but sanitizers and slow machines exist */
}

/* A string or list that grows in a loop costs what it gains, not what it is: 100,000 turns fit into the bounds. */
static void test_growing_is_linear(void **state) {
  (void)state;
  static const char source[] =
      "{% set ns = namespace(s='', l=[]) %}{% for i in range(50000) %}{% set ns.s = ns.s + 'some words here ' %}"
      "{% set ns.l = ns.l + [i] %}{% endfor %}{{ ns.s | length }} {{ ns.l | length }} {{ ns.l[49999] }} {{ ns.s[-5:] }}";
  struct qtr_error err = {0};
  json_t *variables = json_object();
  char *text;
  size_t len;
  assert_int_equal(render(source, sizeof source - 1, variables, &text, &len, &err), QTR_OK);
  assert_string_equal(text, "800000 50000 49999 here ");
  free(text);
  json_decref(variables);
}

static void test_broken_templates(void **state) {
  (void)state;
  /* every beginning of every family, and every one with a byte changed: an answer, whatever it is */
  static const char *const names[] = {"llama3_tools", "typed_tools", "parts", "mistral_tools"};
  const json_t *values = json_array_get(json_object_get(golden, "values"), 1);
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    char path[4096];
    size_t n;
    (void)snprintf(path, sizeof path, "%s/tests/golden/templates/%s.jinja", QTR_SOURCE_DIR, names[i]);
    char *source = read_file(path, &n);
    for (size_t k = 0; k < n; k++) {
      struct qtr_error err = {0};
      char *text, was = source[k];
      size_t len;
      (void)render(source, k, values, &text, &len, &err);
      free(text);
      source[k] = "{%}'-x"[k % 6];
      enum qtr_status status = render(source, n, values, &text, &len, &err);
      assert_true(status == QTR_OK || err.message[0]);
      free(text);
      source[k] = was;
    }
    free(source);
  }
}

static void test_no_error_struct(void **state) {
  (void)state;
  struct qtr_template *tpl = NULL;
  char *text = NULL;
  size_t len;
  json_t *variables = json_object(), *list = json_array();
  assert_int_equal(qtr_template_parse("{{", 2, &tpl, NULL), QTR_ERR_FORMAT);
  assert_int_equal(qtr_template_parse("{{ 1 / 0 }}", 11, &tpl, NULL), QTR_OK);
  assert_int_equal(qtr_template_render(tpl, variables, &text, &len, NULL), QTR_ERR_FORMAT);
  assert_int_equal(qtr_template_render(tpl, list, &text, &len, NULL), QTR_ERR_ARGUMENT);
  qtr_template_free(tpl);
  assert_int_equal(qtr_template_parse("", 0, &tpl, NULL), QTR_OK);
  assert_int_equal(qtr_template_render(tpl, variables, &text, &len, NULL), QTR_OK);
  assert_string_equal(text, "");
  free(text);
  qtr_template_free(tpl);
  qtr_template_free(NULL);
  json_decref(variables);
  json_decref(list);
}

static void test_nul_bytes(void **state) {
  (void)state;
  struct qtr_error err = {0};
  json_t *variables = json_pack("{s:o}", "x", json_stringn("a\0b", 3));
  char *text;
  size_t len;
  static const char source[] = "{{ x }}\0|{{ x | length }}";
  assert_int_equal(render(source, sizeof source - 1, variables, &text, &len, &err), QTR_OK);
  assert_int_equal(len, 6);
  assert_memory_equal(text, "a\0b\0|3", 7);
  free(text);
  json_decref(variables);
}

static void *render_many(void *tpl) {
  const json_t *values = json_object_get(golden, "values");
  for (int i = 0; i < 200; i++) {
    char *text = NULL;
    size_t len;
    (void)qtr_template_render(tpl, json_array_get(values, (size_t)i % json_array_size(values)), &text, &len, NULL);
    free(text);
  }
  return NULL;
}

static void test_threads_share_a_template(void **state) {
  (void)state;
  struct qtr_template *tpl = NULL;
  char path[4096];
  size_t n;
  (void)snprintf(path, sizeof path, "%s/tests/golden/templates/typed_tools.jinja", QTR_SOURCE_DIR);
  char *source = read_file(path, &n);
  assert_int_equal(qtr_template_parse(source, n, &tpl, NULL), QTR_OK);
  pthread_t threads[4];
  for (int i = 0; i < 4; i++) assert_int_equal(pthread_create(&threads[i], NULL, render_many, tpl), 0);
  for (int i = 0; i < 4; i++) assert_int_equal(pthread_join(threads[i], NULL), 0);
  qtr_template_free(tpl);
  free(source);
}

/* ---- the chat template of a directory -------------------------------------------------------- */

static void write_file(const char *dir, const char *name, const char *text) {
  char path[4200];
  (void)snprintf(path, sizeof path, "%s/%s", dir, name);
  FILE *f = fopen(path, "w");
  assert_non_null(f);
  (void)fputs(text, f);
  (void)fclose(f);
}

static void remove_file(const char *dir, const char *name) {
  char path[4200];
  (void)snprintf(path, sizeof path, "%s/%s", dir, name);
  (void)unlink(path);
}

static void renders_chat(const char *dir, const char *tools, const char *extra, const char *expected) {
  struct qtr_error err = {0};
  struct qtr_chat_template *chat = NULL;
  assert_int_equal(qtr_chat_template_open(dir, &chat, &err), QTR_OK);
  json_t *messages = json_loads("[{\"role\": \"user\", \"content\": \"hi\"}]", 0, NULL);
  json_t *tool_list = tools ? json_loads(tools, 0, NULL) : NULL, *more = extra ? json_loads(extra, 0, NULL) : NULL;
  char *text = NULL;
  size_t len;
  enum qtr_status status = qtr_chat_template_render(chat, messages, tool_list, true, more, &text, &len, &err);
  if (status != QTR_OK) fail_msg("%s", err.message);
  assert_string_equal(text, expected);
  assert_int_equal(len, strlen(expected));
  assert_int_equal(messages->refcount, 1);
  free(text);
  json_decref(messages);
  json_decref(tool_list);
  json_decref(more);
  qtr_chat_template_close(chat);
}

static void opens_not(const char *dir, enum qtr_status status, const char *words) {
  struct qtr_error err = {0};
  struct qtr_chat_template *chat = NULL;
  assert_int_equal(qtr_chat_template_open(dir, &chat, &err), status);
  assert_null(chat);
  if (!strstr(err.message, words)) fail_msg("%s: no \"%s\"", err.message, words);
}

static void test_chat_template(void **state) {
  (void)state;
  char dir[] = "/tmp/quattuor-chat-XXXXXX";
  assert_non_null(mkdtemp(dir));
  opens_not(dir, QTR_ERR_NOT_FOUND, "no chat template");
  write_file(dir, "tokenizer_config.json", "{\"bos_token\": \"<s>\"}");
  opens_not(dir, QTR_ERR_NOT_FOUND, "no chat template");
  write_file(dir, "tokenizer_config.json", "{\"bos_token\": ");
  opens_not(dir, QTR_ERR_FORMAT, "tokenizer_config.json:1: not valid JSON");
  write_file(dir, "tokenizer_config.json", "{\"chat_template\": 5}");
  opens_not(dir, QTR_ERR_FORMAT, "expected a string, or a list");
  write_file(dir, "tokenizer_config.json", "{\"chat_template\": \"a\\n{{ 1 + }}\"}");
  opens_not(dir, QTR_ERR_FORMAT, "template line 2");

  write_file(dir, "tokenizer_config.json",
             "{\"bos_token\": {\"content\": \"<s>\"}, \"eos_token\": \"</s>\", \"chat_template\": \"{{ bos_token }}"
             "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
             "{{ '>' if add_generation_prompt }}{{ tools is none }}{{ documents is none }}{{ date }}\"}");
  renders_chat(dir, NULL, NULL, "<s>user:hi</s>>TrueTrue");
  renders_chat(dir, "[]", "{\"date\": 7, \"bos_token\": \"B\"}", "Buser:hi</s>>FalseTrue7");

  write_file(dir, "tokenizer_config.json",
             "{\"chat_template\": [{\"name\": \"default\", \"template\": \"plain\"}, {\"name\": \"tool_use\", \"template\": "
             "\"{{ tools | length }} tools\"}, {\"name\": \"rag\", \"template\": \"{% broken %}\"}]}");
  renders_chat(dir, NULL, NULL, "plain");
  renders_chat(dir, "[1, 2]", NULL, "2 tools");

  write_file(dir, "special_tokens_map.json", "{\"eos_token\": \"<end>\"}");
  write_file(dir, "chat_template.jinja", "file {{ messages[0].content }}{{ eos_token }}\n");
  renders_chat(dir, NULL, NULL, "file hi<end>");
  write_file(dir, "chat_template.jinja", "{{ raise_exception('not today') }}");

  struct qtr_error err = {0};
  struct qtr_chat_template *chat = NULL;
  assert_int_equal(qtr_chat_template_open(dir, &chat, &err), QTR_OK);
  json_t *messages = json_array(), *object = json_object();
  char *text = NULL;
  size_t len;
  assert_int_equal(qtr_chat_template_render(chat, messages, NULL, false, NULL, &text, &len, &err), QTR_ERR_ARGUMENT);
  assert_string_equal(err.message, "not today");
  assert_int_equal(qtr_chat_template_render(chat, object, NULL, false, NULL, &text, &len, &err), QTR_ERR_ARGUMENT);
  assert_int_equal(qtr_chat_template_render(chat, messages, object, false, NULL, &text, &len, &err), QTR_ERR_ARGUMENT);
  assert_int_equal(qtr_chat_template_render(chat, messages, NULL, false, messages, &text, &len, &err), QTR_ERR_ARGUMENT);
  json_decref(messages);
  json_decref(object);
  qtr_chat_template_close(chat);
  qtr_chat_template_close(NULL);
  remove_file(dir, "tokenizer_config.json");
  remove_file(dir, "special_tokens_map.json");
  remove_file(dir, "chat_template.jinja");
  (void)rmdir(dir);
}

int main(void) {
  golden = json_load_file(QTR_SOURCE_DIR "/tests/golden/templates.json", JSON_ALLOW_NUL, NULL);
  if (!golden) {
    (void)fprintf(stderr, "tests/golden/templates.json cannot be read\n");
    return 1;
  }
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_features),
      cmocka_unit_test(test_families),
      cmocka_unit_test(test_errors_name_the_line),
      cmocka_unit_test(test_bounds_of_the_parser),
      cmocka_unit_test(test_bounds_of_the_evaluator),
      cmocka_unit_test(test_growing_is_linear),
      cmocka_unit_test(test_broken_templates),
      cmocka_unit_test(test_no_error_struct),
      cmocka_unit_test(test_nul_bytes),
      cmocka_unit_test(test_threads_share_a_template),
      cmocka_unit_test(test_chat_template),
  };
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  json_decref(golden);
  return failed;
}
