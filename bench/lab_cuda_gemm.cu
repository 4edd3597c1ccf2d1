/* lab_cuda_gemm.cu - laboratory of src/backend/cuda/gemm*.cu: checks against exact sums on the host, then times.
 *
 *   nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -Isrc -Iinclude bench/lab_cuda_gemm.cu \
 *        src/backend/cuda/gemm*.cu src/backend/cuda/rows.cu
 *   ./a.out [rows] [dependent] check | check80 | small | quant | time TOKENS ... | time80 TOKENS ... | timequant TOKENS ...
 *           | sweep FORMAT TOKENS N ...
 *
 * check: every format, epilogue, many shapes and token counts; poisoned outputs, fresh inputs, guard bytes, the same bits
 * twice and alone. time: the four Llama-3-8B shapes with the plan of gemm.cu. sweep: other plans beside it. Times are
 * medians of graph replays over weight copies that exceed L2. quant, timequant: products that make their activations
 * themselves against those behind a kernel of rows.cu, bits and times. bench/NOTES.md has versions, predictions, outcomes.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <algorithm>
#include <vector>

#include "backend/cuda/gemm_internal.h"
#include "backend/cuda/rows.h"
#include "checkpoint/packing.h"
#include "lab.cuh"

static uint64_t seed = 88172645463325252ull;
static uint64_t draw(void) {
  seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
  return seed;
}
static float uniform(float low, float high) { return low + (high - low) * (float)(draw() >> 40) * 0x1p-24f; }

static const char *format_name(int f) { return f == QTR_LINEAR_W8A8 ? "w8a8" : f == QTR_LINEAR_W4A8 ? "w4a8" : "g128"; }

template <class T>
static T *to_device(const std::vector<T> &v) {
  T *d;
  CHECK(cudaMalloc(&d, v.size() * sizeof(T) + 16));
  CHECK(cudaMemcpy(d, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
  return d;
}

struct part_data {
  size_t n_out;
  std::vector<uint8_t> weight, s2, z;
  std::vector<float> scale, szero, bias;
};

struct matrix {
  enum qtr_linear_format format;
  size_t n_in, n_out;
  std::vector<part_data> part;
  struct qtr_cuda_matrix m;
};

/* Random parts on the host, repacked on the device. */
static struct matrix matrix_make(enum qtr_cuda_path path, enum qtr_linear_format format, size_t n_in,
                                 std::vector<size_t> rows, bool gate_up, bool bias) {
  struct matrix w;
  w.format = format, w.n_in = n_in, w.n_out = 0;
  for (size_t n : rows) {
    struct part_data p;
    p.n_out = n;
    p.weight.resize(format == QTR_LINEAR_W8A8 ? n * n_in : n * n_in / 2);
    for (size_t i = 0; i < p.weight.size(); i++) p.weight[i] = (uint8_t)(draw() >> 32);
    for (size_t i = 0; i < n; i++) {
      float s = uniform(0.5f, 1.5f) / sqrtf((float)n_in) / (format == QTR_LINEAR_W4A8 ? 8.0f : 64.0f);
      p.scale.push_back(s);
      p.szero.push_back(uniform(0, 15) * s);
      p.bias.push_back(uniform(-1, 1));
    }
    if (format == QTR_LINEAR_W4A8_G128) {
      for (size_t i = 0; i < n * (n_in / 128); i++) {
        int s2 = 1 + (int)(draw() >> 33) % 16, low = std::max(0, 15 * s2 - 127);
        int zs = low + (int)(draw() >> 33) % (129 - low);
        p.s2.push_back((uint8_t)s2);
        p.z.push_back((uint8_t)(256 - zs));
      }
    }
    w.n_out += n;
    w.part.push_back(p);
  }
  size_t padded = qtr_cuda_matrix_padded_rows(path, w.n_out);
  struct qtr_cuda_matrix *m = &w.m;
  memset(m, 0, sizeof *m);
  m->path = path, m->format = format, m->gate_up = gate_up, m->n_out = w.n_out, m->n_in = n_in;
  CHECK(cudaMalloc(&m->code, qtr_cuda_matrix_code_bytes(path, format, w.n_out, n_in)));
  CHECK(cudaMalloc(&m->scale, padded * 4));
  if (format == QTR_LINEAR_W4A8) CHECK(cudaMalloc(&m->szero, padded * 4));
  if (bias) CHECK(cudaMalloc(&m->bias, padded * 4));
  CHECK(qtr_cuda_matrix_clear(m, 0));
  size_t first = 0;
  for (struct part_data &p : w.part) {
    struct qtr_cuda_part d = {};
    d.n_out = p.n_out, d.first_row = first;
    d.weight = to_device(p.weight);
    d.scale = to_device(p.scale), d.szero = to_device(p.szero), d.bias = bias ? to_device(p.bias) : NULL;
    if (format == QTR_LINEAR_W4A8_G128) d.s2_scale = to_device(p.s2), d.s2_zero = to_device(p.z);
    CHECK(qtr_cuda_matrix_repack(m, &d, 0));
    CHECK(cudaDeviceSynchronize());
    cudaFree((void *)d.weight), cudaFree((void *)d.scale), cudaFree((void *)d.szero), cudaFree((void *)d.bias);
    cudaFree((void *)d.s2_scale), cudaFree((void *)d.s2_zero);
    first += p.n_out;
  }
  return w;
}
static void matrix_free(struct matrix *w) {
  cudaFree(w->m.code), cudaFree(w->m.scale), cudaFree(w->m.szero), cudaFree(w->m.bias);
}

