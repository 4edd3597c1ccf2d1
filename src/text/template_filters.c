/* template_filters.c - the filters of jinja2 (`value | name(args)`), with transformers' tojson. */
#include "text/template_internal.h"

#include "base/checked.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define FILTER(name)                                                                 \
  static struct value name(struct eval *ev, __attribute__((unused)) struct value in, \
                           __attribute__((unused)) const struct value *a, __attribute__((unused)) const struct args *raw)

static bool given(struct value v) { return v.type != V_MISSING; }
static bool flag(struct value v) { return given(v) && qtr_tpl_truth(v); }
static bool is_integer(struct value v) { return v.type == V_INT || v.type == V_BOOL; }
static int64_t integer(struct value v) { return v.type == V_BOOL ? v.b : v.i; }

static struct value fail_type(struct eval *ev, const char *filter, struct value v) {
  if (v.type == V_UNDEFINED) return qtr_tpl_fail_undefined(ev, v);
  return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "%s: cannot be used with '%s'", filter, qtr_tpl_type_name(v));
}

/* ---- text ------------------------------------------------------------------------------------ */

/* Runs the string method of the same name on soft_str(in): keeps markup. */
static struct value string_method(struct eval *ev, const char *name, struct value in, const struct args *raw) {
  bool unsafe;
  struct value text = qtr_tpl_soft_str(ev, in);
  const struct builtin *method = qtr_tpl_find_method(V_STRING, name, strlen(name), &unsafe);
  return ev->failed ? text : qtr_tpl_call_builtin(ev, method, text, raw);
}

static const struct args no_args = {0};

FILTER(filter_upper) { return string_method(ev, "upper", in, &no_args); }
FILTER(filter_lower) { return string_method(ev, "lower", in, &no_args); }
FILTER(filter_capitalize) { return string_method(ev, "capitalize", in, &no_args); }
FILTER(filter_trim) { return string_method(ev, "strip", in, raw); }
FILTER(filter_center) { return string_method(ev, "center", in, raw); }

/* Unlike str.title, a word starts after white space or one of -({[< only. */
FILTER(filter_title) {
  struct value text = qtr_tpl_soft_str(ev, in);
  struct output out = {0};
  bool start = true;
  if (ev->failed || !qtr_tpl_charge(ev, text.s->len / TPL_STEP_CHARS)) return text;
  for (size_t i = 0; !ev->failed && i < text.s->len;) {
    uint32_t cp, mapped[3];
    char utf8[4];
    i += qtr_tpl_decode(text.s->data + i, text.s->len - i, &cp);
    bool breaks = qtr_tpl_is_space(cp) || (cp < 0x80 && strchr("-({[<", (int)cp) && cp);
    size_t n = qtr_tpl_map_case(cp, start ? CASE_UPPER : CASE_LOWER, mapped);
    for (size_t k = 0; k < n; k++) qtr_tpl_write(ev, &out, utf8, qtr_tpl_encode(mapped[k], utf8));
    start = breaks;
  }
  struct value v = qtr_tpl_output_string(ev, &out);
  return ev->failed ? v : qtr_tpl_markup(ev, v, text.s->markup);
}

FILTER(filter_string) { return qtr_tpl_soft_str(ev, in); }
FILTER(filter_escape) { return qtr_tpl_escape(ev, in); }
FILTER(filter_safe) {
  struct value text = qtr_tpl_str(ev, in);
  return ev->failed ? text : qtr_tpl_markup(ev, text, true);
}
FILTER(filter_forceescape) { return qtr_tpl_escape(ev, qtr_tpl_str(ev, in)); }

FILTER(filter_replace) {
  struct value args[3] = {qtr_tpl_str(ev, a[0]), qtr_tpl_str(ev, a[1]), a[2]};
  struct args method = {.positional = args, .n_positional = given(a[2]) && a[2].type != V_NONE ? 3 : 2};
  return string_method(ev, "replace", qtr_tpl_str(ev, in), &method);
}

FILTER(filter_format) {
  struct value text = qtr_tpl_soft_str(ev, in), all;
  if (raw->n_keyword && raw->n_positional)
    return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "format: positional and keyword arguments mixed");
  if (raw->n_keyword) {
    all = qtr_tpl_dict(ev);
    for (size_t k = 0; k < raw->n_keyword && !ev->failed; k++) {
      qtr_tpl_dict_set(ev, all.d, (struct value){.type = V_STRING, .s = raw->keyword[k].name}, raw->keyword[k].value);
    }
  } else {
    all = qtr_tpl_list(ev, V_TUPLE, raw->n_positional);
    if (!ev->failed && raw->n_positional) memcpy(all.l->items, raw->positional, raw->n_positional * sizeof *raw->positional);
  }
  return ev->failed ? text : qtr_tpl_percent_format(ev, text, all);
}

