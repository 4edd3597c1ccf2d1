/* template_eval.c - runs a syntax tree: statements, scopes, macros, expressions, output. Scopes follow jinja2: a loop turn,
 * a macro, a block assignment each has its own; `if` has none; names are looked up outwards, assignments stay inside. */
#include "text/template_internal.h"

#include "base/checked.h"

#include <stdlib.h>

enum flow { FLOW_NORMAL, FLOW_BREAK, FLOW_CONTINUE };

static struct value eval(struct eval *ev, const struct node *n);
static enum flow exec_list(struct eval *ev, const struct node_list *list);

/* ---- output ---------------------------------------------------------------------------------- */

void qtr_tpl_write(struct eval *ev, struct output *out, const char *data, size_t len) {
  if (ev->failed || len == 0) return;
  size_t need;
  if (qtr_add_overflow(out->len, len, &need) || need > TPL_MAX_OUTPUT) {
    (void)qtr_tpl_fail(ev, QTR_ERR_LIMIT, "the text grows past %zu MiB", TPL_MAX_OUTPUT >> 20);
    return;
  }
  if (need > out->capacity || !out->data) {
    size_t capacity = QTR_MAX(need + 1, out->capacity * 2);
    char *grown;
    if (out->heap) {
      grown = realloc(out->data, capacity + 1);
      if (!grown) {
        (void)qtr_tpl_fail(ev, QTR_ERR_MEMORY, "no memory for %zu bytes of text", capacity);
        return;
      }
    } else {
      grown = qtr_tpl_alloc(ev, capacity + 1);
      if (!grown) return;
      if (out->data) memcpy(grown, out->data, out->len);
    }
    out->data = grown;
    out->capacity = capacity;
  }
  if (!qtr_tpl_charge_bytes(ev, len)) return;
  if (len) memcpy(out->data + out->len, data, len);
  out->len = need;
}

void qtr_tpl_write_text(struct eval *ev, struct output *out, const char *text) {
  qtr_tpl_write(ev, out, text, strlen(text));
}

struct value qtr_tpl_output_string(struct eval *ev, const struct output *out) {
  return qtr_tpl_string(ev, out->data ? out->data : "", out->len);
}

/* ---- scopes ---------------------------------------------------------------------------------- */

static struct scope *push_scope(struct eval *ev, struct scope *parent) {
  struct scope *s = qtr_tpl_alloc(ev, sizeof *s);
  if (!s) return NULL;
  *s = (struct scope){.parent = parent};
  ev->scope = s;
  return s;
}

static void bind(struct eval *ev, struct scope *s, uint32_t name, struct value v) {
  if (ev->failed) return;
  for (uint32_t i = 0; i < s->n; i++) {
    if (s->bindings[i].name == name) {
      s->bindings[i].value = v;
      return;
    }
  }
  if (!qtr_tpl_charge(ev, s->n / 8)) return;
  if (s->n == s->capacity) {
    uint32_t capacity = s->capacity ? s->capacity * 2 : 4;
    struct binding *grown = qtr_tpl_alloc_array(ev, capacity, sizeof *grown);
    if (!grown) return;
    if (s->n) memcpy(grown, s->bindings, s->n * sizeof *grown);
    s->bindings = grown;
    s->capacity = capacity;
  }
  s->bindings[s->n].name = name;
  s->bindings[s->n].value = v;
  s->n++;
}

static struct value lookup(struct eval *ev, uint32_t name) {
  for (const struct scope *s = ev->scope; s; s = s->parent) {
    for (uint32_t i = 0; i < s->n; i++) {
      if (s->bindings[i].name == name) return s->bindings[i].value;
    }
    if (!qtr_tpl_charge(ev, s->n / 8)) return qtr_tpl_undefined();
  }
  struct value *global = &ev->globals[name];
  if (global->type != V_MISSING) return *global;
  struct str *text = ev->tpl->names[name];
  char *key = qtr_tpl_alloc(ev, text->len + 1);
  if (!key) return qtr_tpl_undefined();
  memcpy(key, text->data, text->len);
  key[text->len] = 0;
  const json_t *variable = json_object_get(ev->variables, key);
  const struct builtin *function = qtr_tpl_find_function(text->data, text->len);
  if (variable) {
    *global = qtr_tpl_from_json(ev, variable, 0);
  } else if (function) {
    *global = (struct value){.type = V_FUNCTION, .function = function};
  } else {
    *global = (struct value){.type = V_UNDEFINED, .sub = UNDEF_NAME, .s = text};
  }
  return *global;
}

