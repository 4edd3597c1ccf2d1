/* Tokenizers against what the reference made of the same texts (tests/golden/tokenizers, made by make_tokenizers.py):
 * encoding with and without special tokens, decoding, streaming, and what a tokenizer says about itself. */
#include "text/tokenizer.h"

#include "text/tokenizer_impl.h"
#include "text/unicode.h"

#include <jansson.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#define GOLDEN QTR_SOURCE_DIR "/tests/golden/tokenizers/"

static struct qtr_tokenizer *open_golden(const char *name) {
  char path[1024];
  (void)snprintf(path, sizeof path, GOLDEN "%s", name);
  struct qtr_tokenizer *t = NULL;
  struct qtr_error err;
  if (qtr_tokenizer_open(path, &t, &err)) fail_msg("%s", err.message);
  return t;
}

static void check_ids(const struct qtr_tokenizer *t, const char *name, const json_t *test, const char *key, bool add,
                      bool parse) {
  const json_t *text = json_object_get(test, "text"), *expected = json_object_get(test, key);
  if (!expected) return;
  struct qtr_encode_options options = {add, parse};
  int32_t *ids;
  size_t n;
  struct qtr_error err;
  if (qtr_tokenizer_encode(t, json_string_value(text), json_string_length(text), &options, &ids, &n, &err)) {
    fail_msg("%s: %s", name, err.message);
  }
  bool same = n == json_array_size(expected);
  for (size_t i = 0; i < n && same; i++) same = ids[i] == json_integer_value(json_array_get(expected, i));
  if (!same) {
    char *shown = json_dumps(test, JSON_ENSURE_ASCII);
    print_error("%s, %s of %s\ngot", name, key, shown);
    for (size_t i = 0; i < n; i++) print_error(" %d", ids[i]);
    free(shown);
    fail_msg("ids differ");
  }
  free(ids);
}

/* Streams the ids: every push ends at a character, and all together equal the whole. */
static void check_stream(const struct qtr_tokenizer *t, const int32_t *ids, size_t n, bool skip, const char *whole,
                         size_t len) {
  struct qtr_detokenizer d;
  struct qtr_text out = {0};
  qtr_detokenizer_init(&d, t, skip);
  for (size_t i = 0; i < n; i++) {
    assert_int_equal(qtr_detokenizer_push(&d, ids[i], &out, NULL), QTR_OK);
    if (out.len > 0) assert_int_equal(qtr_utf8_valid_prefix(out.data, out.len), out.len);
  }
  assert_int_equal(qtr_detokenizer_end(&d, &out, NULL), QTR_OK);
  assert_int_equal(out.len, len);
  if (len > 0) assert_memory_equal(out.data, whole, len);
  qtr_text_free(&out);
}

static void check_decoding(const struct qtr_tokenizer *t, const char *name, const json_t *test) {
  const json_t *list = json_object_get(test, "ids"), *decoded = json_object_get(test, "decoded");
  size_t n = json_array_size(list), len;
  int32_t *ids = malloc((n + 1) * sizeof *ids);
  for (size_t i = 0; i < n; i++) ids[i] = (int32_t)json_integer_value(json_array_get(list, i));
  char *text;
  for (int skip = 0; skip < 2; skip++) {
    assert_int_equal(qtr_tokenizer_decode(t, ids, n, skip, &text, &len, NULL), QTR_OK);
    if (skip && decoded && (len != json_string_length(decoded) || memcmp(text, json_string_value(decoded), len) != 0)) {
      char *shown = json_dumps(test, JSON_ENSURE_ASCII);
      fail_msg("%s: \"%s\" from %s", name, text, shown);
    }
    check_stream(t, ids, n, skip, text, len);
    free(text);
  }
  free(ids);
}

