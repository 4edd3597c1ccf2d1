/* Sparse attention through a whole engine, on CPUs or on a GPU (argument "cuda"): whatever the chunks, the neighbours, the
 * prefix cache, preemption and cancellation do, a request gives the tokens and the log-probabilities - bit for bit - that it
 * gives alone, and streaming heads never hold more pages than their windows need.
 *
 * On GPUs heads of 16 have the kernels whose bits depend on nothing but the tokens; heads of 64 those where a given token
 * that comes alone in a chunk is rounded otherwise (backend/cuda/attention.h): requests to which that happened are not
 * compared. */
#include "backend/cpu/kv.h"
#include "base/file.h"
#include "engine_fixture.h"

#include <sys/stat.h>
#include <unistd.h>

enum { LAYERS = 3, HEADS = 4, N_REQUESTS = 10, MAX_LEN = 2048, MAX_OUT = 200 };

static char heads_dir[] = "/tmp/qtr-sparse-XXXXXX";
static const char *device = "cpu";
static int32_t head_dim = 16;

static bool on_gpu(void) { return strcmp(device, "cuda") == 0; }

/* GPUs: with an int8 head, as cuBLASLt chooses a kernel for a floating-point one by the number of rows. */
static struct qtr_model *make_model(void) {
  const struct qtr_config config = {.hidden_size = 64,
                                    .intermediate_size = 64,
                                    .n_layers = LAYERS,
                                    .n_heads = 2 * HEADS,
                                    .n_kv_heads = HEADS,
                                    .head_dim = head_dim,
                                    .max_position_embeddings = MAX_LEN};
  return tiny_model_shaped(device, config, QTR_LINEAR_W8A8, on_gpu(), 5);
}

/* Layer 0 has streaming heads only at half, layer 1 one of them, layer 2 one more. */
static int write_heads(void **state) {
  (void)state;
  static const char table[] = "0\t0.1\t0\t0.05\n1\t0.9\t0.2\t1\n0.8\t0.3\t1\t0.95\n";
  struct qtr_error err = {0};
  if (!mkdtemp(heads_dir)) return -1;
  char *path = qtr_path_join(heads_dir, "full_attention_heads.tsv");
  if (!path || qtr_file_write(path, table, sizeof table - 1, &err)) return -1;
  free(path);
  return 0;
}

static int remove_heads(void **state) {
  (void)state;
  char *path = qtr_path_join(heads_dir, "full_attention_heads.tsv");
  if (!path || unlink(path) || rmdir(heads_dir)) return -1;
  free(path);
  return 0;
}

struct request {
  int32_t prompt[1500], n_prompt, max_tokens;
  int32_t token[MAX_OUT];
  float logprob[MAX_OUT];
  int32_t n, n_cached;
  enum qtr_finish finish;
  bool shares;  /* its beginning with others */
  bool cut_off; /* since the engine was opened, a given token of it was alone in a chunk */
};

static struct request requests[N_REQUESTS];

/* Prompts of many lengths; some share their beginnings, at page borders and elsewhere. */
static void make_requests(void) {
  static const int32_t lengths[N_REQUESTS] = {1, 63, 64, 65, 700, 710, 640, 1500, 300, 1000};
  static const int32_t outputs[N_REQUESTS] = {200, 190, 166, 180, 90, 130, 110, 80, 1, 65};
  uint32_t x = 12345;
  for (int i = 0; i < N_REQUESTS; i++) {
    requests[i].n_prompt = lengths[i];
    requests[i].max_tokens = outputs[i];
    for (int32_t k = 0; k < lengths[i]; k++) {
      x = x * 1664525u + 1013904223u;
      requests[i].shares = i == 4 || i == 5 || i == 6 || i == 9;
      bool shared = (i == 5 && k < 600) || (i == 6) || (i == 9 && k < 640);
      requests[i].prompt[k] = shared ? requests[4].prompt[k] : (int32_t)(x >> 16) % TINY_VOCAB;
    }
  }
}

