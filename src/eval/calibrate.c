/* calibrate.c - which KV heads are needed to look far back (calibrate.h).
 *
 * Needle prompts are answered by the dense model, greedily; those it answers right are the test, its own answers and its
 * distributions over them and over the text the truth. Then heads are given up, the least needed first: a round tries each
 * remaining head as a streaming head in addition to those given up before, reads all prompts anew, and keeps the heads that
 * cost the least. One head at a time would not do: heads stand in for each other, and of two that do the same each alone
 * looks superfluous. With n heads, R rounds and P prompts that is some n (R + 1) / 2 * P prompts to read. */
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
#define MOST_COST 20.0                      /* nats an answer, or a token of the text */
#define MOST_TEXT 4096                      /* tokens of the text that are looked at, of all prompts */
#define MOST_TEXT_BYTES ((size_t)256 << 20) /* of the dense model's distributions there */

struct prompt {
  int32_t *token; /* (n) prompt and answer; malloc'ed */
  int32_t n, n_prompt;
  char digits[8];
  size_t dense; /* the first row of run.dense that is this prompt's */
};

struct run {
  struct qtr_engine *engine;
  const struct qtr_haystack *haystack;
  const struct qtr_calibrate_options *options;
  struct qtr_niah_options niah;
  struct prompt *prompt; /* (n_prompts) */
  size_t n_prompts, longest;
  struct qtr_workspace *workspace;
  int32_t chunk, window, stride;  /* the text's rows: every stride-th token from the window's length on */
  int32_t most_rows;              /* of a chunk */
  int32_t *position, *page, *row; /* (longest), (pages of longest), (most_rows) */
  float *logits;                  /* (most_rows, vocab_size) */
  float *dense;                   /* (n_dense, vocab_size) the dense model's probabilities, prompt by prompt */
  double *entropy, *loss;         /* (n_dense) of them, nats; -log p of the token that comes */
  size_t n_dense, n_text;         /* rows of all prompts; those of the text */
  bool known;                     /* dense, entropy and loss are there */
  struct qtr_text *written;       /* (n_prompts asked) what the model wrote */
  size_t n_runs;
};

/* ---- text ------------------------------------------------------------------------------------------------- */

static size_t length_of(const struct run *run, size_t i) { return run->options->length[i % run->options->n_lengths]; }

/* The model begins with nothing, or where nothing cannot be a prompt with an empty line. */
static enum qtr_status begin(void *user, size_t i, struct qtr_ask_prompt *out, int32_t *max_tokens, struct qtr_error *err) {
  struct run *run = user;
  *max_tokens = (int32_t)(length_of(run, i) / 2);
  enum qtr_status status = qtr_engine_tokenize(run->engine, "", 0, true, false, &out->token, &out->n_tokens, err);
  if (status || out->n_tokens > 0) return status;
  free(out->token);
  return qtr_engine_tokenize(run->engine, "\n", 1, true, false, &out->token, &out->n_tokens, err);
}

static enum qtr_status keep(void *user, size_t i, const struct qtr_ask_answer *answer, struct qtr_error *err) {
  struct qtr_text *text = &((struct run *)user)->written[i];
  enum qtr_status status = qtr_text_append(text, answer->text, answer->len, err);
  for (size_t k = 0; k < text->len; k++) text->data[k] = text->data[k] ? text->data[k] : ' ';
  return status ? status : qtr_text_append(text, "\n\n", 2, err);
}

/* The haystack that is given as NULL. */
static enum qtr_status write_haystack(struct run *run, struct qtr_haystack *haystack, struct qtr_error *err) {
  size_t n = run->options->n_prompts;
  const struct qtr_ask texts = {.n = n,
                                .make = begin,
                                .take = keep,
                                .user = run,
                                .temperature = 1,
                                .seed = run->options->seed,
                                .label = "text",
                                .quiet = run->options->quiet};
  struct qtr_text all = {0};
  run->written = calloc(n, sizeof *run->written);
  enum qtr_status status =
      run->written ? qtr_ask_run(run->engine, &texts, err) : qtr_fail_memory(err, "texts", n * sizeof *run->written);
  for (size_t i = 0; i < n && !status; i++) status = qtr_text_append(&all, run->written[i].data, run->written[i].len, err);
  for (size_t i = 0; run->written && i < n; i++) qtr_text_free(&run->written[i]);
  free(run->written);
  if (!status) { /* takes the text over; two bytes of room: the last empty line */
    status = qtr_haystack_create(run->engine, all.data, all.len - 2, haystack, err);
    return status ? qtr_error_prefix(err, "the model writes nothing; give it a text (--haystack)") : QTR_OK;
  }
  qtr_text_free(&all);
  return status;
}

