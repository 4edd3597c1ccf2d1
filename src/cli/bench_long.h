/* bench_long.h - the result of `quattuor bench --long`, for those who print it. */
#ifndef QTR_CLI_BENCH_LONG_H
#define QTR_CLI_BENCH_LONG_H

#include "cli/bench_common.h"
#include "eval/bench.h"

#include <math.h>

enum { QTR_LONG_DENSE, QTR_LONG_SPARSE, QTR_LONG_SIDES };
extern const char *const qtr_long_names[QTR_LONG_SIDES];

/* One side at one length. */
struct qtr_long_cell {
  struct qtr_bench_round round[QTR_BENCH_MAX_ROUNDS]; /* (n) */
  int32_t n;
  double prefill_s, decode_ms; /* medians; NAN where nothing was measured */
  size_t kv_pool_bytes;
  struct qtr_error error; /* why nothing was measured, or not all rounds; status QTR_OK: all is there */
};

struct qtr_long_result {
  const struct qtr_bench_flags *flags;
  const char *name;                 /* of the model */
  bool on[QTR_LONG_SIDES];          /* which sides were asked for */
  size_t n_lengths, *length;        /* (n_lengths) ascending */
  struct qtr_long_cell *cell;       /* (n_lengths, QTR_LONG_SIDES) */
  struct qtr_sparse_options sparse; /* of the sparse side */
  const char *heads;                /* where its classes of heads come from, in words */
  uint8_t *streaming;               /* (n_layers, n_kv_heads) */
  int32_t n_layers, n_kv_heads, threads, group_size;
  char precision[24], device[32], device_name[128];
  size_t weight_bytes;
};

static inline struct qtr_long_cell *qtr_long_cell(const struct qtr_long_result *r, size_t i, int side) {
  return &r->cell[i * QTR_LONG_SIDES + (size_t)side];
}
/* Sparse against dense: how many times faster; NAN where one is missing. */
static inline double qtr_long_gain(double dense, double sparse) { return sparse > 0 ? dense / sparse : (double)NAN; }

/* The table: its head, and a line a length, so that each shows as soon as it is known. */
void qtr_long_print_head(const struct qtr_long_result *result);
void qtr_long_print_line(const struct qtr_long_result *result, size_t i);
json_t *qtr_long_json(const struct qtr_long_result *result); /* a new reference; NULL: out of memory */
/* Time of the prompt and time of a token over the length. *text is malloc'ed. */
enum qtr_status qtr_long_plot(const struct qtr_long_result *result, char **text, size_t *len, struct qtr_error *err);

#endif
