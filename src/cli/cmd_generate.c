/* cmd_generate.c - `quattuor generate`: completes one prompt, streaming, or many at once by in-flight batching. Every prompt
 * is queued before the first step; completions are printed in the order of the prompts, each as soon as it and all before it
 * have ended. */
#include "base/clock.h"
#include "base/progress.h"
#include "base/status.h"
#include "cli/cli.h"
#include "cli/prompts.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct flags {
  struct qtr_model_flags model;
  struct qtr_sampling_flags sampling;
  struct qtr_option_list prompt;
  const char *prompts_file, *system;
  bool chat, parse_special, json;
};

#define AT(field) offsetof(struct flags, field)
static const struct qtr_option own_options[] = {
    {.name = "prompt",
     .argument = "TEXT",
     .kind = QTR_OPTION_LIST,
     .offset = AT(prompt),
     .help = "A prompt; may be repeated: all are answered at once."},
    {.name = "prompts-file",
     .argument = "FILE",
     .kind = QTR_OPTION_STRING,
     .offset = AT(prompts_file),
     .help = "JSON Lines with id and prompt, or id and messages (a conversation, rendered by the model's chat template; "
             "tools too). - is standard input."},
    {.name = "chat",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(chat),
     .help = "Prompts are a user's turn: the model's chat template is put around them."},
    {.name = "system",
     .argument = "TEXT",
     .kind = QTR_OPTION_STRING,
     .offset = AT(system),
     .help = "System message before the user's turn (with --chat)."},
    {.name = "parse-special",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(parse_special),
     .help = "Special tokens written in plain prompts become their ids."},
    {.name = "n",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(sampling.n),
     .min = 1,
     .max = 64,
     .help = "Completions of each prompt. Default 1."},
    {.name = "logprobs",
     .argument = "K",
     .kind = QTR_OPTION_INT,
     .offset = AT(sampling.logprobs),
     .min = 0,
     .max = 20,
     .help = "With --json: log-probability of each token and of the K best ones."},
    {.name = "json",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(json),
     .help = "One object a line: id, index, prompt_tokens, cached_tokens, token_ids, text, finish_reason, logprobs."},
    {0}};
#undef AT

/* One completion: prompt `job`, number `index` of its n. */
struct completion {
  int32_t *token; /* (n_tokens) */
  size_t n_tokens, token_capacity;
  char *text; /* (len) */
  size_t len, capacity;
  json_t *logprobs;
  int32_t n_prompt_tokens, n_cached_tokens;
  enum qtr_finish finish;
  char error[512]; /* why the prompt was refused */
};

struct job {
  uint64_t id;
  size_t first; /* its completions are run.completion[first … first + n) */
};

struct run {
  struct flags *flags;
  struct qtr_engine *engine;
  struct qtr_prompts *prompts;
  struct job *job;               /* (prompts.n) */
  struct completion *completion; /* (prompts.n * n) */
  size_t n_completions, n_ended, n_printed;
  bool stream, broken, failed, out_of_memory;
};

static bool grow(void **data, size_t *capacity, size_t n, size_t size) {
  if (n <= *capacity) return true;
  size_t wanted = *capacity ? *capacity * 2 : 64;
  if (wanted < n) wanted = n;
  void *more = realloc(*data, wanted * size);
  if (!more) return false;
  *data = more;
  *capacity = wanted;
  return true;
}

static json_t *logprob_json(const struct qtr_event *event) {
  json_t *top = json_array();
  for (int32_t i = 0; i < event->n_top_logprob; i++) {
    json_array_append_new(top, json_pack("{s:i, s:o}", "token_id", (int)event->top_logprob[i].token, "logprob",
                                         qtr_json_number(event->top_logprob[i].logprob, 7)));
  }
  return json_pack("{s:i, s:o, s:o}", "token_id", (int)event->token, "logprob", qtr_json_number(event->logprob, 7), "top",
                   top);
}

