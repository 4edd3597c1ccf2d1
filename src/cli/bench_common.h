/* bench_common.h - what the speed benchmarks of `quattuor bench` share: options, where the weights come from, and the model
 * made of them. */
#ifndef QTR_CLI_BENCH_COMMON_H
#define QTR_CLI_BENCH_COMMON_H

#include "cli/cli.h"
#include "model/model.h"

#define QTR_BENCH_MAX_ROUNDS 100

struct qtr_bench_flags {
  struct qtr_model_flags model;
  const char *config, *quant_path, *lm_head, *kv_granularity, *lengths, *svg;
  int32_t batch, prompt_len, gen_len, rounds, chunk_prefill;
  uint64_t seed;
  bool has_seed, json, profile, benchmarking, ifb_mode, omit_prompt, long_contexts, dense, sparse;
};

struct qtr_bench_source {
  char *dir;    /* of the model; NULL with --config */
  char *config; /* path of the shape */
  bool random;  /* there are no weights: random ones of that shape */
  const char *name;
};

/* What --config, --quant-path and --model say. */
enum qtr_status qtr_bench_find(const struct qtr_bench_flags *flags, struct qtr_bench_source *source, struct qtr_error *err);
void qtr_bench_source_free(struct qtr_bench_source *source);

/* Engine options for prompts of prompt_len tokens: no prefix cache, and unless somebody says otherwise exactly the pages
 * that the batch needs. Strings are borrowed. */
enum qtr_status qtr_bench_engine_options(const struct qtr_bench_flags *flags, const struct qtr_bench_source *source,
                                         int32_t prompt_len, struct qtr_engine_options *options, struct qtr_error *err);

/* The model on a backend of its own, for sequences of max_len tokens. The lengths of config.json bound nothing: what the
 * model says there is not looked at. Random weights are w4a8kv4 unless options->precision says otherwise, and then it does.
 */
enum qtr_status qtr_bench_model(const struct qtr_bench_flags *flags, const struct qtr_bench_source *source,
                                struct qtr_engine_options *options, int32_t max_len, struct qtr_model **model,
                                struct qtr_error *err);
void qtr_bench_model_free(struct qtr_model *model); /* and its backend; NULL is allowed */

/* Numbers for a model without full_attention_heads.tsv: random ones, always the same for a seed and a shape. *heads
 * (n_layers, n_kv_heads) is malloc'ed. */
enum qtr_status qtr_bench_random_heads(const struct qtr_config *config, uint64_t seed, double **heads,
                                       struct qtr_error *err);

/* `quattuor bench --long` (bench_long.c). */
int qtr_bench_long(const struct qtr_bench_flags *flags);

#endif
