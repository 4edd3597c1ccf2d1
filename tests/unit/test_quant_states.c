/* Hidden states in files: what is written comes back, files that are too short are named, those of layers and models do not
 * meet. */
#include "quant/states.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

#include "quant_fixture.h"

static void test_states(void **state) {
  (void)state;
  char *root = fixture_make_root();
  assert_non_null(root);
  struct qtr_error err;
  struct qtr_states s;
  float x[3][10], y[10];
  uint64_t random = 1;
  assert_int_equal(qtr_states_open(root, "s.f32", 10, true, &s, &err), QTR_OK);
  for (size_t i = 0; i < 3; i++) {
    for (size_t k = 0; k < 10; k++) x[i][k] = fixture_uniform(&random);
    assert_int_equal(qtr_states_write(&s, i, x[i], &err), QTR_OK);
  }
  qtr_states_close(&s, false);
  assert_int_equal(qtr_states_open(root, "s.f32", 10, false, &s, &err), QTR_OK);
  for (size_t i = 3; i-- > 0;) {
    assert_int_equal(qtr_states_read(&s, i, y, &err), QTR_OK);
    assert_memory_equal(x[i], y, sizeof y);
  }
  assert_int_equal(qtr_states_read(&s, 3, y, &err), QTR_ERR_IO);
  assert_non_null(strstr(err.message, "s.f32: it is too short"));
  qtr_states_close(&s, true);
  assert_int_equal(qtr_states_open(root, "s.f32", 10, false, &s, &err), QTR_ERR_IO);
  qtr_states_close(&s, true);
  struct qtr_states never = {.fd = -1};
  qtr_states_close(&never, true);
  fixture_remove(root);
}

static void test_layers(void **state) {
  (void)state;
  enum { LAYERS = 3, N = 5, SAMPLES = 2 };
  char *root = fixture_make_root();
  struct qtr_error err;
  struct qtr_states s;
  float x[N], y[N];
  assert_non_null(root);
  for (int of = QTR_STATES_FLOAT; of <= QTR_STATES_QUANTISED; of++) {
    for (int32_t layer = 0; layer < LAYERS; layer++) {
      assert_int_equal(qtr_states_open_layer(root, (enum qtr_states_of)of, layer, N, true, &s, &err), QTR_OK);
      for (size_t i = 0; i < SAMPLES; i++) {
        assert_false(qtr_states_whole(root, (enum qtr_states_of)of, layer, SAMPLES, N));
        for (size_t k = 0; k < N; k++) x[k] = (float)(of * 1000 + layer * 100 + (int)i * 10 + (int)k);
        assert_int_equal(qtr_states_write(&s, i, x, &err), QTR_OK);
      }
      assert_true(qtr_states_whole(root, (enum qtr_states_of)of, layer, SAMPLES, N));
      assert_false(qtr_states_whole(root, (enum qtr_states_of)of, layer, SAMPLES - 1, N)); /* of another run */
      qtr_states_close(&s, false);
    }
  }
  for (int of = QTR_STATES_FLOAT; of <= QTR_STATES_QUANTISED; of++) {
    for (int32_t layer = 0; layer < LAYERS; layer++) {
      assert_int_equal(qtr_states_open_layer(root, (enum qtr_states_of)of, layer, N, false, &s, &err), QTR_OK);
      assert_int_equal(qtr_states_read(&s, 1, y, &err), QTR_OK);
      assert_true(y[3] == (float)(of * 1000 + layer * 100 + 13));
      qtr_states_close(&s, true);
      assert_false(qtr_states_whole(root, (enum qtr_states_of)of, layer, SAMPLES, N));
    }
  }
  fixture_remove(root);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_states), cmocka_unit_test(test_layers)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
