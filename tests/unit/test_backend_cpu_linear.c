/* The cpu backend's matrices, norms and quantisation against the reference backend, for every instruction set this machine
 * has; and the promises on top: the same bits in every set, for every batch size and thread count. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "backend/backend.h"
#include "base/checked.h"
#include "base/half.h"
#include "checkpoint/packing.h"

enum { MAX_TOKENS = 150, MAX_IN = 8192, MAX_X = MAX_TOKENS * MAX_IN, MAX_Y = 60000 };

static uint32_t seed = 1;
static uint32_t rnd(void) { return (seed = seed * 1664525u + 1013904223u) >> 8; }
static float uniform(void) { return (float)rnd() / (float)(1 << 23) - 1.0f; }

static const char *const isas[] = {"portable", "avx2", "avx512", "vnni", "amx"};
enum { N_ISAS = 5 };
static struct qtr_backend *reference, *cpu[N_ISAS], *three_threads;

static int setup(void **state) {
  (void)state;
  struct qtr_error err;
  if (qtr_backend_open("reference", NULL, &reference, &err) != QTR_OK) return -1;
  for (int i = 0; i < N_ISAS; i++) {
    enum qtr_status status =
        qtr_backend_open("cpu", &(struct qtr_backend_options){.threads = 1, .isa = isas[i]}, &cpu[i], &err);
    if (status == QTR_ERR_UNSUPPORTED) print_message("%s\n", err.message);
    if (status != QTR_OK && status != QTR_ERR_UNSUPPORTED) return -1;
  }
  return qtr_backend_open("cpu", &(struct qtr_backend_options){.threads = 3}, &three_threads, &err) == QTR_OK ? 0 : -1;
}

static int teardown(void **state) {
  (void)state;
  qtr_backend_close(reference);
  for (int i = 0; i < N_ISAS; i++) qtr_backend_close(cpu[i]);
  qtr_backend_close(three_threads);
  return 0;
}

/* ---- a random matrix ----------------------------------------------------------------------------- */

struct matrix {
  struct qtr_linear_source source;
  void *owned[32];
  int n_owned;
};

static void *keep(struct matrix *m, size_t n) {
  void *p = malloc(n);
  assert_non_null(p);
  return m->owned[m->n_owned++] = p;
}

static float *keep_floats(struct matrix *m, size_t n, float scale) {
  float *x = keep(m, n * sizeof *x);
  for (size_t i = 0; i < n; i++) x[i] = qtr_f16_round(scale * (0.5f + fabsf(uniform())));
  return x;
}

/* wrap: some second-level parameters leave the int8 range. */
static void fill_w4(struct matrix *m, struct qtr_linear_part *part, bool wrap) {
  size_t n_in = m->source.n_in, n_groups = n_in / QTR_GROUP, n = part->n_out * n_in;
  uint8_t *code = malloc(n), *packed = keep(m, n / 2 + 1); /* one byte further: files need not be aligned */
  for (size_t i = 0; i < n; i++) code[i] = rnd() & 15;
  part->scale = keep_floats(m, part->n_out, 0.01f);
  if (m->source.format == QTR_LINEAR_W4A8) part->szero = keep_floats(m, part->n_out, 0.08f);
  if (m->source.format == QTR_LINEAR_W4A8_G128) {
    uint8_t *s2 = keep(m, n_groups * part->n_out), *zero = keep(m, n_groups * part->n_out);
    for (size_t g = 0; g < n_groups; g++) {
      for (size_t row = 0; row < part->n_out; row++) {
        unsigned s = 1 + rnd() % 17,
                 z = rnd() % 8 + 4; /* (0 - z) s >= -128 needs z s <= 128: lift the codes where it fails */
        unsigned low = z * s > 128 ? z - 128 / s : 0, high = QTR_MIN(127 / s + z, 15u);
        for (size_t k = g * QTR_GROUP; k < (g + 1) * QTR_GROUP; k++) {
          uint8_t *q = &code[row * n_in + k];
          *q = (uint8_t)(*q < low ? low : *q > high ? high : *q);
        }
        if (wrap && rnd() % 64 == 0) s = rnd() & 255;
        s2[g * part->n_out + qtr_s2_position(row)] = (uint8_t)s;
        zero[g * part->n_out + qtr_s2_position(row)] = (uint8_t)(256 - z * (wrap ? s & 31 : s));
      }
    }
    part->s2_scale = s2;
    part->s2_zero = zero;
  }
  uint8_t *aligned = malloc(n / 2);
  qtr_w4_pack(code, part->n_out, n_in, aligned);
  part->weight = memcpy(packed + 1, aligned, n / 2);
  free(aligned);
  free(code);
}

