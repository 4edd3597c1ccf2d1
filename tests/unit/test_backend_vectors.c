/* The reference backend against the vectors of the specification (appendix V), and the same formulas on numbers worked out
 * by hand, which need no data. Exact: weight codes, accumulators, activation codes and scales, KV codes, scales and zeros.
 * One fp16 ulp: sums, GEMM outputs, SiLU. The statistics area of KV pages (max, min) belongs to sparse attention and is not
 * made yet. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "backend/common/kv_quant.h"
#include "backend/reference/reference.h"
#include "base/file.h"
#include "checkpoint/packing.h"
#include "shared.h"

static const struct qtr_backend_ops *const ops = &qtr_backend_reference;

static struct qtr_backend *open_reference(void) {
  struct qtr_backend *b = NULL;
  struct qtr_backend_options options = {0};
  assert_int_equal(ops->open(&options, &b, NULL), QTR_OK);
  return b;
}

/* First thing in a test that reads vectors. */
static void vectors_need(void) {
  if (!qtr_test_shared("spec/vectors/act_4x256.x.f16")) skip();
}

/* spec/vectors/<name>, malloc'ed, of exactly n_bytes. */
static void *vector_read(const char *name, size_t n_bytes) {
  char file[256], *data;
  size_t n;
  (void)snprintf(file, sizeof file, "spec/vectors/%s", name);
  const char *path = qtr_test_shared(file);
  if (!path) fail_msg("%s is missing among the vectors", name);
  struct qtr_error err;
  if (qtr_file_read(path, 1 << 20, &data, &n, &err) != QTR_OK) fail_msg("%s", err.message);
  assert_int_equal(n, n_bytes);
  return data;
}

/* n halves as malloc'ed floats. */
static float *vector_halves(const char *name, size_t n) {
  uint16_t *h = vector_read(name, 2 * n);
  float *x = malloc(n * sizeof *x);
  for (size_t i = 0; i < n; i++) x[i] = qtr_f16_to_f32(h[i]);
  free(h);
  return x;
}

static void assert_near(double x, double y, double tolerance) {
  if (!(fabs(x - y) <= tolerance)) fail_msg("%.9g, expected %.9g within %g", x, y, tolerance);
}

/* Distance in fp16 steps between f16(x) and the half y: neighbours are 1 apart, +0 and -0 are 0 apart. */
static int ulps(float x, float y) {
  int a = qtr_f16_from_f32(x), b = qtr_f16_from_f32(y);
  a = a & 0x8000 ? 0x8000 - a : a;
  b = b & 0x8000 ? 0x8000 - b : b;
  return abs(a - b);
}

static void assert_ulps(const float *x, const float *expected, size_t n, int limit, const char *what) {
  for (size_t i = 0; i < n; i++) {
    int d = ulps(x[i], expected[i]);
    if (d > limit || isnan(x[i])) {
      fail_msg("%s[%zu] = %.9g, expected %.9g: %d ulps apart", what, i, (double)x[i], (double)expected[i], d);
    }
  }
}

static struct qtr_linear *linear_make(struct qtr_backend *b, enum qtr_linear_format format, size_t n_in,
                                      struct qtr_linear_part part) {
  struct qtr_linear_source source = {.format = format, .n_in = n_in, .n_parts = 1, .part = {part}};
  struct qtr_linear *l = NULL;
  assert_int_equal(ops->linear_create(b, &source, &l, NULL), QTR_OK);
  return l;
}

static struct qtr_input *input_make(struct qtr_backend *b, size_t n_tokens, size_t dim) {
  struct qtr_input *in = NULL;
  assert_int_equal(ops->input_create(b, n_tokens, dim, &in, NULL), QTR_OK);
  return in;
}

/* The activations of act_4x256, quantised. */
static struct qtr_input *act_input(struct qtr_backend *b) {
  float *x = vector_halves("act_4x256.x.f16", 4 * 256);
  struct qtr_input *in = input_make(b, 4, 256);
  ops->quant(b, &(struct qtr_quant_args){.x = x, .out = in, .quant = QTR_QUANT_INT8, .n_tokens = 4, .dim = 256});
  free(x);
  return in;
}

