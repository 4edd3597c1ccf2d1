/* lab_cpu_linear.c - laboratory of the CPU backend's matrices: all linears of a Llama-3.2-1B shaped model (16 layers and the
 * int8 head, about 0.76 GB of weights, so that caches help as little as in a real step), one after another, with the norms
 * and quantisations between them; no attention. Prints for each operation the median time, its share of the DRAM read rate
 * measured in the same run, and operations a second. Outcomes are logged in bench/NOTES.md.
 *
 *     cc -O2 -D_GNU_SOURCE -Isrc -Iinclude bench/lab_cpu_linear.c -o lab -LBUILD -lqtr_backend
 * -lqtr_backend_reference -lqtr_backend_cpu -lqtr_checkpoint -lqtr_backend_common -lqtr_base -ljansson -larchive -lm
 * -lpthread
 *     ./lab [format: w4a8-g128 | w4a8 | w8a8 | bf16] [tokens,tokens,...] [isa] [rounds] [layers] */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/backend.h"
#include "base/clock.h"
#include "base/threads.h"

enum {
  HIDDEN = 2048,
  INNER = 8192,
  VOCABULARY = 128256,
  MAX_LAYERS = 16,
  MAX_ROUNDS = 64,
  MAX_SAMPLES = MAX_ROUNDS * MAX_LAYERS
};
enum op { NORM, QKV, QUANT_O, O, GATE_UP, QUANT_DOWN, DOWN, HEAD, STEP, N_OPS };
static const struct {
  const char *name;
  size_t n_in, n_out;
} ops[N_OPS] = {[NORM] = {"norm", HIDDEN, 0},
                [QKV] = {"qkv", HIDDEN, 3072},
                [QUANT_O] = {"quant o", HIDDEN, 0},
                [O] = {"o", HIDDEN, HIDDEN},
                [GATE_UP] = {"gate_up", HIDDEN, 2 * INNER},
                [QUANT_DOWN] = {"quant down", INNER, 0},
                [DOWN] = {"down", INNER, HIDDEN},
                [HEAD] = {"head", HIDDEN, VOCABULARY},
                [STEP] = {"step", 0, 0}};

static struct {
  double us[MAX_SAMPLES];
  size_t n;
} samples[N_OPS];

static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static double median(enum op op) {
  qsort(samples[op].us, samples[op].n, sizeof(double), ascending);
  return samples[op].n ? samples[op].us[samples[op].n / 2] : 0;
}

static void note(enum op op, double start) {
  if (samples[op].n < MAX_SAMPLES) samples[op].us[samples[op].n++] = (qtr_now() - start) * 1e6;
}

static void die(const struct qtr_error *err) {
  (void)fprintf(stderr, "%s\n", err->message);
  exit(1);
}

enum { PIECE = 1 << 20 };

static void read_pieces(void *arg, size_t begin, size_t end, int thread) {
  (void)thread;
  uint64_t sum = 0;
  for (size_t i = begin * PIECE; i < end * PIECE; i += 64) sum += *(const uint64_t *)(const void *)((const char *)arg + i);
  if (sum == 42) puts("42");
}

/* GB/s of all threads reading n_bytes, one word of each cache line. */
static double dram_rate(struct qtr_threads *team, void *data, size_t n_bytes) {
  double best = 0;
  for (int round = 0; round < 5; round++) {
    double start = qtr_now();
    qtr_threads_for(team, n_bytes / PIECE, 8, read_pieces, data);
    double rate = (double)n_bytes * 1e-9 / (qtr_now() - start);
    best = rate > best ? rate : best;
  }
  return best;
}

