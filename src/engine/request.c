/* request.c - what a caller asked for, checked and copied, and the life of one completion between tokens: appending, text,
 * stop strings, the end. Scheduling is scheduler.c's. Ranges: quattuor.h and spec E.4. */
#include "backend/backend.h"
#include "base/checked.h"
#include "base/status.h"
#include "engine/engine_internal.h"

#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

/* splitmix64's finaliser: the streams of neighbouring completions have nothing in common. */
static uint64_t mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

static uint64_t system_seed(void) {
  uint64_t seed = 0;
  if (getrandom(&seed, sizeof seed, 0) == (ssize_t)sizeof seed) return seed;
  struct timespec now;
  (void)clock_gettime(CLOCK_MONOTONIC, &now);
  return mix((uint64_t)now.tv_sec ^ (uint64_t)now.tv_nsec << 32);
}

/* Length of the UTF-8 character at s, 0 when there is none: no overlong forms, surrogates or values above U+10FFFF. */
static size_t utf8_char(const unsigned char *s, size_t len) {
  if (len == 0) return 0;
  if (s[0] < 0x80) return 1;
  size_t n = s[0] >= 0xF0 ? 4 : s[0] >= 0xE0 ? 3 : 2;
  if (s[0] < 0xC2 || s[0] > 0xF4 || n > len) return 0;
  for (size_t i = 1; i < n; i++) {
    if ((s[i] & 0xC0) != 0x80) return 0;
  }
  if ((s[0] == 0xE0 && s[1] < 0xA0) || (s[0] == 0xED && s[1] > 0x9F) || (s[0] == 0xF0 && s[1] < 0x90) ||
      (s[0] == 0xF4 && s[1] > 0x8F)) {
    return 0;
  }
  return n;
}

static bool is_utf8(const char *text, size_t len) {
  for (size_t at = 0; at < len;) {
    size_t n = utf8_char((const unsigned char *)text + at, len - at);
    if (n == 0) return false;
    at += n;
  }
  return true;
}

/* ---- checks -------------------------------------------------------------------------------------- */

static enum qtr_status check_numbers(const struct qtr_engine *engine, const struct qtr_request_options *o,
                                     struct qtr_error *err) {
  if (o->max_tokens < 0) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "max_tokens is %d; it must be at least 1, or 0 for as many as fit",
                    o->max_tokens);
  }
  if (o->n < 0 || o->n > QTR_MAX_COMPLETIONS) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "n is %d; it must be 1 … %d", o->n, QTR_MAX_COMPLETIONS);
  }
  if (o->logprobs < -1 || o->logprobs > QTR_MAX_TOP_LOGPROBS) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "logprobs is %d; it must be -1 (none) or 0 … %d", o->logprobs,
                    QTR_MAX_TOP_LOGPROBS);
  }
  const struct {
    const char *name;
    size_t n, most;
    const void *list;
  } list[] = {{"stop", o->n_stop, QTR_MAX_STOPS, o->stop},
              {"stop_token", o->n_stop_token, QTR_MAX_STOP_TOKENS, o->stop_token},
              {"logit_bias", o->n_logit_bias, QTR_MAX_LOGIT_BIAS, o->logit_bias}};
  for (size_t i = 0; i < sizeof list / sizeof list[0]; i++) {
    if (list[i].n > list[i].most) {
      return qtr_fail(err, QTR_ERR_ARGUMENT, "%s has %zu entries; at most %zu are allowed", list[i].name, list[i].n,
                      list[i].most);
    }
    if (list[i].n > 0 && !list[i].list) {
      return qtr_fail(err, QTR_ERR_ARGUMENT, "%s is NULL but its count is %zu", list[i].name, list[i].n);
    }
  }
  for (size_t i = 0; i < o->n_stop_token; i++) {
    if (o->stop_token[i] < 0 || o->stop_token[i] >= engine->vocab_size) {
      return qtr_fail(err, QTR_ERR_ARGUMENT, "stop_token[%zu] is %d; the vocabulary has ids 0 … %d", i, o->stop_token[i],
                      engine->vocab_size - 1);
    }
  }
  for (size_t i = 0; i < o->n_logit_bias; i++) {
    const struct qtr_logit_bias *b = &o->logit_bias[i];
    if (b->token < 0 || b->token >= engine->vocab_size) {
      return qtr_fail(err, QTR_ERR_ARGUMENT, "logit_bias[%zu] names token %d; the vocabulary has ids 0 … %d", i, b->token,
                      engine->vocab_size - 1);
    }
    if (!(b->bias >= -100 && b->bias <= 100)) {
      return qtr_fail(err, QTR_ERR_ARGUMENT, "logit_bias of token %d is %g; it must be in -100 … 100", b->token,
                      (double)b->bias);
    }
  }
  return qtr_sampling_check(&o->sampling, err);
}

