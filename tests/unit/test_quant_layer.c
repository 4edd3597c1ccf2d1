/* The transformations of spec F.3 - F.5 leave what a layer computes as it is: one layer with grouped heads, a head_dim that
 * is not hidden/heads, biases everywhere and uneven norms is run by qtr_runner before and after each. */
#include "base/checked.h"
#include "quant/smooth.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

#include "quant_fixture.h"

enum { LENGTH = 80, HIDDEN = 96, INNER = 160, HEADS = 6, KV_HEADS = 2, DIM = 32 };

static const struct fixture_shape shape = {.hidden = HIDDEN,
                                           .inner = INNER,
                                           .n_layers = 1,
                                           .n_heads = HEADS,
                                           .n_kv_heads = KV_HEADS,
                                           .head_dim = DIM,
                                           .qkv_bias = true,
                                           .seed = 11};

struct bench {
  char *root;
  struct qtr_config config;
  struct qtr_checkpoint *checkpoint;
  struct qtr_threads *team;
  struct qtr_runner runner;
  struct qtr_float_layer layer; /* read anew for each test */
  float *x, *before;            /* (LENGTH, HIDDEN) */
};

static void must(enum qtr_status status, const struct qtr_error *err) {
  if (status) fail_msg("%s: %s", qtr_status_name(status), err->message);
}

static void run_layer(struct bench *b, float *out) {
  struct qtr_error err;
  memcpy(out, b->x, LENGTH * HIDDEN * sizeof *out);
  must(qtr_runner_set(&b->runner, &b->layer, &err), &err);
  must(qtr_runner_run(&b->runner, &b->layer, out, NULL, NULL, &err), &err);
}

static int open_bench(void **state) {
  struct bench *b = calloc(1, sizeof *b);
  struct qtr_error err;
  *state = b;
  if (!b || !(b->root = fixture_make_root()) || !fixture_write_model(&shape, b->root)) return -1;
  b->x = malloc(LENGTH * HIDDEN * sizeof *b->x);
  b->before = malloc(LENGTH * HIDDEN * sizeof *b->before);
  must(qtr_config_read(b->root, &b->config, &err), &err);
  must(qtr_checkpoint_open(b->root, &b->checkpoint, &err), &err);
  must(qtr_threads_create(2, &b->team, &err), &err);
  must(qtr_runner_open(&b->config, QTR_KV_F16, LENGTH, 2, &b->runner, &err), &err);
  uint64_t random = 5;
  for (size_t i = 0; i < LENGTH * HIDDEN; i++) b->x[i] = fixture_uniform(&random);
  return 0;
}

static int close_bench(void **state) {
  struct bench *b = *state;
  qtr_runner_close(&b->runner);
  qtr_checkpoint_close(b->checkpoint);
  qtr_threads_free(b->team);
  fixture_remove(b->root);
  free(b->x);
  free(b->before);
  free(b);
  return 0;
}

/* The layer as it is in the file, with biases also where Qwen has none, and what it computes. */
static int read_layer(void **state) {
  struct bench *b = *state;
  struct qtr_error err;
  uint64_t random = 17;
  must(qtr_float_layer_read(b->checkpoint, &b->config, 0, &b->layer, &err), &err);
  for (enum qtr_projection p = QTR_O; p < QTR_N_PROJECTIONS; p++) {
    struct qtr_float_matrix *m = &b->layer.m[p];
    assert_null(m->bias);
    m->bias = malloc(m->n_out * sizeof *m->bias);
    for (size_t i = 0; i < m->n_out; i++) m->bias[i] = fixture_uniform(&random);
  }
  for (enum qtr_projection p = QTR_Q; p < QTR_O; p++) assert_non_null(b->layer.m[p].bias);
  run_layer(b, b->before);
  return 0;
}

static int drop_layer(void **state) {
  struct bench *b = *state;
  qtr_float_layer_free(&b->layer);
  return 0;
}

