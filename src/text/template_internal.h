/* template_internal.h - what the template_*.c files share: bounds, values, syntax tree, evaluator state. Private to
 * src/text.
 *
 * All memory of a parsed template is one arena that is immutable after parsing; all memory of one rendering is another one
 * that dies with the rendering. Errors are sticky: the first one is kept in struct eval, everything after returns quickly
 * with an undefined value. The semantics are those of Python's jinja2 with trim_blocks, lstrip_blocks and the immutable
 * sandbox. */
#ifndef QTR_TEXT_TEMPLATE_INTERNAL_H
#define QTR_TEXT_TEMPLATE_INTERNAL_H

#include "base/status.h"
#include "text/template.h"

#include <string.h>

/* ---- bounds: a template and its data are untrusted ------------------------------------------- */
#define TPL_MAX_SOURCE ((size_t)1 << 20)  /* bytes of a template */
#define TPL_MAX_NEST 100                  /* parser recursion: brackets, blocks, unary operators */
#define TPL_MAX_NODE_DEPTH 400            /* height of a syntax tree: a + b + c + … leans to the left */
#define TPL_MAX_ARGUMENTS 256             /* parameters of a macro, keywords of a call: both are searched */
#define TPL_MAX_NAMES 10000               /* different identifiers: keeps a hostile hash table quick, too */
#define TPL_MAX_EVAL_DEPTH 1000           /* C recursion of the evaluator, macros included */
#define TPL_MAX_STEPS ((uint64_t)5000000) /* nodes evaluated; long strings and lists cost more than one */
#define TPL_STEP_BYTES 32                 /* bytes a string operation may touch for one step */
#define TPL_STEP_CHARS 8                  /* the same where it looks at every character */
#define TPL_MAX_OUTPUT ((size_t)16 << 20) /* bytes of a rendering, and of any string made on the way */
#define TPL_MAX_PARSE_ARENA ((size_t)256 << 20)
#define TPL_MAX_RENDER_ARENA ((size_t)128 << 20)
#define TPL_MAX_RANGE 100000            /* as the sandbox of jinja2 */
#define TPL_MAX_ITEMS ((size_t)1 << 20) /* entries of a list made by the template */
#define TPL_MAX_VALUE_DEPTH 200         /* nested JSON, nested lists: repr, tojson, comparison recurse */

/* ---- arena ----------------------------------------------------------------------------------- */
struct arena_chunk;
struct arena {
  struct arena_chunk *chunk;
  size_t n_bytes, limit; /* allocated so far, at most */
};
void *qtr_tpl_arena_alloc(struct arena *arena, size_t n_bytes); /* 16-byte aligned, not zeroed; NULL: limit or no memory */
void qtr_tpl_arena_free(struct arena *arena);

/* ---- values ---------------------------------------------------------------------------------- */
enum value_type {
  V_MISSING = 0, /* an argument that was not given; never seen by a template */
  V_UNDEFINED,
  V_NONE,
  V_BOOL,
  V_INT,
  V_FLOAT,
  V_STRING,
  V_LIST,
  V_TUPLE,
  V_DICT,
  V_RANGE,
  V_VIEW, /* dict.items(), .keys(), .values(); which one: sub */
  V_ITERATOR,
  V_NAMESPACE,
  V_LOOP,
  V_MACRO,
  V_METHOD,
  V_FUNCTION
};
enum view_kind { VIEW_KEYS, VIEW_VALUES, VIEW_ITEMS };
enum undefined_kind { UNDEF_NAME, UNDEF_ATTRIBUTE, UNDEF_UNSAFE, UNDEF_HINT };

struct str {
  const char *data; /* (len) UTF-8, not NUL-terminated; slices share their parent's bytes */
  size_t len;
  ptrdiff_t n_chars;       /* code points; -1 = not counted yet */
  bool markup;             /* marked safe: what is joined to it gets escaped */
  struct str_store *store; /* appendable bytes behind data, or NULL */
};
/* Strings made by + share a growing store: `s = s + x` in a loop costs amortised len(x), not len(s). */
struct str_store {
  char *data;
  size_t used, capacity;
};

