/* vocab.c - token strings and ids (vocab.h). */
#include "text/vocab.h"

#include "base/checked.h"
#include "base/status.h"

#include <stdlib.h>
#include <string.h>

uint64_t qtr_text_hash(const char *text, size_t len) {
  uint64_t h = 0x9e3779b97f4a7c15u ^ (len * 0xff51afd7ed558ccdu);
  while (len >= 8) {
    uint64_t word;
    memcpy(&word, text, 8);
    h = (h ^ word) * 0xc4ceb9fe1a85ec53u;
    h ^= h >> 29;
    text += 8;
    len -= 8;
  }
  uint64_t tail = 0;
  for (size_t i = 0; i < len; i++) tail |= (uint64_t)(uint8_t)text[i] << (8 * i);
  h = (h ^ tail) * 0xc4ceb9fe1a85ec53u;
  h ^= h >> 32;
  h *= 0xff51afd7ed558ccdu;
  return h ^ h >> 29;
}

int32_t qtr_vocab_find(const struct qtr_vocab *vocab, const char *text, size_t len) {
  if (vocab->n_slots == 0) return -1;
  uint32_t mask = vocab->n_slots - 1;
  for (uint32_t i = (uint32_t)qtr_text_hash(text, len) & mask;; i = (i + 1) & mask) {
    int32_t id = vocab->slots[i];
    if (id < 0) return -1;
    const struct qtr_token *token = &vocab->tokens[id];
    if (token->len == len && memcmp(vocab->bytes.data + token->offset, text, len) == 0) return id;
  }
}

int32_t qtr_vocab_find_model(const struct qtr_vocab *vocab, const char *text, size_t len) {
  int32_t id = qtr_vocab_find(vocab, text, len);
  return id >= 0 && (vocab->tokens[id].flags & QTR_TOKEN_MODEL) ? id : -1;
}

static void put_slot(struct qtr_vocab *vocab, int32_t id) {
  const struct qtr_token *token = &vocab->tokens[id];
  uint32_t mask = vocab->n_slots - 1;
  uint32_t i = (uint32_t)qtr_text_hash(vocab->bytes.data + token->offset, token->len) & mask;
  while (vocab->slots[i] >= 0) i = (i + 1) & mask;
  vocab->slots[i] = id;
}

static enum qtr_status grow_slots(struct qtr_vocab *vocab, struct qtr_error *err) {
  uint32_t n = vocab->n_slots ? vocab->n_slots * 2 : 1024;
  int32_t *slots = malloc(n * sizeof *slots);
  if (!slots) return qtr_fail_memory(err, "the vocabulary", n * sizeof *slots);
  memset(slots, 0xff, n * sizeof *slots);
  free(vocab->slots);
  vocab->slots = slots;
  vocab->n_slots = n;
  for (int32_t id = 0; id < vocab->n_tokens; id++) {
    if (vocab->tokens[id].flags) put_slot(vocab, id);
  }
  return QTR_OK;
}

static enum qtr_status grow_tokens(struct qtr_vocab *vocab, int32_t id, struct qtr_error *err) {
  int32_t n = QTR_MAX(QTR_MAX(1024, id + 1), QTR_MIN(vocab->capacity * 2, QTR_VOCAB_MAX_TOKENS));
  struct qtr_token *tokens = realloc(vocab->tokens, (size_t)n * sizeof *tokens);
  if (!tokens) return qtr_fail_memory(err, "the vocabulary", (size_t)n * sizeof *tokens);
  memset(tokens + vocab->capacity, 0, (size_t)(n - vocab->capacity) * sizeof *tokens);
  vocab->tokens = tokens;
  vocab->capacity = n;
  return QTR_OK;
}

