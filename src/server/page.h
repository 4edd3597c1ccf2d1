/* page.h - the web page at `/`: files of src/server/page, put into the binary by cmake/embed.cmake. Static text without
 * secrets, so it is served without a key; what it then asks of the API needs one like any other client. */
#ifndef QTR_SERVER_PAGE_H
#define QTR_SERVER_PAGE_H

#include <stddef.h>

struct qtr_page_file {
  const char *path, *type, *etag; /* "/page/app.js", "text/javascript; charset=utf-8", "\"0123456789abcdef\"" */
  const unsigned char *data;      /* (len) */
  size_t len;
};
extern const struct qtr_page_file qtr_page_file[]; /* (qtr_n_page_files) */
extern const size_t qtr_n_page_files;

struct qtr_server;
struct qtr_http_conn;
/* Answers GET / and GET /page/NAME. Returns the status. */
int qtr_page_get(struct qtr_server *s, struct qtr_http_conn *conn, const char *request_id);

#endif