static uint64_t add(struct qtr_engine *e, struct request *r) {
  struct qtr_request_options o;
  struct qtr_error err = {0};
  uint64_t id;
  qtr_request_options_init(&o);
  o.prompt_token = r->prompt;
  o.n_prompt_token = (size_t)r->n_prompt;
  o.max_tokens = r->max_tokens;
  o.sampling.temperature = 0;
  o.logprobs = 0;
  o.user = r;
  r->n = 0;
  r->finish = QTR_FINISH_NONE;
  if (qtr_engine_add(e, &o, &id, &err)) fail_msg("%s", err.message);
  return id;
}

static void poll(struct qtr_engine *e) {
  struct qtr_event event;
  while (qtr_engine_poll(e, &event)) {
    struct request *r = event.user;
    r->n_cached = event.n_cached_tokens;
    if (event.finish != QTR_FINISH_NONE) r->finish = event.finish;
    if (event.token < 0) continue;
    assert_in_range(r->n, 0, MAX_OUT - 1);
    r->token[r->n] = event.token;
    r->logprob[r->n++] = event.logprob;
  }
}

/* Remembers whose given tokens came alone in this step; prompts are told apart by their lengths. Those that share pages with
 * another share this too. A prompt of one token cannot come otherwise. */
static void note_single_tokens(const struct qtr_batch *b) {
  for (int32_t i = 0; i < b->n_seqs && head_dim >= 64 && on_gpu(); i++) {
    int32_t n_prompt = b->decode_start[i], n = b->q_start[i + 1] - b->q_start[i];
    if (n_prompt == 1 || QTR_MIN(n_prompt - b->kv_len[i], n) != 1) continue;
    bool shared = false;
    for (int k = 0; k < N_REQUESTS; k++) shared = shared || (requests[k].n_prompt == n_prompt && requests[k].shares);
    for (int k = 0; k < N_REQUESTS; k++)
      requests[k].cut_off = requests[k].cut_off || requests[k].n_prompt == n_prompt || (shared && requests[k].shares);
  }
}

static bool step(struct qtr_engine *e) {
  bool work = tiny_step(e);
  for (int i = 0; i < QTR_STEPS_UNDER_WAY; i++)
    note_single_tokens(&e->pass[i].batch); /* this step's, and perhaps the next one's */
  poll(e);
  return work;
}

static struct qtr_engine *open_engine(const struct qtr_engine_options *o) {
  for (int i = 0; i < N_REQUESTS; i++) requests[i].cut_off = false;
  return tiny_engine(make_model(), o);
}

/* Steps until nothing is left; after each, streaming heads hold at most `most` pages a running sequence. */
static void run(struct qtr_engine *e, int32_t most) {
  struct qtr_error err = {0};
  struct qtr_stats stats;
  for (bool work = true; work;) {
    work = step(e);
    qtr_engine_stats(e, &stats);
    if (e->streams && stats.n_stream_pages_used > most * stats.n_running)
      fail_msg("%d stream pages for %d sequences", stats.n_stream_pages_used, stats.n_running);
    if (!qtr_kv_pool_check(e->pool, &err)) fail_msg("%s", err.message);
  }
}

static void assert_all_free(struct qtr_engine *e) {
  struct qtr_stats stats;
  assert_idle(e);
  qtr_engine_stats(e, &stats);
  assert_int_equal(stats.n_stream_pages_used, 0);
  assert_int_equal(e->n_free_slots, e->max_num_seqs);
}

static struct qtr_engine_options base_options(const struct qtr_sparse_options *sparse, const char *precision) {
  struct qtr_engine_options o;
  qtr_engine_options_init(&o);
  o.precision = precision;
  o.max_num_seqs = 6;
  o.max_model_len = 1664; /* 26 pages */
  o.sparse = *sparse;
  if (o.sparse.static_sparsity > 0) o.sparse.heads_dir = heads_dir;
  return o;
}

static void close_engine(struct qtr_engine *e) { qtr_engine_close(e); /* with model and backend */ }

