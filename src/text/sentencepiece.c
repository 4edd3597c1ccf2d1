/* sentencepiece.c - reads SentencePiece tokenizer.model files (protobuf) whose model is BPE. Pieces become tokens; a merge
 * is every cut of a piece into two pieces, ranked by the score of the whole, equal scores alike, so that the engine of bpe.c
 * does what SentencePiece does. Refused by name: unigram, word and char models, normalisation charts (identity is all that
 * Llama models use), unused pieces, whitespace as suffix. */
#include "base/checked.h"
#include "base/status.h"
#include "text/tokenizer_impl.h"
#include "text/unicode.h"

#include <stdlib.h>
#include <string.h>

/* Cutting a piece costs its length squared; real models stay below 10^8 together. */
#define MAX_CUT_WORK ((uint64_t)1 << 33)
enum { ROOM_FOR_ADDED = 65536 }; /* ids after the pieces that configuration files may give to added tokens */
#define SPACE_MARK "\xe2\x96\x81"

enum piece_type { NORMAL = 1, UNKNOWN = 2, CONTROL = 3, USER_DEFINED = 4, UNUSED = 5, BYTE = 6 };

struct reader {
  const uint8_t *at, *end;
};

struct field {
  uint32_t number;
  uint32_t wire;       /* 0 varint, 1 eight bytes, 2 bytes, 5 four bytes */
  uint64_t value;      /* varint or fixed */
  struct reader bytes; /* wire 2 */
};

struct piece {
  struct reader text;
  float score;
  uint64_t type;
};

struct model {
  struct piece *pieces; /* (n_pieces) */
  size_t n_pieces, capacity;
  uint64_t model_type;
  bool whitespace_as_suffix, byte_fallback;
  int32_t unk, bos, eos;
  bool has_charsmap, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces;
};

/* ---- protobuf ------------------------------------------------------------------------------------ */

static bool read_varint(struct reader *r, uint64_t *value) {
  *value = 0;
  for (unsigned shift = 0; shift < 64 && r->at < r->end; shift += 7) {
    uint8_t byte = *r->at++;
    *value |= (uint64_t)(byte & 0x7f) << shift;
    if (byte < 0x80) return true;
  }
  return false;
}

static bool read_fixed(struct reader *r, size_t n, uint64_t *value) {
  if ((size_t)(r->end - r->at) < n) return false;
  *value = 0;
  for (size_t i = 0; i < n; i++) *value |= (uint64_t)r->at[i] << (8 * i);
  r->at += n;
  return true;
}

/* The next field; false at a truncated or impossible one. */
static bool read_field(struct reader *r, struct field *field) {
  uint64_t key, len;
  if (!read_varint(r, &key) || key >> 3 == 0 || key >> 3 > UINT32_MAX) return false;
  *field = (struct field){.number = (uint32_t)(key >> 3), .wire = (uint32_t)(key & 7)};
  if (field->wire == 0) return read_varint(r, &field->value);
  if (field->wire == 1) return read_fixed(r, 8, &field->value);
  if (field->wire == 5) return read_fixed(r, 4, &field->value);
  if (field->wire != 2 || !read_varint(r, &len) || len > (uint64_t)(r->end - r->at)) return false;
  field->bytes = (struct reader){r->at, r->at + len};
  r->at += len;
  return true;
}

static enum qtr_status truncated(struct qtr_error *err) {
  return qtr_fail(err, QTR_ERR_FORMAT, "truncated, or not a SentencePiece model");
}

