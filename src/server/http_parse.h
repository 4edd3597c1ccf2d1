/* http_parse.h - HTTP/1.0 and 1.1 requests from bytes (RFC 9112): pure functions, no allocation, nothing shared. Strict
 * where leniency is what request smuggling lives on: CRLF only, no folded lines, no space before a colon, one length. */
#ifndef QTR_SERVER_HTTP_PARSE_H
#define QTR_SERVER_HTTP_PARSE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define QTR_HTTP_MAX_HEAD ((size_t)32 << 10) /* request line and headers */
#define QTR_HTTP_MAX_TARGET 4096
#define QTR_HTTP_MAX_HEADERS 100

struct qtr_http_slice {
  const char *data;
  size_t len;
};

struct qtr_http_head {
  struct qtr_http_slice method, path, query; /* path begins with '/'; query without '?' */
  int minor;                                 /* HTTP/1.minor */
  struct {
    struct qtr_http_slice name, value;
  } header[QTR_HTTP_MAX_HEADERS];
  size_t n_headers;
  uint64_t content_length; /* 0 without a body; not known when chunked */
  bool chunked, keep_alive, expect_continue;
};

/* Reads a head that starts at data. Returns its length with the empty line; 0 when more bytes are needed (at most
 * QTR_HTTP_MAX_HEAD in all); else minus the HTTP status to refuse it with: 400, 414, 417, 431, 501, 505. Slices point into
 * data. */
long qtr_http_parse_head(const char *data, size_t len, struct qtr_http_head *head);

/* The first header of this name (any case); false when there is none. */
bool qtr_http_header(const struct qtr_http_head *head, const char *name, struct qtr_http_slice *value);
bool qtr_http_is(struct qtr_http_slice slice, const char *text); /* equal, case counts */

/* Decoder of a chunked body; start from {0}. */
struct qtr_http_chunked {
  int state;
  uint64_t left;    /* bytes of the running chunk */
  size_t n_line;    /* length of the running line, bounded */
  size_t n_trailer; /* bytes of trailers, bounded */
};

/* Takes in[0 … n); *n_used of them were read and *n_out bytes of body written to out, which has room for n. Returns 1 at the
 * end of the body, 0 when it goes on, -400 when it is malformed. */
int qtr_http_dechunk(struct qtr_http_chunked *d, const char *in, size_t n, size_t *n_used, char *out, size_t *n_out);

#endif