/* Valid UTF-8 also means: what is held back for a stop string begins at a character, so events end at one. */
static enum qtr_status check_stops(const struct qtr_engine *engine, const struct qtr_request_options *o,
                                   struct qtr_error *err) {
  if (o->n_stop > 0 && !engine->tokenizer) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "stop strings need a tokenizer, and this engine has none; use stop tokens");
  }
  for (size_t i = 0; i < o->n_stop; i++) {
    if (!o->stop[i]) return qtr_fail(err, QTR_ERR_ARGUMENT, "stop[%zu] is NULL", i);
    size_t len = strnlen(o->stop[i], QTR_MAX_STOP_BYTES + 1);
    if (len == 0 || len > QTR_MAX_STOP_BYTES) {
      return qtr_fail(err, QTR_ERR_ARGUMENT, "stop[%zu] has %s; it must have 1 … %d bytes", i,
                      len == 0 ? "no text" : "more than 256 bytes", QTR_MAX_STOP_BYTES);
    }
    if (!is_utf8(o->stop[i], len)) return qtr_fail(err, QTR_ERR_ARGUMENT, "stop[%zu] is not valid UTF-8", i);
  }
  return QTR_OK;
}

static enum qtr_status check_prompt(const struct qtr_engine *engine, const int32_t *prompt, size_t n_prompt,
                                    struct qtr_error *err) {
  if (n_prompt == 0) return qtr_fail(err, QTR_ERR_ARGUMENT, "the prompt is empty; give at least one token");
  /* One token more must fit. The pool always holds max_model_len tokens: open.c saw to it. */
  if (n_prompt >= (size_t)engine->max_model_len) {
    return qtr_fail(
        err, QTR_ERR_LIMIT,
        "the prompt has %zu tokens and max_model_len is %d (prompt and output; the KV pool holds %d pages of %d): "
        "shorten it to at most %d tokens",
        n_prompt, engine->max_model_len, engine->n_pages, QTR_PAGE_TOKENS, engine->max_model_len - 1);
  }
  for (size_t i = 0; i < n_prompt; i++) {
    if (prompt[i] < 0 || prompt[i] >= engine->vocab_size) {
      return qtr_fail(err, QTR_ERR_ARGUMENT, "prompt token %zu is %d; the vocabulary has ids 0 … %d", i, prompt[i],
                      engine->vocab_size - 1);
    }
  }
  return QTR_OK;
}

/* ---- creation ------------------------------------------------------------------------------------ */

/* A copy of n > 0 elements, or NULL for none; *ok turns false when there is no memory. */
static void *copy(const void *from, size_t n, size_t size, bool *ok) {
  if (n == 0) return NULL;
  void *to = malloc(n * size);
  if (to)
    memcpy(to, from, n * size);
  else
    *ok = false;
  return to;
}

static bool prompt_is_special(const struct qtr_engine *engine, const struct qtr_request *r) {
  for (int32_t i = 0; i < r->n_prompt; i++) {
    if (!qtr_tokenizer_is_special(engine->tokenizer, r->prompt[i])) return false;
  }
  return true;
}

