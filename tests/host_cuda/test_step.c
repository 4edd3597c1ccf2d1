/* test_step.c - step.c on a runtime of the host: sequences come and end, prompts go in chunks, one or two steps are under
 * way, tokens go from one to the next on the "device" only, arrays grow, some a little each step, graphs are captured and
 * launched, and the caller's arrays are spoiled after each launch. Every token must be the one that a sequence alone would
 * get. */
#include "host_cuda.h"

#include "base/checked.h"
#include "base/status.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { SEQS = 300, LEN = 640, BLOCKS = LEN / PAGE + 1, ROWS = 512, TOKENS = 1024, ROUNDS = 1500 };

struct sequence {
  bool lives;
  int32_t n_most, n_computed, n, n_pending, token[LEN];
};

struct pass {
  bool launched;
  struct qtr_batch batch;
  int32_t token[TOKENS], position[TOKENS], q_start[SEQS + 1], kv_len[SEQS], logit_row[ROWS], block_table[SEQS * BLOCKS];
  struct qtr_choose_row choose[ROWS];
  struct qtr_choose_result chosen[ROWS];
  struct qtr_choose_adjust adjust[SEQS * LEN];
  struct sequence *row_seq[ROWS];
};

static struct sequence sequences[SEQS];
static struct pass passes[2];
static uint32_t random_state = 1;
static struct qtr_cuda cuda = {.n_sms = 4};
static struct qtr_kv kv = {.config = {.n_pages = SEQS * BLOCKS}};
static int32_t x[TOKENS], y[TOKENS];
static float logits[ROWS];
static long n_tokens, n_steps, n_two;

static int32_t below(uint32_t n) {
  random_state = random_state * 1664525u + 1013904223u;
  return (int32_t)((random_state >> 8) % n);
}

static void come(int32_t n) {
  for (struct sequence *s = sequences; s < sequences + SEQS && n > 0; s++) {
    if (s->lives) continue;
    *s = (struct sequence){.lives = true, .n = 1 + below(200)};
    s->n_most = s->n + 1 + below(LEN - 210);
    for (int32_t i = 0; i < s->n; i++) s->token[i] = below(1000);
    n--;
  }
}

/* What the engine's scheduler does, in short. A sequence has its own pages; the next one in its place takes them over. */
static void plan(struct pass *p) {
  struct qtr_batch *b = &p->batch;
  int32_t budget = 60 + below(400);
  *b = (struct qtr_batch){.token = p->token,
                          .position = p->position,
                          .q_start = p->q_start,
                          .kv_len = p->kv_len,
                          .block_table = p->block_table,
                          .logit_row = p->logit_row,
                          .max_blocks = BLOCKS,
                          .room_tokens = TOKENS,
                          .room_rows = n_steps > 50 && below(2) ? ROWS : 0, /* results grow first, with tokens in them */
                          .choose = p->choose,
                          .chosen = p->chosen,
                          .adjust = p->adjust};
  for (int32_t i = 0; i < SEQS && budget > 0; i++) {
    struct sequence *s = &sequences[i];
    int32_t n = QTR_MIN(s->n - s->n_computed, budget);
    if (!s->lives || n == 0 || s->n == s->n_most || below(40) == 0) continue;
    p->q_start[b->n_seqs] = b->n_tokens;
    p->kv_len[b->n_seqs] = s->n_computed;
    for (int32_t k = 0; k < BLOCKS; k++) p->block_table[b->n_seqs * BLOCKS + k] = i * BLOCKS + k;
    for (int32_t k = 0; k < n; k++) {
      p->token[b->n_tokens] = s->token[s->n_computed];
      p->position[b->n_tokens++] = s->n_computed++;
    }
    b->n_seqs++;
    budget -= n;
    if (s->n_computed < s->n) continue;
    int32_t row = b->n_logit_rows++;
    p->logit_row[row] = b->n_tokens - 1;
    p->row_seq[row] = s;
    p->choose[row] = (struct qtr_choose_row){.position = (uint64_t)s->n, .top_k = -1, .top_p = 1, .n_top = -1};
    p->choose[row].first_adjust = b->n_adjust; /* as with penalties: one for each token so far */
    p->choose[row].n_adjust = s->n;
    for (int32_t k = 0; k < s->n; k++) p->adjust[b->n_adjust++].token = k;
    s->token[s->n++] = -1 - row;
    s->n_pending++;
  }
  p->q_start[b->n_seqs] = b->n_tokens;
}

