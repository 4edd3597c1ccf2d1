/* report.c - the page of a quantisation (report.h): text into memory, then to the file in one go. */
#include "quant/report.h"

#include "base/checked.h"
#include "base/file.h"
#include "base/status.h"
#include "base/svg.h"
#include "quant/layer.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct qtr_report_layer {
  double done[QTR_N_PROJECTIONS], plain[QTR_N_PROJECTIONS]; /* relative errors; plain NAN without calibration */
  double squared, plain_squared, norm;
  json_t *calibration; /* NULL without */
};

static const char *const short_names[QTR_N_PROJECTIONS] = {"q", "k", "v", "o", "gate", "up", "down"};
static const uint32_t ink = 0x333333, soft = 0x777777, rule = 0xe4e4e4, before = 0xa3a3a3, after = 0x3d63dd;

/* ---- collecting ---------------------------------------------------------------------------------- */

enum qtr_status qtr_quant_report_open(const char *path, struct qtr_quant_report *r, struct qtr_error *err) {
  *r = (struct qtr_quant_report){.path = strdup(path), .existed = access(path, F_OK) == 0, .table_error = {NAN, NAN}};
  if (!r->path) return qtr_fail_memory(err, "a path", strlen(path));
  FILE *f = fopen(path, "ae");
  if (f && fclose(f) == 0) return QTR_OK;
  r->existed = true; /* not ours to remove */
  return qtr_fail(err, QTR_ERR_IO, "cannot write %s: %s", path, strerror(errno));
}

static struct qtr_report_layer *layer_at(struct qtr_quant_report *r, size_t index) {
  if (index >= r->capacity) {
    size_t capacity = QTR_MAX(2 * r->capacity, index + 32);
    struct qtr_report_layer *more = realloc(r->layer, capacity * sizeof *more);
    if (!more) return NULL;
    r->layer = more;
    r->capacity = capacity;
  }
  while (r->n_layers <= index) {
    struct qtr_report_layer *l = &r->layer[r->n_layers++];
    *l = (struct qtr_report_layer){0};
    for (size_t p = 0; p < QTR_N_PROJECTIONS; p++) l->done[p] = l->plain[p] = NAN;
  }
  return &r->layer[index];
}

void qtr_quant_report_add(const struct qtr_quantize_report *m, void *report) {
  struct qtr_quant_report *r = report;
  if (m->layer < 0) {
    r->table_error[strcmp(m->projection, "lm_head") == 0] = m->squared_norm > 0 ? m->relative_error : NAN;
    return;
  }
  struct qtr_report_layer *l = layer_at(r, (size_t)m->layer);
  r->failed |= !l;
  if (!l) return;
  if (m->calibration && !l->calibration) l->calibration = json_incref(m->calibration);
  for (size_t p = 0; p < QTR_N_PROJECTIONS; p++) {
    if (strcmp(strchr(qtr_projection_names[p], '.') + 1, m->projection) != 0) continue;
    l->done[p] = m->squared_norm > 0 ? m->relative_error : NAN;
    if (m->plain_squared_error > 0 && m->squared_norm > 0) l->plain[p] = sqrt(m->plain_squared_error / m->squared_norm);
  }
  l->squared += m->squared_error;
  l->plain_squared += m->plain_squared_error;
  l->norm += m->squared_norm;
}

void qtr_quant_report_free(struct qtr_quant_report *r) {
  for (size_t i = 0; i < r->n_layers; i++) json_decref(r->layer[i].calibration);
  if (r->path && !r->existed && !r->written) (void)unlink(r->path);
  free(r->layer);
  free(r->path);
  *r = (struct qtr_quant_report){0};
}

/* ---- text ---------------------------------------------------------------------------------------- */

static void put_text(FILE *f, const char *text) {
  for (; *text; text++) {
    switch (*text) {
      case '<': (void)fputs("&lt;", f); break;
      case '>': (void)fputs("&gt;", f); break;
      case '&': (void)fputs("&amp;", f); break;
      case '"': (void)fputs("&quot;", f); break;
      default: (void)fputc(*text, f);
    }
  }
}

