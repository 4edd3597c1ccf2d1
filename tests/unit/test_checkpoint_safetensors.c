/* safetensors: hostile headers one by one, writer and reader against each other, and which files of a directory are read. */
#include "base/file.h"
#include "base/half.h"
#include "checkpoint/packing.h"
#include "checkpoint/safetensors_write.h"
#include "checkpoint/tensors.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

/* A file in memory: length, header text, n_data bytes 0, 1, 2 … malloc'ed exactly, so that ASan sees a byte too far. */
static uint8_t *make_file(const char *header, size_t n_data, size_t *n) {
  size_t len = strlen(header);
  uint8_t *file = malloc(8 + len + n_data);
  assert_non_null(file);
  for (size_t i = 0; i < 8; i++) file[i] = (uint8_t)(len >> (8 * i));
  memcpy(file + 8, header, len);
  for (size_t i = 0; i < n_data; i++) file[8 + len + i] = (uint8_t)i;
  *n = 8 + len + n_data;
  return file;
}

static void refuse_bytes(const uint8_t *file, size_t n, enum qtr_status status, const char *word) {
  struct qtr_checkpoint *c;
  struct qtr_error err = {0};
  enum qtr_status got = qtr_checkpoint_open_memory(file, n, &c, &err);
  assert_null(c);
  if (got != status) fail_msg("%s instead of %s: %s", qtr_status_name(got), qtr_status_name(status), err.message);
  if (!strstr(err.message, word)) fail_msg("\"%s\" does not say %s", err.message, word);
}

static void refuse(const char *header, size_t n_data, enum qtr_status status, const char *word) {
  size_t n;
  uint8_t *file = make_file(header, n_data, &n);
  refuse_bytes(file, n, status, word);
  free(file);
}

#define T(dtype, shape, begin, end) "{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" #begin "," #end "]}"

static void test_reads(void **state) {
  (void)state;
  size_t n;
  /* out of order in the header, unaligned, an empty tensor, a scalar, padding behind the header, metadata */
  uint8_t *file = make_file("{\"__metadata__\":{\"format\":\"pt\"},\"b\":" T("F16", "[2,2]", 3, 11) ",\"a\":" T(
                                "I8", "[3]", 0, 3) ",\"e\":" T("F32", "[0,7]", 3, 3) ",\"s\":" T("U8", "[]", 11, 12) "}   ",
                            12, &n);
  struct qtr_checkpoint *c;
  struct qtr_error err;
  assert_int_equal(qtr_checkpoint_open_memory(file, n, &c, &err), QTR_OK);
  assert_int_equal(qtr_checkpoint_count(c), 4);
  assert_string_equal(qtr_checkpoint_at(c, 0)->name, "a"); /* file order */
  assert_string_equal(qtr_checkpoint_at(c, 3)->name, "s");
  assert_null(qtr_checkpoint_at(c, 4));
  assert_null(qtr_checkpoint_find(c, "nothing"));
  const struct qtr_tensor *t;
  const size_t shape[2] = {2, 2};
  assert_int_equal(qtr_checkpoint_get(c, "b", 2, shape, &t, &err), QTR_OK);
  assert_int_equal(t->n_bytes, 8);
  float x[4];
  assert_int_equal(qtr_tensor_to_floats(t, x, 4, &err), QTR_OK);
  for (unsigned i = 0; i < 4; i++) {
    assert_true(x[i] == qtr_f16_to_f32((uint16_t)(3 + 2 * i + ((4 + 2 * i) << 8))));
  }
  assert_int_equal(qtr_tensor_to_floats(t, x, 3, &err), QTR_ERR_FORMAT);
  const size_t wrong[2] = {4, 1};
  assert_int_equal(qtr_checkpoint_get(c, "b", 2, wrong, &t, &err), QTR_ERR_FORMAT);
  assert_non_null(strstr(err.message, "[2, 2]"));
  assert_non_null(strstr(err.message, "[4, 1]"));
  assert_int_equal(qtr_checkpoint_get(c, "c", 1, wrong, &t, &err), QTR_ERR_NOT_FOUND);
  assert_int_equal(qtr_checkpoint_find(c, "e")->n_bytes, 0);
  qtr_checkpoint_close(c);
  free(file);
}

