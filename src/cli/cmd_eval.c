/* cmd_eval.c - `quattuor eval NAME`: finds the evaluation; evaluations over a text share how it is read (eval.h). */
#include "base/checked.h"
#include "base/file.h"
#include "base/status.h"
#include "cli/eval.h"
#include "engine/engine_internal.h"
#include "eval/ppl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_TEXT ((size_t)1 << 30)

static const struct qtr_command evaluations[] = {
    {"ppl", "Perplexity over a text file.", qtr_eval_ppl},
    {"compare", "Two models over the same text: KL divergence, agreement, hidden states.", qtr_eval_compare},
    {"niah", "Needle in a haystack: retrieval over lengths and depths.", qtr_eval_niah},
    {"ruler", "Synthetic long-context tasks: several needles, variables, frequent words.", qtr_eval_ruler},
    {"longbench", "LongBench over local data files, or scores of predictions.", qtr_eval_longbench},
};
enum { N_EVALUATIONS = sizeof evaluations / sizeof evaluations[0] };

static void print_evaluations(FILE *out) {
  (void)fputs("Usage: quattuor eval NAME [options]\n\nMeasures what a model knows. The evaluations:\n\n", out);
  for (size_t i = 0; i < N_EVALUATIONS; i++) {
    (void)fprintf(out, "  %-12s%s\n", evaluations[i].name, evaluations[i].about);
  }
  (void)fputs("\nquattuor eval NAME --help explains one.\n", out);
}

int qtr_cmd_eval(int argc, char **argv) {
  const char *names[N_EVALUATIONS];
  if (argc < 2) {
    print_evaluations(stderr);
    return QTR_EXIT_USAGE;
  }
  if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0) {
    print_evaluations(stdout);
    return qtr_finish_output("eval") ? QTR_EXIT_OK : QTR_EXIT_FAILURE;
  }
  for (size_t i = 0; i < N_EVALUATIONS; i++) {
    if (strcmp(argv[1], evaluations[i].name) == 0) return evaluations[i].run(argc - 1, argv + 1);
    names[i] = evaluations[i].name;
  }
  const char *near = qtr_nearest_word(argv[1], names, N_EVALUATIONS);
  (void)fprintf(stderr, "quattuor eval: unknown evaluation \"%.60s\"%s%s (quattuor eval --help lists them)\n", argv[1],
                near ? "; did you mean " : "", near ? near : "");
  return QTR_EXIT_USAGE;
}

enum qtr_status qtr_eval_read_stream(struct qtr_engine *engine, const char *path, int32_t **token, size_t *n_tokens,
                                     struct qtr_error *err) {
  char *text;
  size_t len;
  enum qtr_status status = qtr_file_read(path, MAX_TEXT, &text, &len, err);
  if (status) return status;
  len = qtr_ppl_normalize_newlines(text, len);
  status = qtr_engine_tokenize(engine, text, len, true, true, token, n_tokens, err);
  if (status) (void)qtr_error_prefix(err, "%s", path);
  free(text);
  return status;
}

void qtr_eval_size_for_windows(struct qtr_model_flags *flags, int32_t window) {
  if (!flags->kv_pages && !flags->kv_bytes) {
    flags->kv_pages = (int32_t)qtr_ceil_div((size_t)window, QTR_PAGE_TOKENS) + 1;
  }
  if (!flags->max_model_len) flags->max_model_len = window;
  if (!flags->max_num_seqs) flags->max_num_seqs = 1;
}
