/* The transformations of QoQ leave a whole model as it is: a small random one (grouped heads, biases, tied and untied) goes
 * through quantize with precision w16a16 and weights kept in F32, and gives the logits that it gave before, by a forward
 * pass of its own in double: in the engine's, keys and values are rounded to fp16, and other ones are rounded otherwise. */
#include "base/checked.h"
#include "quant/quantize.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

#include "quant_fixture.h"

enum { N = 48 };

static void must(enum qtr_status status, const struct qtr_error *err) {
  if (status) fail_msg("%s: %s", qtr_status_name(status), err->message);
}

static int32_t token_at(int32_t i) { return (i * 997 + 5) % FIXTURE_VOCAB; }

/* Logits of N fixed tokens by the engine: (N, vocab), malloc'ed. */
static double *logits_of(const char *dir, const char *device) {
  struct qtr_error err;
  struct qtr_backend *b;
  struct qtr_model *model;
  struct qtr_kv *kv;
  struct qtr_workspace *workspace;
  const struct qtr_backend_options options = {.threads = 2};
  const struct qtr_model_options model_options = {.quiet = true};
  must(qtr_backend_open(device, &options, &b, &err), &err);
  must(qtr_model_load(dir, b, &model_options, &model, &err), &err);
  const struct qtr_kv_config config = {.format = QTR_KV_F16,
                                       .n_layers = model->config.n_layers,
                                       .n_kv_heads = model->config.n_kv_heads,
                                       .head_dim = model->config.head_dim,
                                       .n_pages = 1};
  must(b->ops->kv_create(b, &config, &kv, &err), &err);
  must(qtr_workspace_create(model, N, N, &workspace, &err), &err);
  int32_t token[N], position[N], row[N], q_start[2] = {0, N}, zero = 0;
  for (int32_t i = 0; i < N; i++) {
    token[i] = token_at(i);
    position[i] = row[i] = i;
  }
  const struct qtr_batch batch = {.n_tokens = N,
                                  .n_seqs = 1,
                                  .n_logit_rows = N,
                                  .max_blocks = 1,
                                  .token = token,
                                  .position = position,
                                  .q_start = q_start,
                                  .kv_len = &zero,
                                  .block_table = &zero,
                                  .logit_row = row};
  const float *logits;
  float *x = malloc((size_t)N * FIXTURE_VOCAB * sizeof *x);
  double *out = malloc((size_t)N * FIXTURE_VOCAB * sizeof *out);
  assert_true(x && out);
  must(qtr_model_forward(model, kv, workspace, &batch, &logits, &err), &err);
  must(b->ops->download(b, logits, QTR_DTYPE_F32, (size_t)N * FIXTURE_VOCAB, x, &err), &err);
  for (size_t i = 0; i < (size_t)N * FIXTURE_VOCAB; i++) out[i] = (double)x[i];
  free(x);
  qtr_workspace_free(workspace);
  b->ops->kv_free(b, kv);
  qtr_model_free(model);
  qtr_backend_close(b);
  return out;
}

static const float *tensor_of(struct qtr_checkpoint *checkpoint, const char *name) {
  const struct qtr_tensor *t = qtr_checkpoint_find(checkpoint, name);
  if (!t || t->dtype != QTR_DTYPE_F32) fail_msg("no F32 tensor %s", name);
  return t ? (const float *)t->data : NULL;
}

/* ---- Llama in double ----------------------------------------------------------------------------- */

/* y (N, n_out) = x (N, n_in) Wᵀ + b, by tensor name. Malloc'ed. */
static double *linear(struct qtr_checkpoint *c, const char *name, const double *x, size_t n_out, size_t n_in) {
  char full[160];
  (void)snprintf(full, sizeof full, "%s.weight", name);
  const float *w = tensor_of(c, full), *bias = NULL;
  (void)snprintf(full, sizeof full, "%s.bias", name);
  if (qtr_checkpoint_find(c, full)) bias = tensor_of(c, full);
  double *y = malloc(N * n_out * sizeof *y);
  assert_non_null(y);
  for (size_t t = 0; t < N; t++) {
    for (size_t r = 0; r < n_out; r++) {
      double sum = bias ? (double)bias[r] : 0;
      for (size_t i = 0; i < n_in; i++) sum += (double)w[r * n_in + i] * x[t * n_in + i];
      y[t * n_out + r] = sum;
    }
  }
  return y;
}

static void normalise(struct qtr_checkpoint *c, const char *name, const double *x, size_t n, double *out) {
  const float *gain = tensor_of(c, name);
  for (size_t t = 0; t < N; t++) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += x[t * n + i] * x[t * n + i];
    for (size_t i = 0; i < n; i++) out[t * n + i] = x[t * n + i] / sqrt(sum / (double)n + 1e-5) * (double)gain[i];
  }
}