struct value {
  uint8_t type; /* enum value_type */
  uint8_t sub;  /* V_VIEW: view_kind; V_UNDEFINED: undefined_kind */
  uint8_t of;   /* V_UNDEFINED: type of the object that had no such attribute */
  union {
    bool b;
    int64_t i;
    double f;
    struct str *s; /* V_STRING; V_UNDEFINED: the name or hint, may be NULL */
    struct list *l;
    struct dict *d; /* V_DICT, V_VIEW, V_NAMESPACE */
    struct range *range;
    struct iterator *it;
    struct loop *loop;
    struct macro *macro;
    struct method *method;
    const struct builtin *function;
  };
};

struct list {
  struct value *items; /* (n) */
  size_t n;
  struct list_store *store; /* as str_store */
};
struct list_store {
  struct value *items;
  size_t used, capacity;
};
struct dict_entry {
  struct value key, value;
  uint64_t hash;
};
struct dict {
  struct dict_entry *entries; /* (n) in order of insertion */
  size_t n, capacity;
  uint32_t *index; /* (index_size) entry + 1, 0 = free; NULL while small */
  size_t index_size;
};
struct range {
  int64_t start, stop, step;
  size_t n;
};
/* What map, select, items … return: computed at once, but consumed like a generator. An error met while computing is kept
 * and raised when the consumer gets there, as a lazy generator would. */
struct iterator {
  const char *kind; /* "generator" … for repr and messages */
  struct value *items;
  size_t n, pos;
  const struct qtr_error *pending; /* or NULL */
};
struct loop {
  struct value *items;
  size_t n, index0;
  const struct qtr_error *pending; /* the iterable failed after n items */
  struct value changed;            /* last argument tuple of loop.changed() */
};
struct macro {
  const struct node *node; /* N_MACRO, N_CALL_BLOCK */
  struct scope *scope;     /* where it was defined */
};
struct method {
  struct value self;
  const struct builtin *def;
};

/* ---- syntax tree ----------------------------------------------------------------------------- */
enum node_kind {
  /* expressions */
  N_CONST,   /* value */
  N_NAME,    /* name */
  N_TUPLE,   /* items */
  N_LIST,    /* items */
  N_DICT,    /* items: key, value, key, value … */
  N_COND,    /* a if b else c; c may be NULL */
  N_OR,      /* a, b */
  N_AND,     /* a, b */
  N_NOT,     /* a */
  N_COMPARE, /* a, then items[i] by ops[i] */
  N_BINARY,  /* a op b */
  N_CONCAT,  /* items */
  N_NEG,     /* a */
  N_POS,     /* a */
  N_GETATTR, /* a . value */
  N_GETITEM, /* a [ b ] */
  N_SLICE,   /* only as b of N_GETITEM: a : b : c, each may be NULL */
  N_CALL,    /* a ( args ) */
  N_FILTER,  /* a | value ( args ); a is NULL in a filter block */
  N_TEST,    /* a is value ( args ) */
  N_NSREF,   /* assignment target name . value */
  /* statements */
  N_DATA,         /* value */
  N_OUTPUT,       /* items */
  N_FOR,          /* for a in b if c; items = body; other = else */
  N_IF,           /* items: test, body, test, body …, [else body]; bodies are N_BODY */
  N_BODY,         /* items */
  N_SET,          /* a = b */
  N_SET_BLOCK,    /* a; b = filter chain or NULL; items = body */
  N_MACRO,        /* name; params; items = body */
  N_CALL_BLOCK,   /* a = call; params; items = body */
  N_FILTER_BLOCK, /* b = filter chain; items = body */
  N_WITH,         /* other = targets and values alternating; items = body */
  N_SCOPE,        /* items (generation) */
  N_BREAK,
  N_CONTINUE
};
enum op {
  OP_ADD,
  OP_SUB,
  OP_MUL,
  OP_DIV,
  OP_FLOORDIV,
  OP_MOD,
  OP_POW,
  OP_EQ,
  OP_NE,
  OP_LT,
  OP_LE,
  OP_GT,
  OP_GE,
  OP_IN,
  OP_NOT_IN
};