static void matrix_make(struct matrix *m, enum qtr_linear_format format, size_t n_in, const size_t *rows, size_t n_parts,
                        bool gate_up, bool bias, bool wrap) {
  *m = (struct matrix){.source = {.format = format, .n_in = n_in, .n_parts = n_parts, .gate_up = gate_up}};
  for (size_t p = 0; p < n_parts; p++) {
    struct qtr_linear_part *part = &m->source.part[p];
    part->n_out = rows[p];
    size_t n = rows[p] * n_in;
    if (format >= QTR_LINEAR_W4A8) {
      fill_w4(m, part, wrap);
    } else if (format == QTR_LINEAR_W8A8) {
      uint8_t *w = keep(m, n);
      for (size_t i = 0; i < n; i++) w[i] = (uint8_t)rnd();
      part->weight = w;
      part->scale = keep_floats(m, rows[p], 0.001f);
    } else if (format == QTR_LINEAR_F32) {
      float *w = keep(m, n * 4);
      for (size_t i = 0; i < n; i++) w[i] = uniform() / 8;
      part->weight = w;
    } else {
      uint16_t *w = keep(m, n * 2);
      for (size_t i = 0; i < n; i++) {
        w[i] = format == QTR_LINEAR_F16 ? qtr_f16_from_f32(uniform() / 8) : qtr_bf16_from_f32(uniform() / 8);
      }
      part->weight = w;
    }
    if (bias && p != 1) part->bias = keep_floats(m, rows[p], 0.5f);
  }
}

static void matrix_free(struct matrix *m) {
  while (m->n_owned) free(m->owned[--m->n_owned]);
}

/* ---- running one --------------------------------------------------------------------------------- */

/* out (n_tokens, width) of x (n_tokens, n_in); old contents of out count for ADD. */
static void run(struct qtr_backend *b, const struct qtr_linear_source *s, enum qtr_epilogue epilogue, const float *x,
                size_t n_tokens, float *out, size_t width) {
  struct qtr_error err = {0};
  struct qtr_linear *linear;
  struct qtr_input *input;
  void *dx, *dout;
  assert_int_equal(b->ops->linear_create(b, s, &linear, &err), QTR_OK);
  assert_int_equal(b->ops->input_create(b, n_tokens, s->n_in, &input, &err), QTR_OK);
  assert_int_equal(b->ops->upload_floats(b, x, n_tokens * s->n_in, &dx, &err), QTR_OK);
  assert_int_equal(b->ops->upload_floats(b, out, n_tokens * width, &dout, &err), QTR_OK);
  enum qtr_quant quant = qtr_linear_quant(s->format);
  b->ops->quant(b, &(struct qtr_quant_args){dx, input, quant, n_tokens, s->n_in});
  b->ops->linear(b, &(struct qtr_linear_args){linear, input, epilogue, dout, n_tokens});
  assert_int_equal(b->ops->download(b, dout, QTR_DTYPE_F32, n_tokens * width, out, &err), QTR_OK);
  b->ops->free(b, dx);
  b->ops->free(b, dout);
  b->ops->input_free(b, input);
  b->ops->linear_free(b, linear);
}

static float x[MAX_X], start[MAX_Y], expected[MAX_Y], found[MAX_Y], first[MAX_Y];

