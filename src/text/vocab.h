/* vocab.h - token strings by id and ids by string. Private to src/text. Immutable once loading is over. */
#ifndef QTR_TEXT_VOCAB_H
#define QTR_TEXT_VOCAB_H

#include "text/tokenizer.h"

enum { QTR_VOCAB_MAX_TOKENS = 4 << 20, QTR_VOCAB_MAX_TOKEN_BYTES = 65536 };

enum qtr_token_flag {
  QTR_TOKEN_USED = 1,
  QTR_TOKEN_MODEL = 2,   /* merges may make it; added tokens that are not of the model never come out of BPE */
  QTR_TOKEN_ADDED = 4,   /* matched in the text before BPE */
  QTR_TOKEN_SPECIAL = 8, /* skipped by decoding with skip_special, matched only with parse_special */
  /* How an added token is matched: */
  QTR_TOKEN_SINGLE_WORD = 16, /* not inside a word */
  QTR_TOKEN_LSTRIP = 32,      /* takes the spaces before it along */
  QTR_TOKEN_RSTRIP = 64,      /* ... and after it */
  QTR_TOKEN_NORMALIZED = 128  /* looked for in the normalized text */
};

struct qtr_token {
  uint32_t offset, len; /* into bytes; a NUL follows */
  uint32_t flags;
};

struct qtr_vocab {
  struct qtr_text bytes;    /* the token strings */
  struct qtr_token *tokens; /* (capacity), n_tokens in use: largest id + 1; flags 0 = a hole */
  int32_t n_tokens, capacity;
  int32_t *slots; /* (n_slots, a power of two) open addressing by string hash; -1 = empty */
  uint32_t n_slots, n_used;
};

/* Adds a token, or flags to one that is there with the same id. Both directions stay one to one: another id for the same
 * string or another string for the same id is QTR_ERR_FORMAT. */
enum qtr_status qtr_vocab_add(struct qtr_vocab *vocab, int64_t id, const char *text, size_t len, uint32_t flags,
                              struct qtr_error *err);
void qtr_vocab_free(struct qtr_vocab *vocab);

int32_t qtr_vocab_find(const struct qtr_vocab *vocab, const char *text, size_t len);       /* -1 = none */
int32_t qtr_vocab_find_model(const struct qtr_vocab *vocab, const char *text, size_t len); /* of the model only */

static inline const char *qtr_vocab_text(const struct qtr_vocab *vocab, int32_t id, size_t *len) {
  *len = vocab->tokens[id].len;
  return vocab->bytes.data + vocab->tokens[id].offset;
}
static inline bool qtr_vocab_has(const struct qtr_vocab *vocab, int32_t id) {
  return id >= 0 && id < vocab->n_tokens && vocab->tokens[id].flags != 0;
}

uint64_t qtr_text_hash(const char *text, size_t len);

/* Where needle (1 to 8 bytes, rarely longer) begins in text, NULL = nowhere. For short needles, cheap when called for one
 * hit after another. */
const char *qtr_text_find(const char *text, size_t len, const char *needle, size_t n);

/* "<0x41>" gives 0x41, anything else -1. */
int qtr_byte_token(const char *text, size_t len);

/* A growing list of ids. */
struct qtr_ids {
  int32_t *data;
  size_t n, capacity;
};
enum qtr_status qtr_ids_append(struct qtr_ids *ids, const int32_t *data, size_t n, struct qtr_error *err);

#endif
