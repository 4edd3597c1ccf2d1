/* Stream pages and companions in the page pool: random sequences that share prefixes take, attach, let go and reuse them.
 * Every stream page carries a label of what it holds; a companion must hold what its page holds, nothing that is held may be
 * handed out, the oldest cached companion goes first, and the pool's own check must hold throughout. */
#include "backend/backend.h"
#include "kv/pool.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { PAGES = 40, STREAMS = 14, SEQS = 8, DEPTH = 10, KINDS = 3 };

struct sequence {
  bool alive;
  int n;
  uint64_t label[DEPTH]; /* of the text up to and with page i */
  int kind[DEPTH];
  int32_t page[DEPTH], stream[DEPTH];
};

static struct sequence seqs[SEQS];
static uint64_t held[STREAMS]; /* label of what each stream page holds */
static uint64_t state = 99;

static int pick(int n) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return (int)((state >> 20) % (uint64_t)n);
}

static void fill(int kind, int32_t *token) {
  for (int i = 0; i < QTR_PAGE_TOKENS; i++) token[i] = kind * 100 + i;
}

static int32_t references(int32_t stream) {
  int32_t n = 0;
  for (int s = 0; s < SEQS; s++) {
    for (int i = 0; seqs[s].alive && i < seqs[s].n; i++) n += seqs[s].stream[i] == stream;
  }
  return n;
}

static void check(struct qtr_kv_pool *pool) {
  struct qtr_error err;
  int32_t total, used, cached, n_used = 0;
  if (!qtr_kv_pool_check(pool, &err)) fail_msg("%s", err.message);
  qtr_kv_pool_stream_counts(pool, &total, &used, &cached);
  for (int32_t i = 0; i < STREAMS; i++) n_used += references(i) > 0;
  assert_int_equal(total, STREAMS);
  assert_int_equal(used, n_used);
  assert_true(cached >= 0 && used + cached <= total);
  assert_int_equal(qtr_kv_pool_stream_available(pool), STREAMS - n_used);
}

static void end(struct qtr_kv_pool *pool, struct sequence *s) {
  for (int i = s->n - 1; i >= 0; i--) {
    if (s->stream[i] >= 0) qtr_kv_pool_stream_unref(pool, s->stream[i]);
    s->stream[i] = -1;
  }
  while (s->n > 0) qtr_kv_pool_unref(pool, s->page[--s->n]);
  s->alive = false;
}

/* A sequence of random pages: what is known comes from the cache, with the companions that are there. */
static void begin(struct qtr_kv_pool *pool, struct sequence *s) {
  int32_t token[DEPTH * QTR_PAGE_TOKENS];
  int want = 1 + pick(DEPTH - 1);
  uint64_t label = 1;
  *s = (struct sequence){.alive = true};
  for (int i = 0; i < want; i++) {
    s->kind[i] = pick(KINDS);
    label = label * KINDS + (uint64_t)s->kind[i] + 7;
    s->label[i] = label;
    s->stream[i] = -1;
    fill(s->kind[i], token + i * QTR_PAGE_TOKENS);
  }
  s->n = qtr_kv_pool_match(pool, 0, token, (size_t)want * QTR_PAGE_TOKENS, s->page, want);
  for (int i = 0; i < s->n; i++) {
    int32_t companion = qtr_kv_pool_companion(pool, s->page[i]);
    if (companion < 0 || pick(3) == 0) continue;
    assert_true(held[companion] == s->label[i]);
    qtr_kv_pool_stream_ref(pool, companion);
    s->stream[i] = companion;
  }
}

