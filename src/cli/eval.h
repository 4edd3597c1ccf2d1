/* eval.h - what the evaluations of `quattuor eval` share. */
#ifndef QTR_CLI_EVAL_H
#define QTR_CLI_EVAL_H

#include "cli/cli.h"
#include "eval/ask.h"
#include "eval/haystack.h"
#include "eval/heatmap.h"

#include <stdio.h>

/* Each is a command of its own: argv[0] is its name. */
int qtr_eval_ppl(int argc, char **argv);
int qtr_eval_compare(int argc, char **argv);
int qtr_eval_niah(int argc, char **argv);
int qtr_eval_longbench(int argc, char **argv);
int qtr_eval_ruler(int argc, char **argv);

/* A text file as one token stream, BOS first when the tokenizer adds one. *token is malloc'ed. */
enum qtr_status qtr_eval_read_stream(struct qtr_engine *engine, const char *path, int32_t **token, size_t *n_tokens,
                                     struct qtr_error *err);

/* Sizes that --kv-pages, --max-model-len and --max-num-seqs have when nobody says them, for evaluations that drive the model
 * window by window: one window is all that is ever cached. */
void qtr_eval_size_for_windows(struct qtr_model_flags *flags, int32_t window);

/* "1024,4096": the numbers, each in [min, max], at most 200. *number is malloc'ed. */
enum qtr_status qtr_eval_parse_numbers(const char *option, const char *text, double min, double max, double **number,
                                       size_t *n, struct qtr_error *err);

/* The haystack of --haystack, or a generated one of about n_tokens. */
enum qtr_status qtr_eval_open_haystack(struct qtr_engine *engine, const char *path, uint64_t seed, size_t n_tokens,
                                       struct qtr_haystack *haystack, struct qtr_error *err);

/* "auto", "chat", "plain" */
enum qtr_ask_style qtr_eval_style(const char *name);

/* --lengths: *length (n) is malloc'ed. */
enum qtr_status qtr_eval_parse_lengths(const char *text, size_t **length, size_t *n, struct qtr_error *err);

/* "1024", or with a suffix " %" "5 %", for a heat map's sides: one malloc'ed block (n). NULL: out of memory. */
const char **qtr_eval_number_labels(const double *x, size_t n, const char *suffix);

/* "demo, w4a8kv4, 98.0 % of 100" in out, of a model's directory. */
const char *qtr_eval_describe(const struct qtr_engine_info *info, double accuracy, size_t n, char out[160]);

/* "Needles found, %" and in parentheses what is sparse: "(50 % streaming, budget 512)". */
const char *qtr_eval_title(const char *what, const struct qtr_model_flags *model, char out[160]);

/* Writes the heat map where paths are given. */
enum qtr_status qtr_eval_write_maps(const char *svg, const char *png, const struct qtr_heatmap *map, struct qtr_error *err);

/* A file of JSON lines; written whole by qtr_eval_lines_close. path NULL: none, and nothing happens. */
struct qtr_eval_lines {
  FILE *file;
  const char *path;
};
enum qtr_status qtr_eval_lines_open(const char *path, struct qtr_eval_lines *lines, struct qtr_error *err);
void qtr_eval_lines_add(struct qtr_eval_lines *lines, json_t *object); /* takes the reference; NULL is told at the end */
enum qtr_status qtr_eval_lines_close(struct qtr_eval_lines *lines, struct qtr_error *err);

#endif
