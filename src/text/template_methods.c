/* template_methods.c - methods of str, dict, list, tuple, range and of the loop variable. Those that would change a list or
 * dictionary exist but are refused, as in jinja2's immutable sandbox. */
#include "text/template_internal.h"

#include "base/checked.h"

#define METHOD(name)                                                                                         \
  static struct value name(__attribute__((unused)) struct eval *ev, __attribute__((unused)) struct value in, \
                           __attribute__((unused)) const struct value *a, __attribute__((unused)) const struct args *raw)

static bool given(struct value v) { return v.type != V_MISSING; }
static bool is_integer(struct value v) { return v.type == V_INT || v.type == V_BOOL; }
static int64_t integer(struct value v) { return v.type == V_BOOL ? v.b : v.i; }

static struct value fail_argument(struct eval *ev, const char *method, const char *expected, struct value v) {
  if (v.type == V_UNDEFINED) return qtr_tpl_fail_undefined(ev, v);
  return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "%s: expected %s, got '%s'", method, expected, qtr_tpl_type_name(v));
}

/* A piece of in, sharing its bytes and its markup. */
static struct value part(struct eval *ev, struct value in, size_t from, size_t to) {
  struct value v = qtr_tpl_string(ev, in.s->data + from, to - from);
  return ev->failed ? v : qtr_tpl_markup(ev, v, in.s->markup);
}

/* ---- strip ----------------------------------------------------------------------------------- */

static bool in_chars(const struct str *chars, uint32_t cp) {
  if (!chars) return qtr_tpl_is_space(cp);
  for (size_t i = 0; i < chars->len;) {
    uint32_t c;
    i += qtr_tpl_decode(chars->data + i, chars->len - i, &c);
    if (c == cp) return true;
  }
  return false;
}

/* Start of the character that ends at `end`. */
static size_t previous(const struct str *s, size_t end) {
  size_t at = end - 1;
  for (size_t back = 1; back < 4 && at > 0 && ((uint8_t)s->data[at] & 0xc0) == 0x80; back++) at--;
  uint32_t cp;
  return at + qtr_tpl_decode(s->data + at, end - at, &cp) == end ? at : end - 1;
}

static struct value strip(struct eval *ev, const char *method, struct value in, struct value chars, bool left, bool right) {
  const struct str *set = NULL;
  if (given(chars) && chars.type != V_NONE) {
    if (chars.type != V_STRING) return fail_argument(ev, method, "a string", chars);
    set = chars.s;
  }
  size_t from = 0, to = in.s->len, work = set ? set->len + 1 : 1;
  uint32_t cp;
  while (left && from < to) {
    size_t n = qtr_tpl_decode(in.s->data + from, to - from, &cp);
    if (!in_chars(set, cp) || !qtr_tpl_charge_bytes(ev, work)) break;
    from += n;
  }
  while (right && to > from) {
    size_t at = previous(in.s, to);
    (void)qtr_tpl_decode(in.s->data + at, to - at, &cp);
    if (!in_chars(set, cp) || !qtr_tpl_charge_bytes(ev, work)) break;
    to = at;
  }
  return part(ev, in, from, to);
}
METHOD(str_strip) { return strip(ev, "strip", in, a[0], true, true); }
METHOD(str_lstrip) { return strip(ev, "lstrip", in, a[0], true, false); }
METHOD(str_rstrip) { return strip(ev, "rstrip", in, a[0], false, true); }

static struct value remove_affix(struct eval *ev, struct value in, struct value affix, bool suffix) {
  if (affix.type != V_STRING) return fail_argument(ev, "removeprefix/removesuffix", "a string", affix);
  size_t n = affix.s->len, len = in.s->len;
  if (n == 0 || n > len || memcmp(in.s->data + (suffix ? len - n : 0), affix.s->data, n) != 0) return in;
  return suffix ? part(ev, in, 0, len - n) : part(ev, in, n, len);
}
METHOD(str_removeprefix) { return remove_affix(ev, in, a[0], false); }
METHOD(str_removesuffix) { return remove_affix(ev, in, a[0], true); }

/* ---- case ------------------------------------------------------------------------------------ */

