/* test_server_constraint.c - masks of tokens: against trying every token of the demo model's vocabulary byte by byte; and
 * what the engine does with a constraint: asks before every token, tells every token, gives every state back. */
#include "engine_fixture.h"
#include "server/constraint.h"
#include "server/schema.h"
#include "text/tokenizer.h"

#define EOS 3

static bool bit(const uint32_t *set, int32_t i) { return set[i / 32] >> i % 32 & 1; }

/* Follows `text` token by token from the start and compares the mask of every state on the way. */
static void follow(const char *schema_text, const char *text) {
  struct qtr_tokenizer *tokenizer = NULL;
  struct qtr_vocabulary *vocabulary = NULL;
  struct qtr_grammar *g = NULL, *check = NULL;
  struct qtr_error err;
  struct qtr_api_error why;
  const int32_t eos = EOS;
  if (qtr_tokenizer_open(QTR_SOURCE_DIR "/models/demo", &tokenizer, &err)) fail_msg("%s", err.message);
  int32_t n_vocab = qtr_tokenizer_vocab_size(tokenizer), *token = NULL;
  if (qtr_vocabulary_create(tokenizer, &eos, 1, n_vocab, &vocabulary, &err)) fail_msg("%s", err.message);
  json_t *schema = json_loads(schema_text, JSON_DECODE_ANY, NULL);
  assert_true(qtr_grammar_from_schema(schema, "p", &g, &why) && qtr_grammar_from_schema(schema, "p", &check, &why));
  struct qtr_masks *masks = qtr_masks_create(g, vocabulary);
  assert_non_null(masks);
  struct qtr_constraint c = qtr_masks_constraint(masks);
  uint32_t *allowed = calloc((size_t)n_vocab / 32 + 1, sizeof *allowed);
  void *state = c.start(c.user);
  size_t n_tokens = 0;
  const struct qtr_encode_options options = {.add_special = false};
  assert_int_equal(qtr_tokenizer_encode(tokenizer, text, strlen(text), &options, &token, &n_tokens, &err), QTR_OK);
  int32_t at = qtr_grammar_start(check);
  for (size_t i = 0; i <= n_tokens; i++) {
    memset(allowed, 0xA5, (size_t)(n_vocab / 32 + 1) * sizeof *allowed);
    assert_true(c.mask(state, allowed));
    for (int32_t t = 0; t < n_vocab; t++) {
      size_t len = 0;
      const char *bytes = qtr_tokenizer_token_bytes(tokenizer, t, &len);
      int32_t to = at;
      for (size_t k = 0; bytes && k < len; k++) to = qtr_grammar_next(check, to, (unsigned char)bytes[k]);
      bool may = bytes && len > 0 && to != QTR_GRAMMAR_DEAD && !qtr_tokenizer_is_special(tokenizer, t);
      if (t == EOS) may = qtr_grammar_accepts(check, at);
      if (bit(allowed, t) != may) fail_msg("token %d after %zu tokens of %s: %d", t, i, text, may);
    }
    if (i == n_tokens) break;
    assert_true(bit(allowed, token[i]));
    c.accept(state, token[i]);
    size_t len;
    const char *bytes = qtr_tokenizer_token_bytes(tokenizer, token[i], &len);
    for (size_t k = 0; k < len; k++) at = qtr_grammar_next(check, at, (unsigned char)bytes[k]);
  }
  assert_true(bit(allowed, EOS));
  c.accept(state, EOS);
  assert_true(c.mask(state, allowed) && bit(allowed, EOS));
  c.accept(state, token[0]); /* nothing fits there any more */
  assert_false(c.mask(state, allowed));
  c.stop(state);
  free(allowed);
  free(token);
  json_decref(schema);
  struct qtr_mask_cache *cache = qtr_mask_cache_create();
  assert_non_null(cache);
  assert_null(qtr_mask_cache_find(cache, "a"));
  qtr_mask_cache_add(cache, "a", masks);
  assert_ptr_equal(qtr_mask_cache_find(cache, "a"), masks);
  qtr_masks_unref(masks);
  for (int i = 0; i < 8; i++) { /* so many others that the first is thrown out, but not the one asked for last */
    char key[2] = {(char)('b' + i), 0};
    struct qtr_grammar *other = NULL;
    assert_true(qtr_grammar_from_schema(NULL, "p", &other, &why));
    struct qtr_masks *more = qtr_masks_create(other, vocabulary);
    qtr_mask_cache_add(cache, key, more);
    qtr_masks_unref(more);
    more = qtr_mask_cache_find(cache, "b");
    assert_non_null(more);
    qtr_masks_unref(more);
  }
  assert_null(qtr_mask_cache_find(cache, "a"));
  qtr_mask_cache_free(cache);
  qtr_masks_unref(masks);
  qtr_grammar_free(check);
  qtr_vocabulary_free(vocabulary);
  qtr_tokenizer_close(tokenizer);
}

