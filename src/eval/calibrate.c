/* calibrate.c - which KV heads are needed to look far back (calibrate.h).
 *
 * Needle prompts are answered by the dense model, greedily; those it answers right are the test, its own answers the truth.
 * Then heads are given up, the least needed first: a round tries each remaining head as a streaming head in addition to
 * those given up before, reads all prompts anew, and keeps the heads that cost the answers the least log-probability. One
 * head at a time would not do: heads stand in for each other, and of two that do the same each alone looks superfluous. With
 * n heads, R rounds and P prompts that is n (R + 1) / 2 * P prompts to read. */
#include "eval/calibrate.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/progress.h"
#include "base/status.h"
#include "checkpoint/heads.h"
#include "engine/engine_internal.h"
#include "eval/niah.h"
#include "eval/windows.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_ANSWER 32 /* tokens */
#define STEP_TOKENS 1024
#define MOST_LOSS 20.0 /* nats an answer: lost is lost, one prompt shall not outweigh the others */

struct prompt {
  int32_t *token; /* (n) prompt and answer; malloc'ed */
  int32_t n, n_prompt;
  char digits[8];
};

struct run {
  struct qtr_engine *engine;
  const struct qtr_haystack *haystack;
  const struct qtr_calibrate_options *options;
  struct qtr_niah_options niah;
  struct prompt *prompt; /* (n_prompts) */
  size_t n_prompts, longest;
  struct qtr_workspace *workspace;
  int32_t chunk;
  int32_t *position, *page, *row; /* (longest), (pages of longest), (MOST_ANSWER) */
  float *logits;                  /* (vocab_size) */
  size_t n_runs;
};

/* ---- prompts and answers ---------------------------------------------------------------------------------- */

static enum qtr_status make(void *user, size_t i, struct qtr_ask_prompt *out, int32_t *max_tokens, struct qtr_error *err) {
  struct run *run = user;
  struct prompt *p = &run->prompt[i];
  const struct qtr_niah_trial trial = {.length = i % run->niah.n_lengths, .depth = i, .number = i};
  enum qtr_status status = qtr_niah_prompt(run->engine, run->haystack, &run->niah, &trial, out, p->digits, err);
  if (status) return status;
  *max_tokens = MOST_ANSWER;
  p->token = malloc((out->n_tokens + MOST_ANSWER) * sizeof *p->token);
  if (!p->token) return qtr_fail_memory(err, "a prompt", out->n_tokens);
  memcpy(p->token, out->token, out->n_tokens * sizeof *p->token);
  p->n = p->n_prompt = (int32_t)out->n_tokens;
  return QTR_OK;
}

/* Keeps the answer up to the end of the number. One without it leaves the prompt without an answer. */
static enum qtr_status take(void *user, size_t i, const struct qtr_ask_answer *answer, struct qtr_error *err) {
  struct run *run = user;
  struct prompt *p = &run->prompt[i];
  const char *found = strstr(answer->text, p->digits);
  int32_t *token = NULL;
  size_t n = 0;
  if (!found) return QTR_OK;
  size_t len = (size_t)(found - answer->text) + strlen(p->digits);
  enum qtr_status status = qtr_engine_tokenize(run->engine, answer->text, len, false, false, &token, &n, err);
  n = QTR_MIN(n, (size_t)MOST_ANSWER);
  if (!status && n > 0) memcpy(p->token + p->n_prompt, token, n * sizeof *token);
  if (!status) p->n = p->n_prompt + (int32_t)n;
  free(token);
  return status;
}

