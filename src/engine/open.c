/* open.c - making an engine: options checked against the model, formats chosen, the KV pool sized, everything a step needs
 * allocated; and the way back. Sources: quattuor.h for the options, spec D.7 for precisions, D.9 for the variables of
 * QServe. */
#include "base/checked.h"
#include "base/file.h"
#include "base/status.h"
#include "checkpoint/heads.h"
#include "checkpoint/kv_scales.h"
#include "engine/engine_internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DEFAULT_MAX_NUM_SEQS 256
#define LEAST_ROWS 32   /* of logits in a step: with few sequences, still some for the log-probabilities of prompts */
#define MOST_SEQS 65536 /* arrays of a step stay small */
#define MOST_STEP_TOKENS 1048576 /* likewise; QServe's default is 262,144 */
#define MOST_WINDOW (1 << 30)    /* tokens; sums of two stay within int32 */
#define MEMORY_SHARE 0.85 /* of what is free after weights and workspace: the rest is for the process and its neighbours */

void qtr_engine_options_init(struct qtr_engine_options *options) {
  *options = (struct qtr_engine_options){.sparse = {.ctx_sink = 128,
                                                    .ctx_local = 8192,
                                                    .dec_sink = 128,
                                                    .dec_local = 256,
                                                    .token_budget = 4096,
                                                    .selector_interval = 4,
                                                    .sub_chunks = 4}};
}

/* Only what is switched on is looked at: a struct of zeros is dense. */
static enum qtr_status check_sparse(const struct qtr_sparse_options *o, struct qtr_error *err) {
  if (!(o->static_sparsity >= 0 && o->static_sparsity <= 1)) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "static_sparsity is %g; it must be from 0 (no streaming heads) to 1 (all)",
                    (double)o->static_sparsity);
  }
  if (o->static_sparsity > 0 && !o->heads_dir && !o->heads) {
    return qtr_fail(err, QTR_ERR_ARGUMENT,
                    "static_sparsity %g needs a directory with full_attention_heads.tsv, which says which heads may stream; "
                    "quattuor calibrate heads makes one",
                    (double)o->static_sparsity);
  }
  if (o->decode_mode != 0 && o->decode_mode != 1) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "sparse decode mode is %d; it must be 0 (dense) or 1 (chosen pages)",
                    o->decode_mode);
  }
  const struct {
    const char *name;
    int32_t value, least, most;
    bool used;
  } number[] = {{"ctx_sink", o->ctx_sink, 0, MOST_WINDOW, o->static_sparsity > 0 && o->context_mode},
                {"ctx_local", o->ctx_local, 1, MOST_WINDOW, o->static_sparsity > 0 && o->context_mode},
                {"dec_sink", o->dec_sink, 0, MOST_WINDOW, o->static_sparsity > 0},
                {"dec_local", o->dec_local, 1, MOST_WINDOW, o->static_sparsity > 0},
                {"stream_pages", o->stream_pages, 0, INT32_MAX, o->static_sparsity > 0},
                {"token_budget", o->token_budget, QTR_PAGE_TOKENS, MOST_WINDOW, o->decode_mode != 0},
                {"selector_interval", o->selector_interval, 1, MOST_WINDOW, o->decode_mode != 0},
                {"sub_chunks", o->sub_chunks, 1, 4, o->decode_mode != 0}};
  for (size_t i = 0; i < sizeof number / sizeof number[0]; i++) {
    if (number[i].used && (number[i].value < number[i].least || number[i].value > number[i].most)) {
      return qtr_fail(err, QTR_ERR_ARGUMENT, "%s is %d; it must be %d … %d", number[i].name, number[i].value,
                      number[i].least, number[i].most);
    }
  }
  if (o->decode_mode != 0 && o->token_budget % QTR_PAGE_TOKENS != 0) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "token_budget is %d; it must be a multiple of %d, the tokens of a page",
                    o->token_budget, QTR_PAGE_TOKENS);
  }
  if (o->decode_mode != 0 && o->sub_chunks == 3) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "sub_chunks is 3; a page of %d tokens has 1, 2 or 4 of equal size",
                    QTR_PAGE_TOKENS);
  }
  return QTR_OK;
}

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
  if (o->kv_fp8 && strcmp(o->kv_fp8, "e4m3") != 0 && strcmp(o->kv_fp8, "e5m2") != 0) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "kv_fp8 is \"%.40s\"; it must be NULL, \"e4m3\" or \"e5m2\"", o->kv_fp8);
  }
  if (o->norm != QTR_NORM_EXACT && o->norm != QTR_NORM_QSERVE) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "norm is %d; it must be QTR_NORM_EXACT or QTR_NORM_QSERVE", (int)o->norm);
  }
  enum qtr_status status = check_sparse(&o->sparse, err);
  if (status) return status;
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

