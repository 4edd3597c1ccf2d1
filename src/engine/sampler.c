/* sampler.c - one row of logits to one token (sampler.h; the order of filters is that of struct qtr_sampling, spec E.4).
 *
 * A row is long and most of its tokens never matter, so the loops over it are ones the compiler vectorises, and only what
 * top-k and top-p keep is sorted. Weights are floats, their sums double, in an order that depends on nothing but the row.
 * The exponential is our own polynomial: libm's differs in the last bit between machines (FMA or not), and a seed shall give
 * the same token on all of them. The random stream is Philox4x32-10 with the seed as its key and the draw's number as its
 * counter (Salmon et al., SC'11), so draws depend on nothing but their place. NaN logits count as -inf; of equal logits the
 * lowest id wins everywhere. */
#include "engine/sampler.h"
#include "backend/backend.h"
#include "base/checked.h"
#include "base/half.h"
#include "base/philox.h"
#include "base/status.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define GREEDY_TEMPERATURE 1e-5f /* spec E.4 */
#define FIRST_SORT 64            /* candidates that top-p sorts first; eight times as many whenever they do not suffice */
#define HEAP_MOST 512            /* up to here a heap beside the scan beats selecting from all */
#define BLOCK 512                /* tokens whose weights are summed at a time */

struct candidate {
  float logit;
  int32_t token;
};

struct qtr_sampler {
  int32_t vocab_size;
  float *logit;                /* (vocab_size) after bias and penalties; -inf = excluded */
  float *weight;               /* (vocab_size) unnormalised probabilities */
  double *block_sum;           /* (vocab_size / BLOCK, rounded up) their sums */
  struct candidate *candidate; /* (vocab_size) */
  int32_t *n_output;           /* (vocab_size) occurrences in the output; -1 = in the prompt only; all zero between calls */
};

enum qtr_status qtr_sampling_check(const struct qtr_sampling *s, struct qtr_error *err) {
  /* written so that a NaN fails */
  if (!(s->temperature >= 0 && s->temperature <= FLT_MAX)) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "temperature is %g; it must be finite and at least 0", (double)s->temperature);
  }
  if (s->top_k != -1 && s->top_k < 1) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "top_k is %d; it must be -1 (off) or at least 1", s->top_k);
  }
  const struct {
    const char *name, *range;
    float value;
    bool ok;
  } field[] = {
      {"top_p", "above 0 and at most 1", s->top_p, s->top_p > 0 && s->top_p <= 1},
      {"min_p", "in 0 … 1", s->min_p, s->min_p >= 0 && s->min_p <= 1},
      {"repetition_penalty", "above 0 and at most 2", s->repetition_penalty,
       s->repetition_penalty > 0 && s->repetition_penalty <= 2},
      {"presence_penalty", "in -2 … 2", s->presence_penalty, s->presence_penalty >= -2 && s->presence_penalty <= 2},
      {"frequency_penalty", "in -2 … 2", s->frequency_penalty, s->frequency_penalty >= -2 && s->frequency_penalty <= 2},
  };
  for (size_t i = 0; i < sizeof field / sizeof field[0]; i++) {
    if (!field[i].ok) {
      return qtr_fail(err, QTR_ERR_ARGUMENT, "%s is %g; it must be %s", field[i].name, (double)field[i].value,
                      field[i].range);
    }
  }
  return QTR_OK;
}

enum qtr_status qtr_sampler_create(int32_t vocab_size, struct qtr_sampler **out, struct qtr_error *err) {
  if (vocab_size < 1)
    return qtr_fail(err, QTR_ERR_ARGUMENT, "the vocabulary has %d tokens; it needs at least one", vocab_size);
  size_t n = (size_t)vocab_size;
  struct qtr_sampler *s = calloc(1, sizeof *s);
  if (s) {
    s->vocab_size = vocab_size;
    s->logit = malloc(n * sizeof *s->logit);
    s->weight = malloc(n * sizeof *s->weight);
    s->block_sum = malloc(qtr_ceil_div(n, BLOCK) * sizeof *s->block_sum);
    s->candidate = malloc(n * sizeof *s->candidate);
    s->n_output = calloc(n, sizeof *s->n_output);
  }
  if (!s || !s->logit || !s->weight || !s->block_sum || !s->candidate || !s->n_output) {
    qtr_sampler_free(s);
    return qtr_fail_memory(err, "the sampler", n * (sizeof *s->logit + sizeof *s->weight + sizeof *s->candidate + 4));
  }
  *out = s;
  return QTR_OK;
}