static void put_row(FILE *f, const char *name, const char *value) {
  (void)fputs("<tr><th scope=\"row\">", f);
  put_text(f, name);
  (void)fputs("</th><td>", f);
  put_text(f, value);
  (void)fputs("</td></tr>\n", f);
}

/* The drawing into the page, and away. False when memory was short. */
static bool put_svg(FILE *f, struct qtr_svg *svg) {
  bool ok = qtr_svg_end(svg, NULL) == QTR_OK;
  if (ok) (void)fwrite(svg->text, 1, svg->len, f);
  qtr_svg_free(svg);
  return ok;
}

static const char *show_error(double error, char out[32]) {
  if (isnan(error)) return "\xe2\x80\x93"; /* en dash */
  (void)snprintf(out, 32, error < 0.001 ? "%.3f %%" : "%.2f %%", error * 100);
  return out;
}

static const char *show_smoothing(const struct qtr_smooth_options *o, char out[64]) {
  if (o->mode == QTR_SMOOTH_OFF) return "off";
  if (o->mode == QTR_SMOOTH_GRID) return "searched, layer by layer";
  (void)snprintf(out, 64, "\xce\xb1 %.3g, \xce\xb2 %.3g", (double)o->alpha, (double)o->beta);
  return out;
}

static void put_settings(FILE *f, const struct qtr_quantize_options *o, const struct qtr_quantize_summary *s) {
  char text[160];
  (void)fputs("<div class=\"columns\"><table>\n", f);
  put_row(f, "source", o->model_dir);
  put_row(f, "result", o->output_dir);
  put_row(f, "precision", s->precision);
  if (s->group_size > 0)
    (void)snprintf(text, sizeof text, "%d weights, inside one scale a channel", (int)s->group_size);
  else
    (void)snprintf(text, sizeof text, "%s", o->precision.weight_bits == 16 ? "none" : "one scale a channel");
  put_row(f, "groups", text);
  put_row(f, "method", o->qoq ? "QoQ, calibrated" : "round to nearest");
  (void)snprintf(text, sizeof text, "%d", (int)s->n_layers);
  put_row(f, "layers", text);
  (void)snprintf(text, sizeof text, "%.1f MiB \xe2\x86\x92 %.1f MiB (%.2f times smaller), %zu tensors",
                 (double)s->input_bytes / 0x1p20, (double)s->output_bytes / 0x1p20,
                 (double)s->input_bytes / (double)QTR_MAX(s->output_bytes, 1), s->n_tensors);
  put_row(f, "size", text);
  (void)snprintf(text, sizeof text, "%.1f s", s->seconds);
  put_row(f, "time", text);
  (void)fputs("</table>\n", f);
  const struct qtr_qoq_options *q = o->qoq;
  if (q) {
    char smoothing[64];
    (void)fputs("<table>\n", f);
    put_row(f, "calibration", q->calibration);
    (void)snprintf(text, sizeof text, "%d of %d tokens, seed %llu", (int)q->n_samples, (int)q->length,
                   (unsigned long long)q->seed);
    put_row(f, "samples", text);
    put_row(f, "rotation of the residual stream", q->rotate ? "on" : "off");
    put_row(f, "rotation of values, per head", q->rotate_heads ? "on" : "off");
    put_row(f, "SmoothAttention", show_smoothing(&q->keys, smoothing));
    put_row(f, "smoothing of o_proj's input", show_smoothing(&q->out, smoothing));
    put_row(f, "smoothing of down_proj's input", show_smoothing(&q->down, smoothing));
    put_row(f, "smoothing behind norms", show_smoothing(&q->input, smoothing));
    put_row(f, "reordering of channels", q->reorder ? "on" : "off");
    put_row(f, "clipping by output error", q->clip ? "on" : "off");
    (void)snprintf(text, sizeof text, q->gptq ? "on, damping %.3g" : "off", (double)q->damp);
    put_row(f, "GPTQ", text);
    put_row(f, "correction between layers", q->correct ? "on" : "off");
    if (q->static_kv) put_row(f, "static scales of K and V", "written");
    (void)fputs("</table>\n", f);
  }
  (void)fputs("</div>\n", f);
}

