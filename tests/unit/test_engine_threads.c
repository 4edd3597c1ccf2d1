/* One thread steps while others add, cancel, poll and read statistics; run it under ThreadSanitizer (preset tsan). Every
 * request must end once, its events in order, and nothing may be left. */
#include "engine_fixture.h"

#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#define ADDERS 3
#define EACH 60
#define N (ADDERS * EACH)

static struct qtr_engine *engine;
static atomic_uint_fast64_t id_of[N];
static int n_tokens[N][2], n_ended[N][2];
static atomic_int n_finished, n_wrong;
static atomic_bool done;
static int32_t prompt[200];

static int completions(int i) { return i % 5 == 0 ? 2 : 1; }

static void *add_requests(void *arg) {
  int thread = *(int *)arg;
  for (int k = 0; k < EACH; k++) {
    int i = thread * EACH + k;
    struct qtr_request_options o;
    struct qtr_error err = {0};
    uint64_t id = 0;
    qtr_request_options_init(&o);
    o.prompt_token = prompt + i % 7;
    o.n_prompt_token = (size_t)(1 + i * 13 % 150);
    o.max_tokens = 1 + i % 20;
    o.n = completions(i);
    o.priority = i % 3;
    o.user = (void *)(uintptr_t)i;
    if (qtr_engine_add(engine, &o, &id, &err)) atomic_fetch_add(&n_wrong, 1);
    atomic_store(&id_of[i], id);
    if (k % 8 == 7) (void)usleep(1000);
  }
  return NULL;
}

static void *cancel_some(void *arg) {
  (void)arg;
  struct qtr_stats stats;
  struct qtr_engine_info info;
  struct qtr_error err;
  for (int i = 0; !atomic_load(&done); i = (i + 17) % N) {
    uint64_t id = atomic_load(&id_of[i]);
    if (id && i % 4 == 0) {
      enum qtr_status status = qtr_engine_cancel(engine, id, &err);
      if (status != QTR_OK && status != QTR_ERR_NOT_FOUND) atomic_fetch_add(&n_wrong, 1);
    }
    qtr_engine_stats(engine, &stats);
    qtr_engine_get_info(engine, &info);
    if (stats.n_pages_used + stats.n_pages_cached > stats.n_pages_total) atomic_fetch_add(&n_wrong, 1);
    bool work; /* only one may step at a time: this call either does or is told so */
    if (i % 64 == 1 && qtr_engine_step(engine, &work, &err) != QTR_OK && err.status != QTR_ERR_STATE)
      atomic_fetch_add(&n_wrong, 1);
    (void)usleep(50);
  }
  return NULL;
}

static void *poll_events(void *arg) {
  (void)arg;
  struct qtr_event e;
  while (!atomic_load(&done)) {
    if (!qtr_engine_poll(engine, &e)) {
      (void)usleep(100);
      continue;
    }
    int i = (int)(uintptr_t)e.user;
    if (e.token >= 0) n_tokens[i][e.index]++;
    if (n_ended[i][e.index] || e.n_output_tokens != n_tokens[i][e.index]) atomic_fetch_add(&n_wrong, 1);
    if (e.finish == QTR_FINISH_NONE) continue;
    n_ended[i][e.index]++;
    atomic_fetch_add(&n_finished, 1);
  }
  return NULL;
}

static void test_threads(void **unused) {
  (void)unused;
  pthread_t thread[ADDERS + 2];
  int number[ADDERS], n_expected = 0;
  for (int i = 0; i < N; i++) n_expected += completions(i);
  for (int i = 0; i < 200; i++) prompt[i] = 10 + i * 31 % 200;
  engine = tiny_engine(tiny_model(QTR_LINEAR_F32),
                       &(struct qtr_engine_options){.kv_pages = 8, .max_num_seqs = 8, .max_num_batched_tokens = 64});
  for (int i = 0; i < ADDERS; i++) {
    number[i] = i;
    assert_int_equal(pthread_create(&thread[i], NULL, add_requests, &number[i]), 0);
  }
  assert_int_equal(pthread_create(&thread[ADDERS], NULL, cancel_some, NULL), 0);
  assert_int_equal(pthread_create(&thread[ADDERS + 1], NULL, poll_events, NULL), 0);
  for (int idle = 0; atomic_load(&n_finished) < n_expected && idle < 200000;) {
    struct qtr_error err = {0};
    bool work = false;
    enum qtr_status status = qtr_engine_step(engine, &work, &err);
    if (status != QTR_OK && status != QTR_ERR_STATE) fail_msg("%s", err.message);
    if (!work) {
      idle++;
      (void)usleep(100);
    }
  }
  atomic_store(&done, true);
  for (int i = 0; i < ADDERS + 2; i++) assert_int_equal(pthread_join(thread[i], NULL), 0);
  assert_int_equal(atomic_load(&n_wrong), 0);
  assert_int_equal(atomic_load(&n_finished), n_expected);
  assert_idle(engine);
  qtr_engine_close(engine);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_threads)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
