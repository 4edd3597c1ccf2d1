/* text.c - the growing NUL-terminated string that tokenizers, detokenizers and templates write into (tokenizer.h). */
#include "base/checked.h"
#include "base/status.h"
#include "text/tokenizer.h"

#include <stdlib.h>
#include <string.h>

enum qtr_status qtr_text_append(struct qtr_text *text, const char *data, size_t len, struct qtr_error *err) {
  size_t need;
  if (qtr_add_overflow(text->len, len, &need) || qtr_add_overflow(need, 1, &need)) {
    return qtr_fail_memory(err, "text", len);
  }
  if (need > text->capacity) {
    size_t capacity = QTR_MAX(need, 64);
    if (text->capacity <= SIZE_MAX / 2) capacity = QTR_MAX(capacity, text->capacity + text->capacity / 2);
    char *grown = realloc(text->data, capacity);
    if (!grown) return qtr_fail_memory(err, "text", capacity);
    text->data = grown;
    text->capacity = capacity;
  }
  if (len > 0) memcpy(text->data + text->len, data, len);
  text->len += len;
  text->data[text->len] = 0;
  return QTR_OK;
}

void qtr_text_free(struct qtr_text *text) {
  free(text->data);
  *text = (struct qtr_text){0};
}
