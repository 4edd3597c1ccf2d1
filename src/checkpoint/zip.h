/* zip.h - the directory of a zip archive whose entries are stored, not compressed: each entry is then a piece of the map and
 * no copy is made, which is why this is not libarchive. Zip64 is understood. Untrusted. */
#ifndef QTR_CHECKPOINT_ZIP_H
#define QTR_CHECKPOINT_ZIP_H

#include "quattuor/quattuor.h"

struct qtr_zip_entry {
  const char *name; /* (name_len) in the archive, no NUL after it */
  size_t name_len;
  const uint8_t *data; /* (n_bytes) in the archive */
  size_t n_bytes;
};

struct qtr_zip {
  struct qtr_zip_entry *entry; /* (n_entries) sorted by name, each name once */
  size_t n_entries;
};

/* Compressed and encrypted entries are QTR_ERR_UNSUPPORTED. data is borrowed. */
enum qtr_status qtr_zip_open(const uint8_t *data, size_t n_bytes, struct qtr_zip *zip, struct qtr_error *err);
void qtr_zip_close(struct qtr_zip *zip);
const struct qtr_zip_entry *qtr_zip_find(const struct qtr_zip *zip, const char *name, size_t name_len); /* NULL = absent */

#endif
