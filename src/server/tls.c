/* tls.c - TLS by OpenSSL inside libevent's bufferevents (tls.h). A client that goes away without saying so inside TLS counts
 * as gone like any other. */
#include "server/tls.h"

#include "base/status.h"

#ifdef QTR_HAVE_TLS

#include <event2/bufferevent.h>
#include <event2/bufferevent_ssl.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

struct qtr_tls {
  SSL_CTX *context;
};

/* A key that needs a passphrase: nobody is there to ask. */
static int no_passphrase(char *out, int size, int writing, void *arg) {
  (void)out;
  (void)size;
  (void)writing;
  (void)arg;
  return 0;
}

static const char *reason(void) {
  unsigned long code = ERR_get_error();
  const char *text = code ? ERR_reason_error_string(code) : NULL;
  ERR_clear_error();
  return text ? text : "it is no such file, or not PEM";
}

enum qtr_status qtr_tls_open(const char *cert, const char *key, struct qtr_tls **out, struct qtr_error *err) {
  *out = NULL;
  enum qtr_status status = QTR_OK;
  ERR_clear_error();
  struct qtr_tls *tls = calloc(1, sizeof *tls);
  if (tls) tls->context = SSL_CTX_new(TLS_server_method());
  if (!tls || !tls->context) {
    qtr_tls_close(tls);
    return qtr_fail_memory(err, "TLS", 0);
  }
  SSL_CTX *c = tls->context;
  SSL_CTX_set_default_passwd_cb(c, no_passphrase);
  (void)SSL_CTX_set_options(c, SSL_OP_NO_RENEGOTIATION | SSL_OP_IGNORE_UNEXPECTED_EOF | SSL_OP_NO_COMPRESSION);
  (void)SSL_CTX_set_mode(c, SSL_MODE_RELEASE_BUFFERS); /* an idle connection keeps 34 KiB less */
  if (SSL_CTX_set_min_proto_version(c, TLS1_2_VERSION) != 1) {
    status = qtr_fail(err, QTR_ERR_UNSUPPORTED, "this OpenSSL has no TLS 1.2: %s", reason());
  } else if (SSL_CTX_use_certificate_chain_file(c, cert) != 1) {
    status = qtr_fail(err, QTR_ERR_FORMAT, "--tls-cert %.200s: %s", cert, reason());
  } else if (SSL_CTX_use_PrivateKey_file(c, key, SSL_FILETYPE_PEM) != 1) {
    status = qtr_fail(err, QTR_ERR_FORMAT, "--tls-key %.200s: %s", key, reason());
  } else if (SSL_CTX_check_private_key(c) != 1) {
    status = qtr_fail(err, QTR_ERR_FORMAT, "--tls-key %.200s is not the key of %.200s", key, cert);
  }
  ERR_clear_error();
  if (status)
    qtr_tls_close(tls);
  else
    *out = tls;
  return status;
}

void qtr_tls_close(struct qtr_tls *tls) {
  if (!tls) return;
  if (tls->context) SSL_CTX_free(tls->context);
  free(tls);
}

struct bufferevent *qtr_tls_accept(struct qtr_tls *tls, struct event_base *base, int fd) {
  SSL *ssl = SSL_new(tls->context);
  if (!ssl) return NULL;
  struct bufferevent *bev = bufferevent_openssl_socket_new(base, fd, ssl, BUFFEREVENT_SSL_ACCEPTING,
                                                           BEV_OPT_CLOSE_ON_FREE | BEV_OPT_DEFER_CALLBACKS);
  if (!bev) {
    SSL_free(ssl);
    return NULL;
  }
  bufferevent_openssl_set_allow_dirty_shutdown(bev, 1);
  return bev;
}

