/* ops.h - what the files of quattuor-ops share. table.c owns the one table of (operation, shape, formats); data.c random
 * matrices, batches and the devices; check*.c compare a device with the reference through the vtable; perf*.c time the same
 * entries; ceiling.c measures what the machine can do at best.
 *
 * This is a test program: when memory runs out or a backend refuses, it says so and exits with 2. */
#ifndef QTR_TESTS_OPS_H
#define QTR_TESTS_OPS_H

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "backend/backend.h"
#include "base/checked.h"
#include "base/half.h"

/* ---- the table ----------------------------------------------------------------------------------- */

enum op_kind { OP_QUANT, OP_NORM, OP_LINEAR, OP_KV_WRITE, OP_ATTENTION, OP_SPARSE, OP_EMBED, OP_GATHER, N_OP_KINDS };
enum op_use {
  OP_CHECK = 1,
  OP_PERF = 2,
  OP_PERF_GPU = 4,  /* too large for a CPU */
  OP_CHECK_LONG = 8 /* an entry: checked with the patterns of this use too, which have steps of many tokens */
};
enum op_norm_format { OP_NORM_EXACT_FLOAT, OP_NORM_EXACT_INT8, OP_NORM_QSERVE_INT8, N_OP_NORM_FORMATS };

struct op_entry {
  enum op_kind kind;
  const char *shape;
  unsigned use;
  unsigned formats; /* bit set: linear formats, KV formats, norm variants, enum qtr_quant, or embedding dtypes */
  size_t n_in;      /* LINEAR: inputs; others: dim */
  size_t rows[QTR_MAX_PARTS];
  enum qtr_epilogue epilogue;
  bool bias;
  bool wild;         /* LINEAR g128: any second-level bytes, also such that wrap around (spec B.3) */
  size_t max_tokens; /* most tokens of a check; the counts in op_check_tokens up to it are tried */
  int32_t n_heads, n_kv_heads, head_dim;
  int32_t n_streaming;         /* SPARSE: so many of the KV heads */
  struct qtr_kv_sparse sparse; /* SPARSE: windows and choice of pages; the rest is filled in (op_sparse_fill) */
};
extern const struct op_entry op_table[];
extern const size_t n_op_table;

extern const size_t op_check_tokens[], n_op_check_tokens, op_perf_tokens[], n_op_perf_tokens,
    n_op_perf_tokens_host; /* the counts that a CPU is timed with come first */

#define OP_MAX_SEQS 12
struct op_pattern { /* a ragged batch: n_copies times these sequences */
  const char *name;
  unsigned use;
  int32_t n_copies, n_seqs;
  struct {
    int32_t kv_len, q_len, decode_start; /* the last only matters to SPARSE */
  } seq[OP_MAX_SEQS];
};
extern const struct op_pattern op_patterns[], op_sparse_patterns[]; /* the latter for SPARSE */
extern const size_t n_op_patterns, n_op_sparse_patterns;

size_t op_n_parts(const struct op_entry *e);
size_t op_n_out(const struct op_entry *e);                                    /* rows of all parts */
size_t op_out_width(const struct op_entry *e);                                /* of the result: half with SILU_MUL */
void op_name(const struct op_entry *e, unsigned format, char *out, size_t n); /* "linear/w4a8/llama-1b.qkv" */

/* ---- data ---------------------------------------------------------------------------------------- */

struct op_rng {
  uint64_t state;
};
uint64_t op_rng_next(struct op_rng *rng);
size_t op_rng_below(struct op_rng *rng, size_t n); /* 0 … n-1 */
float op_rng_uniform(struct op_rng *rng);          /* [0, 1) */
float op_rng_normal(struct op_rng *rng);           /* mean 0, deviation 1, nearly; within ±3.5 */

void *op_malloc(size_t count, size_t size); /* zeroed; exits when there is none */
/* Rows of activations (n, dim): normal, some with outliers, a mean, all zero, tiny. */
float *op_activations(struct op_rng *rng, size_t n, size_t dim);

/* A random matrix in its disk format. */
struct op_matrix {
  struct qtr_linear_source source;
  float *row_norm; /* (n_out) floating-point formats: Euclidean norm of each row; else NULL */
};
void op_matrix_make(struct op_rng *rng, const struct op_entry *e, enum qtr_linear_format format, struct op_matrix *m);
void op_matrix_free(struct op_matrix *m);

/* A batch with its arrays, and the page tables of its sequences: random pages, in random order; entries not needed are -1.
 */
struct op_batch {
  struct qtr_batch batch;
  int32_t *position, *q_start, *kv_len, *block_table;
  int32_t *stream_all, *stream_table, *decode_start, *slot; /* of a sparse batch; stream_all: without entries hidden */
};
void op_batch_make(struct op_rng *rng, const struct op_pattern *p, int32_t *n_pages, struct op_batch *b);
/* Makes it a batch for a sparse cache: pages of the streaming heads (other numbers), decode_start, slots 0 … n_seqs - 1 in
 * another order. Entries that no query sees in its windows are -1 in the batch's stream_table. */
void op_batch_sparse(struct op_rng *rng, const struct op_pattern *p, int32_t n_pages, const struct qtr_kv_sparse *sparse,
                     struct op_batch *b);
