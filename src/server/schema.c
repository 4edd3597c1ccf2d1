/* schema.c - JSON Schema to a grammar (schema.h). Space is let through where people write it, but bounded, and so are the
 * digits of numbers: a model that does not know how to go on could otherwise write either for ever. */
#include "server/schema.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_DEPTH 64    /* of nested schemas */
#define MAX_REPEAT 4096 /* of minLength, maxLength, minItems, maxItems */
#define MAX_ENUM 4096
#define MAX_SCHEMAS 65536 /* compiled in one go: anyOf in $ref in anyOf … */
#define MAX_RANGE 4096    /* integers between minimum and maximum */

struct reference {
  const json_t *target;
  int32_t rule;
};

struct build {
  struct qtr_grammar *g;
  const json_t *root;
  const char *param;
  struct qtr_api_error *err;
  int32_t space, string, character, integer, number, value; /* rules made once */
  struct reference *reference; /* (n_references) compiled or being compiled: schemas may refer to themselves */
  size_t n_references;
  int n_schemas;
};

static bool refuse(struct build *b, const char *what, const char *why) {
  return qtr_api_fail(b->err, 400, b->param, "the schema's \"%.60s\" %s", what, why);
}

/* A text that holds JSON punctuation, then space. */
static void put_mark(struct build *b, const char *mark) {
  qtr_grammar_put_bytes(b->g, mark, strlen(mark));
  qtr_grammar_put_rule(b->g, b->space);
}

/* ---- what every JSON text is made of ------------------------------------------------------------- */

#define PUT_SET(g, ranges) qtr_grammar_put_set(g, ranges, sizeof ranges - 1)

static void make_character(struct build *b) {
  struct qtr_grammar *g = b->g;
  static const char tail[] = "\x80\xBF";
  static const char hex[] = "09afAF";
  static const struct {
    const char *first, *second;
    int n_tail;
  } utf8[] = {{"\xC2\xDF", NULL, 1},       {"\xE0\xE0", "\xA0\xBF", 1}, {"\xE1\xEC", "\x80\xBF", 1},
              {"\xED\xED", "\x80\x9F", 1}, {"\xEE\xEF", "\x80\xBF", 1}, {"\xF0\xF0", "\x90\xBF", 2},
              {"\xF1\xF3", "\x80\xBF", 2}, {"\xF4\xF4", "\x80\x8F", 2}};
  b->character = qtr_grammar_rule(g);
  qtr_grammar_begin(g, b->character);
  PUT_SET(g, "\x20\x21\x23\x5B\x5D\x7E");
  qtr_grammar_end(g);
  for (size_t i = 0; i < sizeof utf8 / sizeof utf8[0]; i++) {
    qtr_grammar_begin(g, b->character);
    qtr_grammar_put_set(g, utf8[i].first, 2);
    if (utf8[i].second) qtr_grammar_put_set(g, utf8[i].second, 2);
    for (int k = 0; k < utf8[i].n_tail; k++) PUT_SET(g, tail);
    qtr_grammar_end(g);
  }
  qtr_grammar_begin(g, b->character);
  qtr_grammar_put_bytes(g, "\\", 1);
  PUT_SET(g, "\"\"\\\\//bbffnnrrtt");
  qtr_grammar_end(g);
  /* \uXXXX: no half of a surrogate pair alone */
  qtr_grammar_begin(g, b->character);
  qtr_grammar_put_bytes(g, "\\u", 2);
  PUT_SET(g, "09acefACEF");
  for (int k = 0; k < 3; k++) PUT_SET(g, hex);
  qtr_grammar_end(g);
  qtr_grammar_begin(g, b->character);
  qtr_grammar_put_bytes(g, "\\u", 2);
  PUT_SET(g, "ddDD");
  PUT_SET(g, "07");
  for (int k = 0; k < 2; k++) PUT_SET(g, hex);
  qtr_grammar_end(g);
  qtr_grammar_begin(g, b->character);
  for (int half = 0; half < 2; half++) {
    qtr_grammar_put_bytes(g, "\\u", 2);
    PUT_SET(g, "ddDD");
    if (half == 0)
      PUT_SET(g, "89abAB");
    else
      PUT_SET(g, "cfCF");
    for (int k = 0; k < 2; k++) PUT_SET(g, hex);
  }
  qtr_grammar_end(g);
}

