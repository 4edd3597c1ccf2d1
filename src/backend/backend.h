/* backend.h - the one interface between the model and the machine.
 *
 * The forward pass (src/model/forward.c) is written once against these operations; `reference` is the oracle, `cpu` and
 * `cuda` are the fast ones. Each operation takes one const struct, which tests/ops and the benchmarks use as well. Nothing
 * above knows a tile, a stream or an intrinsic.
 *
 * Memory. Activations live in backend memory from `alloc`, in the backend's activation type (`caps.act_dtype`: F32 on CPUs,
 * F16 on GPUs). Pointers marked "device" below are such memory; on CPUs the host can read it. A linear layer's input is a
 * `struct qtr_input`: it holds the values quantised (or not) as that layer wants them, in the backend's own layout.
 *
 * Order. Operations of one step are issued between begin_step and end_step from one thread and run in that order.
 *
 * Numerics. With W the dequantised weight, every linear computes what spec B.2 – B.4 say, its int32 accumulators exact. So
 * results do not depend on the batch a token travels in, on the tiling, or on the chunks of its prompt: backends must keep
 * it that way in the floating-point operations too (one fixed order of reduction for each row), or say where they do not.
 * Attention always reads K and V back from the cache as they were stored, also for the tokens of the running step: so
 * chunked prefill, prefix-cache hits and recomputation give the same result as one whole prefill. (The reference system
 * reads unquantised K and V within a step; spec C.5.)
 */
#ifndef QTR_BACKEND_BACKEND_H
#define QTR_BACKEND_BACKEND_H

#include "quattuor/quattuor.h"

enum qtr_dtype {
  QTR_DTYPE_F32,
  QTR_DTYPE_F16,
  QTR_DTYPE_BF16,
  QTR_DTYPE_F64,
  QTR_DTYPE_I8,
  QTR_DTYPE_U8,
  QTR_DTYPE_I16,
  QTR_DTYPE_I32,
  QTR_DTYPE_I64,
  QTR_DTYPE_BOOL,
  QTR_DTYPE_F8_E4M3,
  QTR_DTYPE_F8_E5M2,
  QTR_N_DTYPES
};
size_t qtr_dtype_bytes(enum qtr_dtype dtype);
const char *qtr_dtype_name(enum qtr_dtype dtype); /* "F16": the safetensors spelling */

#define QTR_PAGE_TOKENS 64 /* tokens of a KV page (spec C.1) */
#define QTR_ALL_TOKENS INT32_MAX
#define QTR_GROUP 128   /* input channels of a weight group (spec A.2.2) */
#define QTR_MAX_PARTS 3 /* q, k, v */

/* ---- weights ------------------------------------------------------------------------------------- */

enum qtr_linear_format {
  QTR_LINEAR_F32,
  QTR_LINEAR_F16,
  QTR_LINEAR_BF16,
  QTR_LINEAR_W8A8,      /* spec A.2.3, B.4 */
  QTR_LINEAR_W4A8,      /* per channel; spec A.2.1, B.2 */
  QTR_LINEAR_W4A8_G128, /* progressive groups; spec A.2.2, B.3 */
  QTR_N_LINEAR_FORMATS
};
const char *qtr_linear_format_name(enum qtr_linear_format format); /* "w4a8-g128" */

/* One matrix as it lies on disk. Host memory, borrowed. */
struct qtr_linear_part {
  size_t n_out;            /* rows */
  const void *weight;      /* F32/F16/BF16/W8A8: (n_out, n_in) row major; W4A8*: packed nibbles, spec A.3 */
  const float *scale;      /* (n_out) W8A8 dequant_scale, W4A8* s1_scales: fp16 values as float; else NULL */
  const float *szero;      /* (n_out) W4A8 per-channel s1_szeros; else NULL */
  const uint8_t *s2_scale; /* (n_in/128, n_out) g128, permuted as on disk (A.4.2); else NULL */
  const uint8_t *s2_zero;  /* same */
  const float *bias;       /* (n_out) or NULL */
};

