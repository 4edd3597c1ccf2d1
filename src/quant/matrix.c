/* matrix.c - tiles and factorisations (matrix.h). OpenBLAS is told to use one thread: the team has the others.
 *
 * An OpenBLAS built without threads is not safe to call from several: its workspaces have no lock, and one product in a few
 * hundred comes out wrong, silently (Debian's libopenblas0-serial 0.3.21). Which build a system loads is its administrator's
 * choice, so it is asked, and that one is called by one thread at a time. */
#include "quant/matrix.h"

#include "base/checked.h"

#include <cblas.h>

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define TILE ((size_t)256)

/* LAPACK, which OpenBLAS holds but does not declare: columns first, every argument by address, *info 0 = done. */
void dpotrf_(const char *uplo, const blasint *n, double *a, const blasint *lda, blasint *info);

/* Around every call of OpenBLAS from a team. */
static pthread_mutex_t *enter(void) {
  static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;
  bool alone = openblas_get_parallel() == OPENBLAS_SEQUENTIAL;
  if (alone) (void)pthread_mutex_lock(&one_at_a_time);
  return alone ? &one_at_a_time : NULL;
}
static void leave(pthread_mutex_t *mutex) {
  if (mutex) (void)pthread_mutex_unlock(mutex);
}

/* cblas_sgemm by rows, out = alpha op(a) op(b) + beta out, from any thread. */
static void multiply(enum CBLAS_TRANSPOSE ta, enum CBLAS_TRANSPOSE tb, size_t m, size_t n, size_t k, float alpha,
                     const float *a, size_t lda, const float *b, size_t ldb, float beta, float *out, size_t ldo) {
  pthread_mutex_t *mutex = enter();
  cblas_sgemm(CblasRowMajor, ta, tb, (blasint)m, (blasint)n, (blasint)k, alpha, a, (blasint)lda, b, (blasint)ldb, beta, out,
              (blasint)ldo);
  leave(mutex);
}

struct gram {
  const float *x, *y;
  float *h;
  size_t n_rows, m, n, n_tiles;
};

static void gram_tiles(void *arg, size_t begin, size_t end, int thread) {
  (void)thread;
  const struct gram *g = arg;
  for (size_t t = begin; t < end; t++) {
    size_t i = t / g->n_tiles * TILE, j = t % g->n_tiles * TILE;
    if (g->x == g->y && j > i) continue;
    multiply(CblasTrans, CblasNoTrans, QTR_MIN(TILE, g->m - i), QTR_MIN(TILE, g->n - j), g->n_rows, 1, g->x + i, g->m,
             g->y + j, g->n, 1, g->h + i * g->n + j, g->n);
  }
}

void qtr_matrix_add_gram(struct qtr_threads *team, const float *x, const float *y, size_t n_rows, size_t m, size_t n,
                         float *h) {
  struct gram g = {.x = x, .y = y, .h = h, .n_rows = n_rows, .m = m, .n = n, .n_tiles = qtr_ceil_div(n, TILE)};
  openblas_set_num_threads(1);
  qtr_threads_for(team, qtr_ceil_div(m, TILE) * g.n_tiles, 1, gram_tiles, &g);
}

struct block_grams {
  const float *x;
  size_t n_rows, n, width;
  float *out;
};

static void block_grams(void *arg, size_t begin, size_t end, int thread) {
  (void)thread;
  const struct block_grams *b = arg;
  for (size_t g = begin; g < end; g++) {
    const float *x = b->x + g * b->width;
    multiply(CblasTrans, CblasNoTrans, b->width, b->width, b->n_rows, 1, x, b->n, x, b->n, 0,
             b->out + g * b->width * b->width, b->width);
  }
}

void qtr_matrix_block_grams(struct qtr_threads *team, const float *x, size_t n_rows, size_t n, size_t width, float *out) {
  struct block_grams b = {.x = x, .n_rows = n_rows, .n = n, .width = width, .out = out};
  openblas_set_num_threads(1);
  qtr_threads_for(team, n / width, 1, block_grams, &b);
}

struct mirror {
  float *h;
  size_t n;
};

#define SIDE ((size_t)64)

/* A band of rows, a square at a time: both sides of the diagonal then stay in the cache. */
static void mirror_bands(void *arg, size_t begin, size_t end, int thread) {
  (void)thread;
  const struct mirror *m = arg;
  for (size_t row = begin * SIDE; row < QTR_MIN(end * SIDE, m->n); row += SIDE) {
    for (size_t column = row; column < m->n; column += SIDE) {
      for (size_t i = row; i < QTR_MIN(row + SIDE, m->n); i++) {
        for (size_t j = QTR_MAX(column, i + 1); j < QTR_MIN(column + SIDE, m->n); j++)
          m->h[i * m->n + j] = m->h[j * m->n + i];
      }
    }
  }
}