/* A capital sigma at the end of a word becomes a final one. */
static bool is_final_sigma(const struct str *s, size_t at, size_t n) {
  uint32_t cp;
  bool before = false, after = false;
  for (size_t i = at; i > 0;) {
    i = previous(s, i);
    (void)qtr_tpl_decode(s->data + i, s->len - i, &cp);
    if (qtr_tpl_is_case_ignorable(cp)) continue;
    before = qtr_tpl_is_cased(cp);
    break;
  }
  for (size_t i = at + n; i < s->len;) {
    i += qtr_tpl_decode(s->data + i, s->len - i, &cp);
    if (qtr_tpl_is_case_ignorable(cp)) continue;
    after = qtr_tpl_is_cased(cp);
    break;
  }
  return before && !after;
}

enum case_change { TO_LOWER, TO_UPPER, TO_CAPITALIZED, TO_TITLE, TO_SWAPPED, TO_FOLDED };

static struct value change_case(struct eval *ev, struct value in, enum case_change how) {
  struct output out = {0};
  const struct str *s = in.s;
  bool previous_cased = false;
  for (size_t i = 0; i < s->len && !ev->failed;) {
    uint32_t cp, mapped[3];
    char utf8[4];
    size_t n = qtr_tpl_decode(s->data + i, s->len - i, &cp);
    enum letter_case to = CASE_LOWER;
    if (how == TO_UPPER || (how == TO_SWAPPED && qtr_tpl_is_lower(cp))) to = CASE_UPPER;
    if ((how == TO_CAPITALIZED && i == 0) || (how == TO_TITLE && !previous_cased)) to = CASE_TITLE;
    if (how == TO_SWAPPED && !qtr_tpl_is_upper(cp) && !qtr_tpl_is_lower(cp)) {
      qtr_tpl_write(ev, &out, s->data + i, n);
      i += n;
      continue;
    }
    if (how == TO_TITLE) previous_cased = qtr_tpl_is_cased(cp);
    size_t n_mapped = 1;
    if (n == 1 && cp >= 0x80) { /* a byte that is no character stays */
      qtr_tpl_write(ev, &out, s->data + i, 1);
      i++;
      continue;
    }
    if (how == TO_FOLDED) to = CASE_FOLD;
    if (cp == 0x3a3 && to == CASE_LOWER) {
      mapped[0] = is_final_sigma(s, i, n) ? 0x3c2 : 0x3c3;
    } else {
      n_mapped = qtr_tpl_map_case(cp, to, mapped);
    }
    for (size_t k = 0; k < n_mapped; k++) qtr_tpl_write(ev, &out, utf8, qtr_tpl_encode(mapped[k], utf8));
    i += n;
  }
  struct value v = qtr_tpl_output_string(ev, &out);
  if (ev->failed || !qtr_tpl_charge(ev, s->len / TPL_STEP_CHARS)) return v;
  return qtr_tpl_markup(ev, v, s->markup);
}
METHOD(str_lower) { return change_case(ev, in, TO_LOWER); }
METHOD(str_upper) { return change_case(ev, in, TO_UPPER); }
METHOD(str_capitalize) { return change_case(ev, in, TO_CAPITALIZED); }
METHOD(str_title) { return change_case(ev, in, TO_TITLE); }
METHOD(str_casefold) { return change_case(ev, in, TO_FOLDED); }
METHOD(str_swapcase) { return change_case(ev, in, TO_SWAPPED); }

/* ---- split and join -------------------------------------------------------------------------- */

/* Collects parts of a string whose number is not known before. */
struct parts {
  struct value *items;
  size_t n, capacity;
};
static void add_part(struct eval *ev, struct parts *p, struct value v) {
  if (ev->failed || !qtr_tpl_charge(ev, 1)) return;
  if (p->n == p->capacity) {
    size_t capacity = p->capacity ? p->capacity * 2 : 8;
    struct value *grown = capacity > TPL_MAX_ITEMS * 2 ? NULL : qtr_tpl_alloc_array(ev, capacity, sizeof *grown);
    if (!grown) {
      (void)qtr_tpl_fail(ev, QTR_ERR_LIMIT, "split: more than %zu parts", TPL_MAX_ITEMS);
      return;
    }
    if (p->n) memcpy(grown, p->items, p->n * sizeof *grown);
    p->items = grown;
    p->capacity = capacity;
  }
  p->items[p->n++] = v;
}

static struct value parts_list(struct eval *ev, const struct parts *p, bool reversed) {
  struct value list = qtr_tpl_list(ev, V_LIST, p->n);
  for (size_t i = 0; i < p->n && !ev->failed; i++) list.l->items[i] = p->items[reversed ? p->n - 1 - i : i];
  return list;
}

