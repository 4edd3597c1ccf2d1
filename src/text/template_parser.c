/* template_parser.c - tokens to syntax tree, production by production as jinja2's own parser, so that precedence and the odd
 * corners (filters bind tighter than unary minus, `is` takes a bare argument, …) agree. Recursion is bounded by
 * TPL_MAX_NEST, the height of the tree by TPL_MAX_NODE_DEPTH. Not here, and refused by name: extends, include, import,
 * block, autoescape, recursive loops. */
#include "text/template_internal.h"

#include <stdio.h>
#include <stdlib.h>

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

static struct node *parse_expression(struct parser *p);
static struct node *parse_or(struct parser *p);
static struct node *parse_unary(struct parser *p, bool with_filter);
static struct node *parse_primary(struct parser *p, bool with_namespace);
static bool parse_body(struct parser *p, const char *const *ends, struct node_list *body);

/* ---- errors and tokens ------------------------------------------------------------------------------------------------ */

__attribute__((format(printf, 3, 4))) static void *fail(struct parser *p, enum qtr_status status, const char *format, ...) {
  if (p->failed) return NULL;
  char text[300];
  va_list args;
  va_start(args, format);
  (void)vsnprintf(text, sizeof text, format, args);
  va_end(args);
  p->failed = true;
  p->status = qtr_fail(p->err, status, "template line %d: %s", (int)p->t->line, text);
  return NULL;
}

static const char *describe(const struct token *t, char text[48]) {
  static const char *const names[] = {[T_EOF] = "end of template", [T_DATA] = "text",       [T_VARIABLE_BEGIN] = "{{",
                                      [T_VARIABLE_END] = "}}",     [T_BLOCK_BEGIN] = "{%",  [T_BLOCK_END] = "%}",
                                      [T_STRING] = "string",       [T_INTEGER] = "integer", [T_FLOAT] = "float"};
  if (t->type == T_NAME || t->type > T_FLOAT) return qtr_printable(t->text, t->len, text, 48);
  return names[t->type];
}

static void *fail_expected(struct parser *p, const char *what) {
  char text[48];
  return fail(p, QTR_ERR_FORMAT, "expected %s, found '%s'", what, describe(p->t, text));
}

static bool is(const struct parser *p, enum token_type type) { return p->t->type == type; }
static bool token_is_name(const struct token *t, const char *name) {
  return t->type == T_NAME && t->len == strlen(name) && memcmp(t->text, name, t->len) == 0;
}
static bool is_name(const struct parser *p, const char *name) { return token_is_name(p->t, name); }
static void next(struct parser *p) {
  if (p->t->type != T_EOF) p->t++;
}
static bool skip_if(struct parser *p, enum token_type type) {
  bool yes = is(p, type);
  if (yes) next(p);
  return yes;
}
static bool skip_if_name(struct parser *p, const char *name) {
  bool yes = is_name(p, name);
  if (yes) next(p);
  return yes;
}
static bool expect(struct parser *p, enum token_type type, const char *what) {
  if (p->failed) return false;
  if (!is(p, type)) return fail_expected(p, what) != NULL;
  next(p);
  return true;
}

static bool enter(struct parser *p) {
  if (p->failed) return false;
  if (++p->nest > TPL_MAX_NEST) {
    (void)fail(p, QTR_ERR_LIMIT, "nested more than %d levels deep", TPL_MAX_NEST);
    return false;
  }
  return true;
}
static void leave(struct parser *p) { p->nest--; }

/* ---- nodes
 * ---------------------------------------------------------------------------------------------------------------- */

static void *alloc(struct parser *p, size_t n_bytes) {
  void *memory = p->failed ? NULL : qtr_tpl_arena_alloc(&p->tpl->arena, n_bytes);
  if (!memory) return fail(p, QTR_ERR_LIMIT, "the template needs more than %zu bytes of memory", TPL_MAX_PARSE_ARENA);
  memset(memory, 0, n_bytes);
  return memory;
}

static struct node *make(struct parser *p, enum node_kind kind) {
  struct node *n = alloc(p, sizeof *n);
  if (!n) return NULL;
  n->kind = (uint8_t)kind;
  n->line = p->t->line;
  return n;
}

static bool list_add(struct parser *p, struct node_list *list, struct node *n) {
  if (!n || p->failed) return false;
  if (list->n == list->capacity) {
    uint32_t capacity = list->capacity ? list->capacity * 2 : 4;
    struct node **items = alloc(p, capacity * sizeof *items);
    if (!items) return false;
    if (list->n) memcpy(items, list->items, list->n * sizeof *items);
    list->items = items;
    list->capacity = capacity;
  }
  list->items[list->n++] = n;
  return true;
}

static void raise_depth(uint16_t *depth, const struct node *child) {
  if (child && child->depth >= *depth) *depth = (uint16_t)(child->depth + 1);
}
static void raise_depth_list(uint16_t *depth, const struct node_list *list) {
  for (uint32_t i = 0; i < list->n; i++) raise_depth(depth, list->items[i]);
}

