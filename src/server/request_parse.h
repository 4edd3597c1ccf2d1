/* request_parse.h - the bodies of the API's requests, checked: JSON in, a struct or an error in OpenAI's shape out. Pure: no
 * engine, no network, no state. A member nobody knows is ignored; a known one of a wrong type or value is an error that
 * names it. null means absent. */
#ifndef QTR_SERVER_REQUEST_PARSE_H
#define QTR_SERVER_REQUEST_PARSE_H

#include "quattuor/quattuor.h"

#include <jansson.h>

#define QTR_API_MAX_PROMPTS 256
#define QTR_API_MAX_CHOICES 256 /* prompts times n */
#define QTR_API_MAX_TOOLS 128
#define QTR_API_MAX_DEPTH 64         /* of nested arrays and objects */
#define QTR_API_MAX_CONTAINERS 65536 /* arrays and objects in one body: each costs far more memory than its two bytes */
#define QTR_API_DEFAULT_TOKENS 16    /* of /v1/completions, as OpenAI has it */

struct qtr_api_error {
  int http;         /* 400, 404, 429, 500, 501, 503; 0 = none */
  const char *type; /* "invalid_request_error"; static */
  const char *code; /* NULL, or static */
  char param[96];   /* "" = null */
  char message[640];
};
/* Fills err and returns false. param may be NULL. */
bool qtr_api_fail(struct qtr_api_error *err, int http, const char *param, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
/* {"error":{"message","type","param","code"}} appended to `out`. */
struct qtr_buffer;
void qtr_api_error_write(const struct qtr_api_error *err, struct qtr_buffer *out);
/* The HTTP status for an engine's refusal, message taken over. */
void qtr_api_error_from(struct qtr_api_error *err, const struct qtr_error *from, const char *param);

enum qtr_api_kind { QTR_API_CHAT, QTR_API_COMPLETION, QTR_API_TOKENIZE, QTR_API_DETOKENIZE, QTR_API_KINDS };
enum qtr_tool_choice { QTR_TOOLS_NONE, QTR_TOOLS_AUTO, QTR_TOOLS_REQUIRED, QTR_TOOLS_NAMED };
enum qtr_response_format { QTR_FORMAT_TEXT, QTR_FORMAT_JSON, QTR_FORMAT_SCHEMA };

struct qtr_api_prompt { /* text or tokens */
  const char *text;     /* (len) UTF-8, inside root; NULL: tokens */
  size_t len;
  int32_t *token; /* (n_token) malloc'ed */
  size_t n_token;
};

/* What the model's generation_config.json says, where a request says nothing. */
struct qtr_api_defaults {
  struct qtr_sampling sampling;
  int32_t max_tokens; /* 0 = until the context is full */
};

struct qtr_api_request {
  enum qtr_api_kind kind;
  json_t *root;               /* owns the strings below */
  const char *model;          /* NULL = not said */
  json_t *messages;           /* chat: array, normalised for templates; owned */
  json_t *tools;              /* chat: array as sent, NULL = none; borrowed from root */
  json_t *template_variables; /* chat_template_kwargs; NULL = none; borrowed */
  enum qtr_tool_choice tool_choice;
  const char *tool_name; /* NAMED */
  bool has_tool_choice, parallel_tool_calls;
  struct qtr_api_prompt *prompt; /* completion: (n_prompts); tokenize: one text, or none; detokenize: one of tokens */
  size_t n_prompts;
  bool stream, has_stream_options, include_usage, echo;
  bool add_generation_prompt; /* true: the answer is a new message; false: it goes on with the last one */
  bool add_special;           /* tokenize: as the tokenizer itself would */
  bool logprobs;              /* wanted in the answer; options.logprobs says how many */
  bool no_output;             /* completion: nothing is to be generated; options.max_tokens is 1 then */
  enum qtr_response_format format;
  const json_t *schema;               /* SCHEMA; borrowed */
  const char *suffix;                 /* refused unless empty */
  int32_t top_logprobs, best_of;      /* as sent; -1 and 0: not */
  struct qtr_request_options options; /* all but prompt and user; its arrays live here: */
  const char **stop;
  int32_t *stop_token;
  struct qtr_logit_bias *bias;
};

/* body (len) is JSON text. On false *request is empty and err says why. */
bool qtr_api_parse(enum qtr_api_kind kind, const char *body, size_t len, const struct qtr_api_defaults *defaults,
                   struct qtr_api_request *request, struct qtr_api_error *err);
/* Frees the JSON and all that points into it or was made of it: arrays and texts. Numbers and flags stay. For a request that
 * is queued: a small number in JSON takes twenty times the memory of its text. */
void qtr_api_request_forget(struct qtr_api_request *request);
void qtr_api_request_free(struct qtr_api_request *request);

/* ---- what requests may say: the table that the parser follows and that /openapi.json is written from ---- */

enum qtr_api_type { QTR_API_FLAG, QTR_API_WHOLE, QTR_API_NUMBER, QTR_API_STRING, QTR_API_OTHER };

struct qtr_api_field {
  const char *name;
  unsigned kinds; /* bits 1 << enum qtr_api_kind */
  enum qtr_api_type type;
  bool required, open_min; /* open_min: min itself is not allowed */
  double min, max;         /* WHOLE and NUMBER */
  size_t offset;           /* of its value in struct qtr_api_request; 0 = it is checked and has no effect */
  bool (*read)(json_t *value, struct qtr_api_request *request, struct qtr_api_error *err); /* OTHER */
  const char *schema; /* OTHER: its JSON Schema without null, ' for "; @LAST@: the largest token id */
  const char *note;   /* what the schema cannot say: a value that fits it may be refused for this. NULL: nothing */
};
const struct qtr_api_field *qtr_api_fields(size_t *n);

#endif
