/* pretokenizer.c - pre-tokenizers of tokenizer.json (pretokenizer.h): Sequence, ByteLevel, Split, Metaspace, Digits,
 * Punctuation, Whitespace, WhitespaceSplit, CharDelimiterSplit. Others are refused by name. A piece goes through all steps
 * before the next one starts, so nothing is kept but the piece itself; the recursion is as deep as there are steps. */
#include "text/pretokenizer.h"

#include "base/status.h"
#include "text/unicode.h"

#include <stdlib.h>
#include <string.h>

static const char gpt2_pattern[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

struct piece {
  size_t begin, end;
  bool is_match;
};

/* One Split at work: pieces and matches come in by order, and leave joined or removed as the behavior says. */
struct splitter {
  const struct qtr_pretokenizer *pretokenizer;
  struct qtr_pretokenizer_work *work;
  size_t step;
  const char *text;
  bool at_start, has_held;
  struct piece held;
  struct qtr_error *err;
};

static enum qtr_status run_from(const struct qtr_pretokenizer *pretokenizer, struct qtr_pretokenizer_work *work, size_t step,
                                const char *text, size_t len, bool at_start, struct qtr_error *err);

static enum qtr_status emit(struct splitter *s, struct piece piece) {
  return run_from(s->pretokenizer, s->work, s->step + 1, s->text + piece.begin, piece.end - piece.begin,
                  s->at_start && piece.begin == 0, s->err);
}

static enum qtr_status release(struct splitter *s) {
  if (!s->has_held) return QTR_OK;
  s->has_held = false;
  return emit(s, s->held);
}

static enum qtr_status feed(struct splitter *s, size_t begin, size_t end, bool is_match) {
  const struct qtr_pretokenizer_step *step = &s->pretokenizer->steps[s->step];
  struct piece piece = {begin, end, is_match != step->invert};
  bool join = false;
  switch (step->behavior) {
    case QTR_SPLIT_REMOVED: return piece.is_match ? QTR_OK : emit(s, piece);
    case QTR_SPLIT_ISOLATED: return emit(s, piece);
    case QTR_SPLIT_CONTIGUOUS: join = s->has_held && s->held.is_match == piece.is_match; break;
    case QTR_SPLIT_MERGED_WITH_PREVIOUS: join = s->has_held && !s->held.is_match && piece.is_match; break;
    case QTR_SPLIT_MERGED_WITH_NEXT: join = s->has_held && s->held.is_match && !piece.is_match; break;
  }
  enum qtr_status status = QTR_OK;
  if (join) {
    s->held.end = end;
    s->held.is_match = piece.is_match;
  } else {
    status = release(s);
    s->held = piece;
    s->has_held = true;
  }
  return status;
}

static enum qtr_status split_at_pattern(struct splitter *s, const struct qtr_pretokenizer_step *step, size_t len) {
  size_t done = 0, from = 0;
  bool matched = false;
  enum qtr_status status = QTR_OK;
  while (from <= len && !status) {
    bool found;
    size_t begin, end;
    status = qtr_pattern_find(&step->pattern, &s->work->scratch, s->text, len, from, &found, &begin, &end, s->err);
    if (status || !found) break;
    if (end == begin && matched && end == done) { /* an empty match right after a match does not count */
      from = end == len ? len + 1 : end + qtr_utf8_length((uint8_t)s->text[end]);
      continue;
    }
    if (begin > done) status = feed(s, done, begin, false);
    if (!status) status = feed(s, begin, end, true);
    done = from = end;
    matched = true;
  }
  return status || done == len ? status : feed(s, done, len, false);
}

static enum qtr_status split_at_class(struct splitter *s, const struct qtr_pretokenizer_step *step, size_t len) {
  size_t done = 0;
  enum qtr_status status = QTR_OK;
  for (size_t i = 0, n_bytes; i < len && !status; i += n_bytes) {
    if (!step->is_member(qtr_utf8_next(s->text + i, &n_bytes))) continue;
    if (i > done) status = feed(s, done, i, false);
    if (!status) status = feed(s, i, i + n_bytes, true);
    done = i + n_bytes;
  }
  return status || done == len ? status : feed(s, done, len, false);
}

static enum qtr_status split_words(struct splitter *s, size_t len) {
  enum qtr_status status = QTR_OK;
  size_t begin = 0;
  int kind = -1;
  for (size_t i = 0, n_bytes = 0; i <= len && !status; i += n_bytes) {
    int next = -1;
    if (i < len) {
      uint32_t c = qtr_utf8_next(s->text + i, &n_bytes);
      next = qtr_is_word(c) ? 1 : qtr_is_space(c) ? 0 : 2;
    }
    if (next != kind) {
      if (kind > 0) status = emit(s, (struct piece){begin, i, false});
      begin = i;
      kind = next;
    }
    if (i == len) break;
  }
  return status;
}

static enum qtr_status rewrite_metaspace(const struct qtr_pretokenizer_step *step, const char *text, size_t len,
                                         bool at_start, struct qtr_text *out, struct qtr_error *err) {
  size_t n_mark = strlen(step->mark);
  bool marked = text[0] == ' ' || (len >= n_mark && memcmp(text, step->mark, n_mark) == 0);
  bool prepend = !marked && (step->prepend == QTR_PREPEND_ALWAYS || (step->prepend == QTR_PREPEND_FIRST && at_start));
  enum qtr_status status = qtr_text_reserve(out, len + n_mark + 1, err);
  if (!status && prepend) status = qtr_text_append(out, step->mark, n_mark, err);
  for (size_t i = 0; i < len && !status;) {
    const char *space = memchr(text + i, ' ', len - i);
    size_t end = space ? (size_t)(space - text) : len;
    status = qtr_text_append(out, text + i, end - i, err);
    if (!status && space) status = qtr_text_append(out, step->mark, n_mark, err);
    i = end + 1;
  }
  return status;
}

static enum qtr_status run_from(const struct qtr_pretokenizer *pretokenizer, struct qtr_pretokenizer_work *work, size_t at,
                                const char *text, size_t len, bool at_start, struct qtr_error *err) {
  if (len == 0) return QTR_OK;
  if (at == pretokenizer->n_steps) return work->piece(work->context, text, len, err);
  const struct qtr_pretokenizer_step *step = &pretokenizer->steps[at];
  struct qtr_text *out = &work->texts[at];
  struct splitter s = {
      .pretokenizer = pretokenizer, .work = work, .step = at, .text = text, .at_start = at_start, .err = err};
  enum qtr_status status = QTR_OK;
  out->len = 0;
  switch (step->kind) {
    case QTR_PRETOKENIZE_PREFIX_SPACE:
      if (text[0] == ' ') return run_from(pretokenizer, work, at + 1, text, len, at_start, err);
      status = qtr_text_append(out, " ", 1, err);
      if (!status) status = qtr_text_append(out, text, len, err);
      return status ? status : run_from(pretokenizer, work, at + 1, out->data, out->len, at_start, err);
    case QTR_PRETOKENIZE_BYTES:
      status = qtr_text_append_byte_level(out, text, len, err);
      return status ? status : run_from(pretokenizer, work, at + 1, out->data, out->len, at_start, err);
    case QTR_PRETOKENIZE_METASPACE:
      status = rewrite_metaspace(step, text, len, at_start, out, err);
      return status ? status : run_from(pretokenizer, work, at + 1, out->data, out->len, at_start, err);
    case QTR_PRETOKENIZE_SPLIT: status = split_at_pattern(&s, step, len); break;
    case QTR_PRETOKENIZE_SPLIT_CLASS: status = split_at_class(&s, step, len); break;
    case QTR_PRETOKENIZE_WORDS: status = split_words(&s, len); break;
  }
  return status ? status : release(&s);
}

enum qtr_status qtr_pretokenizer_run(const struct qtr_pretokenizer *pretokenizer, struct qtr_pretokenizer_work *work,
                                     const char *text, size_t len, bool at_start, struct qtr_error *err) {
  return run_from(pretokenizer, work, 0, text, len, at_start, err);
}

void qtr_pretokenizer_work_free(struct qtr_pretokenizer_work *work) {
  for (size_t i = 0; i < QTR_MAX_STEPS; i++) qtr_text_free(&work->texts[i]);
  qtr_pattern_scratch_free(&work->scratch);
}

/* ---- loading ------------------------------------------------------------------------------------- */

static enum qtr_status add_step(struct qtr_pretokenizer *pretokenizer, enum qtr_pretokenizer_kind kind,
                                struct qtr_pretokenizer_step **step, struct qtr_error *err) {
  if (pretokenizer->n_steps == QTR_MAX_STEPS) {
    (void)qtr_fail(err, QTR_ERR_UNSUPPORTED, "pre_tokenizer: more than %d steps", QTR_MAX_STEPS);
    return QTR_ERR_UNSUPPORTED;
  }
  *step = &pretokenizer->steps[pretokenizer->n_steps++];
  **step = (struct qtr_pretokenizer_step){.kind = kind, .behavior = QTR_SPLIT_ISOLATED};
  return QTR_OK;
}

static enum qtr_status load_behavior(const json_t *json, enum qtr_split_behavior *behavior, struct qtr_error *err) {
  static const char *const names[] = {"Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"};
  const char *name = json_string_value(json_object_get(json, "behavior"));
  for (size_t i = 0; name && i < sizeof names / sizeof names[0]; i++) {
    if (strcmp(name, names[i]) == 0) {
      *behavior = (enum qtr_split_behavior)i;
      return QTR_OK;
    }
  }
  return qtr_fail(err, QTR_ERR_FORMAT,
                  "pre_tokenizer: \"behavior\" must be Removed, Isolated, MergedWithPrevious, MergedWithNext or Contiguous");
}

static enum qtr_status load_byte_level(const json_t *json, struct qtr_pretokenizer *pretokenizer, struct qtr_error *err) {
  /* A second one would only grow the text again: no real file has it. */
  for (size_t i = 0; i < pretokenizer->n_steps; i++) {
    if (pretokenizer->steps[i].kind == QTR_PRETOKENIZE_BYTES) {
      return qtr_fail(err, QTR_ERR_UNSUPPORTED, "pre_tokenizer: more than one ByteLevel");
    }
  }
  struct qtr_pretokenizer_step *step = NULL;
  enum qtr_status status = QTR_OK;
  const json_t *use_regex = json_object_get(json, "use_regex");
  if (json_is_true(json_object_get(json, "add_prefix_space"))) {
    status = add_step(pretokenizer, QTR_PRETOKENIZE_PREFIX_SPACE, &step, err);
  }
  if (!status && !json_is_false(use_regex)) {
    status = add_step(pretokenizer, QTR_PRETOKENIZE_SPLIT, &step, err);
    if (!status) status = qtr_pattern_compile(gpt2_pattern, sizeof gpt2_pattern - 1, &step->pattern, err);
  }
  return status ? status : add_step(pretokenizer, QTR_PRETOKENIZE_BYTES, &step, err);
}

static enum qtr_status load_metaspace(const json_t *json, struct qtr_pretokenizer *pretokenizer, struct qtr_error *err) {
  struct qtr_pretokenizer_step *step = NULL;
  const json_t *mark = json_object_get(json, "replacement");
  const char *scheme = json_string_value(json_object_get(json, "prepend_scheme"));
  const json_t *prefix = json_object_get(json, "add_prefix_space");
  enum qtr_prepend_scheme prepend;
  if (!scheme) {
    prepend = json_is_false(prefix) ? QTR_PREPEND_NEVER : QTR_PREPEND_ALWAYS;
  } else if (strcmp(scheme, "always") == 0) {
    prepend = QTR_PREPEND_ALWAYS;
  } else if (strcmp(scheme, "first") == 0) {
    prepend = QTR_PREPEND_FIRST;
  } else if (strcmp(scheme, "never") == 0) {
    prepend = QTR_PREPEND_NEVER;
  } else {
    return qtr_fail(err, QTR_ERR_FORMAT, "pre_tokenizer Metaspace: \"prepend_scheme\" must be always, first or never");
  }
  const char *text = json_string_value(mark);
  size_t len = json_string_length(mark);
  if (!text || len == 0 || qtr_utf8_length((uint8_t)text[0]) != len) {
    return qtr_fail(err, QTR_ERR_FORMAT, "pre_tokenizer Metaspace: \"replacement\" is not one character");
  }
  enum qtr_status status = add_step(pretokenizer, QTR_PRETOKENIZE_METASPACE, &step, err);
  if (status) return status;
  memcpy(step->mark, text, len);
  step->prepend = prepend;
  if (json_is_false(json_object_get(json, "split"))) return QTR_OK;
  status = add_step(pretokenizer, QTR_PRETOKENIZE_SPLIT, &step, err);
  if (status) return status;
  step->behavior = QTR_SPLIT_MERGED_WITH_NEXT;
  return qtr_pattern_set_literal(text, len, &step->pattern, err);
}

static enum qtr_status load_class(const json_t *json, const char *type, struct qtr_pretokenizer *pretokenizer,
                                  struct qtr_error *err) {
  struct qtr_pretokenizer_step *step = NULL;
  enum qtr_status status = add_step(pretokenizer, QTR_PRETOKENIZE_SPLIT_CLASS, &step, err);
  if (status) return status;
  if (strcmp(type, "Digits") == 0) {
    step->is_member = qtr_is_numeric;
    step->behavior = json_is_true(json_object_get(json, "individual_digits")) ? QTR_SPLIT_ISOLATED : QTR_SPLIT_CONTIGUOUS;
  } else if (strcmp(type, "Punctuation") == 0) {
    step->is_member = qtr_is_punctuation;
    if (json_object_get(json, "behavior")) status = load_behavior(json, &step->behavior, err);
  } else {
    step->is_member = qtr_is_space;
    step->behavior = QTR_SPLIT_REMOVED;
  }
  return status;
}

static enum qtr_status load(const json_t *json, struct qtr_pretokenizer *pretokenizer, size_t depth, struct qtr_error *err) {
  const char *type = json_string_value(json_object_get(json, "type"));
  if (!type) return qtr_fail(err, QTR_ERR_FORMAT, "pre_tokenizer: not an object with a \"type\"");
  enum qtr_status status = QTR_OK;
  struct qtr_pretokenizer_step *step = NULL;
  if (strcmp(type, "Sequence") == 0) {
    const json_t *list = json_object_get(json, "pretokenizers");
    if (!json_is_array(list))
      return qtr_fail(err, QTR_ERR_FORMAT, "pre_tokenizer Sequence: \"pretokenizers\" is not a list");
    if (depth == QTR_MAX_NESTING) return qtr_fail(err, QTR_ERR_UNSUPPORTED, "pre_tokenizer: sequences nest too deep");
    for (size_t i = 0; i < json_array_size(list) && !status; i++) {
      status = load(json_array_get(list, i), pretokenizer, depth + 1, err);
    }
    return status;
  }
  if (strcmp(type, "ByteLevel") == 0) return load_byte_level(json, pretokenizer, err);
  if (strcmp(type, "Metaspace") == 0) return load_metaspace(json, pretokenizer, err);
  if (strcmp(type, "Digits") == 0 || strcmp(type, "Punctuation") == 0 || strcmp(type, "WhitespaceSplit") == 0) {
    return load_class(json, type, pretokenizer, err);
  }
  if (strcmp(type, "Whitespace") == 0) return add_step(pretokenizer, QTR_PRETOKENIZE_WORDS, &step, err);
  if (strcmp(type, "Split") == 0) {
    status = add_step(pretokenizer, QTR_PRETOKENIZE_SPLIT, &step, err);
    if (!status) status = load_behavior(json, &step->behavior, err);
    if (status) return status;
    step->invert = json_is_true(json_object_get(json, "invert"));
    return qtr_pattern_from_json(json_object_get(json, "pattern"), "pre_tokenizer Split", &step->pattern, err);
  }
  if (strcmp(type, "CharDelimiterSplit") == 0) {
    const json_t *delimiter = json_object_get(json, "delimiter");
    if (!json_is_string(delimiter)) return qtr_fail(err, QTR_ERR_FORMAT, "pre_tokenizer: \"delimiter\" is not a string");
    status = add_step(pretokenizer, QTR_PRETOKENIZE_SPLIT, &step, err);
    if (status) return status;
    step->behavior = QTR_SPLIT_REMOVED;
    return qtr_pattern_set_literal(json_string_value(delimiter), json_string_length(delimiter), &step->pattern, err);
  }
  char shown[64];
  return qtr_fail(err, QTR_ERR_UNSUPPORTED,
                  "pre_tokenizer \"%s\" is not supported (Sequence, ByteLevel, Split, Metaspace, Digits, Punctuation, "
                  "Whitespace, WhitespaceSplit and CharDelimiterSplit are)",
                  qtr_printable(type, strlen(type), shown, sizeof shown));
}

enum qtr_status qtr_pretokenizer_from_json(const json_t *json, struct qtr_pretokenizer *pretokenizer,
                                           struct qtr_error *err) {
  return !json || json_is_null(json) ? QTR_OK : load(json, pretokenizer, 0, err);
}

void qtr_pretokenizer_free(struct qtr_pretokenizer *pretokenizer) {
  for (size_t i = 0; i < pretokenizer->n_steps; i++) qtr_pattern_free(&pretokenizer->steps[i].pattern);
  pretokenizer->n_steps = 0;
}
