/* template_lexer.c - splits a template into text and tokens, with jinja2's whitespace rules: trim_blocks (the newline after
 * a block tag goes), lstrip_blocks (blanks before a block tag at the start of a line go), "-" and "+" signs in tags, one
 * newline at the end of the source goes, \r\n and \r become \n. */
#include "text/template_internal.h"

#include <stdlib.h>

#define MAX_BRACKETS 256

struct lexer {
  struct arena *arena;
  struct qtr_error *err;
  const char *s; /* (n) normalised source, in the arena */
  size_t n, pos;
  int32_t line;
  bool line_starting; /* the last thing read ended with a newline, or nothing was read */
  struct token *tokens;
  size_t n_tokens, capacity;
  enum qtr_status status;
};

static bool fail(struct lexer *lx, enum qtr_status status, const char *what) {
  lx->status = qtr_fail(lx->err, status, "template line %d: %s", (int)lx->line, what);
  return false;
}

static bool at(const struct lexer *lx, size_t pos, const char *text) {
  size_t len = strlen(text);
  return pos <= lx->n && len <= lx->n - pos && memcmp(lx->s + pos, text, len) == 0;
}

static void advance(struct lexer *lx, size_t to) {
  for (size_t i = lx->pos; i < to; i++) lx->line += lx->s[i] == '\n';
  lx->pos = to;
}

static size_t skip_space(const struct lexer *lx, size_t pos) {
  while (pos < lx->n) {
    uint32_t cp;
    size_t len = qtr_tpl_decode(lx->s + pos, lx->n - pos, &cp);
    if (!qtr_tpl_is_space(cp)) break;
    pos += len;
  }
  return pos;
}

static bool push(struct lexer *lx, enum token_type type, const char *text, size_t len) {
  if (lx->n_tokens == lx->capacity) {
    size_t capacity = lx->capacity ? lx->capacity * 2 : 256;
    struct token *grown = realloc(lx->tokens, capacity * sizeof *grown);
    if (!grown) {
      lx->status = qtr_fail_memory(lx->err, "template tokens", capacity * sizeof *grown);
      return false;
    }
    lx->tokens = grown;
    lx->capacity = capacity;
  }
  lx->tokens[lx->n_tokens++] = (struct token){.type = (uint8_t)type, .line = lx->line, .text = text, .len = len};
  return true;
}

/* Text before a tag: sign is '-', '+' or 0; lstrip says that the tag is not a print tag. */
static bool push_data(struct lexer *lx, size_t end, char sign, bool lstrip) {
  size_t start = lx->pos, len = end - start;
  const char *text = lx->s + start;
  if (sign == '-') {
    size_t keep = 0;
    for (size_t i = 0; i < len;) {
      uint32_t cp;
      i += qtr_tpl_decode(text + i, len - i, &cp);
      if (!qtr_tpl_is_space(cp)) keep = i;
    }
    len = keep;
  } else if (sign != '+' && lstrip) {
    size_t line_start = len;
    while (line_start > 0 && text[line_start - 1] != '\n') line_start--;
    if ((line_start > 0 || lx->line_starting) && skip_space(lx, start + line_start) >= end) len = line_start;
  }
  if (len > 0 && !push(lx, T_DATA, text, len)) return false;
  advance(lx, end);
  return true;
}

/* Length of "{%" sign* word, or 0. */
static size_t match_word_tag(const struct lexer *lx, size_t pos, const char *word, char *sign, size_t *end_word) {
  if (!at(lx, pos, "{%")) return 0;
  size_t p = pos + 2;
  *sign = 0;
  if (p < lx->n && (lx->s[p] == '-' || lx->s[p] == '+')) *sign = lx->s[p++];
  p = skip_space(lx, p);
  if (!at(lx, p, word)) return 0;
  *end_word = skip_space(lx, p + strlen(word));
  return *end_word - pos;
}

static void finish_tag(struct lexer *lx, size_t end) {
  advance(lx, end);
  lx->line_starting = end > 0 && lx->s[end - 1] == '\n';
}

static size_t after_newline(const struct lexer *lx, size_t pos) { return pos < lx->n && lx->s[pos] == '\n' ? pos + 1 : pos; }

static bool lex_raw(struct lexer *lx, size_t body) {
  finish_tag(lx, body);
  for (size_t p = lx->pos; p < lx->n; p++) {
    char sign;
    size_t q;
    if (lx->s[p] != '{' || !match_word_tag(lx, p, "endraw", &sign, &q)) continue;
    size_t end;
    if (at(lx, q, "+%}")) {
      end = q + 3;
    } else if (at(lx, q, "-%}")) {
      end = skip_space(lx, q + 3);
    } else if (at(lx, q, "%}")) {
      end = after_newline(lx, q + 2);
    } else {
      continue;
    }
    if (!push_data(lx, p, sign, true)) return false;
    finish_tag(lx, end);
    return true;
  }
  return fail(lx, QTR_ERR_FORMAT, "{% raw %} without {% endraw %}");
}

