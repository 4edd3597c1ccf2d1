/* plot.c - the SVG of a run (report.h): cumulative distributions over a logarithmic axis, and what happened over time. */
#include "load/report.h"

#include "base/chart.h"
#include "base/checked.h"
#include "base/status.h"

#include <math.h>
#include <stdlib.h>

#define PANEL_WIDTH 420.0
#define PANEL_HEIGHT 240.0
#define LEFT 62.0
#define GAP 40.0
#define TOP 86.0
#define N_BINS 120
#define N_POINTS 200

static const uint32_t colour[QTR_TIMES] = {0x3d63dd, 0x2b9a8b, 0xc2701c, 0x8a3ffc};

static struct qtr_chart begin_panel(struct qtr_svg *svg, int column, int row, const char *title) {
  struct qtr_chart p = {.x = LEFT + column * (PANEL_WIDTH + LEFT + GAP),
                        .y = TOP + row * (PANEL_HEIGHT + 96),
                        .width = PANEL_WIDTH,
                        .height = PANEL_HEIGHT,
                        .top = 1};
  qtr_chart_title(svg, &p, title);
  return p;
}

static void time_axis(struct qtr_svg *svg, const struct qtr_chart *p) {
  double step = qtr_chart_nice((p->high - p->low) / 6);
  for (double v = 0; v <= p->high * (1 + 1e-9); v += step) {
    char text[32];
    (void)snprintf(text, sizeof text, "%g s", v);
    qtr_chart_mark(svg, p, v, false, text);
  }
}

/* ---- distributions ------------------------------------------------------------------------------- */

static void distributions(struct qtr_svg *svg, const struct qtr_load_report *r, int column, const char *title,
                          const enum qtr_load_time kind[2], const char *const names[2]) {
  struct qtr_chart p = begin_panel(svg, column, 0, title);
  double least = INFINITY, most = 0;
  p.log_x = true;
  for (int k = 0; k < 2; k++) {
    size_t n = r->summary->time[kind[k]].n;
    if (n == 0) continue;
    /* a few gaps of zero (two tokens in one packet) must not stretch the axis */
    least = QTR_MIN(least, QTR_MAX(qtr_percentile(r->summary->value[kind[k]], n, 1), 1e-4));
    most = QTR_MAX(most, r->summary->time[kind[k]].max);
  }
  if (!(least < INFINITY)) least = most = 1;
  p.low = pow(10, floor(log10(least)));
  p.high = QTR_MAX(pow(10, ceil(log10(QTR_MAX(most, 1e-4)))), p.low * 10);
  qtr_chart_vertical(svg, &p, "%.0f %%", 100);
  for (double v = p.low; v <= p.high * 1.001; v *= 10) {
    char text[32];
    (void)snprintf(text, sizeof text, v < 0.999 ? "%g ms" : "%g s", v < 0.999 ? v * 1e3 : v);
    qtr_chart_mark(svg, &p, v, true, text);
  }
  for (int k = 0; k < 2; k++) {
    size_t n = r->summary->time[kind[k]].n;
    double xy[2 * (N_POINTS + 1)];
    char text[96];
    for (int i = 0; i <= N_POINTS && n > 0; i++) {
      double v = qtr_percentile(r->summary->value[kind[k]], n, 100.0 * i / N_POINTS);
      xy[2 * i] = qtr_chart_x(&p, QTR_MAX(v, p.low));
      xy[2 * i + 1] = qtr_chart_y(&p, (double)i / N_POINTS);
    }
    if (n > 0) qtr_svg_polyline(svg, xy, N_POINTS + 1, colour[kind[k]], 2);
    double half = r->summary->time[kind[k]].p50;
    (void)snprintf(text, sizeof text, "%s, p50 %.3g %s", names[k], half < 0.9995 ? half * 1e3 : half,
                   half < 0.9995 ? "ms" : "s");
    qtr_chart_legend(svg, &p, k, colour[kind[k]], text);
    double limit = r->slo->limit[kind[k]];
    if (r->has_slo && isfinite(limit) && limit > p.low && limit < p.high) {
      qtr_svg_text(svg, qtr_chart_x(&p, limit) + 4, p.y + 12, 11, QTR_SVG_START, 0xcc3333, "objective");
      qtr_svg_line(svg, qtr_chart_x(&p, limit), p.y, qtr_chart_x(&p, limit), p.y + PANEL_HEIGHT, 0xcc3333, 1.5);
    }
  }
}

