/* template_printf.c - Python's two ways to format: "%s and %d" % args, and "{} and {name:>8}".format(args). Widths and
 * precisions are capped; what is rare in templates (nested fields, "n", "c") is refused by name. */
#include "text/template_internal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define MAX_WIDTH 10000
#define MAX_PRECISION 100

struct spec {
  char fill[4]; /* one character */
  size_t fill_len;
  char align; /* '<' '>' '^' '=' or 0 */
  char sign;  /* '+' '-' ' ' */
  bool alternate, zero;
  char grouping;        /* ',' '_' or 0 */
  int width, precision; /* precision: -1 = none */
  char type;            /* 0 = none */
};

static void pad(struct eval *ev, struct output *out, const struct spec *spec, int n) {
  for (int i = 0; i < n && !ev->failed; i++) qtr_tpl_write(ev, out, spec->fill, spec->fill_len);
}

/* text: sign or prefix of n_prefix bytes, then the body; '=' pads between them. */
static void write_padded(struct eval *ev, struct output *out, const struct spec *spec, char align, const char *text,
                         size_t len, size_t n_prefix, size_t n_chars) {
  int missing = spec->width > (int)n_chars ? spec->width - (int)n_chars : 0;
  int left = align == '>' ? missing : align == '^' ? missing / 2 : 0;
  pad(ev, out, spec, left);
  qtr_tpl_write(ev, out, text, n_prefix);
  if (align == '=') pad(ev, out, spec, missing);
  qtr_tpl_write(ev, out, text + n_prefix, len - n_prefix);
  if (align != '=') pad(ev, out, spec, missing - left);
}

static void write_text(struct eval *ev, struct output *out, const struct spec *spec, char align, struct value text) {
  struct str *s = text.s;
  size_t len = s->len, n = qtr_tpl_n_chars(ev, s);
  if (spec->precision >= 0 && n > (size_t)spec->precision) {
    len = qtr_tpl_char_offset(ev, s, (size_t)spec->precision);
    n = (size_t)spec->precision;
  }
  write_padded(ev, out, spec, align, s->data, len, 0, n);
}

/* Puts separators between groups of the digits in text[from, to). */
static size_t group_digits(char *text, size_t len, size_t from, size_t to, int every, char separator, size_t room) {
  for (size_t at = to; at > from + (size_t)every;) {
    at -= (size_t)every;
    if (len + 1 >= room) break;
    memmove(text + at + 1, text + at, len - at);
    text[at] = separator;
    len++;
  }
  return len;
}

static void write_number(struct eval *ev, struct output *out, const struct spec *spec, char align, struct value v,
                         char type) {
  char text[640];
  size_t at = 0, len;
  bool is_float = type == 'f' || type == 'F' || type == 'e' || type == 'E' || type == 'g' || type == 'G' || type == '%';
  double f = qtr_tpl_number(v);
  int64_t i = v.type == V_INT ? v.i : v.type == V_BOOL ? v.b : 0;
  bool negative = v.type == V_FLOAT ? signbit(f) != 0 && !isnan(f) : i < 0;
  if (negative) {
    text[at++] = '-';
  } else if (spec->sign == '+' || spec->sign == ' ') {
    text[at++] = spec->sign;
  }
  size_t n_prefix = at, digits, digits_end;
  if (is_float) {
    int precision = spec->precision < 0 ? 6 : spec->precision;
    char format[8] = {'%', spec->alternate ? '#' : '.', '.', '*', 0};
    size_t k = spec->alternate ? 3 : 2;
    format[k - 1] = '.';
    format[k++] = '*';
    format[k++] = type == '%' ? 'f' : type;
    format[k] = 0;
    double shown = fabs(f) * (type == '%' ? 100 : 1);
    if ((type == 'g' || type == 'G') && precision == 0) precision = 1;
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    int n = snprintf(text + at, sizeof text - at - 8, format, precision, shown);
#pragma GCC diagnostic pop
    if (n < 0 || (size_t)n >= sizeof text - at - 8) {
      (void)qtr_tpl_fail(ev, QTR_ERR_LIMIT, "a number is formatted with too many digits");
      return;
    }
    digits = at;
    digits_end = at;
    len = at + (size_t)n;
    while (digits_end < len && text[digits_end] >= '0' && text[digits_end] <= '9') digits_end++;
    if (digits_end < len && text[digits_end] != 'e' && text[digits_end] != 'E' && text[digits_end] != 'i' &&
        text[digits_end] != 'n' && text[digits_end] != 'I' && text[digits_end] != 'N') {
      text[digits_end] = '.'; /* whatever the locale says */
    }
    if (type == '%') text[len++] = '%';
  } else {
    uint64_t u = i < 0 ? 0 - (uint64_t)i : (uint64_t)i;
    int base = type == 'x' || type == 'X' ? 16 : type == 'o' ? 8 : type == 'b' ? 2 : 10;
    if (spec->alternate && base != 10) {
      text[at++] = '0';
      text[at++] = type;
      n_prefix = at;
    }
    char reversed[64];
    int n = 0;
    do {
      int digit = (int)(u % (unsigned)base);
      reversed[n++] = (char)(digit < 10 ? '0' + digit : (type == 'X' ? 'A' : 'a') + digit - 10);
      u /= (unsigned)base;
    } while (u);
    digits = at;
    for (int zeros = n; zeros < spec->precision; zeros++) text[at++] = '0'; /* % formatting only */
    while (n > 0) text[at++] = reversed[--n];
    digits_end = len = at;
  }
  if (spec->grouping) {
    len = group_digits(text, len, digits, digits_end,
                       !is_float && (type == 'x' || type == 'X' || type == 'b' || type == 'o') ? 4 : 3, spec->grouping,
                       sizeof text);
  }
  write_padded(ev, out, spec, align, text, len, n_prefix, len);
}

