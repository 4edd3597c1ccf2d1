/* linear_amx.h - the batch kernel of linear_amx.c. */
#ifndef QTR_BACKEND_CPU_LINEAR_AMX_H
#define QTR_BACKEND_CPU_LINEAR_AMX_H

#include "backend/cpu/linear.h"

bool qtr_cpu_linear_amx_built(void);
/* Panels [begin, end) of an integer matrix for tokens [token, token + n_tokens), epilogue included; token % 32 == 0.
 * scratch: 64-aligned memory of this thread, of qtr_cpu_linear_amx_scratch(n_tokens) bytes. */
void qtr_cpu_linear_amx(const struct qtr_linear_args *args, size_t begin, size_t end, size_t token, size_t n_tokens,
                        void *scratch);

size_t qtr_cpu_linear_amx_scratch(size_t n_tokens);

#endif
