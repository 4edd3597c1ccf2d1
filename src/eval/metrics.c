/* metrics.c - scores over words (metrics.h). */
#include "eval/metrics.h"

#include "base/status.h"
#include "eval/stem.h"
#include "eval/words.h"

#include <stdlib.h>
#include <string.h>

/* 2PR/(P+R) of counts. */
static double f_measure(size_t common, size_t n_answer, size_t n_reference) {
  if (common == 0) return 0;
  double precision = (double)common / (double)n_answer, recall = (double)common / (double)n_reference;
  return 2 * precision * recall / (precision + recall);
}

static bool is_ascii_word(char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9'); }

/* The words of rouge_score; they lie in words->text, each with room for a letter more after it. */
static enum qtr_status cut_stems(struct qtr_string text, struct qtr_words *words, struct qtr_error *err) {
  struct qtr_text lower = {0};
  enum qtr_status status = qtr_words_lower(text.p, text.n, &lower, err);
  if (!status) status = qtr_text_append(&lower, " ", 1, err);
  if (!status) { /* words->text is `lower` from here on: never grown again, so words may point into it */
    words->text = lower;
    for (size_t i = 0; i < lower.len && !status;) {
      if (!is_ascii_word(lower.data[i])) {
        i++;
        continue;
      }
      size_t n = 1;
      while (is_ascii_word(lower.data[i + n])) n++;
      status = qtr_words_add(words, lower.data + i, n > 3 ? qtr_stem(lower.data + i, n) : n, err);
      i += n;
    }
  } else {
    qtr_text_free(&lower);
  }
  qtr_words_sort(words);
  return status;
}

enum qtr_status qtr_metric_rouge1(struct qtr_string answer, struct qtr_string reference, double *score,
                                  struct qtr_error *err) {
  struct qtr_words a = {0}, b = {0};
  enum qtr_status status = cut_stems(answer, &a, err);
  if (!status) status = cut_stems(reference, &b, err);
  *score = status ? 0 : f_measure(qtr_words_common(&a, &b), a.n, b.n);
  qtr_words_free(&a);
  qtr_words_free(&b);
  return status;
}

/* Lower-case words between white space, sorted. */
static enum qtr_status cut_lower(struct qtr_string text, struct qtr_words *words, struct qtr_error *err) {
  enum qtr_status status = qtr_words_lower(text.p, text.n, &words->text, err);
  if (!status && words->text.len > 0) status = qtr_words_split(words, words->text.data, words->text.len, err);
  qtr_words_sort(words);
  return status;
}

/* Leaves each word once. Sorted. */
static void make_distinct(struct qtr_words *words) {
  size_t n = 0;
  for (size_t i = 0; i < words->n; i++) {
    if (i == 0 || qtr_word_compare(&words->word[i], &words->word[n - 1]) != 0) words->word[n++] = words->word[i];
  }
  words->n = n;
}

enum qtr_status qtr_metric_overlap(struct qtr_string answer, struct qtr_string phrase, double *score,
                                   struct qtr_error *err) {
  struct qtr_words a = {0}, b = {0};
  enum qtr_status status = cut_lower(answer, &a, err);
  if (!status) status = cut_lower(phrase, &b, err);
  size_t n_phrase = b.n;
  make_distinct(&a);
  make_distinct(&b);
  *score = status || n_phrase == 0 ? 0 : (double)qtr_words_common(&a, &b) / (double)n_phrase;
  qtr_words_free(&a);
  qtr_words_free(&b);
  return status;
}

static bool is_digit(char c) { return c >= '0' && c <= '9'; }

bool qtr_metric_has_number(struct qtr_string answer, struct qtr_string digits) {
  for (size_t i = 0; digits.n > 0 && i + digits.n <= answer.n; i++) {
    if (memcmp(answer.p + i, digits.p, digits.n) != 0) continue;
    bool before = i > 0 && is_digit(answer.p[i - 1]), after = i + digits.n < answer.n && is_digit(answer.p[i + digits.n]);
    if (!before && !after) return true;
  }
  return false;
}
