/* ruler.c - generates the questions of ruler.h and adds up their scores. Needles are worded as the demo model knows them,
 * which are RULER's words; its other tasks keep their idea, with pseudo-words of our own. A question depends on the seed,
 * its task, length and number only. */
#include "eval/ruler.h"

#include "base/checked.h"
#include "base/random.h"
#include "base/status.h"
#include "eval/niah.h"
#include "eval/words.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define N_KEYS 4
#define N_VARIABLES 5
#define N_COMMON 10
#define N_FREQUENT 3
#define MAX_WORDS ((size_t)1 << 22) /* of a list */

static const struct {
  const char *name;
  int32_t max_tokens;
} tasks[QTR_RULER_N_TASKS] = {{"single", 32},    {"multikey", 32},      {"multivalue", 96},    {"multiquery", 128},
                              {"variables", 64}, {"common-words", 128}, {"frequent-words", 64}};

const char *qtr_ruler_task_name(enum qtr_ruler_task task) { return tasks[task].name; }
int32_t qtr_ruler_max_tokens(enum qtr_ruler_task task) { return tasks[task].max_tokens; }

/* ---- questions ---- */

/* A pseudo-word: the same number gives the same word, other numbers below 10^6 other words. */
static void make_word(uint64_t number, char word[24]) {
  static const char onset[19] = "bcdfghjklmnprstvwz", vowel[6] = "aeiou";
  size_t n = 0;
  for (int i = 0; i < 3; i++, number /= 90) {
    word[n++] = onset[number % 90 / 5]; /* 18 of them */
    word[n++] = vowel[number % 5];
  }
  word[n] = 0;
}

/* The word that stands for `rank` in this question: a seeded walk through all of them. */
static void word_of_rank(uint64_t seed, size_t rank, char word[24]) {
  uint64_t state = qtr_random_state(seed, 'w', 0, 0);
  uint64_t n = 90 * 90 * 90, step = qtr_random_below(&state, n / 7) * 7 + 1; /* 90^3 = 2^3 3^6 5^3 */
  while (step % 2 == 0 || step % 3 == 0 || step % 5 == 0) step++;
  make_word((qtr_random_below(&state, n) + step * rank) % n, word);
}

static void hyphenate(char *key) {
  for (char *space; (space = strchr(key, ' '));) *space = '-';
}

/* Secrets with different keys and numbers. */
static void draw_secrets(uint64_t *state, struct qtr_secret *secret, size_t n) {
  for (size_t i = 0; i < n; i++) {
    bool again = true;
    while (again) {
      qtr_secret_draw(state, &secret[i]);
      hyphenate(secret[i].key);
      again = false;
      for (size_t k = 0; k < i; k++) {
        again = again || strcmp(secret[i].key, secret[k].key) == 0 || strcmp(secret[i].digits, secret[k].digits) == 0;
      }
    }
  }
}

static void hide(struct qtr_ruler_question *q, const char *key, const char *digits) {
  (void)snprintf(q->needle[q->n_needles++], sizeof q->needle[0], "One of the special magic numbers for %.40s is: %.8s.", key,
                 digits);
}

static void expect(struct qtr_ruler_question *q, const char *word) {
  (void)snprintf(q->expected[q->n_expected++], sizeof q->expected[0], "%.23s", word);
}

static void make_needles(struct qtr_ruler_question *q, uint64_t *state) {
  struct qtr_secret secret[N_KEYS];
  draw_secrets(state, secret, N_KEYS);
  size_t n = q->task == QTR_RULER_SINGLE ? 1 : N_KEYS;
  for (size_t i = 0; i < n; i++) hide(q, secret[q->task == QTR_RULER_MULTIVALUE ? 0 : i].key, secret[i].digits);
  size_t asked = q->task == QTR_RULER_MULTIKEY ? (size_t)qtr_random_below(state, n) : 0;
  if (q->task == QTR_RULER_SINGLE || q->task == QTR_RULER_MULTIKEY) {
    (void)snprintf(q->text, sizeof q->text, "What is the special magic number for %s mentioned in the text?",
                   secret[asked].key);
    expect(q, secret[asked].digits);
    return;
  }
  for (size_t i = 0; i < n; i++) expect(q, secret[i].digits);
  if (q->task == QTR_RULER_MULTIVALUE) {
    (void)snprintf(q->text, sizeof q->text, "What are all the special magic numbers for %s mentioned in the text?",
                   secret[0].key);
  } else {
    (void)snprintf(q->text, sizeof q->text,
                   "What are all the special magic numbers for %s, %s, %s and %s mentioned in the text?", secret[0].key,
                   secret[1].key, secret[2].key, secret[3].key);
  }
}

