/* request_parse.c - request bodies (request_parse.h). The order of the file: errors, JSON, typed members, then one function
 * a group of members. Ranges are the engine's (quattuor.h) and are checked here as well, so that the error names the member
 * as the client wrote it. */
#include "server/request_parse.h"

#include "server/buffer.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- errors -------------------------------------------------------------------------------------- */

static const char *type_of(int http) {
  switch (http) {
    case 401: return "authentication_error";
    case 404: return "not_found_error";
    case 429: return "rate_limit_error";
    default: return http < 500 ? "invalid_request_error" : "server_error";
  }
}

bool qtr_api_fail(struct qtr_api_error *err, int http, const char *param, const char *format, ...) {
  *err = (struct qtr_api_error){.http = http, .type = type_of(http)};
  if (param) (void)snprintf(err->param, sizeof err->param, "%s", param);
  va_list args;
  va_start(args, format);
  (void)vsnprintf(err->message, sizeof err->message, format, args);
  va_end(args);
  return false;
}

/* Length of the UTF-8 character at s (n bytes are left), 0 when there is none. */
static size_t character(const unsigned char *s, size_t n) {
  size_t len = s[0] < 0x80 ? 1 : s[0] < 0xC2 ? 0 : s[0] < 0xE0 ? 2 : s[0] < 0xF0 ? 3 : s[0] < 0xF5 ? 4 : 0;
  if (len == 0 || len > n) return 0;
  for (size_t i = 1; i < len; i++) {
    if ((s[i] & 0xC0) != 0x80) return 0;
  }
  bool bad = (s[0] == 0xE0 && s[1] < 0xA0) || (s[0] == 0xED && s[1] > 0x9F) || (s[0] == 0xF0 && s[1] < 0x90) ||
             (s[0] == 0xF4 && s[1] > 0x8F);
  return bad ? 0 : len;
}

/* A message as a JSON string. It may quote what a client sent, and vsnprintf may have cut a character in two: what is no
 * UTF-8 becomes '?'. */
static void put_message(struct qtr_buffer *out, char *text) {
  size_t n = strlen(text);
  for (size_t i = 0, len; i < n; i += len) {
    len = character((const unsigned char *)text + i, n - i);
    if (len == 0) text[i] = '?', len = 1;
  }
  qtr_buffer_string(out, text, n);
}

void qtr_api_error_write(const struct qtr_api_error *err, struct qtr_buffer *out) {
  struct qtr_api_error e = *err;
  qtr_buffer_puts(out, "{\"error\":{\"message\":");
  put_message(out, e.message);
  qtr_buffer_printf(out, ",\"type\":\"%s\",\"param\":", err->type);
  if (err->param[0])
    put_message(out, e.param);
  else
    qtr_buffer_puts(out, "null");
  qtr_buffer_puts(out, ",\"code\":");
  if (err->code)
    qtr_buffer_string(out, err->code, strlen(err->code));
  else
    qtr_buffer_puts(out, "null");
  qtr_buffer_puts(out, "}}");
}

void qtr_api_error_from(struct qtr_api_error *err, const struct qtr_error *from, const char *param) {
  int http = 500;
  switch (from->status) {
    case QTR_ERR_ARGUMENT:
    case QTR_ERR_FORMAT:
    case QTR_ERR_LIMIT:
    case QTR_ERR_UNSUPPORTED:
    case QTR_ERR_NOT_FOUND: http = 400; break;
    case QTR_ERR_MEMORY:
    case QTR_ERR_BACKEND: http = 503; break;
    default: break;
  }
  (void)qtr_api_fail(err, http, param, "%s", from->message);
  if (from->status == QTR_ERR_LIMIT) err->code = "context_length_exceeded";
}

static bool no_memory(struct qtr_api_error *err) { return qtr_api_fail(err, 503, NULL, "out of memory"); }

/* ---- JSON ---------------------------------------------------------------------------------------- */

/* Bounds what parsing can cost before it is paid: depth, and the number of arrays and objects. Strings are skipped; whether
 * they are well formed is jansson's question. */
