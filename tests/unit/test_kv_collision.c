/* The tests of the pool with a hash of two bits: nearly every look-up meets pages of other content, and none may be shared.
 */
#include <xxhash.h>

static XXH64_hash_t poor_hash(const void *data, size_t n, XXH64_hash_t seed) { return XXH64(data, n, seed) & 3u; }
#define XXH3_64bits_withSeed poor_hash

#include "kv/pool.c"

#define find find_in_test
#include "test_kv_pool.c"
