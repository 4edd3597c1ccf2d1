/* lab_cuda_select.cu - laboratory of page selection on the GPU: src/backend/cuda/select*. Predictions and outcomes:
 * bench/NOTES.md.
 *
 * Build (in the repository's root; with compute_80,code=sm_80 for GPUs before Hopper):
 *   for f in backend/cuda/select_plan backend/common/sparse base/status; do
 *     gcc -O2 -std=c11 -D_GNU_SOURCE -Isrc -Iinclude -I/usr/local/cuda/include -c src/$f.c -o lab_$(basename $f).o; done
 *   nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -Isrc -Iinclude bench/lab_cuda_select.cu \
 *     src/backend/cuda/select.cu lab_select_plan.o lab_sparse.o lab_status.o -o lab_cuda_select
 *
 * `lab check [seed]`: statistics against a host loop, ragged chunks over garbage; choices against qtr_sparse_choose with
 * double scores, page for page, ragged events over poisoned scores and lists, twice each; waves; a captured launch with
 * other events than it was captured with. A choice that differs counts as right only where double precision cannot tell the
 * pages apart (scores in 128-bit integers, printed as "near ties"). `lab quick [seed]`: fewer of them. `lab time`: times;
 * layers rotate beyond the L2, graphs of many launches, medians. `lab`: check, then time. Exit status 1 if anything is
 * wrong. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include <cuda_fp16.h>

extern "C" {
#include "backend/common/sparse.h"
#include "base/half.h"
}
#include "backend/cuda/launch.cuh"
#include "backend/cuda/select.h"
#include "lab.cuh"

static uint64_t rng_state = 1;
static uint64_t rng_next() {
  uint64_t z = rng_state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}
static int rng_below(int n) { return (int)(rng_next() % (uint64_t)n); }
static float rng_normal() {
  uint64_t u = rng_next();
  float s = (float)(u & 65535) + (float)(u >> 16 & 65535) + (float)(u >> 32 & 65535) + (float)(u >> 48);
  return (s / 65536.0f - 2) * 1.7320508f;
}
static uint16_t half_bits(float x) { return qtr_f16_from_f32(x); }

template <typename T>
struct device_array {
  T *at = NULL;
  size_t n = 0;
  explicit device_array(size_t count, int fill = 0xff) : n(count) {
    CHECK(cudaMalloc(&at, std::max<size_t>(1, n) * sizeof(T)));
    CHECK(cudaMemset(at, fill, std::max<size_t>(1, n) * sizeof(T)));
  }
  explicit device_array(const std::vector<T> &x) : device_array(x.size()) { set(x); }
  device_array(const device_array &) = delete;
  ~device_array() { CHECK(cudaFree(at)); }
  void set(const std::vector<T> &x) {
    if (!x.empty()) CHECK(cudaMemcpy(at, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  std::vector<T> get() const {
    std::vector<T> x(n);
    if (n > 0) CHECK(cudaMemcpy(x.data(), at, n * sizeof(T), cudaMemcpyDeviceToHost));
    return x;
  }
};

static int n_sms, failures, near_ties;
static long n_choices;

template <typename F>
static void parallel(int n, F work) {
  std::atomic<int> next(0);
  std::vector<std::thread> threads;
  unsigned n_threads = std::max(1u, std::min((unsigned)n, std::thread::hardware_concurrency()));
  for (unsigned i = 0; i < n_threads; i++) {
    threads.emplace_back([&] {
      for (int k; (k = next++) < n;) work(k);
    });
  }
  for (auto &t : threads) t.join();
}

/* ---- statistics ------------------------------------------------------------------------------------------------------ */

static std::vector<int32_t> some_heads(int n_kv_heads, int n) { /* ascending */
  std::vector<int32_t> head(n_kv_heads);
  for (int i = 0; i < n_kv_heads; i++) head[i] = i;
  for (int i = n_kv_heads - 1; i > 0; i--) std::swap(head[i], head[rng_below(i + 1)]);
  head.resize(n);
  std::sort(head.begin(), head.end());
  return head;
}