/* Every finished node goes through here: the height of the tree is what the evaluator's recursion depends on. */
static struct node *finish(struct parser *p, struct node *n) {
  if (!n || p->failed) return NULL;
  uint16_t depth = 1;
  raise_depth(&depth, n->a);
  raise_depth(&depth, n->b);
  raise_depth(&depth, n->c);
  raise_depth_list(&depth, &n->items);
  raise_depth_list(&depth, &n->other);
  if ((n->kind == N_CALL || n->kind == N_FILTER || n->kind == N_TEST) && n->args) {
    raise_depth_list(&depth, &n->args->positional);
    raise_depth_list(&depth, &n->args->keyword);
    raise_depth(&depth, n->args->star);
    raise_depth(&depth, n->args->star_star);
  }
  if (depth > TPL_MAX_NODE_DEPTH) return fail(p, QTR_ERR_LIMIT, "an expression of more than %d levels", TPL_MAX_NODE_DEPTH);
  n->depth = depth;
  return n;
}

static struct node *make2(struct parser *p, enum node_kind kind, int32_t line, struct node *a, struct node *b) {
  if (!a || !b) return NULL;
  struct node *n = make(p, kind);
  if (!n) return NULL;
  n->line = line;
  n->a = a;
  n->b = b;
  return finish(p, n);
}

static struct str *make_str(struct parser *p, const char *data, size_t len) {
  struct str *s = alloc(p, sizeof *s);
  if (!s) return NULL;
  *s = (struct str){.data = data, .len = len, .n_chars = -1};
  (void)qtr_tpl_n_chars(s); /* counted now: a parsed template never changes, several threads render it */
  return s;
}

static uint64_t hash_bytes(const char *data, size_t len) {
  uint64_t h = 1469598103934665603u;
  for (size_t i = 0; i < len; i++) h = (h ^ (uint8_t)data[i]) * 1099511628211u;
  return h ^ (h >> 29);
}

/* The id of an identifier: its place in tpl->names. */
static uint32_t intern(struct parser *p, const char *name, size_t len) {
  struct qtr_template *tpl = p->tpl;
  if (tpl->n_names == p->names_capacity) {
    uint32_t capacity = p->names_capacity ? p->names_capacity * 2 : 64;
    struct str **names = alloc(p, capacity * sizeof *names);
    if (!names) return 0;
    if (tpl->n_names) memcpy(names, tpl->names, tpl->n_names * sizeof *names);
    tpl->names = names;
    p->names_capacity = capacity;
    p->name_index_size = (size_t)capacity * 2; /* a power of two, at most half full */
    p->name_index = alloc(p, p->name_index_size * sizeof *p->name_index);
    if (!p->name_index) return 0;
    for (uint32_t i = 0; i < tpl->n_names; i++) {
      size_t at = hash_bytes(names[i]->data, names[i]->len) & (p->name_index_size - 1);
      while (p->name_index[at]) at = (at + 1) & (p->name_index_size - 1);
      p->name_index[at] = i + 1;
    }
  }
  size_t at = hash_bytes(name, len) & (p->name_index_size - 1);
  for (; p->name_index[at]; at = (at + 1) & (p->name_index_size - 1)) {
    const struct str *known = tpl->names[p->name_index[at] - 1];
    if (known->len == len && memcmp(known->data, name, len) == 0) return p->name_index[at] - 1;
  }
  struct str *s = make_str(p, name, len);
  if (!s) return 0;
  tpl->names[tpl->n_names] = s;
  p->name_index[at] = tpl->n_names + 1;
  return tpl->n_names++;
}

static struct node *make_name(struct parser *p, const struct token *t) {
  struct node *n = make(p, N_NAME);
  if (!n) return NULL;
  n->line = t->line;
  n->name = intern(p, t->text, t->len);
  if (p->params) {
    p->params->uses_varargs |= token_is_name(t, "varargs");
    p->params->uses_kwargs |= token_is_name(t, "kwargs");
    p->params->uses_caller |= token_is_name(t, "caller");
  }
  return finish(p, n);
}

static struct node *make_const(struct parser *p, struct value v) {
  struct node *n = make(p, N_CONST);
  if (!n) return NULL;
  n->value = v;
  return finish(p, n);
}

static struct node *make_const_string(struct parser *p, enum node_kind kind, const char *data, size_t len) {
  struct node *n = make(p, kind);
  if (!n) return NULL;
  n->value = (struct value){.type = V_STRING, .s = make_str(p, data, len)};
  return finish(p, n);
}

/* ---- expressions
 * ---------------------------------------------------------------------------------------------------------- */

static bool is_tuple_end(const struct parser *p, const char *end_name) {
  return is(p, T_VARIABLE_END) || is(p, T_BLOCK_END) || is(p, T_RPAREN) || (end_name && is_name(p, end_name));
}

enum tuple_kind { TUPLE_EXPRESSIONS, TUPLE_NO_COND, TUPLE_TARGETS, TUPLE_NS_TARGETS };

