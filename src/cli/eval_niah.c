/* eval_niah.c - `quattuor eval niah`: needle in a haystack (eval/niah.h), with tables, JSON and heat maps. */
#include "base/checked.h"
#include "base/status.h"
#include "cli/eval.h"
#include "eval/niah.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define NAME "eval niah"

struct flags {
  struct qtr_model_flags model;
  struct qtr_haystack_flags text;
  struct qtr_answer_flags answer;
  const char *depths, *needle;
  int32_t needles, max_tokens;
  bool json;
};

#define AT(field) offsetof(struct flags, field)
static const struct qtr_option own_options[] = {
    {.name = "depths",
     .argument = "N|LIST",
     .kind = QTR_OPTION_STRING,
     .offset = AT(depths),
     .help = "How many, evenly from 5 to 95 % of the text, or which: 0%,50%,100%. Default 5."},
    {.name = "needles",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(needles),
     .min = 1,
     .max = 10000,
     .help = "Questions for each length and depth, with a needle and a place in the haystack of their own. Default 5."},
    {.name = "needle",
     .kind = QTR_OPTION_CHOICE,
     .offset = AT(needle),
     .choices = "mixed|magic|special|san-francisco",
     .help =
         "What is hidden: a magic number, a special magic number, both in turn (default), or the usual sentence about San "
         "Francisco, which --prompt plain asks for in the reference's words."},
    {.name = "max-tokens",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(max_tokens),
     .min = 1,
     .max = 4096,
     .help = "Of an answer. Default 32, for San Francisco 128."},
    {.name = "json",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(json),
     .help = "One object: accuracy, rouge1, overlap, n, by_length, cells and the settings."},
    {0}};
#undef AT

/* The lists of the command line. */
struct plan {
  size_t *length; /* (n_lengths) */
  double *depth;  /* (n_depths) 0 … 1 */
  size_t n_lengths, n_depths, longest;
};

static enum qtr_status make_plan(const struct flags *flags, struct plan *plan, struct qtr_error *err) {
  enum qtr_status status = qtr_eval_parse_lengths(flags->text.lengths, &plan->length, &plan->n_lengths, err);
  if (status) return status;
  for (size_t i = 0; i < plan->n_lengths; i++) plan->longest = QTR_MAX(plan->longest, plan->length[i]);
  if (strpbrk(flags->depths, ",%")) {
    status = qtr_eval_parse_numbers("depths", flags->depths, 0, 100, &plan->depth, &plan->n_depths, err);
    for (size_t i = 0; i < plan->n_depths && !status; i++) plan->depth[i] /= 100;
    return status;
  }
  int64_t n;
  if (!qtr_parse_int(flags->depths, 1, 200, &n)) {
    return qtr_fail(err, QTR_ERR_ARGUMENT,
                    "--depths \"%.60s\": write how many (1 to 200), or percents such as 0%%,50%%,100%%", flags->depths);
  }
  plan->n_depths = (size_t)n;
  plan->depth = malloc(plan->n_depths * sizeof *plan->depth);
  if (!plan->depth) return qtr_fail_memory(err, "depths", 0);
  for (size_t i = 0; i < plan->n_depths; i++) plan->depth[i] = n == 1 ? 0.5 : 0.05 + 0.9 * (double)i / (double)(n - 1);
  return QTR_OK;
}

static enum qtr_needle needle_of(const char *name) {
  if (strcmp(name, "magic") == 0) return QTR_NEEDLE_MAGIC;
  if (strcmp(name, "special") == 0) return QTR_NEEDLE_SPECIAL;
  return strcmp(name, "san-francisco") == 0 ? QTR_NEEDLE_SAN_FRANCISCO : QTR_NEEDLE_MIXED;
}

/* ---- output ---- */

static json_t *score_json(const struct qtr_niah_score *s) {
  return json_pack("{s:o, s:o, s:I, s:I, s:o, s:o}", "accuracy", qtr_json_number(s->accuracy, 7), "contained",
                   qtr_json_number(s->contained, 7), "n", (json_int_t)s->n, "n_exact", (json_int_t)s->n_exact, "rouge1",
                   qtr_json_number(s->rouge1, 7), "overlap", qtr_json_number(s->overlap, 7));
}

static json_t *percent(double depth) { return qtr_json_number(100 * depth, 6); }

