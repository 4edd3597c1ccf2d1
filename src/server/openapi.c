/* openapi.c - the description of the API that /openapi.json gives (OpenAPI 3.1). The members of requests come from the table
 * that the parser follows (request_parse.h) and the paths from the table of routes, so neither can say what the server does
 * not do; the rest is text here. Written with single quotes, which become double ones; @MODEL@, @VERSION@, @LAST@ (the
 * largest token id), @TEXT@ (what any string may be) and @SECURITY@ are filled in.
 *
 * JSON Schema cannot say everything ("tool_choice names one of tools"). A member whose value may fit its schema and still be
 * refused has "x-further-rules": true and says the rule in its description; every other one is described exactly. */
#include "server/server_internal.h"

#include <string.h>

#define REF(name) "{'$ref':'#/components/schemas/" name "'}"
#define JSON(schema) "'content':{'application/json':{'schema':" schema "}}"
#define ANSWER(description, schema) "{'description':'" description "'," JSON(schema) "}"
#define OBJECT(required, properties) "{'type':'object','required':[" required "],'properties':{" properties "}}"
#define TEXT "{'type':'string'}"
#define NULLABLE_TEXT "{'type':['string','null']}"
#define COUNT "{'type':'integer','minimum':0}"
#define LIST(items) "{'type':'array','items':" items "}"
#define STREAMED(schema, chunk)                                                \
  "{'description':'The answer; with stream, server-sent events: each a " chunk \
  " after data: , the last one [DONE].',"                                      \
  "'content':{'application/json':{'schema':" schema                            \
  "},'text/event-stream':{'schema':" OBJECT("'data'", "'data':" TEXT) "}}}"

/* What a route answers and how its request is called, by path. */
static const struct {
  const char *path, *summary, *id;
  const char *body;    /* of a POST: the schema's name */
  const char *answers; /* besides those that every route has */
} operation[] = {
    {"/v1/chat/completions", "Answers a conversation", "chat", "ChatRequest",
     "'200':" STREAMED(REF("Chat"), "chat.completion.chunk")},
    {"/v1/completions", "Continues text", "complete", "CompletionRequest",
     "'200':" STREAMED(REF("Completion"), "text_completion")},
    {"/v1/embeddings", "Not supported", "embed", "EmbeddingsRequest", "'501':" ANSWER("Always.", REF("Error"))},
    {"/v1/models", "The model", "listModels", NULL,
     "'200':" ANSWER("A list of one.", OBJECT("'object','data'", "'object':{'const':'list'},'data':" LIST(REF("Model"))))},
    {"/v1/models/", "The model by its name", "getModel", NULL, "'200':" ANSWER("The model.", REF("Model"))},
    {"/tokenize", "Text or a conversation to tokens", "tokenize", "TokenizeRequest",
     "'200':" ANSWER("The tokens.", OBJECT("'count','max_model_len','tokens'",
                                           "'count':" COUNT ",'max_model_len':" COUNT ",'tokens':" LIST(REF("Token"))))},
    {"/detokenize", "Tokens to text", "detokenize", "DetokenizeRequest",
     "'200':" ANSWER("The text.", OBJECT("'prompt','content'", "'prompt':" TEXT ",'content':" TEXT))},
    {"/health", "Whether it works; needs no key", "health", NULL,
     "'200':" ANSWER("It works.", OBJECT("'status'", "'status':{'const':'ok'}")) ",'503':" ANSWER(
         "The engine has failed, or the server is shutting down.",
         OBJECT("'status'", "'status':{'enum':['failed','shutting down']},'error':" TEXT))},
    {"/metrics", "Prometheus metrics", "metrics", NULL,
     "'200':{'description':'Text.','content':{'text/plain':{'schema':" TEXT "}}}"},
    {"/version", "The version", "version", NULL, "'200':" ANSWER("The version.", OBJECT("'version'", "'version':" TEXT))},
    {"/openapi.json", "This document", "openapi", NULL, "'200':" ANSWER("The document.", OBJECT("'openapi','paths'", ""))},
};

