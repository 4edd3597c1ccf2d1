/* lab_cuda_attention.cu - laboratory of the KV cache and attention on the GPU: src/backend/cuda/{kv.c, rope_kv.cu,
 * attention_*}. Versions, predictions and outcomes: bench/NOTES.md.
 *
 * Build: nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -Isrc -Iinclude this file,
 * src/backend/cuda/{rope_kv,select,attention_generic,attention_decode,attention_prefill}.cu, and objects (C11) of
 * src/backend/cuda/{kv,attention_plan,select_plan}.c, src/base/status.c, src/backend/common/{formats,sparse,kv_static}.c.
 * With compute_80 (code=compute_80) it runs what GPUs before Hopper get.
 *
 * `lab check [seed]`: random ragged batches; stored bits against kv_quant.h, results against double precision, each sequence
 * alone and in two steps, poisoned outputs; larger shapes against the generic kernel. `lab quick`: the first shapes only.
 *
 * `lab sanitize`: all kernels with little work, for compute-sanitizer. `lab profile`: one launch each, for ncu.
 *
 * `lab decode`, `lab prefill`: times; layers rotate beyond the L2, graphs of many launches, medians. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <thread>
#include <vector>

extern "C" {
#include "backend/backend.h"
#include "backend/common/kv_quant.h"
}
#include "backend/cuda/attention_kernels.h"
#include "lab.cuh"

/* What freeing a cache asks of the backend: nothing is recorded here. */
extern "C" void qtr_cuda_wait(struct qtr_backend *) {}
struct qtr_cuda;
extern "C" void qtr_cuda_forget_graphs(struct qtr_cuda *) {}

static uint64_t rng_state = 1;
static uint64_t rng_next() {
  uint64_t z = rng_state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}
static size_t rng_below(size_t n) { return (size_t)(rng_next() % n); }
static float rng_normal() {
  uint64_t u = rng_next();
  float s = (float)(u & 65535) + (float)(u >> 16 & 65535) + (float)(u >> 32 & 65535) + (float)(u >> 48);
  return (s / 65536.0f - 2) * 1.7320508f;
}

template <typename T>
static T *device_copy(const std::vector<T> &x) {
  T *d;
  CHECK(cudaMalloc(&d, std::max<size_t>(1, x.size()) * sizeof(T)));
  if (!x.empty()) CHECK(cudaMemcpy(d, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice));
  return d;
}

struct sequence {
  int32_t kv_len, q_len;
  std::vector<int32_t> pages;
};

static const char *const format_names[] = {"kv16", "kv8", "kv4", "kv8-static"};
static int n_sms, failures;

/* One step: host arrays, device arrays, plan. */
struct step {
  std::vector<int32_t> position, token_seq, q_start, kv_len, table;
  struct qtr_batch host = {};
  struct qtr_cuda_batch device = {};
  struct qtr_cuda_plan_config config = {};
  std::vector<int64_t> plan;
  std::vector<void *> memory;
  void *scratch = NULL;
  int n_tokens = 0;

  step(const std::vector<sequence> &seqs, int format, int n_heads, int n_kv_heads, int dim, const float *inv_freq,
       bool one_kernel = false) {
    size_t max_blocks = 1;
    for (auto &s : seqs) max_blocks = std::max(max_blocks, s.pages.size());
    table.assign(seqs.size() * max_blocks, -1);
    q_start.push_back(0);
    for (size_t i = 0; i < seqs.size(); i++) {
      for (int t = 0; t < seqs[i].q_len; t++) position.push_back(seqs[i].kv_len + t), token_seq.push_back((int32_t)i);
      n_tokens += seqs[i].q_len;
      q_start.push_back(n_tokens);
      kv_len.push_back(seqs[i].kv_len);
      std::copy(seqs[i].pages.begin(), seqs[i].pages.end(), table.begin() + (long)(i * max_blocks));
    }
    host.n_tokens = n_tokens, host.n_seqs = (int32_t)seqs.size(), host.max_blocks = (int32_t)max_blocks;
    host.position = position.data(), host.q_start = q_start.data(), host.kv_len = kv_len.data();
    host.block_table = table.data();
    config = {(enum qtr_kv_format)format, n_heads, n_kv_heads, dim, n_sms, one_kernel, NULL, true};
    plan.resize(qtr_cuda_attention_plan_bytes(&config, (size_t)n_tokens, seqs.size()) / 8 + 1);
    qtr_cuda_attention_plan(&config, &host, plan.data());
    float *cos, *sin;
    CHECK(cudaMalloc(&cos, (size_t)n_tokens * dim * 2));
    CHECK(cudaMalloc(&sin, (size_t)n_tokens * dim * 2));
    int32_t *p = device_copy(position), *ts = device_copy(token_seq), *qs = device_copy(q_start), *kl = device_copy(kv_len),
            *bt = device_copy(table);
    int64_t *pl = device_copy(plan);
    size_t n_scratch = qtr_cuda_attention_scratch_bytes(&config, (size_t)n_tokens, seqs.size());
    CHECK(cudaMalloc(&scratch, n_scratch));
    CHECK(cudaMemset(scratch, 0xff, n_scratch));
    CHECK(cudaMemset(scratch, 0, QTR_COUNTER_BYTES));
    device = {n_tokens, (int32_t)seqs.size(), (int32_t)max_blocks, p, ts, qs, kl, bt, bt, cos, sin, pl};
    if (inv_freq) CHECK(qtr_cuda_rope_table(p, inv_freq, (size_t)n_tokens, (size_t)dim / 2, cos, sin, 0));
    memory = {cos, sin, p, ts, qs, kl, bt, pl, scratch};
  }
  step(const step &) = delete;
  ~step() {
    for (void *m : memory) CHECK(cudaFree(m));
  }
};

