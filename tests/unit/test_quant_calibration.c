/* Calibration sets (spec F.2): chosen by the seed and nothing else, whole blocks of a text, lines of JSON stripped and
 * cropped, errors that say what is wrong and what would be enough. */
#include "base/checked.h"
#include "quant/calibration.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

#include "quant_fixture.h"

struct place {
  char *root, path[256];
  struct qtr_tokenizer *tokenizer;
};

static int open_place(void **state) {
  struct place *p = calloc(1, sizeof *p);
  struct qtr_error err;
  *state = p;
  return p && (p->root = fixture_make_root()) &&
                 qtr_tokenizer_open(QTR_SOURCE_DIR "/models/demo", &p->tokenizer, &err) == QTR_OK
             ? 0
             : -1;
}

static int close_place(void **state) {
  struct place *p = *state;
  qtr_tokenizer_close(p->tokenizer);
  fixture_remove(p->root);
  free(p);
  return 0;
}

static const char *put(struct place *p, const char *name, const char *text) {
  (void)snprintf(p->path, sizeof p->path, "%s/%s", p->root, name);
  assert_int_equal(qtr_file_write(p->path, text, strlen(text), NULL), QTR_OK);
  return p->path;
}

static void read_set(struct place *p, const char *path, size_t n, size_t length, uint64_t seed, struct qtr_calibration *c) {
  struct qtr_error err;
  if (qtr_calibration_read(path, p->tokenizer, n, length, seed, c, &err)) fail_msg("%s", err.message);
  assert_int_equal(c->n_samples, n);
  assert_int_equal(c->length, length);
}

static void refused(struct place *p, const char *path, size_t n, size_t length, enum qtr_status status, const char *says) {
  struct qtr_error err = {0};
  struct qtr_calibration c;
  enum qtr_status got = qtr_calibration_read(path, p->tokenizer, n, length, 1, &c, &err);
  if (got != status || !strstr(err.message, says))
    fail_msg("%s: \"%s\", not \"%s\"", qtr_status_name(got), err.message, says);
}

static int32_t *tokens_of(struct place *p, const char *text, size_t *n) {
  const struct qtr_encode_options plain = {.add_special = false};
  int32_t *ids;
  assert_int_equal(qtr_tokenizer_encode(p->tokenizer, text, strlen(text), &plain, &ids, n, NULL), QTR_OK);
  return ids;
}

/* Words in a fixed disorder. */
static char *long_text(size_t n_words) {
  static const char *const words[] = {"The",    " old",    " man", " walked", " along",
                                      " seven", " rivers", ",\n",  " and",    " slept."};
  char *text = calloc(n_words, 10);
  uint64_t random = 2;
  assert_non_null(text);
  for (size_t i = 0, at = 0; i < n_words; i++) {
    const char *word = words[qtr_random_below(&random, 10)];
    memcpy(text + at, word, strlen(word));
    at += strlen(word);
  }
  return text;
}

static void test_text(void **state) {
  struct place *p = *state;
  enum { SAMPLES = 6, LENGTH = 32, BLOCK = LENGTH - 1 };
  char *text = long_text(1500);
  const char *path = put(p, "text.txt", text);
  size_t n;
  int32_t *all = tokens_of(p, text, &n), bos = qtr_tokenizer_bos(p->tokenizer);
  assert_true(qtr_tokenizer_adds_bos(p->tokenizer) && bos >= 0 && n / BLOCK > 2 * SAMPLES);
  struct qtr_calibration a, b, c;
  read_set(p, path, SAMPLES, LENGTH, 7, &a);
  read_set(p, path, SAMPLES, LENGTH, 7, &b);
  read_set(p, path, SAMPLES, LENGTH, 8, &c);
  assert_memory_equal(a.token, b.token, SAMPLES * LENGTH * sizeof *a.token);
  assert_true(a.hash == b.hash && a.hash != c.hash);
  size_t from[SAMPLES];
  bool in_order = true;
  for (size_t s = 0; s < SAMPLES; s++) { /* each a block of the text, none twice */
    const int32_t *sample = a.token + s * LENGTH;
    assert_int_equal(sample[0], bos);
    for (from[s] = 0; from[s] < n / BLOCK; from[s]++) {
      if (memcmp(sample + 1, all + from[s] * BLOCK, BLOCK * sizeof *all) == 0) break;
    }
    if (from[s] == n / BLOCK) fail_msg("sample %zu is no block of the text", s);
    for (size_t k = 0; k < s; k++) assert_int_not_equal(from[k], from[s]);
    in_order &= s == 0 || from[s] > from[s - 1];
  }
  assert_false(in_order);
  qtr_calibration_free(&b);
  read_set(p, path, n / BLOCK, LENGTH, 7, &b); /* as many as there are */
  qtr_calibration_free(&b);
  char wanted[96];
  (void)snprintf(wanted, sizeof wanted, "%zu tokens: enough for %zu samples of %d, not for %zu", n, n / BLOCK, (int)LENGTH,
                 n / BLOCK + 1);
  refused(p, path, n / BLOCK + 1, LENGTH, QTR_ERR_LIMIT, wanted);
  refused(p, put(p, "empty.txt", ""), 1, LENGTH, QTR_ERR_LIMIT, "0 tokens");
  refused(p, "no-such-file.txt", 1, LENGTH, QTR_ERR_NOT_FOUND, "no-such-file.txt");
  qtr_calibration_free(&a);
  qtr_calibration_free(&c);
  free(all);
  free(text);
}

