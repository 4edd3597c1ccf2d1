/* ask.h - many questions to one engine: prompts of a wanted length, all answered by in-flight batching. What needle tests,
 * synthetic tasks, LongBench and the calibration of heads share. */
#ifndef QTR_EVAL_ASK_H
#define QTR_EVAL_ASK_H

#include "text/tokenizer.h"

enum qtr_ask_style {
  QTR_ASK_AUTO, /* chat where the model has a template, else plain */
  QTR_ASK_CHAT, /* one user turn in the model's chat template */
  QTR_ASK_PLAIN /* the text itself, the tokenizer's BOS before it */
};

/* AUTO becomes one of the others. */
enum qtr_ask_style qtr_ask_style_of(struct qtr_engine *engine, enum qtr_ask_style style);

/* A prompt as the engine takes it. */
struct qtr_ask_prompt {
  int32_t *token; /* (n_tokens) malloc'ed */
  size_t n_tokens;
};

/* text: of the user's turn, or with PLAIN all there is. style is not AUTO. */
enum qtr_status qtr_ask_render(struct qtr_engine *engine, enum qtr_ask_style style, const char *text, size_t len,
                               struct qtr_ask_prompt *prompt, struct qtr_error *err);

/* Makes the text of a prompt with about `room` tokens of what may be longer or shorter. Appends to out. */
struct qtr_ask_text {
  enum qtr_status (*make)(void *user, size_t room, struct qtr_text *out, struct qtr_error *err);
  void *user;
};

/* The longest such prompt that has at most `length` tokens, within a sentence or so. QTR_ERR_LIMIT: not even without room.
 */
enum qtr_status qtr_ask_fit(struct qtr_engine *engine, enum qtr_ask_style style, size_t length,
                            const struct qtr_ask_text *text, struct qtr_ask_prompt *prompt, struct qtr_error *err);

/* QTR_ERR_LIMIT when such a prompt and its answer do not fit the model. */
enum qtr_status qtr_ask_check_length(struct qtr_engine *engine, size_t length, int32_t max_tokens, struct qtr_error *err);

struct qtr_ask_answer {
  const char *text; /* (len) and a NUL */
  size_t len;
  int32_t n_prompt_tokens, n_output_tokens;
  enum qtr_finish finish;
};

/* make: the prompt of question i and how many tokens its answer may have. take: its answer, in any order. */
struct qtr_ask {
  size_t n;
  enum qtr_status (*make)(void *user, size_t i, struct qtr_ask_prompt *prompt, int32_t *max_tokens, struct qtr_error *err);
  enum qtr_status (*take)(void *user, size_t i, const struct qtr_ask_answer *answer, struct qtr_error *err);
  void *user;
  float temperature; /* 0: greedy; else answers are drawn, each by the seed and its number, and go on to max_tokens */
  uint64_t seed;
  const char *label; /* of the progress line */
  bool quiet;
};

/* Answers all. Prompts are made as the engine gets to them, so that memory does not grow with their number. */
enum qtr_status qtr_ask_run(struct qtr_engine *engine, const struct qtr_ask *ask, struct qtr_error *err);

#endif
