/* request_error.c - errors of the API in OpenAI's shape (request_parse.h): filled where the fault is found, written as JSON
 * that is JSON whatever the client had sent. */
#include "server/buffer.h"
#include "server/request_parse.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static const char *type_of(int http) {
  switch (http) {
    case 401: return "authentication_error";
    case 404: return "not_found_error";
    case 429: return "rate_limit_error";
    default: return http < 500 ? "invalid_request_error" : "server_error";
  }
}

bool qtr_api_fail(struct qtr_api_error *err, int http, const char *param, const char *format, ...) {
  *err = (struct qtr_api_error){.http = http, .type = type_of(http)};
  if (param) (void)snprintf(err->param, sizeof err->param, "%s", param);
  va_list args;
  va_start(args, format);
  (void)vsnprintf(err->message, sizeof err->message, format, args);
  va_end(args);
  return false;
}

/* Length of the UTF-8 character at s (n bytes are left), 0 when there is none. */
static size_t character(const unsigned char *s, size_t n) {
  size_t len = s[0] < 0x80 ? 1 : s[0] < 0xC2 ? 0 : s[0] < 0xE0 ? 2 : s[0] < 0xF0 ? 3 : s[0] < 0xF5 ? 4 : 0;
  if (len == 0 || len > n) return 0;
  for (size_t i = 1; i < len; i++) {
    if ((s[i] & 0xC0) != 0x80) return 0;
  }
  bool bad = (s[0] == 0xE0 && s[1] < 0xA0) || (s[0] == 0xED && s[1] > 0x9F) || (s[0] == 0xF0 && s[1] < 0x90) ||
             (s[0] == 0xF4 && s[1] > 0x8F);
  return bad ? 0 : len;
}

/* A message as a JSON string. It may quote what a client sent, and vsnprintf may have cut a character in two: what is no
 * UTF-8 becomes '?'. */
static void put_message(struct qtr_buffer *out, char *text) {
  size_t n = strlen(text);
  for (size_t i = 0, len; i < n; i += len) {
    len = character((const unsigned char *)text + i, n - i);
    if (len == 0) text[i] = '?', len = 1;
  }
  qtr_buffer_string(out, text, n);
}

void qtr_api_error_write(const struct qtr_api_error *err, struct qtr_buffer *out) {
  struct qtr_api_error e = *err;
  qtr_buffer_puts(out, "{\"error\":{\"message\":");
  put_message(out, e.message);
  qtr_buffer_printf(out, ",\"type\":\"%s\",\"param\":", err->type);
  if (err->param[0])
    put_message(out, e.param);
  else
    qtr_buffer_puts(out, "null");
  qtr_buffer_puts(out, ",\"code\":");
  if (err->code)
    qtr_buffer_string(out, err->code, strlen(err->code));
  else
    qtr_buffer_puts(out, "null");
  qtr_buffer_puts(out, "}}");
}

void qtr_api_error_from(struct qtr_api_error *err, const struct qtr_error *from, const char *param) {
  int http = 500;
  switch (from->status) {
    case QTR_ERR_ARGUMENT:
    case QTR_ERR_FORMAT:
    case QTR_ERR_LIMIT:
    case QTR_ERR_UNSUPPORTED:
    case QTR_ERR_NOT_FOUND: http = 400; break;
    case QTR_ERR_MEMORY:
    case QTR_ERR_BACKEND: http = 503; break;
    default: break;
  }
  (void)qtr_api_fail(err, http, param, "%s", from->message);
  if (from->status == QTR_ERR_LIMIT) err->code = "context_length_exceeded";
}
