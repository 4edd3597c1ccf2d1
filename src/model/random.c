/* random.c - a model of any shape with random weights, for benchmarks: made matrix by matrix in the disk's layout and handed
 * to the backend as a file's would be. Every matrix keeps the variance of its input (rows of variance 1/n_in); what is added
 * to the residual stream is smaller by sqrt(2 * layers): activations stay in the range of a trained model's. */
#include "base/checked.h"
#include "base/half.h"
#include "base/progress.h"
#include "base/status.h"
#include "model/model_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct maker {
  struct qtr_model *model;
  struct qtr_backend *b;
  uint64_t state;
  struct qtr_error *err;
};

static uint64_t next_random(uint64_t *state) { /* xorshift64* */
  uint64_t x = *state;
  x ^= x >> 12;
  x ^= x << 25;
  x ^= x >> 27;
  *state = x;
  return x * 0x2545f4914f6cdd1dull;
}

static void fill_bytes(struct maker *m, void *out, size_t n) {
  uint8_t *p = out;
  for (; n >= 8; n -= 8, p += 8) {
    uint64_t r = next_random(&m->state);
    memcpy(p, &r, 8);
  }
  uint64_t r = next_random(&m->state);
  memcpy(p, &r, n);
}

/* Uniform in +-sqrt(3) * std. */
static float uniform(struct maker *m, float std) {
  return ((float)(next_random(&m->state) >> 40) * 0x1p-23f - 1.0f) * 1.7320508f * std;
}

/* Fills one part of n_out rows. The standard deviations of uniform codes are sqrt((levels^2 - 1)/12): 4.61 of 16, 73.9 of
 * 256; of codes less a zero point of 7 or 8, whichever, 4.64. Weights must be zero in the mean, for a mean that all rows
 * share makes activations of one value, layer by layer more (tests/unit/test_model_random.c). */
static enum qtr_status make_part(struct maker *m, enum qtr_linear_format format, size_t n_out, size_t n_in, float gain,
                                 struct qtr_linear_part *part, void **owned) {
  float std = gain / sqrtf((float)n_in);
  size_t n = n_out * n_in, n_groups = n_in / QTR_GROUP;
  bool grouped = format == QTR_LINEAR_W4A8_G128, int4 = grouped || format == QTR_LINEAR_W4A8;
  size_t weight_bytes = int4 ? n / 2 : format == QTR_LINEAR_W8A8 ? n : format == QTR_LINEAR_F32 ? 4 * n : 2 * n;
  size_t s2_bytes = grouped ? qtr_round_up(n_groups * n_out, 4) : 0;
  weight_bytes = qtr_round_up(weight_bytes, 4);
  uint8_t *block = malloc(weight_bytes + 2 * s2_bytes + 2 * n_out * sizeof(float));
  *owned = block;
  if (!block) return qtr_fail_memory(m->err, "random weights", weight_bytes);
  float *scale = (float *)(void *)(block + weight_bytes + 2 * s2_bytes), *szero = scale + n_out;
  *part = (struct qtr_linear_part){.n_out = n_out, .weight = block, .scale = scale, .szero = szero};
  if (int4 || format == QTR_LINEAR_W8A8) {
    fill_bytes(m, block, weight_bytes);
    for (size_t i = 0; i < n_out; i++) {
      scale[i] = qtr_f16_round(std / (grouped ? 4.64f * 11.73f : int4 ? 4.61f : 73.9f));
      szero[i] = qtr_f16_round(7.5f * scale[i]);
    }
    if (grouped) { /* second-level scales 8…15, their root mean square 11.73; zero points 7 and 8: |(q - z) * s2| <= 120 */
      uint8_t *s2 = block + weight_bytes, *zero = s2 + s2_bytes;
      fill_bytes(m, s2, s2_bytes);
      for (size_t i = 0; i < s2_bytes; i++) {
        uint32_t z = 7 + (s2[i] >> 7);
        s2[i] = (uint8_t)(8 + s2[i] % 8);
        zero[i] = (uint8_t)(0u - z * s2[i]);
      }
      part->s2_scale = s2;
      part->s2_zero = zero;
    }
  } else {
    for (size_t i = 0; i < n; i++) {
      float x = uniform(m, std);
      uint16_t half = format == QTR_LINEAR_F16 ? qtr_f16_from_f32(x) : qtr_bf16_from_f32(x);
      if (format == QTR_LINEAR_F32)
        memcpy(block + 4 * i, &x, 4);
      else
        memcpy(block + 2 * i, &half, 2);
    }
  }
  return QTR_OK;
}

static enum qtr_status make_linear(struct maker *m, enum qtr_linear_format format, const size_t *n_out, size_t n_parts,
                                   size_t n_in, float gain, bool gate_up, bool bias, struct qtr_linear **linear) {
  struct qtr_linear_source source = {.format = format, .n_in = n_in, .n_parts = n_parts, .gate_up = gate_up};
  void *owned[QTR_MAX_PARTS] = {NULL};
  float *biases[QTR_MAX_PARTS] = {NULL};
  enum qtr_status status = QTR_OK;
  bool int4 = format == QTR_LINEAR_W4A8 || format == QTR_LINEAR_W4A8_G128;
  if (int4 && n_in % (format == QTR_LINEAR_W4A8 ? 32 : QTR_GROUP)) {
    return qtr_fail(m->err, QTR_ERR_ARGUMENT, "%zu input channels cannot be packed as %s", n_in,
                    qtr_linear_format_name(format));
  }
  for (size_t i = 0; i < n_parts && !status; i++) {
    if (int4 && n_out[i] % 32) {
      status = qtr_fail(m->err, QTR_ERR_ARGUMENT, "%zu output channels cannot be packed in 4 bits: not a multiple of 32",
                        n_out[i]);
      break;
    }
    status = make_part(m, format, n_out[i], n_in, gain, &source.part[i], &owned[i]);
    if (!status && bias) {
      biases[i] = malloc(n_out[i] * sizeof(float));
      if (!biases[i]) status = qtr_fail_memory(m->err, "a bias", n_out[i] * sizeof(float));
      for (size_t k = 0; !status && k < n_out[i]; k++) biases[i][k] = qtr_f16_round(uniform(m, 0.1f));
      source.part[i].bias = biases[i];
    }
  }
  if (!status) status = m->b->ops->linear_create(m->b, &source, linear, m->err);
  if (!status) m->model->weight_bytes += m->b->ops->linear_bytes(*linear);
  for (size_t i = 0; i < n_parts; i++) {
    free(owned[i]);
    free(biases[i]);
  }
  return status;
}

