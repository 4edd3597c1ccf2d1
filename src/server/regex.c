/* regex.c - regular expressions to rules (regex.h). First a tree; then the positions of Glushkov's automaton (The
 * abstract theory of automata, 1961: one for each set of characters in the expression, counted repetition written out), with
 * the sets of positions that may begin, end and follow; then a right-linear rule for each pair of a position and a number of
 * characters so far, where both can still reach an end. JSON Schema searches: what is not anchored has any text before and
 * behind it. */
#include "server/regex.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_NODES 4096
#define MAX_RANGES 16384
#define MAX_DEPTH 64
#define MAX_REPEAT 1000
#define MAX_POSITIONS 1024
#define MAX_PARTS 65536 /* nothing, repeated in repetitions, has no positions that could be counted */
#define MAX_RULES 65536 /* positions times lengths */
#define WORDS (MAX_POSITIONS / 64)
#define LAST_POINT 0x10FFFF

enum kind { EMPTY, SET, CAT, ALT, REPEAT, START, END };

struct range {
  uint32_t low, high;
};

struct node {
  enum kind kind;
  int32_t a, b;     /* CAT, ALT: both sides; REPEAT: a */
  int32_t min, max; /* REPEAT; max -1: no bound */
  int32_t set;      /* SET: in parser.set */
};

struct set { /* of characters: range[first … first + n), ascending and apart */
  int32_t first, n;
  int32_t rule; /* -1: not made yet */
};

struct parser {
  const unsigned char *at, *end;
  const char *why; /* set by the first error */
  struct node *node;
  struct set *set;
  struct range *range;
  int32_t n_nodes, n_sets, n_ranges;
};

static int32_t refuse(struct parser *p, const char *why) {
  if (!p->why) p->why = why;
  return 0;
}

static int32_t add_node(struct parser *p, struct node node) {
  if (p->n_nodes == MAX_NODES) return refuse(p, "is too large");
  p->node[p->n_nodes] = node;
  return p->n_nodes++;
}

/* ---- sets of characters -------------------------------------------------------------------------- */

static void add_range(struct parser *p, uint32_t low, uint32_t high) {
  if (p->n_ranges == MAX_RANGES)
    (void)refuse(p, "is too large");
  else if (low <= high)
    p->range[p->n_ranges++] = (struct range){low, high};
}

static int by_low(const void *x, const void *y) {
  const struct range *a = x, *b = y;
  return a->low < b->low ? -1 : a->low > b->low;
}

/* Makes a set of the ranges added since `first`: sorted, joined, turned round where wanted. Equal sets are one. */
static int32_t close_set(struct parser *p, int32_t first, bool negated) {
  struct range *r = p->range + first;
  int32_t n = p->n_ranges - first, k = 0;
  if (n > 0) qsort(r, (size_t)n, sizeof *r, by_low);
  for (int32_t i = 0; i < n; i++) {
    if (k > 0 && r[i].low <= r[k - 1].high + 1)
      r[k - 1].high = r[i].high > r[k - 1].high ? r[i].high : r[k - 1].high;
    else
      r[k++] = r[i];
  }
  p->n_ranges = first + k;
  if (negated) {
    uint32_t from = 0;
    for (int32_t i = 0; i < k; i++) {
      struct range was = p->range[first + i];
      if (was.low > from) add_range(p, from, was.low - 1);
      from = was.high + 1;
    }
    if (from <= LAST_POINT) add_range(p, from, LAST_POINT);
    n = p->n_ranges - first - k;
    memmove(p->range + first, p->range + first + k, (size_t)n * sizeof *r);
    p->n_ranges = first + (k = n);
  }
  for (int32_t i = 0; i < p->n_sets; i++) {
    if (p->set[i].n != k || memcmp(p->range + p->set[i].first, p->range + first, (size_t)k * sizeof *r) != 0) continue;
    p->n_ranges = first;
    return i;
  }
  if (p->n_sets == MAX_NODES) return refuse(p, "is too large");
  p->set[p->n_sets] = (struct set){first, k, -1};
  return p->n_sets++;
}

