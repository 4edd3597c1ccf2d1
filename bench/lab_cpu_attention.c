/* lab_cpu_attention.c - times of RoPE + KV write and of attention on the CPU backend alone, for the shapes that decide
 * (NOTES.md, "CPU attention"). Pages of each sequence are scattered; every repetition uses another layer, so the cache comes
 * from memory. Prints the median over repetitions for one layer, times n_layers, and the bytes of KV a second.
 *
 *   ninja -C build && cc -std=c11 -O2 -D_GNU_SOURCE -Isrc -Iinclude bench/lab_cpu_attention.c -o build/lab_cpu_attention \
 *     build/libqtr_backend.a build/libqtr_backend_cpu.a build/libqtr_backend_reference.a build/libqtr_checkpoint.a \
 *     build/libqtr_backend_common.a build/libqtr_base.a -ljansson -larchive -fopenmp -lm
 *   build/lab_cpu_attention [isa [threads [filter]]] */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/backend.h"
#include "base/clock.h"

struct workload {
  const char *name;
  int32_t n_layers, n_heads, n_kv_heads, dim, n_seqs, q_len, kv_len;
};

static const struct workload workloads[] = {
    {"1B decode 1 @4096", 16, 32, 8, 64, 1, 1, 4095},       {"1B decode 32 @160", 16, 32, 8, 64, 32, 1, 159},
    {"1B decode 64 @1024", 16, 32, 8, 64, 64, 1, 1023},     {"1B prefill 512", 16, 32, 8, 64, 1, 512, 0},
    {"1B prefill 512 @3584", 16, 32, 8, 64, 1, 512, 3584},  {"8B decode 1 @4096", 32, 32, 8, 128, 1, 1, 4095},
    {"8B decode 16 @1024", 32, 32, 8, 128, 16, 1, 1023},    {"8B prefill 512", 32, 32, 8, 128, 1, 512, 0},
    {"7B MHA decode 1 @4096", 32, 32, 32, 128, 1, 1, 4095},
};

static int compare(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}
static double median(double *x, size_t n) {
  qsort(x, n, sizeof *x, compare);
  return x[n / 2];
}

static uint32_t state = 1;
static float uniform(void) {
  state = state * 1664525u + 1013904223u;
  return (float)(int32_t)state * 0x1p-31f;
}

static void check(enum qtr_status status, const struct qtr_error *err) {
  if (status == QTR_OK) return;
  (void)fprintf(stderr, "%s\n", err->message);
  exit(1);
}

