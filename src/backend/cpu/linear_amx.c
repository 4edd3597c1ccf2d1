/* linear_amx.c - integer matrices for batches of tokens by AMX tiles.
 *
 * A block is 32 tokens times one panel of 32 output channels: 2 x 2 tiles of accumulators (tmm0…3), fed for every step of 64
 * inputs by two tiles of activations (tmm4, 5: 16 tokens x 64 codes, as they lie in the input) and two of weights (tmm6, 7:
 * 16 rows of 4 inputs x 16 channels, the W8 form of linear.h). With several blocks, a pass is 8 steps: its weights are 16
 * KiB and stay in the first-level cache while all blocks of tokens go by, each with its accumulators kept in memory between
 * the passes. (From the second-level cache the same loop runs at three quarters of the speed.) With one block, a pass is the
 * whole panel.
 *
 * While the tiles multiply, the vector units are idle: the first block of a pass turns 4-bit weights into the W8 form one
 * step ahead of their use. The ring for them is as small as possible, for what it throws out of the first-level cache is
 * paid for. Outputs bypass the caches: rows of old output read from memory would hold up the loads of tiles.
 *
 * g128: w8 + 128 = code * s2 + (128 - zs), with code * s2 <= 255, so one 16-bit multiplication scales two codes at once and
 * one byte addition shifts them (linear.c admits only matrices for which this holds). The sums are of w8 + 128 and int32
 * arithmetic is modulo 2^32, so the epilogue's correction by the sum of the codes is exact. */
#include "backend/cpu/linear_amx.h"

#if defined __AMX_INT8__ || defined __AMXINT8__ /* clang 14 spells it so */
#include <immintrin.h>

#define EPILOGUE_OWN_FINISH
#include "backend/cpu/linear_epilogue.h"

enum { TOKENS = 32, TILE_ROWS = 16, STEP = 64, STEP_BYTES = STEP * ROWS, PASS = 8, RING = PASS + 1 };
enum { AHEAD = 2048 }; /* bytes fetched before their use; measured */

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
  __asm__ volatile("" ::"r"(&config) : "memory"); /* gcc believes that only the first eight bytes are read */
  _tile_loadconfig(&config);
}

/* gcc's _tile_loadd does not say that it reads memory: what it loads is written before this. It costs no instruction. */
#define STORES_DONE() __asm__ volatile("" ::: "memory")

/* ---- weights ------------------------------------------------------------------------------------- */

/* 16 channels' bytes, each in its 32-bit lane: twice with zeros between (16-bit factors), or four times (bytes to add). */
static inline __m512i lanes_spread(const uint8_t *bytes, int first, int step) {
  __m512i channel = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  __m512i order = _mm512_add_epi32(_mm512_mullo_epi32(channel, _mm512_set1_epi32(step)), _mm512_set1_epi32(first));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)bytes)), order);
}
static inline __m512i lanes_factor(const uint8_t *bytes) { return lanes_spread(bytes, (int)0x80008000, 0x00010001); }
static inline __m512i lanes_term(const uint8_t *bytes) { return lanes_spread(bytes, 0, 0x01010101); }

/* The weights of a thread's panels as one stream of steps. */
struct stream {
  enum qtr_panel form;
  size_t n_steps, panel_bytes; /* of a panel */
  const uint8_t *panel;        /* of the next step to unpack */
  size_t step, n_left;         /* the next step in its panel; steps left in all panels */
  uint8_t *ring;               /* 4-bit forms: (n_slots, STEP_BYTES) */
  size_t n_slots, slot;        /* slot: of the next step */
};