/* ---- "%…" % args ----------------------------------------------------------------------------- */

struct percent_args {
  struct value all;
  size_t next;
};

static struct value next_arg(struct eval *ev, struct percent_args *args) {
  if (args->all.type == V_TUPLE) {
    if (args->next < args->all.l->n) return args->all.l->items[args->next++];
  } else if (args->next++ == 0) {
    return args->all;
  }
  return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "not enough arguments for format string");
}

static bool read_count(const struct str *f, size_t *at, int most, int *count) {
  *count = 0;
  while (*at < f->len && f->data[*at] >= '0' && f->data[*at] <= '9') {
    *count = *count * 10 + (f->data[(*at)++] - '0');
    if (*count > most) return false;
  }
  return true;
}

static void write_percent(struct eval *ev, struct output *out, const struct spec *spec, bool left, struct value v,
                          bool markup) {
  char align = left ? '<' : '>';
  switch (spec->type) {
    case 's':
    case 'r':
    case 'a': {
      struct value text;
      if (spec->type == 's') {
        text = markup ? qtr_tpl_escape(ev, v) : qtr_tpl_str(ev, v);
      } else {
        struct output repr = {0};
        qtr_tpl_write_repr(ev, &repr, v, 0);
        text = qtr_tpl_output_string(ev, &repr);
        if (markup) text = qtr_tpl_escape(ev, text);
      }
      if (!ev->failed) write_text(ev, out, spec, align, text);
      return;
    }
    case 'd':
    case 'i':
    case 'u':
    case 'x':
    case 'X':
    case 'o':
      if (!qtr_tpl_is_number(v) || (v.type == V_FLOAT && spec->type != 'd' && spec->type != 'i' && spec->type != 'u')) {
        (void)qtr_tpl_fail(ev, QTR_ERR_FORMAT, "%%%c format: a number is required, not '%s'", spec->type,
                           qtr_tpl_type_name(v));
        return;
      }
      if (v.type == V_FLOAT) {
        if (!(v.f > -0x1p63 && v.f < 0x1p63)) {
          (void)qtr_tpl_fail(ev, QTR_ERR_UNSUPPORTED, "an integer does not fit in 64 bits");
          return;
        }
        v = qtr_tpl_int((int64_t)v.f);
      }
      write_number(ev, out, spec, spec->zero && !left ? '=' : align, v,
                   spec->type == 'i' || spec->type == 'u' ? 'd' : spec->type);
      return;
    case 'f':
    case 'F':
    case 'e':
    case 'E':
    case 'g':
    case 'G':
      if (!qtr_tpl_is_number(v)) {
        (void)qtr_tpl_fail(ev, QTR_ERR_FORMAT, "%%%c format: a number is required, not '%s'", spec->type,
                           qtr_tpl_type_name(v));
        return;
      }
      write_number(ev, out, spec, spec->zero && !left ? '=' : align, qtr_tpl_float(qtr_tpl_number(v)), spec->type);
      return;
    default: (void)qtr_tpl_fail(ev, QTR_ERR_UNSUPPORTED, "unsupported format character in '%%…' formatting");
  }
}

