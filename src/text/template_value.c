/* template_value.c - memory and values of a rendering: arena, strings, lists, dictionaries, iterators; Python's truth,
 * equality, order and containment. Everything is charged: a step for each item looked at, a step for TPL_STEP_BYTES bytes.
 */
#include "text/template_internal.h"

#include "base/checked.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

/* ---- arena ----------------------------------------------------------------------------------- */

struct arena_chunk {
  struct arena_chunk *older;
  size_t used, capacity; /* bytes after this header */
};
#define CHUNK_HEADER ((sizeof(struct arena_chunk) + 15) / 16 * 16)
#define CHUNK_FIRST ((size_t)16 << 10)
#define CHUNK_MOST ((size_t)1 << 20)

void *qtr_tpl_arena_alloc(struct arena *arena, size_t n_bytes) {
  if (n_bytes > arena->limit) return NULL;
  size_t need = qtr_round_up(n_bytes ? n_bytes : 1, 16);
  struct arena_chunk *chunk = arena->chunk;
  if (!chunk || need > chunk->capacity - chunk->used) {
    size_t capacity = chunk ? QTR_MIN(chunk->capacity * 2, CHUNK_MOST) : CHUNK_FIRST;
    capacity = QTR_MAX(capacity, need);
    if (capacity > arena->limit - QTR_MIN(arena->n_bytes, arena->limit)) return NULL;
    struct arena_chunk *fresh = malloc(CHUNK_HEADER + capacity);
    if (!fresh) return NULL;
    arena->n_bytes += capacity;
    fresh->used = 0;
    fresh->capacity = capacity;
    fresh->older = chunk;
    arena->chunk = chunk = fresh;
  }
  char *memory = (char *)chunk + CHUNK_HEADER + chunk->used;
  chunk->used += need;
  return memory;
}

void qtr_tpl_arena_free(struct arena *arena) {
  for (struct arena_chunk *chunk = arena->chunk; chunk;) {
    struct arena_chunk *older = chunk->older;
    free(chunk);
    chunk = older;
  }
  arena->chunk = NULL;
}

/* ---- errors and bounds ----------------------------------------------------------------------- */

struct value qtr_tpl_fail(struct eval *ev, enum qtr_status status, const char *format, ...) {
  if (!ev->failed) {
    char text[400];
    va_list args;
    va_start(args, format);
    (void)vsnprintf(text, sizeof text, format, args);
    va_end(args);
    ev->failed = true;
    (void)qtr_fail(ev->err, status, "template line %d: %s", (int)ev->line, text);
  }
  return qtr_tpl_undefined();
}

struct value qtr_tpl_fail_undefined(struct eval *ev, struct value v) {
  char name[100] = "";
  if (v.s) (void)qtr_printable(v.s->data, v.s->len, name, sizeof name);
  switch (v.sub) {
    case UNDEF_ATTRIBUTE:
      return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "'%s' has no attribute or element '%s'",
                          qtr_tpl_type_name((struct value){.type = v.of}), name);
    case UNDEF_UNSAFE:
      return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "access to attribute '%s' of '%s' is unsafe and refused", name,
                          qtr_tpl_type_name((struct value){.type = v.of}));
    case UNDEF_HINT: return qtr_tpl_fail(ev, QTR_ERR_FORMAT, "%s", name);
    default: return qtr_tpl_fail(ev, QTR_ERR_FORMAT, name[0] ? "'%s' is undefined" : "a value is undefined%s", name);
  }
}

bool qtr_tpl_charge(struct eval *ev, size_t n_steps) {
  if (ev->failed) return false;
  ev->steps += n_steps;
  if (ev->steps <= TPL_MAX_STEPS) return true;
  (void)qtr_tpl_fail(ev, QTR_ERR_LIMIT, "the template takes more than %llu steps; shorten the conversation or its loops",
                     (unsigned long long)TPL_MAX_STEPS);
  return false;
}

bool qtr_tpl_charge_bytes(struct eval *ev, size_t n_bytes) {
  size_t n = n_bytes / TPL_STEP_BYTES;
  ev->rest_bytes += n_bytes % TPL_STEP_BYTES; /* many short pieces add up, too */
  if (ev->rest_bytes >= TPL_STEP_BYTES) {
    ev->rest_bytes -= TPL_STEP_BYTES;
    n++;
  }
  return qtr_tpl_charge(ev, n);
}