static void test_hostile_headers(void **state) {
  (void)state;
  refuse("", 0, QTR_ERR_FORMAT, "JSON");
  refuse("[]", 0, QTR_ERR_FORMAT, "JSON object");
  refuse("{}", 0, QTR_ERR_FORMAT, "no tensors");
  refuse("{\"a\":" T("I8", "[3]", 0, 3) "", 3, QTR_ERR_FORMAT, "JSON");
  refuse("{\"a\":" T("I8", "[3]", 0, 3) ",\"a\":" T("I8", "[3]", 3, 6) "}", 6, QTR_ERR_FORMAT, "duplicate");
  refuse("{\"a\":" T("I8", "[3]", 0, 3) ",\"b\":" T("I8", "[3]", 2, 5) "}", 5, QTR_ERR_FORMAT, "inside");
  refuse("{\"a\":" T("I8", "[3]", 0, 3) ",\"b\":" T("I8", "[3]", 0, 3) "}", 3, QTR_ERR_FORMAT, "inside");
  refuse("{\"a\":" T("I8", "[3]", 0, 3) ",\"b\":" T("I8", "[3]", 4, 7) "}", 7, QTR_ERR_FORMAT, "hole");
  refuse("{\"a\":" T("I8", "[3]", 1, 4) "}", 4, QTR_ERR_FORMAT, "hole");
  refuse("{\"a\":" T("I8", "[3]", 0, 3) "}", 4, QTR_ERR_FORMAT, "only 3");
  refuse("{\"a\":" T("I8", "[4]", 0, 4) "}", 3, QTR_ERR_FORMAT, "truncated");
  refuse("{\"a\":" T("F16", "[3]", 0, 3) "}", 3, QTR_ERR_FORMAT, "need 6 bytes");
  refuse("{\"a\":" T("I8", "[3]", 3, 0) "}", 3, QTR_ERR_FORMAT, "data_offsets");
  refuse("{\"a\":" T("I8", "[3]", -3, 0) "}", 3, QTR_ERR_FORMAT, "negative");
  refuse("{\"a\":" T("I8", "[-3]", 0, 3) "}", 3, QTR_ERR_FORMAT, "negative");
  refuse("{\"a\":" T("I8", "[3.0]", 0, 3) "}", 3, QTR_ERR_FORMAT, "shape");
  refuse("{\"a\":" T("I8", "3", 0, 3) "}", 3, QTR_ERR_FORMAT, "shape");
  refuse("{\"a\":" T("I8", "[1,1,1,1,1,1,1,1,3]", 0, 3) "}", 3, QTR_ERR_FORMAT, "9 dimensions");
  /* products that wrap to something small */
  refuse("{\"a\":" T("I8", "[4294967296,4294967296]", 0, 0) "}", 0, QTR_ERR_FORMAT, "too many elements");
  refuse("{\"a\":" T("F32", "[4611686018427387904]", 0, 0) "}", 0, QTR_ERR_FORMAT, "too many elements");
  refuse("{\"a\":" T("F64", "[9223372036854775807,2]", 0, 16) "}", 16, QTR_ERR_FORMAT, "too many elements");
  refuse("{\"a\":" T("I8", "[99999999999999999999]", 0, 3) "}", 3, QTR_ERR_FORMAT, "JSON");
  refuse("{\"a\":" T("I8", "[3]", 0, 99999999999999999999) "}", 3, QTR_ERR_FORMAT, "JSON");
  refuse("{\"a\":" T("F4", "[3]", 0, 3) "}", 3, QTR_ERR_UNSUPPORTED, "F4");
  refuse("{\"a\":3}", 0, QTR_ERR_FORMAT, "dtype");
  refuse("{\"a\":{\"dtype\":\"I8\",\"shape\":[3],\"data_offsets\":[0,3,3]}}", 3, QTR_ERR_FORMAT, "data_offsets");
  refuse("{\"\":" T("I8", "[3]", 0, 3) "}", 3, QTR_ERR_FORMAT, "name");
  refuse("{\"a\\u0000b\":" T("I8", "[3]", 0, 3) "}", 3, QTR_ERR_FORMAT, "JSON");
  refuse("{\"\xff\":" T("I8", "[3]", 0, 3) "}", 3, QTR_ERR_FORMAT, "JSON");
}

