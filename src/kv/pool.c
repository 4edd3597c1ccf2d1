/* pool.c - page bookkeeping and the prefix cache (pool.h; architecture.md "KV cache"; spec C.1 for the page).
 *
 * A published page is an edge of a tree: (salt, parent page, its 64 tokens). The table finds it by a 64-bit hash that chains
 * the parent's hash, and every hit compares salt, parent and tokens. A parent's page number identifies its whole chain
 * because a page that has published children is never recycled: eviction takes leaves only. Sequences reference whole chains
 * and drop them from the last page to the first, so a parent is always used at least as recently as its children, and the
 * oldest page of the recency list is always a leaf.
 */
#include "kv/pool.h"
#include "backend/backend.h" /* QTR_PAGE_TOKENS */
#include "base/checked.h"
#include "base/status.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#define NONE (-1)

struct page {
  int32_t n_refs;
  int32_t n_children; /* published pages after this one */
  bool published;
  int32_t parent;       /* when published: page before it, NONE for the first of a chain */
  int32_t next_in_slot; /* when published: next page of the same hash slot */
  int32_t older, newer; /* when cached: neighbours in the recency list. When free: newer = next free page */
  int32_t companion;    /* stream page, NONE */
  uint64_t salt, hash;
  int32_t token[QTR_PAGE_TOKENS];
};

struct stream_page {
  int32_t n_refs;
  int32_t owner;        /* the page whose companion it is, NONE */
  int32_t older, newer; /* as in struct page */
};

struct qtr_kv_pool {
  int32_t n_pages, n_free, n_cached;
  bool prefix_cache;
  int32_t free_head;      /* a stack, so that memory that was touched is used again first */
  int32_t oldest, newest; /* recency list of cached pages */
  size_t slot_mask;
  struct page *page;          /* (n_pages) */
  int32_t *slot;              /* (slot_mask + 1) first page of each hash slot */
  struct stream_page *stream; /* (n_streams) */
  int32_t n_streams, n_streams_free, n_streams_cached;
  int32_t stream_free_head, stream_oldest, stream_newest;
};

enum qtr_status qtr_kv_pool_create(int32_t n_pages, bool prefix_cache, struct qtr_kv_pool **out, struct qtr_error *err) {
  if (n_pages < 1) return qtr_fail(err, QTR_ERR_ARGUMENT, "a KV pool needs at least one page, not %d", n_pages);
  size_t n_slots = 16;
  while (n_slots < 2 * (size_t)n_pages) n_slots *= 2;
  size_t n_bytes;
  struct qtr_kv_pool *pool = calloc(1, sizeof *pool);
  if (!pool || qtr_mul_overflow((size_t)n_pages, sizeof *pool->page, &n_bytes)) goto fail;
  pool->page = calloc((size_t)n_pages, sizeof *pool->page);
  pool->slot = malloc(n_slots * sizeof *pool->slot);
  if (!pool->page || !pool->slot) goto fail;
  pool->n_pages = pool->n_free = n_pages;
  pool->prefix_cache = prefix_cache;
  pool->slot_mask = n_slots - 1;
  pool->oldest = pool->newest = NONE;
  for (size_t i = 0; i < n_slots; i++) pool->slot[i] = NONE;
  for (int32_t i = 0; i < n_pages; i++) {
    pool->page[i].newer = i + 1 < n_pages ? i + 1 : NONE;
    pool->page[i].companion = NONE;
  }
  *out = pool;
  return QTR_OK;
fail:
  qtr_kv_pool_free(pool);
  return qtr_fail_memory(err, "the KV page table", (size_t)n_pages * sizeof(struct page));
}

void qtr_kv_pool_free(struct qtr_kv_pool *pool) {
  if (!pool) return;
  free(pool->page);
  free(pool->slot);
  free(pool->stream);
  free(pool);
}

int32_t qtr_kv_pool_available(const struct qtr_kv_pool *pool) { return pool->n_free + pool->n_cached; }

void qtr_kv_pool_counts(const struct qtr_kv_pool *pool, int32_t *total, int32_t *used, int32_t *cached) {
  *total = pool->n_pages;
  *used = pool->n_pages - pool->n_free - pool->n_cached;
  *cached = pool->n_cached;
}

/* ---- stream pages ---------------------------------------------------------------------------------------- */

enum qtr_status qtr_kv_pool_add_streams(struct qtr_kv_pool *pool, int32_t n, struct qtr_error *err) {
  if (n < 1) return qtr_fail(err, QTR_ERR_ARGUMENT, "a KV pool for streaming heads needs at least one page, not %d", n);
  pool->stream = calloc((size_t)n, sizeof *pool->stream);
  if (!pool->stream) return qtr_fail_memory(err, "the page table of streaming heads", (size_t)n * sizeof *pool->stream);
  for (int32_t i = 0; i < n; i++) pool->stream[i] = (struct stream_page){.owner = NONE, .newer = i + 1 < n ? i + 1 : NONE};
  pool->n_streams = pool->n_streams_free = n;
  pool->stream_oldest = pool->stream_newest = NONE;
  return QTR_OK;
}

