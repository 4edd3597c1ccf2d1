/* routes.c - which request goes where, who may ask, and the answers that need no engine. */
#include "base/clock.h"
#include "server/page.h"
#include "server/server_internal.h"

#include <stdio.h>
#include <string.h>
#include <strings.h>

/* ---- answers ------------------------------------------------------------------------------------- */

void qtr_request_id(struct qtr_server *s, const struct qtr_http_conn *conn, char id[72]) {
  struct qtr_http_slice given;
  bool decent = qtr_http_header(qtr_http_head(conn), "x-request-id", &given) && given.len > 0 && given.len <= 64;
  for (size_t i = 0; decent && i < given.len; i++) {
    char c = given.data[i];
    decent = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '_' || c == '.';
  }
  if (decent)
    (void)snprintf(id, 72, "%.*s", (int)given.len, given.data);
  else
    (void)snprintf(id, 72, "req-%016llx", (unsigned long long)s->next_id++);
}

const char *qtr_common_headers(const struct qtr_server *s, const char *request_id, char *out, size_t n) {
  (void)snprintf(out, n, "X-Request-Id: %s\r\n%s%.200s%s", request_id,
                 s->o->cors_origin ? "Access-Control-Allow-Origin: " : "", s->o->cors_origin ? s->o->cors_origin : "",
                 s->o->cors_origin ? "\r\nVary: Origin\r\n" : "");
  return out;
}

void qtr_send_json(struct qtr_server *s, struct qtr_http_conn *conn, int status, const char *request_id,
                   const struct qtr_buffer *body) {
  char headers[512];
  qtr_http_reply(conn, status, "application/json", qtr_common_headers(s, request_id, headers, sizeof headers),
                 body->data ? body->data : "", body->len);
}

void qtr_send_error(struct qtr_server *s, struct qtr_http_conn *conn, const struct qtr_api_error *err,
                    const char *request_id, const char *extra) {
  struct qtr_buffer out = {0};
  char headers[512], all[768];
  qtr_api_error_write(err, &out);
  (void)snprintf(all, sizeof all, "%s%s", qtr_common_headers(s, request_id, headers, sizeof headers), extra ? extra : "");
  qtr_http_reply(conn, err->http, "application/json", all, out.data ? out.data : "", out.len);
  qtr_buffer_free(&out);
}

/* ---- who may ask --------------------------------------------------------------------------------- */

/* Equal, in a time that depends on the key's length only. */
static bool same_key(const char *key, struct qtr_http_slice given) {
  size_t n = strlen(key);
  volatile unsigned char different = n != given.len;
  for (size_t i = 0; i < n; i++) {
    unsigned char c = given.len > 0 ? (unsigned char)given.data[i < given.len ? i : 0] : 0;
    different = (unsigned char)(different | (c ^ (unsigned char)key[i]));
  }
  return different == 0;
}

static bool may_ask(const struct qtr_server *s, const struct qtr_http_head *head) {
  struct qtr_http_slice given = {"", 0};
  if (s->o->n_api_keys == 0) return true;
  if (qtr_http_header(head, "authorization", &given)) {
    if (given.len < 7 || memcmp(given.data, "Bearer ", 7) != 0) return false;
    given.data += 7;
    given.len -= 7;
  }
  bool yes = false;
  for (size_t i = 0; i < s->o->n_api_keys; i++) yes |= same_key(s->o->api_key[i], given);
  return yes;
}

/* ---- routes -------------------------------------------------------------------------------------- */

static void put_model(const struct qtr_server *s, struct qtr_buffer *out) {
  qtr_buffer_puts(out, "{\"id\":");
  qtr_buffer_string(out, s->o->model_name, strlen(s->o->model_name));
  qtr_buffer_printf(out, ",\"object\":\"model\",\"created\":%lld,\"owned_by\":\"quattuor\",\"max_model_len\":%d}",
                    (long long)s->created, s->info.max_model_len);
}

static int get_models(struct qtr_server *s, struct qtr_http_conn *conn, const char *id) {
  struct qtr_buffer out = {0};
  qtr_buffer_puts(&out, "{\"object\":\"list\",\"data\":[");
  put_model(s, &out);
  qtr_buffer_puts(&out, "]}");
  qtr_send_json(s, conn, 200, id, &out);
  qtr_buffer_free(&out);
  return 200;
}

static int hex_digit(char c) {
  return c >= '0' && c <= '9' ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1;
}