/* Keeps what an event brings; with `stream` the text goes out at once. */
static void take_event(struct run *run, const struct qtr_event *event) {
  const struct job *job = event->user;
  struct completion *c = &run->completion[job->first + (size_t)event->index];
  if (c->finish) return;
  c->n_prompt_tokens = event->n_prompt_tokens;
  c->n_cached_tokens = event->n_cached_tokens;
  if (event->token >= 0) {
    if (!grow((void **)&c->token, &c->token_capacity, c->n_tokens + 1, sizeof *c->token)) run->out_of_memory = true;
    if (!run->out_of_memory) c->token[c->n_tokens++] = event->token;
    if (event->has_logprob) {
      if (!c->logprobs) c->logprobs = json_array();
      json_array_append_new(c->logprobs, logprob_json(event));
    }
  }
  if (event->text_len > 0) {
    if (run->stream) {
      qtr_print_text(event->text, event->text_len);
      if (isatty(STDOUT_FILENO)) run->broken = !qtr_finish_output("generate") || run->broken;
    } else if (grow((void **)&c->text, &c->capacity, c->len + event->text_len, 1)) {
      memcpy(c->text + c->len, event->text, event->text_len);
      c->len += event->text_len;
    } else {
      run->out_of_memory = true;
    }
  }
  if (event->finish) {
    c->finish = event->finish;
    run->failed = run->failed || event->finish == QTR_FINISH_ERROR;
    run->n_ended++;
  }
}

static const char *finish_name(enum qtr_finish finish) {
  switch (finish) {
    case QTR_FINISH_STOP: return "stop";
    case QTR_FINISH_LENGTH: return "length";
    case QTR_FINISH_CANCELLED: return "cancelled";
    case QTR_FINISH_NONE:
    case QTR_FINISH_ERROR: break;
  }
  return "error";
}

static void print_as_json(struct run *run, const struct qtr_prompt *prompt, const struct completion *c, size_t index) {
  json_t *tokens = json_array();
  for (size_t i = 0; i < c->n_tokens; i++) json_array_append_new(tokens, json_integer(c->token[i]));
  json_t *text = c->len ? json_stringn(c->text, c->len) : json_string("");
  json_t *object = json_pack("{s:O, s:i, s:i, s:i, s:o, s:o, s:s}", "id", prompt->id, "index", (int)index, "prompt_tokens",
                             (int)c->n_prompt_tokens, "cached_tokens", (int)c->n_cached_tokens, "token_ids", tokens, "text",
                             text ? text : json_string(""), "finish_reason", finish_name(c->finish));
  if (run->flags->sampling.logprobs >= 0) {
    json_object_set_new(object, "logprobs", c->logprobs ? json_incref(c->logprobs) : json_array());
  }
  if (c->error[0]) json_object_set_new(object, "error", json_string(c->error));
  run->broken = !qtr_print_json("generate", object) || run->broken;
}

static void print_as_text(struct run *run, const struct qtr_prompt *prompt, const struct completion *c, size_t index) {
  if (run->stream) {
    (void)fputc('\n', stdout);
  } else {
    char shown[64];
    char *id = json_dumps(prompt->id, JSON_ENCODE_ANY);
    printf("=== %s", id ? id : "?");
    free(id);
    if (run->flags->sampling.n > 1) printf(" (%zu)", index);
    if (!prompt->messages) printf(": %s", qtr_printable(prompt->text, prompt->len, shown, sizeof shown));
    (void)fputc('\n', stdout);
    if (c->len) qtr_print_text(c->text, c->len);
    (void)fputs("\n\n", stdout);
  }
  run->broken = !qtr_finish_output("generate") || run->broken;
}

static void free_completion(struct completion *c) {
  free(c->token);
  free(c->text);
  json_decref(c->logprobs);
  c->token = NULL;
  c->text = NULL;
  c->logprobs = NULL;
}