static void check(const char *what, const struct qtr_linear_source *s, enum qtr_epilogue epilogue, size_t n_tokens) {
  size_t width = 0;
  for (size_t p = 0; p < s->n_parts; p++) width += s->part[p].n_out;
  if (epilogue == QTR_EPILOGUE_SILU_MUL) width /= 2;
  size_t n = n_tokens * width;
  assert_true(n <= MAX_Y && n_tokens * s->n_in <= MAX_X);
  for (size_t i = 0; i < n_tokens * s->n_in; i++) x[i] = uniform() * (1 + 30 * (float)(rnd() % 64 == 0));
  for (size_t i = 0; i < n; i++) start[i] = uniform();
  memcpy(expected, start, n * sizeof *start);
  run(reference, s, epilogue, x, n_tokens, expected, width);
  /* Exact integers, so only Σx (W4A8), the sums of float formats and exp differ, all by a few roundings. */
  bool exact = (s->format == QTR_LINEAR_W8A8 || s->format == QTR_LINEAR_W4A8_G128) && epilogue != QTR_EPILOGUE_SILU_MUL;
  bool have_first = false;
  for (int i = 0; i <= N_ISAS; i++) {
    struct qtr_backend *b = i < N_ISAS ? cpu[i] : three_threads;
    if (!b) continue;
    memcpy(found, start, n * sizeof *start);
    run(b, s, epilogue, x, n_tokens, found, width);
    for (size_t j = 0; j < n; j++) {
      float relative = s->format < QTR_LINEAR_W8A8 ? 1e-4f : 2e-5f;
      if (s->format == QTR_LINEAR_W4A8) relative += 2e-8f * (float)s->n_in; /* zero * Σx and scale * acc cancel */
      float tolerance = exact ? 0.0f : relative * (1 + fabsf(expected[j]));
      if (!(fabsf(found[j] - expected[j]) <= tolerance)) {
        fail_msg("%s, %s, epilogue %d, %zu tokens, isa %s: token %zu row %zu is %.9g, the reference has %.9g", what,
                 qtr_linear_format_name(s->format), (int)epilogue, n_tokens, i < N_ISAS ? isas[i] : "best, 3 threads",
                 j / width, j % width, (double)found[j], (double)expected[j]);
      }
    }
    /* The same bits in every set; portable float sums are not fused. */
    if (s->format < QTR_LINEAR_W8A8 && i == 0) continue;
    if (!have_first) memcpy(first, found, n * sizeof *found);
    have_first = true;
    assert_memory_equal(first, found, n * sizeof *found);
  }
}

static void test_formats(void **state) {
  (void)state;
  static const size_t tokens[] = {1, 2, 3, 7, 8, 16, 17, 33, 64, 100};
  for (int format = 0; format < QTR_N_LINEAR_FORMATS; format++) {
    for (size_t t = 0; t < sizeof tokens / sizeof tokens[0]; t++) {
      for (int bias = 0; bias < 2; bias++) {
        struct matrix m;
        size_t n_in = format == QTR_LINEAR_W4A8_G128 ? 128 * (1 + rnd() % 4) : 32 * (1 + rnd() % 20);
        size_t rows[3] = {32 * (1 + rnd() % 3), 32 * (1 + rnd() % 3), 32};
        matrix_make(&m, (enum qtr_linear_format)format, n_in, rows, 3, false, bias, false);
        check("three parts", &m.source, QTR_EPILOGUE_STORE, tokens[t]);
        check("three parts", &m.source, QTR_EPILOGUE_ADD, tokens[t]);
        matrix_free(&m);
        rows[1] = rows[0];
        matrix_make(&m, (enum qtr_linear_format)format, n_in, rows, 2, true, bias, false);
        check("gate and up", &m.source, QTR_EPILOGUE_SILU_MUL, tokens[t]);
        matrix_free(&m);
      }
    }
  }
}

/* Sizes that are no multiple of anything, where the format allows them. */
static void test_odd_shapes(void **state) {
  (void)state;
  for (int format = 0; format <= QTR_LINEAR_W8A8; format++) {
    for (int i = 0; i < 20; i++) {
      struct matrix m;
      size_t n_in = 1 + rnd() % 200, n_tokens = 1 + rnd() % 40, rows[2] = {1 + rnd() % 70, 1 + rnd() % 70};
      matrix_make(&m, (enum qtr_linear_format)format, n_in, rows, 2, false, true, false);
      check("odd", &m.source, QTR_EPILOGUE_LOGITS, n_tokens);
      check("odd", &m.source, QTR_EPILOGUE_ADD, n_tokens);
      matrix_free(&m);
      rows[1] = rows[0];
      matrix_make(&m, (enum qtr_linear_format)format, n_in, rows, 2, true, true, false);
      check("odd", &m.source, QTR_EPILOGUE_SILU_MUL, n_tokens);
      matrix_free(&m);
    }
  }
}

/* Long rows: many passes over the weights, and so many activations that the tokens are taken in chunks of 128. */
static void test_long_rows(void **state) {
  (void)state;
  for (int format = QTR_LINEAR_W8A8; format < QTR_N_LINEAR_FORMATS; format++) {
    struct matrix m;
    size_t rows[2] = {64, 64};
    matrix_make(&m, (enum qtr_linear_format)format, MAX_IN, rows, 2, true, false, false);
    check("long", &m.source, QTR_EPILOGUE_SILU_MUL, MAX_TOKENS);
    matrix_free(&m);
    matrix_make(&m, (enum qtr_linear_format)format, MAX_IN - 128, rows, 1, false, false, false);
    check("long", &m.source, QTR_EPILOGUE_ADD, 130);
    check("long", &m.source, QTR_EPILOGUE_STORE, 20);
    matrix_free(&m);
  }
}

