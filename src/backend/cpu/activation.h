/* activation.h - the CPU backend's form of a linear's input, and the row functions that fill it, one set for each
 * instruction set.
 *
 * int8 form: tiles of 16 tokens x 64 values, 1 KiB each, as AMX loads them; the tiles of 16 tokens follow each other in the
 * order of the values, so that a pass over them touches few pages. Codes beyond `dim` up to the next multiple of 64 are 0.
 * There is room for a multiple of 32 tokens; rows that were never written hold 0 or old codes, whose results are thrown
 * away. Float form: row t starts at (float *)data + t * dim. */
#ifndef QTR_BACKEND_CPU_ACTIVATION_H
#define QTR_BACKEND_CPU_ACTIVATION_H

#include "backend/cpu/cpu.h"

struct qtr_input {
  enum qtr_quant quant; /* of the last fill */
  size_t max_tokens, max_dim;
  size_t dim;        /* of the last fill */
  size_t n_segments; /* ceil(dim / 64) */
  size_t n_groups;   /* ceil(dim / 128) */
  void *data;        /* (max_tokens rounded up to 32, max_dim) in either form */
  size_t data_bytes;
  float *scale;       /* (max_tokens) fp16 values, spec B.6 */
  float *sum;         /* (max_tokens) sum of the values before quantisation */
  int32_t *code_sum;  /* (max_tokens) sum of the codes */
  int32_t *group_sum; /* (max_tokens, n_groups) sum of the codes of each group of 128 */
};

enum { QTR_SEGMENT = 64, QTR_TILE_TOKENS = 16, QTR_TILE_BYTES = QTR_TILE_TOKENS * QTR_SEGMENT };

/* The 64 codes of a token's segment; the token's next segment is QTR_TILE_BYTES further, the next token of the same 16 is
 * 64 bytes further. */
static inline int8_t *qtr_input_codes(const struct qtr_input *in, size_t token, size_t segment) {
  size_t tile = token / QTR_TILE_TOKENS * in->n_segments + segment;
  return (int8_t *)in->data + tile * QTR_TILE_BYTES + token % QTR_TILE_TOKENS * QTR_SEGMENT;
}
static inline const float *qtr_input_values(const struct qtr_input *in, size_t token) {
  return (const float *)in->data + token * in->dim;
}

/* Every function works on one row, in an order of operations that depends on `dim` alone and is the same in every set. */
struct qtr_activation_kernels {
  void (*quant_row)(struct qtr_input *in, size_t token, const float *x);
  /* v = x * rstd * weight with rstd = 1/sqrt(mean(x²) + eps), or spec B.7's variant, quantised */
  void (*rmsnorm_quant_row)(struct qtr_input *in, size_t token, const float *x, const float *weight, float eps,
                            enum qtr_norm norm);
  void (*rmsnorm_row)(float *out, const float *x, const float *weight, float eps, size_t dim);
};
const struct qtr_activation_kernels *qtr_cpu_activation_portable(void);
const struct qtr_activation_kernels *qtr_cpu_activation_avx2(void);   /* NULL when not built */
const struct qtr_activation_kernels *qtr_cpu_activation_avx512(void); /* NULL when not built */

#endif
