/* qoq.h - the QoQ algorithm (Lin et al., "QServe", 2024; spec F): what makes a model ready for 4-bit weights and a 4-bit
 * cache before it is rounded, and rounds it so that its outputs change little.
 *
 * Layer by layer: read, fold norms, rotate; run the calibration set through it in floats; smooth keys, the inputs of o_proj
 * and down_proj, reorder; clip ranges; GPTQ. Memory: one layer in floats, the second moments of its inputs, one calibration
 * sample. The hidden states between layers, and the finished layers, lie in files of a work directory: a run that was killed
 * goes on behind the last finished layer, and gives the same bytes as one that was not. */
#ifndef QTR_QUANT_QOQ_H
#define QTR_QUANT_QOQ_H

#include "backend/backend.h"
#include "base/threads.h"
#include "checkpoint/config.h"

enum qtr_smoothing { QTR_SMOOTH_OFF, QTR_SMOOTH_MANUAL, QTR_SMOOTH_GRID };

/* s[c] = a[c]^alpha / b[c]^beta (F.5): a, b the largest magnitudes of an activation and of what multiplies it. Manual: these
 * two. Grid: the best of (0, 0), (i/n, 0) and (i/n, 1 - i/n) by the error of the layer's output. */
struct qtr_smooth_options {
  enum qtr_smoothing mode;
  float alpha, beta;
};

struct qtr_qoq_options {
  const char *calibration; /* a text, or .jsonl with a "text" in each line (quant/calibration.h) */
  int32_t n_samples, length;
  uint64_t seed;
  bool rotate;                         /* the residual stream by a Hadamard matrix, norms folded (F.3) */
  bool rotate_heads;                   /* values and o_proj by one per head (F.3, 3) */
  bool reorder;                        /* down_proj's input channels by their magnitude (F.4); groups only */
  bool clip;                           /* ranges by output error (F.7) */
  bool gptq;                           /* F.8 */
  bool correct;                        /* each matrix makes up for what the quantised layers before it changed */
  struct qtr_smooth_options keys;      /* SmoothAttention: K against Q (F.5.2) */
  struct qtr_smooth_options out, down; /* inputs of o_proj and down_proj against their columns (F.5.1) */
  struct qtr_smooth_options input;     /* SmoothQuant of what follows a norm; not with rotate */
  int32_t n_grid;                      /* 20 points of a grid */
  float damp;                          /* GPTQ: 0.01, per-channel weights 0.03 */
  bool static_kv;                      /* write per-tensor scales of K and V for an 8-bit cache (A.2.5) */
  bool keep_float32;                   /* W16A16: transformed weights in F32, for tests of exactness */
  bool fresh;                          /* start anew instead of going on behind a killed run */
};

/* Defaults of spec F.9 for the format: W4A8 qoq-gchn, W4A8_G128 qoq-g128, W8A8 "ooo", others rotation alone. model_type and
 * sizes choose the family's alpha and beta; unknown ones get the general ones. */
void qtr_qoq_options_init(struct qtr_qoq_options *options, enum qtr_linear_format format, const struct qtr_config *config);

/* "rotate,gptq": these steps and no others; "+clip,-reorder": the ones there are, changed. A smoothing that is switched on
 * keeps its mode, or becomes manual. QTR_ERR_ARGUMENT names an unknown step. */
enum qtr_status qtr_qoq_parse_steps(struct qtr_qoq_options *options, const char *list, struct qtr_error *err);
/* "grid", "off", or "alpha,beta" (0 to 1 each). */
enum qtr_status qtr_qoq_parse_smoothing(struct qtr_smooth_options *options, const char *text, struct qtr_error *err);

#endif
