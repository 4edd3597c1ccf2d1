/* fuzz_text_template.c - input: a template; after a NUL byte, if there is one, the variables as JSON. Parsing and rendering
 * must end, whatever they say. */
#include "text/template.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char default_variables[] =
    "{\"messages\": [{\"role\": \"system\", \"content\": \"s <b>\"}, {\"role\": \"user\", \"content\": \" h\\u00e9llo "
    "😀\\n\"},"
    "{\"role\": \"assistant\", \"content\": null, \"tool_calls\": [{\"id\": \"abcdef123\", \"type\": \"function\", "
    "\"function\":"
    "{\"name\": \"f\", \"arguments\": {\"x\": 1, \"y\": [1.5, true, null]}}}]}, {\"role\": \"tool\", \"content\": \"42\"}],"
    "\"tools\": [{\"type\": \"function\", \"function\": {\"name\": \"f\", \"description\": \"d\", \"parameters\":"
    "{\"type\": \"object\", \"properties\": {\"x\": {\"type\": \"integer\"}}, \"required\": [\"x\"]}}}],"
    "\"add_generation_prompt\": true, \"bos_token\": \"<s>\", \"eos_token\": \"</s>\", \"x\": 5, \"y\": [3, 1, 2], \"s\": "
    "\"a,b\"}";

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  const char *text = (const char *)data, *nul = size ? memchr(text, 0, size) : NULL;
  size_t len = nul ? (size_t)(nul - text) : size;
  json_t *variables = nul ? json_loadb(nul + 1, size - len - 1, JSON_ALLOW_NUL, NULL) : NULL;
  if (!json_is_object(variables)) {
    json_decref(variables);
    variables = json_loads(default_variables, 0, NULL);
  }
  struct qtr_error err = {0};
  struct qtr_template *tpl = NULL;
  char *out = NULL;
  size_t out_len;
  if (qtr_template_parse(text, len, &tpl, &err) == QTR_OK) {
    enum qtr_status status = qtr_template_render(tpl, variables, &out, &out_len, &err);
    if (status == QTR_OK && out[out_len] != 0) abort();
  }
  free(out);
  qtr_template_free(tpl);
  json_decref(variables);
  return 0;
}
