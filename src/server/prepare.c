/* prepare.c - what takes time before a request can be queued, run by a worker: JSON, the chat template, tokens. Reads the
 * engine's tokenizer and template, which never change, and the job's own members; nothing else of the server. */
#include "server/server_internal.h"

#include "engine/engine_internal.h"
#include "server/schema.h"

#include <stdlib.h>
#include <string.h>

static bool check_model(const struct qtr_job *job, const char *model, struct qtr_api_error *err) {
  if (!model || strcmp(model, job->server->o->model_name) == 0) return true;
  (void)qtr_api_fail(err, 404, "model", "the model \"%.100s\" does not exist; this server has \"%.200s\"", model,
                     job->server->o->model_name);
  err->code = "model_not_found";
  return false;
}

static bool render(const struct qtr_job *job, const json_t *messages, const json_t *tools, bool generation,
                   const json_t *extra, char **text, size_t *len, struct qtr_api_error *err) {
  const struct qtr_engine *engine = job->server->engine;
  struct qtr_error why;
  if (!engine->chat) {
    (void)qtr_api_fail(err, 400, "messages",
                       "this model has no chat template: use /v1/completions with a prompt of your own");
    err->code = "no_chat_template"; /* the page goes on with completions then */
    return false;
  }
  if (qtr_chat_template_render(engine->chat, messages, tools, generation, extra, text, len, &why)) {
    qtr_api_error_from(err, &why, "messages");
    return false;
  }
  return true;
}

static bool encode(const struct qtr_job *job, const char *text, size_t len, bool add_bos, bool parse_special,
                   const char *param, int32_t **token, size_t *n, struct qtr_api_error *err) {
  struct qtr_error why;
  if (!qtr_engine_tokenize(job->server->engine, text, len, add_bos, parse_special, token, n, &why)) return true;
  qtr_api_error_from(err, &why, param);
  return false;
}

/* Ids of the vocabulary only; negative ones the parser has refused. */
static bool check_ids(const struct qtr_job *job, const char *name, const int32_t *token, size_t n,
                      struct qtr_api_error *err) {
  for (size_t i = 0; i < n; i++) {
    if (token[i] < job->server->info.vocab_size) continue;
    return qtr_api_fail(err, 400, name, "%s[%zu] is %d; the vocabulary has ids 0 to %d", name, i, token[i],
                        job->server->info.vocab_size - 1);
  }
  return true;
}

static bool prepare_chat(struct qtr_job *job, struct qtr_api_error *err) {
  struct qtr_api_request *r = &job->request;
  char *text = NULL;
  size_t len;
  job->use_tools = r->tools && r->tool_choice != QTR_TOOLS_NONE;
  if (job->use_tools && !job->server->tools_rendered) {
    return qtr_api_fail(err, 400, "tools", "this model's chat template does not show tools to the model");
  }
  bool ok = render(job, r->messages, job->use_tools ? r->tools : NULL, r->add_generation_prompt, r->template_variables,
                   &text, &len, err) &&
            encode(job, text, len, false, true, "messages", &job->run[0].token, &job->run[0].n_token, err);
  free(text);
  return ok;
}

/* Where the text of each of the prompt's tokens begins. */
static bool find_offsets(const struct qtr_job *job, struct qtr_run *run, bool from_text, struct qtr_api_error *err) {
  struct qtr_detokenizer detokenizer;
  struct qtr_text text = {0};
  size_t n = 0;
  bool ok = true;
  run->offset = calloc(run->n_token + 1, sizeof *run->offset);
  if (!run->offset) return qtr_api_fail(err, 503, NULL, "out of memory");
  if (!job->server->engine->tokenizer) return true;
  qtr_detokenizer_init(&detokenizer, job->server->engine->tokenizer, from_text); /* a text has no BOS in it */
  for (size_t i = 0; i < run->n_token && ok; i++) {
    run->offset[i] = (int32_t)n;
    text.len = 0;
    ok = !qtr_detokenizer_push(&detokenizer, run->token[i], &text, NULL);
    if (ok && text.len > 0) n += qtr_count_characters(text.data, text.len);
  }
  qtr_text_free(&text);
  return ok || qtr_api_fail(err, 503, NULL, "out of memory");
}

