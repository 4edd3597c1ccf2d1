/* constraint.c - masks of tokens from an automaton over bytes (constraint.h).
 *
 * Tokens are sorted by their bytes, and each knows how many bytes it shares with the one before. So the automaton steps once
 * for every byte of the vocabulary's tree, and a beginning that is dead throws out all that share it with a comparison each.
 * The masks of states are kept: inside a string every next token finds its mask made. */
#include "server/constraint.h"

#include "base/checked.h"
#include "base/status.h"
#include "text/tokenizer.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define MAX_TOKEN_BYTES 128                   /* longer ones are never allowed: nobody misses them */
#define MAX_MASK_BYTES ((size_t)32 << 20)     /* of kept masks, for each request */
#define MAX_GRAMMAR_BYTES ((size_t)128 << 20) /* of the automaton, for each request */

struct entry {
  const char *bytes; /* (len) the tokenizer's */
  int32_t token;
  int32_t len, shared; /* shared: bytes in common with the entry before */
};

struct qtr_vocabulary {
  const struct qtr_tokenizer *tokenizer;
  struct entry *entry; /* (n) sorted */
  size_t n;
  int32_t vocab_size;
  int32_t *eos; /* (n_eos) */
  int32_t n_eos;
};

struct qtr_masks {
  struct qtr_grammar *grammar;
  const struct qtr_vocabulary *vocabulary;
  uint32_t **mask; /* (n_masks) by state; NULL = not made */
  size_t n_masks, n_bytes;
  atomic_int n_references;
  atomic_bool spent; /* so large, or failed, that no further request shall use it */
};

#define CACHED 8

struct qtr_mask_cache {
  pthread_mutex_t mutex;
  struct {
    char *key;
    struct qtr_masks *masks;
    uint64_t used; /* when, for throwing out the oldest */
  } item[CACHED];
  uint64_t now;
};

struct position { /* of one completion */
  struct qtr_masks *masks;
  int32_t state;
};

static int by_bytes(const void *x, const void *y) {
  const struct entry *a = x, *b = y;
  int order = memcmp(a->bytes, b->bytes, (size_t)QTR_MIN(a->len, b->len));
  return order ? order : a->len != b->len ? a->len - b->len : a->token - b->token;
}

enum qtr_status qtr_vocabulary_create(const struct qtr_tokenizer *tokenizer, const int32_t *eos, int32_t n_eos,
                                      int32_t vocab_size, struct qtr_vocabulary **out, struct qtr_error *err) {
  *out = NULL;
  int32_t n_ids = QTR_MIN(qtr_tokenizer_vocab_size(tokenizer), vocab_size);
  struct qtr_vocabulary *v = calloc(1, sizeof *v);
  if (v) {
    v->entry = malloc(((size_t)n_ids + 1) * sizeof *v->entry);
    v->eos = malloc(((size_t)n_eos + 1) * sizeof *v->eos);
  }
  if (!v || !v->entry || !v->eos) {
    qtr_vocabulary_free(v);
    return qtr_fail_memory(err, "the vocabulary's order", (size_t)n_ids * sizeof *v->entry);
  }
  v->tokenizer = tokenizer;
  v->vocab_size = vocab_size;
  memcpy(v->eos, eos, (size_t)n_eos * sizeof *eos);
  v->n_eos = n_eos;
  for (int32_t id = 0; id < n_ids; id++) {
    size_t len = 0;
    const char *bytes = qtr_tokenizer_token_bytes(tokenizer, id, &len);
    bool ends = false;
    for (int32_t i = 0; i < n_eos; i++) ends = ends || eos[i] == id;
    if (!bytes || len == 0 || len > MAX_TOKEN_BYTES || ends || qtr_tokenizer_is_special(tokenizer, id)) continue;
    v->entry[v->n++] = (struct entry){.bytes = bytes, .token = id, .len = (int32_t)len};
  }
  qsort(v->entry, v->n, sizeof *v->entry, by_bytes);
  for (size_t i = 1; i < v->n; i++) {
    const struct entry *a = &v->entry[i - 1], *b = &v->entry[i];
    int32_t k = 0;
    while (k < a->len && k < b->len && a->bytes[k] == b->bytes[k]) k++;
    v->entry[i].shared = k;
  }
  *out = v;
  return QTR_OK;
}

