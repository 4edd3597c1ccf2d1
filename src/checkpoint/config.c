/* config.c - config.json and generation_config.json of Hugging Face directories (config.h; spec A.7, E).
 *
 * Knows three architectures: Llama (with Vicuna and Yi, which say "Llama"), Mistral and Qwen2 (Qwen1.5 says so too). A key
 * that is absent takes the default transformers gives that family; sizes must be there. What would change the numbers and is
 * not implemented (other rotary scalings, other activations, foreign quantisation) is refused by name. */
#include "checkpoint/config.h"

#include "base/file.h"
#include "base/status.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_CONFIG_BYTES (16u << 20)

/* Caps: far above any real model, and their products stay below 2^48 (layers x intermediate x hidden = 2^47). */
enum {
  MAX_HIDDEN = 1 << 17,
  MAX_INTERMEDIATE = 1 << 20,
  MAX_LAYERS = 1 << 10,
  MAX_HEADS = 1 << 10,
  MAX_HEAD_DIM = 1 << 10,
  MAX_VOCAB = 1 << 22,
  MAX_POSITION = 1 << 27
};

struct family {
  const char *architecture, *model_type;
  int32_t n_kv_heads; /* when absent; 0 = as many as heads */
  int32_t max_position;
  int32_t sliding_window; /* when absent */
  bool qkv_bias;          /* always has q, k and v biases */
  bool bias_key;          /* attention_bias and mlp_bias mean something */
};

static const struct family families[] = {
    {"LlamaForCausalLM", "llama", 0, 2048, 0, false, true},
    {"LLaMAForCausalLM", "llama", 0, 2048, 0, false, true}, /* conversions of the first weeks */
    {"MistralForCausalLM", "mistral", 8, 131072, 4096, false, false},
    {"Qwen2ForCausalLM", "qwen2", 0, 32768, 0, true, false},
};
#define N_FAMILIES (sizeof families / sizeof *families)

/* ---- typed access: absent and null are the same -------------------------------------------------- */

static const json_t *get(const json_t *object, const char *key) {
  const json_t *value = json_object_get(object, key);
  return value && !json_is_null(value) ? value : NULL;
}

/* A whole number in [min, max]; absent: `fallback`, or an error when that is negative. */
static enum qtr_status get_size(const json_t *object, const char *key, int32_t min, int32_t max, int32_t fallback,
                                int32_t *out, struct qtr_error *err) {
  const json_t *value = get(object, key);
  if (!value) {
    if (fallback < 0) return qtr_fail(err, QTR_ERR_FORMAT, "\"%s\" is missing", key);
    *out = fallback;
    return QTR_OK;
  }
  if (!json_is_integer(value)) return qtr_fail(err, QTR_ERR_FORMAT, "\"%s\" must be a whole number", key);
  json_int_t x = json_integer_value(value);
  if (x < min || x > max) {
    return qtr_fail(err, QTR_ERR_FORMAT, "\"%s\" is %lld; %d to %d is accepted", key, (long long)x, (int)min, (int)max);
  }
  *out = (int32_t)x;
  return QTR_OK;
}

static enum qtr_status get_real(const json_t *object, const char *key, double min, double max, double fallback, double *out,
                                struct qtr_error *err) {
  const json_t *value = get(object, key);
  if (!value) {
    if (isnan(fallback)) return qtr_fail(err, QTR_ERR_FORMAT, "\"%s\" is missing", key);
    *out = fallback;
    return QTR_OK;
  }
  if (!json_is_number(value)) return qtr_fail(err, QTR_ERR_FORMAT, "\"%s\" must be a number", key);
  double x = json_number_value(value);
  if (!(x >= min && x <= max)) {
    return qtr_fail(err, QTR_ERR_FORMAT, "\"%s\" is %g; %g to %g is accepted", key, x, min, max);
  }
  *out = x;
  return QTR_OK;
}

static enum qtr_status get_bool(const json_t *object, const char *key, bool fallback, bool *out, struct qtr_error *err) {
  const json_t *value = get(object, key);
  if (value && !json_is_boolean(value)) return qtr_fail(err, QTR_ERR_FORMAT, "\"%s\" must be true or false", key);
  *out = value ? json_is_true(value) : fallback;
  return QTR_OK;
}

/* A string for a message or a field: printable, cut to n. "" when absent or no string. */
static const char *get_name(const json_t *object, const char *key, char *out, size_t n) {
  const json_t *value = get(object, key);
  if (!value || !json_is_string(value)) return qtr_printable("", 0, out, n);
  return qtr_printable(json_string_value(value), json_string_length(value), out, n);
}

