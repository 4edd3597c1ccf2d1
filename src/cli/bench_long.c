/* bench_long.c - `quattuor bench --long`: LServe's protocol (spec D.8.2) over context lengths, sparse attention against
 * dense. The weights are there once; the two sides take turns with caches of their own over them, so that the longest
 * context may have all other memory. What does not fit is part of the result. */
#include "cli/bench_long.h"
#include "base/checked.h"
#include "base/file.h"
#include "base/status.h"
#include "checkpoint/heads.h"
#include "cli/eval.h"
#include "engine/engine_internal.h"
#include "load/stats.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Decode steps before the timed ones: a device has made its graphs after the second, and eight are whole intervals of the
 * selection at its default. */
#define SETTLE 8
#define WARM_TOKENS 16
#define MOST_SLACK (1 << 20) /* tokens */

const char *const qtr_long_names[QTR_LONG_SIDES] = {"dense", "sparse"};

struct run {
  const struct qtr_bench_flags *flags;
  struct qtr_bench_source source;
  struct qtr_model *model; /* NULL until the first side needs it, and after the device has failed */
  const char *precision;   /* of the model, once it is there; NULL: as it says itself */
  double *heads;           /* (n_layers, n_kv_heads) where no table was given */
  struct qtr_long_result result;
};

/* Steps in which the prompts of a batch are read, while the first sequences generate already. */
static int32_t slack_of(const struct run *run, size_t length) {
  struct qtr_caps caps = {0};
  int32_t batch = run->flags->batch, step = run->flags->model.max_num_batched_tokens;
  if (batch == 1 || !run->model) return 0;
  run->model->backend->ops->caps(run->model->backend, &caps);
  step = QTR_MAX((step > 0 ? step : caps.step_tokens) - batch, 1);
  return (int32_t)QTR_MIN(qtr_ceil_div((size_t)batch * length, (size_t)step) + 2, (size_t)MOST_SLACK);
}

/* The engine's options of one side at one length. */
static enum qtr_status side_options(const struct run *run, int side, size_t length, struct qtr_engine_options *options,
                                    struct qtr_error *err) {
  int32_t whole = (int32_t)length + slack_of(run, length);
  enum qtr_status status = qtr_bench_engine_options(run->flags, &run->source, whole, options, err);
  if (side == QTR_LONG_DENSE) {
    struct qtr_engine_options plain;
    qtr_engine_options_init(&plain);
    options->sparse = plain.sparse;
  }
  options->sparse.heads = run->heads;
  if (!status && run->precision) options->precision = run->precision;
  return status;
}

static enum qtr_status ensure_model(struct run *run, struct qtr_error *err) {
  struct qtr_engine_options options;
  int32_t longest = (int32_t)run->result.length[run->result.n_lengths - 1] + run->flags->gen_len;
  if (run->model) return QTR_OK;
  enum qtr_status status = qtr_bench_engine_options(run->flags, &run->source, longest, &options, err);
  if (run->flags->batch > 1) longest += MOST_SLACK;
  if (!status) status = qtr_bench_model(run->flags, &run->source, &options, longest, &run->model, err);
  run->precision = options.precision;
  return status;
}

/* What holds for all lengths, once a model is there. */
static void describe(struct qtr_long_result *r, struct qtr_engine *engine) {
  struct qtr_engine_info info;
  struct qtr_stats stats;
  struct qtr_caps caps;
  qtr_engine_get_info(engine, &info);
  qtr_engine_stats(engine, &stats);
  engine->model->backend->ops->caps(engine->model->backend, &caps);
  (void)snprintf(r->precision, sizeof r->precision, "%s", info.precision);
  (void)snprintf(r->device, sizeof r->device, "%s", info.device);
  (void)snprintf(r->device_name, sizeof r->device_name, "%s", caps.description);
  r->threads = info.threads;
  r->group_size = info.group_size;
  r->weight_bytes = stats.weight_bytes;
}

/* A device that has failed does not come back: another one, should there be a next round. */
static void drop_model(struct run *run) {
  qtr_bench_model_free(run->model);
  run->model = NULL;
}

