/* pattern.c - regular expressions of tokenizer.json (pattern.h). The reference runs them with Oniguruma and Unicode 16;
 * PCRE2 differs in the meaning of \s, \w, \h, \v, {,n}, {n}+ and in the age of its tables. A translator rewrites these, and
 * refuses by name what it does not know, so that no pattern silently means something else. Matching is bounded by PCRE2's
 * limits. */
#define PCRE2_CODE_UNIT_WIDTH 8

#include "text/pattern.h"

#include "base/checked.h"
#include "base/status.h"
#include "text/tokenizer.h"
#include "text/unicode.h"
#include "text/vocab.h"

#include <pcre2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_REGEX_BYTES = 16384, MAX_GROUP_DEPTH = 64 };

/* Inside brackets. White_Space; PCRE2's own \s has U+180E too. */
#define SPACE "\\x09-\\x0d\\x20\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
#define NOT_SPACE                                                                                             \
  "\\x00-\\x08\\x0e-\\x1f\\x21-\\x{84}\\x{86}-\\x{9f}\\x{a1}-\\x{167f}\\x{1681}-\\x{1fff}\\x{200b}-\\x{2027}" \
  "\\x{202a}-\\x{202e}\\x{2030}-\\x{205e}\\x{2060}-\\x{2fff}\\x{3001}-\\x{10ffff}"
#define WORD "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}"
#define RECENT_HAN "\\x{2ebf0}-\\x{2ee5d}\\x{31350}-\\x{323af}"

struct translator {
  const char *in;
  size_t len, at;
  struct qtr_text out;
  size_t atom;                        /* where the last atom starts in out, for {n,m}+ */
  size_t group_atom[MAX_GROUP_DEPTH]; /* where each open group starts in out */
  size_t depth;
  struct qtr_error *err;
};

static enum qtr_status put(struct translator *t, const char *text) {
  return qtr_text_append(&t->out, text, strlen(text), t->err);
}

static enum qtr_status copy(struct translator *t, size_t n) {
  enum qtr_status status = qtr_text_append(&t->out, t->in + t->at, n, t->err);
  t->at += n;
  return status;
}

static enum qtr_status refuse(struct translator *t, const char *what) {
  return qtr_fail(t->err, QTR_ERR_UNSUPPORTED, "regular expression, byte %zu: %s is not supported", t->at, what);
}

static int peek(const struct translator *t, size_t ahead) {
  return t->len - t->at > ahead ? (unsigned char)t->in[t->at + ahead] : -1;
}

/* Ranges of the code points that PCRE2 may not know yet and that have a general category starting with `name`. */
static enum qtr_status put_recent(struct translator *t, const char *name) {
  enum qtr_status status = QTR_OK;
  for (size_t i = 0; i < qtr_n_unicode_recent && !status; i++) {
    const struct qtr_unicode_recent *r = &qtr_unicode_recent[i];
    if (strncmp(r->category, name, strlen(name)) != 0) continue;
    uint32_t last = r->last;
    while (i + 1 < qtr_n_unicode_recent && qtr_unicode_recent[i + 1].first == last + 1 &&
           strncmp(qtr_unicode_recent[i + 1].category, name, strlen(name)) == 0) {
      last = qtr_unicode_recent[++i].last;
    }
    char range[40];
    (void)snprintf(range, sizeof range, last > r->first ? "\\x{%x}-\\x{%x}" : "\\x{%x}", (unsigned)r->first, (unsigned)last);
    status = put(t, range);
  }
  return status;
}

/* \p{...} or \P{...}; t->at is at the backslash. */
static enum qtr_status translate_property(struct translator *t, bool in_class) {
  bool negated = peek(t, 1) == 'P';
  char name[32] = {0};
  size_t n = 0, at = t->at + 2;
  if (peek(t, 2) != '{') return refuse(t, "\\p without braces");
  at++;
  if (at < t->len && t->in[at] == '^') {
    negated = !negated;
    at++;
  }
  while (at < t->len && t->in[at] != '}') {
    char c = t->in[at++];
    bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
    if (!plain || n + 1 == sizeof name) return refuse(t, "this \\p{...}");
    name[n++] = c;
  }
  if (n == 0 || at == t->len) return refuse(t, "this \\p{...}");
  bool is_category = strchr("LMNPSZC", name[0]) && (n == 1 || (n == 2 && name[1] >= 'a' && name[1] <= 'z'));
  if (negated && in_class) return refuse(t, "a negated property in brackets");
  char item[64];
  (void)snprintf(item, sizeof item, "%s\\p{%s%s}", in_class ? "" : negated ? "[^" : "[", is_category ? "" : "sc:", name);
  enum qtr_status status = put(t, item);
  if (!status && is_category) status = put_recent(t, name);
  if (!status && strcmp(name, "Han") == 0) status = put(t, RECENT_HAN);
  if (!status && !in_class) status = put(t, "]");
  t->at = at + 1;
  return status;
}

