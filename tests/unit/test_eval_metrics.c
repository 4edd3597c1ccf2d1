/* test_eval_metrics.c - every score against what the Python packages give (tests/golden/metrics.json, made by
 * make_metrics.py). */
#include "base/file.h"
#include "eval/metrics.h"
#include "eval/segment.h"
#include "eval/stem.h"

#include <jansson.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static json_t *golden;

static int load(void **state) {
  (void)state;
  golden = json_load_file(QTR_SOURCE_DIR "/tests/golden/metrics.json", 0, NULL);
  return golden ? 0 : -1;
}

static int unload(void **state) {
  (void)state;
  json_decref(golden);
  return 0;
}

static struct qtr_string string_at(const json_t *list, size_t i) {
  const json_t *text = json_array_get(list, i);
  return (struct qtr_string){json_string_value(text), json_string_length(text)};
}

static void check(const char *kind, size_t i, double score, double expected, struct qtr_string answer,
                  struct qtr_string gold) {
  if (fabs(score - expected) > 1e-9) {
    fail_msg("%s, case %zu: %.12f, not %.12f, for \"%s\" and \"%s\"", kind, i, score, expected, answer.p, gold.p);
  }
}

typedef enum qtr_status metric(struct qtr_string, struct qtr_string, double *, struct qtr_error *);

/* Cases are [answer, gold, score]. */
static void check_all(const char *kind, metric *m) {
  const json_t *cases = json_object_get(golden, kind), *one;
  size_t i, n = 0;
  json_array_foreach(cases, i, one) {
    struct qtr_error err;
    double score = -1, expected = json_number_value(json_array_get(one, 2));
    assert_int_equal(m(string_at(one, 0), string_at(one, 1), &score, &err), QTR_OK);
    check(kind, i, score, expected, string_at(one, 0), string_at(one, 1));
    n += expected > 0 && expected < 1;
  }
  assert_true(n >= 5); /* cases that say something */
}

static enum qtr_status retrieval(struct qtr_string a, struct qtr_string g, double *score, struct qtr_error *err) {
  (void)err;
  *score = qtr_metric_retrieval(a, g);
  return QTR_OK;
}
static enum qtr_status retrieval_zh(struct qtr_string a, struct qtr_string g, double *score, struct qtr_error *err) {
  (void)err;
  *score = qtr_metric_retrieval_zh(a, g);
  return QTR_OK;
}
static enum qtr_status count(struct qtr_string a, struct qtr_string g, double *score, struct qtr_error *err) {
  (void)err;
  *score = qtr_metric_count(a, g);
  return QTR_OK;
}

static void english(void **state) {
  (void)state;
  check_all("rouge1", qtr_metric_rouge1);
  check_all("overlap", qtr_metric_overlap);
  check_all("f1", qtr_metric_f1);
  check_all("rouge_l", qtr_metric_rouge_l);
}

static void code(void **state) {
  (void)state;
  check_all("code", qtr_metric_code);
}

static void numbers(void **state) {
  (void)state;
  check_all("retrieval", retrieval);
  check_all("retrieval_zh", retrieval_zh);
  check_all("count", count);
  const struct qtr_string none = {"no such paragraph", 17}, number = {"7", 1};
  assert_true(qtr_metric_retrieval(number, none) == 0);
  static const struct {
    const char *answer, *digits;
    bool found;
  } cases[] = {{"It is 4821.", "4821", true},
               {"48210", "4821", false},
               {"14821 and 4821", "4821", true},
               {"", "1", false},
               {"4821", "", false},
               {"x4821x", "4821", true},
               {"482", "4821", false}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    const struct qtr_string answer = {cases[i].answer, strlen(cases[i].answer)};
    const struct qtr_string digits = {cases[i].digits, strlen(cases[i].digits)};
    assert_int_equal(qtr_metric_has_number(answer, digits), cases[i].found);
  }
}

static void classes(void **state) {
  (void)state;
  const json_t *cases = json_object_get(golden, "classification"), *one;
  size_t i;
  json_array_foreach(cases, i, one) {
    const json_t *list = json_array_get(one, 2);
    struct qtr_string name[16];
    for (size_t k = 0; k < json_array_size(list); k++) name[k] = string_at(list, k);
    double score = qtr_metric_classification(string_at(one, 0), string_at(one, 1), name, json_array_size(list));
    check("classification", i, score, json_number_value(json_array_get(one, 3)), string_at(one, 0), string_at(one, 1));
  }
}

