/* unpickle.h - runs the pickle of a torch archive as what it should be: a description of dictionaries, strings, numbers and
 * tensors. A pickle is a program; this machine knows only the instructions that build those, calls nothing, and refuses
 * every other instruction and every other class by name. Untrusted. */
#ifndef QTR_CHECKPOINT_UNPICKLE_H
#define QTR_CHECKPOINT_UNPICKLE_H

#include "backend/backend.h"
#include "checkpoint/checkpoint.h" /* QTR_MAX_DIMS */

enum qtr_pickle_kind {
  QTR_PICKLE_NONE,
  QTR_PICKLE_BOOL,
  QTR_PICKLE_INT,
  QTR_PICKLE_FLOAT,
  QTR_PICKLE_STRING,
  QTR_PICKLE_TUPLE,
  QTR_PICKLE_LIST,
  QTR_PICKLE_DICT,
  QTR_PICKLE_GLOBAL,
  QTR_PICKLE_STORAGE,
  QTR_PICKLE_TENSOR,
  QTR_PICKLE_MARK
};

struct qtr_pickle_value {
  enum qtr_pickle_kind kind;
  union {
    int64_t integer; /* BOOL, INT; GLOBAL: index into the table of unpickle.c */
    double real;
    struct {
      const char *text; /* in the pickle, no NUL after it */
      size_t len;
    } string;
    struct {
      struct qtr_pickle_value **item; /* (n); DICT: key, value, key, value … */
      size_t n, capacity;
    } list; /* TUPLE, LIST, DICT; may contain itself: bound every walk */
    struct {
      const char *key; /* name of the entry data/<key> of the archive */
      size_t key_len, n_elements;
      enum qtr_dtype dtype;
    } storage;
    struct {
      const struct qtr_pickle_value *storage;
      size_t offset, n_dims; /* offset and strides count elements */
      size_t shape[QTR_MAX_DIMS], stride[QTR_MAX_DIMS];
    } * tensor;
  } u;
};

struct qtr_pickle; /* owns all values */

/* *root: what the pickle leaves. text is borrowed while the pickle lives. */
enum qtr_status qtr_pickle_load(const uint8_t *text, size_t n_bytes, struct qtr_pickle **pickle,
                                const struct qtr_pickle_value **root, struct qtr_error *err);
void qtr_pickle_free(struct qtr_pickle *pickle);

#endif
