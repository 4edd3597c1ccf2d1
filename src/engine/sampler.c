/* sampler.c - one row of logits to one token (sampler.h; the order of filters is that of struct qtr_sampling, spec E.4).
 *
 * Bias and penalties act on a float copy of the row, everything after them in double. The exponential is our own polynomial:
 * libm's differs in the last bit between machines (FMA or not), and a seed shall give the same token on all of them. The
 * random stream is Philox4x32-10 with the seed as its key and the draw's number as its counter (Salmon et al., SC'11), so
 * draws depend on nothing but their place. NaN logits count as -inf; of equal logits the lowest id wins everywhere.
 */
#include "engine/sampler.h"
#include "base/checked.h"
#include "base/half.h"
#include "base/status.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define GREEDY_TEMPERATURE 1e-5f /* spec E.4 */
#define FIRST_SORT 64            /* candidates that top-p sorts first; eight times as many whenever they do not suffice */

struct candidate {
  float logit;
  int32_t token;
};

struct qtr_sampler {
  int32_t vocab_size;
  float *logit;                /* (vocab_size) after bias and penalties; -inf = excluded */
  double *weight;              /* (vocab_size) unnormalised probabilities */
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
    s->candidate = malloc(n * sizeof *s->candidate);
    s->n_output = calloc(n, sizeof *s->n_output);
  }
  if (!s || !s->logit || !s->weight || !s->candidate || !s->n_output) {
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
  free(s->candidate);
  free(s->n_output);
  free(s);
}

/* ---- arithmetic ---------------------------------------------------------------------------------- */

/* exp(x) for x <= 0, within 1 ulp or two, 0 below -700. Only additions, multiplications and bit patterns: the same bits on
 * every machine (the build forbids contraction), and a loop over it vectorises. */
static inline double exp_negative(double x) {
  const double log2e = 0x1.71547652b82fep+0, ln2_high = 0x1.62e42fefa3800p-1, ln2_low = 0x1.ef35793c76730p-45;
  const double shift = 0x1.8p52; /* adding it rounds to an integer, which then stands in the low mantissa bits */
  double clamped = x > -700.0 ? x : -700.0;
  double k = clamped * log2e + shift;
  int64_t n;
  memcpy(&n, &k, sizeof n);
  k -= shift;
  double r = (clamped - k * ln2_high) - k * ln2_low; /* |r| <= ln2/2 */
  double p = 1.0 / 479001600.0;                      /* Taylor to r^12: the rest is below 2^-56 */
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  uint64_t bits = ((uint64_t)n + 1023u) << 52; /* 2^n; the shift's own bits fall out at the top */
  double scale;
  memcpy(&scale, &bits, sizeof scale);
  return x > -700.0 ? p * scale : 0.0;
}

