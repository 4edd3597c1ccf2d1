/* ask.c - prompts made to measure and a window of running requests over them (ask.h). */
#include "eval/ask.h"

#include "base/checked.h"
#include "base/progress.h"
#include "base/random.h"
#include "base/status.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#define IN_FLIGHT 64 /* requests that the engine knows of at once; it runs as many of them as it has room for */
#define FIT_ROUNDS 5

enum qtr_ask_style qtr_ask_style_of(struct qtr_engine *engine, enum qtr_ask_style style) {
  char *prompt = NULL;
  if (style != QTR_ASK_AUTO) return style;
  enum qtr_status status =
      qtr_engine_apply_chat_template(engine, "[{\"role\":\"user\",\"content\":\"\"}]", NULL, true, &prompt, NULL);
  free(prompt);
  return status == QTR_ERR_NOT_FOUND ? QTR_ASK_PLAIN : QTR_ASK_CHAT;
}

enum qtr_status qtr_ask_render(struct qtr_engine *engine, enum qtr_ask_style style, const char *text, size_t len,
                               struct qtr_ask_prompt *prompt, struct qtr_error *err) {
  *prompt = (struct qtr_ask_prompt){0};
  if (style == QTR_ASK_PLAIN) {
    return qtr_engine_tokenize(engine, text, len, true, false, &prompt->token, &prompt->n_tokens, err);
  }
  json_t *content = json_stringn(text, len);
  if (!content) return qtr_fail(err, QTR_ERR_FORMAT, "the text is not valid UTF-8");
  json_t *messages = json_pack("[{s:s, s:o}]", "role", "user", "content", content);
  char *dumped = messages ? json_dumps(messages, JSON_COMPACT) : NULL, *rendered = NULL;
  enum qtr_status status = dumped ? qtr_engine_apply_chat_template(engine, dumped, NULL, true, &rendered, err)
                                  : qtr_fail_memory(err, "a prompt", len);
  if (!status) {
    status = qtr_engine_tokenize(engine, rendered, strlen(rendered), false, true, &prompt->token, &prompt->n_tokens, err);
  }
  free(rendered);
  free(dumped);
  json_decref(messages);
  return status;
}

enum qtr_status qtr_ask_fit(struct qtr_engine *engine, enum qtr_ask_style style, size_t length,
                            const struct qtr_ask_text *text, struct qtr_ask_prompt *prompt, struct qtr_error *err) {
  size_t room = 0, largest_fitting = 0;
  struct qtr_ask_prompt best = {0};
  enum qtr_status status = QTR_OK;
  *prompt = best;
  for (int round = 0; round < FIT_ROUNDS && !status; round++) {
    struct qtr_text out = {0};
    struct qtr_ask_prompt made = {0};
    status = text->make(text->user, room, &out, err);
    if (!status) status = qtr_ask_render(engine, style, out.data ? out.data : "", out.len, &made, err);
    qtr_text_free(&out);
    if (status) break;
    size_t n = made.n_tokens;
    if (n <= length && (!best.token || n > best.n_tokens)) {
      free(best.token);
      best = made;
      largest_fitting = room;
    } else {
      free(made.token);
    }
    if (!best.token) { /* the first has no room to give away */
      status =
          qtr_fail(err, QTR_ERR_LIMIT, "a prompt of %zu tokens is too short for this question, which has %zu", length, n);
    } else if (n <= length) {
      if (length - n < 8) break;
      room += length - n; /* sentences tokenised one by one have a few tokens more than together */
    } else {
      size_t less = room > n - length ? room - (n - length) : 0;
      if (less <= largest_fitting) break;
      room = less;
    }
  }
  if (status) {
    free(best.token);
  } else {
    *prompt = best;
  }
  return status;
}

