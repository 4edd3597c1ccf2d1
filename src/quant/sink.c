/* sink.c - rounds, packs, permutes and stores the tensors of a checkpoint (sink.h; spec A.2 – A.4). */
#include "quant/sink.h"

#include "base/checked.h"
#include "base/file.h"
#include "base/half.h"
#include "base/status.h"
#include "checkpoint/packing.h"
#include "checkpoint/safetensors_write.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BLOCK_ROWS 32                  /* what one thread rounds at a time: the height of a packed tile */
#define CHUNK_VALUES ((size_t)8 << 20) /* of a matrix at a time */
#define MAX_NAME 160                   /* of struct qtr_st_entry */

struct item {
  enum qtr_store store;
  char name[MAX_NAME - 24], suffix[24];
  size_t n_out, n_in, n_bytes; /* n_bytes: RAW */
};

struct qtr_sink {
  struct qtr_threads *team;
  struct item *item; /* (n_items) in the order of the file */
  size_t n_items, item_capacity;
  struct qtr_st_entry *entry; /* (n_entries) same order */
  size_t n_entries, entry_capacity;
  size_t output_bytes;
  struct qtr_sink_target target;
  struct qtr_st_writer *writer;
  bool made_dir;
  size_t at, row; /* item whose turn it is; rows of it that are done, RAW: bytes */
  /* of the item at `at`, allocated when its first row comes */
  size_t chunk_rows;
  uint8_t *code;               /* (chunk_rows, n_in) codes; F16, BF16: values */
  uint8_t *pack;               /* (chunk_rows, n_in / 2) W4 */
  void *scale;                 /* (n_out) fp16; W8: fp32 */
  uint16_t *szero;             /* (n_out) W4 */
  uint8_t *s2, *z2;            /* (chunk_rows, n_in / 128) natural order */
  uint8_t *s2_disk, *z2_disk;  /* (n_in / 128, n_out) permuted */
  struct qtr_rtn_error *error; /* (blocks of a chunk) */
  enum qtr_rtn_status *status; /* same */
};

static bool is_half(enum qtr_store store) { return store == QTR_STORE_F16 || store == QTR_STORE_BF16; }
static bool is_w4(enum qtr_store store) { return store == QTR_STORE_W4 || store == QTR_STORE_W4_G128; }

/* ---- what the file will hold ----------------------------------------------------------------------- */

enum qtr_status qtr_sink_create(struct qtr_threads *team, struct qtr_sink **sink, struct qtr_error *err) {
  *sink = calloc(1, sizeof **sink);
  if (!*sink) return qtr_fail_memory(err, "a checkpoint writer", sizeof **sink);
  (*sink)->team = team;
  return QTR_OK;
}

static enum qtr_status add_entry(struct qtr_sink *k, const struct item *item, const char *suffix, enum qtr_dtype dtype,
                                 size_t n_dims, size_t d0, size_t d1, struct qtr_error *err) {
  if (k->n_entries == k->entry_capacity) {
    size_t capacity = k->entry_capacity ? 2 * k->entry_capacity : 256;
    struct qtr_st_entry *more = realloc(k->entry, capacity * sizeof *more);
    if (!more) return qtr_fail_memory(err, "the plan", capacity * sizeof *more);
    k->entry = more;
    k->entry_capacity = capacity;
  }
  struct qtr_st_entry *e = &k->entry[k->n_entries++];
  *e = (struct qtr_st_entry){.dtype = dtype, .n_dims = n_dims, .shape = {d0, d1}};
  (void)snprintf(e->name, sizeof e->name, "%s%s", item->name, suffix);
  k->output_bytes += d0 * (n_dims > 1 ? d1 : 1) * qtr_dtype_bytes(dtype); /* fits: qtr_sink_add looked */
  return QTR_OK;
}