static void fill_qkv(int n_heads, int n_kv_heads, int dim, int n_tokens, float size, std::vector<__half> &x) {
  int rows = n_heads + 2 * n_kv_heads;
  x.resize((size_t)n_tokens * rows * dim);
  for (int i = 0; i < n_tokens * rows; i++) {
    float offset = 0, scale = size;
    size_t kind = rng_below(16);
    if (kind == 0) offset = 5 * size;
    if (kind == 1) offset = -200 * size;
    if (kind == 2) scale = 0, offset = size;
    if (kind == 3) scale = 0;
    if (kind == 4) scale = 1e-6f;
    if (i % rows < n_heads) scale = 1, offset = 0;
    for (int j = 0; j < dim; j++) x[(size_t)i * dim + j] = __float2half(offset + scale * rng_normal());
    if (kind == 5) x[(size_t)i * dim + rng_below(dim)] = __float2half(20 * rng_normal());
  }
}

struct cache {
  struct qtr_kv *kv;
  struct qtr_kv_config config;
  std::vector<uint8_t> host; /* layer 0 */
  void download() {
    size_t n = 2 * ((size_t)config.n_pages + 1) * kv->head[0].page_bytes;
    host.resize(n);
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaMemcpy(host.data(), kv->data, n, cudaMemcpyDeviceToHost));
  }
  const uint8_t *block(bool is_v, int page, int head) const {
    const struct qtr_cuda_head &h = kv->head[head]; /* dense: in the order of their numbers */
    return host.data() + (is_v ? h.v : h.k) + (size_t)page * h.page_bytes;
  }
  void row(bool is_v, int page, int slot, int head, std::vector<int> &code, float *scale, float *zero) const {
    const uint8_t *b = block(is_v, page, head);
    int dim = config.head_dim, format = config.format;
    code.resize(dim);
    *scale = 1, *zero = 0;
    if (qtr_kv_has_params(format)) {
      uint16_t pair[2];
      memcpy(pair, b + qtr_kv_code_bytes(format, dim) + slot * 4, 4);
      *scale = qtr_f16_to_f32(pair[0]), *zero = qtr_f16_to_f32(pair[1]);
    }
    if (format == QTR_KV_INT8_STATIC) *scale = kv->static_scale[is_v];
    for (int i = 0; i < dim; i++) {
      int shift;
      const uint8_t *p = b + qtr_kv_element(format, dim, is_v, slot, i, &shift);
      uint16_t h;
      memcpy(&h, p, format == QTR_KV_F16 ? 2 : 1);
      code[i] = format == QTR_KV_F16 ? h : format == QTR_KV_INT4 ? *p >> shift & 15 : format == QTR_KV_INT8 ? *p : *p - 128;
    }
  }
};

static void bad(const char *what, const char *name, double got, double want, double tolerance, long i, long j) {
  if (failures++ < 20)
    printf("BAD %s %s [%ld, %ld]: %.9g, expected %.9g (tolerance %.3g)\n", name, what, i, j, got, want, tolerance);
}