FILTER(filter_indent) { /* width=4, first=false, blank=false */
  if (in.type != V_STRING) return fail_type(ev, "indent", in);
  struct value width = given(a[0]) ? a[0] : qtr_tpl_int(4);
  if (is_integer(width)) width = qtr_tpl_binary(ev, OP_MUL, qtr_tpl_string_static(ev, " "), width);
  if (ev->failed || width.type != V_STRING) return fail_type(ev, "indent", width);
  bool first = flag(a[1]), blank = flag(a[2]);
  struct output out = {0};
  const struct str *s = in.s;
  if (first) qtr_tpl_write(ev, &out, width.s->data, width.s->len);
  for (size_t i = 0; i < s->len && !ev->failed;) { /* str.splitlines, joined with \n */
    size_t end = i, n = 0;
    uint32_t cp = 0;
    for (; end < s->len; end += n) {
      n = qtr_tpl_decode(s->data + end, s->len - end, &cp);
      if (qtr_tpl_is_line_break(cp)) break;
    }
    if (i > 0 && (blank || end > i)) qtr_tpl_write(ev, &out, width.s->data, width.s->len);
    qtr_tpl_write(ev, &out, s->data + i, end - i);
    if (end == s->len) break;
    qtr_tpl_write_text(ev, &out, "\n");
    i = end + n + (cp == '\r' && end + 1 < s->len && s->data[end + 1] == '\n');
    if (i == s->len && blank) qtr_tpl_write(ev, &out, width.s->data, width.s->len);
  }
  struct value v = qtr_tpl_output_string(ev, &out);
  return ev->failed ? v : qtr_tpl_markup(ev, v, s->markup);
}

FILTER(filter_truncate) { /* length=255, killwords=false, end='...', leeway=5 */
  struct value text = in, end = given(a[2]) ? a[2] : qtr_tpl_string_static(ev, "...");
  int64_t length = given(a[0]) && is_integer(a[0]) ? integer(a[0]) : 255;
  int64_t leeway = given(a[3]) && is_integer(a[3]) ? integer(a[3]) : 5;
  size_t n_text;
  if (ev->failed || !qtr_tpl_length(ev, text, &n_text)) return fail_type(ev, "truncate", text);
  if (end.type != V_STRING) return fail_type(ev, "truncate", end);
  int64_t n_end = (int64_t)qtr_tpl_n_chars(ev, end.s);
  if (length < n_end || leeway < 0) return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "truncate: length or leeway is too small");
  if ((int64_t)n_text - leeway <= length) return text;
  if (text.type != V_STRING) return fail_type(ev, "truncate", text);
  struct value cut = qtr_tpl_slice(ev, text, qtr_tpl_int(0), qtr_tpl_int(length - n_end), qtr_tpl_none());
  if (ev->failed) return cut;
  if (!flag(a[1])) {
    const char *space = cut.s->len ? memrchr(cut.s->data, ' ', cut.s->len) : NULL;
    if (space) cut = qtr_tpl_markup(ev, qtr_tpl_string(ev, cut.s->data, (size_t)(space - cut.s->data)), text.s->markup);
  }
  return qtr_tpl_binary(ev, OP_ADD, cut, end);
}

FILTER(filter_wordcount) {
  struct value text = qtr_tpl_soft_str(ev, in);
  int64_t n = 0;
  bool inside = false;
  if (ev->failed || !qtr_tpl_charge(ev, text.s->len / TPL_STEP_CHARS)) return text;
  for (size_t i = 0; i < text.s->len;) {
    uint32_t cp;
    i += qtr_tpl_decode(text.s->data + i, text.s->len - i, &cp);
    bool word = cp == '_' || qtr_tpl_is_alpha(cp) || qtr_tpl_is_digit(cp);
    n += word && !inside;
    inside = word;
  }
  return qtr_tpl_int(n);
}

/* transformers' tojson: json.dumps without HTML escapes. */
FILTER(filter_tojson) { /* ensure_ascii=false, indent=none, separators=none, sort_keys=false */
  static const char comma_space[] = ", ", comma[] = ",", colon[] = ": ";
  struct value indent = a[1], separators = a[2];
  struct json_style style = {.ascii = flag(a[0]), .sort_keys = flag(a[3])};
  style.indented = given(indent) && indent.type != V_NONE;
  if (style.indented) {
    if (is_integer(indent)) indent = qtr_tpl_binary(ev, OP_MUL, qtr_tpl_string_static(ev, " "), indent);
    if (ev->failed || indent.type != V_STRING) return fail_type(ev, "tojson indent", indent);
    style.indent = indent.s;
  }
  struct value item = qtr_tpl_string_static(ev, style.indented ? comma : comma_space),
               key = qtr_tpl_string_static(ev, colon);
  if (given(separators) && separators.type != V_NONE) {
    struct value *parts;
    size_t n;
    if (!qtr_tpl_items(ev, separators, &parts, &n, NULL)) return qtr_tpl_undefined();
    if (n != 2 || parts[0].type != V_STRING || parts[1].type != V_STRING) {
      return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "tojson: separators must be two strings");
    }
    item = parts[0];
    key = parts[1];
  }
  struct output out = {0};
  if (ev->failed) return qtr_tpl_undefined();
  style.item_separator = item.s;
  style.key_separator = key.s;
  qtr_tpl_write_json(ev, &out, in, &style, 0);
  return qtr_tpl_output_string(ev, &out);
}

