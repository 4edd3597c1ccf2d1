/* chart.h - a plotting area with its axes and legend, on top of svg.h: linear or logarithmic, one scale for every drawing.
 */
#ifndef QTR_BASE_CHART_H
#define QTR_BASE_CHART_H

#include "base/svg.h"

enum { QTR_CHART_INK = 0x333333, QTR_CHART_SOFT = 0x777777, QTR_CHART_GRID = 0xe4e4e4 };

struct qtr_chart {
  double x, y, width, height; /* of the plotting area, in pixels */
  double low, high;           /* of the horizontal axis */
  double bottom, top;         /* of the vertical one */
  bool log_x, log_y;
};

/* Pixels of a value; what lies beyond an axis is drawn at its end. */
double qtr_chart_x(const struct qtr_chart *chart, double v);
double qtr_chart_y(const struct qtr_chart *chart, double v);
/* The next of 1, 2, 2.5, 5, 10 … that is not below x. */
double qtr_chart_nice(double x);

void qtr_chart_title(struct qtr_svg *svg, const struct qtr_chart *chart, const char *title);
/* Grid lines and numbers; format has one %g or %f for value * scale. Logarithmic axes get 1, 2, 5, 10 … */
void qtr_chart_vertical(struct qtr_svg *svg, const struct qtr_chart *chart, const char *format, double scale);
/* A number below the horizontal axis; grid: and a line above it. */
void qtr_chart_mark(struct qtr_svg *svg, const struct qtr_chart *chart, double v, bool grid, const char *text);
/* Entry i, from the left, of the legend below. */
void qtr_chart_legend(struct qtr_svg *svg, const struct qtr_chart *chart, int i, uint32_t fill, const char *text);

#endif
