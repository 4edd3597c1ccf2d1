/* template_ops.c - operators, attribute and item access, slices: Python's rules with jinja2's sandbox. Integers have 64
 * bits: what would be longer in Python is an error here. */
#include "text/template_internal.h"

#include "base/checked.h"

#include <math.h>

/* ---- arithmetic ------------------------------------------------------------------------------ */

static struct value fail_operands(struct eval *ev, enum op op, struct value a, struct value b) {
  static const char *const signs[] = {
      [OP_ADD] = "+", [OP_SUB] = "-", [OP_MUL] = "*", [OP_DIV] = "/", [OP_FLOORDIV] = "//", [OP_MOD] = "%", [OP_POW] = "**"};
  if (a.type == V_UNDEFINED) return qtr_tpl_fail_undefined(ev, a);
  if (b.type == V_UNDEFINED) return qtr_tpl_fail_undefined(ev, b);
  return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "unsupported operands for %s: '%s' and '%s'", signs[op], qtr_tpl_type_name(a),
                      qtr_tpl_type_name(b));
}

static struct value power(struct eval *ev, int64_t base, int64_t exponent) {
  if (exponent < 0) {
    if (base == 0) return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "0 cannot be raised to a negative power");
    return qtr_tpl_float(pow((double)base, (double)exponent));
  }
  int64_t result = 1;
  bool overflow = false;
  while (true) {
    if (exponent & 1) overflow |= __builtin_mul_overflow(result, base, &result);
    exponent >>= 1;
    if (exponent == 0 || overflow) break;
    if (base == 0 || base == 1) break; /* nothing changes any more; keeps huge exponents quick */
    overflow |= __builtin_mul_overflow(base, base, &base);
  }
  if (exponent > 0 && base == 0) result = 0;
  if (overflow) return qtr_tpl_fail(ev, QTR_ERR_UNSUPPORTED, "an integer does not fit in 64 bits");
  return qtr_tpl_int(result);
}

static struct value integers(struct eval *ev, enum op op, int64_t x, int64_t y) {
  int64_t r = 0;
  bool overflow = false;
  switch (op) {
    case OP_ADD: overflow = __builtin_add_overflow(x, y, &r); break;
    case OP_SUB: overflow = __builtin_sub_overflow(x, y, &r); break;
    case OP_MUL: overflow = __builtin_mul_overflow(x, y, &r); break;
    case OP_POW: return power(ev, x, y);
    case OP_DIV:
      if (y == 0) return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "division by zero");
      return qtr_tpl_float((double)x / (double)y);
    default: /* // and %, rounded towards minus infinity */
      if (y == 0) return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "division by zero");
      if (y == -1) {
        if (op == OP_MOD) return qtr_tpl_int(0);
        overflow = __builtin_sub_overflow((int64_t)0, x, &r);
        break;
      }
      r = x % y;
      if (r != 0 && (r < 0) != (y < 0)) r += y;
      if (op == OP_FLOORDIV) r = (x - r) / y;
  }
  if (overflow) return qtr_tpl_fail(ev, QTR_ERR_UNSUPPORTED, "an integer does not fit in 64 bits");
  return qtr_tpl_int(r);
}

static struct value floats(struct eval *ev, enum op op, double x, double y) {
  switch (op) {
    case OP_ADD: return qtr_tpl_float(x + y);
    case OP_SUB: return qtr_tpl_float(x - y);
    case OP_MUL: return qtr_tpl_float(x * y);
    case OP_POW: {
      if (x == 0 && y < 0) return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "0.0 cannot be raised to a negative power");
      if (x < 0 && isfinite(x) && isfinite(y) && floor(y) != y) {
        return qtr_tpl_fail(ev, QTR_ERR_UNSUPPORTED, "a negative number to a fractional power is complex");
      }
      double r = pow(x, y);
      if (isinf(r) && isfinite(x) && isfinite(y)) return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "numerical result out of range");
      return qtr_tpl_float(r);
    }
    default: break;
  }
  if (y == 0) return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "division by zero");
  if (op == OP_DIV) return qtr_tpl_float(x / y);
  double mod = fmod(x, y);
  double quotient = (x - mod) / y;
  if (mod != 0) {
    if ((y < 0) != (mod < 0)) {
      mod += y;
      quotient -= 1;
    }
  } else {
    mod = copysign(0, y);
  }
  if (op == OP_MOD) return qtr_tpl_float(mod);
  if (quotient == 0) return qtr_tpl_float(copysign(0, x / y));
  double whole = floor(quotient);
  return qtr_tpl_float(quotient - whole > 0.5 ? whole + 1 : whole);
}

