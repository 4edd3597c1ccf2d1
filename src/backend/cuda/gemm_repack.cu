/* gemm_repack.cu - from the disk's weight layout (spec A.3, A.4) to that of the kernels (gemm_internal.h), on the GPU, at
 * load time; and the check and expansion of group-quantised matrices whose weights leave int8 (spec B.3). Speed hardly
 * matters: a thread gathers the bytes of one word. */
#include "backend/cuda/gemm_internal.h"

#define THREADS 256

static size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

size_t qtr_cuda_matrix_padded_rows(enum qtr_cuda_path path, size_t n_out) {
  (void)path;
  return round_up(n_out, QTR_TILE_M);
}

size_t qtr_cuda_matrix_code_bytes(enum qtr_cuda_path path, enum qtr_linear_format format, size_t n_out, size_t n_in) {
  (void)path;
  size_t step_in = format == QTR_LINEAR_W4A8_G128 ? QTR_GROUP : format == QTR_LINEAR_W4A8 ? 32 : 1;
  bool known = format == QTR_LINEAR_W8A8 || format == QTR_LINEAR_W4A8 || format == QTR_LINEAR_W4A8_G128;
  /* |acc| <= 128 * 128 * n_in stays below 2^31; kernels count rows and outputs in 32 bits. */
  if (!known || !n_out || !n_in || n_in > 131071 || n_in % step_in || n_out > (1u << 30)) return 0;
  return round_up(n_out, QTR_TILE_M) / 64 * (round_up(n_in, QTR_TILE_K) / QTR_TILE_K) * qtr_gemm_block_bytes(format);
}

size_t qtr_cuda_matrix_group_bytes(enum qtr_cuda_path path, enum qtr_linear_format format, size_t n_out, size_t n_in) {
  (void)path, (void)format, (void)n_out, (void)n_in;
  return 0; /* inside the blocks */
}

cudaError_t qtr_cuda_matrix_clear(const struct qtr_cuda_matrix *m, cudaStream_t stream) {
  size_t bytes = qtr_cuda_matrix_code_bytes(m->path, m->format, m->n_out, m->n_in);
  size_t rows = qtr_cuda_matrix_padded_rows(m->path, m->n_out) * sizeof(float);
  if (!bytes) return cudaErrorInvalidValue;
  cudaError_t e = cudaMemsetAsync(m->code, 0, bytes, stream);
  if (e == cudaSuccess && m->scale) e = cudaMemsetAsync(m->scale, 0, rows, stream);
  if (e == cudaSuccess && m->szero) e = cudaMemsetAsync(m->szero, 0, rows, stream);
  if (e == cudaSuccess && m->bias) e = cudaMemsetAsync(m->bias, 0, rows, stream);
  return e;
}

/* Code (row, col) of the packed tensor, and the place of a row's second-level constants: checkpoint/packing.h on the device.
 */
static __device__ uint32_t w4_get(const void *packed, size_t n_in, size_t row, size_t col) {
  size_t at = (row / 32 * (n_in / 32) + col / 32) * 512 + (row % 8 * 4 + col / 4 % 4) * 16 + col / 16 % 2 * 8 +
              row / 8 % 2 * 4 + col % 4;
  return ((const uint8_t *)packed)[at] >> (row / 16 % 2 * 4) & 15u;
}
static __device__ size_t s2_position(size_t row) { return row / 32 * 32 + row % 8 * 4 + row / 8 % 4; }

/* Row of `part` that is kernel row r, or -1. */
static __device__ int64_t part_row(const struct qtr_cuda_matrix &m, const struct qtr_cuda_part &part, size_t r) {
  if (m.gate_up) {
    bool up = r / 8 % 2;
    size_t row = r / 16 * 8 + r % 8;
    return up == (part.first_row != 0) && row < part.n_out ? (int64_t)row : -1;
  }
  return r >= part.first_row && r - part.first_row < part.n_out ? (int64_t)(r - part.first_row) : -1;
}

/* One word of codes a thread; m.code (rows / 64, k_steps, block). */
static __global__ void k_repack_codes(const struct qtr_cuda_matrix m, const struct qtr_cuda_part part, size_t block_bytes,
                                      size_t k_steps, size_t n_words) {
  bool w8 = m.format == QTR_LINEAR_W8A8;
  size_t words = w8 ? 2048 : 1024; /* of a block */
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n_words; i += (size_t)gridDim.x * blockDim.x) {
    size_t block = i / words, in = i % words, tile = block / k_steps, step = block % k_steps;
    size_t word = in % 4, thread = in / 4 % 128, piece = in / 512;
    int64_t row = part_row(m, part, tile * 64 + thread / 32 * 16 + thread % 32 / 4 + word % 2 * 8);
    if (row < 0) continue;
    size_t k = step * QTR_TILE_K + thread % 4 * 4 + (w8 ? piece * 32 + word / 2 * 16 : piece * 64 + word / 2 * 32);
    uint32_t v = 0;
    for (size_t j = 0; j < 4; j++) {
      if (w8) {
        if (k + j < m.n_in) v |= (uint32_t)((const uint8_t *)part.weight)[(size_t)row * m.n_in + k + j] << (8 * j);
      } else if (k + 16 + j < m.n_in) { /* n_in is a multiple of 32 */
        v |= w4_get(part.weight, m.n_in, (size_t)row, k + j) << (8 * j);
        v |= w4_get(part.weight, m.n_in, (size_t)row, k + 16 + j) << (8 * j + 4);
      }
    }
    *(uint32_t *)((uint8_t *)m.code + block * block_bytes + in * 4) = v;
  }
}

