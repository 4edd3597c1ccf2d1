/* fuzz_eval_longbench.c - a word list, an empty line, then lines of a LongBench file: parsed as questions and as
 * predictions, and scored by every task. */
#include "eval/longbench.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  const char *text = (const char *)data, *end = text + size;
  const char *gap = size ? memmem(text, size, "\n\n", 2) : NULL;
  struct qtr_segmenter *words = NULL;
  if (gap) {
    (void)qtr_segmenter_parse(text, (size_t)(gap - text), "words", &words, NULL);
    text = gap + 2;
  }
  for (int lines = 0; text < end && lines < 16; lines++) {
    const char *newline = memchr(text, '\n', (size_t)(end - text));
    size_t len = newline ? (size_t)(newline - text) : (size_t)(end - text);
    for (int predicted = 0; predicted < 2; predicted++) {
      struct qtr_longbench_item item;
      if (qtr_longbench_item_parse(text, len, predicted, &item, NULL)) continue;
      for (size_t t = 0; t < QTR_LONGBENCH_N_TASKS; t++) {
        const struct qtr_string answer = predicted ? item.prediction : item.context;
        double score;
        enum qtr_status status =
            qtr_longbench_score(&qtr_longbench_tasks[t], &item, answer, t % 2 == 0, words, &score, NULL);
        if (!status && !(score >= 0 && score <= 1)) abort();
      }
      qtr_longbench_item_free(&item);
    }
    text += len + 1;
  }
  qtr_segmenter_free(words);
  return 0;
}
