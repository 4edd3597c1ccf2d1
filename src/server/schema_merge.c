/* schema_merge.c - schemas as data (schema_internal.h): which keywords restrict, what references mean, what several schemas
 * say together, and whether two can hold for one value. */
#include "server/schema_internal.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* Formats that people mean as more than a remark, written so that what fits the pattern is one: no 30th of February. */
const char *qtr_schema_format_pattern(const char *format) {
#define YEAR "[1-9]\\d{3}"
#define DATE YEAR "-((0[1-9]|1[0-2])-(0[1-9]|1\\d|2[0-8])|(0[13-9]|1[0-2])-(29|30)|(0[13578]|1[02])-31)"
#define TIME "([01]\\d|2[0-3]):[0-5]\\d:[0-5]\\d(\\.\\d{1,6})?(Z|[+-]([01]\\d|2[0-3]):[0-5]\\d)"
#define BYTE "(25[0-5]|2[0-4]\\d|1\\d\\d|[1-9]?\\d)"
#define LABEL "[A-Za-z0-9]([A-Za-z0-9-]{0,30}[A-Za-z0-9])?"
  static const struct {
    const char *name, *pattern;
  } known[] = {{"date", "^" DATE "$"},
               {"time", "^" TIME "$"},
               {"date-time", "^" DATE "T" TIME "$"},
               {"uuid", "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"},
               {"ipv4", "^" BYTE "(\\." BYTE "){3}$"},
               {"hostname", "^" LABEL "(\\." LABEL "){0,4}$"},
               {"email", "^[A-Za-z0-9_+-]{1,30}(\\.[A-Za-z0-9_+-]{1,30}){0,3}@" LABEL "(\\." LABEL "){1,4}$"}};
  for (size_t i = 0; format && i < sizeof known / sizeof known[0]; i++) {
    if (strcmp(format, known[i].name) == 0) return known[i].pattern;
  }
  return NULL;
}

/* Does a keyword restrict what fits? What is not here is a remark (title, default, $defs, …) or unknown, which is the same.
 */
static bool restricts(const char *keyword) {
  static const char known[] =
      " type enum const anyOf oneOf allOf $ref not if then else $dynamicRef $recursiveRef properties required items "
      "prefixItems "
      "additionalProperties additionalItems minItems maxItems minLength maxLength pattern format minimum maximum multipleOf "
      "exclusiveMinimum exclusiveMaximum uniqueItems contains minContains maxContains unevaluatedItems minProperties "
      "maxProperties propertyNames patternProperties dependencies dependentRequired dependentSchemas unevaluatedProperties ";
  char word[64];
  int n = snprintf(word, sizeof word, " %s ", keyword);
  return n < (int)sizeof word && !strchr(keyword, ' ') && strstr(known, word);
}

const char *qtr_schema_other_restriction(const json_t *schema, const char *a, const char *b) {
  const char *name;
  json_t *value;
  json_object_foreach((json_t *)(uintptr_t)schema, name, value) {
    if (!restricts(name) || strcmp(name, a) == 0 || (b && strcmp(name, b) == 0)) continue;
    if (strcmp(name, "format") != 0 || qtr_schema_format_pattern(json_string_value(value))) return name;
  }
  return NULL;
}

enum {
  IS_NULL = 1,
  IS_BOOLEAN = 2,
  IS_STRING = 4,
  IS_ARRAY = 8,
  IS_OBJECT = 16,
  IS_INTEGER = 32,
  IS_FRACTION = 64,
  IS_ANY = 127
};

static int type_bit(const char *name) {
  static const struct {
    const char *name;
    int bits;
  } known[] = {{"null", IS_NULL},
               {"boolean", IS_BOOLEAN},
               {"string", IS_STRING},
               {"array", IS_ARRAY},
               {"object", IS_OBJECT},
               {"integer", IS_INTEGER},
               {"number", IS_INTEGER | IS_FRACTION}};
  for (size_t i = 0; name && i < sizeof known / sizeof known[0]; i++) {
    if (strcmp(name, known[i].name) == 0) return known[i].bits;
  }
  return 0;
}

