/* http_parse.c - request heads and chunked bodies (http_parse.h, RFC 9112). */
#include "server/http_parse.h"

#include <string.h>
#include <strings.h>

/* RFC 9110 5.6.2: what names and methods are made of. */
static bool is_token_char(unsigned char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
         (c != 0 && strchr("!#$%&'*+-.^_`|~", c) != NULL);
}

bool qtr_http_is(struct qtr_http_slice slice, const char *text) {
  return slice.len == strlen(text) && memcmp(slice.data, text, slice.len) == 0;
}

static bool is_word(struct qtr_http_slice slice, const char *word) { /* any case */
  return slice.len == strlen(word) && strncasecmp(slice.data, word, slice.len) == 0;
}

bool qtr_http_header(const struct qtr_http_head *head, const char *name, struct qtr_http_slice *value) {
  for (size_t i = 0; i < head->n_headers; i++) {
    if (!is_word(head->header[i].name, name)) continue;
    *value = head->header[i].value;
    return true;
  }
  return false;
}

/* Method SP target SP HTTP/1.x; line (len) without its CRLF. Returns 0 or minus a status. */
static int parse_request_line(const char *line, size_t len, struct qtr_http_head *h) {
  size_t at = 0;
  while (at < len && is_token_char((unsigned char)line[at])) at++;
  if (at == 0 || at > 32 || at == len || line[at] != ' ') return -400;
  h->method = (struct qtr_http_slice){line, at++};
  const char *target = line + at;
  const char *space = memchr(target, ' ', len - at);
  if (!space) return -400;
  size_t n = (size_t)(space - target);
  if (n > QTR_HTTP_MAX_TARGET) return -414;
  for (size_t i = 0; i < n; i++) {
    if ((unsigned char)target[i] <= ' ' || (unsigned char)target[i] >= 0x7f) return -400;
  }
  const char *version = space + 1;
  size_t n_version = len - at - n - 1;
  if (n_version != 8 || memcmp(version, "HTTP/", 5) != 0 || version[6] != '.') return -400;
  if (version[5] != '1' || version[7] < '0' || version[7] > '9') return -505;
  h->minor = version[7] == '0' ? 0 : 1; /* a later 1.x is answered as 1.1 */
  if (n > 7 &&
      strncasecmp(target, "http://", 7) == 0) { /* the absolute form of proxies: the authority is not ours to check */
    const char *slash = memchr(target + 7, '/', n - 7);
    if (!slash) return -400;
    n -= (size_t)(slash - target);
    target = slash;
  }
  if (n == 0 || (target[0] != '/' && !(n == 1 && target[0] == '*'))) return -400;
  const char *mark = memchr(target, '?', n);
  h->path = (struct qtr_http_slice){target, mark ? (size_t)(mark - target) : n};
  h->query = mark ? (struct qtr_http_slice){mark + 1, n - h->path.len - 1} : (struct qtr_http_slice){target + n, 0};
  return 0;
}

static int parse_header(const char *line, size_t len, struct qtr_http_head *h) {
  size_t n = 0;
  while (n < len && is_token_char((unsigned char)line[n])) n++;
  if (n == 0 || n == len || line[n] != ':') return -400; /* also a folded line and a space before the colon */
  if (h->n_headers == QTR_HTTP_MAX_HEADERS) return -431;
  const char *value = line + n + 1, *end = line + len;
  while (value < end && (*value == ' ' || *value == '\t')) value++;
  while (end > value && (end[-1] == ' ' || end[-1] == '\t')) end--;
  for (const char *p = value; p < end; p++) {
    if (((unsigned char)*p < ' ' && *p != '\t') || *p == 0x7f) return -400;
  }
  h->header[h->n_headers].name = (struct qtr_http_slice){line, n};
  h->header[h->n_headers++].value = (struct qtr_http_slice){value, (size_t)(end - value)};
  return 0;
}

/* Does a comma-separated list hold this word? */
static bool list_has(struct qtr_http_slice list, const char *word) {
  size_t at = 0;
  while (at < list.len) {
    const char *item = list.data + at, *comma = memchr(item, ',', list.len - at);
    size_t n = comma ? (size_t)(comma - item) : list.len - at, len = n;
    at += n + 1;
    while (len > 0 && (*item == ' ' || *item == '\t')) item++, len--;
    while (len > 0 && (item[len - 1] == ' ' || item[len - 1] == '\t')) len--;
    if (is_word((struct qtr_http_slice){item, len}, word)) return true;
  }
  return false;
}

