/* words.h - texts as lists of words, cut as the metrics that others report cut them. */
#ifndef QTR_EVAL_WORDS_H
#define QTR_EVAL_WORDS_H

#include "text/tokenizer.h"

struct qtr_word {
  const char *p; /* (n) bytes in the text it was cut from */
  size_t n;
};

struct qtr_words {
  struct qtr_word *word; /* (n) */
  size_t n, capacity;
  struct qtr_text text; /* what the words lie in, when they were changed */
};

void qtr_words_free(struct qtr_words *words);
enum qtr_status qtr_words_add(struct qtr_words *words, const char *p, size_t n, struct qtr_error *err);

/* Between white space, as Python's split(): appended; the words lie in `text`. */
enum qtr_status qtr_words_split(struct qtr_words *words, const char *text, size_t len, struct qtr_error *err);

/* The text in lower case, appended to out. Bytes that are not UTF-8 become U+FFFD. */
enum qtr_status qtr_words_lower(const char *text, size_t len, struct qtr_text *out, struct qtr_error *err);

/* Sorted by bytes, so that multisets can be compared. */
void qtr_words_sort(struct qtr_words *words);
/* Words in both, each as often as in the one where it is rarer. Both are sorted. */
size_t qtr_words_common(const struct qtr_words *a, const struct qtr_words *b);
int qtr_word_compare(const struct qtr_word *a, const struct qtr_word *b);

/* The next character of valid or invalid UTF-8: its code point (U+FFFD when invalid) and its bytes (>= 1). */
int32_t qtr_words_char(const char *p, const char *end, size_t *n);
bool qtr_words_is_space(int32_t c); /* Python's str.isspace */

#endif
