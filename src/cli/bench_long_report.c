/* bench_long_report.c - the result of `quattuor bench --long` as a table, as JSON and as a plot (bench_long.h). */
#include "base/chart.h"
#include "base/checked.h"
#include "base/status.h"
#include "cli/bench_long.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PANEL_WIDTH 420.0
#define PANEL_HEIGHT 260.0
#define LEFT 66.0
#define TOP 96.0

static const uint32_t colour[QTR_LONG_SIDES] = {0xc2701c, 0x3d63dd};

/* ---- in words ------------------------------------------------------------------------------------- */

static int32_t count_streaming(const struct qtr_long_result *r) {
  int32_t n = 0;
  for (int32_t i = 0; r->streaming && i < r->n_layers * r->n_kv_heads; i++) n += r->streaming[i];
  return n;
}

/* "half of the heads streaming …" in out: what sparse means here. */
static const char *describe_sparse(const struct qtr_long_result *r, char out[240]) {
  const struct qtr_sparse_options *s = &r->sparse;
  char prompts[80] = "", pages[96] = "";
  int n = 0;
  if (!r->on[QTR_LONG_SPARSE]) {
    (void)snprintf(out, 240, "dense only");
    return out;
  }
  if (s->context_mode && s->static_sparsity > 0)
    (void)snprintf(prompts, sizeof prompts, " (%d + %d in prompts)", s->ctx_sink, s->ctx_local);
  if (s->decode_mode)
    (void)snprintf(pages, sizeof pages, "a budget of %d tokens chosen every %d", s->token_budget, s->selector_interval);
  if (s->static_sparsity > 0)
    n = snprintf(out, 240, "%d of %d KV heads see %d + %d tokens%s%s", count_streaming(r), r->n_layers * r->n_kv_heads,
                 s->dec_sink, s->dec_local, prompts, s->decode_mode ? "; " : "");
  (void)snprintf(out + n, 240 - (size_t)n, "%s", s->static_sparsity > 0 || s->decode_mode ? pages : "nothing is sparse");
  return out;
}

static void put_number(char out[16], double x) {
  if (isfinite(x))
    (void)snprintf(out, 16, x < 1 ? "%.3f" : x < 100 ? "%.2f" : "%.1f", x);
  else
    (void)snprintf(out, 16, "-");
}

static void put_gain(char out[16], double x) {
  if (isfinite(x))
    (void)snprintf(out, 16, "%.2fx", x);
  else
    out[0] = 0;
}

void qtr_long_print_head(const struct qtr_long_result *r) {
  char text[240];
  printf("%s: %s, batch %d, generate %d, %s\n%s\n\n", r->name, r->precision, r->flags->batch, r->flags->gen_len,
         r->device_name, describe_sparse(r, text));
  printf("%9s | %26s | %26s | %21s\n", "", "prompt, s", "decode, ms a step", "KV pool");
  printf("%9s | %9s %9s %6s | %9s %9s %6s | %10s %10s\n", "tokens", "dense", "sparse", "", "dense", "sparse", "", "dense",
         "sparse");
}

void qtr_long_print_line(const struct qtr_long_result *r, size_t i) {
  const struct qtr_long_cell *dense = qtr_long_cell(r, i, QTR_LONG_DENSE), *sparse = qtr_long_cell(r, i, QTR_LONG_SPARSE);
  char number[6][16], pool[2][32] = {"-", "-"};
  put_number(number[0], dense->prefill_s);
  put_number(number[1], sparse->prefill_s);
  put_gain(number[2], qtr_long_gain(dense->prefill_s, sparse->prefill_s));
  put_number(number[3], dense->decode_ms);
  put_number(number[4], sparse->decode_ms);
  put_gain(number[5], qtr_long_gain(dense->decode_ms, sparse->decode_ms));
  for (int side = 0; side < QTR_LONG_SIDES; side++) {
    if (qtr_long_cell(r, i, side)->n) (void)qtr_show_bytes(qtr_long_cell(r, i, side)->kv_pool_bytes, pool[side]);
  }
  printf("%9zu | %9s %9s %6s | %9s %9s %6s | %10s %10s\n", r->length[i], number[0], number[1], number[2], number[3],
         number[4], number[5], pool[0], pool[1]);
  (void)fflush(stdout);
}

/* ---- JSON ----------------------------------------------------------------------------------------- */

static json_t *times_json(const struct qtr_long_result *r, size_t length, double prefill_s, double decode_ms) {
  double batch = r->flags->batch;
  return json_pack("{s:o, s:o, s:o, s:o}", "prefill_s", qtr_json_number(prefill_s, 6), "prefill_tok_s",
                   qtr_json_number(batch * (double)length / prefill_s, 6), "decode_ms_per_step",
                   qtr_json_number(decode_ms, 6), "decode_tok_s", qtr_json_number(batch * 1e3 / decode_ms, 6));
}

