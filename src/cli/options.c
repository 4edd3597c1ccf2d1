/* options.c - reads command lines by tables (options.h). getopt_long walks the arguments; the table says what a value must
 * be. Every message names the option, what was written and what is accepted. */
#include "cli/options.h"

#include "base/checked.h"

#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#define MAX_OPTIONS 96
#define HELP_COLUMN 26
#define HELP_WIDTH 100

/* Edit distance with adjacent swaps counted as one, for words of at most 31 letters. */
static size_t edit_distance(const char *a, const char *b) {
  size_t d[32][32], n = strlen(a), m = strlen(b);
  if (n > 31 || m > 31) return 99;
  for (size_t i = 0; i <= n; i++) {
    for (size_t j = 0; j <= m; j++) {
      if (i == 0 || j == 0) {
        d[i][j] = i + j;
        continue;
      }
      size_t change = d[i - 1][j - 1] + (a[i - 1] != b[j - 1]);
      d[i][j] = QTR_MIN(change, QTR_MIN(d[i - 1][j], d[i][j - 1]) + 1);
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) d[i][j] = QTR_MIN(d[i][j], d[i - 2][j - 2] + 1);
    }
  }
  return d[n][m];
}

const char *qtr_nearest_word(const char *word, const char *const *candidate, size_t n) {
  const char *best = NULL;
  size_t best_distance = strlen(word) / 3 + 2; /* a third of the letters, at least one, may be wrong */
  if (strlen(word) < 3) best_distance = 2;
  for (size_t i = 0; i < n; i++) {
    size_t d = edit_distance(word, candidate[i]);
    if (strlen(word) >= 3 && strncmp(word, candidate[i], strlen(word)) == 0) d = 1; /* an abbreviation */
    if (d < best_distance) {
      best_distance = d;
      best = candidate[i];
    }
  }
  return best;
}

bool qtr_parse_int(const char *text, int64_t min, int64_t max, int64_t *value) {
  char *end;
  errno = 0;
  if ((*text < '0' || *text > '9') && *text != '-') return false;
  long long v = strtoll(text, &end, 10);
  if (errno || *end || end == text || v < min || v > max) return false;
  *value = v;
  return true;
}

static bool parse_bytes(const char *text, size_t *value) {
  static const char *const suffix[] = {"", "k", "m", "g", "t"};
  char *end;
  errno = 0;
  if (*text < '0' || *text > '9') return false;
  unsigned long long v = strtoull(text, &end, 10);
  if (errno) return false;
  size_t unit = 1;
  for (size_t i = 0; i < sizeof suffix / sizeof suffix[0]; i++, unit *= 1024) {
    char spelled[3][8];
    (void)snprintf(spelled[0], 8, "%s", suffix[i]);
    (void)snprintf(spelled[1], 8, "%sB", suffix[i]);
    (void)snprintf(spelled[2], 8, "%siB", suffix[i]);
    for (size_t k = 0; k < 3; k++) {
      if (strcasecmp(end, spelled[k]) == 0 && !(i == 0 && k == 2)) return !qtr_mul_overflow((size_t)v, unit, value);
    }
  }
  return false;
}

static bool is_choice(const char *choices, const char *text) {
  size_t n = strlen(text);
  for (const char *p = choices; n > 0 && *p;) {
    size_t len = strcspn(p, "|");
    if (len == n && strncmp(p, text, n) == 0) return true;
    p += len + (p[len] == '|');
  }
  return false;
}

