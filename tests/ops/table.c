/* table.c - the one table of operations, shapes and formats that `check` and `perf` share, and the batches for the cache. */
#include <stdio.h>

#include "ops.h"

#define BIT(x) (1u << (x))
#define FLOATS (BIT(QTR_LINEAR_F32) | BIT(QTR_LINEAR_F16) | BIT(QTR_LINEAR_BF16))
#define W4 (BIT(QTR_LINEAR_W4A8) | BIT(QTR_LINEAR_W4A8_G128))
#define INTS (BIT(QTR_LINEAR_W8A8) | W4)
#define NO_GROUPS (FLOATS | BIT(QTR_LINEAR_W8A8) | BIT(QTR_LINEAR_W4A8))
#define KVS (BIT(QTR_N_KV_FORMATS) - 1)
#define NORMS (BIT(N_OP_NORM_FORMATS) - 1)
#define QUANTS (BIT(QTR_QUANT_NONE) | BIT(QTR_QUANT_INT8))
#define BOTH (OP_CHECK | OP_PERF)

/* n_out, n_in: one, two (gate and up) or three (q, k, v) parts */
#define LINEAR(name, use_, formats_, in, ep, tokens, ...)                                                                 \
  {                                                                                                                       \
    .kind = OP_LINEAR, .shape = name, .use = use_, .formats = formats_, .n_in = in, .epilogue = ep, .max_tokens = tokens, \
    .rows = {                                                                                                             \
      __VA_ARGS__                                                                                                         \
    }                                                                                                                     \
  }
#define BIASED(name, formats_, in, ep, tokens, ...)                                                     \
  {                                                                                                     \
    .kind = OP_LINEAR, .shape = name, .use = OP_CHECK, .formats = formats_, .n_in = in, .epilogue = ep, \
    .max_tokens = tokens, .bias = true, .wild = true, .rows = {                                         \
      __VA_ARGS__                                                                                       \
    }                                                                                                   \
  }
#define ROWS(op, name, use_, formats_, dim, tokens) \
  { .kind = op, .shape = name, .use = use_, .formats = formats_, .n_in = dim, .max_tokens = tokens }
#define HEADS(op, name, use_, heads, kv_heads, dim) \
  { .kind = op, .shape = name, .use = use_, .formats = KVS, .n_heads = heads, .n_kv_heads = kv_heads, .head_dim = dim }

/* KV heads that stream, their windows in prompts and in generation; ..: budget, interval, logical pages, who chooses */
#define SPARSE(name, use_, formats_, heads, kv_heads, dim, n, context_, decode_, ...)                             \
  {                                                                                                               \
    .kind = OP_SPARSE, .shape = name, .use = use_, .formats = formats_, .n_heads = heads, .n_kv_heads = kv_heads, \
    .head_dim = dim, .n_streaming = n, .sparse = {                                                                \
      .context = context_,                                                                                        \
      .decode = decode_,                                                                                          \
      __VA_ARGS__                                                                                                 \
    }                                                                                                             \
  }
#define WINDOW(sink, local) \
  { sink, local }
#define PAGES(budget_, interval_, logical, each) \
  .budget = budget_, .interval = interval_, .logical_tokens = logical, .each_head = each

#define STORE QTR_EPILOGUE_STORE
#define ADD QTR_EPILOGUE_ADD
#define SILU QTR_EPILOGUE_SILU_MUL
#define LOGITS QTR_EPILOGUE_LOGITS