static enum qtr_status make_norm(struct maker *m, void **device) {
  size_t n = (size_t)m->model->config.hidden_size;
  float *ones = malloc(n * sizeof *ones);
  if (!ones) return qtr_fail_memory(m->err, "a norm", n * sizeof *ones);
  for (size_t i = 0; i < n; i++) ones[i] = 1.0f;
  enum qtr_status status = m->b->ops->upload_floats(m->b, ones, n, device, m->err);
  free(ones);
  return status;
}

/* fp16, or int8 with one scale a row. */
static enum qtr_status make_embedding(struct maker *m, bool int8) {
  struct qtr_model *model = m->model;
  size_t rows = (size_t)model->config.vocab_size, dim = (size_t)model->config.hidden_size, n = rows * dim;
  size_t n_bytes = n * (int8 ? 1 : sizeof(uint16_t));
  model->random_embed = malloc(n_bytes);
  if (!model->random_embed) return qtr_fail_memory(m->err, "a random embedding", n_bytes);
  if (int8) {
    fill_bytes(m, model->random_embed, n_bytes);
    model->embed_scale = malloc(rows * sizeof(float));
    if (!model->embed_scale) return qtr_fail_memory(m->err, "embedding scales", rows * sizeof(float));
    for (size_t i = 0; i < rows; i++) model->embed_scale[i] = 1.0f / 73.9f;
  } else {
    uint16_t *half = model->random_embed;
    for (size_t i = 0; i < n; i++) half[i] = qtr_f16_from_f32(uniform(m, 1.0f));
  }
  const struct qtr_table_source source = {.dtype = int8 ? QTR_DTYPE_I8 : QTR_DTYPE_F16,
                                          .n_rows = rows,
                                          .dim = dim,
                                          .data = model->random_embed,
                                          .scale = model->embed_scale};
  model->weight_bytes += n_bytes;
  return m->b->ops->table_create(m->b, &source, &model->embed, m->err);
}

static enum qtr_status make_layer(struct maker *m, struct qtr_layer *layer) {
  const struct qtr_config *c = &m->model->config;
  enum qtr_linear_format format = m->model->format;
  size_t hidden = (size_t)c->hidden_size, inner = (size_t)c->intermediate_size, d = (size_t)c->head_dim;
  size_t q = (size_t)c->n_heads * d, kv = (size_t)c->n_kv_heads * d;
  const size_t qkv_out[3] = {q, kv, kv}, gate_up_out[2] = {inner, inner}, hidden_out[1] = {hidden};
  float residual = 1.0f / sqrtf(2.0f * (float)c->n_layers);
  enum qtr_status status;
  if ((status = make_norm(m, &layer->input_norm)) || (status = make_norm(m, &layer->post_norm))) return status;
  if ((status = make_linear(m, format, qkv_out, 3, hidden, 1, false, c->qkv_bias, &layer->qkv))) return status;
  if ((status = make_linear(m, format, hidden_out, 1, q, residual, false, c->o_bias, &layer->o))) return status;
  if ((status = make_linear(m, format, gate_up_out, 2, hidden, 1, true, c->mlp_bias, &layer->gate_up))) return status;
  return make_linear(m, format, hidden_out, 1, inner, residual, false, c->mlp_bias, &layer->down);
}

enum qtr_status qtr_model_random(const struct qtr_config *config, enum qtr_linear_format format, bool head_int8,
                                 uint64_t seed, struct qtr_backend *backend, const struct qtr_model_options *options,
                                 struct qtr_model **model, struct qtr_error *err) {
  struct qtr_model *made;
  *model = NULL;
  enum qtr_status status = qtr_model_create(config, backend, options, &made, err);
  if (status) return status;
  made->format = format;
  bool plain = format <= QTR_LINEAR_BF16;
  made->head_format = head_int8 ? QTR_LINEAR_W8A8 : plain ? format : QTR_LINEAR_F16;
  struct maker m = {.model = made, .b = backend, .state = seed * 0x9e3779b97f4a7c15ull | 1, .err = err};
  struct qtr_progress progress;
  qtr_progress_start(&progress, "making random weights", (size_t)config->n_layers + 2, options->quiet);
  status = make_embedding(&m, head_int8);
  for (int32_t i = 0; i < config->n_layers && !status; i++) {
    status = make_layer(&m, &made->layer[i]);
    qtr_progress_update(&progress, (size_t)i + 1);
  }
  const size_t vocab[1] = {(size_t)config->vocab_size};
  if (!status) status = make_norm(&m, &made->final_norm);
  if (!status) {
    status = make_linear(&m, made->head_format, vocab, 1, (size_t)config->hidden_size, 1, false, false, &made->head);
  }
  qtr_progress_end(&progress);
  if (status) {
    qtr_model_free(made);
    return status;
  }
  *model = made;
  return QTR_OK;
}