void *qtr_tpl_alloc(struct eval *ev, size_t n_bytes) {
  void *memory = ev->failed ? NULL : qtr_tpl_arena_alloc(&ev->arena, n_bytes);
  if (!memory && !ev->failed) {
    (void)qtr_tpl_fail(ev, QTR_ERR_LIMIT, "the template needs more than %zu MiB of memory, or none is left",
                       TPL_MAX_RENDER_ARENA >> 20);
  }
  return memory;
}

void *qtr_tpl_alloc_array(struct eval *ev, size_t n, size_t size) {
  size_t n_bytes;
  if (qtr_mul_overflow(n, size, &n_bytes)) n_bytes = SIZE_MAX;
  return qtr_tpl_alloc(ev, n_bytes);
}

const char *qtr_tpl_type_name(struct value v) {
  static const char *const names[] = {"missing",   "Undefined", "NoneType", "bool",  "int",    "float",
                                      "str",       "list",      "tuple",    "dict",  "range",  "dict view",
                                      "generator", "Namespace", "loop",     "macro", "method", "function"};
  return v.type < sizeof names / sizeof *names ? names[v.type] : "?";
}

/* ---- strings --------------------------------------------------------------------------------- */

struct value qtr_tpl_string(struct eval *ev, const char *data, size_t len) {
  struct str *s = qtr_tpl_alloc(ev, sizeof *s);
  if (!s) return qtr_tpl_undefined();
  *s = (struct str){.data = data, .len = len, .n_chars = -1};
  return (struct value){.type = V_STRING, .s = s};
}

struct value qtr_tpl_string_copy(struct eval *ev, const char *data, size_t len) {
  if (len > TPL_MAX_OUTPUT) return qtr_tpl_fail(ev, QTR_ERR_LIMIT, "a string longer than %zu MiB", TPL_MAX_OUTPUT >> 20);
  char *copy = qtr_tpl_alloc(ev, len);
  if (!copy || !qtr_tpl_charge_bytes(ev, len)) return qtr_tpl_undefined();
  if (len) memcpy(copy, data, len);
  return qtr_tpl_string(ev, copy, len);
}

struct value qtr_tpl_string_static(struct eval *ev, const char *text) {
  return qtr_tpl_string(ev, text, strlen(text));
}

struct value qtr_tpl_undefined_hint(struct eval *ev, const char *hint) {
  struct value v = qtr_tpl_string_static(ev, hint);
  v.type = V_UNDEFINED;
  v.sub = UNDEF_HINT;
  return v;
}

struct value qtr_tpl_markup(struct eval *ev, struct value string, bool markup) {
  if (ev->failed || string.s->markup == markup) return string;
  struct str *s = qtr_tpl_alloc(ev, sizeof *s);
  if (!s) return qtr_tpl_undefined();
  *s = *string.s;
  s->markup = markup;
  return (struct value){.type = V_STRING, .s = s};
}

struct value qtr_tpl_concat(struct eval *ev, struct value a, struct value b) {
  if (ev->failed) return qtr_tpl_undefined();
  size_t len = a.s->len + b.s->len;
  if (len > TPL_MAX_OUTPUT) return qtr_tpl_fail(ev, QTR_ERR_LIMIT, "a string longer than %zu MiB", TPL_MAX_OUTPUT >> 20);
  struct str_store *store = a.s->store;
  bool shares = store && a.s->data + a.s->len == store->data + store->used && b.s->len <= store->capacity - store->used;
  if (!shares) {
    /* a string that was itself made by + will probably grow again: double it */
    size_t capacity = a.s->store ? len * 2 : len + 32;
    struct str_store *fresh = qtr_tpl_alloc(ev, sizeof *fresh);
    char *data = qtr_tpl_alloc(ev, capacity);
    if (!data || !fresh || !qtr_tpl_charge_bytes(ev, a.s->len)) return qtr_tpl_undefined();
    if (a.s->len) memcpy(data, a.s->data, a.s->len);
    *fresh = (struct str_store){.data = data, .used = a.s->len, .capacity = capacity};
    store = fresh;
  }
  if (!qtr_tpl_charge_bytes(ev, b.s->len)) return qtr_tpl_undefined();
  const char *data = shares ? a.s->data : store->data;
  if (b.s->len) memcpy(store->data + store->used, b.s->data, b.s->len);
  store->used += b.s->len;
  struct value v = qtr_tpl_string(ev, data, len);
  if (ev->failed) return v;
  v.s->store = store;
  if (a.s->n_chars >= 0 && b.s->n_chars >= 0) v.s->n_chars = a.s->n_chars + b.s->n_chars;
  return v;
}