static int weight_at(const struct matrix *w, size_t row, size_t k, const struct part_data **part, size_t *r) {
  size_t i = 0;
  while (row >= w->part[i].n_out) row -= w->part[i++].n_out;
  const struct part_data *p = &w->part[i];
  *part = p, *r = row;
  if (w->format == QTR_LINEAR_W8A8) return (int8_t)p->weight[row * w->n_in + k];
  unsigned q = qtr_w4_get(p->weight.data(), w->n_in, row, k);
  if (w->format == QTR_LINEAR_W4A8) return (int)q;
  size_t at = k / 128 * p->n_out + qtr_s2_position(row);
  return (int8_t)(uint8_t)(q * p->s2[at] + p->z[at]);
}

static bool more_rows; /* x has rows past the last token, of anything */
struct tokens {
  size_t n, stride, rows;
  std::vector<int8_t> x;
  std::vector<float> scale, sum;
  int8_t *d_x;
  float *d_scale, *d_sum;
};
static struct tokens tokens_make(size_t n, size_t n_in) {
  struct tokens t;
  t.n = n, t.stride = (n_in + 127) / 128 * 128;
  t.rows = more_rows ? (n + 255) / 256 * 256 : 0;
  t.x.assign(std::max(n, t.rows) * t.stride, 0);
  for (size_t i = n * t.stride; i < t.x.size(); i++) t.x[i] = (int8_t)(draw() >> 32);
  for (size_t i = 0; i < n; i++) {
    for (size_t k = 0; k < n_in; k++) t.x[i * t.stride + k] = (int8_t)(draw() >> 32);
    t.scale.push_back(uniform(0.005f, 0.02f));
    t.sum.push_back(uniform(-20, 20));
  }
  t.d_x = to_device(t.x), t.d_scale = to_device(t.scale), t.d_sum = to_device(t.sum);
  return t;
}
static void tokens_free(struct tokens *t) { cudaFree(t->d_x), cudaFree(t->d_scale), cudaFree(t->d_sum); }

/* y and the magnitude that bounds its rounding error. */
static double linear_value(const struct matrix *w, const struct tokens *t, size_t token, size_t row, double *size) {
  const struct part_data *p = NULL;
  size_t r = 0;
  int64_t acc = 0;
  for (size_t k = 0; k < w->n_in; k++) acc += (int64_t)weight_at(w, row, k, &p, &r) * t->x[token * t->stride + k];
  double y = (double)acc * p->scale[r] * t->scale[token], zero = 0, b = w->m.bias ? p->bias[r] : 0;
  if (w->format == QTR_LINEAR_W4A8) zero = (double)p->szero[r] * t->sum[token];
  *size = fabs(y) + fabs(zero) + fabs(b);
  return y - zero + b;
}

static bool dependent; /* launches overlap the end of those before them */
static cudaStream_t stream;
static int n_bad;