/* A macro keeps its scope: no loop around it may reuse one. */
static struct value make_macro(struct eval *ev, const struct node *n) {
  struct macro *m = qtr_tpl_alloc(ev, sizeof *m);
  if (!m) return qtr_tpl_undefined();
  *m = (struct macro){.node = n, .scope = ev->scope};
  for (struct scope *s = ev->scope; s && !s->captured; s = s->parent) s->captured = true;
  return (struct value){.type = V_MACRO, .macro = m};
}

static void assign(struct eval *ev, struct scope *scope, const struct node *target, struct value v) {
  if (ev->failed) return;
  if (target->kind == N_NAME) {
    bind(ev, scope, target->name, v);
  } else if (target->kind == N_NSREF) {
    struct value ns = lookup(ev, target->name);
    const struct str *attribute = target->value.s;
    if (ns.type != V_NAMESPACE) {
      (void)qtr_tpl_fail(ev, QTR_ERR_FORMAT, "cannot assign an attribute on '%s': only on a namespace",
                         qtr_tpl_type_name(ns));
    } else if (attribute->len && attribute->data[0] == '_') {
      (void)qtr_tpl_fail(ev, QTR_ERR_FORMAT, "a namespace takes no attribute that starts with an underscore");
    } else {
      qtr_tpl_dict_set(ev, ns.d, target->value, v);
    }
  } else {
    struct value *items;
    size_t n;
    if (!qtr_tpl_items(ev, v, &items, &n, NULL)) return;
    if (n != target->items.n) {
      (void)qtr_tpl_fail(ev, QTR_ERR_FORMAT, "cannot unpack: expected %u values, got %zu", target->items.n, n);
      return;
    }
    for (size_t i = 0; i < n; i++) assign(ev, scope, target->items.items[i], items[i]);
  }
}

/* ---- calls ----------------------------------------------------------------------------------- */

static bool same_name(const struct str *s, const char *name, size_t len) {
  return s->len == len && memcmp(s->data, name, len) == 0;
}

struct value qtr_tpl_call_builtin(struct eval *ev, const struct builtin *b, struct value in, const struct args *args) {
  if (ev->failed) return qtr_tpl_undefined();
  if (!b->params) return b->run(ev, in, NULL, args);
  struct value bound[TPL_MAX_PARAMS] = {{0}};
  if (!qtr_tpl_charge(ev, args->n_keyword / 4)) return qtr_tpl_undefined();
  size_t n = 0, n_used = 0;
  for (const char *name = b->params; *name; n++) {
    size_t len = strcspn(name, " ");
    if (n < args->n_positional) bound[n] = args->positional[n];
    for (size_t k = 0; k < args->n_keyword; k++) {
      if (!same_name(args->keyword[k].name, name, len)) continue;
      if (n < args->n_positional) return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "%s: an argument is given twice", b->name);
      bound[n] = args->keyword[k].value;
      n_used++;
    }
    if (n < b->n_required && bound[n].type == V_MISSING) {
      return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "%s: missing argument '%.*s'", b->name, (int)len, name);
    }
    name += len;
    if (*name == ' ') name++;
  }
  if (args->n_positional > n) {
    return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "%s takes at most %zu arguments, %zu given", b->name, n, args->n_positional);
  }
  if (n_used < args->n_keyword) return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "%s: unknown keyword argument", b->name);
  return b->run(ev, in, bound, args);
}