static void assert_input(struct qtr_backend *b, const struct qtr_input *in, size_t n_tokens, size_t dim, const char *name) {
  char file[3][128];
  (void)snprintf(file[0], sizeof file[0], "%s.q.i8", name);
  (void)snprintf(file[1], sizeof file[1], "%s.scale.f16", name);
  (void)snprintf(file[2], sizeof file[2], "%s.sum.f16", name);
  int8_t *q = vector_read(file[0], n_tokens * dim), code[256];
  float *scale = vector_halves(file[1], n_tokens), *sum = vector_halves(file[2], n_tokens);
  for (size_t t = 0; t < n_tokens; t++) {
    float sa, total;
    ops->input_read(b, in, t, dim, code, &sa, &total, NULL);
    assert_memory_equal(code, q + t * dim, dim);
    assert_true(sa == scale[t]);
    assert_ulps(&total, &sum[t], 1, 1, file[2]);
  }
  free(q);
  free(scale);
  free(sum);
}

static void test_vector_packing(void **state) {
  (void)state;
  vectors_need();
  uint8_t *q = vector_read("w4pack_64x64.q.u8", 64 * 64), *packed = vector_read("w4pack_64x64.qweight.u8", 64 * 32);
  float ones[64], zeros[64] = {0};
  for (size_t i = 0; i < 64; i++) ones[i] = 1;
  struct qtr_backend *b = open_reference();
  struct qtr_linear *l = linear_make(b, QTR_LINEAR_W4A8, 64,
                                     (struct qtr_linear_part){.n_out = 64, .weight = packed, .scale = ones, .szero = zeros});
  assert_memory_equal(l->code, q, 64 * 64);
  ops->linear_free(b, l);
  ops->close(b);
  free(q);
  free(packed);
}

static void test_vector_quant(void **state) {
  (void)state;
  vectors_need();
  struct qtr_backend *b = open_reference();
  struct qtr_input *in = act_input(b);
  assert_input(b, in, 4, 256, "act_4x256");
  ops->input_free(b, in);
  ops->close(b);
}

static void test_vector_w4a8(void **state) {
  (void)state;
  vectors_need();
  struct qtr_backend *b = open_reference();
  struct qtr_input *in = act_input(b);
  uint8_t *q = vector_read("g128_64x256.q.u8", 64 * 256), *packed = vector_read("g128_64x256.qweight.u8", 64 * 128);
  float *scale = vector_halves("gemm_w4pc.s1_scales.f16", 64), *szero = vector_halves("gemm_w4pc.s1_szeros.f16", 64);
  float *expected = vector_halves("gemm_w4pc.out_4x64.f16", 4 * 64), out[4 * 64];
  int32_t *acc = vector_read("gemm_w4pc.acc_4x64.i32", 4 * 64 * 4);
  struct qtr_linear *l = linear_make(
      b, QTR_LINEAR_W4A8, 256, (struct qtr_linear_part){.n_out = 64, .weight = packed, .scale = scale, .szero = szero});
  assert_memory_equal(l->code, q, 64 * 256);
  for (size_t t = 0; t < 4; t++) {
    for (size_t n = 0; n < 64; n++) {
      assert_int_equal(qtr_reference_dot(in->code + t * 256, l->code + n * 256, 256), acc[t * 64 + n]);
    }
    in->sum[t] = qtr_f16_round(in->sum[t]); /* what the vector's GEMM was given */
  }
  ops->linear(b, &(struct qtr_linear_args){.linear = l, .input = in, .out = out, .n_tokens = 4});
  assert_ulps(out, expected, 4 * 64, 1, "gemm_w4pc");
  ops->linear_free(b, l);
  ops->input_free(b, in);
  ops->close(b);
  free(q);
  free(packed);
  free(scale);
  free(szero);
  free(expected);
  free(acc);
}

static void test_vector_g128(void **state) {
  (void)state;
  vectors_need();
  struct qtr_backend *b = open_reference();
  struct qtr_input *in = act_input(b);
  uint8_t *packed = vector_read("g128_64x256.qweight.u8", 64 * 128);
  uint8_t *s2 = vector_read("g128_64x256.s2_scales.i8", 128), *z2 = vector_read("g128_64x256.s2_zeros.i8", 128);
  uint8_t *s2_natural = vector_read("g128_64x256.s2_scales_natural.u8", 128);
  int8_t *w8 = vector_read("g128_64x256.w8.i8", 64 * 256);
  float *scale = vector_halves("gemm_g128.s1_scales.f16", 64), *expected = vector_halves("gemm_g128.out_4x64.f16", 4 * 64);
  float out[4 * 64];
  for (size_t row = 0; row < 64; row++) {
    for (size_t g = 0; g < 2; g++) assert_int_equal(s2[g * 64 + qtr_s2_position(row)], s2_natural[row * 2 + g]);
  }
  struct qtr_linear_part part = {.n_out = 64, .weight = packed, .scale = scale, .s2_scale = s2, .s2_zero = z2};
  struct qtr_linear *l = linear_make(b, QTR_LINEAR_W4A8_G128, 256, part);
  assert_memory_equal(l->code, w8, 64 * 256);
  ops->linear(b, &(struct qtr_linear_args){.linear = l, .input = in, .out = out, .n_tokens = 4});
  assert_ulps(out, expected, 4 * 64, 1, "gemm_g128");
  ops->linear_free(b, l);
  ops->input_free(b, in);
  ops->close(b);
  free(packed);
  free(s2);
  free(z2);
  free(s2_natural);
  free(w8);
  free(scale);
  free(expected);
}