/* ---- numbers --------------------------------------------------------------------------------- */

static struct value float_to_int(struct eval *ev, double f) {
  if (f > -0x1p63 && f < 0x1p63) return qtr_tpl_int((int64_t)f);
  return qtr_tpl_fail(ev, QTR_ERR_UNSUPPORTED, "int: the number does not fit in 64 bits");
}

FILTER(filter_int) { /* default=0, base=10 */
  if (is_integer(in)) return qtr_tpl_int(integer(in));
  if (in.type == V_UNDEFINED) return qtr_tpl_fail_undefined(ev, in);
  struct value otherwise = given(a[0]) ? a[0] : qtr_tpl_int(0);
  double f;
  if (in.type == V_FLOAT) return isfinite(in.f) ? float_to_int(ev, in.f) : otherwise;
  if (in.type != V_STRING) return otherwise;
  int64_t i;
  if (qtr_tpl_parse_int(in.s->data, in.s->len,
                        given(a[1]) && a[1].type == V_INT && a[1].i >= 0 && a[1].i <= 36 ? (int)a[1].i : 10, &i)) {
    return qtr_tpl_int(i);
  }
  if (!qtr_tpl_parse_float(in.s->data, in.s->len, &f) || !isfinite(f)) return otherwise;
  return float_to_int(ev, f);
}

FILTER(filter_float) { /* default=0.0 */
  double f;
  if (qtr_tpl_is_number(in)) return qtr_tpl_float(qtr_tpl_number(in));
  if (in.type == V_UNDEFINED) return qtr_tpl_fail_undefined(ev, in);
  if (in.type == V_STRING && qtr_tpl_parse_float(in.s->data, in.s->len, &f)) return qtr_tpl_float(f);
  return given(a[0]) ? a[0] : qtr_tpl_float(0);
}

FILTER(filter_abs) {
  if (in.type == V_FLOAT) return qtr_tpl_float(fabs(in.f));
  if (is_integer(in)) return integer(in) < 0 ? qtr_tpl_negate(ev, in, true) : qtr_tpl_int(integer(in));
  return fail_type(ev, "abs", in);
}

FILTER(filter_round) { /* precision=0, method='common' */
  int64_t precision = given(a[0]) ? integer(a[0]) : 0;
  bool up = false, down = false;
  if (given(a[0]) && !is_integer(a[0])) return fail_type(ev, "round precision", a[0]);
  if (given(a[1])) {
    struct value name = a[1];
    if (name.type != V_STRING) return fail_type(ev, "round method", name);
    up = name.s->len == 4 && memcmp(name.s->data, "ceil", 4) == 0;
    down = name.s->len == 5 && memcmp(name.s->data, "floor", 5) == 0;
    if (!up && !down && !(name.s->len == 6 && memcmp(name.s->data, "common", 6) == 0)) {
      return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "round: method must be common, ceil or floor");
    }
  }
  if (!qtr_tpl_is_number(in)) return fail_type(ev, "round", in);
  if (precision < -300 || precision > 300) return qtr_tpl_fail(ev, QTR_ERR_LIMIT, "round: precision out of range");
  double f = qtr_tpl_number(in);
  if (up || down) {
    double scale = pow(10, (double)precision), scaled = f * scale;
    return qtr_tpl_float((up ? ceil(scaled) : floor(scaled)) / scale);
  }
  if (is_integer(in)) {
    if (precision >= 0) return qtr_tpl_int(integer(in));
    if (precision < -18) return qtr_tpl_int(0);
    int64_t unit = 1, i = integer(in);
    for (int64_t k = precision; k < 0; k++) unit *= 10;
    int64_t rest = i % unit < 0 ? i % unit + unit : i % unit, base = i - rest, half = unit / 2;
    bool round_up = rest > half || (rest == half && base / unit % 2 != 0);
    int64_t rounded;
    if (__builtin_add_overflow(base, round_up ? unit : 0, &rounded)) return float_to_int(ev, INFINITY);
    return qtr_tpl_int(rounded);
  }
  if (!isfinite(f)) return in;
  if (precision >= 0) { /* the C library rounds the exact value, half to even, as Python does */
    char text[700];
    (void)snprintf(text, sizeof text, "%.*f", (int)precision, f);
    return qtr_tpl_float(strtod(text, NULL));
  }
  double unit = pow(10, (double)-precision);
  return qtr_tpl_float(nearbyint(f / unit) * unit);
}