enum qtr_status qtr_vocab_add(struct qtr_vocab *vocab, int64_t id64, const char *text, size_t len, uint32_t flags,
                              struct qtr_error *err) {
  char shown[64], other[64];
  if (id64 < 0 || id64 >= QTR_VOCAB_MAX_TOKENS) {
    return qtr_fail(err, QTR_ERR_FORMAT, "token \"%s\" has id %lld; ids must be 0 to %d",
                    qtr_printable(text, len, shown, sizeof shown), (long long)id64, QTR_VOCAB_MAX_TOKENS - 1);
  }
  if (len > QTR_VOCAB_MAX_TOKEN_BYTES) {
    return qtr_fail(err, QTR_ERR_FORMAT, "token %lld has %zu bytes; at most %d are accepted", (long long)id64, len,
                    QTR_VOCAB_MAX_TOKEN_BYTES);
  }
  int32_t id = (int32_t)id64, same = qtr_vocab_find(vocab, text, len);
  if (same >= 0 && same != id) {
    return qtr_fail(err, QTR_ERR_FORMAT, "token \"%s\" has two ids, %d and %d",
                    qtr_printable(text, len, shown, sizeof shown), same, id);
  }
  if (same < 0 && qtr_vocab_has(vocab, id)) {
    size_t other_len;
    const char *other_text = qtr_vocab_text(vocab, id, &other_len);
    return qtr_fail(err, QTR_ERR_FORMAT, "id %d belongs to two tokens, \"%s\" and \"%s\"", id,
                    qtr_printable(other_text, other_len, other, sizeof other),
                    qtr_printable(text, len, shown, sizeof shown));
  }
  if (same >= 0) {
    vocab->tokens[id].flags |= flags | QTR_TOKEN_USED;
    return QTR_OK;
  }
  enum qtr_status status = QTR_OK;
  if (id >= vocab->capacity) status = grow_tokens(vocab, id, err);
  if (!status && (vocab->n_used + 1) * 2 > vocab->n_slots) status = grow_slots(vocab, err);
  if (status) return status;
  if (vocab->bytes.len + len + 1 > UINT32_MAX) return qtr_fail_memory(err, "the vocabulary", vocab->bytes.len);
  uint32_t offset = (uint32_t)vocab->bytes.len;
  status = qtr_text_append(&vocab->bytes, text, len, err);
  if (!status) status = qtr_text_append(&vocab->bytes, "", 1, err);
  if (status) return status;
  vocab->tokens[id] = (struct qtr_token){offset, (uint32_t)len, flags | QTR_TOKEN_USED};
  vocab->n_tokens = QTR_MAX(vocab->n_tokens, id + 1);
  vocab->n_used++;
  put_slot(vocab, id);
  return QTR_OK;
}

void qtr_vocab_free(struct qtr_vocab *vocab) {
  qtr_text_free(&vocab->bytes);
  free(vocab->tokens);
  free(vocab->slots);
  *vocab = (struct qtr_vocab){0};
}

const char *qtr_text_find(const char *text, size_t len, const char *needle, size_t n) {
  if (n > 8) return memmem(text, len, needle, n); /* linear for any needle, but a sanitizer's looks at all of text first */
  while (n > 0 && len >= n) {
    const char *hit = memchr(text, needle[0], len - n + 1);
    if (!hit || memcmp(hit, needle, n) == 0) return hit;
    len -= (size_t)(hit + 1 - text);
    text = hit + 1;
  }
  return NULL;
}

static int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

int qtr_byte_token(const char *text, size_t len) {
  if (len != 6 || memcmp(text, "<0x", 3) != 0 || text[5] != '>') return -1;
  int high = hex_digit(text[3]), low = hex_digit(text[4]);
  return high < 0 || low < 0 ? -1 : high * 16 + low;
}

enum qtr_status qtr_ids_append(struct qtr_ids *ids, const int32_t *data, size_t n, struct qtr_error *err) {
  if (n > ids->capacity - ids->n) {
    size_t capacity = QTR_MAX(QTR_MAX(64, ids->n + n), ids->capacity + ids->capacity / 2);
    int32_t *grown = realloc(ids->data, capacity * sizeof *grown);
    if (!grown) return qtr_fail_memory(err, "token ids", capacity * sizeof *grown);
    ids->data = grown;
    ids->capacity = capacity;
  }
  if (n > 0) memcpy(ids->data + ids->n, data, n * sizeof *data);
  ids->n += n;
  return QTR_OK;
}