/* Up to three parts, concatenated along their rows (A.6): q|k|v or gate|up. */
struct qtr_linear_source {
  enum qtr_linear_format format;
  size_t n_in;
  size_t n_parts;
  struct qtr_linear_part part[QTR_MAX_PARTS];
  bool gate_up; /* two parts of equal rows, used with QTR_EPILOGUE_SILU_MUL only: the backend may interleave their rows */
  bool borrow;  /* weight memory outlives the linear: a backend whose layout is the disk's may use it in place */
};

struct qtr_linear; /* a repacked matrix, backend's own */
struct qtr_table;  /* an embedding table, backend's own */

/* Rows of an embedding. F32/F16/BF16, or I8 with one scale a row. Borrowed: must outlive the table on CPU backends. */
struct qtr_table_source {
  enum qtr_dtype dtype;
  size_t n_rows, dim;
  const void *data;   /* (n_rows, dim) */
  const float *scale; /* (n_rows) for I8; else NULL */
};

/* ---- linear input -------------------------------------------------------------------------------- */

/* How a linear wants its input. */
enum qtr_quant {
  QTR_QUANT_NONE, /* floating-point linears: the values themselves */
  QTR_QUANT_INT8  /* per token symmetric int8 (B.6), with the token's scale, its sum Σx, and whatever the backend adds */
};
enum qtr_quant qtr_linear_quant(enum qtr_linear_format format);

struct qtr_input; /* room for (max_tokens, max_dim) values in one of the forms; backend's own layout */

/* ---- KV cache ------------------------------------------------------------------------------------ */

enum qtr_kv_format {
  QTR_KV_F16,
  QTR_KV_INT8,        /* per token and head, asymmetric (C.3.1), codes 0…255 */
  QTR_KV_INT4,        /* same, codes 0…15 */
  QTR_KV_INT8_STATIC, /* per layer scales of K and V, symmetric (C.3.2) */
  QTR_N_KV_FORMATS
};
/* For comparison only: K and V are rounded to fp8 before they go into a cache of format F16 (backend/common/kv_fp8.h). */
enum qtr_kv_fp8 { QTR_KV_FP8_OFF, QTR_KV_FP8_E4M3, QTR_KV_FP8_E5M2 };
const char *qtr_kv_format_name(enum qtr_kv_format format); /* "kv4", "kv8", "kv8-static", "kv16" */

/* What a streaming head sees: the query at position p sees the keys t <= p with t < sink or p - t < local, at the positions
 * they have. local QTR_ALL_TOKENS: every key. */
struct qtr_kv_window {
  int32_t sink, local; /* >= 0, >= 1 */
};

/* Sparse attention (spec D, docs/long-context.md). Everything depends on the query's position and on whether its token was
 * given or generated (qtr_batch.decode_start), never on how tokens come in steps. So chunks, in-flight batching and
 * recomputation change nothing.
 *
 * Streaming heads see a window. Retrieval heads see every key, but for queries of generated tokens at positions p >= budget:
 * those see `budget / 64` pages (at least 3), the first and the newest (the query's own) always among them, the others those
 * with the largest bound on q·k:
 *   score(page) = max over its logical pages s of  sum_i max(q_i kmax_i(s), q_i kmin_i(s))                     (spec D.5)
 * with the elementwise extremes of the keys of s after RoPE, rounded to fp16. Of equal scores the earlier page is taken. The
 * choice is made anew at position max(decode_start, budget) and wherever (p + 1) % interval == 0; in between the chosen
 * pages stay, and all pages from that position's own on belong to them. */
struct qtr_kv_sparse {
  const uint8_t *streaming; /* (n_layers, n_kv_heads) 1 = streaming head; NULL: none. Borrowed during kv_create */
  struct qtr_kv_window context, decode; /* of streaming heads: queries of given tokens, of generated tokens */
  int32_t budget;         /* tokens, a multiple of 64; 0 = retrieval heads see everything, no statistics kept */
  int32_t interval;       /* >= 1 */
  int32_t logical_tokens; /* 16, 32 or 64 tokens share their statistics */
  bool each_head;         /* each query head chooses; false: those of a KV head together, by their largest score */
  int32_t group;          /* query heads of a KV head */
  int32_t n_slots;        /* qtr_batch.slot is below this */
  int32_t max_pages;      /* pages of the longest sequence */
};

