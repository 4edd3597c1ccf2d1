/* grammar.c - grammars over bytes and their automaton (grammar.h).
 *
 * Elements of all alternatives lie one behind the other in one array, each alternative ended by an END. A stack is a chain
 * of nodes (element to go on with, node below); equal chains are one node, so a set of stacks is a set of numbers. A
 * reference at the end of an alternative leaves nothing behind: repetition by right recursion keeps the stack flat. */
#include "server/grammar.h"

#include <stdlib.h>
#include <string.h>

#define MAX_ELEMENTS (1 << 19)
#define MAX_NODES (1 << 20)
#define MAX_STATES (1 << 15)
#define MAX_STACKS 4096 /* of one state */

enum kind { END, SET, RULE };

struct element {
  uint32_t kind : 2, arg : 30; /* a set, or a rule */
};

struct alternative {
  uint32_t first; /* element */
  int32_t next;   /* of the same rule, -1 = none */
};

struct node {
  uint32_t pos, parent; /* 0 = the bottom */
};

struct state {
  uint32_t first, n; /* stacks: g->stack[first … first + n) nodes, ascending */
  bool accepts;
  int32_t *next; /* (256) UNKNOWN, DEAD or a state; NULL until asked */
};

enum { UNKNOWN = QTR_GRAMMAR_UNKNOWN };

struct vector {
  void *data;
  size_t n, capacity;
};

struct table { /* open addressing: numbers by hash; 0 = free, else number + 1 */
  uint32_t *slot;
  size_t n_slots, n_used;
};

struct qtr_grammar {
  struct vector element, alternative, rule /* int32_t: first alternative */, set /* uint8_t[32] */;
  struct vector node, stamp /* uint32_t, of each node */, stack /* uint32_t */, state, work, found;
  struct table nodes, states;
  int32_t single[256]; /* the set of one byte + 1; 0: not made yet. Literals are most of a grammar */
  uint32_t stamp_now;
  size_t n_next; /* arrays of 256 */
  int32_t start;
  bool failed;
};

/* ---- arrays and tables --------------------------------------------------------------------------- */

/* Room for one more; NULL sets failed. */
static void *push(struct qtr_grammar *g, struct vector *v, size_t size) {
  if (g->failed) return NULL;
  if (v->n == v->capacity) {
    size_t wanted = v->capacity ? v->capacity * 2 : 64;
    void *more = realloc(v->data, wanted * size);
    if (!more) {
      g->failed = true;
      return NULL;
    }
    v->data = more;
    v->capacity = wanted;
  }
  return (char *)v->data + v->n++ * size;
}

#define AT(vector, type, i) (((type *)(vector).data)[i])

static uint32_t mix(uint32_t h, uint32_t x) {
  h = (h ^ x) * 0x9E3779B1u;
  return h ^ (h >> 15);
}

/* Doubles the table when it is half full. hash_of: of a number that is in it. */
static bool table_room(struct qtr_grammar *g, struct table *t, uint32_t (*hash_of)(const struct qtr_grammar *, uint32_t)) {
  if (t->n_used * 2 < t->n_slots) return true;
  size_t n = t->n_slots ? t->n_slots * 2 : 256;
  uint32_t *slot = calloc(n, sizeof *slot);
  if (!slot) {
    g->failed = true;
    return false;
  }
  for (size_t i = 0; i < t->n_slots; i++) {
    if (!t->slot[i]) continue;
    size_t at = hash_of(g, t->slot[i] - 1) & (n - 1);
    while (slot[at]) at = (at + 1) & (n - 1);
    slot[at] = t->slot[i];
  }
  free(t->slot);
  t->slot = slot;
  t->n_slots = n;
  return true;
}

static uint32_t node_hash(const struct qtr_grammar *g, uint32_t i) {
  return mix(mix(1, AT(g->node, struct node, i).pos), AT(g->node, struct node, i).parent);
}

