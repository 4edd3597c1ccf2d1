/* template_format.c - values as text: str(), repr(), json.dumps, Python's shortest floats, and reading numbers from text.
 * Numbers go through the C library's formatting with its decimal point taken out: the locale has no say. */
#include "text/template_internal.h"

#include <ctype.h>
#include <locale.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* ---- numbers --------------------------------------------------------------------------------- */

/* Python's repr(float): the fewest digits that read back as the same number. */
size_t qtr_tpl_float_repr(double f, char text[TPL_FLOAT_CHARS]) {
  if (isnan(f)) return (size_t)snprintf(text, TPL_FLOAT_CHARS, "nan");
  if (isinf(f)) return (size_t)snprintf(text, TPL_FLOAT_CHARS, f < 0 ? "-inf" : "inf");
  char tried[TPL_FLOAT_CHARS + 8], digits[24] = "0";
  for (int precision = 0; precision < 17; precision++) {
    (void)snprintf(tried, sizeof tried, "%.*e", precision, fabs(f));
    if (precision == 16 || strtod(tried, NULL) == fabs(f)) break;
  }
  char *e = strchr(tried, 'e');
  int exponent = atoi(e + 1), n = 0;
  for (const char *c = tried; c < e; c++) {
    if (*c >= '0' && *c <= '9' && n < 20) digits[n++] = *c;
  }
  while (n > 1 && digits[n - 1] == '0') n--;
  size_t at = 0;
  if (signbit(f)) text[at++] = '-';
  if (exponent < -4 || exponent >= 16) {
    text[at++] = digits[0];
    if (n > 1) text[at++] = '.';
    for (int i = 1; i < n; i++) text[at++] = digits[i];
    return at + (size_t)snprintf(text + at, TPL_FLOAT_CHARS - at, "e%c%02d", exponent < 0 ? '-' : '+', abs(exponent));
  }
  if (exponent < 0) {
    text[at++] = '0';
    text[at++] = '.';
    for (int i = -1; i > exponent; i--) text[at++] = '0';
    for (int i = 0; i < n; i++) text[at++] = digits[i];
  } else {
    for (int i = 0; i <= exponent || i < n; i++) {
      if (i == exponent + 1) text[at++] = '.';
      text[at++] = i < n ? digits[i] : '0';
    }
    if (n <= exponent + 1) {
      text[at++] = '.';
      text[at++] = '0';
    }
  }
  text[at] = 0;
  return at;
}

static void strip(const char **text, size_t *len) {
  uint32_t cp;
  while (*len > 0) {
    size_t n = qtr_tpl_decode(*text, *len, &cp);
    if (!qtr_tpl_is_space(cp)) break;
    *text += n;
    *len -= n;
  }
  while (*len > 0) {
    size_t n = 1;
    while (n < 4 && n < *len && ((uint8_t)(*text)[*len - n] & 0xc0) == 0x80) n++;
    (void)qtr_tpl_decode(*text + *len - n, n, &cp);
    if (!qtr_tpl_is_space(cp)) break;
    *len -= n;
  }
}

bool qtr_tpl_parse_float(const char *text, size_t len, double *f) {
  strip(&text, &len);
  char copy[400]; /* enough for every double written out; longer ones are refused */
  size_t n = 0;
  bool has_digit = false, only_letters = true;
  if (len == 0 || len > 300) return false;
  const char *point = localeconv()->decimal_point;
  for (size_t i = 0; i < len; i++) {
    char c = text[i];
    if (c == '_') {
      if (i == 0 || i + 1 == len || !isdigit((unsigned char)text[i - 1]) || !isdigit((unsigned char)text[i + 1]))
        return false;
      continue;
    }
    if (isdigit((unsigned char)c)) {
      has_digit = true;
      only_letters = false;
    } else if (c == '.') {
      size_t n_point = strlen(point);
      if (n + n_point >= sizeof copy) return false;
      memcpy(copy + n, point, n_point);
      n += n_point;
      only_letters = false;
      continue;
    } else if (c != '+' && c != '-' && !(c >= 'A' && c <= 'Z') && !(c >= 'a' && c <= 'z')) {
      return false;
    }
    copy[n++] = c;
  }
  copy[n] = 0;
  if (!has_digit) { /* the only words Python takes */
    const char *word = copy + (copy[0] == '+' || copy[0] == '-');
    static const char *const words[] = {"inf", "infinity", "nan"};
    bool known = false;
    for (size_t i = 0; i < 3; i++) known |= only_letters && strcasecmp(word, words[i]) == 0;
    if (!known) return false;
  } else if (strpbrk(copy, "xXpPnN")) { /* hexadecimal is C's, not Python's */
    return false;
  }
  char *end;
  *f = strtod(copy, &end);
  return *end == 0;
}

