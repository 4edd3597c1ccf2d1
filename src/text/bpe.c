/* bpe.c - byte-pair encoding (bpe.h). Three ways that give the same ids: a small cache of words seen in this call, a scan
 * for words of up to 64 bytes, and a linked list with queues of pairs for longer ones, so that one word of many megabytes
 * ("aaaa...", or text without pre-tokenizer) costs O(n log n) and about 40 bytes a byte. */
#include "text/bpe.h"

#include "base/checked.h"
#include "base/status.h"
#include "text/unicode.h"

#include <stdlib.h>
#include <string.h>

enum { SHORT_WORD = 64, LISTS_FROM = 4096, CACHE_WORDS = 4096, CACHE_KEY = 27, CACHE_IDS = 8 };
#define NONE UINT32_MAX
#define SPACE_MARK "\xe2\x96\x81" /* U+2581 */

/* One character, or what it was merged into; 24 bytes for every character of a long word. */
struct symbol {
  int32_t id; /* -1: merged into its left neighbour */
  uint32_t previous, next;
  uint32_t rank; /* of the pair (this, next); NONE = no merge */
  uint32_t list_previous,
      list_next; /* neighbours in the list of its rank; list_previous IN_HEAP: it is in the heap instead */
};
#define IN_HEAP (UINT32_MAX - 1)

/* Pairs of one rank by ascending position. A pair that comes out of order goes to the heap. */
struct rank_list {
  uint32_t head, tail;
  bool queued; /* its rank is in the heap of ranks */
};

struct heap { /* smallest key first, four children a node */
  uint64_t *keys;
  size_t n, capacity;
};

struct cached_word {
  int32_t ids[CACHE_IDS];
  uint8_t len, n_ids;
  char key[CACHE_KEY];
};

struct qtr_bpe_work {
  struct symbol *symbols; /* (n_symbols) */
  size_t n_symbols;
  struct rank_list *lists; /* (n_ranks), made for the first very long word; all empty between words */
  struct heap pairs, ranks;
  struct cached_word *cache; /* (CACHE_WORDS), made once a call has seen enough words */
  size_t n_words;
};

/* ---- the table of merges ------------------------------------------------------------------------- */

static uint32_t pair_hash(int32_t left, int32_t right) {
  uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
  key *= 0x9e3779b97f4a7c15u;
  key ^= key >> 32;
  return (uint32_t)(key * 0xc4ceb9feu >> 7);
}

static struct qtr_merge *merge_slot(const struct qtr_bpe *bpe, int32_t left, int32_t right) {
  uint32_t mask = bpe->n_slots - 1;
  uint32_t i = pair_hash(left, right) & mask;
  while (bpe->merges[i].left >= 0 && (bpe->merges[i].left != left || bpe->merges[i].right != right)) i = (i + 1) & mask;
  return &bpe->merges[i];
}

static inline const struct qtr_merge *find_merge(const struct qtr_bpe *bpe, int32_t left, int32_t right) {
  const struct qtr_merge *merge = merge_slot(bpe, left, right);
  return merge->left >= 0 ? merge : NULL;
}

static enum qtr_status grow_merges(struct qtr_bpe *bpe, struct qtr_error *err) {
  uint32_t n_old = bpe->n_slots, n = n_old ? n_old * 2 : 1024;
  struct qtr_merge *old = bpe->merges, *merges = malloc(n * sizeof *merges);
  if (!merges) return qtr_fail_memory(err, "the merges", n * sizeof *merges);
  for (uint32_t i = 0; i < n; i++) merges[i].left = -1;
  bpe->merges = merges;
  bpe->n_slots = n;
  for (uint32_t i = 0; i < n_old; i++) {
    if (old[i].left >= 0) *merge_slot(bpe, old[i].left, old[i].right) = old[i];
  }
  free(old);
  return QTR_OK;
}