/* The number of this chain; 0 = failed. */
static uint32_t intern_node(struct qtr_grammar *g, uint32_t pos, uint32_t parent) {
  if (!table_room(g, &g->nodes, node_hash)) return 0;
  size_t mask = g->nodes.n_slots - 1, at = mix(mix(1, pos), parent) & mask;
  for (; g->nodes.slot[at]; at = (at + 1) & mask) {
    uint32_t i = g->nodes.slot[at] - 1;
    if (AT(g->node, struct node, i).pos == pos && AT(g->node, struct node, i).parent == parent) return i;
  }
  if (g->node.n >= MAX_NODES) g->failed = true;
  struct node *node = push(g, &g->node, sizeof *node);
  uint32_t *stamp = push(g, &g->stamp, sizeof *stamp);
  if (!node || !stamp) return 0;
  *node = (struct node){pos, parent};
  *stamp = 0;
  g->nodes.slot[at] = (uint32_t)g->node.n;
  g->nodes.n_used++;
  return (uint32_t)g->node.n - 1;
}

/* ---- making -------------------------------------------------------------------------------------- */

struct qtr_grammar *qtr_grammar_create(void) {
  struct qtr_grammar *g = calloc(1, sizeof *g);
  if (!g) return NULL;
  g->start = UNKNOWN;
  struct node *bottom = push(g, &g->node, sizeof *bottom); /* node 0 */
  uint32_t *stamp = push(g, &g->stamp, sizeof *stamp);
  if (bottom && stamp) {
    *bottom = (struct node){0, 0};
    *stamp = 0;
  }
  return g;
}

void qtr_grammar_free(struct qtr_grammar *g) {
  if (!g) return;
  for (size_t i = 0; i < g->state.n; i++) free(AT(g->state, struct state, i).next);
  struct vector *const vectors[] = {&g->element, &g->alternative, &g->rule,  &g->set,  &g->node,
                                    &g->stamp,   &g->stack,       &g->state, &g->work, &g->found};
  for (size_t i = 0; i < sizeof vectors / sizeof vectors[0]; i++) free(vectors[i]->data);
  free(g->nodes.slot);
  free(g->states.slot);
  free(g);
}

bool qtr_grammar_failed(const struct qtr_grammar *g) { return g->failed; }
int32_t qtr_grammar_states(const struct qtr_grammar *g) { return (int32_t)g->state.n; }

size_t qtr_grammar_bytes(const struct qtr_grammar *g) {
  return g->element.capacity * sizeof(struct element) + g->node.capacity * (sizeof(struct node) + 4) +
         (g->nodes.n_slots + g->states.n_slots) * 4 + g->stack.capacity * 4 + g->state.capacity * sizeof(struct state) +
         g->n_next * 256 * sizeof(int32_t);
}

int32_t qtr_grammar_rule(struct qtr_grammar *g) {
  int32_t *rule = push(g, &g->rule, sizeof *rule);
  if (!rule) return 0;
  *rule = -1;
  return (int32_t)g->rule.n - 1;
}

static void put(struct qtr_grammar *g, enum kind kind, uint32_t arg) {
  if (g->element.n >= MAX_ELEMENTS) g->failed = true;
  struct element *e = push(g, &g->element, sizeof *e);
  if (e) *e = (struct element){.kind = kind, .arg = arg & 0x3FFFFFFFu};
}

void qtr_grammar_begin(struct qtr_grammar *g, int32_t rule) {
  struct alternative *a = push(g, &g->alternative, sizeof *a);
  if (!a) return;
  *a = (struct alternative){(uint32_t)g->element.n, AT(g->rule, int32_t, rule)};
  AT(g->rule, int32_t, rule) = (int32_t)g->alternative.n - 1;
}

void qtr_grammar_end(struct qtr_grammar *g) { put(g, END, 0); }
void qtr_grammar_put_rule(struct qtr_grammar *g, int32_t rule) { put(g, RULE, (uint32_t)rule); }