static enum qtr_status read_piece(struct reader r, struct model *model, struct qtr_error *err) {
  struct piece piece = {.text = {r.at, r.at}, .type = NORMAL};
  struct field field;
  while (r.at < r.end) {
    if (!read_field(&r, &field)) return truncated(err);
    if (field.number == 1 && field.wire == 2) piece.text = field.bytes;
    if (field.number == 3 && field.wire == 0) piece.type = field.value;
    if (field.number == 2 && field.wire == 5) {
      uint32_t bits = (uint32_t)field.value;
      memcpy(&piece.score, &bits, sizeof bits);
    }
  }
  if (piece.score != piece.score)
    return qtr_fail(err, QTR_ERR_FORMAT, "piece %zu: the score is not a number", model->n_pieces);
  if (model->n_pieces == QTR_VOCAB_MAX_TOKENS) {
    return qtr_fail(err, QTR_ERR_FORMAT, "more than %d pieces", QTR_VOCAB_MAX_TOKENS);
  }
  if (model->n_pieces == model->capacity) {
    size_t capacity = QTR_MAX((size_t)1024, model->capacity * 2);
    struct piece *pieces = realloc(model->pieces, capacity * sizeof *pieces);
    if (!pieces) return qtr_fail_memory(err, "pieces", capacity * sizeof *pieces);
    model->pieces = pieces;
    model->capacity = capacity;
  }
  model->pieces[model->n_pieces++] = piece;
  return QTR_OK;
}

static enum qtr_status read_trainer(struct reader r, struct model *model, struct qtr_error *err) {
  struct field field;
  while (r.at < r.end) {
    if (!read_field(&r, &field)) return truncated(err);
    if (field.wire != 0) continue;
    int32_t id = (int32_t)(uint32_t)field.value; /* negative ids come as 64-bit varints */
    switch (field.number) {
      case 3: model->model_type = field.value; break;
      case 24: model->whitespace_as_suffix = field.value != 0; break;
      case 35: model->byte_fallback = field.value != 0; break;
      case 40: model->unk = id; break;
      case 41: model->bos = id; break;
      case 42: model->eos = id; break;
      default: break;
    }
  }
  return QTR_OK;
}

static enum qtr_status read_normalizer(struct reader r, struct model *model, struct qtr_error *err) {
  struct field field;
  while (r.at < r.end) {
    if (!read_field(&r, &field)) return truncated(err);
    if (field.number == 2 && field.wire == 2 && field.bytes.end > field.bytes.at) model->has_charsmap = true;
    if (field.wire != 0) continue;
    if (field.number == 3) model->add_dummy_prefix = field.value != 0;
    if (field.number == 4) model->remove_extra_whitespaces = field.value != 0;
    if (field.number == 5) model->escape_whitespaces = field.value != 0;
  }
  return QTR_OK;
}

static enum qtr_status read_model(struct reader r, struct model *model, struct qtr_error *err) {
  struct field field;
  enum qtr_status status = QTR_OK;
  while (r.at < r.end && !status) {
    if (!read_field(&r, &field)) return truncated(err);
    if (field.wire != 2) continue;
    if (field.number == 1) status = read_piece(field.bytes, model, err);
    if (field.number == 2) status = read_trainer(field.bytes, model, err);
    if (field.number == 3) status = read_normalizer(field.bytes, model, err);
  }
  if (!status && model->n_pieces == 0) return qtr_fail(err, QTR_ERR_FORMAT, "no pieces: not a SentencePiece model");
  return status;
}

/* ---- tokenizer ----------------------------------------------------------------------------------- */

static enum qtr_status check(const struct model *model, struct qtr_error *err) {
  static const char *const names[] = {"unknown", "unigram", "BPE", "word", "char"};
  if (model->model_type != 2) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "a SentencePiece %s model is not supported, only BPE is",
                    model->model_type < 5 ? names[model->model_type] : "unknown");
  }
  if (model->has_charsmap) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED,
                    "a SentencePiece model with a normalisation chart is not supported; convert it to tokenizer.json");
  }
  if (model->whitespace_as_suffix) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "a SentencePiece model with whitespace as suffix is not supported");
  }
  return QTR_OK;
}