void qtr_matrix_mirror(struct qtr_threads *team, float *h, size_t n) {
  struct mirror m = {h, n};
  qtr_threads_for(team, qtr_ceil_div(n, SIDE), 1, mirror_bands, &m);
}

void qtr_matrix_multiply_t(const float *a, size_t lda, const float *b, size_t ldb, float *out, size_t ldo, size_t m,
                           size_t n, size_t k) {
  multiply(CblasNoTrans, CblasTrans, m, n, k, 1, a, lda, b, ldb, 0, out, ldo);
}

void qtr_matrix_subtract(const float *a, size_t lda, const float *b, size_t ldb, float *out, size_t ldo, size_t m, size_t n,
                         size_t k) {
  multiply(CblasNoTrans, CblasNoTrans, m, n, k, -1, a, lda, b, ldb, 1, out, ldo);
}

struct product {
  const float *a, *b;
  bool straight;
  float *out;
  size_t m, n, k, n_tiles;
};

static void product_tiles(void *arg, size_t begin, size_t end, int thread) {
  (void)thread;
  const struct product *p = arg;
  for (size_t t = begin; t < end; t++) {
    size_t i = t / p->n_tiles * TILE, j = t % p->n_tiles * TILE;
    multiply(CblasNoTrans, p->straight ? CblasNoTrans : CblasTrans, QTR_MIN(TILE, p->m - i), QTR_MIN(TILE, p->n - j), p->k,
             1, p->a + i * p->k, p->k, p->b + (p->straight ? j : j * p->k), p->straight ? p->n : p->k, 0,
             p->out + i * p->n + j, p->n);
  }
}

void qtr_matrix_product(struct qtr_threads *team, const float *a, const float *b, bool straight, float *out, size_t m,
                        size_t n, size_t k) {
  struct product p = {
      .a = a, .b = b, .straight = straight, .out = out, .m = m, .n = n, .k = k, .n_tiles = qtr_ceil_div(n, TILE)};
  openblas_set_num_threads(1);
  qtr_threads_for(team, qtr_ceil_div(m, TILE) * p.n_tiles, 1, product_tiles, &p);
}

/* ---- factorisations ------------------------------------------------------------------------------ */

/* A Cholesky factor under construction, in tiles that threads take, and what is made with it. Doubles: covariances of
 * activations are nearly singular. */
struct factor {
  double *l; /* (n, n) the lower triangle: the matrix, then its factor */
  size_t n;
  const float *h;      /* (n, n) symmetric */
  const size_t *order; /* (n) or NULL */
  double damp;
  size_t at;    /* the diagonal tile whose turn it is begins here */
  float *u;     /* (n, n) of the inverse */
  float *b;     /* (m, n) of solving */
  size_t m;     /* rows of b */
  double *slab; /* (threads, n, SLAB) or (threads, SLAB, n) */
};

#define SLAB ((size_t)64) /* columns of an inverse, or right-hand sides, that one thread solves for */

/* Rows of h in reverse order, a dead column (0 on the diagonal) with 1. */
static void fill_rows(void *arg, size_t begin, size_t end, int thread) {
  (void)thread;
  const struct factor *f = arg;
  size_t last = f->n - 1;
  for (size_t r = begin; r < end; r++) {
    size_t row = f->order ? f->order[last - r] : last - r;
    const float *h = f->h + row * f->n;
    double *l = f->l + r * f->n;
    for (size_t k = 0; k <= r; k++) l[k] = (double)h[f->order ? f->order[last - k] : last - k];
    l[r] = (l[r] == 0 ? 1 : l[r]) + f->damp;
  }
}

static void solve_panel(void *arg, size_t begin, size_t end, int thread) {
  (void)thread;
  const struct factor *f = arg;
  size_t tile = QTR_MIN(TILE, f->n - f->at), first = f->at + tile;
  for (size_t i = begin; i < end; i++) {
    size_t row = first + i * TILE;
    pthread_mutex_t *mutex = enter();
    cblas_dtrsm(CblasRowMajor, CblasRight, CblasLower, CblasTrans, CblasNonUnit, (blasint)QTR_MIN(TILE, f->n - row),
                (blasint)tile, 1, f->l + f->at * f->n + f->at, (blasint)f->n, f->l + row * f->n + f->at, (blasint)f->n);
    leave(mutex);
  }
}

static void update_tiles(void *arg, size_t begin, size_t end, int thread) {
  (void)thread;
  const struct factor *f = arg;
  size_t tile = QTR_MIN(TILE, f->n - f->at), first = f->at + tile, n_tiles = qtr_ceil_div(f->n - first, TILE);
  for (size_t t = begin; t < end; t++) {
    size_t i = first + t / n_tiles * TILE, j = first + t % n_tiles * TILE;
    if (j > i) continue;
    pthread_mutex_t *mutex = enter();
    cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (blasint)QTR_MIN(TILE, f->n - i), (blasint)QTR_MIN(TILE, f->n - j),
                (blasint)tile, -1, f->l + i * f->n + f->at, (blasint)f->n, f->l + j * f->n + f->at, (blasint)f->n, 1,
                f->l + i * f->n + j, (blasint)f->n);
    leave(mutex);
  }
}