enum qtr_status qtr_bpe_add_merge(struct qtr_bpe *bpe, struct qtr_merge merge, struct qtr_error *err) {
  if (bpe->n_used >= QTR_BPE_MAX_MERGES) {
    return qtr_fail(err, QTR_ERR_FORMAT, "more than %d merges", QTR_BPE_MAX_MERGES);
  }
  if ((bpe->n_used + 1) * 2 > bpe->n_slots) {
    enum qtr_status status = grow_merges(bpe, err);
    if (status) return status;
  }
  struct qtr_merge *slot = merge_slot(bpe, merge.left, merge.right);
  if (slot->left < 0) bpe->n_used++;
  *slot = merge;
  bpe->n_ranks = QTR_MAX(bpe->n_ranks, merge.rank + 1);
  return QTR_OK;
}

static bool starts_with_mark(const char *text, size_t len) { return len >= 3 && memcmp(text, SPACE_MARK, 3) == 0; }

enum qtr_status qtr_bpe_finish(struct qtr_bpe *bpe, struct qtr_error *err) {
  if (bpe->n_slots == 0) {
    enum qtr_status status = grow_merges(bpe, err);
    if (status) return status;
  }
  char text[8];
  for (uint32_t c = 0; c < QTR_BPE_DIRECT_CHARS; c++) {
    bpe->char_ids[c] = qtr_vocab_find_model(bpe->vocab, text, qtr_utf8_encode(c, text));
  }
  static const char hex[] = "0123456789ABCDEF";
  for (size_t i = 0; i < 256; i++) {
    const char name[6] = {'<', '0', 'x', hex[i >> 4], hex[i & 15], '>'};
    bpe->byte_ids[i] = qtr_vocab_find(bpe->vocab, name, sizeof name);
  }
  bpe->cut_at_spaces = bpe->char_ids[0x2581] >= 0;
  for (uint32_t i = 0; i < bpe->n_slots && bpe->cut_at_spaces; i++) {
    const struct qtr_merge *merge = &bpe->merges[i];
    if (merge->left < 0) continue;
    size_t left_len, right_len;
    const char *left = qtr_vocab_text(bpe->vocab, merge->left, &left_len);
    const char *right = qtr_vocab_text(bpe->vocab, merge->right, &right_len);
    bool left_is_mark = left_len >= 3 && starts_with_mark(left + left_len - 3, 3);
    if (!left_is_mark && starts_with_mark(right, right_len)) bpe->cut_at_spaces = false;
  }
  return QTR_OK;
}

void qtr_bpe_free(struct qtr_bpe *bpe) {
  free(bpe->merges);
  bpe->merges = NULL;
  bpe->n_slots = bpe->n_used = 0;
}

/* ---- characters ---------------------------------------------------------------------------------- */

/* What a character without a token becomes: its bytes (true), when all of them have tokens. */
static bool fall_back(const struct qtr_bpe *bpe, const char *text, size_t n_bytes, int32_t out[4]) {
  if (!bpe->byte_fallback) return false;
  for (size_t i = 0; i < n_bytes; i++) {
    out[i] = bpe->byte_ids[(uint8_t)text[i]];
    if (out[i] < 0) return false;
  }
  return true;
}

/* Ids of the characters, at most len of them, `stride` bytes apart. An unknown token is held back until the next known
 * character, and bytes do not release it: so does the reference. */
static size_t initial_ids(const struct qtr_bpe *bpe, const char *text, size_t len, void *out, size_t stride) {
  char *at = out;
  size_t n = 0;
  bool unknown = false;
#define PUT(value) (*(int32_t *)(void *)at = (value), at += stride, n++)
  for (size_t i = 0, n_bytes; i < len; i += n_bytes) {
    uint32_t c = qtr_utf8_next(text + i, &n_bytes);
    int32_t id = c < QTR_BPE_DIRECT_CHARS ? bpe->char_ids[c] : qtr_vocab_find_model(bpe->vocab, text + i, n_bytes);
    int32_t bytes[4];
    if (id >= 0) {
      if (unknown) PUT(bpe->unk);
      unknown = false;
      PUT(id);
    } else if (fall_back(bpe, text + i, n_bytes, bytes)) {
      for (size_t k = 0; k < n_bytes; k++) PUT(bytes[k]);
    } else if (bpe->unk >= 0) {
      if (unknown && !bpe->fuse_unk) PUT(bpe->unk);
      unknown = true;
    }
  }
  if (unknown) PUT(bpe->unk);
#undef PUT
  return n;
}