/* What the step wrote, bit by bit; x: qkv after the step. */
static void check_stored(const cache &c, const step &s, const std::vector<__half> &x, int n_heads, const char *name) {
  int dim = c.config.head_dim, heads = c.config.n_kv_heads, rows = n_heads + 2 * heads, format = c.config.format;
  std::vector<int> code;
  std::vector<float> f(dim);
  std::vector<uint8_t> want(dim);
  for (int t = 0; t < s.n_tokens; t++) {
    int place = s.position[t], page = s.table[(size_t)s.token_seq[t] * s.host.max_blocks + place / 64];
    for (int h = 0; h < 2 * heads; h++) {
      bool is_v = h >= heads;
      for (int i = 0; i < dim; i++) f[i] = __half2float(x[((size_t)t * rows + n_heads + h) * dim + i]);
      float scale, zero;
      c.row(is_v, page, place % 64, h % heads, code, &scale, &zero);
      uint16_t ws = 0, wz = 0;
      if (format == QTR_KV_INT8 || format == QTR_KV_INT4) {
        qtr_kv_quant_row(f.data(), dim, format == QTR_KV_INT8 ? 255 : 15, want.data(), &ws, &wz);
        if (scale != qtr_f16_to_f32(ws)) bad("scale", name, scale, qtr_f16_to_f32(ws), 0, t, h);
        if (zero != qtr_f16_to_f32(wz)) bad("zero", name, zero, qtr_f16_to_f32(wz), 0, t, h);
      }
      for (int i = 0; i < dim; i++) {
        int w = format == QTR_KV_F16           ? qtr_f16_from_f32(qtr_kv_sane(f[i]))
                : format == QTR_KV_INT8_STATIC ? qtr_kv_quant_static(f[i], 1.0f / scale)
                                               : want[i];
        if (code[i] != w) bad("code", name, code[i], w, 0, t, h * 1000 + i);
      }
    }
  }
}

/* Double precision, and how far fp32 sums and weights in fp16 may be from it. */
static void check_results(const cache &c, const step &s, const std::vector<__half> &x, const std::vector<__half> &out,
                          int n_heads, const char *name, double *worst) {
  int dim = c.config.head_dim, kv_heads = c.config.n_kv_heads, rows = n_heads + 2 * kv_heads, group = n_heads / kv_heads;
  int format = c.config.format;
  std::vector<std::thread> threads;
  std::vector<double> worsts(kv_heads * s.host.n_seqs, 0);
  struct err {
    double got, want, tol;
    long i, j;
  };
  std::vector<std::vector<err>> errs(kv_heads * s.host.n_seqs);
  auto work = [&](int seq, int kvh) {
    int n_q = s.q_start[seq + 1] - s.q_start[seq], n_all = s.kv_len[seq] + n_q;
    std::vector<double> k((size_t)n_all * dim), v(k.size()), k_max(n_all), v_max(n_all), v_range(n_all), w(n_all), e(n_all);
    std::vector<int> code;
    for (int t = 0; t < n_all; t++) {
      for (int is_v = 0; is_v < 2; is_v++) {
        float scale, zero;
        c.row(is_v, s.table[(size_t)seq * s.host.max_blocks + t / 64], t % 64, kvh, code, &scale, &zero);
        double m = 0, r = 0;
        for (int i = 0; i < dim; i++) {
          double y = format == QTR_KV_F16
                         ? qtr_f16_to_f32((uint16_t)code[i])
                         : ((double)code[i] - (format == QTR_KV_INT8_STATIC ? 0 : (double)zero)) * (double)scale;
          (is_v ? v : k)[(size_t)t * dim + i] = y;
          m = std::max(m, fabs(y));
          r = std::max(
              r, format == QTR_KV_F16 ? fabs(y) : (code[i] + (format == QTR_KV_INT8_STATIC ? 128 : 0)) * (double)scale);
        }
        (is_v ? v_max : k_max)[t] = m;
        if (is_v) v_range[t] = r;
      }
    }
    double &top = worsts[seq * kv_heads + kvh];
    for (int i = 0; i < n_q; i++) {
      for (int g = 0; g < group; g++) {
        long token = s.q_start[seq] + i, head = kvh * group + g;
        int n = s.kv_len[seq] + i + 1;
        const __half *q = &x[((size_t)token * rows + head) * dim];
        double max = -INFINITY, total = 0, q_abs = 0, mean = 0;
        for (int d = 0; d < dim; d++) q_abs += fabs((double)__half2float(q[d]));
        for (int t = 0; t < n; t++) {
          double dot = 0;
          for (int d = 0; d < dim; d++) dot += (double)__half2float(q[d]) * k[(size_t)t * dim + d];
          w[t] = dot / sqrt((double)dim);
          e[t] = 4 * 0x1p-23 * q_abs * k_max[t] / sqrt((double)dim);
          max = std::max(max, w[t]);
        }
        for (int t = 0; t < n; t++) total += w[t] = exp(w[t] - max);
        double rounding = 0, weights = 0;
        for (int t = 0; t < n; t++) {
          w[t] /= total;
          mean += w[t] * e[t];
          rounding += w[t] * v_max[t];
          weights += w[t] * v_range[t]; /* what is rounded to fp16: w * code * scale */
        }
        for (int d = 0; d < dim; d++) {
          double want = 0, got = __half2float(out[((size_t)token * n_heads + head) * dim + d]);
          for (int t = 0; t < n; t++) want += w[t] * v[(size_t)t * dim + d];
          double tol = 0x1p-23 * (4 + n / 4.0) * rounding + 0x1p-11 * weights + 0x1p-10 * fabs(want) + 0x1p-24;
          for (int t = 0; t < n; t++) tol += w[t] * (e[t] + mean + 8 * 0x1p-23) * fabs(v[(size_t)t * dim + d] - want);
          double error = fabs(got - want);
          if (!(error <= tol)) errs[seq * kv_heads + kvh].push_back({got, want, tol, token, head * 1000 + d});
          top = std::max(top, error / tol);
        }
      }
    }
  };
  for (int seq = 0; seq < s.host.n_seqs; seq++) {
    for (int h = 0; h < kv_heads; h++) threads.emplace_back(work, seq, h);
    if (threads.size() >= 16) {
      for (auto &t : threads) t.join();
      threads.clear();
    }
  }
  for (auto &t : threads) t.join();
  for (auto &list : errs) {
    for (auto &e : list) bad("result", name, e.got, e.want, e.tol, e.i, e.j);
  }
  for (double w : worsts) *worst = std::max(*worst, w);
}

