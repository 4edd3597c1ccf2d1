/* convert_internal.h - what convert.c, convert_run.c and convert_load.c share. */
#ifndef QTR_QUANT_CONVERT_INTERNAL_H
#define QTR_QUANT_CONVERT_INTERNAL_H

#include "checkpoint/kv_scales.h"
#include "quant/convert.h"
#include "quant/int4.h"
#include "quant/source.h"

/* What GPTQ's and AWQ's configuration files say; empty and 0 where they say nothing. */
struct qtr_int4_config {
  char method[16]; /* "gptq", "awq" */
  char format[16]; /* GPTQ's checkpoint_format, AWQ's version */
  int32_t bits, group_size;
};

/* quantization_config of config.json, else quantize_config.json, else quant_config.json. None of them is no error. */
enum qtr_status qtr_int4_config_read(const char *dir, struct qtr_int4_config *config, struct qtr_error *err);

/* From the configuration and the first projection of the file: GPTQ or AWQ, and the group size (128 or -1), or why not.
 * plus: what a stored zero lacks (int4.h). */
enum qtr_status qtr_int4_recognise(struct qtr_source *source, const struct qtr_int4_config *config,
                                   enum qtr_convert_kind *kind, int32_t *group_size, unsigned *plus, struct qtr_error *err);

/* Tensors <name>.qweight and so on, of (n_out, n_in) and one group size, checked and unpacked. g_idx is kept where it is not
 * in order. */
enum qtr_status qtr_int4_load(struct qtr_source *source, const struct qtr_slot *slot, enum qtr_convert_kind kind,
                              int32_t group_size, unsigned plus, struct qtr_int4_matrix *m, struct qtr_error *err);
/* Only checks what qtr_int4_load will read. */
enum qtr_status qtr_int4_check(struct qtr_source *source, const struct qtr_slot *slot, enum qtr_convert_kind kind,
                               int32_t group_size, struct qtr_error *err);
/* g_idx of a projection: NULL when there is none or it is in order; else (n_in), malloc'ed. */
enum qtr_status qtr_int4_load_order(struct qtr_source *source, const struct qtr_slot *slot, size_t group, uint32_t **g_idx,
                                    struct qtr_error *err);

/* One projection of model.pt and scale.pt as floats; arrays are malloc'ed, free with qtr_fake_free. */
struct qtr_fake_load {
  float *w, *s0, *s1, *zero;
  bool scaled;
  enum qtr_dtype type;
};
enum qtr_status qtr_fake_read(struct qtr_source *model, struct qtr_source *scales, const struct qtr_slot *slot,
                              struct qtr_threads *team, struct qtr_fake_load *load, struct qtr_error *err);
void qtr_fake_free(struct qtr_fake_load *load);

/* ---- the plan ------------------------------------------------------------------------------------ */

enum qtr_convert_job_kind { JOB_TENSOR, JOB_KV, JOB_FAKE, JOB_INT4 };

struct qtr_convert_job {
  enum qtr_convert_job_kind kind;
  enum qtr_store store;            /* TENSOR */
  const struct qtr_tensor *tensor; /* TENSOR */
  struct qtr_slot slot;
  bool inner; /* its rows are the inner channels of the MLP, which desc_act may reorder */
};

/* One import, from options to finish. */
struct qtr_convert_work {
  const struct qtr_convert_options *options;
  const char *config_dir;
  enum qtr_convert_kind kind;
  struct qtr_config config;
  struct qtr_source source, scales; /* scales: scale.pt */
  enum qtr_linear_format format;    /* QSERVE */
  enum qtr_store store;             /* of projections */
  int32_t group_size, weight_bits, act_bits, kv_bits, embed_bits, head_bits;
  unsigned plus;           /* GPTQ */
  struct qtr_kv_scales kv; /* of options->kv_scales */
  struct qtr_threads *team;
  struct qtr_sink *sink;
  struct qtr_convert_job *job; /* (n_jobs) */
  size_t n_jobs, job_capacity, input_bytes;
  int32_t ordered_layer; /* whose order is in `order`; -1: none yet */
  uint32_t *order;       /* (intermediate_size) new inner channel j is old order[j]; NULL: as they are */
  struct qtr_convert_summary *summary;
  struct qtr_error *err;
};

/* Carries out all jobs; callback may be NULL. */
enum qtr_status qtr_convert_run(struct qtr_convert_work *work, qtr_quantize_callback callback, void *user);

#endif
