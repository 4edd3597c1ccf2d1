/* unpickle.c - the restricted pickle machine (unpickle.h; spec A.8). Memory is bounded by the length of the pickle: every
 * instruction makes at most one value, and copies only what it takes off the stack. */
#include "checkpoint/unpickle.h"

#include "base/checked.h"
#include "base/status.h"

#include <stdlib.h>
#include <string.h>

#define MAX_PICKLE_BYTES ((size_t)32 << 20) /* a state dict of a thousand tensors has 200 KB */
#define BLOCK_BYTES ((size_t)64 << 10)

typedef struct qtr_pickle_value value;

struct block {
  struct block *next;
  size_t used, size;
  max_align_t memory[];
};

struct qtr_pickle {
  const uint8_t *begin, *p, *end;
  struct block *blocks; /* values, tensors and lists; freed together */
  value **stack;        /* (n_stack) */
  size_t n_stack, stack_capacity;
  value **memo; /* (n_memo) NULL where nothing was put */
  size_t n_memo;
  struct qtr_error *err;
};

/* ---- the classes it knows ------------------------------------------------------------------------ */

enum class { CLASS_DICT, CLASS_TENSOR, CLASS_PARAMETER, CLASS_STORAGE };

static const struct {
  const char *module, *name;
  enum class class;
  enum qtr_dtype dtype; /* of a storage */
} classes[] = {
    {"collections", "OrderedDict", CLASS_DICT, 0},
    {"torch._utils", "_rebuild_tensor_v2", CLASS_TENSOR, 0},
    {"torch._utils", "_rebuild_parameter", CLASS_PARAMETER, 0},
    {"torch", "DoubleStorage", CLASS_STORAGE, QTR_DTYPE_F64},
    {"torch", "FloatStorage", CLASS_STORAGE, QTR_DTYPE_F32},
    {"torch", "HalfStorage", CLASS_STORAGE, QTR_DTYPE_F16},
    {"torch", "BFloat16Storage", CLASS_STORAGE, QTR_DTYPE_BF16},
    {"torch", "CharStorage", CLASS_STORAGE, QTR_DTYPE_I8},
    {"torch", "ByteStorage", CLASS_STORAGE, QTR_DTYPE_U8},
    {"torch", "ShortStorage", CLASS_STORAGE, QTR_DTYPE_I16},
    {"torch", "IntStorage", CLASS_STORAGE, QTR_DTYPE_I32},
    {"torch", "LongStorage", CLASS_STORAGE, QTR_DTYPE_I64},
    {"torch", "BoolStorage", CLASS_STORAGE, QTR_DTYPE_BOOL},
};
#define N_CLASSES (sizeof classes / sizeof *classes)

/* ---- memory, stack, input: each false after filling err ------------------------------------------- */

static bool bad(struct qtr_pickle *m, const char *what) {
  (void)qtr_fail(m->err, QTR_ERR_FORMAT, "the pickle is malformed: %s", what);
  return false;
}

static void *take(struct qtr_pickle *m, size_t n_bytes) {
  n_bytes = qtr_round_up(n_bytes, sizeof(max_align_t)); /* callers pass at most a few times MAX_PICKLE_BYTES */
  if (!m->blocks || m->blocks->size - m->blocks->used < n_bytes) {
    size_t size = QTR_MAX(n_bytes, BLOCK_BYTES);
    struct block *b = malloc(sizeof *b + size);
    if (!b) {
      (void)qtr_fail_memory(m->err, "the pickle", size);
      return NULL;
    }
    *b = (struct block){.next = m->blocks, .size = size};
    m->blocks = b;
  }
  void *p = (uint8_t *)m->blocks->memory + m->blocks->used;
  m->blocks->used += n_bytes;
  memset(p, 0, n_bytes);
  return p;
}

static bool push(struct qtr_pickle *m, value *v) {
  if (!v) return false;
  if (m->n_stack == m->stack_capacity) {
    size_t capacity = m->stack_capacity ? 2 * m->stack_capacity : 256;
    value **stack = realloc(m->stack, capacity * sizeof *stack);
    if (!stack) {
      (void)qtr_fail_memory(m->err, "the pickle's stack", capacity * sizeof *stack);
      return false;
    }
    m->stack = stack;
    m->stack_capacity = capacity;
  }
  m->stack[m->n_stack++] = v;
  return true;
}

static value *make(struct qtr_pickle *m, enum qtr_pickle_kind kind) {
  value *v = take(m, sizeof *v);
  if (v) v->kind = kind;
  return v;
}