bool qtr_tpl_parse_int(const char *text, size_t len, int base, int64_t *i) {
  strip(&text, &len);
  size_t at = 0;
  bool negative = false;
  if (len == 0 || base < 0 || base == 1 || base > 36) return false;
  if (text[0] == '+' || text[0] == '-') negative = text[at++] == '-';
  char letter = at + 1 < len && text[at] == '0' ? (char)tolower((unsigned char)text[at + 1]) : 0;
  int prefix = letter == 'x' ? 16 : letter == 'o' ? 8 : letter == 'b' ? 2 : 0;
  if (prefix && (base == 0 || base == prefix)) {
    base = prefix;
    at += 2;
    if (at < len && text[at] == '_') at++;
  } else if (base == 0) {
    base = 10;
  }
  if (at == len) return false;
  int64_t value = 0;
  for (size_t k = at; k < len; k++) {
    int c = tolower((unsigned char)text[k]);
    if (c == '_') {
      if (k == at || k + 1 == len || text[k + 1] == '_') return false;
      continue;
    }
    int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'z' ? c - 'a' + 10 : 99;
    if (digit >= base) return false;
    if (__builtin_mul_overflow(value, (int64_t)base, &value) ||
        __builtin_add_overflow(value, (int64_t)(negative ? -digit : digit), &value)) {
      return false;
    }
  }
  *i = value;
  return true;
}

/* ---- str and repr ---------------------------------------------------------------------------- */

static void write_string_repr(struct eval *ev, struct output *out, const struct str *s) {
  bool single = s->len && memchr(s->data, '\'', s->len), both = single && memchr(s->data, '"', s->len);
  char quote = single && !both ? '"' : '\'';
  size_t done = 0;
  qtr_tpl_write(ev, out, &quote, 1);
  for (size_t i = 0; i < s->len && !ev->failed;) {
    uint32_t cp;
    size_t n = qtr_tpl_decode(s->data + i, s->len - i, &cp);
    char text[16];
    i += n;
    if (cp == (uint32_t)quote || cp == '\\') {
      (void)snprintf(text, sizeof text, "\\%c", (char)cp);
    } else if (cp == '\n' || cp == '\r' || cp == '\t') {
      (void)snprintf(text, sizeof text, "\\%c", cp == '\n' ? 'n' : cp == '\r' ? 'r' : 't');
    } else if (qtr_tpl_is_printable(cp)) {
      continue;
    } else {
      (void)snprintf(text, sizeof text, cp < 0x100 ? "\\x%02x" : cp < 0x10000 ? "\\u%04x" : "\\U%08x", (unsigned)cp);
    }
    qtr_tpl_write(ev, out, s->data + done, i - n - done);
    qtr_tpl_write_text(ev, out, text);
    done = i;
  }
  qtr_tpl_write(ev, out, s->data + done, s->len - done);
  qtr_tpl_write(ev, out, &quote, 1);
}

static void write_items_repr(struct eval *ev, struct output *out, const struct value *items, size_t n, int depth) {
  for (size_t i = 0; i < n && !ev->failed; i++) {
    if (i) qtr_tpl_write_text(ev, out, ", ");
    qtr_tpl_write_repr(ev, out, items[i], depth);
  }
}

