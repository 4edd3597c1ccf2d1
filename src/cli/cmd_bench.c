/* cmd_bench.c - `quattuor bench`: QServe's speed protocol (spec D.8.1) on a model, or on random weights of a shape. QServe's
 * own spellings and variables work (D.7, D.9); none of them is needed. */
#include "base/status.h"
#include "cli/bench_common.h"
#include "cli/bench_serve.h"
#include "cli/profile_report.h"
#include "engine/engine_internal.h"
#include "eval/bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define AT(field) offsetof(struct qtr_bench_flags, field)
#define NOT_SAID (-1.0f) /* --static-sparsity; no value of it */

static const struct qtr_option own_options[] = {
    {.name = "config",
     .argument = "FILE",
     .kind = QTR_OPTION_STRING,
     .offset = AT(config),
     .help = "A config.json: random weights of that shape, no model needed (shapes/ has some)."},
    {.name = "lm-head",
     .kind = QTR_OPTION_CHOICE,
     .offset = AT(lm_head),
     .choices = "fp16|int8",
     .help = "The output matrix of random weights. Default fp16, as QServe has it."},
    {.name = "batch",
     .argument = "B",
     .kind = QTR_OPTION_INT,
     .offset = AT(batch),
     .min = 1,
     .max = 65536,
     .help = "Sequences at once. Default $GLOBAL_BATCH_SIZE, else 1."},
    {.name = "prompt-len",
     .argument = "P",
     .kind = QTR_OPTION_INT,
     .offset = AT(prompt_len),
     .min = 1,
     .max = 1 << 24,
     .help = "Random tokens in each prompt. Default $GLOBAL_PROMPT_LEN, else 1024."},
    {.name = "gen-len",
     .argument = "G",
     .kind = QTR_OPTION_INT,
     .offset = AT(gen_len),
     .min = 1,
     .max = 1 << 24,
     .help = "Tokens generated for each. Default $GLOBAL_GENERATE_LEN, else 512, with --long 128."},
    {.name = "rounds",
     .argument = "R",
     .kind = QTR_OPTION_INT,
     .offset = AT(rounds),
     .min = 1,
     .max = QTR_BENCH_MAX_ROUNDS,
     .help = "Default 3. Of several rounds the first warms up; the result is the median of the others. With --long a short "
             "run warms up, and all count."},
    {.name = "seed",
     .argument = "S",
     .kind = QTR_OPTION_UINT64,
     .offset = AT(seed),
     .given = AT(has_seed),
     .help = "Of the random prompts and weights. Default 0."},
    {.name = "long",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(long_contexts),
     .help = "LServe's protocol: prefill and decode over context lengths, dense against sparse, rounds in turn. The sparse "
             "side is what the options below say; without --static-sparsity, --sparse-context-mode and "
             "--sparse-decode-mode: 0.5, on and 1."},
    {.name = "lengths",
     .argument = "LIST",
     .kind = QTR_OPTION_STRING,
     .offset = AT(lengths),
     .help = "With --long: tokens of a prompt. Default 4096,8192,16384,32768."},
    {.name = "dense", .kind = QTR_OPTION_FLAG, .offset = AT(dense), .help = "With --long: this side only."},
    {.name = "sparse", .kind = QTR_OPTION_FLAG, .offset = AT(sparse), .help = "With --long: this side only."},
    {.name = "svg", .argument = "FILE", .kind = QTR_OPTION_STRING, .offset = AT(svg), .help = "With --long: writes a plot."},
    {.name = "profile",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(profile),
     .help = "Time, bytes and operations of each kind of operation, against this machine's memory speed."},
    {.name = "json",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(json),
     .help = "One object: model, precision, group_size, batch, prompt_len, gen_len, throughput_tok_s, prefill_s, "
             "decode_ms_per_step, decode_tok_s, kv_bytes_per_token, weight_bytes, peak_rss_bytes, device, rounds."},
    {0}};

