/* calibration.c - calibration texts (calibration.h). */
#include "quant/calibration.h"

#include "base/checked.h"
#include "base/file.h"
#include "base/philox.h"
#include "base/status.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#define MAX_TEXT_BYTES ((size_t)4 << 30)

/* A stream of tokens under construction, and the random numbers that choose it. */
struct stream {
  int32_t *token;
  size_t n, capacity;
  const struct qtr_tokenizer *tokenizer;
  uint64_t seed, n_drawn;
  struct qtr_error *err;
};

static size_t draw(struct stream *s, size_t below) {
  return (size_t)(qtr_philox_unit(s->seed, s->n_drawn++) * (double)below);
}

static void shuffle(struct stream *s, size_t *index, size_t n) {
  for (size_t i = 0; i < n; i++) index[i] = i;
  for (size_t i = n; i > 1; i--) {
    size_t k = draw(s, i), t = index[i - 1];
    index[i - 1] = index[k];
    index[k] = t;
  }
}

static enum qtr_status push(struct stream *s, const int32_t *token, size_t n) {
  if (s->n + n > s->capacity) {
    size_t capacity = 2 * (s->n + n);
    int32_t *more = realloc(s->token, capacity * sizeof *more);
    if (!more) return qtr_fail_memory(s->err, "calibration tokens", capacity * sizeof *more);
    s->token = more;
    s->capacity = capacity;
  }
  memcpy(s->token + s->n, token, n * sizeof *token);
  s->n += n;
  return QTR_OK;
}

static const struct qtr_encode_options plain = {.add_special = false, .parse_special = false};

static enum qtr_status push_bos(struct stream *s) {
  int32_t bos = qtr_tokenizer_bos(s->tokenizer);
  return bos >= 0 && qtr_tokenizer_adds_bos(s->tokenizer) ? push(s, &bos, 1) : QTR_OK;
}

static size_t bos_tokens(const struct qtr_tokenizer *tokenizer) {
  return qtr_tokenizer_bos(tokenizer) >= 0 && qtr_tokenizer_adds_bos(tokenizer) ? 1 : 0;
}

/* One text into blocks of (length - BOS) tokens, n_samples of them chosen. */
static enum qtr_status from_text(struct stream *s, const char *text, size_t len, size_t n_samples, size_t length) {
  int32_t *ids = NULL;
  size_t n_ids = 0, *index = NULL, block = length - bos_tokens(s->tokenizer);
  enum qtr_status status = qtr_tokenizer_encode(s->tokenizer, text, len, &plain, &ids, &n_ids, s->err);
  size_t n_blocks = n_ids / block;
  if (!status && n_blocks < n_samples) {
    status = qtr_fail(s->err, QTR_ERR_LIMIT, "the text has %zu tokens: enough for %zu samples of %zu, not for %zu", n_ids,
                      n_blocks, length, n_samples);
  }
  if (!status && !(index = malloc(n_blocks * sizeof *index))) status = qtr_fail_memory(s->err, "an index", n_blocks);
  if (!status) shuffle(s, index, n_blocks);
  for (size_t i = 0; i < n_samples && !status; i++) {
    status = push_bos(s);
    if (!status) status = push(s, ids + index[i] * block, block);
  }
  free(index);
  free(ids);
  return status;
}

static bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

/* The "text" of one line, stripped, cropped to length tokens and joined to the stream. number: the line's, from 1. */
static enum qtr_status push_line(struct stream *s, const char *line, size_t len, size_t number, size_t length) {
  json_error_t error;
  json_t *root = json_loadb(line, len, 0, &error);
  const json_t *value = json_object_get(root, "text");
  enum qtr_status status = QTR_OK;
  if (!json_is_string(value)) {
    json_decref(root);
    return qtr_fail(s->err, QTR_ERR_FORMAT, "line %zu is not a JSON object with a string \"text\"", number);
  }
  const char *text = json_string_value(value);
  size_t n = json_string_length(value), n_ids = 0, room = length - bos_tokens(s->tokenizer);
  while (n > 0 && is_space(text[n - 1])) n--;
  while (n > 0 && is_space(*text)) text++, n--;
  int32_t *ids = NULL;
  if (n > 0) status = qtr_tokenizer_encode(s->tokenizer, text, n, &plain, &ids, &n_ids, s->err);
  if (!status && n_ids > 0) {
    size_t begin = n_ids > room ? draw(s, n_ids - room + 1) : 0;
    status = push_bos(s);
    if (!status) status = push(s, ids + begin, QTR_MIN(n_ids, room));
  }
  free(ids);
  json_decref(root);
  return status;
}

static enum qtr_status from_lines(struct stream *s, const char *text, size_t len, size_t n_samples, size_t length) {
  size_t n_lines = 0, *begin = NULL, *index = NULL;
  enum qtr_status status = QTR_OK;
  for (size_t i = 0; i < len; i++) n_lines += text[i] == '\n';
  n_lines += len > 0 && text[len - 1] != '\n';
  begin = malloc((n_lines + 1) * sizeof *begin);
  index = malloc((n_lines + 1) * sizeof *index);
  if (!begin || !index) {
    status = qtr_fail_memory(s->err, "an index", n_lines * sizeof *index);
    goto done;
  }
  begin[0] = 0;
  for (size_t i = 0, k = 1; i < len && k <= n_lines; i++) {
    if (text[i] == '\n' || i + 1 == len) begin[k++] = i + 1;
  }
  shuffle(s, index, n_lines);
  for (size_t i = 0; i < n_lines && s->n < n_samples * length && !status; i++) {
    size_t from = begin[index[i]], to = begin[index[i] + 1];
    while (to > from && is_space(text[to - 1])) to--;
    if (to > from) status = push_line(s, text + from, to - from, index[i] + 1, length);
  }
  if (!status && s->n < n_samples * length) {
    status = qtr_fail(s->err, QTR_ERR_LIMIT, "the texts have %zu tokens: enough for %zu samples of %zu, not for %zu", s->n,
                      s->n / length, length, n_samples);
  }
done:
  free(begin);
  free(index);
  return status;
}

enum qtr_status qtr_calibration_read(const char *path, const struct qtr_tokenizer *tokenizer, size_t n_samples,
                                     size_t length, uint64_t seed, struct qtr_calibration *calibration,
                                     struct qtr_error *err) {
  *calibration = (struct qtr_calibration){.n_samples = n_samples, .length = length};
  char *text;
  size_t len, n = strlen(path);
  enum qtr_status status = qtr_file_read(path, MAX_TEXT_BYTES, &text, &len, err);
  if (status) return status;
  struct stream s = {.tokenizer = tokenizer, .seed = seed, .err = err};
  bool lines = n > 6 && strcmp(path + n - 6, ".jsonl") == 0;
  status = lines ? from_lines(&s, text, len, n_samples, length) : from_text(&s, text, len, n_samples, length);
  free(text);
  if (status) {
    (void)qtr_error_prefix(err, "%s", path);
    free(s.token);
    return status;
  }
  calibration->token = s.token;
  calibration->hash = 0xcbf29ce484222325u; /* FNV-1a */
  for (size_t i = 0; i < n_samples * length; i++)
    calibration->hash = (calibration->hash ^ (uint32_t)s.token[i]) * 0x100000001b3u;
  return QTR_OK;
}

void qtr_calibration_free(struct qtr_calibration *calibration) {
  free(calibration->token);
  *calibration = (struct qtr_calibration){0};
}
