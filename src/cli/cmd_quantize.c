/* cmd_quantize.c - `quattuor quantize`: a QServe checkpoint from a Hugging Face model (quant/quantize.h), with what rounding
 * did to each layer. */
#include "base/status.h"
#include "cli/cli.h"
#include "cli/layer_report.h"
#include "quant/quantize.h"
#include "quant/report.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct flags {
  struct qtr_checkpoint_flags checkpoint;
  const char *model, *precision, *method, *head, *embed;
  const char *calibration, *steps, *keys, *down, *out, *report;
  int32_t samples, length;
  uint64_t seed;
  float damp;
  bool json, seed_given, static_kv, fresh;
};

#define AT(field) offsetof(struct flags, field)
static const struct qtr_option own_options[] = {
    {.name = "model",
     .argument = "DIR",
     .kind = QTR_OPTION_STRING,
     .offset = AT(model),
     .help = "Hugging Face directory with float weights. Needed."},
    {.name = "precision",
     .kind = QTR_OPTION_CHOICE,
     .offset = AT(precision),
     .choices = QTR_PRECISION_CHOICES,
     .help = "Default w4a8kv4. The KV width is the default of the new model and can be changed at run time."},
    {.name = "method",
     .kind = QTR_OPTION_CHOICE,
     .offset = AT(method),
     .choices = "rtn|qoq",
     .help = "rtn, the default: round to nearest. qoq: calibrated, the whole QoQ algorithm; needs --calibration."},
    {.name = "calibration",
     .argument = "FILE",
     .kind = QTR_OPTION_STRING,
     .offset = AT(calibration),
     .help = "Text that activations are measured on, or .jsonl with a \"text\" in each line. Needed with qoq."},
    {.name = "samples",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(samples),
     .min = 1,
     .max = 65536,
     .help = "Calibration samples. Default 128."},
    {.name = "length",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(length),
     .min = 16,
     .max = 32768,
     .help = "Tokens of a sample. Default 1024."},
    {.name = "seed",
     .argument = "N",
     .kind = QTR_OPTION_UINT64,
     .offset = AT(seed),
     .given = AT(seed_given),
     .help = "Chooses the samples. Default 42."},
    {.name = "steps",
     .argument = "LIST",
     .kind = QTR_OPTION_STRING,
     .offset = AT(steps),
     .help = "Which parts of qoq run, of: rotate, rotate-heads, smooth-keys, smooth-out, smooth-down, smooth-input, "
             "reorder, clip, "
             "gptq, correct. Default: the model family's; \"+name\" and \"-name\" change that."},
    {.name = "smooth-keys",
     .argument = "A,B",
     .kind = QTR_OPTION_STRING,
     .offset = AT(keys),
     .help = "SmoothAttention: \"grid\", or alpha and beta of s = max|K|^A / max|Q|^B."},
    {.name = "smooth-down",
     .argument = "A,B",
     .kind = QTR_OPTION_STRING,
     .offset = AT(down),
     .help = "Smoothing of down_proj's input: \"grid\", or alpha and beta."},
    {.name = "smooth-out",
     .argument = "A,B",
     .kind = QTR_OPTION_STRING,
     .offset = AT(out),
     .help = "Smoothing of o_proj's input: \"grid\", or alpha and beta."},
    {.name = "damp",
     .argument = "X",
     .kind = QTR_OPTION_FLOAT,
     .offset = AT(damp),
     .min = 0,
     .max = 10,
     .help = "Of GPTQ: how much of the mean of the covariance's diagonal is added to it. Default 0.01, "
             "for 4-bit weights per channel 0.03; more trusts the calibration text less."},
    {.name = "static-kv",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(static_kv),
     .help = "qoq also writes per-tensor scales of K and V for an 8-bit cache."},
    {.name = "fresh",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(fresh),
     .help = "Start anew instead of going on behind a run that was stopped."},
    {.name = "head",
     .kind = QTR_OPTION_CHOICE,
     .offset = AT(head),
     .choices = "fp16|int8",
     .help = "The output matrix. Default fp16; int8 is not read by other tools."},
    {.name = "embed",
     .kind = QTR_OPTION_CHOICE,
     .offset = AT(embed),
     .choices = "fp16|int8",
     .help = "The embedding. Default fp16; int8 is not read by other tools."},
    {.name = "report",
     .argument = "FILE",
     .kind = QTR_OPTION_STRING,
     .offset = AT(report),
     .help = "Writes an HTML page: settings, sizes, errors of each matrix, and with qoq smoothing and outliers of keys."},
    {.name = "json",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(json),
     .help = "One object a layer (layer, relative_error or with qoq output_error, projections), then one with the summary."},
    {0}};