enum qtr_status qtr_ask_check_length(struct qtr_engine *engine, size_t length, int32_t max_tokens, struct qtr_error *err) {
  struct qtr_engine_info info;
  qtr_engine_get_info(engine, &info);
  if (max_tokens < info.max_model_len && length <= (size_t)(info.max_model_len - max_tokens)) return QTR_OK;
  return qtr_fail(
      err, QTR_ERR_LIMIT,
      "a prompt of %zu tokens and an answer of %d do not fit this model, which takes %d: the longest prompt is %d", length,
      max_tokens, info.max_model_len, QTR_MAX(info.max_model_len - max_tokens, 0));
}

/* ---- the run ---- */

struct running {
  bool used;
  uint64_t id;
  size_t number; /* of the question */
  struct qtr_text text;
};

struct run {
  struct qtr_engine *engine;
  const struct qtr_ask *ask;
  struct running slot[IN_FLIGHT];
  size_t n_added, n_done;
};

static enum qtr_status add_question(struct run *run, struct running *slot, struct qtr_error *err) {
  struct qtr_ask_prompt prompt = {0};
  struct qtr_request_options request;
  uint64_t id;
  qtr_request_options_init(&request);
  enum qtr_status status = run->ask->make(run->ask->user, run->n_added, &prompt, &request.max_tokens, err);
  if (status) return status;
  request.prompt_token = prompt.token;
  request.n_prompt_token = prompt.n_tokens;
  request.sampling.temperature = run->ask->temperature;
  request.sampling.seed = qtr_random_state(run->ask->seed, 'a', run->n_added, 0);
  request.sampling.has_seed = true;
  request.ignore_eos = run->ask->temperature > 0;
  request.user = slot;
  status = qtr_engine_add(run->engine, &request, &id, err);
  free(prompt.token);
  if (status) return status;
  *slot = (struct running){.used = true, .id = id, .number = run->n_added++};
  return QTR_OK;
}

static enum qtr_status take_event(struct run *run, const struct qtr_event *event, struct qtr_error *err) {
  struct running *slot = event->user;
  enum qtr_status status = qtr_text_append(&slot->text, event->text ? event->text : "", event->text_len, err);
  if (status || !event->finish) return status;
  slot->used = false;
  run->n_done++;
  if (event->finish == QTR_FINISH_ERROR) {
    status = qtr_fail(err, QTR_ERR_BACKEND, "question %zu ended with an error: the model gave nothing finite", slot->number);
  } else {
    const struct qtr_ask_answer answer = {.text = slot->text.data,
                                          .len = slot->text.len,
                                          .n_prompt_tokens = event->n_prompt_tokens,
                                          .n_output_tokens = event->n_output_tokens,
                                          .finish = event->finish};
    status = run->ask->take(run->ask->user, slot->number, &answer, err);
  }
  qtr_text_free(&slot->text);
  return status;
}

enum qtr_status qtr_ask_run(struct qtr_engine *engine, const struct qtr_ask *ask, struct qtr_error *err) {
  struct run run = {.engine = engine, .ask = ask};
  struct qtr_progress progress;
  struct qtr_event event;
  bool has_work = false;
  enum qtr_status status = QTR_OK;
  qtr_progress_start(&progress, ask->label, ask->n, ask->quiet);
  while (!status && run.n_done < ask->n) {
    for (size_t i = 0; i < IN_FLIGHT && run.n_added < ask->n && !status; i++) {
      if (!run.slot[i].used) status = add_question(&run, &run.slot[i], err);
    }
    if (!status) status = qtr_engine_step(engine, &has_work, err);
    while (!status && qtr_engine_poll(engine, &event)) status = take_event(&run, &event, err);
    qtr_progress_update(&progress, run.n_done);
  }
  qtr_progress_end(&progress);
  for (size_t i = 0; i < IN_FLIGHT; i++) { /* after a failure the engine forgets the others */
    if (run.slot[i].used) (void)qtr_engine_cancel(engine, run.slot[i].id, NULL);
    qtr_text_free(&run.slot[i].text);
  }
  while (status && qtr_engine_poll(engine, &event)) {
  }
  return status;
}
