/* metrics.h - how near an answer is to what was asked for: the scores of needle tests and of LongBench (spec G.1, G.2.2), as
 * the Python packages compute them that the published numbers come from. Texts are (len) UTF-8; scores are 0 … 1. They fail
 * only for want of memory. */
#ifndef QTR_EVAL_METRICS_H
#define QTR_EVAL_METRICS_H

#include "quattuor/quattuor.h"

struct qtr_segmenter;

struct qtr_string {
  const char *p;
  size_t n;
};

/* ROUGE-1 F of rouge_score with stemming: runs of ASCII letters and digits, in lower case, stemmed when longer than three.
 */
enum qtr_status qtr_metric_rouge1(struct qtr_string answer, struct qtr_string reference, double *score,
                                  struct qtr_error *err);

/* The reference's plotted score: distinct words of the answer that are in the phrase, over all words of the phrase (repeated
 * ones counted, so that a phrase which repeats a word cannot be matched whole). Lower case, cut at white space. */
enum qtr_status qtr_metric_overlap(struct qtr_string answer, struct qtr_string phrase, double *score, struct qtr_error *err);

/* Does the answer hold this number, not as a part of a longer one? */
bool qtr_metric_has_number(struct qtr_string answer, struct qtr_string digits);

/* ---- LongBench ------------------------------------------------------------------------------------ */

/* F1 over words: lower case, ASCII punctuation and a, an, the removed, cut at white space. */
enum qtr_status qtr_metric_f1(struct qtr_string answer, struct qtr_string gold, double *score, struct qtr_error *err);
/* F1 over Chinese words (segment.h), in lower case, without ASCII and Chinese punctuation. words: NULL = characters. */
enum qtr_status qtr_metric_f1_zh(struct qtr_string answer, struct qtr_string gold, const struct qtr_segmenter *words,
                                 double *score, struct qtr_error *err);
/* ROUGE-L F of the package rouge: sentences end at full stops, the union of the longest common subsequences, words as sets.
 */
enum qtr_status qtr_metric_rouge_l(struct qtr_string answer, struct qtr_string gold, double *score, struct qtr_error *err);
enum qtr_status qtr_metric_rouge_l_zh(struct qtr_string answer, struct qtr_string gold, const struct qtr_segmenter *words,
                                      double *score, struct qtr_error *err);
/* 1/n when the gold class is one of the n classes that the answer names; names within the gold class do not count. */
double qtr_metric_classification(struct qtr_string answer, struct qtr_string gold, const struct qtr_string *classes,
                                 size_t n_classes);
/* Share of the answer's numbers that are the gold paragraph's: "Paragraph 7", in Chinese the word for paragraph and the
 * number. */
double qtr_metric_retrieval(struct qtr_string answer, struct qtr_string gold);
double qtr_metric_retrieval_zh(struct qtr_string answer, struct qtr_string gold);
/* Share of the answer's numbers that equal the gold one. */
double qtr_metric_count(struct qtr_string answer, struct qtr_string gold);
/* fuzzywuzzy's ratio of the answer's first line that holds no backtick, # or // with the gold line, by difflib. */
enum qtr_status qtr_metric_code(struct qtr_string answer, struct qtr_string gold, double *score, struct qtr_error *err);

#endif
