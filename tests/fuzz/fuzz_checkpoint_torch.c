/* A torch archive (input begins with PK), or the pickle alone, which mutates better without its zip. */
#include "checkpoint/tensors.h"
#include "checkpoint/unpickle.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Visits what a pickle holds; it may contain itself, so the walk is bounded. */
static void walk(const struct qtr_pickle_value *v, unsigned depth, unsigned *budget, volatile uint8_t *sink) {
  if (!v) abort();
  if (depth == 0 || *budget == 0) return;
  --*budget;
  switch (v->kind) {
    case QTR_PICKLE_STRING:
      for (size_t i = 0; i < v->u.string.len; i++) *sink ^= (uint8_t)v->u.string.text[i];
      break;
    case QTR_PICKLE_STORAGE:
      for (size_t i = 0; i < v->u.storage.key_len; i++) *sink ^= (uint8_t)v->u.storage.key[i];
      break;
    case QTR_PICKLE_TENSOR:
      if (v->u.tensor->n_dims > QTR_MAX_DIMS) abort();
      walk(v->u.tensor->storage, depth - 1, budget, sink);
      break;
    case QTR_PICKLE_TUPLE:
    case QTR_PICKLE_LIST:
    case QTR_PICKLE_DICT:
      if (v->kind == QTR_PICKLE_DICT && v->u.list.n % 2 != 0) abort();
      for (size_t i = 0; i < v->u.list.n; i++) walk(v->u.list.item[i], depth - 1, budget, sink);
      break;
    case QTR_PICKLE_MARK: abort();
    default: break;
  }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  struct qtr_error err;
  volatile uint8_t sink = 0;
  if (size < 2 || memcmp(data, "PK", 2) != 0) {
    struct qtr_pickle *pickle;
    const struct qtr_pickle_value *root;
    if (qtr_pickle_load(data, size, &pickle, &root, &err)) return 0;
    unsigned budget = 10000;
    walk(root, 16, &budget, &sink);
    qtr_pickle_free(pickle);
    return 0;
  }
  for (int nested = 0; nested < 2; nested++) {
    struct qtr_checkpoint *c;
    if ((nested ? qtr_checkpoint_open_nested_memory : qtr_checkpoint_open_memory)(data, size, &c, &err)) continue;
    for (size_t i = 0; i < qtr_checkpoint_count(c); i++) {
      const struct qtr_tensor *t = qtr_checkpoint_at(c, i);
      for (size_t b = 0; b < t->n_bytes; b++) sink ^= ((const uint8_t *)t->data)[b];
    }
    qtr_checkpoint_close(c);
  }
  return 0;
}