static json_t *cell_json(const struct qtr_long_result *r, size_t length, const struct qtr_long_cell *cell) {
  json_t *object = times_json(r, length, cell->prefill_s, cell->decode_ms), *rounds = json_array();
  for (int32_t i = 0; i < cell->n; i++) {
    json_t *round = times_json(r, length, cell->round[i].prefill_s, cell->round[i].decode_ms_per_step);
    (void)json_object_set_new(round, "device_idle_share", qtr_json_number(cell->round[i].device_idle_share, 4));
    (void)json_object_set_new(round, "n_preemptions", json_integer((json_int_t)cell->round[i].n_preemptions));
    (void)json_array_append_new(rounds, round);
  }
  (void)json_object_set_new(object, "kv_pool_bytes", cell->n ? json_integer((json_int_t)cell->kv_pool_bytes) : json_null());
  (void)json_object_set_new(object, "rounds", rounds);
  if (cell->error.status) (void)json_object_set_new(object, "error", json_string(cell->error.message));
  return object;
}

/* A string of 0 and 1 for each layer. */
static json_t *streaming_json(const struct qtr_long_result *r) {
  json_t *list = json_array();
  char *line = malloc((size_t)r->n_kv_heads + 1);
  for (int32_t i = 0; line && i < r->n_layers; i++) {
    for (int32_t h = 0; h < r->n_kv_heads; h++) line[h] = r->streaming[i * r->n_kv_heads + h] ? '1' : '0';
    line[r->n_kv_heads] = 0;
    (void)json_array_append_new(list, json_string(line));
  }
  free(line);
  return list;
}

static json_t *sparse_json(const struct qtr_long_result *r) {
  const struct qtr_sparse_options *s = &r->sparse;
  json_t *object = json_pack("{s:o, s:b, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:s}", "static_sparsity",
                             qtr_json_number((double)s->static_sparsity, 6), "context_mode", s->context_mode, "ctx_sink",
                             (int)s->ctx_sink, "ctx_local", (int)s->ctx_local, "dec_sink", (int)s->dec_sink, "dec_local",
                             (int)s->dec_local, "decode_mode", (int)s->decode_mode, "token_budget", (int)s->token_budget,
                             "selector_interval", (int)s->selector_interval, "sub_chunks", (int)s->sub_chunks,
                             "selector_heads", s->each_head ? "each" : "group");
  if (object && r->streaming) {
    (void)json_object_set_new(object, "heads", json_string(r->heads));
    (void)json_object_set_new(object, "n_streaming_heads", json_integer(count_streaming(r)));
    (void)json_object_set_new(object, "streaming", streaming_json(r));
  }
  return object;
}

json_t *qtr_long_json(const struct qtr_long_result *r) {
  size_t peak = qtr_peak_rss();
  json_t *lengths = json_array();
  for (size_t i = 0; i < r->n_lengths; i++) {
    const struct qtr_long_cell *cell[] = {qtr_long_cell(r, i, 0), qtr_long_cell(r, i, 1)};
    json_t *row = json_pack("{s:I}", "length", (json_int_t)r->length[i]);
    for (int side = 0; side < QTR_LONG_SIDES; side++) {
      if (r->on[side]) (void)json_object_set_new(row, qtr_long_names[side], cell_json(r, r->length[i], cell[side]));
    }
    if (r->on[0] && r->on[1]) {
      (void)json_object_set_new(row, "prefill_gain",
                                qtr_json_number(qtr_long_gain(cell[0]->prefill_s, cell[1]->prefill_s), 4));
      (void)json_object_set_new(row, "decode_gain",
                                qtr_json_number(qtr_long_gain(cell[0]->decode_ms, cell[1]->decode_ms), 4));
    }
    (void)json_array_append_new(lengths, row);
  }
  return json_pack("{s:s, s:s, s:i, s:s, s:s, s:i, s:i, s:i, s:i, s:I, s:I, s:I, s:o, s:o}", "model", r->name, "precision",
                   r->precision, "group_size", (int)r->group_size, "device", r->device, "device_name", r->device_name,
                   "threads", (int)r->threads, "batch", (int)r->flags->batch, "gen_len", (int)r->flags->gen_len, "n_rounds",
                   (int)r->flags->rounds, "seed", (json_int_t)r->flags->seed, "weight_bytes", (json_int_t)r->weight_bytes,
                   "peak_rss_bytes", (json_int_t)peak, "sparse", r->on[QTR_LONG_SPARSE] ? sparse_json(r) : json_null(),
                   "lengths", lengths);
}

