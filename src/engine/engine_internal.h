/* engine_internal.h - the inside of an engine, shared by the files of src/engine, by benchmarks and by tests.
 *
 * Who may touch what: everything in struct qtr_engine is guarded by `mutex`, but for what is constant after opening, and for
 * what the comment "the step's own" names: that belongs to the thread that steps, mutex or not, from the moment `stepping`
 * is set. The sequences of its passes (`batch_seq`) belong to it as well; other threads leave them alone and only mark their
 * request cancelled.
 *
 * Ahead. A step is planned, launched and collected. Where the device works on its own (caps.ahead), the step after it is
 * planned and launched before it is collected, so the device never waits for the host: a token that is not known yet has a
 * place in its sequence already, and the device puts it into the next batch itself. What a step's tokens are computed from
 * counts as computed from the launch on, because the device runs steps in order: pages may be published, given back and
 * given to others while a step that uses them still runs. A sequence that turns out to have ended is taken out of the step
 * launched meanwhile, whose work on it was for nothing (qtr_scheduler_plan, _launched, _commit). */
#ifndef QTR_ENGINE_ENGINE_INTERNAL_H
#define QTR_ENGINE_ENGINE_INTERNAL_H

#include "engine/sampler.h"
#include "kv/pool.h"
#include "model/model.h"
#include "text/template.h"
#include "text/tokenizer.h"

#include <pthread.h>

#define QTR_MAX_COMPLETIONS 64
#define QTR_MAX_STOPS 16
#define QTR_MAX_STOP_BYTES 256
#define QTR_MAX_STOP_TOKENS 64
#define QTR_MAX_LOGIT_BIAS 1024
#define QTR_MAX_TOP_LOGPROBS 20

/* ---- events (events.c) --------------------------------------------------------------------------- */

struct qtr_event_node {
  struct qtr_event_node *next;
  struct qtr_event event; /* its pointers are set when it is polled */
  struct qtr_text text;   /* kept from use to use */
  struct qtr_token_logprob top[QTR_MAX_TOP_LOGPROBS];
};

struct qtr_event_queue {
  struct qtr_event_node *first, *last; /* oldest … newest */
  struct qtr_event_node *polled;       /* what the caller is looking at */
  struct qtr_event_node *spare;        /* for the next events */
  size_t n_spare;
};

struct qtr_event_node *qtr_event_take(struct qtr_event_queue *queue);               /* cleared; NULL = out of memory */
void qtr_event_recycle(struct qtr_event_queue *queue, struct qtr_event_node *node); /* NULL is allowed */
void qtr_event_push(struct qtr_event_queue *queue, struct qtr_event_node *node);
bool qtr_event_pop(struct qtr_event_queue *queue, struct qtr_event *event);
void qtr_event_queue_free(struct qtr_event_queue *queue);

/* ---- requests (request.c) ------------------------------------------------------------------------ */

enum qtr_sequence_state { QTR_SEQ_WAITING, QTR_SEQ_RUNNING, QTR_SEQ_FINISHED };

/* One completion of a request. A waiting sequence owns no pages; a preempted one keeps its tokens. */
struct qtr_sequence {
  struct qtr_request *request;
  struct qtr_sequence *prev, *next; /* in the waiting queue */
  enum qtr_sequence_state state;
  enum qtr_finish finish; /* set by the step that saw the end */
  int32_t index;          /* which completion */
  int32_t n_tokens;       /* prompt and output */
  int32_t n_pending;      /* the last of them that are still to be collected: -1 - row of their step in `token` */
  int32_t n_computed;     /* tokens whose K and V are in the pages, or will be when the steps launched have run */
  int32_t n_planned;      /* tokens in the batch that is being planned */
  int32_t n_pages, n_published;
  int32_t n_cached;  /* prompt tokens the prefix cache gave at the first admission; -1 before it */
  int32_t n_emitted; /* output tokens handed out */
  int32_t n_scored;  /* prompt tokens 1 … n_scored have their log-probabilities out */
  int32_t *token;    /* (n_prompt + max_tokens) prompt, then output; NULL before the first admission */
  int32_t *page;     /* (pages of n_prompt + max_tokens) block table */
  int32_t *stream;   /* (the same) pages of the streaming heads; -1: not held */
  int32_t slot;      /* of the engine's; -1: none, it does not run */
  bool look;         /* the device could not choose: the host does, from the logits of the next step */
  uint64_t seed;
  struct qtr_detokenizer detokenizer;
  struct qtr_text held;         /* text that may begin a stop string */
  void *constraint;             /* its state; NULL before the first token */
  struct qtr_event_node *final; /* reserved, so that an end can always be told */
};

struct qtr_stop {
  char text[QTR_MAX_STOP_BYTES];
  size_t len;
};

