/* cmd_chat.c - `quattuor chat`: a conversation in the terminal. Lines are edited by libedit; without a terminal they are
 * read plainly, so a conversation can be piped in. The whole conversation is rendered anew each turn: the prefix cache makes
 * what was said before free. */
#include "base/status.h"
#include "cli/cli.h"

#include <errno.h>
#include <histedit.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <wchar.h>

#define PROMPT "> "

struct flags {
  struct qtr_model_flags model;
  struct qtr_sampling_flags sampling;
  const char *system;
};

#define AT(field) offsetof(struct flags, field)
static const struct qtr_option own_options[] = {{.name = "system",
                                                 .argument = "TEXT",
                                                 .kind = QTR_OPTION_STRING,
                                                 .offset = AT(system),
                                                 .help = "System message before the conversation."},
                                                {0}};
#undef AT

struct session {
  struct flags *flags;
  struct qtr_engine *engine;
  json_t *messages;
  bool terminal; /* stdin is one: prompts, editing, hints */
  EditLine *edit;
  History *history;
  char *line; /* of getline */
  size_t line_capacity;
  char *answer; /* (answer_len) of the running turn */
  size_t answer_len, answer_capacity;
};

/* ---- reading a line ------------------------------------------------------------------------------ */

static char *show_prompt(EditLine *edit) {
  (void)edit;
  static char prompt[] = PROMPT; /* libedit's type wants it writable; nobody writes it */
  return prompt;
}

/* One character of the terminal. Unlike libedit's own reader it comes back when Ctrl-C interrupts the read, or came just
 * before it. */
static int read_character(EditLine *edit, wchar_t *out) {
  (void)edit;
  mbstate_t state = {0};
  for (;;) {
    char byte;
    if (qtr_interrupted()) return -1;
    ssize_t n = read(STDIN_FILENO, &byte, 1);
    if (n <= 0) return n == 0 ? 0 : -1;
    size_t used = mbrtowc(out, &byte, 1, &state);
    if (used == (size_t)-2) continue;
    if (used == (size_t)-1) *out = L'?';
    return 1;
  }
}

static bool open_editor(struct session *s) {
  HistEvent event;
  s->edit = el_init("quattuor", stdin, stderr, stderr);
  s->history = history_init();
  if (!s->edit || !s->history) return false;
  (void)history(s->history, &event, H_SETSIZE, 1000);
  (void)history(s->history, &event, H_SETUNIQUE, 1);
  (void)el_set(s->edit, EL_PROMPT, show_prompt);
  (void)el_set(s->edit, EL_EDITOR, "emacs");
  (void)el_set(s->edit, EL_SIGNAL, 0);
  (void)el_set(s->edit, EL_GETCFN, read_character);
  (void)el_set(s->edit, EL_HIST, history, s->history);
  return true;
}

enum input { INPUT_LINE, INPUT_AGAIN, INPUT_END };

/* The next line without its newline, in *line until the next call. AGAIN: Ctrl-C threw the line away. */
static enum input read_line(struct session *s, const char **line, size_t *len) {
  const char *text;
  ssize_t n;
  if (s->edit) {
    int count = 0;
    text = el_gets(s->edit, &count);
    n = text ? count : -1;
    if (n <= 0) {
      if (qtr_interrupted()) {
        el_reset(s->edit);
        qtr_interrupt_clear();
        (void)fputs("^C\n", stderr);
        return INPUT_AGAIN;
      }
      (void)fputc('\n', stderr);
      return INPUT_END;
    }
    HistEvent event;
    if (n > 1) (void)history(s->history, &event, H_ENTER, text);
  } else {
    errno = 0;
    n = getline(&s->line, &s->line_capacity, stdin);
    if (n < 0) return INPUT_END; /* interrupted or at the end: a pipe has no line to throw away */
    text = s->line;
  }
  while (n > 0 && (text[n - 1] == '\n' || text[n - 1] == '\r')) n--;
  *line = text;
  *len = (size_t)n;
  return INPUT_LINE;
}

/* ---- one answer ---------------------------------------------------------------------------------- */

static bool keep_answer(struct session *s, const char *text, size_t len) {
  if (s->answer_len + len + 1 > s->answer_capacity) {
    size_t capacity = (s->answer_len + len + 1) * 2;
    char *more = realloc(s->answer, capacity);
    if (!more) return false;
    s->answer = more;
    s->answer_capacity = capacity;
  }
  memcpy(s->answer + s->answer_len, text, len);
  s->answer_len += len;
  return true;
}