static bool check_one(enum qtr_cuda_path path, enum qtr_linear_format format, size_t n_in, std::vector<size_t> rows,
                      enum qtr_epilogue epilogue, bool bias, std::vector<size_t> counts, const struct qtr_gemm_plan *plan) {
  bool silu = epilogue == QTR_EPILOGUE_SILU_MUL, logits = epilogue == QTR_EPILOGUE_LOGITS, all_good = true;
  struct matrix w = matrix_make(path, format, n_in, rows, silu, bias);
  size_t n_out = silu ? w.n_out / 2 : w.n_out, size = logits ? 4 : 2;
  for (size_t n : counts) {
    struct tokens t = tokens_make(n, n_in);
    std::vector<uint8_t> before(n * n_out * size + 256, 0xff), after(before.size()), again(before.size());
    if (epilogue == QTR_EPILOGUE_ADD) {
      for (size_t i = 0; i < n * n_out; i++) {
        __half h = __float2half_rn(uniform(-4, 4));
        memcpy(&before[i * 2], &h, 2);
      }
    }
    uint8_t *out;
    CHECK(cudaMalloc(&out, before.size()));
    struct qtr_cuda_gemm_args a = {&w.m, NULL, t.d_x, t.d_scale, t.d_sum, t.stride, t.rows, epilogue, out, n, dependent};
    for (int run = 0; run < 2; run++) {
      CHECK(cudaMemcpy(out, before.data(), before.size(), cudaMemcpyHostToDevice));
      cudaError_t e = plan ? qtr_cuda_gemm_planned(&a, plan, 0) : qtr_cuda_gemm(&a, 0);
      if (e != cudaSuccess) printf("launch: %s\n", cudaGetErrorString(e));
      CHECK(e);
      CHECK(cudaDeviceSynchronize());
      CHECK(cudaMemcpy((run ? again : after).data(), out, before.size(), cudaMemcpyDeviceToHost));
    }
    size_t wrong = 0, unwritten = 0, checked = 0, first_token = 0, first_row = 0;
    double worst = 0;
    bool full = (double)n * (double)w.n_out * (double)n_in < 4e6;
    for (size_t i = 0; i < n * n_out; i++) {
      float got;
      if (logits) {
        memcpy(&got, &after[i * 4], 4);
      } else {
        __half h;
        memcpy(&h, &after[i * 2], 2);
        got = __half2float(h);
      }
      if (isnan(got)) unwritten++;
      if (!full && draw() % (n * n_out) > 2000000 / n_in) continue;
      size_t token = i / n_out, row = i % n_out;
      double mag = 0, y = linear_value(&w, &t, token, row, &mag), tolerance = 1e-6 * mag;
      if (silu) {
        double mag_up = 0, up = linear_value(&w, &t, token, row + n_out, &mag_up), s = y / (1 + exp(-y));
        tolerance = 1e-6 * (mag * fabs(up) * 1.2 + mag_up * fabs(s)) + 4e-6 * fabs(s * up);
        y = s * up;
      }
      if (epilogue == QTR_EPILOGUE_ADD) {
        __half h;
        memcpy(&h, &before[i * 2], 2);
        tolerance += fabs(y) * 0x1.01p-11;
        y += (double)__half2float(h);
      }
      if (!logits) tolerance += fabs(y) * 0x1.01p-11 + 0x1p-25;
      double error = fabs((double)got - y);
      checked++;
      if (tolerance > 0) worst = std::max(worst, error / tolerance);
      if (!(error <= tolerance)) {
        if (!wrong++) first_token = token, first_row = row;
      }
    }
    bool same = after == again, guard = true;
    for (size_t i = n * n_out * size; i < after.size(); i++) guard = guard && after[i] == 0xff;
    /* The last token alone gives the same bits. */
    struct qtr_cuda_gemm_args one = a;
    one.x_rows = 0, one.x = t.d_x + (n - 1) * t.stride, one.x_scale = t.d_scale + n - 1, one.x_sum = t.d_sum + n - 1,
    one.n_tokens = 1;
    CHECK(cudaMemcpy(out, before.data() + (n - 1) * n_out * size, n_out * size, cudaMemcpyHostToDevice));
    CHECK(qtr_cuda_gemm(&one, 0));
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaMemcpy(again.data(), out, n_out * size, cudaMemcpyDeviceToHost));
    bool alone = memcmp(again.data(), after.data() + (n - 1) * n_out * size, n_out * size) == 0;
    bool good = !wrong && !unwritten && same && guard && alone;
    all_good = all_good && good;
    if (!good) {
      n_bad++;
      printf(
          "BAD %s %zux%zu epilogue %d tokens %zu: wrong %zu of %zu (first token %zu row %zu), worst %.2f of the tolerance, "
          "unwritten %zu, "
          "same twice %d, guard %d, alone %d\n",
          format_name(format), w.n_out, n_in, (int)epilogue, n, wrong, checked, first_token, first_row, worst, unwritten,
          same, guard, alone);
    }
    cudaFree(out);
    tokens_free(&t);
  }
  matrix_free(&w);
  return all_good;
}

static void check_path(enum qtr_cuda_path path) {
  const enum qtr_linear_format formats[] = {QTR_LINEAR_W4A8, QTR_LINEAR_W4A8_G128, QTR_LINEAR_W8A8};
  const std::vector<size_t> few = {1, 3, 8, 9, 17, 33, 64, 100, 129, 256, 257, 300, 513};
  const std::vector<size_t> some = {1, 5, 40, 128, 200, 700};
  for (enum qtr_linear_format f : formats) {
    int bad = n_bad;
    size_t odd = f == QTR_LINEAR_W4A8 ? 96 : f == QTR_LINEAR_W8A8 ? 77 : 384, n = f == QTR_LINEAR_W8A8 ? 37 : 32;
    check_one(path, f, 256, {256}, QTR_EPILOGUE_STORE, false, few, NULL);
    check_one(path, f, odd, {n, n, 2 * n}, QTR_EPILOGUE_STORE, true, few, NULL);
    check_one(path, f, 640, {160}, QTR_EPILOGUE_ADD, false, few, NULL);
    check_one(path, f, odd, {n}, QTR_EPILOGUE_ADD, true, few, NULL);
    check_one(path, f, 512, {n * 3, n * 3}, QTR_EPILOGUE_SILU_MUL, true, few, NULL);
    check_one(path, f, 256, {256, 256}, QTR_EPILOGUE_SILU_MUL, false, few, NULL);
    check_one(path, f, odd, {n * 9}, QTR_EPILOGUE_LOGITS, true, some, NULL);
    check_one(path, f, 4096, {4096, 1024, 1024}, QTR_EPILOGUE_STORE, false, some, NULL);
    check_one(path, f, 14336, {4096}, QTR_EPILOGUE_ADD, false, some, NULL);
    check_one(path, f, 4096, {14336, 14336}, QTR_EPILOGUE_SILU_MUL, false, some, NULL);
    check_one(path, f, 2048, {512}, QTR_EPILOGUE_STORE, true, {20000}, NULL);
    printf("check %s %s: %s\n", path == QTR_CUDA_SM90 ? "sm90" : "sm80", format_name(f), n_bad == bad ? "good" : "BAD");
  }
}