/* Rows and columns a format can hold (spec A.3, A.4). */
static enum qtr_status check_multiples(const struct item *j, struct qtr_error *err) {
  size_t columns = j->store == QTR_STORE_W4 ? 32 : QTR_GROUP;
  if (!is_w4(j->store) || (j->n_out % 32 == 0 && j->n_in % columns == 0)) return QTR_OK;
  bool smaller = j->store == QTR_STORE_W4_G128 && j->n_out % 32 == 0 && j->n_in % 32 == 0;
  return qtr_fail(err, QTR_ERR_UNSUPPORTED,
                  "%s has %zu rows and %zu columns; %s needs multiples of 32 rows and %zu columns. Choose %s", j->name,
                  j->n_out, j->n_in, j->store == QTR_STORE_W4 ? "w4a8 per channel" : "w4a8 in groups of 128", columns,
                  smaller ? "group size -1, or w8a8" : "w8a8");
}

enum qtr_status qtr_sink_add(struct qtr_sink *k, const struct qtr_sink_item *item, struct qtr_error *err) {
  if (k->n_items == k->item_capacity) {
    size_t capacity = k->item_capacity ? 2 * k->item_capacity : 256;
    struct item *more = realloc(k->item, capacity * sizeof *more);
    if (!more) return qtr_fail_memory(err, "the plan", capacity * sizeof *more);
    k->item = more;
    k->item_capacity = capacity;
  }
  struct item *j = &k->item[k->n_items++];
  size_t out = item->n_out, in = item->n_in, n, n_bytes;
  *j = (struct item){.store = item->store, .n_out = out, .n_in = in};
  if (strlen(item->name) >= sizeof j->name || strlen(item->suffix) >= sizeof j->suffix || item->n_dims - 1 > 1) {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "tensor %.100s: its name is too long, or its rank is neither 1 nor 2",
                    item->name);
  }
  (void)snprintf(j->name, sizeof j->name, "%s", item->name);
  (void)snprintf(j->suffix, sizeof j->suffix, "%s", item->suffix);
  if (qtr_mul_overflow(out, in, &n) || qtr_mul_overflow(n, 8, &n_bytes)) {
    return qtr_fail(err, QTR_ERR_LIMIT, "tensor %s is too large", j->name);
  }
  j->n_bytes = n * qtr_dtype_bytes(item->dtype);
  enum qtr_status status = check_multiples(j, err);
  if (status) return status;
  switch (j->store) {
    case QTR_STORE_F16: return add_entry(k, j, j->suffix, QTR_DTYPE_F16, item->n_dims, item->n_dims > 1 ? out : in, in, err);
    case QTR_STORE_BF16:
      return add_entry(k, j, j->suffix, QTR_DTYPE_BF16, item->n_dims, item->n_dims > 1 ? out : in, in, err);
    case QTR_STORE_RAW: return add_entry(k, j, j->suffix, item->dtype, item->n_dims, item->n_dims > 1 ? out : in, in, err);
    case QTR_STORE_W8:
      if ((status = add_entry(k, j, ".weight", QTR_DTYPE_I8, 2, out, in, err))) return status;
      return add_entry(k, j, ".dequant_scale", QTR_DTYPE_F32, 1, out, 0, err);
    case QTR_STORE_W4:
      if ((status = add_entry(k, j, ".qweight", QTR_DTYPE_I8, 2, out, in / 2, err)) ||
          (status = add_entry(k, j, ".s1_scales", QTR_DTYPE_F16, 1, out, 0, err))) {
        return status;
      }
      return add_entry(k, j, ".s1_szeros", QTR_DTYPE_F16, 1, out, 0, err);
    case QTR_STORE_W4_G128:
      if ((status = add_entry(k, j, ".qweight", QTR_DTYPE_I8, 2, out, in / 2, err)) ||
          (status = add_entry(k, j, ".s1_scales", QTR_DTYPE_F16, 1, out, 0, err)) ||
          (status = add_entry(k, j, ".s2_scales", QTR_DTYPE_I8, 2, in / QTR_GROUP, out, err))) {
        return status;
      }
      return add_entry(k, j, ".s2_zeros", QTR_DTYPE_I8, 2, in / QTR_GROUP, out, err);
  }
  return qtr_fail(err, QTR_ERR_ARGUMENT, "tensor %s: unknown storage", j->name);
}

