/* main.c - quattuor-ops: `check` compares a device with the reference operation by operation, `perf` times the same
 * operations. */
#include <getopt.h>
#include <stdio.h>
#include <time.h>

#include "base/clock.h"
#include "ops.h"

static const char usage[] =
    "usage: quattuor-ops check|perf [options]\n"
    "  --device NAME   cpu (default), cuda or reference\n"
    "  --op TEXT       only entries whose name (linear/w4a8-g128/llama-1b.qkv) contains TEXT\n"
    "  --isa NAME      portable, avx2, avx512, vnni or amx; sm80 or sm90 of cuda; default: $QUATTUOR_ISA, else the best. "
    "Exit code 77: not on "
    "this machine\n"
    "  --threads N     0 (default) = all\n"
    "  --seed S        of the random inputs; default: the time, printed\n"
    "  --json          one object a line\n"
    "  --list          print the names of the entries only\n";

struct options {
  bool perf, json, list;
  const char *device, *op;
  struct qtr_backend_options backend;
  uint64_t seed;
};

static bool number(const char *text, uint64_t max, uint64_t *out) {
  char *end;
  unsigned long long n = strtoull(text, &end, 0);
  *out = n;
  return *text && *text != '-' && !*end && n <= max;
}

static bool options_parse(int argc, char **argv, struct options *o) {
  static const struct option known[] = {{"device", required_argument, NULL, 'd'},
                                        {"op", required_argument, NULL, 'o'},
                                        {"isa", required_argument, NULL, 'i'},
                                        {"threads", required_argument, NULL, 't'},
                                        {"seed", required_argument, NULL, 's'},
                                        {"json", no_argument, NULL, 'j'},
                                        {"list", no_argument, NULL, 'l'},
                                        {"help", no_argument, NULL, 'h'},
                                        {NULL, 0, NULL, 0}};
  *o = (struct options){.device = "cpu", .op = "", .seed = (uint64_t)time(NULL), .backend = {.isa = getenv("QUATTUOR_ISA")}};
  int option;
  uint64_t n = 0;
  while ((option = getopt_long(argc, argv, "", known, NULL)) != -1) {
    switch (option) {
      case 'd': o->device = optarg; break;
      case 'o': o->op = optarg; break;
      case 'i': o->backend.isa = optarg; break;
      case 't':
        if (!number(optarg, 1024, &n)) return false;
        o->backend.threads = (int32_t)n;
        break;
      case 's':
        if (!number(optarg, UINT64_MAX, &o->seed)) return false;
        break;
      case 'j': o->json = true; break;
      case 'l': o->list = true; break;
      case 'h': (void)fputs(usage, stdout); exit(0);
      default: return false;
    }
  }
  if (argc - optind != 1) return false;
  o->perf = strcmp(argv[optind], "perf") == 0;
  return o->perf || strcmp(argv[optind], "check") == 0;
}

static void device_open(const char *name, const struct qtr_backend_options *options, struct op_device *d) {
  struct qtr_error err = {0};
  enum qtr_status status = qtr_backend_open(name, options, &d->b, &err);
  bool absent = status == QTR_ERR_NOT_FOUND && strcmp(name, "cuda") == 0; /* a build without it */
  if (status == QTR_ERR_UNSUPPORTED || absent) {
    (void)fprintf(stderr, "quattuor-ops: skipped: %s\n", err.message);
    exit(77);
  }
  op_must(status, &err);
  d->ops = d->b->ops;
  d->ops->caps(d->b, &d->caps);
  d->act_bytes = qtr_dtype_bytes(d->caps.act_dtype);
}

/* Each entry has its own random numbers, the same whether it runs alone or after others. */
static struct op_rng entry_rng(uint64_t seed, const char *name) {
  struct op_rng rng = {seed};
  for (; *name; name++) rng.state = op_rng_next(&rng) ^ (unsigned char)*name;
  return rng;
}