static const struct qtr_option qserve_options[] = {
    {.name = "quant-path",
     .argument = "DIR",
     .kind = QTR_OPTION_STRING,
     .offset = AT(quant_path),
     .help = "Directory of the quantised weights: the same as --model DIR."},
    {.name = "kv-quant-granularity",
     .kind = QTR_OPTION_CHOICE,
     .offset = AT(kv_granularity),
     .choices = "fine_grained|per_tensor",
     .help = "per_tensor: the same as --kv-scales static."},
    {.name = "chunk-prefill-size",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(chunk_prefill),
     .min = 1,
     .max = 1 << 30,
     .help = "Accepted; steps are bounded by --max-num-batched-tokens."},
    {.name = "benchmarking", .kind = QTR_OPTION_FLAG, .offset = AT(benchmarking), .help = "Accepted; always so."},
    {.name = "ifb-mode", .kind = QTR_OPTION_FLAG, .offset = AT(ifb_mode), .help = "Accepted; always so."},
    {.name = "omit-prompt", .kind = QTR_OPTION_FLAG, .offset = AT(omit_prompt), .help = "Accepted; always so."},
    {0}};
#undef AT

static enum qtr_status open_any(const struct qtr_bench_flags *flags, const struct qtr_bench_source *source,
                                struct qtr_engine **engine, struct qtr_error *err) {
  struct qtr_engine_options options;
  struct qtr_model *model = NULL;
  double *heads = NULL;
  enum qtr_status status = qtr_bench_engine_options(flags, source, flags->prompt_len, &options, err);
  if (status) return status;
  if (!source->random) return qtr_engine_open(&options, engine, err);
  status = qtr_bench_model(flags, source, &options, options.max_model_len, &model, err);
  if (status) return status;
  if (options.sparse.static_sparsity > 0 && !options.sparse.heads_dir) {
    status = qtr_bench_random_heads(&model->config, flags->seed, &heads, err);
    options.sparse.heads = heads;
  }
  if (!status) status = qtr_engine_open_model(model, NULL, NULL, &options, engine, err);
  free(heads);
  if (status) qtr_bench_model_free(model);
  return status;
}

static int compare_rounds(const void *a, const void *b) {
  const struct qtr_bench_round *x = a, *y = b;
  return (x->throughput_tok_s > y->throughput_tok_s) - (x->throughput_tok_s < y->throughput_tok_s);
}

/* The round of median throughput, the first left out when there are others (of two, the slower). Its figures belong
 * together. */
static struct qtr_bench_round median_round(const struct qtr_bench_round *round, int32_t n) {
  struct qtr_bench_round sorted[QTR_BENCH_MAX_ROUNDS];
  size_t first = n > 1, count = (size_t)n - first;
  memcpy(sorted, round + first, count * sizeof *sorted);
  qsort(sorted, count, sizeof *sorted, compare_rounds);
  return sorted[(count - 1) / 2];
}

static json_t *round_json(const struct qtr_bench_round *r) {
  return json_pack("{s:o, s:o, s:o, s:o, s:o}", "device_idle_share", qtr_json_number(r->device_idle_share, 4),
                   "throughput_tok_s", qtr_json_number(r->throughput_tok_s, 6), "prefill_s",
                   qtr_json_number(r->prefill_s, 6), "decode_ms_per_step", qtr_json_number(r->decode_ms_per_step, 6),
                   "decode_tok_s", qtr_json_number(r->decode_tok_s, 6));
}