static void test_hostile_lengths(void **state) {
  (void)state;
  refuse_bytes((const uint8_t *)"", 0, QTR_ERR_FORMAT, "too few");
  refuse_bytes((const uint8_t *)"\1\0\0\0\0\0\0", 7, QTR_ERR_FORMAT, "too few");
  refuse_bytes((const uint8_t *)"\1\0\0\0\0\0\0\0", 8, QTR_ERR_FORMAT, "truncated");
  refuse_bytes((const uint8_t *)"\377\377\377\377\377\377\377\377{}", 10, QTR_ERR_FORMAT, "announces");
  refuse_bytes((const uint8_t *)"\370\377\377\377\377\377\377\377{}", 10, QTR_ERR_FORMAT, "announces");
  refuse_bytes((const uint8_t *)"\0\0\100\6\0\0\0\0{}", 10, QTR_ERR_FORMAT, "truncated"); /* exactly 100 MiB is in range */
  refuse_bytes((const uint8_t *)"version https://git-lfs.github.com/spec/v1", 42, QTR_ERR_FORMAT, "git lfs pull");
  /* a header that is nothing but objects would take gigabytes as a tree */
  size_t n_objects = QTR_MAX_TENSORS + 2, n;
  char *text = malloc(n_objects + 1);
  assert_non_null(text);
  memset(text, '{', n_objects);
  text[n_objects] = 0;
  uint8_t *file = make_file(text, 0, &n);
  refuse_bytes(file, n, QTR_ERR_LIMIT, "too many tensors");
  free(file);
  free(text);
}

/* Every prefix of a good file is refused, and so is every file with one header byte changed, or it still reads. */
static void test_damage(void **state) {
  (void)state;
  size_t n;
  uint8_t *file = make_file("{\"a\":" T("I8", "[3]", 0, 3) ",\"b\":" T("F16", "[2,1]", 3, 7) "}", 7, &n);
  struct qtr_checkpoint *c;
  for (size_t i = 0; i < n; i++) {
    uint8_t *part = malloc(i + 1);
    assert_non_null(part);
    memcpy(part, file, i);
    assert_int_not_equal(qtr_checkpoint_open_memory(part, i, &c, NULL), QTR_OK);
    free(part);
  }
  for (size_t i = 0; i < n - 7; i++) {
    for (int bit = 0; bit < 8; bit++) {
      file[i] ^= (uint8_t)(1 << bit);
      if (qtr_checkpoint_open_memory(file, n, &c, NULL) == QTR_OK) qtr_checkpoint_close(c);
      file[i] ^= (uint8_t)(1 << bit);
    }
  }
  free(file);
}

/* ---- the writer ---------------------------------------------------------------------------------- */

static char *make_dir(void) {
  char *dir = strdup("qtr-test-XXXXXX");
  assert_non_null(dir);
  assert_non_null(mkdtemp(dir));
  return dir;
}

static void remove_dir(char *dir) {
  char command[256];
  (void)snprintf(command, sizeof command, "rm -r '%s'", dir);
  assert_int_equal(system(command), 0);
  free(dir);
}