static int32_t string_rule(struct build *b, int32_t min, int32_t max) {
  int32_t characters = qtr_grammar_repeat(b->g, b->character, min, max), rule = qtr_grammar_rule(b->g);
  qtr_grammar_begin(b->g, rule);
  qtr_grammar_put_bytes(b->g, "\"", 1);
  qtr_grammar_put_rule(b->g, characters);
  qtr_grammar_put_bytes(b->g, "\"", 1);
  qtr_grammar_end(b->g);
  return rule;
}

/* Digits of a whole number without a sign: 0, or up to 15 of them. positive: not 0. */
static int32_t natural_rule(struct build *b, bool positive) {
  struct qtr_grammar *g = b->g;
  int32_t digit = qtr_grammar_rule(g), rule = qtr_grammar_rule(g);
  qtr_grammar_begin(g, digit);
  PUT_SET(g, "09");
  qtr_grammar_end(g);
  int32_t more = qtr_grammar_repeat(g, digit, 0, 14);
  if (!positive) qtr_grammar_alternative(g, rule, "0");
  qtr_grammar_begin(g, rule);
  PUT_SET(g, "19");
  qtr_grammar_put_rule(g, more);
  qtr_grammar_end(g);
  return rule;
}

static void make_numbers(struct build *b) {
  struct qtr_grammar *g = b->g;
  int32_t natural = natural_rule(b, false), positive = natural_rule(b, true), digit = qtr_grammar_rule(g);
  qtr_grammar_begin(g, digit);
  PUT_SET(g, "09");
  qtr_grammar_end(g);
  b->integer = qtr_grammar_rule(g);
  for (int sign = 0; sign < 2; sign++) {
    qtr_grammar_begin(g, b->integer);
    if (sign) qtr_grammar_put_bytes(g, "-", 1);
    qtr_grammar_put_rule(g, sign ? positive : natural);
    qtr_grammar_end(g);
  }
  int32_t fraction = qtr_grammar_rule(g), digits = qtr_grammar_repeat(g, digit, 1, 16), exponent = qtr_grammar_rule(g),
          few = qtr_grammar_repeat(g, digit, 1, 2);
  qtr_grammar_alternative(g, fraction, "");
  qtr_grammar_begin(g, fraction);
  qtr_grammar_put_bytes(g, ".", 1);
  qtr_grammar_put_rule(g, digits);
  qtr_grammar_end(g);
  qtr_grammar_alternative(g, exponent, "");
  for (int sign = 0; sign < 2; sign++) {
    qtr_grammar_begin(g, exponent);
    PUT_SET(g, "eeEE");
    if (sign) PUT_SET(g, "++--");
    qtr_grammar_put_rule(g, few);
    qtr_grammar_end(g);
  }
  b->number = qtr_grammar_rule(g);
  for (int sign = 0; sign < 2; sign++) {
    qtr_grammar_begin(g, b->number);
    if (sign) qtr_grammar_put_bytes(g, "-", 1);
    qtr_grammar_put_rule(g, natural);
    qtr_grammar_put_rule(g, fraction);
    qtr_grammar_put_rule(g, exponent);
    qtr_grammar_end(g);
  }
}

/* Nothing, one space, or one or two newlines and an indentation. */
static void make_space(struct build *b) {
  struct qtr_grammar *g = b->g;
  int32_t blank = qtr_grammar_rule(g);
  qtr_grammar_begin(g, blank);
  PUT_SET(g, "  \t\t");
  qtr_grammar_end(g);
  int32_t indent = qtr_grammar_repeat(g, blank, 0, 16);
  b->space = qtr_grammar_rule(g);
  qtr_grammar_alternative(g, b->space, "");
  qtr_grammar_alternative(g, b->space, " ");
  for (int n = 1; n <= 2; n++) {
    qtr_grammar_begin(g, b->space);
    qtr_grammar_put_bytes(g, "\n\n", (size_t)n);
    qtr_grammar_put_rule(g, indent);
    qtr_grammar_end(g);
  }
}

