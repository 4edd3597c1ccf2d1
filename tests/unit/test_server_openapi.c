/* test_server_openapi.c - the document that the server publishes against the tables it works by, in both directions: routes
 * and paths, members that the parser knows and members that are described; every reference leads somewhere. */
#include "server/server_internal.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static json_t *document(size_t n_keys) {
  struct qtr_server_options options;
  char key[] = "sk-1", *keys[] = {key};
  qtr_server_options_init(&options);
  options.model_name = "org/\"model\"";
  options.api_key = keys;
  options.n_api_keys = n_keys;
  const struct qtr_server server = {.o = &options, .info.vocab_size = 300};
  struct qtr_buffer out = {0};
  json_error_t where;
  qtr_openapi_write(&server, &out);
  assert_false(out.failed);
  json_t *root = json_loadb(out.data, out.len, JSON_REJECT_DUPLICATES, &where);
  if (!root) fail_msg("%s near \"%.60s\"", where.text, out.data + where.position);
  qtr_buffer_free(&out);
  return root;
}

static json_t *at(json_t *root, const char *a, const char *b, const char *c) {
  json_t *value = json_object_get(json_object_get(root, a), b);
  return c ? json_object_get(value, c) : value;
}

static void test_routes(void **state) {
  (void)state;
  json_t *root = document(0), *paths = json_object_get(root, "paths");
  size_t n, n_described = 0;
  const struct qtr_route *route = qtr_routes(&n);
  for (size_t i = 0; i < n; i++) {
    if (route[i].page) continue;
    char path[128];
    bool prefix = route[i].path[strlen(route[i].path) - 1] == '/';
    (void)snprintf(path, sizeof path, "%s%s", route[i].path, prefix ? "{model}" : "");
    json_t *item = json_object_get(paths, path);
    if (!item) fail_msg("%s is not described", path);
    assert_non_null(json_object_get(item, route[i].post ? "post" : "get"));
    assert_null(json_object_get(item, route[i].post ? "get" : "post"));
    n_described++;
  }
  assert_int_equal(json_object_size(paths), n_described);
  assert_null(json_object_get(root, "security"));
  json_decref(root);
  root = document(1);
  assert_int_equal(json_array_size(json_object_get(root, "security")), 1);
  assert_non_null(json_object_get(json_object_get(at(root, "paths", "/version", "get"), "responses"), "401"));
  assert_null(json_object_get(json_object_get(at(root, "paths", "/health", "get"), "responses"), "401"));
  json_decref(root);
}

static const char *const bodies[QTR_API_KINDS] = {"ChatRequest", "CompletionRequest", "TokenizeRequest",
                                                  "DetokenizeRequest"};

/* Does the parser know the member? Then it refuses this value, which fits none, and names it. */
static bool parser_knows(int kind, const char *name) {
  static const char *const rest[QTR_API_KINDS] = {"\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]", "\"prompt\":\"x\"",
                                                  "\"prompt\":\"x\"", "\"tokens\":[1]"};
  static const struct qtr_api_defaults defaults = {.sampling.repetition_penalty = 1};
  struct qtr_api_request r;
  struct qtr_api_error err;
  char body[256];
  (void)snprintf(body, sizeof body, "{%s,\"%s\":[{\"x\":[]}]}", rest[kind], name);
  bool taken = qtr_api_parse((enum qtr_api_kind)kind, body, strlen(body), &defaults, &r, &err);
  qtr_api_request_free(&r);
  return !taken && err.http == 400 && strncmp(err.param, name, strlen(name)) == 0;
}

static void test_members(void **state) {
  (void)state;
  json_t *root = document(0), *schemas = json_object_get(json_object_get(root, "components"), "schemas");
  size_t n_fields;
  const struct qtr_api_field *field = qtr_api_fields(&n_fields);
  for (int kind = 0; kind < QTR_API_KINDS; kind++) {
    json_t *properties = json_object_get(json_object_get(schemas, bodies[kind]), "properties"), *schema;
    size_t n = 0;
    for (size_t i = 0; i < n_fields; i++) {
      if (!(field[i].kinds & 1u << kind)) continue;
      n++;
      schema = json_object_get(properties, field[i].name);
      if (!schema) fail_msg("%s of %s is not described", field[i].name, bodies[kind]);
      assert_true(json_is_true(json_object_get(schema, "x-further-rules")) == (field[i].note != NULL));
      if (field[i].type != QTR_API_WHOLE && field[i].type != QTR_API_NUMBER) continue;
      const json_t *least = json_object_get(schema, field[i].open_min ? "exclusiveMinimum" : "minimum");
      assert_true(json_is_number(least) && json_is_number(json_object_get(schema, "maximum")));
      assert_float_equal(json_number_value(least), field[i].min, 0);
      assert_float_equal(json_number_value(json_object_get(schema, "maximum")), field[i].max, 0);
    }
    assert_int_equal(json_object_size(properties), n);
    const char *name;
    json_object_foreach(properties, name, schema) {
      if (!parser_knows(kind, name)) fail_msg("%s of %s is described, but the parser does not know it", name, bodies[kind]);
    }
    assert_false(parser_knows(kind, "no_such_member"));
  }
  const char *named = json_string_value(
      json_array_get(json_object_get(json_object_get(at(schemas, "ChatRequest", "properties", NULL), "model"), "enum"), 0));
  assert_string_equal(named, "org/\"model\"");
  json_decref(root);
}

static void follow(json_t *root, json_t *value, int *n) {
  const char *name;
  json_t *item;
  size_t i;
  json_array_foreach(value, i, item) follow(root, item, n);
  json_object_foreach(value, name, item) {
    if (strcmp(name, "$ref") == 0) {
      static const char prefix[] = "#/components/schemas/";
      const char *to = json_string_value(item);
      assert_true(to && strncmp(to, prefix, sizeof prefix - 1) == 0);
      if (!at(root, "components", "schemas", to + sizeof prefix - 1)) fail_msg("%s leads nowhere", to);
      (*n)++;
    } else {
      follow(root, item, n);
    }
  }
}

static void test_references(void **state) {
  (void)state;
  json_t *root = document(1);
  int n = 0;
  follow(root, root, &n);
  assert_true(n > 50);
  assert_int_equal(
      json_integer_value(json_object_get(at(json_object_get(root, "components"), "schemas", "Token", NULL), "maximum")),
      299);
  json_decref(root);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_routes), cmocka_unit_test(test_members),
                                     cmocka_unit_test(test_references)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