/* \d, \w, \s or, as a capital, all others. False: c names no class. */
static bool add_class(struct parser *p, unsigned char c) {
  static const struct range digit[] = {{'0', '9'}}, word[] = {{'0', '9'}, {'A', 'Z'}, {'_', '_'}, {'a', 'z'}},
                            space[] = {{9, 13}, {' ', ' '}},
                            every_space[] = {{9, 13},          {' ', ' '},       {0xA0, 0xA0},     {0x1680, 0x1680},
                                             {0x2000, 0x200A}, {0x2028, 0x2029}, {0x202F, 0x202F}, {0x205F, 0x205F},
                                             {0x3000, 0x3000}, {0xFEFF, 0xFEFF}};
  const struct range *r = c == 'd' || c == 'D' ? digit : c == 'w' || c == 'W' ? word : c == 's' ? space : every_space;
  size_t n = r == digit ? 1 : r == word ? 4 : r == space ? 2 : sizeof every_space / sizeof *every_space;
  if (!c || !strchr("dDwWsS", c)) return false;
  if (c >= 'a') {
    for (size_t i = 0; i < n; i++) add_range(p, r[i].low, r[i].high);
    return true;
  }
  uint32_t from = 0;
  for (size_t i = 0; i < n; i++) {
    add_range(p, from, r[i].low - 1);
    from = r[i].high + 1;
  }
  add_range(p, from, LAST_POINT);
  return true;
}

/* ---- the text of the pattern --------------------------------------------------------------------- */

/* One character of UTF-8, which the caller knows to be well formed (jansson's strings are). */
static uint32_t next_point(struct parser *p) {
  uint32_t c = *p->at++;
  int n = c >= 0xF0 ? 3 : c >= 0xE0 ? 2 : c >= 0xC0 ? 1 : 0;
  if (n > 0) c &= 0x3Fu >> n;
  for (; n > 0 && p->at < p->end; n--) c = c << 6 | (*p->at++ & 0x3Fu);
  return c;
}

static uint32_t hex_digits(struct parser *p, int n) {
  uint32_t x = 0;
  for (; n > 0; n--) {
    unsigned char c = p->at < p->end ? *p->at++ : 0;
    uint32_t d = c >= '0' && c <= '9'                   ? c - (unsigned)'0'
                 : (c | 32u) >= 'a' && (c | 32u) <= 'f' ? (c | 32u) - (unsigned)'a' + 10u
                                                        : 99u;
    if (d == 99) return (uint32_t)refuse(p, "has an escape without its hexadecimal digits");
    x = x << 4 | d;
  }
  return x;
}

/* What follows a backslash, when it is one character. */
static uint32_t escaped(struct parser *p, bool in_class) {
  static const char from[] = "tnrfv0", to[] = "\t\n\r\f\v";
  unsigned char c = *p->at;
  const char *known = c ? strchr(from, c) : NULL;
  if (c == 'x' || c == 'u') {
    p->at++;
    if (c == 'u' && p->at < p->end && *p->at == '{') return (uint32_t)refuse(p, "has \\u{…}, which is not supported");
    uint32_t x = hex_digits(p, c == 'x' ? 2 : 4);
    if (x >= 0xD800 && x < 0xE000) return (uint32_t)refuse(p, "has half of a surrogate pair: write the character itself");
    return x;
  }
  if (known) {
    p->at++;
    if (c == '0' && p->at < p->end && *p->at >= '0' && *p->at <= '9') {
      return (uint32_t)refuse(p, "has an octal escape, which is not supported");
    }
    return (unsigned char)to[known - from];
  }
  if (in_class && c == 'b') {
    p->at++;
    return '\b';
  }
  if (c >= '1' && c <= '9') return (uint32_t)refuse(p, "has a back reference, which no automaton can keep");
  if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z')) {
    return (uint32_t)refuse(
        p, c == 'b' || c == 'B' ? "has \\b or \\B, which is not supported" : "has an escape that is not supported");
  }
  return next_point(p);
}