/* \uHHHH; t->at is at the backslash. */
static enum qtr_status translate_code_point(struct translator *t) {
  char item[16] = "\\x{";
  for (size_t i = 0; i < 4; i++) {
    int c = peek(t, 2 + i);
    bool hex = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
    if (!hex) return refuse(t, "\\u without four hexadecimal digits");
    item[3 + i] = (char)c;
  }
  item[7] = '}';
  t->at += 6;
  return put(t, item);
}

static enum qtr_status put_escape(struct translator *t, const char *text) {
  t->at += 2;
  return put(t, text);
}

/* `open`, the members of \w or \d, `close`. */
static enum qtr_status put_set(struct translator *t, const char *open, int escape, const char *close) {
  enum qtr_status status = put(t, open);
  if (!status) status = put(t, escape == 'w' ? WORD : "\\p{Nd}");
  if (!status) status = put_recent(t, "Nd");
  if (!status && escape == 'w') status = put_recent(t, "L");
  if (!status && escape == 'w') status = put_recent(t, "M");
  return status ? status : put(t, close);
}

static enum qtr_status translate_boundary(struct translator *t) {
  enum qtr_status status = put_set(t, "(?:(?<=[", 'w', "])");
  if (!status) status = put_set(t, "(?![", 'w', "])|");
  if (!status) status = put_set(t, "(?<![", 'w', "])");
  return status ? status : put_set(t, "(?=[", 'w', "]))");
}

static enum qtr_status translate_escape(struct translator *t, bool in_class) {
  int c = peek(t, 1);
  if (c < 0) return refuse(t, "a backslash at the end");
  switch (c) {
    case 'p':
    case 'P': return translate_property(t, in_class);
    case 'u': return translate_code_point(t);
    case 's': return put_escape(t, in_class ? SPACE : "[" SPACE "]");
    case 'S': return put_escape(t, in_class ? NOT_SPACE : "[^" SPACE "]");
    case 'h': return put_escape(t, in_class ? "0-9a-fA-F" : "[0-9a-fA-F]");
    case 'v': return put_escape(t, "\\x0b");
    case 'w':
    case 'd': t->at += 2; return put_set(t, in_class ? "" : "[", c, in_class ? "" : "]");
    case 'W':
    case 'D':
      if (in_class) return refuse(t, "\\D or \\W in brackets");
      t->at += 2;
      return put_set(t, "[^", c == 'W' ? 'w' : 'd', "]");
    case 'b':
      if (in_class) return put_escape(t, "\\x08");
      t->at += 2;
      return translate_boundary(t);
    case 'x': {
      size_t n = 2;
      if (peek(t, 2) == '{') {
        while (peek(t, n) != '}') {
          if (peek(t, n) < 0 || n > 12) return refuse(t, "this \\x{...}");
          n++;
        }
        return copy(t, n + 1);
      }
      if (peek(t, 2) >= '8') return refuse(t, "\\x above 7f without braces");
      while (n < 4 && peek(t, n) >= 0 && strchr("0123456789abcdefABCDEF", peek(t, n))) n++;
      return copy(t, n);
    }
    default: break;
  }
  bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
  if (letter && !strchr(in_class ? "nrtfae0" : "nrtfae0AzZ", c)) return refuse(t, "this escape");
  return copy(t, 1 + qtr_utf8_length((uint8_t)c));
}

static enum qtr_status translate_class(struct translator *t) {
  enum qtr_status status = copy(t, 1);
  if (!status && peek(t, 0) == '^') status = copy(t, 1);
  bool first = true;
  while (!status) {
    int c = peek(t, 0);
    if (c < 0) return refuse(t, "a bracket that is not closed");
    if (c == ']' && !first) return copy(t, 1);
    if (c == '[') return refuse(t, "a bracket in brackets");
    if (c == '&' && peek(t, 1) == '&') return refuse(t, "&& in brackets");
    status = c == '\\' ? translate_escape(t, true) : copy(t, qtr_utf8_length((uint8_t)c));
    first = false;
  }
  return status;
}

