/* scheduler.c - which tokens the next step computes (architecture.md "Scheduler"; it replaces spec D.10).
 *
 * One order rules everything: priority, then arrival, then the number of the completion. Running sequences decode first;
 * what is left of the token budget goes to prompts in chunks: first those that run, then the queue from its front. A
 * sequence gets the pages of all its tokens when it is admitted and one more whenever it crosses a page, so only decoding
 * can run out of them; then the last running sequence in the order gives its pages back and goes to its place in the queue
 * (recomputation, cheap as long as its published pages are still cached). A sequence is preempted only for one before it,
 * and any one fits the pool alone, so the first always gets on: nobody starves among equals. A higher priority takes what it
 * needs from lower ones.
 */
#include "base/checked.h"
#include "base/status.h"
#include "engine/engine_internal.h"

#include <stdlib.h>
#include <string.h>

static bool before(const struct qtr_sequence *a, const struct qtr_sequence *b) {
  const struct qtr_request *p = a->request, *q = b->request;
  if (p->priority != q->priority) return p->priority > q->priority;
  return p->id != q->id ? p->id < q->id : a->index < b->index;
}

static int32_t pages_for(int32_t n_tokens) { return (n_tokens + QTR_PAGE_TOKENS - 1) / QTR_PAGE_TOKENS; }

/* ---- queue and running set ----------------------------------------------------------------------- */

/* Arrivals belong to the back, preempted ones to the front: the search starts where it will end. */
static void queue_insert(struct qtr_engine *e, struct qtr_sequence *s, bool from_front) {
  struct qtr_sequence *prev;
  if (from_front) {
    struct qtr_sequence *next = e->waiting_first;
    prev = NULL;
    for (; next && before(next, s); next = next->next) prev = next;
  } else {
    prev = e->waiting_last;
    while (prev && before(s, prev)) prev = prev->prev;
  }
  s->prev = prev;
  s->next = prev ? prev->next : e->waiting_first;
  if (prev)
    prev->next = s;
  else
    e->waiting_first = s;
  if (s->next)
    s->next->prev = s;
  else
    e->waiting_last = s;
  s->state = QTR_SEQ_WAITING;
  e->n_waiting++;
}

static void queue_remove(struct qtr_engine *e, struct qtr_sequence *s) {
  if (s->prev)
    s->prev->next = s->next;
  else
    e->waiting_first = s->next;
  if (s->next)
    s->next->prev = s->prev;
  else
    e->waiting_last = s->prev;
  s->prev = s->next = NULL;
  e->n_waiting--;
}

static void running_insert(struct qtr_engine *e, struct qtr_sequence *s) {
  int32_t i = e->n_running++;
  for (; i > 0 && before(s, e->running[i - 1]); i--) e->running[i] = e->running[i - 1];
  e->running[i] = s;
  s->state = QTR_SEQ_RUNNING;
}

static void running_remove(struct qtr_engine *e, struct qtr_sequence *s) {
  int32_t i = 0;
  while (e->running[i] != s) i++;
  e->n_running--;
  for (; i < e->n_running; i++) e->running[i] = e->running[i + 1];
}

/* From the last page to the first, as the pool wants it. */
static void release_pages(struct qtr_engine *e, struct qtr_sequence *s) {
  qtr_streams_release(e, s);
  if (s->slot >= 0) e->free_slot[e->n_free_slots++] = s->slot;
  s->slot = -1;
  while (s->n_pages > 0) qtr_kv_pool_unref(e->pool, s->page[--s->n_pages]);
  s->n_computed = s->n_published = s->n_planned = 0;
}

void qtr_scheduler_add(struct qtr_engine *e, struct qtr_request *r) {
  for (int32_t i = 0; i < r->n_sequences; i++) queue_insert(e, &r->sequence[i], false);
}

