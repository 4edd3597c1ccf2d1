/* eval_common.c - what the evaluations that ask questions share: lists of numbers, haystacks, drawings, files of answers. */
#include "base/file.h"
#include "base/status.h"
#include "cli/eval.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MAX_NUMBERS 200

enum qtr_status qtr_eval_parse_numbers(const char *option, const char *text, double min, double max, double **number,
                                       size_t *n, struct qtr_error *err) {
  double *list = malloc(MAX_NUMBERS * sizeof *list);
  *number = list;
  *n = 0;
  if (!list) return qtr_fail_memory(err, "numbers", MAX_NUMBERS * sizeof *list);
  for (const char *p = text;;) {
    char *end;
    double x = strtod(p, &end);
    size_t percent = *end == '%';
    if (end == p || (end[percent] && end[percent] != ',') || !isfinite(x) || x < min || x > max || *n == MAX_NUMBERS) break;
    list[(*n)++] = x;
    if (!end[percent]) return QTR_OK;
    p = end + percent + 1;
  }
  free(list);
  *number = NULL;
  return qtr_fail(err, QTR_ERR_ARGUMENT, "--%s \"%.80s\": write numbers from %g to %g with commas between them, at most %d",
                  option, text, min, max, MAX_NUMBERS);
}

enum qtr_status qtr_eval_open_haystack(struct qtr_engine *engine, const char *path, uint64_t seed, size_t n_tokens,
                                       struct qtr_haystack *haystack, struct qtr_error *err) {
  return path ? qtr_haystack_read(engine, path, haystack, err)
              : qtr_haystack_generate(engine, seed, n_tokens, haystack, err);
}

enum qtr_ask_style qtr_eval_style(const char *name) {
  return strcmp(name, "chat") == 0 ? QTR_ASK_CHAT : strcmp(name, "plain") == 0 ? QTR_ASK_PLAIN : QTR_ASK_AUTO;
}

enum qtr_status qtr_eval_write_drawing(const char *path, const struct qtr_heatmap *map,
                                       enum qtr_status (*draw)(const struct qtr_heatmap *, void **, size_t *,
                                                               struct qtr_error *),
                                       struct qtr_error *err) {
  void *data = NULL;
  size_t n_bytes = 0;
  if (!path) return QTR_OK;
  enum qtr_status status = draw(map, &data, &n_bytes, err);
  if (!status) status = qtr_file_write(path, data, n_bytes, err);
  free(data);
  return status;
}

enum qtr_status qtr_eval_lines_open(const char *path, struct qtr_eval_lines *lines, struct qtr_error *err) {
  *lines = (struct qtr_eval_lines){.path = path};
  if (!path) return QTR_OK;
  lines->file = fopen(path, "w");
  return lines->file ? QTR_OK : qtr_fail(err, QTR_ERR_IO, "cannot write %s: %s", path, strerror(errno));
}

void qtr_eval_lines_add(struct qtr_eval_lines *lines, json_t *object) {
  if (lines->file && object) {
    (void)json_dumpf(object, lines->file, JSON_COMPACT | JSON_REAL_PRECISION(10));
    (void)fputc('\n', lines->file);
  }
  json_decref(object);
}

enum qtr_status qtr_eval_lines_close(struct qtr_eval_lines *lines, struct qtr_error *err) {
  if (!lines->file) return QTR_OK;
  bool failed = ferror(lines->file) != 0;
  failed = fclose(lines->file) != 0 || failed;
  lines->file = NULL;
  return failed ? qtr_fail(err, QTR_ERR_IO, "cannot write all of %s: %s", lines->path, strerror(errno)) : QTR_OK;
}