static void test_wrapping_groups(void **state) {
  (void)state;
  struct matrix m;
  size_t rows = 96;
  matrix_make(&m, QTR_LINEAR_W4A8_G128, 512, &rows, 1, false, true, true);
  check("wrapped", &m.source, QTR_EPILOGUE_STORE, 1);
  check("wrapped", &m.source, QTR_EPILOGUE_STORE, 40);
  matrix_free(&m);
}

/* A token's result does not depend on its neighbours. */
static void test_batch_invariance(void **state) {
  (void)state;
  enum { TOKENS = 70, N_IN = 512, WIDTH = 64 };
  for (int format = 0; format < QTR_N_LINEAR_FORMATS; format++) {
    struct matrix m;
    size_t rows[2] = {WIDTH, WIDTH};
    matrix_make(&m, (enum qtr_linear_format)format, N_IN, rows, 2, true, true, false);
    for (size_t i = 0; i < TOKENS * N_IN; i++) x[i] = uniform();
    for (int i = 0; i < N_ISAS; i++) {
      if (!cpu[i]) continue;
      run(cpu[i], &m.source, QTR_EPILOGUE_SILU_MUL, x, TOKENS, expected, WIDTH);
      for (size_t t = 0; t < TOKENS; t += 1 + rnd() % 5) {
        size_t n = 1 + rnd() % (uint32_t)QTR_MIN(TOKENS - t, (size_t)15);
        run(cpu[i], &m.source, QTR_EPILOGUE_SILU_MUL, x + t * N_IN, n, found, WIDTH);
        assert_memory_equal(found, expected + t * WIDTH, n * WIDTH * sizeof *found);
      }
    }
    matrix_free(&m);
  }
}

/* ---- norms and quantisation ---------------------------------------------------------------------- */

static void read_row(struct qtr_backend *b, const struct qtr_input *in, size_t token, size_t dim, int8_t *code, float *scale,
                     float *sum) {
  b->ops->input_read(b, in, token, dim, code, scale, sum, NULL);
}

/* norm -1: quantisation alone. May a code differ by one? Where the norm's own roundings come before it, rarely. */
static void check_rows(struct qtr_backend *b, int norm, size_t dim, size_t n_tokens, const float *weight) {
  struct qtr_error err;
  struct qtr_input *in[2];
  struct qtr_backend *both[2] = {reference, b};
  for (int i = 0; i < 2; i++) {
    struct qtr_backend *o = both[i];
    void *dx, *dw;
    assert_int_equal(o->ops->input_create(o, n_tokens, dim, &in[i], &err), QTR_OK);
    assert_int_equal(o->ops->upload_floats(o, x, n_tokens * dim, &dx, &err), QTR_OK);
    assert_int_equal(o->ops->upload_floats(o, weight, dim, &dw, &err), QTR_OK);
    if (norm < 0) {
      o->ops->quant(o, &(struct qtr_quant_args){dx, in[i], QTR_QUANT_INT8, n_tokens, dim});
    } else {
      o->ops->rmsnorm(o,
                      &(struct qtr_rmsnorm_args){dx, dw, in[i], QTR_QUANT_INT8, (enum qtr_norm)norm, 1e-5f, n_tokens, dim});
    }
    o->ops->free(o, dx);
    o->ops->free(o, dw);
  }
  size_t n_different = 0;
  for (size_t t = 0; t < n_tokens; t++) {
    int8_t code[2][MAX_IN];
    float scale[2], sum[2];
    for (int i = 0; i < 2; i++) read_row(both[i], in[i], t, dim, code[i], &scale[i], &sum[i]);
    assert_true(fabsf(scale[0] - scale[1]) <= (norm < 0 ? 0.0f : scale[0] / 1024));
    assert_true(fabsf(sum[0] - sum[1]) <=
                2e-4f * scale[0] * (float)dim + (norm == QTR_NORM_QSERVE ? fabsf(sum[0]) / 512 : 0));
    for (size_t k = 0; k < dim; k++) {
      assert_true(abs(code[0][k] - code[1][k]) <= (norm < 0 ? 0 : 1));
      n_different += code[0][k] != code[1][k];
    }
  }
  assert_true(n_different <= n_tokens * dim / 500);
  for (int i = 0; i < 2; i++) both[i]->ops->input_free(both[i], in[i]);
}

