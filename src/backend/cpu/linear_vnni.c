/* linear_vnni.c - linear_dot.h in AVX-512 with VNNI. */
#ifdef __AVX512VNNI__
#include "backend/cpu/linear_avx512.h"

const struct qtr_linear_kernels *qtr_cpu_linear_vnni(void) { return &kernels; }
#else
#include "backend/cpu/linear.h"

const struct qtr_linear_kernels *qtr_cpu_linear_vnni(void) { return NULL; }
#endif
