/* niah.c - makes the questions, has them answered, adds up the scores (niah.h). A trial depends on the seed, its length,
 * depth and number only, so that it is the same in whatever company it runs. */
#include "eval/niah.h"

#include "base/clock.h"
#include "base/random.h"
#include "base/status.h"
#include "eval/metrics.h"
#include "eval/words.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_TRIALS ((size_t)1 << 20)

static const char *const adjectives[] = {"golden", "quiet",  "silver", "hidden", "ancient", "bright", "crimson", "distant",
                                         "gentle", "hollow", "iron",   "lonely", "misty",   "narrow", "patient", "purple",
                                         "rapid",  "rusty",  "silent", "snowy",  "stormy",  "sunny",  "velvet",  "wild",
                                         "amber",  "broken", "clever", "frozen", "green",   "proud",  "simple",  "wooden"};
static const char *const nouns[] = {"fox",    "harbor", "river",  "castle", "garden",  "mountain", "lantern", "bridge",
                                    "forest", "island", "meadow", "mirror", "orchard", "palace",   "raven",   "shadow",
                                    "ship",   "stone",  "tower",  "valley", "village", "window",   "wolf",    "anchor",
                                    "basket", "candle", "desert", "eagle",  "feather", "hammer",   "kettle",  "ladder"};
#define PICK(list) list[qtr_random_below(state, sizeof list / sizeof list[0])]

void qtr_secret_draw(uint64_t *state, struct qtr_secret *secret) {
  const char *adjective = PICK(adjectives), *noun = PICK(nouns);
  (void)snprintf(secret->key, sizeof secret->key, "%s %s", adjective, noun);
  size_t n = 3 + (size_t)qtr_random_below(state, 5);
  for (size_t i = 0; i < n; i++)
    secret->digits[i] = (char)(i == 0 ? '1' + qtr_random_below(state, 9) : '0' + qtr_random_below(state, 10));
  secret->digits[n] = 0;
}

/* ---- one trial ---- */

/* What the trial hides and asks. */
struct question {
  char needle[160], text[160]; /* text: the question */
  char digits[8];              /* "" for San Francisco */
  size_t first;                /* sentence of the haystack */
  const struct qtr_haystack *haystack;
  double depth;
  enum qtr_ask_style style;
  enum qtr_needle form;
};

static const char san_francisco[] =
    "\n\nRemember, the best two things to do in San Francisco are eating a sandwich and sitting in Dolores Park on a sunny "
    "day.\n\n";
static const char san_francisco_phrase[] = "eating a sandwich and sitting in Dolores Park on a sunny day.";

static void make_question(const struct qtr_niah_options *o, const struct qtr_haystack *haystack,
                          const struct qtr_niah_trial *t, struct question *q) {
  double depth = o->depth[t->depth];
  uint64_t state = qtr_random_state(o->seed, o->length[t->length], (uint64_t)llround(depth * 1e6), t->number);
  *q = (struct question){.haystack = haystack, .depth = depth, .style = o->style, .form = o->needle};
  struct qtr_secret secret;
  qtr_secret_draw(&state, &secret);
  q->first = (size_t)qtr_random_below(&state, haystack->n_sentences);
  if (q->form == QTR_NEEDLE_MIXED) q->form = t->number % 2 ? QTR_NEEDLE_SPECIAL : QTR_NEEDLE_MAGIC;
  char hyphened[sizeof secret.key];
  memcpy(hyphened, secret.key, sizeof hyphened);
  char *space = strchr(hyphened, ' ');
  if (space) *space = '-';
  switch (q->form) {
    case QTR_NEEDLE_SPECIAL:
      (void)snprintf(q->needle, sizeof q->needle, "One of the special magic numbers for %s is: %s.", hyphened,
                     secret.digits);
      (void)snprintf(q->text, sizeof q->text, "What is the special magic number for %s mentioned in the text?", hyphened);
      break;
    case QTR_NEEDLE_SAN_FRANCISCO:
      (void)snprintf(q->needle, sizeof q->needle, "%s", san_francisco);
      (void)snprintf(q->text, sizeof q->text, "what are the best two things to do in San Francisco?");
      return;
    case QTR_NEEDLE_MIXED:
    case QTR_NEEDLE_MAGIC:
      (void)snprintf(q->needle, sizeof q->needle, "The magic number for the %s is %s.", secret.key, secret.digits);
      (void)snprintf(q->text, sizeof q->text, "What is the magic number for the %s?", secret.key);
      break;
  }
  memcpy(q->digits, secret.digits, sizeof q->digits);
}

