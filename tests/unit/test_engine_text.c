/* Text out of tokens: events carry whole characters, hold back what may begin a stop string, and end where a reader of
 * single characters would see the first stop string, however the tokens cut text and characters. Scripted tokens go straight
 * into qtr_sequence_accept; the expectation comes from the plain detokenised text. A byte-level vocabulary is written for
 * the test. */
#include "engine_fixture.h"

#include <jansson.h>
#include <sys/stat.h>
#include <unistd.h>

enum { END = 256, PAIRS = 257 }; /* ids: a byte each, one special token, pairs of bytes */

static struct qtr_tokenizer *tokenizer;
static struct qtr_engine fake;
static char dir[] = "/tmp/quattuor-test-XXXXXX";

static uint64_t state = 88172645463325252u;
static int pick(int n) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return (int)((state >> 20) % (uint64_t)n);
}

/* GPT-2's printable stand-in for a byte, as UTF-8. */
static void stand_in(int byte, char *out) {
  int code = byte, n = 0;
  bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
  if (!printable) {
    for (int i = 0; i < byte; i++) n += !((i >= 33 && i <= 126) || (i >= 161 && i <= 172) || i >= 174);
    code = 256 + n;
  }
  if (code < 128)
    (void)snprintf(out, 3, "%c", code);
  else
    (void)snprintf(out, 3, "%c%c", 0xC0 | code >> 6, 0x80 | (code & 63));
}

static const char *const pairs[] = {"ab", "bc", "ca", "aa", "\xC3\xA9", "\xE2\x82", "\xAC\xE2", "b\xC3", " a", "\n\n"};
#define N_PAIRS ((int)(sizeof pairs / sizeof pairs[0]))

static void write_tokenizer(const char *path) {
  json_t *vocab = json_object(), *merges = json_array();
  for (int i = 0; i < 256; i++) {
    char name[3];
    stand_in(i, name);
    json_object_set_new(vocab, name, json_integer(i));
  }
  for (int i = 0; i < N_PAIRS; i++) {
    char a[3], b[3], name[8], merge[8];
    stand_in((unsigned char)pairs[i][0], a);
    stand_in((unsigned char)pairs[i][1], b);
    (void)snprintf(name, sizeof name, "%s%s", a, b);
    (void)snprintf(merge, sizeof merge, "%s %s", a, b);
    json_object_set_new(vocab, name, json_integer(PAIRS + i));
    json_array_append_new(merges, json_string(merge));
  }
  json_t *root = json_pack(
      "{s:s,s:n,s:n,s:[{s:i,s:s,s:b,s:b,s:b,s:b,s:b}],s:n,s:{s:s,s:b,s:b,s:b},s:n,s:{s:s,s:b,s:b,s:b},"
      "s:{s:s,s:n,s:n,s:n,s:n,s:b,s:b,s:o,s:o}}",
      "version", "1.0", "truncation", "padding", "added_tokens", "id", END, "content", "<|end|>", "single_word", 0, "lstrip",
      0, "rstrip", 0, "normalized", 0, "special", 1, "normalizer", "pre_tokenizer", "type", "ByteLevel", "add_prefix_space",
      0, "trim_offsets", 1, "use_regex", 1, "post_processor", "decoder", "type", "ByteLevel", "add_prefix_space", 0,
      "trim_offsets", 1, "use_regex", 1, "model", "type", "BPE", "dropout", "unk_token", "continuing_subword_prefix",
      "end_of_word_suffix", "fuse_unk", 0, "byte_fallback", 0, "vocab", vocab, "merges", merges);
  assert_non_null(root);
  assert_int_equal(json_dump_file(root, path, 0), 0);
  json_decref(root);
}

