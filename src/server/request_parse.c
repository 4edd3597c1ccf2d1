/* request_parse.c - request bodies (request_parse.h). One table says which members there are, what they are and where they
 * go; nothing else is ever looked up, so what is not in the table is ignored, and what is in it is described. Then come the
 * checks that need several members. Ranges are the engine's (quattuor.h), checked here so that the error names the member as
 * the client wrote it. */
#include "server/request_internal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define CHAT (1u << QTR_API_CHAT)
#define COMPLETION (1u << QTR_API_COMPLETION)
#define TOKENIZE (1u << QTR_API_TOKENIZE)
#define DETOKENIZE (1u << QTR_API_DETOKENIZE)
#define GENERATE (CHAT | COMPLETION)
#define REF(name) "{'$ref':'#/components/schemas/" name "'}"

/* ---- single values ------------------------------------------------------------------------------- */

static bool read_flag(const struct qtr_api_field *f, const json_t *v, bool *value, struct qtr_api_error *err) {
  if (!json_is_boolean(v)) {
    return qtr_api_fail(err, 400, f->name, "%s must be true or false, not %s", f->name, qtr_api_kind_name(v));
  }
  *value = json_is_true(v);
  return true;
}

/* A whole number; 5.0 counts as one. */
static bool whole(const json_t *v, int64_t *out) {
  if (json_is_integer(v)) {
    *out = json_integer_value(v);
    return true;
  }
  double x = json_is_real(v) ? json_real_value(v) : NAN;
  if (!(x >= -0x1p53 && x <= 0x1p53) || x < floor(x) || x > floor(x)) return false;
  *out = (int64_t)x;
  return true;
}

static bool read_whole(const struct qtr_api_field *f, const json_t *v, int32_t *value, struct qtr_api_error *err) {
  int64_t n;
  if (!json_is_number(v)) {
    return qtr_api_fail(err, 400, f->name, "%s must be a whole number, not %s", f->name, qtr_api_kind_name(v));
  }
  if (!whole(v, &n)) {
    return qtr_api_fail(err, 400, f->name, "%s is %g; it must be a whole number from %.0f to %.0f", f->name,
                        json_number_value(v), f->min, f->max);
  }
  if (n < (int64_t)f->min || n > (int64_t)f->max) {
    return qtr_api_fail(err, 400, f->name, "%s is %lld; it must be from %.0f to %.0f", f->name, (long long)n, f->min,
                        f->max);
  }
  *value = (int32_t)n;
  return true;
}

static bool read_number(const struct qtr_api_field *f, const json_t *v, float *value, struct qtr_api_error *err) {
  if (!json_is_number(v)) {
    return qtr_api_fail(err, 400, f->name, "%s must be a number, not %s", f->name, qtr_api_kind_name(v));
  }
  double x = json_number_value(v);
  if (!(f->open_min ? x > f->min : x >= f->min) || !(x <= f->max)) {
    return qtr_api_fail(err, 400, f->name, "%s is %g; it must be %s %g and at most %g", f->name, x,
                        f->open_min ? "above" : "at least", f->min, f->max);
  }
  *value = (float)x;
  if (f->open_min && !((double)*value > f->min)) *value = 1e-30f; /* rounded to the bound */
  return true;
}

static bool read_string(const struct qtr_api_field *f, const json_t *v, const char **value, struct qtr_api_error *err) {
  if (!json_is_string(v)) {
    return qtr_api_fail(err, 400, f->name, "%s must be a string, not %s", f->name, qtr_api_kind_name(v));
  }
  if (value && strlen(json_string_value(v)) != json_string_length(v)) {
    return qtr_api_fail(err, 400, f->name, "%s must not hold a NUL character", f->name);
  }
  if (value) *value = json_string_value(v);
  return true;
}

