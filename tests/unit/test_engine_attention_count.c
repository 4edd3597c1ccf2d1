/* test_engine_attention_count.c - the bytes and operations of attention in a profile, against the keys that each query of
 * each step sees, marked one by one by the definition (struct qtr_kv_sparse) and by the pages that the backend has chosen.
 */
#include "backend/common/sparse.h"
#include "engine_fixture.h"

enum { LAYERS = 3, HEADS = 4, GROUP = 2, DIM = 16, MAX_LEN = 1200 };

static const double table[LAYERS * HEADS] = {0, 0.1, 0, 0.05, 1, 0.9, 0.2, 1, 0.8, 0.3, 1, 0.95};

static struct qtr_model *make_model(void) {
  const struct qtr_config config = {.hidden_size = 64,
                                    .intermediate_size = 64,
                                    .n_layers = LAYERS,
                                    .n_heads = GROUP * HEADS,
                                    .n_kv_heads = HEADS,
                                    .head_dim = DIM,
                                    .max_position_embeddings = MAX_LEN};
  return tiny_model_shaped("cpu", config, QTR_LINEAR_W8A8, false, 5);
}

struct expected {
  double keys, pairs, logical; /* KV head x key; query head x key; KV head x logical page */
  bool bounds;                 /* keys: at most that many */
};

/* One KV head of one layer, over one sequence of the step that has just been. */
static void count_head(struct qtr_engine *e, int32_t layer, int32_t head, int32_t seq, struct expected *x) {
  const struct qtr_batch *b = last_batch(e);
  const struct qtr_kv_heads *h = e->model->backend->ops->kv_heads(e->kv);
  const struct qtr_kv_sparse *s = &h->sparse;
  static bool seen[MAX_LEN], own[MAX_LEN];
  bool streaming = qtr_kv_head_class(h, layer, head) == QTR_HEAD_STREAMING;
  int32_t decode_start = b->decode_start ? b->decode_start[seq] : INT32_MAX;
  int32_t n = b->q_start[seq + 1] - b->q_start[seq], last = b->kv_len[seq] + n - 1, n_selecting = 0;
  memset(seen, 0, sizeof seen);
  for (int32_t p = b->kv_len[seq]; p <= last; p++) {
    bool selects = !streaming && s->budget > 0 && p >= decode_start && p >= s->budget;
    n_selecting += selects;
    for (int32_t g = 0; g < GROUP; g++) {
      memset(own, 0, sizeof own);
      if (selects && p == last) { /* what the backend remembers is the last query's */
        int32_t page[64], n_pages, tail;
        e->model->backend->ops->selection_read(e->model->backend, e->kv, layer, head * GROUP + g, b->slot[seq], page,
                                               &n_pages, &tail);
        for (int32_t t = 0; t <= p; t++) {
          own[t] = t / 64 >= tail;
          for (int32_t i = 0; i < n_pages; i++) own[t] |= page[i] == t / 64;
        }
        int32_t first = decode_start > s->budget ? decode_start : s->budget;
        bool renewed = p == first || (p + 1) % s->interval == 0;
        if (renewed && g == 0 && p / 64 >= (s->budget / 64 > 3 ? s->budget / 64 : 3)) {
          assert_int_equal(tail, p / 64);
          x->logical += (tail - 1) * (64 / s->logical_tokens);
        }
      } else {
        const struct qtr_kv_window *w = p >= decode_start ? &s->decode : &s->context;
        for (int32_t t = 0; t <= p; t++) own[t] = !streaming || t < w->sink || p - t < w->local;
      }
      for (int32_t t = 0; t <= p; t++) x->pairs += own[t];
      for (int32_t t = 0; t <= p; t++) seen[t] |= own[t];
    }
  }
  x->bounds |= (n_selecting > 0 && s->each_head); /* each head's own choice counts, although some pages are the same */
  assert_true(n_selecting <= 1);
  for (int32_t t = 0; t <= last; t++) x->keys += seen[t];
}