static void stems(void **state) {
  (void)state;
  const json_t *cases = json_object_get(golden, "stems"), *one;
  size_t i;
  assert_true(json_array_size(cases) > 2000);
  json_array_foreach(cases, i, one) {
    char word[64];
    struct qtr_string in = string_at(one, 0), out = string_at(one, 1);
    memcpy(word, in.p, in.n);
    word[qtr_stem(word, in.n)] = 0;
    if (strcmp(word, out.p) != 0) fail_msg("the stem of %s is \"%s\", not \"%s\"", in.p, word, out.p);
  }
}

static void chinese(void **state) {
  (void)state;
  const json_t *zh = json_object_get(golden, "chinese"), *one;
  const json_t *dictionary = json_object_get(zh, "dictionary"), *cases = json_object_get(zh, "cases");
  struct qtr_segmenter *segmenter;
  struct qtr_error err;
  size_t i, n = 0;
  if (qtr_segmenter_parse(json_string_value(dictionary), json_string_length(dictionary), "words", &segmenter, &err)) {
    fail_msg("%s", err.message);
  }
  json_array_foreach(cases, i, one) {
    const json_t *text = json_object_get(one, "answer"), *words = json_object_get(one, "words");
    const struct qtr_string answer = {json_string_value(text), json_string_length(text)};
    const json_t *gold_text = json_object_get(one, "gold");
    const struct qtr_string gold = {json_string_value(gold_text), json_string_length(gold_text)};
    struct qtr_words cut = {0};
    double f1, rouge;
    assert_int_equal(qtr_segment(segmenter, answer.p, answer.n, &cut, &err), QTR_OK);
    assert_int_equal(cut.n, json_array_size(words));
    for (size_t k = 0; k < cut.n; k++) {
      struct qtr_string expected = string_at(words, k);
      assert_int_equal(cut.word[k].n, expected.n);
      assert_memory_equal(cut.word[k].p, expected.p, expected.n);
    }
    qtr_words_free(&cut);
    assert_int_equal(qtr_metric_f1_zh(answer, gold, segmenter, &f1, &err), QTR_OK);
    check("f1_zh", i, f1, json_number_value(json_object_get(one, "f1")), answer, gold);
    assert_int_equal(qtr_metric_rouge_l_zh(answer, gold, segmenter, &rouge, &err), QTR_OK);
    check("rouge_l_zh", i, rouge, json_number_value(json_object_get(one, "rouge_l")), answer, gold);
    n += f1 > 0 && f1 < 1 && rouge > 0 && rouge < 1;
  }
  assert_true(n >= 10);
  qtr_segmenter_free(segmenter);
  /* of two equally probable ways the one that begins with the longer word */
  static const char list[] = "甲乙 5\n甲 5\n丙 7\n乙丙 7\n乙 1\n", text[] = "甲乙丙";
  struct qtr_words cut = {0};
  assert_int_equal(qtr_segmenter_parse(list, sizeof list - 1, "words", &segmenter, &err), QTR_OK);
  assert_int_equal(qtr_segment(segmenter, text, sizeof text - 1, &cut, &err), QTR_OK);
  assert_int_equal(cut.n, 2);
  assert_int_equal(cut.word[0].n, 6);
  qtr_words_free(&cut);
  qtr_segmenter_free(segmenter);
  /* without a list: characters */
  static const char mixed[] = "\xe4\xb8\xad\xe6\x96\x87 GPU\xe5\xa5\xbd";
  assert_int_equal(qtr_segment(NULL, mixed, sizeof mixed - 1, &cut, &err), QTR_OK);
  assert_int_equal(cut.n, 5);
  assert_int_equal(cut.word[3].n, 3);
  qtr_words_free(&cut);
  assert_int_equal(qtr_segmenter_parse("\n \n", 3, "words", &segmenter, &err), QTR_ERR_FORMAT);
  assert_int_equal(qtr_segmenter_parse("\xff\xfe 3\n", 5, "words", &segmenter, &err), QTR_ERR_FORMAT);
  assert_int_equal(qtr_segmenter_parse("x 0\n", 4, "words", &segmenter, &err), QTR_ERR_FORMAT);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(stems),   cmocka_unit_test(english), cmocka_unit_test(code),
                                     cmocka_unit_test(numbers), cmocka_unit_test(classes), cmocka_unit_test(chinese)};
  return cmocka_run_group_tests(tests, load, unload);
}
