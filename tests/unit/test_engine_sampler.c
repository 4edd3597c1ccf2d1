/* The sampler against a brute-force one that sorts everything and adds in long double, its stream against published values,
 * its draws against their distribution, and its corners: ties, NaN, masks, penalties. */
#include "engine/sampler.c" /* the stream and the exponential are file-local */

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>

#include <cmocka.h>

#define VOCAB 1300 /* several blocks of the sampler */

static uint64_t rng = 1;
static double uniform(void) { return qtr_philox_unit(7, rng++); }
static int pick(int n) { return (int)(uniform() * n); }
static const struct qtr_sampling plain = {.temperature = 1, .top_k = -1, .top_p = 1, .repetition_penalty = 1};

/* ---- arithmetic ---- */

/* Known answers of Random123's kat_vectors for philox4x32 with 10 rounds: counter and key zero; the first two words. */
static void test_stream_known_answer(void **unused) {
  (void)unused;
  uint64_t words = (uint64_t)0xe169c58du << 32 | 0x6627e8d5u;
  assert_true(qtr_philox_unit(0, 0) == (double)(words >> 11) * 0x1p-53);
  assert_true(qtr_philox_unit(0, 1) != qtr_philox_unit(0, 0) && qtr_philox_unit(1, 0) != qtr_philox_unit(0, 0));
  double sum = 0;
  for (uint64_t i = 0; i < 100000; i++) {
    double u = qtr_philox_unit(3, i);
    assert_true(u >= 0 && u < 1);
    sum += u;
  }
  assert_true(fabs(sum / 100000 - 0.5) < 0.005); /* five standard deviations */
}

static void test_exponential(void **unused) {
  (void)unused;
  assert_true(exp_negative(0) == 1.0f);
  assert_true(exp_negative(-INFINITY) == 0 && exp_negative(-1e30f) == 0 && exp_negative(-88) == 0 && exp_negative(NAN) == 0);
  for (int i = 0; i < 200000; i++) {
    float x = (float)(-87 * uniform() * uniform());
    double y = exp((double)x);
    if (fabs((double)exp_negative(x) - y) > 1.2e-7 * y)
      fail_msg("exp(%.9g) is %.9g, not %.9g", x, y, (double)exp_negative(x));
  }
}

/* ---- brute force ---- */

struct brute {
  float logit[VOCAB];
  int n_kept;
  int kept[VOCAB]; /* in the order of drawing */
  long double weight[VOCAB];
};

static const struct brute *sorting;
static int brute_compare(const void *a, const void *b) {
  int i = *(const int *)a, j = *(const int *)b;
  if (sorting->logit[i] > sorting->logit[j]) return -1;
  if (sorting->logit[i] < sorting->logit[j]) return 1;
  return i - j;
}

static void brute_filter(struct brute *b, const struct qtr_sample_args *a) {
  const struct qtr_sampling *p = a->sampling;
  for (int i = 0; i < VOCAB; i++) {
    float x = isnan(a->logits[i]) ? -INFINITY : a->logits[i];
    for (size_t k = 0; k < a->n_bias; k++) x += a->bias[k].token == i ? a->bias[k].bias : 0;
    bool seen = false;
    int count = 0;
    for (size_t k = 0; k < a->n_prompt; k++) seen = seen || a->prompt[k] == i;
    for (size_t k = 0; k < a->n_output; k++) count += a->output[k] == i;
    if (seen || count) x = x > 0 ? x / p->repetition_penalty : x * p->repetition_penalty;
    if (count) x -= p->presence_penalty + p->frequency_penalty * (float)count;
    if (a->allowed && !(a->allowed[i / 32] & 1u << i % 32)) x = -INFINITY;
    b->logit[i] = x;
  }
  int order[VOCAB], n = 0;
  for (int i = 0; i < VOCAB; i++) {
    if (b->logit[i] > -INFINITY) order[n++] = i;
  }
  sorting = b;
  qsort(order, (size_t)n, sizeof *order, brute_compare);
  if (p->top_k > 0 && n > p->top_k) n = p->top_k;
  long double sum = 0, held = 0;
  bool keep[VOCAB] = {false};
  for (int i = 0; i < n; i++) {
    b->weight[i] = expl(((long double)b->logit[order[i]] - (long double)b->logit[order[0]]) / (long double)p->temperature);
    sum += b->weight[i];
  }
  b->n_kept = 0;
  for (int i = 0; i < n; i++) {
    keep[order[i]] =
        (i == 0 || p->top_p >= 1 || held < (long double)p->top_p * sum) && b->weight[i] >= (long double)p->min_p;
    held += b->weight[i];
  }
  bool by_id = p->top_p >= 1 && (p->top_k < 0 || p->top_k >= VOCAB);
  for (int k = 0; k < VOCAB; k++) {
    int i = by_id ? k : k < n ? order[k] : -1;
    if (i < 0 || !keep[i]) continue;
    b->weight[b->n_kept] = expl(((long double)b->logit[i] - (long double)b->logit[order[0]]) / (long double)p->temperature);
    b->kept[b->n_kept++] = i;
  }
}

