/* test_server_live.c - the whole server in this process, over a tiny model with random weights: a device that fails while it
 * serves, clients that vanish in every way, many at once, the end by signal. Prompts are token ids: the model has no text.
 */
#include "engine_fixture.h"
#include "http_client.h"
#include "server/server.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

struct fixture {
  struct qtr_engine *engine;
  int holder; /* a socket that keeps options.port from everybody but the server, which may share it */
  struct qtr_server_options options;
  pthread_t thread;
  enum qtr_status status;
  struct qtr_error err;
};

static struct qtr_backend_ops broken_ops;
static int steps_left;

static enum qtr_status failing_end(struct qtr_backend *b, struct qtr_error *err) {
  enum qtr_status status = qtr_backend_reference.end_step(b, err);
  if (steps_left-- > 0) return status;
  err->status = QTR_ERR_BACKEND;
  (void)snprintf(err->message, sizeof err->message, "the cable is loose");
  return QTR_ERR_BACKEND;
}

static enum qtr_status slow_end(struct qtr_backend *b, struct qtr_error *err) {
  pause_ms(10);
  return qtr_backend_reference.end_step(b, err);
}

/* Takes a port nobody has: neither a socket that binds nor one that connects gets it, only one that asks to share it. */
static void hold_port(struct fixture *f) {
  struct sockaddr_in a = loopback(0);
  socklen_t len = sizeof a;
  f->holder = socket(AF_INET, SOCK_STREAM, 0);
  assert_int_equal(setsockopt(f->holder, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int)), 0);
  assert_int_equal(bind(f->holder, (struct sockaddr *)&a, sizeof a), 0);
  assert_int_equal(getsockname(f->holder, (struct sockaddr *)&a, &len), 0);
  f->options.port = ntohs(a.sin_port);
}

static int dial(const struct fixture *f) {
  struct sockaddr_in to = loopback(f->options.port);
  const struct timeval tv = {.tv_sec = 300}; /* for a server that hangs; a busy machine under a sanitizer is slow */
  for (int i = 0; i < 500; i++) {
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    (void)setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv);
    if (connect(fd, (struct sockaddr *)&to, sizeof to) == 0) return fd;
    (void)close(fd);
    pause_ms(10);
  }
  fail_msg("nobody listens on port %d", f->options.port);
  return -1;
}

static void *serve(void *arg) { /* the one thread that takes signals, as main() does in the binary */
  struct fixture *f = arg;
  sigset_t set;
  (void)sigemptyset(&set);
  (void)sigaddset(&set, SIGTERM);
  (void)pthread_sigmask(SIG_UNBLOCK, &set, NULL);
  f->status = qtr_server_run(f->engine, &f->options, &f->err);
  return NULL;
}

static void begin(struct fixture *f, int32_t kv_pages) {
  *f = (struct fixture){0};
  f->engine =
      tiny_engine(tiny_model(QTR_LINEAR_W8A8), &(struct qtr_engine_options){.max_num_seqs = 8, .kv_pages = kv_pages});
  qtr_server_options_init(&f->options);
  hold_port(f);
  f->options.log_off = true;
  f->options.grace = 5;
}

static void start(struct fixture *f) {
  assert_int_equal(pthread_create(&f->thread, NULL, serve, f), 0);
  (void)close(dial(f));
}

static void stop(struct fixture *f) {
  (void)kill(getpid(), SIGTERM);
  (void)pthread_join(f->thread, NULL);
  if (f->status) fail_msg("%s", f->err.message);
  assert_idle(f->engine);
  qtr_engine_close(f->engine);
  (void)close(f->holder);
}

static void send_request(int fd, const char *method, const char *path, const char *body) {
  size_t size = strlen(body) + 256;
  char *text = malloc(size);
  assert_non_null(text);
  int n = snprintf(text, size, "%s %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %zu\r\n\r\n%s", method,
                   path, strlen(body), body);
  assert_true(send(fd, text, (size_t)n, MSG_NOSIGNAL) == n);
  free(text);
}

/* All there is until the server closes; malloc'ed. */
static char *hear(int fd) {
  size_t n = 0, size = 1 << 16;
  char *out = malloc(size);
  for (ssize_t got; out && (got = take(fd, out + n, size - 1 - n)) > 0;) {
    n += (size_t)got;
    if (n == size - 1) out = realloc(out, size *= 2);
  }
  assert_non_null(out);
  out[n] = 0;
  (void)close(fd);
  return out;
}