static void test_rows(void **state) {
  (void)state;
  static float weight[MAX_IN];
  static const size_t dims[] = {1, 5, 64, 100, 128, 192, 512, 1000, 1024};
  for (size_t i = 0; i < MAX_IN; i++) weight[i] = 1 + uniform() / 2;
  for (size_t d = 0; d < sizeof dims / sizeof dims[0]; d++) {
    for (size_t i = 0; i < MAX_X; i++) x[i] = uniform() * (1 + 20 * (float)(rnd() % 128 == 0));
    memset(x, 0, dims[d] * sizeof *x); /* a row of zeros */
    for (int i = 0; i < N_ISAS; i++) {
      if (!cpu[i]) continue;
      for (int norm = -1; norm <= QTR_NORM_QSERVE; norm++) check_rows(cpu[i], norm, dims[d], 37, weight);
    }
  }
}

/* NaN and infinity must not reach undefined behaviour; a NaN's code is 0, as in the reference. */
static void test_rows_not_finite(void **state) {
  (void)state;
  for (size_t i = 0; i < 200; i++) x[i] = uniform();
  x[3] = NAN;
  x[100 + 7] = 3e38f;
  for (int i = 0; i < N_ISAS; i++) {
    if (!cpu[i]) continue;
    struct qtr_error err;
    struct qtr_input *in;
    void *dx;
    int8_t code[100];
    float scale, sum;
    assert_int_equal(cpu[i]->ops->input_create(cpu[i], 3, 100, &in, &err), QTR_OK);
    assert_int_equal(cpu[i]->ops->upload_floats(cpu[i], x, 200, &dx, &err), QTR_OK);
    cpu[i]->ops->quant(cpu[i], &(struct qtr_quant_args){dx, in, QTR_QUANT_INT8, 2, 100});
    read_row(cpu[i], in, 0, 100, code, &scale, &sum);
    assert_int_equal(code[3], 0);
    assert_true(scale > 0 && scale < 1);
    read_row(cpu[i], in, 1, 100, code, &scale, &sum);
    assert_int_equal(code[7], 127);
    assert_true(scale == 65504.0f);
    cpu[i]->ops->free(cpu[i], dx);
    cpu[i]->ops->input_free(cpu[i], in);
  }
}

static void test_embed_and_gather(void **state) {
  (void)state;
  enum { ROWS = 50, DIM = 70, TOKENS = 30 };
  static uint8_t data[ROWS * DIM * 4 + 1];
  static float scale[ROWS];
  for (size_t i = 0; i < ROWS; i++) scale[i] = 0.5f + fabsf(uniform());
  int32_t token[TOKENS], position[TOKENS], q_start[2] = {0, TOKENS}, kv_len[1] = {0}, block[1] = {0}, row[3] = {2, 9, 29};
  for (int i = 0; i < TOKENS; i++) {
    token[i] = (int32_t)(rnd() % ROWS);
    position[i] = i;
  }
  struct qtr_batch batch = {.n_tokens = TOKENS,
                            .n_seqs = 1,
                            .n_logit_rows = 3,
                            .max_blocks = 1,
                            .token = token,
                            .position = position,
                            .q_start = q_start,
                            .kv_len = kv_len,
                            .block_table = block,
                            .logit_row = row};
  float inv_freq[4] = {1, 0.5f, 0.25f, 0.125f};
  static const enum qtr_dtype dtypes[] = {QTR_DTYPE_F32, QTR_DTYPE_F16, QTR_DTYPE_BF16, QTR_DTYPE_I8};
  for (int d = 0; d < 4; d++) {
    for (size_t i = 0; i < ROWS * DIM; i++) {
      float v = uniform();
      uint16_t h = d == 1 ? qtr_f16_from_f32(v) : qtr_bf16_from_f32(v);
      if (d == 0) memcpy(data + 1 + 4 * i, &v, 4);
      if (d == 1 || d == 2) memcpy(data + 1 + 2 * i, &h, 2);
      if (d == 3) data[1 + i] = (uint8_t)rnd();
    }
    struct qtr_table_source source = {dtypes[d], ROWS, DIM, data + 1, d == 3 ? scale : NULL};
    struct qtr_backend *both[2] = {reference, three_threads};
    float out[2][TOKENS * DIM], gathered[2][3 * DIM];
    for (int i = 0; i < 2; i++) {
      struct qtr_backend *o = both[i];
      struct qtr_error err;
      struct qtr_table *table;
      void *dev, *few;
      assert_int_equal(o->ops->table_create(o, &source, &table, &err), QTR_OK);
      assert_int_equal(o->ops->alloc(o, sizeof out[0], &dev, &err), QTR_OK);
      assert_int_equal(o->ops->alloc(o, sizeof gathered[0], &few, &err), QTR_OK);
      assert_int_equal(o->ops->begin_step(o, &batch, inv_freq, 4, &err), QTR_OK);
      o->ops->embed(o, &(struct qtr_embed_args){table, dev});
      o->ops->gather(o, &(struct qtr_gather_args){dev, few, DIM});
      assert_int_equal(o->ops->end_step(o, &err), QTR_OK);
      assert_int_equal(o->ops->download(o, dev, QTR_DTYPE_F32, TOKENS * DIM, out[i], &err), QTR_OK);
      assert_int_equal(o->ops->download(o, few, QTR_DTYPE_F32, 3 * DIM, gathered[i], &err), QTR_OK);
      o->ops->free(o, dev);
      o->ops->free(o, few);
      o->ops->table_free(o, table);
    }
    assert_memory_equal(out[0], out[1], sizeof out[0]);
    assert_memory_equal(gathered[0], gathered[1], sizeof gathered[0]);
  }
}