static void check(const struct qtr_sparse_options *sparse, const char *precision, size_t row) {
  struct qtr_engine_options o;
  struct qtr_error err = {0};
  struct qtr_profile profile = {0};
  static const int32_t prompts[] = {700, 90, 1000, 1}, outputs[] = {60, 170, 40, 30};
  int32_t token[MAX_LEN];
  qtr_engine_options_init(&o);
  o.precision = precision;
  o.max_num_seqs = 4;
  o.max_model_len = MAX_LEN;
  o.max_num_batched_tokens = 150;
  o.kv_pages = 80;
  o.sparse = *sparse;
  o.sparse.heads = table;
  struct qtr_engine *e = tiny_engine(make_model(), &o);
  for (int32_t i = 0; i < MAX_LEN; i++) token[i] = i * 7 % TINY_VOCAB;
  for (size_t i = 0; i < 4; i++) {
    struct qtr_request_options r;
    uint64_t id;
    qtr_request_options_init(&r);
    r.prompt_token = token + i; /* others each, so that nothing is cached */
    r.n_prompt_token = (size_t)prompts[i];
    r.max_tokens = outputs[i];
    r.ignore_eos = true;
    r.sampling.temperature = 0;
    if (qtr_engine_add(e, &r, &id, &err)) fail_msg("%s", err.message);
  }
  e->model->profile = &profile;
  size_t n_steps = 0, n_without = 0;
  for (bool work = true; work; n_steps++) {
    const struct qtr_profile_entry before = profile.op[QTR_PROFILE_ATTENTION];
    if (qtr_engine_step(e, &work, &err)) fail_msg("%s", err.message);
    const struct qtr_profile_entry after = profile.op[QTR_PROFILE_ATTENTION];
    struct expected x = {0};
    const struct qtr_batch *b = last_batch(e);
    /* The last layer does without in a step that wants no logits and chooses no pages. */
    int32_t n_layers = LAYERS - (b->n_logit_rows == 0);
    for (int32_t i = 0; b->decode_start && i < b->n_seqs && b->n_logit_rows == 0; i++) {
      if (b->kv_len[i] + b->q_start[i + 1] - b->q_start[i] > b->decode_start[i]) n_layers = LAYERS;
    }
    n_without += n_layers < LAYERS;
    for (int32_t layer = 0; layer < n_layers; layer++) {
      for (int32_t head = 0; head < HEADS; head++) {
        for (int32_t seq = 0; seq < b->n_seqs; seq++) count_head(e, layer, head, seq, &x);
      }
    }
    double outputs_bytes = 2.0 * n_layers * b->n_tokens * GROUP * HEADS * DIM * sizeof(float);
    double bytes = x.keys * (double)row + x.logical * DIM * 4 + outputs_bytes;
    double ops = 4 * DIM * x.pairs + 4 * GROUP * DIM * x.logical;
    assert_int_equal(after.n_calls - before.n_calls, n_layers);
    assert_true(after.ops - before.ops == ops);
    if (x.bounds)
      assert_true(after.bytes - before.bytes >= bytes);
    else
      assert_true(after.bytes - before.bytes == bytes);
  }
  assert_true(n_steps > 150 && n_without > 3);
  e->model->profile = NULL;
  qtr_engine_close(e);
}

static void counts(void **state) {
  (void)state;
  static const struct qtr_sparse_options settings[] = {
      {0},
      {.static_sparsity = 0.5f, .context_mode = true, .ctx_sink = 20, .ctx_local = 100, .dec_sink = 64, .dec_local = 70},
      {.static_sparsity = 0.5f, .dec_sink = 30, .dec_local = 100},
      {.decode_mode = 1, .token_budget = 192, .selector_interval = 4, .sub_chunks = 4},
      {.decode_mode = 1, .token_budget = 256, .selector_interval = 5, .sub_chunks = 1, .each_head = true},
      {.static_sparsity = 0.6f,
       .context_mode = true,
       .ctx_sink = 130,
       .ctx_local = 30,
       .dec_sink = 3,
       .dec_local = 256,
       .decode_mode = 1,
       .token_budget = 256,
       .selector_interval = 7,
       .sub_chunks = 2},
      {.static_sparsity = 1, .context_mode = true, .ctx_sink = 0, .ctx_local = 64, .dec_sink = 0, .dec_local = 64}};
  for (size_t i = 0; i < sizeof settings / sizeof settings[0]; i++)
    check(&settings[i], i % 2 ? "w8a8kv4" : "w8a8kv8", i % 2 ? 2 * (DIM / 2 + 4) : 2 * (DIM + 4));
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(counts)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
