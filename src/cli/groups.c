/* groups.c - the option groups that several commands share, and what they mean: where the model is, how the engine is set
 * up, how tokens are drawn. */
#include "base/file.h"
#include "base/status.h"
#include "cli/cli.h"
#include "engine/sampler.h"

#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define AT(field) offsetof(struct qtr_model_flags, field)
#define MODEL_OPTION(at)                                                                                \
  {                                                                                                     \
    .name = "model", .argument = "DIR", .kind = QTR_OPTION_STRING, .offset = (at),                      \
    .help = "Hugging Face or QServe directory. Default: $QUATTUOR_MODEL, else the built-in demo model." \
  }
#define DEVICE_OPTIONS                                                                                           \
  {.name = "device",                                                                                             \
   .kind = QTR_OPTION_CHOICE,                                                                                    \
   .offset = AT(device),                                                                                         \
   .choices = QTR_DEVICE_CHOICES,                                                                                \
   .help = "Where the model runs; reference is the slow oracle. Default auto: the fastest there is."},           \
      {.name = "gpu",                                                                                            \
       .argument = "N",                                                                                          \
       .kind = QTR_OPTION_INT,                                                                                   \
       .offset = AT(gpu),                                                                                        \
       .min = 0,                                                                                                 \
       .max = 1023,                                                                                              \
       .help = "Which GPU of several, counted from 0. Default 0."},                                              \
      QTR_THREADS_OPTION(AT(threads)),                                                                           \
      {.name = "precision",                                                                                      \
       .argument = "P",                                                                                          \
       .kind = QTR_OPTION_STRING,                                                                                \
       .offset = AT(precision),                                                                                  \
       .help =                                                                                                   \
           "Such as w4a8kv4: the weights must be what the file has, the KV width (kv4, kv8, kv16) is free. "     \
           "Default: as the file says."},                                                                        \
      {.name = "group-size",                                                                                     \
       .argument = "G",                                                                                          \
       .kind = QTR_OPTION_INT,                                                                                   \
       .offset = AT(group_size),                                                                                 \
       .min = -1,                                                                                                \
       .max = 128,                                                                                               \
       .help = "-1 (per channel) or 128, checked against the file."},                                            \
      {.name = "norm",                                                                                           \
       .kind = QTR_OPTION_CHOICE,                                                                                \
       .offset = AT(norm),                                                                                       \
       .choices = "exact|qserve",                                                                                \
       .help = "RMSNorm as defined (default), or the reference system's variant."},                              \
      {.name = "kv-scales",                                                                                      \
       .kind = QTR_OPTION_CHOICE,                                                                                \
       .offset = AT(kv_scales),                                                                                  \
       .choices = "dynamic|static",                                                                              \
       .help = "static: the per-tensor KV8 scales of the file. Default dynamic: per token and head."},           \
      {.name = "kv-quant-params-path",                                                                           \
       .argument = "FILE",                                                                                       \
       .kind = QTR_OPTION_STRING,                                                                                \
       .offset = AT(kv_quant_params_path),                                                                       \
       .help = "Static KV8 scales of this file (vLLM's JSON) instead of the model's."},                          \
  {                                                                                                              \
    .name = "kv-fp8", .kind = QTR_OPTION_CHOICE, .offset = AT(kv_fp8), .choices = "e4m3|e5m2",                   \
    .help =                                                                                                      \
        "For comparison: K and V of a kv16 cache are rounded to fp8 first, by static scales if those are asked " \
        "for. Saves nothing. On CPUs only."                                                                      \
  }

const struct qtr_option qtr_model_option[] = {MODEL_OPTION(0), {0}};

const struct qtr_option qtr_device_options_table[] = {MODEL_OPTION(AT(model)), DEVICE_OPTIONS, {0}};

