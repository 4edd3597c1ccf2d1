/* layer_report.h - what rounding did to a model's layers, printed as the matrices come: a line or a JSON object a layer. */
#ifndef QTR_CLI_LAYER_REPORT_H
#define QTR_CLI_LAYER_REPORT_H

#include "quant/quantize.h"

#include <jansson.h>

/* Begin with {.command, .json}; the rest is the layer whose matrices are coming in. */
struct qtr_layer_report {
  const char *command;
  bool json, broken; /* broken: stdout could not be written */
  int32_t number;    /* -1: embedding and head */
  size_t n;
  double squared_error, squared_norm, plain_squared_error, max_error;
  char worst[24];
  double worst_error;
  json_t *projections;
};

void qtr_layer_report_add(const struct qtr_quantize_report *matrix, void *report); /* a qtr_quantize_callback */
void qtr_layer_report_end(struct qtr_layer_report *report);                        /* prints the last layer */
void qtr_layer_report_drop(struct qtr_layer_report *report);                       /* after an error */

/* What it all came to: where it was written, its sizes, the time and the memory that it took. kv_scales_per_layer: how many
 * static KV scales each layer had in the file that they came from, K and V each; 0 = none. */
json_t *qtr_summary_json(const char *output, const struct qtr_quantize_summary *summary, int32_t kv_scales_per_layer);
void qtr_summary_print(const char *output, const struct qtr_quantize_summary *summary, int32_t kv_scales_per_layer);

#endif
