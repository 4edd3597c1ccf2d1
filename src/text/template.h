/* template.h - chat templates: the Jinja subset that real chat templates use, bounded in time, depth and output. Untrusted
 * input. */
#ifndef QTR_TEXT_TEMPLATE_H
#define QTR_TEXT_TEMPLATE_H

#include "quattuor/quattuor.h"

#include <jansson.h>

struct qtr_template;

/* Parses a template. Errors give line and what was expected. Immutable afterwards, usable from several threads. */
enum qtr_status qtr_template_parse(const char *source, size_t len, struct qtr_template **tpl, struct qtr_error *err);
void qtr_template_free(struct qtr_template *tpl);

/* Renders with the members of `variables` (a JSON object: messages, tools, add_generation_prompt, bos_token, eos_token, …)
 * as globals. *text is malloc'ed, NUL-terminated. raise_exception(message) gives QTR_ERR_ARGUMENT with that message. */
enum qtr_status qtr_template_render(const struct qtr_template *tpl, const json_t *variables, char **text, size_t *len,
                                    struct qtr_error *err);

/* The chat template of a model directory: chat_template.jinja, else "chat_template" of tokenizer_config.json (a string, or a
 * list of {name, template}: "default", with tools "tool_use" when there is one). Holds bos/eos strings too. */
struct qtr_chat_template;
enum qtr_status qtr_chat_template_open(const char *dir, struct qtr_chat_template **chat,
                                       struct qtr_error *err); /* NOT_FOUND: none */
void qtr_chat_template_close(struct qtr_chat_template *chat);
/* messages: JSON array; tools: JSON array or NULL; extra: object of further variables or NULL. */
enum qtr_status qtr_chat_template_render(const struct qtr_chat_template *chat, const json_t *messages, const json_t *tools,
                                         bool add_generation_prompt, const json_t *extra, char **text, size_t *len,
                                         struct qtr_error *err);

#endif
