/* segment.c - words from a hash table, the best path by dynamic programming from the end of the text (segment.h). */
#include "eval/segment.h"

#include "base/checked.h"
#include "base/file.h"
#include "base/status.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MAX_FILE ((size_t)256 << 20)
#define MAX_WORD_CHARS 32 /* longer ones in the list are left out */

struct qtr_segmenter {
  json_t *frequency; /* word: its frequency, a real. A hash table with keys of any bytes of UTF-8 */
  double total;
  size_t longest; /* characters of the longest word */
};

/* ---- the list ---- */

static size_t count_chars(const char *p, size_t n) {
  size_t chars = 0;
  for (size_t i = 0; i < n; i++) chars += ((unsigned char)p[i] & 0xc0) != 0x80;
  return chars;
}

static enum qtr_status add_word(struct qtr_segmenter *s, const char *word, size_t n, double frequency,
                                struct qtr_error *err) {
  size_t chars = count_chars(word, n);
  if (n == 0 || chars > MAX_WORD_CHARS) return QTR_OK;
  if (json_object_setn_new(s->frequency, word, n, json_real(frequency))) {
    return qtr_fail(err, QTR_ERR_FORMAT, "a word is not valid UTF-8");
  }
  s->total += frequency;
  s->longest = QTR_MAX(s->longest, chars);
  return QTR_OK;
}

static enum qtr_status add_line(struct qtr_segmenter *s, const char *line, size_t len, struct qtr_error *err) {
  const char *end = line + len, *p = line;
  while (p < end && *p != ' ' && *p != '\t' && *p != '\r') p++;
  size_t n = (size_t)(p - line);
  while (p < end && (*p == ' ' || *p == '\t')) p++;
  double frequency = 0;
  const char *digits = p;
  for (; p < end && *p >= '0' && *p <= '9' && p - digits < 15; p++) frequency = frequency * 10 + (*p - '0');
  return add_word(s, line, n, p > digits ? frequency : 1, err);
}

enum qtr_status qtr_segmenter_parse(const char *data, size_t n_bytes, const char *name, struct qtr_segmenter **segmenter,
                                    struct qtr_error *err) {
  struct qtr_segmenter *s = calloc(1, sizeof *s);
  *segmenter = NULL;
  if (!s) return qtr_fail_memory(err, "a word list", sizeof *s);
  s->frequency = json_object();
  enum qtr_status status = s->frequency ? QTR_OK : qtr_fail_memory(err, "a word list", n_bytes);
  size_t number = 0;
  for (const char *p = data, *end = data + n_bytes; p < end && !status;) {
    const char *newline = memchr(p, '\n', (size_t)(end - p));
    size_t len = newline ? (size_t)(newline - p) : (size_t)(end - p);
    number++;
    status = add_line(s, p, len, err);
    if (status) (void)qtr_error_prefix(err, "%s, line %zu", name, number);
    p += len + 1;
  }
  if (!status && (s->longest == 0 || s->total <= 0)) {
    status = qtr_fail(err, QTR_ERR_FORMAT, "%s has no words with frequencies above 0", name);
  }
  if (status) {
    qtr_segmenter_free(s);
  } else {
    *segmenter = s;
  }
  return status;
}

enum qtr_status qtr_segmenter_open(const char *path, struct qtr_segmenter **segmenter, struct qtr_error *err) {
  char *data;
  size_t n_bytes;
  *segmenter = NULL;
  enum qtr_status status = qtr_file_read(path, MAX_FILE, &data, &n_bytes, err);
  if (status) return status;
  status = qtr_segmenter_parse(data, n_bytes, path, segmenter, err);
  free(data);
  return status;
}

void qtr_segmenter_free(struct qtr_segmenter *s) {
  if (!s) return;
  json_decref(s->frequency);
  free(s);
}

/* ---- cutting ---- */

static bool is_han(int32_t c) { return c >= 0x4e00 && c <= 0x9fd5; }

static bool is_ascii_word(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9'); }

/* Cuts a run of Han characters: best[i] is the log-probability of the best way to cut from byte i on. */
static enum qtr_status cut_han(const struct qtr_segmenter *s, const char *run, size_t len, struct qtr_words *words,
                               struct qtr_error *err) {
  size_t n = len / 3; /* these characters have three bytes each */
  double *best = malloc((n + 1) * sizeof *best);
  size_t *length = malloc((n + 1) * sizeof *length); /* of the word that begins there, in characters */
  enum qtr_status status = QTR_OK;
  if (!best || !length) {
    status = qtr_fail_memory(err, "a text to cut", n);
    goto done;
  }
  double log_total = log(s->total);
  best[n] = 0;
  for (size_t i = n; i-- > 0;) {
    best[i] = -INFINITY;
    for (size_t k = 1; k <= s->longest && i + k <= n; k++) {
      const json_t *found = json_object_getn(s->frequency, run + 3 * i, 3 * k);
      double frequency = json_real_value(found);
      if (frequency <= 0 && k > 1) continue;
      double probability = log(frequency > 0 ? frequency : 1) - log_total + best[i + k];
      if (probability >= best[i]) { /* of equals the longer word, as in the original */
        best[i] = probability;
        length[i] = k;
      }
    }
  }
  for (size_t i = 0; i < n && !status; i += length[i]) status = qtr_words_add(words, run + 3 * i, 3 * length[i], err);
done:
  free(best);
  free(length);
  return status;
}

enum qtr_status qtr_segment(const struct qtr_segmenter *s, const char *text, size_t len, struct qtr_words *words,
                            struct qtr_error *err) {
  const char *end = text + len;
  enum qtr_status status = QTR_OK;
  for (const char *p = text; p < end && !status;) {
    size_t n;
    int32_t c = qtr_words_char(p, end, &n);
    const char *q = p + n;
    if (is_ascii_word(*p)) {
      while (q < end && is_ascii_word(*q)) q++;
      status = qtr_words_add(words, p, (size_t)(q - p), err);
    } else if (s && is_han(c)) {
      while (q < end && is_han(qtr_words_char(q, end, &n))) q += n;
      status = cut_han(s, p, (size_t)(q - p), words, err);
    } else {
      status = qtr_words_add(words, p, n, err);
    }
    p = q;
  }
  return status;
}
