/* convert.h - other people's quantised checkpoints, and float ones, into QServe's layout as safetensors. */
#ifndef QTR_QUANT_CONVERT_H
#define QTR_QUANT_CONVERT_H

#include "checkpoint/checkpoint.h"
#include "quant/quantize.h"

enum qtr_convert_kind {
  QTR_CONVERT_FAKE_QUANT, /* model.pt + scale.pt of DeepCompressor or LMQuant (spec A.5.1): integers recovered exactly */
  QTR_CONVERT_QSERVE,     /* QServe's own layout in .bin, .pt or .safetensors: integers unchanged */
  QTR_CONVERT_GPTQ, /* 4 bits, groups of 128 or whole rows -> W4A8: codes kept, group scales as near as s2 * s1 comes */
  QTR_CONVERT_AWQ,  /* same */
  QTR_CONVERT_FLOAT /* fp32, fp16, bf16: as qtr_quantize does it */
};

const char *qtr_convert_kind_name(enum qtr_convert_kind kind); /* a sentence's worth, static */

struct qtr_convert_options {
  const char *input;      /* directory, or one file; required */
  const char *config_dir; /* config.json and tokenizer; NULL: input */
  const char *output_dir; /* made when absent; required */
  const char *precision;  /* "w4a8kv4". Float input: what to make, NULL = w16a16. Else the weights must be those found and
                             only the KV width counts; NULL = as the input says, else kv4 with w4a8 and kv8 with w8a8 */
  int32_t group_size;     /* float input to W4: 128 or -1; 0 = 128. Else 0 or what is found */
  bool bf16;              /* float input: what stays float becomes bf16 instead of fp16 */
  enum qtr_s2_order s2_order; /* QServe input */
  const char *kv_scales; /* file of static KV scales to put in (checkpoint/kv_scales.h); NULL: those of the input, if any */
  bool strict;           /* refuse what cannot be taken over exactly */
  bool overwrite, quiet;
  int32_t threads; /* 0 = all cores this process may use */
};

void qtr_convert_options_init(struct qtr_convert_options *options);

struct qtr_convert_summary {
  enum qtr_convert_kind kind;
  struct qtr_quantize_summary quantize;    /* relative_error: of the projections, file against input */
  size_t n_exact, n_moved, n_rounded;      /* matrices: integers as they were; scales moved; rounded anew */
  size_t n_groups_moved, n_groups_rounded; /* groups whose scale moved; of these, whose codes had to change, too */
  size_t n_reordered;                      /* layers whose inner channels were reordered for GPTQ's desc_act */
  int32_t kv_scales_per_layer; /* how many each layer had in options.kv_scales, K and V each; the largest is kept. 0: none */
};

/* found (may be NULL) is called once the kind is known, before the work; callback (may be NULL) after each matrix. Writes as
 * qtr_quantize does: model.safetensors last and atomically, nothing after an error. Errors name the tensor: absent, of
 * another shape than config.json says, unexpected, off its grid (row and column), or with settings that W4A8 has no place
 * for. */
enum qtr_status qtr_convert(const struct qtr_convert_options *options, void (*found)(enum qtr_convert_kind kind, void *user),
                            qtr_quantize_callback callback, void *user, struct qtr_convert_summary *summary,
                            struct qtr_error *err);

#endif