/* Sequences grow by ragged chunks, over garbage; wild: keys that RoPE would never leave. */
static void check_stats(int dim, int logical_tokens, int n_heads, int n_kv_heads, int n_retrieval, bool wild) {
  enum { SEQS = 6, STEPS = 14, BLOCKS = 24 };
  int n_pages = SEQS * BLOCKS, width = (n_heads + 2 * n_kv_heads) * dim;
  size_t n_values = (size_t)n_retrieval * (64 / logical_tokens) * 2 * dim;
  std::vector<int32_t> head = some_heads(n_kv_heads, n_retrieval), table(n_pages);
  for (int i = 0; i < n_pages; i++) table[i] = i;
  for (int i = n_pages - 1; i > 0; i--) std::swap(table[i], table[rng_below(i + 1)]);
  std::vector<uint16_t> want((size_t)(n_pages + 1) * n_values);
  for (auto &x : want) x = (uint16_t)rng_next();
  device_array<uint16_t> stats(want);
  device_array<int32_t> d_head(head), d_table(table);
  int done[SEQS] = {};
  for (int step = 0; step < STEPS; step++) {
    std::vector<int32_t> q_start(1), kv_len, token_seq;
    bool decode = step % 3 == 2;
    for (int s = 0; s < SEQS; s++) {
      int left = BLOCKS * 64 - done[s], n = decode ? 1 : rng_below(4) == 0 ? rng_below(3) : rng_below(230);
      n = std::min(n, left);
      kv_len.push_back(done[s]);
      q_start.push_back(q_start.back() + n);
      token_seq.insert(token_seq.end(), n, s);
    }
    int n_tokens = q_start.back();
    std::vector<uint16_t> qkv((size_t)n_tokens * width);
    for (auto &x : qkv) {
      x = half_bits(rng_below(50) == 0 ? 60000 * rng_normal() : rng_below(20) == 0 ? 0.0f : rng_normal());
      if ((x & 0x7fff) > 0x7bff) x = 0x7bff;
      if (wild && rng_below(40) == 0) x = (uint16_t)rng_next();
    }
    device_array<uint16_t> d_qkv(qkv);
    device_array<int32_t> d_seq(token_seq), d_start(q_start), d_len(kv_len);
    const struct qtr_cuda_stats_args args = {d_qkv.at,   stats.at, d_head.at,      n_retrieval, n_heads,
                                             n_kv_heads, dim,      logical_tokens, n_tokens,    SEQS,
                                             BLOCKS,     d_seq.at, d_start.at,     d_len.at,    d_table.at};
    CHECK(qtr_cuda_stats_update(&args, 0));
    CHECK(cudaDeviceSynchronize());
    for (int t = 0; t < n_tokens; t++) {
      int s = token_seq[t], position = kv_len[s] + t - q_start[s], page = table[s * BLOCKS + position / 64];
      for (int r = 0; r < n_retrieval; r++) {
        const uint16_t *k = qkv.data() + (size_t)t * width + (size_t)(n_heads + head[r]) * dim;
        for (int i = 0; i < dim; i++) {
          float x = qtr_f16_to_f32(k[i]);
          x = x > -65504 ? x : -65504; /* NaN: the least */
          x = x < 65504 ? x : 65504;
          size_t at[2];
          for (int m = 0; m < 2; m++)
            at[m] = qtr_cuda_stats_at(logical_tokens, dim, n_retrieval, page, r, position % 64 / logical_tokens, m == 1, i);
          bool begins = position % logical_tokens == 0;
          if (begins || x > qtr_f16_to_f32(want[at[0]])) want[at[0]] = half_bits(x);
          if (begins || x < qtr_f16_to_f32(want[at[1]])) want[at[1]] = half_bits(x);
        }
      }
    }
    for (int s = 0; s < SEQS; s++) done[s] += q_start[s + 1] - q_start[s];
    std::vector<uint16_t> got = stats.get();
    for (size_t i = 0; i < got.size(); i++) {
      if (got[i] == want[i] || ((got[i] | want[i]) & 0x7fff) == 0) continue;
      if (failures++ < 20)
        printf("BAD statistics dim %d logical %d heads %d/%d step %d: value %zu is %04x, expected %04x\n", dim,
               logical_tokens, n_retrieval, n_kv_heads, step, i, got[i], want[i]);
    }
  }
}

/* ---- the oracle --------------------------------------------------------------------------------------------------------
 */

enum keys { KEYS_RANDOM, KEYS_EQUAL, KEYS_PATTERNS, KEYS_TINY, KEYS_HUGE, KEYS_ZERO, KEYS_SUBNORMAL, N_KEYS };
static const char *const keys_names[] = {"random", "equal", "patterns", "tiny", "huge", "zero", "subnormal"};

/* A cache's layer and a batch. */
struct world {
  struct qtr_kv_sparse sparse = {};
  struct qtr_cuda_select_config config = {};
  int n_retrieval, n_tokens, n_seqs, max_blocks, n_pool, logical;
  enum keys keys;
  std::vector<int32_t> head, table;
  std::vector<uint16_t> stats, qkv;
  int dim() const { return config.head_dim; }
  int choosers() const { return config.each_head ? config.group : 1; }
  size_t stride() const { return qtr_sparse_selection_ints(&sparse); }
  const uint16_t *query(int token, int rank, int member) const {
    size_t width = (size_t)(config.group + 2) * config.n_kv_heads * dim();
    return qkv.data() + (size_t)token * width + ((size_t)head[rank] * config.group + member) * dim();
  }
  const uint16_t *row(int page, int rank, int l) const {
    return stats.data() + qtr_cuda_stats_at(sparse.logical_tokens, dim(), n_retrieval, page, rank, l, false, 0);
  }
};