/* Philox4x32-10; 53 bits of its output as a number in [0, 1). */
static double random_unit(uint64_t seed, uint64_t position) {
  uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
  uint32_t c0 = (uint32_t)position, c1 = (uint32_t)(position >> 32), c2 = 0, c3 = 0;
  for (int round = 0; round < 10; round++) {
    uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ key0;
    c1 = (uint32_t)p1;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ key1;
    c3 = (uint32_t)p0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  uint64_t bits = ((uint64_t)c1 << 32 | c0) >> 11;
  return (double)bits * 0x1p-53;
}

/* Comparable value of a logit: NaN is the lowest, +inf the largest finite number, so that differences stay defined. */
static inline float clean(float x) { return x > -INFINITY ? (x < FLT_MAX ? x : FLT_MAX) : -INFINITY; }

/* Lowest index of the largest value, -1 when nothing is above -inf. Lanes keep the maximum of a block, so that it
 * vectorises; only a block that beats all before it is looked through. NaN never compares greater. */
static int32_t argmax(const float *x, int32_t n) {
  enum { BLOCK = 1024, LANES = 16 };
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

/* ---- filters ------------------------------------------------------------------------------------- */

static bool has_penalties(const struct qtr_sampling *s) {
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

/* s->logit := the row with bias, penalties and the allowed set in it. */
static void prepare(struct qtr_sampler *s, const struct qtr_sample_args *a) {
  int32_t n = s->vocab_size;
  for (int32_t i = 0; i < n; i++) s->logit[i] = clean(a->logits[i]);
  for (size_t i = 0; i < a->n_bias; i++) {
    int32_t t = a->bias[i].token;
    if (t >= 0 && t < n) s->logit[t] += a->bias[i].bias;
  }
  if (has_penalties(a->sampling)) penalise(s, a);
  if (a->allowed) {
    for (int32_t i = 0; i < n; i++) {
      if (!(a->allowed[i / 32] >> (i % 32) & 1u)) s->logit[i] = -INFINITY;
    }
  }
}

/* Draws from weight[0 … n) with the given sum; the last one with any weight stands for the rounding of the sum. */
static int32_t draw(const double *weight, int32_t n, double sum, double unit) {
  double target = unit * sum, at = 0;
  int32_t last = 0;
  for (int32_t i = 0; i < n; i++) {
    if (weight[i] > 0) last = i;
    at += weight[i];
    if (at > target) return i;
  }
  return last;
}

static int32_t draw_token(struct qtr_sampler *s, const struct qtr_sample_args *a, float best) {
  const struct qtr_sampling *p = a->sampling;
  const double temperature = (double)p->temperature, top = (double)best;
  const double unit = random_unit(a->seed, a->position);
  int32_t n = s->vocab_size;

  if ((p->top_k < 0 || p->top_k >= n) && p->top_p >= 1) {
    /* nothing to sort: weights by id */
    double sum = 0, least = (double)p->min_p; /* the best token's weight is 1 */
    for (int32_t i = 0; i < n; i++) s->weight[i] = exp_negative(((double)s->logit[i] - top) / temperature);
    for (int32_t i = 0; i < n; i++) {
      if (s->weight[i] < least) s->weight[i] = 0;
      sum += s->weight[i];
    }
    return draw(s->weight, n, sum, unit);
  }

  struct candidate *c = s->candidate;
  int32_t n_kept = 0;
  for (int32_t i = 0; i < n; i++) {
    if (s->logit[i] > -INFINITY) c[n_kept++] = (struct candidate){s->logit[i], i};
  }
  if (p->top_k > 0 && p->top_k < n_kept) {
    select_first(c, n_kept, p->top_k);
    n_kept = p->top_k;
  }
  /* top-p: the shortest run of best tokens that holds top_p of what top-k left. Summed in the order of c before sorting. */
  double sum = 0;
  for (int32_t i = 0; i < n_kept; i++) s->weight[i] = exp_negative(((double)c[i].logit - top) / temperature);
  for (int32_t i = 0; i < n_kept; i++) sum += s->weight[i];
  double wanted = p->top_p < 1 ? (double)p->top_p * sum : INFINITY, held = 0;
  int32_t n_sorted = 0, n_run = 0;
  while (n_run < n_kept && (n_run == 0 || held < wanted)) {
    if (n_run == n_sorted) {
      int32_t next = QTR_MIN(n_kept - n_sorted, n_sorted ? 7 * n_sorted : FIRST_SORT);
      if (n_sorted + next < n_kept) select_first(c + n_sorted, n_kept - n_sorted, next);
      qsort(c + n_sorted, (size_t)next, sizeof *c, compare);
      n_sorted += next;
    }
    s->weight[n_run] = exp_negative(((double)c[n_run].logit - top) / temperature);
    if (n_run > 0 && s->weight[n_run] < (double)p->min_p) break; /* min-p: all that follow are smaller still */
    held += s->weight[n_run++];
  }
  return c[draw(s->weight, n_run, held, unit)].token;
}

/* ---- log-probabilities --------------------------------------------------------------------------- */

static void log_probabilities(const struct qtr_sample_args *a, int32_t n, struct qtr_sample_result *r) {
  int32_t n_top = QTR_MIN(QTR_MIN(a->n_top, 20), n), n_held = 0;
  int32_t best = argmax(a->logits, n);
  if (best < 0) return;
  double top = (double)clean(a->logits[best]), sum = 0;
  struct candidate held[20];
  for (int32_t i = 0; i < n; i++) {
    float x = clean(a->logits[i]);
    sum += exp_negative((double)x - top);
    if (n_held == n_top && (n_top == 0 || !(x > held[n_top - 1].logit))) continue;
    if (!(x > -INFINITY)) continue;
    int32_t at = n_held < n_top ? n_held++ : n_top - 1;
    for (; at > 0 && x > held[at - 1].logit; at--) held[at] = held[at - 1];
    held[at] = (struct candidate){x, i};
  }
  double log_sum = top + log(sum);
  r->logprob = (float)((double)clean(a->logits[r->token]) - log_sum);
  r->n_top = n_held;
  for (int32_t i = 0; i < n_held; i++) {
    r->top[i] = (struct qtr_token_logprob){held[i].token, (float)((double)held[i].logit - log_sum)};
  }
}

void qtr_sample(struct qtr_sampler *s, const struct qtr_sample_args *a, struct qtr_sample_result *r) {
  r->logprob = 0;
  r->n_top = 0;
  bool untouched = a->n_bias == 0 && !a->allowed && !has_penalties(a->sampling);
  bool greedy = a->sampling->temperature < GREEDY_TEMPERATURE || a->sampling->top_k == 1;
  if (untouched && greedy) {
    r->token = argmax(a->logits, s->vocab_size);
  } else {
    prepare(s, a);
    r->token = argmax(s->logit, s->vocab_size);
    if (r->token >= 0 && !greedy) r->token = draw_token(s, a, s->logit[r->token]);
  }
  if (r->token >= 0 && a->n_top >= 0) log_probabilities(a, s->vocab_size, r);
}
