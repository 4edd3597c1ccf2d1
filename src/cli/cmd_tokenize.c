/* cmd_tokenize.c - `quattuor tokenize`: text to token ids. The text is taken as it is, trailing newlines included. */
#include "base/file.h"
#include "base/status.h"
#include "cli/cli.h"
#include "text/tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_TEXT ((size_t)1 << 30)

struct flags {
  const char *model, *tokenizer, *file;
  bool bos, no_parse_special, pieces, decode, json;
};

#define AT(field) offsetof(struct flags, field)
static const struct qtr_option own_options[] = {
    {.name = "model",
     .argument = "DIR",
     .kind = QTR_OPTION_STRING,
     .offset = AT(model),
     .help = "Take the tokenizer of this model. Default: $QUATTUOR_MODEL, else the built-in demo model."},
    {.name = "tokenizer",
     .argument = "FILE",
     .kind = QTR_OPTION_STRING,
     .offset = AT(tokenizer),
     .help = "A tokenizer.json, a SentencePiece tokenizer.model, or a directory with one."},
    {.name = "file",
     .argument = "FILE",
     .kind = QTR_OPTION_STRING,
     .offset = AT(file),
     .help = "The text. Default: the argument TEXT, else standard input."},
    {.name = "bos",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(bos),
     .help = "Add BOS and EOS as the tokenizer itself does; without it the ids are those of the text alone."},
    {.name = "no-parse-special",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(no_parse_special),
     .help = "Special tokens written in the text are plain text, as in what users send. Default: they become their ids."},
    {.name = "pieces",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(pieces),
     .help = "One token a line: id, then its content (a JSON string). With --json: token_texts."},
    {.name = "decode",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(decode),
     .help = "The other way: the text holds ids, separated by spaces or commas; prints what they decode to."},
    {.name = "json",
     .kind = QTR_OPTION_FLAG,
     .offset = AT(json),
     .help = "One object: token_ids, n_tokens; text with --decode."},
    {0}};
#undef AT

/* The content of a token as JSON: bytes that are no UTF-8 become U+FFFD. */
static json_t *piece_json(const struct qtr_tokenizer *tokenizer, int32_t id) {
  char *text = NULL;
  size_t len = 0;
  const char *content = qtr_tokenizer_is_special(tokenizer, id) ? qtr_tokenizer_token(tokenizer, id, &len) : NULL;
  if (!content && qtr_tokenizer_decode(tokenizer, &id, 1, false, &text, &len, NULL)) return json_string("");
  json_t *piece = json_stringn(content ? content : text, len);
  free(text);
  return piece ? piece : json_string("");
}

static bool print_ids(const struct flags *flags, const struct qtr_tokenizer *tokenizer, const int32_t *ids, size_t n) {
  if (flags->json) {
    json_t *list = json_array(), *pieces = json_array();
    for (size_t i = 0; i < n; i++) {
      json_array_append_new(list, json_integer(ids[i]));
      if (flags->pieces) json_array_append_new(pieces, piece_json(tokenizer, ids[i]));
    }
    json_t *o = json_pack("{s:o, s:I}", "token_ids", list, "n_tokens", (json_int_t)n);
    if (flags->pieces) json_object_set(o, "token_texts", pieces);
    json_decref(pieces);
    return qtr_print_json("tokenize", o);
  }
  for (size_t i = 0; i < n; i++) {
    if (!flags->pieces) {
      printf(i ? " %d" : "%d", ids[i]);
      continue;
    }
    json_t *piece = piece_json(tokenizer, ids[i]);
    char *shown = json_dumps(piece, JSON_ENCODE_ANY);
    printf("%d\t%s\n", ids[i], shown ? shown : "");
    free(shown);
    json_decref(piece);
  }
  if (!flags->pieces) (void)fputc('\n', stdout);
  return qtr_finish_output("tokenize");
}

