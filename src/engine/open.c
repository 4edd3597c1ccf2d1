/* open.c - making an engine: options checked against the model, formats chosen, the KV pool sized, everything a step needs
 * allocated; and the way back. Sources: quattuor.h for the options, spec D.7 for precisions, D.9 for the variables of
 * QServe. */
#include "base/checked.h"
#include "base/file.h"
#include "base/status.h"
#include "engine/engine_internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DEFAULT_MAX_NUM_SEQS 256
#define LEAST_ROWS 32   /* of logits in a step: with few sequences, still some for the log-probabilities of prompts */
#define MOST_SEQS 65536 /* arrays of a step stay small */
#define MOST_STEP_TOKENS 1048576 /* likewise; QServe's default is 262,144 */
#define MEMORY_SHARE 0.85 /* of what is free after weights and workspace: the rest is for the process and its neighbours */

void qtr_engine_options_init(struct qtr_engine_options *options) { *options = (struct qtr_engine_options){0}; }

enum qtr_status qtr_engine_options_check(const struct qtr_engine_options *o, struct qtr_error *err) {
  const struct {
    const char *name;
    int32_t value, most;
  } number[] = {{"threads", o->threads, 4096},
                {"max_num_seqs", o->max_num_seqs, MOST_SEQS},
                {"max_num_batched_tokens", o->max_num_batched_tokens, MOST_STEP_TOKENS},
                {"max_model_len", o->max_model_len, INT32_MAX - QTR_PAGE_TOKENS},
                {"kv_pages", o->kv_pages, INT32_MAX}};
  for (size_t i = 0; i < sizeof number / sizeof number[0]; i++) {
    if (number[i].value < 0 || number[i].value > number[i].most) {
      return qtr_fail(err, QTR_ERR_ARGUMENT, "%s is %d; it must be 1 … %d, or 0 for the default", number[i].name,
                      number[i].value, number[i].most);
    }
  }
  if (o->group_size != 0 && o->group_size != -1 && o->group_size != QTR_GROUP) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "group_size is %d; it must be -1 (per channel), %d, or 0 (as found)",
                    o->group_size, QTR_GROUP);
  }
  if (o->kv_scales && strcmp(o->kv_scales, "static") != 0) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "kv_scales is \"%.40s\"; it must be NULL or \"static\"", o->kv_scales);
  }
  if (o->norm != QTR_NORM_EXACT && o->norm != QTR_NORM_QSERVE) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "norm is %d; it must be QTR_NORM_EXACT or QTR_NORM_QSERVE", (int)o->norm);
  }
  struct qtr_precision precision;
  return o->precision ? qtr_precision_parse(o->precision, &precision, err) : QTR_OK;
}

/* ---- formats ------------------------------------------------------------------------------------- */

static int32_t weight_bits(enum qtr_linear_format format) {
  switch (format) {
    case QTR_LINEAR_W4A8:
    case QTR_LINEAR_W4A8_G128: return 4;
    case QTR_LINEAR_W8A8: return 8;
    default: return 16;
  }
}

/* What the caller says about the weights must be what they are. */
static enum qtr_status check_weights(const struct qtr_model *model, const struct qtr_engine_options *o,
                                     struct qtr_error *err) {
  const char *found = qtr_linear_format_name(model->format);
  if (o->precision) {
    struct qtr_precision p;
    enum qtr_status status = qtr_precision_parse(o->precision, &p, err);
    if (status) return status;
    if (p.weight_bits != weight_bits(model->format)) {
      return qtr_fail(
          err, QTR_ERR_ARGUMENT,
          "precision \"%.20s\" asks for %d-bit weights, but those of the model are %s; ask for w%da%d with any KV "
          "width, or quantize the model anew",
          o->precision, p.weight_bits, found, weight_bits(model->format), weight_bits(model->format) == 16 ? 16 : 8);
    }
  }
  /* Without groups each channel has one scale: -1 fits everything but g128. */
  bool grouped = model->format == QTR_LINEAR_W4A8_G128;
  if (o->group_size != 0 && (o->group_size == QTR_GROUP) != grouped) {
    return qtr_fail(err, QTR_ERR_ARGUMENT,
                    "group_size %d does not fit the weights, which are %s; ask for %d or 0 (as found)", o->group_size, found,
                    grouped ? QTR_GROUP : -1);
  }
  return QTR_OK;
}

