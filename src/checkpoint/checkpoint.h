/* checkpoint.h - named tensors of a model directory: safetensors (single or sharded) or torch .bin/.pt, memory-mapped and
 * untrusted. A directory's files are chosen as spec A.1.3 says. */
#ifndef QTR_CHECKPOINT_CHECKPOINT_H
#define QTR_CHECKPOINT_CHECKPOINT_H

#include "backend/backend.h" /* enum qtr_dtype */

#define QTR_MAX_DIMS 8

/* data points into the map: n_bytes = product of shape x dtype size, contiguous row major, checked. It may be unaligned:
 * read 16-bit and wider values with memcpy. A torch tensor that is not contiguous is a copy the checkpoint owns.
 */
struct qtr_tensor {
  const char *name;
  enum qtr_dtype dtype;
  size_t n_dims;
  size_t shape[QTR_MAX_DIMS];
  const void *data;
  size_t n_bytes;
  bool mapped; /* data lies in a file's map, not in memory of the checkpoint's */
};

struct qtr_checkpoint;

/* Opens a directory, or one .safetensors / .bin / .pt file. The result borrows nothing. */
enum qtr_status qtr_checkpoint_open(const char *path, struct qtr_checkpoint **checkpoint, struct qtr_error *err);
/* The order of the second-level scales in the files (spec A.4). Tensors are always handed out in QServe's order. */
enum qtr_s2_order {
  QTR_S2_BY_NAME,       /* files named quant_model.* are in DeepCompressor's order, all others in QServe's */
  QTR_S2_QSERVE,        /* A.4.2 */
  QTR_S2_DEEPCOMPRESSOR /* A.4.3 */
};
enum qtr_status qtr_checkpoint_open_ordered(const char *path, enum qtr_s2_order order, struct qtr_checkpoint **checkpoint,
                                            struct qtr_error *err);
/* One torch file whose dictionaries, lists and tuples lie in each other: its tensors and numbers (F64, no dimensions) by the
 * way there, {"a": [{"max": x}]} as a.0.max. */
enum qtr_status qtr_checkpoint_open_nested(const char *file, struct qtr_checkpoint **checkpoint, struct qtr_error *err);
void qtr_checkpoint_close(struct qtr_checkpoint *checkpoint);
/* Lets what is mapped leave the resident set. What is read again comes back from the file. */
void qtr_checkpoint_forget(const struct qtr_checkpoint *checkpoint);

size_t qtr_checkpoint_count(const struct qtr_checkpoint *checkpoint);
const struct qtr_tensor *qtr_checkpoint_at(const struct qtr_checkpoint *checkpoint, size_t i);           /* in file order */
const struct qtr_tensor *qtr_checkpoint_find(const struct qtr_checkpoint *checkpoint, const char *name); /* NULL = absent */

/* The same for one tensor, or for a part of it; copies, which could not come back, stay. */
void qtr_tensor_forget(const struct qtr_tensor *tensor);
void qtr_tensor_forget_part(const struct qtr_tensor *tensor, size_t offset, size_t n_bytes);

/* find, and check the rank and shape: QTR_ERR_FORMAT names the tensor, what is there and what was expected. */
enum qtr_status qtr_checkpoint_get(const struct qtr_checkpoint *checkpoint, const char *name, size_t n_dims,
                                   const size_t *shape, const struct qtr_tensor **tensor, struct qtr_error *err);

/* Elements as floats, for scales, norms and biases: F32, F16, BF16 or integer tensors. out: (n) */
enum qtr_status qtr_tensor_to_floats(const struct qtr_tensor *tensor, float *out, size_t n, struct qtr_error *err);

/* What the layers' projections are, inferred from names and dtypes (spec A.7): qweight + s2_scales = W4A8_G128, qweight +
 * s1_szeros = W4A8, int8 weight + dequant_scale = W8A8, else the float dtype of weight. QTR_ERR_FORMAT when layers disagree
 * or nothing is recognised. */
enum qtr_status qtr_checkpoint_format(const struct qtr_checkpoint *checkpoint, enum qtr_linear_format *format,
                                      struct qtr_error *err);

#endif