/* Sentences of about n_tokens, from i/n of the haystack on; borrowed from it. */
static struct qtr_haystack piece(const struct qtr_haystack *h, size_t i, size_t n, size_t n_tokens) {
  size_t first = i * h->n_sentences / n;
  struct qtr_haystack out = {.text = h->text, .len = h->len, .sentence = h->sentence + first};
  while (first + out.n_sentences < h->n_sentences && (out.n_sentences == 0 || out.n_tokens < n_tokens))
    out.n_tokens += (size_t)out.sentence[out.n_sentences++].n_tokens;
  return out;
}

/* ---- prompts and answers ---------------------------------------------------------------------------------- */

static enum qtr_status make(void *user, size_t i, struct qtr_ask_prompt *out, int32_t *max_tokens, struct qtr_error *err) {
  struct run *run = user;
  struct prompt *p = &run->prompt[i];
  const struct qtr_niah_trial trial = {.length = i % run->niah.n_lengths, .depth = i, .number = i};
  const struct qtr_haystack text = piece(run->haystack, i, run->options->n_prompts, length_of(run, i) / 2);
  enum qtr_status status = qtr_niah_prompt(run->engine, &text, &run->niah, &trial, out, p->digits, err);
  if (status) return status;
  *max_tokens = MOST_ANSWER;
  p->token = malloc((out->n_tokens + MOST_ANSWER) * sizeof *p->token);
  if (!p->token) return qtr_fail_memory(err, "a prompt", out->n_tokens);
  memcpy(p->token, out->token, out->n_tokens * sizeof *p->token);
  p->n = p->n_prompt = (int32_t)out->n_tokens;
  return QTR_OK;
}

/* Keeps the answer up to the end of the number. One without it, or a prompt that its text could not fill beyond a window,
 * leaves the prompt without an answer. */
static enum qtr_status take(void *user, size_t i, const struct qtr_ask_answer *answer, struct qtr_error *err) {
  struct run *run = user;
  struct prompt *p = &run->prompt[i];
  const char *found = strstr(answer->text, p->digits);
  int32_t *token = NULL;
  size_t n = 0;
  if (!found || p->n_prompt <= run->window) return QTR_OK;
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
                  "--lengths or another --haystack, or take a table of DuoAttention's",
                  run->options->n_prompts);
}

/* ---- the cost of a set of streaming heads ----------------------------------------------------------------- */

/* Rows of a prompt whose distributions are compared: of the text from the window on, then those of the answer. */
static bool is_row(const struct run *run, const struct prompt *p, int32_t position) {
  if (position >= p->n_prompt - 1) return true;
  return position >= run->window && (position - run->window) % run->stride == 0;
}