/* ---- parts --------------------------------------------------------------------------------------- */

static enum qtr_status parse_family(const json_t *root, struct qtr_config *config, const struct family **family,
                                    struct qtr_error *err) {
  char type[sizeof config->model_type];
  get_name(root, "model_type", type, sizeof type);
  const json_t *list = get(root, "architectures");
  const json_t *first = json_is_array(list) ? json_array_get(list, 0) : NULL;
  *family = NULL;
  if (json_is_string(first)) {
    qtr_printable(json_string_value(first), json_string_length(first), config->architecture, sizeof config->architecture);
    for (size_t i = 0; i < N_FAMILIES; i++) {
      if (strcmp(config->architecture, families[i].architecture) == 0) *family = &families[i];
    }
    if (!*family) {
      return qtr_fail(err, QTR_ERR_UNSUPPORTED,
                      "architecture %s is not supported; LlamaForCausalLM, MistralForCausalLM and Qwen2ForCausalLM are",
                      config->architecture);
    }
  } else {
    for (size_t i = N_FAMILIES; i-- > 0;) {
      if (strcmp(type, families[i].model_type) == 0) *family = &families[i];
    }
    if (!*family) {
      if (!type[0]) return qtr_fail(err, QTR_ERR_FORMAT, "neither \"architectures\" nor \"model_type\" names the model");
      return qtr_fail(err, QTR_ERR_UNSUPPORTED, "model type %s is not supported; llama, mistral and qwen2 are", type);
    }
    (void)snprintf(config->architecture, sizeof config->architecture, "%s", (*family)->architecture);
  }
  (void)snprintf(config->model_type, sizeof config->model_type, "%s", (*family)->model_type);
  return QTR_OK;
}

static enum qtr_status parse_sizes(const json_t *root, const struct family *family, struct qtr_config *c,
                                   struct qtr_error *err) {
  enum qtr_status status = QTR_OK;
  double eps = 0;
  if ((status = get_size(root, "hidden_size", 1, MAX_HIDDEN, -1, &c->hidden_size, err)) ||
      (status = get_size(root, "intermediate_size", 1, MAX_INTERMEDIATE, -1, &c->intermediate_size, err)) ||
      (status = get_size(root, "num_hidden_layers", 1, MAX_LAYERS, -1, &c->n_layers, err)) ||
      (status = get_size(root, "num_attention_heads", 1, MAX_HEADS, -1, &c->n_heads, err)) ||
      (status = get_size(root, "vocab_size", 1, MAX_VOCAB, -1, &c->vocab_size, err)) ||
      (status = get_size(root, "max_position_embeddings", 1, MAX_POSITION, family->max_position, &c->max_position_embeddings,
                         err)) ||
      (status = get_real(root, "rms_norm_eps", 0, 1, 1e-6, &eps, err)) ||
      (status = get_bool(root, "tie_word_embeddings", false, &c->tie_word_embeddings, err))) {
    return status;
  }
  c->rms_norm_eps = (float)eps;
  int32_t kv_heads = family->n_kv_heads ? family->n_kv_heads : c->n_heads;
  if ((status = get_size(root, "num_key_value_heads", 1, MAX_HEADS, kv_heads, &c->n_kv_heads, err))) return status;
  if (c->n_heads % c->n_kv_heads != 0) {
    return qtr_fail(err, QTR_ERR_FORMAT, "%d attention heads cannot share %d key-value heads evenly", c->n_heads,
                    c->n_kv_heads);
  }
  if (!get(root, "head_dim") && c->hidden_size % c->n_heads != 0) {
    return qtr_fail(err, QTR_ERR_FORMAT, "hidden_size %d is no multiple of %d heads and there is no \"head_dim\"",
                    c->hidden_size, c->n_heads);
  }
  if ((status = get_size(root, "head_dim", 1, MAX_HEAD_DIM, c->hidden_size / c->n_heads, &c->head_dim, err))) return status;
  if (c->head_dim % 2 != 0 || c->head_dim < 4 || c->head_dim > MAX_HEAD_DIM) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "head_dim %d is not supported; even numbers from 4 to %d are", c->head_dim,
                    MAX_HEAD_DIM);
  }
  return QTR_OK;
}

/* What transformers does: Mistral obeys sliding_window, Qwen2 only with use_sliding_window and in the layers from
 * max_window_layers on (or those layer_types names), Llama never. */