static char *ask(const struct fixture *f, const char *method, const char *path, const char *body) {
  int fd = dial(f);
  send_request(fd, method, path, body);
  return hear(fd);
}

static void expect(char *answer, const char *status, const char *holds) {
  if (strncmp(answer, status, strlen(status)) != 0 || (holds && !strstr(answer, holds))) {
    fail_msg("no \"%s\" and \"%s\" in: %.600s", status, holds ? holds : "", answer);
  }
  free(answer);
}

#define COMPLETIONS "/v1/completions"

/* For what a stalled machine may delay: asks again while the answer is `busy`, which is right only for a while. */
static char *ask_until(const struct fixture *f, const char *body, const char *busy) {
  for (int i = 0;; i++) {
    char *answer = ask(f, "POST", COMPLETIONS, body);
    if (i == 100 || strncmp(answer, busy, strlen(busy)) != 0) return answer;
    free(answer);
    pause_ms(20);
  }
}

#define LONG "{\"prompt\":[50,60,70],\"max_tokens\":900,\"ignore_eos\":true,\"seed\":1}"
#define STREAM "{\"prompt\":[50,60,70],\"max_tokens\":900,\"ignore_eos\":true,\"seed\":1,\"stream\":true}"
#define MEDIUM "{\"prompt\":[50,60,70],\"max_tokens\":200,\"ignore_eos\":true,\"seed\":1"
#define SHORT "{\"prompt\":[50,60,70],\"max_tokens\":4,\"ignore_eos\":true,\"seed\":1}"

static void test_device_fails(void **state) {
  (void)state;
  struct fixture f;
  begin(&f, 0);
  broken_ops = qtr_backend_reference;
  broken_ops.end_step = failing_end;
  f.engine->model->backend->ops = &broken_ops;
  steps_left = 300;
  start(&f);
  expect(ask(&f, "GET", "/health", ""), "HTTP/1.1 200", "\"ok\"");
  expect(ask(&f, "GET", "/health", ""), "HTTP/1.1 200", " GMT\r\n"); /* Date */
  expect(ask(&f, "POST", COMPLETIONS, SHORT), "HTTP/1.1 200", "\"completion_tokens\":4");
  int whole[7], stream[7]; /* more than can run: some wait, and nobody is left without an answer */
  for (int i = 0; i < 7; i++) {
    whole[i] = dial(&f);
    stream[i] = dial(&f);
    send_request(whole[i], "POST", COMPLETIONS, LONG);
    send_request(stream[i], "POST", COMPLETIONS, STREAM);
  }
  for (int i = 0; i < 7; i++) {
    expect(hear(whole[i]), "HTTP/1.1 503", "the cable is loose");
    char *text = hear(stream[i]);
    assert_non_null(strstr(text, "the cable is loose"));
    assert_null(strstr(text, "[DONE]"));
    free(text);
  }
  expect(ask(&f, "GET", "/health", ""), "HTTP/1.1 503", "the cable is loose");
  expect(ask(&f, "POST", COMPLETIONS, SHORT), "HTTP/1.1 503", "the cable is loose");
  expect(ask(&f, "GET", "/v1/models", ""), "HTTP/1.1 200", "\"model\"");
  stop(&f);
}

/* Clients close, reset, or half-close at random moments of a stream or an answer; what is left is nothing. */
static void test_vanishing(void **state) {
  (void)state;
  struct fixture f;
  begin(&f, 0);
  start(&f);
  uint32_t seed = 3;
  for (int i = 0; i < 60; i++) {
    int fd = dial(&f);
    send_request(fd, "POST", COMPLETIONS, i % 2 ? STREAM : LONG);
    seed = seed * 1664525u + 1013904223u;
    pause_ms((int)(seed >> 24) / 16);
    char some[256];
    if (i % 2 && i % 3 == 0) (void)take(fd, some, sizeof some);
    if (i % 5 == 0) (void)setsockopt(fd, SOL_SOCKET, SO_LINGER, &(struct linger){.l_onoff = 1}, sizeof(struct linger));
    if (i % 5 == 1) {
      (void)shutdown(fd, SHUT_WR);
      pause_ms(5);
    }
    (void)close(fd);
  }
  struct qtr_stats stats;
  for (int i = 0; i < 500; i++) { /* each was cancelled within a step */
    qtr_engine_stats(f.engine, &stats);
    if (stats.n_running + stats.n_waiting == 0) break;
    pause_ms(10);
  }
  assert_int_equal(stats.n_running + stats.n_waiting, 0);
  assert_int_equal(stats.n_pages_used, 0);
  expect(ask(&f, "POST", COMPLETIONS, SHORT), "HTTP/1.1 200", "\"completion_tokens\":4");
  stop(&f);
}