struct qtr_request {
  struct qtr_request *next;           /* in the id table */
  struct qtr_request *next_cancelled; /* cancelled while a step runs */
  uint64_t id;
  void *user;
  int32_t n_prompt, max_tokens, priority, logprobs;
  int32_t n_sequences, n_live;
  bool ignore_eos, cancelled;
  bool prompt_logprobs;
  bool prefilled;  /* some sequence has computed the prompt: its pages are published */
  int32_t *prompt; /* (n_prompt) */
  struct qtr_sampling sampling;
  int32_t *stop_token; /* (n_stop_token) */
  size_t n_stop_token;
  struct qtr_stop *stop; /* (n_stop) */
  size_t n_stop;
  struct qtr_logit_bias *bias; /* (n_bias) */
  size_t n_bias;
  struct qtr_constraint constraint; /* mask NULL: none */
  struct qtr_sequence sequence[];   /* (n_sequences) */
};

/* Checks the options and copies all of them. The prompt's tokens come separately: prompt (n_prompt), copied. */
enum qtr_status qtr_request_create(const struct qtr_engine *engine, const struct qtr_request_options *options,
                                   const int32_t *prompt, size_t n_prompt, struct qtr_request **request,
                                   struct qtr_error *err);
void qtr_request_free(struct qtr_request *request); /* not its sequences' `final` nodes */

/* Buffers for tokens and pages, made at the first admission. False: out of memory. */
bool qtr_sequence_prepare(struct qtr_sequence *seq);
/* Does this sequence still owe log-probabilities of its prompt? */
bool qtr_sequence_scores(const struct qtr_sequence *seq);
/* Tokens that are known: all but the pending ones. */
static inline int32_t qtr_sequence_known(const struct qtr_sequence *seq) { return seq->n_tokens - seq->n_pending; }
/* Puts a sampled token (-1: the model gave nothing finite) into the first pending place, fills the event with token, text
 * and log-probabilities, and sets seq->finish when this was the last one. */
void qtr_sequence_accept(const struct qtr_engine *engine, struct qtr_sequence *seq, const struct qtr_sample_result *result,
                         struct qtr_event_node *node);
/* Fills the event with the log-probability of prompt token number `target`. */
void qtr_sequence_score(const struct qtr_sequence *seq, int32_t target, const struct qtr_sample_result *result,
                        struct qtr_event_node *node);
/* Fills the fields that every event of the sequence has. */
void qtr_sequence_describe(const struct qtr_sequence *seq, struct qtr_event *event);

/* ---- engine (engine.c, open.c) and scheduler (scheduler.c) --------------------------------------- */

#define QTR_ID_SLOTS 4096 /* of the id table, a power of two */

/* A step of the model, from its plan to its results. */
struct qtr_pass {
  bool launched; /* and not collected */
  bool open; /* the step after it can be planned without its results: the device chooses all tokens, for sure or nearly */
  struct qtr_batch batch;
  int32_t *token, *position;       /* (max_num_batched_tokens) */
  int32_t *q_start, *kv_len;       /* (max_num_seqs + 1), (max_num_seqs) */
  int32_t *block_table;            /* (max_num_seqs, max_blocks) at most; rows are as long as this step needs */
  int32_t *stream_table;           /* as block_table; with streaming heads */
  int32_t *decode_start, *slot;    /* (max_num_seqs) */
  int32_t *logit_row;              /* (max_rows) */
  struct qtr_sequence **batch_seq; /* (max_num_seqs) NULL: has ended since */
  struct qtr_sequence **row_seq;   /* (max_rows) whose logits row i holds; NULL: has ended since */
  int32_t *row_target; /* (max_rows) > 0: the row is there for this prompt token's log-probability; 0: to sample; or LOST */
  struct qtr_event_node **row_node; /* (max_rows) reserved; NULL: none, or handed on */
  struct qtr_choose_row *choose;    /* (max_rows) for a device that samples */
  struct qtr_choose_result *chosen; /* (max_rows) */
  struct qtr_choose_adjust *adjust; /* (adjust_capacity) what bias and penalties change in this step's rows */
  size_t n_adjust, adjust_capacity;
};
enum { QTR_ROW_LOST = -1 }; /* the device could not choose, and the logits are gone: the row is computed once more */

