/* template_render.c - not a test itself: renders templates for tests/e2e/oracle_templates.py. Each line of stdin is a JSON
 * object
 * {"template": …, "variables": {…}}; each line of stdout is {"text": …} or {"error": …, "status": …}. */
#include "text/template.h"

#include <stdio.h>
#include <stdlib.h>

static json_t *render(const json_t *job) {
  struct qtr_error err = {0};
  struct qtr_template *tpl = NULL;
  const json_t *source = json_object_get(job, "template");
  char *text = NULL;
  size_t len = 0;
  enum qtr_status status = qtr_template_parse(json_string_value(source), json_string_length(source), &tpl, &err);
  if (status == QTR_OK) status = qtr_template_render(tpl, json_object_get(job, "variables"), &text, &len, &err);
  qtr_template_free(tpl);
  json_t *answer = status == QTR_OK ? json_pack("{s:o}", "text", json_stringn(text, len))
                                    : json_pack("{s:s, s:s}", "error", err.message, "status", qtr_status_name(status));
  free(text);
  return answer;
}

int main(void) {
  char *line = NULL;
  size_t capacity = 0;
  ssize_t n;
  while ((n = getline(&line, &capacity, stdin)) > 0) {
    json_t *job = json_loadb(line, (size_t)n, JSON_ALLOW_NUL, NULL);
    json_t *answer = json_is_string(json_object_get(job, "template")) ? render(job) : NULL;
    if (!answer) answer = json_pack("{s:s, s:s}", "error", "no answer, or text that is not UTF-8", "status", "tool");
    (void)json_dumpf(answer, stdout, JSON_COMPACT);
    (void)putchar('\n');
    (void)fflush(stdout);
    json_decref(answer);
    json_decref(job);
  }
  free(line);
  return 0;
}
