/* Importers on small matrices whose integers are known: tests/golden/import/vectors.safetensors, by make_import.py there. */
#include "base/half.h"
#include "checkpoint/checkpoint.h"
#include "quant/fake.h"
#include "quant/int4.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

struct fixture {
  struct qtr_checkpoint *golden;
  struct qtr_threads *team;
};

static int set_up(void **state) {
  static struct fixture f;
  assert_int_equal(qtr_checkpoint_open(QTR_SOURCE_DIR "/tests/golden/import/vectors.safetensors", &f.golden, NULL), QTR_OK);
  assert_int_equal(qtr_threads_create(3, &f.team, NULL), QTR_OK);
  *state = &f;
  return 0;
}

static int tear_down(void **state) {
  struct fixture *f = *state;
  qtr_checkpoint_close(f->golden);
  qtr_threads_free(f->team);
  return 0;
}

static const struct qtr_tensor *find(const struct fixture *f, const char *variant, const char *suffix) {
  char name[96];
  (void)snprintf(name, sizeof name, "%s%s", variant, suffix);
  return qtr_checkpoint_find(f->golden, name);
}

/* NULL when it is absent. */
static float *floats(const struct fixture *f, const char *variant, const char *suffix) {
  const struct qtr_tensor *t = find(f, variant, suffix);
  if (!t) return NULL;
  size_t n = t->n_bytes / qtr_dtype_bytes(t->dtype);
  float *x = malloc(n * sizeof *x);
  assert_non_null(x);
  assert_int_equal(qtr_tensor_to_floats(t, x, n, NULL), QTR_OK);
  return x;
}

/* The variant as the importer sees it. */
struct fake {
  struct qtr_fake_matrix m;
  float *w, *s0, *s1, *zero, *scaled;
};

static struct fake load(const struct fixture *f, const char *variant) {
  struct fake k = {.w = floats(f, variant, ".w"),
                   .s0 = floats(f, variant, ".scale.0"),
                   .s1 = floats(f, variant, ".scale.1"),
                   .zero = floats(f, variant, ".zero"),
                   .scaled = floats(f, variant, ".scaled_zero")};
  const struct qtr_tensor *w = find(f, variant, ".w");
  if (!w) fail_msg("no variant %s", variant);
  k.m = (struct qtr_fake_matrix){.n_out = w->shape[0],
                                 .n_in = w->shape[1],
                                 .w = k.w,
                                 .type = w->dtype,
                                 .s0 = k.s0,
                                 .s1 = k.s1,
                                 .zero = k.zero ? k.zero : k.scaled,
                                 .scaled = k.scaled != NULL};
  return k;
}

static void unload(struct fake *k) {
  free(k->w);
  free(k->s0);
  free(k->s1);
  free(k->zero);
  free(k->scaled);
}

static enum qtr_store store_of(const char *variant) {
  return strcmp(variant, "w8") == 0 ? QTR_STORE_W8 : strstr(variant, "g128") ? QTR_STORE_W4_G128 : QTR_STORE_W4;
}

static void compare(const struct fixture *f, const char *variant, const char *suffix, const void *data, size_t n_bytes) {
  const struct qtr_tensor *t = find(f, variant, suffix);
  if (!t || t->n_bytes != n_bytes) fail_msg("%s%s: other size", variant, suffix);
  const uint8_t *want = t->data, *got = data;
  for (size_t i = 0; i < n_bytes; i++) {
    if (want[i] != got[i]) fail_msg("%s%s: byte %zu is %d, not %d", variant, suffix, i, got[i], want[i]);
  }
}

static void test_fake(void **state) {
  const struct fixture *f = *state;
  static const char *const variants[] = {"lmquant-channel",
                                         "prescale-channel",
                                         "symmetric-channel",
                                         "postscale-channel",
                                         "postscale-channel-half",
                                         "postscale-channel-signed",
                                         "lmquant-g128",
                                         "prescale-g128",
                                         "postscale-g128",
                                         "symmetric-g128",
                                         "w8"};
  for (size_t i = 0; i < sizeof variants / sizeof *variants; i++) {
    const char *v = variants[i];
    struct fake k = load(f, v);
    struct qtr_int_matrix m;
    struct qtr_error err = {0};
    assert_int_equal(qtr_fake_is_w8(&k.m), strcmp(v, "w8") == 0);
    assert_int_equal(qtr_int_matrix_create(store_of(v), k.m.n_out, k.m.n_in, &m, NULL), QTR_OK);
    if (qtr_fake_codes(&k.m, f->team, &m, &err)) fail_msg("%s: %s", v, err.message);
    compare(f, v, ".codes", m.code, k.m.n_out * k.m.n_in);
    if (m.scale) compare(f, v, ".s1_scales", m.scale, k.m.n_out * sizeof *m.scale);
    if (m.dequant) assert_memory_equal(m.dequant, k.s0, k.m.n_out * sizeof *m.dequant);
    for (size_t r = 0; m.szero && r < k.m.n_out; r++) { /* by value: 0 and -0 are both 0 */
      float want, got = qtr_f16_to_f32(m.szero[r]);
      uint16_t half;
      memcpy(&half, (const uint8_t *)find(f, v, ".s1_szeros")->data + 2 * r, 2);
      want = qtr_f16_to_f32(half);
      if (want != got) fail_msg("%s: szero of row %zu is %g, not %g", v, r, (double)got, (double)want);
    }
    size_t groups = k.m.n_out * (k.m.n_in / 128);
    if (m.s2) compare(f, v, ".s2", m.s2, groups);
    if (m.z2) compare(f, v, ".z2", m.z2, groups);
    qtr_int_matrix_free(&m);
    unload(&k);
  }
}