static std::vector<__half> attend(const step &s, const cache &c, const __half *qkv, int n_heads, bool generic,
                                  cudaStream_t stream) {
  size_t n = (size_t)s.n_tokens * n_heads * c.config.head_dim;
  std::vector<__half> out(n + 64);
  __half *d;
  CHECK(cudaMalloc(&d, out.size() * 2));
  CHECK(cudaMemset(d, 0xff, out.size() * 2)); /* NaN */
  struct qtr_attention_args a = {
      qkv, c.kv, d, 1 / sqrtf((float)c.config.head_dim), 0, n_heads, c.config.n_kv_heads, c.config.head_dim};
  if (generic) {
    struct attention_params p;
    qtr_cuda_attention_params(&a, &s.device, s.scratch, &p);
    CHECK(qtr_cuda_attention_generic(&p, c.config.format, stream));
  } else {
    CHECK(qtr_cuda_attention(&a, &s.device, s.plan.data(), s.scratch, NULL, n_sms, stream));
  }
  CHECK(cudaDeviceSynchronize());
  CHECK(cudaMemcpy(out.data(), d, out.size() * 2, cudaMemcpyDeviceToHost));
  CHECK(cudaFree(d));
  for (int i = 0; i < 64; i++) {
    uint16_t bits;
    memcpy(&bits, &out[n + i], 2);
    if (bits != 0xffff) bad("guard", "out", 0, 0, 0, i, 0);
  }
  out.resize(n);
  return out;
}

