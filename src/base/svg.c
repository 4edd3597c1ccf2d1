/* svg.c - a string that grows, and the few elements of SVG that plots need (svg.h). */
#include "base/svg.h"

#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void put(struct qtr_svg *svg, const char *text, size_t len) {
  if (svg->failed) return;
  if (svg->capacity - svg->len <= len) {
    size_t capacity = (svg->len + len + 1) * 2;
    char *more = realloc(svg->text, capacity);
    if (!more) {
      svg->failed = true;
      return;
    }
    svg->text = more;
    svg->capacity = capacity;
  }
  memcpy(svg->text + svg->len, text, len);
  svg->len += len;
  svg->text[svg->len] = 0;
}

__attribute__((format(printf, 2, 3))) static void print(struct qtr_svg *svg, const char *format, ...) {
  char text[320]; /* numbers and fixed words only: what is longer does not come here */
  va_list args;
  va_start(args, format);
  int n = vsnprintf(text, sizeof text, format, args);
  va_end(args);
  if (n > 0) put(svg, text, (size_t)n < sizeof text ? (size_t)n : sizeof text - 1);
}

/* Text of an element or attribute; control characters, which XML forbids, become spaces. */
static void put_escaped(struct qtr_svg *svg, const char *text) {
  for (; *text; text++) {
    unsigned char c = (unsigned char)*text;
    switch (c) {
      case '<': put(svg, "&lt;", 4); break;
      case '>': put(svg, "&gt;", 4); break;
      case '&': put(svg, "&amp;", 5); break;
      case '"': put(svg, "&quot;", 6); break;
      default: put(svg, c < 0x20 || c == 0x7f ? " " : text, 1); break;
    }
  }
}

void qtr_svg_begin(struct qtr_svg *svg, double width, double height) {
  *svg = (struct qtr_svg){0};
  print(svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%.6g\" height=\"%.6g\" viewBox=\"0 0 %.6g %.6g\" "
        "font-family=\"sans-serif\">\n",
        width, height, width, height);
  qtr_svg_rect(svg, 0, 0, width, height, 0xffffff, NULL);
}

void qtr_svg_rect(struct qtr_svg *svg, double x, double y, double width, double height, uint32_t fill, const char *tip) {
  print(svg, "<rect x=\"%.6g\" y=\"%.6g\" width=\"%.6g\" height=\"%.6g\" fill=\"#%06x\"", x, y, width, height,
        (unsigned)fill & 0xffffffu);
  if (!tip) {
    put(svg, "/>\n", 3);
    return;
  }
  put(svg, "><title>", 8);
  put_escaped(svg, tip);
  put(svg, "</title></rect>\n", 16);
}

void qtr_svg_line(struct qtr_svg *svg, double x1, double y1, double x2, double y2, uint32_t stroke, double width) {
  print(svg, "<line x1=\"%.6g\" y1=\"%.6g\" x2=\"%.6g\" y2=\"%.6g\" stroke=\"#%06x\" stroke-width=\"%.3g\"/>\n", x1, y1, x2,
        y2, (unsigned)stroke & 0xffffffu, width);
}

void qtr_svg_polyline(struct qtr_svg *svg, const double *xy, size_t n, uint32_t stroke, double width) {
  print(svg, "<polyline fill=\"none\" stroke=\"#%06x\" stroke-width=\"%.3g\" points=\"", (unsigned)stroke & 0xffffffu,
        width);
  for (size_t i = 0; i < n; i++) print(svg, "%s%.6g,%.6g", i ? " " : "", xy[2 * i], xy[2 * i + 1]);
  put(svg, "\"/>\n", 4);
}

void qtr_svg_text(struct qtr_svg *svg, double x, double y, double size, enum qtr_svg_anchor anchor, uint32_t fill,
                  const char *text) {
  static const char *const names[] = {"start", "middle", "end"};
  print(svg, "<text x=\"%.6g\" y=\"%.6g\" font-size=\"%.3g\" text-anchor=\"%s\" fill=\"#%06x\">", x, y, size, names[anchor],
        (unsigned)fill & 0xffffffu);
  put_escaped(svg, text);
  put(svg, "</text>\n", 8);
}

enum qtr_status qtr_svg_end(struct qtr_svg *svg, struct qtr_error *err) {
  put(svg, "</svg>\n", 7);
  return svg->failed ? qtr_fail_memory(err, "a drawing", svg->len) : QTR_OK;
}

void qtr_svg_free(struct qtr_svg *svg) {
  free(svg->text);
  *svg = (struct qtr_svg){0};
}
