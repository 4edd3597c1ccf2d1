/* layer_report.c - the errors of a layer's matrices, summed up, and the last line of what wrote a model (layer_report.h). */
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

json_t *qtr_summary_json(const char *output, const struct qtr_quantize_summary *s, int32_t kv_scales_per_layer) {
  json_t *o = json_pack("{s:s, s:s, s:i, s:i, s:I, s:I, s:I, s:o, s:o, s:I}", "output", output, "precision", s->precision,
                        "group_size", (int)s->group_size, "n_layers", (int)s->n_layers, "n_tensors",
                        (json_int_t)s->n_tensors, "input_bytes", (json_int_t)s->input_bytes, "output_bytes",
                        (json_int_t)s->output_bytes, "relative_error", qtr_json_number(s->relative_error, 6), "seconds",
                        qtr_json_number(s->seconds, 5), "peak_rss_bytes", (json_int_t)qtr_peak_rss());
  if (kv_scales_per_layer > 0) json_object_set_new(o, "kv_scales_per_layer", json_integer((json_int_t)kv_scales_per_layer));
  return o;
}

void qtr_summary_print(const char *output, const struct qtr_quantize_summary *s, int32_t kv_scales_per_layer) {
  char in[32], out[32], peak[32];
  printf("%s: %s, group %d: %s -> %s in %.1f s and %s of memory, error %.3f %%\n", output, s->precision, s->group_size,
         qtr_show_bytes(s->input_bytes, in), qtr_show_bytes(s->output_bytes, out), s->seconds,
         qtr_show_bytes(qtr_peak_rss(), peak), s->relative_error * 100);
  if (kv_scales_per_layer == 1) printf("static KV scales put in\n");
  if (kv_scales_per_layer > 1) {
    printf("static KV scales put in: of the %d heads of each layer the largest, as the format has one scale a layer\n",
           (int)kv_scales_per_layer);
  }
}
