/* linear_repack.c - from the matrices on disk (spec A.3, A.4, A.6) to the panels of linear.h, in one pass over memory that
 * may be mapped from a file and unaligned. Threads take whole panels; nothing is copied twice. */
#include <stdatomic.h>
#include <string.h>

#include "backend/cpu/linear.h"
#include "base/checked.h"
#include "checkpoint/packing.h"

enum { ROWS = QTR_PANEL_ROWS };

/* Where a panel's row lies: a part of the source and a row of it; part NULL for rows that only fill the panel. */
struct origin {
  const struct qtr_linear_part *part;
  size_t row;
};

static void panel_origins(const struct qtr_linear_source *s, size_t n_out, size_t panel, struct origin *origin) {
  for (size_t r = 0; r < ROWS; r++) {
    size_t row = panel * ROWS + r, end = n_out, p = 0;
    if (s->gate_up) {
      p = r / (ROWS / 2);
      row = panel * (ROWS / 2) + r % (ROWS / 2);
      end = s->part[p].n_out;
    }
    origin[r] = (struct origin){NULL, 0};
    if (row >= end) continue;
    while (row >= s->part[p].n_out) row -= s->part[p++].n_out;
    origin[r] = (struct origin){&s->part[p], row};
  }
}

/* Codes of a row's inputs 4 k4 … 4 k4 + 3, one a byte in the order of the inputs: A.3 keeps four neighbours together. */
static inline uint32_t codes4(const struct origin *o, size_t n_in, size_t k4) {
  uint32_t word;
  memcpy(&word, (const uint8_t *)o->part->weight + qtr_w4_offset(n_in, o->row, 4 * k4), sizeof word);
  return word >> qtr_w4_shift(o->row) & 0x0f0f0f0fu;
}

static void pack_block(const struct origin *origin, size_t n_in, size_t block, uint8_t *out) {
  size_t k4 = 2 * block;
  for (size_t r = 0; r < ROWS; r++) {
    if (!origin[r].part) continue;
    uint32_t word = codes4(&origin[r], n_in, k4) | codes4(&origin[r], n_in, k4 + 1) << 4;
    memcpy(out + 4 * r, &word, sizeof word);
  }
}

static void pack_w4(const struct origin *origin, size_t n_in, uint8_t *out) {
  for (size_t i = 0; i < n_in / 8; i++) pack_block(origin, n_in, i, out + i * QTR_BLOCK_BYTES);
}

static size_t s2_index(const struct origin *o, size_t group) { return group * o->part->n_out + qtr_s2_position(o->row); }

static void pack_w4_groups(const struct origin *origin, size_t n_in, uint8_t *out) {
  for (size_t g = 0; g < n_in / QTR_GROUP; g++, out += QTR_GROUP_BYTES) {
    for (size_t r = 0; r < ROWS; r++) {
      if (!origin[r].part) continue;
      out[r] = origin[r].part->s2_scale[s2_index(&origin[r], g)];
      out[ROWS + r] = (uint8_t)(256 - origin[r].part->s2_zero[s2_index(&origin[r], g)]);
    }
    for (size_t i = 0; i < 16; i++) pack_block(origin, n_in, g * 16 + i, out + 64 + i * QTR_BLOCK_BYTES);
  }
}

/* g128 in the W8 form: B.3 as it stands, modulo 256. */
static void pack_w4_wrapped(const struct origin *origin, size_t n_in, uint8_t *out) {
  for (size_t k = 0; k < n_in; k++) {
    for (size_t r = 0; r < ROWS; r++) {
      if (!origin[r].part) continue;
      size_t s2 = s2_index(&origin[r], k / QTR_GROUP);
      unsigned q = qtr_w4_get(origin[r].part->weight, n_in, origin[r].row, k);
      unsigned w8 = q * origin[r].part->s2_scale[s2] + origin[r].part->s2_zero[s2];
      out[k / 4 * QTR_BLOCK_BYTES + 4 * r + k % 4] = (uint8_t)(w8 ^ 0x80u);
    }
  }
}

static void pack_w8(const struct origin *origin, size_t n_in, size_t n_in_padded, uint8_t *out) {
  memset(out, 0x80, n_in_padded * ROWS);
  for (size_t r = 0; r < ROWS; r++) {
    if (!origin[r].part) continue;
    const uint8_t *from = (const uint8_t *)origin[r].part->weight + origin[r].row * n_in;
    for (size_t k = 0; k + 4 <= n_in; k += 4) {
      uint32_t word;
      memcpy(&word, from + k, sizeof word);
      word ^= 0x80808080u;
      memcpy(out + k * ROWS + 4 * r, &word, sizeof word);
    }
    for (size_t k = n_in / 4 * 4; k < n_in; k++) out[k / 4 * QTR_BLOCK_BYTES + 4 * r + k % 4] = from[k] ^ 0x80u;
  }
}