/* Relative to what the layer adds, so that the residual stream hides nothing. The cache holds keys and values in fp16. */
static double change(struct bench *b) {
  float *after = malloc(LENGTH * HIDDEN * sizeof *after);
  double error = 0, norm = 0, all = 0;
  assert_non_null(after);
  run_layer(b, after);
  for (size_t i = 0; i < LENGTH * HIDDEN; i++) {
    double d = (double)after[i] - (double)b->before[i], added = (double)b->before[i] - (double)b->x[i];
    error += d * d;
    norm += added * added;
    all += (double)b->before[i] * (double)b->before[i];
  }
  free(after);
  assert_true(norm > 0.05 * all);
  print_message("change: %.2e of what the layer adds\n", sqrt(error / norm));
  return sqrt(error / norm);
}

static void factors(float *s, size_t n, uint64_t random) {
  for (size_t i = 0; i < n; i++) s[i] = expf(2 * fixture_uniform(&random));
}

static void test_fold(void **state) {
  struct bench *b = *state;
  float gain = b->layer.input_norm[5];
  assert_true(gain > 2);
  qtr_layer_fold_norms(&b->layer);
  for (size_t i = 0; i < HIDDEN; i++) assert_true(b->layer.input_norm[i] == 1 && b->layer.post_norm[i] == 1);
  assert_true(change(b) < 1e-4);
}

/* The residual stream is in the other basis before and after. */
static void test_rotate(void **state) {
  struct bench *b = *state;
  struct qtr_error err;
  struct qtr_rotation rotation;
  must(qtr_rotation_create(HIDDEN, &rotation, &err), &err);
  qtr_layer_fold_norms(&b->layer);
  must(qtr_layer_rotate(b->team, &b->layer, &rotation, &err), &err);
  assert_true(change(b) > 0.5); /* it must have done something */
  float *x = malloc(LENGTH * HIDDEN * sizeof *x);
  assert_non_null(x);
  memcpy(x, b->x, LENGTH * HIDDEN * sizeof *x);
  must(qtr_rotate_rows(b->team, &rotation, b->x, LENGTH, HIDDEN, &err), &err);
  must(qtr_rotate_rows(b->team, &rotation, b->before, LENGTH, HIDDEN, &err), &err);
  assert_true(change(b) < 1e-4);
  memcpy(b->x, x, LENGTH * HIDDEN * sizeof *x);
  free(x);
  qtr_rotation_free(&rotation);
}

static void test_rotate_heads(void **state) {
  struct bench *b = *state;
  struct qtr_error err;
  struct qtr_rotation rotation;
  float v = b->layer.m[QTR_V].w[7], o = b->layer.m[QTR_O].w[7], bias = b->layer.m[QTR_V].bias[1];
  must(qtr_rotation_create(DIM, &rotation, &err), &err);
  must(qtr_layer_rotate_heads(b->team, &b->layer, &rotation, &err), &err);
  assert_true(v != b->layer.m[QTR_V].w[7] && o != b->layer.m[QTR_O].w[7] && bias != b->layer.m[QTR_V].bias[1]);
  assert_true(change(b) < 5e-4); /* other values are rounded to fp16 */
  qtr_rotation_free(&rotation);
}

static void test_smooth_keys(void **state) {
  struct bench *b = *state;
  float s[KV_HEADS * DIM], k = b->layer.m[QTR_K].w[3 * HIDDEN + 1], bias = b->layer.m[QTR_K].bias[3];
  float q = b->layer.m[QTR_Q].w[(4 * DIM + 3) * HIDDEN]; /* the fifth query head belongs to the second of K */
  factors(s, KV_HEADS * DIM, 3);
  for (size_t i = 0; i < KV_HEADS * DIM; i++) s[i] = exp2f(nearbyintf(log2f(s[i]))); /* fp16 then rounds alike */
  for (size_t h = 0; h < KV_HEADS; h++) {
    for (size_t i = 0; i < DIM / 2; i++) s[h * DIM + DIM / 2 + i] = s[h * DIM + i];
  }
  qtr_layer_smooth_keys(&b->layer, s);
  assert_true(b->layer.m[QTR_K].w[3 * HIDDEN + 1] == k / s[3] && b->layer.m[QTR_K].bias[3] == bias / s[3]);
  assert_true(b->layer.m[QTR_Q].w[(4 * DIM + 3) * HIDDEN] == q * s[DIM + 3]);
  assert_true(change(b) < 1e-5);
  /* Factors that tear RoPE's pairs apart do change it: what the test sees, it sees. */
  for (size_t i = 0; i < KV_HEADS * DIM; i++) s[i] = i % DIM < DIM / 2 ? 2 : 1;
  qtr_layer_smooth_keys(&b->layer, s);
  assert_true(change(b) > 1e-2);
}

