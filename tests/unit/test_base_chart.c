/* test_base_chart.c - values land where the axes say, also beyond their ends; the numbers beside them. */
#include "base/chart.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void scales(void **state) {
  (void)state;
  struct qtr_chart c = {.x = 100, .y = 50, .width = 300, .height = 200, .low = 1, .high = 1000, .bottom = 0, .top = 8};
  c.log_x = true;
  assert_true(fabs(qtr_chart_x(&c, 10) - 200) < 1e-9);
  assert_true(fabs(qtr_chart_y(&c, 2) - 200) < 1e-9);
  assert_true(fabs(qtr_chart_y(&c, 100) - 50) < 1e-9); /* at the end of the axis */
  assert_true(fabs(qtr_chart_x(&c, 0) - 100) < 1e-9);  /* no logarithm */
  c.log_y = true;
  c.bottom = 0.5;
  assert_true(fabs(qtr_chart_y(&c, 2) - 150) < 1e-9);
  static const double nice[][2] = {{0.9, 1}, {1, 1}, {1.1, 2}, {2.2, 2.5}, {2.6, 5}, {51, 100}, {0.03, 0.05}};
  for (size_t i = 0; i < sizeof nice / sizeof nice[0]; i++)
    assert_true(fabs(qtr_chart_nice(nice[i][0]) - nice[i][1]) < 1e-9);
}

static size_t count(const char *text, const char *what) {
  size_t n = 0;
  for (const char *p = text; (p = strstr(p, what)); p++) n++;
  return n;
}

static void axes(void **state) {
  (void)state;
  struct qtr_chart c = {.x = 60, .y = 10, .width = 100, .height = 100, .low = 1, .high = 8, .bottom = 0, .top = 2};
  struct qtr_svg svg;
  struct qtr_error err;
  qtr_svg_begin(&svg, 300, 200);
  qtr_chart_title(&svg, &c, "title");
  qtr_chart_vertical(&svg, &c, "%g ms", 1000);
  qtr_chart_mark(&svg, &c, 4, true, "4k");
  qtr_chart_legend(&svg, &c, 1, 0xff0000, "<dense>");
  assert_int_equal(qtr_svg_end(&svg, &err), QTR_OK);
  static const char *const numbers[] = {">0 ms<",    ">500 ms<", ">1000 ms<", ">1500 ms<",
                                        ">2000 ms<", ">4k<",     ">title<",   ">&lt;dense&gt;<"};
  for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) assert_int_equal(count(svg.text, numbers[i]), 1);
  assert_int_equal(count(svg.text, "<line"), 6);
  qtr_svg_free(&svg);

  c.log_y = true;
  c.bottom = 0.4;
  c.top = 20;
  qtr_svg_begin(&svg, 300, 200);
  qtr_chart_vertical(&svg, &c, "%g", 1);
  assert_int_equal(qtr_svg_end(&svg, &err), QTR_OK);
  static const char *const steps[] = {">0.5<", ">1<", ">2<", ">5<", ">10<", ">20<"};
  for (size_t i = 0; i < sizeof steps / sizeof steps[0]; i++) assert_int_equal(count(svg.text, steps[i]), 1);
  assert_int_equal(count(svg.text, "<text"), 6);
  qtr_svg_free(&svg);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(scales), cmocka_unit_test(axes)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