/* open item (, item)* close, or empty. `key`: what stands before each item, -1 = nothing. */
static int32_t list_rule(struct build *b, const char *open, const char *close, int32_t key, int32_t item, int32_t min,
                         int32_t max) {
  struct qtr_grammar *g = b->g;
  int32_t entry = qtr_grammar_rule(g), further = qtr_grammar_rule(g), rule = qtr_grammar_rule(g);
  qtr_grammar_begin(g, entry);
  if (key >= 0) {
    qtr_grammar_put_rule(g, key);
    qtr_grammar_put_rule(g, b->space);
    put_mark(b, ":");
  }
  qtr_grammar_put_rule(g, item);
  qtr_grammar_put_rule(g, b->space);
  qtr_grammar_end(g);
  qtr_grammar_begin(g, further);
  put_mark(b, ",");
  qtr_grammar_put_rule(g, entry);
  qtr_grammar_end(g);
  if (min == 0) {
    qtr_grammar_begin(g, rule);
    put_mark(b, open);
    qtr_grammar_put_bytes(g, close, 1);
    qtr_grammar_end(g);
  }
  if (max != 0) {
    int32_t rest = qtr_grammar_repeat(g, further, min > 0 ? min - 1 : 0, max < 0 ? -1 : max - 1);
    qtr_grammar_begin(g, rule);
    put_mark(b, open);
    qtr_grammar_put_rule(g, entry);
    qtr_grammar_put_rule(g, rest);
    qtr_grammar_put_bytes(g, close, 1);
    qtr_grammar_end(g);
  }
  return rule;
}

static void add_choice(struct build *b, int32_t rule, int32_t choice) {
  qtr_grammar_begin(b->g, rule);
  qtr_grammar_put_rule(b->g, choice);
  qtr_grammar_end(b->g);
}

/* Everything above, and `value`: any JSON value. Rule 0, the start, must exist already. */
static void make_basics(struct build *b) {
  make_space(b);
  make_character(b);
  b->string = string_rule(b, 0, -1);
  make_numbers(b);
  b->value = qtr_grammar_rule(b->g);
  add_choice(b, b->value, b->string);
  add_choice(b, b->value, b->number);
  static const char *const words[] = {"true", "false", "null"};
  for (size_t i = 0; i < 3; i++) qtr_grammar_alternative(b->g, b->value, words[i]);
  add_choice(b, b->value, list_rule(b, "[", "]", -1, b->value, 0, -1));
  add_choice(b, b->value, list_rule(b, "{", "}", b->string, b->value, 0, -1));
}

/* ---- schemas ------------------------------------------------------------------------------------- */

static bool compile(struct build *b, const json_t *schema, int depth, int32_t *rule);

/* A whole number within [0, MAX_REPEAT]; absent leaves *value. */
static bool get_count(struct build *b, const json_t *schema, const char *name, int32_t *value) {
  const json_t *v = json_object_get(schema, name);
  if (!v) return true;
  double x = json_is_number(v) ? json_number_value(v) : -1;
  if (!(x >= 0) || x > floor(x)) return refuse(b, name, "must be a whole number from 0");
  if (x > MAX_REPEAT) return refuse(b, name, "is larger than 4096, the most that is supported");
  *value = (int32_t)x;
  return true;
}

static bool compile_string(struct build *b, const json_t *schema, int32_t *rule) {
  int32_t min = 0, max = -1;
  if (json_object_get(schema, "pattern")) return refuse(b, "pattern", "is not supported");
  if (!get_count(b, schema, "minLength", &min) || !get_count(b, schema, "maxLength", &max)) return false;
  if (max >= 0 && min > max) return refuse(b, "minLength", "is larger than maxLength");
  *rule = min == 0 && max < 0 ? b->string : string_rule(b, min, max);
  return true;
}

/* The bounds of a number as one inclusive integer range where they are given. */
static bool read_bounds(struct build *b, const json_t *schema, double *low, double *high) {
  static const char *const names[] = {"minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"};
  *low = -INFINITY;
  *high = INFINITY;
  for (size_t i = 0; i < 4; i++) {
    const json_t *v = json_object_get(schema, names[i]);
    if (!v) continue;
    if (!json_is_number(v)) return refuse(b, names[i], "must be a number");
    double x = json_number_value(v);
    if (i < 2) {
      x = i == 1 && !(x < floor(x) || x > floor(x)) ? x + 1 : ceil(x);
      *low = fmax(*low, x);
    } else {
      x = i == 3 && !(x < floor(x) || x > floor(x)) ? x - 1 : floor(x);
      *high = fmin(*high, x);
    }
  }
  return true;
}