static const int variants[][4] = {{8, 128, 1, 1},   {8, 64, 1, 1},    {16, 128, 1, 1},  {16, 64, 1, 1},
                                  {32, 128, 1, 1},  {32, 64, 1, 1},   {64, 128, 1, 1},  {64, 128, 1, 2},
                                  {64, 64, 1, 1},   {128, 128, 1, 1}, {128, 128, 1, 2}, {256, 128, 1, 1},
                                  {256, 128, 2, 1}, {96, 128, 1, 1},  {96, 128, 1, 2},  {192, 128, 1, 1}};

/* Forced plans: every tile, cut and whole, single and paired. */
static void check_plans(int n_sms) {
  int bad = n_bad;
  for (int f = QTR_LINEAR_W8A8; f <= QTR_LINEAR_W4A8_G128; f++) {
    for (auto &v : variants) {
      struct qtr_gemm_plan plan = {v[0], v[1], v[2], v[3], 3, n_sms};
      check_one(QTR_CUDA_SM90, (enum qtr_linear_format)f, 1152, {160, 800}, QTR_EPILOGUE_STORE, true, {1, 70, 600}, &plan);
      check_one(QTR_CUDA_SM90, (enum qtr_linear_format)f, 1152, {480, 480}, QTR_EPILOGUE_SILU_MUL, true, {7, 300}, &plan);
    }
  }
  printf("check plans: %s\n", n_bad == bad ? "good" : "BAD");
}

/* Disk order to fragments is one thing, marking bad groups another. */
static void check_groups(void) {
  size_t n_out = 64, n_in = 256;
  std::vector<uint8_t> weight(n_out * n_in / 2), s2(n_out * 2), z(n_out * 2);
  int32_t want = 0, got = 0, *count;
  for (uint8_t &b : weight) b = (uint8_t)(draw() >> 32);
  for (size_t i = 0; i < s2.size(); i++) s2[i] = (uint8_t)(draw() >> 32) % 24, z[i] = (uint8_t)(draw() >> 40);
  std::vector<int8_t> expanded(n_out * n_in), expect(n_out * n_in);
  for (size_t row = 0; row < n_out; row++) {
    for (size_t g = 0; g < 2; g++) {
      bool bad = false;
      for (size_t k = g * 128; k < g * 128 + 128; k++) {
        size_t at = g * n_out + qtr_s2_position(row);
        int q = (int)qtr_w4_get(weight.data(), n_in, row, k), plain = q * s2[at] - (256 - z[at]) % 256;
        expect[row * n_in + k] = (int8_t)(uint8_t)(q * s2[at] + z[at]);
        bad = bad || plain != expect[row * n_in + k];
      }
      want += bad;
    }
  }
  struct qtr_cuda_part part = {};
  part.n_out = n_out, part.weight = to_device(weight), part.s2_scale = to_device(s2), part.s2_zero = to_device(z);
  int8_t *out;
  CHECK(cudaMalloc(&count, 4));
  CHECK(cudaMalloc(&out, expanded.size()));
  CHECK(cudaMemset(count, 0, 4));
  CHECK(qtr_cuda_g128_count_bad(&part, n_in, count, 0));
  CHECK(qtr_cuda_g128_expand(&part, n_in, out, 0));
  CHECK(cudaMemcpy(&got, count, 4, cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(expanded.data(), out, expanded.size(), cudaMemcpyDeviceToHost));
  bool good = got == want && expanded == expect;
  n_bad += !good;
  printf("check groups: %s (%d bad groups of %zu)\n", good ? "good" : "BAD", got, s2.size());
}

/* A kernel that lets the next one start and only then, late, copies: a dependent product must wait for what it reads (x) and
 * must not write out before it has been read. */
static __global__ void k_late_copy(uint8_t *to, const uint8_t *from, size_t n) {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  for (long long start = clock64(); clock64() - start < 60000;) continue;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) to[i] = from[i];
}

static void check_dependent(int n_sms) {
  int bad = n_bad;
  for (auto &v : variants) {
    struct qtr_gemm_plan plan = {v[0], v[1], v[2], v[3], 8, n_sms};
    size_t n = (size_t)v[0], bytes = n * 512 * 2;
    struct matrix w = matrix_make(QTR_CUDA_SM90, QTR_LINEAR_W4A8, 2048, {512}, false, false);
    struct tokens right = tokens_make(n, 2048), wrong = tokens_make(n, 2048);
    std::vector<uint8_t> got(bytes), want(bytes), saved(bytes);
    uint8_t *out, *copy;
    CHECK(cudaMalloc(&out, bytes));
    CHECK(cudaMalloc(&copy, bytes));
    struct qtr_cuda_gemm_args a = {&w.m, NULL, right.d_x, right.d_scale, right.d_sum, right.stride, 0, QTR_EPILOGUE_STORE,
                                   out,  n,    false};
    CHECK(qtr_cuda_gemm_planned(&a, &plan, stream));
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaMemcpy(want.data(), out, bytes, cudaMemcpyDeviceToHost));
    CHECK(cudaMemset(out, 0x5a, bytes));
    CHECK(cudaDeviceSynchronize());
    a.x = wrong.d_x, a.dependent = true; /* becomes the right one late */
    k_late_copy<<<8, 256, 0, stream>>>((uint8_t *)wrong.d_x, (const uint8_t *)right.d_x, n * right.stride);
    CHECK(qtr_cuda_gemm_planned(&a, &plan, stream));
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaMemcpy(got.data(), out, bytes, cudaMemcpyDeviceToHost));
    CHECK(cudaMemset(out, 0x5a, bytes));
    CHECK(cudaDeviceSynchronize());
    k_late_copy<<<8, 256, 0, stream>>>(copy, out, bytes);
    CHECK(qtr_cuda_gemm_planned(&a, &plan, stream));
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaMemcpy(saved.data(), copy, bytes, cudaMemcpyDeviceToHost));
    bool intact = std::all_of(saved.begin(), saved.end(), [](uint8_t b) { return b == 0x5a; });
    if (got != want || !intact)
      n_bad++, printf("BAD dependent n %d rows %d: reads %d, writes %d\n", v[0], v[1], got == want, intact);
    cudaFree(out), cudaFree(copy);
    tokens_free(&right), tokens_free(&wrong), matrix_free(&w);
  }
  printf("check dependent: %s\n", n_bad == bad ? "good" : "BAD");
}