/* Binds varargs, kwargs, caller where the body uses them; complains about what is left over otherwise. */
static void bind_extra(struct eval *ev, struct scope *s, const struct params *p, const struct args *args, bool *taken) {
  struct value caller = qtr_tpl_undefined_hint(ev, "No caller defined");
  struct value kwargs = qtr_tpl_dict(ev);
  for (size_t k = 0; k < args->n_keyword && !ev->failed; k++) {
    if (taken[k]) continue;
    if (p->uses_caller && same_name(args->keyword[k].name, "caller", 6)) {
      caller = args->keyword[k].value;
    } else if (p->uses_kwargs) {
      struct value key = {.type = V_STRING, .s = args->keyword[k].name};
      qtr_tpl_dict_set(ev, kwargs.d, key, args->keyword[k].value);
    } else {
      char name[48];
      (void)qtr_tpl_fail(ev, QTR_ERR_FORMAT, "a macro takes no keyword argument '%s'",
                         qtr_printable(args->keyword[k].name->data, args->keyword[k].name->len, name, sizeof name));
    }
  }
  if (p->uses_caller) bind(ev, s, p->id_caller, caller);
  if (p->uses_kwargs) bind(ev, s, p->id_kwargs, kwargs);
  if (p->uses_varargs) {
    size_t n = args->n_positional > p->n ? args->n_positional - p->n : 0;
    struct value rest = qtr_tpl_list(ev, V_TUPLE, n);
    if (n && !ev->failed) memcpy(rest.l->items, args->positional + p->n, n * sizeof *rest.l->items);
    bind(ev, s, p->id_varargs, rest);
  } else if (args->n_positional > p->n) {
    (void)qtr_tpl_fail(ev, QTR_ERR_FORMAT, "a macro takes at most %u arguments, %zu given", p->n, args->n_positional);
  }
}

struct value qtr_tpl_call_macro(struct eval *ev, const struct macro *macro, const struct args *args) {
  const struct node *n = macro->node;
  const struct params *p = n->params;
  struct scope *outer = ev->scope, *s = push_scope(ev, macro->scope);
  struct output out = {0}, *outer_out = ev->out;
  bool *taken = qtr_tpl_alloc_array(ev, args->n_keyword, sizeof *taken);
  if (!s || !taken || !qtr_tpl_charge(ev, (p->n + 1) * args->n_keyword / 4)) goto done;
  memset(taken, 0, args->n_keyword * sizeof *taken);
  for (uint32_t i = 0; i < p->n && !ev->failed; i++) {
    struct value v = {.type = V_MISSING};
    const struct str *name = ev->tpl->names[p->names[i]];
    if (i < args->n_positional) {
      v = args->positional[i];
    } else {
      for (size_t k = 0; k < args->n_keyword; k++) {
        if (!same_name(args->keyword[k].name, name->data, name->len)) continue;
        v = args->keyword[k].value;
        taken[k] = true;
      }
    }
    if (v.type == V_MISSING) {
      if (i + p->n_defaults >= p->n) {
        v = eval(ev, p->defaults[i + p->n_defaults - p->n]); /* sees the parameters before it */
      } else {
        v = (struct value){.type = V_UNDEFINED, .sub = UNDEF_NAME, .s = ev->tpl->names[p->names[i]]};
      }
    }
    bind(ev, s, p->names[i], v);
  }
  bind_extra(ev, s, p, args, taken);
  ev->out = &out;
  if (!ev->failed) (void)exec_list(ev, &n->items);
done:
  ev->out = outer_out;
  ev->scope = outer;
  return ev->failed ? qtr_tpl_undefined() : qtr_tpl_output_string(ev, &out);
}

