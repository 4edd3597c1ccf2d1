/* prompts.c - reads prompts (prompts.h). Lines are untrusted: each is checked before any model is asked. */
#include "cli/prompts.h"

#include "base/file.h"
#include "base/status.h"
#include "cli/cli.h"

#include <stdlib.h>
#include <string.h>

#define MAX_FILE ((size_t)1 << 30)

static enum qtr_status append(struct qtr_prompts *prompts, struct qtr_prompt **prompt, struct qtr_error *err) {
  *prompt = NULL;
  if (prompts->n == prompts->capacity) {
    size_t capacity = prompts->capacity ? prompts->capacity * 2 : 16;
    struct qtr_prompt *more = realloc(prompts->item, capacity * sizeof *more);
    if (!more) return qtr_fail_memory(err, "prompts", capacity * sizeof *more);
    prompts->item = more;
    prompts->capacity = capacity;
  }
  *prompt = &prompts->item[prompts->n];
  **prompt = (struct qtr_prompt){.id = json_integer((json_int_t)prompts->n)};
  prompts->n++;
  return QTR_OK;
}

static enum qtr_status set_text(struct qtr_prompt *prompt, const char *text, size_t len, struct qtr_error *err) {
  prompt->text = malloc(len + 1);
  if (!prompt->text) return qtr_fail_memory(err, "a prompt", len);
  memcpy(prompt->text, text, len);
  prompt->text[len] = 0;
  prompt->len = len;
  return QTR_OK;
}

static enum qtr_status set_conversation(struct qtr_prompt *prompt, const char *text, size_t len, const char *system,
                                        struct qtr_error *err) {
  enum qtr_status status = QTR_OK;
  prompt->messages = json_array();
  if (system) status = qtr_messages_add(prompt->messages, "system", system, strlen(system), err);
  if (!status) status = qtr_messages_add(prompt->messages, "user", text, len, err);
  return status;
}

enum qtr_status qtr_prompts_add(struct qtr_prompts *prompts, const char *text, bool chat, const char *system,
                                struct qtr_error *err) {
  struct qtr_prompt *prompt;
  enum qtr_status status = append(prompts, &prompt, err);
  if (!prompt) return status;
  return chat ? set_conversation(prompt, text, strlen(text), system, err) : set_text(prompt, text, strlen(text), err);
}

/* Checks what a template relies on: an array of objects that each have a role. */
static const char *messages_fault(const json_t *messages) {
  size_t i;
  json_t *message;
  if (!json_is_array(messages) || json_array_size(messages) == 0) return "\"messages\" is not an array with a message";
  json_array_foreach(messages, i, message) {
    if (!json_is_object(message)) return "a message is not an object";
    if (!json_is_string(json_object_get(message, "role"))) return "a message has no \"role\" that is a string";
  }
  return NULL;
}

static enum qtr_status read_line(struct qtr_prompts *prompts, const json_t *line, bool chat, const char *system,
                                 struct qtr_error *err) {
  const json_t *text = json_object_get(line, "prompt");
  json_t *messages = json_object_get(line, "messages"), *tools = json_object_get(line, "tools");
  json_t *id = json_object_get(line, "id");
  struct qtr_prompt *prompt;
  const char *fault = NULL;
  enum qtr_status status;
  if (!json_is_object(line)) {
    fault = "the line is not an object";
  } else if (!text == !messages) {
    fault = text ? "both \"prompt\" and \"messages\": give one" : "neither \"prompt\" nor \"messages\"";
  } else if (text && !json_is_string(text)) {
    fault = "\"prompt\" is not a string";
  } else if (id && !json_is_string(id) && !json_is_integer(id)) {
    fault = "\"id\" is neither a string nor a whole number";
  } else if (tools && !json_is_null(tools) && !json_is_array(tools)) {
    fault = "\"tools\" is not an array";
  } else if (messages) {
    fault = messages_fault(messages);
  }
  if (fault) return qtr_fail(err, QTR_ERR_FORMAT, "%s", fault);
  status = append(prompts, &prompt, err);
  if (!prompt) return status;
  if (id) {
    json_decref(prompt->id);
    prompt->id = json_incref(id);
  }
  if (messages) {
    prompt->messages = json_incref(messages);
    if (json_is_array(tools)) prompt->tools = json_incref(tools);
    return QTR_OK;
  }
  const char *s = json_string_value(text);
  return chat ? set_conversation(prompt, s, json_string_length(text), system, err)
              : set_text(prompt, s, json_string_length(text), err);
}

enum qtr_status qtr_prompts_read(struct qtr_prompts *prompts, const char *path, bool chat, const char *system,
                                 struct qtr_error *err) {
  char *data;
  size_t len, number = 0;
  enum qtr_status status = QTR_OK;
  if (strcmp(path, "-") == 0) {
    if (!qtr_stdin_read(MAX_FILE, &data, &len, err)) return QTR_ERR_IO;
    path = "standard input";
  } else if ((status = qtr_file_read(path, MAX_FILE, &data, &len, err))) {
    return status;
  }
  for (const char *p = data, *end = data + len; p < end && !status;) {
    const char *newline = memchr(p, '\n', (size_t)(end - p));
    size_t n = newline ? (size_t)(newline - p) : (size_t)(end - p);
    number++;
    size_t blank = 0;
    while (blank < n && (p[blank] == ' ' || p[blank] == '\t' || p[blank] == '\r')) blank++;
    if (blank < n) {
      json_error_t fault;
      json_t *line = json_loadb(p, n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &fault);
      if (!line) {
        char shown[JSON_ERROR_TEXT_LENGTH];
        status = qtr_fail(err, QTR_ERR_FORMAT, "not JSON at column %d: %s", fault.column,
                          qtr_printable(fault.text, strlen(fault.text), shown, sizeof shown));
      } else {
        status = read_line(prompts, line, chat, system, err);
      }
      json_decref(line);
      if (status) (void)qtr_error_prefix(err, "%s, line %zu", path, number);
    }
    p += n + 1;
  }
  free(data);
  return status;
}

enum qtr_status qtr_prompts_render(struct qtr_prompts *prompts, struct qtr_engine *engine, struct qtr_error *err) {
  for (size_t i = 0; i < prompts->n; i++) {
    struct qtr_prompt *prompt = &prompts->item[i];
    if (!prompt->messages) continue;
    enum qtr_status status = qtr_messages_render(engine, prompt->messages, prompt->tools, &prompt->text, err);
    if (status) return prompts->n > 1 ? qtr_error_prefix(err, "prompt %zu", i) : status;
    prompt->len = strlen(prompt->text);
    prompt->rendered = true;
  }
  return QTR_OK;
}

void qtr_prompts_free(struct qtr_prompts *prompts) {
  for (size_t i = 0; i < prompts->n; i++) {
    json_decref(prompts->item[i].id);
    json_decref(prompts->item[i].messages);
    json_decref(prompts->item[i].tools);
    free(prompts->item[i].text);
  }
  free(prompts->item);
  *prompts = (struct qtr_prompts){0};
}
