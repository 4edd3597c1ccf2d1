/* The checkpoint writer: codes handed in give the file that rounding the floats gives, and what is out of turn, out of range
 * or left out is refused by name and leaves no file. */
#include "base/file.h"
#include "base/half.h"
#include "quant/sink.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { OUT = 96, IN = 256, GROUPS = IN / 128 };

struct fixture {
  char *root, *source, *path[2]; /* outputs */
  struct qtr_threads *team;
  float w[OUT * IN];
  uint8_t code[OUT * IN], s2[OUT * GROUPS], z2[OUT * GROUPS];
  uint16_t scale[OUT], szero[OUT];
  float dequant[OUT];
};

static int set_up(void **state) {
  struct fixture *f = calloc(1, sizeof *f);
  if (!f || !(f->root = strdup("qtr-sink-XXXXXX")) || !mkdtemp(f->root)) return -1;
  f->source = qtr_path_join(f->root, "");
  f->path[0] = qtr_path_join(f->root, "a");
  f->path[1] = qtr_path_join(f->root, "b");
  char *config = qtr_path_join(f->root, "config.json");
  assert_int_equal(qtr_file_write(config, "{}", 2, NULL), QTR_OK);
  free(config);
  uint32_t random = 5;
  for (size_t i = 0; i < OUT * IN; i++) {
    random = random * 1664525u + 1013904223u;
    f->w[i] = (float)(random >> 8) * 0x1p-24f - 0.5f;
  }
  assert_int_equal(qtr_threads_create(2, &f->team, NULL), QTR_OK);
  *state = f;
  return 0;
}

static int tear_down(void **state) {
  struct fixture *f = *state;
  char command[256];
  (void)snprintf(command, sizeof command, "rm -r '%s'", f->root);
  int rc = system(command);
  qtr_threads_free(f->team);
  free(f->root);
  free(f->source);
  free(f->path[0]);
  free(f->path[1]);
  free(f);
  return rc;
}

static struct qtr_sink *open_sink(const struct fixture *f, enum qtr_store store, int output) {
  struct qtr_sink *sink;
  const struct qtr_sink_item norm = {QTR_STORE_F16, "norm", ".weight", QTR_DTYPE_F16, 1, 1, IN};
  const struct qtr_sink_item matrix = {store, "m", ".weight", QTR_DTYPE_F16, 2, OUT, IN};
  const struct qtr_sink_item raw = {QTR_STORE_RAW, "kv", "", QTR_DTYPE_F32, 1, 1, 2};
  const struct qtr_sink_target target = {
      .source_dir = f->source, .output_dir = f->path[output], .description = {.precision = "w4a8", .method = "test"}};
  assert_int_equal(qtr_sink_create(f->team, &sink, NULL), QTR_OK);
  assert_int_equal(qtr_sink_add(sink, &norm, NULL), QTR_OK);
  assert_int_equal(qtr_sink_add(sink, &matrix, NULL), QTR_OK);
  assert_int_equal(qtr_sink_add(sink, &raw, NULL), QTR_OK);
  assert_int_equal(qtr_sink_open(sink, &target, NULL), QTR_OK);
  assert_int_equal(qtr_sink_write_floats(sink, "norm", f->w, 1, NULL, NULL), QTR_OK);
  return sink;
}

static struct qtr_sink_codes round_codes(struct fixture *f, enum qtr_store store) {
  struct qtr_rtn_error error = {0};
  struct qtr_sink_codes c = {.code = f->code};
  if (store == QTR_STORE_W8) {
    assert_int_equal(qtr_rtn_w8(f->w, OUT, IN, (int8_t *)f->code, f->dequant, &error), QTR_RTN_OK);
    c.dequant = f->dequant;
    return c;
  }
  c.scale = f->scale;
  if (store == QTR_STORE_W4) {
    assert_int_equal(qtr_rtn_w4(f->w, OUT, IN, f->code, f->scale, f->szero, &error), QTR_RTN_OK);
    c.szero = f->szero;
  } else {
    assert_int_equal(qtr_rtn_w4_g128(f->w, OUT, IN, f->code, f->scale, f->s2, f->z2, &error), QTR_RTN_OK);
    c.s2 = f->s2;
    c.z2 = f->z2;
  }
  return c;
}

static struct qtr_sink_codes rows_from(struct qtr_sink_codes c, size_t row) {
  c.code += row * IN;
  if (c.scale) c.scale += row;
  if (c.dequant) c.dequant += row;
  if (c.szero) c.szero += row;
  if (c.s2) c.s2 += row * GROUPS;
  if (c.z2) c.z2 += row * GROUPS;
  return c;
}

