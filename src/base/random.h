/* random.h - splitmix64 (Steele, Lea, Flood 2014): the random numbers of test inputs and generated tasks. Sampling of tokens
 * has its own, philox.h. */
#ifndef QTR_BASE_RANDOM_H
#define QTR_BASE_RANDOM_H

#include <stdint.h>

static inline uint64_t qtr_random_next(uint64_t *state) {
  uint64_t z = (*state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

/* A number in [0, n), n > 0. The bias of the remainder is below n / 2^64. */
static inline uint64_t qtr_random_below(uint64_t *state, uint64_t n) { return qtr_random_next(state) % n; }

/* A state for one of many independent tasks: equal for equal keys, whatever else is generated. */
static inline uint64_t qtr_random_state(uint64_t seed, uint64_t a, uint64_t b, uint64_t c) {
  uint64_t state = seed;
  state = qtr_random_next(&state) ^ a;
  state = qtr_random_next(&state) ^ b;
  state = qtr_random_next(&state) ^ c;
  return qtr_random_next(&state);
}

#endif