/* Prints the result; round: (flags->rounds) */
static bool print_result(const struct qtr_bench_flags *flags, struct qtr_engine *engine, const char *name,
                         const struct qtr_bench_round *round, const struct qtr_profile *profile) {
  struct qtr_bench_round r = median_round(round, flags->rounds);
  struct qtr_engine_info info;
  struct qtr_stats stats;
  struct qtr_caps caps;
  qtr_engine_get_info(engine, &info);
  qtr_engine_stats(engine, &stats);
  engine->model->backend->ops->caps(engine->model->backend, &caps);
  size_t peak = qtr_peak_rss(); /* before the stream below */
  struct qtr_backend *b = engine->model->backend;
  double memory_speed = !profile ? 0 : b->ops->copy_speed ? b->ops->copy_speed(b) : qtr_measure_memory_speed(info.threads);
  if (!flags->json) {
    char weights[32], rss[32];
    printf("%s: %s, group %d, batch %d, prompt %d, generate %d, %s\n", name, info.precision, info.group_size, flags->batch,
           flags->prompt_len, flags->gen_len, caps.description);
    printf("  throughput %10.1f tokens/s\n  prefill    %10.3f s (%.1f tokens/s)\n", r.throughput_tok_s, r.prefill_s,
           (double)flags->batch * flags->prompt_len / r.prefill_s);
    if (r.n_decode_steps) printf("  decode     %10.2f ms a step (%.1f tokens/s)\n", r.decode_ms_per_step, r.decode_tok_s);
    if (r.device_idle_share >= 0)
      printf("  the GPU waits %5.2f %% of the time between decode steps\n", 100 * r.device_idle_share);
    printf("  weights %s, KV %zu bytes a token, peak resident %s\n", qtr_show_bytes(stats.weight_bytes, weights),
           stats.kv_bytes_per_token, qtr_show_bytes(peak, rss));
    if (r.n_preemptions)
      printf("  %llu preemptions: the KV pool is too small for this batch\n", (unsigned long long)r.n_preemptions);
    if (profile) qtr_profile_print(profile, memory_speed);
    return qtr_finish_output("bench");
  }
  json_t *rounds = json_array();
  for (int32_t i = 0; i < flags->rounds; i++) json_array_append_new(rounds, round_json(&round[i]));
  json_t *o = round_json(&r);
  json_object_update_new(
      o, json_pack("{s:s, s:s, s:i, s:i, s:i, s:i, s:I, s:I, s:I, s:s, s:s, s:i, s:I, s:o}", "model", name, "precision",
                   info.precision, "group_size", (int)info.group_size, "batch", (int)flags->batch, "prompt_len",
                   (int)flags->prompt_len, "gen_len", (int)flags->gen_len, "kv_bytes_per_token",
                   (json_int_t)stats.kv_bytes_per_token, "weight_bytes", (json_int_t)stats.weight_bytes, "peak_rss_bytes",
                   (json_int_t)peak, "device", info.device, "device_name", caps.description, "threads", (int)info.threads,
                   "n_preemptions", (json_int_t)r.n_preemptions, "rounds", rounds));
  if (profile) json_object_set_new(o, "profile", qtr_profile_json(profile, memory_speed));
  return qtr_print_json("bench", o);
}

static int bench(const struct qtr_bench_flags *flags) {
  struct qtr_error err;
  struct qtr_engine *engine = NULL;
  struct qtr_bench_round round[QTR_BENCH_MAX_ROUNDS];
  struct qtr_profile profile = {0};
  struct qtr_bench_source source = {0};
  int code = QTR_EXIT_FAILURE;
  enum qtr_status status = qtr_bench_find(flags, &source, &err);
  if (!status) status = open_any(flags, &source, &engine, &err);
  if (!engine) goto done;
  for (int32_t i = 0; i < flags->rounds && !status; i++) {
    const struct qtr_bench_options options = {.batch = flags->batch,
                                              .prompt_len = flags->prompt_len,
                                              .gen_len = flags->gen_len,
                                              .seed = flags->seed + (uint64_t)i + 1};
    bool last = i + 1 == flags->rounds;
    if (flags->profile && last) engine->model->profile = &profile;
    if (!last) (void)fprintf(stderr, "[Warmup Round %d]\n", i); /* QServe's words */
    status = qtr_bench_round_run(engine, &options, &round[i], &err);
    if (!status) (void)fprintf(stderr, "Round %d Throughput: %g tokens / second.\n", i, round[i].throughput_tok_s);
  }
  engine->model->profile = NULL;
  if (!status && print_result(flags, engine, source.name, round, flags->profile ? &profile : NULL)) code = QTR_EXIT_OK;
done:
  if (status) (void)qtr_report("bench", &err);
  qtr_engine_close(engine);
  qtr_bench_source_free(&source);
  return code;
}

