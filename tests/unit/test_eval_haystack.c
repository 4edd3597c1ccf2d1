/* test_eval_haystack.c - sentences of a text, contexts with insertions at their depths, prompts made to measure; with the
 * demo model's tokenizer. */
#include "engine_fixture.h"
#include "eval/ask.h"
#include "eval/haystack.h"

#include <math.h>

static struct qtr_engine *open_engine(void) {
  struct qtr_engine_options options;
  struct qtr_tokenizer *tokenizer;
  struct qtr_engine *engine;
  struct qtr_error err;
  if (qtr_tokenizer_open(QTR_SOURCE_DIR "/models/demo", &tokenizer, &err)) fail_msg("%s", err.message);
  qtr_engine_options_init(&options);
  options.kv_pages = 16;
  if (qtr_engine_open_model(tiny_model(QTR_LINEAR_F32), tokenizer, NULL, &options, &engine, &err)) {
    fail_msg("%s", err.message);
  }
  return engine;
}

static struct qtr_haystack make(struct qtr_engine *engine, const char *text) {
  struct qtr_haystack h;
  struct qtr_error err;
  size_t len = strlen(text);
  char *copy = malloc(len + 2);
  memcpy(copy, text, len);
  if (qtr_haystack_create(engine, copy, len, &h, &err)) fail_msg("%s", err.message);
  return h;
}