/* ---- drawings ------------------------------------------------------------------------------------ */

/* The next of 1, 2, 5, 10 … times a power of ten that is not below x. */
static double nice_top(double x) {
  double power = pow(10, floor(log10(x > 1e-9 ? x : 1e-9)));
  return x <= power ? power : x <= 2 * power ? 2 * power : x <= 5 * power ? 5 * power : 10 * power;
}

struct frame {
  double x, y, width, height, top; /* the vertical axis goes from 0 to top */
};

static void draw_axes(struct qtr_svg *svg, const struct frame *p, const char *unit) {
  for (int i = 0; i <= 4; i++) {
    char text[48];
    double y = p->y + p->height * (1 - i / 4.0);
    (void)snprintf(text, sizeof text, "%.4g%s", p->top * i / 4, unit);
    qtr_svg_line(svg, p->x, y, p->x + p->width, y, i ? rule : soft, 1);
    qtr_svg_text(svg, p->x - 6, y + 4, 11, QTR_SVG_END, soft, text);
  }
}

static void draw_key(struct qtr_svg *svg, double x, double y, uint32_t colour, const char *text) {
  qtr_svg_rect(svg, x, y - 8, 12, 9, colour, NULL);
  qtr_svg_text(svg, x + 18, y, 11, QTR_SVG_START, ink, text);
}

/* Two numbers a layer, side by side. values: (n, 2), NAN = nothing to draw; the first kind may be absent altogether. */
static bool draw_bars(FILE *f, const double *values, size_t n, const char *const kind[2], const char *unit) {
  struct qtr_svg svg;
  double most = 0;
  bool pairs = false;
  for (size_t i = 0; i < 2 * n; i++) most = values[i] > most ? values[i] : most;
  for (size_t i = 0; i < n; i++) pairs |= !isnan(values[2 * i]);
  struct frame p = {.x = 58, .y = 30, .width = QTR_MAX(420.0, QTR_MIN(22.0 * (double)n, 1400.0)), .height = 190};
  p.top = nice_top(most);
  double step = p.width / (double)QTR_MAX(n, 1), bar = step * (pairs ? 0.38 : 0.7);
  qtr_svg_begin(&svg, p.x + p.width + 16, p.y + p.height + 40);
  draw_axes(&svg, &p, unit);
  if (pairs) draw_key(&svg, p.x, 14, before, kind[0]);
  draw_key(&svg, p.x + (pairs ? 170 : 0), 14, after, kind[1]);
  size_t every = (size_t)ceil(26 / step);
  for (size_t i = 0; i < n; i++) {
    for (size_t k = 0; k < 2; k++) {
      double v = values[2 * i + k], height = p.height * v / p.top;
      char tip[96];
      if (isnan(v)) continue;
      (void)snprintf(tip, sizeof tip, "layer %zu, %s: %.4g%s", i, kind[k], v, unit);
      qtr_svg_rect(&svg, p.x + step * (double)i + step * 0.1 + (k && pairs ? bar + 0.04 * step : 0), p.y + p.height - height,
                   bar, height, k ? after : before, tip);
    }
    char label[24];
    (void)snprintf(label, sizeof label, "%zu", i);
    if (i % every == 0)
      qtr_svg_text(&svg, p.x + step * ((double)i + 0.5), p.y + p.height + 16, 11, QTR_SVG_MIDDLE, soft, label);
  }
  qtr_svg_text(&svg, p.x + p.width / 2, p.y + p.height + 33, 11, QTR_SVG_MIDDLE, soft, "layer");
  return put_svg(f, &svg);
}

/* ---- errors -------------------------------------------------------------------------------------- */

/* Of a whole layer, all matrices together. */
static void layer_errors(const struct qtr_report_layer *l, double out[2]) {
  out[0] = l->norm > 0 && l->plain_squared > 0 ? sqrt(l->plain_squared / l->norm) : NAN;
  out[1] = l->norm > 0 ? sqrt(l->squared / l->norm) : NAN;
}