static float half_value(uint16_t h) {
  static const std::vector<float> value = [] {
    std::vector<float> v(65536);
    for (int i = 0; i < 65536; i++) v[i] = qtr_f16_to_f32((uint16_t)i);
    return v;
  }();
  return value[h];
}

/* As the reference backend scores a page, for members [first, last) of a group. */
static double page_score(const struct world &w, int seq, int token, int rank, int first, int last, int page) {
  int physical = w.table[(size_t)seq * w.max_blocks + page], dim = w.dim();
  double best = -INFINITY;
  for (int l = 0; l < w.logical; l++) {
    const uint16_t *row = w.row(physical, rank, l);
    for (int m = first; m < last; m++) {
      const uint16_t *q = w.query(token, rank, m);
      double sum = 0;
      for (int i = 0; i < dim; i++) {
        double x = half_value(q[i]), a = x * half_value(row[i]), b = x * half_value(row[dim + i]);
        sum += a > b ? a : b;
      }
      if (sum > best) best = sum;
    }
  }
  return best;
}

/* The same exactly, in units of 2^-48, and the largest sum of magnitudes. */
static __int128 page_score_exact(const struct world &w, int seq, int token, int rank, int first, int last, int page,
                                 __int128 *size) {
  int physical = w.table[(size_t)seq * w.max_blocks + page], dim = w.dim();
  __int128 best = 0;
  bool any = false;
  *size = 0;
  for (int l = 0; l < w.logical; l++) {
    const uint16_t *row = w.row(physical, rank, l);
    for (int m = first; m < last; m++) {
      const uint16_t *q = w.query(token, rank, m);
      __int128 sum = 0, all = 0;
      for (int i = 0; i < dim; i++) {
        int64_t x = (int64_t)(half_value(q[i]) * 16777216.0f);
        __int128 a = (__int128)x * (int64_t)(half_value(row[i]) * 16777216.0f),
                 b = (__int128)x * (int64_t)(half_value(row[dim + i]) * 16777216.0f), c = a > b ? a : b;
        sum += c;
        all += c < 0 ? -c : c;
      }
      if (!any || sum > best) best = sum;
      *size = std::max(*size, all);
      any = true;
    }
  }
  return best;
}

/* Do the choices differ only in pages that double precision cannot tell apart? */
static bool is_near_tie(const struct world &w, const struct qtr_cuda_select_event &e, int rank, int first, int last,
                        const int32_t *got, const int32_t *want, int n) {
  std::vector<int32_t> only_got, only_want;
  std::set_difference(got, got + n, want, want + n, std::back_inserter(only_got));
  std::set_difference(want, want + n, got, got + n, std::back_inserter(only_want));
  if (only_got.size() != only_want.size() || only_got.empty()) return false;
  for (int32_t a : only_got) {
    if (a < 1 || a >= e.tail) return false;
    for (int32_t b : only_want) {
      __int128 size_a, size_b, x = page_score_exact(w, e.seq, e.token, rank, first, last, a, &size_a),
                               y = page_score_exact(w, e.seq, e.token, rank, first, last, b, &size_b);
      double apart = fabs((double)(x - y)), slack = (double)w.dim() * 0x1p-52 * (double)std::max(size_a, size_b);
      const int32_t *table = &w.table[(size_t)e.seq * w.max_blocks];
      bool same = memcmp(w.row(table[a], rank, 0), w.row(table[b], rank, 0), (size_t)w.logical * 4 * w.dim()) == 0;
      if (same || apart > slack) return false; /* ties of equal statistics go to the earlier page */
    }
  }
  return true;
}

/* ---- worlds ------------------------------------------------------------------------------------------------------------
 */

static void fill_row(enum keys keys, int dim, uint16_t *row) {
  for (int i = 0; i < dim; i++) {
    float middle = rng_normal(), half_width = fabsf(rng_normal());
    uint16_t high, low;
    switch (keys) {
      case KEYS_HUGE: {
        static const uint16_t some[] = {0x7bff, 0xfbff, 0, 0x8000, 0x3c00, 0x0001, 0x8001, 0x7bfe};
        high = some[rng_below(8)], low = some[rng_below(8)];
        break;
      }
      case KEYS_ZERO: high = rng_below(2) ? 0x8000 : 0, low = rng_below(2) ? 0x8000 : 0; break;
      case KEYS_SUBNORMAL: high = (uint16_t)(rng_next() & 0x83ff), low = (uint16_t)(rng_next() & 0x83ff); break;
      default: high = half_bits(middle + half_width), low = half_bits(middle - half_width);
    }
    if (half_value(high) < half_value(low)) std::swap(high, low);
    row[i] = high;
    row[dim + i] = low;
  }
}

