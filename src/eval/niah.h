/* niah.h - needle in a haystack (spec G.1): one sentence hidden in a long text at a depth, and a question about it, for
 * lengths x depths x needles. All questions run at once. */
#ifndef QTR_EVAL_NIAH_H
#define QTR_EVAL_NIAH_H

#include "eval/ask.h"
#include "eval/haystack.h"

enum qtr_needle {
  QTR_NEEDLE_MIXED,        /* magic and special in turn */
  QTR_NEEDLE_MAGIC,        /* The magic number for the golden fox is 5127. */
  QTR_NEEDLE_SPECIAL,      /* One of the special magic numbers for golden-fox is: 5127. */
  QTR_NEEDLE_SAN_FRANCISCO /* the usual sentence; with a plain prompt the reference's own words around it */
};

struct qtr_niah_options {
  const size_t *length; /* (n_lengths) tokens of a whole prompt */
  const double *depth;  /* (n_depths) 0 … 1 */
  size_t n_lengths, n_depths;
  size_t n_needles; /* of each cell */
  enum qtr_needle needle;
  enum qtr_ask_style style;
  int32_t max_tokens; /* of an answer */
  uint64_t seed;
  bool quiet;
};

struct qtr_niah_trial {
  size_t length, depth, number; /* indices */
  char *needle, *answer;        /* malloc'ed */
  int32_t n_prompt_tokens;
  bool exact;     /* the answer holds the number by itself, or the whole phrase */
  bool contained; /* the answer holds the digits, perhaps within a longer number */
  double rouge1, overlap;
};

struct qtr_niah_score { /* means */
  size_t n, n_exact;
  double accuracy, contained, rouge1, overlap;
};

struct qtr_niah_result {
  struct qtr_niah_trial *trial; /* (n_trials) by length, depth, number */
  size_t n_trials;
  struct qtr_niah_score total, *by_length; /* (n_lengths) */
  struct qtr_niah_score *cell;             /* (n_lengths, n_depths) */
  double seconds;
};

/* Free with qtr_niah_free. QTR_ERR_LIMIT when a length and its answer do not fit the model. */
enum qtr_status qtr_niah_run(struct qtr_engine *engine, const struct qtr_haystack *haystack,
                             const struct qtr_niah_options *options, struct qtr_niah_result *result, struct qtr_error *err);
void qtr_niah_free(struct qtr_niah_result *result);

/* The prompt of one trial (its length, depth and number are set), options->style not AUTO; digits (8): what the answer must
 * hold, "" for San Francisco. */
enum qtr_status qtr_niah_prompt(struct qtr_engine *engine, const struct qtr_haystack *haystack,
                                const struct qtr_niah_options *options, const struct qtr_niah_trial *trial,
                                struct qtr_ask_prompt *prompt, char *digits, struct qtr_error *err);

/* A key such as "golden fox" and a number of three to seven digits, drawn from *state. */
struct qtr_secret {
  char key[40], digits[8];
};
void qtr_secret_draw(uint64_t *state, struct qtr_secret *secret);

#endif
