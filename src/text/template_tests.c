/* template_tests.c - the tests of jinja2 (`value is name(args)`) and its global functions: range, namespace, dict,
 * raise_exception, strftime_now. */
#include "text/template_internal.h"

#include <stdio.h>
#include <time.h>

#define TEST(name)                                                                                           \
  static struct value name(__attribute__((unused)) struct eval *ev, __attribute__((unused)) struct value in, \
                           __attribute__((unused)) const struct value *a, __attribute__((unused)) const struct args *raw)

TEST(test_defined) { return qtr_tpl_bool(in.type != V_UNDEFINED); }
TEST(test_undefined) { return qtr_tpl_bool(in.type == V_UNDEFINED); }
TEST(test_none) { return qtr_tpl_bool(in.type == V_NONE); }
TEST(test_boolean) { return qtr_tpl_bool(in.type == V_BOOL); }
TEST(test_true) { return qtr_tpl_bool(in.type == V_BOOL && in.b); }
TEST(test_false) { return qtr_tpl_bool(in.type == V_BOOL && !in.b); }
TEST(test_integer) { return qtr_tpl_bool(in.type == V_INT); }
TEST(test_float) { return qtr_tpl_bool(in.type == V_FLOAT); }
TEST(test_number) { return qtr_tpl_bool(qtr_tpl_is_number(in)); }
TEST(test_string) { return qtr_tpl_bool(in.type == V_STRING); }
TEST(test_mapping) { return qtr_tpl_bool(in.type == V_DICT); }
TEST(test_iterable) { return qtr_tpl_bool(qtr_tpl_is_iterable(in)); }
TEST(test_escaped) { return qtr_tpl_bool(in.type == V_STRING && in.s->markup); }
TEST(test_callable) {
  return qtr_tpl_bool(in.type == V_MACRO || in.type == V_METHOD || in.type == V_FUNCTION || in.type == V_LOOP ||
                      in.type == V_UNDEFINED);
}
TEST(test_sequence) {
  return qtr_tpl_bool(in.type == V_UNDEFINED || in.type == V_STRING || in.type == V_LIST || in.type == V_TUPLE ||
                      in.type == V_DICT || in.type == V_RANGE);
}

static struct value remainder_is(struct eval *ev, struct value in, int64_t by, int64_t rest) {
  struct value r = qtr_tpl_binary(ev, OP_MOD, in, qtr_tpl_int(by));
  return qtr_tpl_bool(!ev->failed && qtr_tpl_equal(ev, r, qtr_tpl_int(rest), 0));
}
TEST(test_odd) { return remainder_is(ev, in, 2, 1); }
TEST(test_even) { return remainder_is(ev, in, 2, 0); }
TEST(test_divisibleby) {
  struct value r = qtr_tpl_binary(ev, OP_MOD, in, a[0]);
  return qtr_tpl_bool(!ev->failed && qtr_tpl_equal(ev, r, qtr_tpl_int(0), 0));
}

/* str(value).islower() or isupper(): some letter has case, and none the other one. */
static struct value test_case(struct eval *ev, struct value in, bool upper) {
  struct value text = qtr_tpl_str(ev, in);
  bool some = false;
  if (ev->failed || !qtr_tpl_charge(ev, text.s->len / TPL_STEP_CHARS)) return text;
  for (size_t i = 0; i < text.s->len;) {
    uint32_t cp;
    i += qtr_tpl_decode(text.s->data + i, text.s->len - i, &cp);
    if (!qtr_tpl_is_cased(cp)) continue;
    if (upper ? !qtr_tpl_is_upper(cp) : !qtr_tpl_is_lower(cp)) return qtr_tpl_bool(false);
    some = true;
  }
  return qtr_tpl_bool(some);
}
TEST(test_lower) { return test_case(ev, in, false); }
TEST(test_upper) { return test_case(ev, in, true); }