struct qtr_kv_config {
  enum qtr_kv_format format;
  int32_t n_layers, n_kv_heads, head_dim, n_pages;
  const float *static_scale;          /* (n_layers, 2) K and V scale, for INT8_STATIC and, if not NULL, fp8; borrowed during
                                         kv_create */
  enum qtr_kv_fp8 fp8;                /* with F16; backends without it refuse */
  const struct qtr_kv_sparse *sparse; /* NULL: dense. Borrowed during kv_create */
  int32_t n_stream_pages;             /* pages of the streaming heads' pool; 0 without such heads */
};

/* Bytes of one page of 64 tokens over all layers and heads, K and V: what the pool costs. head_dim 128, KV4: 136 bytes a
 * token, head and layer. INT4/INT8: codes + fp16 scale + fp16 zero per token and head. Streaming heads do not count; the
 * statistics of a selection do. Returns 0 when there are none but streaming heads, SIZE_MAX on overflow. */
size_t qtr_kv_page_bytes(const struct qtr_kv_config *config);
/* The same of a page of the streaming heads; 0 without such heads. */
size_t qtr_kv_stream_page_bytes(const struct qtr_kv_config *config);
/* What a cache costs besides its pages: the lists of chosen pages, of all slots. 0 without a selection, SIZE_MAX on
 * overflow. */
size_t qtr_kv_selection_bytes(const struct qtr_kv_config *config);

struct qtr_kv;       /* the pages of all layers */
struct qtr_kv_heads; /* where each head's pages are, common/sparse.h */

/* ---- batch --------------------------------------------------------------------------------------- */

/* One token of a row whose logit is changed before anything else: bias, then penalties (spec E.4). */
struct qtr_choose_adjust {
  int32_t token;
  int32_t count; /* occurrences in the output; 0 = in the prompt only; -1 = in neither, there is a bias only */
  float bias;
};

/* How one row of logits becomes a token (spec E.4). */
struct qtr_choose_row {
  float temperature, top_p, min_p; /* temperature 0: greedy */
  int32_t top_k;                   /* -1 = off */
  int32_t n_top;                   /* -1 = no log-probabilities; 0 … 20 best tokens wanted besides the chosen one's */
  int32_t skip;                    /* nonzero: this row is chosen by the caller */
  int32_t first_adjust, n_adjust;  /* its part of the batch's adjustments, each token once */
  int32_t pending; /* nonzero: the token whose logits the row are counts as output as well. It is below 0 in the batch (see
                      ops.launch), so the adjustments could not count it; the device does */
  float repetition_penalty, presence_penalty, frequency_penalty;
  uint64_t seed, position; /* of the random stream, as in engine/sampler.h */
};
enum { QTR_CHOOSE_NONE = -1 /* nothing finite */, QTR_CHOOSE_UNDECIDED = -2 /* the caller must look at the row */ };
#define QTR_CHOOSE_SURE_TOP_K 1024
/* Of rows without `skip` only others than these may be left undecided. */
static inline bool qtr_choose_sure(const struct qtr_choose_row *row) {
  return row->temperature == 0 || (row->top_k <= QTR_CHOOSE_SURE_TOP_K && (row->top_k > 0 || row->top_p >= 1));
}
struct qtr_choose_result {
  int32_t token; /* or one of the above */
  int32_t n_top;
  float logit;         /* of the token; with n_top >= 0 */
  float top_logit[20]; /* best first; with n_top >= 0 */
  int32_t top_token[20];
  float best;     /* largest logit of the row */
  double exp_sum; /* with n_top >= 0: sum over the row of exp(logit - best) */
};

/* What one step computes: a ragged batch of prefill chunks and decode tokens. All arrays are host memory and stay unchanged
 * until end_step. Positions count from 0; token i of sequence s has position kv_len[s] + i. */
