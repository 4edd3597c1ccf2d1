/* test_eval_heatmap.c - the PNG of a heat map, decoded again, has the colours of its cells; the SVG its numbers. */
#include "eval/heatmap.h"
#include "eval/raster.h"

#include <math.h>
#include <setjmp.h>
#include <spng.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const char *const rows[] = {"0 %", "50 %", "100 %", "over"};
static const char *const columns[] = {"1024", "4096"};
static const double values[] = {0, 0.5, 1, 0.25, NAN, 0.97, 0.45, 0.75};

static struct qtr_heatmap example(void) {
  return (struct qtr_heatmap){.title = "needle",
                              .subtitle = "w4a8kv4 <&>",
                              .row_title = "depth",
                              .column_title = "tokens",
                              .row = rows,
                              .column = columns,
                              .value = values,
                              .n_rows = 4,
                              .n_columns = 2};
}

/* Decodes to RGB; *width and *height of the picture. */
static uint8_t *decode(const void *png, size_t n, uint32_t *width, uint32_t *height) {
  spng_ctx *c = spng_ctx_new(0);
  struct spng_ihdr header;
  size_t size;
  assert_int_equal(spng_set_png_buffer(c, png, n), 0);
  assert_int_equal(spng_get_ihdr(c, &header), 0);
  assert_int_equal(spng_decoded_image_size(c, SPNG_FMT_RGB8, &size), 0);
  uint8_t *pixel = malloc(size);
  assert_int_equal(spng_decode_image(c, pixel, size, SPNG_FMT_RGB8, 0), 0);
  *width = header.width;
  *height = header.height;
  spng_ctx_free(c);
  return pixel;
}

static bool has_colour(const uint8_t *pixel, size_t n, uint32_t rgb) {
  size_t found = 0;
  for (size_t i = 0; i < n; i++) {
    found += ((uint32_t)pixel[3 * i] << 16 | (uint32_t)pixel[3 * i + 1] << 8 | pixel[3 * i + 2]) == rgb;
  }
  return found > 1000; /* most of a cell */
}

static void png_shows_values(void **state) {
  (void)state;
  const struct qtr_heatmap map = example();
  struct qtr_error err;
  void *data;
  size_t n_bytes;
  uint32_t width, height;
  assert_int_equal(qtr_heatmap_png(&map, &data, &n_bytes, &err), QTR_OK);
  uint8_t *pixel = decode(data, n_bytes, &width, &height);
  size_t n = (size_t)width * height;
  static const uint32_t expected[] = {0xf0496e, 0xebb839, 0x0cd79f, 0xee8154, 0xcccccc, 0x19d599, 0xecad3e, 0x7cc86c};
  for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) assert_true(has_colour(pixel, n, expected[i]));
  assert_false(has_colour(pixel, n, 0x123456));
  free(pixel);
  free(data);
}

static void svg_says_values(void **state) {
  (void)state;
  const struct qtr_heatmap map = example();
  struct qtr_error err;
  void *data;
  size_t n_bytes;
  assert_int_equal(qtr_heatmap_svg(&map, &data, &n_bytes, &err), QTR_OK);
  assert_non_null(strstr(data, "<title>tokens 4096, depth 100 %: 97.0 %</title>"));
  assert_non_null(strstr(data, ">97</text>"));
  assert_non_null(strstr(data, "w4a8kv4 &lt;&amp;&gt;"));
  assert_null(strstr(data, ">nan</text>"));
  free(data);
}

static void refuses(void **state) {
  (void)state;
  struct qtr_heatmap map = example();
  struct qtr_error err;
  struct qtr_raster raster;
  void *data;
  size_t n_bytes;
  map.n_rows = 0;
  assert_int_equal(qtr_heatmap_svg(&map, &data, &n_bytes, &err), QTR_ERR_LIMIT);
  map.n_rows = 201;
  assert_int_equal(qtr_heatmap_png(&map, &data, &n_bytes, &err), QTR_ERR_LIMIT);
  assert_int_equal(qtr_raster_create(0, 5, &raster, &err), QTR_ERR_LIMIT);
  assert_int_equal(qtr_raster_create(5, 1 << 20, &raster, &err), QTR_ERR_LIMIT);
}

static void raster_clips(void **state) {
  (void)state;
  struct qtr_raster raster;
  struct qtr_error err;
  assert_int_equal(qtr_raster_create(10, 8, &raster, &err), QTR_OK);
  qtr_raster_rect(&raster, -5, -5, 7, 7, 0x010203);
  qtr_raster_rect(&raster, 9, 7, INT32_MAX, INT32_MAX, 0x040506);
  qtr_raster_rect(&raster, 100, 100, 5, 5, 0);
  qtr_raster_text(&raster, 3, -2, 1, 0x0a0a0a, "I\xff");
  assert_int_equal(raster.pixel[0], 1);
  assert_int_equal(raster.pixel[(1 * 10 + 1) * 3 + 2], 3);
  assert_int_equal(raster.pixel[(2 * 10 + 2) * 3], 0xff);
  assert_int_equal(raster.pixel[(7 * 10 + 9) * 3], 4);
  assert_int_equal(raster.pixel[(2 * 10 + 5) * 3], 0x0a); /* the stem of the I */
  qtr_raster_free(&raster);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(png_shows_values), cmocka_unit_test(svg_says_values),
                                     cmocka_unit_test(refuses), cmocka_unit_test(raster_clips)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
