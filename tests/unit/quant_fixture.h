/* quant_fixture.h - random models for the tests of the quantiser: a directory with config.json, safetensors (F32 unless
 * said) and the demo model's tokenizer. */
#ifndef QTR_TESTS_QUANT_FIXTURE_H
#define QTR_TESTS_QUANT_FIXTURE_H

#include "base/file.h"
#include "base/half.h"
#include "base/random.h"
#include "checkpoint/safetensors_write.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct fixture_shape {
  size_t hidden, inner, n_layers, n_heads, n_kv_heads, head_dim;
  bool tied, qkv_bias, bf16;
  uint64_t seed;
};
enum { FIXTURE_VOCAB = 8192 }; /* of the demo tokenizer */

static inline float fixture_uniform(uint64_t *random) {
  return (float)((double)(qtr_random_next(random) >> 11) * 0x1p-52 - 1);
}

/* A new directory under the current one, and its removal. */
static inline char *fixture_make_root(void) {
  char *root = strdup("qtr-fixture-XXXXXX");
  return root && mkdtemp(root) ? root : NULL;
}
static inline void fixture_remove(char *root) {
  char command[512];
  (void)snprintf(command, sizeof command, "rm -r '%s'", root);
  if (system(command)) (void)fprintf(stderr, "cannot remove %s\n", root);
  free(root);
}

static inline bool fixture_copy(const char *from, const char *dir, const char *name) {
  char *source = qtr_path_join(from, name), *path = qtr_path_join(dir, name), *text = NULL;
  size_t len = 0;
  bool ok = source && path && qtr_file_read(source, (size_t)1 << 26, &text, &len, NULL) == QTR_OK &&
            qtr_file_write(path, text, len, NULL) == QTR_OK;
  free(text);
  free(source);
  free(path);
  return ok;
}

static inline bool fixture_write_tokenizer(const char *dir) {
  return fixture_copy(QTR_SOURCE_DIR "/models/demo", dir, "tokenizer.json") &&
         fixture_copy(QTR_SOURCE_DIR "/models/demo", dir, "tokenizer_config.json");
}

/* One tensor more: name, shape, and how large its values are; gains lie around 1, with some large ones. */
enum { FIXTURE_TENSORS = 1024 };
struct fixture_tensors {
  struct qtr_st_entry entry[FIXTURE_TENSORS];
  float scale[FIXTURE_TENSORS], centre[FIXTURE_TENSORS];
  enum qtr_dtype dtype;
  size_t n;
};
static inline void fixture_add(struct fixture_tensors *t, int layer, const char *name, size_t d0, size_t d1, double scale,
                               double centre) {
  struct qtr_st_entry *e = &t->entry[t->n];
  *e = (struct qtr_st_entry){.dtype = t->dtype, .n_dims = d1 ? 2 : 1, .shape = {d0, d1}};
  if (layer >= 0)
    (void)snprintf(e->name, sizeof e->name, "model.layers.%d.%s", layer, name);
  else
    (void)snprintf(e->name, sizeof e->name, "%s", name);
  t->scale[t->n] = (float)scale;
  t->centre[t->n++] = (float)centre;
}

