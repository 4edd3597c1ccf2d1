/* request_messages.c - conversations and tools of a request, brought into the one form that chat templates know. */
#include "server/buffer.h"
#include "server/request_internal.h"

#include <stdio.h>
#include <string.h>

/* ---- messages ------------------------------------------------------------------------------------ */

/* The text of a message's content: a string, or an array of text parts, joined by newlines. *text is a new reference. */
static bool read_content(json_t *content, size_t i, json_t **text, struct qtr_api_error *err) {
  struct qtr_buffer joined = {0};
  if (!content) {
    *text = json_string("");
    return *text ? true : qtr_api_no_memory(err);
  }
  if (json_is_string(content)) {
    *text = json_incref(content);
    return true;
  }
  char param[64];
  (void)snprintf(param, sizeof param, "messages[%zu].content", i);
  if (!json_is_array(content)) {
    return qtr_api_fail(err, 400, param, "%s must be a string or an array of parts, not %s", param,
                        qtr_api_kind_name(content));
  }
  for (size_t k = 0; k < json_array_size(content); k++) {
    const json_t *part = json_array_get(content, k), *type = json_object_get(part, "type"),
                 *piece = json_object_get(part, "text");
    if ((!qtr_api_is_word(type, "text") && !qtr_api_is_word(type, "input_text")) || !json_is_string(piece)) {
      qtr_buffer_free(&joined);
      return qtr_api_fail(err, 400, param, "%s[%zu] is of type \"%.40s\"; this server takes text parts only", param, k,
                          json_is_string(type) ? json_string_value(type) : "(none)");
    }
    if (k > 0) qtr_buffer_puts(&joined, "\n");
    qtr_buffer_put(&joined, json_string_value(piece), json_string_length(piece));
  }
  *text = joined.failed ? NULL : json_stringn(joined.data ? joined.data : "", joined.len);
  qtr_buffer_free(&joined);
  return *text ? true : qtr_api_no_memory(err);
}

/* Templates want the arguments of past calls as objects, the API has them as strings of JSON. */
static bool read_tool_calls(json_t *calls, size_t i, size_t *room, json_t **out, struct qtr_api_error *err) {
  char param[64];
  (void)snprintf(param, sizeof param, "messages[%zu].tool_calls", i);
  if (!json_is_array(calls))
    return qtr_api_fail(err, 400, param, "%s must be an array, not %s", param, qtr_api_kind_name(calls));
  *out = json_deep_copy(calls);
  if (!*out) return qtr_api_no_memory(err);
  for (size_t k = 0; k < json_array_size(*out); k++) {
    json_t *function = json_object_get(json_array_get(*out, k), "function");
    const json_t *arguments = json_object_get(function, "arguments");
    if (!json_is_string(json_object_get(function, "name"))) {
      json_decref(*out);
      *out = NULL;
      return qtr_api_fail(err, 400, param, "%s[%zu].function must be an object with a name", param, k);
    }
    if (!json_is_string(arguments)) continue;
    if (!qtr_api_load_fits(json_string_value(arguments), json_string_length(arguments), room, err)) {
      (void)snprintf(err->param, sizeof err->param, "%s", param);
      json_decref(*out);
      *out = NULL;
      return false;
    }
    json_t *parsed = json_loadb(json_string_value(arguments), json_string_length(arguments), 0, NULL);
    if (json_is_object(parsed))
      (void)json_object_set_new(function, "arguments", parsed);
    else
      json_decref(parsed);
  }
  return true;
}

static bool read_message(json_t *from, size_t i, size_t *room, json_t *messages, struct qtr_api_error *err) {
  static const char *const roles[] = {"system", "developer", "user", "assistant", "tool", "function"};
  char param[64];
  (void)snprintf(param, sizeof param, "messages[%zu]", i);
  if (!json_is_object(from))
    return qtr_api_fail(err, 400, param, "%s must be an object, not %s", param, qtr_api_kind_name(from));
  const json_t *role = json_object_get(from, "role");
  bool known = false;
  for (size_t k = 0; k < sizeof roles / sizeof roles[0]; k++) known = known || qtr_api_is_word(role, roles[k]);
  if (!known) {
    (void)snprintf(param, sizeof param, "messages[%zu].role", i);
    return qtr_api_fail(err, 400, param, "%s is \"%.40s\"; it must be system, developer, user, assistant or tool", param,
                        json_is_string(role) ? json_string_value(role) : "(not a string)");
  }
  json_t *message = json_copy(from), *content = NULL, *calls = NULL;
  bool ok = message || qtr_api_no_memory(err);
  json_t *given = qtr_api_member(from, "content"), *given_calls = qtr_api_member(from, "tool_calls");
  if (ok && !given && !qtr_api_is_word(role, "assistant")) {
    (void)snprintf(param, sizeof param, "messages[%zu].content", i);
    ok = qtr_api_fail(err, 400, param, "%s is missing", param);
  }
  ok = ok && read_content(given, i, &content, err);
  if (ok) ok = json_object_set_new(message, "content", content) == 0 || qtr_api_no_memory(err);
  if (ok && given_calls) {
    ok = read_tool_calls(given_calls, i, room, &calls, err);
    if (ok) ok = json_object_set_new(message, "tool_calls", calls) == 0 || qtr_api_no_memory(err);
  } else if (ok) {
    (void)json_object_del(message, "tool_calls"); /* null is absent to a template as well */
  }
  /* OpenAI's newer name for the same thing; no template knows it */
  if (ok && qtr_api_is_word(role, "developer")) {
    ok = json_object_set_new(message, "role", json_string("system")) == 0 || qtr_api_no_memory(err);
  }
  if (ok) ok = json_array_append(messages, message) == 0 || qtr_api_no_memory(err);
  json_decref(message);
  return ok;
}