static void check_cases(const char *name, const char *file) {
  char path[1024];
  struct qtr_tokenizer *t = open_golden(file);
  (void)snprintf(path, sizeof path, GOLDEN "%s.cases.json", name);
  json_t *cases = json_load_file(path, JSON_ALLOW_NUL, NULL);
  assert_true(json_array_size(cases) > 30);
  for (size_t i = 0; i < json_array_size(cases); i++) {
    const json_t *test = json_array_get(cases, i);
    bool plain = !json_object_get(test, "ids_parse"); /* SentencePiece's own encoder knows no options */
    check_ids(t, name, test, "ids", false, false);
    if (plain) continue;
    check_ids(t, name, test, "ids_parse", false, true);
    check_ids(t, name, test, "ids_add", true, false);
    check_ids(t, name, test, "ids_add_parse", true, true);
  }
  for (size_t i = 0; i < json_array_size(cases); i++) check_decoding(t, name, json_array_get(cases, i));
  json_decref(cases);
  qtr_tokenizer_close(t);
}

static void test_gpt2(void **state) {
  (void)state;
  check_cases("gpt2", "gpt2.json");
}
static void test_llama3(void **state) {
  (void)state;
  check_cases("llama3", "llama3.json");
}
static void test_qwen2(void **state) {
  (void)state;
  check_cases("qwen2", "qwen2.json");
}
static void test_llama2(void **state) {
  (void)state;
  check_cases("llama2", "llama2.json");
}
static void test_metaspace(void **state) {
  (void)state;
  check_cases("metaspace", "metaspace.json");
}
static void test_sentencepiece(void **state) {
  (void)state;
  check_cases("pieces-bytes", "pieces-bytes.model");
  check_cases("pieces-unknown", "pieces-unknown.model");
  check_cases("pieces-plain", "pieces-plain.model");
}