/* Token ids; prepare.c checks them against the vocabulary. */
static bool read_tokens(const json_t *array, const char *name, int32_t **token, size_t *n, struct qtr_api_error *err) {
  *n = json_array_size(array);
  *token = malloc((*n + 1) * sizeof **token);
  if (!*token) return qtr_api_no_memory(err);
  for (size_t i = 0; i < *n; i++) {
    const json_t *v = json_array_get(array, i);
    int64_t id = 0;
    if (!json_is_number(v))
      return qtr_api_fail(err, 400, name, "%s[%zu] must be a token id, not %s", name, i, qtr_api_kind_name(v));
    if (!whole(v, &id)) {
      return qtr_api_fail(err, 400, name, "%s[%zu] is %g, which is no token id", name, i, json_number_value(v));
    }
    if (id < 0 || id > INT32_MAX) {
      return qtr_api_fail(err, 400, name, "%s[%zu] is %lld, which is no token id", name, i, (long long)id);
    }
    (*token)[i] = (int32_t)id;
  }
  return true;
}

/* ---- members that are more than a value ---------------------------------------------------------- */

static bool read_seed(json_t *seed, struct qtr_api_request *r, struct qtr_api_error *err) {
  struct qtr_sampling *s = &r->options.sampling;
  int64_t v;
  double x = json_is_number(seed) ? json_number_value(seed) : NAN;
  if (isnan(x)) return qtr_api_fail(err, 400, "seed", "seed must be a whole number, not %s", qtr_api_kind_name(seed));
  if (x < floor(x) || x > floor(x)) return qtr_api_fail(err, 400, "seed", "seed is %g; it must be a whole number", x);
  if (whole(seed, &v))
    s->seed = (uint64_t)v;
  else
    memcpy(&s->seed, &x, sizeof s->seed); /* beyond 64 bits: its bits are as good a seed */
  s->has_seed = true;
  return true;
}

static bool read_stop(json_t *stop, struct qtr_api_request *r, struct qtr_api_error *err) {
  if (!json_is_string(stop) && !json_is_array(stop)) {
    return qtr_api_fail(err, 400, "stop", "stop must be a string or an array of strings, not %s", qtr_api_kind_name(stop));
  }
  size_t n = json_is_string(stop) ? 1 : json_array_size(stop);
  if (n > 16) return qtr_api_fail(err, 400, "stop", "stop has %zu strings; at most 16 are allowed", n);
  if (n > 0 && !(r->stop = calloc(n, sizeof *r->stop))) return qtr_api_no_memory(err);
  for (size_t i = 0; i < n; i++) {
    const json_t *text = json_is_string(stop) ? stop : json_array_get(stop, i);
    if (!json_is_string(text))
      return qtr_api_fail(err, 400, "stop", "stop[%zu] must be a string, not %s", i, qtr_api_kind_name(text));
    size_t len = json_string_length(text);
    if (len != strlen(json_string_value(text))) {
      return qtr_api_fail(err, 400, "stop", "stop[%zu] must not hold a NUL character", i);
    }
    if (len < 1 || len > 256) {
      return qtr_api_fail(err, 400, "stop", "stop[%zu] has %zu bytes; it must have 1 to 256", i, len);
    }
    r->stop[i] = json_string_value(text);
  }
  r->options.stop = r->stop;
  r->options.n_stop = n;
  return true;
}

static bool read_stop_ids(json_t *ids, struct qtr_api_request *r, struct qtr_api_error *err) {
  if (!json_is_array(ids)) {
    return qtr_api_fail(err, 400, "stop_token_ids", "stop_token_ids must be an array, not %s", qtr_api_kind_name(ids));
  }
  if (json_array_size(ids) > 64) {
    return qtr_api_fail(err, 400, "stop_token_ids", "stop_token_ids has %zu ids; at most 64 are allowed",
                        json_array_size(ids));
  }
  if (!read_tokens(ids, "stop_token_ids", &r->stop_token, &r->options.n_stop_token, err)) return false;
  r->options.stop_token = r->stop_token;
  return true;
}