enum qtr_status qtr_request_create(const struct qtr_engine *engine, const struct qtr_request_options *o,
                                   const int32_t *prompt, size_t n_prompt, struct qtr_request **request,
                                   struct qtr_error *err) {
  *request = NULL;
  enum qtr_status status = check_numbers(engine, o, err);
  if (!status) status = check_stops(engine, o, err);
  if (!status) status = check_prompt(engine, prompt, n_prompt, err);
  if (status) return status;

  int32_t n = o->n > 0 ? o->n : 1;
  size_t n_bytes = sizeof(struct qtr_request) + (size_t)n * sizeof(struct qtr_sequence);
  struct qtr_request *r = calloc(1, n_bytes);
  if (!r) return qtr_fail_memory(err, "a request", n_bytes);
  int32_t room = engine->max_model_len - (int32_t)n_prompt;
  r->user = o->user;
  r->n_prompt = (int32_t)n_prompt;
  r->max_tokens = o->max_tokens > 0 ? QTR_MIN(o->max_tokens, room) : room;
  r->priority = o->priority;
  r->logprobs = o->logprobs;
  r->prompt_logprobs = o->prompt_logprobs && o->logprobs >= 0;
  r->n_sequences = r->n_live = n;
  r->ignore_eos = o->ignore_eos;
  if (o->constraint) r->constraint = *o->constraint;
  r->sampling = o->sampling;
  bool ok = true;
  r->prompt = copy(prompt, n_prompt, sizeof *prompt, &ok);
  r->stop_token = copy(o->stop_token, r->n_stop_token = o->n_stop_token, sizeof *o->stop_token, &ok);
  r->bias = copy(o->logit_bias, r->n_bias = o->n_logit_bias, sizeof *o->logit_bias, &ok);
  r->n_stop = o->n_stop;
  if (r->n_stop > 0) {
    r->stop = calloc(r->n_stop, sizeof *r->stop);
    ok = ok && r->stop;
  }
  if (!ok) {
    qtr_request_free(r);
    return qtr_fail_memory(err, "a request", n_prompt * sizeof *prompt);
  }
  for (size_t i = 0; i < r->n_stop; i++) {
    r->stop[i].len = strlen(o->stop[i]);
    memcpy(r->stop[i].text, o->stop[i], r->stop[i].len);
  }
  uint64_t seed = o->sampling.has_seed ? o->sampling.seed : system_seed();
  /* The text goes on from the prompt's: only after nothing but special tokens does it start a text of its own. */
  bool at_start = engine->tokenizer && prompt_is_special(engine, r);
  for (int32_t i = 0; i < n; i++) {
    struct qtr_sequence *s = &r->sequence[i];
    s->request = r;
    s->index = i;
    s->n_tokens = r->n_prompt;
    s->n_cached = -1;
    s->slot = -1;
    s->seed = mix(seed + mix((uint64_t)i));
    if (engine->tokenizer) {
      qtr_detokenizer_init(&s->detokenizer, engine->tokenizer, true);
      s->detokenizer.at_start = at_start;
    }
  }
  *request = r;
  return QTR_OK;
}

void qtr_request_free(struct qtr_request *r) {
  if (!r) return;
  for (int32_t i = 0; i < r->n_sequences; i++) {
    free(r->sequence[i].token);
    free(r->sequence[i].page);
    free(r->sequence[i].stream);
    qtr_text_free(&r->sequence[i].held);
    if (r->sequence[i].constraint) r->constraint.stop(r->sequence[i].constraint);
  }
  free(r->prompt);
  free(r->stop_token);
  free(r->stop);
  free(r->bias);
  free(r);
}

bool qtr_sequence_prepare(struct qtr_sequence *s) {
  const struct qtr_request *r = s->request;
  size_t n = (size_t)r->n_prompt + (size_t)r->max_tokens;
  size_t n_pages = qtr_ceil_div(n, QTR_PAGE_TOKENS);
  if (s->token) return true;
  s->token = malloc(n * sizeof *s->token);
  s->page = malloc(n_pages * sizeof *s->page);
  s->stream = malloc(n_pages * sizeof *s->stream);
  if (!s->token || !s->page || !s->stream) {
    free(s->token);
    free(s->page);
    free(s->stream);
    s->token = s->page = s->stream = NULL;
    return false;
  }
  for (size_t i = 0; i < n_pages; i++) s->stream[i] = -1;
  memcpy(s->token, r->prompt, (size_t)r->n_prompt * sizeof *s->token);
  return true;
}

/* ---- text and stop strings ----------------------------------------------------------------------- */

/* Looks for the stop string that ends first in the held text (of those, the one that begins first), among the ends after
 * `checked` bytes. So the answer is the one a reader of single characters would give, however tokens cut the text. */
static bool find_stop(const struct qtr_request *r, const struct qtr_text *held, size_t checked, size_t *start) {
  for (size_t end = checked + 1; end <= held->len; end++) {
    bool found = false;
    for (size_t i = 0; i < r->n_stop; i++) {
      size_t len = r->stop[i].len;
      if (len > end || memcmp(held->data + end - len, r->stop[i].text, len) != 0) continue;
      if (!found || end - len < *start) *start = end - len;
      found = true;
    }
    if (found) return true;
  }
  return false;
}

