/* segment.h - Chinese text into words by a list of words with frequencies, as jieba's accurate mode without its model of
 * unknown words: of all ways to cut, the one with the largest product of word probabilities. */
#ifndef QTR_EVAL_SEGMENT_H
#define QTR_EVAL_SEGMENT_H

#include "eval/words.h"

struct qtr_segmenter;

/* A UTF-8 file, one word a line, then perhaps its frequency (default 1) and anything else: jieba's dict.txt is one. */
enum qtr_status qtr_segmenter_open(const char *path, struct qtr_segmenter **segmenter, struct qtr_error *err);
/* The same from memory; name is for messages. */
enum qtr_status qtr_segmenter_parse(const char *data, size_t n_bytes, const char *name, struct qtr_segmenter **segmenter,
                                    struct qtr_error *err);
void qtr_segmenter_free(struct qtr_segmenter *segmenter);

/* Appends the words of text; they lie in it. Runs of ASCII letters and digits stay whole, white space is a word of its own
 * for each character. segmenter NULL: every other character is a word. */
enum qtr_status qtr_segment(const struct qtr_segmenter *segmenter, const char *text, size_t len, struct qtr_words *words,
                            struct qtr_error *err);

#endif
