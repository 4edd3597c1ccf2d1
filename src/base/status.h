/* status.h - filling a struct qtr_error. Errors are values: filled once, where the fault is found. */
#ifndef QTR_BASE_STATUS_H
#define QTR_BASE_STATUS_H

#include "quattuor/quattuor.h"

/* Stores status and message (err may be NULL) and returns status. A message names the thing and the way out. */
enum qtr_status qtr_fail(struct qtr_error *err, enum qtr_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Puts "<prefix>: " before the message that is already there, for callers that know the file. Returns err->status. */
enum qtr_status qtr_error_prefix(struct qtr_error *err, const char *format, ...) __attribute__((format(printf, 2, 3)));

enum qtr_status qtr_fail_memory(struct qtr_error *err, const char *what, size_t n_bytes);

#ifdef __clang_analyzer__ /* it looks at one file at a time: lets it see that these return the status they are given */
#define qtr_fail(err, status, ...) ((void)qtr_fail(err, status, __VA_ARGS__), (status))
#define qtr_fail_memory(err, what, n_bytes) ((void)qtr_fail_memory(err, what, n_bytes), QTR_ERR_MEMORY)
#endif

/* Copies `text` to `out` (size n) with control characters and invalid UTF-8 replaced by '?', for names that come from
 * files and end in messages or terminals. Returns out. */
const char *qtr_printable(const char *text, size_t len, char *out, size_t n);

#endif