static struct node *parse_tuple(struct parser *p, enum tuple_kind kind, const char *end_name, bool parenthesised) {
  struct node *tuple = make(p, N_TUPLE), *first = NULL;
  if (!tuple) return NULL;
  bool is_tuple = false;
  while (true) {
    if (tuple->items.n > 0 && !expect(p, T_COMMA, "','")) return NULL;
    if (is_tuple_end(p, end_name)) break;
    first = kind == TUPLE_EXPRESSIONS ? parse_expression(p)
            : kind == TUPLE_NO_COND   ? parse_or(p)
                                      : parse_primary(p, kind == TUPLE_NS_TARGETS);
    if (!list_add(p, &tuple->items, first)) return NULL;
    if (!is(p, T_COMMA)) break;
    is_tuple = true;
  }
  if (!is_tuple) {
    if (tuple->items.n == 1) return first;
    if (!parenthesised) return fail_expected(p, "an expression");
  }
  return finish(p, tuple);
}

static struct node *parse_list(struct parser *p) {
  struct node *n = make(p, N_LIST);
  if (!n) return NULL;
  next(p);
  while (!is(p, T_RBRACKET)) {
    if (n->items.n > 0 && !expect(p, T_COMMA, "',' or ']'")) return NULL;
    if (is(p, T_RBRACKET)) break;
    if (!list_add(p, &n->items, parse_expression(p))) return NULL;
  }
  next(p);
  return finish(p, n);
}

static struct node *parse_dict(struct parser *p) {
  struct node *n = make(p, N_DICT);
  if (!n) return NULL;
  next(p);
  while (!is(p, T_RBRACE)) {
    if (n->items.n > 0 && !expect(p, T_COMMA, "',' or '}'")) return NULL;
    if (is(p, T_RBRACE)) break;
    if (!list_add(p, &n->items, parse_expression(p)) || !expect(p, T_COLON, "':'") ||
        !list_add(p, &n->items, parse_expression(p))) {
      return NULL;
    }
  }
  next(p);
  return finish(p, n);
}

static struct node *parse_strings(struct parser *p) {
  const struct token *first = p->t;
  size_t len = 0, n = 0;
  for (; is(p, T_STRING); next(p), n++) len += p->t->len;
  if (n == 1) return make_const_string(p, N_CONST, first->text, len);
  char *text = alloc(p, len + 1);
  if (!text) return NULL;
  size_t at = 0;
  for (const struct token *t = first; t != p->t; t++) {
    memcpy(text + at, t->text, t->len);
    at += t->len;
  }
  return make_const_string(p, N_CONST, text, len);
}

static struct node *parse_primary(struct parser *p, bool with_namespace) {
  if (!enter(p)) return NULL;
  const struct token *t = p->t;
  struct node *n = NULL;
  switch (t->type) {
    case T_NAME:
      next(p);
      if (token_is_name(t, "true") || token_is_name(t, "True")) {
        n = make_const(p, qtr_tpl_bool(true));
      } else if (token_is_name(t, "false") || token_is_name(t, "False")) {
        n = make_const(p, qtr_tpl_bool(false));
      } else if (token_is_name(t, "none") || token_is_name(t, "None")) {
        n = make_const(p, qtr_tpl_none());
      } else if (with_namespace && is(p, T_DOT)) {
        next(p);
        n = make(p, N_NSREF);
        if (!n) break;
        n->name = intern(p, t->text, t->len);
        n->value = (struct value){.type = V_STRING, .s = make_str(p, p->t->text, p->t->len)};
        n = expect(p, T_NAME, "an attribute name") ? finish(p, n) : NULL;
      } else {
        n = make_name(p, t);
      }
      break;
    case T_STRING: n = parse_strings(p); break;
    case T_INTEGER:
      next(p);
      n = make_const(p, qtr_tpl_int(t->i));
      break;
    case T_FLOAT:
      next(p);
      n = make_const(p, qtr_tpl_float(t->f));
      break;
    case T_LPAREN:
      next(p);
      n = parse_tuple(p, TUPLE_EXPRESSIONS, NULL, true);
      if (!expect(p, T_RPAREN, "')'")) n = NULL;
      break;
    case T_LBRACKET: n = parse_list(p); break;
    case T_LBRACE: n = parse_dict(p); break;
    default: n = fail_expected(p, "an expression");
  }
  leave(p);
  return n;
}

