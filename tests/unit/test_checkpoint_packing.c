/* int4 weight order and second-level scale order (spec A.3, A.4): the worked example and probes of the specification,
 * written out here, and its vectors where they are. */
#include "base/file.h"
#include "checkpoint/packing.h"
#include "shared.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* A.3.1: q[r][k] = (7r + 3k + ((rk) >> 3)) & 15 */
static void test_worked_example(void **state) {
  (void)state;
  static const uint8_t want[32] = {0x00, 0x53, 0xa6, 0xf9, 0x88, 0xec, 0x40, 0xa4, 0x00, 0x53, 0xa6,
                                   0xf9, 0x88, 0xec, 0x40, 0xa4, 0x4c, 0x9f, 0xe2, 0x35, 0x08, 0x6c,
                                   0xc0, 0x24, 0x4c, 0x9f, 0xe2, 0x35, 0x08, 0x6c, 0xc0, 0x24};
  uint8_t codes[64 * 64], packed[64 * 32];
  for (unsigned r = 0; r < 64; r++) {
    for (unsigned k = 0; k < 64; k++) codes[r * 64 + k] = (7 * r + 3 * k + ((r * k) >> 3)) & 15;
  }
  qtr_w4_pack(codes, 64, 64, packed);
  assert_memory_equal(packed, want, sizeof want);
}

static void test_one_hot_probes(void **state) {
  (void)state;
  static const struct {
    size_t row, col, byte;
    uint8_t value;
  } probes[] = {
      {0, 0, 0, 0x09},     {0, 1, 1, 0x09},     {0, 4, 16, 0x09},   {0, 16, 8, 0x09},
      {1, 0, 64, 0x09},    {8, 0, 4, 0x09},     {16, 0, 0, 0x90},   {24, 31, 63, 0x90},
      {31, 31, 511, 0x90}, {32, 0, 1024, 0x09}, {0, 32, 512, 0x09}, {33, 47, 1651, 0x09},
  };
  for (size_t i = 0; i < sizeof probes / sizeof *probes; i++) {
    uint8_t codes[64 * 64] = {0}, packed[64 * 32];
    codes[probes[i].row * 64 + probes[i].col] = 9;
    qtr_w4_pack(codes, 64, 64, packed);
    for (size_t b = 0; b < sizeof packed; b++) assert_int_equal(packed[b], b == probes[i].byte ? probes[i].value : 0);
    assert_int_equal(qtr_w4_get(packed, 64, probes[i].row, probes[i].col), 9);
  }
}

/* Pack, then the three ways to read back agree, for shapes that are not square. */
static void test_round_trip(void **state) {
  (void)state;
  static const size_t shapes[][2] = {{32, 32}, {32, 160}, {96, 32}, {64, 256}, {160, 96}};
  uint32_t random = 1;
  for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
    size_t n_out = shapes[s][0], n_in = shapes[s][1], n = n_out * n_in;
    uint8_t *codes = malloc(n), *packed = malloc(n / 2), *back = malloc(n), *rows = malloc(32 * n_in);
    assert_true(codes && packed && back && rows);
    for (size_t i = 0; i < n; i++) {
      random = random * 1664525u + 1013904223u;
      codes[i] = (uint8_t)(random >> 28);
    }
    qtr_w4_pack(codes, n_out, n_in, packed);
    qtr_w4_unpack(packed, n_out, n_in, back);
    assert_memory_equal(codes, back, n);
    qtr_w4_unpack_rows32(packed, n_in, n_out - 32, rows);
    assert_memory_equal(codes + (n_out - 32) * n_in, rows, 32 * n_in);
    for (size_t i = 0; i < n; i++) assert_int_equal(qtr_w4_get(packed, n_in, i / n_in, i % n_in), codes[i]);
    free(codes);
    free(packed);
    free(back);
    free(rows);
  }
}

/* A.4.2: memory holds channels 0, 8, 16, 24, 1, 9, 17, 25, … */
static void test_s2_order(void **state) {
  (void)state;
  static const uint8_t first[12] = {0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26};
  size_t channel[64];
  for (size_t r = 0; r < 64; r++) channel[qtr_s2_position(r)] = r;
  for (size_t i = 0; i < 12; i++) {
    assert_int_equal(channel[i], first[i]);
    assert_int_equal(channel[32 + i], 32 + first[i]);
  }
  assert_int_equal(channel[31], 31);
}

static const uint8_t *vector(const char *name, size_t n_bytes, struct qtr_map *map) {
  char path[256];
  (void)snprintf(path, sizeof path, "spec/vectors/%s", name);
  const char *found = qtr_test_shared(path);
  if (!found) skip();
  assert_int_equal(qtr_map_open(found, map, NULL), QTR_OK);
  assert_int_equal(map->n_bytes, n_bytes);
  return map->data;
}

static void test_vectors(void **state) {
  (void)state;
  struct qtr_map map[8];
  uint8_t packed[64 * 128];
  const uint8_t *q = vector("w4pack_64x64.q.u8", 4096, &map[0]), *want = vector("w4pack_64x64.qweight.u8", 2048, &map[1]);
  qtr_w4_pack(q, 64, 64, packed);
  assert_memory_equal(packed, want, 2048);

  q = vector("g128_64x256.q.u8", 64 * 256, &map[2]);
  want = vector("g128_64x256.qweight.u8", 64 * 128, &map[3]);
  qtr_w4_pack(q, 64, 256, packed);
  assert_memory_equal(packed, want, 64 * 128);

  /* scales as on disk give the expected int8 weights */
  const uint8_t *s2 = vector("g128_64x256.s2_scales.i8", 128, &map[4]),
                *z2 = vector("g128_64x256.s2_zeros.i8", 128, &map[5]);
  const uint8_t *natural = vector("g128_64x256.s2_scales_natural.u8", 128, &map[6]);
  const uint8_t *w8 = vector("g128_64x256.w8.i8", 64 * 256, &map[7]);
  for (size_t r = 0; r < 64; r++) {
    for (size_t k = 0; k < 256; k++) {
      size_t at = k / 128 * 64 + qtr_s2_position(r);
      assert_int_equal(s2[at], natural[r * 2 + k / 128]);
      assert_int_equal((uint8_t)(qtr_w4_get(want, 256, r, k) * s2[at] + z2[at]), w8[r * 256 + k]);
    }
  }
  for (size_t i = 0; i < 8; i++) qtr_map_close(&map[i]);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_worked_example), cmocka_unit_test(test_one_hot_probes), cmocka_unit_test(test_round_trip),
      cmocka_unit_test(test_s2_order),       cmocka_unit_test(test_vectors),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
