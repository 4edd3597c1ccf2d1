/* check.c - comparisons of quattuor-ops, and the checks of the operations on rows: quantise, RMSNorm, embed, gather.
 *
 * What may differ. Quantised codes and scales of given values are exact: one division, one multiplication, one rounding
 * (spec B.6). Sums of n floats may be added in any order: a few 2^-24 of Σ|x|. After RMSNorm, whose sum of squares has that
 * freedom, a code may be one off where the reference's value lies within that error of a rounding tie, and the scale
 * one fp16 step where amax does; both are counted and bounded. A row's result must have the same bits in every batch. */
#include <stdarg.h>
#include <stdio.h>

#include "ops.h"

#define EPS 0x1p-23

void op_bad(struct op_diff *diff, const char *format, ...) {
  if (diff->n_bad++) return;
  va_list args;
  va_start(args, format);
  (void)vsnprintf(diff->first, sizeof diff->first, format, args);
  va_end(args);
}

static int half_steps(float a, float b) {
  int x = qtr_f16_from_f32(a), y = qtr_f16_from_f32(b);
  return abs((x & 0x8000 ? 0x8000 - x : x) - (y & 0x8000 ? 0x8000 - y : y));
}

/* Everything input_read tells about a row; bytes compared for batch invariance. */
struct row {
  enum qtr_quant quant;
  size_t dim;
  float scale, sum;
  int8_t *code; /* (dim) */
  float *value; /* (dim) */
};

static struct row row_make(enum qtr_quant quant, size_t dim) {
  return (struct row){.quant = quant, .dim = dim, .code = op_malloc(dim, 1), .value = op_malloc(dim, sizeof(float))};
}

static void row_free(struct row *r) {
  free(r->code);
  free(r->value);
}

static void row_read(const struct op_device *d, const struct qtr_input *in, size_t token, struct row *r) {
  r->scale = r->sum = NAN;
  if (r->quant == QTR_QUANT_INT8) {
    d->ops->input_read(d->b, in, token, r->dim, r->code, &r->scale, &r->sum, NULL);
  } else {
    d->ops->input_read(d->b, in, token, r->dim, NULL, NULL, NULL, r->value);
  }
}

static bool row_same(const struct row *a, const struct row *b) {
  if (a->quant == QTR_QUANT_NONE) return memcmp(a->value, b->value, a->dim * sizeof *a->value) == 0;
  return memcmp(a->code, b->code, a->dim) == 0 && memcmp(&a->scale, &b->scale, 4) == 0 && memcmp(&a->sum, &b->sum, 4) == 0;
}

void op_compare_input(const struct op_check *c, enum qtr_quant quant, const struct qtr_input *ref, size_t ref_row,
                      const struct qtr_input *dev, size_t dev_row, const float *x, size_t dim, struct op_diff *diff) {
  struct row a = row_make(quant, dim), b = row_make(quant, dim);
  row_read(&c->ref, ref, ref_row, &a);
  row_read(&c->dev, dev, dev_row, &b);
  if (quant == QTR_QUANT_INT8) {
    double magnitude = 0;
    for (size_t i = 0; i < dim; i++) {
      magnitude += fabs((double)x[i]);
      op_compare(diff, b.code[i], a.code[i], 0, "code", ref_row, i);
    }
    op_compare(diff, (double)b.scale, (double)a.scale, 0, "scale", ref_row, 0);
    op_compare(diff, (double)b.sum, (double)a.sum, 4 * EPS * magnitude, "sum", ref_row, 0);
  } else {
    for (size_t i = 0; i < dim; i++) op_compare(diff, (double)b.value[i], (double)a.value[i], 0, "value", ref_row, i);
  }
  row_free(&a);
  row_free(&b);
}

/* Runs `fill` on random runs of rows and demands the bits of the first run that had all of them. */
typedef void (*fill_fn)(const struct op_device *d, const void *x, size_t n_tokens, struct qtr_input *out, const void *arg);

static void check_invariance(struct op_check *c, const struct op_entry *e, enum qtr_quant quant, const void *x, fill_fn fill,
                             const void *arg, struct op_diff *diff) {
  size_t n_all = e->max_tokens, dim = e->n_in;
  struct qtr_input *all = op_input(&c->dev, n_all, dim), *part = op_input(&c->dev, n_all, dim);
  struct row a = row_make(quant, dim), b = row_make(quant, dim);
  fill(&c->dev, x, n_all, all, arg);
  for (size_t k = 0; k < n_op_check_tokens && op_check_tokens[k] < n_all; k++) {
    size_t n = op_check_tokens[k], o = op_rng_below(&c->rng, n_all - n + 1);
    fill(&c->dev, op_at(&c->dev, x, o * dim), n, part, arg);
    for (size_t i = 0; i < n; i++) {
      row_read(&c->dev, all, o + i, &a);
      row_read(&c->dev, part, i, &b);
      diff->n++;
      if (!row_same(&a, &b)) op_bad(diff, "row %zu among %zu differs from itself among %zu", o + i, n, n_all);
    }
  }
  row_free(&a);
  row_free(&b);
  c->dev.ops->input_free(c->dev.b, all);
  c->dev.ops->input_free(c->dev.b, part);
}