/* ---- properties ---------------------------------------------------------------------------------- */

static void test_memory_and_errors(void **state) {
  (void)state;
  struct qtr_backend *b = three_threads;
  struct qtr_error err;
  struct qtr_linear *linear;
  struct matrix m;
  size_t rows = 512;
  matrix_make(&m, QTR_LINEAR_W4A8_G128, 1024, &rows, 1, false, false, false);
  assert_int_equal(b->ops->linear_create(b, &m.source, &linear, &err), QTR_OK);
  size_t on_disk = 512 * 1024 / 2 + 2 * 512 * 8 + 512 * 2;
  assert_true(b->ops->linear_bytes(linear) >= on_disk);
  assert_true(b->ops->linear_bytes(linear) <= on_disk + on_disk / 20);
  b->ops->linear_free(b, linear);

  struct qtr_linear_source bad = m.source;
  bad.n_in = 1000;
  assert_int_equal(b->ops->linear_create(b, &bad, &linear, &err), QTR_ERR_UNSUPPORTED);
  assert_non_null(strstr(err.message, "1000"));
  bad.n_in = (size_t)1 << 40;
  assert_int_equal(b->ops->linear_create(b, &bad, &linear, &err), QTR_ERR_UNSUPPORTED);
  bad = m.source;
  bad.part[0].s2_zero = NULL;
  assert_int_equal(b->ops->linear_create(b, &bad, &linear, &err), QTR_ERR_ARGUMENT);
  assert_null(linear);
  bad = m.source;
  bad.format = QTR_LINEAR_F32;
  bad.n_in = SIZE_MAX / 8;
  assert_int_equal(b->ops->linear_create(b, &bad, &linear, &err), QTR_ERR_MEMORY);
  matrix_free(&m);

  struct qtr_input *input;
  assert_int_equal(b->ops->input_create(b, SIZE_MAX / 2, 64, &input, &err), QTR_ERR_MEMORY);
  struct qtr_backend *none;
  assert_int_equal(qtr_backend_open("cpu", &(struct qtr_backend_options){.isa = "sse"}, &none, &err), QTR_ERR_ARGUMENT);
  assert_int_equal(qtr_backend_open("cpu", &(struct qtr_backend_options){.threads = -1}, &none, &err), QTR_ERR_ARGUMENT);
  struct qtr_caps caps;
  b->ops->caps(b, &caps);
  assert_true(caps.memory_total >= caps.memory_free && caps.memory_free > 0 && caps.threads > 0 && caps.step_tokens > 0);
  assert_non_null(strstr(caps.description, "thread"));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_rows),
      cmocka_unit_test(test_rows_not_finite),
      cmocka_unit_test(test_formats),
      cmocka_unit_test(test_odd_shapes),
      cmocka_unit_test(test_long_rows),
      cmocka_unit_test(test_wrapping_groups),
      cmocka_unit_test(test_batch_invariance),
      cmocka_unit_test(test_embed_and_gather),
      cmocka_unit_test(test_memory_and_errors),
  };
  return cmocka_run_group_tests(tests, setup, teardown);
}