/* One round of one side, with an engine opened and closed for it. */
static enum qtr_status run_round(struct run *run, int side, size_t length, int32_t gen_len, int32_t number,
                                 struct qtr_bench_round *round, size_t *pool_bytes, struct qtr_error *err) {
  struct qtr_engine_options options;
  struct qtr_engine *engine = NULL;
  struct qtr_stats stats;
  enum qtr_status status = ensure_model(run, err);
  if (!status) status = side_options(run, side, length, &options, err);
  if (!status) status = qtr_engine_open_model(run->model, NULL, NULL, &options, &engine, err);
  if (status == QTR_ERR_BACKEND) drop_model(run);
  if (status) return status;
  describe(&run->result, engine);
  qtr_engine_stats(engine, &stats);
  *pool_bytes = stats.kv_pool_bytes;
  const struct qtr_bench_options bench = {.batch = run->flags->batch,
                                          .prompt_len = (int32_t)length,
                                          .gen_len = gen_len,
                                          .slack = slack_of(run, length),
                                          .settle = QTR_MIN(SETTLE, gen_len / 2),
                                          .seed = run->flags->seed + (uint64_t)number};
  status = qtr_bench_round_run(engine, &bench, round, err);
  run->model = qtr_engine_close_keep_model(engine);
  if (status) drop_model(run);
  return status;
}

static double median(const double *value, size_t n) {
  double finite[QTR_BENCH_MAX_ROUNDS];
  size_t count = 0;
  for (size_t i = 0; i < n; i++) {
    if (isfinite(value[i])) finite[count++] = value[i];
  }
  return count == 0 ? (double)NAN : qtr_distribution_of(finite, count).p50;
}

static void summarize(struct qtr_long_cell *cell) {
  double prefill[QTR_BENCH_MAX_ROUNDS], decode[QTR_BENCH_MAX_ROUNDS];
  for (int32_t i = 0; i < cell->n; i++) {
    prefill[i] = cell->round[i].prefill_s;
    decode[i] = cell->round[i].decode_ms_per_step;
  }
  cell->prefill_s = median(prefill, (size_t)cell->n);
  cell->decode_ms = median(decode, (size_t)cell->n);
}

/* Too long for the memory, or more than the device does: said in the result. Everything else is a mistake of the caller's.
 */
static bool belongs_to_result(enum qtr_status status) {
  return status == QTR_ERR_LIMIT || status == QTR_ERR_MEMORY || status == QTR_ERR_UNSUPPORTED || status == QTR_ERR_BACKEND;
}

/* Every round of a length, the sides in turn, each first in every other round. */
static enum qtr_status run_length(struct run *run, size_t i, struct qtr_error *err) {
  struct qtr_long_result *r = &run->result;
  for (int32_t round = 0; round < run->flags->rounds; round++) {
    for (int k = 0; k < QTR_LONG_SIDES; k++) {
      int side = round % 2 == 0 ? k : QTR_LONG_SIDES - 1 - k;
      struct qtr_long_cell *cell = qtr_long_cell(r, i, side);
      if (!r->on[side] || cell->error.status) continue;
      struct qtr_bench_round *now = &cell->round[cell->n];
      enum qtr_status status =
          run_round(run, side, r->length[i], run->flags->gen_len, round + 1, now, &cell->kv_pool_bytes, err);
      if (status && !belongs_to_result(status)) return status;
      if (status) {
        cell->error = *err;
        cell->error.status = status;
        (void)fprintf(stderr, "%zu tokens, %s: %s\n", r->length[i], qtr_long_names[side], err->message);
        continue;
      }
      cell->n++;
      (void)fprintf(stderr, "%zu tokens, %s, round %d: prompt %.4g s, a token %.4g ms\n", r->length[i], qtr_long_names[side],
                    round, now->prefill_s, now->decode_ms_per_step);
    }
  }
  for (int side = 0; side < QTR_LONG_SIDES; side++) summarize(qtr_long_cell(r, i, side));
  return QTR_OK;
}

/* A short run of each side: code is loaded, clocks are up. What it has to say about failure the timed rounds will say. */
static enum qtr_status warm_up(struct run *run, struct qtr_error *err) {
  for (int side = 0; side < QTR_LONG_SIDES; side++) {
    struct qtr_bench_round round;
    size_t bytes;
    if (!run->result.on[side]) continue;
    enum qtr_status status =
        run_round(run, side, run->result.length[0], QTR_MIN(WARM_TOKENS, run->flags->gen_len), 0, &round, &bytes, err);
    if (status && !belongs_to_result(status)) return status;
  }
  return QTR_OK;
}