/* ---- quantise ------------------------------------------------------------------------------------ */

static void fill_quant(const struct op_device *d, const void *x, size_t n_tokens, struct qtr_input *out, const void *arg) {
  struct qtr_quant_args args = *(const struct qtr_quant_args *)arg;
  args.x = x;
  args.n_tokens = n_tokens;
  args.out = out;
  d->ops->quant(d->b, &args);
}

void op_check_quant(struct op_check *c, const struct op_entry *e, enum qtr_quant quant, struct op_diff *diff) {
  size_t n = e->max_tokens, dim = e->n_in;
  float *x = op_activations(&c->rng, n, dim);
  void *device = op_upload(&c->dev, x, n * dim);
  op_download(&c->dev, device, c->dev.caps.act_dtype, n * dim, x); /* as the device sees it */
  struct qtr_input *ref = op_input(&c->ref, n, dim), *dev = op_input(&c->dev, n, dim);
  struct qtr_quant_args args = {.quant = quant, .dim = dim};
  fill_quant(&c->ref, x, n, ref, &args);
  fill_quant(&c->dev, device, n, dev, &args);
  for (size_t t = 0; t < n; t++) op_compare_input(c, quant, ref, t, dev, t, x + t * dim, dim, diff);
  check_invariance(c, e, quant, device, fill_quant, &args, diff);
  c->ref.ops->input_free(c->ref.b, ref);
  c->dev.ops->input_free(c->dev.b, dev);
  c->dev.ops->free(c->dev.b, device);
  free(x);
}

/* ---- RMSNorm ------------------------------------------------------------------------------------- */

static void fill_norm(const struct op_device *d, const void *x, size_t n_tokens, struct qtr_input *out, const void *arg) {
  struct qtr_rmsnorm_args args = *(const struct qtr_rmsnorm_args *)arg;
  args.x = x;
  args.n_tokens = n_tokens;
  args.out = out;
  d->ops->rmsnorm(d->b, &args);
}

/* The normalised row in double, before quantisation, and how far fp32 arithmetic in any order may be from it. */
static void norm_row(const float *x, const float *gamma, size_t dim, double eps, bool qserve, double *v, double *error) {
  double sum = 0, magnitude = 0, squares = 0, relative = EPS * (4 + sqrt((double)dim) / 4);
  for (size_t i = 0; i < dim; i++) {
    sum += (double)x[i];
    magnitude += fabs((double)x[i]);
    squares += (double)x[i] * (double)x[i];
  }
  double n = (double)dim, mean = qserve ? sum / n : 0, rstd = 1 / sqrt(squares / n + eps);
  for (size_t i = 0; i < dim; i++) {
    v[i] = ((double)x[i] - mean) * rstd * (double)gamma[i];
    double base = qserve ? fabs((double)x[i]) + magnitude / n : fabs((double)x[i]);
    error[i] = relative * base * rstd * fabs((double)gamma[i]) + 1e-37;
  }
}

static void compare_norm_int8(const struct row *ref, const struct row *dev, bool qserve, const double *v,
                              const double *error, size_t t, struct op_diff *diff) {
  double amax = qserve ? 0x1.1p-20 : 0, slack = 0, magnitude = 0; /* f16(1e-6) is 17 * 2^-24 */
  for (size_t i = 0; i < ref->dim; i++) {
    if (fabs(v[i]) > amax) {
      amax = fabs(v[i]);
      slack = error[i];
    }
    magnitude += fabs(v[i]);
  }
  float low = (float)(amax - slack), high = (float)(amax + slack);
  if (qserve) {
    low = qtr_f16_round(low);
    high = qtr_f16_round(high);
  }
  bool amax_open = qserve && low < high, scale_open = qtr_f16_round(low / 127) != qtr_f16_round(high / 127);
  if (qserve) amax = (double)qtr_f16_round((float)amax);
  op_compare(diff, half_steps(dev->scale, ref->scale), 0, scale_open ? 2 : 0, "scale, in fp16 steps,", t, 0);
  size_t n_ties = 0;
  for (size_t i = 0; i < ref->dim; i++) {
    diff->n++;
    if (dev->code[i] == ref->code[i]) continue;
    double r = amax > 0 ? v[i] * 127 / amax : 0;
    double reach = amax > 0 ? error[i] * 127 / amax + fabs(r) * (slack / amax + 2 * EPS + (amax_open ? 0x1p-10 : 0)) : 0;
    double to_tie = fabs(fabs(r - floor(r)) - 0.5);
    if (abs(dev->code[i] - ref->code[i]) == 1 && to_tie <= reach) {
      n_ties += !amax_open;
    } else {
      op_bad(diff, "code [%zu, %zu] is %d, expected %d (%.6f before rounding)", t, i, dev->code[i], ref->code[i], r);
    }
  }
  diff->n_ties += n_ties;
  if (n_ties > 2 + ref->dim / 100) op_bad(diff, "row %zu: %zu of %zu codes are one off", t, n_ties, ref->dim);
  double tolerance = 4 * EPS * magnitude;
  for (size_t i = 0; i < ref->dim; i++) tolerance += error[i];
  if (qserve) { /* sums of halves in halves: a changed rounding moves one of them by half a step */
    tolerance = 0x1p-10 * fabs((double)ref->sum) + 0x1p-11 * (amax + slack) * (2 + sqrt((double)ref->dim) / 4);
  }
  op_compare(diff, (double)dev->sum, (double)ref->sum, tolerance, "sum", t, 0);
}