static void fill_stats(struct world &w) {
  int dim = w.dim();
  size_t n_rows = (size_t)w.n_pool * w.n_retrieval * w.logical;
  w.stats.resize(n_rows * 2 * dim);
  std::vector<uint16_t> pattern(3 * 2 * (size_t)dim);
  for (int i = 0; i < 3; i++) fill_row(rng_below(2) ? KEYS_RANDOM : KEYS_HUGE, dim, &pattern[(size_t)i * 2 * dim]);
  fill_row(KEYS_RANDOM, dim, &pattern[0]);
  for (size_t r = 0; r < n_rows; r++) {
    uint16_t *row = &w.stats[r * 2 * dim];
    if (w.keys == KEYS_EQUAL || w.keys == KEYS_TINY) {
      memcpy(row, &pattern[0], 4 * (size_t)dim);
      if (w.keys == KEYS_TINY && rng_below(3) > 0) { /* one step up or down in one place, or a subnormal there */
        int i = rng_below(dim);
        row[i] = rng_below(4) == 0 ? (uint16_t)rng_below(1024) : (uint16_t)(row[i] + rng_below(2));
        if (half_value(row[i]) < half_value(row[dim + i])) row[dim + i] = row[i];
      }
    } else if (w.keys == KEYS_PATTERNS) {
      memcpy(row, &pattern[(size_t)rng_below(3) * 2 * dim], 4 * (size_t)dim);
    } else {
      fill_row(w.keys, dim, row);
    }
  }
}

static void fill_queries(struct world &w) {
  w.qkv.resize((size_t)w.n_tokens * (w.config.group + 2) * w.config.n_kv_heads * w.dim());
  for (auto &x : w.qkv) {
    x = half_bits(rng_normal());
    int kind = rng_below(64);
    if (kind == 0) x = 0;
    if (kind == 1) x = 0x8000;
    if (kind == 2 && w.keys == KEYS_HUGE) x = rng_below(2) ? 0x7bff : 0xfbff;
    if (kind == 3) x &= 0x83ff;
  }
}

static struct world make_world(int dim, int logical_tokens, int n_kv_heads, int n_retrieval, int group, bool each_head,
                               int budget, enum keys keys, int n_seqs, int max_pages, int n_pool) {
  struct world w;
  w.sparse.budget = budget, w.sparse.interval = 4, w.sparse.logical_tokens = logical_tokens, w.sparse.each_head = each_head;
  w.sparse.group = group, w.sparse.n_slots = n_seqs, w.sparse.max_pages = max_pages;
  w.config = {n_kv_heads, group, dim, logical_tokens, qtr_sparse_limit(&w.sparse), each_head, n_seqs, max_pages, n_sms};
  w.n_retrieval = n_retrieval, w.n_tokens = n_seqs + 3, w.n_seqs = n_seqs, w.max_blocks = max_pages + 1, w.n_pool = n_pool;
  w.logical = 64 / logical_tokens, w.keys = keys;
  w.head = some_heads(n_kv_heads, n_retrieval);
  w.table.resize((size_t)n_seqs * w.max_blocks);
  for (int s = 0; s < n_seqs; s++) { /* a permutation where the pool is large enough: pages are met twice otherwise */
    std::vector<int32_t> order(n_pool);
    for (int i = 0; i < n_pool; i++) order[i] = i;
    for (int i = n_pool - 1; i > 0; i--) std::swap(order[i], order[rng_below(i + 1)]);
    for (int i = 0; i < w.max_blocks; i++) w.table[(size_t)s * w.max_blocks + i] = order[i % n_pool];
  }
  fill_stats(w);
  fill_queries(w);
  return w;
}

static std::vector<struct qtr_cuda_select_event> make_events(const struct world &w, int n, int n_lists) {
  std::vector<int32_t> list(n_lists);
  for (int i = 0; i < n_lists; i++) list[i] = i;
  for (int i = n_lists - 1; i > 0; i--) std::swap(list[i], list[rng_below(i + 1)]);
  std::vector<struct qtr_cuda_select_event> events;
  for (int i = 0; i < n; i++) {
    int most = w.config.max_pages, limit = w.config.limit, tail = 1 + rng_below(most), kind = rng_below(4);
    if (kind == 0) tail = std::min(most, std::max(1, limit - 3 + rng_below(6)));
    if (kind == 1 && i == 0) tail = most;
    if (kind == 2 && most > 300) tail = 1 + rng_below(300);
    events.push_back({rng_below(w.n_seqs), rng_below(w.n_tokens), tail, list[i]});
  }
  return events;
}

