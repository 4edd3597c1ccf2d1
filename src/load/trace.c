/* trace.c - reading of arrival traces (trace.h). The file is untrusted: lengths are bounded, sizes checked. */
#include "load/trace.h"

#include "base/checked.h"
#include "base/status.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MOST_SECONDS 1e10 /* of a time; 300 years, and doubles still tell milliseconds apart */

static enum qtr_status grow(void **data, size_t *capacity, size_t needed, size_t each, struct qtr_error *err) {
  if (needed <= *capacity) return QTR_OK;
  size_t wanted = *capacity ? *capacity : 1024, bytes;
  while (wanted < needed) {
    if (qtr_mul_overflow(wanted, 2, &wanted)) return qtr_fail_memory(err, "a trace", needed);
  }
  if (qtr_mul_overflow(wanted, each, &bytes)) return qtr_fail_memory(err, "a trace", needed);
  void *more = realloc(*data, bytes);
  if (!more) return qtr_fail_memory(err, "a trace", bytes);
  *data = more;
  *capacity = wanted;
  return QTR_OK;
}

static enum qtr_status add(struct qtr_trace *t, double time, int64_t n_input, int64_t n_output, size_t n_line,
                           struct qtr_error *err) {
  if (!(fabs(time) <= MOST_SECONDS)) return qtr_fail(err, QTR_ERR_FORMAT, "line %zu: the time is out of range", n_line);
  if (n_input < 0 || n_input > QTR_TRACE_MOST_TOKENS || n_output < 0 || n_output > QTR_TRACE_MOST_TOKENS) {
    return qtr_fail(err, QTR_ERR_FORMAT, "line %zu: lengths of %lld and %lld tokens; 0 to %d are possible", n_line,
                    (long long)n_input, (long long)n_output, QTR_TRACE_MOST_TOKENS);
  }
  enum qtr_status status = grow((void **)&t->request, &t->capacity, t->n + 1, sizeof *t->request, err);
  if (status) return status;
  t->request[t->n++] = (struct qtr_trace_request){.time = time,
                                                  .n_input = (int32_t)QTR_MAX(n_input, 1),
                                                  .n_output = (int32_t)QTR_MAX(n_output, 1),
                                                  .first_block = t->n_blocks};
  return QTR_OK;
}

/* ---- CSV ----------------------------------------------------------------------------------------- */

/* Digits from *at; false without any, or past `most` of them. */
static bool number(const char **at, const char *end, int most, int64_t *value) {
  const char *p = *at;
  *value = 0;
  for (; p < end && *p >= '0' && *p <= '9'; p++) {
    if (p - *at >= most) return false;
    *value = *value * 10 + (*p - '0');
  }
  bool any = p > *at;
  *at = p;
  return any;
}

static bool skip(const char **at, const char *end, char c) {
  if (*at == end || **at != c) return false;
  ++*at;
  return true;
}

/* ".6805900" */
static double fraction(const char **at, const char *end) {
  double value = 0, unit = 1;
  if (!skip(at, end, '.')) return 0;
  for (; *at < end && **at >= '0' && **at <= '9'; ++*at) value += (unit /= 10) * (**at - '0');
  return value;
}

/* Days from 1970-01-01 in the Gregorian calendar (H. Hinnant's algorithm: years begin in March). */
static int64_t days_from_date(int64_t year, int64_t month, int64_t day) {
  year -= month <= 2;
  int64_t era = year / 400, year_of_era = year - era * 400;
  int64_t day_of_year = (153 * (month + (month > 2 ? -3 : 9)) + 2) / 5 + day - 1;
  return era * 146097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719468;
}

