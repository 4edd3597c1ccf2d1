/* fuzz_server_request.c - input: a selector byte, then the body of a request. What is accepted must be within the documented
 * ranges, what is refused must give an error whose JSON is JSON. */
#include "server/buffer.h"
#include "server/request_parse.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check_error(const struct qtr_api_error *err) {
  struct qtr_buffer out = {0};
  if (err->http < 400 || !err->type || !err->message[0]) abort();
  qtr_api_error_write(err, &out);
  json_t *json = json_loadb(out.data, out.len, 0, NULL);
  if (!json) abort();
  json_decref(json);
  qtr_buffer_free(&out);
}

static void check_request(const struct qtr_api_request *r) {
  const struct qtr_request_options *o = &r->options;
  if (o->n < 1 || o->n > 64 || o->n_stop > 16 || o->n_stop_token > 64 || o->n_logit_bias > 1024 || o->max_tokens < 0 ||
      o->logprobs < -1 || o->logprobs > 20 || r->n_prompts < 1 || r->n_prompts > QTR_API_MAX_PROMPTS ||
      !(o->sampling.temperature >= 0) || !(o->sampling.top_p > 0 && o->sampling.top_p <= 1) ||
      !(o->sampling.min_p >= 0 && o->sampling.min_p <= 1) || !(o->sampling.repetition_penalty > 0)) {
    abort();
  }
  for (size_t i = 0; i < o->n_stop; i++) {
    if (strlen(o->stop[i]) < 1 || strlen(o->stop[i]) > 256) abort();
  }
  for (size_t i = 0; r->prompt && i < r->n_prompts; i++) {
    if (!r->prompt[i].text == !r->prompt[i].token) abort();
  }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static const struct qtr_api_defaults defaults = {
      .sampling = {.temperature = 1, .top_k = -1, .top_p = 1, .repetition_penalty = 1}};
  if (size < 1) return 0;
  const char *text = (const char *)data + 1;
  struct qtr_api_error err = {0};
  enum qtr_api_kind kind = (enum qtr_api_kind)(data[0] % QTR_API_KINDS);
  struct qtr_api_request r;
  if (!qtr_api_parse(kind, text, size - 1, &defaults, &r, &err))
    check_error(&err);
  else if (kind == QTR_API_CHAT || kind == QTR_API_COMPLETION)
    check_request(&r);
  qtr_api_request_free(&r);
  return 0;
}
