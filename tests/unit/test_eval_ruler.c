/* test_eval_ruler.c - the generated texts hold what their answers must hold: the most frequent words are that, chains of
 * variables lead there, needles say their numbers; counting in answers. */
#include "base/checked.h"
#include "eval/ruler.h"
#include "eval/words.h"

#include <ctype.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { SENTENCES = 50, SENTENCE = 20 };

/* A haystack without an engine: sentences of as many tokens as they have letters. */
static struct qtr_haystack make_haystack(void) {
  struct qtr_haystack h = {.n_sentences = SENTENCES, .n_tokens = SENTENCES * SENTENCE, .len = SENTENCES * SENTENCE};
  h.text = malloc(h.len + 1);
  h.sentence = calloc(SENTENCES, sizeof *h.sentence);
  for (size_t i = 0; i < SENTENCES; i++) {
    (void)snprintf(h.text + i * SENTENCE, SENTENCE + 1, "Nothing is here %02zu. ", i % 100);
    h.sentence[i] = (struct qtr_sentence){i * SENTENCE, SENTENCE, SENTENCE};
  }
  return h;
}

static char *text_of(struct qtr_ruler_question *q, size_t room) {
  struct qtr_text out = {0};
  struct qtr_error err;
  assert_int_equal(qtr_ruler_text(q, room, &out, &err), QTR_OK);
  return out.data;
}

static size_t occurrences(const char *text, const char *word) {
  size_t n = 0;
  for (const char *p = text; (p = strstr(p, word)); p++) n++;
  return n;
}

struct counted {
  struct qtr_word word;
  size_t n;
};

static int by_count(const void *a, const void *b) {
  const struct counted *x = a, *y = b;
  return (x->n < y->n) - (x->n > y->n);
}

static int numbered(const char *word) { return isdigit((unsigned char)*word); }

/* The expected words are the most frequent ones of the text, and more frequent than any other. */
static void check_frequent(const struct qtr_ruler_question *q, const char *text) {
  struct qtr_words words = {0};
  struct qtr_error err;
  const char *question = strstr(text, "\n\n");
  assert_non_null(question);
  assert_int_equal(qtr_words_split(&words, text, (size_t)(question - text), &err), QTR_OK);
  qtr_words_sort(&words);
  struct counted *count = calloc(words.n, sizeof *count);
  size_t n = 0;
  for (size_t i = 0; i < words.n; i++) {
    if (numbered(words.word[i].p)) continue;
    if (n == 0 || qtr_word_compare(&words.word[i], &count[n - 1].word) != 0) count[n++].word = words.word[i];
    count[n - 1].n++;
  }
  qsort(count, n, sizeof *count, by_count);
  for (size_t i = 0; i < q->n_expected; i++) {
    bool found = false;
    for (size_t k = 0; k < q->n_expected; k++) {
      found = found ||
              (count[k].word.n == strlen(q->expected[i]) && memcmp(count[k].word.p, q->expected[i], count[k].word.n) == 0);
    }
    assert_true(found);
  }
  if (n > q->n_expected) assert_true(count[q->n_expected - 1].n > count[q->n_expected].n);
  free(count);
  qtr_words_free(&words);
}

/* Follows the assignments in the text from the value asked for. */
static void check_variables(const struct qtr_ruler_question *q, const char *text) {
  char reached[8][8] = {{0}}, value[16];
  size_t n = 0;
  assert_int_equal(sscanf(strstr(q->text, "value ") + 6, "%15[0-9]", value), 1);
  for (const char *p = text; (p = strstr(p, "VAR ")); p += 4) {
    char name[8], from[16];
    if (sscanf(p, "VAR %5s = VAR %5[A-Z]", name, from) == 2) {
      for (size_t i = 0; i < n; i++) {
        if (strcmp(reached[i], from) == 0) {
          strcpy(reached[n++], name);
          break;
        }
      }
    } else if (sscanf(p, "VAR %5s = %15[0-9]", name, from) == 2 && strcmp(from, value) == 0) {
      strcpy(reached[n++], name);
    }
  }
  assert_int_equal(n, q->n_expected);
  for (size_t i = 0; i < n; i++) assert_string_equal(reached[i], q->expected[i]);
}