const struct op_entry op_table[] = {
    ROWS(OP_QUANT, "odd-33", OP_CHECK, BIT(QTR_QUANT_NONE), 33, 9),
    ROWS(OP_QUANT, "tiny-32", OP_CHECK, QUANTS, 32, 9),
    ROWS(OP_QUANT, "tiny-96", OP_CHECK, QUANTS, 96, 9),
    ROWS(OP_QUANT, "demo-1408", OP_CHECK, QUANTS, 1408, 17),
    ROWS(OP_QUANT, "llama-1b-2048", BOTH, QUANTS, 2048, 17),
    ROWS(OP_QUANT, "llama-1b-8192", BOTH, QUANTS, 8192, 17),
    ROWS(OP_QUANT, "llama-8b-14336", BOTH, QUANTS, 14336, 17),

    ROWS(OP_NORM, "odd-33", OP_CHECK, BIT(OP_NORM_EXACT_FLOAT), 33, 9),
    ROWS(OP_NORM, "tiny-32", OP_CHECK, NORMS, 32, 9),
    ROWS(OP_NORM, "tiny-96", OP_CHECK, NORMS, 96, 9),
    ROWS(OP_NORM, "demo-512", OP_CHECK, NORMS, 512, 17),
    ROWS(OP_NORM, "vicuna-13b-5120", OP_CHECK, NORMS, 5120, 17),
    ROWS(OP_NORM, "llama-1b-2048", BOTH, NORMS, 2048, 17),
    ROWS(OP_NORM, "llama-8b-4096", BOTH, NORMS, 4096, 17),

    LINEAR("odd-1x1", OP_CHECK, FLOATS, 1, STORE, 5, 1),
    LINEAR("odd-5x3", OP_CHECK, FLOATS, 3, ADD, 33, 5),
    BIASED("odd-10x7", FLOATS, 7, STORE, 33, 3, 5, 2),
    BIASED("odd-34x33", FLOATS, 33, SILU, 33, 17, 17),
    BIASED("odd-129x257", FLOATS, 257, ADD, 65, 129),
    LINEAR("odd-300x100", OP_CHECK, FLOATS, 100, LOGITS, 100, 300),
    BIASED("tiny-32x32", NO_GROUPS, 32, STORE, 130, 32),
    BIASED("tiny-96x64", NO_GROUPS, 64, ADD, 130, 96),
    BIASED("tiny-128x96", NO_GROUPS, 96, STORE, 130, 32, 64, 32),
    BIASED("tiny-192x160", NO_GROUPS, 160, SILU, 130, 96, 96),
    BIASED("tiny-160x128", INTS, 128, LOGITS, 130, 160),
    BIASED("tiny-448x384", INTS, 384, SILU, 130, 224, 224),
    BIASED("tiny-288x640", INTS | FLOATS, 640, ADD, 130, 288),
    LINEAR("small-160x128", OP_CHECK, INTS, 128, STORE, 130, 160),
    LINEAR("small-448x384", OP_CHECK, INTS, 384, SILU, 130, 224, 224),
    LINEAR("small-128x640", OP_CHECK, INTS, 640, ADD, 130, 64, 32, 32),
    BIASED("demo.qkv", INTS | FLOATS, 512, STORE, 65, 1024, 512, 512),
    LINEAR("demo.o", OP_CHECK, INTS | FLOATS, 1024, ADD, 65, 512),
    LINEAR("demo.gate_up", OP_CHECK, INTS | FLOATS, 512, SILU, 65, 1408, 1408),
    LINEAR("demo.down", OP_CHECK, INTS | FLOATS, 1408, ADD, 65, 512),
    LINEAR("demo.logits", OP_CHECK, INTS | FLOATS, 512, LOGITS, 8, 8192),
    LINEAR("llama-1b.qkv", BOTH, INTS | FLOATS, 2048, STORE, 33, 2048, 512, 512),
    LINEAR("llama-1b.o", OP_PERF, INTS | BIT(QTR_LINEAR_BF16), 2048, ADD, 33, 2048),
    LINEAR("llama-1b.gate_up", BOTH, INTS, 2048, SILU, 33, 8192, 8192),
    LINEAR("llama-1b.gate_up", OP_PERF, BIT(QTR_LINEAR_BF16), 2048, SILU, 33, 8192, 8192),
    LINEAR("llama-1b.down", BOTH, INTS, 8192, ADD, 33, 2048),
    LINEAR("llama-1b.down", OP_PERF, BIT(QTR_LINEAR_BF16), 8192, ADD, 33, 2048),
    LINEAR("llama-1b.logits", OP_PERF, BIT(QTR_LINEAR_W8A8) | BIT(QTR_LINEAR_BF16), 2048, LOGITS, 8, 128256),
    LINEAR("llama-8b.qkv", BOTH, INTS, 4096, STORE, 8, 4096, 1024, 1024),
    LINEAR("llama-8b.gate_up", OP_PERF, INTS, 4096, SILU, 8, 14336, 14336),
    LINEAR("llama-8b.down", BOTH, W4, 14336, ADD, 8, 4096),
    LINEAR("llama-8b.o", OP_PERF_GPU, INTS, 4096, ADD, 8, 4096),
    LINEAR("llama-8b.down", OP_PERF_GPU, BIT(QTR_LINEAR_W8A8), 14336, ADD, 8, 4096),
    LINEAR("llama-8b.logits", OP_PERF_GPU, BIT(QTR_LINEAR_W8A8) | BIT(QTR_LINEAR_F16), 4096, LOGITS, 8, 128256),

    HEADS(OP_KV_WRITE, "tiny-3/1x8", OP_CHECK, 3, 1, 8),
    HEADS(OP_KV_WRITE, "tiny-2/2x32", OP_CHECK, 2, 2, 32),
    HEADS(OP_KV_WRITE, "odd-4/2x80", OP_CHECK | OP_CHECK_LONG, 4, 2, 80),
    HEADS(OP_KV_WRITE, "llama-1b-32/8x64", BOTH | OP_CHECK_LONG, 32, 8, 64),
    HEADS(OP_KV_WRITE, "demo-8/4x128", BOTH, 8, 4, 128),
    HEADS(OP_KV_WRITE, "llama-8b-32/8x128", OP_CHECK | OP_CHECK_LONG, 32, 8, 128),

    HEADS(OP_ATTENTION, "tiny-3/1x8", OP_CHECK, 3, 1, 8),
    HEADS(OP_ATTENTION, "tiny-10/2x16", OP_CHECK, 10, 2, 16),
    HEADS(OP_ATTENTION, "tiny-2/2x32", OP_CHECK, 2, 2, 32),
    HEADS(OP_ATTENTION, "odd-8/1x80", OP_CHECK, 8, 1, 80),
    HEADS(OP_ATTENTION, "odd-16/1x96", OP_CHECK, 16, 1, 96),
    HEADS(OP_ATTENTION, "qwen-0.5b-14/2x64", OP_CHECK, 14, 2, 64),
    HEADS(OP_ATTENTION, "llama-1b-32/8x64", BOTH, 32, 8, 64),
    HEADS(OP_ATTENTION, "demo-8/4x128", BOTH, 8, 4, 128),
    HEADS(OP_ATTENTION, "llama-8b-32/8x128", OP_PERF, 32, 8, 128),
    HEADS(OP_ATTENTION, "llama2-4/4x128", OP_CHECK, 4, 4, 128),

    SPARSE("tiny-3/1x8.choice", OP_CHECK, KVS, 3, 1, 8, 0, WINDOW(0, 1), WINDOW(0, 1), PAGES(192, 4, 16, false)),
    SPARSE("odd-8/1x80.choice", OP_CHECK, BIT(QTR_KV_F16) | BIT(QTR_KV_INT4), 8, 1, 80, 0, WINDOW(0, 1), WINDOW(0, 1),
           PAGES(256, 3, 32, false)),
    SPARSE("odd-4/4x80.each", OP_CHECK, BIT(QTR_KV_INT8) | BIT(QTR_KV_INT8_STATIC), 4, 4, 80, 3, WINDOW(70, 90),
           WINDOW(3, 33), PAGES(192, 4, 16, true)),
    SPARSE("llama-1b-32/8x64.half", OP_CHECK | OP_CHECK_LONG, KVS, 32, 8, 64, 4, WINDOW(128, 100), WINDOW(64, 128),
           PAGES(192, 4, 16, false)),
    SPARSE("mpt-16/2x64.half-each", OP_CHECK, BIT(QTR_KV_F16) | BIT(QTR_KV_INT4), 16, 2, 64, 1, WINDOW(0, 64), WINDOW(0, 65),
           PAGES(320, 1, 64, true)),
    SPARSE("phi-4/4x64.all-stream", OP_CHECK, BIT(QTR_KV_INT8) | BIT(QTR_KV_INT4), 4, 4, 64, 4, WINDOW(1, 1),
           WINDOW(130, 63), PAGES(0, 0, 0, false)),
    SPARSE("demo-8/4x128.half", OP_CHECK, KVS, 8, 4, 128, 2, WINDOW(64, 256), WINDOW(128, 64), PAGES(256, 4, 16, false)),
    SPARSE("llama2-4/4x128.choice-each", OP_CHECK, BIT(QTR_KV_F16) | BIT(QTR_KV_INT8), 4, 4, 128, 0, WINDOW(0, 1),
           WINDOW(0, 1), PAGES(192, 5, 32, true)),
    SPARSE("mpt-8/1x128.choice", OP_CHECK, BIT(QTR_KV_INT4) | BIT(QTR_KV_INT8_STATIC), 8, 1, 128, 0, WINDOW(0, 1),
           WINDOW(0, 1), PAGES(64, 2, 16, false)),
    SPARSE("demo-8/4x128.dense-prompts", OP_CHECK, BIT(QTR_KV_INT4) | BIT(QTR_KV_INT8), 8, 4, 128, 1,
           WINDOW(0, QTR_ALL_TOKENS), WINDOW(5, 300), PAGES(0, 0, 0, false)),
    SPARSE("llama-8b-32/8x128.half", OP_PERF, BIT(QTR_KV_INT4), 32, 8, 128, 4, WINDOW(128, 256), WINDOW(128, 256),
           PAGES(4096, 4, 16, false)),

    ROWS(OP_EMBED, "demo-512", OP_CHECK, BIT(QTR_DTYPE_F32) | BIT(QTR_DTYPE_F16) | BIT(QTR_DTYPE_BF16) | BIT(QTR_DTYPE_I8),
         512, 33),
    ROWS(OP_EMBED, "odd-7", OP_CHECK, BIT(QTR_DTYPE_F32) | BIT(QTR_DTYPE_F16) | BIT(QTR_DTYPE_BF16) | BIT(QTR_DTYPE_I8), 7,
         33),
    ROWS(OP_GATHER, "demo-512", OP_CHECK, BIT(0), 512, 33),
    ROWS(OP_GATHER, "odd-7", OP_CHECK, BIT(0), 7, 33),
};
const size_t n_op_table = sizeof op_table / sizeof op_table[0];