static size_t skip_spaces(const struct str *s, size_t at, bool spaces) {
  while (at < s->len) {
    uint32_t cp;
    size_t n = qtr_tpl_decode(s->data + at, s->len - at, &cp);
    if (qtr_tpl_is_space(cp) != spaces) break;
    at += n;
  }
  return at;
}

static size_t skip_spaces_back(const struct str *s, size_t end, bool spaces) {
  while (end > 0) {
    size_t at = previous(s, end);
    uint32_t cp;
    (void)qtr_tpl_decode(s->data + at, end - at, &cp);
    if (qtr_tpl_is_space(cp) != spaces) break;
    end = at;
  }
  return end;
}

static struct value split_spaces(struct eval *ev, struct value in, int64_t most, bool from_right) {
  struct parts p = {0};
  const struct str *s = in.s;
  if (from_right) {
    for (size_t end = skip_spaces_back(s, s->len, true); end > 0 && !ev->failed;) {
      size_t from = most == 0 ? 0 : skip_spaces_back(s, end, false);
      if (most > 0) most--;
      add_part(ev, &p, part(ev, in, from, end));
      end = skip_spaces_back(s, from, true);
    }
  } else {
    for (size_t at = skip_spaces(s, 0, true); at < s->len && !ev->failed;) {
      size_t end = most == 0 ? s->len : skip_spaces(s, at, false);
      if (most > 0) most--;
      add_part(ev, &p, part(ev, in, at, end));
      at = skip_spaces(s, end, true);
    }
  }
  (void)qtr_tpl_charge_bytes(ev, s->len);
  return parts_list(ev, &p, from_right);
}

static size_t find_back(struct eval *ev, const struct str *s, size_t end, const struct str *what) {
  for (size_t at = end >= what->len ? end - what->len + 1 : 0; at-- > 0;) {
    if (s->data[at] != what->data[0]) continue;
    if (!qtr_tpl_charge_bytes(ev, what->len)) break; /* this search can be quadratic */
    if (memcmp(s->data + at, what->data, what->len) == 0) return at;
  }
  return SIZE_MAX;
}

/* Searches windows that double, so that a near hit costs little even where memmem looks at its whole range first
 * (sanitizers). */
static size_t find_from(const struct str *s, size_t from, const struct str *what) {
  if (what->len == 0) return from;
  for (size_t window = 4096; s->len - from >= what->len; window *= 2) {
    size_t n = QTR_MIN(s->len - from, QTR_MAX(window, 2 * what->len));
    const char *hit = memmem(s->data + from, n, what->data, what->len);
    if (hit) return (size_t)(hit - s->data);
    from += n - what->len + 1;
  }
  return SIZE_MAX;
}

static struct value split(struct eval *ev, struct value in, const struct value *a, bool from_right) {
  int64_t most = -1;
  if (given(a[1])) {
    if (!is_integer(a[1])) return fail_argument(ev, "split", "an integer", a[1]);
    most = integer(a[1]) < 0 ? -1 : integer(a[1]);
  }
  if (!given(a[0]) || a[0].type == V_NONE) return split_spaces(ev, in, most, from_right);
  if (a[0].type != V_STRING) return fail_argument(ev, "split", "a string", a[0]);
  const struct str *separator = a[0].s, *s = in.s;
  if (separator->len == 0) return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "split: empty separator");
  struct parts p = {0};
  size_t at = from_right ? s->len : 0;
  while (!ev->failed) {
    size_t hit = most == 0 ? SIZE_MAX : from_right ? find_back(ev, s, at, separator) : find_from(s, at, separator);
    if (most > 0) most--;
    if (hit == SIZE_MAX) break;
    add_part(ev, &p, from_right ? part(ev, in, hit + separator->len, at) : part(ev, in, at, hit));
    at = from_right ? hit : hit + separator->len;
  }
  add_part(ev, &p, from_right ? part(ev, in, 0, at) : part(ev, in, at, s->len));
  (void)qtr_tpl_charge_bytes(ev, s->len);
  return parts_list(ev, &p, from_right);
}
METHOD(str_split) { return split(ev, in, a, false); }
METHOD(str_rsplit) { return split(ev, in, a, true); }

METHOD(str_splitlines) { /* keepends=false */
  struct parts p = {0};
  const struct str *s = in.s;
  for (size_t i = 0; i < s->len && !ev->failed;) {
    size_t end = i, n = 0;
    uint32_t cp = 0;
    for (; end < s->len; end += n) {
      n = qtr_tpl_decode(s->data + end, s->len - end, &cp);
      if (qtr_tpl_is_line_break(cp)) break;
    }
    size_t next = end == s->len ? end : end + n + (cp == '\r' && end + 1 < s->len && s->data[end + 1] == '\n');
    add_part(ev, &p, part(ev, in, i, given(a[0]) && qtr_tpl_truth(a[0]) ? next : end));
    i = next;
  }
  (void)qtr_tpl_charge_bytes(ev, s->len);
  return parts_list(ev, &p, false);
}

