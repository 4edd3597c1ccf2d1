/* metrics.h - how near an answer is to what was asked for: the scores of needle tests and of LongBench (spec G.1, G.2.2), as
 * the Python packages compute them that the published numbers come from. Texts are (len) UTF-8; scores are 0 … 1. They fail
 * only for want of memory. */
#ifndef QTR_EVAL_METRICS_H
#define QTR_EVAL_METRICS_H

#include "quattuor/quattuor.h"

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

#endif
