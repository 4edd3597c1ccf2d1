/* correct.h - error correction between layers: each matrix is asked to give what the float model gives, from the inputs that
 * the quantised model has. (Not part of QoQ as published; the target is that of GPTAQ, Li et al., 2025, solved in closed
 * form before GPTQ instead of inside it.)
 *
 * With f the float model's inputs of a matrix and f̂ the quantised model's, ‖W f - Ŵ f̂‖² is, but for a constant,
 * ‖(W* - Ŵ) f̂‖² with W* = W + W Σ(f - f̂)f̂ᵀ (Σ f̂f̂ᵀ)⁻¹. Matrices that add to the residual stream also take over what it has
 * lost:
 * + Σ(h - ĥ)f̂ᵀ (Σ f̂f̂ᵀ)⁻¹. */
#ifndef QTR_QUANT_CORRECT_H
#define QTR_QUANT_CORRECT_H

#include "quant/observe.h"
#include "quant/states.h"

/* Runs both models over the calibration samples, layer by layer and site by site. */
struct qtr_corrector {
  struct qtr_observed *observed; /* borrowed; its moments, samples and maxima become those of f̂, site by site */
  struct qtr_runner *quantised;  /* borrowed; its cache has the quantised model's format */
  const char *dir;               /* of the states; borrowed */
  size_t n_samples, length, hidden, heads, inner;
  struct qtr_states in, out;  /* residual streams of the quantised model before and after the layer */
  struct qtr_states seen;     /* what the float layer was seen to have: h after attention, o_proj's and down_proj's input */
  float *x;                   /* (length, hidden) the quantised model's residual stream */
  float *f, *f_hat;           /* (length, hidden + heads + inner) one sample of `seen`, of either model */
  float *normed, *normed_hat; /* (length, hidden) */
  float *difference;          /* (length, widest) */
  float *cross;               /* (dim, dim) Σ (f - f̂)ᵀ f̂ */
  float *residual;            /* (hidden, dim) Σ (h - ĥ)ᵀ f̂ */
  float *out_factor, *down_factor; /* (heads), (inner) what the inputs were divided by since they were seen */
  size_t *down_order;              /* (inner) how they were reordered */
};

enum qtr_status qtr_corrector_open(struct qtr_observed *observed, struct qtr_runner *quantised, const char *dir,
                                   size_t n_samples, struct qtr_corrector *c, struct qtr_error *err);
void qtr_corrector_close(struct qtr_corrector *c);

/* Opens the quantised model's states before layer `index`; those before layer 0 are copies of the float model's. */
enum qtr_status qtr_corrector_begin(struct qtr_corrector *c, int32_t index, const struct qtr_states *floats,
                                    struct qtr_error *err);

/* A qtr_runner_see for the float layer (user: the corrector), and the end of each of its samples. */
void qtr_corrector_see(void *user, enum qtr_site site, const float *x, size_t n_tokens, size_t n_in);
enum qtr_status qtr_corrector_seen(struct qtr_corrector *c, size_t sample, struct qtr_error *err);

/* Turns the weights behind one site into their targets. layer: the float layer with all its transformations; partly: the
 * same with what is quantised already in place of the floats; floats: the float model's residual streams before the layer.
 */
enum qtr_status qtr_corrector_aim(struct qtr_corrector *c, enum qtr_site site, const struct qtr_states *floats,
                                  struct qtr_float_layer *layer, const struct qtr_float_layer *partly, float damp,
                                  struct qtr_error *err);

/* The quantised model's states behind the layer; they become those before the next. */
enum qtr_status qtr_corrector_propagate(struct qtr_corrector *c, const struct qtr_float_layer *quantised_layer,
                                        struct qtr_error *err);

#endif
