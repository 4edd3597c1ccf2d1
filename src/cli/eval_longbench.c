/* eval_longbench.c - `quattuor eval longbench`: LongBench over local files (eval/longbench.h), or the scores of predictions
 * that are there already. */
#include "base/checked.h"
#include "base/file.h"
#include "base/status.h"
#include "cli/eval.h"
#include "eval/longbench.h"

#include <stdlib.h>
#include <string.h>

#define NAME "eval longbench"

struct flags {
  struct qtr_model_flags model;
  const char *data, *score, *tasks, *prompt, *words, *answers;
  int32_t limit, max_length;
  bool extended, json;
};

#define AT(field) offsetof(struct flags, field)
static const struct qtr_option own_options[] = {
    {.name = "data",
     .argument = "DIR",
     .kind = QTR_OPTION_STRING,
     .offset = AT(data),
     .help = "Directory of the data set: narrativeqa.jsonl and so on, as published."},
    {.name = "score",
     .argument = "DIR",
     .kind = QTR_OPTION_STRING,
     .offset = AT(score),
     .help =
         "Instead of --data: scores predictions, files of the same names with pred, answers, all_classes, length in a line. "
         "No model is loaded."},
    {.name = "tasks",
     .argument = "LIST",
     .kind = QTR_OPTION_STRING,
     .offset = AT(tasks),
     .help = "Such as qasper,trec. Default: every task that has a file there."},
    {.name = "limit",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(limit),
     .min = 1,
     .max = INT32_MAX,
     .help = "Only the first N questions of each task. Default: all."},
    {.name = "max-length",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(max_length),
     .min = 16,
     .max = 1 << 24,
     .help = "Tokens of a prompt; of longer ones the middle is left out. Default: what the model takes with the answer."},
    {.name = "prompt",
     .kind = QTR_OPTION_CHOICE,
     .offset = AT(prompt),
     .choices = "plain|chat",
     .help =
         "plain (default): as the reference; chat: one user turn in the model's chat template, but for the tasks that show "
         "examples or code."},
    {.name = "words",
     .argument = "FILE",
     .kind = QTR_OPTION_STRING,
     .offset = AT(words),
     .help = "Chinese words, one a line with its frequency, such as jieba's dict.txt. Default: Chinese scores count "
             "characters."},
    {.name = "extended",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(extended),
     .help = "LongBench-E: files named qasper_e.jsonl and so on, scores by length, answers not trimmed."},
    {.name = "answers",
     .argument = "FILE",
     .kind = QTR_OPTION_STRING,
     .offset = AT(answers),
     .help =
         "Writes every answer with its score, a JSON object a line: task, line, pred, answers, all_classes, length, score."},
    {.name = "json",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(json),
     .help = "One object: score (mean over tasks) and tasks, each with score, n, metric."},
    {0}};
#undef AT

/* ---- which tasks ---- */

static enum qtr_status add_task(struct qtr_longbench_options *o, const char *name, size_t len, struct qtr_error *err) {
  char word[32];
  const char *names[QTR_LONGBENCH_N_TASKS];
  (void)snprintf(word, sizeof word, "%.*s", (int)QTR_MIN(len, sizeof word - 1), name);
  const struct qtr_longbench_task *task = qtr_longbench_find(word);
  if (!task) {
    for (size_t i = 0; i < QTR_LONGBENCH_N_TASKS; i++) names[i] = qtr_longbench_tasks[i].name;
    const char *near = qtr_nearest_word(word, names, QTR_LONGBENCH_N_TASKS);
    return qtr_fail(err, QTR_ERR_ARGUMENT, "LongBench has no task \"%s\"%s%s", word, near ? "; did you mean " : "",
                    near ? near : "");
  }
  for (size_t i = 0; i < o->n_tasks; i++) {
    if (o->task[i] == task) return QTR_OK;
  }
  o->task[o->n_tasks++] = task;
  return QTR_OK;
}