static const char *const body_name[QTR_API_KINDS] = {"ChatRequest", "CompletionRequest", "TokenizeRequest",
                                                     "DetokenizeRequest"};

#define CHOICES(also, properties) LIST(OBJECT("'index','finish_reason','logprobs'," also, properties))
#define ANSWER_OBJECT(kind, choices)                                                                           \
  OBJECT("'id','object','created','model','choices','usage'",                                                  \
         "'id':" TEXT ",'object':{'const':'" kind "'},'created':" COUNT ",'model':" TEXT ",'choices':" choices \
         ",'usage':" REF("Usage") ",'system_fingerprint':" NULLABLE_TEXT)

static const char schemas[] =
    "'Token':{'type':'integer','minimum':0,'maximum':@LAST@},"
    "'Tokens':{'type':'array','minItems':1,'items':" REF("Token") "},"
    "'Stop':{'type':'string','minLength':1,'maxLength':256,'pattern':'^[^\\\\u0000]+$'},"
    "'EmbeddingsRequest':{},"
    "'Error':" OBJECT("'error'", "'error':" OBJECT("'message','type','param','code'",
                                                   "'message':" TEXT ",'type':" TEXT ",'param':" NULLABLE_TEXT
                                                   ",'code':" NULLABLE_TEXT)) ","
    "'Model':" OBJECT("'id','object','created','owned_by','max_model_len'",
                      "'id':" TEXT ",'object':{'const':'model'},'created':" COUNT ",'owned_by':" TEXT
                      ",'max_model_len':" COUNT) ","
    "'Usage':" OBJECT("'prompt_tokens','completion_tokens','total_tokens'",
                      "'prompt_tokens':" COUNT ",'completion_tokens':" COUNT ",'total_tokens':" COUNT
                      ",'prompt_tokens_details':" OBJECT("'cached_tokens'", "'cached_tokens':" COUNT)) ","
    "'FinishReason':{'enum':['stop','length','tool_calls']},"
    "'Completion':" ANSWER_OBJECT(
        "text_completion",
        CHOICES("'text'", "'index':" COUNT ",'text':" TEXT ",'finish_reason':" REF("FinishReason")
               ",'logprobs':{'anyOf':[{'type':'null'}," OBJECT("'tokens','token_logprobs','top_logprobs','text_offset'",
                   "'tokens':" LIST(TEXT) ",'token_logprobs':" LIST("{'type':['number','null']}")
                   ",'top_logprobs':" LIST("{'type':['object','null']}") ",'text_offset':" LIST(COUNT)) "]}")) ","
    "'Chat':" ANSWER_OBJECT(
        "chat.completion",
        CHOICES("'message'", "'index':" COUNT ",'finish_reason':" REF("FinishReason") ",'message':" OBJECT("'role','content'",
               "'role':{'const':'assistant'},'content':" NULLABLE_TEXT ",'refusal':{'type':'null'},'tool_calls':" LIST(
                   REF("ToolCall"))) ",'logprobs':{'anyOf':[{'type':'null'}," OBJECT("'content'", "'content':" LIST(
                   OBJECT("'token','logprob','bytes','top_logprobs'", "'token':" TEXT ",'logprob':{'type':'number'}"
                   ",'bytes':{'type':['array','null'],'items':" COUNT "},'top_logprobs':" LIST("{'type':'object'}")))
                   ",'refusal':{'type':'null'}") "]}")) ","
    "'ToolCall':" OBJECT("'id','type','function'", "'id':" TEXT ",'type':{'const':'function'},'function':" OBJECT(
        "'name','arguments'", "'name':" TEXT ",'arguments':" TEXT)) ","
    "'Parts':" LIST(OBJECT("'type','text'", "'type':{'enum':['text','input_text']},'text':" TEXT)) ","
    "'PastCalls':{'type':['array','null'],'items':" OBJECT("'function'", "'function':" OBJECT("'name'", "'name':" TEXT)) "},"
    "'Message':{'anyOf':[" OBJECT("'role','content'", "'role':{'enum':['system','developer','user','assistant','tool','function']},"
        "'content':{'anyOf':[" TEXT "," REF("Parts") "]},'tool_calls':" REF("PastCalls")) "," OBJECT("'role'",
        "'role':{'const':'assistant'},'content':{'type':'null'},'tool_calls':" REF("PastCalls")) "]},"
    "'Tool':" OBJECT("'type','function'", "'type':{'const':'function'},'function':" OBJECT(
        "'name'", "'name':{'type':'string','pattern':'^[A-Za-z0-9_.-]{1,64}$'},'parameters':{'type':['object','null']}"));

