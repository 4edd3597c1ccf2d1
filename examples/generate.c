/* generate.c - several prompts answered at once through the public interface of Quattuor.
 *
 *   example-generate MODEL_DIR PROMPT [PROMPT …]
 *
 * An engine takes all requests, each step computes one batch of whatever can run, and events bring the text of every request
 * in order. Nothing here is special: a server does the same with a thread that steps. */
#include <quattuor/quattuor.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct answer {
  char *text;
  size_t len;
  int32_t n_tokens;
};

static int append(struct answer *answer, const char *text, size_t len) {
  char *grown = realloc(answer->text, answer->len + len + 1);
  if (!grown) return -1;
  memcpy(grown + answer->len, text, len);
  answer->text = grown;
  answer->len += len;
  grown[answer->len] = 0;
  return 0;
}

int main(int argc, char **argv) {
  if (argc < 3) {
    fprintf(stderr, "usage: %s MODEL_DIR PROMPT [PROMPT ...]\n", argv[0]);
    return 2;
  }
  struct qtr_error err = {0};
  struct qtr_engine *engine = NULL;
  struct qtr_engine_options options;
  int n_prompts = argc - 2, code = 1;
  struct answer *answer = calloc((size_t)n_prompts, sizeof *answer);
  if (!answer) return 1;

  qtr_engine_options_init(&options);
  options.model_dir = argv[1];
  if (qtr_engine_open(&options, &engine, &err)) goto done;

  for (int i = 0; i < n_prompts; i++) {
    struct qtr_request_options request;
    uint64_t id;
    qtr_request_options_init(&request);
    request.prompt = argv[2 + i];
    request.prompt_len = strlen(argv[2 + i]);
    request.max_tokens = 64;
    request.sampling.temperature = 0; /* greedy */
    request.user = &answer[i];        /* comes back in every event */
    if (qtr_engine_add(engine, &request, &id, &err)) goto done;
  }

  for (bool work = true; work;) {
    struct qtr_event event;
    if (qtr_engine_step(engine, &work, &err)) goto done;
    while (qtr_engine_poll(engine, &event)) {
      struct answer *to = event.user;
      to->n_tokens = event.n_output_tokens;
      if (append(to, event.text, event.text_len)) goto done;
    }
  }

  for (int i = 0; i < n_prompts; i++) {
    printf("--- %s\n%s\n", argv[2 + i], answer[i].text ? answer[i].text : "");
  }
  struct qtr_stats stats;
  qtr_engine_stats(engine, &stats);
  fprintf(stderr, "%llu tokens in %llu steps, %.1f tokens/s\n", (unsigned long long)stats.n_output_tokens,
          (unsigned long long)stats.n_steps, (double)stats.n_output_tokens / stats.step_seconds);
  code = 0;
done:
  if (err.status) fprintf(stderr, "%s: %s\n", qtr_status_name(err.status), err.message);
  qtr_engine_close(engine);
  for (int i = 0; i < n_prompts; i++) free(answer[i].text);
  free(answer);
  return code;
}
