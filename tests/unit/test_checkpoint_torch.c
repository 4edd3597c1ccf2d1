/* torch archives: files torch.save wrote (tests/golden/checkpoint), and zips and pickles built here to be hostile. */
#include "base/file.h"
#include "checkpoint/tensors.h"

#include <jansson.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define GOLDEN QTR_SOURCE_DIR "/tests/golden/checkpoint"

/* ---- files by torch ------------------------------------------------------------------------------ */

static void compare(const char *archive, const char *name, const struct qtr_tensor *t, const json_t *want) {
  if (!t) fail_msg("%s: no tensor %s", archive, name);
  json_t *shape = json_object_get(want, "shape"), *values = json_object_get(want, "values");
  assert_string_equal(qtr_dtype_name(t->dtype), json_string_value(json_object_get(want, "dtype")));
  assert_int_equal(t->n_dims, json_array_size(shape));
  for (size_t d = 0; d < t->n_dims; d++) assert_int_equal(t->shape[d], json_integer_value(json_array_get(shape, d)));
  size_t n = json_array_size(values);
  assert_int_equal(t->n_bytes, n * qtr_dtype_bytes(t->dtype));
  float x[1024];
  assert_in_range(n, 0, 1024);
  if (t->dtype == QTR_DTYPE_BOOL) {
    for (size_t i = 0; i < n; i++) x[i] = ((const uint8_t *)t->data)[i];
  } else {
    assert_int_equal(qtr_tensor_to_floats(t, x, n, NULL), QTR_OK);
  }
  for (size_t i = 0; i < n; i++) {
    double value = json_number_value(json_array_get(values, i));
    if ((double)x[i] != (double)(float)value) fail_msg("%s: %s[%zu] is %g, not %g", archive, name, i, (double)x[i], value);
  }
}

static void test_files_of_torch(void **state) {
  (void)state;
  json_t *all = json_load_file(GOLDEN "/expected.json", 0, NULL), *want, *value;
  const char *archive, *name;
  size_t n_read = 0, n_refused = 0;
  assert_non_null(all);
  json_object_foreach(all, archive, want) {
    char path[4096];
    struct qtr_checkpoint *c;
    struct qtr_error err = {0};
    (void)snprintf(path, sizeof path, "%s/%s.bin", GOLDEN, archive);
    enum qtr_status status = qtr_checkpoint_open(path, &c, &err);
    if (json_is_null(want)) {
      if (status != QTR_ERR_UNSUPPORTED) fail_msg("%s: %s %s", archive, qtr_status_name(status), err.message);
      n_refused++;
      continue;
    }
    if (status) fail_msg("%s: %s", archive, err.message);
    assert_int_equal(qtr_checkpoint_count(c), json_object_size(want));
    json_object_foreach(want, name, value) compare(archive, name, qtr_checkpoint_find(c, name), value);
    if (strcmp(archive, "qserve") == 0) {
      enum qtr_linear_format format;
      assert_int_equal(qtr_checkpoint_format(c, &format, &err), QTR_OK);
      assert_int_equal(format, QTR_LINEAR_W4A8);
    }
    qtr_checkpoint_close(c);
    n_read++;
  }
  assert_int_equal(n_read, 7);
  assert_int_equal(n_refused, 4);
  json_decref(all);
}

/* Contiguous tensors are not copied, and storages that two tensors share stay one. */
static void test_no_copies(void **state) {
  (void)state;
  struct qtr_map map;
  struct qtr_checkpoint *c;
  assert_int_equal(qtr_map_open(GOLDEN "/views.bin", &map, NULL), QTR_OK);
  assert_int_equal(qtr_checkpoint_open_memory(map.data, map.n_bytes, &c, NULL), QTR_OK);
  const uint8_t *whole = qtr_checkpoint_find(c, "whole")->data, *row = qtr_checkpoint_find(c, "row")->data;
  assert_in_range((uintptr_t)whole, (uintptr_t)map.data, (uintptr_t)map.data + map.n_bytes);
  assert_ptr_equal(row, whole + 12 * sizeof(float));
  const uint8_t *window = qtr_checkpoint_find(c, "window")->data;
  assert_false(window >= map.data && window < map.data + map.n_bytes);
  qtr_checkpoint_close(c);
  qtr_map_close(&map);
}

/* Every prefix of a good archive is refused; one flipped bit anywhere is refused or still reads; neither may touch a byte
 * outside (run under ASan). */