/* The device's side of a world. */
struct selector {
  const struct world &w;
  int n_lists;
  device_array<uint16_t> stats, qkv;
  device_array<int32_t> head, table, lists;
  device_array<uint8_t> plan, scratch;
  std::vector<uint8_t> host_plan;
  selector(const struct world &world, int n_events_most, int lists_wanted)
      : w(world),
        n_lists(lists_wanted),
        stats(world.stats),
        qkv(world.qkv),
        head(world.head),
        table(world.table),
        lists((size_t)lists_wanted * world.config.n_kv_heads * world.choosers() * world.stride()),
        plan(qtr_cuda_select_plan_bytes((size_t)n_events_most)),
        scratch(qtr_cuda_select_scratch_bytes(&world.config)),
        host_plan(plan.n) {
    CHECK(cudaMemset(scratch.at, 0, qtr_cuda_select_counter_bytes(&w.config)));
  }
  void prepare(const std::vector<struct qtr_cuda_select_event> &events) {
    std::fill(host_plan.begin(), host_plan.end(), (uint8_t)0xee);
    qtr_cuda_select_plan(&w.config, events.data(), events.size(), host_plan.data());
    plan.set(host_plan);
    CHECK(cudaMemset(lists.at, 0xcc, lists.n * 4));
  }
  void launch(cudaStream_t stream) {
    const struct qtr_cuda_select_args args = {qkv.at,   stats.at, head.at, w.n_retrieval, w.max_blocks,
                                              table.at, lists.at, plan.at, scratch.at};
    CHECK(qtr_cuda_select(&w.config, &args, host_plan.data(), stream));
  }
  void check(const std::vector<struct qtr_cuda_select_event> &events, const char *what);
};

void selector::check(const std::vector<struct qtr_cuda_select_event> &events, const char *what) {
  CHECK(cudaDeviceSynchronize());
  std::vector<int32_t> got = lists.get(), want(lists.n, (int32_t)0xcccccccc);
  int choosers = w.choosers(), group = w.config.group, n_jobs = (int)events.size() * w.n_retrieval * choosers;
  auto place = [&](int job, int *rank, int *chooser) {
    const struct qtr_cuda_select_event &e = events[job / (w.n_retrieval * choosers)];
    *rank = job / choosers % w.n_retrieval;
    *chooser = job % choosers;
    return (((size_t)e.list * w.config.n_kv_heads + w.head[*rank]) * choosers + *chooser) * w.stride();
  };
  parallel(n_jobs, [&](int job) {
    const struct qtr_cuda_select_event &e = events[job / (w.n_retrieval * choosers)];
    int rank, chooser;
    size_t at = place(job, &rank, &chooser);
    std::vector<double> score(e.tail, 0.0);
    std::vector<int32_t> order(e.tail);
    int first = choosers > 1 ? chooser : 0, last = choosers > 1 ? chooser + 1 : group;
    for (int page = 1; page < e.tail && e.tail >= w.config.limit; page++) {
      score[page] = page_score(w, e.seq, e.token, rank, first, last, page);
    }
    qtr_sparse_choose(score.data(), e.tail, w.config.limit, order.data(), (struct qtr_selection *)&want[at]);
  });
  for (int job = 0; job < n_jobs; job++) {
    const struct qtr_cuda_select_event &e = events[job / (w.n_retrieval * choosers)];
    int rank, chooser;
    size_t at = place(job, &rank, &chooser), n = (size_t)std::min(e.tail, w.config.limit - 1);
    n_choices++;
    if (memcmp(&got[at], &want[at], (n + 2) * 4) == 0) continue;
    int first = choosers > 1 ? chooser : 0, last = choosers > 1 ? chooser + 1 : group;
    if (got[at] == want[at] && got[at + 1] == want[at + 1] && std::is_sorted(&got[at + 2], &got[at + 2 + n]) &&
        is_near_tie(w, e, rank, first, last, &got[at + 2], &want[at + 2], (int)n)) {
      near_ties++;
      for (size_t i = 0; i < n; i++) want[at + 2 + i] = got[at + 2 + i];
      continue;
    }
    if (failures++ < 20) {
      size_t i = 0;
      while (got[at + i] == want[at + i]) i++;
      printf(
          "BAD choice (%s) dim %d logical %d group %d %s limit %d keys %s, %zu events: tail %d rank %d chooser %d: int %zu "
          "is "
          "%d, expected %d\n",
          what, w.dim(), w.sparse.logical_tokens, group, choosers > 1 ? "each" : "together", w.config.limit,
          keys_names[w.keys], events.size(), e.tail, rank, chooser, i, got[at + i], want[at + i]);
    }
    for (size_t i = 0; i < n + 2; i++) got[at + i] = want[at + i]; /* reported */
  }
  if (memcmp(got.data(), want.data(), got.size() * 4) != 0) { /* lists nobody chose for, and past the ends */
    if (failures++ < 20) printf("BAD choice (%s): written where nothing was chosen\n", what);
  }
  std::vector<uint8_t> left(qtr_cuda_select_counter_bytes(&w.config));
  CHECK(cudaMemcpy(left.data(), scratch.at, left.size(), cudaMemcpyDeviceToHost));
  if (std::any_of(left.begin(), left.end(), [](uint8_t x) { return x != 0; })) {
    if (failures++ < 20) printf("BAD scratch (%s): counters are not zero\n", what);
  }
}

