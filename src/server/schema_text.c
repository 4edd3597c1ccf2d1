/* schema_text.c - what every JSON text is made of, as rules (schema_internal.h). Space is let through where people write it,
 * but bounded, and so are the digits of numbers: a model that does not know how to go on could otherwise write either for
 * ever. */
#include "server/schema_internal.h"

#include <string.h>

void qtr_schema_put_mark(struct qtr_schema_build *b, const char *mark) {
  qtr_grammar_put_bytes(b->g, mark, strlen(mark));
  qtr_grammar_put_rule(b->g, b->space);
}
#define PUT_SET(g, ranges) qtr_grammar_put_set(g, ranges, sizeof ranges - 1)

static void make_character(struct qtr_schema_build *b) {
  struct qtr_grammar *g = b->g;
  static const char tail[] = "\x80\xBF";
  static const char hex[] = "09afAF";
  static const struct {
    const char *first, *second;
    int n_tail;
  } utf8[] = {{"\xC2\xDF", NULL, 1},       {"\xE0\xE0", "\xA0\xBF", 1}, {"\xE1\xEC", "\x80\xBF", 1},
              {"\xED\xED", "\x80\x9F", 1}, {"\xEE\xEF", "\x80\xBF", 1}, {"\xF0\xF0", "\x90\xBF", 2},
              {"\xF1\xF3", "\x80\xBF", 2}, {"\xF4\xF4", "\x80\x8F", 2}};
  b->character = qtr_grammar_rule(g);
  qtr_grammar_begin(g, b->character);
  PUT_SET(g, "\x20\x21\x23\x5B\x5D\x7E");
  qtr_grammar_end(g);
  for (size_t i = 0; i < sizeof utf8 / sizeof utf8[0]; i++) {
    qtr_grammar_begin(g, b->character);
    qtr_grammar_put_set(g, utf8[i].first, 2);
    if (utf8[i].second) qtr_grammar_put_set(g, utf8[i].second, 2);
    for (int k = 0; k < utf8[i].n_tail; k++) PUT_SET(g, tail);
    qtr_grammar_end(g);
  }
  qtr_grammar_begin(g, b->character);
  qtr_grammar_put_bytes(g, "\\", 1);
  PUT_SET(g, "\"\"\\\\//bbffnnrrtt");
  qtr_grammar_end(g);
  /* \uXXXX: no half of a surrogate pair alone */
  qtr_grammar_begin(g, b->character);
  qtr_grammar_put_bytes(g, "\\u", 2);
  PUT_SET(g, "09acefACEF");
  for (int k = 0; k < 3; k++) PUT_SET(g, hex);
  qtr_grammar_end(g);
  qtr_grammar_begin(g, b->character);
  qtr_grammar_put_bytes(g, "\\u", 2);
  PUT_SET(g, "ddDD");
  PUT_SET(g, "07");
  for (int k = 0; k < 2; k++) PUT_SET(g, hex);
  qtr_grammar_end(g);
  qtr_grammar_begin(g, b->character);
  for (int half = 0; half < 2; half++) {
    qtr_grammar_put_bytes(g, "\\u", 2);
    PUT_SET(g, "ddDD");
    if (half == 0)
      PUT_SET(g, "89abAB");
    else
      PUT_SET(g, "cfCF");
    for (int k = 0; k < 2; k++) PUT_SET(g, hex);
  }
  qtr_grammar_end(g);
}

int32_t qtr_schema_string_rule(struct qtr_schema_build *b, int32_t min, int32_t max) {
  int32_t characters = qtr_grammar_repeat(b->g, b->character, min, max), rule = qtr_grammar_rule(b->g);
  qtr_grammar_begin(b->g, rule);
  qtr_grammar_put_bytes(b->g, "\"", 1);
  qtr_grammar_put_rule(b->g, characters);
  qtr_grammar_put_bytes(b->g, "\"", 1);
  qtr_grammar_end(b->g);
  return rule;
}

/* Digits of a whole number without a sign: 0, or up to 15 of them. positive: not 0. */
static int32_t natural_rule(struct qtr_schema_build *b, bool positive) {
  struct qtr_grammar *g = b->g;
  int32_t digit = qtr_grammar_rule(g), rule = qtr_grammar_rule(g);
  qtr_grammar_begin(g, digit);
  PUT_SET(g, "09");
  qtr_grammar_end(g);
  int32_t more = qtr_grammar_repeat(g, digit, 0, 14);
  if (!positive) qtr_grammar_alternative(g, rule, "0");
  qtr_grammar_begin(g, rule);
  PUT_SET(g, "19");
  qtr_grammar_put_rule(g, more);
  qtr_grammar_end(g);
  return rule;
}