static void test_vector_w8a8(void **state) {
  (void)state;
  vectors_need();
  struct qtr_backend *b = open_reference();
  struct qtr_input *in = act_input(b);
  int8_t *w = vector_read("gemm_w8a8.weight_64x256.i8", 64 * 256);
  float *scale = vector_halves("gemm_g128.s1_scales.f16", 64), *expected = vector_halves("gemm_w8a8.out_4x64.f16", 4 * 64);
  float out[4 * 64];
  struct qtr_linear *l =
      linear_make(b, QTR_LINEAR_W8A8, 256, (struct qtr_linear_part){.n_out = 64, .weight = w, .scale = scale});
  ops->linear(b, &(struct qtr_linear_args){.linear = l, .input = in, .out = out, .n_tokens = 4});
  assert_ulps(out, expected, 4 * 64, 1, "gemm_w8a8");
  ops->linear_free(b, l);
  ops->input_free(b, in);
  ops->close(b);
  free(w);
  free(scale);
  free(expected);
}

static void test_vector_rms(void **state) {
  (void)state;
  vectors_need();
  struct qtr_backend *b = open_reference();
  struct qtr_input *in = input_make(b, 4, 256);
  float *x = vector_halves("rms_4x256.x.f16", 4 * 256), *gamma = vector_halves("rms_256.gamma.f16", 256);
  struct qtr_rmsnorm_args args = {.x = x,
                                  .weight = gamma,
                                  .out = in,
                                  .quant = QTR_QUANT_INT8,
                                  .norm = QTR_NORM_QSERVE,
                                  .eps = 1e-5f,
                                  .n_tokens = 4,
                                  .dim = 256};
  ops->rmsnorm(b, &args);
  assert_input(b, in, 4, 256, "rms_4x256");
  ops->input_free(b, in);
  ops->close(b);
  free(x);
  free(gamma);
}

/* gate|up of width I as an identity matrix: the epilogue then sees the vector itself. */
static void silu_run(struct qtr_backend *b, const float *gate_up, size_t n_tokens, size_t half, float *out) {
  float *identity = calloc(4 * half * half, sizeof *identity);
  for (size_t i = 0; i < 2 * half; i++) identity[i * 2 * half + i] = 1;
  struct qtr_linear_source source = {.format = QTR_LINEAR_F32, .n_in = 2 * half, .n_parts = 2, .gate_up = true};
  for (size_t p = 0; p < 2; p++)
    source.part[p] = (struct qtr_linear_part){.n_out = half, .weight = identity + p * 2 * half * half};
  struct qtr_linear *l = NULL;
  assert_int_equal(ops->linear_create(b, &source, &l, NULL), QTR_OK);
  free(identity); /* not borrowed */
  struct qtr_input *in = input_make(b, n_tokens, 2 * half);
  ops->quant(
      b, &(struct qtr_quant_args){.x = gate_up, .out = in, .quant = QTR_QUANT_NONE, .n_tokens = n_tokens, .dim = 2 * half});
  ops->linear(b, &(struct qtr_linear_args){
                     .linear = l, .input = in, .epilogue = QTR_EPILOGUE_SILU_MUL, .out = out, .n_tokens = n_tokens});
  ops->linear_free(b, l);
  ops->input_free(b, in);
}

static void test_vector_silu(void **state) {
  (void)state;
  vectors_need();
  struct qtr_backend *b = open_reference();
  float *x = vector_halves("silu_2x128.gate_up.f16", 2 * 128), *expected = vector_halves("silu_2x64.out.f16", 2 * 64);
  float out[2 * 64];
  silu_run(b, x, 2, 64, out);
  assert_ulps(out, expected, 2 * 64, 1, "silu");
  struct qtr_input *in = input_make(b, 2, 64);
  ops->quant(b, &(struct qtr_quant_args){.x = expected, .out = in, .quant = QTR_QUANT_INT8, .n_tokens = 2, .dim = 64});
  assert_input(b, in, 2, 64, "silu_2x64");
  ops->input_free(b, in);
  ops->close(b);
  free(x);
  free(expected);
}