/* model.safetensors of the shape. */
static inline bool fixture_write_tensors(const struct fixture_shape *s, const char *dir) {
  struct fixture_tensors *t = calloc(1, sizeof *t);
  if (!t || s->n_layers > (FIXTURE_TENSORS - 3) / 12) {
    free(t);
    return false;
  }
  t->dtype = s->bf16 ? QTR_DTYPE_BF16 : QTR_DTYPE_F32;
  size_t q = s->n_heads * s->head_dim, kv = s->n_kv_heads * s->head_dim, h = s->hidden, inner = s->inner;
  double of_hidden = 1.7 / sqrt((double)h), of_heads = 1.7 / sqrt((double)q), of_inner = 3 / sqrt((double)inner);
  fixture_add(t, -1, "model.embed_tokens.weight", FIXTURE_VOCAB, h, 1, 0);
  for (int i = 0; i < (int)s->n_layers; i++) {
    fixture_add(t, i, "self_attn.q_proj.weight", q, h, of_hidden, 0);
    fixture_add(t, i, "self_attn.k_proj.weight", kv, h, of_hidden, 0);
    fixture_add(t, i, "self_attn.v_proj.weight", kv, h, of_hidden, 0);
    if (s->qkv_bias) {
      fixture_add(t, i, "self_attn.q_proj.bias", q, 0, 1, 0);
      fixture_add(t, i, "self_attn.k_proj.bias", kv, 0, 1, 0);
      fixture_add(t, i, "self_attn.v_proj.bias", kv, 0, 1, 0);
    }
    fixture_add(t, i, "self_attn.o_proj.weight", h, q, of_heads, 0);
    fixture_add(t, i, "mlp.gate_proj.weight", inner, h, of_hidden, 0);
    fixture_add(t, i, "mlp.up_proj.weight", inner, h, of_hidden, 0);
    fixture_add(t, i, "mlp.down_proj.weight", h, inner, of_inner, 0);
    fixture_add(t, i, "input_layernorm.weight", h, 0, 0.5, 1);
    fixture_add(t, i, "post_attention_layernorm.weight", h, 0, 0.5, 1);
  }
  fixture_add(t, -1, "model.norm.weight", h, 0, 0.5, 1);
  if (!s->tied) fixture_add(t, -1, "lm_head.weight", FIXTURE_VOCAB, h, of_hidden, 0);
  char *path = qtr_path_join(dir, "model.safetensors");
  struct qtr_st_writer *writer = NULL;
  uint64_t random = s->seed;
  bool ok = path && qtr_st_create(path, t->entry, t->n, NULL, &writer, NULL) == QTR_OK;
  for (size_t i = 0; i < t->n && ok; i++) {
    size_t n = t->entry[i].shape[0] * (t->entry[i].n_dims == 2 ? t->entry[i].shape[1] : 1);
    float *x = malloc(n * sizeof *x);
    uint16_t *half = malloc(n * sizeof *half);
    ok = x && half;
    for (size_t k = 0; k < n && ok; k++) {
      x[k] = t->centre[i] + t->scale[i] * fixture_uniform(&random);
      if (t->centre[i] > 0 && k % 29 == 5) x[k] *= 6;
      half[k] = qtr_bf16_from_f32(x[k]);
    }
    ok = ok && qtr_st_write(writer, s->bf16 ? (const void *)half : x, n * qtr_dtype_bytes(t->dtype), NULL) == QTR_OK;
    free(half);
    free(x);
  }
  ok = ok && qtr_st_finish(writer, NULL) == QTR_OK;
  free(path);
  free(t);
  return ok;
}

/* The whole directory. */
static inline bool fixture_write_model(const struct fixture_shape *s, const char *dir) {
  char config[1024];
  (void)snprintf(config, sizeof config,
                 "{\"architectures\": [\"%s\"], \"hidden_size\": %zu, \"intermediate_size\": %zu, \"num_hidden_layers\": "
                 "%zu, \"num_attention_heads\": %zu, \"num_key_value_heads\": %zu, \"head_dim\": %zu, \"vocab_size\": %d, "
                 "\"max_position_embeddings\": 512, \"rms_norm_eps\": 1e-05, \"rope_theta\": 10000.0, "
                 "\"tie_word_embeddings\": %s, \"bos_token_id\": 0, \"eos_token_id\": 1}",
                 s->qkv_bias ? "Qwen2ForCausalLM" : "LlamaForCausalLM", s->hidden, s->inner, s->n_layers, s->n_heads,
                 s->n_kv_heads, s->head_dim, (int)FIXTURE_VOCAB, s->tied ? "true" : "false");
  char *path = qtr_path_join(dir, "config.json");
  bool ok = path && qtr_file_write(path, config, strlen(config), NULL) == QTR_OK && fixture_write_tokenizer(dir) &&
            fixture_write_tensors(s, dir);
  free(path);
  return ok;
}

#endif
