/* A loaded model costs its weights once, plus 5 %, and an engine at work nothing beyond what it announced.
 *
 * The measure is what the process holds and another process could not use: anonymous memory (the repacked weights) plus the
 * resident pages of the model's own files (the embedding, which stays mapped; whatever else was read and not let go). Pages
 * of program and libraries do not count: they do not grow with the model. It is compared with the bytes of all tensors in
 * the file. A backend may borrow mapped pages, or copy them and let them go; doing both is a second copy, and fails. The
 * `reference` backend is left out: the oracle keeps four-bit weights as bytes. */
#include "base/checked.h"
#include "engine_fixture.h"
#include "shared.h"

#include <malloc.h>
#include <sys/prctl.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED 1
#endif
#endif
#ifndef SANITIZED
#define SANITIZED 0 /* sanitizers keep what is freed and add shadows of everything */
#endif

/* Resident bytes: anonymous ones of all mappings, and those of files that end in .safetensors. */
struct held {
  size_t anonymous, mapped;
};

static struct held held(void) {
  (void)malloc_trim(0); /* what is free in the heap is not the model's */
  struct held h = {0};
  FILE *f = fopen("/proc/self/smaps", "r");
  if (!f) return h;
  char line[1024];
  bool model = false;
  while (fgets(line, sizeof line, f)) {
    size_t kib, from, to;
    if (sscanf(line, "%zx-%zx ", &from, &to) == 2) model = strstr(line, ".safetensors") != NULL;
    if (sscanf(line, "Anonymous: %zu kB", &kib) == 1) h.anonymous += kib * 1024;
    if (model && sscanf(line, "Rss: %zu kB", &kib) == 1) h.mapped += kib * 1024;
  }
  fclose(f);
  return h;
}

static double mib(size_t n) { return (double)n / (1 << 20); }

/* Every row of the embedding is read, and with it every page of the table: 64 new ids a step. */
static void use_whole_vocabulary(struct qtr_model *model) {
  struct qtr_error err = {0};
  enum { STEP = QTR_PAGE_TOKENS };
  const struct qtr_kv_config config = {.format = QTR_KV_INT4,
                                       .n_layers = model->config.n_layers,
                                       .n_kv_heads = model->config.n_kv_heads,
                                       .head_dim = model->config.head_dim,
                                       .n_pages = 1};
  struct qtr_kv *kv;
  struct qtr_workspace *workspace;
  if (model->backend->ops->kv_create(model->backend, &config, &kv, &err) ||
      qtr_workspace_create(model, STEP, 1, &workspace, &err)) {
    fail_msg("%s", err.message);
  }
  int32_t token[STEP], position[STEP], row = STEP - 1, page = 0, cached = 0;
  const int32_t q_start[2] = {0, STEP};
  for (int32_t first = 0; first < model->config.vocab_size; first += STEP) {
    for (int32_t i = 0; i < STEP; i++) {
      token[i] = QTR_MIN(first + i, model->config.vocab_size - 1);
      position[i] = i;
    }
    const struct qtr_batch batch = {.n_tokens = STEP,
                                    .n_seqs = 1,
                                    .n_logit_rows = 1,
                                    .max_blocks = 1,
                                    .token = token,
                                    .position = position,
                                    .q_start = q_start,
                                    .kv_len = &cached,
                                    .block_table = &page,
                                    .logit_row = &row};
    const float *logits;
    if (qtr_model_forward(model, kv, workspace, &batch, &logits, &err)) fail_msg("%s", err.message);
  }
  qtr_workspace_free(workspace);
  model->backend->ops->kv_free(model->backend, kv);
}

static void check_model(const char *dir) {
  struct qtr_error err = {0};
  struct qtr_backend *backend = NULL;
  struct qtr_model *model = NULL;
  const struct qtr_backend_options backend_options = {.threads = 2};
  const struct qtr_model_options options = {.quiet = true};
  if (qtr_backend_open("cpu", &backend_options, &backend, &err)) fail_msg("%s", err.message);
  /* The backend's working memory stays from model to model and is not part of one: a first one leaves it behind. */
  if (qtr_model_load(dir, backend, &options, &model, &err)) fail_msg("%s", err.message);
  use_whole_vocabulary(model);
  qtr_model_free(model);
  struct held before = held();
  assert_true(before.anonymous > 0 && before.mapped == 0);
  if (qtr_model_load(dir, backend, &options, &model, &err)) fail_msg("%s", err.message);

  size_t weights = 0, shared = 0; /* bytes of the file; of them those that serve as embedding and as head */
  for (size_t i = 0; i < qtr_checkpoint_count(model->checkpoint); i++) {
    weights += qtr_checkpoint_at(model->checkpoint, i)->n_bytes;
  }
  const struct qtr_tensor *embed = qtr_checkpoint_find(model->checkpoint, "model.embed_tokens.weight");
  assert_non_null(embed);
  if (!qtr_checkpoint_find(model->checkpoint, "lm_head.weight")) shared = embed->n_bytes;

  struct held loaded = held();
  use_whole_vocabulary(model);
  struct held used = held();
  size_t cost_loaded = loaded.anonymous - before.anonymous + loaded.mapped;
  size_t cost_used = used.anonymous - before.anonymous + used.mapped;
  print_message("%s: weights %.2f MiB; loaded %.2f + %.2f mapped (%.3f), all used %.2f + %.2f mapped (%.3f)\n", dir,
                mib(weights), mib(loaded.anonymous - before.anonymous), mib(loaded.mapped),
                (double)cost_loaded / (double)weights, mib(used.anonymous - before.anonymous), mib(used.mapped),
                (double)cost_used / (double)weights);
  assert_true((double)cost_loaded <= 1.05 * (double)weights);
  /* A matrix that is embedding and head at once is repacked as head, and its rows are read from the file: pages that the
   * kernel takes back when it needs them. A model that is stored with a head of its own has no such pages. */
  assert_true((double)cost_used <= 1.05 * (double)weights + (double)shared);
  /* All of it is there, or the measure sees nothing. */
  assert_true((double)cost_used >= 0.97 * (double)(weights + shared));
  assert_true(used.mapped + 65536 >= embed->n_bytes);
  /* What the model says of itself. */
  assert_in_range(model->weight_bytes, (size_t)(0.97 * (double)(weights + shared)),
                  (size_t)(1.05 * (double)(weights + shared)));
  qtr_model_free(model);
  struct held after = held();
  qtr_backend_close(backend);
  assert_int_equal(after.mapped, 0);
  assert_true((double)after.anonymous - (double)before.anonymous < 0.05 * (double)weights);
}

