/* text_tokenizer.h - what both tokenizer fuzz targets do with a tokenizer that opened: encode a text in all four ways,
 * decode the ids at once and as a stream, decode ids that nobody encoded, and stop when a promise of tokenizer.h is broken.
 */
#ifndef QTR_FUZZ_TEXT_TOKENIZER_H
#define QTR_FUZZ_TEXT_TOKENIZER_H

#include "text/tokenizer_impl.h"
#include "text/unicode.h"

#include <stdlib.h>
#include <string.h>

static void require(bool promise) {
  if (!promise) abort();
}

static void fuzz_decode(const struct qtr_tokenizer *t, const int32_t *ids, size_t n, bool skip) {
  struct qtr_error err;
  char *whole;
  size_t len;
  require(qtr_tokenizer_decode(t, ids, n, skip, &whole, &len, &err) == QTR_OK);
  require(qtr_utf8_valid_prefix(whole, len) == len && whole[len] == 0);
  struct qtr_detokenizer d;
  struct qtr_text out = {0};
  qtr_detokenizer_init(&d, t, skip);
  for (size_t i = 0; i < n; i++) {
    require(qtr_detokenizer_push(&d, ids[i], &out, &err) == QTR_OK);
    require(qtr_utf8_valid_prefix(out.data, out.len) == out.len);
  }
  require(qtr_detokenizer_end(&d, &out, &err) == QTR_OK);
  require(out.len == len && (len == 0 || memcmp(out.data, whole, len) == 0));
  qtr_text_free(&out);
  free(whole);
}

static void fuzz_tokenizer(struct qtr_tokenizer *t, const char *text, size_t len) {
  struct qtr_error err;
  for (int way = 0; way < 4; way++) {
    struct qtr_encode_options options = {way & 1, way & 2};
    int32_t *ids;
    size_t n;
    if (qtr_tokenizer_encode(t, text, len, &options, &ids, &n, &err)) continue;
    for (size_t i = 0; i < n; i++) {
      size_t token_len;
      require(ids[i] >= 0 && ids[i] < qtr_tokenizer_vocab_size(t) && qtr_tokenizer_token(t, ids[i], &token_len));
    }
    fuzz_decode(t, ids, n, way & 1);
    free(ids);
  }
  int32_t wild[64];
  size_t n = len < 64 ? len : 64;
  for (size_t i = 0; i < n; i++) wild[i] = (int32_t)(signed char)text[i] + (i % 3 == 0 ? 256 : 0);
  fuzz_decode(t, wild, n, false);
  fuzz_decode(t, wild, n, true);
}

#endif