struct node_list {
  struct node **items;
  uint32_t n, capacity;
};
struct call_args {
  struct node_list positional, keyword; /* keyword: values, their names in names */
  struct str **names;
  struct node *star, *star_star; /* *args, **kwargs or NULL */
};
struct params {
  uint32_t n, n_defaults; /* defaults belong to the last n_defaults parameters */
  uint32_t *names;        /* (n) name ids */
  struct node **defaults; /* (n_defaults) */
  bool uses_varargs, uses_kwargs, uses_caller;
  uint32_t id_varargs, id_kwargs, id_caller;
};
struct node {
  uint8_t kind, op;
  uint16_t depth; /* height of the tree below */
  int32_t line;
  uint32_t name; /* name id */
  struct value value;
  struct node *a, *b, *c;
  struct node_list items, other;
  union {
    struct call_args *args;
    struct params *params;
    uint8_t *ops; /* (items.n) enum op */
  };
  const struct builtin *builtin; /* N_FILTER, N_TEST: found at parse time; NULL = no such thing, an error when it runs */
};

struct qtr_template {
  struct arena arena;
  struct node *body;  /* N_BODY */
  struct str **names; /* (n_names) every identifier once; index = name id */
  uint32_t n_names;
  uint32_t loop_name; /* id of "loop" */
};

/* ---- lexer ----------------------------------------------------------------------------------- */
enum token_type {
  T_EOF,
  T_DATA,
  T_VARIABLE_BEGIN,
  T_VARIABLE_END,
  T_BLOCK_BEGIN,
  T_BLOCK_END,
  T_NAME,
  T_STRING,
  T_INTEGER,
  T_FLOAT,
  T_ADD,
  T_SUB,
  T_DIV,
  T_FLOORDIV,
  T_MUL,
  T_MOD,
  T_POW,
  T_TILDE,
  T_LBRACKET,
  T_RBRACKET,
  T_LPAREN,
  T_RPAREN,
  T_LBRACE,
  T_RBRACE,
  T_EQ,
  T_NE,
  T_GT,
  T_GTEQ,
  T_LT,
  T_LTEQ,
  T_ASSIGN,
  T_DOT,
  T_COLON,
  T_PIPE,
  T_COMMA,
  T_SEMICOLON
};
struct token {
  uint8_t type;
  int32_t line;
  const char *text; /* T_DATA, T_NAME, T_STRING (unescaped) */
  size_t len;
  union {
    int64_t i;
    double f;
  };
};
/* *tokens is malloc'ed and ends with T_EOF; texts live in the arena. */
enum qtr_status qtr_tpl_lex(struct arena *arena, const char *source, size_t len, struct token **tokens, size_t *n_tokens,
                            struct qtr_error *err);

/* ---- evaluator ------------------------------------------------------------------------------- */
struct scope {
  struct scope *parent;
  struct binding {
    uint32_t name;
    struct value value;
  } * bindings; /* (n) */
  uint32_t n, capacity;
  bool captured; /* a macro keeps it: a loop may not reuse it for its next turn */
};

struct output {
  char *data; /* (capacity) malloc'ed for the rendering, arena for captures */
  size_t len, capacity;
  bool heap;
};

struct eval {
  const struct qtr_template *tpl;
  const json_t *variables;
  struct arena arena;
  struct qtr_error *err; /* never NULL */
  bool failed;
  int32_t line;
  int depth;
  uint64_t steps;
  size_t rest_bytes; /* charged bytes that make no whole step yet */
  struct scope *scope;
  struct value *globals; /* (n_names) V_MISSING = not looked up yet */
  struct output *out;
};

struct args {
  struct value *positional;
  size_t n_positional;
  struct keyword {
    struct str *name;
    struct value value;
  } * keyword;
  size_t n_keyword;
};

/* A filter, test, method or function. `in` is the filtered value, the method's object, or nothing for a function. params
 * names the parameters ("old new count"), the first n_required must be given: a[i] is then bound, V_MISSING where absent.
 * With params NULL it takes raw arguments and a is NULL. */
struct builtin {
  const char *name;
  struct value (*run)(struct eval *ev, struct value in, const struct value *a, const struct args *raw);
  const char *params;
  uint8_t n_required;
  uint8_t on; /* methods: the type they belong to */
};
#define TPL_MAX_PARAMS 6