/* Writes n_tokens rows (n_tokens, heads, dim) as K and V of one sequence whose first page is 0, with RoPE switched off. */
static struct qtr_kv *kv_fill(struct qtr_backend *b, enum qtr_kv_format format, const float *x, int32_t n_tokens,
                              int32_t heads, int32_t dim, const float *static_scale, const struct qtr_kv_sparse *sparse) {
  struct qtr_kv_config config = {.format = format,
                                 .n_layers = 2,
                                 .n_kv_heads = heads,
                                 .head_dim = dim,
                                 .n_pages = 2,
                                 .static_scale = static_scale,
                                 .sparse = sparse};
  struct qtr_kv *kv = NULL;
  assert_int_equal(ops->kv_create(b, &config, &kv, NULL), QTR_OK);
  size_t row = (size_t)(heads * dim);
  float *qkv = calloc((size_t)n_tokens * 3 * row, sizeof *qkv), *inv_freq = calloc((size_t)dim / 2, sizeof *inv_freq);
  int32_t position[128], start[2] = {0, n_tokens}, kv_len[1] = {0}, table[2] = {0, 1};
  for (int32_t t = 0; t < n_tokens; t++) {
    position[t] = t;
    memcpy(qkv + ((size_t)t * 3 + 1) * row, x + (size_t)t * row, row * sizeof *x);
    memcpy(qkv + ((size_t)t * 3 + 2) * row, x + (size_t)t * row, row * sizeof *x);
  }
  struct qtr_batch batch = {.n_tokens = n_tokens,
                            .n_seqs = 1,
                            .max_blocks = 2,
                            .position = position,
                            .q_start = start,
                            .kv_len = kv_len,
                            .block_table = table};
  assert_int_equal(ops->begin_step(b, &batch, inv_freq, (size_t)dim / 2, NULL), QTR_OK);
  ops->rope_kv_write(b, &(struct qtr_rope_kv_args){
                            .qkv = qkv, .kv = kv, .layer = 1, .n_heads = heads, .n_kv_heads = heads, .head_dim = dim});
  assert_int_equal(ops->end_step(b, NULL), QTR_OK);
  free(qkv);
  free(inv_freq);
  return kv;
}

static void test_vector_pages(void **state) {
  (void)state;
  vectors_need();
  struct qtr_backend *b = open_reference();
  float *x = vector_halves("kv_5tok_2head.kv.f16", 5 * 2 * 128);
  for (int i = 0; i < 2; i++) {
    size_t stored = i ? 16384 + 512 : 8192 + 512;     /* data, scales, zeros; */
    size_t with_stats = stored + 2 * 4 * 2 * 128 * 2; /* maxima and minima of four logical pages */
    uint8_t *page =
        i ? vector_read("kpage_int8_H2_P64_D128_sub4.u8", 20992) : vector_read("kpage_int4_H2_P64_D128_sub4.u8", 12800);
    struct qtr_kv *kv = kv_fill(b, i ? QTR_KV_INT8 : QTR_KV_INT4, x, 5, 2, 128, NULL, NULL);
    assert_int_equal(qtr_reference_kv_page_bytes(kv, 1, QTR_HEAD_RETRIEVAL, false), stored);
    assert_memory_equal(qtr_reference_kv_page(kv, 1, QTR_HEAD_RETRIEVAL, false, 0), page, stored);
    assert_memory_equal(qtr_reference_kv_page(kv, 1, QTR_HEAD_RETRIEVAL, true, 0), page, stored);
    ops->kv_free(b, kv);
    static const struct qtr_kv_sparse sparse = {
        .budget = 64, .interval = 1, .logical_tokens = 16, .group = 1, .n_slots = 1, .max_pages = 2};
    kv = kv_fill(b, i ? QTR_KV_INT8 : QTR_KV_INT4, x, 5, 2, 128, NULL, &sparse);
    assert_int_equal(qtr_reference_kv_page_bytes(kv, 1, QTR_HEAD_RETRIEVAL, false), with_stats);
    assert_int_equal(qtr_reference_kv_page_bytes(kv, 1, QTR_HEAD_RETRIEVAL, true), stored);
    assert_memory_equal(qtr_reference_kv_page(kv, 1, QTR_HEAD_RETRIEVAL, false, 0), page, with_stats);
    assert_memory_equal(qtr_reference_kv_page(kv, 1, QTR_HEAD_RETRIEVAL, true, 0), page, stored);
    ops->kv_free(b, kv);
    free(page);
  }
  ops->close(b);
  free(x);
}

