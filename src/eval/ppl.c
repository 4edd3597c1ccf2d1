/* ppl.c - perplexity of a model over a token stream (ppl.h; spec F.11). The model is driven directly, chunk by chunk, with
 * the logits of every row; K and V go through the engine's pages in its KV format, so the figure includes what the cache
 * costs. */
#include "eval/ppl.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/progress.h"
#include "base/status.h"
#include "base/threads.h"
#include "engine/engine_internal.h"

#include <math.h>
#include <stdlib.h>

#define CHUNK_TOKENS 512
#define MAX_LOGIT_BYTES ((size_t)128 << 20) /* of a chunk */

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

/* -log softmax(logits)[target], summed in double. logits: (n) */
static double negative_log_likelihood(const float *logits, size_t n, int32_t target) {
  float max = logits[0];
  for (size_t i = 1; i < n; i++) max = logits[i] > max ? logits[i] : max;
  double sum = 0;
  for (size_t i = 0; i < n; i++) sum += (double)expf(logits[i] - max);
  return log(sum) + (double)max - (double)logits[target];
}

/* What one window needs, made once. */
struct run {
  struct qtr_engine *engine;
  struct qtr_workspace *workspace;
  size_t chunk;             /* tokens of one step */
  int32_t *position, *page; /* (ctx), (pages of ctx) */
  int32_t *row;             /* (chunk) */
  float *logits;            /* (chunk, vocab_size) host */
  double *nll;              /* (chunk) */
  struct qtr_threads *team;
  const int32_t *target; /* (rows of the chunk) the tokens that follow */
};

static void score_rows(void *arg, size_t begin, size_t end, int thread) {
  (void)thread;
  const struct run *run = arg;
  size_t vocab = (size_t)run->engine->model->config.vocab_size;
  for (size_t i = begin; i < end; i++) {
    run->nll[i] = negative_log_likelihood(run->logits + i * vocab, vocab, run->target[i]);
  }
}

/* Scores token[1 … ctx); adds to *sum in the order of the tokens, whatever the number of threads. */
static enum qtr_status run_window(struct run *run, const int32_t *token, size_t ctx, double *sum, struct qtr_error *err) {
  struct qtr_model *model = run->engine->model;
  struct qtr_backend *b = model->backend;
  size_t vocab = (size_t)model->config.vocab_size;
  for (size_t first = 0; first + 1 < ctx; first += run->chunk) {
    size_t n = QTR_MIN(run->chunk, ctx - first);
    size_t n_rows = QTR_MIN(n, ctx - 1 - first); /* the last token of a window predicts nothing in it */
    const int32_t q_start[2] = {0, (int32_t)n}, kv_len[1] = {(int32_t)first};
    const struct qtr_batch batch = {.n_tokens = (int32_t)n,
                                    .n_seqs = 1,
                                    .n_logit_rows = (int32_t)n_rows,
                                    .max_blocks = (int32_t)qtr_ceil_div(ctx, QTR_PAGE_TOKENS),
                                    .token = token + first,
                                    .position = run->position + first,
                                    .q_start = q_start,
                                    .kv_len = kv_len,
                                    .block_table = run->page,
                                    .logit_row = run->row};
    const float *logits;
    enum qtr_status status = qtr_model_forward(model, run->engine->kv, run->workspace, &batch, &logits, err);
    if (!status) status = b->ops->download(b, logits, QTR_DTYPE_F32, n_rows * vocab, run->logits, err);
    if (status) return status;
    run->target = token + first + 1;
    qtr_threads_for(run->team, n_rows, 8, score_rows, run);
    for (size_t i = 0; i < n_rows; i++) *sum += run->nll[i];
  }
  return QTR_OK;
}

static enum qtr_status check(const struct qtr_engine *engine, const int32_t *token, size_t n_tokens, size_t ctx,
                             struct qtr_error *err) {
  if (ctx < 2 || ctx > (size_t)engine->max_model_len) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "windows of %zu tokens: this model takes 2 to %d", ctx, engine->max_model_len);
  }
  if (n_tokens < ctx) {
    return qtr_fail(err, QTR_ERR_LIMIT,
                    "the text has %zu tokens, less than one window of %zu: take a longer text or a smaller --ctx", n_tokens,
                    ctx);
  }
  if ((size_t)engine->n_pages < qtr_ceil_div(ctx, QTR_PAGE_TOKENS)) {
    return qtr_fail(err, QTR_ERR_LIMIT, "the KV pool has %d pages; windows of %zu tokens need %zu", engine->n_pages, ctx,
                    qtr_ceil_div(ctx, QTR_PAGE_TOKENS));
  }
  for (size_t i = 0; i < n_tokens; i++) {
    if (token[i] < 0 || token[i] >= engine->model->config.vocab_size) {
      return qtr_fail(err, QTR_ERR_FORMAT, "the tokenizer gives token %d, the model's vocabulary has %d", token[i],
                      engine->model->config.vocab_size);
    }
  }
  return QTR_OK;
}

enum qtr_status qtr_ppl_run(struct qtr_engine *engine, const int32_t *token, size_t n_tokens,
                            const struct qtr_ppl_options *options, struct qtr_ppl_result *result, struct qtr_error *err) {
  size_t ctx = (size_t)QTR_MAX(options->ctx, 0), vocab = (size_t)engine->model->config.vocab_size;
  enum qtr_status status = check(engine, token, n_tokens, ctx, err);
  if (status || ctx < 2) return status;
  double t_start = qtr_now(), sum = 0;
  size_t n_windows = n_tokens / ctx, n_pages = qtr_ceil_div(ctx, QTR_PAGE_TOKENS);
  if (options->max_windows > 0) n_windows = QTR_MIN(n_windows, (size_t)options->max_windows);
  size_t chunk = QTR_MAX(MAX_LOGIT_BYTES / (vocab * sizeof(float)), (size_t)16);
  chunk = QTR_MIN(QTR_MIN(chunk, (size_t)CHUNK_TOKENS), ctx);
  struct run run = {.engine = engine,
                    .chunk = chunk,
                    .position = malloc(ctx * sizeof *run.position),
                    .page = malloc(n_pages * sizeof *run.page),
                    .row = malloc(chunk * sizeof *run.row),
                    .logits = malloc(chunk * vocab * sizeof *run.logits),
                    .nll = malloc(chunk * sizeof *run.nll)};
  struct qtr_progress progress;
  qtr_progress_start(&progress, "perplexity", n_windows, options->quiet);
  if (!run.position || !run.page || !run.row || !run.logits || !run.nll) {
    status = qtr_fail_memory(err, "the logits of a chunk", chunk * vocab * sizeof *run.logits);
    goto done;
  }
  for (size_t i = 0; i < ctx; i++) run.position[i] = (int32_t)i;
  for (size_t i = 0; i < n_pages; i++) run.page[i] = (int32_t)i;
  for (size_t i = 0; i < chunk; i++) run.row[i] = (int32_t)i;
  status = qtr_workspace_create(engine->model, chunk, chunk, &run.workspace, err);
  if (!status) status = qtr_threads_create(engine->threads, &run.team, err);
  for (size_t w = 0; w < n_windows && !status; w++) {
    status = run_window(&run, token + w * ctx, ctx, &sum, err);
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
done:
  qtr_progress_end(&progress);
  qtr_threads_free(run.team);
  qtr_workspace_free(run.workspace);
  free(run.position);
  free(run.page);
  free(run.row);
  free(run.logits);
  free(run.nll);
  return status;
}