static void write_dict_repr(struct eval *ev, struct output *out, const struct dict *d, int depth) {
  qtr_tpl_write_text(ev, out, "{");
  for (size_t i = 0; i < d->n && !ev->failed; i++) {
    if (i) qtr_tpl_write_text(ev, out, ", ");
    qtr_tpl_write_repr(ev, out, d->entries[i].key, depth);
    qtr_tpl_write_text(ev, out, ": ");
    qtr_tpl_write_repr(ev, out, d->entries[i].value, depth);
  }
  qtr_tpl_write_text(ev, out, "}");
}

static void write_view_repr(struct eval *ev, struct output *out, struct value v, int depth) {
  static const char *const names[] = {
      [VIEW_KEYS] = "dict_keys([", [VIEW_VALUES] = "dict_values([", [VIEW_ITEMS] = "dict_items(["};
  qtr_tpl_write_text(ev, out, names[v.sub]);
  struct value *items;
  size_t n;
  if (qtr_tpl_items(ev, v, &items, &n, NULL)) write_items_repr(ev, out, items, n, depth);
  qtr_tpl_write_text(ev, out, "])");
}

__attribute__((format(printf, 3, 4))) static void write_format(struct eval *ev, struct output *out, const char *format,
                                                               ...) {
  char text[160];
  va_list args;
  va_start(args, format);
  (void)vsnprintf(text, sizeof text, format, args);
  va_end(args);
  qtr_tpl_write_text(ev, out, text);
}

void qtr_tpl_write_repr(struct eval *ev, struct output *out, struct value v, int depth) {
  if (!qtr_tpl_charge(ev, 1)) return;
  if (depth > TPL_MAX_VALUE_DEPTH) {
    (void)qtr_tpl_fail(ev, QTR_ERR_LIMIT, "a value nested more than %d levels deep is printed", TPL_MAX_VALUE_DEPTH);
    return;
  }
  char text[TPL_FLOAT_CHARS];
  switch (v.type) {
    case V_MISSING:
    case V_UNDEFINED: qtr_tpl_write_text(ev, out, "Undefined"); break;
    case V_NONE: qtr_tpl_write_text(ev, out, "None"); break;
    case V_BOOL: qtr_tpl_write_text(ev, out, v.b ? "True" : "False"); break;
    case V_INT: write_format(ev, out, "%lld", (long long)v.i); break;
    case V_FLOAT:
      (void)qtr_tpl_charge(ev, 8); /* tries several lengths */
      qtr_tpl_write(ev, out, text, qtr_tpl_float_repr(v.f, text));
      break;
    case V_STRING:
      if (v.s->markup) qtr_tpl_write_text(ev, out, "Markup(");
      write_string_repr(ev, out, v.s);
      if (v.s->markup) qtr_tpl_write_text(ev, out, ")");
      break;
    case V_LIST:
    case V_TUPLE:
      qtr_tpl_write_text(ev, out, v.type == V_LIST ? "[" : "(");
      write_items_repr(ev, out, v.l->items, v.l->n, depth + 1);
      qtr_tpl_write_text(ev, out, v.type == V_LIST ? "]" : v.l->n == 1 ? ",)" : ")");
      break;
    case V_DICT: write_dict_repr(ev, out, v.d, depth + 1); break;
    case V_NAMESPACE:
      qtr_tpl_write_text(ev, out, "<Namespace ");
      write_dict_repr(ev, out, v.d, depth + 1);
      qtr_tpl_write_text(ev, out, ">");
      break;
    case V_VIEW: write_view_repr(ev, out, v, depth + 1); break;
    case V_RANGE:
      write_format(ev, out, "range(%lld, %lld", (long long)v.range->start, (long long)v.range->stop);
      if (v.range->step != 1) write_format(ev, out, ", %lld", (long long)v.range->step);
      qtr_tpl_write_text(ev, out, ")");
      break;
    case V_LOOP: write_format(ev, out, "<LoopContext %zu/%zu>", v.loop->index0 + 1, v.loop->n); break;
    case V_MACRO:
      if (v.macro->node->kind == N_MACRO) {
        qtr_tpl_write_text(ev, out, "<Macro ");
        write_string_repr(ev, out, ev->tpl->names[v.macro->node->name]);
        qtr_tpl_write_text(ev, out, ">");
      } else {
        qtr_tpl_write_text(ev, out, "<Macro anonymous>");
      }
      break;
    /* Python prints addresses here; nothing can depend on them */
    case V_ITERATOR: write_format(ev, out, "<%s object>", v.it->kind); break;
    case V_METHOD: write_format(ev, out, "<built-in method %s>", v.method->def->name); break;
    default: write_format(ev, out, "<function %s>", v.function->name); break;
  }
}

