/* openapi.c - the description of the API that /openapi.json gives (OpenAPI 3.1). Written with single quotes, which become
 * double ones; @MODEL@, @VERSION@ and @LAST@ (the largest token id) are filled in. What it says must be what request_parse.c
 * does. */
#include "server/server_internal.h"

#include <string.h>

#define NULLABLE(type, rest) "{'type':['" type "','null']" rest "}"
#define RANGE(type, low, high) NULLABLE(type, ",'minimum':" low ",'maximum':" high)
#define FLAG NULLABLE("boolean", "")
#define REF(name) "{'$ref':'#/components/schemas/" name "'}"
#define TOKENS "{'type':'array','minItems':1,'items':" REF("Token") "}"
#define ANSWER(schema) "{'description':'done','content':{'application/json':{'schema':" schema "}}}"
#define ERRORS "'default':{'description':'an error','content':{'application/json':{'schema':" REF("Error") "}}}"
#define GET(summary, schema) "{'get':{'summary':'" summary "','responses':{'200':" ANSWER(schema) "," ERRORS "}}}"
#define POST(summary, body, answers)                                                                                \
  "{'post':{'summary':'" summary                                                                                    \
  "','requestBody':{'required':true,'content':{'application/json':{'schema':" REF(body) "}}},'responses':{" answers \
                                                                                        "," ERRORS "}}}"
#define STREAMED(schema) \
  "'200':{'description':'done','content':{'application/json':{'schema':" schema "},'text/event-stream':{'schema':{}}}}"

/* Members of both kinds of requests. */
#define SAMPLING \
  "'model':{'enum':['@MODEL@',null]},'temperature':" RANGE("number", "0", "100") ",'top_p':" NULLABLE(                            \
      "number", ",'exclusiveMinimum':0,'maximum':1") ",'top_k':" RANGE("integer", "-1",                                     \
                                                                      "2147483647") ",'min_p':" RANGE("number", "0", "1")  \
      ",'presence_penalty':" RANGE("number", "-2", "2") ",'frequency_penalty':" RANGE("number", "-2", "2")                  \
          ",'repetition_penalty':" NULLABLE("number", ",'exclusiveMinimum':0,'maximum':2") ",'n':" RANGE("integer", "1",    \
                                                                                                         "64")              \
              ",'seed':" NULLABLE("integer", "") ",'ignore_eos':" FLAG ",'user':" NULLABLE( \
                  "string", "") ",'stop':{'anyOf':[{'type':'null'}," REF("Stop") ",{'type':'array','maxItems':16,'items':" REF( \
                  "Stop") "}]},'stop_token_ids':" NULLABLE("array", ",'maxItems':64,'items':" REF("Token"))                 \
                  ",'logit_bias':" NULLABLE("object", ",'maxProperties':1024,'propertyNames':{'pattern':'^(0|[1-9][0-9]{0,2})$'},"  \
                                                      "'additionalProperties':{'type':'number','minimum':-100,'maximum':100}")     \
                      ",'stream':" FLAG

