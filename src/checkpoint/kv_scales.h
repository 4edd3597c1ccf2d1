/* kv_scales.h - files of static KV8 scales: the JSON of vLLM's --kv-quant-params-path and --quantization-param-path,
 * LMDeploy's binary ones, and acts.pt of DeepCompressor and LMQuant. Untrusted.
 *
 *   {"model_type": "llama", "kv_cache": {"dtype": "int8", "scaling_factor": {
 *      "k_scale": {"0": S, "1": S, …}, "v_scale": {"0": S, …}}}}                                       one S a layer
 *   {…, "dtype": "float8_e4m3fn", "scaling_factor": {"0": {"0": 0.02, "1": 0.03, …}}}                  rank -> layer ->
 * scale
 *
 * S is a number, an array, or an object {"0": x, "1": y, …}: one value for the layer, or one (or several) for each KV head.
 * Zero points (k_zero_point, v_zero_point of the same shape) must be 0. fp8 scales serve K and V alike and are brought from
 * the largest fp8 number to 127; several ranks give the largest. A file whose name ends in .pt is
 * acts.pt (A.2.5): of each layer the largest magnitudes of model.layers.N.self_attn.k_rotary_emb.output and v_proj.output,
 * over 127. A directory is searched for kv_cache_scales_layer_level.json, kv_cache_scales.json, acts.pt and
 * layers.N.past_kv_scale.R.weight (fp32 k, v or k, k_zero, v, v_zero). */
#ifndef QTR_CHECKPOINT_KV_SCALES_H
#define QTR_CHECKPOINT_KV_SCALES_H

#include "checkpoint/checkpoint.h"
#include "checkpoint/config.h"

struct qtr_kv_scales {
  int32_t n_layers, n_heads; /* n_heads: 1 = one scale a tensor, else the model's KV heads */
  float *scale;              /* (n_layers, 2, n_heads), K then V: x = code * scale, code in -127…127 */
};

/* Layers and heads must be those of config; every scale a positive number that fp16 holds. */
enum qtr_status qtr_kv_scales_read(const char *path, const struct qtr_config *config, struct qtr_kv_scales *scales,
                                   struct qtr_error *err);
/* Those in a checkpoint, self_attn.kv_scale_quant_orig of each layer (A.2.5): scales->scale is NULL when there are none.
 * Only some layers having them is QTR_ERR_FORMAT. */
enum qtr_status qtr_kv_scales_find(const struct qtr_checkpoint *checkpoint, const struct qtr_config *config,
                                   struct qtr_kv_scales *scales, struct qtr_error *err);
/* The first layout above, complete and atomically. */
enum qtr_status qtr_kv_scales_write(const char *path, const char *model_type, const struct qtr_kv_scales *scales,
                                    struct qtr_error *err);
void qtr_kv_scales_free(struct qtr_kv_scales *scales);

/* The scale of a whole tensor: the largest of its heads. value: 0 = K, 1 = V. */
float qtr_kv_scales_tensor(const struct qtr_kv_scales *scales, int32_t layer, int value);

/* JSON text alone, for fuzzing. */
enum qtr_status qtr_kv_scales_parse(const char *json, size_t len, const struct qtr_config *config,
                                    struct qtr_kv_scales *scales, struct qtr_error *err);

#endif