/* ---- sequences ------------------------------------------------------------------------------- */

FILTER(filter_length) {
  size_t n;
  if (in.type == V_LOOP) qtr_tpl_raise(ev, in.loop->pending);
  if (!qtr_tpl_length(ev, in, &n))
    return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "object of type '%s' has no length", qtr_tpl_type_name(in));
  return qtr_tpl_int((int64_t)n);
}

FILTER(filter_list) {
  struct value *items;
  size_t n;
  if (!qtr_tpl_items(ev, in, &items, &n, NULL)) return qtr_tpl_undefined();
  struct value list = qtr_tpl_list(ev, V_LIST, n);
  if (n && !ev->failed) memcpy(list.l->items, items, n * sizeof *items);
  return list;
}

FILTER(filter_first) {
  if (in.type == V_ITERATOR) { /* takes one item only */
    if (in.it->pos < in.it->n) return in.it->items[in.it->pos++];
    qtr_tpl_raise(ev, in.it->pending);
    return qtr_tpl_undefined_hint(ev, "No first item, sequence was empty.");
  }
  struct value *items;
  size_t n;
  if (in.type == V_STRING && in.s->len) return qtr_tpl_getitem(ev, qtr_tpl_str(ev, in), qtr_tpl_int(0));
  if (!qtr_tpl_items(ev, in, &items, &n, NULL)) return qtr_tpl_undefined();
  return n ? items[0] : qtr_tpl_undefined_hint(ev, "No first item, sequence was empty.");
}

FILTER(filter_last) {
  if (in.type == V_ITERATOR)
    return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "last: a generator has no end to start from; use | list");
  struct value *items;
  size_t n;
  if (in.type == V_STRING && in.s->len) return qtr_tpl_getitem(ev, qtr_tpl_str(ev, in), qtr_tpl_int(-1));
  if (!qtr_tpl_items(ev, in, &items, &n, NULL)) return qtr_tpl_undefined();
  return n ? items[n - 1] : qtr_tpl_undefined_hint(ev, "No last item, sequence was empty.");
}

FILTER(filter_reverse) {
  struct value *items;
  size_t n;
  if (in.type == V_STRING) {
    struct value text = qtr_tpl_slice(ev, in, qtr_tpl_none(), qtr_tpl_none(), qtr_tpl_int(-1));
    return text;
  }
  if (!qtr_tpl_items(ev, in, &items, &n, NULL)) return qtr_tpl_undefined();
  struct value list = qtr_tpl_list(ev, V_LIST, n);
  for (size_t i = 0; i < n && !ev->failed; i++) list.l->items[i] = items[n - 1 - i];
  if (ev->failed || in.type == V_ITERATOR) return list;
  return qtr_tpl_iterator(ev, in.type == V_LIST ? "list_reverseiterator" : "reversed", list, NULL);
}

/* Keeps an error that stopped a lazy computation, to be raised by whoever consumes that far. */
static const struct qtr_error *take_error(struct eval *ev, const struct qtr_error *pending) {
  if (!ev->failed) return pending;
  if (ev->err->status == QTR_ERR_LIMIT || ev->err->status == QTR_ERR_MEMORY) return NULL; /* not to be hidden */
  struct qtr_error *kept = qtr_tpl_arena_alloc(&ev->arena, sizeof *kept);
  if (!kept) return NULL;
  *kept = *ev->err;
  ev->failed = false;
  return kept;
}

/* jinja2's generators do nothing, not even fail, before someone asks them: an error becomes the end of an empty iterator. */
static struct value lazily(struct eval *ev, struct value made) {
  const struct qtr_error *pending = take_error(ev, NULL);
  return pending ? qtr_tpl_iterator(ev, "generator", qtr_tpl_list(ev, V_LIST, 0), pending) : made;
}

FILTER(filter_items) {
  if (in.type == V_UNDEFINED) return qtr_tpl_iterator(ev, "generator", qtr_tpl_list(ev, V_LIST, 0), NULL);
  if (in.type != V_DICT)
    return lazily(ev, qtr_tpl_fail(ev, QTR_ERR_FORMAT, "items: '%s' is no mapping", qtr_tpl_type_name(in)));
  struct value view = {.type = V_VIEW, .sub = VIEW_ITEMS, .d = in.d}, list = filter_list(ev, view, NULL, NULL);
  return ev->failed ? list : qtr_tpl_iterator(ev, "generator", list, NULL);
}