enum qtr_status qtr_sink_open(struct qtr_sink *k, const struct qtr_sink_target *target, struct qtr_error *err) {
  k->target = *target;
  enum qtr_status status =
      qtr_quant_prepare_directory(target->source_dir, target->output_dir, target->overwrite, &k->made_dir, err);
  if (status) return status;
  char *path = qtr_path_join(target->output_dir, "model.safetensors");
  if (!path) return qtr_fail_memory(err, "a path", strlen(target->output_dir));
  const char *const metadata[] = {"format", "pt", "precision", target->description.precision, "producer", "quattuor", NULL};
  status = qtr_st_create(path, k->entry, k->n_entries, metadata, &k->writer, err);
  free(path);
  return status;
}

/* ---- one matrix ------------------------------------------------------------------------------------ */

static void free_buffers(struct qtr_sink *k) {
  void *const all[] = {k->code, k->pack, k->scale, k->szero, k->s2, k->z2, k->s2_disk, k->z2_disk, k->error, k->status};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
  k->code = k->pack = k->s2 = k->z2 = k->s2_disk = k->z2_disk = NULL;
  k->scale = NULL;
  k->szero = NULL;
  k->error = NULL;
  k->status = NULL;
}

static enum qtr_status make_buffers(struct qtr_sink *k, const struct item *j, struct qtr_error *err) {
  size_t rows = CHUNK_VALUES / QTR_MAX(j->n_in, 1) / BLOCK_ROWS * BLOCK_ROWS;
  k->chunk_rows = rows = QTR_MIN(QTR_MAX(rows, BLOCK_ROWS), QTR_MAX(j->n_out, 1));
  size_t n = rows * j->n_in, blocks = qtr_ceil_div(rows, BLOCK_ROWS), groups = j->n_in / QTR_GROUP;
  bool ok = (k->code = malloc(n * (is_half(j->store) ? 2 : 1) + 1)) && (k->error = calloc(blocks, sizeof *k->error)) &&
            (k->status = calloc(blocks, sizeof *k->status)) && (k->scale = malloc(j->n_out * sizeof(float) + 1));
  if (is_w4(j->store)) ok = ok && (k->pack = malloc(n / 2 + 1)) && (k->szero = malloc(j->n_out * sizeof *k->szero + 1));
  if (j->store == QTR_STORE_W4_G128) {
    ok = ok && (k->s2 = malloc(rows * groups + 1)) && (k->z2 = malloc(rows * groups + 1)) &&
         (k->s2_disk = malloc(groups * j->n_out + 1)) && (k->z2_disk = malloc(groups * j->n_out + 1));
  }
  if (ok) return QTR_OK;
  free_buffers(k);
  return qtr_fail_memory(err, j->name, n);
}

/* Is it the turn of `name`, and is there room for n_rows more (RAW: bytes)? */
static enum qtr_status begin(struct qtr_sink *k, const char *name, size_t n_rows, bool raw, const struct item **item,
                             struct qtr_error *err) {
  const struct item *j = *item = k->at < k->n_items ? &k->item[k->at] : NULL;
  if (!k->writer || !j || strcmp(name, j->name) != 0 || raw != (j->store == QTR_STORE_RAW)) {
    return qtr_fail(err, QTR_ERR_STATE, "the checkpoint writer was given %.100s, and %s was to come", name,
                    !k->writer ? "a directory"
                    : j        ? j->name
                               : "nothing");
  }
  size_t all = raw ? j->n_bytes : j->n_out;
  if (n_rows > all - k->row || (!raw && n_rows % BLOCK_ROWS != 0 && k->row + n_rows != all)) {
    return qtr_fail(err, QTR_ERR_STATE, "%s: %zu rows at row %zu of %zu are too many, or no multiple of 32", name, n_rows,
                    k->row, all);
  }
  return raw || k->code ? QTR_OK : make_buffers(k, j, err);
}

