/* haystack.c - sentences of a text and contexts put together from them (haystack.h). Sentences end at a full stop, question
 * or exclamation mark before white space (also the Chinese ones, without), and at empty lines; what goes on for longer than
 * MAX_SENTENCE bytes is cut between words, or where there are none between characters. */
#include "eval/haystack.h"

#include "base/checked.h"
#include "base/file.h"
#include "base/random.h"
#include "base/status.h"

#include <dirent.h>
#include <stdlib.h>
#include <string.h>

#define MAX_TEXT ((size_t)1 << 30)
#define MAX_SENTENCE 600

/* ---- sentences ---- */

static bool is_space(char c) { return c == ' ' || c == '\n' || c == '\t' || c == '\r'; }

/* Bytes of a closing mark at p, 0 when there is none: quotes and brackets that may follow the end of a sentence. */
static size_t closing(const char *p, const char *end) {
  if (*p == '"' || *p == '\'' || *p == ')' || *p == ']') return 1;
  if (end - p >= 3 && memcmp(p, "\xe2\x80", 2) == 0 && (p[2] == '\x9d' || p[2] == '\x99')) return 3; /* ” ’ */
  return 0;
}

/* Bytes of a mark that ends a sentence by itself: 。！？ */
static size_t wide_stop(const char *p, const char *end) {
  if (end - p < 3) return 0;
  if (memcmp(p, "\xe3\x80\x82", 3) == 0 || memcmp(p, "\xef\xbc\x81", 3) == 0 || memcmp(p, "\xef\xbc\x9f", 3) == 0) return 3;
  return 0;
}

static const char *skip_space(const char *p, const char *end) {
  while (p < end && is_space(*p)) p++;
  return p;
}

/* Where the sentence that begins at p ends: the beginning of the next one. */
static const char *sentence_end(const char *p, const char *end) {
  const char *last_space = NULL; /* after the last white space */
  for (const char *q = p; q < end; q++) {
    size_t wide = wide_stop(q, end);
    if (wide > 0) return skip_space(q + wide, end);
    if (*q == '.' || *q == '!' || *q == '?') {
      const char *after = q + 1;
      for (size_t n; after < end && (n = closing(after, end)) > 0; after += n) {
      }
      if (after == end || is_space(*after)) return skip_space(after, end);
    }
    if (*q == '\n' && q + 1 < end && q[1] == '\n') return skip_space(q, end);
    if (is_space(*q)) last_space = q + 1;
    if (q - p >= MAX_SENTENCE) {
      if (last_space) return last_space;
      if (((unsigned char)*q & 0xc0) != 0x80) return q; /* at the beginning of a character */
    }
  }
  return end;
}

static enum qtr_status split(struct qtr_engine *engine, struct qtr_haystack *h, struct qtr_error *err) {
  size_t capacity = 0;
  const char *end = h->text + h->len;
  enum qtr_status status = QTR_OK;
  for (const char *p = skip_space(h->text, end); p < end && !status;) {
    const char *next = sentence_end(p, end);
    if (h->n_sentences == capacity) {
      capacity = capacity ? capacity * 2 : 1024;
      struct qtr_sentence *more = realloc(h->sentence, capacity * sizeof *more);
      if (!more) return qtr_fail_memory(err, "sentences", capacity * sizeof *more);
      h->sentence = more;
    }
    int32_t *token = NULL;
    size_t n = 0;
    status = qtr_engine_tokenize(engine, p, (size_t)(next - p), false, false, &token, &n, err);
    free(token);
    h->sentence[h->n_sentences++] =
        (struct qtr_sentence){.offset = (size_t)(p - h->text), .len = (size_t)(next - p), .n_tokens = (int32_t)n};
    h->n_tokens += n;
    p = next;
  }
  return status;
}

enum qtr_status qtr_haystack_create(struct qtr_engine *engine, char *text, size_t len, struct qtr_haystack *h,
                                    struct qtr_error *err) {
  *h = (struct qtr_haystack){.text = text, .len = len};
  while (h->len > 0 && is_space(text[h->len - 1])) h->len--;
  text[h->len] = '\n'; /* so that the text may follow itself */
  text[h->len + 1] = '\n';
  h->len += h->len > 0 ? 2 : 0;
  enum qtr_status status = split(engine, h, err);
  if (!status && h->n_tokens == 0) status = qtr_fail(err, QTR_ERR_FORMAT, "the haystack is empty");
  if (status) qtr_haystack_free(h);
  return status;
}

void qtr_haystack_free(struct qtr_haystack *h) {
  free(h->text);
  free(h->sentence);
  *h = (struct qtr_haystack){0};
}

/* ---- where it comes from ---- */

static int is_text_file(const struct dirent *entry) {
  size_t n = strlen(entry->d_name);
  return n > 4 && entry->d_name[0] != '.' && strcmp(entry->d_name + n - 4, ".txt") == 0;
}

static int by_name(const struct dirent **a, const struct dirent **b) { return strcmp((*a)->d_name, (*b)->d_name); }

static enum qtr_status append_file(const char *path, struct qtr_text *text, struct qtr_error *err) {
  char *data;
  size_t len;
  enum qtr_status status = qtr_file_read(path, MAX_TEXT - text->len, &data, &len, err);
  if (status) return status;
  status = qtr_text_append(text, data, len, err);
  if (!status) status = qtr_text_append(text, "\n\n", 2, err);
  free(data);
  return status;
}