/* Evaluates arguments; caller, when not missing, is added as the keyword caller. */
static bool eval_args(struct eval *ev, const struct call_args *from, struct value caller, struct args *to) {
  *to = (struct args){0};
  if (ev->failed) return false;
  if (!from && caller.type == V_MISSING) return true;
  static const struct call_args none = {0};
  if (!from) from = &none;
  struct value star = from->star ? eval(ev, from->star) : qtr_tpl_undefined();
  struct value star_star = from->star_star ? eval(ev, from->star_star) : qtr_tpl_undefined();
  struct value *more = NULL;
  size_t n_more = 0;
  if (from->star && !qtr_tpl_items(ev, star, &more, &n_more, NULL)) return false;
  if (from->star_star && star_star.type != V_DICT) {
    (void)qtr_tpl_fail(ev, QTR_ERR_FORMAT, "an argument after ** must be a mapping, not '%s'", qtr_tpl_type_name(star_star));
    return false;
  }
  to->n_positional = from->positional.n + n_more;
  to->n_keyword = from->keyword.n + (from->star_star ? star_star.d->n : 0) + (caller.type != V_MISSING);
  to->positional = qtr_tpl_alloc_array(ev, to->n_positional, sizeof *to->positional);
  to->keyword = qtr_tpl_alloc_array(ev, to->n_keyword, sizeof *to->keyword);
  if (!to->positional || !to->keyword) return false;
  for (uint32_t i = 0; i < from->positional.n; i++) to->positional[i] = eval(ev, from->positional.items[i]);
  if (n_more) memcpy(to->positional + from->positional.n, more, n_more * sizeof *more);
  size_t k = 0;
  for (; k < from->keyword.n; k++) {
    to->keyword[k].name = from->names[k];
    to->keyword[k].value = eval(ev, from->keyword.items[k]);
  }
  for (size_t i = 0; from->star_star && i < star_star.d->n; i++, k++) {
    const struct dict_entry *e = &star_star.d->entries[i];
    if (e->key.type != V_STRING) (void)qtr_tpl_fail(ev, QTR_ERR_FORMAT, "the keys after ** must be strings");
    to->keyword[k].name = e->key.s;
    to->keyword[k].value = e->value;
  }
  if (caller.type != V_MISSING) {
    static const char word[] = "caller";
    struct value name = qtr_tpl_string_static(ev, word);
    to->keyword[k].name = name.s;
    to->keyword[k].value = caller;
  }
  return qtr_tpl_charge(ev, (to->n_positional + to->n_keyword) / 4);
}

static struct value call(struct eval *ev, const struct node *n, struct value caller) {
  struct value callee = eval(ev, n->a);
  struct args args;
  if (!eval_args(ev, n->args, caller, &args)) return qtr_tpl_undefined();
  ev->line = n->line;
  switch (callee.type) {
    case V_METHOD: return qtr_tpl_call_builtin(ev, callee.method->def, callee.method->self, &args);
    case V_FUNCTION: return qtr_tpl_call_builtin(ev, callee.function, qtr_tpl_none(), &args);
    case V_MACRO: return qtr_tpl_call_macro(ev, callee.macro, &args);
    case V_UNDEFINED: return qtr_tpl_fail_undefined(ev, callee);
    case V_LOOP: return qtr_tpl_fail(ev, QTR_ERR_UNSUPPORTED, "recursive loops are not supported");
    default: return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "'%s' object is not callable", qtr_tpl_type_name(callee));
  }
}

static struct value apply(struct eval *ev, const struct node *n, struct value in) {
  struct args args;
  const char *what = n->kind == N_FILTER ? "filter" : "test";
  if (ev->failed) return qtr_tpl_undefined();
  if (!n->builtin) {
    char name[48];
    return qtr_tpl_fail(ev, QTR_ERR_UNSUPPORTED, "there is no %s named '%s'", what,
                        qtr_printable(n->value.s->data, n->value.s->len, name, sizeof name));
  }
  if (!eval_args(ev, n->args, (struct value){.type = V_MISSING}, &args)) return qtr_tpl_undefined();
  ev->line = n->line;
  return qtr_tpl_call_builtin(ev, n->builtin, in, &args);
}

/* A chain of filters over text captured by a filter block or block assignment: its innermost input is that text. */
static struct value apply_chain(struct eval *ev, const struct node *n, struct value text) {
  if (++ev->depth > TPL_MAX_EVAL_DEPTH) return qtr_tpl_fail(ev, QTR_ERR_LIMIT, "filters are nested too deeply");
  struct value v = apply(ev, n, n->a ? apply_chain(ev, n->a, text) : text);
  ev->depth--;
  return v;
}

/* ---- expressions ----------------------------------------------------------------------------- */

static struct value eval_sequence(struct eval *ev, const struct node *n) {
  struct value list = qtr_tpl_list(ev, n->kind == N_LIST ? V_LIST : V_TUPLE, n->items.n);
  for (uint32_t i = 0; !ev->failed && i < n->items.n; i++) list.l->items[i] = eval(ev, n->items.items[i]);
  return list;
}

static struct value eval_dict(struct eval *ev, const struct node *n) {
  struct value d = qtr_tpl_dict(ev);
  for (uint32_t i = 0; !ev->failed && i + 1 < n->items.n; i += 2) {
    struct value key = eval(ev, n->items.items[i]);
    struct value v = eval(ev, n->items.items[i + 1]);
    qtr_tpl_dict_set(ev, d.d, key, v);
  }
  return d;
}