/* Writes the arrays that follow the codes of a matrix, when all of its rows are there, and goes on to the next. */
static enum qtr_status end(struct qtr_sink *k, struct qtr_error *err) {
  const struct item *j = &k->item[k->at];
  if (k->row < (j->store == QTR_STORE_RAW ? j->n_bytes : j->n_out)) return QTR_OK;
  size_t n = j->n_out, groups = j->n_in / QTR_GROUP;
  enum qtr_status status = QTR_OK;
  if (j->store == QTR_STORE_W8) status = qtr_st_write(k->writer, k->scale, n * sizeof(float), err);
  if (is_w4(j->store)) status = qtr_st_write(k->writer, k->scale, n * sizeof(uint16_t), err);
  if (!status && j->store == QTR_STORE_W4) status = qtr_st_write(k->writer, k->szero, n * sizeof(uint16_t), err);
  if (!status && j->store == QTR_STORE_W4_G128) {
    status = qtr_st_write(k->writer, k->s2_disk, groups * n, err);
    if (!status) status = qtr_st_write(k->writer, k->z2_disk, groups * n, err);
  }
  free_buffers(k);
  k->at++;
  k->row = 0;
  return status;
}

/* Second-level scales of one block of rows to their places in the file (A.4.2). row: first row of the block in the matrix.
 */
static void place_s2(const struct qtr_sink *k, const struct item *j, size_t row, size_t n_rows, const uint8_t *s2,
                     const uint8_t *z2) {
  size_t groups = j->n_in / QTR_GROUP;
  for (size_t r = 0; r < n_rows; r++) {
    for (size_t g = 0; g < groups; g++) {
      size_t at = g * j->n_out + qtr_s2_position(row + r);
      k->s2_disk[at] = s2[r * groups + g];
      k->z2_disk[at] = (uint8_t)(0u - z2[r * groups + g]);
    }
  }
}

/* The blocks of one chunk as a parallel loop. Blocks touch different memory, so threads share nothing. */
struct chunk {
  const struct qtr_sink *sink;
  const struct item *item;
  const float *w;                     /* (n_rows, n_in), or NULL */
  const struct qtr_sink_codes *codes; /* of the chunk */
  size_t row, n_rows;                 /* row: of the matrix */
};

static void round_block(const struct chunk *c, size_t b) {
  const struct qtr_sink *k = c->sink;
  const struct item *j = c->item;
  size_t first = b * BLOCK_ROWS, n = QTR_MIN(c->n_rows - first, (size_t)BLOCK_ROWS), in = j->n_in, groups = in / QTR_GROUP;
  const float *w = c->w + first * in;
  uint8_t *code = k->code + first * in;
  uint16_t *half = (uint16_t *)k->scale + c->row + first;
  k->error[b] = (struct qtr_rtn_error){0};
  switch (j->store) {
    case QTR_STORE_W4: k->status[b] = qtr_rtn_w4(w, n, in, code, half, k->szero + c->row + first, &k->error[b]); break;
    case QTR_STORE_W4_G128:
      k->status[b] = qtr_rtn_w4_g128(w, n, in, code, half, k->s2 + first * groups, k->z2 + first * groups, &k->error[b]);
      break;
    case QTR_STORE_W8:
      k->status[b] = qtr_rtn_w8(w, n, in, (int8_t *)code, (float *)k->scale + c->row + first, &k->error[b]);
      break;
    case QTR_STORE_BF16:
      k->status[b] = qtr_rtn_bf16(w, n * in, (uint16_t *)(void *)k->code + first * in, &k->error[b]);
      break;
    default: k->status[b] = qtr_rtn_f16(w, n * in, (uint16_t *)(void *)k->code + first * in, &k->error[b]); break;
  }
  if (k->status[b] || !k->pack) return;
  qtr_w4_pack(code, n, in, k->pack + first * in / 2);
  if (k->s2) place_s2(k, j, c->row + first, n, k->s2 + first * groups, k->z2 + first * groups);
}

static void round_blocks(void *arg, size_t from, size_t to, int thread) {
  (void)thread;
  for (size_t b = from; b < to; b++) round_block(arg, b);
}