/* Text with ' for " and @LAST@ filled in. */
static void put(const struct qtr_server *s, struct qtr_buffer *out, const char *text) {
  for (const char *at = text; *at;) {
    size_t n = strcspn(at, "'@");
    qtr_buffer_put(out, at, n);
    at += n;
    if (*at == '\'') {
      qtr_buffer_puts(out, "\"");
      at++;
    } else if (strncmp(at, "@LAST@", 6) == 0) {
      qtr_buffer_printf(out, "%d", s->info.vocab_size - 1);
      at += 6;
    } else if (*at) {
      qtr_buffer_put(out, at++, 1);
    }
  }
}

static void put_text(struct qtr_buffer *out, const char *text) { qtr_buffer_string(out, text, strlen(text)); }

/* A member's schema. null is absent, so it is allowed wherever absence is. */
static void put_field(const struct qtr_server *s, struct qtr_buffer *out, const struct qtr_api_field *f) {
  static const char *const type[] = {
      [QTR_API_FLAG] = "boolean", [QTR_API_WHOLE] = "integer", [QTR_API_NUMBER] = "number", [QTR_API_STRING] = "string"};
  put_text(out, f->name);
  qtr_buffer_puts(out, ":{");
  if (f->offset == offsetof(struct qtr_api_request, model)) { /* another one is a 404 */
    qtr_buffer_puts(out, "\"enum\":[");
    put_text(out, s->o->model_name);
    qtr_buffer_puts(out, ",null]}");
    return;
  }
  if (f->note) {
    qtr_buffer_puts(out, "\"description\":");
    put_text(out, f->note);
    qtr_buffer_puts(out, ",\"x-further-rules\":true,");
  }
  if (f->type == QTR_API_OTHER && f->required) {
    put(s, out, f->schema + 1); /* an object: our brace is open */
    return;
  }
  if (f->type == QTR_API_OTHER) {
    put(s, out, "'anyOf':[{'type':'null'},");
    put(s, out, f->schema);
    put(s, out, "]}");
    return;
  }
  qtr_buffer_printf(out, "\"type\":[\"%s\",\"null\"]", type[f->type]);
  if (f->type == QTR_API_WHOLE || f->type == QTR_API_NUMBER) {
    qtr_buffer_printf(out, ",\"%s\":%.17g,\"maximum\":%.17g", f->open_min ? "exclusiveMinimum" : "minimum", f->min, f->max);
  }
  qtr_buffer_puts(out, "}");
}

static void put_body(const struct qtr_server *s, struct qtr_buffer *out, int kind) {
  size_t n_fields, n = 0;
  const struct qtr_api_field *field = qtr_api_fields(&n_fields);
  qtr_buffer_printf(out, "\"%s\":{\"type\":\"object\",\"required\":[", body_name[kind]);
  for (size_t i = 0; i < n_fields; i++) {
    if (!field[i].required || !(field[i].kinds & 1u << kind)) continue;
    if (n++ > 0) qtr_buffer_puts(out, ",");
    put_text(out, field[i].name);
  }
  put(s, out, "],");
  if (kind == QTR_API_TOKENIZE) { /* one of them, and not null */
    put(s, out,
        "'anyOf':[{'required':['prompt'],'properties':{'prompt':{'type':'string'}}},{'required':['content'],'properties':{"
        "'content':{'type':'string'}}},{'required':['messages'],'properties':{'messages':{'type':'array'}}}],");
  }
  put(s, out, "'properties':{");
  n = 0;
  for (size_t i = 0; i < n_fields; i++) {
    if (!(field[i].kinds & 1u << kind)) continue;
    if (n++ > 0) qtr_buffer_puts(out, ",");
    put_field(s, out, &field[i]);
  }
  qtr_buffer_puts(out, "}}");
}

