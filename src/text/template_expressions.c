/* template_expressions.c - expressions, production by production as jinja2's own parser, so that precedence and the odd
 * corners agree: filters bind tighter than unary minus, ~ tighter than +, ** leans to the left, `is` takes a bare argument.
 * Recursion is bounded by TPL_MAX_NEST. */
#include "text/template_parser.h"

static struct node *parse_or(struct parser *p);
static struct node *parse_unary(struct parser *p, bool with_filter);
static struct node *parse_primary(struct parser *p, bool with_namespace);

static struct node *make2(struct parser *p, enum node_kind kind, int32_t line, struct node *a, struct node *b) {
  if (!a || !b) return NULL;
  struct node *n = qtr_tpl_node_make(p, kind);
  if (!n) return NULL;
  n->line = line;
  n->a = a;
  n->b = b;
  return qtr_tpl_node_finish(p, n);
}

static struct node *make_name(struct parser *p, const struct token *t) {
  struct node *n = qtr_tpl_node_make(p, N_NAME);
  if (!n) return NULL;
  n->line = t->line;
  n->name = qtr_tpl_parser_intern(p, t->text, t->len);
  if (p->params) {
    p->params->uses_varargs |= token_is_name(t, "varargs");
    p->params->uses_kwargs |= token_is_name(t, "kwargs");
    p->params->uses_caller |= token_is_name(t, "caller");
  }
  return qtr_tpl_node_finish(p, n);
}

static struct node *make_const(struct parser *p, struct value v) {
  struct node *n = qtr_tpl_node_make(p, N_CONST);
  if (!n) return NULL;
  n->value = v;
  return qtr_tpl_node_finish(p, n);
}

static bool is_tuple_end(const struct parser *p, const char *end_name) {
  return is(p, T_VARIABLE_END) || is(p, T_BLOCK_END) || is(p, T_RPAREN) || (end_name && is_name(p, end_name));
}

struct node *qtr_tpl_parse_tuple(struct parser *p, enum tuple_kind kind, const char *end_name, bool parenthesised) {
  struct node *tuple = qtr_tpl_node_make(p, N_TUPLE), *first = NULL;
  if (!tuple) return NULL;
  bool is_tuple = false;
  while (true) {
    if (tuple->items.n > 0 && !expect(p, T_COMMA, "','")) return NULL;
    if (is_tuple_end(p, end_name)) break;
    first = kind == TUPLE_EXPRESSIONS ? qtr_tpl_parse_expression(p)
            : kind == TUPLE_NO_COND   ? parse_or(p)
                                      : parse_primary(p, kind == TUPLE_NS_TARGETS);
    if (!qtr_tpl_node_add(p, &tuple->items, first)) return NULL;
    if (!is(p, T_COMMA)) break;
    is_tuple = true;
  }
  if (!is_tuple) {
    if (tuple->items.n == 1) return first;
    if (!parenthesised) return qtr_tpl_parser_expected(p, "an expression");
  }
  return qtr_tpl_node_finish(p, tuple);
}

static struct node *parse_list(struct parser *p) {
  struct node *n = qtr_tpl_node_make(p, N_LIST);
  if (!n) return NULL;
  next(p);
  while (!is(p, T_RBRACKET)) {
    if (n->items.n > 0 && !expect(p, T_COMMA, "',' or ']'")) return NULL;
    if (is(p, T_RBRACKET)) break;
    if (!qtr_tpl_node_add(p, &n->items, qtr_tpl_parse_expression(p))) return NULL;
  }
  next(p);
  return qtr_tpl_node_finish(p, n);
}

static struct node *parse_dict(struct parser *p) {
  struct node *n = qtr_tpl_node_make(p, N_DICT);
  if (!n) return NULL;
  next(p);
  while (!is(p, T_RBRACE)) {
    if (n->items.n > 0 && !expect(p, T_COMMA, "',' or '}'")) return NULL;
    if (is(p, T_RBRACE)) break;
    if (!qtr_tpl_node_add(p, &n->items, qtr_tpl_parse_expression(p)) || !expect(p, T_COLON, "':'") ||
        !qtr_tpl_node_add(p, &n->items, qtr_tpl_parse_expression(p))) {
      return NULL;
    }
  }
  next(p);
  return qtr_tpl_node_finish(p, n);
}