/* {"1234": -100, …} */
static bool read_bias(json_t *bias, struct qtr_api_request *r, struct qtr_api_error *err) {
  if (!json_is_object(bias)) {
    return qtr_api_fail(err, 400, "logit_bias", "logit_bias must be an object of token ids and numbers, not %s",
                        qtr_api_kind_name(bias));
  }
  size_t n = json_object_size(bias), i = 0;
  if (n > 1024) return qtr_api_fail(err, 400, "logit_bias", "logit_bias has %zu entries; at most 1024 are allowed", n);
  if (n > 0 && !(r->bias = calloc(n, sizeof *r->bias))) return qtr_api_no_memory(err);
  const char *key;
  json_t *value;
  json_object_foreach(bias, key, value) {
    char *end = NULL; /* no sign, no space, no needless zero: one way to write an id */
    bool digits = key[0] >= '0' && key[0] <= '9' && !(key[0] == '0' && key[1]);
    long id = digits ? strtol(key, &end, 10) : -1;
    if (id < 0 || id > INT32_MAX || *end) {
      return qtr_api_fail(err, 400, "logit_bias", "logit_bias names \"%.40s\", which is no token id", key);
    }
    double x = json_is_number(value) ? json_number_value(value) : NAN;
    if (!(x >= -100 && x <= 100)) {
      return qtr_api_fail(err, 400, "logit_bias", "logit_bias of token %ld must be a number from -100 to 100", id);
    }
    r->bias[i++] = (struct qtr_logit_bias){(int32_t)id, (float)x};
  }
  r->options.logit_bias = r->bias;
  r->options.n_logit_bias = n;
  return true;
}

static bool read_stream_options(json_t *options, struct qtr_api_request *r, struct qtr_api_error *err) {
  static const struct qtr_api_field usage = {.name = "stream_options.include_usage"};
  if (!json_is_object(options)) {
    return qtr_api_fail(err, 400, "stream_options", "stream_options must be an object, not %s", qtr_api_kind_name(options));
  }
  r->has_stream_options = true;
  const json_t *wanted = qtr_api_member(options, "include_usage");
  return !wanted || read_flag(&usage, wanted, &r->include_usage, err);
}

static bool read_format(json_t *format, struct qtr_api_request *r, struct qtr_api_error *err) {
  if (!json_is_object(format)) {
    return qtr_api_fail(err, 400, "response_format", "response_format must be an object, not %s", qtr_api_kind_name(format));
  }
  const json_t *type = json_object_get(format, "type");
  if (qtr_api_is_word(type, "text")) return true;
  if (qtr_api_is_word(type, "json_object")) {
    r->format = QTR_FORMAT_JSON;
    return true;
  }
  if (!qtr_api_is_word(type, "json_schema")) {
    return qtr_api_fail(err, 400, "response_format.type",
                        "response_format.type is \"%.40s\"; it must be text, json_object or json_schema",
                        json_is_string(type) ? json_string_value(type) : "(not a string)");
  }
  const json_t *outer = qtr_api_member(format, "json_schema");
  if (!json_is_object(outer)) {
    return qtr_api_fail(err, 400, "response_format.json_schema",
                        "response_format.json_schema must be an object with a schema");
  }
  r->schema = json_object_get(outer, "schema");
  if (!json_is_object(r->schema) && !json_is_boolean(r->schema)) {
    return qtr_api_fail(err, 400, "response_format.json_schema.schema",
                        "response_format.json_schema.schema must be an object: the JSON Schema of the answer");
  }
  r->format = QTR_FORMAT_SCHEMA;
  return true;
}

static bool read_template_variables(json_t *variables, struct qtr_api_request *r, struct qtr_api_error *err) {
  r->template_variables = variables;
  return json_is_object(variables) ||
         qtr_api_fail(err, 400, "chat_template_kwargs", "chat_template_kwargs must be an object, not %s",
                      qtr_api_kind_name(variables));
}

static bool add_prompts(struct qtr_api_request *r, size_t n, struct qtr_api_error *err) {
  for (size_t i = 0; r->prompt && i < r->n_prompts; i++)
    free(r->prompt[i].token); /* content and prompt: the latter counts */
  free(r->prompt);
  r->prompt = calloc(n, sizeof *r->prompt);
  if (!r->prompt) return qtr_api_no_memory(err);
  r->n_prompts = n;
  return true;
}