static void assert_same(const struct request *expected, const char *what) {
  int n_compared = 0;
  for (int i = 0; i < N_REQUESTS; i++) {
    const struct request *a = &expected[i], *b = &requests[i];
    if (b->finish == QTR_FINISH_CANCELLED || a->cut_off || b->cut_off) continue;
    n_compared++;
    if (a->n != b->n || memcmp(a->token, b->token, (size_t)a->n * sizeof *a->token) ||
        memcmp(a->logprob, b->logprob, (size_t)a->n * sizeof *a->logprob)) {
      int32_t k = 0;
      while (k < a->n && k < b->n && a->token[k] == b->token[k] && memcmp(&a->logprob[k], &b->logprob[k], 4) == 0) k++;
      fail_msg("%s: request %d (%d tokens cached): output %d of %d is %d (%.9g), alone %d (%.9g)", what, i, b->n_cached, k,
               b->n, b->token[k], (double)b->logprob[k], a->token[k], (double)a->logprob[k]);
    }
  }
  assert_true(n_compared > 2);
  if (on_gpu()) print_message("%s, head size %d: %d of %d requests compared\n", what, head_dim, n_compared, N_REQUESTS);
}

static const struct qtr_sparse_options settings[] = {
    {.static_sparsity = 0.5f, .context_mode = true, .ctx_sink = 20, .ctx_local = 100, .dec_sink = 64, .dec_local = 70},
    {.static_sparsity = 0.5f, .dec_sink = 128, .dec_local = 64}, /* prompts are dense */
    {.decode_mode = 1, .token_budget = 192, .selector_interval = 4, .sub_chunks = 4},
    {.static_sparsity = 0.6f,
     .context_mode = true,
     .ctx_sink = 130,
     .ctx_local = 30,
     .dec_sink = 3,
     .dec_local = 256,
     .decode_mode = 1,
     .token_budget = 256,
     .selector_interval = 7,
     .sub_chunks = 2,
     .each_head = true},
    {.static_sparsity = 1, .context_mode = true, .ctx_sink = 0, .ctx_local = 64, .dec_sink = 0, .dec_local = 64},
};

static void check_setting(const struct qtr_sparse_options *sparse, const char *precision) {
  static struct request alone[N_REQUESTS];
  struct qtr_engine_options o = base_options(sparse, precision);
  struct qtr_stats stats;
  bool streams = sparse->static_sparsity > 0;

  /* Alone, everything in one step. */
  o.no_prefix_cache = true;
  o.max_num_batched_tokens = MAX_LEN;
  o.kv_pages = 64;
  struct qtr_engine *e = open_engine(&o);
  for (int i = 0; i < N_REQUESTS; i++) {
    (void)add(e, &requests[i]);
    run(e, INT32_MAX / 64);
  }
  assert_all_free(e);
  close_engine(e);
  memcpy(alone, requests, sizeof alone);

  /* Together in small steps, with barely the pages that one of them needs: preemption, again and again. */
  o.no_prefix_cache = false;
  o.max_num_batched_tokens = 53;
  o.kv_pages = 26;
  e = open_engine(&o);
  int32_t most = streams ? qtr_streams_most(&e->sparse, 53, e->max_model_len) : 0;
  for (int i = 0; i < N_REQUESTS; i++) (void)add(e, &requests[i]);
  run(e, most);
  qtr_engine_stats(e, &stats);
  if (streams) assert_true(stats.n_stream_pages_total >= most && stats.n_stream_pages_total <= stats.n_pages_total);
  assert_true(stats.n_preemptions > 0);
  assert_same(alone, "in small steps");
  assert_all_free(e);
  close_engine(e);

  /* With little room for streaming heads in particular. */
  if (streams) {
    o.kv_pages = 200;
    o.sparse.stream_pages = most + 2;
    e = open_engine(&o);
    for (int i = 0; i < N_REQUESTS; i++) (void)add(e, &requests[i]);
    run(e, most);
    assert_same(alone, "with few stream pages");
    for (int i = 0; i < N_REQUESTS; i++) (void)add(e, &requests[i]);
    run(e, most);
    assert_same(alone, "with few stream pages, again");
    assert_all_free(e);
    close_engine(e);
    o.sparse.stream_pages = 0;
  }

  /* With room for all: the second time prompts are cached; then again while some are cancelled. */
  o.kv_pages = 200;
  o.max_num_batched_tokens = 200;
  o.sparse.stream_pages = streams ? 200 : 0;
  e = open_engine(&o);
  for (int round = 0; round < 4; round++) {
    uint64_t id[N_REQUESTS];
    struct qtr_error err = {0};
    for (int i = 0; i < N_REQUESTS; i++) id[i] = add(e, &requests[round % 2 ? N_REQUESTS - 1 - i : i]);
    for (int k = 0; k < 7 * round; k++) {
      (void)step(e);
      if (round >= 2 && k % 3 == 0) (void)qtr_engine_cancel(e, id[k / 3 % N_REQUESTS], &err);
    }
    run(e, INT32_MAX / 64);
    assert_same(alone, "with cached prompts");
    if (round == 1) {
      assert_int_equal(requests[4].n_cached, 640);
      assert_int_equal(requests[6].n_cached, 576); /* of 640: the last token is computed */
      assert_int_equal(requests[7].n_cached, 1472);
    }
  }
  assert_all_free(e);
  close_engine(e);
}