/* One step, 8 blocks of 128 packed bytes, to 2 KiB in the W8 form. meta: the group's s2 and zs, or NULL. */
static inline __attribute__((always_inline)) void step_unpack(const uint8_t *from, const uint8_t *meta, uint8_t *to) {
  const __m512i nibble = _mm512_set1_epi8(15), bias = _mm512_set1_epi8(-128);
  __m512i s2[2] = {nibble, nibble}, shift[2] = {nibble, nibble};
  for (int half = 0; meta && half < 2; half++) {
    s2[half] = lanes_factor(meta + half * TILE_ROWS);
    shift[half] = _mm512_sub_epi8(bias, lanes_term(meta + ROWS + half * TILE_ROWS));
  }
  for (int i = 0; i < STEP / 8; i++, from += QTR_BLOCK_BYTES, to += 2 * QTR_BLOCK_BYTES) {
    for (int half = 0; half < 2; half++) {
      _mm_prefetch((const char *)from + half * 64 + AHEAD, _MM_HINT_T0);
      __m512i w = _mm512_loadu_si512(from + half * 64);
      __m512i low = _mm512_and_si512(w, nibble), high = _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble);
      if (meta) {
        low = _mm512_add_epi8(_mm512_mullo_epi16(low, s2[half]), shift[half]);
        high = _mm512_add_epi8(_mm512_mullo_epi16(high, s2[half]), shift[half]);
      }
      _mm512_store_si512(to + half * 64, low);
      _mm512_store_si512(to + half * 64 + QTR_BLOCK_BYTES, high);
    }
  }
}

/* Unpacks the stream's next step. */
static void stream_next(struct stream *s) {
  if (s->form == QTR_PANEL_W8 || s->n_left == 0) return;
  uint8_t *to = s->ring + s->slot * STEP_BYTES;
  if (s->form == QTR_PANEL_W4G) {
    const uint8_t *group = s->panel + s->step / 2 * QTR_GROUP_BYTES;
    step_unpack(group + 64 + s->step % 2 * (STEP / 8) * QTR_BLOCK_BYTES, group, to);
  } else {
    step_unpack(s->panel + s->step * (STEP / 8) * QTR_BLOCK_BYTES, NULL, to);
  }
  s->n_left--;
  if (++s->slot == s->n_slots) s->slot = 0;
  if (++s->step == s->n_steps) {
    s->step = 0;
    s->panel += s->panel_bytes;
  }
}

/* ---- multiplication ------------------------------------------------------------------------------ */

/* x0, x1: tiles of the first and the last 16 tokens; w: a step's weights. */
static inline void multiply_32(const int8_t *x0, const int8_t *x1, const uint8_t *w) {
  STORES_DONE();
  _tile_loadd(4, x0, QTR_SEGMENT);
  _tile_loadd(6, w, QTR_BLOCK_BYTES);
  _tile_loadd(7, w + 64, QTR_BLOCK_BYTES);
  _tile_dpbsud(0, 4, 6);
  _tile_dpbsud(1, 4, 7);
  _tile_loadd(5, x1, QTR_SEGMENT);
  _tile_dpbsud(2, 5, 6);
  _tile_dpbsud(3, 5, 7);
}

static inline void multiply_16(const int8_t *x0, const uint8_t *w) {
  STORES_DONE();
  _tile_loadd(4, x0, QTR_SEGMENT);
  _tile_loadd(6, w, QTR_BLOCK_BYTES);
  _tile_loadd(7, w + 64, QTR_BLOCK_BYTES);
  _tile_dpbsud(0, 4, 6);
  _tile_dpbsud(1, 4, 7);
}

static inline void accumulators_zero(void) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

static inline void accumulators_load(const int32_t *acc, bool wide) {
  const size_t stride = ROWS * sizeof *acc;
  STORES_DONE();
  _tile_loadd(0, acc, stride);
  _tile_loadd(1, acc + TILE_ROWS, stride);
  if (!wide) return;
  _tile_loadd(2, acc + TILE_ROWS * ROWS, stride);
  _tile_loadd(3, acc + TILE_ROWS * ROWS + TILE_ROWS, stride);
}

static inline void accumulators_store(int32_t *acc, bool wide) {
  const size_t stride = ROWS * sizeof *acc;
  _tile_stored(0, acc, stride);
  _tile_stored(1, acc + TILE_ROWS, stride);
  if (!wide) return;
  _tile_stored(2, acc + TILE_ROWS * ROWS, stride);
  _tile_stored(3, acc + TILE_ROWS * ROWS + TILE_ROWS, stride);
}

/* ---- a thread's panels --------------------------------------------------------------------------- */

static __attribute__((noinline)) void block_finish(const struct qtr_linear_args *args, size_t panel, size_t token, size_t n,
                                                   const int32_t *acc) {
  if (args->linear->form == QTR_PANEL_W4) {
    epilogue_sums(args, panel, token, n, acc, SUMS_CODES, true);
  } else {
    epilogue_sums(args, panel, token, n, acc, SUMS_W8_BIASED, true);
  }
}

