/* longbench.c - runs LongBench: maps the data files, makes prompts (their middle left out when they are too long), has them
 * answered all at once, adds up the scores (longbench.h; spec G.2.1). Lines are parsed when their question is asked and
 * again when it is answered: memory does not grow with the data. */
#include "eval/longbench.h"

#include "base/checked.h"
#include "base/file.h"
#include "base/status.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct line {
  size_t offset, len, number; /* number: in the file, from 1 */
};

struct file {
  char *path;
  struct qtr_map map;
  struct line *line; /* (n) those that are not empty, up to the limit */
  size_t n;
};

struct question {
  size_t task, line;
  bool truncated;
};

struct run {
  struct qtr_engine *engine;
  const struct qtr_longbench_options *options;
  struct qtr_longbench_result *result;
  size_t max_model_len;
  struct file file[QTR_LONGBENCH_N_TASKS];
  struct question *question; /* (n_questions) */
  size_t n_questions;
};

/* ---- files ---- */

static bool is_blank(const char *p, size_t n) {
  for (size_t i = 0; i < n; i++) {
    if (p[i] != ' ' && p[i] != '\t' && p[i] != '\r') return false;
  }
  return true;
}

static enum qtr_status find_lines(struct file *file, size_t limit, struct qtr_error *err) {
  const char *data = file->map.data ? (const char *)file->map.data : "", *end = data + file->map.n_bytes;
  size_t capacity = 0, number = 0;
  for (const char *p = data; p < end && (limit == 0 || file->n < limit);) {
    const char *newline = memchr(p, '\n', (size_t)(end - p));
    size_t len = newline ? (size_t)(newline - p) : (size_t)(end - p);
    number++;
    if (!is_blank(p, len)) {
      if (file->n == capacity) {
        capacity = capacity ? capacity * 2 : 256;
        struct line *more = realloc(file->line, capacity * sizeof *more);
        if (!more) return qtr_fail_memory(err, "lines", capacity * sizeof *more);
        file->line = more;
      }
      file->line[file->n++] = (struct line){(size_t)(p - data), len, number};
    }
    p += len + 1;
  }
  return file->n > 0 ? QTR_OK : qtr_fail(err, QTR_ERR_FORMAT, "%s has no lines", file->path);
}

static enum qtr_status parse(const struct run *run, const struct question *q, struct qtr_longbench_item *item,
                             struct qtr_error *err) {
  const struct file *file = &run->file[q->task];
  const struct line *line = &file->line[q->line];
  enum qtr_status status =
      qtr_longbench_item_parse((const char *)file->map.data + line->offset, line->len, !run->engine, item, err);
  if (status) (void)qtr_error_prefix(err, "%s, line %zu", file->path, line->number);
  return status;
}

static enum qtr_status open_files(struct run *run, struct qtr_error *err) {
  const struct qtr_longbench_options *o = run->options;
  enum qtr_status status = QTR_OK;
  for (size_t t = 0; t < o->n_tasks && !status; t++) {
    struct file *file = &run->file[t];
    char name[64];
    (void)snprintf(name, sizeof name, "%s%s.jsonl", o->task[t]->name, o->extended ? "_e" : "");
    file->path = qtr_path_join(o->dir, name);
    if (!file->path) return qtr_fail_memory(err, "a path", strlen(o->dir));
    status = qtr_map_open(file->path, &file->map, err);
    if (!status) status = find_lines(file, o->limit, err);
    run->n_questions += file->n;
  }
  if (status) return status;
  run->question = calloc(run->n_questions, sizeof *run->question);
  if (!run->question) return qtr_fail_memory(err, "questions", run->n_questions * sizeof *run->question);
  struct question *q = run->question;
  for (size_t t = 0; t < o->n_tasks; t++) {
    for (size_t i = 0; i < run->file[t].n; i++) *q++ = (struct question){.task = t, .line = i};
  }
  for (size_t i = 0; i < run->n_questions && !status; i++) { /* a bad line is told before hours of work, not after */
    struct qtr_longbench_item item;
    status = parse(run, &run->question[i], &item, err);
    if (!status) qtr_longbench_item_free(&item);
  }
  return status;
}

static void close_files(struct run *run) {
  for (size_t t = 0; t < QTR_LONGBENCH_N_TASKS; t++) {
    free(run->file[t].path);
    free(run->file[t].line);
    qtr_map_close(&run->file[t].map);
  }
  free(run->question);
}

/* ---- prompts ---- */

static enum qtr_status fill(const char *prompt, const struct qtr_longbench_item *item, struct qtr_text *out,
                            struct qtr_error *err) {
  static const char context[] = "{context}", input[] = "{input}";
  enum qtr_status status = QTR_OK;
  while (*prompt && !status) {
    size_t n = strcspn(prompt, "{");
    status = qtr_text_append(out, prompt, n, err);
    prompt += n;
    if (status || !*prompt) break;
    if (strncmp(prompt, context, sizeof context - 1) == 0) {
      status = qtr_text_append(out, item->context.p, item->context.n, err);
      prompt += sizeof context - 1;
    } else if (strncmp(prompt, input, sizeof input - 1) == 0) {
      status = qtr_text_append(out, item->input.p, item->input.n, err);
      prompt += sizeof input - 1;
    } else {
      status = qtr_text_append(out, prompt++, 1, err);
    }
  }
  return status;
}