void qtr_tpl_write_str(struct eval *ev, struct output *out, struct value v) {
  if (v.type == V_STRING) {
    qtr_tpl_write(ev, out, v.s->data, v.s->len);
  } else if (v.type != V_UNDEFINED && v.type != V_MISSING) {
    qtr_tpl_write_repr(ev, out, v, 0);
  }
}

struct value qtr_tpl_soft_str(struct eval *ev, struct value v) {
  if (ev->failed || v.type == V_STRING) return v;
  struct output out = {0};
  qtr_tpl_write_str(ev, &out, v);
  return qtr_tpl_output_string(ev, &out);
}

struct value qtr_tpl_str(struct eval *ev, struct value v) {
  v = qtr_tpl_soft_str(ev, v);
  return ev->failed ? v : qtr_tpl_markup(ev, v, false);
}

/* ---- JSON ------------------------------------------------------------------------------------ */

static void write_json_string(struct eval *ev, struct output *out, const struct str *s, bool ascii) {
  qtr_tpl_write_text(ev, out, "\"");
  size_t done = 0;
  for (size_t i = 0; i < s->len && !ev->failed;) {
    uint32_t cp;
    size_t n = qtr_tpl_decode(s->data + i, s->len - i, &cp);
    if (cp >= 0x20 && cp != '"' && cp != '\\' && !(ascii && cp > 0x7e)) {
      i += n;
      continue;
    }
    qtr_tpl_write(ev, out, s->data + done, i - done);
    i += n;
    done = i;
    static const char plain[] = "\"\"\\\\\nn\rr\tt\ff\bb";
    const char *escape = cp < 0x80 ? memchr(plain, (int)cp, sizeof plain - 1) : NULL;
    if (escape) {
      write_format(ev, out, "\\%c", escape[1]);
    } else if (cp < 0x10000) {
      write_format(ev, out, "\\u%04x", (unsigned)cp);
    } else {
      write_format(ev, out, "\\u%04x\\u%04x", (unsigned)(0xd800 + ((cp - 0x10000) >> 10)),
                   (unsigned)(0xdc00 + (cp & 0x3ff)));
    }
  }
  qtr_tpl_write(ev, out, s->data + done, s->len - done);
  qtr_tpl_write_text(ev, out, "\"");
}

static void write_json_float(struct eval *ev, struct output *out, double f) {
  char text[TPL_FLOAT_CHARS];
  if (isnan(f)) {
    qtr_tpl_write_text(ev, out, "NaN");
  } else if (isinf(f)) {
    qtr_tpl_write_text(ev, out, f < 0 ? "-Infinity" : "Infinity");
  } else {
    (void)qtr_tpl_charge(ev, 8);
    qtr_tpl_write(ev, out, text, qtr_tpl_float_repr(f, text));
  }
}

static void write_json_newline(struct eval *ev, struct output *out, const struct json_style *style, int depth) {
  if (!style->indented) return;
  qtr_tpl_write_text(ev, out, "\n");
  for (int i = 0; i < depth; i++) qtr_tpl_write(ev, out, style->indent->data, style->indent->len);
}

static int compare_keys(const void *a, const void *b) {
  const struct str *x = (*(const struct dict_entry *const *)a)->key.s, *y = (*(const struct dict_entry *const *)b)->key.s;
  size_t n = x->len < y->len ? x->len : y->len;
  int order = n ? memcmp(x->data, y->data, n) : 0;
  return order ? order : (x->len > y->len) - (x->len < y->len);
}