static void test_damage(void **state) {
  (void)state;
  char *file;
  size_t n;
  struct qtr_checkpoint *c;
  assert_int_equal(qtr_file_read(GOLDEN "/views.bin", 1 << 20, &file, &n, NULL), QTR_OK);
  for (size_t i = 0; i < n; i++) {
    uint8_t *part = malloc(i + 1);
    assert_non_null(part);
    memcpy(part, file, i);
    assert_int_not_equal(qtr_checkpoint_open_memory(part, i, &c, NULL), QTR_OK);
    free(part);
  }
  for (size_t i = 0; i < n; i++) {
    for (int bit = 0; bit < 8; bit++) {
      file[i] ^= (char)(1 << bit);
      if (qtr_checkpoint_open_memory(file, n, &c, NULL) == QTR_OK) {
        /* what it names can be read */
        unsigned sum = 0;
        for (size_t k = 0; k < qtr_checkpoint_count(c); k++) {
          const struct qtr_tensor *t = qtr_checkpoint_at(c, k);
          for (size_t b = 0; b < t->n_bytes; b++) sum += ((const uint8_t *)t->data)[b];
        }
        assert_true(sum < UINT32_MAX);
        qtr_checkpoint_close(c);
      }
      file[i] ^= (char)(1 << bit);
    }
  }
  free(file);
}

/* ---- built here ---------------------------------------------------------------------------------- */

struct bytes {
  uint8_t data[32768];
  size_t n;
};

static void put(struct bytes *b, const void *data, size_t n) {
  assert_true(b->n + n <= sizeof b->data);
  if (n) memcpy(b->data + b->n, data, n);
  b->n += n;
}

static void put_int(struct bytes *b, uint64_t x, size_t n) {
  for (size_t i = 0; i < n; i++) put(b, &(uint8_t){(uint8_t)(i < 8 ? x >> (8 * i) : 0)}, 1);
}

struct entry {
  const char *name;
  const void *data;
  size_t n;
};

enum { LOCAL_SIZE = 30 };

struct zip_how {
  bool zip64;
  uint16_t method, flags;
  uint64_t size_plus, offset_plus, count_plus, directory_plus; /* lies */
  size_t shared;                                               /* an entry that lies where the one before it does, 0: none */
  const char *central_name;                                    /* of the last entry, in the directory only */
};

/* A zip of stored entries. With zip64, all sizes and offsets stand in the 64-bit fields. */
static void make_zip(struct bytes *b, const struct entry *entries, size_t n, struct zip_how how) {
  size_t offset[8];
  b->n = 0;
  for (size_t i = 0; i < n; i++) {
    size_t name_len = strlen(entries[i].name);
    offset[i] = b->n;
    if (how.shared && i == how.shared) { /* its local header is the data of the one before */
      offset[i] -= LOCAL_SIZE + name_len + 3 + entries[i].n;
      continue;
    }
    put(b, "PK\3\4", 4);
    put_int(b, 0, 4);
    put_int(b, how.method, 2);
    put_int(b, 0, 16);
    put_int(b, name_len, 2);
    put_int(b, 3, 2); /* an extra field of odd length: data is where the local header says */
    put(b, entries[i].name, name_len);
    put(b, "xyz", 3);
    put(b, entries[i].data, entries[i].n);
  }
  size_t directory = b->n;
  for (size_t i = 0; i < n; i++) {
    const char *name = how.central_name && i == n - 1 ? how.central_name : entries[i].name;
    size_t name_len = strlen(name);
    uint64_t size = entries[i].n + how.size_plus, place = offset[i] + how.offset_plus;
    put(b, "PK\1\2", 4);
    put_int(b, 0, 4);
    put_int(b, how.flags, 2);
    put_int(b, how.method, 2);
    put_int(b, 0, 8);
    put_int(b, how.zip64 ? UINT32_MAX : size, 4);
    put_int(b, how.zip64 ? UINT32_MAX : size, 4);
    put_int(b, name_len, 2);
    put_int(b, how.zip64 ? 28 + 5 : 0, 2);
    put_int(b, 0, 10);
    put_int(b, how.zip64 ? UINT32_MAX : place, 4);
    put(b, name, name_len);
    if (how.zip64) {
      put(b, "\x99\x99\1\0q", 5); /* another field before it */
      put_int(b, 1, 2);
      put_int(b, 24, 2);
      put_int(b, size, 8);
      put_int(b, size, 8);
      put_int(b, place, 8);
    }
  }
  size_t end = b->n, directory_bytes = end - directory;
  uint64_t at = directory + how.directory_plus, count = n + how.count_plus;
  if (how.zip64) {
    put(b, "PK\6\6", 4);
    put_int(b, 44, 8);
    put_int(b, 0, 12);
    put_int(b, count, 8);
    put_int(b, count, 8);
    put_int(b, directory_bytes, 8);
    put_int(b, at, 8);
    put(b, "PK\6\7", 4);
    put_int(b, 0, 4);
    put_int(b, end, 8);
    put_int(b, 1, 4);
  }
  put(b, "PK\5\6", 4);
  put_int(b, 0, 4);
  put_int(b, how.zip64 ? UINT16_MAX : count, 2);
  put_int(b, how.zip64 ? UINT16_MAX : count, 2);
  put_int(b, how.zip64 ? UINT32_MAX : directory_bytes, 4);
  put_int(b, how.zip64 ? UINT32_MAX : at, 4);
  put_int(b, 7, 2);
  put(b, "comment", 7);
}

