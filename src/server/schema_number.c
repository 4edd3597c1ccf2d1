/* schema_number.c - ranges of numbers, digit by digit (schema_number.h): while the digits so far equal those of a bound, the
 * next one is held by the bound's next digit; from the first that differs on, all are free. */
#include "server/schema_number.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DIGITS 15 /* of a number that is written */
#define MAX_FRACTION 24

struct decimal { /* a magnitude */
  bool none;     /* no bound */
  bool open;
  int n_whole, n_fraction;
  char whole[DIGITS + 1], fraction[MAX_FRACTION + 1]; /* values, not characters */
};

struct build {
  struct qtr_grammar *g;
  struct decimal low, high;
  bool whole;
  int step;
  int32_t *made; /* rules by state, 0 = not yet (rule 0 is the grammar's start) */
};

/* The digits of |x| < 1e15: as few as give the same double, so that no other decimal of 15 digits does. */
static bool read_decimal(double x, struct decimal *d) {
  char text[48];
  for (int digits = 15; digits <= 17; digits++) {
    (void)snprintf(text, sizeof text, "%.*e", digits - 1, x);
    double back = strtod(text, NULL);
    if (!(back < x) && !(back > x)) break;
  }
  int exponent = atoi(strchr(text, 'e') + 1), n = 0;
  char digit[24];
  for (const char *c = text; *c != 'e'; c++) {
    if (*c >= '0' && *c <= '9') digit[n++] = (char)(*c - '0');
  }
  while (n > 1 && digit[n - 1] == 0) n--;
  if (n == 1 && digit[0] == 0) exponent = 0;
  d->n_whole = exponent >= 0 ? exponent + 1 : 1;
  d->n_fraction = n - 1 - exponent > 0 ? n - 1 - exponent : 0;
  if (d->n_fraction > MAX_FRACTION || d->n_whole > DIGITS) return false;
  for (int i = 0; i < d->n_whole; i++) d->whole[i] = (char)(exponent >= 0 && i < n ? digit[i] : 0);
  for (int i = 0; i < d->n_fraction; i++) {
    int at = exponent + 1 + i;
    d->fraction[i] = (char)(at >= 0 && at < n ? digit[at] : 0);
  }
  return true;
}

static int fraction_at(const struct decimal *d, int i) { return i < d->n_fraction ? d->fraction[i] : 0; }

static bool fraction_left(const struct decimal *d, int from) { /* is there a digit but 0 from here on? */
  for (int i = from; i < d->n_fraction; i++) {
    if (d->fraction[i]) return true;
  }
  return false;
}

/* An alternative of `rule`: one digit from first to last, then what `next` says. */
static void put_digit(struct qtr_grammar *g, int32_t rule, int first, int last, int32_t next) {
  qtr_grammar_begin(g, rule);
  qtr_grammar_put_set(g, (const char[]){(char)('0' + first), (char)('0' + last)}, 2);
  qtr_grammar_put_rule(g, next);
  qtr_grammar_end(g);
}

/* May the number end after so many digits of its fraction, all digits so far those of the bound? */
static bool may_equal_low(const struct build *b, int n) { return !fraction_left(&b->low, n) && !b->low.open; }
static bool may_equal_high(const struct build *b, int n) { return fraction_left(&b->high, n) || !b->high.open; }

/* The rule of a state: so many digits of the fraction are out, `left` more may come. */
static int32_t fraction_rule(struct build *b, int n, int left, bool at_low, bool at_high) {
  struct qtr_grammar *g = b->g;
  int32_t *made = &b->made[((n * (DIGITS + 1) + left) * 2 + at_low) * 2 + at_high];
  if (*made || qtr_grammar_failed(g)) return *made;
  int32_t rule = *made = qtr_grammar_rule(g);
  if (n > 0 && (!at_low || may_equal_low(b, n)) && (!at_high || may_equal_high(b, n))) qtr_grammar_alternative(g, rule, "");
  if (left == 0) return rule;
  int from = at_low ? fraction_at(&b->low, n) : 0, to = at_high ? fraction_at(&b->high, n) : 9;
  for (int d = from; d <= to;) {
    bool low = at_low && d == from, high = at_high && d == to;
    int end = low || high ? d : to - at_high; /* free digits together */
    if (end < d) end = d;
    int32_t next = fraction_rule(b, n + 1, left - 1, low, high);
    put_digit(g, rule, d, end, next);
    d = end + 1;
  }
  return rule;
}

/* What may follow the last digit before the point. */
static void put_end(struct build *b, int32_t rule, int length, bool at_low, bool at_high, int remainder) {
  struct qtr_grammar *g = b->g;
  if ((!at_low || may_equal_low(b, 0)) && (!at_high || may_equal_high(b, 0)) && remainder == 0) {
    qtr_grammar_alternative(g, rule, "");
  }
  if (b->whole || length == DIGITS) return;
  int32_t fraction = fraction_rule(b, 0, DIGITS - length, at_low, at_high);
  qtr_grammar_begin(g, rule);
  qtr_grammar_put_bytes(g, ".", 1);
  qtr_grammar_put_rule(g, fraction);
  qtr_grammar_end(g);
}