static enum qtr_status parse_attention(const json_t *root, const struct family *family, struct qtr_config *c,
                                       struct qtr_error *err) {
  enum qtr_status status;
  bool attention_bias = false;
  if (family->bias_key) {
    if ((status = get_bool(root, "attention_bias", false, &attention_bias, err)) ||
        (status = get_bool(root, "mlp_bias", false, &c->mlp_bias, err))) {
      return status;
    }
  }
  c->qkv_bias = family->qkv_bias || attention_bias;
  c->o_bias = attention_bias;

  if (strcmp(family->model_type, "mistral") == 0) {
    bool is_null = json_is_null(json_object_get(root, "sliding_window"));
    status =
        get_size(root, "sliding_window", 1, MAX_POSITION, is_null ? 0 : family->sliding_window, &c->sliding_window, err);
    if (status) return status;
  } else if (strcmp(family->model_type, "qwen2") == 0) {
    bool use = false;
    int32_t window = 0, first = 0;
    if ((status = get_bool(root, "use_sliding_window", false, &use, err)) ||
        (status = get_size(root, "sliding_window", 0, MAX_POSITION, 4096, &window, err)) ||
        (status = get_size(root, "max_window_layers", 0, 1 << 20, 28, &first, err))) {
      return status;
    }
    bool any = first < c->n_layers;
    const json_t *types = get(root, "layer_types");
    if (json_is_array(types)) {
      any = false;
      for (size_t i = 0; i < json_array_size(types); i++) {
        const char *type = json_string_value(json_array_get(types, i));
        any |= type && strcmp(type, "sliding_attention") == 0;
      }
    }
    c->sliding_window = use && any ? window : 0;
  }

  char act[32];
  get_name(root, "hidden_act", act, sizeof act);
  if (act[0] && strcmp(act, "silu") != 0 && strcmp(act, "swish") != 0) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "activation \"%s\" is not supported; silu is", act);
  }
  return QTR_OK;
}

/* The older pair rope_theta + rope_scaling and the newer rope_parameters, which holds both. */
static enum qtr_status parse_rope(const json_t *root, struct qtr_config *c, struct qtr_error *err) {
  const json_t *rope = get(root, "rope_parameters");
  const char *key = "rope_parameters";
  if (!rope) {
    rope = get(root, "rope_scaling");
    key = "rope_scaling";
  }
  enum qtr_status status = get_real(root, "rope_theta", 1, 1e15, 10000, &c->rope_theta, err);
  if (status) return status;
  c->rope_factor = 1;
  const json_t *partial = get(root, "partial_rotary_factor");
  if (rope) {
    if (!json_is_object(rope)) return qtr_fail(err, QTR_ERR_FORMAT, "\"%s\" must be an object or null", key);
    if ((status = get_real(rope, "rope_theta", 1, 1e15, c->rope_theta, &c->rope_theta, err))) return status;
    if (get(rope, "partial_rotary_factor")) partial = get(rope, "partial_rotary_factor");
  }
  if (partial && json_number_value(partial) != 1.0) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "\"partial_rotary_factor\" other than 1 is not supported");
  }
  if (!rope || json_object_size(rope) == 0) return QTR_OK;

  char type[32];
  get_name(rope, "rope_type", type, sizeof type);
  if (!type[0]) get_name(rope, "type", type, sizeof type);
  if (!type[0]) {
    if (get(rope, "factor")) return qtr_fail(err, QTR_ERR_FORMAT, "\"%s\" has a factor but no \"rope_type\"", key);
    if (get(rope, "full_attention") || get(rope, "sliding_attention")) {
      return qtr_fail(err, QTR_ERR_UNSUPPORTED, "\"%s\" for each type of layer is not supported", key);
    }
    return QTR_OK; /* only a rope_theta */
  }
  if (strcmp(type, "default") == 0) return QTR_OK;
  if (strcmp(type, "linear") == 0) {
    c->rope_scaling = QTR_ROPE_LINEAR;
  } else if (strcmp(type, "llama3") == 0) {
    c->rope_scaling = QTR_ROPE_LLAMA3;
  } else if (strcmp(type, "dynamic") == 0) {
    c->rope_scaling = QTR_ROPE_DYNAMIC;
  } else {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "rotary scaling \"%s\" is not supported; linear, llama3 and dynamic are",
                    type);
  }
  if ((status = get_real(rope, "factor", 1e-3, 1e6, NAN, &c->rope_factor, err))) {
    (void)qtr_error_prefix(err, "\"%s\"", key);
    return status;
  }
  c->rope_original_max_position = c->max_position_embeddings;
  if (c->rope_scaling != QTR_ROPE_LLAMA3) return QTR_OK;
  if ((status = get_real(rope, "low_freq_factor", 1e-3, 1e6, NAN, &c->rope_low_freq_factor, err)) ||
      (status = get_real(rope, "high_freq_factor", 1e-3, 1e6, NAN, &c->rope_high_freq_factor, err)) ||
      (status = get_size(rope, "original_max_position_embeddings", 1, MAX_POSITION, c->max_position_embeddings,
                         &c->rope_original_max_position, err))) {
    (void)qtr_error_prefix(err, "\"%s\"", key);
    return status;
  }
  if (c->rope_high_freq_factor <= c->rope_low_freq_factor) {
    return qtr_fail(err, QTR_ERR_FORMAT, "\"%s\": high_freq_factor %g must be above low_freq_factor %g", key,
                    c->rope_high_freq_factor, c->rope_low_freq_factor);
  }
  return QTR_OK;
}