/* "text", ["text", …], [1, 2, …] or [[1, 2, …], …] */
static bool read_prompt(json_t *prompt, struct qtr_api_request *r, struct qtr_api_error *err) {
  if (!json_is_string(prompt) && !json_is_array(prompt)) {
    return qtr_api_fail(err, 400, "prompt", "prompt must be a string, an array of strings or token ids, not %s",
                        qtr_api_kind_name(prompt));
  }
  const json_t *first = json_array_get(prompt, 0);
  bool single = json_is_string(prompt) || json_is_number(first);
  size_t n = single ? 1 : json_array_size(prompt);
  if (n == 0) return qtr_api_fail(err, 400, "prompt", "prompt is empty");
  if (n > QTR_API_MAX_PROMPTS) {
    return qtr_api_fail(err, 400, "prompt", "prompt has %zu entries; at most %d are allowed", n, QTR_API_MAX_PROMPTS);
  }
  if (!add_prompts(r, n, err)) return false;
  for (size_t i = 0; i < n; i++) {
    const json_t *item = single ? prompt : json_array_get(prompt, i);
    struct qtr_api_prompt *p = &r->prompt[i];
    if (json_is_string(item) && (single || json_is_string(first))) {
      p->text = json_string_value(item);
      p->len = json_string_length(item);
    } else if (json_is_array(item) && (single || json_is_array(first))) {
      if (!read_tokens(item, "prompt", &p->token, &p->n_token, err)) return false;
      if (p->n_token == 0) return qtr_api_fail(err, 400, "prompt", "prompt[%zu] is empty; give at least one token", i);
    } else {
      return qtr_api_fail(err, 400, "prompt", "prompt[%zu] is %s; all entries must be of one kind: strings or token arrays",
                          i, qtr_api_kind_name(item));
    }
  }
  return true;
}

/* tokenize: one text */
static bool read_text(const char *name, const json_t *text, struct qtr_api_request *r, struct qtr_api_error *err) {
  if (!json_is_string(text)) {
    return qtr_api_fail(err, 400, name, "%s must be a string, not %s", name, qtr_api_kind_name(text));
  }
  if (!add_prompts(r, 1, err)) return false;
  r->prompt[0] = (struct qtr_api_prompt){.text = json_string_value(text), .len = json_string_length(text)};
  return true;
}

static bool read_text_prompt(json_t *text, struct qtr_api_request *r, struct qtr_api_error *err) {
  return read_text("prompt", text, r, err);
}

static bool read_text_content(json_t *text, struct qtr_api_request *r, struct qtr_api_error *err) { /* llama.cpp's name */
  return read_text("content", text, r, err);
}

static bool read_token_list(json_t *tokens, struct qtr_api_request *r, struct qtr_api_error *err) {
  if (!json_is_array(tokens)) {
    return qtr_api_fail(err, 400, "tokens", "tokens must be an array of token ids, not %s", qtr_api_kind_name(tokens));
  }
  return add_prompts(r, 1, err) && read_tokens(tokens, "tokens", &r->prompt[0].token, &r->prompt[0].n_token, err);
}

/* ---- the table ----------------------------------------------------------------------------------- */

#define AT(member) offsetof(struct qtr_api_request, member)
#define SAMPLING(member) AT(options.sampling.member)
#define VOCABULARY "Ids of the vocabulary."