static struct value partition(struct eval *ev, struct value in, struct value separator, bool from_right) {
  if (separator.type != V_STRING) return fail_argument(ev, "partition", "a string", separator);
  if (separator.s->len == 0) return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "partition: empty separator");
  size_t hit = from_right ? find_back(ev, in.s, in.s->len, separator.s) : find_from(in.s, 0, separator.s);
  struct value t = qtr_tpl_list(ev, V_TUPLE, 3);
  if (ev->failed || !qtr_tpl_charge_bytes(ev, in.s->len)) return t;
  if (hit != SIZE_MAX) {
    t.l->items[0] = part(ev, in, 0, hit);
    t.l->items[1] = separator;
    t.l->items[2] = part(ev, in, hit + separator.s->len, in.s->len);
  } else {
    t.l->items[0] = t.l->items[1] = t.l->items[2] = part(ev, in, 0, 0);
    t.l->items[from_right ? 2 : 0] = in;
  }
  return t;
}
METHOD(str_partition) { return partition(ev, in, a[0], false); }
METHOD(str_rpartition) { return partition(ev, in, a[0], true); }

METHOD(str_join) {
  struct value *items;
  size_t n;
  struct output out = {0};
  if (!qtr_tpl_items(ev, a[0], &items, &n, NULL)) return qtr_tpl_undefined();
  for (size_t i = 0; i < n && !ev->failed; i++) {
    struct value item = items[i];
    if (item.type != V_STRING && !in.s->markup) {
      return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "join: item %zu is '%s', not a string", i, qtr_tpl_type_name(item));
    }
    if (in.s->markup) item = qtr_tpl_escape(ev, item);
    if (ev->failed) break;
    if (i) qtr_tpl_write(ev, &out, in.s->data, in.s->len);
    qtr_tpl_write(ev, &out, item.s->data, item.s->len);
  }
  struct value v = qtr_tpl_output_string(ev, &out);
  return ev->failed ? v : qtr_tpl_markup(ev, v, in.s->markup);
}

METHOD(str_replace) { /* old, new, count=-1 */
  if (a[0].type != V_STRING) return fail_argument(ev, "replace", "a string", a[0]);
  if (a[1].type != V_STRING) return fail_argument(ev, "replace", "a string", a[1]);
  if (given(a[2]) && !is_integer(a[2])) return fail_argument(ev, "replace", "an integer", a[2]);
  int64_t most = given(a[2]) ? integer(a[2]) : -1;
  struct value new_text = in.s->markup ? qtr_tpl_escape(ev, a[1]) : a[1];
  const struct str *s = in.s, *old = a[0].s;
  struct output out = {0};
  size_t at = 0;
  if (ev->failed || !qtr_tpl_charge_bytes(ev, s->len)) return qtr_tpl_undefined();
  for (; most != 0 && !ev->failed; most -= most > 0) {
    size_t hit = find_from(s, at, old);
    if (hit == SIZE_MAX || !qtr_tpl_charge(ev, 1)) break;
    qtr_tpl_write(ev, &out, s->data + at, hit - at);
    qtr_tpl_write(ev, &out, new_text.s->data, new_text.s->len);
    at = hit + old->len;
    if (old->len > 0) continue;
    if (at == s->len) break; /* an empty pattern matches around every character */
    uint32_t cp;
    size_t n = qtr_tpl_decode(s->data + at, s->len - at, &cp);
    qtr_tpl_write(ev, &out, s->data + at, n);
    at += n;
  }
  if (at == 0 && out.len == 0) return in;
  qtr_tpl_write(ev, &out, s->data + at, s->len - at);
  struct value v = qtr_tpl_output_string(ev, &out);
  return ev->failed ? v : qtr_tpl_markup(ev, v, s->markup);
}

/* ---- search ---------------------------------------------------------------------------------- */

