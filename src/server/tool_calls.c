/* tool_calls.c - calls of tools out of text (tool_calls.h). */
#include "server/tool_calls.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char open_tag[] = "<tool_call>", close_tag[] = "</tool_call>", python_tag[] = "<|python_tag|>";

static bool is_space(char c) { return c == ' ' || c == '\n' || c == '\r' || c == '\t'; }

static void drop(struct qtr_buffer *b, size_t n) {
  if (n == 0) return;
  memmove(b->data, b->data + n, b->len - n);
  b->len -= n;
  b->data[b->len] = 0;
}

/* One call from {"name": …, "arguments" or "parameters": {…}}. False when the object is none. */
static bool add_call(struct qtr_tool_parser *p, const json_t *object) {
  const json_t *name = json_object_get(object, "name"), *arguments = json_object_get(object, "arguments");
  if (!arguments) arguments = json_object_get(object, "parameters");
  if (!json_is_string(name) || (arguments && !json_is_object(arguments) && !json_is_string(arguments)) ||
      p->n_calls == QTR_MAX_TOOL_CALLS) {
    return false;
  }
  struct qtr_tool_call *more = realloc(p->call, (p->n_calls + 1) * sizeof *more);
  if (!more) return false;
  p->call = more;
  struct qtr_tool_call *call = &p->call[p->n_calls];
  call->name = strdup(json_string_value(name));
  call->arguments = !arguments                  ? strdup("{}")
                    : json_is_string(arguments) ? strdup(json_string_value(arguments))
                                                : json_dumps(arguments, 0);
  if (!call->name || !call->arguments) {
    free(call->name);
    free(call->arguments);
    return false;
  }
  (void)snprintf(call->id, sizeof call->id, "call_%016llx%04zx", (unsigned long long)p->id_seed, p->n_calls);
  p->n_calls++;
  p->called = true;
  return true;
}

/* All calls of a text that is one object, several separated by ';' or space, or a list. All or none: on false the parser is
 * as before. */
static bool add_calls(struct qtr_tool_parser *p, const char *text, size_t len) {
  size_t before = p->n_calls, at = 0;
  bool ok = true, any = false;
  while (ok) {
    while (at < len && (is_space(text[at]) || text[at] == ';')) at++;
    if (at == len) break;
    json_error_t where;
    json_t *value = json_loadb(text + at, len - at, JSON_DISABLE_EOF_CHECK, &where);
    ok = value != NULL;
    if (json_is_array(value)) {
      for (size_t i = 0; i < json_array_size(value) && ok; i++) ok = any = add_call(p, json_array_get(value, i));
    } else if (value) {
      ok = any = add_call(p, value);
    }
    json_decref(value);
    if (ok) at += (size_t)where.position; /* with DISABLE_EOF_CHECK: how far it read */
  }
  if (ok && any) return true;
  while (p->n_calls > before) {
    free(p->call[--p->n_calls].name);
    free(p->call[p->n_calls].arguments);
  }
  return false;
}

/* Length of the longest end of the text that begins `tag`. */
static size_t tag_prefix(const struct qtr_buffer *b, const char *tag) {
  size_t n = strlen(tag) - 1;
  if (n > b->len) n = b->len;
  while (n > 0 && memcmp(b->data + b->len - n, tag, n) != 0) n--;
  return n;
}

static void feed_tags(struct qtr_tool_parser *p, bool last, struct qtr_buffer *content) {
  struct qtr_buffer *h = &p->held;
  while (h->len > 0) {
    if (p->in_call) {
      const char *end = memmem(h->data, h->len, close_tag, sizeof close_tag - 1);
      if (!end && !last) return;
      size_t n = end ? (size_t)(end - h->data) : h->len;
      if (!add_calls(p, h->data, n)) { /* not a call after all: the reader gets it as it was written */
        qtr_buffer_puts(content, open_tag);
        qtr_buffer_put(content, h->data, n);
        if (end) qtr_buffer_puts(content, close_tag);
        p->called = false;
      }
      drop(h, end ? n + sizeof close_tag - 1 : n);
      p->in_call = false;
      continue;
    }
    size_t n_space = 0;
    while (p->called && n_space < h->len && is_space(h->data[n_space])) n_space++;
    const char *tag = memmem(h->data, h->len, open_tag, sizeof open_tag - 1);
    if (tag) {
      size_t n = (size_t)(tag - h->data);
      if (n > n_space) { /* mere space between calls is no content */
        qtr_buffer_put(content, h->data, n);
        p->called = false;
      }
      drop(h, n + sizeof open_tag - 1);
      p->in_call = true;
      continue;
    }
    if (n_space == h->len) {
      if (last) h->len = 0;
      return;
    }
    size_t n = last ? h->len : h->len - tag_prefix(h, open_tag);
    if (n <= n_space) return; /* space, and perhaps the next call */
    qtr_buffer_put(content, h->data, n);
    p->called = false;
    drop(h, n);
    return;
  }
}

static void feed_json(struct qtr_tool_parser *p, bool last, struct qtr_buffer *content) {
  struct qtr_buffer *h = &p->held;
  if (!p->decided) {
    size_t at = 0, n_tag = sizeof python_tag - 1;
    while (at < h->len && is_space(h->data[at])) at++;
    size_t n = h->len - at;
    if (!last && n < n_tag && (n == 0 || memcmp(h->data + at, python_tag, n) == 0)) return;
    if (n >= n_tag && memcmp(h->data + at, python_tag, n_tag) == 0) {
      drop(h, at + n_tag);
    } else {
      p->plain = n == 0 || (h->data[at] != '{' && h->data[at] != '[');
    }
    p->decided = true;
  }
  if (!p->plain && !last) return;
  if (h->len > 0 && (p->plain || !add_calls(p, h->data, h->len))) qtr_buffer_put(content, h->data, h->len);
  h->len = 0;
}

void qtr_tool_feed(struct qtr_tool_parser *p, const char *text, size_t len, bool last, struct qtr_buffer *content) {
  qtr_buffer_put(&p->held, text, len);
  if (p->held.failed) {
    content->failed = true;
    return;
  }
  if (p->format == QTR_TOOL_TAGS)
    feed_tags(p, last, content);
  else
    feed_json(p, last, content);
}

void qtr_tool_parser_free(struct qtr_tool_parser *p) {
  for (size_t i = 0; i < p->n_calls; i++) {
    free(p->call[i].name);
    free(p->call[i].arguments);
  }
  free(p->call);
  qtr_buffer_free(&p->held);
  *p = (struct qtr_tool_parser){0};
}