static const struct qtr_api_field fields[] = {
    {.name = "model", .kinds = ~0u, .type = QTR_API_STRING, .offset = AT(model)},
    /* what to go on from */
    {.name = "messages",
     .kinds = CHAT,
     .type = QTR_API_OTHER,
     .required = true,
     .read = qtr_api_read_messages,
     .schema = "{'type':'array','minItems':1,'items':" REF("Message") "}",
     .note = "The chat template may refuse an order of roles; the rendered text must fit the context."},
    {.name = "prompt",
     .kinds = COMPLETION,
     .type = QTR_API_OTHER,
     .required = true,
     .read = read_prompt,
     .schema = "{'anyOf':[{'type':'string'}," REF(
         "Tokens") ",{'type':'array','minItems':1,'maxItems':256,'items':{'type':'string'}},"
                   "{'type':'array','minItems':1,'maxItems':256,'items':" REF("Tokens") "}]}",
     .note = "Each prompt must fit the context."},
    {.name = "content", .kinds = TOKENIZE, .type = QTR_API_OTHER, .read = read_text_content, .schema = "{'type':'string'}"},
    {.name = "prompt", .kinds = TOKENIZE, .type = QTR_API_OTHER, .read = read_text_prompt, .schema = "{'type':'string'}"},
    {.name = "messages",
     .kinds = TOKENIZE,
     .type = QTR_API_OTHER,
     .read = qtr_api_read_messages,
     .schema = "{'type':'array','minItems':1,'items':" REF("Message") "}",
     .note = "The chat template may refuse an order of roles."},
    {.name = "tokens",
     .kinds = DETOKENIZE,
     .type = QTR_API_OTHER,
     .required = true,
     .read = read_token_list,
     .schema = "{'type':'array','items':" REF("Token") "}"},
    {.name = "add_special_tokens", .kinds = TOKENIZE, .type = QTR_API_FLAG, .offset = AT(add_special)},
    {.name = "add_generation_prompt", .kinds = CHAT | TOKENIZE, .type = QTR_API_FLAG, .offset = AT(add_generation_prompt)},
    {.name = "chat_template_kwargs",
     .kinds = CHAT,
     .type = QTR_API_OTHER,
     .read = read_template_variables,
     .schema = "{'type':'object'}",
     .note = "Variables of the chat template, which may refuse them."},
    {.name = "tools",
     .kinds = CHAT | TOKENIZE,
     .type = QTR_API_OTHER,
     .read = qtr_api_read_tools,
     .schema = "{'type':'array','maxItems':128,'items':" REF("Tool") "}",
     .note = "The chat template must know tools; the parameters' schema must be one that docs/server.md names."},
    {.name = "tool_choice",
     .kinds = CHAT,
     .type = QTR_API_OTHER,
     .read = qtr_api_read_tool_choice,
     .schema =
         "{'anyOf':[{'enum':['none','auto','required']},{'type':'object','required':['function'],'properties':{'function':{"
         "'type':'object','required':['name'],'properties':{'name':{'type':'string'}}}}}]}",
     .note = "Needs tools, and names one of them."},
    {.name = "parallel_tool_calls", .kinds = CHAT, .type = QTR_API_FLAG, .offset = AT(parallel_tool_calls)},
    /* how much */
    {.name = "max_tokens",
     .kinds = CHAT,
     .type = QTR_API_WHOLE,
     .min = 1,
     .max = INT32_MAX,
     .offset = AT(options.max_tokens)},
    {.name = "max_completion_tokens", /* the newer name wins, as at OpenAI */
     .kinds = CHAT,
     .type = QTR_API_WHOLE,
     .min = 1,
     .max = INT32_MAX,
     .offset = AT(options.max_tokens)},
    {.name = "max_tokens",
     .kinds = COMPLETION,
     .type = QTR_API_WHOLE,
     .min = 0,
     .max = INT32_MAX,
     .offset = AT(options.max_tokens)},
    {.name = "n",
     .kinds = GENERATE,
     .type = QTR_API_WHOLE,
     .min = 1,
     .max = 64,
     .offset = AT(options.n),
     .note = "Prompts times n are at most 256 and at most what the server runs and queues."},
    {.name = "best_of",
     .kinds = GENERATE,
     .type = QTR_API_WHOLE,
     .min = 1,
     .max = 64,
     .offset = AT(best_of),
     .note = "Must equal n: this server does not choose."},
    {.name = "echo", .kinds = COMPLETION, .type = QTR_API_FLAG, .offset = AT(echo)},
    {.name = "suffix", .kinds = COMPLETION, .type = QTR_API_STRING, .offset = AT(suffix), .note = "Must be empty."},
    {.name = "ignore_eos", .kinds = GENERATE, .type = QTR_API_FLAG, .offset = AT(options.ignore_eos)},
    {.name = "stop",
     .kinds = GENERATE,
     .type = QTR_API_OTHER,
     .read = read_stop,
     .schema = "{'anyOf':[" REF("Stop") ",{'type':'array','maxItems':16,'items':" REF("Stop") "}]}",
     .note = "A string of at most 256 bytes, not characters."},
    {.name = "stop_token_ids",
     .kinds = GENERATE,
     .type = QTR_API_OTHER,
     .read = read_stop_ids,
     .schema = "{'type':'array','maxItems':64,'items':" REF("Token") "}"},
    /* sampling */
    {.name = "temperature",
     .kinds = GENERATE,
     .type = QTR_API_NUMBER,
     .min = 0,
     .max = 100,
     .offset = SAMPLING(temperature)},
    {.name = "top_p",
     .kinds = GENERATE,
     .type = QTR_API_NUMBER,
     .open_min = true,
     .min = 0,
     .max = 1,
     .offset = SAMPLING(top_p)},
    {.name = "top_k", .kinds = GENERATE, .type = QTR_API_WHOLE, .min = -1, .max = INT32_MAX, .offset = SAMPLING(top_k)},
    {.name = "min_p", .kinds = GENERATE, .type = QTR_API_NUMBER, .min = 0, .max = 1, .offset = SAMPLING(min_p)},
    {.name = "repetition_penalty",
     .kinds = GENERATE,
     .type = QTR_API_NUMBER,
     .open_min = true,
     .min = 0,
     .max = 2,
     .offset = SAMPLING(repetition_penalty)},
    {.name = "presence_penalty",
     .kinds = GENERATE,
     .type = QTR_API_NUMBER,
     .min = -2,
     .max = 2,
     .offset = SAMPLING(presence_penalty)},
    {.name = "frequency_penalty",
     .kinds = GENERATE,
     .type = QTR_API_NUMBER,
     .min = -2,
     .max = 2,
     .offset = SAMPLING(frequency_penalty)},
    {.name = "logit_bias",
     .kinds = GENERATE,
     .type = QTR_API_OTHER,
     .read = read_bias,
     .schema = "{'type':'object','maxProperties':1024,'propertyNames':{'pattern':'^(0|[1-9][0-9]{0,9})$'},"
               "'additionalProperties':{'type':'number','minimum':-100,'maximum':100}}",
     .note = VOCABULARY},
    {.name = "seed", .kinds = GENERATE, .type = QTR_API_OTHER, .read = read_seed, .schema = "{'type':'integer'}"},
    /* the answer's form */
    {.name = "logprobs", .kinds = CHAT, .type = QTR_API_FLAG, .offset = AT(logprobs)},
    {.name = "top_logprobs",
     .kinds = CHAT,
     .type = QTR_API_WHOLE,
     .min = 0,
     .max = 20,
     .offset = AT(top_logprobs),
     .note = "Needs logprobs."},
    {.name = "logprobs", .kinds = COMPLETION, .type = QTR_API_WHOLE, .min = 0, .max = 20, .offset = AT(top_logprobs)},
    {.name = "stream", .kinds = GENERATE, .type = QTR_API_FLAG, .offset = AT(stream)},
    {.name = "stream_options",
     .kinds = GENERATE,
     .type = QTR_API_OTHER,
     .read = read_stream_options,
     .schema = "{'type':'object','properties':{'include_usage':{'type':['boolean','null']}}}",
     .note = "Needs stream."},
    {.name = "response_format",
     .kinds = GENERATE,
     .type = QTR_API_OTHER,
     .read = read_format,
     .schema =
         "{'anyOf':[{'type':'object','required':['type'],'properties':{'type':{'enum':['text','json_object']}}},"
         "{'type':'object','required':['type','json_schema'],'properties':{'type':{'const':'json_schema'},"
         "'json_schema':{'type':'object','required':['schema'],'properties':{'schema':{'type':['object','boolean']}}}}}]}",
     .note = "The schema must be one that docs/server.md names; not together with tools."},
    {.name = "user", .kinds = GENERATE, .type = QTR_API_STRING}};