static enum qtr_status ask(struct run *run, struct qtr_error *err) {
  const struct qtr_ask questions = {.n = run->options->n_prompts,
                                    .make = make,
                                    .take = take,
                                    .user = run,
                                    .label = "prompts",
                                    .quiet = run->options->quiet};
  enum qtr_status status = qtr_ask_run(run->engine, &questions, err);
  if (status) return status;
  for (size_t i = 0; i < run->options->n_prompts; i++) { /* those with an answer to the front */
    struct prompt p = run->prompt[i];
    if (p.n == p.n_prompt) continue;
    run->prompt[i] = run->prompt[run->n_prompts];
    run->prompt[run->n_prompts++] = p;
    run->longest = QTR_MAX(run->longest, (size_t)p.n);
  }
  if (run->n_prompts > 0) return QTR_OK;
  return qtr_fail(err, QTR_ERR_UNSUPPORTED,
                  "the model finds the needle in none of %zu prompts, so nothing can be learnt from losing it; try shorter "
                  "--lengths, or take a table of DuoAttention's",
                  run->options->n_prompts);
}

/* ---- the loss under a set of streaming heads -------------------------------------------------------------- */

/* -log p of the prompt's answer, nats. */
static enum qtr_status read_prompt(struct run *run, struct qtr_kv *kv, const struct prompt *p, double *loss,
                                   struct qtr_error *err) {
  struct qtr_model *model = run->engine->model;
  struct qtr_backend *b = model->backend;
  size_t vocab = (size_t)model->config.vocab_size;
  *loss = 0;
  run->n_runs++;
  for (int32_t first = 0; first < p->n - 1; first += run->chunk) {
    int32_t n = QTR_MIN(run->chunk, p->n - 1 - first), n_rows = 0;
    for (int32_t i = QTR_MAX(p->n_prompt - 1 - first, 0); i < n; i++) run->row[n_rows++] = i;
    const int32_t q_start[2] = {0, n};
    const struct qtr_batch batch = {.n_tokens = n,
                                    .n_seqs = 1,
                                    .n_logit_rows = n_rows,
                                    .max_blocks = (int32_t)qtr_ceil_div(run->longest, QTR_PAGE_TOKENS),
                                    .token = p->token + first,
                                    .position = run->position + first,
                                    .q_start = q_start,
                                    .kv_len = &first,
                                    .block_table = run->page,
                                    .logit_row = run->row};
    const float *logits;
    enum qtr_status status = qtr_model_forward(model, kv, run->workspace, &batch, &logits, err);
    for (int32_t i = 0; i < n_rows && !status; i++) {
      status = b->ops->download(b, logits + (size_t)i * vocab, QTR_DTYPE_F32, vocab, run->logits, err);
      if (status) break;
      int32_t target = p->token[first + run->row[i] + 1];
      *loss += qtr_windows_log_sum(run->logits, vocab) - (double)run->logits[target];
    }
    if (status) return status;
  }
  if (!(*loss < MOST_LOSS)) *loss = MOST_LOSS; /* not a number: lost too */
  return QTR_OK;
}

/* Mean over the prompts. streaming: (n_layers, n_kv_heads). */
static enum qtr_status measure(struct run *run, const uint8_t *streaming, double *loss, struct qtr_error *err) {
  struct qtr_engine *e = run->engine;
  const struct qtr_config *c = &e->model->config;
  struct qtr_backend *b = e->model->backend;
  const struct qtr_kv_window window = {run->options->sink, run->options->local};
  const struct qtr_kv_sparse sparse = {.streaming = streaming, .context = window, .decode = window};
  size_t n_heads = (size_t)c->n_layers * (size_t)c->n_kv_heads;
  bool any = memchr(streaming, 1, n_heads) != NULL;
  int32_t n_pages = (int32_t)qtr_ceil_div(run->longest, QTR_PAGE_TOKENS);
  const struct qtr_kv_config config = {.format = b->ops->kv_format(e->kv),
                                       .n_layers = c->n_layers,
                                       .n_kv_heads = c->n_kv_heads,
                                       .head_dim = c->head_dim,
                                       .n_pages = n_pages,
                                       .static_scale = e->model->static_kv_scale,
                                       .sparse = any ? &sparse : NULL,
                                       .n_stream_pages = any ? n_pages : 0};
  struct qtr_kv *kv = NULL;
  enum qtr_status status = b->ops->kv_create(b, &config, &kv, err);
  *loss = 0;
  for (size_t i = 0; i < run->n_prompts && !status; i++) {
    double one;
    status = read_prompt(run, kv, &run->prompt[i], &one, err);
    *loss += one / (double)run->n_prompts;
  }
  if (kv) b->ops->kv_free(b, kv);
  return status;
}

