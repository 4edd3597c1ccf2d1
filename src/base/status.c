/* status.c - error values and their messages (status.h). */
#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#undef qtr_fail /* the analyzer's, see status.h */
#undef qtr_fail_memory

#define QTR_STRING2(x) #x
#define QTR_STRING(x) QTR_STRING2(x)

const char *qtr_version(void) {
  return QTR_STRING(QTR_VERSION_MAJOR) "." QTR_STRING(QTR_VERSION_MINOR) "." QTR_STRING(QTR_VERSION_PATCH);
}

const char *qtr_status_name(enum qtr_status status) {
  switch (status) {
    case QTR_OK: return "QTR_OK";
    case QTR_ERR_ARGUMENT: return "QTR_ERR_ARGUMENT";
    case QTR_ERR_IO: return "QTR_ERR_IO";
    case QTR_ERR_FORMAT: return "QTR_ERR_FORMAT";
    case QTR_ERR_UNSUPPORTED: return "QTR_ERR_UNSUPPORTED";
    case QTR_ERR_MEMORY: return "QTR_ERR_MEMORY";
    case QTR_ERR_LIMIT: return "QTR_ERR_LIMIT";
    case QTR_ERR_NOT_FOUND: return "QTR_ERR_NOT_FOUND";
    case QTR_ERR_STATE: return "QTR_ERR_STATE";
    case QTR_ERR_BACKEND: return "QTR_ERR_BACKEND";
  }
  return "QTR_ERR_UNKNOWN";
}

enum qtr_status qtr_fail(struct qtr_error *err, enum qtr_status status, const char *format, ...) {
  if (err) {
    err->status = status;
    va_list args;
    va_start(args, format);
    (void)vsnprintf(err->message, sizeof err->message, format, args);
    va_end(args);
  }
  return status;
}

enum qtr_status qtr_error_prefix(struct qtr_error *err, const char *format, ...) {
  if (!err) return QTR_ERR_FORMAT;
  char old[sizeof err->message];
  memcpy(old, err->message, sizeof old);
  va_list args;
  va_start(args, format);
  int n = vsnprintf(err->message, sizeof err->message, format, args);
  va_end(args);
  if (n >= 0 && (size_t)n < sizeof err->message) {
    (void)snprintf(err->message + n, sizeof err->message - (size_t)n, ": %.400s", old);
  }
  return err->status;
}

enum qtr_status qtr_fail_memory(struct qtr_error *err, const char *what, size_t n_bytes) {
  return qtr_fail(err, QTR_ERR_MEMORY, "cannot allocate %zu bytes for %s; free some memory or choose smaller limits",
                  n_bytes, what);
}

const char *qtr_printable(const char *text, size_t len, char *out, size_t n) {
  if (n == 0) return out;
  size_t k = 0;
  for (size_t i = 0; i < len && k + 1 < n; i++) {
    unsigned char c = (unsigned char)text[i];
    out[k++] = (c >= 0x20 && c < 0x7f) ? (char)c : '?';
  }
  out[k] = 0;
  return out;
}