static void make_variables(struct qtr_ruler_question *q, uint64_t *state) {
  char name[N_VARIABLES][8];
  uint64_t first = qtr_random_below(state, 26);
  for (size_t i = 0; i < N_VARIABLES; i++) { /* they begin with different letters */
    for (size_t k = 0; k < 5; k++) name[i][k] = (char)('A' + (k == 0 ? (first + 5 * i) % 26 : qtr_random_below(state, 26)));
    name[i][5] = 0;
  }
  unsigned value = 10000 + (unsigned)qtr_random_below(state, 90000);
  for (size_t i = 0; i < N_VARIABLES; i++) {
    if (i == 0) {
      (void)snprintf(q->needle[0], sizeof q->needle[0], "VAR %s = %u.", name[0], value);
    } else {
      (void)snprintf(q->needle[i], sizeof q->needle[0], "VAR %s = VAR %s.", name[i], name[i - 1]);
    }
    expect(q, name[i]);
  }
  q->n_needles = N_VARIABLES;
  (void)snprintf(q->text, sizeof q->text, "Find all variables that are assigned the value %u in the text above.", value);
}

static int by_value(const void *x, const void *y) {
  const double *a = x, *b = y;
  return (*a > *b) - (*a < *b);
}

void qtr_ruler_make(enum qtr_ruler_task task, uint64_t seed, const struct qtr_haystack *haystack, double tokens_per_word,
                    enum qtr_ask_style style, struct qtr_ruler_question *q) {
  uint64_t state = seed;
  *q = (struct qtr_ruler_question){
      .task = task, .style = style, .seed = seed, .haystack = haystack, .tokens_per_word = tokens_per_word};
  if (task == QTR_RULER_COMMON || task == QTR_RULER_FREQUENT) {
    q->n_expected = task == QTR_RULER_COMMON ? N_COMMON : N_FREQUENT;
    for (size_t i = 0; i < q->n_expected; i++) word_of_rank(seed, i, q->expected[i]);
    (void)snprintf(q->text, sizeof q->text, "%s",
                   task == QTR_RULER_COMMON ? "What are the 10 most common words in the above list?"
                                            : "What are the three most frequent words in the above coded text?");
    return;
  }
  q->first = (size_t)qtr_random_below(&state, haystack->n_sentences);
  if (task == QTR_RULER_VARIABLES) {
    make_variables(q, &state);
  } else {
    make_needles(q, &state);
  }
  for (size_t i = 0; i < q->n_needles; i++) q->depth[i] = 0.02 + 0.96 * (double)(qtr_random_next(&state) >> 11) * 0x1p-53;
  qsort(q->depth, q->n_needles, sizeof *q->depth, by_value); /* a chain of variables is told in its order */
}

/* ---- their texts ---- */

/* How often the word of a rank is in a list of n words: 0 ends the list. */
static size_t times(enum qtr_ruler_task task, size_t rank, size_t n) {
  if (task == QTR_RULER_FREQUENT) { /* Zipf with exponent 2, the first three well apart in any list */
    double share = 6 / (M_PI * M_PI) / ((double)(rank + 1) * (double)(rank + 1));
    size_t times = (size_t)((double)n * share);
    return rank < N_FREQUENT ? QTR_MAX(times, 2 * (N_FREQUENT - rank) + 1) : QTR_MAX(times, 1);
  }
  size_t common = QTR_MIN(QTR_MAX(n / (3 * N_COMMON), (size_t)6), (size_t)30);
  return rank < N_COMMON ? common : common >= 9 ? 3 : 1;
}

