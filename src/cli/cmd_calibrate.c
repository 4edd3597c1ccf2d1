/* cmd_calibrate.c - `quattuor calibrate heads`: which KV heads must see the whole text (eval/calibrate.h), written as
 * DuoAttention's full_attention_heads.tsv and config.json. */
#include "base/checked.h"
#include "base/file.h"
#include "base/status.h"
#include "checkpoint/heads.h"
#include "cli/eval.h"
#include "engine/engine_internal.h"
#include "eval/calibrate.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define NAME "calibrate heads"

struct flags {
  struct qtr_model_flags model;
  struct qtr_haystack_flags text;
  const char *output;
  int32_t prompts, sink, local, rounds;
  bool json;
};

#define AT(field) offsetof(struct flags, field)
static const struct qtr_option own_options[] = {
    {.name = "output",
     .argument = "DIR",
     .kind = QTR_OPTION_STRING,
     .offset = AT(output),
     .help = "Where full_attention_heads.tsv and config.json go; made when absent. Needed."},
    {.name = "prompts",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(prompts),
     .min = 1,
     .max = 1000,
     .help = "How many. Default 8."},
    {.name = "sink",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(sink),
     .min = 0,
     .max = 1 << 20,
     .help = "First tokens that a streaming head sees. Default 128."},
    {.name = "local",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(local),
     .min = 1,
     .max = 1 << 20,
     .help = "Last tokens that a streaming head sees. Default 256."},
    {.name = "rounds",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(rounds),
     .min = 1,
     .max = 1 << 20,
     .help = "Heads are given up in that many steps; more are slower and better. Default 8."},
    {.name = "json",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(json),
     .help = "One object: values (layers x KV heads), rounds (streaming heads and what they cost), prompts, text_tokens, "
             "seconds."},
    {0}};
#undef AT

static enum qtr_status write_file(const char *dir, const char *name, const char *text, struct qtr_error *err) {
  char *path = qtr_path_join(dir, name);
  enum qtr_status status =
      path ? qtr_file_write(path, text, strlen(text), err) : qtr_fail_memory(err, "a path", strlen(dir));
  free(path);
  return status;
}

/* The fields of DuoAttention's config.json that mean the same here, and how the table was made. */
static json_t *describe(const struct flags *flags, const char *model, const double *length, size_t n_lengths) {
  double least = length[0], most = length[0];
  for (size_t i = 1; i < n_lengths; i++) {
    least = QTR_MIN(least, length[i]);
    most = QTR_MAX(most, length[i]);
  }
  return json_pack("{s:s, s:s, s:s, s:s, s:i, s:i, s:i, s:i, s:o, s:i, s:i, s:I}", "method", "quattuor calibrate heads",
                   "model_name", model, "dataset_format", "needle", "dataset_name",
                   flags->text.haystack ? flags->text.haystack : "written by the model", "context_length_min", (int)least,
                   "context_length_max", (int)most, "sink_size", (int)flags->sink, "recent_size", (int)flags->local,
                   "threshold", json_real(0.5), "n_samples", (int)flags->prompts, "rounds", (int)flags->rounds, "seed",
                   (json_int_t)flags->text.seed);
}

static enum qtr_status write_output(const struct flags *flags, const char *model, const double *length, size_t n_lengths,
                                    size_t n_layers, const struct qtr_calibrate_result *result, struct qtr_error *err) {
  json_t *config = describe(flags, model, length, n_lengths);
  char *table = NULL, *text = config ? json_dumps(config, JSON_INDENT(2)) : NULL;
  enum qtr_status status =
      text ? qtr_calibrate_table(result, n_layers, &table, err) : qtr_fail_memory(err, "config.json", 0);
  if (!status) status = write_file(flags->output, "config.json", text, err);
  if (!status) status = write_file(flags->output, QTR_HEADS_FILE, table, err);
  free(text);
  free(table);
  json_decref(config);
  return status;
}

static bool print_result(const struct flags *flags, size_t n_layers, const struct qtr_calibrate_result *r) {
  size_t n_kv_heads = r->n_heads / n_layers;
  if (!flags->json) {
    printf("%s/%s: %zu layers of %zu KV heads, from %zu prompts, %.1f s\n", flags->output, QTR_HEADS_FILE, n_layers,
           n_kv_heads, r->n_prompts, r->seconds);
    printf("streaming   nats an answer   nats a token of text\n");
    for (size_t i = 0; i < r->n_rounds; i++)
      printf("%6.1f %%        %9.4f   %9.4f\n", 100 * (double)r->round[i].n_streaming / (double)r->n_heads,
             r->round[i].cost.answer, r->round[i].cost.text);
    return qtr_finish_output(NAME);
  }
  json_t *values = json_array(), *rounds = json_array();
  for (size_t l = 0; l < n_layers; l++) {
    json_t *row = json_array();
    for (size_t h = 0; h < n_kv_heads; h++) json_array_append_new(row, qtr_json_number(r->value[l * n_kv_heads + h], 9));
    json_array_append_new(values, row);
  }
  for (size_t i = 0; i < r->n_rounds; i++)
    json_array_append_new(
        rounds, json_pack("{s:I, s:o, s:o}", "n_streaming", (json_int_t)r->round[i].n_streaming, "answer",
                          qtr_json_number(r->round[i].cost.answer, 6), "text", qtr_json_number(r->round[i].cost.text, 6)));
  return qtr_print_json(NAME, json_pack("{s:o, s:o, s:I, s:I, s:I, s:o}", "values", values, "rounds", rounds, "prompts",
                                        (json_int_t)r->n_prompts, "text_tokens", (json_int_t)r->n_text, "runs",
                                        (json_int_t)r->n_runs, "seconds", qtr_json_number(r->seconds, 5)));
}