/* Byte range of the optional start and end arguments. */
static bool find_range(struct eval *ev, struct value in, const struct value *a, size_t *from, size_t *to) {
  *from = 0;
  *to = in.s->len;
  if (!given(a[0]) && !given(a[1])) return true;
  int64_t n = (int64_t)qtr_tpl_n_chars(ev, in.s), bounds[2] = {0, n};
  for (int k = 0; k < 2; k++) {
    if (!given(a[k]) || a[k].type == V_NONE) continue;
    if (!is_integer(a[k])) {
      (void)fail_argument(ev, "search", "an integer", a[k]);
      return false;
    }
    int64_t i = integer(a[k]);
    bounds[k] = i < 0 ? QTR_MAX(i + n, 0) : i;
  }
  if (bounds[0] > n || bounds[1] < bounds[0]) { /* beyond the end, not even the empty string is found */
    *from = 1;
    *to = 0;
    return true;
  }
  *from = qtr_tpl_char_offset(ev, in.s, (size_t)bounds[0]);
  *to = qtr_tpl_char_offset(ev, in.s, (size_t)QTR_MIN(bounds[1], n));
  return true;
}

static struct value search(struct eval *ev, const char *method, struct value in, const struct value *a, bool from_right,
                           bool must) {
  size_t from, to;
  if (a[0].type != V_STRING) return fail_argument(ev, method, "a string", a[0]);
  if (!find_range(ev, in, a + 1, &from, &to) || !qtr_tpl_charge_bytes(ev, in.s->len)) return qtr_tpl_undefined();
  size_t hit = SIZE_MAX;
  if (from <= to) {
    struct str range = {.data = in.s->data + from, .len = to - from};
    if (a[0].s->len == 0) {
      hit = from_right ? range.len : 0;
    } else {
      hit = from_right ? find_back(ev, &range, range.len, a[0].s) : find_from(&range, 0, a[0].s);
    }
  }
  if (hit == SIZE_MAX) {
    if (must) return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "%s: substring not found", method);
    return qtr_tpl_int(-1);
  }
  struct str before = {.data = in.s->data, .len = from + hit, .n_chars = -1};
  return qtr_tpl_int((int64_t)qtr_tpl_n_chars(ev, &before));
}
METHOD(str_find) { return search(ev, "find", in, a, false, false); }
METHOD(str_rfind) { return search(ev, "rfind", in, a, true, false); }
METHOD(str_index) { return search(ev, "index", in, a, false, true); }
METHOD(str_rindex) { return search(ev, "rindex", in, a, true, true); }

METHOD(str_count) {
  size_t from, to;
  int64_t n = 0;
  if (a[0].type != V_STRING) return fail_argument(ev, "count", "a string", a[0]);
  if (!find_range(ev, in, a + 1, &from, &to) || !qtr_tpl_charge_bytes(ev, in.s->len)) return qtr_tpl_undefined();
  if (from > to) return qtr_tpl_int(0);
  struct str range = {.data = in.s->data + from, .len = to - from, .n_chars = -1};
  if (a[0].s->len == 0) return qtr_tpl_int((int64_t)qtr_tpl_n_chars(ev, &range) + 1);
  for (size_t at = 0; (at = find_from(&range, at, a[0].s)) != SIZE_MAX; at += a[0].s->len) {
    if (++n % TPL_STEP_CHARS == 0 && !qtr_tpl_charge(ev, 1)) break;
  }
  return qtr_tpl_int(n);
}

static struct value has_affix(struct eval *ev, struct value in, const struct value *a, bool suffix) {
  size_t from, to, n = 1;
  const struct value *candidates = a;
  if (!find_range(ev, in, a + 1, &from, &to)) return qtr_tpl_undefined();
  if (a[0].type == V_TUPLE) {
    candidates = a[0].l->items;
    n = a[0].l->n;
  }
  for (size_t i = 0; i < n && qtr_tpl_charge(ev, 1); i++) {
    if (candidates[i].type != V_STRING) {
      return fail_argument(ev, suffix ? "endswith" : "startswith", "a string or a tuple of strings", candidates[i]);
    }
    const struct str *affix = candidates[i].s;
    if (from > to || affix->len > to - from || !qtr_tpl_charge_bytes(ev, affix->len)) continue;
    if (affix->len == 0 || memcmp(in.s->data + (suffix ? to - affix->len : from), affix->data, affix->len) == 0) {
      return qtr_tpl_bool(true);
    }
  }
  return qtr_tpl_bool(false);
}
METHOD(str_startswith) { return has_affix(ev, in, a, false); }
METHOD(str_endswith) { return has_affix(ev, in, a, true); }

/* ---- the rest of str ------------------------------------------------------------------------- */