static enum qtr_status add_eos(const json_t *value, struct qtr_config *c, struct qtr_error *err) {
  if (!json_is_integer(value)) return qtr_fail(err, QTR_ERR_FORMAT, "\"eos_token_id\" must be a token id or a list of them");
  json_int_t id = json_integer_value(value);
  if (id < 0) return QTR_OK; /* -1: none */
  if (id > INT32_MAX) return qtr_fail(err, QTR_ERR_FORMAT, "\"eos_token_id\" %lld is no token id", (long long)id);
  for (int32_t i = 0; i < c->n_eos; i++) {
    if (c->eos_token[i] == id) return QTR_OK;
  }
  if (c->n_eos == QTR_MAX_EOS) return qtr_fail(err, QTR_ERR_FORMAT, "\"eos_token_id\": more than %d ids", QTR_MAX_EOS);
  c->eos_token[c->n_eos++] = (int32_t)id;
  return QTR_OK;
}

static enum qtr_status parse_eos(const json_t *root, struct qtr_config *c, struct qtr_error *err) {
  const json_t *value = get(root, "eos_token_id");
  if (!value) return QTR_OK;
  if (!json_is_array(value)) return add_eos(value, c, err);
  for (size_t i = 0; i < json_array_size(value); i++) {
    enum qtr_status status = add_eos(json_array_get(value, i), c, err);
    if (status) return status;
  }
  return QTR_OK;
}

/* One token id, or the first of a list; -1 when there is none. */
static int32_t get_token(const json_t *root, const char *key) {
  const json_t *value = get(root, key);
  if (json_is_array(value)) value = json_array_get(value, 0);
  if (!json_is_integer(value)) return -1;
  json_int_t id = json_integer_value(value);
  return id >= 0 && id <= INT32_MAX ? (int32_t)id : -1;
}

static enum qtr_status parse_quantization(const json_t *root, bool foreign, struct qtr_config *c, struct qtr_error *err) {
  const json_t *quantization = get(root, "quantization_config");
  if (!quantization) return QTR_OK;
  char method[32];
  get_name(quantization, "quant_method", method, sizeof method);
  if (strcmp(method, "qoq") != 0) {
    if (foreign) return QTR_OK;
    return qtr_fail(err, QTR_ERR_UNSUPPORTED,
                    "this checkpoint is quantised by \"%s\", which needs conversion: `quattuor convert` imports gptq and "
                    "awq; for others "
                    "take the float checkpoint it was made from and run `quattuor quantize` on that",
                    method[0] ? method : "an unnamed method");
  }
  get_name(quantization, "precision", c->precision, sizeof c->precision);
  return QTR_OK;
}

/* ---- entry points -------------------------------------------------------------------------------- */

static enum qtr_status parse_text(const char *json, size_t len, const char *what, json_t **root, struct qtr_error *err) {
  json_error_t error;
  *root = json_loadb(json, len, 0, &error);
  if (!*root) {
    char text[96];
    qtr_printable(error.text, strlen(error.text), text, sizeof text);
    return qtr_fail(err, QTR_ERR_FORMAT, "%s is not valid JSON: line %d: %s", what, error.line, text);
  }
  if (json_is_object(*root)) return QTR_OK;
  json_decref(*root);
  *root = NULL;
  return qtr_fail(err, QTR_ERR_FORMAT, "%s must hold a JSON object", what);
}

