/* activation_portable.c - activation_rows.h compiled for any processor. */
#include "backend/cpu/activation_rows.h"

const struct qtr_activation_kernels *qtr_cpu_activation_portable(void) { return &kernels; }