/* Opens a copy that ends exactly where the file ends. */
static enum qtr_status open_copy(const struct bytes *b, struct qtr_checkpoint **c, uint8_t **copy, struct qtr_error *err) {
  *copy = malloc(b->n);
  assert_non_null(*copy);
  memcpy(*copy, b->data, b->n);
  return qtr_checkpoint_open_memory(*copy, b->n, c, err);
}

static void refuse(const struct bytes *b, enum qtr_status status, const char *word) {
  struct qtr_checkpoint *c;
  struct qtr_error err = {0};
  uint8_t *copy;
  enum qtr_status got = open_copy(b, &c, &copy, &err);
  if (got != status) fail_msg("%s instead of %s: %s (%s)", qtr_status_name(got), qtr_status_name(status), err.message, word);
  if (!strstr(err.message, word)) fail_msg("\"%s\" does not say %s", err.message, word);
  free(copy);
}

/* One tensor "w" of 6 int8: shape and stride as given, in protocol 2. The text between is what torch writes. */
#define STORAGE(key, n) "((U\7storagectorch\nCharStorage\nU\1" key "U\3cpuK" n "tQ"
#define TENSOR(storage, offset, shape, stride)                      \
  "ctorch._utils\n_rebuild_tensor_v2\n" storage offset shape stride \
  "\x89"                                                            \
  "ccollections\nOrderedDict\n)RtR"
#define DICT(content) "\x80\2}(" content "u."
#define GOOD TENSOR(STORAGE("0", "\6"), "K\0", "K\2K\3\x86", "K\3K\1\x86")

static void make_archive(struct bytes *b, const char *pickle, size_t n, struct zip_how how) {
  const struct entry entries[] = {{"x/data.pkl", pickle, n}, {"x/data/0", "\1\2\3\4\5\6", 6}, {"x/version", "3\n", 2}};
  make_zip(b, entries, 3, how);
}
#define ARCHIVE(b, text) make_archive(b, text, sizeof(text) - 1, (struct zip_how){0})

static void test_built_archive(void **state) {
  (void)state;
  for (int zip64 = 0; zip64 < 2; zip64++) {
    struct bytes b;
    struct qtr_checkpoint *c;
    struct qtr_error err = {0};
    uint8_t *copy;
    static const char text[] = DICT("U\1w" GOOD);
    make_archive(&b, text, sizeof text - 1, (struct zip_how){.zip64 = zip64});
    if (open_copy(&b, &c, &copy, &err)) fail_msg("%s", err.message);
    const struct qtr_tensor *t = qtr_checkpoint_find(c, "w");
    assert_non_null(t);
    assert_int_equal(t->n_dims, 2);
    assert_memory_equal(t->data, "\1\2\3\4\5\6", 6);
    qtr_checkpoint_close(c);
    free(copy);
  }
}

/* A tensor that lies transposed is a copy, which letting go of the file must not clear; one that lies as it is comes back.
 */
static void test_forget(void **state) {
  (void)state;
  enum { SIDE = 128 };
  static const char text[] = DICT(
      "U\1t" TENSOR("((U\7storagectorch\nCharStorage\nU\0010U\3cpuJ\0\x40\0\0tQ", "K\0", "K\x80K\x80\x86",
                    "K\1K\x80\x86")  //
      "U\1w" TENSOR("((U\7storagectorch\nCharStorage\nU\0010U\3cpuJ\0\x40\0\0tQ", "K\0", "K\x80K\x80\x86", "K\x80K\1\x86"));
  static uint8_t x[SIDE * SIDE];
  for (size_t i = 0; i < sizeof x; i++) x[i] = (uint8_t)(i * 7 + i / SIDE + 1);
  const struct entry entries[] = {{"x/data.pkl", text, sizeof text - 1}, {"x/data/0", x, sizeof x}};
  static struct bytes b;
  make_zip(&b, entries, 2, (struct zip_how){0});
  char path[] = "qtr-forget-XXXXXX";
  int fd = mkstemp(path);
  assert_true(fd >= 0 && write(fd, b.data, b.n) == (ssize_t)b.n && close(fd) == 0);
  char named[sizeof path + 3];
  (void)snprintf(named, sizeof named, "%s.pt", path);
  assert_int_equal(rename(path, named), 0);
  struct qtr_checkpoint *c;
  struct qtr_error err = {0};
  if (qtr_checkpoint_open(named, &c, &err)) fail_msg("%s", err.message);
  const struct qtr_tensor *t = qtr_checkpoint_find(c, "t"), *w = qtr_checkpoint_find(c, "w");
  assert_true(t && w && w->mapped && !t->mapped);
  qtr_tensor_forget(t);
  qtr_tensor_forget(w);
  qtr_checkpoint_forget(c);
  for (size_t i = 0; i < SIDE * SIDE; i++) {
    assert_int_equal(((const uint8_t *)w->data)[i], x[i]);
    assert_int_equal(((const uint8_t *)t->data)[i], x[i % SIDE * SIDE + i / SIDE]);
  }
  qtr_checkpoint_close(c);
  assert_int_equal(unlink(named), 0);
}

