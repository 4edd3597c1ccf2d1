/* grammar.h - context-free grammars over bytes, and an automaton that runs them: made rule by rule, then asked byte by byte.
 * The automaton is a deterministic one, built as it is used: a state is a set of stacks of a pushdown automaton. Bounded: a
 * grammar that is too large, too deep or too ambiguous fails, it never runs away. One thread at a time. */
#ifndef QTR_SERVER_GRAMMAR_H
#define QTR_SERVER_GRAMMAR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct qtr_grammar;

struct qtr_grammar *qtr_grammar_create(void);         /* NULL: out of memory */
void qtr_grammar_free(struct qtr_grammar *g);         /* NULL is allowed */
bool qtr_grammar_failed(const struct qtr_grammar *g); /* a limit was passed or memory ran out: everything answers "dead" */

/* ---- making: rules have alternatives, alternatives are sequences ---- */
int32_t qtr_grammar_rule(struct qtr_grammar *g);             /* a new rule; 0 is the first and the start */
void qtr_grammar_begin(struct qtr_grammar *g, int32_t rule); /* a further alternative of the rule: what is put follows */
void qtr_grammar_put_bytes(struct qtr_grammar *g, const char *bytes, size_t len);
/* One byte out of these ranges: pairs "azAZ" = a…z, A…Z (n bytes, even). */
void qtr_grammar_put_set(struct qtr_grammar *g, const char *ranges, size_t n);
void qtr_grammar_put_rule(struct qtr_grammar *g, int32_t rule);
void qtr_grammar_end(struct qtr_grammar *g);
/* One alternative that is a text, or a rule. */
void qtr_grammar_alternative(struct qtr_grammar *g, int32_t rule, const char *text);
/* A rule for min to max of `item` (max < 0: no upper bound). */
int32_t qtr_grammar_repeat(struct qtr_grammar *g, int32_t item, int32_t min, int32_t max);

/* Takes out what can never end: alternatives with a rule that no text fits. After this every state that is reached leads to
 * an end. To be called when all is made. */
void qtr_grammar_prune(struct qtr_grammar *g);

/* ---- running ---- */
enum { QTR_GRAMMAR_DEAD = -1, QTR_GRAMMAR_UNKNOWN = -2 };
int32_t qtr_grammar_start(struct qtr_grammar *g);
int32_t qtr_grammar_next(struct qtr_grammar *g, int32_t state, unsigned char byte);
/* (256) what follows each byte where it is known already, else QTR_GRAMMAR_UNKNOWN: for loops over many bytes. NULL before
 * the state was first asked; stays where it is as long as the grammar lives. */
const int32_t *qtr_grammar_row(const struct qtr_grammar *g, int32_t state);
bool qtr_grammar_accepts(const struct qtr_grammar *g, int32_t state); /* may the text end here? */
int32_t qtr_grammar_states(const struct qtr_grammar *g);              /* how many there are so far */
size_t qtr_grammar_bytes(const struct qtr_grammar *g);                /* memory in use, roughly */

#endif
