/* rouge_l.c - ROUGE-L as the Python package rouge 1.0 computes it (metrics.h): texts are cut into sentences at full stops,
 * for each pair of sentences the longest common subsequence is traced back from its end, and the words on it join a set;
 * precision and recall are the size of that set over the numbers of distinct words. Which subsequence is traced when several
 * are longest decides about the set: ties go to the shorter answer. */
#include "eval/metrics.h"

#include "base/checked.h"
#include "base/status.h"
#include "eval/segment.h"
#include "eval/words.h"

#include <stdlib.h>
#include <string.h>

#define MAX_CELLS ((size_t)1 << 27)

struct sentences {
  struct qtr_words words;
  size_t *end; /* (n) index of the word after the last one */
  size_t n, capacity;
  int32_t *number; /* (words.n) equal words have equal numbers */
  size_t n_distinct;
};

static void free_sentences(struct sentences *s) {
  qtr_words_free(&s->words);
  free(s->end);
  free(s->number);
}

static enum qtr_status cut(struct qtr_string text, struct sentences *s, struct qtr_error *err) {
  const char *end = text.p + text.n;
  enum qtr_status status = QTR_OK;
  for (const char *p = text.p; p < end && !status;) {
    const char *stop = memchr(p, '.', (size_t)(end - p));
    size_t len = stop ? (size_t)(stop - p) : (size_t)(end - p), before = s->words.n;
    if (len > 0) {
      status = qtr_words_split(&s->words, p, len, err);
      if (!status && s->words.n == before) status = qtr_words_add(&s->words, p, 0, err); /* white space: an empty word */
      if (!status && s->n == s->capacity) {
        s->capacity = s->capacity ? s->capacity * 2 : 16;
        size_t *more = realloc(s->end, s->capacity * sizeof *more);
        if (!more) return qtr_fail_memory(err, "sentences", s->capacity * sizeof *more);
        s->end = more;
      }
      if (!status) s->end[s->n++] = s->words.n;
    }
    p += len + 1;
  }
  return status;
}

static int compare(const void *a, const void *b) { return qtr_word_compare(a, b); }

static size_t distinct(struct qtr_word *sorted, size_t n) {
  size_t kept = 0;
  for (size_t i = 0; i < n; i++) {
    if (kept == 0 || qtr_word_compare(&sorted[i], &sorted[kept - 1]) != 0) sorted[kept++] = sorted[i];
  }
  return kept;
}

/* Gives words of both texts numbers: their places in the sorted list of all. *n_all: how many numbers there are. */
static enum qtr_status number_words(struct sentences *a, struct sentences *b, size_t *n_all, struct qtr_error *err) {
  size_t n = a->words.n + b->words.n;
  struct qtr_word *all = malloc((n + 1) * sizeof *all);
  struct sentences *const both[] = {a, b};
  enum qtr_status status = all ? QTR_OK : qtr_fail_memory(err, "words", n * sizeof *all);
  for (size_t k = 0; k < 2 && !status; k++) { /* how many each has by itself */
    memcpy(all, both[k]->words.word, both[k]->words.n * sizeof *all);
    qsort(all, both[k]->words.n, sizeof *all, compare);
    both[k]->n_distinct = distinct(all, both[k]->words.n);
    both[k]->number = malloc((both[k]->words.n + 1) * sizeof *both[k]->number);
    if (!both[k]->number) status = qtr_fail_memory(err, "words", n * sizeof(int32_t));
  }
  if (!status) {
    memcpy(all, a->words.word, a->words.n * sizeof *all);
    memcpy(all + a->words.n, b->words.word, b->words.n * sizeof *all);
    qsort(all, n, sizeof *all, compare);
    *n_all = distinct(all, n);
    for (size_t k = 0; k < 2; k++) {
      for (size_t i = 0; i < both[k]->words.n; i++) {
        const struct qtr_word *found = bsearch(&both[k]->words.word[i], all, *n_all, sizeof *all, compare);
        both[k]->number[i] = (int32_t)(found - all);
      }
    }
  }
  free(all);
  return status;
}