struct qtr_batch {
  int32_t n_tokens, n_seqs, n_logit_rows;
  int32_t max_blocks;             /* row length of block_table */
  int32_t room_tokens, room_rows; /* rows that the step's buffers have room for: a backend may compute up to that many, and
                                     throw the rest away. 0: exactly n_tokens and n_logit_rows */
  const int32_t *token;           /* (n_tokens) ids, each below the vocabulary size; below 0: see ops.launch */
  const int32_t *position;        /* (n_tokens) */
  const int32_t *q_start;         /* (n_seqs + 1) first token of each sequence; q_start[n_seqs] = n_tokens */
  const int32_t *kv_len;          /* (n_seqs) tokens cached before this step */
  const int32_t *block_table;     /* (n_seqs, max_blocks) page numbers; entries up to (kv_len + q_len - 1) / 64 are valid */
  const int32_t *logit_row;       /* (n_logit_rows) token indices, ascending, whose logits are wanted */
  /* decode_start: the first position whose token was generated; NULL: all tokens were given. Queries of a sparse cache see
   * otherwise from there on; any backend may compute generated tokens, whose step has gone by, in the way it has with one
   * token a step. The others are of a sparse cache, NULL with any other. stream_table: pages of the streaming heads' pool;
   * entries that no query of this step sees are -1; NULL: block_table serves both. slot: where the sequence's chosen pages
   * stay from step to step; needed with a budget and decode_start. No two sequences of a step share one, and a sequence's
   * first position with a selection comes before all others (position max(decode_start, budget)), whoever had the slot
   * before. */
  const int32_t *stream_table;            /* (n_seqs, max_blocks) */
  const int32_t *decode_start;            /* (n_seqs) */
  const int32_t *slot;                    /* (n_seqs) */
  const struct qtr_choose_row *choose;    /* NULL, or (n_logit_rows): a backend that can (ops.choose) samples these rows */
  struct qtr_choose_result *chosen;       /* (n_logit_rows), there when the step has ended */
  const struct qtr_choose_adjust *adjust; /* (n_adjust) */
  int32_t n_adjust;
};

/* ---- operations ---------------------------------------------------------------------------------- */

struct qtr_embed_args {
  const struct qtr_table *table;
  void *out; /* device (batch.n_tokens, dim) */
};

/* RMSNorm, then quantise as `input` was prepared (B.7, B.8). */
struct qtr_rmsnorm_args {
  const void *x;      /* device (n_tokens, dim) */
  const void *weight; /* device (dim) from `upload_floats` */
  struct qtr_input *out;
  enum qtr_quant quant;
  enum qtr_norm norm; /* QTR_NORM_QSERVE subtracts the mean and rounds as B.7; only with QTR_QUANT_INT8 */
  float eps;
  size_t n_tokens, dim;
};

struct qtr_quant_args { /* B.6 */
  const void *x;        /* device (n_tokens, dim) */
  struct qtr_input *out;
  enum qtr_quant quant;
  size_t n_tokens, dim;
};

enum qtr_epilogue {
  QTR_EPILOGUE_STORE,    /* out = y                        (n_tokens, n_out) */
  QTR_EPILOGUE_ADD,      /* out += y, the residual stream  (n_tokens, n_out) */
  QTR_EPILOGUE_SILU_MUL, /* out = silu(y_gate) * y_up      (n_tokens, n_out/2); B.9 */
  QTR_EPILOGUE_LOGITS    /* out = y as F32 whatever act_dtype is */
};

struct qtr_linear_args { /* B.2, B.3, B.4 */
  const struct qtr_linear *linear;
  const struct qtr_input *input; /* filled with n_tokens rows of n_in values */
  enum qtr_epilogue epilogue;
  void *out; /* device */
  size_t n_tokens;
};

/* RoPE on q and k in place (C.4), then K and V into the cache (C.3). Cosines and sines come from begin_step. */
struct qtr_rope_kv_args {
  void *qkv; /* device (batch.n_tokens, (n_heads + 2 n_kv_heads) * head_dim) */
  struct qtr_kv *kv;
  int32_t layer, n_heads, n_kv_heads, head_dim;
};

/* softmax(q·K^T * scale) V, causal, over the cached tokens of each sequence, those of this step included (C.5): all of them,
 * or of a sparse cache those that the head sees, after choosing pages where that is due (struct qtr_kv_sparse). */
struct qtr_attention_args {
  const void *qkv; /* device, as above, after RoPE; only q is read */
  const struct qtr_kv *kv;
  void *out;   /* device (batch.n_tokens, n_heads * head_dim) */
  float scale; /* 1/sqrt(head_dim) */
  int32_t layer, n_heads, n_kv_heads, head_dim;
};

struct qtr_gather_args {
  const void *x; /* device (batch.n_tokens, dim) */
  void *out;     /* device (batch.n_logit_rows, dim): rows batch.logit_row */
  size_t dim;
};

