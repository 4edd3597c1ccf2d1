/* schema.c - JSON Schema to a grammar (schema.h): one function a type, then what combines schemas. Each gives a rule; what
 * no text fits is pruned at the end. */
#include "server/schema_internal.h"

#include "server/regex.h"
#include "server/schema_number.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MAX_REPEAT 4096 /* of minLength, maxLength, minItems, maxItems */
#define MAX_ENUM 4096

bool qtr_schema_refuse(struct qtr_schema_build *b, const char *what, const char *why) {
  return qtr_api_fail(b->err, 400, b->param, "the schema's \"%.60s\" %s", what, why);
}

/* ---- types --------------------------------------------------------------------------------------- */

static bool compile(struct qtr_schema_build *b, const json_t *schema, int depth, int32_t *rule);

/* A whole number within [0, MAX_REPEAT]; absent leaves *value. */
static bool get_count(struct qtr_schema_build *b, const json_t *schema, const char *name, int32_t *value) {
  const json_t *v = json_object_get(schema, name);
  if (!v) return true;
  double x = json_is_number(v) ? json_number_value(v) : -1;
  if (!(x >= 0) || x > floor(x)) return qtr_schema_refuse(b, name, "must be a whole number from 0");
  if (x > MAX_REPEAT) return qtr_schema_refuse(b, name, "is larger than 4096, the most that is supported");
  *value = (int32_t)x;
  return true;
}

static bool put_pattern(struct qtr_schema_build *b, const char *keyword, const char *pattern, size_t len, int32_t min,
                        int32_t max, int32_t *rule) {
  int32_t inside;
  const char *why = qtr_regex_rule(b->g, pattern, len, min, max, &inside);
  if (why) return qtr_schema_refuse(b, keyword, why);
  *rule = qtr_grammar_rule(b->g);
  qtr_grammar_begin(b->g, *rule);
  qtr_grammar_put_bytes(b->g, "\"", 1);
  qtr_grammar_put_rule(b->g, inside);
  qtr_grammar_put_bytes(b->g, "\"", 1);
  qtr_grammar_end(b->g);
  return true;
}

static bool compile_string(struct qtr_schema_build *b, const json_t *schema, int32_t *rule) {
  int32_t min = 0, max = -1;
  const json_t *pattern = json_object_get(schema, "pattern");
  if (!get_count(b, schema, "minLength", &min) || !get_count(b, schema, "maxLength", &max)) return false;
  if (max >= 0 && min > max) return qtr_schema_refuse(b, "minLength", "is larger than maxLength");
  if (pattern && !json_is_string(pattern)) return qtr_schema_refuse(b, "pattern", "must be a string");
  const char *format = qtr_schema_format_pattern(json_string_value(json_object_get(schema, "format")));
  if (pattern && format) return qtr_schema_refuse(b, "format", "beside pattern is not supported");
  if (pattern) return put_pattern(b, "pattern", json_string_value(pattern), json_string_length(pattern), min, max, rule);
  if (format) return put_pattern(b, "format", format, strlen(format), min, max, rule);
  *rule = min == 0 && max < 0 ? b->string : qtr_schema_string_rule(b, min, max);
  return true;
}

/* The stricter of two keywords on one side; *bound is infinite without one. sign 1: lower bounds, -1: upper ones. */
static bool read_bound(struct qtr_schema_build *b, const json_t *schema, int sign, const char *closed, const char *open,
                       double *bound, bool *is_open) {
  *bound = -sign * (double)INFINITY;
  *is_open = false;
  const char *const name[] = {closed, open};
  for (int i = 0; i < 2; i++) {
    const json_t *v = json_object_get(schema, name[i]);
    if (!v) continue;
    if (!json_is_number(v)) return qtr_schema_refuse(b, name[i], "must be a number");
    double x = json_number_value(v);
    if (sign * x < sign * *bound) continue;
    *bound = x;
    *is_open = i == 1;
  }
  return true;
}