/* Every how many tokens the text is looked at, and room for what is seen there. */
static enum qtr_status size_rows(struct run *run, struct qtr_error *err) {
  size_t vocab = (size_t)run->engine->model->config.vocab_size, n_text = 0;
  size_t most = QTR_MIN((size_t)MOST_TEXT, MOST_TEXT_BYTES / (vocab * sizeof *run->dense));
  for (size_t i = 0; i < run->n_prompts; i++) n_text += (size_t)(run->prompt[i].n_prompt - 1 - run->window);
  run->stride = (int32_t)QTR_MIN(qtr_ceil_div(n_text, QTR_MAX(most, (size_t)1)), (size_t)INT32_MAX);
  run->stride = QTR_MAX(run->stride, 1);
  for (size_t i = 0; i < run->n_prompts; i++) {
    struct prompt *p = &run->prompt[i];
    p->dense = run->n_dense;
    for (int32_t first = 0; first < p->n - 1; first += run->chunk) {
      int32_t n_rows = 0;
      for (int32_t k = first; k < QTR_MIN(first + run->chunk, p->n - 1); k++) {
        n_rows += is_row(run, p, k);
        run->n_text += is_row(run, p, k) && k < p->n_prompt - 1;
      }
      run->n_dense += (size_t)n_rows;
      run->most_rows = QTR_MAX(run->most_rows, n_rows);
    }
  }
  size_t n_bytes, n_pages = qtr_ceil_div(run->longest, QTR_PAGE_TOKENS);
  run->position = malloc(run->longest * sizeof *run->position);
  run->page = malloc(n_pages * sizeof *run->page);
  run->row = malloc((size_t)run->most_rows * sizeof *run->row);
  run->logits = malloc((size_t)run->most_rows * vocab * sizeof *run->logits);
  run->entropy = malloc(run->n_dense * sizeof *run->entropy);
  run->loss = malloc(run->n_dense * sizeof *run->loss);
  bool fits = !qtr_mul_overflow(run->n_dense, vocab * sizeof *run->dense, &n_bytes);
  run->dense = fits ? malloc(n_bytes) : NULL;
  if (!run->position || !run->page || !run->row || !run->logits || !run->entropy || !run->loss || !run->dense) {
    return qtr_fail_memory(err, "the distributions of the next token", fits ? n_bytes : SIZE_MAX);
  }
  for (size_t i = 0; i < run->longest; i++) run->position[i] = (int32_t)i;
  for (size_t i = 0; i < n_pages; i++) run->page[i] = (int32_t)i;
  return QTR_OK;
}

/* What the dense model says there. logits: (vocab); next: the token that comes. */
static void remember(struct run *run, size_t at, const float *logits, int32_t next) {
  size_t vocab = (size_t)run->engine->model->config.vocab_size;
  double log_sum = qtr_windows_log_sum(logits, vocab), entropy = 0;
  float *p = run->dense + at * vocab;
  for (size_t v = 0; v < vocab; v++) {
    double log_p = (double)logits[v] - log_sum, x = exp(log_p);
    p[v] = (float)x;
    if (x > 0) entropy -= x * log_p;
  }
  run->entropy[at] = entropy;
  run->loss[at] = log_sum - (double)logits[next];
}

/* *kl: KL(p || q), p the dense model's, q that of the logits: (vocab); *loss: -log q of the token that comes, above that of
 * the dense model. What is no number is lost. */
static void compare(const struct run *run, size_t at, const float *logits, int32_t next, double *kl, double *loss) {
  size_t vocab = (size_t)run->engine->model->config.vocab_size;
  const float *p = run->dense + at * vocab;
  double log_sum = qtr_windows_log_sum(logits, vocab), cross = log_sum; /* - sum of p log q, p's sum being 1 */
  for (size_t v = 0; v < vocab; v++) cross -= (double)p[v] * (double)logits[v];
  *kl = cross - run->entropy[at];
  *kl = *kl < MOST_COST ? QTR_MAX(*kl, 0.0) : MOST_COST; /* by its error it can be below 0 */
  *loss = log_sum - (double)logits[next] - run->loss[at];
  if (!(*loss < MOST_COST)) *loss = MOST_COST;
}

/* Adds what the prompt says of the streaming heads of kv; the first time it is dense, and what it says is kept. */
static enum qtr_status read_prompt(struct run *run, struct qtr_kv *kv, const struct prompt *p,
                                   struct qtr_calibrate_cost *cost, struct qtr_error *err) {
  struct qtr_model *model = run->engine->model;
  struct qtr_backend *b = model->backend;
  size_t vocab = (size_t)model->config.vocab_size, at = p->dense;
  double answer = 0;
  run->n_runs++;
  for (int32_t first = 0; first < p->n - 1; first += run->chunk) {
    int32_t n = QTR_MIN(run->chunk, p->n - 1 - first), n_rows = 0;
    for (int32_t i = 0; i < n; i++)
      if (is_row(run, p, first + i)) run->row[n_rows++] = i;
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
    if (!status && n_rows > 0) status = b->ops->download(b, logits, QTR_DTYPE_F32, (size_t)n_rows * vocab, run->logits, err);
    if (status) return status;
    for (int32_t i = 0; i < n_rows; i++, at++) {
      const float *row = run->logits + (size_t)i * vocab;
      int32_t position = first + run->row[i], next = p->token[position + 1];
      if (!run->known) {
        remember(run, at, row, next);
        continue;
      }
      double kl, loss;
      compare(run, at, row, next, &kl, &loss);
      if (position < p->n_prompt - 1) {
        cost->text += (kl + loss) / 2 / (double)run->n_text;
      } else {
        answer += kl;
      }
    }
  }
  cost->answer += QTR_MIN(answer, MOST_COST) / (double)run->n_prompts;
  return QTR_OK;
}

