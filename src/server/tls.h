/* tls.h - TLS for connections, of the server and of the load generator's client, where the build has libevent_openssl;
 * without it opening says so. */
#ifndef QTR_SERVER_TLS_H
#define QTR_SERVER_TLS_H

#include "quattuor/quattuor.h"

struct bufferevent;
struct event_base;
struct qtr_tls;

/* Reads a certificate with its chain and its key, both PEM. TLS 1.2 and later. */
enum qtr_status qtr_tls_open(const char *cert, const char *key, struct qtr_tls **tls, struct qtr_error *err);
void qtr_tls_close(struct qtr_tls *tls); /* NULL is allowed */

/* A bufferevent over an accepted socket, which is the bufferevent's from now on. NULL: no memory; the socket stays the
 * caller's. Its first event is BEV_EVENT_CONNECTED, when the handshake is done. */
struct bufferevent *qtr_tls_accept(struct qtr_tls *tls, struct event_base *base, int fd);
/* For a client: trusts the certificates in `ca` (PEM), or with NULL those that the system trusts. */
enum qtr_status qtr_tls_open_client(const char *ca, struct qtr_tls **tls, struct qtr_error *err);
/* A bufferevent that will be connected to `host`, whose name or address the certificate must have. NULL: no memory. */
struct bufferevent *qtr_tls_connect(struct qtr_tls *tls, struct event_base *base, const char *host);
/* Why a handshake failed, into out (size n). */
void qtr_tls_explain(struct bufferevent *bev, char *out, size_t n);

/* Tells the client that nothing follows, before the socket's sending half is shut. */
void qtr_tls_finish(struct bufferevent *bev);

#endif
