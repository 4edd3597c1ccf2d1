/* detokenizer.c - ids to text (tokenizer.h). Loading turns every token into the bytes it adds; decoding strings them
 * together and holds back the bytes of an unfinished character. Wrong bytes: a byte-level vocabulary gives one U+FFFD for
 * each maximal subpart, as the reference does; byte tokens give one U+FFFD each, as SentencePiece does. (PyPI tokenizers
 * also gives up the good characters of such a run, which no streaming decoder can follow.) */
#include "base/checked.h"
#include "base/status.h"
#include "text/tokenizer_impl.h"
#include "text/unicode.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_DECODED_BYTES = 1 << 30 };
static const char replacement[] = "\xef\xbf\xbd"; /* U+FFFD */

/* ---- loading ------------------------------------------------------------------------------------- */

static enum qtr_status refuse(const char *what, struct qtr_error *err) {
  return qtr_fail(err, QTR_ERR_UNSUPPORTED, "decoder: %s is not supported", what);
}

/* One character of a JSON string to out (at most 4 bytes and a NUL). */
static bool one_character(const json_t *json, char out[5]) {
  const char *text = json_string_value(json);
  size_t len = json_string_length(json);
  if (!text || len == 0 || len > 4 || qtr_utf8_length((uint8_t)text[0]) != len) return false;
  memcpy(out, text, len);
  out[len] = 0;
  return true;
}

/* The steps come in the order Replace or Metaspace, ByteFallback, Fuse, Strip; any may be missing. `stage` is how far we
 * are. */
static enum qtr_status load_step(const json_t *json, struct qtr_decoder *decoder, int *stage, size_t depth,
                                 struct qtr_error *err) {
  const char *type = json_string_value(json_object_get(json, "type"));
  if (!type) return qtr_fail(err, QTR_ERR_FORMAT, "decoder: not an object with a \"type\"");
  enum qtr_status status = QTR_OK;
  if (strcmp(type, "Sequence") == 0) {
    const json_t *list = json_object_get(json, "decoders");
    if (!json_is_array(list)) return qtr_fail(err, QTR_ERR_FORMAT, "decoder Sequence: \"decoders\" is not a list");
    if (depth == QTR_MAX_NESTING) return refuse("such nesting", err);
    for (size_t i = 0; i < json_array_size(list) && !status; i++) {
      status = load_step(json_array_get(list, i), decoder, stage, depth + 1, err);
    }
    return status;
  }
  if (strcmp(type, "ByteLevel") == 0) {
    if (*stage > 0) return refuse("ByteLevel after another step", err);
    decoder->kind = QTR_DECODE_BYTE_LEVEL;
    *stage = 5;
    return QTR_OK;
  }
  decoder->kind = QTR_DECODE_PIECES;
  if (strcmp(type, "Replace") == 0) {
    const json_t *pattern = json_object_get(json_object_get(json, "pattern"), "String");
    const json_t *content = json_object_get(json, "content");
    if (*stage > 1) return refuse("Replace after ByteFallback, Fuse or Strip", err);
    if (!json_is_string(pattern) || !json_is_string(content))
      return refuse("Replace without a String pattern and content", err);
    if (json_string_length(pattern) == 0) return refuse("Replace with an empty pattern", err);
    *stage = 1;
    return qtr_normalizer_add(&decoder->replace, QTR_NORMALIZE_REPLACE, json_string_value(pattern),
                              json_string_value(content), err);
  }
  if (strcmp(type, "Metaspace") == 0) {
    const char *scheme = json_string_value(json_object_get(json, "prepend_scheme"));
    char mark[5];
    if (*stage > 0) return refuse("Metaspace after another step", err);
    if (!one_character(json_object_get(json, "replacement"), mark)) return refuse("a Metaspace without replacement", err);
    bool never = scheme ? strcmp(scheme, "never") == 0 : json_is_false(json_object_get(json, "add_prefix_space"));
    if (!never) memcpy(decoder->mark, mark, sizeof mark);
    *stage = 2;
    return qtr_normalizer_add(&decoder->replace, QTR_NORMALIZE_REPLACE, mark, " ", err);
  }
  if (strcmp(type, "ByteFallback") == 0) {
    if (*stage > 2) return refuse("ByteFallback after Fuse or Strip", err);
    decoder->byte_fallback = true;
    *stage = 3;
    return QTR_OK;
  }
  if (strcmp(type, "Fuse") == 0) {
    if (*stage > 4) return refuse("Fuse after Strip", err);
    *stage = 4;
    return QTR_OK;
  }
  if (strcmp(type, "Strip") == 0) {
    const json_t *start = json_object_get(json, "start"), *stop = json_object_get(json, "stop");
    if (!json_is_integer(start) || !json_is_integer(stop) || json_integer_value(stop) != 0 ||
        json_integer_value(start) < 0 || json_integer_value(start) > 1) {
      return refuse("Strip of anything but one character at the start", err);
    }
    if (json_integer_value(start) == 0) return QTR_OK;
    if (*stage != 4 || decoder->mark[0]) return refuse("Strip that does not follow Fuse", err);
    if (!one_character(json_object_get(json, "content"), decoder->strip)) return refuse("Strip without content", err);
    *stage = 5;
    return QTR_OK;
  }
  char shown[64];
  return qtr_fail(
      err, QTR_ERR_UNSUPPORTED,
      "decoder \"%s\" is not supported (Sequence, ByteLevel, Replace, Metaspace, ByteFallback, Fuse and Strip are)",
      qtr_printable(type, strlen(type), shown, sizeof shown));
}