static void test_masks(void **state) {
  (void)state;
  follow(
      "{\"type\":\"object\",\"properties\":{\"city\":{\"type\":\"string\",\"maxLength\":12},\"people\":{\"type\":"
      "\"integer\"}},"
      "\"required\":[\"city\"]}",
      "{\"city\": \"San Jos\xc3\xa9\", \"people\": 12}");
  follow("{\"type\":\"array\",\"items\":{\"enum\":[\"lunch\",\"dinner\",null]}}", "[\"dinner\", null,\n  \"lunch\"]");
}

/* ---- in the engine, with a constraint made by hand: tokens of one parity, in turn ---- */

struct counts {
  int started, stopped, asked, told;
  bool forbids; /* from the fourth token on nothing may follow */
};

struct turn {
  struct counts *counts;
  int n;
};

static void *turn_start(void *user) {
  struct turn *t = calloc(1, sizeof *t);
  assert_non_null(t);
  t->counts = user;
  t->counts->started++;
  return t;
}

static bool turn_mask(void *state, uint32_t *allowed) {
  struct turn *t = state;
  t->counts->asked++;
  if (t->counts->forbids && t->n == 3) return false;
  for (int i = 0; i < TINY_VOCAB / 32; i++) allowed[i] = t->n % 2 ? 0xAAAAAAAAu : 0x55555555u;
  return true;
}

static void turn_accept(void *state, int32_t token) {
  struct turn *t = state;
  assert_int_equal(token % 2, t->n % 2);
  t->counts->told++;
  t->n++;
}

static void turn_stop(void *state) {
  ((struct turn *)state)->counts->stopped++;
  free(state);
}

static void test_engine(void **unused) {
  (void)unused;
  for (int round = 0; round < 3; round++) {
    struct counts counts = {.forbids = round == 1};
    const struct qtr_constraint constraint = {turn_start, turn_mask, turn_accept, turn_stop, &counts};
    struct qtr_engine *engine =
        tiny_engine(tiny_model(QTR_LINEAR_W8A8), &(struct qtr_engine_options){.max_num_seqs = 4, .kv_pages = 16});
    const int32_t prompt[] = {50, 60, 70};
    struct qtr_request_options o;
    struct qtr_error err;
    uint64_t id;
    int n_tokens[3] = {0}, n_ended = 0;
    qtr_request_options_init(&o);
    o.prompt_token = prompt;
    o.n_prompt_token = 3;
    o.n = 3;
    o.max_tokens = 12;
    o.ignore_eos = true;
    o.constraint = &constraint;
    assert_int_equal(qtr_engine_add(engine, &o, &id, &err), QTR_OK);
    if (round == 2) { /* cancelled midway: the states come back all the same */
      bool work;
      for (int i = 0; i < 4; i++) assert_int_equal(qtr_engine_step(engine, &work, &err), QTR_OK);
      assert_int_equal(qtr_engine_cancel(engine, id, &err), QTR_OK);
    }
    drain(engine);
    struct qtr_event e;
    while (qtr_engine_poll(engine, &e)) {
      if (e.token >= 0) assert_int_equal(e.token % 2, n_tokens[e.index]++ % 2);
      if (e.finish == QTR_FINISH_NONE) continue;
      n_ended++;
      assert_int_equal(e.finish, round == 0 ? QTR_FINISH_LENGTH : round == 1 ? QTR_FINISH_ERROR : QTR_FINISH_CANCELLED);
    }
    assert_int_equal(n_ended, 3);
    for (int i = 0; i < 3 && round < 2; i++) assert_int_equal(n_tokens[i], round == 0 ? 12 : 3);
    assert_true(counts.started > 0 && counts.started == counts.stopped && counts.told > 0 && counts.asked >= counts.told);
    assert_idle(engine);
    qtr_engine_close(engine);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_masks), cmocka_unit_test(test_engine)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
