/* quattuor.h - the public C interface of Quattuor.
 *
 * An engine owns one model, one backend and one KV pool, and serves many requests at once by in-flight
 * batching. Everything is opaque but plain option, event and statistics structs.
 *
 * Threads: every function of an engine may be called from any thread at any time; an internal mutex orders
 * them. `qtr_engine_step` does the work and holds the engine only while it schedules and while it publishes
 * events, not while the model runs, so `add`, `cancel` and `poll` never wait for a step. Only one thread at a
 * time steps; a second caller gets QTR_ERR_STATE. Events of one request come in order. A struct qtr_error is
 * filled by the call that failed and belongs to the caller.
 *
 * Strings are UTF-8. Sizes are in bytes, times in seconds unless the name says otherwise.
 */
#ifndef QUATTUOR_H
#define QUATTUOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QTR_VERSION_MAJOR 0
#define QTR_VERSION_MINOR 1
#define QTR_VERSION_PATCH 0

#if defined(__GNUC__)
#define QTR_API __attribute__((visibility("default")))
#else
#define QTR_API
#endif

/* ---- errors -------------------------------------------------------------------------------------- */

enum qtr_status {
  QTR_OK = 0,
  QTR_ERR_ARGUMENT,    /* a caller's value is wrong; the message names it */
  QTR_ERR_IO,          /* a file cannot be opened, read or written */
  QTR_ERR_FORMAT,      /* a file or text is malformed or inconsistent */
  QTR_ERR_UNSUPPORTED, /* well formed, but not something Quattuor does */
  QTR_ERR_MEMORY,      /* allocation failed or a memory limit would be passed */
  QTR_ERR_LIMIT,       /* the request can never fit: too long, pool too small */
  QTR_ERR_NOT_FOUND,   /* no such file, tensor, request, device */
  QTR_ERR_STATE,       /* the call does not fit the state of the object */
  QTR_ERR_BACKEND      /* the device failed; the engine is dead, the process is not */
};

struct qtr_error {
  enum qtr_status status;
  char message[512]; /* one line, names the thing and the way out */
};

QTR_API const char *qtr_status_name(enum qtr_status status); /* "QTR_ERR_IO"; static */
QTR_API const char *qtr_version(void);                       /* "0.1.0"; static */

/* ---- engine -------------------------------------------------------------------------------------- */

struct qtr_engine;

enum qtr_norm { QTR_NORM_EXACT = 0, QTR_NORM_QSERVE = 1 }; /* spec B.7 */

/* Sparse attention (docs/long-context.md). Off unless static_sparsity > 0 or decode_mode != 0. */
struct qtr_sparse_options {
  const char *heads_dir;       /* directory with full_attention_heads.tsv; needed when static_sparsity > 0, or … */
  const double *heads;         /* … its numbers: (layers, KV heads), 0 … 1, those needed least stream first. Borrowed */
  float static_sparsity;       /* 0 … 1: share of KV heads that become streaming heads; 0 */
  bool context_mode;           /* streaming heads see a window in prompts as well; false: everything */
  int32_t ctx_sink, ctx_local; /* tokens, with context_mode; 128, 8192 */
  int32_t dec_sink, dec_local; /* tokens, for generated tokens; 128, 256 */
  int32_t decode_mode;         /* 0: retrieval heads read everything; 1: for generated tokens the pages that matter; 0 */
  int32_t token_budget;        /* tokens that they then read, a multiple of 64; 4096 */
  int32_t selector_interval;   /* steps between two choices of pages; 4 */
  int32_t sub_chunks;          /* 4, 2 or 1 sets of statistics in a page of 64 tokens; 4 */
  bool each_head;              /* the query heads of a KV head choose each for itself, not together */
  int32_t stream_pages;        /* pages of the streaming heads' pool; 0 = as many as sequences need at once */
};

struct qtr_engine_options {
  const char *model_dir;            /* Hugging Face or QServe directory; required */
  const char *device;               /* "auto" (a GPU when there is one), "cpu", "cuda", "reference"; NULL = "auto" */
  int32_t gpu;                      /* which GPU of several; 0 = the first */
  const char *precision;            /* NULL = as found; "w4a8kv8" … : the weights must match, the KV width is free */
  const char *kv_scales;            /* NULL, or "static" to use the file's static per-tensor KV8 scales (spec A.2.5) */
  const char *kv_fp8;               /* NULL, or "e4m3", "e5m2": for comparison, K and V of a kv16 cache are rounded to fp8
                                       first, by the static scales if they are asked for, else as they are; CPU only */
  const char *kv_quant_params_path; /* NULL, or a file of static KV8 scales (vLLM's JSON, see docs/quantisation.md), which
                                       are used instead of the file's; means kv_scales "static" */
  int32_t group_size;               /* 0 = as found; -1 or 128: checked against the file */
  int32_t threads;                  /* 0 = all cores this process may use */
  int32_t max_num_seqs;             /* sequences that run at once; 0 = 256 */
  int32_t max_num_batched_tokens;   /* token budget of one step; 0 = the backend's best */
  int32_t max_model_len;            /* prompt + generated tokens of one request; 0 = the model's own limit */
  size_t kv_bytes;                  /* size of the KV pool; 0 = from free memory */
  int32_t kv_pages;                 /* pages of 64 tokens; 0 = from kv_bytes; the larger wish wins nothing: this one does */
  bool no_prefix_cache;
  enum qtr_norm norm;
  struct qtr_sparse_options sparse;
};