/* Which heads stream: by the table that was given, or random ones. */
static enum qtr_status choose_heads(struct run *run, struct qtr_error *err) {
  struct qtr_long_result *r = &run->result;
  struct qtr_engine_options options;
  double sparsity = (double)r->sparse.static_sparsity;
  enum qtr_status status = side_options(run, QTR_LONG_SPARSE, r->length[0], &options, err);
  if (!r->sparse.heads_dir) options.sparse.heads = &sparsity; /* there will be some */
  if (!status) status = qtr_engine_options_check(&options, err);
  if (!status) status = ensure_model(run, err);
  if (status || !(sparsity > 0)) return status;
  const struct qtr_config *c = &run->model->config;
  size_t n = (size_t)c->n_layers * (size_t)c->n_kv_heads;
  r->n_layers = c->n_layers;
  r->n_kv_heads = c->n_kv_heads;
  r->streaming = calloc(n, 1);
  if (!r->streaming) return qtr_fail_memory(err, "the attention heads", n);
  if (r->sparse.heads_dir) {
    r->heads = r->sparse.heads_dir;
    return qtr_heads_read(r->sparse.heads_dir, c->n_layers, c->n_kv_heads, sparsity, r->streaming, err);
  }
  r->heads = "random";
  status = qtr_bench_random_heads(c, run->flags->seed, &run->heads, err);
  return status ? status : qtr_heads_choose(run->heads, n, sparsity, r->streaming, err);
}

static int compare_lengths(const void *a, const void *b) {
  size_t x = *(const size_t *)a, y = *(const size_t *)b;
  return (x > y) - (x < y);
}

static enum qtr_status prepare(struct run *run, struct qtr_error *err) {
  struct qtr_long_result *r = &run->result;
  const struct qtr_bench_flags *flags = run->flags;
  struct qtr_engine_options options;
  r->on[QTR_LONG_DENSE] = flags->dense || !flags->sparse;
  r->on[QTR_LONG_SPARSE] = flags->sparse || !flags->dense;
  enum qtr_status status =
      qtr_eval_parse_lengths(flags->lengths ? flags->lengths : "4096,8192,16384,32768", &r->length, &r->n_lengths, err);
  if (!status) status = qtr_bench_find(flags, &run->source, err);
  if (status) return status;
  qsort(r->length, r->n_lengths, sizeof *r->length, compare_lengths);
  r->cell = calloc(r->n_lengths * QTR_LONG_SIDES, sizeof *r->cell);
  if (!r->cell) return qtr_fail_memory(err, "results", r->n_lengths * sizeof *r->cell);
  r->name = run->source.name;
  qtr_engine_options_from_flags(&flags->model, NULL, &options);
  r->sparse = options.sparse;
  return r->on[QTR_LONG_SPARSE] ? choose_heads(run, err) : QTR_OK;
}

static enum qtr_status write_plot(const struct qtr_long_result *r, const char *path, struct qtr_error *err) {
  char *text = NULL;
  size_t len;
  if (!path) return QTR_OK;
  enum qtr_status status = qtr_long_plot(r, &text, &len, err);
  if (!status) status = qtr_file_write(path, text, len, err);
  free(text);
  return status;
}

int qtr_bench_long(const struct qtr_bench_flags *flags) {
  struct run run = {.flags = flags, .result = {.flags = flags}};
  struct qtr_long_result *r = &run.result;
  struct qtr_error err;
  bool measured = false, printed = true;
  int code = QTR_EXIT_FAILURE;
  enum qtr_status status = prepare(&run, &err);
  if (!status) status = warm_up(&run, &err);
  if (!status && !flags->json) qtr_long_print_head(r);
  for (size_t i = 0; i < r->n_lengths && !status; i++) {
    status = run_length(&run, i, &err);
    if (!status && !flags->json) qtr_long_print_line(r, i);
    for (int side = 0; side < QTR_LONG_SIDES && !status; side++) measured = measured || qtr_long_cell(r, i, side)->n > 0;
  }
  if (!status) printed = flags->json ? qtr_print_json("bench", qtr_long_json(r)) : qtr_finish_output("bench");
  if (!status) status = write_plot(r, flags->svg, &err);
  if (status)
    (void)qtr_report("bench", &err);
  else if (!measured)
    (void)fprintf(stderr, "quattuor bench: nothing could be measured\n");
  else if (printed)
    code = QTR_EXIT_OK;
  qtr_bench_model_free(run.model);
  qtr_bench_source_free(&run.source);
  free(run.heads);
  free(r->length);
  free(r->cell);
  free(r->streaming);
  return code;
}
