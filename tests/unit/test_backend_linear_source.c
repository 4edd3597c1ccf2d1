/* The check that all backends share (backend/common/linear_source.h): each thing that can be wrong is found and named, and
 * nothing that is right is refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "backend/common/linear_source.h"

static const uint8_t bytes[4];
static const float ones[4];
static const struct qtr_linear_part whole = {
    .n_out = 32, .weight = bytes, .scale = ones, .szero = ones, .s2_scale = bytes, .s2_zero = bytes};

static void expect(const struct qtr_linear_source *s, enum qtr_status status, const char *words) {
  struct qtr_error err = {0};
  size_t n_out;
  enum qtr_status found = qtr_linear_source_check(s, &n_out, &err);
  if (found != status || !strstr(err.message, words)) {
    fail_msg("%s \"%s\"; expected %s with \"%s\"", qtr_status_name(found), err.message, qtr_status_name(status), words);
  }
}

static void test_accepts(void **state) {
  (void)state;
  static const size_t n_in[QTR_N_LINEAR_FORMATS] = {1, 3, 200000, QTR_MAX_INT_INPUTS, 32, 128};
  for (int f = 0; f < QTR_N_LINEAR_FORMATS; f++) {
    struct qtr_linear_source s = {
        .format = (enum qtr_linear_format)f, .n_in = n_in[f], .n_parts = 3, .part = {whole, whole, whole}};
    struct qtr_error err = {0};
    size_t n_out = 0;
    s.part[2].n_out = 64;
    if (qtr_linear_source_check(&s, &n_out, &err)) fail_msg("%s: %s", qtr_linear_format_name(s.format), err.message);
    assert_int_equal(n_out, 128);
  }
  /* A format asks only for its own tensors. */
  const struct qtr_linear_part bare = {.n_out = 7, .weight = bytes};
  expect(&(struct qtr_linear_source){.format = QTR_LINEAR_BF16, .n_in = 5, .n_parts = 1, .part = {bare}}, QTR_OK, "");
  const struct qtr_linear_part scaled = {.n_out = 7, .weight = bytes, .scale = ones};
  expect(&(struct qtr_linear_source){.format = QTR_LINEAR_W8A8, .n_in = 5, .n_parts = 1, .part = {scaled}}, QTR_OK, "");
}

static void test_shapes(void **state) {
  (void)state;
  struct qtr_linear_source s = {.format = QTR_LINEAR_W4A8, .n_in = 48, .n_parts = 1, .part = {whole}};
  expect(&s, QTR_ERR_UNSUPPORTED, "multiple of 32 inputs, found 48");
  s.format = QTR_LINEAR_W4A8_G128, s.n_in = 192;
  expect(&s, QTR_ERR_UNSUPPORTED, "multiple of 128 inputs, found 192");
  s.n_in = 0;
  expect(&s, QTR_ERR_ARGUMENT, "0 inputs");
  s.n_in = 131072; /* -128 * -128 * 131072 = 2^31 */
  expect(&s, QTR_ERR_UNSUPPORTED, "at most 131071");
  s.format = QTR_LINEAR_F32;
  expect(&s, QTR_OK, "");
  s.format = QTR_N_LINEAR_FORMATS;
  expect(&s, QTR_ERR_ARGUMENT, "format 6");
  s.format = (enum qtr_linear_format) - 1;
  expect(&s, QTR_ERR_ARGUMENT, "format -1");

  s = (struct qtr_linear_source){.format = QTR_LINEAR_W4A8, .n_in = 64, .n_parts = 0, .part = {whole}};
  expect(&s, QTR_ERR_ARGUMENT, "0 parts");
  s.n_parts = QTR_MAX_PARTS + 1;
  expect(&s, QTR_ERR_ARGUMENT, "4 parts");
  s.n_parts = 1;
  for (size_t n = 0; n < 64; n++) {
    s.part[0].n_out = n;
    expect(&s, n == 32 ? QTR_OK : QTR_ERR_ARGUMENT, n == 32 ? "" : "a multiple of 32 is needed");
  }
  s.part[0].n_out = SIZE_MAX / 32 * 32;
  s.n_parts = 2;
  s.part[1] = whole;
  expect(&s, QTR_ERR_ARGUMENT, "bad size"); /* the sum of the rows overflows */
  s.n_parts = 1;
  expect(&s, QTR_ERR_MEMORY, "more than memory can hold");
}

static void test_parts(void **state) {
  (void)state;
  static const struct {
    enum qtr_linear_format format;
    size_t offset; /* of the pointer that is taken away */
    bool needed;
  } tensor[] = {
      {QTR_LINEAR_F16, offsetof(struct qtr_linear_part, weight), true},
      {QTR_LINEAR_F16, offsetof(struct qtr_linear_part, scale), false},
      {QTR_LINEAR_W8A8, offsetof(struct qtr_linear_part, scale), true},
      {QTR_LINEAR_W8A8, offsetof(struct qtr_linear_part, szero), false},
      {QTR_LINEAR_W4A8, offsetof(struct qtr_linear_part, scale), true},
      {QTR_LINEAR_W4A8, offsetof(struct qtr_linear_part, szero), true},
      {QTR_LINEAR_W4A8, offsetof(struct qtr_linear_part, s2_scale), false},
      {QTR_LINEAR_W4A8_G128, offsetof(struct qtr_linear_part, scale), true},
      {QTR_LINEAR_W4A8_G128, offsetof(struct qtr_linear_part, szero), false},
      {QTR_LINEAR_W4A8_G128, offsetof(struct qtr_linear_part, s2_scale), true},
      {QTR_LINEAR_W4A8_G128, offsetof(struct qtr_linear_part, s2_zero), true},
  };
  for (size_t i = 0; i < sizeof tensor / sizeof tensor[0]; i++) {
    struct qtr_linear_source s = {.format = tensor[i].format, .n_in = 128, .n_parts = 2, .part = {whole, whole}};
    memset((char *)&s.part[1] + tensor[i].offset, 0, sizeof(void *));
    expect(&s, tensor[i].needed ? QTR_ERR_ARGUMENT : QTR_OK, tensor[i].needed ? "part 1" : "");
  }
  struct qtr_linear_source s = {
      .format = QTR_LINEAR_W4A8, .n_in = 128, .n_parts = 2, .part = {whole, whole}, .gate_up = true};
  expect(&s, QTR_OK, "");
  s.part[1].n_out = 64;
  expect(&s, QTR_ERR_ARGUMENT, "equal rows");
  s.n_parts = 1;
  expect(&s, QTR_ERR_ARGUMENT, "equal rows");
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_accepts), cmocka_unit_test(test_shapes),
                                     cmocka_unit_test(test_parts)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