/* Of sequence s of a batch the tokens at `position` … position + n - 1; slot: of a sparse batch. */
void op_batch_part(const struct op_batch *all, int32_t s, int32_t position, int32_t n, int32_t slot,
                   const struct qtr_kv_sparse *sparse, struct op_batch *part);
/* An entry's settings of a cache for a batch of n_seqs sequences and its heads: streaming (n_layers, n_kv_heads), kept; they
 * are spread over the heads, otherwise in odd layers than in even ones. */
void op_sparse_fill(const struct op_entry *e, int32_t n_layers, int32_t n_seqs, int32_t max_pages, uint8_t *streaming,
                    struct qtr_kv_sparse *sparse);
/* One sequence, tokens kv_len … kv_len + q_len - 1, with a given table. */
void op_batch_single(const int32_t *table, int32_t max_blocks, int32_t kv_len, int32_t q_len, struct op_batch *b);
/* The same sequences, all `tokens` further. */
void op_batch_move(struct op_batch *b, int32_t tokens, const struct qtr_kv_sparse *sparse);
void op_batch_free(struct op_batch *b);

/* ---- devices ------------------------------------------------------------------------------------- */

struct op_device {
  struct qtr_backend *b;
  const struct qtr_backend_ops *ops;
  struct qtr_caps caps;
  size_t act_bytes;
};
void op_must(enum qtr_status status, const struct qtr_error *err);
void *op_upload(const struct op_device *d, const float *x, size_t n);
void op_download(const struct op_device *d, const void *x, enum qtr_dtype dtype, size_t n, float *host);
void *op_at(const struct op_device *d, const void *x, size_t index); /* address of activation value `index` */
struct qtr_input *op_input(const struct op_device *d, size_t n_tokens, size_t dim);
struct qtr_linear *op_linear(const struct op_device *d, const struct qtr_linear_source *source);
/* inv_freq: (half_dim); NULL: of a step that rotates nothing. */
void op_step_begin(const struct op_device *d, const struct qtr_batch *batch, const float *inv_freq, int32_t half_dim);
void op_step_end(const struct op_device *d);

/* ---- check --------------------------------------------------------------------------------------- */

struct op_diff { /* what a check found */
  size_t n, n_bad, n_ties, n_tie_rows;
  double worst; /* largest error as a fraction of its tolerance */
  char first[256];
};
void op_bad(struct op_diff *diff, const char *format, ...) __attribute__((format(printf, 2, 3)));
static inline void op_compare(struct op_diff *diff, double got, double expected, double tolerance, const char *what,
                              size_t i, size_t j) {
  double error = fabs(got - expected);
  diff->n++;
  if (error <= tolerance) {
    if (tolerance > 0 && error > diff->worst * tolerance) diff->worst = error / tolerance;
  } else if (!(got == expected)) {
    op_bad(diff, "%s [%zu, %zu] is %.9g, expected %.9g (tolerance %.3g)", what, i, j, got, expected, tolerance);
  }
}

struct op_check {
  struct op_device ref, dev;
  struct op_rng rng;
};
/* Compares row `dev_row` of an input that the device quantised with row `ref_row` of the reference's; x (dim): the values.
 */
void op_compare_input(const struct op_check *c, enum qtr_quant quant, const struct qtr_input *ref, size_t ref_row,
                      const struct qtr_input *dev, size_t dev_row, const float *x, size_t dim, struct op_diff *diff);
void op_check_quant(struct op_check *c, const struct op_entry *e, enum qtr_quant quant, struct op_diff *diff);
void op_check_norm(struct op_check *c, const struct op_entry *e, enum op_norm_format format, struct op_diff *diff);
void op_check_embed(struct op_check *c, const struct op_entry *e, enum qtr_dtype dtype, struct op_diff *diff);
void op_check_gather(struct op_check *c, const struct op_entry *e, struct op_diff *diff);
void op_check_linear(struct op_check *c, const struct op_entry *e, enum qtr_linear_format format, struct op_diff *diff);
void op_check_kv_write(struct op_check *c, const struct op_entry *e, enum qtr_kv_format format, struct op_diff *diff);
void op_check_attention(struct op_check *c, const struct op_entry *e, enum qtr_kv_format format, struct op_diff *diff);

/* ---- perf ---------------------------------------------------------------------------------------- */

struct op_ceiling {
  double read_gbs;  /* DRAM read stream, GB/s, all threads */
  double int8_gops; /* int8 multiply-adds counted as 2, all threads; 0 = not measured */
  const char *int8_name;
};
void op_ceiling_measure(int threads, const char *isa, struct op_ceiling *ceiling);
/* Prints one line. */
void op_report(const struct op_ceiling *c, const char *name, const char *batch, double seconds, double bytes,
               double operations, bool int8, bool json);
void op_perf_sparse(const struct op_device *d, const struct op_ceiling *ceiling, const struct op_entry *e,
                    enum qtr_kv_format format, const struct op_pattern *p, const char *name, bool json, struct op_rng *rng);
void op_perf(const struct op_device *d, const struct op_ceiling *ceiling, const struct op_entry *e, unsigned format,
             bool json, struct op_rng *rng);

#endif
