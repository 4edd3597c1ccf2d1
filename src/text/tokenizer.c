/* tokenizer.c - opening a tokenizer and encoding with it (tokenizer.h): added tokens out of the raw text, normalizer, added
 * tokens out of the normalized text, pre-tokenizer, BPE, then BOS and EOS around it. */
#include "base/checked.h"
#include "base/file.h"
#include "base/status.h"
#include "text/tokenizer_impl.h"
#include "text/unicode.h"

#include <stdlib.h>
#include <string.h>

/* ---- opening ------------------------------------------------------------------------------------- */

enum qtr_status qtr_tokenizer_new(struct qtr_tokenizer **tokenizer, struct qtr_error *err) {
  struct qtr_tokenizer *t = calloc(1, sizeof *t);
  *tokenizer = t;
  if (!t) return qtr_fail_memory(err, "a tokenizer", sizeof *t);
  t->bpe.vocab = &t->vocab;
  t->bpe.unk = t->bos = t->eos = t->add_bos = t->add_eos = -1;
  t->first_internal = -1;
  return QTR_OK;
}

void qtr_tokenizer_close(struct qtr_tokenizer *t) {
  if (!t) return;
  qtr_vocab_free(&t->vocab);
  qtr_bpe_free(&t->bpe);
  qtr_normalizer_free(&t->normalizer);
  qtr_normalizer_free(&t->decoder.replace);
  qtr_pretokenizer_free(&t->pretokenizer);
  qtr_trie_free(&t->raw);
  qtr_trie_free(&t->normalized);
  qtr_text_free(&t->decoded);
  free(t->decoded_at);
  free(t->byte_value);
  free(t);
}

static void drop_id(int32_t *ids, size_t *n, size_t at) {
  memmove(ids + at, ids + at + 1, (*n - at - 1) * sizeof *ids);
  --*n;
}

/* What a configuration says about BOS and EOS wins over the post-processor. */
static enum qtr_status settle_template(struct qtr_tokenizer *t, struct qtr_error *err) {
  if (t->bos < 0 && t->n_prefix > 0) t->bos = t->prefix[0];
  if (t->eos < 0 && t->n_suffix > 0) t->eos = t->suffix[t->n_suffix - 1];
  bool has_bos = t->n_prefix > 0 && t->prefix[0] == t->bos;
  bool has_eos = t->n_suffix > 0 && t->suffix[t->n_suffix - 1] == t->eos;
  if (has_bos && t->add_bos == 0) drop_id(t->prefix, &t->n_prefix, 0);
  if (has_eos && t->add_eos == 0) drop_id(t->suffix, &t->n_suffix, t->n_suffix - 1);
  if (t->n_prefix == QTR_MAX_TEMPLATE_IDS || t->n_suffix == QTR_MAX_TEMPLATE_IDS) {
    return qtr_fail(err, QTR_ERR_FORMAT, "post_processor: %d ids or more around a text", QTR_MAX_TEMPLATE_IDS);
  }
  if (!has_bos && t->add_bos == 1 && t->bos >= 0) {
    memmove(t->prefix + 1, t->prefix, t->n_prefix++ * sizeof *t->prefix);
    t->prefix[0] = t->bos;
  }
  if (!has_eos && t->add_eos == 1 && t->eos >= 0) t->suffix[t->n_suffix++] = t->eos;
  return QTR_OK;
}

/* A token that takes part in normalisation is looked for in the form that the normalizer gives it. */
static enum qtr_status build_tries(struct qtr_tokenizer *t, struct qtr_error *err) {
  struct qtr_text text = {0};
  struct qtr_pattern_scratch scratch = {0};
  enum qtr_status status = QTR_OK;
  for (int32_t id = 0; id < t->n_ids && !status; id++) {
    if (!(t->vocab.tokens[id].flags & QTR_TOKEN_ADDED)) continue;
    bool normalized = t->vocab.tokens[id].flags & QTR_TOKEN_NORMALIZED;
    size_t len;
    const char *content = qtr_vocab_text(&t->vocab, id, &len);
    if (normalized && !t->added_as_is && t->normalizer.n_steps > 0) {
      status = qtr_normalizer_apply(&t->normalizer, &scratch, content, len, &text, err);
      content = text.data;
      len = text.len;
    }
    if (!status) status = qtr_trie_put(normalized ? &t->normalized : &t->raw, content, len, id, err);
  }
  qtr_text_free(&text);
  qtr_pattern_scratch_free(&scratch);
  return status;
}