static bool compile_number(struct qtr_schema_build *b, const json_t *schema, bool whole, int32_t *rule) {
  struct qtr_number_range range = {.whole = whole, .step = 1};
  const json_t *step = json_object_get(schema, "multipleOf");
  if (!read_bound(b, schema, 1, "minimum", "exclusiveMinimum", &range.low, &range.low_open) ||
      !read_bound(b, schema, -1, "maximum", "exclusiveMaximum", &range.high, &range.high_open)) {
    return false;
  }
  if (step) {
    double x = json_is_number(step) ? json_number_value(step) : -1;
    if (!(x >= 1 && x <= QTR_NUMBER_MAX_STEP) || x > floor(x)) {
      return qtr_schema_refuse(b, "multipleOf", "is supported only as a whole number from 1 to 256");
    }
    range.step = (int)x;
    range.whole = true;
  }
  if (range.low > range.high) return qtr_schema_refuse(b, "minimum", "is larger than maximum");
  if (isinf(range.low) && isinf(range.high) && range.step == 1) {
    *rule = range.whole ? b->integer : b->number;
    return true;
  }
  const char *why = qtr_number_rule(b->g, &range, rule);
  return !why || qtr_schema_refuse(b, isinf(range.low) ? "maximum" : "minimum", why);
}

static bool compile_array(struct qtr_schema_build *b, const json_t *schema, int depth, int32_t *rule) {
  static const char *const unknown[] = {"contains", "uniqueItems", "unevaluatedItems", "minContains", "maxContains"};
  for (size_t i = 0; i < 5; i++) {
    const json_t *v = json_object_get(schema, unknown[i]);
    if (v && !json_is_false(v)) return qtr_schema_refuse(b, unknown[i], "is not supported");
  }
  const json_t *items = json_object_get(schema, "items"), *prefix = json_object_get(schema, "prefixItems");
  int32_t min = 0, max = -1, item = b->value;
  if (!get_count(b, schema, "minItems", &min) || !get_count(b, schema, "maxItems", &max)) return false;
  if (max >= 0 && min > max) return qtr_schema_refuse(b, "minItems", "is larger than maxItems");
  if (json_array_size(prefix) > 0) { /* exactly these */
    int32_t n = (int32_t)json_array_size(prefix);
    if (min > n || (max >= 0 && max < n))
      return qtr_schema_refuse(b, "prefixItems", "is supported only where it names every item");
    int32_t *entry = calloc((size_t)n, sizeof *entry);
    bool ok = entry != NULL || qtr_api_fail(b->err, 503, NULL, "out of memory");
    for (int32_t i = 0; i < n && ok; i++) ok = compile(b, json_array_get(prefix, (size_t)i), depth + 1, &entry[i]);
    *rule = qtr_grammar_rule(b->g);
    qtr_grammar_begin(b->g, *rule);
    qtr_schema_put_mark(b, "[");
    for (int32_t i = 0; i < n && ok; i++) {
      if (i > 0) qtr_schema_put_mark(b, ",");
      qtr_grammar_put_rule(b->g, entry[i]);
      qtr_grammar_put_rule(b->g, b->space);
    }
    qtr_grammar_put_bytes(b->g, "]", 1);
    qtr_grammar_end(b->g);
    free(entry);
    return ok;
  }
  if (json_is_false(items)) max = 0;
  if (json_is_object(items) && !compile(b, items, depth + 1, &item)) return false;
  *rule = qtr_schema_list_rule(b, "[", "]", -1, item, min, max);
  return true;
}
/* `"name": value` and space behind it; a comma before it when it is not the first. */
static bool put_member(struct qtr_schema_build *b, const char *name, int32_t value, bool comma) {
  json_t *key = json_string(name);
  char *text = key ? json_dumps(key, JSON_ENCODE_ANY) : NULL;
  json_decref(key);
  if (!text) return qtr_api_fail(b->err, 503, NULL, "out of memory");
  if (comma) qtr_schema_put_mark(b, ",");
  qtr_grammar_put_bytes(b->g, text, strlen(text));
  free(text);
  qtr_grammar_put_rule(b->g, b->space);
  qtr_schema_put_mark(b, ":");
  qtr_grammar_put_rule(b->g, value);
  qtr_grammar_put_rule(b->g, b->space);
  return true;
}

/* Members from the last to the first. after[0]: what may follow when no member is out yet, after[1]: when one is. A member
 * is written, or left out where it is not required. */
