/* profile_report.h - prints where the time of a step goes (model/profile.h), against what the machine can do. */
#ifndef QTR_CLI_PROFILE_REPORT_H
#define QTR_CLI_PROFILE_REPORT_H

#include "model/profile.h"

#include <jansson.h>

/* Bytes a second that `threads` threads read from memory larger than the caches; the best of a few passes. 0: no memory. */
double qtr_measure_memory_speed(int threads);
/* A table on stdout: calls, milliseconds, share of the time, GB/s and its share of memory_speed, GOP/s. */
void qtr_profile_print(const struct qtr_profile *profile, double memory_speed);
json_t *qtr_profile_json(const struct qtr_profile *profile, double memory_speed);

#endif