/* [...] behind its bracket */
static int32_t parse_class(struct parser *p) {
  int32_t first = p->n_ranges;
  bool negated = p->at < p->end && *p->at == '^';
  if (negated) p->at++;
  while (p->at < p->end && *p->at != ']' && !p->why) {
    uint32_t low, high;
    if (*p->at == '\\') {
      if (++p->at == p->end) break;
      if (add_class(p, *p->at)) {
        p->at++;
        continue;
      }
      low = escaped(p, true);
    } else {
      low = next_point(p);
    }
    high = low;
    if (p->end - p->at >= 2 && p->at[0] == '-' && p->at[1] != ']') {
      p->at++;
      if (*p->at == '\\') {
        if (++p->at == p->end) break;
        high =
            *p->at && strchr("dDwWsS", *p->at) ? (uint32_t)refuse(p, "has a range that ends in a class") : escaped(p, true);
      } else {
        high = next_point(p);
      }
      if (high < low) return refuse(p, "has a range whose end comes before its beginning");
    }
    add_range(p, low, high);
  }
  if (p->at >= p->end) return refuse(p, "has a [ without its ]");
  p->at++;
  return add_node(p, (struct node){.kind = SET, .set = close_set(p, first, negated)});
}

static int32_t parse_any(struct parser *p, int depth);

/* A group behind its bracket. */
static int32_t parse_group(struct parser *p, int depth) {
  if (p->at < p->end && *p->at == '?') {
    p->at++;
    unsigned char c = p->at < p->end ? *p->at : 0, d = p->end - p->at > 1 ? p->at[1] : 0;
    if (c == '=' || c == '!' || (c == '<' && (d == '=' || d == '!'))) {
      return refuse(p, "looks ahead or behind, which is not supported");
    }
    if (c == '<') { /* a name */
      while (p->at < p->end && *p->at != '>') p->at++;
    } else if (c != ':') {
      return refuse(p, "has a kind of group that is not supported");
    }
    if (p->at < p->end) p->at++;
  }
  int32_t inner = parse_any(p, depth + 1);
  if (p->at >= p->end || *p->at != ')') return refuse(p, "has a ( without its )");
  p->at++;
  return inner;
}

static int32_t parse_one(struct parser *p, int depth) {
  int32_t first = p->n_ranges;
  unsigned char c = *p->at;
  if (c == '(') {
    p->at++;
    return parse_group(p, depth);
  }
  if (c == '[') {
    p->at++;
    return parse_class(p);
  }
  if (c == '^' || c == '$') {
    p->at++;
    return add_node(p, (struct node){.kind = c == '^' ? START : END});
  }
  if (strchr("*+?{", c) && c) return refuse(p, "repeats nothing");
  if (c == '.') {
    p->at++;
    static const uint32_t ends[] = {'\n', '\r', 0x2028, 0x2029};
    for (size_t i = 0; i < 4; i++) add_range(p, ends[i], ends[i]);
    return add_node(p, (struct node){.kind = SET, .set = close_set(p, first, true)});
  }
  if (c == '\\') {
    if (++p->at == p->end) return refuse(p, "ends in a backslash");
    if (add_class(p, *p->at)) {
      p->at++;
    } else {
      uint32_t x = escaped(p, false);
      add_range(p, x, x);
    }
  } else {
    uint32_t x = next_point(p);
    add_range(p, x, x);
  }
  return add_node(p, (struct node){.kind = SET, .set = close_set(p, first, false)});
}

static bool read_number(struct parser *p, int32_t *n) {
  const unsigned char *from = p->at;
  for (*n = 0; p->at < p->end && *p->at >= '0' && *p->at <= '9'; p->at++) {
    if (*n <= MAX_REPEAT) *n = *n * 10 + (*p->at - '0');
  }
  return p->at > from;
}