static bool compile_members(struct qtr_schema_build *b, const json_t *schema, const json_t *properties, int depth,
                            int32_t after[2]) {
  size_t n = json_object_size(properties), i = 0;
  struct member {
    const char *name;
    const json_t *schema;
  } *list = calloc(n + 1, sizeof *list);
  bool ok = list != NULL || qtr_api_fail(b->err, 503, NULL, "out of memory");
  const char *name;
  json_t *value;
  json_object_foreach((json_t *)(uintptr_t)properties, name, value) {
    if (ok) list[i++] = (struct member){name, value};
  }
  while (ok && i-- > 0) {
    int32_t rule, with[2];
    ok = compile(b, list[i].schema, depth + 1, &rule);
    for (int out = 0; out < 2 && ok; out++) {
      with[out] = qtr_grammar_rule(b->g);
      qtr_grammar_begin(b->g, with[out]);
      ok = put_member(b, list[i].name, rule, out == 1);
      qtr_grammar_put_rule(b->g, after[1]);
      qtr_grammar_end(b->g);
      if (!qtr_schema_requires(schema, list[i].name)) qtr_schema_add_choice(b, with[out], after[out]);
    }
    if (ok) memcpy(after, with, sizeof with);
  }
  free(list);
  return ok;
}

static bool compile_object(struct qtr_schema_build *b, const json_t *schema, int depth, int32_t *rule) {
  static const char *const unknown[] = {"patternProperties", "propertyNames",    "minProperties",         "maxProperties",
                                        "dependentRequired", "dependentSchemas", "unevaluatedProperties", "dependencies"};
  for (size_t i = 0; i < sizeof unknown / sizeof unknown[0]; i++) {
    const json_t *v = json_object_get(schema, unknown[i]);
    if (v && !json_is_false(v)) return qtr_schema_refuse(b, unknown[i], "is not supported");
  }
  const json_t *properties = json_object_get(schema, "properties"), *extra = json_object_get(schema, "additionalProperties"),
               *required = json_object_get(schema, "required");
  if (properties && !json_is_object(properties)) return qtr_schema_refuse(b, "properties", "must be an object");
  if (required && !json_is_array(required)) return qtr_schema_refuse(b, "required", "must be an array of names");
  for (size_t i = 0; i < json_array_size(required); i++) {
    const char *name = json_string_value(json_array_get(required, i));
    if (!name) return qtr_schema_refuse(b, "required", "must be an array of names");
    if (!json_object_get(properties, name)) return qtr_schema_refuse(b, "required", "has a name that is not in properties");
  }
  if (json_object_size(properties) == 0) { /* a map, or the empty object */
    int32_t item = b->value;
    if (json_is_object(extra) && !compile(b, extra, depth + 1, &item)) return false;
    bool none = json_is_false(extra) || (properties && !extra);
    *rule = qtr_schema_list_rule(b, "{", "}", b->string, item, 0, none ? 0 : -1);
    return true;
  }
  int32_t end = qtr_grammar_rule(b->g);
  qtr_grammar_alternative(b->g, end, "}");
  int32_t after[2] = {end, end};
  if (!compile_members(b, schema, properties, depth, after)) return false;
  *rule = qtr_grammar_rule(b->g);
  qtr_grammar_begin(b->g, *rule);
  qtr_schema_put_mark(b, "{");
  qtr_grammar_put_rule(b->g, after[0]);
  qtr_grammar_end(b->g);
  return true;
}

static bool compile_literal(struct qtr_schema_build *b, const json_t *value, int32_t rule) {
  char *text = json_dumps(value, JSON_ENCODE_ANY);
  if (!text) return qtr_api_fail(b->err, 503, NULL, "out of memory");
  qtr_grammar_alternative(b->g, rule, text);
  free(text);
  return true;
}
/* ---- schemas ------------------------------------------------------------------------------------- */