static void test_codes_as_floats(void **state) {
  struct fixture *f = *state;
  static const enum qtr_store stores[] = {QTR_STORE_W8, QTR_STORE_W4, QTR_STORE_W4_G128};
  const float kv[2] = {0.5f, 2};
  for (size_t i = 0; i < 3; i++) {
    struct qtr_sink *a = open_sink(f, stores[i], 0), *b = open_sink(f, stores[i], 1);
    struct qtr_sink_codes codes = round_codes(f, stores[i]), rest = rows_from(codes, 64);
    assert_int_equal(qtr_sink_write_floats(a, "m", f->w, OUT, NULL, NULL), QTR_OK);
    assert_int_equal(qtr_sink_write_codes(b, "m", &codes, 64, NULL), QTR_OK);
    assert_int_equal(qtr_sink_write_codes(b, "m", &rest, OUT - 64, NULL), QTR_OK);
    char *file[2], *data[2];
    size_t n[2];
    for (int k = 0; k < 2; k++) {
      struct qtr_sink *sink = k ? b : a;
      assert_int_equal(qtr_sink_write_raw(sink, "kv", kv, sizeof kv, NULL), QTR_OK);
      assert_int_equal(qtr_sink_finish(sink, NULL), QTR_OK);
      qtr_sink_free(sink);
      file[k] = qtr_path_join(f->path[k], "model.safetensors");
      assert_int_equal(qtr_file_read(file[k], 1 << 20, &data[k], &n[k], NULL), QTR_OK);
      assert_int_equal(remove(file[k]), 0);
      free(file[k]);
    }
    assert_int_equal(n[0], n[1]);
    assert_memory_equal(data[0], data[1], n[0]);
    free(data[0]);
    free(data[1]);
  }
}

static void refused(enum qtr_status got, enum qtr_status want, const struct qtr_error *err, const char *says) {
  if (got != want || !strstr(err->message, says)) fail_msg("%s: %s, not %s", qtr_status_name(got), err->message, says);
}

static void test_refusals(void **state) {
  struct fixture *f = *state;
  struct qtr_error err = {0};
  struct qtr_sink *s = open_sink(f, QTR_STORE_W4_G128, 0);
  struct qtr_sink_codes c = round_codes(f, QTR_STORE_W4_G128), wrong = c;
  refused(qtr_sink_write_codes(s, "n", &c, OUT, &err), QTR_ERR_STATE, &err, "m was to come");
  refused(qtr_sink_write_raw(s, "m", f->w, 4, &err), QTR_ERR_STATE, &err, "m was to come");
  refused(qtr_sink_write_codes(s, "m", &c, 33, &err), QTR_ERR_STATE, &err, "no multiple of 32");
  refused(qtr_sink_write_codes(s, "m", &c, OUT + 32, &err), QTR_ERR_STATE, &err, "too many");
  wrong.szero = f->szero;
  refused(qtr_sink_write_codes(s, "m", &wrong, OUT, &err), QTR_ERR_STATE, &err, "not those of its format");
  f->code[3 * IN + 5] = 16;
  refused(qtr_sink_write_codes(s, "m", &c, OUT, &err), QTR_ERR_FORMAT, &err, "row 3, column 5: code 16 is beyond 15");
  f->code[3 * IN + 5] = 15;
  f->s2[3 * GROUPS] = 18; /* 270 */
  refused(qtr_sink_write_codes(s, "m", &c, OUT, &err), QTR_ERR_FORMAT, &err, "leaves a byte");
  f->s2[3 * GROUPS] = 17;
  f->z2[3 * GROUPS] = 127; /* 255 - 127 = 128 */
  refused(qtr_sink_write_codes(s, "m", &c, OUT, &err), QTR_ERR_FORMAT, &err, "leaves a byte");
  f->z2[3 * GROUPS] = 128;
  memset(f->code + 3 * IN, 15, 128);
  f->scale[95] = 0x7c00;
  refused(qtr_sink_write_codes(s, "m", &c, OUT, &err), QTR_ERR_FORMAT, &err, "row 95 is not finite");
  f->scale[95] = 0x3c00;
  assert_int_equal(qtr_sink_write_codes(s, "m", &c, OUT, &err), QTR_OK);
  refused(qtr_sink_finish(s, &err), QTR_ERR_STATE, &err, "tensor kv never came");
  qtr_sink_free(s);
  assert_false(qtr_dir_exists(f->path[0])); /* nothing half-written */

  assert_int_equal(qtr_sink_create(f->team, &s, NULL), QTR_OK);
  const struct qtr_sink_item odd = {QTR_STORE_W4_G128, "odd", "", QTR_DTYPE_I8, 2, 64, 160};
  refused(qtr_sink_add(s, &odd, &err), QTR_ERR_UNSUPPORTED, &err, "Choose group size -1");
  const struct qtr_sink_item huge = {QTR_STORE_RAW, "huge", "", QTR_DTYPE_F32, 2, SIZE_MAX / 4, 8};
  refused(qtr_sink_add(s, &huge, &err), QTR_ERR_LIMIT, &err, "too large");
  qtr_sink_free(s);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test_setup_teardown(test_codes_as_floats, set_up, tear_down),
                                     cmocka_unit_test_setup_teardown(test_refusals, set_up, tear_down)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