/* Appends ids, the internal ones among them as bytes or unknown tokens. */
static enum qtr_status append_ids(const struct qtr_bpe *bpe, const int32_t *data, size_t n, struct qtr_ids *ids,
                                  struct qtr_error *err) {
  if (bpe->n_public == bpe->vocab->n_tokens) return qtr_ids_append(ids, data, n, err);
  enum qtr_status status = QTR_OK;
  for (size_t i = 0; i < n && !status; i++) {
    int32_t id = data[i], bytes[4];
    if (id >= bpe->n_public) {
      size_t len;
      const char *text = qtr_vocab_text(bpe->vocab, id, &len);
      if (fall_back(bpe, text, len, bytes)) {
        status = qtr_ids_append(ids, bytes, len, err);
        continue;
      }
      id = bpe->unk;
    }
    if (id < 0 || (bpe->fuse_unk_last && id == bpe->unk && ids->n > 0 && ids->data[ids->n - 1] == bpe->unk)) continue;
    status = qtr_ids_append(ids, &id, 1, err);
  }
  return status;
}

/* ---- short words --------------------------------------------------------------------------------- */

/* Merges ids[0..n) in place by looking for the lowest rank again and again; returns how many are left. */
static size_t merge_short(const struct qtr_bpe *bpe, int32_t *ids, size_t n) {
  uint32_t ranks[SHORT_WORD];
  int32_t merged[SHORT_WORD];
  for (size_t i = 0; i + 1 < n; i++) {
    const struct qtr_merge *merge = find_merge(bpe, ids[i], ids[i + 1]);
    ranks[i] = merge ? merge->rank : NONE;
    merged[i] = merge ? merge->id : -1;
  }
  while (n > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < n; i++) {
      if (ranks[i] < ranks[best]) best = i;
    }
    if (ranks[best] == NONE) break;
    ids[best] = merged[best];
    n--;
    memmove(ids + best + 1, ids + best + 2, (n - best - 1) * sizeof *ids);
    if (n > best + 1) {
      memmove(ranks + best, ranks + best + 1, (n - best - 1) * sizeof *ranks);
      memmove(merged + best, merged + best + 1, (n - best - 1) * sizeof *merged);
    }
    for (size_t i = best > 0 ? best - 1 : 0; i <= best && i + 1 < n; i++) {
      const struct qtr_merge *merge = find_merge(bpe, ids[i], ids[i + 1]);
      ranks[i] = merge ? merge->rank : NONE;
      merged[i] = merge ? merge->id : -1;
    }
  }
  return n;
}

/* ---- long words ---------------------------------------------------------------------------------- */

static enum qtr_status heap_reserve(struct heap *heap, size_t n, struct qtr_error *err) {
  if (n <= heap->capacity) return QTR_OK;
  size_t capacity = QTR_MAX(QTR_MAX(64, n), heap->capacity + heap->capacity / 2);
  uint64_t *keys = realloc(heap->keys, capacity * sizeof *keys);
  if (!keys) return qtr_fail_memory(err, "merging", capacity * sizeof *keys);
  heap->keys = keys;
  heap->capacity = capacity;
  return QTR_OK;
}

static enum qtr_status heap_push(struct heap *heap, uint64_t key, struct qtr_error *err) {
  enum qtr_status status = heap_reserve(heap, heap->n + 1, err);
  if (status) return status;
  size_t i = heap->n++;
  for (; i > 0 && heap->keys[(i - 1) / 4] > key; i = (i - 1) / 4) heap->keys[i] = heap->keys[(i - 1) / 4];
  heap->keys[i] = key;
  return QTR_OK;
}

static void heap_pop(struct heap *heap) {
  uint64_t key = heap->keys[--heap->n];
  size_t i = 0;
  for (;;) {
    size_t child = 4 * i + 1, end = QTR_MIN(child + 4, heap->n);
    if (child >= heap->n) break;
    for (size_t k = child + 1; k < end; k++) {
      if (heap->keys[k] < heap->keys[child]) child = k;
    }
    if (heap->keys[child] >= key) break;
    heap->keys[i] = heap->keys[child];
    i = child;
  }
  heap->keys[i] = key;
}

