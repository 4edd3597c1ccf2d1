/* engine.c - the public interface of a running engine (quattuor.h): requests in, steps, events out, text. Opening is
 * open.c's, the choice of tokens scheduler.c's. The mutex is held for bookkeeping only; the model, the sampler, the
 * tokenizer and templates run without it. */
#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"
#include "engine/engine_internal.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

void qtr_request_options_init(struct qtr_request_options *options) {
  *options = (struct qtr_request_options){.logprobs = -1,
                                          .sampling = {.temperature = 1, .top_k = -1, .top_p = 1, .repetition_penalty = 1}};
}

/* ---- requests ------------------------------------------------------------------------------------ */

enum qtr_status qtr_engine_add(struct qtr_engine *e, const struct qtr_request_options *o, uint64_t *id,
                               struct qtr_error *err) {
  *id = 0;
  struct qtr_request *r = NULL;
  int32_t *encoded = NULL;
  const int32_t *prompt = o->prompt_token;
  size_t n_prompt = o->n_prompt_token;
  enum qtr_status status = QTR_OK;
  if (o->prompt) {
    status = qtr_engine_tokenize(e, o->prompt, o->prompt_len, !o->no_bos, o->parse_special, &encoded, &n_prompt, err);
    prompt = encoded;
  } else if (!prompt && n_prompt > 0) {
    status = qtr_fail(err, QTR_ERR_ARGUMENT, "prompt and prompt_token are both NULL");
  }
  if (!status) status = qtr_request_create(e, o, prompt, n_prompt, &r, err);
  free(encoded);
  if (status) return status;

  pthread_mutex_lock(&e->mutex);
  if (e->dead) status = qtr_fail(err, QTR_ERR_BACKEND, "%s", e->death.message);
  for (int32_t i = 0; !status && i < r->n_sequences; i++) {
    r->sequence[i].final = qtr_event_take(&e->events);
    if (!r->sequence[i].final) status = qtr_fail_memory(err, "the events of a request", sizeof(struct qtr_event_node));
  }
  if (!status) {
    *id = r->id = e->next_id++;
    struct qtr_request **slot = &e->by_id[r->id % QTR_ID_SLOTS];
    r->next = *slot;
    *slot = r;
    qtr_scheduler_add(e, r);
  } else {
    for (int32_t i = 0; i < r->n_sequences; i++) qtr_event_recycle(&e->events, r->sequence[i].final);
    qtr_request_free(r);
  }
  pthread_mutex_unlock(&e->mutex);
  return status;
}

enum qtr_status qtr_engine_cancel(struct qtr_engine *e, uint64_t id, struct qtr_error *err) {
  enum qtr_status status = QTR_OK;
  pthread_mutex_lock(&e->mutex);
  struct qtr_request *r = e->by_id[id % QTR_ID_SLOTS];
  while (r && r->id != id) r = r->next;
  if (!r || r->cancelled) {
    status = qtr_fail(err, QTR_ERR_NOT_FOUND, "no request %llu runs or waits; it may have ended", (unsigned long long)id);
  } else if (e->stepping) { /* the model may be at it: the step ends it before it returns */
    r->cancelled = true;
    r->next_cancelled = e->cancelled;
    e->cancelled = r;
  } else {
    qtr_scheduler_end(e, r, QTR_FINISH_CANCELLED);
  }
  pthread_mutex_unlock(&e->mutex);
  return status;
}

/* ---- the step ------------------------------------------------------------------------------------ */

/* Plans a pass, with an event for each row before the model works on it, so that no result can be lost for want of memory.
 * False: there is no memory for these. Under the mutex. */
static bool prepare(struct qtr_engine *e, struct qtr_pass *pass) {
  qtr_scheduler_plan(e, pass);
  for (int32_t i = 0; i < pass->batch.n_logit_rows; i++) {
    pass->row_node[i] = qtr_event_take(&e->events);
    if (pass->row_node[i]) continue;
    while (i-- > 0) {
      qtr_event_recycle(&e->events, pass->row_node[i]);
      pass->row_node[i] = NULL;
    }
    return false;
  }
  return true;
}