/* ---- the same formulas without data ---------------------------------------------------------------- */

/* A.3.1: codes (7r + 3k + (rk >> 3)) & 15; its first 32 bytes and the one-hot table, as printed in the specification. */
static void test_packing_example(void **state) {
  (void)state;
  static const uint8_t first[32] = {0x00, 0x53, 0xa6, 0xf9, 0x88, 0xec, 0x40, 0xa4, 0x00, 0x53, 0xa6,
                                    0xf9, 0x88, 0xec, 0x40, 0xa4, 0x4c, 0x9f, 0xe2, 0x35, 0x08, 0x6c,
                                    0xc0, 0x24, 0x4c, 0x9f, 0xe2, 0x35, 0x08, 0x6c, 0xc0, 0x24};
  static const struct {
    size_t row, col, byte;
    uint8_t value;
  } hot[] = {{0, 0, 0, 0x09},     {0, 1, 1, 0x09},     {0, 4, 16, 0x09},   {0, 16, 8, 0x09},
             {1, 0, 64, 0x09},    {8, 0, 4, 0x09},     {16, 0, 0, 0x90},   {24, 31, 63, 0x90},
             {31, 31, 511, 0x90}, {32, 0, 1024, 0x09}, {0, 32, 512, 0x09}, {33, 47, 1651, 0x09}};
  uint8_t packed[2048] = {0};
  for (size_t r = 0; r < 64; r++) {
    for (size_t k = 0; k < 64; k++) {
      packed[qtr_w4_offset(64, r, k)] |= (uint8_t)(((7 * r + 3 * k + ((r * k) >> 3)) & 15) << qtr_w4_shift(r));
    }
  }
  assert_memory_equal(packed, first, sizeof first);
  for (size_t i = 0; i < sizeof hot / sizeof hot[0]; i++) {
    assert_int_equal(qtr_w4_offset(64, hot[i].row, hot[i].col), hot[i].byte);
    assert_int_equal(9 << qtr_w4_shift(hot[i].row), hot[i].value);
  }
}

/* One token of 128 twos but x[0] = 1 and x[1] = -0.25; every weight code 3 but code 15 of row 5 at k = 0. */
static void test_linear_by_hand(void **state) {
  (void)state;
  struct qtr_backend *b = open_reference();
  float x[128], scale[32], szero[32], bias[32], out[32];
  uint8_t packed[32 * 64] = {0}, s2[32], z2[32];
  for (size_t i = 0; i < 128; i++) x[i] = 2;
  x[0] = 1;
  x[1] = -0.25f;
  for (size_t r = 0; r < 32; r++) {
    scale[r] = 0.5f;
    szero[r] = 0.25f * (float)r;
    bias[r] = 100;
    s2[qtr_s2_position(r)] = 16;
    z2[qtr_s2_position(r)] = (uint8_t)-24; /* w8 = 3*16 - 24 = 24;  15*16 - 24 = 216 = -40 modulo 256 */
    for (size_t k = 0; k < 128; k++) {
      packed[qtr_w4_offset(128, r, k)] |= (uint8_t)((r == 5 && k == 0 ? 15 : 3) << qtr_w4_shift(r));
    }
  }
  struct qtr_input *in = input_make(b, 1, 128);
  ops->quant(b, &(struct qtr_quant_args){.x = x, .out = in, .quant = QTR_QUANT_INT8, .n_tokens = 1, .dim = 128});
  int8_t code[128];
  float sa, sum;
  ops->input_read(b, in, 0, 128, code, &sa, &sum, NULL);
  assert_int_equal(code[0], 64);  /* 63.5 to even */
  assert_int_equal(code[1], -16); /* -15.875 */
  assert_int_equal(code[127], 127);
  assert_int_equal(qtr_f16_from_f32(sa), 0x2408); /* 2/127 = 0.015748 */
  assert_true(sum == 252.75f);
  int32_t sum_x = 64 - 16 + 126 * 127;

  struct qtr_linear_part part = {
      .n_out = 32, .weight = packed, .scale = scale, .szero = szero, .s2_scale = s2, .s2_zero = z2, .bias = bias};
  struct qtr_linear *l = linear_make(b, QTR_LINEAR_W4A8, 128, part);
  ops->linear(b, &(struct qtr_linear_args){.linear = l, .input = in, .out = out, .n_tokens = 1});
  for (size_t r = 0; r < 32; r++) {
    int32_t acc = 3 * sum_x + (r == 5 ? 12 * 64 : 0);
    assert_true(out[r] == (float)acc * 0.5f * sa - szero[r] * 252.75f + 100);
  }
  ops->linear_free(b, l);
  l = linear_make(b, QTR_LINEAR_W4A8_G128, 128, part);
  for (size_t r = 0; r < 32; r++) out[r] = 1000;
  ops->linear(b,
              &(struct qtr_linear_args){.linear = l, .input = in, .epilogue = QTR_EPILOGUE_ADD, .out = out, .n_tokens = 1});
  for (size_t r = 0; r < 32; r++) {
    int32_t acc = 24 * sum_x + (r == 5 ? (-40 - 24) * 64 : 0);
    assert_true(out[r] == 1000 + ((float)acc * (0.5f * sa) + 100));
  }
  ops->linear_free(b, l);
  ops->input_free(b, in);
  ops->close(b);
}

