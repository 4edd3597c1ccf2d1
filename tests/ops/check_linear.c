/* check_linear.c - matrices of a device against the reference, for many numbers of tokens at random offsets of one set of
 * rows: each row must agree with the reference, and have the same bits whatever it is computed with. One row in a step of
 * its own, where a device may let the product quantise or normalise it, must have the bits that separate operations give.
 *
 * Tolerances. Integer formats: the accumulator is exact, so only the handful of fp32 operations of B.2 – B.4 differ, by
 * contraction at most: 1e-6 of the terms' magnitude, and szero times the difference of the sums Σx. Floating-point formats:
 * a sum of K products in any order: for random data its error deviates by up to 0.35 * 2^-23 |w||x| (norms); 4 * 2^-23 is
 * allowed. SiLU adds the error of exp. */
#include "ops.h"

#define EPS 0x1p-23

struct run {
  const struct op_entry *entry;
  const struct op_matrix *matrix;
  enum qtr_quant quant;
  const float *x;        /* (max_tokens, n_in) */
  const float *previous; /* (max_tokens, width): what ADD adds to */
  float *raw;            /* (max_tokens, n_out) the reference's y without epilogue */
  float *expected;       /* (max_tokens, width) the reference's result */
  const void *weight;    /* device (n_in): rows are normalised first; NULL: quantised only */
  bool in_step;          /* one row: in a step, so that the device sees all operations before it runs one */
};

/* Numbers of tokens of check_many, and what it takes at most: products on a CPU, values of a side of the product. */
static const size_t many_tokens[] = {144, 192, 200, 256, 257, 384, 511, 700, 1030, 2100, 4099};
enum { MANY_PRODUCTS = 1 << 28, MANY_VALUES = 1 << 25 };

static const int32_t zero[1] = {0}, one_start[2] = {0, 1};
static const struct qtr_batch one_token = {.n_tokens = 1,
                                           .n_seqs = 1,
                                           .n_logit_rows = 1,
                                           .max_blocks = 1,
                                           .token = zero,
                                           .position = zero,
                                           .q_start = one_start,
                                           .kv_len = zero,
                                           .block_table = zero,
                                           .logit_row = zero};

static void make_input(const struct op_device *d, const struct run *r, const void *x, size_t n, struct qtr_input *in) {
  size_t dim = r->entry->n_in;
  if (r->weight) {
    const struct qtr_rmsnorm_args norm = {.x = x,
                                          .weight = r->weight,
                                          .out = in,
                                          .quant = r->quant,
                                          .norm = QTR_NORM_EXACT,
                                          .eps = 1e-5f,
                                          .n_tokens = n,
                                          .dim = dim};
    d->ops->rmsnorm(d->b, &norm);
  } else {
    d->ops->quant(d->b, &(struct qtr_quant_args){.x = x, .out = in, .quant = r->quant, .n_tokens = n, .dim = dim});
  }
}

/* Quantises n rows from x + offset and multiplies; out: host (n + 1, width), the last row a guard. */
static void run_linear(const struct op_device *d, const struct run *r, const struct qtr_linear *l, struct qtr_input *in,
                       const void *x, size_t offset, size_t n, enum qtr_epilogue epilogue, size_t width, float *out) {
  for (size_t i = 0; i < (n + 1) * width; i++) {
    out[i] = epilogue == QTR_EPILOGUE_ADD && i < n * width ? r->previous[offset * width + i] : NAN;
  }
  bool f32 = epilogue == QTR_EPILOGUE_LOGITS && d->caps.act_dtype != QTR_DTYPE_F32;
  size_t n_values = (n + 1) * width * (f32 ? 2 : 1); /* F32 of a half-precision device takes the room of two */
  float *before = op_malloc(n_values, sizeof *before);
  for (size_t i = 0; i < n_values; i++) before[i] = f32 ? NAN : out[i];
  void *device = op_upload(d, before, n_values);
  free(before);
  if (r->in_step) op_step_begin(d, &one_token, NULL, 0);
  make_input(d, r, op_at(d, x, offset * r->entry->n_in), n, in);
  d->ops->linear(d->b,
                 &(struct qtr_linear_args){.linear = l, .input = in, .epilogue = epilogue, .out = device, .n_tokens = n});
  if (r->in_step) op_step_end(d);
  op_download(d, device, f32 ? QTR_DTYPE_F32 : d->caps.act_dtype, (n + (f32 ? 0 : 1)) * width, out);
  d->ops->free(d->b, device);
}

