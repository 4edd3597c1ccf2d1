/* cmd_info.c - `quattuor info`: what a model directory holds, and what it costs on this machine, without loading it. */
#include "base/checked.h"
#include "base/status.h"
#include "checkpoint/kv_scales.h"
#include "cli/cli.h"
#include "model/model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Of the memory that is free once the weights are in; the engine sizes its pool the same way. */
#define MEMORY_SHARE 0.85

struct flags {
  const char *model, *device, *export_kv_scales;
  bool json;
};

#define AT(field) offsetof(struct flags, field)
static const struct qtr_option own_options[] = {
    {.name = "device",
     .kind = QTR_OPTION_CHOICE,
     .offset = AT(device),
     .choices = QTR_DEVICE_CHOICES,
     .help = "Whose memory counts. Default auto."},
    {.name = "export-kv-scales",
     .argument = "FILE",
     .kind = QTR_OPTION_STRING,
     .offset = AT(export_kv_scales),
     .help = "Also writes the model's static KV8 scales as JSON for --kv-quant-params-path."},
    {.name = "json", .kind = QTR_OPTION_FLAG, .offset = AT(json), .help = "One object."},
    {0}};
#undef AT

/* The cache in one width. */
struct kv_cost {
  enum qtr_kv_format format;
  size_t bytes_per_token;
  int64_t longest; /* tokens of one sequence: bounded by the model and by memory; 0 = the model does not fit */
};

struct info {
  char *dir;
  struct qtr_config config;
  enum qtr_linear_format format;
  struct qtr_caps caps;
  size_t n_tensors, weight_bytes;
  double n_parameters;
  int32_t longest; /* what the model itself goes to */
  enum qtr_kv_format kv_default;
  struct kv_cost kv[3];
};

static double count_parameters(const struct qtr_config *c) {
  double hidden = c->hidden_size, inner = c->intermediate_size, q = (double)c->n_heads * c->head_dim;
  double kv = (double)c->n_kv_heads * c->head_dim;
  double layer = hidden * (q + 2 * kv) + q * hidden + 3 * hidden * inner + 2 * hidden;
  if (c->qkv_bias) layer += q + 2 * kv;
  return c->n_layers * layer + hidden + (c->tie_word_embeddings ? 1 : 2) * hidden * c->vocab_size;
}

static enum qtr_status kv_default(struct info *info, struct qtr_error *err) {
  int32_t bits = info->format <= QTR_LINEAR_BF16 ? 16 : 8;
  if (info->config.precision[0]) {
    struct qtr_precision p;
    enum qtr_status status = qtr_precision_parse(info->config.precision, &p, err);
    if (status) return qtr_error_prefix(err, "quantization_config of config.json");
    if (p.kv_bits) bits = p.kv_bits;
  }
  info->kv_default = bits == 4 ? QTR_KV_INT4 : bits == 8 ? QTR_KV_INT8 : QTR_KV_F16;
  return QTR_OK;
}

static enum qtr_status kv_costs(struct info *info, struct qtr_error *err) {
  static const enum qtr_kv_format formats[] = {QTR_KV_INT4, QTR_KV_INT8, QTR_KV_F16};
  size_t room = info->caps.memory_free > info->weight_bytes ? info->caps.memory_free - info->weight_bytes : 0;
  for (size_t i = 0; i < 3; i++) {
    const struct qtr_kv_config kv = {.format = formats[i],
                                     .n_layers = info->config.n_layers,
                                     .n_kv_heads = info->config.n_kv_heads,
                                     .head_dim = info->config.head_dim};
    size_t page = qtr_kv_page_bytes(&kv);
    if (page == 0) return qtr_fail(err, QTR_ERR_LIMIT, "a KV page of this model would be larger than the address space");
    int64_t fits = (int64_t)(MEMORY_SHARE * (double)room / (double)page) * QTR_PAGE_TOKENS;
    info->kv[i] = (struct kv_cost){formats[i], page / QTR_PAGE_TOKENS, QTR_MIN(fits, (int64_t)info->longest)};
  }
  return QTR_OK;
}