static struct value all_chars(struct eval *ev, struct value in, bool (*is)(uint32_t), bool empty) {
  if (!qtr_tpl_charge(ev, in.s->len / TPL_STEP_CHARS)) return qtr_tpl_undefined();
  for (size_t i = 0; i < in.s->len;) {
    uint32_t cp;
    i += qtr_tpl_decode(in.s->data + i, in.s->len - i, &cp);
    if (!is(cp)) return qtr_tpl_bool(false);
  }
  return qtr_tpl_bool(in.s->len > 0 || empty);
}
static bool is_alnum(uint32_t cp) { return qtr_tpl_is_alpha(cp) || qtr_tpl_is_numeric(cp); }
static bool is_ascii(uint32_t cp) { return cp < 0x80; }
METHOD(str_isdigit) { return all_chars(ev, in, qtr_tpl_is_digit, false); }
METHOD(str_isnumeric) { return all_chars(ev, in, qtr_tpl_is_numeric, false); }
METHOD(str_isalpha) { return all_chars(ev, in, qtr_tpl_is_alpha, false); }
METHOD(str_isalnum) { return all_chars(ev, in, is_alnum, false); }
METHOD(str_isspace) { return all_chars(ev, in, qtr_tpl_is_space, false); }
METHOD(str_isascii) { return all_chars(ev, in, is_ascii, true); }
METHOD(str_isprintable) { return all_chars(ev, in, qtr_tpl_is_printable, true); }

static struct value run_test(struct eval *ev, const char *name, struct value in) {
  static const struct args none = {0};
  return qtr_tpl_call_builtin(ev, qtr_tpl_find_test(name, strlen(name)), in, &none);
}
METHOD(str_islower) { return run_test(ev, "lower", in); }
METHOD(str_isupper) { return run_test(ev, "upper", in); }

METHOD(str_format) { return qtr_tpl_str_format(ev, in, raw); }

/* width, fillchar=' ' */
static struct value justify(struct eval *ev, const char *method, struct value in, const struct value *a, bool left,
                            bool right) {
  struct value fill = given(a[1]) ? a[1] : qtr_tpl_string_static(ev, " ");
  if (!is_integer(a[0]) && (given(a[0]) || !(left && right))) return fail_argument(ev, method, "an integer", a[0]);
  if (ev->failed || fill.type != V_STRING || qtr_tpl_n_chars(ev, fill.s) != 1)
    return fail_argument(ev, method, "one character", fill);
  int64_t n = (int64_t)qtr_tpl_n_chars(ev, in.s), width = given(a[0]) ? integer(a[0]) : 80;
  if (width <= n) return in;
  if (width > (int64_t)TPL_MAX_OUTPUT) return qtr_tpl_fail(ev, QTR_ERR_LIMIT, "%s: the width is too large", method);
  int64_t missing = width - n, before = left && right ? missing / 2 + (missing & width & 1) : left ? missing : 0;
  struct output out = {0};
  for (int64_t i = 0; i < before && !ev->failed; i++) qtr_tpl_write(ev, &out, fill.s->data, fill.s->len);
  qtr_tpl_write(ev, &out, in.s->data, in.s->len);
  for (int64_t i = before; i < missing && !ev->failed; i++) qtr_tpl_write(ev, &out, fill.s->data, fill.s->len);
  (void)qtr_tpl_charge(ev, (size_t)missing / TPL_STEP_CHARS);
  struct value v = qtr_tpl_output_string(ev, &out);
  return ev->failed ? v : qtr_tpl_markup(ev, v, in.s->markup);
}
METHOD(str_center) { return justify(ev, "center", in, a, true, true); }
METHOD(str_ljust) { return justify(ev, "ljust", in, a, false, true); }
METHOD(str_rjust) { return justify(ev, "rjust", in, a, true, false); }

METHOD(str_zfill) {
  if (!is_integer(a[0])) return fail_argument(ev, "zfill", "an integer", a[0]);
  bool sign = in.s->len && (in.s->data[0] == '+' || in.s->data[0] == '-');
  int64_t missing = integer(a[0]) - (int64_t)qtr_tpl_n_chars(ev, in.s);
  if (missing <= 0) return in;
  struct value zeros = qtr_tpl_binary(ev, OP_MUL, qtr_tpl_string_static(ev, "0"), qtr_tpl_int(missing));
  if (ev->failed) return zeros;
  struct value v = qtr_tpl_concat(ev, part(ev, in, 0, sign), zeros);
  return ev->failed ? v : qtr_tpl_markup(ev, qtr_tpl_concat(ev, v, part(ev, in, sign, in.s->len)), in.s->markup);
}