static void test_hostile_zips(void **state) {
  (void)state;
  static const char text[] = DICT("U\1w" GOOD);
  static const struct {
    struct zip_how how;
    enum qtr_status status;
    const char *word;
  } cases[] = {
      {{.method = 8}, QTR_ERR_UNSUPPORTED, "compressed"},
      {{.flags = 1}, QTR_ERR_UNSUPPORTED, "encrypted"},
      {{.size_plus = 100000}, QTR_ERR_FORMAT, "size of an entry"},
      {{.offset_plus = 1}, QTR_ERR_FORMAT, "place of an entry"},
      {{.offset_plus = 100000}, QTR_ERR_FORMAT, "place of an entry"},
      {{.count_plus = 1}, QTR_ERR_FORMAT, "directory"},
      {{.count_plus = 60000}, QTR_ERR_FORMAT, "directory"},
      {{.directory_plus = 1}, QTR_ERR_FORMAT, "directory"},
      {{.directory_plus = 100000}, QTR_ERR_FORMAT, "directory"},
      {{.zip64 = true, .size_plus = UINT64_MAX - 3}, QTR_ERR_FORMAT, "of an entry"},
      {{.zip64 = true, .offset_plus = UINT64_MAX - 40}, QTR_ERR_FORMAT, "place of an entry"},
      {{.zip64 = true, .directory_plus = UINT64_MAX - 40}, QTR_ERR_FORMAT, "directory"},
      {{.zip64 = true, .count_plus = UINT64_MAX / 2}, QTR_ERR_FORMAT, "directory"},
  };
  struct bytes b;
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    make_archive(&b, text, sizeof text - 1, cases[i].how);
    refuse(&b, cases[i].status, cases[i].word);
  }
  const struct entry twice[] = {{"x/data.pkl", text, sizeof text - 1}, {"x/data/0", "abcdef", 6}, {"x/data/0", "ghijkl", 6}};
  make_zip(&b, twice, 3, (struct zip_how){0});
  refuse(&b, QTR_ERR_FORMAT, "twice");
  /* entries that say the same bytes twice: one inside another's data, one that covers the next, one the directory */
  struct bytes inside = {.n = 0};
  put(&inside, "PK\3\4", 4);
  put_int(&inside, 0, 22);
  put_int(&inside, 8, 2);
  put_int(&inside, 3, 2);
  put(&inside, "x/data/1xyzghijkl", 17);
  const struct entry nested[] = {
      {"x/data.pkl", text, sizeof text - 1}, {"x/data/0", inside.data, inside.n}, {"x/data/1", "ghijkl", 6}};
  make_zip(&b, nested, 3, (struct zip_how){.shared = 2});
  refuse(&b, QTR_ERR_FORMAT, "x/data/0 of the archive overlaps x/data/1");
  make_archive(&b, text, sizeof text - 1, (struct zip_how){.size_plus = 40});
  refuse(&b, QTR_ERR_FORMAT, "overlaps");
  const struct entry last[] = {{"x/data.pkl", text, sizeof text - 1}};
  make_zip(&b, last, 1, (struct zip_how){.size_plus = 4});
  refuse(&b, QTR_ERR_FORMAT, "overlaps its directory");
  /* names that lead elsewhere, and one that is not the name where the data lies */
  static const char *const climbing[] = {"/etc/passwd", "..", "../x", "x/..", "x/../../y", "C:x", "x\\y", ""};
  for (size_t i = 0; i < sizeof climbing / sizeof *climbing; i++) {
    const struct entry entries[] = {{"x/data.pkl", text, sizeof text - 1}, {climbing[i], "abcdef", 6}};
    make_zip(&b, entries, 2, (struct zip_how){0});
    refuse(&b, QTR_ERR_FORMAT, "leaves its folder");
  }
  static const char *const harmless[] = {"x/..y", "x/y..", "...", "x/.../y", "."};
  for (size_t i = 0; i < sizeof harmless / sizeof *harmless; i++) {
    const struct entry entries[] = {
        {"x/data.pkl", text, sizeof text - 1}, {"x/data/0", "abcdef", 6}, {harmless[i], "abcdef", 6}};
    struct qtr_checkpoint *c;
    struct qtr_error err = {0};
    uint8_t *copy;
    make_zip(&b, entries, 3, (struct zip_how){0});
    if (open_copy(&b, &c, &copy, &err)) fail_msg("%s: %s", harmless[i], err.message);
    qtr_checkpoint_close(c);
    free(copy);
  }
  make_archive(&b, text, sizeof text - 1, (struct zip_how){.central_name = "x/versiom"});
  refuse(&b, QTR_ERR_FORMAT, "x/versiom of the archive is another one");
  const struct entry two_roots[] = {{"x/data.pkl", text, sizeof text - 1}, {"y/data.pkl", text, sizeof text - 1}};
  make_zip(&b, two_roots, 2, (struct zip_how){0});
  refuse(&b, QTR_ERR_FORMAT, "two data.pkl");
  const struct entry no_pickle[] = {{"x/data/0", "abcdef", 6}, {"data.pkl", text, sizeof text - 1}};
  make_zip(&b, no_pickle, 2, (struct zip_how){0});
  refuse(&b, QTR_ERR_FORMAT, "no data.pkl");
  const struct entry big[] = {{"x/data.pkl", text, sizeof text - 1}, {"x/data/0", "abcdef", 6}, {"x/byteorder", "big", 3}};
  make_zip(&b, big, 3, (struct zip_how){0});
  refuse(&b, QTR_ERR_UNSUPPORTED, "big-endian");
  const struct entry no_storage[] = {{"x/data.pkl", text, sizeof text - 1}, {"x/data/1", "abcdef", 6}};
  make_zip(&b, no_storage, 2, (struct zip_how){0});
  refuse(&b, QTR_ERR_FORMAT, "data/0");
  const struct entry short_storage[] = {{"x/data.pkl", text, sizeof text - 1}, {"x/data/0", "abcde", 5}};
  make_zip(&b, short_storage, 2, (struct zip_how){0});
  refuse(&b, QTR_ERR_FORMAT, "beyond its storage");
  make_zip(&b, NULL, 0, (struct zip_how){0});
  refuse(&b, QTR_ERR_FORMAT, "header"); /* an empty zip has no local header: it is taken for safetensors */
}