struct qtr_choose_args {
  void *logits;                           /* device (n_rows, vocab_size) F32; as it was, when the step has ended */
  const struct qtr_choose_row *row;       /* host (n_rows), unchanged until end_step */
  struct qtr_choose_result *result;       /* host (n_rows), there after end_step */
  const struct qtr_choose_adjust *adjust; /* host (n_adjust), unchanged until end_step */
  int32_t n_rows, vocab_size, n_adjust;
};

struct qtr_caps {
  enum qtr_dtype act_dtype;
  const char *device;               /* "cpu"; static */
  char description[128];            /* "Intel Xeon …, AMX int8, 2 threads" */
  size_t memory_total, memory_free; /* of the memory that holds weights and KV */
  int32_t threads;
  int32_t step_tokens; /* a good token budget for one step */
  float memory_share;  /* of free memory that KV pages may take; 0 = the engine's choice */
  bool ahead;          /* there are ops.launch and ops.choose, and a second step may be launched before the first ends */
};

struct qtr_backend_options {
  int32_t threads; /* 0 = all cores this process may use */
  const char *isa; /* NULL = best; "portable" … "amx", on GPUs "sm80": for tests; also QUATTUOR_ISA */
  int32_t gpu;     /* which GPU, 0 = the first */
};

struct qtr_backend {
  const struct qtr_backend_ops *ops;
};

struct qtr_backend_ops {
  const char *name;
  enum qtr_status (*open)(const struct qtr_backend_options *options, struct qtr_backend **backend, struct qtr_error *err);
  void (*close)(struct qtr_backend *b);
  void (*caps)(struct qtr_backend *b, struct qtr_caps *caps);

  enum qtr_status (*alloc)(struct qtr_backend *b, size_t n_bytes, void **device, struct qtr_error *err); /* 64-aligned */
  void (*free)(struct qtr_backend *b, void *device);
  enum qtr_status (*upload_floats)(struct qtr_backend *b, const float *x, size_t n, void **device, struct qtr_error *err);
  /* Copies act_dtype values to host floats; waits for the operations before it. */
  enum qtr_status (*download)(struct qtr_backend *b, const void *device, enum qtr_dtype dtype, size_t n, float *host,
                              struct qtr_error *err);

  enum qtr_status (*linear_create)(struct qtr_backend *b, const struct qtr_linear_source *source, struct qtr_linear **linear,
                                   struct qtr_error *err);
  void (*linear_free)(struct qtr_backend *b, struct qtr_linear *linear);
  size_t (*linear_bytes)(const struct qtr_linear *linear); /* memory it occupies, borrowed weights included */
  enum qtr_status (*table_create)(struct qtr_backend *b, const struct qtr_table_source *source, struct qtr_table **table,
                                  struct qtr_error *err);
  void (*table_free)(struct qtr_backend *b, struct qtr_table *table);
  enum qtr_status (*input_create)(struct qtr_backend *b, size_t max_tokens, size_t max_dim, struct qtr_input **input,
                                  struct qtr_error *err);
  void (*input_free)(struct qtr_backend *b, struct qtr_input *input);
  enum qtr_status (*kv_create)(struct qtr_backend *b, const struct qtr_kv_config *config, struct qtr_kv **kv,
                               struct qtr_error *err);
  void (*kv_free)(struct qtr_backend *b, struct qtr_kv *kv);
  enum qtr_kv_format (*kv_format)(const struct qtr_kv *kv);
  const struct qtr_kv_heads *(*kv_heads)(const struct qtr_kv *kv); /* for profiles; NULL: every cache counts as dense */

  /* inv_freq: (head_dim/2) host floats, RoPE frequencies with any scaling already in them. */
  enum qtr_status (*begin_step)(struct qtr_backend *b, const struct qtr_batch *batch, const float *inv_freq, size_t half_dim,
                                struct qtr_error *err);
  enum qtr_status (*end_step)(struct qtr_backend *b, struct qtr_error *err); /* waits; reports what went wrong */
  /* Optional, both or neither: end_step in two. `launch` hands the step to the device and returns; but for `chosen` the
   * batch's arrays are the caller's again. `collect` waits for the oldest step that was launched; its `chosen` is there
   * then. The next step may begin after a launch, so two may be under way: the device runs them in order, and a token -1 - i
   * of the second's batch is the one that the first chooses for its row i (any, if it chooses none). What a step leaves in
   * buffers, its logits above all, is gone when the next one is launched. `download` waits for both. */
#define QTR_STEPS_UNDER_WAY 2
  enum qtr_status (*launch)(struct qtr_backend *b, struct qtr_error *err);
  enum qtr_status (*collect)(struct qtr_backend *b, struct qtr_error *err);

