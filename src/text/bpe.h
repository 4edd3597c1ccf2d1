/* bpe.h - byte-pair encoding: a word becomes the ids of its characters, then the pair of lowest rank is merged, leftmost
 * first, until no pair can be. Private to src/text. The model is immutable once loaded; each call brings its own work space.
 */
#ifndef QTR_TEXT_BPE_H
#define QTR_TEXT_BPE_H

#include "text/vocab.h"

enum { QTR_BPE_MAX_MERGES = 16 << 20, QTR_BPE_DIRECT_CHARS = 0x3000 };

struct qtr_merge {
  int32_t left, right; /* left < 0: empty slot */
  uint32_t rank;       /* lower merges first; merges of equal rank go from left to right */
  int32_t id;          /* what the pair becomes */
};

struct qtr_bpe {
  const struct qtr_vocab *vocab;
  struct qtr_merge *merges; /* (n_slots, a power of two) open addressing by (left, right) */
  uint32_t n_slots, n_used, n_ranks;
  int32_t char_ids[QTR_BPE_DIRECT_CHARS]; /* id of each one-character token, -1 = none */
  int32_t byte_ids[256];                  /* "<0x00>" ... for byte fallback, -1 = none */
  int32_t unk;                            /* for characters that have no token; -1 = they are dropped */
  int32_t n_public;   /* ids from here on are internal: characters of pieces that are no tokens (SentencePiece) */
  bool fuse_unk;      /* neighbouring unknown characters become one token */
  bool fuse_unk_last; /* ... also those that come from internal ids */
  bool byte_fallback;
  bool ignore_merges; /* a whole word that is a token needs no merging */
  bool cut_at_spaces; /* no merge crosses from another character to U+2581, so text without pre-tokenizer may be cut there */
};

struct qtr_bpe_work; /* per call */
enum qtr_status qtr_bpe_work_new(struct qtr_bpe_work **work, struct qtr_error *err);
void qtr_bpe_work_free(struct qtr_bpe_work *work);

/* Later merges of the same pair win, as in the reference. */
enum qtr_status qtr_bpe_add_merge(struct qtr_bpe *bpe, struct qtr_merge merge, struct qtr_error *err);
/* After the vocabulary and all merges are there: fills the tables above that follow from them. */
enum qtr_status qtr_bpe_finish(struct qtr_bpe *bpe, struct qtr_error *err);
void qtr_bpe_free(struct qtr_bpe *bpe);

/* Appends the ids of text[0..len), valid UTF-8, len < 2^32 - 1. Time O(len log len) at worst. */
enum qtr_status qtr_bpe_encode(const struct qtr_bpe *bpe, struct qtr_bpe_work *work, const char *text, size_t len,
                               struct qtr_ids *ids, struct qtr_error *err);

#endif
