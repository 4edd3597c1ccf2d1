/* zip.c - reads the central directory of a zip archive (zip.h). Offsets, counts and sizes are checked against the file
 * before anything is read through them. What the local header of an entry repeats must agree, and entries must lie apart
 * from each other and from the directory: an archive that says different things to different readers, or the same bytes many
 * times over, was made to deceive. */
#include "checkpoint/zip.h"

#include "base/checked.h"
#include "base/status.h"

#include <stdlib.h>
#include <string.h>

enum {
  END_BYTES = 22,     /* end of central directory, without its comment */
  END64_BYTES = 56,   /* zip64 end of central directory */
  LOCATOR_BYTES = 20, /* zip64 locator, just before the end record */
  CENTRAL_BYTES = 46, /* a directory entry, without name, extra field and comment */
  LOCAL_BYTES = 30,   /* header before an entry's data, without name and extra field */
  MAX_ENTRIES = 1 << 20
};

static uint16_t u16(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }
static uint32_t u32(const uint8_t *p) { return u16(p) | (uint32_t)u16(p + 2) << 16; }
static uint64_t u64(const uint8_t *p) { return u32(p) | (uint64_t)u32(p + 4) << 32; }

static int compare_keys(const char *a, size_t n_a, const char *b, size_t n_b) {
  int order = memcmp(a, b, QTR_MIN(n_a, n_b));
  return order ? order : (n_a > n_b) - (n_a < n_b);
}

static int compare_entries(const void *a, const void *b) {
  const struct qtr_zip_entry *x = a, *y = b;
  return compare_keys(x->name, x->name_len, y->name, y->name_len);
}

/* Where an entry lies, its local header included; for the search for overlaps. */
struct extent {
  size_t begin, end;
  const struct qtr_zip_entry *entry;
};

static int compare_extents(const void *a, const void *b) {
  const struct extent *x = a, *y = b;
  return (x->begin > y->begin) - (x->begin < y->begin);
}

/* A name that would leave the folder an archive is unpacked to: nothing is unpacked here, but no honest archive has one. */
static bool is_climbing(const char *name, size_t n) {
  if (n == 0 || name[0] == '/' || memchr(name, '\\', n) || memchr(name, 0, n) || (n > 1 && name[1] == ':')) return true;
  for (size_t i = 0; i + 1 < n; i++) {
    bool begins = i == 0 || name[i - 1] == '/', ends = i + 2 == n || name[i + 2] == '/';
    if (begins && ends && name[i] == '.' && name[i + 1] == '.') return true;
  }
  return false;
}

static enum qtr_status damaged(struct qtr_error *err, const char *what) {
  return qtr_fail(err, QTR_ERR_FORMAT, "the zip archive is damaged or truncated (%s): fetch it again", what);
}

/* Place, size and number of entries of the central directory. */
static enum qtr_status find_directory(const uint8_t *data, size_t n, uint64_t *at, uint64_t *size, uint64_t *count,
                                      struct qtr_error *err) {
  size_t end = n, lowest = n > END_BYTES + 65535u ? n - END_BYTES - 65535u : 0;
  bool found = false;
  if (n >= END_BYTES) {
    for (end = n - END_BYTES;; end--) {
      found = memcmp(data + end, "PK\5\6", 4) == 0 && u16(data + end + 20) == n - end - END_BYTES;
      if (found || end == lowest) break;
    }
  }
  if (!found) return damaged(err, "no end record");
  *count = u16(data + end + 10);
  *size = u32(data + end + 12);
  *at = u32(data + end + 16);
  if (end >= LOCATOR_BYTES && memcmp(data + end - LOCATOR_BYTES, "PK\6\7", 4) == 0) {
    uint64_t place = u64(data + end - LOCATOR_BYTES + 8);
    if (n < END64_BYTES || place > n - END64_BYTES || memcmp(data + place, "PK\6\6", 4) != 0) {
      return damaged(err, "zip64 end record");
    }
    *count = u64(data + place + 32);
    *size = u64(data + place + 40);
    *at = u64(data + place + 48);
  }
  if (*at > n || *size > n - *at || *count > MAX_ENTRIES || *count > *size / CENTRAL_BYTES) {
    return damaged(err, "central directory");
  }
  return QTR_OK;
}

/* Sizes and offset that did not fit 32 bits are in extra field 1, in this order, each only when its 32-bit field is all
 * ones. */
static bool read_zip64(const uint8_t *extra, size_t n, uint64_t *uncompressed, uint64_t *compressed, uint64_t *offset) {
  bool need_u = *uncompressed == UINT32_MAX, need_c = *compressed == UINT32_MAX, need_o = *offset == UINT32_MAX;
  if (!need_u && !need_c && !need_o) return true;
  while (n >= 4) {
    size_t len = u16(extra + 2);
    if (len > n - 4) return false;
    if (u16(extra) == 1) {
      const uint8_t *p = extra + 4, *end = p + len;
      uint64_t *want[3] = {need_u ? uncompressed : NULL, need_c ? compressed : NULL, need_o ? offset : NULL};
      for (int i = 0; i < 3; i++) {
        if (!want[i]) continue;
        if (end - p < 8) return false;
        *want[i] = u64(p);
        p += 8;
      }
      return true;
    }
    extra += 4 + len;
    n -= 4 + len;
  }
  return false;
}