/* streaming: (n_layers, n_kv_heads). */
static enum qtr_status measure(struct run *run, const uint8_t *streaming, struct qtr_calibrate_cost *cost,
                               struct qtr_error *err) {
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
  *cost = (struct qtr_calibrate_cost){0};
  for (size_t i = 0; i < run->n_prompts && !status; i++) status = read_prompt(run, kv, &run->prompt[i], cost, err);
  if (kv) b->ops->kv_free(b, kv);
  return status;
}

/* ---- giving heads up ---------------------------------------------------------------------------------------- */

struct candidate {
  double cost;
  size_t head;
};

static int by_cost(const void *a, const void *b) {
  const struct candidate *x = a, *y = b;
  if (x->cost != y->cost) return x->cost < y->cost ? -1 : 1;
  return x->head < y->head ? -1 : x->head > y->head;
}

/* Ranks all heads; candidate and streaming are room for them. */
static enum qtr_status rank(struct run *run, struct candidate *candidate, uint8_t *streaming,
                            struct qtr_calibrate_result *result, struct qtr_error *err) {
  size_t n = result->n_heads, n_rounds = (size_t)run->options->rounds, given_up = 0, done = 0, total = 0;
  for (size_t r = 0; r < n_rounds; r++) total += n - n * r / n_rounds;
  struct qtr_progress progress;
  qtr_progress_start(&progress, "heads", total, run->options->quiet);
  struct qtr_calibrate_cost cost;
  enum qtr_status status = measure(run, streaming, &cost, err); /* dense: the truth */
  run->known = true;
  for (size_t r = 0; r < n_rounds && !status; r++) {
    size_t n_candidates = 0, target = n * (r + 1) / n_rounds;
    for (size_t head = 0; head < n && !status; head++) {
      if (streaming[head]) continue;
      streaming[head] = 1;
      status = measure(run, streaming, &cost, err);
      candidate[n_candidates++] = (struct candidate){cost.answer + cost.text, head};
      streaming[head] = 0;
      qtr_progress_update(&progress, ++done);
    }
    if (status) break;
    qsort(candidate, n_candidates, sizeof *candidate, by_cost);
    for (size_t i = 0; given_up < target; i++) {
      streaming[candidate[i].head] = 1;
      result->value[candidate[i].head] = n > 1 ? (double)given_up / (double)(n - 1) : 1;
      given_up++;
    }
    status = measure(run, streaming, &cost, err);
    result->round[result->n_rounds++] = (struct qtr_calibrate_round){given_up, cost};
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
  struct run run = {.engine = e,
                    .haystack = haystack,
                    .options = o,
                    .chunk = QTR_MIN(e->max_num_batched_tokens, STEP_TOKENS),
                    .window = o->sink + o->local};
  struct qtr_haystack written = {0};
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
  if (!haystack) {
    status = write_haystack(&run, &written, err);
    run.haystack = &written;
  }
  if (!status) status = ask(&run, err);
  if (!status) status = size_rows(&run, err);
  if (!status) status = qtr_workspace_create(e->model, (size_t)run.chunk, (size_t)run.most_rows, &run.workspace, err);
  if (!status) status = rank(&run, candidate, streaming, result, err);
  result->n_prompts = run.n_prompts;
  result->n_text = run.n_text;
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
  free(run.dense);
  free(run.entropy);
  free(run.loss);
  qtr_haystack_free(&written);
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