/* "2023-11-16 18:15:46.6805900", with T for the space and an offset (Z, +00:00) if you like; or seconds. */
static bool read_time(const char **at, const char *end, double *seconds) {
  int64_t year, month, day, hour, minute, second, off_hour = 0, off_minute = 0;
  const char *start = *at;
  if (!number(at, end, 15, &year)) return false;
  if (*at == end || **at != '-') {
    *seconds = (double)year + fraction(at, end);
    return true;
  }
  if (*at - start != 4 || !skip(at, end, '-') || !number(at, end, 2, &month) || !skip(at, end, '-') ||
      !number(at, end, 2, &day) || !(skip(at, end, ' ') || skip(at, end, 'T')) || !number(at, end, 2, &hour) ||
      !skip(at, end, ':') || !number(at, end, 2, &minute) || !skip(at, end, ':') || !number(at, end, 2, &second)) {
    return false;
  }
  if (month < 1 || month > 12 || day < 1 || day > 31 || hour > 23 || minute > 59 || second > 60) return false;
  double part = fraction(at, end), sign = 0;
  if (!skip(at, end, 'Z') && *at < end && (**at == '+' || **at == '-')) {
    sign = **at == '+' ? -1 : 1;
    ++*at;
    if (!number(at, end, 2, &off_hour)) return false;
    (void)skip(at, end, ':');
    if (!number(at, end, 2, &off_minute)) return false;
  }
  *seconds = (double)(days_from_date(year, month, day) * 86400 + hour * 3600 + minute * 60 + second) + part +
             sign * (double)(off_hour * 3600 + off_minute * 60);
  return true;
}

static enum qtr_status read_csv_line(struct qtr_trace *t, const char *at, const char *end, size_t n_line,
                                     struct qtr_error *err) {
  double time;
  int64_t input, output;
  if (!read_time(&at, end, &time) || !skip(&at, end, ',') || !number(&at, end, 12, &input) || !skip(&at, end, ',') ||
      !number(&at, end, 12, &output) || at != end) {
    return qtr_fail(err, QTR_ERR_FORMAT, "line %zu is not TIMESTAMP,ContextTokens,GeneratedTokens", n_line);
  }
  return add(t, time, input, output, n_line, err);
}

/* ---- JSONL --------------------------------------------------------------------------------------- */

static enum qtr_status read_json_line(struct qtr_trace *t, const char *at, const char *end, size_t n_line,
                                      struct qtr_error *err) {
  json_error_t why;
  json_t *o = json_loadb(at, (size_t)(end - at), JSON_REJECT_DUPLICATES, &why);
  if (!o) return qtr_fail(err, QTR_ERR_FORMAT, "line %zu is not JSON: %s", n_line, why.text);
  const json_t *time = json_object_get(o, "timestamp"), *input = json_object_get(o, "input_length");
  const json_t *output = json_object_get(o, "output_length"), *ids = json_object_get(o, "hash_ids");
  size_t n_ids = json_array_size(ids);
  enum qtr_status status = QTR_OK;
  if (!json_is_number(time) || !json_is_integer(input) || !json_is_integer(output) || (ids && !json_is_array(ids))) {
    status =
        qtr_fail(err, QTR_ERR_FORMAT,
                 "line %zu: a number \"timestamp\" and whole numbers \"input_length\" and \"output_length\" are needed, "
                 "and \"hash_ids\" is a list",
                 n_line);
  }
  if (!status) {
    status = add(t, json_number_value(time) / 1000, json_integer_value(input), json_integer_value(output), n_line, err);
  }
  if (status || !ids) goto done;
  struct qtr_trace_request *r = &t->request[t->n - 1];
  if (n_ids != qtr_ceil_div((size_t)r->n_input, QTR_TRACE_BLOCK_TOKENS)) {
    status = qtr_fail(err, QTR_ERR_FORMAT, "line %zu: %zu hash_ids for %d tokens; one for %d tokens is expected", n_line,
                      n_ids, r->n_input, QTR_TRACE_BLOCK_TOKENS);
    goto done;
  }
  if ((status = grow((void **)&t->block, &t->block_capacity, t->n_blocks + n_ids, sizeof *t->block, err))) goto done;
  for (size_t i = 0; i < n_ids && !status; i++) {
    const json_t *id = json_array_get(ids, i);
    if (!json_is_integer(id)) status = qtr_fail(err, QTR_ERR_FORMAT, "line %zu: hash_ids holds whole numbers", n_line);
    t->block[t->n_blocks + i] = (uint64_t)json_integer_value(id);
  }
  t->n_blocks += n_ids;
  r->n_blocks = (int32_t)n_ids;
done:
  json_decref(o);
  return status;
}