/* The brute-force token for the draw u; -1 when u lies on an edge so closely that rounding decides. */
static int brute_draw(const struct brute *b, double u) {
  long double sum = 0, at = 0;
  for (int i = 0; i < b->n_kept; i++) sum += b->weight[i];
  for (int i = 0; i < b->n_kept; i++) {
    at += b->weight[i];
    if (fabsl(at - (long double)u * sum) < 2e-6L * sum) return -1; /* weights are floats */
    if (at > (long double)u * sum) return b->kept[i];
  }
  return -1;
}

static void test_brute_force(void **unused) {
  (void)unused;
  struct qtr_sampler *sampler;
  assert_int_equal(qtr_sampler_create(VOCAB, &sampler, NULL), QTR_OK);
  static struct brute b;
  int n_compared = 0;
  for (int round = 0; round < 6000; round++) {
    float logits[VOCAB];
    int32_t prompt[20], output[20];
    struct qtr_logit_bias bias[4];
    uint32_t allowed[(VOCAB + 31) / 32];
    float spread = (float)(uniform() * 12);
    bool ties = pick(4) == 0;
    for (int i = 0; i < VOCAB; i++) {
      float x = (float)(uniform() - 0.5) * spread;
      logits[i] = ties ? roundf(x) : x;
      if (pick(50) == 0) logits[i] = pick(2) ? NAN : -INFINITY;
    }
    for (int i = 0; i < 20; i++) prompt[i] = pick(VOCAB), output[i] = pick(30);
    for (int i = 0; i < 4; i++) bias[i] = (struct qtr_logit_bias){i * 7 + pick(7), (float)(uniform() * 10 - 5)};
    for (size_t i = 0; i < sizeof allowed / sizeof *allowed; i++) allowed[i] = (uint32_t)(uniform() * 4294967296.0);
    struct qtr_sampling p = plain;
    if (pick(2)) p.temperature = (float)(0.05 + uniform() * 3);
    if (pick(2)) p.top_k = 1 + pick(pick(2) ? 10 : VOCAB + 20);
    if (pick(2)) p.top_p = (float)(1 - uniform() * uniform());
    if (pick(3) == 0) p.min_p = (float)(uniform() * uniform());
    if (pick(3) == 0) p.repetition_penalty = (float)(0.1 + uniform() * 1.9);
    if (pick(3) == 0) p.presence_penalty = (float)(uniform() * 4 - 2);
    if (pick(3) == 0) p.frequency_penalty = (float)(uniform() * 4 - 2);
    struct qtr_sample_args a = {.logits = logits,
                                .sampling = &p,
                                .prompt = prompt,
                                .n_prompt = 20,
                                .output = output,
                                .n_output = (size_t)pick(20),
                                .seed = (uint64_t)pick(5),
                                .position = (uint64_t)round,
                                .n_top = -1};
    if (pick(3) == 0) a.bias = bias, a.n_bias = 4;
    if (pick(4) == 0) a.allowed = allowed;
    struct qtr_sample_result r;
    qtr_sample(sampler, &a, &r);
    brute_filter(&b, &a);
    if (p.top_k == 1) assert_int_equal(r.token, b.kept[0]);
    int expected = brute_draw(&b, qtr_philox_unit(a.seed, a.position));
    if (expected < 0) continue;
    n_compared++;
    if (r.token != expected) fail_msg("round %d: token %d, not %d", round, r.token, expected);
  }
  assert_true(n_compared > 5500);
  for (int i = 0; i < VOCAB; i++) assert_int_equal(sampler->n_output[i], 0);
  qtr_sampler_free(sampler);
}

/* ---- distribution ---- */