/* ---- giving heads up ---------------------------------------------------------------------------------------- */

struct candidate {
  double loss;
  size_t head;
};

static int by_loss(const void *a, const void *b) {
  const struct candidate *x = a, *y = b;
  if (x->loss != y->loss) return x->loss < y->loss ? -1 : 1;
  return x->head < y->head ? -1 : x->head > y->head;
}

/* Ranks all heads; candidate and streaming are room for them. */
static enum qtr_status rank(struct run *run, struct candidate *candidate, uint8_t *streaming,
                            struct qtr_calibrate_result *result, struct qtr_error *err) {
  size_t n = result->n_heads, n_rounds = (size_t)run->options->rounds, given_up = 0, done = 0, total = 0;
  for (size_t r = 0; r < n_rounds; r++) total += n - n * r / n_rounds;
  struct qtr_progress progress;
  qtr_progress_start(&progress, "heads", total, run->options->quiet);
  enum qtr_status status = measure(run, streaming, &result->dense_loss, err);
  for (size_t r = 0; r < n_rounds && !status; r++) {
    size_t n_candidates = 0, target = n * (r + 1) / n_rounds;
    for (size_t head = 0; head < n && !status; head++) {
      if (streaming[head]) continue;
      streaming[head] = 1;
      candidate[n_candidates] = (struct candidate){.head = head};
      status = measure(run, streaming, &candidate[n_candidates++].loss, err);
      streaming[head] = 0;
      qtr_progress_update(&progress, ++done);
    }
    if (status) break;
    qsort(candidate, n_candidates, sizeof *candidate, by_loss);
    for (size_t i = 0; given_up < target; i++) {
      streaming[candidate[i].head] = 1;
      result->value[candidate[i].head] = n > 1 ? (double)given_up / (double)(n - 1) : 1;
      given_up++;
    }
    double loss;
    status = measure(run, streaming, &loss, err);
    result->round[result->n_rounds++] = (struct qtr_calibrate_round){given_up, loss - result->dense_loss};
  }
  qtr_progress_end(&progress);
  return status;
}

static enum qtr_status check(struct qtr_engine *e, const struct qtr_calibrate_options *o, size_t n_heads,
                             struct qtr_error *err) {
  size_t window = (size_t)o->sink + (size_t)o->local;
  for (size_t i = 0; i < o->n_lengths; i++) {
    if (o->length[i] <= window + 64 || o->length[i] + MOST_ANSWER > (size_t)e->max_model_len) {
      return qtr_fail(
          err, QTR_ERR_ARGUMENT,
          "prompts of %zu tokens: a head that sees %d sink and %d local tokens is told from others by prompts of more than "
          "%zu, and the model takes %d",
          o->length[i], o->sink, o->local, window + 64, e->max_model_len - MOST_ANSWER);
    }
  }
  if (o->rounds < 1 || (size_t)o->rounds > n_heads) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "%d rounds: from 1 to %zu, the KV heads of all layers", o->rounds, n_heads);
  }
  if (e->streams || e->sparse.budget > 0) {
    return qtr_fail(err, QTR_ERR_STATE, "heads are calibrated on a dense engine; leave the options of sparse attention out");
  }
  return QTR_OK;
}