enum qtr_status qtr_decoder_from_json(const json_t *json, struct qtr_decoder *decoder, struct qtr_error *err) {
  int stage = 0;
  decoder->kind = QTR_DECODE_SPACED;
  return !json || json_is_null(json) ? QTR_OK : load_step(json, decoder, &stage, 0, err);
}

/* Bytes of a token of the byte-level alphabet; a token with any other character stands for itself. */
static enum qtr_status decode_byte_level(const char *text, size_t len, struct qtr_text *out, struct qtr_error *err) {
  size_t old = out->len;
  enum qtr_status status = QTR_OK;
  for (size_t i = 0, n_bytes; i < len && !status; i += n_bytes) {
    int byte = qtr_char_to_byte(qtr_utf8_next(text + i, &n_bytes));
    if (byte < 0) {
      out->len = old;
      return qtr_text_append(out, text, len, err);
    }
    const char c = (char)byte;
    status = qtr_text_append(out, &c, 1, err);
  }
  return status;
}

enum qtr_status qtr_decoder_finish(struct qtr_tokenizer *t, struct qtr_error *err) {
  struct qtr_text piece = {0};
  struct qtr_pattern_scratch scratch = {0};
  size_t n = (size_t)t->n_ids;
  enum qtr_status status = QTR_OK;
  t->decoded_at = calloc(n + 1, sizeof *t->decoded_at);
  if (t->decoder.byte_fallback) t->byte_value = malloc((n + 1) * sizeof *t->byte_value);
  if (!t->decoded_at || (t->decoder.byte_fallback && !t->byte_value)) {
    status = qtr_fail_memory(err, "the decoder", n * sizeof *t->decoded_at);
  }
  if (!status) status = qtr_text_append(&t->decoded, "", 0, err);
  for (size_t i = 0; i < n && !status; i++) {
    t->decoded_at[i] = (uint32_t)t->decoded.len;
    if (t->byte_value) t->byte_value[i] = -1;
    if (!qtr_vocab_has(&t->vocab, (int32_t)i)) continue;
    size_t len;
    const char *text = qtr_vocab_text(&t->vocab, (int32_t)i, &len);
    if (t->decoder.replace.n_steps > 0) {
      status = qtr_normalizer_apply(&t->decoder.replace, &scratch, text, len, &piece, err);
      if (status) break;
      text = piece.data;
      len = piece.len;
    }
    int byte = t->byte_value ? qtr_byte_token(text, len) : -1;
    if (byte >= 0) {
      t->byte_value[i] = (int16_t)byte;
    } else if (t->decoder.kind == QTR_DECODE_BYTE_LEVEL) {
      status = decode_byte_level(text, len, &t->decoded, err);
    } else {
      status = qtr_text_append(&t->decoded, text, len, err);
    }
    if (t->decoded.len > MAX_DECODED_BYTES) {
      status = qtr_fail(err, QTR_ERR_FORMAT, "the decoded vocabulary is larger than %d bytes", MAX_DECODED_BYTES);
    }
  }
  if (!status) t->decoded_at[n] = (uint32_t)t->decoded.len;
  qtr_text_free(&piece);
  qtr_pattern_scratch_free(&scratch);
  return status;
}