/* Rows of fp16 and what a kernel of rows.cu makes of them. */
struct row_data {
  __half *x, *weight; /* weight NULL: no norm */
  struct qtr_cuda_rows_out made;
};
static struct row_data rows_make(size_t n, size_t n_in, bool norm) {
  struct row_data r = {};
  std::vector<__half> x(n * n_in), weight(n_in);
  for (size_t i = 0; i < n * n_in; i++) x[i] = __float2half_rn(uniform(-2, 2) * (draw() >> 60 ? 1.0f : 20.0f));
  for (__half &h : weight) h = __float2half_rn(uniform(0.2f, 2));
  r.x = to_device(x), r.weight = norm ? to_device(weight) : NULL;
  r.made.stride = (n_in + 127) / 128 * 128;
  r.made.code = to_device(std::vector<int8_t>(n * r.made.stride, 0x55));
  r.made.scale = to_device(std::vector<float>(n, NAN)), r.made.sum = to_device(std::vector<float>(n, NAN));
  return r;
}
static cudaError_t rows_run(const struct row_data *r, size_t n, size_t n_in, cudaStream_t to) {
  return r->weight ? qtr_cuda_rows_norm_quant(r->x, r->weight, 1e-5f, false, n, n_in, &r->made, to)
                   : qtr_cuda_rows_quant(r->x, n, n_in, &r->made, to);
}
static void rows_free(struct row_data *r) {
  cudaFree(r->x), cudaFree(r->weight), cudaFree(r->made.code), cudaFree(r->made.scale), cudaFree(r->made.sum);
}
/* A product of r's rows: behind their kernel, or on its own. */
static cudaError_t rows_product(const struct matrix *w, const struct qtr_cuda_matrix *m, const struct row_data *r, size_t n,
                                enum qtr_epilogue epilogue, void *out, const struct qtr_gemm_plan *plan, bool own,
                                cudaStream_t to) {
  const struct qtr_cuda_gemm_rows rows = {r->x, r->weight, 1e-5f};
  struct qtr_cuda_gemm_args a = {
      m, own ? &rows : NULL, r->made.code, r->made.scale, r->made.sum, r->made.stride, 0, epilogue, out, n, true};
  cudaError_t e = own ? cudaSuccess : rows_run(r, n, w->n_in, to);
  return e == cudaSuccess ? qtr_cuda_gemm_planned(&a, plan, to) : e;
}