static int setup(void **unused) {
  (void)unused;
  struct qtr_error err = {0};
  char path[64];
  assert_non_null(mkdtemp(dir));
  (void)snprintf(path, sizeof path, "%s/tokenizer.json", dir);
  write_tokenizer(path);
  if (qtr_tokenizer_open(path, &tokenizer, &err)) fail_msg("%s", err.message);
  assert_int_equal(unlink(path), 0);
  assert_int_equal(rmdir(dir), 0);
  fake.tokenizer = tokenizer;
  fake.vocab_size = PAIRS + N_PAIRS;
  fake.max_model_len = 4096;
  fake.n_pages = 64;
  fake.eos_token[0] = END;
  fake.n_eos = 1;
  return 0;
}

static int teardown(void **unused) {
  (void)unused;
  if (tokenizer) qtr_tokenizer_close(tokenizer);
  return 0;
}

/* ---- one completion by script ---- */

struct script {
  int32_t token[200];
  int n;
  const char *stop[4];
  int n_stop;
};

/* End of the first stop string to complete in text[0 … len), 0 for none; *start: where its longest begins. */
static size_t first_stop(const struct script *s, const char *text, size_t len, size_t *start) {
  for (size_t end = 1; end <= len; end++) {
    size_t begin = SIZE_MAX;
    for (int i = 0; i < s->n_stop; i++) {
      size_t n = strlen(s->stop[i]);
      if (n <= end && memcmp(text + end - n, s->stop[i], n) == 0) begin = QTR_MIN(begin, end - n);
    }
    if (begin < SIZE_MAX) {
      *start = begin;
      return end;
    }
  }
  return 0;
}

/* How much of the text may be told: all but the longest end that is the beginning of a stop string. */
static size_t tellable(const struct script *s, const char *text, size_t len) {
  for (size_t at = 0; at < len; at++) {
    for (int i = 0; i < s->n_stop; i++) {
      if (len - at < strlen(s->stop[i]) && memcmp(text + at, s->stop[i], len - at) == 0) return at;
    }
  }
  return len;
}

static void run_script(const struct script *s) {
  struct qtr_request_options o;
  struct qtr_request *r = NULL;
  struct qtr_error err = {0};
  const int32_t prompt[] = {'x'};
  qtr_request_options_init(&o);
  o.stop = s->stop;
  o.n_stop = (size_t)s->n_stop;
  o.max_tokens = s->n;
  if (qtr_request_create(&fake, &o, prompt, 1, &r, &err)) fail_msg("%s", err.message);
  struct qtr_sequence *seq = &r->sequence[0];
  assert_true(qtr_sequence_prepare(seq));

  struct qtr_event_node node = {0};
  struct qtr_detokenizer plain;
  struct qtr_text text = {0}, told = {0};
  qtr_detokenizer_init(&plain, tokenizer, true);
  plain.at_start = false;
  for (int i = 0; i < s->n; i++) {
    bool last = i == s->n - 1, eos = s->token[i] == END;
    if (!eos) assert_int_equal(qtr_detokenizer_push(&plain, s->token[i], &text, NULL), QTR_OK);
    if (last || eos) assert_int_equal(qtr_detokenizer_end(&plain, &text, NULL), QTR_OK);
    size_t start = 0, end = first_stop(s, text.data ? text.data : "", text.len, &start);
    enum qtr_finish finish = end || eos ? QTR_FINISH_STOP : last ? QTR_FINISH_LENGTH : QTR_FINISH_NONE;
    size_t expected = end ? start : finish ? text.len : tellable(s, text.data ? text.data : "", text.len);

    node.text.len = 0;
    qtr_sequence_accept(&fake, seq, &(struct qtr_sample_result){.token = s->token[i]}, &node);
    assert_int_equal(qtr_text_append(&told, node.text.data ? node.text.data : "", node.text.len, NULL), QTR_OK);
    assert_int_equal(seq->finish, finish);
    assert_int_equal(node.event.token, s->token[i]);
    assert_int_equal(node.event.n_output_tokens, i + 1); /* tokens of the stop string count */
    if (told.len != expected || memcmp(told.data, text.data ? text.data : "", expected) != 0) {
      fail_msg("after token %d: told \"%s\", expected %zu bytes of \"%s\"", i, told.data, expected, text.data);
    }
    assert_true(node.text.len == 0 ||
                ((unsigned char)node.text.data[0] & 0xC0) != 0x80); /* begins and ends with characters */
    if (finish) break;
  }
  qtr_text_free(&node.text);
  qtr_text_free(&text);
  qtr_text_free(&told);
  qtr_request_free(r);
}