/* The caller's word, then the checkpoint's note, then KV8 for quantised weights and KV16 for others. */
static enum qtr_status choose_kv_format(const struct qtr_model *model, const struct qtr_engine_options *o,
                                        enum qtr_kv_format *format, struct qtr_error *err) {
  const char *said = o->precision ? o->precision : model->config.precision[0] ? model->config.precision : NULL;
  int32_t bits = weight_bits(model->format) == 16 ? 16 : 8;
  if (said) {
    struct qtr_precision p;
    enum qtr_status status = qtr_precision_parse(said, &p, err);
    if (status) return o->precision ? status : qtr_error_prefix(err, "quantization_config of config.json");
    if (p.kv_bits > 0) bits = p.kv_bits;
  }
  if (o->kv_scales) {
    if (!model->static_kv_scale) {
      return qtr_fail(err, QTR_ERR_ARGUMENT, "kv_scales \"static\": the model has no static KV scales; leave kv_scales out");
    }
    if (bits != 8) {
      return qtr_fail(err, QTR_ERR_ARGUMENT, "kv_scales \"static\" needs an 8-bit KV cache, not kv%d: ask for …kv8", bits);
    }
    *format = QTR_KV_INT8_STATIC;
    return QTR_OK;
  }
  *format = bits == 4 ? QTR_KV_INT4 : bits == 8 ? QTR_KV_INT8 : QTR_KV_F16;
  return QTR_OK;
}

/* ---- pool ---------------------------------------------------------------------------------------- */

/* QServe's variables for the number of pages (D.9). */
static enum qtr_status read_environment(int32_t *n_pages, struct qtr_error *err) {
  static const char *const names[] = {"NUM_GPU_PAGE_BLOCKS", "NUM_RETRIEVAL_GPU_PAGE_BLOCKS"};
  *n_pages = 0;
  for (size_t i = 0; i < 2 && *n_pages == 0; i++) {
    const char *text = getenv(names[i]);
    if (!text || !*text) continue;
    char *end;
    errno = 0;
    long n = strtol(text, &end, 10);
    if (errno || *end || n < 1 || n > INT32_MAX) {
      char shown[48];
      return qtr_fail(err, QTR_ERR_ARGUMENT,
                      "environment variable %s is \"%s\"; it must be a number of pages of %d tokens, 1 or more", names[i],
                      qtr_printable(text, strlen(text), shown, sizeof shown), QTR_PAGE_TOKENS);
    }
    *n_pages = (int32_t)n;
  }
  return QTR_OK;
}

/* Sets n_pages, and max_model_len so that the pool holds any one sequence alone. */
static enum qtr_status size_pool(struct qtr_engine *e, const struct qtr_engine_options *o, struct qtr_error *err) {
  struct qtr_caps caps;
  e->model->backend->ops->caps(e->model->backend, &caps);
  int32_t from_environment = 0;
  size_t whole = qtr_ceil_div((size_t)e->max_model_len, QTR_PAGE_TOKENS), n = 0; /* pages of a full-length sequence */
  const char *from;
  /* Mapped weights may not be resident yet and still count as free: what the machine has bounds the pool too. */
  size_t fixed = e->model->weight_bytes + qtr_workspace_bytes(e->workspace);
  size_t most = caps.memory_total > fixed ? caps.memory_total - fixed : 0;
  enum qtr_status status = read_environment(&from_environment, err);
  if (status) return status;
  if (o->kv_pages > 0) {
    n = (size_t)o->kv_pages;
    from = "kv_pages";
  } else if (o->kv_bytes > 0) {
    n = o->kv_bytes / e->kv_page_bytes;
    from = "kv_bytes";
  } else if (from_environment > 0) {
    n = (size_t)from_environment;
    from = "the environment";
  } else {
    size_t room = QTR_MIN(most, caps.memory_free);
    double share = caps.memory_share > 0 ? (double)caps.memory_share : MEMORY_SHARE;
    n = (size_t)(share * (double)room) / e->kv_page_bytes;
    n = QTR_MIN(n, whole * (size_t)e->max_num_seqs);
    from = "free memory";
  }
  n = QTR_MIN(n, (size_t)INT32_MAX);
  /* Memory is given out page by page as it is touched: a wish beyond what there is would end the process in the middle. */
  if (n > most / e->kv_page_bytes) {
    return qtr_fail(
        err, QTR_ERR_LIMIT,
        "the KV pool (from %s) has %zu pages of %zu bytes, but %s has %zu bytes, and %zu of them go to weights and "
        "workspace: at most %zu pages fit",
        from, n, e->kv_page_bytes, e->device, caps.memory_total, fixed, most / e->kv_page_bytes);
  }
  if (n < whole) {
    if (n < 1 || o->max_model_len > 0) {
      return qtr_fail(
          err, QTR_ERR_LIMIT,
          "the KV pool (from %s) has %zu pages of %d tokens at %zu bytes; one sequence of max_model_len %d needs %zu "
          "pages: give it more memory or lower max_model_len",
          from, n, QTR_PAGE_TOKENS, e->kv_page_bytes, e->max_model_len, whole);
    }
    e->max_model_len = (int32_t)n * QTR_PAGE_TOKENS;
    (void)fprintf(stderr, "quattuor: the KV pool (from %s) has %zu pages: max_model_len is lowered to %d tokens\n", from, n,
                  e->max_model_len);
  }
  e->n_pages = (int32_t)n;
  return QTR_OK;
}

