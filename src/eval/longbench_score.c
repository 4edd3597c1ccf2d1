/* longbench_score.c - lines of LongBench's files, what of an answer counts, and its score (longbench.h; spec G.2.2). */
#include "eval/longbench.h"

#include "base/status.h"

#include <stdlib.h>
#include <string.h>

const char *qtr_longbench_metric_name(enum qtr_longbench_metric metric) {
  static const char *const names[] = {"f1",        "f1_zh",        "rouge_l", "rouge_l_zh",     "classification",
                                      "retrieval", "retrieval_zh", "count",   "code_similarity"};
  return names[metric];
}

/* ---- lines ---- */

static struct qtr_string string_of(const json_t *text) {
  const char *p = json_string_value(text);
  return p ? (struct qtr_string){p, json_string_length(text)} : (struct qtr_string){"", 0};
}

static bool is_list_of_strings(const json_t *list) {
  size_t i;
  const json_t *entry;
  if (!json_is_array(list)) return false;
  json_array_foreach(list, i, entry) {
    if (!json_is_string(entry)) return false;
  }
  return true;
}

enum qtr_status qtr_longbench_item_parse(const char *line, size_t len, bool predicted, struct qtr_longbench_item *item,
                                         struct qtr_error *err) {
  json_error_t fault;
  *item = (struct qtr_longbench_item){.root = json_loadb(line, len, JSON_REJECT_DUPLICATES, &fault)};
  if (!item->root) {
    char shown[JSON_ERROR_TEXT_LENGTH];
    return qtr_fail(err, QTR_ERR_FORMAT, "not JSON at column %d: %s", fault.column,
                    qtr_printable(fault.text, strlen(fault.text), shown, sizeof shown));
  }
  const json_t *input = json_object_get(item->root, "input"), *context = json_object_get(item->root, "context");
  const json_t *prediction = json_object_get(item->root, "pred"), *length = json_object_get(item->root, "length");
  const char *wrong = NULL;
  item->answers = json_object_get(item->root, "answers");
  item->classes = json_object_get(item->root, "all_classes");
  if (json_is_null(item->classes)) item->classes = NULL;
  if (!json_is_object(item->root)) {
    wrong = "the line is not an object";
  } else if (predicted && !json_is_string(prediction)) {
    wrong = "\"pred\" is not a string";
  } else if (!predicted && (!json_is_string(input) || !json_is_string(context))) {
    wrong = "\"input\" and \"context\" are not both strings";
  } else if (!is_list_of_strings(item->answers)) {
    wrong = "\"answers\" is not a list of strings";
  } else if (item->classes && !is_list_of_strings(item->classes)) {
    wrong = "\"all_classes\" is neither null nor a list of strings";
  } else if (length && !json_is_integer(length)) {
    wrong = "\"length\" is not a whole number";
  }
  if (wrong) {
    qtr_longbench_item_free(item);
    return qtr_fail(err, QTR_ERR_FORMAT, "%s", wrong);
  }
  item->input = string_of(input);
  item->context = string_of(context);
  item->prediction = string_of(prediction);
  item->length = json_integer_value(length);
  return QTR_OK;
}

void qtr_longbench_item_free(struct qtr_longbench_item *item) {
  json_decref(item->root);
  *item = (struct qtr_longbench_item){0};
}

/* ---- what counts ---- */

/* Up to the first occurrence of `mark`. */
static struct qtr_string cut_at(struct qtr_string text, const char *mark) {
  const char *found = text.n ? memmem(text.p, text.n, mark, strlen(mark)) : NULL;
  return found ? (struct qtr_string){text.p, (size_t)(found - text.p)} : text;
}

static struct qtr_string strip(struct qtr_string text) {
  while (text.n > 0 && strchr(" \t\n\r\v\f", *text.p)) text = (struct qtr_string){text.p + 1, text.n - 1};
  while (text.n > 0 && strchr(" \t\n\r\v\f", text.p[text.n - 1])) text.n--;
  return text;
}

struct qtr_string qtr_longbench_trim(const struct qtr_longbench_task *task, struct qtr_string answer, bool extended) {
  static const char *const marks[] = {"<|eot_id|>", ".assistant", "\n\nQuestion", "</s>",
                                      "(Document",  "\n\nAnswer", "(Passage"};
  struct qtr_string text = answer;
  if (!extended) {
    for (size_t i = 0; i < sizeof marks / sizeof marks[0]; i++) text = cut_at(text, marks[i]);
    text = strip(text);
  }
  if (task->first_line) {
    while (text.n > 0 && *text.p == '\n') text = (struct qtr_string){text.p + 1, text.n - 1};
    text = cut_at(text, "\n");
  }
  if (extended) return text;
  if (strcmp(task->name, "multifieldqa_zh") == 0 || strcmp(task->name, "dureader") == 0) text = cut_at(text, "问题：");
  if (strcmp(task->name, "lsht") == 0) text = cut_at(text, "新闻内容：");
  if (strcmp(task->name, "passage_retrieval_zh") == 0) text = cut_at(cut_at(text, "请问"), "提示");
  return text;
}

/* ---- the score ---- */

static enum qtr_status score_one(const struct qtr_longbench_task *task, struct qtr_string answer, struct qtr_string gold,
                                 const struct qtr_string *classes, size_t n_classes, const struct qtr_segmenter *words,
                                 double *score, struct qtr_error *err) {
  switch (task->metric) {
    case QTR_LONGBENCH_F1: return qtr_metric_f1(answer, gold, score, err);
    case QTR_LONGBENCH_F1_ZH: return qtr_metric_f1_zh(answer, gold, words, score, err);
    case QTR_LONGBENCH_ROUGE: return qtr_metric_rouge_l(answer, gold, score, err);
    case QTR_LONGBENCH_ROUGE_ZH: return qtr_metric_rouge_l_zh(answer, gold, words, score, err);
    case QTR_LONGBENCH_CODE: return qtr_metric_code(answer, gold, score, err);
    case QTR_LONGBENCH_CLASSES: *score = qtr_metric_classification(answer, gold, classes, n_classes); break;
    case QTR_LONGBENCH_RETRIEVAL: *score = qtr_metric_retrieval(answer, gold); break;
    case QTR_LONGBENCH_RETRIEVAL_ZH: *score = qtr_metric_retrieval_zh(answer, gold); break;
    case QTR_LONGBENCH_COUNT: *score = qtr_metric_count(answer, gold); break;
  }
  return QTR_OK;
}

enum qtr_status qtr_longbench_score(const struct qtr_longbench_task *task, const struct qtr_longbench_item *item,
                                    struct qtr_string answer, bool extended, const struct qtr_segmenter *words,
                                    double *score, struct qtr_error *err) {
  size_t n_classes = json_array_size(item->classes), i;
  struct qtr_string *classes = malloc((n_classes + 1) * sizeof *classes);
  const json_t *entry;
  enum qtr_status status = QTR_OK;
  *score = 0;
  if (!classes) return qtr_fail_memory(err, "classes", n_classes * sizeof *classes);
  for (i = 0; i < n_classes; i++) classes[i] = string_of(json_array_get(item->classes, i));
  struct qtr_string text = qtr_longbench_trim(task, answer, extended);
  json_array_foreach(item->answers, i, entry) {
    double one = 0;
    status = score_one(task, text, string_of(entry), classes, n_classes, words, &one, err);
    if (status) break;
    *score = one > *score ? one : *score;
  }
  free(classes);
  return status;
}
