/* trace.h - arrival traces of real services: when a request came, how long its prompt and its answer were, and, where the
 * trace says so, which blocks of prompt it shares with others.
 *
 * Formats, told apart by the first character:
 *   Azure's CSV       TIMESTAMP,ContextTokens,GeneratedTokens; dates ("2023-11-16 18:15:46.6805900") or plain seconds
 *   Mooncake's JSONL  {"timestamp": milliseconds, "input_length", "output_length", "hash_ids": [one per 512 tokens]} */
#ifndef QTR_LOAD_TRACE_H
#define QTR_LOAD_TRACE_H

#include "quattuor/quattuor.h"

#define QTR_TRACE_BLOCK_TOKENS 512 /* of Mooncake's hash blocks */
#define QTR_TRACE_MOST_TOKENS (1 << 24)

struct qtr_trace_request {
  double time;               /* seconds after the first request */
  int32_t n_input, n_output; /* tokens, at least 1; the published zeros become 1 */
  size_t first_block;        /* of trace->block */
  int32_t n_blocks;          /* ceil(n_input / 512), or 0: the prompt shares nothing */
};

struct qtr_trace {
  struct qtr_trace_request *request; /* (n) in order of time */
  size_t n, capacity;
  uint64_t *block; /* (n_blocks) equal numbers mean equal text */
  size_t n_blocks, block_capacity;
};

/* Reads a trace from memory; at most max_requests of it (0 = all). Free with qtr_trace_free, after a failure too. */
enum qtr_status qtr_trace_parse(const char *text, size_t len, size_t max_requests, struct qtr_trace *trace,
                                struct qtr_error *err);
void qtr_trace_free(struct qtr_trace *trace);

/* Requests whose prompt and answer do not fit in max_len tokens are counted; QTR_FIT_CLIP shortens them (the answer to at
 * most half of it, then the prompt to the rest), QTR_FIT_SCALE shortens all requests by the same factor. */
enum qtr_trace_fit { QTR_FIT_REFUSE, QTR_FIT_CLIP, QTR_FIT_SCALE };
/* *n_too_long: how many did not fit. *factor: of QTR_FIT_SCALE, else 1. QTR_ERR_LIMIT when some do not fit and `fit` is
 * QTR_FIT_REFUSE. */
enum qtr_status qtr_trace_fit(struct qtr_trace *trace, int32_t max_len, enum qtr_trace_fit fit, size_t *n_too_long,
                              double *factor, struct qtr_error *err);

#endif
