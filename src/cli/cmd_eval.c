/* cmd_eval.c - `quattuor eval ppl`: perplexity over a text file (eval/ppl.h). */
#include "base/checked.h"
#include "base/file.h"
#include "base/status.h"
#include "cli/cli.h"
#include "engine/engine_internal.h"
#include "eval/ppl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_TEXT ((size_t)1 << 30)

struct flags {
  struct qtr_model_flags model;
  const char *text;
  int32_t ctx, windows;
  bool json;
};

#define AT(field) offsetof(struct flags, field)
static const struct qtr_option own_options[] = {
    {.name = "text",
     .argument = "FILE",
     .kind = QTR_OPTION_STRING,
     .offset = AT(text),
     .help = "The text, UTF-8; line ends may be LF or CR LF and count as LF. Needed."},
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

/* The file as one token stream, BOS first when the tokenizer adds one. *token is malloc'ed. */
static enum qtr_status read_stream(struct qtr_engine *engine, const char *path, int32_t **token, size_t *n_tokens,
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

static int eval_ppl(struct flags *flags) {
  struct qtr_error err;
  struct qtr_engine *engine = NULL;
  struct qtr_ppl_result result;
  int32_t *token = NULL;
  size_t n_tokens = 0;
  char *dir = NULL;
  int code = QTR_EXIT_FAILURE;
  if (!flags->model.kv_pages && !flags->model.kv_bytes) { /* one window is all that is ever cached */
    flags->model.kv_pages = (int32_t)qtr_ceil_div((size_t)flags->ctx, QTR_PAGE_TOKENS) + 1;
  }
  if (!flags->model.max_model_len) flags->model.max_model_len = flags->ctx;
  if (!flags->model.max_num_seqs) flags->model.max_num_seqs = 1;
  enum qtr_status status = qtr_find_model(flags->model.model, &dir, &err);
  if (!status) {
    flags->model.model = dir;
    status = qtr_open_engine(&flags->model, &engine, &err);
  }
  if (!status) status = read_stream(engine, flags->text, &token, &n_tokens, &err);
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

int qtr_cmd_eval(int argc, char **argv) {
  struct flags flags = {.ctx = 2048};
  qtr_model_flags_init(&flags.model);
  const struct qtr_option_group groups[] = {{"Text and windows", own_options, &flags},
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
                                  .n_groups = 2};
  if (argc >= 2 && strcmp(argv[1], "ppl") == 0) {
    argv++;
    argc--;
  } else if (argc >= 2 && strcmp(argv[1], "--help") != 0 && strcmp(argv[1], "-h") != 0) {
    (void)fprintf(stderr, "quattuor eval: unknown evaluation \"%.60s\": there is ppl\n", argv[1]);
    return QTR_EXIT_USAGE;
  } else if (argc < 2) {
    (void)fprintf(stderr, "quattuor eval: say what to evaluate: quattuor eval ppl --text FILE\n");
    return QTR_EXIT_USAGE;
  }
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