static bool compile_reference(struct qtr_schema_build *b, const json_t *schema, int depth, int32_t *rule) {
  const char *path = json_string_value(json_object_get(schema, "$ref"));
  const json_t *target = path ? qtr_schema_resolve(b->root, path) : NULL;
  if (!target) return qtr_schema_refuse(b, "$ref", QTR_SCHEMA_BAD_REFERENCE);
  for (size_t i = 0; i < b->n_references; i++) {
    if (b->reference[i].target != target) continue;
    *rule = b->reference[i].rule;
    return true;
  }
  struct qtr_schema_reference *more = realloc(b->reference, (b->n_references + 1) * sizeof *more);
  if (!more) return qtr_api_fail(b->err, 503, NULL, "out of memory");
  b->reference = more;
  *rule = qtr_grammar_rule(b->g); /* known before it is made: it may refer to itself */
  b->reference[b->n_references++] = (struct qtr_schema_reference){target, *rule};
  int32_t inner;
  if (!compile(b, target, depth + 1, &inner)) return false;
  qtr_schema_add_choice(b, *rule, inner);
  return true;
}

static bool compile_any(struct qtr_schema_build *b, const json_t *list, const char *name, int depth, int32_t *rule) {
  if (!json_is_array(list) || json_array_size(list) == 0)
    return qtr_schema_refuse(b, name, "must be an array with at least one schema");
  *rule = qtr_grammar_rule(b->g);
  for (size_t i = 0; i < json_array_size(list); i++) {
    int32_t choice;
    if (!compile(b, json_array_get(list, i), depth + 1, &choice)) return false;
    qtr_schema_add_choice(b, *rule, choice);
  }
  return true;
}
/* anyOf, oneOf or $ref beside keywords that restrict as well: these hold in each of the choices. */
static bool compile_union(struct qtr_schema_build *b, const json_t *schema, const char *keyword, int depth, int32_t *rule) {
  const json_t *list = json_object_get(schema, keyword);
  bool reference = strcmp(keyword, "$ref") == 0;
  if (!reference && (!json_is_array(list) || json_array_size(list) == 0)) {
    return qtr_schema_refuse(b, keyword, "must be an array with at least one schema");
  }
  *rule = qtr_grammar_rule(b->g);
  for (size_t i = 0; i < (reference ? 1 : json_array_size(list)); i++) {
    int32_t choice;
    json_t *merged = reference ? qtr_schema_expand(b, schema, depth + 1)
                               : qtr_schema_merge_with(b, schema, keyword, json_array_get(list, i), depth + 1);
    bool ok = merged && compile(b, merged, depth + 1, &choice);
    json_decref(merged);
    if (!ok) return false;
    qtr_schema_add_choice(b, *rule, choice);
  }
  return true;
}

/* enum and const: the values that are of the type, where one is given. Other keywords beside them are refused. */
static bool compile_values(struct qtr_schema_build *b, const json_t *schema, int32_t *rule) {
  const json_t *constant = json_object_get(schema, "const"), *choices = json_object_get(schema, "enum");
  const char *keyword = constant ? "const" : "enum", *other = qtr_schema_other_restriction(schema, keyword, "type");
  int types = qtr_schema_type_bits(json_object_get(schema, "type"));
  if (other) return qtr_schema_refuse(b, other, "beside enum or const is not supported");
  if (!constant && (!json_is_array(choices) || json_array_size(choices) == 0 || json_array_size(choices) > MAX_ENUM)) {
    return qtr_schema_refuse(b, "enum", "must be an array of 1 to 4096 values");
  }
  *rule = qtr_grammar_rule(b->g);
  for (size_t i = 0; i < (constant ? 1 : json_array_size(choices)); i++) {
    const json_t *value = constant ? constant : json_array_get(choices, i);
    if ((qtr_schema_value_bits(value) & types) && !compile_literal(b, value, *rule)) return false;
  }
  return true;
}
static bool compile_type(struct qtr_schema_build *b, const json_t *schema, const char *type, int depth, int32_t *rule) {
  if (strcmp(type, "object") == 0) return compile_object(b, schema, depth, rule);
  if (strcmp(type, "array") == 0) return compile_array(b, schema, depth, rule);
  if (strcmp(type, "string") == 0) return compile_string(b, schema, rule);
  if (strcmp(type, "integer") == 0) return compile_number(b, schema, true, rule);
  if (strcmp(type, "number") == 0) return compile_number(b, schema, false, rule);
  if (strcmp(type, "boolean") != 0 && strcmp(type, "null") != 0)
    return qtr_schema_refuse(b, "type", "is none that JSON has");
  *rule = qtr_grammar_rule(b->g);
  qtr_grammar_alternative(b->g, *rule, type[0] == 'b' ? "true" : "null");
  if (type[0] == 'b') qtr_grammar_alternative(b->g, *rule, "false");
  return true;
}

