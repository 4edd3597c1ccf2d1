/* eval.h - what the evaluations of `quattuor eval` share. */
#ifndef QTR_CLI_EVAL_H
#define QTR_CLI_EVAL_H

#include "cli/cli.h"

/* Each is a command of its own: argv[0] is its name. */
int qtr_eval_ppl(int argc, char **argv);
int qtr_eval_compare(int argc, char **argv);

/* A text file as one token stream, BOS first when the tokenizer adds one. *token is malloc'ed. */
enum qtr_status qtr_eval_read_stream(struct qtr_engine *engine, const char *path, int32_t **token, size_t *n_tokens,
                                     struct qtr_error *err);

/* Sizes that --kv-pages, --max-model-len and --max-num-seqs have when nobody says them, for evaluations that drive the model
 * window by window: one window is all that is ever cached. */
void qtr_eval_size_for_windows(struct qtr_model_flags *flags, int32_t window);

#endif