FILTER(filter_join) { /* d='', attribute=none */
  struct value *items, separator = given(a[0]) ? qtr_tpl_str(ev, a[0]) : qtr_tpl_string_static(ev, "");
  size_t n;
  const struct qtr_error *pending;
  struct output out = {0};
  if (ev->failed || !qtr_tpl_items(ev, in, &items, &n, &pending)) return qtr_tpl_undefined();
  for (size_t i = 0; i < n && !ev->failed; i++) {
    struct value item = items[i];
    if (given(a[1]) && a[1].type != V_NONE) item = qtr_tpl_getpath(ev, item, a[1]);
    if (i) qtr_tpl_write(ev, &out, separator.s->data, separator.s->len);
    qtr_tpl_write_str(ev, &out, item);
  }
  qtr_tpl_raise(ev, pending);
  return qtr_tpl_output_string(ev, &out);
}

static struct value map_items(struct eval *ev, struct value in, const struct args *raw) {
  struct value *items;
  size_t n;
  const struct qtr_error *pending = NULL;
  if (!qtr_tpl_truth(in)) return qtr_tpl_iterator(ev, "generator", qtr_tpl_list(ev, V_LIST, 0), NULL);
  if (!qtr_tpl_items(ev, in, &items, &n, &pending)) return qtr_tpl_undefined();
  const struct builtin *filter = NULL;
  struct value attribute = {0}, otherwise = {0};
  struct args rest = {0};
  if (raw->n_positional == 0) {
    for (size_t k = 0; k < raw->n_keyword; k++) {
      const struct str *name = raw->keyword[k].name;
      if (name->len == 9 && memcmp(name->data, "attribute", 9) == 0) {
        attribute = raw->keyword[k].value;
      } else if (name->len == 7 && memcmp(name->data, "default", 7) == 0) {
        otherwise = raw->keyword[k].value;
      } else {
        return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "map: unknown keyword argument");
      }
    }
    if (!given(attribute)) return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "map needs a filter name or attribute=");
    if (otherwise.type == V_NONE) otherwise.type = V_MISSING;
  } else {
    struct value name = raw->positional[0];
    filter = name.type == V_STRING ? qtr_tpl_find_filter(name.s->data, name.s->len) : NULL;
    if (!filter) return qtr_tpl_fail(ev, QTR_ERR_UNSUPPORTED, "map: there is no such filter");
    rest = (struct args){raw->positional + 1, raw->n_positional - 1, raw->keyword, raw->n_keyword};
  }
  struct value list = qtr_tpl_list(ev, V_LIST, n);
  if (ev->failed) return list;
  if (ev->depth >= TPL_MAX_EVAL_DEPTH) return qtr_tpl_fail(ev, QTR_ERR_LIMIT, "filters are nested too deeply");
  ev->depth++; /* map('map', 'map', …) recurses */
  size_t done = 0;
  for (; done < n && qtr_tpl_charge(ev, 1); done++) {
    struct value v = items[done];
    if (filter) {
      v = qtr_tpl_call_builtin(ev, filter, v, &rest);
    } else {
      v = qtr_tpl_getpath(ev, v, attribute);
      if (v.type == V_UNDEFINED && given(otherwise)) v = otherwise;
    }
    if (ev->failed) break;
    list.l->items[done] = v;
  }
  ev->depth--;
  pending = take_error(ev, pending);
  if (ev->failed) return list;
  list.l->n = done;
  return qtr_tpl_iterator(ev, "generator", list, pending);
}

FILTER(filter_map) { return lazily(ev, map_items(ev, in, raw)); }

static struct value select_items(struct eval *ev, struct value in, const struct args *raw, bool keep, bool by_attribute) {
  struct value *items;
  size_t n, n_names = by_attribute ? 1 : 0;
  const struct qtr_error *pending = NULL;
  if (!qtr_tpl_truth(in)) return qtr_tpl_iterator(ev, "generator", qtr_tpl_list(ev, V_LIST, 0), NULL);
  if (raw->n_positional < n_names) return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "selectattr needs an attribute name");
  if (!qtr_tpl_items(ev, in, &items, &n, &pending)) return qtr_tpl_undefined();
  const struct builtin *test = NULL;
  struct args rest = {0};
  if (raw->n_positional > n_names) {
    struct value name = raw->positional[n_names];
    test = name.type == V_STRING ? qtr_tpl_find_test(name.s->data, name.s->len) : NULL;
    if (!test) return qtr_tpl_fail(ev, QTR_ERR_UNSUPPORTED, "select: there is no such test");
    rest = (struct args){raw->positional + n_names + 1, raw->n_positional - n_names - 1, raw->keyword, raw->n_keyword};
  }
  struct value list = qtr_tpl_list(ev, V_LIST, n);
  size_t kept = 0;
  for (size_t i = 0; i < n && qtr_tpl_charge(ev, 1); i++) {
    struct value v = by_attribute ? qtr_tpl_getpath(ev, items[i], raw->positional[0]) : items[i];
    if (test) v = qtr_tpl_call_builtin(ev, test, v, &rest);
    if (ev->failed) break;
    if (qtr_tpl_truth(v) == keep) list.l->items[kept++] = items[i];
  }
  pending = take_error(ev, pending);
  if (ev->failed) return list;
  list.l->n = kept;
  return qtr_tpl_iterator(ev, "generator", list, pending);
}