void qtr_vocabulary_free(struct qtr_vocabulary *v) {
  if (!v) return;
  free(v->entry);
  free(v->eos);
  free(v);
}

struct qtr_masks *qtr_masks_create(struct qtr_grammar *grammar, const struct qtr_vocabulary *vocabulary) {
  struct qtr_masks *m = calloc(1, sizeof *m);
  if (!m) return NULL;
  m->grammar = grammar;
  m->vocabulary = vocabulary;
  atomic_init(&m->n_references, 1);
  atomic_init(&m->spent, false);
  return m;
}

void qtr_masks_unref(struct qtr_masks *m) {
  if (!m || atomic_fetch_sub(&m->n_references, 1) > 1) return;
  for (size_t i = 0; i < m->n_masks; i++) free(m->mask[i]);
  free(m->mask);
  qtr_grammar_free(m->grammar);
  free(m);
}

/* ---- the engine's questions ---------------------------------------------------------------------- */

static void *start(void *user) {
  struct position *p = malloc(sizeof *p);
  struct qtr_masks *m = user;
  if (!p) return NULL;
  *p = (struct position){m, qtr_grammar_start(m->grammar)};
  return p;
}

static void stop(void *state) { free(state); }

/* Sets the bits of every token whose bytes the automaton can take from `from`. Returns whether there is any. */
static bool walk(struct qtr_masks *m, int32_t from, uint32_t *allowed) {
  const struct qtr_vocabulary *v = m->vocabulary;
  int32_t at[MAX_TOKEN_BYTES + 1];         /* at[k]: the state after k bytes of the running entry */
  const int32_t *row[MAX_TOKEN_BYTES + 1]; /* its known transitions */
  int32_t dead = INT32_MAX;                /* the entry died at this byte */
  bool any = false;
  at[0] = from;
  row[0] = qtr_grammar_row(m->grammar, from);
  for (size_t i = 0; i < v->n; i++) {
    const struct entry *e = &v->entry[i];
    if (e->shared > dead) continue;
    dead = INT32_MAX;
    for (int32_t k = e->shared; k < e->len; k++) {
      unsigned char byte = (unsigned char)e->bytes[k];
      int32_t to = row[k] ? row[k][byte] : QTR_GRAMMAR_UNKNOWN;
      if (to == QTR_GRAMMAR_UNKNOWN) {
        to = qtr_grammar_next(m->grammar, at[k], byte);
        row[k] = qtr_grammar_row(m->grammar, at[k]);
      }
      if (to != QTR_GRAMMAR_DEAD) {
        at[k + 1] = to;
        row[k + 1] = qtr_grammar_row(m->grammar, to);
        continue;
      }
      dead = k;
      break;
    }
    if (dead != INT32_MAX) continue;
    allowed[e->token / 32] |= 1u << e->token % 32;
    any = true;
  }
  return any;
}

/* A place to keep the state's mask, NULL when there is no room. */
static uint32_t *keep(struct qtr_masks *m, int32_t state, size_t n_words) {
  if (m->n_bytes + n_words * sizeof(uint32_t) > MAX_MASK_BYTES) return NULL;
  if ((size_t)state >= m->n_masks) {
    size_t n = QTR_MAX((size_t)state + 1, m->n_masks * 2);
    uint32_t **more = realloc(m->mask, n * sizeof *more);
    if (!more) return NULL;
    memset(more + m->n_masks, 0, (n - m->n_masks) * sizeof *more);
    m->mask = more;
    m->n_masks = n;
  }
  m->mask[state] = malloc(n_words * sizeof(uint32_t));
  if (m->mask[state]) m->n_bytes += n_words * sizeof(uint32_t);
  return m->mask[state];
}