/* Where PCRE2 and the reference's Oniguruma differ: what a pattern matches is removed, the rest comes out as bytes. */
static void test_pattern_dialect(void **state) {
  (void)state;
  static const struct {
    const char *regex, *text, *rest;
  } cases[] = {
      {"\\s",
       "a\u00a0\xc2\x85\u180e"
       "b\u2028",
       "a\u180eb"},
      {"\\S+", "a\u180e b", " "},
      {"[^\\S\\n]", "a\u3000\nb ", "a\nb"},
      {"\\p{L}+", "a\U000323af\U0001e4d0.\U00010d4a", "."}, /* Unicode 15 and 16 */
      {"\\P{N}+", "x\U0001e4f1y\u00b2", "\U0001e4f1\u00b2"},
      {"\\p{Han}", "\u4e2d\U0002ebf0\u3001x", "\u3001x"}, /* by script, not by script extensions */
      {"\\w+", "a_\u0301\u24d0-\u00b2", "-\u00b2"},
      {"\\h", "f g\t", " g\t"}, /* a hexadecimal digit */
      {"[\\v]", "\n\v\f", "\n\f"},
      {"x{,2}y", "xxxy", "x"},
      {"\\p{N}{2}+", "12345", "5"}, /* one repetition of another, not a possessive one */
      {"(?i:'s)", "'S'\u017f's", ""},
      {"(?m:a.)", "a\nb", "b"}, /* m lets the dot match a line's end */
      {"a.", "a\nab", "a\n"},
      {"\\bcat\\b", "cat cats \u0301cat", " cats \u0301cat"},
      {"\\u0041\\x{42}\\x43", "ABCD", "D"},
      {"^a|b$", "a\nab\nb", "\n\n"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct qtr_text json = {0};
    struct qtr_error err;
    struct qtr_tokenizer *t;
    char item[1024];
    static const char head[] = "{\"model\":{\"type\":\"BPE\",\"merges\":[],\"vocab\":{";
    assert_int_equal(qtr_text_append(&json, head, sizeof head - 1, &err), QTR_OK);
    for (int b = 0; b < 256; b++) {
      char name[5] = {0};
      (void)qtr_utf8_encode(qtr_byte_to_char((uint8_t)b), name);
      int n = snprintf(item, sizeof item, "%s\"%s%s\":%d", b ? "," : "", b == '"' || b == '\\' ? "\\" : "", name, b);
      assert_int_equal(qtr_text_append(&json, item, (size_t)n, &err), QTR_OK);
    }
    char regex[64];
    size_t n_regex = 0;
    for (const char *c = cases[i].regex; *c; c++) {
      if (*c == '\\') regex[n_regex++] = '\\';
      regex[n_regex++] = *c;
    }
    regex[n_regex] = 0;
    int n = snprintf(
        item, sizeof item,
        "}},\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"behavior\":\"Removed\","
        "\"pattern\":{\"Regex\":\"%s\"}},{\"type\":\"ByteLevel\",\"use_regex\":false}]},\"decoder\":{\"type\":\"ByteLevel\"}"
        "}",
        regex);
    assert_int_equal(qtr_text_append(&json, item, (size_t)n, &err), QTR_OK);
    if (qtr_tokenizer_open_json(json.data, json.len, &t, &err)) fail_msg("%s: %s", cases[i].regex, err.message);
    struct qtr_encode_options options = {false, false};
    int32_t *ids;
    size_t n_ids, len;
    char *rest;
    assert_int_equal(qtr_tokenizer_encode(t, cases[i].text, strlen(cases[i].text), &options, &ids, &n_ids, &err), QTR_OK);
    assert_int_equal(qtr_tokenizer_decode(t, ids, n_ids, true, &rest, &len, &err), QTR_OK);
    if (strcmp(rest, cases[i].rest) != 0) fail_msg("%s leaves \"%s\", expected \"%s\"", cases[i].regex, rest, cases[i].rest);
    free(rest);
    free(ids);
    qtr_text_free(&json);
    qtr_tokenizer_close(t);
  }
}

/* Text without pre-tokenizer is cut before U+2581 only where no merge crosses. */
static void test_merge_across_mark(void **state) {
  (void)state;
  static const char json[] =
      "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"▁\":2,\"a▁\":3,\"▁b\":4},\"merges\":[\"a ▁\",\"▁ b\"]}}";
  struct qtr_tokenizer *t;
  struct qtr_encode_options options = {false, false};
  int32_t *ids;
  size_t n;
  assert_int_equal(qtr_tokenizer_open_json(json, sizeof json - 1, &t, NULL), QTR_OK);
  assert_int_equal(qtr_tokenizer_encode(t, "bbba▁b", 8, &options, &ids, &n, NULL), QTR_OK);
  assert_int_equal(n, 5);
  assert_int_equal(ids[3], 3);
  assert_int_equal(ids[4], 1);
  free(ids);
  qtr_tokenizer_close(t);
}

static void push_all(struct qtr_detokenizer *d, const int32_t *ids, size_t n, const char *const *expected) {
  for (size_t i = 0; i < n; i++) {
    struct qtr_text out = {0};
    assert_int_equal(qtr_detokenizer_push(d, ids[i], &out, NULL), QTR_OK);
    assert_string_equal(out.data ? out.data : "", expected[i]);
    qtr_text_free(&out);
  }
}

/* Byte tokens of Llama-2: 3 + byte. A llama and what cannot be one. */
static void test_stream_bytes(void **state) {
  (void)state;
  struct qtr_tokenizer *t = open_golden("llama2.json");
  struct qtr_detokenizer d;
  struct qtr_text out = {0};
  int32_t space_the = qtr_tokenizer_find(t, "▁the");
  assert_true(space_the > 0);
  const int32_t ids[] = {space_the, 3 + 0xf0, 3 + 0x9f, 3 + 0xa6, 3 + 0x99, 3 + 0xe4, 3 + 0xbd,
                         space_the, 3 + 0xff, 3 + 'a',  -1,       99999,    1};
  const char *const expected[] = {"the", "", "", "", "\U0001f999", "", "", "\ufffd\ufffd the", "\ufffd", "a", "", "", ""};
  qtr_detokenizer_init(&d, t, true);
  push_all(&d, ids, sizeof ids / sizeof *ids, expected);
  assert_int_equal(qtr_detokenizer_push(&d, 3 + 0xe4, &out, NULL), QTR_OK);
  assert_int_equal(out.len, 0);
  assert_int_equal(qtr_detokenizer_end(&d, &out, NULL), QTR_OK);
  assert_string_equal(out.data, "\ufffd");
  qtr_text_free(&out);
  qtr_tokenizer_close(t);
}

/* Byte level: one U+FFFD for each maximal subpart, as Rust's from_utf8_lossy. */
static void test_stream_byte_level(void **state) {
  (void)state;
  struct qtr_tokenizer *t = open_golden("llama3.json");
  struct qtr_detokenizer d;
  int32_t bytes[256];
  for (int i = 0; i < 256; i++) {
    char name[5] = {0};
    (void)qtr_utf8_encode(qtr_byte_to_char((uint8_t)i), name);
    bytes[i] = qtr_tokenizer_find(t, name);
    assert_true(bytes[i] >= 0);
  }
  const int32_t ids[] = {bytes[0xf0], bytes[0x9f], bytes[0xa6], bytes['x'],  bytes[0xe4],
                         bytes[0xc3], bytes[0xa9], bytes[0x80], bytes[0xed], bytes[0xa0]};
  const char *const expected[] = {"", "", "", "\ufffdx", "", "\ufffd", "\u00e9", "\ufffd", "", "\ufffd\ufffd"};
  qtr_detokenizer_init(&d, t, true);
  push_all(&d, ids, sizeof ids / sizeof *ids, expected);
  qtr_tokenizer_close(t);
}

static void test_properties(void **state) {
  (void)state;
  struct qtr_tokenizer *t = open_golden("llama3.json");
  size_t len;
  assert_int_equal(qtr_tokenizer_vocab_size(t), 420);
  assert_int_equal(qtr_tokenizer_bos(t), 0);
  assert_int_equal(qtr_tokenizer_eos(t), -1);
  assert_true(qtr_tokenizer_adds_bos(t));
  assert_int_equal(qtr_tokenizer_find(t, "<|eot_id|>"), 1);
  assert_int_equal(qtr_tokenizer_find(t, "no such token"), -1);
  assert_string_equal(qtr_tokenizer_token(t, 1, &len), "<|eot_id|>");
  assert_int_equal(len, 10);
  assert_null(qtr_tokenizer_token(t, 420, &len));
  assert_null(qtr_tokenizer_token(t, -1, &len));
  assert_true(qtr_tokenizer_is_special(t, 0));
  assert_false(qtr_tokenizer_is_special(t, 2));
  assert_false(qtr_tokenizer_is_special(t, 100000));
  qtr_tokenizer_close(t);

  t = open_golden("pieces-bytes.model");
  assert_int_equal(qtr_tokenizer_vocab_size(t), 400);
  assert_int_equal(qtr_tokenizer_bos(t), 1);
  assert_int_equal(qtr_tokenizer_eos(t), 2);
  assert_true(qtr_tokenizer_adds_bos(t));
  struct qtr_encode_options options = {true, true};
  int32_t *ids;
  size_t n;
  assert_int_equal(qtr_tokenizer_encode(t, "</s>the", 7, &options, &ids, &n, NULL), QTR_OK);
  assert_true(n >= 3 && ids[0] == 1 && ids[1] == 2);
  free(ids);
  qtr_tokenizer_close(t);
}

static void write_file(const char *dir, const char *name, const char *text, size_t len) {
  char path[1200];
  (void)snprintf(path, sizeof path, "%s/%s", dir, name);
  FILE *f = fopen(path, "wb");
  assert_non_null(f);
  assert_int_equal(fwrite(text, 1, len, f), len);
  assert_int_equal(fclose(f), 0);
}

static void write_text(const char *dir, const char *name, const char *text) { write_file(dir, name, text, strlen(text)); }

static void copy_golden(const char *dir, const char *name, const char *as) {
  char path[1024];
  static char data[1 << 20];
  (void)snprintf(path, sizeof path, GOLDEN "%s", name);
  FILE *f = fopen(path, "rb");
  assert_non_null(f);
  size_t n = fread(data, 1, sizeof data, f);
  (void)fclose(f);
  write_file(dir, as, data, n);
}

static void remove_dir(const char *dir) {
  static const char *const names[] = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json",
                                      "special_tokens_map.json", "added_tokens.json"};
  char path[1200];
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    (void)snprintf(path, sizeof path, "%s/%s", dir, names[i]);
    (void)unlink(path);
  }
  (void)rmdir(dir);
}