/* Blocks of 64 inputs at a time, so that the strided writes stay in the first-level cache. */
static void pack_floats(const struct origin *origin, size_t n_in, size_t size, uint8_t *out) {
  for (size_t k0 = 0; k0 < n_in; k0 += 64) {
    size_t k1 = QTR_MIN(k0 + 64, n_in);
    for (size_t r = 0; r < ROWS; r++) {
      if (!origin[r].part) continue;
      const uint8_t *from = (const uint8_t *)origin[r].part->weight + origin[r].row * n_in * size;
      if (size == 4) {
        for (size_t k = k0; k < k1; k++) memcpy(out + (k * ROWS + r) * 4, from + k * 4, 4);
      } else {
        for (size_t k = k0; k < k1; k++) memcpy(out + (k * ROWS + r) * 2, from + k * 2, 2);
      }
    }
  }
}

struct repack {
  const struct qtr_linear_source *source;
  struct qtr_linear *l;
};

static void repack_panels(void *arg, size_t begin, size_t end, int thread) {
  (void)thread;
  const struct repack *t = arg;
  struct qtr_linear *l = t->l;
  struct origin origin[ROWS];
  for (size_t p = begin; p < end; p++) {
    uint8_t *out = l->panels + p * l->panel_bytes;
    panel_origins(t->source, l->n_out, p, origin);
    for (size_t r = 0; r < ROWS; r++) {
      const struct origin *o = &origin[r];
      if (!o->part) continue;
      if (l->scale) l->scale[p * ROWS + r] = o->part->scale[o->row];
      if (l->szero) l->szero[p * ROWS + r] = o->part->szero[o->row];
      if (l->bias && o->part->bias) l->bias[p * ROWS + r] = o->part->bias[o->row];
    }
    switch (l->form) {
      case QTR_PANEL_W4: pack_w4(origin, l->n_in, out); break;
      case QTR_PANEL_W4G: pack_w4_groups(origin, l->n_in, out); break;
      case QTR_PANEL_W8:
        if (t->source->format == QTR_LINEAR_W8A8) {
          pack_w8(origin, l->n_in, l->n_in_padded, out);
        } else {
          pack_w4_wrapped(origin, l->n_in, out);
        }
        break;
      default: pack_floats(origin, l->n_in, l->form == QTR_PANEL_F32 ? 4 : 2, out); break;
    }
  }
}

void qtr_cpu_linear_repack(const struct qtr_cpu *c, const struct qtr_linear_source *source, struct qtr_linear *l) {
  struct repack task = {source, l};
  qtr_cpu_for(c, l->n_panels, QTR_MAX((size_t)262144 / l->panel_bytes, (size_t)1), repack_panels, &task);
}

/* ---- the range of w8 ----------------------------------------------------------------------------- */

struct fit {
  const struct qtr_linear_part *part;
  size_t n_in;
  atomic_bool ok;
};

/* Smallest and largest code of one row's group. */
static void code_range(const struct origin *o, size_t n_in, size_t group, int *low, int *high) {
  *low = 15;
  *high = 0;
  for (size_t k = group * QTR_GROUP; k < (group + 1) * QTR_GROUP; k++) {
    int q = (int)qtr_w4_get(o->part->weight, n_in, o->row, k);
    *low = QTR_MIN(*low, q);
    *high = QTR_MAX(*high, q);
  }
}

static bool range_fits(int s2, int zs, int low, int high) {
  return high * s2 <= 255 && low * s2 - zs >= -128 && high * s2 - zs <= 127;
}

/* Groups [begin, end): most pass for all codes 0…15 at once; the codes are read only where that is not so. */
static void fit_groups(void *arg, size_t begin, size_t end, int thread) {
  (void)thread;
  struct fit *f = arg;
  for (size_t g = begin; g < end; g++) {
    for (size_t row = 0; row < f->part->n_out && atomic_load_explicit(&f->ok, memory_order_relaxed); row++) {
      struct origin o = {f->part, row};
      int s2 = f->part->s2_scale[s2_index(&o, g)], zs = (256 - f->part->s2_zero[s2_index(&o, g)]) & 255, low, high;
      if (range_fits(s2, zs, 0, 15)) continue;
      code_range(&o, f->n_in, g, &low, &high);
      if (!range_fits(s2, zs, low, high)) atomic_store_explicit(&f->ok, false, memory_order_relaxed);
    }
  }
}

bool qtr_cpu_linear_g128_fits(const struct qtr_cpu *c, const struct qtr_linear_source *source) {
  for (size_t p = 0; p < source->n_parts; p++) {
    struct fit f = {.part = &source->part[p], .n_in = source->n_in};
    atomic_init(&f.ok, true);
    qtr_cpu_for(c, source->n_in / QTR_GROUP, 1, fit_groups, &f);
    if (!atomic_load(&f.ok)) return false;
  }
  return true;
}