const size_t op_check_tokens[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 100, 128, 130};
const size_t n_op_check_tokens = sizeof op_check_tokens / sizeof op_check_tokens[0];
const size_t op_perf_tokens[] = {1, 2, 3, 4, 5, 7, 8, 16, 17, 31, 32, 33, 64, 100, 128, 512, 256, 1024, 4096, 8192};
const size_t n_op_perf_tokens_host = 16;
const size_t n_op_perf_tokens = sizeof op_perf_tokens / sizeof op_perf_tokens[0];

#define ALL QTR_ALL_TOKENS /* given tokens only */
const struct op_pattern op_patterns[] = {
    {"decode",
     OP_CHECK,
     1,
     7,
     {{0, 1, ALL}, {1, 1, ALL}, {63, 1, ALL}, {64, 1, ALL}, {65, 1, ALL}, {200, 1, ALL}, {1000, 1, ALL}}},
    {"prefill", OP_CHECK, 1, 5, {{0, 1, ALL}, {0, 63, ALL}, {0, 64, ALL}, {0, 65, ALL}, {0, 100, ALL}}},
    {"chunks", OP_CHECK, 1, 6, {{1, 5, ALL}, {63, 2, ALL}, {64, 33, ALL}, {65, 64, ALL}, {200, 17, ALL}, {1000, 3, ALL}}},
    {"mixed",
     OP_CHECK,
     1,
     7,
     {{0, 17, ALL}, {1000, 1, ALL}, {65, 2, ALL}, {200, 31, ALL}, {63, 1, ALL}, {0, 1, ALL}, {64, 100, ALL}}},
    {"long", OP_CHECK_LONG, 1, 5, {{0, 600, ALL}, {191, 1, ALL}, {65, 40, ALL}, {1000, 1, ALL}, {0, 1, ALL}}},
    {"decode 1 x 1024", OP_PERF, 1, 1, {{1023, 1, ALL}}},
    {"decode 1 x 4096", OP_PERF, 1, 1, {{4095, 1, ALL}}},
    {"decode 8 x 1024", OP_PERF, 8, 1, {{1023, 1, ALL}}},
    {"decode 32 x 192", OP_PERF, 32, 1, {{191, 1, ALL}}},
    {"decode 32 x 1024", OP_PERF, 32, 1, {{1023, 1, ALL}}},
    {"decode 256 x 1124", OP_PERF_GPU, 256, 1, {{1123, 1, ALL}}},
    {"decode 64 x 4096", OP_PERF_GPU, 64, 1, {{4095, 1, ALL}}},
    {"decode 1 x 131072", OP_PERF_GPU, 1, 1, {{131071, 1, ALL}}},
    {"prefill 8 x 1024", OP_PERF_GPU, 8, 1, {{0, 1024, ALL}}},
    {"prefill 2 x 8192", OP_PERF_GPU, 2, 1, {{0, 8192, ALL}}},
    {"prefill 512", OP_PERF, 1, 1, {{0, 512, ALL}}},
    {"prefill 512 after 3584", OP_PERF, 1, 1, {{3584, 512, ALL}}},
    {"prefill 224 + decode 1024", OP_PERF, 1, 2, {{0, 224, ALL}, {1023, 1, ALL}}},
};
const size_t n_op_patterns = sizeof op_patterns / sizeof op_patterns[0];

