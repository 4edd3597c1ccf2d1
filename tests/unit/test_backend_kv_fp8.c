/* Rounding to fp8: against the values that the bit patterns of both types stand for. */
#include "backend/common/kv_fp8.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>

#include <cmocka.h>

/* The value of a pattern of 1 sign bit, the rest exponent and `digits` of mantissa. */
static float decode(unsigned bits, int digits, int bias) {
  int exponent = (int)(bits & 0x7f) >> digits, mantissa = (int)bits & ((1 << digits) - 1);
  float x =
      exponent ? ldexpf(1 + ldexpf((float)mantissa, -digits), exponent - bias) : ldexpf((float)mantissa, 1 - bias - digits);
  return bits & 0x80 ? -x : x;
}

static void check(enum qtr_kv_fp8 fp8, int digits, int bias, unsigned last) {
  for (unsigned bits = 0; bits <= last; bits++) {
    float x = decode(bits, digits, bias);
    for (int sign = -1; sign <= 1; sign += 2) assert_true(qtr_fp8_round((float)sign * x, fp8) == (float)sign * x);
    if (bits == last) break;
    float next = decode(bits + 1, digits, bias), middle = (x + next) / 2;
    assert_true(next > x);
    /* the tie goes to the even pattern, a hair beside it to the nearer value */
    assert_true(qtr_fp8_round(middle, fp8) == (bits % 2 ? next : x));
    assert_true(qtr_fp8_round(nextafterf(middle, 0), fp8) == x);
    assert_true(qtr_fp8_round(nextafterf(middle, INFINITY), fp8) == next);
    assert_true(qtr_fp8_round(-middle, fp8) == -(bits % 2 ? next : x));
  }
  float most = decode(last, digits, bias);
  assert_true(qtr_fp8_round(most * 1.2f, fp8) == most);
  assert_true(qtr_fp8_round(-65504, fp8) == -most);
}

static void test_values(void **state) {
  (void)state;
  check(QTR_KV_FP8_E4M3, 3, 7, 0x7e);
  check(QTR_KV_FP8_E5M2, 2, 15, 0x7b);
  assert_true(decode(0x7e, 3, 7) == 448 && decode(0x7b, 2, 15) == 57344);
}

static void test_rows(void **state) {
  (void)state;
  const float x[4] = {1.06f, -900, 3e-5f, 100}, want[4] = {1.0625f, -875, 0, 100};
  float out[4];
  qtr_kv_fp8_row(x, 4, QTR_KV_FP8_E4M3, 1.953125f, out); /* 448 * 1.953125 = 875 */
  assert_true(out[1] == want[1] && out[2] == want[2]);
  qtr_kv_fp8_row(x, 4, QTR_KV_FP8_E4M3, 1, out);
  assert_true(out[0] == 1 && out[3] == 96); /* steps of 1/8 and 8: 100 lies between 96 and 104, and 96 is even */
  struct qtr_kv_config c = {.format = QTR_KV_INT8, .n_layers = 2, .fp8 = QTR_KV_FP8_E4M3};
  float *scale;
  struct qtr_error err;
  assert_int_equal(qtr_kv_fp8_scales(&c, &scale, &err), QTR_ERR_ARGUMENT);
  assert_null(scale);
  c.format = QTR_KV_F16;
  assert_int_equal(qtr_kv_fp8_scales(&c, &scale, &err), QTR_OK);
  for (int i = 0; i < 4; i++) assert_true(scale[i] == 1);
  free(scale);
  c.static_scale = (const float[]){1, 2, 0, 3};
  assert_int_equal(qtr_kv_fp8_scales(&c, &scale, &err), QTR_ERR_ARGUMENT);
  c.fp8 = QTR_KV_FP8_OFF;
  assert_int_equal(qtr_kv_fp8_scales(&c, &scale, &err), QTR_OK);
  assert_null(scale);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_values), cmocka_unit_test(test_rows)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