/* Marks the words on the longest common subsequence of x (n_x), of the reference, and y (n_y), of the answer. */
static enum qtr_status mark_common(const int32_t *x, size_t n_x, const int32_t *y, size_t n_y, bool *marked,
                                   struct qtr_error *err) {
  size_t width = n_y + 1, cells;
  if (qtr_mul_overflow(n_x + 1, width, &cells) || cells > MAX_CELLS) {
    return qtr_fail(err, QTR_ERR_LIMIT, "sentences of %zu and %zu words are too long for ROUGE-L", n_x, n_y);
  }
  int32_t *table = calloc(cells, sizeof *table); /* (n_x + 1, n_y + 1) lengths */
  if (!table) return qtr_fail_memory(err, "a table of ROUGE-L", cells * sizeof *table);
  for (size_t i = 1; i <= n_x; i++) {
    for (size_t j = 1; j <= n_y; j++) {
      int32_t up = table[(i - 1) * width + j], left = table[i * width + j - 1];
      table[i * width + j] = x[i - 1] == y[j - 1] ? table[(i - 1) * width + j - 1] + 1 : QTR_MAX(up, left);
    }
  }
  for (size_t i = n_x, j = n_y; i > 0 && j > 0;) {
    if (x[i - 1] == y[j - 1]) {
      marked[x[i - 1]] = true;
      i--;
      j--;
    } else if (table[(i - 1) * width + j] > table[i * width + j - 1]) {
      i--;
    } else {
      j--;
    }
  }
  free(table);
  return QTR_OK;
}

enum qtr_status qtr_metric_rouge_l(struct qtr_string answer, struct qtr_string gold, double *score, struct qtr_error *err) {
  struct sentences a = {0}, g = {0};
  bool *marked = NULL;
  size_t n_all = 0, common = 0;
  *score = 0;
  enum qtr_status status = cut(answer, &a, err);
  if (!status) status = cut(gold, &g, err);
  if (status || a.n == 0 || g.n == 0) goto done;
  status = number_words(&a, &g, &n_all, err);
  if (status) goto done;
  marked = calloc(n_all, sizeof *marked);
  if (!marked) status = qtr_fail_memory(err, "words", n_all);
  for (size_t i = 0; i < g.n && !status; i++) {
    size_t g_first = i > 0 ? g.end[i - 1] : 0;
    for (size_t k = 0; k < a.n && !status; k++) {
      size_t a_first = k > 0 ? a.end[k - 1] : 0;
      status = mark_common(g.number + g_first, g.end[i] - g_first, a.number + a_first, a.end[k] - a_first, marked, err);
    }
  }
  if (status) goto done;
  for (size_t i = 0; i < n_all; i++) common += marked[i];
  double recall = (double)common / (double)g.n_distinct, precision = (double)common / (double)a.n_distinct;
  *score = 2 * (precision * recall / (precision + recall + 1e-8));
done:
  free(marked);
  free_sentences(&a);
  free_sentences(&g);
  return status;
}

/* Words with single spaces between them. */
static enum qtr_status spread(struct qtr_string text, const struct qtr_segmenter *segmenter, struct qtr_text *out,
                              struct qtr_error *err) {
  struct qtr_words words = {0};
  enum qtr_status status = qtr_segment(segmenter, text.p, text.n, &words, err);
  for (size_t i = 0; i < words.n && !status; i++) {
    if (i > 0) status = qtr_text_append(out, " ", 1, err);
    if (!status) status = qtr_text_append(out, words.word[i].p, words.word[i].n, err);
  }
  qtr_words_free(&words);
  return status;
}

enum qtr_status qtr_metric_rouge_l_zh(struct qtr_string answer, struct qtr_string gold,
                                      const struct qtr_segmenter *segmenter, double *score, struct qtr_error *err) {
  struct qtr_text a = {0}, g = {0};
  enum qtr_status status = spread(answer, segmenter, &a, err);
  if (!status) status = spread(gold, segmenter, &g, err);
  *score = 0;
  if (!status && a.data && g.data) {
    status = qtr_metric_rouge_l((struct qtr_string){a.data, a.len}, (struct qtr_string){g.data, g.len}, score, err);
  }
  qtr_text_free(&a);
  qtr_text_free(&g);
  return status;
}
