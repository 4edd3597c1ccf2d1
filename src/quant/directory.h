/* directory.h - inside of src/quant: everything of a model directory that is not weights. */
#ifndef QTR_QUANT_DIRECTORY_H
#define QTR_QUANT_DIRECTORY_H

#include "quant/quantize.h"

/* What config.json says about a checkpoint of ours. */
struct qtr_quant_description {
  const char *precision, *method; /* "w4a8kv4", "rtn" */
  int32_t weight_bits, act_bits, kv_bits, group_size, head_bits, embed_bits;
  bool untied; /* head and embedding differ now: "tie_word_embeddings" becomes false */
};

/* Makes `dir` when it is not there (its parent must be); *made says so. Refuses the source directory itself, and a
 * model.safetensors that exists, unless overwrite; with overwrite removes it. */
enum qtr_status qtr_quant_prepare_directory(const char *source, const char *dir, bool overwrite, bool *made,
                                            struct qtr_error *err);

/* config.json with all fields of the source's and "quantization_config". */
enum qtr_status qtr_quant_write_config(const char *source, const char *dir, const struct qtr_quant_description *description,
                                       struct qtr_error *err);

/* Tokenizer and the rest: every *.json but config.json and indices, *.jinja, tokenizer.model, merges.txt. */
enum qtr_status qtr_quant_copy_files(const char *source, const char *dir, struct qtr_error *err);

#endif
