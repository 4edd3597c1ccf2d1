/* heads.h - DuoAttention's table of attention heads (spec D.1): how much each KV head is needed to retrieve what stands far
 * back in the text, and from it which heads become streaming heads. Untrusted input. */
#ifndef QTR_CHECKPOINT_HEADS_H
#define QTR_CHECKPOINT_HEADS_H

#include "quattuor/quattuor.h"

#define QTR_HEADS_FILE "full_attention_heads.tsv"
#define QTR_HEADS_DIGITS 18 /* after the point, as DuoAttention writes them */

/* Reads a table of n_layers lines of n_kv_heads numbers, separated by tabs or spaces. value: (n_layers, n_kv_heads), clipped
 * to 0 … 1. What is no number, not finite, or of another shape is QTR_ERR_FORMAT and says where. */
enum qtr_status qtr_heads_parse(const char *text, size_t len, int32_t n_layers, int32_t n_kv_heads, double *value,
                                struct qtr_error *err);

/* The share `sparsity` (0 … 1) of heads with the smallest values become streaming: streaming (n) 1, others 0. The threshold
 * is numpy's quantile of all n values, and equal values are told apart by their index: the earlier one streams first (the
 * reference adds random noise instead, spec D.1.2). 0: none; 1: all. */
enum qtr_status qtr_heads_choose(const double *value, size_t n, double sparsity, uint8_t *streaming, struct qtr_error *err);

/* Both, for <dir>/full_attention_heads.tsv. */
enum qtr_status qtr_heads_read(const char *dir, int32_t n_layers, int32_t n_kv_heads, double sparsity, uint8_t *streaming,
                               struct qtr_error *err);

#endif
