/* template_nodes.c - the parser's base: error messages, nodes in the arena, the height of the tree (TPL_MAX_NODE_DEPTH), and
 * the table that gives every identifier a number. */
#include "text/template_parser.h"

#include <stdarg.h>
#include <stdio.h>

void *qtr_tpl_parser_fail(struct parser *p, enum qtr_status status, const char *format, ...) {
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

const char *qtr_tpl_token_describe(const struct token *t, char text[48]) {
  static const char *const names[] = {[T_EOF] = "end of template", [T_DATA] = "text",       [T_VARIABLE_BEGIN] = "{{",
                                      [T_VARIABLE_END] = "}}",     [T_BLOCK_BEGIN] = "{%",  [T_BLOCK_END] = "%}",
                                      [T_STRING] = "string",       [T_INTEGER] = "integer", [T_FLOAT] = "float"};
  if (t->type == T_NAME || t->type > T_FLOAT) return qtr_printable(t->text, t->len, text, 48);
  return names[t->type];
}

void *qtr_tpl_parser_expected(struct parser *p, const char *what) {
  char text[48];
  return qtr_tpl_parser_fail(p, QTR_ERR_FORMAT, "expected %s, found '%s'", what, qtr_tpl_token_describe(p->t, text));
}

bool qtr_tpl_parser_enter(struct parser *p) {
  if (p->failed) return false;
  if (++p->nest > TPL_MAX_NEST) {
    (void)qtr_tpl_parser_fail(p, QTR_ERR_LIMIT, "nested more than %d levels deep", TPL_MAX_NEST);
    return false;
  }
  return true;
}
void qtr_tpl_parser_leave(struct parser *p) { p->nest--; }

void *qtr_tpl_parser_alloc(struct parser *p, size_t n_bytes) {
  void *memory = p->failed ? NULL : qtr_tpl_arena_alloc(&p->tpl->arena, n_bytes);
  if (!memory) return qtr_tpl_parser_fail(p, QTR_ERR_LIMIT, "the template needs over %zu bytes", TPL_MAX_PARSE_ARENA);
  memset(memory, 0, n_bytes);
  return memory;
}

struct node *qtr_tpl_node_make(struct parser *p, enum node_kind kind) {
  struct node *n = qtr_tpl_parser_alloc(p, sizeof *n);
  if (!n) return NULL;
  n->kind = (uint8_t)kind;
  n->line = p->t->line;
  return n;
}

bool qtr_tpl_node_add(struct parser *p, struct node_list *list, struct node *n) {
  if (!n || p->failed) return false;
  if (list->n == list->capacity) {
    uint32_t capacity = list->capacity ? list->capacity * 2 : 4;
    struct node **items = qtr_tpl_parser_alloc(p, capacity * sizeof *items);
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
struct node *qtr_tpl_node_finish(struct parser *p, struct node *n) {
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
  if (depth > TPL_MAX_NODE_DEPTH) return qtr_tpl_parser_fail(p, QTR_ERR_LIMIT, "more than %d levels", TPL_MAX_NODE_DEPTH);
  n->depth = depth;
  return n;
}

struct str *qtr_tpl_node_str(struct parser *p, const char *data, size_t len) {
  struct str *s = qtr_tpl_parser_alloc(p, sizeof *s);
  if (!s) return NULL;
  *s = (struct str){.data = data, .len = len, .n_chars = -1};
  (void)qtr_tpl_n_chars(NULL, s); /* counted now: a parsed template never changes, several threads render it */
  return s;
}

static uint64_t hash_bytes(const char *data, size_t len) {
  uint64_t h = 1469598103934665603u;
  for (size_t i = 0; i < len; i++) h = (h ^ (uint8_t)data[i]) * 1099511628211u;
  return h ^ (h >> 29);
}

/* The id of an identifier: its place in tpl->names. */
uint32_t qtr_tpl_parser_intern(struct parser *p, const char *name, size_t len) {
  struct qtr_template *tpl = p->tpl;
  if (p->failed) return 0;
  if (tpl->n_names == TPL_MAX_NAMES) {
    (void)qtr_tpl_parser_fail(p, QTR_ERR_LIMIT, "more than %d different names", TPL_MAX_NAMES);
    return 0;
  }
  if (tpl->n_names == p->names_capacity) {
    uint32_t capacity = p->names_capacity ? p->names_capacity * 2 : 64;
    struct str **names = qtr_tpl_parser_alloc(p, capacity * sizeof *names);
    if (!names) return 0;
    if (tpl->n_names) memcpy(names, tpl->names, tpl->n_names * sizeof *names);
    tpl->names = names;
    p->names_capacity = capacity;
    p->name_index_size = (size_t)capacity * 2; /* a power of two, at most half full */
    p->name_index = qtr_tpl_parser_alloc(p, p->name_index_size * sizeof *p->name_index);
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
  struct str *s = qtr_tpl_node_str(p, name, len);
  if (!s) return 0;
  tpl->names[tpl->n_names] = s;
  p->name_index[at] = tpl->n_names + 1;
  return tpl->n_names++;
}

struct node *qtr_tpl_node_const_string(struct parser *p, enum node_kind kind, const char *data, size_t len) {
  struct node *n = qtr_tpl_node_make(p, kind);
  if (!n) return NULL;
  n->value = (struct value){.type = V_STRING, .s = qtr_tpl_node_str(p, data, len)};
  return qtr_tpl_node_finish(p, n);
}
