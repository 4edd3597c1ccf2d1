/* ceiling.c - what this machine can do at best with the threads given: a DRAM read stream, and int8 dot products from
 * registers. */
#include <pthread.h>
#include <stdio.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#endif

#include "base/clock.h"
#include "ops.h"

enum { MAX_THREADS = 256, READ_MIB = 256 };

struct job {
  pthread_t thread;
  const uint64_t *data;
  size_t n;
  double (*kernel)(double seconds); /* returns operations a second */
  double result;
};

static void run_all(struct job *job, int n, void *(*body)(void *)) {
  int started = 0;
  while (started < n && pthread_create(&job[started].thread, NULL, body, &job[started]) == 0) started++;
  for (int i = 0; i < started; i++) (void)pthread_join(job[i].thread, NULL);
}

/* Sums a buffer; sixteen independent sums keep the loads in flight. */
static void *read_body(void *arg) {
  struct job *job = arg;
  uint64_t sum[16] = {0}, all = 0;
  for (size_t i = 0; i + 16 <= job->n; i += 16) {
    for (size_t j = 0; j < 16; j++) sum[j] += job->data[i + j];
  }
  for (size_t j = 0; j < 16; j++) all += sum[j];
  job->result = (double)(all & 1);
  return NULL;
}

static void *kernel_body(void *arg) {
  struct job *job = arg;
  job->result = job->kernel(0.15);
  return NULL;
}

#if defined(__x86_64__)
#define REPEAT 100000

/* Each kernel keeps independent accumulators in registers; the asm statement stops the compiler from folding the loop. */
__attribute__((target("avx2"))) static double dot_avx2(double seconds) {
  __m256i acc[8], a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(2), one = _mm256_set1_epi16(1);
  for (int i = 0; i < 8; i++) acc[i] = _mm256_setzero_si256();
  double start = qtr_now(), n = 0, now;
  do {
    for (int r = 0; r < REPEAT; r++) {
      __asm__ volatile("" : "+x"(a), "+x"(b));
      for (int i = 0; i < 8; i++) acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), one));
    }
    n += REPEAT * 8.0 * 64;
  } while ((now = qtr_now()) - start < seconds);
  for (int i = 0; i < 8; i++) __asm__ volatile("" : : "x"(acc[i]));
  return n / (now - start);
}

__attribute__((target("avx512f,avx512vnni"))) static double dot_vnni(double seconds) {
  __m512i acc[12], a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
  for (int i = 0; i < 12; i++) acc[i] = _mm512_setzero_si512();
  double start = qtr_now(), n = 0, now;
  do {
    for (int r = 0; r < REPEAT; r++) {
      __asm__ volatile("" : "+v"(a), "+v"(b));
      for (int i = 0; i < 12; i++) acc[i] = _mm512_dpbusd_epi32(acc[i], a, b);
    }
    n += REPEAT * 12.0 * 128;
  } while ((now = qtr_now()) - start < seconds);
  for (int i = 0; i < 12; i++) __asm__ volatile("" : : "v"(acc[i]));
  return n / (now - start);
}

struct tile_config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

__attribute__((target("amx-tile,amx-int8"))) static double dot_amx(double seconds) {
  struct tile_config config __attribute__((aligned(64))) = {.palette = 1};
  for (int i = 0; i < 8; i++) {
    config.row_bytes[i] = 64;
    config.rows[i] = 16;
  }
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  double start = qtr_now(), n = 0, now;
  do {
    for (int r = 0; r < REPEAT / 16; r++) {
      _tile_dpbusd(0, 4, 5);
      _tile_dpbusd(1, 4, 5);
      _tile_dpbusd(2, 4, 5);
      _tile_dpbusd(3, 4, 5);
    }
    n += REPEAT / 16 * 4.0 * 2 * 16 * 16 * 64;
  } while ((now = qtr_now()) - start < seconds);
  _tile_release();
  return n / (now - start);
}

static bool amx_usable(void) {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1)) return false;
  return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
}
#endif

void op_ceiling_measure(int threads, const char *isa, struct op_ceiling *ceiling) {
  struct job *job = op_malloc(MAX_THREADS, sizeof *job);
  int n = QTR_MIN(QTR_MAX(threads, 1), MAX_THREADS);
  size_t words = (size_t)READ_MIB * 1024 * 1024 / 8;
  uint64_t *data = op_malloc(words, 8);
  for (size_t i = 0; i < words; i += 512) data[i] = i; /* real pages, not the zero page */
  for (int i = 0; i < n; i++) {
    job[i].data = data + words / (size_t)n * (size_t)i;
    job[i].n = words / (size_t)n;
  }
  double best = INFINITY;
  for (int k = 0; k < 12; k++) {
    double start = qtr_now();
    run_all(job, n, read_body);
    best = fmin(best, qtr_now() - start);
  }
  ceiling->read_gbs = (double)words * 8 / best * 1e-9;
  free(data);

  ceiling->int8_gops = 0;
  ceiling->int8_name = "not measured";
  double (*kernel)(double) = NULL;
#if defined(__x86_64__)
  bool portable = isa && strcmp(isa, "portable") == 0, avx2 = isa && (!strcmp(isa, "avx2") || !strcmp(isa, "avx512"));
  bool vnni = isa && !strcmp(isa, "vnni");
  if (!portable && __builtin_cpu_supports("avx2")) {
    kernel = dot_avx2;
    ceiling->int8_name = "AVX2 maddubs";
  }
  if (!portable && !avx2 && __builtin_cpu_supports("avx512vnni")) {
    kernel = dot_vnni;
    ceiling->int8_name = "AVX-512 dpbusd";
  }
  if (!portable && !avx2 && !vnni && amx_usable()) {
    kernel = dot_amx;
    ceiling->int8_name = "AMX tdpbusd";
  }
#else
  (void)isa;
#endif
  if (kernel) {
    for (int i = 0; i < n; i++) job[i].kernel = kernel;
    run_all(job, n, kernel_body);
    for (int i = 0; i < n; i++) ceiling->int8_gops += job[i].result * 1e-9;
  }
  free(job);
}