/* *, +, ?, {n}, {n,}, {n,m}, each with a ? behind it or not. False: there is none. */
static bool parse_quantifier(struct parser *p, int32_t *min, int32_t *max) {
  unsigned char c = p->at < p->end ? *p->at : 0;
  if (c == '*' || c == '+' || c == '?') {
    p->at++;
    *min = c == '+';
    *max = c == '?' ? 1 : -1;
  } else if (c == '{') {
    p->at++;
    bool ok = read_number(p, min);
    *max = *min;
    if (ok && p->at < p->end && *p->at == ',') {
      p->at++;
      if (!read_number(p, max)) *max = -1;
    }
    if (!ok || p->at >= p->end || *p->at != '}') return refuse(p, "has a { that is no count: write \\{ for the character");
    p->at++;
    if (*min > MAX_REPEAT || *max > MAX_REPEAT) return refuse(p, "repeats more than 1000 times");
    if (*max >= 0 && *max < *min) return refuse(p, "has a count whose end is less than its beginning");
  } else {
    return false;
  }
  if (p->at < p->end && *p->at == '?') p->at++; /* as few as possible: the same strings */
  return true;
}

static int32_t parse_sequence(struct parser *p, int depth) {
  int32_t all = add_node(p, (struct node){.kind = EMPTY});
  while (p->at < p->end && *p->at != '|' && *p->at != ')' && !p->why) {
    int32_t one = parse_one(p, depth), min, max;
    if (!p->why && parse_quantifier(p, &min, &max)) {
      if (p->node[one].kind == START || p->node[one].kind == END) return refuse(p, "repeats ^ or $");
      one = add_node(p, (struct node){.kind = REPEAT, .a = one, .min = min, .max = max});
    }
    all = p->node[all].kind == EMPTY ? one : add_node(p, (struct node){.kind = CAT, .a = all, .b = one});
  }
  return all;
}

static int32_t parse_any(struct parser *p, int depth) {
  if (depth > MAX_DEPTH) return refuse(p, "is nested too deep");
  int32_t all = parse_sequence(p, depth);
  while (p->at < p->end && *p->at == '|' && !p->why) {
    p->at++;
    int32_t next = parse_sequence(p, depth);
    all = add_node(p, (struct node){.kind = ALT, .a = all, .b = next});
  }
  return all;
}

/* Any text, where an alternative is not anchored; ^ and $ elsewhere are refused later. Chains of CAT and ALT are as long as
 * the pattern and lean to the left: `a` is followed by a loop, `b` is single. */
static int32_t unanchored(struct parser *p, int32_t n, int depth) {
  if (depth > MAX_DEPTH) return refuse(p, "is nested too deep");
  int32_t all = -1;
  for (int32_t rest = n, branch; rest >= 0 && !p->why;) { /* alternatives, from the last to the first */
    bool more = p->node[rest].kind == ALT;
    branch = more ? p->node[rest].b : rest;
    rest = more ? p->node[rest].a : -1;
    if (p->node[branch].kind == ALT) { /* a group that is all of it */
      branch = unanchored(p, branch, depth + 1);
    } else {
      int32_t first = branch;
      while (p->node[first].kind == CAT) first = p->node[first].a;
      bool start = p->node[first].kind == START;
      if (start) p->node[first].kind = EMPTY;
      int32_t last = p->node[branch].kind == CAT ? p->node[branch].b : branch;
      bool end = p->node[last].kind == END;
      if (end) p->node[last].kind = EMPTY;
      int32_t from = p->n_ranges;
      add_range(p, 0, LAST_POINT);
      int32_t any = add_node(p, (struct node){.kind = SET, .set = close_set(p, from, false)});
      int32_t text = add_node(p, (struct node){.kind = REPEAT, .a = any, .min = 0, .max = -1});
      if (!start) branch = add_node(p, (struct node){.kind = CAT, .a = text, .b = branch});
      if (!end) branch = add_node(p, (struct node){.kind = CAT, .a = branch, .b = text});
    }
    all = all < 0 ? branch : add_node(p, (struct node){.kind = ALT, .a = branch, .b = all});
  }
  return all;
}

/* ---- positions ----------------------------------------------------------------------------------- */