static void pack_blocks(void *arg, size_t from, size_t to, int thread) {
  (void)thread;
  const struct chunk *c = arg;
  size_t in = c->item->n_in, groups = in / QTR_GROUP;
  for (size_t b = from; b < to; b++) {
    size_t first = b * BLOCK_ROWS, n = QTR_MIN(c->n_rows - first, (size_t)BLOCK_ROWS);
    qtr_w4_pack(c->codes->code + first * in, n, in, c->sink->pack + first * in / 2);
    if (!c->codes->s2) continue;
    place_s2(c->sink, c->item, c->row + first, n, c->codes->s2 + first * groups, c->codes->z2 + first * groups);
  }
}

/* The tensor of the file whose values were wrong. */
static enum qtr_status explain(const struct item *j, enum qtr_rtn_status status, struct qtr_error *err) {
  const char *suffix = is_half(j->store) ? j->suffix : ".weight";
  if (status == QTR_RTN_NOT_FINITE) {
    return qtr_fail(err, QTR_ERR_FORMAT, "tensor %s%s holds a value that is not finite; the source is damaged", j->name,
                    suffix);
  }
  if (status == QTR_RTN_MEMORY) return qtr_fail_memory(err, j->name, j->n_in);
  return qtr_fail(err, QTR_ERR_UNSUPPORTED, "tensor %s%s holds values beyond the range of %s%s", j->name, suffix,
                  j->store == QTR_STORE_BF16 ? "bf16" : "fp16 (65504)",
                  is_half(j->store) ? "" : ", or scales that would be");
}

enum qtr_status qtr_sink_write_floats(struct qtr_sink *k, const char *name, const float *w, size_t n_rows,
                                      struct qtr_rtn_error *error, struct qtr_error *err) {
  const struct item *j;
  enum qtr_status status = begin(k, name, n_rows, false, &j, err);
  for (size_t done = 0; done < n_rows && !status;) {
    size_t n = QTR_MIN(k->chunk_rows, n_rows - done), blocks = qtr_ceil_div(n, BLOCK_ROWS), values = n * j->n_in;
    struct chunk chunk = {.sink = k, .item = j, .w = w + done * j->n_in, .row = k->row, .n_rows = n};
    qtr_threads_for(k->team, blocks, 1, round_blocks, &chunk);
    for (size_t b = 0; b < blocks && !status; b++) {
      if (k->status[b]) status = explain(j, k->status[b], err);
      if (!error) continue;
      error->squared += k->error[b].squared;
      error->norm += k->error[b].norm;
      error->max = fmax(error->max, k->error[b].max);
    }
    if (status) break;
    status = k->pack ? qtr_st_write(k->writer, k->pack, values / 2, err)
                     : qtr_st_write(k->writer, k->code, is_half(j->store) ? 2 * values : values, err);
    done += n;
    k->row += n;
  }
  return status ? status : end(k, err);
}

/* What qtr_sink_write_codes promises. A caller's mistake must not become a file that loads and computes nonsense. */
static enum qtr_status check_codes(const struct qtr_sink *k, const struct item *j, const struct qtr_sink_codes *c,
                                   size_t n_rows, struct qtr_error *err) {
  size_t in = j->n_in, groups = in / QTR_GROUP;
  bool g128 = j->store == QTR_STORE_W4_G128;
  if (!c->code || (j->store == QTR_STORE_W8) != !c->scale || (j->store == QTR_STORE_W8) != !!c->dequant ||
      (j->store == QTR_STORE_W4) != !!c->szero || g128 != !!c->s2 || g128 != !!c->z2 ||
      (j->store != QTR_STORE_W8 && !is_w4(j->store))) {
    return qtr_fail(err, QTR_ERR_STATE, "%s: the arrays given are not those of its format", j->name);
  }
  for (size_t r = 0; r < n_rows; r++) {
    float scale = c->scale ? qtr_f16_to_f32(c->scale[r]) : c->dequant[r];
    if (!isfinite(scale) || (c->szero && !isfinite(qtr_f16_to_f32(c->szero[r])))) {
      return qtr_fail(err, QTR_ERR_FORMAT, "%s: the scale or zero of row %zu is not finite", j->name, k->row + r);
    }
    for (size_t i = 0; i < in && is_w4(j->store); i++) {
      int code = c->code[r * in + i], high = g128 ? code * c->s2[r * groups + i / QTR_GROUP] : 0;
      int w8 = g128 ? high - c->z2[r * groups + i / QTR_GROUP] : 0;
      if (code <= 15 && high <= 255 && w8 >= -128 && w8 <= 127 && (!g128 || c->s2[r * groups + i / QTR_GROUP] <= 127))
        continue;
      return qtr_fail(err, QTR_ERR_FORMAT, "%s, row %zu, column %zu: code %d%s", j->name, k->row + r, i, code,
                      code > 15 ? " is beyond 15" : " with its second-level scale and zero leaves a byte");
    }
  }
  return QTR_OK;
}

