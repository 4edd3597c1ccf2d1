/* threads.h - a team of threads for short parallel loops, one loop after another.
 *
 * Why not OpenMP: libgomp's workers spin for milliseconds between loops and its barrier waits for every member of the team,
 * so with anything else running on the machine most of the time goes into waiting (measured here with two other busy
 * processes on two cores: two thirds of all cycles were spent in libgomp). This team spins for some tens of microseconds,
 * then sleeps; a member that the system has not scheduled yet is simply left out of the loop, and the others do its share.
 * ThreadSanitizer can see it, too. */
#ifndef QTR_BASE_THREADS_H
#define QTR_BASE_THREADS_H

#include "quattuor/quattuor.h"

struct qtr_threads;

/* A team of n threads, the caller's included: n - 1 are started. 1 <= n <= 1024. */
enum qtr_status qtr_threads_create(int n, struct qtr_threads **threads, struct qtr_error *err);
void qtr_threads_free(struct qtr_threads *threads); /* NULL is allowed */
int qtr_threads_count(const struct qtr_threads *threads);

/* [begin, end) of the loop, on member `thread` of 0 … n-1; the caller is member 0. */
typedef void (*qtr_task)(void *arg, size_t begin, size_t end, int thread);

/* Runs task over [0, n) in pieces of `chunk` items, handed out as the members come, and returns when all are done. One
 * caller at a time, not from inside a task. */
void qtr_threads_for(struct qtr_threads *threads, size_t n, size_t chunk, qtr_task task, void *arg);

/* Cores this process may use (its affinity mask). */
int qtr_threads_available(void);

#endif