/* Allowed error of y[row][n] before the epilogue. */
static double y_tolerance(const struct run *r, size_t row, size_t n, double x_norm, double sum, double sum_error) {
  const struct qtr_linear_source *s = &r->matrix->source;
  size_t p = 0, i = n, n_out = op_n_out(r->entry);
  while (i >= s->part[p].n_out) i -= s->part[p++].n_out;
  double bias = s->part[p].bias ? fabs((double)s->part[p].bias[i]) : 0, y = fabs((double)r->raw[row * n_out + n]);
  if (r->quant == QTR_QUANT_NONE) return 4 * EPS * ((double)r->matrix->row_norm[n] * x_norm + y + bias);
  double szero = s->part[p].szero ? (double)s->part[p].szero[i] : 0;
  return 1e-6 * (y + 2 * fabs(szero * sum) + 2 * bias) + szero * sum_error;
}

static double silu(double g) { return g / (1 + exp(-g)); }

static void compare_row(const struct op_check *c, const struct run *r, size_t row, const float *got,
                        const struct qtr_input *ref_in, const struct qtr_input *dev_in, size_t dev_row,
                        struct op_diff *diff) {
  const struct op_entry *e = r->entry;
  size_t width = op_out_width(e), n_out = op_n_out(e);
  const float *x = r->x + row * e->n_in, *y = r->raw + row * n_out;
  bool half = c->dev.caps.act_dtype != QTR_DTYPE_F32 && e->epilogue != QTR_EPILOGUE_LOGITS;
  double x_norm = 0, act = half ? 0x1p-11 : 0; /* a result rounded to half; 2^-25 where it is a subnormal one */
  float sum = 0, dev_sum = 0;
  for (size_t k = 0; k < e->n_in; k++) x_norm += (double)x[k] * (double)x[k];
  x_norm = sqrt(x_norm);
  if (r->quant == QTR_QUANT_INT8) {
    c->ref.ops->input_read(c->ref.b, ref_in, row, e->n_in, NULL, NULL, &sum, NULL);
    c->dev.ops->input_read(c->dev.b, dev_in, dev_row, e->n_in, NULL, NULL, &dev_sum, NULL);
  }
  double sum_error = fabs((double)sum - (double)dev_sum);
  for (size_t n = 0; n < width; n++) {
    double expected = (double)r->expected[row * width + n],
           tolerance = y_tolerance(r, row, n, x_norm, (double)sum, sum_error);
    if (e->epilogue == QTR_EPILOGUE_SILU_MUL) {
      double g = (double)y[n], u = (double)y[width + n];
      double u_tolerance = y_tolerance(r, row, width + n, x_norm, (double)sum, sum_error);
      tolerance =
          1.1 * fabs(u) * tolerance + fabs(silu(g)) * u_tolerance + tolerance * u_tolerance + 4e-6 * fabs(expected) + 1e-30;
    }
    if (e->epilogue == QTR_EPILOGUE_ADD) { /* a half-precision device may round y before it adds */
      tolerance += EPS * fabs((double)r->previous[row * width + n]) + EPS * fabs(expected);
      tolerance += act * (fabs((double)y[n]) + 0x1p-14);
    }
    tolerance += act * fabs(expected) + act * 0x1p-14 + 1e-37;
    if (half && fabs(expected) > 65504) expected = expected > 0 ? 65504 : -65504; /* results saturate */
    op_compare(diff, (double)got[n], expected, tolerance, "out", row, n);
  }
}