enum qtr_status qtr_sink_write_codes(struct qtr_sink *k, const char *name, const struct qtr_sink_codes *codes, size_t n_rows,
                                     struct qtr_error *err) {
  const struct item *j;
  enum qtr_status status = begin(k, name, n_rows, false, &j, err);
  if (status || (status = check_codes(k, j, codes, n_rows, err))) return status;
  if (codes->dequant) {
    memcpy((float *)k->scale + k->row, codes->dequant, n_rows * sizeof(float));
  } else {
    memcpy((uint16_t *)k->scale + k->row, codes->scale, n_rows * sizeof(uint16_t));
  }
  if (codes->szero) memcpy(k->szero + k->row, codes->szero, n_rows * sizeof(uint16_t));
  for (size_t done = 0; done < n_rows && !status;) {
    size_t n = QTR_MIN(k->chunk_rows, n_rows - done), groups = j->n_in / QTR_GROUP;
    struct qtr_sink_codes part = {.code = codes->code + done * j->n_in};
    if (codes->s2) {
      part.s2 = codes->s2 + done * groups;
      part.z2 = codes->z2 + done * groups;
    }
    struct chunk chunk = {.sink = k, .item = j, .codes = &part, .row = k->row, .n_rows = n};
    if (k->pack) qtr_threads_for(k->team, qtr_ceil_div(n, BLOCK_ROWS), 1, pack_blocks, &chunk);
    status = k->pack ? qtr_st_write(k->writer, k->pack, n * j->n_in / 2, err)
                     : qtr_st_write(k->writer, part.code, n * j->n_in, err);
    done += n;
    k->row += n;
  }
  return status ? status : end(k, err);
}

enum qtr_status qtr_sink_write_raw(struct qtr_sink *k, const char *name, const void *data, size_t n_bytes,
                                   struct qtr_error *err) {
  const struct item *j;
  enum qtr_status status = begin(k, name, n_bytes, true, &j, err);
  if (status || (status = qtr_st_write(k->writer, data, n_bytes, err))) return status;
  k->row += n_bytes;
  return end(k, err);
}

enum qtr_status qtr_sink_finish(struct qtr_sink *k, struct qtr_error *err) {
  const struct qtr_sink_target *t = &k->target;
  enum qtr_status status;
  if (k->at < k->n_items) return qtr_fail(err, QTR_ERR_STATE, "the data of tensor %s never came", k->item[k->at].name);
  if ((status = qtr_quant_copy_files(t->source_dir, t->output_dir, err)) ||
      (status = qtr_quant_write_config(t->source_dir, t->output_dir, &t->description, err))) {
    return status;
  }
  struct qtr_st_writer *last = k->writer;
  k->writer = NULL;
  if ((status = qtr_st_finish(last, err))) return status;
  k->made_dir = false; /* it stays */
  return QTR_OK;
}

size_t qtr_sink_bytes(const struct qtr_sink *k) { return k->output_bytes; }
size_t qtr_sink_tensors(const struct qtr_sink *k) { return k->n_entries; }

void qtr_sink_free(struct qtr_sink *k) {
  if (!k) return;
  qtr_st_abort(k->writer);
  if (k->made_dir) (void)rmdir(k->target.output_dir); /* only when nothing is in it */
  free_buffers(k);
  free(k->item);
  free(k->entry);
  free(k);
}