static enum qtr_status choose_tasks(const struct flags *flags, struct qtr_longbench_options *o, struct qtr_error *err) {
  enum qtr_status status = QTR_OK;
  for (const char *p = flags->tasks; p && *p && !status;) {
    size_t n = strcspn(p, ",");
    status = add_task(o, p, n, err);
    p += n + (p[n] == ',');
  }
  if (status || o->n_tasks > 0) return status;
  for (size_t i = 0; i < QTR_LONGBENCH_N_TASKS; i++) {
    char name[64];
    (void)snprintf(name, sizeof name, "%s%s.jsonl", qtr_longbench_tasks[i].name, o->extended ? "_e" : "");
    char *path = qtr_path_join(o->dir, name);
    if (path && qtr_file_exists(path)) o->task[o->n_tasks++] = &qtr_longbench_tasks[i];
    free(path);
  }
  if (o->n_tasks > 0) return QTR_OK;
  return qtr_fail(err, QTR_ERR_NOT_FOUND, "%s has no file of a task, such as qasper%s.jsonl", o->dir,
                  o->extended ? "_e" : "");
}

/* ---- output ---- */

static const char *const groups[QTR_LONGBENCH_GROUPS] = {"0-4k", "4-8k", "8k+"};

static void write_answer(void *user, const struct qtr_longbench_task *task, size_t line,
                         const struct qtr_longbench_item *item, struct qtr_string answer, double score, bool truncated) {
  json_t *pred = json_stringn(answer.p, answer.n);
  qtr_eval_lines_add(
      user, json_pack("{s:s, s:I, s:o, s:O, s:O?, s:I, s:o, s:b}", "task", task->name, "line", (json_int_t)line, "pred",
                      pred ? pred : json_string(""), "answers", item->answers, "all_classes", item->classes, "length",
                      (json_int_t)item->length, "score", qtr_json_number(score, 7), "truncated", truncated));
}

static double mean_score(const struct qtr_longbench_result *result, size_t n) {
  double sum = 0;
  for (size_t t = 0; t < n; t++) sum += result[t].score;
  return sum / (double)n;
}

static bool print_as_json(const struct flags *flags, const struct qtr_longbench_options *o, struct qtr_engine *engine,
                          const struct qtr_longbench_result *result) {
  json_t *tasks = json_array();
  for (size_t t = 0; t < o->n_tasks; t++) {
    const struct qtr_longbench_result *r = &result[t];
    json_t *entry =
        json_pack("{s:s, s:s, s:o, s:I, s:I}", "task", r->task->name, "metric", qtr_longbench_metric_name(r->task->metric),
                  "score", qtr_json_number(r->score, 7), "n", (json_int_t)r->n, "n_truncated", (json_int_t)r->n_truncated);
    for (size_t g = 0; g < QTR_LONGBENCH_GROUPS && o->extended; g++) {
      (void)json_object_set_new(entry, groups[g], r->group_n[g] > 0 ? qtr_json_number(r->group_score[g], 7) : json_null());
    }
    (void)json_array_append_new(tasks, entry);
  }
  json_t *object = json_pack("{s:o, s:o, s:s, s:s}", "score", qtr_json_number(mean_score(result, o->n_tasks), 7), "tasks",
                             tasks, "chinese_words", flags->words ? flags->words : "characters", "data", o->dir);
  if (engine && object) {
    struct qtr_engine_info info;
    qtr_engine_get_info(engine, &info);
    (void)json_object_set_new(object, "model", json_string(info.model_dir));
    (void)json_object_set_new(object, "precision", json_string(info.precision));
    (void)json_object_set_new(object, "group_size", json_integer(info.group_size));
    (void)json_object_set_new(object, "device", json_string(info.device));
  }
  return qtr_print_json(NAME, object);
}