/* Own activations: the same bits, also where the rows change late, in the kernel before. */
static void check_quant(int n_sms) {
  static const struct {
    size_t n_out, n_in;
    enum qtr_epilogue epilogue;
  } cases[] = {{160, 256, QTR_EPILOGUE_STORE},   {320, 640, QTR_EPILOGUE_ADD},         {960, 1152, QTR_EPILOGUE_SILU_MUL},
               {288, 384, QTR_EPILOGUE_LOGITS},  {6144, 4096, QTR_EPILOGUE_STORE},     {4096, 14336, QTR_EPILOGUE_ADD},
               {2048, 2048, QTR_EPILOGUE_STORE}, {28672, 4096, QTR_EPILOGUE_SILU_MUL}, {4096, 11008, QTR_EPILOGUE_ADD},
               {1024, 8192, QTR_EPILOGUE_STORE}, {96, 200, QTR_EPILOGUE_STORE},        {20032, 1024, QTR_EPILOGUE_LOGITS}};
  int bad = n_bad, n_done = 0, n_refused = 0;
  for (auto &c : cases) {
    for (int f = QTR_LINEAR_W8A8; f <= QTR_LINEAR_W4A8_G128; f++) {
      if (f != QTR_LINEAR_W8A8 && c.n_in % (f == QTR_LINEAR_W4A8 ? 32 : 128)) continue;
      bool silu = c.epilogue == QTR_EPILOGUE_SILU_MUL;
      struct matrix w =
          matrix_make(QTR_CUDA_SM90, (enum qtr_linear_format)f, c.n_in,
                      silu ? std::vector<size_t>{c.n_out / 2, c.n_out / 2} : std::vector<size_t>{c.n_out}, silu, true);
      for (int rows : {64, 128}) {
        for (size_t n : {1, 2, 8}) {
          struct qtr_gemm_plan plan = {8, rows, 1, 1, 8, n_sms};
          if (!qtr_gemm_quantises_sm90((enum qtr_linear_format)f, &plan, (c.n_in + 127) / 128)) {
            n_refused++;
            continue;
          }
          for (bool norm : {false, true}) {
            struct row_data r = rows_make(n, c.n_in, norm), late = rows_make(n, c.n_in, norm);
            size_t bytes = n * c.n_out * 4;
            std::vector<uint8_t> want(bytes), got(bytes), again(bytes);
            uint8_t *out;
            CHECK(cudaMalloc(&out, bytes));
            for (int run = 0; run < 3; run++) {
              CHECK(cudaMemset(out, 0x11, bytes));
              CHECK(cudaDeviceSynchronize());
              if (run == 2) {
                if (late.weight) CHECK(cudaMemcpy(late.weight, r.weight, c.n_in * 2, cudaMemcpyDeviceToDevice));
                CHECK(cudaDeviceSynchronize());
                k_late_copy<<<8, 256, 0, stream>>>((uint8_t *)late.x, (const uint8_t *)r.x, n * c.n_in * 2);
              }
              CHECK(rows_product(&w, &w.m, run == 2 ? &late : &r, n, c.epilogue, out, &plan, run > 0, stream));
              CHECK(cudaStreamSynchronize(stream));
              CHECK(cudaMemcpy((run == 0 ? want : run == 1 ? got : again).data(), out, bytes, cudaMemcpyDeviceToHost));
            }
            n_done++;
            if (want != got || want != again) {
              size_t differ = 0;
              for (size_t i = 0; i < bytes; i++) differ += want[i] != got[i];
              n_bad++, printf("BAD quant %s %zux%zu rows %d tokens %zu norm %d: %zu of %zu bytes, late %d\n", format_name(f),
                              c.n_out, c.n_in, rows, n, norm, differ, bytes, want == again);
            }
            cudaFree(out), rows_free(&r), rows_free(&late);
          }
        }
      }
      matrix_free(&w);
    }
  }
  printf("check quant: %s, %d cases, %d do not fit\n", n_bad == bad ? "good" : "BAD", n_done, n_refused);
}

/* ---- times --------------------------------------------------------------------------------------- */

static const struct {
  const char *name;
  size_t n_out, n_in;
  enum qtr_epilogue epilogue;
} llama[] = {{"qkv", 6144, 4096, QTR_EPILOGUE_STORE},
             {"o", 4096, 4096, QTR_EPILOGUE_ADD},
             {"gate_up", 28672, 4096, QTR_EPILOGUE_SILU_MUL},
             {"down", 4096, 14336, QTR_EPILOGUE_ADD}};

/* Microseconds of one product; weights rotate over more than L2. */
static double time_one(const struct matrix *w, const struct tokens *t, enum qtr_epilogue epilogue,
                       const struct qtr_gemm_plan *plan) {
  size_t bytes = qtr_cuda_matrix_code_bytes(w->m.path, w->m.format, w->m.n_out, w->m.n_in);
  int copies = (int)std::min<size_t>(12, 120000000 / bytes + 1);
  size_t n_out = w->n_out;
  double ops = 2.0 * (double)t->n * (double)w->n_out * (double)w->n_in;
  int launches = std::max(copies, (int)(8e-3 / (ops / 1e15 + 1e-5)));
  std::vector<void *> code(copies);
  for (int i = 0; i < copies; i++) {
    CHECK(cudaMalloc(&code[i], bytes));
    CHECK(cudaMemcpy(code[i], w->m.code, bytes, cudaMemcpyDeviceToDevice));
  }
  void *out;
  CHECK(cudaMalloc(&out, t->n * n_out * 4));
  CHECK(cudaMemset(out, 0, t->n * n_out * 4));
  double us = time_us(launches, [&](int i, cudaStream_t to) {
    struct qtr_cuda_matrix m = w->m;
    m.code = code[i % copies];
    struct qtr_cuda_gemm_args a = {&m,      NULL,     t->d_x, t->d_scale, t->d_sum, t->stride,
                                   t->rows, epilogue, out,    t->n,       dependent};
    CHECK(plan ? qtr_cuda_gemm_planned(&a, plan, to) : qtr_cuda_gemm(&a, to));
  });
  cudaFree(out);
  for (void *c : code) cudaFree(c);
  return us;
}

/* A matrix of random bytes on the device: times do not need the host's side. */
static struct matrix matrix_random(enum qtr_cuda_path path, enum qtr_linear_format format, size_t n_out, size_t n_in,
                                   bool gate_up) {
  struct matrix w;
  w.format = format, w.n_in = n_in, w.n_out = n_out;
  size_t bytes = qtr_cuda_matrix_code_bytes(path, format, n_out, n_in), padded = qtr_cuda_matrix_padded_rows(path, n_out);
  memset(&w.m, 0, sizeof w.m);
  w.m.path = path, w.m.format = format, w.m.gate_up = gate_up, w.m.n_out = n_out, w.m.n_in = n_in;
  std::vector<uint64_t> code(bytes / 8 + 1);
  for (uint64_t &c : code) c = draw();
  w.m.code = to_device(code);
  std::vector<float> s(padded);
  for (float &v : s) v = uniform(0.5f, 1.5f) / sqrtf((float)n_in) / 64.0f;
  w.m.scale = to_device(s);
  if (format == QTR_LINEAR_W4A8) w.m.szero = to_device(s);
  return w;
}