static int calibrate(struct flags *flags) {
  struct qtr_error err = {0};
  struct qtr_engine *engine = NULL;
  struct qtr_haystack haystack = {0};
  struct qtr_calibrate_result result = {0};
  char *dir = NULL;
  double *number = NULL;
  size_t *length = NULL, n_lengths = 0;
  int code = QTR_EXIT_FAILURE;
  enum qtr_status status = qtr_eval_parse_numbers("lengths", flags->text.lengths, 64, 1 << 24, &number, &n_lengths, &err);
  if (!status && !(length = calloc(n_lengths, sizeof *length))) status = qtr_fail_memory(&err, "lengths", n_lengths);
  for (size_t i = 0; length && i < n_lengths; i++) length[i] = (size_t)number[i];
  if (!status && mkdir(flags->output, 0777) != 0 && (errno != EEXIST || !qtr_dir_exists(flags->output)))
    status = qtr_fail(&err, QTR_ERR_IO, "cannot make the directory %s: %s", flags->output, strerror(errno));
  if (!status) status = qtr_find_model(flags->model.model, &dir, &err);
  if (status) goto done;
  if (flags->model.max_num_seqs == 0) flags->model.max_num_seqs = 8; /* prompts that the dense model answers at once */
  struct qtr_engine_options options;
  qtr_engine_options_from_flags(&flags->model, dir, &options);
  status = qtr_engine_open(&options, &engine, &err);
  if (!status && flags->text.haystack) status = qtr_haystack_read(engine, flags->text.haystack, &haystack, &err);
  const struct qtr_calibrate_options o = {.length = length,
                                          .n_lengths = n_lengths,
                                          .n_prompts = (size_t)flags->prompts,
                                          .sink = flags->sink,
                                          .local = flags->local,
                                          .rounds = flags->rounds,
                                          .seed = flags->text.seed};
  if (!status) status = qtr_calibrate_heads(engine, flags->text.haystack ? &haystack : NULL, &o, &result, &err);
  if (status) goto done;
  size_t n_layers = (size_t)engine->model->config.n_layers;
  status = write_output(flags, dir, number, n_lengths, n_layers, &result, &err);
  if (!status && print_result(flags, n_layers, &result)) code = QTR_EXIT_OK;
done:
  if (status) code = qtr_report(NAME, &err);
  qtr_calibrate_free(&result);
  qtr_haystack_free(&haystack);
  qtr_engine_close(engine);
  free(number);
  free(length);
  free(dir);
  return code;
}

int qtr_cmd_calibrate(int argc, char **argv) {
  struct flags flags = {.text.lengths = "1024", .prompts = 8, .sink = 128, .local = 256, .rounds = 8};
  qtr_model_flags_init(&flags.model);
  const struct qtr_option_group groups[] = {
      {"What is written, and from what (prompts of 1024 tokens unless --lengths is given)", own_options, &flags},
      {NULL, qtr_haystack_options_table, &flags.text},
      {"Model and engine", qtr_model_options_table, &flags.model}};
  struct qtr_command_line line = {
      .command = NAME,
      .usage = "calibrate heads --output DIR [--model DIR] [options]",
      .about =
          "Finds the KV heads that need the whole text. Needles are hidden in text; then heads are made streaming heads, "
          "which see the first and last tokens only, those first that change the model's answers and its predictions of the "
          "text least. Without --haystack the model writes the text. The table serves --static-sparse-attn-load-dir at any "
          "--static-sparsity.",
      .group = groups,
      .n_groups = sizeof groups / sizeof groups[0]};
  if (argc >= 2 && strcmp(argv[1], "heads") == 0) {
    argv++;
    argc--;
  } else if (argc < 2 || (strcmp(argv[1], "--help") != 0 && strcmp(argv[1], "-h") != 0)) {
    (void)fprintf(stderr, "quattuor calibrate: say what to calibrate: quattuor calibrate heads --output DIR\n");
    return QTR_EXIT_USAGE;
  }
  int code = QTR_EXIT_USAGE;
  switch (qtr_options_parse(&line, argc, argv)) {
    case QTR_PARSE_OK:
      if (!flags.output) {
        (void)fprintf(stderr, "quattuor " NAME ": no output: give --output DIR\n");
      } else {
        code = calibrate(&flags);
      }
      break;
    case QTR_PARSE_HELP: code = qtr_finish_output(NAME) ? QTR_EXIT_OK : QTR_EXIT_FAILURE; break;
    case QTR_PARSE_ERROR: break;
  }
  qtr_options_free(&line);
  return code;
}