/* Checks: given tokens, generated ones, and both in a chunk, around pages and budgets. Times: the last tokens of one
 * context, or of several; a token of decode has a choice of pages if its position + 1 is a multiple of the interval. */
const struct op_pattern op_sparse_patterns[] = {
    {"decode",
     OP_CHECK,
     1,
     11,
     {{0, 1, ALL},
      {1, 1, 1},
      {63, 1, 60},
      {64, 1, 64},
      {191, 1, 190},
      {192, 1, 100},
      {193, 1, 190},
      {255, 1, 0},
      {1000, 1, 1000},
      {1000, 1, 997},
      {766, 1, 500}}},
    {"prefill", OP_CHECK, 1, 4, {{0, 63, ALL}, {0, 64, 64}, {0, 65, ALL}, {0, 300, ALL}}},
    {"chunks", OP_CHECK, 1, 6, {{1, 5, ALL}, {63, 2, 65}, {64, 33, ALL}, {200, 64, ALL}, {500, 40, 540}, {900, 3, ALL}}},
    {"replay", OP_CHECK, 1, 5, {{1, 4, 1}, {185, 20, 90}, {300, 33, 300}, {637, 6, 500}, {60, 10, 60}}},
    {"mixed",
     OP_CHECK,
     1,
     8,
     {{0, 100, 50},
      {250, 20, 257},
      {300, 33, 310},
      {900, 1, ALL},
      {640, 1, 300},
      {0, 17, ALL},
      {60, 10, 64},
      {310, 13, 320}}},
    {"long", OP_CHECK_LONG, 1, 5, {{640, 1, 300}, {0, 530, ALL}, {193, 1, 190}, {900, 1, ALL}, {207, 1, 100}}},
    {"decode 1 x 8192", OP_PERF, 1, 1, {{8191, 1, 8000}}},
    {"decode 1 x 16384", OP_PERF, 1, 1, {{16383, 1, 16000}}},
    {"decode 1 x 32768", OP_PERF_GPU, 1, 1, {{32767, 1, 32000}}},
    {"decode 1 x 65536", OP_PERF_GPU, 1, 1, {{65535, 1, 65000}}},
    {"decode 1 x 131072", OP_PERF_GPU, 1, 1, {{131071, 1, 131000}}},
    {"decode 1 x 262144", OP_PERF_GPU, 1, 1, {{262143, 1, 262000}}},
    {"decode 1 x 524288", OP_PERF_GPU, 1, 1, {{524287, 1, 524000}}},
    {"decode 16 x 65536", OP_PERF_GPU, 16, 1, {{65535, 1, 65000}}},
    {"prefill 512 after 3584", OP_PERF, 1, 1, {{3584, 512, ALL}}},
    {"prefill 8192 after 24576", OP_PERF_GPU, 1, 1, {{24576, 8192, ALL}}},
    {"prefill 8192 after 122880", OP_PERF_GPU, 1, 1, {{122880, 8192, ALL}}},
};
const size_t n_op_sparse_patterns = sizeof op_sparse_patterns / sizeof op_sparse_patterns[0];