static const char document[] =
    "{'openapi':'3.1.0','info':{'title':'Quattuor','version':'@VERSION@','description':'OpenAI-compatible text generation. "
    "Members that are not described here are ignored; some, such as stream_options, top_logprobs, response_format and tools, "
    "are described in docs/server.md.'},"
    "'paths':{"
    "'/v1/chat/completions':" POST("Answers a conversation", "ChatRequest", STREAMED(REF("Completion"))) ","
    "'/v1/completions':" POST("Continues text", "CompletionRequest", STREAMED(REF("Completion"))) ","
    "'/v1/models':" GET("The model", REF("List")) ","
    "'/v1/models/{model}':{'parameters':[{'name':'model','in':'path','required':true,'schema':{'const':'@MODEL@'}}],"
    "'get':{'summary':'The model','responses':{'200':" ANSWER(REF("Model")) "," ERRORS "}}},"
    "'/tokenize':" POST("Text to tokens", "TokenizeRequest", "'200':" ANSWER(
        "{'type':'object','required':['count','max_model_len','tokens'],'properties':{'tokens':{'type':'array','items':" REF(
            "Token") "}}}")) ","
    "'/detokenize':" POST("Tokens to text", "DetokenizeRequest", "'200':" ANSWER(
        "{'type':'object','required':['prompt'],'properties':{'prompt':{'type':'string'}}}")) ","
    "'/health':{'get':{'summary':'Does it work','security':[],'responses':{'200':" ANSWER("{'type':'object'}") ",'503':" ANSWER(
        "{'type':'object'}") "," ERRORS "}}},"
    "'/version':" GET("The version", "{'type':'object','required':['version']}") ","
    "'/metrics':{'get':{'summary':'Prometheus metrics','responses':{'200':{'description':'done','content':{'text/plain':{'schema':{"
    "'type':'string'}}}}," ERRORS "}}}},"
    "'components':{'schemas':{"
    "'Token':{'type':'integer','minimum':0,'maximum':@LAST@},"
    "'Stop':{'type':'string','minLength':1,'pattern':'^[^\\u0000]+$','description':'at most 256 bytes'},"
    "'Error':{'type':'object','required':['error'],'properties':{'error':{'type':'object','required':['message','type','param','code'],"
    "'properties':{'message':{'type':'string'},'type':{'type':'string'},'param':{'type':['string','null']},"
    "'code':{'type':['string','null']}}}}},"
    "'Model':{'type':'object','required':['id','object','created','owned_by'],'properties':{'id':{'type':'string'}}},"
    "'List':{'type':'object','required':['object','data'],'properties':{'data':{'type':'array','items':" REF("Model") "}}},"
    "'Completion':{'type':'object','required':['id','object','created','model','choices','usage'],'properties':{"
    "'choices':{'type':'array','minItems':1,'items':{'type':'object','required':['index','finish_reason'],'properties':{"
    "'index':{'type':'integer'},'finish_reason':{'enum':['stop','length','tool_calls']}}}},"
    "'usage':{'type':'object','required':['prompt_tokens','completion_tokens','total_tokens']}}},"
    "'Message':{'type':'object','required':['role','content'],'properties':{"
    "'role':{'enum':['system','developer','user','assistant','tool']},"
    "'content':{'anyOf':[{'type':'string'},{'type':'array','items':{'type':'object','required':['type','text'],"
    "'properties':{'type':{'const':'text'},'text':{'type':'string'}}}}]}}},"
    "'ChatRequest':{'type':'object','required':['messages'],'properties':{" SAMPLING
    ",'messages':{'type':'array','minItems':1,'items':" REF("Message") "},"
    "'max_tokens':" RANGE("integer", "1", "2147483647") ",'max_completion_tokens':" RANGE("integer", "1", "2147483647")
    ",'logprobs':" FLAG "}},"
    "'CompletionRequest':{'type':'object','required':['prompt'],'properties':{" SAMPLING
    ",'prompt':{'anyOf':[{'type':'string'}," TOKENS ",{'type':'array','minItems':1,'maxItems':256,'items':{'type':'string'}},"
    "{'type':'array','minItems':1,'maxItems':256,'items':" TOKENS "}]},"
    "'max_tokens':" RANGE("integer", "1", "2147483647") ",'echo':" FLAG "}},"
    "'TokenizeRequest':{'type':'object','required':['prompt'],'properties':{'model':{'enum':['@MODEL@',null]},'prompt':{'type':'string'},"
    "'add_special_tokens':" FLAG "}},"
    "'DetokenizeRequest':{'type':'object','required':['tokens'],'properties':{'model':{'enum':['@MODEL@',null]},'tokens':{'type':'array',"
    "'items':" REF("Token") "}}}},"
    "'securitySchemes':{'key':{'type':'http','scheme':'bearer'}}}@SECURITY@}";

void qtr_openapi_write(const struct qtr_server *s, struct qtr_buffer *out) {
  for (const char *at = document; *at;) {
    size_t n = strcspn(at, "'@");
    qtr_buffer_put(out, at, n);
    at += n;
    if (*at == '\'') {
      qtr_buffer_puts(out, "\"");
      at++;
    } else if (strncmp(at, "@MODEL@", 7) == 0) {
      struct qtr_buffer name = {0};
      qtr_buffer_string(&name, s->o->model_name, strlen(s->o->model_name));
      if (name.len > 2) qtr_buffer_put(out, name.data + 1, name.len - 2); /* the quotes are there already */
      qtr_buffer_free(&name);
      at += 7;
    } else if (strncmp(at, "@VERSION@", 9) == 0) {
      qtr_buffer_puts(out, qtr_version());
      at += 9;
    } else if (strncmp(at, "@LAST@", 6) == 0) {
      qtr_buffer_printf(out, "%d", s->info.vocab_size - 1);
      at += 6;
    } else if (strncmp(at, "@SECURITY@", 10) == 0) {
      if (s->o->n_api_keys > 0) qtr_buffer_puts(out, ",\"security\":[{\"key\":[]}]");
      at += 10;
    }
  }
}