struct bits {
  uint64_t word[WORDS];
};

struct part { /* what a part of the expression may begin and end with */
  bool empty;
  struct bits first, last;
};

struct automaton {
  struct parser *p;
  struct bits *follow; /* (MAX_POSITIONS) */
  int32_t *set;        /* (MAX_POSITIONS) */
  int32_t n, n_parts;
};

static bool has(const struct bits *b, int32_t i) { return b->word[i / 64] >> (i % 64) & 1; }

static void join(struct bits *to, const struct bits *from) {
  for (int i = 0; i < WORDS; i++) to->word[i] |= from->word[i];
}

/* *a := a then b */
static void concatenate(struct automaton *m, struct part *a, const struct part *b) {
  for (int32_t i = 0; i < m->n; i++) {
    if (has(&a->last, i)) join(&m->follow[i], &b->first);
  }
  if (a->empty) join(&a->first, &b->first);
  if (b->empty)
    join(&a->last, &b->last);
  else
    a->last = b->last;
  a->empty = a->empty && b->empty;
}

static void make_part(struct automaton *m, int32_t n, int depth, struct part *out);

static void make_repeat(struct automaton *m, const struct node *node, int depth, struct part *out) {
  struct part *one = malloc(sizeof *one), *rest = calloc(1, sizeof *rest);
  *out = (struct part){.empty = true};
  if (!one || !rest) {
    (void)refuse(m->p, "needs more memory than there is");
    goto done;
  }
  rest->empty = true;
  if (node->max < 0) { /* the last copy goes round */
    make_part(m, node->a, depth + 1, rest);
    for (int32_t i = 0; i < m->n; i++) {
      if (has(&rest->last, i)) join(&m->follow[i], &rest->first);
    }
    if (node->min == 0) rest->empty = true;
  }
  for (int32_t i = node->max < 0 ? 0 : node->min; i < node->max && !m->p->why; i++) { /* (a(a(a)?)?)? */
    make_part(m, node->a, depth + 1, one);
    concatenate(m, one, rest);
    one->empty = true;
    *rest = *one;
  }
  for (int32_t i = node->max < 0 ? 1 : 0; i < node->min && !m->p->why; i++) {
    make_part(m, node->a, depth + 1, one);
    concatenate(m, out, one);
  }
  concatenate(m, out, rest);
done:
  free(one);
  free(rest);
}

static void make_part(struct automaton *m, int32_t n, int depth, struct part *out) {
  const struct node node = m->p->node[n];
  struct part *other = NULL;
  *out = (struct part){.empty = true};
  if (m->p->why) return;
  if (depth > 4 * MAX_DEPTH || ++m->n_parts > MAX_PARTS) {
    (void)refuse(m->p, "is too large");
    return;
  }
  switch (node.kind) {
    case EMPTY: return;
    case SET:
      if (m->n == MAX_POSITIONS) {
        (void)refuse(m->p, "is too large");
        return;
      }
      out->empty = false;
      out->first.word[m->n / 64] |= 1ull << (m->n % 64);
      out->last = out->first;
      m->set[m->n++] = node.set;
      return;
    case CAT:
    case ALT: { /* the left side is a chain: from its end upwards */
      int32_t length = 0, at = n;
      for (; m->p->node[at].kind == node.kind; at = m->p->node[at].a) length++;
      make_part(m, at, depth + 1, out);
      other = malloc(sizeof *other);
      if (!other) (void)refuse(m->p, "needs more memory than there is");
      for (int32_t k = length - 1; k >= 0 && !m->p->why; k--) {
        at = n;
        for (int32_t up = 0; up < k; up++) at = m->p->node[at].a;
        make_part(m, m->p->node[at].b, depth + 1, other);
        if (node.kind == CAT) {
          concatenate(m, out, other);
        } else {
          out->empty = out->empty || other->empty;
          join(&out->first, &other->first);
          join(&out->last, &other->last);
        }
      }
      free(other);
      return;
    }
    case REPEAT: make_repeat(m, &node, depth, out); return;
    default: (void)refuse(m->p, "has ^ or $ within, which is supported only at the ends of alternatives");
  }
}

