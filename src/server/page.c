/* page.c - answers with the page's files (page.h). Browsers ask again each time and are told 304 while nothing has changed
 * (RFC 9110, 13.1.2), so that a new binary's page is seen at once. The policy allows the page its own files and its own
 * server, nothing else: even a hole in its Markdown could neither run a script nor send anything away. */
#include "server/page.h"

#include "server/server_internal.h"

#include <stdio.h>
#include <string.h>

static const char policy[] =
    "Content-Security-Policy: default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'\r\n"
    "X-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\nCache-Control: no-cache\r\n";

/* One of the tags in If-None-Match is this one, weak or not. */
static bool has_tag(struct qtr_http_slice list, const char *tag) {
  size_t n = strlen(tag);
  if (qtr_http_is(list, "*")) return true;
  for (size_t i = 0; i + n <= list.len; i++) {
    if (memcmp(list.data + i, tag, n) == 0) return true;
  }
  return false;
}

int qtr_page_get(struct qtr_server *s, struct qtr_http_conn *conn, const char *id) {
  const struct qtr_http_head *head = qtr_http_head(conn);
  const struct qtr_page_file *file = NULL;
  for (size_t i = 0; i < qtr_n_page_files && !file; i++) {
    if (qtr_http_is(head->path, qtr_page_file[i].path)) file = &qtr_page_file[i];
  }
  if (!file) {
    struct qtr_api_error err;
    (void)qtr_api_fail(&err, 404, NULL, "the page has no file %.*s", head->path.len < 200 ? (int)head->path.len : 200,
                       head->path.data);
    qtr_send_error(s, conn, &err, id, NULL);
    return 404;
  }
  struct qtr_http_slice tags;
  bool same = qtr_http_header(head, "if-none-match", &tags) && has_tag(tags, file->etag);
  char common[512], headers[1200];
  (void)snprintf(headers, sizeof headers, "%s%sETag: %s\r\n", qtr_common_headers(s, id, common, sizeof common), policy,
                 file->etag);
  if (same)
    qtr_http_reply(conn, 304, NULL, headers, NULL, 0);
  else
    qtr_http_reply(conn, 200, file->type, headers, (const char *)file->data, file->len);
  return same ? 304 : 200;
}