static void test_hostile_tensors(void **state) {
  (void)state;
  struct bytes b;
#define SHAPED(storage, offset, shape, stride) DICT("U\1w" TENSOR(storage, offset, shape, stride))
#define REFUSE(text, status, word) \
  do {                             \
    ARCHIVE(&b, text);             \
    refuse(&b, status, word);      \
  } while (0)
  const char *beyond = "beyond its storage";
  REFUSE(SHAPED(STORAGE("0", "\6"), "K\0", "K\2K\4\x86", "K\4K\1\x86"), QTR_ERR_FORMAT, beyond);
  REFUSE(SHAPED(STORAGE("0", "\6"), "K\1", "K\2K\3\x86", "K\3K\1\x86"), QTR_ERR_FORMAT, beyond);
  REFUSE(SHAPED(STORAGE("0", "\5"), "K\0", "K\2K\3\x86", "K\3K\1\x86"), QTR_ERR_FORMAT, beyond);   /* says it has less */
  REFUSE(SHAPED(STORAGE("0", "\x20"), "K\0", "K\4K\3\x86", "K\3K\1\x86"), QTR_ERR_FORMAT, beyond); /* says it has more */
  REFUSE(SHAPED(STORAGE("1", "\6"), "K\0", "K\2K\3\x86", "K\3K\1\x86"), QTR_ERR_FORMAT, "data/1");
  REFUSE(SHAPED(STORAGE("0", "\6"), "J\xff\xff\xff\xff", "K\2K\3\x86", "K\3K\1\x86"), QTR_ERR_FORMAT, "negative");
  REFUSE(SHAPED(STORAGE("0", "\6"), "K\0", "J\xff\xff\xff\xffK\3\x86", "K\3K\1\x86"), QTR_ERR_FORMAT, "negative");
  REFUSE(SHAPED(STORAGE("0", "\6"), "K\0", "K\2K\3\x86", "J\xfd\xff\xff\xffK\1\x86"), QTR_ERR_FORMAT, "negative");
  REFUSE(SHAPED(STORAGE("0", "\6"), "K\0", "K\2K\3\x86", "K\1\x85"), QTR_ERR_FORMAT, "differ in length");
  REFUSE(SHAPED(STORAGE("0", "\6"), "K\0", "K\2", "K\1\x85"), QTR_ERR_FORMAT, "no tuple");
  /* 2^62 x 2^62, and a stride that wraps */
#define HUGE_INT "\x8a\x08\0\0\0\0\0\0\0\x40"
  REFUSE(SHAPED(STORAGE("0", "\6"), "K\0", HUGE_INT HUGE_INT "\x86", "K\0K\0\x86"), QTR_ERR_FORMAT, "too many elements");
  REFUSE(SHAPED(STORAGE("0", "\6"), "K\0", "K\5\x85", HUGE_INT "\x85"), QTR_ERR_FORMAT, beyond);
  REFUSE(SHAPED(STORAGE("0", "\6"), HUGE_INT, "K\1\x85", "K\1\x85"), QTR_ERR_FORMAT, beyond);
  /* stride 0 would blow six bytes up to gigabytes */
  REFUSE(SHAPED(STORAGE("0", "\6"), "K\0", "J\0\0\0\x40\x85", "K\0\x85"), QTR_ERR_LIMIT, "strided");
}

