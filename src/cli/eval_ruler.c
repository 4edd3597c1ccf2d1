/* eval_ruler.c - `quattuor eval ruler`: synthetic long-context tasks (eval/ruler.h), with a table, JSON and heat maps. */
#include "base/checked.h"
#include "base/status.h"
#include "cli/eval.h"
#include "eval/ruler.h"

#include <stdlib.h>
#include <string.h>

#define NAME "eval ruler"

struct flags {
  struct qtr_model_flags model;
  struct qtr_haystack_flags text;
  struct qtr_answer_flags answer;
  const char *tasks;
  int32_t samples;
  bool json;
};

#define AT(field) offsetof(struct flags, field)
static const struct qtr_option own_options[] = {
    {.name = "tasks",
     .argument = "LIST",
     .kind = QTR_OPTION_STRING,
     .offset = AT(tasks),
     .help = "Of single, multikey, multivalue, multiquery, variables, common-words, frequent-words. Default: all."},
    {.name = "samples",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(samples),
     .min = 1,
     .max = 10000,
     .help = "Questions for each task and length. Default 10."},
    {.name = "json",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(json),
     .help = "One object: score, tasks (score, accuracy, n), cells (by length too) and the settings."},
    {0}};
#undef AT

static enum qtr_status choose_tasks(const char *list, struct qtr_ruler_options *o, struct qtr_error *err) {
  const char *names[QTR_RULER_N_TASKS];
  for (size_t t = 0; t < QTR_RULER_N_TASKS; t++) {
    names[t] = qtr_ruler_task_name((enum qtr_ruler_task)t);
    if (!list) o->task[o->n_tasks++] = (enum qtr_ruler_task)t;
  }
  for (const char *p = list; p && *p;) {
    size_t n = strcspn(p, ","), t = 0;
    char word[32];
    (void)snprintf(word, sizeof word, "%.*s", (int)QTR_MIN(n, sizeof word - 1), p);
    while (t < QTR_RULER_N_TASKS && strcmp(word, names[t]) != 0) t++;
    if (t == QTR_RULER_N_TASKS) {
      const char *near = qtr_nearest_word(word, names, QTR_RULER_N_TASKS);
      return qtr_fail(err, QTR_ERR_ARGUMENT, "no task \"%s\"%s%s (--help lists them)", word, near ? "; did you mean " : "",
                      near ? near : "");
    }
    bool there = false;
    for (size_t i = 0; i < o->n_tasks; i++) there = there || o->task[i] == (enum qtr_ruler_task)t;
    if (!there) o->task[o->n_tasks++] = (enum qtr_ruler_task)t;
    p += n + (p[n] == ',');
  }
  return o->n_tasks > 0 ? QTR_OK : qtr_fail(err, QTR_ERR_ARGUMENT, "--tasks names no task (--help lists them)");
}

/* ---- output ---- */

static void write_answer(void *user, const struct qtr_ruler_question *q, size_t length, size_t number,
                         const struct qtr_ask_answer *answer, double score) {
  json_t *expected = json_array(), *text = json_stringn(answer->text, answer->len);
  for (size_t i = 0; i < q->n_expected; i++) (void)json_array_append_new(expected, json_string(q->expected[i]));
  qtr_eval_lines_add(user, json_pack("{s:s, s:I, s:I, s:i, s:s, s:o, s:o, s:o}", "task", qtr_ruler_task_name(q->task),
                                     "length", (json_int_t)length, "number", (json_int_t)number, "prompt_tokens",
                                     (int)answer->n_prompt_tokens, "question", q->text, "expected", expected, "answer",
                                     text ? text : json_string(""), "score", qtr_json_number(score, 7)));
}

/* Over all lengths. */
static struct qtr_ruler_result sum_task(const struct qtr_ruler_options *o, const struct qtr_ruler_result *result, size_t t) {
  struct qtr_ruler_result sum = {0};
  for (size_t i = 0; i < o->n_lengths; i++) {
    const struct qtr_ruler_result *r = &result[t * o->n_lengths + i];
    sum.n += r->n;
    sum.n_whole += r->n_whole;
    sum.score += r->score * (double)r->n;
  }
  sum.score /= (double)sum.n;
  return sum;
}