/* Drops the oldest question and answer, not the system message. False when only the last question is left. */
static bool forget_oldest(struct session *s) {
  size_t first = s->flags->system ? 1 : 0;
  if (json_array_size(s->messages) < first + 3) return false;
  (void)json_array_remove(s->messages, first);
  (void)json_array_remove(s->messages, first);
  return true;
}

/* Queues the conversation; when it no longer fits the context its beginning is dropped. */
static enum qtr_status add_turn(struct session *s, uint64_t *id, struct qtr_error *err) {
  struct qtr_request_options request;
  int n_dropped = 0;
  for (;;) {
    char *prompt;
    qtr_request_options_init(&request);
    enum qtr_status status = qtr_request_from_flags(&s->flags->sampling, &request, err);
    if (!status) status = qtr_messages_render(s->engine, s->messages, NULL, &prompt, err);
    if (status) return status;
    request.prompt = prompt;
    request.prompt_len = strlen(prompt);
    request.no_bos = true;
    request.parse_special = true;
    status = qtr_engine_add(s->engine, &request, id, err);
    free(prompt);
    if (status == QTR_ERR_LIMIT && forget_oldest(s)) {
      n_dropped++;
      continue;
    }
    if (!status && n_dropped > 0) {
      (void)fprintf(stderr, "(the context is full: the first %d turns are forgotten)\n", n_dropped);
    }
    return status;
  }
}

/* Answers the conversation, streaming. QTR_OK also when Ctrl-C ended it: what was said stays said. */
static enum qtr_status answer(struct session *s, bool *broken, struct qtr_error *err) {
  uint64_t id;
  bool has_work = true, cancelled = false;
  enum qtr_finish finish = QTR_FINISH_NONE;
  s->answer_len = 0;
  enum qtr_status status = add_turn(s, &id, err);
  if (status) return status;
  qtr_interrupt_clear();
  while (has_work && !status) {
    if ((qtr_interrupted() || *broken) && !cancelled) {
      (void)qtr_engine_cancel(s->engine, id, NULL);
      cancelled = true;
    }
    status = qtr_engine_step(s->engine, &has_work, err);
    struct qtr_event event;
    while (qtr_engine_poll(s->engine, &event)) {
      if (event.finish) finish = event.finish;
      if (cancelled || event.text_len == 0) continue;
      qtr_print_text(event.text, event.text_len);
      *broken = !qtr_finish_output("chat") || *broken;
      if (!keep_answer(s, event.text, event.text_len)) status = qtr_fail_memory(err, "an answer", s->answer_len);
    }
  }
  if (status) return status;
  (void)fputc('\n', stdout);
  *broken = !qtr_finish_output("chat") || *broken;
  if (s->terminal) qtr_interrupt_clear(); /* from here on Ctrl-C is about the next line */
  if (cancelled && s->terminal) (void)fprintf(stderr, "(stopped)\n");
  if (finish == QTR_FINISH_LENGTH && s->terminal)
    (void)fprintf(stderr, "(cut off: --max-tokens or the context is used up)\n");
  return qtr_messages_add(s->messages, "assistant", s->answer_len ? s->answer : "", s->answer_len, err);
}

/* ---- the conversation ---------------------------------------------------------------------------- */

static enum qtr_status reset(struct session *s, struct qtr_error *err) {
  json_decref(s->messages);
  s->messages = json_array();
  if (!s->messages) return qtr_fail_memory(err, "a conversation", 0);
  const char *system = s->flags->system;
  return system ? qtr_messages_add(s->messages, "system", system, strlen(system), err) : QTR_OK;
}

static const char help_text[] =
    "/reset   start the conversation anew\n"
    "/exit    leave, as end of input (Ctrl-D) does\n"
    "/help    this\n"
    "Ctrl-C stops an answer, or throws the line away.\n";

/* A line that begins with a slash. True when the session is to end. */
static bool run_command(struct session *s, const char *line, size_t len, struct qtr_error *err) {
  static const struct {
    const char *name;
    int what;
  } commands[] = {{"/exit", 0}, {"/quit", 0}, {"/reset", 1}, {"/help", 2}};
  while (len > 0 && line[len - 1] == ' ') len--;
  int what = 3;
  for (size_t i = 0; i < sizeof commands / sizeof commands[0]; i++) {
    if (strlen(commands[i].name) == len && memcmp(commands[i].name, line, len) == 0) what = commands[i].what;
  }
  if (what == 0) return true;
  if (what == 1) {
    if (reset(s, err)) (void)qtr_report("chat", err);
    if (s->terminal) (void)fprintf(stderr, "(new conversation)\n");
  } else if (what == 2) {
    (void)fputs(help_text, stderr);
  } else {
    char shown[40];
    (void)fprintf(stderr, "quattuor chat: unknown command %s (/help lists them)\n",
                  qtr_printable(line, len < 39 ? len : 39, shown, sizeof shown));
  }
  return false;
}