static void put_cell(FILE *f, double done, double plain, double worst) {
  char text[2][32];
  (void)fprintf(f, "<td style=\"background:rgba(210,90,30,%.2f)\">", isnan(done) || worst <= 0 ? 0 : 0.45 * done / worst);
  (void)fputs(show_error(done, text[0]), f);
  if (!isnan(plain)) (void)fprintf(f, " <small>%s</small>", show_error(plain, text[1]));
  (void)fputs("</td>", f);
}

static bool put_errors(FILE *f, const struct qtr_quant_report *r, bool calibrated) {
  double *values = malloc(QTR_MAX(2 * r->n_layers, 1) * sizeof *values), worst = 0;
  static const char *const kinds[2] = {"rounded to nearest", "as it is"};
  char text[32];
  if (!values) return false;
  for (size_t i = 0; i < r->n_layers; i++) {
    layer_errors(&r->layer[i], values + 2 * i);
    for (size_t p = 0; p < QTR_N_PROJECTIONS; p++) worst = r->layer[i].done[p] > worst ? r->layer[i].done[p] : worst;
  }
  for (size_t i = 0; i < 2 * r->n_layers; i++) values[i] *= 100;
  (void)fprintf(f, "<h2>Errors</h2>\n<p>%s</p>\n",
                calibrated ? "How far the outputs of the matrices are from those of the floats on calibration inputs, "
                             "relative: by rounding the same weights to nearest, and as it was done. Small numbers "
                             "in the table: rounded to nearest."
                           : "How far the rounded weights are from the originals, relative.");
  bool ok = draw_bars(f, values, r->n_layers, kinds, " %");
  (void)fputs("<div class=\"wide\"><table class=\"numbers\">\n<thead><tr><th>layer</th>", f);
  for (size_t p = 0; p < QTR_N_PROJECTIONS; p++) (void)fprintf(f, "<th>%s</th>", short_names[p]);
  (void)fputs("<th>all</th></tr></thead>\n", f);
  for (size_t i = 0; i < r->n_layers; i++) {
    (void)fprintf(f, "<tr><th scope=\"row\">%zu</th>", i);
    for (size_t p = 0; p < QTR_N_PROJECTIONS; p++) put_cell(f, r->layer[i].done[p], r->layer[i].plain[p], worst);
    put_cell(f, values[2 * i + 1] / 100, values[2 * i] / 100, worst);
    (void)fputs("</tr>\n", f);
  }
  (void)fputs("</table></div>\n", f);
  for (size_t i = 0; i < 2; i++) {
    if (!isnan(r->table_error[i]))
      (void)fprintf(f, "<p>%s: %s</p>\n", i ? "Head" : "Embedding", show_error(r->table_error[i], text));
  }
  free(values);
  return ok;
}

/* ---- smoothing ----------------------------------------------------------------------------------- */

static void put_exponents(FILE *f, const struct qtr_quant_report *r) {
  static const struct {
    const char *key, *title;
  } kinds[] = {{"k_smooth", "keys"}, {"out_smooth", "input of o_proj"}, {"down_smooth", "input of down_proj"}};
  bool any = false;
  for (size_t i = 0; i < r->n_layers; i++) {
    for (size_t k = 0; k < 3; k++) any |= json_object_get(r->layer[i].calibration, kinds[k].key) != NULL;
  }
  if (!any) return;
  (void)fputs(
      "<h2>Smoothing</h2>\n<p>Exponents \xce\xb1, \xce\xb2 of s = max|x|<sup>\xce\xb1</sup> / "
      "max|w|<sup>\xce\xb2</sup> for each layer; for keys x is K and w is Q.</p>\n<div class=\"wide\"><table "
      "class=\"numbers\">\n<thead><tr><th>layer</th>",
      f);
  for (size_t k = 0; k < 3; k++) (void)fprintf(f, "<th>%s</th>", kinds[k].title);
  (void)fputs("</tr></thead>\n", f);
  for (size_t i = 0; i < r->n_layers; i++) {
    (void)fprintf(f, "<tr><th scope=\"row\">%zu</th>", i);
    for (size_t k = 0; k < 3; k++) {
      const json_t *pair = json_object_get(r->layer[i].calibration, kinds[k].key);
      if (pair)
        (void)fprintf(f, "<td>%.3g, %.3g</td>", json_number_value(json_array_get(pair, 0)),
                      json_number_value(json_array_get(pair, 1)));
      else
        (void)fputs("<td>off</td>", f);
    }
    (void)fputs("</tr>\n", f);
  }
  (void)fputs("</table></div>\n", f);
}

