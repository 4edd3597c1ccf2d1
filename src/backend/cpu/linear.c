/* linear.c - matrices of the CPU backend: creation, the choice of kernel, and the loop over panels and tokens (linear.h,
 * spec B.2 to B.4). */
#include "backend/cpu/linear.h"
#include "backend/common/linear_source.h"
#include "backend/cpu/linear_amx.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/status.h"

/* Fewer tokens are as fast by dot products (measured). */
#define AMX_MIN_TOKENS 9

/* Bytes of a panel; false on overflow. */
static bool panel_size(struct qtr_linear *l) {
  switch (l->form) {
    case QTR_PANEL_W8: l->panel_bytes = l->n_in_padded / 4 * QTR_BLOCK_BYTES; return true; /* n_in is bounded */
    case QTR_PANEL_W4: l->panel_bytes = l->n_in_padded / 8 * QTR_BLOCK_BYTES; return true;
    case QTR_PANEL_W4G: l->panel_bytes = l->n_in / QTR_GROUP * QTR_GROUP_BYTES; return true;
    default:
      return !qtr_mul_overflow(l->n_in, QTR_PANEL_ROWS * (l->form == QTR_PANEL_F32 ? sizeof(float) : 2), &l->panel_bytes);
  }
}

static float *row_floats(struct qtr_linear *l) {
  size_t n = l->n_panels * QTR_PANEL_ROWS;
  l->n_bytes += n * sizeof(float);
  float *x = aligned_alloc(64, n * sizeof(float)); /* a multiple of 128 bytes */
  if (x) memset(x, 0, n * sizeof *x);
  return x;
}

/* Tokens that share a pass over the weights by AMX: their codes should stay in the second-level cache beside a panel. */
static size_t amx_tokens(const struct qtr_linear *l) {
  const size_t cache = (size_t)1 << 20;
  return QTR_MIN(QTR_MAX(cache / l->n_in_padded / 32, (size_t)4), (size_t)16) * 32;
}

enum qtr_status qtr_cpu_linear_create(struct qtr_backend *b, const struct qtr_linear_source *source,
                                      struct qtr_linear **linear, struct qtr_error *err) {
  struct qtr_cpu *c = (struct qtr_cpu *)b;
  static const enum qtr_panel forms[QTR_N_LINEAR_FORMATS] = {
      [QTR_LINEAR_F32] = QTR_PANEL_F32, [QTR_LINEAR_F16] = QTR_PANEL_F16, [QTR_LINEAR_BF16] = QTR_PANEL_BF16,
      [QTR_LINEAR_W8A8] = QTR_PANEL_W8, [QTR_LINEAR_W4A8] = QTR_PANEL_W4, [QTR_LINEAR_W4A8_G128] = QTR_PANEL_W4G,
  };
  size_t n_out = 0, n_bytes;
  *linear = NULL;
  enum qtr_status status = qtr_linear_source_check(source, &n_out, err);
  if (status != QTR_OK) return status;
  struct qtr_linear *l = calloc(1, sizeof *l);
  if (!l) return qtr_fail_memory(err, "a matrix", sizeof *l);
  l->form = forms[source->format];
  if (l->form == QTR_PANEL_W4G && !qtr_cpu_linear_g128_fits(c, source)) l->form = QTR_PANEL_W8;
  l->gate_up = source->gate_up;
  l->n_in = source->n_in;
  l->n_out = n_out;
  l->n_panels = l->gate_up ? qtr_ceil_div(n_out / 2, QTR_PANEL_ROWS / 2) : qtr_ceil_div(n_out, QTR_PANEL_ROWS);
  l->n_in_padded = l->form >= QTR_PANEL_W8 ? qtr_round_up(l->n_in, 64) : l->n_in;
  bool bias = false;
  for (size_t p = 0; p < source->n_parts; p++) bias = bias || source->part[p].bias;

  status = QTR_ERR_MEMORY;
  if (!panel_size(l) || qtr_mul_overflow(l->panel_bytes, l->n_panels, &n_bytes)) {
    qtr_fail_memory(err, "a matrix", SIZE_MAX);
    goto done;
  }
  l->n_bytes = n_bytes;
  l->panels = qtr_cpu_alloc(n_bytes);
  if (l->form >= QTR_PANEL_W8) l->scale = row_floats(l);
  if (l->form == QTR_PANEL_W4) l->szero = row_floats(l);
  if (bias) l->bias = row_floats(l);
  if (!l->panels || (l->form >= QTR_PANEL_W8 && !l->scale) || (l->form == QTR_PANEL_W4 && !l->szero) || (bias && !l->bias)) {
    qtr_fail_memory(err, "a matrix", n_bytes);
    goto done;
  }
  if (l->form >= QTR_PANEL_W8 && c->isa >= QTR_CPU_AMX) {
    status = qtr_cpu_scratch(c, qtr_cpu_linear_amx_scratch(amx_tokens(l)), err);
    if (status != QTR_OK) goto done;
  }
  qtr_cpu_linear_repack(c, source, l);
  *linear = l;
  l = NULL;
  status = QTR_OK;
done:
  qtr_cpu_linear_free(b, l);
  return status;
}