static void print_line(int f, const char *name, size_t n, const struct qtr_gemm_plan *p, double us, double ops,
                       double bytes) {
  printf("%-5s %-8s %6zu  n %3d rows %3d pair %d split %d %9.2f us  %7.1f TOP/s  %7.1f GB/s\n", format_name(f), name, n,
         p->n, p->rows, p->pair, p->split, us, ops / us * 1e-6, bytes / us * 1e-3);
  fflush(stdout);
}

static void time_counts(enum qtr_cuda_path path, int n_sms, std::vector<size_t> counts, std::vector<int> formats) {
  for (int f : formats) {
    for (size_t n : counts) {
      double total = 0, total_bytes = 0, total_ops = 0;
      for (auto &s : llama) {
        struct matrix w =
            matrix_random(path, (enum qtr_linear_format)f, s.n_out, s.n_in, s.epilogue == QTR_EPILOGUE_SILU_MUL);
        struct tokens t = tokens_make(n, s.n_in);
        double us = time_one(&w, &t, s.epilogue, NULL), ops = 2.0 * (double)n * (double)s.n_out * (double)s.n_in;
        double bytes = (double)qtr_cuda_matrix_code_bytes(path, (enum qtr_linear_format)f, s.n_out, s.n_in);
        struct qtr_gemm_plan p = qtr_gemm_choose((enum qtr_linear_format)f, s.n_out, s.n_in, n, n_sms);
        print_line(f, s.name, n, &p, us, ops, bytes);
        total += us, total_bytes += bytes, total_ops += ops;
        matrix_free(&w);
        tokens_free(&t);
      }
      printf("%-5s together %6zu %48.2f us  %7.1f TOP/s  %7.1f GB/s\n", format_name(f), n, total, total_ops / total * 1e-6,
             total_bytes / total * 1e-3);
    }
  }
}

static void sweep(int f, size_t n, int n_sms, std::vector<int> tiles) {
  for (auto &s : llama) {
    struct matrix w =
        matrix_random(QTR_CUDA_SM90, (enum qtr_linear_format)f, s.n_out, s.n_in, s.epilogue == QTR_EPILOGUE_SILU_MUL);
    struct tokens t = tokens_make(n, s.n_in);
    double ops = 2.0 * (double)n * (double)s.n_out * (double)s.n_in;
    double bytes = (double)qtr_cuda_matrix_code_bytes(QTR_CUDA_SM90, (enum qtr_linear_format)f, s.n_out, s.n_in);
    for (auto &v : variants) {
      if (std::find(tiles.begin(), tiles.end(), v[0]) == tiles.end()) continue;
      struct qtr_gemm_plan p = {v[0], v[1], v[2], v[3], 8, n_sms};
      print_line(f, s.name, n, &p, time_one(&w, &t, s.epilogue, &p), ops, bytes);
    }
    matrix_free(&w);
    tokens_free(&t);
  }
}

/* The four products of a layer in turn, each behind its norm or quantisation or doing it itself. */
static void time_quant(int n_sms, std::vector<size_t> counts) {
  const int layers = 8;
  for (int f : {QTR_LINEAR_W4A8, QTR_LINEAR_W4A8_G128}) {
    for (size_t n : counts) {
      double us[2][5] = {};
      for (int which = 0; which < 5; which++) { /* each alone, then all four */
        std::vector<struct matrix> w;
        std::vector<struct row_data> r;
        std::vector<std::vector<void *>> code;
        for (int i = 0; i < 4; i++) {
          auto &s = llama[i];
          w.push_back(
              matrix_random(QTR_CUDA_SM90, (enum qtr_linear_format)f, s.n_out, s.n_in, s.epilogue == QTR_EPILOGUE_SILU_MUL));
          r.push_back(rows_make(n, s.n_in, i % 2 == 0));
          size_t bytes = qtr_cuda_matrix_code_bytes(QTR_CUDA_SM90, (enum qtr_linear_format)f, s.n_out, s.n_in);
          code.push_back({});
          for (int l = 0; l < layers; l++) {
            void *p;
            CHECK(cudaMalloc(&p, bytes));
            CHECK(cudaMemcpy(p, w[i].m.code, bytes, cudaMemcpyDeviceToDevice));
            code[i].push_back(p);
          }
        }
        void *out;
        CHECK(cudaMalloc(&out, n * 28672 * 4));
        CHECK(cudaMemset(out, 0, n * 28672 * 4));
        for (int own = 0; own < 2; own++) {
          us[own][which] = time_us(4 * layers, [&](int l, cudaStream_t to) {
            for (int i = 0; i < 4; i++) {
              if (which < 4 && i != which) continue;
              struct qtr_cuda_matrix m = w[i].m;
              m.code = code[i][l % layers];
              struct qtr_gemm_plan p = qtr_gemm_choose((enum qtr_linear_format)f, llama[i].n_out, llama[i].n_in, n, n_sms);
              CHECK(rows_product(&w[i], &m, &r[i], n, llama[i].epilogue, out, &p, own, to));
            }
          });
        }
        for (int i = 0; i < 4; i++) {
          for (void *p : code[i]) cudaFree(p);
          rows_free(&r[i]), matrix_free(&w[i]);
        }
        cudaFree(out);
      }
      for (int i = 0; i < 5; i++) {
        printf("%-5s %-8s %3zu tokens: kernel of rows + product %7.2f us, product alone %7.2f us\n", format_name(f),
               i < 4 ? llama[i].name : "all four", n, us[0][i], us[1][i]);
      }
    }
  }
}

