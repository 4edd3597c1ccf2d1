/* runner.c - the engine's thread and the workers (runner.h). */
#include "server/runner.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdalign.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define MAX_WORKERS 8

struct bytes {
  char *data;
  size_t len, capacity;
};

struct qtr_runner {
  struct qtr_engine *engine;
  int mail_fd; /* an eventfd, read by the loop */
  pthread_t stepper, worker[MAX_WORKERS];
  int n_workers;
  bool stepper_runs;

  pthread_mutex_t work_mutex; /* guards what wakes the threads */
  pthread_cond_t step_wanted, task_there;
  bool kicked, stop;
  struct qtr_task *first, *last; /* for workers */

  pthread_mutex_t mail_mutex; /* guards what goes to the loop */
  struct bytes mail;          /* records of struct qtr_mail */
  struct qtr_task *done_first, *done_last;
  bool signalled; /* the loop has been told, or will be by the one who set this */
  bool dead;
  char death[512];
  struct qtr_step_metrics metrics;

  struct bytes reading; /* the loop's: what it reads while the next mail arrives */
};

/* Gives the mail free, and tells the loop of it where `wake` and nobody did yet. The loop is told behind the mutex: else it
 * would wake up to wait for the one who woke it. */
static void leave_mail(struct qtr_runner *r, bool wake) {
  bool first = wake && !r->signalled;
  r->signalled = r->signalled || wake;
  pthread_mutex_unlock(&r->mail_mutex);
  if (first) (void)eventfd_write(r->mail_fd, 1); /* it can only fail by counting to 2^64 */
}

/* ---- the engine's thread ------------------------------------------------------------------------- */

static bool bytes_reserve(struct bytes *b, size_t n) {
  if (b->capacity - b->len >= n) return true;
  size_t wanted = QTR_MAX(b->capacity * 2, b->len + n);
  wanted = QTR_MAX(wanted, (size_t)65536);
  char *more = realloc(b->data, wanted);
  if (!more) return false;
  b->data = more;
  b->capacity = wanted;
  return true;
}

/* Appends a copy of the event. A lost event would leave a client waiting for ever: without memory it waits for some. */
static void append_mail(struct qtr_runner *r, const struct qtr_event *e, double now) {
  size_t n_top = (size_t)e->n_top_logprob * sizeof *e->top_logprob;
  size_t n = qtr_round_up(sizeof(struct qtr_mail) + n_top + e->text_len + 1, alignof(max_align_t));
  while (!bytes_reserve(&r->mail, n)) {
    pthread_mutex_unlock(&r->mail_mutex);
    (void)nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
    pthread_mutex_lock(&r->mail_mutex);
  }
  struct qtr_mail *m = (struct qtr_mail *)(void *)(r->mail.data + r->mail.len);
  *m = (struct qtr_mail){.n_bytes = n, .time = now, .event = *e};
  char *behind = (char *)(m + 1);
  if (n_top > 0) memcpy(behind, e->top_logprob, n_top);
  memcpy(behind + n_top, e->text, e->text_len);
  behind[n_top + e->text_len] = 0;
  r->mail.len += n;
}

/* One step and its events. Returns whether there is more to do. */
static bool step(struct qtr_runner *r) {
  struct qtr_error err = {0};
  bool has_work = false;
  double start = qtr_now();
  enum qtr_status status = qtr_engine_step(r->engine, &has_work, &err);
  double now = qtr_now();
  int n_tokens = 0;
  struct qtr_event event;
  pthread_mutex_lock(&r->mail_mutex);
  bool any = false;
  while (qtr_engine_poll(r->engine, &event)) {
    append_mail(r, &event, now);
    n_tokens += event.token >= 0 && event.prompt_index == 0;
    any = true;
  }
  if (any || has_work) {
    qtr_histogram_add(&r->metrics.seconds, now - start);
    qtr_histogram_add(&r->metrics.batch, n_tokens);
  }
  if (status == QTR_ERR_BACKEND || (status == QTR_ERR_STATE && !has_work)) {
    if (!r->dead) memcpy(r->death, err.message, sizeof r->death);
    r->dead = any = true;
    has_work = false;
  }
  leave_mail(r, any);
  if (status == QTR_ERR_MEMORY) (void)nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
  return has_work;
}

static void *run_stepper(void *arg) {
  struct qtr_runner *r = arg;
  bool has_work = false;
  for (;;) {
    pthread_mutex_lock(&r->work_mutex);
    while (!r->kicked && !has_work && !r->stop) (void)pthread_cond_wait(&r->step_wanted, &r->work_mutex);
    bool stop = r->stop;
    r->kicked = false;
    pthread_mutex_unlock(&r->work_mutex);
    has_work = step(r); /* once more when stopping: what was cancelled last still has its events */
    if (stop) return NULL;
  }
}

/* ---- workers ------------------------------------------------------------------------------------- */

static void *run_worker(void *arg) {
  struct qtr_runner *r = arg;
  for (;;) {
    pthread_mutex_lock(&r->work_mutex);
    while (!r->first && !r->stop) (void)pthread_cond_wait(&r->task_there, &r->work_mutex);
    struct qtr_task *task = r->stop ? NULL : r->first;
    if (task) {
      r->first = task->next;
      if (!r->first) r->last = NULL;
    }
    pthread_mutex_unlock(&r->work_mutex);
    if (!task) return NULL;
    task->work(task);
    pthread_mutex_lock(&r->mail_mutex);
    task->next = NULL;
    if (r->done_last)
      r->done_last->next = task;
    else
      r->done_first = task;
    r->done_last = task;
    leave_mail(r, true);
  }
}