TEST(test_sameas) {
  struct value b = a[0];
  if (in.type != b.type) return qtr_tpl_bool(false);
  if (in.type == V_NONE) return qtr_tpl_bool(true);
  if (qtr_tpl_is_number(in) || in.type == V_STRING) return qtr_tpl_bool(qtr_tpl_equal(ev, in, b, 0));
  return qtr_tpl_bool(in.d == b.d);
}
TEST(test_eq) { return qtr_tpl_binary(ev, OP_EQ, in, a[0]); }
TEST(test_ne) { return qtr_tpl_binary(ev, OP_NE, in, a[0]); }
TEST(test_lt) { return qtr_tpl_binary(ev, OP_LT, in, a[0]); }
TEST(test_le) { return qtr_tpl_binary(ev, OP_LE, in, a[0]); }
TEST(test_gt) { return qtr_tpl_binary(ev, OP_GT, in, a[0]); }
TEST(test_ge) { return qtr_tpl_binary(ev, OP_GE, in, a[0]); }
TEST(test_in) { return qtr_tpl_binary(ev, OP_IN, in, a[0]); }
TEST(test_filter) { return qtr_tpl_bool(in.type == V_STRING && qtr_tpl_find_filter(in.s->data, in.s->len)); }
TEST(test_test) { return qtr_tpl_bool(in.type == V_STRING && qtr_tpl_find_test(in.s->data, in.s->len)); }

static const struct builtin tests[] = {{"odd", test_odd, "", 0, 0},
                                       {"even", test_even, "", 0, 0},
                                       {"divisibleby", test_divisibleby, "num", 1, 0},
                                       {"defined", test_defined, "", 0, 0},
                                       {"undefined", test_undefined, "", 0, 0},
                                       {"filter", test_filter, "", 0, 0},
                                       {"test", test_test, "", 0, 0},
                                       {"none", test_none, "", 0, 0},
                                       {"boolean", test_boolean, "", 0, 0},
                                       {"false", test_false, "", 0, 0},
                                       {"true", test_true, "", 0, 0},
                                       {"integer", test_integer, "", 0, 0},
                                       {"float", test_float, "", 0, 0},
                                       {"lower", test_lower, "", 0, 0},
                                       {"upper", test_upper, "", 0, 0},
                                       {"string", test_string, "", 0, 0},
                                       {"mapping", test_mapping, "", 0, 0},
                                       {"number", test_number, "", 0, 0},
                                       {"sequence", test_sequence, "", 0, 0},
                                       {"iterable", test_iterable, "", 0, 0},
                                       {"callable", test_callable, "", 0, 0},
                                       {"sameas", test_sameas, "other", 1, 0},
                                       {"escaped", test_escaped, "", 0, 0},
                                       {"in", test_in, "seq", 1, 0},
                                       {"==", test_eq, "b", 1, 0},
                                       {"eq", test_eq, "b", 1, 0},
                                       {"equalto", test_eq, "b", 1, 0},
                                       {"!=", test_ne, "b", 1, 0},
                                       {"ne", test_ne, "b", 1, 0},
                                       {">", test_gt, "b", 1, 0},
                                       {"gt", test_gt, "b", 1, 0},
                                       {"greaterthan", test_gt, "b", 1, 0},
                                       {"ge", test_ge, "b", 1, 0},
                                       {">=", test_ge, "b", 1, 0},
                                       {"<", test_lt, "b", 1, 0},
                                       {"lt", test_lt, "b", 1, 0},
                                       {"lessthan", test_lt, "b", 1, 0},
                                       {"<=", test_le, "b", 1, 0},
                                       {"le", test_le, "b", 1, 0}};

static const struct builtin *find(const struct builtin *table, size_t n, const char *name, size_t len) {
  for (size_t i = 0; i < n; i++) {
    if (strlen(table[i].name) == len && memcmp(table[i].name, name, len) == 0) return &table[i];
  }
  return NULL;
}

const struct builtin *qtr_tpl_find_test(const char *name, size_t len) {
  return find(tests, sizeof tests / sizeof *tests, name, len);
}

/* ---- global functions ------------------------------------------------------------------------ */

TEST(function_range) {
  int64_t part[3] = {0, 0, 1};
  int n = a[2].type != V_MISSING ? 3 : a[1].type != V_MISSING ? 2 : 1;
  for (int i = 0; i < n; i++) {
    if (a[i].type == V_UNDEFINED) return qtr_tpl_fail_undefined(ev, a[i]);
    if (a[i].type != V_INT && a[i].type != V_BOOL) {
      return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "range: '%s' is not an integer", qtr_tpl_type_name(a[i]));
    }
    part[i] = a[i].type == V_INT ? a[i].i : a[i].b;
  }
  if (n == 1) {
    part[1] = part[0];
    part[0] = 0;
  }
  if (part[2] == 0) return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "range: step must not be zero");
  uint64_t distance = 0, step = part[2] < 0 ? 0 - (uint64_t)part[2] : (uint64_t)part[2];
  if (part[2] > 0 && part[1] > part[0]) distance = (uint64_t)part[1] - (uint64_t)part[0];
  if (part[2] < 0 && part[1] < part[0]) distance = (uint64_t)part[0] - (uint64_t)part[1];
  uint64_t count = distance ? (distance - 1) / step + 1 : 0;
  if (count > TPL_MAX_RANGE) return qtr_tpl_fail(ev, QTR_ERR_LIMIT, "range: more than %d items", TPL_MAX_RANGE);
  struct range *r = qtr_tpl_alloc(ev, sizeof *r);
  if (!r) return qtr_tpl_undefined();
  *r = (struct range){.start = part[0], .stop = part[1], .step = part[2], .n = (size_t)count};
  return (struct value){.type = V_RANGE, .range = r};
}

