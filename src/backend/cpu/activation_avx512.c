/* activation_avx512.c - activation_rows.h compiled for AVX512. */
#ifdef __AVX512F__
#include "backend/cpu/activation_rows.h"

const struct qtr_activation_kernels *qtr_cpu_activation_avx512(void) { return &kernels; }
#else
#include "backend/cpu/activation.h"

const struct qtr_activation_kernels *qtr_cpu_activation_avx512(void) { return NULL; }
#endif