/* ---- the plot ------------------------------------------------------------------------------------- */

static const char *short_length(size_t n, char out[24]) {
  if (n % 1024 == 0)
    (void)snprintf(out, 24, "%zuk", n / 1024);
  else
    (void)snprintf(out, 24, "%zu", n);
  return out;
}

static double value_of(const struct qtr_long_result *r, size_t i, int side, bool decode) {
  const struct qtr_long_cell *cell = qtr_long_cell(r, i, side);
  return decode ? cell->decode_ms : cell->prefill_s;
}

/* Times over the length: the prompt's grow with its square, and get a logarithmic axis; a token's begin at 0. */
static void draw_panel(struct qtr_svg *svg, const struct qtr_long_result *r, bool decode) {
  struct qtr_chart c = {.x = decode ? LEFT + PANEL_WIDTH + LEFT + 24 : LEFT,
                        .y = TOP,
                        .width = PANEL_WIDTH,
                        .height = PANEL_HEIGHT,
                        .low = (double)r->length[0] / 1.15,
                        .high = (double)r->length[r->n_lengths - 1] * 1.15,
                        .log_x = true,
                        .log_y = !decode};
  double least = INFINITY, most = 0;
  char text[96];
  for (size_t i = 0; i < r->n_lengths; i++) {
    for (int side = 0; side < QTR_LONG_SIDES; side++) {
      double v = value_of(r, i, side, decode);
      if (!(v > 0)) continue;
      least = QTR_MIN(least, v);
      most = QTR_MAX(most, v);
    }
  }
  if (!(least < INFINITY)) least = most = 1;
  c.bottom = decode ? 0 : least / 1.3;
  c.top = decode ? qtr_chart_nice(most) : most * 1.3;
  qtr_chart_title(svg, &c, decode ? "Time of a token, ms" : "Time of the prompt, s");
  qtr_chart_vertical(svg, &c, "%g", 1);
  double drawn = -INFINITY; /* numbers of lengths near each other would lie on each other */
  for (size_t i = 0; i < r->n_lengths; i++) {
    double x = qtr_chart_x(&c, (double)r->length[i]);
    if (x - drawn < 40) continue;
    qtr_chart_mark(svg, &c, (double)r->length[i], true, short_length(r->length[i], text));
    drawn = x;
  }
  for (int side = 0; side < QTR_LONG_SIDES; side++) {
    double xy[2 * 200]; /* as many as --lengths takes */
    size_t n = 0;
    for (size_t i = 0; i < r->n_lengths && n < 200; i++) {
      double v = value_of(r, i, side, decode);
      if (!(v > 0)) continue;
      xy[2 * n] = qtr_chart_x(&c, (double)r->length[i]);
      xy[2 * n + 1] = qtr_chart_y(&c, v);
      (void)snprintf(text, sizeof text, "%s, %zu tokens: %.4g %s", qtr_long_names[side], r->length[i], v,
                     decode ? "ms" : "s");
      qtr_svg_rect(svg, xy[2 * n] - 3, xy[2 * n + 1] - 3, 6, 6, colour[side], text);
      n++;
    }
    if (n > 1) qtr_svg_polyline(svg, xy, n, colour[side], 2);
    if (r->on[side]) qtr_chart_legend(svg, &c, side, colour[side], qtr_long_names[side]);
  }
}

enum qtr_status qtr_long_plot(const struct qtr_long_result *r, char **text, size_t *len, struct qtr_error *err) {
  struct qtr_svg svg;
  char line[320], sparse[240];
  const char *base = strrchr(r->name, '/');
  qtr_svg_begin(&svg, 2 * (PANEL_WIDTH + LEFT) + 54, TOP + PANEL_HEIGHT + 50);
  (void)snprintf(line, sizeof line, "%.80s, %s, batch %d: %.120s", base && base[1] ? base + 1 : r->name, r->precision,
                 r->flags->batch, r->device_name);
  qtr_svg_text(&svg, LEFT, 28, 17, QTR_SVG_START, QTR_CHART_INK, line);
  qtr_svg_text(&svg, LEFT, 50, 12, QTR_SVG_START, QTR_CHART_SOFT, describe_sparse(r, sparse));
  draw_panel(&svg, r, false);
  draw_panel(&svg, r, true);
  enum qtr_status status = qtr_svg_end(&svg, err);
  if (status) {
    qtr_svg_free(&svg);
    return status;
  }
  *text = svg.text;
  *len = svg.len;
  return QTR_OK;
}
