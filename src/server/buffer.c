/* buffer.c - bytes and JSON out (buffer.h). */
#include "server/buffer.h"

#include <float.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void qtr_buffer_free(struct qtr_buffer *b) {
  free(b->data);
  *b = (struct qtr_buffer){0};
}

/* Room for n more bytes and a NUL. */
static bool reserve(struct qtr_buffer *b, size_t n) {
  if (b->failed) return false;
  if (b->capacity - b->len > n) return true; /* both zero at first */
  size_t wanted = b->capacity > 0 ? b->capacity : 128;
  while (wanted - b->len <= n) {
    if (wanted > SIZE_MAX / 4) {
      b->failed = true;
      return false;
    }
    wanted *= 2;
  }
  char *more = realloc(b->data, wanted);
  if (!more) {
    b->failed = true;
    return false;
  }
  b->data = more;
  b->capacity = wanted;
  return true;
}

void qtr_buffer_put(struct qtr_buffer *b, const void *data, size_t len) {
  if (!reserve(b, len)) return;
  if (len > 0) memcpy(b->data + b->len, data, len);
  b->len += len;
  b->data[b->len] = 0;
}

void qtr_buffer_puts(struct qtr_buffer *b, const char *text) { qtr_buffer_put(b, text, strlen(text)); }

void qtr_buffer_printf(struct qtr_buffer *b, const char *format, ...) {
  va_list args, again;
  va_start(args, format);
  va_copy(again, args);
  int n = vsnprintf(NULL, 0, format, args);
  if (n < 0) b->failed = true;
  if (n >= 0 && reserve(b, (size_t)n)) {
    (void)vsnprintf(b->data + b->len, (size_t)n + 1, format, again);
    b->len += (size_t)n;
  }
  va_end(again);
  va_end(args);
}

static const char hex[] = "0123456789abcdef";

/* printf takes several times as long, and streams write two numbers a token. */
static void put_digits(struct qtr_buffer *b, uint64_t x, unsigned base, bool negative) {
  char digits[21];
  size_t at = sizeof digits;
  do digits[--at] = hex[x % base];
  while ((x /= base) > 0);
  if (negative) digits[--at] = '-';
  qtr_buffer_put(b, digits + at, sizeof digits - at);
}

void qtr_buffer_integer(struct qtr_buffer *b, int64_t x) { put_digits(b, x < 0 ? 0 - (uint64_t)x : (uint64_t)x, 10, x < 0); }

void qtr_buffer_hex(struct qtr_buffer *b, uint64_t x) { put_digits(b, x, 16, false); }

void qtr_buffer_string(struct qtr_buffer *b, const char *text, size_t len) {
  qtr_buffer_put(b, "\"", 1);
  size_t from = 0;
  for (size_t i = 0; i < len; i++) {
    unsigned char c = (unsigned char)text[i];
    if (c >= 0x20 && c != '"' && c != '\\' && c != 0x7f) continue;
    qtr_buffer_put(b, text + from, i - from);
    from = i + 1;
    switch (c) {
      case '"': qtr_buffer_put(b, "\\\"", 2); break;
      case '\\': qtr_buffer_put(b, "\\\\", 2); break;
      case '\n': qtr_buffer_put(b, "\\n", 2); break;
      case '\r': qtr_buffer_put(b, "\\r", 2); break;
      case '\t': qtr_buffer_put(b, "\\t", 2); break;
      default: qtr_buffer_put(b, (char[]){'\\', 'u', '0', '0', hex[c >> 4], hex[c & 15]}, 6);
    }
  }
  qtr_buffer_put(b, text + from, len - from);
  qtr_buffer_put(b, "\"", 1);
}

void qtr_buffer_number(struct qtr_buffer *b, double x) {
  if (isnan(x)) {
    qtr_buffer_puts(b, "null");
    return;
  }
  if (isinf(x)) x = x > 0 ? DBL_MAX : -DBL_MAX;
  char text[40];
  for (int digits = 6; digits <= 9; digits++) {
    (void)snprintf(text, sizeof text, "%.*g", digits, x);
    double read = strtod(text, NULL);
    if (fabs(read - x) <= fabs(x) * 0x1p-25) break; /* the same float */
  }
  qtr_buffer_puts(b, text);
}