int32_t qtr_kv_pool_stream_available(const struct qtr_kv_pool *pool) {
  return pool->n_streams_free + pool->n_streams_cached;
}

void qtr_kv_pool_stream_counts(const struct qtr_kv_pool *pool, int32_t *total, int32_t *used, int32_t *cached) {
  *total = pool->n_streams;
  *used = pool->n_streams - pool->n_streams_free - pool->n_streams_cached;
  *cached = pool->n_streams_cached;
}

static void stream_unlink(struct qtr_kv_pool *pool, int32_t i) { /* from the recency list */
  const struct stream_page *s = &pool->stream[i];
  if (s->older == NONE)
    pool->stream_oldest = s->newer;
  else
    pool->stream[s->older].newer = s->newer;
  if (s->newer == NONE)
    pool->stream_newest = s->older;
  else
    pool->stream[s->newer].older = s->older;
  pool->n_streams_cached--;
}

static void stream_release(struct qtr_kv_pool *pool, int32_t i) { /* to the free list */
  pool->stream[i].newer = pool->stream_free_head;
  pool->stream_free_head = i;
  pool->n_streams_free++;
}

int32_t qtr_kv_pool_stream_take(struct qtr_kv_pool *pool) {
  int32_t i = pool->stream_free_head;
  if (pool->n_streams_free > 0) {
    pool->stream_free_head = pool->stream[i].newer;
    pool->n_streams_free--;
  } else {
    i = pool->n_streams > 0 ? pool->stream_oldest : NONE;
    if (i == NONE) return -1;
    stream_unlink(pool, i);
    pool->page[pool->stream[i].owner].companion = NONE;
    pool->stream[i].owner = NONE;
  }
  pool->stream[i].n_refs = 1;
  return i;
}

void qtr_kv_pool_stream_ref(struct qtr_kv_pool *pool, int32_t stream) {
  if (pool->stream[stream].n_refs++ == 0) stream_unlink(pool, stream);
}

void qtr_kv_pool_stream_unref(struct qtr_kv_pool *pool, int32_t stream) {
  struct stream_page *s = &pool->stream[stream];
  if (--s->n_refs > 0) return;
  if (s->owner == NONE) {
    stream_release(pool, stream);
    return;
  }
  s->older = pool->stream_newest;
  s->newer = NONE;
  if (pool->stream_newest == NONE)
    pool->stream_oldest = stream;
  else
    pool->stream[pool->stream_newest].newer = stream;
  pool->stream_newest = stream;
  pool->n_streams_cached++;
}

int32_t qtr_kv_pool_attach(struct qtr_kv_pool *pool, int32_t page, int32_t stream) {
  struct page *p = &pool->page[page];
  if (!p->published) return stream;
  if (p->companion == NONE) {
    p->companion = stream;
    pool->stream[stream].owner = page;
  }
  return p->companion;
}

int32_t qtr_kv_pool_companion(const struct qtr_kv_pool *pool, int32_t page) { return pool->page[page].companion; }

/* A page is published no more: what its companion holds cannot be found any more. */
static void drop_companion(struct qtr_kv_pool *pool, struct page *p) {
  int32_t i = p->companion;
  if (i == NONE) return;
  p->companion = NONE;
  pool->stream[i].owner = NONE;
  if (pool->stream[i].n_refs > 0) return;
  stream_unlink(pool, i);
  stream_release(pool, i);
}

/* ---- pages ------------------------------------------------------------------------------------------------ */

static void unlink_cached(struct qtr_kv_pool *pool, int32_t i) {
  struct page *p = &pool->page[i];
  if (p->older == NONE)
    pool->oldest = p->newer;
  else
    pool->page[p->older].newer = p->newer;
  if (p->newer == NONE)
    pool->newest = p->older;
  else
    pool->page[p->newer].older = p->older;
  pool->n_cached--;
}

static void unpublish(struct qtr_kv_pool *pool, int32_t i) {
  struct page *p = &pool->page[i];
  int32_t *link = &pool->slot[p->hash & pool->slot_mask];
  while (*link != i) link = &pool->page[*link].next_in_slot;
  *link = p->next_in_slot;
  if (p->parent != NONE) pool->page[p->parent].n_children--;
  p->published = false;
  drop_companion(pool, p);
}