static enum qtr_status append(struct qtr_text *out, const char *text, struct qtr_error *err) {
  return qtr_text_append(out, text, strlen(text), err);
}

/* The text of the prompt with `room` tokens of haystack. */
static enum qtr_status make_text(void *user, size_t room, struct qtr_text *out, struct qtr_error *err) {
  const struct question *q = user;
  const struct qtr_insertion needle = {.depth = q->depth, .text = q->needle};
  bool reference = q->form == QTR_NEEDLE_SAN_FRANCISCO && q->style == QTR_ASK_PLAIN;
  enum qtr_status status = QTR_OK;
  if (reference) status = append(out, "<|im_start|> This is a very long story book: <book> ", err);
  if (!status) status = qtr_haystack_cut(q->haystack, q->first, room, &needle, 1, out, err);
  while (out->len > 0 && (out->data[out->len - 1] == ' ' || out->data[out->len - 1] == '\n')) out->len--;
  if (!status) status = append(out, reference ? " </book>.\n\nQuestion: Based on the content of the book, " : "\n\n", err);
  if (!status) status = append(out, q->text, err);
  if (!status && reference) status = append(out, "\n\nAnswer: The best two things to do in San Francisco are", err);
  if (!status && !reference && q->style == QTR_ASK_PLAIN) status = append(out, "\nAnswer:", err);
  return status;
}

enum qtr_status qtr_niah_prompt(struct qtr_engine *engine, const struct qtr_haystack *haystack,
                                const struct qtr_niah_options *o, const struct qtr_niah_trial *trial,
                                struct qtr_ask_prompt *prompt, char *digits, struct qtr_error *err) {
  struct question question;
  make_question(o, haystack, trial, &question);
  memcpy(digits, question.digits, sizeof question.digits);
  const struct qtr_ask_text text = {.make = make_text, .user = &question};
  return qtr_ask_fit(engine, o->style, o->length[trial->length], &text, prompt, err);
}

/* ---- the run ---- */

struct run {
  struct qtr_engine *engine;
  const struct qtr_haystack *haystack;
  const struct qtr_niah_options *options;
  struct qtr_niah_result *result;
};

static enum qtr_status make(void *user, size_t i, struct qtr_ask_prompt *prompt, int32_t *max_tokens,
                            struct qtr_error *err) {
  struct run *run = user;
  struct qtr_niah_trial *trial = &run->result->trial[i];
  struct question question;
  make_question(run->options, run->haystack, trial, &question);
  trial->needle = strdup(question.needle);
  if (!trial->needle) return qtr_fail_memory(err, "a needle", sizeof question.needle);
  *max_tokens = run->options->max_tokens;
  const struct qtr_ask_text text = {.make = make_text, .user = &question};
  return qtr_ask_fit(run->engine, run->options->style, run->options->length[trial->length], &text, prompt, err);
}

/* The whole phrase, as it stands or with its verbs as a model would put them; letters and white space count alike. */
static enum qtr_status has_phrase(struct qtr_string answer, bool *found, struct qtr_error *err) {
  struct qtr_text lower = {0}, joined = {0};
  struct qtr_words words = {0};
  enum qtr_status status = qtr_words_lower(answer.p, answer.n, &lower, err);
  if (!status) status = qtr_words_split(&words, lower.data ? lower.data : "", lower.len, err);
  for (size_t i = 0; i < words.n && !status; i++) {
    status = qtr_text_append(&joined, words.word[i].p, words.word[i].n, err);
    if (!status) status = qtr_text_append(&joined, " ", 1, err);
  }
  *found = !status && joined.data &&
           (strstr(joined.data, "eating a sandwich and sitting in dolores park on a sunny day") ||
            strstr(joined.data, "eat a sandwich and sit in dolores park on a sunny day"));
  qtr_words_free(&words);
  qtr_text_free(&lower);
  qtr_text_free(&joined);
  return status;
}

static enum qtr_status take(void *user, size_t i, const struct qtr_ask_answer *answer, struct qtr_error *err) {
  struct run *run = user;
  struct qtr_niah_trial *trial = &run->result->trial[i];
  struct question question;
  make_question(run->options, run->haystack, trial, &question);
  const struct qtr_string said = {answer->text, answer->len}, needle = {question.needle, strlen(question.needle)};
  const struct qtr_string digits = {question.digits, strlen(question.digits)};
  bool phrase = digits.n == 0;
  trial->n_prompt_tokens = answer->n_prompt_tokens;
  trial->answer = strdup(answer->text);
  if (!trial->answer) return qtr_fail_memory(err, "an answer", answer->len);
  trial->exact = !phrase && qtr_metric_has_number(said, digits);
  enum qtr_status status = phrase ? has_phrase(said, &trial->exact, err) : QTR_OK;
  trial->contained = phrase ? trial->exact : strstr(answer->text, question.digits) != NULL;
  const struct qtr_string expected =
      phrase ? (struct qtr_string){san_francisco_phrase, sizeof san_francisco_phrase - 1} : needle;
  if (!status) status = qtr_metric_rouge1(said, needle, &trial->rouge1, err);
  if (!status) status = qtr_metric_overlap(said, expected, &trial->overlap, err);
  return status;
}

