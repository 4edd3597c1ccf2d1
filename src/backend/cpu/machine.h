/* machine.h - what this machine and this process's share of it are: instructions, cores, memory, name. Read from CPUID, the
 * kernel's permission for AMX tiles, the affinity mask and the cgroups. */
#ifndef QTR_BACKEND_CPU_MACHINE_H
#define QTR_BACKEND_CPU_MACHINE_H

#include "backend/cpu/cpu.h"

/* The best level the processor and the kernel give; asks the kernel for tile state, so AMX works after this returned
 * QTR_CPU_AMX. */
enum qtr_cpu_isa qtr_cpu_machine_isa(void);
const char *qtr_cpu_isa_name(enum qtr_cpu_isa isa); /* "vnni", the spelling of the option */
/* `name` (may be NULL: best) to a level the machine has, or an error that says what it has. */
enum qtr_status qtr_cpu_choose_isa(const char *name, enum qtr_cpu_isa *isa, struct qtr_error *err);

int qtr_cpu_machine_threads(void); /* cores this process may use: affinity, then cgroup quota; at least 1 */
void qtr_cpu_machine_memory(size_t *total, size_t *available); /* bytes, of the machine or of the tightest cgroup above us */
void qtr_cpu_machine_name(char *name, size_t n);               /* "Intel(R) Xeon(R) Processor" */

#endif