/* Chi-square of 60,000 draws; the bounds are the 99.99 % points, and the stream is fixed, so this never fails by chance. */
static void chi_square(const struct qtr_sampling *p, double bound) {
  enum { N = 60000 };
  struct qtr_sampler *sampler;
  assert_int_equal(qtr_sampler_create(VOCAB, &sampler, NULL), QTR_OK);
  float logits[VOCAB];
  static int count[VOCAB];
  static struct brute b;
  memset(count, 0, sizeof count);
  for (int i = 0; i < VOCAB; i++) logits[i] = i < 20 ? (float)(i % 7) * 0.5f : -30;
  struct qtr_sample_args a = {.logits = logits, .sampling = p, .seed = 42, .n_top = -1};
  for (a.position = 0; a.position < N; a.position++) {
    struct qtr_sample_result r;
    qtr_sample(sampler, &a, &r);
    count[r.token]++;
  }
  brute_filter(&b, &a);
  long double sum = 0, chi = 0;
  int left = N;
  for (int i = 0; i < b.n_kept; i++) sum += b.weight[i];
  for (int i = 0; i < b.n_kept; i++) {
    long double expected = b.weight[i] / sum * N, d = count[b.kept[i]] - expected;
    left -= count[b.kept[i]];
    if (expected >= 5) chi += d * d / expected;
  }
  assert_int_equal(left, 0); /* nothing outside the kept set */
  if (chi > (long double)bound) fail_msg("chi-square %.2Lf is above %.2f", chi, bound);
  qtr_sampler_free(sampler);
}

static void test_distribution(void **unused) {
  (void)unused;
  struct qtr_sampling p = plain;
  chi_square(&p, 52.4); /* 19 degrees of freedom */
  p.temperature = 0.5f;
  chi_square(&p, 52.4);
  p.top_k = 8;
  chi_square(&p, 29.9); /* 7 */
  p.top_p = 0.6f;
  chi_square(&p, 29.9);
  p = plain;
  p.min_p = 0.3f;
  chi_square(&p, 33.7);
}

/* ---- corners ---- */

static int32_t greedy(struct qtr_sampler *s, const float *logits, const struct qtr_sampling *p, const uint32_t *allowed) {
  struct qtr_sample_result r;
  struct qtr_sample_args a = {.logits = logits, .sampling = p, .allowed = allowed, .n_top = 20};
  qtr_sample(s, &a, &r);
  return r.token;
}

static void test_greedy_and_nan(void **unused) {
  (void)unused;
  enum { BIG = 5000 };
  struct qtr_sampler *s;
  assert_int_equal(qtr_sampler_create(BIG, &s, NULL), QTR_OK);
  static float x[BIG];
  static uint32_t allowed[(BIG + 31) / 32];
  struct qtr_sampling zero = plain, one = plain, hot = plain;
  zero.temperature = 0;
  one.top_k = 1;
  for (int i = 0; i < BIG; i++) x[i] = NAN;
  assert_int_equal(greedy(s, x, &zero, NULL), -1);
  assert_int_equal(greedy(s, x, &hot, NULL), -1);
  x[4990] = -INFINITY;
  assert_int_equal(greedy(s, x, &zero, NULL), -1);
  x[4321] = -1e30f;
  assert_int_equal(greedy(s, x, &zero, NULL), 4321);
  assert_int_equal(greedy(s, x, &hot, NULL), 4321);
  x[4999] = x[1234] = 3;
  assert_int_equal(greedy(s, x, &zero, NULL), 1234); /* ties: lowest id */
  assert_int_equal(greedy(s, x, &one, NULL), 1234);
  x[77] = INFINITY;
  assert_int_equal(greedy(s, x, &zero, NULL), 77);
  assert_int_equal(greedy(s, x, &hot, NULL), 77);
  assert_int_equal(greedy(s, x, &zero, allowed), -1); /* nothing allowed */
  allowed[4999 / 32] |= 1u << 4999 % 32;
  assert_int_equal(greedy(s, x, &zero, allowed), 4999);
  assert_int_equal(greedy(s, x, &hot, allowed), 4999);
  for (int round = 0; round < 300; round++) { /* the blocked maximum finds every place */
    for (int i = 0; i < BIG; i++) x[i] = -(float)uniform();
    int at = pick(BIG);
    x[at] = 0;
    assert_int_equal(greedy(s, x, &zero, NULL), at);
  }
  qtr_sampler_free(s);
}