static void add(struct qtr_niah_score *score, const struct qtr_niah_trial *trial) {
  score->n++;
  score->n_exact += trial->exact;
  score->contained += trial->contained;
  score->rouge1 += trial->rouge1;
  score->overlap += trial->overlap;
}

static void finish(struct qtr_niah_score *score) {
  if (score->n == 0) return;
  score->accuracy = (double)score->n_exact / (double)score->n;
  score->contained /= (double)score->n;
  score->rouge1 /= (double)score->n;
  score->overlap /= (double)score->n;
}

static enum qtr_status check(struct qtr_engine *engine, const struct qtr_niah_options *o, struct qtr_error *err) {
  for (size_t i = 0; i < o->n_lengths; i++) {
    enum qtr_status status = qtr_ask_check_length(engine, o->length[i], o->max_tokens, err);
    if (status) return status;
  }
  if (o->n_lengths > MAX_TRIALS || o->n_depths > MAX_TRIALS || o->n_needles > MAX_TRIALS ||
      o->n_lengths * o->n_depths > MAX_TRIALS || o->n_lengths * o->n_depths * o->n_needles > MAX_TRIALS) {
    return qtr_fail(err, QTR_ERR_LIMIT, "%zu lengths x %zu depths x %zu needles are too many questions", o->n_lengths,
                    o->n_depths, o->n_needles);
  }
  return QTR_OK;
}

enum qtr_status qtr_niah_run(struct qtr_engine *engine, const struct qtr_haystack *haystack,
                             const struct qtr_niah_options *options, struct qtr_niah_result *result, struct qtr_error *err) {
  struct qtr_niah_options o = *options;
  o.style = qtr_ask_style_of(engine, o.style);
  double t_start = qtr_now();
  *result = (struct qtr_niah_result){0};
  enum qtr_status status = check(engine, &o, err);
  if (status) return status;
  size_t n_cells = o.n_lengths * o.n_depths;
  result->n_trials = n_cells * o.n_needles;
  result->trial = calloc(result->n_trials, sizeof *result->trial);
  result->by_length = calloc(o.n_lengths, sizeof *result->by_length);
  result->cell = calloc(n_cells, sizeof *result->cell);
  if (!result->trial || !result->by_length || !result->cell) {
    qtr_niah_free(result);
    return qtr_fail_memory(err, "trials", result->n_trials * sizeof *result->trial);
  }
  for (size_t i = 0; i < result->n_trials; i++) {
    struct qtr_niah_trial *t = &result->trial[i];
    t->number = i % o.n_needles;
    t->depth = i / o.n_needles % o.n_depths;
    t->length = i / o.n_needles / o.n_depths;
  }
  struct run run = {.engine = engine, .haystack = haystack, .options = &o, .result = result};
  const struct qtr_ask ask = {
      .n = result->n_trials, .make = make, .take = take, .user = &run, .label = "needles", .quiet = o.quiet};
  status = qtr_ask_run(engine, &ask, err);
  if (status) {
    qtr_niah_free(result);
    return status;
  }
  for (size_t i = 0; i < result->n_trials; i++) {
    const struct qtr_niah_trial *t = &result->trial[i];
    add(&result->total, t);
    add(&result->by_length[t->length], t);
    add(&result->cell[t->length * o.n_depths + t->depth], t);
  }
  finish(&result->total);
  for (size_t i = 0; i < o.n_lengths; i++) finish(&result->by_length[i]);
  for (size_t i = 0; i < n_cells; i++) finish(&result->cell[i]);
  result->seconds = qtr_now() - t_start;
  return QTR_OK;
}

void qtr_niah_free(struct qtr_niah_result *result) {
  for (size_t i = 0; result->trial && i < result->n_trials; i++) {
    free(result->trial[i].needle);
    free(result->trial[i].answer);
  }
  free(result->trial);
  free(result->by_length);
  free(result->cell);
  *result = (struct qtr_niah_result){0};
}