/* Leaves the middle out of a text of more than max_tokens: its first and its last half of them, as text again. */
static enum qtr_status truncate(struct qtr_engine *engine, size_t max_tokens, struct qtr_text *text, bool *truncated,
                                struct qtr_error *err) {
  int32_t *token = NULL;
  size_t n = 0, half = max_tokens / 2, len[2] = {0, 0};
  char *part[2] = {NULL, NULL};
  enum qtr_status status = qtr_engine_tokenize(engine, text->data, text->len, false, false, &token, &n, err);
  if (status || n <= max_tokens) {
    free(token);
    return status;
  }
  *truncated = true;
  status = qtr_engine_detokenize(engine, token, half, &part[0], &len[0], err);
  if (!status) status = qtr_engine_detokenize(engine, token + n - half, half, &part[1], &len[1], err);
  text->len = 0;
  for (size_t i = 0; i < 2 && !status; i++) status = qtr_text_append(text, part[i], len[i], err);
  free(part[0]);
  free(part[1]);
  free(token);
  return status;
}

static enum qtr_status make(void *user, size_t i, struct qtr_ask_prompt *prompt, int32_t *max_tokens,
                            struct qtr_error *err) {
  struct run *run = user;
  struct question *q = &run->question[i];
  const struct qtr_longbench_task *task = run->options->task[q->task];
  enum qtr_ask_style style = run->options->style == QTR_ASK_CHAT && !task->plain ? QTR_ASK_CHAT : QTR_ASK_PLAIN;
  struct qtr_longbench_item item;
  struct qtr_text text = {0};
  *max_tokens = task->max_tokens;
  if (run->max_model_len <= (size_t)task->max_tokens + 16) {
    return qtr_fail(err, QTR_ERR_LIMIT, "answers of task %s have up to %d tokens; this model takes %zu with the prompt",
                    task->name, task->max_tokens, run->max_model_len);
  }
  size_t fits = run->max_model_len - (size_t)task->max_tokens;
  size_t most = run->options->max_length > 0 ? QTR_MIN(run->options->max_length, fits) : fits;
  enum qtr_status status = parse(run, q, &item, err);
  if (status) return status;
  status = fill(task->prompt, &item, &text, err);
  qtr_longbench_item_free(&item);
  /* The halves joined may have a token or two more than apart, and there are BOS and the template: once more, if so. */
  for (int round = 0; round < 4 && !status; round++) {
    status = truncate(run->engine, most, &text, &q->truncated, err);
    if (!status) status = qtr_ask_render(run->engine, style, text.data, text.len, prompt, err);
    if (status || prompt->n_tokens <= fits) break;
    size_t over = prompt->n_tokens - fits;
    free(prompt->token);
    *prompt = (struct qtr_ask_prompt){0};
    if (round == 3 || most <= over + 2) {
      status = qtr_fail(err, QTR_ERR_LIMIT, "a prompt of task %s cannot be cut to %zu tokens", task->name, fits);
    } else {
      most -= over;
    }
  }
  qtr_text_free(&text);
  return status;
}

/* ---- scores ---- */

static enum qtr_status judge(struct run *run, size_t i, const struct qtr_longbench_item *item, struct qtr_string answer,
                             struct qtr_error *err) {
  const struct qtr_longbench_options *o = run->options;
  const struct question *q = &run->question[i];
  struct qtr_longbench_result *r = &run->result[q->task];
  double score;
  enum qtr_status status = qtr_longbench_score(o->task[q->task], item, answer, o->extended, o->words, &score, err);
  if (status) return status;
  size_t group = item->length < 4000 ? 0 : item->length < 8000 ? 1 : 2;
  r->n++;
  r->n_truncated += q->truncated;
  r->score += score;
  r->group_n[group]++;
  r->group_score[group] += score;
  if (o->answered)
    o->answered(o->user, o->task[q->task], run->file[q->task].line[q->line].number, item, answer, score, q->truncated);
  return QTR_OK;
}

static enum qtr_status take(void *user, size_t i, const struct qtr_ask_answer *answer, struct qtr_error *err) {
  struct run *run = user;
  struct qtr_longbench_item item;
  enum qtr_status status = parse(run, &run->question[i], &item, err);
  if (status) return status;
  status = judge(run, i, &item, (struct qtr_string){answer->text, answer->len}, err);
  qtr_longbench_item_free(&item);
  return status;
}

/* Per cent to two digits, as the reference rounds. */
static double percent(double sum, size_t n) { return n > 0 ? rint(1e4 * sum / (double)n) / 100 : 0; }

enum qtr_status qtr_longbench_run(struct qtr_engine *engine, const struct qtr_longbench_options *options,
                                  struct qtr_longbench_result *result, struct qtr_error *err) {
  struct run run = {.engine = engine, .options = options, .result = result};
  for (size_t t = 0; t < options->n_tasks; t++) result[t] = (struct qtr_longbench_result){.task = options->task[t]};
  if (engine) {
    struct qtr_engine_info info;
    qtr_engine_get_info(engine, &info);
    run.max_model_len = (size_t)info.max_model_len;
  }
  enum qtr_status status = open_files(&run, err);
  if (!status && engine) {
    const struct qtr_ask ask = {
        .n = run.n_questions, .make = make, .take = take, .user = &run, .label = "LongBench", .quiet = options->quiet};
    status = qtr_ask_run(engine, &ask, err);
  }
  for (size_t i = 0; i < run.n_questions && !status && !engine; i++) {
    struct qtr_longbench_item item;
    status = parse(&run, &run.question[i], &item, err);
    if (status) break;
    status = judge(&run, i, &item, item.prediction, err);
    qtr_longbench_item_free(&item);
  }
  for (size_t t = 0; t < options->n_tasks; t++) {
    struct qtr_longbench_result *r = &result[t];
    r->score = percent(r->score, r->n);
    for (size_t g = 0; g < QTR_LONGBENCH_GROUPS; g++) r->group_score[g] = percent(r->group_score[g], r->group_n[g]);
  }
  close_files(&run);
  return status;
}
