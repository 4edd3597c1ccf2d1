/* progress.h - a progress line on stderr for anything that lasts. Draws only on a terminal, at most ten times a second;
 * elsewhere it prints one line at the start and one at the end. Never writes to stdout. */
#ifndef QTR_BASE_PROGRESS_H
#define QTR_BASE_PROGRESS_H

#include <stdbool.h>
#include <stddef.h>

struct qtr_progress {
  char label[64];
  size_t total;
  double t_start, t_drawn;
  bool quiet, terminal, shown;
};

void qtr_progress_start(struct qtr_progress *p, const char *label, size_t total, bool quiet);
void qtr_progress_update(struct qtr_progress *p, size_t done); /* first drawn when the work has lasted 0.5 s */
void qtr_progress_end(struct qtr_progress *p);

#endif
