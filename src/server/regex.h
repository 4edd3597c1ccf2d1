/* regex.h - regular expressions of JSON Schema's "pattern" as rules of a grammar of JSON strings. */
#ifndef QTR_SERVER_REGEX_H
#define QTR_SERVER_REGEX_H

#include "server/grammar.h"

/* The inside (without quotes) of every JSON string that the pattern is found in and that has min to max characters (max < 0:
 * no upper bound), each character written in one way. Known of ECMA-262: literals, ., classes, \d \w \s and their negations,
 * control and code point escapes, groups, alternation, all quantifiers; ^ and $ at the ends of alternatives. NULL and *rule,
 * or why it is refused; static. */
const char *qtr_regex_rule(struct qtr_grammar *g, const char *pattern, size_t len, int32_t min, int32_t max, int32_t *rule);

#endif