static void put_route(const struct qtr_server *s, struct qtr_buffer *out, const struct qtr_route *route) {
  size_t i = 0, n = sizeof operation / sizeof operation[0];
  while (i < n && strcmp(operation[i].path, route->path) != 0) i++;
  if (i == n) return; /* a unit test finds it */
  bool by_name = route->path[strlen(route->path) - 1] == '/';
  qtr_buffer_printf(out, "\"%s%s\":{", route->path, by_name ? "{model}" : "");
  if (by_name) {
    put(s, out, "'parameters':[{'name':'model','in':'path','required':true,'schema':{'const':");
    put_text(out, s->o->model_name);
    put(s, out, "}}],");
  }
  qtr_buffer_printf(out, "\"%s\":{\"operationId\":\"%s\",\"summary\":\"%s\",", route->post ? "post" : "get", operation[i].id,
                    operation[i].summary);
  if (route->open) put(s, out, "'security':[],");
  if (route->post) {
    put(s, out, "'requestBody':{'required':true,'content':{'application/json':{'schema':{'$ref':'#/components/schemas/");
    qtr_buffer_printf(out, "%s\"}}}},", operation[i].body);
  }
  put(s, out, "'responses':{");
  put(s, out, operation[i].answers);
  static const struct {
    int status;
    bool post; /* a POST's only */
    const char *why;
  } refusal[] = {{400, false, "What was asked is malformed; param names the member."},
                 {401, false, "The key is missing or wrong."},
                 {404, false, "There is no such model."},
                 {413, true, "The body is too large."},
                 {415, true, "The body is not application/json."},
                 {429, true, "The queue is full; Retry-After says when to ask again."},
                 {500, true, "The answer failed."},
                 {504, true, "The request took too long."}};
  for (size_t k = 0; k < sizeof refusal / sizeof refusal[0]; k++) {
    if ((refusal[k].post && !route->post) || (refusal[k].status == 401 && (route->open || s->o->n_api_keys == 0))) continue;
    qtr_buffer_printf(out, ",\"%d\":{\"description\":\"%s\",", refusal[k].status, refusal[k].why);
    put(s, out, JSON(REF("Error")) "}");
  }
  put(s, out, ",'default':" ANSWER("Another error.", REF("Error")) "}}}");
}

void qtr_openapi_write(const struct qtr_server *s, struct qtr_buffer *out) {
  size_t n_routes, n = 0;
  const struct qtr_route *route = qtr_routes(&n_routes);
  put(s, out, "{'openapi':'3.1.0','info':{'title':'Quattuor','version':'");
  qtr_buffer_puts(out, qtr_version());
  put(s, out,
      "','description':'OpenAI-compatible text generation. Members that are not described are ignored; null means absent. "
      "Where x-further-rules is true, the description says for what a value that fits the schema may still be refused.'},"
      "'paths':{");
  for (size_t i = 0; i < n_routes; i++) {
    if (route[i].page) continue;
    if (n++ > 0) qtr_buffer_puts(out, ",");
    put_route(s, out, &route[i]);
  }
  put(s, out, "},'components':{'schemas':{");
  put(s, out, schemas);
  for (int kind = 0; kind < QTR_API_KINDS; kind++) {
    qtr_buffer_puts(out, ",");
    put_body(s, out, kind);
  }
  put(s, out, "},'securitySchemes':{'key':{'type':'http','scheme':'bearer'}}}");
  if (s->o->n_api_keys > 0) put(s, out, ",'security':[{'key':[]}]");
  qtr_buffer_puts(out, "}");
}
