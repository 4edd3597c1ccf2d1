/* added.h - added tokens: strings that are cut out of the text before anything else looks at it. How each is matched is in
 * its flags in the vocabulary. Private to src/text. */
#ifndef QTR_TEXT_ADDED_H
#define QTR_TEXT_ADDED_H

#include "text/vocab.h"

/* A byte trie; node 0 is the root. */
struct qtr_trie {
  struct qtr_trie_node {
    uint32_t child, sibling; /* 0 = none */
    int32_t id;              /* of the token that ends here, -1 = none */
    uint8_t byte;
  } * nodes;
  uint32_t n_nodes, capacity;
  uint32_t first[256]; /* the root's child for each byte, 0 = none */
};

/* Makes token `id` match `text`; an earlier token with the same text stays. */
enum qtr_status qtr_trie_put(struct qtr_trie *trie, const char *text, size_t len, int32_t id, struct qtr_error *err);
void qtr_trie_free(struct qtr_trie *trie);

/* Cuts text[0..len) into ordinary stretches (id -1) and added tokens with the spaces they strip, and calls `part` for each
 * that is not empty. Special tokens count only with parse_special. */
typedef enum qtr_status qtr_added_part_fn(void *context, const char *text, size_t begin, size_t end, int32_t id,
                                          struct qtr_error *err);
enum qtr_status qtr_added_split(const struct qtr_vocab *vocab, const struct qtr_trie *trie, bool parse_special,
                                const char *text, size_t len, qtr_added_part_fn *part, void *context, struct qtr_error *err);

#endif