#undef AT

/* The algorithm's options: the model's defaults, then what the flags say. */
static enum qtr_status read_qoq(const struct flags *flags, struct qtr_quantize_options *options, struct qtr_qoq_options *qoq,
                                struct qtr_error *err) {
  struct qtr_config config;
  enum qtr_status status = qtr_config_read(flags->model, &config, err);
  if (status) return status;
  int32_t bits = options->precision.weight_bits;
  qtr_qoq_options_init(qoq,
                       bits == 16                           ? QTR_LINEAR_F16
                       : bits == 8                          ? QTR_LINEAR_W8A8
                       : flags->checkpoint.group_size == -1 ? QTR_LINEAR_W4A8
                                                            : QTR_LINEAR_W4A8_G128,
                       &config);
  qoq->calibration = flags->calibration;
  if (flags->samples) qoq->n_samples = flags->samples;
  if (flags->length) qoq->length = flags->length;
  if (flags->seed_given) qoq->seed = flags->seed;
  if (flags->damp > 0) qoq->damp = flags->damp;
  qoq->static_kv = flags->static_kv;
  qoq->fresh = flags->fresh;
  options->qoq = qoq;
  if (!status && flags->steps) status = qtr_qoq_parse_steps(qoq, flags->steps, err);
  if (!status && flags->keys) status = qtr_qoq_parse_smoothing(&qoq->keys, flags->keys, err);
  if (!status && flags->down) status = qtr_qoq_parse_smoothing(&qoq->down, flags->down, err);
  if (!status && flags->out) status = qtr_qoq_parse_smoothing(&qoq->out, flags->out, err);
  return status;
}

/* Static KV scales of a file, for a model whose keys and values stay as they are. */
static enum qtr_status read_kv_scales(const struct flags *flags, struct qtr_quantize_options *options,
                                      struct qtr_kv_scales *scales, struct qtr_error *err) {
  struct qtr_config config;
  if (options->qoq) {
    return qtr_fail(err, QTR_ERR_ARGUMENT,
                    "--kv-scales is of the keys and values before qoq changes them; --static-kv measures those after");
  }
  enum qtr_status status = qtr_config_read(flags->model, &config, err);
  if (!status) status = qtr_kv_scales_read(flags->checkpoint.kv_scales, &config, scales, err);
  options->kv_scales = scales;
  return status;
}

/* What wants to see each matrix. */
struct watchers {
  struct qtr_layer_report *layer;
  struct qtr_quant_report *page; /* path NULL: none */
};

static void watch(const struct qtr_quantize_report *matrix, void *user) {
  const struct watchers *w = user;
  qtr_layer_report_add(matrix, w->layer);
  if (w->page->path) qtr_quant_report_add(matrix, w->page);
}

