/* pretokenizer.h - cuts a text into the pieces that BPE sees one by one. Private to src/text. Immutable once loaded. */
#ifndef QTR_TEXT_PRETOKENIZER_H
#define QTR_TEXT_PRETOKENIZER_H

#include "text/normalizer.h"

enum qtr_pretokenizer_kind {
  QTR_PRETOKENIZE_PREFIX_SPACE, /* a space before a piece that does not start with one */
  QTR_PRETOKENIZE_BYTES,        /* bytes to the byte-level alphabet */
  QTR_PRETOKENIZE_METASPACE,    /* spaces become `mark`, and one may be put in front */
  QTR_PRETOKENIZE_SPLIT,        /* at the matches of `pattern` */
  QTR_PRETOKENIZE_SPLIT_CLASS,  /* at the characters for which is_member is true */
  QTR_PRETOKENIZE_WORDS         /* runs of \w and runs of neither \w nor \s; \s goes */
};

/* What becomes of a match between the pieces. */
enum qtr_split_behavior {
  QTR_SPLIT_REMOVED,
  QTR_SPLIT_ISOLATED,
  QTR_SPLIT_MERGED_WITH_PREVIOUS,
  QTR_SPLIT_MERGED_WITH_NEXT,
  QTR_SPLIT_CONTIGUOUS
};

enum qtr_prepend_scheme { QTR_PREPEND_NEVER, QTR_PREPEND_FIRST, QTR_PREPEND_ALWAYS };

struct qtr_pretokenizer_step {
  enum qtr_pretokenizer_kind kind;
  struct qtr_pattern pattern;
  enum qtr_split_behavior behavior;
  bool invert;
  bool (*is_member)(uint32_t c);
  char mark[5]; /* one character, NUL-terminated */
  enum qtr_prepend_scheme prepend;
};

struct qtr_pretokenizer {
  struct qtr_pretokenizer_step steps[QTR_MAX_STEPS];
  size_t n_steps;
};

enum qtr_status qtr_pretokenizer_from_json(const json_t *json, struct qtr_pretokenizer *pretokenizer, struct qtr_error *err);
void qtr_pretokenizer_free(struct qtr_pretokenizer *pretokenizer);

struct qtr_pretokenizer_work {
  struct qtr_text texts[QTR_MAX_STEPS]; /* what each step rewrote */
  struct qtr_pattern_scratch scratch;
  enum qtr_status (*piece)(void *context, const char *text, size_t len, struct qtr_error *err);
  void *context;
};
void qtr_pretokenizer_work_free(struct qtr_pretokenizer_work *work);

/* Calls work->piece for every piece in order. at_start: text begins where the whole input begins. */
enum qtr_status qtr_pretokenizer_run(const struct qtr_pretokenizer *pretokenizer, struct qtr_pretokenizer_work *work,
                                     const char *text, size_t len, bool at_start, struct qtr_error *err);

#endif
