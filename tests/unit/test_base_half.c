/* Half and bfloat16 conversions against exhaustive properties and values computed by hand. */
#include "base/half.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

static void test_f16_round_trip(void **state) {
  (void)state;
  for (uint32_t h = 0; h < 0x10000; h++) {
    float x = qtr_f16_to_f32((uint16_t)h);
    if (isnan(x)) {
      assert_true(isnan(qtr_f16_to_f32(qtr_f16_from_f32(x))));
    } else {
      assert_int_equal(qtr_f16_from_f32(x), h);
    }
  }
}

/* Between two neighbours: below the middle goes down, above goes up, the middle goes to the even one. */
static void test_f16_rounds_to_nearest_even(void **state) {
  (void)state;
  for (uint16_t h = 0; h < 0x7bff; h++) {
    double a = (double)qtr_f16_to_f32(h), b = (double)qtr_f16_to_f32((uint16_t)(h + 1));
    float middle = (float)((a + b) / 2); /* exact: one bit more than half has */
    assert_int_equal(qtr_f16_from_f32(middle), h & 1 ? h + 1 : h);
    assert_int_equal(qtr_f16_from_f32(nextafterf(middle, -1.0f)), h);
    assert_int_equal(qtr_f16_from_f32(nextafterf(middle, INFINITY)), h + 1);
    assert_int_equal(qtr_f16_from_f32(-middle), (h & 1 ? h + 1 : h) | 0x8000);
  }
  assert_int_equal(qtr_f16_from_f32(65519.0f), 0x7bff);
  assert_int_equal(qtr_f16_from_f32(65520.0f), 0x7c00);
  assert_int_equal(qtr_f16_from_f32(1e30f), 0x7c00);
}

static void test_bf16(void **state) {
  (void)state;
  assert_int_equal(qtr_bf16_from_f32(1.0f), 0x3f80);
  assert_int_equal(qtr_bf16_from_f32(1.00390625f), 0x3f80); /* the middle, even below */
  assert_int_equal(qtr_bf16_from_f32(1.01171875f), 0x3f82); /* the middle, even above */
  assert_true(isnan(qtr_bf16_to_f32(qtr_bf16_from_f32(NAN))));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_f16_round_trip),
      cmocka_unit_test(test_f16_rounds_to_nearest_even),
      cmocka_unit_test(test_bf16),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
