/* clock.h - monotonic time in seconds. */
#ifndef QTR_BASE_CLOCK_H
#define QTR_BASE_CLOCK_H

double qtr_now(void);

#endif
