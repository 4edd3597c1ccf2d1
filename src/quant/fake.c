/* fake.c - from fake-quantised weights to integers (fake.h; spec A.5.2, A.5.3).
 *
 * The union of both converters' formulas, in double. A weight w of row n, group g is
 *   per channel  PreScale (q - z) * s      PostScale q * s - z
 *   g128         PreScale (q - z) * s2 * s1 PostScale (q * s2 - z) * s1
 * so that q comes back by rounding. LMQuant's codes are signed, -8…7: where a zero or a code of the matrix is negative, 8 is
 * added to all codes and, in the measure of the zero, to all zeros, which changes no weight. */
#include "quant/fake.h"

#include "base/checked.h"
#include "base/half.h"
#include "base/status.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* How far from a whole number w / s may lie: what rounding w to its type can do, and a little for arithmetic that was not
 * double. Beyond half a step nothing could be told. */
static double tolerance(const struct qtr_fake_matrix *f, double w, double largest, double s) {
  double eps = f->type == QTR_DTYPE_BF16 ? 0x1p-8 : f->type == QTR_DTYPE_F16 ? 0x1p-10 : 0x1p-22;
  double tiny = f->type == QTR_DTYPE_F16 ? 0x1p-24 : 0;
  double t = 0.02 + (eps * (fabs(w) + largest) + tiny) / s;
  return t < 0.499 ? t : 0.499;
}

/* What went wrong first in one row; column SIZE_MAX: nothing. */
struct fault {
  size_t column;
  double value, code;
  const char *what;
};

struct work {
  const struct qtr_fake_matrix *fake;
  struct qtr_int_matrix *m;
  int16_t *low;        /* (n_out) smallest code of each row */
  struct fault *fault; /* (n_out) */
  int shift;           /* 0 or 8 */
};

static double zero_of(const struct qtr_fake_matrix *f, size_t row, size_t group) {
  if (!f->zero) return 0;
  return f->s1 ? f->zero[row * (f->n_in / QTR_GROUP) + group] : f->zero[row];
}

static void fail_at(struct fault *fault, size_t column, double value, double code, const char *what) {
  if (fault->column != SIZE_MAX) return;
  *fault = (struct fault){column, value, code, what};
}

/* Codes of one row as int8, not yet shifted: -128…127 in two's complement. */
static void find_row(const struct work *k, size_t row) {
  const struct qtr_fake_matrix *f = k->fake;
  const float *w = f->w + row * f->n_in;
  int8_t *code = (int8_t *)k->m->code + row * f->n_in;
  struct fault *fault = &k->fault[row];
  double s = f->s0[row], low = 127;
  *fault = (struct fault){.column = SIZE_MAX};
  for (size_t i = 0; i < f->n_in; i++) {
    size_t g = i / QTR_GROUP;
    double z = zero_of(f, row, g), x = w[i], first, q;
    if (f->s1) {
      double s2 = f->s1[row * (f->n_in / QTR_GROUP) + g];
      x /= s;
      first = nearbyint(x);
      if (!(fabs(x - first) <= tolerance(f, w[i], 0, s)) || fabs(first) > 128) {
        fail_at(fault, i, w[i], x, "not a whole int8 multiple of weight.scale.0");
        first = 0;
      }
      x = f->scaled ? (first + z) / s2 : first / s2 + z;
      q = nearbyint(x);
      if (fabs(x - q) > 1e-6) fail_at(fault, i, w[i], x, "not on the grid of weight.scale.1");
    } else {
      x = f->scaled ? (x + z) / s : x / s + z;
      q = nearbyint(x);
      if (!(fabs(x - q) <= tolerance(f, w[i], f->scaled ? 15 * s : 0, s))) {
        fail_at(fault, i, w[i], x, "not on the grid of weight.scale.0");
      }
    }
    if (!(q >= -128 && q <= 127)) {
      fail_at(fault, i, w[i], x, "beyond 8 bits");
      q = 0;
    }
    code[i] = (int8_t)q;
    low = QTR_MIN(low, q);
  }
  k->low[row] = (int16_t)low;
}

static void find_rows(void *arg, size_t begin, size_t end, int thread) {
  (void)thread;
  for (size_t row = begin; row < end; row++) find_row(arg, row);
}

/* Shifts the codes of one 4-bit row and writes down its scales. */
static void finish_row(const struct work *k, size_t row) {
  const struct qtr_fake_matrix *f = k->fake;
  struct qtr_int_matrix *m = k->m;
  size_t groups = f->n_in / QTR_GROUP;
  int8_t *code = (int8_t *)m->code + row * f->n_in;
  struct fault *fault = &k->fault[row];
  for (size_t i = 0; i < f->n_in; i++) {
    int q = code[i] + k->shift;
    if (q < 0 || q > 15) fail_at(fault, i, f->w[row * f->n_in + i], q, "its code leaves 0…15");
    if (f->s1) {
      double s2 = f->s1[row * groups + i / QTR_GROUP], z = zero_of(f, row, i / QTR_GROUP);
      z = f->scaled ? z + k->shift * s2 : (z + k->shift) * s2;
      if (z < 0 || z > 255 || q * s2 > 255 || q * s2 - z > 127 || q * s2 - z < -128) {
        fail_at(fault, i, f->w[row * f->n_in + i], q, "its code with weight.scale.1 and the zero leaves a byte");
      }
      m->s2[row * groups + i / QTR_GROUP] = (uint8_t)s2;
      m->z2[row * groups + i / QTR_GROUP] = (uint8_t)QTR_MIN(QTR_MAX(z, 0.0), 255.0);
    }
    code[i] = (int8_t)QTR_MIN(QTR_MAX(q, 0), 15);
  }
  m->scale[row] = qtr_f16_from_f32(f->s0[row]);
  if (f->s1) return;
  double z = zero_of(f, row, 0), s = f->s0[row];
  m->szero[row] = qtr_f16_from_f32((float)(f->scaled ? z + k->shift * s : (z + k->shift) * s));
}

