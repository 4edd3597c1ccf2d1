/* tool_calls.h - calls of tools in what a model writes, found while it writes. Three ways of writing are known:
 *
 *   tags   <tool_call>{"name": "f", "arguments": {…}}</tool_call>     Hermes, Qwen; text and several calls may mix
 *   object {"name": "f", "parameters": {…}}                           Llama 3.1 and later; several separated by ';'
 *   list   [{"name": "f", "arguments": {…}}, …]                       Mistral (its [TOOL_CALLS] token is no text)
 *
 * An answer that begins like an object or a list is held back to its end, and is plain text when it turns out not to be
 * calls. */
#ifndef QTR_SERVER_TOOL_CALLS_H
#define QTR_SERVER_TOOL_CALLS_H

#include "server/buffer.h"

#define QTR_MAX_TOOL_CALLS 128 /* in one answer */

enum qtr_tool_format { QTR_TOOL_TAGS, QTR_TOOL_OBJECT, QTR_TOOL_LIST };

struct qtr_tool_call {
  char id[40];            /* "call_…" */
  char *name, *arguments; /* arguments: the text of a JSON object */
};

struct qtr_tool_parser {
  enum qtr_tool_format format;
  struct qtr_buffer held;
  bool in_call;
  bool called;                /* a call was the last thing: space after it is nothing */
  bool decided, plain;        /* decided: whether the answer begins like calls, or is plain text */
  struct qtr_tool_call *call; /* (n_calls) */
  size_t n_calls;
  uint64_t id_seed; /* ids count from here */
};

/* Takes more text; appends what is certainly plain text to `content` and new calls to p->call. last: nothing follows. */
void qtr_tool_feed(struct qtr_tool_parser *p, const char *text, size_t len, bool last, struct qtr_buffer *content);
void qtr_tool_parser_free(struct qtr_tool_parser *p);

#endif
