/* stem.c - the steps of the paper as tables of rules (stem.h). In each step the first rule whose suffix is there decides,
 * whether its condition holds or not. */
#include "eval/stem.h"

#include <stdbool.h>
#include <string.h>

static bool is_vowel_letter(char c) { return c == 'a' || c == 'e' || c == 'i' || c == 'o' || c == 'u'; }

/* y is a consonant at the beginning and after a vowel. */
static bool is_consonant(const char *word, size_t i) {
  size_t n_y = 0; /* y's in a row, up to i */
  while (word[i] == 'y' && i > 0) {
    i--;
    n_y++;
  }
  bool consonant = word[i] == 'y' || !is_vowel_letter(word[i]);
  return n_y % 2 == 0 ? consonant : !consonant;
}

/* m of the paper: how many times a consonant follows a vowel. */
static size_t measure(const char *word, size_t len) {
  size_t m = 0;
  bool before = true; /* was the letter before a consonant? */
  for (size_t i = 0; i < len; i++) {
    bool consonant = word[i] == 'y' ? i == 0 || !before : !is_vowel_letter(word[i]);
    m += consonant && !before && i > 0;
    before = consonant;
  }
  return m;
}

static bool has_vowel(const char *word, size_t len) {
  for (size_t i = 0; i < len; i++) {
    if (!is_consonant(word, i)) return true;
  }
  return false;
}

static bool ends_double(const char *word, size_t len) {
  return len >= 2 && word[len - 1] == word[len - 2] && is_consonant(word, len - 1);
}

/* *o of the paper: consonant, vowel, consonant that is not w, x or y; here also a word of vowel and consonant. */
static bool ends_cvc(const char *word, size_t len) {
  if (len == 2) return !is_consonant(word, 0) && is_consonant(word, 1);
  return len >= 3 && is_consonant(word, len - 3) && !is_consonant(word, len - 2) && is_consonant(word, len - 1) &&
         word[len - 1] != 'w' && word[len - 1] != 'x' && word[len - 1] != 'y';
}

static bool ends_with(const char *word, size_t len, const char *suffix) {
  size_t n = strlen(suffix);
  return len >= n && memcmp(word + len - n, suffix, n) == 0;
}

/* Puts `with` in place of the last n letters. */
static size_t replace(char *word, size_t len, size_t n, const char *with) {
  memcpy(word + len - n, with, strlen(with));
  return len - n + strlen(with);
}

struct rule {
  const char *suffix, *with;
};

/* The first rule that fits decides: it acts when the stem's measure is at least min_measure. */
static size_t apply(char *word, size_t len, const struct rule *rule, size_t n_rules, size_t min_measure) {
  for (size_t i = 0; i < n_rules; i++) {
    size_t n = strlen(rule[i].suffix);
    if (!ends_with(word, len, rule[i].suffix)) continue;
    return measure(word, len - n) >= min_measure ? replace(word, len, n, rule[i].with) : len;
  }
  return len;
}
#define APPLY(word, len, rules, min_measure) apply(word, len, rules, sizeof(rules) / sizeof((rules)[0]), min_measure)

static size_t plural(char *word, size_t len) { /* step 1a */
  static const struct rule rules[] = {{"sses", "ss"}, {"ies", "i"}, {"ss", "ss"}, {"s", ""}};
  if (len == 4 && ends_with(word, len, "ies")) return 3; /* dies: die */
  return APPLY(word, len, rules, 0);
}

static size_t past_and_gerund(char *word, size_t len) { /* step 1b */
  if (ends_with(word, len, "ied")) return len == 4 ? 3 : len - 2;
  if (ends_with(word, len, "eed")) return measure(word, len - 3) > 0 ? len - 1 : len;
  if (ends_with(word, len, "ed") && has_vowel(word, len - 2)) {
    len -= 2;
  } else if (ends_with(word, len, "ing") && has_vowel(word, len - 3)) {
    len -= 3;
  } else {
    return len;
  }
  if (ends_with(word, len, "at") || ends_with(word, len, "bl") || ends_with(word, len, "iz")) {
    return replace(word, len, 0, "e");
  }
  if (ends_double(word, len)) {
    char last = word[len - 1];
    return last == 'l' || last == 's' || last == 'z' ? len : len - 1;
  }
  return measure(word, len) == 1 && ends_cvc(word, len) ? replace(word, len, 0, "e") : len;
}

