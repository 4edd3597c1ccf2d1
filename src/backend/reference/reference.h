/* reference.h - what the files of the reference backend share. reference.c owns the vtable, memory and the step; linear.c
 * the matrices; activation.c embedding, norms and quantisation; kv.c the cache; attention.c what reads it.
 *
 * The reference is the oracle: plain single-threaded C, activations F32, floating-point sums in double and rounded to float
 * once, integer sums exact, and the fp32 operations of the specification in the order it gives them. The structs are
 * open to the unit tests. */
#ifndef QTR_BACKEND_REFERENCE_REFERENCE_H
#define QTR_BACKEND_REFERENCE_REFERENCE_H

#include "backend/common/sparse.h"
#include "base/half.h"

struct qtr_reference {
  struct qtr_backend base;       /* first: a struct qtr_backend * is a struct qtr_reference * */
  const struct qtr_batch *batch; /* of the running step */
  float *cos, *sin;              /* (n_tokens, half_dim) of the running step */
  size_t half_dim;
  float *k, *v;      /* (longest kv_len + q_len of the step, head_dim) the keys and values that a query sees, dequantised */
  double *score;     /* (longest kv_len + q_len of the step) */
  double *sum;       /* (head_dim) */
  double *weight;    /* (widest n_in of any linear, 8) eight rows of a floating-point matrix, widened */
  size_t weight_dim; /* that n_in */
};

struct qtr_linear {
  enum qtr_linear_format format;
  size_t n_in, n_out;
  int8_t *code;                      /* (n_out, n_in) integer formats: B.2's q (0 … 15), B.3's w8, B.4's weight */
  const void *weight[QTR_MAX_PARTS]; /* floating-point formats: the rows of each part, borrowed or owned */
  size_t part_rows[QTR_MAX_PARTS];
  bool owned;
  float *scale, *szero, *bias; /* (n_out) each; NULL where the format or the matrix has none */
  size_t n_bytes;
};

struct qtr_input {
  size_t max_tokens, max_dim;
  int8_t *code;       /* (max_tokens, max_dim) */
  float *value;       /* (max_tokens, max_dim) */
  float *scale, *sum; /* (max_tokens) sa and Σx of B.6 */
};

struct qtr_kv {
  struct qtr_kv_config config;
  struct qtr_kv_heads heads;
  float *static_scale; /* (n_layers, 2) f16(K scale), f16(V scale); INT8_STATIC */
  float *fp8_scale;    /* (n_layers, 2) when values are rounded to fp8 first, else NULL */
  size_t *pool;        /* (n_layers, 2 classes, K and V) where each pool of pages begins in `data` */
  uint8_t *data;
  /* With a budget: */
  int32_t *selection;  /* (n_slots, n_layers, n_kv_heads, choosers, ints of one) struct qtr_selection */
  double *page_score;  /* (max_pages) of the choice at work */
  int32_t *page_order; /* (max_pages) likewise */
};

/* Bytes of a linear's storage that `count * size` needs, zeroed; NULL and err filled when there is no such memory. */
void *qtr_reference_alloc(size_t count, size_t size, const char *what, struct qtr_error *err);

/* Element i of an F32, F16 or BF16 array that may lie at any address: tensors of a mapped file need not be aligned. */
static inline float qtr_reference_load(const void *data, enum qtr_dtype dtype, size_t i) {
  float f32;
  uint16_t f16;
  if (dtype == QTR_DTYPE_F32) {
    memcpy(&f32, (const char *)data + 4 * i, 4);
    return f32;
  }
  memcpy(&f16, (const char *)data + 2 * i, 2);
  return dtype == QTR_DTYPE_F16 ? qtr_f16_to_f32(f16) : qtr_bf16_to_f32(f16);
}

/* linear.c */
enum qtr_status qtr_reference_linear_create(struct qtr_backend *b, const struct qtr_linear_source *source,
                                            struct qtr_linear **linear, struct qtr_error *err);
void qtr_reference_linear_free(struct qtr_backend *b, struct qtr_linear *linear);
size_t qtr_reference_linear_bytes(const struct qtr_linear *linear);
void qtr_reference_linear(struct qtr_backend *b, const struct qtr_linear_args *args);
/* The exact accumulator of B.2 – B.4, for token row `x` (n_in codes) and weight row `row` (n_in codes). */
int32_t qtr_reference_dot(const int8_t *x, const int8_t *row, size_t n_in);

/* activation.c */
enum qtr_status qtr_reference_table_create(struct qtr_backend *b, const struct qtr_table_source *source,
                                           struct qtr_table **table, struct qtr_error *err);
void qtr_reference_table_free(struct qtr_backend *b, struct qtr_table *table);
enum qtr_status qtr_reference_input_create(struct qtr_backend *b, size_t max_tokens, size_t max_dim,
                                           struct qtr_input **input, struct qtr_error *err);
void qtr_reference_input_free(struct qtr_backend *b, struct qtr_input *input);
void qtr_reference_input_read(struct qtr_backend *b, const struct qtr_input *input, size_t token, size_t dim, int8_t *code,
                              float *scale, float *sum, float *value);
void qtr_reference_embed(struct qtr_backend *b, const struct qtr_embed_args *args);
void qtr_reference_rmsnorm(struct qtr_backend *b, const struct qtr_rmsnorm_args *args);
void qtr_reference_quant(struct qtr_backend *b, const struct qtr_quant_args *args);
void qtr_reference_gather(struct qtr_backend *b, const struct qtr_gather_args *args);

/* kv.c */
enum qtr_status qtr_reference_kv_create(struct qtr_backend *b, const struct qtr_kv_config *config, struct qtr_kv **kv,
                                        struct qtr_error *err);
enum qtr_kv_format qtr_reference_kv_format(const struct qtr_kv *kv);
const struct qtr_kv_heads *qtr_reference_kv_heads(const struct qtr_kv *kv);
void qtr_reference_kv_free(struct qtr_backend *b, struct qtr_kv *kv);
void qtr_reference_rope_kv_write(struct qtr_backend *b, const struct qtr_rope_kv_args *args);
void qtr_reference_kv_read(struct qtr_backend *b, const struct qtr_kv *kv, int32_t layer, bool is_v, int32_t page,
                           int32_t slot, int32_t head, uint16_t *code, float *scale, float *zero);
/* The page of one pool, in the byte layout of spec C.2, and its size. */
uint8_t *qtr_reference_kv_page(const struct qtr_kv *kv, int32_t layer, enum qtr_head_class class, bool is_v, int32_t page);
size_t qtr_reference_kv_page_bytes(const struct qtr_kv *kv, int32_t layer, enum qtr_head_class class, bool is_v);
void qtr_reference_stats_read(struct qtr_backend *b, const struct qtr_kv *kv, int32_t layer, int32_t page, int32_t logical,
                              int32_t head, float *max, float *min);
/* One head of one token, dequantised: out (head_dim). */
void qtr_reference_kv_row(const struct qtr_kv *kv, int32_t layer, bool is_v, int32_t page, int32_t slot, int32_t head,
                          float *out);

/* attention.c */
void qtr_reference_attention(struct qtr_backend *b, const struct qtr_attention_args *args);
void qtr_reference_selection_read(struct qtr_backend *b, const struct qtr_kv *kv, int32_t layer, int32_t q_head,
                                  int32_t slot, int32_t *page, int32_t *n, int32_t *tail);

#endif