void qtr_grammar_put_set(struct qtr_grammar *g, const char *ranges, size_t n) {
  uint8_t bits[32] = {0};
  int32_t *known = n == 2 && ranges[0] == ranges[1] ? &g->single[(unsigned char)ranges[0]] : NULL;
  if (known && *known > 0) {
    put(g, SET, (uint32_t)*known - 1);
    return;
  }
  for (size_t i = 0; i + 1 < n; i += 2) {
    for (unsigned c = (unsigned char)ranges[i]; c <= (unsigned char)ranges[i + 1]; c++) {
      bits[c / 8] = (uint8_t)(bits[c / 8] | 1u << c % 8);
    }
  }
  size_t i = 0;
  while (i < g->set.n && memcmp((uint8_t *)g->set.data + 32 * i, bits, 32) != 0) i++;
  if (i == g->set.n) {
    uint8_t *set = push(g, &g->set, 32);
    if (!set) return;
    memcpy(set, bits, 32);
  }
  if (known) *known = (int32_t)i + 1;
  put(g, SET, (uint32_t)i);
}

void qtr_grammar_put_bytes(struct qtr_grammar *g, const char *bytes, size_t len) {
  for (size_t i = 0; i < len; i++) qtr_grammar_put_set(g, (const char[]){bytes[i], bytes[i]}, 2);
}

void qtr_grammar_alternative(struct qtr_grammar *g, int32_t rule, const char *text) {
  qtr_grammar_begin(g, rule);
  qtr_grammar_put_bytes(g, text, strlen(text));
  qtr_grammar_end(g);
}

int32_t qtr_grammar_repeat(struct qtr_grammar *g, int32_t item, int32_t min, int32_t max) {
  int32_t tail = qtr_grammar_rule(g);
  if (max < 0) {
    qtr_grammar_begin(g, tail);
    qtr_grammar_put_rule(g, item);
    qtr_grammar_put_rule(g, tail);
    qtr_grammar_end(g);
    qtr_grammar_alternative(g, tail, "");
  } else {
    qtr_grammar_alternative(g, tail, "");
    for (int32_t i = min; i < max && !g->failed; i++) { /* each rule: one more, or none */
      int32_t longer = qtr_grammar_rule(g);
      qtr_grammar_begin(g, longer);
      qtr_grammar_put_rule(g, item);
      qtr_grammar_put_rule(g, tail);
      qtr_grammar_end(g);
      qtr_grammar_alternative(g, longer, "");
      tail = longer;
    }
  }
  if (min == 0) return tail;
  int32_t all = qtr_grammar_rule(g);
  qtr_grammar_begin(g, all);
  for (int32_t i = 0; i < min && !g->failed; i++) qtr_grammar_put_rule(g, item);
  qtr_grammar_put_rule(g, tail);
  qtr_grammar_end(g);
  return all;
}

/* A rule is good when one of its alternatives has good rules only: counted down from those that have none. */
void qtr_grammar_prune(struct qtr_grammar *g) {
  size_t n_rules = g->rule.n, n_alternatives = g->alternative.n, n_uses = 0, n_work = 0;
  if (g->failed) return;
  uint32_t *owner = calloc(n_alternatives + 1, sizeof *owner);     /* the rule of each alternative */
  uint32_t *missing = calloc(n_alternatives + 1, sizeof *missing); /* its rules that are not known to be good */
  uint32_t *first_use = calloc(n_rules + 2, sizeof *first_use);    /* of each rule, in `use` */
  uint32_t *use = calloc(g->element.n + 1, sizeof *use);           /* alternatives, by the rule they use */
  uint32_t *work = calloc(n_rules + 1, sizeof *work);
  bool *good = calloc(n_rules + 1, sizeof *good);
  if (!owner || !missing || !first_use || !use || !work || !good) {
    g->failed = true;
    goto done;
  }
  for (size_t r = 0; r < n_rules; r++) {
    for (int32_t a = AT(g->rule, int32_t, r); a >= 0; a = AT(g->alternative, struct alternative, a).next)
      owner[a] = (uint32_t)r;
  }
  for (int pass = 0; pass < 2; pass++) { /* count, then place */
    for (size_t a = 0; a < n_alternatives; a++) {
      for (uint32_t i = AT(g->alternative, struct alternative, a).first; AT(g->element, struct element, i).kind != END;
           i++) {
        struct element e = AT(g->element, struct element, i);
        if (e.kind != RULE) continue;
        if (pass == 0) {
          first_use[e.arg + 1]++;
          n_uses++;
        } else {
          use[--first_use[e.arg + 1]] = (uint32_t)a;
          missing[a]++;
        }
      }
    }
    for (size_t r = 0; r < n_rules && pass == 0; r++) first_use[r + 1] += first_use[r];
  }
  /* placing has moved each rule's end to its beginning: first_use[r + 1] is where rule r begins */
  for (size_t a = 0; a < n_alternatives; a++) {
    if (missing[a] > 0 || good[owner[a]]) continue;
    good[owner[a]] = true;
    work[n_work++] = owner[a];
  }
  while (n_work > 0) {
    uint32_t r = work[--n_work];
    size_t end = r + 1 < n_rules ? first_use[r + 2] : n_uses;
    for (size_t i = first_use[r + 1]; i < end; i++) {
      uint32_t a = use[i];
      if (--missing[a] > 0 || good[owner[a]]) continue;
      good[owner[a]] = true;
      work[n_work++] = owner[a];
    }
  }
  for (size_t r = 0; r < n_rules; r++) {
    int32_t *link = &AT(g->rule, int32_t, r);
    while (*link >= 0) {
      struct alternative *a = &AT(g->alternative, struct alternative, *link);
      if (missing[*link] > 0)
        *link = a->next;
      else
        link = &a->next;
    }
  }
done:
  free(owner);
  free(missing);
  free(first_use);
  free(use);
  free(work);
  free(good);
}

