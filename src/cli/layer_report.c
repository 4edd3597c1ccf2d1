/* layer_report.c - the errors of a layer's matrices, summed up (layer_report.h). */
#include "cli/layer_report.h"

#include "cli/cli.h"

#include <math.h>
#include <stdio.h>

void qtr_layer_report_end(struct qtr_layer_report *l) {
  if (l->n == 0) return;
  double error = l->squared_norm > 0 ? sqrt(l->squared_error / l->squared_norm) : 0;
  double plain = l->squared_norm > 0 ? sqrt(l->plain_squared_error / l->squared_norm) : 0;
  bool calibrated = l->plain_squared_error > 0; /* then errors are those of the outputs */
  if (l->json) {
    json_t *o = json_pack("{s:i, s:o, s:o}", "layer", (int)l->number, calibrated ? "output_error" : "relative_error",
                          qtr_json_number(error, 6), "projections", l->projections);
    if (calibrated)
      json_object_set_new(o, "output_error_rtn", qtr_json_number(plain, 6));
    else
      json_object_set_new(o, "max_error", qtr_json_number(l->max_error, 6));
    l->projections = NULL;
    l->broken = !qtr_print_json(l->command, o) || l->broken;
  } else if (calibrated) {
    printf("layer %3d  output error %6.3f %%, %6.3f %% by rounding to nearest; worst %s %.3f %%\n", l->number, error * 100,
           plain * 100, l->worst, l->worst_error * 100);
  } else if (l->squared_norm > 0) {
    if (l->number >= 0) {
      printf("layer %3d  ", l->number);
    } else {
      printf("tables     ");
    }
    printf("error %6.3f %%  worst %s %.3f %%  largest |w - w'| %.4g\n", error * 100, l->worst, l->worst_error * 100,
           l->max_error);
  }
  *l = (struct qtr_layer_report){.command = l->command, .json = l->json, .broken = l->broken};
}

void qtr_layer_report_add(const struct qtr_quantize_report *r, void *report) {
  struct qtr_layer_report *l = report;
  if (l->n > 0 && l->number != r->layer) qtr_layer_report_end(l);
  l->number = r->layer;
  l->n++;
  l->squared_error += r->squared_error;
  l->squared_norm += r->squared_norm;
  l->plain_squared_error += r->plain_squared_error;
  if (r->max_error > l->max_error) l->max_error = r->max_error;
  if (r->relative_error >= l->worst_error) {
    l->worst_error = r->relative_error;
    (void)snprintf(l->worst, sizeof l->worst, "%s", r->projection);
  }
  if (l->json) {
    if (!l->projections) l->projections = json_object();
    json_object_set_new(l->projections, r->projection, qtr_json_number(r->relative_error, 6));
  }
}

void qtr_layer_report_drop(struct qtr_layer_report *l) {
  json_decref(l->projections);
  l->projections = NULL;
}
