/* prompts.h - the list of prompts of one run: from the command line, or lines of a JSONL file. */
#ifndef QTR_CLI_PROMPTS_H
#define QTR_CLI_PROMPTS_H

#include "quattuor/quattuor.h"

#include <jansson.h>

struct qtr_prompt {
  json_t *id;               /* as the file gives it, else the number of the prompt, from 0; owned */
  json_t *messages, *tools; /* of a conversation, else NULL; owned */
  char *text;               /* of a plain prompt, or the rendered conversation; owned */
  size_t len;
  bool rendered; /* text comes from the chat template: it writes its own BOS and special tokens */
};

struct qtr_prompts {
  struct qtr_prompt *item; /* (n) */
  size_t n, capacity;
};

/* Appends a plain prompt, or with `chat` a conversation of one user turn after `system` (may be NULL). */
enum qtr_status qtr_prompts_add(struct qtr_prompts *prompts, const char *text, bool chat, const char *system,
                                struct qtr_error *err);
/* Appends a prompt for each line of a file ("-": standard input): {"id": …, "prompt": "…"} or {"id": …, "messages": [ … ],
 * "tools": [ … ]}; other members are left alone, empty lines too. A bad line is QTR_ERR_FORMAT with its number. */
enum qtr_status qtr_prompts_read(struct qtr_prompts *prompts, const char *path, bool chat, const char *system,
                                 struct qtr_error *err);
/* Renders the conversations by the engine's chat template. */
enum qtr_status qtr_prompts_render(struct qtr_prompts *prompts, struct qtr_engine *engine, struct qtr_error *err);
void qtr_prompts_free(struct qtr_prompts *prompts);

#endif