static void test_hostile_pickles(void **state) {
  (void)state;
  struct bytes b;
  REFUSE("", QTR_ERR_FORMAT, "no end");
  REFUSE(".", QTR_ERR_FORMAT, "leaves nothing");
  REFUSE("\x80\2}", QTR_ERR_FORMAT, "no end");
  REFUSE("\x80\6}.", QTR_ERR_FORMAT, "protocol");
  REFUSE("\x80\2K\1.", QTR_ERR_UNSUPPORTED, "no dictionary");
  REFUSE("\x80\2}.", QTR_ERR_FORMAT, "no tensors");
  REFUSE(DICT("U\1wcos\nsystem\nU\4true\x85R"), QTR_ERR_UNSUPPORTED, "os.system");
  REFUSE(DICT("U\1wcbuiltins\neval\nU\4true\x85R"), QTR_ERR_UNSUPPORTED, "builtins.eval");
  REFUSE("\x80\4\x8c\2os\x8c\6system\x93.", QTR_ERR_UNSUPPORTED, "os.system");
  REFUSE("ctorch\n", QTR_ERR_FORMAT, "no end");
  REFUSE("(ios\nsystem\n.", QTR_ERR_UNSUPPORTED, "0x69");                        /* INST */
  REFUSE("(ctorch._utils\n_rebuild_tensor_v2\no.", QTR_ERR_UNSUPPORTED, "0x6f"); /* OBJ */
  REFUSE("ccollections\nOrderedDict\n)\x81.", QTR_ERR_UNSUPPORTED, "0x81");      /* NEWOBJ */
  REFUSE("P0\n.", QTR_ERR_UNSUPPORTED, "0x50");
  REFUSE("\x82\1.", QTR_ERR_UNSUPPORTED, "0x82"); /* EXT1 */
  REFUSE("ccollections\nOrderedDict\nK\1\x85R.", QTR_ERR_FORMAT, "with arguments");
  REFUSE("ctorch\nHalfStorage\n)R.", QTR_ERR_FORMAT, "cannot be called");
  REFUSE("ctorch._utils\n_rebuild_tensor_v2\n)R.", QTR_ERR_FORMAT, "too few");
  REFUSE("ctorch._utils\n_rebuild_tensor_v2\n(NK\0))tR.", QTR_ERR_FORMAT, "no storage");
  REFUSE("ctorch._utils\n_rebuild_parameter\n(K\1tR.", QTR_ERR_FORMAT, "parameter");
  REFUSE("K\1K\2R.", QTR_ERR_FORMAT, "no known class");
  REFUSE("R.", QTR_ERR_FORMAT, "call");
  REFUSE("(R.", QTR_ERR_FORMAT, "call");
  REFUSE("Q.", QTR_ERR_FORMAT, "persistent");
  REFUSE("(K\1K\2K\3K\4K\5tQ.", QTR_ERR_FORMAT, "persistent");
  REFUSE(
      "(U\7storageccollections\nOrderedDict\nU\1"
      "0U\3cpuK\6tQ.",
      QTR_ERR_FORMAT, "persistent");
  REFUSE("t.", QTR_ERR_FORMAT, "no mark");
  REFUSE("u.", QTR_ERR_FORMAT, "no mark");
  REFUSE("(u.", QTR_ERR_FORMAT, "no dictionary");
  REFUSE("}(K\1u.", QTR_ERR_FORMAT, "no dictionary"); /* a key without a value */
  REFUSE("(K\1d.", QTR_ERR_FORMAT, "without a value");
  REFUSE("}K\1s.", QTR_ERR_FORMAT, "no dictionary"); /* the dictionary itself is the key */
  REFUSE("K\1K\2K\3s.", QTR_ERR_FORMAT, "no dictionary");
  REFUSE("a.", QTR_ERR_FORMAT, "too short");
  REFUSE("}K\1a.", QTR_ERR_FORMAT, "no list");
  REFUSE("\x85.", QTR_ERR_FORMAT, "too short");
  REFUSE("(\x85.", QTR_ERR_FORMAT, "mark");
  REFUSE("K\1(\x86.", QTR_ERR_FORMAT, "mark");
  REFUSE("0.", QTR_ERR_FORMAT, "drop");
  REFUSE("2.", QTR_ERR_FORMAT, "repeat");
  REFUSE("b.", QTR_ERR_FORMAT, "state");
  REFUSE("K\1K\2b.", QTR_ERR_FORMAT, "state");
  REFUSE("q\0.", QTR_ERR_FORMAT, "remember");
  REFUSE("Nr\xff\xff\xff\x7f.", QTR_ERR_FORMAT, "remember");
  REFUSE("h\0.", QTR_ERR_FORMAT, "recalls");
  REFUSE("Nq\1h\0.", QTR_ERR_FORMAT, "recalls");
  REFUSE("j\xff\xff\xff\xff.", QTR_ERR_FORMAT, "recalls");
  REFUSE("U\377abc.", QTR_ERR_FORMAT, "ends inside");
  REFUSE(
      "X\xff\xff\xff\xff"
      "abc.",
      QTR_ERR_FORMAT, "ends inside");
  REFUSE(
      "\x8d\xff\xff\xff\xff\xff\xff\xff\xff"
      "abc.",
      QTR_ERR_FORMAT, "ends inside");
  REFUSE("\x8b\xff\xff\xff\xff.", QTR_ERR_FORMAT, "64 bits");
  REFUSE("\x8a\x09.........", QTR_ERR_FORMAT, "64 bits");
  REFUSE("J\0\0.", QTR_ERR_FORMAT, "ends inside");
  /* one name twice */
  REFUSE(DICT("U\1w" GOOD "U\1w" GOOD), QTR_ERR_FORMAT, "twice");
  /* a dictionary that holds itself, as the state dict and as a value */
  REFUSE("}q\0U\5modelh\0s.", QTR_ERR_FORMAT, "no tensors");
}