/* Row o of the device's x by separate operations and in a step, quantised and normalised; got, again: (2, width). */
static void check_step(const struct op_check *c, const struct run *r, const struct qtr_linear *l, struct qtr_input *in,
                       const void *x, size_t o, const void *weight, float *got, float *again, struct op_diff *diff) {
  struct run apart = *r;
  size_t width = op_out_width(r->entry);
  for (int normalised = 0; normalised < 2; normalised++) {
    apart.weight = normalised ? weight : NULL;
    struct run in_step = apart;
    in_step.in_step = true;
    run_linear(&c->dev, &apart, l, in, x, o, 1, r->entry->epilogue, width, got);
    run_linear(&c->dev, &in_step, l, in, x, o, 1, r->entry->epilogue, width, again);
    diff->n++;
    if (memcmp(got, again, width * sizeof *got))
      op_bad(diff, "row %zu, %s, changes in a step", o, normalised ? "normalised" : "quantised");
  }
}

/* n rows: the entry's over and over, which must become what they became among few. first: (max_tokens, width), NULL where
 * rows may differ in their last bits: compared with the reference's then. */
static void check_many(const struct op_check *c, const struct run *r, const struct qtr_linear *l,
                       const struct qtr_input *ref_in, size_t n, const float *first, const bool *have,
                       struct op_diff *diff) {
  const struct op_entry *e = r->entry;
  size_t dim = e->n_in, width = op_out_width(e);
  size_t period = e->max_tokens % 8 ? e->max_tokens : e->max_tokens - 1; /* so that a tile read in place of another shows */
  float *x = op_malloc(n * dim, sizeof *x), *previous = op_malloc(n * width, sizeof *previous);
  float *got = op_malloc((n + 1) * width, sizeof *got);
  for (size_t t = 0; t < n; t++) {
    memcpy(x + t * dim, r->x + t % period * dim, dim * sizeof *x);
    memcpy(previous + t * width, r->previous + t % period * width, width * sizeof *previous);
  }
  struct run many = *r;
  many.previous = previous;
  void *device = op_upload(&c->dev, x, n * dim);
  struct qtr_input *in = op_input(&c->dev, n, dim);
  run_linear(&c->dev, &many, l, in, device, 0, n, e->epilogue, width, got);
  if (!isnan(got[n * width]) && c->dev.caps.act_dtype == QTR_DTYPE_F32) op_bad(diff, "wrote past the last of %zu rows", n);
  for (size_t t = 0; t < n; t++) {
    size_t row = t % period;
    if (!first || !have[row]) {
      compare_row(c, r, row, got + t * width, ref_in, in, t, diff);
      continue;
    }
    diff->n++;
    if (memcmp(first + row * width, got + t * width, width * sizeof *got))
      op_bad(diff, "row %zu, in place %zu, changes when among %zu rows", row, t, n);
  }
  c->dev.ops->input_free(c->dev.b, in);
  c->dev.ops->free(c->dev.b, device);
  free(got);
  free(previous);
  free(x);
}