static bool compile_integer(struct build *b, const json_t *schema, int32_t *rule) {
  double low, high;
  if (json_object_get(schema, "multipleOf")) return refuse(b, "multipleOf", "is not supported");
  if (!read_bounds(b, schema, &low, &high)) return false;
  if (isinf(low) && isinf(high)) {
    *rule = b->integer;
    return true;
  }
  if (low > high) return refuse(b, "minimum", "is larger than maximum");
  if (isinf(high) && (fabs(low) < 0.5 || fabs(low - 1) < 0.5)) { /* the common ones */
    *rule = natural_rule(b, low > 0.5);
    return true;
  }
  if (!(high - low <= MAX_RANGE) || fabs(low) > 1e15 || fabs(high) > 1e15) {
    return refuse(b, isinf(low) ? "maximum" : "minimum",
                  "is supported for integers only as 0 or 1 alone, or in a range of at most 4096 numbers");
  }
  *rule = qtr_grammar_rule(b->g);
  for (double x = low; x <= high; x++) {
    char text[32];
    (void)snprintf(text, sizeof text, "%.0f", fabs(x) < 0.5 ? 0 : x);
    qtr_grammar_alternative(b->g, *rule, text);
  }
  return true;
}

static bool compile_number(struct build *b, const json_t *schema, int32_t *rule) {
  static const char *const unknown[] = {"multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"};
  for (size_t i = 0; i < 5; i++) {
    if (json_object_get(schema, unknown[i]))
      return refuse(b, unknown[i], "is not supported for numbers that are not integers");
  }
  *rule = b->number;
  return true;
}

static bool compile_array(struct build *b, const json_t *schema, int depth, int32_t *rule) {
  static const char *const unknown[] = {"contains", "uniqueItems", "unevaluatedItems", "minContains", "maxContains"};
  for (size_t i = 0; i < 5; i++) {
    const json_t *v = json_object_get(schema, unknown[i]);
    if (v && !json_is_false(v)) return refuse(b, unknown[i], "is not supported");
  }
  const json_t *items = json_object_get(schema, "items"), *prefix = json_object_get(schema, "prefixItems");
  int32_t min = 0, max = -1, item = b->value;
  if (!get_count(b, schema, "minItems", &min) || !get_count(b, schema, "maxItems", &max)) return false;
  if (max >= 0 && min > max) return refuse(b, "minItems", "is larger than maxItems");
  if (json_array_size(prefix) > 0) { /* exactly these */
    int32_t n = (int32_t)json_array_size(prefix);
    if (min > n || (max >= 0 && max < n)) return refuse(b, "prefixItems", "is supported only where it names every item");
    int32_t *entry = calloc((size_t)n, sizeof *entry);
    bool ok = entry != NULL || qtr_api_fail(b->err, 503, NULL, "out of memory");
    for (int32_t i = 0; i < n && ok; i++) ok = compile(b, json_array_get(prefix, (size_t)i), depth + 1, &entry[i]);
    *rule = qtr_grammar_rule(b->g);
    qtr_grammar_begin(b->g, *rule);
    put_mark(b, "[");
    for (int32_t i = 0; i < n && ok; i++) {
      if (i > 0) put_mark(b, ",");
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
  *rule = list_rule(b, "[", "]", -1, item, min, max);
  return true;
}

static bool is_required(const json_t *schema, const char *name) {
  const json_t *list = json_object_get(schema, "required");
  for (size_t i = 0; i < json_array_size(list); i++) {
    const char *text = json_string_value(json_array_get(list, i));
    if (text && strcmp(text, name) == 0) return true;
  }
  return false;
}

/* `"name": value` and space behind it; a comma before it when it is not the first. */
static bool put_member(struct build *b, const char *name, int32_t value, bool comma) {
  json_t *key = json_string(name);
  char *text = key ? json_dumps(key, JSON_ENCODE_ANY) : NULL;
  json_decref(key);
  if (!text) return qtr_api_fail(b->err, 503, NULL, "out of memory");
  if (comma) put_mark(b, ",");
  qtr_grammar_put_bytes(b->g, text, strlen(text));
  free(text);
  qtr_grammar_put_rule(b->g, b->space);
  put_mark(b, ":");
  qtr_grammar_put_rule(b->g, value);
  qtr_grammar_put_rule(b->g, b->space);
  return true;
}

/* Members from the last to the first. after[0]: what may follow when no member is out yet, after[1]: when one is. A member
 * is written, or left out where it is not required. */
static bool compile_members(struct build *b, const json_t *schema, const json_t *properties, int depth, int32_t after[2]) {
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
      if (!is_required(schema, list[i].name)) add_choice(b, with[out], after[out]);
    }
    if (ok) memcpy(after, with, sizeof with);
  }
  free(list);
  return ok;
}