const struct qtr_api_field *qtr_api_fields(size_t *n) {
  *n = sizeof fields / sizeof fields[0];
  return fields;
}

static bool read_field(const struct qtr_api_field *f, json_t *v, struct qtr_api_request *r, struct qtr_api_error *err) {
  void *at = (char *)r + f->offset;
  switch (f->type) {
    case QTR_API_FLAG: return read_flag(f, v, at, err);
    case QTR_API_WHOLE: return read_whole(f, v, at, err);
    case QTR_API_NUMBER: return read_number(f, v, at, err);
    case QTR_API_STRING: return read_string(f, v, f->offset ? at : NULL, err);
    default: return f->read(v, r, err);
  }
}

/* ---- whole requests ------------------------------------------------------------------------------ */

/* What is wrong between members. */
static bool check_generation(struct qtr_api_request *r, struct qtr_api_error *err) {
  struct qtr_request_options *o = &r->options;
  if (o->sampling.top_k == 0) o->sampling.top_k = -1; /* other servers write "off" as 0, too */
  if (r->best_of > 0 && r->best_of != o->n) {
    return qtr_api_fail(err, 400, "best_of", "best_of is not supported: ask for n completions and choose among them");
  }
  if (r->has_stream_options && !r->stream) {
    return qtr_api_fail(err, 400, "stream_options", "stream_options needs stream to be true");
  }
  return true;
}