static bool prepare_prompt(struct qtr_job *job, size_t i, struct qtr_api_error *err) {
  struct qtr_api_prompt *p = &job->request.prompt[i];
  struct qtr_run *run = &job->run[i];
  bool echo = job->request.echo;
  if (p->text) {
    if (echo) {
      if (!(run->echo = malloc(p->len + 1))) return qtr_api_fail(err, 503, NULL, "out of memory");
      memcpy(run->echo, p->text, p->len + 1);
      run->n_echo = p->len;
    }
    if (!encode(job, p->text, p->len, true, false, "prompt", &run->token, &run->n_token, err)) return false;
    return !job->request.options.prompt_logprobs || !job->request.logprobs || find_offsets(job, run, true, err);
  }
  if (!check_ids(job, "prompt", p->token, p->n_token, err)) return false;
  run->token = p->token;
  run->n_token = p->n_token;
  p->token = NULL;
  struct qtr_error why;
  if (echo && qtr_engine_detokenize(job->server->engine, run->token, run->n_token, &run->echo, &run->n_echo, &why)) {
    qtr_api_error_from(err, &why, "echo");
    return false;
  }
  return !job->request.options.prompt_logprobs || !job->request.logprobs || find_offsets(job, run, false, err);
}

/* What describes the grammar, as a text; malloc'ed, NULL when there is no memory. The order of members counts. */
static char *grammar_key(const struct qtr_job *job, bool forced) {
  const struct qtr_api_request *r = &job->request;
  struct qtr_buffer out = {0};
  const json_t *about = forced ? r->tools : r->schema;
  char *text = about ? json_dumps(about, JSON_COMPACT | JSON_ENCODE_ANY) : NULL;
  qtr_buffer_printf(&out, "%d %s ", forced, forced && r->tool_name ? r->tool_name : "");
  qtr_buffer_puts(&out, text ? text : "any object");
  if (about && !text) out.failed = true;
  free(text);
  if (out.failed) qtr_buffer_free(&out);
  return out.data;
}

/* The grammar of the answer, where the request asks for one. */
static bool prepare_grammar(struct qtr_job *job, struct qtr_api_error *err) {
  const struct qtr_api_request *r = &job->request;
  bool forced = job->use_tools && (r->tool_choice == QTR_TOOLS_REQUIRED || r->tool_choice == QTR_TOOLS_NAMED);
  struct qtr_grammar *g = NULL;
  if (r->format == QTR_FORMAT_TEXT && !forced) return true;
  if (!job->server->vocabulary) {
    return qtr_api_fail(err, 400, forced ? "tool_choice" : "response_format",
                        "this model has no tokenizer: its text is not known");
  }
  char *key = grammar_key(job, forced);
  job->masks = key ? qtr_mask_cache_find(job->server->mask_cache, key) : NULL;
  if (job->masks) {
    free(key);
    return true;
  }
  bool ok;
  if (forced) {
    static const struct {
      const char *arguments, *before, *after;
    } form[] = {[QTR_TOOL_TAGS] = {"arguments", "<tool_call>\n", "\n</tool_call>"},
                [QTR_TOOL_OBJECT] = {"parameters", "", ""},
                [QTR_TOOL_LIST] = {"arguments", "[", "]"}};
    enum qtr_tool_format f = job->server->tool_format;
    ok = qtr_grammar_for_tools(r->tools, r->tool_name, form[f].arguments, form[f].before, form[f].after, &g, err);
  } else {
    bool any = r->format == QTR_FORMAT_JSON;
    ok = qtr_grammar_from_schema(any ? NULL : r->schema, "response_format.json_schema.schema", &g, err);
  }
  if (ok && !(job->masks = qtr_masks_create(g, job->server->vocabulary))) {
    qtr_grammar_free(g);
    ok = qtr_api_fail(err, 503, NULL, "out of memory");
  }
  if (ok && key) qtr_mask_cache_add(job->server->mask_cache, key, job->masks);
  free(key);
  return ok;
}

static bool prepare_completion(struct qtr_job *job, struct qtr_api_error *err) {
  struct qtr_api_request *r = &job->request;
  if (!check_ids(job, "stop_token_ids", r->stop_token, r->options.n_stop_token, err)) return false;
  for (size_t i = 0; i < r->options.n_logit_bias; i++) {
    if (!check_ids(job, "logit_bias", &r->bias[i].token, 1, err)) return false;
  }
  job->run = calloc(r->n_prompts, sizeof *job->run);
  if (!job->run) return qtr_api_fail(err, 503, NULL, "out of memory");
  for (size_t i = 0; i < r->n_prompts; i++) {
    job->run[i].job = job;
    job->run[i].prompt = (int32_t)i;
    if (!(job->chat ? prepare_chat(job, err) : prepare_prompt(job, i, err))) return false;
  }
  return prepare_grammar(job, err);
}