/* "(" and what follows up to the content of the group; Oniguruma's option m is PCRE2's s. */
static enum qtr_status translate_group(struct translator *t) {
  if (t->depth == MAX_GROUP_DEPTH) return refuse(t, "this depth of groups");
  size_t start = t->out.len;
  if (peek(t, 1) == '*') return refuse(t, "(*");
  if (peek(t, 1) != '?') {
    t->group_atom[t->depth++] = start;
    return copy(t, 1);
  }
  int c = peek(t, 2);
  if (c == ':' || c == '=' || c == '!' || c == '>') {
    t->group_atom[t->depth++] = start;
    return copy(t, 3);
  }
  if (c == '<' && (peek(t, 3) == '=' || peek(t, 3) == '!')) {
    t->group_atom[t->depth++] = start;
    return copy(t, 4);
  }
  enum qtr_status status = copy(t, 2);
  while (!status) {
    c = peek(t, 0);
    if (c == 'i' || c == 'x' || c == '-') {
      status = copy(t, 1);
    } else if (c == 'm') {
      t->at++;
      status = put(t, "s");
    } else if (c == ':') {
      t->group_atom[t->depth++] = start;
      return copy(t, 1);
    } else if (c == ')') {
      t->atom = start;
      return copy(t, 1);
    } else {
      return refuse(t, "this kind of group");
    }
  }
  return status;
}

/* {n}, {n,}, {n,m}, {,m}: how long it is, 0 when the brace is a literal. */
static size_t interval_length(const struct translator *t) {
  size_t n = 1, digits = 0;
  while (peek(t, n) >= '0' && peek(t, n) <= '9') n++, digits++;
  if (peek(t, n) == ',') {
    n++;
    while (peek(t, n) >= '0' && peek(t, n) <= '9') n++, digits++;
  }
  return digits > 0 && peek(t, n) == '}' ? n + 1 : 0;
}

static enum qtr_status translate_interval(struct translator *t, size_t n) {
  enum qtr_status status = QTR_OK;
  size_t atom = t->atom;
  if (peek(t, 1) == ',') {
    t->at++;
    n--;
    status = put(t, "{0");
  }
  if (!status) status = copy(t, n);
  if (status || peek(t, 0) != '+') return status;
  /* Possessive for PCRE2; for Oniguruma one repetition of another. */
  size_t n_atom = t->out.len - atom;
  if ((status = put(t, "(?:)"))) return status;
  memmove(t->out.data + atom + 3, t->out.data + atom, n_atom);
  memcpy(t->out.data + atom, "(?:", 3);
  t->out.data[t->out.len - 1] = ')';
  return QTR_OK;
}

static enum qtr_status translate(struct translator *t) {
  enum qtr_status status = QTR_OK;
  while (!status && t->at < t->len) {
    char c = t->in[t->at];
    size_t start = t->out.len;
    if (c == '(') {
      status = translate_group(t);
      continue;
    }
    if (c == ')') {
      if (t->depth == 0) return refuse(t, "a ) without (");
      t->atom = t->group_atom[--t->depth];
      status = copy(t, 1);
      continue;
    }
    size_t interval = c == '{' ? interval_length(t) : 0;
    if (interval > 0) {
      status = translate_interval(t, interval);
      continue;
    }
    if (c != '*' && c != '+' && c != '?') t->atom = start;
    status = c == '\\' ? translate_escape(t, false) : c == '[' ? translate_class(t) : copy(t, qtr_utf8_length((uint8_t)c));
  }
  if (!status && t->depth > 0) return refuse(t, "a ( that is not closed");
  return status;
}

enum qtr_status qtr_pattern_compile(const char *regex, size_t len, struct qtr_pattern *pattern, struct qtr_error *err) {
  *pattern = (struct qtr_pattern){0};
  if (len > MAX_REGEX_BYTES) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "a regular expression of %zu bytes; at most %d are supported", len,
                    MAX_REGEX_BYTES);
  }
  struct translator t = {.in = regex, .len = len, .err = err};
  enum qtr_status status = put(&t, "");
  if (!status) status = translate(&t);
  pcre2_compile_context *context = status ? NULL : pcre2_compile_context_create(NULL);
  if (!status && !context) status = qtr_fail_memory(err, "a regular expression", len);
  if (status) goto done;
  (void)pcre2_set_newline(context, PCRE2_NEWLINE_LF);
  (void)pcre2_set_parens_nest_limit(context, 2 * MAX_GROUP_DEPTH);
  int code;
  PCRE2_SIZE at;
  uint32_t options = PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C | PCRE2_NO_UTF_CHECK;
  pcre2_code *compiled = pcre2_compile((PCRE2_SPTR)t.out.data, t.out.len, options, &code, &at, context);
  if (!compiled) {
    PCRE2_UCHAR message[160];
    (void)pcre2_get_error_message(code, message, sizeof message);
    char shown[200];
    status = qtr_fail(err, QTR_ERR_FORMAT, "regular expression \"%s\": %s", qtr_printable(regex, len, shown, sizeof shown),
                      (const char *)message);
    goto done;
  }
  (void)pcre2_jit_compile(compiled, PCRE2_JIT_COMPLETE); /* where there is no JIT, pcre2_match interprets */
  pattern->code = compiled;