static double mean_score(const struct qtr_ruler_options *o, const struct qtr_ruler_result *result) {
  double sum = 0;
  for (size_t t = 0; t < o->n_tasks; t++) sum += sum_task(o, result, t).score;
  return sum / (double)o->n_tasks;
}

static json_t *entry_json(enum qtr_ruler_task task, const struct qtr_ruler_result *r) {
  return json_pack("{s:s, s:o, s:o, s:I}", "task", qtr_ruler_task_name(task), "score", qtr_json_number(r->score, 7),
                   "accuracy", qtr_json_number((double)r->n_whole / (double)r->n, 7), "n", (json_int_t)r->n);
}

static bool print_as_json(const struct flags *flags, const struct qtr_ruler_options *o, const struct qtr_engine_info *info,
                          const struct qtr_ruler_result *result) {
  json_t *entries = json_array(), *cells = json_array();
  for (size_t t = 0; t < o->n_tasks; t++) {
    const struct qtr_ruler_result sum = sum_task(o, result, t);
    (void)json_array_append_new(entries, entry_json(o->task[t], &sum));
    for (size_t i = 0; i < o->n_lengths; i++) {
      json_t *cell = entry_json(o->task[t], &result[t * o->n_lengths + i]);
      (void)json_object_set_new(cell, "length", json_integer((json_int_t)o->length[i]));
      (void)json_array_append_new(cells, cell);
    }
  }
  return qtr_print_json(
      NAME,
      json_pack("{s:o, s:o, s:o, s:s, s:i, s:I, s:s, s:s, s:i, s:s}", "score", qtr_json_number(mean_score(o, result), 7),
                "tasks", entries, "cells", cells, "haystack", flags->text.haystack ? flags->text.haystack : "generated",
                "samples", (int)flags->samples, "seed", (json_int_t)flags->text.seed, "model", info->model_dir, "precision",
                info->precision, "group_size", (int)info->group_size, "device", info->device));
}

static bool print_as_text(const struct qtr_ruler_options *o, const struct qtr_engine_info *info,
                          const struct qtr_ruler_result *result) {
  printf("share of what answers must hold; %s, %s\n\n%-16s", info->model_dir, info->precision, "task");
  for (size_t i = 0; i < o->n_lengths; i++) printf("%9zu", o->length[i]);
  (void)fputs("      all\n", stdout);
  for (size_t t = 0; t < o->n_tasks; t++) {
    printf("%-16s", qtr_ruler_task_name(o->task[t]));
    for (size_t i = 0; i < o->n_lengths; i++) printf("%7.1f %%", 100 * result[t * o->n_lengths + i].score);
    printf("%7.1f %%\n", 100 * sum_task(o, result, t).score);
  }
  printf("%-16s%*s%7.1f %%\n", "mean over tasks", (int)(9 * o->n_lengths), "", 100 * mean_score(o, result));
  return qtr_finish_output(NAME);
}

static enum qtr_status write_maps(const struct flags *flags, const struct qtr_ruler_options *o,
                                  const struct qtr_engine_info *info, const struct qtr_ruler_result *result,
                                  struct qtr_error *err) {
  if (!flags->answer.svg && !flags->answer.png) return QTR_OK;
  double *value = malloc((o->n_tasks + 1) * o->n_lengths * sizeof *value); /* the scores, then the lengths */
  const char *row[QTR_RULER_N_TASKS], **column = NULL;
  char title[160], subtitle[160];
  size_t n_questions = 0;
  for (size_t t = 0; t < o->n_tasks; t++) row[t] = qtr_ruler_task_name(o->task[t]);
  for (size_t i = 0; value && i < o->n_tasks * o->n_lengths; i++) {
    value[i] = result[i].score;
    n_questions += result[i].n;
  }
  for (size_t i = 0; value && i < o->n_lengths; i++) value[o->n_tasks * o->n_lengths + i] = (double)o->length[i];
  if (value) column = qtr_eval_number_labels(value + o->n_tasks * o->n_lengths, o->n_lengths, "");
  enum qtr_status status;
  if (column) {
    const struct qtr_heatmap map = {.title = qtr_eval_title("Synthetic tasks, %", &flags->model, title),
                                    .subtitle = qtr_eval_describe(info, mean_score(o, result), n_questions, subtitle),
                                    .row_title = "task",
                                    .column_title = "tokens",
                                    .row = row,
                                    .column = column,
                                    .value = value,
                                    .n_rows = o->n_tasks,
                                    .n_columns = o->n_lengths};
    status = qtr_eval_write_maps(flags->answer.svg, flags->answer.png, &map, err);
  } else {
    status = qtr_fail_memory(err, "a heat map", 0);
  }
  free(value);
  free(column);
  return status;
}