static void check_shape(int format, int n_heads, int n_kv_heads, int dim, const char *pattern, std::vector<sequence> seqs,
                        bool cpu) {
  char name[128];
  snprintf(name, sizeof name, "%s %d/%dx%d %s", format_names[format], n_heads, n_kv_heads, dim, pattern);
  int n_pages = 0, before = failures;
  for (auto &s : seqs) n_pages += (s.kv_len + s.q_len + 63) / 64;
  n_pages += 3;
  std::vector<int32_t> order(n_pages);
  for (int i = 0; i < n_pages; i++) order[i] = i;
  for (int i = n_pages - 1; i > 0; i--) std::swap(order[i], order[rng_below(i + 1)]);
  int next = 0;
  for (auto &s : seqs) {
    for (int i = 0; i < (s.kv_len + s.q_len + 63) / 64; i++) s.pages.push_back(order[next++]);
  }
  cache c;
  float static_scale[2] = {0.03f, 0.05f};
  c.config = {(enum qtr_kv_format)format, 1, n_kv_heads, dim, n_pages, static_scale};
  struct qtr_error err = {};
  if (qtr_cuda_kv_create(NULL, &c.config, &c.kv, &err) != QTR_OK) printf("%s\n", err.message), exit(2);
  std::vector<float> f(dim / 2);
  for (int i = 0; i < dim / 2; i++) f[i] = powf(10000, -2.0f * i / dim);
  float *inv_freq = device_copy(f);
  std::vector<__half> x;
  for (int phase = 0; phase < 3; phase++) { /* large garbage everywhere, the history, the step */
    std::vector<sequence> now = seqs;
    for (auto &s : now) {
      int n = s.kv_len + s.q_len;
      if (phase == 0) s.q_len = (n + 63) / 64 * 64, s.kv_len = 0;
      if (phase == 1) s.q_len = s.kv_len, s.kv_len = 0;
    }
    step s(now, format, n_heads, n_kv_heads, dim, inv_freq);
    if (s.n_tokens == 0) continue;
    fill_qkv(n_heads, n_kv_heads, dim, s.n_tokens, phase == 0 ? 300 : 1, x);
    std::vector<__half> before_x = x;
    __half *qkv = device_copy(x);
    struct qtr_rope_kv_args r = {qkv, c.kv, 0, n_heads, n_kv_heads, dim};
    CHECK(qtr_cuda_rope_kv_write(&r, &s.device, 0));
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaMemcpy(x.data(), qkv, x.size() * 2, cudaMemcpyDeviceToHost));
    if (phase == 2) {
      int rows = n_heads + 2 * n_kv_heads;
      for (int t = 0; t < s.n_tokens; t++) { /* the rotation itself */
        for (int j = 0; j < rows * dim; j++) {
          int i = j % dim, row = j / dim * dim, half = dim / 2;
          double a = __half2float(before_x[(size_t)t * rows * dim + j]),
                 b = __half2float(before_x[(size_t)t * rows * dim + row + (i + half) % dim]);
          double angle = (double)((float)s.position[t] * f[i % half]);
          double want = j / dim >= n_heads + n_kv_heads ? a
                        : i < half                      ? a * cos(angle) - b * sin(angle)
                                                        : a * cos(angle) + b * sin(angle);
          double got = __half2float(x[(size_t)t * rows * dim + j]);
          if (!(fabs(got - want) <= (0x1p-11 + 0x1p-21) * (fabs(a) + fabs(b)) + 0x1p-25))
            bad("rope", name, got, want, 0, t, j);
        }
      }
      c.download();
      if (cpu) check_stored(c, s, x, n_heads, name);
      std::vector<__half> out = attend(s, c, qkv, n_heads, false, 0), generic = attend(s, c, qkv, n_heads, true, 0);
      double worst = 0, worst_generic = 0, largest = 0, square = 0, squares = 0;
      if (cpu) {
        check_results(c, s, x, out, n_heads, name, &worst);
      }
      if (cpu && qtr_kv_has_fragments(dim) && format == QTR_KV_INT4) {
        char g[160];
        snprintf(g, sizeof g, "generic %s", name);
        check_results(c, s, x, generic, n_heads, g, &worst_generic);
      }
      for (size_t i = 0; i < out.size(); i++) {
        double a = __half2float(out[i]), b = __half2float(generic[i]);
        if (!(fabs(a - b) <= 1e30)) bad("number", name, a, b, 0, (long)i, 0);
        largest = std::max(largest, fabs(a - b)), square += (a - b) * (a - b), squares += b * b;
      }
      if (!(sqrt(square / squares) < 2e-3)) bad("norm", name, sqrt(square / squares), 0, 2e-3, 0, 0);
      int rounds = 0;
      for (size_t i = 0; i < seqs.size(); i++) { /* alone, and in two steps when both are prefill or decode */
        int n = seqs[i].q_len, cuts[2] = {0, n > 3 ? 2 + (int)rng_below(n - 3) : 0};
        for (int cut = 0; cut < (n > 3 ? 2 : 1); cut++) {
          for (int from = 0; from < n;) {
            int to = cuts[cut] > from ? cuts[cut] : n;
            sequence one = seqs[i];
            one.kv_len += from, one.q_len = to - from;
            step alone({one}, format, n_heads, n_kv_heads, dim, NULL);
            size_t first = (size_t)s.q_start[i] + from, row = (size_t)n_heads * dim;
            std::vector<__half> y = attend(alone, c, qkv + first * (n_heads + 2 * n_kv_heads) * dim, n_heads, false, 0);
            if (memcmp(y.data(), out.data() + first * row, y.size() * 2)) bad("alone", name, from, to, 0, (long)i, cut);
            from = to, rounds++;
          }
        }
        if (n > 1) { /* its last token alone, by the kernel of the others */
          sequence one = seqs[i];
          one.kv_len += n - 1, one.q_len = 1;
          step alone({one}, format, n_heads, n_kv_heads, dim, NULL, true);
          size_t at = (size_t)s.q_start[i] + n - 1, row = (size_t)n_heads * dim;
          std::vector<__half> y = attend(alone, c, qkv + at * (n_heads + 2 * n_kv_heads) * dim, n_heads, false, 0);
          if (memcmp(y.data(), out.data() + at * row, y.size() * 2)) bad("one kernel", name, 0, 0, 0, (long)i, 0);
        }
      }
      printf("%-40s %s worst %.3f of tolerance (generic %.3f), against generic: %.2e, %.2e of norm; %d alone\n", name,
             failures == before ? "ok " : "BAD", worst, worst_generic, largest, sqrt(square / squares), rounds);
    }
    CHECK(cudaFree(qkv));
  }
  CHECK(cudaFree(inv_freq));
  qtr_cuda_kv_free(NULL, c.kv);
}

