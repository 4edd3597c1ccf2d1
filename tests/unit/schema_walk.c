/* schema_walk.c - random walks through the automata of schemas, for tests/e2e/oracle_schema.py: schema_walk N SEED. Each
 * line of stdin is a JSON Schema, and gives a line: {"error": why it is refused} or {"texts": [… at most N texts that may
 * end …], "dead": how many walks came to where nothing may follow}. A walk that grows too long tries to end, then is given
 * up. */
#include "server/buffer.h"
#include "server/schema.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_BYTES 4000
#define PATIENCE 60 /* bytes before a walk begins to look for its end */

static uint32_t seed;

static uint32_t draw(uint32_t n) {
  seed = seed * 1664525u + 1013904223u;
  return (uint32_t)((uint64_t)(seed >> 4) * n >> 28);
}

/* Writes a text; returns its length, -1: given up, -2: a dead end. */
static long walk(struct qtr_grammar *g, char *text) {
  int32_t at = qtr_grammar_start(g);
  bool hasty = draw(4) == 0; /* some are short from the beginning */
  for (long n = 0; n < MOST_BYTES;) {
    unsigned char can[256];
    uint32_t n_can = 0, n_ends = 0;
    unsigned char ends[8];
    for (int c = 0; c < 256; c++) {
      if (qtr_grammar_next(g, at, (unsigned char)c) == QTR_GRAMMAR_DEAD) continue;
      can[n_can++] = (unsigned char)c;
      if (strchr("\"]}", c) && c) ends[n_ends++] = (unsigned char)c;
    }
    bool accepts = qtr_grammar_accepts(g, at);
    if (qtr_grammar_failed(g)) return -1;
    if (n_can == 0) return accepts ? n : -2;
    bool end = hasty || draw(PATIENCE) < (uint32_t)n;
    if (accepts && (end || draw(3) == 0)) return n;
    unsigned char c = end && n_ends > 0 ? ends[draw(n_ends)] : can[draw(n_can)];
    if (n_can > 20 && draw(3) > 0) { /* more of what people write */
      unsigned char wanted = (unsigned char)(32 + draw(95));
      if (qtr_grammar_next(g, at, wanted) != QTR_GRAMMAR_DEAD) c = end && n_ends > 0 ? c : wanted;
    }
    text[n++] = (char)c;
    at = qtr_grammar_next(g, at, c);
  }
  return -1;
}

int main(int argc, char **argv) {
  char *line = NULL;
  size_t size = 0;
  int n_texts = argc > 1 ? atoi(argv[1]) : 10;
  seed = argc > 2 ? (uint32_t)strtoul(argv[2], NULL, 10) : 1;
  for (ssize_t len; (len = getline(&line, &size, stdin)) > 0;) {
    struct qtr_api_error err = {0};
    struct qtr_grammar *g = NULL;
    struct qtr_buffer out = {0};
    json_t *schema = json_loadb(line, (size_t)len, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
    if (!schema || !qtr_grammar_from_schema(schema, "schema", &g, &err)) {
      qtr_buffer_puts(&out, "{\"error\":");
      const char *why = schema ? err.message : "not JSON";
      qtr_buffer_string(&out, why, strlen(why));
    } else {
      char text[MOST_BYTES];
      int n_dead = 0, n = 0;
      qtr_buffer_puts(&out, "{\"texts\":[");
      for (int i = 0; i < n_texts; i++) {
        long got = walk(g, text);
        n_dead += got == -2;
        if (got < 0) continue;
        if (n++ > 0) qtr_buffer_puts(&out, ",");
        qtr_buffer_string(&out, text, (size_t)got);
      }
      qtr_buffer_printf(&out, "],\"dead\":%d", n_dead);
    }
    qtr_buffer_puts(&out, "}");
    (void)puts(out.data);
    qtr_buffer_free(&out);
    qtr_grammar_free(g);
    json_decref(schema);
  }
  free(line);
  return 0;
}
