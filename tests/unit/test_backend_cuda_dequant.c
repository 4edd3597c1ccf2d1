/* test_backend_cuda_dequant.c - the arithmetic that turns packed codes into int8 weights on the GPU, proven on the host over
 * every scale, zero point and code (src/backend/cuda/gemm_dequant.h; spec B.2, B.3). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "backend/cuda/gemm_dequant.h"

/* B.3 as it is written: (int8)(q * s2 + z), modulo 256. */
static uint32_t weight_byte(uint32_t q, uint32_t s2, uint32_t z) { return (q * s2 + z) & 255u; }

/* Four lanes do not touch one another: a carry or borrow out of a lane depends only on that lane's value, so each lane is
 * tried with every code that is in range while the three others hold the smallest, the largest, or the same code. */
static void test_group(void **state) {
  (void)state;
  long long n_checked = 0, n_out = 0;
  for (uint32_t s2 = 0; s2 < 256; s2++) {
    for (uint32_t z = 0; z < 256; z++) {
      uint32_t offset = qtr_dequant_offset(qtr_dequant_zs(z)), low = 16, high = 16;
      for (uint32_t q = 0; q < 16; q++) {
        int plain = (int)(q * s2) - (int)((256 - z) % 256);
        int wrapped = (int)weight_byte(q, s2, z);
        if (wrapped > 127) wrapped -= 256;
        int in_range = plain >= -128 && plain <= 127;
        assert_int_equal(in_range, plain == wrapped); /* B.3 wraps exactly when the plain value leaves int8 */
        assert_int_equal(in_range, qtr_dequant_in_range(q, s2, z) != 0);
        if (in_range && low == 16) low = q;
        if (in_range) high = q;
        n_out += !in_range;
      }
      for (uint32_t q = low; q < 16 && q <= high; q++) {
        const uint32_t others[3] = {low, high, q};
        for (uint32_t lane = 0; lane < 4; lane++) {
          for (uint32_t other = 0; other < 3; other++) {
            uint32_t codes = 0, want = 0;
            for (uint32_t i = 0; i < 4; i++) {
              uint32_t code = i == lane ? q : others[other];
              codes |= code << (8 * i);
              want |= weight_byte(code, s2, z) << (8 * i);
            }
            assert_int_equal(qtr_dequant_group(codes, s2, offset), want);
            n_checked++;
          }
        }
      }
    }
  }
  assert_true(n_checked > 1000000 && n_out > 0);
}

/* Every combination of four codes, for scales and zero points at the edges of the range. */
static void test_combinations(void **state) {
  (void)state;
  const uint32_t pairs[][2] = {{1, 0}, {1, 128}, {17, 128}, {16, 128}, {8, 200}, {9, 128}, {15, 136}, {0, 255}, {0, 128}};
  for (size_t p = 0; p < sizeof pairs / sizeof pairs[0]; p++) {
    uint32_t s2 = pairs[p][0], z = pairs[p][1], offset = qtr_dequant_offset(qtr_dequant_zs(z));
    for (uint32_t all = 0; all < 65536; all++) {
      uint32_t codes = 0, want = 0;
      int good = 1;
      for (uint32_t i = 0; i < 4; i++) {
        uint32_t q = all >> (4 * i) & 15u;
        good = good && qtr_dequant_in_range(q, s2, z);
        codes |= q << (8 * i);
        want |= weight_byte(q, s2, z) << (8 * i);
      }
      if (good) assert_int_equal(qtr_dequant_group(codes, s2, offset), want);
    }
  }
}

static void test_nibbles(void **state) {
  (void)state;
  for (uint32_t byte = 0; byte < 256; byte++) {
    for (uint32_t lane = 0; lane < 4; lane++) {
      uint32_t word = (0xa5c3965au & ~(255u << (8 * lane))) | byte << (8 * lane);
      assert_int_equal(qtr_dequant_low(word) >> (8 * lane) & 255u, byte & 15u);
      assert_int_equal(qtr_dequant_high(word) >> (8 * lane) & 255u, byte >> 4);
    }
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_group), cmocka_unit_test(test_combinations),
                                     cmocka_unit_test(test_nibbles)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
