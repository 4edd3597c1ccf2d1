/* activation_avx2.c - activation_rows.h compiled for AVX2. */
#ifdef __AVX2__
#include "backend/cpu/activation_rows.h"

const struct qtr_activation_kernels *qtr_cpu_activation_avx2(void) { return &kernels; }
#else
#include "backend/cpu/activation.h"

const struct qtr_activation_kernels *qtr_cpu_activation_avx2(void) { return NULL; }
#endif
