/* sink.h - writes a checkpoint in QServe's layout (spec A.2 – A.4): somebody has matrices, as floats or as integer codes
 * with their scales, and the sink packs, permutes and stores them.
 *
 * First every tensor is announced in the order of the file (qtr_sink_add), then qtr_sink_open makes the directory, then the
 * data comes in the same order, matrix by matrix, each in as many calls as its owner likes; qtr_sink_finish adds tokenizer
 * and config.json and, last of all and atomically, model.safetensors: a directory without it is not a model. Memory: the
 * scales of one matrix and some megabytes. One thread; rounding and packing use `team`. */
#ifndef QTR_QUANT_SINK_H
#define QTR_QUANT_SINK_H

#include "backend/backend.h" /* enum qtr_dtype */
#include "base/threads.h"
#include "quant/directory.h"
#include "quant/rtn.h"

enum qtr_store {
  QTR_STORE_F16,     /* <name><suffix> */
  QTR_STORE_BF16,    /* same */
  QTR_STORE_RAW,     /* <name><suffix>, any dtype, bytes as they are */
  QTR_STORE_W8,      /* <name>.weight, .dequant_scale (A.2.3) */
  QTR_STORE_W4,      /* <name>.qweight, .s1_scales, .s1_szeros (A.2.1) */
  QTR_STORE_W4_G128, /* <name>.qweight, .s1_scales, .s2_scales, .s2_zeros (A.2.2) */
};

/* One matrix (n_out, n_in), or one vector (n_dims 1, n_out 1). */
struct qtr_sink_item {
  enum qtr_store store;
  const char *name, *suffix; /* "model.layers.0.self_attn.q_proj", ".weight"; W8 and W4 have their own suffixes. Copied */
  enum qtr_dtype dtype;      /* RAW */
  size_t n_dims, n_out, n_in;
};

/* n_rows rows of codes in natural order. */
struct qtr_sink_codes {
  const uint8_t *code;    /* (n_rows, n_in) 0…15; W8: int8 */
  const uint16_t *scale;  /* (n_rows) fp16: s1_scales; W8: NULL */
  const float *dequant;   /* (n_rows) W8; else NULL */
  const uint16_t *szero;  /* (n_rows) fp16, W4: w = code * scale - szero; else NULL */
  const uint8_t *s2, *z2; /* (n_rows, n_in/128) W4_G128: w = (code * s2 - z2) * scale, s2 <= 127; the file holds -z2 */
};

struct qtr_sink_target {
  const char *source_dir;                   /* whose config.json and tokenizer go along; never written to */
  const char *output_dir;                   /* made when absent */
  bool overwrite;                           /* a model.safetensors that is there already */
  struct qtr_quant_description description; /* strings are borrowed until finish or free */
};

struct qtr_sink;

enum qtr_status qtr_sink_create(struct qtr_threads *team, struct qtr_sink **sink, struct qtr_error *err);
void qtr_sink_free(struct qtr_sink *sink); /* an unfinished one leaves no file behind; NULL is allowed */

/* Announces a tensor. QTR_ERR_UNSUPPORTED names one whose shape the format cannot hold (W4: multiples of 32 by 32, groups:
 * of 32 by 128). */
enum qtr_status qtr_sink_add(struct qtr_sink *sink, const struct qtr_sink_item *item, struct qtr_error *err);
enum qtr_status qtr_sink_open(struct qtr_sink *sink, const struct qtr_sink_target *target, struct qtr_error *err);

/* The next n_rows rows of the matrix whose turn it is; `name` is its name, and QTR_ERR_STATE says when it is another's turn.
 * Calls that do not end the matrix pass a multiple of 32 rows.
 * floats: rounded to nearest (quant/rtn.h) into what was announced; error (may be NULL) += what that cost.
 * codes: W8 and W4 only; checked: codes in 0…15, s2 in 0…127, code * s2 in a byte, code * s2 - z2 in int8, scales finite.
 * raw: RAW only, any number of bytes. */
enum qtr_status qtr_sink_write_floats(struct qtr_sink *sink, const char *name, const float *w, size_t n_rows,
                                      struct qtr_rtn_error *error, struct qtr_error *err);
enum qtr_status qtr_sink_write_codes(struct qtr_sink *sink, const char *name, const struct qtr_sink_codes *codes,
                                     size_t n_rows, struct qtr_error *err);
enum qtr_status qtr_sink_write_raw(struct qtr_sink *sink, const char *name, const void *data, size_t n_bytes,
                                   struct qtr_error *err);

enum qtr_status qtr_sink_finish(struct qtr_sink *sink, struct qtr_error *err);

size_t qtr_sink_bytes(const struct qtr_sink *sink);   /* of all tensors announced */
size_t qtr_sink_tensors(const struct qtr_sink *sink); /* how many the file has */

#endif
