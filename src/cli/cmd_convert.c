/* cmd_convert.c - `quattuor convert`: other people's checkpoints into QServe's layout (quant/convert.h). */
#include "base/status.h"
#include "cli/cli.h"
#include "cli/layer_report.h"
#include "quant/convert.h"

#include <stdio.h>
#include <string.h>

struct flags {
  struct qtr_checkpoint_flags checkpoint;
  const char *model, *config, *precision, *s2_order, *dtype;
  bool strict, json;
};

#define AT(field) offsetof(struct flags, field)
static const struct qtr_option own_options[] = {
    {.name = "model",
     .argument = "IN",
     .kind = QTR_OPTION_STRING,
     .offset = AT(model),
     .help = "What to import, a directory or one file; its kind is found and printed. Needed."},
    {.name = "config",
     .argument = "DIR",
     .kind = QTR_OPTION_STRING,
     .offset = AT(config),
     .help = "Hugging Face directory with config.json and tokenizer, where IN has none."},
    {.name = "strict",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(strict),
     .help = "Refuse what cannot be taken over exactly, naming the matrix and how far it would move."},
    {.name = "precision",
     .kind = QTR_OPTION_CHOICE,
     .offset = AT(precision),
     .choices = QTR_PRECISION_CHOICES,
     .help =
         "Float input: what to make of it, by round to nearest; default w16a16. Else the weights are those found, and only "
         "the KV width, the default of the new model, is free."},
    {.name = "dtype",
     .kind = QTR_OPTION_CHOICE,
     .offset = AT(dtype),
     .choices = "fp16|bf16",
     .help = "Float input: what stays float. Default fp16."},
    {.name = "s2-order",
     .kind = QTR_OPTION_CHOICE,
     .offset = AT(s2_order),
     .choices = "auto|omniserve|deepcompressor",
     .help =
         "QServe input in groups: how its second-level scales are ordered. Default auto: DeepCompressor's in files named "
         "quant_model.*, else OmniServe's."},
    {.name = "json",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(json),
     .help = "One object with the kind, one a layer (as quantize), then one with the summary."},
    {0}};
#undef AT

static const char *kind_word(enum qtr_convert_kind kind) {
  static const char *const words[] = {"deepcompressor", "qserve", "gptq", "awq", "float"};
  return words[kind];
}

static void on_found(enum qtr_convert_kind kind, void *user) {
  struct qtr_layer_report *l = user;
  if (l->json) {
    l->broken = !qtr_print_json("convert", json_pack("{s:s}", "kind", kind_word(kind))) || l->broken;
  } else {
    printf("%s\n", qtr_convert_kind_name(kind));
  }
}

static bool print_summary(const struct flags *flags, const struct qtr_convert_summary *s) {
  if (flags->json) {
    json_t *o = qtr_summary_json(flags->checkpoint.output, &s->quantize, s->kv_scales_per_layer);
    json_object_update_new(
        o, json_pack("{s:s, s:I, s:I, s:I, s:I, s:I, s:I}", "kind", kind_word(s->kind), "exact", (json_int_t)s->n_exact,
                     "moved", (json_int_t)s->n_moved, "rounded", (json_int_t)s->n_rounded, "groups_rounded",
                     (json_int_t)s->n_groups_rounded, "groups_moved", (json_int_t)s->n_groups_moved, "reordered_layers",
                     (json_int_t)s->n_reordered));
    return qtr_print_json("convert", o);
  }
  qtr_summary_print(flags->checkpoint.output, &s->quantize, s->kv_scales_per_layer);
  if (s->kind != QTR_CONVERT_FLOAT) {
    printf("%zu matrices exact", s->n_exact);
    if (s->n_moved) {
      printf(", %zu with the scales of %zu groups moved and the codes of %zu", s->n_moved, s->n_groups_moved,
             s->n_groups_rounded);
    }
    if (s->n_rounded) printf(", %zu rounded anew", s->n_rounded);
    if (s->n_reordered) printf("; inner channels of %zu layers reordered", s->n_reordered);
    printf("\n");
  }
  return qtr_finish_output("convert");
}

static int convert(const struct flags *flags) {
  struct qtr_error err;
  struct qtr_convert_options options;
  struct qtr_convert_summary summary;
  struct qtr_layer_report layer = {.command = "convert", .json = flags->json};
  qtr_convert_options_init(&options);
  options.input = flags->model;
  options.config_dir = flags->config;
  options.output_dir = flags->checkpoint.output;
  options.precision = flags->precision;
  options.group_size = flags->checkpoint.group_size;
  options.bf16 = flags->dtype && strcmp(flags->dtype, "bf16") == 0;
  if (flags->s2_order && strcmp(flags->s2_order, "omniserve") == 0) options.s2_order = QTR_S2_QSERVE;
  if (flags->s2_order && strcmp(flags->s2_order, "deepcompressor") == 0) options.s2_order = QTR_S2_DEEPCOMPRESSOR;
  options.kv_scales = flags->checkpoint.kv_scales;
  options.strict = flags->strict;
  options.overwrite = flags->checkpoint.overwrite;
  options.threads = flags->checkpoint.threads;
  if (qtr_convert(&options, on_found, qtr_layer_report_add, &layer, &summary, &err)) {
    qtr_layer_report_drop(&layer);
    return qtr_report("convert", &err);
  }
  qtr_layer_report_end(&layer);
  return print_summary(flags, &summary) && !layer.broken ? QTR_EXIT_OK : QTR_EXIT_FAILURE;
}

int qtr_cmd_convert(int argc, char **argv) {
  struct flags flags = {0};
  const struct qtr_option_group groups[] = {{"Input and method", own_options, &flags},
                                            {"Output", qtr_checkpoint_options_table, &flags.checkpoint}};
  struct qtr_command_line line = {
      .command = "convert",
      .usage = "convert --model IN --output DIR [options]",
      .about =
          "Imports a checkpoint into QServe's layout as safetensors: the fake-quantised model.pt and scale.pt of "
          "DeepCompressor or LMQuant, QServe's own .bin, .pt or .safetensors, GPTQ and AWQ with 4 bits in groups of 128 "
          "or one a row, and float models. Says what it is, and how far each layer's weights moved: not at all where the "
          "formats allow.",
      .group = groups,
      .n_groups = sizeof groups / sizeof groups[0]};
  int code = QTR_EXIT_USAGE;
  switch (qtr_options_parse(&line, argc, argv)) {
    case QTR_PARSE_OK:
      if (qtr_checkpoint_flags_good("convert", flags.model, &flags.checkpoint)) code = convert(&flags);
      break;
    case QTR_PARSE_HELP: code = qtr_finish_output("convert") ? QTR_EXIT_OK : QTR_EXIT_FAILURE; break;
    case QTR_PARSE_ERROR: break;
  }
  qtr_options_free(&line);
  return code;
}