struct value qtr_tpl_escape(struct eval *ev, struct value v) {
  struct value text = qtr_tpl_soft_str(ev, v);
  if (ev->failed || text.s->markup) return text;
  struct output out = {0};
  const char *data = text.s->data;
  size_t len = text.s->len, done = 0;
  if (!qtr_tpl_charge_bytes(ev, len)) return text;
  for (size_t i = 0; i < len; i++) {
    const char *entity;
    switch (data[i]) {
      case '&': entity = "&amp;"; break;
      case '<': entity = "&lt;"; break;
      case '>': entity = "&gt;"; break;
      case '"': entity = "&#34;"; break;
      case '\'': entity = "&#39;"; break;
      default: continue;
    }
    qtr_tpl_write(ev, &out, data + done, i - done);
    qtr_tpl_write_text(ev, &out, entity);
    done = i + 1;
  }
  if (done == 0) return qtr_tpl_markup(ev, text, true);
  qtr_tpl_write(ev, &out, data + done, len - done);
  return qtr_tpl_markup(ev, qtr_tpl_output_string(ev, &out), true);
}

size_t qtr_tpl_n_chars(struct eval *ev, struct str *s) {
  if (s->n_chars < 0) {
    size_t n = 0;
    if (ev) (void)qtr_tpl_charge_bytes(ev, s->len);
    uint32_t cp;
    for (size_t i = 0; i < s->len; n++) i += qtr_tpl_decode(s->data + i, s->len - i, &cp);
    s->n_chars = (ptrdiff_t)n;
  }
  return (size_t)s->n_chars;
}

size_t qtr_tpl_char_offset(struct eval *ev, struct str *s, size_t index) {
  if (qtr_tpl_n_chars(ev, s) == s->len) return QTR_MIN(index, s->len);
  size_t at = 0;
  uint32_t cp;
  while (index-- > 0 && at < s->len) at += qtr_tpl_decode(s->data + at, s->len - at, &cp);
  (void)qtr_tpl_charge_bytes(ev, at);
  return at;
}

/* ---- lists ----------------------------------------------------------------------------------- */

struct value qtr_tpl_list(struct eval *ev, enum value_type type, size_t n) {
  if (n > TPL_MAX_ITEMS) return qtr_tpl_fail(ev, QTR_ERR_LIMIT, "a list of more than %zu items", TPL_MAX_ITEMS);
  struct list *l = qtr_tpl_alloc(ev, sizeof *l);
  struct value *items = qtr_tpl_alloc_array(ev, n, sizeof *items);
  if (!l || !items || !qtr_tpl_charge(ev, n / 4)) return qtr_tpl_undefined();
  *l = (struct list){.items = items, .n = n};
  return (struct value){.type = (uint8_t)type, .l = l};
}