static void test_writer_round_trip(void **state) {
  (void)state;
  char *dir = make_dir(), *path = qtr_path_join(dir, "x.safetensors"), *temporary = qtr_path_join(dir, "x.safetensors.tmp");
  const struct qtr_st_entry entries[] = {
      {.name = "a\"\\\t\xc3\xa9", .dtype = QTR_DTYPE_I8, .n_dims = 2, .shape = {3, 5}},
      {.name = "empty", .dtype = QTR_DTYPE_F32, .n_dims = 1, .shape = {0}},
      {.name = "half", .dtype = QTR_DTYPE_F16, .n_dims = 3, .shape = {2, 1, 2}},
      {.name = "scalar", .dtype = QTR_DTYPE_F32},
      {.name = "last", .dtype = QTR_DTYPE_F32, .n_dims = 1, .shape = {0}},
  };
  const char *const metadata[] = {"format", "pt", "quote\"", "line\n", NULL};
  uint8_t data[15 + 8 + 4];
  for (size_t i = 0; i < sizeof data; i++) data[i] = (uint8_t)(200 - i);
  struct qtr_st_writer *w;
  struct qtr_error err;
  assert_int_equal(qtr_st_create(path, entries, 5, metadata, &w, &err), QTR_OK);
  assert_int_equal(qtr_st_write(w, data, 7, &err), QTR_OK); /* in pieces */
  assert_int_equal(qtr_st_write(w, data, 9, &err), QTR_ERR_STATE);
  assert_int_equal(qtr_st_write(w, data + 7, 8, &err), QTR_OK);
  assert_int_equal(qtr_st_write(w, data + 15, 8, &err), QTR_OK);
  assert_int_equal(qtr_st_write(w, data + 23, 4, &err), QTR_OK);
  assert_int_equal(qtr_st_write(w, data, 1, &err), QTR_ERR_STATE);
  assert_false(qtr_file_exists(path)); /* not before it is complete */
  assert_int_equal(qtr_st_finish(w, &err), QTR_OK);
  assert_false(qtr_file_exists(temporary));

  struct qtr_checkpoint *c;
  assert_int_equal(qtr_checkpoint_open(path, &c, &err), QTR_OK);
  assert_int_equal(qtr_checkpoint_count(c), 5);
  const struct qtr_tensor *t = qtr_checkpoint_find(c, entries[0].name);
  assert_non_null(t);
  assert_int_equal(t->dtype, QTR_DTYPE_I8);
  assert_int_equal(t->shape[1], 5);
  assert_memory_equal(t->data, data, 15);
  assert_int_equal((uintptr_t)t->data % 64, 0); /* data begins aligned */
  t = qtr_checkpoint_find(c, "half");
  assert_int_equal(t->n_dims, 3);
  assert_memory_equal(t->data, data + 15, 8);
  t = qtr_checkpoint_find(c, "scalar");
  assert_int_equal(t->n_dims, 0);
  assert_memory_equal(t->data, data + 23, 4);
  qtr_checkpoint_close(c);
  free(path);
  free(temporary);
  remove_dir(dir);
}

static void test_writer_failures(void **state) {
  (void)state;
  char *dir = make_dir(), *path = qtr_path_join(dir, "x.safetensors"), *temporary = qtr_path_join(dir, "x.safetensors.tmp");
  const struct qtr_st_entry entry = {.name = "a", .dtype = QTR_DTYPE_I8, .n_dims = 1, .shape = {4}};
  const struct qtr_st_entry huge = {.name = "a", .dtype = QTR_DTYPE_F32, .n_dims = 2, .shape = {SIZE_MAX, 2}};
  struct qtr_st_writer *w;
  struct qtr_error err;
  assert_int_equal(qtr_st_create(path, &entry, 1, NULL, &w, &err), QTR_OK);
  assert_int_equal(qtr_st_write(w, "abc", 3, &err), QTR_OK);
  assert_int_equal(qtr_st_finish(w, &err), QTR_ERR_STATE); /* a byte is missing */
  assert_false(qtr_file_exists(path) || qtr_file_exists(temporary));
  assert_int_equal(qtr_st_create(path, &entry, 1, NULL, &w, &err), QTR_OK);
  qtr_st_abort(w);
  qtr_st_abort(NULL);
  assert_false(qtr_file_exists(path) || qtr_file_exists(temporary));
  assert_int_equal(qtr_st_create(path, &huge, 1, NULL, &w, &err), QTR_ERR_ARGUMENT);
  assert_int_equal(qtr_st_create("/nowhere/at/all/x", &entry, 1, NULL, &w, &err), QTR_ERR_IO);
  free(path);
  free(temporary);
  remove_dir(dir);
}

/* ---- directories --------------------------------------------------------------------------------- */