/* Length of the longest end of the held text that begins a stop string. */
static size_t stop_prefix(const struct qtr_request *r, const struct qtr_text *held) {
  size_t longest = 0;
  for (size_t i = 0; i < r->n_stop; i++) {
    for (size_t n = QTR_MIN(r->stop[i].len - 1, held->len); n > longest; n--) {
      if (memcmp(held->data + held->len - n, r->stop[i].text, n) == 0) longest = n;
    }
  }
  return longest;
}

/* Moves held text to `out`: all that cannot belong to a stop string, or all when `last`. *stopped: a stop string was found,
 * and the text before it is out. `checked` bytes of the held text were looked through before. */
static enum qtr_status release(const struct qtr_request *r, struct qtr_text *held, size_t checked, bool last,
                               struct qtr_text *out, bool *stopped) {
  size_t n = held->len;
  *stopped = find_stop(r, held, checked, &n);
  if (!*stopped && !last) n -= stop_prefix(r, held);
  enum qtr_status status = qtr_text_append(out, held->data ? held->data : "", n, NULL);
  if (held->len > n) memmove(held->data, held->data + n, held->len - n);
  held->len -= n;
  if (*stopped) held->len = 0;
  return status;
}

static bool ends_sequence(const struct qtr_engine *engine, const struct qtr_request *r, int32_t token) {
  for (int32_t i = 0; i < engine->n_eos && !r->ignore_eos; i++) {
    if (engine->eos_token[i] == token) return true;
  }
  for (size_t i = 0; i < r->n_stop_token; i++) {
    if (r->stop_token[i] == token) return true;
  }
  return false;
}

void qtr_sequence_describe(const struct qtr_sequence *s, struct qtr_event *e) {
  const struct qtr_request *r = s->request;
  e->id = r->id;
  e->user = r->user;
  e->index = s->index;
  e->n_prompt_tokens = r->n_prompt;
  e->n_cached_tokens = QTR_MAX(s->n_cached, 0);
}

bool qtr_sequence_scores(const struct qtr_sequence *s) {
  const struct qtr_request *r = s->request;
  return r->prompt_logprobs && s->index == 0 && s->n_scored < r->n_prompt - 1;
}

static void put_logprob(const struct qtr_sample_result *result, struct qtr_event_node *node) {
  node->event.has_logprob = true;
  node->event.logprob = result->logprob;
  node->event.n_top_logprob = result->n_top;
  memcpy(node->top, result->top, (size_t)result->n_top * sizeof node->top[0]);
}

void qtr_sequence_score(const struct qtr_sequence *s, int32_t target, const struct qtr_sample_result *result,
                        struct qtr_event_node *node) {
  qtr_sequence_describe(s, &node->event);
  node->event.token = result->token;
  node->event.prompt_index = target;
  put_logprob(result, node);
}

void qtr_sequence_accept(const struct qtr_engine *engine, struct qtr_sequence *s, const struct qtr_sample_result *result,
                         struct qtr_event_node *node) {
  const struct qtr_request *r = s->request;
  struct qtr_event *e = &node->event;
  qtr_sequence_describe(s, e);
  e->token = result->token;
  e->n_output_tokens = qtr_sequence_known(s) - r->n_prompt;
  s->finish = QTR_FINISH_ERROR;
  s->look = false;
  if (result->token < 0) return;

  s->token[qtr_sequence_known(s)] = result->token;
  s->n_pending--;
  if (s->constraint) r->constraint.accept(s->constraint, result->token);
  e->n_output_tokens++;
  if (r->logprobs >= 0) put_logprob(result, node);
  bool stop = ends_sequence(engine, r, result->token);
  bool full = e->n_output_tokens >= r->max_tokens;
  if (engine->tokenizer) {
    size_t checked = s->held.len;
    enum qtr_status status = QTR_OK;
    if (!stop)
      status = qtr_detokenizer_push(&s->detokenizer, result->token, &s->held, NULL); /* an ending token is no text */
    if (!status && (stop || full)) status = qtr_detokenizer_end(&s->detokenizer, &s->held, NULL);
    bool found = false;
    if (!status) status = release(r, &s->held, checked, stop || full, &node->text, &found);
    if (status) return; /* out of memory: the completion ends with QTR_FINISH_ERROR */
    stop = stop || found;
  }
  s->finish = stop ? QTR_FINISH_STOP : full ? QTR_FINISH_LENGTH : QTR_FINISH_NONE;
}