/* What the headers say about the body and the connection. */
static int interpret(struct qtr_http_head *h) {
  bool has_length = false, has_host = false;
  h->keep_alive = h->minor >= 1;
  for (size_t i = 0; i < h->n_headers; i++) {
    struct qtr_http_slice name = h->header[i].name, value = h->header[i].value;
    if (is_word(name, "content-length")) {
      uint64_t n = 0;
      if (value.len == 0 || value.len > 18) return value.len == 0 ? -400 : -413;
      for (size_t k = 0; k < value.len; k++) {
        if (value.data[k] < '0' || value.data[k] > '9') return -400;
        n = n * 10 + (uint64_t)(value.data[k] - '0');
      }
      if (has_length && n != h->content_length) return -400;
      has_length = true;
      h->content_length = n;
    } else if (is_word(name, "transfer-encoding")) {
      if (h->chunked || h->minor == 0) return -400;
      if (!is_word(value, "chunked")) return -501;
      h->chunked = true;
    } else if (is_word(name, "connection")) {
      if (list_has(value, "close"))
        h->keep_alive = false;
      else if (h->minor == 0 && list_has(value, "keep-alive"))
        h->keep_alive = true;
    } else if (is_word(name, "expect")) {
      if (!is_word(value, "100-continue")) return -417;
      h->expect_continue = h->minor >= 1;
    } else if (is_word(name, "host")) {
      if (has_host) return -400;
      has_host = true;
    }
  }
  if (h->chunked && has_length) return -400;
  return h->minor >= 1 && !has_host ? -400 : 0;
}

long qtr_http_parse_head(const char *data, size_t len, struct qtr_http_head *h) {
  *h = (struct qtr_http_head){0};
  size_t limit = len < QTR_HTTP_MAX_HEAD ? len : QTR_HTTP_MAX_HEAD, at = 0;
  if (limit >= 2 && data[0] == '\r' && data[1] == '\n') at = 2; /* one empty line before a request is let pass */
  for (bool first = true;; first = false) {
    const char *line = data + at, *newline = memchr(line, '\n', limit - at);
    if (!newline) {
      if (len < QTR_HTTP_MAX_HEAD) return 0;
      return first ? -414 : -431;
    }
    size_t n = (size_t)(newline - line);
    if (n == 0 || line[n - 1] != '\r') return -400;
    n--;
    at += n + 2;
    if (!first && n == 0) break;
    int wrong = first ? parse_request_line(line, n, h) : parse_header(line, n, h);
    if (wrong) return wrong;
  }
  int wrong = interpret(h);
  return wrong ? wrong : (long)at;
}

/* ---- chunked bodies ------------------------------------------------------------------------------ */

enum { SIZE_FIRST, SIZE, EXTENSION, SIZE_LF, DATA, DATA_CR, DATA_LF, TRAILER_START, TRAILER, TRAILER_LF, LAST_LF, DONE };

static int hex_value(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

int qtr_http_dechunk(struct qtr_http_chunked *d, const char *in, size_t n, size_t *n_used, char *out, size_t *n_out) {
  size_t i = 0;
  *n_out = 0;
  while (i < n && d->state != DONE) {
    if (d->state == DATA) {
      size_t take = n - i < d->left ? n - i : (size_t)d->left;
      memcpy(out + *n_out, in + i, take);
      *n_out += take;
      i += take;
      d->left -= take;
      if (d->left == 0) d->state = DATA_CR;
      continue;
    }
    char c = in[i++];
    switch (d->state) {
      case SIZE_FIRST:
        d->left = 0;
        d->n_line = 0;
        if (hex_value(c) < 0) return -400;
        d->state = SIZE;
        /* fall through */
      case SIZE:
        if (hex_value(c) >= 0) {
          if (++d->n_line > 8) return -400; /* no chunk of 4 GiB */
          d->left = d->left * 16 + (uint64_t)hex_value(c);
        } else if (c == '\r') {
          d->state = SIZE_LF;
        } else if (c == ';') {
          d->n_line = 0;
          d->state = EXTENSION;
        } else {
          return -400;
        }
        break;
      case EXTENSION: /* without meaning here */
        if (c == '\r')
          d->state = SIZE_LF;
        else if (c == '\n' || ++d->n_line > 256)
          return -400;
        break;
      case SIZE_LF:
        if (c != '\n') return -400;
        d->state = d->left > 0 ? DATA : TRAILER_START;
        break;
      case DATA_CR:
        if (c != '\r') return -400;
        d->state = DATA_LF;
        break;
      case DATA_LF:
        if (c != '\n') return -400;
        d->state = SIZE_FIRST;
        break;
      case TRAILER_START: d->state = c == '\r' ? LAST_LF : TRAILER; break;
      case TRAILER:
        if (++d->n_trailer > 4096 || c == '\n') return -400;
        if (c == '\r') d->state = TRAILER_LF;
        break;
      case TRAILER_LF:
        if (c != '\n') return -400;
        d->state = TRAILER_START;
        break;
      default: /* LAST_LF */
        if (c != '\n') return -400;
        d->state = DONE;
    }
  }
  *n_used = i;
  return d->state == DONE;
}