void op_check_linear(struct op_check *c, const struct op_entry *e, enum qtr_linear_format format, struct op_diff *diff) {
  struct op_matrix matrix;
  op_matrix_make(&c->rng, e, format, &matrix);
  size_t n_all = e->max_tokens, dim = e->n_in, width = op_out_width(e), n_out = op_n_out(e);
  /* A GPU's floating-point matrices are the vendor's library's: the order of a sum depends on the number of rows. */
  bool library = qtr_linear_quant(format) == QTR_QUANT_NONE && c->dev.ops->wait;
  struct run r = {.entry = e, .matrix = &matrix, .quant = qtr_linear_quant(format)};
  float *x = op_activations(&c->rng, n_all, dim), *previous = op_malloc(n_all * width, sizeof *previous);
  for (size_t i = 0; i < n_all * width; i++) previous[i] = op_rng_normal(&c->rng);
  void *rounded = op_upload(&c->dev, previous, n_all * width); /* as the device sees it */
  op_download(&c->dev, rounded, c->dev.caps.act_dtype, n_all * width, previous);
  c->dev.ops->free(c->dev.b, rounded);
  void *device = op_upload(&c->dev, x, n_all * dim);
  op_download(&c->dev, device, c->dev.caps.act_dtype, n_all * dim, x);
  r.x = x;
  r.previous = previous;
  r.raw = op_malloc((n_all + 1) * n_out, sizeof *r.raw);
  r.expected = op_malloc((n_all + 1) * width, sizeof *r.expected);
  float *got = op_malloc((n_all + 1) * width, sizeof *got), *first = op_malloc(n_all * width, sizeof *first);
  float *again = op_malloc(2 * width, sizeof *again);
  bool *have = op_malloc(n_all, sizeof *have);
  float *gamma = op_malloc(dim, sizeof *gamma);
  for (size_t i = 0; i < dim; i++) gamma[i] = 1 + 0.3f * op_rng_normal(&c->rng);
  void *weight = op_upload(&c->dev, gamma, dim);
  struct qtr_linear *ref = op_linear(&c->ref, &matrix.source), *dev = op_linear(&c->dev, &matrix.source);
  struct qtr_input *ref_in = op_input(&c->ref, n_all, dim), *dev_in = op_input(&c->dev, n_all, dim);
  /* The reference keeps gate and up one after the other, so it can also give them plain: the tolerance of SiLU needs both.
   */
  run_linear(&c->ref, &r, ref, ref_in, x, 0, n_all, QTR_EPILOGUE_STORE, n_out, r.raw);
  run_linear(&c->ref, &r, ref, ref_in, x, 0, n_all, e->epilogue, width, r.expected);
  for (size_t i = 0; i < n_op_check_tokens && op_check_tokens[i] <= n_all; i++) {
    size_t n = op_check_tokens[i], repeat = n == 1 ? QTR_MIN(n_all, (size_t)4) : 1;
    for (size_t k = 0; k < repeat; k++) {
      size_t o = op_rng_below(&c->rng, n_all - n + 1);
      run_linear(&c->dev, &r, dev, dev_in, device, o, n, e->epilogue, width, got);
      if (!isnan(got[n * width]) && c->dev.caps.act_dtype == QTR_DTYPE_F32)
        op_bad(diff, "wrote past the last of %zu rows", n);
      for (size_t t = 0; t < n; t++) {
        op_compare_input(c, r.quant, ref_in, o + t, dev_in, t, x + (o + t) * dim, dim, diff);
        float *mine = first + (o + t) * width;
        if (have[o + t] && !library) {
          diff->n++;
          if (memcmp(mine, got + t * width, width * sizeof *mine))
            op_bad(diff, "row %zu changes when among %zu rows", o + t, n);
          continue;
        }
        compare_row(c, &r, o + t, got + t * width, ref_in, dev_in, t, diff);
        memcpy(mine, got + t * width, width * sizeof *mine);
        have[o + t] = true;
      }
      if (n == 1 && r.quant == QTR_QUANT_INT8) check_step(c, &r, dev, dev_in, device, o, weight, got, again, diff);
    }
  }
  for (size_t i = 0; i < sizeof many_tokens / sizeof many_tokens[0]; i++) {
    size_t n = many_tokens[i];
    if (n * QTR_MAX(dim, width) > MANY_VALUES || (!c->dev.ops->wait && n * dim * n_out > MANY_PRODUCTS)) break;
    check_many(c, &r, dev, ref_in, n, library ? NULL : first, have, diff);
  }
  size_t bytes = c->dev.ops->linear_bytes(dev);
  if (bytes < n_out * dim / 2) op_bad(diff, "linear_bytes tells %zu", bytes);
  c->ref.ops->linear_free(c->ref.b, ref);
  c->dev.ops->linear_free(c->dev.b, dev);
  c->ref.ops->input_free(c->ref.b, ref_in);
  c->dev.ops->input_free(c->dev.b, dev_in);
  c->dev.ops->free(c->dev.b, device);
  c->dev.ops->free(c->dev.b, weight);
  op_matrix_free(&matrix);
  free(gamma);
  free(again);
  free(x);
  free(previous);
  free(r.raw);
  free(r.expected);
  free(got);
  free(first);
  free(have);
}
