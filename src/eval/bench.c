/* bench.c - one round of the speed protocol (bench.h). With chunked prefill the first sequences decode while the last
 * prompts are still read, and end earlier: so decoding is timed over the steps between the last first token and the first
 * end, where the batch is whole. With long prompts there would be none: then slack holds the first sequences back from their
 * end. */
#include "eval/bench.h"

#include "base/clock.h"
#include "base/progress.h"
#include "base/random.h"
#include "base/status.h"

#include <math.h>
#include <stdlib.h>

/* id: (batch) */
static enum qtr_status add_prompts(struct qtr_engine *engine, const struct qtr_bench_options *options, uint64_t *id,
                                   struct qtr_error *err) {
  struct qtr_engine_info info;
  qtr_engine_get_info(engine, &info);
  uint64_t state = options->seed;
  size_t n = (size_t)options->prompt_len;
  int32_t *prompt = malloc(n * sizeof *prompt); /* (prompt_len) */
  enum qtr_status status = QTR_OK;
  if (!prompt) return qtr_fail_memory(err, "a prompt", n * sizeof *prompt);
  for (int32_t i = 0; i < options->batch && !status; i++) {
    for (size_t k = 0; k < n; k++) prompt[k] = (int32_t)qtr_random_below(&state, (uint64_t)info.vocab_size);
    struct qtr_request_options request;
    qtr_request_options_init(&request);
    request.prompt_token = prompt;
    request.n_prompt_token = n;
    request.max_tokens = options->gen_len + options->slack;
    request.ignore_eos = true;
    request.sampling.temperature = 0;
    status = qtr_engine_add(engine, &request, &id[i], err);
  }
  free(prompt);
  return status;
}

enum qtr_status qtr_bench_round_run(struct qtr_engine *engine, const struct qtr_bench_options *options,
                                    struct qtr_bench_round *round, struct qtr_error *err) {
  struct qtr_stats before, after, last;
  struct qtr_event event;
  uint64_t *id = calloc((size_t)options->batch, sizeof *id);
  if (!id) return qtr_fail_memory(err, "requests", (size_t)options->batch * sizeof *id);
  enum qtr_status status = add_prompts(engine, options, id, err);
  if (status) {
    free(id);
    return status;
  }
  qtr_engine_stats(engine, &before);
  last = before;
  size_t total = (size_t)options->batch * (size_t)options->gen_len, n_tokens = 0;
  int32_t n_started = 0, n_ended = 0, n_whole = 0; /* sequences; steps of the whole batch */
  bool has_work = true, failed = false, stopped = false;
  double t_start = qtr_now(), t_prefill = 0, decode_s = 0, busy = 0, idle = 0;
  size_t n_decoded = 0;
  struct qtr_progress progress;
  *round = (struct qtr_bench_round){0};
  qtr_progress_start(&progress, "round", total, options->quiet);
  while (has_work && !status) {
    bool whole = n_started == options->batch && n_ended == 0;
    size_t n_before = n_tokens;
    double t = qtr_now();
    status = qtr_engine_step(engine, &has_work, err);
    double t_after = qtr_now();
    while (qtr_engine_poll(engine, &event)) {
      n_tokens += event.token >= 0;
      n_started += event.token >= 0 && event.n_output_tokens == 1;
      n_ended += event.finish != QTR_FINISH_NONE;
      failed = failed || (event.finish && event.finish != QTR_FINISH_LENGTH && !stopped);
    }
    if (n_started == options->batch && t_prefill == 0) t_prefill = t_after;
    qtr_engine_stats(engine, &after);
    if (whole && n_tokens - n_before == (size_t)options->batch && n_whole++ >= options->settle) { /* not preempted */
      decode_s += t_after - t;
      busy += after.device_busy_seconds - last.device_busy_seconds;
      idle += after.device_idle_seconds - last.device_idle_seconds;
      n_decoded += n_tokens - n_before;
      round->n_decode_steps++;
    }
    last = after;
    qtr_progress_update(&progress, n_tokens);
    if (options->slack > 0 && !stopped && n_started == options->batch && n_whole >= options->gen_len - 1) {
      stopped = true;
      for (int32_t i = 0; i < options->batch; i++) (void)qtr_engine_cancel(engine, id[i], NULL); /* some may have ended */
    }
  }
  free(id);
  round->seconds = qtr_now() - t_start;
  qtr_progress_end(&progress);
  if (status) return status;
  if (failed || (n_tokens != total && options->slack == 0)) {
    return qtr_fail(err, QTR_ERR_BACKEND, "%zu of %zu tokens came: the engine ended requests early", n_tokens, total);
  }
  round->throughput_tok_s = (double)n_tokens / round->seconds;
  round->prefill_s = t_prefill - t_start;
  round->decode_ms_per_step = round->n_decode_steps ? decode_s * 1e3 / (double)round->n_decode_steps : (double)NAN;
  round->decode_tok_s = round->n_decode_steps ? (double)n_decoded / decode_s : (double)NAN;
  round->device_idle_share = busy > 0 ? idle / (busy + idle) : (double)NAN;
  round->n_preemptions = after.n_preemptions - before.n_preemptions;
  return QTR_OK;
}
