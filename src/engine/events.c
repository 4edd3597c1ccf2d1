/* events.c - the queue between the step and whoever polls. Nodes are used again with their text buffers, so a steady state
 * allocates nothing; what is queued is bounded by what the requests produce. Guarded by the engine's mutex. */
#include "engine/engine_internal.h"

#include <stdlib.h>

#define MAX_SPARE 4096 /* nodes kept for later; a burst beyond it gives its memory back */

struct qtr_event_node *qtr_event_take(struct qtr_event_queue *q) {
  struct qtr_event_node *node = q->spare;
  if (node) {
    q->spare = node->next;
    q->n_spare--;
  } else {
    node = calloc(1, sizeof *node);
    if (!node) return NULL;
  }
  node->next = NULL;
  node->event = (struct qtr_event){.token = -1};
  node->text.len = 0;
  return node;
}

static void node_free(struct qtr_event_node *node) {
  if (!node) return;
  qtr_text_free(&node->text);
  free(node);
}

void qtr_event_recycle(struct qtr_event_queue *q, struct qtr_event_node *node) {
  if (!node) return;
  if (q->n_spare >= MAX_SPARE) {
    node_free(node);
    return;
  }
  node->next = q->spare;
  q->spare = node;
  q->n_spare++;
}

void qtr_event_push(struct qtr_event_queue *q, struct qtr_event_node *node) {
  node->next = NULL;
  if (q->last)
    q->last->next = node;
  else
    q->first = node;
  q->last = node;
}

bool qtr_event_pop(struct qtr_event_queue *q, struct qtr_event *event) {
  struct qtr_event_node *node = q->first;
  if (!node) return false;
  q->first = node->next;
  if (!q->first) q->last = NULL;
  qtr_event_recycle(q, q->polled);
  q->polled = node;
  node->event.text = node->text.len > 0 ? node->text.data : "";
  node->event.text_len = node->text.len;
  node->event.top_logprob = node->event.n_top_logprob > 0 ? node->top : NULL;
  *event = node->event;
  return true;
}

static void list_free(struct qtr_event_node *node) {
  while (node) {
    struct qtr_event_node *next = node->next;
    node_free(node);
    node = next;
  }
}

void qtr_event_queue_free(struct qtr_event_queue *q) {
  list_free(q->first);
  list_free(q->spare);
  node_free(q->polled);
}