/* ---- dict, list, tuple, range, loop ---------------------------------------------------------- */

METHOD(dict_items) { return (struct value){.type = V_VIEW, .sub = VIEW_ITEMS, .d = in.d}; }
METHOD(dict_keys) { return (struct value){.type = V_VIEW, .sub = VIEW_KEYS, .d = in.d}; }
METHOD(dict_values) { return (struct value){.type = V_VIEW, .sub = VIEW_VALUES, .d = in.d}; }
METHOD(dict_get) { /* key, default=none */
  uint64_t hash;
  if (!qtr_tpl_hash(ev, a[0], &hash, 0)) return fail_argument(ev, "get", "a hashable key", a[0]);
  const struct value *found = qtr_tpl_dict_get(ev, in.d, a[0]);
  return found ? *found : given(a[1]) ? a[1] : qtr_tpl_none();
}
METHOD(dict_copy) {
  struct value d = qtr_tpl_dict(ev);
  for (size_t i = 0; i < in.d->n && qtr_tpl_charge(ev, 1); i++) {
    qtr_tpl_dict_set(ev, d.d, in.d->entries[i].key, in.d->entries[i].value);
  }
  return d;
}

METHOD(list_count) {
  struct value *items;
  size_t n;
  int64_t count = 0;
  if (!qtr_tpl_items(ev, in, &items, &n, NULL)) return qtr_tpl_undefined();
  for (size_t i = 0; i < n && !ev->failed; i++) count += qtr_tpl_equal(ev, items[i], a[0], 0);
  return qtr_tpl_int(count);
}
METHOD(list_index) {
  struct value *items;
  size_t n;
  if (!qtr_tpl_items(ev, in, &items, &n, NULL)) return qtr_tpl_undefined();
  for (size_t i = 0; i < n && !ev->failed; i++) {
    if (qtr_tpl_equal(ev, items[i], a[0], 0)) return qtr_tpl_int((int64_t)i);
  }
  return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "index: the value is not in the list");
}
METHOD(list_copy) {
  struct list *l = qtr_tpl_alloc(ev, sizeof *l);
  if (!l) return qtr_tpl_undefined();
  *l = (struct list){.items = in.l->items, .n = in.l->n};
  return (struct value){.type = in.type, .l = l};
}

METHOD(loop_cycle) {
  if (raw->n_positional == 0) return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "loop.cycle: no items given");
  return raw->positional[in.loop->index0 % raw->n_positional];
}
METHOD(loop_changed) {
  struct value now = qtr_tpl_list(ev, V_TUPLE, raw->n_positional);
  if (ev->failed) return now;
  if (raw->n_positional) memcpy(now.l->items, raw->positional, raw->n_positional * sizeof *raw->positional);
  bool changed = in.loop->changed.type == V_MISSING || !qtr_tpl_equal(ev, in.loop->changed, now, 0);
  in.loop->changed = now;
  return qtr_tpl_bool(changed);
}

METHOD(unsupported) {
  return qtr_tpl_fail(ev, QTR_ERR_UNSUPPORTED, "this method of '%s' is not supported", qtr_tpl_type_name(in));
}