static void check_world(const struct world &w, int n_events, const char *what) {
  int n_lists = n_events + 2;
  selector s(w, n_events, n_lists);
  for (int round = 0; round < 2; round++) {
    std::vector<struct qtr_cuda_select_event> events = make_events(w, round ? 1 + rng_below(n_events) : n_events, n_lists);
    s.prepare(events);
    s.launch(0);
    s.check(events, what);
  }
}

/* A launch captured with one plan, run with others: none, fewer and more events, other tails. */
static void check_graph() {
  enum { SEQS = 24 };
  struct world w = make_world(128, 16, 4, 3, 4, false, 512, KEYS_RANDOM, SEQS, 700, 900);
  selector s(w, SEQS, SEQS + 2);
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CHECK(cudaStreamCreate(&stream));
  s.prepare(make_events(w, 5, SEQS));
  CHECK(cudaDeviceSynchronize());
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  s.launch(stream);
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&exec, graph, 0));
  for (int n : {0, 1, (int)SEQS, 7, 0, 13}) {
    std::vector<struct qtr_cuda_select_event> events = make_events(w, n, SEQS);
    s.prepare(events);
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaGraphLaunch(exec, stream));
    s.check(events, "graph");
  }
  CHECK(cudaGraphExecDestroy(exec));
  CHECK(cudaGraphDestroy(graph));
  CHECK(cudaStreamDestroy(stream));
}

static int some_budget() {
  static const int budgets[] = {128, 192, 256, 320, 512, 1024, 2048, 4096};
  return budgets[rng_below(8)];
}

static void check(bool quick) {
  for (int dim : {64, 80, 128, 66, 256}) {
    for (int logical : {16, 32, 64}) check_stats(dim, logical, 8, 4, 1 + rng_below(4), dim == 80);
  }
  printf("statistics: %s\n", failures ? "WRONG" : "right");
  fflush(stdout);
  int n = 0;
  for (int group : {1, 4, 5, 8, 16}) { /* small, every combination */
    for (int dim : {64, 128, 80}) {
      for (int logical : {16, 32, 64}) {
        for (int k = 0; k < N_KEYS; k++) {
          if (quick && n++ % 5 != 0) continue;
          struct world w =
              make_world(dim, logical, 4, 1 + rng_below(4), group, rng_below(2), some_budget(), (enum keys)k, 5, 260, 300);
          check_world(w, 1 + rng_below(5), "small");
        }
      }
    }
  }
  for (int i = 0; i < (quick ? 3 : 12); i++) { /* odd shapes */
    int dims[] = {2, 30, 66, 72, 100, 256}, groups[] = {1, 3, 7, 9, 64};
    struct world w = make_world(dims[i % 6], 16 << i % 3, 2, 1 + i % 2, groups[i % 5], i / 2 % 2, some_budget(),
                                (enum keys)(i % N_KEYS), 3, 200, 90);
    check_world(w, 3, "odd");
  }
  printf("small choices: %s\n", failures ? "WRONG" : "right");
  fflush(stdout);
  check_graph();
  printf("captured: %s\n", failures ? "WRONG" : "right");
  {
    struct world w = make_world(64, 64, 2, 2, 4, false, 256, KEYS_RANDOM, 4, 40, 64); /* waves by number of events */
    check_world(w, quick ? 1100 : 2600, "waves");
  }
  if (!quick) { /* waves by room: 65,536 pages; every block works on several pairs */
    struct world w = make_world(64, 64, 8, 3, 16, true, 512, KEYS_RANDOM, 2, 9000, 9100);
    check_world(w, 17, "waves");
  }
  printf("waves: %s\n", failures ? "WRONG" : "right");
  fflush(stdout);
  int n_large = 0;
  for (int k = 0; k < N_KEYS; k++) { /* long sequences */
    for (int each = 0; each < 2; each++) {
      if (quick && n_large++ % 7 != 0) continue;
      int groups[] = {4, 4, 1, 8, 5}, dim = k % 3 == 2 ? 64 : 128;
      struct world w = make_world(dim, 16 << rng_below(2), 4, 2, groups[rng_below(5)], each, k == 0 ? 4096 : some_budget(),
                                  (enum keys)k, 3, 9000, k == 0 ? 9100 : 4000);
      check_world(w, 3, "long");
    }
  }
  printf("long choices: %s\n", failures ? "WRONG" : "right");
  printf("%ld choices, %d near ties, %d failures\n", n_choices, near_ties, failures);
  fflush(stdout);
}

/* ---- times ---------------------------------------------------------------------------------------------------------------
 */

static const double read_bandwidth = 2.6e12; /* what a good read of many pages reaches on an H100 */

