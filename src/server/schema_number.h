/* schema_number.h - the numbers of a range as rules of a grammar. */
#ifndef QTR_SERVER_SCHEMA_NUMBER_H
#define QTR_SERVER_SCHEMA_NUMBER_H

#include "server/grammar.h"

#define QTR_NUMBER_MAX_STEP 256

struct qtr_number_range {
  double low, high;         /* infinite where there is no bound */
  bool low_open, high_open; /* the bound itself is not in it */
  bool whole;               /* whole numbers only */
  int step;                 /* 1 … QTR_NUMBER_MAX_STEP: multiples of it; with `whole` only */
};

/* Decimals of at most 15 digits, without exponents: every one is a different double, and comparing digits is comparing
 * doubles. NULL and *rule, or why it is refused; static. A range without numbers gives a rule without texts. */
const char *qtr_number_rule(struct qtr_grammar *g, const struct qtr_number_range *range, int32_t *rule);

#endif