/* *begin: where its local header is. */
static enum qtr_status read_entry(const uint8_t *data, size_t n, const uint8_t *p, size_t left, struct qtr_zip_entry *entry,
                                  size_t *used, size_t *begin, struct qtr_error *err) {
  if (left < CENTRAL_BYTES || memcmp(p, "PK\1\2", 4) != 0) return damaged(err, "directory entry");
  uint16_t flags = u16(p + 8), method = u16(p + 10);
  size_t name_len = u16(p + 28), extra_len = u16(p + 30), comment_len = u16(p + 32);
  *used = CENTRAL_BYTES + name_len + extra_len + comment_len;
  if (*used > left) return damaged(err, "directory entry");
  uint64_t compressed = u32(p + 20), uncompressed = u32(p + 24), offset = u32(p + 42);
  const char *name = (const char *)p + CENTRAL_BYTES;
  char shown[128];
  qtr_printable(name, name_len, shown, sizeof shown);
  if (!read_zip64(p + CENTRAL_BYTES + name_len, extra_len, &uncompressed, &compressed, &offset)) {
    return damaged(err, "zip64 field");
  }
  if (is_climbing(name, name_len)) {
    return qtr_fail(err, QTR_ERR_FORMAT, "entry \"%s\" of the archive has an absolute name, or one that leaves its folder",
                    shown);
  }
  if (flags & 1u) return qtr_fail(err, QTR_ERR_UNSUPPORTED, "entry %s of the archive is encrypted", shown);
  if (method != 0) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "entry %s of the archive is compressed, which torch.save never does; store it",
                    shown);
  }
  if (compressed != uncompressed) return damaged(err, "sizes of a stored entry");
  if (n < LOCAL_BYTES || offset > n - LOCAL_BYTES || memcmp(data + offset, "PK\3\4", 4) != 0) {
    return damaged(err, "place of an entry");
  }
  const uint8_t *local = data + offset;
  size_t local_len = u16(local + 26);
  if (u16(local + 8) != method || local_len != name_len || n - offset - LOCAL_BYTES < name_len ||
      memcmp(local + LOCAL_BYTES, name, name_len) != 0) {
    return qtr_fail(err, QTR_ERR_FORMAT, "entry %s of the archive is another one where its data lies", shown);
  }
  size_t before = LOCAL_BYTES + (size_t)u16(data + offset + 26) + u16(data + offset + 28);
  size_t first = (size_t)offset + before; /* offset < n: no overflow */
  if (first > n || uncompressed > n - first) return damaged(err, "size of an entry");
  *entry = (struct qtr_zip_entry){name, name_len, data + first, (size_t)uncompressed};
  *begin = (size_t)offset;
  return QTR_OK;
}

/* extent: (n) in any order; directory: where the central directory begins. */
static enum qtr_status check_overlaps(struct extent *extent, size_t n, size_t directory, struct qtr_error *err) {
  qsort(extent, n, sizeof *extent, compare_extents);
  for (size_t i = 0; i < n; i++) {
    if (extent[i].end <= (i + 1 < n ? extent[i + 1].begin : directory)) continue;
    char a[128], b[128];
    const struct qtr_zip_entry *x = extent[i].entry, *y = i + 1 < n ? extent[i + 1].entry : NULL;
    qtr_printable(x->name, x->name_len, a, sizeof a);
    return qtr_fail(err, QTR_ERR_FORMAT, "entry %s of the archive overlaps %s", a,
                    y ? qtr_printable(y->name, y->name_len, b, sizeof b) : "its directory");
  }
  return QTR_OK;
}

enum qtr_status qtr_zip_open(const uint8_t *data, size_t n_bytes, struct qtr_zip *zip, struct qtr_error *err) {
  *zip = (struct qtr_zip){0};
  uint64_t at = 0, size = 0, count = 0;
  enum qtr_status status = find_directory(data, n_bytes, &at, &size, &count, err);
  if (status) return status;
  struct extent *extent = calloc((size_t)count + 1, sizeof *extent);
  zip->entry = calloc((size_t)count + 1, sizeof *zip->entry);
  if (!zip->entry || !extent) {
    status = qtr_fail_memory(err, "the archive's directory", (size_t)count * sizeof *zip->entry);
    goto done;
  }
  const uint8_t *p = data + at;
  size_t left = (size_t)size;
  for (; zip->n_entries < count; zip->n_entries++) {
    size_t used = 0;
    struct qtr_zip_entry *e = &zip->entry[zip->n_entries];
    struct extent *x = &extent[zip->n_entries];
    if ((status = read_entry(data, n_bytes, p, left, e, &used, &x->begin, err))) goto done;
    x->end = (size_t)(e->data - data) + e->n_bytes;
    x->entry = e;
    p += used;
    left -= used;
  }
  if ((status = check_overlaps(extent, zip->n_entries, (size_t)at, err))) goto done; /* before the entries move */
  qsort(zip->entry, zip->n_entries, sizeof *zip->entry, compare_entries);
  for (size_t i = 1; i < zip->n_entries; i++) {
    if (compare_entries(&zip->entry[i - 1], &zip->entry[i]) == 0) {
      char shown[128];
      status = qtr_fail(err, QTR_ERR_FORMAT, "entry %s is in the archive twice",
                        qtr_printable(zip->entry[i].name, zip->entry[i].name_len, shown, sizeof shown));
      goto done;
    }
  }
done:
  free(extent);
  if (status) qtr_zip_close(zip);
  return status;
}

void qtr_zip_close(struct qtr_zip *zip) {
  free(zip->entry);
  *zip = (struct qtr_zip){0};
}

const struct qtr_zip_entry *qtr_zip_find(const struct qtr_zip *zip, const char *name, size_t name_len) {
  size_t low = 0, high = zip->n_entries;
  while (low < high) {
    size_t middle = low + (high - low) / 2;
    const struct qtr_zip_entry *e = &zip->entry[middle];
    int order = compare_keys(name, name_len, e->name, e->name_len);
    if (order == 0) return e;
    if (order < 0) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return NULL;
}