static const struct builtin methods[] = {{"capitalize", str_capitalize, "", 0, V_STRING},
                                         {"casefold", str_casefold, "", 0, V_STRING},
                                         {"center", str_center, "width fillchar", 0, V_STRING},
                                         {"count", str_count, "sub start end", 1, V_STRING},
                                         {"endswith", str_endswith, "suffix start end", 1, V_STRING},
                                         {"find", str_find, "sub start end", 1, V_STRING},
                                         {"format", str_format, NULL, 0, V_STRING},
                                         {"index", str_index, "sub start end", 1, V_STRING},
                                         {"isalnum", str_isalnum, "", 0, V_STRING},
                                         {"isalpha", str_isalpha, "", 0, V_STRING},
                                         {"isascii", str_isascii, "", 0, V_STRING},
                                         {"isdecimal", str_isdigit, "", 0, V_STRING},
                                         {"isdigit", str_isdigit, "", 0, V_STRING},
                                         {"islower", str_islower, "", 0, V_STRING},
                                         {"isnumeric", str_isnumeric, "", 0, V_STRING},
                                         {"isprintable", str_isprintable, "", 0, V_STRING},
                                         {"isspace", str_isspace, "", 0, V_STRING},
                                         {"isupper", str_isupper, "", 0, V_STRING},
                                         {"join", str_join, "iterable", 1, V_STRING},
                                         {"ljust", str_ljust, "width fillchar", 1, V_STRING},
                                         {"lower", str_lower, "", 0, V_STRING},
                                         {"lstrip", str_lstrip, "chars", 0, V_STRING},
                                         {"partition", str_partition, "sep", 1, V_STRING},
                                         {"removeprefix", str_removeprefix, "prefix", 1, V_STRING},
                                         {"removesuffix", str_removesuffix, "suffix", 1, V_STRING},
                                         {"replace", str_replace, "old new count", 2, V_STRING},
                                         {"rfind", str_rfind, "sub start end", 1, V_STRING},
                                         {"rindex", str_rindex, "sub start end", 1, V_STRING},
                                         {"rjust", str_rjust, "width fillchar", 1, V_STRING},
                                         {"rpartition", str_rpartition, "sep", 1, V_STRING},
                                         {"rsplit", str_rsplit, "sep maxsplit", 0, V_STRING},
                                         {"rstrip", str_rstrip, "chars", 0, V_STRING},
                                         {"split", str_split, "sep maxsplit", 0, V_STRING},
                                         {"splitlines", str_splitlines, "keepends", 0, V_STRING},
                                         {"startswith", str_startswith, "prefix start end", 1, V_STRING},
                                         {"strip", str_strip, "chars", 0, V_STRING},
                                         {"swapcase", str_swapcase, "", 0, V_STRING},
                                         {"title", str_title, "", 0, V_STRING},
                                         {"upper", str_upper, "", 0, V_STRING},
                                         {"zfill", str_zfill, "width", 1, V_STRING},
                                         {"copy", dict_copy, "", 0, V_DICT},
                                         {"get", dict_get, "key default", 1, V_DICT},
                                         {"items", dict_items, "", 0, V_DICT},
                                         {"keys", dict_keys, "", 0, V_DICT},
                                         {"values", dict_values, "", 0, V_DICT},
                                         {"copy", list_copy, "", 0, V_LIST},
                                         {"count", list_count, "value", 1, V_LIST},
                                         {"index", list_index, "value", 1, V_LIST},
                                         {"count", list_count, "value", 1, V_TUPLE},
                                         {"index", list_index, "value", 1, V_TUPLE},
                                         {"count", list_count, "value", 1, V_RANGE},
                                         {"index", list_index, "value", 1, V_RANGE},
                                         {"cycle", loop_cycle, NULL, 0, V_LOOP},
                                         {"changed", loop_changed, NULL, 0, V_LOOP},
                                         /* there in Python, so `x.name` must not fall through to x["name"] */
                                         {"encode", unsupported, NULL, 0, V_STRING},
                                         {"expandtabs", unsupported, NULL, 0, V_STRING},
                                         {"format_map", unsupported, NULL, 0, V_STRING},
                                         {"isidentifier", unsupported, NULL, 0, V_STRING},
                                         {"istitle", unsupported, NULL, 0, V_STRING},
                                         {"maketrans", unsupported, NULL, 0, V_STRING},
                                         {"translate", unsupported, NULL, 0, V_STRING},
                                         {"fromkeys", unsupported, NULL, 0, V_DICT}};

/* They change their object: refused. */
static const struct {
  uint8_t on;
  const char *name;
} unsafe_methods[] = {{V_LIST, "append"},  {V_LIST, "clear"},      {V_LIST, "extend"}, {V_LIST, "insert"}, {V_LIST, "pop"},
                      {V_LIST, "remove"},  {V_LIST, "reverse"},    {V_LIST, "sort"},   {V_DICT, "clear"},  {V_DICT, "pop"},
                      {V_DICT, "popitem"}, {V_DICT, "setdefault"}, {V_DICT, "update"}};

const struct builtin *qtr_tpl_find_method(enum value_type type, const char *name, size_t len, bool *unsafe) {
  *unsafe = false;
  for (size_t i = 0; i < sizeof unsafe_methods / sizeof *unsafe_methods; i++) {
    if (unsafe_methods[i].on == type && strlen(unsafe_methods[i].name) == len &&
        memcmp(unsafe_methods[i].name, name, len) == 0) {
      *unsafe = true;
      return NULL;
    }
  }
  for (size_t i = 0; i < sizeof methods / sizeof *methods; i++) {
    if (methods[i].on == type && strlen(methods[i].name) == len && memcmp(methods[i].name, name, len) == 0)
      return &methods[i];
  }
  return NULL;
}