static bool lex_comment(struct lexer *lx) {
  for (size_t p = lx->pos; p < lx->n; p++) {
    size_t end;
    if (at(lx, p, "+#}")) {
      end = p + 3;
    } else if (at(lx, p, "-#}")) {
      end = skip_space(lx, p + 3);
    } else if (at(lx, p, "#}")) {
      end = after_newline(lx, p + 2);
    } else {
      continue;
    }
    finish_tag(lx, end);
    return true;
  }
  return fail(lx, QTR_ERR_FORMAT, "comment without an end: write #}");
}

static bool is_digit(char c) { return c >= '0' && c <= '9'; }

/* (\d+_)*\d+ from pos: end, or pos when there is none. */
static size_t skip_digits(const struct lexer *lx, size_t pos) {
  size_t p = pos;
  while (p < lx->n && (is_digit(lx->s[p]) ||
                       (lx->s[p] == '_' && p > pos && is_digit(lx->s[p - 1]) && p + 1 < lx->n && is_digit(lx->s[p + 1])))) {
    p++;
  }
  return p;
}

static bool lex_number(struct lexer *lx) {
  size_t start = lx->pos, whole = skip_digits(lx, start), end = whole;
  bool is_float = false;
  if (start == 0 || lx->s[start - 1] != '.') {
    if (end + 1 < lx->n && lx->s[end] == '.' && is_digit(lx->s[end + 1])) {
      end = skip_digits(lx, end + 1);
      is_float = true;
    }
    if (end < lx->n && (lx->s[end] == 'e' || lx->s[end] == 'E')) {
      size_t p = end + 1;
      if (p < lx->n && (lx->s[p] == '+' || lx->s[p] == '-')) p++;
      size_t q = skip_digits(lx, p);
      if (q > p) {
        end = q;
        is_float = true;
      }
    }
  }
  if (is_float) {
    double f;
    if (!qtr_tpl_parse_float(lx->s + start, end - start, &f))
      return fail(lx, QTR_ERR_FORMAT, "a number that cannot be read");
    if (!push(lx, T_FLOAT, NULL, 0)) return false;
    lx->tokens[lx->n_tokens - 1].f = f;
    lx->pos = end;
    return true;
  }
  int base = 10;
  end = whole;
  if (lx->s[start] == '0' && start + 1 < lx->n) {
    char c = (char)(lx->s[start + 1] | 0x20);
    base = c == 'x' ? 16 : c == 'o' ? 8 : c == 'b' ? 2 : 10;
  }
  if (base != 10) {
    end = start + 2;
    while (end < lx->n && (is_digit(lx->s[end]) || lx->s[end] == '_' ||
                           (base == 16 && ((lx->s[end] | 0x20) >= 'a' && (lx->s[end] | 0x20) <= 'f')))) {
      end++;
    }
  }
  int64_t i;
  if (!qtr_tpl_parse_int(lx->s + start, end - start, base == 10 ? 10 : 0, &i)) {
    return fail(lx, QTR_ERR_UNSUPPORTED, "an integer that is malformed or does not fit in 64 bits");
  }
  if (base == 10 && whole - start > 1 && lx->s[start] == '0' && i != 0) {
    return fail(lx, QTR_ERR_FORMAT, "an integer may not start with 0");
  }
  if (!push(lx, T_INTEGER, NULL, 0)) return false;
  lx->tokens[lx->n_tokens - 1].i = i;
  lx->pos = end;
  return true;
}

static int hex_value(char c) {
  if (is_digit(c)) return c - '0';
  char lower = (char)(c | 0x20);
  return lower >= 'a' && lower <= 'f' ? lower - 'a' + 10 : -1;
}