static size_t encode(const struct qtr_tokenizer *t, const char *text, bool add, int32_t out[16]) {
  struct qtr_encode_options options = {add, true};
  int32_t *ids;
  size_t n;
  assert_int_equal(qtr_tokenizer_encode(t, text, strlen(text), &options, &ids, &n, NULL), QTR_OK);
  assert_true(n <= 16);
  if (n > 0) memcpy(out, ids, n * sizeof *ids);
  free(ids);
  return n;
}

/* A directory: the configuration files decide about BOS, EOS and more tokens. */
static void test_directory(void **state) {
  (void)state;
  char dir[] = "/tmp/qtr-tokenizer-XXXXXX";
  struct qtr_tokenizer *t;
  struct qtr_error err;
  int32_t ids[16];
  assert_non_null(mkdtemp(dir));
  assert_int_equal(qtr_tokenizer_open(dir, &t, &err), QTR_ERR_NOT_FOUND);
  copy_golden(dir, "pieces-bytes.model", "tokenizer.model");
  const char model_config[] =
      "{\"added_tokens_decoder\": {\"400\": {\"content\": \"<|im_end|>\", \"special\": true},"
      "\"402\": {\"content\": \"<tool>\", \"special\": false}}, \"eos_token\": {\"content\": \"<|im_end|>\"},"
      "\"add_bos_token\": false, \"add_eos_token\": true}";
  write_text(dir, "tokenizer_config.json", model_config);
  write_text(dir, "special_tokens_map.json", "{\"bos_token\": \"</s>\"}");
  if (qtr_tokenizer_open(dir, &t, &err)) fail_msg("%s", err.message);
  assert_int_equal(qtr_tokenizer_bos(t), 2);
  assert_int_equal(qtr_tokenizer_eos(t), 400);
  assert_int_equal(qtr_tokenizer_vocab_size(t), 403);
  assert_false(qtr_tokenizer_adds_bos(t));
  assert_true(qtr_tokenizer_is_special(t, 400));
  size_t n = encode(t, "<tool><|im_end|>", true, ids);
  assert_int_equal(n, 3);
  assert_int_equal(ids[0], 402);
  assert_int_equal(ids[1], 400);
  assert_int_equal(ids[2], 400);
  qtr_tokenizer_close(t);

  /* tokenizer.json wins over tokenizer.model. */
  copy_golden(dir, "llama3.json", "tokenizer.json");
  const char json_config[] =
      "{\"bos_token\": \"<|eot_id|>\", \"eos_token\": null, \"add_eos_token\": true, \"add_bos_token\": null}";
  write_text(dir, "tokenizer_config.json", json_config);
  (void)unlink("special_tokens_map.json");
  write_text(dir, "special_tokens_map.json", "{}");
  if (qtr_tokenizer_open(dir, &t, &err)) fail_msg("%s", err.message);
  assert_int_equal(qtr_tokenizer_vocab_size(t), 420);
  assert_int_equal(qtr_tokenizer_bos(t), 1);
  assert_false(qtr_tokenizer_adds_bos(t)); /* its template puts another token first */
  n = encode(t, "a", true, ids);
  assert_int_equal(n, 2);
  assert_int_equal(ids[0], 0);
  qtr_tokenizer_close(t);

  write_text(dir, "tokenizer_config.json", "{\"bos_token\": \"<|begin_of_text|>\", \"add_bos_token\": false}");
  if (qtr_tokenizer_open(dir, &t, &err)) fail_msg("%s", err.message);
  assert_int_equal(encode(t, "a", true, ids), 1);
  qtr_tokenizer_close(t);

  write_text(dir, "tokenizer_config.json", "{\"bos_token\": ");
  assert_int_equal(qtr_tokenizer_open(dir, &t, &err), QTR_ERR_FORMAT);
  assert_non_null(strstr(err.message, "tokenizer_config.json"));
  assert_null(t);
  remove_dir(dir);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_gpt2),
      cmocka_unit_test(test_llama3),
      cmocka_unit_test(test_qwen2),
      cmocka_unit_test(test_llama2),
      cmocka_unit_test(test_metaspace),
      cmocka_unit_test(test_sentencepiece),
      cmocka_unit_test(test_stream_bytes),
      cmocka_unit_test(test_stream_byte_level),
      cmocka_unit_test(test_properties),
      cmocka_unit_test(test_directory),
      cmocka_unit_test(test_pattern_dialect),
      cmocka_unit_test(test_merge_across_mark),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