static bool make_mask(void *state, uint32_t *allowed) {
  const struct position *p = state;
  struct qtr_masks *m = p->masks;
  const struct qtr_vocabulary *v = m->vocabulary;
  size_t n_words = qtr_ceil_div((size_t)v->vocab_size, 32);
  if (p->state == QTR_GRAMMAR_DEAD || qtr_grammar_failed(m->grammar) || qtr_grammar_bytes(m->grammar) > MAX_GRAMMAR_BYTES) {
    return false;
  }
  if ((size_t)p->state < m->n_masks && m->mask[p->state]) {
    memcpy(allowed, m->mask[p->state], n_words * sizeof *allowed);
    return true;
  }
  memset(allowed, 0, n_words * sizeof *allowed);
  bool any = walk(m, p->state, allowed);
  if (qtr_grammar_failed(m->grammar)) return false; /* half a mask */
  if (qtr_grammar_accepts(m->grammar, p->state)) {
    for (int32_t i = 0; i < v->n_eos; i++) {
      if (v->eos[i] < 0 || v->eos[i] >= v->vocab_size) continue;
      allowed[v->eos[i] / 32] |= 1u << v->eos[i] % 32;
      any = true;
    }
  }
  uint32_t *kept = any ? keep(m, p->state, n_words) : NULL;
  if (kept) memcpy(kept, allowed, n_words * sizeof *kept);
  return any;
}

static bool mask(void *state, uint32_t *allowed) {
  struct qtr_masks *m = ((struct position *)state)->masks;
  bool any = make_mask(state, allowed);
  if (qtr_grammar_failed(m->grammar) || qtr_grammar_bytes(m->grammar) > MAX_GRAMMAR_BYTES / 4) atomic_store(&m->spent, true);
  return any;
}

static void accept(void *state, int32_t token) {
  struct position *p = state;
  const struct qtr_vocabulary *v = p->masks->vocabulary;
  for (int32_t i = 0; i < v->n_eos; i++) {
    if (v->eos[i] == token) return; /* with ignore_eos it goes on where it was */
  }
  int32_t at = p->state;
  size_t len = 0;
  const char *bytes = qtr_tokenizer_token_bytes(v->tokenizer, token, &len);
  for (size_t i = 0; bytes && i < len; i++) at = qtr_grammar_next(p->masks->grammar, at, (unsigned char)bytes[i]);
  p->state = bytes ? at : QTR_GRAMMAR_DEAD;
}

struct qtr_constraint qtr_masks_constraint(struct qtr_masks *m) {
  return (struct qtr_constraint){.start = start, .mask = mask, .accept = accept, .stop = stop, .user = m};
}

/* ---- the cache ----------------------------------------------------------------------------------- */

struct qtr_mask_cache *qtr_mask_cache_create(void) {
  struct qtr_mask_cache *c = calloc(1, sizeof *c);
  if (c) (void)pthread_mutex_init(&c->mutex, NULL);
  return c;
}

void qtr_mask_cache_free(struct qtr_mask_cache *c) {
  if (!c) return;
  for (int i = 0; i < CACHED; i++) {
    free(c->item[i].key);
    qtr_masks_unref(c->item[i].masks);
  }
  (void)pthread_mutex_destroy(&c->mutex);
  free(c);
}

struct qtr_masks *qtr_mask_cache_find(struct qtr_mask_cache *c, const char *key) {
  struct qtr_masks *found = NULL;
  pthread_mutex_lock(&c->mutex);
  for (int i = 0; i < CACHED && !found; i++) {
    if (!c->item[i].key || strcmp(c->item[i].key, key) != 0 || atomic_load(&c->item[i].masks->spent)) continue;
    found = c->item[i].masks;
    (void)atomic_fetch_add(&found->n_references, 1);
    c->item[i].used = ++c->now;
  }
  pthread_mutex_unlock(&c->mutex);
  return found;
}

/* Takes the place of the same key, else of the one not used for longest. */
void qtr_mask_cache_add(struct qtr_mask_cache *c, const char *key, struct qtr_masks *masks) {
  char *copy = strdup(key);
  if (!copy) return;
  pthread_mutex_lock(&c->mutex);
  int to = 0;
  for (int i = 0; i < CACHED; i++) {
    if (c->item[i].used < c->item[to].used) to = i;
  }
  for (int i = 0; i < CACHED; i++) {
    if (c->item[i].key && strcmp(c->item[i].key, key) == 0) to = i;
  }
  struct qtr_masks *old = c->item[to].masks;
  free(c->item[to].key);
  c->item[to].key = copy;
  c->item[to].masks = masks;
  c->item[to].used = ++c->now;
  (void)atomic_fetch_add(&masks->n_references, 1);
  pthread_mutex_unlock(&c->mutex);
  qtr_masks_unref(old);
}