const struct qtr_option qtr_model_options_table[] = {
    MODEL_OPTION(AT(model)),
    DEVICE_OPTIONS,
    {.name = "kv-pages",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(kv_pages),
     .min = 1,
     .max = INT32_MAX,
     .help = "Pages of 64 tokens in the KV pool. Default: $NUM_GPU_PAGE_BLOCKS, else from --kv-bytes."},
    {.name = "kv-bytes",
     .argument = "SIZE",
     .kind = QTR_OPTION_BYTES,
     .offset = AT(kv_bytes),
     .help = "Size of the KV pool, such as 512M or 2GiB. Default: from free memory."},
    {.name = "max-num-seqs",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(max_num_seqs),
     .min = 1,
     .max = 65536,
     .help = "Sequences that run at once. Default 256."},
    {.name = "max-num-batched-tokens",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(max_num_batched_tokens),
     .min = 1,
     .max = 1 << 24,
     .help = "Tokens of one step, prompt chunks included. Default: what suits the device."},
    {.name = "max-model-len",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(max_model_len),
     .min = 1,
     .max = 1 << 24,
     .help = "Prompt and generated tokens of one request. Default: the model's own limit."},
    {.name = "no-prefix-cache",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(no_prefix_cache),
     .help = "Do not reuse the KV pages of equal prompt beginnings."},
    {.name = "static-sparse-attn-load-dir",
     .argument = "DIR",
     .kind = QTR_OPTION_STRING,
     .offset = AT(sparse.heads_dir),
     .help = "Directory with full_attention_heads.tsv, DuoAttention's or quattuor calibrate heads': which KV heads need the "
             "whole "
             "text."},
    {.name = "static-sparsity",
     .argument = "S",
     .kind = QTR_OPTION_FLOAT,
     .offset = AT(sparse.static_sparsity),
     .min = 0,
     .max = 1,
     .help =
         "Share of the KV heads, those that need it least, that see only the first tokens and the last ones. Default 0."},
    {.name = "sparse-context-mode",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(sparse.context_mode),
     .help = "They do so in prompts as well, and then cost the same memory at any length."},
    {.name = "ctx-sink-token",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(sparse.ctx_sink),
     .min = 0,
     .max = 1 << 24,
     .help = "With --sparse-context-mode: first tokens that they see in prompts. Default 128."},
    {.name = "ctx-local-token",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(sparse.ctx_local),
     .min = 1,
     .max = 1 << 24,
     .help = "With --sparse-context-mode: last tokens that they see in prompts. Default 8192."},
    {.name = "dec-sink-token",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(sparse.dec_sink),
     .min = 0,
     .max = 1 << 24,
     .help = "First tokens that they see when text is generated. Default 128."},
    {.name = "dec-local-token",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(sparse.dec_local),
     .min = 1,
     .max = 1 << 24,
     .help = "Last tokens, the newest among them, that they see when text is generated. Default 256."},
    {.name = "kv-stream-pages",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(sparse.stream_pages),
     .min = 1,
     .max = INT32_MAX,
     .help = "Pages of 64 tokens for them. Default: $NUM_STREAMING_GPU_PAGE_BLOCKS, else what all sequences need at once."},
    {.name = "sparse-decode-mode",
     .kind = QTR_OPTION_CHOICE,
     .offset = AT(sparse_decode_mode),
     .choices = "0|1",
     .help =
         "1: the other heads read, for generated tokens, only the pages that matter to the query. Default 0: everything."},
    {.name = "dynamic-sparse-token-budget",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(sparse.token_budget),
     .min = 64,
     .max = 1 << 24,
     .help = "With --sparse-decode-mode 1: tokens that they read, a multiple of 64; shorter texts are read whole. Default "
             "4096."},
    {.name = "selector-update-interval",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(sparse.selector_interval),
     .min = 1,
     .max = 1 << 24,
     .help = "With --sparse-decode-mode 1: the pages are chosen anew every N tokens. Default 4."},
    {.name = "sub-chunk-per-block",
     .kind = QTR_OPTION_CHOICE,
     .offset = AT(sub_chunks),
     .choices = "4|2|1",
     .help = "With --sparse-decode-mode 1: parts of a page that have statistics of their own. Default 4: 16 tokens each."},
    {.name = "selector-heads",
     .kind = QTR_OPTION_CHOICE,
     .offset = AT(selector_heads),
     .choices = "group|each",
     .help = "With --sparse-decode-mode 1: the query heads of a KV head choose together (default) or each for itself."},
    {0}};
#undef AT

void qtr_model_flags_init(struct qtr_model_flags *flags) {
  struct qtr_engine_options defaults;
  qtr_engine_options_init(&defaults);
  *flags = (struct qtr_model_flags){.device = "auto", .sparse = defaults.sparse};
}

