/* progress.c - the progress line (progress.h). */
#include "base/progress.h"

#include "base/clock.h"

#include <stdio.h>
#include <unistd.h>

void qtr_progress_start(struct qtr_progress *p, const char *label, size_t total, bool quiet) {
  *p = (struct qtr_progress){.total = total, .quiet = quiet, .terminal = isatty(2) == 1};
  (void)snprintf(p->label, sizeof p->label, "%s", label);
  p->t_start = p->t_drawn = qtr_now();
}

void qtr_progress_update(struct qtr_progress *p, size_t done) {
  if (p->quiet) return;
  double now = qtr_now();
  if (now - p->t_start < 0.5) return;
  if (!p->terminal) {
    if (!p->shown) (void)fprintf(stderr, "%s ...\n", p->label);
    p->shown = true;
    return;
  }
  if (p->shown && now - p->t_drawn < 0.1) return;
  p->t_drawn = now;
  p->shown = true;
  double share = p->total ? (double)done / (double)p->total : 0;
  if (share > 1) share = 1;
  char bar[31];
  for (int i = 0; i < 30; i++) bar[i] = (double)i < share * 30 ? '#' : '.';
  bar[30] = 0;
  double left = share > 0.01 ? (now - p->t_start) * (1 - share) / share : 0;
  (void)fprintf(stderr, "\r\033[K%s [%s] %3.0f %%  %.0f s left", p->label, bar, share * 100, left);
  (void)fflush(stderr);
}

void qtr_progress_end(struct qtr_progress *p) {
  if (p->quiet || !p->shown) return;
  (void)fprintf(stderr, "%s%s: %.1f s\n", p->terminal ? "\r\033[K" : "", p->label, qtr_now() - p->t_start);
  p->shown = false;
}