void qtr_sampler_free(struct qtr_sampler *s) {
  if (!s) return;
  free(s->logit);
  free(s->weight);
  free(s->block_sum);
  free(s->candidate);
  free(s->n_output);
  free(s);
}

/* ---- arithmetic ---------------------------------------------------------------------------------- */

/* x or 0, without a branch: a loop with one does not vectorise, for floating point may trap. */
static inline float keep_if(bool keep, float x) { return qtr_f32_from_bits(qtr_f32_bits(x) & (0u - (uint32_t)keep)); }

/* exp(x) for x <= 0 within 2 ulp, 0 for NaN and below -87. Only additions, multiplications and bit patterns: the same bits
 * on every machine (the build forbids contraction), and a loop over it vectorises. */
static inline float exp_negative(float x) {
  const float log2e = 0x1.715476p+0f, ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  const float shift = 0x1.8p23f; /* adding it rounds to an integer, which then stands in the low mantissa bits */
  const bool some = x > -87.0f;
  x = keep_if(some, x);
  float k = x * log2e + shift;
  uint32_t n = qtr_f32_bits(k);
  k -= shift;
  float r = (x - k * ln2_high) - k * ln2_low; /* |r| <= ln2/2 */
  float p = 1.0f / 5040.0f;                   /* Taylor to r^7: the rest is below 2^-27 */
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  p *= qtr_f32_from_bits((n + 127u) << 23); /* 2^n; the shift's own bits fall out at the top */
  return keep_if(some, p);
}

/* Comparable value of a logit: NaN is the lowest, +inf the largest finite number, so that differences stay defined. */
static inline float clean(float x) { return x > -INFINITY ? (x < FLT_MAX ? x : FLT_MAX) : -INFINITY; }

/* Lowest index of the largest value, -1 when nothing is above -inf. Lanes keep the maximum of a block, so that it
 * vectorises; only a block that beats all before it is looked through. NaN never compares greater. */
static int32_t argmax(const float *x, int32_t n) {
  enum { LANES = 16 };
  float best = -INFINITY;
  int32_t best_block = -1;
  for (int32_t at = 0; at < n; at += BLOCK) {
    int32_t end = QTR_MIN(at + BLOCK, n), i = at;
    float lane[LANES];
    for (int j = 0; j < LANES; j++) lane[j] = -INFINITY;
    for (; i + LANES <= end; i += LANES) {
      for (int j = 0; j < LANES; j++) lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
    }
    for (; i < end; i++) lane[0] = x[i] > lane[0] ? x[i] : lane[0];
    for (int j = 1; j < LANES; j++) lane[0] = lane[j] > lane[0] ? lane[j] : lane[0];
    if (lane[0] > best) best = lane[0], best_block = at;
  }
  if (best_block < 0) return -1;
  int32_t i = best_block;
  while (!(x[i] == best)) i++;
  return i;
}

/* weight[i] := exp((x[i] - top) * inverse), or 0 when that is below least; sums per block, and the total. */
static double weigh(struct qtr_sampler *s, const float *x, int32_t n, float top, float inverse, float least) {
  enum { LANES = 8 };
  double total = 0;
  for (int32_t at = 0; at < n; at += BLOCK) {
    int32_t count = QTR_MIN(BLOCK, n - at), i = 0;
    const float *from = x + at;
    float *to = s->weight + at;
    for (int32_t k = 0; k < count; k++) {
      float w = exp_negative((from[k] - top) * inverse);
      to[k] = keep_if(w >= least, w);
    }
    double lane[LANES] = {0};
    for (; i + LANES <= count; i += LANES) {
      for (int j = 0; j < LANES; j++) lane[j] += (double)to[i + j];
    }
    for (; i < count; i++) lane[0] += (double)to[i];
    for (int j = 1; j < LANES; j++) lane[0] += lane[j];
    s->block_sum[at / BLOCK] = lane[0];
    total += lane[0];
  }
  return total;
}