static enum qtr_status append_list(const struct qtr_ruler_question *q, size_t room, struct qtr_text *out,
                                   struct qtr_error *err) {
  size_t n = QTR_MIN((size_t)((double)room / q->tokens_per_word), MAX_WORDS), n_words = 0;
  uint32_t *rank = malloc((n + 64 * N_COMMON) * sizeof *rank); /* (n_words) */
  if (!rank) return qtr_fail_memory(err, "a list of words", n * sizeof *rank);
  for (size_t r = 0; n_words < n || r < q->n_expected; r++) {
    size_t k = times(q->task, r, n);
    if (r >= q->n_expected) k = QTR_MIN(k, n - n_words);
    for (; k > 0; k--) rank[n_words++] = (uint32_t)r;
  }
  uint64_t state = qtr_random_state(q->seed, 's', n, 0);
  for (size_t i = n_words; i > 1; i--) {
    size_t k = (size_t)qtr_random_below(&state, i);
    uint32_t swap = rank[i - 1];
    rank[i - 1] = rank[k];
    rank[k] = swap;
  }
  enum qtr_status status = QTR_OK;
  for (size_t i = 0; i < n_words && !status; i++) {
    char word[24], entry[64];
    word_of_rank(q->seed, rank[i], word);
    int len = q->task == QTR_RULER_COMMON ? snprintf(entry, sizeof entry, "%zu. %s ", i + 1, word)
                                          : snprintf(entry, sizeof entry, "%s ", word);
    status = qtr_text_append(out, entry, (size_t)len, err);
  }
  free(rank);
  return status;
}

enum qtr_status qtr_ruler_text(void *user, size_t room, struct qtr_text *out, struct qtr_error *err) {
  const struct qtr_ruler_question *q = user;
  struct qtr_insertion needle[8];
  enum qtr_status status;
  if (q->n_needles == 0) {
    status = append_list(q, room, out, err);
  } else {
    for (size_t i = 0; i < q->n_needles; i++) needle[i] = (struct qtr_insertion){q->depth[i], q->needle[i]};
    status = qtr_haystack_cut(q->haystack, q->first, room, needle, q->n_needles, out, err);
  }
  while (out->len > 0 && (out->data[out->len - 1] == ' ' || out->data[out->len - 1] == '\n')) out->len--;
  if (!status) status = qtr_text_append(out, "\n\n", 2, err);
  if (!status) status = qtr_text_append(out, q->text, strlen(q->text), err);
  if (!status && q->style == QTR_ASK_PLAIN) status = qtr_text_append(out, "\nAnswer:", 8, err);
  return status;
}

/* ---- answers ---- */

static char lower(char c) { return c >= 'A' && c <= 'Z' ? (char)(c - 'A' + 'a') : c; }

static bool is_word_byte(char c) {
  c = lower(c);
  return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9');
}

static bool stands_in(const char *word, const char *answer, size_t len) {
  size_t n = strlen(word);
  for (size_t i = 0; i + n <= len; i++) {
    size_t k = 0;
    while (k < n && lower(answer[i + k]) == lower(word[k])) k++;
    if (k < n || (i > 0 && is_word_byte(answer[i - 1])) || (i + n < len && is_word_byte(answer[i + n]))) continue;
    return true;
  }
  return false;
}

size_t qtr_ruler_count(const struct qtr_ruler_question *q, const char *answer, size_t len) {
  size_t n = 0;
  for (size_t i = 0; i < q->n_expected; i++) n += stands_in(q->expected[i], answer, len);
  return n;
}

/* ---- the run ---- */

struct run {
  struct qtr_engine *engine;
  const struct qtr_haystack *haystack;
  const struct qtr_ruler_options *options;
  enum qtr_ask_style style;
  struct qtr_ruler_result *result;
  double tokens_per_word[QTR_RULER_N_TASKS];
};