const char *qtr_tokenizer_token_bytes(const struct qtr_tokenizer *t, int32_t id, size_t *len) {
  static const char every_byte[] = {
#define QTR_BYTES16(x)                                                                                                \
  (char)(x), (char)(x + 1), (char)(x + 2), (char)(x + 3), (char)(x + 4), (char)(x + 5), (char)(x + 6), (char)(x + 7), \
      (char)(x + 8), (char)(x + 9), (char)(x + 10), (char)(x + 11), (char)(x + 12), (char)(x + 13), (char)(x + 14),   \
      (char)(x + 15)
      QTR_BYTES16(0x00), QTR_BYTES16(0x10), QTR_BYTES16(0x20), QTR_BYTES16(0x30), QTR_BYTES16(0x40), QTR_BYTES16(0x50),
      QTR_BYTES16(0x60), QTR_BYTES16(0x70), QTR_BYTES16(0x80), QTR_BYTES16(0x90), QTR_BYTES16(0xa0), QTR_BYTES16(0xb0),
      QTR_BYTES16(0xc0), QTR_BYTES16(0xd0), QTR_BYTES16(0xe0), QTR_BYTES16(0xf0)};
#undef QTR_BYTES16
  *len = 0;
  if (id < 0 || id >= t->n_ids || !qtr_vocab_has(&t->vocab, id)) return NULL;
  if (t->byte_value && t->byte_value[id] >= 0) {
    *len = 1;
    return &every_byte[t->byte_value[id]];
  }
  *len = t->decoded_at[id + 1] - t->decoded_at[id];
  return t->decoded.data + t->decoded_at[id];
}

/* ---- decoding ------------------------------------------------------------------------------------ */

void qtr_detokenizer_init(struct qtr_detokenizer *d, const struct qtr_tokenizer *tokenizer, bool skip_special) {
  *d = (struct qtr_detokenizer){.tokenizer = tokenizer, .skip_special = skip_special, .at_start = true};
}

/* Appends whole characters; the very first one may be the space that goes. */
static enum qtr_status emit(struct qtr_detokenizer *d, const char *text, size_t len, struct qtr_text *out,
                            struct qtr_error *err) {
  if (len == 0) return QTR_OK;
  const char *strip = d->tokenizer->decoder.strip;
  size_t n = strlen(strip);
  if (d->at_start && n > 0 && len >= n && memcmp(text, strip, n) == 0) {
    text += n;
    len -= n;
    if (len == 0 && d->tokenizer->decoder.strip_repeats) return QTR_OK;
  }
  d->at_start = false;
  return qtr_text_append(out, text, len, err);
}

/* Gives out what the pending bytes decide; at the end everything that is left. */
static enum qtr_status settle(struct qtr_detokenizer *d, bool at_end, struct qtr_text *out, struct qtr_error *err) {
  bool each_byte = d->tokenizer->decoder.kind == QTR_DECODE_PIECES;
  enum qtr_status status = QTR_OK;
  while (d->n_pending > 0 && !status) {
    bool valid;
    size_t n = qtr_utf8_step(d->pending, d->n_pending, &valid);
    if (n == 0 && !at_end) break;
    if (n == 0) n = d->n_pending;
    if (!valid && each_byte) n = 1;
    if (d->tokenizer->decoder.strip_pieces_only) d->at_start = false;
    status = valid ? emit(d, (const char *)d->pending, n, out, err) : emit(d, replacement, 3, out, err);
    d->n_pending -= n;
    memmove(d->pending, d->pending + n, d->n_pending);
  }
  return status;
}

