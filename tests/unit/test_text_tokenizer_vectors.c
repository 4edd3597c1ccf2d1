/* The real vocabularies, where the shared data is there: the 47 + 47 expected encodings, and the WikiText-2 test set, whose
 * ids are known by count and FNV-1a hash from PyPI tokenizers and sentencepiece. */
#include "base/file.h"
#include "shared.h"
#include "text/tokenizer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

static struct qtr_tokenizer *open_shared(const char *name) {
  const char *path = qtr_test_shared(name);
  if (!path) skip();
  struct qtr_tokenizer *t = NULL;
  struct qtr_error err;
  if (qtr_tokenizer_open(path, &t, &err)) fail_msg("%s", err.message);
  return t;
}

static char *read_shared(const char *name, size_t *len) {
  const char *path = qtr_test_shared(name);
  if (!path) skip();
  char *data;
  assert_int_equal(qtr_file_read(path, 64 << 20, &data, len, NULL), QTR_OK);
  return data;
}

static const struct qtr_encode_options plain = {false, true};

static void check_text(const struct qtr_tokenizer *t, int number, const char *text, size_t len, const char *expected) {
  int32_t *ids;
  size_t n;
  assert_int_equal(qtr_tokenizer_encode(t, text, len, &plain, &ids, &n, NULL), QTR_OK);
  for (size_t i = 0; i < n; i++) {
    char *end;
    long id = strtol(expected, &end, 10);
    if (end == expected || id != ids[i]) fail_msg("text %d, token %zu: %d, expected \"%.30s\"", number, i, ids[i], expected);
    expected = end;
  }
  if (strspn(expected, " \n") != strlen(expected)) fail_msg("text %d: tokens are missing: %s", number, expected);
  free(ids);
}

static void check_vectors(const char *tokenizer, const char *inputs, const char *outputs) {
  static const char separator[] = "\n__ggml_vocab_test__\n";
  struct qtr_tokenizer *t = open_shared(tokenizer);
  size_t in_len, out_len;
  char *in = read_shared(inputs, &in_len), *out = read_shared(outputs, &out_len), *line = out;
  int n = 0;
  for (char *at = in; at;) {
    char *end = strstr(at, separator), *line_end = line ? strchr(line, '\n') : NULL;
    assert_non_null(line);
    if (line_end) *line_end = 0;
    check_text(t, n++, at, end ? (size_t)(end - at) : strlen(at), line);
    line = line_end ? line_end + 1 : NULL;
    at = end ? end + strlen(separator) : NULL;
  }
  assert_int_equal(n, 47);
  free(in);
  free(out);
  qtr_tokenizer_close(t);
}

static void test_llama3(void **state) {
  (void)state;
  check_vectors("data/tokenizers/llama-3.tokenizer.json", "data/tokenizers/llama-bpe.inp", "data/tokenizers/llama-bpe.out");
}
static void test_llama2(void **state) {
  (void)state;
  check_vectors("data/tokenizers/llama-2.tokenizer.json", "data/tokenizers/llama-spm.inp", "data/tokenizers/llama-spm.out");
}
static void test_llama2_model(void **state) {
  (void)state;
  check_vectors("data/tokenizers/llama-2.tokenizer.model", "data/tokenizers/llama-spm.inp", "data/tokenizers/llama-spm.out");
}

static void test_wikitext(void **state) {
  (void)state;
  static const struct {
    const char *name;
    size_t n;
    uint64_t hash;
  } known[] = {{"data/tokenizers/llama-3.tokenizer.json", 288936, 0x3ee3aeafecc80ede},
               {"data/tokenizers/llama-2.tokenizer.json", 332754, 0xfd0215156cb67be7},
               {"data/tokenizers/llama-2.tokenizer.model", 332754, 0xfd0215156cb67be7},
               {"models/demo-bf16/tokenizer.json", 393659, 0xe146e80d83371fca}};
  size_t len, n, back_len;
  char *text = read_shared("data/text/wikitext-2-raw-test.txt", &len);
  for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
    struct qtr_tokenizer *t = open_shared(known[i].name);
    int32_t *ids;
    char *back;
    assert_int_equal(qtr_tokenizer_encode(t, text, len, &plain, &ids, &n, NULL), QTR_OK);
    assert_int_equal(n, known[i].n);
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t k = 0; k < n; k++) hash = (hash ^ (uint64_t)ids[k]) * 0x100000001b3u;
    assert_true(hash == known[i].hash);
    assert_int_equal(qtr_tokenizer_decode(t, ids, n, true, &back, &back_len, NULL), QTR_OK);
    assert_int_equal(back_len, len);
    assert_memory_equal(back, text, len);
    free(back);
    free(ids);
    qtr_tokenizer_close(t);
  }
  free(text);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_llama3),
      cmocka_unit_test(test_llama2),
      cmocka_unit_test(test_llama2_model),
      cmocka_unit_test(test_wikitext),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
