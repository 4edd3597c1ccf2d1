/* normalizer.h - the steps that rewrite a text before it is split. Private to src/text. Immutable once loaded. */
#ifndef QTR_TEXT_NORMALIZER_H
#define QTR_TEXT_NORMALIZER_H

#include "text/pattern.h"
#include "text/tokenizer.h"

enum { QTR_MAX_STEPS = 32, QTR_MAX_NESTING = 8 };

enum qtr_normalizer_kind {
  QTR_NORMALIZE_PREPEND,
  QTR_NORMALIZE_REPLACE,
  QTR_NORMALIZE_UNICODE, /* NFC, NFD, NFKC, NFKD */
  QTR_NORMALIZE_LOWERCASE,
  QTR_NORMALIZE_STRIP,
  QTR_NORMALIZE_BYTES,  /* bytes to the byte-level alphabet */
  QTR_NORMALIZE_SQUEEZE /* SentencePiece remove_extra_whitespaces: no space at the ends, one between words */
};

struct qtr_normalizer_step {
  enum qtr_normalizer_kind kind;
  struct qtr_pattern pattern; /* REPLACE */
  char *content;              /* REPLACE, PREPEND; (content_len) */
  size_t content_len;
  bool compatibility, compose; /* UNICODE */
  bool left, right;            /* STRIP */
};

struct qtr_normalizer {
  struct qtr_normalizer_step steps[QTR_MAX_STEPS];
  size_t n_steps;
};

enum qtr_status qtr_normalizer_from_json(const json_t *json, struct qtr_normalizer *normalizer, struct qtr_error *err);
/* For steps with content; the string is copied. */
enum qtr_status qtr_normalizer_add(struct qtr_normalizer *normalizer, enum qtr_normalizer_kind kind, const char *pattern,
                                   const char *content, struct qtr_error *err);
void qtr_normalizer_free(struct qtr_normalizer *normalizer);

/* out is emptied first. The result may be at most 64 times as long as the text. */
enum qtr_status qtr_normalizer_apply(const struct qtr_normalizer *normalizer, struct qtr_pattern_scratch *scratch,
                                     const char *text, size_t len, struct qtr_text *out, struct qtr_error *err);

/* The byte-level alphabet of every byte of text, appended. */
enum qtr_status qtr_text_append_byte_level(struct qtr_text *out, const char *text, size_t len, struct qtr_error *err);
/* Makes room, so that appends up to this many bytes cost no copy. */
enum qtr_status qtr_text_reserve(struct qtr_text *text, size_t capacity, struct qtr_error *err);

#endif