/* One kernel row a thread (x), one group (y): second-level constants; scales with group 0. */
static __global__ void k_repack_rows(const struct qtr_cuda_matrix m, const struct qtr_cuda_part part, size_t block_bytes,
                                     size_t k_steps, size_t n_rows) {
  size_t r = blockIdx.x * (size_t)blockDim.x + threadIdx.x, group = blockIdx.y;
  int64_t row = r < n_rows ? part_row(m, part, r) : -1;
  if (row < 0) return;
  if (m.format == QTR_LINEAR_W4A8_G128) {
    size_t at = group * part.n_out + s2_position((size_t)row);
    uint8_t *block = (uint8_t *)m.code + (r / 64 * k_steps + group) * block_bytes + 4096;
    uint8_t *to = block + r % 64 / 16 * 32 + r % 8 * 4 + r / 8 % 2 * 2;
    to[0] = part.s2_scale[at];
    to[1] = (uint8_t)qtr_dequant_zs(part.s2_zero[at]);
  }
  if (group) return;
  m.scale[r] = part.scale[row];
  if (m.szero) m.szero[r] = part.szero ? part.szero[row] : 0;
  if (m.bias) m.bias[r] = part.bias ? part.bias[row] : 0;
}

cudaError_t qtr_cuda_matrix_repack(const struct qtr_cuda_matrix *m, const struct qtr_cuda_part *part, cudaStream_t stream) {
  size_t bytes = qtr_cuda_matrix_code_bytes(m->path, m->format, m->n_out, m->n_in);
  bool w4 = m->format != QTR_LINEAR_W8A8, grouped = m->format == QTR_LINEAR_W4A8_G128;
  if (!bytes || !part->n_out || part->first_row + part->n_out > m->n_out || (w4 && part->n_out % 32) || !part->scale ||
      (grouped && (!part->s2_scale || !part->s2_zero)) ||
      (m->gate_up && (part->n_out * 2 != m->n_out || (part->first_row && part->first_row != part->n_out)))) {
    return cudaErrorInvalidValue;
  }
  size_t block = qtr_gemm_block_bytes(m->format), k_steps = round_up(m->n_in, QTR_TILE_K) / QTR_TILE_K;
  size_t rows = qtr_cuda_matrix_padded_rows(m->path, m->n_out), n_words = bytes / block * (w4 ? 1024 : 2048);
  size_t grid = round_up(n_words, THREADS) / THREADS;
  k_repack_codes<<<(unsigned)(grid < 65536 ? grid : 65536), THREADS, 0, stream>>>(*m, *part, block, k_steps, n_words);
  k_repack_rows<<<dim3((unsigned)(rows / QTR_TILE_M), grouped ? (unsigned)k_steps : 1u), QTR_TILE_M, 0, stream>>>(
      *m, *part, block, k_steps, rows);
  return cudaGetLastError();
}

/* One row and group a thread. */
static __global__ void k_g128_count_bad(const struct qtr_cuda_part part, size_t n_in, int32_t *n_bad) {
  size_t row = blockIdx.x * (size_t)blockDim.x + threadIdx.x, group = blockIdx.y;
  if (row >= part.n_out) return;
  size_t at = group * part.n_out + s2_position(row);
  uint32_t s2 = part.s2_scale[at], z = part.s2_zero[at];
  bool good = true;
  for (size_t k = 0; k < QTR_GROUP; k++) {
    good = good && qtr_dequant_in_range(w4_get(part.weight, n_in, row, group * QTR_GROUP + k), s2, z);
  }
  if (!good) atomicAdd(n_bad, 1);
}

cudaError_t qtr_cuda_g128_count_bad(const struct qtr_cuda_part *part, size_t n_in, int32_t *n_bad, cudaStream_t stream) {
  if (!part->n_out || part->n_out % 32 || !n_in || n_in % QTR_GROUP || n_in > 131071) return cudaErrorInvalidValue;
  dim3 grid((unsigned)(round_up(part->n_out, THREADS) / THREADS), (unsigned)(n_in / QTR_GROUP));
  k_g128_count_bad<<<grid, THREADS, 0, stream>>>(*part, n_in, n_bad);
  return cudaGetLastError();
}

static __global__ void k_g128_expand(const struct qtr_cuda_part part, size_t n_in, int8_t *out) {
  size_t n = part.n_out * n_in;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
    size_t row = i / n_in, k = i % n_in, at = k / QTR_GROUP * part.n_out + s2_position(row);
    out[i] = (int8_t)(w4_get(part.weight, n_in, row, k) * part.s2_scale[at] + part.s2_zero[at]);
  }
}

cudaError_t qtr_cuda_g128_expand(const struct qtr_cuda_part *part, size_t n_in, int8_t *out, cudaStream_t stream) {
  if (!part->n_out || part->n_out % 32 || !n_in || n_in % QTR_GROUP || n_in > 131071) return cudaErrorInvalidValue;
  size_t grid = round_up(part->n_out * n_in, THREADS) / THREADS;
  k_g128_expand<<<(unsigned)(grid < 65536 ? grid : 65536), THREADS, 0, stream>>>(*part, n_in, out);
  return cudaGetLastError();
}