/* L with L Lᵀ = the matrix, reversed, damped. False when it is not positive definite. */
static bool factorise(struct qtr_threads *team, struct factor *f) {
  openblas_set_num_threads(1);
  qtr_threads_for(team, f->n, 16, fill_rows, f);
  for (f->at = 0; f->at < f->n; f->at += TILE) {
    blasint tile = (blasint)QTR_MIN(TILE, f->n - f->at), stride = (blasint)f->n, info;
    dpotrf_("U", &tile, f->l + f->at * f->n + f->at, &stride, &info); /* our lower triangle is LAPACK's upper one */
    if (info != 0) return false;
    size_t n_tiles = qtr_ceil_div(f->n - f->at - (size_t)tile, TILE);
    qtr_threads_for(team, n_tiles, 1, solve_panel, f);
    qtr_threads_for(team, n_tiles * n_tiles, 1, update_tiles, f);
  }
  return true;
}

/* L in memory of its own, and with it `slabs` over n_rows rows or columns. *memory: there was too little. */
static bool with_factor(struct qtr_threads *team, struct factor *f, size_t n_rows,
                        void (*slabs)(void *arg, size_t begin, size_t end, int thread), bool *memory) {
  f->l = malloc(f->n * f->n * sizeof *f->l);
  f->slab = malloc((size_t)qtr_threads_count(team) * f->n * SLAB * sizeof *f->slab);
  *memory = !f->l || !f->slab;
  bool ok = !*memory && factorise(team, f);
  if (ok) qtr_threads_for(team, qtr_ceil_div(n_rows, SLAB), 1, slabs, f);
  free(f->l);
  free(f->slab);
  return ok;
}

/* Columns of L⁻¹, reversed again: columns of U. */
static void invert_slabs(void *arg, size_t begin, size_t end, int thread) {
  const struct factor *f = arg;
  size_t n = f->n;
  double *x = f->slab + (size_t)thread * n * SLAB;
  for (size_t s = begin; s < end; s++) {
    size_t first = s * SLAB, width = QTR_MIN(SLAB, n - first), n_rows = n - first;
    memset(x, 0, n_rows * width * sizeof *x);
    for (size_t i = 0; i < width; i++) x[i * width + i] = 1;
    pthread_mutex_t *mutex = enter();
    cblas_dtrsm(CblasRowMajor, CblasLeft, CblasLower, CblasNoTrans, CblasNonUnit, (blasint)n_rows, (blasint)width, 1,
                f->l + first * n + first, (blasint)n, x, (blasint)width);
    leave(mutex);
    for (size_t r = 0; r < n; r++) {
      float *u = f->u + (n - 1 - r) * n + n - 1 - first;
      for (size_t i = 0; i < width; i++) u[-(ptrdiff_t)i] = r < first + i ? 0 : (float)x[(r - first) * width + i];
    }
  }
}

bool qtr_matrix_inverse_factor(struct qtr_threads *team, const float *h, const size_t *order, double damp, size_t n,
                               float *u, bool *memory) {
  struct factor f = {.n = n, .h = h, .order = order, .damp = damp, .u = u};
  return with_factor(team, &f, n, invert_slabs, memory);
}

/* X L Lᵀ = B, for some rows of B; columns reversed as L is. */
static void solve_slabs(void *arg, size_t begin, size_t end, int thread) {
  const struct factor *f = arg;
  size_t n = f->n;
  double *x = f->slab + (size_t)thread * n * SLAB;
  for (size_t s = begin; s < end; s++) {
    size_t n_rows = QTR_MIN(SLAB, f->m - s * SLAB);
    float *b = f->b + s * SLAB * n;
    for (size_t i = 0; i < n_rows * n; i++) x[i] = (double)b[i / n * n + n - 1 - i % n];
    pthread_mutex_t *mutex = enter();
    cblas_dtrsm(CblasRowMajor, CblasRight, CblasLower, CblasTrans, CblasNonUnit, (blasint)n_rows, (blasint)n, 1, f->l,
                (blasint)n, x, (blasint)n);
    cblas_dtrsm(CblasRowMajor, CblasRight, CblasLower, CblasNoTrans, CblasNonUnit, (blasint)n_rows, (blasint)n, 1, f->l,
                (blasint)n, x, (blasint)n);
    leave(mutex);
    for (size_t i = 0; i < n_rows * n; i++) b[i] = (float)x[i / n * n + n - 1 - i % n];
  }
}

bool qtr_matrix_solve(struct qtr_threads *team, const float *h, double damp, size_t n, float *b, size_t m, bool *memory) {
  struct factor f = {.n = n, .h = h, .damp = damp, .b = b, .m = m};
  return with_factor(team, &f, m, solve_slabs, memory);
}
