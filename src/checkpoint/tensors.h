/* tensors.h - inside of src/checkpoint: how the file readers hand tensors to a checkpoint, and opening from memory for tests
 * and fuzzing. The readers check everything about one file; names that come twice are found in checkpoint.c. */
#ifndef QTR_CHECKPOINT_TENSORS_H
#define QTR_CHECKPOINT_TENSORS_H

#include "checkpoint/checkpoint.h"

#define QTR_MAX_TENSORS ((size_t)1 << 20)
#define QTR_MAX_TENSOR_NAME 512
#define QTR_MAX_TENSOR_BYTES ((size_t)1 << 47)

/* Adds a tensor of the file that is being read; the name (name_len bytes, no NUL in them) is copied, tensor->name ignored.
 */
enum qtr_status qtr_checkpoint_add(struct qtr_checkpoint *checkpoint, const char *name, size_t name_len,
                                   const struct qtr_tensor *tensor, struct qtr_error *err);
/* Memory that lives as long as the checkpoint; NULL when there is none. */
void *qtr_checkpoint_own(struct qtr_checkpoint *checkpoint, size_t n_bytes);

/* Elements and bytes of shape x dtype. QTR_ERR_FORMAT when the rank is above QTR_MAX_DIMS or the product overflows. */
enum qtr_status qtr_tensor_measure(size_t n_dims, const size_t *shape, enum qtr_dtype dtype, size_t *n_elements,
                                   size_t *n_bytes, struct qtr_error *err);

/* data: the whole file, which outlives the checkpoint or belongs to it. Messages do not name the file: the caller does. */
enum qtr_status qtr_safetensors_read(struct qtr_checkpoint *checkpoint, const uint8_t *data, size_t n_bytes,
                                     struct qtr_error *err);
/* nested: as qtr_checkpoint_open_nested says; else the tensors of one dictionary. */
enum qtr_status qtr_torch_read(struct qtr_checkpoint *checkpoint, const uint8_t *data, size_t n_bytes, bool nested,
                               struct qtr_error *err);

/* One file that lies in memory, borrowed until close. The kind is found from the content; nested: as
 * qtr_checkpoint_open_nested. */
enum qtr_status qtr_checkpoint_open_memory(const void *data, size_t n_bytes, struct qtr_checkpoint **checkpoint,
                                           struct qtr_error *err);
enum qtr_status qtr_checkpoint_open_nested_memory(const void *data, size_t n_bytes, struct qtr_checkpoint **checkpoint,
                                                  struct qtr_error *err);

#endif
