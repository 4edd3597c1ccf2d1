/* tokenizer_json.c - reads tokenizer.json: the BPE model, added tokens and the post-processor here, the other parts by their
 * own files. Truncation and padding of the file are ignored on purpose: lengths are the engine's business. Limits: 256 MiB,
 * 4 M tokens, 16 M merges; nesting is bounded by jansson (2,048). */
#include "base/status.h"
#include "text/tokenizer_impl.h"

#include <stdlib.h>
#include <string.h>

static enum qtr_status bad(struct qtr_error *err, const char *what) { return qtr_fail(err, QTR_ERR_FORMAT, "%s", what); }

static enum qtr_status load_vocab(json_t *vocab, struct qtr_tokenizer *t, struct qtr_error *err) {
  if (!json_is_object(vocab)) return bad(err, "model: \"vocab\" is not an object of token: id");
  if (json_object_size(vocab) > QTR_VOCAB_MAX_TOKENS) {
    return qtr_fail(err, QTR_ERR_FORMAT, "model: %zu tokens; at most %d are accepted", json_object_size(vocab),
                    QTR_VOCAB_MAX_TOKENS);
  }
  enum qtr_status status = QTR_OK;
  for (void *at = json_object_iter(vocab); at && !status; at = json_object_iter_next(vocab, at)) {
    const char *token = json_object_iter_key(at);
    const json_t *id = json_object_iter_value(at);
    if (!json_is_integer(id)) {
      char shown[64];
      return qtr_fail(err, QTR_ERR_FORMAT, "model: the id of token \"%s\" is not an integer",
                      qtr_printable(token, strlen(token), shown, sizeof shown));
    }
    status = qtr_vocab_add(&t->vocab, json_integer_value(id), token, strlen(token), QTR_TOKEN_MODEL, err);
  }
  return status;
}

/* "left right" or ["left", "right"]. Tokens that have spaces themselves need the second form; files that write them in the
 * first are around, so of several spaces the first that cuts tokens from tokens counts. */
static bool split_merge(const struct qtr_vocab *vocab, const json_t *merge, const char **left, size_t *left_len,
                        const char **right, size_t *right_len) {
  if (json_is_array(merge) && json_array_size(merge) == 2) {
    const json_t *a = json_array_get(merge, 0), *b = json_array_get(merge, 1);
    *left = json_string_value(a);
    *left_len = json_string_length(a);
    *right = json_string_value(b);
    *right_len = json_string_length(b);
    return *left && *right;
  }
  const char *text = json_string_value(merge);
  if (!text) return false;
  size_t len = json_string_length(merge);
  if (len > 1024 && memchr(text, ' ', len) != memrchr(text, ' ', len)) return false; /* no time for hostile ones */
  const char *space = memchr(text, ' ', len);
  bool several = space && memchr(space + 1, ' ', len - (size_t)(space + 1 - text));
  for (; space; space = memchr(space + 1, ' ', len - (size_t)(space + 1 - text))) {
    *left = text;
    *left_len = (size_t)(space - text);
    *right = space + 1;
    *right_len = len - *left_len - 1;
    if (!several ||
        (qtr_vocab_find_model(vocab, *left, *left_len) >= 0 && qtr_vocab_find_model(vocab, *right, *right_len) >= 0)) {
      return true;
    }
  }
  return false;
}

static enum qtr_status load_merges(const json_t *merges, struct qtr_tokenizer *t, struct qtr_error *err) {
  if (!json_is_array(merges)) return bad(err, "model: \"merges\" is not a list");
  if (json_array_size(merges) > QTR_BPE_MAX_MERGES) {
    return qtr_fail(err, QTR_ERR_FORMAT, "model: %zu merges; at most %d are accepted", json_array_size(merges),
                    QTR_BPE_MAX_MERGES);
  }
  struct qtr_text joined = {0};
  enum qtr_status status = QTR_OK;
  uint32_t rank = 0;
  for (size_t i = 0; i < json_array_size(merges) && !status; i++) {
    const json_t *entry = json_array_get(merges, i);
    const char *left, *right;
    size_t left_len, right_len;
    if (!split_merge(&t->vocab, entry, &left, &left_len, &right, &right_len)) {
      status = qtr_fail(err, QTR_ERR_FORMAT, "model: merge %zu is not a pair of tokens", i);
      break;
    }
    if (json_is_string(entry) && strncmp(left, "#version", 8) == 0) continue;
    joined.len = 0;
    status = qtr_text_append(&joined, left, left_len, err);
    if (!status) status = qtr_text_append(&joined, right, right_len, err);
    if (status) break;
    struct qtr_merge merge = {.left = qtr_vocab_find_model(&t->vocab, left, left_len),
                              .right = qtr_vocab_find_model(&t->vocab, right, right_len),
                              .rank = rank++,
                              .id = qtr_vocab_find_model(&t->vocab, joined.data, joined.len)};
    if (merge.left < 0 || merge.right < 0 || merge.id < 0 || left_len == 0 || right_len == 0) {
      char a[64], b[64];
      status = qtr_fail(err, QTR_ERR_FORMAT, "model: merge %zu, \"%s\" with \"%s\": one of them or their sum is not a token",
                        i, qtr_printable(left, left_len, a, sizeof a), qtr_printable(right, right_len, b, sizeof b));
    } else {
      status = qtr_bpe_add_merge(&t->bpe, merge, err);
    }
  }
  qtr_text_free(&joined);
  return status;
}