static bool print_as_json(const struct flags *flags, const struct plan *plan, const struct qtr_engine_info *info,
                          const struct qtr_haystack *haystack, const struct qtr_niah_result *r) {
  json_t *object = score_json(&r->total), *by_length = json_array(), *cells = json_array();
  for (size_t i = 0; i < plan->n_lengths; i++) {
    json_t *entry = score_json(&r->by_length[i]);
    (void)json_object_set_new(entry, "length", json_integer((json_int_t)plan->length[i]));
    (void)json_array_append_new(by_length, entry);
    for (size_t k = 0; k < plan->n_depths; k++) {
      entry = score_json(&r->cell[i * plan->n_depths + k]);
      (void)json_object_set_new(entry, "length", json_integer((json_int_t)plan->length[i]));
      (void)json_object_set_new(entry, "depth", percent(plan->depth[k]));
      (void)json_array_append_new(cells, entry);
    }
  }
  json_t *settings =
      json_pack("{s:o, s:o, s:s, s:s, s:I, s:i, s:I, s:s, s:s, s:i, s:s, s:o}", "by_length", by_length, "cells", cells,
                "needle", flags->needle, "haystack", flags->text.haystack ? flags->text.haystack : "generated",
                "haystack_tokens", (json_int_t)haystack->n_tokens, "needles", (int)flags->needles, "seed",
                (json_int_t)flags->text.seed, "model", info->model_dir, "precision", info->precision, "group_size",
                (int)info->group_size, "device", info->device, "seconds", qtr_json_number(r->seconds, 5));
  if (object && settings) (void)json_object_update(object, settings);
  json_decref(settings);
  return qtr_print_json(NAME, object);
}

static bool print_as_text(const struct plan *plan, const struct qtr_engine_info *info, const struct qtr_niah_result *r) {
  printf("%zu of %zu needles found (%.1f %%), ROUGE-1 %.3f, word overlap %.3f; %s, %s, %.1f s\n\ndepth  ", r->total.n_exact,
         r->total.n, 100 * r->total.accuracy, r->total.rouge1, r->total.overlap, info->model_dir, info->precision,
         r->seconds);
  for (size_t i = 0; i < plan->n_lengths; i++) printf("%9zu", plan->length[i]);
  for (size_t k = 0; k < plan->n_depths; k++) {
    printf("\n%4.0f %% ", 100 * plan->depth[k]);
    for (size_t i = 0; i < plan->n_lengths; i++) printf("%7.1f %%", 100 * r->cell[i * plan->n_depths + k].accuracy);
  }
  printf("\n   all ");
  for (size_t i = 0; i < plan->n_lengths; i++) printf("%7.1f %%", 100 * r->by_length[i].accuracy);
  (void)fputs("\n", stdout);
  return qtr_finish_output(NAME);
}

static void write_answers(struct qtr_eval_lines *lines, const struct plan *plan, const struct qtr_niah_result *r) {
  for (size_t i = 0; i < r->n_trials && lines->file; i++) {
    const struct qtr_niah_trial *t = &r->trial[i];
    qtr_eval_lines_add(
        lines, json_pack("{s:I, s:o, s:I, s:i, s:s, s:s, s:b, s:b, s:o, s:o}", "length", (json_int_t)plan->length[t->length],
                         "depth", percent(plan->depth[t->depth]), "number", (json_int_t)t->number, "prompt_tokens",
                         (int)t->n_prompt_tokens, "needle", t->needle, "answer", t->answer, "exact", t->exact, "contained",
                         t->contained, "rouge1", qtr_json_number(t->rouge1, 7), "overlap", qtr_json_number(t->overlap, 7)));
  }
}

/* Depths down, lengths across. */
static enum qtr_status write_maps(const struct flags *flags, const struct plan *plan, const struct qtr_engine_info *info,
                                  const struct qtr_niah_result *r, struct qtr_error *err) {
  if (!flags->answer.svg && !flags->answer.png) return QTR_OK;
  double *value = malloc(plan->n_depths * plan->n_lengths * sizeof *value),
         *x = malloc((plan->n_depths + plan->n_lengths) * sizeof *x);
  const char **row = NULL, **column = NULL;
  char title[160], subtitle[160];
  enum qtr_status status = QTR_OK;
  if (!value || !x) {
    status = qtr_fail_memory(err, "a heat map", 0);
    goto done;
  }
  for (size_t k = 0; k < plan->n_depths; k++) x[k] = round(1e4 * plan->depth[k]) / 100;
  for (size_t i = 0; i < plan->n_lengths; i++) {
    x[plan->n_depths + i] = (double)plan->length[i];
    for (size_t k = 0; k < plan->n_depths; k++) {
      value[k * plan->n_lengths + i] = r->cell[i * plan->n_depths + k].accuracy;
    }
  }
  row = qtr_eval_number_labels(x, plan->n_depths, " %");
  column = qtr_eval_number_labels(x + plan->n_depths, plan->n_lengths, "");
  const struct qtr_heatmap map = {.title = qtr_eval_title("Needles found, %", &flags->model, title),
                                  .subtitle = qtr_eval_describe(info, r->total.accuracy, r->total.n, subtitle),
                                  .row_title = "depth",
                                  .column_title = "tokens",
                                  .row = row,
                                  .column = column,
                                  .value = value,
                                  .n_rows = plan->n_depths,
                                  .n_columns = plan->n_lengths};
  status = row && column ? qtr_eval_write_maps(flags->answer.svg, flags->answer.png, &map, err)
                         : qtr_fail_memory(err, "a heat map", 0);
done:
  free(row);
  free(column);
  free(value);
  free(x);
  return status;
}