static enum qtr_status add_pieces(const struct model *model, struct qtr_tokenizer *t, struct qtr_error *err) {
  enum qtr_status status = QTR_OK;
  for (size_t i = 0; i < model->n_pieces && !status; i++) {
    const struct piece *piece = &model->pieces[i];
    const char *text = (const char *)piece->text.at;
    size_t len = (size_t)(piece->text.end - piece->text.at);
    uint32_t flags = 0;
    switch (piece->type) {
      case NORMAL: flags = QTR_TOKEN_MODEL; break;
      case USER_DEFINED: flags = QTR_TOKEN_MODEL | QTR_TOKEN_ADDED | QTR_TOKEN_NORMALIZED; break;
      case UNKNOWN:
      case CONTROL: flags = QTR_TOKEN_ADDED | QTR_TOKEN_SPECIAL; break;
      case BYTE: break;
      default:
        return qtr_fail(err, QTR_ERR_UNSUPPORTED, "piece %zu has type %llu, which is not supported", i,
                        (unsigned long long)piece->type);
    }
    if (len == 0 || qtr_utf8_valid_prefix(text, len) < len) {
      return qtr_fail(err, QTR_ERR_FORMAT, "piece %zu is empty or not valid UTF-8", i);
    }
    if (piece->type == BYTE && qtr_byte_token(text, len) < 0) {
      return qtr_fail(err, QTR_ERR_FORMAT, "piece %zu is a byte but not named <0x00> to <0xFF>", i);
    }
    status = qtr_vocab_add(&t->vocab, (int64_t)i, text, len, flags, err);
  }
  return status;
}

/* Characters that are no piece but part of one take part in merging under ids of their own, well behind the public ones. */
static enum qtr_status add_characters(const struct model *model, struct qtr_tokenizer *t, struct qtr_error *err) {
  enum qtr_status status = QTR_OK;
  for (size_t i = 0; i < model->n_pieces && !status; i++) {
    if (model->pieces[i].type != NORMAL && model->pieces[i].type != USER_DEFINED) continue;
    const char *text = (const char *)model->pieces[i].text.at;
    size_t len = (size_t)(model->pieces[i].text.end - model->pieces[i].text.at), n_bytes;
    for (size_t k = 0; k < len && !status; k += n_bytes) {
      n_bytes = qtr_utf8_length((uint8_t)text[k]);
      if (qtr_vocab_find(&t->vocab, text + k, n_bytes) >= 0) continue;
      if (t->first_internal < 0) t->first_internal = (int32_t)model->n_pieces + ROOM_FOR_ADDED;
      int32_t id = QTR_MAX(t->first_internal, t->vocab.n_tokens);
      status = qtr_vocab_add(&t->vocab, id, text + k, n_bytes, QTR_TOKEN_MODEL, err);
    }
  }
  return status;
}

struct ranked {
  float score;
  int32_t id;
};

static int by_score(const void *a, const void *b) {
  const struct ranked *x = a, *y = b;
  if (x->score != y->score) return x->score > y->score ? -1 : 1;
  return x->id < y->id ? -1 : x->id > y->id;
}