size_t op_n_parts(const struct op_entry *e) {
  size_t n = 0;
  while (n < QTR_MAX_PARTS && e->rows[n]) n++;
  return n;
}

size_t op_n_out(const struct op_entry *e) { return e->rows[0] + e->rows[1] + e->rows[2]; }

size_t op_out_width(const struct op_entry *e) { return op_n_out(e) / (e->epilogue == QTR_EPILOGUE_SILU_MUL ? 2 : 1); }

void op_name(const struct op_entry *e, unsigned format, char *out, size_t n) {
  static const char *const kinds[N_OP_KINDS] = {"quant",     "norm",   "linear", "kv_write",
                                                "attention", "sparse", "embed",  "gather"};
  static const char *const norms[N_OP_NORM_FORMATS] = {"exact-float", "exact-int8", "qserve-int8"};
  const char *name = "f32";
  switch (e->kind) {
    case OP_QUANT: name = format == QTR_QUANT_INT8 ? "int8" : "none"; break;
    case OP_NORM: name = norms[format]; break;
    case OP_LINEAR: name = qtr_linear_format_name((enum qtr_linear_format)format); break;
    case OP_KV_WRITE:
    case OP_ATTENTION:
    case OP_SPARSE: name = qtr_kv_format_name((enum qtr_kv_format)format); break;
    case OP_EMBED: name = qtr_dtype_name((enum qtr_dtype)format); break;
    default: break;
  }
  (void)snprintf(out, n, "%s/%s/%s", kinds[e->kind], name, e->shape);
}
