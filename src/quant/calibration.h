/* calibration.h - the texts that activations are measured on (spec F.2). */
#ifndef QTR_QUANT_CALIBRATION_H
#define QTR_QUANT_CALIBRATION_H

#include "text/tokenizer.h"

struct qtr_calibration {
  size_t n_samples, length; /* all samples have the same length */
  int32_t *token;           /* (n_samples, length) */
  uint64_t hash;            /* of all tokens: says whether two runs saw the same */
};

/* Samples of `length` tokens, chosen by `seed`.
 * Lines of JSON objects with a string "text" (a file whose name ends in .jsonl): F.2's procedure: shuffled, stripped, longer
 * texts cropped at random to `length` tokens, joined until there are n_samples * length tokens, cut.
 * Any other text: one stream of tokens cut into blocks of `length`; n_samples different blocks are chosen.
 * Each text, or each block, begins with BOS where the tokenizer adds one. QTR_ERR_LIMIT when the text is too short, with
 * what it is enough for. */
enum qtr_status qtr_calibration_read(const char *path, const struct qtr_tokenizer *tokenizer, size_t n_samples,
                                     size_t length, uint64_t seed, struct qtr_calibration *calibration,
                                     struct qtr_error *err);
void qtr_calibration_free(struct qtr_calibration *calibration);

#endif
