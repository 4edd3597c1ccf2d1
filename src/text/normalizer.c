/* normalizer.c - normalizers of tokenizer.json and of SentencePiece (normalizer.h): Sequence, Prepend, Replace, NFC, NFD,
 * NFKC, NFKD, Lowercase, Strip, ByteLevel. Others are refused by name. Each step reads one buffer and writes another. */
#include "text/normalizer.h"

#include "base/checked.h"
#include "base/status.h"
#include "text/unicode.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

enum { MAX_GROWTH = 64, GROWTH_SLACK = 65536 };

enum qtr_status qtr_text_reserve(struct qtr_text *text, size_t capacity, struct qtr_error *err) {
  if (capacity <= text->capacity) return QTR_OK;
  char *data = realloc(text->data, capacity);
  if (!data) return qtr_fail_memory(err, "text", capacity);
  data[text->len] = 0;
  text->data = data;
  text->capacity = capacity;
  return QTR_OK;
}

enum qtr_status qtr_text_append_byte_level(struct qtr_text *out, const char *text, size_t len, struct qtr_error *err) {
  size_t need = len + 1;
  for (size_t i = 0; i < len; i++) need += qtr_byte_to_char((uint8_t)text[i]) >= 0x80;
  enum qtr_status status = qtr_text_reserve(out, out->len + need, err);
  if (status) return status;
  char *at = out->data + out->len;
  for (size_t i = 0; i < len; i++) at += qtr_utf8_encode(qtr_byte_to_char((uint8_t)text[i]), at);
  *at = 0;
  out->len = (size_t)(at - out->data);
  return QTR_OK;
}

/* ---- Unicode normal forms ------------------------------------------------------------------------ */

struct code_points {
  utf8proc_int32_t *data;
  size_t n, capacity;
};

static enum qtr_status decompose(const char *text, size_t len, bool compatibility, struct code_points *out,
                                 struct qtr_error *err) {
  utf8proc_option_t options = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | (compatibility ? UTF8PROC_COMPAT : 0);
  for (size_t i = 0, n_bytes; i < len; i += n_bytes) {
    if (out->capacity - out->n < 32) {
      size_t capacity = QTR_MAX(len + 64, out->capacity + out->capacity / 2),
             n_data; /* never 0, unlike what the analyzer says */
      if (qtr_mul_overflow(capacity, sizeof *out->data, &n_data)) return qtr_fail_memory(err, "normalisation", SIZE_MAX);
      utf8proc_int32_t *data = realloc(out->data, n_data);
      if (!data) return qtr_fail_memory(err, "normalisation", n_data);
      out->data = data;
      out->capacity = capacity;
    }
    utf8proc_int32_t c = (utf8proc_int32_t)qtr_utf8_next(text + i, &n_bytes);
    int boundary = 0;
    utf8proc_ssize_t n = utf8proc_decompose_char(c, out->data + out->n, 32, options, &boundary);
    if (n < 0 || n > 32) return qtr_fail(err, QTR_ERR_FORMAT, "cannot decompose U+%04X", (unsigned)c);
    out->n += (size_t)n;
  }
  return QTR_OK;
}

/* Canonical order: each run of combining characters stably by class. Counting sort, as a run may be a whole hostile text. */
static enum qtr_status order_marks(struct code_points *points, struct qtr_error *err) {
  enum qtr_status status = QTR_OK;
  utf8proc_int32_t *sorted = NULL;
  size_t n_sorted = 0;
  for (size_t i = 0; i < points->n;) {
    size_t starts[257] = {0}, end = i;
    bool ordered = true;
    utf8proc_propval_t last = 0;
    for (; end < points->n; end++) {
      utf8proc_propval_t class = points->data[end] < 0x300 ? 0 : utf8proc_get_property(points->data[end])->combining_class;
      if (class <= 0) break;
      ordered = ordered && class >= last;
      last = class;
    }
    if (!ordered) {
      size_t n = end - i;
      if (n > n_sorted) {
        free(sorted);
        sorted = malloc(n * sizeof *sorted);
        if (!sorted) return qtr_fail_memory(err, "normalisation", n * sizeof *sorted);
        n_sorted = n;
      }
      for (size_t k = i; k < end; k++) starts[(uint8_t)utf8proc_get_property(points->data[k])->combining_class + 1]++;
      for (size_t k = 1; k < 257; k++) starts[k] += starts[k - 1];
      for (size_t k = i; k < end; k++) {
        sorted[starts[(uint8_t)utf8proc_get_property(points->data[k])->combining_class]++] = points->data[k];
      }
      memcpy(points->data + i, sorted, n * sizeof *sorted);
    }
    i = end + 1;
  }
  free(sorted);
  return status;
}

