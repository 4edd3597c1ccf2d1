/* cmd_serve.c - `quattuor serve`: the engine behind an OpenAI-compatible HTTP API. Options, keys and the model's name are
 * this file's; everything else is the server's (src/server). */
#include "base/file.h"
#include "base/status.h"
#include "cli/cli.h"
#include "server/server.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_KEYS 1024

struct flags {
  struct qtr_model_flags model;
  const char *host, *api_key, *served_model_name, *log_format, *generation_config, *cors_origin, *tls_cert, *tls_key;
  int32_t port, max_queue, max_connections, timeout, grace, ping;
  size_t max_body;
};

#define AT(field) offsetof(struct flags, field)
static const struct qtr_option own_options[] = {
    {.name = "host",
     .argument = "ADDRESS",
     .kind = QTR_OPTION_STRING,
     .offset = AT(host),
     .help = "Where to listen. Default 127.0.0.1: this machine only. 0.0.0.0 is every network; set a key then."},
    {.name = "port",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(port),
     .min = 0,
     .max = 65535,
     .help = "Default 8080; 0 takes a free one and says which."},
    {.name = "api-key",
     .argument = "FILE",
     .kind = QTR_OPTION_STRING,
     .offset = AT(api_key),
     .help = "File with the keys that open the API, one a line. Default: the key in $QUATTUOR_API_KEY, else none is needed. "
             "Every route but /health and the page's files wants it."},
    {.name = "served-model-name",
     .argument = "NAME",
     .kind = QTR_OPTION_STRING,
     .offset = AT(served_model_name),
     .help = "The model's name in the API. Default: the last part of its directory."},
    {.name = "max-queue",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(max_queue),
     .min = 0,
     .max = 1 << 20,
     .help = "Completions that may wait besides those that run; more are told 429. Default 1024."},
    {.name = "max-connections",
     .argument = "N",
     .kind = QTR_OPTION_INT,
     .offset = AT(max_connections),
     .min = 1,
     .max = 65536,
     .help = "Open connections; more are told 503. Default 1024."},
    {.name = "max-body",
     .argument = "SIZE",
     .kind = QTR_OPTION_BYTES,
     .offset = AT(max_body),
     .help = "Largest request body, such as 4M (default)."},
    {.name = "timeout",
     .argument = "SECONDS",
     .kind = QTR_OPTION_INT,
     .offset = AT(timeout),
     .min = 0,
     .max = 86400,
     .help = "A request may take this long, its time in the queue included; 0 = for ever. Default 600."},
    {.name = "grace",
     .argument = "SECONDS",
     .kind = QTR_OPTION_INT,
     .offset = AT(grace),
     .min = 0,
     .max = 86400,
     .help = "On SIGTERM running requests may finish within this time, then they are cut. Default 30."},
    {.name = "ping",
     .argument = "SECONDS",
     .kind = QTR_OPTION_INT,
     .offset = AT(ping),
     .min = 0,
     .max = 3600,
     .help =
         "A stream that is silent for this long gets a comment, so that no proxy takes it for dead; 0 = never. Default 15."},
    {.name = "generation-config",
     .kind = QTR_OPTION_CHOICE,
     .offset = AT(generation_config),
     .choices = "auto|none",
     .help = "auto (default): where a request does not say how to sample, the model's generation_config.json does; none: "
             "OpenAI's defaults do."},
    {.name = "cors-origin",
     .argument = "ORIGIN",
     .kind = QTR_OPTION_STRING,
     .offset = AT(cors_origin),
     .help = "Let web pages of this origin (or *) use the API. Default: none."},
    {.name = "tls-cert",
     .argument = "FILE",
     .kind = QTR_OPTION_STRING,
     .offset = AT(tls_cert),
     .help = "Speak HTTPS (TLS 1.2 or later) with this certificate and its chain, PEM. Needs --tls-key."},
    {.name = "tls-key",
     .argument = "FILE",
     .kind = QTR_OPTION_STRING,
     .offset = AT(tls_key),
     .help = "The certificate's private key, PEM, without a passphrase."},
    {.name = "log-format",
     .kind = QTR_OPTION_CHOICE,
     .offset = AT(log_format),
     .choices = "text|json|none",
     .help = "The access log on stderr, a line a request. Default text."},
    {0}};
#undef AT

struct keys {
  char *text;  /* owns the lines */
  char **item; /* (n) */
  size_t n;
};

static void keys_free(struct keys *keys) {
  free(keys->text);
  free(keys->item);
  *keys = (struct keys){0};
}