void op_check_norm(struct op_check *c, const struct op_entry *e, enum op_norm_format format, struct op_diff *diff) {
  size_t n = e->max_tokens, dim = e->n_in;
  bool qserve = format == OP_NORM_QSERVE_INT8;
  enum qtr_quant quant = format == OP_NORM_EXACT_FLOAT ? QTR_QUANT_NONE : QTR_QUANT_INT8;
  float *x = op_activations(&c->rng, n, dim), *gamma = op_malloc(dim, sizeof *gamma);
  for (size_t i = 0; i < dim; i++) gamma[i] = qtr_f16_round(1 + 0.2f * op_rng_normal(&c->rng));
  double *v = op_malloc(dim, sizeof *v), *error = op_malloc(dim, sizeof *error);
  void *device = op_upload(&c->dev, x, n * dim), *weight = op_upload(&c->dev, gamma, dim);
  op_download(&c->dev, device, c->dev.caps.act_dtype, n * dim, x);
  struct qtr_input *ref = op_input(&c->ref, n, dim), *dev = op_input(&c->dev, n, dim);
  struct qtr_rmsnorm_args args = {
      .weight = gamma, .quant = quant, .norm = qserve ? QTR_NORM_QSERVE : QTR_NORM_EXACT, .eps = 1e-5f, .dim = dim};
  fill_norm(&c->ref, x, n, ref, &args);
  args.weight = weight;
  fill_norm(&c->dev, device, n, dev, &args);
  struct row a = row_make(quant, dim), b = row_make(quant, dim);
  for (size_t t = 0; t < n; t++) {
    row_read(&c->ref, ref, t, &a);
    row_read(&c->dev, dev, t, &b);
    norm_row(x + t * dim, gamma, dim, (double)args.eps, qserve, v, error);
    if (quant == QTR_QUANT_INT8) {
      compare_norm_int8(&a, &b, qserve, v, error, t, diff);
    } else {
      double act = c->dev.caps.act_dtype == QTR_DTYPE_F32 ? 0 : 0x1p-11; /* of a result rounded to half */
      for (size_t i = 0; i < dim; i++) {
        op_compare(diff, (double)b.value[i], (double)a.value[i], error[i] + act * fabs((double)a.value[i]) + act * 0x1p-14,
                   "value", t, i);
      }
    }
  }
  check_invariance(c, e, quant, device, fill_norm, &args, diff);
  row_free(&a);
  row_free(&b);
  c->ref.ops->input_free(c->ref.b, ref);
  c->dev.ops->input_free(c->dev.b, dev);
  c->dev.ops->free(c->dev.b, device);
  c->dev.ops->free(c->dev.b, weight);
  free(x);
  free(gamma);
  free(v);
  free(error);
}

/* ---- embed, gather ------------------------------------------------------------------------------- */

/* Poisoned output of n floats. */
static void *poison(const struct op_device *d, size_t n) {
  float *x = op_malloc(n, sizeof *x);
  for (size_t i = 0; i < n; i++) x[i] = NAN;
  void *p = op_upload(d, x, n);
  free(x);
  return p;
}

static void compare_rows(const struct op_check *c, void *dev, const float *ref, size_t n, struct op_diff *diff) {
  float *got = op_malloc(n + 1, sizeof *got);
  op_download(&c->dev, dev, c->dev.caps.act_dtype, n + 1, got);
  double tolerance = c->dev.caps.act_dtype == QTR_DTYPE_F32 ? 0 : 0x1p-11;
  for (size_t i = 0; i < n; i++)
    op_compare(diff, (double)got[i], (double)ref[i], tolerance * (fabs((double)ref[i]) + 0x1p-14), "value", i, 0);
  if (!isnan(got[n])) op_bad(diff, "wrote past the end of the output");
  free(got);
  c->dev.ops->free(c->dev.b, dev);
}