static struct node *parse_strings(struct parser *p) {
  const struct token *first = p->t;
  size_t len = 0, n = 0;
  for (; is(p, T_STRING); next(p), n++) len += p->t->len;
  if (n == 1) return qtr_tpl_node_const_string(p, N_CONST, first->text, len);
  char *text = qtr_tpl_parser_alloc(p, len + 1);
  if (!text) return NULL;
  size_t at = 0;
  for (const struct token *t = first; t != p->t; t++) {
    memcpy(text + at, t->text, t->len);
    at += t->len;
  }
  return qtr_tpl_node_const_string(p, N_CONST, text, len);
}

static struct node *parse_primary(struct parser *p, bool with_namespace) {
  if (!qtr_tpl_parser_enter(p)) return NULL;
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
        n = qtr_tpl_node_make(p, N_NSREF);
        if (!n) break;
        n->name = qtr_tpl_parser_intern(p, t->text, t->len);
        n->value = (struct value){.type = V_STRING, .s = qtr_tpl_node_str(p, p->t->text, p->t->len)};
        n = expect(p, T_NAME, "an attribute name") ? qtr_tpl_node_finish(p, n) : NULL;
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
      n = qtr_tpl_parse_tuple(p, TUPLE_EXPRESSIONS, NULL, true);
      if (!expect(p, T_RPAREN, "')'")) n = NULL;
      break;
    case T_LBRACKET: n = parse_list(p); break;
    case T_LBRACE: n = parse_dict(p); break;
    default: n = qtr_tpl_parser_expected(p, "an expression");
  }
  qtr_tpl_parser_leave(p);
  return n;
}

static struct call_args *parse_call_args(struct parser *p) {
  struct call_args *args = qtr_tpl_parser_alloc(p, sizeof *args);
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
      if (args->star || args->star_star)
        return qtr_tpl_parser_fail(p, QTR_ERR_FORMAT, "a call takes one *list, before any **mapping");
      next(p);
      args->star = qtr_tpl_parse_expression(p);
    } else if (is(p, T_POW)) {
      if (args->star_star) return qtr_tpl_parser_fail(p, QTR_ERR_FORMAT, "a call takes one **mapping");
      next(p);
      args->star_star = qtr_tpl_parse_expression(p);
    } else if (is(p, T_NAME) && p->t[1].type == T_ASSIGN) {
      if (args->star_star) return qtr_tpl_parser_fail(p, QTR_ERR_FORMAT, "a keyword argument after **mapping");
      if (args->keyword.n == TPL_MAX_ARGUMENTS)
        return qtr_tpl_parser_fail(p, QTR_ERR_LIMIT, "more than %d keyword arguments", TPL_MAX_ARGUMENTS);
      if (args->keyword.n == names_capacity) {
        uint32_t capacity = names_capacity ? names_capacity * 2 : 4;
        struct str **names = qtr_tpl_parser_alloc(p, capacity * sizeof *names);
        if (!names) return NULL;
        if (names_capacity) memcpy(names, args->names, names_capacity * sizeof *names);
        args->names = names;
        names_capacity = capacity;
      }
      struct str *name = qtr_tpl_node_str(p, p->t->text, p->t->len);
      next(p);
      next(p);
      struct node *value = qtr_tpl_parse_expression(p);
      if (!name || !qtr_tpl_node_add(p, &args->keyword, value)) return NULL;
      for (uint32_t i = 0; i + 1 < args->keyword.n; i++) {
        if (args->names[i]->len == name->len && memcmp(args->names[i]->data, name->data, name->len) == 0) {
          return qtr_tpl_parser_fail(p, QTR_ERR_FORMAT, "a keyword argument is repeated");
        }
      }
      args->names[args->keyword.n - 1] = name;
    } else {
      if (args->star || args->star_star || args->keyword.n) {
        return qtr_tpl_parser_fail(p, QTR_ERR_FORMAT, "a positional argument after a keyword argument");
      }
      if (!qtr_tpl_node_add(p, &args->positional, qtr_tpl_parse_expression(p))) return NULL;
    }
    if (p->failed) return NULL;
  }
  next(p);
  return args;
}