/* Numbers no request can mean, in every numeric member there is: each is refused by name, and the server goes on. */
static void test_numbers(void **state) {
  (void)state;
  static const char *const wrong[] = {
      "1e308", "-1e308", "9223372036854775807", "-9223372036854775808", "123456789012345678901234567890", "1e400"};
  struct fixture f;
  size_t n_fields;
  const struct qtr_api_field *field = qtr_api_fields(&n_fields);
  begin(&f, 0);
  start(&f);
  for (size_t i = 0; i < n_fields; i++) {
    bool numeric = field[i].type == QTR_API_WHOLE || field[i].type == QTR_API_NUMBER;
    if (!numeric || !(field[i].kinds & 1u << QTR_API_COMPLETION)) continue;
    for (size_t k = 0; k < sizeof wrong / sizeof wrong[0]; k++) {
      char body[200], param[80];
      (void)snprintf(body, sizeof body, "{\"prompt\":[50],\"%s\":%s}", field[i].name, wrong[k]);
      (void)snprintf(param, sizeof param, "\"param\":\"%s\"", field[i].name);
      expect(ask(&f, "POST", COMPLETIONS, body), "HTTP/1.1 400", k == 5 ? "not valid JSON" : param);
    }
  }
  static const char *const tokens[] = {"-1", "256", "2147483647", "2147483648", "1e30", "0.5"};
  for (size_t k = 0; k < sizeof tokens / sizeof tokens[0]; k++) {
    char body[200];
    (void)snprintf(body, sizeof body, "{\"prompt\":[50,%s]}", tokens[k]);
    expect(ask(&f, "POST", COMPLETIONS, body), "HTTP/1.1 400", "\"param\":\"prompt\"");
    (void)snprintf(body, sizeof body, "{\"prompt\":[50],\"stop_token_ids\":[%s]}", tokens[k]);
    expect(ask(&f, "POST", COMPLETIONS, body), "HTTP/1.1 400", "\"param\":\"stop_token_ids\"");
    (void)snprintf(body, sizeof body, "{\"prompt\":[50],\"logit_bias\":{\"%s\":1}}", tokens[k]);
    expect(ask(&f, "POST", COMPLETIONS, body), "HTTP/1.1 400", "\"param\":\"logit_bias\"");
  }
  expect(ask(&f, "POST", COMPLETIONS, SHORT), "HTTP/1.1 200", "\"completion_tokens\":4");
  stop(&f);
}

static void await_requests(const struct fixture *f, int n) {
  struct qtr_stats stats;
  for (int i = 0; i < 1000; i++) {
    qtr_engine_stats(f->engine, &stats);
    if (stats.n_running + stats.n_waiting == n) return;
    pause_ms(10);
  }
  fail_msg("%d run and %d wait, not %d in all", stats.n_running, stats.n_waiting, n);
}

/* What is more than the queue takes is told so at once, and is welcome again when there is room. */
static void test_full_queue(void **state) {
  (void)state;
  struct fixture f;
  begin(&f, 0);
  f.options.max_running = 2;
  f.options.max_queue = 1;
  broken_ops = qtr_backend_reference;
  broken_ops.end_step = slow_end;
  f.engine->model->backend->ops = &broken_ops;
  start(&f);
  int fd[3];
  for (int i = 0; i < 3; i++) {
    fd[i] = dial(&f);
    send_request(fd[i], "POST", COMPLETIONS, STREAM);
  }
  await_requests(&f, 3);
  for (int i = 0; i < 5; i++) expect(ask(&f, "POST", COMPLETIONS, SHORT), "HTTP/1.1 429", "Retry-After: 1");
  expect(ask(&f, "GET", "/health", ""), "HTTP/1.1 200", NULL);
  expect(ask(&f, "GET", "/metrics", ""), "HTTP/1.1 200", "quattuor:requests_rejected_total{model_name=\"model\"} 5");
  (void)close(fd[0]);
  await_requests(&f, 2); /* in the engine, whose mail the server is about to read */
  expect(ask_until(&f, SHORT, "HTTP/1.1 429"), "HTTP/1.1 200", "\"completion_tokens\":4");
  (void)close(fd[1]);
  (void)close(fd[2]);
  stop(&f);
}

