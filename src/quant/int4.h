/* int4.h - GPTQ and AWQ weights as the Hugging Face world stores them, and their way into W4A8. Pure functions on checked
 * shapes.
 *
 * GPTQ  qweight int32 (n_in/8, n_out): nibble i of word (k, n) is input 8k + i of output n
 *       qzeros  int32 (groups, n_out/8): nibble i of word (g, n) is the zero of output 8n + i, less one in format "gptq"
 *       scales  (groups, n_out), g_idx int32 (n_in): the group of each input
 * AWQ   qweight int32 (n_in, n_out/8), qzeros int32 (groups, n_out/8): nibble i is output 8n + {0,2,4,6,1,3,5,7}[i]
 *       scales  (groups, n_out)                                   ("gemm"; groups are consecutive inputs)
 * A weight is (q - zero) * scale. */
#ifndef QTR_QUANT_INT4_H
#define QTR_QUANT_INT4_H

#include "base/threads.h"
#include "quant/int_matrix.h"

/* A matrix in plain order. */
struct qtr_int4_matrix {
  size_t n_out, n_in, group; /* group divides n_in */
  uint8_t *code;             /* (n_out, n_in) 0…15 */
  uint8_t *zero;             /* (n_out, n_in / group) 0…16 */
  float *scale;              /* (n_out, n_in / group) */
  uint32_t *g_idx;           /* (n_in) group of each input; NULL: in order */
};

enum qtr_status qtr_int4_create(size_t n_out, size_t n_in, size_t group, struct qtr_int4_matrix *m, struct qtr_error *err);
void qtr_int4_free(struct qtr_int4_matrix *m);

/* Words are little endian and may be unaligned. plus: 1 for "gptq", 0 for "gptq_v2" and AWQ. */
void qtr_gptq_unpack(const uint8_t *qweight, const uint8_t *qzeros, unsigned plus, struct qtr_int4_matrix *m);
void qtr_awq_unpack(const uint8_t *qweight, const uint8_t *qzeros, struct qtr_int4_matrix *m);

/* An order of inputs that makes every group consecutive: input order[j] becomes j. False when the groups differ in size.
 * order: (n_in) */
bool qtr_int4_order(const uint32_t *g_idx, size_t n_in, size_t group, uint32_t *order);
/* New column j is old column order[j]; g_idx becomes NULL. New row j is old row order[j]. */
enum qtr_status qtr_int4_permute_columns(struct qtr_int4_matrix *m, const uint32_t *order, struct qtr_error *err);
enum qtr_status qtr_int4_permute_rows(struct qtr_int4_matrix *m, const uint32_t *order, struct qtr_error *err);

/* Row `row` as floats. out: (n_in) */
void qtr_int4_row(const struct qtr_int4_matrix *m, size_t row, float *out);

/* What did not fit. */
struct qtr_int4_moved {
  size_t n_groups;  /* groups whose scale moved */
  size_t n_rounded; /* of these, groups whose codes were rounded anew, because that is nearer */
};

/* The same weights in W4A8, m without g_idx and out created by the caller: groups of 128 (W4_G128) or one (W4).
 * W4: codes kept, scale and scale * zero rounded to fp16. W4_G128: the fp16 scale of each group becomes s2 * s1, s2 a whole
 * number; for each row the fp16 value s1 is searched that moves the weights least with codes kept; codes change only in
 * groups whose s2 is at most 4 and only where that is nearer. *moved and *error += what happened. QTR_ERR_FORMAT: a scale
 * that is negative, not finite or beyond fp16. */
enum qtr_status qtr_int4_to_w4a8(const struct qtr_int4_matrix *m, struct qtr_threads *team, struct qtr_int_matrix *out,
                                 struct qtr_rtn_error *error, struct qtr_int4_moved *moved, struct qtr_error *err);

#endif
