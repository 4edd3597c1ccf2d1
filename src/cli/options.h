/* options.h - the one option parser of the binary: a table of options over getopt_long. The same table reads the command
 * line and prints --help. Long options are written whole: no abbreviations, so a later option never changes what a script
 * means. */
#ifndef QTR_CLI_OPTIONS_H
#define QTR_CLI_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum qtr_option_kind {
  QTR_OPTION_FLAG,   /* bool; no argument */
  QTR_OPTION_INT,    /* int32_t in [min, max] */
  QTR_OPTION_UINT64, /* uint64_t; bool at offset `given` set */
  QTR_OPTION_BYTES,  /* size_t; 512M, 2GiB, 1048576 */
  QTR_OPTION_FLOAT,  /* float in [min, max] */
  QTR_OPTION_STRING, /* const char *, borrowed from argv */
  QTR_OPTION_CHOICE, /* const char *, one of `choices` */
  QTR_OPTION_LIST    /* struct qtr_option_list; may be repeated */
};

/* Values of a repeated option, in order; borrowed from argv. Freed by qtr_options_free. */
struct qtr_option_list {
  const char **item; /* (n) */
  size_t n;
};

struct qtr_option {
  const char *name;     /* "max-tokens" */
  const char *argument; /* as shown in --help: "N"; NULL for flags, and for choices, which show themselves */
  const char *help;     /* a sentence or two, wrapped by the printer; NULL: understood but not listed */
  enum qtr_option_kind kind;
  size_t offset; /* of the value in the group's struct */
  double min, max;
  const char *choices; /* "auto|cpu|reference" */
  size_t given;        /* UINT64: offset of its bool */
};

/* A titled table and the struct its offsets count from, which holds the defaults before parsing. */
struct qtr_option_group {
  const char *title;               /* NULL: listed with the group before */
  const struct qtr_option *option; /* ends with name == NULL */
  void *base;
};

struct qtr_command_line {
  const char *command;                  /* "generate", for messages and help */
  const char *usage;                    /* "generate [options]" */
  const char *about;                    /* a paragraph */
  const struct qtr_option_group *group; /* (n_groups) */
  size_t n_groups;
  int max_positional; /* how many bare arguments it takes */
  char **positional;  /* (n_positional) after parsing; borrowed from argv */
  int n_positional;
};

enum qtr_parse { QTR_PARSE_OK, QTR_PARSE_HELP, QTR_PARSE_ERROR }; /* HELP: printed on stdout; ERROR: message on stderr */

/* Reads argv[1 … argc). */
enum qtr_parse qtr_options_parse(struct qtr_command_line *line, int argc, char **argv);
void qtr_options_free(const struct qtr_command_line *line); /* the lists */

/* The candidate nearest to `word` by edit distance when it is near enough to be meant, else NULL. */
const char *qtr_nearest_word(const char *word, const char *const *candidate, size_t n);

/* A whole number in [min, max], decimal, nothing after it. */
bool qtr_parse_int(const char *text, int64_t min, int64_t max, int64_t *value);

#endif