/* One page more, with a stream page where there is one; both published, or left private. */
static void grow(struct qtr_kv_pool *pool, struct sequence *s) {
  int32_t token[QTR_PAGE_TOKENS];
  if (s->n == DEPTH) return;
  int32_t page = qtr_kv_pool_take(pool);
  if (page < 0) return;
  int i = s->n;
  bool is_new = s->label[i] == 0;
  if (is_new) {
    s->kind[i] = pick(KINDS);
    s->label[i] = (i > 0 ? s->label[i - 1] : 1) * KINDS + (uint64_t)s->kind[i] + 7;
  }
  s->page[i] = page;
  s->stream[i] = -1;
  int32_t before = qtr_kv_pool_stream_available(pool), stream = qtr_kv_pool_stream_take(pool);
  assert_int_equal(stream >= 0, before > 0);
  if (stream >= 0) {
    assert_int_equal(references(stream), 0);
    held[stream] = s->label[i];
    s->stream[i] = stream;
  }
  s->n++;
  if (pick(4) == 0) return; /* not published */
  fill(s->kind[i], token);
  int32_t known = qtr_kv_pool_publish(pool, 0, page, i > 0 ? s->page[i - 1] : -1, token);
  if (known != page) {
    qtr_kv_pool_ref(pool, known);
    qtr_kv_pool_unref(pool, page);
    s->page[i] = known;
  }
  if (s->stream[i] < 0) return;
  int32_t companion = qtr_kv_pool_attach(pool, s->page[i], s->stream[i]);
  assert_true(held[companion] == s->label[i]);
  if (companion == s->stream[i]) return;
  qtr_kv_pool_stream_ref(pool, companion);
  qtr_kv_pool_stream_unref(pool, s->stream[i]);
  s->stream[i] = companion;
}

static void test_random(void **unused) {
  (void)unused;
  struct qtr_kv_pool *pool;
  struct qtr_error err;
  int n_reused = 0;
  if (qtr_kv_pool_create(PAGES, true, &pool, &err) || qtr_kv_pool_add_streams(pool, STREAMS, &err))
    fail_msg("%s", err.message);
  for (int step = 0; step < 40000; step++) {
    struct sequence *s = &seqs[pick(SEQS)];
    if (!s->alive) {
      begin(pool, s);
      for (int i = 0; i < s->n; i++) n_reused += s->stream[i] >= 0;
    } else if (pick(8) == 0) {
      end(pool, s);
    } else if (pick(3) == 0 && s->n > 0) { /* a page falls out of the window */
      int i = pick(s->n);
      if (s->stream[i] >= 0) qtr_kv_pool_stream_unref(pool, s->stream[i]);
      s->stream[i] = -1;
    } else {
      grow(pool, s);
    }
    check(pool);
  }
  assert_true(n_reused > 100);
  for (int i = 0; i < SEQS; i++) {
    if (seqs[i].alive) end(pool, &seqs[i]);
  }
  check(pool);
  qtr_kv_pool_free(pool);
}

/* Cached companions leave in the order of their last use. */
static void test_order(void **unused) {
  (void)unused;
  struct qtr_kv_pool *pool;
  struct qtr_error err;
  int32_t page[3], stream[3], token[QTR_PAGE_TOKENS];
  if (qtr_kv_pool_create(8, true, &pool, &err) || qtr_kv_pool_add_streams(pool, 3, &err)) fail_msg("%s", err.message);
  for (int i = 0; i < 3; i++) {
    page[i] = qtr_kv_pool_take(pool);
    stream[i] = qtr_kv_pool_stream_take(pool);
    fill(i, token);
    assert_int_equal(qtr_kv_pool_publish(pool, 0, page[i], -1, token), page[i]);
    assert_int_equal(qtr_kv_pool_attach(pool, page[i], stream[i]), stream[i]);
  }
  assert_int_equal(qtr_kv_pool_stream_take(pool), -1);
  qtr_kv_pool_stream_unref(pool, stream[1]);
  qtr_kv_pool_stream_unref(pool, stream[0]);
  qtr_kv_pool_stream_unref(pool, stream[2]);
  qtr_kv_pool_stream_ref(pool, stream[1]); /* used again: now the newest */
  qtr_kv_pool_stream_unref(pool, stream[1]);
  static const int order[3] = {0, 2, 1};
  for (int i = 0; i < 3; i++) {
    assert_int_equal(qtr_kv_pool_companion(pool, page[order[i]]), stream[order[i]]);
    assert_int_equal(qtr_kv_pool_stream_take(pool), stream[order[i]]);
    assert_int_equal(qtr_kv_pool_companion(pool, page[order[i]]), -1);
  }
  qtr_kv_pool_free(pool);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_random), cmocka_unit_test(test_order)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