static bool push_int(struct qtr_pickle *m, enum qtr_pickle_kind kind, int64_t x) {
  value *v = make(m, kind);
  if (v) v->u.integer = x;
  return push(m, v);
}

/* NULL when the stack is empty or a mark is on top. */
static value *top(const struct qtr_pickle *m) {
  value *v = m->n_stack ? m->stack[m->n_stack - 1] : NULL;
  return v && v->kind != QTR_PICKLE_MARK ? v : NULL;
}

static value *pop(struct qtr_pickle *m) {
  value *v = top(m);
  if (v) m->n_stack--;
  return v;
}

/* The values above the last mark; the mark and they leave the stack but stay readable until the next push. */
static bool pop_mark(struct qtr_pickle *m, value ***items, size_t *n) {
  for (size_t i = m->n_stack; i-- > 0;) {
    if (m->stack[i]->kind != QTR_PICKLE_MARK) continue;
    *items = m->stack + i + 1;
    *n = m->n_stack - i - 1;
    m->n_stack = i;
    return true;
  }
  return bad(m, "there is no mark on the stack");
}

static bool need(struct qtr_pickle *m, size_t n, const uint8_t **p) {
  if ((size_t)(m->end - m->p) < n) return bad(m, "it ends inside an instruction");
  *p = m->p;
  m->p += n;
  return true;
}

/* n bytes, little endian, n <= 8. */
static bool number(struct qtr_pickle *m, size_t n, uint64_t *x) {
  const uint8_t *p;
  if (!need(m, n, &p)) return false;
  *x = 0;
  for (size_t i = n; i-- > 0;) *x = *x << 8 | p[i];
  return true;
}

/* ---- building ------------------------------------------------------------------------------------ */

static bool append(struct qtr_pickle *m, value *list, value *const *items, size_t n) {
  if (list->u.list.capacity - list->u.list.n < n) {
    /* doubling keeps the sum of all copies within twice the number of items */
    size_t capacity = QTR_MAX(2 * list->u.list.capacity, list->u.list.n + n);
    value **more = take(m, capacity * sizeof *more);
    if (!more) return false;
    if (list->u.list.n) memcpy(more, list->u.list.item, list->u.list.n * sizeof *more);
    list->u.list.item = more;
    list->u.list.capacity = capacity;
  }
  if (n) memcpy(list->u.list.item + list->u.list.n, items, n * sizeof *items);
  list->u.list.n += n;
  return true;
}

static bool push_list(struct qtr_pickle *m, enum qtr_pickle_kind kind, value *const *items, size_t n) {
  value *v = make(m, kind);
  return v && append(m, v, items, n) && push(m, v);
}

/* A tuple of the top n values. */
static bool push_tuple(struct qtr_pickle *m, size_t n) {
  if (m->n_stack < n) return bad(m, "the stack is too short");
  for (size_t i = 0; i < n; i++) {
    if (m->stack[m->n_stack - 1 - i]->kind == QTR_PICKLE_MARK) return bad(m, "a tuple would take a mark");
  }
  m->n_stack -= n;
  return push_list(m, QTR_PICKLE_TUPLE, m->stack + m->n_stack, n);
}

static bool push_string(struct qtr_pickle *m, uint64_t len) {
  const uint8_t *p;
  if (len > SIZE_MAX) return bad(m, "a string is too long");
  if (!need(m, (size_t)len, &p)) return false;
  value *v = make(m, QTR_PICKLE_STRING);
  if (v) {
    v->u.string.text = (const char *)p;
    v->u.string.len = (size_t)len;
  }
  return push(m, v);
}

static bool push_global(struct qtr_pickle *m, const char *module, size_t module_len, const char *name, size_t name_len) {
  for (size_t i = 0; i < N_CLASSES; i++) {
    if (strlen(classes[i].module) == module_len && memcmp(classes[i].module, module, module_len) == 0 &&
        strlen(classes[i].name) == name_len && memcmp(classes[i].name, name, name_len) == 0) {
      return push_int(m, QTR_PICKLE_GLOBAL, (int64_t)i);
    }
  }
  char a[64], b[64];
  (void)qtr_fail(m->err, QTR_ERR_UNSUPPORTED,
                 "the pickle wants to use %s.%s; only dictionaries and plain tensors are read, nothing is ever run",
                 qtr_printable(module, module_len, a, sizeof a), qtr_printable(name, name_len, b, sizeof b));
  return false;
}