static struct value repeat(struct eval *ev, struct value v, int64_t n) {
  if (n < 0) n = 0;
  size_t total;
  if (v.type == V_STRING) {
    if (qtr_mul_overflow(v.s->len, (size_t)n, &total) || total > TPL_MAX_OUTPUT) {
      return qtr_tpl_fail(ev, QTR_ERR_LIMIT, "a string longer than %zu MiB", TPL_MAX_OUTPUT >> 20);
    }
    char *data = qtr_tpl_alloc(ev, total);
    if (!data || !qtr_tpl_charge_bytes(ev, total)) return qtr_tpl_undefined();
    if (v.s->len) {
      for (size_t at = 0; at < total; at += v.s->len) memcpy(data + at, v.s->data, v.s->len);
    }
    return qtr_tpl_markup(ev, qtr_tpl_string(ev, data, total), v.s->markup);
  }
  if (qtr_mul_overflow(v.l->n, (size_t)n, &total)) total = SIZE_MAX;
  struct value list = qtr_tpl_list(ev, (enum value_type)v.type, total);
  if (ev->failed || !qtr_tpl_charge(ev, total / 4)) return list;
  if (v.l->n) {
    for (size_t at = 0; at < total; at += v.l->n) memcpy(list.l->items + at, v.l->items, v.l->n * sizeof *v.l->items);
  }
  return list;
}

static bool is_integer(struct value v) { return v.type == V_INT || v.type == V_BOOL; }
static int64_t integer(struct value v) { return v.type == V_BOOL ? v.b : v.i; }
static bool is_sequence(struct value v) { return v.type == V_STRING || v.type == V_LIST || v.type == V_TUPLE; }

struct value qtr_tpl_binary(struct eval *ev, enum op op, struct value a, struct value b) {
  if (ev->failed) return qtr_tpl_undefined();
  switch (op) {
    case OP_EQ: return qtr_tpl_bool(qtr_tpl_equal(ev, a, b, 0));
    case OP_NE: return qtr_tpl_bool(!qtr_tpl_equal(ev, a, b, 0));
    case OP_LT:
    case OP_LE:
    case OP_GT:
    case OP_GE: return qtr_tpl_bool(qtr_tpl_less(ev, a, b, op));
    case OP_IN: return qtr_tpl_bool(qtr_tpl_contains(ev, a, b));
    case OP_NOT_IN: return qtr_tpl_bool(!qtr_tpl_contains(ev, a, b));
    default: break;
  }
  if (is_integer(a) && is_integer(b)) return integers(ev, op, integer(a), integer(b));
  if (qtr_tpl_is_number(a) && qtr_tpl_is_number(b)) return floats(ev, op, qtr_tpl_number(a), qtr_tpl_number(b));
  if (op == OP_ADD && a.type == V_STRING && b.type == V_STRING) {
    if (!a.s->markup && !b.s->markup) return qtr_tpl_concat(ev, a, b);
    a = qtr_tpl_escape(ev, a);
    b = qtr_tpl_escape(ev, b);
    return qtr_tpl_markup(ev, qtr_tpl_concat(ev, a, b), true);
  }
  if (op == OP_ADD && a.type == b.type && (a.type == V_LIST || a.type == V_TUPLE)) return qtr_tpl_list_concat(ev, a, b);
  if (op == OP_MUL && is_sequence(a) && is_integer(b)) return repeat(ev, a, integer(b));
  if (op == OP_MUL && is_sequence(b) && is_integer(a)) return repeat(ev, b, integer(a));
  if (op == OP_MOD && a.type == V_STRING) return qtr_tpl_percent_format(ev, a, b);
  return fail_operands(ev, op, a, b);
}