/* ---- over time ----------------------------------------------------------------------------------- */

static void curve(struct qtr_svg *svg, struct qtr_chart *p, const double *bin, uint32_t stroke) {
  double xy[2 * N_BINS];
  for (int i = 0; i < N_BINS; i++) {
    xy[2 * i] = qtr_chart_x(p, p->high * (i + 0.5) / N_BINS);
    xy[2 * i + 1] = qtr_chart_y(p, bin[i]);
  }
  qtr_svg_polyline(svg, xy, N_BINS, stroke, 1.5);
}

static int bin_of(double time, double duration) { return (int)QTR_MIN(QTR_MAX(time / duration * N_BINS, 0), N_BINS - 1); }

static double most_of(const double *bin) {
  double most = 0;
  for (int i = 0; i < N_BINS; i++) most = QTR_MAX(most, bin[i]);
  return most;
}

static void over_time(struct qtr_svg *svg, const struct qtr_load_report *r) {
  const struct qtr_load_run *run = r->run;
  double duration = QTR_MAX(run->duration, 1e-3), width = duration / N_BINS, tokens[N_BINS] = {0}, running[N_BINS] = {0};
  /* a piece of text may hold several tokens: their number is spread evenly */
  double each = run->n_tokens ? (double)r->summary->n_output / (double)run->n_tokens : 0;
  for (size_t i = 0; i < run->n_tokens; i++) tokens[bin_of((double)run->token[i].time, duration)] += each / width;
  for (size_t i = 0; i < run->n; i++) { /* the mean number in each bin */
    const struct qtr_load_sample *s = &run->sample[i];
    for (int b = bin_of(s->due, duration); b <= bin_of(s->end, duration); b++)
      running[b] += QTR_MAX(QTR_MIN(s->end, (b + 1) * width) - QTR_MAX(s->due, b * width), 0) / width;
  }
  struct qtr_chart p = begin_panel(svg, 0, 1, "Output tokens a second");
  p.high = duration;
  p.top = qtr_chart_nice(most_of(tokens));
  qtr_chart_vertical(svg, &p, "%g", 1);
  time_axis(svg, &p);
  curve(svg, &p, tokens, colour[0]);
  p = begin_panel(svg, 1, 1, "Requests under way");
  p.high = duration;
  p.top = qtr_chart_nice(most_of(running));
  qtr_chart_vertical(svg, &p, "%g", 1);
  time_axis(svg, &p);
  curve(svg, &p, running, colour[1]);
}

enum qtr_status qtr_load_plot(const struct qtr_load_report *r, char **text, size_t *len, struct qtr_error *err) {
  static const enum qtr_load_time left[2] = {QTR_TIME_TTFT, QTR_TIME_E2E}, right[2] = {QTR_TIME_TPOT, QTR_TIME_ITL};
  static const char *const left_names[2] = {"first token", "whole answer"};
  static const char *const right_names[2] = {"per output token", "between pieces"};
  const struct qtr_load_summary *s = r->summary;
  struct qtr_svg svg;
  char line[240];
  qtr_svg_begin(&svg, 2 * (PANEL_WIDTH + LEFT) + GAP + 30, TOP + 2 * PANEL_HEIGHT + 96 + 46);
  (void)snprintf(line, sizeof line, "%.80s: %.2f requests/s, %.0f output tokens/s, %zu of %zu complete", r->model,
                 s->requests_s, s->output_s, s->n_ok, r->run->n);
  qtr_svg_text(&svg, LEFT, 28, 17, QTR_SVG_START, QTR_CHART_INK, line);
  qtr_svg_text(&svg, LEFT, 48, 12, QTR_SVG_START, QTR_CHART_SOFT, r->load);
  distributions(&svg, r, 0, "Requests answered within", left, left_names);
  distributions(&svg, r, 1, "Tokens within", right, right_names);
  over_time(&svg, r);
  enum qtr_status status = qtr_svg_end(&svg, err);
  if (status) {
    qtr_svg_free(&svg);
    return status;
  }
  *text = svg.text;
  *len = svg.len;
  return QTR_OK;
}