/* Every instruction there is: those that build dictionaries and tensors fail for want of a stack, all others by their
 * number. */
static void test_every_opcode(void **state) {
  (void)state;
  static const char known[] = "\x80\x95(012N\x88\x89KMJ\x8a\x8bGX\x8c\x8dUT}])tld\x85\x86\x87suaeqr\x94hjc\x93QRb.";
  size_t n_refused = 0;
  for (int op = 0; op < 256; op++) {
    const char text[] = {(char)op, '\n', '\n', '.', 0};
    char number[16];
    struct bytes b;
    struct qtr_checkpoint *c;
    struct qtr_error err = {0};
    uint8_t *copy;
    make_archive(&b, text, 4, (struct zip_how){0});
    enum qtr_status got = open_copy(&b, &c, &copy, &err);
    free(copy);
    if (got == QTR_OK) fail_msg("instruction 0x%02x made a checkpoint", (unsigned)op);
    (void)snprintf(number, sizeof number, "0x%02x", (unsigned)op);
    bool named = strstr(err.message, number) != NULL;
    if (op != 0 && strchr(known, op)) {
      assert_false(named);
      continue;
    }
    if (got != QTR_ERR_UNSUPPORTED || !named) fail_msg("instruction %s: %s", number, err.message);
    n_refused++;
  }
  assert_int_equal(n_refused, 256 - (sizeof known - 1));
}

/* Any class or function but those of tensors, by both ways of naming one, is refused by name before it is called. */
static void test_globals(void **state) {
  (void)state;
  static const char *const names[][2] = {{"os", "system"},
                                         {"posix", "system"},
                                         {"nt", "system"},
                                         {"subprocess", "Popen"},
                                         {"builtins", "exec"},
                                         {"__builtin__", "eval"},
                                         {"builtins", "getattr"},
                                         {"runpy", "_run_code"},
                                         {"numpy.core.multiarray", "_reconstruct"},
                                         {"torch", "load"},
                                         {"torch", "Tensor"},
                                         {"torch", "FloatStorage2"},
                                         {"torch", "floatstorage"},
                                         {"torch.storage", "_load_from_bytes"},
                                         {"torch._utils", "_rebuild_tensor"},
                                         {"torch.nn.modules.linear", "Linear"},
                                         {"collections", "defaultdict"},
                                         {"collections.", "OrderedDict"},
                                         {"", "OrderedDict"},
                                         {"collections", ""},
                                         {"_codecs", "encode"}};
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    for (int stacked = 0; stacked < 2; stacked++) {
      char whole[80];
      struct bytes b, text = {.n = 0};
      put(&text, stacked ? "}" : "}c", stacked ? 1 : 2);
      for (size_t k = 0; k < 2; k++) {
        size_t len = strlen(names[i][k]);
        if (stacked) put(&text, "U", 1);
        if (stacked) put_int(&text, len, 1);
        put(&text, names[i][k], len);
        if (!stacked) put(&text, "\n", 1);
      }
      put(&text, stacked ? "\x93." : ".", stacked ? 2 : 1);
      make_archive(&b, (const char *)text.data, text.n, (struct zip_how){0});
      (void)snprintf(whole, sizeof whole, "%s.%s", names[i][0], names[i][1]);
      refuse(&b, QTR_ERR_UNSUPPORTED, whole);
    }
  }
}

/* ---- dictionaries in each other ------------------------------------------------------------------ */