static void test_settings(void **state) {
  (void)state;
  make_requests();
  for (size_t i = 0; i < sizeof settings / sizeof settings[0]; i++)
    check_setting(&settings[i], i % 2 ? "w8a8kv4" : "w8a8kv8");
}

/* The same text generated and given has different keys and values: neither may pass for the other. requests[0] generates a
 * text; requests[1] is given it, prompt and output, and goes on; requests[2] only pushes others out of the pool. */
static void test_conversation(void **state) {
  (void)state;
  static const struct qtr_sparse_options sparse[] = {
      {.decode_mode = 1, .token_budget = 192, .selector_interval = 3, .sub_chunks = 4},
      {.static_sparsity = 0.5f, .context_mode = true, .ctx_sink = 64, .ctx_local = 64, .dec_sink = 0, .dec_local = 64},
      {.static_sparsity = 0.5f, .context_mode = true, .ctx_sink = 64, .ctx_local = 64, .dec_sink = 64, .dec_local = 64}};
  for (size_t k = 0; k < sizeof sparse / sizeof sparse[0]; k++) {
    static struct request alone[2];
    struct qtr_engine_options o = base_options(&sparse[k], "w8a8kv8");
    o.kv_pages = 26;
    o.no_prefix_cache = true;
    make_requests();
    requests[0].n_prompt = 640;
    memcpy(requests[0].prompt, requests[7].prompt, 640 * sizeof(int32_t));
    requests[0].max_tokens = 200;
    struct qtr_engine *e = open_engine(&o);
    (void)add(e, &requests[0]);
    run(e, INT32_MAX / 64);
    requests[1].n_prompt = 840 + 30;
    memcpy(requests[1].prompt, requests[0].prompt, 640 * sizeof(int32_t));
    memcpy(requests[1].prompt + 640, requests[0].token, 200 * sizeof(int32_t));
    memcpy(requests[1].prompt + 840, requests[0].prompt, 30 * sizeof(int32_t));
    requests[1].max_tokens = 20;
    (void)add(e, &requests[1]);
    run(e, INT32_MAX / 64);
    close_engine(e);
    memcpy(alone, requests, sizeof alone);

    for (int order = 0; order < 2; order++) {
      o.no_prefix_cache = false;
      e = open_engine(&o);
      (void)add(e, &requests[order]); /* order 1: what is generated later has been given before */
      run(e, INT32_MAX / 64);
      (void)add(e, &requests[1 - order]);
      struct qtr_error err = {0};
      for (int i = 0; i < 150 && order == 1; i++) { /* while it generates, it must make room, and is computed again */
        (void)step(e);
        if (i != 140) continue;
        struct qtr_request_options big;
        uint64_t id;
        qtr_request_options_init(&big);
        big.prompt_token = requests[9].prompt;
        big.n_prompt_token = 880; /* 14 pages: two of those that were given, beyond the prompt, stay */
        big.max_tokens = 1;
        big.priority = 1;
        big.user = &requests[2];
        requests[2].n = 0;
        if (qtr_engine_add(e, &big, &id, &err)) fail_msg("%s", err.message);
      }
      run(e, INT32_MAX / 64);
      struct qtr_stats stats;
      qtr_engine_stats(e, &stats);
      if (order == 1) assert_int_equal(stats.n_preemptions, 1);
      /* A GPU's tensor cores round given tokens otherwise than generated ones, and here pages with the latter are shared. */
      bool mixed = k == 2 && head_dim >= 64 && on_gpu();
      for (int i = 0; i < 2; i++) {
        if (requests[i].cut_off || alone[i].cut_off || mixed) continue;
        assert_int_equal(requests[i].n, alone[i].n);
        assert_memory_equal(requests[i].token, alone[i].token, (size_t)alone[i].n * sizeof(int32_t));
        assert_memory_equal(requests[i].logprob, alone[i].logprob, (size_t)alone[i].n * sizeof(float));
      }
      /* Where both are the same to the heads, the whole conversation is cached. */
      if (order == 0) assert_int_equal(requests[1].n_cached, k == 2 ? 832 : 640);
      close_engine(e);
    }
  }
}