/* The least recently used leaf. With pages dropped from last to first it is the oldest page itself. */
static int32_t evict(struct qtr_kv_pool *pool) {
  int32_t i = pool->oldest;
  while (i != NONE && pool->page[i].n_children > 0) i = pool->page[i].newer;
  if (i == NONE) return NONE;
  unlink_cached(pool, i);
  unpublish(pool, i);
  return i;
}

int32_t qtr_kv_pool_take(struct qtr_kv_pool *pool) {
  int32_t i = pool->free_head;
  if (pool->n_free > 0) {
    pool->free_head = pool->page[i].newer;
    pool->n_free--;
  } else {
    i = evict(pool);
    if (i == NONE) return -1;
  }
  pool->page[i].n_refs = 1;
  return i;
}

void qtr_kv_pool_ref(struct qtr_kv_pool *pool, int32_t page) {
  if (pool->page[page].n_refs++ == 0) unlink_cached(pool, page);
}

void qtr_kv_pool_unref(struct qtr_kv_pool *pool, int32_t page) {
  struct page *p = &pool->page[page];
  if (--p->n_refs > 0) return;
  if (p->published) {
    p->older = pool->newest;
    p->newer = NONE;
    if (pool->newest == NONE)
      pool->oldest = page;
    else
      pool->page[pool->newest].newer = page;
    pool->newest = page;
    pool->n_cached++;
  } else {
    p->newer = pool->free_head;
    pool->free_head = page;
    pool->n_free++;
  }
}

static uint64_t chain_hash(const struct qtr_kv_pool *pool, uint64_t salt, int32_t parent, const int32_t *token) {
  uint64_t before = parent == NONE ? salt : pool->page[parent].hash;
  return XXH3_64bits_withSeed(token, QTR_PAGE_TOKENS * sizeof *token, before);
}

static int32_t find(const struct qtr_kv_pool *pool, uint64_t salt, int32_t parent, const int32_t *token, uint64_t hash) {
  int32_t i = pool->slot[hash & pool->slot_mask];
  for (; i != NONE; i = pool->page[i].next_in_slot) {
    const struct page *p = &pool->page[i];
    if (p->hash == hash && p->salt == salt && p->parent == parent && memcmp(p->token, token, sizeof p->token) == 0) return i;
  }
  return NONE;
}

int32_t qtr_kv_pool_match(struct qtr_kv_pool *pool, uint64_t salt, const int32_t *token, size_t n_tokens, int32_t *page,
                          int32_t max_pages) {
  if (!pool->prefix_cache) return 0;
  int32_t n = 0, parent = NONE;
  while (n < max_pages && n_tokens - (size_t)n * QTR_PAGE_TOKENS >= QTR_PAGE_TOKENS) {
    const int32_t *content = token + (size_t)n * QTR_PAGE_TOKENS;
    int32_t i = find(pool, salt, parent, content, chain_hash(pool, salt, parent, content));
    if (i == NONE) break;
    qtr_kv_pool_ref(pool, i);
    page[n++] = parent = i;
  }
  return n;
}

int32_t qtr_kv_pool_publish(struct qtr_kv_pool *pool, uint64_t salt, int32_t page, int32_t parent, const int32_t *token) {
  struct page *p = &pool->page[page];
  /* An unpublished parent would break the chain: such a page is simply not shared. */
  if (!pool->prefix_cache || p->published || (parent != NONE && !pool->page[parent].published)) return page;
  uint64_t hash = chain_hash(pool, salt, parent, token);
  int32_t known = find(pool, salt, parent, token, hash);
  if (known != NONE) return known;
  p->published = true;
  p->parent = parent;
  p->salt = salt;
  p->hash = hash;
  memcpy(p->token, token, sizeof p->token);
  int32_t *slot = &pool->slot[hash & pool->slot_mask];
  p->next_in_slot = *slot;
  *slot = page;
  if (parent != NONE) pool->page[parent].n_children++;
  return page;
}