static void texts_hold_answers(void **state) {
  (void)state;
  struct qtr_haystack h = make_haystack();
  static const size_t rooms[] = {0, 300, 5000, 200000};
  for (int t = 0; t < QTR_RULER_N_TASKS; t++) {
    for (uint64_t seed = 1; seed < 12; seed++) {
      struct qtr_ruler_question q;
      qtr_ruler_make((enum qtr_ruler_task)t, seed * 7919, &h, 4, QTR_ASK_CHAT, &q);
      assert_true(q.n_expected >= 1 && q.text[0]);
      for (size_t r = 0; r < 4; r++) {
        char *text = text_of(&q, rooms[r]);
        assert_string_equal(text + strlen(text) - strlen(q.text), q.text);
        if (t == QTR_RULER_COMMON || t == QTR_RULER_FREQUENT) {
          check_frequent(&q, text);
        } else if (t == QTR_RULER_VARIABLES) {
          check_variables(&q, text);
        } else {
          for (size_t i = 0; i < q.n_expected; i++) assert_int_equal(occurrences(text, q.expected[i]), 1);
          size_t n_needles = t == QTR_RULER_SINGLE ? 1 : 4;
          assert_int_equal(occurrences(text, "One of the special magic numbers for "), n_needles);
          assert_true(strlen(text) >= rooms[r] - QTR_MIN(rooms[r], SENTENCE) && strlen(text) <= rooms[r] + 600);
        }
        free(text);
      }
    }
  }
  free(h.text);
  free(h.sentence);
}

static void lists_fill_their_room(void **state) {
  (void)state;
  struct qtr_ruler_question q;
  for (int t = QTR_RULER_COMMON; t <= QTR_RULER_FREQUENT; t++) {
    qtr_ruler_make((enum qtr_ruler_task)t, 3, NULL, 4, QTR_ASK_PLAIN, &q);
    char *text = text_of(&q, 40000);
    struct qtr_words words = {0};
    struct qtr_error err;
    assert_int_equal(qtr_words_split(&words, text, strlen(text), &err), QTR_OK);
    assert_in_range(words.n / (t == QTR_RULER_COMMON ? 2 : 1), 9990, 10020);
    assert_non_null(strstr(text, "\nAnswer:"));
    qtr_words_free(&words);
    free(text);
  }
}

static void questions_differ(void **state) {
  (void)state;
  struct qtr_haystack h = make_haystack();
  struct qtr_ruler_question a, b, c;
  qtr_ruler_make(QTR_RULER_MULTIQUERY, 5, &h, 4, QTR_ASK_CHAT, &a);
  qtr_ruler_make(QTR_RULER_MULTIQUERY, 5, &h, 4, QTR_ASK_CHAT, &b);
  qtr_ruler_make(QTR_RULER_MULTIQUERY, 6, &h, 4, QTR_ASK_CHAT, &c);
  assert_string_equal(a.text, b.text);
  assert_string_not_equal(a.text, c.text);
  for (size_t i = 0; i + 1 < a.n_needles; i++) assert_true(a.depth[i] <= a.depth[i + 1]);
  free(h.text);
  free(h.sentence);
}

static void counting(void **state) {
  (void)state;
  const struct qtr_ruler_question q = {.expected = {"123", "ABCDE", "9"}, .n_expected = 3};
  static const struct {
    const char *answer;
    size_t n;
  } cases[] = {
      {"123, abcde and 9.", 3}, {"1234 ABCDEF 99", 0}, {"", 0}, {"x123", 0}, {"(123)", 1}, {"1123 123", 1}, {"9", 1}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    assert_int_equal(qtr_ruler_count(&q, cases[i].answer, strlen(cases[i].answer)), cases[i].n);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(texts_hold_answers), cmocka_unit_test(lists_fill_their_room),
                                     cmocka_unit_test(questions_differ), cmocka_unit_test(counting)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