/* Short texts, stripped, each behind its BOS, in an order that the seed chooses; what is too much at the end is cut. */
static void test_lines(void **state) {
  struct place *p = *state;
  const char *path = put(p, "short.jsonl",
                         "{\"text\": \"  The old man.  \\n\"}\n\n{\"id\": 1, \"text\": \"Seven rivers\"}\r\n"
                         "{\"text\": \"   \"}\n{\"text\": \"And slept all night\"}");
  static const char *const texts[] = {"The old man.", "Seven rivers", "And slept all night"};
  size_t n[3], total = 3;
  int32_t *ids[3], bos = qtr_tokenizer_bos(p->tokenizer);
  for (size_t i = 0; i < 3; i++) {
    ids[i] = tokens_of(p, texts[i], &n[i]);
    total += n[i];
  }
  struct qtr_calibration c;
  bool first_seen[3] = {false};
  for (uint64_t seed = 0; seed < 40; seed++) {
    read_set(p, path, 1, total, seed, &c);
    bool used[3] = {false};
    for (size_t at = 0, k = 0; at < total; k++) { /* must be the three texts in some order */
      assert_int_equal(c.token[at++], bos);
      size_t i = 0;
      while (i < 3 && (used[i] || at + n[i] > total || memcmp(c.token + at, ids[i], n[i] * sizeof *ids[i]))) i++;
      if (i == 3) fail_msg("seed %d: no text at %zu", (int)seed, at);
      used[i] = true;
      first_seen[i] |= k == 0;
      at += n[i];
    }
    qtr_calibration_free(&c);
  }
  assert_true(first_seen[0] && first_seen[1] && first_seen[2]);
  read_set(p, path, 2, total / 2 - 1, 3, &c); /* samples are cut from one stream */
  assert_int_equal(c.token[0], bos);
  qtr_calibration_free(&c);
  refused(p, path, 1, total + 1, QTR_ERR_LIMIT, "enough for 0 samples");
  for (size_t i = 0; i < 3; i++) free(ids[i]);
}

/* Longer texts give one run of `length` tokens from a place that the seed chooses. */
static void test_crop(void **state) {
  struct place *p = *state;
  enum { LENGTH = 24 };
  char *text = long_text(400), *line = calloc(1, 2 * strlen(text) + 32), *to = line;
  assert_non_null(line);
  to += sprintf(to, "{\"text\": \"");
  for (const char *c = text; *c; c++) {
    if (*c == '\n')
      to += sprintf(to, "\\n");
    else
      *to++ = *c;
  }
  (void)sprintf(to, "\"}\n");
  while (*text && text[strlen(text) - 1] == '\n') text[strlen(text) - 1] = 0; /* stripped */
  const char *path = put(p, "long.jsonl", line);
  size_t n, n_places = 0, last = SIZE_MAX;
  int32_t *all = tokens_of(p, text, &n);
  assert_true(n > 4 * LENGTH);
  for (uint64_t seed = 0; seed < 8; seed++) {
    struct qtr_calibration c;
    read_set(p, path, 1, LENGTH, seed, &c);
    assert_int_equal(c.token[0], qtr_tokenizer_bos(p->tokenizer));
    size_t at = 0;
    while (at + LENGTH - 1 <= n && memcmp(c.token + 1, all + at, (LENGTH - 1) * sizeof *all)) at++;
    if (at + LENGTH - 1 > n) fail_msg("seed %d: no run of the text", (int)seed);
    n_places += at != last;
    last = at;
    qtr_calibration_free(&c);
  }
  assert_true(n_places > 4);
  refused(p, path, 2, LENGTH, QTR_ERR_LIMIT, "24 tokens: enough for 1 samples of 24, not for 2"); /* one text, one crop */
  free(all);
  free(text);
  free(line);
}

static void test_bad_lines(void **state) {
  struct place *p = *state;
  static const struct {
    const char *text, *says;
  } bad[] = {{"{\"text\": \"a\"}\n{\"text\": 5}\n", "line 2"},
             {"{\"text\": \"a\"}\n\n[1]\n", "line 3"},
             {"{\"text\": \"a\n", "line 1"},
             {"{\"txt\": \"a\"}", "line 1"},
             {"{\"text\": \"\xff\"}", "line 1"}};
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    const char *path = put(p, "bad.jsonl", bad[i].text);
    refused(p, path, 1, 64, QTR_ERR_FORMAT, bad[i].says);
    refused(p, path, 1, 64, QTR_ERR_FORMAT, "bad.jsonl");
  }
  refused(p, put(p, "none.jsonl", ""), 1, 64, QTR_ERR_LIMIT, "0 tokens");
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_text), cmocka_unit_test(test_lines), cmocka_unit_test(test_crop),
                                     cmocka_unit_test(test_bad_lines)};
  return cmocka_run_group_tests(tests, open_place, close_place);
}