/* Ids written in text; *ids is malloc'ed. */
static enum qtr_status read_ids(const char *text, int32_t **ids, size_t *n, struct qtr_error *err) {
  size_t capacity = strlen(text) / 2 + 1; /* an id and what follows it take two bytes */
  *n = 0;
  *ids = malloc(capacity * sizeof **ids);
  if (!*ids) return qtr_fail_memory(err, "token ids", capacity * sizeof **ids);
  for (const char *p = text;;) {
    p += strspn(p, " ,\t\r\n[]");
    if (!*p) return QTR_OK;
    char word[16];
    size_t len = strcspn(p, " ,\t\r\n[]");
    int64_t id = -1;
    (void)snprintf(word, sizeof word, "%.*s", (int)(len < 15 ? len : 15), p);
    if (len > 10 || !qtr_parse_int(word, 0, INT32_MAX, &id)) {
      char shown[32];
      return qtr_fail(err, QTR_ERR_FORMAT, "\"%s\" is not a token id",
                      qtr_printable(p, len < 24 ? len : 24, shown, sizeof shown));
    }
    (*ids)[(*n)++] = (int32_t)id;
    p += len;
  }
}

static enum qtr_status decode(const struct flags *flags, const struct qtr_tokenizer *tokenizer, const char *text,
                              bool *printed, struct qtr_error *err) {
  int32_t *ids;
  size_t n, len;
  char *decoded;
  enum qtr_status status = read_ids(text, &ids, &n, err);
  if (!status) status = qtr_tokenizer_decode(tokenizer, ids, n, false, &decoded, &len, err);
  free(ids);
  if (status) return status;
  if (flags->json) {
    *printed =
        qtr_print_json("tokenize", json_pack("{s:o, s:I}", "text", json_stringn(decoded, len), "n_tokens", (json_int_t)n));
  } else {
    (void)fwrite(decoded, 1, len, stdout);
    *printed = qtr_finish_output("tokenize");
  }
  free(decoded);
  return QTR_OK;
}

static int tokenize(const struct flags *flags, const char *argument) {
  struct qtr_error err;
  struct qtr_tokenizer *tokenizer = NULL;
  char *dir = NULL, *read = NULL;
  const char *text = argument;
  size_t len = argument ? strlen(argument) : 0;
  bool printed = false;
  enum qtr_status status = flags->tokenizer ? QTR_OK : qtr_find_model(flags->model, &dir, &err);
  if (!status) status = qtr_tokenizer_open(flags->tokenizer ? flags->tokenizer : dir, &tokenizer, &err);
  if (!status && flags->file && strcmp(flags->file, "-") != 0) {
    status = qtr_file_read(flags->file, MAX_TEXT, &read, &len, &err);
    text = read;
  } else if (!status && !argument) {
    status = qtr_stdin_read(MAX_TEXT, &read, &len, &err) ? QTR_OK : QTR_ERR_IO;
    text = read;
  }
  if (!status && flags->decode) {
    status = decode(flags, tokenizer, text, &printed, &err);
  } else if (!status) {
    const struct qtr_encode_options options = {.add_special = flags->bos, .parse_special = !flags->no_parse_special};
    int32_t *ids = NULL;
    size_t n = 0;
    status = qtr_tokenizer_encode(tokenizer, text, len, &options, &ids, &n, &err);
    if (!status) printed = print_ids(flags, tokenizer, ids, n);
    free(ids);
  }
  if (status) (void)qtr_report("tokenize", &err);
  qtr_tokenizer_close(tokenizer);
  free(dir);
  free(read);
  return !status && printed ? QTR_EXIT_OK : QTR_EXIT_FAILURE;
}

int qtr_cmd_tokenize(int argc, char **argv) {
  struct flags flags = {0};
  const struct qtr_option_group groups[] = {{"Options", own_options, &flags}};
  struct qtr_command_line line = {
      .command = "tokenize",
      .usage = "tokenize [--model DIR | --tokenizer FILE] [--file FILE | TEXT] [options]",
      .about = "Turns text into token ids, all on one line. The text is taken as it is, trailing newlines included.",
      .group = groups,
      .n_groups = 1,
      .max_positional = 1};
  int code = QTR_EXIT_USAGE;
  switch (qtr_options_parse(&line, argc, argv)) {
    case QTR_PARSE_OK:
      if (flags.file && line.n_positional > 0) {
        (void)fprintf(stderr, "quattuor tokenize: both --file and a text: give one\n");
      } else if (flags.model && flags.tokenizer) {
        (void)fprintf(stderr, "quattuor tokenize: both --model and --tokenizer: give one\n");
      } else {
        code = tokenize(&flags, line.n_positional > 0 ? line.positional[0] : NULL);
      }
      break;
    case QTR_PARSE_HELP: code = qtr_finish_output("tokenize") ? QTR_EXIT_OK : QTR_EXIT_FAILURE; break;
    case QTR_PARSE_ERROR: break;
  }
  qtr_options_free(&line);
  return code;
}