/* A budget that is never reached and no streaming heads: the tokens and probabilities of a dense engine. */
static void test_dense(void **state) {
  (void)state;
  static struct request dense[N_REQUESTS];
  make_requests();
  for (int k = 0; k < 2; k++) {
    struct qtr_sparse_options sparse = {.decode_mode = k, .token_budget = MAX_LEN, .selector_interval = 4, .sub_chunks = 4};
    struct qtr_engine_options o = base_options(&sparse, "w8a8kv4");
    o.kv_pages = 100;
    struct qtr_engine *e = open_engine(&o);
    for (int i = 0; i < N_REQUESTS; i++) (void)add(e, &requests[i]);
    run(e, 0);
    close_engine(e);
    if (k == 0) memcpy(dense, requests, sizeof dense);
  }
  assert_same(dense, "with a large budget");
}

/* What streaming heads cost does not depend on the length; what the statistics cost is in the bytes of a token. */
static void test_memory(void **state) {
  (void)state;
  make_requests();
  struct qtr_sparse_options sparse = settings[0];
  struct qtr_engine_options o = base_options(&sparse, "w8a8kv4");
  size_t head = 2 * QTR_PAGE_TOKENS * (16 / 2 + 4); /* bytes of one head's page, K and V */
  struct qtr_stats stats;
  o.max_num_batched_tokens = 64;
  o.kv_pages = 100;
  struct qtr_engine *e = open_engine(&o);
  qtr_engine_stats(e, &stats);
  assert_int_equal(stats.n_streaming_heads, 6);
  assert_int_equal(e->kv_page_bytes, 6 * head);
  assert_int_equal(stats.stream_page_bytes, 6 * head);
  /* sinks of 64 tokens, 100 and 64 tokens of window and step: 1 + 162/64 + 2; each further sequence 1 + 69/64 + 2 */
  assert_int_equal(stats.n_stream_pages_total, 5 + 5 * 4);
  assert_int_equal(stats.kv_pool_bytes, 100 * 6 * head + 25 * 6 * head);
  (void)add(e, &requests[7]); /* 1,500 tokens */
  int32_t highest = 0, last = 0;
  for (bool work = true; work;) {
    work = step(e);
    qtr_engine_stats(e, &stats);
    highest = QTR_MAX(highest, stats.n_stream_pages_used);
    if (work) last = stats.n_stream_pages_used;
  }
  assert_in_range(highest, 3, 5);
  assert_in_range(last, 2, 4); /* 64 + 70 tokens */
  close_engine(e);

  sparse = settings[2];
  o = base_options(&sparse, "w8a8kv4");
  o.kv_bytes = 1000000;
  e = open_engine(&o);
  qtr_engine_stats(e, &stats);
  assert_int_equal(e->kv_page_bytes, 12 * (head + 2 * 4 * 16 * 2));
  size_t lists = 6 * 12 * (2 + 2) * sizeof(int32_t); /* slots, heads; two numbers and two pages each */
  assert_int_equal(stats.n_pages_total, (1000000 - lists) / e->kv_page_bytes);
  assert_int_equal(stats.n_stream_pages_total, 0);
  assert_int_equal(stats.kv_pool_bytes, (size_t)stats.n_pages_total * e->kv_page_bytes + lists);
  close_engine(e);

  sparse = settings[0];
  o = base_options(&sparse, "w8a8kv4");
  o.kv_bytes = 1000000;
  o.max_num_batched_tokens = 64;
  e = open_engine(&o);
  qtr_engine_stats(e, &stats);
  assert_int_equal(stats.n_stream_pages_total, 25);
  assert_int_equal(stats.n_pages_total, (1000000 - 25 * 6 * head) / (6 * head));
  assert_true(stats.kv_pool_bytes <= 1000000);
  close_engine(e);
}