int main(int argc, char **argv) {
  const char *format_name = argc > 1 ? argv[1] : "w4a8-g128";
  char *tokens = argc > 2 ? argv[2] : (char[]){"1,8,32,512"};
  int n_rounds = argc > 4 ? atoi(argv[4]) : 7;
  size_t n_layers = argc > 5 ? (size_t)atoi(argv[5]) : MAX_LAYERS;
  enum qtr_linear_format format = QTR_N_LINEAR_FORMATS;
  for (int f = 0; f < QTR_N_LINEAR_FORMATS; f++) {
    if (strcmp(format_name, qtr_linear_format_name((enum qtr_linear_format)f)) == 0) format = (enum qtr_linear_format)f;
  }
  if (format == QTR_N_LINEAR_FORMATS || n_layers > MAX_LAYERS || n_rounds > MAX_ROUNDS) return 1;
  struct qtr_error err;
  struct qtr_backend *b;
  if (qtr_backend_open("cpu", &(struct qtr_backend_options){.isa = argc > 3 && *argv[3] ? argv[3] : NULL}, &b, &err))
    die(&err);
  struct qtr_caps caps;
  b->ops->caps(b, &caps);

  size_t n_random = (size_t)VOCABULARY * HIDDEN / 8;
  uint64_t *random = malloc(n_random * 8), seed = 1;
  for (size_t i = 0; i < n_random; i++) random[i] = seed = (seed ^ seed << 13) * 0x9e3779b97f4a7c15u ^ seed >> 7;
  if (format < QTR_LINEAR_W8A8) { /* floats must be sane: below 2 in bf16 and fp16 */
    for (size_t i = 0; i < n_random; i++) random[i] &= 0xbf7fbf7fbf7fbf7fu;
  }
  float *floats = malloc(VOCABULARY * sizeof *floats);
  for (size_t i = 0; i < VOCABULARY; i++) floats[i] = 0.001f + (float)(i % 7) * 1e-4f;
  uint8_t *s2 = malloc(INNER / 128 * 2 * INNER), *zero = malloc(INNER / 128 * 2 * INNER);
  for (size_t i = 0; i < INNER / 128 * 2 * INNER; i++) {
    s2[i] = (uint8_t)(1 + random[i] % 16);
    zero[i] = (uint8_t)(256 - 8 * s2[i]);
  }
  struct qtr_linear *linear[MAX_LAYERS][N_OPS] = {0};
  size_t bytes[N_OPS] = {0};
  double start = qtr_now();
  for (size_t layer = 0; layer < n_layers; layer++) {
    for (enum op op = NORM; op < STEP; op++) {
      if (ops[op].n_out == 0 || (op == HEAD && layer)) continue;
      bool gate_up = op == GATE_UP;
      struct qtr_linear_part part = {ops[op].n_out / (gate_up ? 2 : 1), random, floats, floats, s2, zero, NULL};
      struct qtr_linear_source source = {op == HEAD && format >= QTR_LINEAR_W8A8 ? QTR_LINEAR_W8A8 : format,
                                         ops[op].n_in,
                                         gate_up ? 2 : 1,
                                         {part, part},
                                         gate_up,
                                         false};
      if (b->ops->linear_create(b, &source, &linear[layer][op], &err)) die(&err);
      bytes[op] = b->ops->linear_bytes(linear[layer][op]);
    }
  }
  size_t total = bytes[HEAD] + n_layers * (bytes[QKV] + bytes[O] + bytes[GATE_UP] + bytes[DOWN]);
  double seconds = qtr_now() - start;
  void *memory;
  struct qtr_threads *team;
  if (qtr_threads_create(caps.threads, &team, &err)) die(&err);
  if (b->ops->alloc(b, (size_t)1 << 29, &memory, &err)) die(&err);
  memset(memory, 1, (size_t)1 << 29);
  double rate = dram_rate(team, memory, (size_t)1 << 29);
  b->ops->free(b, memory);
  qtr_threads_free(team);
  printf("%s; %s, %.0f MB of weights repacked in %.2f s; DRAM read %.1f GB/s\n", caps.description, format_name,
         (double)total / 1e6, seconds, rate);

  for (char *t = strtok(tokens, ","); t; t = strtok(NULL, ",")) {
    size_t n = (size_t)atoi(t);
    struct qtr_input *input;
    void *x, *wide, *logits, *weight;
    enum qtr_quant quant = qtr_linear_quant(format);
    if (b->ops->input_create(b, n, INNER, &input, &err) || b->ops->alloc(b, n * HIDDEN * 4, &x, &err) ||
        b->ops->alloc(b, n * INNER * 4, &wide, &err) || b->ops->alloc(b, n * VOCABULARY * 4, &logits, &err) ||
        b->ops->alloc(b, HIDDEN * 4, &weight, &err)) {
      die(&err);
    }
    for (size_t i = 0; i < HIDDEN; i++) ((float *)weight)[i] = 1;
    memset(samples, 0, sizeof samples);
    struct qtr_rmsnorm_args norm = {x, weight, input, quant, QTR_NORM_EXACT, 1e-5f, n, HIDDEN};
    for (int round = -1; round < n_rounds; round++) {
      if (round == 0) memset(samples, 0, sizeof samples);
      for (size_t i = 0; i < n * HIDDEN; i++) ((float *)x)[i] = (float)(random[i % n_random] % 1000) / 1000 - 0.5f;
      double s, step = qtr_now();
#define TIMED(op, call) s = qtr_now(), call, note(op, s)
#define LINEAR(op, epilogue, out) b->ops->linear(b, &(struct qtr_linear_args){linear[l][op], input, epilogue, out, n})
      for (size_t l = 0; l < n_layers; l++) {
        TIMED(NORM, b->ops->rmsnorm(b, &norm));
        TIMED(QKV, LINEAR(QKV, QTR_EPILOGUE_STORE, wide));
        TIMED(QUANT_O, b->ops->quant(b, &(struct qtr_quant_args){wide, input, quant, n, HIDDEN}));
        TIMED(O, LINEAR(O, QTR_EPILOGUE_ADD, x));
        TIMED(NORM, b->ops->rmsnorm(b, &norm));
        TIMED(GATE_UP, LINEAR(GATE_UP, QTR_EPILOGUE_SILU_MUL, wide));
        TIMED(QUANT_DOWN, b->ops->quant(b, &(struct qtr_quant_args){wide, input, quant, n, INNER}));
        TIMED(DOWN, LINEAR(DOWN, QTR_EPILOGUE_ADD, x));
      }
      if (n <= 64) {
        size_t l = 0;
        b->ops->rmsnorm(b, &norm);
        TIMED(HEAD, LINEAR(HEAD, QTR_EPILOGUE_LOGITS, logits));
      }
      note(STEP, step);
    }
    printf("%zu tokens\n", n);
    double step_ops = 0;
    for (enum op op = NORM; op < STEP; op++) {
      double us = median(op), work = 2.0 * (double)ops[op].n_in * (double)ops[op].n_out * (double)n;
      step_ops += samples[op].n ? work * (op == HEAD ? 1 : (double)n_layers) : 0;
      printf("  %-10s %9.1f us", ops[op].name, us);
      if (bytes[op] && us > 0) {
        printf("  %6.1f GB/s of weights (%3.0f %% of DRAM)  %6.2f TOP/s", (double)bytes[op] / us / 1e3,
               (double)bytes[op] / us / 1e1 / rate, work / us / 1e6);
      }
      putchar('\n');
    }
    double us = median(STEP);
    printf("  %-10s %9.1f us  %6.1f GB/s of weights (%3.0f %% of DRAM)  %6.2f TOP/s  %.1f tok/s\n", "step", us,
           (double)total / us / 1e3, (double)total / us / 1e1 / rate, step_ops / us / 1e6, (double)n * 1e6 / us);
    b->ops->free(b, x);
    b->ops->free(b, wide);
    b->ops->free(b, logits);
    b->ops->free(b, weight);
    b->ops->input_free(b, input);
  }
  return 0;
}
