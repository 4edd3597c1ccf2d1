/* full_attention_heads.tsv for a model of 3 layers and 4 KV heads. What is accepted keeps the promises of heads.h. */
#include "checkpoint/heads.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  enum { LAYERS = 3, HEADS = 4, N = LAYERS * HEADS };
  double value[N];
  uint8_t streaming[N];
  struct qtr_error err;
  char *text = malloc(size ? size : 1); /* its end is where the sanitizer sees it */
  if (!text) return 0;
  if (size) memcpy(text, data, size);
  if (qtr_heads_parse(text, size, LAYERS, HEADS, value, &err)) {
    if (memchr(err.message, 0, sizeof err.message) == NULL || err.message[0] == 0) abort();
    goto done;
  }
  for (int share = 0; share <= 8; share++) {
    if (qtr_heads_choose(value, N, share / 8.0, streaming, &err)) abort();
    double most = -1, least = 2; /* of the streaming and of the others */
    for (int i = 0; i < N; i++) {
      if (!(value[i] >= 0 && value[i] <= 1) || streaming[i] > 1) abort();
      if (streaming[i]) most = fmax(most, value[i]);
      if (!streaming[i]) least = fmin(least, value[i]);
    }
    if (most > least) abort();
  }
done:
  free(text);
  return 0;
}