static void refuse(const struct fixture *f, const char *variant, const struct fake *k, const char *word) {
  struct qtr_int_matrix m;
  struct qtr_error err = {0};
  assert_int_equal(qtr_int_matrix_create(store_of(variant), k->m.n_out, k->m.n_in, &m, NULL), QTR_OK);
  enum qtr_status status = qtr_fake_codes(&k->m, f->team, &m, &err);
  qtr_int_matrix_free(&m);
  if (status != QTR_ERR_FORMAT || !strstr(err.message, word)) {
    fail_msg("%s: %s \"%s\", not %s", variant, qtr_status_name(status), err.message, word);
  }
}

static void test_fake_faults(void **state) {
  const struct fixture *f = *state;
  const struct {
    const char *variant;
    int array; /* 0 w, 1 s0, 2 s1, 3 zero */
    size_t at;
    float value;
    const char *word;
  } cases[] = {{"lmquant-channel", 0, 64 * 6 + 3, NAN, "row 6, column 3"},
               {"lmquant-channel", 0, 64 * 6 + 3, INFINITY, "row 6, column 3"},
               {"lmquant-channel", 0, 64 * 6 + 3, 1e9f, "row 6, column 3"},
               {"lmquant-channel", 1, 6, 0, "row 6: weight.scale.0 is 0"},
               {"lmquant-channel", 1, 6, -1, "row 6"},
               {"lmquant-channel", 1, 6, NAN, "row 6"},
               {"lmquant-channel", 1, 6, 1.0001f, "which fp16 cannot hold"},
               {"lmquant-channel", 3, 6, 16, "beyond 4 bits"},
               {"lmquant-channel", 3, 6, 0.5f, "whole number"},
               {"lmquant-channel", 3, 6, NAN, "the zero is"},
               {"postscale-channel", 3, 6, INFINITY, "the zero is"},
               {"postscale-g128", 0, 256 * 6 + 200, 1e9f, "row 6, column 200"},
               {"postscale-g128", 2, 13, 0, "row 6, group 1: weight.scale.1 is 0"},
               {"postscale-g128", 2, 13, 2.5f, "row 6, group 1"},
               {"postscale-g128", 2, 13, 128, "row 6, group 1"},
               {"postscale-g128", 3, 13, 0.5f, "whole number"},
               {"w8", 0, 64 * 6 + 3, 1e9f, "row 6, column 3"},
               {"w8", 3, 6, 1, "8-bit weights have none"}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct fake k = load(f, cases[i].variant);
    float *const arrays[] = {k.w, k.s0, k.s1, k.zero ? k.zero : k.scaled};
    arrays[cases[i].array][cases[i].at] = cases[i].value;
    refuse(f, cases[i].variant, &k, cases[i].word);
    unload(&k);
  }
  /* half a step off the grid, on either level */
  struct fake k = load(f, "postscale-channel");
  k.w[64 * 9 + 1] += 0.45f * k.s0[9];
  refuse(f, "postscale-channel", &k, "row 9, column 1");
  unload(&k);
  k = load(f, "postscale-g128");
  assert_true(k.s1[2 * 9] > 1);
  k.w[256 * 9 + 1] += k.s0[9];
  refuse(f, "postscale-g128", &k, "grid of weight.scale.1");
  unload(&k);
}

/* ---- GPTQ and AWQ ---------------------------------------------------------------------------------- */

enum { OUT = 32, IN = 256, GROUPS = IN / 128 };

static struct qtr_int4_matrix load_int4(const struct fixture *f, const char *kind) {
  struct qtr_int4_matrix m;
  assert_int_equal(qtr_int4_create(OUT, IN, 128, &m, NULL), QTR_OK);
  const uint8_t *qweight = find(f, kind, ".qweight")->data, *qzeros = find(f, kind, ".qzeros")->data;
  if (kind[0] == 'g') {
    qtr_gptq_unpack(qweight, qzeros, 1, &m);
  } else {
    qtr_awq_unpack(qweight, qzeros, &m);
  }
  float *scales = floats(f, kind, ".scales"); /* (groups, out) */
  for (size_t n = 0; n < OUT; n++) {
    for (size_t g = 0; g < GROUPS; g++) m.scale[n * GROUPS + g] = scales[g * OUT + n];
  }
  free(scales);
  return m;
}