FILTER(filter_select) { return lazily(ev, select_items(ev, in, raw, true, false)); }
FILTER(filter_reject) { return lazily(ev, select_items(ev, in, raw, false, false)); }
FILTER(filter_selectattr) { return lazily(ev, select_items(ev, in, raw, true, true)); }
FILTER(filter_rejectattr) { return lazily(ev, select_items(ev, in, raw, false, true)); }

static struct value ignore_case(struct eval *ev, struct value v) {
  return v.type == V_STRING ? string_method(ev, "lower", v, &no_args) : v;
}

/* case_sensitive=false, attribute=none */
static struct value unique_items(struct eval *ev, struct value in, const struct value *a) {
  struct value *items, seen = qtr_tpl_dict(ev);
  size_t n, kept = 0;
  const struct qtr_error *pending = NULL;
  if (ev->failed || !qtr_tpl_items(ev, in, &items, &n, &pending)) return qtr_tpl_undefined();
  struct value list = qtr_tpl_list(ev, V_LIST, n);
  for (size_t i = 0; i < n && !ev->failed; i++) {
    struct value key = items[i];
    if (given(a[1]) && a[1].type != V_NONE) key = qtr_tpl_getpath(ev, key, a[1]);
    if (!flag(a[0])) key = ignore_case(ev, key);
    size_t before = seen.d->n;
    qtr_tpl_dict_set(ev, seen.d, key, qtr_tpl_none());
    if (seen.d->n > before) list.l->items[kept++] = items[i];
  }
  pending = take_error(ev, pending);
  if (ev->failed) return list;
  list.l->n = kept;
  return qtr_tpl_iterator(ev, "generator", list, pending);
}

FILTER(filter_unique) { return lazily(ev, unique_items(ev, in, a)); }

/* A stable merge sort of n items by key; reverse keeps equal items in their order, as Python does. */
struct sort_item {
  struct value key, value;
};
/* The sort filter's keys are lists of one in jinja2, and lists look for a difference before they ask for an order: so
 * undefined values and nones may stand beside each other. */
static bool key_less(struct eval *ev, struct value a, struct value b, bool as_list) {
  if (as_list && qtr_tpl_equal(ev, a, b, 0)) return false;
  return qtr_tpl_less(ev, a, b, OP_LT);
}
static void merge_sort(struct eval *ev, struct sort_item *items, struct sort_item *spare, size_t n, bool reverse,
                       bool as_list) {
  for (size_t width = 1; width < n && !ev->failed; width *= 2) {
    for (size_t from = 0; from < n; from += 2 * width) {
      size_t middle = QTR_MIN(from + width, n), end = QTR_MIN(from + 2 * width, n), i = from, j = middle;
      for (size_t k = from; k < end; k++) {
        bool right = i == middle;
        if (!right && j < end && !ev->failed) {
          size_t low = reverse ? i : j, high = reverse ? j : i;
          right = key_less(ev, items[low].key, items[high].key, as_list);
        }
        spare[k] = right ? items[j++] : items[i++];
      }
    }
    memcpy(items, spare, n * sizeof *items);
  }
}

static struct value sort_values(struct eval *ev, struct sort_item *items, size_t n, bool reverse, bool as_list) {
  struct sort_item *spare = qtr_tpl_alloc_array(ev, n, sizeof *spare);
  struct value list = qtr_tpl_list(ev, V_LIST, n);
  if (ev->failed) return list;
  merge_sort(ev, items, spare, n, reverse, as_list);
  for (size_t i = 0; i < n; i++) list.l->items[i] = items[i].value;
  return list;
}