static struct qtr_sample_args sample_args(const struct qtr_sequence *s) {
  const struct qtr_request *r = s->request;
  size_t n_prompt = (size_t)r->n_prompt, n_output = (size_t)qtr_sequence_known(s) - n_prompt;
  return (struct qtr_sample_args){.sampling = &r->sampling,
                                  .prompt = s->token,
                                  .n_prompt = n_prompt,
                                  .output = s->token + n_prompt,
                                  .n_output = n_output,
                                  .bias = r->bias,
                                  .n_bias = r->n_bias,
                                  .seed = s->seed,
                                  .position = n_output,
                                  .n_top = r->logprobs};
}

/* Is a row's choice the device's, so that the next step needs none of the host? */
static bool row_open(const struct qtr_engine *e, const struct qtr_choose_row *row) {
  if (row->skip) return false;
  if (qtr_choose_sure(row)) return true;
  /* Going back over a token would leave traces in the statistics of pages, and needs what a window has passed by. */
  return row->top_k <= QTR_CHOOSE_SURE_TOP_K && !(e->streams || e->sparse.budget > 0);
}

/* What the device needs to know to sample a row. */
static struct qtr_choose_row choose_row(struct qtr_engine *e, struct qtr_pass *pass, const struct qtr_sequence *s,
                                        int32_t target) {
  const struct qtr_request *r = s->request;
  const struct qtr_sampling *p = &r->sampling;
  struct qtr_choose_row row = {.temperature = p->temperature,
                               .top_p = p->top_p,
                               .min_p = p->min_p,
                               .top_k = p->top_k,
                               .n_top = r->logprobs,
                               .repetition_penalty = p->repetition_penalty,
                               .presence_penalty = p->presence_penalty,
                               .frequency_penalty = p->frequency_penalty,
                               .seed = s->seed,
                               .position = (uint64_t)(s->n_tokens - r->n_prompt)};
  row.skip = s->look || r->constraint.mask != NULL; /* its tokens are known here only, when the logits are there */
  if (target > 0) row.skip = 1;                     /* nothing is drawn from it */
  if (row.skip || (r->n_bias == 0 && !qtr_sampling_has_penalties(p))) return row;
  size_t most = QTR_MIN((size_t)s->n_tokens + r->n_bias, (size_t)e->vocab_size), need = pass->n_adjust + most;
  if (need > pass->adjust_capacity) {
    struct qtr_choose_adjust *more = realloc(pass->adjust, 2 * need * sizeof *more);
    if (!more) {
      row.skip = 1; /* the host's sampler needs no such list */
      return row;
    }
    pass->adjust = more;
    pass->adjust_capacity = 2 * need;
  }
  const struct qtr_sample_args args = sample_args(s);
  row.pending = s->n_pending > 0 && qtr_sampling_has_penalties(p);
  row.first_adjust = (int32_t)pass->n_adjust;
  row.n_adjust = (int32_t)qtr_sampler_adjustments(e->sampler, &args, pass->adjust + pass->n_adjust, most);
  pass->n_adjust += (size_t)row.n_adjust;
  return row;
}

/* The device's choice as the sampler would have given it. */
static void take_choice(const struct qtr_choose_result *c, int32_t n_top, struct qtr_sample_result *result) {
  *result = (struct qtr_sample_result){.token = c->token};
  if (c->token < 0 || n_top < 0) return;
  double log_sum = (double)c->best + log(c->exp_sum);
  result->logprob = (float)((double)c->logit - log_sum);
  result->n_top = c->n_top;
  for (int32_t i = 0; i < c->n_top; i++) {
    result->top[i] = (struct qtr_token_logprob){c->top_token[i], (float)((double)c->top_logit[i] - log_sum)};
  }
}

/* Asks the request's constraint, if there is one, what may come next. False: nothing may. */
static bool constrain(struct qtr_engine *e, struct qtr_sequence *s, const uint32_t **allowed) {
  const struct qtr_constraint *c = &s->request->constraint;
  *allowed = NULL;
  if (!c->mask) return true;
  if (!s->constraint) s->constraint = c->start(c->user);
  if (!s->constraint || !c->mask(s->constraint, e->allowed)) return false;
  *allowed = e->allowed;
  return true;
}

