/* The page pool against a naive model of it: random sequences that share prefixes come, grow, publish and go; every page the
 * pool hands out, every match and every eviction must be the model's, and the pool's own check must hold.
 * test_kv_collision.c runs the same with a hash that collides all the time. */
#include "backend/backend.h"
#include "kv/pool.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define PAGE QTR_PAGE_TOKENS
#define POOL 24
#define SEQS 12
#define DEPTH 8

struct model_page {
  int refs;
  bool published;
  int parent;
  uint64_t salt;
  int content;   /* kind of the page's tokens */
  uint64_t time; /* when the last reference went */
};

struct model_seq {
  bool alive;
  int n;
  uint64_t salt;
  int content[DEPTH];
  int32_t page[DEPTH];
};

static struct model_page model[POOL];
static struct model_seq seqs[SEQS];
static uint64_t now, state;

static int pick(int n) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return (int)((state >> 20) % (uint64_t)n);
}

static void fill(int content, int32_t *token) {
  for (int i = 0; i < PAGE; i++) token[i] = content * 1000 + i / 60; /* contents differ in few places */
  if (content == 3) token[PAGE - 1] = 2060;
}

static int model_find(uint64_t salt, int parent, int content) {
  for (int i = 0; i < POOL; i++) {
    if (model[i].published && model[i].salt == salt && model[i].parent == parent && model[i].content == content) return i;
  }
  return -1;
}

static int model_count(int kind) { /* 0 free, 1 used, 2 cached */
  int n = 0;
  for (int i = 0; i < POOL; i++) n += kind == (model[i].refs > 0 ? 1 : model[i].published ? 2 : 0);
  return n;
}

/* The page that eviction must choose: unreferenced, published, without published children, least recently used. */
static int model_victim(void) {
  int best = -1;
  for (int i = 0; i < POOL; i++) {
    if (model[i].refs > 0 || !model[i].published) continue;
    bool leaf = true;
    for (int k = 0; k < POOL; k++) leaf = leaf && !(model[k].published && model[k].parent == i);
    if (leaf && (best < 0 || model[i].time < model[best].time)) best = i;
  }
  return best;
}

static int32_t take(struct qtr_kv_pool *pool) {
  int victim = model_count(0) > 0 ? -1 : model_victim();
  int32_t page = qtr_kv_pool_take(pool);
  if (model_count(0) > 0) {
    assert_in_range(page, 0, POOL - 1);
    assert_true(model[page].refs == 0 && !model[page].published);
  } else {
    assert_int_equal(page, victim);
    if (page < 0) return -1;
  }
  model[page] = (struct model_page){.refs = 1};
  return page;
}

static void drop(struct qtr_kv_pool *pool, struct model_seq *s) {
  while (s->n > 0) {
    int32_t page = s->page[--s->n];
    qtr_kv_pool_unref(pool, page);
    if (--model[page].refs == 0) model[page].time = ++now;
  }
  s->alive = false;
}

/* A new sequence of `depth` pages: match, then take and publish the rest as far as there are pages. */
static void start(struct qtr_kv_pool *pool, struct model_seq *s, bool cache) {
  int32_t token[DEPTH * PAGE + 7];
  int depth = 1 + pick(DEPTH), tail = pick(7);
  *s = (struct model_seq){.alive = true, .salt = (uint64_t)pick(2)};
  for (int i = 0; i < depth; i++) {
    s->content[i] = pick(4) ? i % 2 : pick(4); /* often the common path */
    fill(s->content[i], token + i * PAGE);
  }
  int known = 0, parent = -1, most = pick(6) ? DEPTH : pick(DEPTH);
  while (cache && known < depth && known < most && (parent = model_find(s->salt, parent, s->content[known])) >= 0) {
    s->page[known++] = parent;
  }
  int32_t page[DEPTH] = {0};
  int32_t n = qtr_kv_pool_match(pool, s->salt, token, (size_t)(depth * PAGE + tail), page, most);
  assert_int_equal(n, known);
  assert_memory_equal(page, s->page, (size_t)n * sizeof *page);
  for (s->n = 0; s->n < n; s->n++) model[page[s->n]].refs++;
  while (s->n < depth) {
    int32_t fresh = take(pool);
    if (fresh < 0) break;
    int i = s->n++;
    s->page[i] = fresh;
    if (pick(8) == 0) break; /* this one is not full yet */
    parent = i > 0 ? s->page[i - 1] : -1;
    if (cache && parent >= 0 && !model[parent].published) continue;
    int twin = cache ? model_find(s->salt, parent, s->content[i]) : -1;
    int32_t got = qtr_kv_pool_publish(pool, s->salt, fresh, parent, token + i * PAGE);
    assert_int_equal(got, twin >= 0 ? twin : fresh);
    if (twin >= 0) {
      qtr_kv_pool_ref(pool, twin);
      model[twin].refs++;
      qtr_kv_pool_unref(pool, fresh);
      model[fresh] = (struct model_page){0};
      s->page[i] = twin;
    } else if (cache) {
      model[fresh].published = true;
      model[fresh].parent = parent;
      model[fresh].salt = s->salt;
      model[fresh].content = s->content[i];
    }
  }
}

