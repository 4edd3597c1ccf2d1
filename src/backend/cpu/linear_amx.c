/* linear_amx.c - integer matrices for batches of tokens by AMX tiles.
 *
 * A block is 32 tokens times one panel of 32 output channels: 2 x 2 tiles of accumulators (tmm0…3), fed for every 64 inputs
 * by two tiles of activations (tmm4, 5: 16 tokens x 64 codes, straight from the rows of the input) and two of weights (tmm6,
 * 7: 16 rows of 4 inputs x 16 channels, the W8 form of linear.h). 4-bit panels are turned into that form once per panel, one
 * step of 64 inputs ahead of the multiplication by the first block of tokens; the other blocks find the bytes in the
 * second-level cache. While they run they fetch the next panel, so that the memory works during the multiplications.
 *
 * g128: w8 + 128 = code * s2 + (128 - zs), with code * s2 <= 255, so one 16-bit multiplication scales two codes at once and
 * one byte addition shifts them (linear.c admits only matrices for which this holds). The sums are of w8 + 128 and int32
 * arithmetic is modulo 2^32, so the epilogue's correction by the sum of the codes is exact. */
#include "backend/cpu/linear_amx.h"

#ifdef __AMX_INT8__
#include <immintrin.h>

#include "backend/cpu/linear_epilogue.h"

enum { TOKENS = 32, STEP = 64, STEP_BYTES = STEP * ROWS, TILE_ROWS = 16, TILE_BYTES = 1024, AHEAD = 4096 };

struct tile_config {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes_per_row[16];
  uint8_t rows[16];
};

static void tiles_configure(void) {
  struct tile_config config = {.palette = 1};
  for (int i = 0; i < 8; i++) {
    config.bytes_per_row[i] = 64;
    config.rows[i] = TILE_ROWS;
  }
  _tile_loadconfig(&config);
}

/* Lanes 4 i … 4 i + 3 of 16 channels' bytes: each byte twice with zeros between (16-bit factors), or four times. */
static inline __m512i lanes_factor(const uint8_t *bytes) {
  const __m512i order =
      _mm512_set_epi32((int)0x800f800f, (int)0x800e800e, (int)0x800d800d, (int)0x800c800c, (int)0x800b800b, (int)0x800a800a,
                       (int)0x80098009, (int)0x80088008, (int)0x80078007, (int)0x80068006, (int)0x80058005, (int)0x80048004,
                       (int)0x80038003, (int)0x80028002, (int)0x80018001, (int)0x80008000);
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)bytes)), order);
}
static inline __m512i lanes_term(const uint8_t *bytes) {
  const __m512i order =
      _mm512_set_epi32(0x0f0f0f0f, 0x0e0e0e0e, 0x0d0d0d0d, 0x0c0c0c0c, 0x0b0b0b0b, 0x0a0a0a0a, 0x09090909, 0x08080808,
                       0x07070707, 0x06060606, 0x05050505, 0x04040404, 0x03030303, 0x02020202, 0x01010101, 0);
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)bytes)), order);
}

/* 64 inputs of a 4-bit panel, step `step` of them, to 2,048 bytes in the W8 form. */
static inline void step_unpack(enum qtr_panel form, const uint8_t *panel, size_t step, uint8_t *out) {
  const uint8_t *block = panel + step * (STEP / 8) * QTR_BLOCK_BYTES;
  const __m512i nibble = _mm512_set1_epi8(15);
  if (form == QTR_PANEL_W4G) {
    const uint8_t *group = panel + step / 2 * QTR_GROUP_BYTES;
    block = group + 64 + step % 2 * (STEP / 8) * QTR_BLOCK_BYTES;
    for (int half = 0; half < 2; half++) {
      __m512i s2 = lanes_factor(group + half * TILE_ROWS);
      __m512i shift = _mm512_sub_epi8(_mm512_set1_epi8(-128), lanes_term(group + ROWS + half * TILE_ROWS));
      for (int i = 0; i < STEP / 8; i++) {
        const uint8_t *from = block + i * QTR_BLOCK_BYTES + half * 64;
        _mm_prefetch((const char *)from + AHEAD, _MM_HINT_T0);
        __m512i w = _mm512_loadu_si512(from);
        __m512i low = _mm512_and_si512(w, nibble), high = _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble);
        uint8_t *to = out + 2 * i * QTR_BLOCK_BYTES + half * 64;
        _mm512_store_si512(to, _mm512_add_epi8(_mm512_mullo_epi16(low, s2), shift));
        _mm512_store_si512(to + QTR_BLOCK_BYTES, _mm512_add_epi8(_mm512_mullo_epi16(high, s2), shift));
      }
    }
  } else {
    for (int i = 0; i < STEP / 8; i++) {
      for (int half = 0; half < 2; half++) {
        const uint8_t *from = block + i * QTR_BLOCK_BYTES + half * 64;
        _mm_prefetch((const char *)from + AHEAD, _MM_HINT_T0);
        __m512i w = _mm512_loadu_si512(from);
        uint8_t *to = out + 2 * i * QTR_BLOCK_BYTES + half * 64;
        _mm512_store_si512(to, _mm512_and_si512(w, nibble));
        _mm512_store_si512(to + QTR_BLOCK_BYTES, _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble));
      }
    }
  }
}