/* One file with int8 tensors of one element each, named by the letters of `names`. */
static void put_file(const char *dir, const char *file, const char *names) {
  struct qtr_st_entry entry[8] = {0};
  char *path = qtr_path_join(dir, file);
  size_t n = strlen(names);
  for (size_t i = 0; i < n; i++) {
    entry[i] = (struct qtr_st_entry){.name = {names[i]}, .dtype = QTR_DTYPE_I8, .n_dims = 1, .shape = {1}};
  }
  struct qtr_st_writer *w;
  assert_int_equal(qtr_st_create(path, entry, n, NULL, &w, NULL), QTR_OK);
  for (size_t i = 0; i < n; i++) assert_int_equal(qtr_st_write(w, names + i, 1, NULL), QTR_OK);
  assert_int_equal(qtr_st_finish(w, NULL), QTR_OK);
  free(path);
}

static void put_text(const char *dir, const char *file, const char *text) {
  char *path = qtr_path_join(dir, file);
  assert_int_equal(qtr_file_write(path, text, strlen(text), NULL), QTR_OK);
  free(path);
}

/* Opens a directory; its tensors must be exactly the letters of `names`. */
static void expect(const char *dir, const char *names) {
  struct qtr_checkpoint *c;
  struct qtr_error err = {0};
  if (qtr_checkpoint_open(dir, &c, &err)) fail_msg("%s", err.message);
  assert_int_equal(qtr_checkpoint_count(c), strlen(names));
  for (size_t i = 0; names[i]; i++) {
    const struct qtr_tensor *t = qtr_checkpoint_find(c, (char[]){names[i], 0});
    assert_non_null(t);
    assert_int_equal(*(const char *)t->data, names[i]);
  }
  qtr_checkpoint_close(c);
}

static void expect_failure(const char *dir, enum qtr_status status, const char *word) {
  struct qtr_checkpoint *c;
  struct qtr_error err = {0};
  enum qtr_status got = qtr_checkpoint_open(dir, &c, &err);
  if (got != status) fail_msg("%s instead of %s: %s", qtr_status_name(got), qtr_status_name(status), err.message);
  if (!strstr(err.message, word)) fail_msg("\"%s\" does not say %s", err.message, word);
}

static void test_directories(void **state) {
  (void)state;
  char *dir = make_dir();
  expect_failure("/nowhere/at/all", QTR_ERR_NOT_FOUND, "/nowhere/at/all");
  expect_failure(dir, QTR_ERR_NOT_FOUND, "no *.safetensors");
  put_text(dir, "training_args.bin", "not weights");
  put_text(dir, "config.json", "{}");
  expect_failure(dir, QTR_ERR_NOT_FOUND, "no *.safetensors");
  put_text(dir, "pytorch_model.bin", "broken");
  expect_failure(dir, QTR_ERR_FORMAT, "pytorch_model.bin");
  /* safetensors win over bin; several files are one checkpoint; the makers' own copy is left aside */
  put_file(dir, "part-1.safetensors", "ab");
  put_file(dir, "part-2.safetensors", "c");
  put_file(dir, "consolidated.safetensors", "xyz");
  expect(dir, "abc");
  /* an index says which files, and what is in them */
  put_text(dir, "model.safetensors.index.json",
           "{\"weight_map\": {\"a\": \"part-1.safetensors\", \"b\": \"part-1.safetensors\"}}");
  expect(dir, "ab");
  put_text(dir, "model.safetensors.index.json",
           "{\"weight_map\": {\"a\": \"part-1.safetensors\", \"q\": \"part-2.safetensors\"}}");
  expect_failure(dir, QTR_ERR_FORMAT, "tensor q");
  put_text(dir, "model.safetensors.index.json", "{\"weight_map\": {\"a\": \"part-9.safetensors\"}}");
  expect_failure(dir, QTR_ERR_NOT_FOUND, "part-9.safetensors");
  put_text(dir, "model.safetensors.index.json", "{\"weight_map\": {\"a\": \"../part-1.safetensors\"}}");
  expect_failure(dir, QTR_ERR_FORMAT, "plain file names");
  put_text(dir, "model.safetensors.index.json", "{\"weight_map\": {\"a\": \"\"}}");
  expect_failure(dir, QTR_ERR_FORMAT, "plain file names");
  put_text(dir, "model.safetensors.index.json", "{\"weight_map\": 3}");
  expect_failure(dir, QTR_ERR_FORMAT, "weight_map");
  put_text(dir, "model.safetensors.index.json", "{");
  expect_failure(dir, QTR_ERR_FORMAT, "weight_map");
  /* model.safetensors alone is the checkpoint */
  put_file(dir, "model.safetensors", "m");
  expect(dir, "m");
  remove_dir(dir);

  /* one tensor in two files */
  dir = make_dir();
  put_file(dir, "one.safetensors", "ab");
  put_file(dir, "two.safetensors", "bc");
  expect_failure(dir, QTR_ERR_FORMAT, "one.safetensors and two.safetensors");
  remove_dir(dir);
}

