/* int4.c - GPTQ and AWQ matrices: unpacking, and second-level scales for their groups (int4.h).
 *
 * The search. In W4A8 g128 a group's scale is s2 * s1 with s1 of the row in fp16 and s2 a small whole number, bounded
 * because (q - z) * s2 must stay in int8 and q * s2, z * s2 in a byte (spec B.3). With codes kept, a group's error is (s2 *
 * s1 - scale)^2 * sum (q - z)^2, so a candidate s1 costs one rounding a group, and all fp16 values of the octave above the
 * smallest s1 that clips nothing can be tried (below it groups clip; above it s1 / 2 has every value s1 has, but for the
 * smallest numbers of fp16, which are tried all). Where the
 * scales of a row are whole multiples of one fp16 number the search finds it, and nothing moves. */
#include "quant/int4.h"

#include "base/checked.h"
#include "base/half.h"
#include "base/status.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum qtr_status qtr_int4_create(size_t n_out, size_t n_in, size_t group, struct qtr_int4_matrix *m, struct qtr_error *err) {
  size_t groups = n_in / group;
  *m = (struct qtr_int4_matrix){.n_out = n_out, .n_in = n_in, .group = group};
  if ((m->code = malloc(n_out * n_in + 1)) && (m->zero = malloc(n_out * groups + 1)) &&
      (m->scale = malloc(n_out * groups * sizeof *m->scale + 1))) {
    return QTR_OK;
  }
  qtr_int4_free(m);
  return qtr_fail_memory(err, "a matrix", n_out * n_in);
}

void qtr_int4_free(struct qtr_int4_matrix *m) {
  free(m->code);
  free(m->zero);
  free(m->scale);
  free(m->g_idx);
  *m = (struct qtr_int4_matrix){0};
}

/* ---- unpacking ------------------------------------------------------------------------------------- */

static uint32_t word(const uint8_t *p, size_t i) {
  return p[4 * i] | (uint32_t)p[4 * i + 1] << 8 | (uint32_t)p[4 * i + 2] << 16 | (uint32_t)p[4 * i + 3] << 24;
}

/* (groups, n_out / 8) words to (n_out, groups), nibble i being output 8n + order[i]. */
static void unpack_zeros(const uint8_t *qzeros, const uint8_t order[8], unsigned plus, struct qtr_int4_matrix *m) {
  size_t groups = m->n_in / m->group;
  for (size_t g = 0; g < groups; g++) {
    for (size_t n = 0; n < m->n_out / 8; n++) {
      uint32_t x = word(qzeros, g * (m->n_out / 8) + n);
      for (size_t i = 0; i < 8; i++) m->zero[(8 * n + order[i]) * groups + g] = (uint8_t)((x >> (4 * i) & 15) + plus);
    }
  }
}

