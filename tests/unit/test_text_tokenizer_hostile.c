/* Hostile and broken tokenizers and texts: a clear error each; and texts of 10 MB whose encoding must stay about linear. */
#include "base/file.h"
#include "text/tokenizer.h"
#include "text/tokenizer_impl.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#define GOLDEN QTR_SOURCE_DIR "/tests/golden/tokenizers/"
#define MODEL(vocab, merges) "{\"model\":{\"type\":\"BPE\",\"vocab\":" vocab ",\"merges\":" merges "}"

static void check_refused(const char *json, enum qtr_status status, const char *message) {
  struct qtr_tokenizer *t = NULL;
  struct qtr_error err = {QTR_OK, ""};
  enum qtr_status got = qtr_tokenizer_open_json(json, strlen(json), &t, &err);
  if (got != status || !strstr(err.message, message)) {
    fail_msg("%.120s: %s \"%s\", expected %s with \"%s\"", json, qtr_status_name(got), err.message, qtr_status_name(status),
             message);
  }
  assert_null(t);
}

static void test_refused_json(void **state) {
  (void)state;
  static const struct {
    const char *json;
    enum qtr_status status;
    const char *message;
  } cases[] = {
      {"", QTR_ERR_FORMAT, "not valid JSON"},
      {"{", QTR_ERR_FORMAT, "not valid JSON"},
      {"[]", QTR_ERR_FORMAT, "not a JSON object"},
      {"{}", QTR_ERR_FORMAT, "\"model\" is missing"},
      {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"\xff\":1},\"merges\":[]}}", QTR_ERR_FORMAT, "not valid JSON"},
      {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\\u0000\":1},\"merges\":[]}}", QTR_ERR_FORMAT, "not valid JSON"},
      {"{\"model\":{\"type\":\"Unigram\",\"vocab\":[]}}", QTR_ERR_UNSUPPORTED, "Unigram"},
      {"{\"model\":{\"type\":\"WordPiece\",\"vocab\":{}}}", QTR_ERR_UNSUPPORTED, "WordPiece"},
      {"{\"model\":{\"vocab\":{}}}", QTR_ERR_UNSUPPORTED, "without a type"},
      {"{\"model\":{\"type\":\"BPE\",\"merges\":[]}}", QTR_ERR_FORMAT, "vocab"},
      {"{\"model\":{\"type\":\"BPE\",\"vocab\":{}}}", QTR_ERR_FORMAT, "merges"},
      {"{\"model\":{\"type\":\"BPE\",\"vocab\":{},\"merges\":[],\"end_of_word_suffix\":\"</w>\"}}", QTR_ERR_UNSUPPORTED,
       "end_of_word"},
      {"{\"model\":{\"type\":\"BPE\",\"vocab\":{},\"merges\":[],\"unk_token\":\"<unk>\"}}", QTR_ERR_FORMAT, "unk_token"},
      {MODEL("{\"a\":-1}", "[]") "}", QTR_ERR_FORMAT, "id -1"},
      {MODEL("{\"a\":4194304}", "[]") "}", QTR_ERR_FORMAT, "id 4194304"},
      {MODEL("{\"a\":99999999999999999999}", "[]") "}", QTR_ERR_FORMAT, "not valid JSON"},
      {MODEL("{\"a\":1.5}", "[]") "}", QTR_ERR_FORMAT, "not an integer"},
      {MODEL("{\"a\":1,\"a\":2}", "[]") "}", QTR_ERR_FORMAT, "duplicate"},
      {MODEL("{\"a\":1,\"b\":1}", "[]") "}", QTR_ERR_FORMAT, "two tokens"},
      {MODEL("{\"a\":0,\"b\":1}", "[\"a b\"]") "}", QTR_ERR_FORMAT, "merge 0"},
      {MODEL("{\"a\":0,\"ab\":1}", "[[\"a\",\"b\"]]") "}", QTR_ERR_FORMAT, "merge 0"},
      {MODEL("{\"a\":0}", "[\"a\"]") "}", QTR_ERR_FORMAT, "not a pair"},
      {MODEL("{\"a\":0}", "[[\"a\"]]") "}", QTR_ERR_FORMAT, "not a pair"},
      {MODEL("{\"a\":0}", "[7]") "}", QTR_ERR_FORMAT, "not a pair"},
      {MODEL("{\"\":0,\"a\":1}", "[\"a \"]") "}", QTR_ERR_FORMAT, "merge 0"},
      {MODEL("{\"a\":0}", "[]") ",\"added_tokens\":[{\"content\":\"x\"}]}", QTR_ERR_FORMAT, "added token 0"},
      {MODEL("{\"a\":0}", "[]") ",\"added_tokens\":[{\"id\":0,\"content\":\"x\"}]}", QTR_ERR_FORMAT, "two tokens"},
      {MODEL("{\"a\":0}", "[]") ",\"normalizer\":{\"type\":\"Precompiled\"}}", QTR_ERR_UNSUPPORTED, "Precompiled"},
      {MODEL("{\"a\":0}", "[]") ",\"normalizer\":{\"type\":\"Replace\",\"content\":\"\"}}", QTR_ERR_FORMAT, "pattern"},
      {MODEL("{\"a\":0}", "[]") ",\"normalizer\":7}", QTR_ERR_FORMAT, "normalizer"},
      {MODEL("{\"a\":0}", "[]") ",\"pre_tokenizer\":{\"type\":\"UnicodeScripts\"}}", QTR_ERR_UNSUPPORTED, "UnicodeScripts"},
      {MODEL("{\"a\":0}", "[]") ",\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"String\":\"a\"},\"behavior\":\"x\"}}",
       QTR_ERR_FORMAT, "behavior"},
      {MODEL("{\"a\":0}", "[]") ",\"decoder\":{\"type\":\"WordPiece\"}}", QTR_ERR_UNSUPPORTED, "WordPiece"},
      {MODEL("{\"a\":0}", "[]") ",\"decoder\":{\"type\":\"Strip\",\"content\":\" \",\"start\":1,\"stop\":0}}",
       QTR_ERR_UNSUPPORTED, "Strip"},
      {MODEL("{\"a\":0}",
             "[]") ",\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"x\"}}]}}",
       QTR_ERR_FORMAT, "no \"ids\""},
      {MODEL("{\"a\":0}", "[]") ",\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[]}}", QTR_ERR_FORMAT,
       "no sequence"},
      {MODEL("{\"a\":0}", "[]") ",\"post_processor\":{\"type\":\"BertProcessing\",\"sep\":[\"a\",0],\"cls\":[\"b\",9]}}",
       QTR_ERR_FORMAT, "id that no token has"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) check_refused(cases[i].json, cases[i].status, cases[i].message);
}

static void test_refused_patterns(void **state) {
  (void)state;
  static const struct {
    const char *regex; /* as in JSON */
    enum qtr_status status;
    const char *message;
  } cases[] = {{"a(b", QTR_ERR_UNSUPPORTED, "not closed"},
               {"a)b", QTR_ERR_UNSUPPORTED, "without ("},
               {"[a", QTR_ERR_UNSUPPORTED, "not closed"},
               {"[[a]]", QTR_ERR_UNSUPPORTED, "bracket in brackets"},
               {"[a&&b]", QTR_ERR_UNSUPPORTED, "&&"},
               {"(*LIMIT_MATCH=1)a", QTR_ERR_UNSUPPORTED, "(*"},
               {"(?R)", QTR_ERR_UNSUPPORTED, "kind of group"},
               {"(?C1)", QTR_ERR_UNSUPPORTED, "kind of group"},
               {"\\\\Q", QTR_ERR_UNSUPPORTED, "escape"},
               {"\\\\p{Nonsense}", QTR_ERR_FORMAT, "regular expression"},
               {"\\\\", QTR_ERR_UNSUPPORTED, "backslash"},
               {"*a", QTR_ERR_FORMAT, "regular expression"},
               {"(((a{999}){999}){999}){999}", QTR_ERR_FORMAT, "regular expression"}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    char json[512];
    (void)snprintf(
        json, sizeof json,
        MODEL("{\"a\":0}",
              "[]") ",\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Isolated\",\"pattern\":{\"Regex\":\"%s\"}}}",
        cases[i].regex);
    check_refused(json, cases[i].status, cases[i].message);
  }
}

/* Opening brackets by the million, in JSON and in sequences, and every truncation of a real file. */
static void test_deep_and_truncated(void **state) {
  (void)state;
  struct qtr_tokenizer *t;
  struct qtr_error err;
  size_t n = 1 << 20;
  char *deep = malloc(n + 1);
  memset(deep, '[', n);
  deep[n] = 0;
  check_refused(deep, QTR_ERR_FORMAT, "depth");
  free(deep);
  char nested[2048] = MODEL("{}", "[]") ",\"normalizer\":";
  for (int i = 0; i < 20; i++) strcat(nested, "{\"type\":\"Sequence\",\"normalizers\":[");
  for (int i = 0; i < 20; i++) strcat(nested, "]}");
  check_refused(strcat(nested, "}"), QTR_ERR_UNSUPPORTED, "nest");

  static const char *const names[] = {"llama3.json", "pieces-unknown.model"};
  for (size_t i = 0; i < 2; i++) {
    char path[1024], *data;
    (void)snprintf(path, sizeof path, GOLDEN "%s", names[i]);
    assert_int_equal(qtr_file_read(path, 1 << 20, &data, &n, &err), QTR_OK);
    for (size_t len = 0; len + 2 < n; len += i == 0 ? 37 : 1) {
      char *cut = malloc(len ? len : 1); /* exactly as long, so that a sanitizer sees one byte too far */
      memcpy(cut, data, len);
      if (i == 0) {
        assert_int_equal(qtr_tokenizer_open_json(cut, len, &t, &err), QTR_ERR_FORMAT);
      } else if (qtr_tokenizer_open_sentencepiece(cut, len, &t, &err) == QTR_OK) {
        qtr_tokenizer_close(t); /* the specifications at the end are optional */
        assert_true(len > n - 400);
      }
      free(cut);
    }
    free(data);
  }
}

static void test_refused_models(void **state) {
  (void)state;
  struct qtr_tokenizer *t;
  struct qtr_error err;
  assert_int_equal(qtr_tokenizer_open(GOLDEN "refused-unigram.model", &t, &err), QTR_ERR_UNSUPPORTED);
  assert_non_null(strstr(err.message, "unigram"));
  char *data, more[8192];
  size_t n;
  assert_int_equal(qtr_file_read(GOLDEN "pieces-unknown.model", 8000, &data, &n, &err), QTR_OK);
  static const struct {
    const char *tail; /* protobuf fields that follow a good model */
    size_t len;
    enum qtr_status status;
    const char *message;
  } cases[] = {{"\x1a\x03\x12\x01x", 5, QTR_ERR_UNSUPPORTED, "normalisation chart"},
               {"\x12\x02\x18\x04", 4, QTR_ERR_UNSUPPORTED, "char"},
               {"\x12\x03\xc0\x01\x01", 5, QTR_ERR_UNSUPPORTED, "suffix"},
               {"\x0a\x05\x0a\x01z\x18\x05", 7, QTR_ERR_UNSUPPORTED, "type 5"},
               {"\x0a\x05\x0a\x01\xff\x18\x01", 7, QTR_ERR_FORMAT, "UTF-8"},
               {"\x0a\x02\x0a\x00", 4, QTR_ERR_FORMAT, "empty"},
               {"\x0a\x03\x0a\x01"
                "e",
                5, QTR_ERR_FORMAT, "two ids"},
               {"\x0a\x06\x0a\x02zz\x18\x06", 8, QTR_ERR_FORMAT, "byte"},
               {"\x0a\x08\x0a\x01Z\x15\x00\x00\xc0\x7f", 10, QTR_ERR_FORMAT, "not a number"},
               {"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 11, QTR_ERR_FORMAT, "truncated"},
               {"\x0b", 1, QTR_ERR_FORMAT, "truncated"}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    memcpy(more, data, n);
    memcpy(more + n, cases[i].tail, cases[i].len);
    enum qtr_status status = qtr_tokenizer_open_sentencepiece(more, n + cases[i].len, &t, &err);
    if (status != cases[i].status || !strstr(err.message, cases[i].message)) {
      fail_msg("case %zu: %s \"%s\"", i, qtr_status_name(status), err.message);
    }
  }
  free(data);
  assert_int_equal(qtr_tokenizer_open("/nowhere/tokenizer.json", &t, &err), QTR_ERR_NOT_FOUND);
}

static struct qtr_tokenizer *open_golden(const char *name) {
  char path[1024];
  struct qtr_tokenizer *t = NULL;
  struct qtr_error err;
  (void)snprintf(path, sizeof path, GOLDEN "%s", name);
  if (qtr_tokenizer_open(path, &t, &err)) fail_msg("%s", err.message);
  return t;
}

static void test_bad_text(void **state) {
  (void)state;
  static const char *const texts[] = {"ab\xff",     "ab\xc0\x80", "ab\xed\xa0\x80",        "ab\xf4\x90\x80\x80",
                                      "ab\xe4\xbd", "ab\x80",     "ab\xf8\x88\x80\x80\x80"};
  struct qtr_tokenizer *t = open_golden("llama3.json");
  struct qtr_encode_options options = {true, true};
  struct qtr_error err;
  int32_t *ids;
  size_t n;
  for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
    assert_int_equal(qtr_tokenizer_encode(t, texts[i], strlen(texts[i]), &options, &ids, &n, &err), QTR_ERR_ARGUMENT);
    assert_non_null(strstr(err.message, "byte 2"));
    assert_null(ids);
  }
  qtr_tokenizer_close(t);
}

/* A pattern that takes exponential time ends with an error, soon; a normalizer that explodes too. */
static void test_explosions(void **state) {
  (void)state;
  static const char *const parts[] = {
      "\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Isolated\",\"pattern\":{\"Regex\":\"(?:a|aa)+[0-9]\"}}",
      "\"normalizer\":{\"type\":\"Replace\",\"pattern\":{\"String\":\"a\"},\"content\":\"%s\"}"};
  char *bomb = malloc(400000), *text = malloc(100000), content[100001];
  memset(text, 'a', 100000);
  memset(content, 'b', 100000);
  content[100000] = 0;
  for (size_t i = 0; i < 2; i++) {
    struct qtr_tokenizer *t = NULL;
    struct qtr_error err;
    struct qtr_encode_options options = {true, true};
    int32_t *ids;
    size_t n;
    int len = snprintf(bomb, 400000, MODEL("{\"a\":0}", "[]") ",");
    len += snprintf(bomb + len, 300000, i == 0 ? "%s" : parts[1], i == 0 ? parts[0] : content);
    strcat(bomb, "}");
    if (qtr_tokenizer_open_json(bomb, (size_t)len + 1, &t, &err)) fail_msg("%s", err.message);
    assert_int_equal(qtr_tokenizer_encode(t, text, 100000, &options, &ids, &n, &err), QTR_ERR_LIMIT);
    qtr_tokenizer_close(t);
  }
  free(bomb);
  free(text);
}

static double now(void) {
  struct timespec t;
  (void)clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Quadratic merging of 10 MB would take days; the bound is for slow machines and sanitizers. */
static void test_ten_megabytes(void **state) {
  (void)state;
  static const char *const names[] = {"llama3.json", "gpt2.json",      "qwen2.json",
                                      "llama2.json", "metaspace.json", "pieces-bytes.model"};
  static const char *const units[] = {"a", " ", "ab", "\n", "the ", "\xcc\x81\xcc\x96", "<|"};
  enum { LEN = 10000000 };
  char *text = malloc(LEN);
  for (size_t k = 0; k < sizeof units / sizeof *units; k++) {
    size_t unit = strlen(units[k]);
    size_t size = (k < 3 ? LEN : LEN / 5) / unit * unit;
    for (size_t i = 0; i < size; i++) text[i] = units[k][i % unit];
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
      struct qtr_tokenizer *t = open_golden(names[i]);
      struct qtr_encode_options options = {false, true};
      struct qtr_error err;
      int32_t *ids;
      size_t n, len;
      char *back;
      double start = now();
      if (qtr_tokenizer_encode(t, text, size, &options, &ids, &n, &err)) fail_msg("%s", err.message);
      double seconds = now() - start;
      if (seconds > 60) fail_msg("%s, \"%s\": %.1f s", names[i], units[k], seconds);
      if (i < 2) { /* nothing is lost on the way (gpt2 puts a space in front) */
        assert_int_equal(qtr_tokenizer_decode(t, ids, n, false, &back, &len, &err), QTR_OK);
        size_t extra = i == 1 && text[0] != ' ';
        assert_int_equal(len, size + extra);
        assert_memory_equal(back + extra, text, size);
        free(back);
      }
      free(ids);
      qtr_tokenizer_close(t);
    }
  }
  free(text);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_refused_json),       cmocka_unit_test(test_refused_patterns),
      cmocka_unit_test(test_deep_and_truncated), cmocka_unit_test(test_refused_models),
      cmocka_unit_test(test_bad_text),           cmocka_unit_test(test_explosions),
      cmocka_unit_test(test_ten_megabytes),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
