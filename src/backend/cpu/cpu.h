/* cpu.h - what the files of the CPU backend share. cpu.c owns the vtable, the choice of instructions and the step; linear*.c
 * the matrices; activation*.c norms and quantisation; kv*.c and attention*.c the cache. Activations are F32.
 *
 * A file's suffix names the instructions it may use (_avx2, _avx512, _vnni, _amx; none = portable C) and only the run-time choice in
 * `struct qtr_cpu.isa` may lead there. The choice is made once per process from the machine, never from the shape of a batch,
 * unless both ways give the same bits (integer dot products do). */
#ifndef QTR_BACKEND_CPU_CPU_H
#define QTR_BACKEND_CPU_CPU_H

#include "backend/backend.h"

enum qtr_cpu_isa { QTR_CPU_PORTABLE, QTR_CPU_AVX2, QTR_CPU_AVX512, QTR_CPU_VNNI, QTR_CPU_AMX };

struct qtr_cpu {
  struct qtr_backend base; /* first: a struct qtr_backend * is a struct qtr_cpu * */
  enum qtr_cpu_isa isa;
  int threads;
  const struct qtr_batch *batch; /* of the running step */
  float *cos, *sin;              /* (n_tokens, half_dim) of the running step */
  size_t rope_capacity, half_dim;
  void *scratch; /* (threads, scratch_bytes) 64-aligned, for kernels; grown by qtr_cpu_scratch outside of steps' inner loops */
  size_t scratch_bytes;
};

/* Large, 64-aligned (2 MiB for large ones), zeroed memory, huge pages where the system gives them. */
void *qtr_cpu_alloc(size_t n_bytes);
void qtr_cpu_free(void *p, size_t n_bytes);

/* kv.c */
enum qtr_status qtr_cpu_kv_create(struct qtr_backend *b, const struct qtr_kv_config *config, struct qtr_kv **kv,
                                  struct qtr_error *err);
void qtr_cpu_kv_free(struct qtr_backend *b, struct qtr_kv *kv);
enum qtr_kv_format qtr_cpu_kv_format(const struct qtr_kv *kv);
void qtr_cpu_rope_kv_write(struct qtr_backend *b, const struct qtr_rope_kv_args *args);
void qtr_cpu_kv_read(struct qtr_backend *b, const struct qtr_kv *kv, int32_t layer, bool is_v, int32_t page, int32_t slot,
                     int32_t head, uint16_t *code, float *scale, float *zero);
/* attention.c */
void qtr_cpu_attention(struct qtr_backend *b, const struct qtr_attention_args *args);

#endif
