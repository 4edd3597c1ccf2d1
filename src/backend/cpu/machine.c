/* machine.c - instructions, cores, memory and name of the machine (machine.h).
 *
 * A level counts only when the compiler could build it, the processor has every instruction its files are compiled with
 * (CMakeLists.txt), and the kernel saves its registers (XCR0; for AMX also a permission this process must ask for). */
#include "backend/cpu/machine.h"

#include <inttypes.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/status.h"
#include "base/threads.h"

static const char *const isa_names[] = {"portable", "avx2", "avx512", "vnni", "amx"};

const char *qtr_cpu_isa_name(enum qtr_cpu_isa isa) { return isa_names[isa]; }

#if defined(__x86_64__)
#include <cpuid.h>

static uint64_t read_xcr0(void) {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
}

static bool ask_for_tiles(void) {
  enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

enum qtr_cpu_isa qtr_cpu_machine_isa(void) {
  uint32_t a, b, c, d, a1, b1, c1, d1;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return QTR_CPU_PORTABLE;
  const uint32_t fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29, leaf1 = fma | osxsave | avx | f16c;
  if ((c & leaf1) != leaf1 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return QTR_CPU_PORTABLE;
  uint64_t xcr0 = read_xcr0();
  const uint32_t avx2 = 1u << 5;
  if ((xcr0 & 0x6) != 0x6 || !(b & avx2)) return QTR_CPU_PORTABLE;
  const uint32_t avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* F, DQ, BW, VL */
  if ((xcr0 & 0xe6) != 0xe6 || (b & avx512) != avx512) return QTR_CPU_AVX2;
  const uint32_t vnni = 1u << 1 | 1u << 11; /* VBMI, VNNI */
  if ((c & vnni) != vnni) return QTR_CPU_AVX512;
  const uint32_t tiles = 1u << 22 | 1u << 24 | 1u << 25; /* AMX-BF16, AMX-TILE, AMX-INT8 */
  bool bf16 = __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1) && (a1 & 1u << 5);
  if ((d & tiles) != tiles || !bf16 || (xcr0 & 0x60000) != 0x60000 || !ask_for_tiles()) return QTR_CPU_VNNI;
  return QTR_CPU_AMX;
}

void qtr_cpu_machine_name(char *name, size_t n) {
  char brand[49] = {0};
  for (uint32_t i = 0; i < 3; i++) {
    uint32_t r[4];
    if (!__get_cpuid(0x80000002u + i, &r[0], &r[1], &r[2], &r[3])) break;
    memcpy(brand + 16 * i, r, 16);
  }
  const char *start = brand + strspn(brand, " ");
  (void)snprintf(name, n, "%s", *start ? start : "x86-64");
}
#else
enum qtr_cpu_isa qtr_cpu_machine_isa(void) { return QTR_CPU_PORTABLE; }
void qtr_cpu_machine_name(char *name, size_t n) { (void)snprintf(name, n, "processor"); }
#endif

enum qtr_status qtr_cpu_choose_isa(const char *name, enum qtr_cpu_isa *isa, struct qtr_error *err) {
  enum qtr_cpu_isa best = qtr_cpu_machine_isa();
  *isa = best;
  if (!name || !*name) return QTR_OK;
  for (int i = 0; i <= QTR_CPU_AMX; i++) {
    if (strcmp(name, isa_names[i]) != 0) continue;
    if (i > (int)best) {
      return qtr_fail(err, QTR_ERR_UNSUPPORTED, "instruction set \"%s\" is not available here; the best is \"%s\"", name,
                      isa_names[best]);
    }
    *isa = (enum qtr_cpu_isa)i;
    return QTR_OK;
  }
  return qtr_fail(err, QTR_ERR_ARGUMENT, "no instruction set \"%.40s\"; choose portable, avx2, avx512, vnni or amx", name);
}

/* First line of a small file; false when there is none. */
static bool read_line(const char *path, char *line, int n) {
  FILE *f = fopen(path, "r");
  if (!f) return false;
  bool ok = fgets(line, n, f) != NULL;
  (void)fclose(f);
  return ok;
}

/* Directory of our cgroup under `mount`: that of version 2 ("0::/path") when controller is "", else that of this controller
 * of version 1 ("4:memory:/path"). False when there is none. */
static bool cgroup_path(const char *controller, const char *mount, char *path, size_t n) {
  char line[3072];
  bool found = false;
  FILE *f = fopen("/proc/self/cgroup", "r");
  while (f && !found && fgets(line, sizeof line, f)) {
    line[strcspn(line, "\n")] = 0;
    char *names = strchr(line, ':'), *dir = names ? strchr(names + 1, ':') : NULL;
    if (!dir) continue;
    *dir++ = 0;
    for (char *name = names + 1, *comma; name && !found; name = comma ? comma + 1 : NULL) { /* "cpu,cpuacct" */
      comma = strchr(name, ',');
      if (comma) *comma = 0;
      found = strcmp(name, controller) == 0;
    }
    if (found) (void)snprintf(path, n, "%s%s", mount, strcmp(dir, "/") == 0 ? "" : dir);
  }
  if (f) (void)fclose(f);
  return found;
}

/* Goes from our cgroup up to the mount: visit(directory) for each. In a container the path may be one of the host's that is
 * not there; the mount itself is then ours. */
static void each_cgroup(const char *controller, const char *mount, void (*visit)(const char *dir, void *arg), void *arg) {
  char dir[4096];
  if (!cgroup_path(controller, mount, dir, sizeof dir)) return;
  const size_t root = strlen(mount);
  for (;;) {
    visit(dir, arg);
    char *slash = strrchr(dir, '/');
    if (!slash || (size_t)(slash - dir) < root) return;
    *slash = 0;
  }
}

/* The number in dir/name; false when there is none ("max"). */
static bool read_number(const char *dir, const char *name, size_t *number) {
  char path[4200], line[128];
  (void)snprintf(path, sizeof path, "%s/%s", dir, name);
  return read_line(path, line, sizeof line) && line[0] >= '0' && line[0] <= '9' && sscanf(line, "%zu", number) == 1;
}

static void limit_threads(const char *dir, void *arg) {
  int *threads = arg;
  char path[4200], line[128];
  size_t quota = 0, period = 0;
  (void)snprintf(path, sizeof path, "%s/cpu.max", dir);
  if (!read_line(path, line, sizeof line) || sscanf(line, "%zu %zu", &quota, &period) != 2) {
    /* "max 100000", or version 1 */
    if (!read_number(dir, "cpu.cfs_quota_us", &quota) || !read_number(dir, "cpu.cfs_period_us", &period)) return;
  }
  if (quota == 0 || period == 0) return;
  size_t cores = qtr_ceil_div(quota, period);
  if (cores < (size_t)*threads) *threads = (int)QTR_MAX(cores, (size_t)1);
}

int qtr_cpu_machine_threads(void) {
  int threads = qtr_threads_available();
  each_cgroup("", "/sys/fs/cgroup", limit_threads, &threads);
  each_cgroup("cpu", "/sys/fs/cgroup/cpu", limit_threads, &threads);
  return threads;
}

struct memory {
  size_t total, available;
};

/* Bytes of files in memory that nobody has used lately: counted as used, but given back at need. */
static size_t file_cache(const char *dir) {
  char path[4200], line[256];
  size_t bytes = 0, total = 0;
  (void)snprintf(path, sizeof path, "%s/memory.stat", dir);
  FILE *f = fopen(path, "r");
  while (f && fgets(line, sizeof line, f)) {
    (void)sscanf(line, "inactive_file %zu", &bytes);
    (void)sscanf(line, "total_inactive_file %zu", &total); /* version 1: with the groups below */
  }
  if (f) (void)fclose(f);
  return QTR_MAX(bytes, total);
}

static void limit_memory(const char *dir, void *arg) {
  struct memory *m = arg;
  size_t max, used = 0;
  if (!read_number(dir, "memory.max", &max) && !read_number(dir, "memory.limit_in_bytes", &max)) return;
  if (!read_number(dir, "memory.current", &used)) (void)read_number(dir, "memory.usage_in_bytes", &used);
  used -= QTR_MIN(used, file_cache(dir));
  m->total = QTR_MIN(m->total, max);
  m->available = QTR_MIN(m->available, max > used ? max - used : 0);
}

void qtr_cpu_machine_memory(size_t *total, size_t *available) {
  struct memory m = {0, 0};
  char line[256];
  FILE *f = fopen("/proc/meminfo", "r");
  if (f) {
    size_t kib;
    while (fgets(line, sizeof line, f)) {
      if (sscanf(line, "MemTotal: %zu kB", &kib) == 1) m.total = kib * 1024;
      if (sscanf(line, "MemAvailable: %zu kB", &kib) == 1) m.available = kib * 1024;
    }
    (void)fclose(f);
  }
  if (m.total == 0) {
    m.total = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
    m.available = (size_t)sysconf(_SC_AVPHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
  }
  each_cgroup("", "/sys/fs/cgroup", limit_memory, &m);
  each_cgroup("memory", "/sys/fs/cgroup/memory", limit_memory, &m);
  *total = m.total;
  *available = m.available;
}