/* The sort key: the value, its attribute, or a list of comma-separated attributes. */
static struct value sort_key(struct eval *ev, struct value v, struct value attribute, bool case_sensitive) {
  if (!given(attribute) || attribute.type == V_NONE) return case_sensitive ? v : ignore_case(ev, v);
  if (attribute.type != V_STRING || !attribute.s->len || !memchr(attribute.s->data, ',', attribute.s->len)) {
    v = qtr_tpl_getpath(ev, v, attribute);
    return case_sensitive ? v : ignore_case(ev, v);
  }
  struct value keys = qtr_tpl_list(ev, V_LIST, 0);
  const char *at = attribute.s->data, *end = at + attribute.s->len;
  while (!ev->failed) {
    const char *comma = memchr(at, ',', (size_t)(end - at));
    struct value key = qtr_tpl_getpath(ev, v, qtr_tpl_string(ev, at, (size_t)((comma ? comma : end) - at)));
    struct value one = qtr_tpl_list(ev, V_LIST, 1);
    if (ev->failed) break;
    one.l->items[0] = case_sensitive ? key : ignore_case(ev, key);
    keys = qtr_tpl_list_concat(ev, keys, one);
    if (!comma || comma + 1 == end) break;
    at = comma + 1;
  }
  return keys;
}

static struct sort_item *make_sort_items(struct eval *ev, struct value in, struct value attribute, bool case_sensitive,
                                         size_t *n) {
  struct value *items;
  if (!qtr_tpl_items(ev, in, &items, n, NULL)) return NULL;
  struct sort_item *sorted = qtr_tpl_alloc_array(ev, *n, sizeof *sorted);
  if (!sorted || !qtr_tpl_charge(ev, *n)) return NULL;
  for (size_t i = 0; i < *n; i++) {
    sorted[i].key = sort_key(ev, items[i], attribute, case_sensitive);
    sorted[i].value = items[i];
  }
  return ev->failed ? NULL : sorted;
}

FILTER(filter_sort) { /* reverse=false, case_sensitive=false, attribute=none */
  size_t n;
  struct sort_item *items = make_sort_items(ev, in, a[2], flag(a[1]), &n);
  return items ? sort_values(ev, items, n, flag(a[0]), true) : qtr_tpl_undefined();
}

FILTER(filter_dictsort) { /* case_sensitive=false, by='key', reverse=false */
  if (in.type != V_DICT) return fail_type(ev, "dictsort", in);
  bool by_value = given(a[1]) && a[1].type == V_STRING && a[1].s->len == 5 && memcmp(a[1].s->data, "value", 5) == 0;
  if (given(a[1]) && !by_value && !(a[1].type == V_STRING && a[1].s->len == 3 && memcmp(a[1].s->data, "key", 3) == 0)) {
    return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "dictsort: by must be 'key' or 'value'");
  }
  size_t n;
  struct value view = {.type = V_VIEW, .sub = VIEW_ITEMS, .d = in.d};
  struct sort_item *items = make_sort_items(ev, view, qtr_tpl_int(by_value), flag(a[0]), &n);
  return items ? sort_values(ev, items, n, flag(a[2]), false) : qtr_tpl_undefined();
}

static struct value extreme(struct eval *ev, struct value in, const struct value *a, bool greatest) {
  size_t n;
  struct sort_item *items = make_sort_items(ev, in, a[1], flag(a[0]), &n);
  if (!items) return qtr_tpl_undefined();
  if (n == 0) return qtr_tpl_undefined_hint(ev, "No aggregated item, sequence was empty.");
  size_t best = 0;
  for (size_t i = 1; i < n && !ev->failed; i++) {
    if (qtr_tpl_less(ev, items[i].key, items[best].key, greatest ? OP_GT : OP_LT)) best = i;
  }
  return items[best].value;
}
FILTER(filter_min) { return extreme(ev, in, a, false); }
FILTER(filter_max) { return extreme(ev, in, a, true); }

FILTER(filter_sum) { /* attribute=none, start=0 */
  struct value *items, total = given(a[1]) ? a[1] : qtr_tpl_int(0);
  size_t n;
  if (!qtr_tpl_items(ev, in, &items, &n, NULL)) return qtr_tpl_undefined();
  for (size_t i = 0; i < n && qtr_tpl_charge(ev, 1); i++) {
    struct value v = given(a[0]) && a[0].type != V_NONE ? qtr_tpl_getpath(ev, items[i], a[0]) : items[i];
    if (total.type == V_STRING) return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "sum: strings cannot be summed; use | join");
    total = qtr_tpl_binary(ev, OP_ADD, total, v);
  }
  return total;
}

static struct value batch_items(struct eval *ev, struct value in, const struct value *a) { /* linecount, fill_with=none */
  struct value *items;
  size_t n;
  if (!is_integer(a[0]) || integer(a[0]) < 1 || integer(a[0]) > TPL_MAX_RANGE)
    return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "batch: line count out of range");
  if (!qtr_tpl_items(ev, in, &items, &n, NULL)) return qtr_tpl_undefined();
  size_t per_line = (size_t)integer(a[0]), n_lines = qtr_ceil_div(n, per_line);
  bool fills = given(a[1]) && a[1].type != V_NONE;
  struct value lines = qtr_tpl_list(ev, V_LIST, n_lines);
  for (size_t i = 0; i < n_lines && !ev->failed; i++) {
    size_t n_here = QTR_MIN(per_line, n - i * per_line);
    struct value line = qtr_tpl_list(ev, V_LIST, fills ? per_line : n_here);
    if (ev->failed) break;
    for (size_t k = 0; k < line.l->n; k++) line.l->items[k] = k < n_here ? items[i * per_line + k] : a[1];
    lines.l->items[i] = line;
  }
  return ev->failed ? lines : qtr_tpl_iterator(ev, "generator", lines, NULL);
}