struct client {
  const struct fixture *f;
  int number, n_bad;
};

static void *run_client(void *arg) {
  struct client *c = arg;
  for (int i = 0; i < 6; i++) {
    char body[200], wanted[64];
    int n = 1 + (c->number * 7 + i * 3) % 20;
    (void)snprintf(body, sizeof body,
                   "{\"prompt\":[[%d,60],[61,%d,62]],\"max_tokens\":%d,\"ignore_eos\":true,\"n\":2,\"stream\":%s}",
                   10 + c->number, 20 + i, n, i % 2 ? "true,\"stream_options\":{\"include_usage\":true}" : "false");
    (void)snprintf(wanted, sizeof wanted, "\"completion_tokens\":%d,", 4 * n);
    char *answer = ask(c->f, "POST", COMPLETIONS, body);
    bool ok = strncmp(answer, "HTTP/1.1 200", 12) == 0 && strstr(answer, wanted) && (i % 2 == 0 || strstr(answer, "[DONE]"));
    if (!ok) (void)fprintf(stderr, "%s: %.300s\n", body, answer);
    c->n_bad += !ok;
    free(answer);
  }
  return NULL;
}

/* Sixteen clients, each with four completions at a time, in a pool too small for all: every answer is whole. */
static void test_many(void **state) {
  (void)state;
  struct fixture f;
  struct client client[16];
  pthread_t thread[16];
  begin(&f, 20);
  start(&f);
  for (int i = 0; i < 16; i++) {
    client[i] = (struct client){&f, i, 0};
    assert_int_equal(pthread_create(&thread[i], NULL, run_client, &client[i]), 0);
  }
  for (int i = 0; i < 16; i++) {
    (void)pthread_join(thread[i], NULL);
    assert_int_equal(client[i].n_bad, 0);
  }
  expect(ask(&f, "GET", "/metrics", ""), "HTTP/1.1 200", "vllm:num_requests_running{model_name=\"model\"} 0");
  stop(&f);
}

/* A request that takes longer than it may is told so, and leaves nothing behind. */
static void test_timeout(void **state) {
  (void)state;
  struct fixture f;
  begin(&f, 0);
  broken_ops = qtr_backend_reference;
  broken_ops.end_step = slow_end;
  f.engine->model->backend->ops = &broken_ops;
  f.options.timeout = 0.3;
  start(&f);
  expect(ask(&f, "POST", COMPLETIONS, LONG), "HTTP/1.1 504", "longer than 0.3 seconds");
  char *text = ask(&f, "POST", COMPLETIONS, STREAM);
  assert_non_null(strstr(text, "longer than 0.3 seconds"));
  assert_null(strstr(text, "[DONE]"));
  free(text);
  expect(ask_until(&f, SHORT, "HTTP/1.1 504"), "HTTP/1.1 200", "\"completion_tokens\":4");
  stop(&f);
}

/* The end of a request comes while a worker still reads its body: the client leaves, the time is over, the server stops. */
static void test_end_of_unprepared(void **state) {
  (void)state;
  enum { N_TOKENS = 600000, N_CLIENTS = 6 };
  static const char first[] = "{\"prompt\":[50";
  char *body = malloc(sizeof first + 3 * N_TOKENS + 2), *at = body + sizeof first - 1;
  assert_non_null(body);
  memcpy(body, first, sizeof first);
  for (int i = 0; i < N_TOKENS; i++, at += 3) memcpy(at, ",51", 3);
  memcpy(at, "]}", 3);
  for (int round = 0; round < 3; round++) {
    struct fixture f;
    begin(&f, 0);
    if (round == 1) f.options.timeout = 0.001;
    if (round == 2) f.options.grace = 0;
    start(&f);
    int fd[N_CLIENTS];
    for (int i = 0; i < N_CLIENTS; i++) {
      fd[i] = dial(&f);
      send_request(fd[i], "POST", COMPLETIONS, body);
      if (round == 0) (void)close(fd[i]);
    }
    if (round == 2) {
      pause_ms(20);
      (void)kill(getpid(), SIGTERM);
    }
    for (int i = 0; i < N_CLIENTS && round > 0; i++) {
      char *answer = hear(fd[i]);
      bool ended = strstr(answer, round == 1 ? "longer than 0.001 seconds" : "shutting down") != NULL;
      bool in_time = strncmp(answer, "HTTP/1.1 400", 12) == 0; /* it was read before that, and is too long */
      bool closed = round == 2 && !answer[0];                  /* the server stopped before it had read all */
      if (!ended && !in_time && !closed) fail_msg("round %d: %.600s", round, answer);
      free(answer);
    }
    if (round == 0) expect(ask(&f, "POST", COMPLETIONS, SHORT), "HTTP/1.1 200", "\"completion_tokens\":4");
    stop(&f);
  }
  free(body);
}