/* "type" as bits; without it, or malformed (which its reader finds): all. */
int qtr_schema_type_bits(const json_t *type) {
  if (json_is_false(type)) return 0;
  if (json_is_string(type)) return type_bit(json_string_value(type));
  if (!json_is_array(type)) return IS_ANY;
  int bits = 0;
  for (size_t i = 0; i < json_array_size(type); i++) bits |= type_bit(json_string_value(json_array_get(type, i)));
  return bits;
}

int qtr_schema_value_bits(const json_t *value) {
  switch (json_typeof(value)) {
    case JSON_NULL: return IS_NULL;
    case JSON_TRUE:
    case JSON_FALSE: return IS_BOOLEAN;
    case JSON_STRING: return IS_STRING;
    case JSON_ARRAY: return IS_ARRAY;
    case JSON_OBJECT: return IS_OBJECT;
    case JSON_INTEGER: return IS_INTEGER;
    default: {
      double x = json_real_value(value);
      return x > floor(x) ? IS_FRACTION : IS_INTEGER;
    }
  }
}
bool qtr_schema_requires(const json_t *schema, const char *name) {
  const json_t *list = json_object_get(schema, "required");
  for (size_t i = 0; i < json_array_size(list); i++) {
    const char *text = json_string_value(json_array_get(list, i));
    if (text && strcmp(text, name) == 0) return true;
  }
  return false;
}
/* "#" or "#/a/b": a path of members, or of indices in arrays, with ~0 and ~1 for ~ and /. */
const json_t *qtr_schema_resolve(const json_t *root, const char *path) {
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
/* ---- several schemas at once ---- */

/* The schema that a part of an allOf stands for, its own references followed. NULL: it leads nowhere. */
static const json_t *follow(const struct qtr_schema_build *b, const json_t *part) {
  for (int hop = 0; hop < QTR_SCHEMA_DEPTH; hop++) {
    const char *path = json_string_value(json_object_get(part, "$ref"));
    if (!json_object_get(part, "$ref") || qtr_schema_other_restriction(part, "$ref", NULL)) return part;
    part = path ? qtr_schema_resolve(b->root, path) : NULL;
  }
  return NULL;
}

/* "type" of values that have both types; false when there are none. A new reference. */
static json_t *common_type(const json_t *a, const json_t *b) {
  static const char *const names[] = {"null", "boolean", "string", "array", "object"};
  int bits = qtr_schema_type_bits(a) & qtr_schema_type_bits(b);
  if (bits == 0) return json_false();
  json_t *list = json_array();
  for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
    if (bits & type_bit(names[i])) (void)json_array_append_new(list, json_string(names[i]));
  }
  if (bits & IS_FRACTION)
    (void)json_array_append_new(list, json_string("number"));
  else if (bits & IS_INTEGER)
    (void)json_array_append_new(list, json_string("integer"));
  return list;
}

/* Both bounds hold: the stricter one does. */
static bool is_lower_bound(const char *name) {
  return strncmp(name, "min", 3) == 0 || strcmp(name, "exclusiveMinimum") == 0;
}

static bool is_bound(const char *name) {
  return is_lower_bound(name) || strncmp(name, "max", 3) == 0 || strcmp(name, "exclusiveMaximum") == 0;
}

/* Adds a part's keywords to `all`. */
static bool merge_part(struct qtr_schema_build *b, json_t *all, const json_t *part) {
  const char *name, *key;
  json_t *value, *member;
  bool ok = true, items = json_object_get(part, "items"), prefix = json_object_get(part, "prefixItems");
  if ((items && !prefix && json_object_get(all, "prefixItems")) || (prefix && !items && json_object_get(all, "items"))) {
    return qtr_schema_refuse(b, "items",
                             "stands beside prefixItems of another schema, which is not supported"); /* they mean others */
  }
  json_object_foreach((json_t *)(uintptr_t)part, name, value) {
    json_t *before = json_object_get(all, name);
    if (!ok || strcmp(name, "allOf") == 0 || !restricts(name)) continue;
    if (!before || json_equal(before, value)) {
      ok = json_object_set_new(all, name, json_deep_copy(value)) == 0;
    } else if (strcmp(name, "properties") == 0 && json_is_object(before) && json_is_object(value)) {
      json_object_foreach(value, key, member) {
        json_t *there = json_object_get(before, key);
        if (there && !json_equal(there, member))
          ok = ok && qtr_schema_refuse(b, "allOf", "describes a member in two ways, which is not supported");
        if (ok && !there) ok = json_object_set_new(before, key, json_deep_copy(member)) == 0;
      }
    } else if (strcmp(name, "required") == 0 && json_is_array(before) && json_is_array(value)) {
      ok = json_array_extend(before, value) == 0;
    } else if (strcmp(name, "type") == 0) {
      ok = json_object_set_new(all, name, common_type(before, value)) == 0;
    } else if (is_bound(name) && json_is_number(before) && json_is_number(value)) {
      bool larger = json_number_value(value) > json_number_value(before);
      if (larger == is_lower_bound(name)) ok = json_object_set(all, name, value) == 0;
    } else {
      ok = qtr_schema_refuse(b, name, "differs between schemas that must hold together, which is not supported");
    }
  }
  return ok;
}