struct value qtr_tpl_percent_format(struct eval *ev, struct value format, struct value args) {
  const struct str *f = format.s;
  struct output out = {0};
  struct percent_args given = {.all = args};
  bool used_mapping = false;
  size_t at = 0;
  while (at < f->len && qtr_tpl_charge(ev, 1)) {
    const char *percent = memchr(f->data + at, '%', f->len - at);
    size_t end = percent ? (size_t)(percent - f->data) : f->len;
    qtr_tpl_write(ev, &out, f->data + at, end - at);
    if (!percent) break;
    at = end + 1;
    struct spec spec = {.fill = " ", .fill_len = 1, .precision = -1};
    struct value v = {.type = V_MISSING};
    bool left = false, ok = true;
    if (at < f->len && f->data[at] == '(') {
      const char *close = memchr(f->data + at, ')', f->len - at);
      if (!close || args.type != V_DICT) return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "format requires a mapping");
      struct value key = qtr_tpl_string(ev, f->data + at + 1, (size_t)(close - f->data) - at - 1);
      const struct value *found = qtr_tpl_dict_get(ev, args.d, key);
      if (!found) return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "a key of the format string is missing in the mapping");
      v = *found;
      used_mapping = true;
      at = (size_t)(close - f->data) + 1;
    }
    for (; at < f->len && memchr("-+ #0", f->data[at], 5); at++) {
      char c = f->data[at];
      if (c == '-') left = true;
      if (c == '+' || (c == ' ' && spec.sign != '+')) spec.sign = c;
      if (c == '#') spec.alternate = true;
      if (c == '0') spec.zero = true;
    }
    ok = read_count(f, &at, MAX_WIDTH, &spec.width);
    if (at < f->len && f->data[at] == '.') {
      at++;
      ok = ok && read_count(f, &at, MAX_PRECISION, &spec.precision);
    }
    if (!ok) return qtr_tpl_fail(ev, QTR_ERR_LIMIT, "a format width or precision is too large");
    while (at < f->len && memchr("lhL", f->data[at], 3)) at++;
    if (at >= f->len) return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "incomplete format");
    spec.type = f->data[at++];
    if (spec.type == '%') {
      qtr_tpl_write_text(ev, &out, "%");
      continue;
    }
    if (spec.zero && !left && !memchr("sra", spec.type, 3)) spec.fill[0] = '0';
    if (v.type == V_MISSING) v = next_arg(ev, &given);
    if (ev->failed) break;
    write_percent(ev, &out, &spec, left, v, f->markup);
  }
  /* what can be subscripted counts as a mapping, and a mapping need not be used up */
  bool is_mapping = args.type == V_DICT || args.type == V_LIST || args.type == V_RANGE || args.type == V_UNDEFINED;
  size_t n_args = args.type == V_TUPLE ? args.l->n : is_mapping ? given.next : 1;
  if (!used_mapping && given.next < n_args) {
    return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "not all arguments converted during string formatting");
  }
  struct value text = qtr_tpl_output_string(ev, &out);
  return ev->failed ? text : qtr_tpl_markup(ev, text, f->markup);
}

/* ---- str.format ------------------------------------------------------------------------------ */