/* <dir>/<name> when it holds a config.json, else NULL. malloc'ed. */
static char *model_at(const char *dir, const char *name) {
  char *model = qtr_path_join(dir, name);
  char *config = model ? qtr_path_join(model, "config.json") : NULL;
  bool found = config && qtr_file_exists(config);
  free(config);
  if (found) return model;
  free(model);
  return NULL;
}

enum qtr_status qtr_find_model(const char *given, char **dir, struct qtr_error *err) {
  const char *wanted = given ? given : getenv("QUATTUOR_MODEL");
  if (wanted && *wanted) {
    *dir = strdup(wanted);
    return *dir ? QTR_OK : qtr_fail_memory(err, "a path", strlen(wanted));
  }
  /* Installed: <prefix>/bin/quattuor and <prefix>/share/quattuor/models/demo. Built: <source>/build[/preset]/quattuor. */
  char exe[PATH_MAX];
  ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
  *dir = NULL;
  if (n > 0) {
    exe[n] = 0;
    char *at = exe;
    for (int up = 0; up < 4 && !*dir; up++) {
      at = dirname(at);
      *dir = model_at(at, "share/quattuor/models/demo");
      if (!*dir) *dir = model_at(at, "models/demo");
    }
  }
  if (!*dir) *dir = model_at(QTR_DATA_DIR, "models/demo");
  if (*dir) return QTR_OK;
  return qtr_fail(err, QTR_ERR_NOT_FOUND,
                  "no model: give --model DIR or set QUATTUOR_MODEL (the demo model is not installed)");
}

enum qtr_status qtr_env_int(const char *name, int32_t *value, struct qtr_error *err) {
  const char *text = getenv(name);
  int64_t v = 0;
  *value = 0;
  if (!text || !*text) return QTR_OK;
  if (!qtr_parse_int(text, 0, INT32_MAX, &v)) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "the variable %s is \"%.60s\": write a whole number from 0 to %d", name, text,
                    INT32_MAX);
  }
  *value = (int32_t)v;
  return QTR_OK;
}

void qtr_engine_options_from_flags(const struct qtr_model_flags *flags, const char *dir,
                                   struct qtr_engine_options *options) {
  qtr_engine_options_init(options);
  options->model_dir = dir;
  options->device = flags->device;
  options->precision = flags->precision;
  options->kv_fp8 = flags->kv_fp8;
  options->kv_quant_params_path = flags->kv_quant_params_path;
  options->kv_scales = flags->kv_scales && strcmp(flags->kv_scales, "static") == 0 ? "static" : NULL;
  options->group_size = flags->group_size;
  options->threads = flags->threads;
  options->gpu = flags->gpu;
  options->max_num_seqs = flags->max_num_seqs;
  options->max_num_batched_tokens = flags->max_num_batched_tokens;
  options->max_model_len = flags->max_model_len;
  options->kv_bytes = flags->kv_bytes;
  options->kv_pages = flags->kv_pages;
  options->no_prefix_cache = flags->no_prefix_cache;
  options->sparse = flags->sparse;
  if (flags->sparse_decode_mode) options->sparse.decode_mode = flags->sparse_decode_mode[0] - '0';
  if (flags->sub_chunks) options->sparse.sub_chunks = flags->sub_chunks[0] - '0';
  options->sparse.each_head = flags->selector_heads && strcmp(flags->selector_heads, "each") == 0;
  options->norm = flags->norm && strcmp(flags->norm, "qserve") == 0 ? QTR_NORM_QSERVE : QTR_NORM_EXACT;
}

enum qtr_status qtr_open_engine(const struct qtr_model_flags *flags, struct qtr_engine **engine, struct qtr_error *err) {
  char *dir = NULL;
  struct qtr_engine_options options;
  enum qtr_status status = qtr_find_model(flags->model, &dir, err);
  if (!status) {
    qtr_engine_options_from_flags(flags, dir, &options);
    status = qtr_engine_open(&options, engine, err);
  }
  free(dir);
  return status;
}