static void unlink_pair(struct qtr_bpe_work *work, uint32_t at) {
  struct symbol *s = &work->symbols[at];
  if (s->rank == NONE || s->list_previous == IN_HEAP) return; /* the heap finds out when the key comes up */
  struct rank_list *list = &work->lists[s->rank];
  if (s->list_previous == NONE) {
    list->head = s->list_next;
  } else {
    work->symbols[s->list_previous].list_next = s->list_next;
  }
  if (s->list_next == NONE) {
    list->tail = s->list_previous;
  } else {
    work->symbols[s->list_next].list_previous = s->list_previous;
  }
}

/* Sets the rank of the pair that starts at `at` and queues it. */
static enum qtr_status queue_pair(const struct qtr_bpe *bpe, struct qtr_bpe_work *work, bool use_lists, uint32_t at,
                                  struct qtr_error *err) {
  struct symbol *s = &work->symbols[at];
  unlink_pair(work, at);
  const struct qtr_merge *merge = s->next == NONE ? NULL : find_merge(bpe, s->id, work->symbols[s->next].id);
  s->rank = merge ? merge->rank : NONE;
  if (!merge) return QTR_OK;
  struct rank_list *list = use_lists ? &work->lists[s->rank] : NULL;
  if (!list || (list->head != NONE && list->tail > at)) {
    s->list_previous = IN_HEAP;
    return heap_push(&work->pairs, (uint64_t)s->rank << 32 | at, err);
  }
  s->list_next = NONE;
  s->list_previous = list->head == NONE ? NONE : list->tail;
  if (list->head == NONE) {
    list->head = at;
  } else {
    work->symbols[list->tail].list_next = at;
  }
  list->tail = at;
  if (list->queued) return QTR_OK;
  list->queued = true;
  return heap_push(&work->ranks, (uint64_t)s->rank << 32, err);
}

/* The queued pair of lowest rank and position, taken out of its queue; NONE when there is none. */
static uint32_t next_pair(struct qtr_bpe_work *work) {
  uint64_t listed = UINT64_MAX;
  while (work->ranks.n > 0) {
    struct rank_list *list = &work->lists[work->ranks.keys[0] >> 32];
    if (list->head != NONE) {
      listed = work->ranks.keys[0] | list->head;
      break;
    }
    list->queued = false;
    heap_pop(&work->ranks);
  }
  while (work->pairs.n > 0 && work->pairs.keys[0] < listed) {
    uint64_t key = work->pairs.keys[0];
    heap_pop(&work->pairs);
    const struct symbol *s = &work->symbols[(uint32_t)key];
    if (s->id >= 0 && s->rank == key >> 32 && s->list_previous == IN_HEAP) return (uint32_t)key;
  }
  return listed == UINT64_MAX ? NONE : (uint32_t)listed;
}

static enum qtr_status make_lists(const struct qtr_bpe *bpe, struct qtr_bpe_work *work, struct qtr_error *err) {
  work->lists = malloc(bpe->n_ranks * sizeof *work->lists);
  if (!work->lists) return qtr_fail_memory(err, "merging", bpe->n_ranks * sizeof *work->lists);
  for (uint32_t i = 0; i < bpe->n_ranks; i++) work->lists[i] = (struct rank_list){NONE, NONE, false};
  return QTR_OK;
}