/* ---- keys ---------------------------------------------------------------------------------------- */

static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

/* Channel maxima of a layer divided by their median: (*n) malloc'ed, NULL when there are none. */
static double *channels_of(const json_t *calibration, const char *key, size_t *n) {
  const json_t *array = json_object_get(calibration, key);
  *n = json_array_size(array);
  double *x = *n ? malloc(2 * *n * sizeof *x) : NULL;
  if (!x) return NULL;
  for (size_t i = 0; i < *n; i++) x[i] = x[*n + i] = json_number_value(json_array_get(array, i));
  qsort(x + *n, *n, sizeof *x, ascending);
  double median = x[*n + *n / 2];
  for (size_t i = 0; i < *n; i++) x[i] = median > 0 ? x[i] / median : 0;
  return x;
}

static double largest_of(const double *x, size_t n) {
  double most = 0;
  for (size_t i = 0; i < n && x; i++) most = x[i] > most ? x[i] : most;
  return most;
}

/* One curve; of more channels than pixels the largest of each run is drawn. xy: scratch (n, 2) */
static void draw_channels(struct qtr_svg *svg, const struct frame *p, const double *x, size_t n, uint32_t colour,
                          double *xy) {
  size_t run = qtr_ceil_div(n, (size_t)p->width), points = 0;
  for (size_t i = 0; i < n; i += run, points++) {
    xy[2 * points] = p->x + p->width * ((double)i + 0.5) / (double)n;
    xy[2 * points + 1] = p->y + p->height * (1 - largest_of(x + i, QTR_MIN(run, n - i)) / p->top);
  }
  qtr_svg_polyline(svg, xy, points, colour, 1.2);
}

static bool draw_layer_keys(FILE *f, size_t index, const double *x, const double *y, size_t n) {
  double most[2] = {largest_of(x, n), largest_of(y, n)}, *xy = malloc(2 * n * sizeof *xy);
  struct qtr_svg svg;
  char title[96];
  if (!xy) return false;
  struct frame p = {.x = 34, .y = 26, .width = 300, .height = 96, .top = nice_top(QTR_MAX(most[0], most[1]))};
  (void)snprintf(title, sizeof title, y ? "layer %zu: %.1f \xe2\x86\x92 %.1f" : "layer %zu: %.1f", index, most[0], most[1]);
  qtr_svg_begin(&svg, p.x + p.width + 8, p.y + p.height + 8);
  qtr_svg_text(&svg, p.x, 15, 12, QTR_SVG_START, ink, title);
  draw_axes(&svg, &p, "");
  draw_channels(&svg, &p, x, n, before, xy);
  if (y) draw_channels(&svg, &p, y, n, after, xy);
  free(xy);
  return put_svg(f, &svg);
}