static enum qtr_status open_nested(const char *pickle, size_t n, struct qtr_checkpoint **c, uint8_t **copy,
                                   struct qtr_error *err) {
  struct bytes b;
  make_archive(&b, pickle, n, (struct zip_how){0});
  *copy = malloc(b.n);
  assert_non_null(*copy);
  memcpy(*copy, b.data, b.n);
  return qtr_checkpoint_open_nested_memory(*copy, b.n, c, err);
}

static void expect_number(const struct qtr_checkpoint *c, const char *name, float want) {
  const struct qtr_tensor *t = qtr_checkpoint_find(c, name);
  float x;
  if (!t) fail_msg("no %s", name);
  assert_int_equal(t->n_dims, 0);
  assert_int_equal(qtr_tensor_to_floats(t, &x, 1, NULL), QTR_OK);
  assert_true(x == want);
}

/* {"a": {"list": [{"max": 7, "min": None}, 1.5], "t": (w,)}, 3: 4, "z": True} */
static void test_nested(void **state) {
  (void)state;
  static const char text[] =
      "\x80\2}(U\1a}(U\4list]}(U\3maxK\7U\3minNuaG\x3f\xf8\0\0\0\0\0\0aU\1t" GOOD "\x85uK\3K\4U\1z\x88u.";
  struct qtr_checkpoint *c;
  struct qtr_error err = {0};
  uint8_t *copy;
  if (open_nested(text, sizeof text - 1, &c, &copy, &err)) fail_msg("%s", err.message);
  assert_int_equal(qtr_checkpoint_count(c), 3);
  expect_number(c, "a.list.0.max", 7);
  expect_number(c, "a.list.1", 1.5f);
  const struct qtr_tensor *t = qtr_checkpoint_find(c, "a.t.0");
  assert_non_null(t);
  assert_memory_equal(t->data, "\1\2\3\4\5\6", 6);
  qtr_checkpoint_close(c);
  free(copy);
}

static void refuse_nested(const char *pickle, size_t n, enum qtr_status status, const char *word) {
  struct qtr_checkpoint *c;
  struct qtr_error err = {0};
  uint8_t *copy;
  enum qtr_status got = open_nested(pickle, n, &c, &copy, &err);
  if (got != status || !strstr(err.message, word)) fail_msg("%s: \"%s\" (%s)", qtr_status_name(got), err.message, word);
  free(copy);
}

static void test_hostile_nesting(void **state) {
  (void)state;
#define REFUSE_NESTED(text, status, word) refuse_nested(text, sizeof(text) - 1, status, word)
  REFUSE_NESTED("}q\0U\1ah\0s.", QTR_ERR_LIMIT, "deep");                                  /* holds itself */
  REFUSE_NESTED("}U\1a}U\1b}U\1c}U\1d}U\1e}U\1f}U\1gK\1sssssss.", QTR_ERR_LIMIT, "deep"); /* seven in each other */
  REFUSE_NESTED("}.", QTR_ERR_FORMAT, "no tensors");
  REFUSE_NESTED("]K\1a.", QTR_ERR_UNSUPPORTED, "no dictionary");
  REFUSE_NESTED("}(U\3a.bK\1U\1a}U\1bK\2su.", QTR_ERR_FORMAT, "twice"); /* two ways with one name */
  REFUSE_NESTED("}U\1acos\nsystem\ns.", QTR_ERR_UNSUPPORTED, "os.system");
  /* five lists, each with 32 times the one before: 32 million values in 400 bytes */
  struct bytes b = {.n = 0};
  put(&b, "}U\1a]q\1(", 8);
  for (size_t i = 0; i < 32; i++) put(&b, "N", 1);
  for (uint8_t level = 1; level < 5; level++) {
    put(&b, "e0]q", 4);
    put_int(&b, level + 1u, 1);
    put(&b, "(", 1);
    for (size_t i = 0; i < 32; i++) put(&b, (const uint8_t[]){'h', level}, 2);
  }
  put(&b, "es.", 3);
  refuse_nested((const char *)b.data, b.n, QTR_ERR_LIMIT, "values");
  /* two names of 260 letters make a longer one than a tensor may have */
  b.n = 0;
  for (size_t i = 0; i < 2; i++) {
    put(&b, "}X\4\1\0\0", 6);
    for (size_t k = 0; k < 260; k++) put(&b, "n", 1);
  }
  put(&b, "K\1ss.", 5);
  refuse_nested((const char *)b.data, b.n, QTR_ERR_LIMIT, "longer");
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_every_opcode), cmocka_unit_test(test_forget),          cmocka_unit_test(test_globals),
      cmocka_unit_test(test_nested),       cmocka_unit_test(test_hostile_nesting), cmocka_unit_test(test_files_of_torch),
      cmocka_unit_test(test_no_copies),    cmocka_unit_test(test_damage),          cmocka_unit_test(test_built_archive),
      cmocka_unit_test(test_hostile_zips), cmocka_unit_test(test_hostile_tensors), cmocka_unit_test(test_hostile_pickles),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