static enum qtr_status sample_row(struct qtr_engine *e, const struct qtr_pass *pass, int32_t i,
                                  struct qtr_sample_result *result, struct qtr_error *err) {
  struct qtr_backend *b = e->model->backend;
  size_t vocab = (size_t)e->vocab_size;
  const float *logits = qtr_workspace_logits(e->workspace);
  const struct qtr_sequence *s = pass->row_seq[i];
  const uint32_t *allowed = NULL;
  if (pass->row_target[i] == 0 && !constrain(e, pass->row_seq[i], &allowed)) {
    *result = (struct qtr_sample_result){.token = -1};
    return QTR_OK;
  }
  enum qtr_status status = b->ops->download(b, logits + (size_t)i * vocab, QTR_DTYPE_F32, vocab, e->row_logits, err);
  if (status) return status;
  if (pass->row_target[i] > 0) {
    qtr_sampler_score(e->sampler, e->row_logits, s->token[pass->row_target[i]], s->request->logprobs, result);
    return QTR_OK;
  }
  struct qtr_sample_args args = sample_args(s);
  args.logits = e->row_logits;
  args.allowed = allowed;
  qtr_sample(e->sampler, &args, result);
  return QTR_OK;
}

/* Launches the batch; with it, where the device can, the choice of a token for each row. Without the mutex. */
static enum qtr_status launch(struct qtr_engine *e, struct qtr_pass *pass, struct qtr_error *err) {
  const struct qtr_backend_ops *ops = e->model->backend->ops;
  pass->open = e->ahead;
  if (ops->choose) {
    pass->n_adjust = 0;
    for (int32_t i = 0; i < pass->batch.n_logit_rows; i++) {
      pass->choose[i] = choose_row(e, pass, pass->row_seq[i], pass->row_target[i]);
      pass->open = pass->open && row_open(e, &pass->choose[i]);
    }
    pass->batch.choose = pass->choose;
    pass->batch.chosen = pass->chosen;
    pass->batch.adjust = pass->adjust;
    pass->batch.n_adjust = (int32_t)pass->n_adjust;
  }
  return qtr_model_launch(e->model, e->kv, e->workspace, &pass->batch, err);
}

/* Waits for a pass and takes its tokens. behind: another one was launched behind it, so its logits are gone. Without the
 * mutex. */
static enum qtr_status collect(struct qtr_engine *e, struct qtr_pass *pass, bool behind, double *model_seconds,
                               struct qtr_error *err) {
  double start = qtr_now();
  enum qtr_status status = qtr_model_collect(e->model, e->workspace, err);
  *model_seconds += qtr_now() - start;
  for (int32_t i = 0; !status && i < pass->batch.n_logit_rows; i++) {
    struct qtr_sequence *s = pass->row_seq[i];
    struct qtr_sample_result result;
    if (!s) continue;
    if (pass->batch.choose && pass->chosen[i].token != QTR_CHOOSE_UNDECIDED) {
      take_choice(&pass->chosen[i], s->request->logprobs, &result);
    } else if (behind) {
      pass->row_target[i] = QTR_ROW_LOST;
      continue;
    } else {
      status = sample_row(e, pass, i, &result, err);
    }
    if (status) break;
    if (pass->row_target[i] > 0)
      qtr_sequence_score(s, pass->row_target[i], &result, pass->row_node[i]);
    else
      qtr_sequence_accept(e, s, &result, pass->row_node[i]);
  }
  return status;
}

/* The device is lost: every request ends with an error. */
static void die(struct qtr_engine *e, const struct qtr_error *why) {
  e->dead = true;
  e->death = *why;
  e->cancelled = NULL;
  for (struct qtr_pass *pass = e->pass; pass < e->pass + QTR_STEPS_UNDER_WAY; pass++) {
    pass->launched = false;
    for (int32_t i = 0; i < pass->batch.n_logit_rows; i++) {
      qtr_event_recycle(&e->events, pass->row_node[i]);
      pass->row_node[i] = NULL;
    }
  }
  for (size_t slot = 0; slot < QTR_ID_SLOTS; slot++) {
    while (e->by_id[slot]) qtr_scheduler_end(e, e->by_id[slot], QTR_FINISH_ERROR);
  }
}

/* Under the mutex, which is given away while the host prepares and the device is told: `stepping` is set. */
static enum qtr_status launch_planned(struct qtr_engine *e, struct qtr_pass *pass, double *model_seconds,
                                      struct qtr_error *err) {
  pthread_mutex_unlock(&e->mutex);
  double start = qtr_now();
  enum qtr_status status = launch(e, pass, err);
  *model_seconds += qtr_now() - start;
  pthread_mutex_lock(&e->mutex);
  if (!status) qtr_scheduler_launched(e, pass);
  return status;
}

