/* linear_avx512.c - linear_dot.h in AVX-512 without VNNI. */
#ifdef __AVX512BW__
#include "backend/cpu/linear_avx512.h"

const struct qtr_linear_kernels *qtr_cpu_linear_avx512(void) { return &kernels; }
#else
#include "backend/cpu/linear.h"

const struct qtr_linear_kernels *qtr_cpu_linear_avx512(void) { return NULL; }
#endif