static void test_unpack(void **state) {
  const struct fixture *f = *state;
  for (int i = 0; i < 2; i++) {
    struct qtr_int4_matrix m = load_int4(f, i ? "awq" : "gptq");
    compare(f, "int4", ".codes", m.code, OUT * IN);
    compare(f, "int4", ".zero", m.zero, OUT * GROUPS);
    qtr_int4_free(&m);
  }
}

/* As near as the exhaustive search over every fp16 number found, and the error reported is the error made. */
static void test_search(void **state) {
  const struct fixture *f = *state;
  struct qtr_int4_matrix m = load_int4(f, "gptq");
  struct qtr_int_matrix out;
  struct qtr_rtn_error error = {0};
  struct qtr_int4_moved moved = {0};
  float *cost = floats(f, "int4", ".cost"), want[IN], got[IN];
  double squared = 0, norm = 0, max = 0;
  assert_int_equal(qtr_int_matrix_create(QTR_STORE_W4_G128, OUT, IN, &out, NULL), QTR_OK);
  assert_int_equal(qtr_int4_to_w4a8(&m, f->team, &out, &error, &moved, NULL), QTR_OK);
  for (size_t r = 0; r < OUT; r++) {
    double row = 0, energy = 0;
    qtr_int4_row(&m, r, want);
    qtr_int_matrix_row(&out, r, got);
    for (size_t i = 0; i < IN; i++) {
      double d = (double)got[i] - (double)want[i];
      row += d * d;
      energy += (double)want[i] * (double)want[i];
      max = fmax(max, fabs(d));
    }
    if (row > (double)cost[r] * 1.001 + 1e-12 * energy) fail_msg("row %zu: %g, but %g is possible", r, row, (double)cost[r]);
    squared += row;
    norm += energy;
  }
  assert_true(fabs(error.squared - squared) <= 1e-4 * squared);
  assert_true(fabs(error.norm - norm) <= 1e-6 * norm);
  assert_true(fabs(error.max - max) <= 1e-4 * max);
  assert_true(squared > 0 && moved.n_groups > OUT && moved.n_groups <= OUT * GROUPS);
  qtr_int_matrix_free(&out);
  free(cost);

  /* scales that are whole multiples of one number: nothing moves */
  struct qtr_int4_moved none = {0};
  error = (struct qtr_rtn_error){0};
  for (size_t i = 0; i < OUT * GROUPS; i++) m.scale[i] = (float)(1 + i % 7) * 0.0125732421875f; /* 0x1.9cp-7 */
  assert_int_equal(qtr_int_matrix_create(QTR_STORE_W4_G128, OUT, IN, &out, NULL), QTR_OK);
  assert_int_equal(qtr_int4_to_w4a8(&m, f->team, &out, &error, &none, NULL), QTR_OK);
  assert_int_equal(none.n_groups, 0);
  assert_true(error.squared == 0);
  compare(f, "int4", ".codes", out.code, OUT * IN);
  qtr_int_matrix_free(&out);
  for (int bad = 0; bad < 3; bad++) {
    struct qtr_error err = {0};
    m.scale[9 * GROUPS] = bad == 0 ? NAN : bad == 1 ? -1 : INFINITY;
    assert_int_equal(qtr_int_matrix_create(QTR_STORE_W4_G128, OUT, IN, &out, NULL), QTR_OK);
    assert_int_equal(qtr_int4_to_w4a8(&m, f->team, &out, &error, &none, &err), QTR_ERR_FORMAT);
    assert_non_null(strstr(err.message, "row 9"));
    qtr_int_matrix_free(&out);
  }
  qtr_int4_free(&m);
}

static void test_order(void **state) {
  (void)state;
  uint32_t g_idx[256], order[256];
  for (uint32_t i = 0; i < 256; i++) g_idx[i] = i % 2;
  assert_true(qtr_int4_order(g_idx, 256, 128, order));
  for (uint32_t j = 0; j < 256; j++) assert_int_equal(order[j], j < 128 ? 2 * j : 2 * (j - 128) + 1);
  g_idx[0] = 1; /* 127 and 129 */
  assert_false(qtr_int4_order(g_idx, 256, 128, order));
  g_idx[0] = 2;
  assert_false(qtr_int4_order(g_idx, 256, 128, order));
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_fake), cmocka_unit_test(test_fake_faults),
                                     cmocka_unit_test(test_unpack), cmocka_unit_test(test_search),
                                     cmocka_unit_test(test_order)};
  return cmocka_run_group_tests(tests, set_up, tear_down);
}