void qtr_gptq_unpack(const uint8_t *qweight, const uint8_t *qzeros, unsigned plus, struct qtr_int4_matrix *m) {
  static const uint8_t order[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  for (size_t k = 0; k < m->n_in / 8; k++) {
    for (size_t n = 0; n < m->n_out; n++) {
      uint32_t x = word(qweight, k * m->n_out + n);
      for (size_t i = 0; i < 8; i++) m->code[n * m->n_in + 8 * k + i] = x >> (4 * i) & 15;
    }
  }
  unpack_zeros(qzeros, order, plus, m);
}

void qtr_awq_unpack(const uint8_t *qweight, const uint8_t *qzeros, struct qtr_int4_matrix *m) {
  static const uint8_t order[8] = {0, 2, 4, 6, 1, 3, 5, 7};
  for (size_t k = 0; k < m->n_in; k++) {
    for (size_t n = 0; n < m->n_out / 8; n++) {
      uint32_t x = word(qweight, k * (m->n_out / 8) + n);
      for (size_t i = 0; i < 8; i++) m->code[(8 * n + order[i]) * m->n_in + k] = x >> (4 * i) & 15;
    }
  }
  unpack_zeros(qzeros, order, 0, m);
}

/* ---- order ----------------------------------------------------------------------------------------- */

bool qtr_int4_order(const uint32_t *g_idx, size_t n_in, size_t group, uint32_t *order) {
  size_t groups = n_in / group, *filled = calloc(groups + 1, sizeof *filled);
  bool even = filled != NULL;
  for (size_t i = 0; i < n_in && even; i++) { /* a counting sort, stable */
    even = g_idx[i] < groups && filled[g_idx[i]] < group;
    if (even) order[g_idx[i] * group + filled[g_idx[i]]++] = (uint32_t)i;
  }
  free(filled);
  return even;
}

enum qtr_status qtr_int4_permute_columns(struct qtr_int4_matrix *m, const uint32_t *order, struct qtr_error *err) {
  uint8_t *row = malloc(m->n_in + 1);
  if (!row) return qtr_fail_memory(err, "a row", m->n_in);
  for (size_t r = 0; r < m->n_out; r++) {
    uint8_t *code = m->code + r * m->n_in;
    memcpy(row, code, m->n_in);
    for (size_t j = 0; j < m->n_in; j++) code[j] = row[order[j]];
  }
  free(row);
  free(m->g_idx);
  m->g_idx = NULL;
  return QTR_OK;
}

enum qtr_status qtr_int4_permute_rows(struct qtr_int4_matrix *m, const uint32_t *order, struct qtr_error *err) {
  struct qtr_int4_matrix n;
  enum qtr_status status = qtr_int4_create(m->n_out, m->n_in, m->group, &n, err);
  if (status) return status;
  size_t groups = m->n_in / m->group;
  for (size_t j = 0; j < m->n_out; j++) {
    memcpy(n.code + j * m->n_in, m->code + order[j] * m->n_in, m->n_in);
    memcpy(n.zero + j * groups, m->zero + order[j] * groups, groups);
    memcpy(n.scale + j * groups, m->scale + order[j] * groups, groups * sizeof *n.scale);
  }
  n.g_idx = m->g_idx;
  m->g_idx = NULL;
  qtr_int4_free(m);
  *m = n;
  return QTR_OK;
}

void qtr_int4_row(const struct qtr_int4_matrix *m, size_t row, float *out) {
  size_t groups = m->n_in / m->group;
  for (size_t i = 0; i < m->n_in; i++) {
    size_t g = row * groups + (m->g_idx ? m->g_idx[i] : i / m->group);
    out[i] = (float)(m->code[row * m->n_in + i] - m->zero[g]) * m->scale[g];
  }
}

/* ---- W4A8 ------------------------------------------------------------------------------------------ */

/* From 2^-13 on half of an fp16 number is one. Candidates: up to there, or an octave of 1024 values and a margin. */
enum { LEAST_HALVED = 0x0800, MOST_CANDIDATES = 2304 };
#define COARSE 4.0f /* s2 up to which rounding anew is tried: a step of it is a third of what 4 bits span */

struct group {
  float scale, limit; /* limit: of s2 */
  float energy;       /* sum (q - z)^2 */
  float reach;        /* max |q - z| */
};

struct search {
  const struct qtr_int4_matrix *m;
  struct qtr_int_matrix *out;
  struct qtr_rtn_error *error;   /* (n_out) */
  uint32_t *n_moved, *n_rounded; /* (n_out) */
  enum qtr_rtn_status *status;   /* (n_out) */
  struct group *group;           /* (threads, groups) */
};

static struct group describe(const uint8_t *code, size_t n, int zero, float scale) {
  int low = 15, high = 0, sum = 0;
  for (size_t i = 0; i < n; i++) {
    int d = code[i] - zero;
    low = QTR_MIN(low, code[i]);
    high = QTR_MAX(high, code[i]);
    sum += d * d;
  }
  int limit = 127; /* s2 is a signed byte */
  if (high > 0) limit = QTR_MIN(limit, 255 / high);
  if (zero > 0) limit = QTR_MIN(limit, 255 / zero);
  if (high > zero) limit = QTR_MIN(limit, 127 / (high - zero));
  if (zero > low) limit = QTR_MIN(limit, 128 / (zero - low));
  return (struct group){scale, (float)limit, (float)sum, (float)QTR_MAX(high - zero, zero - low)};
}

static float nearest_s2(float scale, float s1, float limit) {
  float k = (scale / s1 + 12582912.0f) - 12582912.0f; /* rni, as in rtn.c */
  return k > limit ? limit : k;
}

/* The fp16 value of the octave above `lowest` whose whole multiples come nearest to the scales. */
static uint16_t search_s1(const struct group *group, size_t n, float lowest) {
  float s1[MOST_CANDIDATES], cost[MOST_CANDIDATES];
  uint16_t first = qtr_f16_from_f32(lowest * 0.9f), best = 0;
  size_t n_candidates = 0;
  first = first ? first : 1;
  for (uint16_t h = first; n_candidates < MOST_CANDIDATES && h < 0x7c00; h++) {
    float x = qtr_f16_to_f32(h);
    if (x > 2.01f * lowest && h >= LEAST_HALVED && n_candidates > 0) break;
    s1[n_candidates] = x;
    cost[n_candidates++] = 0;
  }
  for (size_t g = 0; g < n; g++) {
    for (size_t c = 0; c < n_candidates; c++) {
      float d = nearest_s2(group[g].scale, s1[c], group[g].limit) * s1[c] - group[g].scale;
      cost[c] += group[g].energy * d * d;
    }
  }
  for (size_t c = 1; c < n_candidates; c++) best = cost[c] < cost[best] ? (uint16_t)c : best;
  return (uint16_t)(first + best);
}

/* Where s2 is small the scale is coarse, and the group's weights may be nearer when they are rounded anew to whole numbers
 * of s1, as quantisation does it (spec F.6), than with their old codes. Then the codes change; the squared error is
 * returned. */
static double round_group(const struct qtr_int4_matrix *m, size_t row, size_t g, float s1, struct qtr_int_matrix *out,
                          double kept, double *max) {
  size_t groups = m->n_in / m->group, at = row * groups + g;
  const uint8_t *code = m->code + row * m->n_in + g * m->group;
  float ratio = m->scale[at] / s1, low = 0, high = 0, x[QTR_GROUP];
  uint8_t fresh[QTR_GROUP];
  for (size_t i = 0; i < m->group; i++) {
    x[i] = (float)(code[i] - m->zero[at]) * ratio;
    low = QTR_MIN(low, x[i]);
    high = QTR_MAX(high, x[i]);
  }
  float s = fmaxf(rintf((high - low) / 15), 1), z = rintf(-low), last = fminf(15, floorf((127 + z) / s));
  double squared = 0, largest = 0;
  for (size_t i = 0; i < m->group; i++) {
    float q = rintf(fminf(fmaxf((x[i] + z) / s, 0), last));
    double d = (double)(q * s - z - x[i]) * (double)s1;
    fresh[i] = (uint8_t)q;
    squared += d * d;
    largest = fmax(largest, fabs(d));
  }
  if (squared >= kept) return kept;
  memcpy(out->code + row * m->n_in + g * m->group, fresh, m->group);
  out->s2[at] = (uint8_t)s;
  out->z2[at] = (uint8_t)z;
  *max = largest;
  return squared;
}

static void convert_row_g128(const struct search *k, size_t row, struct group *group) {
  const struct qtr_int4_matrix *m = k->m;
  size_t groups = m->n_in / m->group;
  float lowest = 0;
  for (size_t g = 0; g < groups; g++) {
    size_t at = row * groups + g;
    if (!(m->scale[at] >= 0) || !isfinite(m->scale[at])) {
      k->status[row] = QTR_RTN_NOT_FINITE;
      return;
    }
    group[g] = describe(m->code + row * m->n_in + g * m->group, m->group, m->zero[at], m->scale[at]);
    lowest = QTR_MAX(lowest, group[g].scale / group[g].limit);
  }
  if (lowest > 65504) {
    k->status[row] = QTR_RTN_RANGE;
    return;
  }
  uint16_t half = lowest > 0 ? search_s1(group, groups, lowest) : 0x3c00;
  float s1 = qtr_f16_to_f32(half);
  k->out->scale[row] = half;
  for (size_t g = 0; g < groups; g++) {
    size_t at = row * groups + g;
    float s2 = nearest_s2(group[g].scale, s1, group[g].limit), d = s2 * s1 - group[g].scale;
    k->out->s2[at] = (uint8_t)s2;
    k->out->z2[at] = (uint8_t)(s2 * (float)m->zero[at]);
    double kept = (double)group[g].energy * (double)d * (double)d, max = (double)group[g].reach * fabs((double)d);
    k->n_moved[row] += kept > 0;
    double squared = kept > 0 && s2 <= COARSE ? round_group(m, row, g, s1, k->out, kept, &max) : kept;
    k->n_rounded[row] += squared < kept;
    k->error[row].squared += squared;
    k->error[row].norm += (double)group[g].energy * (double)group[g].scale * (double)group[g].scale;
    k->error[row].max = fmax(k->error[row].max, max);
  }
}

/* One group a row: scale and scale * zero need only fit fp16. */
static void convert_row_plain(const struct search *k, size_t row) {
  const struct qtr_int4_matrix *m = k->m;
  const uint8_t *code = m->code + row * m->n_in;
  double zero = m->zero[row], scale = m->scale[row];
  uint16_t s = qtr_f16_from_f32(m->scale[row]), sz = qtr_f16_from_f32((float)(scale * zero));
  double new_scale = qtr_f16_to_f32(s), new_zero = qtr_f16_to_f32(sz);
  if (!(scale >= 0) || !isfinite(scale) || !isfinite(new_scale) || !isfinite(new_zero)) {
    k->status[row] = scale >= 0 && isfinite(scale) ? QTR_RTN_RANGE : QTR_RTN_NOT_FINITE;
    return;
  }
  k->out->scale[row] = s;
  k->out->szero[row] = sz;
  for (size_t i = 0; i < m->n_in; i++) {
    double w = (code[i] - zero) * scale, d = code[i] * new_scale - new_zero - w;
    k->error[row].squared += d * d;
    k->error[row].norm += w * w;
    k->error[row].max = fmax(k->error[row].max, fabs(d));
  }
  k->n_moved[row] = k->error[row].squared > 0;
}

static void convert_rows(void *arg, size_t begin, size_t end, int thread) {
  const struct search *k = arg;
  for (size_t row = begin; row < end; row++) {
    if (k->out->store == QTR_STORE_W4) {
      convert_row_plain(k, row);
    } else {
      convert_row_g128(k, row, k->group + (size_t)thread * (k->m->n_in / k->m->group));
    }
  }
}

enum qtr_status qtr_int4_to_w4a8(const struct qtr_int4_matrix *m, struct qtr_threads *team, struct qtr_int_matrix *out,
                                 struct qtr_rtn_error *error, struct qtr_int4_moved *moved, struct qtr_error *err) {
  size_t n = m->n_out, groups = m->n_in / m->group;
  struct search k = {.m = m, .out = out};
  enum qtr_status status = QTR_OK;
  k.error = calloc(n + 1, sizeof *k.error);
  k.n_moved = calloc(n + 1, sizeof *k.n_moved);
  k.n_rounded = calloc(n + 1, sizeof *k.n_rounded);
  k.status = calloc(n + 1, sizeof *k.status);
  k.group = calloc((size_t)qtr_threads_count(team) * groups + 1, sizeof *k.group);
  if (!k.error || !k.n_moved || !k.n_rounded || !k.status || !k.group) {
    status = qtr_fail_memory(err, "a matrix", n * sizeof *k.error);
    goto done;
  }
  memcpy(out->code, m->code, n * m->n_in);
  qtr_threads_for(team, n, 4, convert_rows, &k);
  for (size_t r = 0; r < n && !status; r++) {
    if (k.status[r]) {
      status = qtr_fail(err, QTR_ERR_FORMAT, "row %zu: a scale is %s", r,
                        k.status[r] == QTR_RTN_RANGE ? "beyond the range of fp16" : "negative or not finite");
    }
    error->squared += k.error[r].squared;
    error->norm += k.error[r].norm;
    error->max = fmax(error->max, k.error[r].max);
    moved->n_groups += k.n_moved[r];
    moved->n_rounded += k.n_rounded[r];
  }
done:
  free(k.error);
  free(k.n_moved);
  free(k.n_rounded);
  free(k.status);
  free(k.group);
  return status;
}