static void check(bool quick) {
  const std::vector<sequence> decode = {{0, 1, {}},   {1, 1, {}},    {63, 1, {}},   {64, 1, {}},   {65, 1, {}},
                                        {200, 1, {}}, {1000, 1, {}}, {2047, 1, {}}, {2048, 1, {}}, {4500, 1, {}}};
  const std::vector<sequence> mixed = {{0, 17, {}}, {1000, 1, {}}, {65, 2, {}},  {200, 31, {}}, {63, 1, {}},
                                       {0, 1, {}},  {64, 100, {}}, {0, 130, {}}, {700, 65, {}}};
  const int shapes[][3] = {{8, 2, 128}, {4, 4, 128}, {8, 1, 128}, {14, 2, 64}, {16, 1, 128},
                           {20, 1, 64}, {3, 1, 8},   {4, 2, 80},  {2, 1, 256}};
  for (auto &s : shapes) {
    for (int format = 0; format < 4; format++) {
      if (!quick || format != 1) check_shape(format, s[0], s[1], s[2], "decode", decode, true);
      check_shape(format, s[0], s[1], s[2], "mixed", mixed, true);
    }
    if (quick) return;
  }
  for (int format : {2, 1, 0, 3}) {
    check_shape(format, 32, 8, 128, "prompts", {{0, 1024, {}}, {0, 512, {}}, {512, 512, {}}, {3000, 300, {}}, {0, 333, {}}},
                false);
    check_shape(format, 64, 8, 128, "long", {{6000, 1, {}}, {3000, 40, {}}, {300, 1, {}}}, false);
    std::vector<sequence> many;
    for (int i = 0; i < 60; i++) many.push_back({(int32_t)rng_below(1000), 1, {}});
    check_shape(format, 32, 8, 128, "decode 60", many, false);
  }
}

/* ---- times --------------------------------------------------------------------------------------- */

__global__ static void k_fill(uint32_t *data, size_t n_words, size_t block_words, size_t code_words, int format,
                              uint32_t seed) {
  for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n_words; i += (size_t)gridDim.x * blockDim.x) {
    uint32_t x = (uint32_t)i * 2654435761u + seed;
    x ^= x >> 15, x *= 2246822519u, x ^= x >> 13, x *= 3266489917u, x ^= x >> 16;
    if (format == QTR_KV_F16) x = (x & 0x83ff83ffu) | 0x38003800u; /* +-0.5 ... 1 */
    if (i % block_words >= code_words)
      x = format == QTR_KV_INT4 ? 0x47803000u + (x & 0x007f00ff) : 0x57f02000u + (x & 0x000f00ff);
    data[i] = x;
  }
}

static double copy_gbs = 1;
static bool profile; /* one launch each, for ncu */
static void time_copy() {
  size_t n = (size_t)1 << 30;
  char *a, *b;
  CHECK(cudaMalloc(&a, n));
  CHECK(cudaMalloc(&b, n));
  CHECK(cudaMemset(a, 1, n));
  cudaEvent_t e[2];
  CHECK(cudaEventCreate(&e[0]));
  CHECK(cudaEventCreate(&e[1]));
  float best = 1e9f;
  for (int i = 0; i < 6; i++) {
    CHECK(cudaEventRecord(e[0]));
    CHECK(cudaMemcpyAsync(b, a, n, cudaMemcpyDeviceToDevice));
    CHECK(cudaEventRecord(e[1]));
    CHECK(cudaDeviceSynchronize());
    float ms;
    CHECK(cudaEventElapsedTime(&ms, e[0], e[1]));
    best = std::min(best, ms);
  }
  copy_gbs = 2.0 * (double)n / best * 1e-6;
  printf("copy: %.0f GB/s (read + written)\n", copy_gbs);
  CHECK(cudaFree(a));
  CHECK(cudaFree(b));
}