struct value qtr_tpl_list_concat(struct eval *ev, struct value a, struct value b) {
  if (ev->failed) return qtr_tpl_undefined();
  size_t n = a.l->n + b.l->n;
  if (n > TPL_MAX_ITEMS) return qtr_tpl_fail(ev, QTR_ERR_LIMIT, "a list of more than %zu items", TPL_MAX_ITEMS);
  struct list_store *store = a.l->store;
  bool shares = store && a.l->items + a.l->n == store->items + store->used && b.l->n <= store->capacity - store->used;
  if (!shares) {
    size_t capacity = a.l->store ? n * 2 : n + 2;
    struct list_store *fresh = qtr_tpl_alloc(ev, sizeof *fresh);
    struct value *items = qtr_tpl_alloc_array(ev, capacity, sizeof *items);
    if (!fresh || !items || !qtr_tpl_charge(ev, a.l->n / 4)) return qtr_tpl_undefined();
    if (a.l->n) memcpy(items, a.l->items, a.l->n * sizeof *items);
    *fresh = (struct list_store){.items = items, .used = a.l->n, .capacity = capacity};
    store = fresh;
  }
  struct list *l = qtr_tpl_alloc(ev, sizeof *l);
  if (!l || !qtr_tpl_charge(ev, b.l->n / 4)) return qtr_tpl_undefined();
  *l = (struct list){.items = shares ? a.l->items : store->items, .n = n, .store = store};
  if (b.l->n) memcpy(store->items + store->used, b.l->items, b.l->n * sizeof *b.l->items);
  store->used += b.l->n;
  return (struct value){.type = a.type, .l = l};
}

struct value qtr_tpl_iterator(struct eval *ev, const char *kind, struct value list, const struct qtr_error *pending) {
  struct iterator *it = qtr_tpl_alloc(ev, sizeof *it);
  if (!it) return qtr_tpl_undefined();
  *it = (struct iterator){.kind = kind, .items = list.l->items, .n = list.l->n, .pending = pending};
  return (struct value){.type = V_ITERATOR, .it = it};
}

/* ---- dictionaries ---------------------------------------------------------------------------- */

#define DICT_LINEAR 8 /* up to here a scan is quicker than an index */

static uint64_t mix(uint64_t h, uint64_t x) {
  h = (h ^ x) * 0x9e3779b97f4a7c15u;
  return h ^ (h >> 32);
}

bool qtr_tpl_hash(struct eval *ev, struct value v, uint64_t *hash, int depth) {
  uint64_t h = 0;
  switch (v.type) {
    case V_STRING:
      (void)qtr_tpl_charge_bytes(ev, v.s->len);
      h = 1469598103934665603u;
      for (size_t i = 0; i < v.s->len; i++) h = (h ^ (uint8_t)v.s->data[i]) * 1099511628211u;
      break;
    case V_NONE: h = 11; break;
    case V_UNDEFINED: h = 12; break;
    case V_BOOL: h = v.b; break;
    case V_INT: h = (uint64_t)v.i; break;
    case V_FLOAT: /* equal numbers have equal hashes, whatever their types */
      if (v.f >= -0x1p62 && v.f <= 0x1p62 && (double)(int64_t)v.f == v.f) {
        h = (uint64_t)(int64_t)v.f;
      } else {
        memcpy(&h, &v.f, sizeof h);
      }
      break;
    case V_TUPLE:
      if (depth > TPL_MAX_VALUE_DEPTH || !qtr_tpl_charge(ev, v.l->n)) return false;
      h = 13;
      for (size_t i = 0; i < v.l->n; i++) {
        uint64_t part;
        if (!qtr_tpl_hash(ev, v.l->items[i], &part, depth + 1)) return false;
        h = mix(h, part);
      }
      break;
    case V_LIST:
    case V_DICT:
    case V_VIEW: return false;
    default: h = (uint64_t)(uintptr_t)v.d;
  }
  *hash = mix(h, 0);
  return true;
}

struct value qtr_tpl_dict(struct eval *ev) {
  struct dict *d = qtr_tpl_alloc(ev, sizeof *d);
  if (!d) return qtr_tpl_undefined();
  *d = (struct dict){0};
  return (struct value){.type = V_DICT, .d = d};
}

static void index_add(struct eval *ev, struct dict *d, size_t entry) {
  size_t at = d->entries[entry].hash & (d->index_size - 1), n_probes = 0;
  for (; d->index[at]; at = (at + 1) & (d->index_size - 1)) n_probes++;
  d->index[at] = (uint32_t)entry + 1;
  (void)qtr_tpl_charge(ev, n_probes / 4);
}