static struct call_args *parse_call_args(struct parser *p) {
  struct call_args *args = alloc(p, sizeof *args);
  if (!args || !expect(p, T_LPAREN, "'('")) return NULL;
  uint32_t names_capacity = 0;
  bool comma = false;
  while (!is(p, T_RPAREN)) {
    if (comma) {
      if (!expect(p, T_COMMA, "',' or ')'")) return NULL;
      if (is(p, T_RPAREN)) break;
    }
    comma = true;
    if (is(p, T_MUL)) {
      if (args->star || args->star_star) return fail(p, QTR_ERR_FORMAT, "a call takes one *list, before any **mapping");
      next(p);
      args->star = parse_expression(p);
    } else if (is(p, T_POW)) {
      if (args->star_star) return fail(p, QTR_ERR_FORMAT, "a call takes one **mapping");
      next(p);
      args->star_star = parse_expression(p);
    } else if (is(p, T_NAME) && p->t[1].type == T_ASSIGN) {
      if (args->star_star) return fail(p, QTR_ERR_FORMAT, "a keyword argument after **mapping");
      if (args->keyword.n == names_capacity) {
        uint32_t capacity = names_capacity ? names_capacity * 2 : 4;
        struct str **names = alloc(p, capacity * sizeof *names);
        if (!names) return NULL;
        if (names_capacity) memcpy(names, args->names, names_capacity * sizeof *names);
        args->names = names;
        names_capacity = capacity;
      }
      struct str *name = make_str(p, p->t->text, p->t->len);
      next(p);
      next(p);
      struct node *value = parse_expression(p);
      if (!name || !list_add(p, &args->keyword, value)) return NULL;
      for (uint32_t i = 0; i + 1 < args->keyword.n; i++) {
        if (args->names[i]->len == name->len && memcmp(args->names[i]->data, name->data, name->len) == 0) {
          return fail(p, QTR_ERR_FORMAT, "a keyword argument is repeated");
        }
      }
      args->names[args->keyword.n - 1] = name;
    } else {
      if (args->star || args->star_star || args->keyword.n) {
        return fail(p, QTR_ERR_FORMAT, "a positional argument after a keyword argument");
      }
      if (!list_add(p, &args->positional, parse_expression(p))) return NULL;
    }
    if (p->failed) return NULL;
  }
  next(p);
  return args;
}

static struct node *parse_slice(struct parser *p) {
  struct node *n = make(p, N_SLICE);
  if (!n) return NULL;
  if (is(p, T_COLON)) {
    next(p);
  } else {
    n->a = parse_expression(p);
    if (!n->a || !is(p, T_COLON)) return n->a;
    next(p);
  }
  if (!is(p, T_COLON) && !is(p, T_RBRACKET) && !is(p, T_COMMA)) n->b = parse_expression(p);
  if (skip_if(p, T_COLON) && !is(p, T_RBRACKET) && !is(p, T_COMMA)) n->c = parse_expression(p);
  return finish(p, n);
}

static struct node *parse_subscript(struct parser *p, struct node *object) {
  int32_t line = p->t->line;
  if (skip_if(p, T_DOT)) {
    const struct token *t = p->t;
    if (t->type == T_INTEGER) {
      next(p);
      return make2(p, N_GETITEM, line, object, make_const(p, qtr_tpl_int(t->i)));
    }
    struct node *n = make(p, N_GETATTR);
    if (!n || !expect(p, T_NAME, "an attribute name")) return NULL;
    n->line = line;
    n->a = object;
    n->value = (struct value){.type = V_STRING, .s = make_str(p, t->text, t->len)};
    return finish(p, n);
  }
  next(p);
  struct node *tuple = make(p, N_TUPLE), *key = NULL;
  if (!tuple) return NULL;
  while (!is(p, T_RBRACKET)) {
    if (tuple->items.n > 0 && !expect(p, T_COMMA, "']'")) return NULL;
    key = parse_slice(p);
    if (!list_add(p, &tuple->items, key)) return NULL;
  }
  next(p);
  if (tuple->items.n != 1) {
    for (uint32_t i = 0; i < tuple->items.n; i++) {
      if (tuple->items.items[i]->kind == N_SLICE) return fail(p, QTR_ERR_UNSUPPORTED, "several slices in one subscript");
    }
    key = finish(p, tuple);
  }
  return make2(p, N_GETITEM, line, object, key);
}

static struct node *parse_call(struct parser *p, struct node *callee) {
  struct node *n = make(p, N_CALL);
  if (!n || !callee) return NULL;
  n->a = callee;
  n->args = parse_call_args(p);
  return finish(p, n);
}

static struct node *parse_postfix(struct parser *p, struct node *n) {
  while (n && !p->failed) {
    if (is(p, T_DOT) || is(p, T_LBRACKET)) {
      n = parse_subscript(p, n);
    } else if (is(p, T_LPAREN)) {
      n = parse_call(p, n);
    } else {
      break;
    }
  }
  return n;
}

/* name(.name)* of a filter or test; only undotted ones exist. */
static struct node *parse_builtin_name(struct parser *p, enum node_kind kind) {
  struct node *n = make(p, kind);
  const struct token *t = p->t;
  if (!n || !expect(p, T_NAME, kind == N_FILTER ? "a filter name" : "a test name")) return NULL;
  n->value = (struct value){.type = V_STRING, .s = make_str(p, t->text, t->len)};
  n->builtin = kind == N_FILTER ? qtr_tpl_find_filter(t->text, t->len) : qtr_tpl_find_test(t->text, t->len);
  while (skip_if(p, T_DOT)) {
    n->builtin = NULL;
    if (!expect(p, T_NAME, "a name")) return NULL;
  }
  return n;
}

/* filter(args) | filter(args) …; the '|' before the first one has been read. */
static struct node *parse_filters(struct parser *p, struct node *input) {
  do {
    struct node *n = parse_builtin_name(p, N_FILTER);
    if (!n) return NULL;
    n->a = input;
    if (is(p, T_LPAREN) && !(n->args = parse_call_args(p))) return NULL;
    input = finish(p, n);
  } while (input && skip_if(p, T_PIPE));
  return input;
}

