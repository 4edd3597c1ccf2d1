/* metrics_longbench.c - LongBench's scores (metrics.h; spec G.2.2): F1, classes, numbers. ROUGE-L is rouge_l.c's, code lines
 * are code_ratio.c's. */
#include "eval/metrics.h"

#include "base/status.h"
#include "eval/segment.h"
#include "eval/words.h"

#include <string.h>
#include <utf8proc.h>

static double f1_of(struct qtr_words *answer, struct qtr_words *gold) {
  qtr_words_sort(answer);
  qtr_words_sort(gold);
  size_t common = qtr_words_common(answer, gold);
  if (common == 0) return 0;
  double precision = (double)common / (double)answer->n, recall = (double)common / (double)gold->n;
  return 2 * precision * recall / (precision + recall);
}

static bool is_ascii_punctuation(int32_t c) {
  return c < 127 && c > 32 && strchr("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", (int)c);
}

/* What \w matches in Python: letters and numbers of any script (the underscore is gone by then). */
static bool is_word_char(int32_t c) {
  utf8proc_category_t k = utf8proc_category(c);
  return (k >= UTF8PROC_CATEGORY_LU && k <= UTF8PROC_CATEGORY_LO) ||
         (k >= UTF8PROC_CATEGORY_ND && k <= UTF8PROC_CATEGORY_NO);
}

static bool is_article(const char *p, size_t n) {
  return (n == 1 && *p == 'a') || (n == 2 && memcmp(p, "an", 2) == 0) || (n == 3 && memcmp(p, "the", 3) == 0);
}

/* Lower case, no ASCII punctuation, articles become spaces; then the words between white space, which lie in words->text. */
static enum qtr_status cut_english(struct qtr_string text, struct qtr_words *words, struct qtr_error *err) {
  struct qtr_text lower = {0}, bare = {0};
  enum qtr_status status = qtr_words_lower(text.p, text.n, &lower, err);
  const char *p = lower.len ? lower.data : "", *end = p + lower.len;
  for (size_t n; p < end && !status; p += n) {
    if (!is_ascii_punctuation(qtr_words_char(p, end, &n))) status = qtr_text_append(&bare, p, n, err);
  }
  p = bare.len ? bare.data : "";
  end = p + bare.len;
  while (p < end && !status) {
    size_t n;
    const char *q = p;
    while (q < end && is_word_char(qtr_words_char(q, end, &n))) q += n;
    if (q == p) {
      (void)qtr_words_char(p, end, &n);
      q = p + n;
    }
    bool article = is_article(p, (size_t)(q - p));
    status = qtr_text_append(&words->text, article ? " " : p, article ? 1 : (size_t)(q - p), err);
    p = q;
  }
  if (!status && words->text.len > 0) status = qtr_words_split(words, words->text.data, words->text.len, err);
  qtr_text_free(&lower);
  qtr_text_free(&bare);
  return status;
}

enum qtr_status qtr_metric_f1(struct qtr_string answer, struct qtr_string gold, double *score, struct qtr_error *err) {
  struct qtr_words a = {0}, b = {0};
  enum qtr_status status = cut_english(answer, &a, err);
  if (!status) status = cut_english(gold, &b, err);
  *score = status ? 0 : f1_of(&a, &b);
  qtr_words_free(&a);
  qtr_words_free(&b);
  return status;
}

/* ---- Chinese ---- */

static bool is_chinese_punctuation(int32_t c) {
  return (c >= 0xff01 && c <= 0xff0f) || (c >= 0xff1a && c <= 0xff20) || (c >= 0xff3b && c <= 0xff40) ||
         (c >= 0xff5b && c <= 0xff64) || (c >= 0x3001 && c <= 0x3003) || (c >= 0x3008 && c <= 0x3011) ||
         (c >= 0x3014 && c <= 0x301f) || c == 0x3030 || c == 0x303e || c == 0x303f || (c >= 0x2013 && c <= 0x2014) ||
         (c >= 0x2018 && c <= 0x2019) || (c >= 0x201b && c <= 0x201f) || c == 0x2026 || c == 0x2027 || c == 0xfe4f;
}

