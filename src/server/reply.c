/* reply.c - answers as OpenAI writes them: whole completions, chunks of streams, log-probabilities, usage. */
#include "server/server_internal.h"

#include "engine/engine_internal.h"

#include <stdlib.h>
#include <string.h>

const char *qtr_reply_finish(const struct qtr_choice *choice) {
  if (choice->tool.n_calls > 0) return "tool_calls";
  return choice->finish == QTR_FINISH_LENGTH ? "length" : "stop";
}

static void put_head(const struct qtr_job *job, const char *object, struct qtr_buffer *out) {
  qtr_buffer_printf(out, "{\"id\":\"%s\",\"object\":\"%s\",\"created\":%lld,\"model\":", job->id, object,
                    (long long)job->created);
  qtr_buffer_string(out, job->server->o->model_name, strlen(job->server->o->model_name));
}

static void put_usage(const struct qtr_job *job, struct qtr_buffer *out) {
  qtr_buffer_printf(out,
                    "{\"prompt_tokens\":%lld,\"completion_tokens\":%lld,\"total_tokens\":%lld,"
                    "\"prompt_tokens_details\":{\"cached_tokens\":%lld}}",
                    (long long)job->n_prompt_tokens, (long long)job->n_output_tokens,
                    (long long)(job->n_prompt_tokens + job->n_output_tokens), (long long)job->n_cached_tokens);
}

/* [{"index":0,"id":…,"type":"function","function":{"name":…,"arguments":"…"}}]; index only in streams */
static void put_calls(const struct qtr_tool_parser *tool, size_t first, size_t n, bool with_index, struct qtr_buffer *out) {
  qtr_buffer_puts(out, "[");
  for (size_t i = first; i < first + n; i++) {
    const struct qtr_tool_call *call = &tool->call[i];
    qtr_buffer_puts(out, i > first ? ",{" : "{");
    if (with_index) qtr_buffer_printf(out, "\"index\":%zu,", i);
    qtr_buffer_printf(out, "\"id\":\"%s\",\"type\":\"function\",\"function\":{\"name\":", call->id);
    qtr_buffer_string(out, call->name, strlen(call->name));
    qtr_buffer_puts(out, ",\"arguments\":");
    qtr_buffer_string(out, call->arguments, strlen(call->arguments));
    qtr_buffer_puts(out, "}}");
  }
  qtr_buffer_puts(out, "]");
}

size_t qtr_count_characters(const char *text, size_t len) {
  size_t n = 0;
  for (size_t i = 0; i < len; i++) n += ((unsigned char)text[i] & 0xC0) != 0x80;
  return n;
}

/* ---- log-probabilities --------------------------------------------------------------------------- */

/* The token's text as a JSON string, special tokens by their names; bytes that are no text become U+FFFD. */
static void put_token(const struct qtr_job *job, int32_t token, struct qtr_buffer *out, size_t *n_bytes) {
  char *text = NULL;
  size_t len = 0;
  if (qtr_engine_detokenize(job->server->engine, &token, 1, &text, &len, NULL)) {
    qtr_buffer_printf(out, "\"token_id:%d\"", token); /* a model without a tokenizer */
  } else {
    qtr_buffer_string(out, text, len);
  }
  if (n_bytes) *n_bytes = len;
  free(text);
}

static void put_bytes(const struct qtr_job *job, int32_t token, struct qtr_buffer *out) {
  size_t len = 0;
  const struct qtr_tokenizer *tokenizer = job->server->engine->tokenizer;
  const char *bytes = tokenizer ? qtr_tokenizer_token_bytes(tokenizer, token, &len) : NULL;
  if (!bytes) {
    qtr_buffer_puts(out, "null");
    return;
  }
  qtr_buffer_puts(out, "[");
  for (size_t i = 0; i < len; i++) qtr_buffer_printf(out, i > 0 ? ",%d" : "%d", (unsigned char)bytes[i]);
  qtr_buffer_puts(out, "]");
}

static void put_chat_item(const struct qtr_job *job, int32_t token, float logprob, struct qtr_buffer *out) {
  qtr_buffer_puts(out, "{\"token\":");
  put_token(job, token, out, NULL);
  qtr_buffer_puts(out, ",\"logprob\":");
  qtr_buffer_number(out, (double)logprob < -9999 ? -9999 : (double)logprob);
  qtr_buffer_puts(out, ",\"bytes\":");
  put_bytes(job, token, out);
}

