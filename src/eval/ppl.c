/* ppl.c - perplexity of a model over a token stream (ppl.h; spec F.11), over the windows of eval/windows.h. */
#include "eval/ppl.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/progress.h"
#include "base/status.h"
#include "base/threads.h"
#include "engine/engine_internal.h"
#include "eval/windows.h"

#include <math.h>
#include <stdlib.h>

size_t qtr_ppl_normalize_newlines(char *text, size_t len) {
  size_t n = 0;
  for (size_t i = 0; i < len; i++) {
    if (text[i] == '\r') {
      text[n++] = '\n';
      i += i + 1 < len && text[i + 1] == '\n';
    } else {
      text[n++] = text[i];
    }
  }
  return n;
}

/* What one window needs, made once. */
struct run {
  struct qtr_windows windows;
  double *nll; /* (chunk) */
  struct qtr_threads *team;
  const int32_t *target; /* (rows of the chunk) the tokens that follow */
};

static void score_rows(void *arg, size_t begin, size_t end, int thread) {
  (void)thread;
  const struct run *run = arg;
  size_t vocab = run->windows.vocab;
  for (size_t i = begin; i < end; i++) {
    const float *logits = run->windows.logits + i * vocab;
    run->nll[i] = qtr_windows_log_sum(logits, vocab) - (double)logits[run->target[i]];
  }
}

/* Scores token[1 … ctx); adds to *sum in the order of the tokens, whatever the number of threads. */
static enum qtr_status run_window(struct run *run, const int32_t *token, double *sum, struct qtr_error *err) {
  for (size_t first = 0; first + 1 < run->windows.window; first += run->windows.chunk) {
    size_t n_rows;
    enum qtr_status status = qtr_windows_forward(&run->windows, token, first, &n_rows, err);
    if (status) return status;
    run->target = token + first + 1;
    qtr_threads_for(run->team, n_rows, 8, score_rows, run);
    for (size_t i = 0; i < n_rows; i++) *sum += run->nll[i];
  }
  return QTR_OK;
}

enum qtr_status qtr_ppl_run(struct qtr_engine *engine, const int32_t *token, size_t n_tokens,
                            const struct qtr_ppl_options *options, struct qtr_ppl_result *result, struct qtr_error *err) {
  size_t ctx = (size_t)QTR_MAX(options->ctx, 0), chunk = qtr_windows_chunk(engine, ctx, false);
  struct run run = {0};
  enum qtr_status status = qtr_windows_create(engine, ctx, chunk, false, &run.windows, err);
  if (status || ctx < 2) return status;
  double t_start = qtr_now(), sum = 0;
  size_t n_windows = n_tokens / ctx;
  if (options->max_windows > 0) n_windows = QTR_MIN(n_windows, (size_t)options->max_windows);
  struct qtr_progress progress;
  qtr_progress_start(&progress, "perplexity", n_windows, options->quiet);
  run.nll = malloc(chunk * sizeof *run.nll);
  if (!run.nll) status = qtr_fail_memory(err, "scores", chunk * sizeof *run.nll);
  if (!status && n_tokens < ctx) {
    status = qtr_fail(err, QTR_ERR_LIMIT,
                      "the text has %zu tokens, less than one window of %zu: take a longer text or a smaller --ctx",
                      n_tokens, ctx);
  }
  if (!status) status = qtr_windows_check(engine, token, n_tokens, err);
  if (!status) status = qtr_threads_create(engine->threads, &run.team, err);
  for (size_t w = 0; w < n_windows && !status; w++) {
    status = run_window(&run, token + w * ctx, &sum, err);
    qtr_progress_update(&progress, w + 1);
  }
  if (!status) {
    *result = (struct qtr_ppl_result){.n_tokens = n_tokens, .n_scored = n_windows * (ctx - 1), .n_windows = n_windows};
    result->mean_nll = sum / (double)result->n_scored;
    result->perplexity = exp(result->mean_nll);
    result->seconds = qtr_now() - t_start;
    if (!isfinite(result->perplexity)) {
      status = qtr_fail(err, QTR_ERR_BACKEND, "the model's logits are not finite: the weights are damaged or overflow fp16");
    }
  }
  qtr_progress_end(&progress);
  qtr_threads_free(run.team);
  qtr_windows_free(&run.windows);
  free(run.nll);
  return status;
}