/* Fills every field with its default. */
QTR_API void qtr_engine_options_init(struct qtr_engine_options *options);

/* Loads the model and makes the pool. On QTR_OK the caller owns *engine. Strings in `options` are copied. */
QTR_API enum qtr_status qtr_engine_open(const struct qtr_engine_options *options, struct qtr_engine **engine,
                                        struct qtr_error *err);

/* Cancels what runs and frees everything. NULL is allowed. No other call may be in progress. */
QTR_API void qtr_engine_close(struct qtr_engine *engine);

/* ---- requests ------------------------------------------------------------------------------------ */

struct qtr_logit_bias {
  int32_t token;
  float bias; /* added to the logit before everything else; -100 … 100 */
};

/* Sampling follows the order: logit bias, repetition / presence / frequency penalty, temperature, top-k, top-p,
 * min-p, draw. temperature < 1e-5 is greedy: penalties and bias still act. */
struct qtr_sampling {
  float temperature;        /* >= 0; 1 */
  int32_t top_k;            /* -1 or >= 1; -1 = off */
  float top_p;              /* (0, 1]; 1 = off */
  float min_p;              /* [0, 1]; 0 = off */
  float repetition_penalty; /* (0, 2]; 1 = off; over prompt and output */
  float presence_penalty;   /* [-2, 2]; 0 = off; over output */
  float frequency_penalty;  /* [-2, 2]; 0 = off; over output */
  uint64_t seed;            /* used when has_seed; otherwise drawn from the system */
  bool has_seed;
};

/* Constrained decoding: which tokens may come next. The engine keeps one state for each completion, asks `mask` before it
 * draws a token, and tells `accept` what was drawn. mask and accept are called by the thread that steps, one call at a time
 * over all requests, and never while the engine is locked; they must not call the engine. */
struct qtr_constraint {
  void *(*start)(void *user); /* a completion's state; NULL = out of memory: the completion ends with QTR_FINISH_ERROR */
  /* Fills allowed, a bit set of (vocab_size) tokens: bit t % 32 of allowed[t / 32], the end-of-text tokens among them.
   * False: nothing can follow, and the completion ends with QTR_FINISH_ERROR. */
  bool (*mask)(void *state, uint32_t *allowed);
  void (*accept)(void *state, int32_t token);
  void (*stop)(void *state); /* the state is not needed any more; may be called by any thread */
  void *user;                /* must live until the request's last event was polled */
};

struct qtr_request_options {
  const char *prompt;          /* text, may be NULL when tokens are given; need not end in NUL: prompt_len counts */
  size_t prompt_len;           /* bytes */
  const int32_t *prompt_token; /* (n_prompt_token); used when prompt is NULL */
  size_t n_prompt_token;
  bool no_bos;        /* do not add the tokenizer's own BOS to a text prompt (a rendered chat template has it) */
  bool parse_special; /* special tokens written in a text prompt become their ids */
  int32_t max_tokens; /* >= 1; 0 = until the context is full */
  int32_t n;          /* completions of this prompt, 1 … 64; 0 = 1 */
  struct qtr_sampling sampling;
  const char *const *stop; /* (n_stop) stop strings, at most 16 of at most 256 bytes; not part of the output */
  size_t n_stop;
  const int32_t *stop_token; /* (n_stop_token) besides the model's EOS, at most 64 */
  size_t n_stop_token;
  const struct qtr_logit_bias *logit_bias; /* (n_logit_bias), at most 1024 */
  size_t n_logit_bias;
  int32_t logprobs;     /* -1 = none; 0 … 20: log-probability of the chosen token and of that many best ones */
  bool prompt_logprobs; /* with logprobs >= 0: the prompt's tokens, too, from its second on. Completion 0 tells them, an
                           event each, before the first token of any completion */
  int32_t priority;     /* higher runs earlier; 0 */
  bool ignore_eos;
  const struct qtr_constraint *constraint; /* NULL = none; copied */
  void *user;                              /* comes back in every event */
};

QTR_API void qtr_request_options_init(struct qtr_request_options *options);

/* Queues a request and gives its id (> 0). Copies everything it needs. A request that can never fit is refused
 * here with QTR_ERR_LIMIT and the reason. */
QTR_API enum qtr_status qtr_engine_add(struct qtr_engine *engine, const struct qtr_request_options *options, uint64_t *id,
                                       struct qtr_error *err);

/* Ends a request: its pages are free before the next step runs; a final event with QTR_FINISH_CANCELLED follows.
 * QTR_ERR_NOT_FOUND when it has ended already. */
