/* Round to nearest (spec F.6): the invariants of the formats for all ranges, and errors within half a step. */
#include "quant/rtn.h"

#include "base/half.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static uint32_t random_state = 1;
static float uniform(float low, float high) {
  random_state = random_state * 1664525u + 1013904223u;
  return low + (high - low) * ((float)(random_state >> 8) * 0x1p-24f);
}

/* Every range of a group in steps of a quarter, next to a group that makes s1 exactly 1: what P = 120 promises. */
static void test_protective_range(void **state) {
  (void)state;
  float w[256];
  uint8_t codes[256], s2[2], z2[2];
  uint16_t s1;
  for (int i = 0; i < 128; i++) w[i] = 0;
  w[0] = 120;
  for (int low = -480; low <= 0; low++) {
    for (int high = 0; high <= 480; high++) {
      float a = (float)low / 4, b = (float)high / 4;
      for (int i = 0; i < 128; i++) w[128 + i] = a + (b - a) * (float)i / 127;
      w[128 + 127] = b;
      struct qtr_rtn_error e = {0};
      assert_int_equal(qtr_rtn_w4_g128(w, 1, 256, codes, &s1, s2, z2, &e), QTR_RTN_OK);
      assert_int_equal(s1, 0x3c00);
      assert_in_range(s2[1], 1, 16);
      assert_in_range(z2[1], 0, 120);
      for (int i = 128; i < 256; i += i < 254 ? 9 : 1) {
        int w8 = codes[i] * s2[1] - z2[1];
        if (codes[i] > 15 || codes[i] * s2[1] > 255 || w8 < -127 || w8 > 127) {
          fail_msg("[%g, %g]: code %d, s2 %d, z2 %d", (double)a, (double)b, codes[i], s2[1], z2[1]);
        }
        /* half a step of the code, half a unit of the zero, and what clamping at 15 loses when s2 was rounded down */
        if (fabsf((float)w8 - w[i]) > (float)s2[1] / 2 + 0.5f + 7.5f)
          fail_msg("[%g, %g]: %g became %d", (double)a, (double)b, (double)w[i], w8);
      }
    }
  }
}

static void test_per_channel_bounds(void **state) {
  (void)state;
  enum { N = 160 };
  float w[N];
  uint8_t codes[N];
  uint16_t s, z;
  for (int round = 0; round < 3000; round++) {
    float size = exp2f(uniform(-14, 12)), low = uniform(-1, 0.5f) * size, high = low + uniform(0, 2) * size;
    for (int i = 0; i < N; i++) w[i] = uniform(low, high);
    struct qtr_rtn_error e = {0};
    assert_int_equal(qtr_rtn_w4(w, 1, N, codes, &s, &z, &e), QTR_RTN_OK);
    float scale = qtr_f16_to_f32(s), zero = qtr_f16_to_f32(z), worst = 0;
    assert_true(zero >= 0 && scale > 0);
    double squared = 0;
    for (int i = 0; i < N; i++) {
      assert_in_range(codes[i], 0, 15);
      float d = fabsf((float)codes[i] * scale - zero - w[i]);
      worst = fmaxf(worst, d);
      squared += (double)d * (double)d;
    }
    /* half a step; rounding scale and zero to 11 bits shifts the ends by at most 2^-11 of 15 steps and of the zero */
    if (worst > scale * (0.5f + 15 * 0x1p-11f) + zero * 0x1p-11f + 0x1p-24f)
      fail_msg("error %g at scale %g", (double)worst, (double)scale);
    assert_true(fabs(e.max - (double)worst) <= 1e-6 * (double)worst);
    assert_true(fabs(e.squared - squared) <= 1e-4 * squared);
  }
}

static void test_w8_bounds(void **state) {
  (void)state;
  enum { N = 200 };
  float w[N], scale;
  int8_t codes[N];
  for (int round = 0; round < 1000; round++) {
    float size = exp2f(uniform(-6, 15));
    for (int i = 0; i < N; i++) w[i] = uniform(-size, size);
    struct qtr_rtn_error e = {0};
    assert_int_equal(qtr_rtn_w8(w, 1, N, codes, &scale, &e), QTR_RTN_OK);
    assert_true(scale == qtr_f16_round(scale));
    for (int i = 0; i < N; i++) {
      assert_true(codes[i] >= -127);
      assert_true(fabsf((float)codes[i] * scale - w[i]) <= scale * (0.5f + 127 * 0x1p-11f));
    }
  }
}

/* Values that the format holds exactly come back exactly. */
static void test_exact_values(void **state) {
  (void)state;
  float w[128], scale;
  uint8_t codes[128], s2, z2;
  int8_t codes8[128];
  uint16_t s, z;
  struct qtr_rtn_error e = {0};
  for (int i = 0; i < 128; i++) w[i] = 0.25f * (float)(i % 16) - 1.5f;
  assert_int_equal(qtr_rtn_w4(w, 1, 128, codes, &s, &z, &e), QTR_RTN_OK);
  for (int i = 0; i < 128; i++) assert_int_equal(codes[i], i % 16);
  assert_true(e.squared == 0 && e.max == 0 && e.norm > 0);
  for (int i = 0; i < 128; i++) w[i] = 0.5f * (float)(16 * (i % 16) - 120); /* s1 0.5, s2 16, z2 120 */
  assert_int_equal(qtr_rtn_w4_g128(w, 1, 128, codes, &s, &s2, &z2, &e), QTR_RTN_OK);
  assert_int_equal(s, 0x3800);
  assert_int_equal(s2, 16);
  assert_int_equal(z2, 120);
  for (int i = 0; i < 128; i++) assert_int_equal(codes[i], i % 16);
  for (int i = 0; i < 128; i++) w[i] = 0.125f * (float)(i * 2 - 127);
  assert_int_equal(qtr_rtn_w8(w, 1, 128, codes8, &scale, &e), QTR_RTN_OK);
  for (int i = 0; i < 128; i++) assert_int_equal(codes8[i], i * 2 - 127);
  assert_true(e.squared == 0);
}