static void test_stops_across_tokens(void **unused) {
  (void)unused;
  run_script(&(struct script){.token = {'a', 'b', 'c', 'd'}, .n = 4, .stop = {"bc"}, .n_stop = 1});
  run_script(&(struct script){.token = {'a', PAIRS + 0, PAIRS + 1, 'd'}, .n = 4, .stop = {"abbc"}, .n_stop = 1});
  run_script(
      &(struct script){.token = {'a', 'a', 'a', 'b'}, .n = 4, .stop = {"aab"}, .n_stop = 1}); /* overlapping beginnings */
  run_script(&(struct script){.token = {PAIRS + 0, PAIRS + 1}, .n = 2, .stop = {"abbcx", "bb"}, .n_stop = 2});
  run_script(&(struct script){
      .token = {'a', 'b', 'c', 'd'}, .n = 4, .stop = {"abcd", "bc"}, .n_stop = 2}); /* the one that ends first */
  run_script(&(struct script){
      .token = {'x', 'a', 'b'}, .n = 3, .stop = {"abc"}, .n_stop = 1}); /* held back, then told at the end */
  run_script(&(struct script){.token = {'x', 'a', 'b', END, 'q'}, .n = 5, .stop = {"abc"}, .n_stop = 1});
  run_script(&(struct script){.token = {'h', END, 'q'}, .n = 3});
}

static void test_characters_across_tokens(void **unused) {
  (void)unused;
  run_script(&(struct script){.token = {0xE2, 0x82, 0xAC, 'x'}, .n = 4, .stop = {"€"}, .n_stop = 1});
  run_script(&(struct script){.token = {PAIRS + 5, PAIRS + 6, 0x82, 0xAC}, .n = 4, .stop = {"€€"}, .n_stop = 1});
  run_script(&(struct script){.token = {PAIRS + 7, 0xA9, 'b', 0xC3}, .n = 4, .stop = {"éb"}, .n_stop = 1});
  run_script(
      &(struct script){.token = {0xC3, 0xA8, 0xC3, 0xA9}, .n = 4, .stop = {"é"}, .n_stop = 1}); /* the same first byte */
  run_script(&(struct script){.token = {0xE2, 0x82}, .n = 2, .stop = {"€"}, .n_stop = 1});      /* ends inside a character */
  run_script(&(struct script){.token = {0xFF, 'a', 0xC3, 'b'}, .n = 4});                        /* no characters at all */
}

static void test_random_scripts(void **unused) {
  (void)unused;
  static const char *const stops[] = {"ab",  "abc",  "bca",  "aab", "é",    "€", "bé",
                                      "a a", "\n\n", "aaaa", "€é",  "caab", " ", "b\n"};
  static const int32_t common[] = {'a', 'b', 'c', ' ', '\n', 0xC3, 0xA9, 0xE2, 0x82, 0xAC};
  for (int round = 0; round < 20000; round++) {
    struct script s = {.n = 1 + pick(40), .n_stop = pick(4)};
    for (int i = 0; i < s.n; i++) {
      int kind = pick(40);
      s.token[i] = kind == 0 ? END : kind == 1 ? pick(256) : kind < 12 ? PAIRS + pick(N_PAIRS) : common[pick(10)];
    }
    for (int i = 0; i < s.n_stop; i++) s.stop[i] = stops[pick(14)];
    run_script(&s);
  }
}

