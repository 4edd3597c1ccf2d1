/* bench_serve.h - `quattuor bench serve`, a command of its own: argv[0] is its name. */
#ifndef QTR_CLI_BENCH_SERVE_H
#define QTR_CLI_BENCH_SERVE_H

int qtr_bench_serve(int argc, char **argv);

#endif