/* Question i: by task, length, number. */
static void question_of(const struct run *run, size_t i, struct qtr_ruler_question *q, size_t *cell, size_t *number) {
  const struct qtr_ruler_options *o = run->options;
  *number = i % o->n_samples;
  *cell = i / o->n_samples;
  enum qtr_ruler_task task = o->task[*cell / o->n_lengths];
  uint64_t seed = qtr_random_state(o->seed, (uint64_t)task, o->length[*cell % o->n_lengths], *number);
  qtr_ruler_make(task, seed, run->haystack, run->tokens_per_word[task], run->style, q);
}

static enum qtr_status make(void *user, size_t i, struct qtr_ask_prompt *prompt, int32_t *max_tokens,
                            struct qtr_error *err) {
  struct run *run = user;
  struct qtr_ruler_question q;
  size_t cell, number;
  question_of(run, i, &q, &cell, &number);
  *max_tokens = qtr_ruler_max_tokens(q.task);
  const struct qtr_ask_text text = {.make = qtr_ruler_text, .user = &q};
  return qtr_ask_fit(run->engine, run->style, run->options->length[cell % run->options->n_lengths], &text, prompt, err);
}

static enum qtr_status take(void *user, size_t i, const struct qtr_ask_answer *answer, struct qtr_error *err) {
  (void)err;
  struct run *run = user;
  const struct qtr_ruler_options *o = run->options;
  struct qtr_ruler_question q;
  size_t cell, number;
  question_of(run, i, &q, &cell, &number);
  size_t found = qtr_ruler_count(&q, answer->text, answer->len);
  double score = (double)found / (double)q.n_expected;
  run->result[cell].n++;
  run->result[cell].n_whole += found == q.n_expected;
  run->result[cell].score += score;
  if (o->answered) o->answered(o->user, &q, o->length[cell % o->n_lengths], number, answer, score);
  return QTR_OK;
}

/* Tokens of an entry of a list, on the average of a few. */
static enum qtr_status measure_words(struct run *run, enum qtr_ruler_task task, struct qtr_error *err) {
  struct qtr_ruler_question q;
  struct qtr_text text = {0};
  int32_t *token = NULL;
  size_t n_tokens = 0;
  qtr_ruler_make(task, 1, run->haystack, 1, run->style, &q);
  enum qtr_status status = append_list(&q, 256, &text, err);
  if (!status) status = qtr_engine_tokenize(run->engine, text.data, text.len, false, false, &token, &n_tokens, err);
  run->tokens_per_word[task] = QTR_MAX((double)n_tokens / 256, 0.25);
  free(token);
  qtr_text_free(&text);
  return status;
}

enum qtr_status qtr_ruler_run(struct qtr_engine *engine, const struct qtr_haystack *haystack,
                              const struct qtr_ruler_options *options, struct qtr_ruler_result *result,
                              struct qtr_error *err) {
  struct run run = {.engine = engine,
                    .haystack = haystack,
                    .options = options,
                    .style = qtr_ask_style_of(engine, options->style),
                    .result = result};
  size_t n_cells = options->n_tasks * options->n_lengths;
  enum qtr_status status = measure_words(&run, QTR_RULER_COMMON, err);
  if (!status) status = measure_words(&run, QTR_RULER_FREQUENT, err);
  for (size_t i = 0; i < n_cells && !status; i++) {
    result[i] = (struct qtr_ruler_result){0};
    status = qtr_ask_check_length(engine, options->length[i % options->n_lengths],
                                  qtr_ruler_max_tokens(options->task[i / options->n_lengths]), err);
  }
  if (status) return status;
  const struct qtr_ask ask = {.n = n_cells * options->n_samples,
                              .make = make,
                              .take = take,
                              .user = &run,
                              .label = "synthetic tasks",
                              .quiet = options->quiet};
  status = qtr_ask_run(engine, &ask, err);
  for (size_t i = 0; i < n_cells && !status; i++) result[i].score /= (double)result[i].n;
  return status;
}