/* A part of a path with its %XX read, cut to the room there is. */
static struct qtr_http_slice decode(struct qtr_http_slice part, char *out, size_t room) {
  size_t n = 0;
  for (size_t i = 0; i < part.len && n < room; i++) {
    char c = part.data[i];
    if (c == '%' && i + 2 < part.len && hex_digit(part.data[i + 1]) >= 0 && hex_digit(part.data[i + 2]) >= 0) {
      c = (char)(hex_digit(part.data[i + 1]) << 4 | hex_digit(part.data[i + 2]));
      i += 2;
    }
    out[n++] = c;
  }
  return (struct qtr_http_slice){out, n};
}

static int get_model(struct qtr_server *s, struct qtr_http_conn *conn, const char *id) {
  struct qtr_http_slice path = qtr_http_head(conn)->path;
  struct qtr_buffer out = {0};
  char text[QTR_HTTP_MAX_TARGET];
  size_t prefix = strlen("/v1/models/");
  struct qtr_http_slice name = decode((struct qtr_http_slice){path.data + prefix, path.len - prefix}, text, sizeof text);
  int status = 200;
  if (qtr_http_is(name, s->o->model_name)) {
    put_model(s, &out);
    qtr_send_json(s, conn, 200, id, &out);
  } else {
    struct qtr_api_error err;
    (void)qtr_api_fail(&err, status = 404, "model", "the model \"%.*s\" does not exist; this server has \"%.200s\"",
                       name.len < 100 ? (int)name.len : 100, name.data, s->o->model_name);
    err.code = "model_not_found";
    qtr_send_error(s, conn, &err, id, NULL);
  }
  qtr_buffer_free(&out);
  return status;
}

static int get_health(struct qtr_server *s, struct qtr_http_conn *conn, const char *id) {
  struct qtr_buffer out = {0};
  const char *death = qtr_runner_death(s->runner);
  int status = death || s->draining ? 503 : 200;
  qtr_buffer_printf(&out, "{\"status\":\"%s\"", death ? "failed" : s->draining ? "shutting down" : "ok");
  if (death) {
    qtr_buffer_puts(&out, ",\"error\":");
    qtr_buffer_string(&out, death, strlen(death));
  }
  qtr_buffer_puts(&out, "}");
  qtr_send_json(s, conn, status, id, &out);
  qtr_buffer_free(&out);
  return status;
}

static int get_version(struct qtr_server *s, struct qtr_http_conn *conn, const char *id) {
  struct qtr_buffer out = {0};
  qtr_buffer_printf(&out, "{\"version\":\"%s\"}", qtr_version());
  qtr_send_json(s, conn, 200, id, &out);
  qtr_buffer_free(&out);
  return 200;
}

static int get_openapi(struct qtr_server *s, struct qtr_http_conn *conn, const char *id) {
  struct qtr_buffer out = {0};
  qtr_openapi_write(s, &out);
  qtr_send_json(s, conn, 200, id, &out);
  qtr_buffer_free(&out);
  return 200;
}

static int get_metrics(struct qtr_server *s, struct qtr_http_conn *conn, const char *id) {
  struct qtr_buffer out = {0};
  struct qtr_stats stats;
  struct qtr_step_metrics steps;
  char headers[512];
  qtr_engine_stats(s->engine, &stats);
  qtr_runner_metrics(s->runner, &steps);
  qtr_metrics_write(&out, s->o->model_name, &s->metrics, &steps, &stats, qtr_http_connections(s->http),
                    qtr_now() - s->t_start);
  qtr_http_reply(conn, 200, "text/plain; version=0.0.4; charset=utf-8", qtr_common_headers(s, id, headers, sizeof headers),
                 out.data ? out.data : "", out.len);
  qtr_buffer_free(&out);
  return 200;
}

static int post_embeddings(struct qtr_server *s, struct qtr_http_conn *conn, const char *id) {
  struct qtr_api_error err;
  (void)qtr_api_fail(&err, 501, NULL, "embeddings are not supported: this server generates text");
  qtr_send_error(s, conn, &err, id, NULL);
  return 501;
}

static int post_chat(struct qtr_server *s, struct qtr_http_conn *conn, const char *id) {
  (void)id;
  qtr_job_start(s, conn, QTR_API_CHAT);
  return 0;
}

static int post_completion(struct qtr_server *s, struct qtr_http_conn *conn, const char *id) {
  (void)id;
  qtr_job_start(s, conn, QTR_API_COMPLETION);
  return 0;
}

static int post_tokenize(struct qtr_server *s, struct qtr_http_conn *conn, const char *id) {
  (void)id;
  qtr_job_start(s, conn, QTR_API_TOKENIZE);
  return 0;
}

static int post_detokenize(struct qtr_server *s, struct qtr_http_conn *conn, const char *id) {
  (void)id;
  qtr_job_start(s, conn, QTR_API_DETOKENIZE);
  return 0;
}