static struct value eval_compare(struct eval *ev, const struct node *n) {
  struct value left = eval(ev, n->a), result = qtr_tpl_undefined();
  for (uint32_t i = 0; !ev->failed && i < n->items.n; i++) {
    struct value right = eval(ev, n->items.items[i]);
    result = qtr_tpl_binary(ev, (enum op)n->ops[i], left, right);
    if (!qtr_tpl_truth(result)) break;
    left = right;
  }
  return result;
}

static struct value eval_concat(struct eval *ev, const struct node *n) {
  struct value text = qtr_tpl_str(ev, eval(ev, n->items.items[0]));
  for (uint32_t i = 1; !ev->failed && i < n->items.n; i++) {
    struct value next = qtr_tpl_soft_str(ev, eval(ev, n->items.items[i]));
    text = qtr_tpl_concat(ev, text, next);
  }
  return text;
}

static struct value eval_getitem(struct eval *ev, const struct node *n) {
  struct value object = eval(ev, n->a), part[3] = {{.type = V_MISSING}, {.type = V_MISSING}, {.type = V_MISSING}};
  if (n->b->kind != N_SLICE) {
    struct value key = eval(ev, n->b);
    ev->line = n->line;
    return qtr_tpl_getitem(ev, object, key);
  }
  if (n->b->a) part[0] = eval(ev, n->b->a);
  if (n->b->b) part[1] = eval(ev, n->b->b);
  if (n->b->c) part[2] = eval(ev, n->b->c);
  ev->line = n->line;
  return qtr_tpl_slice(ev, object, part[0], part[1], part[2]);
}

static struct value eval_binary(struct eval *ev, const struct node *n) {
  struct value a = eval(ev, n->a);
  struct value b = eval(ev, n->b);
  ev->line = n->line;
  return qtr_tpl_binary(ev, (enum op)n->op, a, b);
}

static struct value eval_node(struct eval *ev, const struct node *n) {
  struct value v;
  switch (n->kind) {
    case N_CONST: return n->value;
    case N_NAME: return lookup(ev, n->name);
    case N_TUPLE:
    case N_LIST: return eval_sequence(ev, n);
    case N_DICT: return eval_dict(ev, n);
    case N_COND:
      v = eval(ev, n->b);
      if (ev->failed) return v;
      if (qtr_tpl_truth(v)) return eval(ev, n->a);
      return n->c ? eval(ev, n->c)
                  : qtr_tpl_undefined_hint(ev, "the inline if-expression evaluated to false and has no else");
    case N_OR: v = eval(ev, n->a); return ev->failed || qtr_tpl_truth(v) ? v : eval(ev, n->b);
    case N_AND: v = eval(ev, n->a); return ev->failed || !qtr_tpl_truth(v) ? v : eval(ev, n->b);
    case N_NOT: return qtr_tpl_bool(!qtr_tpl_truth(eval(ev, n->a)));
    case N_COMPARE: return eval_compare(ev, n);
    case N_BINARY: return eval_binary(ev, n);
    case N_CONCAT: return eval_concat(ev, n);
    case N_NEG:
    case N_POS: v = eval(ev, n->a); return qtr_tpl_negate(ev, v, n->kind == N_NEG);
    case N_GETATTR:
      v = eval(ev, n->a);
      ev->line = n->line;
      return qtr_tpl_getattr(ev, v, n->value.s);
    case N_GETITEM: return eval_getitem(ev, n);
    case N_CALL: return call(ev, n, (struct value){.type = V_MISSING});
    case N_FILTER:
    case N_TEST: v = eval(ev, n->a); return apply(ev, n, v);
    default: return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "this cannot be used as an expression");
  }
}

static struct value eval(struct eval *ev, const struct node *n) {
  if (!qtr_tpl_charge(ev, 1)) return qtr_tpl_undefined();
  if (ev->depth >= TPL_MAX_EVAL_DEPTH) {
    return qtr_tpl_fail(ev, QTR_ERR_LIMIT, "expressions and macros are nested more than %d levels deep", TPL_MAX_EVAL_DEPTH);
  }
  ev->depth++;
  ev->line = n->line;
  struct value v = eval_node(ev, n);
  ev->depth--;
  return ev->failed ? qtr_tpl_undefined() : v;
}