static void test_smooth_out(void **state) {
  struct bench *b = *state;
  float s[KV_HEADS * DIM], v = b->layer.m[QTR_V].bias[DIM + 1];
  factors(s, KV_HEADS * DIM, 4);
  qtr_layer_smooth_out(&b->layer, s);
  assert_true(fabsf(b->layer.m[QTR_V].bias[DIM + 1] * s[DIM + 1] - v) < 1e-6f);
  assert_true(change(b) < 5e-4);
}

static void test_smooth_down(void **state) {
  struct bench *b = *state;
  float s[INNER], gate = b->layer.m[QTR_GATE].w[5], up = b->layer.m[QTR_UP].w[5], bias = b->layer.m[QTR_UP].bias[2];
  factors(s, INNER, 5);
  qtr_layer_smooth_down(&b->layer, s);
  assert_true(b->layer.m[QTR_GATE].w[5] == gate && b->layer.m[QTR_UP].w[5] != up); /* silu is not linear */
  assert_true(fabsf(b->layer.m[QTR_UP].bias[2] * s[2] - bias) < 1e-6f);
  assert_true(change(b) < 1e-5);
}

static void test_smooth_input(void **state) {
  struct bench *b = *state;
  float s[HIDDEN], gain = b->layer.input_norm[4], post = b->layer.post_norm[4];
  factors(s, HIDDEN, 6);
  qtr_layer_smooth_input(&b->layer, false, s);
  assert_true(fabsf(b->layer.input_norm[4] * s[4] - gain) < 1e-5f && b->layer.post_norm[4] == post);
  assert_true(change(b) < 1e-4);
  qtr_layer_smooth_input(&b->layer, true, s);
  assert_true(fabsf(b->layer.post_norm[4] * s[4] - post) < 1e-5f);
  assert_true(change(b) < 1e-4);
}

static void test_reorder(void **state) {
  struct bench *b = *state;
  struct qtr_error err;
  size_t index[INNER];
  uint64_t random = 8;
  float up = b->layer.m[QTR_UP].bias[0];
  for (size_t i = 0; i < INNER; i++) index[i] = i;
  for (size_t i = INNER; i > 1; i--) {
    size_t k = (size_t)qtr_random_below(&random, i), t = index[k];
    index[k] = index[i - 1];
    index[i - 1] = t;
  }
  must(qtr_layer_reorder(&b->layer, index, &err), &err);
  for (size_t i = 0; i < INNER; i++) {
    if (index[i] == 0) assert_true(b->layer.m[QTR_UP].bias[i] == up);
  }
  assert_true(change(b) < 1e-5);
}

/* Everything, in the order of the pipeline. */
static void test_all(void **state) {
  struct bench *b = *state;
  struct qtr_error err;
  struct qtr_rotation rotation;
  float s[INNER];
  must(qtr_rotation_create(DIM, &rotation, &err), &err);
  qtr_layer_fold_norms(&b->layer);
  must(qtr_layer_rotate_heads(b->team, &b->layer, &rotation, &err), &err);
  factors(s, KV_HEADS * DIM, 1);
  for (size_t i = 0; i < KV_HEADS * DIM; i++) s[i] = s[i / DIM * DIM + i % (DIM / 2)];
  qtr_layer_smooth_keys(&b->layer, s);
  factors(s, KV_HEADS * DIM, 2);
  qtr_layer_smooth_out(&b->layer, s);
  factors(s, INNER, 3);
  qtr_layer_smooth_down(&b->layer, s);
  size_t index[INNER];
  for (size_t i = 0; i < INNER; i++) index[i] = INNER - 1 - i;
  must(qtr_layer_reorder(&b->layer, index, &err), &err);
  assert_true(change(b) < 1e-3);
  qtr_rotation_free(&rotation);
}

