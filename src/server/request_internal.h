/* request_internal.h - what the files that read request bodies share (request_load.c, request_messages.c, request_parse.c).
 */
#ifndef QTR_SERVER_REQUEST_INTERNAL_H
#define QTR_SERVER_REQUEST_INTERNAL_H

#include "server/request_parse.h"

#include <string.h>

/* body (len) to a JSON object, a new reference. Whole numbers beyond 64 bits become reals. */
bool qtr_api_load(const char *body, size_t len, json_t **root, struct qtr_api_error *err);
/* Bounds what parsing a JSON text can cost before it is paid: its depth, and its arrays and objects, which are taken from
 * *room. Strings are skipped; whether they are well formed is jansson's question. */
bool qtr_api_load_fits(const char *text, size_t len, size_t *room, struct qtr_api_error *err);
const char *qtr_api_kind_name(const json_t *value); /* "a string"; static */

static inline bool qtr_api_no_memory(struct qtr_api_error *err) { return qtr_api_fail(err, 503, NULL, "out of memory"); }

/* The member, or NULL when it is absent or null. */
static inline json_t *qtr_api_member(const json_t *object, const char *name) {
  json_t *value = json_object_get(object, name);
  return json_is_null(value) ? NULL : value;
}

/* A string equal to this word (a NUL inside makes it another one). */
static inline bool qtr_api_is_word(const json_t *value, const char *word) {
  size_t n = strlen(word);
  return json_is_string(value) && json_string_length(value) == n && memcmp(json_string_value(value), word, n) == 0;
}

/* Members of requests that are neither flags nor numbers nor plain strings, for the table in request_parse.c. */
bool qtr_api_read_messages(json_t *value, struct qtr_api_request *request, struct qtr_api_error *err);
bool qtr_api_read_tools(json_t *value, struct qtr_api_request *request, struct qtr_api_error *err);
bool qtr_api_read_tool_choice(json_t *value, struct qtr_api_request *request, struct qtr_api_error *err);
/* Whether tool_choice and tools go together; sets the request's tool_choice where only tools were given. */
bool qtr_api_check_tools(struct qtr_api_request *request, struct qtr_api_error *err);

#endif