static enum qtr_status load_model(const json_t *model, struct qtr_tokenizer *t, struct qtr_error *err) {
  if (!json_is_object(model)) return bad(err, "\"model\" is missing or not an object");
  const char *type = json_string_value(json_object_get(model, "type"));
  if (!type) type = json_object_get(model, "merges") ? "BPE" : "without a type";
  if (strcmp(type, "BPE") != 0) {
    char shown[64];
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "model \"%s\" is not supported, only BPE is",
                    qtr_printable(type, strlen(type), shown, sizeof shown));
  }
  static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
  for (size_t i = 0; i < 2; i++) {
    const json_t *affix = json_object_get(model, affixes[i]);
    if (json_is_string(affix) && json_string_length(affix) > 0) {
      return qtr_fail(err, QTR_ERR_UNSUPPORTED, "model: \"%s\" is not supported", affixes[i]);
    }
  }
  enum qtr_status status = load_vocab(json_object_get(model, "vocab"), t, err);
  if (!status) status = load_merges(json_object_get(model, "merges"), t, err);
  if (status) return status;
  t->bpe.fuse_unk = json_is_true(json_object_get(model, "fuse_unk"));
  t->bpe.byte_fallback = json_is_true(json_object_get(model, "byte_fallback"));
  t->bpe.ignore_merges = json_is_true(json_object_get(model, "ignore_merges"));
  const json_t *unk = json_object_get(model, "unk_token");
  if (!json_is_string(unk)) return QTR_OK;
  t->bpe.unk = qtr_vocab_find_model(&t->vocab, json_string_value(unk), json_string_length(unk));
  if (t->bpe.unk >= 0) return QTR_OK;
  char shown[64];
  return qtr_fail(err, QTR_ERR_FORMAT, "model: unk_token \"%s\" is not in the vocabulary",
                  qtr_printable(json_string_value(unk), json_string_length(unk), shown, sizeof shown));
}

uint32_t qtr_added_flags(const json_t *token) {
  static const struct {
    const char *name;
    uint32_t flag;
  } names[] = {{"special", QTR_TOKEN_SPECIAL},
               {"single_word", QTR_TOKEN_SINGLE_WORD},
               {"lstrip", QTR_TOKEN_LSTRIP},
               {"rstrip", QTR_TOKEN_RSTRIP},
               {"normalized", QTR_TOKEN_NORMALIZED}};
  uint32_t flags = QTR_TOKEN_ADDED;
  for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
    if (json_is_true(json_object_get(token, names[i].name))) flags |= names[i].flag;
  }
  return flags;
}

/* The model's own id wins over the list's, as in the reference. */
static enum qtr_status load_added(const json_t *list, struct qtr_tokenizer *t, struct qtr_error *err) {
  if (!list || json_is_null(list)) return QTR_OK;
  if (!json_is_array(list)) return bad(err, "\"added_tokens\" is not a list");
  enum qtr_status status = QTR_OK;
  for (size_t i = 0; i < json_array_size(list) && !status; i++) {
    const json_t *token = json_array_get(list, i), *id = json_object_get(token, "id");
    const json_t *content = json_object_get(token, "content");
    if (!json_is_integer(id) || !json_is_string(content)) {
      return qtr_fail(err, QTR_ERR_FORMAT, "added token %zu lacks an integer \"id\" or a string \"content\"", i);
    }
    const char *text = json_string_value(content);
    size_t len = json_string_length(content);
    if (len == 0) continue;
    int32_t known = qtr_vocab_find_model(&t->vocab, text, len);
    status = qtr_vocab_add(&t->vocab, known >= 0 ? known : json_integer_value(id), text, len, qtr_added_flags(token), err);
  }
  return status;
}

/* ---- post-processor ------------------------------------------------------------------------------ */

static enum qtr_status put_around(struct qtr_tokenizer *t, bool before, const json_t *ids, size_t *n_new,
                                  struct qtr_error *err) {
  for (size_t i = 0; i < json_array_size(ids); i++) {
    const json_t *id = json_array_get(ids, i);
    if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) >= t->vocab.n_tokens ||
        !qtr_vocab_has(&t->vocab, (int32_t)json_integer_value(id))) {
      return bad(err, "post_processor: a special token has an id that no token has");
    }
    int32_t value = (int32_t)json_integer_value(id);
    if (t->n_prefix >= QTR_MAX_TEMPLATE_IDS - 1 || t->n_suffix >= QTR_MAX_TEMPLATE_IDS - 1) {
      return qtr_fail(err, QTR_ERR_FORMAT, "post_processor: %d ids or more around a text", QTR_MAX_TEMPLATE_IDS);
    }
    if (before) { /* behind those of this processor, before those of an earlier one */
      memmove(t->prefix + *n_new + 1, t->prefix + *n_new, (t->n_prefix - *n_new) * sizeof *t->prefix);
      t->prefix[(*n_new)++] = value;
      t->n_prefix++;
    } else {
      t->suffix[t->n_suffix++] = value;
    }
  }
  return QTR_OK;
}

