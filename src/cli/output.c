/* output.c - how commands write results, errors and sizes (cli.h). */
#include "base/checked.h"
#include "base/status.h"
#include "cli/cli.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

bool qtr_finish_output(const char *command) {
  bool failed = ferror(stdout) != 0;
  errno = 0;
  if (fflush(stdout) == 0 && !failed) return true;
  (void)fprintf(stderr, "quattuor %s: cannot write to standard output%s%s\n", command, errno ? ": " : "",
                errno ? strerror(errno) : "");
  clearerr(stdout); /* said once */
  return false;
}

bool qtr_print_json(const char *command, json_t *object) {
  char *text = object ? json_dumps(object, JSON_COMPACT | JSON_REAL_PRECISION(10)) : NULL;
  json_decref(object);
  if (!text) {
    (void)fprintf(stderr, "quattuor %s: cannot make the JSON of a result (out of memory)\n", command);
    return false;
  }
  (void)fputs(text, stdout);
  (void)fputc('\n', stdout);
  free(text);
  return qtr_finish_output(command);
}

void qtr_print_text(const char *text, size_t len) {
  if (isatty(STDOUT_FILENO) != 1) {
    (void)fwrite(text, 1, len, stdout);
    return;
  }
  for (size_t i = 0; i < len; i++) {
    unsigned char c = (unsigned char)text[i];
    bool c1 = c == 0xc2 && i + 1 < len && (unsigned char)text[i + 1] < 0xa0; /* U+0080 … U+009F */
    bool control = (c < 0x20 && c != '\n' && c != '\t') || c == 0x7f || c1;
    (void)fputc(control ? '?' : c, stdout);
    i += c1;
  }
}

int qtr_report(const char *command, const struct qtr_error *err) {
  (void)fprintf(stderr, "quattuor %s: %s\n", command, err->message);
  return QTR_EXIT_FAILURE;
}

json_t *qtr_json_number(double x, int digits) {
  if (!isfinite(x)) return json_null();
  char text[40];
  (void)snprintf(text, sizeof text, "%.*g", digits, x);
  return json_real(strtod(text, NULL));
}

const char *qtr_show_bytes(size_t n_bytes, char out[32]) {
  static const char *const unit[] = {"bytes", "KiB", "MiB", "GiB", "TiB"};
  double x = (double)n_bytes;
  size_t i = 0;
  for (; x >= 1024 && i + 1 < sizeof unit / sizeof unit[0]; i++) x /= 1024;
  (void)snprintf(out, 32, i == 0 ? "%.0f %s" : "%.1f %s", x, unit[i]);
  return out;
}

size_t qtr_peak_rss(void) {
  struct rusage usage;
  if (getrusage(RUSAGE_SELF, &usage) != 0 || usage.ru_maxrss < 0) return 0;
  return (size_t)usage.ru_maxrss * 1024; /* Linux counts KiB */
}

bool qtr_stdin_read(size_t max_bytes, char **data, size_t *len, struct qtr_error *err) {
  char *buffer = NULL;
  size_t n = 0, capacity = 0;
  *data = NULL;
  *len = 0;
  for (;;) {
    if (n + 1 >= capacity) {
      capacity = capacity ? capacity * 2 : 1 << 16;
      char *more = realloc(buffer, capacity);
      if (!more) {
        free(buffer);
        (void)qtr_fail_memory(err, "standard input", capacity);
        return false;
      }
      buffer = more;
    }
    ssize_t r = read(STDIN_FILENO, buffer + n, capacity - 1 - n);
    if (r < 0 && errno == EINTR) continue;
    if (r < 0 || n + (size_t)QTR_MAX(r, 0) > max_bytes) {
      free(buffer);
      (void)qtr_fail(err, QTR_ERR_IO, r < 0 ? "cannot read standard input" : "standard input is longer than %zu bytes",
                     max_bytes);
      return false;
    }
    if (r == 0) break;
    n += (size_t)r;
  }
  buffer[n] = 0;
  *data = buffer;
  *len = n;
  return true;
}