/* Takes a sequence out of the steps that are under way: what they compute for it is dropped. */
static void forget(struct qtr_engine *e, const struct qtr_sequence *s) {
  for (struct qtr_pass *pass = e->pass; pass < e->pass + QTR_STEPS_UNDER_WAY; pass++) {
    if (!pass->launched) continue;
    for (int32_t i = 0; i < pass->batch.n_seqs; i++) {
      if (pass->batch_seq[i] == s) pass->batch_seq[i] = NULL;
    }
    for (int32_t i = 0; i < pass->batch.n_logit_rows; i++) {
      if (pass->row_seq[i] != s) continue;
      qtr_event_recycle(&e->events, pass->row_node[i]);
      pass->row_node[i] = NULL;
      pass->row_seq[i] = NULL;
    }
  }
}

/* Takes a sequence out of everything. Its event is pushed by the caller. */
static void finish(struct qtr_engine *e, struct qtr_sequence *s) {
  forget(e, s);
  if (s->state == QTR_SEQ_RUNNING) {
    running_remove(e, s);
    release_pages(e, s);
  } else {
    queue_remove(e, s);
  }
  s->state = QTR_SEQ_FINISHED;
  qtr_event_recycle(&e->events, s->final);
  s->final = NULL;
  s->request->n_live--;
}

/* Ends a sequence with an event of its own. */
static void finish_with(struct qtr_engine *e, struct qtr_sequence *s, enum qtr_finish how) {
  struct qtr_event_node *node = s->final;
  s->final = NULL;
  finish(e, s);
  qtr_sequence_describe(s, &node->event);
  node->event.n_output_tokens = s->n_emitted;
  node->event.finish = how;
  qtr_event_push(&e->events, node);
}

/* Frees a request none of whose completions lives. */
static void retire(struct qtr_engine *e, struct qtr_request *r) {
  if (r->n_live > 0) return;
  struct qtr_request **link = &e->by_id[r->id % QTR_ID_SLOTS];
  while (*link != r) link = &(*link)->next;
  *link = r->next;
  e->stats.n_requests_finished++;
  qtr_request_free(r);
}

void qtr_scheduler_end(struct qtr_engine *e, struct qtr_request *r, enum qtr_finish how) {
  for (int32_t i = 0; i < r->n_sequences; i++) {
    if (r->sequence[i].state != QTR_SEQ_FINISHED) finish_with(e, &r->sequence[i], how);
  }
  retire(e, r);
}

/* ---- planning ------------------------------------------------------------------------------------ */

/* Is the sequence's last token pending? Then it ends with that, and there is nothing more to compute. */
static bool is_full(const struct qtr_sequence *s) { return s->n_tokens == s->request->n_prompt + s->request->max_tokens; }

/* Sends the last running sequence back to the queue and gives its share of the step back. */
static void preempt_last(struct qtr_engine *e, int32_t *budget) {
  struct qtr_sequence *s = e->running[--e->n_running];
  *budget += s->n_planned;
  release_pages(e, s);
  queue_insert(e, s, true);
  e->stats.n_preemptions++;
}

/* How many of `left` tokens a sequence computes in this step. Each sequence has a row of logits of its own; one that owes
 * log-probabilities of its prompt needs one for each token and takes at most half of the *rows that are left over, so that
 * others can still be admitted. What it has told before (it was preempted) needs none. */
static int32_t share(const struct qtr_sequence *s, int32_t left, int32_t budget, int32_t *rows) {
  int32_t n = QTR_MIN(left, budget);
  if (!qtr_sequence_scores(s)) return n;
  int32_t told = QTR_MAX(s->n_scored - s->n_computed, 0), most = *rows / 2;
  n = QTR_MIN(n, told + 1 + most);
  *rows -= QTR_MAX(n - told - 1, 0);
  return n;
}

/* Running sequences; `decode` chooses those with one token to compute or the others. Returns false when something was
 * preempted: pages are short, and nobody shall be admitted. */