void qtr_runner_submit(struct qtr_runner *r, struct qtr_task *task) {
  pthread_mutex_lock(&r->work_mutex);
  task->next = NULL;
  if (r->last)
    r->last->next = task;
  else
    r->first = task;
  r->last = task;
  (void)pthread_cond_signal(&r->task_there);
  pthread_mutex_unlock(&r->work_mutex);
}

void qtr_runner_kick(struct qtr_runner *r) {
  pthread_mutex_lock(&r->work_mutex);
  r->kicked = true;
  (void)pthread_cond_signal(&r->step_wanted);
  pthread_mutex_unlock(&r->work_mutex);
}

/* ---- the loop's side ----------------------------------------------------------------------------- */

int qtr_runner_fd(const struct qtr_runner *r) { return r->mail_fd; }

void qtr_runner_collect(struct qtr_runner *r, void (*take)(const struct qtr_mail *mail, void *arg), void *arg) {
  eventfd_t count;
  (void)eventfd_read(r->mail_fd, &count); /* before the mail is taken: what comes later is told anew */
  pthread_mutex_lock(&r->mail_mutex);
  r->signalled = false;
  struct bytes mail = r->mail;
  r->mail = r->reading;
  r->mail.len = 0;
  r->reading = mail;
  struct qtr_task *task = r->done_first;
  r->done_first = r->done_last = NULL;
  pthread_mutex_unlock(&r->mail_mutex);
  for (size_t at = 0; at < mail.len;) {
    struct qtr_mail *m = (struct qtr_mail *)(void *)(mail.data + at);
    char *behind = (char *)(m + 1);
    m->event.top_logprob = (const struct qtr_token_logprob *)(const void *)behind;
    m->event.text = behind + (size_t)m->event.n_top_logprob * sizeof *m->event.top_logprob;
    at += m->n_bytes;
    take(m, arg);
  }
  while (task) {
    struct qtr_task *next = task->next;
    task->done(task);
    task = next;
  }
}

const char *qtr_runner_death(struct qtr_runner *r) {
  pthread_mutex_lock(&r->mail_mutex);
  const char *why = r->dead ? r->death : NULL; /* written once */
  pthread_mutex_unlock(&r->mail_mutex);
  return why;
}

void qtr_runner_metrics(struct qtr_runner *r, struct qtr_step_metrics *metrics) {
  pthread_mutex_lock(&r->mail_mutex);
  *metrics = r->metrics;
  pthread_mutex_unlock(&r->mail_mutex);
}

/* ---- life ---------------------------------------------------------------------------------------- */

enum qtr_status qtr_runner_create(struct qtr_engine *engine, int n_workers, struct qtr_runner **out, struct qtr_error *err) {
  *out = NULL;
  struct qtr_runner *r = calloc(1, sizeof *r);
  if (!r) return qtr_fail_memory(err, "the server's threads", sizeof *r);
  r->engine = engine;
  qtr_step_metrics_init(&r->metrics);
  r->mail_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (r->mail_fd < 0) {
    free(r);
    return qtr_fail(err, QTR_ERR_IO, "cannot make an event descriptor: %s", strerror(errno));
  }
  (void)pthread_mutex_init(&r->work_mutex, NULL);
  (void)pthread_mutex_init(&r->mail_mutex, NULL);
  (void)pthread_cond_init(&r->step_wanted, NULL);
  (void)pthread_cond_init(&r->task_there, NULL);
  sigset_t all, before; /* signals are the loop's */
  (void)sigfillset(&all);
  (void)pthread_sigmask(SIG_SETMASK, &all, &before);
  int wrong = pthread_create(&r->stepper, NULL, run_stepper, r);
  r->stepper_runs = !wrong;
  for (int i = 0; i < QTR_MIN(n_workers, MAX_WORKERS) && !wrong; i++) {
    wrong = pthread_create(&r->worker[i], NULL, run_worker, r);
    if (!wrong) r->n_workers++;
  }
  (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (wrong) {
    qtr_runner_free(r);
    return qtr_fail(err, QTR_ERR_MEMORY, "cannot start the server's threads: %s", strerror(wrong));
  }
  *out = r;
  return QTR_OK;
}

static void finish_tasks(struct qtr_task *task) {
  while (task) {
    struct qtr_task *next = task->next;
    task->done(task);
    task = next;
  }
}

void qtr_runner_stop(struct qtr_runner *r) {
  pthread_mutex_lock(&r->work_mutex);
  r->stop = true;
  (void)pthread_cond_broadcast(&r->step_wanted);
  (void)pthread_cond_broadcast(&r->task_there);
  pthread_mutex_unlock(&r->work_mutex);
  if (r->stepper_runs) (void)pthread_join(r->stepper, NULL);
  for (int i = 0; i < r->n_workers; i++) (void)pthread_join(r->worker[i], NULL);
  r->stepper_runs = false;
  r->n_workers = 0;
}

void qtr_runner_free(struct qtr_runner *r) {
  if (!r) return;
  qtr_runner_stop(r);
  finish_tasks(r->done_first);
  finish_tasks(r->first);
  (void)pthread_mutex_destroy(&r->work_mutex);
  (void)pthread_mutex_destroy(&r->mail_mutex);
  (void)pthread_cond_destroy(&r->step_wanted);
  (void)pthread_cond_destroy(&r->task_there);
  (void)close(r->mail_fd);
  free(r->mail.data);
  free(r->reading.data);
  free(r);
}