void qtr_cpu_linear_free(struct qtr_backend *b, struct qtr_linear *l) {
  (void)b;
  if (!l) return;
  qtr_cpu_free(l->panels, l->panel_bytes * l->n_panels);
  free(l->scale);
  free(l->szero);
  free(l->bias);
  free(l);
}

size_t qtr_cpu_linear_bytes(const struct qtr_linear *linear) { return linear->n_bytes; }

/* ---- running ------------------------------------------------------------------------------------- */

static const struct qtr_linear_kernels *kernels_of(const struct qtr_cpu *c) {
  const struct qtr_linear_kernels *k = NULL;
  if (c->isa >= QTR_CPU_VNNI) k = qtr_cpu_linear_vnni();
  if (!k && c->isa >= QTR_CPU_AVX512) k = qtr_cpu_linear_avx512();
  if (!k && c->isa >= QTR_CPU_AVX2) k = qtr_cpu_linear_avx2();
  return k ? k : qtr_cpu_linear_portable();
}

/* Panels are handed out in pieces that shrink: half of a thread's share of what is left. So most of the weights are read as
 * long streams, and the threads end together. `work` does items [begin, end). */
struct panels_loop {
  atomic_size_t next;
  size_t n, least, n_threads; /* items; fewest in a piece */
  void (*work)(const struct panels_loop *loop, size_t begin, size_t end, int thread);
  const struct qtr_cpu *c;
  const struct qtr_linear_args *args;
  const struct qtr_linear_kernels *kernels;
  size_t chunk; /* AMX: tokens of one pass over the weights */
};

static void loop_thread(void *arg, size_t begin, size_t end, int thread) {
  (void)begin, (void)end;
  struct panels_loop *p = arg;
  for (;;) {
    size_t from = atomic_load_explicit(&p->next, memory_order_relaxed), to;
    do {
      if (from >= p->n) return;
      to = QTR_MIN(p->n, from + QTR_MAX((p->n - from) / (2 * p->n_threads), p->least));
    } while (!atomic_compare_exchange_weak_explicit(&p->next, &from, to, memory_order_relaxed, memory_order_relaxed));
    p->work(p, from, to, thread);
  }
}

static void loop_run(struct panels_loop *p) {
  atomic_init(&p->next, 0);
  p->n_threads = (size_t)p->c->threads;
  if (p->n <= p->least) {
    p->work(p, 0, p->n, 0);
  } else {
    qtr_cpu_for(p->c, p->n_threads, 1, loop_thread, p);
  }
}

static void dot_panels(const struct panels_loop *p, size_t begin, size_t end, int thread) {
  (void)thread;
  const struct qtr_linear_args *a = p->args;
  _Alignas(64) int32_t acc[QTR_DOT_TOKENS * QTR_PANEL_ROWS];
  for (size_t panel = begin; panel < end; panel++) {
    for (size_t token = 0; token < a->n_tokens; token += p->kernels->max_tokens) {
      size_t n = QTR_MIN(a->n_tokens - token, p->kernels->max_tokens);
      p->kernels->dot(a->linear, a->input, panel, token, n, acc);
      p->kernels->finish(a, panel, token, n, acc, a->linear->form == QTR_PANEL_W8);
    }
  }
}

/* Item i: panel i % n_panels for the chunk of tokens i / n_panels. */
static void amx_panels(const struct panels_loop *p, size_t begin, size_t end, int thread) {
  size_t n_panels = p->args->linear->n_panels;
  while (begin < end) {
    size_t token = begin / n_panels * p->chunk, panel = begin % n_panels, n = QTR_MIN(end - begin, n_panels - panel);
    qtr_cpu_linear_amx(p->args, panel, panel + n, token, QTR_MIN(p->chunk, p->args->n_tokens - token),
                       qtr_cpu_thread_scratch(p->c, thread));
    begin += n;
  }
}

void qtr_cpu_linear(struct qtr_backend *b, const struct qtr_linear_args *args) {
  const struct qtr_cpu *c = (const struct qtr_cpu *)b;
  const struct qtr_linear *l = args->linear;
  if (args->n_tokens == 0) return;
  size_t panel_work = l->panel_bytes * args->n_tokens;
  struct panels_loop loop = {.c = c, .args = args, .n = l->n_panels};
  if (c->isa >= QTR_CPU_AMX && qtr_cpu_linear_amx_built() && l->form >= QTR_PANEL_W8 && args->n_tokens >= AMX_MIN_TOKENS) {
    loop.work = amx_panels;
    loop.chunk = amx_tokens(l);
    loop.n *= qtr_ceil_div(args->n_tokens, loop.chunk);
    loop.least = QTR_MAX((size_t)262144 / panel_work, (size_t)1); /* less is not worth another thread */
  } else {
    loop.work = dot_panels;
    loop.kernels = kernels_of(c);
    loop.least = QTR_MAX((size_t)32768 / panel_work, (size_t)1);
  }
  loop_run(&loop);
}