static enum qtr_status load_template(const json_t *json, struct qtr_tokenizer *t, struct qtr_error *err) {
  const json_t *single = json_object_get(json, "single"), *specials = json_object_get(json, "special_tokens");
  if (!json_is_array(single)) return bad(err, "post_processor TemplateProcessing: \"single\" is not a list");
  bool seen = false;
  size_t n_new = 0;
  for (size_t i = 0; i < json_array_size(single); i++) {
    const json_t *item = json_array_get(single, i), *special = json_object_get(item, "SpecialToken");
    if (json_object_get(item, "Sequence")) {
      if (seen) return bad(err, "post_processor TemplateProcessing: \"single\" has two sequences");
      seen = true;
      continue;
    }
    const char *name = json_string_value(json_object_get(special, "id"));
    const json_t *ids = name ? json_object_get(json_object_get(specials, name), "ids") : NULL;
    if (!json_is_array(ids)) return bad(err, "post_processor TemplateProcessing: a special token has no \"ids\"");
    enum qtr_status status = put_around(t, !seen, ids, &n_new, err);
    if (status) return status;
  }
  return seen ? QTR_OK : bad(err, "post_processor TemplateProcessing: \"single\" has no sequence");
}

/* [token, id] of RobertaProcessing and BertProcessing. */
static enum qtr_status load_pair(const json_t *pair, bool before, struct qtr_tokenizer *t, struct qtr_error *err) {
  size_t n_new = 0;
  if (!json_is_array(pair) || json_array_size(pair) != 2)
    return bad(err, "post_processor: \"cls\" and \"sep\" must be [token, id]");
  json_t *ids = json_pack("[O]", json_array_get(pair, 1));
  enum qtr_status status = ids ? put_around(t, before, ids, &n_new, err) : qtr_fail_memory(err, "post_processor", 16);
  json_decref(ids);
  return status;
}

static enum qtr_status load_processor(const json_t *json, struct qtr_tokenizer *t, size_t depth, struct qtr_error *err) {
  const char *type = json_string_value(json_object_get(json, "type"));
  if (!type) return bad(err, "post_processor: not an object with a \"type\"");
  enum qtr_status status = QTR_OK;
  if (strcmp(type, "Sequence") == 0) {
    const json_t *list = json_object_get(json, "processors");
    if (!json_is_array(list)) return bad(err, "post_processor Sequence: \"processors\" is not a list");
    if (depth == QTR_MAX_NESTING) return bad(err, "post_processor: sequences nest too deep");
    for (size_t i = 0; i < json_array_size(list) && !status; i++) {
      status = load_processor(json_array_get(list, i), t, depth + 1, err);
    }
    return status;
  }
  if (strcmp(type, "ByteLevel") == 0) return QTR_OK; /* about offsets only */
  if (strcmp(type, "TemplateProcessing") == 0) return load_template(json, t, err);
  if (strcmp(type, "RobertaProcessing") == 0 || strcmp(type, "BertProcessing") == 0) {
    status = load_pair(json_object_get(json, "cls"), true, t, err);
    return status ? status : load_pair(json_object_get(json, "sep"), false, t, err);
  }
  char shown[64];
  return qtr_fail(err, QTR_ERR_UNSUPPORTED,
                  "post_processor \"%s\" is not supported (Sequence, ByteLevel, TemplateProcessing, RobertaProcessing and "
                  "BertProcessing are)",
                  qtr_printable(type, strlen(type), shown, sizeof shown));
}

enum qtr_status qtr_tokenizer_read_json(const char *data, size_t n_bytes, const char *name, struct qtr_tokenizer *t,
                                        struct qtr_error *err) {
  json_error_t fault;
  json_t *root = json_loadb(data, n_bytes, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &fault);
  if (!root) {
    char shown[200];
    return qtr_fail(err, QTR_ERR_FORMAT, "%s: not valid JSON at line %d: %s", name, fault.line,
                    qtr_printable(fault.text, strlen(fault.text), shown, sizeof shown));
  }
  enum qtr_status status = QTR_OK;
  if (!json_is_object(root)) status = bad(err, "not a JSON object");
  if (!status) status = load_model(json_object_get(root, "model"), t, err);
  if (!status) status = load_added(json_object_get(root, "added_tokens"), t, err);
  if (!status) status = qtr_normalizer_from_json(json_object_get(root, "normalizer"), &t->normalizer, err);
  if (!status) status = qtr_pretokenizer_from_json(json_object_get(root, "pre_tokenizer"), &t->pretokenizer, err);
  const json_t *processor = json_object_get(root, "post_processor");
  if (!status && processor && !json_is_null(processor)) status = load_processor(processor, t, 0, err);
  if (!status) status = qtr_decoder_from_json(json_object_get(root, "decoder"), &t->decoder, err);
  json_decref(root);
  if (status && err) (void)qtr_error_prefix(err, "%s", name);
  return status;
}