/* The pass behind `now`, planned and launched; NULL: there is nothing to do yet, or what to do depends on the results. */
static enum qtr_status go_ahead(struct qtr_engine *e, const struct qtr_pass *now, struct qtr_pass **behind,
                                double *model_seconds, struct qtr_error *err) {
  struct qtr_pass *pass = &e->pass[now == &e->pass[0]];
  *behind = NULL;
  if (!now->open || e->model->profile || e->model->tap) return QTR_OK; /* these look at one step at a time */
  if (!prepare(e, pass) || pass->batch.n_tokens == 0) return QTR_OK;
  *behind = pass;
  return launch_planned(e, pass, model_seconds, err);
}

enum qtr_status qtr_engine_step(struct qtr_engine *e, bool *has_work, struct qtr_error *err) {
  enum qtr_status status = QTR_OK;
  double start = qtr_now(), model_seconds = 0;
  struct qtr_error why = {0};
  *has_work = false;
  pthread_mutex_lock(&e->mutex);
  if (e->stepping) {
    *has_work = true;
    status = qtr_fail(err, QTR_ERR_STATE, "another thread is stepping this engine");
    goto done;
  }
  if (e->dead) {
    status = qtr_fail(err, QTR_ERR_BACKEND, "%s", e->death.message);
    goto done;
  }
  struct qtr_pass *pass = e->pass[1].launched ? &e->pass[1] : &e->pass[0], *behind = NULL;
  if (!pass->launched) {
    bool prepared = prepare(e, pass);
    if (pass->batch.n_tokens == 0) {
      *has_work = e->n_running + e->n_waiting > 0;
      if (*has_work) { /* cannot be: the first in order always fits */
        (void)qtr_fail(&why, QTR_ERR_STATE, "internal error: %d sequences and none can run", e->n_running + e->n_waiting);
        die(e, &why);
        *has_work = false;
        status = qtr_fail(err, QTR_ERR_STATE, "%s", why.message);
      }
      goto done;
    }
    if (!prepared) {
      *has_work = true;
      status = qtr_fail_memory(err, "events", sizeof(struct qtr_event_node));
      goto done;
    }
  }
  e->stepping = true;
  if (!pass->launched) status = launch_planned(e, pass, &model_seconds, &why);
  if (!status) status = go_ahead(e, pass, &behind, &model_seconds, &why);
  pthread_mutex_unlock(&e->mutex);

  if (!status) status = collect(e, pass, behind != NULL, &model_seconds, &why);

  pthread_mutex_lock(&e->mutex);
  e->stepping = false;
  if (status) {
    struct qtr_error death = {.status = QTR_ERR_BACKEND};
    (void)qtr_fail(&death, QTR_ERR_BACKEND, "the device failed and this engine with it (%s: %.400s); open a new one",
                   qtr_status_name(status), why.message);
    die(e, &death);
    status = qtr_fail(err, QTR_ERR_BACKEND, "%s", death.message);
    goto done;
  }
  e->stats.n_steps++;
  qtr_scheduler_commit(e, pass);
  while (e->cancelled) {
    struct qtr_request *r = e->cancelled;
    e->cancelled = r->next_cancelled;
    qtr_scheduler_end(e, r, QTR_FINISH_CANCELLED);
  }
  *has_work = e->n_running + e->n_waiting > 0;
  e->stats.model_seconds += model_seconds;
  e->stats.step_seconds += qtr_now() - start;
done:
  pthread_mutex_unlock(&e->mutex);
  return status;
}

bool qtr_engine_poll(struct qtr_engine *e, struct qtr_event *event) {
  pthread_mutex_lock(&e->mutex);
  bool any = qtr_event_pop(&e->events, event);
  pthread_mutex_unlock(&e->mutex);
  return any;
}

/* ---- what there is ------------------------------------------------------------------------------- */

