/* host_cuda.h - what step.c needs of CUDA, on the host, so that it runs where there is no GPU: a runtime with one stream
 * that works on a thread of its own and lags behind (runtime.c), and toy kernels (kernels.c). Activations are one int32 a
 * token: the token; K and V one int32 a slot. */
#ifndef QTR_TESTS_HOST_CUDA_H
#define QTR_TESTS_HOST_CUDA_H

#include "backend/cuda/cuda.h"

#define PAGE QTR_PAGE_TOKENS

/* Puts a job into the stream, or into the graph that is being captured: work is called there with a copy of arg. */
void host_push(void (*work)(void *), const void *arg, size_t n_bytes);
void host_start(void);
extern int host_graph_launches, host_captures, host_wrong; /* wrong: a kernel or the runtime saw what it must not see */

/* What attention leaves for a token: a number of all tokens of its sequence up to it. */
int32_t host_digest(const int32_t *token, int32_t n);
/* And what is chosen after it; last: the token itself. */
static inline int32_t host_next(int32_t digest, int32_t last, uint64_t position) {
  return (int32_t)(((uint64_t)digest * 13 + (uint64_t)last * 5 + position) % 50000);
}

#endif