static enum qtr_status export_kv_scales(const char *path, const struct info *info, const struct qtr_checkpoint *checkpoint,
                                        struct qtr_error *err) {
  struct qtr_kv_scales scales;
  enum qtr_status status = qtr_kv_scales_find(checkpoint, &info->config, &scales, err);
  if (!status && !scales.scale) {
    status = qtr_fail(err, QTR_ERR_NOT_FOUND, "%s has no static KV scales to export", info->dir);
  }
  if (!status) status = qtr_kv_scales_write(path, info->config.model_type, &scales, err);
  qtr_kv_scales_free(&scales);
  return status;
}

static enum qtr_status read_info(const struct flags *flags, struct info *info, struct qtr_error *err) {
  struct qtr_checkpoint *checkpoint = NULL;
  struct qtr_backend *backend = NULL;
  enum qtr_status status = qtr_find_model(flags->model, &info->dir, err);
  if (!status) status = qtr_config_read(info->dir, &info->config, err);
  if (!status) status = qtr_checkpoint_open(info->dir, &checkpoint, err);
  if (!status && (status = qtr_checkpoint_format(checkpoint, &info->format, err)))
    (void)qtr_error_prefix(err, "%s", info->dir);
  const struct qtr_backend_options options = {0};
  if (!status) status = qtr_backend_open(flags->device ? flags->device : "auto", &options, &backend, err);
  if (!status) status = kv_default(info, err);
  if (status) goto done;
  backend->ops->caps(backend, &info->caps);
  info->n_tensors = qtr_checkpoint_count(checkpoint);
  for (size_t i = 0; i < info->n_tensors; i++) info->weight_bytes += qtr_checkpoint_at(checkpoint, i)->n_bytes;
  info->n_parameters = count_parameters(&info->config);
  info->longest = info->config.max_position_embeddings;
  if (info->config.sliding_window > 0) info->longest = QTR_MIN(info->longest, info->config.sliding_window);
  status = kv_costs(info, err);
  if (!status && flags->export_kv_scales) status = export_kv_scales(flags->export_kv_scales, info, checkpoint, err);
done:
  qtr_backend_close(backend);
  qtr_checkpoint_close(checkpoint);
  return status;
}

static json_t *info_json(const struct info *info, const char *precision, int32_t group_size) {
  const struct qtr_config *c = &info->config;
  json_t *per_token = json_object(), *longest = json_object(), *eos = json_array();
  const struct kv_cost *used = &info->kv[0];
  for (size_t i = 0; i < 3; i++) {
    const char *name = qtr_kv_format_name(info->kv[i].format);
    json_object_set_new(per_token, name, json_integer((json_int_t)info->kv[i].bytes_per_token));
    json_object_set_new(longest, name, json_integer((json_int_t)info->kv[i].longest));
    if (info->kv[i].format == info->kv_default) used = &info->kv[i];
  }
  for (int32_t i = 0; i < c->n_eos; i++) json_array_append_new(eos, json_integer(c->eos_token[i]));
  json_t *o =
      json_pack("{s:s, s:s, s:s, s:s, s:i, s:s, s:o, s:I, s:I, s:i}", "model", info->dir, "architecture", c->architecture,
                "model_type", c->model_type, "precision", precision, "group_size", (int)group_size, "weight_format",
                qtr_linear_format_name(info->format), "parameters", json_integer((json_int_t)info->n_parameters),
                "weight_bytes", (json_int_t)info->weight_bytes, "kv_bytes_per_token", (json_int_t)used->bytes_per_token,
                "max_position_embeddings", (int)c->max_position_embeddings);
  json_object_update_new(
      o, json_pack("{s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:b, s:i, s:o, s:o, s:o, s:I, s:I, s:s, s:s}", "hidden_size",
                   (int)c->hidden_size, "intermediate_size", (int)c->intermediate_size, "n_layers", (int)c->n_layers,
                   "n_heads", (int)c->n_heads, "n_kv_heads", (int)c->n_kv_heads, "head_dim", (int)c->head_dim, "vocab_size",
                   (int)c->vocab_size, "tie_word_embeddings", (int)c->tie_word_embeddings, "bos_token", (int)c->bos_token,
                   "eos_tokens", eos, "kv_bytes_per_token_by_width", per_token, "longest_context_by_width", longest,
                   "longest_context", (json_int_t)used->longest, "memory_free", (json_int_t)info->caps.memory_free, "device",
                   info->caps.device, "device_name", info->caps.description));
  return o;
}

