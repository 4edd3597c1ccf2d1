/* tokenizer.h - text to token ids and back: tokenizer.json (byte-level BPE; Llama-2 style BPE with byte fallback) and
 * SentencePiece tokenizer.model (BPE). Untrusted input. A tokenizer is immutable after opening: any number of threads may
 * use it at once. */
#ifndef QTR_TEXT_TOKENIZER_H
#define QTR_TEXT_TOKENIZER_H

#include "quattuor/quattuor.h"

struct qtr_tokenizer;

/* path: a directory (tokenizer.json, else tokenizer.model; tokenizer_config.json and special_tokens_map.json are read for
 * BOS/EOS and added tokens when there) or one such file. */
enum qtr_status qtr_tokenizer_open(const char *path, struct qtr_tokenizer **tokenizer, struct qtr_error *err);
void qtr_tokenizer_close(struct qtr_tokenizer *tokenizer);

int32_t qtr_tokenizer_vocab_size(const struct qtr_tokenizer *tokenizer); /* largest id + 1 */
int32_t qtr_tokenizer_bos(const struct qtr_tokenizer *tokenizer);        /* -1 = none */
int32_t qtr_tokenizer_eos(const struct qtr_tokenizer *tokenizer);        /* -1 = none */
bool qtr_tokenizer_adds_bos(const struct qtr_tokenizer *tokenizer);      /* would its own encode() start with BOS? */
int32_t qtr_tokenizer_find(const struct qtr_tokenizer *tokenizer, const char *token); /* exact content; -1 = none */
/* The token's content as in the vocabulary (not NUL-terminated for byte tokens), NULL for an unused id. */
const char *qtr_tokenizer_token(const struct qtr_tokenizer *tokenizer, int32_t id, size_t *len);
bool qtr_tokenizer_is_special(const struct qtr_tokenizer *tokenizer, int32_t id);
/* The bytes the token adds to a decoded text, wherever it stands (they need not be whole characters); NULL for an unused id.
 */
const char *qtr_tokenizer_token_bytes(const struct qtr_tokenizer *tokenizer, int32_t id, size_t *len);

struct qtr_encode_options {
  bool add_special;   /* BOS/EOS as the tokenizer's post-processor adds them */
  bool parse_special; /* special tokens in the text become their ids; otherwise they are plain text. Added tokens that are
                         not special are always matched, as the reference tokenizers do */
};

/* *ids is malloc'ed. Text that is not valid UTF-8 is QTR_ERR_ARGUMENT with the offset. Time is about linear in len. */
enum qtr_status qtr_tokenizer_encode(const struct qtr_tokenizer *tokenizer, const char *text, size_t len,
                                     const struct qtr_encode_options *options, int32_t **ids, size_t *n_ids,
                                     struct qtr_error *err);

/* Decodes a stream of ids. Holds back the bytes of an unfinished UTF-8 character; bytes that form none become U+FFFD. */
struct qtr_detokenizer {
  const struct qtr_tokenizer *tokenizer;
  bool skip_special;
  bool at_start;      /* nothing decoded yet: SentencePiece drops the first space */
  uint8_t pending[8]; /* bytes of an unfinished character */
  size_t n_pending;
};
void qtr_detokenizer_init(struct qtr_detokenizer *d, const struct qtr_tokenizer *tokenizer, bool skip_special);

/* A growing NUL-terminated string. Start from {0}; free with qtr_text_free. */
struct qtr_text {
  char *data;
  size_t len, capacity;
};
enum qtr_status qtr_text_append(struct qtr_text *text, const char *data, size_t len, struct qtr_error *err);
void qtr_text_free(struct qtr_text *text);

/* Appends the text that became final. Unknown ids add nothing. */
enum qtr_status qtr_detokenizer_push(struct qtr_detokenizer *d, int32_t id, struct qtr_text *out, struct qtr_error *err);
/* Flushes: what is held back becomes U+FFFD. */
enum qtr_status qtr_detokenizer_end(struct qtr_detokenizer *d, struct qtr_text *out, struct qtr_error *err);

/* All at once, as the reference's decode(ids, skip_special_tokens). *text is malloc'ed. */
enum qtr_status qtr_tokenizer_decode(const struct qtr_tokenizer *tokenizer, const int32_t *ids, size_t n_ids,
                                     bool skip_special, char **text, size_t *len, struct qtr_error *err);

#endif