static struct dict_entry *find_entry(struct eval *ev, struct dict *d, struct value key, uint64_t hash) {
  if (!d->index) {
    for (size_t i = 0; i < d->n; i++) {
      if (d->entries[i].hash == hash && qtr_tpl_equal(ev, d->entries[i].key, key, 0)) return &d->entries[i];
    }
    return NULL;
  }
  size_t at = hash & (d->index_size - 1);
  for (; d->index[at]; at = (at + 1) & (d->index_size - 1)) {
    struct dict_entry *e = &d->entries[d->index[at] - 1];
    if (e->hash == hash && qtr_tpl_equal(ev, e->key, key, 0)) return e;
    if (!qtr_tpl_charge(ev, 1)) return NULL;
  }
  return NULL;
}

struct value *qtr_tpl_dict_get(struct eval *ev, struct dict *d, struct value key) {
  uint64_t hash;
  if (ev->failed || !qtr_tpl_hash(ev, key, &hash, 0)) return NULL;
  struct dict_entry *e = find_entry(ev, d, key, hash);
  return e ? &e->value : NULL;
}

void qtr_tpl_dict_set(struct eval *ev, struct dict *d, struct value key, struct value v) {
  uint64_t hash;
  if (ev->failed) return;
  if (!qtr_tpl_hash(ev, key, &hash, 0)) {
    (void)qtr_tpl_fail(ev, QTR_ERR_FORMAT, "unhashable type: '%s' cannot be a key", qtr_tpl_type_name(key));
    return;
  }
  struct dict_entry *e = find_entry(ev, d, key, hash);
  if (e) {
    e->value = v;
    return;
  }
  if (d->n == d->capacity) {
    size_t capacity = d->capacity ? d->capacity * 2 : 4;
    struct dict_entry *entries = capacity > TPL_MAX_ITEMS ? NULL : qtr_tpl_alloc_array(ev, capacity, sizeof *entries);
    if (!entries) {
      (void)qtr_tpl_fail(ev, QTR_ERR_LIMIT, "a mapping of more than %zu entries", d->n);
      return;
    }
    if (d->n) memcpy(entries, d->entries, d->n * sizeof *entries);
    d->entries = entries;
    d->capacity = capacity;
    d->index = NULL;
  }
  d->entries[d->n] = (struct dict_entry){.key = key, .value = v, .hash = hash};
  d->n++;
  if (d->index) {
    index_add(ev, d, d->n - 1);
  } else if (d->n > DICT_LINEAR) {
    d->index_size = 16;
    while (d->index_size < d->capacity * 2) d->index_size *= 2;
    d->index = qtr_tpl_alloc_array(ev, d->index_size, sizeof *d->index);
    if (!d->index) return;
    memset(d->index, 0, d->index_size * sizeof *d->index);
    for (size_t i = 0; i < d->n; i++) index_add(ev, d, i);
  }
}

/* ---- JSON ------------------------------------------------------------------------------------ */

/* Strings are not copied: the variables outlive the rendering. */
struct value qtr_tpl_from_json(struct eval *ev, const json_t *json, int depth) {
  if (ev->failed) return qtr_tpl_undefined();
  if (depth > TPL_MAX_VALUE_DEPTH) {
    return qtr_tpl_fail(ev, QTR_ERR_LIMIT, "a variable is nested more than %d levels deep", TPL_MAX_VALUE_DEPTH);
  }
  switch (json_typeof(json)) {
    case JSON_NULL: return qtr_tpl_none();
    case JSON_TRUE: return qtr_tpl_bool(true);
    case JSON_FALSE: return qtr_tpl_bool(false);
    case JSON_INTEGER: return qtr_tpl_int(json_integer_value(json));
    case JSON_REAL: return qtr_tpl_float(json_real_value(json));
    case JSON_STRING: return qtr_tpl_string(ev, json_string_value(json), json_string_length(json));
    case JSON_ARRAY: {
      struct value v = qtr_tpl_list(ev, V_LIST, json_array_size(json));
      for (size_t i = 0; !ev->failed && i < v.l->n; i++) {
        v.l->items[i] = qtr_tpl_from_json(ev, json_array_get(json, i), depth + 1);
      }
      return v;
    }
    case JSON_OBJECT: {
      struct value v = qtr_tpl_dict(ev);
      /* jansson iterates without changing the object; its interface just does not say so */
      json_t *object = (json_t *)(uintptr_t)json;
      for (void *it = json_object_iter(object); it && !ev->failed; it = json_object_iter_next(object, it)) {
        const char *key = json_object_iter_key(it);
        struct value name = qtr_tpl_string(ev, key, strlen(key));
        qtr_tpl_dict_set(ev, v.d, name, qtr_tpl_from_json(ev, json_object_iter_value(it), depth + 1));
      }
      return v;
    }
  }
  return qtr_tpl_none();
}