static void test_linear_refuses(void **state) {
  (void)state;
  struct qtr_backend *b = open_reference();
  static uint8_t bytes[64 * 64];
  static float ones[64];
  struct qtr_linear_part part = {
      .n_out = 32, .weight = bytes, .scale = ones, .szero = ones, .s2_scale = bytes, .s2_zero = bytes};
  struct qtr_linear_source bad[] = {
      {.format = QTR_LINEAR_W4A8, .n_in = 48, .n_parts = 1, .part = {part}},
      {.format = QTR_LINEAR_W4A8_G128, .n_in = 64, .n_parts = 1, .part = {part}},
      {.format = QTR_LINEAR_W8A8, .n_in = 131072, .n_parts = 1, .part = {part}},
      {.format = QTR_LINEAR_W8A8, .n_in = 64, .n_parts = 4, .part = {part}},
      {.format = QTR_LINEAR_W8A8,
       .n_in = 64,
       .n_parts = 2,
       .gate_up = true,
       .part = {part, {.n_out = 31, .weight = bytes, .scale = ones}}},
      {.format = QTR_LINEAR_F32, .n_in = 4, .n_parts = 1, .part = {{.n_out = 4}}},
  };
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    struct qtr_linear *l = NULL;
    struct qtr_error err = {0};
    assert_int_not_equal(ops->linear_create(b, &bad[i], &l, &err), QTR_OK);
    assert_null(l);
    assert_true(err.message[0] != 0);
  }
  ops->close(b);
}

static void test_quant_extremes(void **state) {
  (void)state;
  struct qtr_backend *b = open_reference();
  float x[4][3] = {{0, 0, 0}, {1e9f, -1e9f, 5e8f}, {NAN, 1, -2}, {1e-9f, 0, 0}};
  struct qtr_input *in = input_make(b, 4, 3);
  ops->quant(b, &(struct qtr_quant_args){.x = x, .out = in, .quant = QTR_QUANT_INT8, .n_tokens = 4, .dim = 3});
  for (size_t t = 0; t < 4; t++) assert_true(isfinite(in->scale[t]));
  assert_memory_equal(in->code, ((int8_t[]){0, 0, 0, 127, -127, 64, 0, 64, -127, 127, 0, 0}), 12);
  ops->input_free(b, in);
  ops->close(b);
}

static void test_norm_by_hand(void **state) {
  (void)state;
  struct qtr_backend *b = open_reference();
  float x[4] = {1, 2, 3, 4}, gamma[4] = {1, 1, 2, 0.5f}, value[4];
  struct qtr_input *in = input_make(b, 1, 4);
  struct qtr_rmsnorm_args args = {.x = x, .weight = gamma, .out = in, .eps = 0.5f, .n_tokens = 1, .dim = 4};
  ops->rmsnorm(b, &args);
  ops->input_read(b, in, 0, 4, NULL, NULL, NULL, value);
  for (size_t i = 0; i < 4; i++)
    assert_near((double)value[i], (double)(x[i] * gamma[i]) / sqrt(8), 1e-6); /* 30/4 + 0.5 = 8 */
  args.quant = QTR_QUANT_INT8;
  args.norm = QTR_NORM_QSERVE; /* the mean 2.5 is taken away: -1.5, -0.5, 1, 0.75 over sqrt(8) */
  ops->rmsnorm(b, &args);
  assert_memory_equal(in->code, ((int8_t[]){-127, -42, 85, 64}), 4);
  assert_true(in->scale[0] == qtr_f16_round(qtr_f16_round(1.5f / sqrtf(8)) / 127));
  ops->input_free(b, in);
  ops->close(b);
}

