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

enum qtr_status qtr_eval_parse_lengths(const char *text, size_t **length, size_t *n, struct qtr_error *err) {
  double *list;
  enum qtr_status status = qtr_eval_parse_numbers("lengths", text, 32, 1 << 24, &list, n, err);
  *length = NULL;
  if (status) return status;
  *length = calloc(*n, sizeof **length);
  if (!*length) status = qtr_fail_memory(err, "lengths", *n * sizeof **length);
  for (size_t i = 0; i < *n && !status; i++) {
    (*length)[i] = (size_t)list[i];
    if ((double)(*length)[i] != list[i] || strchr(text, '%')) {
      status = qtr_fail(err, QTR_ERR_ARGUMENT, "--lengths \"%.80s\": write whole numbers of tokens", text);
    }
  }
  free(list);
  return status;
}

const char **qtr_eval_number_labels(const double *x, size_t n, const char *suffix) {
  enum { LABEL = 24 };
  const char **label = calloc(n, sizeof *label + LABEL); /* the pointers, then what they point to */
  char *text = (char *)(label ? label + n : NULL);
  for (size_t i = 0; label && i < n; i++, text += LABEL) {
    (void)snprintf(text, LABEL, "%.8g%s", x[i], suffix);
    label[i] = text;
  }
  return label;
}

const char *qtr_eval_describe(const struct qtr_engine_info *info, double accuracy, size_t n, char out[160]) {
  char model[96];
  const char *base = strrchr(info->model_dir, '/'); /* the directory's own name */
  base = base && base[1] ? base + 1 : info->model_dir;
  (void)snprintf(out, 160, "%s, %s, %.1f %% of %zu", qtr_printable(base, strlen(base), model, sizeof model), info->precision,
                 100 * accuracy, n);
  return out;
}

const char *qtr_eval_title(const char *what, const struct qtr_model_flags *model, char out[160]) {
  const struct qtr_sparse_options *s = &model->sparse;
  bool chooses = model->sparse_decode_mode && model->sparse_decode_mode[0] == '1';
  char streaming[48] = "", budget[48] = "";
  if (s->static_sparsity > 0)
    (void)snprintf(streaming, sizeof streaming, "%.3g %% streaming", 100 * (double)s->static_sparsity);
  if (chooses) (void)snprintf(budget, sizeof budget, "%sbudget %d", streaming[0] ? ", " : "", s->token_budget);
  bool any = streaming[0] || budget[0];
  (void)snprintf(out, 160, "%.48s%s%s%s%s", what, any ? " (" : "", streaming, budget, any ? ")" : "");
  return out;
}

static enum qtr_status write_map(const char *path, const struct qtr_heatmap *map,
                                 enum qtr_status (*draw)(const struct qtr_heatmap *, void **, size_t *, struct qtr_error *),
                                 struct qtr_error *err) {
  void *data = NULL;
  size_t n_bytes = 0;
  if (!path) return QTR_OK;
  enum qtr_status status = draw(map, &data, &n_bytes, err);
  if (!status) status = qtr_file_write(path, data, n_bytes, err);
  free(data);
  return status;
}

enum qtr_status qtr_eval_write_maps(const char *svg, const char *png, const struct qtr_heatmap *map, struct qtr_error *err) {
  enum qtr_status status = write_map(svg, map, qtr_heatmap_svg, err);
  return status ? status : write_map(png, map, qtr_heatmap_png, err);
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