QTR_API enum qtr_status qtr_engine_cancel(struct qtr_engine *engine, uint64_t id, struct qtr_error *err);

/* Runs one step: one batch through the model. *has_work is false when nothing is left to run. Returns
 * QTR_ERR_BACKEND when the device failed; every request then gets a final event with QTR_FINISH_ERROR. */
QTR_API enum qtr_status qtr_engine_step(struct qtr_engine *engine, bool *has_work, struct qtr_error *err);

/* ---- events -------------------------------------------------------------------------------------- */

enum qtr_finish {
  QTR_FINISH_NONE = 0, /* goes on */
  QTR_FINISH_STOP,     /* EOS, a stop token or a stop string */
  QTR_FINISH_LENGTH,   /* max_tokens or the context is used up */
  QTR_FINISH_CANCELLED,
  QTR_FINISH_ERROR
};

struct qtr_token_logprob {
  int32_t token;
  float logprob; /* natural logarithm, of the model's distribution before temperature and filters */
};

struct qtr_event {
  uint64_t id;
  void *user;
  int32_t index;        /* which of the n completions */
  int32_t token;        /* the new token, or -1 when the event only ends the completion or flushes text */
  int32_t prompt_index; /* > 0: no new token, but prompt token number prompt_index and its log-probability */
  const char
      *text; /* text that became final, whole UTF-8 characters, held back while it may begin a stop string; NUL-terminated */
  size_t text_len;
  enum qtr_finish finish;
  int32_t n_prompt_tokens, n_cached_tokens, n_output_tokens;
  bool has_logprob;
  float logprob;                               /* of `token` */
  const struct qtr_token_logprob *top_logprob; /* (n_top_logprob), best first */
  int32_t n_top_logprob;
};

/* Takes the oldest event. Returns false when there is none. The pointers in the event stay valid until the next
 * qtr_engine_poll or qtr_engine_close of this engine: poll from one thread, or copy under your own lock. */
QTR_API bool qtr_engine_poll(struct qtr_engine *engine, struct qtr_event *event);

/* ---- statistics ---------------------------------------------------------------------------------- */

struct qtr_stats {
  uint64_t n_steps, n_prompt_tokens, n_cached_tokens, n_output_tokens, n_preemptions;
  uint64_t n_requests_finished;
  int32_t n_running, n_waiting;
  int32_t n_pages_total, n_pages_used, n_pages_cached; /* used: referenced; cached: unreferenced but reusable */
  int32_t page_tokens;
  int32_t n_stream_pages_total, n_stream_pages_used, n_stream_pages_cached; /* the same of the streaming heads' pool */
  int32_t n_streaming_heads;                                                /* KV heads of all layers that are */
  size_t weight_bytes, kv_pool_bytes;                                       /* both pools, and the lists of chosen pages */
  size_t kv_bytes_per_token; /* what a context costs for each token: without streaming heads, whose cost is fixed, … */
  size_t stream_page_bytes;  /* … n_stream_pages of this */
  double step_seconds, model_seconds;              /* summed over all steps */
  double device_busy_seconds, device_idle_seconds; /* of a GPU: working on steps, waiting between them; 0 on CPUs */
};

QTR_API void qtr_engine_stats(struct qtr_engine *engine, struct qtr_stats *stats);

/* What is loaded; strings live as long as the engine. */
struct qtr_engine_info {
  const char *model_dir, *architecture, *precision, *device;
  int32_t group_size; /* -1 per channel, 128, or 0 where it has no meaning */
  int32_t vocab_size, max_model_len, threads;
  int32_t bos_token; /* -1 = none */
};
QTR_API void qtr_engine_get_info(struct qtr_engine *engine, struct qtr_engine_info *info);

/* ---- text ---------------------------------------------------------------------------------------- */

/* Encodes text. *tokens is malloc'ed: free() it. add_bos: as the tokenizer itself would; parse_special: special
 * tokens written in the text become their ids. */
QTR_API enum qtr_status qtr_engine_tokenize(struct qtr_engine *engine, const char *text, size_t len, bool add_bos,
                                            bool parse_special, int32_t **tokens, size_t *n_tokens, struct qtr_error *err);

/* Decodes tokens to malloc'ed UTF-8; bytes that form no character become U+FFFD. */
QTR_API enum qtr_status qtr_engine_detokenize(struct qtr_engine *engine, const int32_t *token, size_t n_tokens, char **text,
                                              size_t *len, struct qtr_error *err);

/* Renders the model's chat template. messages_json: a JSON array of {"role","content",…}; tools_json: a JSON array or
 * NULL. *prompt is malloc'ed. The result holds the BOS when the template writes it: add the request with no_bos and
 * parse_special. QTR_ERR_NOT_FOUND when the model has no template. */
QTR_API enum qtr_status qtr_engine_apply_chat_template(struct qtr_engine *engine, const char *messages_json,
                                                       const char *tools_json, bool add_generation_prompt, char **prompt,
                                                       struct qtr_error *err);

#ifdef __cplusplus
}
#endif
#endif