struct value qtr_tpl_negate(struct eval *ev, struct value v, bool negative) {
  if (v.type == V_FLOAT) return negative ? qtr_tpl_float(-v.f) : v;
  if (is_integer(v)) return negative ? integers(ev, OP_SUB, 0, integer(v)) : qtr_tpl_int(integer(v));
  if (v.type == V_UNDEFINED) return qtr_tpl_fail_undefined(ev, v);
  return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "bad operand type for unary %s: '%s'", negative ? "-" : "+", qtr_tpl_type_name(v));
}

/* ---- attributes and items -------------------------------------------------------------------- */

static struct value no_such(struct value v, struct value name, enum undefined_kind kind) {
  return (struct value){.type = V_UNDEFINED, .sub = (uint8_t)kind, .of = v.type, .s = name.type == V_STRING ? name.s : NULL};
}

static bool named(const struct str *s, const char *name) {
  return s->len == strlen(name) && memcmp(s->data, name, s->len) == 0;
}

static bool loop_attribute(struct eval *ev, const struct loop *loop, const struct str *name, struct value *v) {
  int64_t index0 = (int64_t)loop->index0, n = (int64_t)loop->n;
  if (named(name, "index")) {
    *v = qtr_tpl_int(index0 + 1);
  } else if (named(name, "index0")) {
    *v = qtr_tpl_int(index0);
  } else if (named(name, "first")) {
    *v = qtr_tpl_bool(index0 == 0);
  } else if (named(name, "last")) {
    if (index0 + 1 == n) qtr_tpl_raise(ev, loop->pending);
    *v = qtr_tpl_bool(index0 + 1 == n);
  } else if (named(name, "length")) {
    qtr_tpl_raise(ev, loop->pending);
    *v = qtr_tpl_int(n);
  } else if (named(name, "revindex")) {
    *v = qtr_tpl_int(n - index0);
  } else if (named(name, "revindex0")) {
    *v = qtr_tpl_int(n - index0 - 1);
  } else if (named(name, "depth")) {
    *v = qtr_tpl_int(1);
  } else if (named(name, "depth0")) {
    *v = qtr_tpl_int(0);
  } else if (named(name, "previtem")) {
    *v = index0 > 0 ? loop->items[index0 - 1] : qtr_tpl_undefined_hint(ev, "there is no previous item");
  } else if (named(name, "nextitem")) {
    *v = index0 + 1 < n ? loop->items[index0 + 1] : qtr_tpl_undefined_hint(ev, "there is no next item");
  } else {
    return false;
  }
  return true;
}

/* What Python's getattr finds. */
static bool find_attribute(struct eval *ev, struct value v, struct str *name, struct value *found) {
  bool unsafe = false;
  const struct builtin *def = qtr_tpl_find_method((enum value_type)v.type, name->data, name->len, &unsafe);
  if (unsafe) {
    *found = no_such(v, (struct value){.type = V_STRING, .s = name}, UNDEF_UNSAFE);
    return true;
  }
  if (def) {
    struct method *m = qtr_tpl_alloc(ev, sizeof *m);
    if (!m) return true;
    *m = (struct method){.self = v, .def = def};
    *found = (struct value){.type = V_METHOD, .method = m};
    return true;
  }
  if (v.type == V_LOOP) return loop_attribute(ev, v.loop, name, found);
  if (v.type == V_NAMESPACE) {
    const struct value *member = qtr_tpl_dict_get(ev, v.d, (struct value){.type = V_STRING, .s = name});
    if (member) *found = *member;
    return member != NULL;
  }
  if (v.type == V_MACRO && named(name, "name") && v.macro->node->kind == N_MACRO) {
    *found = (struct value){.type = V_STRING, .s = ev->tpl->names[v.macro->node->name]};
    return true;
  }
  if (v.type == V_RANGE && (named(name, "start") || named(name, "stop") || named(name, "step"))) {
    *found = qtr_tpl_int(named(name, "start") ? v.range->start : named(name, "stop") ? v.range->stop : v.range->step);
    return true;
  }
  if ((is_integer(v) || v.type == V_FLOAT) && (named(name, "real") || named(name, "imag"))) {
    *found = named(name, "real") ? (v.type == V_FLOAT ? v : qtr_tpl_int(integer(v)))
                                 : (v.type == V_FLOAT ? qtr_tpl_float(0) : qtr_tpl_int(0));
    return true;
  }
  return false;
}

