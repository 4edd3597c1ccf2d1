/* tokenizer.json, a NUL byte, then a text to encode. */
#include "text_tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  const uint8_t *end = size ? memchr(data, 0, size) : NULL;
  size_t n_json = end ? (size_t)(end - data) : size, n_text = end ? size - n_json - 1 : 0;
  struct qtr_tokenizer *t;
  struct qtr_error err;
  if (n_text > 4096 || qtr_tokenizer_open_json((const char *)data, n_json, &t, &err)) return 0;
  fuzz_tokenizer(t, end ? (const char *)end + 1 : "", n_text);
  qtr_tokenizer_close(t);
  return 0;
}