static size_t derived(char *word, size_t len) { /* step 2 */
  static const struct rule rules[] = {
      {"ational", "ate"}, {"tional", "tion"}, {"enci", "ence"},   {"anci", "ance"},   {"izer", "ize"},    {"bli", "ble"},
      {"alli", "al"},     {"entli", "ent"},   {"eli", "e"},       {"ousli", "ous"},   {"ization", "ize"}, {"ation", "ate"},
      {"ator", "ate"},    {"alism", "al"},    {"iveness", "ive"}, {"fulness", "ful"}, {"ousness", "ous"}, {"aliti", "al"},
      {"iviti", "ive"},   {"biliti", "ble"},  {"fulli", "ful"}};
  if (ends_with(word, len, "alli") && measure(word, len - 4) > 0) len -= 2;            /* and no rule fits -al */
  if (ends_with(word, len, "logi")) return measure(word, len - 3) > 0 ? len - 1 : len; /* the l counts */
  return APPLY(word, len, rules, 1);
}

static size_t residual(char *word, size_t len) { /* step 4 */
  static const struct rule rules[] = {{"al", ""},   {"ance", ""}, {"ence", ""},  {"er", ""},   {"ic", ""}, {"able", ""},
                                      {"ible", ""}, {"ant", ""},  {"ement", ""}, {"ment", ""}, {"ent", ""}};
  static const struct rule more[] = {{"ou", ""},  {"ism", ""}, {"ate", ""}, {"iti", ""},
                                     {"ous", ""}, {"ive", ""}, {"ize", ""}};
  for (size_t i = 0; i < sizeof rules / sizeof rules[0]; i++) {
    if (ends_with(word, len, rules[i].suffix)) return APPLY(word, len, rules, 2);
  }
  if (ends_with(word, len, "ion")) {
    bool s_or_t = len > 3 && (word[len - 4] == 's' || word[len - 4] == 't');
    return s_or_t && measure(word, len - 3) > 1 ? len - 3 : len;
  }
  return APPLY(word, len, more, 2);
}

size_t qtr_stem(char *word, size_t len) {
  static const struct rule irregular[] = {
      {"sky", "sky"},        {"skies", "sky"},       {"dying", "die"},        {"lying", "lie"},
      {"tying", "tie"},      {"news", "news"},       {"innings", "inning"},   {"inning", "inning"},
      {"outings", "outing"}, {"outing", "outing"},   {"cannings", "canning"}, {"canning", "canning"},
      {"howe", "howe"},      {"proceed", "proceed"}, {"exceed", "exceed"},    {"succeed", "succeed"}};
  static const struct rule adjectives[] = {{"icate", "ic"}, {"ative", ""}, {"alize", "al"}, {"iciti", "ic"},
                                           {"ical", "ic"},  {"ful", ""},   {"ness", ""}};
  for (size_t i = 0; i < sizeof irregular / sizeof irregular[0]; i++) {
    if (len == strlen(irregular[i].suffix) && memcmp(word, irregular[i].suffix, len) == 0) {
      return replace(word, len, len, irregular[i].with);
    }
  }
  if (len <= 2) return len;
  len = plural(word, len);
  len = past_and_gerund(word, len);
  if (len > 2 && word[len - 1] == 'y' && is_consonant(word, len - 2)) word[len - 1] = 'i'; /* step 1c */
  len = derived(word, len);
  len = APPLY(word, len, adjectives, 1); /* step 3 */
  len = residual(word, len);
  if (len > 0 && word[len - 1] == 'e') { /* step 5a */
    size_t m = measure(word, len - 1);
    if (m > 1 || (m == 1 && !ends_cvc(word, len - 1))) len--;
  }
  if (ends_with(word, len, "ll") && measure(word, len - 1) > 1) len--; /* step 5b */
  return len;
}