enum qtr_status qtr_haystack_read(struct qtr_engine *engine, const char *path, struct qtr_haystack *h,
                                  struct qtr_error *err) {
  struct qtr_text text = {0};
  enum qtr_status status = QTR_OK;
  if (qtr_dir_exists(path)) {
    struct dirent **entry = NULL;
    int n = scandir(path, &entry, is_text_file, by_name);
    if (n <= 0) status = qtr_fail(err, QTR_ERR_NOT_FOUND, "no *.txt files in %s", path);
    for (int i = 0; i < n; i++) {
      char *name = status ? NULL : qtr_path_join(path, entry[i]->d_name);
      if (!status) status = name ? append_file(name, &text, err) : qtr_fail_memory(err, "a path", 0);
      free(name);
      free(entry[i]);
    }
    free(entry);
  } else {
    status = append_file(path, &text, err);
  }
  if (status) {
    qtr_text_free(&text);
    return status;
  }
  status = qtr_haystack_create(engine, text.data, text.len - 2, h, err); /* two bytes of room: the last file's empty line */
  return status ? qtr_error_prefix(err, "%s", path) : QTR_OK;
}

static const char *const subjects[] = {
    "The old gardener", "A young teacher",    "My neighbour",       "The baker's son",
    "The captain",      "Our cousin",         "The tall postman",   "A quiet stranger",
    "The miller",       "The doctor's wife",  "An honest farmer",   "The little girl",
    "The shopkeeper",   "One of the sailors", "The village priest", "A travelling painter"};
static const char *const verbs[] = {"walked slowly",     "carried a basket",     "told a long story", "sat and rested",
                                    "sang an old song",  "read the newspaper",   "looked at the sky", "waited patiently",
                                    "met some friends",  "ate bread and cheese", "wrote a letter",    "mended a fence",
                                    "watched the birds", "fed the horses",       "counted the boats", "lit a small fire"};
static const char *const places[] = {
    "by the river",       "near the station",  "behind the church", "on the hill",
    "in the market",      "under the old oak", "at the harbour",    "beside the mill",
    "across the meadow",  "in the kitchen",    "along the road",    "at the edge of the forest",
    "outside the school", "on the bridge",     "in the garden",     "close to the lighthouse"};
static const char *const times[] = {"before breakfast",
                                    "on a cold morning",
                                    "until it grew dark",
                                    "after the rain",
                                    "for most of the day",
                                    "when the bells rang",
                                    "early in the spring",
                                    "late in the evening",
                                    "while the others worked",
                                    "as the sun went down",
                                    "without a word",
                                    "with great pleasure",
                                    "for the second time",
                                    "although it was windy",
                                    "as usual",
                                    "on the last day of the month"};

#define PICK(list) list[qtr_random_below(&state, sizeof list / sizeof list[0])]

enum qtr_status qtr_haystack_generate(struct qtr_engine *engine, uint64_t seed, size_t n_tokens, struct qtr_haystack *h,
                                      struct qtr_error *err) {
  uint64_t state = qtr_random_state(seed, 'h', 0, 0);
  struct qtr_text text = {0};
  enum qtr_status status = QTR_OK;
  /* a sentence has 12 words or so, each a token or more */
  for (size_t i = 0; i < n_tokens / 8 + 16 && !status; i++) {
    const char *const part[] = {PICK(subjects), " ", PICK(verbs), " ",
                                PICK(places),   " ", PICK(times), i % 8 == 7 ? ".\n\n" : ". "};
    for (size_t k = 0; k < sizeof part / sizeof part[0] && !status; k++) {
      status = qtr_text_append(&text, part[k], strlen(part[k]), err);
    }
  }
  if (!status) status = qtr_text_append(&text, "\n\n", 2, err);
  if (status) {
    qtr_text_free(&text);
    return status;
  }
  return qtr_haystack_create(engine, text.data, text.len - 2, h, err);
}

/* ---- contexts ---- */

static enum qtr_status append_insertion(struct qtr_text *out, const char *text, struct qtr_error *err) {
  size_t n = strlen(text);
  enum qtr_status status = QTR_OK;
  if (out->len > 0 && !is_space(out->data[out->len - 1]) && n > 0 && !is_space(text[0]))
    status = qtr_text_append(out, " ", 1, err);
  if (!status) status = qtr_text_append(out, text, n, err);
  if (!status && n > 0 && !is_space(text[n - 1])) status = qtr_text_append(out, " ", 1, err);
  return status;
}

enum qtr_status qtr_haystack_cut(const struct qtr_haystack *h, size_t first, size_t n_tokens,
                                 const struct qtr_insertion *insertion, size_t n_insertions, struct qtr_text *out,
                                 struct qtr_error *err) {
  size_t n_taken = 0, total = 0; /* sentences, their tokens */
  for (size_t i = first; total + (size_t)h->sentence[i % h->n_sentences].n_tokens <= n_tokens; i++, n_taken++) {
    total += (size_t)h->sentence[i % h->n_sentences].n_tokens;
    if (n_taken > n_tokens) break; /* sentences without tokens */
  }
  size_t next = 0, done = 0; /* insertions, tokens */
  enum qtr_status status = QTR_OK;
  for (size_t i = 0; i <= n_taken && !status; i++) {
    const struct qtr_sentence *s = &h->sentence[(first + i) % h->n_sentences];
    size_t half = i < n_taken ? (size_t)s->n_tokens / 2 : SIZE_MAX / 2; /* everything else comes at the end */
    while (next < n_insertions && !status && insertion[next].depth * (double)total <= (double)done + (double)half) {
      status = append_insertion(out, insertion[next++].text, err);
    }
    if (i == n_taken || status) break;
    status = qtr_text_append(out, h->text + s->offset, s->len, err);
    done += (size_t)s->n_tokens;
  }
  return status;
}