static void test_kv_rows(void **state) {
  (void)state;
  uint8_t code[4];
  uint16_t scale, zero;
  /* scale (7 - -8)/15 = 1, zero 8 */
  qtr_kv_quant_row((float[]){-8, 7, 0.5f, -7.4f}, 4, 15, code, &scale, &zero);
  assert_int_equal(scale, 0x3c00);
  assert_int_equal(zero, 0x4800);
  assert_memory_equal(code, ((uint8_t[]){0, 15, 8, 1}), 4); /* 8.5 to even */
  /* constants come back exactly, whatever the levels */
  static const float constant[] = {0, 1, -1, 0.1f, 65504, -65504, 0x1p-24f, -0x1.ffcp-14f};
  for (size_t i = 0; i < sizeof constant / sizeof constant[0]; i++) {
    float c = qtr_f16_round(constant[i]);
    for (int levels = 15; levels <= 255; levels += 240) {
      qtr_kv_quant_row((float[]){c, c, c, c}, 4, levels, code, &scale, &zero);
      assert_true(qtr_kv_dequant(code[3], qtr_f16_to_f32(scale), qtr_f16_to_f32(zero)) == c);
    }
  }
  /* nearly flat, out of range, and no number at all: finite, and near */
  static const float hard[][2] = {{1, 1.0001f},    {-3e-6f, -2.9e-6f}, {60000, 60001},
                                  {-1e30f, 1e30f}, {NAN, 1},           {INFINITY, 2}};
  for (size_t i = 0; i < sizeof hard / sizeof hard[0]; i++) {
    for (int levels = 15; levels <= 255; levels += 240) {
      float low = qtr_kv_sane(hard[i][0]), high = qtr_kv_sane(hard[i][1]), max = fmaxf(fabsf(low), fabsf(high));
      qtr_kv_quant_row((float[]){hard[i][0], hard[i][1], hard[i][1], hard[i][0]}, 4, levels, code, &scale, &zero);
      float s = qtr_f16_to_f32(scale), z = qtr_f16_to_f32(zero);
      assert_true(s > 0 && isfinite(s) && isfinite(z));
      double bound = fmax((double)s, (double)max / 256);
      assert_true(fabs((double)qtr_kv_dequant(code[0], s, z) - (double)low) <= bound);
      assert_true(fabs((double)qtr_kv_dequant(code[1], s, z) - (double)high) <= bound);
    }
  }
}

static void test_kv_formats(void **state) {
  (void)state;
  struct qtr_backend *b = open_reference();
  float x[70 * 2 * 4], static_scale[4] = {9, 9, 0.5f, 0.25f}, scale, zero;
  for (size_t i = 0; i < 70 * 2 * 4; i++) x[i] = sinf((float)i) * 20;
  uint16_t code[4];
  for (int f = 0; f < QTR_N_KV_FORMATS; f++) {
    enum qtr_kv_format format = (enum qtr_kv_format)f;
    struct qtr_kv *kv = kv_fill(b, format, x, 70, 2, 4, static_scale, NULL);
    const float *row = x + (69 * 2 + 1) * 4; /* token 69 lies in page 1, slot 5 */
    ops->kv_read(b, kv, 1, true, 1, 5, 1, code, &scale, &zero);
    for (size_t i = 0; i < 4; i++) {
      double step = format == QTR_KV_F16 ? 0.0157 : (double)scale, back;
      switch (format) {
        case QTR_KV_F16: back = (double)qtr_f16_to_f32(code[i]); break;
        case QTR_KV_INT8_STATIC: back = (double)((int16_t)code[i]) * 0.25; break;
        default: back = (double)qtr_kv_dequant(code[i], scale, zero); break;
      }
      double expected = (double)row[i];
      assert_true(fabs(back - expected) <= step * 0.51 || (format == QTR_KV_INT8_STATIC && fabs(expected) > 31));
    }
    if (format == QTR_KV_INT8_STATIC) assert_true(scale == 0.25f);
    ops->kv_free(b, kv);
  }
  static_scale[1] = 0;
  struct qtr_kv_config config = {.format = QTR_KV_INT8_STATIC,
                                 .n_layers = 1,
                                 .n_kv_heads = 1,
                                 .head_dim = 4,
                                 .n_pages = 1,
                                 .static_scale = static_scale};
  struct qtr_kv *kv;
  assert_int_not_equal(ops->kv_create(b, &config, &kv, NULL), QTR_OK);
  ops->close(b);
}

