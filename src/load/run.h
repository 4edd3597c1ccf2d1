/* run.h - sends a workload to a server and measures. */
#ifndef QTR_LOAD_RUN_H
#define QTR_LOAD_RUN_H

#include "load/stats.h"
#include "load/workload.h"

struct qtr_load_options {
  const char *url, *ca, *key; /* key: NULL = none; ca: as qtr_load_client_open has it */
  const char *model;          /* NULL: the first that /v1/models names */
  int32_t concurrency;        /* 0: open loop, at the trace's times; else so many at once, whatever the times say */
  double speed;               /* trace time runs so many times as fast; 1 */
  double duration;            /* seconds after which nothing more is sent; 0 = all of the trace */
  double timeout;             /* seconds a request may take */
  struct qtr_body_options body;
  bool (*stop)(void); /* asked ten times a second: true ends the run; NULL = never */
  bool quiet;         /* no progress line */
};

/* What a server says of itself. */
struct qtr_load_server {
  char model[256];
  int32_t max_model_len; /* 0 = it does not say */
};
enum qtr_status qtr_load_ask_server(const struct qtr_load_options *options, struct qtr_load_server *server,
                                    struct qtr_error *err);

/* Sends and waits until the last answer. Failures of requests are results, not errors. */
enum qtr_status qtr_load_run(const struct qtr_load_options *options, const struct qtr_workload *workload,
                             struct qtr_load_run *run, struct qtr_error *err);

/* What one event of a completion's stream says; for the runner, its tests and its fuzz target. */
struct qtr_load_chunk {
  bool end, token; /* end: [DONE], or a reason why the text ends, for not every server says [DONE]; token: a piece of text */
  int32_t n_input, n_output; /* of "usage", -1 without */
  char error[200];           /* "" = none */
};
/* False: it is no event of such a stream. */
bool qtr_load_chunk_read(const char *data, size_t len, struct qtr_load_chunk *chunk);
/* The two ways it goes, for tests: one that knows the usual event only (false: another), and one that knows JSON. */
bool qtr_load_chunk_read_plain(const char *data, size_t len, struct qtr_load_chunk *chunk);
bool qtr_load_chunk_read_tree(const char *data, size_t len, struct qtr_load_chunk *chunk);

#endif