/* What Python's v[key] finds; false for every kind of miss. */
static bool find_item(struct eval *ev, struct value v, struct value key, struct value *found) {
  if (v.type == V_DICT) {
    const struct value *member = qtr_tpl_dict_get(ev, v.d, key);
    if (member) *found = *member;
    return member != NULL;
  }
  size_t n;
  if (!is_integer(key) || !(is_sequence(v) || v.type == V_RANGE) || !qtr_tpl_length(ev, v, &n)) return false;
  int64_t i = integer(key);
  if (i < 0) i += (int64_t)n;
  if (i < 0 || i >= (int64_t)n) return false;
  if (v.type == V_RANGE) {
    *found = qtr_tpl_int(v.range->start + i * v.range->step);
  } else if (v.type == V_STRING) {
    size_t at = qtr_tpl_char_offset(ev, v.s, (size_t)i);
    uint32_t cp;
    size_t len = qtr_tpl_decode(v.s->data + at, v.s->len - at, &cp);
    *found = qtr_tpl_string(ev, v.s->data + at, len);
    *found = qtr_tpl_markup(ev, *found, v.s->markup);
  } else {
    *found = v.l->items[i];
  }
  return true;
}

struct value qtr_tpl_getattr(struct eval *ev, struct value v, struct str *name) {
  if (ev->failed) return qtr_tpl_undefined();
  if (v.type == V_UNDEFINED) return qtr_tpl_fail_undefined(ev, v);
  struct value found = qtr_tpl_undefined(), key = {.type = V_STRING, .s = name};
  if (find_attribute(ev, v, name, &found) || find_item(ev, v, key, &found)) return found;
  return no_such(v, key, UNDEF_ATTRIBUTE);
}

struct value qtr_tpl_getitem(struct eval *ev, struct value v, struct value key) {
  if (ev->failed) return qtr_tpl_undefined();
  if (v.type == V_UNDEFINED) return qtr_tpl_fail_undefined(ev, v);
  struct value found = qtr_tpl_undefined();
  if (find_item(ev, v, key, &found)) return found;
  if (key.type == V_STRING && find_attribute(ev, v, key.s, &found)) return found;
  return no_such(v, key, UNDEF_ATTRIBUTE);
}

struct value qtr_tpl_getpath(struct eval *ev, struct value v, struct value path) {
  if (path.type != V_STRING) return qtr_tpl_getitem(ev, v, path);
  const char *data = path.s->data, *end = data + path.s->len;
  while (!ev->failed) {
    const char *dot = data < end ? memchr(data, '.', (size_t)(end - data)) : NULL;
    size_t len = (size_t)((dot ? dot : end) - data);
    struct value key = qtr_tpl_string(ev, data, len);
    bool digits = len > 0;
    for (size_t i = 0; i < len; i++) digits = digits && data[i] >= '0' && data[i] <= '9';
    int64_t i;
    if (digits && qtr_tpl_parse_int(data, len, 10, &i)) key = qtr_tpl_int(i);
    v = qtr_tpl_getitem(ev, v, key);
    if (!dot || !qtr_tpl_charge(ev, 1)) break;
    data = dot + 1;
  }
  return v;
}

/* ---- slices ---------------------------------------------------------------------------------- */

static bool slice_integer(struct eval *ev, struct value v, int64_t *out) {
  *out = integer(v);
  if (is_integer(v)) return true;
  if (v.type == V_UNDEFINED) {
    (void)qtr_tpl_fail_undefined(ev, v);
  } else {
    (void)qtr_tpl_fail(ev, QTR_ERR_FORMAT, "slice indices must be integers or none, not '%s'", qtr_tpl_type_name(v));
  }
  return false;
}

static bool is_given(struct value v) { return v.type != V_MISSING && v.type != V_NONE; }

