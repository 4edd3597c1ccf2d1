/* runner.h - the threads behind the event loop: one that steps the engine, and a few that do what takes time before a
 * request can be queued (JSON, templates, tokens). Both hand their results to the loop through one mailbox and a descriptor
 * that becomes readable. */
#ifndef QTR_SERVER_RUNNER_H
#define QTR_SERVER_RUNNER_H

#include "server/metrics.h"

struct qtr_runner;

/* An engine's event, copied. Records lie one behind the other in the mailbox's bytes. */
struct qtr_mail {
  size_t n_bytes;         /* of the whole record */
  double time;            /* of the step that made it */
  struct qtr_event event; /* text and top_logprob point behind this struct */
};

/* Work for a worker: `work` runs there, `done` later in the loop. */
struct qtr_task {
  struct qtr_task *next;
  void (*work)(struct qtr_task *task);
  void (*done)(struct qtr_task *task);
};

/* Starts the threads. */
enum qtr_status qtr_runner_create(struct qtr_engine *engine, int n_workers, struct qtr_runner **runner,
                                  struct qtr_error *err);
/* Waits for the threads. Mail and finished tasks can still be collected; tasks that no worker took yet are only freed. */
void qtr_runner_stop(struct qtr_runner *runner);
/* Stops; `done` is called for every task that is left, worked on or not. NULL is allowed. */
void qtr_runner_free(struct qtr_runner *runner);

int qtr_runner_fd(const struct qtr_runner *runner); /* readable: there is mail */
void qtr_runner_kick(struct qtr_runner *runner);    /* a request was added or cancelled */
void qtr_runner_submit(struct qtr_runner *runner, struct qtr_task *task);
/* In the loop: hands every event to `take` and finishes tasks. */
void qtr_runner_collect(struct qtr_runner *runner, void (*take)(const struct qtr_mail *mail, void *arg), void *arg);
/* NULL while the engine lives, else why it died; static for the runner's life. */
const char *qtr_runner_death(struct qtr_runner *runner);
void qtr_runner_metrics(struct qtr_runner *runner, struct qtr_step_metrics *metrics);

#endif