static struct node *parse_test(struct parser *p, struct node *operand) {
  int32_t line = p->t->line;
  next(p);
  bool negated = skip_if_name(p, "not");
  struct node *n = parse_builtin_name(p, N_TEST);
  if (!n) return NULL;
  n->a = operand;
  n->line = line;
  if (is(p, T_LPAREN)) {
    n->args = parse_call_args(p);
    if (!n->args) return NULL;
  } else if ((is(p, T_NAME) || is(p, T_STRING) || is(p, T_INTEGER) || is(p, T_FLOAT) || is(p, T_LBRACKET) ||
              is(p, T_LBRACE)) &&
             !is_name(p, "else") && !is_name(p, "or") && !is_name(p, "and")) {
    if (is_name(p, "is")) return fail(p, QTR_ERR_FORMAT, "tests cannot be chained with 'is'");
    n->args = alloc(p, sizeof *n->args);
    if (!n->args || !list_add(p, &n->args->positional, parse_postfix(p, parse_primary(p, false)))) return NULL;
  }
  n = finish(p, n);
  if (!negated || !n) return n;
  struct node *not = make(p, N_NOT);
  if (!not ) return NULL;
  not ->a = n;
  return finish(p, not );
}

static struct node *parse_unary(struct parser *p, bool with_filter) {
  if (!enter(p)) return NULL;
  struct node *n;
  if (is(p, T_SUB) || is(p, T_ADD)) {
    n = make(p, is(p, T_SUB) ? N_NEG : N_POS);
    next(p);
    if (n) n->a = parse_unary(p, false);
    n = finish(p, n);
  } else {
    n = parse_primary(p, false);
  }
  n = parse_postfix(p, n);
  while (n && with_filter && !p->failed) {
    if (skip_if(p, T_PIPE)) {
      n = parse_filters(p, n);
    } else if (is_name(p, "is")) {
      n = parse_test(p, n);
    } else if (is(p, T_LPAREN)) {
      n = parse_call(p, n);
    } else {
      break;
    }
  }
  leave(p);
  return n;
}

static struct node *make_binary(struct parser *p, enum op op, int32_t line, struct node *a, struct node *b) {
  struct node *n = make2(p, N_BINARY, line, a, b);
  if (n) n->op = (uint8_t)op;
  return n;
}

static struct node *parse_pow(struct parser *p) {
  struct node *n = parse_unary(p, true);
  while (n && is(p, T_POW)) {
    int32_t line = p->t->line;
    next(p);
    n = make_binary(p, OP_POW, line, n, parse_unary(p, true));
  }
  return n;
}

static struct node *parse_product(struct parser *p) {
  struct node *n = parse_pow(p);
  while (n && (is(p, T_MUL) || is(p, T_DIV) || is(p, T_FLOORDIV) || is(p, T_MOD))) {
    enum op op = is(p, T_MUL) ? OP_MUL : is(p, T_DIV) ? OP_DIV : is(p, T_MOD) ? OP_MOD : OP_FLOORDIV;
    int32_t line = p->t->line;
    next(p);
    n = make_binary(p, op, line, n, parse_pow(p));
  }
  return n;
}

static struct node *parse_concat(struct parser *p) {
  struct node *first = parse_product(p);
  if (!first || !is(p, T_TILDE)) return first;
  struct node *n = make(p, N_CONCAT);
  if (!n || !list_add(p, &n->items, first)) return NULL;
  while (skip_if(p, T_TILDE)) {
    if (!list_add(p, &n->items, parse_product(p))) return NULL;
  }
  return finish(p, n);
}

static struct node *parse_sum(struct parser *p) {
  struct node *n = parse_concat(p);
  while (n && (is(p, T_ADD) || is(p, T_SUB))) {
    enum op op = is(p, T_ADD) ? OP_ADD : OP_SUB;
    int32_t line = p->t->line;
    next(p);
    n = make_binary(p, op, line, n, parse_concat(p));
  }
  return n;
}

static bool compare_op(struct parser *p, enum op *op) {
  switch (p->t->type) {
    case T_EQ: *op = OP_EQ; break;
    case T_NE: *op = OP_NE; break;
    case T_LT: *op = OP_LT; break;
    case T_LTEQ: *op = OP_LE; break;
    case T_GT: *op = OP_GT; break;
    case T_GTEQ: *op = OP_GE; break;
    default:
      if (is_name(p, "in")) {
        *op = OP_IN;
        break;
      }
      if (!is_name(p, "not") || !token_is_name(p->t + 1, "in")) return false;
      *op = OP_NOT_IN;
      next(p);
  }
  next(p);
  return true;
}

static struct node *parse_compare(struct parser *p) {
  struct node *first = parse_sum(p), *n = NULL;
  enum op op;
  uint8_t *ops = NULL;
  uint32_t capacity = 0;
  while (first && compare_op(p, &op)) {
    if (!n) {
      n = make(p, N_COMPARE);
      if (!n) return NULL;
      n->a = first;
    }
    if (n->items.n == capacity) {
      uint8_t *grown = alloc(p, capacity * 2 + 4);
      if (!grown) return NULL;
      if (capacity) memcpy(grown, ops, capacity);
      ops = grown;
      capacity = capacity * 2 + 4;
    }
    ops[n->items.n] = (uint8_t)op;
    if (!list_add(p, &n->items, parse_sum(p))) return NULL;
  }
  if (!n) return first;
  n->ops = ops;
  return finish(p, n);
}

