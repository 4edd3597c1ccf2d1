/* heads.c - reads DuoAttention's full_attention_heads.tsv and chooses the streaming heads (heads.h, spec D.1). Only the
 * table is read: the config.json beside it describes the training run and decides nothing. */
#include "checkpoint/heads.h"

#include "base/checked.h"
#include "base/file.h"
#include "base/status.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_FILE_BYTES ((size_t)8 << 20) /* 1,000 layers of 256 heads, 25 characters each, are 6.4 MB */
#define MAX_NUMBER 63                    /* characters of one value */

/* One number of a line: text[*at, len). False: what stands there is none. */
static bool parse_number(const char *text, size_t len, size_t *at, double *value) {
  char copy[MAX_NUMBER + 1], *end; /* strtod needs an end, and a file has none */
  size_t n = 0;
  while (*at + n < len && !strchr(" \t\r\n", text[*at + n]) && n < MAX_NUMBER) n++;
  if (n == 0 || memchr(text + *at, 0, n)) return false;
  memcpy(copy, text + *at, n);
  copy[n] = 0;
  *value = strtod(copy, &end);
  *at += n;
  return *end == 0 && isfinite(*value);
}

enum qtr_status qtr_heads_parse(const char *text, size_t len, int32_t n_layers, int32_t n_kv_heads, double *value,
                                struct qtr_error *err) {
  int32_t layer = 0, head = 0;
  for (size_t at = 0; at < len;) {
    char c = text[at];
    if (c == ' ' || c == '\t' || c == '\r') {
      at++;
      continue;
    }
    if (c == '\n') {
      at++;
      if (head == 0) continue; /* an empty line */
      if (head != n_kv_heads) {
        return qtr_fail(err, QTR_ERR_FORMAT,
                        "layer %d has %d values, but the model has %d KV heads: the table is for another model", layer, head,
                        n_kv_heads);
      }
      layer++;
      head = 0;
      continue;
    }
    if (layer == n_layers || head == n_kv_heads) {
      return qtr_fail(err, QTR_ERR_FORMAT, "more than %d layers of %d values: the table is for another model", n_layers,
                      n_kv_heads);
    }
    double x;
    size_t begin = at;
    if (!parse_number(text, len, &at, &x)) {
      char shown[48];
      size_t n = strcspn(qtr_printable(text + begin, QTR_MIN(len - begin, (size_t)24), shown, sizeof shown), " ?");
      return qtr_fail(err, QTR_ERR_FORMAT, "layer %d, head %d: \"%.*s\" is no finite number", layer, head, (int)n, shown);
    }
    value[(size_t)layer * (size_t)n_kv_heads + (size_t)head++] = x < 0 ? 0 : x > 1 ? 1 : x;
  }
  if (head == n_kv_heads) { /* the last line may lack its end */
    layer++;
    head = 0;
  }
  if (layer != n_layers || head != 0) {
    return qtr_fail(err, QTR_ERR_FORMAT,
                    "the table ends in layer %d after %d values, but the model has %d layers of %d KV heads", layer, head,
                    n_layers, n_kv_heads);
  }
  return QTR_OK;
}

struct ranked {
  double value;
  size_t index;
};

static int by_value_then_index(const void *a, const void *b) {
  const struct ranked *x = a, *y = b;
  if (x->value != y->value) return x->value < y->value ? -1 : 1;
  return x->index < y->index ? -1 : x->index > y->index;
}

enum qtr_status qtr_heads_choose(const double *value, size_t n, double sparsity, uint8_t *streaming, struct qtr_error *err) {
  if (!(sparsity >= 0 && sparsity <= 1)) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "static sparsity is %g; it must be from 0 (no streaming heads) to 1 (all)",
                    sparsity);
  }
  if (n == 0) return QTR_OK;
  /* Values told apart by their index are all different. numpy's threshold lies at position sparsity * (n - 1) of the sorted
   * values, between two of them or on one, and those at or above it are full: so as many stream as that position rounded up.
   * It is rounded down a little before, because 0.3 of a command line is a float. */
  size_t n_streaming = sparsity >= 1 ? n : (size_t)ceil(fmax(sparsity * (double)(n - 1) - 1e-4, 0));
  struct ranked *ranked = malloc(n * sizeof *ranked);
  if (!ranked) return qtr_fail_memory(err, "the attention heads", n * sizeof *ranked);
  for (size_t i = 0; i < n; i++) ranked[i] = (struct ranked){value[i], i};
  qsort(ranked, n, sizeof *ranked, by_value_then_index);
  for (size_t i = 0; i < n; i++) streaming[ranked[i].index] = i < n_streaming;
  free(ranked);
  return QTR_OK;
}

enum qtr_status qtr_heads_read(const char *dir, int32_t n_layers, int32_t n_kv_heads, double sparsity, uint8_t *streaming,
                               struct qtr_error *err) {
  size_t n = (size_t)n_layers * (size_t)n_kv_heads, len = 0;
  double *value = calloc(n ? n : 1, sizeof *value);
  char *path = qtr_path_join(dir, QTR_HEADS_FILE), *text = NULL;
  enum qtr_status status = QTR_OK;
  if (!value || !path) {
    status = qtr_fail_memory(err, "the attention heads", n * sizeof *value);
    goto done;
  }
  if (!qtr_file_exists(path)) {
    status =
        qtr_fail(err, QTR_ERR_NOT_FOUND,
                 "no %s; give a directory of DuoAttention's attn_patterns, or make one with quattuor calibrate heads", path);
    goto done;
  }
  status = qtr_file_read(path, MAX_FILE_BYTES, &text, &len, err);
  if (status) goto done;
  status = qtr_heads_parse(text, len, n_layers, n_kv_heads, value, err);
  if (status)
    (void)qtr_error_prefix(err, "%s", path);
  else
    status = qtr_heads_choose(value, n, sparsity, streaming, err);
done:
  free(text);
  free(path);
  free(value);
  return status;
}