/* A bound of v[start:stop:step] over n items, clamped into [lowest, highest]. */
static bool slice_bound(struct eval *ev, struct value v, int64_t missing, int64_t lowest, int64_t highest, int64_t n,
                        int64_t *out) {
  *out = missing;
  if (!is_given(v)) return true;
  int64_t i;
  if (!slice_integer(ev, v, &i)) return false;
  if (i < 0) i = i < -n ? lowest : i + n;
  *out = QTR_MAX(lowest, QTR_MIN(i, highest));
  return true;
}

struct value qtr_tpl_slice(struct eval *ev, struct value v, struct value start, struct value stop, struct value step) {
  if (ev->failed) return qtr_tpl_undefined();
  if (v.type == V_UNDEFINED) return qtr_tpl_fail_undefined(ev, v);
  size_t length;
  if (!(is_sequence(v) || v.type == V_RANGE) || !qtr_tpl_length(ev, v, &length)) {
    return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "'%s' cannot be sliced", qtr_tpl_type_name(v));
  }
  int64_t n = (int64_t)length, by = 1, from, to;
  if (is_given(step) && !slice_integer(ev, step, &by)) return qtr_tpl_undefined();
  if (by == 0) return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "slice step cannot be zero");
  int64_t lowest = by < 0 ? -1 : 0, highest = by < 0 ? n - 1 : n;
  if (!slice_bound(ev, start, by < 0 ? n - 1 : 0, lowest, highest, n, &from) ||
      !slice_bound(ev, stop, by < 0 ? -1 : n, lowest, highest, n, &to)) {
    return qtr_tpl_undefined();
  }
  int64_t count = 0;
  if (by > 0 && from < to) count = (to - from - 1) / by + 1;
  if (by < 0 && from > to) count = by == INT64_MIN ? 1 : (from - to - 1) / -by + 1;
  if (v.type == V_RANGE) {
    struct range *r = qtr_tpl_alloc(ev, sizeof *r);
    if (!r) return qtr_tpl_undefined();
    /* items that exist cannot overflow; the ends and the step of an almost empty range may, and then wrap unused */
    uint64_t old_start = (uint64_t)v.range->start, old_step = (uint64_t)v.range->step;
    *r = (struct range){.start = (int64_t)(old_start + (uint64_t)from * old_step),
                        .stop = (int64_t)(old_start + (uint64_t)to * old_step),
                        .step = (int64_t)(old_step * (uint64_t)by),
                        .n = (size_t)count};
    return (struct value){.type = V_RANGE, .range = r};
  }
  if (v.type == V_STRING) {
    size_t begin = qtr_tpl_char_offset(ev, v.s, (size_t)QTR_MAX(from, 0));
    struct value s;
    if (by == 1 || count == 0) {
      size_t end = begin;
      uint32_t cp;
      if (length == v.s->len) {
        end = begin + (size_t)count;
      } else {
        for (int64_t i = 0; i < count; i++) end += qtr_tpl_decode(v.s->data + end, v.s->len - end, &cp);
        (void)qtr_tpl_charge_bytes(ev, end - begin);
      }
      s = qtr_tpl_string(ev, v.s->data + begin, end - begin);
      if (!ev->failed) s.s->n_chars = (ptrdiff_t)count;
    } else {
      struct value *chars;
      size_t n_chars;
      struct output out = {0};
      if (!qtr_tpl_items(ev, v, &chars, &n_chars, NULL)) return qtr_tpl_undefined();
      for (int64_t i = 0; i < count; i++) {
        const struct str *c = chars[from + i * by].s;
        qtr_tpl_write(ev, &out, c->data, c->len);
      }
      s = qtr_tpl_output_string(ev, &out);
    }
    return qtr_tpl_markup(ev, s, v.s->markup);
  }
  if (by == 1) { /* shares the items */
    struct list *l = qtr_tpl_alloc(ev, sizeof *l);
    if (!l) return qtr_tpl_undefined();
    *l = (struct list){.items = v.l->items + from, .n = (size_t)count};
    return (struct value){.type = v.type, .l = l};
  }
  struct value list = qtr_tpl_list(ev, (enum value_type)v.type, (size_t)count);
  for (int64_t i = 0; !ev->failed && i < count; i++) list.l->items[i] = v.l->items[from + i * by];
  return list;
}
