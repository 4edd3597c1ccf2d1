/* clang-format off */
/* linear.h - how the CPU backend stores matrices, shared by linear*.c.
 *
 * A matrix is cut into panels of 32 output channels; the last one may be filled up with zero rows. Row r of panel p is output
 * channel 32 p + r; in a gate/up matrix rows 0…15 are the gate's channels 16 p + r and rows 16…31 the same channels of up, so
 * that one thread has both. All instruction sets read the same bytes. A panel, from its first byte:
 *
 * QTR_PANEL_W8 (W8A8): blocks of 4 inputs, 128 bytes each; inputs 4 i … 4 i + 3 of row r, the value w + 128 as unsigned byte
 *
 *     block i:   | row 0: k0 k1 k2 k3 | row 1: k0 k1 k2 k3 | … | row 31 |    16 blocks are two AMX tiles of weights (16 rows of
 *                  4 bytes                                                   64 bytes, stride 128); half a block is one AVX-512
 *                                                                            register of 16 rows for one dot product of 4
 *
 * QTR_PANEL_W4 (per channel): blocks of 8 inputs, 128 bytes each, two codes a byte
 *
 *     block i:   | row 0: 4 bytes | row 1: 4 bytes | … | row 31 |    byte b: bits 0…3 input 8 i + b, bits 4…7 input 8 i + 4 + b:
 *                                                                    low and high nibbles are two blocks of the W8 form
 *
 * QTR_PANEL_W4G (groups of 128): each group is 33 cache lines, so that scales and codes are one stream
 *
 *     | s2 of rows 0…31 | zs of rows 0…31 | 16 blocks of the W4 form |    w8 = code * s2 - zs, never outside int8: a matrix
 *       32 bytes          32 bytes          2048 bytes                    with a code that leaves that range is stored as W8
 *
 * QTR_PANEL_F32, F16, BF16: input by input, the 32 rows' values in the file's type.
 *
 * Inputs are filled up to a multiple of 64: codes of W4 with 0, w of W8 with 0; the activations' codes there are 0 as well. */
/* clang-format on */
#ifndef QTR_BACKEND_CPU_LINEAR_H
#define QTR_BACKEND_CPU_LINEAR_H

#include "backend/cpu/activation.h"
#include "backend/cpu/cpu.h"

enum { QTR_PANEL_ROWS = 32, QTR_BLOCK_BYTES = 128, QTR_GROUP_BYTES = 64 + 16 * QTR_BLOCK_BYTES };

enum qtr_panel { QTR_PANEL_F32, QTR_PANEL_F16, QTR_PANEL_BF16, QTR_PANEL_W8, QTR_PANEL_W4, QTR_PANEL_W4G };

struct qtr_linear {
  enum qtr_panel form;
  bool gate_up;
  size_t n_in, n_out, n_panels;
  size_t n_in_padded; /* to 64, integer forms */
  size_t panel_bytes;
  uint8_t *panels;             /* (n_panels, panel_bytes) */
  float *scale, *szero, *bias; /* (n_panels, 32) in panel order; NULL where there is none */
  size_t n_bytes;              /* of all of these */
};

static inline const uint8_t *qtr_linear_panel(const struct qtr_linear *l, size_t panel) {
  return l->panels + panel * l->panel_bytes;
}

/* linear_repack.c: fills panels, scale, szero and bias, all allocated and zeroed. */
void qtr_cpu_linear_repack(const struct qtr_cpu *c, const struct qtr_linear_source *source, struct qtr_linear *l);
/* Whether every code of a g128 matrix gives 0 <= code * s2 <= 255 and a w8 that does not wrap. */
bool qtr_cpu_linear_g128_fits(const struct qtr_cpu *c, const struct qtr_linear_source *source);

/* One instruction set. */
struct qtr_linear_kernels {
  size_t max_tokens; /* of one call of dot, at most QTR_DOT_TOKENS */
  /* acc (n, 32) of one panel and tokens [token, token + n): int32 sums of codes * weights as stored (W8: of w + 128; W4G: of
   * w8), or floats of the F forms, summed in the order of the inputs by FMA (portable: multiply, then add). */
  void (*dot)(const struct qtr_linear *l, const struct qtr_input *in, size_t panel, size_t token, size_t n, void *acc);
  /* Scales, bias and epilogue for such an acc. biased: the sums are of w + 128. */
  void (*finish)(const struct qtr_linear_args *args, size_t panel, size_t token, size_t n, const void *acc, bool biased);
};
enum { QTR_DOT_TOKENS = 8 };

const struct qtr_linear_kernels *qtr_cpu_linear_portable(void);
const struct qtr_linear_kernels *qtr_cpu_linear_avx2(void); /* NULL when not built, as the next ones */
const struct qtr_linear_kernels *qtr_cpu_linear_avx512(void);
const struct qtr_linear_kernels *qtr_cpu_linear_vnni(void);

#endif