static bool print_as_text(const struct flags *flags, const struct qtr_longbench_options *o,
                          const struct qtr_longbench_result *result) {
  bool chinese = false;
  for (size_t t = 0; t < o->n_tasks; t++) {
    const struct qtr_longbench_result *r = &result[t];
    printf("%-22s %6.2f  %zu questions, %s", r->task->name, r->score, r->n, qtr_longbench_metric_name(r->task->metric));
    if (r->n_truncated) printf(", %zu prompts cut", r->n_truncated);
    for (size_t g = 0; g < QTR_LONGBENCH_GROUPS && o->extended; g++) {
      if (r->group_n[g]) printf(", %s %.2f", groups[g], r->group_score[g]);
    }
    (void)fputc('\n', stdout);
    chinese = chinese || r->task->metric == QTR_LONGBENCH_F1_ZH || r->task->metric == QTR_LONGBENCH_ROUGE_ZH;
  }
  printf("%-22s %6.2f\n", "mean over tasks", mean_score(result, o->n_tasks));
  if (chinese && !flags->words) {
    (void)fputs("Chinese scores count characters, not words: published ones need a word list (--words).\n", stdout);
  }
  return qtr_finish_output(NAME);
}

/* ---- the command ---- */

static int eval_longbench(struct flags *flags) {
  struct qtr_error err;
  struct qtr_engine *engine = NULL;
  struct qtr_segmenter *words = NULL;
  struct qtr_eval_lines lines = {0};
  struct qtr_longbench_result result[QTR_LONGBENCH_N_TASKS];
  struct qtr_longbench_options options = {.dir = flags->score ? flags->score : flags->data,
                                          .limit = (size_t)flags->limit,
                                          .max_length = (size_t)flags->max_length,
                                          .style = qtr_eval_style(flags->prompt),
                                          .extended = flags->extended};
  int code = QTR_EXIT_FAILURE;
  enum qtr_status status = choose_tasks(flags, &options, &err);
  if (!status && flags->words) status = qtr_segmenter_open(flags->words, &words, &err);
  if (!status) status = qtr_eval_lines_open(flags->answers, &lines, &err);
  if (!status && !flags->score) status = qtr_open_engine(&flags->model, &engine, &err);
  if (!status) {
    options.words = words;
    if (lines.file) {
      options.answered = write_answer;
      options.user = &lines;
    }
    status = qtr_longbench_run(engine, &options, result, &err);
  }
  if (status) {
    code = qtr_report(NAME, &err);
  } else if (flags->json ? print_as_json(flags, &options, engine, result) : print_as_text(flags, &options, result)) {
    code = QTR_EXIT_OK;
  }
  if (qtr_eval_lines_close(&lines, &err) && !status) code = qtr_report(NAME, &err);
  qtr_segmenter_free(words);
  qtr_engine_close(engine);
  return code;
}

int qtr_eval_longbench(int argc, char **argv) {
  struct flags flags = {.prompt = "plain"};
  qtr_model_flags_init(&flags.model);
  const struct qtr_option_group option_groups[] = {{"Data and answers", own_options, &flags},
                                                   {"Model and engine", qtr_model_options_table, &flags.model}};
  struct qtr_command_line line = {
      .command = NAME,
      .usage = "eval longbench --data DIR [--tasks LIST] [options]",
      .about =
          "Answers LongBench's questions greedily, all at once, and scores them as its authors do. The data is not part of "
          "Quattuor: put its .jsonl files into a directory.",
      .group = option_groups,
      .n_groups = 2};
  int code = QTR_EXIT_USAGE;
  switch (qtr_options_parse(&line, argc, argv)) {
    case QTR_PARSE_OK:
      if (!flags.data == !flags.score) {
        (void)fprintf(stderr, "quattuor " NAME ": %s\n",
                      flags.data ? "--data and --score exclude each other" : "no data: give --data DIR or --score DIR");
      } else {
        code = eval_longbench(&flags);
      }
      break;
    case QTR_PARSE_HELP: code = qtr_finish_output(NAME) ? QTR_EXIT_OK : QTR_EXIT_FAILURE; break;
    case QTR_PARSE_ERROR: break;
  }
  qtr_options_free(&line);
  return code;
}