static enum qtr_status encode_long(const struct qtr_bpe *bpe, struct qtr_bpe_work *work, const char *text, size_t len,
                                   struct qtr_ids *ids, struct qtr_error *err) {
  enum qtr_status status = QTR_OK;
  if (len > work->n_symbols) {
    free(work->symbols);
    work->n_symbols = 0;
    work->symbols = malloc(len * sizeof *work->symbols);
    if (!work->symbols) return qtr_fail_memory(err, "merging", len * sizeof *work->symbols);
    work->n_symbols = len;
  }
  struct symbol *s = work->symbols;
  size_t n = initial_ids(bpe, text, len, &s[0].id, sizeof *s);
  bool use_lists = n >= LISTS_FROM && bpe->n_ranks > 0;
  if (use_lists && !work->lists) status = make_lists(bpe, work, err);
  for (size_t i = 0; i < n; i++) {
    s[i].previous = i == 0 ? NONE : (uint32_t)(i - 1);
    s[i].next = i + 1 == n ? NONE : (uint32_t)(i + 1);
    s[i].rank = NONE;
  }
  for (size_t i = 0; i < n && !status; i++) status = queue_pair(bpe, work, use_lists, (uint32_t)i, err);
  for (uint32_t at; !status && (at = next_pair(work)) != NONE;) {
    unlink_pair(work, at);
    uint32_t right = s[at].next, previous = s[at].previous;
    s[at].id = find_merge(bpe, s[at].id, s[right].id)->id;
    s[at].next = s[right].next;
    s[at].rank = NONE;
    unlink_pair(work, right);
    s[right].rank = NONE;
    s[right].id = -1;
    if (s[at].next != NONE) s[s[at].next].previous = at;
    if (previous != NONE) status = queue_pair(bpe, work, use_lists, previous, err);
    if (!status) status = queue_pair(bpe, work, use_lists, at, err);
  }
  for (uint32_t i = 0; !status && n > 0 && i != NONE; i = s[i].next) status = append_ids(bpe, &s[i].id, 1, ids, err);
  return status;
}

/* ---- words --------------------------------------------------------------------------------------- */

static enum qtr_status encode_word(const struct qtr_bpe *bpe, struct qtr_bpe_work *work, const char *text, size_t len,
                                   struct qtr_ids *ids, struct qtr_error *err) {
  if (len > SHORT_WORD) return encode_long(bpe, work, text, len, ids, err);
  struct cached_word *cached = NULL;
  if (len <= CACHE_KEY && ++work->n_words > 256) {
    if (!work->cache && !(work->cache = calloc(CACHE_WORDS, sizeof *work->cache))) {
      return qtr_fail_memory(err, "the word cache", CACHE_WORDS * sizeof *work->cache);
    }
    cached = &work->cache[qtr_text_hash(text, len) % CACHE_WORDS];
    if (cached->len == len && memcmp(cached->key, text, len) == 0)
      return append_ids(bpe, cached->ids, cached->n_ids, ids, err);
  }
  int32_t found[SHORT_WORD];
  size_t n = merge_short(bpe, found, initial_ids(bpe, text, len, found, sizeof *found));
  if (cached && n <= CACHE_IDS) {
    cached->len = (uint8_t)len;
    cached->n_ids = (uint8_t)n;
    memcpy(cached->key, text, len);
    memcpy(cached->ids, found, n * sizeof *found);
  }
  return append_ids(bpe, found, n, ids, err);
}

enum qtr_status qtr_bpe_encode(const struct qtr_bpe *bpe, struct qtr_bpe_work *work, const char *text, size_t len,
                               struct qtr_ids *ids, struct qtr_error *err) {
  if (len == 0) return QTR_OK;
  if (bpe->ignore_merges) {
    int32_t id = qtr_vocab_find_model(bpe->vocab, text, len);
    if (id >= 0) return append_ids(bpe, &id, 1, ids, err);
  }
  enum qtr_status status = QTR_OK;
  size_t start = 0;
  for (size_t i = 3; bpe->cut_at_spaces && i + 3 <= len && !status; i++) {
    const char *mark = qtr_text_find(text + i, len - i, SPACE_MARK, 3);
    if (!mark) break;
    i = (size_t)(mark - text);
    if (starts_with_mark(text + i - 3, 3)) continue;
    status = encode_word(bpe, work, text + start, i - start, ids, err);
    start = i;
  }
  return status ? status : encode_word(bpe, work, text + start, len - start, ids, err);
}

enum qtr_status qtr_bpe_work_new(struct qtr_bpe_work **work, struct qtr_error *err) {
  *work = calloc(1, sizeof **work);
  return *work ? QTR_OK : qtr_fail_memory(err, "encoding", sizeof **work);
}

void qtr_bpe_work_free(struct qtr_bpe_work *work) {
  if (!work) return;
  free(work->symbols);
  free(work->lists);
  free(work->pairs.keys);
  free(work->ranks.keys);
  free(work->cache);
  free(work);
}
