/* quantize.h - makes a QServe checkpoint (safetensors, names and packing of spec A) out of a Hugging Face float checkpoint,
 * or of a float checkpoint of ours. Streams tensor by tensor: the input is memory-mapped, the output never holds more than
 * one projection in memory. */
#ifndef QTR_QUANT_QUANTIZE_H
#define QTR_QUANT_QUANTIZE_H

#include "checkpoint/kv_scales.h"
#include "model/model.h" /* struct qtr_precision */
#include "quant/qoq.h"

#include <jansson.h>

struct qtr_quantize_options {
  const char *model_dir;  /* Hugging Face directory with float weights; required */
  const char *config_dir; /* config.json and tokenizer; NULL: model_dir. With it model_dir may be one file */
  const char *output_dir; /* created when absent; required. A model.safetensors in it is refused unless overwrite */
  struct qtr_precision
      precision;      /* from qtr_precision_parse: W4A8, W8A8 or W16A16; kv_bits is only recorded in config.json */
  int32_t group_size; /* W4: 128, or -1 = per channel; 0 = 128. W8 and W16: -1 or 0 */
  const char *method; /* NULL or "rtn": round to nearest; "qoq": calibrated, see qoq */
  const struct qtr_qoq_options
      *qoq;                   /* required with "qoq"; calibration set. The work directory is "<output_dir>/.calibration" */
  bool head_int8, embed_int8; /* LM head / embedding as int8 with one scale a row instead of fp16 (an extension: other tools
                                 than Quattuor do not read such a file) */
  const struct qtr_kv_scales *kv_scales; /* static KV8 scales to put in, per tensor; NULL: those of the source, if any */
  bool bf16;                             /* what stays float becomes bf16 instead of fp16 */
  bool overwrite;
  int32_t threads; /* 0 = all cores this process may use */
  bool quiet;      /* no progress line */
};

/* Fills every field with its default; precision becomes w4a8kv4. */
void qtr_quantize_options_init(struct qtr_quantize_options *options);

/* One matrix that was rounded. Errors compare what the file says with what the source says. */
struct qtr_quantize_report {
  int32_t layer, n_layers; /* layer = -1: embedding or head */
  const char *projection;  /* "q_proj" … "down_proj", "embed_tokens", "lm_head"; static */
  const char *tensor;      /* full name, "model.layers.0.self_attn.q_proj"; valid during the call */
  const char *how;         /* "rounded", or what convert.h says; static */
  size_t n_out, n_in;
  double relative_error;              /* ‖W − Ŵ‖ / ‖W‖, Frobenius; 0 for W = 0 */
  double squared_error, squared_norm; /* ‖W − Ŵ‖², ‖W‖²: a layer's error is sqrt(sum / sum) */
  double max_error;                   /* largest |W − Ŵ| */
  /* qoq: the squares are those of the matrix's outputs on calibration inputs, ‖X (W − Ŵ)ᵀ‖² and ‖X Wᵀ‖², max_error is NAN,
   * and this is what rounding to nearest would have given. W is not the source's any more: see qoq.h. Else 0. */
  double plain_squared_error;
  json_t *calibration; /* qoq: what happened to the layer (quant/calibrate.c), valid during the call; else NULL */
};

/* Called after each matrix, in file order (layer by layer, the seven projections of a layer in the order above), from the
 * thread that called qtr_quantize. NULL is allowed. */
typedef void (*qtr_quantize_callback)(const struct qtr_quantize_report *report, void *user);

struct qtr_quantize_summary {
  char precision[16]; /* "w4a8kv4" */
  int32_t group_size; /* 128, -1 */
  int32_t n_layers;
  size_t n_tensors;
  size_t input_bytes, output_bytes; /* of the tensors */
  double relative_error;            /* over all projections of all layers */
  double seconds;
};

/* Writes config.json, the tokenizer's files and, last of all and atomically, model.safetensors: a directory without
 * model.safetensors is not a model, so an interrupted run leaves nothing that could be taken for one. callback and summary
 * may be NULL. Errors name the tensor: shapes that are no multiples of 32 (W4) or 128 (g128), values that are not finite or
 * that fp16 cannot hold, tensors that are absent. */
enum qtr_status qtr_quantize(const struct qtr_quantize_options *options, qtr_quantize_callback callback, void *user,
                             struct qtr_quantize_summary *summary, struct qtr_error *err);

#endif