/* x: (N, n_heads, d), positions 0 … N-1 */
static void rope(double *x, size_t n_heads, size_t d) {
  for (size_t t = 0; t < N * n_heads; t++, x += d) {
    for (size_t i = 0; i < d / 2; i++) {
      double angle = (double)(t / n_heads) * pow(10000, -2.0 * (double)i / (double)d), a = x[i], b = x[i + d / 2];
      x[i] = a * cos(angle) - b * sin(angle);
      x[i + d / 2] = b * cos(angle) + a * sin(angle);
    }
  }
}

/* out: (N, n_heads, d) */
static void attend(const struct fixture_shape *s, const double *q, const double *k, const double *v, double *out) {
  size_t d = s->head_dim, group = s->n_heads / s->n_kv_heads;
  for (size_t t = 0; t < N; t++) {
    for (size_t h = 0; h < s->n_heads; h++) {
      double p[N], sum = 0, *y = out + (t * s->n_heads + h) * d, largest = -INFINITY;
      for (size_t u = 0; u <= t; u++) {
        p[u] = 0;
        for (size_t i = 0; i < d; i++) {
          p[u] += q[(t * s->n_heads + h) * d + i] * k[(u * s->n_kv_heads + h / group) * d + i] / sqrt((double)d);
        }
        largest = fmax(largest, p[u]);
      }
      for (size_t u = 0; u <= t; u++) sum += p[u] = exp(p[u] - largest);
      for (size_t i = 0; i < d; i++) {
        y[i] = 0;
        for (size_t u = 0; u <= t; u++) y[i] += p[u] / sum * v[(u * s->n_kv_heads + h / group) * d + i];
      }
    }
  }
}

static double *oracle(const char *dir, const struct fixture_shape *s) {
  struct qtr_error err;
  struct qtr_checkpoint *c;
  must(qtr_checkpoint_open(dir, &c, &err), &err);
  size_t h = s->hidden, q_width = s->n_heads * s->head_dim, kv = s->n_kv_heads * s->head_dim;
  double *x = malloc(N * h * sizeof *x), *normed = malloc(N * h * sizeof *normed), *heads = malloc(N * q_width * sizeof *x);
  assert_true(x && normed && heads);
  const float *embed = tensor_of(c, "model.embed_tokens.weight");
  for (size_t i = 0; i < N * h; i++) x[i] = (double)embed[(size_t)token_at((int32_t)(i / h)) * h + i % h];
  for (size_t l = 0; l < s->n_layers; l++) {
    char name[8][128];
    static const char *const parts[] = {"input_layernorm.weight", "post_attention_layernorm.weight",
                                        "self_attn.q_proj",       "self_attn.k_proj",
                                        "self_attn.v_proj",       "self_attn.o_proj",
                                        "mlp.gate_proj",          "mlp.up_proj"};
    for (size_t i = 0; i < 8; i++) (void)snprintf(name[i], sizeof name[i], "model.layers.%zu.%s", l, parts[i]);
    normalise(c, name[0], x, h, normed);
    double *q = linear(c, name[2], normed, q_width, h), *k = linear(c, name[3], normed, kv, h);
    double *v = linear(c, name[4], normed, kv, h);
    rope(q, s->n_heads, s->head_dim);
    rope(k, s->n_kv_heads, s->head_dim);
    attend(s, q, k, v, heads);
    double *o = linear(c, name[5], heads, h, q_width);
    for (size_t i = 0; i < N * h; i++) x[i] += o[i];
    normalise(c, name[1], x, h, normed);
    double *gate = linear(c, name[6], normed, s->inner, h), *up = linear(c, name[7], normed, s->inner, h);
    for (size_t i = 0; i < N * s->inner; i++) up[i] *= gate[i] / (1 + exp(-gate[i]));
    (void)snprintf(name[0], sizeof name[0], "model.layers.%zu.mlp.down_proj", l);
    double *down = linear(c, name[0], up, h, s->inner);
    for (size_t i = 0; i < N * h; i++) x[i] += down[i];
    double *const all[] = {q, k, v, o, gate, up, down};
    for (size_t i = 0; i < 7; i++) free(all[i]);
  }
  normalise(c, "model.norm.weight", x, h, normed);
  double *logits =
      linear(c, qtr_checkpoint_find(c, "lm_head.weight") ? "lm_head" : "model.embed_tokens", normed, FIXTURE_VOCAB, h);
  qtr_checkpoint_close(c);
  free(x);
  free(normed);
  free(heads);
  return logits;
}

/* Largest difference relative to the largest logit. */
static double distance(const double *got, const double *want) {
  double worst = 0, largest = 0;
  for (size_t i = 0; i < (size_t)N * FIXTURE_VOCAB; i++) {
    double difference = fabs(got[i] - want[i]);
    if (!(difference <= worst)) worst = difference; /* NaN counts */
    largest = fmax(largest, fabs(want[i]));
  }
  return worst / largest;
}

