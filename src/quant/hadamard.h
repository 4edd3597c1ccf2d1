/* hadamard.h - orthonormal Hadamard rotations of any even size (spec F.3): Q with Q Qᵀ = I, applied to vectors in double.
 *
 * n = K * 2^m. The power of two is Sylvester's matrix as a fast transform; K is one of F.3's factors, a Hadamard matrix by
 * Paley's constructions over GF(q), q a prime or the square of one. The reference tabulates other matrices of the same
 * orders: any of them gives the same flatness, and none is visible in a checkpoint but by its result. Where no construction
 * of ours gives K (156, 172, odd sizes), the K-point part is the orthonormal discrete Hartley transform: a rotation as good
 * as exact, with entries up to sqrt(2) larger. */
#ifndef QTR_QUANT_HADAMARD_H
#define QTR_QUANT_HADAMARD_H

#include "base/threads.h"

struct qtr_rotation {
  size_t n;       /* size of the vectors */
  size_t k;       /* the factor that is not a power of two; 1 = none */
  double *factor; /* (k, k) orthonormal; NULL when k is 1 */
  bool flat;      /* every entry of Q is +-1/sqrt(n): a Hadamard matrix */
};

enum qtr_status qtr_rotation_create(size_t n, struct qtr_rotation *rotation, struct qtr_error *err);
void qtr_rotation_free(struct qtr_rotation *rotation);

/* v := v Q (row vector; as a column: v := Qᵀ v). v, scratch: (n). */
void qtr_rotation_apply(const struct qtr_rotation *rotation, double *v, double *scratch);

/* W := W Q for each run of n values: x (n_rows, n_cols), n_cols a multiple of n. Heads of o_proj are such runs. */
enum qtr_status qtr_rotate_rows(struct qtr_threads *team, const struct qtr_rotation *rotation, float *x, size_t n_rows,
                                size_t n_cols, struct qtr_error *err);
/* W := Qᵀ W for each block of n rows: x (n_rows, n_cols), n_rows a multiple of n. n_cols 1: a bias. */
enum qtr_status qtr_rotate_columns(struct qtr_threads *team, const struct qtr_rotation *rotation, float *x, size_t n_rows,
                                   size_t n_cols, struct qtr_error *err);

#endif
