/* added.c - finding added tokens in a text (added.h): at every place the longest token that starts there, as the reference's
 * leftmost-longest automaton finds them. */
#include "text/added.h"

#include "base/checked.h"
#include "base/status.h"
#include "text/unicode.h"

#include <stdlib.h>
#include <string.h>

static enum qtr_status new_node(struct qtr_trie *trie, uint8_t byte, uint32_t *node, struct qtr_error *err) {
  if (trie->n_nodes == trie->capacity) {
    uint32_t capacity = trie->capacity ? trie->capacity * 2 : 1024;
    if (capacity > (uint32_t)1 << 28) return qtr_fail(err, QTR_ERR_FORMAT, "the added tokens are too long together");
    struct qtr_trie_node *nodes = realloc(trie->nodes, capacity * sizeof *nodes);
    if (!nodes) return qtr_fail_memory(err, "added tokens", capacity * sizeof *nodes);
    trie->nodes = nodes;
    trie->capacity = capacity;
  }
  *node = trie->n_nodes++;
  trie->nodes[*node] = (struct qtr_trie_node){0, 0, -1, byte};
  return QTR_OK;
}

enum qtr_status qtr_trie_put(struct qtr_trie *trie, const char *text, size_t len, int32_t id, struct qtr_error *err) {
  if (len == 0) return QTR_OK;
  enum qtr_status status = QTR_OK;
  uint32_t node = 0, next;
  if (trie->n_nodes == 0) status = new_node(trie, 0, &node, err);
  node = 0;
  for (size_t i = 0; i < len && !status; i++) {
    uint8_t byte = (uint8_t)text[i];
    next = i == 0 ? trie->first[byte] : trie->nodes[node].child;
    while (i > 0 && next && trie->nodes[next].byte != byte) next = trie->nodes[next].sibling;
    if (!next) {
      status = new_node(trie, byte, &next, err);
      if (status) break;
      if (i == 0) {
        trie->first[byte] = next;
      } else {
        trie->nodes[next].sibling = trie->nodes[node].child;
        trie->nodes[node].child = next;
      }
    }
    node = next;
  }
  if (!status && trie->nodes[node].id < 0) trie->nodes[node].id = id;
  return status;
}

void qtr_trie_free(struct qtr_trie *trie) {
  free(trie->nodes);
  *trie = (struct qtr_trie){0};
}

/* The longest token that starts at text: its id and length; -1 when none does. */
static int32_t longest_match(const struct qtr_trie *trie, const char *text, size_t len, size_t *n_bytes) {
  uint32_t node = trie->first[(uint8_t)text[0]];
  int32_t best = -1;
  for (size_t i = 1; node; i++) {
    if (trie->nodes[node].id >= 0) {
      best = trie->nodes[node].id;
      *n_bytes = i;
    }
    if (i == len) break;
    uint8_t byte = (uint8_t)text[i];
    node = trie->nodes[node].child;
    while (node && trie->nodes[node].byte != byte) node = trie->nodes[node].sibling;
  }
  return best;
}

static bool is_single_word(const char *text, size_t len, size_t begin, size_t end) {
  size_t n_bytes;
  if (begin > 0 && qtr_is_word(qtr_utf8_next(text + qtr_utf8_previous(text, begin), &n_bytes))) return false;
  return end == len || !qtr_is_word(qtr_utf8_next(text + end, &n_bytes));
}

enum qtr_status qtr_added_split(const struct qtr_vocab *vocab, const struct qtr_trie *trie, bool parse_special,
                                const char *text, size_t len, qtr_added_part_fn *part, void *context,
                                struct qtr_error *err) {
  size_t done = 0, n_bytes = 0;
  enum qtr_status status = QTR_OK;
  for (size_t i = 0; i < len && trie->n_nodes > 0 && !status;) {
    int32_t id = trie->first[(uint8_t)text[i]] ? longest_match(trie, text + i, len - i, &n_bytes) : -1;
    if (id < 0) {
      i++;
      continue;
    }
    uint32_t flags = vocab->tokens[id].flags;
    size_t begin = i, end = i + n_bytes;
    i = end; /* what a refused match covers is not looked at again either */
    if ((flags & QTR_TOKEN_SPECIAL) && !parse_special) continue;
    if ((flags & QTR_TOKEN_SINGLE_WORD) && !is_single_word(text, len, begin, end)) continue;
    while ((flags & QTR_TOKEN_LSTRIP) && begin > done) {
      size_t previous = qtr_utf8_previous(text, begin);
      if (!qtr_is_space(qtr_utf8_next(text + previous, &n_bytes))) break;
      begin = previous;
    }
    while ((flags & QTR_TOKEN_RSTRIP) && end < len && qtr_is_space(qtr_utf8_next(text + end, &n_bytes))) end += n_bytes;
    if (begin > done) status = part(context, text, done, begin, -1, err);
    if (!status) status = part(context, text, begin, end, id, err);
    done = QTR_MAX(done, end);
  }
  return status || done == len ? status : part(context, text, done, len, -1, err);
}
