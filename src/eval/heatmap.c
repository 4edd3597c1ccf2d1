/* heatmap.c - one drawing, two pens (heatmap.h). */
#include "eval/heatmap.h"

#include "base/checked.h"
#include "base/status.h"
#include "base/svg.h"
#include "eval/raster.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CELL_WIDTH 64
#define CELL_HEIGHT 36
#define TOP 64
#define RIGHT 88
#define BOTTOM 60
#define DOT 2            /* pixels of a dot of the raster font */
#define LETTER (6 * DOT) /* width of one */
#define LEGEND_STEPS 50
#define INK 0x222222

/* One of the two is there. */
struct pen {
  struct qtr_svg *svg;
  struct qtr_raster *raster;
};

static void draw_rect(const struct pen *pen, double x, double y, double width, double height, uint32_t rgb,
                      const char *tip) {
  if (pen->svg) {
    qtr_svg_rect(pen->svg, x, y, width, height, rgb, tip);
  } else {
    qtr_raster_rect(pen->raster, (int32_t)x, (int32_t)y, (int32_t)width, (int32_t)height, rgb);
  }
}

/* `anchor` of the label is at x, its middle at y. */
static void draw_text(const struct pen *pen, double x, double y, enum qtr_svg_anchor anchor, const char *text) {
  if (pen->svg) {
    qtr_svg_text(pen->svg, x, y + 5, 14, anchor, INK, text);
    return;
  }
  double width = (double)(strlen(text) * LETTER - DOT);
  double left = anchor == QTR_SVG_START ? x : anchor == QTR_SVG_MIDDLE ? x - width / 2 : x - width;
  qtr_raster_text(pen->raster, (int32_t)left, (int32_t)y - 7 * DOT / 2, DOT, INK, text);
}

/* Red at 0, yellow at a half, green at 1. */
static uint32_t colour(double value) {
  static const double stop[3][3] = {{0xf0, 0x49, 0x6e}, {0xeb, 0xb8, 0x39}, {0x0c, 0xd7, 0x9f}};
  uint32_t rgb = 0;
  if (!(value >= 0 && value <= 1)) return 0xcccccc;
  size_t from = value < 0.5 ? 0 : 1;
  double t = value * 2 - (double)from;
  for (size_t k = 0; k < 3; k++) rgb = rgb << 8 | (uint32_t)lround(stop[from][k] + t * (stop[from + 1][k] - stop[from][k]));
  return rgb;
}

/* Where the cells begin: after the longest label. */
static double left_of(const struct qtr_heatmap *map) {
  size_t n = strlen(map->row_title);
  for (size_t r = 0; r < map->n_rows; r++) n = QTR_MAX(n, strlen(map->row[r]));
  return (double)(n * LETTER + 20);
}

static void draw(const struct qtr_heatmap *map, const struct pen *pen) {
  const double left = left_of(map);
  double width = (double)(map->n_columns * CELL_WIDTH), height = (double)(map->n_rows * CELL_HEIGHT);
  char text[160];
  draw_text(pen, left, 16, QTR_SVG_START, map->title);
  draw_text(pen, left, 34, QTR_SVG_START, map->subtitle);
  draw_text(pen, left - 10, TOP - 12, QTR_SVG_END, map->row_title);
  for (size_t r = 0; r < map->n_rows; r++) {
    double y = TOP + (double)(r * CELL_HEIGHT);
    draw_text(pen, left - 10, y + CELL_HEIGHT / 2.0, QTR_SVG_END, map->row[r]);
    for (size_t c = 0; c < map->n_columns; c++) {
      double x = left + (double)(c * CELL_WIDTH), value = map->value[r * map->n_columns + c];
      (void)snprintf(text, sizeof text, "%s %s, %s %s: %.1f %%", map->column_title, map->column[c], map->row_title,
                     map->row[r], 100 * value);
      draw_rect(pen, x, y, CELL_WIDTH - 1, CELL_HEIGHT - 1, colour(value), text);
      if (isnan(value)) continue;
      (void)snprintf(text, sizeof text, "%.0f", 100 * value);
      draw_text(pen, x + CELL_WIDTH / 2.0, y + CELL_HEIGHT / 2.0, QTR_SVG_MIDDLE, text);
    }
  }
  for (size_t c = 0; c < map->n_columns; c++) {
    draw_text(pen, left + ((double)c + 0.5) * CELL_WIDTH, TOP + height + 14, QTR_SVG_MIDDLE, map->column[c]);
  }
  draw_text(pen, left + width / 2, TOP + height + 40, QTR_SVG_MIDDLE, map->column_title);
  double x = left + width + 20;
  for (size_t i = 0; i < LEGEND_STEPS; i++) {
    double top = floor(height * (double)i / LEGEND_STEPS), bottom = floor(height * (double)(i + 1) / LEGEND_STEPS);
    draw_rect(pen, x, TOP + top, 14, bottom - top, colour(1 - ((double)i + 0.5) / LEGEND_STEPS), NULL);
  }
  draw_text(pen, x + 20, TOP + 7, QTR_SVG_START, "100");
  draw_text(pen, x + 20, TOP + height - 7, QTR_SVG_START, "0");
}

static enum qtr_status check_size(const struct qtr_heatmap *map, struct qtr_error *err) {
  if (map->n_rows >= 1 && map->n_columns >= 1 && map->n_rows <= 200 && map->n_columns <= 200) return QTR_OK;
  return qtr_fail(err, QTR_ERR_LIMIT, "a heat map of %zu x %zu cells: 1 to 200 each way can be drawn", map->n_columns,
                  map->n_rows);
}

static size_t width_of(const struct qtr_heatmap *map) {
  size_t left = (size_t)left_of(map), title = left + QTR_MAX(strlen(map->title), strlen(map->subtitle)) * LETTER + 8;
  return QTR_MAX(left + map->n_columns * CELL_WIDTH + RIGHT, title);
}

static size_t height_of(const struct qtr_heatmap *map) { return TOP + map->n_rows * CELL_HEIGHT + BOTTOM; }

enum qtr_status qtr_heatmap_svg(const struct qtr_heatmap *map, void **data, size_t *n_bytes, struct qtr_error *err) {
  struct qtr_svg svg;
  enum qtr_status status = check_size(map, err);
  *data = NULL;
  if (status) return status;
  qtr_svg_begin(&svg, (double)width_of(map), (double)height_of(map));
  draw(map, &(struct pen){.svg = &svg});
  status = qtr_svg_end(&svg, err);
  if (status) {
    qtr_svg_free(&svg);
    return status;
  }
  *data = svg.text;
  *n_bytes = svg.len;
  return QTR_OK;
}

enum qtr_status qtr_heatmap_png(const struct qtr_heatmap *map, void **data, size_t *n_bytes, struct qtr_error *err) {
  struct qtr_raster raster;
  enum qtr_status status = check_size(map, err);
  *data = NULL;
  if (!status) status = qtr_raster_create(width_of(map), height_of(map), &raster, err);
  if (status) return status;
  draw(map, &(struct pen){.raster = &raster});
  status = qtr_raster_png(&raster, data, n_bytes, err);
  qtr_raster_free(&raster);
  return status;
}