/* A part that allows no members but its own, beside others that have more: only what is in all of them could be written. */
static bool closes_others(const json_t *all, const json_t *part) {
  const json_t *extra = json_object_get(part, "additionalProperties"), *own = json_object_get(part, "properties");
  const char *key;
  json_t *member;
  if (!extra || json_is_true(extra)) return false;
  json_object_foreach(json_object_get(all, "properties"), key, member) {
    if (!json_object_get(own, key)) return true;
  }
  return false;
}

/* One schema that says what all parts of an allOf and the schema itself say, where that can be written down: members of
 * objects side by side, other keywords once. A new reference. */
json_t *qtr_schema_merge(struct qtr_schema_build *b, const json_t *schema, int depth) {
  json_t *all = json_object(), *parts = json_object_get(schema, "allOf"), *inner;
  size_t n = json_array_size(parts);
  bool ok = all && ((depth < QTR_SCHEMA_DEPTH && ++b->n_schemas < QTR_SCHEMA_MOST) ||
                    qtr_schema_refuse(b, "allOf", "is nested too deep"));
  json_t *kept = json_array(); /* the parts as they were merged */
  if (parts && !json_is_array(parts)) ok = qtr_schema_refuse(b, "allOf", "must be an array of schemas");
  for (size_t i = 0; ok && i <= n; i++) { /* the schema itself comes last */
    const json_t *part = i < n ? follow(b, json_array_get(parts, i)) : schema;
    if (json_is_true(part)) continue;
    if (json_is_false(part)) {
      (void)json_object_set_new(all, "type", json_false());
      continue;
    }
    if (!json_is_object(part)) {
      ok = qtr_schema_refuse(b, "allOf", "must be an array of schemas");
      break;
    }
    bool deeper = i < n && (json_object_get(part, "allOf") || json_object_get(part, "$ref"));
    inner = deeper ? qtr_schema_expand(b, part, depth + 1) : json_deep_copy(part);
    if (json_is_false(inner))
      (void)json_object_set_new(all, "type", json_false());
    else
      ok = inner && merge_part(b, all, inner) && json_array_append(kept, inner) == 0;
    json_decref(inner);
  }
  for (size_t i = 0; ok && i < json_array_size(kept); i++) {
    if (closes_others(all, json_array_get(kept, i))) {
      ok =
          qtr_schema_refuse(b, "additionalProperties", "stands beside schemas with further members, which is not supported");
    }
  }
  json_decref(kept);
  if (ok && json_is_false(json_object_get(all, "type"))) { /* nothing is of both types */
    json_decref(all);
    return json_false();
  }
  if (ok) return all;
  json_decref(all);
  if (!b->err->http) (void)qtr_api_fail(b->err, 503, NULL, "out of memory");
  return NULL;
}

/* A copy of the schema without `keyword`, and with `part` in its allOf, merged. A new reference. */
json_t *qtr_schema_merge_with(struct qtr_schema_build *b, const json_t *schema, const char *keyword, const json_t *part,
                              int depth) {
  json_t *copy = json_copy((json_t *)(uintptr_t)schema), *parts = json_copy(json_object_get(schema, "allOf")),
         *merged = NULL;
  if (!parts) parts = json_array();
  bool ok = copy && parts && json_array_append(parts, (json_t *)(uintptr_t)part) == 0 &&
            json_object_del(copy, keyword) == 0 && json_object_set(copy, "allOf", parts) == 0;
  if (ok)
    merged = qtr_schema_merge(b, copy, depth);
  else
    (void)qtr_api_fail(b->err, 503, NULL, "out of memory");
  json_decref(parts);
  json_decref(copy);
  return merged;
}