/* Returns the exit code. */
static int converse(struct session *s) {
  struct qtr_error err;
  bool broken = false, failed = false;
  while (!broken) {
    const char *line;
    size_t len;
    enum input input = read_line(s, &line, &len);
    if (input == INPUT_END) break;
    if (input == INPUT_AGAIN || len == 0) continue;
    if (line[0] == '/') {
      if (run_command(s, line, len, &err)) break;
      continue;
    }
    size_t n_before = json_array_size(s->messages);
    enum qtr_status status = qtr_messages_add(s->messages, "user", line, len, &err);
    if (!status) status = answer(s, &broken, &err);
    if (status) { /* the turn did not happen; the conversation goes on where it can */
      (void)qtr_report("chat", &err);
      failed = true;
      if (status == QTR_ERR_NOT_FOUND || status == QTR_ERR_BACKEND || status == QTR_ERR_STATE) break;
      while (json_array_size(s->messages) > n_before) (void)json_array_remove(s->messages, json_array_size(s->messages) - 1);
    }
  }
  if (broken || (failed && !s->terminal)) return QTR_EXIT_FAILURE;
  return QTR_EXIT_OK;
}

static int chat(struct flags *flags) {
  struct qtr_error err;
  struct session s = {.flags = flags, .terminal = isatty(STDIN_FILENO) == 1};
  struct qtr_request_options checked;
  int code = QTR_EXIT_FAILURE;
  if (qtr_request_from_flags(&flags->sampling, &checked, &err)) {
    (void)qtr_report("chat", &err);
    return QTR_EXIT_USAGE;
  }
  enum qtr_status status = qtr_open_engine(&flags->model, &s.engine, &err);
  if (!status) status = reset(&s, &err);
  if (!status && s.terminal && !open_editor(&s)) status = qtr_fail_memory(&err, "line editing", 0);
  if (status) {
    (void)qtr_report("chat", &err);
    goto done;
  }
  if (s.terminal) {
    qtr_interrupt_watch(); /* loading could be interrupted; from here on Ctrl-C is about lines and answers */
    struct qtr_engine_info info;
    qtr_engine_get_info(s.engine, &info);
    (void)fprintf(stderr, "%s, %s, context %d. /help lists the commands.\n", info.model_dir, info.precision,
                  info.max_model_len);
  }
  code = converse(&s);
done:
  if (s.edit) el_end(s.edit);
  if (s.history) history_end(s.history);
  json_decref(s.messages);
  free(s.line);
  free(s.answer);
  qtr_engine_close(s.engine);
  return code;
}

int qtr_cmd_chat(int argc, char **argv) {
  struct flags flags = {0};
  qtr_model_flags_init(&flags.model);
  qtr_sampling_flags_init(&flags.sampling);
  flags.sampling.max_tokens = 512;
  flags.sampling.sampling.temperature = 0.7f;
  flags.sampling.sampling.top_p = 0.95f;
  const struct qtr_option_group groups[] = {
      {"Conversation", own_options, &flags},
      {"Sampling (temperature 0.7, top-p 0.95, 512 tokens unless given)", qtr_sampling_options_table, &flags.sampling},
      {"Model and engine", qtr_model_options_table, &flags.model}};
  struct qtr_command_line line = {
      .command = "chat",
      .usage = "chat [--model DIR] [--system TEXT] [options]",
      .about =
          "A conversation in the terminal: answers stream, lines can be edited and recalled. /reset starts anew, /exit or "
          "end "
          "of input leaves, /help lists the commands; Ctrl-C stops the answer and not the program. From a pipe, each line "
          "is a turn and only the answers go to stdout.",
      .group = groups,
      .n_groups = 3};
  int code = QTR_EXIT_USAGE;
  switch (qtr_options_parse(&line, argc, argv)) {
    case QTR_PARSE_OK: code = chat(&flags); break;
    case QTR_PARSE_HELP: code = qtr_finish_output("chat") ? QTR_EXIT_OK : QTR_EXIT_FAILURE; break;
    case QTR_PARSE_ERROR: break;
  }
  qtr_sampling_flags_free(&flags.sampling);
  qtr_options_free(&line);
  return code;
}
