/* chunk.c - what an event of a completion's stream says (run.h). There is one a token and stream, and the client often
 * shares its machine with the server it measures: so the usual event is read in one pass without allocation. Whatever that
 * pass does not know to be plain (errors, usage, bytes beyond ASCII, names twice, strange numbers) is read into a tree
 * instead (run.c), and both ways say the same: fuzz_load_response compares them. */
#include "load/run.h"

#include <string.h>

#define MAX_DEPTH 16 /* of what the pass steps over */

/* Every function: false = not plain. */
struct pass {
  const char *at, *end;
};

struct span {
  const char *data; /* between the quotes, escapes as they stand */
  size_t len;
};

static bool at_end(struct pass *p) {
  while (p->at < p->end && (*p->at == ' ' || *p->at == '\t' || *p->at == '\n' || *p->at == '\r')) p->at++;
  return p->at == p->end;
}

static bool next_is(struct pass *p, char c) {
  if (at_end(p) || *p->at != c) return false;
  p->at++;
  return true;
}

static bool pass_string(struct pass *p, struct span *s) {
  if (!next_is(p, '"')) return false;
  s->data = p->at;
  for (; p->at < p->end; p->at++) {
    unsigned char c = (unsigned char)*p->at;
    if (c == '"') {
      s->len = (size_t)(p->at++ - s->data);
      return true;
    }
    if (c < 0x20 || c >= 0x80) return false;
    if (c == '\\' && (++p->at == p->end || !*p->at || !strchr("\"\\/bfnrt", *p->at))) return false; /* \u: a tree's */
  }
  return false;
}

static bool pass_word(struct pass *p, const char *word) {
  size_t n = strlen(word);
  if ((size_t)(p->end - p->at) < n || memcmp(p->at, word, n) != 0) return false;
  p->at += n;
  return true;
}

static bool is_digit(const struct pass *p) { return p->at < p->end && *p->at >= '0' && *p->at <= '9'; }

static bool pass_digits(struct pass *p, int most) {
  int n = 0;
  while (is_digit(p) && n <= most) {
    p->at++;
    n++;
  }
  return n > 0 && n <= most;
}

static bool pass_number(struct pass *p) {
  if (*p->at == '-') p->at++;
  if (!is_digit(p)) return false;
  if (*p->at == '0')
    p->at++;
  else if (!pass_digits(p, 18))
    return false;
  if (p->at < p->end && *p->at == '.') {
    p->at++;
    if (!pass_digits(p, 40)) return false;
  }
  if (p->at == p->end || (*p->at != 'e' && *p->at != 'E')) return true;
  p->at++;
  if (p->at < p->end && (*p->at == '-' || *p->at == '+')) p->at++;
  return pass_digits(p, 2);
}

/* Steps over any value. */
static bool pass_value(struct pass *p, int depth) {
  struct span s;
  if (depth > MAX_DEPTH) return false;
  if (next_is(p, '{')) {
    if (next_is(p, '}')) return true;
    do {
      if (!pass_string(p, &s) || !next_is(p, ':') || !pass_value(p, depth + 1)) return false;
    } while (next_is(p, ','));
    return next_is(p, '}');
  }
  if (next_is(p, '[')) {
    if (next_is(p, ']')) return true;
    do {
      if (!pass_value(p, depth + 1)) return false;
    } while (next_is(p, ','));
    return next_is(p, ']');
  }
  if (at_end(p)) return false;
  switch (*p->at) {
    case '"': return pass_string(p, &s);
    case 't': return pass_word(p, "true");
    case 'f': return pass_word(p, "false");
    case 'n': return pass_word(p, "null");
    default: return pass_number(p);
  }
}

/* Members by name: `member` takes the value of number i in `names`; others are stepped over. */
struct plain;
static bool pass_object(struct pass *p, const char *const *names, struct plain *into,
                        bool (*member)(struct pass *p, int i, struct plain *into)) {
  unsigned seen = 0;
  if (!next_is(p, '{')) return false;
  if (next_is(p, '}')) return true;
  do {
    struct span name;
    if (!pass_string(p, &name) || memchr(name.data, '\\', name.len) || !next_is(p, ':')) return false;
    int i = 0;
    while (names[i] && (strlen(names[i]) != name.len || memcmp(names[i], name.data, name.len) != 0)) i++;
    if (names[i] && seen & 1u << i) return false; /* the tree keeps the last of two */
    seen |= 1u << i;
    if (!(names[i] ? member(p, i, into) : pass_value(p, 0))) return false;
  } while (next_is(p, ','));
  return next_is(p, '}');
}

struct plain {
  bool has_text, has_content, end; /* end: a finish_reason */
  size_t text_len;
};

/* The length of a string; other values count as none, as in the tree. */
static bool pass_length(struct pass *p, bool *is_string, size_t *len) {
  struct span s = {0};
  struct pass before = *p;
  *is_string = next_is(&before, '"');
  if (!*is_string) return pass_value(p, 0);
  if (!pass_string(p, &s)) return false;
  *len = s.len;
  return true;
}

static bool delta_member(struct pass *p, int i, struct plain *into) {
  bool is_string;
  size_t len = 0;
  (void)i;
  if (!pass_length(p, &is_string, &len)) return false;
  into->has_content = into->has_content || len > 0;
  return true;
}

static bool choice_member(struct pass *p, int i, struct plain *into) {
  static const char *const names[] = {"content", "reasoning_content", NULL};
  size_t len = 0;
  switch (i) {
    case 0: return pass_length(p, &into->has_text, &into->text_len) && into->has_text;
    case 1: return pass_object(p, names, into, delta_member);
    default: return pass_length(p, &into->end, &len);
  }
}

static bool event_member(struct pass *p, int i, struct plain *into) {
  static const char *const names[] = {"text", "delta", "finish_reason", NULL};
  if (i > 0) { /* error and usage */
    struct pass before = *p;
    return pass_value(p, 0) && next_is(&before, 'n');
  }
  if (!next_is(p, '[')) return false;
  if (next_is(p, ']')) return true;
  if (!pass_object(p, names, into, choice_member)) return false;
  while (next_is(p, ',')) {
    if (!pass_value(p, 0)) return false;
  }
  return next_is(p, ']');
}

bool qtr_load_chunk_read_plain(const char *data, size_t len, struct qtr_load_chunk *chunk) {
  static const char *const names[] = {"choices", "error", "usage", NULL};
  struct pass p = {data, data + len};
  struct plain plain = {0};
  if (!pass_object(&p, names, &plain, event_member) || !at_end(&p)) return false;
  *chunk = (struct qtr_load_chunk){.n_input = -1, .n_output = -1, .end = plain.end};
  chunk->token = plain.has_text ? plain.text_len > 0 || !plain.end : plain.has_content;
  return true;
}