/* What an engine says its cache costs is what the backend has allocated, to the byte. */
static void test_memory_is_exact(void **state) {
  (void)state;
  if (on_gpu()) return; /* it looks into the cpu backend */
  for (size_t i = 0; i < 2 * sizeof settings / sizeof settings[0]; i++) {
    struct qtr_sparse_options sparse = settings[i / 2];
    struct qtr_engine_options o = base_options(&sparse, i % 2 ? "w8a8kv4" : "w8a8kv16");
    struct qtr_stats stats;
    o.kv_bytes = 3000000;
    struct qtr_engine *e = tiny_engine(make_model(), &o);
    qtr_engine_stats(e, &stats);
    assert_int_equal(stats.kv_pool_bytes, e->kv->n_bytes + e->kv->stats_bytes + e->kv->selection_bytes);
    assert_true(stats.kv_pool_bytes <= 3000000 && (sparse.decode_mode == 0) == (e->kv->selection_bytes == 0));
    close_engine(e);
  }
  struct qtr_engine_options o = base_options(&settings[3], "w8a8kv4");
  struct qtr_error err = {0};
  struct qtr_model *model = make_model();
  struct qtr_engine *e = NULL;
  o.kv_bytes = 500; /* less than the lists alone */
  assert_int_equal(qtr_engine_open_model(model, NULL, NULL, &o, &e, &err), QTR_ERR_LIMIT);
  struct qtr_backend *backend = model->backend;
  qtr_model_free(model);
  qtr_backend_close(backend);
}

/* Engines one after the other over one model, with other caches each; classes of heads from numbers instead of a file. */
static void test_same_model(void **state) {
  (void)state;
  static const double numbers[LAYERS * HEADS] = {0, 0.1, 0, 0.05, 1, 0.9, 0.2, 1, 0.8, 0.3, 1, 0.95}; /* as in the file */
  static struct request expected[N_REQUESTS];
  struct qtr_sparse_options dense = {0};
  struct qtr_model *model = make_model();
  make_requests();
  for (int k = 0; k < 4; k++) {
    struct qtr_engine_options o = base_options(k == 2 ? &dense : &settings[0], k == 2 ? "w8a8kv8" : "w8a8kv4");
    o.kv_pages = 100;
    if (k == 1) {
      o.sparse.heads_dir = NULL;
      o.sparse.heads = numbers;
    }
    struct qtr_engine *e = tiny_engine(model, &o);
    for (int i = 0; i < N_REQUESTS; i++) (void)add(e, &requests[i]);
    run(e, INT32_MAX / 64);
    if (k == 0) memcpy(expected, requests, sizeof expected);
    if (k == 1 || k == 3) assert_same(expected, "over the same model");
    if (k == 2) assert_memory_not_equal(expected, requests, sizeof expected);
    if (k == 3) /* with what still waits */
      (void)add(e, &requests[0]);
    assert_ptr_equal(qtr_engine_close_keep_model(e), model);
  }
  struct qtr_backend *backend = model->backend;
  qtr_model_free(model);
  qtr_backend_close(backend);
}