static struct node *parse_not(struct parser *p) {
  if (!is_name(p, "not")) return parse_compare(p);
  if (!enter(p)) return NULL;
  struct node *n = make(p, N_NOT);
  next(p);
  if (n) n->a = parse_not(p);
  leave(p);
  return n && n->a ? finish(p, n) : NULL;
}

static struct node *parse_and(struct parser *p) {
  struct node *n = parse_not(p);
  while (n && is_name(p, "and")) {
    int32_t line = p->t->line;
    next(p);
    n = make2(p, N_AND, line, n, parse_not(p));
  }
  return n;
}

static struct node *parse_or(struct parser *p) {
  struct node *n = parse_and(p);
  while (n && is_name(p, "or")) {
    int32_t line = p->t->line;
    next(p);
    n = make2(p, N_OR, line, n, parse_and(p));
  }
  return n;
}

static struct node *parse_expression(struct parser *p) {
  if (!enter(p)) return NULL;
  struct node *n = parse_or(p);
  while (n && skip_if_name(p, "if")) {
    struct node *cond = make(p, N_COND);
    if (!cond) break;
    cond->a = n;
    cond->b = parse_or(p);
    if (skip_if_name(p, "else")) cond->c = parse_expression(p);
    n = cond->b ? finish(p, cond) : NULL;
  }
  leave(p);
  return p->failed ? NULL : n;
}

/* ---- statements
 * ----------------------------------------------------------------------------------------------------------- */

/* Names, tuples of names and, for set, namespace attributes: nothing else can be assigned to. */
static bool check_target(struct parser *p, const struct node *n, bool with_namespace) {
  if (n->kind == N_NAME) {
    p->n_loop_stores += n->name == p->tpl->loop_name;
    return true;
  }
  if (n->kind == N_NSREF && with_namespace) return true;
  if (n->kind != N_TUPLE) return fail(p, QTR_ERR_FORMAT, "cannot assign to this expression") != NULL;
  for (uint32_t i = 0; i < n->items.n; i++) {
    if (!check_target(p, n->items.items[i], with_namespace)) return false;
  }
  return true;
}

static struct node *parse_target(struct parser *p, bool with_namespace, const char *end_name) {
  struct node *n = parse_tuple(p, with_namespace ? TUPLE_NS_TARGETS : TUPLE_TARGETS, end_name, false);
  return n && check_target(p, n, with_namespace) ? n : NULL;
}

/* The rest of a statement's opening tag, its body, and the name of the tag that ends it (left as the current token). */
static bool parse_block(struct parser *p, const char *const *ends, struct node_list *body) {
  (void)skip_if(p, T_COLON);
  return expect(p, T_BLOCK_END, "'%}'") && parse_body(p, ends, body);
}

static const char *const end_for[] = {"endfor", "else", NULL}, *const end_for_else[] = {"endfor", NULL},
                         *const end_if[] = {"elif", "else", "endif", NULL}, *const end_if_else[] = {"endif", NULL},
                         *const end_set[] = {"endset", NULL}, *const end_macro[] = {"endmacro", NULL},
                         *const end_call[] = {"endcall", NULL}, *const end_filter[] = {"endfilter", NULL},
                         *const end_with[] = {"endwith", NULL}, *const end_generation[] = {"endgeneration", NULL};

static struct node *parse_for(struct parser *p, struct node *n) {
  uint32_t n_loop_stores = p->n_loop_stores;
  n->a = parse_target(p, false, "in");
  if (!n->a || !is_name(p, "in")) return fail_expected(p, "'in'");
  next(p);
  n->b = parse_tuple(p, TUPLE_NO_COND, "recursive", false);
  if (!n->b) return NULL;
  if (skip_if_name(p, "if") && !(n->c = parse_expression(p))) return NULL;
  if (is_name(p, "recursive")) return fail(p, QTR_ERR_UNSUPPORTED, "recursive loops are not supported");
  p->loops++;
  if (!parse_block(p, end_for, &n->items)) return NULL;
  p->loops--;
  bool has_else = is_name(p, "else");
  next(p);
  if (has_else) {
    if (!parse_block(p, end_for_else, &n->other)) return NULL;
    next(p);
  }
  if (p->n_loop_stores != n_loop_stores) {
    return fail(p, QTR_ERR_FORMAT, "the special variable 'loop' cannot be assigned to in a for loop");
  }
  return finish(p, n);
}

static struct node *parse_if(struct parser *p, struct node *n) {
  while (true) {
    struct node *body = make(p, N_BODY);
    if (!body || !list_add(p, &n->items, parse_tuple(p, TUPLE_NO_COND, NULL, false)) ||
        !parse_block(p, end_if, &body->items) || !list_add(p, &n->items, finish(p, body))) {
      return NULL;
    }
    if (skip_if_name(p, "elif")) continue;
    if (skip_if_name(p, "else")) {
      body = make(p, N_BODY);
      if (!body || !parse_block(p, end_if_else, &body->items) || !list_add(p, &n->items, finish(p, body))) return NULL;
    }
    next(p); /* endif */
    return finish(p, n);
  }
}