/* Segments, then takes lower case and drops punctuation and white space within each word. `to` owns the bytes. */
static enum qtr_status cut_chinese(struct qtr_string text, const struct qtr_segmenter *segmenter, struct qtr_words *to,
                                   struct qtr_error *err) {
  struct qtr_words cut = {0};
  enum qtr_status status = qtr_segment(segmenter, text.p, text.n, &cut, err);
  for (size_t i = 0; i < cut.n && !status; i++) {
    struct qtr_text lower = {0};
    size_t begin = to->text.len, n;
    status = qtr_words_lower(cut.word[i].p, cut.word[i].n, &lower, err);
    const char *p = lower.len ? lower.data : "";
    for (const char *end = p + lower.len; p < end && !status; p += n) {
      int32_t c = qtr_words_char(p, end, &n);
      if (is_ascii_punctuation(c) || is_chinese_punctuation(c) || qtr_words_is_space(c)) continue;
      status = qtr_text_append(&to->text, p, n, err);
    }
    if (!status && to->text.len > begin) status = qtr_words_add(to, NULL, to->text.len - begin, err);
    qtr_text_free(&lower);
  }
  const char *at = to->text.data; /* it has stopped growing: the words may point into it */
  for (size_t i = 0; i < to->n && !status; i++) {
    to->word[i].p = at;
    at += to->word[i].n;
  }
  qtr_words_free(&cut);
  return status;
}

enum qtr_status qtr_metric_f1_zh(struct qtr_string answer, struct qtr_string gold, const struct qtr_segmenter *segmenter,
                                 double *score, struct qtr_error *err) {
  struct qtr_words a = {0}, b = {0};
  enum qtr_status status = cut_chinese(answer, segmenter, &a, err);
  if (!status) status = cut_chinese(gold, segmenter, &b, err);
  *score = status ? 0 : f1_of(&a, &b);
  qtr_words_free(&a);
  qtr_words_free(&b);
  return status;
}

/* ---- classes and numbers ---- */

static bool holds(struct qtr_string text, struct qtr_string part) {
  return part.n == 0 || (text.n >= part.n && memmem(text.p, text.n, part.p, part.n));
}

static bool equal(struct qtr_string a, struct qtr_string b) {
  return a.n == b.n && (a.n == 0 || memcmp(a.p, b.p, a.n) == 0);
}

double qtr_metric_classification(struct qtr_string answer, struct qtr_string gold, const struct qtr_string *classes,
                                 size_t n_classes) {
  size_t n_named = 0, n_gold = 0;
  for (size_t i = 0; i < n_classes; i++) {
    if (!holds(answer, classes[i])) continue;
    bool right = equal(classes[i], gold);
    if (!right && holds(gold, classes[i])) continue;
    n_named++;
    n_gold += right;
  }
  return n_gold > 0 ? 1.0 / (double)n_named : 0;
}

static bool is_digit_char(int32_t c) { return utf8proc_category(c) == UTF8PROC_CATEGORY_ND; }

/* The next run of digits at or after *p; *p goes behind it. n 0: there is none. */
static struct qtr_string next_number(const char **p, const char *end) {
  size_t n;
  while (*p < end && !is_digit_char(qtr_words_char(*p, end, &n))) *p += n;
  struct qtr_string number = {*p, 0};
  while (*p < end && is_digit_char(qtr_words_char(*p, end, &n))) *p += n;
  number.n = (size_t)(*p - number.p);
  return number;
}

static double share_of_number(struct qtr_string text, struct qtr_string wanted) {
  size_t n = 0, n_right = 0;
  const char *p = text.p, *end = text.p + text.n;
  for (struct qtr_string number; (number = next_number(&p, end)).n > 0; n++) n_right += equal(number, wanted);
  return n > 0 ? (double)n_right / (double)n : 0;
}

/* The number right after the first `word` that has one. */
static double retrieval(struct qtr_string answer, struct qtr_string gold, const char *word) {
  size_t n_word = strlen(word);
  for (size_t i = 0; i + n_word < gold.n; i++) {
    if (memcmp(gold.p + i, word, n_word) != 0) continue;
    const char *p = gold.p + i + n_word;
    struct qtr_string wanted = next_number(&p, gold.p + gold.n);
    if (wanted.n > 0 && wanted.p == gold.p + i + n_word) return share_of_number(answer, wanted);
  }
  return 0;
}

double qtr_metric_retrieval(struct qtr_string answer, struct qtr_string gold) {
  return retrieval(answer, gold, "Paragraph ");
}

double qtr_metric_retrieval_zh(struct qtr_string answer, struct qtr_string gold) {
  return retrieval(answer, gold, "\xe6\xae\xb5\xe8\x90\xbd");
}

double qtr_metric_count(struct qtr_string answer, struct qtr_string gold) { return share_of_number(answer, gold); }