__global__ static void k_fill(uint32_t *data, size_t n, uint32_t seed) { /* pairs of halves of 0.25 ... 2, either sign */
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
    uint32_t x = (uint32_t)(i * 2654435761u) ^ seed;
    x = (x ^ x >> 15) * 0x2c1b3c6du;
    x = (x ^ x >> 12) * 0x297a2d39u;
    data[i] = (x & 0x87ff87ffu) | 0x38003800u;
  }
}

/* As short as a kernel between two others of a step can be. */
__global__ static void k_between(int *x) {
  qtr_begin();
  if (threadIdx.x == 0) x[blockIdx.x] = blockIdx.x;
}

static void report(const char *what, double us, double bytes) {
  printf("%-58s %8.2f us %8.2f MB %6.0f GB/s %4.0f %% of 2.6 TB/s\n", what, us, bytes * 1e-6, bytes / us * 1e-3,
         100 * bytes / (us * 1e-6) / read_bandwidth);
  fflush(stdout);
}

/* n_seqs sequences of `context` tokens, each with an event (none: what an idle launch costs). */
static void time_select(int n_seqs, int context, int dim, int group, int logical_tokens, bool each_head, int budget,
                        bool events) {
  enum { RANKS = 4, KV_HEADS = 8 };
  int tail = (context - 1) / 64, max_pages = tail + 1, n_pages = n_seqs * max_pages;
  struct qtr_kv_sparse sparse = {};
  sparse.budget = budget, sparse.group = group, sparse.logical_tokens = logical_tokens, sparse.each_head = each_head;
  struct qtr_cuda_select_config config = {KV_HEADS,  group,  dim,       logical_tokens, qtr_sparse_limit(&sparse),
                                          each_head, n_seqs, max_pages, n_sms};
  size_t layer_halves = (size_t)n_pages * RANKS * (64 / logical_tokens) * 2 * dim;
  int n_layers = std::min(64, (int)(200e6 / (2.0 * (double)layer_halves)) + 2), choosers = each_head ? group : 1;
  std::vector<int32_t> table((size_t)n_seqs * max_pages), order(n_pages);
  for (int i = 0; i < n_pages; i++) order[i] = i;
  for (int i = n_pages - 1; i > 0; i--) std::swap(order[i], order[rng_below(i + 1)]);
  table = order;
  std::vector<int32_t> head = {0, 2, 5, 7};
  std::vector<uint16_t> q((size_t)n_seqs * (group + 2) * KV_HEADS * dim);
  for (auto &x : q) x = half_bits(rng_normal());
  device_array<uint16_t> stats(layer_halves * n_layers), qkv(q);
  device_array<int32_t> d_table(table), d_head(head),
      lists((size_t)n_seqs * KV_HEADS * choosers * qtr_sparse_selection_ints(&sparse));
  std::vector<struct qtr_cuda_select_event> event;
  for (int i = 0; i < n_seqs && events; i++) event.push_back({i, i, tail, i});
  std::vector<uint8_t> host_plan(qtr_cuda_select_plan_bytes((size_t)n_seqs));
  qtr_cuda_select_plan(&config, event.data(), event.size(), host_plan.data());
  device_array<uint8_t> plan(host_plan), scratch(qtr_cuda_select_scratch_bytes(&config), 0);
  k_fill<<<1024, 256>>>((uint32_t *)stats.at, stats.n / 2, (uint32_t)rng_next());
  CHECK(cudaDeviceSynchronize());
  auto choose = [&](int i, cudaStream_t stream) {
    const struct qtr_cuda_select_args args = {qkv.at,    stats.at + layer_halves * (size_t)(i % n_layers),
                                              d_head.at, RANKS,
                                              max_pages, d_table.at,
                                              lists.at,  plan.at,
                                              scratch.at};
    CHECK(qtr_cuda_select(&config, &args, host_plan.data(), stream));
  };
  double us = time_us(std::max(24, n_layers), choose);
  /* Between other kernels, as in a step: what one more launch of nothing and the choice cost above two of nothing. */
  device_array<int> nothing(n_sms);
  auto idle = [&](cudaStream_t stream) { CHECK(qtr_launch(k_between, (unsigned)n_sms, 128, 0, stream, nothing.at)); };
  double two = time_us(std::max(24, n_layers), [&](int, cudaStream_t stream) { idle(stream), idle(stream); });
  double with =
      time_us(std::max(24, n_layers), [&](int i, cudaStream_t stream) { idle(stream), choose(i, stream), idle(stream); });
  char label[128];
  snprintf(label, sizeof label, "select %3d x %6d, dim %d group %d logical %d %s budget %d%s", n_seqs, context, dim, group,
           logical_tokens, each_head ? "each" : "together", budget, events ? "" : " idle");
  printf("%-58s %8.2f us between others\n", label, with - two);
  report(label, us, events ? 2.0 * (double)layer_halves * tail / max_pages : 0);
}