/* Prints what has ended, in order. */
static void print_ended(struct run *run) {
  size_t n = (size_t)run->flags->sampling.n;
  while (run->n_printed < run->n_completions && run->completion[run->n_printed].finish && !run->broken) {
    struct completion *c = &run->completion[run->n_printed];
    const struct qtr_prompt *prompt = &run->prompts->item[run->n_printed / n];
    if (run->flags->json) {
      print_as_json(run, prompt, c, run->n_printed % n);
    } else if (!c->error[0]) {
      print_as_text(run, prompt, c, run->n_printed % n);
    }
    free_completion(c);
    run->n_printed++;
  }
}

/* Queues every prompt. A prompt that is refused ends with an error of its own; the others run. */
static enum qtr_status add_all(struct run *run, struct qtr_error *err) {
  size_t n = (size_t)run->flags->sampling.n;
  for (size_t i = 0; i < run->prompts->n; i++) {
    const struct qtr_prompt *prompt = &run->prompts->item[i];
    struct qtr_request_options request;
    struct qtr_error refused;
    qtr_request_options_init(&request);
    enum qtr_status status = qtr_request_from_flags(&run->flags->sampling, &request, err);
    if (status) return status;
    run->job[i] = (struct job){.first = i * n};
    request.prompt = prompt->text;
    request.prompt_len = prompt->len;
    request.no_bos = prompt->rendered;
    request.parse_special = prompt->rendered || run->flags->parse_special;
    request.user = &run->job[i];
    if (!qtr_engine_add(run->engine, &request, &run->job[i].id, &refused)) continue;
    run->failed = true;
    if (run->prompts->n > 1) {
      (void)fprintf(stderr, "quattuor generate: prompt %zu: %s\n", i, refused.message);
    } else {
      (void)fprintf(stderr, "quattuor generate: %s\n", refused.message);
    }
    for (size_t k = i * n; k < (i + 1) * n; k++) {
      run->completion[k].finish = QTR_FINISH_ERROR;
      (void)snprintf(run->completion[k].error, sizeof run->completion[k].error, "%s", refused.message);
      run->n_ended++;
    }
  }
  return QTR_OK;
}

static enum qtr_status run_all(struct run *run, struct qtr_error *err) {
  enum qtr_status status = add_all(run, err);
  if (status) return status;
  bool has_work = true, cancelled = false;
  double t_start = qtr_now();
  struct qtr_progress progress;
  qtr_progress_start(&progress, "generating", run->n_completions, run->stream || run->n_completions == 1);
  qtr_interrupt_watch();
  print_ended(run);
  while (has_work && !status) {
    if ((qtr_interrupted() || run->broken || run->out_of_memory) && !cancelled) {
      for (size_t i = 0; i < run->prompts->n; i++) {
        if (run->job[i].id) (void)qtr_engine_cancel(run->engine, run->job[i].id, NULL);
      }
      cancelled = true;
    }
    status = qtr_engine_step(run->engine, &has_work, err);
    struct qtr_event event;
    while (qtr_engine_poll(run->engine, &event)) take_event(run, &event);
    if (progress.terminal && progress.shown && run->n_printed < run->n_ended) (void)fputs("\r\033[K", stderr);
    print_ended(run);
    qtr_progress_update(&progress, run->n_ended);
  }
  qtr_progress_end(&progress);
  print_ended(run);
  struct qtr_stats stats;
  qtr_engine_stats(run->engine, &stats);
  double seconds = qtr_now() - t_start;
  if (!run->broken && !status) {
    (void)fprintf(stderr, "%zu %s, %llu prompt tokens (%llu cached), %llu tokens generated in %.2f s: %.1f tokens/s\n",
                  run->n_completions, run->n_completions == 1 ? "completion" : "completions at once",
                  (unsigned long long)stats.n_prompt_tokens, (unsigned long long)stats.n_cached_tokens,
                  (unsigned long long)stats.n_output_tokens, seconds,
                  seconds > 0 ? (double)stats.n_output_tokens / seconds : 0.0);
  }
  if (!status && run->out_of_memory) status = qtr_fail_memory(err, "completions", 0);
  return status;
}