static enum qtr_status add_merges(const struct model *model, struct qtr_tokenizer *t, struct qtr_error *err) {
  struct ranked *order = malloc(model->n_pieces * sizeof *order); /* one piece at least, see read_model */
  if (!order) return qtr_fail_memory(err, "merges", model->n_pieces * sizeof *order);
  size_t n = 0;
  uint64_t work = 0;
  for (size_t i = 0; i < model->n_pieces; i++) {
    uint64_t len = (uint64_t)(model->pieces[i].text.end - model->pieces[i].text.at);
    if (model->pieces[i].type != NORMAL && model->pieces[i].type != USER_DEFINED) continue;
    order[n++] = (struct ranked){model->pieces[i].score, (int32_t)i};
    work += len * len;
  }
  enum qtr_status status = QTR_OK;
  if (work > MAX_CUT_WORK) status = qtr_fail(err, QTR_ERR_FORMAT, "the pieces are too long");
  qsort(order, n, sizeof *order, by_score);
  uint32_t rank = 0;
  for (size_t i = 0; i < n && !status; i++) {
    if (i > 0 && order[i].score != order[i - 1].score) rank++;
    size_t len;
    const char *text = qtr_vocab_text(&t->vocab, order[i].id, &len);
    for (size_t cut = qtr_utf8_length((uint8_t)text[0]); cut < len && !status; cut += qtr_utf8_length((uint8_t)text[cut])) {
      struct qtr_merge merge = {.left = qtr_vocab_find_model(&t->vocab, text, cut),
                                .right = qtr_vocab_find_model(&t->vocab, text + cut, len - cut),
                                .rank = rank,
                                .id = order[i].id};
      if (merge.left >= 0 && merge.right >= 0) status = qtr_bpe_add_merge(&t->bpe, merge, err);
    }
  }
  free(order);
  return status;
}

static enum qtr_status set_up_text(const struct model *model, struct qtr_tokenizer *t, struct qtr_error *err) {
  enum qtr_status status = QTR_OK;
  if (model->remove_extra_whitespaces) status = qtr_normalizer_add(&t->normalizer, QTR_NORMALIZE_SQUEEZE, NULL, NULL, err);
  if (!status && model->add_dummy_prefix) status = qtr_normalizer_add(&t->normalizer, QTR_NORMALIZE_PREPEND, NULL, " ", err);
  if (!status && model->escape_whitespaces) {
    status = qtr_normalizer_add(&t->normalizer, QTR_NORMALIZE_REPLACE, " ", SPACE_MARK, err);
  }
  t->decoder.kind = QTR_DECODE_PIECES;
  t->decoder.byte_fallback = t->decoder.strip_pieces_only = true;
  t->decoder.strip_repeats = model->remove_extra_whitespaces;
  if (model->add_dummy_prefix || model->remove_extra_whitespaces) memcpy(t->decoder.strip, " ", 2);
  return status ? status : qtr_normalizer_add(&t->decoder.replace, QTR_NORMALIZE_REPLACE, SPACE_MARK, " ", err);
}

/* -1 for an id that no control piece has. */
static int32_t control_id(const struct model *model, int32_t id) {
  return id >= 0 && (size_t)id < model->n_pieces && model->pieces[id].type == CONTROL ? id : -1;
}

enum qtr_status qtr_tokenizer_read_sentencepiece(const char *data, size_t n_bytes, const char *name, struct qtr_tokenizer *t,
                                                 struct qtr_error *err) {
  struct model model = {.model_type = 1, /* the format's defaults */
                        .unk = 0,
                        .bos = 1,
                        .eos = 2,
                        .add_dummy_prefix = true,
                        .remove_extra_whitespaces = true,
                        .escape_whitespaces = true};
  struct reader r = {(const uint8_t *)data, (const uint8_t *)data + n_bytes};
  enum qtr_status status = read_model(r, &model, err);
  if (!status) status = check(&model, err);
  if (!status) status = add_pieces(&model, t, err);
  if (status) goto done;
  for (size_t i = 0; i < model.n_pieces; i++) {
    if (model.pieces[i].type == UNKNOWN) t->bpe.unk = (int32_t)i;
  }
  t->bos = control_id(&model, model.bos);
  t->eos = control_id(&model, model.eos);
  t->add_bos = 1; /* as Llama's tokenizer class does; the file itself is silent */
  t->added_as_is = true;
  t->bpe.fuse_unk = t->bpe.fuse_unk_last = true;
  t->bpe.byte_fallback = model.byte_fallback;
  status = add_characters(&model, t, err);
  if (!status) status = add_merges(&model, t, err);
  if (!status) status = set_up_text(&model, t, err);
done:
  free(model.pieces);
  if (status && err) (void)qtr_error_prefix(err, "%s", name);
  return status;
}
