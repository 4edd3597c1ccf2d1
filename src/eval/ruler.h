/* ruler.h - synthetic long-context tasks after RULER (Hsieh et al., COLM 2024): generated from a seed, for any length. */
#ifndef QTR_EVAL_RULER_H
#define QTR_EVAL_RULER_H

#include "eval/ask.h"
#include "eval/haystack.h"

enum qtr_ruler_task {
  QTR_RULER_SINGLE,     /* one number in a text */
  QTR_RULER_MULTIKEY,   /* the number of one of four keys */
  QTR_RULER_MULTIVALUE, /* all four numbers of one key */
  QTR_RULER_MULTIQUERY, /* the numbers of four keys */
  QTR_RULER_VARIABLES,  /* VAR A = 123 … VAR B = VAR A …: all variables with a value */
  QTR_RULER_COMMON,     /* the ten words that are most often in a list */
  QTR_RULER_FREQUENT,   /* the three most frequent words of a coded text */
  QTR_RULER_N_TASKS
};
const char *qtr_ruler_task_name(enum qtr_ruler_task task); /* "single" … "frequent-words" */
int32_t qtr_ruler_max_tokens(enum qtr_ruler_task task);    /* of an answer */

#define QTR_RULER_MAX_EXPECTED 10

/* A question and what its answer must hold. */
struct qtr_ruler_question {
  enum qtr_ruler_task task;
  enum qtr_ask_style style;
  uint64_t seed;
  const struct qtr_haystack *haystack;
  double tokens_per_word; /* of the pseudo-words of lists */
  char needle[8][96];     /* (n_needles) in the order of their depths */
  double depth[8];
  size_t n_needles, first;                   /* first: sentence of the haystack */
  char text[320];                            /* the question */
  char expected[QTR_RULER_MAX_EXPECTED][24]; /* (n_expected) */
  size_t n_expected;
};

/* Everything but the length follows from the task and the seed. */
void qtr_ruler_make(enum qtr_ruler_task task, uint64_t seed, const struct qtr_haystack *haystack, double tokens_per_word,
                    enum qtr_ask_style style, struct qtr_ruler_question *question);
/* The text of its prompt, for qtr_ask_fit; user: the question. */
enum qtr_status qtr_ruler_text(void *user, size_t room, struct qtr_text *out, struct qtr_error *err);
/* How many of the expected words or numbers stand in the answer by themselves, in any case. */
size_t qtr_ruler_count(const struct qtr_ruler_question *question, const char *answer, size_t len);

struct qtr_ruler_options {
  enum qtr_ruler_task task[QTR_RULER_N_TASKS]; /* (n_tasks) */
  const size_t *length;                        /* (n_lengths) tokens of a whole prompt */
  size_t n_tasks, n_lengths, n_samples;        /* questions of each task and length */
  enum qtr_ask_style style;
  uint64_t seed;
  bool quiet;
  /* Told about every answer, in any order; may be NULL. */
  void (*answered)(void *user, const struct qtr_ruler_question *question, size_t length, size_t number,
                   const struct qtr_ask_answer *answer, double score);
  void *user;
};

struct qtr_ruler_result {
  size_t n, n_whole; /* questions; those with everything in the answer */
  double score;      /* mean share of what the answer must hold */
};

/* result: (n_tasks, n_lengths) */
enum qtr_status qtr_ruler_run(struct qtr_engine *engine, const struct qtr_haystack *haystack,
                              const struct qtr_ruler_options *options, struct qtr_ruler_result *result,
                              struct qtr_error *err);

#endif
