/* workload.c - prompts and arrival times (workload.h). */
#include "load/workload.h"

#include "base/checked.h"
#include "base/random.h"
#include "base/status.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define BYTES_A_TOKEN 4 /* of English in most vocabularies */
#define MAX_ITEMS ((size_t)1 << 20)

/* Words that are one token each with their space in the usual vocabularies. */
static const char *const words[] = {
    "the",   "of",   "and",  "to",   "in",  "is",   "was",   "he",    "for",   "it",    "with",  "as",   "his",
    "on",    "be",   "at",   "by",   "had", "not",  "are",   "but",   "from",  "or",    "have",  "an",   "they",
    "which", "one",  "you",  "were", "all", "her",  "she",   "there", "would", "their", "we",    "him",  "been",
    "has",   "when", "who",  "will", "no",  "more", "if",    "out",   "so",    "up",    "said",  "what", "its",
    "about", "than", "into", "them", "can", "only", "other", "time",  "new",   "some",  "could", "these"};
enum { N_WORDS = sizeof words / sizeof words[0] };

/* A number in (0, 1) */
static double uniform(uint64_t *state) { return ((double)(qtr_random_next(state) >> 11) + 0.5) * 0x1p-53; }

enum qtr_status qtr_workload_make(struct qtr_workload *w, size_t n, double rate, int32_t n_input, int32_t n_output,
                                  struct qtr_error *err) {
  uint64_t state = qtr_random_state(w->seed, 1, 0, 0);
  double time = 0;
  w->trace.request = calloc(n > 0 ? n : 1, sizeof *w->trace.request);
  if (!w->trace.request) return qtr_fail_memory(err, "requests", n);
  w->trace.capacity = w->trace.n = n;
  for (size_t i = 0; i < n; i++) {
    w->trace.request[i] = (struct qtr_trace_request){.time = time, .n_input = n_input, .n_output = n_output};
    if (rate > 0) time -= log(uniform(&state)) / rate; /* the first comes at once */
  }
  return QTR_OK;
}

/* ---- a data set ---------------------------------------------------------------------------------- */

static enum qtr_status add_item(struct qtr_workload *w, const json_t *value, bool is_chat, struct qtr_error *err) {
  if (w->n_items == MAX_ITEMS) return QTR_OK; /* more than anybody replays */
  if ((w->n_items & (w->n_items - 1)) == 0) { /* full at powers of two */
    size_t capacity = w->n_items ? w->n_items * 2 : 1;
    char **item = realloc(w->item, capacity * sizeof *item);
    if (item) w->item = item;
    bool *kind = realloc(w->is_chat, capacity * sizeof *kind);
    if (kind) w->is_chat = kind;
    if (!item || !kind) return qtr_fail_memory(err, "prompts", capacity);
  }
  char *text = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT);
  if (!text) return qtr_fail_memory(err, "a prompt", 0);
  w->is_chat[w->n_items] = is_chat;
  w->item[w->n_items++] = text;
  return QTR_OK;
}

/* A conversation's messages, ending where the model is to speak. */
static enum qtr_status add_messages(struct qtr_workload *w, json_t *messages, size_t n_line, struct qtr_error *err) {
  for (size_t n; (n = json_array_size(messages)) > 0;) {
    const char *role = json_string_value(json_object_get(json_array_get(messages, n - 1), "role"));
    if (!role) return qtr_fail(err, QTR_ERR_FORMAT, "line %zu: a message without a role", n_line);
    if (strcmp(role, "assistant") != 0) return add_item(w, messages, true, err);
    (void)json_array_remove(messages, n - 1);
  }
  return qtr_fail(err, QTR_ERR_FORMAT, "line %zu: no message but the assistant's", n_line);
}

static enum qtr_status read_json_lines(struct qtr_workload *w, const char *text, size_t len, struct qtr_error *err) {
  size_t n_line = 0;
  for (const char *at = text, *end = text + len, *next; at < end; at = next) {
    const char *newline = memchr(at, '\n', (size_t)(end - at)), *stop = newline ? newline : end;
    next = newline ? newline + 1 : end;
    n_line++;
    if (strspn(at, " \t\r\n") >= (size_t)(stop - at)) continue;
    json_error_t why;
    json_t *o = json_loadb(at, (size_t)(stop - at), 0, &why);
    if (!o) return qtr_fail(err, QTR_ERR_FORMAT, "line %zu is not JSON: %s", n_line, why.text);
    json_t *prompt = json_object_get(o, "prompt"), *messages = json_object_get(o, "messages");
    enum qtr_status status = json_is_string(prompt) ? add_item(w, prompt, false, err)
                             : json_array_size(messages)
                                 ? add_messages(w, messages, n_line, err)
                                 : qtr_fail(err, QTR_ERR_FORMAT, "line %zu has no \"prompt\" and no \"messages\"", n_line);
    json_decref(o);
    if (status) return status;
  }
  return QTR_OK;
}

