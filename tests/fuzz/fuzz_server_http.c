/* fuzz_server_http.c - input: what a client sends. Heads are parsed, bodies dechunked whole and byte by byte: both ways must
 * agree, stay inside their input, and end. */
#include "server/http_parse.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void inside(const char *text, size_t len, struct qtr_http_slice s) {
  if (s.data < text || s.len > len || s.data + s.len > text + len) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  const char *text = (const char *)data;
  struct qtr_http_head head;
  long used = qtr_http_parse_head(text, size, &head);
  if (used > (long)size || (used < 0 && (used > -400 || used < -599))) abort();
  size_t at = 0;
  if (used > 0) {
    inside(text, size, head.method);
    inside(text, size, head.path);
    inside(text, size, head.query);
    for (size_t i = 0; i < head.n_headers; i++) {
      inside(text, size, head.header[i].name);
      inside(text, size, head.header[i].value);
    }
    /* every shorter input asks for more */
    struct qtr_http_head again;
    if (size < 4096 && qtr_http_parse_head(text, (size_t)used - 1, &again) != 0) abort();
    at = (size_t)used;
  }
  size_t n = size - at, whole_used = 0, whole_out = 0, part_used = 0, part_out = 0;
  char *whole = malloc(n + 1), *parts = malloc(n + 1);
  if (whole && parts) {
    struct qtr_http_chunked a = {0}, b = {0};
    int done = qtr_http_dechunk(&a, text + at, n, &whole_used, whole, &whole_out), part_done = 0;
    while (part_used < n && !part_done) {
      size_t one_used = 0, one_out = 0;
      part_done = qtr_http_dechunk(&b, text + at + part_used, 1, &one_used, parts + part_out, &one_out);
      part_used += one_used;
      part_out += one_out;
    }
    if (n > 0 && done != part_done) abort();
    if (done >= 0 && n > 0 && (whole_used != part_used || whole_out != part_out || memcmp(whole, parts, whole_out) != 0))
      abort();
  }
  free(whole);
  free(parts);
  return 0;
}