/* True when every character is below `limit` (a two-byte lead at most), so that the form changes nothing. */
static bool is_stable(const char *text, size_t len, uint8_t lead) {
  for (size_t i = 0; i < len; i++) {
    if ((uint8_t)text[i] >= lead) return false;
  }
  return true;
}

static enum qtr_status apply_unicode(const struct qtr_normalizer_step *step, const char *text, size_t len,
                                     struct qtr_text *out, struct qtr_error *err) {
  /* ASCII is the same in all forms; NFC leaves everything below U+0300 (lead byte 0xCC) alone. */
  if (is_stable(text, len, step->compose && !step->compatibility ? 0xcc : 0x80)) return qtr_text_append(out, text, len, err);
  struct code_points points = {0};
  enum qtr_status status = decompose(text, len, step->compatibility, &points, err);
  if (!status) status = order_marks(&points, err);
  if (!status && step->compose) {
    utf8proc_ssize_t n =
        utf8proc_normalize_utf32(points.data, (utf8proc_ssize_t)points.n, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    points.n = n < 0 ? 0 : (size_t)n;
  }
  for (size_t i = 0; i < points.n && !status; i++) {
    char bytes[4];
    status = qtr_text_append(out, bytes, qtr_utf8_encode((uint32_t)points.data[i], bytes), err);
  }
  free(points.data);
  return status;
}

/* ---- the other steps ----------------------------------------------------------------------------- */

static enum qtr_status apply_replace(const struct qtr_normalizer_step *step, struct qtr_pattern_scratch *scratch,
                                     const char *text, size_t len, size_t limit, struct qtr_text *out,
                                     struct qtr_error *err) {
  size_t at = 0, from = 0;
  enum qtr_status status = QTR_OK;
  while (from <= len && !status) {
    bool found;
    size_t begin, end;
    status = qtr_pattern_find(&step->pattern, scratch, text, len, from, &found, &begin, &end, err);
    if (status || !found) break;
    status = qtr_text_append(out, text + at, begin - at, err);
    if (!status) status = qtr_text_append(out, step->content, step->content_len, err);
    if (!status && out->len > limit) {
      return qtr_fail(err, QTR_ERR_LIMIT, "the tokenizer's normalizer makes the text %d times longer; refused", MAX_GROWTH);
    }
    at = end;
    from = end > begin ? end : begin == len ? len + 1 : begin + qtr_utf8_length((uint8_t)text[begin]);
  }
  return status ? status : qtr_text_append(out, text + at, len - at, err);
}

static enum qtr_status apply_lowercase(const char *text, size_t len, struct qtr_text *out, struct qtr_error *err) {
  enum qtr_status status = QTR_OK;
  for (size_t i = 0, n_bytes; i < len && !status; i += n_bytes) {
    uint32_t c = qtr_utf8_next(text + i, &n_bytes);
    char bytes[4];
    if (c == 0x130) { /* the one character whose lower case is two: i with a dot above */
      status = qtr_text_append(out, "i\xcc\x87", 3, err);
    } else {
      status = qtr_text_append(out, bytes, qtr_utf8_encode((uint32_t)utf8proc_tolower((utf8proc_int32_t)c), bytes), err);
    }
  }
  return status;
}

static enum qtr_status apply_strip(const struct qtr_normalizer_step *step, const char *text, size_t len,
                                   struct qtr_text *out, struct qtr_error *err) {
  size_t n_bytes, begin = 0, end = len;
  while (step->left && begin < end && qtr_is_space(qtr_utf8_next(text + begin, &n_bytes))) begin += n_bytes;
  while (step->right && end > begin) {
    size_t previous = qtr_utf8_previous(text, end);
    if (!qtr_is_space(qtr_utf8_next(text + previous, &n_bytes))) break;
    end = previous;
  }
  return qtr_text_append(out, text + begin, end - begin, err);
}

static enum qtr_status apply_squeeze(const char *text, size_t len, struct qtr_text *out, struct qtr_error *err) {
  enum qtr_status status = qtr_text_reserve(out, len + 1, err);
  for (size_t i = 0; i < len && !status;) {
    if (text[i] == ' ') {
      i++;
      continue;
    }
    const char *space = memchr(text + i, ' ', len - i);
    size_t end = space ? (size_t)(space - text) : len;
    if (out->len > 0) status = qtr_text_append(out, " ", 1, err);
    if (!status) status = qtr_text_append(out, text + i, end - i, err);
    i = end;
  }
  return status;
}

enum qtr_status qtr_normalizer_apply(const struct qtr_normalizer *normalizer, struct qtr_pattern_scratch *scratch,
                                     const char *text, size_t len, struct qtr_text *out, struct qtr_error *err) {
  size_t limit = len * MAX_GROWTH + GROWTH_SLACK;
  struct qtr_text other = {0};
  enum qtr_status status = QTR_OK;
  out->len = 0;
  for (size_t i = 0; i < normalizer->n_steps && !status; i++) {
    const struct qtr_normalizer_step *step = &normalizer->steps[i];
    const char *in = i == 0 ? text : out->data;
    size_t n = i == 0 ? len : out->len;
    other.len = 0;
    status = qtr_text_reserve(&other, n + 16, err);
    if (status) break;
    switch (step->kind) {
      case QTR_NORMALIZE_PREPEND:
        if (n > 0) status = qtr_text_append(&other, step->content, step->content_len, err);
        if (!status) status = qtr_text_append(&other, in, n, err);
        break;
      case QTR_NORMALIZE_REPLACE: status = apply_replace(step, scratch, in, n, limit, &other, err); break;
      case QTR_NORMALIZE_UNICODE: status = apply_unicode(step, in, n, &other, err); break;
      case QTR_NORMALIZE_LOWERCASE: status = apply_lowercase(in, n, &other, err); break;
      case QTR_NORMALIZE_STRIP: status = apply_strip(step, in, n, &other, err); break;
      case QTR_NORMALIZE_BYTES: status = qtr_text_append_byte_level(&other, in, n, err); break;
      case QTR_NORMALIZE_SQUEEZE: status = apply_squeeze(in, n, &other, err); break;
    }
    if (!status && other.len > limit) {
      status =
          qtr_fail(err, QTR_ERR_LIMIT, "the tokenizer's normalizer makes the text %d times longer; refused", MAX_GROWTH);
    }
    struct qtr_text swap = *out;
    *out = other;
    other = swap;
  }
  qtr_text_free(&other);
  return status;
}

/* ---- loading ------------------------------------------------------------------------------------- */

static enum qtr_status add_step(struct qtr_normalizer *normalizer, enum qtr_normalizer_kind kind,
                                struct qtr_normalizer_step **step, struct qtr_error *err) {
  if (normalizer->n_steps == QTR_MAX_STEPS) {
    (void)qtr_fail(err, QTR_ERR_UNSUPPORTED, "normalizer: more than %d steps", QTR_MAX_STEPS);
    return QTR_ERR_UNSUPPORTED;
  }
  *step = &normalizer->steps[normalizer->n_steps++];
  **step = (struct qtr_normalizer_step){.kind = kind};
  return QTR_OK;
}

static enum qtr_status set_content(struct qtr_normalizer_step *step, const char *content, size_t len,
                                   struct qtr_error *err) {
  step->content = malloc(len + 1);
  if (!step->content) return qtr_fail_memory(err, "a normalizer", len + 1);
  memcpy(step->content, content, len);
  step->content[len] = 0;
  step->content_len = len;
  return QTR_OK;
}

enum qtr_status qtr_normalizer_add(struct qtr_normalizer *normalizer, enum qtr_normalizer_kind kind, const char *pattern,
                                   const char *content, struct qtr_error *err) {
  struct qtr_normalizer_step *step = NULL;
  enum qtr_status status = add_step(normalizer, kind, &step, err);
  if (!status && pattern) status = qtr_pattern_set_literal(pattern, strlen(pattern), &step->pattern, err);
  if (!status && content) status = set_content(step, content, strlen(content), err);
  return status;
}

static enum qtr_status load(const json_t *json, struct qtr_normalizer *normalizer, size_t depth, struct qtr_error *err) {
  const char *type = json_string_value(json_object_get(json, "type"));
  if (!type) return qtr_fail(err, QTR_ERR_FORMAT, "normalizer: not an object with a \"type\"");
  enum qtr_status status = QTR_OK;
  struct qtr_normalizer_step *step = NULL;
  if (strcmp(type, "Sequence") == 0) {
    const json_t *list = json_object_get(json, "normalizers");
    if (!json_is_array(list)) return qtr_fail(err, QTR_ERR_FORMAT, "normalizer Sequence: \"normalizers\" is not a list");
    if (depth == QTR_MAX_NESTING) return qtr_fail(err, QTR_ERR_UNSUPPORTED, "normalizer: sequences nest too deep");
    for (size_t i = 0; i < json_array_size(list) && !status; i++) {
      status = load(json_array_get(list, i), normalizer, depth + 1, err);
    }
    return status;
  }
  if (strcmp(type, "Prepend") == 0) {
    const json_t *text = json_object_get(json, "prepend");
    if (!json_is_string(text)) return qtr_fail(err, QTR_ERR_FORMAT, "normalizer Prepend: \"prepend\" is not a string");
    status = add_step(normalizer, QTR_NORMALIZE_PREPEND, &step, err);
    return status ? status : set_content(step, json_string_value(text), json_string_length(text), err);
  }
  if (strcmp(type, "Replace") == 0) {
    const json_t *text = json_object_get(json, "content");
    if (!json_is_string(text)) return qtr_fail(err, QTR_ERR_FORMAT, "normalizer Replace: \"content\" is not a string");
    status = add_step(normalizer, QTR_NORMALIZE_REPLACE, &step, err);
    if (!status) status = set_content(step, json_string_value(text), json_string_length(text), err);
    return status ? status
                  : qtr_pattern_from_json(json_object_get(json, "pattern"), "normalizer Replace", &step->pattern, err);
  }
  if (strcmp(type, "NFC") == 0 || strcmp(type, "NFD") == 0 || strcmp(type, "NFKC") == 0 || strcmp(type, "NFKD") == 0) {
    status = add_step(normalizer, QTR_NORMALIZE_UNICODE, &step, err);
    if (!status) step->compatibility = type[2] == 'K';
    if (!status) step->compose = type[strlen(type) - 1] == 'C';
    return status;
  }
  if (strcmp(type, "Strip") == 0) {
    status = add_step(normalizer, QTR_NORMALIZE_STRIP, &step, err);
    if (!status) step->left = json_is_true(json_object_get(json, "strip_left"));
    if (!status) step->right = json_is_true(json_object_get(json, "strip_right"));
    return status;
  }
  if (strcmp(type, "Lowercase") == 0) return add_step(normalizer, QTR_NORMALIZE_LOWERCASE, &step, err);
  if (strcmp(type, "ByteLevel") == 0) return add_step(normalizer, QTR_NORMALIZE_BYTES, &step, err);
  char shown[64];
  return qtr_fail(
      err, QTR_ERR_UNSUPPORTED,
      "normalizer \"%s\" is not supported (Sequence, Prepend, Replace, NFC, NFD, NFKC, NFKD, Lowercase, Strip and "
      "ByteLevel are)",
      qtr_printable(type, strlen(type), shown, sizeof shown));
}

enum qtr_status qtr_normalizer_from_json(const json_t *json, struct qtr_normalizer *normalizer, struct qtr_error *err) {
  return !json || json_is_null(json) ? QTR_OK : load(json, normalizer, 0, err);
}

void qtr_normalizer_free(struct qtr_normalizer *normalizer) {
  for (size_t i = 0; i < normalizer->n_steps; i++) {
    qtr_pattern_free(&normalizer->steps[i].pattern);
    free(normalizer->steps[i].content);
  }
  normalizer->n_steps = 0;
}
