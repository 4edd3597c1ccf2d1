/* raster.h - small pictures of rectangles and words, written as PNG by libspng: what a heat map needs where SVG is not read.
 */
#ifndef QTR_EVAL_RASTER_H
#define QTR_EVAL_RASTER_H

#include "quattuor/quattuor.h"

struct qtr_raster {
  uint8_t *pixel; /* (height, width, 3) RGB */
  size_t width, height;
};

/* White. At most 16384 pixels a side. */
enum qtr_status qtr_raster_create(size_t width, size_t height, struct qtr_raster *raster, struct qtr_error *err);
void qtr_raster_free(struct qtr_raster *raster);

/* Clipped to the picture. rgb: 0xRRGGBB */
void qtr_raster_rect(struct qtr_raster *raster, int32_t x, int32_t y, int32_t width, int32_t height, uint32_t rgb);

/* Letters of 5 by 7 dots, `dot` pixels each, in steps of 6; (x, y) is their top left. Small letters are drawn as capitals,
 * what is not in the font as a hollow box. */
void qtr_raster_text(struct qtr_raster *raster, int32_t x, int32_t y, int32_t dot, uint32_t rgb, const char *text);

/* *data is malloc'ed. */
enum qtr_status qtr_raster_png(const struct qtr_raster *raster, void **data, size_t *n_bytes, struct qtr_error *err);

#endif