/* One escape after the backslash at s[i]: writes to out, returns the bytes read, 0 for an error. */
static size_t unescape(const char *s, size_t n, char *out, size_t *n_out) {
  static const char plain[] = "\\\\''\"\"a\ab\bf\fn\nr\rt\tv\v";
  for (size_t k = 0; k + 1 < sizeof plain; k += 2) {
    if (s[0] == plain[k]) {
      out[(*n_out)++] = plain[k + 1];
      return 1;
    }
  }
  if (s[0] == '\n') return 1;
  uint32_t cp = 0;
  size_t used = 1;
  if (s[0] >= '0' && s[0] <= '7') {
    for (used = 0; used < 3 && used < n && s[used] >= '0' && s[used] <= '7'; used++) cp = cp * 8 + (uint32_t)(s[used] - '0');
  } else if (s[0] == 'x' || s[0] == 'u' || s[0] == 'U') {
    size_t digits = s[0] == 'x' ? 2 : s[0] == 'u' ? 4 : 8;
    if (n < 1 + digits) return 0;
    for (; used <= digits; used++) {
      int h = hex_value(s[used]);
      if (h < 0) return 0;
      cp = cp * 16 + (uint32_t)h;
    }
    if (cp > 0x10ffff || (cp >= 0xd800 && cp < 0xe000)) return 0;
  } else if (s[0] == 'N') {
    return 0;
  } else { /* not an escape: the backslash stays */
    out[(*n_out)++] = '\\';
    return (size_t)-1;
  }
  char utf8[4];
  size_t len = qtr_tpl_encode(cp, utf8);
  memcpy(out + *n_out, utf8, len);
  *n_out += len;
  return used;
}

static bool lex_string(struct lexer *lx) {
  char quote = lx->s[lx->pos];
  size_t start = lx->pos + 1, end = start;
  bool escaped = false;
  while (end < lx->n && lx->s[end] != quote) {
    if (lx->s[end] == '\\') {
      escaped = true;
      end++;
    }
    end++;
  }
  if (end >= lx->n) return fail(lx, QTR_ERR_FORMAT, "a string without its closing quote");
  const char *text = lx->s + start;
  size_t len = end - start;
  if (escaped) {
    char *out = qtr_tpl_arena_alloc(lx->arena, len + 1);
    if (!out) return fail(lx, QTR_ERR_LIMIT, "the template needs too much memory");
    size_t n_out = 0;
    for (size_t i = 0; i < len;) {
      if (text[i] != '\\') {
        out[n_out++] = text[i++];
        continue;
      }
      size_t used = unescape(text + i + 1, len - i - 1, out, &n_out);
      if (used == 0) return fail(lx, QTR_ERR_FORMAT, "a string escape that is malformed, a surrogate or \\N{…}");
      i += used == (size_t)-1 ? 1 : 1 + used;
    }
    text = out;
    len = n_out;
  }
  if (!push(lx, T_STRING, text, len)) return false;
  advance(lx, end + 1);
  return true;
}

static bool lex_operator(struct lexer *lx, char *brackets, size_t *n_brackets) {
  static const struct {
    char text[3];
    enum token_type type;
  } operators[] = {{"//", T_FLOORDIV}, {"**", T_POW},     {"==", T_EQ},    {"!=", T_NE},    {">=", T_GTEQ},  {"<=", T_LTEQ},
                   {"+", T_ADD},       {"-", T_SUB},      {"/", T_DIV},    {"*", T_MUL},    {"%", T_MOD},    {"~", T_TILDE},
                   {"[", T_LBRACKET},  {"]", T_RBRACKET}, {"(", T_LPAREN}, {")", T_RPAREN}, {"{", T_LBRACE}, {"}", T_RBRACE},
                   {">", T_GT},        {"<", T_LT},       {"=", T_ASSIGN}, {".", T_DOT},    {":", T_COLON},  {"|", T_PIPE},
                   {",", T_COMMA},     {";", T_SEMICOLON}};
  for (size_t k = 0; k < sizeof operators / sizeof *operators; k++) {
    if (!at(lx, lx->pos, operators[k].text)) continue;
    char c = lx->s[lx->pos];
    if (c == '(' || c == '[' || c == '{') {
      if (*n_brackets == MAX_BRACKETS) return fail(lx, QTR_ERR_LIMIT, "brackets are nested too deeply");
      brackets[(*n_brackets)++] = c == '(' ? ')' : c == '[' ? ']' : '}';
    } else if (c == ')' || c == ']' || c == '}') {
      if (*n_brackets == 0 || brackets[--*n_brackets] != c)
        return fail(lx, QTR_ERR_FORMAT, "a closing bracket that matches none");
    }
    if (!push(lx, operators[k].type, lx->s + lx->pos, strlen(operators[k].text))) return false;
    lx->pos += strlen(operators[k].text);
    return true;
  }
  char what[64], shown[8];
  (void)snprintf(what, sizeof what, "unexpected character '%s'", qtr_printable(lx->s + lx->pos, 1, shown, sizeof shown));
  return fail(lx, QTR_ERR_FORMAT, what);
}