enum qtr_status qtr_tokenizer_finish(struct qtr_tokenizer *t, struct qtr_error *err) {
  t->n_ids = t->first_internal < 0 ? t->vocab.n_tokens : t->first_internal;
  while (t->n_ids > 0 && !qtr_vocab_has(&t->vocab, t->n_ids - 1)) t->n_ids--;
  for (int32_t id = t->n_ids; id < t->vocab.n_tokens; id++) {
    if (t->vocab.tokens[id].flags & QTR_TOKEN_ADDED) {
      return qtr_fail(err, QTR_ERR_FORMAT, "an added token has id %d, far from the %d pieces", id, t->n_ids);
    }
  }
  t->bpe.n_public = t->n_ids;
  enum qtr_status status = qtr_bpe_finish(&t->bpe, err);
  if (!status) status = settle_template(t, err);
  if (!status) status = build_tries(t, err);
  return status ? status : qtr_decoder_finish(t, err);
}

/* Finishes or, when something failed, closes. */
static enum qtr_status finish_open(enum qtr_status status, struct qtr_tokenizer **tokenizer, struct qtr_error *err) {
  if (!status) status = qtr_tokenizer_finish(*tokenizer, err);
  if (status) {
    qtr_tokenizer_close(*tokenizer);
    *tokenizer = NULL;
  }
  return status;
}

enum qtr_status qtr_tokenizer_open_json(const char *data, size_t n_bytes, struct qtr_tokenizer **tokenizer,
                                        struct qtr_error *err) {
  enum qtr_status status = qtr_tokenizer_new(tokenizer, err);
  if (!status) status = qtr_tokenizer_read_json(data, n_bytes, "tokenizer.json", *tokenizer, err);
  return finish_open(status, tokenizer, err);
}

enum qtr_status qtr_tokenizer_open_sentencepiece(const char *data, size_t n_bytes, struct qtr_tokenizer **tokenizer,
                                                 struct qtr_error *err) {
  enum qtr_status status = qtr_tokenizer_new(tokenizer, err);
  if (!status) status = qtr_tokenizer_read_sentencepiece(data, n_bytes, "tokenizer.model", *tokenizer, err);
  return finish_open(status, tokenizer, err);
}

static enum qtr_status open_file(const char *path, const char *dir, struct qtr_tokenizer **tokenizer,
                                 struct qtr_error *err) {
  char *data = NULL;
  size_t n_bytes;
  enum qtr_status status = qtr_file_read(path, QTR_TOKENIZER_MAX_FILE, &data, &n_bytes, err);
  if (status) return status;
  size_t first = 0;
  while (first < n_bytes && strchr(" \t\r\n\xef\xbb\xbf", data[first]) && data[first]) first++;
  status = qtr_tokenizer_new(tokenizer, err);
  if (!status && first < n_bytes && data[first] == '{') {
    status = qtr_tokenizer_read_json(data, n_bytes, path, *tokenizer, err);
  } else if (!status) {
    status = qtr_tokenizer_read_sentencepiece(data, n_bytes, path, *tokenizer, err);
  }
  free(data);
  if (!status && dir) status = qtr_tokenizer_read_config(dir, *tokenizer, err);
  return finish_open(status, tokenizer, err);
}

enum qtr_status qtr_tokenizer_open(const char *path, struct qtr_tokenizer **tokenizer, struct qtr_error *err) {
  *tokenizer = NULL;
  if (!qtr_dir_exists(path)) return open_file(path, NULL, tokenizer, err);
  static const char *const names[] = {"tokenizer.json", "tokenizer.model"};
  for (size_t i = 0; i < 2; i++) {
    char *file = qtr_path_join(path, names[i]);
    if (!file) return qtr_fail_memory(err, "a path", strlen(path));
    bool there = qtr_file_exists(file);
    enum qtr_status status = there ? open_file(file, path, tokenizer, err) : QTR_OK;
    free(file);
    if (there) return status;
  }
  return qtr_fail(err, QTR_ERR_NOT_FOUND, "%s has neither tokenizer.json nor tokenizer.model", path);
}

/* ---- questions ----------------------------------------------------------------------------------- */

int32_t qtr_tokenizer_vocab_size(const struct qtr_tokenizer *t) { return t->n_ids; }
int32_t qtr_tokenizer_bos(const struct qtr_tokenizer *t) { return t->bos; }
int32_t qtr_tokenizer_eos(const struct qtr_tokenizer *t) { return t->eos; }
bool qtr_tokenizer_adds_bos(const struct qtr_tokenizer *t) { return t->n_prefix > 0 && t->prefix[0] == t->bos; }

