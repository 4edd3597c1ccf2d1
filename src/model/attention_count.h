/* attention_count.h - what the attention of a step cannot do without: bytes of keys and values, and operations, for
 * profiles. Of a sparse cache that is what its heads see, by the rules of backend/common/sparse.h. */
#ifndef QTR_MODEL_ATTENTION_COUNT_H
#define QTR_MODEL_ATTENTION_COUNT_H

#include "backend/common/sparse.h"

struct qtr_attention_count {
  const struct qtr_kv_heads *heads;  /* NULL: dense */
  double keys[QTR_N_HEAD_CLASSES];   /* of one KV head, summed over the sequences: keys that some query of the step sees */
  double pairs[QTR_N_HEAD_CLASSES];  /* of one query head, summed over the queries: keys that it sees */
  double n_logical;                  /* of one retrieval head: statistics that are compared with queries */
  double row_bytes, head_dim, group; /* of one head's key and value; query heads of a KV head */
  int32_t n_kv_heads;
};

/* Looks at the positions of a batch. config: format, n_kv_heads and head_dim of the cache. */
void qtr_attention_count(const struct qtr_batch *batch, const struct qtr_kv_config *config, int32_t n_heads,
                         const struct qtr_kv_heads *heads, struct qtr_attention_count *count);
/* Of one layer: keys, values and statistics, each once (but each query that chooses pages reads its own), and
 * multiplications and additions. Queries and outputs are not in it. */
void qtr_attention_need(const struct qtr_attention_count *count, int32_t layer, double *bytes, double *ops);

#endif