int main(int argc, char **argv) {
  setvbuf(stdout, NULL, _IOLBF, 0);
  struct cudaDeviceProp prop;
  CHECK(cudaGetDeviceProperties(&prop, 0));
  printf("%s, %d SMs, L2 %d MB\n", prop.name, prop.multiProcessorCount, prop.l2CacheSize >> 20);
  CHECK(cudaStreamCreate(&stream));
  seed ^= argc > 1 ? (uint64_t)(uintptr_t)&prop : 0;
  int n_sms = prop.multiProcessorCount;
  const std::vector<int> all = {QTR_LINEAR_W4A8, QTR_LINEAR_W4A8_G128, QTR_LINEAR_W8A8};
  for (int i = 1; i < argc; i++) {
    if (!strcmp(argv[i], "rows")) {
      more_rows = true;
    } else if (!strcmp(argv[i], "dependent")) {
      dependent = true;
    } else if (!strcmp(argv[i], "check")) {
      check_groups();
      check_path(QTR_CUDA_SM90);
      check_plans(n_sms);
      check_dependent(n_sms);
    } else if (!strcmp(argv[i], "small")) { /* for compute-sanitizer */
      check_groups();
      for (int f = QTR_LINEAR_W8A8; f <= QTR_LINEAR_W4A8_G128; f++) {
        enum qtr_linear_format format = (enum qtr_linear_format)f;
        for (auto &v : variants) {
          struct qtr_gemm_plan plan = {v[0], v[1], v[2], v[3], 8, n_sms};
          check_one(QTR_CUDA_SM90, format, 640, {160}, QTR_EPILOGUE_STORE, true, {(size_t)v[0] - 3}, &plan);
          check_one(QTR_CUDA_SM90, format, 384, {96, 96}, QTR_EPILOGUE_SILU_MUL, true, {(size_t)v[0] + 3}, &plan);
          check_one(QTR_CUDA_SM90, format, 384, {96}, QTR_EPILOGUE_ADD, false, {(size_t)v[0]}, &plan);
        }
        check_one(QTR_CUDA_SM90, format, 384, {96}, QTR_EPILOGUE_LOGITS, false, {5, 70}, NULL);
        if (f == QTR_LINEAR_W8A8) check_one(QTR_CUDA_SM90, format, 77, {37}, QTR_EPILOGUE_ADD, true, {5, 70}, NULL);
        check_one(QTR_CUDA_SM80, format, 384, {96, 96}, QTR_EPILOGUE_SILU_MUL, true, {5, 20, 50, 70}, NULL);
        check_one(QTR_CUDA_SM80, format, 640, {160}, QTR_EPILOGUE_ADD, true, {5, 20, 50, 130}, NULL);
      }
      printf("check small: %s\n", n_bad ? "BAD" : "good");
    } else if (!strcmp(argv[i], "check80")) {
      check_path(QTR_CUDA_SM80);
    } else if (!strcmp(argv[i], "time")) {
      std::vector<size_t> counts;
      while (i + 1 < argc && atoi(argv[i + 1]) > 0) counts.push_back((size_t)atoi(argv[++i]));
      time_counts(QTR_CUDA_SM90, n_sms, counts, all);
    } else if (!strcmp(argv[i], "quant")) {
      check_quant(n_sms);
    } else if (!strcmp(argv[i], "timequant")) {
      std::vector<size_t> counts;
      while (i + 1 < argc && atoi(argv[i + 1]) > 0) counts.push_back((size_t)atoi(argv[++i]));
      time_quant(n_sms, counts);
    } else if (!strcmp(argv[i], "time80")) {
      std::vector<size_t> counts;
      while (i + 1 < argc && atoi(argv[i + 1]) > 0) counts.push_back((size_t)atoi(argv[++i]));
      time_counts(QTR_CUDA_SM80, n_sms, counts, {QTR_LINEAR_W4A8});
    } else if (!strcmp(argv[i], "sweep") && i + 2 < argc) { /* sweep FORMAT TOKENS TILE... */
      int f = !strcmp(argv[i + 1], "w8a8")   ? QTR_LINEAR_W8A8
              : !strcmp(argv[i + 1], "w4a8") ? QTR_LINEAR_W4A8
                                             : QTR_LINEAR_W4A8_G128;
      size_t n = (size_t)atoi(argv[i + 2]);
      std::vector<int> tiles;
      for (i += 2; i + 1 < argc && atoi(argv[i + 1]) > 0;) tiles.push_back(atoi(argv[++i]));
      sweep(f, n, n_sms, tiles);
    }
  }
  if (n_bad) printf("%d BAD\n", n_bad);
  return n_bad ? 1 : 0;
}