/* ---- running ------------------------------------------------------------------------------------- */

/* Follows rules from "go on at pos above parent" to every stack whose top is a byte; adds those to g->found. Returns whether
 * the bottom was reached, that is: the text may end. A chain already seen in this round is not followed again, which also
 * ends left recursion. */
static bool expand(struct qtr_grammar *g, uint32_t pos, uint32_t parent) {
  bool ends = false;
  g->work.n = 0;
  struct node *first = push(g, &g->work, sizeof *first);
  if (first) *first = (struct node){pos, parent};
  while (g->work.n > 0 && !g->failed) {
    struct node at = AT(g->work, struct node, --g->work.n);
    struct element e = AT(g->element, struct element, at.pos);
    if (e.kind == END && at.parent == 0) {
      ends = true;
      continue;
    }
    if (e.kind == END) {
      struct node below = AT(g->node, struct node, at.parent), *more = push(g, &g->work, sizeof *more);
      if (more) *more = below;
      continue;
    }
    uint32_t node = intern_node(g, at.pos, at.parent);
    if (!node || AT(g->stamp, uint32_t, node) == g->stamp_now) continue;
    AT(g->stamp, uint32_t, node) = g->stamp_now;
    if (e.kind == SET) {
      uint32_t *found = g->found.n < MAX_STACKS ? push(g, &g->found, sizeof *found) : NULL;
      if (found)
        *found = node;
      else
        g->failed = true;
      continue;
    }
    bool last = AT(g->element, struct element, at.pos + 1).kind == END;
    uint32_t above = last ? at.parent : intern_node(g, at.pos + 1, at.parent);
    if (g->failed) break;
    for (int32_t a = AT(g->rule, int32_t, e.arg); a >= 0; a = AT(g->alternative, struct alternative, a).next) {
      struct node *more = push(g, &g->work, sizeof *more);
      if (!more) break;
      *more = (struct node){AT(g->alternative, struct alternative, a).first, above};
    }
  }
  return ends;
}

static uint32_t stacks_hash(const uint32_t *stack, size_t n, bool accepts) {
  uint32_t h = accepts ? 7 : 3;
  for (size_t i = 0; i < n; i++) h = mix(h, stack[i]);
  return h;
}

static uint32_t state_hash(const struct qtr_grammar *g, uint32_t i) {
  const struct state *s = &AT(g->state, struct state, i);
  return stacks_hash((const uint32_t *)g->stack.data + s->first, s->n, s->accepts);
}