/* n_seqs sequences with n_new tokens each at kv_len. */
static void time_stats(int n_seqs, int n_new, int kv_len, int n_retrieval) {
  enum { HEADS = 32, KV_HEADS = 8, DIM = 128, LOGICAL = 16 };
  int blocks = (kv_len + n_new + 63) / 64, n_pages = n_seqs * blocks, n_tokens = n_seqs * n_new;
  size_t width = (HEADS + 2 * KV_HEADS) * DIM, values = (size_t)n_retrieval * (64 / LOGICAL) * 2 * DIM;
  int n_layers =
      std::min(16, (int)(200e6 / ((double)n_tokens * (double)width * 2 + (double)n_pages * (double)values * 2)) + 2);
  std::vector<int32_t> table(n_pages), head(n_retrieval), seq, start, len(n_seqs, kv_len);
  for (int i = 0; i < n_pages; i++) table[i] = i;
  for (int i = n_pages - 1; i > 0; i--) std::swap(table[i], table[rng_below(i + 1)]);
  for (int i = 0; i < n_retrieval; i++) head[i] = i;
  for (int s = 0; s <= n_seqs; s++) start.push_back(s * n_new);
  for (int s = 0; s < n_seqs; s++) seq.insert(seq.end(), n_new, s);
  device_array<uint16_t> qkv((size_t)n_tokens * width * n_layers), stats((size_t)n_pages * values * n_layers, 0);
  device_array<int32_t> d_table(table), d_head(head), d_seq(seq), d_start(start), d_len(len);
  k_fill<<<1024, 256>>>((uint32_t *)qkv.at, qkv.n / 2, (uint32_t)rng_next());
  CHECK(cudaDeviceSynchronize());
  double us = time_us(std::max(24, n_layers), [&](int i, cudaStream_t stream) {
    size_t layer = (size_t)(i % n_layers);
    const struct qtr_cuda_stats_args args = {qkv.at + layer * n_tokens * width,
                                             stats.at + layer * n_pages * values,
                                             d_head.at,
                                             n_retrieval,
                                             HEADS,
                                             KV_HEADS,
                                             DIM,
                                             LOGICAL,
                                             n_tokens,
                                             n_seqs,
                                             blocks,
                                             d_seq.at,
                                             d_start.at,
                                             d_len.at,
                                             d_table.at};
    CHECK(qtr_cuda_stats_update(&args, stream));
  });
  char label[128];
  snprintf(label, sizeof label, "statistics of %d x %d tokens, %d retrieval heads", n_seqs, n_new, n_retrieval);
  double written = n_new == 1 ? 2 : (double)(n_new + LOGICAL - 1) / LOGICAL; /* decode: read and written */
  report(label, us, n_retrieval * DIM * 2.0 * ((double)n_tokens + n_seqs * 2 * written));
}

static void times() {
  for (int context : {16384, 32768, 65536, 131072, 262144, 524288}) time_select(1, context, 128, 4, 16, false, 4096, true);
  time_select(16, 65536, 128, 4, 16, false, 4096, true);
  time_select(256, 8192, 128, 4, 16, false, 4096, true);
  time_select(1, 131072, 128, 4, 16, true, 4096, true);
  time_select(1, 524288, 128, 4, 16, true, 4096, true);
  time_select(1, 524288, 128, 4, 64, false, 4096, true);
  time_select(1, 524288, 64, 4, 16, false, 4096, true);
  time_select(1, 524288, 80, 4, 16, false, 4096, true);
  time_select(1, 524288, 128, 1, 16, false, 4096, true);
  time_select(1, 524288, 128, 8, 16, false, 4096, true);
  time_select(1, 524288, 128, 16, 16, false, 4096, true);
  time_select(1, 524288, 128, 4, 16, false, 4096, false);
  for (int n_retrieval : {4, 8}) {
    time_stats(1, 1, 32773, n_retrieval);
    time_stats(256, 1, 1029, n_retrieval);
    time_stats(1, 8192, 0, n_retrieval);
    time_stats(8, 1024, 0, n_retrieval);
  }
}

int main(int argc, char **argv) {
  const char *mode = argc > 1 ? argv[1] : "all";
  uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
  rng_state = seed * 1000003;
  struct cudaDeviceProp prop;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaGetDeviceProperties(&prop, device);
  if (error != cudaSuccess) {
    printf("no GPU: %s\n", cudaGetErrorString(error));
    return 2;
  }
  n_sms = prop.multiProcessorCount;
  printf("%s, %d SMs, seed %llu\n", prop.name, n_sms, (unsigned long long)seed);
  bool all = strcmp(mode, "all") == 0, quick = strcmp(mode, "quick") == 0;
  if (all || quick || strcmp(mode, "check") == 0) check(quick);
  if (all || strcmp(mode, "time") == 0) times();
  return failures ? 1 : 0;
}
