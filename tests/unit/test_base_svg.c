/* test_base_svg.c - drawings are well-formed whatever the labels hold, and grow without bound. */
#include "base/svg.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void elements(void **state) {
  (void)state;
  struct qtr_svg svg;
  struct qtr_error err;
  const double xy[] = {0, 1, 2.5, 3, 1e6, -4};
  qtr_svg_begin(&svg, 100, 50);
  qtr_svg_rect(&svg, 1, 2, 3, 4, 0x0a0b0c, "a < b & \"c\"");
  qtr_svg_line(&svg, 0, 0, 1, 1, 0xff0000, 1.5);
  qtr_svg_polyline(&svg, xy, 3, 0x00ff00, 2);
  qtr_svg_text(&svg, 5, 6, 14, QTR_SVG_MIDDLE, 0, "x\x01y</text>");
  assert_int_equal(qtr_svg_end(&svg, &err), QTR_OK);
  assert_int_equal(svg.len, strlen(svg.text));
  assert_non_null(strstr(svg.text, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"100\" height=\"50\""));
  assert_non_null(strstr(svg.text, "fill=\"#0a0b0c\"><title>a &lt; b &amp; &quot;c&quot;</title></rect>"));
  assert_non_null(strstr(svg.text, "points=\"0,1 2.5,3 1e+06,-4\""));
  assert_non_null(strstr(svg.text, "text-anchor=\"middle\" fill=\"#000000\">x y&lt;/text&gt;</text>"));
  assert_non_null(strstr(svg.text, "</svg>\n"));
  qtr_svg_free(&svg);
}

static void long_drawings(void **state) {
  (void)state;
  struct qtr_svg svg;
  struct qtr_error err;
  char label[3000];
  memset(label, '&', sizeof label - 1);
  label[sizeof label - 1] = 0;
  qtr_svg_begin(&svg, 1, 1);
  for (int i = 0; i < 1000; i++) qtr_svg_text(&svg, i, i, 10, QTR_SVG_END, 0, i == 500 ? label : "label");
  assert_int_equal(qtr_svg_end(&svg, &err), QTR_OK);
  assert_int_equal(svg.len, strlen(svg.text));
  size_t n = 0;
  for (const char *p = svg.text; (p = strstr(p, "</text>")); p++) n++;
  assert_int_equal(n, 1000);
  qtr_svg_free(&svg);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(elements), cmocka_unit_test(long_drawings)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