static bool check_size(const char *body, size_t len, struct qtr_api_error *err) {
  size_t depth = 0, containers = 0;
  bool inside = false;
  for (size_t i = 0; i < len; i++) {
    char c = body[i];
    if (inside) {
      if (c == '\\')
        i++;
      else if (c == '"')
        inside = false;
    } else if (c == '"') {
      inside = true;
    } else if (c == '[' || c == '{') {
      if (++depth > QTR_API_MAX_DEPTH) {
        return qtr_api_fail(err, 400, NULL, "the JSON body is nested deeper than %d levels", QTR_API_MAX_DEPTH);
      }
      if (++containers > QTR_API_MAX_CONTAINERS) {
        return qtr_api_fail(err, 400, NULL, "the JSON body has more than %d arrays and objects", QTR_API_MAX_CONTAINERS);
      }
    } else if ((c == ']' || c == '}') && depth > 0) {
      depth--;
    }
  }
  return true;
}

/* A member's name with \u0000 in it is none we know, but jansson would refuse the whole body for it: it becomes \u0001.
 * name: the string (len) between its quotes. */
static void mend_name(char *name, size_t len) {
  for (size_t i = 0; i + 6 <= len; i += name[i] == '\\' ? 2 : 1) {
    if (memcmp(name + i, "\\u0000", 6) == 0) name[i + 5] = '1';
  }
}

static void mend_names(char *body, size_t len) {
  for (size_t i = 0; i < len; i++) {
    if (body[i] != '"') continue;
    size_t from = ++i;
    while (i < len && body[i] != '"') i += body[i] == '\\' ? 2 : 1;
    size_t next = i + 1;
    while (next < len && (body[next] == ' ' || body[next] == '\n' || body[next] == '\r' || body[next] == '\t')) next++;
    if (i < len && next < len && body[next] == ':') mend_name(body + from, i - from);
  }
}

/* Whole numbers beyond 64 bits become reals, so that one in a member nobody knows hurts nobody. */
static json_t *load_leniently(const char *body, size_t len, json_error_t *where) {
  json_t *root = json_loadb(body, len, JSON_ALLOW_NUL, where);
  if (root ||
      (json_error_code(where) != json_error_numeric_overflow && json_error_code(where) != json_error_null_byte_in_key)) {
    return root;
  }
  char *mended = malloc(len + 1);
  if (!mended) return NULL;
  memcpy(mended, body, len);
  mend_names(mended, len);
  root = json_loadb(mended, len, JSON_ALLOW_NUL | JSON_DECODE_INT_AS_REAL, where);
  free(mended);
  return root;
}

static bool load(const char *body, size_t len, json_t **root, struct qtr_api_error *err) {
  json_error_t where = {0};
  *root = NULL;
  if (!check_size(body, len, err)) return false;
  *root = load_leniently(body, len, &where);
  if (!*root) {
    return qtr_api_fail(err, 400, NULL, "the body is not valid JSON: line %d, column %d: %s", where.line, where.column,
                        where.text);
  }
  if (json_is_object(*root)) return true;
  json_decref(*root);
  *root = NULL;
  return qtr_api_fail(err, 400, NULL, "the body must be a JSON object");
}

static const char *kind_name(const json_t *value) {
  switch (json_typeof(value)) {
    case JSON_OBJECT: return "an object";
    case JSON_ARRAY: return "an array";
    case JSON_STRING: return "a string";
    case JSON_INTEGER:
    case JSON_REAL: return "a number";
    case JSON_TRUE:
    case JSON_FALSE: return "a boolean";
    default: return "null";
  }
}

/* The member, or NULL when it is absent or null. */
static json_t *member(const json_t *object, const char *name) {
  json_t *value = json_object_get(object, name);
  return json_is_null(value) ? NULL : value;
}

/* ---- typed members: absent leaves *value as it is ---- */