void qtr_reply_logprobs(const struct qtr_job *job, const struct qtr_event *e, size_t text_at, struct qtr_buffer lp[4]) {
  const char *comma = lp[0].len > 0 ? "," : "";
  if (job->chat) {
    qtr_buffer_puts(&lp[0], comma);
    put_chat_item(job, e->token, e->logprob, &lp[0]);
    qtr_buffer_puts(&lp[0], ",\"top_logprobs\":[");
    for (int32_t i = 0; i < e->n_top_logprob; i++) {
      if (i > 0) qtr_buffer_puts(&lp[0], ",");
      put_chat_item(job, e->top_logprob[i].token, e->top_logprob[i].logprob, &lp[0]);
      qtr_buffer_puts(&lp[0], "}");
    }
    qtr_buffer_puts(&lp[0], "]}");
    return;
  }
  for (int i = 0; i < 4; i++) qtr_buffer_puts(&lp[i], comma);
  put_token(job, e->token, &lp[0], NULL);
  qtr_buffer_number(&lp[1], (double)e->logprob);
  qtr_buffer_puts(&lp[2], "{"); /* the best ones, and the chosen one where it is not among them, as OpenAI has it */
  const struct qtr_token_logprob chosen = {e->token, e->logprob};
  bool listed = false;
  for (int32_t i = 0; i <= e->n_top_logprob; i++) { /* several tokens may look alike: the first is the best */
    const struct qtr_token_logprob *t = i < e->n_top_logprob ? &e->top_logprob[i] : &chosen;
    if (i == e->n_top_logprob && listed) break;
    listed = listed || t->token == e->token;
    if (i > 0) qtr_buffer_puts(&lp[2], ",");
    put_token(job, t->token, &lp[2], NULL);
    qtr_buffer_puts(&lp[2], ":");
    qtr_buffer_number(&lp[2], (double)t->logprob);
  }
  qtr_buffer_puts(&lp[2], "}");
  qtr_buffer_printf(&lp[3], "%zu", text_at);
}

void qtr_reply_first_token(const struct qtr_job *job, int32_t token, struct qtr_buffer lp[4]) {
  put_token(job, token, &lp[0], NULL);
  qtr_buffer_puts(&lp[1], "null");
  qtr_buffer_puts(&lp[2], "null");
  qtr_buffer_puts(&lp[3], "0");
}

/* `name`[items of the prompt, then of the output]; prompt NULL: none */
static void put_items(struct qtr_buffer *out, const char *name, const struct qtr_buffer *prompt,
                      const struct qtr_buffer *items) {
  qtr_buffer_puts(out, name);
  if (prompt) qtr_buffer_put(out, prompt->data, prompt->len);
  if (prompt && prompt->len > 0 && items->len > 0) qtr_buffer_puts(out, ",");
  qtr_buffer_put(out, items->data, items->len);
  qtr_buffer_puts(out, "]");
  out->failed = out->failed || items->failed || (prompt && prompt->failed);
}

static void put_logprobs(const struct qtr_job *job, const struct qtr_buffer *prompt, const struct qtr_buffer lp[4],
                         struct qtr_buffer *out) {
  if (job->chat) {
    put_items(out, ",\"logprobs\":{\"content\":[", NULL, &lp[0]);
    qtr_buffer_puts(out, ",\"refusal\":null}");
    return;
  }
  static const char *const name[] = {",\"logprobs\":{\"tokens\":[", ",\"token_logprobs\":[", ",\"top_logprobs\":[",
                                     ",\"text_offset\":["};
  for (int i = 0; i < 4; i++) put_items(out, name[i], prompt ? &prompt[i] : NULL, &lp[i]);
  qtr_buffer_puts(out, "}");
}

/* ---- whole answers ------------------------------------------------------------------------------- */