/* Stores one value; false after a message. */
static bool store(const char *command, const struct qtr_option *o, void *base, const char *text) {
  char *at = (char *)base + o->offset;
  char wanted[256];
  switch (o->kind) {
    case QTR_OPTION_FLAG: {
      bool yes = true;
      memcpy(at, &yes, sizeof yes);
      return true;
    }
    case QTR_OPTION_INT: {
      int64_t v;
      if (qtr_parse_int(text, (int64_t)o->min, (int64_t)o->max, &v)) {
        int32_t narrow = (int32_t)v;
        memcpy(at, &narrow, sizeof narrow);
        return true;
      }
      (void)snprintf(wanted, sizeof wanted, "a whole number from %.0f to %.0f", o->min, o->max);
      break;
    }
    case QTR_OPTION_UINT64: {
      char *end;
      errno = 0;
      unsigned long long v = strtoull(text, &end, 10);
      if (*text >= '0' && *text <= '9' && !*end && !errno) {
        uint64_t wide = v;
        bool yes = true;
        memcpy(at, &wide, sizeof wide);
        memcpy((char *)base + o->given, &yes, sizeof yes);
        return true;
      }
      (void)snprintf(wanted, sizeof wanted, "a whole number from 0 to 2^64-1");
      break;
    }
    case QTR_OPTION_BYTES: {
      size_t v;
      if (parse_bytes(text, &v)) {
        memcpy(at, &v, sizeof v);
        return true;
      }
      (void)snprintf(wanted, sizeof wanted, "a size such as 1048576, 512M or 2GiB");
      break;
    }
    case QTR_OPTION_FLOAT: {
      char *end;
      double v = strtod(text, &end);
      if (end != text && !*end && isfinite(v) && v >= o->min && v <= o->max) {
        float narrow = (float)v;
        memcpy(at, &narrow, sizeof narrow);
        return true;
      }
      (void)snprintf(wanted, sizeof wanted, "a number from %g to %g", o->min, o->max);
      break;
    }
    case QTR_OPTION_CHOICE:
      if (is_choice(o->choices, text)) {
        memcpy(at, &text, sizeof text);
        return true;
      }
      (void)snprintf(wanted, sizeof wanted, "one of %s", o->choices);
      break;
    case QTR_OPTION_STRING: memcpy(at, &text, sizeof text); return true;
    case QTR_OPTION_LIST: {
      struct qtr_option_list *list = (struct qtr_option_list *)(void *)at;
      const char **more = realloc(list->item, (list->n + 1) * sizeof *more);
      if (!more) {
        (void)fprintf(stderr, "quattuor %s: out of memory\n", command);
        return false;
      }
      list->item = more;
      list->item[list->n++] = text;
      return true;
    }
  }
  (void)fprintf(stderr, "quattuor %s: --%s \"%.80s\": write %s\n", command, o->name, text, wanted);
  return false;
}

void qtr_options_free(const struct qtr_command_line *line) {
  for (size_t g = 0; g < line->n_groups; g++) {
    for (const struct qtr_option *o = line->group[g].option; o->name; o++) {
      if (o->kind != QTR_OPTION_LIST) continue;
      struct qtr_option_list *list = (struct qtr_option_list *)(void *)((char *)line->group[g].base + o->offset);
      free(list->item);
      *list = (struct qtr_option_list){0};
    }
  }
}

/* Prints text from `column` on, wrapped at HELP_WIDTH and indented by `indent`. */
static void print_wrapped(const char *text, int column, int indent) {
  for (bool first = true; *text; first = false) {
    int len = (int)strcspn(text, " ");
    if (!first && column + 1 + len > HELP_WIDTH) {
      printf("\n%*s", indent, "");
      column = indent;
    } else if (!first) {
      putchar(' ');
      column++;
    }
    printf("%.*s", len, text);
    column += len;
    text += len;
    text += strspn(text, " ");
  }
  putchar('\n');
}

static void print_help(const struct qtr_command_line *line) {
  printf("Usage: quattuor %s\n\n", line->usage);
  print_wrapped(line->about, 0, 0);
  for (size_t g = 0; g < line->n_groups; g++) {
    if (line->group[g].title) printf("\n%s:\n", line->group[g].title);
    for (const struct qtr_option *o = line->group[g].option; o->name; o++) {
      if (!o->help) continue;
      int column = printf("  --%s", o->name);
      if (o->kind == QTR_OPTION_CHOICE) column += printf(" {%s}", o->choices);
      if (o->argument) column += printf(" %s", o->argument);
      if (column > HELP_COLUMN - 2) {
        putchar('\n');
        column = 0;
      }
      printf("%*s", HELP_COLUMN - column, "");
      print_wrapped(o->help, HELP_COLUMN, HELP_COLUMN);
    }
  }
  printf("\n  --help%*sThis text.\n", HELP_COLUMN - 8, "");
}