/* ---- opening ------------------------------------------------------------------------------------- */

static enum qtr_status choose_lengths(struct qtr_engine *e, const struct qtr_engine_options *o, struct qtr_error *err) {
  const struct qtr_config *c = &e->model->config;
  int32_t longest = e->model->max_len;
  if (c->sliding_window > 0) longest = QTR_MIN(longest, c->sliding_window); /* attention beyond the window is not done */
  if (o->max_model_len > longest) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "max_model_len is %d, but the model goes to %d tokens; lower it",
                    o->max_model_len, longest);
  }
  e->max_model_len = o->max_model_len > 0 ? o->max_model_len : longest;
  struct qtr_caps caps;
  e->model->backend->ops->caps(e->model->backend, &caps);
  int32_t seqs = o->max_num_seqs > 0 ? o->max_num_seqs : DEFAULT_MAX_NUM_SEQS;
  /* Every running sequence must be able to decode in every step. */
  if (o->max_num_batched_tokens > 0) {
    e->max_num_batched_tokens = o->max_num_batched_tokens;
    e->max_num_seqs = QTR_MIN(seqs, e->max_num_batched_tokens);
  } else {
    e->max_num_batched_tokens = QTR_MAX(caps.step_tokens, seqs);
    e->max_num_seqs = seqs;
  }
  e->threads = caps.threads;
  (void)snprintf(e->device, sizeof e->device, "%s", caps.device ? caps.device : "");
  return QTR_OK;
}

static void describe(struct qtr_engine *e, enum qtr_kv_format kv) {
  int32_t bits = weight_bits(e->model->format);
  int32_t kv_bits = kv == QTR_KV_F16 ? 16 : kv == QTR_KV_INT4 ? 4 : 8;
  (void)snprintf(e->precision, sizeof e->precision, "w%da%dkv%d", bits, bits == 16 ? 16 : 8, kv_bits);
  e->group_size = e->model->format == QTR_LINEAR_W4A8_G128 ? QTR_GROUP : bits == 16 ? 0 : -1;
  const struct qtr_config *c = &e->model->config;
  e->vocab_size = c->vocab_size;
  e->bos_token = e->tokenizer ? qtr_tokenizer_bos(e->tokenizer) : c->bos_token;
  for (e->n_eos = 0; e->n_eos < c->n_eos; e->n_eos++) e->eos_token[e->n_eos] = c->eos_token[e->n_eos];
  if (e->n_eos == 0 && e->tokenizer && qtr_tokenizer_eos(e->tokenizer) >= 0) {
    e->eos_token[e->n_eos++] = qtr_tokenizer_eos(e->tokenizer);
  }
}