static inline void multiply_32(const int8_t *x, size_t stride, const uint8_t *w) {
  _tile_loadd(4, x, stride);
  _tile_loadd(6, w, QTR_BLOCK_BYTES);
  _tile_loadd(7, w + 64, QTR_BLOCK_BYTES);
  _tile_dpbsud(0, 4, 6);
  _tile_dpbsud(1, 4, 7);
  _tile_loadd(5, x + TILE_ROWS * stride, stride);
  _tile_dpbsud(2, 5, 6);
  _tile_dpbsud(3, 5, 7);
}

static inline void multiply_16(const int8_t *x, size_t stride, const uint8_t *w) {
  _tile_loadd(4, x, stride);
  _tile_loadd(6, w, QTR_BLOCK_BYTES);
  _tile_loadd(7, w + 64, QTR_BLOCK_BYTES);
  _tile_dpbsud(0, 4, 6);
  _tile_dpbsud(1, 4, 7);
}

/* What one thread does for one panel. */
struct job {
  const struct qtr_linear_args *args;
  size_t panel, n_steps;
  uint8_t *bytes;       /* 4-bit panels: the W8 form of all steps, or of the last two when `ring` */
  bool ring;            /* one block of tokens: nobody reads a step twice */
  const uint8_t *fetch; /* next bytes to bring to the second-level cache, up to fetch_end */
  const uint8_t *fetch_end;
  size_t fetch_lines; /* in every step */
};

/* One block of up to 32 tokens; acc (32, 32) int32. */
static void block_multiply(struct job *j, size_t token, size_t n, bool first, int32_t *acc) {
  const struct qtr_linear *l = j->args->linear;
  const struct qtr_input *in = j->args->input;
  const uint8_t *panel = qtr_linear_panel(l, j->panel);
  const int8_t *x = qtr_input_codes(in, token);
  const bool stored = l->form == QTR_PANEL_W8, wide = n > TILE_ROWS;
  const size_t stride = in->stride;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (first && !stored) step_unpack(l->form, panel, 0, j->bytes);
  for (size_t s = 0; s < j->n_steps; s++, x += STEP) {
    const uint8_t *w = stored ? panel + s * STEP_BYTES : j->bytes + (j->ring ? s & 1 : s) * STEP_BYTES;
    if (first && !stored && s + 1 < j->n_steps) {
      step_unpack(l->form, panel, s + 1, j->bytes + (j->ring ? ~s & 1 : s + 1) * STEP_BYTES);
    }
    if (first && stored) {
      for (size_t i = 0; i < STEP_BYTES; i += 64) _mm_prefetch((const char *)w + AHEAD + i, _MM_HINT_T0);
    }
    for (size_t i = 0; !first && i < j->fetch_lines && j->fetch < j->fetch_end; i++, j->fetch += 64) {
      _mm_prefetch((const char *)j->fetch, _MM_HINT_T1);
    }
    if (wide) {
      multiply_32(x, stride, w);
    } else {
      multiply_16(x, stride, w);
    }
  }
  _tile_stored(0, acc, ROWS * sizeof *acc);
  _tile_stored(1, acc + TILE_ROWS, ROWS * sizeof *acc);
  if (!wide) return;
  _tile_stored(2, acc + TILE_ROWS * ROWS, ROWS * sizeof *acc);
  _tile_stored(3, acc + TILE_ROWS * ROWS + TILE_ROWS, ROWS * sizeof *acc);
}

void qtr_cpu_linear_amx(const struct qtr_linear_args *args, size_t begin, size_t end, size_t token, size_t n_tokens,
                        void *scratch) {
  const struct qtr_linear *l = args->linear;
  struct job j = {.args = args, .n_steps = l->n_in_padded / STEP, .bytes = scratch, .ring = n_tokens <= TOKENS};
  size_t n_blocks = qtr_ceil_div(n_tokens, TOKENS), fetch_steps = (n_blocks - 1) * j.n_steps;
  if (fetch_steps) j.fetch_lines = qtr_ceil_div(l->panel_bytes / 64, fetch_steps);
  _Alignas(64) int32_t acc[TOKENS * ROWS];
  tiles_configure();
  for (j.panel = begin; j.panel < end; j.panel++) {
    j.fetch = qtr_linear_panel(l, j.panel + 1);
    j.fetch_end = j.panel + 1 < l->n_panels ? j.fetch + l->panel_bytes : j.fetch;
    for (size_t i = 0; i < n_blocks; i++) {
      size_t n = QTR_MIN(n_tokens - i * TOKENS, (size_t)TOKENS);
      block_multiply(&j, token + i * TOKENS, n, i == 0, acc);
      finish(args, j.panel, token + i * TOKENS, n, acc, l->form != QTR_PANEL_W4);
    }
  }
  _tile_release();
}

bool qtr_cpu_linear_amx_built(void) { return true; }
#else
bool qtr_cpu_linear_amx_built(void) { return false; }
void qtr_cpu_linear_amx(const struct qtr_linear_args *args, size_t begin, size_t end, size_t token, size_t n_tokens,
                        void *scratch) {
  (void)args, (void)begin, (void)end, (void)token, (void)n_tokens, (void)scratch;
}
#endif