/* ---- format inference ---------------------------------------------------------------------------- */

/* A checkpoint of projections with the given tensors beside each other, one byte or half each. */
static enum qtr_status infer(const char *const *names, const char *const *dtypes, size_t n, enum qtr_linear_format *format,
                             struct qtr_error *err) {
  char header[4096];
  size_t len = 1, at = 0, n_file;
  header[0] = '{';
  for (size_t i = 0; i < n; i++) {
    size_t size = strcmp(dtypes[i], "I8") == 0 || strcmp(dtypes[i], "U8") == 0     ? 1
                  : strcmp(dtypes[i], "I32") == 0 || strcmp(dtypes[i], "F32") == 0 ? 4
                                                                                   : 2;
    int k = snprintf(header + len, sizeof header - len,
                     "%s\"model.layers.%s\":{\"dtype\":\"%s\",\"shape\":[1],\"data_offsets\":[%zu,%zu]}", i ? "," : "",
                     names[i], dtypes[i], at, at + size);
    assert_true(k > 0);
    len += (size_t)k;
    at += size;
  }
  header[len++] = '}';
  header[len] = 0;
  uint8_t *file = make_file(header, at, &n_file);
  struct qtr_checkpoint *c;
  assert_int_equal(qtr_checkpoint_open_memory(file, n_file, &c, err), QTR_OK);
  enum qtr_status status = qtr_checkpoint_format(c, format, err);
  qtr_checkpoint_close(c);
  free(file);
  return status;
}

#define INFER(expected_status, ...)                                               \
  do {                                                                            \
    const char *const all[] = {__VA_ARGS__}, *names[8], *types[8];                \
    size_t n_all = sizeof all / sizeof *all / 2;                                  \
    for (size_t i_ = 0; i_ < n_all; i_++) {                                       \
      names[i_] = all[2 * i_];                                                    \
      types[i_] = all[2 * i_ + 1];                                                \
    }                                                                             \
    assert_int_equal(infer(names, types, n_all, &format, &err), expected_status); \
  } while (0)

static void test_formats(void **state) {
  (void)state;
  enum qtr_linear_format format;
  struct qtr_error err = {0};
  INFER(QTR_OK, "0.mlp.up_proj.weight", "BF16", "0.input_layernorm.weight", "F32");
  assert_int_equal(format, QTR_LINEAR_BF16);
  INFER(QTR_OK, "0.mlp.up_proj.weight", "F32");
  assert_int_equal(format, QTR_LINEAR_F32);
  INFER(QTR_OK, "0.mlp.up_proj.weight", "I8", "0.mlp.up_proj.dequant_scale", "F32");
  assert_int_equal(format, QTR_LINEAR_W8A8);
  INFER(QTR_OK, "0.mlp.up_proj.qweight", "I8", "0.mlp.up_proj.s1_scales", "F16", "0.mlp.up_proj.s1_szeros", "F16");
  assert_int_equal(format, QTR_LINEAR_W4A8);
  INFER(QTR_OK, "0.mlp.up_proj.qweight", "U8", "0.mlp.up_proj.s1_scales", "F16", "0.mlp.up_proj.s2_scales", "I8",
        "0.mlp.up_proj.s2_zeros", "I8");
  assert_int_equal(format, QTR_LINEAR_W4A8_G128);
  INFER(QTR_ERR_FORMAT, "0.mlp.up_proj.weight", "BF16", "1.mlp.up_proj.weight", "F16");
  assert_non_null(strstr(err.message, "disagree"));
  INFER(QTR_ERR_FORMAT, "0.mlp.up_proj.weight", "I8");
  assert_non_null(strstr(err.message, "dequant_scale"));
  INFER(QTR_ERR_FORMAT, "0.mlp.up_proj.qweight", "I8", "0.mlp.up_proj.s1_scales", "F16");
  assert_non_null(strstr(err.message, "s1_szeros"));
  INFER(QTR_ERR_UNSUPPORTED, "0.mlp.up_proj.qweight", "I32", "0.mlp.up_proj.qzeros", "I32");
  assert_non_null(strstr(err.message, "GPTQ"));
  INFER(QTR_ERR_UNSUPPORTED, "0.mlp.up_proj.weight", "I16");
  INFER(QTR_ERR_FORMAT, "0.input_layernorm.weight", "F32");
  assert_non_null(strstr(err.message, "no projections"));
}