/* Options that were not given come from QServe's variables, then from its defaults. */
static enum qtr_status fill_defaults(struct qtr_bench_flags *flags, struct qtr_error *err) {
  const struct {
    const char *name;
    int32_t *value, otherwise;
  } from[] = {{"GLOBAL_BATCH_SIZE", &flags->batch, 1},
              {"GLOBAL_PROMPT_LEN", &flags->prompt_len, 1024},
              {"GLOBAL_GENERATE_LEN", &flags->gen_len, flags->long_contexts ? 128 : 512}};
  for (size_t i = 0; i < sizeof from / sizeof from[0]; i++) {
    if (*from[i].value) continue;
    enum qtr_status status = qtr_env_int(from[i].name, from[i].value, err);
    if (status) return status;
    if (*from[i].value > 1 << 24) {
      return qtr_fail(err, QTR_ERR_ARGUMENT, "the variable %s is %d: at most %d", from[i].name, *from[i].value, 1 << 24);
    }
    if (*from[i].value == 0) *from[i].value = from[i].otherwise;
  }
  struct qtr_model_flags *m = &flags->model;
  bool said = m->sparse.static_sparsity >= 0 || m->sparse.context_mode || m->sparse_decode_mode;
  if (m->sparse.static_sparsity < 0) m->sparse.static_sparsity = 0;
  if (flags->long_contexts && !said) { /* LServe's own (spec D.8.5) */
    m->sparse.static_sparsity = 0.5f;
    m->sparse.context_mode = true;
    m->sparse_decode_mode = "1";
  }
  return QTR_OK;
}

/* NULL: these options go together. */
static const char *find_conflict(const struct qtr_bench_flags *f) {
  if (f->config && (f->model.model || f->quant_path))
    return "--config means random weights: leave out --model and --quant-path";
  if (!f->long_contexts && (f->lengths || f->dense || f->sparse || f->svg))
    return "--lengths, --dense, --sparse and --svg go with --long";
  if (f->long_contexts && f->prompt_len) return "--long takes --lengths, not --prompt-len";
  if (f->long_contexts && f->profile) return "--profile goes without --long: give one length with --prompt-len";
  return NULL;
}

int qtr_cmd_bench(int argc, char **argv) {
  if (argc > 1 && strcmp(argv[1], "serve") == 0) return qtr_bench_serve(argc - 1, argv + 1);
  struct qtr_bench_flags flags = {.rounds = 3};
  qtr_model_flags_init(&flags.model);
  flags.model.sparse.static_sparsity = NOT_SAID;
  const struct qtr_option_group groups[] = {{"What is measured", own_options, &flags},
                                            {"Model and engine", qtr_model_options_table, &flags.model},
                                            {"QServe's spellings", qserve_options, &flags}};
  struct qtr_command_line line = {
      .command = "bench",
      .usage = "bench [--model DIR | --config FILE] [--batch B] [--prompt-len P] [--gen-len G] [options]",
      .about =
          "Measures speed by QServe's protocol: B prompts of P random tokens, G tokens generated for each, greedy, nothing "
          "stops early. Reading the prompts and generating are timed apart. Without weights in the directory, or with "
          "--config, the weights are random: w4a8kv4 in groups of 128 unless --precision and --group-size say otherwise. "
          "--long compares sparse attention with dense over context lengths. quattuor bench serve measures a server.",
      .group = groups,
      .n_groups = 3};
  struct qtr_error err;
  const char *conflict;
  int code = QTR_EXIT_USAGE;
  switch (qtr_options_parse(&line, argc, argv)) {
    case QTR_PARSE_OK:
      if ((conflict = find_conflict(&flags))) {
        (void)fprintf(stderr, "quattuor bench: %s\n", conflict);
      } else if (fill_defaults(&flags, &err)) {
        (void)qtr_report("bench", &err);
      } else {
        code = flags.long_contexts ? qtr_bench_long(&flags) : bench(&flags);
      }
      break;
    case QTR_PARSE_HELP: code = qtr_finish_output("bench") ? QTR_EXIT_OK : QTR_EXIT_FAILURE; break;
    case QTR_PARSE_ERROR: break;
  }
  qtr_options_free(&line);
  return code;
}