/* ---- rules --------------------------------------------------------------------------------------- */

/* An alternative for the characters low … high, both of n bytes and with equal beginnings but for one byte and what is
 * behind it, which is whole. */
static void put_bytes(struct qtr_grammar *g, int32_t rule, uint32_t low, uint32_t high, int n) {
  static const unsigned char lead[] = {0, 0, 0xC0, 0xE0, 0xF0};
  qtr_grammar_begin(g, rule);
  for (int i = 0; i < n; i++) {
    int shift = 6 * (n - 1 - i);
    unsigned mask = i > 0 ? 0x3F : n == 1 ? 0x7F : 0x3Fu >> (n - 1), head = i > 0 ? 0x80 : lead[n];
    const char pair[2] = {(char)(head | (low >> shift & mask)), (char)(head | (high >> shift & mask))};
    qtr_grammar_put_set(g, pair, 2);
  }
  qtr_grammar_end(g);
}

/* Splits a range into such ones. */
static void put_utf8(struct qtr_grammar *g, int32_t rule, uint32_t low, uint32_t high) {
  static const uint32_t most[] = {0, 0x7F, 0x7FF, 0xFFFF, LAST_POINT};
  while (low <= high) {
    int n = 1;
    while (low > most[n]) n++;
    uint32_t end = high < most[n] ? high : most[n];
    for (int i = 1; i < n; i++) { /* the lowest byte that is not whole decides */
      uint32_t tail = (1u << 6 * i) - 1;
      if ((low & ~tail) == (end & ~tail)) break;
      if ((low & tail) != 0) {
        end = low | tail;
        break;
      }
      if ((end & tail) != tail) end = (end & ~tail) - 1;
    }
    put_bytes(g, rule, low, end, n);
    low = end + 1;
  }
}

/* The rule of a set: what JSON may hold as it is, and escapes for the rest. */
static int32_t set_rule(struct qtr_grammar *g, struct parser *p, int32_t number) {
  struct set *s = &p->set[number];
  if (s->rule >= 0) return s->rule;
  s->rule = qtr_grammar_rule(g);
  for (int32_t i = 0; i < s->n; i++) {
    struct range r = p->range[s->first + i];
    for (uint32_t c = r.low; c <= r.high && c <= 0x7F; c++) {
      static const char named[] = "\"\\\b\f\n\r\t", letter[] = "\"\\bfnrt";
      const char *known = c > 0 ? strchr(named, (int)c) : NULL;
      char text[8];
      if (known)
        (void)snprintf(text, sizeof text, "\\%c", letter[known - named]);
      else
        (void)snprintf(text, sizeof text, "\\u%04x", c);
      if (known || c < 0x20 || c == 0x7F) qtr_grammar_alternative(g, s->rule, text);
    }
    static const struct range plain[] = {{0x20, 0x21}, {0x23, 0x5B}, {0x5D, 0x7E}, {0x80, 0xD7FF}, {0xE000, LAST_POINT}};
    for (size_t k = 0; k < sizeof plain / sizeof *plain; k++) {
      uint32_t low = r.low > plain[k].low ? r.low : plain[k].low, high = r.high < plain[k].high ? r.high : plain[k].high;
      if (low <= high) put_utf8(g, s->rule, low, high);
    }
  }
  return s->rule;
}

/* Which (position, length) can still reach an end; position m->n is the beginning. alive: (n_levels, m->n + 1). */
static void find_alive(const struct automaton *m, const struct part *whole, int32_t min, int32_t max, int32_t n_levels,
                       char *alive) {
  size_t width = (size_t)m->n + 1;
  for (int32_t level = n_levels - 1; level >= 0; level--) {
    bool turns = max < 0 && level == n_levels - 1; /* lengths are not counted any more: steps stay on this level */
    for (bool changed = true; changed;) {
      changed = false;
      for (int32_t q = m->n; q >= 0; q--) { /* mostly the next one is the one that follows */
        char *mine = &alive[(size_t)level * width + (size_t)q];
        bool begin = q == m->n, ends = begin ? whole->empty : has(&whole->last, q);
        if (*mine || (begin && level > 0)) continue;
        bool lives = ends && level >= min;
        if (turns || level + 1 < n_levels) {
          const struct bits *next = begin ? &whole->first : &m->follow[q];
          const char *there = &alive[(size_t)(turns ? level : level + 1) * width];
          for (int32_t k = 0; k < m->n && !lives; k++) lives = has(next, k) && there[k];
        }
        if (lives) *mine = 1, changed = turns;
      }
    }
  }
}

