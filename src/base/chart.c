/* chart.c - axes and legends (chart.h). */
#include "base/chart.h"

#include "base/checked.h"

#include <math.h>
#include <stdio.h>

static double share(double v, double low, double high, bool logarithmic) {
  double s = logarithmic ? log(v / low) / log(high / low) : (v - low) / (high - low);
  return s > 0 ? QTR_MIN(s, 1) : 0; /* NaN: 0 */
}

double qtr_chart_x(const struct qtr_chart *c, double v) { return c->x + c->width * share(v, c->low, c->high, c->log_x); }
double qtr_chart_y(const struct qtr_chart *c, double v) {
  return c->y + c->height * (1 - share(v, c->bottom, c->top, c->log_y));
}

double qtr_chart_nice(double x) {
  double power = pow(10, floor(log10(QTR_MAX(x, 1e-9))));
  for (int i = 0; i < 4; i++) {
    static const double factor[] = {1, 2, 2.5, 5};
    if (factor[i] * power >= x * (1 - 1e-9)) return factor[i] * power;
  }
  return 10 * power;
}

void qtr_chart_title(struct qtr_svg *svg, const struct qtr_chart *c, const char *title) {
  qtr_svg_text(svg, c->x, c->y - 14, 14, QTR_SVG_START, QTR_CHART_INK, title);
}

static void rung(struct qtr_svg *svg, const struct qtr_chart *c, double v, uint32_t stroke, const char *format,
                 double scale) {
  double y = qtr_chart_y(c, v);
  char text[32];
  (void)snprintf(text, sizeof text, format, v * scale);
  qtr_svg_line(svg, c->x, y, c->x + c->width, y, stroke, 1);
  qtr_svg_text(svg, c->x - 7, y + 4, 11, QTR_SVG_END, QTR_CHART_SOFT, text);
}

void qtr_chart_vertical(struct qtr_svg *svg, const struct qtr_chart *c, const char *format, double scale) {
  if (!c->log_y) {
    for (int i = 0; i <= 4; i++)
      rung(svg, c, c->bottom + (c->top - c->bottom) * i / 4, i ? QTR_CHART_GRID : QTR_CHART_SOFT, format, scale);
    return;
  }
  static const double factor[] = {1, 2, 5};
  for (int decade = (int)floor(log10(c->bottom)), last = (int)floor(log10(c->top)); decade <= last; decade++) {
    for (int i = 0; i < 3; i++) {
      double v = pow(10, decade) * factor[i];
      if (v >= c->bottom * (1 - 1e-9) && v <= c->top * (1 + 1e-9)) rung(svg, c, v, QTR_CHART_GRID, format, scale);
    }
  }
  qtr_svg_line(svg, c->x, c->y + c->height, c->x + c->width, c->y + c->height, QTR_CHART_SOFT, 1);
}

void qtr_chart_mark(struct qtr_svg *svg, const struct qtr_chart *c, double v, bool grid, const char *text) {
  double x = qtr_chart_x(c, v);
  if (grid) qtr_svg_line(svg, x, c->y, x, c->y + c->height, QTR_CHART_GRID, 1);
  qtr_svg_text(svg, x, c->y + c->height + 17, 11, QTR_SVG_MIDDLE, QTR_CHART_SOFT, text);
}

void qtr_chart_legend(struct qtr_svg *svg, const struct qtr_chart *c, int i, uint32_t fill, const char *text) {
  double x = c->x + i * 215.0, y = c->y + c->height + 36;
  qtr_svg_rect(svg, x, y - 8, 14, 3, fill, NULL);
  qtr_svg_text(svg, x + 20, y - 3, 11, QTR_SVG_START, QTR_CHART_INK, text);
}
