/* chat_template.c - the chat template of a model directory and the variables transformers gives to it: messages, tools,
 * add_generation_prompt and the special tokens by name. */
#include "base/file.h"
#include "base/status.h"
#include "text/template.h"

#include <stdlib.h>
#include <string.h>

#define MAX_CONFIG_BYTES ((size_t)64 << 20) /* tokenizer_config.json lists every added token: some have megabytes */
#define MAX_TEMPLATE_BYTES ((size_t)1 << 20)

struct qtr_chat_template {
  struct qtr_template *plain, *tools; /* tools may be NULL: then plain serves both */
  json_t *tokens;                     /* object: bos_token, eos_token, … as strings */
};

/* A special token is a string, or an object with its "content". */
static const char *token_text(const json_t *token) {
  if (json_is_object(token)) token = json_object_get(token, "content");
  return json_string_value(token);
}

static enum qtr_status collect_tokens(struct qtr_chat_template *chat, const json_t *config, struct qtr_error *err) {
  static const char *const names[] = {"bos_token", "eos_token", "unk_token", "sep_token",
                                      "pad_token", "cls_token", "mask_token"};
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    const char *text = token_text(json_object_get(config, names[i]));
    if (text && json_object_set_new(chat->tokens, names[i], json_string(text)) != 0)
      return qtr_fail_memory(err, names[i], 64);
  }
  return QTR_OK;
}

static enum qtr_status read_config(const char *dir, const char *name, json_t **config, struct qtr_error *err) {
  enum qtr_status status = QTR_OK;
  char *data = NULL, *path = qtr_path_join(dir, name);
  size_t len;
  *config = NULL;
  if (!path) return qtr_fail_memory(err, "a path", strlen(dir));
  if (qtr_file_exists(path)) {
    status = qtr_file_read(path, MAX_CONFIG_BYTES, &data, &len, err);
    json_error_t where;
    if (status == QTR_OK && !(*config = json_loadb(data, len, 0, &where))) {
      status = qtr_fail(err, QTR_ERR_FORMAT, "%s:%d: not valid JSON: %s", path, where.line, where.text);
    }
    if (status == QTR_OK && !json_is_object(*config)) {
      status = qtr_fail(err, QTR_ERR_FORMAT, "%s: expected a JSON object", path);
    }
  }
  free(data);
  free(path);
  return status;
}

/* "chat_template" of tokenizer_config.json or chat_template.json: one template, or a list of named ones. */
static enum qtr_status parse_member(struct qtr_chat_template *chat, const json_t *member, struct qtr_error *err) {
  if (json_is_string(member)) {
    return qtr_template_parse(json_string_value(member), json_string_length(member), &chat->plain, err);
  }
  enum qtr_status status = QTR_OK;
  for (size_t i = 0; i < json_array_size(member) && status == QTR_OK; i++) {
    const json_t *item = json_array_get(member, i), *text = json_object_get(item, "template");
    const char *name = json_string_value(json_object_get(item, "name"));
    if (!name || !json_is_string(text)) {
      return qtr_fail(err, QTR_ERR_FORMAT, "chat_template: entry %zu of the list has no \"name\" and \"template\" strings",
                      i);
    }
    struct qtr_template **to = strcmp(name, "default") == 0    ? &chat->plain
                               : strcmp(name, "tool_use") == 0 ? &chat->tools
                                                               : NULL;
    if (to && !*to) {
      status = qtr_template_parse(json_string_value(text), json_string_length(text), to, err);
      if (status != QTR_OK) (void)qtr_error_prefix(err, "chat template '%s'", name);
    }
  }
  if (status == QTR_OK && !chat->plain && !chat->tools) {
    return qtr_fail(err, QTR_ERR_FORMAT, "chat_template: expected a string, or a list with a template named \"default\"");
  }
  return status;
}