enum qtr_status qtr_calibrate_heads(struct qtr_engine *e, const struct qtr_haystack *haystack,
                                    const struct qtr_calibrate_options *o, struct qtr_calibrate_result *result,
                                    struct qtr_error *err) {
  const struct qtr_config *c = &e->model->config;
  size_t n_heads = (size_t)c->n_layers * (size_t)c->n_kv_heads;
  double t_start = qtr_now();
  *result = (struct qtr_calibrate_result){.n_heads = n_heads};
  enum qtr_status status = check(e, o, n_heads, err);
  if (status) return status;
  struct run run = {
      .engine = e, .haystack = haystack, .options = o, .chunk = QTR_MIN(e->max_num_batched_tokens, STEP_TOKENS)};
  struct candidate *candidate = calloc(n_heads, sizeof *candidate);
  uint8_t *streaming = calloc(n_heads, 1);
  double *depth = calloc(o->n_prompts, sizeof *depth);
  run.prompt = calloc(o->n_prompts, sizeof *run.prompt);
  result->value = calloc(n_heads, sizeof *result->value);
  result->round = calloc((size_t)o->rounds, sizeof *result->round);
  if (!candidate || !streaming || !depth || !run.prompt || !result->value || !result->round) {
    status = qtr_fail_memory(err, "calibration prompts", o->n_prompts);
    goto done;
  }
  /* Needles lie where a streaming head does not look, however the depths fall: 20 % to 60 % of the text. */
  for (size_t i = 0; i < o->n_prompts; i++) depth[i] = 0.2 + 0.4 * ((double)i + 0.5) / (double)o->n_prompts;
  run.niah = (struct qtr_niah_options){.length = o->length,
                                       .depth = depth,
                                       .n_lengths = o->n_lengths,
                                       .n_depths = o->n_prompts,
                                       .n_needles = o->n_prompts,
                                       .needle = QTR_NEEDLE_MIXED,
                                       .style = qtr_ask_style_of(e, QTR_ASK_AUTO),
                                       .seed = o->seed};
  status = ask(&run, err);
  if (status) goto done;
  size_t n_pages = qtr_ceil_div(run.longest, QTR_PAGE_TOKENS);
  run.position = malloc(run.longest * sizeof *run.position);
  run.page = malloc(n_pages * sizeof *run.page);
  run.row = malloc((size_t)MOST_ANSWER * sizeof *run.row);
  run.logits = malloc((size_t)c->vocab_size * sizeof *run.logits);
  if (!run.position || !run.page || !run.row || !run.logits) {
    status = qtr_fail_memory(err, "logits", (size_t)c->vocab_size * sizeof *run.logits);
    goto done;
  }
  for (size_t i = 0; i < run.longest; i++) run.position[i] = (int32_t)i;
  for (size_t i = 0; i < n_pages; i++) run.page[i] = (int32_t)i;
  status = qtr_workspace_create(e->model, (size_t)run.chunk, MOST_ANSWER, &run.workspace, err);
  if (!status) status = rank(&run, candidate, streaming, result, err);
  result->n_prompts = run.n_prompts;
  result->n_runs = run.n_runs;
  result->seconds = qtr_now() - t_start;
done:
  qtr_workspace_free(run.workspace);
  for (size_t i = 0; run.prompt && i < o->n_prompts; i++) free(run.prompt[i].token);
  free(run.prompt);
  free(run.position);
  free(run.page);
  free(run.row);
  free(run.logits);
  free(candidate);
  free(streaming);
  free(depth);
  if (status) qtr_calibrate_free(result);
  return status;
}

void qtr_calibrate_free(struct qtr_calibrate_result *result) {
  free(result->value);
  free(result->round);
  *result = (struct qtr_calibrate_result){0};
}

enum qtr_status qtr_calibrate_table(const struct qtr_calibrate_result *result, size_t n_layers, char **text,
                                    struct qtr_error *err) {
  enum { WIDTH = 32 }; /* bytes of a value and what follows it */
  size_t n_kv_heads = result->n_heads / n_layers, at = 0, size = result->n_heads * WIDTH + 1;
  *text = malloc(size);
  if (!*text) return qtr_fail_memory(err, "the table of heads", size);
  for (size_t i = 0; i < result->n_heads; i++) {
    int n =
        snprintf(*text + at, size - at, "%.*e%c", QTR_HEADS_DIGITS, result->value[i], (i + 1) % n_kv_heads ? '\t' : '\n');
    at += n > 0 ? (size_t)n : 0;
  }
  return QTR_OK;
}