/* Two sequences, two query heads on one KV head of 2: RoPE by a quarter turn, causality, and softmax by hand. */
static void test_attention_by_hand(void **state) {
  (void)state;
  struct qtr_backend *b = open_reference();
  struct qtr_kv_config config = {.format = QTR_KV_F16, .n_layers = 1, .n_kv_heads = 1, .head_dim = 2, .n_pages = 3};
  struct qtr_kv *kv = NULL;
  assert_int_equal(ops->kv_create(b, &config, &kv, NULL), QTR_OK);
  /* per token: q0 (2), q1 (2), k (2), v (2); the angle is position * pi/2 */
  float qkv[3][8] = {{1, 0, 0, 1, 1, 0, 10, 20}, {1, 0, 0, 1, 1, 0, 30, 60}, {5, 5, 5, 5, 1, 1, -1, -2}}, out[3][4],
        inv_freq[1];
  inv_freq[0] = 1.57079632679f;
  int32_t position[3] = {0, 1, 0}, start[3] = {0, 2, 3}, kv_len[2] = {0, 0}, table[2] = {2, 0};
  struct qtr_batch batch = {.n_tokens = 3,
                            .n_seqs = 2,
                            .max_blocks = 1,
                            .position = position,
                            .q_start = start,
                            .kv_len = kv_len,
                            .block_table = table};
  assert_int_equal(ops->begin_step(b, &batch, inv_freq, 1, NULL), QTR_OK);
  struct qtr_rope_kv_args rope = {.qkv = qkv, .kv = kv, .n_heads = 2, .n_kv_heads = 1, .head_dim = 2};
  ops->rope_kv_write(b, &rope);
  assert_near((double)qkv[1][0], 0, 1e-6); /* (1, 0) turned is (0, 1) */
  assert_near((double)qkv[1][1], 1, 1e-6);
  struct qtr_attention_args args = {
      .qkv = qkv, .kv = kv, .out = out, .scale = 2, .n_heads = 2, .n_kv_heads = 1, .head_dim = 2};
  ops->attention(b, &args);
  assert_int_equal(ops->end_step(b, NULL), QTR_OK);
  assert_memory_equal(out[0], ((float[]){10, 20, 10, 20}), sizeof out[0]); /* the first token sees only itself */
  assert_memory_equal(out[2], ((float[]){-1, -2, -1, -2}), sizeof out[2]);
  /* token 1: keys (1, 0) and (0, 1); head 0 asks (0, 1), head 1 asks (-1, 0): scores 0, 2 and -2, 0 */
  double p = exp(2) / (1 + exp(2)), expected = 10 * (1 - p) + 30 * p;
  assert_near((double)out[1][0], expected, 1e-3);
  assert_near((double)out[1][1], 2 * expected, 2e-3);
  assert_near((double)out[1][2], expected, 1e-3);
  ops->kv_free(b, kv);
  ops->close(b);
}

static void test_silu_by_hand(void **state) {
  (void)state;
  struct qtr_backend *b = open_reference();
  float gate_up[4] = {0, -100, 3, 2}, out[2];
  silu_run(b, gate_up, 1, 2, out);
  assert_true(out[0] == 0);
  assert_near((double)out[1], -200 * exp(-100), 1e-30);
  float one[2] = {2, 3};
  silu_run(b, one, 1, 1, out);
  assert_near((double)out[0], 6 / (1 + exp(-2)), 1e-6);
  ops->close(b);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_vector_packing),  cmocka_unit_test(test_vector_quant),
      cmocka_unit_test(test_vector_w4a8),     cmocka_unit_test(test_vector_g128),
      cmocka_unit_test(test_vector_w8a8),     cmocka_unit_test(test_vector_rms),
      cmocka_unit_test(test_vector_silu),     cmocka_unit_test(test_vector_pages),
      cmocka_unit_test(test_packing_example), cmocka_unit_test(test_linear_by_hand),
      cmocka_unit_test(test_linear_refuses),  cmocka_unit_test(test_quant_extremes),
      cmocka_unit_test(test_norm_by_hand),    cmocka_unit_test(test_kv_rows),
      cmocka_unit_test(test_kv_formats),      cmocka_unit_test(test_attention_by_hand),
      cmocka_unit_test(test_silu_by_hand),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
