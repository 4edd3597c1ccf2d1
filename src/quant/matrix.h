/* matrix.h - dense linear algebra of the calibration, on OpenBLAS: its kernels for tiles, our threads around them, so that
 * the result does not depend on how many there are. */
#ifndef QTR_QUANT_MATRIX_H
#define QTR_QUANT_MATRIX_H

#include "base/threads.h"

/* h += xᵀ y. x: (n_rows, m), y: (n_rows, n), h: (m, n). With y == x only the tiles on and below the diagonal are made:
 * qtr_matrix_mirror completes them. */
void qtr_matrix_add_gram(struct qtr_threads *team, const float *x, const float *y, size_t n_rows, size_t m, size_t n,
                         float *h);
/* The blocks of width on the diagonal of xᵀx. x: (n_rows, n), out: (n / width, width, width) */
void qtr_matrix_block_grams(struct qtr_threads *team, const float *x, size_t n_rows, size_t n, size_t width, float *out);
void qtr_matrix_mirror(struct qtr_threads *team, float *h, size_t n); /* the lower triangle to the upper */

/* out = a bᵀ on the caller's thread. a: (m, k) rows lda apart, b: (n, k), out: (m, n). */
void qtr_matrix_multiply_t(const float *a, size_t lda, const float *b, size_t ldb, float *out, size_t ldo, size_t m,
                           size_t n, size_t k);
/* out -= a b. a: (m, k), b: (k, n), out: (m, n); on the caller's thread. */
void qtr_matrix_subtract(const float *a, size_t lda, const float *b, size_t ldb, float *out, size_t ldo, size_t m, size_t n,
                         size_t k);

/* out = a bᵀ, or with `straight` a b, with all threads. a: (m, k), b: (n, k) or (k, n), out: (m, n) */
void qtr_matrix_product(struct qtr_threads *team, const float *a, const float *b, bool straight, float *out, size_t m,
                        size_t n, size_t k);

/* The upper triangular U with H⁻¹ = Uᵀ U, which GPTQ walks along (spec F.8), out of a symmetric positive definite H: with
 * H = R Rᵀ, R upper triangular, U is R⁻¹, so no inverse is formed. H is h with its rows and columns in the order of `order`
 * (NULL: as they are), where a 0 on the diagonal counts as 1, and damp added to the diagonal. h: (n, n), u: (n, n) with
 * zeros below the diagonal. False when H is not positive definite or memory is short (*memory says which). */
bool qtr_matrix_inverse_factor(struct qtr_threads *team, const float *h, const size_t *order, double damp, size_t n,
                               float *u, bool *memory);

/* Solves X H = B for X, H as above without order: b (m, n) becomes X. Same return. */
bool qtr_matrix_solve(struct qtr_threads *team, const float *h, double damp, size_t n, float *b, size_t m, bool *memory);

#endif