int32_t qtr_tokenizer_find(const struct qtr_tokenizer *t, const char *token) {
  int32_t id = qtr_vocab_find(&t->vocab, token, strlen(token));
  return id < t->n_ids ? id : -1;
}

const char *qtr_tokenizer_token(const struct qtr_tokenizer *t, int32_t id, size_t *len) {
  *len = 0;
  return id < t->n_ids && qtr_vocab_has(&t->vocab, id) ? qtr_vocab_text(&t->vocab, id, len) : NULL;
}

bool qtr_tokenizer_is_special(const struct qtr_tokenizer *t, int32_t id) {
  return id < t->n_ids && qtr_vocab_has(&t->vocab, id) && (t->vocab.tokens[id].flags & QTR_TOKEN_SPECIAL);
}

/* ---- encoding ------------------------------------------------------------------------------------ */

struct encoder {
  const struct qtr_tokenizer *tokenizer;
  bool parse_special;
  bool part_at_start; /* the part at work begins where the text begins */
  struct qtr_text normalized;
  struct qtr_pretokenizer_work work;
  struct qtr_bpe_work *bpe_work;
  struct qtr_ids ids;
};

static enum qtr_status encode_piece(void *context, const char *text, size_t len, struct qtr_error *err) {
  struct encoder *e = context;
  if (len >= UINT32_MAX - 8) return qtr_fail(err, QTR_ERR_LIMIT, "a word of %zu bytes is too long to encode", len);
  return qtr_bpe_encode(&e->tokenizer->bpe, e->bpe_work, text, len, &e->ids, err);
}

/* A part of the normalized text. */
static enum qtr_status encode_normalized(void *context, const char *text, size_t begin, size_t end, int32_t id,
                                         struct qtr_error *err) {
  struct encoder *e = context;
  if (id >= 0) return qtr_ids_append(&e->ids, &id, 1, err);
  return qtr_pretokenizer_run(&e->tokenizer->pretokenizer, &e->work, text + begin, end - begin,
                              e->part_at_start && begin == 0, err);
}

/* A part of the raw text. */
static enum qtr_status encode_raw(void *context, const char *text, size_t begin, size_t end, int32_t id,
                                  struct qtr_error *err) {
  struct encoder *e = context;
  const struct qtr_tokenizer *t = e->tokenizer;
  if (id >= 0) return qtr_ids_append(&e->ids, &id, 1, err);
  e->part_at_start = begin == 0;
  const char *part = text + begin;
  size_t len = end - begin;
  if (t->normalizer.n_steps > 0) {
    enum qtr_status status = qtr_normalizer_apply(&t->normalizer, &e->work.scratch, part, len, &e->normalized, err);
    if (status) return status;
    part = e->normalized.data;
    len = e->normalized.len;
  }
  return qtr_added_split(&t->vocab, &t->normalized, e->parse_special, part, len, encode_normalized, e, err);
}

enum qtr_status qtr_tokenizer_encode(const struct qtr_tokenizer *t, const char *text, size_t len,
                                     const struct qtr_encode_options *options, int32_t **ids, size_t *n_ids,
                                     struct qtr_error *err) {
  *ids = NULL;
  *n_ids = 0;
  if (len > QTR_MAX_TEXT)
    return qtr_fail(err, QTR_ERR_LIMIT, "a text of %zu bytes; at most %d can be encoded", len, QTR_MAX_TEXT);
  size_t valid = qtr_utf8_valid_prefix(text, len);
  if (valid < len) return qtr_fail(err, QTR_ERR_ARGUMENT, "the text is not valid UTF-8 at byte %zu", valid);
  struct encoder e = {.tokenizer = t, .parse_special = options->parse_special};
  e.work.piece = encode_piece;
  e.work.context = &e;
  enum qtr_status status = qtr_bpe_work_new(&e.bpe_work, err);
  if (!status) status = qtr_ids_append(&e.ids, t->prefix, options->add_special ? t->n_prefix : 0, err);
  if (!status) status = qtr_added_split(&t->vocab, &t->raw, e.parse_special, text, len, encode_raw, &e, err);
  if (!status) status = qtr_ids_append(&e.ids, t->suffix, options->add_special ? t->n_suffix : 0, err);
  qtr_bpe_work_free(e.bpe_work);
  qtr_pretokenizer_work_free(&e.work);
  qtr_text_free(&e.normalized);
  if (status) {
    free(e.ids.data);
    return status;
  }
  *ids = e.ids.data;
  *n_ids = e.ids.n;
  return QTR_OK;
}