static void finish_rows(void *arg, size_t begin, size_t end, int thread) {
  (void)thread;
  for (size_t row = begin; row < end; row++) finish_row(arg, row);
}

static enum qtr_status report_fault(const struct work *k, struct qtr_error *err) {
  for (size_t row = 0; row < k->fake->n_out; row++) {
    const struct fault *f = &k->fault[row];
    if (f->column == SIZE_MAX) continue;
    return qtr_fail(err, QTR_ERR_FORMAT, "row %zu, column %zu: weight %g is %s (%g)", row, f->column, f->value, f->what,
                    f->code);
  }
  return QTR_OK;
}

/* Scales and zeros that the file can hold: finite, positive, fp16 or whole numbers. */
static enum qtr_status check_scales(const struct qtr_fake_matrix *f, bool w8, struct qtr_error *err) {
  size_t groups = f->s1 ? f->n_in / QTR_GROUP : 1;
  for (size_t r = 0; r < f->n_out; r++) {
    float s = f->s0[r];
    if (!(s > 0) || !isfinite(s)) return qtr_fail(err, QTR_ERR_FORMAT, "row %zu: weight.scale.0 is %g", r, (double)s);
    if (!w8 && qtr_f16_round(s) != s) {
      return qtr_fail(err, QTR_ERR_FORMAT, "row %zu: weight.scale.0 is %.9g, which fp16 cannot hold", r, (double)s);
    }
    for (size_t g = 0; g < groups; g++) {
      float s2 = f->s1 ? f->s1[r * groups + g] : 1, z = (float)zero_of(f, r, g);
      if (!(s2 >= 1 && s2 <= 127) || s2 != nearbyintf(s2)) {
        return qtr_fail(err, QTR_ERR_FORMAT, "row %zu, group %zu: weight.scale.1 is %g, not a whole number in 1…127", r, g,
                        (double)s2);
      }
      if (!isfinite(z) || ((f->s1 || !f->scaled) && z != nearbyintf(z)) || (w8 && z != 0)) {
        return qtr_fail(err, QTR_ERR_FORMAT, "row %zu, group %zu: the zero is %g; %s", r, g, (double)z,
                        w8 ? "8-bit weights have none" : "a whole number is expected");
      }
      if (!f->scaled && (z < -8 || z > 15)) {
        return qtr_fail(err, QTR_ERR_FORMAT, "row %zu, group %zu: the zero %g is beyond 4 bits", r, g, (double)z);
      }
    }
  }
  return QTR_OK;
}

bool qtr_fake_is_w8(const struct qtr_fake_matrix *f) {
  if (f->s1) return false;
  for (size_t r = 0; r < f->n_out; r++) {
    const float *w = f->w + r * f->n_in;
    float low = w[0], high = w[0];
    for (size_t i = 1; i < f->n_in; i++) {
      low = QTR_MIN(low, w[i]);
      high = QTR_MAX(high, w[i]);
    }
    if ((double)high - (double)low > 16 * (double)f->s0[r]) return true;
  }
  return false;
}

enum qtr_status qtr_fake_codes(const struct qtr_fake_matrix *f, struct qtr_threads *team, struct qtr_int_matrix *m,
                               struct qtr_error *err) {
  bool w8 = m->store == QTR_STORE_W8;
  struct work k = {.fake = f, .m = m};
  enum qtr_status status = check_scales(f, w8, err);
  if (status) return status;
  k.low = malloc(f->n_out * sizeof *k.low + 1);
  k.fault = malloc(f->n_out * sizeof *k.fault + 1);
  if (!k.low || !k.fault) {
    status = qtr_fail_memory(err, "a matrix", f->n_out * sizeof *k.fault);
    goto done;
  }
  qtr_threads_for(team, f->n_out, 8, find_rows, &k);
  if ((status = report_fault(&k, err))) goto done;
  if (w8) {
    memcpy(m->dequant, f->s0, f->n_out * sizeof *m->dequant);
    goto done;
  }
  size_t n_zeros = f->zero ? f->n_out * (f->s1 ? f->n_in / QTR_GROUP : 1) : 0;
  for (size_t r = 0; r < f->n_out; r++) k.shift = k.low[r] < 0 ? 8 : k.shift;
  for (size_t i = 0; i < n_zeros && !f->scaled; i++) k.shift = f->zero[i] < 0 ? 8 : k.shift;
  qtr_threads_for(team, f->n_out, 8, finish_rows, &k);
  status = report_fault(&k, err);
done:
  free(k.low);
  free(k.fault);
  return status;
}