static bool read_spec(struct eval *ev, const struct str *f, size_t at, size_t end, struct spec *spec) {
  *spec = (struct spec){.fill = " ", .fill_len = 1, .precision = -1};
  struct str part = {.data = f->data, .len = end};
  uint32_t cp;
  size_t n = at < end ? qtr_tpl_decode(f->data + at, end - at, &cp) : 0;
  if (n && at + n < end && memchr("<>^=", f->data[at + n], 4)) {
    memcpy(spec->fill, f->data + at, n);
    spec->fill_len = n;
    spec->align = f->data[at + n];
    at += n + 1;
  } else if (n && memchr("<>^=", f->data[at], 4)) {
    spec->align = f->data[at++];
  }
  if (at < end && memchr("+- ", f->data[at], 3)) spec->sign = f->data[at++];
  if (at < end && f->data[at] == '#') {
    spec->alternate = true;
    at++;
  }
  if (at < end && f->data[at] == '0') {
    if (!spec->align) {
      spec->align = '=';
      spec->fill[0] = '0';
      spec->fill_len = 1;
    }
    at++;
  }
  bool ok = read_count(&part, &at, MAX_WIDTH, &spec->width);
  if (at < end && (f->data[at] == ',' || f->data[at] == '_')) spec->grouping = f->data[at++];
  if (at < end && f->data[at] == '.') {
    at++;
    ok = ok && read_count(&part, &at, MAX_PRECISION, &spec->precision);
  }
  if (!ok) {
    (void)qtr_tpl_fail(ev, QTR_ERR_LIMIT, "a format width or precision is too large");
    return false;
  }
  if (at < end) spec->type = f->data[at++];
  if (at == end) return true;
  (void)qtr_tpl_fail(ev, QTR_ERR_UNSUPPORTED, "this format specification is not supported");
  return false;
}

static void write_field(struct eval *ev, struct output *out, struct value v, const struct spec *spec, bool has_spec) {
  if (v.type == V_STRING || !has_spec || v.type == V_BOOL || v.type == V_NONE || v.type == V_UNDEFINED) {
    bool as_number = v.type == V_BOOL && spec->type && spec->type != 's';
    if (!as_number) {
      if ((spec->type && spec->type != 's') || spec->align == '=') {
        (void)qtr_tpl_fail(ev, QTR_ERR_FORMAT, "this format does not suit '%s'", qtr_tpl_type_name(v));
        return;
      }
      struct value text = qtr_tpl_str(ev, v);
      if (!ev->failed) write_text(ev, out, spec, spec->align ? spec->align : '<', text);
      return;
    }
  }
  char type = spec->type, align = spec->align ? spec->align : '>';
  bool wants_float = type && strchr("fFeEgG%", type);
  if (v.type == V_FLOAT && !type) {
    if (spec->precision >= 0 || spec->grouping) {
      type = 'g';
      wants_float = true;
      if (spec->precision < 0) {
        (void)qtr_tpl_fail(ev, QTR_ERR_UNSUPPORTED, "this format of a float is not supported; give a precision and f");
        return;
      }
    } else {
      char text[TPL_FLOAT_CHARS + 1];
      size_t n = qtr_tpl_float_repr(v.f, text + 1), from = 1;
      if (!signbit(v.f) && (spec->sign == '+' || spec->sign == ' ')) text[from = 0] = spec->sign;
      write_padded(ev, out, spec, align, text + from, n + 1 - from, from == 0 || signbit(v.f), n + 1 - from);
      return;
    }
  }
  if (v.type == V_INT || v.type == V_BOOL) {
    if (wants_float) {
      v = qtr_tpl_float(qtr_tpl_number(v));
    } else if ((!type || strchr("dxXob", type)) && spec->precision < 0) {
      write_number(ev, out, spec, align, v, type ? type : 'd');
      return;
    }
  }
  if (v.type != V_FLOAT || !wants_float) {
    (void)qtr_tpl_fail(ev, QTR_ERR_FORMAT, "this format does not suit '%s'", qtr_tpl_type_name(v));
    return;
  }
  write_number(ev, out, spec, align, v, type);
}