static bool plan_running(struct qtr_engine *e, bool decode, int32_t *budget, int32_t *rows) {
  bool ample = true;
  for (int32_t i = 0; i<e->n_running && * budget> 0; i++) {
    struct qtr_sequence *s = e->running[i];
    int32_t left = s->n_tokens - s->n_computed;
    if ((left == 1) != decode || s->n_planned > 0) continue;
    if (is_full(s)) continue;
    while (s->state == QTR_SEQ_RUNNING && s->n_pages < pages_for(s->n_tokens)) {
      int32_t page = qtr_kv_pool_take(e->pool);
      if (page >= 0) {
        s->page[s->n_pages++] = page;
        continue;
      }
      preempt_last(e, budget); /* perhaps s itself, which then is the last */
      ample = false;
    }
    /* Fewer tokens where their streaming heads have no room for more. */
    int32_t n = 0;
    while (s->state == QTR_SEQ_RUNNING && (n = qtr_streams_take(e, s, QTR_MIN(left, *budget))) == 0) {
      preempt_last(e, budget);
      ample = false;
    }
    if (s->state != QTR_SEQ_RUNNING) break;
    s->n_planned = share(s, n, n, rows);
    *budget -= s->n_planned;
  }
  return ample;
}

/* Pages for all tokens of a waiting sequence, cached ones first, and for the streaming heads of the first `budget` tokens.
 * False: not enough. The last token is always computed anew, for its logits. One page in a hundred stays free for those that
 * run, lest an admission preempts them at once. */
static bool take_pages(struct qtr_engine *e, struct qtr_sequence *s, int32_t budget) {
  int32_t total = pages_for(s->n_tokens), spare = e->n_running > 0 ? e->n_pages / 100 : 0;
  int32_t most = qtr_sequence_scores(s) ? s->n_scored : s->n_tokens - 1; /* what must be told must be computed */
  if (e->tells_apart) most = QTR_MIN(most, s->request->n_prompt);        /* elsewhere the same tokens may have been given */
  s->n_pages = qtr_kv_pool_match(e->pool, 0, s->token, (size_t)most, s->page, total);
  qtr_streams_match(e, s);
  s->n_published = s->n_pages;
  s->n_computed = s->n_pages * QTR_PAGE_TOKENS;
  int32_t first = QTR_MIN(s->n_tokens - s->n_computed, budget),
          stream_spare = e->n_running > 0 ? e->n_stream_pages / 100 : 0;
  if (qtr_kv_pool_available(e->pool) < total - s->n_pages + spare ||
      (e->streams && qtr_kv_pool_stream_available(e->pool) < qtr_streams_missing(e, s, first) + stream_spare)) {
    release_pages(e, s);
    return false;
  }
  while (s->n_pages < total) s->page[s->n_pages++] = qtr_kv_pool_take(e->pool);
  return true;
}

/* Admits from the queue in order. The first that does not fit holds up the rest, so that large ones get their turn. */
static void admit(struct qtr_engine *e, int32_t *budget, int32_t *rows) {
  struct qtr_sequence *next;
  for (struct qtr_sequence *s = e->waiting_first; s && *budget > 0; s = next) {
    next = s->next;
    struct qtr_request *r = s->request;
    /* Further completions wait until the first has published the prompt, then share its pages. */
    if (s->index > 0 && (e->prefix_cache || r->prompt_logprobs) && !r->prefilled) continue;
    if (is_full(s)) continue;       /* preempted just now */
    if (!qtr_sequence_prepare(s)) { /* out of memory: this one ends, its siblings need not wait for it */
      r->prefilled = true;
      finish_with(e, s, QTR_FINISH_ERROR);
      retire(e, r);
      continue;
    }
    if (e->n_running < e->max_num_seqs && *rows == 0) return; /* the next step has some again */
    while (e->n_running == e->max_num_seqs || !take_pages(e, s, *budget)) {
      if (e->n_running == 0 || e->running[e->n_running - 1]->request->priority >= r->priority) return;
      preempt_last(e, budget);
      (*rows)++;
    }
    next = s->next; /* perhaps one of those preempted just now */
    queue_remove(e, s);
    running_insert(e, s);
    if (s->n_cached < 0) {
      s->n_cached = s->n_computed;
      e->stats.n_prompt_tokens += (uint64_t)r->n_prompt;
      e->stats.n_cached_tokens += (uint64_t)s->n_cached;
    }
    (*rows)--;
    s->slot = e->free_slot[--e->n_free_slots];
    int32_t n = qtr_streams_take(e, s, QTR_MIN(s->n_tokens - s->n_computed, *budget));
    s->n_planned = share(s, n, n, rows);
    *budget -= s->n_planned;
  }
}

