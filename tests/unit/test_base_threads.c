/* The thread team: every item once, whatever the pieces; many short loops; loops while the machine is busy. */
#include "base/threads.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

struct count {
  atomic_int *hits; /* (n) */
  int n_threads;
  atomic_int wrong_thread;
};

static void count_items(void *arg, size_t begin, size_t end, int thread) {
  struct count *c = arg;
  if (thread < 0 || thread >= c->n_threads) atomic_fetch_add(&c->wrong_thread, 1);
  for (size_t i = begin; i < end; i++) atomic_fetch_add(&c->hits[i], 1);
}

static void test_every_item_once(void **state) {
  (void)state;
  static const int teams[] = {1, 2, 3, 7, 16};
  enum { MAX = 1000 };
  static atomic_int hits[MAX];
  for (size_t k = 0; k < sizeof teams / sizeof teams[0]; k++) {
    struct qtr_threads *t;
    assert_int_equal(qtr_threads_create(teams[k], &t, NULL), QTR_OK);
    assert_int_equal(qtr_threads_count(t), teams[k]);
    for (size_t n = 0; n <= MAX; n += n < 20 ? 1 : 49) {
      for (size_t chunk = 1; chunk <= n + 1; chunk = chunk * 3 + 1) {
        struct count c = {.hits = hits, .n_threads = teams[k]};
        for (size_t i = 0; i < n; i++) atomic_store(&hits[i], 0);
        qtr_threads_for(t, n, chunk, count_items, &c);
        for (size_t i = 0; i < n; i++) assert_int_equal(atomic_load(&hits[i]), 1);
        assert_int_equal(atomic_load(&c.wrong_thread), 0);
      }
    }
    qtr_threads_free(t);
  }
}

static void add(void *arg, size_t begin, size_t end, int thread) {
  (void)thread;
  size_t *sum = arg; /* a slot an item: no two members write the same */
  for (size_t i = begin; i < end; i++) sum[i] += i;
}

static void test_many_short_loops(void **state) {
  (void)state;
  struct qtr_threads *t;
  assert_int_equal(qtr_threads_create(4, &t, NULL), QTR_OK);
  size_t sum[8] = {0};
  enum { LOOPS = 20000 };
  for (int i = 0; i < LOOPS; i++) qtr_threads_for(t, 8, 1, add, sum);
  for (size_t i = 0; i < 8; i++) assert_int_equal(sum[i], i * LOOPS);
  qtr_threads_free(t);
}

static void test_limits(void **state) {
  (void)state;
  struct qtr_threads *t;
  struct qtr_error err;
  assert_int_equal(qtr_threads_create(0, &t, &err), QTR_ERR_ARGUMENT);
  assert_null(t);
  assert_int_equal(qtr_threads_create(1025, &t, &err), QTR_ERR_ARGUMENT);
  qtr_threads_free(NULL);
  assert_true(qtr_threads_available() >= 1);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_every_item_once),
      cmocka_unit_test(test_many_short_loops),
      cmocka_unit_test(test_limits),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
