/* eval_ppl.c - `quattuor eval ppl`: perplexity over a text file (eval/ppl.h). */
#include "cli/eval.h"
#include "eval/ppl.h"

#include <stdio.h>
#include <stdlib.h>

struct flags {
  struct qtr_model_flags model;
  const char *text;
  int32_t ctx, windows;
  bool json;
};

#define AT(field) offsetof(struct flags, field)
static const struct qtr_option own_options[] = {
    {.name = "ctx",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(ctx),
     .min = 2,
     .max = 1 << 24,
     .help = "Tokens of a window. Default 2048."},
    {.name = "windows",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(windows),
     .min = 1,
     .max = INT32_MAX,
     .help = "Only the first N windows. Default: all."},
    {.name = "json",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(json),
     .help = "One object: perplexity, n_tokens, n_windows, n_scored, mean_nll, ctx, model, precision, group_size, device, "
             "seconds."},
    {0}};
#undef AT

static int eval_ppl(struct flags *flags) {
  struct qtr_error err;
  struct qtr_engine *engine = NULL;
  struct qtr_ppl_result result;
  int32_t *token = NULL;
  size_t n_tokens = 0;
  char *dir = NULL;
  int code = QTR_EXIT_FAILURE;
  qtr_eval_size_for_windows(&flags->model, flags->ctx);
  enum qtr_status status = qtr_find_model(flags->model.model, &dir, &err);
  if (!status) {
    flags->model.model = dir;
    status = qtr_open_engine(&flags->model, &engine, &err);
  }
  if (!status) status = qtr_eval_read_stream(engine, flags->text, &token, &n_tokens, &err);
  if (!status) {
    const struct qtr_ppl_options options = {.ctx = flags->ctx, .max_windows = flags->windows};
    status = qtr_ppl_run(engine, token, n_tokens, &options, &result, &err);
  }
  if (status) {
    (void)qtr_report("eval ppl", &err);
    goto done;
  }
  struct qtr_engine_info info;
  qtr_engine_get_info(engine, &info);
  bool printed;
  if (flags->json) {
    printed = qtr_print_json(
        "eval ppl",
        json_pack("{s:o, s:I, s:I, s:I, s:o, s:i, s:s, s:s, s:i, s:s, s:o}", "perplexity",
                  qtr_json_number(result.perplexity, 8), "n_tokens", (json_int_t)result.n_tokens, "n_windows",
                  (json_int_t)result.n_windows, "n_scored", (json_int_t)result.n_scored, "mean_nll",
                  qtr_json_number(result.mean_nll, 9), "ctx", (int)flags->ctx, "model", dir, "precision", info.precision,
                  "group_size", (int)info.group_size, "device", info.device, "seconds", qtr_json_number(result.seconds, 5)));
  } else {
    printf("perplexity %.4f (%s, %zu tokens, %zu windows of %d, %.1f s)\n", result.perplexity, info.precision,
           result.n_tokens, result.n_windows, flags->ctx, result.seconds);
    printed = qtr_finish_output("eval ppl");
  }
  if (printed) code = QTR_EXIT_OK;
done:
  free(token);
  free(dir);
  qtr_engine_close(engine);
  return code;
}

int qtr_eval_ppl(int argc, char **argv) {
  struct flags flags = {.ctx = 2048};
  qtr_model_flags_init(&flags.model);
  const struct qtr_option_group groups[] = {{"Text and windows", qtr_text_option, &flags.text},
                                            {NULL, own_options, &flags},
                                            {"Model and engine", qtr_model_options_table, &flags.model}};
  struct qtr_command_line line = {.command = "eval ppl",
                                  .usage = "eval ppl --text FILE [--model DIR] [--ctx N] [options]",
                                  .about =
                                      "Perplexity by the papers' protocol: the file is one token stream (BOS first when the "
                                      "tokenizer adds one), cut into "
                                      "windows of N tokens that do not overlap; each is seen alone and its tokens 2 … N are "
                                      "scored; what is left over at "
                                      "the end is dropped.",
                                  .group = groups,
                                  .n_groups = sizeof groups / sizeof groups[0]};
  int code = QTR_EXIT_USAGE;
  switch (qtr_options_parse(&line, argc, argv)) {
    case QTR_PARSE_OK:
      if (!flags.text) {
        (void)fprintf(stderr, "quattuor eval ppl: no text: give --text FILE\n");
      } else {
        code = eval_ppl(&flags);
      }
      break;
    case QTR_PARSE_HELP: code = qtr_finish_output("eval ppl") ? QTR_EXIT_OK : QTR_EXIT_FAILURE; break;
    case QTR_PARSE_ERROR: break;
  }
  qtr_options_free(&line);
  return code;
}