static void *run_one(void *arg) {
  struct client *c = arg;
  char *answer = ask(c->f, "POST", COMPLETIONS, c->number % 2 ? MEDIUM ",\"stream\":true}" : MEDIUM "}");
  bool whole = strstr(answer, c->number % 2 ? "[DONE]" : "\"completion_tokens\":200") != NULL;
  bool told = strstr(answer, "shutting down") != NULL;
  if (whole == told) (void)fprintf(stderr, "client %d: %.300s\n", c->number, answer);
  c->n_bad += whole == told;
  free(answer);
  return NULL;
}

/* SIGTERM while more requests are there than can run: each is answered whole, or told that it was cut. */
static void test_end_under_load(void **state) {
  (void)state;
  for (int round = 0; round < 3; round++) {
    struct fixture f;
    struct client client[16];
    pthread_t thread[16];
    begin(&f, 0);
    f.options.grace = round == 0 ? 60 : round == 1 ? 0.05 : 0;
    broken_ops = qtr_backend_reference;
    broken_ops.end_step = slow_end;
    f.engine->model->backend->ops = &broken_ops;
    start(&f);
    for (int i = 0; i < 16; i++) {
      client[i] = (struct client){&f, i, 0};
      assert_int_equal(pthread_create(&thread[i], NULL, run_one, &client[i]), 0);
    }
    await_requests(&f, 16);
    stop(&f);
    for (int i = 0; i < 16; i++) {
      (void)pthread_join(thread[i], NULL);
      assert_int_equal(client[i].n_bad, 0);
    }
  }
}

/* SIGTERM: what runs has its grace, then it is told; a second signal does not wait. */
static void test_end(void **state) {
  (void)state;
  for (int round = 0; round < 3; round++) {
    struct fixture f;
    begin(&f, 0);
    f.options.grace = round == 1 ? 0 : 60;
    broken_ops = qtr_backend_reference;
    if (round == 0) broken_ops.end_step = slow_end;
    f.engine->model->backend->ops = &broken_ops;
    start(&f);
    int fd = dial(&f);
    send_request(fd, "POST", COMPLETIONS, round == 0 ? MEDIUM "}" : STREAM);
    if (round > 0) {
      char first[32];
      assert_true(take(fd, first, sizeof first) > 0);
    }
    if (round == 0) await_requests(&f, 1);
    if (round == 2) {
      (void)kill(getpid(), SIGTERM);
      pause_ms(200);
    }
    stop(&f);
    char *text = hear(fd);
    if (round == 0)
      assert_non_null(strstr(text, "\"completion_tokens\":200"));
    else if (!strstr(text, "[DONE]")) /* a quick machine may have finished */
      assert_non_null(strstr(text, "shutting down"));
    free(text);
  }
}

static void ignore(int number) { (void)number; } /* a signal after the server's own end is nobody's */

int main(void) {
  sigset_t set;
  (void)sigemptyset(&set);
  (void)sigaddset(&set, SIGTERM);
  (void)pthread_sigmask(SIG_BLOCK, &set, NULL);
  (void)signal(SIGPIPE, SIG_IGN);
  (void)signal(SIGTERM, ignore);
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_device_fails), cmocka_unit_test(test_vanishing),         cmocka_unit_test(test_many),
      cmocka_unit_test(test_timeout),      cmocka_unit_test(test_end_of_unprepared), cmocka_unit_test(test_end),
      cmocka_unit_test(test_numbers),      cmocka_unit_test(test_full_queue),        cmocka_unit_test(test_end_under_load)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