/* Scales from a file take the place of the checkpoint's. */
static enum qtr_status read_kv_params(struct qtr_model *model, const struct qtr_engine_options *o, struct qtr_error *err) {
  struct qtr_kv_scales scales;
  if (!o->kv_quant_params_path) return QTR_OK;
  enum qtr_status status = qtr_kv_scales_read(o->kv_quant_params_path, &model->config, &scales, err);
  if (status) return status;
  float *pairs = malloc((size_t)model->config.n_layers * 2 * sizeof *pairs);
  if (!pairs) {
    status = qtr_fail_memory(err, "KV scales", (size_t)model->config.n_layers * 2 * sizeof *pairs);
  } else {
    for (int32_t i = 0; i < model->config.n_layers; i++) {
      for (int v = 0; v < 2; v++) pairs[2 * i + v] = qtr_kv_scales_tensor(&scales, i, v);
    }
    free(model->static_kv_scale);
    model->static_kv_scale = pairs;
  }
  qtr_kv_scales_free(&scales);
  return status;
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
  if (o->kv_fp8 && bits != 16) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "kv_fp8 rounds what a 16-bit KV cache holds, and this one is kv%d: ask for …kv16",
                    bits);
  }
  if (o->kv_scales || o->kv_quant_params_path) {
    if (!model->static_kv_scale) {
      return qtr_fail(err, QTR_ERR_ARGUMENT, "kv_scales \"static\": the model has no static KV scales; leave kv_scales out");
    }
    if (o->kv_fp8) {
      *format = QTR_KV_F16;
      return QTR_OK;
    }
    if (bits != 8) {
      return qtr_fail(err, QTR_ERR_ARGUMENT, "%s needs an 8-bit KV cache, not kv%d: ask for …kv8",
                      o->kv_scales ? "kv_scales \"static\"" : "kv_quant_params_path", bits);
    }
    *format = QTR_KV_INT8_STATIC;
    return QTR_OK;
  }
  *format = bits == 4 ? QTR_KV_INT4 : bits == 8 ? QTR_KV_INT8 : QTR_KV_F16;
  return QTR_OK;
}

/* ---- pool ---------------------------------------------------------------------------------------- */