/* template_eval.c */
void qtr_tpl_exec(struct eval *ev, const struct node *body);
struct value qtr_tpl_call_builtin(struct eval *ev, const struct builtin *b, struct value in, const struct args *args);
struct value qtr_tpl_call_macro(struct eval *ev, const struct macro *macro, const struct args *args);
void qtr_tpl_write(struct eval *ev, struct output *out, const char *data, size_t len);
void qtr_tpl_write_text(struct eval *ev, struct output *out, const char *text);
struct value qtr_tpl_output_string(struct eval *ev, const struct output *out); /* of a capture: shares its bytes */

/* template_filters.c, template_tests.c (and functions), template_methods.c: NULL = no such thing */
const struct builtin *qtr_tpl_find_filter(const char *name, size_t len);
const struct builtin *qtr_tpl_find_test(const char *name, size_t len);
const struct builtin *qtr_tpl_find_method(enum value_type type, const char *name, size_t len, bool *unsafe);
const struct builtin *qtr_tpl_find_function(const char *name, size_t len);

/* template_value.c. Everything that can fail sets ev->failed and returns an undefined or zero value. */
struct value qtr_tpl_fail(struct eval *ev, enum qtr_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
struct value qtr_tpl_fail_undefined(struct eval *ev, struct value v); /* "'x' is undefined" */
bool qtr_tpl_charge(struct eval *ev, size_t n_steps);                 /* false: out of steps */
bool qtr_tpl_charge_bytes(struct eval *ev, size_t n_bytes);
void *qtr_tpl_alloc(struct eval *ev, size_t n_bytes);
void *qtr_tpl_alloc_array(struct eval *ev, size_t n, size_t size);
const char *qtr_tpl_type_name(struct value v);

static inline struct value qtr_tpl_none(void) { return (struct value){.type = V_NONE}; }
static inline struct value qtr_tpl_bool(bool b) { return (struct value){.type = V_BOOL, .b = b}; }
static inline struct value qtr_tpl_int(int64_t i) { return (struct value){.type = V_INT, .i = i}; }
static inline struct value qtr_tpl_float(double f) { return (struct value){.type = V_FLOAT, .f = f}; }
static inline struct value qtr_tpl_undefined(void) { return (struct value){.type = V_UNDEFINED}; }
struct value qtr_tpl_undefined_hint(struct eval *ev, const char *hint);     /* hint: static */
struct value qtr_tpl_string(struct eval *ev, const char *data, size_t len); /* does not copy */
struct value qtr_tpl_string_copy(struct eval *ev, const char *data, size_t len);
struct value qtr_tpl_string_static(struct eval *ev, const char *text);
struct value qtr_tpl_markup(struct eval *ev, struct value string, bool markup); /* the same bytes, marked or not */
struct value qtr_tpl_concat(struct eval *ev, struct value a, struct value b);   /* two strings; no escaping */
struct value qtr_tpl_escape(struct eval *ev, struct value v);                   /* HTML-escaped markup of str(v) */
size_t qtr_tpl_n_chars(struct eval *ev, struct str *s);                   /* counts once; ev NULL: for free, when parsing */
size_t qtr_tpl_char_offset(struct eval *ev, struct str *s, size_t index); /* byte offset of a code point; len past the end */
struct value qtr_tpl_list(struct eval *ev, enum value_type type, size_t n); /* V_LIST or V_TUPLE of n unset items */
struct value qtr_tpl_list_concat(struct eval *ev, struct value a, struct value b);
struct value qtr_tpl_dict(struct eval *ev);
bool qtr_tpl_hash(struct eval *ev, struct value v, uint64_t *hash, int depth);     /* false: not hashable (no error set) */
struct value *qtr_tpl_dict_get(struct eval *ev, struct dict *d, struct value key); /* NULL: none (or not hashable) */
void qtr_tpl_dict_set(struct eval *ev, struct dict *d, struct value key, struct value v);
struct value qtr_tpl_iterator(struct eval *ev, const char *kind, struct value list, const struct qtr_error *pending);
struct value qtr_tpl_from_json(struct eval *ev, const json_t *json, int depth);

bool qtr_tpl_truth(struct value v);
bool qtr_tpl_is_iterable(struct value v);
bool qtr_tpl_is_number(struct value v); /* bool, int, float */
double qtr_tpl_number(struct value v);
bool qtr_tpl_length(struct eval *ev, struct value v, size_t *n); /* false: has no len() */
bool qtr_tpl_equal(struct eval *ev, struct value a, struct value b, int depth);
bool qtr_tpl_less(struct eval *ev, struct value a, struct value b, enum op op); /* op: LT, LE, GT, GE */
bool qtr_tpl_contains(struct eval *ev, struct value item, struct value in);
/* The items of anything iterable; an iterator is consumed. *pending: an error to raise after them, may be passed as NULL,
 * then it is raised at once. */
bool qtr_tpl_items(struct eval *ev, struct value v, struct value **items, size_t *n, const struct qtr_error **pending);
void qtr_tpl_raise(struct eval *ev, const struct qtr_error *pending); /* a stored error, NULL is allowed */

/* template_ops.c */
struct value qtr_tpl_binary(struct eval *ev, enum op op, struct value a, struct value b);
struct value qtr_tpl_negate(struct eval *ev, struct value v, bool negative);
struct value qtr_tpl_getattr(struct eval *ev, struct value v, struct str *name);
struct value qtr_tpl_getitem(struct eval *ev, struct value v, struct value key);
struct value qtr_tpl_getpath(struct eval *ev, struct value v, struct value path); /* "a.b.0" or an integer */
struct value qtr_tpl_slice(struct eval *ev, struct value v, struct value start, struct value stop, struct value step);

/* template_format.c */
struct value qtr_tpl_str(struct eval *ev, struct value v);      /* str(v) */
struct value qtr_tpl_soft_str(struct eval *ev, struct value v); /* as str, but keeps markup */
void qtr_tpl_write_str(struct eval *ev, struct output *out, struct value v);
void qtr_tpl_write_repr(struct eval *ev, struct output *out, struct value v, int depth);
struct json_style {
  bool ascii, sort_keys, indented;
  struct str *indent, *item_separator, *key_separator;
};
void qtr_tpl_write_json(struct eval *ev, struct output *out, struct value v, const struct json_style *style, int depth);
#define TPL_FLOAT_CHARS 32
size_t qtr_tpl_float_repr(double f, char text[TPL_FLOAT_CHARS]);
bool qtr_tpl_parse_float(const char *text, size_t len, double *f);          /* Python's float(str) */
bool qtr_tpl_parse_int(const char *text, size_t len, int base, int64_t *i); /* Python's int(str, base) */
struct value qtr_tpl_percent_format(struct eval *ev, struct value format, struct value args);
struct value qtr_tpl_str_format(struct eval *ev, struct value format, const struct args *args);

/* template_unicode.c */
size_t qtr_tpl_decode(const char *data, size_t len, uint32_t *cp); /* bytes used, 1 … 4; a broken byte is one character */
size_t qtr_tpl_encode(uint32_t cp, char out[4]);
bool qtr_tpl_is_space(uint32_t cp);
bool qtr_tpl_is_line_break(uint32_t cp);
bool qtr_tpl_is_printable(uint32_t cp);
bool qtr_tpl_is_identifier(uint32_t cp, bool first);
bool qtr_tpl_is_cased(uint32_t cp);
bool qtr_tpl_is_case_ignorable(uint32_t cp); /* letters around it are one word for the final sigma */
bool qtr_tpl_is_alpha(uint32_t cp);
bool qtr_tpl_is_digit(uint32_t cp);   /* decimal digits */
bool qtr_tpl_is_numeric(uint32_t cp); /* and fractions, Roman numerals … */
bool qtr_tpl_is_upper(uint32_t cp);
bool qtr_tpl_is_lower(uint32_t cp);
enum letter_case { CASE_LOWER, CASE_UPPER, CASE_TITLE, CASE_FOLD };
size_t qtr_tpl_map_case(uint32_t cp, enum letter_case to, uint32_t out[3]); /* number of code points */
bool qtr_tpl_is_utf8(const char *data, size_t len, size_t *offset);

#endif