static void sentences(void **state) {
  (void)state;
  struct qtr_engine *engine = open_engine();
  static const struct {
    const char *text, *cut; /* sentences with | between them */
  } cases[] = {
      {"One. Two three!  Four?", "One. |Two three!  |Four?\n\n"},
      {"He said \"no.\" Then 3.14 e.g.this\nwent on.\n\n\nNew",
       "He said \"no.\" |Then 3.14 e.g.this\nwent on.\n\n\n|New\n\n"},
      {"A title\n\nText \xe2\x80\x9cquoted.\xe2\x80\x9d More", "A title\n\n|Text \xe2\x80\x9cquoted.\xe2\x80\x9d |More\n\n"},
      {"\xe4\xb8\x80\xe3\x80\x82\xe4\xba\x8c\xef\xbc\x9f\xe4\xb8\x89", /* 一。二？三 */
       "\xe4\xb8\x80\xe3\x80\x82|\xe4\xba\x8c\xef\xbc\x9f|\xe4\xb8\x89\n\n"},
      {"x", "x\n\n"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct qtr_haystack h = make(engine, cases[i].text);
    struct qtr_text cut = {0};
    struct qtr_error err;
    for (size_t k = 0; k < h.n_sentences; k++) {
      if (k) assert_int_equal(qtr_text_append(&cut, "|", 1, &err), QTR_OK);
      assert_int_equal(qtr_text_append(&cut, h.text + h.sentence[k].offset, h.sentence[k].len, &err), QTR_OK);
    }
    assert_string_equal(cut.data, cases[i].cut);
    qtr_text_free(&cut);
    qtr_haystack_free(&h);
  }
  /* without any ends: cut between words, or between characters; nothing lost */
  char *words = malloc(6001), *wide = malloc(6001);
  for (size_t i = 0; i < 6000; i++) words[i] = i % 7 == 6 ? ' ' : 'a';
  for (size_t i = 0; i < 6000; i++) wide[i] = "\xe4\xb8\x80"[i % 3];
  words[6000] = wide[6000] = 0;
  for (int k = 0; k < 2; k++) {
    struct qtr_haystack h = make(engine, k ? wide : words);
    size_t at = h.sentence[0].offset;
    assert_in_range(h.n_sentences, 9, 12);
    for (size_t i = 0; i < h.n_sentences; i++) {
      assert_int_equal(h.sentence[i].offset, at);
      at += h.sentence[i].len;
      if (k) assert_int_equal(h.sentence[i].offset % 3, 0);
    }
    assert_int_equal(at, h.len);
    qtr_haystack_free(&h);
  }
  free(words);
  free(wide);
  struct qtr_haystack h;
  struct qtr_error err;
  assert_int_equal(qtr_haystack_create(engine, calloc(1, 8), 0, &h, &err), QTR_ERR_FORMAT);
  assert_int_equal(qtr_haystack_read(engine, QTR_SOURCE_DIR "/src", &h, &err), QTR_ERR_NOT_FOUND);
  qtr_engine_close(engine);
}

static void depths(void **state) {
  (void)state;
  struct qtr_engine *engine = open_engine();
  struct qtr_haystack h;
  struct qtr_error err;
  assert_int_equal(qtr_haystack_generate(engine, 3, 2000, &h, &err), QTR_OK);
  assert_in_range(h.n_tokens, 2000, 8000);
  static const double at[] = {0, 0.1, 0.5, 0.9, 1};
  for (size_t i = 0; i < 5; i++) {
    const struct qtr_insertion needle = {at[i], "NEEDLE."};
    struct qtr_text out = {0};
    assert_int_equal(qtr_haystack_cut(&h, h.n_sentences - 3, 1500, &needle, 1, &out, &err), QTR_OK);
    const char *found = strstr(out.data, "NEEDLE. ");
    assert_non_null(found);
    assert_true(found == out.data || found[-1] == ' ' || found[-1] == '\n');
    assert_true(fabs((double)(found - out.data) / (double)out.len - at[i]) < 0.02);
    qtr_text_free(&out);
  }
  const struct qtr_insertion three[] = {{0.2, "FIRST."}, {0.2, "SECOND."}, {1, "THIRD."}};
  struct qtr_text out = {0};
  assert_int_equal(qtr_haystack_cut(&h, 0, 300, three, 3, &out, &err), QTR_OK);
  assert_non_null(strstr(out.data, "FIRST. SECOND. "));
  assert_string_equal(out.data + out.len - 7, "THIRD. ");
  qtr_text_free(&out);
  /* no room: the insertions alone */
  assert_int_equal(qtr_haystack_cut(&h, 0, 0, three, 3, &out, &err), QTR_OK);
  assert_string_equal(out.data, "FIRST. SECOND. THIRD. ");
  qtr_text_free(&out);
  qtr_haystack_free(&h);
  qtr_engine_close(engine);
}

static enum qtr_status make_text(void *user, size_t room, struct qtr_text *out, struct qtr_error *err) {
  enum qtr_status status = qtr_haystack_cut(user, 5, room, NULL, 0, out, err);
  return status ? status : qtr_text_append(out, "\n\nWhy?", 6, err);
}

static void measure(void **state) {
  (void)state;
  struct qtr_engine *engine = open_engine();
  struct qtr_haystack h;
  struct qtr_error err;
  assert_int_equal(qtr_haystack_generate(engine, 4, 300, &h, &err), QTR_OK); /* goes round several times */
  const struct qtr_ask_text text = {make_text, &h};
  static const size_t lengths[] = {16, 64, 500, 3000};
  for (size_t i = 0; i < 4; i++) {
    struct qtr_ask_prompt prompt;
    assert_int_equal(qtr_ask_fit(engine, QTR_ASK_PLAIN, lengths[i], &text, &prompt, &err), QTR_OK);
    assert_in_range(prompt.n_tokens, lengths[i] > 40 ? lengths[i] - 40 : 2, lengths[i]); /* within a sentence */
    assert_int_equal(prompt.token[0], 0);                                                /* BOS */
    free(prompt.token);
  }
  struct qtr_ask_prompt prompt;
  assert_int_equal(qtr_ask_fit(engine, QTR_ASK_PLAIN, 2, &text, &prompt, &err), QTR_ERR_LIMIT);
  assert_int_equal(qtr_ask_style_of(engine, QTR_ASK_AUTO), QTR_ASK_PLAIN); /* this engine has no template */
  qtr_haystack_free(&h);
  qtr_engine_close(engine);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(sentences), cmocka_unit_test(depths), cmocka_unit_test(measure)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