/* The first of some variables that is set: a number of pages. *n_pages 0: none is. QServe's are in D.9. */
static enum qtr_status read_environment(const char *const *names, size_t n_names, int32_t *n_pages, struct qtr_error *err) {
  *n_pages = 0;
  for (size_t i = 0; i < n_names && *n_pages == 0; i++) {
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

/* What the pools may take, and the bytes of their pages. */
struct sizing {
  size_t page, stream_page; /* bytes; 0: no such heads */
  size_t whole;             /* pages of a full-length sequence */
  size_t least_streams;     /* stream pages that one sequence may need at once */
  size_t wanted_streams;    /* for all sequences at once, prompts included */
  size_t most;              /* bytes that there are at all */
};

static size_t pool_bytes(const struct sizing *z, size_t n_pages, size_t n_streams) {
  size_t a, b, sum; /* page counts are below 2^31, page sizes below 2^48 */
  if (qtr_mul_overflow(n_pages, z->page, &a) || qtr_mul_overflow(n_streams, z->stream_page, &b) ||
      qtr_add_overflow(a, b, &sum))
    return SIZE_MAX;
  return sum;
}

/* Stream pages to go with n pages: never more than those, or than are of use. */
static size_t streams_for(const struct sizing *z, size_t n_pages) {
  if (z->stream_page == 0) return 0;
  return QTR_MAX(QTR_MIN(n_pages, z->wanted_streams), z->least_streams);
}

/* The most pages that fit into n_bytes together with their stream pages. */
static size_t pages_in(const struct sizing *z, size_t n_bytes, size_t fixed_streams) {
  size_t low = 0, high = INT32_MAX;
  while (low < high) {
    size_t middle = low + (high - low + 1) / 2;
    if (pool_bytes(z, middle, fixed_streams ? fixed_streams : streams_for(z, middle)) <= n_bytes)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

static struct sizing make_sizing(const struct qtr_engine *e, const struct qtr_caps *caps) {
  /* Mapped weights may not be resident yet and still count as free: what the machine has bounds the pool too. */
  size_t fixed = e->model->weight_bytes + qtr_workspace_bytes(e->workspace) + e->selection_bytes;
  struct sizing z = {.page = e->kv_page_bytes,
                     .stream_page = e->stream_page_bytes,
                     .whole = qtr_ceil_div((size_t)e->max_model_len, QTR_PAGE_TOKENS),
                     .most = caps->memory_total > fixed ? caps->memory_total - fixed : 0};
  if (e->streams) {
    struct qtr_kv_sparse decode = e->sparse;
    decode.context = decode.decode;
    size_t steady = (size_t)qtr_streams_most(&decode, 1, e->max_model_len);
    z.least_streams = (size_t)qtr_streams_most(&e->sparse, e->max_num_batched_tokens, e->max_model_len);
    z.wanted_streams = z.least_streams + ((size_t)e->max_num_seqs - 1) * steady;
  }
  return z;
}

/* Sets n_pages and n_stream_pages, and max_model_len so that the pools hold any one sequence alone. */
static enum qtr_status size_pool(struct qtr_engine *e, const struct qtr_engine_options *o, struct qtr_error *err) {
  static const char *const variables[] = {"NUM_GPU_PAGE_BLOCKS", "NUM_RETRIEVAL_GPU_PAGE_BLOCKS"},
                           *const stream_variables[] = {"NUM_STREAMING_GPU_PAGE_BLOCKS"};
  struct qtr_caps caps;
  e->model->backend->ops->caps(e->model->backend, &caps);
  struct sizing z = make_sizing(e, &caps);
  int32_t from_environment = 0, streams_from_environment = 0;
  size_t n = 0, n_streams = 0; /* n_streams 0: to go with n */
  const char *from;
  enum qtr_status status = read_environment(variables, 2, &from_environment, err);
  if (!status && e->streams) status = read_environment(stream_variables, 1, &streams_from_environment, err);
  if (status) return status;
  if (e->streams) {
    n_streams = (size_t)(o->sparse.stream_pages > 0 ? o->sparse.stream_pages : streams_from_environment);
    if (n_streams > 0 && n_streams < z.least_streams) {
      return qtr_fail(
          err, QTR_ERR_LIMIT,
          "%zu pages for the streaming heads: one sequence in steps of %d tokens needs %zu; give it more pages, smaller "
          "windows, or smaller steps (max_num_batched_tokens)",
          n_streams, e->max_num_batched_tokens, z.least_streams);
    }
  }
  if (o->kv_pages > 0) {
    n = (size_t)o->kv_pages;
    from = "kv_pages";
  } else if (o->kv_bytes > 0) {
    n = o->kv_bytes > e->selection_bytes ? pages_in(&z, o->kv_bytes - e->selection_bytes, n_streams) : 0;
    from = "kv_bytes";
  } else if (from_environment > 0) {
    n = (size_t)from_environment;
    from = "the environment";
  } else {
    size_t room = QTR_MIN(z.most, caps.memory_free - QTR_MIN(caps.memory_free, e->selection_bytes));
    double share = caps.memory_share > 0 ? (double)caps.memory_share : MEMORY_SHARE;
    n = pages_in(&z, (size_t)(share * (double)room), n_streams);
    n = QTR_MIN(n, z.whole * (size_t)e->max_num_seqs);
    from = "free memory";
  }
  if (z.page == 0) n = QTR_MIN(n, z.whole * (size_t)e->max_num_seqs); /* no retrieval heads at all: pages cost nothing */
  n = QTR_MIN(n, (size_t)INT32_MAX);
  if (n < z.whole) {
    if (n < 1 || o->max_model_len > 0) {
      return qtr_fail(
          err, QTR_ERR_LIMIT,
          "the KV pool (from %s) has %zu pages of %d tokens at %zu bytes; one sequence of max_model_len %d needs %zu "
          "pages: give it more memory or lower max_model_len",
          from, n, QTR_PAGE_TOKENS, e->kv_page_bytes, e->max_model_len, z.whole);
    }
    e->max_model_len = (int32_t)n * QTR_PAGE_TOKENS;
    (void)fprintf(stderr, "quattuor: the KV pool (from %s) has %zu pages: max_model_len is lowered to %d tokens\n", from, n,
                  e->max_model_len);
    z = make_sizing(e, &caps);
  }
  if (e->streams && n_streams == 0) n_streams = streams_for(&z, n);
  n_streams = QTR_MIN(n_streams, (size_t)INT32_MAX);
  /* Memory is given out page by page as it is touched: a wish beyond what there is would end the process in the middle. */
  if (pool_bytes(&z, n, n_streams) > z.most) {
    return qtr_fail(
        err, QTR_ERR_LIMIT,
        "the KV pool (from %s) has %zu pages of %zu bytes%s, but %s has %zu bytes, and %zu of them go to weights and "
        "workspace: at most %zu pages fit",
        from, n, e->kv_page_bytes, e->streams ? " besides those of the streaming heads" : "", e->device, caps.memory_total,
        caps.memory_total - z.most, pages_in(&z, z.most, n_streams));
  }
  e->n_pages = (int32_t)n;
  e->n_stream_pages = (int32_t)n_streams;
  return QTR_OK;
}

/* ---- sparse attention ------------------------------------------------------------------------------- */

/* Fills e->sparse; *streaming (n_layers, n_kv_heads) is malloc'ed when there are streaming heads, else NULL. */
static enum qtr_status choose_sparse(struct qtr_engine *e, const struct qtr_sparse_options *o, uint8_t **streaming,
                                     struct qtr_error *err) {
  const struct qtr_config *c = &e->model->config;
  size_t n = (size_t)c->n_layers * (size_t)c->n_kv_heads;
  const struct qtr_kv_window everything = {0, QTR_ALL_TOKENS};
  *streaming = NULL;
  e->sparse = (struct qtr_kv_sparse){.context = everything, .decode = everything};
  if (o->static_sparsity > 0) {
    *streaming = calloc(n, 1);
    if (!*streaming) return qtr_fail_memory(err, "the classes of attention heads", n);
    enum qtr_status status =
        o->heads ? qtr_heads_choose(o->heads, n, (double)o->static_sparsity, *streaming, err)
                 : qtr_heads_read(o->heads_dir, c->n_layers, c->n_kv_heads, (double)o->static_sparsity, *streaming, err);
    if (status) return status;
    for (size_t i = 0; i < n; i++) e->n_streaming_heads += (*streaming)[i];
    e->streams = e->n_streaming_heads > 0;
  }
  if (e->streams) {
    e->sparse.decode = (struct qtr_kv_window){o->dec_sink, o->dec_local};
    if (o->context_mode) e->sparse.context = (struct qtr_kv_window){o->ctx_sink, o->ctx_local};
    e->tells_apart = e->sparse.context.sink != o->dec_sink || e->sparse.context.local != o->dec_local;
  }
  if (o->decode_mode != 0) {
    e->sparse.budget = o->token_budget;
    e->sparse.interval = o->selector_interval;
    e->sparse.logical_tokens = QTR_PAGE_TOKENS / o->sub_chunks;
    e->sparse.each_head = o->each_head;
    e->tells_apart = true;
  }
  e->sparse.group = c->n_heads / c->n_kv_heads;
  e->sparse.n_slots = e->max_num_seqs;
  e->sparse.max_pages = (int32_t)qtr_ceil_div((size_t)e->max_model_len, QTR_PAGE_TOKENS);
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
  e->ahead = caps.ahead;
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

struct array {
  void *at; /* the address of a pointer */
  size_t n_bytes;
};

static enum qtr_status make_arrays(const struct array *array, size_t n, struct qtr_error *err) {
  for (size_t i = 0; i < n; i++) {
    void *memory = calloc(1, array[i].n_bytes);
    if (!memory) return qtr_fail_memory(err, "the arrays of a step", array[i].n_bytes);
    memcpy(array[i].at, &memory, sizeof memory);
  }
  return QTR_OK;
}

static enum qtr_status make_pass(const struct qtr_engine *e, struct qtr_pass *r, struct qtr_error *err) {
  size_t tokens = (size_t)e->max_num_batched_tokens, seqs = (size_t)e->max_num_seqs, rows = (size_t)e->max_rows;
  size_t blocks = seqs * (size_t)e->max_blocks * sizeof(int32_t);
  const struct array array[] = {{&r->token, tokens * sizeof *r->token},
                                {&r->position, tokens * sizeof *r->position},
                                {&r->q_start, (seqs + 1) * sizeof *r->q_start},
                                {&r->kv_len, seqs * sizeof *r->kv_len},
                                {&r->block_table, blocks},
                                {&r->stream_table, e->streams ? blocks : 1},
                                {&r->decode_start, seqs * sizeof *r->decode_start},
                                {&r->slot, seqs * sizeof *r->slot},
                                {&r->logit_row, rows * sizeof *r->logit_row},
                                {&r->batch_seq, seqs * sizeof *r->batch_seq},
                                {&r->row_seq, rows * sizeof *r->row_seq},
                                {&r->row_target, rows * sizeof *r->row_target},
                                {&r->row_node, rows * sizeof *r->row_node},
                                {&r->choose, rows * sizeof *r->choose},
                                {&r->chosen, rows * sizeof *r->chosen}};
  return make_arrays(array, sizeof array / sizeof array[0], err);
}

/* Everything a step needs, so that it allocates nothing. */
static enum qtr_status make_batch(struct qtr_engine *e, struct qtr_error *err) {
  size_t seqs = (size_t)e->max_num_seqs, blocks;
  e->max_blocks = (int32_t)qtr_ceil_div((size_t)e->max_model_len, QTR_PAGE_TOKENS);
  if (qtr_mul_overflow(seqs, (size_t)e->max_blocks * sizeof(int32_t), &blocks))
    return qtr_fail_memory(err, "block tables", blocks);
  const struct array array[] = {{&e->free_slot, seqs * sizeof *e->free_slot},
                                {&e->running, seqs * sizeof *e->running},
                                {&e->row_logits, (size_t)e->vocab_size * sizeof *e->row_logits},
                                {&e->allowed, qtr_ceil_div((size_t)e->vocab_size, 32) * sizeof *e->allowed}};
  enum qtr_status status = make_arrays(array, sizeof array / sizeof array[0], err);
  int n_passes = e->ahead ? QTR_STEPS_UNDER_WAY : 1;
  for (int i = 0; i < n_passes && !status; i++) status = make_pass(e, &e->pass[i], err);
  if (status) return status;
  for (size_t i = 0; i < seqs; i++) e->free_slot[e->n_free_slots++] = (int32_t)(seqs - 1 - i); /* 0 goes first */
  return qtr_sampler_create(e->vocab_size, &e->sampler, err);
}

static void free_pass(struct qtr_pass *r) {
  void *const array[] = {r->token,        r->position, r->q_start,   r->kv_len,    r->block_table, r->stream_table,
                         r->decode_start, r->slot,     r->logit_row, r->batch_seq, r->row_seq,     r->row_target,
                         r->row_node,     r->choose,   r->chosen,    r->adjust};
  for (size_t i = 0; i < sizeof array / sizeof array[0]; i++) free(array[i]);
}

/* Frees what open_model made; what it was given stays with the caller. */
static void engine_free(struct qtr_engine *e) {
  if (e->kv) e->model->backend->ops->kv_free(e->model->backend, e->kv);
  qtr_workspace_free(e->workspace);
  qtr_kv_pool_free(e->pool);
  qtr_event_queue_free(&e->events);
  qtr_sampler_free(e->sampler);
  for (int i = 0; i < QTR_STEPS_UNDER_WAY; i++) free_pass(&e->pass[i]);
  void *const array[] = {e->running, e->row_logits, e->allowed, e->model_dir, e->free_slot};
  for (size_t i = 0; i < sizeof array / sizeof array[0]; i++) free(array[i]);
  (void)pthread_mutex_destroy(&e->mutex);
  free(e);
}

/* The KV8 scales, when they are asked for, as those of fp8: the same largest value. *scale is malloc'ed. */
static enum qtr_status use_fp8(const struct qtr_engine_options *o, struct qtr_kv_config *kv, float **scale,
                               struct qtr_error *err) {
  const float *static_scale = o->kv_scales || o->kv_quant_params_path ? kv->static_scale : NULL;
  size_t n = (size_t)kv->n_layers * 2;
  bool e4m3 = strcmp(o->kv_fp8, "e4m3") == 0;
  kv->fp8 = e4m3 ? QTR_KV_FP8_E4M3 : QTR_KV_FP8_E5M2;
  kv->static_scale = NULL;
  if (!static_scale) return QTR_OK;
  if (!(*scale = malloc(n * sizeof **scale))) return qtr_fail_memory(err, "fp8 scales", n * sizeof **scale);
  for (size_t i = 0; i < n; i++) (*scale)[i] = static_scale[i] * 127 / (e4m3 ? 448.0f : 57344.0f);
  kv->static_scale = *scale;
  return QTR_OK;
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
  float *fp8_scale = NULL;
  uint8_t *streaming = NULL;
  enum qtr_status status = qtr_engine_options_check(o, err);
  if (!status) status = check_weights(model, o, err);
  if (!status) status = read_kv_params(model, o, err);
  if (!status) status = choose_kv_format(model, o, &kv_format, err);
  if (!status) status = choose_lengths(e, o, err);
  if (!status) status = choose_sparse(e, &o->sparse, &streaming, err);
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
  if (o->kv_fp8 && (status = use_fp8(o, &kv, &fp8_scale, err))) goto done;
  struct qtr_kv_sparse sparse = e->sparse;
  sparse.streaming = e->streams ? streaming : NULL;
  if (e->streams || e->sparse.budget > 0) kv.sparse = &sparse;
  e->kv_page_bytes = qtr_kv_page_bytes(&kv);
  e->stream_page_bytes = qtr_kv_stream_page_bytes(&kv);
  e->selection_bytes = qtr_kv_selection_bytes(&kv);
  if (e->kv_page_bytes == SIZE_MAX || e->stream_page_bytes == SIZE_MAX || e->selection_bytes > SIZE_MAX / 4) {
    status = qtr_fail(err, QTR_ERR_LIMIT, "a KV page of this model would be larger than the address space");
    goto done;
  }
  status = size_pool(e, o, err);
  kv.n_pages = e->n_pages;
  kv.n_stream_pages = e->n_stream_pages;
  if (!status) status = make_batch(e, err);
  if (!status) status = qtr_kv_pool_create(e->n_pages, e->prefix_cache, &e->pool, err);
  if (!status && e->streams) status = qtr_kv_pool_add_streams(e->pool, e->n_stream_pages, err);
  if (!status) status = model->backend->ops->kv_create(model->backend, &kv, &e->kv, err);
done:
  free(fp8_scale);
  free(streaming);
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

struct qtr_model *qtr_engine_close_keep_model(struct qtr_engine *e) {
  struct qtr_model *model = e->model;
  for (int i = 0; i < QTR_STEPS_UNDER_WAY; i++) { /* nothing may be under way in what is freed now */
    if (e->pass[i].launched) (void)qtr_model_collect(model, e->workspace, NULL);
  }
  for (size_t slot = 0; slot < QTR_ID_SLOTS; slot++) {
    while (e->by_id[slot]) qtr_scheduler_end(e, e->by_id[slot], QTR_FINISH_CANCELLED);
  }
  qtr_chat_template_close(e->chat);
  qtr_tokenizer_close(e->tokenizer);
  engine_free(e);
  return model;
}

void qtr_engine_close(struct qtr_engine *e) {
  if (!e) return;
  struct qtr_model *model = qtr_engine_close_keep_model(e);
  struct qtr_backend *backend = model->backend;
  qtr_model_free(model);
  qtr_backend_close(backend);
}