done:
  pcre2_compile_context_free(context);
  qtr_text_free(&t.out);
  return status;
}

enum qtr_status qtr_pattern_set_literal(const char *text, size_t len, struct qtr_pattern *pattern, struct qtr_error *err) {
  *pattern = (struct qtr_pattern){.literal = malloc(len + 1), .literal_len = len};
  if (!pattern->literal) return qtr_fail_memory(err, "a pattern", len + 1);
  memcpy(pattern->literal, text, len);
  pattern->literal[len] = 0;
  return QTR_OK;
}

enum qtr_status qtr_pattern_from_json(const json_t *json, const char *where, struct qtr_pattern *pattern,
                                      struct qtr_error *err) {
  const json_t *string = json_object_get(json, "String"), *regex = json_object_get(json, "Regex");
  *pattern = (struct qtr_pattern){0};
  enum qtr_status status;
  if (json_is_string(string)) {
    status = qtr_pattern_set_literal(json_string_value(string), json_string_length(string), pattern, err);
  } else if (json_is_string(regex)) {
    status = qtr_pattern_compile(json_string_value(regex), json_string_length(regex), pattern, err);
  } else {
    return qtr_fail(err, QTR_ERR_FORMAT, "%s: the pattern must be {\"String\": ...} or {\"Regex\": ...}", where);
  }
  if (status && err) (void)qtr_error_prefix(err, "%s", where);
  return status;
}

void qtr_pattern_free(struct qtr_pattern *pattern) {
  pcre2_code_free(pattern->code);
  free(pattern->literal);
  *pattern = (struct qtr_pattern){0};
}

void qtr_pattern_scratch_free(struct qtr_pattern_scratch *scratch) {
  pcre2_match_data_free(scratch->match_data);
  pcre2_match_context_free(scratch->match_context);
  pcre2_jit_stack_free(scratch->jit_stack);
  *scratch = (struct qtr_pattern_scratch){0};
}

static enum qtr_status make_scratch(struct qtr_pattern_scratch *scratch, struct qtr_error *err) {
  scratch->match_data = pcre2_match_data_create(1, NULL);
  scratch->match_context = pcre2_match_context_create(NULL);
  scratch->jit_stack = pcre2_jit_stack_create(32768, 4 << 20, NULL);
  if (!scratch->match_data || !scratch->match_context) return qtr_fail_memory(err, "pattern matching", 4096);
  if (scratch->jit_stack) pcre2_jit_stack_assign(scratch->match_context, NULL, scratch->jit_stack);
  (void)pcre2_set_heap_limit(scratch->match_context, 256 << 10); /* KiB, for the interpreter */
  return QTR_OK;
}

enum qtr_status qtr_pattern_find(const struct qtr_pattern *pattern, struct qtr_pattern_scratch *scratch, const char *text,
                                 size_t len, size_t from, bool *found, size_t *begin, size_t *end, struct qtr_error *err) {
  *found = false;
  if (!pattern->code) {
    if (pattern->literal_len == 0 || len - from < pattern->literal_len) return QTR_OK;
    const char *hit = qtr_text_find(text + from, len - from, pattern->literal, pattern->literal_len);
    if (!hit) return QTR_OK;
    *found = true;
    *begin = (size_t)(hit - text);
    *end = *begin + pattern->literal_len;
    return QTR_OK;
  }
  if (!scratch->match_context) {
    enum qtr_status status = make_scratch(scratch, err);
    if (status) return status;
  }
  /* Linear patterns stay far below; an exponential one ends here with an error. */
  (void)pcre2_set_match_limit(scratch->match_context, (uint32_t)QTR_MIN((size_t)5000000 + 8 * len, UINT32_MAX));
  int rc = pcre2_match(pattern->code, (PCRE2_SPTR)text, len, from, PCRE2_NO_UTF_CHECK, scratch->match_data,
                       scratch->match_context);
  if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {
    rc = pcre2_match(pattern->code, (PCRE2_SPTR)text, len, from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, scratch->match_data,
                     scratch->match_context);
  }
  if (rc == PCRE2_ERROR_NOMATCH) return QTR_OK;
  if (rc < 0) {
    PCRE2_UCHAR message[160];
    (void)pcre2_get_error_message(rc, message, sizeof message);
    return qtr_fail(err, QTR_ERR_LIMIT, "a pattern of the tokenizer gave up on this text: %s", (const char *)message);
  }
  const PCRE2_SIZE *offsets = pcre2_get_ovector_pointer(scratch->match_data);
  *found = true;
  *begin = offsets[0];
  *end = offsets[1];
  return QTR_OK;
}