/* foreign: quantised by others is fine, too. */
static enum qtr_status parse_config(const char *json, size_t len, const char *generation, size_t generation_len,
                                    bool foreign, struct qtr_config *config, struct qtr_error *err) {
  *config = (struct qtr_config){0};
  json_t *root = NULL, *more = NULL;
  const struct family *family = NULL;
  enum qtr_status status = parse_text(json, len, "config.json", &root, err);
  if (!status && generation) status = parse_text(generation, generation_len, "generation_config.json", &more, err);
  if (status) goto done;
  if ((status = parse_family(root, config, &family, err)) || (status = parse_quantization(root, foreign, config, err)) ||
      (status = parse_sizes(root, family, config, err)) || (status = parse_attention(root, family, config, err)) ||
      (status = parse_rope(root, config, err)) || (status = parse_eos(root, config, err))) {
    (void)qtr_error_prefix(err, "config.json");
    goto done;
  }
  config->bos_token = get_token(root, "bos_token_id");
  config->pad_token = get_token(root, "pad_token_id");
  get_name(root, get(root, "dtype") ? "dtype" : "torch_dtype", config->torch_dtype, sizeof config->torch_dtype);
  if (more) {
    if ((status = parse_eos(more, config, err))) (void)qtr_error_prefix(err, "generation_config.json");
    if (config->bos_token < 0) config->bos_token = get_token(more, "bos_token_id");
    if (config->pad_token < 0) config->pad_token = get_token(more, "pad_token_id");
  }
done:
  json_decref(root);
  json_decref(more);
  return status;
}

enum qtr_status qtr_config_parse(const char *json, size_t len, const char *generation, size_t generation_len,
                                 struct qtr_config *config, struct qtr_error *err) {
  return parse_config(json, len, generation, generation_len, false, config, err);
}

static enum qtr_status read_config(const char *dir, bool foreign, struct qtr_config *config, struct qtr_error *err) {
  char *path = qtr_path_join(dir, "config.json"), *generation_path = qtr_path_join(dir, "generation_config.json");
  char *json = NULL, *generation = NULL;
  size_t len = 0, generation_len = 0;
  enum qtr_status status = QTR_OK;
  if (!path || !generation_path) {
    status = qtr_fail_memory(err, "a path", strlen(dir));
    goto done;
  }
  if ((status = qtr_file_read(path, MAX_CONFIG_BYTES, &json, &len, err))) goto done;
  if (qtr_file_exists(generation_path)) {
    if ((status = qtr_file_read(generation_path, MAX_CONFIG_BYTES, &generation, &generation_len, err))) goto done;
  }
  if ((status = parse_config(json, len, generation, generation_len, foreign, config, err)))
    status = qtr_error_prefix(err, "%s", dir);
done:
  free(path);
  free(generation_path);
  free(json);
  free(generation);
  return status;
}

enum qtr_status qtr_config_read(const char *dir, struct qtr_config *config, struct qtr_error *err) {
  return read_config(dir, false, config, err);
}

enum qtr_status qtr_config_read_foreign(const char *dir, struct qtr_config *config, struct qtr_error *err) {
  return read_config(dir, true, config, err);
}

void qtr_config_inv_freq(const struct qtr_config *c, int32_t max_len, float *inv_freq) {
  double dim = c->head_dim, base = c->rope_theta;
  if (c->rope_scaling == QTR_ROPE_DYNAMIC && max_len > c->rope_original_max_position) {
    double stretch = c->rope_factor * max_len / c->rope_original_max_position - (c->rope_factor - 1);
    base *= pow(stretch, dim / (dim - 2));
  }
  for (int32_t i = 0; i < c->head_dim / 2; i++) {
    double f = 1.0 / pow(base, 2.0 * i / dim);
    if (c->rope_scaling == QTR_ROPE_LINEAR) f /= c->rope_factor;
    if (c->rope_scaling == QTR_ROPE_LLAMA3) {
      /* Wavelengths short against the original context stay, long ones are stretched by the factor, those between are
       * blended linearly in (context / wavelength). */
      double turns = c->rope_original_max_position * f / (2 * 3.14159265358979323846);
      double blend = (turns - c->rope_low_freq_factor) / (c->rope_high_freq_factor - c->rope_low_freq_factor);
      blend = fmin(fmax(blend, 0), 1);
      f = (1 - blend) * f / c->rope_factor + blend * f;
    }
    inv_freq[i] = (float)f;
  }
}
