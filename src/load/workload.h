/* workload.h - what is asked of the server and when: every kind of load is a trace (times and lengths) and a way to make the
 * prompt of its i-th request. The same seed makes the same requests. */
#ifndef QTR_LOAD_WORKLOAD_H
#define QTR_LOAD_WORKLOAD_H

#include "load/trace.h"
#include "server/buffer.h"

enum qtr_prompt_kind { QTR_PROMPT_TOKENS, QTR_PROMPT_WORDS, QTR_PROMPT_DATASET };

struct qtr_workload {
  struct qtr_trace trace;
  enum qtr_prompt_kind kind;
  uint64_t seed;
  int32_t vocab; /* QTR_PROMPT_TOKENS: ids are drawn from [vocab / 4, vocab), clear of most vocabularies' special ones */
  int32_t block_tokens; /* of the trace's blocks; scaled with the lengths */
  char **item;          /* (n_items) QTR_PROMPT_DATASET: JSON of a prompt or a list of messages */
  bool *is_chat;        /* (n_items) */
  size_t n_items;
};

/* Times of a Poisson process of `rate` requests a second (0: all at once), n of the same lengths. */
enum qtr_status qtr_workload_make(struct qtr_workload *w, size_t n, double rate, int32_t n_input, int32_t n_output,
                                  struct qtr_error *err);
/* Reads the prompts: JSON lines with "prompt" (a string) or "messages", else plain text, cut into pieces of about n_input
 * tokens (four bytes each) at spaces. */
enum qtr_status qtr_workload_read(struct qtr_workload *w, const char *text, size_t len, int32_t n_input,
                                  struct qtr_error *err);
void qtr_workload_free(struct qtr_workload *w);

struct qtr_body_options {
  const char *model;  /* NULL = leave it out */
  double temperature; /* < 0: leave it out */
  bool ignore_eos;    /* vLLM's, llama.cpp's and ours: answers have the asked length */
};
/* The body of request i. *chat: it is for /v1/chat/completions. */
void qtr_workload_body(const struct qtr_workload *w, size_t i, const struct qtr_body_options *o, struct qtr_buffer *out,
                       bool *chat);

#endif