/* name(.attr | [key])* between at and end. */
static struct value find_field(struct eval *ev, const struct str *f, size_t at, size_t end, const struct args *args,
                               int64_t *automatic) {
  size_t name_end = at;
  while (name_end < end && f->data[name_end] != '.' && f->data[name_end] != '[') name_end++;
  struct value v = {.type = V_MISSING};
  int64_t index;
  size_t len = name_end - at;
  bool numbered = len > 0 && f->data[at] >= '0' && f->data[at] <= '9' && qtr_tpl_parse_int(f->data + at, len, 10, &index);
  if (len == 0) {
    index = (*automatic)++;
    numbered = true;
  }
  if (numbered) {
    if (index >= 0 && (uint64_t)index < args->n_positional) v = args->positional[index];
  } else if (qtr_tpl_charge(ev, args->n_keyword / 4)) {
    for (size_t k = 0; k < args->n_keyword; k++) {
      const struct str *name = args->keyword[k].name;
      if (name->len == len && memcmp(name->data, f->data + at, len) == 0) v = args->keyword[k].value;
    }
  }
  if (v.type == V_MISSING) return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "format: a field of the string has no argument");
  at = name_end;
  while (at < end && !ev->failed) {
    bool item = f->data[at] == '[';
    size_t from = ++at;
    while (at < end && (item ? f->data[at] != ']' : f->data[at] != '.' && f->data[at] != '[')) at++;
    if (at == from || (item && at == end)) return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "format: a field is malformed");
    struct value key = qtr_tpl_string(ev, f->data + from, at - from);
    if (ev->failed) break;
    if (item) {
      if (f->data[from] >= '0' && f->data[from] <= '9' && qtr_tpl_parse_int(f->data + from, at - from, 10, &index)) {
        key = qtr_tpl_int(index);
      }
      v = qtr_tpl_getitem(ev, v, key);
      at++;
    } else {
      v = qtr_tpl_getattr(ev, v, key.s);
    }
  }
  return v;
}

struct value qtr_tpl_str_format(struct eval *ev, struct value format, const struct args *args) {
  const struct str *f = format.s;
  struct output out = {0};
  int64_t automatic = 0;
  size_t at = 0;
  while (at < f->len && qtr_tpl_charge(ev, 1)) {
    size_t end = at;
    while (end < f->len && f->data[end] != '{' && f->data[end] != '}') end++;
    qtr_tpl_write(ev, &out, f->data + at, end - at);
    if (end == f->len) break;
    at = end + 1;
    if (at < f->len && f->data[at] == f->data[end]) {
      qtr_tpl_write(ev, &out, f->data + at++, 1);
      continue;
    }
    if (f->data[end] == '}') return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "format: a single '}'");
    size_t name_end = at;
    while (name_end < f->len && !memchr("!:}{", f->data[name_end], 4)) {
      if (f->data[name_end] == '[') {
        while (name_end < f->len && f->data[name_end] != ']') name_end++;
        if (name_end == f->len) break;
      }
      name_end++;
    }
    char conversion = 0;
    size_t spec_at = name_end;
    if (spec_at + 1 < f->len && f->data[spec_at] == '!') {
      conversion = f->data[spec_at + 1];
      spec_at += 2;
    }
    bool has_spec = spec_at < f->len && f->data[spec_at] == ':';
    if (has_spec) spec_at++;
    size_t close = spec_at;
    while (close < f->len && f->data[close] != '}' && f->data[close] != '{') close++;
    if (close >= f->len || (!has_spec && close != spec_at))
      return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "format: a field is malformed");
    if (f->data[close] == '{') return qtr_tpl_fail(ev, QTR_ERR_UNSUPPORTED, "format: nested fields are not supported");
    struct value v = find_field(ev, f, at, name_end, args, &automatic);
    struct spec spec;
    if (ev->failed || !read_spec(ev, f, spec_at, close, &spec)) break;
    if (conversion == 'r') {
      struct output repr = {0};
      qtr_tpl_write_repr(ev, &repr, v, 0);
      v = qtr_tpl_output_string(ev, &repr);
    } else if (conversion == 's') {
      v = qtr_tpl_str(ev, v);
    } else if (conversion) {
      return qtr_tpl_fail(ev, QTR_ERR_UNSUPPORTED, "format: only the conversions !s and !r are supported");
    }
    if (ev->failed) break;
    if (f->markup) v = qtr_tpl_escape(ev, v);
    write_field(ev, &out, v, &spec, close > spec_at);
    at = close + 1;
  }
  struct value text = qtr_tpl_output_string(ev, &out);
  return ev->failed ? text : qtr_tpl_markup(ev, text, f->markup);
}