/* ---- both ---------------------------------------------------------------------------------------- */

static int compare(const void *a, const void *b) {
  const struct qtr_trace_request *x = a, *y = b;
  return (x->time > y->time) - (x->time < y->time);
}

enum qtr_status qtr_trace_parse(const char *text, size_t len, size_t max_requests, struct qtr_trace *t,
                                struct qtr_error *err) {
  const char *at = text, *end = text + len;
  size_t n_line = 0;
  bool json = false, begun = false, ascending = true;
  *t = (struct qtr_trace){0};
  while (at < end && (max_requests == 0 || t->n < max_requests)) {
    const char *newline = memchr(at, '\n', (size_t)(end - at)), *line = at, *stop = newline ? newline : end;
    at = newline ? newline + 1 : end;
    n_line++;
    while (stop > line && (stop[-1] == '\r' || stop[-1] == ' ')) stop--;
    while (line < stop && *line == ' ') line++;
    if (line == stop) continue;
    if (!begun) {
      begun = true;
      json = *line == '{';
      if (!json && !(*line >= '0' && *line <= '9')) { /* the names of the columns */
        static const char names[] = "TIMESTAMP,ContextTokens,GeneratedTokens";
        if ((size_t)(stop - line) == strlen(names) && memcmp(line, names, strlen(names)) == 0) continue;
        return qtr_fail(err, QTR_ERR_FORMAT, "no trace: it should begin with %s, or with a line of Mooncake's JSON", names);
      }
    }
    enum qtr_status status = json ? read_json_line(t, line, stop, n_line, err) : read_csv_line(t, line, stop, n_line, err);
    if (status) return status;
    if (t->n > 1 && t->request[t->n - 1].time < t->request[t->n - 2].time) ascending = false;
  }
  if (t->n == 0) return qtr_fail(err, QTR_ERR_FORMAT, "the trace has no requests");
  if (!ascending) qsort(t->request, t->n, sizeof *t->request, compare);
  double first = t->request[0].time;
  for (size_t i = 0; i < t->n; i++) t->request[i].time -= first;
  return QTR_OK;
}

void qtr_trace_free(struct qtr_trace *t) {
  free(t->request);
  free(t->block);
  *t = (struct qtr_trace){0};
}

enum qtr_status qtr_trace_fit(struct qtr_trace *t, int32_t max_len, enum qtr_trace_fit fit, size_t *n_too_long,
                              double *factor, struct qtr_error *err) {
  int64_t longest = 0;
  *n_too_long = 0;
  *factor = 1;
  for (size_t i = 0; i < t->n; i++) {
    int64_t all = (int64_t)t->request[i].n_input + t->request[i].n_output;
    *n_too_long += all > max_len;
    longest = QTR_MAX(longest, all);
  }
  if (*n_too_long == 0) return QTR_OK;
  if (max_len < 2) return qtr_fail(err, QTR_ERR_LIMIT, "a context of %d tokens holds no prompt and answer", max_len);
  if (fit == QTR_FIT_REFUSE) {
    return qtr_fail(
        err, QTR_ERR_LIMIT,
        "%zu of %zu requests are longer than the context of %d tokens (the longest: %lld); say --too-long clip to "
        "shorten those, or --too-long scale to shorten all alike",
        *n_too_long, t->n, max_len, (long long)longest);
  }
  if (fit == QTR_FIT_SCALE) *factor = (double)max_len / (double)longest;
  for (size_t i = 0; i < t->n; i++) {
    struct qtr_trace_request *r = &t->request[i];
    if (fit == QTR_FIT_SCALE) {
      r->n_input = QTR_MAX((int32_t)(r->n_input * *factor), 1);
      r->n_output = QTR_MAX((int32_t)(r->n_output * *factor), 1);
    }
    if ((int64_t)r->n_input + r->n_output > max_len) {
      r->n_output = QTR_MIN(r->n_output, max_len / 2);
      r->n_input = QTR_MIN(r->n_input, max_len - r->n_output);
    }
  }
  return QTR_OK;
}