/* ---- what Python knows about every value ----------------------------------------------------- */

bool qtr_tpl_is_number(struct value v) { return v.type == V_BOOL || v.type == V_INT || v.type == V_FLOAT; }

double qtr_tpl_number(struct value v) { return v.type == V_FLOAT ? v.f : v.type == V_INT ? (double)v.i : (double)v.b; }

bool qtr_tpl_length(struct eval *ev, struct value v, size_t *n) {
  switch (v.type) {
    case V_UNDEFINED: *n = 0; return true;
    case V_STRING: *n = qtr_tpl_n_chars(ev, v.s); return true;
    case V_LIST:
    case V_TUPLE: *n = v.l->n; return true;
    case V_DICT:
    case V_VIEW: *n = v.d->n; return true;
    case V_RANGE: *n = v.range->n; return true;
    case V_LOOP: *n = v.loop->n; return true;
    default: return false;
  }
}

bool qtr_tpl_truth(struct value v) {
  switch (v.type) {
    case V_MISSING:
    case V_UNDEFINED:
    case V_NONE: return false;
    case V_BOOL: return v.b;
    case V_INT: return v.i != 0;
    case V_FLOAT: return v.f != 0; /* NaN is true */
    case V_STRING: return v.s->len > 0;
    case V_LIST:
    case V_TUPLE: return v.l->n > 0;
    case V_DICT:
    case V_VIEW: return v.d->n > 0;
    case V_RANGE: return v.range->n > 0;
    default: return true;
  }
}

bool qtr_tpl_is_iterable(struct value v) {
  switch (v.type) {
    case V_UNDEFINED:
    case V_STRING:
    case V_LIST:
    case V_TUPLE:
    case V_DICT:
    case V_RANGE:
    case V_VIEW:
    case V_ITERATOR:
    case V_LOOP: return true;
    default: return false;
  }
}

void qtr_tpl_raise(struct eval *ev, const struct qtr_error *pending) {
  if (!pending || ev->failed) return;
  ev->failed = true;
  *ev->err = *pending;
}

static struct value range_item(const struct range *r, size_t i) { return qtr_tpl_int(r->start + (int64_t)i * r->step); }

static struct value view_item(struct eval *ev, struct value v, size_t i) {
  const struct dict_entry *e = &v.d->entries[i];
  if (v.type == V_DICT || v.sub == VIEW_KEYS) return e->key;
  if (v.sub == VIEW_VALUES) return e->value;
  struct value pair = qtr_tpl_list(ev, V_TUPLE, 2);
  if (ev->failed) return pair;
  pair.l->items[0] = e->key;
  pair.l->items[1] = e->value;
  return pair;
}

bool qtr_tpl_items(struct eval *ev, struct value v, struct value **items, size_t *n, const struct qtr_error **pending) {
  *items = NULL;
  *n = 0;
  if (pending) *pending = NULL;
  if (ev->failed) return false;
  switch (v.type) {
    case V_UNDEFINED: return true;
    case V_LIST:
    case V_TUPLE:
      *items = v.l->items;
      *n = v.l->n;
      return true;
    case V_ITERATOR:
      *items = v.it->items + v.it->pos;
      *n = v.it->n - v.it->pos;
      v.it->pos = v.it->n;
      if (!pending) {
        qtr_tpl_raise(ev, v.it->pending);
      } else {
        *pending = v.it->pending;
      }
      return !ev->failed;
    case V_STRING:
    case V_DICT:
    case V_VIEW:
    case V_RANGE: break;
    default: (void)qtr_tpl_fail(ev, QTR_ERR_FORMAT, "'%s' object is not iterable", qtr_tpl_type_name(v)); return false;
  }
  size_t count = 0;
  (void)qtr_tpl_length(ev, v, &count);
  struct value list = qtr_tpl_list(ev, V_LIST, count);
  size_t at = 0;
  for (size_t i = 0; !ev->failed && i < count; i++) {
    if (v.type == V_RANGE) {
      list.l->items[i] = range_item(v.range, i);
    } else if (v.type == V_STRING) {
      uint32_t cp;
      size_t len = qtr_tpl_decode(v.s->data + at, v.s->len - at, &cp);
      list.l->items[i] = qtr_tpl_string(ev, v.s->data + at, len);
      at += len;
    } else {
      list.l->items[i] = view_item(ev, v, i);
    }
  }
  if (ev->failed) return false;
  *items = list.l->items;
  *n = count;
  return true;
}