static void test_bad_stops(void **unused) {
  (void)unused;
  char longest[258];
  memset(longest, 'x', sizeof longest);
  longest[257] = 0;
  const char *const bad[] = {"", longest, "\xC3", "a\x80", "\xED\xA0\x80", NULL};
  const char *const words[] = {"no text", "more than 256", "UTF-8", "UTF-8", "UTF-8", "NULL"};
  const int32_t prompt[] = {'x'};
  for (int i = 0; i < 6; i++) {
    struct qtr_request_options o;
    struct qtr_request *r = NULL;
    struct qtr_error err = {0};
    qtr_request_options_init(&o);
    o.stop = &bad[i];
    o.n_stop = 1;
    assert_int_equal(qtr_request_create(&fake, &o, prompt, 1, &r, &err), QTR_ERR_ARGUMENT);
    assert_non_null(strstr(err.message, words[i]));
    assert_null(r);
  }
}

/* ---- through an engine ---- */

/* A text prompt in, text out: the pieces of the events are the text of the tokens. The engine owns what it is given, so it
 * gets a tokenizer of its own by taking the test's. */
static void test_text_events(void **unused) {
  (void)unused;
  struct qtr_engine *engine = NULL;
  struct qtr_error err = {0};
  struct qtr_engine_options options = {.max_num_seqs = 4};
  struct qtr_model *model = tiny_model(QTR_LINEAR_F32);
  if (qtr_engine_open_model(model, tokenizer, NULL, &options, &engine, &err)) fail_msg("%s", err.message);
  tokenizer = NULL;

  struct qtr_request_options o;
  uint64_t id;
  qtr_request_options_init(&o);
  o.prompt = "xyzq <|end|>";
  o.prompt_len = strlen(o.prompt);
  o.max_tokens = 60;
  o.ignore_eos = true;
  o.sampling.has_seed = true;
  assert_int_equal(qtr_engine_add(engine, &o, &id, &err), QTR_OK);
  o.parse_special = true;                                                    /* one token instead of seven */
  assert_int_equal(qtr_engine_add(engine, &o, &id, &err), QTR_ERR_ARGUMENT); /* id 256 is beyond the tiny vocabulary */
  assert_non_null(strstr(err.message, "256"));
  int32_t token[60], n = 0, n_prompt = 0;
  struct qtr_text text = {0};
  struct qtr_event e = {0};
  for (bool work = true; work;) {
    assert_int_equal(qtr_engine_step(engine, &work, &err), QTR_OK);
    while (qtr_engine_poll(engine, &e)) {
      token[n++] = e.token;
      n_prompt = e.n_prompt_tokens;
      assert_int_equal(strlen(e.text), e.text_len);
      assert_int_equal(qtr_text_append(&text, e.text, e.text_len, NULL), QTR_OK);
    }
  }
  assert_int_equal(e.finish, QTR_FINISH_LENGTH);
  assert_int_equal(n, 60);
  char *decoded;
  size_t len;
  assert_int_equal(qtr_engine_detokenize(engine, token, 60, &decoded, &len, &err), QTR_OK);
  assert_int_equal(len, text.len);
  assert_memory_equal(decoded, text.data, len);
  free(decoded);
  qtr_text_free(&text);
  int32_t *ids;
  size_t n_ids;
  assert_int_equal(qtr_engine_tokenize(engine, "xyzq <|end|>", 12, true, false, &ids, &n_ids, &err), QTR_OK);
  assert_int_equal(n_ids, (size_t)n_prompt);
  free(ids);
  char *prompt;
  assert_int_equal(qtr_engine_apply_chat_template(engine, "[]", NULL, true, &prompt, &err), QTR_ERR_NOT_FOUND);
  qtr_engine_close(engine);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_stops_across_tokens), cmocka_unit_test(test_characters_across_tokens),
      cmocka_unit_test(test_random_scripts),      cmocka_unit_test(test_bad_stops),
      cmocka_unit_test(test_text_events),
  };
  return cmocka_run_group_tests(tests, setup, teardown);
}