static struct node *parse_slice(struct parser *p) {
  struct node *n = qtr_tpl_node_make(p, N_SLICE);
  if (!n) return NULL;
  if (is(p, T_COLON)) {
    next(p);
  } else {
    n->a = qtr_tpl_parse_expression(p);
    if (!n->a || !is(p, T_COLON)) return n->a;
    next(p);
  }
  if (!is(p, T_COLON) && !is(p, T_RBRACKET) && !is(p, T_COMMA)) n->b = qtr_tpl_parse_expression(p);
  if (skip_if(p, T_COLON) && !is(p, T_RBRACKET) && !is(p, T_COMMA)) n->c = qtr_tpl_parse_expression(p);
  return qtr_tpl_node_finish(p, n);
}

static struct node *parse_subscript(struct parser *p, struct node *object) {
  int32_t line = p->t->line;
  if (skip_if(p, T_DOT)) {
    const struct token *t = p->t;
    if (t->type == T_INTEGER) {
      next(p);
      return make2(p, N_GETITEM, line, object, make_const(p, qtr_tpl_int(t->i)));
    }
    struct node *n = qtr_tpl_node_make(p, N_GETATTR);
    if (!n || !expect(p, T_NAME, "an attribute name")) return NULL;
    n->line = line;
    n->a = object;
    n->value = (struct value){.type = V_STRING, .s = qtr_tpl_node_str(p, t->text, t->len)};
    return qtr_tpl_node_finish(p, n);
  }
  next(p);
  struct node *tuple = qtr_tpl_node_make(p, N_TUPLE), *key = NULL;
  if (!tuple) return NULL;
  while (!is(p, T_RBRACKET)) {
    if (tuple->items.n > 0 && !expect(p, T_COMMA, "']'")) return NULL;
    key = parse_slice(p);
    if (!qtr_tpl_node_add(p, &tuple->items, key)) return NULL;
  }
  next(p);
  if (tuple->items.n != 1) {
    for (uint32_t i = 0; i < tuple->items.n; i++) {
      if (tuple->items.items[i]->kind == N_SLICE)
        return qtr_tpl_parser_fail(p, QTR_ERR_UNSUPPORTED, "several slices in one subscript");
    }
    key = qtr_tpl_node_finish(p, tuple);
  }
  return make2(p, N_GETITEM, line, object, key);
}