/* What is wrong with the stream pages, NULL: nothing. */
static const char *check_streams(const struct qtr_kv_pool *pool, int32_t *where) {
  int32_t n = pool->n_streams, n_free = 0, n_cached = 0, before = NONE, n_used = 0;
  for (int32_t i = pool->stream_free_head; n_free < pool->n_streams_free; i = pool->stream[i].newer, n_free++) {
    *where = i;
    if (i < 0 || i >= n || pool->stream[i].n_refs != 0 || pool->stream[i].owner != NONE)
      return "the free list of streams is broken";
  }
  for (int32_t i = n > 0 ? pool->stream_oldest : NONE; i != NONE; before = i, i = pool->stream[i].newer, n_cached++) {
    *where = i;
    if (i < 0 || i >= n || n_cached > n || pool->stream[i].older != before || pool->stream[i].n_refs != 0)
      return "the recency list of streams is broken";
    if (pool->stream[i].owner == NONE) return "a cached stream page belongs to no page";
  }
  for (int32_t i = 0; i < n; i++) {
    const struct stream_page *s = &pool->stream[i];
    *where = i;
    n_used += s->n_refs > 0;
    if (s->n_refs < 0) return "references to a stream page below zero";
    if (s->owner == NONE) continue;
    if (s->owner < 0 || s->owner >= pool->n_pages || pool->page[s->owner].companion != i)
      return "a companion and its page disagree";
    if (s->n_refs > pool->page[s->owner].n_refs) return "a companion is referenced without its page";
  }
  for (int32_t i = 0; i < pool->n_pages; i++) {
    int32_t companion = pool->page[i].companion;
    *where = i;
    if (companion == NONE) continue;
    if (companion < 0 || companion >= n || pool->stream[companion].owner != i) return "a page and its companion disagree";
    if (!pool->page[i].published) return "a page that is not published has a companion";
  }
  *where = NONE;
  return n > 0 && (n_cached != pool->n_streams_cached || n_used + n_free + n_cached != n) ? "the counts of streams are wrong"
                                                                                          : NULL;
}

bool qtr_kv_pool_check(const struct qtr_kv_pool *pool, struct qtr_error *err) {
  int32_t n = pool->n_pages, n_free = 0, n_cached = 0, n_published = 0, n_found = 0;
  const char *wrong = NULL;
  int32_t where = NONE;
  int32_t *children = calloc((size_t)n, sizeof *children);     /* published children of each page */
  int32_t *child_refs = calloc((size_t)n, sizeof *child_refs); /* and their references */
  uint8_t *listed = calloc((size_t)n, 1);                      /* bit 0: in the free list, bit 1: in the recency list */
  if (!children || !child_refs || !listed) wrong = "out of memory";

  for (int32_t i = pool->free_head; !wrong && n_free < pool->n_free; i = pool->page[i].newer, n_free++) {
    if (i < 0 || i >= n || listed[i])
      wrong = "the free list is broken", where = i;
    else
      listed[i] = 1;
  }
  int32_t before = NONE;
  for (int32_t i = pool->oldest; !wrong && i != NONE; before = i, i = pool->page[i].newer, n_cached++) {
    if (i < 0 || i >= n || listed[i] || pool->page[i].older != before)
      wrong = "the recency list is broken", where = i;
    else if (pool->page[i].parent != NONE && listed[pool->page[i].parent])
      wrong = "a parent is older than its child", where = i;
    else
      listed[i] = 2;
  }
  if (!wrong && (before != pool->newest || n_cached != pool->n_cached)) wrong = "the cached count is wrong";
  for (int32_t i = 0; !wrong && i < n; i++) {
    const struct page *p = &pool->page[i];
    where = i;
    if (p->n_refs < 0)
      wrong = "references below zero";
    else if (p->n_refs > 0 && listed[i])
      wrong = "a referenced page is in a list";
    else if (p->n_refs == 0 && listed[i] != (p->published ? 2 : 1))
      wrong = "an unreferenced page is in the wrong list";
    if (!p->published) continue;
    n_published++;
    if (p->parent == i || p->parent < NONE || p->parent >= n)
      wrong = "a parent is out of range";
    else if (p->parent != NONE && !pool->page[p->parent].published)
      wrong = "a parent is not published";
    else if (p->parent != NONE && pool->page[p->parent].salt != p->salt)
      wrong = "a parent has another salt";
    else if (p->hash != chain_hash(pool, p->salt, p->parent, p->token))
      wrong = "a hash is stale";
    else if (find(pool, p->salt, p->parent, p->token, p->hash) != i)
      wrong = "a published page is not found";
    else if (p->parent != NONE)
      children[p->parent]++, child_refs[p->parent] += p->n_refs;
  }
  for (int32_t i = 0; !wrong && i < n; i++) {
    where = i;
    if ((pool->page[i].published ? pool->page[i].n_children : 0) != children[i])
      wrong = "a child count is wrong";
    else if (child_refs[i] > pool->page[i].n_refs)
      wrong = "a page is referenced without its parent";
  }
  for (size_t s = 0; !wrong && s <= pool->slot_mask; s++) {
    for (int32_t i = pool->slot[s]; i != NONE && n_found <= n; i = pool->page[i].next_in_slot) n_found++;
  }
  if (!wrong && n_found != n_published) wrong = "the table and the pages disagree", where = NONE;
  if (!wrong) wrong = check_streams(pool, &where);
  free(children);
  free(child_refs);
  free(listed);
  if (wrong) (void)qtr_fail(err, QTR_ERR_STATE, "KV pool: %s (page %d)", wrong, where);
  return !wrong;
}