/* a comes before b: larger logit, then lower id. */
static inline bool before(const struct candidate *a, const struct candidate *b) {
  return a->logit > b->logit || (!(a->logit < b->logit) && a->token < b->token);
}

static int compare(const void *a, const void *b) { return before(a, b) ? -1 : 1; }

/* Moves the k first of c[0 … n) in the order of before() to the front, in no order (Hoare's selection, median of three: the
 * keys are distinct by their ids, so it ends). */
static void select_first(struct candidate *c, int32_t n, int32_t k) {
  int32_t low = 0, high = n - 1;
  while (low < high) {
    int32_t mid = low + (high - low) / 2;
    struct candidate a = c[low], b = c[mid], d = c[high];
    struct candidate pivot = before(&a, &b) ? (before(&b, &d)   ? b
                                               : before(&a, &d) ? d
                                                                : a)
                                            : (before(&a, &d)   ? a
                                               : before(&b, &d) ? d
                                                                : b);
    int32_t i = low, j = high;
    while (i <= j) {
      while (before(&c[i], &pivot)) i++;
      while (before(&pivot, &c[j])) j--;
      if (i <= j) {
        struct candidate t = c[i];
        c[i++] = c[j];
        c[j--] = t;
      }
    }
    if (k - 1 <= j)
      high = j;
    else if (k - 1 >= i)
      low = i;
    else
      return;
  }
}

/* c[0 … n) is a heap with its last element in the order of before() at the root: moves c[at] down to its place. */
static void sift_down(struct candidate *c, int32_t n, int32_t at) {
  for (int32_t child; (child = 2 * at + 1) < n; at = child) {
    if (child + 1 < n && before(&c[child], &c[child + 1])) child++;
    if (!before(&c[at], &c[child])) return;
    struct candidate t = c[at];
    c[at] = c[child];
    c[child] = t;
  }
}

/* The k best of a row, best first, into c[0 … returned). Tokens at -inf and NaN are none. */
static int32_t take_best(struct candidate *c, const float *x, int32_t n, int32_t k) {
  enum { LANES = 16 };
  int32_t held = 0;
  if (k > HEAP_MOST) {
    for (int32_t i = 0; i < n; i++) {
      if (x[i] > -INFINITY) c[held++] = (struct candidate){x[i], i};
    }
    if (k < held) select_first(c, held, k);
    held = QTR_MIN(held, k);
  } else {
    float least = -INFINITY; /* what a token must exceed to be among the best so far */
    for (int32_t at = 0; k > 0 && at < n; at += LANES) {
      int32_t end = QTR_MIN(at + LANES, n);
      if (end - at == LANES) { /* nearly always nothing to see */
        int any = 0;
        for (int j = 0; j < LANES; j++) any |= x[at + j] > least;
        if (!any) continue;
      }
      for (int32_t i = at; i < end; i++) {
        if (!(x[i] > least)) continue;
        if (held < k) {
          c[held++] = (struct candidate){x[i], i};
          if (held < k) continue;
          for (int32_t j = k / 2; j-- > 0;) sift_down(c, k, j);
        } else {
          c[0] = (struct candidate){x[i], i};
          sift_down(c, k, 0);
        }
        least = c[0].logit;
      }
    }
  }
  qsort(c, (size_t)held, sizeof *c, compare);
  return held;
}

/* ---- filters ------------------------------------------------------------------------------------- */

bool qtr_sampling_has_penalties(const struct qtr_sampling *s) {
  return s->repetition_penalty < 1.0f || s->repetition_penalty > 1.0f || s->presence_penalty < 0.0f ||
         s->presence_penalty > 0.0f || s->frequency_penalty < 0.0f || s->frequency_penalty > 0.0f;
}