/* Without "type": what the other keywords are about. */
static const char *guess_type(const json_t *schema) {
  static const struct {
    const char *keyword, *type;
  } hint[] = {{"properties", "object"},
              {"required", "object"},
              {"additionalProperties", "object"},
              {"items", "array"},
              {"prefixItems", "array"},
              {"minItems", "array"},
              {"maxItems", "array"},
              {"minLength", "string"},
              {"maxLength", "string"},
              {"pattern", "string"},
              {"format", "string"},
              {"minimum", "number"},
              {"maximum", "number"},
              {"multipleOf", "number"},
              {"uniqueItems", "array"},
              {"exclusiveMinimum", "number"},
              {"exclusiveMaximum", "number"}};
  for (size_t i = 0; i < sizeof hint / sizeof hint[0]; i++) {
    if (json_object_get(schema, hint[i].keyword)) return hint[i].type;
  }
  return NULL;
}

static bool compile(struct qtr_schema_build *b, const json_t *schema, int depth, int32_t *rule) {
  static const char *const unknown[] = {"not", "if", "then", "else", "$dynamicRef", "$recursiveRef"};
  *rule = b->value;
  if (depth > QTR_SCHEMA_DEPTH || ++b->n_schemas > QTR_SCHEMA_MOST || qtr_grammar_failed(b->g)) {
    return qtr_api_fail(b->err, 400, b->param, "the schema is too large or too deep");
  }
  if (json_is_true(schema)) return true;
  if (json_is_false(schema)) { /* a rule without texts: what needs it is pruned */
    *rule = qtr_grammar_rule(b->g);
    return true;
  }
  if (!json_is_object(schema)) {
    return qtr_api_fail(b->err, 400, b->param, "the schema has a part that is neither an object nor true or false");
  }
  for (size_t i = 0; i < sizeof unknown / sizeof unknown[0]; i++) {
    if (json_object_get(schema, unknown[i])) return qtr_schema_refuse(b, unknown[i], "is not supported");
  }
  const json_t *type = json_object_get(schema, "type"), *choices = json_object_get(schema, "enum"),
               *constant = json_object_get(schema, "const");
  if (json_object_get(schema, "$ref")) {
    return qtr_schema_other_restriction(schema, "$ref", NULL) ? compile_union(b, schema, "$ref", depth, rule)
                                                              : compile_reference(b, schema, depth, rule);
  }
  if (constant || choices) return compile_values(b, schema, rule);
  if (json_object_get(schema, "allOf")) {
    json_t *merged = qtr_schema_merge(b, schema, depth);
    bool ok = merged && compile(b, merged, depth + 1, rule);
    json_decref(merged);
    return ok;
  }
  static const char *const unions[] = {"anyOf", "oneOf"};
  for (size_t i = 0; i < 2; i++) {
    const json_t *list = json_object_get(schema, unions[i]);
    if (!list) continue;
    if (json_object_get(schema, unions[1 - i]))
      return qtr_schema_refuse(b, unions[i], "beside another union is not supported");
    if (i == 1 && !qtr_schema_all_apart(b, list)) {
      return qtr_schema_refuse(
          b, "oneOf", "has parts that one value could fit together: use anyOf, or give them different types or constants");
    }
    return qtr_schema_other_restriction(schema, unions[i], NULL) ? compile_union(b, schema, unions[i], depth, rule)
                                                                 : compile_any(b, list, unions[i], depth, rule);
  }
  if (json_is_array(type)) {
    *rule = qtr_grammar_rule(b->g);
    for (size_t i = 0; i < json_array_size(type); i++) {
      const char *name = json_string_value(json_array_get(type, i));
      int32_t choice;
      if (!name) return qtr_schema_refuse(b, "type", "must be a name or an array of names");
      if (!compile_type(b, schema, name, depth, &choice)) return false;
      qtr_schema_add_choice(b, *rule, choice);
    }
    return json_array_size(type) > 0 || qtr_schema_refuse(b, "type", "is empty");
  }
  const char *name = json_string_value(type);
  if (type && !name) return qtr_schema_refuse(b, "type", "must be a name or an array of names");
  if (!name) name = guess_type(schema);
  return name ? compile_type(b, schema, name, depth, rule) : true;
}