static struct node *parse_set(struct parser *p, struct node *n) {
  n->a = parse_target(p, true, NULL);
  if (!n->a) return NULL;
  if (skip_if(p, T_ASSIGN)) {
    n->b = parse_tuple(p, TUPLE_EXPRESSIONS, NULL, false);
    return n->b ? finish(p, n) : NULL;
  }
  n->kind = N_SET_BLOCK;
  if (skip_if(p, T_PIPE) && !(n->b = parse_filters(p, NULL))) return NULL;
  if (!parse_block(p, end_set, &n->items)) return NULL;
  next(p);
  return finish(p, n);
}

static struct params *parse_signature(struct parser *p) {
  struct params *params = alloc(p, sizeof *params);
  if (!params || !expect(p, T_LPAREN, "'('")) return NULL;
  struct node_list defaults = {0};
  uint32_t capacity = 0;
  while (!is(p, T_RPAREN)) {
    if (params->n > 0 && !expect(p, T_COMMA, "',' or ')'")) return NULL;
    const struct token *t = p->t;
    if (!expect(p, T_NAME, "a parameter name")) return NULL;
    if (params->n == capacity) {
      uint32_t *names = alloc(p, (capacity * 2 + 4) * sizeof *names);
      if (!names) return NULL;
      if (capacity) memcpy(names, params->names, capacity * sizeof *names);
      params->names = names;
      capacity = capacity * 2 + 4;
    }
    uint32_t id = intern(p, t->text, t->len);
    for (uint32_t i = 0; i < params->n; i++) {
      if (params->names[i] == id) return fail(p, QTR_ERR_FORMAT, "a parameter is repeated");
    }
    params->names[params->n++] = id;
    if (skip_if(p, T_ASSIGN)) {
      if (!list_add(p, &defaults, parse_expression(p))) return NULL;
    } else if (defaults.n) {
      return fail(p, QTR_ERR_FORMAT, "a parameter without a default follows one with a default");
    }
  }
  next(p);
  params->defaults = defaults.items;
  params->n_defaults = defaults.n;
  return params;
}

/* A macro's or call block's body: a function of its own, so break cannot leave it. */
static bool parse_function_body(struct parser *p, struct node *n, const char *const *ends) {
  struct params *outer = p->params;
  int loops = p->loops;
  p->params = n->params;
  p->loops = 0;
  bool ok = parse_block(p, ends, &n->items);
  p->params = outer;
  p->loops = loops;
  if (!ok) return false;
  next(p);
  struct params *mine = n->params;
  if (outer) { /* names used in an inner macro count as used in the outer one, as jinja2 sees it */
    outer->uses_caller |= mine->uses_caller;
    outer->uses_kwargs |= mine->uses_kwargs;
    outer->uses_varargs |= mine->uses_varargs;
  }
  mine->id_caller = intern(p, "caller", 6);
  mine->id_kwargs = intern(p, "kwargs", 6);
  mine->id_varargs = intern(p, "varargs", 7);
  for (uint32_t i = 0; i < mine->n; i++) {
    if (mine->names[i] == mine->id_caller) mine->uses_caller = false;
    if (mine->names[i] == mine->id_kwargs) mine->uses_kwargs = false;
    if (mine->names[i] == mine->id_varargs) mine->uses_varargs = false;
  }
  return !p->failed;
}

static struct node *parse_macro(struct parser *p, struct node *n) {
  const struct token *t = p->t;
  if (!expect(p, T_NAME, "a macro name")) return NULL;
  n->name = intern(p, t->text, t->len);
  n->params = parse_signature(p);
  if (!n->params || !parse_function_body(p, n, end_macro)) return NULL;
  return finish(p, n);
}

static struct node *parse_call_block(struct parser *p, struct node *n) {
  n->params = is(p, T_LPAREN) ? parse_signature(p) : alloc(p, sizeof *n->params);
  n->a = parse_expression(p);
  if (!n->params || !n->a) return NULL;
  if (n->a->kind != N_CALL) return fail(p, QTR_ERR_FORMAT, "a call block needs a call: {%% call name(…) %%}");
  if (!parse_function_body(p, n, end_call)) return NULL;
  return finish(p, n);
}

static struct node *parse_with(struct parser *p, struct node *n) {
  while (!is(p, T_BLOCK_END) && !is(p, T_COLON)) {
    if (n->other.n > 0 && !expect(p, T_COMMA, "',' or '%}'")) return NULL;
    struct node *target = parse_target(p, false, NULL);
    if (!list_add(p, &n->other, target) || !expect(p, T_ASSIGN, "'='") || !list_add(p, &n->other, parse_expression(p))) {
      return NULL;
    }
  }
  if (!parse_block(p, end_with, &n->items)) return NULL;
  next(p);
  return finish(p, n);
}

static struct node *parse_print(struct parser *p, struct node *n) {
  while (!is(p, T_BLOCK_END)) {
    if (n->items.n > 0 && !expect(p, T_COMMA, "','")) return NULL;
    if (!list_add(p, &n->items, parse_expression(p))) return NULL;
  }
  return finish(p, n);
}

