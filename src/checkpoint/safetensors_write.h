/* safetensors_write.h - writes a .safetensors file tensor by tensor: the header first (all names and shapes are known), then
 * the data in that order, so memory stays at one tensor. The file appears under its name only when complete. */
#ifndef QTR_CHECKPOINT_SAFETENSORS_WRITE_H
#define QTR_CHECKPOINT_SAFETENSORS_WRITE_H

#include "backend/backend.h"

struct qtr_st_entry {
  char name[160];
  enum qtr_dtype dtype;
  size_t n_dims, shape[4];
};

struct qtr_st_writer;

/* metadata: NULL, or key/value pairs ending in NULL for "__metadata__". */
enum qtr_status qtr_st_create(const char *path, const struct qtr_st_entry *entries, size_t n_entries,
                              const char *const *metadata, struct qtr_st_writer **writer, struct qtr_error *err);
/* Data of the next entry, in order; may come in pieces. Too much or too little is QTR_ERR_STATE. */
enum qtr_status qtr_st_write(struct qtr_st_writer *writer, const void *data, size_t n_bytes, struct qtr_error *err);
/* Checks that every byte came, syncs and renames. Frees the writer in every case. */
enum qtr_status qtr_st_finish(struct qtr_st_writer *writer, struct qtr_error *err);
void qtr_st_abort(struct qtr_st_writer *writer); /* removes what was written */

#endif