static void penalise(struct qtr_sampler *s, const struct qtr_sample_args *a) {
  const struct qtr_sampling *p = a->sampling;
  int32_t n = s->vocab_size;
  for (size_t i = 0; i < a->n_prompt; i++) {
    int32_t t = a->prompt[i];
    if (t >= 0 && t < n) s->n_output[t] = -1;
  }
  for (size_t i = 0; i < a->n_output; i++) {
    int32_t t = a->output[i];
    if (t >= 0 && t < n) s->n_output[t] = QTR_MAX(s->n_output[t], 0) + 1;
  }
  /* Each token once: its count goes back to zero as it is handled, which also leaves the scratch clean. */
  for (size_t list = 0; list < 2; list++) {
    const int32_t *token = list ? a->output : a->prompt;
    size_t n_tokens = list ? a->n_output : a->n_prompt;
    for (size_t i = 0; i < n_tokens; i++) {
      int32_t t = token[i];
      if (t < 0 || t >= n || s->n_output[t] == 0) continue;
      int32_t count = QTR_MAX(s->n_output[t], 0);
      s->n_output[t] = 0;
      float x = s->logit[t];
      x = x > 0 ? x / p->repetition_penalty : x * p->repetition_penalty;
      if (count > 0) x -= p->presence_penalty + p->frequency_penalty * (float)count;
      s->logit[t] = clean(x);
    }
  }
}

size_t qtr_sampler_adjustments(struct qtr_sampler *s, const struct qtr_sample_args *a, struct qtr_choose_adjust *adjust,
                               size_t most) {
  /* n_output holds the place + 1 of a token's entry meanwhile. */
  size_t n = 0;
  bool penalties = qtr_sampling_has_penalties(a->sampling), full = false;
  for (size_t list = 0; list < 3 && !full; list++) {
    const int32_t *history = list ? a->output : a->prompt;
    size_t n_tokens = list == 2 ? a->n_bias : !penalties ? 0 : list ? a->n_output : a->n_prompt;
    for (size_t i = 0; i < n_tokens && !full; i++) {
      int32_t t = list == 2 ? a->bias[i].token : history[i];
      if (t < 0 || t >= s->vocab_size) continue;
      if (s->n_output[t] == 0) {
        if ((full = n == most)) break;
        adjust[n++] = (struct qtr_choose_adjust){.token = t, .count = list == 2 ? -1 : 0};
        s->n_output[t] = (int32_t)n;
      }
      struct qtr_choose_adjust *entry = &adjust[s->n_output[t] - 1];
      if (list == 1) entry->count++;
      if (list == 2) entry->bias += a->bias[i].bias;
    }
  }
  for (size_t i = 0; i < n; i++) s->n_output[adjust[i].token] = 0;
  return full ? most + 1 : n;
}

/* s->logit := the row with bias, penalties and the allowed set in it. */
static void prepare(struct qtr_sampler *s, const struct qtr_sample_args *a) {
  int32_t n = s->vocab_size;
  for (int32_t i = 0; i < n; i++) s->logit[i] = clean(a->logits[i]);
  for (size_t i = 0; i < a->n_bias; i++) {
    int32_t t = a->bias[i].token;
    if (t >= 0 && t < n) s->logit[t] += a->bias[i].bias;
  }
  if (qtr_sampling_has_penalties(a->sampling)) penalise(s, a);
  if (a->allowed) {
    for (int32_t i = 0; i < n; i++) {
      if (!(a->allowed[i / 32] >> (i % 32) & 1u)) s->logit[i] = -INFINITY;
    }
  }
}

/* Draws from the weights of n tokens whose sum is total; the last one with any weight stands for the rounding of sums. */
static int32_t draw(const struct qtr_sampler *s, int32_t n, double total, double unit) {
  double target = unit * total, at = 0;
  int32_t block = 0, last = 0, n_blocks = (n + BLOCK - 1) / BLOCK;
  while (block < n_blocks - 1 && at + s->block_sum[block] <= target) at += s->block_sum[block++];
  while (block > 0 && !(s->block_sum[block] > 0)) block--;
  for (int32_t i = block * BLOCK, end = QTR_MIN(i + BLOCK, n); i < end; i++) {
    if (!(s->weight[i] > 0)) continue;
    last = i;
    at += (double)s->weight[i];
    if (at > target) return i;
  }
  return last;
}