/* what: 0 attention, 1 RoPE and KV write */
static double time_shape(int format, int n_heads, int n_kv_heads, int dim, std::vector<sequence> seqs, int what,
                         const char *label) {
  cudaStream_t stream;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  int n_pages = 0;
  for (auto &s : seqs) n_pages += (s.kv_len + s.q_len + 63) / 64;
  std::vector<int32_t> order(n_pages);
  for (int i = 0; i < n_pages; i++) order[i] = i;
  for (int i = n_pages - 1; i > 0; i--) std::swap(order[i], order[rng_below(i + 1)]);
  int next = 0;
  double kv_tokens = 0, pairs = 0, n_tokens = 0;
  for (auto &s : seqs) {
    for (int i = 0; i < (s.kv_len + s.q_len + 63) / 64; i++) s.pages.push_back(order[next++]);
    kv_tokens += s.kv_len + s.q_len;
    n_tokens += s.q_len;
    pairs += (double)s.q_len * s.kv_len + 0.5 * (double)s.q_len * (s.q_len + 1);
  }
  float static_scale[256];
  for (float &x : static_scale) x = 0.01f;
  struct qtr_kv_config config = {(enum qtr_kv_format)format, 1, n_kv_heads, dim, n_pages, static_scale};
  double layer_bytes = (double)qtr_kv_page_bytes(&config) * n_pages;
  config.n_layers = std::max(1, std::min(96, (int)(4e8 / layer_bytes) + 1));
  struct qtr_kv *kv;
  struct qtr_error err = {};
  if (qtr_cuda_kv_create(NULL, &config, &kv, &err) != QTR_OK) printf("%s\n", err.message), exit(2);
  size_t words = ((size_t)n_pages + 1) * kv->head[0].page_bytes / 4 * 2 * (size_t)config.n_layers;
  k_fill<<<1024, 256, 0, stream>>>((uint32_t *)kv->data, words, qtr_kv_block_bytes(format, dim) / 4,
                                   qtr_kv_code_bytes(format, dim) / 4, format, (uint32_t)rng_next());
  std::vector<float> f(dim / 2, 0.01f);
  float *inv_freq = device_copy(f);
  CHECK(cudaStreamSynchronize(stream));
  step s(seqs, format, n_heads, n_kv_heads, dim, inv_freq);
  std::vector<__half> x((size_t)s.n_tokens * (n_heads + 2 * n_kv_heads) * dim);
  std::vector<__half> some(65536);
  for (auto &y : some) y = __float2half(rng_normal());
  for (size_t i = 0; i < x.size(); i++) x[i] = some[(i * 7 + i / 65521) % 65536];
  __half *qkv = device_copy(x), *out;
  CHECK(cudaMalloc(&out, (size_t)s.n_tokens * n_heads * dim * 2));
  CHECK(cudaDeviceSynchronize());
  int reps = std::max(config.n_layers, pairs > 1e8 ? 1 : n_tokens > 1000 ? 8 : 24);
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  if (profile) reps = 1;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < reps; i++) {
    struct qtr_attention_args a = {qkv, kv, out, 1 / sqrtf((float)dim), i % config.n_layers, n_heads, n_kv_heads, dim};
    struct qtr_rope_kv_args r = {qkv, kv, i % config.n_layers, n_heads, n_kv_heads, dim};
    if (what == 0) CHECK(qtr_cuda_attention(&a, &s.device, s.plan.data(), s.scratch, NULL, n_sms, stream));
    if (what == 1) CHECK(qtr_cuda_rope_kv_write(&r, &s.device, stream));
  }
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&exec, graph, 0));
  double us = graph_median_us(exec, stream, reps, profile ? 1 : pairs > 1e8 ? 3 : 7);
  double bytes = kv_tokens * (layer_bytes / n_pages / 64) + n_tokens * n_heads * dim * 4.0,
         flops = 4.0 * dim * n_heads * pairs;
  if (what == 1)
    bytes = n_tokens * ((n_heads + n_kv_heads) * dim * 4.0 + n_kv_heads * dim * 2.0 + layer_bytes / n_pages / 64);
  printf("%-10s %2d/%-2d x%-3d %-26s %9.2f us  %7.0f GB/s %3.0f %%", format_names[format], n_heads, n_kv_heads, dim, label,
         us, bytes / us * 1e-3, 100 * bytes / us * 1e-3 / copy_gbs);
  if (what == 0 && n_tokens > (double)seqs.size()) printf("  %6.0f TFLOP/s", flops / us * 1e-6);
  printf("\n");
  fflush(stdout);
  CHECK(cudaGraphExecDestroy(exec));
  CHECK(cudaGraphDestroy(graph));
  CHECK(cudaFree(qkv));
  CHECK(cudaFree(out));
  CHECK(cudaFree(inv_freq));
  qtr_cuda_kv_free(NULL, kv);
  CHECK(cudaStreamDestroy(stream));
  return us;
}

static std::vector<sequence> same(int n, int kv_len, int q_len) {
  return std::vector<sequence>((size_t)n, sequence{kv_len, q_len, {}});
}