struct qtr_engine {
  pthread_mutex_t mutex;
  /* constant after opening */
  struct qtr_model *model;         /* owned, and its backend */
  struct qtr_tokenizer *tokenizer; /* owned; NULL: token prompts only, no text in events */
  struct qtr_chat_template *chat;  /* owned; NULL: none */
  struct qtr_kv *kv;
  struct qtr_workspace *workspace;
  char *model_dir;
  char precision[24]; /* "w4a8kv4" */
  char device[32];
  int32_t group_size, threads, vocab_size, bos_token;
  int32_t max_num_seqs, max_num_batched_tokens, max_model_len, max_blocks, n_pages;
  int32_t max_rows; /* of logits in a step: one for each sequence, and what is left for the log-probabilities of prompts */
  int32_t eos_token[QTR_MAX_EOS];
  int32_t n_eos;
  size_t kv_page_bytes, stream_page_bytes, selection_bytes;
  bool prefix_cache;
  bool ahead; /* steps may be launched before the last one is collected */
  /* Sparse attention: */
  struct qtr_kv_sparse sparse; /* as the cache has it, but streaming is NULL */
  bool streams;                /* there are streaming heads: n_stream_pages pages hold their K and V */
  bool tells_apart;            /* queries of generated tokens see otherwise than those of given ones */
  int32_t n_stream_pages, n_streaming_heads;

  /* guarded */
  bool stepping, dead;
  struct qtr_error death; /* why, when dead */
  uint64_t next_id;
  struct qtr_kv_pool *pool;
  struct qtr_request *by_id[QTR_ID_SLOTS];
  struct qtr_request *cancelled;                     /* to be ended when the running step ends */
  struct qtr_sequence *waiting_first, *waiting_last; /* by priority, then arrival, then completion */
  struct qtr_sequence **running;                     /* (max_num_seqs) in the same order */
  int32_t n_running, n_waiting;
  int32_t *free_slot; /* (max_num_seqs) slots that no running sequence has: the first n_free_slots */
  int32_t n_free_slots;
  struct qtr_event_queue events;
  struct qtr_stats stats; /* counters only */

  /* the step's own */
  struct qtr_pass pass[QTR_STEPS_UNDER_WAY]; /* the second only with `ahead` */
  struct qtr_sampler *sampler;
  float *row_logits; /* (vocab_size) */
  uint32_t *allowed; /* (vocab_size / 32 rounded up) tokens that a constraint lets through */
};

/* The engine over a model that is there already: random weights, tests. On QTR_OK the engine owns model, model->backend,
 * tokenizer and chat (both may be NULL); otherwise nothing changed hands. options->model_dir may be NULL, device is ignored.
 */
enum qtr_status qtr_engine_open_model(struct qtr_model *model, struct qtr_tokenizer *tokenizer,
                                      struct qtr_chat_template *chat, const struct qtr_engine_options *options,
                                      struct qtr_engine **engine, struct qtr_error *err);

/* Closes an engine and gives its model back with its backend: another engine, with another cache, may be opened over it. */
struct qtr_model *qtr_engine_close_keep_model(struct qtr_engine *engine);

/* Options that do not depend on the model. */
enum qtr_status qtr_engine_options_check(const struct qtr_engine_options *options, struct qtr_error *err);

/* All under the mutex. */
void qtr_scheduler_add(struct qtr_engine *engine, struct qtr_request *request); /* queues every completion */
/* Chooses the tokens of a step: fills the pass's batch, batch_seq and row_seq. */
void qtr_scheduler_plan(struct qtr_engine *engine, struct qtr_pass *pass);
/* After the launch: what was planned counts as computed, and each row to sample has a pending token. */
void qtr_scheduler_launched(struct qtr_engine *engine, struct qtr_pass *pass);
/* After rows were sampled: publishes pages, hands out events, ends what has ended. */
void qtr_scheduler_commit(struct qtr_engine *engine, struct qtr_pass *pass);
/* Ends every completion of the request that still lives, with an event each, and frees the request. */
void qtr_scheduler_end(struct qtr_engine *engine, struct qtr_request *request, enum qtr_finish finish);

/* ---- pages of streaming heads (streams.c) ---------------------------------------------------------- */

/* Most stream pages that one sequence holds in a step of n_tokens. */
int32_t qtr_streams_most(const struct qtr_kv_sparse *sparse, int32_t n_tokens, int32_t max_model_len);
/* All under the mutex, and nothing to do without streaming heads. */
/* Shortens what the prefix cache gave (seq->n_pages) to where the stream pages that come next into sight are there as well,
 * and references those. */
void qtr_streams_match(struct qtr_engine *engine, struct qtr_sequence *seq);
/* Takes pages for the next n tokens. Returns for how many of them there are any: 0 … n. */
int32_t qtr_streams_take(struct qtr_engine *engine, struct qtr_sequence *seq, int32_t n);
/* Pages that qtr_streams_take(n) would take from the pool. */
int32_t qtr_streams_missing(const struct qtr_engine *engine, const struct qtr_sequence *seq, int32_t n);
void qtr_streams_publish(struct qtr_engine *engine, struct qtr_sequence *seq, int32_t index); /* page[index] was published */
void qtr_streams_let_go(struct qtr_engine *engine, struct qtr_sequence *seq);                 /* what no later query sees */
void qtr_streams_release(struct qtr_engine *engine, struct qtr_sequence *seq);

#endif