/* GLOBAL: two lines of text. */
static bool read_global(struct qtr_pickle *m) {
  const char *text[2];
  size_t len[2];
  for (int i = 0; i < 2; i++) {
    const uint8_t *line_end = memchr(m->p, '\n', (size_t)(m->end - m->p));
    if (!line_end) return bad(m, "the name of a class has no end");
    text[i] = (const char *)m->p;
    len[i] = (size_t)(line_end - m->p);
    m->p = line_end + 1;
  }
  return push_global(m, text[0], len[0], text[1], len[1]);
}

static bool stack_global(struct qtr_pickle *m) {
  const value *name = pop(m), *module = pop(m);
  if (!name || !module || name->kind != QTR_PICKLE_STRING || module->kind != QTR_PICKLE_STRING) {
    return bad(m, "the name of a class is no string");
  }
  return push_global(m, module->u.string.text, module->u.string.len, name->u.string.text, name->u.string.len);
}

/* ('storage', torch.HalfStorage, '0', 'cpu', n_elements) */
static bool push_storage(struct qtr_pickle *m) {
  const value *id = pop(m);
  if (!id || id->kind != QTR_PICKLE_TUPLE || id->u.list.n < 5) return bad(m, "a persistent id is no tuple of five");
  value *const *item = id->u.list.item;
  if (item[0]->kind != QTR_PICKLE_STRING || item[0]->u.string.len != 7 ||
      memcmp(item[0]->u.string.text, "storage", 7) != 0 || item[1]->kind != QTR_PICKLE_GLOBAL ||
      classes[item[1]->u.integer].class != CLASS_STORAGE || item[2]->kind != QTR_PICKLE_STRING ||
      item[4]->kind != QTR_PICKLE_INT || item[4]->u.integer < 0) {
    return bad(m, "a persistent id is no torch storage");
  }
  value *v = make(m, QTR_PICKLE_STORAGE);
  if (v) {
    v->u.storage.key = item[2]->u.string.text;
    v->u.storage.key_len = item[2]->u.string.len;
    v->u.storage.n_elements = (size_t)item[4]->u.integer;
    v->u.storage.dtype = classes[item[1]->u.integer].dtype;
  }
  return push(m, v);
}

static bool read_sizes(struct qtr_pickle *m, const value *tuple, size_t *out, size_t *n) {
  if (tuple->kind != QTR_PICKLE_TUPLE || tuple->u.list.n > QTR_MAX_DIMS)
    return bad(m, "a tensor's shape is no tuple of at most 8");
  for (size_t i = 0; i < tuple->u.list.n; i++) {
    const value *x = tuple->u.list.item[i];
    if (x->kind != QTR_PICKLE_INT || x->u.integer < 0) return bad(m, "a tensor's shape or stride is no number or negative");
    out[i] = (size_t)x->u.integer;
  }
  *n = tuple->u.list.n;
  return true;
}

/* _rebuild_tensor_v2(storage, offset, shape, stride, requires_grad, hooks[, metadata]) */
static bool push_tensor(struct qtr_pickle *m, const value *args) {
  if (args->u.list.n < 4) return bad(m, "a tensor has too few arguments");
  value *const *a = args->u.list.item;
  if (a[0]->kind != QTR_PICKLE_STORAGE) return bad(m, "a tensor has no storage");
  if (a[1]->kind != QTR_PICKLE_INT || a[1]->u.integer < 0) return bad(m, "a tensor's offset is no number or negative");
  value *v = make(m, QTR_PICKLE_TENSOR);
  if (!v || !(v->u.tensor = take(m, sizeof *v->u.tensor))) return false;
  size_t n_strides = 0;
  if (!read_sizes(m, a[2], v->u.tensor->shape, &v->u.tensor->n_dims) ||
      !read_sizes(m, a[3], v->u.tensor->stride, &n_strides)) {
    return false;
  }
  if (n_strides != v->u.tensor->n_dims) return bad(m, "a tensor's shape and stride differ in length");
  v->u.tensor->storage = a[0];
  v->u.tensor->offset = (size_t)a[1]->u.integer;
  return push(m, v);
}

static bool reduce(struct qtr_pickle *m) {
  const value *args = pop(m), *callable = pop(m);
  if (!args || !callable || args->kind != QTR_PICKLE_TUPLE || callable->kind != QTR_PICKLE_GLOBAL) {
    return bad(m, "a call of something that is no known class");
  }
  switch (classes[callable->u.integer].class) {
    case CLASS_DICT:
      if (args->u.list.n != 0) return bad(m, "an OrderedDict with arguments");
      return push_list(m, QTR_PICKLE_DICT, NULL, 0);
    case CLASS_TENSOR: return push_tensor(m, args);
    case CLASS_PARAMETER:
      if (args->u.list.n < 1 || args->u.list.item[0]->kind != QTR_PICKLE_TENSOR)
        return bad(m, "a parameter without a tensor");
      return push(m, args->u.list.item[0]);
    default: return bad(m, "a storage cannot be called");
  }
}