/* ---- the command ---- */

static int eval_ruler(struct flags *flags) {
  struct qtr_error err;
  struct qtr_engine *engine = NULL;
  struct qtr_haystack haystack = {0};
  struct qtr_ruler_result *result = NULL; /* (n_tasks, n_lengths) */
  struct qtr_eval_lines lines = {0};
  struct qtr_engine_info info;
  size_t *length = NULL, longest = 0;
  struct qtr_ruler_options options = {
      .n_samples = (size_t)flags->samples, .style = qtr_eval_style(flags->answer.prompt), .seed = flags->text.seed};
  int code = QTR_EXIT_FAILURE;
  enum qtr_status status = choose_tasks(flags->tasks, &options, &err);
  if (!status) status = qtr_eval_parse_lengths(flags->text.lengths, &length, &options.n_lengths, &err);
  if (status) {
    (void)qtr_report(NAME, &err);
    code = QTR_EXIT_USAGE;
    goto done;
  }
  options.length = length;
  for (size_t i = 0; i < options.n_lengths; i++) longest = QTR_MAX(longest, length[i]);
  result = calloc(options.n_tasks * options.n_lengths, sizeof *result);
  if (!result) status = qtr_fail_memory(&err, "results", options.n_tasks * options.n_lengths * sizeof *result);
  if (!status) status = qtr_eval_lines_open(flags->answer.answers, &lines, &err);
  if (!status) status = qtr_open_engine(&flags->model, &engine, &err);
  if (!status) status = qtr_eval_open_haystack(engine, flags->text.haystack, flags->text.seed, longest, &haystack, &err);
  if (!status) {
    if (lines.file) {
      options.answered = write_answer;
      options.user = &lines;
    }
    status = qtr_ruler_run(engine, &haystack, &options, result, &err);
  }
  if (!status) { /* first what cannot fail for a path */
    qtr_engine_get_info(engine, &info);
    if (flags->json ? print_as_json(flags, &options, &info, result) : print_as_text(&options, &info, result)) {
      code = QTR_EXIT_OK;
    }
    status = write_maps(flags, &options, &info, result, &err);
  }
  if (status) code = qtr_report(NAME, &err);
  if (qtr_eval_lines_close(&lines, &err) && !status) code = qtr_report(NAME, &err);
done:
  qtr_haystack_free(&haystack);
  qtr_engine_close(engine);
  free(result);
  free(length);
  return code;
}

int qtr_eval_ruler(int argc, char **argv) {
  struct flags flags = {.text.lengths = "1024,4096", .answer.prompt = "auto", .samples = 10};
  qtr_model_flags_init(&flags.model);
  const struct qtr_option_group groups[] = {{"Tasks (lengths 1024,4096 unless given)", own_options, &flags},
                                            {NULL, qtr_haystack_options_table, &flags.text},
                                            {NULL, qtr_answer_options_table, &flags.answer},
                                            {"Model and engine", qtr_model_options_table, &flags.model}};
  struct qtr_command_line line = {
      .command = NAME,
      .usage = "eval ruler [--tasks LIST] [--lengths LIST] [options]",
      .about =
          "Generated long-context tasks after RULER: one or several numbers in a text, chains of variables, the words that "
          "are most frequent. Answers are greedy and all questions run at once; the score is the share of the numbers or "
          "words that the answer holds.",
      .group = groups,
      .n_groups = sizeof groups / sizeof groups[0]};
  int code = QTR_EXIT_USAGE;
  switch (qtr_options_parse(&line, argc, argv)) {
    case QTR_PARSE_OK: code = eval_ruler(&flags); break;
    case QTR_PARSE_HELP: code = qtr_finish_output(NAME) ? QTR_EXIT_OK : QTR_EXIT_FAILURE; break;
    case QTR_PARSE_ERROR: break;
  }
  qtr_options_free(&line);
  return code;
}
