/* pool.h - which page belongs to whom: reference-counted KV pages with a prefix cache. Numbers only; the bytes are the
 * backend's. One thread at a time.
 *
 * A page is free, referenced (by one or more sequences), or cached: full, unreferenced and findable by its content. Full
 * prompt or output pages are published under a chain of hashes (the page's 64 tokens and the hash of the page before it);
 * a hit compares the tokens and the whole chain is compared by the parent's identity, so a collision never shares a wrong
 * page. Cached pages are evicted in order of last use, leaves before their parents.
 *
 * With streaming heads (struct qtr_kv_sparse) there is a second, smaller pool for their K and V. A sequence holds stream
 * pages for the tokens that later queries still see, and lets the others go. A published page may have a companion, the
 * stream page of the same tokens: when nobody holds that any more, it stays cached until its place is needed, the least
 * recently used first, independently of the page. So a prefix can be reused from where the companions that its window needs
 * are there. */
#ifndef QTR_KV_POOL_H
#define QTR_KV_POOL_H

#include "quattuor/quattuor.h"

struct qtr_kv_pool;

enum qtr_status qtr_kv_pool_create(int32_t n_pages, bool prefix_cache, struct qtr_kv_pool **pool, struct qtr_error *err);
void qtr_kv_pool_free(struct qtr_kv_pool *pool);

int32_t qtr_kv_pool_available(const struct qtr_kv_pool *pool); /* free + cached */
void qtr_kv_pool_counts(const struct qtr_kv_pool *pool, int32_t *total, int32_t *used, int32_t *cached);

/* Takes a page (evicting a cached one if needed) with one reference. -1 when none is available. */
int32_t qtr_kv_pool_take(struct qtr_kv_pool *pool);
void qtr_kv_pool_ref(struct qtr_kv_pool *pool, int32_t page);
/* Drops a reference; the last one makes a published page cached and any other free. A sequence drops its pages from the last
 * to the first, so that a page is never used less recently than what was published after it. */
void qtr_kv_pool_unref(struct qtr_kv_pool *pool, int32_t page);

/* Finds the longest chain of published pages that hold token[0 … 64k). Takes a reference on each and writes them to
 * page[(max_pages)]. Returns k. salt separates tenants: pages are shared only under the same salt. */
int32_t qtr_kv_pool_match(struct qtr_kv_pool *pool, uint64_t salt, const int32_t *token, size_t n_tokens, int32_t *page,
                          int32_t max_pages);
/* Publishes a referenced page, which holds token[0 … 64), after `parent` (the page before it in its sequence, published and
 * referenced; -1 for the first). Returns the page that now stands for this content: `page` itself, or the one that was
 * published before, in which case nothing has changed and the caller had better share that one (ref it, drop its own, and go
 * on with it as the parent of its next page). */
int32_t qtr_kv_pool_publish(struct qtr_kv_pool *pool, uint64_t salt, int32_t page, int32_t parent, const int32_t *token);

/* ---- stream pages -------------------------------------------------------------------------------------- */

/* Gives a new pool n pages for streaming heads. */
enum qtr_status qtr_kv_pool_add_streams(struct qtr_kv_pool *pool, int32_t n_stream_pages, struct qtr_error *err);
int32_t qtr_kv_pool_stream_available(const struct qtr_kv_pool *pool);
void qtr_kv_pool_stream_counts(const struct qtr_kv_pool *pool, int32_t *total, int32_t *used, int32_t *cached);
int32_t qtr_kv_pool_stream_take(struct qtr_kv_pool *pool); /* as qtr_kv_pool_take */
void qtr_kv_pool_stream_ref(struct qtr_kv_pool *pool, int32_t stream);
/* Drops a reference; the last one makes a companion cached and any other page free. Who holds a companion holds its page
 * too, and drops the companion first. */
void qtr_kv_pool_stream_unref(struct qtr_kv_pool *pool, int32_t stream);
/* Makes a referenced stream page the companion of a referenced published page that holds the same tokens. Returns the page's
 * companion: `stream`, or the one it had before (which the caller had better share), or `stream` as well where the page is
 * not published. */
int32_t qtr_kv_pool_attach(struct qtr_kv_pool *pool, int32_t page, int32_t stream);
int32_t qtr_kv_pool_companion(const struct qtr_kv_pool *pool, int32_t page); /* -1: none */

/* Checks every invariant (counts, lists, chains), for tests; false and a message when one is broken. */
bool qtr_kv_pool_check(const struct qtr_kv_pool *pool, struct qtr_error *err);

#endif