/* Bias and penalties act on greedy decoding too. */
static void test_greedy_penalties(void **unused) {
  (void)unused;
  struct qtr_sampler *s;
  assert_int_equal(qtr_sampler_create(4, &s, NULL), QTR_OK);
  const float x[4] = {2, 1.5f, 1, -1};
  const int32_t prompt[] = {0}, output[] = {1, 1};
  struct qtr_sampling p = plain;
  struct qtr_sample_result r;
  p.temperature = 0;
  struct qtr_sample_args a = {
      .logits = x, .sampling = &p, .prompt = prompt, .n_prompt = 1, .output = output, .n_output = 2, .n_top = -1};
  p.repetition_penalty = 1.9f; /* 1.05 0.79 1 -1 */
  qtr_sample(s, &a, &r);
  assert_int_equal(r.token, 0);
  p.repetition_penalty = 2; /* 1 0.75 1 -1: tie */
  qtr_sample(s, &a, &r);
  assert_int_equal(r.token, 0);
  const struct qtr_logit_bias bias[] = {{3, 3}, {0, -0.5f}};
  a.bias = bias;
  a.n_bias = 2; /* 0.75 0.75 1 2 */
  qtr_sample(s, &a, &r);
  assert_int_equal(r.token, 3);
  p = plain;
  p.temperature = 0;
  a.n_bias = 0;
  p.frequency_penalty = -0.3f; /* token 1 gains 0.6: only output counts */
  qtr_sample(s, &a, &r);
  assert_int_equal(r.token, 1);
  p.frequency_penalty = 0;
  p.presence_penalty = -0.4f; /* once, however often */
  qtr_sample(s, &a, &r);
  assert_int_equal(r.token, 0);
  qtr_sampler_free(s);
}

static void test_logprobs(void **unused) {
  (void)unused;
  struct qtr_sampler *s;
  assert_int_equal(qtr_sampler_create(VOCAB, &s, NULL), QTR_OK);
  for (int round = 0; round < 200; round++) {
    float x[VOCAB];
    for (int i = 0; i < VOCAB; i++) x[i] = roundf((float)(uniform() * 40 - 20)) + (pick(3) ? 0.25f : 0);
    x[5] = NAN;
    x[6] = -INFINITY;
    struct qtr_sampling p = plain;
    p.temperature = 2;
    p.top_k = 10;
    p.repetition_penalty = 2;
    const int32_t prompt[] = {1, 2, 3};
    struct qtr_sample_args a = {
        .logits = x, .sampling = &p, .prompt = prompt, .n_prompt = 3, .position = (uint64_t)round, .n_top = round % 21};
    struct qtr_sample_result r;
    qtr_sample(s, &a, &r);
    struct brute b;
    int order[VOCAB];
    long double sum = 0;
    for (int i = 0; i < VOCAB; i++) {
      b.logit[i] = isnan(x[i]) ? -INFINITY : x[i];
      sum += expl((long double)b.logit[i]);
      order[i] = i;
    }
    sorting = &b;
    qsort(order, VOCAB, sizeof *order, brute_compare);
    assert_true(fabsl((long double)r.logprob - ((long double)x[r.token] - logl(sum))) < 2e-6L);
    assert_int_equal(r.n_top, round % 21);
    for (int i = 0; i < r.n_top; i++) {
      assert_int_equal(r.top[i].token, order[i]);
      assert_true(fabsl((long double)r.top[i].logprob - ((long double)x[order[i]] - logl(sum))) < 2e-6L);
    }
  }
  qtr_sampler_free(s);
}

static void test_ranges(void **unused) {
  (void)unused;
  struct qtr_error err;
  struct qtr_sampling p = plain;
  assert_int_equal(qtr_sampling_check(&p, &err), QTR_OK);
#define REFUSED(field, bad)                                         \
  p = plain;                                                        \
  p.field = bad;                                                    \
  assert_int_equal(qtr_sampling_check(&p, &err), QTR_ERR_ARGUMENT); \
  assert_non_null(strstr(err.message, #field));
  REFUSED(temperature, -0.1f)
  REFUSED(temperature, NAN)
  REFUSED(temperature, INFINITY)
  REFUSED(top_k, 0)
  REFUSED(top_k, -2)
  REFUSED(top_p, 0)
  REFUSED(top_p, 1.01f)
  REFUSED(top_p, NAN)
  REFUSED(min_p, -0.1f)
  REFUSED(min_p, 1.5f)
  REFUSED(repetition_penalty, 0)
  REFUSED(repetition_penalty, 2.1f)
  REFUSED(presence_penalty, 2.5f)
  REFUSED(presence_penalty, NAN)
  REFUSED(frequency_penalty, -2.5f)
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_stream_known_answer),
      cmocka_unit_test(test_exponential),
      cmocka_unit_test(test_brute_force),
      cmocka_unit_test(test_distribution),
      cmocka_unit_test(test_greedy_and_nan),
      cmocka_unit_test(test_greedy_penalties),
      cmocka_unit_test(test_logprobs),
      cmocka_unit_test(test_ranges),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