/* ---- the quantiser ------------------------------------------------------------------------------- */

static void check_model(const struct fixture_shape *shape, bool rotate) {
  struct qtr_error err;
  char *root = fixture_make_root(), source[64], out[64], work[96];
  assert_non_null(root);
  (void)snprintf(source, sizeof source, "%s/source", root);
  (void)snprintf(out, sizeof out, "%s/out", root);
  (void)snprintf(work, sizeof work, "%s/.calibration", out);
  char command[128];
  (void)snprintf(command, sizeof command, "mkdir '%s'", source);
  assert_int_equal(system(command), 0);
  assert_true(fixture_write_model(shape, source));

  struct qtr_quantize_options options;
  struct qtr_quantize_summary summary;
  qtr_quantize_options_init(&options);
  must(qtr_precision_parse("w16a16", &options.precision, &err), &err);
  const struct qtr_qoq_options qoq = {
      .calibration = QTR_SOURCE_DIR "/docs/architecture.md",
      .n_samples = 4,
      .length = 64,
      .seed = 1,
      .rotate = rotate,
      .rotate_heads = true,
      .reorder = true,
      .n_grid = 5,
      .damp = 0.01f,
      .keys = {.mode = QTR_SMOOTH_MANUAL, .alpha = 0.5f},
      .down = {.mode = QTR_SMOOTH_MANUAL, .alpha = 0.5f, .beta = 0.5f},
      .out = {.mode = QTR_SMOOTH_MANUAL, .alpha = 0.3f, .beta = 0.7f},
      .input = {.mode = rotate ? QTR_SMOOTH_OFF : QTR_SMOOTH_MANUAL, .alpha = 0.5f, .beta = 0.5f},
      .keep_float32 = true};
  options.model_dir = source;
  options.output_dir = out;
  options.method = "qoq";
  options.qoq = &qoq;
  options.threads = 2;
  options.quiet = true;
  must(qtr_quantize(&options, NULL, NULL, &summary, &err), &err);
  assert_false(qtr_file_exists(work)); /* the work directory goes when the model is there */

  struct qtr_checkpoint *before, *after;
  must(qtr_checkpoint_open(source, &before, &err), &err);
  must(qtr_checkpoint_open(out, &after, &err), &err);
  static const char *const changed[] = {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight",
                                        "model.layers.0.self_attn.v_proj.weight", "model.layers.1.self_attn.o_proj.weight",
                                        "model.layers.0.mlp.up_proj.weight",      "model.layers.1.mlp.down_proj.weight",
                                        "model.layers.1.input_layernorm.weight"};
  for (size_t i = 0; i < sizeof changed / sizeof changed[0]; i++) {
    if (fabsf(tensor_of(before, changed[i])[7] - tensor_of(after, changed[i])[7]) < 1e-6f)
      fail_msg("%s is what it was", changed[i]);
  }
  assert_true((tensor_of(after, "model.norm.weight")[5] == 1) == rotate);
  assert_non_null(qtr_checkpoint_find(after, "lm_head.weight")); /* also of a tied model: rotated, it has the norm in it */
  qtr_checkpoint_close(before);
  qtr_checkpoint_close(after);

  double *want = oracle(source, shape), *got = oracle(out, shape), exact = distance(got, want);
  print_message("largest difference %.2e of the largest logit\n", exact);
  if (!(exact <= 1e-5)) fail_msg("the logits changed by %g", exact);
  static const char *const devices[] = {"reference", "cpu"}; /* loads in the engine, and does the same there */
  for (size_t d = 0; d < 2; d++) {
    double *engine = logits_of(out, devices[d]), error = distance(engine, want);
    print_message("%s: %.2e\n", devices[d], error);
    if (!(error <= 5e-3)) fail_msg("the logits on %s are off by %g", devices[d], error);
    free(engine);
  }
  free(want);
  free(got);
  fixture_remove(root);
}

static const struct fixture_shape untied = {
    .hidden = 96, .inner = 160, .n_layers = 2, .n_heads = 6, .n_kv_heads = 2, .head_dim = 32, .qkv_bias = true, .seed = 3};

static void test_untied(void **state) {
  (void)state;
  check_model(&untied, true);
}

static void test_tied(void **state) {
  (void)state;
  struct fixture_shape shape = untied;
  shape.tied = true;
  shape.qkv_bias = false;
  shape.hidden = 128;
  check_model(&shape, true);
}

static void test_smooth_inputs(void **state) {
  (void)state;
  struct fixture_shape shape = untied;
  check_model(&shape, false);
  shape.tied = true;
  check_model(&shape, false);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_untied), cmocka_unit_test(test_tied),
                                     cmocka_unit_test(test_smooth_inputs)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