static void write_json_key(struct eval *ev, struct output *out, struct value key, const struct json_style *style) {
  if (key.type == V_STRING) {
    write_json_string(ev, out, key.s, style->ascii);
    return;
  }
  if (!qtr_tpl_is_number(key) && key.type != V_NONE) {
    (void)qtr_tpl_fail(ev, QTR_ERR_FORMAT, "JSON keys must be strings or numbers, not '%s'", qtr_tpl_type_name(key));
    return;
  }
  qtr_tpl_write_text(ev, out, "\"");
  qtr_tpl_write_json(ev, out, key, style, 0);
  qtr_tpl_write_text(ev, out, "\"");
}

static void write_json_dict(struct eval *ev, struct output *out, const struct dict *d, const struct json_style *style,
                            int depth) {
  if (d->n == 0) {
    qtr_tpl_write_text(ev, out, "{}");
    return;
  }
  const struct dict_entry **sorted = NULL;
  if (style->sort_keys) {
    sorted = qtr_tpl_alloc_array(ev, d->n, sizeof *sorted);
    for (size_t i = 0; sorted && i < d->n; i++) {
      sorted[i] = &d->entries[i];
      if (d->entries[i].key.type != V_STRING) {
        (void)qtr_tpl_fail(ev, QTR_ERR_UNSUPPORTED, "tojson(sort_keys=true) of a mapping whose keys are not all strings");
        return;
      }
    }
    if (!sorted || !qtr_tpl_charge(ev, d->n * 4)) return;
    qsort(sorted, d->n, sizeof *sorted, compare_keys);
  }
  qtr_tpl_write_text(ev, out, "{");
  for (size_t i = 0; i < d->n && !ev->failed; i++) {
    const struct dict_entry *e = sorted ? sorted[i] : &d->entries[i];
    if (i) qtr_tpl_write(ev, out, style->item_separator->data, style->item_separator->len);
    write_json_newline(ev, out, style, depth + 1);
    write_json_key(ev, out, e->key, style);
    qtr_tpl_write(ev, out, style->key_separator->data, style->key_separator->len);
    qtr_tpl_write_json(ev, out, e->value, style, depth + 1);
  }
  write_json_newline(ev, out, style, depth);
  qtr_tpl_write_text(ev, out, "}");
}

void qtr_tpl_write_json(struct eval *ev, struct output *out, struct value v, const struct json_style *style, int depth) {
  if (!qtr_tpl_charge(ev, 1)) return;
  if (depth > TPL_MAX_VALUE_DEPTH) {
    (void)qtr_tpl_fail(ev, QTR_ERR_LIMIT, "tojson of a value nested more than %d levels deep", TPL_MAX_VALUE_DEPTH);
    return;
  }
  switch (v.type) {
    case V_NONE: qtr_tpl_write_text(ev, out, "null"); break;
    case V_BOOL: qtr_tpl_write_text(ev, out, v.b ? "true" : "false"); break;
    case V_INT: write_format(ev, out, "%lld", (long long)v.i); break;
    case V_FLOAT: write_json_float(ev, out, v.f); break;
    case V_STRING: write_json_string(ev, out, v.s, style->ascii); break;
    case V_LIST:
    case V_TUPLE:
      if (v.l->n == 0) {
        qtr_tpl_write_text(ev, out, "[]");
        break;
      }
      qtr_tpl_write_text(ev, out, "[");
      for (size_t i = 0; i < v.l->n && !ev->failed; i++) {
        if (i) qtr_tpl_write(ev, out, style->item_separator->data, style->item_separator->len);
        write_json_newline(ev, out, style, depth + 1);
        qtr_tpl_write_json(ev, out, v.l->items[i], style, depth + 1);
      }
      write_json_newline(ev, out, style, depth);
      qtr_tpl_write_text(ev, out, "]");
      break;
    case V_DICT: write_json_dict(ev, out, v.d, style, depth); break;
    default:
      (void)qtr_tpl_fail(ev, QTR_ERR_FORMAT, "'%s' is not JSON serializable; a list may be missing: use | list",
                         qtr_tpl_type_name(v));
  }
}
