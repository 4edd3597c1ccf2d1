/* tokenizer_config.c - what tokenizer_config.json, special_tokens_map.json and added_tokens.json say about a tokenizer: BOS
 * and EOS, whether they are added, and tokens that the tokenizer file lacks. Files that are not there say nothing. */
#include "base/file.h"
#include "base/status.h"
#include "text/tokenizer_impl.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_CONFIG_BYTES = 64 << 20 };

/* "bos_token": "<s>" or {"content": "<s>", ...}. */
static const json_t *token_content(const json_t *token) {
  return json_is_object(token) ? json_object_get(token, "content") : json_is_string(token) ? token : NULL;
}

/* Makes a token of the vocabulary an added special one; its id, -1 when there is none. */
static int32_t mark_special(const json_t *token, struct qtr_tokenizer *t) {
  const json_t *content = token_content(token);
  if (!json_is_string(content) || json_string_length(content) == 0) return -1;
  int32_t id = qtr_vocab_find(&t->vocab, json_string_value(content), json_string_length(content));
  if (id < 0) return -1;
  t->vocab.tokens[id].flags |= QTR_TOKEN_SPECIAL | QTR_TOKEN_ADDED;
  return id;
}

static enum qtr_status add_tokens(json_t *decoder, struct qtr_tokenizer *t, struct qtr_error *err) {
  enum qtr_status status = QTR_OK;
  for (void *at = json_object_iter(decoder); at && !status; at = json_object_iter_next(decoder, at)) {
    const char *key = json_object_iter_key(at);
    const json_t *token = json_object_iter_value(at), *content = json_object_get(token, "content");
    char *end;
    errno = 0;
    long long id = strtoll(key, &end, 10);
    if (*key == 0 || *end != 0 || errno || !json_is_string(content)) {
      return qtr_fail(err, QTR_ERR_FORMAT, "added_tokens_decoder: an entry is not id: {\"content\": ...}");
    }
    const char *text = json_string_value(content);
    size_t len = json_string_length(content);
    if (len == 0) continue;
    int32_t known = qtr_vocab_find(&t->vocab, text, len);
    if (known >= 0 && (t->vocab.tokens[known].flags & QTR_TOKEN_ADDED)) continue; /* the tokenizer's own entry wins */
    status = qtr_vocab_add(&t->vocab, known >= 0 ? known : id, text, len, qtr_added_flags(token), err);
  }
  return status;
}

enum qtr_status qtr_tokenizer_apply_config(json_t *config, struct qtr_tokenizer *t, struct qtr_error *err) {
  if (!json_is_object(config)) return qtr_fail(err, QTR_ERR_FORMAT, "not a JSON object");
  enum qtr_status status = QTR_OK;
  json_t *decoder = json_object_get(config, "added_tokens_decoder");
  if (json_is_object(decoder)) status = add_tokens(decoder, t, err);
  if (status) return status;
  int32_t bos = mark_special(json_object_get(config, "bos_token"), t);
  int32_t eos = mark_special(json_object_get(config, "eos_token"), t);
  (void)mark_special(json_object_get(config, "pad_token"), t);
  const json_t *more = json_object_get(config, "additional_special_tokens");
  for (size_t i = 0; i < json_array_size(more); i++) (void)mark_special(json_array_get(more, i), t);
  if (bos >= 0) t->bos = bos;
  if (eos >= 0) t->eos = eos;
  const json_t *add_bos = json_object_get(config, "add_bos_token"), *add_eos = json_object_get(config, "add_eos_token");
  if (json_is_boolean(add_bos)) t->add_bos = json_is_true(add_bos);
  if (json_is_boolean(add_eos)) t->add_eos = json_is_true(add_eos);
  return QTR_OK;
}

/* {"<|im_start|>": 32001, ...}, beside an older tokenizer.model. */
static enum qtr_status apply_added_tokens(json_t *map, struct qtr_tokenizer *t, struct qtr_error *err) {
  enum qtr_status status = QTR_OK;
  for (void *at = json_object_iter(map); at && !status; at = json_object_iter_next(map, at)) {
    const char *text = json_object_iter_key(at);
    const json_t *id = json_object_iter_value(at);
    if (!json_is_integer(id)) return qtr_fail(err, QTR_ERR_FORMAT, "an id is not an integer");
    if (*text == 0 || qtr_vocab_find(&t->vocab, text, strlen(text)) >= 0) continue;
    status = qtr_vocab_add(&t->vocab, json_integer_value(id), text, strlen(text), QTR_TOKEN_ADDED, err);
  }
  return status;
}

enum qtr_status qtr_tokenizer_read_config(const char *dir, struct qtr_tokenizer *t, struct qtr_error *err) {
  /* Later files win: the main one comes last. */
  static const char *const names[] = {"added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"};
  enum qtr_status status = QTR_OK;
  for (size_t i = 0; i < 3 && !status; i++) {
    char *path = qtr_path_join(dir, names[i]), *data = NULL;
    size_t n_bytes;
    if (!path) return qtr_fail_memory(err, "a path", strlen(dir));
    if (qtr_file_exists(path)) status = qtr_file_read(path, MAX_CONFIG_BYTES, &data, &n_bytes, err);
    if (!status && data) {
      json_error_t fault;
      json_t *json = json_loadb(data, n_bytes, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &fault);
      if (!json) {
        char shown[200];
        status = qtr_fail(err, QTR_ERR_FORMAT, "not valid JSON at line %d: %s", fault.line,
                          qtr_printable(fault.text, strlen(fault.text), shown, sizeof shown));
      } else {
        status = i == 0 ? apply_added_tokens(json, t, err) : qtr_tokenizer_apply_config(json, t, err);
      }
      json_decref(json);
      if (status && err) (void)qtr_error_prefix(err, "%s", path);
    }
    free(data);
    free(path);
  }
  return status;
}
