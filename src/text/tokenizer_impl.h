/* tokenizer_impl.h - what a tokenizer consists of, and the readers that fill it. Private to src/text; fuzz targets use it
 * too. */
#ifndef QTR_TEXT_TOKENIZER_IMPL_H
#define QTR_TEXT_TOKENIZER_IMPL_H

#include "text/added.h"
#include "text/bpe.h"
#include "text/pretokenizer.h"

enum { QTR_TOKENIZER_MAX_FILE = 256 << 20, QTR_MAX_TEMPLATE_IDS = 64, QTR_MAX_TEXT = 1 << 30 };

enum qtr_decoder_kind {
  QTR_DECODE_SPACED,     /* no decoder: tokens joined by spaces */
  QTR_DECODE_BYTE_LEVEL, /* the byte-level alphabet back to bytes */
  QTR_DECODE_PIECES      /* replacements, byte tokens, a first space to drop */
};

struct qtr_decoder {
  enum qtr_decoder_kind kind;
  struct qtr_normalizer replace; /* PIECES: REPLACE steps with literal patterns, on each token */
  bool byte_fallback;            /* PIECES: "<0x41>" is a byte */
  char strip[5];                 /* PIECES: this character goes from the start of the whole text, once; "" = none */
  bool strip_repeats;            /* ... and from the pieces after it as long as nothing else is left (SentencePiece) */
  bool strip_pieces_only;        /* ... but not when byte tokens made it (SentencePiece) */
  char mark[5];                  /* PIECES (Metaspace): this character goes from the first token; "" = none */
};

struct qtr_tokenizer {
  struct qtr_vocab vocab;
  struct qtr_bpe bpe;
  struct qtr_normalizer normalizer;
  struct qtr_pretokenizer pretokenizer;
  bool added_as_is;                /* SentencePiece: user-defined pieces are written in normalized form already */
  struct qtr_trie raw, normalized; /* added tokens looked for in the text as it is, and in the normalized text */
  struct qtr_decoder decoder;
  int32_t prefix[QTR_MAX_TEMPLATE_IDS], suffix[QTR_MAX_TEMPLATE_IDS]; /* put around the ids with add_special */
  size_t n_prefix, n_suffix;
  int32_t bos, eos;        /* -1 = none */
  int add_bos, add_eos;    /* what a configuration file says: 0, 1, or -1 = nothing */
  int32_t n_ids;           /* largest id + 1 */
  int32_t first_internal;  /* SentencePiece: ids from here on never leave the library; -1 = there are none */
  struct qtr_text decoded; /* what each token adds to a decoded text, by decoded_at */
  uint32_t *decoded_at;    /* (n_ids + 1) offsets */
  int16_t *byte_value;     /* (n_ids) the byte of a byte token, -1 = none; NULL without byte fallback */
};

/* Both take untrusted bytes; name is for messages. The result still lacks qtr_tokenizer_finish. */
enum qtr_status qtr_tokenizer_read_json(const char *data, size_t n_bytes, const char *name, struct qtr_tokenizer *tokenizer,
                                        struct qtr_error *err);
enum qtr_status qtr_tokenizer_read_sentencepiece(const char *data, size_t n_bytes, const char *name,
                                                 struct qtr_tokenizer *tokenizer, struct qtr_error *err);
/* BOS, EOS and added tokens of tokenizer_config.json and special_tokens_map.json, where they are; before finish. */
enum qtr_status qtr_tokenizer_read_config(const char *dir, struct qtr_tokenizer *tokenizer, struct qtr_error *err);
/* The JSON of one configuration file. */
enum qtr_status qtr_tokenizer_apply_config(json_t *config, struct qtr_tokenizer *tokenizer, struct qtr_error *err);

/* Flags of an added token from {"special": true, "lstrip": false, ...}. */
uint32_t qtr_added_flags(const json_t *token);

/* Everything that follows from what was read: merge tables, tries, decoded tokens. */
enum qtr_status qtr_tokenizer_finish(struct qtr_tokenizer *tokenizer, struct qtr_error *err);
enum qtr_status qtr_decoder_finish(struct qtr_tokenizer *tokenizer, struct qtr_error *err);
enum qtr_status qtr_decoder_from_json(const json_t *json, struct qtr_decoder *decoder, struct qtr_error *err);

enum qtr_status qtr_tokenizer_new(struct qtr_tokenizer **tokenizer, struct qtr_error *err);

/* Opens from memory, as a fuzz target does. */
enum qtr_status qtr_tokenizer_open_json(const char *data, size_t n_bytes, struct qtr_tokenizer **tokenizer,
                                        struct qtr_error *err);
enum qtr_status qtr_tokenizer_open_sentencepiece(const char *data, size_t n_bytes, struct qtr_tokenizer **tokenizer,
                                                 struct qtr_error *err);

#endif
