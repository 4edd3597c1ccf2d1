/* longbench.h - LongBench (Bai et al., ACL 2024; spec G.2) over local data: tasks, prompts, scores. Data files are
 * untrusted. */
#ifndef QTR_EVAL_LONGBENCH_H
#define QTR_EVAL_LONGBENCH_H

#include "eval/ask.h"
#include "eval/metrics.h"
#include "eval/segment.h"

#include <jansson.h>

#define QTR_LONGBENCH_N_TASKS 21

enum qtr_longbench_metric {
  QTR_LONGBENCH_F1,
  QTR_LONGBENCH_F1_ZH,
  QTR_LONGBENCH_ROUGE,
  QTR_LONGBENCH_ROUGE_ZH,
  QTR_LONGBENCH_CLASSES,
  QTR_LONGBENCH_RETRIEVAL,
  QTR_LONGBENCH_RETRIEVAL_ZH,
  QTR_LONGBENCH_COUNT,
  QTR_LONGBENCH_CODE
};
const char *qtr_longbench_metric_name(enum qtr_longbench_metric metric);

struct qtr_longbench_task {
  const char *name, *prompt; /* {context} and {input} are to be filled in */
  int32_t max_tokens;
  enum qtr_longbench_metric metric;
  bool first_line; /* only the answer's first line counts */
  bool plain;      /* never in a chat template: the prompt shows examples or code to go on with */
};
extern const struct qtr_longbench_task qtr_longbench_tasks[QTR_LONGBENCH_N_TASKS];
const struct qtr_longbench_task *qtr_longbench_find(const char *name); /* NULL: no such task */

/* A line of a data file. The strings belong to root. */
struct qtr_longbench_item {
  json_t *root, *answers, *classes; /* classes: NULL when there are none */
  struct qtr_string input, context; /* of a question; else empty */
  struct qtr_string prediction;     /* of a line of predictions; else empty */
  int64_t length;
};
/* {"input", "context", "answers": […], "all_classes": […] or null, "length"}; with `predicted` {"pred", "answers", …}.
 * QTR_ERR_FORMAT says what is wrong. Free with qtr_longbench_item_free. */
enum qtr_status qtr_longbench_item_parse(const char *line, size_t len, bool predicted, struct qtr_longbench_item *item,
                                         struct qtr_error *err);
void qtr_longbench_item_free(struct qtr_longbench_item *item);

/* The part of an answer that counts. extended: LongBench-E, which only knows the first-line rule. */
struct qtr_string qtr_longbench_trim(const struct qtr_longbench_task *task, struct qtr_string answer, bool extended);

/* 0 … 1, the best over the item's answers. words: for Chinese; NULL = characters. */
enum qtr_status qtr_longbench_score(const struct qtr_longbench_task *task, const struct qtr_longbench_item *item,
                                    struct qtr_string answer, bool extended, const struct qtr_segmenter *words,
                                    double *score, struct qtr_error *err);

struct qtr_longbench_options {
  const char *dir;                                              /* <dir>/<task>.jsonl, extended: <task>_e.jsonl */
  const struct qtr_longbench_task *task[QTR_LONGBENCH_N_TASKS]; /* (n_tasks) */
  size_t n_tasks;
  size_t limit;             /* only the first so many lines of each; 0 = all */
  size_t max_length;        /* tokens of a prompt, beyond which its middle is left out; 0 = what the model takes */
  enum qtr_ask_style style; /* AUTO = PLAIN, as the reference has it; CHAT leaves the tasks alone that are always plain */
  bool extended;
  const struct qtr_segmenter *words;
  bool quiet;
  /* Told about every answer, in any order; may be NULL. line: in the task's file, from 1. truncated: the prompt's middle was
   * left out. */
  void (*answered)(void *user, const struct qtr_longbench_task *task, size_t line, const struct qtr_longbench_item *item,
                   struct qtr_string answer, double score, bool truncated);
  void *user;
};

#define QTR_LONGBENCH_GROUPS 3 /* by length: below 4,000 words, below 8,000, the rest */

struct qtr_longbench_result {
  const struct qtr_longbench_task *task;
  double score; /* 0 … 100 */
  size_t n, n_truncated;
  double group_score[QTR_LONGBENCH_GROUPS]; /* 0 … 100 */
  size_t group_n[QTR_LONGBENCH_GROUPS];
};

/* engine NULL: the files hold predictions, which are scored. result: (n_tasks). */
enum qtr_status qtr_longbench_run(struct qtr_engine *engine, const struct qtr_longbench_options *options,
                                  struct qtr_longbench_result *result, struct qtr_error *err);

#endif