/* ---- DeepCompressor's order of second-level scales (A.4.3) ------------------------------------------- */

/* A file whose scale of channel r and group g is (r + 100 g) mod 251, stored in QServe's or DeepCompressor's order under the
 * name that goes with it: what comes out is in QServe's order. */
static void check_s2_order(const char *file, bool foreign) {
  enum { OUT = 96, GROUPS = 2 };
  uint8_t stored[GROUPS][OUT];
  for (size_t g = 0; g < GROUPS; g++) {
    for (size_t i = 0; i < OUT; i++) {
      size_t own = i / 32 * 32 + i % 4 * 8 + i / 4 % 8;    /* A.4.2: 0, 8, 16, 24, 1, … */
      size_t theirs = i / 16 * 16 + i % 2 * 8 + i / 2 % 8; /* A.4.3: 0, 8, 1, 9, … 7, 15, 16, 24, … */
      stored[g][i] = (uint8_t)(((foreign ? theirs : own) + 100 * g) % 251);
    }
  }
  const struct qtr_st_entry entries[] = {
      {.name = "model.layers.0.mlp.up_proj.s2_scales", .dtype = QTR_DTYPE_I8, .n_dims = 2, .shape = {GROUPS, OUT}},
      {.name = "model.layers.0.mlp.up_proj.s2_zeros", .dtype = QTR_DTYPE_U8, .n_dims = 2, .shape = {GROUPS, OUT}},
  };
  char *dir = make_dir(), *path = qtr_path_join(dir, file);
  struct qtr_st_writer *w;
  struct qtr_checkpoint *c;
  assert_int_equal(qtr_st_create(path, entries, 2, NULL, &w, NULL), QTR_OK);
  assert_int_equal(qtr_st_write(w, stored, sizeof stored, NULL), QTR_OK);
  assert_int_equal(qtr_st_write(w, stored, sizeof stored, NULL), QTR_OK);
  assert_int_equal(qtr_st_finish(w, NULL), QTR_OK);
  assert_int_equal(qtr_checkpoint_open(dir, &c, NULL), QTR_OK);
  for (size_t i = 0; i < 2; i++) {
    const uint8_t *s2 = qtr_checkpoint_find(c, entries[i].name)->data;
    for (size_t r = 0; r < OUT; r++) {
      for (size_t g = 0; g < GROUPS; g++) assert_int_equal(s2[g * OUT + qtr_s2_position(r)], (r + 100 * g) % 251);
    }
  }
  qtr_checkpoint_close(c);
  free(path);
  remove_dir(dir);
}

static void test_s2_orders(void **state) {
  (void)state;
  check_s2_order("model.safetensors", false);
  check_s2_order("quant_model.pt", true); /* the content says what kind of file it is */
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_reads),       cmocka_unit_test(test_hostile_headers),   cmocka_unit_test(test_hostile_lengths),
      cmocka_unit_test(test_damage),      cmocka_unit_test(test_writer_round_trip), cmocka_unit_test(test_writer_failures),
      cmocka_unit_test(test_directories), cmocka_unit_test(test_formats),           cmocka_unit_test(test_s2_orders),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