void qtr_reply_final(const struct qtr_job *job, struct qtr_buffer *out) {
  put_head(job, job->chat ? "chat.completion" : "text_completion", out);
  qtr_buffer_puts(out, ",\"choices\":[");
  for (int32_t i = 0; i < job->n_choices; i++) {
    const struct qtr_choice *c = &job->choice[i];
    qtr_buffer_printf(out, "%s{\"index\":%d,", i > 0 ? "," : "", i);
    const char *text = c->text.data ? c->text.data : "";
    if (job->chat) {
      qtr_buffer_puts(out, "\"message\":{\"role\":\"assistant\",\"content\":");
      if (c->tool.n_calls > 0 && c->text.len == 0)
        qtr_buffer_puts(out, "null");
      else
        qtr_buffer_string(out, text, c->text.len);
      qtr_buffer_puts(out, ",\"refusal\":null");
      if (c->tool.n_calls > 0) {
        qtr_buffer_puts(out, ",\"tool_calls\":");
        put_calls(&c->tool, 0, c->tool.n_calls, false, out);
      }
      qtr_buffer_puts(out, "}");
    } else {
      qtr_buffer_puts(out, "\"text\":");
      qtr_buffer_string(out, text, c->text.len);
    }
    out->failed = out->failed || c->text.failed;
    if (job->request.logprobs)
      put_logprobs(job, job->run[c->prompt].offset ? job->run[c->prompt].lp : NULL, c->lp, out);
    else
      qtr_buffer_puts(out, ",\"logprobs\":null");
    qtr_buffer_printf(out, ",\"finish_reason\":\"%s\"}", qtr_reply_finish(c));
  }
  qtr_buffer_puts(out, "],\"usage\":");
  put_usage(job, out);
  qtr_buffer_puts(out, ",\"system_fingerprint\":null}");
}

/* ---- streams ------------------------------------------------------------------------------------- */

void qtr_reply_begin_stream(struct qtr_job *job) {
  qtr_buffer_puts(&job->chunk_head, "data: ");
  put_head(job, job->chat ? "chat.completion.chunk" : "text_completion", &job->chunk_head);
  qtr_buffer_puts(&job->chunk_head, ",\"choices\":[");
}

static void put_chunk_head(const struct qtr_job *job, struct qtr_buffer *out) {
  qtr_buffer_put(out, job->chunk_head.data, job->chunk_head.len);
  out->failed = out->failed || job->chunk_head.failed;
}

void qtr_reply_chunk(const struct qtr_job *job, const struct qtr_choice *c, const struct qtr_chunk *chunk,
                     struct qtr_buffer *out) {
  put_chunk_head(job, out);
  qtr_buffer_puts(out, "{\"index\":");
  qtr_buffer_integer(out, c->index);
  qtr_buffer_puts(out, ",");
  if (job->chat) {
    qtr_buffer_puts(out, "\"delta\":{");
    const char *comma = "";
    if (chunk->role) {
      qtr_buffer_puts(out, "\"role\":\"assistant\"");
      comma = ",";
    }
    if (chunk->role || chunk->len > 0 || chunk->logprob) {
      qtr_buffer_puts(out, comma);
      qtr_buffer_puts(out, "\"content\":");
      qtr_buffer_string(out, chunk->text ? chunk->text : "", chunk->len);
      comma = ",";
    }
    if (chunk->n_calls > 0) {
      qtr_buffer_puts(out, comma);
      qtr_buffer_puts(out, "\"tool_calls\":");
      put_calls(&c->tool, chunk->first_call, chunk->n_calls, true, out);
    }
    qtr_buffer_puts(out, "}");
  } else {
    qtr_buffer_puts(out, "\"text\":");
    qtr_buffer_string(out, chunk->text ? chunk->text : "", chunk->len);
  }
  if (chunk->lp) {
    put_logprobs(job, NULL, chunk->lp, out);
  } else if (chunk->logprob) {
    struct qtr_buffer lp[4] = {{0}};
    qtr_reply_logprobs(job, chunk->logprob, c->n_text, lp);
    put_logprobs(job, NULL, lp, out);
    for (int i = 0; i < 4; i++) qtr_buffer_free(&lp[i]);
  } else {
    qtr_buffer_puts(out, ",\"logprobs\":null");
  }
  if (chunk->finish)
    qtr_buffer_printf(out, ",\"finish_reason\":\"%s\"}]", chunk->finish);
  else
    qtr_buffer_puts(out, ",\"finish_reason\":null}]");
  qtr_buffer_puts(out, job->request.include_usage ? ",\"usage\":null}\n\n" : "}\n\n");
}

void qtr_reply_usage_chunk(const struct qtr_job *job, struct qtr_buffer *out) {
  put_chunk_head(job, out);
  qtr_buffer_puts(out, "],\"usage\":");
  put_usage(job, out);
  qtr_buffer_puts(out, "}\n\n");
}