/* Digits before the point of numbers of `length` of them, from digit i on. What is left is the same for all lengths when
 * nothing comes after the point; a state held by a bound has the bound's length. So rules are known by the number of digits
 * that are left: made_here (DIGITS, step, at_low, at_high), but for the first digit. */
static int32_t whole_rule(struct build *b, int32_t *made_here, int length, int i, int remainder, bool at_low, bool at_high) {
  struct qtr_grammar *g = b->g;
  int32_t *made = &made_here[(((length - i) * b->step + remainder) * 2 + at_low) * 2 + at_high];
  if (qtr_grammar_failed(g)) return 0; /* nothing is known any more: this would go on for ever */
  if (*made && i > 0) return *made;
  int32_t rule = qtr_grammar_rule(g);
  if (i > 0) *made = rule;
  if (i == length) {
    put_end(b, rule, length, at_low, at_high, remainder);
    return rule;
  }
  int least = i == 0 && length > 1 ? 1 : 0, from = at_low ? b->low.whole[i] : least, to = at_high ? b->high.whole[i] : 9;
  for (int d = from; d <= to;) {
    bool low = at_low && d == from, high = at_high && d == to;
    int end = low || high || b->step > 1 ? d : to - at_high;
    if (end < d) end = d;
    int32_t next = whole_rule(b, made_here, length, i + 1, (remainder * 10 + d) % b->step, low, high);
    put_digit(g, rule, d, end, next);
    d = end + 1;
  }
  return rule;
}

/* Alternatives of `rule`: `sign` and the magnitudes from b->low to b->high. */
static const char *put_magnitudes(struct build *b, const char *sign, int32_t rule) {
  size_t n_whole = (size_t)(DIGITS + 1) * (size_t)b->step * 4, n_fraction = (size_t)(MAX_FRACTION + 2) * (DIGITS + 1) * 4;
  int32_t *made = calloc(n_whole, sizeof *made);
  b->made = calloc(n_fraction, sizeof *b->made);
  const char *why = made && b->made ? NULL : "needs more memory than there is";
  for (int length = 1; length <= DIGITS && !why; length++) {
    bool at_low = length == b->low.n_whole, at_high = !b->high.none && length == b->high.n_whole;
    if (length < b->low.n_whole || (!b->high.none && length > b->high.n_whole)) continue;
    if (!b->whole) memset(made, 0, n_whole * sizeof *made); /* how many digits may follow the point depends on it */
    int32_t digits = whole_rule(b, made, length, 0, 0, at_low, at_high);
    qtr_grammar_begin(b->g, rule);
    qtr_grammar_put_bytes(b->g, sign, strlen(sign));
    qtr_grammar_put_rule(b->g, digits);
    qtr_grammar_end(b->g);
  }
  free(made);
  free(b->made);
  return why;
}

/* Bounds of a magnitude, 0 <= low. A bound beyond what is written is none, or leaves nothing. */
static const char *put_side(struct build *b, double low, bool low_open, double high, bool high_open, const char *sign,
                            int32_t rule) {
  static const char digits[] = "needs more digits than the 15 that are written";
  if (low > high || low >= 1e15) return low >= 1e15 && low <= high ? digits : NULL;
  b->low = (struct decimal){.open = low_open};
  b->high = (struct decimal){.open = high_open, .none = high >= 1e15};
  if (!read_decimal(low, &b->low) || (!b->high.none && !read_decimal(high, &b->high))) return digits;
  return put_magnitudes(b, sign, rule);
}

const char *qtr_number_rule(struct qtr_grammar *g, const struct qtr_number_range *r, int32_t *rule) {
  struct build b = {.g = g, .whole = r->whole, .step = r->step};
  double low = r->low, high = r->high;
  bool low_open = r->low_open, high_open = r->high_open;
  *rule = qtr_grammar_rule(g);
  if (r->whole) { /* closed bounds that are whole themselves */
    low = low_open && !(ceil(low) > low) ? low + 1 : ceil(low);
    high = high_open && !(floor(high) < high) ? high - 1 : floor(high);
    low_open = high_open = false;
  }
  const char *why = NULL;
  if (high >= 0) {
    bool zero = low < 0;
    why = put_side(&b, zero ? 0 : low, !zero && low_open, high, high_open, "", *rule);
  }
  if (low < 0 && !why) { /* -0 is not written */
    bool zero = high >= 0;
    why = put_side(&b, zero ? (r->whole ? 1 : 0) : -high, zero ? !r->whole : high_open, -low, low_open, "-", *rule);
  }
  return why;
}