static int generate(struct flags *flags) {
  struct qtr_error err;
  struct qtr_prompts prompts = {0};
  struct run run = {.flags = flags, .prompts = &prompts};
  struct qtr_request_options checked;
  enum qtr_status status = QTR_OK;
  int code;
  if (qtr_request_from_flags(&flags->sampling, &checked, &err)) {
    (void)qtr_report("generate", &err);
    return QTR_EXIT_USAGE;
  }
  for (size_t i = 0; i < flags->prompt.n && !status; i++) {
    status = qtr_prompts_add(&prompts, flags->prompt.item[i], flags->chat, flags->system, &err);
  }
  if (!status && flags->prompts_file) {
    status = qtr_prompts_read(&prompts, flags->prompts_file, flags->chat, flags->system, &err);
  }
  if (!status && prompts.n == 0) {
    status =
        qtr_fail(&err, QTR_ERR_ARGUMENT, flags->prompts_file ? "the prompts file is empty" : "no prompt: give --prompt");
  }
  if (!status) status = qtr_open_engine(&flags->model, &run.engine, &err);
  if (!status) status = qtr_prompts_render(&prompts, run.engine, &err);
  if (!status) {
    run.n_completions = prompts.n * (size_t)flags->sampling.n;
    run.stream = run.n_completions == 1 && !flags->json;
    run.job = calloc(prompts.n, sizeof *run.job);
    run.completion = calloc(run.n_completions, sizeof *run.completion);
    status = run.job && run.completion ? run_all(&run, &err) : qtr_fail_memory(&err, "completions", run.n_completions);
  }
  if (status) {
    code = qtr_report("generate", &err);
  } else if (qtr_interrupted()) {
    code = QTR_EXIT_INTERRUPTED;
  } else {
    code = run.broken || run.failed ? QTR_EXIT_FAILURE : QTR_EXIT_OK;
  }
  qtr_engine_close(run.engine);
  for (size_t i = 0; run.completion && i < run.n_completions; i++) free_completion(&run.completion[i]);
  free(run.completion);
  free(run.job);
  qtr_prompts_free(&prompts);
  return code;
}

int qtr_cmd_generate(int argc, char **argv) {
  struct flags flags = {0};
  qtr_model_flags_init(&flags.model);
  qtr_sampling_flags_init(&flags.sampling);
  flags.sampling.sampling.temperature = 0;
  const struct qtr_option_group groups[] = {
      {"Prompts and output", own_options, &flags},
      {"Sampling (greedy unless --temperature is given)", qtr_sampling_options_table, &flags.sampling},
      {"Model and engine", qtr_model_options_table, &flags.model}};
  struct qtr_command_line line = {
      .command = "generate",
      .usage = "generate --prompt TEXT [--prompt TEXT …] [options]",
      .about =
          "Completes prompts. A single one streams to stdout; several run at once through in-flight batching and are "
          "printed in their order. A summary with the speed goes to stderr. Exit code 1 when a prompt was refused, "
          "130 after Ctrl-C (what was generated so far is printed).",
      .group = groups,
      .n_groups = 3};
  int code = QTR_EXIT_USAGE;
  switch (qtr_options_parse(&line, argc, argv)) {
    case QTR_PARSE_OK:
      if (flags.prompt.n == 0 && !flags.prompts_file) {
        (void)fprintf(stderr, "quattuor generate: no prompt: give --prompt TEXT or --prompts-file FILE\n");
      } else if (flags.system && !flags.chat) {
        (void)fprintf(stderr, "quattuor generate: --system needs --chat\n");
      } else if (flags.sampling.logprobs >= 0 && !flags.json) {
        (void)fprintf(stderr, "quattuor generate: --logprobs needs --json\n");
      } else {
        code = generate(&flags);
      }
      break;
    case QTR_PARSE_HELP: code = qtr_finish_output("generate") ? QTR_EXIT_OK : QTR_EXIT_FAILURE; break;
    case QTR_PARSE_ERROR: break;
  }
  qtr_sampling_flags_free(&flags.sampling);
  qtr_options_free(&line);
  return code;
}
