/* template_statements.c - tags and text to a tree, and qtr_template_parse. Not here, and refused by name: extends, include,
 * import, block, autoescape, recursive loops. Recursion is bounded by TPL_MAX_NEST. */
#include "text/template_parser.h"

#include <stdlib.h>

static bool parse_body(struct parser *p, const char *const *ends, int32_t line, struct node_list *body);

/* Names, tuples of names and, for set, namespace attributes: nothing else can be assigned to. */
static bool check_target(struct parser *p, const struct node *n, bool with_namespace) {
  if (n->kind == N_NAME) {
    p->n_loop_stores += n->name == p->tpl->loop_name;
    return true;
  }
  if (n->kind == N_NSREF && with_namespace) return true;
  if (n->kind != N_TUPLE) return qtr_tpl_parser_fail(p, QTR_ERR_FORMAT, "cannot assign to this expression") != NULL;
  for (uint32_t i = 0; i < n->items.n; i++) {
    if (!check_target(p, n->items.items[i], with_namespace)) return false;
  }
  return true;
}

static struct node *parse_target(struct parser *p, bool with_namespace, const char *end_name) {
  struct node *n = qtr_tpl_parse_tuple(p, with_namespace ? TUPLE_NS_TARGETS : TUPLE_TARGETS, end_name, false);
  return n && check_target(p, n, with_namespace) ? n : NULL;
}

/* The rest of a statement's opening tag, its body, and the name of the tag that ends it (left as the current token). */
static bool parse_block(struct parser *p, const char *const *ends, struct node_list *body) {
  (void)skip_if(p, T_COLON);
  int32_t line = p->t->line;
  return expect(p, T_BLOCK_END, "'%}'") && parse_body(p, ends, line, body);
}

static const char *const end_for[] = {"endfor", "else", NULL}, *const end_for_else[] = {"endfor", NULL},
                         *const end_if[] = {"elif", "else", "endif", NULL}, *const end_if_else[] = {"endif", NULL},
                         *const end_set[] = {"endset", NULL}, *const end_macro[] = {"endmacro", NULL},
                         *const end_call[] = {"endcall", NULL}, *const end_filter[] = {"endfilter", NULL},
                         *const end_with[] = {"endwith", NULL}, *const end_generation[] = {"endgeneration", NULL};

static struct node *parse_for(struct parser *p, struct node *n) {
  uint32_t n_loop_stores = p->n_loop_stores;
  n->a = parse_target(p, false, "in");
  if (!n->a || !is_name(p, "in")) return qtr_tpl_parser_expected(p, "'in'");
  next(p);
  n->b = qtr_tpl_parse_tuple(p, TUPLE_NO_COND, "recursive", false);
  if (!n->b) return NULL;
  if (skip_if_name(p, "if") && !(n->c = qtr_tpl_parse_expression(p))) return NULL;
  if (is_name(p, "recursive")) return qtr_tpl_parser_fail(p, QTR_ERR_UNSUPPORTED, "recursive loops are not supported");
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
    return qtr_tpl_parser_fail(p, QTR_ERR_FORMAT, "the special variable 'loop' cannot be assigned to in a for loop");
  }
  return qtr_tpl_node_finish(p, n);
}

static struct node *parse_if(struct parser *p, struct node *n) {
  while (true) {
    struct node *body = qtr_tpl_node_make(p, N_BODY);
    if (!body || !qtr_tpl_node_add(p, &n->items, qtr_tpl_parse_tuple(p, TUPLE_NO_COND, NULL, false)) ||
        !parse_block(p, end_if, &body->items) || !qtr_tpl_node_add(p, &n->items, qtr_tpl_node_finish(p, body))) {
      return NULL;
    }
    if (skip_if_name(p, "elif")) continue;
    if (skip_if_name(p, "else")) {
      body = qtr_tpl_node_make(p, N_BODY);
      if (!body || !parse_block(p, end_if_else, &body->items) ||
          !qtr_tpl_node_add(p, &n->items, qtr_tpl_node_finish(p, body)))
        return NULL;
    }
    next(p); /* endif */
    return qtr_tpl_node_finish(p, n);
  }
}