static bool print_info(const struct info *info, const char *precision, int32_t group_size) {
  const struct qtr_config *c = &info->config;
  char bytes[32], shown[64];
  printf("model          %s\n", info->dir);
  printf("architecture   %s, %d layers, hidden %d, %d query and %d KV heads of %d, vocabulary %d\n",
         qtr_printable(c->architecture, strlen(c->architecture), shown, sizeof shown), c->n_layers, c->hidden_size,
         c->n_heads, c->n_kv_heads, c->head_dim, c->vocab_size);
  printf("parameters     %.1f M\n", info->n_parameters * 1e-6);
  printf("precision      %s%s\n", precision,
         group_size == 128  ? ", groups of 128"
         : group_size == -1 ? ", per channel"
                            : "");
  printf("weights        %s in %zu tensors\n", qtr_show_bytes(info->weight_bytes, bytes), info->n_tensors);
  printf("context        %d tokens by the model\n", info->longest);
  for (size_t i = 0; i < 3; i++) {
    printf("%-14s %zu bytes a token; longest context here %lld tokens%s\n", qtr_kv_format_name(info->kv[i].format),
           info->kv[i].bytes_per_token, (long long)info->kv[i].longest,
           info->kv[i].format == info->kv_default ? " (default)" : "");
  }
  printf("device         %s, %s free\n", info->caps.description, qtr_show_bytes(info->caps.memory_free, bytes));
  return qtr_finish_output("info");
}

static int show_info(const struct flags *flags) {
  struct qtr_error err;
  struct info info = {0};
  enum qtr_status status = read_info(flags, &info, &err);
  bool printed = false;
  if (status) {
    (void)qtr_report("info", &err);
  } else {
    char precision[24];
    bool int4 = info.format == QTR_LINEAR_W4A8 || info.format == QTR_LINEAR_W4A8_G128,
         plain = info.format <= QTR_LINEAR_BF16;
    int32_t group_size = info.format == QTR_LINEAR_W4A8_G128 ? QTR_GROUP : plain ? 0 : -1;
    (void)snprintf(precision, sizeof precision, "%s%s",
                   plain  ? "w16a16"
                   : int4 ? "w4a8"
                          : "w8a8",
                   info.kv_default == QTR_KV_F16    ? "kv16"
                   : info.kv_default == QTR_KV_INT4 ? "kv4"
                                                    : "kv8");
    printed = flags->json ? qtr_print_json("info", info_json(&info, precision, group_size))
                          : print_info(&info, precision, group_size);
  }
  free(info.dir);
  return printed ? QTR_EXIT_OK : QTR_EXIT_FAILURE;
}

int qtr_cmd_info(int argc, char **argv) {
  struct flags flags = {0};
  const struct qtr_option_group groups[] = {{"Options", qtr_model_option, &flags.model}, {NULL, own_options, &flags}};
  struct qtr_command_line line = {
      .command = "info",
      .usage = "info [--model DIR] [--device D] [--export-kv-scales FILE] [--json]",
      .about =
          "Says what a model directory holds (architecture, precision, bytes) and what it costs here: KV bytes a token in "
          "each "
          "width, and the longest context that fits in free memory after the weights. The weights are not loaded.",
      .group = groups,
      .n_groups = sizeof groups / sizeof groups[0]};
  int code = QTR_EXIT_USAGE;
  switch (qtr_options_parse(&line, argc, argv)) {
    case QTR_PARSE_OK: code = show_info(&flags); break;
    case QTR_PARSE_HELP: code = qtr_finish_output("info") ? QTR_EXIT_OK : QTR_EXIT_FAILURE; break;
    case QTR_PARSE_ERROR: break;
  }
  qtr_options_free(&line);
  return code;
}