static bool check(struct op_check *c, const struct op_entry *e, unsigned format, const char *name, bool json) {
  struct op_diff diff = {0};
  double start = qtr_now();
  switch (e->kind) {
    case OP_QUANT: op_check_quant(c, e, (enum qtr_quant)format, &diff); break;
    case OP_NORM: op_check_norm(c, e, (enum op_norm_format)format, &diff); break;
    case OP_LINEAR: op_check_linear(c, e, (enum qtr_linear_format)format, &diff); break;
    case OP_KV_WRITE: op_check_kv_write(c, e, (enum qtr_kv_format)format, &diff); break;
    case OP_ATTENTION:
    case OP_SPARSE: op_check_attention(c, e, (enum qtr_kv_format)format, &diff); break;
    case OP_EMBED: op_check_embed(c, e, (enum qtr_dtype)format, &diff); break;
    default: op_check_gather(c, e, &diff); break;
  }
  if (diff.n == 0) op_bad(&diff, "nothing was compared");
  bool good = diff.n_bad == 0;
  double seconds = qtr_now() - start;
  if (json) {
    (void)printf("{\"name\":\"%s\",\"ok\":%s,\"compared\":%zu,\"bad\":%zu,\"ties\":%zu,\"worst\":%.3g,\"seconds\":%.3f}\n",
                 name, good ? "true" : "false", diff.n, diff.n_bad, diff.n_ties, diff.worst, seconds);
  } else {
    (void)printf("%-4s %-42s %9zu values, worst %4.2f of tolerance, %zu ties, %.2f s\n", good ? "ok" : "BAD", name, diff.n,
                 diff.worst, diff.n_ties, seconds);
  }
  if (!good) (void)fprintf(stderr, "BAD  %s: %zu wrong; first: %s\n", name, diff.n_bad, diff.first);
  (void)fflush(stdout);
  return good;
}

int main(int argc, char **argv) {
  struct options o;
  if (!options_parse(argc, argv, &o)) {
    (void)fputs(usage, stderr);
    return 2;
  }
  struct op_check c = {0};
  struct op_ceiling ceiling = {0};
  if (!o.list) {
    device_open(o.device, &o.backend, &c.dev);
    device_open("reference", &(struct qtr_backend_options){0}, &c.ref);
    (void)fprintf(stderr, "quattuor-ops: %s; seed %llu\n", c.dev.caps.description, (unsigned long long)o.seed);
  }
  if (o.perf && !o.list) {
    if (c.dev.ops->copy_speed) {
      ceiling.read_gbs = c.dev.ops->copy_speed(c.dev.b) * 1e-9;
      ceiling.int8_name = "not measured";
    } else {
      op_ceiling_measure(c.dev.caps.threads, o.backend.isa, &ceiling);
    }
    (void)fprintf(stderr, "quattuor-ops: ceilings of %d threads: DRAM read %.1f GB/s, int8 %.0f GOP/s (%s)\n",
                  c.dev.caps.threads, ceiling.read_gbs, ceiling.int8_gops, ceiling.int8_name);
  }
  size_t n_run = 0, n_bad = 0;
  for (size_t i = 0; i < n_op_table; i++) {
    const struct op_entry *e = &op_table[i];
    bool gpu = !o.list && c.dev.ops->wait; /* an entry of the largest sizes is for devices that are timed so */
    if (!(e->use & (!o.perf ? OP_CHECK : gpu ? OP_PERF | OP_PERF_GPU : OP_PERF))) continue;
    for (unsigned format = 0; format < 32; format++) {
      char name[128];
      if (!(e->formats >> format & 1)) continue;
      op_name(e, format, name, sizeof name);
      if (!strstr(name, o.op)) continue;
      n_run++;
      c.rng = entry_rng(o.seed, name);
      if (o.list) {
        (void)printf("%s\n", name);
      } else if (o.perf) {
        op_perf(&c.dev, &ceiling, e, format, o.json, &c.rng);
      } else {
        n_bad += !check(&c, e, format, name, o.json);
      }
    }
  }
  if (!o.list) {
    qtr_backend_close(c.dev.b);
    qtr_backend_close(c.ref.b);
  }
  if (n_run == 0) {
    (void)fprintf(stderr, "quattuor-ops: no entry contains \"%s\"\n", o.op);
    return 2;
  }
  if (!o.perf && !o.list) (void)fprintf(stderr, "quattuor-ops: %zu of %zu entries agree\n", n_run - n_bad, n_run);
  return n_bad ? 1 : 0;
}