static int compare_numbers(struct value a, struct value b, bool *unordered) {
  *unordered = false;
  if (a.type != V_FLOAT && b.type != V_FLOAT) {
    int64_t x = a.type == V_INT ? a.i : a.b, y = b.type == V_INT ? b.i : b.b;
    return (x > y) - (x < y);
  }
  if (a.type == V_FLOAT && b.type == V_FLOAT) {
    *unordered = isnan(a.f) || isnan(b.f);
    return (a.f > b.f) - (a.f < b.f);
  }
  bool swapped = a.type != V_FLOAT;
  double f = swapped ? b.f : a.f;
  int64_t i = swapped ? (a.type == V_INT ? a.i : a.b) : (b.type == V_INT ? b.i : b.b);
  int order;
  if (isnan(f)) {
    *unordered = true;
    return 0;
  }
  if (f >= 0x1p63) {
    order = 1;
  } else if (f < -0x1p63) {
    order = -1;
  } else { /* exact: compare the whole part as integers, then the fraction */
    double whole = trunc(f);
    int64_t t = (int64_t)whole;
    order = t != i ? (t > i) - (t < i) : (f > whole) - (f < whole);
  }
  return swapped ? -order : order;
}

bool qtr_tpl_equal(struct eval *ev, struct value a, struct value b, int depth) {
  bool unordered;
  if (!qtr_tpl_charge(ev, 1)) return false;
  if (depth > TPL_MAX_VALUE_DEPTH) {
    (void)qtr_tpl_fail(ev, QTR_ERR_LIMIT, "values nested more than %d levels deep are compared", TPL_MAX_VALUE_DEPTH);
    return false;
  }
  if (qtr_tpl_is_number(a) && qtr_tpl_is_number(b)) return compare_numbers(a, b, &unordered) == 0 && !unordered;
  if (a.type != b.type) return false;
  switch (a.type) {
    case V_UNDEFINED:
    case V_NONE: return true;
    case V_STRING:
      return a.s->len == b.s->len && qtr_tpl_charge_bytes(ev, a.s->len) &&
             (a.s->len == 0 || memcmp(a.s->data, b.s->data, a.s->len) == 0);
    case V_LIST:
    case V_TUPLE:
      if (a.l->n != b.l->n) return false;
      for (size_t i = 0; i < a.l->n; i++) {
        if (!qtr_tpl_equal(ev, a.l->items[i], b.l->items[i], depth + 1)) return false;
      }
      return true;
    case V_VIEW:
    case V_DICT: /* keys and items compare as sets */
      if (a.type == V_VIEW && (a.sub != b.sub || a.sub == VIEW_VALUES)) return a.d == b.d && a.sub == b.sub;
      if (a.d->n != b.d->n) return false;
      for (size_t i = 0; i < a.d->n; i++) {
        const struct value *other = qtr_tpl_dict_get(ev, b.d, a.d->entries[i].key);
        if (!other) return false;
        if ((a.type == V_DICT || a.sub == VIEW_ITEMS) && !qtr_tpl_equal(ev, a.d->entries[i].value, *other, depth + 1))
          return false;
      }
      return true;
    case V_RANGE: {
      const struct range *x = a.range, *y = b.range;
      return x->n == y->n && (x->n == 0 || (x->start == y->start && (x->n == 1 || x->step == y->step)));
    }
    case V_METHOD: return a.method->def == b.method->def && a.method->self.d == b.method->self.d;
    default: return a.d == b.d;
  }
}