/* Everything a step needs, so that it allocates nothing. */
static enum qtr_status make_batch(struct qtr_engine *e, struct qtr_error *err) {
  size_t tokens = (size_t)e->max_num_batched_tokens, seqs = (size_t)e->max_num_seqs, rows = (size_t)e->max_rows;
  size_t blocks;
  e->max_blocks = (int32_t)qtr_ceil_div((size_t)e->max_model_len, QTR_PAGE_TOKENS);
  if (qtr_mul_overflow(seqs, (size_t)e->max_blocks * sizeof(int32_t), &blocks))
    return qtr_fail_memory(err, "block tables", blocks);
  const struct {
    void *at; /* the address of a pointer */
    size_t n_bytes;
  } array[] = {{&e->token, tokens * sizeof *e->token},
               {&e->position, tokens * sizeof *e->position},
               {&e->q_start, (seqs + 1) * sizeof *e->q_start},
               {&e->kv_len, seqs * sizeof *e->kv_len},
               {&e->block_table, blocks},
               {&e->logit_row, rows * sizeof *e->logit_row},
               {&e->running, seqs * sizeof *e->running},
               {&e->batch_seq, seqs * sizeof *e->batch_seq},
               {&e->row_seq, rows * sizeof *e->row_seq},
               {&e->row_target, rows * sizeof *e->row_target},
               {&e->row_node, rows * sizeof *e->row_node},
               {&e->choose, rows * sizeof *e->choose},
               {&e->chosen, rows * sizeof *e->chosen},
               {&e->row_logits, (size_t)e->vocab_size * sizeof *e->row_logits},
               {&e->allowed, qtr_ceil_div((size_t)e->vocab_size, 32) * sizeof *e->allowed}};
  for (size_t i = 0; i < sizeof array / sizeof array[0]; i++) {
    void *memory = calloc(1, array[i].n_bytes);
    if (!memory) return qtr_fail_memory(err, "the arrays of a step", array[i].n_bytes);
    memcpy(array[i].at, &memory, sizeof memory);
  }
  return qtr_sampler_create(e->vocab_size, &e->sampler, err);
}

/* Frees what open_model made; what it was given stays with the caller. */
static void engine_free(struct qtr_engine *e) {
  if (e->kv) e->model->backend->ops->kv_free(e->model->backend, e->kv);
  qtr_workspace_free(e->workspace);
  qtr_kv_pool_free(e->pool);
  qtr_event_queue_free(&e->events);
  qtr_sampler_free(e->sampler);
  void *const array[] = {e->token,   e->position,  e->q_start, e->kv_len,     e->block_table, e->logit_row,
                         e->running, e->batch_seq, e->row_seq, e->row_target, e->row_node,    e->row_logits,
                         e->allowed, e->model_dir, e->choose,  e->chosen,     e->adjust};
  for (size_t i = 0; i < sizeof array / sizeof array[0]; i++) free(array[i]);
  (void)pthread_mutex_destroy(&e->mutex);
  free(e);
}

enum qtr_status qtr_engine_open_model(struct qtr_model *model, struct qtr_tokenizer *tokenizer,
                                      struct qtr_chat_template *chat, const struct qtr_engine_options *o,
                                      struct qtr_engine **engine, struct qtr_error *err) {
  *engine = NULL;
  struct qtr_engine *e = calloc(1, sizeof *e);
  if (!e) return qtr_fail_memory(err, "an engine", sizeof *e);
  if (pthread_mutex_init(&e->mutex, NULL)) {
    free(e);
    return qtr_fail(err, QTR_ERR_MEMORY, "cannot make a mutex");
  }
  e->model = model;
  e->tokenizer = tokenizer;
  e->chat = chat;
  e->next_id = 1;
  e->prefix_cache = !o->no_prefix_cache;

  enum qtr_kv_format kv_format = QTR_KV_F16;
  enum qtr_status status = qtr_engine_options_check(o, err);
  if (!status) status = check_weights(model, o, err);
  if (!status) status = choose_kv_format(model, o, &kv_format, err);
  if (!status) status = choose_lengths(e, o, err);
  if (status) goto done;
  describe(e, kv_format);
  e->model_dir = strdup(o->model_dir ? o->model_dir : "");
  if (!e->model_dir) {
    status = qtr_fail_memory(err, "a path", o->model_dir ? strlen(o->model_dir) : 0);
    goto done;
  }
  e->max_rows = QTR_MIN(QTR_MAX(e->max_num_seqs, LEAST_ROWS), e->max_num_batched_tokens);
  status = qtr_workspace_create(model, (size_t)e->max_num_batched_tokens, (size_t)e->max_rows, &e->workspace, err);
  if (status) goto done;
  struct qtr_kv_config kv = {.format = kv_format,
                             .n_layers = model->config.n_layers,
                             .n_kv_heads = model->config.n_kv_heads,
                             .head_dim = model->config.head_dim,
                             .static_scale = model->static_kv_scale};
  e->kv_page_bytes = qtr_kv_page_bytes(&kv);
  if (e->kv_page_bytes == 0) {
    status = qtr_fail(err, QTR_ERR_LIMIT, "a KV page of this model would be larger than the address space");
    goto done;
  }
  status = size_pool(e, o, err);
  kv.n_pages = e->n_pages;
  if (!status) status = make_batch(e, err);
  if (!status) status = qtr_kv_pool_create(e->n_pages, e->prefix_cache, &e->pool, err);
  if (!status) status = model->backend->ops->kv_create(model->backend, &kv, &e->kv, err);
done:
  if (status)
    engine_free(e);
  else
    *engine = e;
  return status;
}