static void test_bad_options(void **state) {
  (void)state;
  struct qtr_engine_options good = base_options(&settings[3], "w8a8kv4"), o;
  struct qtr_error err = {0};
  struct qtr_model *model = make_model();
  struct qtr_engine *e = NULL;
  good.kv_pages = 100;
  static const struct {
    size_t at;
    int32_t value;
    const char *says;
  } bad[] = {{offsetof(struct qtr_sparse_options, ctx_sink), -1, "ctx_sink"},
             {offsetof(struct qtr_sparse_options, ctx_local), 0, "ctx_local"},
             {offsetof(struct qtr_sparse_options, dec_sink), INT32_MAX, "dec_sink"},
             {offsetof(struct qtr_sparse_options, dec_local), -5, "dec_local"},
             {offsetof(struct qtr_sparse_options, token_budget), 100, "multiple of 64"},
             {offsetof(struct qtr_sparse_options, token_budget), 0, "token_budget"},
             {offsetof(struct qtr_sparse_options, selector_interval), 0, "selector_interval"},
             {offsetof(struct qtr_sparse_options, sub_chunks), 3, "sub_chunks"},
             {offsetof(struct qtr_sparse_options, decode_mode), 2, "decode mode"},
             {offsetof(struct qtr_sparse_options, stream_pages), 2, "pages for the streaming heads"}};
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    o = good;
    memcpy((char *)&o.sparse + bad[i].at, &bad[i].value, sizeof bad[i].value);
    if (qtr_engine_open_model(model, NULL, NULL, &o, &e, &err) == QTR_OK) fail_msg("accepted: %s", bad[i].says);
    if (!strstr(err.message, bad[i].says)) fail_msg("\"%s\" does not say \"%s\"", err.message, bad[i].says);
  }
  o = good;
  o.sparse.static_sparsity = 1.1f;
  assert_int_equal(qtr_engine_open_model(model, NULL, NULL, &o, &e, &err), QTR_ERR_ARGUMENT);
  o = good;
  o.sparse.heads_dir = NULL;
  assert_int_equal(qtr_engine_open_model(model, NULL, NULL, &o, &e, &err), QTR_ERR_ARGUMENT);
  o.sparse.heads_dir = "/nonexistent";
  assert_int_equal(qtr_engine_open_model(model, NULL, NULL, &o, &e, &err), QTR_ERR_NOT_FOUND);
  assert_int_equal(qtr_engine_open_model(model, NULL, NULL, &good, &e, &err), QTR_OK);
  close_engine(e);
}

/* GPUs: the essentials for both kinds of kernels. */
static void test_tensor_core_heads(void **state) {
  if (!on_gpu()) return;
  head_dim = 64;
  test_settings(state);
  test_conversation(state);
  test_dense(state);
  head_dim = 16;
}

int main(int argc, char **argv) {
  if (argc > 1) {
    struct qtr_backend *b = NULL;
    struct qtr_error err = {0};
    device = argv[1];
    enum qtr_status status = qtr_backend_open(device, NULL, &b, &err);
    qtr_backend_close(b);
    if (status) {
      (void)fprintf(stderr, "%s\n", err.message);
      return status == QTR_ERR_UNSUPPORTED || status == QTR_ERR_NOT_FOUND ? 77 : 1;
    }
  }
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_settings),
                                     cmocka_unit_test(test_conversation),
                                     cmocka_unit_test(test_dense),
                                     cmocka_unit_test(test_memory),
                                     cmocka_unit_test(test_memory_is_exact),
                                     cmocka_unit_test(test_same_model),
                                     cmocka_unit_test(test_tensor_core_heads),
                                     cmocka_unit_test(test_bad_options)};
  return cmocka_run_group_tests(tests, write_heads, remove_heads);
}
