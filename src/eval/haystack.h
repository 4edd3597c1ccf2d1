/* haystack.h - long text to hide things in: read from files or generated, cut into sentences whose lengths in tokens are
 * known, so that a context of a wanted length can be put together with sentences inserted at wanted depths (spec G.1). */
#ifndef QTR_EVAL_HAYSTACK_H
#define QTR_EVAL_HAYSTACK_H

#include "text/tokenizer.h"

struct qtr_sentence {
  size_t offset, len; /* in the text; white space after it included */
  int32_t n_tokens;   /* by itself */
};

struct qtr_haystack {
  char *text; /* (len) UTF-8; ends in white space */
  size_t len;
  struct qtr_sentence *sentence; /* (n_sentences) */
  size_t n_sentences, n_tokens;
};

/* Takes over `text` (malloc'ed, with room for two bytes after len), also when it fails. */
enum qtr_status qtr_haystack_create(struct qtr_engine *engine, char *text, size_t len, struct qtr_haystack *haystack,
                                    struct qtr_error *err);
/* path: a text file, or a directory whose *.txt files are taken in the order of their names. */
enum qtr_status qtr_haystack_read(struct qtr_engine *engine, const char *path, struct qtr_haystack *haystack,
                                  struct qtr_error *err);
/* Simple English sentences drawn by the seed, about n_tokens of them. */
enum qtr_status qtr_haystack_generate(struct qtr_engine *engine, uint64_t seed, size_t n_tokens,
                                      struct qtr_haystack *haystack, struct qtr_error *err);
void qtr_haystack_free(struct qtr_haystack *haystack);

struct qtr_insertion {
  double depth;     /* 0 … 1: the share of the context's tokens before it */
  const char *text; /* spaces around it are added where there are none */
};

/* Appends sentences from `first` on (after the last comes the first again) while their tokens are at most n_tokens, with the
 * insertions between them: ordered by depth, each at the nearest beginning of a sentence. */
enum qtr_status qtr_haystack_cut(const struct qtr_haystack *haystack, size_t first, size_t n_tokens,
                                 const struct qtr_insertion *insertion, size_t n_insertions, struct qtr_text *out,
                                 struct qtr_error *err);

#endif