/* dict(mapping or pairs, **more) */
static struct value make_dict(struct eval *ev, const char *name, const struct args *raw) {
  struct value d = qtr_tpl_dict(ev), *items;
  size_t n;
  if (raw->n_positional > 1) return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "%s takes at most one positional argument", name);
  if (raw->n_positional == 1 && !ev->failed) {
    struct value from = raw->positional[0];
    if (from.type == V_DICT) from = (struct value){.type = V_VIEW, .sub = VIEW_ITEMS, .d = from.d};
    if (!qtr_tpl_items(ev, from, &items, &n, NULL)) return qtr_tpl_undefined();
    for (size_t i = 0; i < n && qtr_tpl_charge(ev, 1); i++) {
      struct value *pair;
      size_t n_pair;
      if (!qtr_tpl_items(ev, items[i], &pair, &n_pair, NULL)) return qtr_tpl_undefined();
      if (n_pair != 2) return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "%s: an item is not a pair", name);
      qtr_tpl_dict_set(ev, d.d, pair[0], pair[1]);
    }
  }
  for (size_t k = 0; k < raw->n_keyword && !ev->failed; k++) {
    qtr_tpl_dict_set(ev, d.d, (struct value){.type = V_STRING, .s = raw->keyword[k].name}, raw->keyword[k].value);
  }
  return d;
}

TEST(function_dict) { return make_dict(ev, "dict", raw); }

TEST(function_namespace) {
  struct value v = make_dict(ev, "namespace", raw);
  if (ev->failed) return v;
  for (size_t i = 0; i < v.d->n; i++) {
    struct value key = v.d->entries[i].key;
    if (key.type == V_STRING && key.s->len && key.s->data[0] == '_') {
      return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "a namespace takes no attribute that starts with an underscore");
    }
  }
  v.type = V_NAMESPACE;
  return v;
}

/* The message is the template's own: it goes to the user as it is, without the line. */
TEST(function_raise_exception) {
  struct value text = qtr_tpl_str(ev, a[0]);
  if (ev->failed) return text;
  int len = text.s->len > 400 ? 400 : (int)text.s->len;
  while (len > 0 && len < (int)text.s->len && ((uint8_t)text.s->data[len] & 0xc0) == 0x80) len--;
  ev->failed = true;
  (void)qtr_fail(ev->err, QTR_ERR_ARGUMENT, "%.*s", len, text.s->data);
  return qtr_tpl_undefined();
}

TEST(function_strftime_now) {
  struct value format = a[0];
  char pattern[256], text[1024];
  if (format.type != V_STRING) return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "strftime_now: the format must be a string");
  if (format.s->len >= sizeof pattern) return qtr_tpl_fail(ev, QTR_ERR_LIMIT, "strftime_now: the format is too long");
  if (format.s->len == 0) return qtr_tpl_string_static(ev, "");
  memcpy(pattern, format.s->data, format.s->len);
  pattern[format.s->len] = 0;
  time_t now = time(NULL);
  struct tm tm;
  if (!localtime_r(&now, &tm)) return qtr_tpl_fail(ev, QTR_ERR_STATE, "strftime_now: no local time");
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
  size_t len = strftime(text, sizeof text, pattern, &tm);
#pragma GCC diagnostic pop
  return qtr_tpl_string_copy(ev, text, len);
}

static const struct builtin functions[] = {{"range", function_range, "start stop step", 1, 0},
                                           {"dict", function_dict, NULL, 0, 0},
                                           {"namespace", function_namespace, NULL, 0, 0},
                                           {"raise_exception", function_raise_exception, "message", 1, 0},
                                           {"strftime_now", function_strftime_now, "format", 1, 0}};

const struct builtin *qtr_tpl_find_function(const char *name, size_t len) {
  return find(functions, sizeof functions / sizeof *functions, name, len);
}