/* What calibration is shown is what the matrices get. */
struct seen {
  const struct bench *b;
  float *normed;
  size_t n_seen, wide[QTR_SEE_MIDDLE + 1];
};

static void see(void *user, enum qtr_site site, const float *x, size_t n_tokens, size_t n_in) {
  struct seen *s = user;
  assert_int_equal(n_tokens, LENGTH);
  s->wide[site] = n_in;
  s->n_seen++;
  if (site != QTR_SITE_QKV) return;
  qtr_normalise(s->b->x, s->b->layer.input_norm, s->b->config.rms_norm_eps, LENGTH, HIDDEN, s->normed);
  assert_memory_equal(x, s->normed, LENGTH * HIDDEN * sizeof *x);
}

static void test_seen(void **state) {
  struct bench *b = *state;
  struct qtr_error err;
  struct seen s = {.b = b, .normed = malloc(LENGTH * HIDDEN * sizeof(float))};
  float *x = malloc(LENGTH * HIDDEN * sizeof *x);
  assert_true(s.normed && x);
  memcpy(x, b->x, LENGTH * HIDDEN * sizeof *x);
  must(qtr_runner_run(&b->runner, &b->layer, x, see, &s, &err), &err);
  assert_memory_equal(x, b->before, LENGTH * HIDDEN * sizeof *x); /* looking changes nothing */
  assert_int_equal(s.n_seen, 6);
  assert_int_equal(s.wide[QTR_SITE_O], HEADS * DIM);
  assert_int_equal(s.wide[QTR_SITE_GATE_UP], HIDDEN);
  assert_int_equal(s.wide[QTR_SITE_DOWN], INNER);
  assert_int_equal(s.wide[QTR_SEE_ROPE], (HEADS + 2 * KV_HEADS) * DIM);
  free(s.normed);
  free(x);
}

/* ---- the grid of the keys -------------------------------------------------------------------------- */

enum { POINTS = 5, SAMPLES = 2 };

struct outputs {
  float *out; /* (SAMPLES, LENGTH, HEADS * DIM) */
  size_t n;
};

static void keep_outputs(void *user, enum qtr_site site, const float *x, size_t n_tokens, size_t n_in) {
  struct outputs *o = user;
  if (site != QTR_SITE_O) return;
  memcpy(o->out + o->n, x, n_tokens * n_in * sizeof *x);
  o->n += n_tokens * n_in;
}

/* What attention gives on the samples x in that runner. */
static void attend(struct qtr_runner *runner, const struct qtr_float_layer *layer, const float *x, float *out) {
  struct qtr_error err;
  struct outputs o = {.out = out};
  float *scratch = malloc(LENGTH * HIDDEN * sizeof *scratch);
  assert_non_null(scratch);
  must(qtr_runner_set(runner, layer, &err), &err);
  for (size_t i = 0; i < SAMPLES; i++) {
    memcpy(scratch, x + i * LENGTH * HIDDEN, LENGTH * HIDDEN * sizeof *x);
    must(qtr_runner_run(runner, layer, scratch, keep_outputs, &o, &err), &err);
  }
  free(scratch);
}

