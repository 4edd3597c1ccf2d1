/* fuzz_load_response.c - input: what a server sends. Read whole and in pieces; both ways must give the same answer and the
 * same events, each of which is read as a completion's; where the quick way knows one, the thorough way says the same. */
#include "load/response.h"
#include "load/run.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct seen {
  uint64_t hash;
  size_t n;
};

static void on_event(void *arg, const char *data, size_t len) {
  struct seen *s = arg;
  struct qtr_load_chunk chunk, tree;
  if (qtr_load_chunk_read(data, len, &chunk) && (chunk.n_output < -1 || strlen(chunk.error) >= sizeof chunk.error)) abort();
  if (qtr_load_chunk_read_plain(data, len, &chunk) &&
      (!qtr_load_chunk_read_tree(data, len, &tree) || chunk.end != tree.end || chunk.token != tree.token ||
       chunk.n_input != tree.n_input || chunk.n_output != tree.n_output || strcmp(chunk.error, tree.error) != 0))
    abort();
  for (size_t i = 0; i < len; i++) s->hash = (s->hash ^ (unsigned char)data[i]) * 0x100000001b3u;
  s->hash = (s->hash ^ len) * 0x100000001b3u;
  s->n++;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  struct qtr_response a = {0}, b = {0};
  struct seen x = {0}, y = {0};
  const char *text = (const char *)data;
  int whole = 0, parts = 0;
  qtr_response_begin(&a);
  qtr_response_begin(&b);
  if (size > 0) whole = qtr_response_feed(&a, text, size, on_event, &x);
  size_t step = size > 0 ? data[size - 1] % 7 + 1u : 1;
  for (size_t at = 0; at < size && parts == 0; at += step)
    parts = qtr_response_feed(&b, text + at, size - at < step ? size - at : step, on_event, &y);
  if (whole != parts) abort();
  if (whole >= 0 && (a.status != b.status || x.n != y.n || x.hash != y.hash)) abort();
  if (whole == 0 && qtr_response_close(&a) != qtr_response_close(&b)) abort();
  qtr_response_free(&a);
  qtr_response_free(&b);
  return 0;
}
