/* stem.h - Porter's suffix stripping for English words (Porter, "An algorithm for suffix stripping", Program 14.3, 1980),
 * with the departures of NLTK's default stemmer, because the ROUGE that others report uses that one. */
#ifndef QTR_EVAL_STEM_H
#define QTR_EVAL_STEM_H

#include <stddef.h>

/* word: (len) lower-case letters and digits, with room for one more; becomes its stem. Returns the stem's length. */
size_t qtr_stem(char *word, size_t len);

#endif