static const struct qtr_route routes[] = {{"/v1/chat/completions", .post = true, .answer = post_chat},
                                          {"/v1/completions", .post = true, .answer = post_completion},
                                          {"/v1/models", .answer = get_models},
                                          {"/v1/models/", .answer = get_model},
                                          {"/v1/embeddings", .post = true, .answer = post_embeddings},
                                          {"/tokenize", .post = true, .answer = post_tokenize},
                                          {"/detokenize", .post = true, .answer = post_detokenize},
                                          {"/health", .open = true, .answer = get_health},
                                          {"/version", .answer = get_version},
                                          {"/openapi.json", .answer = get_openapi},
                                          {"/metrics", .answer = get_metrics},
                                          {"/", .open = true, .page = true, .answer = qtr_page_get},
                                          {"/page/", .open = true, .page = true, .answer = qtr_page_get}};

const struct qtr_route *qtr_routes(size_t *n) {
  *n = sizeof routes / sizeof routes[0];
  return routes;
}

static const struct qtr_route *find_route(struct qtr_http_slice path) {
  for (size_t i = 0; i < sizeof routes / sizeof routes[0]; i++) {
    size_t n = strlen(routes[i].path);
    bool prefix = n > 1 && routes[i].path[n - 1] == '/';
    if (prefix ? path.len > n && memcmp(path.data, routes[i].path, n) == 0 : qtr_http_is(path, routes[i].path))
      return &routes[i];
  }
  return NULL;
}

/* A page of another origin can make a browser send other types here without asking first; JSON it cannot. A body without a
 * type is let pass: no browser sends that, and simple clients do. */
static bool is_json(const struct qtr_http_head *head) {
  static const char json[] = "application/json";
  struct qtr_http_slice type;
  size_t n = sizeof json - 1;
  if (!qtr_http_header(head, "content-type", &type)) return true;
  if (type.len < n || strncasecmp(type.data, json, n) != 0) return false;
  return type.len == n || type.data[n] == ';' || type.data[n] == ' ' || type.data[n] == '\t';
}

void qtr_route(struct qtr_http_conn *conn, void *arg) {
  struct qtr_server *s = arg;
  const struct qtr_http_head *head = qtr_http_head(conn);
  const struct qtr_route *route = find_route(head->path);
  struct qtr_api_error err = {0};
  char id[72], headers[512];
  const char *extra = NULL;
  qtr_request_id(s, conn, id);
  if (s->o->cors_origin && qtr_http_is(head->method, "OPTIONS")) { /* a browser asks before it asks */
    char all[768];
    (void)snprintf(all, sizeof all,
                   "%sAccess-Control-Allow-Methods: GET, POST\r\nAccess-Control-Allow-Headers: Authorization, Content-Type, "
                   "X-Request-Id\r\nAccess-Control-Max-Age: 600\r\n",
                   qtr_common_headers(s, id, headers, sizeof headers));
    qtr_http_reply(conn, 204, NULL, all, NULL, 0);
    qtr_log_conn(s, conn, id, 204);
    return;
  }
  bool get = qtr_http_is(head->method, "GET") || qtr_http_is(head->method, "HEAD"), post = qtr_http_is(head->method, "POST");
  if (!(route && route->open) && !may_ask(s, head)) { /* before anything is said about what exists */
    (void)qtr_api_fail(&err, 401, NULL, "the API key is missing or wrong: send Authorization: Bearer KEY");
    err.code = "invalid_api_key";
    extra = "WWW-Authenticate: Bearer\r\n";
  } else if (!route) {
    (void)qtr_api_fail(&err, 404, NULL, "there is nothing at %.*s", head->path.len < 200 ? (int)head->path.len : 200,
                       head->path.data);
  } else if (!(route->post ? post : get)) {
    (void)qtr_api_fail(&err, 405, NULL, "%s takes %s", route->path, route->post ? "POST" : "GET");
    extra = route->post ? "Allow: POST\r\n" : "Allow: GET, HEAD\r\n";
  } else if (route->post && !is_json(head)) {
    (void)qtr_api_fail(&err, 415, NULL, "the body must be JSON: send Content-Type: application/json");
  }
  int status = err.http;
  if (err.http)
    qtr_send_error(s, conn, &err, id, extra);
  else
    status = route->answer(s, conn, id);
  if (status) qtr_log_conn(s, conn, id, status);
}

void qtr_route_refuse(struct qtr_http_conn *conn, int status, const char *why, void *arg) {
  struct qtr_server *s = arg;
  struct qtr_api_error err;
  char id[72];
  qtr_request_id(s, conn, id);
  (void)qtr_api_fail(&err, status, NULL, "%s", why);
  qtr_log_conn(s, conn, id, status);
  qtr_send_error(s, conn, &err, id, NULL);
}