static struct node *parse_set(struct parser *p, struct node *n) {
  n->a = parse_target(p, true, NULL);
  if (!n->a) return NULL;
  if (skip_if(p, T_ASSIGN)) {
    n->b = qtr_tpl_parse_tuple(p, TUPLE_EXPRESSIONS, NULL, false);
    return n->b ? qtr_tpl_node_finish(p, n) : NULL;
  }
  n->kind = N_SET_BLOCK;
  if (skip_if(p, T_PIPE) && !(n->b = qtr_tpl_parse_filters(p, NULL))) return NULL;
  if (!parse_block(p, end_set, &n->items)) return NULL;
  next(p);
  return qtr_tpl_node_finish(p, n);
}

static struct params *parse_signature(struct parser *p) {
  struct params *params = qtr_tpl_parser_alloc(p, sizeof *params);
  if (!params || !expect(p, T_LPAREN, "'('")) return NULL;
  struct node_list defaults = {0};
  uint32_t capacity = 0;
  while (!is(p, T_RPAREN)) {
    if (params->n > 0 && !expect(p, T_COMMA, "',' or ')'")) return NULL;
    const struct token *t = p->t;
    if (!expect(p, T_NAME, "a parameter name")) return NULL;
    if (params->n == TPL_MAX_ARGUMENTS)
      return qtr_tpl_parser_fail(p, QTR_ERR_LIMIT, "more than %d parameters", TPL_MAX_ARGUMENTS);
    if (params->n == capacity) {
      uint32_t *names = qtr_tpl_parser_alloc(p, (capacity * 2 + 4) * sizeof *names);
      if (!names) return NULL;
      if (capacity) memcpy(names, params->names, capacity * sizeof *names);
      params->names = names;
      capacity = capacity * 2 + 4;
    }
    uint32_t id = qtr_tpl_parser_intern(p, t->text, t->len);
    for (uint32_t i = 0; i < params->n; i++) {
      if (params->names[i] == id) return qtr_tpl_parser_fail(p, QTR_ERR_FORMAT, "a parameter is repeated");
    }
    params->names[params->n++] = id;
    if (skip_if(p, T_ASSIGN)) {
      if (!qtr_tpl_node_add(p, &defaults, qtr_tpl_parse_expression(p))) return NULL;
    } else if (defaults.n) {
      return qtr_tpl_parser_fail(p, QTR_ERR_FORMAT, "a parameter without a default follows one with a default");
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
  mine->id_caller = qtr_tpl_parser_intern(p, "caller", 6);
  mine->id_kwargs = qtr_tpl_parser_intern(p, "kwargs", 6);
  mine->id_varargs = qtr_tpl_parser_intern(p, "varargs", 7);
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
  n->name = qtr_tpl_parser_intern(p, t->text, t->len);
  n->params = parse_signature(p);
  if (!n->params || !parse_function_body(p, n, end_macro)) return NULL;
  return qtr_tpl_node_finish(p, n);
}

static struct node *parse_call_block(struct parser *p, struct node *n) {
  n->params = is(p, T_LPAREN) ? parse_signature(p) : qtr_tpl_parser_alloc(p, sizeof *n->params);
  n->a = qtr_tpl_parse_expression(p);
  if (!n->params || !n->a) return NULL;
  if (n->a->kind != N_CALL) return qtr_tpl_parser_fail(p, QTR_ERR_FORMAT, "a call block needs a call: {%% call name(…) %%}");
  if (!parse_function_body(p, n, end_call)) return NULL;
  return qtr_tpl_node_finish(p, n);
}

static struct node *parse_with(struct parser *p, struct node *n) {
  while (!is(p, T_BLOCK_END) && !is(p, T_COLON)) {
    if (n->other.n > 0 && !expect(p, T_COMMA, "',' or '%}'")) return NULL;
    struct node *target = parse_target(p, false, NULL);
    if (!qtr_tpl_node_add(p, &n->other, target) || !expect(p, T_ASSIGN, "'='") ||
        !qtr_tpl_node_add(p, &n->other, qtr_tpl_parse_expression(p))) {
      return NULL;
    }
  }
  if (!parse_block(p, end_with, &n->items)) return NULL;
  next(p);
  return qtr_tpl_node_finish(p, n);
}

static struct node *parse_print(struct parser *p, struct node *n) {
  while (!is(p, T_BLOCK_END)) {
    if (n->items.n > 0 && !expect(p, T_COMMA, "','")) return NULL;
    if (!qtr_tpl_node_add(p, &n->items, qtr_tpl_parse_expression(p))) return NULL;
  }
  return qtr_tpl_node_finish(p, n);
}

static struct node *parse_statement(struct parser *p) {
  if (!is(p, T_NAME)) return qtr_tpl_parser_expected(p, "a tag name");
  const struct token *tag = p->t;
  struct node *n = qtr_tpl_node_make(p, N_BODY);
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
    n->b = qtr_tpl_parse_filters(p, NULL);
    if (!n->b || !parse_block(p, end_filter, &n->items)) return NULL;
    next(p);
    return qtr_tpl_node_finish(p, n);
  }
  if (token_is_name(tag, "with")) {
    n->kind = N_WITH;
    return parse_with(p, n);
  }
  if (token_is_name(tag, "generation")) {
    n->kind = N_SCOPE;
    if (!parse_block(p, end_generation, &n->items)) return NULL;
    next(p);
    return qtr_tpl_node_finish(p, n);
  }
  if (token_is_name(tag, "print")) {
    n->kind = N_OUTPUT;
    return parse_print(p, n);
  }
  if (token_is_name(tag, "break") || token_is_name(tag, "continue")) {
    if (p->loops == 0) return qtr_tpl_parser_fail(p, QTR_ERR_FORMAT, "break or continue outside of a for loop");
    n->kind = token_is_name(tag, "break") ? N_BREAK : N_CONTINUE;
    return qtr_tpl_node_finish(p, n);
  }
  static const char *const refused[] = {"extends", "include", "import", "from", "block", "autoescape"};
  for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
    if (token_is_name(tag, refused[i])) {
      return qtr_tpl_parser_fail(p, QTR_ERR_UNSUPPORTED, "the tag '%s' is not supported: a chat template stands alone",
                                 refused[i]);
    }
  }
  p->t = tag;
  char text[48];
  return qtr_tpl_parser_fail(p, QTR_ERR_FORMAT, "unknown or misplaced tag '%s'", qtr_tpl_token_describe(tag, text));
}