void qtr_engine_stats(struct qtr_engine *e, struct qtr_stats *stats) {
  pthread_mutex_lock(&e->mutex);
  *stats = e->stats;
  stats->n_running = e->n_running;
  stats->n_waiting = e->n_waiting;
  qtr_kv_pool_counts(e->pool, &stats->n_pages_total, &stats->n_pages_used, &stats->n_pages_cached);
  qtr_kv_pool_stream_counts(e->pool, &stats->n_stream_pages_total, &stats->n_stream_pages_used,
                            &stats->n_stream_pages_cached);
  pthread_mutex_unlock(&e->mutex);
  stats->n_streaming_heads = e->n_streaming_heads;
  stats->stream_page_bytes = e->stream_page_bytes;
  struct qtr_backend *b = e->model->backend;
  if (b->ops->busy_read) b->ops->busy_read(b, &stats->device_busy_seconds, &stats->device_idle_seconds);
  stats->page_tokens = QTR_PAGE_TOKENS;
  stats->weight_bytes = e->model->weight_bytes;
  stats->kv_pool_bytes =
      e->kv_page_bytes * (size_t)e->n_pages + e->stream_page_bytes * (size_t)e->n_stream_pages + e->selection_bytes;
  stats->kv_bytes_per_token = e->kv_page_bytes / QTR_PAGE_TOKENS;
}

void qtr_engine_get_info(struct qtr_engine *e, struct qtr_engine_info *info) {
  *info = (struct qtr_engine_info){.model_dir = e->model_dir,
                                   .architecture = e->model->config.architecture,
                                   .precision = e->precision,
                                   .device = e->device,
                                   .group_size = e->group_size,
                                   .vocab_size = e->vocab_size,
                                   .max_model_len = e->max_model_len,
                                   .threads = e->threads,
                                   .bos_token = e->bos_token};
}

/* ---- text ---------------------------------------------------------------------------------------- */

static enum qtr_status need_tokenizer(const struct qtr_engine *e, struct qtr_error *err) {
  if (e->tokenizer) return QTR_OK;
  return qtr_fail(
      err, QTR_ERR_NOT_FOUND,
      "this model has no tokenizer.json or tokenizer.model: give prompts as token ids, or put one into its directory");
}

enum qtr_status qtr_engine_tokenize(struct qtr_engine *e, const char *text, size_t len, bool add_bos, bool parse_special,
                                    int32_t **tokens, size_t *n_tokens, struct qtr_error *err) {
  *tokens = NULL;
  *n_tokens = 0;
  enum qtr_status status = need_tokenizer(e, err);
  if (status) return status;
  const struct qtr_encode_options options = {.add_special = add_bos, .parse_special = parse_special};
  return qtr_tokenizer_encode(e->tokenizer, text, len, &options, tokens, n_tokens, err);
}

enum qtr_status qtr_engine_detokenize(struct qtr_engine *e, const int32_t *token, size_t n_tokens, char **text, size_t *len,
                                      struct qtr_error *err) {
  *text = NULL;
  *len = 0;
  enum qtr_status status = need_tokenizer(e, err);
  if (status) return status;
  return qtr_tokenizer_decode(e->tokenizer, token, n_tokens, false, text, len, err);
}

static enum qtr_status parse_array(const char *name, const char *text, json_t **array, struct qtr_error *err) {
  json_error_t where;
  *array = json_loads(text, JSON_REJECT_DUPLICATES, &where);
  if (!*array) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "%s is not valid JSON: line %d, column %d: %s", name, where.line, where.column,
                    where.text);
  }
  if (!json_is_array(*array)) return qtr_fail(err, QTR_ERR_ARGUMENT, "%s must be a JSON array", name);
  return QTR_OK;
}

enum qtr_status qtr_engine_apply_chat_template(struct qtr_engine *e, const char *messages_json, const char *tools_json,
                                               bool add_generation_prompt, char **prompt, struct qtr_error *err) {
  json_t *messages = NULL, *tools = NULL;
  size_t len;
  *prompt = NULL;
  if (!e->chat) {
    return qtr_fail(
        err, QTR_ERR_NOT_FOUND,
        "this model has no chat template (chat_template.jinja or tokenizer_config.json): write the prompt yourself");
  }
  enum qtr_status status = parse_array("messages", messages_json, &messages, err);
  if (!status && tools_json) status = parse_array("tools", tools_json, &tools, err);
  if (!status) status = qtr_chat_template_render(e->chat, messages, tools, add_generation_prompt, NULL, prompt, &len, err);
  json_decref(messages);
  json_decref(tools);
  return status;
}