static void test_ties_go_to_even(void **state) {
  (void)state;
  float w[32] = {15, 0.5f, 1.5f, 2.5f, 13.5f, 14.5f}, scale;
  uint8_t codes[32];
  int8_t codes8[8];
  uint16_t s, z;
  struct qtr_rtn_error e = {0};
  assert_int_equal(qtr_rtn_w4(w, 1, 32, codes, &s, &z, &e), QTR_RTN_OK);
  assert_int_equal(codes[1], 0);
  assert_int_equal(codes[2], 2);
  assert_int_equal(codes[3], 2);
  assert_int_equal(codes[4], 14);
  assert_int_equal(codes[5], 14);
  float v[8] = {127, 0.5f, -0.5f, 1.5f, -1.5f, -126.5f, -125.5f, 0};
  assert_int_equal(qtr_rtn_w8(v, 1, 8, codes8, &scale, &e), QTR_RTN_OK);
  static const int8_t want[8] = {127, 0, 0, 2, -2, -126, -126, 0};
  assert_memory_equal(codes8, want, 8);
}

/* A row of zeros, rows below the smallest half, rows of one sign. */
static void test_degenerate_rows(void **state) {
  (void)state;
  float w[128] = {0}, scale;
  uint8_t codes[128], s2, z2;
  int8_t codes8[128];
  uint16_t s, z;
  struct qtr_rtn_error e = {0};
  assert_int_equal(qtr_rtn_w4(w, 1, 128, codes, &s, &z, &e), QTR_RTN_OK);
  assert_int_equal(s, 0x3c00);
  assert_int_equal(qtr_rtn_w4_g128(w, 1, 128, codes, &s, &s2, &z2, &e), QTR_RTN_OK);
  assert_int_equal(s, 0x3c00);
  assert_int_equal(s2, 1);
  assert_int_equal(z2, 0);
  assert_int_equal(qtr_rtn_w8(w, 1, 128, codes8, &scale, &e), QTR_RTN_OK);
  assert_true(scale == 1);
  assert_true(e.squared == 0 && e.norm == 0);
  for (int i = 0; i < 128; i++) w[i] = 1e-9f;
  assert_int_equal(qtr_rtn_w4_g128(w, 1, 128, codes, &s, &s2, &z2, &e), QTR_RTN_OK);
  assert_int_equal(codes[5] * s2 - z2, 0);
  for (int i = 0; i < 128; i++) w[i] = 3 + 0.01f * (float)i; /* the range begins at 0: szero 0, not -3 */
  assert_int_equal(qtr_rtn_w4(w, 1, 128, codes, &s, &z, &e), QTR_RTN_OK);
  assert_int_equal(z & 0x7fff, 0);
  for (int i = 0; i < 128; i++) w[i] = -w[i];
  assert_int_equal(qtr_rtn_w4_g128(w, 1, 128, codes, &s, &s2, &z2, &e), QTR_RTN_OK);
  assert_int_equal(z2, 120);
}

static void test_refusals(void **state) {
  (void)state;
  static const float poison[] = {NAN, INFINITY, -INFINITY};
  float w[128] = {1}, scale[1];
  uint8_t codes[128], s2, z2;
  int8_t codes8[128];
  uint16_t s, z, half[128];
  struct qtr_rtn_error e = {0};
  for (size_t i = 0; i < 3; i++) {
    w[77] = poison[i];
    assert_int_equal(qtr_rtn_w4(w, 1, 128, codes, &s, &z, &e), QTR_RTN_NOT_FINITE);
    assert_int_equal(qtr_rtn_w4_g128(w, 1, 128, codes, &s, &s2, &z2, &e), QTR_RTN_NOT_FINITE);
    assert_int_equal(qtr_rtn_w8(w, 1, 128, codes8, scale, &e), QTR_RTN_NOT_FINITE);
    assert_int_equal(qtr_rtn_f16(w, 128, half, &e), QTR_RTN_NOT_FINITE);
  }
  w[77] = 3e38f;
  w[78] = -3e38f;
  assert_int_equal(qtr_rtn_w4(w, 1, 128, codes, &s, &z, &e), QTR_RTN_RANGE);
  assert_int_equal(qtr_rtn_w4_g128(w, 1, 128, codes, &s, &s2, &z2, &e), QTR_RTN_RANGE);
  assert_int_equal(qtr_rtn_w8(w, 1, 128, codes8, scale, &e), QTR_RTN_RANGE);
  w[77] = 1;
  w[78] = -65520.0f; /* the zero alone is too large */
  assert_int_equal(qtr_rtn_w4(w, 1, 128, codes, &s, &z, &e), QTR_RTN_RANGE);
  assert_int_equal(qtr_rtn_f16(w, 128, half, &e), QTR_RTN_RANGE);
  w[78] = -65519.0f;
  assert_int_equal(qtr_rtn_w4(w, 1, 128, codes, &s, &z, &e), QTR_RTN_OK);
  assert_int_equal(qtr_rtn_f16(w, 128, half, &e), QTR_RTN_OK);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_protective_range), cmocka_unit_test(test_per_channel_bounds),
      cmocka_unit_test(test_w8_bounds),        cmocka_unit_test(test_exact_values),
      cmocka_unit_test(test_ties_go_to_even),  cmocka_unit_test(test_degenerate_rows),
      cmocka_unit_test(test_refusals),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