/* The inside of {{ … }} or {% … %}, up to and with its end. */
static bool lex_tag(struct lexer *lx, bool block) {
  char brackets[MAX_BRACKETS];
  size_t n_brackets = 0;
  while (lx->pos < lx->n) {
    if (n_brackets == 0) {
      size_t end = 0;
      const char *close = block ? "%}" : "}}";
      if (block && at(lx, lx->pos, "+%}")) {
        end = lx->pos + 3;
      } else if (lx->s[lx->pos] == '-' && at(lx, lx->pos + 1, close)) {
        end = skip_space(lx, lx->pos + 3);
      } else if (at(lx, lx->pos, close)) {
        end = block ? after_newline(lx, lx->pos + 2) : lx->pos + 2;
      }
      if (end) {
        if (!push(lx, block ? T_BLOCK_END : T_VARIABLE_END, NULL, 0)) return false;
        finish_tag(lx, end);
        return true;
      }
    }
    size_t space = skip_space(lx, lx->pos);
    if (space > lx->pos) {
      advance(lx, space);
      continue;
    }
    char c = lx->s[lx->pos];
    uint32_t cp;
    size_t len = qtr_tpl_decode(lx->s + lx->pos, lx->n - lx->pos, &cp);
    bool ok;
    if (is_digit(c)) {
      ok = lex_number(lx);
    } else if (c == '"' || c == '\'') {
      ok = lex_string(lx);
    } else if (qtr_tpl_is_identifier(cp, true)) {
      size_t end = lx->pos;
      do {
        end += len;
        len = end < lx->n ? qtr_tpl_decode(lx->s + end, lx->n - end, &cp) : 0;
      } while (len && qtr_tpl_is_identifier(cp, false));
      ok = push(lx, T_NAME, lx->s + lx->pos, end - lx->pos);
      lx->pos = end;
    } else {
      ok = lex_operator(lx, brackets, &n_brackets);
    }
    if (!ok) return false;
  }
  return fail(lx, QTR_ERR_FORMAT, block ? "the template ends inside {% … %}" : "the template ends inside {{ … }}");
}

static bool lex_root(struct lexer *lx) {
  while (lx->pos < lx->n) {
    size_t tag = lx->pos;
    while (tag < lx->n && !(lx->s[tag] == '{' && (at(lx, tag, "{{") || at(lx, tag, "{%") || at(lx, tag, "{#")))) tag++;
    if (tag == lx->n) return push_data(lx, tag, '+', false);
    char sign = 0;
    size_t word, body = 0;
    if (match_word_tag(lx, tag, "raw", &sign, &word)) {
      body = at(lx, word, "-%}") ? skip_space(lx, word + 3) : at(lx, word, "%}") ? word + 2 : 0;
    }
    if (body) {
      if (!push_data(lx, tag, sign, true) || !lex_raw(lx, body)) return false;
      continue;
    }
    char kind = lx->s[tag + 1];
    sign = tag + 2 < lx->n ? lx->s[tag + 2] : 0;
    if (sign != '-' && sign != '+') sign = 0;
    if (!push_data(lx, tag, sign, kind != '{')) return false;
    lx->pos = tag + 2 + (sign != 0);
    bool ok;
    if (kind == '#') {
      ok = lex_comment(lx);
    } else {
      ok = push(lx, kind == '%' ? T_BLOCK_BEGIN : T_VARIABLE_BEGIN, NULL, 0) && lex_tag(lx, kind == '%');
    }
    if (!ok) return false;
  }
  return true;
}

enum qtr_status qtr_tpl_lex(struct arena *arena, const char *source, size_t len, struct token **tokens, size_t *n_tokens,
                            struct qtr_error *err) {
  *tokens = NULL;
  *n_tokens = 0;
  if (len > TPL_MAX_SOURCE) {
    return qtr_fail(err, QTR_ERR_LIMIT, "template of %zu bytes: at most %zu are read", len, TPL_MAX_SOURCE);
  }
  size_t offset;
  if (!qtr_tpl_is_utf8(source, len, &offset)) {
    return qtr_fail(err, QTR_ERR_FORMAT, "template is not valid UTF-8 at byte %zu", offset);
  }
  char *s = qtr_tpl_arena_alloc(arena, len + 1);
  if (!s) return qtr_fail_memory(err, "template source", len);
  size_t n = 0;
  for (size_t i = 0; i < len; i++) {
    if (source[i] == '\r') {
      s[n++] = '\n';
      i += i + 1 < len && source[i + 1] == '\n';
    } else {
      s[n++] = source[i];
    }
  }
  if (n > 0 && s[n - 1] == '\n') n--;
  s[n] = 0;
  struct lexer lx = {.arena = arena, .err = err, .s = s, .n = n, .line = 1, .line_starting = true, .status = QTR_OK};
  if (!lex_root(&lx) || !push(&lx, T_EOF, NULL, 0)) {
    free(lx.tokens);
    return lx.status;
  }
  *tokens = lx.tokens;
  *n_tokens = lx.n_tokens;
  return QTR_OK;
}