static void check(struct qtr_kv_pool *pool) {
  struct qtr_error err = {0};
  int32_t total, used, cached;
  if (!qtr_kv_pool_check(pool, &err)) fail_msg("%s", err.message);
  qtr_kv_pool_counts(pool, &total, &used, &cached);
  assert_int_equal(total, POOL);
  assert_int_equal(used, model_count(1));
  assert_int_equal(cached, model_count(2));
  assert_int_equal(qtr_kv_pool_available(pool), POOL - used);
}

static void run_random(bool cache) {
  struct qtr_kv_pool *pool = NULL;
  int n_shared = 0, n_evicted = 0, n_empty = 0;
  assert_int_equal(qtr_kv_pool_create(POOL, cache, &pool, NULL), QTR_OK);
  memset(model, 0, sizeof model);
  memset(seqs, 0, sizeof seqs);
  state = 88172645463325252u;
  now = 0;
  for (int step = 0; step < 20000; step++) {
    struct model_seq *s = &seqs[pick(SEQS)];
    int before = model_count(0), cached = model_count(2);
    if (s->alive)
      drop(pool, s);
    else
      start(pool, s, cache);
    for (int i = 0; i < s->n; i++) n_shared += model[s->page[i]].refs > 1;
    n_evicted += before == 0 && model_count(2) < cached;
    n_empty += model_count(0) + model_count(2) == 0;
    check(pool);
  }
  if (cache) assert_true(n_shared > 1000 && n_evicted > 1000); /* the test has met what it is about */
  assert_true(n_empty > 0);
  for (int i = 0; i < SEQS; i++) drop(pool, &seqs[i]);
  check(pool);
  assert_int_equal(qtr_kv_pool_available(pool), POOL);
  qtr_kv_pool_free(pool);
}

static void test_random(void **unused) {
  (void)unused;
  run_random(true);
}

static void test_random_without_cache(void **unused) {
  (void)unused;
  run_random(false);
}

/* The same tokens after another beginning, and under another salt, are other content. */
static void test_chain_and_salt(void **unused) {
  (void)unused;
  struct qtr_kv_pool *pool = NULL;
  int32_t token[3 * PAGE], page[3];
  assert_int_equal(qtr_kv_pool_create(8, true, &pool, NULL), QTR_OK);
  for (int i = 0; i < 3; i++) fill(i % 2, token + i * PAGE); /* 0 1 0 */
  int32_t a = qtr_kv_pool_take(pool), b = qtr_kv_pool_take(pool), c = qtr_kv_pool_take(pool);
  assert_int_equal(qtr_kv_pool_publish(pool, 5, a, -1, token), a);
  assert_int_equal(qtr_kv_pool_publish(pool, 5, b, a, token + PAGE), b);
  assert_int_equal(qtr_kv_pool_publish(pool, 5, c, b, token + 2 * PAGE), c); /* content of a, elsewhere: not a duplicate */
  assert_int_equal(qtr_kv_pool_match(pool, 6, token, 3 * PAGE, page, 3), 0);
  assert_int_equal(qtr_kv_pool_match(pool, 5, token + PAGE, 2 * PAGE, page, 3), 0);
  assert_int_equal(qtr_kv_pool_match(pool, 5, token, 3 * PAGE - 1, page, 3), 2); /* whole pages only */
  assert_true(page[0] == a && page[1] == b);
  qtr_kv_pool_unref(pool, b);
  qtr_kv_pool_unref(pool, a);
  struct qtr_error err;
  assert_true(qtr_kv_pool_check(pool, &err));
  qtr_kv_pool_free(pool);
  assert_int_equal(qtr_kv_pool_create(0, true, &pool, &err), QTR_ERR_ARGUMENT);
}

/* Pages dropped in the wrong order: still no parent goes before its child. */
static void test_leaves_first(void **unused) {
  (void)unused;
  struct qtr_kv_pool *pool = NULL;
  int32_t token[PAGE];
  assert_int_equal(qtr_kv_pool_create(3, true, &pool, NULL), QTR_OK);
  fill(0, token);
  int32_t a = qtr_kv_pool_take(pool), b = qtr_kv_pool_take(pool), c = qtr_kv_pool_take(pool);
  qtr_kv_pool_publish(pool, 0, a, -1, token);
  qtr_kv_pool_publish(pool, 0, b, a, token);
  qtr_kv_pool_unref(pool, a);
  assert_int_equal(qtr_kv_pool_take(pool), -1); /* its child is in use */
  qtr_kv_pool_unref(pool, b);
  qtr_kv_pool_unref(pool, c);
  assert_int_equal(qtr_kv_pool_take(pool), c); /* free */
  assert_int_equal(qtr_kv_pool_take(pool), b);
  assert_int_equal(qtr_kv_pool_take(pool), a);
  assert_int_equal(qtr_kv_pool_take(pool), -1);
  qtr_kv_pool_free(pool);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_random),
      cmocka_unit_test(test_random_without_cache),
      cmocka_unit_test(test_chain_and_salt),
      cmocka_unit_test(test_leaves_first),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