  /* The operations of a step cannot fail on a CPU; a GPU reports in end_step. */
  void (*embed)(struct qtr_backend *b, const struct qtr_embed_args *args);
  void (*rmsnorm)(struct qtr_backend *b, const struct qtr_rmsnorm_args *args);
  void (*quant)(struct qtr_backend *b, const struct qtr_quant_args *args);
  void (*linear)(struct qtr_backend *b, const struct qtr_linear_args *args);
  void (*rope_kv_write)(struct qtr_backend *b, const struct qtr_rope_kv_args *args);
  void (*attention)(struct qtr_backend *b, const struct qtr_attention_args *args);
  void (*gather)(struct qtr_backend *b, const struct qtr_gather_args *args);

  /* Optional: NULL where the caller samples on the host. The same token that engine/sampler.c gives for the same row. */
  void (*choose)(struct qtr_backend *b, const struct qtr_choose_args *args);
  /* Optional: NULL where operations are done when they return, so that the host's clock times them. `stamp` marks a moment
   * between operations of a step; `stamps_read` gives the seconds between consecutive stamps of the last step, at most n,
   * and how many there are. `wait` returns when all operations so far are done. */
  void (*stamp)(struct qtr_backend *b);
  size_t (*stamps_read)(struct qtr_backend *b, double *seconds, size_t n);
  void (*wait)(struct qtr_backend *b);
  /* Optional: seconds, since the backend was opened, that the device worked on steps, and that it waited between one step
   * and the next. */
  void (*busy_read)(struct qtr_backend *b, double *busy, double *idle);
  /* Optional: bytes a second that a large copy inside the device's memory moves, read and written, measured now. NULL where
   * the host's memory is the device's. 0: no room to measure. */
  double (*copy_speed)(struct qtr_backend *b);

  /* For tests: what is stored, whatever the layout. Optional: NULL where a backend cannot.
   * input_read: dequantisable content of row `token`: codes (dim) when quantised, scale, sum; or values (dim) as floats.
   * kv_read: codes (head_dim) as integers (F16: the half's bits), scale and zero (0 where the format has none). The page is
   * one of the head's own pool. */
  void (*input_read)(struct qtr_backend *b, const struct qtr_input *input, size_t token, size_t dim, int8_t *code,
                     float *scale, float *sum, float *value);
  void (*kv_read)(struct qtr_backend *b, const struct qtr_kv *kv, int32_t layer, bool is_v, int32_t page, int32_t slot,
                  int32_t head, uint16_t *code, float *scale, float *zero);
  /* The pages that a query head (of a retrieval head) chose last in a slot, ascending: page[(*n)], *n < max(3, budget / 64);
   * besides them it reads every page from *tail on. Statistics of one logical page of a retrieval head: (head_dim) each. */
  void (*selection_read)(struct qtr_backend *b, const struct qtr_kv *kv, int32_t layer, int32_t q_head, int32_t slot,
                         int32_t *page, int32_t *n, int32_t *tail);
  void (*stats_read)(struct qtr_backend *b, const struct qtr_kv *kv, int32_t layer, int32_t page, int32_t logical,
                     int32_t head, float *max, float *min);
};

/* name: "auto", "cpu", "reference", "cuda". QTR_ERR_NOT_FOUND lists what there is. */
enum qtr_status qtr_backend_open(const char *name, const struct qtr_backend_options *options, struct qtr_backend **backend,
                                 struct qtr_error *err);
void qtr_backend_close(struct qtr_backend *b);

extern const struct qtr_backend_ops qtr_backend_reference, qtr_backend_cpu;
extern const struct qtr_backend_ops qtr_backend_cuda; /* in builds with CUDA (QTR_HAVE_CUDA) */

#endif
