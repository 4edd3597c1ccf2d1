/* The public interface on a real model (the demo model in bf16, outside the repository): open, chat template, text in and
 * out, and the same answer alone and among 31 others. Skipped where the model is absent. */
#include "quattuor/quattuor.h"
#include "shared.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

enum { N = 32, MAX_TOKENS = 24 };

struct answer {
  char text[1024];
  int32_t token[MAX_TOKENS], n;
  enum qtr_finish finish;
};

static struct qtr_engine *engine;

static void add(const char *prompt, int i, struct answer *answer) {
  struct qtr_request_options o;
  struct qtr_error err = {0};
  uint64_t id;
  qtr_request_options_init(&o);
  o.prompt = prompt;
  o.prompt_len = strlen(prompt);
  o.no_bos = o.parse_special = strstr(prompt, "<|im_start|>") != NULL; /* a rendered template has its BOS */
  o.max_tokens = 4 + i % (MAX_TOKENS - 3);
  o.sampling.temperature = i % 2 ? 0.8f : 0.0f;
  o.sampling.has_seed = true;
  o.sampling.seed = (uint64_t)i;
  o.user = answer;
  if (qtr_engine_add(engine, &o, &id, &err)) fail_msg("%s", err.message);
}

static void run(void) {
  struct qtr_error err = {0};
  struct qtr_event e;
  for (bool work = true; work;) {
    if (qtr_engine_step(engine, &work, &err)) fail_msg("%s", err.message);
    while (qtr_engine_poll(engine, &e)) {
      struct answer *a = e.user;
      a->token[a->n++] = e.token;
      a->finish = e.finish;
      size_t len = strlen(a->text);
      (void)snprintf(a->text + len, sizeof a->text - len, "%s", e.text);
    }
  }
}

static void test_alone_and_among_others(void **unused) {
  (void)unused;
  const char *dir = qtr_test_shared("models/demo-bf16");
  if (!dir) skip();
  struct qtr_error err = {0};
  struct qtr_engine_options options;
  qtr_engine_options_init(&options);
  options.model_dir = dir;
  options.precision = "w16a16kv4";
  options.kv_pages = 200;
  if (qtr_engine_open(&options, &engine, &err)) fail_msg("%s", err.message);

  static const char *const starts[] = {"Once upon a time", "The captain of the", "It was a dark night, and",
                                       "\"Sir,\" said she"};
  static struct answer alone[N], together[N];
  static char prompt[N][2048];
  for (int i = 0; i < N; i++) {
    if (i % 4 == 3) {
      char *chat;
      if (qtr_engine_apply_chat_template(engine, "[{\"role\":\"user\",\"content\":\"I need a table for two, please.\"}]",
                                         NULL, true, &chat, &err)) {
        fail_msg("%s", err.message);
      }
      (void)snprintf(prompt[i], sizeof prompt[i], "%s", chat);
      free(chat);
    } else {
      for (int k = 0; k <= i; k++) { /* lengths from a few tokens to several pages */
        size_t len = strlen(prompt[i]);
        (void)snprintf(prompt[i] + len, sizeof prompt[i] - len, "%s%s", k ? ". " : "", starts[(i + k) % 4]);
      }
    }
    add(prompt[i], i, &alone[i]);
    run();
    assert_true(alone[i].n > 0 && (alone[i].finish == QTR_FINISH_LENGTH || alone[i].finish == QTR_FINISH_STOP));
    char *decoded;
    size_t len;
    int32_t n = alone[i].n - (alone[i].finish == QTR_FINISH_STOP); /* the end token is no text */
    assert_int_equal(qtr_engine_detokenize(engine, alone[i].token, (size_t)n, &decoded, &len, &err), QTR_OK);
    assert_string_equal(decoded, alone[i].text);
    free(decoded);
  }
  for (int i = 0; i < N; i++) add(prompt[i], i, &together[i]);
  run();
  for (int i = 0; i < N; i++) {
    assert_int_equal(alone[i].n, together[i].n);
    assert_memory_equal(alone[i].token, together[i].token, sizeof alone[i].token);
    assert_string_equal(alone[i].text, together[i].text);
  }
  struct qtr_stats stats;
  qtr_engine_stats(engine, &stats);
  assert_int_equal(stats.kv_bytes_per_token, 136 * 4 * 8); /* heads and layers of the demo model */
  assert_int_equal(stats.n_pages_used, 0);
  qtr_engine_close(engine);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_alone_and_among_others)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