void op_check_embed(struct op_check *c, const struct op_entry *e, enum qtr_dtype dtype, struct op_diff *diff) {
  size_t n_rows = 50, dim = e->n_in, n = e->max_tokens;
  uint16_t *halves = op_malloc(n_rows * dim, 4);
  float *floats = (float *)(void *)halves, *scale = op_malloc(n_rows, sizeof *scale), *out = op_malloc(n * dim, sizeof *out);
  for (size_t i = 0; i < n_rows * dim; i++) {
    float x = op_rng_normal(&c->rng);
    if (dtype == QTR_DTYPE_F32) floats[i] = x;
    if (dtype == QTR_DTYPE_F16) halves[i] = qtr_f16_from_f32(x);
    if (dtype == QTR_DTYPE_BF16) halves[i] = qtr_bf16_from_f32(x);
    if (dtype == QTR_DTYPE_I8) ((int8_t *)halves)[i] = (int8_t)(op_rng_below(&c->rng, 256) - 128);
  }
  for (size_t i = 0; i < n_rows; i++) scale[i] = op_rng_uniform(&c->rng);
  struct qtr_table_source source = {
      .dtype = dtype, .n_rows = n_rows, .dim = dim, .data = halves, .scale = dtype == QTR_DTYPE_I8 ? scale : NULL};
  int32_t token[64], position[64] = {0}, q_start[2] = {0, (int32_t)n}, kv_len[1] = {0}, block_table[2] = {0, 1};
  for (size_t i = 0; i < n; i++) token[i] = (int32_t)op_rng_below(&c->rng, n_rows);
  struct qtr_batch batch = {.n_tokens = (int32_t)n,
                            .n_seqs = 1,
                            .max_blocks = 2,
                            .token = token,
                            .position = position,
                            .q_start = q_start,
                            .kv_len = kv_len,
                            .block_table = block_table};
  const struct op_device *devices[2] = {&c->ref, &c->dev};
  void *device = poison(&c->dev, n * dim + 1);
  for (size_t i = 0; i < 2; i++) {
    const struct op_device *d = devices[i];
    struct qtr_table *table = NULL;
    struct qtr_error err = {0};
    op_must(d->ops->table_create(d->b, &source, &table, &err), &err);
    op_step_begin(d, &batch, NULL, 0);
    d->ops->embed(d->b, &(struct qtr_embed_args){.table = table, .out = i ? device : out});
    op_step_end(d);
    d->ops->table_free(d->b, table);
  }
  compare_rows(c, device, out, n * dim, diff);
  free(halves);
  free(scale);
  free(out);
}

void op_check_gather(struct op_check *c, const struct op_entry *e, struct op_diff *diff) {
  size_t dim = e->n_in, n = e->max_tokens, n_rows = 0;
  float *x = op_activations(&c->rng, n, dim), *out = op_malloc(n * dim, sizeof *out);
  int32_t row[64], position[64] = {0}, q_start[2] = {0, (int32_t)n}, kv_len[1] = {0}, block_table[2] = {0, 1};
  for (size_t i = 0; i < n; i++) {
    if (i + 1 == n || op_rng_below(&c->rng, 3) == 0) row[n_rows++] = (int32_t)i;
  }
  struct qtr_batch batch = {.n_tokens = (int32_t)n,
                            .n_seqs = 1,
                            .max_blocks = 2,
                            .position = position,
                            .q_start = q_start,
                            .kv_len = kv_len,
                            .block_table = block_table,
                            .n_logit_rows = (int32_t)n_rows,
                            .logit_row = row};
  void *from = op_upload(&c->dev, x, n * dim), *to = poison(&c->dev, n_rows * dim + 1);
  op_download(&c->dev, from, c->dev.caps.act_dtype, n * dim, x);
  op_step_begin(&c->ref, &batch, NULL, 0);
  c->ref.ops->gather(c->ref.b, &(struct qtr_gather_args){.x = x, .out = out, .dim = dim});
  op_step_end(&c->ref);
  op_step_begin(&c->dev, &batch, NULL, 0);
  c->dev.ops->gather(c->dev.b, &(struct qtr_gather_args){.x = from, .out = to, .dim = dim});
  op_step_end(&c->dev);
  compare_rows(c, to, out, n_rows * dim, diff);
  c->dev.ops->free(c->dev.b, from);
  free(x);
  free(out);
}