/* ---- whole grammars ------------------------------------------------------------------------------ */

/* Frees the builder's own; gives the grammar out or says why there is none. A grammar that matches nothing is none. */
static bool finish(struct qtr_schema_build *b, bool ok, struct qtr_grammar **g) {
  if (ok) qtr_grammar_prune(b->g);
  if (ok && qtr_grammar_start(b->g) == QTR_GRAMMAR_DEAD) {
    ok = qtr_api_fail(b->err, 400, b->param,
                      qtr_grammar_failed(b->g) ? "the schema is too large" : "no JSON fits the schema");
  }
  free(b->reference);
  if (!ok) qtr_grammar_free(b->g);
  *g = ok ? b->g : NULL;
  return ok;
}

bool qtr_grammar_from_schema(const json_t *schema, const char *param, struct qtr_grammar **g, struct qtr_api_error *err) {
  struct qtr_schema_build b = {.g = qtr_grammar_create(), .root = schema, .param = param, .err = err};
  *g = NULL;
  *err = (struct qtr_api_error){0};
  if (!b.g) return qtr_api_fail(err, 503, NULL, "out of memory");
  int32_t start = qtr_grammar_rule(b.g), rule;
  qtr_schema_make_basics(&b);
  bool ok = true;
  if (schema)
    ok = compile(&b, schema, 0, &rule);
  else
    rule = qtr_schema_list_rule(&b, "{", "}", b.string, b.value, 0, -1);
  if (ok) qtr_schema_add_choice(&b, start, rule);
  return finish(&b, ok, g);
}

bool qtr_grammar_for_tools(const json_t *tools, const char *name, const char *arguments, const char *before,
                           const char *after, struct qtr_grammar **g, struct qtr_api_error *err) {
  struct qtr_schema_build b = {.g = qtr_grammar_create(), .param = "tools", .err = err};
  *g = NULL;
  *err = (struct qtr_api_error){0};
  if (!b.g) return qtr_api_fail(err, 503, NULL, "out of memory");
  int32_t start = qtr_grammar_rule(b.g);
  qtr_schema_make_basics(&b);
  bool ok = true;
  for (size_t i = 0; i < json_array_size(tools) && ok; i++) {
    const json_t *function = json_object_get(json_array_get(tools, i), "function"),
                 *parameters = json_object_get(function, "parameters");
    const char *own = json_string_value(json_object_get(function, "name"));
    int32_t rule = qtr_schema_list_rule(&b, "{", "}", b.string, b.value, 0, 0);
    if (name && strcmp(own, name) != 0) continue;
    b.root = parameters; /* what its references point into */
    b.n_references = 0;
    if (json_is_object(parameters)) ok = compile(&b, parameters, 0, &rule);
    if (!ok) break;
    qtr_grammar_begin(b.g, start);
    qtr_grammar_put_bytes(b.g, before, strlen(before));
    qtr_grammar_put_bytes(b.g, "{\"name\": \"", 10);
    qtr_grammar_put_bytes(b.g, own, strlen(own)); /* letters, digits, dots, dashes: checked when the request was read */
    qtr_grammar_put_bytes(b.g, "\", \"", 4);
    qtr_grammar_put_bytes(b.g, arguments, strlen(arguments));
    qtr_grammar_put_bytes(b.g, "\": ", 3);
    qtr_grammar_put_rule(b.g, rule);
    qtr_grammar_put_bytes(b.g, "}", 1);
    qtr_grammar_put_bytes(b.g, after, strlen(after));
    qtr_grammar_end(b.g);
  }
  return finish(&b, ok, g);
}