static void test_weights_once(void **state) {
  (void)state;
  if (SANITIZED) skip();
  check_model(QTR_SOURCE_DIR "/models/demo");
}

static void test_weights_once_tied(void **state) {
  (void)state;
  const char *dir = qtr_test_shared("models/demo-bf16");
  if (SANITIZED || !dir) skip();
  check_model(dir);
}

/* 40 requests of up to 200 tokens through a pool of 40 pages. */
static void work(struct qtr_engine *engine) {
  struct qtr_error err = {0};
  struct qtr_event event;
  int32_t prompt[160];
  for (int32_t i = 0; i < 160; i++) prompt[i] = 300 + i * 7;
  for (int32_t i = 0; i < 40; i++) {
    struct qtr_request_options o;
    uint64_t id;
    qtr_request_options_init(&o);
    prompt[0] = 1000 + i; /* no prefix in common */
    o.prompt_token = prompt;
    o.n_prompt_token = (size_t)(40 + 3 * i);
    o.max_tokens = 40;
    o.ignore_eos = true;
    o.sampling.temperature = 0;
    if (qtr_engine_add(engine, &o, &id, &err)) fail_msg("%s", err.message);
  }
  for (bool more = true; more;) {
    if (qtr_engine_step(engine, &more, &err)) fail_msg("%s", err.message);
    while (qtr_engine_poll(engine, &event)) {
    }
  }
}

static void test_engine_at_work(void **state) {
  (void)state;
  if (SANITIZED) skip();
  struct qtr_error err = {0};
  struct qtr_engine *engine = NULL;
  struct qtr_engine_options options;
  struct qtr_stats stats;
  qtr_engine_options_init(&options);
  options.model_dir = QTR_SOURCE_DIR "/models/demo";
  options.device = "cpu";
  options.threads = 2;
  options.kv_pages = 40;
  options.max_model_len = 512;
  options.max_num_seqs = 16;
  struct held before = held();
  if (qtr_engine_open(&options, &engine, &err)) fail_msg("%s", err.message);
  work(engine);
  struct held first = held();
  qtr_engine_stats(engine, &stats);
  assert_int_equal(stats.kv_pool_bytes, (size_t)136 * 4 * 8 * 64 * 40);
  assert_true(stats.n_preemptions > 0 || stats.n_pages_cached > 20); /* the whole pool was in use */
  size_t workspace = qtr_workspace_bytes(engine->workspace);
  size_t announced = stats.weight_bytes + stats.kv_pool_bytes + workspace;
  size_t cost = first.anonymous - before.anonymous + first.mapped;
  print_message("engine: %.2f MiB; announced %.2f of weights, %.2f of KV, %.2f of workspace\n", mib(cost),
                mib(stats.weight_bytes), mib(stats.kv_pool_bytes), mib(workspace));
  /* Tokenizer, threads' working memory, requests: fixed, whatever the model. */
  assert_true((double)cost <= 1.05 * (double)announced + (8 << 20));
  for (int i = 0; i < 3; i++) work(engine);
  struct held last = held();
  print_message("after three times more of the same: %+.2f MiB\n", mib(last.anonymous) - mib(first.anonymous));
  assert_true(last.anonymous < first.anonymous + (256 << 10)); /* nothing stays of a request */
  qtr_engine_close(engine);
}

/* Where the system makes huge pages of everything ("always"), stacks and heap are resident in pieces of 2 MiB whatever this
 * program does: then there shall be none here. With "madvise" they are where the backend wants them, and count. */
static void settle_huge_pages(void) {
  char mode[64] = "";
  FILE *f = fopen("/sys/kernel/mm/transparent_hugepage/enabled", "r");
  if (!f) return;
  if (fgets(mode, sizeof mode, f) && strstr(mode, "[always]")) (void)prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
  fclose(f);
}

int main(void) {
  settle_huge_pages();
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_weights_once), cmocka_unit_test(test_weights_once_tied),
                                     cmocka_unit_test(test_engine_at_work)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