static bool prepare_detokenize(struct qtr_job *job, struct qtr_api_error *err) {
  const struct qtr_api_prompt *p = &job->request.prompt[0];
  char *text = NULL;
  size_t len = 0;
  struct qtr_error why;
  if (!check_ids(job, "tokens", p->token, p->n_token, err)) return false;
  if (qtr_engine_detokenize(job->server->engine, p->token, p->n_token, &text, &len, &why)) {
    qtr_api_error_from(err, &why, "tokens");
    return false;
  }
  qtr_buffer_puts(&job->result, "{\"prompt\":");
  qtr_buffer_string(&job->result, text, len);
  qtr_buffer_puts(&job->result, ",\"content\":");
  qtr_buffer_string(&job->result, text, len);
  qtr_buffer_puts(&job->result, "}");
  free(text);
  return true;
}

static bool prepare_tokenize(struct qtr_job *job, struct qtr_api_error *err) {
  const struct qtr_api_request *r = &job->request;
  char *text = NULL;
  size_t len = 0, n = 0;
  int32_t *token = NULL;
  bool ok;
  if (r->prompt) {
    ok = encode(job, r->prompt[0].text, r->prompt[0].len, r->add_special, false, "prompt", &token, &n, err);
  } else {
    ok = render(job, r->messages, r->tools, r->add_generation_prompt, NULL, &text, &len, err) &&
         encode(job, text, len, false, true, "messages", &token, &n, err);
  }
  free(text);
  if (!ok) return false;
  qtr_buffer_printf(&job->result, "{\"count\":%zu,\"max_model_len\":%d,\"tokens\":[", n, job->server->info.max_model_len);
  for (size_t i = 0; i < n; i++) qtr_buffer_printf(&job->result, i > 0 ? ",%d" : "%d", token[i]);
  qtr_buffer_puts(&job->result, "]}");
  free(token);
  return true;
}

static bool prepare(struct qtr_job *job, struct qtr_api_error *err) {
  struct qtr_api_request *r = &job->request;
  if (!qtr_api_parse(job->kind, job->body, job->body_len, &job->server->o->defaults, r, err)) return false;
  if (!check_model(job, r->model, err)) return false;
  switch (job->kind) {
    case QTR_API_TOKENIZE: return prepare_tokenize(job, err);
    case QTR_API_DETOKENIZE: return prepare_detokenize(job, err);
    default: return prepare_completion(job, err);
  }
}

void qtr_job_prepare(struct qtr_task *task) {
  struct qtr_job *job = (struct qtr_job *)(void *)task;
  struct qtr_api_error err = {0};
  if (prepare(job, &err)) err = (struct qtr_api_error){0};
  job->error = err;
  free(job->body); /* the parsed request has copies */
  job->body = NULL;
}

/* ---- how this model writes calls ----------------------------------------------------------------- */

#define PROBE "qtr_probe_tool"

void qtr_tools_probe(struct qtr_server *s) {
  static const char tools_text[] = "[{\"type\":\"function\",\"function\":{\"name\":\"" PROBE
                                   "\",\"description\":\"d\",\"parameters\":{\"type\":\"object\",\"properties\":{}}}}]";
  static const char user[] = "[{\"role\":\"user\",\"content\":\"x\"}]";
  static const char called[] =
      "[{\"role\":\"user\",\"content\":\"x\"},{\"role\":\"assistant\",\"content\":\"\",\"tool_calls\":[{\"id\":"
      "\"abcdefghi\","
      "\"type\":\"function\",\"function\":{\"name\":\"" PROBE "\",\"arguments\":{}}}]}]";
  json_t *tools = json_loads(tools_text, 0, NULL), *messages = json_loads(user, 0, NULL),
         *past = json_loads(called, 0, NULL);
  char *text = NULL, *call_text = NULL;
  size_t len;
  s->tool_format = QTR_TOOL_TAGS;
  if (tools && messages && past && s->engine->chat &&
      !qtr_chat_template_render(s->engine->chat, messages, tools, true, NULL, &text, &len, NULL)) {
    s->tools_rendered = strstr(text, PROBE) != NULL;
    bool tags = strstr(text, "<tool_call>") != NULL, list = false, object = false;
    if (!qtr_chat_template_render(s->engine->chat, past, tools, false, NULL, &call_text, &len, NULL)) {
      tags = tags || strstr(call_text, "<tool_call>");
      list = strstr(call_text, "[TOOL_CALLS]") != NULL;
      object = strstr(call_text, "\"parameters\": {}") || strstr(call_text, "<|python_tag|>");
    }
    if (!tags && (object || strstr(text, "\"parameters\": dictionary"))) s->tool_format = QTR_TOOL_OBJECT;
    if (!tags && list) s->tool_format = QTR_TOOL_LIST;
  }
  free(text);
  free(call_text);
  json_decref(tools);
  json_decref(messages);
  json_decref(past);
}