enum qtr_status qtr_tls_open_client(const char *ca, struct qtr_tls **out, struct qtr_error *err) {
  *out = NULL;
  ERR_clear_error();
  struct qtr_tls *tls = calloc(1, sizeof *tls);
  if (tls) tls->context = SSL_CTX_new(TLS_client_method());
  if (!tls || !tls->context) {
    qtr_tls_close(tls);
    return qtr_fail_memory(err, "TLS", 0);
  }
  (void)SSL_CTX_set_options(tls->context, SSL_OP_NO_RENEGOTIATION | SSL_OP_IGNORE_UNEXPECTED_EOF | SSL_OP_NO_COMPRESSION);
  SSL_CTX_set_verify(tls->context, SSL_VERIFY_PEER, NULL);
  bool ok = SSL_CTX_set_min_proto_version(tls->context, TLS1_2_VERSION) == 1 &&
            (ca ? SSL_CTX_load_verify_file(tls->context, ca) : SSL_CTX_set_default_verify_paths(tls->context)) == 1;
  if (!ok) {
    enum qtr_status status =
        qtr_fail(err, QTR_ERR_FORMAT, "the certificates in %.200s: %s", ca ? ca : "the system's store", reason());
    qtr_tls_close(tls);
    return status;
  }
  *out = tls;
  return QTR_OK;
}

struct bufferevent *qtr_tls_connect(struct qtr_tls *tls, struct event_base *base, const char *host) {
  SSL *ssl = SSL_new(tls->context);
  if (!ssl) return NULL;
  bool is_address = X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(ssl), host) == 1;
  bool named = is_address || (SSL_set1_host(ssl, host) == 1 && SSL_set_tlsext_host_name(ssl, host) == 1);
  ERR_clear_error();
  struct bufferevent *bev = named ? bufferevent_openssl_socket_new(base, -1, ssl, BUFFEREVENT_SSL_CONNECTING,
                                                                   BEV_OPT_CLOSE_ON_FREE | BEV_OPT_DEFER_CALLBACKS)
                                  : NULL;
  if (!bev) {
    SSL_free(ssl);
    return NULL;
  }
  bufferevent_openssl_set_allow_dirty_shutdown(bev, 1);
  return bev;
}

void qtr_tls_explain(struct bufferevent *bev, char *out, size_t n) {
  SSL *ssl = bufferevent_openssl_get_ssl(bev);
  unsigned long code = bufferevent_get_openssl_error(bev);
  long verified = ssl ? SSL_get_verify_result(ssl) : X509_V_OK;
  const char *text = verified != X509_V_OK ? X509_verify_cert_error_string(verified)
                     : code                ? ERR_reason_error_string(code)
                                           : NULL;
  (void)snprintf(out, n, "TLS: %s", text ? text : "the handshake failed");
}

void qtr_tls_finish(struct bufferevent *bev) {
  SSL *ssl = bufferevent_openssl_get_ssl(bev);
  if (ssl && SSL_is_init_finished(ssl)) (void)SSL_shutdown(ssl); /* one way is enough: we wait a moment and close */
  ERR_clear_error();
}

#else

enum qtr_status qtr_tls_open(const char *cert, const char *key, struct qtr_tls **tls, struct qtr_error *err) {
  (void)cert;
  (void)key;
  *tls = NULL;
  return qtr_fail(err, QTR_ERR_UNSUPPORTED,
                  "this build has no TLS: install libssl-dev and build again, or let a reverse proxy speak it");
}

void qtr_tls_close(struct qtr_tls *tls) { (void)tls; }

struct bufferevent *qtr_tls_accept(struct qtr_tls *tls, struct event_base *base, int fd) {
  (void)tls;
  (void)base;
  (void)fd;
  return NULL;
}

void qtr_tls_finish(struct bufferevent *bev) { (void)bev; }

enum qtr_status qtr_tls_open_client(const char *ca, struct qtr_tls **tls, struct qtr_error *err) {
  return qtr_tls_open(ca, NULL, tls, err);
}

struct bufferevent *qtr_tls_connect(struct qtr_tls *tls, struct event_base *base, const char *host) {
  (void)host;
  return qtr_tls_accept(tls, base, -1);
}

void qtr_tls_explain(struct bufferevent *bev, char *out, size_t n) {
  (void)bev;
  if (n > 0) *out = 0;
}

#endif