static bool set_items(struct qtr_pickle *m, value *const *items, size_t n) {
  value *dict = top(m);
  if (!dict || dict->kind != QTR_PICKLE_DICT || n % 2 != 0) return bad(m, "items for something that is no dictionary");
  return append(m, dict, items, n);
}

static bool append_items(struct qtr_pickle *m, value *const *items, size_t n) {
  value *list = top(m);
  if (!list || list->kind != QTR_PICKLE_LIST) return bad(m, "items for something that is no list");
  return append(m, list, items, n);
}

/* BUILD sets attributes of an object (state dicts carry a _metadata): nothing here has any, so the state is dropped. */
static bool build(struct qtr_pickle *m) {
  if (!pop(m) || !top(m)) return bad(m, "a state without an object");
  if (top(m)->kind != QTR_PICKLE_DICT) return bad(m, "a state for something that is no dictionary");
  return true;
}

static bool put_memo(struct qtr_pickle *m, uint64_t i) {
  value *v = top(m);
  if (!v) return bad(m, "nothing to remember");
  /* writers count from 0, and each thing took an instruction */
  if (i >= (size_t)(m->end - m->begin)) return bad(m, "too many things to remember");
  if (i >= m->n_memo) {
    size_t n = QTR_MAX(2 * m->n_memo, (size_t)i + 256);
    value **memo = realloc(m->memo, n * sizeof *memo);
    if (!memo) {
      (void)qtr_fail_memory(m->err, "the pickle's memo", n * sizeof *memo);
      return false;
    }
    memset(memo + m->n_memo, 0, (n - m->n_memo) * sizeof *memo);
    m->memo = memo;
    m->n_memo = n;
  }
  m->memo[i] = v;
  return true;
}

static bool get_memo(struct qtr_pickle *m, uint64_t i) {
  if (i >= m->n_memo || !m->memo[i]) return bad(m, "it recalls what was never remembered");
  return push(m, m->memo[i]);
}

/* LONG1, LONG4: two's complement of n bytes. Longer than 8 is no size of anything. */
static bool push_long(struct qtr_pickle *m, uint64_t n) {
  uint64_t x;
  if (n > 8) return bad(m, "a number has more than 64 bits");
  if (!number(m, (size_t)n, &x)) return false;
  if (n > 0 && n < 8 && x >> (8 * n - 1)) x |= UINT64_MAX << (8 * n);
  return push_int(m, QTR_PICKLE_INT, (int64_t)x);
}

/* ---- the machine --------------------------------------------------------------------------------- */

static bool push_float(struct qtr_pickle *m) {
  const uint8_t *p;
  if (!need(m, 8, &p)) return false;
  uint64_t bits = 0;
  for (int i = 0; i < 8; i++) bits = bits << 8 | p[i];
  value *v = make(m, QTR_PICKLE_FLOAT);
  if (v) memcpy(&v->u.real, &bits, sizeof bits);
  return push(m, v);
}