static bool compile_object(struct build *b, const json_t *schema, int depth, int32_t *rule) {
  static const char *const unknown[] = {"patternProperties", "propertyNames",    "minProperties",         "maxProperties",
                                        "dependentRequired", "dependentSchemas", "unevaluatedProperties", "dependencies"};
  for (size_t i = 0; i < sizeof unknown / sizeof unknown[0]; i++) {
    const json_t *v = json_object_get(schema, unknown[i]);
    if (v && !json_is_false(v)) return refuse(b, unknown[i], "is not supported");
  }
  const json_t *properties = json_object_get(schema, "properties"), *extra = json_object_get(schema, "additionalProperties"),
               *required = json_object_get(schema, "required");
  if (properties && !json_is_object(properties)) return refuse(b, "properties", "must be an object");
  if (required && !json_is_array(required)) return refuse(b, "required", "must be an array of names");
  for (size_t i = 0; i < json_array_size(required); i++) {
    const char *name = json_string_value(json_array_get(required, i));
    if (!name) return refuse(b, "required", "must be an array of names");
    if (!json_object_get(properties, name)) return refuse(b, "required", "has a name that is not in properties");
  }
  if (json_object_size(properties) == 0) { /* a map, or the empty object */
    int32_t item = b->value;
    if (json_is_object(extra) && !compile(b, extra, depth + 1, &item)) return false;
    bool none = json_is_false(extra) || (properties && !extra);
    *rule = list_rule(b, "{", "}", b->string, item, 0, none ? 0 : -1);
    return true;
  }
  int32_t end = qtr_grammar_rule(b->g);
  qtr_grammar_alternative(b->g, end, "}");
  int32_t after[2] = {end, end};
  if (!compile_members(b, schema, properties, depth, after)) return false;
  *rule = qtr_grammar_rule(b->g);
  qtr_grammar_begin(b->g, *rule);
  put_mark(b, "{");
  qtr_grammar_put_rule(b->g, after[0]);
  qtr_grammar_end(b->g);
  return true;
}

static bool compile_literal(struct build *b, const json_t *value, int32_t rule) {
  char *text = json_dumps(value, JSON_ENCODE_ANY);
  if (!text) return qtr_api_fail(b->err, 503, NULL, "out of memory");
  qtr_grammar_alternative(b->g, rule, text);
  free(text);
  return true;
}

/* "#" or "#/a/b": a path of members, or of indices in arrays, with ~0 and ~1 for ~ and /. */
static const json_t *resolve(const json_t *root, const char *path) {
  const json_t *at = root;
  if (path[0] != '#') return NULL;
  path++;
  while (*path == '/' && at) {
    char name[256];
    size_t n = 0;
    for (path++; *path && *path != '/'; path++) {
      char c = *path;
      if (c == '~' && (path[1] == '0' || path[1] == '1')) c = *++path == '0' ? '~' : '/';
      if (n + 1 >= sizeof name) return NULL;
      name[n++] = c;
    }
    name[n] = 0;
    if (json_is_array(at)) {
      char *end;
      unsigned long i = strtoul(name, &end, 10);
      at = n > 0 && !*end ? json_array_get(at, i) : NULL;
    } else {
      at = json_object_get(at, name);
    }
  }
  return *path ? NULL : at;
}

static bool compile_reference(struct build *b, const json_t *schema, int depth, int32_t *rule) {
  const char *path = json_string_value(json_object_get(schema, "$ref"));
  const json_t *target = path ? resolve(b->root, path) : NULL;
  if (!target) return refuse(b, "$ref", "must point into the schema, as \"#/$defs/name\" does");
  for (size_t i = 0; i < b->n_references; i++) {
    if (b->reference[i].target != target) continue;
    *rule = b->reference[i].rule;
    return true;
  }
  struct reference *more = realloc(b->reference, (b->n_references + 1) * sizeof *more);
  if (!more) return qtr_api_fail(b->err, 503, NULL, "out of memory");
  b->reference = more;
  *rule = qtr_grammar_rule(b->g); /* known before it is made: it may refer to itself */
  b->reference[b->n_references++] = (struct reference){target, *rule};
  int32_t inner;
  if (!compile(b, target, depth + 1, &inner)) return false;
  add_choice(b, *rule, inner);
  return true;
}

