/* svg.h - writes drawings as SVG text: rectangles, lines, curves and labels, self-contained, no scripts and no fonts but the
 * viewer's sans-serif. Coordinates are in pixels from the top left. Out of memory is remembered and told at the end. */
#ifndef QTR_BASE_SVG_H
#define QTR_BASE_SVG_H

#include "quattuor/quattuor.h"

struct qtr_svg {
  char *text; /* (len) and a NUL */
  size_t len, capacity;
  bool failed; /* out of memory: what follows is dropped */
};

enum qtr_svg_anchor { QTR_SVG_START, QTR_SVG_MIDDLE, QTR_SVG_END }; /* which part of a label is at x */

/* A drawing of that size, on white. It may be put into a page as it is. */
void qtr_svg_begin(struct qtr_svg *svg, double width, double height);
/* Colours are 0xRRGGBB. tip: shown when the pointer rests there; NULL = none. */
void qtr_svg_rect(struct qtr_svg *svg, double x, double y, double width, double height, uint32_t fill, const char *tip);
void qtr_svg_line(struct qtr_svg *svg, double x1, double y1, double x2, double y2, uint32_t stroke, double width);
/* xy: (n, 2) the points of a curve */
void qtr_svg_polyline(struct qtr_svg *svg, const double *xy, size_t n, uint32_t stroke, double width);
/* y is the base line. text: UTF-8, escaped here. */
void qtr_svg_text(struct qtr_svg *svg, double x, double y, double size, enum qtr_svg_anchor anchor, uint32_t fill,
                  const char *text);
/* Closes the drawing: svg->text is whole. QTR_ERR_MEMORY when something was dropped. */
enum qtr_status qtr_svg_end(struct qtr_svg *svg, struct qtr_error *err);
void qtr_svg_free(struct qtr_svg *svg);

#endif