static bool get_bool(const json_t *o, const char *name, bool *value, struct qtr_api_error *err) {
  const json_t *v = member(o, name);
  if (!v) return true;
  if (!json_is_boolean(v)) return qtr_api_fail(err, 400, name, "%s must be true or false, not %s", name, kind_name(v));
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

static bool get_int(const json_t *o, const char *name, int64_t min, int64_t max, int32_t *value, struct qtr_api_error *err) {
  const json_t *v = member(o, name);
  int64_t n;
  if (!v) return true;
  if (!json_is_number(v)) return qtr_api_fail(err, 400, name, "%s must be a whole number, not %s", name, kind_name(v));
  if (!whole(v, &n)) return qtr_api_fail(err, 400, name, "%s is %g; it must be a whole number", name, json_number_value(v));
  if (n < min || n > max) {
    return qtr_api_fail(err, 400, name, "%s is %lld; it must be from %lld to %lld", name, (long long)n, (long long)min,
                        (long long)max);
  }
  *value = (int32_t)n;
  return true;
}

/* open_min: min itself is not allowed. */
static bool get_float(const json_t *o, const char *name, double min, double max, bool open_min, float *value,
                      struct qtr_api_error *err) {
  const json_t *v = member(o, name);
  if (!v) return true;
  if (!json_is_number(v)) return qtr_api_fail(err, 400, name, "%s must be a number, not %s", name, kind_name(v));
  double x = json_number_value(v);
  if (!(open_min ? x > min : x >= min) || !(x <= max)) {
    return qtr_api_fail(err, 400, name, "%s is %g; it must be %s %g and at most %g", name, x,
                        open_min ? "above" : "at least", min, max);
  }
  *value = (float)x;
  if (open_min && !((double)*value > min)) *value = 1e-30f; /* rounded to the bound */
  return true;
}

static bool get_string(const json_t *o, const char *name, const char **value, struct qtr_api_error *err) {
  const json_t *v = member(o, name);
  if (!v) return true;
  if (!json_is_string(v)) return qtr_api_fail(err, 400, name, "%s must be a string, not %s", name, kind_name(v));
  if (strlen(json_string_value(v)) != json_string_length(v)) {
    return qtr_api_fail(err, 400, name, "%s must not hold a NUL character", name);
  }
  *value = json_string_value(v);
  return true;
}

/* The same, but NUL may be inside: its length is json_string_length. */
static bool get_text(const json_t *o, const char *name, const char **value, struct qtr_api_error *err) {
  const json_t *v = member(o, name);
  if (!v) return true;
  if (!json_is_string(v)) return qtr_api_fail(err, 400, name, "%s must be a string, not %s", name, kind_name(v));
  *value = json_string_value(v);
  return true;
}

/* Token ids; the engine checks them against its vocabulary. */
static bool get_tokens(const json_t *array, const char *name, int32_t **token, size_t *n, struct qtr_api_error *err) {
  *n = json_array_size(array);
  *token = malloc((*n + 1) * sizeof **token);
  if (!*token) return no_memory(err);
  for (size_t i = 0; i < *n; i++) {
    const json_t *v = json_array_get(array, i);
    int64_t id = 0;
    if (!json_is_number(v)) return qtr_api_fail(err, 400, name, "%s[%zu] must be a token id, not %s", name, i, kind_name(v));
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

/* ---- groups of members --------------------------------------------------------------------------- */

static bool parse_sampling(const json_t *o, struct qtr_api_request *r, struct qtr_api_error *err) {
  struct qtr_sampling *s = &r->options.sampling;
  int32_t top_k = s->top_k, best_of = 0;
  if (!get_float(o, "temperature", 0, 100, false, &s->temperature, err) ||
      !get_float(o, "top_p", 0, 1, true, &s->top_p, err) || !get_int(o, "top_k", -1, INT32_MAX, &top_k, err) ||
      !get_float(o, "min_p", 0, 1, false, &s->min_p, err) ||
      !get_float(o, "repetition_penalty", 0, 2, true, &s->repetition_penalty, err) ||
      !get_float(o, "presence_penalty", -2, 2, false, &s->presence_penalty, err) ||
      !get_float(o, "frequency_penalty", -2, 2, false, &s->frequency_penalty, err) ||
      !get_int(o, "n", 1, 64, &r->options.n, err) || !get_int(o, "best_of", 1, INT32_MAX, &best_of, err) ||
      !get_bool(o, "ignore_eos", &r->options.ignore_eos, err)) {
    return false;
  }
  s->top_k = top_k == 0 ? -1 : top_k; /* other servers write "off" as 0, too */
  if (best_of > 0 && best_of != r->options.n) {
    return qtr_api_fail(err, 400, "best_of", "best_of is not supported: ask for n completions and choose among them");
  }
  const json_t *seed = member(o, "seed");
  if (seed) {
    int64_t v;
    double x = json_is_number(seed) ? json_number_value(seed) : NAN;
    if (x < floor(x) || x > floor(x) || isnan(x)) {
      return qtr_api_fail(err, 400, "seed", "seed must be a whole number, not %s", kind_name(seed));
    }
    if (whole(seed, &v))
      s->seed = (uint64_t)v;
    else
      memcpy(&s->seed, &x, sizeof s->seed); /* beyond 64 bits: its bits are as good a seed */
    s->has_seed = true;
  }
  return true;
}

static bool parse_stop(const json_t *o, struct qtr_api_request *r, struct qtr_api_error *err) {
  const json_t *stop = member(o, "stop"), *ids = member(o, "stop_token_ids");
  if (stop && !json_is_string(stop) && !json_is_array(stop)) {
    return qtr_api_fail(err, 400, "stop", "stop must be a string or an array of strings, not %s", kind_name(stop));
  }
  size_t n = json_is_string(stop) ? 1 : json_array_size(stop);
  if (n > 16) return qtr_api_fail(err, 400, "stop", "stop has %zu strings; at most 16 are allowed", n);
  if (n > 0 && !(r->stop = calloc(n, sizeof *r->stop))) return no_memory(err);
  for (size_t i = 0; i < n; i++) {
    const json_t *text = json_is_string(stop) ? stop : json_array_get(stop, i);
    if (!json_is_string(text))
      return qtr_api_fail(err, 400, "stop", "stop[%zu] must be a string, not %s", i, kind_name(text));
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
  if (!ids) return true;
  if (!json_is_array(ids)) {
    return qtr_api_fail(err, 400, "stop_token_ids", "stop_token_ids must be an array, not %s", kind_name(ids));
  }
  if (json_array_size(ids) > 64) {
    return qtr_api_fail(err, 400, "stop_token_ids", "stop_token_ids has %zu ids; at most 64 are allowed",
                        json_array_size(ids));
  }
  if (!get_tokens(ids, "stop_token_ids", &r->stop_token, &r->options.n_stop_token, err)) return false;
  r->options.stop_token = r->stop_token;
  return true;
}

/* {"1234": -100, …} */
static bool parse_bias(const json_t *o, struct qtr_api_request *r, struct qtr_api_error *err) {
  json_t *bias = member(o, "logit_bias");
  if (!bias) return true;
  if (!json_is_object(bias)) {
    return qtr_api_fail(err, 400, "logit_bias", "logit_bias must be an object of token ids and numbers, not %s",
                        kind_name(bias));
  }
  size_t n = json_object_size(bias), i = 0;
  if (n > 1024) return qtr_api_fail(err, 400, "logit_bias", "logit_bias has %zu entries; at most 1024 are allowed", n);
  if (n > 0 && !(r->bias = calloc(n, sizeof *r->bias))) return no_memory(err);
  const char *key;
  json_t *value;
  json_object_foreach(bias, key, value) {
    char *end;
    long id = key[0] >= '0' && key[0] <= '9' ? strtol(key, &end, 10) : -1;
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

static bool parse_logprobs(const json_t *o, struct qtr_api_request *r, struct qtr_api_error *err) {
  int32_t n = -1;
  if (r->kind == QTR_API_COMPLETION) {
    if (!get_int(o, "logprobs", 0, 20, &n, err)) return false;
    r->logprobs = n >= 0;
    if (r->logprobs && r->echo) {
      return qtr_api_fail(err, 400, "echo", "echo together with logprobs is not supported: leave one of them out");
    }
  } else {
    bool wanted = false;
    if (!get_bool(o, "logprobs", &wanted, err) || !get_int(o, "top_logprobs", 0, 20, &n, err)) return false;
    if (n >= 0 && !wanted) {
      return qtr_api_fail(err, 400, "top_logprobs", "top_logprobs needs logprobs to be true");
    }
    r->logprobs = wanted;
    if (wanted && n < 0) n = 0;
  }
  r->options.logprobs = r->logprobs ? n : -1;
  return true;
}

static bool parse_stream(const json_t *o, struct qtr_api_request *r, struct qtr_api_error *err) {
  if (!get_bool(o, "stream", &r->stream, err)) return false;
  const json_t *options = member(o, "stream_options");
  if (!options) return true;
  if (!json_is_object(options)) {
    return qtr_api_fail(err, 400, "stream_options", "stream_options must be an object, not %s", kind_name(options));
  }
  if (!r->stream) return qtr_api_fail(err, 400, "stream_options", "stream_options needs stream to be true");
  if (get_bool(options, "include_usage", &r->include_usage, err)) return true;
  (void)snprintf(err->param, sizeof err->param, "stream_options.include_usage");
  return false;
}

static bool parse_format(const json_t *o, struct qtr_api_request *r, struct qtr_api_error *err) {
  const json_t *format = member(o, "response_format");
  const char *type = NULL;
  if (!format) return true;
  if (!json_is_object(format)) {
    return qtr_api_fail(err, 400, "response_format", "response_format must be an object, not %s", kind_name(format));
  }
  if (!get_string(format, "type", &type, err) || !type) {
    return qtr_api_fail(err, 400, "response_format.type", "response_format.type must be text, json_object or json_schema");
  }
  if (strcmp(type, "text") == 0) return true;
  if (strcmp(type, "json_object") == 0) {
    r->format = QTR_FORMAT_JSON;
    return true;
  }
  if (strcmp(type, "json_schema") != 0) {
    return qtr_api_fail(err, 400, "response_format.type",
                        "response_format.type is \"%.40s\"; it must be text, json_object or json_schema", type);
  }
  const json_t *outer = member(format, "json_schema");
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

/* ---- messages ------------------------------------------------------------------------------------ */

/* The text of a message's content: a string, or an array of text parts, joined by newlines. *text is a new reference. */
static bool read_content(json_t *content, size_t i, json_t **text, struct qtr_api_error *err) {
  struct qtr_buffer joined = {0};
  if (!content) {
    *text = json_string("");
    return *text ? true : no_memory(err);
  }
  if (json_is_string(content)) {
    *text = json_incref(content);
    return true;
  }
  char param[64];
  (void)snprintf(param, sizeof param, "messages[%zu].content", i);
  if (!json_is_array(content)) {
    return qtr_api_fail(err, 400, param, "%s must be a string or an array of parts, not %s", param, kind_name(content));
  }
  for (size_t k = 0; k < json_array_size(content); k++) {
    const json_t *part = json_array_get(content, k), *type = json_object_get(part, "type"),
                 *piece = json_object_get(part, "text");
    const char *name = json_string_value(type);
    if (!name || (strcmp(name, "text") != 0 && strcmp(name, "input_text") != 0) || !json_is_string(piece)) {
      qtr_buffer_free(&joined);
      return qtr_api_fail(err, 400, param, "%s[%zu] is of type \"%.40s\"; this server takes text parts only", param, k,
                          name ? name : "(none)");
    }
    if (k > 0) qtr_buffer_puts(&joined, "\n");
    qtr_buffer_put(&joined, json_string_value(piece), json_string_length(piece));
  }
  *text = joined.failed ? NULL : json_stringn(joined.data ? joined.data : "", joined.len);
  qtr_buffer_free(&joined);
  return *text ? true : no_memory(err);
}

/* Templates want the arguments of past calls as objects, the API has them as strings of JSON. */
static bool read_tool_calls(json_t *calls, size_t i, json_t **out, struct qtr_api_error *err) {
  char param[64];
  (void)snprintf(param, sizeof param, "messages[%zu].tool_calls", i);
  if (!json_is_array(calls)) return qtr_api_fail(err, 400, param, "%s must be an array, not %s", param, kind_name(calls));
  *out = json_deep_copy(calls);
  if (!*out) return no_memory(err);
  for (size_t k = 0; k < json_array_size(*out); k++) {
    json_t *function = json_object_get(json_array_get(*out, k), "function");
    const json_t *arguments = json_object_get(function, "arguments");
    if (!json_is_string(json_object_get(function, "name"))) {
      json_decref(*out);
      *out = NULL;
      return qtr_api_fail(err, 400, param, "%s[%zu].function must be an object with a name", param, k);
    }
    if (!json_is_string(arguments)) continue;
    json_t *parsed = json_loadb(json_string_value(arguments), json_string_length(arguments), 0, NULL);
    if (json_is_object(parsed))
      (void)json_object_set_new(function, "arguments", parsed);
    else
      json_decref(parsed);
  }
  return true;
}

static bool read_message(json_t *from, size_t i, json_t *messages, struct qtr_api_error *err) {
  static const char *const roles[] = {"system", "developer", "user", "assistant", "tool", "function"};
  char param[64];
  (void)snprintf(param, sizeof param, "messages[%zu]", i);
  if (!json_is_object(from)) return qtr_api_fail(err, 400, param, "%s must be an object, not %s", param, kind_name(from));
  const char *role = json_string_value(json_object_get(from, "role"));
  bool known = false;
  for (size_t k = 0; role && k < sizeof roles / sizeof roles[0]; k++) known = known || strcmp(role, roles[k]) == 0;
  if (!known) {
    (void)snprintf(param, sizeof param, "messages[%zu].role", i);
    return qtr_api_fail(err, 400, param, "%s is \"%.40s\"; it must be system, developer, user, assistant or tool", param,
                        role ? role : "(not a string)");
  }
  json_t *message = json_copy(from), *content = NULL, *calls = NULL;
  bool ok = message || no_memory(err);
  json_t *given = member(from, "content"), *given_calls = member(from, "tool_calls");
  if (ok && !given && strcmp(role, "assistant") != 0) {
    (void)snprintf(param, sizeof param, "messages[%zu].content", i);
    ok = qtr_api_fail(err, 400, param, "%s is missing", param);
  }
  ok = ok && read_content(given, i, &content, err);
  if (ok) ok = json_object_set_new(message, "content", content) == 0 || no_memory(err);
  if (ok && given_calls) {
    ok = read_tool_calls(given_calls, i, &calls, err);
    if (ok) ok = json_object_set_new(message, "tool_calls", calls) == 0 || no_memory(err);
  } else if (ok) {
    (void)json_object_del(message, "tool_calls"); /* null is absent to a template as well */
  }
  /* OpenAI's newer name for the same thing; no template knows it */
  if (ok && strcmp(role, "developer") == 0) {
    ok = json_object_set_new(message, "role", json_string("system")) == 0 || no_memory(err);
  }
  if (ok) ok = json_array_append(messages, message) == 0 || no_memory(err);
  json_decref(message);
  return ok;
}

static bool parse_messages(const json_t *o, json_t **messages, struct qtr_api_error *err) {
  json_t *from = member(o, "messages");
  if (!from) return qtr_api_fail(err, 400, "messages", "messages is missing");
  if (!json_is_array(from)) return qtr_api_fail(err, 400, "messages", "messages must be an array, not %s", kind_name(from));
  if (json_array_size(from) == 0) return qtr_api_fail(err, 400, "messages", "messages is empty; give at least one message");
  *messages = json_array();
  if (!*messages) return no_memory(err);
  for (size_t i = 0; i < json_array_size(from); i++) {
    if (!read_message(json_array_get(from, i), i, *messages, err)) return false;
  }
  return true;
}

/* ---- tools --------------------------------------------------------------------------------------- */

static bool is_tool_name(const char *name) {
  size_t n = strlen(name);
  if (n == 0 || n > 64) return false;
  for (size_t i = 0; i < n; i++) {
    char c = name[i];
    if (!((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-' || c == '.'))
      return false;
  }
  return true;
}

static bool parse_tools(const json_t *o, struct qtr_api_request *r, struct qtr_api_error *err) {
  json_t *tools = member(o, "tools");
  const json_t *choice = member(o, "tool_choice");
  r->parallel_tool_calls = true;
  if (!get_bool(o, "parallel_tool_calls", &r->parallel_tool_calls, err)) return false;
  if (tools && !json_is_array(tools))
    return qtr_api_fail(err, 400, "tools", "tools must be an array, not %s", kind_name(tools));
  size_t n = json_array_size(tools);
  if (n > QTR_API_MAX_TOOLS) {
    return qtr_api_fail(err, 400, "tools", "tools has %zu entries; at most %d are allowed", n, QTR_API_MAX_TOOLS);
  }
  for (size_t i = 0; i < n; i++) {
    const json_t *tool = json_array_get(tools, i), *function = json_object_get(tool, "function"),
                 *parameters = json_object_get(function, "parameters");
    const char *type = json_string_value(json_object_get(tool, "type")),
               *name = json_string_value(json_object_get(function, "name"));
    char param[64];
    (void)snprintf(param, sizeof param, "tools[%zu]", i);
    if (!type || strcmp(type, "function") != 0) {
      return qtr_api_fail(err, 400, param, "%s.type must be \"function\"", param);
    }
    if (!name || !is_tool_name(name)) {
      return qtr_api_fail(err, 400, param, "%s.function.name must be 1 to 64 letters, digits, dots, dashes or underscores",
                          param);
    }
    if (parameters && !json_is_null(parameters) && !json_is_object(parameters)) {
      return qtr_api_fail(err, 400, param, "%s.function.parameters must be an object, not %s", param, kind_name(parameters));
    }
  }
  r->tools = n > 0 ? tools : NULL;
  r->tool_choice = n > 0 ? QTR_TOOLS_AUTO : QTR_TOOLS_NONE;
  if (!choice) return true;
  const char *word = json_string_value(choice);
  if (word && strcmp(word, "none") == 0) {
    r->tool_choice = QTR_TOOLS_NONE;
    return true;
  }
  if (n == 0) return qtr_api_fail(err, 400, "tool_choice", "tool_choice needs tools");
  if (word && strcmp(word, "auto") == 0) return true;
  if (word && strcmp(word, "required") == 0) {
    r->tool_choice = QTR_TOOLS_REQUIRED;
    return true;
  }
  const char *name = json_string_value(json_object_get(json_object_get(choice, "function"), "name"));
  if (!name) {
    return qtr_api_fail(err, 400, "tool_choice",
                        "tool_choice must be none, auto, required or {\"type\":\"function\",\"function\":{\"name\":…}}");
  }
  for (size_t i = 0; i < n; i++) {
    const json_t *function = json_object_get(json_array_get(tools, i), "function");
    if (strcmp(json_string_value(json_object_get(function, "name")), name) == 0) r->tool_choice = QTR_TOOLS_NAMED;
  }
  r->tool_name = name;
  return r->tool_choice == QTR_TOOLS_NAMED ||
         qtr_api_fail(err, 400, "tool_choice", "tool_choice names \"%.64s\", which is not among the tools", name);
}

/* ---- prompts ------------------------------------------------------------------------------------- */

/* "text", ["text", …], [1, 2, …] or [[1, 2, …], …] */
static bool parse_prompt(const json_t *o, struct qtr_api_request *r, struct qtr_api_error *err) {
  json_t *prompt = member(o, "prompt");
  if (!prompt) return qtr_api_fail(err, 400, "prompt", "prompt is missing");
  if (!json_is_string(prompt) && !json_is_array(prompt)) {
    return qtr_api_fail(err, 400, "prompt", "prompt must be a string, an array of strings or token ids, not %s",
                        kind_name(prompt));
  }
  const json_t *first = json_array_get(prompt, 0);
  bool single = json_is_string(prompt) || json_is_number(first);
  size_t n = single ? 1 : json_array_size(prompt);
  if (n == 0) return qtr_api_fail(err, 400, "prompt", "prompt is empty");
  if (n > QTR_API_MAX_PROMPTS) {
    return qtr_api_fail(err, 400, "prompt", "prompt has %zu entries; at most %d are allowed", n, QTR_API_MAX_PROMPTS);
  }
  r->prompt = calloc(n, sizeof *r->prompt);
  if (!r->prompt) return no_memory(err);
  r->n_prompts = n;
  for (size_t i = 0; i < n; i++) {
    const json_t *item = single ? prompt : json_array_get(prompt, i);
    struct qtr_api_prompt *p = &r->prompt[i];
    if (json_is_string(item) && (single || json_is_string(first))) {
      p->text = json_string_value(item);
      p->len = json_string_length(item);
    } else if (json_is_array(item) && (single || json_is_array(first))) {
      if (!get_tokens(item, "prompt", &p->token, &p->n_token, err)) return false;
      if (p->n_token == 0) return qtr_api_fail(err, 400, "prompt", "prompt[%zu] is empty; give at least one token", i);
    } else {
      return qtr_api_fail(err, 400, "prompt", "prompt[%zu] is %s; all entries must be of one kind: strings or token arrays",
                          i, kind_name(item));
    }
  }
  return true;
}

/* ---- whole requests ------------------------------------------------------------------------------ */

static bool parse_common(const json_t *o, struct qtr_api_request *r, struct qtr_api_error *err) {
  const json_t *user = member(o, "user"); /* for nobody: only its type is checked */
  if (user && !json_is_string(user)) return qtr_api_fail(err, 400, "user", "user must be a string, not %s", kind_name(user));
  return get_string(o, "model", &r->model, err) && parse_sampling(o, r, err) && parse_stop(o, r, err) &&
         parse_bias(o, r, err) && parse_stream(o, r, err) && parse_format(o, r, err);
}

static bool parse_chat(const json_t *o, struct qtr_api_request *r, struct qtr_api_error *err) {
  bool generation = true;
  if (!parse_messages(o, &r->messages, err) || !parse_tools(o, r, err) || !parse_logprobs(o, r, err)) return false;
  r->n_prompts = 1;
  /* the newer name wins, as at OpenAI */
  if (!get_int(o, "max_tokens", 1, INT32_MAX, &r->options.max_tokens, err) ||
      !get_int(o, "max_completion_tokens", 1, INT32_MAX, &r->options.max_tokens, err) ||
      !get_bool(o, "add_generation_prompt", &generation, err)) {
    return false;
  }
  r->template_variables = member(o, "chat_template_kwargs");
  if (r->template_variables && !json_is_object(r->template_variables)) {
    return qtr_api_fail(err, 400, "chat_template_kwargs", "chat_template_kwargs must be an object, not %s",
                        kind_name(r->template_variables));
  }
  r->continue_final = !generation;
  if (r->format != QTR_FORMAT_TEXT && r->tools && r->tool_choice != QTR_TOOLS_NONE) {
    return qtr_api_fail(err, 400, "response_format",
                        "response_format together with tools is not supported: leave one out, or "
                        "set tool_choice to none");
  }
  return true;
}

static bool parse_completion(const json_t *o, struct qtr_api_request *r, struct qtr_api_error *err) {
  const char *suffix = NULL;
  if (!get_bool(o, "echo", &r->echo, err) || !parse_prompt(o, r, err) || !parse_logprobs(o, r, err) ||
      !get_string(o, "suffix", &suffix, err) || !get_int(o, "max_tokens", 1, INT32_MAX, &r->options.max_tokens, err)) {
    return false;
  }
  if (suffix && *suffix) return qtr_api_fail(err, 400, "suffix", "suffix is not supported: this server only continues text");
  size_t n = r->n_prompts * (size_t)r->options.n;
  return n <= QTR_API_MAX_CHOICES || qtr_api_fail(err, 400, "n", "%zu prompts of %d completions each are more than %d",
                                                  r->n_prompts, r->options.n, QTR_API_MAX_CHOICES);
}

bool qtr_api_parse(enum qtr_api_kind kind, const char *body, size_t len, const struct qtr_api_defaults *defaults,
                   struct qtr_api_request *r, struct qtr_api_error *err) {
  *r = (struct qtr_api_request){.kind = kind};
  *err = (struct qtr_api_error){0};
  qtr_request_options_init(&r->options);
  r->options.sampling = defaults->sampling;
  r->options.n = 1;
  r->options.max_tokens = kind == QTR_API_COMPLETION ? QTR_API_DEFAULT_TOKENS : defaults->max_tokens;
  bool ok = load(body, len, &r->root, err) && parse_common(r->root, r, err) &&
            (kind == QTR_API_CHAT ? parse_chat(r->root, r, err) : parse_completion(r->root, r, err));
  if (!ok) qtr_api_request_free(r);
  return ok;
}

void qtr_api_request_free(struct qtr_api_request *r) {
  for (size_t i = 0; r->prompt && i < r->n_prompts; i++) free(r->prompt[i].token);
  free(r->prompt);
  free(r->stop);
  free(r->stop_token);
  free(r->bias);
  json_decref(r->messages);
  json_decref(r->root);
  *r = (struct qtr_api_request){0};
}

bool qtr_api_parse_tokenize(const char *body, size_t len, bool decode, struct qtr_api_tokenize *r,
                            struct qtr_api_error *err) {
  *r = (struct qtr_api_tokenize){.add_special = true, .add_generation_prompt = true};
  *err = (struct qtr_api_error){0};
  if (!load(body, len, &r->root, err)) return false;
  const json_t *o = r->root, *tokens = member(o, "tokens");
  bool ok = get_string(o, "model", &r->model, err);
  if (decode) {
    ok = ok && (json_is_array(tokens) || qtr_api_fail(err, 400, "tokens", "tokens must be an array of token ids")) &&
         get_tokens(tokens, "tokens", &r->token, &r->n_token, err);
  } else {
    ok = ok && get_text(o, "content", &r->text, err) && get_text(o, "prompt", &r->text, err) &&
         get_bool(o, "add_special_tokens", &r->add_special, err) &&
         get_bool(o, "add_generation_prompt", &r->add_generation_prompt, err);
    if (ok && r->text) {
      r->len = json_string_length(member(o, "prompt") ? member(o, "prompt") : member(o, "content"));
    } else if (ok) {
      r->tools = member(o, "tools");
      ok = member(o, "messages")
               ? parse_messages(o, &r->messages, err)
               : qtr_api_fail(err, 400, "prompt", "prompt is missing (or messages, for the chat template)");
      if (ok && r->tools && !json_is_array(r->tools)) {
        ok = qtr_api_fail(err, 400, "tools", "tools must be an array, not %s", kind_name(r->tools));
      }
    }
  }
  if (!ok) qtr_api_tokenize_free(r);
  return ok;
}

void qtr_api_tokenize_free(struct qtr_api_tokenize *r) {
  free(r->token);
  json_decref(r->messages);
  json_decref(r->root);
  *r = (struct qtr_api_tokenize){0};
}