/* ---- statements ------------------------------------------------------------------------------ */

/* The items of a loop that pass its `if`, whose scope holds only the target. */
static bool filter_items(struct eval *ev, const struct node *n, struct value **items, size_t *n_items) {
  struct scope *outer = ev->scope, *s = push_scope(ev, outer);
  struct value list = qtr_tpl_list(ev, V_LIST, *n_items);
  size_t kept = 0;
  for (size_t i = 0; i < *n_items && !ev->failed; i++) {
    s->n = 0;
    assign(ev, s, n->a, (*items)[i]);
    if (ev->failed || !qtr_tpl_truth(eval(ev, n->c))) continue;
    list.l->items[kept++] = (*items)[i];
  }
  ev->scope = outer;
  if (ev->failed) return false;
  *items = list.l->items;
  *n_items = kept;
  return true;
}

static enum flow exec_for(struct eval *ev, const struct node *n) {
  struct value *items;
  size_t n_items;
  const struct qtr_error *pending;
  struct value iterable = eval(ev, n->b);
  ev->line = n->line;
  if (!qtr_tpl_items(ev, iterable, &items, &n_items, &pending)) return FLOW_NORMAL;
  if (n->c && !filter_items(ev, n, &items, &n_items)) return FLOW_NORMAL;
  struct scope *outer = ev->scope, *s = NULL;
  struct loop *loop = qtr_tpl_alloc(ev, sizeof *loop);
  if (!loop) return FLOW_NORMAL;
  *loop = (struct loop){.items = items, .n = n_items, .pending = pending};
  bool finished_a_turn = false; /* jinja2 runs `else` unless some turn came to its end */
  enum flow flow = FLOW_NORMAL;
  for (size_t i = 0; i < n_items && qtr_tpl_charge(ev, 1) && flow != FLOW_BREAK; i++) {
    if (!s || s->captured) s = push_scope(ev, outer);
    if (!s) break;
    s->n = 0;
    loop->index0 = i;
    bind(ev, s, ev->tpl->loop_name, (struct value){.type = V_LOOP, .loop = loop});
    assign(ev, s, n->a, items[i]);
    ev->scope = s;
    flow = exec_list(ev, &n->items);
    if (flow == FLOW_NORMAL) finished_a_turn = true;
  }
  ev->scope = outer;
  if (flow != FLOW_BREAK) qtr_tpl_raise(ev, pending);
  flow = FLOW_NORMAL;
  if (!finished_a_turn && n->other.n && !ev->failed) {
    (void)push_scope(ev, outer);
    flow = exec_list(ev, &n->other);
    ev->scope = outer;
  }
  return flow;
}

static enum flow exec_if(struct eval *ev, const struct node *n) {
  uint32_t i = 0;
  for (; i + 1 < n->items.n; i += 2) {
    bool yes = qtr_tpl_truth(eval(ev, n->items.items[i]));
    if (ev->failed) return FLOW_NORMAL;
    if (yes) return exec_list(ev, &n->items.items[i + 1]->items);
  }
  return i < n->items.n ? exec_list(ev, &n->items.items[i]->items) : FLOW_NORMAL;
}

/* Runs a body in a scope of its own with its output captured. */
static enum flow capture(struct eval *ev, const struct node_list *body, struct value *text) {
  struct scope *outer = ev->scope;
  struct output out = {0}, *outer_out = ev->out;
  enum flow flow = FLOW_NORMAL;
  ev->out = &out;
  if (push_scope(ev, outer)) flow = exec_list(ev, body);
  ev->out = outer_out;
  *text = qtr_tpl_output_string(ev, &out);
  return flow; /* ev->scope stays inside, for the filters; the caller restores it */
}

static enum flow exec_capture(struct eval *ev, const struct node *n) {
  struct scope *outer = ev->scope;
  struct value text;
  enum flow flow = capture(ev, &n->items, &text);
  if (flow == FLOW_NORMAL && n->b) text = apply_chain(ev, n->b, text);
  ev->scope = outer;
  if (flow != FLOW_NORMAL || ev->failed) return flow;
  if (n->kind == N_SET_BLOCK) {
    assign(ev, outer, n->a, text);
  } else {
    qtr_tpl_write_str(ev, ev->out, text);
  }
  return FLOW_NORMAL;
}

