/* engine_fixture.h - an engine over a tiny model with random weights, on the reference backend unless said otherwise: no
 * files, no tokenizer. With QTR_TEST_AHEAD in the environment the backend is one that works on its own (ahead_backend.h). */
#ifndef QTR_TESTS_ENGINE_FIXTURE_H
#define QTR_TESTS_ENGINE_FIXTURE_H

#include "ahead_backend.h"
#include "base/checked.h"
#include "engine/engine_internal.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define TINY_VOCAB 256
#define TINY_EOS 6 /* ids 0 … 5 end a text: about one token in 43 */

/* Steps that are planned beyond the one that a call of qtr_engine_step gives the results of. */
static inline int steps_ahead(void) { return getenv("QTR_TEST_AHEAD") != NULL; }

/* Random weights of a shape, on a backend of their own; what every tiny shape has alike is filled in. */
static inline struct qtr_model *tiny_model_shaped(const char *device, struct qtr_config config,
                                                  enum qtr_linear_format format, bool head_int8, uint64_t seed) {
  (void)snprintf(config.architecture, sizeof config.architecture, "LlamaForCausalLM");
  config.vocab_size = TINY_VOCAB;
  config.rms_norm_eps = 1e-5f;
  config.rope_theta = 10000;
  config.bos_token = config.pad_token = -1;
  struct qtr_backend *backend = NULL;
  struct qtr_model *model = NULL;
  struct qtr_error err = {0};
  const struct qtr_backend_options backend_options = {.threads = 2};
  const struct qtr_model_options model_options = {.quiet = true};
  if (qtr_backend_open(device, &backend_options, &backend, &err) ||
      qtr_model_random(&config, format, head_int8, seed, backend, &model_options, &model, &err)) {
    fail_msg("%s", err.message);
  }
  if (steps_ahead() > 0) ahead_wrap(backend, TINY_VOCAB);
  return model;
}

static inline struct qtr_model *tiny_model_seeded(const char *device, enum qtr_linear_format format, uint64_t seed) {
  struct qtr_config config = {.hidden_size = 32,
                              .intermediate_size = 32,
                              .n_layers = 2,
                              .n_heads = 2,
                              .n_kv_heads = 1,
                              .head_dim = 32,
                              .max_position_embeddings = 1024,
                              .n_eos = TINY_EOS};
  for (int32_t i = 0; i < TINY_EOS; i++) config.eos_token[i] = i;
  return tiny_model_shaped(device, config, format, false, seed);
}

static inline struct qtr_model *tiny_model_on(const char *device, enum qtr_linear_format format) {
  return tiny_model_seeded(device, format, 11);
}

static inline struct qtr_model *tiny_model(enum qtr_linear_format format) { return tiny_model_on("reference", format); }

static inline struct qtr_engine *tiny_engine(struct qtr_model *model, const struct qtr_engine_options *options) {
  struct qtr_engine *engine = NULL;
  struct qtr_error err = {0};
  if (qtr_engine_open_model(model, NULL, NULL, options, &engine, &err)) fail_msg("%s", err.message);
  return engine;
}

/* The batch that was planned last. */
static inline const struct qtr_batch *last_batch(const struct qtr_engine *engine) {
  return &engine->pass[engine->pass[1].launched].batch;
}

/* A step that must go well; whether there is more to do. */
static inline bool tiny_step(struct qtr_engine *engine) {
  struct qtr_error err = {0};
  bool work;
  if (qtr_engine_step(engine, &work, &err)) fail_msg("%s", err.message);
  return work;
}

/* Runs until nothing is left. */
static inline void drain(struct qtr_engine *engine) {
  while (tiny_step(engine)) continue;
}

/* The state after everything has ended: no page used, pool consistent, nothing queued. */
static inline void assert_idle(struct qtr_engine *engine) {
  struct qtr_stats stats;
  struct qtr_error err = {0};
  qtr_engine_stats(engine, &stats);
  if (!qtr_kv_pool_check(engine->pool, &err)) fail_msg("%s", err.message);
  assert_int_equal(stats.n_pages_used, 0);
  assert_int_equal(stats.n_running, 0);
  assert_int_equal(stats.n_waiting, 0);
  for (size_t i = 0; i < QTR_ID_SLOTS; i++) assert_null(engine->by_id[i]);
}

#endif
