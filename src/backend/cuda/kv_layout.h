/* kv_layout.h - where the codes of a KV page lie on the GPU. Shared by the host (kv.c) and the kernels.
 *
 * A page of one layer, K or V, is n_kv_heads blocks; a block holds 64 tokens of one head: the codes, then (INT8, INT4) 64
 * pairs of fp16 scale and zero. INT8_STATIC stores code + 128, so that it is read as INT8 with zero 128.
 *
 * head_dim 64 and 128: codes lie in the order in which a warp wants them as the A operand of mma.m16n8k16 (PTX: "a"
 * registers 0...3 of lane l hold row l/4 + 8 (i%2), columns 2 (l%4) + {0, 1} + 8 (i/2)). K's rows are tokens and its columns
 * dims, V's rows are dims and its columns tokens (S^T = K Q^T, O^T = V^T P^T). Fragments follow each other, K:
 * [token/16][dim/16], V: [token/16][dim/16]; 4 (INT4), 2 (INT8) or 1 (F16) of them share chunks of 16 bytes a lane:
 * [fragment / n][lane][fragment % n]. Inside a fragment of a lane
 *   F16   halves in the order of registers, low column first
 *   INT8  bytes in the same order
 *   INT4  one 32-bit word; nibble j = 0...3 of its low half is the low column of a register, of its high half the high
 * column. The two nibbles of a byte belong to one token, so that two tokens never write one byte: K: j = column half + 2 *
 * row half;  V: j = row half + 2 * column half. Nibbles 1 and 3 are read as 16 times their value (mask 0x00f000f0); see
 * attention_common.cuh. Other sizes: [token][dim], INT4 with dim 2j in the low nibble of byte j. */
#ifndef QTR_BACKEND_CUDA_KV_LAYOUT_H
#define QTR_BACKEND_CUDA_KV_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

#include "backend/backend.h"

#ifdef __CUDACC__
#define QTR_KV_FN __host__ __device__ static inline
#else
#define QTR_KV_FN static inline
#endif

QTR_KV_FN int qtr_kv_has_fragments(int dim) { return dim == 64 || dim == 128; }
QTR_KV_FN int qtr_kv_has_params(int format) { return format == QTR_KV_INT8 || format == QTR_KV_INT4; }

/* Bytes of the codes of one head of one page, and of the whole block. Multiples of 16 for even dims (F16: of 256). */
QTR_KV_FN size_t qtr_kv_code_bytes(int format, int dim) {
  size_t n = (size_t)QTR_PAGE_TOKENS * (size_t)dim;
  return format == QTR_KV_F16 ? 2 * n : format == QTR_KV_INT4 ? n / 2 : n;
}
QTR_KV_FN size_t qtr_kv_block_bytes(int format, int dim) {
  return qtr_kv_code_bytes(format, dim) + (qtr_kv_has_params(format) ? QTR_PAGE_TOKENS * 4u : 0u);
}

/* Byte offset of element (token 0...63, dim i) in the block; *shift: position of an INT4 code in its byte. */
QTR_KV_FN size_t qtr_kv_element(int format, int dim, int is_v, int token, int i, int *shift) {
  *shift = 0;
  if (!qtr_kv_has_fragments(dim)) {
    size_t at = (size_t)token * (size_t)dim + (size_t)i;
    if (format == QTR_KV_INT4) {
      *shift = (int)(at & 1) * 4; /* dim is even */
      return at >> 1;
    }
    return format == QTR_KV_F16 ? 2 * at : at;
  }
  int row = is_v ? i : token, column = is_v ? token : i; /* of the operand */
  int lane = row % 8 * 4 + column % 8 / 2, low = column % 2, row_half = row / 8 % 2, column_half = column / 8 % 2;
  int fragment = token / 16 * (dim / 16) + i / 16;
  if (format == QTR_KV_F16) return (size_t)((fragment * 32 + lane) * 16 + (row_half + 2 * column_half) * 4 + low * 2);
  if (format == QTR_KV_INT4) {
    *shift = (is_v ? row_half : column_half) * 4;
    return (size_t)((fragment / 4 * 32 + lane) * 16 + fragment % 4 * 4 + low * 2 + (is_v ? column_half : row_half));
  }
  return (size_t)((fragment / 2 * 32 + lane) * 16 + fragment % 2 * 8 + (row_half + 2 * column_half) * 2 + low);
}

#endif