static struct node *parse_statement(struct parser *p) {
  if (!is(p, T_NAME)) return fail_expected(p, "a tag name");
  const struct token *tag = p->t;
  struct node *n = make(p, N_BODY);
  if (!n) return NULL;
  next(p);
  if (token_is_name(tag, "for")) {
    n->kind = N_FOR;
    return parse_for(p, n);
  }
  if (token_is_name(tag, "if")) {
    n->kind = N_IF;
    return parse_if(p, n);
  }
  if (token_is_name(tag, "set")) {
    n->kind = N_SET;
    return parse_set(p, n);
  }
  if (token_is_name(tag, "macro")) {
    n->kind = N_MACRO;
    return parse_macro(p, n);
  }
  if (token_is_name(tag, "call")) {
    n->kind = N_CALL_BLOCK;
    return parse_call_block(p, n);
  }
  if (token_is_name(tag, "filter")) {
    n->kind = N_FILTER_BLOCK;
    n->b = parse_filters(p, NULL);
    if (!n->b || !parse_block(p, end_filter, &n->items)) return NULL;
    next(p);
    return finish(p, n);
  }
  if (token_is_name(tag, "with")) {
    n->kind = N_WITH;
    return parse_with(p, n);
  }
  if (token_is_name(tag, "generation")) {
    n->kind = N_SCOPE;
    if (!parse_block(p, end_generation, &n->items)) return NULL;
    next(p);
    return finish(p, n);
  }
  if (token_is_name(tag, "print")) {
    n->kind = N_OUTPUT;
    return parse_print(p, n);
  }
  if (token_is_name(tag, "break") || token_is_name(tag, "continue")) {
    if (p->loops == 0) return fail(p, QTR_ERR_FORMAT, "break or continue outside of a for loop");
    n->kind = token_is_name(tag, "break") ? N_BREAK : N_CONTINUE;
    return finish(p, n);
  }
  static const char *const refused[] = {"extends", "include", "import", "from", "block", "autoescape"};
  for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
    if (token_is_name(tag, refused[i])) {
      return fail(p, QTR_ERR_UNSUPPORTED, "the tag '%s' is not supported: a chat template stands alone", refused[i]);
    }
  }
  p->t = tag;
  char text[48];
  return fail(p, QTR_ERR_FORMAT, "unknown or misplaced tag '%s'", describe(tag, text));
}

/* Statements up to {% one of ends (ends NULL: the end of the template). The end tag's name is then the current token. */
static bool parse_body(struct parser *p, const char *const *ends, struct node_list *body) {
  if (!enter(p)) return false;
  int32_t line = p->t->line;
  while (!p->failed && !is(p, T_EOF)) {
    struct node *n = NULL;
    if (is(p, T_DATA)) {
      n = make_const_string(p, N_DATA, p->t->text, p->t->len);
      next(p);
    } else if (skip_if(p, T_VARIABLE_BEGIN)) {
      n = make(p, N_OUTPUT);
      if (!n || !list_add(p, &n->items, parse_tuple(p, TUPLE_EXPRESSIONS, NULL, false))) break;
      if (!expect(p, T_VARIABLE_END, "'}}'")) break;
      n = finish(p, n);
    } else if (skip_if(p, T_BLOCK_BEGIN)) {
      for (size_t i = 0; ends && ends[i]; i++) {
        if (is_name(p, ends[i])) {
          leave(p);
          return true;
        }
      }
      n = parse_statement(p);
      if (n && !expect(p, T_BLOCK_END, "'%}'")) break;
    } else {
      (void)fail_expected(p, "text or a tag");
    }
    if (!list_add(p, body, n)) break;
  }
  leave(p);
  if (!p->failed && ends) {
    (void)fail(p, QTR_ERR_FORMAT, "the template ends, but the block of line %d needs '{%% %s %%}'", (int)line, ends[0]);
  }
  return !p->failed;
}

enum qtr_status qtr_template_parse(const char *source, size_t len, struct qtr_template **tpl, struct qtr_error *err) {
  *tpl = NULL;
  struct qtr_template *made = calloc(1, sizeof *made);
  if (!made) return qtr_fail_memory(err, "a template", sizeof *made);
  made->arena.limit = TPL_MAX_PARSE_ARENA;
  struct token *tokens = NULL;
  size_t n_tokens = 0;
  enum qtr_status status = qtr_tpl_lex(&made->arena, source, len, &tokens, &n_tokens, err);
  if (status != QTR_OK) goto done;
  struct parser p = {.tpl = made, .err = err, .t = tokens, .status = QTR_OK};
  made->loop_name = intern(&p, "loop", 4);
  struct node *body = make(&p, N_BODY);
  if (body && parse_body(&p, NULL, &body->items)) made->body = finish(&p, body);
  status = p.status;
done:
  free(tokens);
  if (status == QTR_OK) {
    *tpl = made;
  } else {
    qtr_template_free(made);
  }
  return status;
}

void qtr_template_free(struct qtr_template *tpl) {
  if (!tpl) return;
  qtr_tpl_arena_free(&tpl->arena);
  free(tpl);
}