static bool put_keys(FILE *f, const struct qtr_quant_report *r) {
  static const char *const kinds[2] = {"before", "after SmoothAttention"};
  double *spread = malloc(QTR_MAX(2 * r->n_layers, 1) * sizeof *spread);
  bool ok = spread != NULL, any = false;
  for (size_t i = 0; i < r->n_layers && ok; i++) {
    size_t n[2];
    static const char *const keys[2] = {"k_max_before", "k_max_after"};
    for (size_t k = 0; k < 2; k++) {
      double *x = channels_of(r->layer[i].calibration, keys[k], &n[k]);
      spread[2 * i + k] = x ? largest_of(x, n[k]) : NAN;
      any |= x != NULL;
      free(x);
    }
  }
  if (ok && any) {
    (void)fputs(
        "<h2>Outliers of keys</h2>\n<p>The largest |K| of a channel over the calibration set, after RoPE. A 4-bit "
        "cache has one scale a token and head, so a channel that is many times the others takes their precision. "
        "Here: the largest channel of a layer divided by the median one.</p>\n",
        f);
    ok = draw_bars(f, spread, r->n_layers, kinds, "");
    (void)fputs("<p>Every channel, head by head, divided by the layer's median.</p>\n<div class=\"panels\">\n", f);
    for (size_t i = 0; i < r->n_layers && ok; i++) {
      size_t n, n_after;
      double *x = channels_of(r->layer[i].calibration, "k_max_before", &n);
      double *y = channels_of(r->layer[i].calibration, "k_max_after", &n_after);
      if (x) ok = draw_layer_keys(f, i, x, y && n == n_after ? y : NULL, n);
      free(x);
      free(y);
    }
    (void)fputs("</div>\n", f);
  }
  free(spread);
  return ok;
}

/* ---- the page ------------------------------------------------------------------------------------ */

static const char head[] =
    "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
    "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
    "<title>Quantisation report</title>\n<style>\n"
    ":root{color-scheme:light dark;--ink:#222;--soft:#666;--rule:#e4e4e4;--page:#fff}\n"
    "@media (prefers-color-scheme:dark){:root{--ink:#e2e2e2;--soft:#999;--rule:#3a3a3a;--page:#1a1a1a}"
    "svg{filter:invert(.898) hue-rotate(180deg)}}\n"
    "body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:1200px;margin:2em auto;"
    "padding:0 1em}\n"
    "h1{font-size:1.5em;margin:0 0 .6em}h2{font-size:1.15em;margin:2em 0 .4em}p{max-width:46em;margin:.4em 0 .8em}\n"
    "svg{max-width:100%;height:auto}.columns{display:flex;flex-wrap:wrap;gap:0 3em;align-items:flex-start}\n"
    ".panels{display:flex;flex-wrap:wrap;gap:8px 20px}.wide{overflow-x:auto}\n"
    "table{border-collapse:collapse;margin:.5em 0}th,td{padding:3px 10px 3px 0;border-bottom:1px solid var(--rule);"
    "vertical-align:top;text-align:left;overflow-wrap:anywhere}th{font-weight:500;color:var(--soft)}\n"
    ".numbers th,.numbers td{padding:3px 9px;text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}"
    "small{color:var(--soft)}\n"
    "</style>\n</head>\n<body>\n<h1>Quantisation report</h1>\n";

enum qtr_status qtr_quant_report_write(struct qtr_quant_report *r, const struct qtr_quantize_options *options,
                                       const struct qtr_quantize_summary *summary, struct qtr_error *err) {
  char *text = NULL;
  size_t len = 0;
  bool calibrated = false;
  FILE *f = r->failed ? NULL : open_memstream(&text, &len);
  bool ok = f != NULL;
  for (size_t i = 0; i < r->n_layers; i++) calibrated |= r->layer[i].plain_squared > 0;
  if (ok) {
    (void)fputs(head, f);
    put_settings(f, options, summary);
    if (options->precision.weight_bits != 16) ok = put_errors(f, r, calibrated);
    put_exponents(f, r);
    ok = put_keys(f, r) && ok;
    (void)fprintf(f, "<p><small>quattuor %d.%d.%d</small></p>\n</body>\n</html>\n", QTR_VERSION_MAJOR, QTR_VERSION_MINOR,
                  QTR_VERSION_PATCH);
    ok = !ferror(f) && ok;
    ok = fclose(f) == 0 && ok;
  }
  enum qtr_status status = ok ? qtr_file_write(r->path, text, len, err) : qtr_fail_memory(err, "the report", len);
  r->written = status == QTR_OK;
  free(text);
  return status;
}