static void put_rules(struct qtr_grammar *g, const struct automaton *m, const struct part *whole, int32_t min, int32_t max,
                      int32_t *rule) {
  int32_t n_levels = (max < 0 ? min : max) + 1;
  size_t width = (size_t)m->n + 1, n = (size_t)n_levels * width;
  if (n > MAX_RULES) {
    (void)refuse(m->p, "is too large together with its lengths");
    return;
  }
  char *alive = calloc(n, 1);
  int32_t *made = calloc(n, sizeof *made);
  if (!alive || !made) {
    (void)refuse(m->p, "needs more memory than there is");
    goto done;
  }
  find_alive(m, whole, min, max, n_levels, alive);
  if (!alive[m->n]) {
    (void)refuse(m->p, "fits no string of the lengths that are asked for");
    goto done;
  }
  for (size_t i = 0; i < n; i++) {
    if (alive[i]) made[i] = qtr_grammar_rule(g);
  }
  for (size_t i = 0; i < n && !qtr_grammar_failed(g); i++) {
    int32_t level = (int32_t)(i / width), q = (int32_t)(i % width);
    bool begin = q == m->n, turns = max < 0 && level == n_levels - 1;
    const struct bits *next = begin ? &whole->first : &m->follow[q];
    if (!alive[i]) continue;
    if ((begin ? whole->empty : has(&whole->last, q)) && level >= min) qtr_grammar_alternative(g, made[i], "");
    for (int32_t k = 0; k < m->n && (turns || level + 1 < n_levels); k++) {
      size_t to = (size_t)(turns ? level : level + 1) * width + (size_t)k;
      if (!has(next, k) || !alive[to]) continue;
      int32_t character = set_rule(g, m->p, m->set[k]);
      qtr_grammar_begin(g, made[i]);
      qtr_grammar_put_rule(g, character);
      qtr_grammar_put_rule(g, made[to]);
      qtr_grammar_end(g);
    }
  }
  *rule = made[m->n];
done:
  free(alive);
  free(made);
}

const char *qtr_regex_rule(struct qtr_grammar *g, const char *pattern, size_t len, int32_t min, int32_t max, int32_t *rule) {
  struct parser p = {.at = (const unsigned char *)pattern, .end = (const unsigned char *)pattern + len};
  struct automaton m = {.p = &p};
  struct part *whole = malloc(sizeof *whole);
  p.node = malloc(MAX_NODES * sizeof *p.node);
  p.set = malloc(MAX_NODES * sizeof *p.set);
  p.range = malloc((MAX_RANGES + 1) * sizeof *p.range);
  m.follow = calloc(MAX_POSITIONS, sizeof *m.follow);
  m.set = malloc(MAX_POSITIONS * sizeof *m.set);
  if (!p.node || !p.set || !p.range || !m.follow || !m.set || !whole) {
    (void)refuse(&p, "needs more memory than there is");
    goto done;
  }
  int32_t root = parse_any(&p, 0);
  if (!p.why && p.at < p.end) (void)refuse(&p, "has a ) without its (");
  if (!p.why) root = unanchored(&p, root, 0);
  if (!p.why) make_part(&m, root, 0, whole);
  if (!p.why) put_rules(g, &m, whole, min, max, rule);
done:
  free(p.node);
  free(p.set);
  free(p.range);
  free(m.follow);
  free(m.set);
  free(whole);
  return p.why;
}
