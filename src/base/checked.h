/* checked.h - overflow-checked arithmetic for every size that comes from outside. Each returns true on overflow, as
 * the compiler builtins do. */
#ifndef QTR_BASE_CHECKED_H
#define QTR_BASE_CHECKED_H

#include <stdbool.h>
#include <stddef.h>

static inline bool qtr_mul_overflow(size_t a, size_t b, size_t *out) { return __builtin_mul_overflow(a, b, out); }
static inline bool qtr_add_overflow(size_t a, size_t b, size_t *out) { return __builtin_add_overflow(a, b, out); }

static inline size_t qtr_round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }
static inline size_t qtr_ceil_div(size_t n, size_t by) { return (n + by - 1) / by; }
#define QTR_MIN(a, b) ((a) < (b) ? (a) : (b))
#define QTR_MAX(a, b) ((a) > (b) ? (a) : (b))

#endif
