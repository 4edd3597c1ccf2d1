/* config.h - config.json and generation_config.json of a Hugging Face directory (spec A.7, E). Untrusted input. */
#ifndef QTR_CHECKPOINT_CONFIG_H
#define QTR_CHECKPOINT_CONFIG_H

#include "quattuor/quattuor.h"

enum qtr_rope_scaling { QTR_ROPE_NONE, QTR_ROPE_LINEAR, QTR_ROPE_LLAMA3, QTR_ROPE_DYNAMIC };

#define QTR_MAX_EOS 16

/* Every size is checked: positive, within caps that keep all products below 2^48, heads divisible by KV heads. */
struct qtr_config {
  char architecture[64]; /* "LlamaForCausalLM" */
  char model_type[32];   /* "llama", "mistral", "qwen2"; from the architecture when absent */
  int32_t hidden_size, intermediate_size, n_layers, n_heads, n_kv_heads, head_dim, vocab_size;
  int32_t max_position_embeddings;
  float rms_norm_eps;
  bool tie_word_embeddings;
  bool qkv_bias, o_bias, mlp_bias; /* what the config says; the tensors decide in the end */
  int32_t sliding_window;          /* 0 = none. Mistral 0.1: attention beyond it is refused, see max_len in info */
  double rope_theta;
  enum qtr_rope_scaling rope_scaling;
  double rope_factor;                                 /* all but NONE */
  double rope_low_freq_factor, rope_high_freq_factor; /* llama3 */
  int32_t rope_original_max_position;                 /* llama3; dynamic: max_position_embeddings */
  int32_t bos_token, pad_token;                       /* -1 = none */
  int32_t eos_token[QTR_MAX_EOS];                     /* config.json and generation_config.json together */
  int32_t n_eos;
  char torch_dtype[16];
  char precision[16]; /* of a checkpoint of ours (quantization_config): "w4a8kv4"; "" = not said */
};

/* Parses the two texts; generation may be NULL. */
enum qtr_status qtr_config_parse(const char *json, size_t len, const char *generation, size_t generation_len,
                                 struct qtr_config *config, struct qtr_error *err);
/* Reads <dir>/config.json and, when there, <dir>/generation_config.json. */
enum qtr_status qtr_config_read(const char *dir, struct qtr_config *config, struct qtr_error *err);
/* The same for importers: a quantization_config of another program is no reason to refuse. */
enum qtr_status qtr_config_read_foreign(const char *dir, struct qtr_config *config, struct qtr_error *err);
/* RoPE frequencies, (head_dim/2) floats, with the scaling applied (C.4; llama3 as in the Llama 3.1 release). `dynamic`
 * depends on the longest context that will be used: max_len <= max_position_embeddings gives plain RoPE, more enlarges the
 * base once and for all as Hugging Face does for a sequence of max_len. */
void qtr_config_inv_freq(const struct qtr_config *config, int32_t max_len, float *inv_freq);

#endif
