/* buffer.h - a growing byte buffer and the JSON that the server writes into it. Every function is safe on a buffer that ran
 * out of memory: `failed` stays set, and the caller looks once at the end. */
#ifndef QTR_SERVER_BUFFER_H
#define QTR_SERVER_BUFFER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct qtr_buffer {
  char *data; /* (len) and a NUL after it, NULL while nothing was written */
  size_t len, capacity;
  bool failed;
};

void qtr_buffer_free(struct qtr_buffer *b); /* and clears it */
void qtr_buffer_put(struct qtr_buffer *b, const void *data, size_t len);
void qtr_buffer_puts(struct qtr_buffer *b, const char *text);
void qtr_buffer_printf(struct qtr_buffer *b, const char *format, ...) __attribute__((format(printf, 2, 3)));
void qtr_buffer_integer(struct qtr_buffer *b, int64_t x); /* decimal */
void qtr_buffer_hex(struct qtr_buffer *b, uint64_t x);    /* lower case, no prefix */
/* A JSON string with its quotes. `text` is UTF-8; control characters are escaped. */
void qtr_buffer_string(struct qtr_buffer *b, const char *text, size_t len);
/* The shortest of a few widths that reads back as the same float; infinities become the largest numbers, NaN null. */
void qtr_buffer_number(struct qtr_buffer *b, double x);

#endif