static void make_numbers(struct qtr_schema_build *b) {
  struct qtr_grammar *g = b->g;
  int32_t natural = natural_rule(b, false), positive = natural_rule(b, true), digit = qtr_grammar_rule(g);
  qtr_grammar_begin(g, digit);
  PUT_SET(g, "09");
  qtr_grammar_end(g);
  b->integer = qtr_grammar_rule(g);
  for (int sign = 0; sign < 2; sign++) {
    qtr_grammar_begin(g, b->integer);
    if (sign) qtr_grammar_put_bytes(g, "-", 1);
    qtr_grammar_put_rule(g, sign ? positive : natural);
    qtr_grammar_end(g);
  }
  int32_t fraction = qtr_grammar_rule(g), digits = qtr_grammar_repeat(g, digit, 1, 16), exponent = qtr_grammar_rule(g),
          few = qtr_grammar_repeat(g, digit, 1, 2);
  qtr_grammar_alternative(g, fraction, "");
  qtr_grammar_begin(g, fraction);
  qtr_grammar_put_bytes(g, ".", 1);
  qtr_grammar_put_rule(g, digits);
  qtr_grammar_end(g);
  qtr_grammar_alternative(g, exponent, "");
  for (int sign = 0; sign < 2; sign++) {
    qtr_grammar_begin(g, exponent);
    PUT_SET(g, "eeEE");
    if (sign) PUT_SET(g, "++--");
    qtr_grammar_put_rule(g, few);
    qtr_grammar_end(g);
  }
  b->number = qtr_grammar_rule(g);
  for (int sign = 0; sign < 2; sign++) {
    qtr_grammar_begin(g, b->number);
    if (sign) qtr_grammar_put_bytes(g, "-", 1);
    qtr_grammar_put_rule(g, natural);
    qtr_grammar_put_rule(g, fraction);
    qtr_grammar_put_rule(g, exponent);
    qtr_grammar_end(g);
  }
}

/* Nothing, one space, or one or two newlines and an indentation. */
static void make_space(struct qtr_schema_build *b) {
  struct qtr_grammar *g = b->g;
  int32_t blank = qtr_grammar_rule(g);
  qtr_grammar_begin(g, blank);
  PUT_SET(g, "  \t\t");
  qtr_grammar_end(g);
  int32_t indent = qtr_grammar_repeat(g, blank, 0, 16);
  b->space = qtr_grammar_rule(g);
  qtr_grammar_alternative(g, b->space, "");
  qtr_grammar_alternative(g, b->space, " ");
  for (int n = 1; n <= 2; n++) {
    qtr_grammar_begin(g, b->space);
    qtr_grammar_put_bytes(g, "\n\n", (size_t)n);
    qtr_grammar_put_rule(g, indent);
    qtr_grammar_end(g);
  }
}

int32_t qtr_schema_list_rule(struct qtr_schema_build *b, const char *open, const char *close, int32_t key, int32_t item,
                             int32_t min, int32_t max) {
  struct qtr_grammar *g = b->g;
  int32_t entry = qtr_grammar_rule(g), further = qtr_grammar_rule(g), rule = qtr_grammar_rule(g);
  qtr_grammar_begin(g, entry);
  if (key >= 0) {
    qtr_grammar_put_rule(g, key);
    qtr_grammar_put_rule(g, b->space);
    qtr_schema_put_mark(b, ":");
  }
  qtr_grammar_put_rule(g, item);
  qtr_grammar_put_rule(g, b->space);
  qtr_grammar_end(g);
  qtr_grammar_begin(g, further);
  qtr_schema_put_mark(b, ",");
  qtr_grammar_put_rule(g, entry);
  qtr_grammar_end(g);
  if (min == 0) {
    qtr_grammar_begin(g, rule);
    qtr_schema_put_mark(b, open);
    qtr_grammar_put_bytes(g, close, 1);
    qtr_grammar_end(g);
  }
  if (max != 0) {
    int32_t rest = qtr_grammar_repeat(g, further, min > 0 ? min - 1 : 0, max < 0 ? -1 : max - 1);
    qtr_grammar_begin(g, rule);
    qtr_schema_put_mark(b, open);
    qtr_grammar_put_rule(g, entry);
    qtr_grammar_put_rule(g, rest);
    qtr_grammar_put_bytes(g, close, 1);
    qtr_grammar_end(g);
  }
  return rule;
}

void qtr_schema_add_choice(struct qtr_schema_build *b, int32_t rule, int32_t choice) {
  qtr_grammar_begin(b->g, rule);
  qtr_grammar_put_rule(b->g, choice);
  qtr_grammar_end(b->g);
}

void qtr_schema_make_basics(struct qtr_schema_build *b) {
  make_space(b);
  make_character(b);
  b->string = qtr_schema_string_rule(b, 0, -1);
  make_numbers(b);
  b->value = qtr_grammar_rule(b->g);
  qtr_schema_add_choice(b, b->value, b->string);
  qtr_schema_add_choice(b, b->value, b->number);
  static const char *const words[] = {"true", "false", "null"};
  for (size_t i = 0; i < 3; i++) qtr_grammar_alternative(b->g, b->value, words[i]);
  qtr_schema_add_choice(b, b->value, qtr_schema_list_rule(b, "[", "]", -1, b->value, 0, -1));
  qtr_schema_add_choice(b, b->value, qtr_schema_list_rule(b, "{", "}", b->string, b->value, 0, -1));
}