static bool less(struct eval *ev, struct value a, struct value b, enum op op, int depth) {
  static const char *const signs[] = {[OP_LT] = "<", [OP_LE] = "<=", [OP_GT] = ">", [OP_GE] = ">="};
  if (!qtr_tpl_charge(ev, 1)) return false;
  if (a.type == V_UNDEFINED || b.type == V_UNDEFINED) {
    (void)qtr_tpl_fail_undefined(ev, a.type == V_UNDEFINED ? a : b);
    return false;
  }
  int order = 0;
  bool unordered = false;
  if (qtr_tpl_is_number(a) && qtr_tpl_is_number(b)) {
    order = compare_numbers(a, b, &unordered);
  } else if (a.type == V_STRING && b.type == V_STRING) { /* UTF-8 sorts as its code points do */
    size_t n = QTR_MIN(a.s->len, b.s->len);
    (void)qtr_tpl_charge_bytes(ev, n);
    order = n ? memcmp(a.s->data, b.s->data, n) : 0;
    if (order == 0) order = (a.s->len > b.s->len) - (a.s->len < b.s->len);
  } else if ((a.type == V_LIST || a.type == V_TUPLE) && a.type == b.type && depth <= TPL_MAX_VALUE_DEPTH) {
    for (size_t i = 0; i < a.l->n && i < b.l->n; i++) {
      if (!qtr_tpl_equal(ev, a.l->items[i], b.l->items[i], depth + 1)) {
        return !ev->failed && less(ev, a.l->items[i], b.l->items[i], op, depth + 1);
      }
    }
    order = (a.l->n > b.l->n) - (a.l->n < b.l->n);
  } else {
    (void)qtr_tpl_fail(ev, QTR_ERR_FORMAT, "'%s' not supported between '%s' and '%s'", signs[op], qtr_tpl_type_name(a),
                       qtr_tpl_type_name(b));
    return false;
  }
  if (unordered || ev->failed) return false;
  return op == OP_LT ? order < 0 : op == OP_LE ? order <= 0 : op == OP_GT ? order > 0 : order >= 0;
}

bool qtr_tpl_less(struct eval *ev, struct value a, struct value b, enum op op) { return less(ev, a, b, op, 0); }

bool qtr_tpl_contains(struct eval *ev, struct value item, struct value in) {
  if (ev->failed) return false;
  if (in.type == V_STRING) {
    if (item.type != V_STRING) {
      if (item.type == V_UNDEFINED) {
        (void)qtr_tpl_fail_undefined(ev, item);
      } else {
        (void)qtr_tpl_fail(ev, QTR_ERR_FORMAT, "'in <string>' needs a string on its left, not '%s'",
                           qtr_tpl_type_name(item));
      }
      return false;
    }
    if (!qtr_tpl_charge_bytes(ev, in.s->len)) return false;
    return item.s->len == 0 || memmem(in.s->data, in.s->len, item.s->data, item.s->len) != NULL;
  }
  if (in.type == V_DICT || (in.type == V_VIEW && in.sub == VIEW_KEYS)) {
    uint64_t hash;
    if (!qtr_tpl_hash(ev, item, &hash, 0)) {
      (void)qtr_tpl_fail(ev, QTR_ERR_FORMAT, "unhashable type: '%s'", qtr_tpl_type_name(item));
      return false;
    }
    return qtr_tpl_dict_get(ev, in.d, item) != NULL;
  }
  struct value *items;
  size_t n;
  const struct qtr_error *pending;
  if (!qtr_tpl_is_iterable(in)) {
    (void)qtr_tpl_fail(ev, QTR_ERR_FORMAT, "argument of type '%s' is not iterable", qtr_tpl_type_name(in));
    return false;
  }
  if (!qtr_tpl_items(ev, in, &items, &n, &pending)) return false;
  for (size_t i = 0; i < n && !ev->failed; i++) {
    if (!qtr_tpl_equal(ev, items[i], item, 0)) continue;
    if (in.type == V_ITERATOR) in.it->pos -= n - i - 1; /* a generator stops where the item was found */
    return true;
  }
  qtr_tpl_raise(ev, pending);
  return false;
}