/* x: the row as it counts, best: its largest value. */
static int32_t draw_token(struct qtr_sampler *s, const struct qtr_sample_args *a, const float *x, float best) {
  const struct qtr_sampling *p = a->sampling;
  const float inverse = 1.0f / p->temperature;
  const double unit = qtr_philox_unit(a->seed, a->position);
  const bool some = p->top_k > 0 && p->top_k < s->vocab_size;
  int32_t n = s->vocab_size;
  if (!some && p->top_p >= 1) { /* nothing to sort: weights by id. The best token's is 1 */
    double total = weigh(s, x, n, best, inverse, p->min_p);
    return draw(s, n, total, unit);
  }

  /* top-p: the shortest run of best tokens that holds top_p of what top-k left. min-p ends the run earlier: all that follow
   * are smaller still. Without top-k the sum is the whole row's, and more and more of the best are sorted until the run
   * ends. */
  struct candidate *c = s->candidate;
  int32_t n_sorted = some ? p->top_k : FIRST_SORT, n_run = 0;
  double sum = 0, held = 0;
  if (!some) sum = weigh(s, x, n, best, inverse, 0);
  for (;; n_sorted = n_sorted < n / 8 ? 8 * n_sorted : n) {
    int32_t n_best = take_best(c, x, n, QTR_MIN(n_sorted, n));
    if (some) {
      for (int32_t i = 0; i < n_best; i++) sum += (double)exp_negative((c[i].logit - best) * inverse);
    }
    double wanted = p->top_p < 1 ? (double)p->top_p * sum : INFINITY;
    for (n_run = 0, held = 0; n_run < n_best && (n_run == 0 || held < wanted); n_run++) {
      float w = exp_negative((c[n_run].logit - best) * inverse);
      if (n_run > 0 && w < p->min_p) break;
      held += (double)w;
    }
    if (some || n_run < n_sorted || n_sorted >= n) break;
  }
  double target = unit * held, at = 0;
  for (int32_t i = 0; i < n_run; i++) {
    at += (double)exp_negative((c[i].logit - best) * inverse);
    if (at > target) return c[i].token;
  }
  return c[n_run - 1].token;
}

/* ---- log-probabilities --------------------------------------------------------------------------- */

/* Of the untouched row. Infinite logits count as the largest number, as everywhere. */
static void log_probabilities(struct qtr_sampler *s, const struct qtr_sample_args *a, struct qtr_sample_result *r) {
  int32_t n = s->vocab_size, best = argmax(a->logits, n);
  if (best < 0) return;
  float top = clean(a->logits[best]);
  const float *x = a->logits;
  if (!(a->logits[best] < INFINITY)) {
    for (int32_t i = 0; i < n; i++) s->logit[i] = clean(a->logits[i]);
    x = s->logit;
  }
  double log_sum = (double)top + log(weigh(s, x, n, top, 1.0f, 0));
  r->logprob = (float)((double)clean(a->logits[r->token]) - log_sum);
  r->n_top = take_best(s->candidate, x, n, QTR_MIN(a->n_top, 20));
  for (int32_t i = 0; i < r->n_top; i++) {
    r->top[i] = (struct qtr_token_logprob){s->candidate[i].token, (float)((double)s->candidate[i].logit - log_sum)};
  }
}

void qtr_sampler_score(struct qtr_sampler *s, const float *logits, int32_t token, int32_t n_top,
                       struct qtr_sample_result *r) {
  *r = (struct qtr_sample_result){.token = token, .logprob = NAN};
  log_probabilities(s, &(struct qtr_sample_args){.logits = logits, .n_top = n_top}, r);
}

void qtr_sample(struct qtr_sampler *s, const struct qtr_sample_args *a, struct qtr_sample_result *r) {
  r->logprob = 0;
  r->n_top = 0;
  const float *x = a->logits;
  bool untouched = a->n_bias == 0 && !a->allowed && !qtr_sampling_has_penalties(a->sampling);
  bool greedy = a->sampling->temperature < GREEDY_TEMPERATURE || a->sampling->top_k == 1;
  r->token = untouched ? argmax(x, s->vocab_size) : -1;
  if (!untouched || (r->token >= 0 && !(x[r->token] < INFINITY))) {
    prepare(s, a);
    x = s->logit;
    r->token = argmax(x, s->vocab_size);
  }
  if (r->token < 0) return;
  if (!greedy) r->token = draw_token(s, a, x, x[r->token]);
  if (a->n_top >= 0) log_probabilities(s, a, r);
}