/* A row of logits after the token at this place of the batch. target: see row_target. */
static void add_row(struct qtr_pass *pass, struct qtr_sequence *s, int32_t place, int32_t target) {
  int32_t i = pass->batch.n_logit_rows++;
  pass->row_seq[i] = s;
  pass->row_target[i] = target;
  pass->row_node[i] = NULL;
  pass->logit_row[i] = place;
}

/* Lays the planned tokens out as a batch. */
static void build_batch(struct qtr_engine *e, struct qtr_pass *pass) {
  struct qtr_batch *b = &pass->batch;
  *b = (struct qtr_batch){.token = pass->token,
                          .position = pass->position,
                          .q_start = pass->q_start,
                          .kv_len = pass->kv_len,
                          .block_table = pass->block_table,
                          .logit_row = pass->logit_row,
                          .stream_table = e->streams ? pass->stream_table : NULL,
                          .decode_start = pass->decode_start,
                          .slot = e->tells_apart ? pass->slot : NULL};
  for (int32_t i = 0; i < e->n_running; i++) {
    const struct qtr_sequence *s = e->running[i];
    if (s->n_planned > 0) b->max_blocks = QTR_MAX(b->max_blocks, pages_for(s->n_computed + s->n_planned));
  }
  for (int32_t i = 0; i < e->n_running; i++) {
    struct qtr_sequence *s = e->running[i];
    if (s->n_planned == 0) continue;
    size_t at = (size_t)b->n_seqs * (size_t)b->max_blocks;
    int32_t n_blocks = pages_for(s->n_computed + s->n_planned);
    for (int32_t k = 0; k < b->max_blocks; k++) pass->block_table[at + (size_t)k] = k < n_blocks ? s->page[k] : 0;
    for (int32_t k = 0; e->streams && k < b->max_blocks; k++)
      pass->stream_table[at + (size_t)k] = k < n_blocks ? s->stream[k] : -1;
    pass->decode_start[b->n_seqs] = s->request->n_prompt;
    pass->slot[b->n_seqs] = s->slot;
    for (int32_t k = 0; k < s->n_planned; k++) {
      pass->token[b->n_tokens + k] = s->token[s->n_computed + k];
      pass->position[b->n_tokens + k] = s->n_computed + k;
    }
    pass->q_start[b->n_seqs] = b->n_tokens;
    pass->kv_len[b->n_seqs] = s->n_computed;
    pass->batch_seq[b->n_seqs++] = s;
    if (qtr_sequence_scores(s)) {
      int32_t last = QTR_MIN(s->n_computed + s->n_planned, s->request->n_prompt - 1);
      for (int32_t target = QTR_MAX(s->n_scored, s->n_computed) + 1; target <= last; target++) {
        add_row(pass, s, b->n_tokens + target - 1 - s->n_computed, target);
      }
    }
    b->n_tokens += s->n_planned;
    if (s->n_computed + s->n_planned == s->n_tokens) add_row(pass, s, b->n_tokens - 1, 0);
  }
  pass->q_start[b->n_seqs] = b->n_tokens;
}

void qtr_scheduler_plan(struct qtr_engine *e, struct qtr_pass *pass) {
  int32_t budget = e->max_num_batched_tokens, rows = e->max_rows - e->n_running;
  for (int32_t i = 0; i < e->n_running; i++) e->running[i]->n_planned = 0;
  bool ample = plan_running(e, true, &budget, &rows);
  ample = plan_running(e, false, &budget, &rows) && ample;
  if (ample) admit(e, &budget, &rows);
  build_batch(e, pass);
}

/* ---- afterwards ---------------------------------------------------------------------------------- */