/* The old values that an epilogue will add to, on their way while the last pass is multiplied. */
static inline void block_fetch(const struct qtr_linear_args *args, size_t panel, size_t token, size_t n) {
  const struct epilogue_place at = epilogue_place(args, panel);
  const float *out = (const float *)args->out + token * at.width + at.first;
  for (size_t i = 0; i < n; i++, out += at.width) {
    __builtin_prefetch(out, 1);
    __builtin_prefetch(out + at.count - 1, 1);
  }
}

void qtr_cpu_linear_amx(const struct qtr_linear_args *args, size_t begin, size_t end, size_t token, size_t n_tokens,
                        void *scratch) {
  const struct qtr_linear *l = args->linear;
  const size_t n_steps = l->n_in_padded / STEP, n_blocks = qtr_ceil_div(n_tokens, TOKENS),
               pass = n_blocks > 1 ? PASS : n_steps;
  const size_t x1 = args->input->n_segments * QTR_TILE_BYTES; /* from the first 16 tokens of a block to the others */
  struct stream s = {.form = l->form,
                     .n_steps = n_steps,
                     .panel_bytes = l->panel_bytes,
                     .panel = qtr_linear_panel(l, begin),
                     .n_left = (end - begin) * n_steps,
                     .ring = scratch,
                     .n_slots = n_blocks > 1 ? RING : 2};
  int32_t *acc = (int32_t *)(void *)(s.ring + RING * STEP_BYTES);
  size_t slot = 0; /* of the pass's first step */
  tiles_configure();
  stream_next(&s);
  for (size_t panel = begin; panel < end; panel++) {
    const uint8_t *stored = qtr_linear_panel(l, panel);
    for (size_t first = 0; first < n_steps; first += pass) {
      const size_t n = QTR_MIN(n_steps - first, pass);
      const bool last = first + n == n_steps;
      size_t next_slot = slot;
      for (size_t block = 0; block < n_blocks; block++) {
        const size_t at = token + block * TOKENS, n_rows = QTR_MIN(n_tokens - block * TOKENS, (size_t)TOKENS);
        const int8_t *x = qtr_input_codes(args->input, at, first);
        int32_t *sums = acc + block * TOKENS * ROWS;
        const bool wide = n_rows > TILE_ROWS; /* else the second tile of tokens has none */
        if (first == 0) {
          accumulators_zero();
        } else {
          accumulators_load(sums, wide);
        }
        if (last && n_blocks > 1 && args->epilogue == QTR_EPILOGUE_ADD) block_fetch(args, panel, at, n_rows);
        next_slot = slot;
        for (size_t i = 0; i < n; i++, x += QTR_TILE_BYTES) {
          const uint8_t *w = s.form == QTR_PANEL_W8 ? stored + (first + i) * STEP_BYTES : s.ring + next_slot * STEP_BYTES;
          if (s.form == QTR_PANEL_W8 && block == 0) {
            for (size_t q = 0; q < STEP_BYTES; q += 64) _mm_prefetch((const char *)w + q + AHEAD, _MM_HINT_T0);
          }
          if (wide) {
            multiply_32(x, x + x1, w);
          } else {
            multiply_16(x, w);
          }
          if (block == 0) stream_next(&s);
          if (++next_slot == s.n_slots) next_slot = 0;
        }
        accumulators_store(sums, wide);
        if (last) block_finish(args, panel, at, n_rows, sums);
      }
      slot = next_slot;
    }
  }
  _mm_sfence(); /* streamed outputs are there before the threads meet */
  _tile_release();
}

size_t qtr_cpu_linear_amx_scratch(size_t n_tokens) {
  return (size_t)RING * STEP_BYTES + qtr_round_up(n_tokens, TOKENS) * ROWS * sizeof(int32_t);
}

bool qtr_cpu_linear_amx_built(void) { return true; }
#else
bool qtr_cpu_linear_amx_built(void) { return false; }
size_t qtr_cpu_linear_amx_scratch(size_t n_tokens) { return n_tokens; }
void qtr_cpu_linear_amx(const struct qtr_linear_args *args, size_t begin, size_t end, size_t token, size_t n_tokens,
                        void *scratch) {
  (void)args, (void)begin, (void)end, (void)token, (void)n_tokens, (void)scratch;
}
#endif