static bool check_chat(struct qtr_api_request *r, struct qtr_api_error *err) {
  if (r->top_logprobs >= 0 && !r->logprobs) {
    return qtr_api_fail(err, 400, "top_logprobs", "top_logprobs needs logprobs to be true");
  }
  if (r->logprobs) r->options.logprobs = r->top_logprobs < 0 ? 0 : r->top_logprobs;
  r->n_prompts = 1;
  return qtr_api_check_tools(r, err);
}

static bool check_completion(struct qtr_api_request *r, struct qtr_api_error *err) {
  struct qtr_request_options *o = &r->options;
  o->logprobs = r->top_logprobs;
  r->logprobs = r->top_logprobs >= 0;
  o->prompt_logprobs = r->echo;
  if (r->suffix && *r->suffix) {
    return qtr_api_fail(err, 400, "suffix", "suffix is not supported: this server only continues text");
  }
  r->no_output = o->max_tokens == 0;
  if (r->no_output) o->max_tokens = 1;
  size_t n = r->n_prompts * (size_t)o->n;
  return n <= QTR_API_MAX_CHOICES || qtr_api_fail(err, 400, "n", "%zu prompts of %d completions each are more than %d",
                                                  r->n_prompts, o->n, QTR_API_MAX_CHOICES);
}

static bool check_tokenize(struct qtr_api_request *r, struct qtr_api_error *err) {
  return r->prompt || r->messages ||
         qtr_api_fail(err, 400, "prompt", "prompt is missing (or messages, for the chat template)");
}

bool qtr_api_parse(enum qtr_api_kind kind, const char *body, size_t len, const struct qtr_api_defaults *defaults,
                   struct qtr_api_request *r, struct qtr_api_error *err) {
  *r = (struct qtr_api_request){
      .kind = kind, .add_generation_prompt = true, .add_special = true, .parallel_tool_calls = true, .top_logprobs = -1};
  *err = (struct qtr_api_error){0};
  qtr_request_options_init(&r->options);
  r->options.sampling = defaults->sampling;
  r->options.n = 1;
  r->options.max_tokens = kind == QTR_API_COMPLETION ? QTR_API_DEFAULT_TOKENS : defaults->max_tokens;
  bool ok = qtr_api_load(body, len, &r->root, err);
  for (size_t i = 0; ok && i < sizeof fields / sizeof fields[0]; i++) {
    const struct qtr_api_field *f = &fields[i];
    if (!(f->kinds & 1u << kind)) continue;
    json_t *value = qtr_api_member(r->root, f->name);
    if (value)
      ok = read_field(f, value, r, err);
    else if (f->required)
      ok = qtr_api_fail(err, 400, f->name, "%s is missing", f->name);
  }
  ok = ok && (kind > QTR_API_COMPLETION || check_generation(r, err));
  if (ok && kind == QTR_API_CHAT) ok = check_chat(r, err);
  if (ok && kind == QTR_API_COMPLETION) ok = check_completion(r, err);
  if (ok && kind == QTR_API_TOKENIZE) ok = check_tokenize(r, err);
  if (!ok) qtr_api_request_free(r);
  return ok;
}

void qtr_api_request_forget(struct qtr_api_request *r) {
  for (size_t i = 0; r->prompt && i < r->n_prompts; i++) free(r->prompt[i].token);
  free(r->prompt);
  free(r->stop);
  free(r->stop_token);
  free(r->bias);
  json_decref(r->messages);
  json_decref(r->root);
  r->prompt = NULL;
  r->stop = NULL;
  r->stop_token = NULL;
  r->bias = NULL;
  r->messages = r->tools = r->template_variables = r->root = NULL;
  r->schema = NULL;
  r->model = r->tool_name = r->suffix = NULL;
  r->options.stop = NULL;
  r->options.stop_token = NULL;
  r->options.logit_bias = NULL;
  r->options.n_stop = r->options.n_stop_token = r->options.n_logit_bias = 0;
}

void qtr_api_request_free(struct qtr_api_request *r) {
  qtr_api_request_forget(r);
  *r = (struct qtr_api_request){0};
}