/* Statements up to {% one of ends (ends NULL: the end of the template); line: where the block began. The end tag's name is
 * then the current token. */
static bool parse_body(struct parser *p, const char *const *ends, int32_t line, struct node_list *body) {
  if (!qtr_tpl_parser_enter(p)) return false;
  while (!p->failed && !is(p, T_EOF)) {
    struct node *n = NULL;
    if (is(p, T_DATA)) {
      n = qtr_tpl_node_const_string(p, N_DATA, p->t->text, p->t->len);
      next(p);
    } else if (skip_if(p, T_VARIABLE_BEGIN)) {
      n = qtr_tpl_node_make(p, N_OUTPUT);
      if (!n || !qtr_tpl_node_add(p, &n->items, qtr_tpl_parse_tuple(p, TUPLE_EXPRESSIONS, NULL, false))) break;
      if (!expect(p, T_VARIABLE_END, "'}}'")) break;
      n = qtr_tpl_node_finish(p, n);
    } else if (skip_if(p, T_BLOCK_BEGIN)) {
      for (size_t i = 0; ends && ends[i]; i++) {
        if (is_name(p, ends[i])) {
          qtr_tpl_parser_leave(p);
          return true;
        }
      }
      n = parse_statement(p);
      if (n && !expect(p, T_BLOCK_END, "'%}'")) break;
    } else {
      (void)qtr_tpl_parser_expected(p, "text or a tag");
    }
    if (!qtr_tpl_node_add(p, body, n)) break;
  }
  qtr_tpl_parser_leave(p);
  if (!p->failed && ends) {
    while (strncmp(*ends, "end", 3) != 0) ends++;
    (void)qtr_tpl_parser_fail(p, QTR_ERR_FORMAT, "the template ends, but the block of line %d needs '{%% %s %%}'", (int)line,
                              *ends);
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
  made->loop_name = qtr_tpl_parser_intern(&p, "loop", 4);
  struct node *body = qtr_tpl_node_make(&p, N_BODY);
  if (body && parse_body(&p, NULL, 1, &body->items)) made->body = qtr_tpl_node_finish(&p, body);
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