static int ascending(const void *a, const void *b) {
  uint32_t x, y;
  memcpy(&x, a, sizeof x);
  memcpy(&y, b, sizeof y);
  return (x > y) - (x < y);
}

/* The state of the stacks in g->found. */
static int32_t intern_state(struct qtr_grammar *g, bool accepts) {
  uint32_t *found = g->found.data;
  size_t n = g->found.n;
  if (g->failed || (n == 0 && !accepts)) return QTR_GRAMMAR_DEAD;
  if (n > 1) qsort(found, n, sizeof *found, ascending);
  if (!table_room(g, &g->states, state_hash)) return QTR_GRAMMAR_DEAD;
  size_t mask = g->states.n_slots - 1, at = stacks_hash(found, n, accepts) & mask;
  for (; g->states.slot[at]; at = (at + 1) & mask) {
    const struct state *s = &AT(g->state, struct state, g->states.slot[at] - 1);
    if (s->n == n && s->accepts == accepts &&
        (n == 0 || memcmp((const uint32_t *)g->stack.data + s->first, found, n * sizeof *found) == 0)) {
      return (int32_t)g->states.slot[at] - 1;
    }
  }
  if (g->state.n >= MAX_STATES) g->failed = true;
  struct state *s = push(g, &g->state, sizeof *s);
  if (!s) return QTR_GRAMMAR_DEAD;
  *s = (struct state){.first = (uint32_t)g->stack.n, .n = (uint32_t)n, .accepts = accepts};
  for (size_t i = 0; i < n; i++) {
    uint32_t *to = push(g, &g->stack, sizeof *to);
    if (!to) return QTR_GRAMMAR_DEAD;
    *to = found[i];
  }
  g->states.slot[at] = (uint32_t)g->state.n;
  g->states.n_used++;
  return (int32_t)g->state.n - 1;
}

int32_t qtr_grammar_start(struct qtr_grammar *g) {
  if (g->start != UNKNOWN || g->failed) return g->failed ? QTR_GRAMMAR_DEAD : g->start;
  bool accepts = false;
  g->stamp_now++;
  g->found.n = 0;
  int32_t a = g->rule.n > 0 ? AT(g->rule, int32_t, 0) : -1;
  for (; a >= 0 && !g->failed; a = AT(g->alternative, struct alternative, a).next) {
    accepts |= expand(g, AT(g->alternative, struct alternative, a).first, 0);
  }
  g->start = intern_state(g, accepts);
  return g->start;
}

int32_t qtr_grammar_next(struct qtr_grammar *g, int32_t from, unsigned char byte) {
  if (from < 0 || g->failed) return QTR_GRAMMAR_DEAD;
  struct state *s = &AT(g->state, struct state, from);
  if (!s->next) {
    if (!(s->next = malloc(256 * sizeof *s->next))) {
      g->failed = true;
      return QTR_GRAMMAR_DEAD;
    }
    for (int i = 0; i < 256; i++) s->next[i] = UNKNOWN;
    g->n_next++;
  }
  if (s->next[byte] != UNKNOWN) return s->next[byte];
  bool accepts = false;
  g->stamp_now++;
  g->found.n = 0;
  uint32_t first = s->first, n = s->n;
  for (uint32_t i = 0; i < n && !g->failed; i++) {
    struct node top = AT(g->node, struct node, AT(g->stack, uint32_t, first + i));
    const uint8_t *set = (const uint8_t *)g->set.data + 32 * (size_t)AT(g->element, struct element, top.pos).arg;
    if (set[byte / 8] >> byte % 8 & 1) accepts |= expand(g, top.pos + 1, top.parent);
  }
  int32_t to = intern_state(g, accepts);
  if (!g->failed) AT(g->state, struct state, from).next[byte] = to; /* the array of states may have moved */
  return to;
}

const int32_t *qtr_grammar_row(const struct qtr_grammar *g, int32_t state) {
  return state >= 0 && !g->failed ? AT(g->state, struct state, state).next : NULL;
}

bool qtr_grammar_accepts(const struct qtr_grammar *g, int32_t state) {
  return state >= 0 && !g->failed && AT(g->state, struct state, state).accepts;
}