#define AT(field) offsetof(struct qtr_sampling_flags, field)
const struct qtr_option qtr_sampling_options_table[] = {
    {.name = "max-tokens",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(max_tokens),
     .min = 0,
     .max = 1 << 24,
     .help = "Tokens to generate at most; 0 = until the context is full. Default 256."},
    {.name = "temperature",
     .argument = "T",
     .kind = QTR_OPTION_FLOAT,
     .offset = AT(sampling.temperature),
     .min = 0,
     .max = 100,
     .help = "0 always takes the best token."},
    {.name = "top-k",
     .argument = "K",
     .kind = QTR_OPTION_INT,
     .offset = AT(sampling.top_k),
     .min = -1,
     .max = INT32_MAX,
     .help = "Draw among the K best tokens; -1 = off (default)."},
    {.name = "top-p",
     .argument = "P",
     .kind = QTR_OPTION_FLOAT,
     .offset = AT(sampling.top_p),
     .min = 0,
     .max = 1,
     .help = "Draw among the best tokens whose probabilities reach P; 1 = off."},
    {.name = "min-p",
     .argument = "P",
     .kind = QTR_OPTION_FLOAT,
     .offset = AT(sampling.min_p),
     .min = 0,
     .max = 1,
     .help = "Leave out tokens less likely than P times the best; 0 = off (default)."},
    {.name = "repetition-penalty",
     .argument = "R",
     .kind = QTR_OPTION_FLOAT,
     .offset = AT(sampling.repetition_penalty),
     .min = 0,
     .max = 2,
     .help = "Over prompt and output; 1 = off (default)."},
    {.name = "presence-penalty",
     .argument = "R",
     .kind = QTR_OPTION_FLOAT,
     .offset = AT(sampling.presence_penalty),
     .min = -2,
     .max = 2,
     .help = "Over the output, once a token; 0 = off (default)."},
    {.name = "frequency-penalty",
     .argument = "R",
     .kind = QTR_OPTION_FLOAT,
     .offset = AT(sampling.frequency_penalty),
     .min = -2,
     .max = 2,
     .help = "Over the output, for each occurrence; 0 = off (default)."},
    {.name = "seed",
     .argument = "S",
     .kind = QTR_OPTION_UINT64,
     .offset = AT(sampling.seed),
     .given = AT(sampling.has_seed),
     .help = "The same seed gives the same text. Default: drawn from the system."},
    {.name = "stop",
     .argument = "TEXT",
     .kind = QTR_OPTION_LIST,
     .offset = AT(stop),
     .help = "Ends the answer before this text. May be repeated, at most 16 times."},
    {.name = "stop-token",
     .argument = "ID",
     .kind = QTR_OPTION_LIST,
     .offset = AT(stop_token),
     .help = "Ends the answer at this token id. May be repeated."},
    {.name = "ignore-eos",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(ignore_eos),
     .help = "Go on after the model's end-of-text tokens."},
    {0}};
#undef AT

void qtr_sampling_flags_init(struct qtr_sampling_flags *flags) {
  struct qtr_request_options defaults;
  qtr_request_options_init(&defaults);
  *flags = (struct qtr_sampling_flags){.sampling = defaults.sampling, .max_tokens = 256, .logprobs = -1, .n = 1};
}

enum qtr_status qtr_request_from_flags(struct qtr_sampling_flags *flags, struct qtr_request_options *request,
                                       struct qtr_error *err) {
  if (flags->stop_token.n > 0 && !flags->stop_ids) {
    flags->stop_ids = calloc(flags->stop_token.n, sizeof *flags->stop_ids);
    if (!flags->stop_ids) return qtr_fail_memory(err, "--stop-token", flags->stop_token.n);
    for (size_t i = 0; i < flags->stop_token.n; i++) {
      int64_t id;
      if (!qtr_parse_int(flags->stop_token.item[i], 0, INT32_MAX, &id)) {
        return qtr_fail(err, QTR_ERR_ARGUMENT, "--stop-token \"%.60s\": write a token id, a whole number from 0",
                        flags->stop_token.item[i]);
      }
      flags->stop_ids[i] = (int32_t)id;
    }
  }
  enum qtr_status status = qtr_sampling_check(&flags->sampling, err);
  if (status) return status;
  request->sampling = flags->sampling;
  request->max_tokens = flags->max_tokens;
  request->n = flags->n;
  request->logprobs = flags->logprobs;
  request->stop = flags->stop.item;
  request->n_stop = flags->stop.n;
  request->stop_token = flags->stop_ids;
  request->n_stop_token = flags->stop_token.n;
  request->ignore_eos = flags->ignore_eos;
  return QTR_OK;
}

void qtr_sampling_flags_free(struct qtr_sampling_flags *flags) {
  free(flags->stop_ids);
  flags->stop_ids = NULL;
}