static void report_unknown(const struct qtr_command_line *line, const struct option *known, const char *written) {
  const char *names[MAX_OPTIONS];
  size_t n = 0;
  for (; known[n].name; n++) names[n] = known[n].name;
  char word[32];
  (void)snprintf(word, sizeof word, "%.*s", (int)QTR_MIN(strcspn(written, "="), (size_t)31), written);
  const char *near = strlen(word) > 3 ? qtr_nearest_word(word + strspn(word, "-"), names, n) : NULL;
  (void)fprintf(stderr, "quattuor %s: unknown option %.60s", line->command, written);
  if (near) (void)fprintf(stderr, "; did you mean --%s?", near);
  (void)fprintf(stderr, " (quattuor %s --help lists them)\n", line->command);
}

enum qtr_parse qtr_options_parse(struct qtr_command_line *line, int argc, char **argv) {
  struct option known[MAX_OPTIONS + 2];
  const struct qtr_option *row[MAX_OPTIONS];
  void *base[MAX_OPTIONS];
  int n = 0;
  for (size_t g = 0; g < line->n_groups; g++) {
    for (const struct qtr_option *o = line->group[g].option; o->name && n < MAX_OPTIONS; o++) {
      row[n] = o;
      base[n] = line->group[g].base;
      known[n] = (struct option){o->name, o->kind == QTR_OPTION_FLAG ? no_argument : required_argument, NULL, 1000 + n};
      n++;
    }
  }
  known[n] = (struct option){"help", no_argument, NULL, 'h'};
  known[n + 1] = (struct option){0};
  opterr = 0;
  optind = 0; /* glibc: start afresh */
  for (;;) {
    int at = optind ? optind : 1;
    int c = getopt_long(argc, argv, ":h", known, NULL);
    if (c == -1) break;
    if (c == 'h') {
      print_help(line);
      return QTR_PARSE_HELP;
    }
    /* getopt moves bare arguments behind the options; the option just read ends right before optind */
    const char *written = argv[optind > at ? optind - 1 : at];
    if (c == ':') {
      (void)fprintf(stderr, "quattuor %s: %.60s needs a value\n", line->command, written);
      return QTR_PARSE_ERROR;
    }
    if (c == '?') {
      if (optopt >= 1000 && optopt < 1000 + n) {
        (void)fprintf(stderr, "quattuor %s: --%s takes no value\n", line->command, row[optopt - 1000]->name);
      } else {
        report_unknown(line, known, written);
      }
      return QTR_PARSE_ERROR;
    }
    const struct qtr_option *o = row[c - 1000];
    /* Whole names only: find what was written, "--name" or "--name=value". */
    const char *token = optarg == written && optind >= 2 ? argv[optind - 2] : written;
    size_t len = strcspn(token, "=");
    if (len != strlen(o->name) + 2 || strncmp(token + 2, o->name, len - 2) != 0) {
      report_unknown(line, known, token);
      return QTR_PARSE_ERROR;
    }
    if (!store(line->command, o, base[c - 1000], optarg)) return QTR_PARSE_ERROR;
  }
  line->positional = argv + optind;
  line->n_positional = argc - optind;
  if (line->n_positional > line->max_positional) {
    (void)fprintf(stderr, "quattuor %s: unexpected argument \"%.60s\"", line->command,
                  line->positional[line->max_positional]);
    (void)fprintf(stderr, line->max_positional ? "\n" : "; values belong to options (quattuor %s --help)\n", line->command);
    return QTR_PARSE_ERROR;
  }
  return QTR_PARSE_OK;
}