static enum qtr_status push_bytes(struct qtr_detokenizer *d, const char *bytes, size_t len, struct qtr_text *out,
                                  struct qtr_error *err) {
  enum qtr_status status = QTR_OK;
  for (size_t i = 0; i < len && !status;) {
    if (d->n_pending == 0) {
      size_t n = qtr_utf8_valid_prefix(bytes + i, len - i);
      status = emit(d, bytes + i, n, out, err);
      i += n;
      if (i == len || status) break;
    }
    d->pending[d->n_pending++] = (uint8_t)bytes[i++];
    status = settle(d, false, out, err);
  }
  return status;
}

/* The first token under Metaspace: its marks go, instead of becoming spaces. */
static enum qtr_status push_first(struct qtr_detokenizer *d, int32_t id, struct qtr_text *out, struct qtr_error *err) {
  const char *mark = d->tokenizer->decoder.mark;
  size_t len, n_mark = strlen(mark);
  const char *text = qtr_vocab_text(&d->tokenizer->vocab, id, &len);
  enum qtr_status status = QTR_OK;
  d->at_start = false;
  for (size_t i = 0; i < len && !status;) {
    const char *hit = qtr_text_find(text + i, len - i, mark, n_mark);
    size_t end = hit ? (size_t)(hit - text) : len;
    status = qtr_text_append(out, text + i, end - i, err);
    i = end + n_mark;
  }
  return status;
}

enum qtr_status qtr_detokenizer_push(struct qtr_detokenizer *d, int32_t id, struct qtr_text *out, struct qtr_error *err) {
  const struct qtr_tokenizer *t = d->tokenizer;
  if (id < 0 || id >= t->n_ids || !qtr_vocab_has(&t->vocab, id)) return QTR_OK;
  if (d->skip_special && qtr_tokenizer_is_special(t, id)) return QTR_OK;
  if (t->byte_value && t->byte_value[id] >= 0) {
    d->pending[d->n_pending++] = (uint8_t)t->byte_value[id];
    return settle(d, false, out, err);
  }
  const char *bytes = t->decoded.data + t->decoded_at[id];
  size_t len = t->decoded_at[id + 1] - t->decoded_at[id];
  if (t->decoder.kind == QTR_DECODE_BYTE_LEVEL) return push_bytes(d, bytes, len, out, err);
  enum qtr_status status = settle(d, true, out, err);
  if (status) return status;
  if (t->decoder.kind == QTR_DECODE_SPACED) {
    if (!d->at_start) status = qtr_text_append(out, " ", 1, err);
    d->at_start = false;
    return status ? status : qtr_text_append(out, bytes, len, err);
  }
  return d->at_start && t->decoder.mark[0] ? push_first(d, id, out, err) : emit(d, bytes, len, out, err);
}

enum qtr_status qtr_detokenizer_end(struct qtr_detokenizer *d, struct qtr_text *out, struct qtr_error *err) {
  return settle(d, true, out, err);
}

enum qtr_status qtr_tokenizer_decode(const struct qtr_tokenizer *tokenizer, const int32_t *ids, size_t n_ids,
                                     bool skip_special, char **text, size_t *len, struct qtr_error *err) {
  struct qtr_detokenizer d;
  struct qtr_text out = {0};
  *text = NULL;
  *len = 0;
  qtr_detokenizer_init(&d, tokenizer, skip_special);
  enum qtr_status status = qtr_text_append(&out, "", 0, err);
  for (size_t i = 0; i < n_ids && !status; i++) status = qtr_detokenizer_push(&d, ids[i], &out, err);
  if (!status) status = qtr_detokenizer_end(&d, &out, err);
  if (status) {
    qtr_text_free(&out);
    return status;
  }
  *text = out.data;
  *len = out.len;
  return QTR_OK;
}
