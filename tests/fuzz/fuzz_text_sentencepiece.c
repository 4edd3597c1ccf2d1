/* One byte for the length of a text, the text, then a SentencePiece tokenizer.model. */
#include "text_tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  if (size == 0 || size - 1 < data[0]) return 0;
  struct qtr_tokenizer *t;
  struct qtr_error err;
  if (qtr_tokenizer_open_sentencepiece((const char *)data + 1 + data[0], size - 1 - data[0], &t, &err)) return 0;
  fuzz_tokenizer(t, (const char *)data + 1, data[0]);
  qtr_tokenizer_close(t);
  return 0;
}