/* ---- the command ---- */

static int eval_niah(struct flags *flags) {
  struct qtr_error err;
  struct qtr_engine *engine = NULL;
  struct qtr_haystack haystack = {0};
  struct qtr_niah_result result = {0};
  struct qtr_eval_lines lines = {0};
  struct plan plan = {0};
  struct qtr_engine_info info;
  enum qtr_needle needle = needle_of(flags->needle);
  int code = QTR_EXIT_FAILURE;
  enum qtr_status status = make_plan(flags, &plan, &err);
  if (status) {
    (void)qtr_report(NAME, &err);
    code = QTR_EXIT_USAGE;
    goto done;
  }
  status = qtr_eval_lines_open(flags->answer.answers, &lines, &err);
  if (!status) status = qtr_open_engine(&flags->model, &engine, &err);
  if (!status)
    status = qtr_eval_open_haystack(engine, flags->text.haystack, flags->text.seed, plan.longest, &haystack, &err);
  if (!status) {
    const struct qtr_niah_options options = {.length = plan.length,
                                             .depth = plan.depth,
                                             .n_lengths = plan.n_lengths,
                                             .n_depths = plan.n_depths,
                                             .n_needles = (size_t)flags->needles,
                                             .needle = needle,
                                             .style = qtr_eval_style(flags->answer.prompt),
                                             .max_tokens = flags->max_tokens                    ? flags->max_tokens
                                                           : needle == QTR_NEEDLE_SAN_FRANCISCO ? 128
                                                                                                : 32,
                                             .seed = flags->text.seed};
    status = qtr_niah_run(engine, &haystack, &options, &result, &err);
  }
  if (!status) { /* first what cannot fail for a path */
    qtr_engine_get_info(engine, &info);
    bool printed =
        flags->json ? print_as_json(flags, &plan, &info, &haystack, &result) : print_as_text(&plan, &info, &result);
    if (printed) code = QTR_EXIT_OK;
    write_answers(&lines, &plan, &result);
    status = write_maps(flags, &plan, &info, &result, &err);
  }
  if (status) code = qtr_report(NAME, &err);
  if (qtr_eval_lines_close(&lines, &err) && !status) code = qtr_report(NAME, &err);
done:
  qtr_niah_free(&result);
  qtr_haystack_free(&haystack);
  qtr_engine_close(engine);
  free(plan.length);
  free(plan.depth);
  return code;
}

int qtr_eval_niah(int argc, char **argv) {
  struct flags flags = {
      .text.lengths = "1024,4096", .depths = "5", .needle = "mixed", .answer.prompt = "auto", .needles = 5};
  qtr_model_flags_init(&flags.model);
  const struct qtr_option_group groups[] = {{"Needles and haystack (lengths 1024,4096 unless given)", own_options, &flags},
                                            {NULL, qtr_haystack_options_table, &flags.text},
                                            {NULL, qtr_answer_options_table, &flags.answer},
                                            {"Model and engine", qtr_model_options_table, &flags.model}};
  struct qtr_command_line line = {
      .command = NAME,
      .usage = "eval niah [--haystack PATH] [--lengths LIST] [--depths N] [options]",
      .about =
          "Hides one sentence in a long text and asks for it, at every length and depth; answers are greedy and all "
          "questions run at once. An answer is right when it holds the number (or the whole phrase); besides, ROUGE-1 "
          "against the needle and the reference's word overlap.",
      .group = groups,
      .n_groups = sizeof groups / sizeof groups[0]};
  int code = QTR_EXIT_USAGE;
  switch (qtr_options_parse(&line, argc, argv)) {
    case QTR_PARSE_OK: code = eval_niah(&flags); break;
    case QTR_PARSE_HELP: code = qtr_finish_output(NAME) ? QTR_EXIT_OK : QTR_EXIT_FAILURE; break;
    case QTR_PARSE_ERROR: break;
  }
  qtr_options_free(&line);
  return code;
}