bool qtr_api_read_messages(json_t *from, struct qtr_api_request *r, struct qtr_api_error *err) {
  if (!json_is_array(from)) {
    return qtr_api_fail(err, 400, "messages", "messages must be an array, not %s", qtr_api_kind_name(from));
  }
  if (json_array_size(from) == 0) return qtr_api_fail(err, 400, "messages", "messages is empty; give at least one message");
  size_t room = QTR_API_MAX_CONTAINERS; /* of JSON within strings: arguments of calls */
  r->messages = json_array();
  if (!r->messages) return qtr_api_no_memory(err);
  for (size_t i = 0; i < json_array_size(from); i++) {
    if (!read_message(json_array_get(from, i), i, &room, r->messages, err)) return false;
  }
  return true;
}

/* ---- tools --------------------------------------------------------------------------------------- */

static bool is_tool_name(const char *name) {
  size_t n = strlen(name);
  if (n == 0 || n > 64) return false;
  for (size_t i = 0; i < n; i++) {
    char c = name[i];
    if (!((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-' || c == '.'))
      return false;
  }
  return true;
}

bool qtr_api_read_tools(json_t *tools, struct qtr_api_request *r, struct qtr_api_error *err) {
  if (!json_is_array(tools)) {
    return qtr_api_fail(err, 400, "tools", "tools must be an array, not %s", qtr_api_kind_name(tools));
  }
  size_t n = json_array_size(tools);
  if (n > QTR_API_MAX_TOOLS) {
    return qtr_api_fail(err, 400, "tools", "tools has %zu entries; at most %d are allowed", n, QTR_API_MAX_TOOLS);
  }
  for (size_t i = 0; i < n; i++) {
    const json_t *tool = json_array_get(tools, i), *function = json_object_get(tool, "function"),
                 *parameters = qtr_api_member(function, "parameters");
    const json_t *name = json_object_get(function, "name");
    char param[64];
    (void)snprintf(param, sizeof param, "tools[%zu]", i);
    if (!qtr_api_is_word(json_object_get(tool, "type"), "function")) {
      return qtr_api_fail(err, 400, param, "%s.type must be \"function\"", param);
    }
    if (!json_is_string(name) || json_string_length(name) != strlen(json_string_value(name)) ||
        !is_tool_name(json_string_value(name))) {
      return qtr_api_fail(err, 400, param, "%s.function.name must be 1 to 64 letters, digits, dots, dashes or underscores",
                          param);
    }
    if (parameters && !json_is_object(parameters)) {
      return qtr_api_fail(err, 400, param, "%s.function.parameters must be an object, not %s", param,
                          qtr_api_kind_name(parameters));
    }
  }
  r->tools = n > 0 ? tools : NULL;
  return true;
}

bool qtr_api_read_tool_choice(json_t *choice, struct qtr_api_request *r, struct qtr_api_error *err) {
  static const struct {
    const char *word;
    enum qtr_tool_choice choice;
  } known[] = {{"none", QTR_TOOLS_NONE}, {"auto", QTR_TOOLS_AUTO}, {"required", QTR_TOOLS_REQUIRED}};
  for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
    if (!qtr_api_is_word(choice, known[i].word)) continue;
    r->tool_choice = known[i].choice;
    r->has_tool_choice = true;
    return true;
  }
  r->tool_name = json_string_value(json_object_get(json_object_get(choice, "function"), "name"));
  r->tool_choice = QTR_TOOLS_NAMED;
  r->has_tool_choice = true;
  return r->tool_name ||
         qtr_api_fail(err, 400, "tool_choice",
                      "tool_choice must be none, auto, required or {\"type\":\"function\",\"function\":{\"name\":…}}");
}

bool qtr_api_check_tools(struct qtr_api_request *r, struct qtr_api_error *err) {
  size_t n = json_array_size(r->tools);
  if (!r->has_tool_choice) r->tool_choice = n > 0 ? QTR_TOOLS_AUTO : QTR_TOOLS_NONE;
  if (r->tool_choice == QTR_TOOLS_NONE) return true;
  if (n == 0) return qtr_api_fail(err, 400, "tool_choice", "tool_choice needs tools");
  if (r->format != QTR_FORMAT_TEXT) {
    return qtr_api_fail(err, 400, "response_format",
                        "response_format together with tools is not supported: leave one out, or set tool_choice to none");
  }
  if (r->tool_choice != QTR_TOOLS_NAMED) return true;
  for (size_t i = 0; i < n; i++) {
    const json_t *function = json_object_get(json_array_get(r->tools, i), "function");
    if (strcmp(json_string_value(json_object_get(function, "name")), r->tool_name) == 0) return true;
  }
  return qtr_api_fail(err, 400, "tool_choice", "tool_choice names \"%.64s\", which is not among the tools", r->tool_name);
}