static bool compile_any(struct build *b, const json_t *list, const char *name, int depth, int32_t *rule) {
  if (!json_is_array(list) || json_array_size(list) == 0)
    return refuse(b, name, "must be an array with at least one schema");
  *rule = qtr_grammar_rule(b->g);
  for (size_t i = 0; i < json_array_size(list); i++) {
    int32_t choice;
    if (!compile(b, json_array_get(list, i), depth + 1, &choice)) return false;
    add_choice(b, *rule, choice);
  }
  return true;
}

/* One schema that says what all of them say, where that can be written down: members of objects side by side, other keywords
 * once. A new reference. */
static json_t *merge(struct build *b, const json_t *schema, int depth) {
  json_t *all = json_object(), *parts = json_object_get(schema, "allOf");
  const char *name;
  json_t *value;
  bool ok = all && ((depth < MAX_DEPTH && ++b->n_schemas < MAX_SCHEMAS) || refuse(b, "allOf", "is nested too deep"));
  for (size_t i = 0; ok && i <= json_array_size(parts); i++) { /* the schema itself comes last */
    const json_t *part = i < json_array_size(parts) ? json_array_get(parts, i) : schema;
    json_t *inner = NULL;
    for (int hop = 0; part != schema && json_object_get(part, "$ref") && hop < MAX_DEPTH; hop++) {
      part = resolve(
          b->root, json_string_value(json_object_get(part, "$ref")) ? json_string_value(json_object_get(part, "$ref")) : "");
    }
    if (part != schema && json_object_get(part, "allOf")) part = inner = merge(b, part, depth + 1);
    if (!json_is_object(part) || (part != schema && json_object_get(part, "$ref"))) {
      if (!b->err->http) (void)refuse(b, "allOf", "must be an array of schemas");
      ok = false;
    }
    json_object_foreach((json_t *)(uintptr_t)part, name, value) {
      json_t *before = json_object_get(all, name);
      if (!ok || strcmp(name, "allOf") == 0) continue;
      if (!before || json_equal(before, value)) {
        ok = json_object_set_new(all, name, json_deep_copy(value)) == 0;
      } else if (strcmp(name, "properties") == 0 && json_is_object(before) && json_is_object(value)) {
        const char *key;
        json_t *member;
        json_object_foreach(value, key, member) {
          json_t *there = json_object_get(before, key);
          if (there && !json_equal(there, member))
            ok = ok && refuse(b, "allOf", "describes a member in two ways, which is not supported");
          if (ok && !there) ok = json_object_set_new(before, key, json_deep_copy(member)) == 0;
        }
      } else if (strcmp(name, "required") == 0 && json_is_array(before) && json_is_array(value)) {
        ok = json_array_extend(before, value) == 0;
      } else if (strcmp(name, "title") != 0 && strcmp(name, "description") != 0) {
        ok = refuse(b, name, "differs between parts of an allOf, which is not supported");
      }
    }
    json_decref(inner);
  }
  if (ok) return all;
  json_decref(all);
  if (!b->err->http) (void)qtr_api_fail(b->err, 503, NULL, "out of memory");
  return NULL;
}

