/* words.c - cutting, lower case, multisets (words.h). */
#include "eval/words.h"

#include "base/checked.h"
#include "base/status.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

void qtr_words_free(struct qtr_words *words) {
  free(words->word);
  qtr_text_free(&words->text);
  *words = (struct qtr_words){0};
}

enum qtr_status qtr_words_add(struct qtr_words *words, const char *p, size_t n, struct qtr_error *err) {
  if (words->n == words->capacity) {
    size_t capacity = words->capacity ? words->capacity * 2 : 64;
    struct qtr_word *more = realloc(words->word, capacity * sizeof *more);
    if (!more) return qtr_fail_memory(err, "words", capacity * sizeof *more);
    words->word = more;
    words->capacity = capacity;
  }
  words->word[words->n++] = (struct qtr_word){p, n};
  return QTR_OK;
}

int32_t qtr_words_char(const char *p, const char *end, size_t *n) {
  utf8proc_int32_t c = 0;
  utf8proc_ssize_t used = utf8proc_iterate((const utf8proc_uint8_t *)p, end - p, &c);
  *n = used > 0 ? (size_t)used : 1;
  return used > 0 ? c : 0xfffd;
}

bool qtr_words_is_space(int32_t c) {
  return (c >= 9 && c <= 13) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

enum qtr_status qtr_words_split(struct qtr_words *words, const char *text, size_t len, struct qtr_error *err) {
  const char *end = text + len, *begin = NULL; /* of the word at hand */
  enum qtr_status status = QTR_OK;
  for (const char *p = text; p < end && !status;) {
    size_t n;
    bool space = qtr_words_is_space(qtr_words_char(p, end, &n));
    if (space && begin) status = qtr_words_add(words, begin, (size_t)(p - begin), err);
    if (space || !begin) begin = space ? NULL : p;
    p += n;
  }
  if (begin && !status) status = qtr_words_add(words, begin, (size_t)(end - begin), err);
  return status;
}

enum qtr_status qtr_words_lower(const char *text, size_t len, struct qtr_text *out, struct qtr_error *err) {
  const char *end = text + len;
  enum qtr_status status = QTR_OK;
  for (const char *p = text; p < end && !status;) {
    size_t n;
    utf8proc_uint8_t bytes[4];
    utf8proc_ssize_t used = utf8proc_encode_char(utf8proc_tolower(qtr_words_char(p, end, &n)), bytes);
    status = qtr_text_append(out, (const char *)bytes, (size_t)used, err);
    p += n;
  }
  return status;
}

int qtr_word_compare(const struct qtr_word *a, const struct qtr_word *b) {
  int order = memcmp(a->p, b->p, QTR_MIN(a->n, b->n));
  return order ? order : (a->n > b->n) - (a->n < b->n);
}

static int compare(const void *a, const void *b) { return qtr_word_compare(a, b); }

void qtr_words_sort(struct qtr_words *words) {
  if (words->n > 1) qsort(words->word, words->n, sizeof *words->word, compare);
}

size_t qtr_words_common(const struct qtr_words *a, const struct qtr_words *b) {
  size_t i = 0, j = 0, n = 0;
  while (i < a->n && j < b->n) {
    int order = qtr_word_compare(&a->word[i], &b->word[j]);
    n += order == 0;
    i += order <= 0;
    j += order >= 0;
  }
  return n;
}
