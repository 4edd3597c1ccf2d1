/* fuzz_load_trace.c - input: a trace file, then shortened to a context; also read as a set of prompts. Whatever is accepted
 * holds what trace.h promises. */
#include "load/trace.h"
#include "load/workload.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(const struct qtr_trace *t) {
  for (size_t i = 0; i < t->n; i++) {
    const struct qtr_trace_request *r = &t->request[i];
    if (!(r->time >= 0) || (i > 0 && r->time < r[-1].time)) abort();
    if (r->n_input < 1 || r->n_output < 1 || r->n_input > QTR_TRACE_MOST_TOKENS) abort();
    if (r->n_blocks > 0 && (r->first_block > t->n_blocks || (size_t)r->n_blocks > t->n_blocks - r->first_block)) abort();
  }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  struct qtr_trace t;
  struct qtr_workload w = {0};
  size_t n;
  double factor;
  char *text = malloc(size + 1);
  if (!text) return 0;
  if (size > 0) memcpy(text, data, size);
  text[size] = 0;
  if (!qtr_trace_parse(text, size, 0, &t, NULL)) {
    check(&t);
    if (!qtr_trace_fit(&t, 1000, (enum qtr_trace_fit)(size % 3), &n, &factor, NULL)) {
      check(&t);
      for (size_t i = 0; i < t.n; i++) {
        if (t.request[i].n_input + t.request[i].n_output > 1000) abort();
      }
    }
  }
  qtr_trace_free(&t);
  if (!qtr_workload_read(&w, text, size, 2, NULL) && w.n_items == 0) abort();
  qtr_workload_free(&w);
  free(text);
  return 0;
}