FILTER(filter_batch) { return lazily(ev, batch_items(ev, in, a)); }

/* ---- the rest -------------------------------------------------------------------------------- */

FILTER(filter_default) { /* default_value='', boolean=false */
  if (in.type != V_UNDEFINED && !(flag(a[1]) && !qtr_tpl_truth(in))) return in;
  return given(a[0]) ? a[0] : qtr_tpl_string_static(ev, "");
}

FILTER(filter_attr) {
  if (a[0].type != V_STRING) return fail_type(ev, "attr", a[0]);
  if (in.type == V_DICT) { /* attributes only, not items */
    bool unsafe;
    if (!qtr_tpl_find_method(V_DICT, a[0].s->data, a[0].s->len, &unsafe)) {
      return (struct value){.type = V_UNDEFINED, .sub = UNDEF_ATTRIBUTE, .of = V_DICT, .s = a[0].s};
    }
  }
  return qtr_tpl_getattr(ev, in, a[0].s);
}

static const struct builtin filters[] = {{"abs", filter_abs, "", 0, 0},
                                         {"attr", filter_attr, "name", 1, 0},
                                         {"batch", filter_batch, "linecount fill_with", 1, 0},
                                         {"capitalize", filter_capitalize, "", 0, 0},
                                         {"center", filter_center, NULL, 0, 0},
                                         {"count", filter_length, "", 0, 0},
                                         {"d", filter_default, "default_value boolean", 0, 0},
                                         {"default", filter_default, "default_value boolean", 0, 0},
                                         {"dictsort", filter_dictsort, "case_sensitive by reverse", 0, 0},
                                         {"e", filter_escape, "", 0, 0},
                                         {"escape", filter_escape, "", 0, 0},
                                         {"first", filter_first, "", 0, 0},
                                         {"float", filter_float, "default", 0, 0},
                                         {"forceescape", filter_forceescape, "", 0, 0},
                                         {"format", filter_format, NULL, 0, 0},
                                         {"indent", filter_indent, "width first blank", 0, 0},
                                         {"int", filter_int, "default base", 0, 0},
                                         {"items", filter_items, "", 0, 0},
                                         {"join", filter_join, "d attribute", 0, 0},
                                         {"last", filter_last, "", 0, 0},
                                         {"length", filter_length, "", 0, 0},
                                         {"list", filter_list, "", 0, 0},
                                         {"lower", filter_lower, "", 0, 0},
                                         {"map", filter_map, NULL, 0, 0},
                                         {"max", filter_max, "case_sensitive attribute", 0, 0},
                                         {"min", filter_min, "case_sensitive attribute", 0, 0},
                                         {"reject", filter_reject, NULL, 0, 0},
                                         {"rejectattr", filter_rejectattr, NULL, 0, 0},
                                         {"replace", filter_replace, "old new count", 2, 0},
                                         {"reverse", filter_reverse, "", 0, 0},
                                         {"round", filter_round, "precision method", 0, 0},
                                         {"safe", filter_safe, "", 0, 0},
                                         {"select", filter_select, NULL, 0, 0},
                                         {"selectattr", filter_selectattr, NULL, 0, 0},
                                         {"sort", filter_sort, "reverse case_sensitive attribute", 0, 0},
                                         {"string", filter_string, "", 0, 0},
                                         {"sum", filter_sum, "attribute start", 0, 0},
                                         {"title", filter_title, "", 0, 0},
                                         {"tojson", filter_tojson, "ensure_ascii indent separators sort_keys", 0, 0},
                                         {"trim", filter_trim, NULL, 0, 0},
                                         {"truncate", filter_truncate, "length killwords end leeway", 0, 0},
                                         {"unique", filter_unique, "case_sensitive attribute", 0, 0},
                                         {"upper", filter_upper, "", 0, 0},
                                         {"wordcount", filter_wordcount, "", 0, 0}};

const struct builtin *qtr_tpl_find_filter(const char *name, size_t len) {
  for (size_t i = 0; i < sizeof filters / sizeof *filters; i++) {
    if (strlen(filters[i].name) == len && memcmp(filters[i].name, name, len) == 0) return &filters[i];
  }
  return NULL;
}
