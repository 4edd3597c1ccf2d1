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

#define TILE ((size_t)256)

/* LAPACK, which OpenBLAS holds but does not declare: columns first, every argument by address, *info 0 = done. */
void dpotrf_(const char *uplo, const blasint *n, double *a, const blasint *lda, blasint *info);
void dtrtri_(const char *uplo, const char *diag, const blasint *n, double *a, const blasint *lda, blasint *info);
void dpotrs_(const char *uplo, const blasint *n, const blasint *nrhs, const double *a, const blasint *lda, double *b,
             const blasint *ldb, blasint *info);

/* cblas_sgemm by rows, out = alpha op(a) op(b) + beta out, from any thread. */
static void multiply(enum CBLAS_TRANSPOSE ta, enum CBLAS_TRANSPOSE tb, size_t m, size_t n, size_t k, float alpha,
                     const float *a, size_t lda, const float *b, size_t ldb, float beta, float *out, size_t ldo) {
  static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;
  bool alone = openblas_get_parallel() == OPENBLAS_SEQUENTIAL;
  if (alone) (void)pthread_mutex_lock(&one_at_a_time);
  cblas_sgemm(CblasRowMajor, ta, tb, (blasint)m, (blasint)n, (blasint)k, alpha, a, (blasint)lda, b, (blasint)ldb, beta, out,
              (blasint)ldo);
  if (alone) (void)pthread_mutex_unlock(&one_at_a_time);
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

void qtr_matrix_mirror(float *h, size_t n) {
  for (size_t i = 0; i < n; i++) {
    for (size_t j = i + 1; j < n; j++) h[i * n + j] = h[j * n + i];
  }
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

bool qtr_matrix_inverse_factor(const float *h, double damp, size_t n, float *u, bool *memory) {
  double *r = malloc(n * n * sizeof *r);
  *memory = !r;
  if (!r) return false;
  openblas_set_num_threads(1);
  /* R = P M P with M the lower factor of the reversed matrix P H P. LAPACK counts columns first: to it a lower factor in our
   * rows is an upper one, and it returns Mᵀ in what it calls the upper triangle. */
  for (size_t i = 0; i < n; i++) {
    for (size_t j = 0; j < n; j++) {
      r[(n - 1 - i) * n + n - 1 - j] = (double)(i >= j ? h[i * n + j] : h[j * n + i]) + (i == j ? damp : 0);
    }
  }
  blasint size = (blasint)n, info;
  dpotrf_("U", &size, r, &size, &info);
  if (info == 0) dtrtri_("U", "N", &size, r, &size, &info);
  bool ok = info == 0;
  for (size_t i = 0; ok && i < n; i++) {
    for (size_t j = 0; j < n; j++) u[i * n + j] = j < i ? 0 : (float)r[(n - 1 - i) * n + n - 1 - j];
  }
  free(r);
  return ok;
}

bool qtr_matrix_solve(const float *h, double damp, size_t n, float *b, size_t m, bool *memory) {
  double *r = malloc(n * n * sizeof *r), *x = malloc(m * n * sizeof *x);
  *memory = !r || !x;
  bool ok = false;
  if (*memory) goto done;
  openblas_set_num_threads(1);
  for (size_t i = 0; i < n; i++) {
    for (size_t j = 0; j < n; j++) r[i * n + j] = (double)(i >= j ? h[i * n + j] : h[j * n + i]) + (i == j ? damp : 0);
  }
  for (size_t i = 0; i < m * n; i++) x[i] = (double)b[i];
  blasint size = (blasint)n, rows = (blasint)m, info;
  dpotrf_("U", &size, r, &size, &info);
  if (info == 0) dpotrs_("U", &size, &rows, r, &size, x, &size, &info); /* our rows are its columns: H xᵀ = bᵀ */
  ok = info == 0;
  for (size_t i = 0; ok && i < m * n; i++) b[i] = (float)x[i];
done:
  free(r);
  free(x);
  return ok;
}
