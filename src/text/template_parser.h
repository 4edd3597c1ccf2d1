/* template_parser.h - what the parser files share: template_nodes.c (tokens, nodes, names), template_expressions.c and
 * template_statements.c. Errors are sticky: after the first one nothing is allocated and every function returns NULL or
 * false. */
#ifndef QTR_TEXT_TEMPLATE_PARSER_H
#define QTR_TEXT_TEMPLATE_PARSER_H

#include "text/template_internal.h"

struct parser {
  struct qtr_template *tpl;
  struct qtr_error *err;
  const struct token *t; /* the current token; the last one is T_EOF */
  int nest;
  int loops;              /* loops around the current statement, for break and continue */
  uint32_t n_loop_stores; /* assignments to the name "loop" so far */
  struct params *params;  /* of the macro being read: notes whether its body uses caller, kwargs, varargs */
  uint32_t *name_index;   /* (name_index_size) hash table: name id + 1 */
  size_t name_index_size;
  uint32_t names_capacity;
  bool failed;
  enum qtr_status status;
};

/* template_nodes.c */
void *qtr_tpl_parser_fail(struct parser *p, enum qtr_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));                         /* always NULL */
void *qtr_tpl_parser_expected(struct parser *p, const char *what); /* "expected ..., found ..."; always NULL */
const char *qtr_tpl_token_describe(const struct token *t, char text[48]);
bool qtr_tpl_parser_enter(struct parser *p); /* one level deeper; false past TPL_MAX_NEST */
void qtr_tpl_parser_leave(struct parser *p);
void *qtr_tpl_parser_alloc(struct parser *p, size_t n_bytes); /* zeroed, in the template's arena */
struct node *qtr_tpl_node_make(struct parser *p, enum node_kind kind);
struct node *qtr_tpl_node_const_string(struct parser *p, enum node_kind kind, const char *data, size_t len);
bool qtr_tpl_node_add(struct parser *p, struct node_list *list, struct node *n); /* false for a NULL node, too */
struct node *qtr_tpl_node_finish(struct parser *p, struct node *n); /* every node ends here: checks the tree's height */
struct str *qtr_tpl_node_str(struct parser *p, const char *data, size_t len);   /* does not copy */
uint32_t qtr_tpl_parser_intern(struct parser *p, const char *name, size_t len); /* the id of an identifier */

/* template_expressions.c */
enum tuple_kind { TUPLE_EXPRESSIONS, TUPLE_NO_COND, TUPLE_TARGETS, TUPLE_NS_TARGETS };
struct node *qtr_tpl_parse_expression(struct parser *p);
/* One expression, or several with commas as a tuple. end_name: a name that ends it, too. */
struct node *qtr_tpl_parse_tuple(struct parser *p, enum tuple_kind kind, const char *end_name, bool parenthesised);
struct node *qtr_tpl_parse_filters(struct parser *p,
                                   struct node *input); /* after the first '|'; input NULL: a block's text */

/* the current token */
static inline bool is(const struct parser *p, enum token_type type) { return p->t->type == type; }
static inline bool token_is_name(const struct token *t, const char *name) {
  return t->type == T_NAME && t->len == strlen(name) && memcmp(t->text, name, t->len) == 0;
}
static inline bool is_name(const struct parser *p, const char *name) { return token_is_name(p->t, name); }
static inline void next(struct parser *p) {
  if (p->t->type != T_EOF) p->t++;
}
static inline bool skip_if(struct parser *p, enum token_type type) {
  bool yes = is(p, type);
  if (yes) next(p);
  return yes;
}
static inline bool skip_if_name(struct parser *p, const char *name) {
  bool yes = is_name(p, name);
  if (yes) next(p);
  return yes;
}
static inline bool expect(struct parser *p, enum token_type type, const char *what) {
  if (p->failed) return false;
  if (!is(p, type)) return qtr_tpl_parser_expected(p, what) != NULL;
  next(p);
  return true;
}

#endif
