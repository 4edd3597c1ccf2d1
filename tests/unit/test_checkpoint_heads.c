/* DuoAttention's table of heads: parsing with clear errors, numpy's quantile, ties by index, and the classes that the
 * reference gets for a real model (spec D.1.2). */
#include "checkpoint/heads.h"
#include "shared.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

static enum qtr_status parse(const char *text, double *value, struct qtr_error *err) {
  return qtr_heads_parse(text, strlen(text), 2, 3, value, err);
}

static void test_parse(void **state) {
  (void)state;
  double value[6];
  struct qtr_error err = {0};
  static const double expected[6] = {1, 0.5, 0, 0.25, 0, 1};
  static const char *const good[] = {"1\t0.5\t-1e-3\n.25\t0\t7\n", "1 0.5 -3\r\n\n0.25 -0 1.0000001",
                                     "\n 1\t.5\t0 \n2.5e-1 0 1 \n\n"};
  for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
    memset(value, 0x7f, sizeof value);
    if (parse(good[i], value, &err)) fail_msg("%zu: %s", i, err.message);
    for (int k = 0; k < 6; k++) assert_true(value[k] == expected[k]);
  }
  static const struct {
    const char *text, *says;
  } bad[] = {{"", "ends in layer 0 after 0 values"},
             {"1 2 3\n", "2 layers of 3"},
             {"1 2 3\n1 2", "ends in layer 1 after 2"},
             {"1 2\n1 2 3\n", "layer 0 has 2 values"},
             {"1 2 3 4\n1 2 3\n", "more than 2 layers"},
             {"1 2 3\n1 2 3\n1 2 3\n", "more than 2 layers"},
             {"1 2 x\n1 2 3\n", "layer 0, head 2: \"x\""},
             {"1 2 nan\n1 2 3\n", "\"nan\" is no finite number"},
             {"1 2 1e999\n1 2 3\n", "no finite number"},
             {"1 2 3\n1,2,3\n", "layer 1, head 0: \"1,2,3\""},
             {"1 2 0000000000000000000000000000000000000000000000000000000000000000000001\n", "layer 0, head 3"}};
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    if (parse(bad[i].text, value, &err) != QTR_ERR_FORMAT) fail_msg("accepted: %s", bad[i].text);
    if (i + 1 < sizeof bad / sizeof bad[0] && !strstr(err.message, bad[i].says))
      fail_msg("\"%s\" does not say \"%s\"", err.message, bad[i].says);
  }
}

static size_t choose(const double *value, size_t n, double sparsity, uint8_t *streaming) {
  struct qtr_error err = {0};
  size_t count = 0;
  if (qtr_heads_choose(value, n, sparsity, streaming, &err)) fail_msg("%s", err.message);
  for (size_t i = 0; i < n; i++) count += streaming[i];
  return count;
}

static void test_choose(void **state) {
  (void)state;
  uint8_t s[16];
  static const double value[8] = {0.9, 0.1, 0.5, 0.3, 0.8, 0.2, 0.7, 0.6};
  /* numpy.quantile(value, p), and how many lie below it */
  assert_int_equal(choose(value, 8, 0, s), 0);
  assert_int_equal(choose(value, 8, 1, s), 8);
  assert_int_equal(choose(value, 8, 0.5, s), 4); /* 0.55 */
  static const uint8_t half[8] = {0, 1, 1, 1, 0, 1, 0, 0};
  assert_memory_equal(s, half, 8);
  assert_int_equal(choose(value, 8, 0.25, s), 2);          /* 0.275 */
  assert_int_equal(choose(value, 8, 1.0 / 7, s), 1);       /* 0.2 itself: not below */
  assert_int_equal(choose(value, 8, (double)0.99f, s), 7); /* 0.893 */
  assert_int_equal(choose(value, 8, 1e-9, s), 0);
  static const double tied[9] = {1, 0, 1, 0, 1, 1, 1, 1, 1}; /* equal values: the first ones stream */
  assert_int_equal(choose(tied, 9, 0.5, s), 4);
  static const uint8_t first[9] = {1, 1, 1, 1, 0, 0, 0, 0, 0};
  assert_memory_equal(s, first, 9);
  double eleven[11];
  for (int i = 0; i < 11; i++) eleven[i] = i;
  assert_int_equal(choose(eleven, 11, (double)0.3f, s), 3); /* the float is above 0.3 */
  struct qtr_error err = {0};
  assert_int_equal(qtr_heads_choose(value, 8, -0.1, s, &err), QTR_ERR_ARGUMENT);
  assert_int_equal(qtr_heads_choose(value, 8, 1.5, s, &err), QTR_ERR_ARGUMENT);
  assert_int_equal(qtr_heads_choose(value, 8, (double)__builtin_nanf(""), s, &err), QTR_ERR_ARGUMENT);
}

/* Full heads of each layer at 0.5. The specification lists them without the noise, every head at the threshold full; three
 * stand on it, (2, 3), (25, 4) and (31, 7), and half of all heads stream when the first two of them do. */
static void test_real_model(void **state) {
  (void)state;
  const char *dir = qtr_test_shared("data/attn_patterns/Llama-3-8B-Instruct-Gradient-1048k");
  if (!dir) skip();
  static const int full[32] = {1, 1, 2, 2, 2, 4, 2, 4, 6, 4, 5, 3, 2, 6, 5, 5,
                               5, 6, 3, 5, 6, 3, 3, 6, 4, 4, 3, 4, 6, 5, 8, 3};
  uint8_t streaming[256];
  struct qtr_error err = {0};
  if (qtr_heads_read(dir, 32, 8, 0.5, streaming, &err)) fail_msg("%s", err.message);
  for (int l = 0; l < 32; l++) {
    int n = 0;
    for (int h = 0; h < 8; h++) n += !streaming[l * 8 + h];
    assert_int_equal(n, full[l]);
  }
  assert_int_equal(qtr_heads_read(dir, 31, 8, 0.5, streaming, &err), QTR_ERR_FORMAT);
  assert_non_null(strstr(err.message, "full_attention_heads.tsv"));
  assert_int_equal(qtr_heads_read("/nonexistent", 32, 8, 0.5, streaming, &err), QTR_ERR_NOT_FOUND);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_parse), cmocka_unit_test(test_choose),
                                     cmocka_unit_test(test_real_model)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
