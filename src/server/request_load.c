/* request_load.c - the text of a body to JSON (request_internal.h), what that may cost bounded before it is paid. */
#include "server/request_internal.h"

#include <stdlib.h>
#include <string.h>

bool qtr_api_load_fits(const char *text, size_t len, size_t *room, struct qtr_api_error *err) {
  size_t depth = 0;
  bool inside = false;
  for (size_t i = 0; i < len; i++) {
    char c = text[i];
    if (inside) {
      if (c == '\\')
        i++;
      else if (c == '"')
        inside = false;
    } else if (c == '"') {
      inside = true;
    } else if (c == '[' || c == '{') {
      if (++depth > QTR_API_MAX_DEPTH) {
        return qtr_api_fail(err, 400, NULL, "the JSON body is nested deeper than %d levels", QTR_API_MAX_DEPTH);
      }
      if (*room == 0) {
        return qtr_api_fail(err, 400, NULL, "the JSON body has more than %d arrays and objects", QTR_API_MAX_CONTAINERS);
      }
      (*room)--;
    } else if ((c == ']' || c == '}') && depth > 0) {
      depth--;
    }
  }
  return true;
}

/* A member's name with \u0000 in it is none we know, but jansson would refuse the whole body for it: it becomes \u0001.
 * name: the string (len) between its quotes. */
static void mend_name(char *name, size_t len) {
  for (size_t i = 0; i + 6 <= len; i += name[i] == '\\' ? 2 : 1) {
    if (memcmp(name + i, "\\u0000", 6) == 0) name[i + 5] = '1';
  }
}

static void mend_names(char *body, size_t len) {
  for (size_t i = 0; i < len; i++) {
    if (body[i] != '"') continue;
    size_t from = ++i;
    while (i < len && body[i] != '"') i += body[i] == '\\' ? 2 : 1;
    size_t next = i + 1;
    while (next < len && (body[next] == ' ' || body[next] == '\n' || body[next] == '\r' || body[next] == '\t')) next++;
    if (i < len && next < len && body[next] == ':') mend_name(body + from, i - from);
  }
}

/* Whole numbers beyond 64 bits become reals, so that one in a member nobody knows hurts nobody. */
static json_t *load_leniently(const char *body, size_t len, json_error_t *where) {
  json_t *root = json_loadb(body, len, JSON_ALLOW_NUL, where);
  if (root ||
      (json_error_code(where) != json_error_numeric_overflow && json_error_code(where) != json_error_null_byte_in_key)) {
    return root;
  }
  char *mended = malloc(len + 1);
  if (!mended) return NULL;
  memcpy(mended, body, len);
  mend_names(mended, len);
  root = json_loadb(mended, len, JSON_ALLOW_NUL | JSON_DECODE_INT_AS_REAL, where);
  free(mended);
  return root;
}

bool qtr_api_load(const char *body, size_t len, json_t **root, struct qtr_api_error *err) {
  json_error_t where = {0};
  size_t room = QTR_API_MAX_CONTAINERS;
  *root = NULL;
  if (!qtr_api_load_fits(body, len, &room, err)) return false;
  *root = load_leniently(body, len, &where);
  if (!*root) {
    return qtr_api_fail(err, 400, NULL, "the body is not valid JSON: line %d, column %d: %s", where.line, where.column,
                        where.text);
  }
  if (json_is_object(*root)) return true;
  json_decref(*root);
  *root = NULL;
  return qtr_api_fail(err, 400, NULL, "the body must be a JSON object");
}

const char *qtr_api_kind_name(const json_t *value) {
  switch (json_typeof(value)) {
    case JSON_OBJECT: return "an object";
    case JSON_ARRAY: return "an array";
    case JSON_STRING: return "a string";
    case JSON_INTEGER:
    case JSON_REAL: return "a number";
    case JSON_TRUE:
    case JSON_FALSE: return "a boolean";
    default: return "null";
  }
}
