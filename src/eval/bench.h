/* bench.h - QServe's speed protocol (spec D.8.1): B prompts of P random tokens, G tokens generated for each, greedy, nothing
 * stops early. */
#ifndef QTR_EVAL_BENCH_H
#define QTR_EVAL_BENCH_H

#include "quattuor/quattuor.h"

struct qtr_bench_options {
  int32_t batch, prompt_len, gen_len;
  uint64_t seed;  /* of the prompts; another one each round, or the prefix cache answers */
  int32_t settle; /* decode steps that are not timed: the first ones, in which a device makes its graphs */
  int32_t slack;  /* tokens that each may generate besides, while the others' prompts are still read. With some, the round
                     ends when all have generated gen_len together */
  bool quiet;     /* no progress line */
};

struct qtr_bench_round {
  double seconds;            /* from before the first step to after the last token */
  double throughput_tok_s;   /* batch * gen_len / seconds */
  double prefill_s;          /* until every sequence has its first token */
  double decode_ms_per_step; /* of the steps in which all B sequences decode and nothing else, but for the first `settle`;
                                NAN where there were none */
  double decode_tok_s;       /* of those steps */
  double device_idle_share;  /* of a GPU's time over those steps, waiting for the next; NAN on CPUs */
  uint64_t n_decode_steps, n_preemptions;
};

/* The engine is idle before and after. */
enum qtr_status qtr_bench_round_run(struct qtr_engine *engine, const struct qtr_bench_options *options,
                                    struct qtr_bench_round *round, struct qtr_error *err);

#endif