static void time_decode() {
  for (int format : {2, 1, 0, 3}) time_shape(format, 32, 8, 128, same(256, 1123, 1), 0, "256 x 1124");
  double t[3];
  for (int format : {2, 1, 0}) t[format] = time_shape(format, 32, 8, 128, same(64, 4095, 1), 0, "64 x 4096");
  printf("  kv4 is %.2f times as fast as kv8, %.2f as kv16\n", t[1] / t[2], t[0] / t[2]);
  time_shape(2, 32, 32, 128, same(64, 1123, 1), 0, "64 x 1124");
  time_shape(2, 32, 32, 128, same(190, 1123, 1), 0, "190 x 1124");
  time_shape(2, 64, 8, 128, same(64, 1123, 1), 0, "64 x 1124");
  time_shape(2, 64, 8, 128, same(256, 1123, 1), 0, "256 x 1124");
  time_shape(2, 32, 8, 64, same(256, 1123, 1), 0, "256 x 1124");
  time_shape(2, 32, 8, 128, same(512, 255, 1), 0, "512 x 256");
  std::vector<sequence> ragged;
  for (int i = 0; i < 128; i++) ragged.push_back({(int32_t)rng_below(i % 8 ? 1500 : 8000), 1, {}});
  time_shape(2, 32, 8, 128, ragged, 0, "128 ragged to 8000");
  for (int n : {128, 1024, 4096, 16384, 32768, 131072}) {
    char label[32];
    snprintf(label, sizeof label, "1 x %d", n);
    time_shape(2, 32, 8, 128, same(1, n - 1, 1), 0, label);
  }
  time_shape(2, 32, 8, 128, same(8, 1123, 1), 0, "8 x 1124");
  time_shape(2, 32, 8, 128, same(32, 1123, 1), 0, "32 x 1124");
  time_shape(2, 32, 8, 128, same(256, 1123, 1), 1, "256 x 1124 rope + write");
}

static void time_prefill() {
  for (int format : {2, 0, 1}) {
    time_shape(format, 32, 8, 128, same(8, 0, 1024), 0, "8 x 1024");
    if (format == 2) time_shape(format, 32, 8, 128, same(2, 0, 1024), 0, "2 x 1024");
    if (format == 2) time_shape(format, 32, 8, 128, same(4, 0, 2048), 0, "4 x 2048");
    time_shape(format, 32, 8, 128, same(2, 0, 8192), 0, "2 x 8192");
    time_shape(format, 32, 8, 128, same(1, 0, 32768), 0, "1 x 32768");
    if (format == 2) time_shape(format, 32, 8, 128, same(1, 30720, 2048), 0, "2048 after 30720");
  }
  time_shape(2, 32, 32, 128, same(8, 0, 1024), 0, "8 x 1024");
  time_shape(2, 32, 8, 64, same(8, 0, 1024), 0, "8 x 1024");
  time_shape(2, 32, 8, 128, same(8, 0, 1024), 1, "8 x 1024 rope + write");
}

int main(int argc, char **argv) {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  n_sms = device.multiProcessorCount;
  printf("%s, %d SMs\n", device.name, n_sms);
  rng_state = argc > 2 ? strtoull(argv[2], NULL, 0) : 12345;
  const char *what = argc > 1 ? argv[1] : "check";
  if (!strcmp(what, "sanitize")) { /* little work, all kernels: for compute-sanitizer */
    for (int format = 0; format < 4; format++) {
      check_shape(format, 4, 1, 128, "few", {{65, 1, {}}, {1600, 1, {}}, {0, 70, {}}, {130, 3, {}}}, false);
      check_shape(format, 12, 1, 64, "few", {{65, 1, {}}, {1600, 1, {}}, {0, 70, {}}, {130, 3, {}}}, false);
    }
    check_shape(2, 3, 1, 10, "few", {{65, 1, {}}, {0, 70, {}}}, false);
    printf("%d failures\n", failures);
    return failures ? 1 : 0;
  }
  if (!strcmp(what, "check") || !strcmp(what, "quick")) {
    check(!strcmp(what, "quick"));
    printf("%d failures\n", failures);
    return failures ? 1 : 0;
  }
  if (!strcmp(what, "profile")) {
    profile = true;
    time_shape(2, 32, 8, 128, same(1, 0, 8192), 0, "1 x 8192");
    time_shape(0, 32, 8, 128, same(1, 0, 8192), 0, "1 x 8192");
    time_shape(2, 32, 8, 128, same(256, 1123, 1), 0, "256 x 1124");
    return 0;
  }
  time_copy();
  if (!strcmp(what, "decode")) time_decode();
  if (!strcmp(what, "prefill")) time_prefill();
  return 0;
}