static enum qtr_status cut_text(struct qtr_workload *w, const char *text, size_t len, size_t piece, struct qtr_error *err) {
  for (size_t at = 0; at < len;) {
    size_t end = len - at > piece ? at + piece : len;
    while (end < len && end > at && text[end] != ' ' && text[end] != '\n') end--;
    if (end == at) end = at + QTR_MIN(piece, len - at); /* no space at all: anywhere, but at a character */
    while (end < len && ((unsigned char)text[end] & 0xc0) == 0x80) end++;
    json_t *prompt = json_stringn(text + at, end - at);
    if (!prompt) return qtr_fail(err, QTR_ERR_FORMAT, "the text is not UTF-8 near byte %zu", at);
    enum qtr_status status = add_item(w, prompt, false, err);
    json_decref(prompt);
    if (status) return status;
    at = end;
    while (at < len && (text[at] == ' ' || text[at] == '\n')) at++;
  }
  return QTR_OK;
}

enum qtr_status qtr_workload_read(struct qtr_workload *w, const char *text, size_t len, int32_t n_input,
                                  struct qtr_error *err) {
  size_t blank = strspn(text, " \t\r\n");
  w->kind = QTR_PROMPT_DATASET;
  enum qtr_status status = blank < len && text[blank] == '{' ? read_json_lines(w, text, len, err)
                                                             : cut_text(w, text, len, (size_t)n_input * BYTES_A_TOKEN, err);
  if (!status && w->n_items == 0) status = qtr_fail(err, QTR_ERR_FORMAT, "there are no prompts in it");
  return status;
}

void qtr_workload_free(struct qtr_workload *w) {
  qtr_trace_free(&w->trace);
  for (size_t i = 0; i < w->n_items; i++) free(w->item[i]);
  free(w->item);
  free(w->is_chat);
  *w = (struct qtr_workload){0};
}

/* ---- bodies -------------------------------------------------------------------------------------- */

/* A number for place `at` of request i's prompt: equal for equal blocks of the trace, else for this request alone. */
static uint64_t draw(const struct qtr_workload *w, const struct qtr_trace_request *r, size_t i, int32_t at) {
  int32_t size = w->block_tokens > 0 ? w->block_tokens : QTR_TRACE_BLOCK_TOKENS, k = at / size;
  if (k < r->n_blocks)
    return qtr_random_state(w->seed, 2, w->trace.block[r->first_block + (size_t)k], (uint64_t)(at % size));
  return qtr_random_state(w->seed, 3, i, (uint64_t)at);
}

static void put_prompt(const struct qtr_workload *w, size_t i, struct qtr_buffer *out) {
  const struct qtr_trace_request *r = &w->trace.request[i];
  uint64_t low = (uint64_t)w->vocab / 4, range = (uint64_t)w->vocab - low;
  qtr_buffer_puts(out, w->kind == QTR_PROMPT_TOKENS ? "[" : "\"");
  for (int32_t at = 0; at < r->n_input; at++) {
    uint64_t x = draw(w, r, i, at);
    if (w->kind == QTR_PROMPT_TOKENS)
      qtr_buffer_printf(out, "%s%llu", at ? "," : "", (unsigned long long)(low + x % range));
    else
      qtr_buffer_printf(out, "%s%s", at ? " " : "", words[x % N_WORDS]);
  }
  qtr_buffer_puts(out, w->kind == QTR_PROMPT_TOKENS ? "]" : "\"");
}

void qtr_workload_body(const struct qtr_workload *w, size_t i, const struct qtr_body_options *o, struct qtr_buffer *out,
                       bool *chat) {
  size_t item = w->n_items ? i % w->n_items : 0;
  *chat = w->kind == QTR_PROMPT_DATASET && w->is_chat[item];
  qtr_buffer_puts(out, "{");
  if (o->model) {
    qtr_buffer_puts(out, "\"model\":");
    qtr_buffer_string(out, o->model, strlen(o->model));
    qtr_buffer_puts(out, ",");
  }
  qtr_buffer_puts(out, *chat ? "\"messages\":" : "\"prompt\":");
  if (w->kind == QTR_PROMPT_DATASET)
    qtr_buffer_puts(out, w->item[item]);
  else
    put_prompt(w, i, out);
  qtr_buffer_printf(out, ",\"max_tokens\":%d,\"stream\":true,\"stream_options\":{\"include_usage\":true}",
                    w->trace.request[i].n_output);
  if (o->temperature >= 0) qtr_buffer_printf(out, ",\"temperature\":%g", o->temperature);
  qtr_buffer_puts(out, o->ignore_eos ? ",\"ignore_eos\":true}" : "}");
}
