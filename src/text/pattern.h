/* pattern.h - the patterns of tokenizer.json: literal strings, and regular expressions in Oniguruma's dialect run by PCRE2.
 * Private to src/text. A compiled pattern is immutable; each thread brings its own scratch. */
#ifndef QTR_TEXT_PATTERN_H
#define QTR_TEXT_PATTERN_H

#include "quattuor/quattuor.h"

#include <jansson.h>

struct qtr_pattern {
  void *code;    /* pcre2_code; NULL for a literal */
  char *literal; /* (literal_len) */
  size_t literal_len;
};

struct qtr_pattern_scratch {
  void *match_data, *match_context, *jit_stack; /* made on first use; zero-initialised by the caller */
};

enum qtr_status qtr_pattern_compile(const char *regex, size_t len, struct qtr_pattern *pattern, struct qtr_error *err);
enum qtr_status qtr_pattern_set_literal(const char *text, size_t len, struct qtr_pattern *pattern, struct qtr_error *err);
/* {"Regex": "..."} or {"String": "..."}; where names the place for messages. */
enum qtr_status qtr_pattern_from_json(const json_t *json, const char *where, struct qtr_pattern *pattern,
                                      struct qtr_error *err);
void qtr_pattern_free(struct qtr_pattern *pattern);
void qtr_pattern_scratch_free(struct qtr_pattern_scratch *scratch);

/* First match in text[0..len), valid UTF-8, that starts at `from` or later. *found tells; [*begin, *end) may be empty. */
enum qtr_status qtr_pattern_find(const struct qtr_pattern *pattern, struct qtr_pattern_scratch *scratch, const char *text,
                                 size_t len, size_t from, bool *found, size_t *begin, size_t *end, struct qtr_error *err);

#endif