/* The lines of the file, or the variable's value. Empty lines and those that begin with # are none. */
static enum qtr_status read_keys(const char *path, struct keys *keys, struct qtr_error *err) {
  const char *variable = getenv("QUATTUOR_API_KEY");
  size_t len = 0;
  enum qtr_status status = QTR_OK;
  if (path) {
    status = qtr_file_read(path, (size_t)1 << 20, &keys->text, &len, err);
    if (status) return qtr_error_prefix(err, "--api-key takes the name of a file, for everyone can read a command line");
  } else if (variable && *variable) {
    keys->text = strdup(variable);
    if (!keys->text) return qtr_fail_memory(err, "a key", strlen(variable));
  } else {
    return QTR_OK;
  }
  keys->item = calloc(MAX_KEYS, sizeof *keys->item);
  if (!keys->item) return qtr_fail_memory(err, "keys", MAX_KEYS);
  for (char *rest = keys->text, *line; (line = strsep(&rest, "\n")) != NULL;) {
    size_t n = strlen(line);
    while (n > 0 && (line[n - 1] == '\r' || line[n - 1] == ' ')) line[--n] = 0;
    if (n == 0 || line[0] == '#') continue;
    if (keys->n == MAX_KEYS) return qtr_fail(err, QTR_ERR_LIMIT, "%s has more than %d keys", path, MAX_KEYS);
    keys->item[keys->n++] = line;
  }
  /* A key was asked for: without one the server would be open to all. */
  if (keys->n == 0) return qtr_fail(err, QTR_ERR_FORMAT, "there is no key in %s", path ? path : "QUATTUOR_API_KEY");
  return QTR_OK;
}

/* The last part of a path, malloc'ed: "models/demo/" -> "demo". */
static char *last_part(const char *path) {
  size_t n = strlen(path);
  while (n > 1 && path[n - 1] == '/') n--;
  size_t from = n;
  while (from > 0 && path[from - 1] != '/') from--;
  return strndup(path + from, n - from);
}

static int serve(struct flags *flags) {
  struct qtr_error err;
  struct qtr_engine *engine = NULL;
  struct qtr_engine_options engine_options;
  struct qtr_server_options options;
  struct keys keys = {0};
  char *dir = NULL, *name = NULL;
  qtr_server_options_init(&options);
  enum qtr_status status = read_keys(flags->api_key, &keys, &err);
  if (!status) status = qtr_find_model(flags->model.model, &dir, &err);
  if (status) goto done;
  name = last_part(dir);
  if (!name) {
    status = qtr_fail_memory(&err, "a name", strlen(dir));
    goto done;
  }
  if (isatty(STDERR_FILENO)) (void)fprintf(stderr, "quattuor serve: loading %s\n", dir);
  qtr_engine_options_from_flags(&flags->model, dir, &engine_options);
  status = qtr_engine_open(&engine_options, &engine, &err);
  if (status) goto done;
  options.host = flags->host;
  options.port = flags->port;
  options.model_name = flags->served_model_name ? flags->served_model_name : name;
  options.api_key = keys.item;
  options.n_api_keys = keys.n;
  if (flags->model.max_num_seqs > 0) options.max_running = flags->model.max_num_seqs;
  options.max_queue = flags->max_queue;
  options.max_connections = flags->max_connections;
  options.max_body = flags->max_body;
  options.timeout = flags->timeout;
  options.grace = flags->grace;
  options.ping = flags->ping;
  options.log_json = strcmp(flags->log_format, "json") == 0;
  options.log_off = strcmp(flags->log_format, "none") == 0;
  options.cors_origin = flags->cors_origin;
  options.tls_cert = flags->tls_cert;
  options.tls_key = flags->tls_key;
  if (strcmp(flags->generation_config, "auto") == 0) qtr_server_defaults_read(dir, &options.defaults);
  status = qtr_server_run(engine, &options, &err);
done:
  qtr_engine_close(engine);
  keys_free(&keys);
  free(dir);
  free(name);
  return status ? qtr_report("serve", &err) : QTR_EXIT_OK;
}

int qtr_cmd_serve(int argc, char **argv) {
  struct flags flags = {.host = "127.0.0.1",
                        .port = 8080,
                        .log_format = "text",
                        .generation_config = "auto",
                        .max_queue = 1024,
                        .max_connections = 1024,
                        .max_body = (size_t)4 << 20,
                        .timeout = 600,
                        .grace = 30,
                        .ping = 15};
  qtr_model_flags_init(&flags.model);
  const struct qtr_option_group groups[] = {{"Server", own_options, &flags},
                                            {"Model and engine", qtr_model_options_table, &flags.model}};
  struct qtr_command_line line = {
      .command = "serve",
      .usage = "serve [options]",
      .about =
          "Answers over HTTP as OpenAI's API does: /v1/chat/completions, /v1/completions, /v1/models, and /tokenize, "
          "/detokenize, /health, /metrics, /version. SIGTERM or Ctrl-C ends it in order: nothing new is taken, what runs "
          "may finish within --grace; a second signal cuts at once.",
      .group = groups,
      .n_groups = 2};
  int code = QTR_EXIT_USAGE;
  switch (qtr_options_parse(&line, argc, argv)) {
    case QTR_PARSE_OK:
      if (flags.max_body < 1024 || flags.max_body > (size_t)1 << 30) {
        (void)fprintf(stderr, "quattuor serve: --max-body must be from 1K to 1G\n");
      } else if (flags.cors_origin && strpbrk(flags.cors_origin, "\r\n")) {
        (void)fprintf(stderr, "quattuor serve: --cors-origin must be one line\n");
      } else if (!flags.tls_cert != !flags.tls_key) {
        (void)fprintf(stderr, "quattuor serve: --tls-cert and --tls-key go together\n");
      } else {
        code = serve(&flags);
      }
      break;
    case QTR_PARSE_HELP: code = qtr_finish_output("serve") ? QTR_EXIT_OK : QTR_EXIT_FAILURE; break;
    case QTR_PARSE_ERROR: break;
  }
  qtr_options_free(&line);
  return code;
}