/* A sequence longer than the model was made for is only right with RoPE scaling that adapts to it. */
static enum qtr_status check_length(const struct qtr_engine_options *o, struct qtr_error *err) {
  struct qtr_config config;
  enum qtr_status status = qtr_config_read(o->model_dir, &config, err);
  if (status || o->max_model_len <= config.max_position_embeddings || config.rope_scaling == QTR_ROPE_DYNAMIC) return status;
  return qtr_fail(
      err, QTR_ERR_ARGUMENT,
      "max_model_len is %d, but config.json has max_position_embeddings %d and no dynamic RoPE scaling; lower it",
      o->max_model_len, config.max_position_embeddings);
}

enum qtr_status qtr_engine_open(const struct qtr_engine_options *o, struct qtr_engine **engine, struct qtr_error *err) {
  struct qtr_backend *backend = NULL;
  struct qtr_model *model = NULL;
  struct qtr_tokenizer *tokenizer = NULL;
  struct qtr_chat_template *chat = NULL;
  struct qtr_error local = {0};
  if (!err) err = &local; /* NOT_FOUND is told apart below */
  *engine = NULL;
  if (!o->model_dir) return qtr_fail(err, QTR_ERR_ARGUMENT, "model_dir is NULL; it must name the directory of a model");
  enum qtr_status status = qtr_engine_options_check(o, err);
  if (!status && !qtr_dir_exists(o->model_dir)) {
    status = qtr_fail(err, QTR_ERR_NOT_FOUND, "no model directory \"%.300s\"", o->model_dir);
  }
  if (!status) status = check_length(o, err);
  const struct qtr_backend_options backend_options = {.threads = o->threads, .gpu = o->gpu};
  if (!status) status = qtr_backend_open(o->device ? o->device : "auto", &backend_options, &backend, err);
  const struct qtr_model_options model_options = {.max_len = o->max_model_len, .norm = o->norm};
  if (!status) status = qtr_model_load(o->model_dir, backend, &model_options, &model, err);
  if (!status) {
    status = qtr_tokenizer_open(o->model_dir, &tokenizer, err);
    if (status == QTR_ERR_NOT_FOUND) status = QTR_OK; /* token prompts only */
  }
  if (!status) {
    status = qtr_chat_template_open(o->model_dir, &chat, err);
    if (status == QTR_ERR_NOT_FOUND) status = QTR_OK;
  }
  if (!status) status = qtr_engine_open_model(model, tokenizer, chat, o, engine, err);
  if (!status) *err = (struct qtr_error){0}; /* an absent tokenizer or template is no error */
  if (status) {
    qtr_chat_template_close(chat);
    qtr_tokenizer_close(tokenizer);
    qtr_model_free(model);
    qtr_backend_close(backend);
  }
  return status;
}

void qtr_engine_close(struct qtr_engine *e) {
  if (!e) return;
  struct qtr_model *model = e->model;
  struct qtr_backend *backend = model->backend;
  for (size_t slot = 0; slot < QTR_ID_SLOTS; slot++) {
    while (e->by_id[slot]) qtr_scheduler_end(e, e->by_id[slot], QTR_FINISH_CANCELLED);
  }
  qtr_chat_template_close(e->chat);
  qtr_tokenizer_close(e->tokenizer);
  engine_free(e);
  qtr_model_free(model);
  qtr_backend_close(backend);
}
