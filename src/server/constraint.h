/* constraint.h - a grammar over bytes as the set of tokens that may come next (struct qtr_constraint of quattuor.h). */
#ifndef QTR_SERVER_CONSTRAINT_H
#define QTR_SERVER_CONSTRAINT_H

#include "quattuor/quattuor.h"
#include "server/grammar.h"

/* The vocabulary in the order of its tokens' bytes. Made once, then only read. */
struct qtr_vocabulary;
struct qtr_tokenizer;
enum qtr_status qtr_vocabulary_create(const struct qtr_tokenizer *tokenizer, const int32_t *eos, int32_t n_eos,
                                      int32_t vocab_size, struct qtr_vocabulary **vocabulary, struct qtr_error *err);
void qtr_vocabulary_free(struct qtr_vocabulary *vocabulary); /* NULL is allowed */

/* A grammar with the masks of the states it was in: serves any number of completions, of one engine. Takes the grammar. */
struct qtr_masks;
struct qtr_masks *qtr_masks_create(struct qtr_grammar *grammar,
                                   const struct qtr_vocabulary *vocabulary); /* NULL: no memory */
void qtr_masks_unref(struct qtr_masks *masks);                               /* NULL is allowed */
/* For struct qtr_request_options. The masks must live until the request's last event. */
struct qtr_constraint qtr_masks_constraint(struct qtr_masks *masks);

/* The grammars used last, by a text that describes them: requests with the same schema find their masks made. Any thread. */
struct qtr_mask_cache;
struct qtr_mask_cache *qtr_mask_cache_create(void);                                   /* NULL: no memory */
void qtr_mask_cache_free(struct qtr_mask_cache *cache);                               /* NULL is allowed */
struct qtr_masks *qtr_mask_cache_find(struct qtr_mask_cache *cache, const char *key); /* a reference, or NULL */
void qtr_mask_cache_add(struct qtr_mask_cache *cache, const char *key, struct qtr_masks *masks);

#endif