/* One instruction. n_memoized counts what MEMOIZE remembered: its place is not written down. */
static bool step(struct qtr_pickle *m, uint8_t op, size_t *n_memoized) {
  uint64_t x;
  value **items, *item[2];
  size_t n;
  switch (op) {
    case 0x80: return number(m, 1, &x) && (x <= 5 || bad(m, "its protocol is newer than 5"));
    case 0x95: return number(m, 8, &x); /* FRAME: a hint for readers */
    case '(': return push(m, make(m, QTR_PICKLE_MARK));
    case '0': return pop(m) || bad(m, "nothing to drop");
    case '1': return pop_mark(m, &items, &n);
    case '2': return top(m) ? push(m, top(m)) : bad(m, "nothing to repeat");
    case 'N': return push(m, make(m, QTR_PICKLE_NONE));
    case 0x88: return push_int(m, QTR_PICKLE_BOOL, 1);
    case 0x89: return push_int(m, QTR_PICKLE_BOOL, 0);
    case 'K': return number(m, 1, &x) && push_int(m, QTR_PICKLE_INT, (int64_t)x);
    case 'M': return number(m, 2, &x) && push_int(m, QTR_PICKLE_INT, (int64_t)x);
    case 'J': return number(m, 4, &x) && push_int(m, QTR_PICKLE_INT, (int64_t)x - (x >> 31 ? (int64_t)1 << 32 : 0));
    case 0x8a: return number(m, 1, &x) && push_long(m, x);
    case 0x8b: return number(m, 4, &x) && push_long(m, x);
    case 'G': return push_float(m);
    case 'X': return number(m, 4, &x) && push_string(m, x);
    case 0x8c: return number(m, 1, &x) && push_string(m, x);
    case 0x8d: return number(m, 8, &x) && push_string(m, x);
    case 'U': return number(m, 1, &x) && push_string(m, x);
    case 'T': return number(m, 4, &x) && push_string(m, x);
    case '}': return push_list(m, QTR_PICKLE_DICT, NULL, 0);
    case ']': return push_list(m, QTR_PICKLE_LIST, NULL, 0);
    case ')': return push_list(m, QTR_PICKLE_TUPLE, NULL, 0);
    case 't': return pop_mark(m, &items, &n) && push_list(m, QTR_PICKLE_TUPLE, items, n);
    case 'l': return pop_mark(m, &items, &n) && push_list(m, QTR_PICKLE_LIST, items, n);
    case 'd':
      return pop_mark(m, &items, &n) && (n % 2 == 0 || bad(m, "a key without a value")) &&
             push_list(m, QTR_PICKLE_DICT, items, n);
    case 0x85: return push_tuple(m, 1);
    case 0x86: return push_tuple(m, 2);
    case 0x87: return push_tuple(m, 3);
    case 's':
      item[1] = pop(m);
      item[0] = pop(m);
      return item[0] && item[1] ? set_items(m, item, 2) : bad(m, "the stack is too short");
    case 'u': return pop_mark(m, &items, &n) && set_items(m, items, n);
    case 'a': item[0] = pop(m); return item[0] ? append_items(m, item, 1) : bad(m, "the stack is too short");
    case 'e': return pop_mark(m, &items, &n) && append_items(m, items, n);
    case 'q': return number(m, 1, &x) && put_memo(m, x);
    case 'r': return number(m, 4, &x) && put_memo(m, x);
    case 0x94: return put_memo(m, (*n_memoized)++);
    case 'h': return number(m, 1, &x) && get_memo(m, x);
    case 'j': return number(m, 4, &x) && get_memo(m, x);
    case 'c': return read_global(m);
    case 0x93: return stack_global(m);
    case 'Q': return push_storage(m);
    case 'R': return reduce(m);
    case 'b': return build(m);
    default: break;
  }
  (void)qtr_fail(m->err, QTR_ERR_UNSUPPORTED,
                 "the pickle holds instruction 0x%02x, which builds more than dictionaries of tensors; nothing is ever run",
                 op);
  return false;
}

enum qtr_status qtr_pickle_load(const uint8_t *text, size_t n_bytes, struct qtr_pickle **pickle, const value **root,
                                struct qtr_error *err) {
  *pickle = NULL;
  *root = NULL;
  if (n_bytes > MAX_PICKLE_BYTES) {
    return qtr_fail(err, QTR_ERR_LIMIT, "the pickle has %zu bytes; at most %zu are accepted", n_bytes, MAX_PICKLE_BYTES);
  }
  struct qtr_pickle *m = calloc(1, sizeof *m);
  if (!m) return qtr_fail_memory(err, "the pickle", sizeof *m);
  struct qtr_error own; /* the status is wanted even if the caller wants no message */
  m->err = err ? err : &own;
  m->err->status = QTR_OK;
  m->begin = m->p = text;
  m->end = text + n_bytes;
  size_t n_memoized = 0;
  bool ok = true;
  while (ok) {
    if (m->p == m->end) {
      ok = bad(m, "it has no end");
    } else if (*m->p == '.') {
      *root = pop(m);
      ok = *root || bad(m, "it leaves nothing");
      break;
    } else {
      uint8_t op = *m->p++;
      ok = step(m, op, &n_memoized);
    }
  }
  enum qtr_status status = ok ? QTR_OK : m->err->status;
  m->err = NULL;
  if (status) {
    *root = NULL;
    qtr_pickle_free(m);
  } else {
    *pickle = m;
  }
  return status;
}

void qtr_pickle_free(struct qtr_pickle *m) {
  if (!m) return;
  while (m->blocks) {
    struct block *next = m->blocks->next;
    free(m->blocks);
    m->blocks = next;
  }
  free(m->stack);
  free(m->memo);
  free(m);
}