static struct node *parse_call(struct parser *p, struct node *callee) {
  struct node *n = qtr_tpl_node_make(p, N_CALL);
  if (!n || !callee) return NULL;
  n->a = callee;
  n->args = parse_call_args(p);
  return qtr_tpl_node_finish(p, n);
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

/* The name of a filter or test. An unknown one is an error only when it runs, as in jinja2 inside an if. */
static struct node *parse_builtin_name(struct parser *p, enum node_kind kind) {
  struct node *n = qtr_tpl_node_make(p, kind);
  const struct token *t = p->t;
  if (!n || !expect(p, T_NAME, kind == N_FILTER ? "a filter name" : "a test name")) return NULL;
  n->value = (struct value){.type = V_STRING, .s = qtr_tpl_node_str(p, t->text, t->len)};
  n->builtin = kind == N_FILTER ? qtr_tpl_find_filter(t->text, t->len) : qtr_tpl_find_test(t->text, t->len);
  if (is(p, T_DOT)) return qtr_tpl_parser_fail(p, QTR_ERR_UNSUPPORTED, "filters and tests with a dot in their name");
  return n;
}

/* filter(args) | filter(args) …; the '|' before the first one has been read. */
struct node *qtr_tpl_parse_filters(struct parser *p, struct node *input) {
  do {
    struct node *n = parse_builtin_name(p, N_FILTER);
    if (!n) return NULL;
    n->a = input;
    if (is(p, T_LPAREN) && !(n->args = parse_call_args(p))) return NULL;
    input = qtr_tpl_node_finish(p, n);
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
    if (is_name(p, "is")) return qtr_tpl_parser_fail(p, QTR_ERR_FORMAT, "tests cannot be chained with 'is'");
    n->args = qtr_tpl_parser_alloc(p, sizeof *n->args);
    if (!n->args || !qtr_tpl_node_add(p, &n->args->positional, parse_postfix(p, parse_primary(p, false)))) return NULL;
  }
  n = qtr_tpl_node_finish(p, n);
  if (!negated || !n) return n;
  struct node *not = qtr_tpl_node_make(p, N_NOT);
  if (!not ) return NULL;
  not ->a = n;
  return qtr_tpl_node_finish(p, not );
}

static struct node *parse_unary(struct parser *p, bool with_filter) {
  if (!qtr_tpl_parser_enter(p)) return NULL;
  struct node *n;
  if (is(p, T_SUB) || is(p, T_ADD)) {
    n = qtr_tpl_node_make(p, is(p, T_SUB) ? N_NEG : N_POS);
    next(p);
    if (n) n->a = parse_unary(p, false);
    n = qtr_tpl_node_finish(p, n);
  } else {
    n = parse_primary(p, false);
  }
  n = parse_postfix(p, n);
  while (n && with_filter && !p->failed) {
    if (skip_if(p, T_PIPE)) {
      n = qtr_tpl_parse_filters(p, n);
    } else if (is_name(p, "is")) {
      n = parse_test(p, n);
    } else if (is(p, T_LPAREN)) {
      n = parse_call(p, n);
    } else {
      break;
    }
  }
  qtr_tpl_parser_leave(p);
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
  struct node *n = qtr_tpl_node_make(p, N_CONCAT);
  if (!n || !qtr_tpl_node_add(p, &n->items, first)) return NULL;
  while (skip_if(p, T_TILDE)) {
    if (!qtr_tpl_node_add(p, &n->items, parse_product(p))) return NULL;
  }
  return qtr_tpl_node_finish(p, n);
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
      n = qtr_tpl_node_make(p, N_COMPARE);
      if (!n) return NULL;
      n->a = first;
    }
    if (!ops || n->items.n == capacity) {
      uint8_t *grown = qtr_tpl_parser_alloc(p, capacity * 2 + 4);
      if (!grown) return NULL;
      if (capacity) memcpy(grown, ops, capacity);
      ops = grown;
      capacity = capacity * 2 + 4;
    }
    ops[n->items.n] = (uint8_t)op;
    if (!qtr_tpl_node_add(p, &n->items, parse_sum(p))) return NULL;
  }
  if (!n) return first;
  n->ops = ops;
  return qtr_tpl_node_finish(p, n);
}

static struct node *parse_not(struct parser *p) {
  if (!is_name(p, "not")) return parse_compare(p);
  if (!qtr_tpl_parser_enter(p)) return NULL;
  struct node *n = qtr_tpl_node_make(p, N_NOT);
  next(p);
  if (n) n->a = parse_not(p);
  qtr_tpl_parser_leave(p);
  return n && n->a ? qtr_tpl_node_finish(p, n) : NULL;
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

struct node *qtr_tpl_parse_expression(struct parser *p) {
  if (!qtr_tpl_parser_enter(p)) return NULL;
  struct node *n = parse_or(p);
  while (n && skip_if_name(p, "if")) {
    struct node *cond = qtr_tpl_node_make(p, N_COND);
    if (!cond) break;
    cond->a = n;
    cond->b = parse_or(p);
    if (skip_if_name(p, "else")) cond->c = qtr_tpl_parse_expression(p);
    n = cond->b ? qtr_tpl_node_finish(p, cond) : NULL;
  }
  qtr_tpl_parser_leave(p);
  return p->failed ? NULL : n;
}
