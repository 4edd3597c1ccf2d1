/* int_matrix.c - codes and scales of one projection (int_matrix.h; spec A.2). */
#include "quant/int_matrix.h"

#include "base/half.h"
#include "base/status.h"

#include <stdlib.h>

enum qtr_status qtr_int_matrix_create(enum qtr_store store, size_t n_out, size_t n_in, struct qtr_int_matrix *m,
                                      struct qtr_error *err) {
  size_t groups = n_in / QTR_GROUP;
  *m = (struct qtr_int_matrix){.store = store, .n_out = n_out, .n_in = n_in};
  bool ok = (m->code = malloc(n_out * n_in + 1)) != NULL;
  if (store == QTR_STORE_W8) {
    ok = ok && (m->dequant = malloc(n_out * sizeof *m->dequant + 1));
  } else {
    ok = ok && (m->scale = malloc(n_out * sizeof *m->scale + 1));
  }
  if (store == QTR_STORE_W4) ok = ok && (m->szero = malloc(n_out * sizeof *m->szero + 1));
  if (store == QTR_STORE_W4_G128) ok = ok && (m->s2 = malloc(n_out * groups + 1)) && (m->z2 = malloc(n_out * groups + 1));
  if (ok) return QTR_OK;
  qtr_int_matrix_free(m);
  return qtr_fail_memory(err, "a matrix", n_out * n_in);
}

void qtr_int_matrix_free(struct qtr_int_matrix *m) {
  free(m->code);
  free(m->scale);
  free(m->dequant);
  free(m->szero);
  free(m->s2);
  free(m->z2);
  *m = (struct qtr_int_matrix){0};
}

struct qtr_sink_codes qtr_int_matrix_codes(const struct qtr_int_matrix *m) {
  return (struct qtr_sink_codes){
      .code = m->code, .scale = m->scale, .dequant = m->dequant, .szero = m->szero, .s2 = m->s2, .z2 = m->z2};
}

void qtr_int_matrix_row(const struct qtr_int_matrix *m, size_t row, float *out) {
  const uint8_t *code = m->code + row * m->n_in;
  if (m->store == QTR_STORE_W8) {
    for (size_t i = 0; i < m->n_in; i++) out[i] = (float)(int8_t)code[i] * m->dequant[row];
    return;
  }
  float scale = qtr_f16_to_f32(m->scale[row]);
  if (m->store == QTR_STORE_W4) {
    float zero = qtr_f16_to_f32(m->szero[row]);
    for (size_t i = 0; i < m->n_in; i++) out[i] = (float)code[i] * scale - zero;
    return;
  }
  const uint8_t *s2 = m->s2 + row * (m->n_in / QTR_GROUP), *z2 = m->z2 + row * (m->n_in / QTR_GROUP);
  for (size_t i = 0; i < m->n_in; i++) {
    out[i] = (float)(code[i] * s2[i / QTR_GROUP] - z2[i / QTR_GROUP]) * scale;
  }
}