/* A part of an allOf that is not plain yet: its reference beside other keywords, its own allOf. */
json_t *qtr_schema_expand(struct qtr_schema_build *b, const json_t *part, int depth) {
  const json_t *reference = json_object_get(part, "$ref");
  if (!reference) return qtr_schema_merge(b, part, depth);
  const char *path = json_string_value(reference);
  const json_t *target = path ? qtr_schema_resolve(b->root, path) : NULL;
  if (target) return qtr_schema_merge_with(b, part, "$ref", target, depth);
  (void)qtr_schema_refuse(b, "$ref", QTR_SCHEMA_BAD_REFERENCE);
  return NULL;
}
/* ---- oneOf: no value may fit two parts ---- */

static int possible_types(const struct qtr_schema_build *b, const json_t *schema, int depth) {
  const json_t *part = follow(b, schema), *constant = json_object_get(part, "const"),
               *choices = json_object_get(part, "enum");
  int bits = qtr_schema_type_bits(json_object_get(part, "type")), some = 0;
  if (constant) bits &= qtr_schema_value_bits(constant);
  for (size_t i = 0; i < json_array_size(choices); i++) some |= qtr_schema_value_bits(json_array_get(choices, i));
  if (json_array_size(choices) > 0) bits &= some;
  const json_t *list = json_object_get(part, "anyOf") ? json_object_get(part, "anyOf") : json_object_get(part, "oneOf");
  some = 0;
  for (size_t i = 0; i < json_array_size(list) && depth < 8; i++)
    some |= possible_types(b, json_array_get(list, i), depth + 1);
  return json_array_size(list) > 0 && depth < 8 ? bits & some : bits;
}

/* 1 is 1.0. */
static bool same_value(const json_t *x, const json_t *y) {
  if (json_is_number(x) && json_is_number(y)) {
    double a = json_number_value(x), b = json_number_value(y);
    return !(a < b) && !(a > b);
  }
  return json_equal((json_t *)(uintptr_t)x, (json_t *)(uintptr_t)y);
}

/* Is `value` among the values that the schema names? True when it names none. */
static bool names(const json_t *schema, const json_t *value) {
  const json_t *constant = json_object_get(schema, "const"), *choices = json_object_get(schema, "enum");
  if (constant) return same_value(constant, value);
  for (size_t i = 0; i < json_array_size(choices); i++) {
    if (same_value(json_array_get(choices, i), value)) return true;
  }
  return json_array_size(choices) == 0;
}

/* Certainly no value fits both. */
static bool apart(const struct qtr_schema_build *b, const json_t *x, const json_t *y, int depth) {
  const json_t *p = follow(b, x), *q = follow(b, y);
  int both = possible_types(b, p, 0) & possible_types(b, q, 0);
  if (both == 0) return true;
  for (int side = 0; side < 2; side++) { /* values of one that the other does not name */
    const json_t *one = side ? q : p, *other = side ? p : q;
    const json_t *constant = json_object_get(one, "const"), *choices = json_object_get(one, "enum");
    bool any = constant ? names(other, constant) : json_array_size(choices) == 0;
    for (size_t i = 0; !constant && i < json_array_size(choices); i++) any = any || names(other, json_array_get(choices, i));
    if (!any) return true;
  }
  if (both != IS_OBJECT || depth > 8) return false;
  const char *name;
  json_t *member;
  json_object_foreach(json_object_get(p, "properties"), name, member) { /* a member that both must have tells them apart */
    const json_t *there = json_object_get(json_object_get(q, "properties"), name);
    if (there && qtr_schema_requires(p, name) && qtr_schema_requires(q, name) && apart(b, member, there, depth + 1))
      return true;
  }
  return false;
}

bool qtr_schema_all_apart(const struct qtr_schema_build *b, const json_t *list) {
  size_t n = json_array_size(list);
  for (size_t i = 0; i < n; i++) {
    for (size_t k = i + 1; k < n; k++) {
      if (!apart(b, json_array_get(list, i), json_array_get(list, k), 0)) return false;
    }
  }
  return n <= 4096;
}