static enum flow exec_scope(struct eval *ev, const struct node *n) {
  struct scope *outer = ev->scope, *s = qtr_tpl_alloc(ev, sizeof *s);
  if (!s) return FLOW_NORMAL;
  *s = (struct scope){.parent = outer};
  for (uint32_t i = 0; i + 1 < n->other.n; i += 2) assign(ev, s, n->other.items[i], eval(ev, n->other.items[i + 1]));
  ev->scope = s;
  enum flow flow = exec_list(ev, &n->items);
  ev->scope = outer;
  return flow;
}

static enum flow exec(struct eval *ev, const struct node *n) {
  switch (n->kind) {
    case N_DATA: qtr_tpl_write(ev, ev->out, n->value.s->data, n->value.s->len); return FLOW_NORMAL;
    case N_OUTPUT:
      for (uint32_t i = 0; i < n->items.n && !ev->failed; i++) {
        struct value v = eval(ev, n->items.items[i]);
        if (!ev->failed) qtr_tpl_write_str(ev, ev->out, v);
      }
      return FLOW_NORMAL;
    case N_FOR: return exec_for(ev, n);
    case N_IF: return exec_if(ev, n);
    case N_SET: assign(ev, ev->scope, n->a, eval(ev, n->b)); return FLOW_NORMAL;
    case N_SET_BLOCK:
    case N_FILTER_BLOCK: return exec_capture(ev, n);
    case N_MACRO: bind(ev, ev->scope, n->name, make_macro(ev, n)); return FLOW_NORMAL;
    case N_CALL_BLOCK: {
      struct value v = call(ev, n->a, make_macro(ev, n));
      if (!ev->failed) qtr_tpl_write_str(ev, ev->out, v);
      return FLOW_NORMAL;
    }
    case N_WITH:
    case N_SCOPE: return exec_scope(ev, n);
    case N_BREAK: return FLOW_BREAK;
    case N_CONTINUE: return FLOW_CONTINUE;
    default: return FLOW_NORMAL;
  }
}

static enum flow exec_list(struct eval *ev, const struct node_list *list) {
  enum flow flow = FLOW_NORMAL;
  if (ev->depth >= TPL_MAX_EVAL_DEPTH) {
    (void)qtr_tpl_fail(ev, QTR_ERR_LIMIT, "blocks and macros are nested more than %d levels deep", TPL_MAX_EVAL_DEPTH);
    return flow;
  }
  ev->depth++;
  for (uint32_t i = 0; i < list->n && flow == FLOW_NORMAL && qtr_tpl_charge(ev, 1); i++) {
    ev->line = list->items[i]->line;
    flow = exec(ev, list->items[i]);
  }
  ev->depth--;
  return flow;
}

enum qtr_status qtr_template_render(const struct qtr_template *tpl, const json_t *variables, char **text, size_t *len,
                                    struct qtr_error *err) {
  *text = NULL;
  *len = 0;
  if (!json_is_object(variables)) return qtr_fail(err, QTR_ERR_ARGUMENT, "template variables must be a JSON object");
  struct qtr_error local = {0};
  struct output out = {.heap = true};
  struct eval ev = {.tpl = tpl, .variables = variables, .err = &local, .line = 1, .out = &out};
  ev.arena.limit = TPL_MAX_RENDER_ARENA;
  ev.globals = qtr_tpl_alloc_array(&ev, tpl->n_names, sizeof *ev.globals);
  if (ev.globals) memset(ev.globals, 0, tpl->n_names * sizeof *ev.globals);
  if (ev.globals && push_scope(&ev, NULL)) (void)exec_list(&ev, &tpl->body->items);
  if (!ev.failed && !out.data) {
    out.data = malloc(1);
    if (!out.data) (void)qtr_tpl_fail(&ev, QTR_ERR_MEMORY, "no memory for the text");
  }
  qtr_tpl_arena_free(&ev.arena);
  if (ev.failed || !out.data) {
    free(out.data);
    if (err) *err = local;
    return local.status;
  }
  out.data[out.len] = 0;
  *text = out.data;
  *len = out.len;
  return QTR_OK;
}