/* Publishes the pages that are filled, and whose tokens are known. Where the same content is known already, its page
 * replaces ours: nothing is stored twice, and the chain stays whole for the pages to come. Pages with generated tokens stay
 * private where those see otherwise than given ones: the same text in a prompt has other keys and values. */
static void publish_pages(struct qtr_engine *e, struct qtr_sequence *s) {
  int32_t n = QTR_MIN(s->n_computed, qtr_sequence_known(s));
  if (e->tells_apart) n = QTR_MIN(n, s->request->n_prompt);
  for (; s->n_published < n / QTR_PAGE_TOKENS; s->n_published++) {
    int32_t i = s->n_published, own = s->page[i];
    int32_t known =
        qtr_kv_pool_publish(e->pool, 0, own, i > 0 ? s->page[i - 1] : -1, s->token + (size_t)i * QTR_PAGE_TOKENS);
    if (known != own) {
      qtr_kv_pool_ref(e->pool, known);
      qtr_kv_pool_unref(e->pool, own);
      s->page[i] = known;
    }
    qtr_streams_publish(e, s, i);
  }
}

void qtr_scheduler_launched(struct qtr_engine *e, struct qtr_pass *pass) {
  pass->launched = true;
  for (int32_t i = 0; i < pass->batch.n_seqs; i++) {
    struct qtr_sequence *s = pass->batch_seq[i];
    s->n_computed += s->n_planned;
    s->n_planned = 0;
    publish_pages(e, s); /* who shares them runs behind */
    if (s->n_computed >= s->request->n_prompt) s->request->prefilled = true;
  }
  for (int32_t i = 0; i < pass->batch.n_logit_rows; i++) {
    struct qtr_sequence *s = pass->row_seq[i];
    if (pass->row_target[i] != 0) continue;
    s->token[s->n_tokens++] = -1 - i;
    s->n_pending++;
  }
}

/* The sequence goes back to its last known token, whose logits are gone; what runs behind them is dropped. */
static void go_back(struct qtr_engine *e, struct qtr_sequence *s) {
  forget(e, s);
  s->look = true;
  s->n_tokens = qtr_sequence_known(s);
  s->n_pending = 0;
  if (s->state == QTR_SEQ_RUNNING) s->n_computed = QTR_MIN(s->n_computed, s->n_tokens - 1);
}

void qtr_scheduler_commit(struct qtr_engine *e, struct qtr_pass *pass) {
  pass->launched = false;
  for (int32_t i = 0; i < pass->batch.n_logit_rows; i++) {
    if (pass->row_seq[i] && pass->row_target[i] == QTR_ROW_LOST) go_back(e, pass->row_seq[i]);
  }
  for (int32_t i = 0; i < pass->batch.n_seqs; i++) {
    struct qtr_sequence *s = pass->batch_seq[i];
    if (!s || s->state != QTR_SEQ_RUNNING) continue; /* ended, or preempted since the launch */
    publish_pages(e, s);                             /* that a token which is known now completes */
    qtr_streams_let_go(e, s);
  }
  for (int32_t i = 0; i < pass->batch.n_logit_rows; i++) {
    struct qtr_sequence *s = pass->row_seq[i];
    struct qtr_event_node *node = pass->row_node[i];
    pass->row_node[i] = NULL;
    if (!s) continue;
    struct qtr_request *r = s->request;
    if (r->cancelled || pass->row_target[i] == QTR_ROW_LOST) { /* the end of a cancelled one follows, and nothing else */
      qtr_event_recycle(&e->events, node);
      continue;
    }
    if (pass->row_target[i] > 0) {
      s->n_scored = pass->row_target[i];
      qtr_event_push(&e->events, node);
      continue;
    }
    s->n_emitted = node->event.n_output_tokens;
    e->stats.n_output_tokens += node->event.token >= 0;
    node->event.finish = s->finish;
    qtr_event_push(&e->events, node);
    if (s->finish == QTR_FINISH_NONE) continue;
    finish(e, s);
    retire(e, r);
  }
}
