/* log.c - the access log: one line a request on stderr, as text or JSON. A log that cannot be written (a full disk, a closed
 * pipe) never stops the server. */
#include "base/clock.h"
#include "server/server_internal.h"

#include <stdio.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

/* "2026-11-21T06:00:00.123Z" */
static void write_time(struct qtr_buffer *out) {
  struct timeval now;
  struct tm tm;
  char text[32];
  (void)gettimeofday(&now, NULL);
  (void)gmtime_r(&now.tv_sec, &tm);
  (void)strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%S", &tm);
  qtr_buffer_printf(out, "%s.%03dZ", text, (int)(now.tv_usec / 1000));
}

/* Why a completion ended, for a reader of logs. */
static const char *ending(const struct qtr_job *job) {
  for (int32_t i = 0; i < job->n_choices; i++) {
    if (!job->choice[i].ended) return "cut";
  }
  return job->n_choices > 0 ? qtr_reply_finish(&job->choice[0]) : "refused";
}

void qtr_log(struct qtr_server *s, const struct qtr_log_line *l) {
  s->metrics.http[l->status / 100 < 6 ? l->status / 100 : 5]++;
  if (s->o->log_off) return;
  struct qtr_buffer out = {0};
  const struct qtr_job *job = l->job;
  double first = job && job->t_first > 0 ? job->t_first - job->t_arrival : -1;
  if (s->o->log_json) {
    qtr_buffer_puts(&out, "{\"time\":\"");
    write_time(&out);
    qtr_buffer_puts(&out, "\",\"peer\":");
    qtr_buffer_string(&out, l->peer, strlen(l->peer));
    qtr_buffer_puts(&out, ",\"method\":");
    qtr_buffer_string(&out, l->method, strlen(l->method));
    qtr_buffer_puts(&out, ",\"path\":");
    qtr_buffer_string(&out, l->path, strlen(l->path));
    qtr_buffer_printf(&out, ",\"status\":%d,\"seconds\":%.6f,\"request_id\":", l->status, l->seconds);
    qtr_buffer_string(&out, l->request_id, strlen(l->request_id));
    if (job) {
      qtr_buffer_printf(&out, ",\"prompt_tokens\":%lld,\"cached_tokens\":%lld,\"output_tokens\":%lld,\"finish\":\"%s\"",
                        (long long)job->n_prompt_tokens, (long long)job->n_cached_tokens, (long long)job->n_output_tokens,
                        ending(job));
      if (first >= 0) qtr_buffer_printf(&out, ",\"first_token_seconds\":%.6f", first);
    }
    qtr_buffer_puts(&out, "}\n");
  } else {
    write_time(&out);
    qtr_buffer_printf(&out, " %s \"%s %s\" %d %.3fs %s", l->peer, l->method, l->path, l->status, l->seconds, l->request_id);
    if (job) {
      qtr_buffer_printf(&out, " prompt=%lld cached=%lld output=%lld finish=%s", (long long)job->n_prompt_tokens,
                        (long long)job->n_cached_tokens, (long long)job->n_output_tokens, ending(job));
      if (first >= 0) qtr_buffer_printf(&out, " first=%.3fs", first);
    }
    qtr_buffer_puts(&out, "\n");
  }
  if (!out.failed && write(STDERR_FILENO, out.data, out.len) < 0) { /* nowhere to say so */
  }
  qtr_buffer_free(&out);
}

void qtr_log_conn(struct qtr_server *s, const struct qtr_http_conn *conn, const char *request_id, int status) {
  const struct qtr_http_head *head = qtr_http_head(conn);
  char method[40], path[128];
  (void)snprintf(method, sizeof method, "%.*s", (int)head->method.len, head->method.len ? head->method.data : "-");
  (void)snprintf(path, sizeof path, "%.*s", (int)head->path.len, head->path.len ? head->path.data : "-");
  qtr_log(s, &(struct qtr_log_line){.peer = qtr_http_peer(conn),
                                    .method = method[0] ? method : "-",
                                    .path = path[0] ? path : "-",
                                    .request_id = request_id,
                                    .status = status});
}