enum qtr_status qtr_chat_template_open(const char *dir, struct qtr_chat_template **chat, struct qtr_error *err) {
  *chat = NULL;
  enum qtr_status status;
  json_t *config = NULL, *map = NULL;
  char *text = NULL, *path = qtr_path_join(dir, "chat_template.jinja");
  struct qtr_chat_template *made = calloc(1, sizeof *made);
  if (!made || !path || !(made->tokens = json_object())) {
    status = qtr_fail_memory(err, "a chat template", sizeof *made);
    goto done;
  }
  /* special_tokens_map.json first: what tokenizer_config.json says goes over it, as in transformers */
  if ((status = read_config(dir, "special_tokens_map.json", &map, err)) != QTR_OK) goto done;
  if ((status = read_config(dir, "tokenizer_config.json", &config, err)) != QTR_OK) goto done;
  if ((status = collect_tokens(made, map, err)) != QTR_OK || (status = collect_tokens(made, config, err)) != QTR_OK)
    goto done;
  const json_t *member = json_object_get(config, "chat_template");
  if (qtr_file_exists(path)) {
    size_t len;
    status = qtr_file_read(path, MAX_TEMPLATE_BYTES, &text, &len, err);
    if (status == QTR_OK) status = qtr_template_parse(text, len, &made->plain, err);
    if (status != QTR_OK) (void)qtr_error_prefix(err, "%s", path);
  } else if (member && !json_is_null(member)) {
    status = parse_member(made, member, err);
    if (status != QTR_OK) (void)qtr_error_prefix(err, "%s/tokenizer_config.json", dir);
  } else {
    status = qtr_fail(err, QTR_ERR_NOT_FOUND,
                      "%s: the model has no chat template (chat_template.jinja or \"chat_template\" in "
                      "tokenizer_config.json); give a plain prompt instead",
                      dir);
  }
done:
  json_decref(config);
  json_decref(map);
  free(path);
  free(text);
  if (status == QTR_OK) {
    *chat = made;
  } else {
    qtr_chat_template_close(made);
  }
  return status;
}

void qtr_chat_template_close(struct qtr_chat_template *chat) {
  if (!chat) return;
  qtr_template_free(chat->plain);
  qtr_template_free(chat->tools);
  json_decref(chat->tokens);
  free(chat);
}

/* transformers' order: special tokens, over them the extra variables, over them its own four names. tools is none when not
 * given, not undefined; so is documents. */
enum qtr_status qtr_chat_template_render(const struct qtr_chat_template *chat, const json_t *messages, const json_t *tools,
                                         bool add_generation_prompt, const json_t *extra, char **text, size_t *len,
                                         struct qtr_error *err) {
  *text = NULL;
  *len = 0;
  if (!json_is_array(messages)) return qtr_fail(err, QTR_ERR_ARGUMENT, "messages must be a JSON array");
  if (tools && !json_is_array(tools)) return qtr_fail(err, QTR_ERR_ARGUMENT, "tools must be a JSON array");
  if (extra && !json_is_object(extra)) return qtr_fail(err, QTR_ERR_ARGUMENT, "template variables must be a JSON object");
  const struct qtr_template *tpl = (tools || !chat->plain) && chat->tools ? chat->tools : chat->plain;
  json_t *variables = json_object();
  /* the references are given back below: nothing of the caller's changes */
  json_t *held_messages = json_incref((json_t *)(uintptr_t)messages);
  json_t *held_tools = tools ? json_incref((json_t *)(uintptr_t)tools) : json_null();
  bool ok = variables && json_object_update(variables, chat->tokens) == 0 &&
            json_object_set_new(variables, "documents", json_null()) == 0;
  ok = ok && (!extra || json_object_update(variables, (json_t *)(uintptr_t)extra) == 0);
  ok = ok && json_object_set(variables, "messages", held_messages) == 0 &&
       json_object_set(variables, "tools", held_tools) == 0 &&
       json_object_set_new(variables, "add_generation_prompt", json_boolean(add_generation_prompt)) == 0;
  enum qtr_status status =
      ok ? qtr_template_render(tpl, variables, text, len, err) : qtr_fail_memory(err, "template variables", 1024);
  json_decref(variables);
  json_decref(held_messages);
  json_decref(held_tools);
  return status;
}
