/* compare.c - runs two models over the same windows, chunk by chunk, and compares what they say (compare.h).
 *
 * Hidden states. Quantisers may rotate the residual stream (spec F.3: x becomes x Q with an orthogonal Q, all weights made
 * to fit), and then a - b means nothing although both models compute the same. Whether they did shows in the stream before
 * the first layer: it is the embedding's row, which rounding changes by percents and a rotation or permutation by about
 * sqrt(2). Besides |a - b| / |a| there is a measure that no orthogonal change of basis touches: the angles between the
 * states of neighbouring tokens. */
#include "eval/compare.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/progress.h"
#include "base/status.h"
#include "base/threads.h"
#include "engine/engine_internal.h"
#include "eval/windows.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 32        /* tokens whose angles are compared with each other */
#define BASIS_ERROR 0.5 /* embeddings further apart than that are in different bases */

struct row {
  double kl, nll_a, nll_b;
  struct qtr_compare_place place;
};

/* Sums over a block of rows, of one state. */
struct block {
  double error, ratio, cosine; /* over rows, rows, pairs */
};

struct run {
  struct qtr_windows a, b;
  struct qtr_threads *team;
  struct row *row;          /* (chunk) */
  const int32_t *target;    /* (rows of the chunk) */
  float *state_a, *state_b; /* (chunk, hidden) one state of the chunk */
  struct block *block;      /* (blocks of a chunk) */
  size_t n_rows;
  float *kl;         /* (n_scored) */
  struct block *sum; /* (n_states) */
  size_t n_states, n_pairs;
  double nll_a, nll_b;
  size_t n_same, n_right_a, n_right_b;
};

/* ---- distributions ---- */

static size_t best_of(const float *logits, size_t n) {
  size_t best = 0;
  for (size_t i = 1; i < n; i++) best = logits[i] > logits[best] ? i : best;
  return best;
}

static void compare_rows(void *arg, size_t begin, size_t end, int thread) {
  (void)thread;
  struct run *run = arg;
  size_t vocab = run->a.vocab;
  for (size_t i = begin; i < end; i++) {
    const float *a = run->a.logits + i * vocab, *b = run->b.logits + i * vocab;
    double sum_a = qtr_windows_log_sum(a, vocab), sum_b = qtr_windows_log_sum(b, vocab), kl = 0;
    for (size_t k = 0; k < vocab; k++) {
      double log_a = (double)a[k] - sum_a;
      kl += exp(log_a) * (log_a - ((double)b[k] - sum_b));
    }
    size_t best_a = best_of(a, vocab), best_b = best_of(b, vocab), target = (size_t)run->target[i];
    double nll_a = sum_a - (double)a[target], nll_b = sum_b - (double)b[target];
    run->row[i] = (struct row){
        .kl = kl > 0 || isnan(kl) ? kl : 0, /* rounding may leave a little less than nothing */
        .nll_a = nll_a,
        .nll_b = nll_b,
        .place = {.target = run->target[i],
                  .best_a = (int32_t)best_a,
                  .best_b = (int32_t)best_b,
                  .p_target_a = (float)exp(-nll_a),
                  .p_target_b = (float)exp(-nll_b),
                  .p_best_a = (float)exp((double)a[best_a] - sum_a),
                  .p_best_b = (float)exp((double)b[best_b] - sum_b)},
    };
  }
}

/* Keeps the largest, largest first. */
static void note_place(struct qtr_compare_result *result, const struct qtr_compare_place *place) {
  size_t at = result->n_worst;
  while (at > 0 && result->worst[at - 1].kl < place->kl) at--;
  if (at == QTR_COMPARE_WORST) return;
  if (result->n_worst < QTR_COMPARE_WORST) result->n_worst++;
  for (size_t i = result->n_worst - 1; i > at; i--) result->worst[i] = result->worst[i - 1];
  result->worst[at] = *place;
}

/* ---- hidden states ---- */

