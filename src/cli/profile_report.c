/* profile_report.c - a profile as a table or as JSON, with the memory ceiling measured on the spot (profile_report.h). */
#include "cli/profile_report.h"

#include "base/clock.h"
#include "cli/cli.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STREAM_BYTES ((size_t)1 << 30) /* together; last-level caches of large servers hold hundreds of MiB */
#define MAX_STREAMS 64
#define PASSES 3

struct stream {
  const uint64_t *data; /* (n) */
  size_t n;
  uint64_t sum; /* so that the reads are real */
};

static void *read_stream(void *arg) {
  struct stream *s = arg;
  uint64_t sum[8] = {0};
  for (size_t i = 0; i + 8 <= s->n; i += 8) {
    for (size_t k = 0; k < 8; k++) sum[k] += s->data[i + k];
  }
  for (size_t k = 0; k < 8; k++) s->sum += sum[k];
  return NULL;
}

double qtr_measure_memory_speed(int threads) {
  size_t n_threads = threads < 1 ? 1 : threads > MAX_STREAMS ? MAX_STREAMS : (size_t)threads;
  uint64_t *data = malloc(STREAM_BYTES);
  double best = 0;
  if (!data) return 0;
  memset(data, 1, STREAM_BYTES);
  for (int pass = 0; pass < PASSES; pass++) {
    struct stream stream[MAX_STREAMS];
    pthread_t thread[MAX_STREAMS];
    bool started[MAX_STREAMS];
    size_t n = STREAM_BYTES / sizeof *data / n_threads;
    double t = qtr_now();
    for (size_t i = 0; i < n_threads; i++) {
      stream[i] = (struct stream){.data = data + i * n, .n = n};
      started[i] = i > 0 && pthread_create(&thread[i], NULL, read_stream, &stream[i]) == 0;
    }
    for (size_t i = 0; i < n_threads; i++) {
      if (!started[i]) (void)read_stream(&stream[i]);
    }
    uint64_t sum = 0;
    for (size_t i = 0; i < n_threads; i++) {
      if (started[i]) (void)pthread_join(thread[i], NULL);
      sum += stream[i].sum;
    }
    double speed = (double)(n * n_threads * sizeof *data) / (qtr_now() - t);
    if (sum && speed > best) best = speed;
  }
  free(data);
  return best;
}

static double total_seconds(const struct qtr_profile *profile) {
  double total = 0;
  for (int i = 0; i < QTR_N_PROFILE_OPS; i++) total += profile->op[i].seconds;
  return total;
}

void qtr_profile_print(const struct qtr_profile *profile, double memory_speed) {
  double total = total_seconds(profile);
  printf("\n  last round by operation; memory reads at %.1f GB/s here\n", memory_speed * 1e-9);
  printf("  %-10s %9s %10s %7s %9s %7s %10s\n", "operation", "calls", "ms", "time", "GB/s", "memory", "GOP/s");
  for (int i = 0; i < QTR_N_PROFILE_OPS; i++) {
    const struct qtr_profile_entry *e = &profile->op[i];
    if (e->n_calls == 0 || e->seconds <= 0) continue;
    printf("  %-10s %9llu %10.1f %6.1f%% %9.2f %6.1f%% %10.1f\n", qtr_profile_names[i], (unsigned long long)e->n_calls,
           e->seconds * 1e3, e->seconds / total * 100, e->bytes / e->seconds * 1e-9,
           memory_speed > 0 ? e->bytes / e->seconds / memory_speed * 100 : 0, e->ops / e->seconds * 1e-9);
  }
}

json_t *qtr_profile_json(const struct qtr_profile *profile, double memory_speed) {
  json_t *list = json_array();
  double total = total_seconds(profile);
  for (int i = 0; i < QTR_N_PROFILE_OPS; i++) {
    const struct qtr_profile_entry *e = &profile->op[i];
    if (e->n_calls == 0 || e->seconds <= 0) continue;
    json_array_append_new(list, json_pack("{s:s, s:I, s:o, s:o, s:o, s:o, s:o}", "operation", qtr_profile_names[i], "calls",
                                          (json_int_t)e->n_calls, "seconds", qtr_json_number(e->seconds, 6), "share",
                                          qtr_json_number(e->seconds / total, 4), "bytes", qtr_json_number(e->bytes, 10),
                                          "ops", qtr_json_number(e->ops, 10), "memory_share",
                                          qtr_json_number(memory_speed > 0 ? e->bytes / e->seconds / memory_speed : 0, 4)));
  }
  return json_pack("{s:o, s:o}", "memory_bytes_per_s", qtr_json_number(memory_speed, 5), "operations", list);
}