static int quantize(const struct flags *flags) {
  struct qtr_error err;
  struct qtr_quantize_options options;
  struct qtr_quantize_summary summary;
  struct qtr_layer_report layer = {.command = "quantize", .json = flags->json};
  qtr_quantize_options_init(&options);
  enum qtr_status status = QTR_OK;
  if (flags->precision) status = qtr_precision_parse(flags->precision, &options.precision, &err);
  options.model_dir = flags->model;
  options.output_dir = flags->checkpoint.output;
  options.group_size = flags->checkpoint.group_size;
  options.method = flags->method;
  options.head_int8 = flags->head && strcmp(flags->head, "int8") == 0;
  options.embed_int8 = flags->embed && strcmp(flags->embed, "int8") == 0;
  options.overwrite = flags->checkpoint.overwrite;
  options.threads = flags->checkpoint.threads;
  struct qtr_qoq_options qoq;
  if (!status && options.method && strcmp(options.method, "qoq") == 0) status = read_qoq(flags, &options, &qoq, &err);
  struct qtr_kv_scales scales = {0};
  if (!status && flags->checkpoint.kv_scales) status = read_kv_scales(flags, &options, &scales, &err);
  int32_t n_scales = scales.scale ? scales.n_heads : 0;
  struct qtr_quant_report page = {0};
  struct watchers watchers = {&layer, &page};
  if (!status && flags->report) status = qtr_quant_report_open(flags->report, &page, &err);
  if (!status) status = qtr_quantize(&options, watch, &watchers, &summary, &err);
  if (!status && flags->report) status = qtr_quant_report_write(&page, &options, &summary, &err);
  qtr_quant_report_free(&page);
  qtr_kv_scales_free(&scales);
  if (status) {
    qtr_layer_report_drop(&layer);
    return qtr_report("quantize", &err);
  }
  qtr_layer_report_end(&layer);
  if (flags->json) {
    layer.broken =
        !qtr_print_json("quantize", qtr_summary_json(flags->checkpoint.output, &summary, n_scales)) || layer.broken;
  } else {
    qtr_summary_print(flags->checkpoint.output, &summary, n_scales);
    layer.broken = !qtr_finish_output("quantize") || layer.broken;
  }
  return layer.broken ? QTR_EXIT_FAILURE : QTR_EXIT_OK;
}

/* A flag that was given and means nothing without calibration; NULL when there is none. */
static const char *flag_of_qoq(const struct flags *f) {
  const struct {
    bool given;
    const char *name;
  } flags[] = {{f->calibration, "calibration"}, {f->steps, "steps"},      {f->samples, "samples"},  {f->length, "length"},
               {f->seed_given, "seed"},         {f->keys, "smooth-keys"}, {f->down, "smooth-down"}, {f->out, "smooth-out"},
               {f->static_kv, "static-kv"},     {f->fresh, "fresh"},      {f->damp > 0, "damp"}};
  for (size_t i = 0; i < sizeof flags / sizeof flags[0]; i++) {
    if (flags[i].given) return flags[i].name;
  }
  return NULL;
}

int qtr_cmd_quantize(int argc, char **argv) {
  struct flags flags = {0};
  const struct qtr_option_group groups[] = {{"Input and method", own_options, &flags},
                                            {"Output", qtr_checkpoint_options_table, &flags.checkpoint}};
  struct qtr_command_line line = {.command = "quantize",
                                  .usage = "quantize --model DIR --output DIR [options]",
                                  .about =
                                      "Makes a QServe checkpoint (safetensors, with config and tokenizer) from a Hugging "
                                      "Face model, tensor by tensor, and "
                                      "says for each layer how far the rounded weights are from the originals.",
                                  .group = groups,
                                  .n_groups = sizeof groups / sizeof groups[0]};
  int code = QTR_EXIT_USAGE;
  const char *only_qoq;
  switch (qtr_options_parse(&line, argc, argv)) {
    case QTR_PARSE_OK:
      only_qoq = flag_of_qoq(&flags);
      if (!qtr_checkpoint_flags_good("quantize", flags.model, &flags.checkpoint)) break;
      if (only_qoq && !(flags.method && strcmp(flags.method, "qoq") == 0)) {
        (void)fprintf(stderr, "quattuor quantize: --%s belongs to --method qoq\n", only_qoq);
      } else {
        code = quantize(&flags);
      }
      break;
    case QTR_PARSE_HELP: code = qtr_finish_output("quantize") ? QTR_EXIT_OK : QTR_EXIT_FAILURE; break;
    case QTR_PARSE_ERROR: break;
  }
  qtr_options_free(&line);
  return code;
}