static bool compile_type(struct build *b, const json_t *schema, const char *type, int depth, int32_t *rule) {
  if (strcmp(type, "object") == 0) return compile_object(b, schema, depth, rule);
  if (strcmp(type, "array") == 0) return compile_array(b, schema, depth, rule);
  if (strcmp(type, "string") == 0) return compile_string(b, schema, rule);
  if (strcmp(type, "integer") == 0) return compile_integer(b, schema, rule);
  if (strcmp(type, "number") == 0) return compile_number(b, schema, rule);
  if (strcmp(type, "boolean") != 0 && strcmp(type, "null") != 0) return refuse(b, "type", "is none that JSON has");
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

static bool compile(struct build *b, const json_t *schema, int depth, int32_t *rule) {
  static const char *const unknown[] = {"not", "if", "then", "else", "$dynamicRef", "$recursiveRef"};
  *rule = b->value;
  if (depth > MAX_DEPTH || ++b->n_schemas > MAX_SCHEMAS || qtr_grammar_failed(b->g)) {
    return qtr_api_fail(b->err, 400, b->param, "the schema is too large or too deep");
  }
  if (json_is_true(schema)) return true;
  if (!json_is_object(schema)) {
    return qtr_api_fail(b->err, 400, b->param, "the schema has a part that is neither an object nor true");
  }
  for (size_t i = 0; i < sizeof unknown / sizeof unknown[0]; i++) {
    if (json_object_get(schema, unknown[i])) return refuse(b, unknown[i], "is not supported");
  }
  const json_t *type = json_object_get(schema, "type"), *choices = json_object_get(schema, "enum"),
               *constant = json_object_get(schema, "const");
  if (json_object_get(schema, "$ref")) return compile_reference(b, schema, depth, rule);
  if (constant) {
    *rule = qtr_grammar_rule(b->g);
    return compile_literal(b, constant, *rule);
  }
  if (choices) {
    if (!json_is_array(choices) || json_array_size(choices) == 0 || json_array_size(choices) > MAX_ENUM) {
      return refuse(b, "enum", "must be an array of 1 to 4096 values");
    }
    *rule = qtr_grammar_rule(b->g);
    for (size_t i = 0; i < json_array_size(choices); i++) {
      if (!compile_literal(b, json_array_get(choices, i), *rule)) return false;
    }
    return true;
  }
  if (json_object_get(schema, "allOf")) {
    json_t *merged = merge(b, schema, depth);
    bool ok = merged && compile(b, merged, depth + 1, rule);
    json_decref(merged);
    return ok;
  }
  static const char *const unions[] = {"anyOf", "oneOf"};
  for (size_t i = 0; i < 2; i++) {
    const json_t *list = json_object_get(schema, unions[i]);
    if (!list) continue;
    if (json_object_get(schema, "properties") || json_object_get(schema, "items") ||
        json_object_get(schema, unions[1 - i])) {
      return refuse(b, unions[i], "beside properties, items or another union is not supported");
    }
    return compile_any(b, list, unions[i], depth, rule);
  }
  if (json_is_array(type)) {
    *rule = qtr_grammar_rule(b->g);
    for (size_t i = 0; i < json_array_size(type); i++) {
      const char *name = json_string_value(json_array_get(type, i));
      int32_t choice;
      if (!name) return refuse(b, "type", "must be a name or an array of names");
      if (!compile_type(b, schema, name, depth, &choice)) return false;
      add_choice(b, *rule, choice);
    }
    return json_array_size(type) > 0 || refuse(b, "type", "is empty");
  }
  const char *name = json_string_value(type);
  if (type && !name) return refuse(b, "type", "must be a name or an array of names");
  if (!name) name = guess_type(schema);
  return name ? compile_type(b, schema, name, depth, rule) : true;
}

/* ---- whole grammars ------------------------------------------------------------------------------ */

/* Frees the builder's own; gives the grammar out or says why there is none. A grammar that matches nothing is none. */
static bool finish(struct build *b, bool ok, struct qtr_grammar **g) {
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
  struct build b = {.g = qtr_grammar_create(), .root = schema, .param = param, .err = err};
  *g = NULL;
  *err = (struct qtr_api_error){0};
  if (!b.g) return qtr_api_fail(err, 503, NULL, "out of memory");
  int32_t start = qtr_grammar_rule(b.g), rule;
  make_basics(&b);
  bool ok = true;
  if (schema)
    ok = compile(&b, schema, 0, &rule);
  else
    rule = list_rule(&b, "{", "}", b.string, b.value, 0, -1);
  if (ok) add_choice(&b, start, rule);
  return finish(&b, ok, g);
}

bool qtr_grammar_for_tools(const json_t *tools, const char *name, const char *arguments, const char *before,
                           const char *after, struct qtr_grammar **g, struct qtr_api_error *err) {
  struct build b = {.g = qtr_grammar_create(), .param = "tools", .err = err};
  *g = NULL;
  *err = (struct qtr_api_error){0};
  if (!b.g) return qtr_api_fail(err, 503, NULL, "out of memory");
  int32_t start = qtr_grammar_rule(b.g);
  make_basics(&b);
  bool ok = true;
  for (size_t i = 0; i < json_array_size(tools) && ok; i++) {
    const json_t *function = json_object_get(json_array_get(tools, i), "function"),
                 *parameters = json_object_get(function, "parameters");
    const char *own = json_string_value(json_object_get(function, "name"));
    int32_t rule = list_rule(&b, "{", "}", b.string, b.value, 0, 0);
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
