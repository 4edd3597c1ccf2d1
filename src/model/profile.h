/* profile.h - where a step's time goes, operation by operation: time, and the bytes and operations that the operation cannot
 * do without (weights, cache and activations once), so that a profile prints its distance from the machine's ceilings. */
#ifndef QTR_MODEL_PROFILE_H
#define QTR_MODEL_PROFILE_H

#include <stdint.h>

enum qtr_profile_op {
  QTR_PROFILE_EMBED,
  QTR_PROFILE_NORM,
  QTR_PROFILE_QKV,
  QTR_PROFILE_ROPE_KV,
  QTR_PROFILE_ATTENTION,
  QTR_PROFILE_QUANT,
  QTR_PROFILE_O,
  QTR_PROFILE_GATE_UP,
  QTR_PROFILE_DOWN,
  QTR_PROFILE_HEAD,
  QTR_PROFILE_CHOOSE, /* where the device samples */
  QTR_N_PROFILE_OPS
};
extern const char *const qtr_profile_names[QTR_N_PROFILE_OPS];

struct qtr_profile_entry {
  uint64_t n_calls;
  double seconds, bytes, ops;
};

struct qtr_profile {
  struct qtr_profile_entry op[QTR_N_PROFILE_OPS];
};

#endif