static void run(struct qtr_backend *b, const struct workload *w, enum qtr_kv_format format) {
  enum { LAYERS = 8, ROUNDS = 5 };
  struct qtr_error err;
  int32_t total = w->kv_len + w->q_len, blocks = (total + QTR_PAGE_TOKENS - 1) / QTR_PAGE_TOKENS,
          n_pages = blocks * w->n_seqs;
  float scales[2 * LAYERS];
  for (int i = 0; i < 2 * LAYERS; i++) scales[i] = 0.01f;
  struct qtr_kv_config config = {format, LAYERS, w->n_kv_heads, w->dim, n_pages, scales};
  struct qtr_kv *kv;
  check(b->ops->kv_create(b, &config, &kv, &err), &err);

  int32_t *table = malloc((size_t)n_pages * sizeof *table);
  for (int32_t i = 0; i < n_pages; i++) table[i] = i;
  for (int32_t i = n_pages - 1; i > 0; i--) {
    state = state * 1664525u + 1013904223u;
    int32_t j = (int32_t)(state >> 8) % (i + 1), x = table[i];
    table[i] = table[j];
    table[j] = x;
  }
  int32_t width = (w->n_heads + 2 * w->n_kv_heads) * w->dim, chunk = 512;
  float inv_freq[256];
  for (int32_t i = 0; i < w->dim / 2; i++) inv_freq[i] = powf(500000.0f, -2.0f * (float)i / (float)w->dim);
  int32_t n_tokens = w->n_seqs * w->q_len, room = n_tokens > chunk ? n_tokens : chunk;
  int32_t *position = malloc((size_t)room * sizeof *position), *token = calloc((size_t)room, sizeof *token);
  int32_t *q_start = malloc((size_t)(w->n_seqs + 1) * sizeof *q_start), *kv_len = malloc((size_t)w->n_seqs * sizeof *kv_len);
  void *qkv, *out;
  check(b->ops->alloc(b, (size_t)(room * width) * sizeof(float), &qkv, &err), &err);
  check(b->ops->alloc(b, (size_t)(room * w->n_heads * w->dim) * sizeof(float), &out, &err), &err);
  for (int32_t i = 0; i < room * width; i++) ((float *)qkv)[i] = uniform();

  /* Fill the cache, one sequence at a time. */
  for (int32_t s = 0; s < w->n_seqs; s++) {
    for (int32_t at = 0; at < w->kv_len; at += chunk) {
      int32_t n = w->kv_len - at < chunk ? w->kv_len - at : chunk, starts[2] = {0, n};
      for (int32_t i = 0; i < n; i++) position[i] = at + i;
      struct qtr_batch batch = {.n_tokens = n,
                                .n_seqs = 1,
                                .max_blocks = blocks,
                                .token = token,
                                .position = position,
                                .q_start = starts,
                                .kv_len = &at,
                                .block_table = table + s * blocks};
      check(b->ops->begin_step(b, &batch, inv_freq, (size_t)w->dim / 2, &err), &err);
      for (int32_t layer = 0; layer < LAYERS; layer++) {
        struct qtr_rope_kv_args rope = {qkv, kv, layer, w->n_heads, w->n_kv_heads, w->dim};
        b->ops->rope_kv_write(b, &rope);
      }
      check(b->ops->end_step(b, &err), &err);
    }
  }

  for (int32_t s = 0; s <= w->n_seqs; s++) q_start[s] = s * w->q_len;
  for (int32_t s = 0; s < w->n_seqs; s++) {
    kv_len[s] = w->kv_len;
    for (int32_t i = 0; i < w->q_len; i++) position[s * w->q_len + i] = w->kv_len + i;
  }
  struct qtr_batch batch = {.n_tokens = n_tokens,
                            .n_seqs = w->n_seqs,
                            .max_blocks = blocks,
                            .token = token,
                            .position = position,
                            .q_start = q_start,
                            .kv_len = kv_len,
                            .block_table = table};
  check(b->ops->begin_step(b, &batch, inv_freq, (size_t)w->dim / 2, &err), &err);
  double write[LAYERS * ROUNDS], read[LAYERS * ROUNDS];
  for (int r = 0; r < LAYERS * ROUNDS; r++) {
    int32_t layer = r % LAYERS;
    struct qtr_rope_kv_args rope = {qkv, kv, layer, w->n_heads, w->n_kv_heads, w->dim};
    struct qtr_attention_args args = {qkv, kv, out, 1.0f / sqrtf((float)w->dim), layer, w->n_heads, w->n_kv_heads, w->dim};
    double t = qtr_now();
    b->ops->rope_kv_write(b, &rope);
    double u = qtr_now();
    b->ops->attention(b, &args);
    write[r] = u - t;
    read[r] = qtr_now() - u;
  }
  check(b->ops->end_step(b, &err), &err);
  struct qtr_kv_config one = config;
  one.n_layers = 1;
  double bytes = (double)qtr_kv_page_bytes(&one) / QTR_PAGE_TOKENS * total * w->n_seqs;
  double attention = median(read, LAYERS * ROUNDS), fastest = read[0], writing = median(write, LAYERS * ROUNDS);
  double flops = 4.0 * w->n_heads * w->dim * w->n_seqs * ((double)w->q_len * w->kv_len + 0.5 * w->q_len * (w->q_len + 1));
  printf(
      "%-22s %-10s write %8.1f us (best %8.1f)  attention %9.1f us (best %9.1f, all layers %8.2f ms, %5.1f GB/s, %6.1f "
      "GFLOP/s)\n",
      w->name, qtr_kv_format_name(format), writing * 1e6, write[0] * 1e6, attention * 1e6, fastest * 1e6,
      fastest * 1e3 * w->n_layers, bytes / fastest * 1e-9, flops / fastest * 1e-9);
  b->ops->kv_free(b, kv);
  b->ops->free(b, qkv);
  b->ops->free(b, out);
  free(table);
  free(position);
  free(token);
  free(q_start);
  free(kv_len);
}

int main(int argc, char **argv) {
  struct qtr_backend_options options = {.isa = argc > 1 ? argv[1] : NULL, .threads = argc > 2 ? atoi(argv[2]) : 0};
  struct qtr_backend *b;
  struct qtr_error err;
  check(qtr_backend_cpu.open(&options, &b, &err), &err);
  struct qtr_caps caps;
  b->ops->caps(b, &caps);
  printf("%s\n", caps.description);
  for (size_t i = 0; i < sizeof workloads / sizeof *workloads; i++) {
    for (int f = 0; f < QTR_N_KV_FORMATS; f++) {
      char name[64];
      (void)snprintf(name, sizeof name, "%s %s", workloads[i].name, qtr_kv_format_name((enum qtr_kv_format)f));
      if (argc > 3 && !strstr(name, argv[3])) continue;
      run(b, &workloads[i], (enum qtr_kv_format)f);
    }
  }
  b->ops->close(b);
  return 0;
}