/* The point that the grid of SmoothAttention chooses is the best when layers with smoothed weights are run as a whole. */
static void test_key_grid(void **state) {
  struct bench *b = *state;
  struct qtr_error err;
  struct qtr_runner quantised;
  struct qtr_observed observed;
  enum { KV = KV_HEADS * DIM, N = SAMPLES * LENGTH * HEADS * DIM };
  float *x = malloc(SAMPLES * LENGTH * HIDDEN * sizeof *x), *want = malloc(N * sizeof *want), *got = malloc(N * sizeof *got);
  float s[KV], k_max[KV], q_max[KV] = {0}, uneven[KV], alpha, beta;
  assert_true(x && want && got);
  for (size_t i = 0; i < SAMPLES * LENGTH * HIDDEN; i++) x[i] = b->x[i % (LENGTH * HIDDEN)] * (i < LENGTH * HIDDEN ? 1 : -2);
  for (size_t i = 0; i < KV; i++) uneven[i] = i % (DIM / 2) == 3 ? 1 / 16.0f : 1; /* outliers among the keys */
  qtr_layer_smooth_keys(&b->layer, uneven);
  must(qtr_runner_open(&b->config, QTR_KV_INT4, LENGTH, 2, &quantised, &err), &err);
  must(qtr_observed_create(b->team, &b->config, false, SAMPLES, SAMPLES, &observed, &err), &err);
  must(qtr_runner_set(&b->runner, &b->layer, &err), &err);
  for (size_t i = 0; i < SAMPLES; i++) {
    memcpy(got, x + i * LENGTH * HIDDEN, LENGTH * HIDDEN * sizeof *x);
    must(qtr_runner_run(&b->runner, &b->layer, got, qtr_observed_see, &observed, &err), &err);
  }
  const struct qtr_smooth_options grid = {.mode = QTR_SMOOTH_GRID};
  must(qtr_smooth_keys(&grid, POINTS, &observed, &b->layer, &b->runner, &quantised, x, SAMPLES, s, &alpha, &beta, &err),
       &err);

  attend(&b->runner, &b->layer, x, want);
  memcpy(k_max, observed.max_k, sizeof k_max);
  for (size_t i = 0; i < HEADS * DIM; i++) {
    float *at = &q_max[i / DIM / (HEADS / KV_HEADS) * DIM + i % DIM];
    *at = fmaxf(*at, observed.max_q[i]);
  }
  qtr_smooth_tie_pairs(k_max, KV_HEADS, DIM);
  qtr_smooth_tie_pairs(q_max, KV_HEADS, DIM);
  double best = INFINITY, plain = 0, chosen = INFINITY;
  for (int i = 0; i < 2 * POINTS - 1; i++) {
    float f[KV], back[KV], a = (float)((i + 1) / 2) / POINTS, c = i > 0 && i % 2 == 0 ? 1 - a : 0;
    qtr_smooth_factors(k_max, q_max, a, c, KV, f);
    for (size_t k = 0; k < KV; k++) back[k] = 1 / f[k];
    qtr_layer_smooth_keys(&b->layer, f);
    attend(&quantised, &b->layer, x, got);
    qtr_layer_smooth_keys(&b->layer, back);
    double error = 0;
    for (size_t k = 0; k < N; k++) error += ((double)got[k] - (double)want[k]) * ((double)got[k] - (double)want[k]);
    best = fmin(best, error);
    if (i == 0) plain = error;
    if (fabsf(a - alpha) > 1e-6f || fabsf(c - beta) > 1e-6f) continue;
    chosen = error;
    assert_memory_equal(s, f, sizeof f);
  }
  print_message("alpha %g, beta %g: %.3f of the error without\n", (double)alpha, (double)beta, chosen / plain);
  assert_true(chosen <= best * 1.01 && chosen < 0.5 * plain);
  qtr_observed_free(&observed);
  qtr_runner_close(&quantised);
  free(x);
  free(want);
  free(got);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test_setup_teardown(test_key_grid, read_layer, drop_layer),
                                     cmocka_unit_test_setup_teardown(test_fold, read_layer, drop_layer),
                                     cmocka_unit_test_setup_teardown(test_rotate, read_layer, drop_layer),
                                     cmocka_unit_test_setup_teardown(test_rotate_heads, read_layer, drop_layer),
                                     cmocka_unit_test_setup_teardown(test_smooth_keys, read_layer, drop_layer),
                                     cmocka_unit_test_setup_teardown(test_smooth_out, read_layer, drop_layer),
                                     cmocka_unit_test_setup_teardown(test_smooth_down, read_layer, drop_layer),
                                     cmocka_unit_test_setup_teardown(test_smooth_input, read_layer, drop_layer),
                                     cmocka_unit_test_setup_teardown(test_reorder, read_layer, drop_layer),
                                     cmocka_unit_test_setup_teardown(test_all, read_layer, drop_layer),
                                     cmocka_unit_test_setup_teardown(test_seen, read_layer, drop_layer)};
  return cmocka_run_group_tests(tests, open_bench, close_bench);
}
