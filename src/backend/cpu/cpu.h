/* cpu.h - what the files of the CPU backend share. cpu.c owns the vtable, the choice of instructions and the step; linear*.c
 * the matrices; activation*.c norms and quantisation; kv*.c and attention*.c the cache. Activations are F32.
 *
 * A file's suffix names the instructions it may use (_avx2, _avx512, _vnni, _amx; none = portable C) and only the run-time
 * choice in `struct qtr_cpu.isa` may lead there. The choice is made once per process from the machine, never from the shape
 * of a batch, unless both ways give the same bits (integer dot products do). */
#ifndef QTR_BACKEND_CPU_CPU_H
#define QTR_BACKEND_CPU_CPU_H

#include "backend/backend.h"
#include "base/threads.h"

enum qtr_cpu_isa { QTR_CPU_PORTABLE, QTR_CPU_AVX2, QTR_CPU_AVX512, QTR_CPU_VNNI, QTR_CPU_AMX };

struct qtr_cpu {
  struct qtr_backend base; /* first: a struct qtr_backend * is a struct qtr_cpu * */
  enum qtr_cpu_isa isa;
  int threads;
  struct qtr_threads *team;      /* of that many */
  const struct qtr_batch *batch; /* of the running step */
  float *cos, *sin;              /* (n_tokens, half_dim) of the running step */
  size_t rope_capacity, half_dim;
  void *
      scratch; /* (threads, scratch_bytes) 64-aligned, for kernels; grown by qtr_cpu_scratch outside of steps' inner loops */
  size_t scratch_bytes;
};

/* Large, 64-aligned (2 MiB for large ones), zeroed memory, huge pages where the system gives them. */
void *qtr_cpu_alloc(size_t n_bytes);
void qtr_cpu_free(void *p, size_t n_bytes);

/* Grows the scratch to `bytes` for each thread; called when matrices and caches are created, never inside a step. Thread t
 * owns (char *)scratch + t * scratch_bytes. */
enum qtr_status qtr_cpu_scratch(struct qtr_cpu *c, size_t bytes, struct qtr_error *err);
static inline void *qtr_cpu_thread_scratch(const struct qtr_cpu *c, int thread) {
  return (char *)c->scratch + (size_t)thread * c->scratch_bytes;
}

/* The one parallel loop of this backend: task(arg, begin, end, thread) over [0, n) in pieces of `chunk` items, handed out as
 * the threads come; thread < c->threads. */
void qtr_cpu_for(const struct qtr_cpu *c, size_t n, size_t chunk, qtr_task task, void *arg);

/* linear.c, activation.c: slots of the vtable, described in backend.h. */
enum qtr_status qtr_cpu_linear_create(struct qtr_backend *b, const struct qtr_linear_source *source,
                                      struct qtr_linear **linear, struct qtr_error *err);
void qtr_cpu_linear_free(struct qtr_backend *b, struct qtr_linear *linear);
size_t qtr_cpu_linear_bytes(const struct qtr_linear *linear);
void qtr_cpu_linear(struct qtr_backend *b, const struct qtr_linear_args *args);
enum qtr_status qtr_cpu_input_create(struct qtr_backend *b, size_t max_tokens, size_t max_dim, struct qtr_input **input,
                                     struct qtr_error *err);
void qtr_cpu_input_free(struct qtr_backend *b, struct qtr_input *input);
void qtr_cpu_input_read(struct qtr_backend *b, const struct qtr_input *input, size_t token, size_t dim, int8_t *code,
                        float *scale, float *sum, float *value);
void qtr_cpu_rmsnorm(struct qtr_backend *b, const struct qtr_rmsnorm_args *args);
void qtr_cpu_quant(struct qtr_backend *b, const struct qtr_quant_args *args);
enum qtr_status qtr_cpu_table_create(struct qtr_backend *b, const struct qtr_table_source *source, struct qtr_table **table,
                                     struct qtr_error *err);
void qtr_cpu_table_free(struct qtr_backend *b, struct qtr_table *table);
void qtr_cpu_embed(struct qtr_backend *b, const struct qtr_embed_args *args);
void qtr_cpu_gather(struct qtr_backend *b, const struct qtr_gather_args *args);

/* kv.c */
enum qtr_status qtr_cpu_kv_create(struct qtr_backend *b, const struct qtr_kv_config *config, struct qtr_kv **kv,
                                  struct qtr_error *err);
void qtr_cpu_kv_free(struct qtr_backend *b, struct qtr_kv *kv);
enum qtr_kv_format qtr_cpu_kv_format(const struct qtr_kv *kv);
const struct qtr_kv_heads *qtr_cpu_kv_heads(const struct qtr_kv *kv);
void qtr_cpu_rope_kv_write(struct qtr_backend *b, const struct qtr_rope_kv_args *args);
void qtr_cpu_kv_read(struct qtr_backend *b, const struct qtr_kv *kv, int32_t layer, bool is_v, int32_t page, int32_t slot,
                     int32_t head, uint16_t *code, float *scale, float *zero);
void qtr_cpu_selection_read(struct qtr_backend *b, const struct qtr_kv *kv, int32_t layer, int32_t q_head, int32_t slot,
                            int32_t *page, int32_t *n, int32_t *tail);
void qtr_cpu_stats_read(struct qtr_backend *b, const struct qtr_kv *kv, int32_t layer, int32_t page, int32_t logical,
                        int32_t head, float *max, float *min);
/* attention.c */
void qtr_cpu_attention(struct qtr_backend *b, const struct qtr_attention_args *args);

#endif