static void launch(struct pass *p) {
  static const float inv_freq[4] = {1, 1, 1, 1};
  static const struct qtr_table table;
  struct qtr_backend *b = &cuda.base;
  struct qtr_error err = {0};
  if (qtr_cuda_begin_step(b, &p->batch, inv_freq, 4, &err)) fail_msg("%s", err.message);
  qtr_cuda_embed(b, &(struct qtr_embed_args){.table = &table, .out = x});
  qtr_cuda_rope_kv(b, &(struct qtr_rope_kv_args){.qkv = x, .kv = &kv, .n_heads = 1, .n_kv_heads = 1, .head_dim = 8});
  if (below(200) == 0) qtr_cuda_flush(&cuda); /* a step in two parts */
  qtr_cuda_attend(b,
                  &(struct qtr_attention_args){.qkv = x, .kv = &kv, .out = y, .n_heads = 1, .n_kv_heads = 1, .head_dim = 8});
  if (p->batch.n_logit_rows > 0) {
    qtr_cuda_gather(b, &(struct qtr_gather_args){.x = y, .out = logits, .dim = 1});
    qtr_cuda_choose(b, &(struct qtr_choose_args){.logits = logits,
                                                 .row = p->choose,
                                                 .result = p->chosen,
                                                 .adjust = p->adjust,
                                                 .n_adjust = p->batch.n_adjust,
                                                 .n_rows = p->batch.n_logit_rows,
                                                 .vocab_size = 1});
  }
  if (qtr_cuda_launch(b, &err)) fail_msg("%s", err.message);
  memset(p->token, 0xaa, sizeof p->token);
  memset(p->position, 0xaa, sizeof p->position);
  memset(p->q_start, 0xaa, sizeof p->q_start);
  memset(p->kv_len, 0xaa, sizeof p->kv_len);
  memset(p->logit_row, 0xaa, sizeof p->logit_row);
  memset(p->block_table, 0xaa, sizeof p->block_table);
  memset(p->choose, 0xaa, sizeof p->choose);
  memset(p->chosen, 0xaa, sizeof p->chosen);
  memset(p->adjust, 0xaa, (size_t)p->batch.n_adjust * sizeof *p->adjust);
  p->launched = true;
  n_steps++;
}

static void collect(struct pass *p) {
  struct qtr_error err = {0};
  if (qtr_cuda_collect(&cuda.base, &err)) fail_msg("%s", err.message);
  p->launched = false;
  for (int32_t i = 0; i < p->batch.n_logit_rows; i++) {
    struct sequence *s = p->row_seq[i];
    int32_t at = s->n - s->n_pending--;
    assert_int_equal(p->chosen[i].token, host_next(host_digest(s->token, at), s->token[at - 1], (uint64_t)at));
    s->token[at] = p->chosen[i].token;
    n_tokens++;
    if (s->n == s->n_most && s->n_pending == 0) s->lives = false;
  }
}

static void test_steps(void **unused) {
  (void)unused;
  struct qtr_error err = {0};
  kv.data = calloc((size_t)(kv.config.n_pages + 1) * PAGE, sizeof(int32_t)); /* the spare page too */
  assert_non_null(kv.data);
  if (qtr_cuda_step_create(&cuda, &err)) fail_msg("%s", err.message);
  struct pass *first = &passes[0]; /* of those under way, or the next */
  for (int round = 0; round < ROUNDS || first->launched; round++) {
    if (round < ROUNDS - 100 && below(3) == 0) come(1 + (round % 500 == 499 ? 60 : below(4)));
    for (int k = 0; k < 2; k++) {
      struct pass *p = first->launched ? &passes[first == &passes[0]] : first;
      if (p->launched || (k == 1 && below(5) == 0)) break;
      plan(p);
      if (p->batch.n_tokens == 0) break;
      launch(p);
    }
    n_two += passes[0].launched && passes[1].launched;
    if (!first->launched) continue;
    collect(first);
    first = &passes[first == &passes[0]];
  }
  double busy, idle;
  qtr_cuda_busy_read(&cuda.base, &busy, &idle);
  print_message("%ld steps, %ld with two under way, %ld tokens; %d captures, %d launches of graphs\n", n_steps, n_two,
                n_tokens, host_captures, host_graph_launches);
  assert_int_equal(host_wrong, 0);
  assert_true(n_two > n_steps / 2 && host_captures > 10 && host_graph_launches > 400 && busy > 0 && idle > 0);
  assert_int_equal(qtr_cuda_collect(&cuda.base, &err), QTR_ERR_STATE);
  qtr_cuda_step_free(&cuda);
  free(kv.data);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_steps)};
  host_start();
  return cmocka_run_group_tests(tests, NULL, NULL);
}
