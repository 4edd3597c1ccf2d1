/* code_ratio.c - how alike two lines of code are (metrics.h): fuzzywuzzy's ratio, which is that of Python's difflib
 * (Ratcliff and Obershelp): twice the characters in matching blocks over all characters. The blocks: the longest common run,
 * and so on to its left and right. As there, characters that make up more than a hundredth of a line of 200 or more begin no
 * run. */
#include "eval/metrics.h"

#include "base/checked.h"
#include "base/status.h"
#include "eval/words.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct line {
  int32_t *c; /* (n) code points */
  size_t n;
};

static enum qtr_status decode(struct qtr_string text, struct line *line, struct qtr_error *err) {
  line->c = malloc((text.n + 1) * sizeof *line->c);
  if (!line->c) return qtr_fail_memory(err, "a line", text.n * sizeof *line->c);
  size_t n;
  for (const char *p = text.p, *end = text.p + text.n; p < end; p += n) line->c[line->n++] = qtr_words_char(p, end, &n);
  return QTR_OK;
}

static int by_value(const void *x, const void *y) {
  const int32_t *a = x, *b = y;
  return (*a > *b) - (*a < *b);
}

/* popular: (b.n) places of characters that are too frequent to begin a run. */
static enum qtr_status find_popular(const struct line *b, bool *popular, struct qtr_error *err) {
  memset(popular, 0, b->n * sizeof *popular);
  if (b->n < 200) return QTR_OK;
  int32_t *sorted = malloc(b->n * sizeof *sorted);
  if (!sorted) return qtr_fail_memory(err, "a line", b->n * sizeof *sorted);
  memcpy(sorted, b->c, b->n * sizeof *sorted);
  qsort(sorted, b->n, sizeof *sorted, by_value);
  for (size_t i = 0; i < b->n; i++) {
    const int32_t *found = bsearch(&b->c[i], sorted, b->n, sizeof *sorted, by_value), *first = found, *last = found;
    while (first > sorted && first[-1] == *found) first--;
    while (last < sorted + b->n && *last == *found) last++;
    popular[i] = (size_t)(last - first) > b->n / 100 + 1;
  }
  free(sorted);
  return QTR_OK;
}

struct span {
  size_t a, a_end, b, b_end;
};

struct matcher {
  const struct line *a, *b;
  const bool *popular;
  size_t *run, *next_run; /* (b.n + 1) length of the run that ends before j, in this and the next row */
};

/* The longest block of the span, the first one of equals; its length, 0 when there is none. */
static size_t longest(const struct matcher *m, const struct span *s, size_t *best_a, size_t *best_b) {
  size_t *run = m->run, *next = m->next_run, best = 0, at_a = s->a, at_b = s->b;
  memset(run + s->b, 0, (s->b_end - s->b + 1) * sizeof *run);
  for (size_t i = s->a; i < s->a_end; i++) {
    next[s->b] = 0;
    for (size_t j = s->b; j < s->b_end; j++) {
      next[j + 1] = m->b->c[j] == m->a->c[i] && !m->popular[j] ? run[j] + 1 : 0;
      if (next[j + 1] > best) {
        best = next[j + 1];
        at_a = i + 1 - best;
        at_b = j + 1 - best;
      }
    }
    size_t *swap = run;
    run = next;
    next = swap;
  }
  while (at_a > s->a && at_b > s->b && m->a->c[at_a - 1] == m->b->c[at_b - 1]) at_a--, at_b--, best++;
  while (at_a + best < s->a_end && at_b + best < s->b_end && m->a->c[at_a + best] == m->b->c[at_b + best]) best++;
  *best_a = at_a;
  *best_b = at_b;
  return best;
}

/* Characters in matching blocks. Spans wait on a stack: each splits into two smaller ones, so min(a.n, b.n) + 1 places do.
 */
static enum qtr_status count_matches(const struct line *a, const struct line *b, size_t *n_matches, struct qtr_error *err) {
  size_t places = QTR_MIN(a->n, b->n) + 2, n = 0;
  bool *popular = malloc((b->n + 1) * sizeof *popular);
  size_t *run = malloc(2 * (b->n + 1) * sizeof *run);
  struct span *stack = malloc(places * sizeof *stack);
  enum qtr_status status = popular && run && stack ? QTR_OK : qtr_fail_memory(err, "a line", places * sizeof *stack);
  if (!status) status = find_popular(b, popular, err);
  *n_matches = 0;
  if (!status) stack[n++] = (struct span){0, a->n, 0, b->n};
  const struct matcher m = {.a = a, .b = b, .popular = popular, .run = run, .next_run = run ? run + b->n + 1 : NULL};
  while (!status && n > 0) {
    const struct span s = stack[--n];
    size_t at_a, at_b, k = longest(&m, &s, &at_a, &at_b);
    if (k == 0) continue;
    *n_matches += k;
    if (s.a < at_a && s.b < at_b) stack[n++] = (struct span){s.a, at_a, s.b, at_b};
    if (at_a + k < s.a_end && at_b + k < s.b_end) stack[n++] = (struct span){at_a + k, s.a_end, at_b + k, s.b_end};
  }
  free(popular);
  free(run);
  free(stack);
  return status;
}

/* The first line without comment marks, after leading empty lines; "" when there is none. */
static struct qtr_string code_line(struct qtr_string text) {
  const char *p = text.p, *end = text.p + text.n;
  while (p < end && *p == '\n') p++;
  while (p < end) {
    const char *newline = memchr(p, '\n', (size_t)(end - p));
    size_t n = newline ? (size_t)(newline - p) : (size_t)(end - p);
    if (!memchr(p, '`', n) && !memchr(p, '#', n) && !memmem(p, n, "//", 2)) return (struct qtr_string){p, n};
    p += n + 1;
  }
  return (struct qtr_string){end, 0};
}

enum qtr_status qtr_metric_code(struct qtr_string answer, struct qtr_string gold, double *score, struct qtr_error *err) {
  struct qtr_string said = code_line(answer);
  struct line a = {0}, b = {0};
  size_t matches = 0;
  *score = 0;
  if (said.n == gold.n && (said.n == 0 || memcmp(said.p, gold.p, said.n) == 0)) {
    *score = 1;
    return QTR_OK;
  }
  if (said.n == 0 || gold.n == 0) return QTR_OK;
  enum qtr_status status = decode(said, &a, err);
  if (!status) status = decode(gold, &b, err);
  if (!status) status = count_matches(&a, &b, &matches, err);
  if (!status) *score = rint(100 * (2.0 * (double)matches / (double)(a.n + b.n))) / 100;
  free(a.c);
  free(b.c);
  return status;
}
