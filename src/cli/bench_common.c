/* bench_common.c - the model of a benchmark: loaded, or random weights of a shape (bench_common.h). QServe's spellings and
 * variables: spec D.7, D.9. */
#include "cli/bench_common.h"

#include "base/file.h"
#include "base/random.h"
#include "base/status.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_CONFIG ((size_t)16 << 20)

/* Does the directory hold weights at all? QServe's benchmark repository has configurations only. */
static bool has_weights(const char *dir) {
  struct qtr_checkpoint *checkpoint;
  if (qtr_checkpoint_open(dir, &checkpoint, NULL)) return false;
  qtr_checkpoint_close(checkpoint);
  return true;
}

enum qtr_status qtr_bench_find(const struct qtr_bench_flags *flags, struct qtr_bench_source *source, struct qtr_error *err) {
  enum qtr_status status = QTR_OK;
  *source = (struct qtr_bench_source){.random = flags->config != NULL};
  if (!flags->config) status = qtr_find_model(flags->quant_path ? flags->quant_path : flags->model.model, &source->dir, err);
  if (status) return status;
  source->config = flags->config ? strdup(flags->config) : qtr_path_join(source->dir, "config.json");
  if (!source->config) return qtr_fail_memory(err, "a path", 0);
  source->name = flags->config ? source->config : source->dir;
  if (!source->random && !flags->quant_path && qtr_file_exists(source->config) && !has_weights(source->dir)) {
    (void)fprintf(stderr, "quattuor bench: %s holds no weights: random ones of that shape\n", source->dir);
    source->random = true;
  }
  return QTR_OK;
}

void qtr_bench_source_free(struct qtr_bench_source *source) {
  free(source->dir);
  free(source->config);
  *source = (struct qtr_bench_source){0};
}

enum qtr_status qtr_bench_engine_options(const struct qtr_bench_flags *flags, const struct qtr_bench_source *source,
                                         int32_t prompt_len, struct qtr_engine_options *options, struct qtr_error *err) {
  int32_t said = 0, also_said = 0;
  enum qtr_status status = qtr_env_int("NUM_GPU_PAGE_BLOCKS", &said, err);
  if (!status) status = qtr_env_int("NUM_RETRIEVAL_GPU_PAGE_BLOCKS", &also_said, err);
  if (status) return status;
  qtr_engine_options_from_flags(&flags->model, source->dir, options);
  if (flags->kv_granularity) options->kv_scales = strcmp(flags->kv_granularity, "per_tensor") == 0 ? "static" : NULL;
  options->no_prefix_cache = true; /* nothing to find, and no time spent on looking */
  if (!options->max_num_seqs) options->max_num_seqs = flags->batch;
  if (!options->max_model_len) options->max_model_len = prompt_len + flags->gen_len;
  if (!options->kv_pages && !options->kv_bytes && !said &&
      !also_said) { /* what the run needs; a page more each for the token after the last */
    int64_t pages = (int64_t)flags->batch * ((prompt_len + flags->gen_len) / QTR_PAGE_TOKENS + 1);
    options->kv_pages = pages > INT32_MAX ? INT32_MAX : (int32_t)pages;
  }
  return QTR_OK;
}

static enum qtr_status linear_format(const struct qtr_precision *p, int32_t group_size, enum qtr_linear_format *format,
                                     struct qtr_error *err) {
  if (group_size != 0 && group_size != -1 && group_size != 128) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "--group-size %d: write -1 or 128", group_size);
  }
  if (p->weight_bits != 4 && group_size > 0) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "--group-size %d goes with 4-bit weights only", group_size);
  }
  *format = p->weight_bits == 16  ? QTR_LINEAR_F16
            : p->weight_bits == 8 ? QTR_LINEAR_W8A8
            : group_size == -1    ? QTR_LINEAR_W4A8
                                  : QTR_LINEAR_W4A8_G128;
  return QTR_OK;
}

static enum qtr_status read_shape(const char *path, struct qtr_config *config, struct qtr_error *err) {
  char *text = NULL;
  size_t len;
  enum qtr_status status = qtr_file_read(path, MAX_CONFIG, &text, &len, err);
  if (!status && (status = qtr_config_parse(text, len, NULL, 0, config, err))) (void)qtr_error_prefix(err, "%s", path);
  free(text);
  return status;
}

enum qtr_status qtr_bench_model(const struct qtr_bench_flags *flags, const struct qtr_bench_source *source,
                                struct qtr_engine_options *options, int32_t max_len, struct qtr_model **model,
                                struct qtr_error *err) {
  struct qtr_config config;
  struct qtr_precision precision;
  enum qtr_linear_format format = QTR_LINEAR_W4A8_G128;
  struct qtr_backend *backend = NULL;
  const struct qtr_backend_options backend_options = {.threads = options->threads, .gpu = options->gpu};
  const struct qtr_model_options model_options = {.max_len = max_len, .norm = options->norm};
  enum qtr_status status = QTR_OK;
  *model = NULL;
  if (source->random) {
    if (!options->precision) options->precision = "w4a8kv4";
    status = qtr_precision_parse(options->precision, &precision, err);
    if (!status) status = linear_format(&precision, options->group_size, &format, err);
    if (!status) status = read_shape(source->config, &config, err);
  }
  if (!status) status = qtr_backend_open(options->device, &backend_options, &backend, err);
  if (status) return status;
  if (source->random) {
    bool head_int8 = flags->lm_head && strcmp(flags->lm_head, "int8") == 0;
    status = qtr_model_random(&config, format, head_int8, flags->seed, backend, &model_options, model, err);
  } else {
    status = qtr_model_load(source->dir, backend, &model_options, model, err);
  }
  if (status) qtr_backend_close(backend);
  return status;
}

void qtr_bench_model_free(struct qtr_model *model) {
  if (!model) return;
  struct qtr_backend *backend = model->backend;
  qtr_model_free(model);
  qtr_backend_close(backend);
}

enum qtr_status qtr_bench_random_heads(const struct qtr_config *config, uint64_t seed, double **heads,
                                       struct qtr_error *err) {
  size_t n = (size_t)config->n_layers * (size_t)config->n_kv_heads;
  uint64_t state = qtr_random_state(seed, (uint64_t)config->n_layers, (uint64_t)config->n_kv_heads, 0);
  *heads = malloc(n * sizeof **heads);
  if (!*heads) return qtr_fail_memory(err, "the attention heads", n * sizeof **heads);
  for (size_t i = 0; i < n; i++) (*heads)[i] = (double)(qtr_random_next(&state) >> 11) * 0x1p-53;
  return QTR_OK;
}