static double dot(const float *x, const float *y, size_t n) {
  double sum[4] = {0}; /* four chains, so that one addition need not wait for the last */
  size_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (size_t k = 0; k < 4; k++) sum[k] += (double)x[i + k] * (double)y[i + k];
  }
  for (; i < n; i++) sum[0] += (double)x[i] * (double)y[i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

/* `over` / `under`, where nothing is as far from nothing as it should be. */
static double ratio(double over, double under) { return under > 0 ? over / under : over > 0 ? 1 : 0; }

static void compare_states(void *arg, size_t begin, size_t end, int thread) {
  (void)thread;
  struct run *run = arg;
  size_t dim = run->a.hidden;
  for (size_t k = begin; k < end; k++) {
    size_t first = k * BLOCK, n = QTR_MIN((size_t)BLOCK, run->n_rows - first);
    double norm_a[BLOCK], norm_b[BLOCK];
    struct block sum = {0};
    for (size_t i = 0; i < n; i++) {
      const float *a = run->state_a + (first + i) * dim, *b = run->state_b + (first + i) * dim;
      double apart = 0;
      for (size_t d = 0; d < dim; d++) apart += ((double)a[d] - (double)b[d]) * ((double)a[d] - (double)b[d]);
      norm_a[i] = sqrt(dot(a, a, dim));
      norm_b[i] = sqrt(dot(b, b, dim));
      sum.error += ratio(sqrt(apart), norm_a[i]);
      sum.ratio += norm_a[i] > 0 ? norm_b[i] / norm_a[i] : 1;
      for (size_t j = 0; j < i; j++) {
        double cos_a = ratio(dot(a, run->state_a + (first + j) * dim, dim), norm_a[i] * norm_a[j]);
        double cos_b = ratio(dot(b, run->state_b + (first + j) * dim, dim), norm_b[i] * norm_b[j]);
        sum.cosine += (cos_a - cos_b) * (cos_a - cos_b);
      }
    }
    run->block[k] = sum;
  }
}

static enum qtr_status add_states(struct run *run, size_t n_rows, struct qtr_error *err) {
  size_t n_blocks = qtr_ceil_div(n_rows, BLOCK), last = n_rows % BLOCK;
  run->n_rows = n_rows;
  run->n_pairs += n_rows / BLOCK * (BLOCK * (BLOCK - 1) / 2) + (last > 0 ? last * (last - 1) / 2 : 0);
  for (size_t s = 0; s < run->n_states; s++) {
    enum qtr_status status = qtr_windows_state(&run->a, s, n_rows, run->state_a, err);
    if (!status) status = qtr_windows_state(&run->b, s, n_rows, run->state_b, err);
    if (status) return status;
    qtr_threads_for(run->team, n_blocks, 1, compare_states, run);
    for (size_t k = 0; k < n_blocks; k++) {
      run->sum[s].error += run->block[k].error;
      run->sum[s].ratio += run->block[k].ratio;
      run->sum[s].cosine += run->block[k].cosine;
    }
  }
  return QTR_OK;
}

/* ---- the run ---- */

static enum qtr_status compare_window(struct run *run, const int32_t *token, size_t begin, struct qtr_compare_result *result,
                                      struct qtr_error *err) {
  for (size_t first = 0; first + 1 < run->a.window; first += run->a.chunk) {
    size_t n_rows;
    enum qtr_status status = qtr_windows_forward(&run->a, token + begin, first, &n_rows, err);
    if (!status) status = qtr_windows_forward(&run->b, token + begin, first, &n_rows, err);
    if (status) return status;
    run->target = token + begin + first + 1;
    qtr_threads_for(run->team, n_rows, 4, compare_rows, run);
    for (size_t i = 0; i < n_rows; i++) {
      struct row *row = &run->row[i];
      row->place.index = begin + first + i + 1;
      row->place.kl = row->kl;
      run->kl[result->n_scored++] = (float)row->kl;
      result->kl_mean += row->kl;
      run->nll_a += row->nll_a;
      run->nll_b += row->nll_b;
      run->n_same += row->place.best_a == row->place.best_b;
      run->n_right_a += row->place.best_a == row->place.target;
      run->n_right_b += row->place.best_b == row->place.target;
      note_place(result, &row->place);
    }
    if (run->n_states > 0) status = add_states(run, n_rows, err);
    if (status) return status;
  }
  return QTR_OK;
}

static int by_size(const void *x, const void *y) {
  float a, b;
  memcpy(&a, x, sizeof a);
  memcpy(&b, y, sizeof b);
  return (a > b) - (a < b);
}

/* The value that a share q of all lies at or below, between neighbours linearly. sorted: (n) */
static double quantile(const float *sorted, size_t n, double q) {
  double at = q * (double)(n - 1);
  size_t i = (size_t)at;
  if (i + 1 >= n) return (double)sorted[n - 1];
  return (double)sorted[i] + (at - (double)i) * ((double)sorted[i + 1] - (double)sorted[i]);
}

static enum qtr_status finish(struct run *run, struct qtr_compare_result *result, struct qtr_error *err) {
  size_t n = result->n_scored;
  result->perplexity_a = exp(run->nll_a / (double)n);
  result->perplexity_b = exp(run->nll_b / (double)n);
  if (!isfinite(result->perplexity_a) || !isfinite(result->perplexity_b) || !isfinite(result->kl_mean)) {
    return qtr_fail(err, QTR_ERR_BACKEND, "the logits of model %s are not finite: the weights are damaged or overflow fp16",
                    isfinite(result->perplexity_a) ? "B" : "A");
  }
  qsort(run->kl, n, sizeof *run->kl, by_size);
  result->kl_mean /= (double)n;
  result->kl_median = quantile(run->kl, n, 0.5);
  result->kl_p90 = quantile(run->kl, n, 0.9);
  result->kl_p99 = quantile(run->kl, n, 0.99);
  result->kl_max = result->worst[0].kl;
  result->top1_agreement = (double)run->n_same / (double)n;
  result->top1_accuracy_a = (double)run->n_right_a / (double)n;
  result->top1_accuracy_b = (double)run->n_right_b / (double)n;
  if (run->n_states == 0) return QTR_OK;
  result->same_basis = run->sum[0].error / (double)n < BASIS_ERROR;
  for (size_t s = 0; s < run->n_states; s++) {
    result->layer[s] = (struct qtr_compare_layer){
        .error = result->same_basis ? run->sum[s].error / (double)n : (double)NAN,
        .cosine_error = run->n_pairs > 0 ? sqrt(run->sum[s].cosine / (double)run->n_pairs) : 0,
        .norm_ratio = run->sum[s].ratio / (double)n,
    };
  }
  return QTR_OK;
}

static enum qtr_status make_buffers(struct run *run, struct qtr_compare_result *result, size_t n_scored,
                                    struct qtr_error *err) {
  size_t chunk = run->a.chunk, states = run->n_states > 0 ? chunk * run->a.hidden : 1;
  run->row = malloc(chunk * sizeof *run->row);
  run->kl = malloc(n_scored * sizeof *run->kl);
  run->state_a = malloc(states * sizeof *run->state_a);
  run->state_b = malloc(states * sizeof *run->state_b);
  run->block = malloc(qtr_ceil_div(chunk, BLOCK) * sizeof *run->block);
  run->sum = calloc(run->n_states + 1, sizeof *run->sum);
  if (run->n_states > 0) result->layer = calloc(run->n_states, sizeof *result->layer);
  if (run->row && run->kl && run->state_a && run->state_b && run->block && run->sum && (result->layer || !run->n_states)) {
    return QTR_OK;
  }
  return qtr_fail_memory(err, "a comparison", n_scored * sizeof *run->kl);
}

enum qtr_status qtr_compare_run(struct qtr_engine *a, struct qtr_engine *b, const int32_t *token, size_t n_tokens,
                                const struct qtr_compare_options *options, struct qtr_compare_result *result,
                                struct qtr_error *err) {
  const struct qtr_config *ca = &a->model->config, *cb = &b->model->config;
  double t_start = qtr_now();
  *result = (struct qtr_compare_result){0};
  if (options->n_tokens > 0) n_tokens = QTR_MIN(n_tokens, options->n_tokens);
  size_t window = options->window, n_windows = window > 0 ? n_tokens / window : 0;
  if (ca->vocab_size != cb->vocab_size) {
    return qtr_fail(err, QTR_ERR_ARGUMENT,
                    "the vocabularies have %d and %d tokens: only models with the same tokens can be compared",
                    ca->vocab_size, cb->vocab_size);
  }
  bool layers = options->layers;
  if (ca->n_layers != cb->n_layers || ca->hidden_size != cb->hidden_size) {
    result->no_layers = "the models have different shapes";
    layers = false;
  } else if (!layers) {
    result->no_layers = "not asked for";
  }
  struct run run = {.n_states = layers ? (size_t)ca->n_layers + 1 : 0};
  struct qtr_progress progress;
  qtr_progress_start(&progress, "comparing", n_windows, options->quiet);
  size_t chunk = QTR_MIN(qtr_windows_chunk(a, window, layers), qtr_windows_chunk(b, window, layers));
  enum qtr_status status = qtr_windows_create(a, window, chunk, layers, &run.a, err);
  if (status) {
    (void)qtr_error_prefix(err, "model A");
  } else if ((status = qtr_windows_create(b, window, chunk, layers, &run.b, err))) {
    (void)qtr_error_prefix(err, "model B");
  }
  if (!status && n_windows == 0) {
    status = qtr_fail(err, QTR_ERR_LIMIT, "there are %zu tokens, less than one window of %zu: take more or smaller windows",
                      n_tokens, window);
  }
  if (!status) status = qtr_windows_check(a, token, n_tokens, err);
  if (!status) status = make_buffers(&run, result, n_windows * (window - 1), err);
  if (!status) status = qtr_threads_create(a->threads, &run.team, err);
  for (size_t w = 0; w < n_windows && !status; w++) {
    status = compare_window(&run, token, w * window, result, err);
    qtr_progress_update(&progress, w + 1);
  }
  if (!status) {
    result->n_windows = n_windows;
    result->n_layers = run.n_states > 0 ? run.n_states - 1 : 0;
    result->seconds = qtr_now() - t_start;
    status = finish(&run, result, err);
  }
  qtr_progress_end(&progress);
  qtr_threads_free(run.team);
  qtr_windows_free(&run.a);
  qtr_windows_free(&run.b);
  free(run.row);
  free(run.kl);
  free(run.state_a);
  free(run.state_b);
  free(run.block);
  free(run.sum);
  if (status) qtr_compare_free(result);
  return status;
}

void qtr_compare_free(struct qtr_compare_result *result) {
  free(result->layer);
  result->layer = NULL;
}
