/* messages.c - conversations as JSON, rendered by the model's chat template (cli.h). */
#include "base/status.h"
#include "cli/cli.h"

#include <stdlib.h>

enum qtr_status qtr_messages_add(json_t *messages, const char *role, const char *content, size_t len,
                                 struct qtr_error *err) {
  json_t *text = json_stringn(content, len);
  if (!text) return qtr_fail(err, QTR_ERR_ARGUMENT, "the %s's text is not valid UTF-8", role);
  if (json_array_append_new(messages, json_pack("{s:s, s:o}", "role", role, "content", text)) != 0) {
    return qtr_fail_memory(err, "a message", len);
  }
  return QTR_OK;
}

enum qtr_status qtr_messages_render(struct qtr_engine *engine, const json_t *messages, const json_t *tools, char **prompt,
                                    struct qtr_error *err) {
  char *text = json_dumps(messages, JSON_COMPACT);
  char *tools_text = tools ? json_dumps(tools, JSON_COMPACT) : NULL;
  enum qtr_status status = text && (tools_text || !tools)
                               ? qtr_engine_apply_chat_template(engine, text, tools_text, true, prompt, err)
                               : qtr_fail_memory(err, "a conversation", 0);
  free(text);
  free(tools_text);
  if (status == QTR_ERR_NOT_FOUND) {
    status = qtr_fail(err, status,
                      "this model has no chat template (chat_template in tokenizer_config.json, or "
                      "chat_template.jinja): use plain prompts with quattuor generate");
  }
  return status;
}
